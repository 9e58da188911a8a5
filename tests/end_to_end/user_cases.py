"""What users write in their models, each for any number of stages: calls, outputs, blocks, hooks, buffers."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipework import pipe_split
from tests.end_to_end.case import Case, plain, squared
from tests.models import WIDTH, linear, linears, numbers, trunk


def _arguments(stages: int, rows: int) -> Case:
    """Inputs used in another order than declared, by name in another order than that, by the last stage, by several."""

    @trunk(layers=linears(stages))
    def model(self: Any, a: Tensor, b: Tensor, c: Tensor, *, d: Tensor) -> Tensor:
        h = c - d
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            h = layer(h - b * 0.1)
        return h / (1 + a * a)

    a, b, c, d = (numbers(rows, WIDTH, seed=seed, grad=True) for seed in range(4))
    return Case(model, (a,), {"d": d, "c": c, "b": b}, numbers(rows, WIDTH, seed=5), squared)


class Fields(OrderedDict[str, Any]):
    """As transformers' ModelOutput: an ordered dict that is an object, too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


def _python_values(stages: int, rows: int) -> Case:
    """None, numbers, flags and words as arguments; an output with scalars, and with values that are no tensors."""

    @trunk(layers=linears(stages))
    def model(
        self: Any, x: Tensor, mask: Tensor | None, scale: float = 2.0, flag: bool = False, *, how: str, more: Any = None
    ) -> Fields:
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            x = layer(x * scale) if flag else layer(x)
            x = x if mask is None else x * mask
            x = x if how == "plain" else x.tanh()
        return Fields(
            mean=x.mean(),
            rows=torch.tensor(x.shape[0]),
            none=more,
            logits=x,
            name=how,
            pair=(x[:, 0].detach(), [scale]),
        )

    def loss(output: Fields, target: Tensor) -> Tensor:
        return F.mse_loss(output.logits, target) + output.mean

    kwargs = {"how": "tanh", "flag": True, "scale": 0.5, "mask": None}
    return Case(model, (numbers(rows, WIDTH),), kwargs, numbers(rows, WIDTH, seed=5), loss)


def _early_outputs(stages: int, rows: int) -> Case:
    """The loss reads what the first stage made, directly; outputs of every dtype and layout."""

    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor) -> dict[str, Any]:
        h = first = self.layers[0](x)
        early = {
            "balance": first.softmax(-1).mean(),
            "order": first.detach().argsort(1),
            "mask": first > 0,
            "wave": torch.complex(first, first * 2).conj(),
            "none": first[:, :0],
            "wide": first.mean(1, keepdim=True).expand(-1, WIDTH),
            "half": first.to(torch.bfloat16),
            "turned": first.view(-1, 2, 2, WIDTH // 4).to(memory_format=torch.channels_last) * 2,
        }
        for layer in self.layers[1:]:
            pipe_split()
            h = layer(h.tanh())
        return {"late": h, **early}

    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        late = output["late"].gather(1, output["order"]).masked_fill(output["mask"], 0.5)
        early = output["wave"].abs() * output["wide"] + output["half"].float() + output["turned"].flatten(1)
        return F.mse_loss(late + early, target) + 0.3 * output["balance"]

    return Case(model, (numbers(rows, WIDTH),), {}, numbers(rows, WIDTH, seed=5), loss)


class Halved(nn.Module):
    """May be cut in the middle of any of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cuts: bool) -> Tensor:
        h = F.gelu(self.up(x))
        if cuts:
            pipe_split()
        h = self.down(h)
        h.add_(x)
        return h


def _shared_blocks(stages: int, rows: int) -> Case:
    """One block cut inside in each of its calls, one called twice in every stage."""

    @trunk(shared=Halved(), twice=linear())
    def model(self: Any, x: Tensor) -> Tensor:
        for _ in range(stages - 1):
            x = self.shared(self.twice(self.twice(x)).sin(), True)
        return self.twice(self.shared(x, False)) + self.twice(x)

    return plain(model, rows)


class Own(nn.Module):
    """Control flow that depends on data, isinstance, a method of its own, a copy and a pickle of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = linear(), 0

    def scaled(self, x: Tensor) -> Tensor:
        return x * (1 + self.calls % 1)

    def forward(self, x: Any) -> Tensor:
        assert isinstance(x, Tensor)
        assert not isinstance(x, nn.Parameter)
        self.calls += 1
        twin = copy.deepcopy(self.lin.bias.detach())
        other = pickle.loads(pickle.dumps(twin))
        for _ in range(int(x[0, 0].abs().item() * 3)):
            x = x * 0.9
        return self.scaled(self.lin(x)) + other if x.sum() > 0 else -self.lin(x).tanh()


def _blocks(stages: int, rows: int) -> Case:
    """Blocks that nothing could trace, with hooks of every kind that change what goes through."""

    @trunk(layers=nn.ModuleList(Own() for _ in range(stages)))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            x = layer(x) + x
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * 0.9)
        return x

    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.1,))
        layer.register_forward_hook(lambda _, args, out: out + args[0] * 0.1)
        layer.register_full_backward_hook(lambda _, inward, __: tuple(g if g is None else g * 0.5 for g in inward))
        layer.register_full_backward_pre_hook(lambda _, outward: tuple(g * 0.7 for g in outward))
    return Case(model, (numbers(rows, WIDTH, grad=True),), {}, numbers(rows, WIDTH, seed=5), squared)


class Saved(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant) + F.dropout(x, 0.1, self.training)


def _checkpoints(stages: int, rows: int) -> Case:
    """Both kinds, in a block and in the trunk around one, with dropout inside."""

    @trunk(
        embed=nn.Embedding(11, WIDTH),
        blocks=nn.ModuleList(Saved(number % 2 == 0) for number in range(stages)),
        layers=nn.ModuleList(nn.Sequential(linear(), nn.Dropout(0.2)) for _ in range(stages)),
    )
    def model(self: Any, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for number, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            if number:
                pipe_split()
            h = checkpoint(layer, block(h), use_reentrant=number % 2 == 1) + h
        return h

    tokens = torch.randint(11, (rows,), generator=torch.Generator().manual_seed(1))
    return Case(model, (tokens,), {}, numbers(rows, WIDTH, seed=5), squared)


class Average(nn.Module):
    """Keeps a mean behind autograd's back, and multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x * self.mean


def _buffers(stages: int, rows: int) -> Case:
    """Buffers that every microbatch writes and multiplies by, while others are before their backward."""

    @trunk(
        layers=linears(stages),
        averages=nn.ModuleList(Average() for _ in range(stages)),
        norms=nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(stages)),
        last=nn.Buffer(torch.ones(WIDTH)),
        largest=nn.Buffer(torch.zeros(WIDTH)),
        steps=nn.Buffer(torch.tensor(0)),
    )
    def model(self: Any, x: Tensor) -> Tensor:
        for number, (layer, average, norm) in enumerate(zip(self.layers, self.averages, self.norms, strict=True)):
            if number:
                pipe_split()
            x = norm(average(layer(x)))
        with torch.no_grad():
            torch.maximum(self.largest, x.abs().amax(0), out=self.largest)
        x = x / self.largest * self.last
        self.last = self.last * 0.5 + x.detach().mean(0)
        self.steps += 1
        return x / self.steps

    return plain(model, 2 * rows)  # one row has no variance


USER_CASES = {
    "arguments": _arguments,
    "python values": _python_values,
    "early outputs": _early_outputs,
    "shared blocks": _shared_blocks,
    "blocks of one's own": _blocks,
    "checkpoints": _checkpoints,
    "buffers": _buffers,
}
