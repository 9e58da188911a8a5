"""One timeline as an SVG with its ticks, ranks and figures around it.

There is one row per rank, in which two actions that ran at once lie one above the other, each half as high; and under
the row a curve of the activations that the rank keeps alive:

    rank 0   | 0F0 | 0F1 | 0F2 |           |    0B0    | ...
    peak 3   _______-----===============================-----

The SVG counts time in whole grains and height in pixels, so bars that touch in time touch exactly, and none overlap.
All bars of one stage and kind that need the same are one path. What the page says about the bar under the pointer, its
script reads off that path and its attributes, so that charts with many bars stay small.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import median_low
from typing import NamedTuple, final

from pipework.plan import Action, Kind, Span, Timeline, needs
from pipework.plan.figures import Unit, memory_text, peaks_text

# Pixels.
WINDOW = 1200  # what a usual window shows at once
WHOLE = 3 * WINDOW  # charts wider than this open as a whole, fitted to the window
_AXIS = 20  # above and below the rows
_GAP = 2  # between a row and its memory curve
_MEMORY = 12  # the height of the curve
_BELOW = 8  # between a curve and the next row
_GLYPH = 7.3  # no digit and no letter of a label is wider
_MARGIN = 3  # left and right of a label
_ROUNDING = 0.1  # less than this does not keep a label out of its bar
_TICK = 80  # the least distance of two ticks

_DIGITS = 7  # of a number that browsers, which draw in single precision, surely tell from the next


class _Bar(NamedTuple):
    """A span, and where in its row it is drawn from above, in pixels."""

    span: Span
    top: int
    height: int


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """A timeline drawn from its `start` in `width` pixels, which it need not fill.

    `scale` is in pixels per second (per count), `grain` in seconds (counts). Memory curves reach their full height at
    `memory`, in the unit of the timeline's `costs.activation`.
    """

    name: str
    timeline: Timeline
    start: float
    unit: Unit
    scale: float
    grain: float
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
            grain=f"{self.grain * self.unit.per_second:g}",
            row=self._bar,
            pitch=self._pitch,
            ranks="".join(self._rank(rank) for rank in ranks),
            width=f"{self.width:.1f}",
            height=height,
            ticks=self._ticks("full", self.scale) + self._ticks("fit", self.scale * min(1, WINDOW / self.width)),
            label=escape(f"{self.name}: {schedule.describe()}, {self._summary()}"),
            view=f"0 0 {self.width / self.scale / self.grain:.9g} {height}",
            rows="\n".join(self._row(rank) for rank in ranks),
            backdrop="\n".join(self._backdrop(rank) for rank in ranks),
            links="".join(self._links()),
            outlines="".join(self._outlines()),
            # A chart that opens as a whole hides its labels; once they are wanted, the script writes those in sight.
            labels="\n".join(self._labels(rank) for rank in ranks) if self.width <= WHOLE else "",
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
        return round((time - self.start) / self.grain)

    def _top(self, rank: int) -> int:
        return _AXIS + rank * self._pitch

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
            f'<rect class="idle" width="{end}" height="{self._bar}"/>'
            f'<path class="alive" d="{self._alive(rank, end)}"/></g>'
        )

    def _row(self, rank: int) -> str:
        alike = defaultdict[tuple[int, Kind, str], list[_Bar]](list)
        for bar in self._bars(rank):
            action = bar.span.action
            alike[action.stage, action.kind, self._needs(action)].append(bar)
        held = self.timeline.schedule.layout.held_by(rank)
        paths = (
            f'<path class="{kind.value} s{held.index(stage)}" data-stage="{stage}" data-needs="{needed}"'
            f' data-microbatches="{_microbatches(bars)}"{self._again(stage, kind)} d="{self._path(bars)}"/>'
            for (stage, kind, needed), bars in alike.items()
        )
        return f'<g data-rank="{rank}" transform="translate(0 {self._top(rank)})">{"".join(paths)}</g>'

    def _again(self, stage: int, kind: Kind) -> str:
        """Says of the backwards of a recomputed stage that they are."""
        is_again = kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage in self.timeline.schedule.recomputed
        return ' data-again=""' if is_again else ""

    def _bars(self, rank: int) -> Iterator[_Bar]:
        for spans in self.timeline.at_once(rank):
            height = self._bar // len(spans)
            yield from (_Bar(span, place * height, height) for place, span in enumerate(spans))

    def _needs(self, action: Action) -> str:
        """What the action needs, with microbatches counted from its own: `1F0 2B0` for 2B5."""
        needed = needs(action, self.timeline.schedule)
        return " ".join(f"{need.stage}{need.kind.value}{need.microbatch - action.microbatch}" for need in needed)

    def _path(self, bars: Iterable[_Bar]) -> str:
        """A box for every bar, each from where the one before began."""
        path, x, y = list[str](), 0, 0
        for span, top, height in bars:
            start, end = self._x(span.start), self._x(span.end)
            path.append(f"m{start - x} {top - y}h{end - start}v{height}h{start - end}z")
            x, y = start, top
        return "".join(path)

    def _labels(self, rank: int) -> str:
        labels = "".join(self._label(*bar) for bar in self._bars(rank))
        return f'<g transform="translate(0 {self._top(rank) + self._bar // 2 + 4})">{labels}</g>'

    def _label(self, span: Span, top: int, height: int) -> str:
        """The microbatch in a bar that has room for it; the whole action where a rank holds several stages."""
        x, room = (span.start - self.start) * self.scale, (span.end - span.start) * self.scale
        several = len(self.timeline.schedule.layout.held_by(span.rank)) > 1
        for label in (*([str(span.action)] if several else []), str(span.action.microbatch)):
            if label_width(label) < room + _ROUNDING:
                middle = top + height // 2 - self._bar // 2
                y = f' y="{middle}"' if middle else ""
                return f'<text x="{x + room / 2:.1f}"{y}>{label}</text>'
        return ""

    def _alive(self, rank: int, end: int) -> str:
        """A step curve of the activations alive, growing upwards from its base line."""
        base = self._bar + _GAP + _MEMORY
        path = f"M0 {base}"
        for time, alive in dict(self.timeline.memory(rank)).items():  # of several changes at once, the last
            path += f"H{self._x(time)}V{round(base - _MEMORY * alive / self.memory, 1):g}"
        return f"{path}H{end}V{base}Z"

    def _outlines(self) -> Iterator[str]:
        """A box around every span on the critical path."""
        for span in self.timeline.critical_path():
            x, end, top = self._x(span.start), self._x(span.end), self._top(span.rank)
            yield f"M{x} {top + 1}H{end}V{top + self._bar - 1}H{x}Z"

    def _links(self) -> Iterator[str]:
        """A line for every step of the critical path from one rank to another."""
        path = self.timeline.critical_path()
        for one, other in pairwise(path):
            if one.rank != other.rank:
                top, end = self._top(one.rank) + self._bar // 2, self._top(other.rank) + self._bar // 2
                yield f"M{self._x(one.end)} {top}L{self._x(other.start)} {end}"


def roomy_scale(timeline: Timeline) -> float:
    """Pixels per second (per count) at which a typical action has room for its label."""
    durations = [span.end - span.start for span in timeline.spans if span.end > span.start]
    layout = timeline.schedule.layout
    several = layout.stages > layout.ranks
    longest = max((str(span.action) if several else str(span.action.microbatch) for span in timeline.spans), key=len)
    return label_width(longest) / median_low(durations)


def grain(timeline: Timeline) -> float:
    """A round time, in seconds (counts), of which all times since the timeline's start are whole multiples.

    If there is none, or only too fine a one, the finest in which a browser can count to the makespan.
    """
    first = math.ceil(math.log10(timeline.makespan))
    times = {time - timeline.start for rows in (timeline.starts, timeline.ends) for row in rows for time in row}
    finest = 10.0 ** (first - _DIGITS)
    candidates = (10.0**power / part for power in range(first, first - _DIGITS, -1) for part in (1, 2, 4))
    return next((each for each in candidates if all(_is_whole(time / each) for time in times)), finest)


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6  # times are sums of floats


def label_width(label: str) -> float:
    """The pixels a bar must have to carry this label."""
    return len(label) * _GLYPH + 2 * _MARGIN


def _round_up(least: float) -> float:
    """The least of ... 0.5, 1, 2, 5, 10, 20, 50 ... that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _microbatches(bars: Iterable[_Bar]) -> str:
    """The bars' microbatches in order, `0-3 6` for 0 1 2 3 6."""
    runs: list[tuple[int, int]] = []
    for bar in bars:
        number = bar.span.action.microbatch
        first = runs.pop()[0] if runs and runs[-1][1] == number - 1 else number
        runs.append((first, number))
    return " ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tick(amount: float, step: float) -> str:
    return f"{amount:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


_SECTION = """\
<section data-unit="{unit}" data-grain="{grain}" style="--row:{row}px;--pitch:{pitch}px">
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
<svg class="labels" aria-hidden="true">{labels}</svg>
</div>
</div>
</section>"""
