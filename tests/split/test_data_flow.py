"""What goes in, across and out: skips, late inputs, arguments and outputs of every kind, layouts and dtypes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import pipe_split, pipeline
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import after, before, check, same


def test_value_used_by_stages_1_and_2() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        y = self.two(h) * h
        pipe_split()
        return self.three(y) + h * y + h

    check(model, (numbers(grad=True),), want=3)


def test_gradients_of_many_readers_add_up_in_autograd_order() -> None:
    @trunk(layers=linears(4))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        y = h
        for layer in self.layers[1:]:
            y = y * 0.3 + h.sigmoid() * h
            pipe_split()
            y = layer(y * h) + h / 3
        return y + h

    check(model, (numbers(grad=True),), want=4)


def test_unet() -> None:
    def conv(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 3, padding=1)

    @trunk(d0=conv(1, 2), d1=conv(2, 4), mid=conv(4, 4), u1=conv(8, 2), u0=conv(4, 1))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        a = F.relu(self.d0(x))
        pipe_split()
        b = F.relu(self.d1(F.max_pool2d(a, 2)))
        m = F.relu(self.mid(F.max_pool2d(b, 2)))
        pipe_split()
        m = F.relu(self.u1(torch.cat([F.interpolate(m, scale_factor=2), b], 1)))
        pipe_split()
        return self.u0(torch.cat([F.interpolate(m, scale_factor=2), a], 1))

    check(model, (numbers(2, 1, 8, 8, grad=True),), want=4)


def test_encoder_and_decoder() -> None:
    @trunk(
        enc=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        dec=nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
    )
    def model(self: nn.Module, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return self.dec(target, self.enc(source), tgt_mask=mask)

    mask = nn.Transformer.generate_square_subsequent_mask(3)
    check(model, (numbers(2, 5, 8, grad=True), numbers(2, 3, 8, grad=True), mask), spec=before("dec"), want=2)


def test_whole_torch_transformer() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    spec = before("encoder.layers.1", "decoder.layers.0", "decoder.layers.1")
    check(model, (numbers(2, 5, 8, grad=True), numbers(2, 3, 8, grad=True)), spec=spec, want=4)


def test_two_towers() -> None:
    @trunk(tower=nn.Sequential(linear(), nn.Tanh()), head=linear(16, 1))
    def model(self: nn.Module, left: Tensor, right: Tensor) -> Tensor:
        a = self.tower(left)
        pipe_split()
        b = self.tower(right)
        pipe_split()
        return self.head(torch.cat([a, b], -1))

    check(model, (numbers(grad=True), numbers(grad=True, seed=9)), want=3)


def test_inputs_used_in_another_order_and_given_in_another_order() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, a: Tensor, b: Tensor, c: Tensor, *, d: Tensor) -> Tensor:
        h = self.one(c - d)
        pipe_split()
        return self.two(h - b) / (1 + a * a)

    a, b, c, d = (numbers(seed=s, grad=True) for s in range(4))
    pipe = check(model, (a,), {"d": d, "c": c, "b": b}, want=2)
    wanted = model(a, b, c, d=d)
    same(pipe(a, c=c, d=d, b=b)[0], wanted)
    same(pipe(d=d, b=b, a=a, c=c)[0], wanted)
    same(pipe(a, b, c, d=d)[0], wanted)


def test_python_values_among_the_arguments() -> None:
    @trunk(one=linear(), two=linear())
    def model(
        self: nn.Module, x: Tensor, mask: Tensor | None, scale: float = 2.0, flag: bool = False, how: str = "sum"
    ) -> Tensor:
        h = self.one(x) * scale
        pipe_split()
        h = self.two(h) if flag else h
        h = h if mask is None else h * mask
        return h.sum(0) if how == "sum" else h.mean(0)

    x = numbers(grad=True)
    pipe = check(model, (x, None), {"flag": True}, want=2)
    check(model, (x, numbers(seed=4)), {"scale": 0.5, "how": "mean"}, want=2)
    for kwargs in (
        {"flag": True, "scale": 7.0},
        {"flag": True, "how": "mean"},
        {"flag": True, "scale": 7},
        {"flag": False},
    ):
        same(pipe(x, None, **kwargs)[0], model(x, None, **kwargs))
    same(pipe(x, numbers(seed=4), flag=True)[0], model(x, numbers(seed=4), flag=True))


def test_nested_inputs() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, batch: dict[str, Any], pair: tuple[Tensor, list[Tensor]]) -> Tensor:
        h = self.one(batch["x"])
        pipe_split()
        return self.two(h) * batch["extra"]["mask"] + pair[1][0] - pair[0] * batch["extra"]["factor"]

    batch = {"extra": {"mask": numbers(seed=1), "factor": 3.0}, "x": numbers(grad=True), "unused": None}
    pair = (numbers(seed=5, grad=True), [numbers(seed=6)])
    pipe = check(model, (batch,), {"pair": pair}, want=2)
    other = {"x": batch["x"], "unused": None, "extra": batch["extra"]}  # the same dict in another order
    same(pipe(other, pair)[0], model(other, pair))


def test_star_arguments() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        h = self.one(args[0])
        pipe_split()
        return self.two(h + args[1]) * kwargs["b"] - kwargs["a"]

    a, b, c, d = (numbers(seed=s, grad=True) for s in range(4))
    pipe = check(model, (a, b), {"b": c, "a": d}, want=2)
    same(pipe(a, b, a=d, b=c)[0], model(a, b, a=d, b=c))


def test_blocks_with_star_arguments_and_containers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = linear()

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state, options = args
            out = self.lin(state["h"]) * options.get("scale", 1.0)
            return {
                "h": out,
                "seen": [*state["seen"], out.detach()],
                "steps": state["steps"] + 1,
                "none": kwargs.get("extra"),
            }

    @trunk(layers=nn.ModuleList(Block() for _ in range(3)))
    def model(self: nn.Module, x: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"h": x, "seen": [], "steps": 0}
        for i, layer in enumerate(self.layers):
            state = layer(state, {"scale": 0.5 + i}, extra=None)
        return state

    check(model, (numbers(grad=True),), spec=before("layers.1", "layers.2"), want=3)


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    loss: Tensor
    logits: Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Tensor
    name: str = "frozen"


class Fields(OrderedDict[str, Any]):
    """As transformers' ModelOutput: an ordered dict that is an object, too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


