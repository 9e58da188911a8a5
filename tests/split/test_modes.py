"""Train and eval, dropout, autocast, regions without gradient, and values on which the trunk branches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import MismatchError, Pipe, pipe_split, pipeline
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import assert_same, before, check, outcome, same


def compared(pipe: Pipe, model: nn.Module, reference: nn.Module, *args: Tensor) -> None:
    assert_same(outcome(pipe, model, args, {}, unwrap=True), outcome(reference, reference, args, {}))


@pytest.mark.parametrize("captured_in", [True, False])
def test_eval_and_train_again_with_dropout(captured_in: bool) -> None:
    @trunk(layers=nn.ModuleList(nn.Sequential(linear(), nn.Dropout(0.5)) for _ in range(3)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i:
                pipe_split()
            x = F.dropout(layer(x), 0.3, self.training)
        return x

    model.train(captured_in)
    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(grad=True),))
    compared(pipe, model, reference, numbers(grad=True))
    for mode in (True, False, True, False):
        reference.train(mode)
        pipe.train(mode)
        compared(pipe, model, reference, numbers(grad=True))
        assert all(m.training is mode for m in model.modules())


def test_mode_set_on_the_model_a_stage_or_a_block() -> None:
    model = nn.Sequential(nn.Sequential(linear(), nn.Dropout(0.5)), nn.Sequential(linear(), nn.Dropout(0.5)))
    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(grad=True),), split_spec=before("1"))
    model.eval(), reference.eval()
    compared(pipe, model, reference, numbers(grad=True))
    pipe.train(), reference.train()
    model[0].eval(), reference[0].eval()
    compared(pipe, model, reference, numbers(grad=True))
    for index in range(2):
        pipe.get_stage_module(index).train()
    reference.train()
    compared(pipe, model, reference, numbers(grad=True))


def test_branch_on_training_with_another_depth() -> None:
    @trunk(layers=linears(4))
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        first = self.layers[0](x)
        pipe_split()
        x = self.layers[1](first)
        if not self.training:
            return self.layers[3](x)
        return self.layers[2](x), first

    pipe = check(model, (numbers(grad=True),), want=2)
    assert len(pipe.train()(numbers())) == 2


def test_autocast_around_the_pipe() -> None:
    model = nn.Sequential(linear(), nn.LayerNorm(8), linear(), linear())
    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(grad=True),), split_spec=before("1", "3"))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            compared(pipe, model, reference, numbers(grad=True))
    compared(pipe, model, reference, numbers(grad=True))


def test_autocast_inside_forward_and_between_cuts() -> None:
    @trunk(one=linear(), two=linear(), norm=nn.LayerNorm(8), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.one(x)
            pipe_split()
            x = self.two(x) @ self.two.weight
            with torch.autocast("cpu", enabled=False):
                x = self.norm(x.float())
            pipe_split()
            x = x @ x.t() @ x
        return self.three(x.float())

    check(model, (numbers(grad=True),), want=3)


def test_weight_used_before_and_after_an_island_without_autocast() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        with torch.autocast("cpu", torch.bfloat16):
            x = self.two(x)
            with torch.autocast("cpu", enabled=False):
                x = x.float().softmax(-1)
            return self.two(x)

    check(model, (numbers(grad=True),), want=2)


def test_weight_cast_anew_in_each_autocast_region() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.two(x)
        return x

    pipe = check(model, (numbers(grad=True),), want=2)
    assert pipe.get_stage_module(1).source.count("with torch.autocast") == 2


def test_weight_cast_once_and_used_in_two_autocast_stretches() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        with torch.autocast("cpu", torch.bfloat16):
            x = self.two(x)
            with torch.no_grad():
                scale = x.float().std()
            return self.two(x) / scale

    check(model, (numbers(grad=True),), want=2)


def test_regions_without_gradient() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        with torch.no_grad():
            target = self.two(h)
            pipe_split()
            target = target.softmax(-1)
            with torch.enable_grad():
                h = self.two(h)
        pipe_split()
        return self.three(h) - target, target

    check(model, (numbers(grad=True),), want=3)


def test_decorated_regions() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        @torch.no_grad()
        def statistics(h: Tensor) -> Tensor:
            return h.mean(0) + self.one(h).std(0)

        h = self.one(x)
        torch.set_grad_enabled(False)
        s = statistics(h) * 2
        torch.set_grad_enabled(True)
        pipe_split()
        return self.two(h) * s

    check(model, (numbers(grad=True),), want=2)


@pytest.mark.parametrize("inference", [True, False])
def test_called_without_gradient(inference: bool) -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        kept = h.detach()
        pipe_split()
        y = self.two(h)
        y.relu_()
        pipe_split()
        return self.three(y), kept

    pipe = check(model, (numbers(grad=True),), want=3)
    with torch.inference_mode() if inference else torch.no_grad():
        for _ in range(2):
            same(pipe(numbers()), model(numbers()))
    assert_same(outcome(pipe, model, (numbers(grad=True),), {}), outcome(model, model, (numbers(grad=True),), {}))


def test_captured_in_inference_mode_with_writes_in_place() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        mask[0] = 0
        h[1] = 0
        return self.two(h) * mask

    with torch.inference_mode():
        x, mask = numbers(), numbers(seed=2)
        pipe = pipeline(model, (x, mask))
        same(pipe(x.clone(), mask.clone())[0], model(x.clone(), mask.clone()))
    with torch.no_grad():
        same(pipe(numbers(), numbers(seed=2))[0], model(numbers(), numbers(seed=2)))


def test_values_read_back_are_guarded() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, k: Tensor) -> Tensor:
        h = self.one(x) * int(k)
        pipe_split()
        if h.sum() > 0:
            h = h * k.item()
        return self.two(h)

    x = numbers()
    pipe = pipeline(model, (x, torch.tensor(3)))
    same(pipe(x, torch.tensor(3))[0], model(x, torch.tensor(3)))
    same(pipe(x, torch.tensor(4))[0], model(x, torch.tensor(4)))  # an input decides: another capture
    captured = model(x, torch.tensor(3)), model(-30 * x, torch.tensor(3))
    assert not torch.equal(*captured)
    positive = model.one(x).sum() > 0
    assert positive != (model.one(-30 * x).sum() > 0)
    with pytest.raises(MismatchError, match="took another path"):  # an activation decides
        pipe(-30 * x, torch.tensor(3))


@pytest.mark.parametrize("structure", ["list", "nested tuple", "dict"])
def test_how_many_values_a_module_returns_is_guarded(structure: str) -> None:
    """A block that skips layers at random returns fewer intermediate values: the last of them is another one."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Any:
            values = [x + i for i in range(3 if x.sum() > 0 else 4)]
            return {
                "list": [*values, None],
                "nested tuple": (x, tuple(values)),
                "dict": {str(i): value for i, value in enumerate(values)} | {"last": values[-1]},
            }[structure]

    @trunk(one=Block(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        out = self.one(x)
        x = {"list": lambda: out[-2], "nested tuple": lambda: out[1][-1], "dict": lambda: out["last"]}[structure]()
        pipe_split()
        return self.two(x)

    x = numbers().abs()
    pipe = pipeline(model, (x,))
    same(pipe(x)[0], model(x))
    with pytest.raises(MismatchError, match="the number of values in what one returns is"):
        pipe(-x)


@pytest.mark.parametrize("read", ["item", "bool", "tolist", "float", "shape", "len", "numpy", "index", "equal"])
def test_each_way_of_reading_a_value_is_guarded(read: str) -> None:
    readers = {
        "item": lambda h: h.sum().item(),
        "bool": lambda h: 2 if h.sum() > 0 else 1,
        "tolist": lambda h: h.flatten().tolist()[0],
        "float": lambda h: float(h.detach().mean()),
        "shape": lambda h: (h > 0).nonzero().shape[0],
        "len": lambda h: len(h[h > 0]),
        "numpy": lambda h: float(h.detach().numpy().sum()),
        "index": lambda h: range(100)[(h > 0).sum()],
        "equal": lambda h: 2 if torch.equal(h.abs(), h) else 1,
    }

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        return self.two(h * readers[read](h))

    pipe = pipeline(model, (numbers(seed=1),))
    same(pipe(numbers(seed=1))[0], model(numbers(seed=1)))
    raised = 0
    for seed in range(2, 6):
        try:
            same(pipe(numbers(seed=seed))[0], model(numbers(seed=seed)))
        except MismatchError:
            raised += 1
    assert raised or read == "equal"


def test_flags_and_counters_of_the_trunk() -> None:
    @trunk(one=linear(), two=linear(), flag=False, rate=0.5, steps=0)
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x) * self.rate
        self.steps += 1
        if self.flag:
            h = h.relu()
        pipe_split()
        return self.two(h) + self.steps % 2

    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(grad=True),))
    for flag, rate in ((False, 0.5), (True, 0.5), (True, 0.25), (False, 0.5)):
        for one in (model, reference):
            one.flag, one.rate = flag, rate
        compared(pipe, model, reference, numbers(grad=True))
        assert model.steps == reference.steps


def test_constants_of_one_mode_stay_when_another_is_captured() -> None:
    @trunk(one=linear(), two=linear(), tables={True: numbers(8), False: numbers(8, seed=9)})
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        return self.two(h) * self.tables[self.training]

    check(model, (numbers(grad=True),), want=2, modes=(True, False, True, False))


def test_parameters_frozen_and_thawed_after_the_capture() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(),), split_spec=before("1", "2"))

    def crossing() -> list[bool]:
        return [w.gradient for e in pipe.variant(pipe.example).cut.edges for w in e.wires]

    assert crossing() == [True, True]
    for frozen in (True, False):
        for one in (model, reference):
            one[0].requires_grad_(not frozen)
        assert crossing() == [not frozen, True]
        compared(pipe, model, reference, numbers())
