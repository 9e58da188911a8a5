"""A stage's share of the tape as Python source: what the model's own forward does between two cuts."""

from __future__ import annotations

import builtins
import itertools
import keyword
import linecache
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from pipework.errors import MismatchError
from pipework.split.capture import Recording
from pipework.split.cut import StagePart
from pipework.split.draws import stream
from pipework.split.tape import ClosedModule, Draw, Entry, Origin, Ref, Surroundings, name_of
from pipework.split.trees import children, fill, leaves, named_leaves

_LITERALS = (type(None), bool, int, str, bytes, type(Ellipsis), torch.dtype, torch.layout, torch.memory_format)
_files = itertools.count()


def equal(found: Any, value: Any) -> bool:
    """Whether two values read back are the same; arrays are by their elements, and NaN is as good as NaN."""
    if isinstance(found, float) and isinstance(value, float) and math.isnan(found):
        return math.isnan(value)
    same: Any = found == value
    return bool(same.all() if hasattr(same, "all") else same)


def expect(found: Any, value: Any, what: str, source: str) -> None:
    """A Python value on which the captured forward depends must be what it was."""
    if not equal(found, value):
        raise MismatchError(
            f"the model took another path: {what} is {found!r}, and was {value!r} on the example",
            where=source,
            why="the forward reads this value back into Python, so the stages hold for this value only",
            remedy="capture on an example that takes this path, or put the branching code in a module that stays whole",
        )


def compiled(source: str, names: Mapping[str, Any], stage: int) -> Callable[..., tuple[Any, ...]]:
    """The function `forward` that the source defines; its lines show in tracebacks."""
    file = f"<pipework stage {stage}, capture {next(_files)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"torch": torch, "F": functional, "expect": expect, "stream": stream, "leaves": leaves, **names}
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]


def written(
    part: StagePart, recording: Recording, ambient: Surroundings, constants: Mapping[int, str]
) -> tuple[str, dict[str, Any]]:
    """The source of one stage's `forward(self, *inputs, *received)`, and the objects that it names.

    `constants` are the names under which the stage holds its constants, by value.
    """
    return _Writer(part, recording, ambient, constants).write()


def guard_source(
    part: StagePart, recording: Recording, ambient: Surroundings, constants: Mapping[int, str]
) -> tuple[str, dict[str, Any]]:
    """As `written`, for a function that gives the values it reads back, instead of checking them."""
    return _Writer(part, recording, ambient, constants, collects=True).write()


