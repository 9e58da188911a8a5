"""On GPUs: threads that share one, threads with one each, and processes over NCCL. They run where there are GPUs."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pipework
from examples.gpt import GPT, Config
from pipework.plan import Schedule

pytestmark = pytest.mark.gpu

MICROBATCHES = 4
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (2, 8, 64), generator=generator)
    return tokens[0].to(device), tokens[1].to(device)


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@one_gpu
@pytest.mark.parametrize("family", ["gpipe", "one_f_one_b", "interleaved_one_f_one_b", "looped_bfs"])
def test_threads_on_one_gpu_equal_the_unsplit_model(family: str) -> None:
    inputs, target = batch("cuda")
    stages = 4 if family in ("interleaved_one_f_one_b", "looped_bfs") else 2
    report = pipework.verify(
        GPT(Config()).cuda(),
        (inputs,),
        target=target,
        loss=loss,
        stages=stages,
        schedule=family,
        microbatches=MICROBATCHES,
    )
    assert report.equal, report.text()


def reference(model: torch.nn.Module, inputs: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor | None]:
    for x, y in zip(inputs.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        (loss(model(x), y) / MICROBATCHES).backward()
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
    runner = pipework.Runner(pipe, schedule(pipe), loss=loss)
    runner.step(inputs, target=target)
    for name, parameter in runner.named_parameters():
        found, wanted = parameter.grad, expected[name]
        assert found is not None
        assert wanted is not None
        assert torch.equal(found.cpu(), wanted.cpu()), name


def over_nccl(rank: int, store: str) -> None:
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group; see pipework.cli.launch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    inputs, target = batch("cuda")
    for family, stages in (("one_f_one_b", 2), ("gpipe", 2), ("interleaved_one_f_one_b", 4), ("looped_bfs", 4)):
        torch.manual_seed(0)
        report = pipework.verify(
            GPT(Config()).cuda(),
            (inputs,),
            target=target,
            loss=loss,
            stages=stages,
            schedule=family,
            microbatches=MICROBATCHES,
            group=dist.group.WORLD,
        )
        assert report.equal, report.text()
    dist.destroy_process_group()


@two_gpus
def test_processes_over_nccl_equal_the_unsplit_model(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(over_nccl, (str(tmp_path / "store"),), nprocs=2)
