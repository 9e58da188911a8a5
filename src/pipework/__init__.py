"""Pipeline parallelism for PyTorch: `model → cut → stages`, `schedule → timeline`, `schedule + stages → step`.

Importing pipework costs milliseconds and does not import torch: each public name is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipework.errors import (
        CaptureError,
        CutError,
        InputError,
        MismatchError,
        PipeworkError,
        ScheduleError,
        TransportError,
    )
    from pipework.plan import (
        Action,
        Costs,
        Kind,
        Layout,
        Schedule,
        Timeline,
        check,
        lower,
        search,
        simulate,
    )
    from pipework.plan import families as schedules
    from pipework.run import Runner
    from pipework.split import (
        CutPoint,
        CutPoints,
        ModuleCosts,
        Pipe,
        PipeSplit,
        SplitPoint,
        module_costs,
        pipe_split,
        pipeline,
    )
    from pipework.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Action",
    "CaptureError",
    "Costs",
    "CutError",
    "CutPoint",
    "CutPoints",
    "InputError",
    "Kind",
    "Layout",
    "MismatchError",
    "ModuleCosts",
    "Pipe",
    "PipeSplit",
    "PipeworkError",
    "Runner",
    "Schedule",
    "ScheduleError",
    "SplitPoint",
    "Timeline",
    "TransportError",
    "__version__",
    "check",
    "lower",
    "module_costs",
    "pipe_split",
    "pipeline",
    "schedules",
    "search",
    "simulate",
    "verify",
]

# module -> the public names that live in it
_HOMES = {
    "pipework.errors": (
        "CaptureError",
        "CutError",
        "InputError",
        "MismatchError",
        "PipeworkError",
        "ScheduleError",
        "TransportError",
    ),
    "pipework.plan": (
        "Action",
        "Costs",
        "Kind",
        "Layout",
        "Schedule",
        "Timeline",
        "check",
        "lower",
        "search",
        "simulate",
    ),
    "pipework.run": ("Runner",),
    "pipework.split": (
        "CutPoint",
        "CutPoints",
        "ModuleCosts",
        "Pipe",
        "PipeSplit",
        "SplitPoint",
        "module_costs",
        "pipe_split",
        "pipeline",
    ),
    "pipework.verify": ("verify",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "schedules":
        value: object = import_module("pipework.plan.families")
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which `verify` is always the function.

    Python binds a submodule in its package once it is imported; without this, `pipework.verify` would turn from the
    function into the module `pipework/verify.py` as soon as anyone imports that.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME_OF.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
