"""The trace for Perfetto: valid JSON, every action once at its time, and flows that pair up."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given

from pipework.plan import Action, Costs, Layout, Timeline, needs, one_f_one_b, simulate
from pipework.show.trace import perfetto
from tests.show.timelines import recorded, timelines

Event = dict[str, Any]


def events(text: str, *phases: str) -> list[Event]:
    return [event for event in json.loads(text)["traceEvents"] if event["ph"] in phases]


@given(timelines())
def test_every_action_is_one_complete_event(timeline: Timeline) -> None:
    found = {event["name"]: event for event in events(perfetto({"one": timeline}), "X")}
    assert len(found) == len(timeline.spans)
    for span in timeline.spans:
        event = found[str(span.action)]
        assert event["tid"] % timeline.schedule.layout.ranks == span.rank
        assert (event["args"]["stage"], event["args"]["microbatch"]) == (span.action.stage, span.action.microbatch)
        assert event["cat"] == span.action.kind.name.lower()
        assert event["args"]["needs"].split() == [str(need) for need in needs(span.action, timeline.schedule)]


def test_times_are_microseconds_from_the_start() -> None:
    plan = simulate(one_f_one_b(Layout.loop(2), 2), Costs(0.25, 0.25, 0.25, unit="s"))
    for timeline in (plan, recorded(plan, lambda index: 1.0, start=1024.0)):
        times = {event["name"]: (event["ts"], event["dur"]) for event in events(perfetto({"one": timeline}), "X")}
        assert times["0F0"] == (0, 250_000)
        assert times["1B0"] == (500_000, 500_000)


def test_counted_times_are_a_millisecond_each() -> None:
    trace = perfetto({"one": simulate(one_f_one_b(Layout.loop(2), 2))})
    assert {event["name"]: (event["ts"], event["dur"]) for event in events(trace, "X")}["1B0"] == (2000, 2000)


@given(timelines())
def test_flows_pair_up_and_each_end_lies_in_its_action(timeline: Timeline) -> None:
    trace = perfetto({"one": timeline})
    begins, ends = ({event["id"]: event for event in events(trace, phase)} for phase in "sf")
    assert begins.keys() == ends.keys()
    assert len(begins) == len(events(trace, "s")) == len(events(trace, "f"))

    by_rank: dict[int, list[Event]] = {}
    for action in events(trace, "X"):
        by_rank.setdefault(action["tid"], []).append(action)

    def action_at(end: Event) -> Action:
        (name,) = [
            action["name"] for action in by_rank[end["tid"]] if action["ts"] < end["ts"] < action["ts"] + action["dur"]
        ]
        return Action.parse(name)

    rank_of = timeline.schedule.layout.rank_of
    expected = Counter(
        (need, span.action)
        for span in timeline.spans
        for need in needs(span.action, timeline.schedule)
        if rank_of[need.stage] != span.rank
    )
    assert Counter((action_at(begins[flow]), action_at(ends[flow])) for flow in begins) == expected


def test_processes_are_timelines_and_threads_are_ranks() -> None:
    plan = simulate(one_f_one_b(Layout.loop(3), 3))
    trace = perfetto({"planned": plan, 'a "name"': recorded(plan, lambda index: 0.01)})
    names = [event for event in events(trace, "M") if event["name"] in ("process_name", "thread_name")]
    assert [(event["pid"], event.get("tid"), event["args"]["name"]) for event in names] == [
        (process, rank, name if rank is None else f"rank {rank}")
        for process, name in ((1, "planned"), (2, 'a "name"'))
        for rank in (None, 0, 1, 2)
    ]
    flows = events(trace, "s")
    assert len({flow["id"] for flow in flows}) == len(flows)
    assert Counter(event["pid"] for event in events(trace, "X")) == {1: 18, 2: 18}


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_has_no_flows(ranks: int) -> None:
    trace = perfetto({"one": simulate(one_f_one_b(Layout.loop(ranks), 2))})
    assert bool(events(trace, "s", "f")) == (ranks > 1)
