"""The proof itself: it says equal where it is, and different where a single bit is."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import InputError
from pipework.run.losses import Losses
from pipework.run.stage_run import StageRun
from pipework.verify import Report, _compared
from tests.end_to_end.case import squared
from tests.end_to_end.cases import CASES
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, linears, numbers, trunk
from tests.run.pipes import equal, gradients

X, Y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)


def model() -> nn.Module:
    @trunk(layers=linears(2), norm=nn.BatchNorm1d(WIDTH))
    def made(self: Any, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        pipework.pipe_split()
        return self.layers[1](self.norm(h)) + h

    return made


def report(**options: Any) -> Report:
    return pipework.verify(model(), (X,), target=Y, loss=squared, **options)


def test_what_is_compared() -> None:
    found = report()
    assert found.equal
    counts = {kind: sum(c.kind == kind for c in found.comparisons) for kind in ("loss", "output", "gradient", "buffer")}
    assert counts == {"loss": 1, "output": 1, "gradient": 6, "buffer": 3}
    assert "bitwise equal to the unsplit model" in found.text()
    told = json.loads(json.dumps(found.as_dict()))
    assert told["equal"] is True
    assert len(told["comparisons"]) == 11


def next_up(tensor: Tensor) -> Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, torch.inf))


def one_bit_in_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = StageRun.backward

    def wrong(self: StageRun, kept: Any, came: Any) -> None:
        backward(self, kept, came)
        if self.index == 0:
            gradient = next(iter(self.stage.parameters())).grad
            assert gradient is not None
            gradient.view(-1)[0] = next_up(gradient.view(-1)[0])

    monkeypatch.setattr(StageRun, "backward", wrong)


def gradients_added_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, list[Any]] = {}
    backward = StageRun.backward

    def late(self: StageRun, kept: Any, came: Any) -> None:
        if self.index:
            backward(self, kept, came)
            return
        mine = held.setdefault(id(self), [])
        mine.append((kept, came))
        if len(mine) == 4:
            for pair in reversed(mine):
                backward(self, *pair)

    monkeypatch.setattr(StageRun, "backward", late)


def one_bit_in_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StageRun.forward

    def wrong(self: StageRun, microbatch: int, feed: Any, received: Any) -> Any:
        changed = [[next_up(t) if microbatch == 2 else t for t in tensors] for tensors in received]
        return forward(self, microbatch, feed, changed)

    monkeypatch.setattr(StageRun, "forward", wrong)


def no_gradient_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageRun, "returned", lambda self, end, kept: [None] * len(end.back))


def another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    total = Losses.total

    def wrong(self: Losses, *args: Any) -> Tensor:
        found = total(self, *args)
        assert found is not None
        return next_up(found)

    monkeypatch.setattr(Losses, "total", wrong)


def statistics_of_other_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StageRun.forward

    def twice(self: StageRun, microbatch: int, feed: Any, received: Any) -> Any:
        if self.index and not microbatch:
            forward(self, microbatch, feed, [[t.clone() for t in tensors] for tensors in received])
        return forward(self, microbatch, feed, received)

    monkeypatch.setattr(StageRun, "forward", twice)


@pytest.mark.parametrize(
    ("harm", "kinds"),
    [
        (one_bit_in_a_gradient, {"gradient"}),
        (gradients_added_in_another_order, {"gradient"}),
        (one_bit_in_what_arrives, {"output", "gradient", "buffer"}),
        (no_gradient_returned, {"gradient"}),
        (another_loss, {"loss"}),
        (statistics_of_other_microbatches, {"buffer"}),
    ],
)
def test_a_wrong_pipe_is_told(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Any], None], kinds: set[str]) -> None:
    harm(monkeypatch)
    found = report(schedule="gpipe")
    assert not found.equal
    assert {c.kind for c in found.comparisons if not c.equal} >= kinds
    assert {c.kind for c in found.comparisons if not c.equal} <= kinds | {"loss"}
    assert "NOT equal to the unsplit model" in found.text()
    assert found.as_dict()["equal"] is False


def wrong_on_one_rank(group: dist.ProcessGroup, rank: int) -> tuple[bool, str]:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            one_bit_in_a_gradient(patch)
        found = report(group=group)
    return found.equal, found.text()


def test_every_rank_hears_of_what_is_wrong_on_one(gloo_pool: GlooPool) -> None:
    first, second = gloo_pool.run(wrong_on_one_rank)
    assert first == second
    assert not first[0]
    assert "gradient layers.0.weight: differs by" in first[1]


@pytest.mark.parametrize("weight", range(5))  # the last bit of the last one, a bias, is lost in rounding
def test_a_parameter_that_changes_by_one_bit(monkeypatch: pytest.MonkeyPatch, weight: int) -> None:
    """The copy that is run in the pipeline differs from the reference's in the last bit of one number."""
    twin, copies = copy.deepcopy, []

    def copied(tree: Any, *args: Any) -> Any:
        found = twin(tree, *args)
        if isinstance(tree, nn.Module):
            copies.append(found)
            if len(copies) == 1:
                with torch.no_grad():
                    changed = list(found.parameters())[weight].view(-1)
                    changed[0] = next_up(changed[0])
        return found

    monkeypatch.setattr(sys.modules["pipework.verify"], "copy", SimpleNamespace(deepcopy=copied))
    found = report()
    assert len(copies) == 2
    assert not found.equal


