from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipework import demo
from pipework.cli import main


def test_the_demo_end_to_end(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["demo", "--steps", "8", "--page", str(page), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["equal"]
    assert [stage["sends"] for stage in told["stages"]] == [{"1": 4 * 64 * 128 * 4}, {}]
    assert told["first_loss"] == pytest.approx(math.log(256), abs=0.3)  # it knows nothing yet
    assert told["last_loss"] < told["first_loss"]
    assert all(0 < told["bubble"][name] < 1 for name in ("planned", "recorded"))
    assert all(f"<h2>{name} " in page.read_text() for name in ("planned", "recorded"))
    assert 'data-unit=""' not in page.read_text()  # both are in seconds


def test_batches_are_the_same_on_every_rank_and_shifted_by_one() -> None:
    (inputs, target), (again, _) = demo.Text(16).batch(), demo.Text(16).batch()
    assert inputs.shape == target.shape == (demo.BATCH, 16)
    assert inputs.equal(again)
    assert inputs[:, 1:].equal(target[:, :-1])


def test_the_model_knows_nothing_of_pipelines() -> None:
    source = Path(str(demo.example().__file__)).read_text()
    assert "pipework" not in source
    assert "split" not in source
