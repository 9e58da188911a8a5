"""The parameters of a runner: whose they are, what they are called, clipping, state dicts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import InputError
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import equal, gradients, piped, runner_of, sequence, unsplit

X, Y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_torchs_own(norm_type: float, max_norm: float) -> None:
    runner, reference = runner_of(piped(sequence(), "1", "2", "3"), ranks=4), sequence()
    runner.step(X, target=Y)
    unsplit(reference, X, Y, 4)
    found = runner.clip_grad_norm_(max_norm, norm_type)
    assert torch.equal(found, nn.utils.clip_grad_norm_(reference.parameters(), max_norm, norm_type))
    assert equal(gradients(runner.pipe.model), gradients(reference))


def test_clipping_without_gradients() -> None:
    runner = runner_of(piped(sequence(), "2"))
    assert torch.equal(runner.clip_grad_norm_(1.0), nn.utils.clip_grad_norm_(sequence().parameters(), 1.0))


def test_clipping_counts_tied_and_foreign_named_parameters() -> None:
    """Weights tied inside a stage that calls them in another order than the model defines them."""

    @trunk(head=linear(), body=linear(), first=linear())
    def model(self: Any, x: Tensor) -> Tensor:
        h = self.first(x)
        pipework.pipe_split()
        return self.head(self.body(h))

    model.get_submodule("body").weight = model.get_submodule("head").weight
    reference = copy.deepcopy(model)
    pipe = pipework.pipeline(model, (X[:2],))
    runner = runner_of(pipe)
    runner.step(X, target=Y)
    unsplit(reference, X, Y, 4)
    assert {name for name, _ in runner.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert torch.equal(runner.clip_grad_norm_(1e-3), nn.utils.clip_grad_norm_(reference.parameters(), 1e-3))
    assert equal(gradients(model), gradients(reference))
    assert pipework.verify(reference, (X,), target=Y, loss=F.mse_loss).equal


def test_state_dicts_go_from_any_cut_to_any_other() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), linear(), linear(), nn.BatchNorm1d(WIDTH), linear())

    two, four = runner_of(piped(normed(), "3")), runner_of(piped(normed(), "1", "3", "5"), ranks=4)
    optimizer = torch.optim.SGD(two.parameters(), 0.1)
    two.step(X, target=Y)
    optimizer.step()
    state = two.state_dict()
    plain = normed()
    plain.load_state_dict(state)
    four.load_state_dict(state)
    assert list(plain.state_dict()) == list(four.pipe.model.state_dict())
    assert equal(four.state_dict(), state)
    assert equal(plain.state_dict(), two.pipe.model.state_dict())
    assert torch.equal(four.evaluate(X).output, two.evaluate(X).output)
    del state["5.weight"]
    with pytest.raises(InputError, match=r"the state dict lacks 5\.weight"):
        four.load_state_dict(state)


def test_the_runner_holds_each_parameter_once_and_those_of_the_user() -> None:
    model = sequence()
    runner = runner_of(piped(model, "1", "2", "3"), ranks=2)
    assert {id(p) for p in runner.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(runner.parameters())) == len(list(model.parameters()))
    assert {name for name, _ in runner.named_parameters()} == {name for name, _ in model.named_parameters()}
