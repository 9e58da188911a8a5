"""Compiled blocks and stages on a GPU, by Triton: what holds on CPU with the compiler's other backends holds here."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pipework
from examples.gpt import GPT, Config
from pipework import Pipe, Runner
from pipework.plan import FAMILIES
from tests.end_to_end.case import crossed, token_batch
from tests.end_to_end.repeatable import repeatable_kernels
from tests.families import PER_RANK
from tests.run.test_compiled import HALVES, assert_equal_step
from tests.split.equality import before

needs = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a CUDA device and Triton"
)
pytestmark = [
    pytest.mark.gpu,
    needs,
    pytest.mark.filterwarnings(f"ignore:{HALVES}"),
    pytest.mark.filterwarnings("default"),  # what the compiler has to say is its own
]

CONFIG = Config(blocks=4)
INPUTS, TARGET = token_batch(rows=8, length=64, vocabulary=256, seed=1)
PARTS = 4


@pytest.fixture(autouse=True, scope="module")
def repeatable() -> Iterator[None]:
    with repeatable_kernels():
        yield


def model(compiled: bool = False) -> GPT:
    torch.manual_seed(0)
    made = GPT(CONFIG).cuda()
    for block in made.blocks if compiled else ():
        block.compile()
    return made


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cuda", dtype)


def cuts(stages: int) -> dict[str, pipework.SplitPoint]:
    return before(*(f"blocks.{CONFIG.blocks * n // stages}" for n in range(1, stages)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", PER_RANK)
def test_compiled_blocks_equal_the_compiled_model(family: str, dtype: torch.dtype | None) -> None:
    with autocast(dtype):
        report = pipework.verify(
            model(compiled=True),
            (INPUTS.cuda(),),
            target=TARGET.cuda(),
            loss=crossed,
            split_spec=cuts(2 * PER_RANK[family]),
            schedule=family,
            microbatches=PARTS,
        )
    assert report.equal, report.text()


def pipes(**options: Any) -> tuple[Pipe, Pipe]:
    found = [pipework.pipeline(model(), (INPUTS[:2].cuda(),), split_spec=cuts(4)) for _ in range(2)]
    for pipe in found:
        pipe.compile(**options)
    return found[0], found[1]


@pytest.fixture(scope="module")
def pipe_and_local() -> tuple[Pipe, Pipe]:
    return pipes(fullgraph=True)


def assert_equal(pipe: Pipe, local: Pipe, family: str) -> None:
    chosen = FAMILIES[family]
    runner = Runner(pipe, chosen.build(pipe.layout(2, chosen.place), PARTS), loss=crossed)
    assert_equal_step(runner, local, INPUTS.cuda(), TARGET.cuda(), crossed)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", [name for name, per_rank in PER_RANK.items() if per_rank == 2])
def test_compiled_stages_equal_the_same_stages_called_in_turn(
    family: str, dtype: torch.dtype | None, pipe_and_local: tuple[Pipe, Pipe]
) -> None:
    with autocast(dtype):
        assert_equal(*pipe_and_local, family)


def test_a_mode_of_the_compiler() -> None:
    assert_equal(*pipes(mode="max-autotune-no-cudagraphs"), "zero_bubble_v")


@pytest.mark.parametrize("what", ["blocks", "stages"])
@pytest.mark.parametrize("family", ["one_f_one_b", "zero_bubble_v"])
def test_compiled_code_in_a_captured_step(family: str, what: str) -> None:
    chosen = FAMILIES[family]
    runners: list[Runner] = []
    for graphs in (True, False):
        whole = model(compiled=what == "blocks")
        pipe = pipework.pipeline(whole, (INPUTS[:2].cuda(),), split_spec=cuts(2 * chosen.per_rank))
        if what == "stages":
            pipe.compile()
        schedule = chosen.build(pipe.layout(2, chosen.place), PARTS)
        runners.append(Runner(pipe, schedule, loss=crossed, graphs=graphs))
    captured, as_ever = runners
    captured.seed = as_ever.seed = 3
    for step in range(5):
        one, other = (runner.step(INPUTS.cuda(), target=TARGET.cuda()) for runner in runners)
        assert torch.equal(one, other), step
        theirs = dict(as_ever.named_parameters())
        for name, parameter in captured.named_parameters():
            gradient, wanted = parameter.grad, theirs[name].grad
            assert gradient is not None
            assert wanted is not None
            assert torch.equal(gradient, wanted), (step, name)
            parameter.grad = theirs[name].grad = None
    assert len(captured.captured) == 1
