"""Schedules on the command line: of a family, from a file, or searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipework.cli.output import figures, print_json, spans
from pipework.cli.terminal import print_timeline
from pipework.errors import InputError, nearest
from pipework.plan import FAMILIES, Costs, Family, Layout, Schedule
from pipework.plan import search as search_for
from pipework.plan.files import read_csv, read_json, write_csv, write_json

_READERS = {".json": read_json, ".csv": read_csv}
_WRITERS = {".json": write_json, ".csv": write_csv}


def known(name: str) -> Family:
    """The family of this name; raises InputError if there is none."""
    if name not in FAMILIES:
        raise InputError(
            f"there is no schedule {name!r}{nearest(name, FAMILIES)}", remedy=f"use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def load(name: str) -> Schedule | None:
    """The schedule in the file of this name, ending in .json or .csv; None for any other name."""
    reader = _READERS.get(Path(name).suffix)
    return None if reader is None else reader(name)


def save(schedule: Schedule, path: Path) -> None:
    """Write a schedule as the name of the file says; raises InputError for other endings than .json and .csv."""
    if path.suffix not in _WRITERS:
        raise InputError(f"{path} is no name for a schedule", remedy="let it end in .json, or in .csv for torch")
    _WRITERS[path.suffix](schedule, path)


Recompute = Annotated[
    str | None,
    typer.Option(metavar="all|STAGE[,STAGE]...", help="Stages that drop their activations, and do the forward again."),
]
Boundary = Annotated[
    float, typer.Option(min=0, metavar="NUMBER", help="What such a stage keeps: its inputs, in activations.")
]


def recomputing(schedule: Schedule, stages: str | None) -> Schedule:
    """The schedule with the stages recomputed that `--recompute` names; without it, as it is."""
    if stages is None:
        return schedule
    try:
        return schedule.recomputing(None if stages == "all" else map(int, stages.split(",")))
    except ValueError:
        raise InputError(f"{stages!r} names no stages", remedy="write all, or numbers with commas between") from None


def numbers(text: str) -> float | tuple[float, ...]:
    """One number, or several with commas between them.

    >>> numbers("1"), numbers("10,10,16")
    (1.0, (10.0, 10.0, 16.0))
    """
    try:
        return tuple(map(float, text.split(","))) if "," in text else float(text)
    except ValueError:
        raise InputError(f"{text!r} is not a number", remedy="give one, or several with commas between them") from None


Amounts = Annotated[
    str, typer.Option(metavar="NUMBER[,NUMBER]...", help="How long it takes: one for all stages, or one per stage.")
]


def search(  # noqa: PLR0913, PLR0917 - an option each
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 4,
    microbatches: Annotated[int, typer.Option(min=1, help="Number of microbatches.")] = 8,
    per_rank: Annotated[int, typer.Option(min=1, help="Stages per rank.")] = 1,
    vee: Annotated[bool, typer.Option("--vee", help="Two stages per rank, down the ranks and up again.")] = False,
    forward: Amounts = "1",
    input_gradient: Amounts = "1",
    weight_gradient: Amounts = "1",
    transfer: Annotated[float, typer.Option(min=0, metavar="NUMBER", help="How long it takes.")] = 0.0,
    memory: Annotated[
        str | None, typer.Option(metavar="NUMBER[,NUMBER]...", help="The most activations alive on a rank, or on each.")
    ] = None,
    span: Annotated[bool, typer.Option("--span", help="Make the span short instead of the makespan.")] = False,
    whole_backward: Annotated[bool, typer.Option("--whole-backward", help="Never split a backward.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="How long a solver may search.")] = 10.0,
    save_file: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the schedule, as .json or as torch's .csv.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Search for the best schedule of given costs within given memory, and say how good it is at most.

    Try it: pipework search --forward 10,10,10,16 --input-gradient 10,10,10,16 --memory 4 --transfer 1
    """
    found = search_for(
        Layout.vee(ranks) if vee else Layout.loop(ranks, per_rank),
        microbatches,
        Costs(numbers(forward), numbers(input_gradient), numbers(weight_gradient), transfer),
        memory=None if memory is None else numbers(memory),
        objective="span" if span else "makespan",
        split_backward=not whole_backward,
        seconds=seconds,
    )
    if save_file is not None:
        save(found.schedule, save_file)
    if json:
        told: dict[str, Any] = {"found": found.text, "bound": found.bound, "optimal": found.optimal}
        print_json({**told, **figures(found.timeline), "spans": spans(found.timeline)})
    else:
        print_timeline(Console(), found.timeline)
        typer.echo(found.text)
