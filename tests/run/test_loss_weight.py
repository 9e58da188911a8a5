"""Microbatches that count by their targets: the step's loss and gradients are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import InputError, Runner
from pipework.run.losses import times
from tests.end_to_end.case import crossed
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import equal, gradients, runner_of, sequence

ROWS, LENGTH, MICROBATCHES = 8, 5, 4
X = numbers(ROWS, LENGTH, WIDTH)


def labelled(*counts: int) -> Tensor:
    """Labels of which so many in each microbatch are not padding."""
    labels = torch.full((MICROBATCHES, ROWS // MICROBATCHES * LENGTH), -100)
    for row, count in zip(labels, counts, strict=True):
        row[:count] = torch.arange(count) % WIDTH
    return labels.view(ROWS, LENGTH)


def valid(target: Tensor) -> Tensor:
    return (target != -100).sum()


def by_hand(output: Tensor, target: Tensor) -> Tensor:
    """The mean as many write it: without a valid label it is NaN, and so are its gradients."""
    each = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return (each * (target.flatten() != -100)).sum() / valid(target)


def reference(
    model: nn.Module, target: Tensor, loss: Callable[..., Tensor], weights: Sequence[float], scale: bool = True
) -> Tensor:
    """Each microbatch goes back from its loss times its share; one without weight has no part."""
    total = sum(weights) if scale else 1
    losses = []
    for x, y, weight in zip(X.chunk(MICROBATCHES), target.chunk(MICROBATCHES), weights, strict=True):
        losses.append(torch.tensor(0.0))
        if weight:
            part = loss(model(x), y) * (weight / total)
            part.backward()
            losses[-1] = part.detach()
    return torch.stack(losses).sum()


def weighing(group: dist.ProcessGroup | None = None, ranks: int = 2, **options: Any) -> Runner:
    pipe = pipework.pipeline(sequence(), (X[:2],), stages=ranks)
    return runner_of(pipe, ranks, MICROBATCHES, group, **{"loss": crossed, "loss_weight": valid, **options})


def held(runner: Runner, found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name, _ in runner.named_parameters()}


def assert_by_microbatch(runner: Runner, counts: Sequence[int], loss: Any = crossed, scale: bool = True) -> None:
    model, target = sequence(), labelled(*counts)
    wanted = reference(model, target, loss, counts, scale)
    assert torch.equal(runner.step(X, target=target), wanted)
    assert torch.equal(runner.evaluate(X, target=target).loss, wanted)
    plain = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert equal(held(runner, gradients(runner.pipe.model)), held(runner, plain))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10), min_size=4, max_size=4).filter(any), st.sampled_from([crossed, by_hand]))
def test_as_the_unsplit_model_microbatch_by_microbatch(counts: list[int], loss: Any) -> None:
    assert_by_microbatch(weighing(loss=loss), counts, loss)


def test_without_scaling_the_sums_are_left() -> None:
    assert_by_microbatch(weighing(scale_loss=False), [3, 0, 7, 1], scale=False)


def test_equal_weights_are_no_weights_to_the_last_bit() -> None:
    plain, weighed = weighing(loss_weight=None), weighing()
    target = labelled(10, 10, 10, 10)
    assert torch.equal(plain.step(X, target=target), weighed.step(X, target=target))
    assert equal(gradients(plain.pipe.model), gradients(weighed.pipe.model))


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_a_share_on_the_device_gives_the_bits_of_the_number(dtype: torch.dtype, value: float, share: float) -> None:
    number, tensor = (torch.tensor(value, dtype=dtype, requires_grad=True) for _ in range(2))
    products = times(number, share), times(tensor, torch.tensor(share, dtype=torch.float64))
    for product in products:
        product.backward()
    assert torch.equal(*products)
    assert products[0].dtype == products[1].dtype == dtype
    assert number.grad is not None
    assert tensor.grad is not None
    assert torch.equal(number.grad, tensor.grad)


# ---------------------------------------------------------------------- the whole batch, in numbers without rounding

COUNTS = (2, 1, 4, 1)  # like their sum powers of two


def whole_numbers() -> tuple[nn.Module, Tensor, Tensor]:
    model = sequence().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round())
    return model, (X * 2).round().double(), labelled(*COUNTS)


def squares(output: Tensor, target: Tensor) -> Tensor:
    """The mean over what is not padding."""
    return (output.sum(-1) - target)[target != -100].square().mean()


def sum_over_count(output: Tensor, target: dict[str, Any]) -> Tensor:
    labels = target["labels"]
    return (output.sum(-1) - labels)[labels != -100].square().sum() / target["count"]


WAYS: dict[str, dict[str, Any]] = {
    "mean of means": {"loss": squares},
    "loss_weight": {"loss": squares, "loss_weight": valid},
    "sum over a count": {
        "loss": sum_over_count,
        "scale_loss": False,
        "chunk_spec": {"target": {"labels": 0, "count": None}},
    },
}


def whole_batch(group: dist.ProcessGroup | None = None) -> dict[str, bool]:
    """By way, whether loss and gradients are those of the whole batch at once."""
    found = {}
    for way, options in WAYS.items():
        model, x, target = whole_numbers()
        runner = runner_of(pipework.pipeline(model, (x[:2],), stages=2), group=group, **options)
        counted = {"labels": target, "count": valid(target)}
        step = runner.step(x, target=counted if "chunk_spec" in options else target)
        once, _, _ = whole_numbers()
        loss = squares(once(x), target)
        loss.backward()
        same = equal(held(runner, gradients(model)), held(runner, gradients(once)))
        found[way] = torch.equal(step, loss.detach()) and same
    return found


EXPECTED = {"mean of means": False, "loss_weight": True, "sum over a count": True}


def test_padded_labels_as_in_the_whole_batch() -> None:
    assert whole_batch() == EXPECTED


def over_gloo(group: dist.ProcessGroup, rank: int) -> dict[str, bool]:
    for scale in (True, False):
        runner = weighing(group, group.size(), scale_loss=scale)
        assert_by_microbatch(runner, [3, 10, 0, 1], scale=scale)
    only_last = weighing(group, group.size())
    for target in (labelled(3, 10, 0, 1), labelled(0, 2, 2, 7)):
        model = sequence()
        wanted = reference(model, target, crossed, [int(valid(y)) for y in target.chunk(MICROBATCHES)])
        given = target if rank == group.size() - 1 else None
        assert torch.equal(only_last.step(X, target=given), wanted)
    return whole_batch(group) if group.size() == 2 else EXPECTED


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes(gloo_pool: GlooPool, ranks: int) -> None:
    assert gloo_pool.run(over_gloo, ranks=ranks) == [EXPECTED] * ranks


# ---------------------------------------------------------------------- other targets, and models with their own loss


def test_a_dict_as_the_target() -> None:
    runner = weighing(
        loss=lambda output, target: crossed(output, target["labels"]),
        loss_weight=lambda target: target["tokens"].sum().item(),
    )
    counts = (1, 2, 3, 4)
    tokens = torch.tensor(counts).repeat_interleave(2).double() / 2
    wanted = reference(sequence(), labelled(*counts), crossed, counts)
    assert torch.equal(runner.step(X, target={"labels": labelled(*counts), "tokens": tokens}), wanted)


def test_a_model_with_its_own_loss_is_weighed_by_the_labels_it_is_given() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: Any, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        h = self.one(x)
        pipework.pipe_split()
        h = self.two(h)
        return {"loss": None if labels is None else crossed(h, labels), "logits": h}

    labels = labelled(5, 0, 1, 9)
    runner = runner_of(pipework.pipeline(model, (X[:2], labels[:2])), loss=None, loss_weight=valid)
    whole = crossed(model(X)["logits"], labels).detach()
    assert torch.isclose(runner.step(X, labels, target=labels), whole)  # the very numbers: see the tests above
    assert torch.isclose(runner.evaluate(X, labels, target=labels).loss, whole)
    assert runner.evaluate(X, labels).loss is None  # without weights there is no mean
    with pytest.raises(InputError, match="this step has no target"):
        runner.step(X, labels)


# ---------------------------------------------------------------------- what is refused


WEIGHTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "0 everywhere": (lambda target: 0, "gives 0 for all 4 microbatches"),
    "negative": (lambda target: -1.0, r"gave -1\.0 for microbatch 0"),
    "NaN": (lambda target: torch.tensor(float("nan")), "gave nan for microbatch 0"),
    "infinite": (lambda target: float("inf"), "gave inf"),
    "a tensor": (lambda target: target != -100, "no number for microbatch 0"),
    "None": (lambda target: None, "no number for microbatch 0"),
    "an error": (lambda target: target["labels"], "no number for microbatch 0"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_weight_that_is_none(what: str) -> None:
    weight, said = WEIGHTS[what]
    runner = weighing(loss_weight=weight)
    with pytest.raises(InputError, match=said):
        runner.step(X, target=labelled(1, 1, 1, 1))
    assert all(p.grad is None for p in runner.parameters())


def nothing_but_padding(group: dist.ProcessGroup, rank: int) -> list[str]:
    """A batch of padding at first, then in the middle of a training; each time the next step works."""
    runner = weighing(group, group.size())
    said = []
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            runner.step(X, target=labelled(0, 0, 0, 0))
        said.append(caught.value.what)
        assert torch.isfinite(runner.step(X, target=labelled(1, 0, 0, 3)))
    return said


def test_a_batch_of_padding_is_refused_by_every_rank_and_harms_none(gloo_pool: GlooPool) -> None:
    *others, last = gloo_pool.run(nothing_but_padding, ranks=3)
    assert last == ["loss_weight gives 0 for all 4 microbatches"] * 2
    assert others == [[last[0], "rank 2 refused the step"]] * 2
