"""Calls of `torch.utils.checkpoint.checkpoint` in the trunk: their functions are taped, and marked on the tape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import checkpoint

from pipework.split.tape import Checkpoint, Surroundings, Tape
from pipework.split.torch_private import CHECKPOINT_GENERATOR


def taped(tape: Tape, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """What surrounds the function of a checkpoint that is not reentrant; `original` is torch's own generator.

    What autograd would keep inside is not kept here either, and the caller's `context_fn` is heeded.
    """
    surrounding = original(*args, **kwargs)
    if tape.silent or not torch.is_grad_enabled():
        yield from surrounding
        return
    mark = Checkpoint(False, _settings(original, args, kwargs), Surroundings.now(tape.device_types))
    with tape.unseen():
        next(surrounding)
    tape.checkpoints.append(mark)
    try:
        yield
    except BaseException as error:
        with tape.unseen():
            surrounding.throw(error)
        raise
    finally:
        tape.checkpoints.pop()
    with tape.unseen():
        next(surrounding, None)


def taped_reentrant(tape: Tape, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """Run the function of a reentrant checkpoint as it will run in the backward: with gradients, on tensors of its own.

    Where none of its tensors asks for a gradient, the real one runs it without gradients for good.
    """
    if not goes_back(args):
        with torch.no_grad():
            return function(*args)
    settings = {} if preserve else {"preserve_rng_state": False}
    mark = Checkpoint(True, settings, Surroundings.now(tape.device_types))
    with tape.unseen():
        surrounding = getattr(checkpoint, CHECKPOINT_GENERATOR)(function, preserve)
        next(surrounding)
    tape.checkpoints.append(mark)
    try:
        # Gradients of an argument are added up inside before they meet those from outside.
        out = function(*(a.view_as(a) if _differentiable(a) else a for a in args))
    finally:
        tape.checkpoints.pop()
        with tape.unseen():
            next(surrounding, None)
    found = out if isinstance(out, tuple) else (out,)
    mark.returned.extend(tape.number(t) for t in found if isinstance(t, torch.Tensor))
    return out


def goes_back(args: Iterable[Any]) -> bool:
    """Whether a reentrant checkpoint of these arguments has a backward."""
    return torch.is_grad_enabled() and any(_differentiable(a) for a in args)


def _differentiable(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def _settings(original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the caller of `checkpoint` gave, by name."""
    signature = inspect.signature(original)
    given = signature.bind(*args, **kwargs).arguments
    optional = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    return {name: given[name] for name, default in optional.items() if given.get(name, default) is not default}
