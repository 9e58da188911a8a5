from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import _Action

from pipework.errors import InputError, PipeworkError, ScheduleError
from pipework.plan import Action, Compute, Costs, Kind, Layout, Program, Schedule, check, gpipe, lower, simulate
from pipework.plan.files import read_csv, read_json, read_programs, write_csv, write_json, write_programs
from tests.strategies import is_legal, schedules

ARTIFACTS = json.loads((Path(__file__).parent / "data" / "rows.json").read_text())
READERS: list[Callable[[Any], object]] = [read_csv, read_programs, read_json]
PEERS = [("Interleaved1F1B", 2, 4), ("LoopedBFS", 2, 3), ("InterleavedZeroBubble", 4, 8), ("ZBVZeroBubble", 4, 8)]
PEERS += [("DualPipeV", 2, 6)]


whole_sequences = schedules().filter(lambda schedule: schedule.slices == 1).map(lambda s: s.recomputing([]))


def written(write: Callable[[Any, Any], None], what: object) -> str:
    file = io.StringIO()
    write(what, file)
    return file.getvalue()


def rows_of(name: str) -> io.StringIO:
    return io.StringIO("\n".join(ARTIFACTS[name]["rows"]) + "\n")


def peer_rows(name: str, ranks: int, microbatches: int, comms: bool, per_rank: int = 2) -> str:
    rows = get_schedule_ops(name, ranks, microbatches, per_rank, with_comms=comms)
    return "".join(",".join("" if cell is None else str(cell) for cell in row) + "\r\n" for row in rows)


@given(schedules())
def test_json_gives_back_the_very_schedule(schedule: Schedule) -> None:
    found = read_json(io.StringIO(written(write_json, schedule)))
    assert found == schedule
    assert found.fingerprint == schedule.fingerprint


@pytest.mark.parametrize(
    "more",
    [
        {"name": 'ä "quoted"\n\0 name'},
        {"slices": 2},
        {"recomputed": frozenset({0})},
        {"overlapped": frozenset({Action.parse("0F0")})},
        {"layout": Layout((0, 1, 1, 0), frozenset({(0, 1), (2, 3), (0, 2)}), frozenset({(0, 1)}))},
        {"microbatches_of": ((0, 1), (0, 1), (2, 3), (2, 3)), "layout": Layout.bidirectional(2)},
    ],
    ids=str,
)
def test_json_keeps_all_there_is_to_a_schedule(more: dict[str, Any], tmp_path: Path) -> None:
    schedule = replace(gpipe(Layout.loop(2), microbatches=4), **more)
    write_json(schedule, tmp_path / "plan.json")
    found = read_json(tmp_path / "plan.json", checked=False)
    assert (found, found.fingerprint) == (schedule, schedule.fingerprint)


@given(whole_sequences)
def test_rows_give_back_the_orders(schedule: Schedule) -> None:
    found = read_csv(io.StringIO(written(write_csv, schedule)), schedule.layout)
    assert (found.orders, found.overlapped) == (schedule.orders, schedule.overlapped)
    assert all(list(found.taken_by(s)) == list(schedule.taken_by(s)) for s in range(schedule.layout.stages))


@given(whole_sequences)
def test_programs_come_back_where_each_cell_has_one_other_end(schedule: Schedule) -> None:
    layout, programs = schedule.layout, lower(schedule)
    ends = (layout.feeds, layout.fed_by, layout.gradient_from, layout.gradient_to)
    if any(len(others(stage)) > 1 for others in ends for stage in range(layout.stages)):
        with suppress(ScheduleError):
            assert read_programs(io.StringIO(written(write_programs, programs)), layout) == programs
    else:
        assert read_programs(io.StringIO(written(write_programs, programs)), layout) == programs


