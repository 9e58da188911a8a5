"""Parameters that several stages use: tied by name, read by the trunk, or in a module called in several stages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipework
from pipework import SplitPoint
from pipework.verify import Report
from tests.end_to_end.case import crossed, token_batch
from tests.families import PER_RANK
from tests.gloo import GlooPool

MICROBATCHES = 4
BEGINNING = SplitPoint.BEGINNING


class Tied(nn.Module):
    """One weight is the embedding, twice a factor in the trunk, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.dropout(torch.relu(self.first(x))) + x
        x = x + self.second(x) @ self.embed.weight.t() @ self.embed.weight
        return self.head(x)


class Recurrent(nn.Module):
    """One block, called in every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for turn in range(4):
            if turn:
                pipework.pipe_split()
            x = x + self.block(x)
        return self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    return token_batch(rows=16, length=6, vocabulary=50, seed=3)


SPLITS: dict[str, Any] = {
    "two": {"second": BEGINNING},
    "four": {"first": BEGINNING, "second": BEGINNING, "head": BEGINNING},
}


def report(model: nn.Module, split: Any, family: str, ranks: int, group: Any = None) -> Report:
    inputs, target = batch()
    return pipework.verify(
        model,
        (inputs,),
        target=target,
        loss=crossed,
        split_spec=split,
        schedule=family,
        ranks=ranks,
        microbatches=MICROBATCHES,
        group=group,
    )


def cases() -> list[Any]:
    found = []
    for family, per_rank in PER_RANK.items():
        found.append(pytest.param(Tied, {1: "two", 2: "four"}[per_rank], family, 2, id=f"tied-{family}"))
        found.append(pytest.param(Recurrent, None, family, 4 // per_rank, id=f"recurrent-{family}"))
    return found


@pytest.mark.parametrize(("kind", "split", "family", "ranks"), cases())
def test_threads(kind: type[nn.Module], split: str | None, family: str, ranks: int) -> None:
    torch.manual_seed(0)
    found = report(kind(), SPLITS[split] if split else None, family, ranks)
    assert found.equal, found.text()


def over_gloo(group: Any, rank: int, kind: type[nn.Module], split: str | None, family: str) -> str:
    found = report(kind(), SPLITS[split] if split else None, family, group.size(), group)
    return "" if found.equal else found.text()


@pytest.mark.parametrize(("kind", "split", "family", "ranks"), cases())
def test_processes(gloo_pool: GlooPool, kind: type[nn.Module], split: str | None, family: str, ranks: int) -> None:
    assert gloo_pool.run(over_gloo, kind, split, family, ranks=ranks) == [""] * ranks


def trained(runner: pipework.Runner, model: nn.Module) -> bool:
    """Three steps of AdamW with clipping; whether runner and model stay equal to the last bit."""
    inputs, target = batch()
    mine, theirs = torch.optim.AdamW(runner.parameters()), torch.optim.AdamW(model.parameters())
    for _ in range(3):
        runner.step(inputs, target=target)
        for x, y in zip(inputs.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            (crossed(model(x), y) / MICROBATCHES).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if not torch.equal(runner.clip_grad_norm_(0.1), norm):
            return False
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in runner.state_dict().items())


def runner_for(model: nn.Module, group: Any = None) -> pipework.Runner:
    pipe = pipework.pipeline(model, (batch()[0][:4],), split_spec=SPLITS["two"])
    schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=2), MICROBATCHES)
    return pipework.Runner(pipe, schedule, loss=crossed, group=group)


def test_training_keeps_the_tie_and_counts_it_once() -> None:
    model = Tied().eval()
    reference = copy.deepcopy(model)
    assert trained(runner_for(model), reference)
    assert model.head.weight is model.embed.weight


def test_modes_and_values_of_a_tied_module_are_followed() -> None:
    """The stage of the head works on a copy of it, which must not fall behind."""
    torch.manual_seed(0)
    model = Tied()
    runner = runner_for(model)
    inputs, target = batch()
    runner.step(inputs, target=target)
    with torch.no_grad():
        model.embed.weight.mul_(2.0)
        model.first.weight.data = model.first.weight.data * 3.0
    model.zero_grad()
    model.eval()
    fresh = runner_for(copy.deepcopy(model))
    assert torch.equal(runner.step(inputs, target=target), fresh.step(inputs, target=target))
    for (name, parameter), (_, other) in zip(runner.named_parameters(), fresh.named_parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), name


def test_a_frozen_tied_parameter_has_no_gradient_and_costs_no_transfer() -> None:
    model = Tied().eval()
    model.embed.weight.requires_grad_(False)
    pipe = pipework.pipeline(model, (batch()[0][:4],), split_spec=SPLITS["two"])
    edges = pipe.variant(pipe.example).cut.edges
    assert not any(wire.parameter for edge in edges for wire in edge.wires)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=2), MICROBATCHES)
    pipework.Runner(pipe, schedule, loss=crossed).step(batch()[0], target=batch()[1])
    assert model.embed.weight.grad is None


def train_over_gloo(group: Any, rank: int) -> bool:
    model = Tied().eval()
    return trained(runner_for(model, group), copy.deepcopy(model))


def test_training_on_processes_keeps_every_copy_equal(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(train_over_gloo) == [True, True]
