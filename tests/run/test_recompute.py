"""A stage that is recomputed trains as it does otherwise, to the last bit, and keeps nothing but its inputs."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import Layout, MismatchError, Pipe, Runner, Schedule
from pipework.split.torch_private import in_backward
from tests.end_to_end.case import squared
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, linears, numbers, trunk
from tests.run.pipes import equal, gradients, piped, sequence
from tests.run.test_backward import FORWARDS, Forward, model_of
from tests.schedules import split_1f1b
from tests.split.equality import before
from tests.split.test_checkpoint import Drawing

Order = Callable[[Layout, int], Schedule]

ORDERS: dict[str, Order] = {
    "1F1B": pipework.schedules.one_f_one_b,
    "GPipe": pipework.schedules.gpipe,
    "in halves": split_1f1b,
    "in halves, turned": partial(split_1f1b, turned=True),
}
in_any_order = pytest.mark.parametrize("order", ORDERS)


def recomputed(order: str, stages: Iterable[int] | None = None) -> Order:
    return lambda layout, microbatches: ORDERS[order](layout, microbatches).recomputing(stages)


def assert_equal(model: nn.Module, order: str, grad: bool = False, **also: Any) -> None:
    """On three stages, all of them recomputed, then one."""
    for stages in (None, [1]):
        report = pipework.verify(
            model,
            (numbers(8, WIDTH, grad=grad),),
            target=numbers(8, WIDTH, seed=5),
            loss=F.mse_loss,
            schedule=recomputed(order, stages),
            ranks=3,
            **also,
        )
        assert report.equal, report.text()


@pytest.mark.parametrize("order", ["1F1B", "in halves, turned"])
@pytest.mark.parametrize(
    "forward",
    [forward for forward in FORWARDS if forward.__name__ != "_leaked"],  # torch.func.grad refuses checkpoints
    ids=lambda forward: forward.__name__,
)
def test_whatever_a_block_does_with_its_weights(forward: Forward, order: str) -> None:
    assert_equal(model_of(forward), order, split_spec=before("1", "2"))


@in_any_order
def test_autocast_around_the_step(order: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(model_of(FORWARDS[0]), order, split_spec=before("1", "2"))


# ---------------------------------------------------------------- what a forward leaves behind, and finds


class Block(nn.Module):
    """A block with state; its forward is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layer, self.norm, self.does = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), forward
        self.calls, self.table = 0, None
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def _counts(self: Any, x: Tensor) -> Tensor:
    """What it computes goes by the number of its calls."""
    self.calls += 1
    x = self.layer(x).sin() * self.calls
    return x.cos() if self.calls % 2 else x.tanh().exp()


def _remembers(self: Any, x: Tensor) -> Tensor:
    """Other tensors are made in the first call than in the others."""
    if self.table is None:
        self.table = (self.mean * 3).sin()
    return self.layer(x).sin() * self.table


def _normalizes(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(x)).relu() + x


def _assigns_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
    return (self.layer(x) * self.mean).sin()


