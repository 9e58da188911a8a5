"""Random numbers keyed by step, microbatch and module: the same whatever is open or closed, wherever the cuts are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipework import Pipe, pipe_split, pipeline, verify
from pipework.split.draws import DrawKey, drawing_for, streams
from tests.models import linear, numbers, trunk
from tests.split.equality import Spec, before, outcome

KEY = DrawKey(seed=5, step=2, microbatch=1)


class Block(nn.Module):
    """Draws before, between and after its children."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = linear(), nn.Dropout(0.3), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training)
        x = self.drop(self.one(x))
        with torch.no_grad():
            noise = torch.rand_like(x)
        x = F.dropout(x + noise + torch.rand(8), 0.2, self.training)
        return self.two(x) * F.dropout(torch.ones(8), 0.5, self.training)


def model() -> nn.Module:
    @trunk(layers=nn.ModuleList(Block() for _ in range(3)), shared=nn.Dropout(0.4))
    def made(self: nn.Module, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.shared(layer(x)) + torch.rand(8)
            x = F.dropout(x, 0.1, self.training)
        return x

    return made


def stepping(pipe: Pipe, key: DrawKey = KEY) -> Callable[..., Any]:
    """The pipe stage by stage, each with the streams of its own modules, as ranks run it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = pipe.bind(args, kwargs)
        variant = pipe.variant(arguments)
        inputs, values = arguments.tensors(), {}
        for part, code, before_it in zip(variant.cut.parts, variant.codes, variant.calls_before, strict=True):
            stage = pipe.get_stage_module(part.index)
            given = [*(inputs[p] for _, p in part.inputs), *(values[i] for i in part.received)]
            torch.manual_seed(part.index)  # what is ambient must not matter
            with streams(dict(stage.named_modules()), variant.drawing), drawing_for(key, before_it):
                values |= zip(part.outputs, code(stage, *given), strict=True)
        return (variant.rebuild([values[i] for i in variant.cut.results]),)

    return call


def whole(reference: nn.Module, pipe: Pipe, key: DrawKey = KEY) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        drawing = pipe.variant(pipe.bind(args, kwargs)).drawing
        with streams(dict(reference.named_modules()), drawing), drawing_for(key):
            return reference(*args, **kwargs)

    return call


SPECS: dict[str, Spec] = {
    "between blocks": before("layers.1", "layers.2"),
    "inside blocks": before("layers.0.two", "layers.1.drop", "layers.2.one"),
    "after a drawing child": before("layers.1.two"),
    "at the shared child": before("shared"),
}


@pytest.mark.parametrize("where", SPECS)
def test_same_numbers_wherever_the_cuts_are(where: str) -> None:
    made = model()
    reference = copy.deepcopy(made)
    pipe = pipeline(made, (numbers(grad=True),), split_spec=SPECS[where])
    closed = pipeline(reference, (numbers(grad=True),))
    wanted = outcome(whole(reference, closed), reference, (numbers(grad=True),), {})
    found = outcome(stepping(pipe), made, (numbers(grad=True),), {}, unwrap=True)
    same_numbers(found, wanted)


def same_numbers(found: Any, wanted: Any) -> None:
    assert torch.equal(found.output, wanted.output)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert gradient is not None
        assert torch.equal(found.gradients[name], gradient), name


def test_numbers_do_not_depend_on_which_experts_the_example_reaches() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.drop = nn.ModuleList([Block(), Block()]), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            positive = bool(x.sum() > 0)
            x = self.experts[positive](x)
            return self.drop(x) if positive else x

    made = nn.Sequential(Routed(), linear())
    positive = numbers().abs()
    one, other = (pipeline(made, (x,), split_spec=before("1")) for x in (positive, -positive))
    for x in (positive, -positive):
        assert torch.equal(stepping(one)(x)[0], stepping(other)(x)[0])
    assert one.variant(one.example).drawing == other.variant(other.example).drawing


def test_other_step_microbatch_or_seed_gives_other_numbers() -> None:
    made = model()
    pipe = pipeline(made, (numbers(),), split_spec=before("layers.1"))
    keys = [KEY, DrawKey(6, 2, 1), DrawKey(5, 3, 1), DrawKey(5, 2, 0)]
    outputs = [stepping(pipe, key)(numbers())[0] for key in keys]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(stepping(pipe)(numbers())[0], outputs[0])


def test_each_dropout_draws_a_mask_of_its_own() -> None:
    @trunk(one=nn.Dropout(0.5), two=nn.Dropout(0.5))
    def made(self: nn.Module, x: Tensor) -> list[Tensor]:
        masks = [self.one(x), self.two(x), self.one(x), F.dropout(x), F.dropout(x)]
        pipe_split()
        with torch.no_grad():
            masks += [F.dropout(x), self.one(x)]
        return [*masks, F.dropout(x), F.dropout(x), masks[0] * 1]

    pipe = pipeline(made, (torch.ones(40),))
    *masks, again = stepping(pipe)(torch.ones(40))[0]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    assert torch.equal(again, masks[0])


def test_generators_are_put_back_and_hooks_removed() -> None:
    made = model()
    pipe = pipeline(made, (numbers(),), split_spec=before("layers.1"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    modules = dict(made.named_modules())
    with streams(modules, pipe.variant(pipe.example).drawing), drawing_for(KEY):
        made(numbers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())


def test_outside_of_a_step_the_model_draws_as_always() -> None:
    made = model()
    pipe = pipeline(made, (numbers(),), split_spec=before("layers.1", "layers.2.two"))
    torch.manual_seed(3)
    wanted = made(numbers())
    torch.manual_seed(3)
    assert torch.equal(pipe(numbers())[0], wanted)


def test_modules_that_draw_nothing_are_not_watched() -> None:
    made = nn.Sequential(linear(), nn.Dropout(0.5), linear())
    pipe = pipeline(made, (numbers(),), split_spec=before("2"))
    assert set(pipe.variant(pipe.example).drawing) == {"1"}
    assert not pipeline(made.eval(), (numbers(),), split_spec=before("2")).variant(pipe.example).drawing


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_draws_the_same_mask_again(reentrant: bool) -> None:
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(linear(), nn.Dropout(0.5), nn.Tanh())
            self.saving = True

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant) if self.saving else self.inner(x)

    made = nn.Sequential(Saved(), Saved())
    pipe = pipeline(made, (numbers(grad=True),), split_spec=before("1"))

    def trained(saving: bool) -> Any:
        made[0].saving = made[1].saving = saving

        # Both microbatches' forwards come before either's backward, as in a pipeline.
        losses = []
        made.zero_grad()
        with streams(dict(made.named_modules()), pipe.variant(pipe.example).drawing):
            for microbatch in range(2):
                with drawing_for(DrawKey(0, 0, microbatch)):
                    losses.append(made(numbers(grad=True)).pow(2).sum())
            for loss in losses:
                loss.backward()
        return [p.grad for p in made.parameters()]

    saved, plain = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(saved, plain, strict=True))


class Quiet(nn.Module):
    """Draws nothing, in a checkpoint, which sets the generator that all threads share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: x + torch.tanh(self.linear(x)), x, use_reentrant=False)


class Noisy(Quiet):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: x + F.dropout(torch.tanh(self.linear(x)), 0.2), x, use_reentrant=False)


def test_a_checkpoint_on_one_rank_beside_draws_on_another() -> None:
    model = nn.Sequential(*(Quiet() for _ in range(6)), *(Noisy() for _ in range(6)))
    x = torch.randn(64, 64)
    for _ in range(4):
        report = verify(model, (x,), target=x, loss=F.mse_loss, ranks=2, microbatches=8, split_spec=before("6"))
        assert report.equal, report.text()
