"""The operations whose weight gradient can wait, and how each goes back: by the very calls that autograd makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

Gradients = tuple[Tensor | None, Tensor | None]


@final
@dataclass(frozen=True, slots=True)
class Operation:
    """What the modules of some classes compute, and how it goes back: to its input, and to its weight and bias.

    `fits` tells whether these make the very calls that autograd makes for this input, so that no bit differs.
    `is_cast` tells whether autocast casts its tensors.
    """

    classes: tuple[type[nn.Module], ...]
    is_cast: bool
    fits: Callable[[Any, Tensor, Tensor], bool]  # (module, input, weight)
    forward: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    to_input: Callable[[Any, Tensor, Tensor, Tensor], Tensor | None]  # (module, gradient, input, weight)
    to_parameters: Callable[[Any, Tensor, Tensor, Tensor, bool, bool], Gradients]  # those that are wanted


def _linear_fits(module: nn.Linear, x: Tensor, weight: Tensor) -> bool:
    # With one row strides do not tell rows from columns, and autograd's choice of product goes by strides.
    return x.dim() >= 2 and x.is_contiguous() and weight.is_contiguous() and x.numel() > module.in_features


def _linear(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def _linear_to_input(module: nn.Linear, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return gradient.reshape(-1, module.out_features).mm(weight).view_as(x)


def _linear_to_parameters(
    module: nn.Linear, gradient: Tensor, x: Tensor, weight: Tensor, of_weight: bool, of_bias: bool
) -> Gradients:
    flat = gradient.reshape(-1, module.out_features)
    return (
        flat.t().mm(x.view(-1, module.in_features)) if of_weight else None,
        flat.sum(0) if of_bias else None,
    )


def _conv_fits(module: Any, x: Tensor, weight: Tensor) -> bool:
    batched = x.dim() == weight.dim()
    return batched and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _conv(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    none = [0] * len(module.stride)
    return torch.ops.aten.convolution(
        x, weight, bias, module.stride, module.padding, module.dilation, False, none, module.groups
    )


def _conv_to_input(module: Any, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _conv_back(module, gradient, x, weight, (True, False, False))[0]


def _conv_to_parameters(
    module: Any, gradient: Tensor, x: Tensor, weight: Tensor, of_weight: bool, of_bias: bool
) -> Gradients:
    return _conv_back(module, gradient, x, weight, (False, of_weight, of_bias))[1:]


def _conv_back(module: Any, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
    sizes = None if module.bias is None else [module.out_channels]
    none = [0] * len(module.stride)
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, sizes, module.stride, module.padding, module.dilation, False, none, module.groups, wanted
    )


def _embedding_fits(module: nn.Embedding, x: Tensor, weight: Tensor) -> bool:
    return module.max_norm is None and not module.sparse


def _embedding(module: nn.Embedding, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.embedding(x, weight, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)


def _embedding_to_input(module: nn.Embedding, gradient: Tensor, x: Tensor, weight: Tensor) -> None:
    """Indices have no gradient."""


def _embedding_to_parameters(
    module: nn.Embedding, gradient: Tensor, x: Tensor, weight: Tensor, of_weight: bool, of_bias: bool
) -> Gradients:
    padding = -1 if module.padding_idx is None else module.padding_idx
    back = torch.ops.aten.embedding_dense_backward
    return back(gradient, x, weight.shape[0], padding, module.scale_grad_by_freq) if of_weight else None, None


OPERATIONS = (
    Operation((nn.Linear,), True, _linear_fits, _linear, _linear_to_input, _linear_to_parameters),
    Operation((nn.Conv1d, nn.Conv2d, nn.Conv3d), True, _conv_fits, _conv, _conv_to_input, _conv_to_parameters),
    Operation((nn.Embedding,), False, _embedding_fits, _embedding, _embedding_to_input, _embedding_to_parameters),
)
