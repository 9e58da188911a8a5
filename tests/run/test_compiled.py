"""Blocks that their author compiled, and stages compiled as a whole: the numbers of the same code, called in turn."""

from __future__ import annotations

import copy
import functools
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pipework
from pipework import InputError, Kind, Layout, Pipe, Runner, Schedule, pipe_split
from pipework.split.draws import DrawKey, drawing_for
from pipework.split.torch_private import is_compiled_in_place
from tests.end_to_end.case import Loss, squared
from tests.families import PER_RANK
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import gradients
from tests.schedules import split_1f1b
from tests.split.equality import before, same

HALVES = "compiled code has one backward for all"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{HALVES}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # as the compiler loads
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # as it looks at inputs
]


class Backend:
    """A compiler's backend that changes nothing, and counts what it is given and what runs of it."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0
        self.compiling: Callable[[], object] = lambda: None  # called while it compiles

    def __call__(self, graph: Any, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        self.compiling()

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> Backend:
    """A new one, for a compiler that has forgotten what it made: it makes no more than eight of one piece of code."""
    torch.compiler.reset()
    return Backend()


@pytest.fixture(scope="module")
def pipe_and_local() -> tuple[Pipe, Pipe]:
    """Two pipes of the same model, whose stages are compiled; they are kept, since compiling takes long."""
    return twins(backend="aot_eager", fullgraph=True)


class Block(nn.Module):
    """Two layers with a norm and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.drop(self.norm(self.a(x)).relu()))


class Layer(nn.Module):
    """A layer behind a graph break, if it is asked for one."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.linear, self.breaks = nn.Linear(WIDTH, WIDTH), breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch.compiler.graph_break() if hasattr(torch.compiler, "graph_break") else torch._dynamo.graph_break()
        return self.linear(x)


class Around(nn.Module):
    """A block that draws, is not compiled, and calls one that is, and a compiled function."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Block()
        self.inner.compile(backend=backend, fullgraph=True)
        self.function = torch.compile(_function, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.3, self.training)
        return F.dropout(self.function(self.inner(x)), 0.3, self.training)


def _function(x: Tensor) -> Tensor:
    return F.dropout(x, 0.2).sin()


def blocks(backend: Any) -> nn.Sequential:
    """Four blocks, each compiled in another way, that all draw random numbers."""
    torch.manual_seed(0)
    in_place, broken, given = Block(), Block(), Block()
    broken.b = Layer(breaks=True)
    in_place.compile(backend=backend, fullgraph=True)
    broken.compile(backend=backend)
    return nn.Sequential(in_place, Around(backend), torch.compile(given, backend=backend), broken)


@pytest.mark.parametrize("family", PER_RANK)
def test_compiled_blocks_equal_the_compiled_model(family: str) -> None:
    cuts = before("1", "2", "3") if PER_RANK[family] == 2 else before("2")
    x = numbers(8, WIDTH)
    report = pipework.verify(blocks("aot_eager"), (x,), target=x, loss=squared, split_spec=cuts, schedule=family)
    assert report.equal, report.text()


def test_a_capture_leaves_blocks_to_the_compiler(backend: Backend) -> None:
    """Which gives code up for good where it meets it under a dispatch mode."""
    model = nn.Sequential(Block(), torch.compile(Block(), backend=backend))
    model[0].compile(backend=backend, fullgraph=True)
    x = numbers(8, WIDTH)
    pipe = pipework.pipeline(model, (x[:2],), split_spec=before("1"))
    assert backend.graphs == 0
    Runner(pipe, split_1f1b(pipe.layout(2), 4), loss=squared).step(x, target=x)
    assert backend.runs == 4 * 2  # microbatches, blocks


def test_blocks_may_be_compiled_after_the_cut(backend: Backend) -> None:
    model = nn.Sequential(Block(), Block())
    x = numbers(8, WIDTH)
    pipe = pipework.pipeline(model, (x[:2],), split_spec=before("1"))
    runner = Runner(pipe, split_1f1b(pipe.layout(2), 4), loss=squared)
    loss = runner.step(x, target=x)
    model[1].compile(backend=backend, fullgraph=True)
    runner.steps = 0
    assert not torch.equal(runner.step(x, target=x), loss)  # what is compiled draws from one stream
    assert backend.runs == 4


