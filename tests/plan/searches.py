"""The known optima in `data/search.json`, as arguments of `search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipework.plan import Costs, Layout

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "search.json").read_text())["cases"]


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    ranks, microbatches = case["ranks"], case["microbatches"]
    layout, shares = Layout.loop(ranks, case["per_rank"]), None
    if case["place"] == "vee":
        layout = Layout.vee(ranks)
    elif case["place"] == "bidirectional":
        layout = Layout.bidirectional(ranks)
        half = microbatches // 2
        shares = (tuple(range(half)),) * ranks + (tuple(range(half, microbatches)),) * ranks
    times = (case[name] for name in ("forward", "input_gradient", "weight_gradient"))
    return {
        "layout": layout,
        "microbatches": microbatches,
        "costs": Costs(*(tuple(time) if isinstance(time, list) else time for time in times), case["transfer"]),
        "memory": case["memory"],
        "objective": case["objective"],
        "split_backward": case["split_backward"],
        "microbatches_of": shares,
    }
