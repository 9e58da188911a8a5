"""Random numbers that depend on the step, the microbatch and the module, and on nothing else.

In a pipeline the order in which modules run, and on which rank, is the schedule's business. So each module that draws
random numbers in its own forward has streams of its own, one for each stretch between the calls of its children:

    layer(x)     ├─ seed(layer, 0) ─┤ child ├─ seed(layer, 1) ─┤

A stream begins from a seed made of (run's seed, step, microbatch, module, call, stretch). Only modules that were seen
to draw are watched, and only while a step runs; outside of steps the model draws as it always does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pipework.split.marks import listen
from pipework.split.tape import Draw
from pipework.split.torch_private import in_backward

_thread = threading.local()
_generator = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class DrawKey:
    """What the random numbers of one microbatch depend on, beside the module."""

    seed: int
    step: int
    microbatch: int


def _begin(key: DrawKey, draw: Draw, device: torch.device) -> None:
    reseed(f"{key.seed}/{key.step}/{key.microbatch}/{draw.module}/{draw.call}/{draw.segment}", device)


def reseed(words: str, device: torch.device) -> None:
    """Begin the generators of the CPU and of a device anew, from a seed made of the words."""
    seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


@contextlib.contextmanager
def stream(module: str, call: int, segment: int, device: torch.device) -> Iterator[None]:
    """Draw from the named stream inside the block; without a microbatch under way, from the ambient generator."""
    key = getattr(_thread, "key", None)
    if key is None:
        yield
        return
    _begin(key, Draw(module, call, segment), device)
    yield


@contextlib.contextmanager
def drawing_for(key: DrawKey | None, calls_before: Mapping[str, int] | None = None) -> Iterator[None]:
    """Inside the block this thread works on one microbatch; `calls_before` counts calls made in earlier stages.

    Ranks that are threads share the CPU's generator, which a checkpoint reads in the forward and sets in the
    backward; so of the actions that draw, one runs at a time.
    """
    before = getattr(_thread, "key", None), getattr(_thread, "calls", None)
    with _generator:
        _thread.key, _thread.calls = key, dict(calls_before or {})
        try:
            yield
        finally:
            _thread.key, _thread.calls = before


@contextlib.contextmanager
def streams(modules: Mapping[str, nn.Module], drawing: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Inside the block the modules that draw do so from their streams, and the generators are put back after it.

    `modules` maps FQNs to the modules at hand; `drawing` names those that draw and, for each, the modules that its
    forward calls. Those not at hand are passed over.
    """
    handles: list[RemovableHandle] = []
    noted: Noted = {}
    for name in drawing.keys() & modules.keys():
        children = [modules[child] for child in drawing[name] if child in modules]
        handles += _watch(name, modules[name], children, noted)
    if not handles:
        yield
        return
    cuda = sorted({p.device.index for m in modules.values() for p in m.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Call:
    """A drawing module's call under way in one thread."""

    def __init__(self, key: DrawKey, draw: Draw, device: torch.device) -> None:
        self.key, self.draw, self.device = key, draw, device
        self.listener = listen(self.next_stretch)
        _begin(key, draw, device)

    def next_stretch(self) -> None:
        self.draw = dataclasses.replace(self.draw, segment=self.draw.segment + 1)
        _begin(self.key, self.draw, self.device)


Noted = dict[tuple[str, int], tuple[DrawKey, int]]
"""(module, the seed there before its call) -> (key, number of the call), for calls that a checkpoint repeats."""


def _number(name: str, noted: Noted) -> tuple[DrawKey, int] | None:
    """Which call begins: a new one, or in a backward one that a checkpoint repeats; None without a microbatch.

    A checkpoint puts back the generator as it was in the forward, and no two calls find the same seed there.
    """
    before = name, torch.default_generator.initial_seed()
    if in_backward():
        return noted.get(before)
    key = getattr(_thread, "key", None)
    if key is None:
        return None
    call = _thread.calls.get(name, 0)
    _thread.calls[name] = call + 1
    noted[before] = key, call
    return key, call


def _watch(name: str, module: nn.Module, called: Collection[nn.Module], noted: Noted) -> Iterator[RemovableHandle]:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    under_way: dict[int, list[_Call]] = {}  # by thread, the innermost last

    def begin(_: nn.Module, args: tuple[object, ...]) -> None:
        numbered = _number(name, noted)
        if numbered is None:
            return
        key, call = numbered
        beside = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
        calls = under_way.setdefault(threading.get_ident(), [])
        calls.append(_Call(key, Draw(name, call, 0), device or beside))

    def end(*_: object) -> None:
        calls = under_way.get(threading.get_ident())
        if calls:
            listen(calls.pop().listener)

    def child_begins(*_: object) -> None:
        if under_way.get(threading.get_ident()):
            listen(None)  # a pipe_split() in the child begins a stretch of the child, not of this module

    def child_returned(*_: object) -> None:
        calls = under_way.get(threading.get_ident())
        if calls:
            listen(calls[-1].next_stretch)
            calls[-1].next_stretch()

    yield module.register_forward_pre_hook(begin, prepend=True)
    yield module.register_forward_hook(end, always_call=True)
    for child in called:
        yield child.register_forward_pre_hook(child_begins, prepend=True)
        yield child.register_forward_hook(child_returned)
