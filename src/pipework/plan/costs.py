"""What actions take: time of compute, time of transfer, memory of activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import final

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.layout import Layout

PerStage = float | tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class Costs:
    """The durations of one stage's work on one microbatch, and the memory it holds.

    Each but the unit is one number for all stages, or a tuple with one number per stage.

    - `forward`, `input_gradient`, `weight_gradient`: durations; a full backward takes the last two together.
    - `transfer`: the time between the end of an action and the earliest start of one that needs it on another rank;
      one number, or a mapping from edge `(u, v)`, `u < v`, to a number that holds in both directions.
      On one rank a hand-over takes nothing.
    - `activation`: what one microbatch's forward keeps until its backward, in bytes; 1 counts microbatches.
    - `released_by_input_gradient`: the share of it, from 0 to 1, that the input gradient frees; the weight gradient
      frees the rest.
    - `boundary`: of the activation, what the stage was given; all that a recomputed stage keeps between F and B (see
      `Schedule.recomputing`).
    - `unit`: of all times, here and in a timeline of these costs: `"s"` for seconds, empty for plain counts.

    Raises ScheduleError for any other unit.

    >>> costs = Costs(forward=(1.0, 3.0), weight_gradient=0.5, transfer=0.25)
    >>> [costs.duration(Action.parse(text)) for text in ("0F7", "1F7", "0B7")]
    [1.0, 3.0, 1.5]
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    transfer: float | Mapping[tuple[int, int], float] = 0.0
    activation: PerStage = 1.0
    released_by_input_gradient: PerStage = 0.0
    boundary: PerStage = 0.0
    unit: str = ""

    def __post_init__(self) -> None:
        if self.unit not in {"", "s"}:
            raise ScheduleError(
                f"costs are given in the unit {self.unit!r}",
                remedy="give seconds and the unit 's', or plain counts and no unit",
            )

    def duration(self, action: Action, recomputed: Collection[int] = ()) -> float:
        """How long `action` keeps its rank busy, where these stages are recomputed (see `Schedule.recomputed`)."""
        stage, kind = action.stage, action.kind
        if kind is Kind.FORWARD:
            return _at(self.forward, stage)
        if kind is Kind.WEIGHT_GRADIENT:
            return _at(self.weight_gradient, stage)
        duration = _at(self.input_gradient, stage)
        if stage in recomputed:
            duration += _at(self.forward, stage)
        return duration if kind is Kind.INPUT_GRADIENT else duration + _at(self.weight_gradient, stage)

    def delay(self, start: int, end: int, layout: Layout) -> float:
        """The time of a transfer from stage `start` to stage `end`, in either direction; 0 on the same rank."""
        if layout.rank_of[start] == layout.rank_of[end]:
            return 0.0
        if isinstance(self.transfer, Mapping):
            return self.transfer[min(start, end), max(start, end)]
        return self.transfer

    def held(self, action: Action, recomputed: Collection[int] = ()) -> float:
        """What `action` adds to the memory held when it starts: an activation for a forward, else 0.

        A recomputed stage adds the boundary with its forward, and the rest with its B or I.
        """
        stage, kind = action.stage, action.kind
        if stage not in recomputed:
            return _at(self.activation, stage) if kind is Kind.FORWARD else 0.0
        if kind is Kind.FORWARD:
            return _at(self.boundary, stage)
        return 0.0 if kind is Kind.WEIGHT_GRADIENT else _at(self.activation, stage) - _at(self.boundary, stage)

    def released(self, action: Action) -> float:
        """What `action` frees when it ends."""
        if action.kind is Kind.FORWARD:
            return 0.0
        activation = _at(self.activation, action.stage)
        early = activation * _at(self.released_by_input_gradient, action.stage)
        if action.kind is Kind.INPUT_GRADIENT:
            return early
        return activation - early if action.kind is Kind.WEIGHT_GRADIENT else activation

    def require(self, layout: Layout) -> None:
        """Raises ScheduleError unless these costs say something sensible about every stage and every edge.

        Only edges between ranks need a transfer time.
        """
        for name in _PER_STAGE:
            cost: PerStage = getattr(self, name)
            if isinstance(cost, tuple) and len(cost) != layout.stages:
                raise ScheduleError(
                    f"costs give {name} for {len(cost)} stages, but the layout has {layout.stages}",
                    remedy="give one number for all stages, or a tuple with one number per stage",
                )
            _require_within(name, cost if isinstance(cost, tuple) else (cost,))
        for stage in range(layout.stages):
            if (part := _at(self.boundary, stage)) > (whole := _at(self.activation, stage)):
                raise ScheduleError(
                    f"costs give stage {stage} a boundary of {part} in an activation of {whole}",
                    why="what a stage was given is kept as long as the rest of its activation",
                    remedy="count it in the activation",
                )
        if not isinstance(self.transfer, Mapping):
            _require_within("transfer", (self.transfer,))
            return
        _require_within("transfer", self.transfer.values())
        crossing = {(u, v) for u, v in layout.edges if layout.rank_of[u] != layout.rank_of[v]}
        if missing := sorted(crossing - self.transfer.keys()):
            raise ScheduleError(
                f"costs give no transfer time for edge {missing[0][0]}>{missing[0][1]}",
                remedy="add it to the mapping, or give one number for all edges",
            )


UNIT = Costs()
"""Every forward, input gradient and weight gradient takes 1, every transfer 0, in plain counts."""

RECORDED = Costs(0.0, 0.0, 0.0, unit="s")
"""What is known of the costs of a recorded step: that its times are seconds."""

_PER_STAGE = ("forward", "input_gradient", "weight_gradient", "activation", "released_by_input_gradient", "boundary")


def _at(cost: PerStage, stage: int) -> float:
    return cost[stage] if isinstance(cost, tuple) else cost


def _require_within(name: str, numbers: Iterable[float]) -> None:
    for number in numbers:
        if not 0 <= number < inf:
            raise ScheduleError(f"costs give {number} as {name}", remedy="give finite numbers, 0 or more")
        if name == "released_by_input_gradient" and number > 1:
            raise ScheduleError(f"costs give {number} as {name}", remedy="give a share of the activation, 0 to 1")
