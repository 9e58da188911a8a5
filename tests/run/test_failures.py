"""A failure on one rank ends the step on all, comes through as it is, and leaves the runner able to work."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from torch import Tensor, nn

import pipework
from tests.models import WIDTH, linear, numbers
from tests.run.pipes import equal, gradients, piped, runner_of, sequence, unsplit

X, Y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)


class Fails(nn.Module):
    """Raises in its forward, or in its backward, while it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.armed = where, False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed and self.where == "forward" and not isinstance(x, torch._subclasses.FakeTensor):
            raise ZeroDivisionError("no such number")
        if x.requires_grad:
            x.register_hook(self.hook)
        return x * 1

    def hook(self, gradient: Tensor) -> None:
        if self.armed and self.where == "backward":
            raise ZeroDivisionError("no such number")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("place", range(4))
def test_a_failure_on_one_rank_ends_all_and_the_next_step_works(where: str, place: int) -> None:
    traps = [Fails(where) for _ in range(4)]
    model = nn.Sequential(*map(nn.Sequential, sequence(), traps))
    runner = runner_of(piped(model, "1", "2", "3"), ranks=4)
    runner.step(X, target=Y)
    traps[place].armed = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="no such number"):
            runner.step(X, target=Y)
    assert runner.steps == 1
    traps[place].armed = False
    model.zero_grad()
    reference = sequence()
    assert torch.equal(runner.step(X, target=Y), unsplit(reference, X, Y, 4))
    found = dict(zip(gradients(reference), gradients(model).values(), strict=True))
    assert equal(found, gradients(reference))


def test_a_failing_loss_and_an_interrupt_come_through_as_they_are() -> None:
    for error in (KeyError("target"), KeyboardInterrupt()):

        def loss(output: Tensor, target: Tensor, error: BaseException = error) -> Tensor:
            raise error

        with pytest.raises(type(error)):
            runner_of(piped(sequence(), "2"), loss=loss).step(X, target=Y)


def test_a_stage_that_makes_something_else_than_announced_is_refused() -> None:
    class Moody(nn.Module):
        wide = False

        def forward(self, x: Tensor) -> Tensor:
            return x.double() if self.wide else x

    moody = Moody()
    runner = runner_of(piped(nn.Sequential(linear(), moody, linear(), linear()), "2"))
    runner.step(X, target=Y)
    moody.wide = True
    with pytest.raises(pipework.MismatchError, match=r"torch.float64 was about to be sent as \(2, 8\), torch.float32"):
        runner.step(X, target=Y)


def test_what_a_broken_step_left_of_a_tied_weight_is_in_no_later_gradient() -> None:
    trap = Fails("backward")
    model = nn.Sequential(sequence(), trap, linear())
    model[2].weight = model[0][0].weight
    reference = copy.deepcopy(model)
    runner = runner_of(piped(model, "1"))
    trap.armed = True  # what is behind it has gone back by then, to a twin of the weight
    with pytest.raises(ZeroDivisionError):
        runner.step(X, target=Y)
    trap.armed = False
    model.zero_grad()
    assert torch.equal(runner.step(X, target=Y), unsplit(reference, X, Y, 4))
    assert equal(gradients(model), gradients(reference))


def test_an_interrupt_waits_for_the_ranks_and_the_next_step_works() -> None:
    class Interrupts(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.armed and not isinstance(x, torch._subclasses.FakeTensor):
                Interrupts.armed = False
                os.kill(os.getpid(), signal.SIGINT)  # as the user does who presses Ctrl-C
            return x

    model = nn.Sequential(sequence(), Interrupts(), linear())
    reference = copy.deepcopy(model)
    runner = runner_of(piped(model, "1"))
    runner.step(X, target=Y)
    Interrupts.armed = True
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.step(X, target=Y)
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    model.zero_grad()
    assert torch.equal(runner.step(X, target=Y), unsplit(reference, X, Y, 4))
    assert equal(gradients(model), gradients(reference))
