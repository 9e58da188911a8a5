"""The runner on processes: inputs where they are needed, agreement before anything moves, one result on all ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import InputError, MismatchError, PipeworkError, Runner
from tests.end_to_end.case import squared
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import case_runner, equal, gradients, piped, runner_of, sequence, unsplit
from tests.run.test_runner import assert_really_ran

X, Y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)
SOON = 30.0  # seconds after which a test that should end at once is taken to hang


def own(runner: Runner, found: dict[str, Any]) -> dict[str, Any]:
    """Of a dictionary by parameter, what this rank holds."""
    return {name: found[name] for name, _ in runner.named_parameters()}


def refused(kind: type[PipeworkError], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------- one step after another


def life(group: dist.ProcessGroup, rank: int, ranks: int) -> dict[str, Tensor]:
    """Steps that accumulate, clipping, evaluations, other shapes, and an optimizer, all against the unsplit model."""
    model, reference = sequence(ranks), sequence(ranks)
    runner = runner_of(piped(model, *map(str, range(1, ranks))), ranks, group=group)
    assert refused(PipeworkError, lambda: runner.recorded).startswith("no step was recorded")
    assert torch.equal(runner.clip_grad_norm_(1.0), torch.tensor(0.0))
    for rows in (8, 4, 8):
        assert torch.equal(runner.step(X[:rows], target=Y[:rows]), unsplit(reference, X[:rows], Y[:rows], 4))
        assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
    evaluated = runner.evaluate(X[:4], target=Y[:4])
    with torch.no_grad():
        wanted = torch.cat([reference(part) for part in X[:4].chunk(4)])
    assert (evaluated.output is not None) == (rank == ranks - 1)
    assert evaluated.output is None or torch.equal(evaluated.output, wanted)
    each = torch.stack([squared(a, b) for a, b in zip(wanted.chunk(4), Y[:4].chunk(4), strict=True)])
    assert evaluated.loss is not None
    assert torch.equal(evaluated.loss, each.sum() / 4)
    assert runner.evaluate(X).loss is None
    assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
    for norm_type, most in ((float("inf"), 0.3), (2.0, 0.01), (1.0, 100.0)):
        theirs = nn.utils.clip_grad_norm_(reference.parameters(), most, norm_type)
        assert torch.equal(runner.clip_grad_norm_(most, norm_type), theirs)
        assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
    assert runner.steps == 3
    assert refused(PipeworkError, lambda: runner.recorded)  # off by default
    return runner.state_dict()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_life_of_a_runner(gloo_pool: GlooPool, ranks: int) -> None:
    states = gloo_pool.run(life, ranks, ranks=ranks)
    union = {name: tensor for state in states for name, tensor in state.items()}
    assert sum(map(len, states)) == len(union)
    assert equal({name: union[name] for name in sequence(ranks).state_dict()}, dict(sequence(ranks).state_dict()))
    assert union.keys() == sequence(ranks).state_dict().keys()


def recorded(group: dist.ProcessGroup, rank: int) -> tuple[Any, Tensor]:
    pipe = piped(sequence(6), *"12345")
    schedule = pipework.schedules.interleaved_one_f_one_b(pipe.layout(3), 6)
    runner = Runner(pipe, schedule, loss=squared, group=group, record=True)
    loss = runner.step(torch.cat([X, X, X])[:12], target=torch.cat([Y, Y, Y])[:12])
    return runner.recorded, loss


def test_a_recorded_timeline_is_whole_on_every_rank(gloo_pool: GlooPool) -> None:
    (first, loss), *others = gloo_pool.run(recorded, ranks=3)
    assert_really_ran(first, first.schedule)
    for timeline, told in others:
        assert timeline.spans == first.spans
        assert torch.equal(told, loss)


def surroundings(group: dist.ProcessGroup, rank: int) -> None:
    """Autocast around step and evaluation; float64; bfloat16; the input's gradient; the seed of rank 0."""
    model, reference = sequence(), sequence()
    runner = runner_of(piped(model, "2"), group=group)
    with torch.autocast("cpu", torch.bfloat16):
        runner.evaluate(X)
        loss = runner.step(X, target=Y)
    losses = []
    for part, aim in zip(X.chunk(4), Y.chunk(4), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(squared(reference(part), aim))
        (losses[-1] / 4).backward()
    assert torch.equal(loss, torch.stack(losses).detach().sum() / 4)
    assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
    for dtype in (torch.float64, torch.bfloat16):
        model = sequence().to(dtype)
        reference = copy.deepcopy(model)
        runner = runner_of(pipework.pipeline(model, (X[:2].to(dtype),), stages=2), group=group)
        x, twin = (X.to(dtype).requires_grad_() for _ in range(2))
        loss = runner.step(x, target=Y.to(dtype))
        assert loss.dtype == dtype
        assert torch.equal(loss, unsplit(reference, twin, Y.to(dtype), 4))
        assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
        assert (x.grad is None) == (rank == 1)
        assert rank == 1 or equal({"x": x.grad}, {"x": twin.grad})
    torch.manual_seed(100 + rank)
    assert runner_of(piped(sequence(), "2"), group=group).seed == 100


def test_autocast_dtypes_input_gradients_and_seed(gloo_pool: GlooPool) -> None:
    gloo_pool.run(surroundings)


def from_two_to_three(group: dist.ProcessGroup, rank: int) -> None:
    """Rank by rank saved from a cut in 3, loaded into other cuts and into the unsplit model."""
    model = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), linear(), nn.BatchNorm1d(WIDTH), linear())
    three = runner_of(piped(model, "1", "3"), 3, group=group)
    three.step(X, target=Y)
    torch.optim.SGD(three.parameters(), 0.1).step()
    told: list[Any] = [None] * 3
    dist.all_gather_object(told, three.state_dict(), group)
    union = {name: tensor for each in told for name, tensor in each.items()}
    assert union.keys() == model.state_dict().keys()
    plain = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), linear(), nn.BatchNorm1d(WIDTH), linear())
    plain.load_state_dict(union)
    other = runner_of(piped(copy.deepcopy(plain), "2", "4"), 3, group=group)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(union)
    assert equal(other.state_dict(), {name: union[name] for name in other.state_dict()})


