"""Time drawn with characters: one row per rank."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from pipework.plan.action import Action, Kind
from pipework.plan.figures import peaks_text, unit_for

if TYPE_CHECKING:
    from pipework.plan.timeline import Timeline

WIDTH = 100


def grid(timeline: Timeline, width: int | None = None) -> str:
    """The timeline in at most `width` columns (100 unless given), to scale, and below it a line of figures.

    An action is drawn as `4F12` where a rank holds several stages and there is room, else as `F12`, else as the number
    of its microbatch (forwards only), else as its letter; `-` goes on with it and `.` is idle time. An action too short
    for a column is not drawn. Two that ran at once share their columns, half and half.

    >>> from pipework.plan import Layout, looped_bfs, simulate
    >>> print(grid(simulate(looped_bfs(Layout.loop(2, per_rank=2), microbatches=2))))
    rank 0  0F0-0F1-2F0-2F1-............2B1-----2B0-----0B1-----0B0-----
    rank 1  ....1F0-1F1-3F0-3F1-3B1-----3B0-----1B1-----1B0-----........
    makespan 15, span 15, bubble 20.0 %, peak per rank 4
    """
    width = WIDTH if width is None else width
    schedule = timeline.schedule
    ranks = schedule.layout.ranks
    labels = [f"rank {rank:>{len(str(ranks - 1))}}  " for rank in range(ranks)]
    several = any(len(schedule.layout.held_by(rank)) > 1 for rank in range(ranks))
    digits = len(str(schedule.microbatches - 1))
    wanted = digits + (len(str(schedule.layout.stages - 1)) + 2 if several else 1)
    scale = _scale(timeline, max(1, width - len(labels[0])), wanted)
    columns = round(timeline.makespan * scale)
    begin = timeline.start
    rows: list[str] = []
    for rank, label in enumerate(labels):
        row = ["."] * columns
        for spans in timeline.at_once(rank):
            start, end = (round((moment - begin) * scale) for moment in (spans[0].start, spans[0].end))
            for index, span in enumerate(spans, start=1):
                share = start + (end - start) // (len(spans) - index + 1)
                row[start:share] = _cell(span.action, share - start, several, digits)
                start = share
        rows.append((label + "".join(row)).rstrip())
    return "\n".join([*rows, *wrap(summary(timeline), max(width, 20), subsequent_indent="  ")])


def summary(timeline: Timeline) -> str:
    """One line: makespan, span, bubble and each rank's peak of activations (see `peaks_text`)."""
    unit = unit_for(timeline.makespan, timeline.unit)
    return (
        f"makespan {unit.text(timeline.makespan)}, span {unit.text(timeline.span)}, "
        f"bubble {100 * timeline.bubble:.1f} %, peak per rank {peaks_text(timeline.peaks, ' ')}"
    )


def _scale(timeline: Timeline, columns: int, wanted: int) -> float:
    """Columns per second (per count): as many as fit.

    If all times are multiples of the shortest action, each such unit gets equally many columns. An even picture
    is no wider than the labels need: `wanted` columns for the shortest action.
    """
    rows = map(timeline.at_once, range(timeline.schedule.layout.ranks))
    lengths = ((spans[0].end - spans[0].start) / len(spans) for row in rows for spans in row)
    unit = min(filter(None, lengths), default=0.0)
    if not unit:
        return 0.0
    begin = timeline.start
    even = all(((span.start - begin) / unit).is_integer() for span in timeline.spans)
    each = int(columns / (timeline.makespan / unit))
    return min(each, wanted) / unit if even and each else columns / timeline.makespan


def _cell(action: Action, columns: int, several: bool, digits: int) -> str:
    """The action in exactly so many columns. `digits` is what the largest microbatch takes, so that all look alike."""
    kind, microbatch = action.kind.value, str(action.microbatch)
    if several and len(str(action)) < columns:  # one column is left, as a stage's digits after a microbatch's would mix
        text = str(action)
    elif digits < columns:
        text = kind + microbatch
    elif action.kind is Kind.FORWARD and digits <= columns:
        text = microbatch
    else:
        text = kind
    return text.ljust(columns, "-")[:columns]
