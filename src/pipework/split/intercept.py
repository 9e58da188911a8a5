"""Hearing of the calls that torch's function modes do not see: modules, autograd functions, checkpoints, ..."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import checkpoint

from pipework.split.marks import listen
from pipework.split.torch_private import CHECKPOINT_GENERATOR, COMPILED_CALL, VMAP_CALLS, compiler, functorch_vmap

_thread = threading.local()


class Calls(Protocol):
    """Whoever stands in for the calls; `original` makes the real one."""

    def module(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """`module(*args, **kwargs)`."""
        ...

    def apply(self, original: Callable[..., Any], function: type, args: tuple[Any, ...], kwargs: Any) -> Any:
        """`function.apply(*args, **kwargs)`."""
        ...

    def function(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """A plain call."""
        ...

    def checkpoint(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Iterator[None]:
        """What surrounds the function of a checkpoint that is not reentrant; it runs where this yields."""
        ...

    def cache_cleared(self) -> None:
        """The weights that autocast has cast were forgotten."""
        ...

    def thread(self) -> None:
        """A thread is to be started."""
        ...

    def compiled(self, frame: FrameType) -> None:
        """Code given to `torch.compile` is about to run; it runs as long as the frame does."""
        ...

    def split(self) -> None:
        """`pipe_split()`."""
        ...


def _noticed(tell: Callable[[Calls], None]) -> Callable[[Any], Any]:
    """A stand-in that tells of the call before it makes it."""

    def stand_in(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            if mine is not None:
                tell(mine)
            return original(*args, **kwargs)

        return call

    return stand_in


@contextlib.contextmanager
def intercepted(calls: Calls, module: nn.Module) -> Iterator[None]:
    """Route this thread's calls of modules, autograd functions, checkpoints and vmap's levels through `calls`."""
    undo: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, attribute: str, stand_in: Callable[[Any], Any]) -> None:
        original = owner.__dict__[attribute]
        undo.append((owner, attribute, original))
        setattr(owner, attribute, stand_in(original))

    def module_call(original: Any) -> Any:
        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            return original(self, *args, **kwargs) if mine is None else mine.module(original, self, args, kwargs)

        return __call__

    def autograd_apply(original: Any) -> Any:
        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            call = original.__func__
            return call(cls, *args, **kwargs) if mine is None else mine.apply(call, cls, args, kwargs)

        return classmethod(apply)

    def vmap_call(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            return original(*args, **kwargs) if mine is None else mine.function(original, args, kwargs)

        return call

    def checkpoint_generator(original: Any) -> Any:
        def generator(*args: Any, **kwargs: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            return original(*args, **kwargs) if mine is None else mine.checkpoint(original, args, kwargs)

        return generator

    def compiled_call(original: Any) -> Any:
        def callback(callback: Any) -> Any:
            mine = getattr(_thread, "calls", None)
            if mine is not None and callback:
                mine.compiled(sys._getframe(1))
            return original(callback)

        return callback

    owners = {owner for m in module.modules() for owner in type(m).__mro__ if "__call__" in owner.__dict__}
    try:
        for owner in owners:
            patch(owner, "__call__", module_call)
        patch(torch.autograd.Function, "apply", autograd_apply)
        patch(checkpoint, CHECKPOINT_GENERATOR, checkpoint_generator)
        patch(torch, "clear_autocast_cache", _noticed(lambda calls: calls.cache_cleared()))
        patch(threading.Thread, "start", _noticed(lambda calls: calls.thread()))
        for name in VMAP_CALLS:
            patch(functorch_vmap, name, vmap_call)
        if (loaded := compiler()) is not None:
            patch(loaded, COMPILED_CALL, compiled_call)
        _thread.calls, before = calls, listen(calls.split)
        try:
            yield
        finally:
            _thread.calls = None
            listen(before)
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)


@contextlib.contextmanager
def not_compiling() -> Iterator[None]:
    """Run compiled code as it was written. The compiler gives code up for good once it meets it under a capture."""
    with torch.compiler.set_stance("force_eager") if compiler() else contextlib.nullcontext():
        yield
