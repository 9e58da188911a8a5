"""What a model's trunk does, written down call by call.

The model's own Python runs once under a `TorchFunctionMode`. Each torch call made in an open module becomes an entry,
and so does each call of a closed module, whose inside is left alone. Tensors are numbered in the order in which they
are first seen; a number stands for one Python tensor, whatever is later written into it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipework.errors import CaptureError
from pipework.split.cost import Cost, Meter
from pipework.split.filling import Filling, Holders
from pipework.split.refusals import (
    is_written,
    module_called,
    refuse_call,
    refuse_nested,
    refuse_parameter_write,
    unknown_maker,
)
from pipework.split.torch_private import base_of, storage_of, version_of, without_function_mode
from pipework.split.trees import ModuleRef, Ref, held, leaves, map_leaves


@dataclasses.dataclass(frozen=True, slots=True)
class ClosedModule:
    """The call of a module that stays whole, by its FQN; `call` counts its calls."""

    name: str
    call: int


class Origin(enum.Enum):
    """Where a value comes from that no entry makes."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    CONSTANT = "constant"


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What a value is worth once a stage has made it or written into it."""

    stage: int
    requires_grad: bool
    node: Any  # the autograd node that its gradient goes to
    base: Any  # that of the tensor of which it is a view, where its gradient goes once the view is written in place


@dataclasses.dataclass(slots=True)
class Value:
    """One numbered tensor: its layout, who made it, and with whom it shares memory."""

    index: int
    tensor: torch.Tensor
    storage: int
    origin: Origin | None = None
    name: str = ""  # FQN of a parameter or buffer, path of an input
    maker: int | None = None  # the entry that made it
    dynamic: bool = False  # its shape depends on values, so that who reads the shape needs a guard
    states: list[State] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """The ambient switches under which a call was made: gradients on, autocast as (device type, on, dtype)."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device_types: Iterable[str] = ("cpu", "cuda")) -> Surroundings:
        """Those of this moment."""
        autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in device_types)
        return cls(torch.is_grad_enabled(), autocast)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The same switches in another thread, which does not inherit them.

        Leaving `torch.autocast` empties the cache of casts, which is one for all threads, while others still use it.
        """
        on = [(device, dtype) for device, enabled, dtype in self.autocast if enabled]
        for device, dtype in on:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
            torch.autocast_increment_nesting()
        try:
            with torch.set_grad_enabled(self.grad):
                yield
        finally:
            for device, _ in on:
                torch.set_autocast_enabled(device, False)
                torch.autocast_decrement_nesting()


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """Which stream of random numbers a call draws from: the module's, its call, and how many children it had called."""

    module: str
    call: int
    segment: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One call of `torch.utils.checkpoint.checkpoint` in the trunk: what its function calls is computed again."""

    reentrant: bool
    settings: Mapping[str, Any]  # further keyword arguments of the call, where they are not the default
    surroundings: Surroundings  # under which its function is computed again
    returned: list[int] = dataclasses.field(default_factory=list)  # the values that its function gives back


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One call: `result = target(*args, **kwargs)`, with tensors as `Ref`."""

    stage: int
    target: Callable[..., Any] | ClosedModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    filled: Mapping[int | str, Filling]  # arguments into which the call put tensors, by position or name
    writes: frozenset[int]
    surroundings: Surroundings
    stretch: int  # equal for calls between which the cache of cast weights was not cleared
    checkpoints: tuple[Checkpoint, ...]  # those that it lies in, outermost first
    readback: bool  # the result is a Python value read out of a tensor: a guard
    draw: Draw | None
    modules: tuple[str, ...]  # passed to it, or called inside a custom autograd.Function
    source: str  # file:line of the model's own code
    cost: Cost  # all zero where nobody asked

    def reads(self) -> list[int]:
        """The values that the call is given."""
        return [leaf.index for leaf in leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Ref)]

    def makes(self) -> list[int]:
        """The values in its result, and those that it put into its arguments."""
        found = [leaf.index for leaf in leaves(self.result) if isinstance(leaf, Ref)]
        return found + [ref.index for filling in self.filled.values() for ref in filling.new.values()]

    def holds(self) -> tuple[str, ...]:
        """The closed modules that the call needs."""
        return (self.target.name, *self.modules) if isinstance(self.target, ClosedModule) else self.modules

    @property
    def title(self) -> str:
        """What is called, for people."""
        return self.target.name if isinstance(self.target, ClosedModule) else name_of(self.target)


