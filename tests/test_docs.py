"""The examples on the pages of the documentation run as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import make_schedules
from pipework.plan import FAMILIES

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as torch's compiler loads
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as it looks at inputs
@pytest.mark.parametrize("page", ["compile.md", "errors.md", "losses.md", "recompute.md"])
def test_the_examples_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in re.findall(r"```text\n(.*?)```", text, re.DOTALL))


def test_the_page_of_schedules_is_what_the_families_say() -> None:
    pages = make_schedules.pages()
    assert len(pages) == len(FAMILIES) + 2
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
    assert not stale, "run: python docs/make_schedules.py"
