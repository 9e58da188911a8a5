"""The ranks that this process has: all of them, each a thread, or one of a process group.

Where ranks are threads, each has GPU streams of its own, between what the caller did before and does after:

    caller   ── before ──┬─────────────────┬── after ──
    rank 0               ├─ 0F0  0F1 ... ──┤
    rank 1               └─ 1F0 ... ───────┘
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, final

import torch
from typing_extensions import override

from pipework.errors import InputError, TransportError
from pipework.run.executor import Executor
from pipework.run.stage_run import Feed
from pipework.run.transport import Threads, Transport
from pipework.split.tape import Surroundings

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


class Ranks(ABC):
    """What a runner plays its programs on."""

    ends: tuple[Transport, ...]  # one for each rank that is here

    @abstractmethod
    def run(self, executors: Sequence[Executor], feed: Feed, is_captured: bool) -> None:
        """One step of the ranks that are here.

        `is_captured` says that a CUDA graph is being made of it: what fails then has reached no other rank.
        """


@final
class ThreadRanks(Ranks):
    """All ranks as threads, which start with the first step."""

    def __init__(self, ranks: int) -> None:
        self._threads = Threads(ranks)
        self.ends = self._threads.ends
        self._pool: ThreadPoolExecutor | None = None
        self._streams: dict[tuple[int, torch.device], torch.cuda.Stream] = {}

    @override
    def run(self, executors: Sequence[Executor], feed: Feed, is_captured: bool) -> None:
        self._threads.begin()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(executors), "pipework-rank")
        ambient, threads = Surroundings.now(), torch.get_num_threads()
        caches_casts = torch.is_autocast_cache_enabled()
        devices = {device for e in executors for device in e.devices.values() if device.type == "cuda"}
        callers = {device: torch.cuda.current_stream(device) for device in devices}

        def play(executor: Executor) -> None:
            try:
                torch.set_autocast_cache_enabled(caches_casts)
                torch.set_num_threads(threads)  # else oneDNN and MKL go by a count of each thread's own
                with ambient.restored(), self._beside(executor, callers):
                    executor.run(feed)
            except BaseException as error:
                self.ends[executor.rank].fail(error)
                raise

        # In a context of its own with the caller's values: the compiler's settings are among them.
        futures = [self._pool.submit(contextvars.copy_context().run, play, executor) for executor in executors]
        try:
            errors = [error for future in futures if (error := future.exception()) is not None]
        except BaseException as interruption:  # of the caller: no rank may go on beside the next step
            self._threads.fail(None, interruption)
            wait(futures)
            raise
        for (_, device), own in self._streams.items():
            if device in callers:
                callers[device].wait_stream(own)
        if errors:
            raise next((error for error in errors if not _is_of_another(error)), errors[0])

    @contextlib.contextmanager
    def _beside(self, executor: Executor, callers: Mapping[torch.device, torch.cuda.Stream]) -> Iterator[None]:
        """Inside the block this thread works on the rank's own streams, after what the caller has launched."""
        with contextlib.ExitStack() as stack:
            for device in callers.keys() & executor.devices.values():
                key = executor.rank, device
                own = self._streams.get(key) or self._streams.setdefault(key, torch.cuda.Stream(device))
                own.wait_stream(callers[device])
                stack.enter_context(torch.cuda.stream(own))
            yield


def _is_of_another(error: BaseException) -> bool:
    """Whether a thread only heard of another's failure, of which it says less than that one does."""
    return isinstance(error, TransportError) or "previous error during capture" in str(error)


@final
class ProcessRank(Ranks):
    """This process's rank in a group."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, device: torch.device) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        from pipework.run.processes import ProcessTransport

        if isinstance(group, DeviceMesh):
            group = _along(group)
        if device.type == "cpu" and dist.get_backend(group) == "nccl":  # a model on the meta device is nowhere yet
            device = torch.device("cuda", torch.cuda.current_device())
        self.ends = (ProcessTransport(group, device),)

    @override
    def run(self, executors: Sequence[Executor], feed: Feed, is_captured: bool) -> None:
        """Where another rank has failed, its connections are closed, and so are this one's then."""
        (executor,), (end,) = executors, self.ends
        try:
            executor.run(feed)
            return
        except Exception as error:
            if is_captured:
                raise
            end.fail(error)
            if not isinstance(error, TransportError):
                raise
            lost = copy.copy(error)
        raise lost  # without the traceback, which holds the transfers under way, and they the connections


def _along(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of a mesh of one dimension."""
    if mesh.ndim != 1:
        raise InputError(
            f"the mesh given as group has {mesh.ndim} dimensions, {', '.join(mesh.mesh_dim_names or ()) or 'unnamed'}",
            why="a pipeline runs along one of them",
            remedy='pass that dimension, as group=mesh["pipeline"]',
        )
    return mesh.get_group()
