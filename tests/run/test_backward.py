"""A backward in two halves gives what it gives in one, to the last bit, whatever the model does with its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pipework
from pipework import Runner
from pipework.run.backward import Later, SplitBackward
from tests.models import WIDTH, numbers
from tests.run.pipes import equal, gradients, piped
from tests.schedules import split_1f1b
from tests.split.equality import before


def seen(module: nn.Module, x: Tensor) -> SplitBackward:
    """After a first forward, which tells who uses what."""
    split = SplitBackward(module)
    calls = split.begin([x])
    with split.at_work(calls):
        split.look_at(calls, [module(x)])
    return split


def halves_of(module: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, Later]:
    """The output, and what is left for the second half; input and parameters get their gradients."""
    split = seen(module, x)
    calls = split.begin([x])
    with split.at_work(calls):
        out = module(x)
    split.look_at(calls, [out])
    later = split.input_gradient(calls, [out], [seed])
    left = copy.copy(later)
    split.weight_gradient(later)
    return out, left


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A module whose weight gradient can wait, and an input of any layout for it."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    bias, count = draw(st.booleans()), st.integers(1, 5)
    wide, out, batch = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    match draw(st.sampled_from(("linear", "conv", "embedding"))):
        case "linear":
            x = torch.randn(*draw(st.lists(count, max_size=2)), batch, wide, dtype=dtype)
            module: nn.Module = nn.Linear(wide, out, bias, dtype=dtype)
        case "conv":
            groups = draw(st.integers(1, 2))
            dims = draw(st.integers(1, 3))
            kernel, stride, dilation = (draw(st.integers(1, 2)) for _ in range(3))
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            padding = draw(st.integers(0, 1))
            mode = draw(st.sampled_from(("zeros", "circular")))
            module = kind(
                groups * wide, groups * out, kernel, stride, padding, dilation, groups, bias, mode, dtype=dtype
            )
            x = torch.randn(batch, groups * wide, *[draw(st.integers(3, 5))] * dims, dtype=dtype)
            if dims == 2 and draw(st.booleans()):
                x = x.to(memory_format=torch.channels_last)
        case _:
            padding_index = draw(st.none() | st.integers(0, wide - 1))
            module = nn.Embedding(wide, out, padding_index, scale_grad_by_freq=draw(st.booleans()), dtype=dtype)
            return module, torch.randint(wide, (batch, draw(count)))
    if draw(st.booleans()):
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    module.weight.requires_grad_(draw(st.booleans()) or bias)
    return module, x.detach().requires_grad_(draw(st.booleans()) or not module.weight.requires_grad)


class Behind(nn.Sequential):
    """A module behind another operation, so that the gradient of its input is not the last one made."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view_as(x))


@settings(max_examples=400)
@given(call=calls(), twice=st.booleans(), behind=st.booleans())
def test_every_call_gives_the_bits_of_autograd(call: tuple[nn.Module, Tensor], twice: bool, behind: bool) -> None:
    module, x = call
    module = Behind(module) if behind else module
    reference, twin = copy.deepcopy(module), x.detach().clone(memory_format=torch.preserve_format)
    twin.requires_grad_(x.requires_grad)
    for _ in range(1 + twice):
        wanted = reference(twin)
        seed = torch.randn_like(wanted)
        wanted.backward(seed)
        assert torch.equal(halves_of(module, x, seed)[0], wanted)
    assert (x.grad is None) == (twin.grad is None)
    assert x.grad is None or torch.equal(x.grad, twin.grad)
    assert x.grad is None or twin.grad is None or x.grad.stride() == twin.grad.stride()
    assert equal(gradients(module), gradients(reference))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(4, 3), torch.randn(2, 5, 4)),
        (nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 2, 5, 5)),
        (nn.Embedding(7, 3), torch.arange(6)),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_the_weight_waits(module: nn.Module, x: Tensor) -> None:
    _, left = halves_of(module, x, torch.ones_like(module(x)))
    assert len(left.calls) == 1
    assert not left.deferred


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv1d(5, 3, 2)], ids=repr)
def test_autograd_is_not_asked_for_the_weight(module: nn.Module) -> None:
    x = torch.randn(2, 5, 4, requires_grad=True)
    model = Behind(module)
    _, left = halves_of(model, x, torch.ones_like(module(x)))
    assert len(left.calls) == len(left.deferred) == 1