MAKERS = {
    "tensor": lambda a, b: b,
    "tuple": lambda a, b: (b, a),
    "tuple of one": lambda a, b: (b,),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"b": b, "a": a, "count": 3, "none": None, "name": "x"},
    "nested": lambda a, b: {"pair": (a, [b, None]), "empty": (), "list": []},
    "namedtuple": lambda a, b: Pair(b, a),
    "dataclass": lambda a, b: Result(b.sum(), b, {"a": a}),
    "frozen dataclass": lambda a, b: (Frozen(b), Frozen(a, "other")),
    "ordered dict": lambda a, b: OrderedDict(z=b, a=a),
    "dict with attributes": lambda a, b: Fields(loss=b.mean(), logits=b),
    "scalar": lambda a, b: b.mean(),
    "float and tensor": lambda a, b: (1.5, b, True),
    "the same tensor twice": lambda a, b: (b, b, a, a),
    "early stage alone and late": lambda a, b: {"early": a, "loss": b.sum()},
    "none": lambda a, b: None if b is None else (None, b),
    "views of each other": lambda a, b: (b, b[0], b.t()),
    "maximum": lambda a, b: b.max(dim=-1),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_output(kind: str) -> None:
    make = MAKERS[kind]

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Any:
        a = self.one(x)
        pipe_split()
        return make(a, self.two(a))

    pipe = check(model, (numbers(grad=True),), want=2)
    if kind == "dict with attributes":
        found, wanted = pipe(numbers()), model(numbers())
        assert type(found) is Fields
        same(found.loss, wanted.loss)
    if kind == "views of each other":
        whole, row, _ = pipe(numbers())
        assert row.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_output_that_is_an_input_a_parameter_a_buffer() -> None:
    @trunk(one=linear(), two=linear(), scale=nn.Parameter(numbers(8)), table=nn.Buffer(numbers(3)))
    def model(self: nn.Module, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        h = self.one(x)
        pipe_split()
        return {"y": self.two(h), "x": x, "ids": ids, "scale": self.scale, "table": self.table}

    pipe = check(model, (numbers(grad=True), torch.arange(4)), want=2)
    assert pipe(numbers(), torch.arange(4))["scale"] is model.scale


def test_output_of_an_early_stage_only_used_by_the_loss() -> None:
    @trunk(layers=linears(3))
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.layers[0](x)
        balance = first.softmax(-1).mean()
        second = self.layers[1](first)
        return self.layers[2](second), balance, second

    check(model, (numbers(grad=True),), spec=before("layers.1", "layers.2"), want=3)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.bfloat16]
)
def test_dtype_across_the_cut(dtype: torch.dtype) -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        other = (h * 3).to(dtype) if not dtype.is_complex else torch.complex(h, h * 2)
        pipe_split()
        real = torch.view_as_real(other * other).sum(-1) if dtype.is_complex else other.float()
        return self.two(h + real), other

    check(model, (numbers(grad=True),), want=2)