def test_state_dicts_of_the_ranks_make_one(gloo_pool: GlooPool) -> None:
    gloo_pool.run(from_two_to_three, ranks=3)


# ---------------------------------------------------------------------- inputs where they are needed


def late(group: dist.ProcessGroup) -> tuple[nn.Module, Runner]:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: Any, x: Tensor, mask: Tensor | None, scale: float | None = 2.0, *, bias: Tensor) -> Tensor:
        h = self.one(x)
        pipework.pipe_split()
        h = self.two(h if mask is None else h * mask)
        pipework.pipe_split()
        return self.three(h) * (1.0 if scale is None else scale) + bias

    pipe = pipework.pipeline(model, (X[:2], X[:2, :1]), {"bias": X[:2]})
    return copy.deepcopy(model), runner_of(pipe, 3, group=group)


def only_where_needed(group: dist.ProcessGroup, rank: int) -> None:
    mask, bias = numbers(8, 1, seed=8), numbers(8, WIDTH, seed=9)
    reference, runner = late(group)

    def wanted(given: Tensor | None, scale: float | None) -> Tensor:
        total = []
        for n in range(4):
            rows = slice(2 * n, 2 * n + 2)
            out = reference(X[rows], None if given is None else given[rows], scale, bias=bias[rows])
            total.append(squared(out, Y[rows]))
            (total[-1] / 4).backward()
        return torch.stack(total).detach().sum() / 4

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X,), {}),
        ((None, mask), {}),
        ((), {"bias": bias, "target": Y}),
    ]
    args, kwargs = calls[rank]
    expected = wanted(mask, 2.0)
    for _ in range(2):
        assert torch.equal(runner.step(*args, **kwargs), expected)
    wanted(mask, 2.0)
    assert equal(own(runner, gradients(runner.pipe.model)), own(runner, gradients(reference)))
    half = tuple(None if a is None else a[:4] for a in args)
    assert torch.isfinite(runner.step(*half, **{name: value[:4] for name, value in kwargs.items()}))
    assert torch.equal(runner.step(*args, scale=0.5, **kwargs), wanted(mask, 0.5))  # a Python value on every rank
    args = ((X, mask), (), ())[rank]  # missing where it is needed, though another rank has it: said on every rank
    assert "rank 1 was not given mask" in refused(InputError, runner.step, *args, **kwargs)
    assert torch.equal(runner.step(*calls[rank][0], **kwargs), wanted(mask, 2.0))


