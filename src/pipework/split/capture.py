"""Running a model once, with the modules on the path to a cut open and all others closed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from pipework.errors import CaptureError, CutError, PipeworkError
from pipework.split.arguments import named
from pipework.split.checkpoints import goes_back, taped, taped_reentrant
from pipework.split.cost import Meter
from pipework.split.fakes import Fakes, Valueless, fakes_for, undress
from pipework.split.generators import Watch
from pipework.split.intercept import intercepted, not_compiling
from pipework.split.marks import Marks, SplitPoint
from pipework.split.points import CutPoint, PipeSplit
from pipework.split.preserve import attributes_of, changes, unchanged, unfilled
from pipework.split.refusals import IN_A_BLOCK, refuse_modules, refuse_strangers, refuse_thread
from pipework.split.tape import ClosedModule, Draw, Entry, Origin, Surroundings, Tape, Value, user_line
from pipework.split.torch_private import (
    TorchDispatchMode,
    arguments_of,
    functorch_active,
    has_backward_hooks,
    storage_of,
    version_of,
)
from pipework.split.trees import Ref, leaves, map_leaves

_lock = threading.RLock()  # what a capture patches is global, so one runs at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """A model's forward on one example: the tape, and what the run told about the model."""

    entries: tuple[Entry, ...]
    values: tuple[Value, ...]
    input_names: tuple[str, ...]  # of the input tensors, in order
    output: Any  # the model's output, tensors as Ref
    labels: tuple[str, ...]  # what made each cut, in order
    points: tuple[CutPoint | PipeSplit, ...]  # each cut as a value
    opened: frozenset[str]
    called: Mapping[str, int]  # how often each module was called
    calls: Mapping[str, frozenset[str]]  # module -> the modules that its own forward calls
    drawing: frozenset[str]  # modules that draw random numbers in their own forward
    calls_before: tuple[Mapping[str, int], ...]  # per stage: how often each module was called in earlier stages
    written_buffers: frozenset[str]
    changed_attributes: tuple[tuple[str, str, Any], ...]  # plain values that the trunk changes: module, name, value
    assigned_buffers: Mapping[str, Ref]  # buffers that the trunk replaced by a new tensor
    device: torch.device | None  # where all the model's tensors are, if in one place
    on_example: bool  # ran on the example's real tensors rather than on fake ones
    ambient: Surroundings  # switches that were on around the run
    casts: bool  # autocast was switched on inside the forward
    compiled: frozenset[str]  # modules whose forward calls compiled code, or runs in it
    compiled_trunk: str  # where the trunk called compiled code, if it did


@dataclasses.dataclass(slots=True)
class _Frame:
    module: nn.Module
    name: str
    call: int
    segment: int = 0


