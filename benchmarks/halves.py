"""A backward in two halves (I, then W) against the backward in one piece (B), on one stage of the demo's GPT.

Each contender has a process of its own, as in training. In one process the first to come would leave its gradients in
the heap among the other's memory, and by where they lie glibc gives more or less of it back to the system, to be mapped
anew: up to a twentieth of the time. How a heap comes to lie is luck even so, and the processes start several times.

    python -m benchmarks.halves [--starts 7] [--repeats 9] [--microbatches 8]
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from benchmarks.results import Ratio, Result, milliseconds
from benchmarks.sizes import SIZES, Size
from pipework.run.backward import SplitBackward

CLAIM = (
    "Milliseconds of processor time for one microbatch's backward, and for its forward and backward, on half the "
    "blocks of the model, each contender in a process of its own; median over alternating repeats. Ratios are the time "
    "in two halves over that in one piece, by repeat: median (least to greatest). 1.03 at most is wanted of I + W "
    "against B at the demo's size, and is not reached there: other runs of the same script gave 1.04 to 1.07, and so "
    "they did with glibc's trimming off (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 1000000000). What it "
    "costs: some 10 microseconds of Python per module in I and W together, and about as many in F, or twice as many at "
    "the demo's size; and gradients that wait are read again when other data have been through the cache."
)
ONE_PIECE, TWO_HALVES = "B", "I + W"
Times = tuple[float, float]


class Half:
    """Half the blocks of a model, gone through as a rank in the middle of a pipeline does."""

    def __init__(self, size: Size) -> None:
        self.blocks = nn.Sequential(*size.model().blocks[: size.blocks // 2])
        self.split = SplitBackward(self.blocks)
        shape = size.sequences, size.context, size.width
        self.x, self.seed = torch.randn(shape), torch.randn(shape)

    def forward(self) -> Tensor:
        return self.blocks(self.x.detach().requires_grad_())

    def one_piece(self) -> Times:
        begin = time.thread_time()
        out = self.forward()
        middle = time.thread_time()
        out.backward(self.seed)
        end = time.thread_time()
        return end - middle, end - begin

    def two_halves(self) -> Times:
        begin = time.thread_time()
        with self.split.at_work():
            out = self.forward()
            self.split.look_at([out])
        middle = time.thread_time()
        with self.split.at_work():
            later = self.split.input_gradient(partial(out.backward, self.seed))
        self.split.weight_gradient(later)
        end = time.thread_time()
        return end - middle, end - begin


@cache
def half_of(size: Size) -> Half:
    """One for each process."""
    torch.set_num_threads(1)
    return Half(size)


def averaged(name: str, size: Size, microbatches: int) -> Times:
    half = half_of(size)
    call = half.one_piece if name == ONE_PIECE else half.two_halves
    call()
    times = [call() for _ in range(microbatches)]
    return sum(backward for backward, _ in times) / microbatches, sum(both for _, both in times) / microbatches


def alternated(size: Size, starts: int, repeats: int, microbatches: int) -> dict[str, list[Times]]:
    found: dict[str, list[Times]] = {ONE_PIECE: [], TWO_HALVES: []}
    for _ in range(starts):
        with ExitStack() as stack:
            processes = {n: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for n in found}
            for _ in range(repeats):
                for name, times in found.items():
                    times.append(processes[name].submit(averaged, name, size, microbatches).result())
    return found


def benchmark(sizes: tuple[Size, ...] = SIZES, starts: int = 7, repeats: int = 9, microbatches: int = 8) -> Result:
    rows, data = [], {}
    for size in sizes:
        print(size, flush=True)
        found = alternated(size, starts, repeats, microbatches)
        data[size.name] = found
        for what, place in (("backward", 0), ("forward and backward", 1)):
            whole, halves = ([times[place] for times in found[name]] for name in (ONE_PIECE, TWO_HALVES))
            rows.append([str(size), what, milliseconds(whole), milliseconds(halves), str(Ratio.of(halves, whole))])
    columns = ["model", "what", "in one piece", "in two halves", "two halves / one piece"]
    counts = {"starts": starts, "repeats": repeats, "microbatches": microbatches}
    return Result("halves", CLAIM, columns, rows, {**counts, "seconds": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=7, help="of the two processes")
    parser.add_argument("--repeats", type=int, default=9, help="for each start")
    parser.add_argument("--microbatches", type=int, default=8, help="timed together in one repeat")
    given = parser.parse_args()
    benchmark(starts=given.starts, repeats=given.repeats, microbatches=given.microbatches).write()


if __name__ == "__main__":
    main()
