"""Ranks as processes of this machine, for as long as one function takes."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

LIMIT = timedelta(minutes=5)  # for one transfer, before its ranks raise


def on_ranks(function: Callable[..., Result], *args: object, ranks: int = 2, backend: str = "gloo") -> list[Result]:
    """What `function(group, *args)` returns on each rank, in rank order; the function is to be found in its module.

    With NCCL each rank has the GPU of its number; where there are fewer GPUs, ranks share them. With Gloo each has one
    thread. An error on any rank ends all, and is raised.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        torch.multiprocessing.spawn(_rank, (Path(folder), ranks, backend, function, args), nprocs=ranks)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def gloo() -> dist.ProcessGroup:
    """All ranks of this world over Gloo, to agree on things whatever the backend and the state of the world are."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _rank(
    rank: int, folder: Path, ranks: int, backend: str, function: Callable[..., object], args: tuple[object, ...]
) -> None:
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    if backend == "nccl":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        if gpus < ranks:  # which NCCL refuses on one host
            os.environ |= {"NCCL_HOSTID": f"host {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    else:
        torch.set_num_threads(1)
    # A file as the meeting point needs no port; Gloo lets the system choose those of its own connections.
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=LIMIT)
    (folder / str(rank)).write_bytes(pickle.dumps(function(dist.group.WORLD, *args)))
    dist.destroy_process_group()
