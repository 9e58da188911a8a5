"""The commands. Those that only plan never import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipework.cli.output import figures, print_comparison, print_json, require_folder, spans, write
from pipework.cli.plans import Boundary, Recompute, known, load, recomputing, save, search
from pipework.cli.terminal import print_timeline
from pipework.errors import ScheduleError
from pipework.plan import FAMILIES, Costs, Kind, Schedule, Timeline, simulate
from pipework.show import html, trace

app = typer.Typer(
    help="Pipeline parallelism for PyTorch: cut a model, plan its schedule, prove it equal, see it run.",
    epilog="Each command says more with --help, and prints JSON with --json.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_FAMILIES = ", ".join(FAMILIES)

_OR_FILE = "or a file of a schedule, .json or .csv, for the ranks and microbatches that it says"

Name = Annotated[str, typer.Argument(metavar="FAMILY", help=f"One of {_FAMILIES}, {_OR_FILE}.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FAMILY]...", help=f"Of {_FAMILIES}, {_OR_FILE}; all families that train unless given."),
]
Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY", help="A function that gives the model, (model, args) or (model, args, kwargs)."
    ),
]
Example = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="A function that gives the model's input: a tensor, args, kwargs or (args, kwargs).",
    ),
]
Stages = Annotated[int | None, typer.Option(min=1, help="Cut into so many stages, balanced by counted cost.")]
At = Annotated[
    list[str] | None, typer.Option(metavar="NAME[:end]", help="Cut before (or after) this module; may be repeated.")
]
Cut = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Cut where this file says, as written by `pipework split --save`.")
]
Ranks = Annotated[int, typer.Option(min=1, help="Number of ranks.")]
Microbatches = Annotated[int, typer.Option(min=1, help="Number of microbatches.")]
PerRank = Annotated[int | None, typer.Option(min=1, help="Stages per rank; unless given, as is usual for the family.")]
Duration = Annotated[float, typer.Option(min=0, metavar="NUMBER", help="How long it takes, in any one unit.")]
Page = Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw to an HTML page.")]
Save = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Also write the schedule, as .json or as torch's .csv.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 200,
    ranks: Annotated[int, typer.Option(min=2, help="Number of processes, one stage each.")] = 2,
    page: Annotated[Path, typer.Option(metavar="FILE", help="The HTML page to write.")] = Path("pipework-demo.html"),
    json: Json = False,
) -> int:
    """A small GPT learns Python's standard library, as a pipeline of processes proven equal to the unsplit model."""
    require_folder(page)
    from pipework.cli.launch import launch
    from pipework.demo import run

    told = launch(ranks, run, steps, page, json)[0]
    if json:
        print_json(told)
    return 0 if told["equal"] else 1


@app.command()
def split(
    factory: Factory,
    example: Example = None,
    stages: Stages = None,
    at: At = None,
    cut: Cut = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write where the cuts are, to be edited and cut at again.")
    ] = None,
    json: Json = False,
) -> None:
    """Cut a model and print its stages: modules, parameters, bytes sent per microbatch.

    Without --stages, --at and --cut the cuts are where the model calls pipe_split(). The input is one microbatch.

    Try it: pipework split examples.gpt:build --example examples.gpt:example_input --stages 4
    """
    from pipework.cli.load import blamed, split_spec, subject
    from pipework.split import pipeline
    from pipework.split.table import rows

    given = subject(factory, example)
    with blamed("cutting the model"):
        pipe = pipeline(given.model, given.args, given.kwargs, split_spec=split_spec(at or (), cut), stages=stages)
    if save is not None:
        pipe.cut_points.save(save)
    if json:
        print_json({"stages": rows(pipe)})
    else:
        typer.echo(str(pipe))


@app.command()
def draw(  # noqa: PLR0913, PLR0917 - an option each
    family: Name,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    per_rank: PerRank = None,
    forward: Duration = 1.0,
    input_gradient: Duration = 1.0,
    weight_gradient: Duration = 1.0,
    transfer: Duration = 0.0,
    recompute: Recompute = None,
    boundary: Boundary = 0.0,
    page: Page = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Also write a trace for ui.perfetto.dev.")
    ] = None,
    save_file: Save = None,
    json: Json = False,
) -> None:
    """Draw a schedule as a grid of ranks over time. The durations are those of one stage's work on one microbatch."""
    costs = Costs(forward, input_gradient, weight_gradient, transfer, boundary=boundary)
    schedule = load(family) or known(family).plan(known(family).layout(ranks, per_rank), microbatches, costs)
    schedule = recomputing(schedule, recompute)
    timeline = simulate(schedule, costs)
    if save_file is not None:
        save(schedule, save_file)
    if page is not None:
        write(page, html.page({family: timeline}, title=schedule.describe()))
    if trace_file is not None:
        write(trace_file, trace.perfetto({family: timeline}))
    if json:
        print_json({**figures(timeline), "spans": spans(timeline)})
    else:
        print_timeline(Console(), timeline)


