"""One self-contained HTML page that draws timelines: what each rank did when, and what it waited for.

The charts are drawn here, not in the browser, so they are complete without script, but for the labels of charts so wide
that they open fitted to the window. The script writes those, adds the tooltip, and has all charts scroll together.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from pipework.errors import InputError
from pipework.plan import Timeline
from pipework.plan.figures import unit_for
from pipework.show.chart import WHOLE, WINDOW, Chart, grain, roomy_scale
from pipework.show.colours import KINDS

_WIDEST = 16_000  # pixels
_APART = 20  # timelines whose makespans differ by more than this factor are not drawn to one scale


def page(timelines: Mapping[str, Timeline], *, title: str = "Pipeline timeline") -> str:
    """The page as text: the timelines under one another, each under its name.

    All share one time scale if their times compare: one unit, and makespans at most twentyfold apart. Otherwise each
    fills the same width, and the page says so. The page loads nothing from anywhere.

    Raises InputError if there is nothing to draw.

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> text = page({"planned": simulate(one_f_one_b(Layout.loop(4), microbatches=8))}, title="1F1B")
    >>> text.startswith("<!DOCTYPE html>"), len(text) < 25_000
    (True, True)
    """
    if not timelines:
        raise InputError("no timeline to draw", remedy="give at least one, such as {'planned': simulate(schedule)}")
    for name, timeline in timelines.items():
        if not timeline.makespan:
            raise InputError(f"timeline {name!r} is empty", remedy="draw it after a step, or simulate its schedule")
    shared, shades = _comparable(timelines), _shades(timelines)
    charts = _charts(timelines, shared)
    return _PAGE.format(
        title=escape(title),
        style=_resource("page.css") + _colours(shades),
        legend=_legend(timelines, shades),
        switches=_switches(charts[0].width),
        note="" if shared else _NOTE,
        charts="\n".join(chart.section() for chart in charts),
        script=_resource("page.js"),
    )


def write(path: str | Path, timelines: Mapping[str, Timeline], *, title: str = "Pipeline timeline") -> None:
    """Write `page(timelines, title=title)` to `path`, over what is there."""
    Path(path).write_text(page(timelines, title=title), encoding="utf-8")


def _comparable(timelines: Mapping[str, Timeline]) -> bool:
    makespans = [timeline.makespan for timeline in timelines.values()]
    units = {timeline.unit for timeline in timelines.values()}
    return len(units) == 1 and max(makespans) <= _APART * min(makespans)


def _charts(timelines: Mapping[str, Timeline], shared: bool) -> list[Chart]:
    longest = max(timeline.makespan for timeline in timelines.values())
    lengths = {name: longest if shared else timeline.makespan for name, timeline in timelines.items()}
    roomy = max(roomy_scale(timeline) * lengths[name] for name, timeline in timelines.items())
    width = max(WINDOW, min(roomy, _WIDEST))
    return [
        Chart(
            name=name,
            timeline=timeline,
            start=timeline.start,
            unit=unit_for(lengths[name], timeline.unit),
            scale=width / lengths[name],
            grain=grain(timeline),
            width=width,
            memory=_highest(timeline, timelines),
        )
        for name, timeline in timelines.items()
    ]


def _highest(timeline: Timeline, timelines: Mapping[str, Timeline]) -> float:
    """The highest peak among the timelines that measure memory as this one does."""
    alike = [other for other in timelines.values() if other.costs.activation == timeline.costs.activation]
    return max(peak for other in alike for peak in other.peaks)


def _shades(timelines: Mapping[str, Timeline]) -> int:
    """The most stages that any rank holds."""
    layouts = [timeline.schedule.layout for timeline in timelines.values()]
    return max(len(layout.held_by(rank)) for layout in layouts for rank in range(layout.ranks))


def _colours(shades: int) -> str:
    hues = (f".{kind.value} {{ --hue: {hue}; }}" for kind, (_, hue) in KINDS.items())
    lifts = (f".s{shade} {{ --lift: {50 * shade / (shades - 1):.0f}%; }}" for shade in range(1, shades))
    return "\n".join((*hues, *lifts))


def _legend(timelines: Mapping[str, Timeline], shades: int) -> str:
    drawn = {span.action.kind for timeline in timelines.values() for span in timeline.spans}
    entries = [
        f'<li class="{kind.value}"><i></i><span>{name}</span></li>'
        for kind, (name, _) in KINDS.items()
        if kind in drawn
    ]
    if shades > 1:
        steps = "".join(f'<b class="s{shade}"></b>' for shade in range(shades))
        entries.append(f'<li class="F"><i class="shades">{steps}</i>first to last stage of a rank</li>')
    entries += [
        '<li><i class="idle"></i>idle</li>',
        '<li><i class="outline"></i>critical path</li>',
        '<li><i class="alive"></i>activations alive</li>',
    ]
    return "".join(entries)


def _switches(width: float) -> str:
    switches = _SWITCH.format(name="critical", state='checked=""', label="critical path")
    if width > WINDOW:
        state = 'checked=""' if width > WHOLE else ""
        switches += _SWITCH.format(name="fit", state=state, label="fit to window")
    return switches


def _resource(name: str) -> str:
    return (files("pipework.show") / name).read_text(encoding="utf-8")


_NOTE = '<p class="note">These times do not compare: each timeline has a scale of its own.</p>'
_SWITCH = '<label><input type="checkbox" id="{name}" {state}/>{label}</label>'
_PAGE = """\
<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width"/>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"/>
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<ul class="legend">{legend}<li class="switches">{switches}</li></ul>
{note}
{charts}
<div id="tip" role="tooltip" hidden=""></div>
<script>//<![CDATA[
{script}//]]></script>
</body>
</html>
"""
