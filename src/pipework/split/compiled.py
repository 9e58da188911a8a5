"""Compiled code in stages: blocks that their author compiled, and stages that are compiled as a whole.

What the author gave to `torch.compile` stays as it is where a stage calls it whole: a module, a function in a module. A
capture runs it as it was written, and tells which modules run in it. A stage is plain Python over the original modules,
so that `torch.compile` takes it like any other function:

    blocks    a ──▶ [compiled b] ──▶ c        a graph for b; the weight gradients of a and c can wait for W
    stages   [a ──▶     b        ──▶ c]       one graph; all weight gradients come with I
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pipework.errors import InputError
from pipework.split.cut import StagePart
from pipework.split.draws import streams_on
from pipework.split.torch_private import is_compiled

if TYPE_CHECKING:
    from pipework.split.stage import Code, Stage


def compiled_modules(stage: Stage, seen: Collection[str]) -> frozenset[str]:
    """The stage's modules that run in compiled code, by FQN: those seen in it, and those that no call has reached.

    All of them, the stage itself (`""`) too, where the stage is compiled as a whole.
    """
    modules = dict(stage.named_modules())
    if stage.compile_options is not None:
        return frozenset(modules)
    inside = {inner for module in modules.values() if is_compiled(module) for inner in module.modules()}
    return frozenset(name for name, module in modules.items() if module in inside or name in seen)


def compile_stage(code: Code, part: StagePart, options: Mapping[str, Any]) -> Code:
    """A stage's code, given to `torch.compile`; what it draws comes from one stream for the whole stage."""
    _warn_of_breaks(part, options)
    run = compile_function(code, options)

    def forward(self: Stage, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        streams_on(self.device_beside(next(iter(tensors), None)))(f"stage {part.index}", 0, 0)
        return run(self, *tensors)

    return forward


def refuse_graphs(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for modes in which the compiler replays CUDA graphs of its own."""
    mode, own = options.get("mode"), options.get("options") or {}
    if mode in ("reduce-overhead", "max-autotune") or own.get("triton.cudagraphs"):
        raise InputError(
            f"the compiler would replay CUDA graphs of its own, with mode={mode!r}, options={own!r}",
            why="what a stage makes would be overwritten by its next microbatch, before its backward",
            remedy="use another mode ('max-autotune-no-cudagraphs'), and Runner(graphs=True) for one of the step",
        )


def compile_function(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, which takes out of a dictionary among the options what it has read."""
    own: dict[str, Any] = {name: dict(value) if type(value) is dict else value for name, value in options.items()}
    return torch.compile(function, **own)


def one_stream(device: torch.device) -> Callable[..., None]:
    """In place of `streams_on` in a stage that is compiled as a whole: it has begun its one stream already."""
    return _go_on


def _go_on(module: str, call: int, segment: int) -> None:
    pass


def _warn_of_breaks(part: StagePart, options: Mapping[str, Any]) -> None:
    """Say where the code reads a value back into Python: one graph cannot go on from there."""
    entry = next((entry for entry in part.entries if entry.readback), None)
    if entry is None:
        return
    why = (
        f"the forward reads a value back into Python ({entry.title}), and the compiler's graph ends where that is done"
    )
    if options.get("fullgraph"):
        raise InputError(
            f"stage {part.index} cannot be compiled in one graph",
            where=entry.source,
            why=why,
            remedy="compile without fullgraph=True, or put this code in a module that stays whole",
        )
    warnings.warn(f"stage {part.index} is compiled in pieces: at {entry.source} {why}", stacklevel=2)