class _Run:
    """One run of the model under a tape."""

    def __init__(self, names: Mapping[int, str], opened: frozenset[str], marks: Marks, tape: Tape) -> None:
        self.names, self.opened, self.marks, self.tape = names, opened, marks, tape
        self.points: list[CutPoint | PipeSplit] = []
        self.splits_met = 0
        self.stack: list[_Frame] = []
        self.reopen: set[str] = set()
        self.called: dict[str, int] = {}
        self.generators = Watch()
        self.drawing: set[str] = set()
        self.calls: dict[str, set[str]] = {}  # module -> the modules that its own forward calls
        self.calls_before: list[dict[str, int]] = [{}]
        self.casts = False
        self.compiled_modules: set[str] = set()
        self.compiled_trunk = ""
        self._entered: list[tuple[FrameType, str]] = []  # compiled code that runs: its frame, and the module around it
        self.failed = ""  # the innermost module that raised
        self.applied: str | None = None  # the custom autograd.Function being applied

    def module(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        name = self.names.get(id(module))
        again = self.stack and self.stack[-1].module is module  # a __call__ that calls the one it overrides
        if name is None or again:
            return original(module, *args, **kwargs)
        frame = _Frame(module, name, self.called.get(name, 0))
        if self._in_compiled():
            self.compiled_modules.add(name)
        elif self.stack:
            self.calls.setdefault(self.stack[-1].name, set()).add(name)
        points = [m.point for m in self.marks.at.get(name, ()) if m.call in (None, frame.call)]
        if SplitPoint.BEGINNING in points:
            self.cut(f"the beginning of {name!r}", CutPoint(name, SplitPoint.BEGINNING, frame.call))
        self.called[name] = frame.call + 1
        self.stack.append(frame)
        self._locate()
        try:
            if self.applied is not None and not self.tape.silent:
                self.tape.within.append(name)
            if self.tape.silent or self.applied is not None or name in self.opened:
                out = original(module, *args, **kwargs)
            else:
                refuse_strangers(name, module, self.tape.known, self.tape.here)
                closed = ClosedModule(name, frame.call)
                with self.generators.closed(f"the call of {name!r}"):
                    out = self.tape.close(closed, lambda: original(module, *args, **kwargs), args, kwargs)
        except Exception:
            self.failed = self.failed or name or "(the model itself)"
            raise
        finally:
            self.stack.pop()
        self._child_returned()
        if SplitPoint.END in points:
            self.cut(f"the end of {name!r}", CutPoint(name, SplitPoint.END, frame.call))
        return out

    def _locate(self) -> None:
        top = self.stack[-1]
        self.tape.where = Draw(top.name, top.call, top.segment)

    def _child_returned(self) -> None:
        """A module's stream of random numbers begins anew after each child it calls, so that it can be cut there."""
        if self.stack:
            self.stack[-1].segment += 1
            self._locate()

    def split(self) -> None:
        point = PipeSplit(self.splits_met)
        self.splits_met += 1
        if self.marks.splits is None or point.number in self.marks.splits:
            self.cut(f"pipe_split() at {user_line()}", point)
        self._child_returned()

    def cut(self, label: str, point: CutPoint | PipeSplit) -> None:
        if self.applied is not None:
            raise CutError(
                f"{label} lies inside the custom autograd.Function {self.applied}",
                why="its forward and backward are one operation, which no stage can hold half of",
                remedy="cut before or after the module that applies it",
            )
        if self.tape.silent:
            self.reopen.update(frame.name for frame in self.stack)
            return
        if functorch_active():
            raise CutError(
                f"{label} lies inside a call of torch.func or torch.vmap",
                where=self.tape.here,
                why="inside it a tensor stands for many, or for its derivatives too, and cannot be handed on",
                remedy=f"cut before or after that call, or {IN_A_BLOCK}",
            )
        self.tape.cuts.append(label)
        self.points.append(point)
        self.calls_before.append(dict(self.called))

    def compiled(self, frame: FrameType) -> None:
        around = self.stack[-1].name if self.stack else ""
        if not self.tape.silent:
            self.compiled_trunk = self.compiled_trunk or self.tape.here
        elif not self._in_compiled():
            self.compiled_modules.add(around)
            self._entered.append((frame, around))

    def _in_compiled(self) -> str | None:
        """The module that has called the compiled code which runs now."""
        if not self._entered:
            return None
        frame, running = sys._getframe(1), set[FrameType]()
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        while self._entered and self._entered[-1][0] not in running:
            self._entered.pop()
        return self._entered[0][1] if self._entered else None

    def drew(self) -> None:
        if not self.stack:
            return
        self.drawing.add(self._in_compiled() or self.stack[-1].name)
        self.tape.drew = True

    def apply(self, original: Callable[..., Any], function: type, args: tuple[Any, ...], kwargs: Any) -> Any:
        # One entry, since its inside has a backward of its own.
        if self.tape.silent or self.applied is not None:
            if function is CheckpointFunction and self.tape.meter and goes_back(args):
                args = self.tape.meter.as_in_backward(args[0]), *args[1:]
            return original(function, *args, **kwargs)
        if function is CheckpointFunction:
            return taped_reentrant(self.tape, *args)

        def call(*a: Any, **k: Any) -> Any:
            return original(function, *a, **k)

        call.__name__ = function.__name__
        call.applies = function  # type: ignore[attr-defined]
        self.applied = function.__name__
        try:
            return self.tape.record_unseen(call, lambda: call(*args, **kwargs), args, kwargs)
        finally:
            self.applied = None

    def checkpoint(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Iterator[None]:
        with self.tape.meter.checkpointed() if self.tape.meter else contextlib.nullcontext():
            yield from taped(self.tape, original, args, kwargs)

    def cache_cleared(self) -> None:
        self.tape.stretch += 1
        self.casts |= any(on for _, on, _ in Surroundings.now(self.tape.device_types).autocast)

    def thread(self) -> None:
        if not self.tape.silent:
            refuse_thread(self.tape.here)

    def function(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self.tape.silent or self.applied is not None:
            return original(*args, **kwargs)
        return self.tape.record_unseen(original, lambda: original(*args, **kwargs), args, kwargs)


class _Operations(TorchDispatchMode):
    """Notices what each operation costs, and those that draw random numbers."""

    def __init__(self, run: _Run, fakes: Fakes | None) -> None:
        super().__init__()
        self.run, self.fakes = run, fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.fakes is not None:
            args, kwargs = self.fakes.without_lost_values(args, kwargs or {})
        if _draws(func, args, kwargs or {}):
            self.run.drew()
        out = func(*args, **(kwargs or {}))
        born = _storages(out) - _storages((args, kwargs))
        self.run.tape.born |= born
        if torch.Tag.dynamic_output_shape in func.tags:
            self.run.tape.shaped_by_values = True
        if self.run.tape.meter:
            self.run.tape.meter.operation(func, args, kwargs or {}, out, born)
        return out


def _draws(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention, marked as if it did, does so with dropout only."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = arguments_of(func)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p"))


def _storages(tree: Any) -> set[int]:
    return {storage_of(leaf) for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)}


def ancestors(name: str) -> set[str]:
    """The FQNs of the modules around a module, the root's included.

    >>> sorted(ancestors("model.layers.3"))
    ['', 'model', 'model.layers']
    """
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))} if name else set()


