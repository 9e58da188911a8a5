"""What a runner works out once for each kind of step: the executors of its ranks, and that all ranks mean the same."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipework.errors import InputError, MismatchError, ScheduleError
from pipework.plan import Program, Schedule, check, forward_only, lower
from pipework.run.elsewhere import Elsewhere
from pipework.run.executor import Executor
from pipework.run.graphs import Graphs
from pipework.run.stage_run import StageRun
from pipework.run.transport import Transport, together
from pipework.split.pipe import Pipe, Variant

REFUSED = -1
"""In place of a plan's number: this rank will not take the step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One kind of step, ready to be played by each rank at hand."""

    schedule: Schedule
    variants: tuple[Variant, ...]  # by microbatch
    executors: tuple[Executor, ...]
    devices: frozenset[torch.device]  # of their stages
    drawing: Mapping[str, Collection[str]]  # the modules that draw random numbers, and those that each of them calls
    modules: Mapping[str, nn.Module]  # at hand, by FQN; none where nothing draws
    number: int  # tells it from other plans, the same on every rank
    loss_dtype: list[torch.dtype] = dataclasses.field(default_factory=list[torch.dtype])  # once it is known
    graphs: Graphs | None = None


def plan(
    pipe: Pipe,
    schedule: Schedule,
    variants: Sequence[Variant],
    trains: bool,
    ends: Sequence[Transport],
    graphs: bool,
    loss: Any,
) -> Plan:
    """Lower the schedule over the edges of the microbatches' variants, and prepare the executors of the ranks."""
    layout = pipe.lay(schedule.layout, *dict.fromkeys(variants))
    if trains:
        schedule = schedule.with_layout(layout)
        check(schedule)
    else:
        schedule = forward_only(layout, schedule.microbatches)
    if not ends[0].in_one_process:
        _refuse_layouts(variants)
    programs: tuple[Program, ...] = lower(schedule)
    held = [{index: pipe.get_stage_module(index) for index in layout.held_by(end.rank)} for end in ends]
    here = [stage for stages in held for stage in stages.values()]
    elsewhere = Elsewhere(pipe.model, (parameter for stage in here for parameter in stage.parameters()))
    executors = tuple(
        Executor(programs[end.rank], layout, variants, stages, end, trains, schedule.recomputed, elsewhere)
        for end, stages in zip(ends, held, strict=True)
    )
    number = int(hashlib.sha256(f"{fingerprint(variants)} {trains}".encode()).hexdigest()[:15], 16)
    drawing = {name: called for variant in dict.fromkeys(variants) for name, called in variant.drawing.items()}
    runs = [run for executor in executors for run in executor.runs]
    modules = {name: module for run in runs for name, module in run.stage.named_modules()} if drawing else {}
    in_one_stream = {name for run in runs if "" in run.compiled for name in run.compiled}
    watched = {name: called for name, called in drawing.items() if name not in in_one_stream}
    _warn_of_compiled(runs, variants)
    devices = frozenset(device for executor in executors for device in executor.devices.values())
    whole = Graphs(here, loss, devices) if graphs and trains else None
    return Plan(schedule, tuple(variants), executors, devices, watched, modules, number, graphs=whole)


def _warn_of_compiled(runs: Sequence[StageRun], variants: Sequence[Variant]) -> None:
    """Say what of the author's wish to compile, or of the schedule's to split backwards, cannot be had."""
    where = next((variant.compiled_trunk for variant in variants if variant.compiled_trunk), "")
    if where and any("" not in run.compiled for run in runs):
        warnings.warn(
            f"compiled code in {where} runs uncompiled: a cut lies in it, or it is called between the modules that "
            "stay whole, so that stages make its calls one by one; compile the stages (pipe.compile()), or cut between "
            "compiled modules",
            stacklevel=2,
        )
    found = [f"{name!r} of stage {run.index}" for run in runs if run.split for name in run.split.in_compiled]
    inside = list(dict.fromkeys(found))
    if inside:
        first = ", ".join(inside[:3]) + f" and {len(inside) - 3} more" * (len(inside) > 3)
        warnings.warn(
            f"compiled code has one backward for all: the weight gradients of {first} are made with the input gradient "
            "(I), and W has nothing left to do for them; compile what lies between the Linear, Conv and Embedding "
            "modules, or run a schedule that does not split the backward",
            stacklevel=2,
        )


def refuse_unplayable(schedule: Schedule) -> None:
    """Raise `ScheduleError` for what can be planned, drawn and simulated, but which no stage can do yet."""
    if schedule.slices > 1:
        raise ScheduleError(
            f"{schedule.name} cuts each sequence into {schedule.slices} slices",
            why="stages do not hand keys and values from slice to slice",
            remedy="run a schedule with slices=1; others can be drawn and simulated",
        )
    if schedule.microbatches_of is not None:
        raise ScheduleError(
            f"{schedule.name} shares the microbatches out between replicas of the model",
            why="a pipe has one of each stage, and every stage takes every microbatch",
            remedy="run a schedule with microbatches_of=None; others can be drawn and simulated",
        )


def _refuse_layouts(variants: Sequence[Variant]) -> None:
    for edge in (edge for variant in variants for edge in variant.cut.edges):
        for wire in edge.values:
            if wire.layout is not torch.strided:
                raise InputError(
                    f"a tensor of layout {wire.layout} would travel between processes",
                    where=f"from stage {edge.source} to stage {edge.target}",
                    why="what travels is memory in one piece, of a size that is known beforehand",
                    remedy="make it dense before the cut (.to_dense()) and sparse after it, or move the cut",
                )


def fingerprint(variants: Sequence[Variant]) -> str:
    """16 hexadecimal digits over all that ranks must agree on about a cut: its edges and their wires."""
    known = list(dict.fromkeys(variants))
    facts = [(v.cut.edges, v.cut.results) for v in known], [known.index(v) for v in variants]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def agree(facts: dict[str, Any], end: Transport) -> None:
    """Raise `MismatchError` on every rank, before a tensor moves, where a fact differs between ranks."""
    everyone = together(end, facts)
    for name in facts:
        values = [told.get(name) for told in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise MismatchError(
                    f"rank {rank} has another {name} than rank 0",
                    where=f"{name}: {values[0]!r} on rank 0, {value!r} on rank {rank}",
                    why="ranks that plan differently would wait for each other for ever",
                    remedy="make the same model, cut, schedule and runner on every rank; pass inputs of the same shape",
                )