def _writes_a_buffer(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.mean.mul_(0.9).add_(x.detach().mean(0))
    return (self.layer(x) * self.mean).sin()


def _writes_into_its_input(self: Any, x: Tensor) -> Tensor:
    x.mul_(1.5)
    return self.layer(x).add_(x).sin()


def _hooks_an_activation(self: Any, x: Tensor) -> Tensor:
    """Which only has a gradient where gradients are on."""
    x = self.layer(x).tanh()
    x.register_hook(lambda gradient: gradient * 0.5)
    return x.sin() * x


class Scale(torch.autograd.Function):
    """Keeps one tensor as autograd has it, and one in its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.y = y.detach()
        return x * y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0] * ctx.y, gradients[0] * ctx.saved_tensors[0]


def _own_function(self: Any, x: Tensor) -> Tensor:
    return Scale.apply(self.layer(x).sin(), x.cos())


STATES = [_counts, _remembers, _normalizes, _assigns_a_buffer, _writes_a_buffer, _writes_into_its_input]
STATES += [_hooks_an_activation, _own_function]


@in_any_order
@pytest.mark.parametrize("forward", STATES, ids=lambda forward: forward.__name__)
def test_the_forward_finds_what_it_found_and_leaves_nothing_twice(forward: Forward, order: str) -> None:
    torch.manual_seed(2)
    assert_equal(nn.Sequential(*(Block(forward) for _ in range(6))), order, stages=3)


@in_any_order
def test_counters_count_each_microbatch_once(order: str) -> None:
    model = nn.Sequential(*(Block(_counts) for _ in range(2)))
    pipe = pipework.pipeline(model, (numbers(2, WIDTH),), stages=2)
    Runner(pipe, recomputed(order)(pipe.layout(2), 4), loss=squared).step(numbers(8, WIDTH), target=numbers(8, WIDTH))
    assert [block.calls for block in model] == [4, 4]


@in_any_order
def test_a_buffer_that_the_trunk_assigns(order: str) -> None:
    @trunk(layers=linears(3))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number:
                pipework.pipe_split()
            x = layer(x).sin()
            if number == 1:
                self.mean = self.mean * 0.5 + x.detach().mean(0)
                x = x.exp() * self.mean
        return x

    model.register_buffer("mean", torch.ones(WIDTH))
    assert_equal(model, order)


@in_any_order
@pytest.mark.parametrize("reentrant", [True, False])
def test_draws(reentrant: bool, order: str) -> None:
    """In blocks and in the trunk, in checkpoints of the model's own and around them."""

    @trunk(blocks=nn.ModuleList(Drawing(reentrant) for _ in range(3)))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = F.dropout(block(F.dropout(x, 0.2)), 0.1) + torch.rand_like(x)
            if number < 2:
                pipework.pipe_split()
        return x

    assert_equal(model, order, grad=True)


def test_kernels_that_are_other_ones_without_gradients() -> None:
    """In eval mode a TransformerEncoderLayer takes another path where gradients are off; they must not be."""
    layers = [nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True) for _ in range(3)]
    model = nn.Sequential(nn.Unflatten(1, (1, WIDTH)), *layers, nn.Flatten()).eval()
    assert_equal(model, "GPipe", split_spec=before("2", "3"))


def test_hooks_of_modules() -> None:
    """Those of the forward are called again, as the forward is; those of the backward are not."""
    model = sequence(2)
    called = defaultdict[str, int](int)
    model[1].register_forward_hook(lambda *_: called.update(forward=called["forward"] + 1))
    model[1].register_full_backward_hook(lambda *_: called.update(backward=called["backward"] + 1))
    pipe = piped(model, "1")
    called.clear()
    runner = Runner(pipe, recomputed("GPipe")(pipe.layout(2), 4), loss=squared)
    runner.step(numbers(8, WIDTH), target=numbers(8, WIDTH))
    assert called == {"forward": 8, "backward": 4}


@in_any_order
def test_a_forward_that_is_another_the_second_time_is_explained(order: str) -> None:
    seen: list[Tensor] = []

    def forgets(self: Any, x: Tensor) -> Tensor:
        seen.append(x.detach())
        return self.layer(x).sin() if len(seen) % 2 else x.exp().sin().cos() * self.layer.weight.sum()

    model = nn.Sequential(Block(forgets), Block(_normalizes))
    pipe = pipework.pipeline(model, (numbers(2, WIDTH),), stages=2)
    seen.clear()
    runner = Runner(pipe, recomputed(order, [0])(pipe.layout(2), 1), loss=squared)
    with pytest.raises(MismatchError, match="the forward of stage 0 was another when it was done again") as caught:
        runner.step(numbers(2, WIDTH), target=numbers(2, WIDTH))
    assert caught.value.where.startswith("stage 0, microbatch 0, in 0")


# ---------------------------------------------------------------- memory