def test_inputs_are_needed_only_where_they_are_used(gloo_pool: GlooPool) -> None:
    gloo_pool.run(only_where_needed, ranks=3, limit=SOON)


def nones(group: dist.ProcessGroup, rank: int) -> None:
    """None is a value too: for an argument without a default, and against a default that is something else."""
    bias = numbers(8, WIDTH, seed=9)
    reference, runner = late(group)
    for scale in (2.0, None):
        out = torch.cat([reference(x, None, scale, bias=b) for x, b in zip(X.chunk(4), bias.chunk(4), strict=True)])
        found = runner.evaluate(X if rank == 0 else None, None, scale, bias=bias if rank == 2 else None)
        assert rank < 2 or torch.equal(found.output, out), scale


def test_none_is_a_value(gloo_pool: GlooPool) -> None:
    gloo_pool.run(nones, ranks=3, limit=SOON)


def left_out_later(group: dist.ProcessGroup, rank: int) -> str:
    runner = runner_of(piped(sequence(), "2"), group=group)
    runner.step(X, target=Y)
    assert "missing a required argument: 'input'" in refused(InputError, runner.step, target=Y)
    return refused(InputError, runner.step, None, target=Y)


def test_inputs_that_every_rank_passed_cannot_be_left_out_later(gloo_pool: GlooPool) -> None:
    for said in gloo_pool.run(left_out_later, limit=SOON):
        assert "input was passed in the first step, and not in this one" in said


# ---------------------------------------------------------------------- ranks that do not mean the same


def mismatched(group: dist.ProcessGroup, rank: int, how: str) -> str:
    odd = rank == 1
    model = sequence(8)
    pipe = piped(model, "3" if how == "cut" and odd else "4")
    layout = pipe.layout(2)
    count = {"microbatches": 2, "microbatches that do not divide": 3}.get(how, 4) if odd else 4
    family = pipework.schedules.gpipe if how == "schedule" and odd else pipework.schedules.one_f_one_b
    if how == "stages" and odd:
        pipe = piped(model, "2", "4", "6")
        layout, family = pipe.layout(2), pipework.schedules.interleaved_one_f_one_b
    scale, record = not (how == "scaling" and odd), how == "record" and odd
    runner = Runner(pipe, family(layout, count), loss=squared, group=group, scale_loss=scale, record=record)
    rows = 4 if how == "shape" and odd else 8
    if how == "shape later":
        runner.step(X, target=Y)
        rows = 4 if odd else 8
    if how == "indivisible" and odd:
        rows = 7
    call = runner.evaluate if how == "call" and odd else runner.step
    args = () if how == "nothing" and odd else (X[:rows],)
    kwargs = {"foo": 1} if how == "unknown argument" and odd else {}
    with pytest.raises(PipeworkError) as caught:
        call(*args, target=Y[:rows], **kwargs)
    assert all(p.grad is None for p in runner.parameters()) or how == "shape later"
    assert isinstance(caught.value, MismatchError | InputError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("schedule", "rank 1 has another schedule than rank 0"),
        ("microbatches", "rank 1 has another schedule than rank 0"),
        ("microbatches that do not divide", "microbatches"),
        ("cut", "rank 1 has another cut than rank 0"),
        ("stages", "rank 1 has another schedule than rank 0"),
        ("shape", "rank 1 has another cut than rank 0"),
        ("scaling", "rank 1 has another scale_loss than rank 0"),
        ("record", "rank 1 has another record than rank 0"),
        ("call", "rank 1 has another kind of step than rank 0"),
        ("indivisible", "input of size 7"),
        ("unknown argument", "the arguments do not fit"),
    ],
)
def test_ranks_that_mean_different_things_hear_of_it_before_a_tensor_moves(
    gloo_pool: GlooPool, how: str, said: str
) -> None:
    for told in gloo_pool.run(mismatched, how, limit=SOON):
        assert said in told


