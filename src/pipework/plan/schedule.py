"""A schedule: for each rank, what it computes and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import final

from pipework.plan.action import Action, Kind
from pipework.plan.layout import Layout


@final
@dataclass(frozen=True, slots=True)
class Schedule:
    """Every rank's actions in order: `orders[rank]`. A value: it knows nothing of processes, devices or tensors.

    - `overlapped`: actions that run at once with the one that follows them in their rank's order (DualPipe,
      arXiv:2412.19437): both start when the needs of both are met, and both end after the sum of their durations.
    - `slices`: into how many causal slices each sequence is cut (Seq1F1B, arXiv:2406.03488). Microbatches count slices:
      number n is slice n % slices of sequence n // slices.
    - `microbatches_of[stage]`: which microbatches a stage takes, ascending; None if every stage takes all. Replicas of
      a model share them out (Chimera, arXiv:2107.06925; see `Layout.bidirectional`).
    - `recomputed`: stages that drop their activations after each F, and make them again, by another forward, at the
      beginning of the B or I (Chen et al., arXiv:1604.06174); see `recomputing`.

    Nothing is judged here; `check` tells whether a schedule is complete and can finish.

    >>> order = tuple(map(Action.parse, ("0F0", "0F1", "0B0", "0I1", "0W1")))
    >>> schedule = Schedule("by hand", Layout.loop(1), 2, (order,))
    >>> schedule.trains, schedule.splits(0, 0), schedule.splits(0, 1)
    (True, False, True)
    """

    name: str
    layout: Layout
    microbatches: int
    orders: tuple[tuple[Action, ...], ...]
    overlapped: frozenset[Action] = frozenset()
    slices: int = 1
    microbatches_of: tuple[tuple[int, ...], ...] | None = None
    recomputed: frozenset[int] = frozenset()
    # Found when first asked for: those who play millions of actions never ask.
    _split: frozenset[tuple[int, int]] | None = field(init=False, repr=False, compare=False, default=None)

    @property
    def trains(self) -> bool:
        """Whether anything goes backward; False for a forward-only schedule."""
        return any(action.kind is not Kind.FORWARD for order in self.orders for action in order)

    def splits(self, stage: int, microbatch: int) -> bool:
        """Whether this backward is split into an input gradient (I) and a weight gradient (W)."""
        if self._split is None:
            split = frozenset(
                (action.stage, action.microbatch)
                for order in self.orders
                for action in order
                if action.kind is Kind.INPUT_GRADIENT or action.kind is Kind.WEIGHT_GRADIENT
            )
            object.__setattr__(self, "_split", split)
        assert self._split is not None
        return (stage, microbatch) in self._split

    def taken_by(self, stage: int) -> Sequence[int]:
        """The microbatches that a stage takes, ascending."""
        return range(self.microbatches) if self.microbatches_of is None else self.microbatches_of[stage]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over everything in the schedule, the same in every process and on every machine.

        Ranks compare it before the first transfer: equal fingerprints mean equal plans.
        """
        layout = self.layout
        parts = (
            self.name,
            str(self.microbatches),
            " ".join(map(str, layout.rank_of)),
            " ".join(f"{u}>{v}" for u in range(layout.stages) for v in layout.feeds(u)),
            " ".join(f"{u}<{v}" for u in range(layout.stages) for v in layout.gradient_from(u)),
            str(self.slices),
            "all" if self.microbatches_of is None else repr(self.microbatches_of),
            " ".join(sorted(map(str, self.overlapped))),
            " ".join(map(str, sorted(self.recomputed))),
            *(" ".join(map(str, order)) for order in self.orders),
        )
        # Each part is preceded by its length, so that no two schedules can join to the same text.
        return sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:16]

    def with_layout(self, layout: Layout) -> Schedule:
        """The same orders over another layout, such as one whose edges are those of a real cut."""
        return replace(self, layout=layout)

    def recomputing(self, stages: Iterable[int] | None = None) -> Schedule:
        """The same orders where these stages, or all, are recomputed, and no others: less memory for more time.

        Between F and B such a stage keeps of a microbatch what it was given, and nothing that it made. B, or I where
        the backward is split, does the forward again and takes its time as well; what W needs is kept from I to W, as
        ever. A stage that goes back at once after each forward, as the last one in 1F1B, gains nothing by it.

        >>> from pipework.plan import Costs, one_f_one_b, simulate
        >>> schedule, costs = one_f_one_b(Layout.loop(3), microbatches=3), Costs(activation=8, boundary=1)
        >>> print(simulate(schedule, costs).text())
        rank 0  F0F1F2........B0--..B1--..B2--
        rank 1  ..F0F1....B0--F2B1--..B2--....
        rank 2  ....F0B0--F1B1--F2B2--........
        makespan 15, span 15, bubble 40.0 %, peak per rank 24 16 8
        >>> print(simulate(schedule.recomputing([0, 1]), costs).text())
        rank 0  F0F1F2..........B0----..B1----B2----
        rank 1  ..F0F1....B0----F2B1----B2----......
        rank 2  ....F0B0--F1B1--..F2B2--............
        makespan 18, span 18, bubble 38.9 %, peak per rank 10 9 8
        """
        return replace(self, recomputed=frozenset(range(self.layout.stages) if stages is None else stages))

    def describe(self) -> str:
        """One line: name and counts.

        >>> Schedule("empty", Layout.loop(2), 1, ((), ())).describe()
        'empty: 2 ranks, 2 stages, 1 microbatch, 0 actions'
        """
        actions = sum(map(len, self.orders))
        counts = (
            (self.layout.ranks, "rank"),
            (self.layout.stages, "stage"),
            (self.microbatches, "microbatch"),
            (actions, "action"),
        )
        recomputed = f", {_counted(len(self.recomputed), 'stage')} recomputed" if self.recomputed else ""
        return f"{self.name}: {', '.join(_counted(count, noun) for count, noun in counts)}{recomputed}"


def _counted(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{count} {noun if count == 1 else plural}"
