"""A cut as a value: printed, edited, saved, loaded, and cut at again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipework import CutError, CutPoint, CutPoints, InputError, PipeSplit, SplitPoint, pipe_split, pipeline
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import before, check

POINTS = st.one_of(
    st.builds(CutPoint, st.text(min_size=1), st.sampled_from(SplitPoint), st.integers(0, 9)),
    st.builds(PipeSplit, st.integers(0, 9)),
)


@given(st.lists(POINTS, unique=True).map(tuple).map(CutPoints))
def test_the_text_says_it_all(points: CutPoints) -> None:
    assert CutPoints.from_json(points.to_json()) == points
    assert str(points).count("\n") >= len(points) - 1


def test_save_and_load(tmp_path: Path) -> None:
    points = CutPoints((CutPoint("a.0"), CutPoint("b", SplitPoint.END, 2), PipeSplit(1)))
    points.save(tmp_path / "cut.json")
    assert (tmp_path / "cut.json").read_text().splitlines() == [
        "{",
        '  "cuts": [',
        '    {"before": "a.0"},',
        '    {"after": "b", "call": 2},',
        '    {"pipe_split": 1}',
        "  ]",
        "}",
    ]
    assert CutPoints.load(tmp_path / "cut.json") == points
    assert str(points).splitlines() == ["before a.0", "after b, call 2", "pipe_split() 1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ('{"cuts": [}', "line 1, column 11"),
        ("[]", "no list of cuts"),
        ('{"cuts": {}}', "no list of cuts"),
        ('{"cuts": [], "stages": 2}', "no list of cuts"),
        *(
            (json.dumps({"cuts": [{"before": "a"}, item]}), "cut 1 is ")
            for item in (
                "a", {}, None, {"before": ""}, {"before": 1}, {"before": "b", "after": "b"},
                {"before": "b", "call": -1}, {"before": "b", "call": True}, {"before": "b", "call": None},
                {"after": "b", "cal": 1}, {"pipe_split": "0"}, {"pipe_split": False}, {"pipe_split": 0, "call": 0},
            )
        ),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cut.json").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        CutPoints.load(tmp_path / "cut.json")
    assert "cut.json" in error.value.where
    assert "write" in error.value.remedy


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    for name in ("none.json", "noise"):
        with pytest.raises(InputError, match="cannot read"):
            CutPoints.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot write"):
        CutPoints().save(tmp_path / "no" / "cut.json")


def test_cuts_that_are_none() -> None:
    with pytest.raises(CutError, match="there twice"):
        CutPoints((CutPoint("a"), CutPoint("b"), CutPoint("a")))
    with pytest.raises(CutError, match="'a' is no cut"):
        CutPoints(("a",))  # type: ignore[arg-type]


def everything() -> nn.Module:
    @trunk(shared=linear(), layers=linears(3), head=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.shared(x)).relu()
            pipe_split()
        return self.head(x.sin())

    return model


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({}, ["pipe_split() 0", "pipe_split() 1", "pipe_split() 2"]),
        ({"split_spec": before("layers.0")}, ["before layers.0", *(f"pipe_split() {i}" for i in range(3))]),
        ({"stages": 3}, None),
        ({"stages": 1}, ["no cut"]),
        ({"split_spec": CutPoints()}, ["no cut"]),
        ({"split_spec": CutPoints((PipeSplit(1),))}, ["pipe_split() 1"]),
        (
            {"split_spec": CutPoints((CutPoint("shared", call=2), CutPoint("layers.0", SplitPoint.END)))},
            ["after layers.0", "before shared, call 2"],
        ),
    ],
)
def test_the_cut_in_use_cuts_again_in_the_same_places(how: dict[str, Any], text: list[str] | None) -> None:
    model, x = everything(), numbers(grad=True)
    first = pipeline(model, (x,), **how)
    assert text is None or str(first.cut_points).splitlines() == text
    loaded = CutPoints.from_json(first.cut_points.to_json())
    second = pipeline(model, (x,), split_spec=loaded)
    assert second.num_stages == len(loaded) + 1 == how.get("stages", second.num_stages)
    assert second.cut_points == first.cut_points
    sources = [[p.get_stage_module(i).source for i in range(p.num_stages)] for p in (first, second)]
    assert sources[0] == sources[1]
    check(everything(), (x,), spec=loaded, want=second.num_stages)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([CutPoint("shred")], "there is no module 'shred'"),
        ([CutPoint("layers")], "never called"),
        ([CutPoint("shared", call=3)], "'shared' has no call 3\n.*calls it 3 times"),
        ([PipeSplit(3)], r"there is no pipe_split\(\) 3"),
        ([CutPoint("layers.0"), CutPoint("shared", SplitPoint.END)], "would be empty"),
    ],
)
def test_cuts_that_this_model_does_not_have(points: list[Any], said: str) -> None:
    with pytest.raises(CutError, match=said) as error:
        pipeline(everything(), (numbers(),), split_spec=CutPoints(tuple(points)))
    assert error.value.remedy


def test_a_shared_module_goes_by_either_name() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    model.twin = model[2]

    @trunk(inner=model)
    def whole(self: nn.Module, x: Tensor) -> Tensor:
        return self.inner[2](self.inner[1](self.inner[0](x)))

    pipe = pipeline(whole, (numbers(),), split_spec=CutPoints((CutPoint("inner.twin"),)))
    assert str(pipe.cut_points) == "before inner.2"
