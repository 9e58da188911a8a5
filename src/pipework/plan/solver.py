"""The search proper: a constraint solver, where it is installed (`pip install 'pipework[search]'`).

OR-tools' CP-SAT gets an interval per task, one at a time on each rank, the needs between them, and the memory as
intervals of activations. It starts from the best orders known and from their bounds; what it finds better counts, and
so does what it rules out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any, final

from pipework.plan.action import Kind
from pipework.plan.problem import Orders, Problem
from pipework.plan.windows import Windows


@final
@dataclass(frozen=True, slots=True)
class Solved:
    """The solver's orders, if it found any, and its lower bound."""

    orders: Orders | None
    least: int


def is_installed() -> bool:
    """Whether there is a solver."""
    return find_spec("ortools") is not None


def solve(problem: Problem, known: Windows, best: Orders, seconds: float, workers: int | None) -> Solved:
    """Look for orders better than `best`, or for a proof that there are none, for so many seconds at most.

    `workers` threads follow one strategy each; unless given, as many as the machine has cores, but 8 at least.
    """
    import ortools.sat.python.cp_model as untyped

    cp_model: Any = untyped
    model = _Model(cp_model.CpModel(), problem, known, problem.starts(best))
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers or max(8, os.cpu_count() or 1)
    solver.parameters.catch_sigint_signal = False  # it would leave the process without Python's own handler
    status: Any = solver.solve(model.model)
    least = known.least
    if problem.exact_memory and status != cp_model.UNKNOWN:
        least = max(least, ceil(solver.best_objective_bound - 1e-6))  # a whole number, given as a float
    if status not in {cp_model.OPTIMAL, cp_model.FEASIBLE}:
        return Solved(None, least)
    found = [int(solver.value(variable)) for variable in model.starts]
    orders = [
        # What takes no time comes before what starts at the same moment; tasks are numbered so that needs come first.
        sorted(
            (task for lane in lanes for task in lane),
            key=lambda task: (found[task], found[task] + problem.durations[task], task),
        )
        for lanes in problem.lanes
    ]
    return Solved(orders if problem.fits(orders) else None, least)


@final
class _Model:
    """The problem in the solver's words; `starts` are its variables."""

    def __init__(self, model: Any, problem: Problem, known: Windows, best: Sequence[int]) -> None:
        self.model, self.problem = model, problem
        value = problem.value(best)
        # The order with the shortest span may have a longer makespan, but never longer than one thing at a time.
        delays = sum(delay for needs in problem.needs for _, delay in needs)
        self.latest = value if problem.objective == "makespan" else sum(problem.durations) + delays
        self.starts = [
            model.new_int_var(head, self.latest - tail - duration, "")
            for head, duration, tail in zip(known.heads, problem.durations, known.tails, strict=True)
        ]
        for earlier, later, delay in known.edges:
            model.add(self.starts[later] >= self._end(earlier) + delay)
        for rank, lanes in enumerate(problem.lanes):
            model.add_no_overlap(
                [
                    model.new_fixed_size_interval_var(self.starts[task], problem.durations[task], "")
                    for lane in lanes
                    for task in lane
                ]
            )
            if problem.limits is not None:
                self._keep_memory(lanes, problem.limits[rank])
        self._minimize(known.least, value)
        for variable, start in zip(self.starts, best, strict=True):
            model.add_hint(variable, start)

    def _end(self, task: int) -> Any:
        return self.starts[task] + self.problem.durations[task]

    def _keep_memory(self, lanes: Sequence[tuple[int, ...]], limit: int) -> None:
        """Each forward's activation lasts until the tasks end that free it, each its share."""
        first = [self.problem.actions[lane[0]] for lane in lanes]
        forwards = {
            action.stage: lane for action, lane in zip(first, lanes, strict=True) if action.kind is Kind.FORWARD
        }
        intervals: list[Any] = []
        shares: list[int] = []
        for action, lane in zip(first, lanes, strict=True):
            for forward, task in zip(forwards[action.stage], lane, strict=True):
                if self.problem.frees[task]:
                    size = self.model.new_int_var(0, self.latest, "")
                    intervals.append(self.model.new_interval_var(self.starts[forward], size, self._end(task), ""))
                    shares.append(self.problem.frees[task])
        self.model.add_cumulative(intervals, shares, limit)

    def _minimize(self, least: int, value: int) -> None:
        longest: Any = self.model.new_int_var(least, value, "")
        for lanes in self.problem.lanes:
            begins: list[Any] = [self.starts[lane[0]] for lane in lanes] if self.problem.objective == "span" else [0]
            for lane in lanes:
                for begin in begins:
                    self.model.add(longest >= self._end(lane[-1]) - begin)
        self.model.minimize(longest)