def capture(
    module: nn.Module,
    inputs: Mapping[str, Any],
    call: Callable[[Any], Any],
    marks: Marks,
    opened: frozenset[str] = frozenset(),
    meter: Meter | None = None,
) -> Recording:
    """Run `call(inputs)`, which calls `module`, and give what its trunk did.

    `inputs` maps input names to trees. A first run finds the modules in which `pipe_split()` is met; they are opened,
    and the model runs again. With a `meter` each entry says what it cost. Neither the model nor the inputs nor the
    random state are changed.
    """
    opened = opened | {""} | {a for name in marks.at for a in ancestors(name)}
    while True:
        refuse_modules(module, opened)
        _refuse_backward_hooks(module, opened)
        recording, missed = _run(module, inputs, call, marks, opened, meter)
        if recording is not None:
            return recording
        opened |= missed


def _refuse_backward_hooks(module: nn.Module, opened: frozenset[str]) -> None:
    for name in opened:
        inner = module.get_submodule(name)
        if has_backward_hooks(inner):
            raise CutError(
                f"the module {name or '(the model itself)'!r} has backward hooks, and a cut lies inside it",
                why="its backward is spread over several stages, so there is no one moment to call them",
                remedy="register them on a submodule that stays whole, or hook the tensor in the forward",
            )