class _Writer:
    def __init__(
        self,
        part: StagePart,
        recording: Recording,
        ambient: Surroundings,
        constants: Mapping[int, str],
        collects: bool = False,
    ) -> None:
        self.collects = collects
        self.part, self.recording, self.ambient, self.constants = part, recording, ambient, constants
        self.names: dict[int, str] = {}  # value -> the expression that reaches it
        self.taken = {"self", "torch", "F", "expect", "stream", "leaves", "device", "found"}
        self.taken |= {*keyword.kwlist, *dir(builtins)}
        self.objects: dict[str, Any] = {}
        self.uses_device = False
        self.last_use = self._last_uses()

    def write(self) -> tuple[str, dict[str, Any]]:
        part, recording = self.part, self.recording
        parameters = [self._name(index, recording.input_names[position]) for index, position in part.inputs]
        parameters += [self._name(index, self._title(index)) for index in part.received]
        for index, (origin, name) in part.owned.items():
            self.names[index] = path(self.constants[index] if origin is Origin.CONSTANT else name)
        body = [f"{self.names[i]} = {self.names[i]}.clone()" for i in sorted(part.copied)]
        body += self._entries()
        body += [f"self.assign({name!r}, {self.names[index]})" for name, index in part.assigned.items()]
        results = ", ".join(self.names[i] for i in part.outputs)
        body.append(f"return ({results},)" if results else "return tuple(found)" if self.collects else "return ()")
        if self.collects:
            body.insert(0, "found = []")
        if self.uses_device:
            body.insert(0, f"device = {f'{parameters[0]}.device' if parameters else 'self.device_beside(None)'}")
        head = f"def forward({', '.join(['self', *parameters])}):"
        return "\n".join([head, *("    " + line for line in body)]) + "\n", self.objects

    # ------------------------------------------------------------------ lines

    def _entries(self) -> list[str]:
        lines: list[str] = []
        around: tuple[str, ...] = ()  # the blocks that are open, outermost first
        for number, (entry, region) in enumerate(zip(self.part.entries, self._regions(), strict=True)):
            kept = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(around, region, strict=False))
            )
            lines += ["    " * depth + f"with {region[depth]}:" for depth in range(kept, len(region))]
            around = region
            statements = [*self._statement(entry), *self._forget(number)]
            lines += ["    " * len(region) + statement for statement in statements]
        return lines

    def _regions(self) -> list[tuple[str, ...]]:
        """What each entry runs under: no_grad, autocast, a stream of random numbers."""
        draws: list[Draw | None] = [e.draw for e in self.part.entries]
        spans: dict[Draw, list[int]] = {}
        for number, draw in enumerate(draws):
            if draw is not None:
                spans.setdefault(draw, []).append(number)
        for draw, numbers in spans.items():  # what lies between two draws of one stream does not leave it
            draws[numbers[0] : numbers[-1] + 1] = [draw] * (numbers[-1] + 1 - numbers[0])
        return [self._region(e.surroundings, d) for e, d in zip(self.part.entries, draws, strict=True)]

    def _region(self, here: Surroundings, draw: Draw | None) -> tuple[str, ...]:
        found: list[str] = []
        if draw is not None:  # outermost, since what opens a stream anew begins it anew
            self.uses_device = True
            found.append(f"stream({draw.module!r}, {draw.call}, {draw.segment}, device)")
        for now, before in zip(here.autocast, self.ambient.autocast, strict=True):
            if now != before:
                kind, enabled, dtype = now
                found.append(f"torch.autocast({kind!r}, {dtype}, {enabled})")
        if here.grad != self.ambient.grad:
            found.append("torch.enable_grad()" if here.grad else "torch.no_grad()")
        return tuple(found)

    def _statement(self, entry: Entry) -> list[str]:
        call = self._call(entry)
        if entry.readback and self.collects:
            return [f"found.append({call})"]
        if entry.readback:
            return [f"expect({call}, {self._expression(entry.result)}, {entry.title!r}, {self._source(entry)!r})"]
        if "=" in call and name_of_assignment(entry):
            return [call]
        if isinstance(entry.result, Ref):
            return [f"{self._target(entry.result)} = {call}"]
        found = list(named_leaves(entry.result))
        if not any(isinstance(leaf, Ref) for _, leaf in found):
            return [call]
        flat = type(entry.result) in (tuple, list) and all(isinstance(leaf, Ref) for leaf in entry.result)
        if flat:
            targets = [self._target(r) if self._is_used(r) else "_" for r in entry.result]
            return [f"{', '.join(targets)}{',' if len(targets) == 1 else ''} = {call}"]
        return self._unpacking(entry, call, found)

    def _unpacking(self, entry: Entry, call: str, found: list[tuple[str, Any]]) -> list[str]:
        out = self._fresh("out")
        lines = [f"{out} = {call}"]
        if any("<" in accessor for accessor, _ in found):  # a pytree without keys
            lines.append(f"{out} = leaves({out})")
            found = [(f"[{i}]", leaf) for i, (_, leaf) in enumerate(found)]
        for accessor, leaf in found:
            if isinstance(leaf, Ref):
                if self._is_used(leaf):
                    lines.append(f"{self._target(leaf)} = {out}{accessor}")
            elif isinstance(leaf, (type(None), bool, int, float, str)):
                what = f"what {entry.title} returns"
                value = self._expression(leaf)
                lines.append(f"expect({out}{accessor}, {value}, {what!r}, {self._source(entry)!r})")
        return [*lines, f"del {out}"]

    def _forget(self, number: int) -> list[str]:
        gone = [self.names[i] for i in self.last_use.get(number, ()) if i in self.names]
        gone = [name for name in dict.fromkeys(gone) if name.isidentifier()]
        return [f"del {', '.join(gone)}"] if gone else []

    def _last_uses(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for number, entry in enumerate(self.part.entries):
            for index in (*entry.reads(), *entry.makes()):
                last[index] = number
        kept = {*self.part.outputs, *self.part.assigned.values()}
        self.used = kept | {i for e in self.part.entries for i in e.reads()}
        gone: dict[int, list[int]] = {}
        for index, number in last.items():
            if index not in kept and index in self.used and number < len(self.part.entries) - 1:
                gone.setdefault(number, []).append(index)
        return gone

    def _is_used(self, ref: Ref) -> bool:
        return ref.index in self.used

    # ------------------------------------------------------------------ expressions

    def _call(self, entry: Entry) -> str:
        target, args = entry.target, list(entry.args)
        if isinstance(target, ClosedModule):
            return f"{path(target.name)}({self._arguments(args, entry.kwargs)})"
        name = name_of(target)
        on_tensor = bool(args) and isinstance(args[0], Ref) and name.isidentifier()
        if on_tensor and self._is_property(target, name):
            first = self._expression(args[0])
            return (
                f"{first}.{name}"
                if len(args) < 3 and target.__name__ == "__get__"
                else (f"{first}.{name} = {self._expression(args[1])}")
            )
        if on_tensor and getattr(torch.Tensor, name, None) is target:
            first = self._expression(args[0])
            if name == "__getitem__":
                return f"{first}[{self._expression(args[1])}]"
            if name == "__setitem__":
                return f"{first}[{self._expression(args[1])}] = {self._expression(args[2])}"
            return f"{first}.{name}({self._arguments(args[1:], entry.kwargs)})"
        return f"{self._function(target, name)}({self._arguments(args, entry.kwargs)})"

    @staticmethod
    def _is_property(target: Any, name: str) -> bool:
        descriptor = getattr(target, "__self__", None)
        return getattr(target, "__name__", "") in ("__get__", "__set__") and (
            descriptor is not None and torch.Tensor.__dict__.get(name, getattr(torch.Tensor, name, None)) is descriptor
        )

    def _function(self, target: Any, name: str) -> str:
        applies = getattr(target, "applies", None)  # a custom autograd.Function
        if applies is not None:
            return f"{self._object(applies, applies.__name__)}.apply"
        if getattr(torch, name, None) == target:
            return f"torch.{name}"
        if getattr(functional, name, None) is target:
            return f"F.{name}"
        return self._object(target, name)

    def _arguments(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        named = [f"{k}={self._expression(v)}" for k, v in kwargs.items()]
        return ", ".join([*(self._expression(a) for a in args), *named])

    def _expression(self, tree: Any) -> str:
        if isinstance(tree, Ref):
            return self.names[tree.index]
        if isinstance(tree, torch.device):
            return self._device(tree)
        if isinstance(tree, torch.nn.Module):
            return self._object(tree, "module")
        kind = type(tree)
        if kind in _LITERALS or (kind is float and math.isfinite(tree)):
            return repr(tree)
        if kind is tuple:
            inner = ", ".join(self._expression(x) for x in tree)
            return f"({inner},)" if len(tree) == 1 else f"({inner})"
        if kind is list:
            return f"[{', '.join(self._expression(x) for x in tree)}]"
        if kind is dict:
            return "{" + ", ".join(f"{self._expression(k)}: {self._expression(v)}" for k, v in tree.items()) + "}"
        if kind is slice:
            return f"slice({', '.join(self._expression(x) for x in (tree.start, tree.stop, tree.step))})"
        if kind is torch.Size:
            return repr(tuple(tree))
        return self._built(tree)

    def _built(self, tree: Any) -> str:
        """A container of another type, put together by a function; anything else by name."""
        found = leaves(tree)
        if children(tree) is None or not any(isinstance(leaf, Ref) for leaf in found):
            return self._object(tree, type(tree).__name__)
        make = self._object(_Template(tree), f"make_{type(tree).__name__}")
        return f"{make}({', '.join(self._expression(leaf) for leaf in found)})"

    def _device(self, device: torch.device) -> str:
        """The model's own device becomes the stage's, so that a stage may move."""
        if device == self.recording.device:
            self.uses_device = True
            return "device"
        return f"torch.device({str(device)!r})"

    # ------------------------------------------------------------------ names

    def _target(self, ref: Ref) -> str:
        """The local name that an assignment to a value binds."""
        name = self.names.get(ref.index, "")
        return name if name.isidentifier() else self._name(ref.index, self._title(ref.index))

    def _title(self, index: int) -> str:
        value = self.recording.values[index]
        if value.origin is not None:
            return value.name or "constant"
        assert value.maker is not None
        title = self.recording.entries[value.maker].title
        parts = [p for p in title.split(".") if p]
        return "_".join(parts[-2:]) if parts and parts[-1].isdigit() else (parts or ["value"])[-1]

    def _name(self, index: int, wish: str) -> str:
        self.names[index] = self._fresh(wish)
        return self.names[index]

    def _fresh(self, wish: str) -> str:
        plain = re.sub(r"\W+", "_", wish).strip("_") or "value"
        plain = plain if not plain[0].isdigit() else f"v{plain}"
        for number in itertools.count():
            name = f"{plain}_{number}" if number else plain
            if name not in self.taken:
                self.taken.add(name)
                return name
        raise AssertionError("unreachable")

    def _object(self, thing: Any, wish: str) -> str:
        for name, known in self.objects.items():
            if known is thing:
                return name
        name = self._fresh(wish)
        self.objects[name] = thing
        return name

    @staticmethod
    def _source(entry: Entry) -> str:
        return entry.source


class _Template:
    """Makes a container like the captured one around other tensors."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __call__(self, *new: Any) -> Any:
        return fill(self.tree, new)


def name_of_assignment(entry: Entry) -> bool:
    """Whether the call is written as an assignment (`x[i] = y`, `x.data = y`)."""
    return getattr(entry.target, "__name__", "") in ("__setitem__", "__set__")


def path(name: str) -> str:
    """The expression that reaches an FQN from `self`.

    >>> path("model.layers.3.weight")
    "getattr(self.model.layers, '3').weight"
    """
    expression = "self"
    for part in name.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        expression = f"{expression}.{part}" if plain else f"getattr({expression}, {part!r})"
    return expression