def other_inputs(group: dist.ProcessGroup, rank: int) -> str:
    """Where ranks pass only what they need, and two pass the same argument, of another shape."""
    _, runner = late(group)
    x, mask, bias = (X, None, None) if rank == 0 else (X[:4], numbers(8, 1), numbers(8, WIDTH))
    return refused(MismatchError, runner.step, x if rank < 2 else None, mask, bias=bias, target=Y)


def test_ranks_that_pass_another_tensor_for_one_argument(gloo_pool: GlooPool) -> None:
    for told in gloo_pool.run(other_inputs, ranks=3, limit=SOON):
        assert "ranks 0 and 1 pass another x" in told


def outside(group: dist.ProcessGroup, rank: int) -> str:
    pipe = piped(sequence(), "1", "2")
    return refused(InputError, Runner, pipe, pipework.schedules.gpipe(pipe.layout(3), 2), loss=F.mse_loss, group=group)


def test_a_group_of_another_size(gloo_pool: GlooPool) -> None:
    for told in gloo_pool.run(outside):
        assert "the schedule has 3 ranks, and the group 2" in told


def along_a_mesh(group: dist.ProcessGroup, rank: int) -> str:
    """Two pipelines of two ranks each, on halves of a batch."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    model, reference = sequence(), sequence()
    runner = runner_of(piped(model, "2"), group=mesh["pipeline"])
    half = slice(4 * (rank // 2), 4 * (rank // 2) + 4)
    assert torch.equal(runner.step(X[half], target=Y[half]), unsplit(reference, X[half], Y[half], 4))
    assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))
    return refused(InputError, runner_of, piped(model, "2"), group=mesh)


def test_a_dimension_of_a_mesh_is_a_group(gloo_pool: GlooPool) -> None:
    for told in gloo_pool.run(along_a_mesh, ranks=4, limit=SOON):
        assert "the mesh given as group has 2 dimensions, data, pipeline" in told


def loss_on_the_last_rank(group: dist.ProcessGroup, rank: int) -> None:
    model, reference = sequence(), sequence()
    runner = runner_of(piped(model, "2"), group=group, loss=squared if rank == 1 else None)
    for _ in range(2):
        loss = runner.step(X, target=Y if rank == 1 else None)
        assert torch.equal(loss, unsplit(reference, X, Y, 4))
    assert equal(own(runner, gradients(model)), own(runner, gradients(reference)))


def test_a_loss_is_needed_on_the_last_rank_only(gloo_pool: GlooPool) -> None:
    gloo_pool.run(loss_on_the_last_rank, limit=SOON)


def own_loss_on_processes(group: dist.ProcessGroup, rank: int) -> float:
    case, runner = case_runner("own loss", 2, 4, group)
    return float(runner.step(*case.args, **case.kwargs))


def test_a_models_own_loss_reaches_every_rank(gloo_pool: GlooPool) -> None:
    first, second = gloo_pool.run(own_loss_on_processes)
    case, runner = case_runner("own loss", 2, 4)
    assert first == second == float(runner.step(*case.args, **case.kwargs))


def counting(group: dist.ProcessGroup, rank: int) -> float:
    def right(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(-1) == target.argmax(-1)).sum()

    runner = runner_of(piped(sequence(), "2"), group=group, loss=right, scale_loss=False)
    x = numbers(8, WIDTH)
    return float(runner.evaluate(x, target=sequence()(x)).loss)


def test_an_evaluation_that_counts(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(counting) == [8.0, 8.0]
