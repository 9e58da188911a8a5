"""A pipelined training step on two Gloo processes, against torch.distributed.pipelining.

The peer has hand-written stages, and stages that it traced itself. All else is the same: weights, microbatches, loss,
cut, schedule, processes, one thread in each. Before anything is timed, all gradients are compared with the model's.

    python -m benchmarks.step [--repeats 7] [--seconds 0.5] [--sizes tiny,small]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as peer
from torch import Tensor, nn

import pipework
from benchmarks import handwritten
from benchmarks.results import Ratio, Result, alternated, milliseconds
from benchmarks.sizes import BY_NAME, SIZES, Size, loss
from tests.gloo import GlooPool

CLAIM = (
    "Milliseconds of one training step (forward and backward of all microbatches, 2 processes), median over\n"
    "alternating repeats; in brackets the processor time of the busier process, which other load hardly changes.\n"
    "Ratios are the peer's time over pipework's, by repeat: median (least to greatest); above 1, pipework is faster."
)
SCHEDULES = {
    "1F1B": (pipework.schedules.one_f_one_b, peer.Schedule1F1B),
    "GPipe": (pipework.schedules.gpipe, peer.ScheduleGPipe),
}
OURS, HAND_WRITTEN, TRACED = "pipework", "hand-written", "traced"
TOLERANCE = 1e-5  # of a gradient's largest number, for the peer, which scales gradients afterwards; pipework has none


@dataclass(frozen=True)
class Contender:
    """One way to make the same step, on this rank."""

    parameters: dict[str, nn.Parameter]  # by the model's own names
    step: Callable[[], object]

    def once(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self.step()


def ours(size: Size, schedule: Callable[..., pipework.Schedule], group: dist.ProcessGroup | None) -> Contender:
    x, target = size.batch()
    cut = {f"blocks.{size.blocks // 2}": pipework.SplitPoint.BEGINNING}
    pipe = pipework.pipeline(size.model(), (x[: size.sequences],), split_spec=cut)
    planned = schedule(pipe.layout(ranks=2), microbatches=size.microbatches)
    runner = pipework.Runner(pipe, planned, loss=loss, group=group)
    return Contender(dict(runner.named_parameters()), lambda: runner.step(x, target=target))


def hand_written(size: Size, schedule: Callable[..., Any], group: dist.ProcessGroup) -> Contender:
    module = handwritten.stage(size.model(), group.rank())
    stage = peer.PipelineStage(module, group.rank(), 2, torch.device("cpu"), group=group)
    return _peer(size, schedule(stage, size.microbatches, loss_fn=loss), module, group)


def traced(size: Size, schedule: Callable[..., Any], group: dist.ProcessGroup) -> Contender:
    x, _ = size.batch()
    cut = {f"blocks.{size.blocks // 2}": peer.SplitPoint.BEGINNING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by the peer's own use of torch
        pipe = peer.pipeline(size.model(), (x[: size.sequences],), split_spec=cut)
    stage = pipe.build_stage(group.rank(), torch.device("cpu"), group)
    module = pipe.get_stage_module(group.rank())
    return _peer(size, schedule(stage, size.microbatches, loss_fn=loss), module, group)


def _peer(size: Size, schedule: Any, module: nn.Module, group: dist.ProcessGroup) -> Contender:
    x, target = size.batch()
    args, kwargs = ((x,), {}) if group.rank() == 0 else ((), {"target": target})
    # Without outputs, which pipework does not keep either unless asked to.
    return Contender(dict(module.named_parameters()), lambda: schedule.step(*args, **kwargs, return_outputs=False))


def reference(size: Size) -> dict[str, Tensor]:
    """The unsplit model's gradients, microbatch by microbatch."""
    model = size.model()
    x, target = size.batch()
    for part, aim in zip(x.chunk(size.microbatches), target.chunk(size.microbatches), strict=True):
        (loss(model(part), aim) / size.microbatches).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(contender: Contender, size: Size) -> float:
    """The largest difference from the unsplit model's gradients, relative to the largest number of each."""
    expected = reference(size)
    contender.once()
    found = {name: parameter.grad for name, parameter in contender.parameters.items() if parameter.grad is not None}
    if found.keys() != contender.parameters.keys():
        raise RuntimeError(f"no gradient of {sorted(contender.parameters.keys() - found.keys())}")
    return max(float((g - expected[n]).abs().max() / expected[n].abs().max()) for n, g in found.items())


def measured(
    group: dist.ProcessGroup, rank: int, name: str, schedule: str, repeats: int, seconds: float
) -> dict[str, Any]:
    """Times in seconds for each contender, by repeat; the same on both ranks."""
    size = BY_NAME[name]
    plan_ours, plan_peer = SCHEDULES[schedule]
    contenders = {
        OURS: ours(size, plan_ours, group),
        HAND_WRITTEN: hand_written(size, plan_peer, group),
        TRACED: traced(size, plan_peer, group),
    }
    differences = {name: difference(contender, size) for name, contender in contenders.items()}
    if differences[OURS] != 0 or not all(found < TOLERANCE for found in differences.values()):
        raise RuntimeError(f"gradients differ from the unsplit model's by {differences}")

    busy: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(name: str, steps: int) -> float:
        """Seconds for a step, on the rank that took longer; the first, with cold caches, does not count."""
        contenders[name].once()
        dist.barrier(group)
        begin, begin_busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            contenders[name].once()
        wall, own = time.perf_counter() - begin, time.process_time() - begin_busy
        busy[name].append(_greatest(own / steps, group))
        return _greatest(wall / steps, group)

    steps = max(3, round(seconds / timed(OURS, 5)))
    busy[OURS].clear()
    say = print if rank == 0 else lambda line: None
    times = alternated({name: partial(timed, name, steps) for name in contenders}, repeats, say)
    return {"steps": steps, "seconds": times, "processor seconds": busy, "gradients differ by": differences}


def _greatest(value: float, group: dist.ProcessGroup) -> float:
    """The same on both ranks, so that they agree about it."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return tensor.item()


def benchmark(sizes: Iterable[Size] = SIZES, repeats: int = 7, seconds: float = 0.5) -> Result:
    data: dict[str, Any] = {}
    rows: list[Sequence[str]] = []
    pool = GlooPool(ranks=2)
    try:
        for size in sizes:
            for schedule in SCHEDULES:
                print(f"{size}, {schedule}", flush=True)
                found = pool.run(measured, size.name, schedule, repeats, seconds, limit=3600.0)[0]
                data[f"{size.name} {schedule}"] = found
                rows.append(_row(size, schedule, found))
    finally:
        pool.close()
    columns = [
        "model, microbatch",
        "schedule",
        "pipework",
        "hand-written",
        "traced",
        "hand-written / pipework",
        "traced / pipework",
    ]
    return Result("step", CLAIM, columns, rows, {"repeats": repeats, "results": data})


def _row(size: Size, schedule: str, found: dict[str, Any]) -> Sequence[str]:
    times = found["seconds"]
    busy = found["processor seconds"]
    ratios = [str(Ratio.of(times[other], times[OURS])) for other in (HAND_WRITTEN, TRACED)]
    both = [f"{milliseconds(times[name])} ({milliseconds(busy[name])})" for name in (OURS, HAND_WRITTEN, TRACED)]
    return [str(size), schedule, *both, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one repeat of pipework's step")
    parser.add_argument("--sizes", default=",".join(BY_NAME))
    given = parser.parse_args()
    benchmark([BY_NAME[name] for name in given.sizes.split(",")], given.repeats, given.seconds).write()


if __name__ == "__main__":
    main()
