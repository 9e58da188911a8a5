"""What commands print and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from pipework.cli.terminal import percent
from pipework.errors import InputError, ScheduleError
from pipework.plan import Timeline, crossings


def figures(timeline: Timeline) -> dict[str, Any]:
    """The figures of a timeline, for JSON."""
    schedule = timeline.schedule
    layout = schedule.layout
    return {
        "schedule": schedule.name,
        "ranks": layout.ranks,
        "stages": layout.stages,
        "microbatches": schedule.microbatches,
        "makespan": timeline.makespan,
        "span": timeline.span,
        "bubble": timeline.bubble,
        "bubble_of_span": timeline.bubble_of_span,
        "peaks": timeline.peaks,
        "transfers": crossings(schedule),
    }


def spans(timeline: Timeline) -> list[dict[str, Any]]:
    """All spans of a timeline, for JSON."""
    return [
        {"rank": span.rank, "action": str(span.action), "start": span.start, "end": span.end} for span in timeline.spans
    ]


def print_comparison(timelines: Mapping[str, Timeline], refused: Mapping[str, ScheduleError]) -> None:
    """Print a table of timelines, and below it why others are not in it."""
    table = Table("schedule", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("stages", "makespan", "span", "bubble", "peak", "transfers"):
        table.add_column(column, justify="right")
    for family, timeline in timelines.items():
        told = figures(timeline)
        table.add_row(
            family,
            str(told["stages"]),
            f"{timeline.makespan:.4g}",
            f"{timeline.span:.4g}",
            percent(timeline.bubble),
            f"{max(timeline.peaks):.4g}",
            str(told["transfers"]),
        )
    console = Console()
    console.print(table)
    for error in refused.values():
        console.print(f"{error.what}; {error.remedy}", style="yellow", markup=False, soft_wrap=True)


def require_folder(path: Path) -> None:
    """Raises InputError unless the folder of a file to write exists."""
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", remedy=f"create it, or write {path.name} elsewhere")


def print_json(data: object) -> None:
    """Print JSON."""
    typer.echo(json.dumps(data, indent=2))


def write(path: Path, text: str) -> None:
    """Write a file; raises InputError if that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", remedy="name a file in a folder that exists"
        ) from error
