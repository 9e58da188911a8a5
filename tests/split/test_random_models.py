"""Random trunks with cuts at random places: the pipe equals the model to the last bit, or the cut is refused."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipework import CaptureError, CutError, pipe_split, pipeline
from tests.models import linear, numbers
from tests.split.equality import State, assert_names, assert_same, assert_trains, outcome

ROWS, WIDTH, LAYERS = 3, 4, 3


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a random trunk on values chosen by number, modulo how many there are."""

    kind: str
    first: int
    second: int


MAKES = {
    "layer": lambda m, a, b, i: m.layers[i % LAYERS](a),
    "norm": lambda m, a, b, i: m.norm(a),
    "relu in place module": lambda m, a, b, i: m.relu(a),
    "dropout": lambda m, a, b, i: nn.functional.dropout(a, 0.3, m.training),
    "add": lambda m, a, b, i: a + b,
    "product": lambda m, a, b, i: a * b.tanh(),
    "parameter": lambda m, a, b, i: a * m.scale + m.layers[i % LAYERS].bias,
    "buffer": lambda m, a, b, i: a - m.table,
    "turned": lambda m, a, b, i: a.t(),
    "view": lambda m, a, b, i: a[i % a.shape[0] :],
    "column": lambda m, a, b, i: a[:, : 1 + i % 3],
    "flat": lambda m, a, b, i: a.reshape(-1),
    "detached": lambda m, a, b, i: a.detach(),
    "copy": lambda m, a, b, i: a.clone(),
    "chunk": lambda m, a, b, i: a.chunk(2, -1)[i % 2],
    "widened": lambda m, a, b, i: nn.functional.pad(a, (0, max(0, WIDTH - a.shape[-1])))[..., :WIDTH],
    "expanded": lambda m, a, b, i: a.sum(0, keepdim=True).expand(ROWS, -1),
}
WRITES = {
    "add_": lambda m, a, b, i: a.add_(b),
    "mul_": lambda m, a, b, i: a.mul_(1.0 + i % 3),
    "fill": lambda m, a, b, i: a.__setitem__(i % a.shape[0], 0.5),
    "copy_": lambda m, a, b, i: a[:1].copy_(b.detach()[:1] * 2),
    "no_grad write": lambda m, a, b, i: a.detach().mul_(0.5),
}


class Random(nn.Module):
    """A trunk of random steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(WIDTH) for _ in range(LAYERS))
        self.norm, self.relu = nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("table", numbers(WIDTH))
        self.steps: tuple[Step, ...] = ()
        self.results: tuple[int, ...] = ()

    def extra_repr(self) -> str:
        return "; ".join(f"{s.kind} {s.first} {s.second}" for s in self.steps) + f" -> {self.results}"

    def take(self, step: Step, number: int, values: list[Tensor]) -> None:
        a, b = values[step.first], values[step.second]
        if step.kind == "split":
            pipe_split()
        elif step.kind in WRITES:
            WRITES[step.kind](self, a, b, number)
        else:
            values.append(MAKES[step.kind](self, a, b, number))

    def forward(self, x: Tensor, other: Tensor) -> Any:
        values = [x * 1, other]
        for number, step in enumerate(self.steps):
            self.take(step, number, values)
        return [values[i] for i in self.results]


@st.composite
def models(draw: st.DrawFn) -> Random:
    """Steps are tried as they are drawn; those that torch refuses for the shapes at hand are left out."""
    torch.manual_seed(0)
    model = Random()
    values = [numbers(ROWS, WIDTH), numbers(ROWS, WIDTH)]
    steps: list[Step] = []
    kinds = st.sampled_from([*MAKES, *MAKES, *WRITES, "split", "split", "split"])
    for kind in [
        *draw(st.lists(kinds, min_size=2, max_size=6)),
        "split",
        *draw(st.lists(kinds, min_size=2, max_size=6)),
    ]:
        last = len(values) - 1
        # Mostly recent values, so that what is made is used.
        step = Step(kind, last - draw(st.integers(0, min(last, 2))), draw(st.integers(0, last)))
        if kind == "split" and (not steps or steps[-1].kind == "split"):
            continue
        try:
            model.take(step, len(steps), values)
        except (RuntimeError, ValueError, IndexError):
            continue
        steps.append(step)
    last = len(values) - 1
    model.steps = tuple(steps)
    model.results = (last, *draw(st.lists(st.integers(0, last), max_size=3)))
    return model


def reference_outcome(model: nn.Module, args: Any) -> Any:
    """What the model gives, or None where autograd refuses these steps."""
    try:
        return outcome(model, model, args, {})
    except RuntimeError:
        return None


@settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(model=models(), training=st.booleans(), inputs=st.sampled_from(["both", "first", "none"]))
def test_pipe_equals_the_model_or_is_refused(model: Random, training: bool, inputs: str) -> None:
    model.train(training)
    args = (numbers(ROWS, WIDTH, grad=inputs != "none"), numbers(ROWS, WIDTH, seed=8, grad=inputs == "both"))
    reference = copy.deepcopy(model)
    wanted = reference_outcome(reference, args)
    assume(wanted is not None)
    state = State.of(model)
    try:
        pipe = pipeline(model, args)
    except (CutError, CaptureError) as error:
        event(f"refused: {error.what.split(' ')[0]} ...")
        state.assert_still(model)
        return
    state.assert_still(model)
    event(f"{pipe.num_stages} stages")
    found = outcome(pipe, model, args, {})
    # What a stage writes into is its own copy, without the gaps between the elements of the original.
    assert_same(found, wanted, strides=False)
    assert_names(pipe, model)
    assert_trains(reference, args, {})


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(model=models(), training=st.booleans(), example=st.sampled_from(["cpu", "meta"]))
def test_without_values_it_is_the_same_pipe(model: Random, training: bool, example: str) -> None:
    model.train(training)
    args = (numbers(ROWS, WIDTH, grad=True), numbers(ROWS, WIDTH, seed=8, grad=True))
    assume(reference_outcome(copy.deepcopy(model), args) is not None)
    try:
        real = pipeline(model, args)
    except (CutError, CaptureError):
        return
    meta = pipeline(copy.deepcopy(model).to("meta"), tuple(t.detach().to(example).requires_grad_() for t in args))
    assert meta.num_stages == real.num_stages
    for index in range(real.num_stages):
        assert meta.get_stage_module(index).source == real.get_stage_module(index).source
    assert meta.variant(meta.example).cut.edges == real.variant(real.example).cut.edges
