"""On GPUs: threads that share one, threads with one each, and processes over NCCL. They run where there are GPUs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipework
from examples.gpt import GPT, Config
from pipework.plan import FAMILIES, Schedule
from tests.end_to_end.case import crossed, token_batch
from tests.end_to_end.repeatable import repeatable_kernels
from tests.families import PER_RANK
from tests.run.pipes import equal, gradients
from tests.run.test_backward import halves_of

pytestmark = pytest.mark.gpu

MICROBATCHES = 4
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, target = token_batch(rows=8, length=64, vocabulary=256, seed=1)
    return inputs.to(device), target.to(device)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    with repeatable_kernels():
        yield


@one_gpu
@pytest.mark.parametrize("family", PER_RANK)
def test_threads_on_one_gpu_equal_the_unsplit_model(family: str) -> None:
    inputs, target = batch("cuda")
    report = pipework.verify(
        GPT(Config()).cuda(),
        (inputs,),
        target=target,
        loss=crossed,
        stages=2 * PER_RANK[family],
        schedule=family,
        microbatches=MICROBATCHES,
    )
    assert report.equal, report.text()


@one_gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", ["gpipe", "one_f_one_b", "zero_bubble_h1"])
def test_recomputed_stages_equal_the_unsplit_model(family: str, autocast: bool) -> None:
    """With dropout: the second forward runs in a thread of autograd's own."""
    inputs, target = batch("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report = pipework.verify(
            GPT(Config(dropout=0.1)).cuda(),
            (inputs,),
            target=target,
            loss=crossed,
            schedule=lambda layout, microbatches: FAMILIES[family].build(layout, microbatches).recomputing(),
        )
    assert report.equal, report.text()


@one_gpu
def test_a_recomputed_stage_holds_one_activation() -> None:
    """Of 8 microbatches the two stages hold 8 and 8 activations, 1 and 8, 1 and 1, as the allocator counts them."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(8)))
    x = torch.randn(8 * 4096, 512, device="cuda")
    pipe = pipework.pipeline(model.cuda(), (x[:4096],), stages=2)
    taken = list[float]()
    for stages in ([], [0], [0, 1]):
        schedule = pipework.schedules.gpipe(pipe.layout(2), 8).recomputing(stages)
        runner = pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss)
        runner.step(x, target=x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.step(x, target=x)
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert 0.5 * taken[0] < taken[1] < 0.6 * taken[0]  # and what is made on the way
    assert taken[2] < 0.2 * taken[0]


@one_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(64, 48), torch.randn(3, 40, 64)),
        (nn.Linear(64, 48, bias=False), torch.randn(32, 64)),
        (nn.Conv2d(8, 16, 3, padding=1, groups=2), torch.randn(4, 8, 9, 9)),
        (nn.Conv1d(8, 16, 3, stride=2), torch.randn(4, 8, 30)),
        (nn.Embedding(50, 16, padding_idx=0), torch.arange(50).view(5, 10)),
    ],
    ids=["linear", "linear without bias", "conv2d", "conv1d", "embedding"],
)
def test_a_backward_in_halves_has_the_bits_of_one_in_one_piece(
    module: nn.Module, x: torch.Tensor, dtype: torch.dtype | None
) -> None:
    module = copy.deepcopy(module).to("cuda", dtype)
    x = x.to("cuda", dtype if x.is_floating_point() else None)
    twin, other = copy.deepcopy(module), x.clone()
    for tensor in (x, other) if x.is_floating_point() else ():
        tensor.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        wanted = twin(other)
        seed = torch.randn_like(wanted)
        wanted.backward(seed)
        out, left = halves_of(module, x, seed)
    assert len(left.calls) == 1
    assert torch.equal(out, wanted)
    assert equal({"x": x.grad, **gradients(module)}, {"x": other.grad, **gradients(twin)})


def reference(model: torch.nn.Module, inputs: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor | None]:
    for x, y in zip(inputs.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        (crossed(model(x), y) / MICROBATCHES).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def schedule(pipe: pipework.Pipe) -> Schedule:
    return pipework.schedules.one_f_one_b(pipe.layout(ranks=2), MICROBATCHES)


@two_gpus
def test_threads_with_a_gpu_each_equal_the_unsplit_model_and_take_inputs_from_anywhere() -> None:
    model = GPT(Config(dropout=0.0))
    inputs, target = batch("cpu")
    expected = reference(copy.deepcopy(model).cuda(), inputs.cuda(), target.cuda())
    pipe = pipework.pipeline(model, (inputs[:2],), stages=2)
    for index in range(2):
        pipe.get_stage_module(index).to(f"cuda:{index}")
    runner = pipework.Runner(pipe, schedule(pipe), loss=crossed)
    runner.step(inputs, target=target)
    for name, parameter in runner.named_parameters():
        found, wanted = parameter.grad, expected[name]
        assert found is not None
        assert wanted is not None
        assert torch.equal(found.cpu(), wanted.cpu()), name


@repeatable_kernels()
def over_nccl(rank: int, store: str) -> None:
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    inputs, target = batch("cuda")
    for family, per_rank in PER_RANK.items():
        torch.manual_seed(0)
        report = pipework.verify(
            GPT(Config()).cuda(),
            (inputs,),
            target=target,
            loss=crossed,
            stages=2 * per_rank,
            schedule=family,
            microbatches=MICROBATCHES,
            group=dist.group.WORLD,
        )
        assert report.equal, report.text()
    dist.destroy_process_group()


@two_gpus
def test_processes_over_nccl_equal_the_unsplit_model(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(over_nccl, (str(tmp_path / "store"),), nprocs=2)