# ---------------------------------------------------------------- whole models

Forward = Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    """A block whose forward is given; it has two layers, a norm and a table."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.table = nn.LayerNorm(WIDTH), nn.Embedding(WIDTH, WIDTH)
        self.does = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def _plain(self: Any, x: Tensor) -> Tensor:
    return x + self.b(F.gelu(self.a(self.norm(x))))


def _table(self: Any, x: Tensor) -> Tensor:
    return self.b(x + self.table(torch.arange(len(x)) % WIDTH)) + self.a(x)


def _called_twice(self: Any, x: Tensor) -> Tensor:
    return self.a(self.b(self.a(x)).tanh()) + x


def _called_thrice(self: Any, x: Tensor) -> Tensor:
    return self.a(self.a(self.a(x).tanh()).tanh()) + self.b(x)


def _by_function_too(self: Any, x: Tensor) -> Tensor:
    """The weight's three gradients must be added up in autograd's own order."""
    return F.linear(self.a(self.a(x).sin()), self.a.weight) + self.b(x)


def _only_by_function(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.a.weight, self.b.bias) * self.b.weight.mean()


def _bias_elsewhere(self: Any, x: Tensor) -> Tensor:
    return self.a(x) * self.a.bias + self.b(x)


def _view_out(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)).view(2, -1).view(x.shape)


def _written_in_place(self: Any, x: Tensor) -> Tensor:
    return self.b(F.relu(self.a(x), inplace=True)).add_(x)


def _reentrant(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: _plain(self, y), x, use_reentrant=True)


def _checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: _plain(self, y), x, use_reentrant=False)


def _forces(self: Any, x: Tensor) -> Tensor:
    """A gradient in the forward, gone back through later: it wants no weight's gradient, and then the weight's."""
    with torch.enable_grad():
        (force,) = torch.autograd.grad(self.a(x).tanh().sum(), x, create_graph=True)
    return self.b(x) + force


def _forces_in_checkpoint(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: _forces(self, y), x, use_reentrant=True)


def _penalty(self: Any, x: Tensor) -> Tensor:
    """The gradient of a weight in the forward, twice."""
    (slope,) = torch.autograd.grad(self.a(x).tanh().sum(), self.a.weight, create_graph=True)
    return self.b(x) + slope.mean()


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = self.a(x)
    return self.b(x) + shift


def _mapped(self: Any, x: Tensor) -> Tensor:
    return torch.vmap(self.a)(x) + self.b(x)


def _leaked(self: Any, x: Tensor) -> Tensor:
    """Of a value that outlived the transform in which it was made."""
    seen: list[Tensor] = []
    torch.func.grad(lambda y: (seen.append(y * 2), y.sum())[1])(x)
    return self.a(seen[0]) + self.b(x)


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x + self.b(F.gelu(self.a(x)))


def _autocast_twice(self: Any, x: Tensor) -> Tensor:
    """The gradients of one cast weight are added up before they are cast back."""
    with torch.autocast("cpu", torch.bfloat16):
        return self.b(self.a(self.a(self.norm(x)).tanh()) + self.table(torch.arange(len(x)))).float() + x


def _autocast_checkpointed(self: Any, x: Tensor) -> Tensor:
    """What the checkpoint gives back of a weight is a tensor of the moment, of which no cast must be kept."""

    def inner(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(y).relu()
            return (self.b(y) + self.a(y)).float()

    return checkpoint(inner, x, use_reentrant=False)


def _autocast_regions(self: Any, x: Tensor) -> Tensor:
    """Each region casts the weight anew, and the gradients of the casts are added up in float32."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.a(self.a(x).tanh()).float()
    return x + self.b(x)