def test_verify_compiles_its_copies(backend: Backend) -> None:
    x = numbers(8, WIDTH)
    model = nn.Sequential(Block(), Block())
    model[0].compile(backend=backend)
    assert pipework.verify(model, (x,), target=x, loss=squared, split_spec=before("1")).equal
    assert backend.runs == 2 * 4
    assert is_compiled_in_place(model[0])


def test_balanced_cuts_do_not_open_compiled_blocks() -> None:
    model = nn.Sequential(Around("eager"), Block())
    model[1].compile(backend="eager")
    example = (numbers(2, WIDTH),)
    assert [list(dict(s.named_children())) for s in _stages(pipework.pipeline(model, example, stages=2))] == [
        ["0"],
        ["1"],
    ]
    with pytest.raises(pipework.CutError, match="cannot be cut into 3 stages") as error:
        pipework.pipeline(model, example, stages=3)
    assert "torch.compile" in error.value.why


def _stages(pipe: Pipe) -> list[nn.Module]:
    return [pipe.get_stage_module(index) for index in range(pipe.num_stages)]


def test_no_rank_computes_while_another_compiles(backend: Backend) -> None:
    """The compiler puts back the generators that all threads share, over what another rank has drawn meanwhile."""
    compiling, met = threading.Event(), threading.Event()
    compiler = threading.current_thread()

    def wait() -> None:
        nonlocal compiler
        compiler = threading.current_thread()
        compiling.set()
        met.wait(0.2)  # seconds; nobody comes
        compiling.clear()

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if compiling.is_set() and threading.current_thread() is not compiler:
                met.set()
            return F.dropout(x)

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Plain(), Block())
    backend.compiling = wait
    model[2].compile(backend=backend)
    pipe = pipework.pipeline(model, (numbers(2, WIDTH),), split_spec=before("2"))
    x = numbers(16, WIDTH)
    Runner(pipe, pipework.schedules.gpipe(pipe.layout(2), 8), loss=squared).step(x, target=x)
    assert not met.is_set()


def test_a_tied_weight_in_compiled_blocks() -> None:
    model = nn.Sequential(*(Block().eval() for _ in range(4)))
    model[3].a.weight = model[0].a.weight
    model[0].compile(backend="aot_eager")
    model[3].compile(backend="aot_eager")
    x = numbers(8, WIDTH)
    for wrapped in (False, True):
        if wrapped:
            model[0], model[3] = (torch.compile(copy.deepcopy(model[n]), backend="aot_eager") for n in (0, 3))
        report = pipework.verify(model, (x,), target=x, loss=squared, split_spec=before("1", "2", "3"), ranks=4)
        assert report.equal, report.text()


# ---------------------------------------------------------------- whole stages


def _everything(self: Any, x: Tensor) -> Tensor:
    """Draws in the trunk and in a block, a checkpoint, writes into what is received and into a buffer, a skip."""
    h, on = self.a(x), self.training
    x = F.dropout(checkpoint(lambda y: F.dropout(y, 0.2, on).sin(), h, use_reentrant=False), 0.3, on)
    self.kept.add_(x.detach().mean(0))
    pipe_split()
    x.add_(1)
    x = self.block(x)
    pipe_split()
    x = torch.vmap(lambda row: row * 2)(x) + h
    pipe_split()
    return F.linear(self.c(x), self.a.weight)  # tied


def twins(**options: Any) -> tuple[Pipe, Pipe]:
    """Two pipes of the same model, whose stages are compiled."""
    pipes = []
    for _ in range(2):
        parts = {"a": linear(), "block": Block(), "c": linear(), "kept": nn.Buffer(torch.zeros(WIDTH))}
        pipes.append(pipework.pipeline(trunk(**parts)(_everything), (numbers(2, WIDTH),)))
        pipes[-1].compile(**options)
    return pipes[0], pipes[1]


