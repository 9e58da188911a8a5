"""What a capture leaves behind (nothing), and what it can work on (also models without values)."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import CutError, PipeworkError, pipe_split, pipeline
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import State, assert_names, assert_same, before, check, outcome, same


def busy() -> nn.Module:
    """A model that does all it can to be changed by being run."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = linear(), nn.BatchNorm1d(8)
            self.calls, self.seen, self.log = 0, [], {}
            self.register_buffer("mean", torch.zeros(8))
            self.plain = torch.zeros(8)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x.shape)
            self.log["last"] = len(self.seen)
            self.kept = x
            self.mean.data.add_(x.detach().mean(0))
            self.plain += 1
            return F.dropout(self.norm(self.lin(x)), 0.5, self.training) + torch.rand(8)

    @trunk(layers=nn.ModuleList([Block(), Block()]), steps=nn.Buffer(torch.tensor(0)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        self.steps += 1
        for layer in self.layers:
            x = F.dropout(layer(x), 0.2, self.training)
        return x * 0.5

    return model


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    model = busy().train(training)
    model.layers[0].register_forward_hook(lambda m, a, out: out)
    model.layers[1].lin.weight.requires_grad_(False)
    state, x = State.of(model), numbers(grad=True)
    kept = x.clone()
    pipeline(model, (x,), split_spec=before("layers.1"))
    state.assert_still(model)
    pipeline(model, (x,), stages=2)
    state.assert_still(model)
    same(x, kept)
    assert x.grad is None
    assert model.layers[0].calls == 0
    assert model.layers[0].seen == []
    assert not torch.any(model.layers[0].plain)


def test_two_pipes_on_one_model() -> None:
    model = nn.Sequential(linear(), linear(), linear(), linear())
    reference = copy.deepcopy(model)
    first = pipeline(model, (numbers(grad=True),), split_spec=before("1"))
    second = pipeline(model, (numbers(grad=True),), split_spec=before("2", "3"))
    wanted = outcome(reference, reference, (numbers(grad=True),), {})
    for pipe in (first, second, first):
        assert_same(outcome(pipe, model, (numbers(grad=True),), {}, unwrap=True), wanted)
        assert_names(pipe, model)
    assert_same(outcome(model, model, (numbers(grad=True),), {}), wanted)


def test_pipe_of_a_model_that_holds_a_cut_model() -> None:
    inner = nn.Sequential(linear(), linear())
    pipeline(inner, (numbers(),), split_spec=before("1"))
    check(nn.Sequential(inner, linear()), (numbers(grad=True),), spec=before("1"), want=2)


def test_the_optimizer_of_the_model_trains_the_pipe() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    reference = copy.deepcopy(model)
    pipe = pipeline(model, (numbers(),), split_spec=before("1", "2"))
    one, other = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(reference.parameters())
    for step in range(3):
        for call, optimizer in ((pipe, one), (reference, other)):
            optimizer.zero_grad()
            out = call(numbers(seed=step))
            (out[0] if call is pipe else out).pow(2).mean().backward()
            optimizer.step()
    same(dict(model.named_parameters()), dict(reference.named_parameters()), strides=False)


def test_parameters_replaced_after_the_cut_are_not_lost_silently() -> None:
    model = nn.Sequential(linear(), linear())
    pipe = pipeline(model, (numbers(),), split_spec=before("1"))
    model.load_state_dict({name: torch.ones_like(p) for name, p in model.state_dict().items()})
    same(pipe(numbers())[0], model(numbers()))
    model.double()
    same(pipe(numbers().double())[0], model(numbers().double()))


def test_captures_in_two_threads() -> None:
    models = [nn.Sequential(linear(), linear()) for _ in range(2)]
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = pipeline(models[i], (numbers(),), split_spec=before("1"))(numbers())[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    plain = [models[0](numbers()) for _ in range(20)]  # a thread that captures nothing is not disturbed
    for thread in threads:
        thread.join()
    same(found[0], plain[0])
    same(found[1], models[1](numbers()))


# ---------------------------------------------------------------------- without values


def on_meta() -> nn.Module:
    @trunk(
        embed=nn.Embedding(11, 8),
        layers=linears(3),
        norm=nn.LayerNorm(8),
        table=nn.Buffer(torch.ones(8), persistent=False),
    )
    def model(self: nn.Module, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], device=ids.device).tril()
        for layer in self.layers:
            x = F.dropout(layer(mask @ x), 0.1, self.training) + x + self.table
        return self.norm(x)

    return model


@pytest.mark.parametrize("example", ["cpu", "meta"])
def test_model_on_meta_is_cut_and_filled_later(example: str) -> None:
    model = on_meta().eval()
    reference = copy.deepcopy(model)
    ids = torch.arange(10).view(2, 5)
    model.to("meta")
    pipe = pipeline(model, (ids.to(example),), split_spec=before("layers.1", "norm"))
    assert pipe.num_stages == 3
    assert {n for i in range(3) for n, _ in pipe.get_stage_module(i).named_parameters()} == {
        n for n, _ in reference.named_parameters()
    }
    for index in range(3):
        stage = pipe.get_stage_module(index)
        stage.to_empty(device="cpu")
        stage.load_state_dict({n: t for n, t in reference.state_dict().items() if n in stage.state_dict()})
        for name, buffer in stage.named_buffers():
            buffer.copy_(dict(reference.named_buffers())[name])
    same(pipe.eval()(ids)[0], reference(ids))


def test_only_one_stage_is_given_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    pipe = pipeline(model, (torch.empty(2, 8, device="meta"),), split_spec=before("2"))
    stage = pipe.get_stage_module(1).to_empty(device="cpu")
    for p in stage.parameters():
        nn.init.ones_(p)
    (out,) = stage(torch.ones(2, 8))
    assert torch.equal(out, torch.full((2, 8), 73.0))
    assert all(p.is_meta for p in pipe.get_stage_module(0).parameters())


def test_constant_without_values_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.table = torch.arange(8.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            pipe_split()
            return self.two(x) + self.table

    with torch.device("meta"):
        model = Model()
    with pytest.raises(CutError, match="has no values") as error:
        pipeline(model, (numbers(),))
    assert "buffer" in error.value.remedy


def test_value_read_back_without_values() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        return self.two(x) * 2 if x.sum() > 0 else self.two(x)

    with pytest.raises(PipeworkError, match=r"no values|meta device"):
        pipeline(model.to("meta"), (numbers(),))


def test_constant_made_on_meta_by_the_capture_is_remade_in_the_stage() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x) + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        pipe_split()
        return self.two(x) * torch.as_tensor(2.0)

    reference = copy.deepcopy(model)
    pipe = pipeline(model.to("meta"), (numbers(),))
    x: Any = numbers()
    for index in range(2):
        stage = pipe.get_stage_module(index).to_empty(device="cpu")
        stage.load_state_dict({n: t for n, t in reference.state_dict().items() if n in stage.state_dict()})
        (x,) = stage(x)
    same(x, reference(numbers()))
