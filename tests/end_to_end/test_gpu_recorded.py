"""Recorded steps and labels on GPUs: the times are the GPU's, and asking for them later is all that waits for it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

import pipework
from pipework import PipeworkError, Runner, Timeline
from tests.end_to_end.case import squared
from tests.run.test_labels import TEXT, written
from tests.run.test_runner import assert_really_ran
from tests.split.equality import before

pytestmark = pytest.mark.gpu

one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

SIZE, MICROBATCHES = 4096, 4
RESOLUTION = 1e-6  # seconds; of an event's time, which is told in float32
APART = 1e-4  # seconds; between the clocks of two GPUs, or of one and the host


class Heavy(nn.Module):
    """Few calls for the host, much work for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.linear(x))
        return x


def heavy(record: bool, group: Any = None, devices: tuple[str, str] = ("cuda", "cuda")) -> tuple[Runner, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(MICROBATCHES * SIZE, SIZE)
    pipe = pipework.pipeline(nn.Sequential(Heavy(), Heavy()), (x[:SIZE],), split_spec=before("1"))
    for index, device in enumerate(devices):
        pipe.get_stage_module(index).to(device)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(2), MICROBATCHES)
    return Runner(pipe, schedule, loss=squared, group=group, record=record), x.to(devices[0])


def timed(device: str) -> tuple[float, float]:
    """Seconds of a `Heavy` going forward: the GPU's, and those that the host takes to ask for it; the least of some."""
    module, x = Heavy().to(device), torch.randn(SIZE, SIZE, device=device)
    module(x)  # loads the kernels
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(torch.device(device))
    alone: list[float] = []
    asked: list[float] = []
    for _ in range(20):  # in which other processes may have the host for a while
        begin, end = events()
        start = time.perf_counter()
        begin.record(stream)
        module(x)
        end.record(stream)
        asked.append(time.perf_counter() - start)
        end.synchronize()
        alone.append(begin.elapsed_time(end) / 1e3)
    return min(alone), min(asked)


def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def assert_times_are_the_gpus(timeline: Timeline, device: str) -> None:
    alone, asked = timed(device)
    assert asked < alone / 4, "this host is too slow to tell its own time from the GPU's"
    for span in timeline.spans:
        assert span.end - span.start > alone / 2, f"{span.action}: no forward or backward is that short"


@one_gpu
def test_threads_on_one_gpu() -> None:
    runner, x = heavy(record=True)
    runner.step(x, target=x)  # loads the kernels
    torch.cuda.synchronize()
    begin, end = events()
    earliest = time.perf_counter()
    begin.record()
    runner.step(x, target=x)
    end.record()
    assert not end.query(), "the step waited for the GPU"
    timeline = runner.recorded
    end.synchronize()
    latest = time.perf_counter()
    assert_really_ran(timeline, timeline.schedule, RESOLUTION)
    assert_times_are_the_gpus(timeline, "cuda")
    step = begin.elapsed_time(end) / 1e3 + RESOLUTION
    assert timeline.makespan <= step
    for rank in range(2):
        assert sum(span.end - span.start for span in timeline.rank(rank)) <= step
    assert earliest - APART <= timeline.start
    assert timeline.start + timeline.makespan <= latest + APART
    assert runner.recorded == timeline  # read once
    runner.evaluate(x, target=x)
    assert_really_ran(runner.recorded, runner.recorded.schedule, RESOLUTION)
    pipework.simulate(runner.schedule, pipework.plan.measured([timeline]))


@one_gpu
def test_a_gpu_is_recorded_on_request() -> None:
    runner, x = heavy(record=False)
    runner.step(x, target=x)
    with pytest.raises(PipeworkError, match="no step was recorded"):
        _ = runner.recorded


@one_gpu
def test_nvtx_ranges_on_rank_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, x = heavy(record=False)
    runner.step(x, target=x)
    pushed: defaultdict[int, list[str]] = defaultdict(list)
    push = torch.cuda.nvtx.range_push

    def note(text: str) -> int:
        pushed[get_ident()].append(text)
        return push(text)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", note)
    runner.step(x, target=x)
    assert not pushed
    with torch.autograd.profiler.emit_nvtx():
        runner.step(x, target=x)
    assert sorted(pushed.values()) == sorted(written(runner.schedule, rank) for rank in range(2))


@one_gpu
def test_labels_in_a_profile_with_kernels(tmp_path: Path) -> None:
    runner, x = heavy(record=True)
    runner.step(x, target=x)
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], experimental_config=config) as made:
        runner.step(x, target=x)
    made.export_chrome_trace(str(tmp_path / "trace.json"))
    lasting = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    found: defaultdict[int, list[str]] = defaultdict(list)
    for event in sorted(lasting, key=lambda event: event["ts"]):
        if event["cat"] == "user_annotation" and TEXT.fullmatch(event["name"]):
            found[event["tid"]].append(event["name"])
    assert sorted(found.values()) == sorted(written(runner.schedule, rank) for rank in range(2))
    assert any(event["cat"] == "kernel" for event in lasting)
    assert_really_ran(runner.recorded, runner.recorded.schedule, RESOLUTION)


@two_gpus
def test_threads_with_a_gpu_each() -> None:
    runner, x = heavy(record=True, devices=("cuda:0", "cuda:1"))
    for _ in range(2):
        runner.step(x, target=x.to("cuda:1"))
        assert_really_ran(runner.recorded, runner.schedule, APART)
    assert_times_are_the_gpus(runner.recorded, "cuda:0")


def over_nccl(rank: int, store: str) -> None:
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    runner, x = heavy(record=True, group=dist.group.WORLD)
    for _ in range(2):
        runner.step(x, target=x)
        assert_really_ran(runner.recorded, runner.schedule, APART)
    assert_times_are_the_gpus(runner.recorded, "cuda")
    told = runner.exchange(runner.recorded.spans)
    assert told[0] == told[1]
    dist.destroy_process_group()


@two_gpus
def test_processes_over_nccl(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(over_nccl, (str(tmp_path / "store"),), nprocs=2)
