"""The global generators of Python and numpy, which torch knows nothing of."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any, final

from pipework.errors import CaptureError


def states() -> tuple[Any, ...]:
    """What the generators will draw next; equal if nobody drew in between."""
    numpy = sys.modules.get("numpy")  # who has not loaded it does not draw from it
    told = numpy.random.get_state() if numpy else ()
    return random.getstate(), *(part.tobytes() if hasattr(part, "tobytes") else part for part in told)


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Put the generators back where they were."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@final
class Watch:
    """Notices draws in the trunk: what they gave would be a constant of the stages from then on."""

    def __init__(self) -> None:
        self._states = states()

    def refuse_draws(self, where: str) -> None:
        """Raise `CaptureError` where the trunk drew."""
        if states() != self._states:
            raise CaptureError(
                "the trunk draws from the global generator of Python or numpy",
                where=f"before {where}",
                why="the stages would use the numbers of this one run again and again",
                remedy="draw with torch's functions, or put the code that draws in a module that stays whole",
            )

    @contextlib.contextmanager
    def closed(self, where: str) -> Iterator[None]:
        """A closed module draws as it likes."""
        self.refuse_draws(where)
        yield
        self._states = states()
