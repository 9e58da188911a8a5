"""Pieces of terminal output."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from pipework.plan import Kind, Timeline

_STYLES = {
    Kind.FORWARD: "cyan",
    Kind.BACKWARD: "yellow",
    Kind.INPUT_GRADIENT: "magenta",
    Kind.WEIGHT_GRADIENT: "green",
}


def print_timeline(console: Console, timeline: Timeline) -> None:
    """Print the grid of a timeline, in colour where the console has any and as wide as its terminal."""
    for line in timeline.text(console.width if console.is_terminal else None).splitlines():
        text = Text(line)
        if line.startswith("rank"):
            for kind, style in _STYLES.items():
                text.highlight_regex(rf"\d*{kind.value}\d*-*", style)
        console.print(text, soft_wrap=True)


def percent(share: float) -> str:
    """A share from 0 to 1.

    >>> percent(0.125)
    '12.5 %'
    """
    return f"{100 * share:.1f} %"
