"""A cut that cannot be made says what, why and what to do; a call that does not fit is refused."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipework import CaptureError, CutError, InputError, MismatchError, SplitPoint, pipe_split, pipeline
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import State, after, before

X = numbers()


def layered() -> nn.Module:
    @trunk(embed=linear(), layers=linears(3), norm=nn.LayerNorm(8), unused=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    return model


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"layer.1": SplitPoint.BEGINNING}, ["no module 'layer.1'", "nearest existing", "layers.1"]),
        ({"": SplitPoint.BEGINNING}, ["no module ''"]),
        ({"zzz": SplitPoint.END}, ["no module 'zzz'", "named_modules"]),
        (
            {"layers": SplitPoint.BEGINNING},
            ["'layers' is never called", "layers.0, layers.1, layers.2", "one of its items"],
        ),
        ({"unused": SplitPoint.BEGINNING}, ["'unused' is never called"]),
        ({"embed": SplitPoint.BEGINNING}, ["stage 0 would be empty", "nothing is computed before", "remove the cut"]),
        ({"norm": SplitPoint.END}, ["stage 1 would be empty", "nothing is computed after"]),
        (after("layers.0") | before("layers.1"), ["stage 1 would be empty", "between these two cuts"]),
        ({"layers.1": "beginning"}, ["'beginning' is no place to cut", "SplitPoint.BEGINNING"]),
        ({"layers.1": None}, ["None is no place to cut"]),
    ],
)
def test_cut_that_cannot_be_made(spec: dict[str, Any], parts: list[str]) -> None:
    model = layered()
    state = State.of(model)
    with pytest.raises(CutError) as error:
        pipeline(model, (X,), split_spec=spec)
    for part in parts:
        assert part in str(error.value)
    assert error.value.remedy
    state.assert_still(model)


def test_pipe_split_before_the_first_and_after_the_last_operation() -> None:
    @trunk(one=linear())
    def first(self: nn.Module, x: Tensor) -> Tensor:
        pipe_split()
        return self.one(x)

    @trunk(one=linear())
    def last(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        return x

    for model, text in ((first, "stage 0 would be empty"), (last, "stage 1 would be empty")):
        with pytest.raises(CutError, match=text) as error:
            pipeline(model, (X,))
        assert "test_errors.py" in str(error.value)


def test_no_tensor_crosses() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.one(x)
        pipe_split()
        return self.two(y)

    with pytest.raises(CutError, match="no tensor crosses the cut before stage 1"):
        pipeline(model, (X, X * 2))


def test_cut_inside_a_custom_function() -> None:
    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            x = x * 2
            pipe_split()
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Inside.apply(x)

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.two(Inside.apply(self.one(x)))

    for case in (model, nn.Sequential(linear(), Block(), linear())):
        with pytest.raises(CutError, match=r"inside the custom autograd\.Function Inside"):
            pipeline(case, (numbers(grad=True),))


def test_cut_inside_vmap() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        def row(y: Tensor) -> Tensor:
            return self.two(self.one(y).sin())

        return self.three(torch.vmap(row)(x))

    for spec in (before("two"), {"one": SplitPoint.END}):
        with pytest.raises(CutError, match=r"lies inside a call of torch\.func or torch\.vmap") as error:
            pipeline(model, (numbers(),), split_spec=spec)
        assert "test_errors.py" in str(error.value)
    found = pipeline(model, (numbers(),), stages=2)  # leaves that place alone
    assert torch.equal(found(numbers())[0], model(numbers()))


def test_spec_and_stages_together() -> None:
    with pytest.raises(CutError, match="both split_spec and stages"):
        pipeline(layered(), (X,), split_spec=before("norm"), stages=2)


@pytest.mark.parametrize("stages", [0, -1, 6, 100])
def test_impossible_number_of_stages(stages: int) -> None:
    with pytest.raises(CutError, match="cannot be cut into"):
        pipeline(layered(), (X,), stages=stages)


def test_no_cut_at_all_is_one_stage() -> None:
    model = layered()
    pipe = pipeline(model, (X,))
    assert pipe.num_stages == 1
    assert torch.equal(pipe(X)[0], model(X))


def test_model_that_does_not_run() -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear(), linear(9)))
    state = State.of(model)
    with pytest.raises(CaptureError, match=r"in module 1\.1") as error:
        pipeline(model, (X,), split_spec=before("1"))
    assert "mat1 and mat2" in error.value.why
    assert isinstance(error.value.__cause__, RuntimeError)
    state.assert_still(model)
    assert torch.ones(2).add(1).tolist() == [2, 2]


def test_arguments_that_do_not_fit() -> None:
    model = layered()
    with pytest.raises(InputError, match="do not fit"):
        pipeline(model, (X, X))
    pipe = pipeline(model, (X,), split_spec=before("norm"))
    for args, kwargs in (((), {}), ((X, X), {}), ((X,), {"y": X}), ((X,), {"x": X})):
        with pytest.raises(InputError, match="do not fit"):
            pipe(*args, **kwargs)


def test_object_without_an_end_among_the_arguments() -> None:
    class Batch:
        def __init__(self) -> None:
            self.x, self.me = X, self

    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, batch: Batch) -> Tensor:
        x = self.one(batch.x)
        pipe_split()
        return self.two(x)

    with pytest.raises(InputError, match="Batch that carries tensors"):
        pipeline(model, (Batch(),))


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_no_such_stage(index: int) -> None:
    pipe = pipeline(layered(), (X,), split_spec=before("norm"))
    with pytest.raises(InputError, match="the stages are 0 to 1"):
        pipe.get_stage_module(index)


def test_number_of_cuts_that_depends_on_the_input() -> None:
    @trunk(layers=linears(4))
    def model(self: nn.Module, x: Tensor, depth: int) -> Tensor:
        for layer in self.layers[:depth]:
            x = layer(x)
            if layer is not self.layers[depth - 1]:
                pipe_split()
        return x

    pipe = pipeline(model, (X, 3))
    with pytest.raises(CutError, match="has 2 stages, and on the example 3"):
        pipe(X, 2)
    assert torch.equal(pipe(X, 3)[0], model(X, 3))


def test_errors_inside_a_stage_are_the_models_own() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        if x.sum() > 1e9:
            raise ValueError("too large")
        return self.two(x)

    pipe = pipeline(model, (X,))
    with pytest.raises(MismatchError, match="took another path"):
        pipe(X * -1e12 if model.one(X).sum() < 0 else X * 1e12)


def test_pipe_split_means_nothing_outside_a_capture() -> None:
    pipe_split()
    model = layered()
    pipeline(model, (X,), split_spec=before("norm"))
    pipe_split()


def test_no_space_between_two_captures_for_anything_to_stay() -> None:
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    for spec in (before("norm"), {"nope": SplitPoint.END}, before("embed")):
        with contextlib.suppress(CutError):
            pipeline(layered(), (X,), split_spec=spec)
        assert nn.Module.__call__ is call
        assert torch.autograd.Function.__dict__["apply"] is apply


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_trunk_that_draws_from_python_or_numpy(draw: Any) -> None:
    @trunk(first=linear(), second=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.second(self.first(x) * float(draw()))

    state = State.of(model)
    with pytest.raises(CaptureError, match="global generator of Python or numpy") as error:
        pipeline(model, (X,), split_spec=before("second"))
    assert error.value.where == "before the call of 'second'"
    state.assert_still(model)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_closed_module_that_draws_from_python_or_numpy(draw: Any) -> None:
    @trunk(first=linear())
    def noisy(self: nn.Module, x: Tensor) -> Tensor:
        return self.first(x) * float(draw())

    pipe = pipeline(nn.Sequential(noisy, linear()), (X,), split_spec=before("1"))
    assert not torch.equal(pipe(X)[0], pipe(X)[0])
