"""Whole steps as CUDA graphs: the numbers of steps that are not captured, and nothing stale."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipework
from examples.gpt import GPT, Config
from pipework import InputError, Runner
from pipework.plan import FAMILIES
from tests.end_to_end.case import crossed, squared, token_batch
from tests.end_to_end.repeatable import repeatable_kernels
from tests.families import PER_RANK
from tests.models import WIDTH

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MICROBATCHES = 4


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    with repeatable_kernels():
        yield


def runner_by(
    family: str, model: nn.Module, example: Tensor, loss: Any, recomputed: Sequence[int] = (), **options: Any
) -> Runner:
    """On two ranks."""
    pipe = pipework.pipeline(model, (example,), stages=2 * PER_RANK[family])
    known = FAMILIES[family]
    schedule = known.build(pipe.layout(2, known.layout), MICROBATCHES).recomputing(recomputed)
    return Runner(pipe, schedule, loss=loss, **options)


class Twins:
    """A runner with graphs and one without, on twin models, which must stay equal whatever is done to both.

    The one with graphs may recompute stages.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        loss: Any,
        family: str = "one_f_one_b",
        recomputed: Sequence[int] = (),
        **options: Any,
    ) -> None:
        self.models = [model.cuda(), copy.deepcopy(model).cuda()]
        self.runners = [
            runner_by(family, module, example.cuda(), loss, stages, graphs=graphs, **options)
            for module, stages, graphs in zip(self.models, (recomputed, ()), (True, False), strict=True)
        ]
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in self.models]

    @property
    def captured(self) -> int:
        return len(self.runners[0].captured)

    def step(self, x: Tensor, target: Any) -> None:
        """One step of each; the loss, all gradients and the output are equal."""
        for runner in self.runners:
            runner.keep_outputs = True
        one, other = (runner.step(x, target=target) for runner in self.runners)
        assert torch.equal(one, other)
        assert torch.equal(self.runners[0].outputs, self.runners[1].outputs)
        self.compare()

    def compare(self) -> None:
        (mine, theirs) = (dict(model.named_parameters()) for model in self.models)
        for name, parameter in mine.items():
            assert torch.equal(parameter, theirs[name]), name
            gradient, wanted = parameter.grad, theirs[name].grad
            assert (gradient is None) == (wanted is None), name
            assert gradient is None or (wanted is not None and torch.equal(gradient, wanted)), name
        for one, other in zip(self.models[0].buffers(), self.models[1].buffers(), strict=True):
            assert torch.equal(one, other)

    def update(self, *, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        self.compare()


def tokens(seed: int, rows: int = 8, length: int = 32) -> tuple[Tensor, Tensor]:
    inputs, target = token_batch(rows=rows, length=length, vocabulary=256, seed=seed)
    return inputs.cuda(), target.cuda()


def gpt(dropout: float = 0.1, **kwargs: Any) -> GPT:
    return GPT(Config(width=64, blocks=4, dropout=dropout, **kwargs))


@pytest.mark.parametrize("family", PER_RANK)
def test_training_is_that_of_steps_that_are_not_captured(family: str) -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed, family)
    for seed in range(5):
        twins.step(*tokens(seed))
        twins.update()
    assert twins.captured == 1
    assert twins.runners[0].captured[0].memory > 0


@pytest.mark.parametrize("family", ["gpipe", "one_f_one_b", "zero_bubble_h1"])
def test_recomputed_stages_are_captured_with_what_they_draw(family: str) -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed, family, recomputed=(0, 1))
    for seed in range(5):
        twins.step(*tokens(seed))
        twins.update()
    assert twins.captured == 1


def test_a_replay_makes_the_host_wait_for_nothing() -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed)
    for seed in range(4):
        twins.step(*tokens(seed))
        twins.update()
    x, target = tokens(9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = twins.runners[0].step(x, target=target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, twins.runners[1].step(x, target=target))


def test_steps_that_accumulate_other_shapes_and_evaluations() -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed)
    for seed in range(12):
        twins.step(*tokens(seed, length=16 if seed % 4 == 3 else 32))
        if seed % 2:
            twins.update()
        one, other = (runner.evaluate(tokens(seed)[0]).output for runner in twins.runners)
        assert torch.equal(one, other)
    assert twins.captured == 3  # 32 tokens with gradients there and without; 16 with


def test_gradients_set_to_zero_and_to_none_by_turns() -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed)
    for seed in range(12):
        twins.step(*tokens(seed))
        twins.update(set_to_none=seed % 3 == 0)
    assert twins.captured == 2


