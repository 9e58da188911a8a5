"""Models that a pipe must train exactly as they train unsplit, each for any number of stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import pipe_split
from tests.end_to_end.case import Case, plain
from tests.end_to_end.user_cases import USER_CASES
from tests.models import WIDTH, linear, linears, numbers, trunk


def _skips(stages: int, rows: int) -> Case:
    """Every stage reads what the first made, twice, and the last reads what the one before the last but one made."""

    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor) -> Tensor:
        first = h = self.layers[0](x)
        kept = [h]
        for layer in self.layers[1:]:
            pipe_split()
            h = layer(h * 0.5 + first.sigmoid() * first) + first / 3
            kept.append(h)
        return h + kept[max(0, len(kept) - 3)] * kept[0]

    return plain(model, rows)


def _dropout(stages: int, rows: int) -> Case:
    """Dropout as a module, as a function inside a closed block, and in the trunk on both sides of a cut."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.drop = linear(), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(self.lin(x)).relu(), 0.2, self.training) + x

    @trunk(layers=nn.ModuleList(Block() for _ in range(stages)))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = F.dropout(x, 0.1, self.training)
            if number:
                pipe_split()
            x = F.dropout(layer(x), 0.1, self.training) + torch.rand_like(x) * 0.1
        return x

    return plain(model, rows)


def _norms(stages: int, rows: int) -> Case:
    """BatchNorm, whose running statistics depend on the order of the microbatches."""

    @trunk(layers=linears(stages), norms=nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(stages)))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if number:
                pipe_split()
            x = norm(layer(x)).relu() + x
        return x

    return plain(model, 2 * rows)  # one row has no variance


def _in_place(stages: int, rows: int) -> Case:
    """Every stage writes into what it received, and what it wrote is read again later."""

    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor, shift: Tensor) -> Tensor:
        h = self.layers[0](x)
        side = h * 2
        for layer in self.layers[1:]:
            pipe_split()
            h.add_(shift)
            side[:, :2].mul_(0.9)
            h = layer(h) + side
        return h * side

    return plain(model, rows, shift=numbers(rows, 1, seed=8))


def _kinds(stages: int, rows: int) -> Case:
    """Integers, booleans, complex, expanded, transposed, conjugated and empty tensors across every cut."""

    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        scale = h.mean(1, keepdim=True).expand(-1, WIDTH)
        turned = torch.complex(h, h * 2).conj()
        order = h.detach().argsort(1)
        mask = h > 0
        empty = h[:0]
        across = h.reshape(-1, 2, WIDTH // 2).transpose(1, 2)
        for layer in self.layers[1:]:
            pipe_split()
            more = (turned * turned).real + turned.imag + empty.sum() + across.reshape(-1, WIDTH) * scale
            h = layer(h.masked_fill(mask, 0.5)).gather(1, order) + more * 0.1
            scale, order, mask = scale * 1.1, order.flip(1), ~mask
            across = across * 0.5
        return h

    return plain(model, rows)


def _frozen(stages: int, rows: int, *which: int) -> Case:
    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor) -> Tensor:
        first = h = self.layers[0](x)
        for layer in self.layers[1:]:
            pipe_split()
            h = layer(h.tanh()) + first
        return h

    for number in which:
        model.get_submodule(f"layers.{number}").requires_grad_(False)
    return plain(model, rows)


def _no_parameters(stages: int, rows: int) -> Case:
    @trunk(one=linear())
    def model(self: Any, x: Tensor) -> Tensor:
        h = self.one(x)
        for number in range(1, stages):
            pipe_split()
            h = h.tanh() * (number + 1)
        return h

    return plain(model, rows)


def _tied(stages: int, rows: int) -> Case:
    """One weight in the first and in the last stage, one more in all between."""

    @trunk(layers=linears(stages))
    def model(self: Any, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            x = layer(x.tanh()) + x
        return x

    model.get_submodule(f"layers.{stages - 1}").weight = model.get_submodule("layers.0").weight
    for number in range(2, stages - 1):
        model.get_submodule(f"layers.{number}").bias = model.get_submodule("layers.1").bias
    return plain(model, rows)


@dataclasses.dataclass
class Result:
    loss: Tensor
    logits: Tensor
    more: dict[str, Any]


def _own_loss(stages: int, rows: int) -> Case:
    """Labels and masks read late, a dataclass with everything in it as output."""

    @trunk(embed=nn.Embedding(11, WIDTH), layers=linears(stages), head=linear(WIDTH, 11))
    def model(self: Any, tokens: Tensor, mask: Tensor, labels: Tensor) -> Result:
        h = embedded = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            h = layer(h * mask.unsqueeze(-1)).relu() + h
        logits = self.head(h + embedded)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Result(loss, logits, {"mask": mask, "pair": (h, None), "count": 3, "sum": labels.sum()})

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (rows, 3), generator=generator)
    mask = torch.rand(rows, 3, generator=generator) > 0.3
    return Case(model, (tokens,), {"mask": mask, "labels": tokens.roll(1, 1)}, None, None)


def _structured(stages: int, rows: int) -> Case:
    """A dict as the output, a nested target, a nested argument."""

    @trunk(layers=linears(stages))
    def model(self: Any, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        h = batch["x"]
        for number, layer in enumerate(self.layers):
            if number:
                pipe_split()
            h = layer(h * scale) + batch["more"][0]
        return {"h": h, "first": h[:, 0], "scale": scale}

    def loss(output: dict[str, Any], target: dict[str, Any]) -> Tensor:
        return F.mse_loss(output["h"], target["h"]) + (output["first"] * target["more"][0]).mean()

    batch = {"x": numbers(rows, WIDTH), "more": (numbers(rows, WIDTH, seed=4), None)}
    target = {"h": numbers(rows, WIDTH, seed=5), "more": (numbers(rows, seed=6),)}
    return Case(model, (batch,), {"scale": 0.7}, target, loss)


CASES: dict[str, Callable[[int, int], Case]] = {
    "skips": _skips,
    "dropout": _dropout,
    "batch norm": _norms,
    "in place": _in_place,
    "kinds of tensors": _kinds,
    "frozen first": lambda stages, rows: _frozen(stages, rows, 0),
    "frozen middle": lambda stages, rows: _frozen(stages, rows, stages // 2),
    "frozen last": lambda stages, rows: _frozen(stages, rows, stages - 1),
    "frozen all but the second": lambda stages, rows: _frozen(stages, rows, *{*range(stages)} - {1}),
    "no parameters": _no_parameters,
    "tied": _tied,
    "own loss": _own_loss,
    "structured": _structured,
    **USER_CASES,
}
