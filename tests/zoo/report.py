"""What became of the zoo: a table for the terminal, and docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tests.zoo.trial import Result

_INTRODUCTION = """# Coverage: models of the transformers library

Written by `make zoo`; do not edit. {origin}

Each model class is made from a tiny random config, and counts if its own forward and backward run. It is cut at its
layer lists into 2 stages and into 4 (or as many as there are layers). As a local pipe it is compared with the uncut
model in train and in eval mode: output (type, structure, layout), every gradient, every buffer, parameter names, and
once more with another batch size and sequence length. Then it trains for 3 steps of AdamW and a fourth with other
shapes on ranks as threads: 2 stages under 1F1B, 4 under interleaved 1F1B on 2 ranks, and 4 under ZB-H1 on 4 ranks, with
backwards in two halves. Losses, merged outputs, gradients, parameters and buffers are compared with the uncut model run
microbatch by microbatch. Equal means equal in every bit.

The zoo passes `use_cache=False` and switches off LayerDrop, SpecAugment, Reformer's axial positions and BigBird's
sparse attention; timm backbones become a tiny ResNet; detection labels are not passed, and some multimodal models are
called with text only. A model whose gradients differ between two runs from one seed does not count. A model that takes
longer than 120 s of processor time counts as not passing.
"""


_UNFINISHED = (
    "The catalogue has {classes} classes; the others were not tried yet. `make zoo` goes on where it was stopped.\n"
)


def _origin(results: Sequence[Result]) -> str:
    """What the results are of: one state of the code, or several."""
    states = Counter(r.state for r in results)
    if len(states) == 1:
        return f"All of it is from one state: {next(iter(states))}."
    parts = "; ".join(f"{count} classes on {state}" for state, count in states.most_common())
    return f"It is put together from runs of several states:\n{parts}."


def table(results: Sequence[Result]) -> str:
    """Numbers of classes by kind."""
    head = ("kind", "classes", "run by themselves", "right as a pipe", "trained right")
    groups = [(kind, [r for r in results if r.kind == kind]) for kind in sorted({r.kind for r in results})]
    rows = [head, *((kind, *map(str, _counted(group))) for kind, group in (*groups, ("all", results)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|" + "|".join(" " + "-" * width + " " for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(results: Sequence[Result]) -> str:
    """One line."""
    tried, run, _, _ = _counted(results)
    passing = sum(r.runs and r.passes for r in results)
    refused = sum(r.runs and "refused" in (r.pipe, r.train) for r in results)
    wrong = run - passing - refused
    return (
        f"{passing} of {run} models pass, {refused} refused with a reason, {wrong} wrong or not done in time "
        f"({tried} classes tried)"
    )


def _counted(results: Sequence[Result]) -> tuple[int, int, int, int]:
    run = [r for r in results if r.runs]
    return len(results), len(run), sum(r.pipe == "right" for r in run), sum(r.passes for r in run)


def written(results: Sequence[Result], classes: int) -> str:
    """The page on coverage; `classes` are those of the catalogue, tried or not."""
    run = [r for r in results if r.runs]
    elsewhere = [r for r in run if r.passes and r.reason]
    failing = [r for r in run if not r.passes]
    left = [r for r in results if not r.runs]
    parts = [
        _INTRODUCTION.format(origin=_origin(results)),
        f"**{summary(results)}.**\n",
        *([_UNFINISHED.format(classes=classes)] if len(results) < classes else []),
        table(results) + "\n",
        "## What does not pass\n",
        *(f"- `{r.name}`: {_verdict(r)}: {_clean(r.reason)}" for r in failing),
        "\n## What passes, but not at every cut\n",
        *(f"- `{r.name}` is cut at {r.cut} instead. {_clean(r.reason)}" for r in elsewhere),
        "\n## What passes\n",
        ", ".join(f"`{r.name}`" for r in run if r.passes and not r.reason) + "\n",
        "## What does not count\n",
        "No tiny config and input that run the model's own forward and backward were found for these; the first problem"
        " met says why.\n",
        *(f"- `{r.name}`: {_clean(r.own.partition(' | ')[0])}" for r in left),
    ]
    return "\n".join(parts) + "\n"


def _verdict(result: Result) -> str:
    return f"as a pipe {result.pipe}" if result.pipe != "right" else f"right as a pipe, trained {result.train}"


def _clean(text: str) -> str:
    """One line, with paths from the package on."""
    return re.sub(r"\s+", " ", re.sub(r"/\S*/site-packages/", "", text)).strip()[:600]
