"""Stage code against the module's own forward: one process, one thread, the demo's GPT whole and in 1, 2 and 4 stages.

python -m benchmarks.stage_code [--repeats 101] [--calls 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pipework
from benchmarks.results import Ratio, Result, alternated, milliseconds
from benchmarks.sizes import BY_NAME, Size, loss

CLAIM = (
    "Milliseconds of one microbatch, processor time of the one thread that there is, median over alternating repeats. "
    "Ratios are the model's own time over that of its stages, by repeat: median (least to greatest); 0.98 is wanted."
)
MODEL = "model"


def forwards(size: Size) -> dict[str, Callable[[], Tensor]]:
    """The model's own forward, and the same in stages: `pipe(x)`, and the bare stage modules one after another."""
    model = size.model()
    x = size.batch()[0][: size.sequences]
    found: dict[str, Callable[[], Tensor]] = {MODEL: lambda: model(x)}
    for stages in (1, 2, 4):
        # The pipes share the model's parameters: all contenders read the same memory.
        cuts = {f"blocks.{size.blocks * i // stages}": pipework.SplitPoint.BEGINNING for i in range(1, stages)}
        pipe = pipework.pipeline(model, (x,), split_spec=cuts) if cuts else pipework.pipeline(model, (x,), stages=1)
        assert pipe.num_stages == stages
        found[f"pipe(x), {stages} stages"] = lambda pipe=pipe: pipe(x)[0]
        modules = [pipe.get_stage_module(index) for index in range(stages)]
        codes = [partial(*pair) for pair in zip(pipe.variant(pipe.example).codes, modules, strict=True)]
        found[f"stage modules, {stages} stages"] = partial(_in_turn, modules, x)
        found[f"generated code, {stages} stages"] = partial(_in_turn, codes, x)  # as the executor calls it
    expected = model(x)
    assert all(torch.equal(forward(), expected) for forward in found.values())
    return found


def _in_turn(stages: Sequence[Callable[[Tensor], tuple[Tensor]]], x: Tensor) -> Tensor:
    for stage in stages:
        (x,) = stage(x)
    return x


def forward_alone(forward: Callable[[], Tensor], target: Tensor) -> Callable[[], object]:
    return forward


def with_backward(forward: Callable[[], Tensor], target: Tensor) -> Callable[[], object]:
    return lambda: loss(forward(), target).backward()


def timed(call: Callable[[], object], calls: int) -> float:
    call()
    begin = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - begin) / calls


def benchmark(size: Size = BY_NAME["demo"], repeats: int = 101, calls: int = 1) -> Result:
    torch.set_num_threads(1)
    target = size.batch()[1][: size.sequences]
    rows, data = [], {}
    for what, how in (("forward", forward_alone), ("forward and backward", with_backward)):
        print(f"{size}, {what}", flush=True)
        measures = {name: partial(timed, how(forward, target), calls) for name, forward in forwards(size).items()}
        times = alternated(measures, repeats, say=lambda line: None)
        data[what] = times
        for name, found in times.items():
            ratio = "1" if name == MODEL else str(Ratio.of(times[MODEL], found))
            rows.append([what, name, milliseconds(found), ratio])
    columns = ["what", "how", "ms", "model / stages"]
    whole: dict[str, Any] = {"model": str(size), "repeats": repeats, "seconds": data}
    return Result("stage_code", CLAIM, columns, rows, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--calls", type=int, default=1, help="timed in one repeat, after one that is not")
    given = parser.parse_args()
    benchmark(repeats=given.repeats, calls=given.calls).write()


if __name__ == "__main__":
    main()
