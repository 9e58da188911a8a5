"""The page, parsed: what is drawn is the timeline, nothing overlaps, and nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given

from pipework.errors import InputError
from pipework.plan import (
    Action,
    Costs,
    Layout,
    Schedule,
    Timeline,
    gpipe,
    interleaved_one_f_one_b,
    needs,
    one_f_one_b,
    simulate,
)
from pipework.plan.figures import unit_for
from pipework.show.chart import WHOLE, label_width
from pipework.show.html import page, write
from tests.show.timelines import recorded, timelines

Element = ET.Element


def sections(text: str) -> list[Element]:
    """The page's charts. The page is well-formed XML too, which makes every tag's end certain."""
    root = ET.fromstring(re.sub(r' xmlns="[^"]*"', "", text))
    return list(root.iter("section"))


@dataclass(frozen=True)
class Bar:
    """One box of a path; across in the picture's units of time, down its row in pixels."""

    rank: int
    action: Action
    needs: list[str]
    shade: str
    left: int
    right: int
    top: int
    bottom: int


def bars(section: Element) -> list[Bar]:
    """Every box that the section's paths draw, and what the attributes next to them say it is."""
    return [bar for row in rows(section) for path in row for bar in boxes(int(row.attrib["data-rank"]), path)]


def rows(section: Element) -> list[Element]:
    return [row for row in section.iter("g") if row.get("data-rank")]


def boxes(rank: int, path: Element) -> Iterator[Bar]:
    """The boxes of a path: after each its pen is back where it began, and the next begins so far from there."""
    drawn = re.findall(r"m(-?\d+) (-?\d+)h(\d+)v(\d+)h-?(\d+)z", path.attrib["d"])
    assert path.attrib["d"] == "".join(f"m{right} {down}h{w}v{h}h{-int(w)}z" for right, down, w, h, _ in drawn)
    kind, shade = path.attrib["class"].split()
    x = y = 0
    for microbatch, (right, down, w, h, _) in zip(numbers(path.attrib["data-microbatches"]), drawn, strict=True):
        x, y = x + int(right), y + int(down)
        action = Action.parse(f"{path.attrib['data-stage']}{kind}{microbatch}")
        needed = re.findall(r"(\d+[FBIW])(-?\d+)", path.attrib["data-needs"])
        names = [f"{what}{microbatch + int(distance)}" for what, distance in needed]
        yield Bar(rank, action, names, shade, x, x + int(w), y, y + int(h))


def numbers(runs: str) -> list[int]:
    """0 1 2 3 6 for `0-3 6`."""
    ends = [[int(end) for end in run.split("-")] for run in runs.split()]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def top_of(row: Element) -> int:
    found = re.fullmatch(r"translate\(0 (\d+)\)", row.attrib["transform"])
    assert found
    return int(found[1])


def idle(section: Element) -> int:
    """The width of the row that spans the makespan, in the picture's units."""
    return next(int(rect.attrib["width"]) for rect in section.iter("rect") if rect.get("class") == "idle")


def width_of(section: Element) -> float:
    """The width of the picture in pixels, unless it is fitted to the window."""
    plot = next(each for each in section.iter("div") if each.get("class") == "plot")
    (width,) = re.findall(r"--width:([\d.]+)px", plot.attrib["style"])
    return float(width)


def pixels(section: Element) -> float:
    """How many there are to one of the picture's units of time."""
    return width_of(section) / size(section)[0]


def size(section: Element) -> tuple[float, float]:
    """The width of the picture in its units of time, and its height in pixels."""
    _, _, width, height = map(float, next(section.iter("svg")).attrib["viewBox"].split())
    return width, height


def scale(section: Element, timeline: Timeline) -> float:
    """Pixels per second, read from the row that spans the makespan."""
    return pixels(section) * idle(section) / timeline.makespan


def planned(ranks: int = 4, microbatches: int = 8, costs: Costs = Costs()) -> Timeline:  # noqa: B008
    return simulate(one_f_one_b(Layout.loop(ranks), microbatches), costs)