@pytest.mark.parametrize(
    ("found", "expected", "equal", "note"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True, ""),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), False, ""),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), False, ""),
        (torch.tensor([torch.inf]), torch.tensor([torch.inf]), True, ""),
        (torch.tensor([1]), torch.tensor([1]), True, ""),
        (torch.tensor([1]), torch.tensor([2]), False, ""),
        (torch.tensor([True]), torch.tensor([False]), False, ""),
        (torch.tensor([1j]), torch.tensor([2j]), False, ""),
        (torch.zeros(0), torch.zeros(0), True, ""),
        (torch.zeros(2), torch.zeros(2, 1), False, "(2,) torch.float32, not (2, 1) torch.float32"),
        (torch.zeros(2), torch.zeros(2).double(), False, "(2,) torch.float32, not (2,) torch.float64"),
        (None, torch.zeros(2), False, "is missing, against the reference"),
        (torch.zeros(2), None, False, "is there, against the reference"),
        (None, None, True, ""),
    ],
)
def test_how_two_tensors_are_compared(found: Any, expected: Any, equal: bool, note: str) -> None:
    (comparison,) = _compared("output", "x", found, expected)
    assert (comparison.equal, comparison.note) == (equal, note)
    assert Report("", (comparison,)).equal is equal
    assert equal or Report("", (comparison,)).text()


def test_the_sign_of_zero_is_a_bit() -> None:
    (comparison,) = _compared("output", "x", torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not comparison.equal


def test_nothing_compared_is_not_equal() -> None:
    assert not Report("nothing", ()).equal


def test_the_model_and_the_batch_stay_as_they_are() -> None:
    given = model()
    x = X.clone().requires_grad_()
    squared(given(X), Y).backward()
    state, before = copy.deepcopy(given.state_dict()), gradients(given)
    generator = torch.get_rng_state()
    assert pipework.verify(given, (x,), target=Y, loss=squared).equal
    assert equal(dict(given.state_dict()), dict(state))
    assert equal(gradients(given), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, X)
    assert x.grad is None


def test_without_cuts_the_model_is_balanced_over_the_ranks() -> None:
    found = pipework.verify(nn.Sequential(*linears(6)), (X,), target=Y, loss=squared, ranks=3)
    assert found.equal
    assert "3 ranks, 3 stages" in found.title


def test_schedules_by_name_by_function_and_as_they_are() -> None:
    pipe = pipework.pipeline(model(), (X[:2],))
    for schedule in ("gpipe", pipework.schedules.gpipe, pipework.schedules.gpipe(pipe.layout(2), 4)):
        assert report(schedule=schedule).title.startswith("gpipe: 2 ranks, 2 stages, 4 microbatches")
    with pytest.raises(InputError, match=r"there is no schedule 'gpip'[\s\S]*nearest existing: gpipe"):
        report(schedule="gpip")
    with pytest.raises(InputError, match="forward_only only goes forward"):
        report(schedule="forward_only")
    with pytest.raises(InputError, match="chimera can be planned but not run"):
        report(schedule="chimera")


def test_a_schedule_decides_the_number_of_microbatches() -> None:
    pipe = pipework.pipeline(model(), (X[:4],))
    assert report(schedule=pipework.schedules.gpipe(pipe.layout(2), 2)).equal


def test_eval_mode_counts() -> None:
    case = CASES["dropout"](2, 4)
    case.model.eval()
    assert pipework.verify(case.model, case.args, target=case.target, loss=case.loss).equal


def convolutions() -> nn.Module:
    @trunk(one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 8, 3), head=linear(8, WIDTH))
    def made(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.one(x)).to(memory_format=torch.channels_last)
        pipework.pipe_split()
        return self.head(self.two(h).mean((2, 3)))

    return made


def autocast_on_processes(group: dist.ProcessGroup, rank: int) -> list[bool]:
    return autocast(group)


class Thrice(nn.Module):
    """Casts what it is given three times, as attention does; autocast would cast a leaf only once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.norm = linears(3), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in self.parts)
        return self.norm((q @ k.t()).softmax(-1).to(v.dtype) @ v).float()


def autocast(group: dist.ProcessGroup | None = None) -> list[bool]:
    @trunk(layers=linears(2), block=Thrice())
    def inside(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.layers[0](x).float()
            pipework.pipe_split()
            h = self.block(h) + self.layers[1](h) + h
        return h.float()

    found = [pipework.verify(inside, (X,), target=Y, loss=squared, group=group)]
    with torch.autocast("cpu", torch.bfloat16):
        blocks = nn.Sequential(Thrice(), Thrice())
        found += [pipework.verify(blocks, (X,), target=Y, loss=squared, group=group), report(group=group)]
    return [each.equal for each in found]


def test_autocast_inside_and_around(gloo_pool: GlooPool) -> None:
    assert autocast() == [True, True, True]
    assert gloo_pool.run(autocast_on_processes) == [[True, True, True]] * 2


def test_convolutions_in_channels_last() -> None:
    found = pipework.verify(convolutions(), (numbers(8, 3, 8, 8),), target=Y, loss=squared)
    assert found.equal, found.text()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    made = nn.Sequential(*linears(4)).to(dtype)
    assert pipework.verify(made, (X.to(dtype),), target=Y.to(dtype), loss=squared).equal


def test_a_loss_that_uses_the_model_itself_is_not_called_equal() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() + model[0].weight.square().sum()

    with pytest.raises(InputError, match=r"uses the model's own '0.weight'"):
        pipework.verify(model, (torch.ones(4, 4),), target=torch.zeros(4, 4), loss=loss)
    assert model[0].weight.grad is None
