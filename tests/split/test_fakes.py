"""Models without values: what has values all the same is real, and the model does not see that it is looked at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipework import CaptureError, Runner, pipe_split, pipeline, schedules
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import before, same


def test_the_model_does_not_see_that_it_is_traced() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        for tensor in (x, mask, self.one.weight, self.one(x)):
            assert not isinstance(tensor, torch._subclasses.FakeTensor)
            assert not tensor.is_meta
        assert not torch.compiler.is_compiling()
        assert not torch.jit.is_tracing()
        h = self.one(x)
        pipe_split()
        positions = torch.arange(x.shape[0], device=h.device)
        if mask.all() and positions.tolist() == list(range(x.shape[0])):
            return self.two(h)
        return self.two(h) * mask[positions]

    reference = copy.deepcopy(model)
    meta = copy.deepcopy(model).to("meta")
    for mask in (torch.ones(4, 1), torch.tensor([[1.0], [0], [1], [1]])):
        pipe, real = (pipeline(m, (numbers(), mask)) for m in (meta, model))
        assert pipe.get_stage_module(1).source == real.get_stage_module(1).source
        same(real(numbers(), mask)[0], reference(numbers(), mask))


@pytest.mark.parametrize("view", [True, False])
def test_memory_written_without_values_has_none_any_more(view: bool) -> None:
    """Read back, it is no number; written through a view, the stages see it."""

    @trunk(one=linear(), two=linear(), reads=True)
    def model(self: nn.Module, x: Tensor) -> Tensor:
        total = torch.zeros(4, 8)
        part = total[1:3] if view else total
        total += self.one(x)
        pipe_split()
        if self.reads and part.sum() > 0:
            return self.two(x)
        part.mul_(2)
        return self.two(x) * total

    model.reads = False
    real, meta = (pipeline(m, (numbers(),)) for m in (model, copy.deepcopy(model).to("meta")))
    for index in range(2):
        assert meta.get_stage_module(index).source == real.get_stage_module(index).source
    model.reads = True
    with pytest.raises(CaptureError, match="did not run") as error:
        pipeline(model.to("meta"), (numbers(),))
    assert "have no values" in error.value.remedy


def test_layout_changed_in_place() -> None:
    @trunk(layers=linears(2))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.layers[0](x).unsqueeze_(0)
        assert x.shape == (1, 4, 8)
        pipe_split()
        return self.layers[1](x.squeeze_(0).t_().t())

    real, meta = (pipeline(m, (numbers(),)) for m in (model, copy.deepcopy(model).to("meta")))
    for index in range(2):
        assert meta.get_stage_module(index).source == real.get_stage_module(index).source


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Bert"])
def test_transformers_cut_without_values_train_alike(kind: str, masked: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    if kind != "Bert":
        sizes["num_key_value_heads"] = 1
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **sizes)
    make = getattr(transformers, f"{kind}ForMaskedLM" if kind == "Bert" else f"{kind}ForCausalLM")
    layers = "bert.encoder.layer" if kind == "Bert" else "model.layers"
    real = make(config)
    with torch.device("meta"):
        meta = make(config)
    ids = torch.arange(24).view(4, 6) + 3
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if masked:
        batch["attention_mask"] = (torch.arange(6) < torch.tensor([[6], [4], [5], [6]])).long()
    example = {name: value[1:2] for name, value in batch.items()}
    names = {id(module): name for name, module in meta.named_modules()}

    @torch.no_grad()
    def initialize(module: nn.Module) -> None:
        original = real.get_submodule(names[id(module)])
        for mine, its in ((module._parameters, original._parameters), (module._buffers, original._buffers)):
            for name, tensor in mine.items():
                if tensor is not None:
                    tensor.copy_(its[name])

    losses = []
    for model in (real, meta):
        pipe = pipeline(model, (), example, split_spec=before(f"{layers}.1", f"{layers}.2"))
        torch.manual_seed(3)
        runner = Runner(pipe, schedules.one_f_one_b(pipe.layout(3), 4))
        if model is meta:
            runner.initialize(initialize)
        losses.append(runner.step(**batch))
    same(*losses)
    for (name, one), (_, other) in zip(real.named_parameters(), meta.named_parameters(), strict=True):
        same(one.grad, other.grad, name)
