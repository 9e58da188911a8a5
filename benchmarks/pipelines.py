"""One training step by every family that runs, against torch.distributed.pipelining, DDP, FSDP2 and one device.

Two processes over Gloo, a thread each; over NCCL where there are two GPUs. On one GPU, what one can honestly run: ranks
as threads that share it, and the unsplit model. All compute the same numbers from the same weights, which is checked.

    python -m benchmarks.pipelines [--sizes demo] [--families one_f_one_b,zero_bubble_v] [--only 'pipework|traced']
        [--ranks-as gloo] [--repeats 15] [--seconds 0.2] [--compiler inductor]
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.contenders import (
    PEERS,
    TRAINING,
    Case,
    Contender,
    Gradients,
    NotThereError,
    apart,
    captured,
    difference_of,
    hand_written,
    one_device,
    ours,
    reference,
    replicated,
    traced,
)
from benchmarks.ranks import gloo, on_ranks
from benchmarks.results import Ratio, Result, alternated, milliseconds
from benchmarks.sizes import BY_NAME, GPU_SIZES, SIZES, Size

CLAIM = """\
Milliseconds of one training step (forward and backward of all microbatches), median over alternating repeats; in
brackets the processor time of the busier rank, which other load hardly changes. Ratios are by repeat, median (least to
greatest); above 1, the contender of the row is faster.

- *Peer's best*: over this, the time of the schedule and stages of torch.distributed.pipelining of least median (in
  bold). *Peer's like*: over this, that of its same schedule, with stages cut alike and written by hand (compiled, for
  what is compiled). *Its processor*: the same of the processor time of all ranks together.
- *Floor*: this over the time of one device (as a CUDA graph, on GPUs) divided by the number of devices, as if there
  were no bubble, nothing to send, and no neighbour on the same chip.
