"""Searching: the least makespans and spans known, with other memory limits besides; what is found, and in what time.

python -m benchmarks.search [--seconds 300] [--known]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from benchmarks.results import Result
from pipework.plan import Costs, Layout, check, search
from tests.plan.searches import CASES, arguments

CLAIM = (
    "The known optima are found, and proven to be optima. `rules` is what is found without a solver, the same on every"
    " machine; the seconds are of everything, with the solver. Without a known optimum it shows what is proven."
)


KNOWN: list[tuple[str, dict[str, Any], float | None]] = [(case["id"], arguments(case), case["best"]) for case in CASES]


def _is_known(given: dict[str, Any]) -> bool:
    return any(given.items() <= known.items() for _, known, _ in KNOWN)


def others() -> Iterator[tuple[str, dict[str, Any]]]:
    """Two stages per rank within each memory from the least on: what nobody has told us the answers of."""
    for place, layout in (("V", Layout.vee(4)), ("loop", Layout.loop(4, 2))):
        for costs in (Costs(), Costs(2, 2, 1)):
            for memory in range(2, 9):
                times = f"{costs.forward:g}.{costs.input_gradient:g}.{costs.weight_gradient:g}"
                given = {"layout": layout, "microbatches": 8, "costs": costs, "memory": memory, "objective": "makespan"}
                yield f"2chunk-{place}-p4-m8-M{memory}-{times}", given


def benchmark(
    seconds: float = 300.0, cases: Sequence[tuple[str, dict[str, Any], float | None]] | None = None
) -> Result:
    if cases is None:
        cases = [*KNOWN, *((name, new, None) for name, new in others() if not _is_known(new))]
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    for name, given, best in cases:
        by_rules = search(**given, seconds=0)
        begin = perf_counter()
        found = search(**given, seconds=seconds)
        took = perf_counter() - begin
        check(found.schedule)
        proven = "yes" if found.optimal else f"at least {found.bound:g}"
        cells = ["" if best is None else f"{best:g}", f"{by_rules.value:g}", f"{found.value:g}", proven, found.how]
        rows.append([name, *cells, f"{took:.1f}"])
        print("  " + "  ".join(rows[-1]), flush=True)
        data.append({"case": name, "best": best, "rules": by_rules.value, "found": found.value, "bound": found.bound})
        data[-1] |= {"how": found.how, "seconds": took}
    columns = ["case", "known", "rules", "found", "proven", "by", "seconds"]
    return Result("search", CLAIM, columns, rows, {"seconds allowed": seconds, "cases": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="for one case")
    parser.add_argument("--known", action="store_true", help="only the cases whose optimum is known")
    given = parser.parse_args()
    benchmark(given.seconds, KNOWN if given.known else None).write()


if __name__ == "__main__":
    main()
