"""Batches into microbatches and back: what is split, what goes whole, what is refused and under which name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipework import InputError
from pipework.split.microbatch import chunk, merge
from tests.models import numbers


@dataclasses.dataclass
class Fields:
    one: Any
    two: Any


def test_tensors_are_split_along_dimension_0_and_the_rest_goes_whole() -> None:
    x, y, zero = numbers(6, 2), numbers(6, seed=4), torch.tensor(2.0)
    nested = {"pair": (y, [None, "text", 3])}
    parts = chunk({"x": x, "nested": nested, "zero": zero, "flag": True}, 3)
    assert len(parts) == 3
    for number, part in enumerate(parts):
        rows = slice(2 * number, 2 * number + 2)
        assert list(part) == ["x", "nested", "zero", "flag"]
        assert torch.equal(part["x"], x[rows])
        assert torch.equal(part["nested"]["pair"][0], y[rows])
        assert part["nested"]["pair"][1] == [None, "text", 3]
        assert part["zero"] is zero
        assert part["flag"] is True


def test_microbatches_are_views_through_which_gradients_return() -> None:
    x = numbers(4, 2, grad=True)
    parts = chunk({"x": x}, 2)
    assert parts[1]["x"]._base is x or parts[1]["x"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    (parts[1]["x"] * 3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0], [3.0, 3.0]]))


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ({"a": 1, "b": 0}, ((4, 3), (2, 6))),
        ({"a": -1}, ((4, 3), (2, 6))),
        ({"a": None}, ((4, 6), (2, 6))),
        ({"a": None, "b": None}, ((4, 6), (4, 6))),
        ({"b": 1}, ((2, 6), (4, 3))),
    ],
)
def test_a_spec_gives_the_dimension_or_none(spec: dict[str, int | None], shapes: Any) -> None:
    for part in chunk({"a": numbers(4, 6), "b": numbers(4, 6)}, 2, spec):
        assert (tuple(part["a"].shape), tuple(part["b"].shape)) == shapes


def test_a_spec_holds_for_a_whole_subtree_or_is_a_tree() -> None:
    values = {"batch": {"x": numbers(4, 2), "more": (numbers(2, 4), numbers(3))}, "fields": Fields(numbers(2, 4), [1])}
    whole = chunk(values, 2, {"batch": {"x": 0, "more": None}, "fields": 1})[0]
    assert [tuple(t.shape) for t in (whole["batch"]["x"], *whole["batch"]["more"])] == [(2, 2), (2, 4), (3,)]
    assert tuple(whole["fields"].one.shape) == (2, 2)
    assert type(whole["fields"]) is Fields
    leaf = chunk(values, 2, {"batch": {"x": 1, "more": (1, None)}, "fields": Fields(0, None)})[1]
    assert torch.equal(leaf["batch"]["x"], values["batch"]["x"][:, 1:])
    assert torch.equal(leaf["batch"]["more"][0], values["batch"]["more"][0][:, 2:])
    assert tuple(leaf["fields"].one.shape) == (1, 4)


@pytest.mark.parametrize(
    ("values", "spec", "said"),
    [
        ({"x": numbers(5, 2)}, {}, "x of size 5 along dimension 0 does not divide into 2"),
        ({"b": {"x": [numbers(5, 2)]}}, {}, r"b\['x'\]\[0\] of size 5 along dimension 0"),
        ({"x": numbers(4, 3)}, {"x": 1}, "x of size 3 along dimension 1 does not divide into 2"),
        ({"x": numbers(4, 3)}, {"x": 2}, r"x of shape \(4, 3\) has no dimension 2"),
        ({"x": torch.tensor(1.0)}, {"x": 0}, r"x of shape \(\) has no dimension 0"),
        ({"x": numbers(4, 3), "mask": numbers(6, 6)}, {}, "mask has size 6 along dimension 0, and x has 4"),
        ({"x": numbers(4)}, {"y": 0}, "the chunk spec names 'y', which was not passed"),
        ({"x": (numbers(4), numbers(4))}, {"x": (0,)}, r"the chunk spec of x has another structure"),
        ({"x": {"a": numbers(4)}}, {"x": {"b": 0}}, r"the chunk spec of x has another structure"),
        ({"x": {"a": [numbers(4)]}}, {"x": {"a": (0,)}}, None),  # a tuple says as much as a list
        ({"x": {"a": [numbers(4)]}}, {"x": {"a": "rows"}}, r"the chunk spec of x\['a'\] has another structure"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], spec: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert tuple(chunk(values, 2, spec)[0]["x"]["a"][0].shape) == (2,)
        return
    with pytest.raises(InputError, match=said):
        chunk(values, 2, spec)


@pytest.mark.parametrize("spec", ["rows", 1.0, object()])
def test_a_rule_that_is_no_dimension_is_refused(spec: Any) -> None:
    with pytest.raises(InputError, match="chunk spec of x"):
        chunk({"x": numbers(4)}, 2, {"x": spec})


def test_the_remedy_for_a_nested_leaf_is_a_spec_that_works() -> None:
    values = {"b": {"x": numbers(4), "table": numbers(3)}}
    with pytest.raises(InputError) as caught:
        chunk(values, 2)
    assert "chunk_spec={\"b['table']\"" not in str(caught.value)
    assert tuple(chunk(values, 2, {"b": {"x": 0, "table": None}})[0]["b"]["table"].shape) == (3,)


def test_a_batch_of_nothing_is_split_into_nothings() -> None:
    assert [tuple(p["x"].shape) for p in chunk({"x": numbers(0, 3)}, 2)] == [(0, 3), (0, 3)]


@given(rows=st.integers(1, 4), microbatches=st.integers(1, 6), dimension=st.integers(-3, 2))
def test_merging_undoes_chunking(rows: int, microbatches: int, dimension: int) -> None:
    shape = [2, 3, 4]
    shape[dimension] = rows * microbatches
    whole = {"x": numbers(*shape), "rest": (numbers(2), "name")}
    spec = {"x": dimension, "rest": None}
    merged = merge(chunk(whole, microbatches, spec), spec)
    assert torch.equal(merged["x"], whole["x"])
    assert torch.equal(merged["rest"][0], whole["rest"][0])
    assert merged["rest"][1] == "name"


def test_how_outputs_are_merged() -> None:
    def output(number: int) -> Fields:
        scalars = [torch.tensor(float(number)), torch.tensor(number), torch.tensor(number > 0)]
        return Fields(torch.full((1, 2), float(number)), (scalars, {"same": 7, "other": number}, None, "text"))

    merged = merge([output(0), output(1), output(5)])
    scalars, values, none, text = merged.two
    assert type(merged) is Fields
    assert torch.equal(merged.one, torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    assert torch.equal(scalars[0], torch.tensor(2.0))
    assert torch.equal(scalars[1], torch.tensor([0, 1, 5]))
    assert torch.equal(scalars[2], torch.tensor([False, True, True]))
    assert values == {"same": 7, "other": [0, 1, 5]}
    assert (none, text) == (None, "text")


def test_a_merge_spec_gives_the_dimension_or_the_first() -> None:
    outputs = [(numbers(2, 3, seed=1), numbers(4, seed=2)), (numbers(2, 3, seed=3), numbers(4, seed=4))]
    joined, first = merge(outputs, (1, None))
    assert torch.equal(joined, torch.cat([outputs[0][0], outputs[1][0]], 1))
    assert first is outputs[0][1]
    with pytest.raises(InputError, match="output"):
        merge(outputs, (1, None, 0))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_merged_scalar_keeps_its_dtype(kind: torch.dtype) -> None:
    assert merge([torch.tensor(1, dtype=kind), torch.tensor(3, dtype=kind)]).dtype == kind


def test_equal_values_of_other_types_are_not_one_value() -> None:
    assert merge([{"n": 1}, {"n": True}]) == {"n": [1, True]}