@given(timelines())
def test_every_action_is_drawn_once_where_and_when_it_ran(timeline: Timeline) -> None:
    (section,) = sections(page({"one": timeline}))
    drawn = {bar.action: bar for bar in bars(section)}
    assert len(bars(section)) == len(drawn) == len(timeline.spans)
    units = idle(section) / timeline.makespan
    # What the script makes of a unit, in the unit it writes.
    told = float(section.attrib["data-grain"]) / unit_for(timeline.makespan, timeline.unit).per_second
    for span in timeline.spans:
        bar = drawn[span.action]
        assert bar.rank == span.rank
        assert bar.needs == [str(need) for need in needs(span.action, timeline.schedule)]
        for edge, time in ((bar.left, span.start), (bar.right, span.end)):
            # Half a unit for rounding the edge, and at most as much for the makespan that the scale was read from.
            assert abs(edge - (time - timeline.start) * units) <= 1
            assert edge * told == pytest.approx(time - timeline.start, abs=1e-6 * timeline.makespan)


@given(timelines())
def test_bars_of_a_row_do_not_overlap(timeline: Timeline) -> None:
    (section,) = sections(page({"one": timeline}))
    for rank in range(timeline.schedule.layout.ranks):
        row = [bar for bar in bars(section) if bar.rank == rank]
        high = max((bar.bottom for bar in row), default=0)
        for lane in (0, high // 2):
            through = sorted((bar.left, bar.right) for bar in row if bar.top <= lane < bar.bottom)
            assert all(right <= left for (_, right), (left, _) in pairwise(through))


@given(timelines())
def test_labels_fit_into_their_bars(timeline: Timeline) -> None:
    (section,) = sections(page({"one": timeline}))
    picture, labels = section.iter("svg")
    high = max(bar.bottom for bar in bars(section))
    one = pixels(section)
    assert len(labels) == (timeline.schedule.layout.ranks if width_of(section) <= WHOLE else 0)
    for rank, (row, written) in enumerate(zip(rows(picture), labels, strict=False)):
        assert top_of(row) < top_of(written) - high // 2 < top_of(row) + high // 2
        owners = [bar for bar in bars(section) if bar.rank == rank]
        for label in written:
            middle = high // 2 + int(label.get("y", 0))
            (bar,) = (
                bar
                for bar in owners
                if (bar.top + bar.bottom) // 2 == middle
                and abs((bar.left + bar.right) / 2 * one - float(label.attrib["x"])) < label_width("") / 2
            )
            assert label.text in (str(bar.action), str(bar.action.microbatch))
            assert label_width(label.text) < (bar.right - bar.left) * one + 0.2  # for rounding


@given(timelines())
def test_rows_lie_below_one_another_within_the_picture(timeline: Timeline) -> None:
    (section,) = sections(page({"one": timeline}))
    width, height = size(section)
    tops = [top_of(row) for row in rows(section)]
    assert len(tops) == timeline.schedule.layout.ranks
    assert all(tops[bar.rank] + bar.bottom <= height and bar.right <= width * (1 + 1e-6) for bar in bars(section))
    high = max(bar.bottom for bar in bars(section))
    assert all(above + high < below for above, below in pairwise(tops))


def heights(section: Element) -> list[float]:
    """How high each rank's memory curve rises, in pixels."""
    curves = [path.attrib["d"] for path in section.iter("path") if path.get("class") == "alive"]
    bases = [int(re.findall(r"^M0 (\d+)", curve)[0]) for curve in curves]
    rises = (re.findall(r"V([\d.]+)", curve) for curve in curves)
    return [max(base - float(y) for y in rise) for base, rise in zip(bases, rises, strict=True)]


@given(timelines())
def test_memory_curves_rise_to_the_peaks(timeline: Timeline) -> None:
    (section,) = sections(page({"one": timeline}))
    most, highest = max(heights(section)), max(timeline.peaks)
    assert heights(section) == pytest.approx([most * peak / (highest or 1) for peak in timeline.peaks], abs=0.051)


def test_memory_curves_change_where_activations_come_and_go() -> None:
    plan = simulate(gpipe(Layout.loop(1), 2))  # F F B- B-
    (section,) = sections(page({"one": plan}))
    (curve,) = (path.attrib["d"] for path in section.iter("path") if path.get("class") == "alive")
    units = idle(section) / plan.makespan
    steps = [(int(x) / units, float(y)) for x, y in re.findall(r"H(\d+)V([\d.]+)", curve)]
    levels = [steps[-1][1] - y for _, y in steps]
    assert [time for time, _ in steps] == [0, 1, 4, 6, 6]
    assert levels == [6, 12, 6, 0, 0]


def test_memory_curves_of_one_unit_share_a_scale() -> None:
    layout = Layout.loop(4)
    timelines = {family.__name__: simulate(family(layout, 8)) for family in (gpipe, one_f_one_b)}
    bytes_instead = simulate(gpipe(layout, 8), Costs(activation=1e9))
    most, less, other = sections(page({**timelines, "bytes": bytes_instead}))
    assert max(heights(most)) == max(heights(other)) == 2 * max(heights(less))


def test_the_critical_path_is_outlined() -> None:
    timeline = planned()
    (section,) = sections(page({"one": timeline}))
    _, outlines = (path.attrib["d"] for path in section.iter("path") if path.get("class") == "critical")
    outlined = {tuple(map(int, each)) for each in re.findall(r"M(\d+) (\d+)H(\d+)V(\d+)", outlines)}
    tops = [top_of(row) for row in rows(section)]
    path = [span.action for span in timeline.critical_path()]
    assert outlined == {
        (bar.left, tops[bar.rank] + bar.top + 1, bar.right, tops[bar.rank] + bar.bottom - 1)
        for bar in bars(section)
        if bar.action in path
    }


def test_stages_of_one_rank_differ_in_shade() -> None:
    text = page({"one": simulate(interleaved_one_f_one_b(Layout.loop(2, per_rank=3), microbatches=4))})
    (section,) = sections(text)
    shades = {(bar.action.stage, bar.shade) for bar in bars(section)}
    assert shades == {(stage, f"s{stage // 2}") for stage in range(6)}
    assert re.findall(r"\.s(\d) \{ --lift: (\d+)%", text) == [("1", "25"), ("2", "50")]


def test_comparable_timelines_share_one_scale() -> None:
    plan = planned(costs=Costs(0.003, 0.003, 0.003, unit="s"))
    real = recorded(plan, lambda index: 1.5)
    first, second = sections(page({"planned": plan, "recorded": real}))
    assert scale(first, plan) == pytest.approx(scale(second, real), rel=1e-3)  # each read from a rounded width
    assert first.attrib["data-unit"] == second.attrib["data-unit"] == "ms"


@pytest.mark.parametrize(
    ("costs", "factor", "unit"),
    [(Costs(), 0.003, "ms"), (Costs(), 1.5, "s"), (Costs(unit="s"), 0.04, "ms")],
    ids=["another unit", "another unit, near in numbers", "one unit, far apart"],
)
def test_what_does_not_compare_fills_the_same_width(costs: Costs, factor: float, unit: str) -> None:
    plan = planned(costs=costs)
    real = recorded(plan, lambda index: factor)
    text = page({"planned": plan, "recorded": real})
    first, second = sections(text)
    assert scale(first, plan) * plan.makespan == scale(second, real) * real.makespan
    assert (first.attrib["data-unit"], second.attrib["data-unit"]) == (costs.unit, unit)
    assert "do not compare" in text
    assert "do not compare" not in page({"planned": plan})


def test_counts_compare_whatever_a_forward_costs() -> None:
    whole, half = planned(), planned(costs=Costs(0.5, 0.5, 0.5))
    text = page({"whole": whole, "half": half})
    first, second = sections(text)
    assert scale(first, whole) == pytest.approx(scale(second, half), rel=1e-3)
    assert first.attrib["data-unit"] == second.attrib["data-unit"] == ""
    assert "do not compare" not in text


def test_ticks_are_round_rise_evenly_and_stand_at_their_times() -> None:
    timeline = planned(costs=Costs(0.003, 0.003, 0.003, unit="s"))
    (section,) = sections(page({"one": timeline}))
    full = next(each for each in section.iter("div") if each.get("class") == "ticks full")
    ticks = [(float(tick.attrib["data-tick"].removesuffix(" ms")), float(tick.attrib["style"][5:-1])) for tick in full]
    assert [time for time, _ in ticks] == [10.0 * index for index in range(10)]  # 33 units of 3 ms
    for time, percent in ticks:
        assert percent == pytest.approx(100 * time / 99, abs=1e-3)


def test_figures_are_the_timeline_s() -> None:
    (section,) = sections(page({"one": planned()}))
    figures = {row[0].text: row[1].text for row in section.findall("./dl/div")}
    assert figures == {
        "makespan": "33",
        "bubble": "27.3 %",
        "span": "33",
        "bubble in span": "27.3 %",
        "peak per rank": "4, 3, 2, 1",
    }


def test_peaks_of_many_ranks_are_bounded_not_listed() -> None:
    (section,) = sections(page({"one": planned(ranks=9, microbatches=18)}))
    figures = {row[0].text: row[1].text for row in section.findall("./dl/div")}
    assert figures["peak per rank"] == "1–9"


def test_a_forward_only_schedule_of_which_nothing_is_freed_can_be_drawn() -> None:
    layout = Layout.loop(2)
    orders = tuple(tuple(Action.parse(f"{rank}F{index}") for index in range(3)) for rank in range(2))
    (section,) = sections(page({"one": simulate(Schedule("forward", layout, 3, orders), Costs(activation=0.0))}))
    assert len(bars(section)) == 6


def test_the_page_loads_nothing() -> None:
    text = page({"planned": planned(), "recorded": recorded(planned(), lambda index: 0.01)})
    without_namespace = text.replace('xmlns="http://www.w3.org/1999/xhtml"', "")
    assert not re.search(r"https?:|//\w|src=|href=|@import|url\(|fetch\(|import\(", without_namespace)
    assert "default-src 'none'" in text


def test_the_page_is_html_with_every_element_closed() -> None:
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            # HTML takes <rect/> for closed in SVG, but outside of it only where an element is empty by nature.
            assert "svg" in opened or tag in ("meta", "input")

    parser = Parser()
    parser.feed(page({"one": planned()}))
    parser.close()
    assert not opened


def test_names_and_titles_are_text_not_markup() -> None:
    evil = '</title><script>alert("1")</script>&"'
    plan = planned()
    plan = replace(plan, schedule=replace(plan.schedule, name=evil))
    text = page({evil: plan}, title=evil)
    assert text.count("<script>") == 1
    root = ET.fromstring(re.sub(r' xmlns="[^"]*"', "", text))
    assert root.findtext("./head/title") == root.findtext("./body/h1") == evil
    assert (root.findtext("./body/section/h2") or "").strip() == evil
    assert (root.findtext("./body/section/h2/small") or "").startswith(evil)


def test_charts_are_labelled_and_can_be_scrolled_from_the_keyboard() -> None:
    (section,) = sections(page({"planned": planned()}))
    picture, _ = section.iter("svg")
    assert picture.attrib["role"] == "img"
    assert picture.attrib["aria-label"].startswith("planned: one_f_one_b: 4 ranks")
    assert "makespan 33" in picture.attrib["aria-label"]
    assert section.find("./div[@tabindex='0'][@role='region'][@aria-label]") is not None


def test_large_charts_open_as_a_whole_and_stay_small() -> None:
    small, large = page({"one": planned()}), page({"one": planned(32, 128)})
    assert 'id="fit"' not in small
    assert re.search(r'id="fit" checked', large)
    assert len(list(sections(small)[0].iter("text"))) == 4 * 8 * 2
    assert not list(sections(large)[0].iter("text"))
    assert len(large) < 30 * 32 * 128 * 2


def test_write_gives_the_page_in_a_file(tmp_path: Path) -> None:
    timelines = {"µ": planned()}
    write(tmp_path / "page.html", timelines, title="Größe")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(timelines, title="Größe")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(InputError, match="no timeline"):
        page({})
    empty = Timeline.recorded(Schedule("empty", Layout.loop(1), 1, ((),)), ())
    with pytest.raises(InputError, match="'recorded' is empty"):
        page({"recorded": empty})
