"""What a step, an evaluation and the record of them give; ranks are threads here."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import InputError, Kind, PipeworkError, Runner, Schedule
from pipework.plan import Send, lower, needs
from pipework.split.pipe import Pipe
from tests.models import WIDTH, linear, linears, numbers, trunk
from tests.run.pipes import case_runner, equal, gradients, piped, runner_of, sequence, unsplit
from tests.split.equality import State

X, Y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with every capture."""
    found: list[object] = []
    capture = Pipe._capture

    def counted(self: Pipe, arguments: Any) -> Any:
        found.append(arguments)
        return capture(self, arguments)

    monkeypatch.setattr(Pipe, "_capture", counted)
    return found


# ---------------------------------------------------------------------- gradients and losses


def test_steps_accumulate_1_2_3() -> None:
    runner = runner_of(piped(sequence(), "2"))
    reference = sequence()
    for _ in range(3):
        loss = runner.step(X, target=Y)
        assert torch.equal(loss, unsplit(reference, X, Y, 4))
        assert equal(gradients(runner.pipe.model), gradients(reference))
    assert runner.steps == 3


def test_without_scaling_the_loss_and_the_gradients_are_sums() -> None:
    runner = runner_of(piped(sequence(), "2"), scale_loss=False)
    reference = sequence()
    assert torch.equal(runner.step(X, target=Y), unsplit(reference, X, Y, 4, scale=False))
    assert equal(gradients(runner.pipe.model), gradients(reference))


def test_the_loss_is_detached() -> None:
    loss = runner_of(piped(sequence(), "2")).step(X, target=Y)
    assert not loss.requires_grad
    assert loss.grad_fn is None


def test_evaluate_leaves_gradients_steps_and_generator_alone() -> None:
    runner = runner_of(piped(sequence(), "2"))
    runner.step(X, target=Y)
    before, state = gradients(runner.pipe.model), torch.get_rng_state()
    found = runner.evaluate(X, target=Y)
    assert equal(gradients(runner.pipe.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert runner.steps == 1
    model = sequence()
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in X.chunk(4)])
    assert torch.equal(found.output, wanted)
    assert not found.output.requires_grad
    assert found.loss is not None
    assert torch.equal(
        found.loss, torch.stack([F.mse_loss(a, b) for a, b in zip(wanted.chunk(4), Y.chunk(4), strict=True)]).sum() / 4
    )


def test_evaluate_without_a_target_gives_the_output_alone() -> None:
    found = runner_of(piped(sequence(), "2")).evaluate(X)
    assert found.loss is None
    assert found.output.shape == X.shape


def test_evaluate_without_labels_of_a_model_with_its_own_loss() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: Any, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        h = self.one(x)
        pipework.pipe_split()
        h = self.two(h)
        return {"loss": None if labels is None else F.mse_loss(h, labels), "logits": h}

    runner = runner_of(pipework.pipeline(model, (X[:2], Y[:2])), loss=None)
    assert torch.isfinite(runner.step(X, Y))
    found = runner.evaluate(X)
    assert found.loss is None
    assert found.output["logits"].shape == X.shape


def test_the_gradient_of_the_input() -> None:
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    runner_of(piped(sequence(), "2")).step(x, target=Y)
    unsplit(sequence(), twin, Y, 4)
    assert x.grad is not None
    assert equal({"x": x.grad}, {"x": twin.grad})


