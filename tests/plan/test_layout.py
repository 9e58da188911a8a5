from __future__ import annotations

import pytest
from hypothesis import given

from pipework.errors import ScheduleError
from pipework.plan import Layout
from tests.strategies import layouts


@given(layouts())
def test_every_question_is_answered_from_the_edges(layout: Layout) -> None:
    assert layout.gradients is not None
    for stage in range(layout.stages):
        assert layout.feeds(stage) == tuple(sorted(v for u, v in layout.edges if u == stage))
        assert layout.fed_by(stage) == tuple(sorted(u for u, v in layout.edges if v == stage))
        assert layout.gradient_from(stage) == tuple(sorted(v for u, v in layout.gradients if u == stage))
        assert layout.gradient_to(stage) == tuple(sorted(u for u, v in layout.gradients if v == stage))
        assert layout.behind(stage) == len(layout.rank_of[stage:]) - 1
    held = [(stage, rank) for rank in range(layout.ranks) for stage in layout.held_by(rank)]
    assert sorted(held) == list(enumerate(layout.rank_of))


def test_loop_and_vee() -> None:
    assert Layout.loop(3, per_rank=2).rank_of == (0, 1, 2, 0, 1, 2)
    assert Layout.loop(3).edges == {(0, 1), (1, 2)}
    assert Layout.loop(3, skips=[(0, 2)]).feeds(0) == (1, 2)
    assert Layout.vee(3).rank_of == (0, 1, 2, 2, 1, 0)
    assert Layout.vee(1).edges == {(0, 1)}
    assert Layout.loop(1).edges == frozenset()


def test_two_replicas_in_opposite_directions() -> None:
    layout = Layout.bidirectional(3)
    assert layout.rank_of == Layout.vee(3).rank_of
    assert layout.edges == Layout.vee(3).edges - {(2, 3)}


def test_gradients_come_back_over_all_edges_unless_said_otherwise() -> None:
    edges = frozenset({(0, 1), (0, 2), (1, 2)})
    assert Layout((0, 1, 2), edges) == Layout((0, 1, 2), edges, edges)
    some = Layout((0, 1, 2), edges, frozenset({(1, 2)}))
    assert [some.gradient_from(stage) for stage in range(3)] == [(), (2,), ()]
    assert [some.gradient_to(stage) for stage in range(3)] == [(), (), (1,)]


@pytest.mark.parametrize(
    ("rank_of", "edges", "gradients", "says"),
    [
        ((), [], None, "without stages"),
        ((0, 2), [], None, "rank 1 holds no stage"),
        ((0, -1), [], None, "rank -1"),
        ((0, 1), [(0, 2)], None, "edge 0>2 touches stage 2"),
        ((0, 1), [(-1, 1)], None, "edge -1>1 touches stage -1"),
        ((0, 1), [(1, 0)], None, "edge 1>0 does not lead to a later stage"),
        ((0, 1), [(1, 1)], None, "edge 1>1 does not lead to a later stage"),
        ((0, 1), [], [(0, 1)], "over edge 0>1, over which nothing goes forward"),
    ],
)
def test_contradictions_are_refused(
    rank_of: tuple[int, ...], edges: list[tuple[int, int]], gradients: list[tuple[int, int]] | None, says: str
) -> None:
    with pytest.raises(ScheduleError, match=says):
        Layout(rank_of, frozenset(edges), None if gradients is None else frozenset(gradients))


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ScheduleError, match="ranks=0"):
        Layout.loop(0)
    with pytest.raises(ScheduleError, match="per_rank=0"):
        Layout.loop(2, per_rank=0)
    with pytest.raises(ScheduleError, match="ranks=0"):
        Layout.vee(0)
