"""The memory of a rank at the peak of a step, against what its plan says before the step is paid for.

Two processes over NCCL, on two GPUs or on one that they share: each has an allocator of its own. What one microbatch
keeps is measured on every stage by itself, without any pipeline. The simulator makes of it the peak of each rank in
each family, to which come the weights, the gradients, and a constant: the greatest that one action takes for itself.

    python -m benchmarks.peaks [--size d768] [--microbatches 12]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import pipework
from benchmarks import handwritten
from benchmarks.contenders import TRAINING, cuts, splits_backwards
from benchmarks.ranks import on_ranks
from benchmarks.results import Result
from benchmarks.sizes import BY_NAME, Size, loss
from pipework.plan import FAMILIES, Costs, Family, Schedule
from pipework.run.backward import SplitBackward

MIB = 2**20
CLAIM = (
    "MiB of each rank at the peak of a step, as torch's allocator counts them (NCCL's own buffers are not in it): "
    "measured, and planned, that is weights and gradients, the simulator's peak of activations, and a constant. The "
    "constant is what the libraries keep, and the most that one action needs for itself while it is at work; like the "
    "activations it is measured on the stages alone, one microbatch at a time. The ratio is measured over planned, "
    "wanted within 3 % of 1."
)


class Stage(NamedTuple):
    """Bytes of one microbatch on one stage."""

    activation: int  # from its forward to its backward
    waiting: int  # of it and of gradients, from the input gradient to the weight gradient
    boundary: int  # what it is given
    whole: int  # the most that the forward or the backward in one piece takes beyond what is kept before or after it
    halves: int  # the same for the two halves


def stages_of(size: Size, count: int, device: torch.device) -> list[Stage]:
    """Every stage by itself, on this device, one after the other."""
    model, parts = size.model(device), size.parts(device)
    return [_stage(handwritten.stage(model, index, count), parts[0], size) for index in range(count)]


def _stage(stage: handwritten.Stage, part: tuple[Tensor, Tensor], size: Size) -> Stage:
    tokens, target = part
    split = SplitBackward(stage)
    crossing = torch.randn(*tokens.shape, size.width, device=tokens.device, dtype=size.dtype)

    def give() -> Tensor:
        return tokens if stage.first else crossing.clone().requires_grad_()

    def forward(given: Tensor) -> Tensor:
        out = stage(given)
        return loss(out, target) / size.microbatches if stage.last else out

    def seed() -> Tensor | None:
        return None if stage.last else crossing.clone()

    given = give()
    calls = split.begin([given])
    with split.at_work(calls):
        out = forward(given)
    split.look_at(calls, [out])
    out.backward(seed())  # from now on workspaces and gradients are there
    del given, out
    before = _now()
    given = give()
    out = forward(given)
    activation = _now() - before - (0 if stage.last else out.nbytes)  # the output is no stage's to keep
    most = _peak() - before - activation
    _now()
    out.backward(seed())
    most = max(most, _peak() - before - activation)
    del given, out
    _now()
    given = give()
    calls = split.begin([given])
    with split.at_work(calls):
        out = forward(given)
    later = split.input_gradient(calls, [out], [seed()])
    del given, out
    most_halves = _peak() - before - activation
    waiting = _now() - before
    split.weight_gradient(later)
    most_halves = max(most_halves, _peak() - before - waiting)
    return Stage(activation, waiting, 0 if stage.first else crossing.nbytes, most, most_halves)


def _now() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated()


def planned(schedule: Schedule, stages: Sequence[Stage]) -> list[tuple[float, float]]:
    """For each rank the simulated peak of what microbatches keep, and the most that one action takes for itself."""
    costs = Costs(
        activation=tuple(float(stage.activation) for stage in stages),
        boundary=tuple(float(stage.boundary) for stage in stages),
        released_by_input_gradient=tuple(1 - min(1.0, stage.waiting / stage.activation) for stage in stages),
    )
    peaks, layout = pipework.simulate(schedule, costs).peaks, schedule.layout
    alone = [stage.halves if splits_backwards(schedule) else stage.whole for stage in stages]
    most = [max(alone[index] for index in layout.held_by(rank)) for rank in range(layout.ranks)]
    return list(zip(peaks, most, strict=True))


class Found(NamedTuple):
    """Bytes of one rank in one family."""

    weights: int  # and gradients
    kept: float
    constant: float
    measured: int

    @property
    def planned(self) -> float:
        return self.weights + self.kept + self.constant


def on_rank(group: dist.ProcessGroup, size: Size) -> tuple[dict[str, Found], dict[int, list[Stage]]]:
    device = torch.device("cuda", torch.cuda.current_device())
    stages = {count: stages_of(size, count, device) for count in (2, 4)}
    found = {
        f"{family}{', recomputed' * recomputes}": _step(group, size, device, FAMILIES[family], recomputes, stages)
        for family in TRAINING
        for recomputes in (False, True)
    }
    return found, stages


def _step(
    group: dist.ProcessGroup,
    size: Size,
    device: torch.device,
    family: Family,
    recomputes: bool,
    stages: Mapping[int, Sequence[Stage]],
) -> Found:
    gc.collect()
    before, ranks = _now(), dist.get_world_size(group)
    count = family.per_rank * ranks
    example = torch.empty(size.sequences, size.context, dtype=torch.long, device="meta")
    pipe = pipework.pipeline(
        size.model("meta"), (example,), split_spec=cuts(size, count, pipework.SplitPoint.BEGINNING)
    )
    schedule = family.build(pipe.layout(ranks, family.place), size.microbatches)
    if recomputes:
        schedule = schedule.recomputing()
    runner = pipework.Runner(pipe, schedule, loss=loss, group=group)
    runner.initialize(device=device)
    x, target = size.batch(device)
    for _ in range(3):
        runner.step(x, target=target)
    torch.cuda.synchronize()
    own = list(runner.parameters())
    weights, gradients = (sum(t.nbytes for t in each) for each in (own, [p.grad for p in own if p.grad is not None]))
    libraries = _now() - before - weights - gradients
    runner.step(x, target=target)
    torch.cuda.synchronize()
    kept, most = planned(schedule, stages[count])[dist.get_rank(group)]
    return Found(weights + gradients, kept, libraries + most, _peak() - before)


def benchmark(size: Size) -> Result:
    ranks = on_ranks(on_rank, size, backend="nccl")
    rows = []
    for name in ranks[0][0]:
        for rank, (each, _) in enumerate(ranks):
            found = each[name]
            numbers = (found.weights, found.kept, found.constant, found.planned, found.measured)
            ratio = f"{found.measured / found.planned:.3f}"
            rows.append([name, str(rank), *(f"{number / MIB:.0f}" for number in numbers), ratio])
    columns = ["family", "rank", "weights and gradients", "activations", "constant", "planned", "measured", "ratio"]
    data = {"model": str(size), "gpus": torch.cuda.device_count()}
    data["stages"] = {count: [stage._asdict() for stage in each] for count, each in ranks[0][1].items()}
    data["ranks"] = [{name: found._asdict() for name, found in each.items()} for each, _ in ranks]
    where = "with a GPU each" if torch.cuda.device_count() > 1 else "that share a GPU"
    claim = f"{size}, {size.microbatches} microbatches, two processes {where}.\n\n{CLAIM}"
    return Result(f"peaks-{size.name}", claim, columns, rows, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="d768", choices=BY_NAME)
    parser.add_argument("--microbatches", type=int, default=12)
    given = parser.parse_args()
    benchmark(dataclasses.replace(BY_NAME[given.size], microbatches=given.microbatches)).write()


if __name__ == "__main__":
    main()
