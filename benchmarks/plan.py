"""How planning grows with the schedule: the speed of each phase, and the memory of all.

    python -m benchmarks.plan [--largest]

1F1B goes through every phase. The same with split backwards (F, I, W) is made and simulated; with `--largest` also for
1024 ranks and 4096 microbatches, which takes about 2 GiB. Each schedule has a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

from benchmarks.results import Result
from pipework.plan import Action, Kind, Layout, Schedule, check, lower, one_f_one_b, prove, simulate

CLAIM = (
    "Thousands of actions per second of processor time, on one core. `figures` are span, bubble, peaks, bound, gap and "
    "critical path; `lower` checks and proves twice, `prove` is one more proof."
)
PHASES = ("make", "check", "simulate", "figures", "lower", "prove")
SIZES = ((4, 32), (16, 128), (64, 512))  # ranks, microbatches
LARGEST = (1024, 4096)


def split_one_f_one_b(layout: Layout, microbatches: int) -> Schedule:
    """1F1B with split backwards, in which every rank does the weight gradient after the next forward."""

    def order(rank: int) -> tuple[Action, ...]:
        (stage,) = layout.held_by(rank)
        ahead = min(microbatches, layout.behind(stage) + 1)
        actions = [Action(stage, Kind.FORWARD, microbatch) for microbatch in range(ahead)]
        for microbatch in range(microbatches):
            actions.append(Action(stage, Kind.INPUT_GRADIENT, microbatch))
            if microbatch + ahead < microbatches:
                actions.append(Action(stage, Kind.FORWARD, microbatch + ahead))
            actions.append(Action(stage, Kind.WEIGHT_GRADIENT, microbatch))
        return tuple(actions)

    return Schedule("split_one_f_one_b", layout, microbatches, tuple(map(order, range(layout.ranks))))


FAMILIES = {family.__name__: family for family in (one_f_one_b, split_one_f_one_b)}


def measure(family: str, ranks: int, microbatches: int) -> dict[str, Any]:
    """Seconds by phase, the number of actions, and the most MiB that this process ever had."""
    seconds = dict[str, float]()

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()
        made = work()
        seconds[phase] = time.process_time() - begin
        return made

    schedule: Schedule = timed("make", lambda: FAMILIES[family](Layout.loop(ranks), microbatches))
    timeline = timed("simulate", lambda: simulate(schedule))
    timed("figures", lambda: (timeline.span, timeline.bubble, timeline.peaks, timeline.gap, timeline.critical_path()))
    if family == "one_f_one_b":
        timed("check", lambda: check(schedule))
        programs = timed("lower", lambda: lower(schedule))
        timed("prove", lambda: prove(programs))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"actions": sum(map(len, schedule.orders)), "seconds": seconds, "MiB": memory}


def benchmark(largest: bool = False, sizes: tuple[tuple[int, int], ...] = SIZES) -> Result:
    cases = [(family, *size) for family in FAMILIES for size in sizes]
    if largest:
        cases.append((split_one_f_one_b.__name__, *LARGEST))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(measure, cases, chunksize=1)
    rows = [
        [
            family,
            f"{ranks} x {microbatches}",
            f"{each['actions']:,}",
            *(f"{each['actions'] / each['seconds'][p] / 1e3:.0f}" if p in each["seconds"] else "" for p in PHASES),
            f"{sum(each['seconds'].values()):.1f}",
            f"{each['MiB']:.0f}",
        ]
        for (family, ranks, microbatches), each in zip(cases, found, strict=True)
    ]
    columns = ["schedule", "ranks x microbatches", "actions", *PHASES, "seconds in all", "MiB"]
    data = {"runs": [{"case": case, **each} for case, each in zip(cases, found, strict=True)]}
    return Result("plan", CLAIM, columns, rows, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", action="store_true")
    benchmark(parser.parse_args().largest).write()


if __name__ == "__main__":
    main()
