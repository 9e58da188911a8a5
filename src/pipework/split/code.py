"""A stage's share of the tape as Python source: what the model's own forward does between two cuts."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import keyword
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from pipework.split.blocks import Block, Step, blocks, steps
from pipework.split.capture import Recording
from pipework.split.cut import StagePart
from pipework.split.draws import drawn
from pipework.split.scope import SCOPE, Original, Template
from pipework.split.tape import Checkpoint, ClosedModule, Draw, Entry, Origin, Surroundings, name_of
from pipework.split.trees import ModuleRef, Ref, children, counts, held, is_object, leaves, named_leaves

_LITERALS = (type(None), bool, int, str, bytes, type(Ellipsis), torch.dtype, torch.layout, torch.memory_format)


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
        self.values = recording.values
        self.names: dict[int, str] = {}  # value -> the expression that reaches it
        self.taken = {*SCOPE, "self", "stream", "device", "found"}
        self.taken |= {*keyword.kwlist, *dir(builtins)}
        self.objects: dict[str, Any] = {}
        self.uses_device = False
        self.begun: set[Draw] = set()  # streams of random numbers
        self.local: set[int] = set()  # values that have a name in the function that is being written
        self.stays: set[int] = set()  # values that the functions being written give back
        self.last_use = self._last_uses()

    def write(self) -> tuple[str, dict[str, Any]]:
        part, recording = self.part, self.recording
        parameters = [self._name(index, recording.input_names[position]) for index, position in part.inputs]
        parameters += [self._name(index, self._title(index)) for index in part.received]
        for index, (origin, name) in part.owned.items():
            self.names[index] = path(self.constants[index] if origin is Origin.CONSTANT else name)
        body = [f"{self.names[i]} = {self.names[i]}.clone()" for i in sorted(part.copied)]
        body += self._steps(steps(part.entries), self.ambient)
        body += [f"self.assign({name!r}, {self.names[index]})" for name, index in part.assigned.items()]
        results = ", ".join(self.names[i] for i in part.outputs)
        body.append(f"return ({results},)" if results else "return tuple(found)" if self.collects else "return ()")
        if self.collects:
            body.insert(0, "found = []")
        if self.begun:
            self.uses_device = True
            body.insert(0, "stream = streams_on(device)")
        if self.uses_device:
            body.insert(0, f"device = {f'{parameters[0]}.device' if parameters else 'self.device_beside(None)'}")
        head = f"def forward({', '.join(['self', *parameters])}):"
        return "\n".join([head, *_indented(body, 1)]) + "\n", self.objects

    # ------------------------------------------------------------------ lines

    def _steps(self, steps: Sequence[Step], ambient: Surroundings) -> list[str]:
        lines: list[str] = []
        around: tuple[Block, ...] = ()  # the blocks that are open, outermost first
        for step, region in zip(steps, blocks(steps, ambient), strict=True):
            kept = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(around, region, strict=False))
            )
            lines += ["    " * depth + f"with {region[depth][0]}:" for depth in range(kept, len(region))]
            around = region
            if step.checkpoint is None:
                entry = self.part.entries[step.numbers.start]
                statements = [*self._begun_stream(entry), *self._statement(entry)]
            else:
                statements = self._again(step, step.checkpoint)
            lines += _indented([*statements, *self._forget(step)], len(region))
        return lines

    def _begun_stream(self, entry: Entry) -> list[str]:
        """A stream of random numbers begins with the first call that draws from it."""
        if entry.draw is None or entry.draw in self.begun:
            return []
        self.begun.add(entry.draw)
        return [f"stream({entry.draw.module!r}, {entry.draw.call}, {entry.draw.segment})"]

    def _again(self, step: Step, mark: Checkpoint) -> list[str]:
        """A checkpoint: its calls as a function that is given all it reads, and called by torch's `checkpoint`."""
        entries = [self.part.entries[number] for number in step.numbers]
        made = {i for entry in entries for i in entry.makes() if i not in self.names}
        read = dict.fromkeys(i for entry in entries for i in (*entry.reads(), *entry.makes()) if i not in made)
        outside = {i: self.names[i] for i in read if not self.names[i].isidentifier()}  # reached from `self`
        given = [i for i in read if i not in outside]
        names = ", ".join(self.names[i] for i in given)
        back = [i for i in mark.returned if i in made] if mark.reentrant else []
        back += [i for i in sorted(made) if i not in back and self.last_use.get(i, -1) >= step.numbers.stop]
        self.used |= set(back)
        local, self.local = self.local, set(given)
        self.stays |= set(back)
        body = self._steps(step.inner, mark.surroundings)
        self.stays -= set(back)
        self.names |= outside
        self.local = local | set(back)
        function = self._fresh("again")
        results = "".join(f"{self.names[i]}, " for i in back)
        # What no gradient reaches a reentrant checkpoint would not go back through.
        reentrant = mark.reentrant and any(self.values[i].tensor.requires_grad for i in given)
        settings = {"use_reentrant": reentrant, **mark.settings}
        call = f"checkpoint({', '.join(filter(None, (function, names, self._arguments([], settings))))})"
        return [
            f"def {function}({names}):",
            *_indented([*body, f"return ({results.rstrip()})" if back else "return ()"], 1),
            f"{results.rstrip()} = {call}" if back else call,
            f"del {function}",
        ]

    def _statement(self, entry: Entry) -> list[str]:
        if entry.filled:
            return self._filling(entry)
        call = self._call(entry)
        if entry.readback and self.collects:
            return [f"found.append({call})"]
        if entry.readback:
            told = [self._expression(entry.result), repr(entry.title), repr(self._source(entry))]
            told += ["by_chance=True"] if drawn(entry, self.recording.entries, self.recording.values) else []
            return [f"expect({call}, {', '.join(told)})"]
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

    def _filling(self, entry: Entry) -> list[str]:
        """A call that puts tensors into its arguments: made before it, looked into after it."""
        names = {key: self._fresh("filled") for key in entry.filled}
        given: dict[int | str, Any] = {**dict(enumerate(entry.args)), **entry.kwargs}
        lines = [f"{name} = {self._remade(given[key])}" for key, name in names.items()]
        args = tuple(_Local(names[i]) if i in names else arg for i, arg in enumerate(entry.args))
        kwargs = {key: _Local(names[key]) if key in names else arg for key, arg in entry.kwargs.items()}
        lines += self._statement(dataclasses.replace(entry, args=args, kwargs=kwargs, filled={}))
        found = self._fresh("found")
        for key, filling in entry.filled.items():
            what = f"{names[key]}, {filling.count}, {entry.title!r}, {self._source(entry)!r}"
            lines.append(f"{found} = taken_from({what})")
            lines += [
                f"{self._target(ref)} = {found}[{place}]" for place, ref in filling.new.items() if self._is_used(ref)
            ]
        return [*lines, f"del {', '.join([found, *names.values()])}"]

    def _unpacking(self, entry: Entry, call: str, found: list[tuple[str, Any]]) -> list[str]:
        out, source = self._fresh("out"), self._source(entry)
        lines, lengths = [f"{out} = {call}"], list(counts(entry.result, out))
        if any("<" in accessor for accessor, _ in found):  # a pytree without keys
            lines.append(f"{out} = leaves({out})")
            found = [(f"[{i}]", leaf) for i, (_, leaf) in enumerate(found)]
            lengths = [(out, len(found))]
        what = f"the number of values in what {entry.title} returns"
        lines += [f"expect(len({reached}), {length}, {what!r}, {source!r})" for reached, length in lengths]
        for accessor, leaf in found:
            if isinstance(leaf, Ref):
                if self._is_used(leaf):
                    lines.append(f"{self._target(leaf)} = {out}{accessor}")
            elif isinstance(leaf, (type(None), bool, int, float, str)):
                what = f"what {entry.title} returns"
                lines.append(f"expect({out}{accessor}, {self._expression(leaf)}, {what!r}, {source!r})")
        return [*lines, f"del {out}"]

    def _forget(self, step: Step) -> list[str]:
        """Values that nothing uses after this step, where they have names in the same function."""
        if step.numbers[-1] == len(self.part.entries) - 1:
            return []
        last = {i for n in step.numbers for e in [self.part.entries[n]] for i in (*e.reads(), *e.makes())}
        over = [i for i in sorted(last & self.local - self.stays) if self.last_use[i] in step.numbers]
        gone = [name for name in (self.names[i] for i in over) if name.isidentifier()]
        return [f"del {', '.join(gone)}"] if gone else []

    def _last_uses(self) -> dict[int, int]:
        last: dict[int, int] = {}
        for number, entry in enumerate(self.part.entries):
            for index in (*entry.reads(), *entry.makes()):
                last[index] = number
        kept = {*self.part.outputs, *self.part.assigned.values()}
        self.used = kept | {i for e in self.part.entries for i in e.reads()}
        return last | dict.fromkeys(kept, len(self.part.entries))

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
        if isinstance(tree, ModuleRef):
            return path(tree.name)
        if isinstance(tree, _Local):
            return tree.name
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
        if is_object(tree):
            return self._remade(tree)
        make = self._object(Template(tree), f"make_{type(tree).__name__}")
        return f"{make}({', '.join(self._expression(leaf) for leaf in found)})"

    def _remade(self, tree: Any) -> str:
        """A container or object that the call may write into."""
        make = self._object(Original(tree), f"new_{type(tree).__name__}")
        return f"{make}({', '.join(self._expression(ref) for ref in held(tree))})"

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
        self.local.add(index)
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


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


class _Local:
    """A local variable of the generated code in place of an argument."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


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
