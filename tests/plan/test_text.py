from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.plan import (
    Costs,
    Layout,
    Schedule,
    Span,
    Timeline,
    forward_only,
    grid,
    interleaved_one_f_one_b,
    one_f_one_b,
    simulate,
)
from tests.plan.test_simulate import simulations


@given(simulations(), st.integers(20, 150))
def test_it_never_gets_wider_than_asked(simulation: tuple[Schedule, Costs], width: int) -> None:
    schedule, costs = simulation
    lines = grid(simulate(schedule, costs), width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[:2] for line in lines[: schedule.layout.ranks]] == [
        ["rank", str(rank)] for rank in range(schedule.layout.ranks)
    ]


@given(simulations())
def test_with_room_every_action_is_in_its_place(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    timeline = simulate(schedule, costs)
    lines = grid(timeline, 20_000).splitlines()
    several = any(len(schedule.layout.held_by(rank)) > 1 for rank in range(schedule.layout.ranks))
    for rank, line in enumerate(lines[: schedule.layout.ranks]):
        cells = [cell for cell in line[len("rank 0  ") :].replace("-", ".").split(".") if cell]
        visible = [span.action for span in timeline.rank(rank) if span.end > span.start]
        names = [str(action) if several else str(action).lstrip("0123456789") for action in visible]
        assert "".join(cells) == "".join(names)


@pytest.mark.parametrize(
    ("width", "row"),
    [
        (100, "rank 1  ..F0B0--F1B1--F2B2--...."),
        (32, "rank 1  ..F0B0--F1B1--F2B2--...."),
        (31, "rank 1  .0B01B12B2.."),
        (14, "rank 1  0BB1B."),
    ],
)
def test_it_gets_terser_as_it_gets_narrower(width: int, row: str) -> None:
    lines = grid(simulate(one_f_one_b(Layout.loop(2), 3)), width).splitlines()
    assert lines[1] == row


def test_four_ranks_and_eight_microbatches_fit_a_terminal() -> None:
    text = simulate(one_f_one_b(Layout.loop(4), 8)).text()
    assert text.splitlines()[0] == "rank 0  F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--"
    assert text.splitlines()[4:] == ["makespan 33, span 33, bubble 27.3 %, peak per rank 4 3 2 1"]
    text = simulate(interleaved_one_f_one_b(Layout.loop(4, 2), 8)).text()
    assert text.splitlines()[3] == "rank 3  ...01230B01B12B23B34B05B16B27B34B45B56B67B7B4B5B6B7......"


def test_recorded_times_use_the_whole_width() -> None:
    schedule = forward_only(Layout.loop(2), 2)
    times = ((0.0, 0.011), (0.0113, 0.0247), (0.012, 0.0251), (0.026, 0.041))
    actions = [(rank, action) for rank, order in enumerate(schedule.orders) for action in order]
    spans = tuple(Span(rank, action, *time) for (rank, action), time in zip(actions, times, strict=True))
    assert Timeline.recorded(schedule, spans).text(width=50) == (
        "rank 0  F0---------.F1-----------.................\n"
        "rank 1  ............F0------------.F1-------------\n"
        "makespan 41 ms, span 29 ms, bubble 36.0 %, peak\n"
        "  per rank 2"
    )


def test_bytes_are_shown_as_such() -> None:
    timeline = simulate(one_f_one_b(Layout.loop(2), 4), Costs(activation=3 * 2**20))
    assert timeline.text().endswith("peak per rank 6 MiB 3 MiB")


def test_peaks_are_listed_for_a_few_ranks() -> None:
    few, many = (simulate(one_f_one_b(Layout.loop(ranks), 16)).text() for ranks in (8, 9))
    assert few.endswith("peak per rank 8 7 6 5 4 3 2 1")
    assert many.endswith("peak per rank 1–9")
