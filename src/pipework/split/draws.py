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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pipework.split.marks import listen, on_repeated
from pipework.split.tape import ClosedModule, Draw, Entry, Origin, Value
from pipework.split.torch_private import AroundCompiled, in_backward, is_compiled_in_place

_thread = threading.local()
_generator = threading.Lock()
_CPU = torch.device("cpu")

_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout


@dataclasses.dataclass(frozen=True, slots=True)
class DrawKey:
    """What the random numbers of one microbatch depend on, beside the module."""

    seed: int
    step: int
    microbatch: int

    def seed_of(self, draw: Draw) -> int:
        """With what a stream begins."""
        return _seed(f"{self.seed}/{self.step}/{self.microbatch}/{draw.module}/{draw.call}/{draw.segment}")


def _begin(key: DrawKey, draw: Draw, device: torch.device) -> None:
    is_begun = device.type == "cuda" and _instead is not None and _instead(key.microbatch, draw, device)
    _begin_generators(key.seed_of(draw), _CPU if is_begun else device)


Instead = Callable[[int, Draw, torch.device], bool]
"""From microbatch, stream and device to whether the stream has begun on that GPU by other means."""

_instead: Instead | None = None  # for all threads, since backwards run in threads of their own


@contextlib.contextmanager
def begun_by(instead: Instead) -> Iterator[None]:
    """Inside the block every stream that begins on a GPU is told to `instead` first."""
    global _instead  # noqa: PLW0603
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before


def reseed(words: str, device: torch.device) -> None:
    """Begin the generators of the CPU and of a device anew, from a seed made of the words."""
    _begin_generators(_seed(words), device)