@pytest.mark.parametrize("family", ["gpipe", "one_f_one_b", "interleaved_one_f_one_b", "looped_bfs"])
def test_the_gradient_of_an_input_that_every_microbatch_gets_whole(family: str) -> None:
    """Several stages read it: its gradients add up by microbatch, whichever rank is first."""

    @trunk(layers=linears(8))
    def model(self: Any, x: Tensor, prompt: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number and (number % 2 == 0 or family[0] in "il"):
                pipework.pipe_split()
            x = layer(x) * prompt
        return x

    prompt, twin = (numbers(WIDTH, seed=8).requires_grad_() for _ in range(2))
    pipe = pipework.pipeline(model, (X[:2], prompt))
    schedule = pipework.schedules.FAMILIES[family].build(pipe.layout(4), 4)
    runner = Runner(pipe, schedule, loss=F.mse_loss, chunk_spec={"prompt": None})
    for _ in range(3):
        runner.step(X, prompt, target=Y)
        for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
            (F.mse_loss(model(x, twin), y) / 4).backward()
        assert equal({"prompt": prompt.grad}, {"prompt": twin.grad})


def test_a_step_under_no_grad_is_not_silently_without_gradients() -> None:
    runner = runner_of(piped(sequence(), "2"))
    with torch.no_grad():
        try:
            runner.step(X, target=Y)
        except PipeworkError:
            return
    assert all(p.grad is not None for p in runner.parameters())


def test_a_forward_only_schedule_evaluates_and_does_not_step() -> None:
    pipe = piped(sequence(), "2")
    runner = Runner(pipe, pipework.schedules.forward_only(pipe.layout(2), 4), loss=F.mse_loss)
    assert runner.evaluate(X, target=Y).loss is not None
    with pytest.raises(InputError, match="only goes forward"):
        runner.step(X, target=Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = sequence().to(dtype)
    pipe = pipework.pipeline(model, (X[:2].to(dtype),), stages=2)
    runner, reference = runner_of(pipe), copy.deepcopy(model)
    loss = runner.step(X.to(dtype), target=Y.to(dtype))
    assert loss.dtype == dtype
    assert torch.equal(loss, unsplit(reference, X.to(dtype), Y.to(dtype), 4))
    assert equal(gradients(model), gradients(reference))


def test_autocast_around_the_step() -> None:
    model = sequence()
    runner, reference = runner_of(piped(model, "1", "2", "3"), ranks=4), sequence()
    with torch.autocast("cpu", torch.bfloat16):
        loss = runner.step(X, target=Y)
        evaluated = runner.evaluate(X)
    assert evaluated.output.dtype == torch.bfloat16
    total = []
    for part, aim in zip(X.chunk(4), Y.chunk(4), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            each = F.mse_loss(reference(part), aim)
        (each / 4).backward()
        total.append(each.detach())
    assert torch.equal(loss, torch.stack(total).sum() / 4)
    assert equal(gradients(model), gradients(reference))


def test_threads_compute_with_as_many_threads_as_the_caller() -> None:
    seen: list[int] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x * 1

    before = torch.get_num_threads()
    pipe = piped(nn.Sequential(linear(), Asks(), linear(), Asks()), "2")
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            runner = runner_of(pipe)
            seen.clear()
            runner.step(X, target=Y)
            assert set(seen) == {count}
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------- what a loss may be


def test_a_loss_that_is_no_number_is_refused() -> None:
    runner = runner_of(piped(sequence(), "2"), loss=lambda out, aim: (out - aim) ** 2)
    with pytest.raises(InputError, match=r"the loss of microbatch 0 is a tensor of shape \(2, 8\)"):
        runner.step(X, target=Y)
    with pytest.raises(InputError, match="float"):
        runner_of(piped(sequence(), "2"), loss=lambda out, aim: 1.0).step(X, target=Y)  # type: ignore[arg-type]


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"the model's output has no loss[\s\S]*Tensor[\s\S]*pass loss="):
        runner_of(piped(sequence(), "2"), loss=None).step(X)


def test_a_model_that_returns_its_loss() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: Any, x: Tensor) -> Tensor:
        h = self.one(x)
        pipework.pipe_split()
        return self.two(h).square().mean()

    runner = runner_of(pipework.pipeline(model, (X[:2],)), loss=None)
    assert torch.equal(runner.step(X), torch.stack([model(part).detach() for part in X.chunk(4)]).sum() / 4)


@dataclass
class WithLoss:
    loss: Tensor | None
    logits: Tensor


def test_targets_are_trees() -> None:
    pipe = piped(sequence(), "2")
    seen: list[Any] = []

    def loss(output: Tensor, target: Any) -> Tensor:
        seen.append(target)
        return F.mse_loss(output, target["y"]) * target["weights"][1].mean() * target["factor"]

    target = {"y": Y, "weights": (numbers(3), numbers(8)), "factor": 2.0, "name": "x"}
    runner_of(
        pipe, loss=loss, chunk_spec={"target": {"y": 0, "weights": (None, 0), "factor": None, "name": None}}
    ).step(X, target=target)
    assert [tuple(t["weights"][0].shape) + tuple(t["weights"][1].shape) for t in seen] == [(3, 2)] * 4
    assert torch.equal(torch.cat([t["y"] for t in seen]), Y)


# ---------------------------------------------------------------------- shapes that change


def test_other_shapes_are_captured_once_and_give_what_the_model_gives(captures: list[object]) -> None:
    model = nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(WIDTH), linear())
    pipe = pipework.pipeline(model, (numbers(2, 3, WIDTH),), stages=2)
    runner, reference = runner_of(pipe), copy.deepcopy(model)
    shapes = [(8, 3), (8, 5), (4, 3), (8, 1)]
    for _ in range(2):
        for rows, length in shapes:
            x, y = numbers(rows, length, WIDTH), numbers(rows, length, WIDTH, seed=9)
            assert torch.equal(runner.step(x, target=y), unsplit(reference, x, y, 4))
            assert runner.evaluate(x).output.shape == x.shape
        assert len(captures) == 2 * len(shapes)  # each in training and in evaluation; the example was the first
    runner.step(numbers(8, 3, WIDTH), target=numbers(8, 3, WIDTH))
    assert len(captures) == 2 * len(shapes)
    unsplit(reference, numbers(8, 3, WIDTH), numbers(8, 3, WIDTH), 4)
    assert equal(gradients(model), gradients(reference))