def assert_equal_step(runner: Runner, local: Pipe, x: Tensor, target: Tensor, loss: Loss = squared) -> None:
    """A step gives what the other pipe's stages give, called one after another for each microbatch."""
    schedule, model, step = runner.schedule, local.model, runner.steps
    runner.pipe.model.zero_grad(set_to_none=True)
    total = runner.step(x, target=target)
    made, losses = [], []
    for microbatch, (part, aim) in enumerate(zip(*(t.chunk(schedule.microbatches) for t in (x, target)), strict=True)):
        model.zero_grad(set_to_none=True)
        with drawing_for(DrawKey(runner.seed, step, microbatch)):
            own = loss(local(part)[0], aim)
        (own / schedule.microbatches).backward()
        losses.append(own.detach())
        made.append(gradients(model))
    same(total, torch.stack(losses).sum() / schedule.microbatches, "loss")
    for name, parameter in runner.named_parameters():
        first = next(n for n in range(local.num_stages) if name in dict(local.get_stage_module(n).named_parameters()))
        parts = [made[microbatch][name] for microbatch in _order(schedule, first)]
        same(parameter.grad, functools.reduce(torch.add, parts), name)
    wanted = dict(model.named_buffers())
    for name, buffer in runner.named_buffers():
        same(buffer, wanted[name], name)


def _order(schedule: Schedule, stage: int) -> list[int]:
    """The microbatches in the order in which the stage adds up its gradients."""
    last = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
    rank = schedule.layout.rank_of[stage]
    return [a.microbatch for a in schedule.orders[rank] if a.stage == stage and a.kind in last]


FAMILIES_OF_FOUR = [name for name, per_rank in PER_RANK.items() if per_rank == 2]


@pytest.mark.parametrize("family", FAMILIES_OF_FOUR)
def test_compiled_stages_equal_the_same_stages_called_in_turn(family: str, pipe_and_local: tuple[Pipe, Pipe]) -> None:
    pipe, local = pipe_and_local
    chosen = pipework.plan.FAMILIES[family]
    runner = Runner(pipe, chosen.build(pipe.layout(2, chosen.place), 4), loss=squared)
    assert_equal_step(runner, local, numbers(8, WIDTH), numbers(8, WIDTH, seed=5))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 compiles no checkpoint in fullgraph here")
def test_compiled_stages_are_recomputed_with_the_same_numbers(pipe_and_local: tuple[Pipe, Pipe]) -> None:
    pipe, local = pipe_and_local
    schedule = pipework.schedules.zero_bubble_v(pipe.layout(2, Layout.vee), 4).recomputing()
    assert_equal_step(Runner(pipe, schedule, loss=squared), local, numbers(8, WIDTH), numbers(8, WIDTH, seed=5))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 compiles no checkpoint in fullgraph here")