@pytest.mark.parametrize(("name", "ranks", "microbatches"), PEERS)
def test_torch_and_we_read_each_other(name: str, ranks: int, microbatches: int) -> None:
    rows = peer_rows(name, ranks, microbatches, comms=False)
    schedule = read_csv(io.StringIO(rows))
    ours = written(write_csv, schedule)
    assert [str(_Action.from_str(cell)) for cell in ours.replace("\n", ",").split(",")[:-1]] == [
        cell for cell in rows.replace("\r\n", ",").split(",") if cell
    ]
    programs = read_programs(io.StringIO(peer_rows(name, ranks, microbatches, comms=True)))  # proven, too
    assert orders_of(programs) == schedule.orders
    assert read_programs(io.StringIO(written(write_programs, programs))) == programs


def orders_of(programs: tuple[Program, ...]) -> tuple[tuple[Action, ...], ...]:
    return tuple(
        tuple(each.action for each in program.instructions if isinstance(each, Compute)) for program in programs
    )


def test_torchs_dual_pipe_v_runs_as_long_as_it_should() -> None:
    artifact = ARTIFACTS["dualpipev"]
    schedule = read_csv(rows_of("dualpipev"))
    assert schedule.layout.rank_of == Layout.vee(4).rank_of
    pairs = [sum(action in schedule.overlapped for action in order) for order in schedule.orders]
    assert (pairs, list(simulate(schedule).peaks)) == (artifact["pairs"], artifact["peaks"])
    for *times, makespan in artifact["makespans"]:
        assert simulate(schedule, Costs(*times)).makespan == makespan
    assert written(write_csv, schedule) == rows_of("dualpipev").getvalue()


def test_the_older_form_of_rows_is_recognized() -> None:
    programs = read_programs(rows_of("zb1p_comms"))
    split = tuple(tuple(part for action in order for part in parts(action)) for order in orders_of(programs))
    assert split == read_csv(io.StringIO(peer_rows("InterleavedZeroBubble", 2, 8, comms=False))).orders
    # Where I and W of one microbatch follow each other, the file has one full backward.
    whole = [
        (one, other)
        for order in orders_of(programs)
        for one, other in pairwise(order)
        if (one.kind, other) == (Kind.INPUT_GRADIENT, replace(one, kind=Kind.WEIGHT_GRADIENT))
    ]
    assert whole == []
    with pytest.raises(ScheduleError, match="2BW0 is of no known kind"):
        read_programs(rows_of("zb1p_comms"), dialect="current")


def parts(action: Action) -> list[Action]:
    if action.kind is not Kind.BACKWARD:
        return [action]
    return [replace(action, kind=Kind.INPUT_GRADIENT), replace(action, kind=Kind.WEIGHT_GRADIENT)]


def test_torchs_drawing_of_1f1b_is_not_what_it_runs() -> None:
    with pytest.raises(ScheduleError, match="0F8 is never done"):
        read_csv(io.StringIO(peer_rows("1F1B", 4, 8, comms=False, per_rank=1)))


def test_what_shards_parameters_is_passed_over() -> None:
    rows = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD\n1UNSHARD,1RECV_F0,1F0,1B0,1SEND_B0,1RESHARD"
    assert read_programs(io.StringIO(rows)) == lower(gpipe(Layout.loop(2), microbatches=1), window=0)


PLAN = json.loads(written(write_json, gpipe(Layout.loop(2), microbatches=2)))


def changed(**fields: object) -> str:
    return json.dumps({**PLAN, **fields})


