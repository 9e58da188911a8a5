"""A backward in two halves (I, then W) against the backward in one piece (B), on one stage of the demo's GPT.

python -m benchmarks.halves [--repeats 51] [--microbatches 8]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.results import Ratio, Result, milliseconds
from benchmarks.sizes import SIZES, Size
from pipework.run.backward import SplitBackward

CLAIM = (
    "Milliseconds of processor time for one microbatch's backward, and for its forward and backward, on half the "
    "blocks of the model, median over alternating repeats. Ratios are the time in two halves over that in one piece, "
    "by repeat: median (least to greatest); 1.03 at most is wanted of I + W against B at the demo's size. What it "
    "costs: some 10 microseconds of Python per module in I and W together, and about as many in F; and the gradients "
    "that wait are memory that was not in the cache, or not even mapped: with glibc's trimming off "
    "(MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 1000000000) the ratio at the demo's size is 1.04."
)
ONE_PIECE, TWO_HALVES = "B", "I + W"
Times = tuple[float, float]


class Half:
    """Half the blocks of a model, gone through as a rank in the middle of a pipeline does."""

    def __init__(self, size: Size) -> None:
        self.blocks = nn.Sequential(*size.model().blocks[: size.blocks // 2])
        self.split = SplitBackward(self.blocks, 0)
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


def averaged(call: Callable[[], Times], count: int) -> Times:
    call()
    times = [call() for _ in range(count)]
    return sum(backward for backward, _ in times) / count, sum(both for _, both in times) / count


def benchmark(sizes: tuple[Size, ...] = SIZES, repeats: int = 51, microbatches: int = 8) -> Result:
    torch.set_num_threads(1)
    rows, data = [], {}
    for size in sizes:
        print(size, flush=True)
        half = Half(size)
        found: dict[str, list[Times]] = {ONE_PIECE: [], TWO_HALVES: []}
        for _ in range(repeats):
            found[ONE_PIECE].append(averaged(half.one_piece, microbatches))
            found[TWO_HALVES].append(averaged(half.two_halves, microbatches))
        data[size.name] = found
        for what, place in (("backward", 0), ("forward and backward", 1)):
            whole, halves = ([times[place] for times in found[name]] for name in (ONE_PIECE, TWO_HALVES))
            rows.append([str(size), what, milliseconds(whole), milliseconds(halves), str(Ratio.of(halves, whole))])
    columns = ["model", "what", "in one piece", "in two halves", "two halves / one piece"]
    return Result("halves", CLAIM, columns, rows, {"repeats": repeats, "microbatches": microbatches, "seconds": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--microbatches", type=int, default=8, help="timed together in one repeat")
    given = parser.parse_args()
    benchmark(repeats=given.repeats, microbatches=given.microbatches).write()


if __name__ == "__main__":
    main()
