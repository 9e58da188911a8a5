from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipework.cli import main
from pipework.cli.load import split_spec
from pipework.plan import FAMILIES
from pipework.split import SplitPoint

Capture = pytest.CaptureFixture[str]


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.third(self.second(self.first(x)) * scale)


def line() -> Line:
    print("building")  # must not get between the lines of JSON
    return Line()


def batch() -> Tensor:
    return torch.ones(8, 4)


def keyword_batch() -> tuple[tuple[Tensor, ...], dict[str, float]]:
    return (torch.ones(8, 4),), {"scale": 0.5}


def line_and_batch() -> tuple[Line, tuple[Tensor, ...]]:
    return Line(), (torch.ones(8, 4),)


def fails() -> nn.Module:
    raise ValueError("no such\nweights")


def three() -> int:
    return 3


def sum_of(output: Tensor) -> Tensor:
    return output.sum()


class Counting(nn.Linear):
    """Not the same twice."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name
        Counting.calls += 1
        return super().forward(input) * Counting.calls


def four() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), batch()


def counting() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Counting(4, 4), nn.Linear(4, 4)), batch()


HERE = "tests.test_cli"
LINE = (f"{HERE}:line", "--example", f"{HERE}:batch")


def printed(capsys: Capture, *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    return capsys.readouterr().out


def refusal(capsys: Capture, *arguments: str) -> str:
    """What wrong input is answered with: exit code 2, one line on standard error, nothing on standard output."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    *noise, line = err.splitlines()
    assert (out, set(noise) <= {"building"}) == ("", True)
    return line


@pytest.mark.parametrize("command", [[], ["demo"], ["split"], ["draw"], ["compare"], ["verify"], ["search"]])
def test_every_command_explains_itself(capsys: Capture, command: list[str]) -> None:
    assert "Usage: pipework" in printed(capsys, *command, *(["--help"] if command else []))


