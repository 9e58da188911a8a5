"""Random layouts and schedules, legal and broken; and what legal means, said once more, apart from the library."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
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
    """A legal schedule: at each point a random one of the actions whose needs are met, or two of them at once.

    Some have stages that are recomputed.
    """
    layout = draw(layouts())
    slices = draw(st.sampled_from((1, 1, 1, 2, 3)))
    sequences = draw(st.integers(1, max(1, 4 // slices)))
    trains = draw(st.integers(0, 4)) > 0
    random = Random(draw(st.integers(0, 2**32)))
    shares = microbatches_of(layout, sequences, slices, random) if draw(st.integers(0, 3)) == 0 else None
    splitting = random.choice((0.0, 0.5, 1.0))
    left: list[Action] = []
    for stage in range(layout.stages):
        for microbatch in range(sequences * slices) if shares is None else shares[stage]:
            backward = ((I, W) if random.random() < splitting else (B,)) if trains else ()
            left += [Action(stage, kind, microbatch) for kind in (F, *backward)]
    empty = Schedule("random", layout, sequences * slices, (), slices=slices, microbatches_of=shares)
    return ordered(empty, left, random).recomputing(_some(range(layout.stages), random))


def _some(stages: range, random: Random) -> list[int]:
    """None of them, as often as not; else some, or all."""
    share = random.choice((0.0, 0.0, 0.5, 1.0))
    return [stage for stage in stages if random.random() < share]


def microbatches_of(layout: Layout, sequences: int, slices: int, random: Random) -> tuple[tuple[int, ...], ...]:
    """Each sequence to at least one of the parts of the layout between which there are no edges."""
    part_of = list(range(layout.stages))
    for u, v in sorted(layout.edges):
        part_of = [part_of[u] if part == part_of[v] else part for part in part_of]
    parts = sorted(set(part_of))
    takes = [set(random.sample(parts, random.randint(1, len(parts)))) for _ in range(sequences)]
    return tuple(
        tuple(n * slices + k for n in range(sequences) if part_of[stage] in takes[n] for k in range(slices))
        for stage in range(layout.stages)
    )


def ordered(schedule: Schedule, left: list[Action], random: Random) -> Schedule:
    """The schedule with all the actions of `left` in random orders that can go on to the end."""
    layout = schedule.layout
    orders: list[list[Action]] = [[] for _ in range(layout.ranks)]
    done: set[Action] = set()
    overlapped: set[Action] = set()
    # Some schedules prefer forwards, some backwards; otherwise few would hold many activations, or few.
    eager, pairing = random.choice((0.0, 0.5, 1.0)), random.choice((0.0, 0.5))
    while left:
        ready = [action for action in left if is_ready(action, schedule, done)]
        preferred = [action for action in ready if (action.kind is F) == (random.random() < eager)]
        chosen = [random.choice(preferred or ready)]
        rank = layout.rank_of[chosen[0].stage]
        others = [action for action in ready if layout.rank_of[action.stage] == rank and action != chosen[0]]
        if others and random.random() < pairing:
            overlapped.add(chosen[0])
            chosen.append(random.choice(others))
        for action in chosen:
            left.remove(action)
        done.update(chosen)
        orders[rank] += chosen
    return replace(schedule, orders=tuple(map(tuple, orders)), overlapped=frozenset(overlapped))


@st.composite
def tampered(draw: st.DrawFn) -> Schedule:
    """A legal schedule after one to three changes of which any may have broken it, or not."""
    schedule = draw(schedules())
    for _ in range(draw(st.integers(1, 3))):
        schedule = draw(_data_changed(schedule)) if draw(st.integers(0, 2)) == 0 else draw(_order_changed(schedule))
    return schedule


@st.composite
def _data_changed(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    stages, microbatches = schedule.layout.stages, schedule.microbatches
    match draw(st.sampled_from(("overlapped", "slices", "microbatches", "microbatches_of", "recomputed"))):
        case "overlapped":
            everything = [action for order in schedule.orders for action in order] or [Action(0, F, 0)]
            strange = Action(draw(st.integers(0, stages)), draw(st.sampled_from(Kind)), draw(st.integers(0, 4)))
            changed = draw(st.sampled_from(everything) | st.just(strange))
            return replace(schedule, overlapped=schedule.overlapped ^ {changed})
        case "slices":
            return replace(schedule, slices=draw(st.integers(0, 3)))
        case "recomputed":
            return replace(schedule, recomputed=schedule.recomputed ^ {draw(st.integers(-1, stages))})
        case "microbatches":
            return replace(schedule, microbatches=draw(st.integers(0, 4)))
        case _:
            shares = [list(schedule.taken_by(stage)) for stage in range(stages)]
            share = shares[draw(st.integers(0, stages - 1))]
            match draw(st.sampled_from(("keep", "add", "drop", "swap", "none", "stage"))):
                case "add":
                    share.append(draw(st.integers(0, microbatches)))
                case "drop" if share:
                    share.pop(draw(st.integers(0, len(share) - 1)))
                case "swap":
                    share.reverse()
                case "none":
                    return replace(schedule, microbatches_of=None)
                case "stage":
                    shares.append(share)
                case _:
                    pass
            return replace(schedule, microbatches_of=tuple(map(tuple, shares)))


@st.composite
def _order_changed(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    orders = [list(order) for order in schedule.orders]
    order = orders[draw(st.integers(0, len(orders) - 1))]
    if not order:
        return schedule
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


def is_ready(action: Action, schedule: Schedule, done: set[Action]) -> bool:
    """Whether all that `action` waits for is done."""
    layout, stage, slices = schedule.layout, action.stage, schedule.slices
    place = action.microbatch % slices

    def went_back(stage: int, microbatch: int = action.microbatch) -> bool:
        return Action(stage, B, microbatch) in done or Action(stage, I, microbatch) in done

    if action.kind is F:
        before = place == 0 or Action(stage, F, action.microbatch - 1) in done
        return before and all(Action(u, F, action.microbatch) in done for u, v in layout.edges if v == stage)
    if action.kind is W:
        return Action(stage, I, action.microbatch) in done
    assert layout.gradients is not None
    own = Action(stage, F, action.microbatch) in done
    after = place == slices - 1 or went_back(stage, action.microbatch + 1)
    return own and after and all(went_back(v) for u, v in layout.gradients if u == stage)


def is_legal(schedule: Schedule) -> bool:
    """Whether every stage does every microbatch it takes once, at home, and sweeping over the ranks gets to the end."""
    layout, slices = schedule.layout, schedule.slices
    shares = schedule.microbatches_of
    if slices < 1 or schedule.microbatches < 1 or schedule.microbatches % slices:
        return False
    if shares is None:
        shares = (tuple(range(schedule.microbatches)),) * layout.stages
    if len(shares) != layout.stages or any(shares[u] != shares[v] for u, v in layout.edges):
        return False
    if {microbatch for share in shares for microbatch in share} != set(range(schedule.microbatches)):
        return False
    for share in shares:
        whole = all(microbatch - microbatch % slices + k in share for microbatch in share for k in range(slices))
        if not whole or any(one >= other for one, other in pairwise(share)):
            return False
    everything = [action for order in schedule.orders for action in order]
    every = {(stage, microbatch) for stage in range(layout.stages) for microbatch in shares[stage]}
    trains = any(action.kind is not F for action in everything)
    if {(action.stage, action.microbatch) for action in everything} != every:
        return False
    for stage, microbatch in every:
        kinds = sorted(a.kind.value for a in everything if (a.stage, a.microbatch) == (stage, microbatch))
        if kinds not in ((["B", "F"], ["F", "I", "W"]) if trains else (["F"],)):
            return False
    if any(layout.rank_of[action.stage] != rank for rank, order in enumerate(schedule.orders) for action in order):
        return False
    if not schedule.recomputed <= set(range(layout.stages)):
        return False
    return schedule.overlapped <= set(everything) and _gets_to_the_end(schedule)


def at_once(schedule: Schedule) -> list[list[tuple[Action, ...]]]:
    """Each rank's order, with those that overlap and the one after them put together."""
    groups: list[list[tuple[Action, ...]]] = []
    for order in schedule.orders:
        groups.append([])
        together: tuple[Action, ...] = ()
        for action in order:
            together += (action,)
            if action not in schedule.overlapped or action == order[-1]:
                groups[-1].append(together)
                together = ()
    return groups


