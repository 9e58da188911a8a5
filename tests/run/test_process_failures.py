"""What one process does wrong in a later step reaches all: nobody hangs, and no numbers get mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipework
from pipework.errors import InputError, MismatchError, PipeworkError, TransportError
from tests.gloo import GlooPool

MICROBATCHES = 4


class Fragile(nn.Module):
    """Raises in the last stage when it meets a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), Breaking()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().abs().max() > 1e6:
            raise ValueError("this number is too large")
        return self.linear(x)


def runner(group: Any) -> pipework.Runner:
    torch.manual_seed(0)
    cuts = dict.fromkeys(("last", "second")[: group.size() - 1], pipework.SplitPoint.BEGINNING)
    pipe = pipework.pipeline(Fragile(), (torch.ones(2, 4),), split_spec=cuts)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(group.size()), MICROBATCHES)
    return pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss, group=group)


def raised(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def failing_stage(group: Any, rank: int) -> tuple[str, str, bool]:
    """The last rank's stage raises in the second step; a new runner then works as if nothing had been."""
    broken = runner(group)
    broken.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    error = raised(lambda: broken.step(torch.full((8, 4), 1e9), target=torch.zeros(8, 2)))
    again = raised(lambda: broken.step(torch.ones(8, 4), target=torch.zeros(8, 2)))
    loss = runner(group).step(torch.ones(8, 4), target=torch.zeros(8, 2))
    return type(error).__name__, type(again).__name__, bool(torch.isfinite(loss))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stage_that_raises_ends_the_step_on_every_rank(gloo_pool: GlooPool, ranks: int) -> None:
    found = gloo_pool.run(failing_stage, ranks=ranks)
    *others, (last, _, _) = found
    assert last == "ValueError"
    assert {first for first, _, _ in others} == {TransportError.__name__}
    assert all(again == TransportError.__name__ and works for _, again, works in found)


def other_inputs(group: Any, rank: int, size: int) -> str:
    """Rank 1 passes another batch in the second step than the others."""
    made = runner(group)
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    mine = size if rank == 1 else 8
    error = raised(lambda: made.step(torch.ones(mine, 4), target=torch.zeros(mine, 2)))
    assert isinstance(error, PipeworkError), error
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))  # all ranks refused it, so nothing is broken
    return type(error).__name__


@pytest.mark.parametrize(("size", "kind"), [(16, MismatchError), (4, MismatchError), (7, InputError)])
def test_another_batch_on_one_rank_is_refused_by_all(gloo_pool: GlooPool, size: int, kind: type) -> None:
    assert gloo_pool.run(other_inputs, size, ranks=3) == [kind.__name__] * 3


def other_kind(group: Any, rank: int) -> str:
    made = runner(group)
    batch, target = torch.ones(8, 4), torch.zeros(8, 2)
    made.step(batch, target=target)
    made.evaluate(batch, target=target)
    error = raised(lambda: (made.evaluate if rank else made.step)(batch, target=target))
    assert isinstance(error, MismatchError), error
    return error.what


def test_a_step_on_one_rank_and_an_evaluation_on_another(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(other_kind) == ["rank 1 has another kind of step than rank 0"] * 2
