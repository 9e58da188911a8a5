"""Microbatches that take different paths through the trunk, because their inputs or a counter say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipework
from pipework.errors import CutError, MismatchError
from pipework.verify import Report
from tests.families import PER_RANK
from tests.gloo import GlooPool

MICROBATCHES = 4


class Masked(nn.Module):
    """Drops a mask that masks nothing, as transformers do: then it crosses no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = None if mask.all() else mask.to(x.dtype).unsqueeze(-1)
        for number, layer in enumerate(self.layers):
            if number:
                pipework.pipe_split()
            x = torch.relu(layer(x)) if weights is None else torch.relu(layer(x * weights)) + x
        return x


class Counting(nn.Module):
    """Does something else in every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        pipework.pipe_split()
        return self.last(x * 2 if self.calls % 2 else x.tanh())


class Reading(nn.Module):
    """Reads back what a closed module made, which is known only while the step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pipework.pipe_split()
        return self.last(x if x.sum() > 0 else -x)


def masks() -> Tensor:
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[2, 1] = mask[7, 0] = False  # in the second and in the last microbatch
    return mask


def report(family: str, ranks: int, group: Any = None) -> Report:
    torch.manual_seed(0)
    batch = torch.randn(8, 3, 8)
    return pipework.verify(
        Masked(),
        (batch, masks()),
        target=torch.randn(8, 3, 8),
        loss=F.mse_loss,
        schedule=family,
        ranks=ranks,
        microbatches=MICROBATCHES,
        group=group,
    )


def cases() -> list[tuple[str, int]]:
    return [(name, 4 // per_rank) for name, per_rank in PER_RANK.items()]


@pytest.mark.parametrize(("family", "ranks"), cases())
def test_a_mask_in_some_microbatches_only(family: str, ranks: int) -> None:
    found = report(family, ranks)
    assert found.equal, found.text()


def over_gloo(group: Any, rank: int, family: str) -> str:
    found = report(family, group.size(), group)
    return "" if found.equal else found.text()


@pytest.mark.parametrize(("family", "ranks"), cases())
def test_a_mask_in_some_microbatches_only_on_processes(gloo_pool: GlooPool, family: str, ranks: int) -> None:
    assert gloo_pool.run(over_gloo, family, ranks=ranks) == [""] * ranks


def runner_for(model: nn.Module, *example: Tensor) -> pipework.Runner:
    pipe = pipework.pipeline(model, example)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=pipe.num_stages), MICROBATCHES)
    return pipework.Runner(pipe, schedule, loss=F.mse_loss)


def test_a_path_met_before_is_not_captured_again() -> None:
    model = Masked()
    runner = runner_for(model, torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    batch, target = torch.randn(8, 3, 8), torch.zeros(8, 3, 8)
    for _ in range(3):
        runner.step(batch, masks(), target=target)
        runner.step(batch, torch.ones(8, 3, dtype=torch.bool), target=target)
    variants = [runner.pipe.variant(runner.pipe.bind((torch.ones(2, 3, 8), m), {})) for m in masks().chunk(4)]
    assert [v is variants[0] for v in variants] == [True, False, True, False]
    assert variants[1] is variants[3]


def test_local_pipe_takes_the_path_of_its_inputs() -> None:
    model = Masked()
    pipe = pipework.pipeline(model, (torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)))
    x = torch.randn(8, 3, 8)
    assert torch.equal(pipe(x, masks())[0], model(x, masks()))


class Shaped(nn.Module):
    """Does something else with short batches, and reads a number out of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, power: Tensor) -> Tensor:
        x = self.first(x) ** int(power.item())
        pipework.pipe_split()
        return self.last(x).view(x.shape[0], 2, 4).flatten(1) if x.shape[0] > 2 else self.last(x - x.mean(0))


def by_counter_and_shape(group: Any = None) -> list[str]:
    """What differs from the unsplit model, over batches of several sizes and values on one runner; empty if nothing."""
    torch.manual_seed(0)
    batch, target = torch.randn(16, 8), torch.randn(16, 8)
    counted = pipework.verify(
        Counting(), (batch,), target=target, loss=F.mse_loss, microbatches=MICROBATCHES, group=group
    )
    wrong = [] if counted.equal else [counted.text()]
    model, reference = Shaped(), Shaped()
    reference.load_state_dict(model.state_dict())
    pipe = pipework.pipeline(model, (batch[:2], torch.tensor(1)))
    schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=2), MICROBATCHES)
    runner = pipework.Runner(pipe, schedule, loss=F.mse_loss, group=group)
    for rows, power in ((16, 1), (8, 1), (8, 2), (16, 2), (8, 1)):
        loss = runner.step(batch[:rows], torch.tensor(power), target=target[:rows])
        losses = []
        for x, y in zip(batch[:rows].chunk(MICROBATCHES), target[:rows].chunk(MICROBATCHES), strict=True):
            losses.append(F.mse_loss(reference(x, torch.tensor(power)), y))
            (losses[-1] / MICROBATCHES).backward()
        if not torch.equal(loss, torch.stack(losses).detach().sum() / MICROBATCHES):
            wrong.append(f"loss with {rows} rows and {power}")
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    return wrong + [name for name, p in runner.named_parameters() if not torch.equal(p.grad, wanted[name])]


def counter_and_shape_over_gloo(group: Any, rank: int) -> list[str]:
    return by_counter_and_shape(group)


def test_counters_shapes_and_numbers_read_from_inputs_decide(gloo_pool: GlooPool) -> None:
    assert by_counter_and_shape() == []
    assert gloo_pool.run(counter_and_shape_over_gloo) == [[], []]


def test_a_value_that_only_the_step_can_know_is_refused_where_it_is_read() -> None:
    torch.manual_seed(0)
    model = Reading()
    batch = torch.randn(8, 8)
    positive = batch if model.first(batch[:2]).sum() > 0 else -batch
    runner = runner_for(model, positive[:2])
    with pytest.raises(MismatchError, match="the model took another path: __bool__ is"):
        runner.step(-20 * positive, target=torch.zeros(8, 8))


class Skipping(nn.Module):
    """A layer that skips itself at random, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.training and torch.rand([]) < 0.5 else self.inner(x)


class SkippedInTheTrunk(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        pipework.pipe_split()
        for layer in self[1:]:
            if torch.rand([]) > 0.5:
                x = layer(x)
        return x.sin()


def test_layers_skipped_at_random() -> None:
    """Right where each layer stays whole, and refused with the remedy where the trunk does the choosing."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    layers = nn.Sequential(*[Skipping() for _ in range(6)])
    cut = {"2": pipework.SplitPoint.BEGINNING, "4": pipework.SplitPoint.BEGINNING}
    for family in ("one_f_one_b", "zero_bubble_h1"):
        schedule = getattr(pipework.schedules, family)(pipework.Layout.loop(3), 8)
        report = pipework.verify(
            layers, (x,), target=y, loss=F.mse_loss, schedule=schedule, split_spec=cut, microbatches=8
        )
        assert report.equal, report.text()
    trunk = SkippedInTheTrunk(*[nn.Linear(8, 8) for _ in range(3)])
    with pytest.raises(MismatchError, match=r"drawn at random(.|\n)*put the choice in a module that stays whole"):
        pipework.verify(trunk, (x,), target=y, loss=F.mse_loss, microbatches=8)
    torch.manual_seed(0)  # skips the first that it may skip
    with pytest.raises(CutError, match=r"never called(.|\n)*here chance decides(.|\n)*let a layer skip itself"):
        pipework.pipeline(trunk, (x,), split_spec={"1": pipework.SplitPoint.BEGINNING})
