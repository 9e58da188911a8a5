"""Random layouts and schedules, legal and broken; and what legal means, said once more, apart from the library."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

from hypothesis import strategies as st

from pipework.plan import Action, Kind, Layout, Schedule

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT  # noqa: E741 - the papers' letter


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """1 to 4 ranks, up to 7 stages placed anyhow, any edges that lead forward, gradients over any of them."""
    ranks = draw(st.integers(1, 4))
    others = draw(st.lists(st.integers(0, ranks - 1), max_size=7 - ranks))
    rank_of = draw(st.permutations([*range(ranks), *others]))
    chain = {(u, v) for u, v in combinations(range(len(rank_of)), 2) if v - u == 1}
    edges = {edge for edge in combinations(range(len(rank_of)), 2) if draw(st.integers(0, 3)) == 0}
    edges |= chain if draw(st.booleans()) else set()
    silent = {edge for edge in sorted(edges) if draw(st.integers(0, 4)) == 0}
    return Layout(tuple(rank_of), frozenset(edges), frozenset(edges - silent))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A legal schedule: at each point a random one of the actions whose needs are met, until none is left."""
    layout = draw(layouts())
    microbatches = draw(st.integers(1, 4))
    trains = draw(st.integers(0, 4)) > 0
    random = Random(draw(st.integers(0, 2**32)))
    splitting = random.choice((0.0, 0.5, 1.0))
    left: list[Action] = []
    for stage in range(layout.stages):
        for microbatch in range(microbatches):
            backward = ((I, W) if random.random() < splitting else (B,)) if trains else ()
            left += [Action(stage, kind, microbatch) for kind in (F, *backward)]
    orders: list[list[Action]] = [[] for _ in range(layout.ranks)]
    done: set[Action] = set()
    # Some schedules prefer forwards, some backwards; otherwise few would hold many activations, or few.
    eager = random.choice((0.0, 0.5, 1.0))
    while left:
        ready = [action for action in left if is_ready(action, layout, done)]
        preferred = [action for action in ready if (action.kind is F) == (random.random() < eager)]
        action = random.choice(preferred or ready)
        left.remove(action)
        done.add(action)
        orders[layout.rank_of[action.stage]].append(action)
    return Schedule("random", layout, microbatches, tuple(map(tuple, orders)))


@st.composite
def tampered(draw: st.DrawFn) -> Schedule:
    """A legal schedule after one to three changes of which any may have broken it, or not."""
    schedule = draw(schedules())
    orders = [list(order) for order in schedule.orders]
    for _ in range(draw(st.integers(1, 3))):
        order = orders[draw(st.integers(0, len(orders) - 1))]
        if not order:
            continue
        here, there = (draw(st.integers(0, len(order) - 1)) for _ in range(2))
        match draw(st.sampled_from(("swap", "move", "delete", "duplicate", "elsewhere", "other"))):
            case "swap":
                order[here], order[there] = order[there], order[here]
            case "move":
                order.insert(there, order.pop(here))
            case "delete":
                del order[here]
            case "duplicate":
                order.insert(there, order[here])
            case "elsewhere":
                orders[draw(st.integers(0, len(orders) - 1))].append(order.pop(here))
            case _:
                field = draw(st.sampled_from(("stage", "microbatch", "kind")))
                value = draw(st.sampled_from(Kind) if field == "kind" else st.integers(0, 7))
                order[here] = replace(order[here], **{field: value})
    return replace(schedule, orders=tuple(map(tuple, orders)))


def is_ready(action: Action, layout: Layout, done: set[Action]) -> bool:
    """Whether all that `action` waits for is done."""

    def went_back(stage: int) -> bool:
        return Action(stage, B, action.microbatch) in done or Action(stage, I, action.microbatch) in done

    if action.kind is F:
        return all(Action(u, F, action.microbatch) in done for u, v in layout.edges if v == action.stage)
    if action.kind is W:
        return Action(action.stage, I, action.microbatch) in done
    assert layout.gradients is not None
    own = Action(action.stage, F, action.microbatch) in done
    return own and all(went_back(v) for u, v in layout.gradients if u == action.stage)


def is_legal(schedule: Schedule) -> bool:
    """Whether every stage does every microbatch once, at home, and sweeping over the ranks gets to the end."""
    layout = schedule.layout
    everything = [action for order in schedule.orders for action in order]
    every = {(stage, microbatch) for stage in range(layout.stages) for microbatch in range(schedule.microbatches)}
    trains = any(action.kind is not F for action in everything)
    if {(action.stage, action.microbatch) for action in everything} != every:
        return False
    for stage, microbatch in every:
        kinds = sorted(a.kind.value for a in everything if (a.stage, a.microbatch) == (stage, microbatch))
        if kinds not in ((["B", "F"], ["F", "I", "W"]) if trains else (["F"],)):
            return False
    if any(layout.rank_of[action.stage] != rank for rank, order in enumerate(schedule.orders) for action in order):
        return False
    orders = [list(order) for order in schedule.orders]
    done: set[Action] = set()
    while moving := [order for order in orders if order and is_ready(order[0], layout, done)]:
        done.add(moving[0].pop(0))
    return not any(orders)


@st.composite
def trainings(draw: st.DrawFn, stages: int, edges: frozenset[tuple[int, int]], microbatches: int) -> Schedule:
    """A legal schedule for stages with these edges, placed anyhow on 1 to 4 ranks, some of its backwards split."""
    ranks = draw(st.integers(1, min(4, stages)))
    rank_of = draw(st.permutations([*range(ranks), *(draw(st.integers(0, ranks - 1)) for _ in range(stages - ranks))]))
    layout = Layout(tuple(rank_of), edges)
    random = Random(draw(st.integers(0, 2**32)))
    eager, splitting = random.choice((0.0, 0.5, 1.0)), random.choice((0.0, 0.5, 1.0))
    left = [
        Action(stage, kind, microbatch)
        for stage in range(stages)
        for microbatch in range(microbatches)
        for kind in (F, *((I, W) if random.random() < splitting else (B,)))
    ]
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while left:
        ready = [action for action in left if is_ready(action, layout, done)]
        preferred = [action for action in ready if (action.kind is F) == (random.random() < eager)]
        action = random.choice(preferred or ready)
        left.remove(action)
        done.add(action)
        orders[layout.rank_of[action.stage]].append(action)
    return Schedule("random", layout, microbatches, tuple(map(tuple, orders)))