def test_a_smaller_last_batch_just_works(captures: list[object]) -> None:
    runner, reference = runner_of(piped(sequence(), "2")), sequence()
    for rows in (8, 8, 4, 8, 4):
        x, y = numbers(rows, WIDTH), numbers(rows, WIDTH, seed=5)
        assert torch.equal(runner.step(x, target=y), unsplit(reference, x, y, 4))
    assert equal(gradients(runner.pipe.model), gradients(reference))
    assert len(captures) == 2


def test_a_batch_that_does_not_divide_is_refused_by_name_and_changes_nothing() -> None:
    runner = runner_of(piped(sequence(), "2"))
    with pytest.raises(InputError, match="input of size 7 along dimension 0 does not divide into 4 microbatches"):
        runner.step(X[:7], target=Y[:7])
    with pytest.raises(InputError, match="target of size 7"):
        runner.step(X, target=Y[:7])
    assert all(p.grad is None for p in runner.parameters())
    assert runner.steps == 0


def test_a_chunk_spec_for_arguments() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: Any, batch: dict[str, Tensor], table: Tensor) -> Tensor:
        h = self.one(batch["x"].transpose(0, 1))
        pipework.pipe_split()
        return self.two(h + batch["bias"]) @ table

    table, bias = numbers(WIDTH, WIDTH, seed=8), numbers(WIDTH, seed=9)
    pipe = pipework.pipeline(model, ({"x": X.t()[:, :2].clone(), "bias": bias}, table))
    spec = {"batch": {"x": 1, "bias": None}, "table": None}
    runner = runner_of(pipe, chunk_spec=spec)
    found = runner.evaluate({"x": X.t(), "bias": bias}, table)
    assert torch.equal(found.output, torch.cat([model({"x": part.t(), "bias": bias}, table) for part in X.chunk(4)]))
    with pytest.raises(InputError, match="the chunk spec names 'tabel', which is no argument"):
        runner_of(pipe, chunk_spec={"tabel": None}).evaluate({"x": X.t(), "bias": bias}, table)


def test_an_output_merge_spec() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.one(x)
        pipework.pipe_split()
        h = self.two(h)
        return h.t(), h[0], h.sum()

    pipe = pipework.pipeline(model, (X[:2],))
    turned, first, total = runner_of(pipe, output_merge_spec=(1, None, 0)).evaluate(X).output
    rows = [model(part) for part in X.chunk(4)]
    assert torch.equal(turned, torch.cat([row[0] for row in rows], 1))
    assert torch.equal(first, rows[0][1])
    assert torch.equal(total, torch.stack([row[2] for row in rows]).mean())


# ---------------------------------------------------------------------- what is left of a step


