"""Writes docs/schedules.md and its pictures from the families themselves: `python docs/make_schedules.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

from pipework.plan import FAMILIES, Costs, Kind, Timeline, crossings, simulate
from pipework.plan.families import Family
from pipework.show.colours import KINDS
from pipework.show.picture import picture

HERE = Path(__file__).parent
RANKS, MICROBATCHES = 4, 8

INTRODUCTION = f"""\
# Schedules

Every family on this page is one function of `pipework.schedules`. It takes a layout and a number of microbatches and
gives a `Schedule`: a value that is checked, simulated, drawn, compared and run. The page is written by
`python docs/make_schedules.py`. Figures and pictures are those of {RANKS} ranks and {MICROBATCHES} microbatches, where
the share of the model on one rank takes 1 for the forward, 1 for the input gradient and 1 for the weight gradient, and
transfers take nothing. `pipework compare` prints the same table for any costs, and `pipework draw FAMILY` draws one.

- *Makespan* is from the first start to the last end on any rank, *span* that of the longest rank alone: in a row of
  steps the next one may begin where a rank is done, so a claim of "zero bubble" is one about the span.
- *Bubble* is the idle share of the makespan. That of the span is 0 where the papers say "zero bubble" (span 24 here).
- *Peak* is the most activation memory of any rank: 1 is what one microbatch keeps on one rank.
- *Transfers* cross from rank to rank.
"""
EPILOGUE = """\
## Which one?

Start with `one_f_one_b`. If its bubble is too large and more microbatches cannot be had, then with memory to spare take
`zero_bubble_h2` or `zero_bubble_2p`; with none to spare `zero_bubble_v`, which wants the model cut into twice as many
stages as ranks; with less than none `v_half` and `v_min`. `interleaved_one_f_one_b` is for models whose weight
gradients cannot be split off. If stages cost unlike, `pipework search` finds an order for just these costs.

Splitting the backward changes no number. What is split off are the weight gradients of `Linear`, `Conv` and `Embedding`
modules. Those of other modules come with the input gradient, and so do those of a weight that is used in other ways
too, of compiled code, and of parameters with hooks or shared between stages. One thing is not seen: a block that uses a
layer's weight beside the layer's own call in some microbatches only, where others do as many other operations instead,
and call the same modules. That use's gradient is lost; run such a block by a schedule that does not split.
"""


def timeline(family: Family) -> Timeline:
    """Its schedule of the page's size, for costs that are those of one rank's share of the model."""
    schedule = family.plan(family.layout(RANKS), MICROBATCHES, Costs())
    forwards = sum(action.kind is Kind.FORWARD for order in schedule.orders for action in order)
    share = RANKS * MICROBATCHES / forwards  # as in `pipework compare`
    return simulate(schedule, Costs(share, share, share, activation=share))


def overview(timelines: dict[str, Timeline]) -> str:
    lines = [
        "| family | stages per rank | makespan | span | bubble | peak | transfers | runs | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in timelines.items():
        family, layout = FAMILIES[name], found.schedule.layout
        figures = [
            f"[`{name}`](#{name})",
            f"{layout.stages // layout.ranks}",
            f"{found.makespan:g}",
            f"{found.span:g}",
            f"{100 * found.bubble:.1f} %",
            f"{max(found.peaks):g}" if found.schedule.trains else "-",
            str(crossings(found.schedule)),
            "yes" if family.runs else "planned only",
            f"[{family.paper}](https://arxiv.org/abs/{family.paper.removeprefix('arXiv:')})",
        ]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def section(name: str) -> str:
    """What the function says of itself, without the example, and the picture."""
    said = inspect.getdoc(FAMILIES[name].build) or ""
    text = said.partition(">>>")[0].strip()
    return f"## {name}\n\n{text}\n\n![{name}](images/schedules/{name}.svg)\n"


def legend() -> str:
    """One swatch for each kind of action, as an SVG file."""
    swatches = "".join(
        f'<rect x="{160 * place}" y="2" width="22" height="14" fill="{colour}"/>'
        f'<text x="{160 * place + 29}" y="14">{name}, {kind.value}</text>'
        for place, (kind, (name, colour)) in enumerate(KINDS.items())
    )
    style = "<style>text { font: 13px system-ui, sans-serif; fill: #7a8694; }</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{160 * len(KINDS)}" height="18">{style}{swatches}</svg>\n'


def pages() -> dict[Path, str]:
    """All that the page is made of, by path."""
    timelines = {name: timeline(family) for name, family in FAMILIES.items()}
    sections = "\n".join(section(name) for name in FAMILIES)
    text = "\n".join(
        (INTRODUCTION, overview(timelines), EPILOGUE, "![colours](images/schedules/legend.svg)\n", sections)
    )
    pictures = {name: picture(found) for name, found in timelines.items()} | {"legend": legend()}
    return {HERE / "schedules.md": text} | {
        HERE / "images" / "schedules" / f"{name}.svg": text for name, text in pictures.items()
    }


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