def _gets_to_the_end(schedule: Schedule) -> bool:
    groups = at_once(schedule)
    for group in (group for rank in groups for group in rank):
        if group[-1] in schedule.overlapped or len(group) > 2:
            return False
    done: set[Action] = set()
    while moving := [rank for rank in groups if rank and all(is_ready(action, schedule, done) for action in rank[0])]:
        done.update(moving[0].pop(0))
    return not any(groups)


@st.composite
def trainings(draw: st.DrawFn, stages: int, edges: frozenset[tuple[int, int]], microbatches: int) -> Schedule:
    """A legal schedule for stages with these edges, placed anyhow on 1 to 4 ranks.

    Some of its backwards are split, and some of its stages recomputed.
    """
    ranks = draw(st.integers(1, min(4, stages)))
    rank_of = draw(st.permutations([*range(ranks), *(draw(st.integers(0, ranks - 1)) for _ in range(stages - ranks))]))
    random = Random(draw(st.integers(0, 2**32)))
    splitting = random.choice((0.0, 0.5, 1.0))
    left = [
        Action(stage, kind, microbatch)
        for stage in range(stages)
        for microbatch in range(microbatches)
        for kind in (F, *((I, W) if random.random() < splitting else (B,)))
    ]
    empty = Schedule("random", Layout(tuple(rank_of), edges), microbatches, ())
    return ordered(empty, left, random).recomputing(_some(range(stages), random))
