"""Every instruction of a step by its text in torch's profiles, and nothing of it where there is no profile."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

import pipework
from pipework import Runner
from pipework.plan import Schedule, lower
from pipework.run import clock, labels
from pipework.run.executor import Executor
from tests.end_to_end.case import squared
from tests.gloo import GlooPool
from tests.run.pipes import piped, sequence
from tests.run.test_runner import X, Y

TEXT = re.compile(r"\d+[FBIW]\d+|(send|receive) \d+[FBIW]\d+>\d+")


def runner_of(group: dist.ProcessGroup | None = None, record: bool = False) -> Runner:
    """Three kinds of backward, two stages a rank, so that some transfers stay on a rank and some do not."""
    pipe = piped(sequence(4), *"123")
    schedule = pipework.schedules.zero_bubble_v(pipe.layout(2, pipework.Layout.vee), 4)
    return Runner(pipe, schedule, loss=squared, group=group, record=record)


def profiled(runner: Runner, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The events of a step's trace that last, in the order in which they began."""
    with profile(activities=[ProfilerActivity.CPU], **options) as made:
        runner.step(X, target=Y)
    made.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"])


def written(schedule: Schedule, rank: int) -> list[str]:
    return [str(instruction) for instruction in lower(schedule)[rank].instructions]


def read(events: list[dict[str, Any]]) -> list[list[str]]:
    """The labels of each thread that has some, in their order; on such a thread all of a backward lies inside one."""
    found: list[list[str]] = []
    for thread in {event["tid"] for event in events if TEXT.fullmatch(event["name"])}:
        own = [event for event in events if event["tid"] == thread]
        labelled = [event for event in own if TEXT.fullmatch(event["name"])]
        assert all(ended(one) <= other["ts"] for one, other in pairwise(labelled))
        back = [label for label in labelled if re.fullmatch(r"\d+[BI]\d+", label["name"])]
        nodes = [event for event in own if event["name"].startswith("autograd::engine::evaluate_function")]
        assert nodes
        for node in nodes:
            assert any(at["ts"] <= node["ts"] and ended(node) <= ended(at) for at in back)
        found.append([label["name"] for label in labelled])
    return found


def ended(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def test_on_threads(tmp_path: Path) -> None:
    runner = runner_of()
    events = profiled(runner, tmp_path, experimental_config=_ExperimentalConfig(profile_all_threads=True))
    assert sorted(read(events)) == sorted(written(runner.schedule, rank) for rank in range(2))
    assert len(runner.recorded.spans) == sum(map(len, runner.schedule.orders))


@pytest.mark.parametrize("options", [{}, {"experimental_config": _ExperimentalConfig(profile_all_threads=True)}])
def test_the_step_is_the_same_under_a_profiler(options: dict[str, Any]) -> None:
    """Also where the profiler does not see the ranks, as they are threads that were not there when it began."""
    losses = [runner_of().step(X, target=Y)]
    with profile(activities=[ProfilerActivity.CPU], **options):
        losses.append(runner_of().step(X, target=Y))
    assert torch.equal(*losses)


def over_gloo(group: dist.ProcessGroup, rank: int, record: bool) -> tuple[Schedule, list[list[list[str]]]]:
    runner = runner_of(group, record)
    with TemporaryDirectory() as folder:
        return runner.schedule, [read(profiled(runner, Path(folder))) for _ in range(2)]


@pytest.mark.parametrize("record", [False, True])
def test_on_processes(gloo_pool: GlooPool, record: bool) -> None:
    for rank, (schedule, ((first,), (second,))) in enumerate(gloo_pool.run(over_gloo, record)):
        wanted = written(schedule, rank)
        assert first == wanted
        assert sorted(second) == sorted(wanted)  # now that gradients are known, receives are posted earlier
        assert [text for text in second if ">" not in text] == [text for text in wanted if ">" not in text]


def watched(group: dist.ProcessGroup, rank: int) -> Counter[str]:
    """What was called of all that looks at a step, in one step."""
    runner, called = runner_of(group), Counter[str]()
    runner.step(X, target=Y)

    def note(frame: FrameType, event: str, what: Any) -> None:
        code = frame.f_code
        watches = code.co_filename in {clock.__file__, labels.__file__} or code is Executor._play_watched.__code__
        if event == "call" and watches:
            called[code.co_name] += 1

    sys.setprofile(note)
    try:
        runner.step(X, target=Y)
    finally:
        sys.setprofile(None)
    return called


def test_a_step_that_nobody_watches_asks_once_whether_someone_does(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(watched) == [{"labels": 1}] * 2