@pytest.mark.parametrize(
    ("reader", "given", "said"),
    [
        (read_csv, "", "the file holds no action"),
        (read_csv, "0F0,0B0,0X1\n", "line 1, column 9"),
        (read_csv, "0F0\n1F0,1F\n", "'1F' is not an action"),
        (read_csv, "0F0, 0F01\n", "line 1, column 5"),
        (read_csv, "0F0,0\0F1\n", "is not an action"),
        (read_csv, "0F٣\n", "is not an action"),
        (read_csv, '"0F0","0B0"\n', "is not an action"),
        (read_csv, "0F0,(0F1;0B0)\n", "is not an action"),
        (read_csv, "(0F0;0UNSHARD)OVERLAP_F_B\n", "is not an action"),
        (read_csv, "0F0,0F999999999\n", "0F999999999 is of microbatch 999999999, but nothing is of microbatch 1"),
        (read_csv, f"0F{'9' * 10_000}\n", "is not an action"),
        (read_csv, "999999999F0\n", "nothing is of stage 0"),
        (read_csv, "0F0,0B0\n0F1,0B1\n", "0F1 is on rank 1, but stage 0 on rank 0"),
        (read_csv, "0F0,0B0\n\n1F0,1B0\n", "rank 1 holds no stage"),
        (read_csv, "0F0,0B0\n\n", "the file has 2 rows, but there are 1 ranks"),
        (read_csv, "0F0,0SEND_F0\n1F0\n", "0SEND_F0 is a transfer, not an action"),
        (read_csv, "0F0,0I0,0BW0\n", "it is not clear what B means"),
        (read_csv, "0F0,0B0\n1B0,1F0\n", "cannot proceed"),
        (read_csv, ",\n" * 1_500_000, "more than 2000000 cells"),
        (read_programs, "0F0,0SEND_F0\n1F0\n", "1F0 comes before receive 0F0>1"),
        (read_programs, "0F0\n1RECV_F0,1F0\n", "send 0F0>1 is missing"),
        (read_programs, "0F0,0SEND_F0,0SEND_F0\n1RECV_F0,1F0\n", "send 0F0>1 comes twice"),
        (read_programs, "0F0,0SEND_F0,0SEND_F1\n1RECV_F0,1F0\n", "send 0F1>1"),
        (read_programs, "0F0,0SEND_F0\n1RECV_F0,1F0,1SEND_F0\n", "1SEND_F0 does not say with which stage"),
        (read_programs, "0F0,7SEND_F0\n1RECV_F0,1F0\n", "7SEND_F0 is of an unknown stage"),
        (read_programs, "0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F1,1RECV_F0,1F0,1F1\n", "the programs cannot finish"),
        (read_json, "", "line 1, column 1"),
        (read_json, '{"format": 1,\n "name": }', "line 2, column 10"),
        (read_json, "[" * 100_000, "is not the JSON of a schedule"),
        (read_json, '{"a":' * 100_000, "is not the JSON of a schedule"),
        (read_json, "[]", "it is no object"),
        (read_json, "{}", "must be 1"),
        (read_json, changed(format=2), "not of a format that is known"),
        (read_json, changed(colour="red"), "the field 'colour' is not known"),
        (read_json, json.dumps({k: v for k, v in PLAN.items() if k != "edges"}), "the field 'edges' is missing"),
        (read_json, changed()[:-1] + ', "name": "other"}', "names a field twice"),
        (read_json, changed(name=7), "a text is expected"),
        (read_json, changed(name="\ud800"), "a text is expected"),
        (read_json, changed(microbatches=2.0), "2.0 is not a whole number"),
        (read_json, changed(microbatches=float("nan")), "NaN is not a whole number"),
        (read_json, changed(microbatches=10**12), "is too large"),
        (read_json, changed(microbatches=999_999_999), "999999999 microbatches do not go with 8 actions"),
        (read_json, changed(microbatches=True), "a number of 1 or more is expected"),
        (read_json, changed(slices=0), "slices"),
        (read_json, changed(slices=999_999_999), "sequences of 999999999 slices"),
        (read_json, changed(rank_of=[0, 999_999_999]), "a stage is on rank 999999999"),
        (read_json, changed(rank_of=[0, "1"]), "rank_of"),
        (read_json, changed(rank_of=[[0], [1]]), "rank_of"),
        (read_json, changed(rank_of=[]), "a layout without stages"),
        (read_json, changed(edges=[[0, 1, 2]]), "pairs of stages"),
        (read_json, changed(edges=[[0, 5]]), "touches stage 5"),
        (read_json, changed(gradients=None), "gradients"),
        (read_json, changed(microbatches_of=[[0, 1], [0, 1], [0]]), "gives microbatches for 3 stages"),
        (read_json, changed(microbatches_of=[{}, {}]), "a list of numbers is expected"),
        (read_json, changed(overlapped=[["0F0"]]), "overlapped, action 0"),
        (read_json, changed(orders=["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1X1"]), "orders[1], action 3"),
        (read_json, changed(orders=["0F0  0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]), "orders[0], action 1"),
        (read_json, changed(orders=["0F0 0F1 0B0 0B1"]), "a stage is on rank 1, but there are orders for 1"),
        (read_json, changed(orders=["0F0 0F1 0B0 0B1", f"1F{'9' * 5000}"]), "an action such as 2F0 is expected"),
        (read_json, changed(orders=["0F0 0F1 0B0 0B1", "1F0 1F1 1B0"]), "1B1 is never done"),
    ],
)
def test_what_is_no_schedule_is_refused_and_said_where(reader: Any, given: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(given.encode(errors="surrogatepass"))
    with pytest.raises(PipeworkError) as refusal:
        reader(path)
    assert said in str(refusal.value)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_text_is_refused(reader: Any, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"0F0,\xe4")
    with pytest.raises(ScheduleError, match="not text in UTF-8"):
        reader(tmp_path / "latin")
    with (tmp_path / "huge").open("wb") as huge:
        os.truncate(huge.fileno(), 2**30)  # a line of a gigabyte, of which only the beginning is ever read
    with pytest.raises(ScheduleError, match="too large"):
        reader(tmp_path / "huge")
    for missing in (tmp_path / "missing", tmp_path, "nul\0nul"):
        with pytest.raises(InputError, match="cannot read"):
            reader(missing)
    with pytest.raises(InputError, match="cannot write"):
        write_csv(gpipe(Layout.loop(2), microbatches=1), tmp_path / "no" / "folder.csv")


def test_slices_are_left_to_json() -> None:
    with pytest.raises(ScheduleError, match="write it as JSON"):
        write_csv(replace(gpipe(Layout.loop(2), microbatches=2), slices=2), io.StringIO())


PIECES = [
    "",
    "0",
    "9" * 12,
    "-1",
    "1e9",
    "NaN",
    "null",
    "true",
    "[",
    "]",
    "{",
    "}",
    '"',
    ",",
    ":",
    ";",
    "(",
    "\n",
    "\0",
]
PIECES += [
    "F",
    "B",
    "BW",
    "I",
    "W",
    "SEND_F",
    "RECV_B",
    "OVERLAP_F_B",
    "UNSHARD",
    "é",
    "\u2028",
    "\ud800",
    " ",
    "\\u0000",
]


@st.composite
def broken(draw: st.DrawFn) -> tuple[Any, bytes]:
    """A valid file, and what is left of it after a few changes, with the reader that is for it."""
    schedule = draw(whole_sequences)
    reader = draw(st.sampled_from(READERS))
    if reader is read_json:
        whole = written(write_json, schedule)
    elif reader is read_csv:
        whole = written(write_csv, schedule)
    else:
        whole = written(write_programs, lower(gpipe(Layout.loop(3), microbatches=2)))
    for _ in range(draw(st.integers(1, 4))):
        begin, end, other = sorted(draw(st.integers(0, len(whole))) for _ in range(3))
        piece = draw(st.sampled_from([*PIECES, whole[end:other]]))
        end = min(end, begin + draw(st.sampled_from((0, 1, 5, 1000))))
        whole = whole[:begin] + piece + whole[end:]
    return reader, whole.encode(errors="surrogatepass")


@settings(max_examples=300)
@given(broken())
def test_a_broken_file_is_refused_or_is_a_schedule(case: tuple[Any, bytes]) -> None:
    reader, content = case
    try:
        found = reader(io.BytesIO(content))
    except PipeworkError:
        return
    if isinstance(found, Schedule):
        check(found)
        assert is_legal(found) or found.microbatches_of is not None or found.slices > 1


@settings(max_examples=200)
@given(st.sampled_from(READERS), st.binary(max_size=60) | st.text(max_size=60))
def test_random_content_is_refused(reader: Any, content: bytes | str) -> None:
    with pytest.raises(PipeworkError):
        reader(io.BytesIO(content) if isinstance(content, bytes) else io.StringIO(content))


def test_what_is_not_checked_may_be_anything_that_is_written_well() -> None:
    found = read_csv(io.StringIO("0B0,0F0\n1F0,1B0\n"), checked=False)
    assert [str(action) for action in found.orders[0]] == ["0B0", "0F0"]
