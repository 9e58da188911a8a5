"""Timelines as a trace for the Perfetto UI (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

from pipework.plan import Action, Span, Timeline, needs

Event = dict[str, Any]


def perfetto(timelines: Mapping[str, Timeline]) -> str:
    """The timelines in Chrome's trace event format (JSON): one process per timeline, one thread per rank.

    Where two actions ran at once, the second is on a thread of its own, as events of a thread must not overlap.
    Each action is a complete event, in microseconds from its timeline's start; where times are plain counts, one is
    written as a millisecond. A flow leads from each action to every action on another rank that needs it.

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> trace = json.loads(perfetto({"planned": simulate(one_f_one_b(Layout.loop(2), microbatches=2))}))
    >>> [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"]
    ['0F0', '0F1', '0B0', '0B1', '1F0', '1B0', '1F1', '1B1']
    """
    flows = count(1)
    events = [
        event
        for process, (name, timeline) in enumerate(timelines.items(), start=1)
        for event in (*_names(process, name, timeline), *_actions(process, timeline), *_flows(process, timeline, flows))
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _names(process: int, name: str, timeline: Timeline) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    ranks = timeline.schedule.layout.ranks
    for rank in range(ranks):
        names = [f"rank {rank}", f"rank {rank}, at the same time"]
        for lane in sorted({lane for spans in timeline.at_once(rank) for lane in range(len(spans))} | {0}):
            place = {"ph": "M", "pid": process, "tid": rank + lane * ranks}
            yield {**place, "name": "thread_name", "args": {"name": names[lane]}}
            yield {**place, "name": "thread_sort_index", "args": {"sort_index": rank}}


def _threads(timeline: Timeline) -> dict[Action, int]:
    """The thread of each action: its rank, or as many further on as there are ranks where another runs at once."""
    ranks = timeline.schedule.layout.ranks
    return {
        span.action: rank + lane * ranks
        for rank in range(ranks)
        for spans in timeline.at_once(rank)
        for lane, span in enumerate(spans)
    }


def _actions(process: int, timeline: Timeline) -> Iterator[Event]:
    microseconds, thread_of = _clock(timeline), _threads(timeline)
    for rank in range(timeline.schedule.layout.ranks):
        for span in timeline.rank(rank):
            action, start = span.action, microseconds(span.start)
            yield {
                "ph": "X",
                "name": str(action),
                "cat": action.kind.name.lower(),
                "pid": process,
                "tid": thread_of[action],
                "ts": start,
                "dur": microseconds(span.end) - start,
                "args": {
                    "stage": action.stage,
                    "microbatch": action.microbatch,
                    "needs": " ".join(map(str, needs(action, timeline.schedule))),
                },
            }


def _flows(process: int, timeline: Timeline, numbers: Iterator[int]) -> Iterator[Event]:
    """A pair of events per transfer between ranks, each in the middle of its action, where no other can be meant."""
    microseconds, thread_of = _clock(timeline), _threads(timeline)
    span_of = {span.action: span for span in timeline.spans}

    def end(span: Span) -> Event:
        return {"pid": process, "tid": thread_of[span.action], "ts": microseconds((span.start + span.end) / 2)}

    for span in timeline.spans:
        for need in needs(span.action, timeline.schedule):
            source = span_of.get(need)
            if source is not None and source.rank != span.rank:
                flow = {"name": "transfer", "cat": "transfer", "id": next(numbers)}
                yield {"ph": "s", **flow, **end(source)}
                yield {"ph": "f", "bp": "e", **flow, **end(span)}


def _clock(timeline: Timeline) -> Callable[[float], float]:
    """From the timeline's times to microseconds since its start."""
    start, factor = timeline.start, 1e6 if timeline.unit else 1e3
    return lambda time: (time - start) * factor
