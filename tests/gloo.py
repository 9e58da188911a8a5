"""Processes that talk over Gloo, started once and used by many tests."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, final

Result = TypeVar("Result")

LIMIT = 120.0  # seconds


class RankError(Exception):
    """A rank raised or died; carries its traceback, and its number as `rank`."""

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(f"rank {rank}: {report}")
        self.rank = rank


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection


@final
class GlooPool:
    """`ranks` processes, started at the first `run`, in one Gloo world with a subgroup for each smaller size.

    Whatever goes wrong in a run ends all processes, since the transfers it left unfinished would meet the next test;
    the next run starts new ones.
    """

    def __init__(self, ranks: int = 4) -> None:
        self.ranks = ranks
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Result], *args: object, ranks: int = 2, limit: float = LIMIT) -> list[Result]:
        """What `function(group, rank, *args)` returns on each of the first `ranks` ranks, in rank order.

        The function lives in a module, so that the other processes can import it; arguments and results are pickled.
        Raises RankError with the first traceback, TimeoutError after `limit` seconds.
        """
        if not 2 <= ranks <= self.ranks:
            raise ValueError(f"ranks={ranks}, but the pool has groups of 2 to {self.ranks}")
        if not self._workers:
            self._start()
        # Pickled here: a Connection's own pickler would send tensors through shared memory, which dies with its owner.
        call = pickle.dumps((function, ranks, args))
        try:
            for worker in self._workers[:ranks]:
                worker.connection.send_bytes(call)
            return self._collect(ranks, time.monotonic() + limit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []
        if self._folder:
            self._folder.cleanup()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(theirs, store, rank, self.ranks), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _collect(self, ranks: int, deadline: float) -> list[Any]:
        waiting = {self._workers[rank].connection: rank for rank in range(ranks)}
        results: list[Any] = [None] * ranks
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer from ranks {sorted(waiting.values())} of {ranks}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failed, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._workers[rank].process.join()
                    raise RankError(rank, f"died, exit code {self._workers[rank].process.exitcode}") from None
                if failed:
                    raise RankError(rank, answer)
                results[rank] = answer
        return results


def _work(connection: Connection, store: str, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    torch.set_num_threads(1)
    # A file as the meeting point needs no port; Gloo lets the system choose those of its own connections.
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(2, ranks + 1)}
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return  # the tests are over
        try:
            function, size, args = pickle.loads(call)
            torch.manual_seed(0)
            answer = pickle.dumps((False, function(groups[size], rank, *args)))
        except BaseException:  # what pytest.raises and pytest.fail raise is no Exception
            answer = pickle.dumps((True, traceback.format_exc()))
        connection.send_bytes(answer)