@pytest.mark.parametrize("arguments", [["draw", "--help"], ["compare", "--json"], ["search", "--seconds", "0"]])
def test_planning_does_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from pipework.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_a_missing_extra_is_said_in_one_line(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from pipework.cli import main; sys.exit(main(['draw', 'gpipe']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pipework: {missing} is not installed; run: pip install 'pipework[cli]'\n"


def test_draw_prints_the_grid(capsys: Capture) -> None:
    grid = printed(
        capsys,
        "draw",
        "one_f_one_b",
        "--ranks",
        "2",
        "--microbatches",
        "2",
        "--weight-gradient",
        "0",
        "--transfer",
        "1",
    )
    assert grid.splitlines() == [
        "rank 0  F0F1......B0..B1",
        "rank 1  ....F0B0F1B1....",
        "makespan 8, span 8, bubble 50.0 %, peak per rank 2 1",
    ]


def test_draw_recomputes_and_saves_it(capsys: Capture, tmp_path: Path) -> None:
    size, plan = ["--ranks", "2", "--microbatches", "2"], str(tmp_path / "plan.json")
    again = ["--recompute", "0", "--boundary", "0.25"]
    grid = printed(capsys, "draw", "one_f_one_b", *size, *again, "--save", plan)
    assert grid.splitlines() == [
        "rank 0  F0F1....B0----B1----",
        "rank 1  ..F0B0--F1B1--......",
        "makespan 10, span 10, bubble 30.0 %, peak per rank 1.25 1",
    ]
    assert printed(capsys, "draw", plan, "--boundary", "0.25") == grid
    verified = ("verify", f"{HERE}:four", "--schedule", plan)
    assert "1 stage recomputed" in printed(capsys, *verified)
    assert printed(capsys, "compare", plan, *size, "--boundary", "0.25").split()[-3:-1] == ["%", "1.25"]
    assert json.loads(printed(capsys, "compare", "gpipe", *size, *again, "--json"))["schedules"][0]["peaks"] == [
        1.25,
        2,
    ]
    for stages, says in (("first", "names no stages"), ("2", "but there are 2 stages")):
        assert main(["draw", "gpipe", *size, "--recompute", stages]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_draw_finds_the_stages_that_a_family_needs(capsys: Capture, family: str) -> None:
    drawn = json.loads(printed(capsys, "draw", family, "--ranks", "2", "--microbatches", "4", "--json"))
    schedule = FAMILIES[family].build(FAMILIES[family].layout(2), 4)
    assert drawn["stages"] == schedule.layout.stages
    assert len(drawn["spans"]) == sum(map(len, schedule.orders))
    crossing = [(u, v) for u, v in schedule.layout.edges if schedule.layout.rank_of[u] != schedule.layout.rank_of[v]]
    each_way = sum(len(schedule.taken_by(u)) for u, _ in crossing)
    assert drawn["transfers"] == each_way * (2 if schedule.trains else 1)
    assert max(span["end"] for span in drawn["spans"]) == drawn["makespan"]


def test_draw_writes_a_page_and_a_trace(capsys: Capture, tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    printed(capsys, "draw", "gpipe", "--page", str(page), "--trace", str(trace))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(trace.read_text())["traceEvents"]


def test_compare_gives_every_family_the_same_model(capsys: Capture, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    told = json.loads(printed(capsys, "compare", "--ranks", "2", "--microbatches", "4", "--page", str(page), "--json"))
    schedules = {each["schedule"]: each for each in told["schedules"]}
    assert list(schedules) == [family for family in FAMILIES if family != "forward_only"]
    assert schedules["one_f_one_b"]["stages"] == 2
    assert schedules["looped_bfs"]["stages"] == 4
    busy = {each["ranks"] * each["makespan"] * (1 - each["bubble"]) for each in schedules.values()}
    assert busy == {2 * 4 * 3.0}  # ranks, microbatches, durations
    assert schedules["gpipe"]["peaks"] == schedules["looped_bfs"]["peaks"] == [4, 4]
    assert all(f"<h2>{family} " in page.read_text() for family in schedules)
    assert "do not compare" not in page.read_text()


def test_compare_says_which_family_does_not_fit(capsys: Capture) -> None:
    table = printed(capsys, "compare", "gpipe", "chimera", "--ranks", "3", "--microbatches", "7")
    header, row, note = table.splitlines()
    assert header.split() == ["schedule", "stages", "makespan", "span", "bubble", "peak", "transfers"]
    assert row.split() == ["gpipe", "3", "27", "27", "22.2", "%", "7", "28"]
    assert note.startswith("chimera wants two replicas of the model on an even number of ranks")


@pytest.mark.parametrize("name", ["plan.json", "plan.csv"])
def test_a_schedule_is_saved_and_stands_for_a_family(capsys: Capture, tmp_path: Path, name: str) -> None:
    file = str(tmp_path / name)
    made = json.loads(printed(capsys, "draw", "zero_bubble_v", "--ranks", "2", "--save", file, "--json"))
    drawn = json.loads(printed(capsys, "draw", file, "--json"))
    assert {**drawn, "schedule": ""} == {**made, "schedule": ""}
    compared = ("compare", file, "zero_bubble_v", "--json", "--ranks", "2", "--microbatches", "8")
    first, second = json.loads(printed(capsys, *compared))["schedules"]
    assert {**first, "schedule": ""} == {**second, "schedule": ""}
    assert "give --ranks 2 --microbatches 8" in refusal(capsys, "compare", file)
    report = json.loads(printed(capsys, "verify", f"{HERE}:four", "--schedule", file, "--json"))
    assert report["equal"]
    assert "cannot read" in refusal(capsys, "draw", f"no-{name}")


def test_search_finds_a_schedule_and_says_how_good_it_is(capsys: Capture, tmp_path: Path) -> None:
    costs = ("--forward", "10,10,10,15", "--input-gradient", "10,10,10,15", "--weight-gradient", "10,10,10,15")
    asked = ("search", *costs, "--transfer", "1", "--microbatches", "16", "--memory", "4")
    told = json.loads(printed(capsys, *asked, "--save", str(tmp_path / "plan.json"), "--json"))
    assert (told["makespan"], told["bound"], told["optimal"], told["ranks"]) == (753, 753, True, 4)
    assert printed(capsys, *asked).splitlines()[-1].startswith("makespan 753, optimal; ")
    options = ("--vee", "--ranks", "2", "--microbatches", "2", "--memory", "4,5", "--span", "--whole-backward")
    assert "makespan 16, span 16" in printed(capsys, "search", *options, "--seconds", "0")
    assert json.loads((tmp_path / "plan.json").read_text())["microbatches"] == 16


def test_split_prints_the_table(capsys: Capture) -> None:
    assert printed(capsys, "split", *LINE, "--at", "second", "--at", "third").splitlines() == [
        "stage  modules  parameters  sends per microbatch",
        "    0  first            20  to 1: 128 B",
        "    1  second           20  to 2: 128 B",
        "    2  third            20  -",
    ]


@pytest.mark.parametrize(
    "model",
    [LINE, (f"{HERE}:line_and_batch",), (f"{HERE}:line", "--example", f"{HERE}:keyword_batch")],
)
def test_split_takes_the_input_from_wherever_it_is_made(capsys: Capture, model: tuple[str, ...]) -> None:
    told = json.loads(printed(capsys, "split", *model, "--stages", "3", "--json"))
    assert [stage["modules"] for stage in told["stages"]] == [["first"], ["second"], ["third"]]


def test_split_imports_from_the_current_directory(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_model_of_mine.py").write_text(f"from {HERE} import line_and_batch as build\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "third" in printed(capsys, "split", "a_model_of_mine:build", "--stages", "2")


def test_split_spec_says_before_or_after() -> None:
    assert split_spec(["a", "b.0:end", "c:beginning"]) == {
        "a": SplitPoint.BEGINNING,
        "b.0": SplitPoint.END,
        "c": SplitPoint.BEGINNING,
    }


@pytest.mark.parametrize("schedule", ["one_f_one_b", "gpipe"])
def test_verify_proves_a_model_equal(capsys: Capture, schedule: str) -> None:
    options = ("--ranks", "3", "--schedule", schedule, "--loss", f"{HERE}:sum_of")
    told = json.loads(printed(capsys, "verify", *LINE, *options, "--json"))
    assert told["equal"]
    assert sum(each["kind"] == "gradient" for each in told["comparisons"]) == 6
    assert printed(capsys, "verify", *LINE, *options).endswith("bitwise equal to the unsplit model\n")


def test_verify_finds_a_difference(capsys: Capture) -> None:
    assert "NOT equal" in printed(capsys, "verify", f"{HERE}:counting", "--microbatches", "2", code=1)


def test_verify_on_processes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *LINE, "--processes", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["equal"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drw"], "No such command 'drw'"),
        (["draw"], "Missing argument 'FAMILY'"),
        (["draw", "gpip"], "there is no schedule 'gpip'; nearest existing: gpipe; use one of gpipe, one_f_one_b"),
        (["draw", "gpipe", "--ranks", "0"], "--ranks"),
        (["draw", "gpipe", "--ranks", "two"], "--ranks"),
        (["draw", "gpipe", "--rank", "2"], "--ranks"),
        (["draw", "gpipe", "--forward", "-1"], "--forward"),
        (["draw", "gpipe", "--forward", "inf"], "costs give inf as forward"),
        (["draw", "gpipe", "--per-rank", "2"], "gpipe wants one stage per rank"),
        (["draw", "chimera", "--ranks", "3"], "use Layout.bidirectional(4)"),
        (["draw", "gpipe", "--page", "no/such/folder/page.html"], "cannot write no/such/folder/page.html"),
        (["draw", "gpipe", "--save", "plan.txt"], "let it end in .json, or in .csv for torch"),
        (["draw", "gpipe", "--save", "no/such/folder/plan.csv"], "cannot write 'no/such/folder/plan.csv'"),
        (["search", "--forward", "1,two"], "'1,two' is not a number"),
        (["search", "--forward", "1,2"], "costs give forward for 2 stages, but the layout has 4"),
        (["search", "--memory", "0.5"], "does not hold one microbatch"),
        (["compare", "one_f_1b"], "nearest existing: one_f_one_b"),
        (["compare", "dual_pipe", "--microbatches", "1"], "use at least 2 microbatches"),
        (["split", "tests"], "write MODULE:FUNCTION"),
        (["split", "tests.test_clo:line"], "there is no module tests.test_clo (nearest existing: test_cli"),
        (["split", f"{HERE}:lime"], "has no function 'lime'; nearest existing: line"),
        (["split", f"{HERE}:fails"], "failed: ValueError: no such weights"),
        (["split", f"{HERE}:three"], f"{HERE}:three gives int; let it give a model"),
        (["split", *LINE, "--at", "secnd"], "nearest existing: second"),
        (["split", *LINE, "--at", "second:middle"], "write second:beginning or second:end"),
        (["split", *LINE, "--at", "second", "--at", "second:end"], "two cuts are at 'second'"),
        (["split", *LINE, "--stages", "9"], "ask for at most 3 stages"),
        (["split", *LINE, "--stages", "2", "--at", "second"], "pass one of them"),
        (["verify", *LINE, "--schedule", "gpip"], "nearest existing: gpipe"),
        (["verify", *LINE, "--microbatches", "3"], "does not divide into 3 microbatches"),
        (["demo", "--page", "no/such/folder/page.html"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys: Capture, arguments: list[str], said: str) -> None:
    assert said in refusal(capsys, *arguments)


def test_a_cut_is_saved_and_cut_at_again(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "cut.json"
    printed(capsys, "split", *LINE, "--stages", "3", "--save", str(file))
    assert json.loads(file.read_text()) == {"cuts": [{"before": "second"}, {"before": "third"}]}
    file.write_text('{"cuts": [{"before": "third"}]}')
    told = json.loads(printed(capsys, "split", *LINE, "--cut", str(file), "--json"))
    assert [stage["modules"] for stage in told["stages"]] == [["first", "second"], ["third"]]
    assert "bitwise equal" in printed(capsys, "verify", *LINE, "--cut", str(file))
    assert "pass one of them" in refusal(capsys, "split", *LINE, "--cut", str(file), "--at", "second")
    assert "pass one of them" in refusal(capsys, "split", *LINE, "--cut", str(file), "--stages", "2")
    assert "cannot write" in refusal(capsys, "split", *LINE, "--save", str(tmp_path / "no" / "cut.json"))
    file.write_text("{")
    assert "the cut is not JSON" in refusal(capsys, "split", *LINE, "--cut", str(file))
