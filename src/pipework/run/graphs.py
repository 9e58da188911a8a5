"""Whole steps of a process as CUDA graphs: captured once, then replayed without the host's doing.

    step 1, 2      run as ever: memory, kernels and connections are made, gradients settle how they are laid out
    step 3         the same Python runs once more, while CUDA writes down what it launches instead of doing it
    from there on  inputs are copied to where the graph reads them, and the graph runs

A graph is bound to memory and to what Python decided as it was captured. So it holds for one kind of step: the same
shapes, the same gradients there to add to, the same microbatches without weight. When of the modules themselves
something is another than it was (see `pipework.run.graph_state`), all are captured anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from pipework.errors import InputError
from pipework.run.graph_draws import GraphDraws
from pipework.run.graph_state import difference, is_plain, state_of
from pipework.run.inputs import Batch
from pipework.run.losses import Losses
from pipework.split.draws import DrawKey
from pipework.split.torch_private import abandon_capture
from pipework.split.trees import leaves, map_leaves

WARM = 2
"""Steps of a kind that run as ever before it is captured: in the first, ranks learn how gradients are laid out."""

Eager = Callable[[Batch, bool], Losses]
"""Runs a step on a batch; the flag says that it is being captured."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Captured:
    """One kind of step of this process, as a graph."""

    memory: int  # bytes of its GPU that it keeps for itself
    graph: torch.cuda.CUDAGraph
    batch: Batch  # where the graph reads its inputs and targets
    losses: Losses
    gradients: Mapping[nn.Parameter, torch.Tensor | None]  # where the graph leaves them
    draws: GraphDraws


@dataclasses.dataclass(slots=True)
class _Kind:
    """One kind of step, as far as it has come."""

    draws: GraphDraws = dataclasses.field(default_factory=GraphDraws)
    made: int = 0  # steps of it
    captured: Captured | None = None


@final
class Graphs:
    """The steps of one plan: as ever, captured, or replayed."""

    def __init__(self, stages: Sequence[nn.Module], loss: Any, devices: Collection[torch.device]) -> None:
        self._refuse_unfit(devices)
        self._device = next(iter(devices))
        self._roots = [*stages, *([loss] if isinstance(loss, nn.Module) else [])]
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()  # for all graphs at hand: no two run at once
        self._kinds: dict[Any, _Kind] = {}
        self._state = state_of(self._roots)
        self._parameters = self._parameters_now()
        self._changed = ""  # what of it the last step itself set anew

    @property
    def captured(self) -> list[Captured]:
        """The kinds of steps that are replayed."""
        return [kind.captured for kind in self._kinds.values() if kind.captured is not None]

    @staticmethod
    def _refuse_unfit(devices: Collection[torch.device]) -> None:
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            raise InputError(
                f"graphs=True, and this process works on {', '.join(sorted(map(str, devices)))}",
                why="a step is captured in one graph, on one GPU",
                remedy="move the model to the process's GPU before the first step, or leave graphs out",
            )

    def step(self, batch: Batch, keep: bool, draw: DrawKey, eager: Eager) -> Losses:
        """One step, in whichever way; `keep` says that its outputs are wanted."""
        self._forget_if_changed()
        key = keep, self._key(batch)
        kind = self._kinds.setdefault(key, _Kind())
        made, kind.made = kind.made, kind.made + 1
        if made == WARM and (reason := _unfit(batch) or self._changed):
            _warn(reason)
        elif made == WARM:
            self._capture(kind, batch, eager)
        if kind.captured is not None:
            return self._replay(kind.captured, batch, draw)
        with kind.draws.noted() if made == WARM - 1 else contextlib.nullcontext():
            losses = eager(batch, False)
        before, self._state = self._state, state_of(self._roots)
        found = difference(before, self._state)
        self._changed = f"a forward sets {found[1]!r} of {self._names()[found[0]]!r} anew" if found else ""
        if self._changed:
            self._forget({key: kind})
        return losses

    def _names(self) -> dict[nn.Module, str]:
        return {module: name for root in self._roots for name, module in root.named_modules()}

    def _parameters_now(self) -> list[nn.Parameter]:
        """Those that a step may give gradients, as far as modules tell: the stages', and the loss's."""
        return list(dict.fromkeys(p for root in self._roots for p in root.parameters()))

    def _key(self, batch: Batch) -> Any:
        given = [*_tensors(batch), *(x for x in _aims(batch) if isinstance(x, torch.Tensor) or is_plain(x))]
        return (
            batch.shares and tuple(map(bool, batch.shares)),
            tuple(p.grad is None for p in self._parameters),
            tuple((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else (type(x), x) for x in given),
            _alike(given),
        )

    # ------------------------------------------------------------------ capture

    def _capture(self, kind: _Kind, batch: Batch, eager: Eager) -> None:
        """Capture this kind of step; where that cannot be done, say why, and leave everything as it was."""
        still = _still(batch, self._device)
        before = {p: p.grad for p in self._parameters}
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # casts made outside would be those of today for ever
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)
        try:
            with kind.draws.drawn_in(graph, self._device), torch.cuda.stream(self._stream), _refusing_waits():
                losses = self._captured(graph, lambda: eager(still, True))
            gradients = {p: p.grad for p in self._parameters}
            memory = torch.cuda.memory_reserved(self._device) - reserved
            kind.captured = Captured(memory, graph, still, losses, gradients, kind.draws)
        except Exception as error:
            if not self.captured:
                self._pool = torch.cuda.graph_pool_handle()
            first = (str(error).splitlines() or [""])[0]
            _warn(f"{self._place(error)} ({type(error).__name__}: {first})")
        finally:
            torch.clear_autocast_cache()
            for parameter, gradient in before.items():
                parameter.grad = gradient

    def _captured(self, graph: torch.cuda.CUDAGraph, step: Callable[[], Losses]) -> Losses:
        # Other threads may allocate and query meanwhile: the other ranks, autograd's own, those that watch connections.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            losses = step()
        except BaseException:
            abandon_capture(graph, self._pool)
            raise
        graph.capture_end()
        return losses

    def _place(self, error: BaseException) -> str:
        """The innermost module whose forward was under way."""
        names = {id(module): name for module, name in self._names().items()}
        inside = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        found = [names[each] for each in inside if names.get(each)]
        return f"{found[-1]!r} cannot be captured" if found else "something outside of modules cannot be captured"

    # ------------------------------------------------------------------ replay

    def _replay(self, captured: Captured, batch: Batch, draw: DrawKey) -> Losses:
        for still, given in zip(_all_tensors(captured.batch), _all_tensors(batch), strict=True):
            if still is not given:
                still.copy_(given, non_blocking=True)
        for still, share in zip(captured.batch.shares or (), batch.shares or (), strict=True):
            if isinstance(still, torch.Tensor):
                still.fill_(share)
        for parameter, gradient in captured.gradients.items():
            if parameter.grad is not None and parameter.grad is not gradient and gradient is not None:
                gradient.copy_(parameter.grad)
        captured.draws.begin(draw)
        captured.graph.replay()
        for parameter, gradient in captured.gradients.items():
            parameter.grad = gradient
        return captured.losses

    # ------------------------------------------------------------------ what a graph is bound to

    def _forget_if_changed(self) -> None:
        state = state_of(self._roots)
        if state != self._state:
            self._state, self._parameters = state, self._parameters_now()
            self._forget({})

    def _forget(self, but: dict[Any, _Kind]) -> None:
        """Drop what was captured, and all kinds of steps but these, of which none has been captured."""
        self._kinds = but
        self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are gone cannot be used again