def _run(
    module: nn.Module,
    inputs: Mapping[str, Any],
    call: Callable[[Any], Any],
    marks: Marks,
    opened: frozenset[str],
    meter: Meter | None,
) -> tuple[Recording | None, frozenset[str]]:
    names = {id(m): name for name, m in module.named_modules()}
    fakes = fakes_for(module, inputs)
    with _lock, not_compiling(), unchanged(module), unfilled(inputs), contextlib.ExitStack() as stack:
        if fakes is not None:
            inputs = map_leaves(fakes.of, inputs)
            fakes.dress(module)
        copies: dict[int, Any] = {}
        inputs = map_leaves(lambda leaf: copies.setdefault(id(leaf), _own_copy(leaf)), inputs)
        kinds = _device_types(module)
        ambient = Surroundings.now(kinds)
        tape = Tape(_known(module, inputs), names, kinds, meter)
        run = _Run(names, opened, marks, tape)
        buffers = dict(module.named_buffers())
        before = {
            name: (version_of(b), b if isinstance(b, Valueless) else b.detach().clone()) for name, b in buffers.items()
        }
        attributes = {name: attributes_of(module.get_submodule(name)) for name in opened}
        stack.enter_context(intercepted(run, module))
        stack.enter_context(_Operations(run, fakes))
        if meter:
            stack.enter_context(meter.watching(module))
        stack.enter_context(tape)
        try:
            output = call(inputs)
        except PipeworkError:
            raise
        except Exception as error:
            raise _explained(error, run, fakes is not None) from error
        run.generators.refuse_draws("the end of the model")
        if run.reopen - opened:
            return None, frozenset(run.reopen)
        stack.close()
        after = dict(module.named_buffers())
        recording = Recording(
            entries=tuple(tape.entries),
            input_names=tuple(name for name, leaf in named(inputs) if isinstance(leaf, torch.Tensor)),
            output=tape.refs(output),
            values=tuple(tape.values),
            labels=tuple(tape.cuts),
            points=tuple(run.points),
            opened=opened,
            called=dict(run.called),
            calls={name: frozenset(called) for name, called in run.calls.items()},
            drawing=frozenset(run.drawing),
            calls_before=tuple(run.calls_before),
            written_buffers=frozenset(n for n, b in buffers.items() if _is_written(b, *before[n])),
            changed_attributes=changes(module, attributes),
            assigned_buffers={
                name: Ref(tape.number(b))
                for name, b in after.items()
                if b is not buffers.get(name) and name.rpartition(".")[0] in opened and tape.knows(b)
            },
            device=_home(module, inputs),
            on_example=fakes is None,
            ambient=ambient,
            casts=run.casts,
            compiled=frozenset(run.compiled_modules),
            compiled_trunk=run.compiled_trunk,
        )
    if fakes is not None:
        undress(recording.values, fakes)
    return recording, frozenset()


def _is_written(buffer: torch.Tensor, version: int, content: torch.Tensor) -> bool:
    return version_of(buffer) != version or not (content is buffer or torch.equal(buffer, content))


def _own_copy(leaf: Any) -> Any:
    """The model may write into its inputs: it gets copies."""
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Valueless):
        return leaf
    with torch.no_grad():
        twin = leaf.detach().clone(memory_format=torch.preserve_format)
    return twin.requires_grad_(leaf.requires_grad)


def _known(module: nn.Module, inputs: Mapping[str, Any]) -> dict[int, tuple[Origin, str]]:
    known = {id(b): (Origin.BUFFER, name) for name, b in module.named_buffers()}
    known |= {id(p): (Origin.PARAMETER, name) for name, p in module.named_parameters()}
    tensors = [leaf for leaf in leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    return known | {id(t): (Origin.INPUT, str(i)) for i, t in enumerate(tensors)}


def _home(module: nn.Module, inputs: Mapping[str, Any]) -> torch.device | None:
    tensors = [*module.parameters(), *module.buffers(), *leaves(dict(inputs))]
    devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
    return devices.pop() if len(devices) == 1 else None


def _device_types(module: nn.Module) -> tuple[str, ...]:
    found = {"cpu", "cuda"} | {p.device.type for p in module.parameters() if p.device.type != "meta"}
    return tuple(sorted(found))


def _explained(error: Exception, run: _Run, fake: bool) -> CaptureError:
    why = f"{type(error).__name__}: {error}"
    remedy = "call the model on the same arguments by itself: it must run before it can be cut"
    if fake:
        remedy = (
            "tensors on the meta device have no values: code that reads one back, or routes by one, needs real ones; "
            "move the model and the example to a real device, or put this code in a module that stays whole"
        )
    return CaptureError(
        "the model's forward did not run on the example inputs", where=f"in module {run.failed}", why=why, remedy=remedy
    )
