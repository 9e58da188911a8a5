"""How often a captured step of 1F1B, two ranks as threads on one GPU, has other gradients than the unsplit model.

With the kernels that torch takes by itself, and with those that give the same bits every time. It is captured again and
again, and each graph replayed several times: a graph made wrongly would always be wrong. Beside it the unsplit model's
own graph, alone on the GPU, and while another model's, on weights of its own, runs on another stream: what differs
there, no pipeline made.

    python -m benchmarks.repeats [--size d768] [--captures 25] [--replays 8]
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import torch

from benchmarks.contenders import Case, Contender, captured, difference_of, ours, reference
from benchmarks.results import Result
from benchmarks.sizes import BY_NAME

CLAIM = (
    "Replays of captured steps whose gradients are not those of the unsplit model to the last bit, and the largest "
    "difference over the largest number of its gradient. None is wanted where kernels are repeatable."
)
UNSPLIT, BESIDE, PIPELINE = "the unsplit model", "the unsplit model, beside another", "1F1B"
Found = list[list[float]]  # by capture and replay, the largest difference


def differences(size: str, repeatable: bool, captures: int, replays: int) -> dict[str, Found]:
    torch.use_deterministic_algorithms(repeatable)
    case = Case(BY_NAME[size], device=torch.device("cuda"))
    wanted = reference(case)

    def difference(contender: Contender) -> float:
        contender.once()
        torch.cuda.synchronize()
        return difference_of(contender.gradients(), wanted)

    found: dict[str, Found] = {UNSPLIT: [], BESIDE: [], PIPELINE: []}
    unsplit = captured(case)
    found[UNSPLIT].append([difference(unsplit) for _ in range(captures * replays)])
    other, its_stream = captured(Case(case.size, device=case.device)), torch.cuda.Stream()

    def beside_other() -> float:
        with torch.cuda.stream(its_stream):
            other.once()
        return difference(unsplit)

    found[BESIDE].append([beside_other() for _ in range(captures * replays)])
    for _ in range(captures):
        contender = ours(case, "one_f_one_b", balanced=False, graphs=True)
        contender.once()
        contender.once()
        found[PIPELINE].append([difference(contender) for _ in range(replays)])
        assert not contender.unfit(), "steps were replayed"
    return found


def benchmark(size: str, captures: int, replays: int) -> Result:
    rows, data = [], {}
    for kernels, repeatable in (("torch's own choice", False), ("repeatable", True)):
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if repeatable else {}
        with patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(differences, size, repeatable, captures, replays).result()
        data[kernels] = found
        for what, by_capture in found.items():
            all_of_it = [each for one in by_capture for each in one]
            bad, graphs = sum(map(bool, all_of_it)), sum(map(any, by_capture))
            wholly = sum(map(all, by_capture))
            counts = [str(n) for n in (len(by_capture), graphs, wholly, len(all_of_it), bad)]
            rows.append([kernels, what, *counts, f"{max(all_of_it):.1e}" if bad else "equal"])
    columns = ["kernels", "step", "graphs", "that differ once", "always", "replays", "that differ", "at most by"]
    return Result(f"repeats-{size}", CLAIM, columns, rows, {"difference": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="d768")
    parser.add_argument("--captures", type=int, default=25)
    parser.add_argument("--replays", type=int, default=8, help="of each capture")
    given = parser.parse_args()
    benchmark(given.size, given.captures, given.replays).write()


if __name__ == "__main__":
    main()
