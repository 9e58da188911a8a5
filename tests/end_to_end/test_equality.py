"""Bitwise equal to the unsplit model: every family that runs, on threads and on Gloo, for every kind of model."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import pipework
from tests.end_to_end.cases import CASES
from tests.families import PER_RANK
from tests.gloo import GlooPool

Run = tuple[str, str, int, int]  # case, family, ranks, microbatches


def verified(run: Run, group: dist.ProcessGroup | None = None) -> str:
    """Empty if equal."""
    name, family, ranks, microbatches = run
    case = CASES[name](PER_RANK[family] * ranks, microbatches)
    report = pipework.verify(
        case.model,
        case.args,
        case.kwargs,
        target=case.target,
        loss=case.loss,
        schedule=family,
        ranks=ranks,
        microbatches=microbatches,
        group=group,
    )
    kinds = {comparison.kind for comparison in report.comparisons}
    assert kinds >= {"loss", "output", "gradient"}, kinds
    assert name not in ("batch norm", "buffers") or "buffer" in kinds
    return "" if report.equal else f"{run}\n{report.text()}"


@pytest.mark.parametrize("family", PER_RANK)
def test_every_number_of_microbatches_on_threads(family: str) -> None:
    for ranks in (2, 3, 4):
        for microbatches in range(1, 3 * ranks + 1):
            assert not verified(("skips", family, ranks, microbatches))


@pytest.mark.parametrize("family", PER_RANK)
def test_many_ranks_on_threads(family: str) -> None:
    for ranks in (5, 6, 7, 8):
        for microbatches in (1, ranks + 1, 3 * ranks):
            assert not verified(("skips", family, ranks, microbatches))


@pytest.mark.parametrize("family", PER_RANK)
@pytest.mark.parametrize("name", CASES)
def test_every_model_on_threads(name: str, family: str) -> None:
    for ranks in (2, 4):
        assert not verified((name, family, ranks, 2 * ranks))


def all_verified(group: dist.ProcessGroup, rank: int, runs: list[Run]) -> list[str]:
    return [text for run in runs if (text := verified(run, group))]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("family", PER_RANK)
def test_every_model_on_processes(gloo_pool: GlooPool, family: str, ranks: int) -> None:
    runs = [(name, family, ranks, ranks + 1) for number, name in enumerate(CASES) if number % 3 == ranks - 2]
    assert gloo_pool.run(all_verified, runs, ranks=ranks) == [[]] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_numbers_of_microbatches_on_processes(gloo_pool: GlooPool, ranks: int) -> None:
    runs = [("skips", family, ranks, microbatches) for family in PER_RANK for microbatches in (1, 3 * ranks)]
    assert gloo_pool.run(all_verified, runs, ranks=ranks) == [[]] * ranks