@contextlib.contextmanager
def _refusing_waits() -> Iterator[None]:
    """Whoever makes the host wait for the GPU gets an error for it, before it spoils the capture for all threads."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says once that not all waits are found, which spoil the capture then
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _warn(reason: str) -> None:
    """At the caller of `Runner.step`."""
    warnings.warn(f"this kind of step is not captured in a CUDA graph, and runs as ever: {reason}", stacklevel=7)


def copied(values: Any) -> Any:
    """The same values in memory that no later step writes."""
    return map_leaves(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, values)


def _unfit(batch: Batch) -> str | None:
    if any(x.requires_grad for x in _tensors(batch)):
        return "an input wants a gradient of its own"
    if any(not (isinstance(x, torch.Tensor) or is_plain(x)) for x in _aims(batch)):
        return "in the target is what is neither a tensor nor a plain value, and may be another in the next step"
    if any(x.layout is not torch.strided for x in _all_tensors(batch)):
        return "an input or target is sparse"
    if any(0 in x.stride() and x.numel() > 1 for x in _all_tensors(batch)):
        return "elements of an input or target share memory; pass x.contiguous()"
    return None


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [x for row in batch.inputs for x in row if x is not None]


def _aims(batch: Batch) -> Iterator[Any]:
    return (leaf for target in batch.targets for leaf in leaves(target))


def _all_tensors(batch: Batch) -> Iterator[torch.Tensor]:
    yield from _tensors(batch)
    yield from (leaf for leaf in _aims(batch) if isinstance(leaf, torch.Tensor))


def _alike(given: Sequence[Any]) -> tuple[int, ...]:
    """Which of these are one and the same, and will share one place that the graph reads."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(x), number) for number, x in enumerate(given) if isinstance(x, torch.Tensor))


def _still(batch: Batch, device: torch.device) -> Batch:
    """A batch laid out as another, on tensors of its own."""
    known: dict[int, torch.Tensor] = {}  # a tensor may go to several microbatches

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in known:
            known[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        return known[id(x)]

    inputs = [[own(x) for x in row] for row in batch.inputs]
    targets = [map_leaves(own, target) for target in batch.targets]
    shares = batch.shares and [
        torch.zeros((), dtype=torch.float64, device=device) if each else 0.0 for each in batch.shares
    ]
    return dataclasses.replace(batch, given=inputs, inputs=inputs, targets=targets, shares=shares)