def _begin_generators(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _seed(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def streams_on(device: torch.device) -> Callable[[str, int, int], None]:
    """What begins the stream of a (module, call, stretch) on a device, for the microbatch that is under way now.

    It may be called again in a backward, which may run in a thread of its own. Without a microbatch under way it does
    nothing, so that what follows draws from the ambient generator.
    """
    key: DrawKey | None = getattr(_thread, "key", None)

    def begin(module: str, call: int, segment: int) -> None:
        if key is not None:
            _begin(key, Draw(module, call, segment), device)

    return begin


def drawn(entry: Entry, entries: Sequence[Entry], values: Sequence[Value]) -> bool:
    """Whether a call reads what chance alone decides: no input and no module went into it, but a random number did."""
    todo, by_chance = entry.reads(), False
    while todo:
        value = values[todo.pop()]
        if value.maker is None:
            if value.origin is Origin.INPUT:
                return False
            continue
        maker = entries[value.maker]
        if isinstance(maker.target, ClosedModule):
            return False
        by_chance |= maker.draw is not None
        todo += maker.reads()
    return by_chance


def with_unreached(
    drawing: Mapping[str, Collection[str]], modules: Mapping[str, nn.Module], unreached: Collection[str]
) -> dict[str, frozenset[str]]:
    """The modules that draw, each with the modules that its forward calls, and those that may draw on other values.

    A block that chooses by values what it calls (experts, layers skipped at random) leaves some modules unreached on
    the example. They are taken to draw and to call what others of their class do.
    """
    found = {name: frozenset(called) for name, called in drawing.items()}
    alike: dict[type[nn.Module], set[str]] = {}  # what modules of a class call, by path from the module
    for name, called in drawing.items():
        inner = {child.removeprefix(f"{name}.") for child in called if child.startswith(f"{name}.")}
        alike.setdefault(type(modules[name]), set()).update(inner)
    for name in unreached:
        module = modules[name]
        if type(module) in alike:
            found[name] = frozenset(f"{name}.{child}" for child in alike[type(module)])
        elif isinstance(module, _DROPOUTS) and module.training and module.p:
            found[name] = frozenset()
    return found


@contextlib.contextmanager
def drawing_for(key: DrawKey | None, calls_before: Mapping[str, int] | None = None) -> Iterator[None]:
    """Inside the block this thread works on one microbatch; `calls_before` counts calls made in earlier stages.

    Ranks that are threads share the CPU's generator, which a checkpoint reads in the forward and sets in the
    backward, whether or not it draws; so where a model draws at all, one action runs at a time.
    """
    before = getattr(_thread, "key", None), getattr(_thread, "calls", None)
    with _generator:
        _thread.key, _thread.calls = key, dict(calls_before or {})
        try:
            yield
        finally:
            _thread.key, _thread.calls = before


def drawing_again() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What surrounds another run of the forward that is under way now, in a backward, maybe in a thread of its own."""
    key: DrawKey | None = getattr(_thread, "key", None)
    state = torch.get_rng_state()  # the seed in it tells which stream was the last to begin

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        before = getattr(_thread, "key", None)
        _thread.key = key
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                yield
        finally:
            _thread.key = before

    return again


@contextlib.contextmanager
def streams(modules: Mapping[str, nn.Module], drawing: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Inside the block the modules that draw do so from their streams, and the generators are put back after it.

    `modules` maps FQNs to the modules at hand, none where nothing draws; `drawing` names those that draw and, for each,
    the modules that its forward calls. Those not at hand are passed over.
    """
    handles: list[Handle] = []
    noted: Noted = {}
    for name in drawing.keys() & modules.keys():
        children = [modules[child] for child in drawing[name] if child in modules]
        handles += _watch(name, modules[name], children, noted)
    if not modules:
        yield
        return
    cuda = sorted({p.device.index for m in modules.values() for p in m.parameters() if p.device.type == "cuda"})
    if cuda and torch.cuda.is_current_stream_capturing():
        cuda = []  # nothing is drawn
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for handle in reversed(handles):
            handle.remove()


Hook = Callable[..., None]
Handle = RemovableHandle | AroundCompiled


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint finds a generator that it put back: no two moments of a forward have the same seed there."""

    module: str
    moment: str  # the module's call begins, or goes on after a child or a `pipe_split()`
    seed: int  # that of the stream before

    @classmethod
    def now(cls, module: str, moment: str) -> _Place:
        return cls(module, moment, torch.default_generator.initial_seed())


_CHILD, _SPLIT = "goes on after a child", "goes on after a split"

Noted = dict[_Place, tuple[DrawKey, Draw]]
"""The streams that began in the forward: a checkpoint's second forward begins them again, in whichever thread."""


class _Call:
    """A drawing module's call under way in one thread."""

    def __init__(self, key: DrawKey, draw: Draw, device: torch.device, noted: Noted) -> None:
        self.key, self.draw, self.device, self.noted = key, draw, device, noted
        self.listener = self.listen()
        _begin(key, draw, device)

    def listen(self) -> Callable[[], None] | None:
        return listen(partial(self.next_stretch, _SPLIT))

    def next_stretch(self, after: str) -> None:
        place = _Place.now(self.draw.module, after)
        self.draw = dataclasses.replace(self.draw, segment=self.draw.segment + 1)
        self.noted[place] = self.key, self.draw
        _begin(self.key, self.draw, self.device)


def _stream_of(name: str, noted: Noted) -> tuple[DrawKey, Draw] | None:
    """The stream with which a call begins: of a new call, or in a backward of one that a checkpoint repeats."""
    place = _Place.now(name, "begins")
    if in_backward():
        return noted.get(place)
    key = getattr(_thread, "key", None)
    if key is None:
        return None
    call = _thread.calls.get(name, 0)
    _thread.calls[name] = call + 1
    noted[place] = key, Draw(name, call, 0)
    return noted[place]


def _watch(name: str, module: nn.Module, called: Collection[nn.Module], noted: Noted) -> Iterator[Handle]:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    under_way: dict[int, list[_Call]] = {}  # by thread, the innermost last

    def beside(args: tuple[object, ...]) -> torch.device:
        return next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))

    def begin(_: nn.Module, args: tuple[object, ...]) -> None:
        stream = _stream_of(name, noted)
        if stream is None:
            return
        calls = under_way.setdefault(threading.get_ident(), [])
        calls.append(_Call(*stream, device or beside(args), noted))

    def end(*_: object) -> None:
        calls = under_way.get(threading.get_ident())
        if calls:
            listen(calls.pop().listener)

    def child_begins(*_: object) -> None:
        if under_way.get(threading.get_ident()):
            listen(None)  # a pipe_split() in the child begins a stretch of the child, not of this module

    def child_returned(_: nn.Module, args: tuple[object, ...], *__: object) -> None:
        calls = under_way.get(threading.get_ident())
        if calls:
            calls[-1].listen()
            calls[-1].next_stretch(_CHILD)
        else:
            goes_on(_CHILD, device or beside(args))

    def goes_on(after: str, where: torch.device) -> None:
        if in_backward() and (stream := noted.get(_Place.now(name, after))):  # a part of the forward is repeated
            _begin(*stream, where)

    yield on_repeated(lambda: goes_on(_SPLIT, device or torch.device("cpu")))
    yield from _around(module, begin, end, always=True)
    for child in called:
        yield from _around(child, child_begins, child_returned)


def _around(module: nn.Module, before: Hook, after: Hook, always: bool = False) -> Iterator[Handle]:
    if is_compiled_in_place(module):
        yield AroundCompiled(module, before, after)
    else:
        yield module.register_forward_pre_hook(before, prepend=True)
        yield module.register_forward_hook(after, always_call=always)
