"""A pipe as a table a person can read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipework.split.pipe import Pipe


def rows(pipe: Pipe) -> list[dict[str, object]]:
    """Per stage: the modules it calls, its parameters, and the bytes it sends to each later stage per microbatch."""
    variant = pipe.variant(pipe.example)
    found: list[dict[str, object]] = []
    for part in variant.cut.parts:
        stage = pipe.get_stage_module(part.index)
        found.append(
            {
                "stage": part.index,
                "modules": list(part.modules),
                "parameters": sum(p.numel() for p in stage.parameters()),
                "sends": {
                    e.target: sum(w.size for w in e.values)
                    for e in variant.cut.edges
                    if e.source == part.index and e.values
                },
            }
        )
    return found


def table(pipe: Pipe) -> str:
    """The cut of a pipe, one line a stage."""
    lines = [("stage", "modules", "parameters", "sends per microbatch")]
    for row in rows(pipe):
        sends = row["sends"]
        assert isinstance(sends, dict)
        assert isinstance(row["modules"], list)
        text = ", ".join(f"to {target}: {size_text(size)}" for target, size in sends.items())
        lines.append((str(row["stage"]), ranges(row["modules"]), f"{row['parameters']:,}", text or "-"))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)


def size_text(size: int) -> str:
    """Bytes for people.

    >>> size_text(64), size_text(3 * 2**20)
    ('64 B', '3.0 MiB')
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def ranges(names: Sequence[str]) -> str:
    """Names with runs of numbers drawn together.

    >>> ranges(["embed", "layers.0", "layers.1", "layers.2", "norm"])
    'embed, layers.0-2, norm'
    """
    out: list[str] = []
    run: list[int] = []
    stem: str | None = None

    def close() -> None:
        if run:
            last = f"-{run[-1]}" if len(run) > 1 else ""
            out.append(f"{stem}{run[0]}{last}")
            run.clear()

    for name in names:
        match = re.fullmatch(r"(.*\.)(\d+)", name)
        if match and stem == match[1] and run and int(match[2]) == run[-1] + 1:
            run.append(int(match[2]))
            continue
        close()
        if match:
            stem = match[1]
            run.append(int(match[2]))
        else:
            out.append(name)
    close()
    return ", ".join(out) or "-"
