"""torch.utils.checkpoint in the trunk and in blocks: the same numbers, and no more memory than in the model itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pipework import pipe_split, pipeline
from tests.models import WIDTH, linear, linears, numbers, trunk
from tests.run.pipes import gradients, runner_of
from tests.split.equality import before, check, copied, same

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def kept(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """How many numbers autograd keeps for the backward, those of checkpoints that it computes again not counted."""
    memory: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(*copied(args), **copied(kwargs))
    return sum(tensor.untyped_storage().size() for tensor in memory.values())


def saves(model: nn.Module, *args: Any, want: int | None = None, more: int = 0, **kwargs: Any) -> None:
    """The pipe equals the model, and keeps what autograd keeps of it, and `more` bytes that the model holds besides."""
    pipe = check(model, args, kwargs, want=want)
    model.train()
    assert kept(pipe, *args, **kwargs) == kept(model, *args, **kwargs) + more


@KINDS
def test_around_closed_modules(reentrant: bool) -> None:
    @trunk(layers=nn.ModuleList(nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()) for _ in range(3)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i:
                pipe_split()
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    saves(model, numbers(grad=True), want=3)


@KINDS
def test_around_calls_of_the_trunk(reentrant: bool) -> None:
    """With a value from outside, another that only goes in, several results, and an argument used outside as well."""

    @trunk(one=linear(), two=linear(), scale=nn.Parameter(numbers(8)))
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        shift = (mask * 2).exp()

        def inner(h: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                size = h.std() + shift
            y = F.dropout(self.one(h).tanh() * self.scale, 0.4, self.training) ** power
            return h + y * size, y.sin(), y.cos()

        h = self.two(x)
        for _ in range(2):
            h, more, _ = checkpoint(inner, h.exp().sin(), 2, use_reentrant=reentrant)
            h = h + more + self.two(h)
        pipe_split()
        return self.two(h)

    in_closures = 4 * WIDTH * 4  # `shift`, which the model's own function holds as well
    saves(model, numbers(grad=True), numbers(seed=9), want=2, more=in_closures)


@KINDS
def test_cut_through_a_checkpoint(reentrant: bool) -> None:
    """Each part is computed again in its own stage; what crosses is kept by the stage that receives it."""

    @trunk(one=linears(2), drop=nn.Dropout(0.5), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            for layer in self.one:
                first = self.drop(layer(h).tanh() * 3).sin()
                pipe_split()
                h = h + F.dropout(first.exp().tanh(), 0.2, self.training) * h
            return h.cos()

        h = self.two(x).tanh()
        for _ in range(2):
            h = checkpoint(inner, h, use_reentrant=reentrant) + h
        return self.two(h)

    pipe = check(model, (numbers(grad=True),), want=5)
    model.train()
    through = kept(pipe, numbers(grad=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "checkpoint", lambda function, *args, use_reentrant: function(*args))
        assert kept(model, numbers(grad=True)) > 1.5 * through


def test_settings_are_the_callers_own() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def noting(what: str) -> Any:
        entered.append(what)
        yield

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, selective: bool) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
        if not selective:
            contexts = lambda: (noting("first"), noting("again"))  # noqa: E731
        h = checkpoint(
            lambda h: self.one(h.sin()).tanh().cos(),
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
            determinism_check="none",
            early_stop=False,
        )
        pipe_split()
        return self.two(h)

    pipe = check(model, (numbers(grad=True), False), want=2)
    entered.clear()
    pipe(numbers(grad=True), False)[0].sum().backward()
    assert entered == ["first", "again"]
    for setting in ("preserve_rng_state=False", "determinism_check='none'", "early_stop=False"):
        assert setting in pipe.get_stage_module(0).source
    saves(model, numbers(grad=True), True, want=2)


@KINDS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one, within the outer one
def test_checkpoint_in_a_checkpoint(reentrant: bool) -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return F.dropout(self.one(h).tanh(), 0.5, self.training).sin()

        def outer(h: Tensor) -> Tensor:
            h = checkpoint(inner, h.exp(), use_reentrant=False)
            return checkpoint(inner, self.two(h).cos(), use_reentrant=reentrant).tanh()

        h = checkpoint(outer, self.three(x), use_reentrant=reentrant)
        pipe_split()
        return self.three(h)

    saves(model, numbers(grad=True), want=2)


def test_reentrant_without_anything_to_go_back_to_trains_nothing_inside() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = checkpoint(self.one, x, use_reentrant=True)
        pipe_split()
        return self.two(h)

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        check(model, (numbers(),), want=2)
    assert model.one.weight.grad is None


def test_error_inside_leaves_nothing_behind() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        def tried(h: Tensor) -> Tensor:
            self.one(h)
            raise ValueError

        with contextlib.suppress(ValueError):
            checkpoint(tried, x.exp(), use_reentrant=False)
        pipe_split()
        return self.two(x.sin())

    with pytest.raises(Exception, match="no tensor crosses"):
        pipeline(model, (numbers(grad=True),))
    assert kept(torch.sin, numbers(grad=True)) == 4 * 8 * 4


class Drawing(nn.Module):
    """Draws in a checkpoint and around it, before and after calls of its children; `saving` switches it on."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.one, self.drop, self.two = linear(), nn.Dropout(0.3), linear()
        self.reentrant, self.saving = reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            h = F.dropout(h, 0.2) + F.dropout(self.one(h).sin(), 0.2)
            return F.dropout(self.drop(h).cos(), 0.2) + F.dropout(h, 0.2)

        x = F.dropout(x, 0.2)
        x = checkpoint(inner, x, use_reentrant=self.reentrant) if self.saving else inner(x)
        return self.two(F.dropout(x, 0.2))


@KINDS
@pytest.mark.parametrize("names", [("1", "2"), ("0.two", "1.drop", "2.one")], ids=["in blocks", "in the trunk"])
def test_draws_in_a_step_are_the_same_again(reentrant: bool, names: tuple[str, ...]) -> None:
    saving = nn.Sequential(Drawing(reentrant), Drawing(reentrant), Drawing(reentrant))
    plain = copy.deepcopy(saving)
    for block in plain:
        block.saving = False
    for model, cuts in ((saving, names), (plain, ("1",))):
        torch.manual_seed(4)
        pipe = pipeline(model, (numbers(2, WIDTH, grad=True),), split_spec=before(*cuts))
        x = numbers(4, WIDTH, grad=True)
        runner_of(pipe, ranks=pipe.num_stages, microbatches=2).step(x, target=numbers(4, WIDTH, seed=5))
    same(gradients(saving), gradients(plain))


@KINDS
@pytest.mark.parametrize("cut", ["model.layers.1", "model.layers.1.mlp"])
def test_gradient_checkpointing_of_transformers(reentrant: bool, cut: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, attention_dropout=0.2, **sizes))
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.arange(12).view(2, 6) + 3
    pipe = check(model, (), {"input_ids": ids, "labels": ids, "use_cache": False}, spec=before(cut), want=2, calls=1)
    model.train()
    saving = kept(pipe, input_ids=ids, labels=ids, use_cache=False)
    getattr(model, f"{kind}_checkpointing_disable")()
    assert kept(model, input_ids=ids, labels=ids, use_cache=False) > 1.5 * saving
