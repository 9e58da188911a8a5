"""Models from the command line: `MODULE:FACTORY`, imported from the current directory or from anywhere Python looks."""

from __future__ import annotations

import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from pipework.errors import InputError, PipeworkError, nearest
from pipework.split import CutPoints, SplitPoint


@final
@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and a call of it: `model(*args, **kwargs)`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def subject(factory: str, example: str | None) -> Subject:
    """The model that `factory` makes, with the arguments it makes along or that `example` makes.

    Both are written `MODULE:FUNCTION` and called without arguments, with torch's random numbers seeded.
    """
    torch.manual_seed(0)
    made = called(factory)
    model, *call = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(call) > 2:
        raise InputError(
            f"{factory} gives {_described(made)}", remedy="let it give a model, (model, args) or (model, args, kwargs)"
        )
    if example is None:
        return Subject(model, *_arguments(factory, *call))
    made = called(example)
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict)
    return Subject(model, *_arguments(example, *(made if pair else (made,))))


def _arguments(source: str, args: Any = (), kwargs: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; a lone tensor or dict stands for a call with just that, or just those."""
    if isinstance(args, dict) and kwargs is None:
        args, kwargs = (), args
    args, kwargs = args if isinstance(args, tuple) else (args,), {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict):
        raise InputError(f"{source} gives {_described(kwargs)} as keyword arguments", remedy="give a dict")
    return args, kwargs


def called(path: str) -> Any:
    """What the function `MODULE:FUNCTION` returns."""
    found = function(path)
    with blamed(path):
        return found()


def function(path: str) -> Callable[..., Any]:
    """The function that `MODULE:FUNCTION` names."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise InputError(
            f"{path!r} does not name a function", remedy="write MODULE:FUNCTION, such as examples.gpt:build"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    _require_module(name)
    with blamed(f"importing {name}"):
        module = import_module(name)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [each for each, value in vars(module).items() if callable(value)]
        raise InputError(f"module {name} has no function {attribute!r}{nearest(attribute, known)}")
    return found


def _require_module(name: str) -> None:
    """Import the packages on the way to a module one by one, so that the first that is missing can be named."""
    *parents, _ = name.split(".")
    siblings: Iterable[pkgutil.ModuleInfo] = pkgutil.iter_modules([os.getcwd()])
    for depth, part in enumerate(name.split("."), start=1):
        path = ".".join(name.split(".")[:depth])
        if find_spec(path) is None:
            why = nearest(part, [each.name for each in siblings]).removeprefix("; ")
            raise InputError(
                f"there is no module {path}", why=why, remedy="name one that can be imported from the current directory"
            )
        if depth <= len(parents):
            with blamed(f"importing {path}"):
                package = import_module(path)
            siblings = pkgutil.iter_modules(getattr(package, "__path__", []))


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Says of an error in the user's code where it was; what that code prints goes to standard error."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except PipeworkError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")]
        where = f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
        raise InputError(f"{what} failed: {type(error).__name__}: {error}", where=where) from error


def split_spec(at: Iterable[str], cut: Path | None = None) -> dict[str, SplitPoint] | CutPoints | None:
    """Cuts from `--at`, or from the file given by `--cut`; None where there are neither."""
    spec = _named(at)
    if cut is None:
        return spec or None
    if spec:
        raise InputError("both --at and --cut were given", remedy="pass one of them")
    return CutPoints.load(cut)


def _named(at: Iterable[str]) -> dict[str, SplitPoint]:
    """Cuts at modules by name, with `:end` for a cut after one."""
    spec: dict[str, SplitPoint] = {}
    for text in at:
        name, colon, place = text.partition(":")
        if colon and place not in ("beginning", "end"):
            raise InputError(f"{text!r} does not say where to cut", remedy=f"write {name}:beginning or {name}:end")
        if name in spec:
            raise InputError(f"two cuts are at {name!r}", remedy="cut after it by naming the module that comes next")
        spec[name] = SplitPoint.END if place == "end" else SplitPoint.BEGINNING
    return spec


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(each).__name__ for each in value)})"
    return type(value).__name__
