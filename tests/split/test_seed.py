"""The first acceptance test: cuts inside a block that is used twice, and a write in place on what a stage receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pipework
from tests.gloo import GlooPool
from tests.split.equality import check


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.lin0 = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = self.lin0(x)
        pipework.pipe_split()
        x.add_(constant)
        x = self.lin1(x)
        return torch.relu(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block0 = Block()
        self.block1 = Block()

    def forward(self, x: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        x = self.block0(x, constant=constant)
        pipework.pipe_split()
        return self.block1(x, constant=constant)


def test_seed() -> None:
    torch.manual_seed(0)
    model, x, constant = Model(), torch.randn(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    pipe = pipework.pipeline(model, (x,), {"constant": constant})
    assert pipe.num_stages == 4
    names = model.state_dict().keys()
    for index in range(pipe.num_stages):
        stage = pipe.get_stage_module(index)
        assert all(name in names for name, _ in stage.named_parameters())
    assert torch.equal(pipe(x, constant)[0], model(x, constant))
    assert torch.equal(pipe(x, constant=constant)[0], model(x, constant=constant))


def test_seed_with_all_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    constant = torch.randn(2, 3, 8, 8, requires_grad=True)
    check(Model(), (x,), {"constant": constant}, want=4)


def trained(ranks: int, group: Any = None) -> str:
    torch.manual_seed(0)
    x, constant = torch.randn(8, 3, 8, 8, requires_grad=True), torch.randn(8, 3, 8, 8)
    family = "interleaved_one_f_one_b" if ranks == 2 else "one_f_one_b"
    report = pipework.verify(
        Model(),
        (x,),
        {"constant": constant},
        target=x.detach() + 1,
        loss=F.mse_loss,
        schedule=family,
        ranks=ranks,
        group=group,
    )
    return "" if report.equal else report.text()


def trained_over_gloo(group: Any, rank: int) -> str:
    return trained(group.size(), group)


@pytest.mark.parametrize("ranks", [2, 4])
def test_seed_trains(gloo_pool: GlooPool, ranks: int) -> None:
    assert not trained(ranks)
    assert gloo_pool.run(trained_over_gloo, ranks=ranks) == [""] * ranks
