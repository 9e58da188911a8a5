"""From outputs to one loss: computed where the last stage is, told to every rank.

A microbatch weighs the same as any other, or by its target:

    step's loss = Σ lossᵢ / n           step's loss = Σ lossᵢ · (wᵢ / Σ w)

The second is the loss of the whole batch where each microbatch's loss is a mean over wᵢ things (tokens that are not
padded) and their numbers differ. It is the loss that is scaled, microbatch by microbatch, before its backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from pipework.errors import InputError
from pipework.run.transport import Transport
from pipework.split.pipe import Variant
from pipework.split.trees import map_leaves

LossWeight = Callable[[Any], Any]
"""From a microbatch's target to its weight: a number, or a tensor without dimensions."""

Share = float | torch.Tensor
"""What a microbatch's loss is multiplied by; a tensor of float64 where a captured step reads it anew every time."""

_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),  # of an evaluation that counts
)


def shares(weight: LossWeight, targets: Sequence[Any], scale: bool) -> list[float]:
    """What each microbatch's loss is multiplied by: its weight, divided with `scale` by the sum of all weights.

    Raises `InputError` where there is no target, where a weight is not a finite number from 0 up, and where all are 0.

    >>> targets = [torch.tensor([3, 1, -100]), torch.tensor([2, -100, -100])]
    >>> shares(lambda target: (target != -100).sum(), targets, scale=True)
    [0.6666666666666666, 0.3333333333333333]
    """
    weights = [_weight(weight, microbatch, target) for microbatch, target in enumerate(targets)]
    if not scale:
        return weights
    total = math.fsum(weights)
    if not total:
        raise InputError(
            f"loss_weight gives 0 for all {len(weights)} microbatches",
            why="the mean over nothing is no number",
            remedy="leave out such a batch, on every rank",
        )
    return [each / total for each in weights]


def _weight(weight: LossWeight, microbatch: int, target: Any) -> float:
    if target is None:
        raise InputError(
            "loss_weight was given, and this step has no target",
            why="a microbatch's weight is made of its target, before the first microbatch goes backward",
            remedy="pass target=...; for a model that computes its own loss, the labels that it is given",
        )
    try:
        found = float(weight(target))
    except Exception as error:
        raise InputError(
            f"loss_weight gave no number for microbatch {microbatch}",
            why=f"{type(error).__name__}: {error}",
            remedy="give a number, or a tensor without dimensions",
        ) from error
    if not (math.isfinite(found) and found >= 0):
        raise InputError(
            f"loss_weight gave {found} for microbatch {microbatch}", remedy="give a finite number that is not negative"
        )
    return found


@final
class Losses:
    """Collects what the last stage gives for each microbatch of one step."""

    def __init__(
        self,
        loss: Callable[[Any, Any], torch.Tensor] | None,
        trains: bool,
        divisor: int,
        targets: Sequence[Any],
        shares: Sequence[Share] | None,
        variants: Sequence[Variant],
        keep: bool,
    ) -> None:
        self._loss, self._trains, self._targets, self._shares = loss, trains, targets, shares
        self._divisor = divisor if shares is None else 1
        self._required = trains or (loss is not None and any(target is not None for target in targets))
        self._variants, self._keep = variants, keep
        self._values: list[torch.Tensor | None] = [None] * len(targets)
        self._outputs: list[Any] = [None] * len(targets)

    def finish(self, microbatch: int, results: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Note the output of one microbatch; gives the loss to go back from."""
        output = self._variants[microbatch].rebuild(results)
        if self._keep:
            self._outputs[microbatch] = map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output)
        if not self._required and (self._loss is not None or self._shares == [] or _found(output) is None):
            return None
        target = _beside(results, self._targets[microbatch])
        loss = own_loss(output) if self._loss is None else self._loss(output, target)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(type(loss))
            raise InputError(
                f"the loss of microbatch {microbatch} is {shape}",
                why="a step goes back from one number per microbatch",
                remedy="reduce it to a tensor without dimensions, with .mean() for example",
            )
        if self._trains and not loss.requires_grad:
            raise InputError(
                f"the loss of microbatch {microbatch} has no gradient",
                why="nothing that it was made of is trained, or it was detached or turned into a number on the way",
                remedy="make the loss of the model's output, and train at least one parameter that it depends on",
            )
        if self._shares is None:
            self._values[microbatch] = loss.detach()
            return loss / self._divisor if self._divisor != 1 else loss
        share = self._shares[microbatch]
        if not (isinstance(share, torch.Tensor) or share):  # the mean over nothing is NaN, and so would be 0 times that
            self._values[microbatch] = torch.zeros_like(loss)
            return None
        loss = times(loss, share)
        self._values[microbatch] = loss.detach()
        return loss

    @property
    def outputs(self) -> list[Any]:
        """The microbatches' outputs, where the last stage is and they are kept; else empty."""
        return [] if any(output is None for output in self._outputs) else self._outputs

    def total(self, ends: Sequence[Transport], last: int, told: list[torch.dtype]) -> torch.Tensor | None:
        """The step's loss on every rank: the sum over microbatches, divided as their backwards were.

        `told` has the dtype in which it came to the other ranks before: reading it anew makes the host wait for a GPU.
        """
        known = [value for value in self._values if value is not None]
        if ends[0].in_one_process:
            return _total(torch.stack(known), self._divisor) if known else None
        message = torch.zeros(len(self._values) + 1, dtype=torch.float64, device=_device(ends[0], known))
        if known:
            message[:1].fill_(1 + _DTYPES.index(known[0].dtype))
            message[1:] = torch.stack(known)
        message = ends[0].share(message, last)
        if not (told and self._trains):
            kind = int(message[0])
            if not kind:
                return None
            told[:] = [_DTYPES[kind - 1]]
        return _total(message[1:].to(told[0]), self._divisor)


def _beside(results: Sequence[torch.Tensor], target: Any) -> Any:
    """The target where the output is, and the loss is computed; as it is where there is no tensor in the output."""
    if not results or (type(target) is torch.Tensor and target.device == results[0].device):
        return target
    return map_leaves(lambda x: x.to(results[0].device) if isinstance(x, torch.Tensor) else x, target)


def times(loss: torch.Tensor, share: Share) -> torch.Tensor:
    """The loss by its share: a tensor gives the very bits that the number would, which kernels have in float32."""
    if not isinstance(share, torch.Tensor):
        return loss * share
    inner = loss.dtype if loss.dtype == torch.float64 else torch.float32
    return (loss.to(inner) * share.to(inner)).to(loss.dtype)


def _total(losses: torch.Tensor, divisor: int) -> torch.Tensor:
    return losses.sum() / divisor


def _device(end: Transport, known: Sequence[torch.Tensor]) -> torch.device:
    return known[0].device if known else end.device


def own_loss(output: Any) -> torch.Tensor:
    """The loss that a model computes itself: its output's `.loss` or `["loss"]`, or the output if it is one number."""
    found = _found(output)
    if found is None:
        raise InputError(
            "the model's output has no loss",
            why=f"no loss was given, and the output is {type(output).__name__}",
            remedy="pass loss=... to the runner, or the labels from which the model computes its own",
        )
    return found


def _found(output: Any) -> Any:
    if isinstance(output, torch.Tensor) and not output.dim():
        return output
    found = getattr(output, "loss", None)
    return output.get("loss") if found is None and isinstance(output, dict) else found
