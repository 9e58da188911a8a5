"""A small picture of a timeline as an SVG file, for a page of text: rows of bars, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipework.errors import InputError
from pipework.plan import Span, Timeline
from pipework.show.colours import KINDS

_ROW = 20  # pixels from the top of one row to the top of the next
_BAR = 18
_RANKS = 52  # left of the bars
_GLYPH = 6.4  # no digit is wider


def picture(timeline: Timeline, width: int = 860) -> str:
    """The timeline as the text of an SVG file, `width` pixels wide, with each bar's microbatch where there is room.

    Later stages of a rank are paler; two actions that ran at once lie one above the other. Raises InputError if there
    is nothing to draw.

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> text = picture(simulate(one_f_one_b(Layout.loop(4), microbatches=8)))
    >>> text[:4], text.count("<rect")
    ('<svg', 68)
    """
    if not timeline.makespan:
        raise InputError("the timeline is empty", remedy="draw it after a step, or simulate its schedule")
    ranks = timeline.schedule.layout.ranks
    rows = "\n".join("".join(_row(timeline, rank, (width - _RANKS) / timeline.makespan)) for rank in range(ranks))
    return _SVG.format(width=width, height=ranks * _ROW, rows=rows)


class _Box(NamedTuple):
    """Where a bar is, in pixels."""

    x: float
    y: float
    width: float
    height: float


def _row(timeline: Timeline, rank: int, scale: float) -> Iterator[str]:
    top = rank * _ROW
    yield f'<text x="0" y="{top + 13}">rank {rank}</text>'
    yield f'<rect class="idle" x="{_RANKS}" y="{top}" width="{timeline.makespan * scale:.2f}" height="{_BAR}"/>'
    held = timeline.schedule.layout.held_by(rank)
    for spans in timeline.at_once(rank):
        for place, span in enumerate(spans):
            height = _BAR / len(spans)
            left, right = ((time - timeline.start) * scale for time in (span.start, span.end))
            paleness = held.index(span.action.stage) / (2 * len(held))
            yield _bar(span, _Box(_RANKS + left, top + place * height, right - left, height), 1 - paleness)


def _bar(span: Span, box: _Box, opacity: float) -> str:
    """The bar and, if there is room, its microbatch."""
    colour, label = KINDS[span.action.kind][1], str(span.action.microbatch)
    bar = (
        f'<rect x="{box.x:.2f}" y="{box.y:g}" width="{max(0.3, box.width - 0.7):.2f}" height="{box.height:g}"'
        f' fill="{colour}" fill-opacity="{opacity:.2g}"/>'
    )
    if len(label) * _GLYPH > box.width or box.height < _BAR:
        return bar
    return f'{bar}<text class="bar" x="{box.x + box.width / 2:.2f}" y="{box.y + 13:g}">{label}</text>'


_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
text {{ font: 12px system-ui, sans-serif; fill: #7a8694; }}
.bar {{ font-size: 10.5px; fill: #14181d; text-anchor: middle; }}
.idle {{ fill: #7a8694; fill-opacity: 0.12; }}
</style>
{rows}
</svg>
"""