@app.command()
def compare(  # noqa: PLR0913, PLR0917 - an option each
    families: Names = None,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    per_rank: Annotated[
        int | None, typer.Option(min=1, help="Stages per rank of the families that take several; the others have one.")
    ] = None,
    forward: Duration = 1.0,
    input_gradient: Duration = 1.0,
    weight_gradient: Duration = 1.0,
    transfer: Duration = 0.0,
    recompute: Recompute = None,
    boundary: Boundary = 0.0,
    page: Page = None,
    json: Json = False,
) -> None:
    """Compare schedules of one model side by side.

    The durations are those of one rank's share of the model on one microbatch, all its stages together, so that
    families with one stage per rank and with several compare. Activations are counted in such shares, too.
    """

    def costs(share: float) -> Costs:
        times = share * forward, share * input_gradient, share * weight_gradient, transfer
        return Costs(*times, activation=share, boundary=boundary)

    timelines: dict[str, Timeline] = {}
    refused: dict[str, ScheduleError] = {}
    for name in dict.fromkeys(families or _training_families()):
        try:
            schedule = recomputing(_compared(name, ranks, microbatches, per_rank, costs), recompute)
            forwards = sum(action.kind is Kind.FORWARD for order in schedule.orders for action in order)
            timelines[name] = simulate(schedule, costs(ranks * microbatches / forwards))
        except ScheduleError as error:
            refused[name] = error
    if not timelines:
        raise next(iter(refused.values()))
    if page is not None:
        write(page, html.page(timelines, title=f"{ranks} ranks, {microbatches} microbatches"))
    if json:
        told = [figures(timeline) for timeline in timelines.values()]
        print_json({"schedules": told, "refused": {family: error.what for family, error in refused.items()}})
    else:
        print_comparison(timelines, refused)


@app.command()
def verify(  # noqa: PLR0913, PLR0917 - an option each
    factory: Factory,
    example: Example = None,
    stages: Stages = None,
    at: At = None,
    cut: Cut = None,
    schedule: Annotated[str, typer.Option(metavar="FAMILY", help=f"One of {_FAMILIES}, {_OR_FILE}.")] = "one_f_one_b",
    ranks: Ranks = 2,
    microbatches: Microbatches = 4,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="From the model's output to a loss; unless given, the mean square of the output.",
        ),
    ] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Ranks as processes over Gloo; else as threads.")
    ] = False,
    json: Json = False,
) -> int:
    """Prove that a pipelined step equals the unsplit model: loss, outputs, every gradient, bit by bit.

    The input is a whole batch. Without --stages, --at and --cut the cuts are where the model calls pipe_split(), else
    one stage per rank. Exit code 0: equal; 1: different.

    Try it: pipework verify examples.gpt:build --example examples.gpt:example_input --ranks 4
    """
    from pipework.cli.proof import Proof

    plan = load(schedule)
    if plan is None:
        known(schedule)
    else:
        ranks = plan.layout.ranks
    proof = Proof(factory, example, stages, tuple(at or ()), cut, schedule, ranks, microbatches, loss)
    report = proof.on_processes() if processes else proof.on_threads()
    if json:
        print_json(report.as_dict())
    else:
        typer.echo(report.text())
    return 0 if report.equal else 1


def _compared(
    name: str, ranks: int, microbatches: int, per_rank: int | None, costs: Callable[[float], Costs]
) -> Schedule:
    """The schedule of a family or a file, for so many ranks and microbatches."""
    found = load(name)
    if found is None:
        family = known(name)
        layout = family.layout(ranks, per_rank if family.per_rank > 1 else None)
        return family.plan(layout, microbatches, costs(ranks / layout.stages))
    if (found.layout.ranks, found.microbatches) != (ranks, microbatches):
        raise ScheduleError(
            f"{name} is for {found.layout.ranks} ranks and {found.microbatches} microbatches",
            remedy=f"give --ranks {found.layout.ranks} --microbatches {found.microbatches}",
        )
    return found


def _training_families() -> Iterator[str]:
    return (name for name, family in FAMILIES.items() if family.trains)


app.command()(search)
