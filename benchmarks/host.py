"""What the host pays for each action beside the work itself.

That is the processor time of a step, on a model whose layers cost next to nothing, less that of the same stage called
by hand, microbatch by microbatch.

    python -m benchmarks.host [--repeats 7] [--seconds 0.5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import handwritten
from benchmarks.contenders import Case, Contender, hand_written, ours
from benchmarks.ranks import on_ranks
from benchmarks.results import Result, alternated
from benchmarks.sizes import BY_NAME, Size, loss

CLAIM = (
    "Microseconds of processor time for one action (one microbatch's forward or backward of one stage), median over "
    "alternating repeats; 1F1B where ranks are several. One process has two stages and sends nothing: what remains is "
    "the runtime itself. By hand: the stages called and gone back through, in one piece, without a pipeline. The ratio "
    "is what pipework adds to that over what the peer adds; at most a half is wanted."
)
BY_HAND, OURS, PEER = "by hand", "pipework", "torch.distributed.pipelining"
FAMILY = "one_f_one_b"
ALONE = ("interleaved_one_f_one_b", "interleaved_zero_bubble", "zero_bubble_v")  # two stages on a rank


def by_hand(size: Size, rank: int) -> Contender:
    """The stage of this rank without any pipeline: what a step cannot cost less than."""
    module = handwritten.stage(size.model(), rank, stages=2)
    parts = size.parts()
    crossing = torch.randn(size.sequences, size.context, size.width)

    def step() -> None:
        for tokens, aim in parts:
            if rank == 0:
                torch.autograd.backward(module(tokens), crossing)
            else:
                received = crossing.clone().requires_grad_()
                (loss(module(received), aim) / size.microbatches).backward()

    return Contender(dict(module.named_parameters()), step, 2 * size.microbatches)


def on_processes(group: dist.ProcessGroup, size: Size, repeats: int, seconds: float) -> dict[str, Any]:
    case = Case(size, group)
    contenders = {
        BY_HAND: by_hand(size, case.rank),
        OURS: ours(case, FAMILY, balanced=False),
        PEER: hand_written(case, FAMILY),
    }
    return _measured(contenders, repeats, seconds, time.thread_time, partial(dist.barrier, group))


def on_one_process(group: dist.ProcessGroup, size: Size, repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
    case, found = Case(size, group, ranks=1), {}
    for family in ALONE:
        contenders = {
            BY_HAND: _chained(size),
            OURS: ours(case, family, balanced=False),
            PEER: hand_written(case, family),
        }
        found[family] = _measured(contenders, repeats, seconds, time.thread_time, partial(dist.barrier, group))
    return found


def _chained(size: Size) -> Contender:
    """Both stages by hand, the second on what the first made."""
    model, parts = size.model(), size.parts()
    first, second = (handwritten.stage(model, index, stages=2) for index in range(2))

    def step() -> None:
        for tokens, aim in parts:
            made = first(tokens)
            given = made.detach().requires_grad_()
            (loss(second(given), aim) / size.microbatches).backward()
            made.backward(given.grad)

    return Contender(dict(model.named_parameters()), step, 4 * size.microbatches)


def on_threads(size: Size, repeats: int, seconds: float) -> dict[str, Any]:
    contenders = {BY_HAND: _both(size), OURS: ours(Case(size), FAMILY, balanced=False)}
    return _measured(contenders, repeats, seconds, time.process_time, lambda: None)


def _both(size: Size) -> Contender:
    first, last = by_hand(size, 0), by_hand(size, 1)
    actions = first.actions + last.actions
    return Contender({**first.parameters, **last.parameters}, lambda: (first.step(), last.step()), actions)


def _measured(
    contenders: dict[str, Contender],
    repeats: int,
    seconds: float,
    clock: Callable[[], float],
    together: Callable[[], object],
) -> dict[str, Any]:
    """Processor seconds of one step for each contender, by repeat."""
    steps = max(3, round(seconds / 0.02))

    def timed(contender: Contender) -> float:
        contender.once()
        together()
        begin = clock()
        for _ in range(steps):
            contender.once()
        return (clock() - begin) / steps

    return alternated({name: partial(timed, c) for name, c in contenders.items()}, repeats, say=lambda line: None)


def benchmark(size: Size = BY_NAME["minimal"], repeats: int = 7, seconds: float = 0.5) -> Result:
    torch.set_num_threads(1)
    ranks = on_ranks(on_processes, size, repeats, seconds)
    threads = on_threads(size, repeats, seconds)
    (alone,) = on_ranks(on_one_process, size, repeats, seconds, ranks=1)
    per_rank, rows = 2 * size.microbatches, []
    cases = [(f"process {rank} of 2", found, per_rank) for rank, found in enumerate(ranks)]
    cases += [("2 threads", threads, 2 * per_rank)]
    cases += [(f"1 process, {family}", found, 2 * per_rank) for family, found in alone.items()]
    for where, found, actions in cases:
        micro = {name: statistics.median(times) / actions * 1e6 for name, times in found.items()}
        added = {name: value - micro[BY_HAND] for name, value in micro.items()}
        told = {name: f"{micro[name]:.0f} (+{added[name]:.0f})" for name in micro}
        ratio = f"{added[OURS] / added[PEER]:.2f}" if PEER in added else "-"
        rows.append([where, f"{micro[BY_HAND]:.0f}", told[OURS], told.get(PEER, "-"), ratio])
    columns = ["ranks", BY_HAND, OURS, PEER, "ratio"]
    data = {"model": str(size), "repeats": repeats, "processor seconds": {where: found for where, found, _ in cases}}
    return Result("host", CLAIM, columns, rows, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one repeat")
    given = parser.parse_args()
    benchmark(repeats=given.repeats, seconds=given.seconds).write()


if __name__ == "__main__":
    main()