def _autocast_and_not(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.a(self.a(x).tanh()).float()
    return self.a(y) + self.b(x)


def _reentrant_twice(self: Any, x: Tensor) -> Tensor:
    """Each checkpoint adds its own gradient of the weight to `.grad`."""
    for _ in range(2):
        x = checkpoint(lambda y: _plain(self, y), x, use_reentrant=True)
    return x


def _reentrant_and_not(self: Any, x: Tensor) -> Tensor:
    return self.a(_plain(self, _reentrant(self, x)))


def _autocast_and_by_function(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(self.a(self.a(x).sin()), self.a.weight).float() + self.b(x)


def _autocast_forces(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return _forces(self, x)


def _by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.a(input=x) + self.b(x)


def _slices_written_in_place(self: Any, x: Tensor) -> Tensor:
    y, rows = self.a(x.unsqueeze(0)), self.table(torch.arange(len(x)).view(1, -1))
    y[..., :2] += 1
    rows[:, 1:].mul_(x[1:])
    return self.b((y + rows).squeeze(0))


def _fewer_rows(self: Any, x: Tensor) -> Tensor:
    """As of experts: in some microbatches one row, whose weight gradient does not wait."""
    rows = 1 if x[0, 0] > 0 else 2
    return self.b(F.pad(self.a(x[:rows]), (0, 0, 0, 2 - rows)))


def _hooked_outputs(self: Any, x: Tensor) -> Tensor:
    """Hooks that change the gradients of what the layers give, put on after these were called."""
    wide, flat = self.a(x.unsqueeze(0) * 2), self.b(x * 2)
    wide.register_hook(lambda gradient: gradient * 2)
    flat.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return wide.squeeze(0) + flat


def _gradients_in_backward(self: Any, x: Tensor) -> Tensor:
    """As where a fixed point is sought: the backward goes several times through a part of the graph by itself."""
    inner = x.sin()
    part = self.b(self.a(inner).tanh())

    def hook(gradient: Tensor) -> Tensor:
        for _ in range(2):
            (gradient,) = torch.autograd.grad(part, inner, gradient, retain_graph=True)
        return gradient

    out = part * 1
    out.register_hook(hook)
    return out + self.a(inner)


def _leaf_made_here(self: Any, x: Tensor) -> Tensor:
    """No gradient is asked for from before the layers, but theirs."""
    own = x.detach().requires_grad_()
    return self.b(self.a(own.sin()).sin()) + x


def _leaf_made_sometimes(self: Any, x: Tensor) -> Tensor:
    own = x.detach().requires_grad_() * 2 if x[0, 0] > 0 else x
    return self.b(self.a(own.sin())) + x


def _leaf_made_at_other_times(self: Any, x: Tensor) -> Tensor:
    """One of these two is not in the first microbatch."""
    own = x if x[0, 0] > 0 else x.detach().requires_grad_() * 2
    return self.b(self.a(own.sin())) + x


def _both_ways(self: Any, x: Tensor) -> Tensor:
    return self.a(x.sin()) + self.a(input=x.cos()) + self.b(x)


def _reentrant_before(self: Any, x: Tensor) -> Tensor:
    return self.b(checkpoint(lambda y: self.a(y).tanh(), x, use_reentrant=True))


def _penalised_sometimes(self: Any, x: Tensor) -> Tensor:
    out = self.b(self.a(x.sin()))
    return out + self.a.weight.mean() if x[0, 0] > 0 else out


def _penalised_at_other_times(self: Any, x: Tensor) -> Tensor:
    """One of these two is not in the first microbatch."""
    out = self.b(self.a(x.sin()))
    return out if x[0, 0] > 0 else out + self.a.weight.mean()


def _adapted(self: Any, x: Tensor) -> Tensor:
    """By the gradient of a layer's weight, as where two losses are balanced."""
    y = self.a(x.sin())
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(y.sum(), self.a.weight, retain_graph=True)
    return self.b(y * slope.norm())


def _checkpointed_and_not(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.a(x.sin()).relu()
        return checkpoint(lambda y: self.b(self.a(y)), y, use_reentrant=False).float()


def _offloaded(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return _plain(self, x)


def _copied(self: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(self.a)(x).detach() + _plain(self, x)


FORWARDS = [
    _plain,
    _hooked_outputs,
    _gradients_in_backward,
    _leaf_made_here,
    _leaf_made_sometimes,
    _leaf_made_at_other_times,
    _both_ways,
    _reentrant_before,
    _penalised_sometimes,
    _penalised_at_other_times,
    _adapted,
    _checkpointed_and_not,
    _offloaded,
    _copied,
    _table,
    _called_twice,
    _called_thrice,
    _by_function_too,
    _only_by_function,
    _bias_elsewhere,
    _view_out,
    _written_in_place,
    _reentrant,
    _checkpointed,
    _forces,
    _forces_in_checkpoint,
    _penalty,
    _no_grad,
    _mapped,
    _leaked,
    _autocast,
    _autocast_twice,
    _autocast_checkpointed,
    _autocast_regions,
    _autocast_and_not,
    _reentrant_twice,
    _reentrant_and_not,
    _autocast_and_by_function,
    _autocast_forces,
    _by_keyword,
    _fewer_rows,
    _slices_written_in_place,
]


def model_of(forward: Forward, blocks: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Block(_plain), *[Block(forward) for _ in range(blocks - 1)])


def assert_equal(
    model: nn.Module, microbatches: int = 4, turned: bool = False, x: Tensor | None = None, **also: Any
) -> None:
    x = numbers(2 * microbatches, WIDTH) if x is None else x
    pipe = piped(copy.deepcopy(model), "1", "2")
    report = pipework.verify(
        model,
        (x,),
        target=numbers(2 * microbatches, WIDTH, seed=5),
        loss=F.mse_loss,
        schedule=split_1f1b(pipe.layout(3), microbatches, turned),
        split_spec=before("1", "2"),
        microbatches=microbatches,
        **also,
    )
    assert report.equal, report.text()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_whatever_a_block_does_with_its_weights(forward: Forward, turned: bool) -> None:
    assert_equal(model_of(forward), turned=turned)


@pytest.mark.parametrize("forward", [_plain, _called_twice, _table], ids=lambda forward: forward.__name__)
def test_autocast_around_the_step(forward: Forward) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(model_of(forward))


def test_the_weight_waits_under_autocast() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, left = halves_of(layer, x, torch.ones(2, 5, 3, dtype=torch.bfloat16))
    assert len(left.calls) == 1
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("turned", [False, True])
def test_microbatches_that_take_different_paths(turned: bool) -> None:
    """Each path's first microbatch goes back in one piece, and must not overtake what waits."""

    class Paths(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if (x[:, 0] > 0).all():
                x = F.linear(x, self[0].a.weight)
            return super().forward(x)

    model = Paths(*model_of(_plain))
    x = numbers(8, WIDTH)
    x[:, 0] = torch.tensor([-1.0, -1, -1, -1, 1, 1, -1, -1])
    assert_equal(model, turned=turned, x=x)


def _hooked(model: nn.Module) -> None:
    """Hooks on modules, which change what passes, and on a weight, which see its whole gradient."""
    block = model[1]
    block.a.register_full_backward_hook(lambda module, gi, go: tuple(g * 0.5 for g in gi))
    block.b.register_forward_hook(lambda module, args, out: out * 2)
    block.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    block.a.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def _frozen(model: nn.Module) -> None:
    model[0].a.weight.requires_grad_(False)
    model[1].a.bias.requires_grad_(False)
    model[1].b.requires_grad_(False)
    model[2].requires_grad_(False)


def _tied(model: nn.Module) -> None:
    """Within a stage, across stages, and both at once."""
    model[1].b.weight = model[1].a.weight
    model[2].table.weight = model[2].a.weight
    model[2].b.weight = model[0].a.weight


def _normed(model: nn.Module) -> None:
    parametrizations.weight_norm(model[1].a)


def _untrained_block(model: nn.Module) -> None:
    del model[1].table


CHANGES = [_hooked, _frozen, _tied, _normed, _untrained_block]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("forward", [_plain, _table, _called_twice], ids=lambda forward: forward.__name__)
def test_whatever_is_done_to_a_model(forward: Forward, change: Callable[[nn.Module], None], turned: bool) -> None:
    if change is _untrained_block and forward is _table:
        forward = _by_keyword
    model = model_of(forward)
    change(model)
    assert_equal(model, turned=turned)


def _by_keyword_sometimes(self: Any, x: Tensor) -> Tensor:
    return (self.a(input=x.sin()) if x[0, 0] > 0 else self.a(x.sin())) + self.b(x.cos())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("forward", [_by_keyword, _by_keyword_sometimes], ids=lambda forward: forward.__name__)
def test_a_weight_of_two_layers_of_which_one_does_not_wait(forward: Forward, turned: bool) -> None:
    model = model_of(forward)
    _tied(model)
    assert_equal(model, 8, turned=turned)


def test_a_leaf_that_only_some_microbatches_make_is_refused() -> None:
    """Its layers' gradients would be lost."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_() if x[0, 0] > 0 else x
        return self.b(x.sin())

    x = numbers(8, WIDTH)
    x[:, 0] = torch.tensor([-1.0, -1, -1, -1, 1, 1, -1, -1])
    pipe = piped(nn.Sequential(Block(forward), Block(_plain)), "1")
    runner = Runner(pipe, split_1f1b(pipe.layout(2), 4), loss=F.mse_loss)
    with pytest.raises(pipework.PipeworkError, match=r"the gradient of '0\.b' was not made"):
        runner.step(x.requires_grad_(), target=numbers(8, WIDTH, seed=5))


def test_an_input_whose_graph_goes_on_beyond_the_stage() -> None:
    """As of one that was brought to the stage's device."""
    block, leaf = Block(_plain), numbers(4, WIDTH).requires_grad_()
    reference, twin = copy.deepcopy(block), leaf.detach().clone().requires_grad_()
    split = seen(block, leaf)
    moved = leaf * 1
    calls = split.begin([moved])
    with split.at_work(calls):
        out = block(moved)
    split.weight_gradient(split.input_gradient(calls, [out], [torch.ones(4, WIDTH)]))
    reference(twin * 1).backward(torch.ones(4, WIDTH))
    assert leaf.grad is not None
    assert twin.grad is not None
    assert torch.equal(leaf.grad, twin.grad)
    assert equal(gradients(block), gradients(reference))


def test_a_weight_that_the_loss_uses_too() -> None:
    model = model_of(_plain, 2)

    def loss(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda out, target: F.mse_loss(out, target) + module[1].a.weight.pow(2).sum() + module[1].b(out).mean()

    x, target = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)
    reference = copy.deepcopy(model)
    pipe = piped(model, "1")
    Runner(pipe, split_1f1b(pipe.layout(pipe.num_stages), 4), loss=loss(model)).step(x, target=target)
    for rows, aim in zip(x.chunk(4), target.chunk(4), strict=True):
        (loss(reference)(reference(rows), aim) / 4).backward()
    assert equal(gradients(model), gradients(reference))


def test_the_model_is_as_it_was_after_a_step_and_after_a_failure() -> None:
    def once(self: Any, x: Tensor) -> Tensor:
        if (x > 50).any():
            raise ValueError("too large")
        return _plain(self, x)

    model = model_of(once)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    x = numbers(8, WIDTH)
    pipe = piped(model, "1", "2")
    runner = Runner(pipe, split_1f1b(pipe.layout(pipe.num_stages), 4), loss=F.mse_loss)
    runner.step(x, target=x)
    with pytest.raises(ValueError, match="too large"):
        runner.step(x + 100, target=x)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    runner.step(x, target=x)


def test_what_only_the_input_gradient_needs_is_gone_before_the_weight_gradient() -> None:
    """Of a block with a norm and a GELU between two layers, W keeps the operands of the layers and nothing else."""
    alive: set[int] = set()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = _Counted(alive)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    block = Block(lambda self, x: self.b(Watched.apply(self.a(x))))
    x = numbers(4, WIDTH)
    split = seen(block, x)
    calls = split.begin([x])
    with split.at_work(calls):
        out = block(x)
    assert len(alive) == 1
    later = split.input_gradient(calls, [out], [torch.ones(4, WIDTH)])
    del out
    assert not alive
    assert [tuple(aside.input.shape) for aside in later.calls] == [(4, WIDTH)] * 2


class _Counted:
    def __init__(self, alive: set[int]) -> None:
        self.alive = alive
        alive.add(id(self))

    def __del__(self) -> None:
        self.alive.discard(id(self))


@pytest.mark.parametrize("make", [partial(nn.Linear, 4, 4), partial(nn.Conv1d, 4, 4, 1)])
def test_complex_numbers(make: Callable[..., nn.Module]) -> None:
    """Autograd conjugates, where the product of real numbers goes as it is."""
    model = nn.Sequential(*(make(dtype=torch.complex64) for _ in range(3)))
    x = torch.complex(numbers(8, 4, 4), numbers(8, 4, 4, seed=3))
    report = pipework.verify(
        model,
        (x,),
        loss=lambda output, _: output.abs().square().mean(),
        target=x,
        ranks=2,
        microbatches=4,
        schedule="zero_bubble_h1",
    )
    assert report.equal, report.text()
