from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from hypothesis import given

from pipework.plan import Layout, Schedule, one_f_one_b
from tests.strategies import schedules, tampered


@given(tampered(), schedules())
def test_equal_fingerprints_mean_equal_schedules(one: Schedule, other: Schedule) -> None:
    assert replace(one).fingerprint == one.fingerprint
    assert (one == other) == (one.fingerprint == other.fingerprint)


def test_every_part_is_in_the_fingerprint() -> None:
    schedule = one_f_one_b(Layout.loop(3), 4)
    edges = schedule.layout.edges
    others = [
        replace(schedule, name="other"),
        replace(schedule, microbatches=5),
        replace(schedule, orders=schedule.orders[::-1]),
        replace(schedule, overlapped=frozenset(schedule.orders[0][:1])),
        replace(schedule, overlapped=frozenset(schedule.orders[0][:2])),
        replace(schedule, slices=2),
        schedule.recomputing(),
        schedule.recomputing([1, 2]),
        replace(schedule, microbatches_of=((0, 1), (2, 3), ())),
        replace(schedule, microbatches_of=((0, 1), (2,), (3,))),
        schedule.with_layout(Layout((0, 1, 2), edges | {(0, 2)})),
        schedule.with_layout(Layout((0, 1, 2), edges, frozenset())),
        schedule.with_layout(Layout((0, 2, 1), edges)),
    ]
    assert len({each.fingerprint for each in (schedule, *others)}) == len(others) + 1


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    code = "from pipework.plan import *; print(one_f_one_b(Layout.loop(3, skips=[(0, 2)]), 4).fingerprint)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == one_f_one_b(Layout.loop(3, skips=[(0, 2)]), 4).fingerprint


def test_another_layout_keeps_the_orders() -> None:
    schedule = one_f_one_b(Layout.loop(3), 4)
    skipping = schedule.with_layout(Layout.loop(3, skips=[(0, 2)]))
    assert skipping.orders == schedule.orders
    assert skipping == one_f_one_b(Layout.loop(3, skips=[(0, 2)]), 4)


def test_describe() -> None:
    assert one_f_one_b(Layout.loop(1), 2).describe() == "one_f_one_b: 1 rank, 1 stage, 2 microbatches, 4 actions"
    assert one_f_one_b(Layout.loop(2), 1).recomputing([1]).describe().endswith("4 actions, 1 stage recomputed")