- *Host*: microseconds of an action (a microbatch's forward, backward or half a backward on one stage) beside its work.
  On CPU, the processor time of all ranks beyond that of ranks apart; on GPUs, the time until the call returns.
- *Memory*: MiB of the fullest rank at the peak of a step, weights and gradients included, where a rank has its own GPU.
- *Gradients*: the largest difference from the unsplit model's (its blocks compiled, where they are), over the largest
  number of each; "equal" is to the bit. Where the unsplit model's are the same twice, pipework's must be equal to them
  in one step of four at least: beside another rank's kernels, attention's backward adds up in the order of chance."""

OURS, GRAPHS = "pipework", "pipework, CUDA graphs"
COMPILED, WHOLE = "pipework, compiled blocks", "pipework, compiled stages"
COMPILED_GRAPHS = "pipework, compiled blocks, CUDA graphs"
HAND_WRITTEN, TRACED, STAGES = "peer, hand-written stages", "peer, traced stages", "peer, compiled stages"
DDP, FSDP, APART = "DDP", "FSDP2", "ranks apart, nothing sent"
ONE, ONE_COMPILED, ONE_CAPTURED = "one device", "one device, compiled blocks", "one device, CUDA graph"
ALWAYS = (ONE, ONE_CAPTURED, APART)  # what the others are held to
OF_PEER = (HAND_WRITTEN, TRACED, STAGES)
LIKE = {OURS: HAND_WRITTEN, GRAPHS: HAND_WRITTEN, COMPILED: STAGES, COMPILED_GRAPHS: STAGES, WHOLE: STAGES}
BALANCED, EVEN = "balanced", "even"  # by counted costs, in any place; as many blocks each, as written by hand
STEADY = 3  # the step from which on each is like the one before: caches are filled, graphs captured
TRIES = 4  # steps of which one must give the very gradients, where it has to
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # where other kernels or another order round otherwise


Make = Callable[[Case], Contender]


class Entry(NamedTuple):
    """A row of the table."""

    kind: str
    family: str = "-"
    cut: str = "-"


@dataclass
class Measured:
    """What is known of a contender beside its time: seconds for a step, by repeat."""

    gradients: float
    actions: int
    memory: float | None
    busiest: list[float] = field(default_factory=list)  # processor time, of one rank
    busy: list[float] = field(default_factory=list)  # of all ranks together
    returned: list[float] = field(default_factory=list)  # until the call returned

    def add(self, busiest: float, busy: float, returned: float) -> None:
        self.busiest.append(busiest)
        self.busy.append(busy)
        self.returned.append(returned)


def entries(families: Sequence[str], only: str = "") -> dict[Entry, Make]:
    """All contenders, or those in whose kind the regular expression is found."""
    found: dict[Entry, Make] = {
        Entry(ONE): one_device,
        Entry(ONE_CAPTURED): captured,
        Entry(ONE_COMPILED): partial(one_device, compiled=True),
        Entry(APART): apart,
        Entry(DDP): replicated,
        Entry(FSDP): partial(replicated, sharded=True),
    }
    for family in families:
        found[Entry(OURS, family, BALANCED)] = partial(ours, family=family, balanced=True)
        found[Entry(OURS, family, EVEN)] = partial(ours, family=family, balanced=False)
        found[Entry(GRAPHS, family, BALANCED)] = partial(ours, family=family, balanced=True, graphs=True)
        found[Entry(GRAPHS, family, EVEN)] = partial(ours, family=family, balanced=False, graphs=True)
        found[Entry(COMPILED, family, EVEN)] = partial(ours, family=family, balanced=False, compiled=True)
        found[Entry(COMPILED_GRAPHS, family, EVEN)] = partial(
            ours, family=family, balanced=False, compiled=True, graphs=True
        )
        found[Entry(WHOLE, family, EVEN)] = partial(ours, family=family, balanced=False, whole=True)
        if family in PEERS:
            found[Entry(HAND_WRITTEN, family, EVEN)] = partial(hand_written, family=family)
            found[Entry(TRACED, family, EVEN)] = partial(traced, family=family)
            found[Entry(STAGES, family, EVEN)] = partial(hand_written, family=family, compiled=True)
    return {entry: make for entry, make in found.items() if entry.kind in ALWAYS or re.search(only, entry.kind)}


# ---------------------------------------------------------------------- on the ranks


@dataclass(frozen=True)
class Ranks:
    """What the ranks do together, beside the steps."""

    case: Case
    control: dist.ProcessGroup | None

    def tell(self, value: Any) -> list[Any]:
        """Every rank's value; they wait for each other here."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(found, value, self.control)
        return found

    def settle(self) -> None:
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, contender: Contender, steps: int) -> tuple[float, float, float, float]:
        """Seconds for a step: of the slowest rank, of the busiest processor, of all processors, until it returned."""
        contender.once()  # with cold caches, does not count
        self.settle()
        self.tell(None)
        begin, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            contender.once()
        returned = time.perf_counter() - begin
        self.settle()
        wall, busy = time.perf_counter() - begin, time.process_time() - busy
        told = [[each / steps for each in one] for one in self.tell((wall, busy, returned))]
        walls, busys, returns = zip(*told, strict=True)
        return max(walls), max(busys), sum(busys), max(returns)

    def made(
        self, make: Make, expected: Callable[[Contender], Gradients], allowed: float
    ) -> tuple[Contender, Measured]:
        """A contender that gives the right gradients; raises on every rank if it fails on any."""
        contender, memory, error = None, None, None
        before = self._allocated()
        try:
            contender = make(self.case)
            for _ in range(STEADY):
                contender.once()
            if why := contender.unfit():
                raise NotThereError(why)
            memory = self._peak(contender, before)
        except Exception as exception:
            error = _why(exception)
        try:
            difference = self._settled_difference(contender if error is None else None, error, expected, allowed)
        finally:
            for parameter in contender.parameters.values() if contender else ():
                parameter.grad = None
        assert contender is not None
        memories = self.tell(memory)
        return contender, Measured(difference, contender.actions, None if None in memories else max(memories))

    def _settled_difference(
        self, contender: Contender | None, error: str | None, expected: Callable[[Contender], Gradients], allowed: float
    ) -> float:
        """The largest difference of the gradients on any rank and in any step; raises if none of some is allowed."""
        differences: list[float] = []
        while not differences or (min(differences) > allowed and len(differences) < TRIES):
            difference = 0.0
            try:
                if contender is not None:
                    if differences:
                        contender.once()
                    difference = difference_of(contender.gradients(), expected(contender))
            except Exception as exception:
                error = _why(exception)
            told = self.tell((difference, error))
            if errors := [error for _, error in told if error is not None]:
                raise NotThereError(errors[0])
            differences.append(max(difference for difference, _ in told))
        if not (min(differences) <= allowed and max(differences) <= TOLERANCE[self.case.size.dtype]):
            raise NotThereError(f"wrong: gradients differ by {max(differences):.1e}")
        return max(differences)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.case.device.type == "cuda" else 0

    def _peak(self, contender: Contender, before: int) -> float | None:
        """MiB of this rank: what the contender keeps, what a step adds to that, and its part of the shared weights."""
        if self.case.device.type != "cuda" or self.case.group is None:
            return None
        torch.cuda.reset_peak_memory_stats()
        contender.once()
        self.settle()
        shared = 0 if contender.wrapped else sum(p.nbytes for p in contender.parameters.values())
        return (torch.cuda.max_memory_allocated() - before + shared) / 2**20


