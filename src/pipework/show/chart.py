"""One timeline as an SVG with its ticks, ranks and figures around it.

There is one row per rank, in which two actions that ran at once lie one above the other, each half as high; and under
the row a curve of the activations that the rank keeps alive:

    rank 0   | 0F0 | 0F1 | 0F2 |           |    0B0    | ...
    peak 3   _______-----===============================-----

The SVG counts in whole tenths of a pixel, so bars that touch in time touch exactly, and none overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import median_low
from typing import final

from pipework.plan import Span, Timeline, needs
from pipework.plan.figures import Unit, memory_text, peaks_text

# Pixels.
WINDOW = 1200  # what a usual window shows at once
_AXIS = 20  # above and below the rows
_GAP = 2  # between a row and its memory curve
_MEMORY = 12  # the height of the curve
_BELOW = 8  # between a curve and the next row
_GLYPH = 7.3  # no digit and no letter of a label is wider
_MARGIN = 3  # left and right of a label
_TICK = 80  # the least distance of two ticks


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """A timeline drawn from its `start` in `width` pixels, which it need not fill.

    `scale` is in pixels per second (per count). Memory curves reach their full height at `memory`, in the unit of
    the timeline's `costs.activation`.
    """

    name: str
    timeline: Timeline
    start: float
    unit: Unit
    scale: float
    width: float
    memory: float

    def section(self) -> str:
        """The chart with everything around it, as one HTML element."""
        name, schedule = escape(self.name), self.timeline.schedule
        ranks = range(schedule.layout.ranks)
        height = 2 * _AXIS + len(ranks) * self._pitch - _BELOW
        return _SECTION.format(
            name=name,
            schedule=escape(schedule.describe()),
            figures=self._figures(),
            unit=self.unit.symbol,
            per_second=f"{self.unit.per_second:g}",
            row=self._bar,
            pitch=self._pitch,
            ranks="".join(self._rank(rank) for rank in ranks),
            width=f"{self.width:.1f}",
            height=height,
            ticks=self._ticks("full", self.scale) + self._ticks("fit", self.scale * min(1, WINDOW / self.width)),
            label=escape(f"{self.name}: {schedule.describe()}, {self._summary()}"),
            view=f"0 0 {round(self.width * 10)} {height * 10}",
            rows="\n".join(self._row(rank) for rank in ranks),
            backdrop="\n".join(self._backdrop(rank) for rank in ranks),
            links="".join(self._links()),
            outlines="".join(self._outlines()),
        )

    @property
    def _bar(self) -> int:
        """The height of a row."""
        return 24 if self.timeline.schedule.layout.ranks <= 8 else 18

    @property
    def _pitch(self) -> int:
        """From the top of one row to the top of the next."""
        return self._bar + _GAP + _MEMORY + _BELOW

    def _x(self, time: float) -> int:
        return round((time - self.start) * self.scale * 10)

    def _top(self, rank: int) -> int:
        return 10 * (_AXIS + rank * self._pitch)

    def _summary(self) -> str:
        return f"makespan {self.unit.text(self.timeline.makespan)}, bubble {_percent(self.timeline.bubble)}"

    def _figures(self) -> str:
        timeline = self.timeline
        figures = {
            "makespan": self.unit.text(timeline.makespan),
            "bubble": _percent(timeline.bubble),
            "span": self.unit.text(timeline.span),
            "bubble in span": _percent(timeline.bubble_of_span),
            "peak per rank": peaks_text(timeline.peaks, ", "),
        }
        return "".join(f"<div><dt>{name}</dt><dd>{figure}</dd></div>" for name, figure in figures.items())

    def _rank(self, rank: int) -> str:
        return f"<div>rank {rank}<small>peak {memory_text(self.timeline.peak(rank))}</small></div>"

    def _ticks(self, name: str, scale: float) -> str:
        """Ticks at round times, as far apart as `scale` asks for; positions in percent hold at any width."""
        step = _round_up(_TICK / scale * self.unit.per_second)
        count = math.floor(self.timeline.makespan * self.unit.per_second / step * (1 + 1e-9))
        percent = 100 * step / self.unit.per_second * self.scale / self.width
        ticks = (
            f'<i style="left:{index * percent:.4f}%" data-tick="{_tick(index * step, step)}{self.unit.suffix}"></i>'
            for index in range(count + 1)
        )
        return f'<div class="ticks {name}">{"".join(ticks)}</div>'

    def _backdrop(self, rank: int) -> str:
        """What lies under the bars: the whole row as if idle, and the memory curve."""
        end = self._x(self.start + self.timeline.makespan)
        return (
            f'<g transform="translate(0 {self._top(rank)})">'
            f'<rect class="idle" width="{end}" height="{self._bar * 10}"/>'
            f'<path class="alive" d="{self._alive(rank, end)}"/></g>'
        )

    def _row(self, rank: int) -> str:
        at_once = list(self.timeline.at_once(rank))
        bars = (self._rectangle(span, *self._lane(spans, span)) for spans in at_once for span in spans)
        labels = (self._label(span, *self._lane(spans, span)) for spans in at_once for span in spans)
        return (
            f'<g data-rank="{rank}" transform="translate(0 {self._top(rank)})">{"".join(bars)}'
            f'<g class="labels" transform="translate(0 {self._bar * 5 + 40})">{"".join(labels)}</g></g>'
        )

    def _lane(self, spans: tuple[Span, ...], span: Span) -> tuple[int, int]:
        """Where in its row a span begins from above, and how high it is, in tenths of a pixel."""
        height = self._bar * 10 // len(spans)
        return spans.index(span) * height, height

    def _rectangle(self, span: Span, y: int, height: int) -> str:
        schedule, action = self.timeline.schedule, span.action
        shade = schedule.layout.held_by(span.rank).index(action.stage)
        x = self._x(span.start)
        needed = " ".join(map(str, needs(action, schedule)))
        return (
            f'<rect class="{action.kind.value} s{shade}" x="{x}"{_y(y)} width="{self._x(span.end) - x}"'
            f' height="{height}" data-action="{action}"'
            f' data-time="{span.start - self.start:.9g} {span.end - self.start:.9g}" data-needs="{needed}"/>'
        )

    def _label(self, span: Span, y: int, height: int) -> str:
        """The microbatch in a bar that has room for it; the whole action where a rank holds several stages."""
        x, end = self._x(span.start), self._x(span.end)
        several = len(self.timeline.schedule.layout.held_by(span.rank)) > 1
        for label in (*([str(span.action)] if several else []), str(span.action.microbatch)):
            if label_width(label) * 10 <= end - x:
                return f'<text x="{(x + end) // 2}"{_y(y + height // 2 - self._bar * 5)}>{label}</text>'
        return ""

    def _alive(self, rank: int, end: int) -> str:
        """A step curve of the activations alive, growing upwards from its base line."""
        base = 10 * (self._bar + _GAP + _MEMORY)
        path = f"M0 {base}"
        for time, alive in self.timeline.memory(rank):
            path += f"H{self._x(time)}V{base - round(10 * _MEMORY * alive / self.memory)}"
        return f"{path}H{end}V{base}Z"

    def _outlines(self) -> Iterator[str]:
        """A box around every span on the critical path."""
        for span in self.timeline.critical_path():
            x, end, top = self._x(span.start), self._x(span.end), self._top(span.rank)
            yield f"M{x + 8} {top + 8}H{end - 8}V{top + self._bar * 10 - 8}H{x + 8}Z"

    def _links(self) -> Iterator[str]:
        """A line for every step of the critical path from one rank to another."""
        path = self.timeline.critical_path()
        for one, other in pairwise(path):
            if one.rank != other.rank:
                top, end = self._top(one.rank) + self._bar * 5, self._top(other.rank) + self._bar * 5
                yield f"M{self._x(one.end)} {top}L{self._x(other.start)} {end}"


def roomy_scale(timeline: Timeline) -> float:
    """Pixels per second (per count) at which a typical action has room for its label."""
    durations = [span.end - span.start for span in timeline.spans if span.end > span.start]
    layout = timeline.schedule.layout
    several = layout.stages > layout.ranks
    longest = max((str(span.action) if several else str(span.action.microbatch) for span in timeline.spans), key=len)
    return label_width(longest) / median_low(durations)


def label_width(label: str) -> float:
    """The pixels a bar must have to carry this label."""
    return len(label) * _GLYPH + 2 * _MARGIN


def _round_up(least: float) -> float:
    """The least of ... 0.5, 1, 2, 5, 10, 20, 50 ... that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _y(y: int) -> str:
    """The attribute, unless it is 0 as by default: charts have many bars."""
    return f' y="{y}"' if y else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tick(amount: float, step: float) -> str:
    return f"{amount:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


_SECTION = """\
<section data-unit="{unit}" data-per-second="{per_second}" style="--row:{row}px;--pitch:{pitch}px">
<h2>{name} <small>{schedule}</small></h2>
<dl>{figures}</dl>
<div class="scroll" tabindex="0" role="region" aria-label="{name}, scrolls sideways">
<div class="ranks" aria-hidden="true">{ranks}</div>
<div class="plot" style="--width:{width}px;height:{height}px">
{ticks}
<svg role="img" aria-label="{label}" viewBox="{view}" preserveAspectRatio="none">
{backdrop}
<path class="critical" d="{links}"/>
{rows}
<path class="critical" d="{outlines}"/>
</svg>
</div>
</div>
</section>"""
