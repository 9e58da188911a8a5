"""A backward in two halves (I, then W) against the backward in one piece (B), on one stage of the demo's GPT.

A third contender shows what two passes cost without pipework: autograd itself is asked for the gradients of the input
and of each Linear's output, and then one product is made of each of these. Where its modules are and what they saved it
is told beforehand, so that it can do this on these blocks alone.

Each contender has a process of its own, as in training. In one process the first to come would leave its gradients in
the heap among the other's memory, and by where they lie glibc gives more or less of it back to the system, to be mapped
anew: up to a tenth of the time. So here glibc gives nothing back. Where memory lies is luck even so, and the processes
start several times.

    python -m benchmarks.halves [--starts 7] [--repeats 9] [--microbatches 8]
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from benchmarks.results import Ratio, Result, milliseconds
from benchmarks.sizes import SIZES, Size
from pipework.run.backward import SplitBackward

CLAIM = (
    "Milliseconds of processor time for one microbatch's backward, and for its forward and backward, on half the "
    "blocks of the model, each contender in a process of its own; median over alternating repeats. Ratios are to the "
    "time in one piece, by repeat: median (least to greatest). 1.03 at most is wanted of I + W against B at the demo's "
    "size. Gradients that wait are written to memory and read again, which two passes of autograd itself, without a "
    "line of pipework, pay too. The rest is Python: at the smallest size some 3 microseconds per module in I and W "
    "together, and 7 in F."
)
ONE_PIECE, TWO_HALVES, NATIVE = "B", "I + W", "autograd alone"
HEAP = {f"MALLOC_{name}_": "1000000000" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "TOP_PAD")}
Times = tuple[float, float]


class Half:
    """Half the blocks of a model, gone through as a rank in the middle of a pipeline does."""

    def __init__(self, size: Size) -> None:
        self.blocks = nn.Sequential(*size.model().blocks[: size.blocks // 2])
        self.split = SplitBackward(self.blocks)
        shape = size.sequences, size.context, size.width
        self.x, self.seed = torch.randn(shape), torch.randn(shape)

        linears = [p for m in self.blocks.modules() if isinstance(m, nn.Linear) for p in (m.weight, m.bias)]
        self.others = [p for p in self.blocks.parameters() if all(p is not other for other in linears)]

    def give(self) -> Tensor:
        return self.x.detach().requires_grad_()

    def one_piece(self) -> Times:
        begin = time.thread_time()
        out = self.blocks(self.give())
        middle = time.thread_time()
        out.backward(self.seed)
        end = time.thread_time()
        return end - middle, end - begin

    def two_halves(self) -> Times:
        begin = time.thread_time()
        given = self.give()
        calls = self.split.begin([given])
        with self.split.at_work(calls):
            out = self.blocks(given)
        self.split.look_at(calls, [out])
        middle = time.thread_time()
        later = self.split.input_gradient(calls, [out], [self.seed])
        self.split.weight_gradient(later)
        end = time.thread_time()
        return end - middle, end - begin

    def autograd_alone(self) -> Times:
        begin = time.thread_time()
        given = self.give()
        out = self.blocks(given)
        middle = time.thread_time()
        edges, products = _products(out)
        after = time.thread_time()
        wanted: list[Any] = [given, *self.others, *edges]
        found = deque(torch.autograd.grad([out], wanted, [self.seed]))
        found.popleft()
        for parameter in self.others:
            _add(parameter, found.popleft())
        with torch.no_grad():
            while found:
                gradient, (x, weight, bias) = found.popleft(), products.popleft()
                _add(weight, gradient.t() @ x)
                _add(bias, gradient.sum(0))
        end = time.thread_time()
        return end - after, end - after + middle - begin


def _products(out: Tensor) -> tuple[list[GradientEdge], deque[tuple[Tensor, Tensor, Tensor]]]:
    """The products with a weight in the graph: where the gradient of each comes; its input, its weight and its bias."""
    nodes: list[Any] = [out.grad_fn]
    for node in nodes:
        nodes += [after for after, _ in node.next_functions if after is not None and after not in nodes]
    products = [node for node in nodes if node.name() == "AddmmBackward0"]
    known = deque[tuple[Tensor, Tensor, Tensor]]()
    for node in products:
        (bias, _), _, (transposed, _) = node.next_functions
        known.append((node._saved_mat1.detach(), transposed.next_functions[0][0].variable, bias.variable))
    return [GradientEdge(node, 0) for node in products], known


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@cache
def half_of(size: Size) -> Half:
    """One for each process."""
    torch.set_num_threads(1)
    return Half(size)


def averaged(name: str, size: Size, microbatches: int) -> Times:
    half = half_of(size)
    call = {ONE_PIECE: half.one_piece, TWO_HALVES: half.two_halves, NATIVE: half.autograd_alone}[name]
    call()
    times = [call() for _ in range(microbatches)]
    return sum(backward for backward, _ in times) / microbatches, sum(both for _, both in times) / microbatches


def alternated(size: Size, starts: int, repeats: int, microbatches: int) -> dict[str, list[Times]]:
    found: dict[str, list[Times]] = {ONE_PIECE: [], TWO_HALVES: [], NATIVE: []}
    for _ in range(starts):
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, HEAP))  # read by the processes as they start
            processes = {n: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for n in found}
            turns = deque(found)
            for _ in range(repeats):
                for name in turns:
                    found[name].append(processes[name].submit(averaged, name, size, microbatches).result())
                turns.rotate()  # whom one comes after makes a difference too
    return found


def benchmark(sizes: tuple[Size, ...] = SIZES, starts: int = 7, repeats: int = 9, microbatches: int = 8) -> Result:
    rows, data, found = [], {}, {}
    for size in sizes:
        print(size, flush=True)
        found = alternated(size, starts, repeats, microbatches)
        data[size.name] = found
        for what, place in (("backward", 0), ("forward and backward", 1)):
            whole, *others = ([times[place] for times in found[name]] for name in found)
            rows.append(
                [str(size), what, *map(milliseconds, (whole, *others)), *(str(Ratio.of(o, whole)) for o in others)]
            )
    columns = ["model", "what", *found, *(f"{name} / {ONE_PIECE}" for name in list(found)[1:])]
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