def _why(error: Exception) -> str:
    if isinstance(error, NotThereError):
        return str(error)
    return f"fails: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def measured(
    group: dist.ProcessGroup | None,
    size: Size,
    device: torch.device,
    families: Sequence[str],
    only: str,
    repeats: int,
    seconds: float,
    compiler: str,
) -> dict[str, Any]:
    """What there is to know of each contender, the same on every rank."""
    case = Case(size, group, device, compiler=compiler)
    ranks = Ranks(case, group and gloo())
    say: Callable[[str], None] = print if case.rank == 0 else lambda line: None
    built, found, refused, deterministic = _checked(ranks, entries(families, only), say)

    def timed(entry: Entry, steps: int) -> float:
        wall, busiest, busy, returned = ranks.timed(built[entry], steps)
        one = found[entry]
        one.add(busiest, busy, returned)
        return wall

    steps = max(2, round(seconds * case.ranks / ranks.timed(built[Entry(ONE)], 2)[0]))
    say(f"  {steps} steps a repeat")
    times = alternated(
        {entry: partial(timed, entry, steps) for entry in built}, repeats, lambda line: say(line.partition(":")[0])
    )
    return {
        "ranks": case.ranks,
        "steps of a repeat": steps,
        "the unsplit model's gradients are the same twice": deterministic,
        "results": [{**entry._asdict(), **asdict(found[entry]), "seconds": times[entry]} for entry in built],
        "refused": [{**entry._asdict(), "why": why} for entry, why in refused.items()],
    }


def _checked(
    ranks: Ranks, wanted: Mapping[Entry, Make], say: Callable[[str], None]
) -> tuple[dict[Entry, Contender], dict[Entry, Measured], dict[Entry, str], bool]:
    """The contenders whose gradients are right, what is known of them, and why the others are not there."""
    case, built, found, refused = ranks.case, {}, {}, {}
    first = reference(case)
    deterministic = difference_of(reference(case), first) == 0
    known: dict[tuple[bool, tuple[int, ...] | None], Gradients] = {(False, None): first}

    def expected(contender: Contender, compiled: bool) -> Gradients:
        in_turn = contender.order is None or contender.order == tuple(range(case.size.microbatches))
        key = compiled, None if in_turn else contender.order
        if key not in known:
            known[key] = reference(case, *key)
        return known[key]

    for entry, make in wanted.items():
        compiled = entry.kind in (COMPILED, COMPILED_GRAPHS, ONE_COMPILED)
        is_equal = deterministic and entry.kind in LIKE and entry.kind != WHOLE  # which rounds by its stages
        allowed = 0.0 if is_equal else TOLERANCE[case.size.dtype]
        try:
            built[entry], found[entry] = ranks.made(make, partial(expected, compiled=compiled), allowed)
            say(f"  {', '.join(entry)}: gradients differ by {found[entry].gradients:.1e}")
        except NotThereError as error:
            refused[entry] = str(error)
            say(f"  {', '.join(entry)}: {error}")
    return built, found, refused, deterministic


# ---------------------------------------------------------------------- the table


COLUMNS = [
    "contender",
    "schedule",
    "cut",
    "ms (processor)",
    "peer's best",
    "peer's like",
    "its processor",
    "floor",
    "host",
    "memory",
    "gradients",
]