def test_what_happens_between_steps_is_heeded() -> None:
    twins = Twins(gpt(), tokens(0)[0][:2], crossed)
    states = [copy.deepcopy(model.state_dict()) for model in twins.models]

    def load() -> None:
        for runner, state in zip(twins.runners, states, strict=True):
            runner.load_state_dict(state)

    def draw_more() -> None:
        for model in twins.models:
            model.blocks[1].dropout.p = 0.5

    def replace() -> None:
        for model in twins.models:
            model.blocks[0].norm1.weight.data = torch.ones(64, device="cuda") * 2

    def fail() -> None:
        for runner in twins.runners:
            with pytest.raises(InputError):
                runner.step(torch.zeros(3, 32, dtype=torch.int64, device="cuda"), target=None)

    def gradients() -> None:
        for model in twins.models:
            model.zero_grad()
            model.head.weight.grad = torch.ones_like(model.head.weight)

    for change in (load, draw_more, replace, fail, gradients):
        for seed in range(4):
            twins.step(*tokens(seed))
            twins.update()
        assert twins.captured
        change()
        for seed in range(4):
            twins.step(*tokens(seed))
            twins.update()


def test_buffers_that_a_forward_writes() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    twins = Twins(model, torch.randn(2, WIDTH), squared)
    for seed in range(5):
        torch.manual_seed(seed)
        twins.step(torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda"))
        twins.update()
    assert twins.captured == 1


class Scaled(nn.Module):
    """Times a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(WIDTH, WIDTH), torch.full((WIDTH,), 2.0, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Own(nn.Module):
    """Has parameters of its own at both ends, which are in different stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        for block in self.blocks:
            x = block(x)
        return x * self.last


class Distance(nn.Module):
    factor = 1.0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return squared(output, target) * self.factor


def halved(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output / 2


def test_what_python_decides_by_is_heeded() -> None:
    loss = Distance()
    twins = Twins(Own(), torch.randn(2, WIDTH), loss)

    def replace_first() -> None:
        for model in twins.models:
            model.first.data = torch.full((WIDTH,), 0.5, device="cuda")

    def replace_last() -> None:
        for model in twins.models:
            model.last.data = torch.full((WIDTH,), 0.5, device="cuda")

    def replace_plain() -> None:
        for model in twins.models:
            model.blocks[1].factor = torch.full((WIDTH,), 3.0, device="cuda")

    def hook() -> None:
        for model in twins.models:
            model.blocks[2].register_forward_hook(halved)

    def weigh() -> None:
        loss.factor = 0.5

    for change in (replace_first, replace_last, replace_plain, hook, weigh, lambda: None):
        for seed in range(4):
            torch.manual_seed(seed)
            twins.step(torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda"))
            twins.update()
        assert twins.captured == 1
        change()
    assert twins.captured == 1


class Learned(nn.Module):
    """A loss with a parameter and a table of its own, which grows."""

    def __init__(self) -> None:
        super().__init__()
        self.doubt, self.table = nn.Parameter(torch.zeros((), device="cuda")), torch.ones(1, device="cuda")

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        width = target.shape[1]
        if width > len(self.table):
            self.table = torch.full((width,), width / WIDTH, device="cuda")
        return squared(output, target[:, :WIDTH]) * torch.exp(-self.doubt) * self.table[0] + self.doubt


def test_a_loss_that_learns_and_grows() -> None:
    """Other targets make another kind of step, in which the table is set anew; so what was captured is of the past."""
    losses = [Learned(), Learned()]
    models = [Own().cuda()]
    models.append(copy.deepcopy(models[0]))
    runners = [
        runner_by("one_f_one_b", model, torch.randn(2, WIDTH, device="cuda"), loss, graphs=graphs)
        for model, loss, graphs in zip(models, losses, (True, False), strict=True)
    ]
    optimizers = [
        torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.01)
        for model, loss in zip(models, losses, strict=True)
    ]
    captured = []
    for seed, width in enumerate([WIDTH] * 4 + [2 * WIDTH] * 4 + [WIDTH] * 4):
        torch.manual_seed(seed)
        x, target = torch.randn(8, WIDTH, device="cuda"), torch.randn(8, width, device="cuda")
        one, other = (runner.step(x, target=target) for runner in runners)
        assert torch.equal(one, other)
        assert losses[0].doubt.grad is not None
        assert losses[1].doubt.grad is not None
        assert torch.equal(losses[0].doubt.grad, losses[1].doubt.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(losses[0].doubt, losses[1].doubt)
        captured.append(len(runners[0].captured))
    assert captured == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 2, 2]


def test_a_parameter_that_is_another_and_a_child_that_is_another() -> None:
    twins = Twins(Own(), torch.randn(2, WIDTH), squared)

    def another_parameter() -> None:
        for model in twins.models:
            model.blocks[1].linear.weight = nn.Parameter(torch.eye(WIDTH, device="cuda"))

    def another_child() -> None:
        for model in twins.models:
            model.blocks[1].linear = nn.Linear(WIDTH, WIDTH, bias=False, device="cuda")
            nn.init.constant_(model.blocks[1].linear.weight, 0.1)

    for change in (another_parameter, another_child, lambda: None):
        for seed in range(5):
            torch.manual_seed(seed)
            twins.step(torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda"))
            for model in twins.models:
                assert all(parameter.grad is not None for parameter in model.parameters())
                torch.optim.SGD(model.parameters(), 0.01).step()
                model.zero_grad()
        assert twins.captured == 1
        change()


def test_targets_that_are_one_and_the_same_or_no_tensors() -> None:
    def loss(output: Tensor, target: Any) -> Tensor:
        factor = target["factor"]
        return squared(output * target["a"] * target["b"], target["y"]) * (factor if isinstance(factor, int) else 1)

    spec = {"target": {"a": None, "b": None, "y": 0, "factor": None}}
    twins = Twins(Own(), torch.randn(2, WIDTH), loss, chunk_spec=spec)
    one, two = (torch.tensor(value, device="cuda") for value in (1.5, 0.5))
    for number, (a, b, factor) in enumerate([(one, one, 1)] * 4 + [(one, two, 1)] * 4 + [(two, one, 2)] * 4):
        torch.manual_seed(number)
        x, y = torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda")
        twins.step(x, {"a": a, "b": b, "y": y, "factor": factor})
        twins.update()
    assert twins.captured == 3
    x, y = torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda")
    for number in range(3):
        told = pytest.warns(UserWarning, match="neither a tensor nor a plain") if number == 2 else nullcontext()
        with told:
            twins.step(x, {"a": one, "b": two, "y": y, "factor": object()})
        twins.update()
    assert twins.captured == 3


def test_outputs_wanted_only_later() -> None:
    runner = runner_by("one_f_one_b", gpt().cuda(), tokens(0)[0][:2], crossed, graphs=True)
    for wanted in (False, True, False, True):
        runner.keep_outputs = wanted
        for seed in range(4):
            x, target = tokens(seed)
            runner.step(x, target=target)
            for parameter in runner.parameters():
                parameter.grad = None
            assert (runner.outputs is not None) == wanted
    assert len(runner.captured) == 2


def test_weights_of_the_loss() -> None:
    """Whatever their number; only which microbatches have none makes another kind of step."""
    twins = Twins(gpt(), tokens(0)[0][:2], crossed, "zero_bubble_h1", loss_weight=lambda target: (target != -100).sum())
    for seed in range(10):
        x, target = tokens(seed)
        target[:, 20 + seed :] = -100
        target[1, seed:] = -100
        if seed % 3 == 2:
            target[2:4] = -100
        twins.step(x, target)
        twins.update()
    assert twins.captured == 2


class Waits(nn.Module):
    """Goes by a value that only the GPU knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Counts(nn.Module):
    """Goes by what only Python knows."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


@pytest.mark.parametrize("block", [Waits, Counts])
def test_what_cannot_be_captured_runs_as_ever_and_is_named_once(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), block(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    twins = Twins(model, torch.randn(2, WIDTH), squared)
    said: list[str] = []
    memory: list[int] = []
    for seed in range(20):
        memory.append(torch.cuda.memory_allocated())
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            twins.step(torch.randn(8, WIDTH, device="cuda"), torch.randn(8, WIDTH, device="cuda"))
        twins.update()
        said += [str(each.message) for each in caught]
    (message,) = said
    assert "'1'" in message
    assert not twins.captured
    assert memory[-1] <= memory[5]


@repeatable_kernels()
def over_nccl(rank: int, store: str, family: str) -> None:
    """Two processes on one GPU, which NCCL takes for two hosts."""
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    os.environ |= {"NCCL_HOSTID": f"host {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    model = gpt().cuda()
    reference = copy.deepcopy(model)
    captured = runner_by(family, model, tokens(0)[0][:2], crossed, group=dist.group.WORLD, graphs=True)
    as_ever = runner_by(family, reference, tokens(0)[0][:2], crossed)  # threads on the same GPU
    captured.seed = as_ever.seed = 3
    wanted, found = trained(as_ever), trained(captured)
    assert len(captured.captured) == 1
    assert found.pop("loss").tolist() == wanted["loss"].tolist()
    assert found
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in found.items())
    dist.destroy_process_group()


def trained(runner: Runner) -> dict[str, Tensor]:
    """The parameters that are here after a few steps, and their losses; a replay makes the host wait for nothing."""
    optimizer = torch.optim.AdamW(runner.parameters(), lr=1e-2)
    losses: list[Tensor] = []
    batches = [tokens(seed) for seed in range(6)]
    for x, target in batches:
        torch.cuda.set_sync_debug_mode("error" if runner.captured else "default")
        losses.append(runner.step(x, target=target))
        torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": torch.stack(losses)} | {n: p.detach().clone() for n, p in runner.named_parameters()}


@pytest.mark.parametrize("family", ["one_f_one_b", "zero_bubble_v"])
def test_processes_over_nccl_train_as_threads_do(family: str, tmp_path: Any) -> None:
    torch.multiprocessing.spawn(over_nccl, (str(tmp_path / "store"), family), nprocs=2)
