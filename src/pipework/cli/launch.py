"""Processes of this machine that make up the ranks of a pipeline: what torchrun does, as a function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before any group exists: its functions have the default group of the moment as their default argument. Imported later,
# as torch's compiler does, which optimizers load, they would keep that group alive until the interpreter goes, and
# Gloo's threads would then end the process with an abort.
import torch.distributed.nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipework.errors import PipeworkError, TransportError

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=2)  # for another rank


def launch(ranks: int, function: Callable[..., Result], *args: object) -> list[Result]:
    """What `function(*args)` returns in each of `ranks` processes with one Gloo group, in rank order.

    The function lives in a module, so that the other processes can import it; arguments and results are pickled. A
    `PipeworkError` is raised here as it was there; `TransportError` is raised when a process fails otherwise.
    """
    if sys.platform == "linux":  # do not depend on how this machine's own name resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="pipework",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        told: dict[int, Result | PipeworkError] = elastic_launch(config, _in_group)(function, *args)
    except ChildFailedError as error:
        rank, _ = error.get_first_failure()
        raise TransportError(f"the process of rank {rank} failed", why="its traceback is above") from error
    except SignalException as signal:
        raise KeyboardInterrupt from signal
    for result in told.values():
        if isinstance(result, PipeworkError):
            raise result
    return [result for _, result in sorted(told.items()) if not isinstance(result, PipeworkError)]


def _in_group(function: Callable[..., Any], *args: object) -> Any:
    try:
        with gloo():
            return function(*args)
    except PipeworkError as error:
        return error


@contextmanager
def gloo() -> Iterator[None]:
    """A Gloo group of the processes that torchrun started; each computes on one thread, as they share the machine."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
