from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.gloo import GlooPool, RankError


def add_ranks(group: dist.ProcessGroup, rank: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + rank
    dist.all_reduce(total, group=group)
    return rank, total


def fail_on_one(group: dist.ProcessGroup, rank: int) -> None:
    if rank == 1:
        with pytest.raises(KeyError):
            pass
    dist.barrier(group)


def die_on_one(group: dist.ProcessGroup, rank: int) -> None:
    if rank == 1:
        os._exit(3)


def wait_for_nobody(group: dist.ProcessGroup, rank: int) -> None:
    if rank == 0:
        dist.recv(torch.empty(1), src=1, group=group)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_runs_on_each_rank_in_rank_order(gloo_pool: GlooPool, ranks: int) -> None:
    total = torch.tensor(ranks * 10.0 + sum(range(ranks)))
    assert gloo_pool.run(add_ranks, torch.tensor(10.0), ranks=ranks) == [(rank, total) for rank in range(ranks)]


def test_a_failing_rank_is_reported_and_the_pool_starts_again() -> None:
    pool = GlooPool(ranks=2)
    try:
        with pytest.raises(RankError, match=r"rank 1: Traceback[\s\S]*DID NOT RAISE"):
            pool.run(fail_on_one)
        with pytest.raises(RankError, match="rank 1: died, exit code 3"):
            pool.run(die_on_one)
        assert [rank for rank, _ in pool.run(add_ranks, torch.tensor(0.0))] == [0, 1]
        with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
            pool.run(wait_for_nobody, limit=0.5)
    finally:
        pool.close()