READBACKS = frozenset({"__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"})
READBACKS |= {"item", "tolist", "numpy", "equal", "is_nonzero", "allclose"}
"""Calls that read a tensor's values into Python, on which the forward may branch."""

EFFECTS = frozenset({"__setitem__", "__set__", "register_hook", "retain_grad", "_assert_async", "backward"})
EFFECTS |= {"_vmap_increment_nesting", "_vmap_decrement_nesting"}
"""Calls that return no tensor and yet do something; any other such call states a fact (size, dtype, ...)."""

SHAPES = frozenset({"shape", "size", "__len__", "numel", "nelement"})
"""Facts that are guarded like values where they depend on values (after nonzero, ...)."""

_LIBRARIES = tuple(os.path.dirname(sys.modules[name].__file__ or "") + os.sep for name in ("torch", "pipework"))


def name_of(function: Callable[..., Any]) -> str:
    """The plain name of a torch function; of a property, the property's."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__"):
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name


def user_line() -> str:
    """file:line of the innermost frame that belongs neither to torch nor to pipework."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARIES) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Tape(TorchFunctionMode):
    """Records the calls made while it is active; closed calls are made through `close`."""

    def __init__(
        self,
        known: Mapping[int, tuple[Origin, str]],
        modules: Mapping[int, str],
        device_types: Iterable[str],
        meter: Meter | None = None,
    ) -> None:
        super().__init__()
        self.known, self.modules, self.meter = known, modules, meter
        self.device_types = tuple(device_types)
        self.entries: list[Entry] = []
        self.values: list[Value] = []
        self.cuts: list[str] = []  # what made each, in order
        self.silent = 0  # depth of closed modules: their calls are theirs
        self.where = Draw("", 0, 0)  # the stream of the open module whose forward is running
        self.drew = False
        self.shaped_by_values = False  # an operation ran whose result's shape depends on values (nonzero, ...)
        self.within: list[str] = []
        self.stretch = 0  # how often the cache of cast weights was cleared
        self.checkpoints: list[Checkpoint] = []  # those under way, outermost first
        self.born: set[int] = set()  # storages made during the run, by open and closed code alike
        self._numbers: dict[int, int] = {}
        self._sharing: dict[int, list[Value]] = {}

    @property
    def stage(self) -> int:
        """The stage that the calls belong to now."""
        return len(self.cuts)

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor that is used; one never seen before came from outside the tape."""
        index = self._numbers.get(id(tensor))
        if index is None:
            origin, name = self.known.get(id(tensor), (Origin.CONSTANT, ""))
            if origin is Origin.CONSTANT and storage_of(tensor) in self.born:
                raise unknown_maker(tensor, self.here)
            index = self._new(tensor, None)
            self.values[index].origin, self.values[index].name = origin, name
        return index

    @property
    def here(self) -> str:
        """The open module whose forward runs, and the user's line."""
        return f"{module_called(self.where.module)}, {user_line()}"

    def _refuse_carriers(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """No object may carry tensors past the stages that cannot be taken apart, since it holds itself."""
        for leaf in leaves((args, dict(kwargs))):
            if not isinstance(leaf, torch.Tensor) and any(storage_of(tensor) in self.born for tensor in held(leaf)):
                raise CaptureError(
                    f"the module {name!r} is given an object of type {type(leaf).__name__} that carries activations",
                    where=self.here,
                    why="what a stage takes in and hands on are tensors; this object holds itself, so it has no end",
                    remedy="pass its tensors, or let the object hold no reference to itself",
                )

    def _is_dynamic(self, tensor: torch.Tensor) -> bool:
        index = self._numbers.get(id(tensor))
        return index is not None and self.values[index].dynamic

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was seen before, or is one of the model's or the inputs."""
        return id(tensor) in self._numbers or id(tensor) in self.known

    def _new(self, tensor: torch.Tensor, maker: int | None) -> int:
        index = len(self.values)
        self._numbers[id(tensor)] = index  # `values` keeps the tensor alive, so its id stays its own
        value = Value(index, tensor, storage_of(tensor), maker=maker)
        self.values.append(value)
        self._sharing.setdefault(value.storage, []).append(value)
        self._note(value)
        return index

    def _note(self, value: Value) -> None:
        tensor = value.tensor
        value.states.append(State(self.stage, tensor.requires_grad, tensor.grad_fn, base_of(tensor).grad_fn))

    def _cost(self) -> Cost:
        """What ran since it was last asked."""
        return self.meter.read() if self.meter else Cost()

    def refs(self, tree: Any) -> Any:
        """The tree with every tensor as its `Ref`, and every module inside of the model as its `ModuleRef`."""

        def ref(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return Ref(self.number(leaf))
            name = self.modules.get(id(leaf)) if isinstance(leaf, nn.Module) else None
            return ModuleRef(name) if name else leaf

        return map_leaves(ref, tree)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.silent:
            return func(*args, **kwargs)
        return self.record(func, lambda: func(*args, **kwargs), args, kwargs)

    def close(
        self, target: ClosedModule, call: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a closed module: one entry, whatever happens inside."""

        def silently() -> Any:
            self._refuse_carriers(target.name, args, kwargs)
            with self.unseen():
                # A module that hands back what it was given (dropout in eval mode) gives a new value all the same,
                # since in another mode it may not.
                out = map_leaves(lambda x: x.view_as(x) if self._is_seen(x) else x, call())
            self._refuse_carriers(target.name, args, kwargs)
            return out

        return self.record_unseen(target, silently, args, kwargs)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside the block nothing is recorded."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def record_unseen(
        self, target: Any, call: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """`record` for a call that torch does not route through function modes by itself."""
        with without_function_mode(self):
            return self.record(target, call, args, kwargs)

    def _is_seen(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and self.knows(leaf)

    def _refuse(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = getattr(target, "__name__", "")
        refuse_call(name, args, kwargs, self.here)
        written = is_written(name, args, kwargs)
        if written is None:
            return
        index = self._numbers.get(id(written))
        sharing = [] if index is None else self._sharing[self.values[index].storage]
        owners = [self.known.get(id(written)), *((v.origin, v.name) for v in sharing)]
        for owner in owners:
            if owner is not None and owner[0] is Origin.PARAMETER and name_of(target) != "grad":
                refuse_parameter_write(owner[1], self.here)

    def record(self, target: Any, call: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make the call and write it down, unless it only stated a fact about a tensor."""
        given = {id(t): t for t in leaves((args, dict(kwargs))) if isinstance(t, torch.Tensor)}
        before = {key: version_of(t) for key, t in given.items()}
        surroundings = Surroundings.now(self.device_types)
        self.drew, self.shaped_by_values, self.within = False, False, []
        closed = isinstance(target, ClosedModule)
        if not closed:
            self._refuse(target, args, kwargs)
        holders = Holders(args, kwargs, self.number) if closed else None
        self._cost()
        out = call()
        plain = "" if closed else getattr(target, "__name__", "")
        made = [leaf for leaf in leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            refuse_nested(tensor, self.here)
        written = [t for key, t in given.items() if version_of(t) != before[key]]
        dynamic = self.shaped_by_values or any(self._is_dynamic(t) for t in given.values())
        readback = plain in READBACKS or (dynamic and not made and name_of(target) in SHAPES)
        if not (closed or made or written or readback or plain in EFFECTS) or plain == "_set_grad_enabled":
            return out
        reference = holders.reference(self.refs) if holders else self.refs((args, dict(kwargs)))
        given_modules = [leaf.name for leaf in leaves(reference) if isinstance(leaf, ModuleRef)]
        index = len(self.entries)
        writes = frozenset(self.number(t) for t in written)
        for storage in {self.values[write].storage for write in writes}:
            for value in self._sharing[storage]:  # a write through one view is seen through all
                self._note(value)
        for tensor in made:
            if id(tensor) not in self._numbers:
                self.values[self._new(tensor, index)].dynamic = dynamic
        draw = self.where if self.drew and not closed else None
        result = self.refs(out)
        filled = holders.filled(lambda t: None if self.knows(t) else self._new(t, index)) if holders else {}
        entry = Entry(
            stage=self.stage,
            target=target,
            args=reference[0],
            kwargs=reference[1],
            result=result,
            filled=filled,
            writes=writes,
            surroundings=surroundings,
            stretch=self.stretch,
            checkpoints=tuple(self.checkpoints),
            readback=readback,
            draw=draw,
            modules=tuple(dict.fromkeys([*self.within, *given_modules])),
            source=user_line(),
            cost=self._cost(),
        )
        self.entries.append(entry)
        return out
