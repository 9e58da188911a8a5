"""Numbers made comparable and written down: medians over alternating repeats, and the machine they come from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Times of another over times of ours, one for each repeat: above 1, ours is faster."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, other: Sequence[float], ours: Sequence[float]) -> Ratio:
        found = [a / b for a, b in zip(other, ours, strict=True)]
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.greatest:.3f})"


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    name: str
    claim: str  # what the figures should show
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Any  # every single time, for whoever wants to judge differently

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"{self.claim}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write(self) -> None:
        """Print the table, and keep it with all times in `benchmarks/results/`."""
        machine = facts()
        told = "".join(f"- {key}: {value}\n" for key, value in machine.items())
        FOLDER.mkdir(exist_ok=True)
        whole = json.dumps({"machine": machine, **self.data}, indent=1)
        (FOLDER / f"{self.name}.json").write_text(whole + "\n")
        (FOLDER / f"{self.name}.md").write_text(f"# {self.name}\n\n{self.markdown()}\n{told}")
        print(self.markdown(), flush=True)


def alternated(
    contenders: Mapping[Name, Callable[[], float]], repeats: int, say: Callable[[str], None] = print
) -> dict[Name, list[float]]:
    """Times of each contender: A B C, A B C, ... so that whatever slows the machine for a while slows them alike."""
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, measure in contenders.items():
            times[name].append(measure())
        latest = ", ".join(f"{name} {values[-1] * 1e3:.3f} ms" for name, values in times.items())
        say(f"  {repeat + 1}/{repeats}: {latest}")
    return times


def milliseconds(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1e3:.3f}"


def facts() -> dict[str, Any]:
    """The machine and the call, as far as they bear on the figures."""
    import torch

    import pipework

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", *_called()]),
        "pipework": pipework.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU": _processor(),
        "cores": os.cpu_count(),
        "threads of each process": 1,
        "load of the last 1, 5 and 15 minutes": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        **({"GPUs": ", ".join(gpus)} if gpus else {}),
    }


def _called() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    name = "benchmarks" if spec is None else spec.name.removesuffix(".__main__")
    return [name, *sys.argv[1:]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