def rows(found: Mapping[str, Any], on_cuda: bool, devices: int) -> list[Sequence[str]]:
    """The table's lines, those that are not there last, with the reason."""
    results = {Entry(one["kind"], one["family"], one["cut"]): one for one in found["results"]}
    middle = {entry: statistics.median(one["seconds"]) for entry, one in results.items()}
    best = min((entry for entry in results if entry.kind in OF_PEER), key=middle.__getitem__, default=None)
    whole = next(results[Entry(kind)]["seconds"] for kind in (ONE_CAPTURED, ONE) if Entry(kind) in results)
    lines: list[Sequence[str]] = []
    for entry, one in results.items():
        times = one["seconds"]
        like = results.get(Entry(LIKE[entry.kind], entry.family, entry.cut)) if entry.kind in LIKE else None
        name = f"**{entry.kind}**" if entry == best else entry.kind
        lines.append([
            name, entry.family, entry.cut,
            f"{milliseconds(times)} ({milliseconds(one['busiest'])})",
            str(Ratio.of(results[best]["seconds"], times)) if best else "-",
            str(Ratio.of(like["seconds"], times)) if like else "-",
            f"{Ratio.of(like['busy'], one['busy']).median:.3f}" if like else "-",
            f"{Ratio.of(times, [each / devices for each in whole]).median:.2f}",
            _host(one, results.get(Entry(APART)), found["ranks"], on_cuda),
            "-" if one["memory"] is None else f"{one['memory']:.0f}",
            f"{one['gradients']:.0e}" if one["gradients"] else "equal",
        ])  # fmt: skip
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in found["refused"]:
        reasons.setdefault((one["kind"], one["why"]), []).append(one["family"])
    for (kind, why), families in reasons.items():
        lines.append([kind, ", ".join(dict.fromkeys(families)), "-", why, *["-"] * (len(COLUMNS) - 4)])
    return lines


def _host(one: Mapping[str, Any], apart: Mapping[str, Any] | None, ranks: int, on_cuda: bool) -> str:
    """Microseconds of the host for an action."""
    if on_cuda:
        return f"{statistics.median(one['returned']) * ranks / one['actions'] * 1e6:.0f}"
    if apart is None or one["kind"] in (ONE, ONE_COMPILED, APART):
        return "-"
    beyond = [a - b for a, b in zip(one["busy"], apart["busy"], strict=True)]
    return f"{statistics.median(beyond) / one['actions'] * 1e6:.0f}"


# ---------------------------------------------------------------------- the command


def ranks_here() -> str:
    """What ranks can be on this machine."""
    return ("gloo", "threads")[torch.cuda.device_count()] if torch.cuda.device_count() < 2 else "nccl"


def usual_sizes(ranks_as: str) -> tuple[Size, ...]:
    return SIZES[1:4] if ranks_as == "gloo" else GPU_SIZES


def benchmark(
    size: Size,
    ranks_as: str = "gloo",
    families: Sequence[str] = TRAINING,
    only: str = "",
    repeats: int = 15,
    seconds: float = 0.2,
    compiler: str = "inductor",
) -> Result:
    print(f"{size}, ranks as {ranks_as}", flush=True)
    on_cuda = ranks_as == "nccl" or (ranks_as == "threads" and torch.cuda.is_available())
    device = torch.device("cuda" if on_cuda else "cpu")
    given = (size, device, tuple(families), only, repeats, seconds, compiler)
    found = measured(None, *given) if ranks_as == "threads" else on_ranks(measured, *given, backend=ranks_as)[0]
    gpus = torch.cuda.device_count() if ranks_as == "nccl" else found["ranks"]
    devices = 1 if ranks_as == "threads" else min(gpus, found["ranks"])
    claim = f"{size}, {size.microbatches} microbatches, 2 ranks as {ranks_as}.\n\n{CLAIM}"
    name = f"pipelines-{ranks_as}-{size.name}"
    return Result(
        name, claim, COLUMNS, rows(found, on_cuda, devices), {"model": str(size), "repeats": repeats, **found}
    )


def main() -> None:
    here = ranks_here()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(size.name for size in usual_sizes(here)))
    parser.add_argument("--families", default=",".join(TRAINING))
    parser.add_argument("--only", default="", help="contenders whose name has this regular expression in it")
    parser.add_argument("--ranks-as", choices=["gloo", "nccl", "threads"], default=here)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one repeat of a step without a bubble")
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile")
    given = parser.parse_args()
    what = given.ranks_as, given.families.split(","), given.only, given.repeats, given.seconds, given.compiler
    for name in given.sizes.split(","):
        benchmark(BY_NAME[name], *what).write()


if __name__ == "__main__":
    main()
