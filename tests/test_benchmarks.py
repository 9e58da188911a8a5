"""The comparison with others runs on processes: every contender has its row, and says why where it has no figures."""

from __future__ import annotations

from benchmarks import pipelines
from benchmarks.sizes import BY_NAME

FAMILIES = ("one_f_one_b", "zero_bubble_v")


def test_every_contender_has_a_row_with_figures_or_a_reason() -> None:
    found = pipelines.benchmark(
        BY_NAME["minimal"], families=FAMILIES, repeats=2, seconds=0.01, compiler="eager", ranks_as="gloo"
    )
    rows = {(row[0].strip("*"), family): row for row in found.rows for family in row[1].split(", ")}
    assert rows.keys() == {(entry.kind, entry.family) for entry in pipelines.entries(FAMILIES)}
    assert all(len(row) == len(found.columns) for row in found.rows)
    without = {key: row[3] for key, row in rows.items() if not row[3][0].isdigit()}
    reasons = {
        "needs a GPU": {
            (pipelines.ONE_CAPTURED, "-"),
            *((kind, family) for kind in (pipelines.GRAPHS, pipelines.COMPILED_GRAPHS) for family in FAMILIES),
        },
        "fails: ": {(pipelines.TRACED, "zero_bubble_v"), (pipelines.STAGES, "zero_bubble_v")},
    }
    for reason, keys in reasons.items():
        assert all(without.pop(key).startswith(reason) for key in keys)
    assert not without
    assert all(row[-1] == "equal" for row in found.rows if row[0] == pipelines.OURS)
    in_bold = [row for row in found.rows if row[0].startswith("**")]
    assert [row[4] for row in in_bold] == ["1.000 (1.000 to 1.000)"]
