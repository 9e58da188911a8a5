"""The demo: a small GPT learns the sources of Python's standard library, cut into one stage for each process.

`pipework demo` starts it; so does `torchrun --standalone --nproc-per-node 2 -m pipework.demo`. The model is the file
`examples/gpt.py`, which knows nothing of pipelines.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pipework.cli.launch import gloo
from pipework.cli.terminal import percent, print_timeline
from pipework.errors import InputError
from pipework.plan import Timeline, measured, one_f_one_b, simulate
from pipework.run import Runner
from pipework.show import html
from pipework.split import Pipe, pipeline
from pipework.split.table import rows
from pipework.verify import Report, verify

STEPS = 200
PAGE = Path("pipework-demo.html")

MICROBATCHES = 8
BATCH = 32  # sequences
LEARNING_RATE = 3e-3
LARGEST_NORM = 1.0  # of all gradients together
MEASURED = 4  # steps before the training
SEED = 0


@final
class Text:
    """The sources of Python's standard library as bytes, and the batches drawn from them, the same on every rank."""

    def __init__(self, length: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        if not files:
            raise InputError("this Python comes without the sources of its standard library")
        self._bytes = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        self.length = length
        self._random = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return len(self._bytes)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Sequences and their next bytes: int64 (sequences, length) each."""
        starts = torch.randint(len(self) - self.length, (BATCH, 1), generator=self._random)
        windows = self._bytes[starts + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


@final
@dataclass(frozen=True, slots=True)
class Training:
    """What a training left: each step's loss and timeline, and how many tokens (bytes) it learned from in a second."""

    losses: tuple[float, ...]
    timelines: tuple[Timeline, ...]
    speed: float

    @property
    def last_loss(self) -> float:
        """The mean of the last ten losses."""
        return fmean(self.losses[-10:])

    @property
    def typical(self) -> Timeline:
        """The step of median length."""
        return sorted(self.timelines, key=lambda timeline: timeline.makespan)[len(self.timelines) // 2]


def run(steps: int = STEPS, page: Path = PAGE, quiet: bool = False) -> dict[str, Any]:
    """The demo on one rank of the default process group, all of which call it; gives what happened as plain data."""
    console = Console(quiet=quiet or dist.get_rank() > 0, highlight=False)
    gpt = example()
    torch.manual_seed(SEED)
    model, text = gpt.build(), Text(gpt.Config().context)
    pipe = _cut(model, text, console)
    schedule = one_f_one_b(pipe.layout(dist.get_world_size()), MICROBATCHES)
    runner = Runner(pipe, schedule, loss=loss, group=dist.group.WORLD, record=True)
    _plan(runner, text, console)
    report = _prove(model, text, console)
    told = {"ranks": schedule.layout.ranks, "stages": rows(pipe), "equal": report.equal}
    if not report.equal:
        return told
    training = _train(runner, text, steps, console)
    timelines = {"planned": simulate(schedule, measured(training.timelines)), "recorded": training.typical}
    _show(timelines, page, console)
    return {
        **told,
        "first_loss": training.losses[0],
        "last_loss": training.last_loss,
        "tokens_per_second": training.speed,
        "bubble": {name: timeline.bubble for name, timeline in timelines.items()},
        "makespan": {name: timeline.makespan for name, timeline in timelines.items()},
        "page": str(page.resolve()),
    }


def _cut(model: nn.Module, text: Text, console: Console) -> Pipe:
    stages = dist.get_world_size()
    microbatch = text.batch()[0][: BATCH // MICROBATCHES]
    pipe = pipeline(model, (microbatch,), stages=stages)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.rule(f"The cut: {parameters:,} parameters in {stages} stages, a process each", align="left")
    console.print(str(pipe), markup=False, soft_wrap=True)
    return pipe


def _plan(runner: Runner, text: Text, console: Console) -> None:
    _, *timelines = (timeline for _, timeline in _steps(runner, text, 1 + MEASURED))  # the first step prepares the rest
    for parameter in runner.parameters():
        parameter.grad = None
    console.rule(f"The plan: {runner.schedule.name}, with durations measured in {MEASURED} steps", align="left")
    print_timeline(console, simulate(runner.schedule, measured(timelines)))


def _prove(model: nn.Module, text: Text, console: Console) -> Report:
    inputs, target = text.batch()
    ranks = dist.get_world_size()
    report = verify(
        model,
        (inputs,),
        target=target,
        loss=loss,
        stages=ranks,
        ranks=ranks,
        microbatches=MICROBATCHES,
        group=dist.group.WORLD,
    )
    console.rule("The proof: one step against the unsplit model, with dropout", align="left")
    console.print(report.text(), markup=False, soft_wrap=True)
    return report


def _train(runner: Runner, text: Text, steps: int, console: Console) -> Training:
    console.rule(f"The training: {len(text):,} bytes of Python's standard library", align="left")
    optimizer = torch.optim.AdamW(runner.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    losses: list[float] = []
    timelines: list[Timeline] = []
    speed = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loss  ...", total=steps)
        for step, (value, timeline) in enumerate(_steps(runner, text, steps)):
            runner.clip_grad_norm_(LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(value)
            timelines.append(timeline)
            speed = len(losses) * BATCH * text.length / (time.perf_counter() - began)
            line = f"loss {value:.2f}, {speed:,.0f} tokens per second"
            progress.update(task, advance=1, description=line)
            if not step % max(1, steps // 8):
                progress.console.print(f"step {step:4}  {line}")
    training = Training(tuple(losses), tuple(timelines), speed)
    console.print(f"loss {losses[0]:.2f} at the first step, {training.last_loss:.2f} over the last ten")
    return training


def _steps(runner: Runner, text: Text, steps: int) -> Iterator[tuple[float, Timeline]]:
    """Forward and backward of so many batches; the caller takes the gradients."""
    for _ in range(steps):
        inputs, target = text.batch()
        yield runner.step(inputs, target=target).item(), runner.recorded


def _show(timelines: Mapping[str, Timeline], page: Path, console: Console) -> None:
    console.rule("Planned with the median durations of the training, and recorded", align="left")
    for name, timeline in timelines.items():
        console.print(f"{name}: bubble {percent(timeline.bubble)}, makespan {1e3 * timeline.makespan:.0f} ms")
        print_timeline(console, timeline)
    if dist.get_rank() == 0:
        html.write(page, timelines, title=timelines["recorded"].schedule.describe())
    console.print(f"Both, to look at in a browser: {page.resolve().as_uri()}", soft_wrap=True)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of the next byte at every position."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def example() -> ModuleType:
    """The module `examples/gpt.py`: of the checkout, or as the wheel carries it."""
    here = Path(__file__).parent
    path = next(filter(Path.is_file, (here / "examples" / "gpt.py", here.parents[1] / "examples" / "gpt.py")))
    spec = importlib.util.spec_from_file_location("gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """The demo as torchrun starts it; gives the exit code, 1 where the proof failed."""
    if not dist.is_torchelastic_launched():
        print("pipework: start the demo with `pipework demo`, or with torchrun", file=sys.stderr)
        return 2
    with gloo():
        return 0 if run()["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
