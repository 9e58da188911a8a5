"""What one process does wrong in a later step reaches all: nobody hangs, and no numbers get mixed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipework
from pipework.errors import InputError, MismatchError, PipeworkError, TransportError
from tests.gloo import GlooPool

MICROBATCHES = 4
SOON = 60.0  # seconds


class Fragile(nn.Module):
    """Raises in the last stage when it meets a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), Breaking()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().abs().max() > 1e6:
            raise ValueError("this number is too large")
        return self.linear(x)


def runner(group: Any) -> pipework.Runner:
    torch.manual_seed(0)
    cuts = dict.fromkeys(("last", "second")[: group.size() - 1], pipework.SplitPoint.BEGINNING)
    pipe = pipework.pipeline(Fragile(), (torch.ones(2, 4),), split_spec=cuts)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(group.size()), MICROBATCHES)
    return pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss, group=group)


def raised(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def failing_stage(group: Any, rank: int) -> tuple[str, str, bool, str]:
    """The last rank's stage raises in the second step; a new runner then works as if nothing had been."""
    broken = runner(group)
    broken.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    error = raised(lambda: broken.step(torch.full((8, 4), 1e9), target=torch.zeros(8, 2)))
    again = raised(lambda: broken.step(torch.ones(8, 4), target=torch.zeros(8, 2)))
    loss = runner(group).step(torch.ones(8, 4), target=torch.zeros(8, 2))
    return type(error).__name__, type(again).__name__, bool(torch.isfinite(loss)), str(error)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stage_that_raises_ends_the_step_on_every_rank(gloo_pool: GlooPool, ranks: int) -> None:
    found = gloo_pool.run(failing_stage, ranks=ranks)
    *others, (last, *_) = found
    assert last == "ValueError"
    assert {first for first, *_ in others} == {TransportError.__name__}, found
    assert all(again == TransportError.__name__ and works for _, again, works, _ in found)


def other_inputs(group: Any, rank: int, size: int) -> str:
    """Rank 1 passes another batch in the second step than the others."""
    made = runner(group)
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    mine = size if rank == 1 else 8
    error = raised(lambda: made.step(torch.ones(mine, 4), target=torch.zeros(mine, 2)))
    assert isinstance(error, PipeworkError), error
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))  # all ranks refused it, so nothing is broken
    return type(error).__name__


@pytest.mark.parametrize(("size", "kind"), [(16, MismatchError), (4, MismatchError), (7, InputError)])
def test_another_batch_on_one_rank_is_refused_by_all(gloo_pool: GlooPool, size: int, kind: type) -> None:
    assert gloo_pool.run(other_inputs, size, ranks=3) == [kind.__name__] * 3


class Moody(nn.Module):
    """Gives another dtype, or another shape, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), "same"

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return {"same": out, "half": out.half(), "double": out.double(), "short": out[:1]}[self.how]


def something_else_than_announced(group: Any, rank: int, how: str) -> Exception | None:
    torch.manual_seed(0)
    moody = Moody()
    pipe = pipework.pipeline(nn.Sequential(moody, nn.Linear(4, 2)), (torch.ones(2, 4),), stages=2)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(2), MICROBATCHES)
    made = pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss, group=group)
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    moody.how = how
    return raised(lambda: made.step(torch.ones(8, 4), target=torch.zeros(8, 2)))


@pytest.mark.parametrize("how", ["half", "double", "short"])
def test_a_tensor_that_was_not_announced_reaches_nobody(gloo_pool: GlooPool, how: str) -> None:
    sender, receiver = gloo_pool.run(something_else_than_announced, how)
    assert isinstance(sender, MismatchError)
    assert "was about to be sent as" in sender.what
    assert isinstance(receiver, TransportError)


def killed(connection: Any, store: str, rank: int) -> None:
    """One of three processes, of which the second ends without a word in its second step."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 3), rank=rank, world_size=3)
    made = runner(dist.group.WORLD)
    made.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    if rank == 1:
        made.pipe.model.second.register_forward_pre_hook(lambda *_: os._exit(9))
    error = raised(lambda: made.step(torch.ones(8, 4), target=torch.zeros(8, 2)))
    connection.send(error)


def test_a_killed_process_is_heard_of_by_the_others(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(3)]
    processes = [
        spawn.Process(target=killed, args=(theirs, str(tmp_path / "store"), rank), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for rank in (0, 2):
            assert pipes[rank][0].poll(SOON), f"rank {rank} hangs"
            error = pipes[rank][0].recv()
            assert isinstance(error, TransportError)
            assert error.what == "the connection to another rank was lost"
            assert error.where == f"rank {rank}"
        processes[1].join(SOON)
        assert processes[1].exitcode == 9
    finally:
        for process in processes:
            process.kill()


def other_kind(group: Any, rank: int) -> str:
    made = runner(group)
    batch, target = torch.ones(8, 4), torch.zeros(8, 2)
    made.step(batch, target=target)
    made.evaluate(batch, target=target)
    error = raised(lambda: (made.evaluate if rank else made.step)(batch, target=target))
    assert isinstance(error, MismatchError), error
    return error.what


def test_a_step_on_one_rank_and_an_evaluation_on_another(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(other_kind) == ["rank 1 has another kind of step than rank 0"] * 2


class Late(nn.Module):
    """Raises in the backward of the last microbatch, when nobody else has anything to do any more."""

    left = -1

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(self.hook)
        return x * 1

    def hook(self, gradient: Tensor) -> None:
        Late.left -= 1
        if not Late.left:
            raise ValueError("too late")


def heard_late(group: Any, rank: int) -> tuple[str, bool]:
    def made() -> pipework.Runner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Late(), nn.Linear(4, 4))
        pipe = pipework.pipeline(model, (torch.ones(2, 4),), split_spec={"2": pipework.SplitPoint.BEGINNING})
        schedule = pipework.schedules.one_f_one_b(pipe.layout(2), MICROBATCHES)
        return pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss, group=group)

    def step(runner: pipework.Runner) -> Tensor:
        return runner.step(torch.ones(8, 4), target=torch.zeros(8, 4))

    broken = made()
    step(broken)
    Late.left = MICROBATCHES
    error = raised(lambda: step(broken))
    Late.left = -1
    return type(error).__name__, bool(torch.isfinite(step(made())))


def test_a_failure_that_others_hear_of_after_their_last_action(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(heard_late) == [("ValueError", True), ("TransportError", True)]


def penalised(group: Any, rank: int) -> str:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    pipe = pipework.pipeline(model, (torch.ones(2, 4),), stages=group.size())
    schedule = pipework.schedules.one_f_one_b(pipe.layout(group.size()), MICROBATCHES)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() + model[0].weight.square().sum()

    broken = pipework.Runner(pipe, schedule, loss=loss, group=group)
    return str(raised(lambda: broken.step(torch.ones(8, 4), target=torch.zeros(8, 4))))


def test_a_loss_that_uses_a_weight_of_another_rank(gloo_pool: GlooPool) -> None:
    first, last = gloo_pool.run(penalised)
    assert "connection to another rank was lost" in first
    assert "'0.weight' was used on a rank that does not have its stage" in last
    assert "a penalty can be one of its outputs" in last
