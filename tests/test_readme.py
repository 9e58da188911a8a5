"""The README's quick start runs as pasted, and is as short as promised."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def quick_start() -> str:
    section = README.split("## Quick start")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_quick_start_runs_as_pasted_and_learns(tmp_path: Path) -> None:
    script = tmp_path / "quick_start.py"
    script.write_text(quick_start())
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "bitwise equal to the unsplit model" in lines
    losses = [float(line) for line in lines if re.fullmatch(r"\d\.\d+", line)]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


def test_the_quick_start_is_short() -> None:
    assert len(quick_start().splitlines()) <= 15


def test_pictures_and_pages_that_it_shows_are_there() -> None:
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (root / t).exists()] == []
