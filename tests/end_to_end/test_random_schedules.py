"""Any legal schedule trains as the unsplit model does; the reference here is written out, apart from `verify`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipework
from pipework import Action, Kind, Layout, Runner, Schedule, ScheduleError
from tests.end_to_end.cases import CASES
from tests.models import numbers
from tests.run.pipes import equal, gradients
from tests.strategies import trainings

STAGES = 5
PIPES: dict[str, pipework.Pipe] = {}


def pipe_of(name: str) -> pipework.Pipe:
    if name not in PIPES:
        case = CASES[name](STAGES, 1)
        PIPES[name] = pipework.pipeline(case.model, case.args, case.kwargs)
    return PIPES[name]


def alone(
    model: torch.nn.Module, x: Tensor, target: Tensor, schedule: Schedule, pipe: pipework.Pipe
) -> dict[str, Tensor | None]:
    """Each microbatch by itself, then each parameter's gradients added in the order in which its stage gets them."""
    each = []
    for row, aim in zip(x.chunk(schedule.microbatches), target.chunk(schedule.microbatches), strict=True):
        model.zero_grad()
        (torch.nn.functional.mse_loss(model(row), aim) / schedule.microbatches).backward()
        each.append({name: p.grad for name, p in model.named_parameters()})
    summed: dict[str, Tensor | None] = {}
    for order in schedule.orders:
        for action in (a for a in order if a.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)):
            for name, _ in pipe.get_stage_module(action.stage).named_parameters():
                gradient, before = each[action.microbatch][name], summed.get(name)
                summed[name] = gradient if before is None else before + gradient
    return summed


@pytest.mark.parametrize("name", ["skips", "in place", "frozen middle", "no parameters"])
@settings(max_examples=25)
@given(data=st.data(), microbatches=st.integers(1, 5))
def test_any_legal_schedule(name: str, data: st.DataObject, microbatches: int) -> None:
    pipe = pipe_of(name)
    schedule = data.draw(trainings(STAGES, pipe.layout(1).edges, microbatches))
    case = CASES[name](STAGES, microbatches)
    reference = copy.deepcopy(pipe.model)
    pipe.zero_grad()
    runner = Runner(pipe, schedule, loss=case.loss)
    runner.step(*case.args, target=case.target, **case.kwargs)
    if not case.kwargs:
        (x,) = case.args
        wanted = alone(reference, x, case.target, schedule, pipe)
        found = gradients(pipe.model)
        assert equal(found, {name: wanted.get(name) for name in found})
    else:
        report = pipework.verify(
            reference,
            case.args,
            case.kwargs,
            target=case.target,
            loss=case.loss,
            schedule=schedule,
            microbatches=microbatches,
        )
        assert report.equal, report.text()
    timeline = runner.recorded
    assert sorted(str(s.action) for s in timeline.spans) == sorted(str(a) for order in schedule.orders for a in order)


def test_slices_and_replicas_are_refused_before_anything_runs() -> None:
    pipe = pipe_of("skips")
    schedule = pipework.schedules.looped_bfs(pipe.layout(1), 2)
    for other, says in (
        (replace(schedule, slices=2), "cuts each sequence into 2 slices"),
        (replace(schedule, microbatches_of=((0, 1),) * STAGES), "shares the microbatches out between replicas"),
    ):
        pipework.check(other)
        with pytest.raises(ScheduleError, match=says):
            Runner(pipe, other, loss=torch.nn.functional.mse_loss)


def test_an_illegal_schedule_is_refused_before_anything_runs() -> None:
    pipe = pipe_of("skips")
    good = pipework.schedules.gpipe(pipe.layout(5), 2)
    swapped = tuple(tuple(reversed(order)) for order in good.orders)
    with pytest.raises(ScheduleError):
        Runner(pipe, replace(good, orders=swapped), loss=torch.nn.functional.mse_loss)


def test_an_order_that_only_the_cut_forbids_is_refused() -> None:
    """The schedule's own layout has no skip from 0 to 2 and back; the cut's has, and counts."""
    pipe = pipe_of("skips")
    chain = pipework.schedules.one_f_one_b(Layout.loop(STAGES), 3)
    loss = Runner(pipe, chain, loss=torch.nn.functional.mse_loss).step(numbers(3, 8), target=numbers(3, 8, seed=5))
    assert torch.isfinite(loss)
    early = Schedule("early", replace(Layout.loop(1, STAGES), edges=frozenset(), gradients=None), 1, ())
    order = [Action(s, Kind.FORWARD, 0) for s in reversed(range(STAGES))] + [
        Action(s, Kind.BACKWARD, 0) for s in range(STAGES)
    ]
    early = replace(early, orders=(tuple(order),))
    pipework.check(early)
    runner = Runner(pipe, early, loss=torch.nn.functional.mse_loss)
    with pytest.raises(ScheduleError):
        runner.step(numbers(1, 8), target=numbers(1, 8, seed=5))