class Watched(nn.Module):
    """Notes the memory of what it makes: two activations that its backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.made: list[weakref.ref[torch.UntypedStorage]] = []
        self.most_at_once_in_backward = 0

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        second = first.sin()
        self.made += [weakref.ref(tensor.untyped_storage()) for tensor in (first, second)]
        if in_backward():
            self.most_at_once_in_backward = max(self.most_at_once_in_backward, self.alive)
        return second.cos()

    @property
    def alive(self) -> int:
        return sum(made() is not None for made in self.made)


def alive_at_each_loss(schedule: Order, microbatches: int) -> tuple[list[list[int]], list[Watched]]:
    """How many activations of each of four blocks, two to a stage, are alive when a microbatch comes to the loss."""
    blocks = [Watched() for _ in range(4)]
    pipe = pipework.pipeline(nn.Sequential(*blocks), (numbers(2, WIDTH),), split_spec=before("2"))
    found: list[list[int]] = []
    outputs: list[weakref.ref[torch.UntypedStorage]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if not in_backward():
            found.append([block.alive for block in blocks] + [sum(made() is not None for made in outputs)])
            outputs.append(weakref.ref(output.untyped_storage()))
        return F.mse_loss(output, target)

    runner = Runner(pipe, schedule(pipe.layout(2), microbatches), loss=loss)
    for block in blocks:
        block.made.clear()
    runner.step(numbers(2 * microbatches, WIDTH), target=numbers(2 * microbatches, WIDTH))
    assert not any(block.alive for block in blocks)
    return found, blocks


def test_nothing_that_a_stage_made_is_kept_between_its_forward_and_its_backward() -> None:
    """GPipe keeps what all microbatches made; with a stage recomputed, nothing of them, and in its backward one's."""
    found, _ = alive_at_each_loss(recomputed("GPipe", []), 4)
    # The first stage may run ahead of the second, and is done with its forwards at the last loss only. The loss keeps
    # the outputs.
    assert [alive[2:] for alive in found] == [[2 * n, 2 * n, n - 1] for n in (1, 2, 3, 4)]
    assert found[-1] == [8, 8, 8, 8, 3]
    found, blocks = alive_at_each_loss(recomputed("GPipe", [0]), 4)
    assert [alive[2:] for alive in found] == [[2 * n, 2 * n, n - 1] for n in (1, 2, 3, 4)]
    assert found[-1] == [0, 0, 8, 8, 3]
    assert [block.most_at_once_in_backward for block in blocks] == [2, 2, 0, 0]
    found, blocks = alive_at_each_loss(recomputed("GPipe"), 4)
    assert [alive[2:] for alive in found] == [[0, 0, 0]] * 4
    assert found[-1] == [0, 0, 0, 0, 0]
    assert [block.most_at_once_in_backward for block in blocks] == [2, 2, 2, 2]


def test_what_waits_for_w_is_kept_after_i() -> None:
    """The first microbatch's forward is as ever, so that its weight gradients come with I."""
    found, blocks = alive_at_each_loss(recomputed("in halves, turned"), 4)
    assert all(alive[4] == 0 for alive in found)
    assert [block.most_at_once_in_backward for block in blocks] == [2, 2, 2, 2]


# ---------------------------------------------------------------- the life of a runner


@in_any_order
def test_steps_outputs_and_evaluations(order: str) -> None:
    models, made = (sequence(), sequence()), []
    for model, stages in zip(models, ([], None), strict=True):
        pipe = piped(model, "1", "2", "3")
        runner = Runner(pipe, recomputed(order, stages)(pipe.layout(4), 4), loss=squared)
        runner.keep_outputs = True
        for rows in (8, 4):
            loss = runner.step(numbers(rows, WIDTH, grad=True), target=numbers(rows, WIDTH, seed=5))
            made.append({"loss": loss, "output": runner.outputs})
        evaluated = runner.evaluate(numbers(8, WIDTH), target=numbers(8, WIDTH, seed=5))
        made.append({"loss": evaluated.loss, "output": evaluated.output})
        assert (len(runner.recorded.schedule.recomputed) == 0) == (stages == [] or not runner.recorded.schedule.trains)
    assert all(equal(one, other) for one, other in zip(made[:3], made[3:], strict=True))
    assert equal(gradients(models[0]), gradients(models[1]))


def on_processes(group: dist.ProcessGroup, rank: int) -> list[str]:
    told = []
    for order in ORDERS:
        for block in (partial(Block, _writes_a_buffer), partial(Drawing, reentrant=False)):
            report = pipework.verify(
                nn.Sequential(*(block() for _ in range(3))),
                (numbers(8, WIDTH),),
                target=numbers(8, WIDTH, seed=5),
                loss=F.mse_loss,
                split_spec=before("1", "2"),
                schedule=recomputed(order),
                ranks=3,
                group=group,
            )
            told.append("" if report.equal else report.text())
    return told


def test_on_processes(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(on_processes, ranks=3) == [[""] * 2 * len(ORDERS)] * 3


def disagreeing(group: dist.ProcessGroup, rank: int) -> str:
    pipe: Pipe = piped(sequence(2), "1")
    runner = Runner(pipe, recomputed("1F1B", [rank])(pipe.layout(2), 2), loss=squared, group=group)
    with pytest.raises(MismatchError) as caught:
        runner.step(numbers(4, WIDTH), target=numbers(4, WIDTH))
    return str(caught.value)


def test_ranks_that_recompute_other_stages_are_told(gloo_pool: GlooPool) -> None:
    assert all("another schedule" in told for told in gloo_pool.run(disagreeing))
