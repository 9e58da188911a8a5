"""Where a model is to be cut: names of modules, or a call inside a forward."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch.utils.hooks import RemovableHandle

_thread = threading.local()


class SplitPoint(enum.Enum):
    """Whether a stage begins before the named module, or after it.

    >>> SplitPoint.BEGINNING
    <SplitPoint.BEGINNING: 1>
    """

    BEGINNING = 1
    END = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """A cut before or after a module's call; `call` counts its calls, and None means each of them."""

    point: SplitPoint
    call: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Marks:
    """All cuts of a model: at modules, by FQN, and at the `pipe_split()`s of these numbers, or at all of them."""

    at: Mapping[str, Sequence[Mark]]
    splits: frozenset[int] | None = None


def pipe_split() -> None:
    """Mark the end of a stage, anywhere in any forward, also in a loop; does nothing when the model just runs.

    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         x = self.one(x)
    ...         pipework.pipe_split()
    ...         return self.two(x)
    >>> pipework.pipeline(Model(), (torch.ones(2, 4),)).num_stages
    2
    """
    listener = getattr(_thread, "listener", None)
    if listener is not None:
        listener()
        return
    for repeated in list(_repeated.values()):
        repeated()


_repeated: OrderedDict[int, Callable[[], None]] = OrderedDict()  # a plain dict cannot be referred to weakly


def on_repeated(call: Callable[[], None]) -> RemovableHandle:
    """Have a `pipe_split()` to which nobody listens call this too, in any thread: a checkpoint may have come to it."""
    handle = RemovableHandle(_repeated)
    _repeated[handle.id] = call
    return handle


def listen(listener: Callable[[], None] | None) -> Callable[[], None] | None:
    """Have `pipe_split()` in this thread call `listener`; gives the one before, to be put back."""
    before = getattr(_thread, "listener", None)
    _thread.listener = listener
    return before