def test_outputs_are_kept_on_request() -> None:
    case, runner = case_runner("structured", 3, 6)
    runner.step(*case.args, target=case.target, **case.kwargs)
    assert runner.outputs is None
    runner.keep_outputs = True
    runner.step(*case.args, target=case.target, **case.kwargs)
    assert runner.outputs is not None
    assert set(runner.outputs) == {"h", "first", "scale"}
    assert runner.outputs["scale"] == 0.7
    assert not runner.outputs["h"].requires_grad


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["gpipe", "one_f_one_b", "interleaved_one_f_one_b", "looped_bfs"])
def test_the_recorded_timeline(family: str, ranks: int) -> None:
    pipe = piped(sequence(8), *map(str, range(1, 8 if family[0] in "il" else ranks)))
    schedule = pipework.schedules.FAMILIES[family].build(pipe.layout(ranks), 4)
    runner = Runner(pipe, schedule, loss=F.mse_loss)
    with pytest.raises(PipeworkError, match="no step was recorded"):
        _ = runner.recorded
    for _ in range(2):
        runner.step(X, target=Y)
        assert_really_ran(runner.recorded, schedule)
    runner.evaluate(X)
    assert {span.action.kind for span in runner.recorded.spans} == {Kind.FORWARD}


def assert_really_ran(timeline: pipework.Timeline, schedule: Schedule, apart: float = 0.0) -> None:
    """Complete, in each rank's order without overlap, and nothing began before what it needs had ended.

    The clocks of two ranks may be as many seconds apart.
    """
    ended = {span.action: span.end for span in timeline.spans}
    for rank, order in enumerate(schedule.orders):
        spans = timeline.rank(rank)
        assert [span.action for span in spans] == list(order)
        assert all(span.start < span.end for span in spans)
        assert all(one.end <= other.start for one, other in pairwise(spans))
    for span in timeline.spans:
        assert all(ended[need] <= span.start + apart for need in needs(span.action, timeline.schedule))


def test_two_runners_on_one_model_and_the_model_itself() -> None:
    """Each adds to the same gradients; the model is left as it was in all else."""
    model, reference = sequence(), sequence()
    state = State.of(model)
    runners = [runner_of(piped(model, "2")), runner_of(piped(model, "1", "2", "3"), ranks=4)]
    for runner in (*runners, *runners):
        runner.step(X, target=Y)
        unsplit(reference, X, Y, 4)
        runner.evaluate(X)
    for each in (model, reference):
        unsplit(each, X, Y, 4)
    assert equal(gradients(model), gradients(reference))
    model.zero_grad()
    state.assert_still(model)


def test_nothing_is_sent_back_that_nobody_needs() -> None:
    model = sequence()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    pipe = piped(model, "1", "2", "3")
    runner = runner_of(pipe, ranks=4)
    runner.step(X, target=Y)
    layout = runner.recorded.schedule.layout
    assert layout.gradients == {(2, 3)}
    transfers = [
        i.transfer for program in lower(runner.recorded.schedule) for i in program.instructions if isinstance(i, Send)
    ]
    back = [t for t in transfers if t.to < t.after.stage]
    assert {(t.after.stage, t.to) for t in back} == {(3, 2)}
    assert len(back) == 4


# ---------------------------------------------------------------------- what does not fit


def test_a_schedule_for_another_number_of_stages() -> None:
    pipe = piped(sequence(), "2")
    with pytest.raises(InputError, match="the schedule has 4 stages, and the pipe 2"):
        Runner(pipe, pipework.schedules.gpipe(pipework.Layout.loop(4), 2), loss=F.mse_loss)


def test_weights_tied_across_stages() -> None:
    model, reference = sequence(), sequence()
    for each in (model, reference):
        each[3].weight = each[0].weight
    runner = runner_of(piped(model, "2"))
    for _ in range(2):
        assert torch.equal(runner.step(X, target=Y), unsplit(reference, X, Y, 4))
    assert equal(gradients(model), gradients(reference))
    assert len(list(runner.parameters())) == 7


def test_autocast_without_its_cache_around_the_step() -> None:
    """Each use of a weight then has a cast of its own, and gradients add up in another dtype."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(torch.tanh(self.one(x)))

    model = nn.Sequential(Twice(), Twice())
    reference, runner = copy.deepcopy(model), runner_of(piped(model, "1"))
    x, target = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found, wanted = runner.step(x, target=target), unsplit(reference, x, target, 4)
    assert torch.equal(found, wanted)
    assert equal(gradients(model), gradients(reference))