LAYOUTS = {
    "transposed": lambda h: h.t(),
    "strided": lambda h: h[:, ::2],
    "expanded": lambda h: h.sum(0).expand(3, 8),
    "expanded scalar": lambda h: h.sum().expand(2, 2),
    "channels last": lambda h: h.view(1, 4, 2, 4).to(memory_format=torch.channels_last) * 2,
    "zero rows": lambda h: h[:0],
    "zero rows of a product": lambda h: h[:0] * 2,
    "scalar": lambda h: h.mean(),
    "reversed": lambda h: h.flip(0),
    "offset": lambda h: h[1:, 3:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [False, True])
def test_layout_across_the_cut(layout: str, write: bool) -> None:
    make = LAYOUTS[layout]

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        other = make(h)
        pipe_split()
        if write and not layout.startswith("expanded"):
            other.mul_(1.5)
        return self.two(h) + other.sum(), other

    # A written value is a copy, which keeps the order of dimensions but not gaps between the elements.
    check(model, (numbers(grad=True),), want=2, strides=not write)


def test_channels_last_through_convolutions() -> None:
    layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = numbers(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    check(model, (x,), spec=before("1", "2", "3"), want=4)


def test_sparse_tensor_across_the_cut() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        links = torch.eye(4).to_sparse()
        h = self.one(x)
        pipe_split()
        return self.two(torch.sparse.mm(links, h))

    check(model, (numbers(grad=True),), want=2)


def test_recurrent_state_across_the_cut() -> None:
    @trunk(one=nn.LSTM(8, 8, batch_first=True), two=nn.LSTM(8, 8, batch_first=True), cell=nn.GRUCell(8, 8))
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.one(x)
        pipe_split()
        y, state = self.two(y, state)
        pipe_split()
        h = state[0][0]
        for step in range(3):
            h = self.cell(y[:, step], h)
        return h, state

    check(model, (numbers(2, 5, 8, grad=True),), want=3)


def test_packed_sequence_across_the_cut() -> None:
    @trunk(one=nn.GRU(8, 8, batch_first=True), two=nn.GRU(8, 8, batch_first=True))
    def model(self: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        packed, _ = self.one(packed)
        pipe_split()
        packed, _ = self.two(packed)
        return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]

    check(model, (numbers(3, 5, 8, grad=True), torch.tensor([5, 3, 2])), want=2)


def test_other_shapes_after_the_capture() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        if x.shape[0] > 4:
            h = h - h.mean(0)
        return self.two(h).view(x.shape[0] // 2, 2, -1) / x.shape[0]

    pipe = check(model, (numbers(),), want=2)
    for rows in (2, 4, 6, 10, 6):
        same(pipe(numbers(rows, 8))[0], model(numbers(rows, 8)))


def test_other_depth_after_the_capture() -> None:
    @trunk(layers=linears(4))
    def model(self: nn.Module, x: Tensor, depth: int) -> Tensor:
        for layer in self.layers[:depth]:
            x = layer(x)
        return x

    pipe = check(model, (numbers(grad=True), 3), spec=before("layers.2"), want=2)
    same(pipe(numbers(), 4)[0], model(numbers(), 4))


def test_requires_grad_of_the_input_changes() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        return self.two(h) * 2 if x.requires_grad else self.two(h)

    pipe = check(model, (numbers(),), want=2)
    same(pipe(numbers(grad=True))[0], model(numbers(grad=True)))


def test_cuts_at_both_ends_of_modules() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh(), linear())
    check(model, (numbers(grad=True),), spec=before("1", "3", "4"), want=4)
    check(model, (numbers(grad=True),), spec=after("0", "2"), want=3)
    nested = nn.Sequential(nn.Sequential(linear(), nn.Sequential(linear(), linear())), nn.Sequential(linear()))
    check(nested, (numbers(grad=True),), spec=before("0.1.1", "1.0"), want=3)
    check(nested, (numbers(grad=True),), spec=after("0.1.0"), want=2)


def test_stages_without_parameters_or_gradient() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        h = h.sin() + h.detach().cos()
        pipe_split()
        return self.two(h)

    pipe = check(model, (numbers(grad=True),), want=3)
    assert not list(pipe.get_stage_module(1).parameters())


@pytest.mark.parametrize("frozen", ["0", "1", "2", "01", "12", "02", "012"])
def test_frozen_stages(frozen: str) -> None:
    model = nn.Sequential(linear(), linear(), linear())
    for index in frozen:
        model[int(index)].requires_grad_(False)
    check(model, (numbers(),), spec=before("1", "2"), want=3)
    pipe = pipeline(model, (numbers(),), split_spec=before("1", "2"))
    edges = pipe.variant(pipe.example).cut.edges
    assert [w.gradient for e in edges for w in e.wires] == ["0" not in frozen, not {"0", "1"} <= set(frozen)]