def test_compiled_stages_take_other_shapes_and_modes(pipe_and_local: tuple[Pipe, Pipe]) -> None:
    pipe, local = pipe_and_local
    runner = Runner(pipe, split_1f1b(pipe.layout(4), 4), loss=squared)
    for rows, train in ((12, True), (8, False), (8, True)):
        pipe.train(train), local.train(train)
        assert_equal_step(runner, local, numbers(rows, WIDTH), numbers(rows, WIDTH, seed=5))
    pipe.eval(), local.eval()
    x = numbers(8, WIDTH)
    with torch.no_grad():
        wanted = torch.cat([local(part)[0] for part in x.chunk(4)])
    assert torch.equal(runner.evaluate(x, target=x).output, wanted)


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_modes_with_graphs_of_the_compiler_are_refused(options: dict[str, Any]) -> None:
    pipe = pipework.pipeline(nn.Sequential(linear(), linear()), (numbers(2, WIDTH),), stages=2)
    with pytest.raises(InputError, match="would replay CUDA graphs of its own"):
        pipe.compile(**options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_stages_compiled_by_inductor() -> None:
    pipe, local = twins(fullgraph=True)
    schedule = pipework.schedules.zero_bubble_v(pipe.layout(2, Layout.vee), 4)
    assert_equal_step(Runner(pipe, schedule, loss=squared), local, numbers(8, WIDTH), numbers(8, WIDTH, seed=5))


def test_one_stage_is_compiled_alone(backend: Backend) -> None:
    x = numbers(8, WIDTH)
    model = nn.Sequential(*(Block().eval() for _ in range(2)))
    pipe = pipework.pipeline(model, (x[:2],), split_spec=before("1"))
    runner = Runner(pipe, pipework.schedules.one_f_one_b(pipe.layout(2), 4), loss=squared)
    before_it = runner.step(x, target=x)
    pipe.get_stage_module(1).compile(backend=backend)
    assert torch.equal(runner.step(x, target=x), before_it)
    assert backend.runs == 4


# ---------------------------------------------------------------- what is refused, and what is said


def test_a_backward_in_halves_says_what_compiled_code_keeps_from_waiting() -> None:
    model = nn.Sequential(*(Block().eval() for _ in range(4)))
    model[1].norm.compile(backend="eager")  # holds nothing that could wait
    model[3].b.compile(backend="eager")
    pipe = pipework.pipeline(model, (numbers(2, WIDTH),), split_spec=before("2"))
    x = numbers(8, WIDTH)
    with pytest.warns(
        UserWarning, match=rf"{HALVES}: the weight gradients of '3.b.linear' of stage 1 are made"
    ) as told:
        Runner(pipe, split_1f1b(pipe.layout(2), 4), loss=squared).step(x, target=x)
    assert len(told) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_code_in_the_trunk_runs_as_written_unless_the_stages_are_compiled(
    backend: Backend, whole: bool
) -> None:
    function = torch.compile(_function, backend=backend)

    @trunk(a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    def model(self: Any, x: Tensor) -> Tensor:
        x = function(self.a(x))
        pipe_split()
        return self.b(x)

    x = numbers(8, WIDTH)
    pipe = pipework.pipeline(model, (x[:2],))
    if whole:
        pipe.compile(backend=backend)
    runner = Runner(pipe, pipework.schedules.gpipe(pipe.layout(2), 4), loss=squared)
    if whole:
        runner.step(x, target=x)
    else:
        with pytest.warns(UserWarning, match="compiled code in the model itself, .* runs uncompiled"):
            runner.step(x, target=x)
    assert backend.runs == (2 * 4 if whole else 0)


def test_values_read_back_break_the_graph_of_a_stage_and_stay_guarded() -> None:
    @trunk(a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    def model(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x if x.abs().max() < 1e3 else x / 2
        pipe_split()
        return self.b(x)

    x = numbers(8, WIDTH)
    pipe = pipework.pipeline(model, (x[:2],))
    pipe.compile(backend="eager", fullgraph=True)
    with pytest.raises(InputError, match="stage 0 cannot be compiled in one graph") as error:
        pipe(x[:2])
    assert "test_compiled.py" in error.value.where
    pipe.compile(backend="eager")
    with pytest.warns(UserWarning, match="stage 0 is compiled in pieces: at .*test_compiled.py"):
        runner = Runner(pipe, pipework.schedules.gpipe(pipe.layout(2), 4), loss=squared)
    loss = runner.step(x, target=x)
    with pytest.raises(pipework.MismatchError, match="the model took another path"):
        runner.step(x * 1e4, target=x)
    assert torch.equal(runner.step(x, target=x), loss)


def test_options_that_torch_does_not_know_are_refused_at_once() -> None:
    pipe = pipework.pipeline(nn.Sequential(Block(), Block()), (numbers(2, WIDTH),), split_spec=before("1"))
    with pytest.raises(TypeError, match="bakend"):
        pipe.compile(bakend="eager")
    assert torch.is_tensor(pipe(numbers(2, WIDTH))[0])


# ---------------------------------------------------------------- processes


def over_gloo(group: dist.ProcessGroup, rank: int, family: str) -> bool:
    x = numbers(8, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = pipework.verify(
            blocks("aot_eager"),
            (x,),
            target=x,
            loss=squared,
            split_spec=before("1", "2", "3"),
            schedule=family,
            group=group,
        )
        pipe, local = twins(backend="aot_eager", fullgraph=True)
        chosen = pipework.plan.FAMILIES[family]
        runner = Runner(pipe, chosen.build(pipe.layout(2, chosen.place), 4), loss=squared, group=group)
        assert_equal_step(runner, local, x, x)
    return report.equal


def test_compiled_blocks_and_stages_on_processes(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(over_gloo, "zero_bubble_v") == [True, True]
