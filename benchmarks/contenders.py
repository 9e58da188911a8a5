"""Ways to make the same training step: pipework's, those of torch.distributed.pipelining, and those without a pipeline.

Each is made from a `Case` on every rank alike. All compute on the same weights, but for those that shard or wrap them.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as peer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import pipework
from benchmarks import handwritten
from benchmarks.sizes import Size, loss
from examples.gpt import GPT
from pipework.plan import FAMILIES, Kind

TRAINING = [name for name, family in FAMILIES.items() if family.runs and family.trains]
PEERS = {
    "gpipe": "GPipe",
    "one_f_one_b": "1F1B",
    "interleaved_one_f_one_b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zero_bubble_v": "ZBVZeroBubble",
    "dual_pipe_v": "DualPipeV",
}
"""The family that each schedule of the peer belongs to; they hold the same stages on the same ranks."""

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


class NotThereError(Exception):
    """This version, machine or combination has no such contender; the message says why."""


@dataclass(frozen=True)
class Case:
    """What all contenders have in common. Without a group ranks are threads of this process."""

    size: Size
    group: dist.ProcessGroup | None = None
    device: torch.device = CPU
    ranks: int = 2
    compiler: str = "inductor"
    weights: GPT = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.size.model(self.device))

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def model(self, compiled: bool = False) -> GPT:
        """Modules of the contender's own around the weights that all share, each block compiled or as it is."""
        model = copy.deepcopy(self.weights, {id(p): p for p in self.weights.parameters()})
        for block in model.blocks if compiled else ():
            block.compile(backend=self.compiler)
        return model

    def on_gpu(self) -> None:
        if self.device.type != "cuda":
            raise NotThereError("needs a GPU")

    def processes(self) -> dist.ProcessGroup:
        if self.group is None:
            raise NotThereError("needs a process for each rank")
        return self.group


@dataclass(frozen=True)
class Contender:
    """One way to make the same step, on this rank."""

    parameters: Mapping[str, nn.Parameter]  # of this rank, by the model's own names
    step: Callable[[], object]
    actions: int  # on all ranks: a microbatch's forward, backward or half a backward on one stage
    wrapped: bool = False  # the weights are not those that all share
    summed: dist.ProcessGroup | None = None  # its ranks' gradients only add up to those of the step
    unfit: Callable[[], str] = str  # after some steps, why it is not what it is called; empty if it is
    order: tuple[int, ...] | None = None  # of the microbatches, as their gradients are added up, if another than theirs

    def once(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self.step()

    def gradients(self) -> Gradients:
        """Those that the last step left on this rank; all ranks call it."""
        found: Gradients = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"no gradient of {name}")
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            if self.summed is not None:
                dist.all_reduce(gradient, group=self.summed)
            found[name] = gradient
        return found


# ---------------------------------------------------------------------- pipework


def ours(
    case: Case, family: str, balanced: bool, compiled: bool = False, whole: bool = False, graphs: bool = False
) -> Contender:
    """A runner, its stages balanced by counted costs, or of as many blocks each as those written by hand."""
    if graphs:
        case.on_gpu()
    size, planned = case.size, FAMILIES[family]
    model, (x, target) = case.model(compiled), size.batch(case.device)
    stages, example = case.ranks * planned.per_rank, (x[: size.sequences],)
    if balanced:
        costs = pipework.module_costs(model, example, stages=stages)
        pipe = pipework.pipeline(model, example, split_spec=costs.cut_points(stages))
        schedule = planned.plan(pipe.layout(case.ranks, planned.place), size.microbatches, costs.per_stage(stages))
    else:
        pipe = pipework.pipeline(model, example, split_spec=cuts(size, stages, pipework.SplitPoint.BEGINNING))
        schedule = planned.build(pipe.layout(case.ranks, planned.place), size.microbatches)
    if whole:
        pipe.compile(backend=case.compiler)
    warnings.filterwarnings("ignore", message="compiled code has one backward for all")
    runner = pipework.Runner(pipe, schedule, loss=loss, group=case.group, graphs=graphs)
    step = lambda: runner.step(x, target=target)  # noqa: E731
    actions = sum(map(len, schedule.orders))
    unfit = lambda: "" if runner.captured or not graphs else "not there: these steps were not captured"  # noqa: E731
    return Contender(dict(runner.named_parameters()), step, actions, unfit=unfit, order=_order(schedule))


def _order(schedule: pipework.Schedule) -> tuple[int, ...]:
    """The order of microbatches in which every stage makes its weights' gradients."""
    made = [
        action for order in schedule.orders for action in order if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
    ]
    (order,) = {tuple(a.microbatch for a in made if a.stage == stage) for stage in range(schedule.layout.stages)}
    return order


def cuts(size: Size, stages: int, point: Any) -> dict[str, Any]:
    """A split spec of as many blocks for each stage as those written by hand have."""
    return {f"blocks.{block}": point for block in handwritten.begins(size.blocks, stages)[1:-1]}


def splits_backwards(schedule: pipework.Schedule) -> bool:
    """Whether any backward is in two halves."""
    stages = range(schedule.layout.stages)
    return any(schedule.splits(stage, microbatch) for stage in stages for microbatch in schedule.taken_by(stage))


# ---------------------------------------------------------------------- torch.distributed.pipelining


def hand_written(case: Case, family: str, compiled: bool = False) -> Contender:
    """The peer with stages written by hand, as they are or each compiled as a whole."""
    planned = FAMILIES[family]
    if compiled and splits_backwards(planned.build(planned.layout(case.ranks), case.size.microbatches)):
        raise NotThereError("fails: the peer splits no backward of a compiled stage (pytorch issue 161904)")
    group, stages = case.processes(), case.ranks * planned.per_rank
    modules = {index: handwritten.stage(case.model(), index, stages) for index in _held(case, family)}
    for module in modules.values() if compiled else ():
        module.compile(backend=case.compiler)
    made = [peer.PipelineStage(module, index, stages, case.device, group=group) for index, module in modules.items()]
    return _peer(case, family, list(modules.values()), made)


def traced(case: Case, family: str) -> Contender:
    """The peer with stages that it traced itself."""
    group, layout = case.processes(), FAMILIES[family].layout(case.ranks)
    if any(layout.rank_of[u] == layout.rank_of[v] for u, v in layout.edges):
        raise NotThereError("fails: before its first step the peer sends from a rank to itself between traced stages")
    example = (case.size.batch(case.device)[0][: case.size.sequences],)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by the peer's own use of torch
        pipe = peer.pipeline(
            case.model(), example, split_spec=cuts(case.size, layout.stages, peer.SplitPoint.BEGINNING)
        )
    held = _held(case, family)
    modules = [pipe.get_stage_module(index) for index in held]
    return _peer(case, family, modules, [pipe.build_stage(index, case.device, group) for index in held])


def _held(case: Case, family: str) -> tuple[int, ...]:
    return FAMILIES[family].layout(case.ranks).held_by(case.rank)


def _peer(case: Case, family: str, modules: list[nn.Module], stages: list[Any]) -> Contender:
    if family not in PEERS:
        raise NotThereError("the peer has no such schedule")
    try:
        kind: Any = peer.schedules.get_schedule_class(PEERS[family])
    except ValueError as error:
        raise NotThereError(f"not there: {error}") from None
    single = issubclass(kind, peer.schedules.PipelineScheduleSingle)
    schedule = kind(stages[0] if single else stages, case.size.microbatches, loss_fn=loss)
    x, target = case.size.batch(case.device)
    args = (x,) if any(stage.is_first for stage in stages) else ()
    kwargs = {"target": target} if any(stage.is_last for stage in stages) else {}
    parameters = {name: p for module in modules for name, p in module.named_parameters()}
    # Without outputs, which pipework does not keep either unless asked to.
    step = lambda: schedule.step(*args, **kwargs, return_outputs=False)  # noqa: E731
    order = schedule.pipeline_order or {}
    actions = sum(_computes(action) for actions in order.values() for action in actions if action is not None)
    return Contender(parameters, step, actions)


def _computes(action: Any) -> int:
    """How many actions of ours one of the peer's is: none, if nothing is computed, and two where two overlap."""
    return len(action.sub_actions) if action.sub_actions else int(action.is_compute_op)


# ---------------------------------------------------------------------- without a pipeline


def one_device(case: Case, compiled: bool = False) -> Contender:
    """The unsplit model on rank 0, microbatch by microbatch; the other ranks have nothing to do."""
    model, size = case.model(compiled), case.size
    if case.rank > 0:
        return Contender({}, lambda: None, 2 * size.microbatches)
    parts = size.parts(case.device)
    return Contender(dict(model.named_parameters()), lambda: _train(model, parts, size), 2 * size.microbatches)


def captured(case: Case) -> Contender:
    """The same as one CUDA graph."""
    case.on_gpu()
    eager = one_device(case)
    if case.rank > 0:
        return eager
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            eager.once()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    for parameter in eager.parameters.values():
        parameter.grad = None
    with torch.cuda.graph(graph, stream=side):  # what libraries keep for a stream is no other graph's then
        eager.step()
    gradients = [(parameter, parameter.grad) for parameter in eager.parameters.values()]

    def replay(step: Callable[[], object] = eager.step) -> None:  # held, since the graph reads what it reads
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    return Contender(eager.parameters, replay, eager.actions)


def apart(case: Case) -> Contender:
    """Each rank takes its share of the microbatches through the unsplit model, and nobody hears of anybody else."""
    group, model, size = case.processes(), case.model(), case.size
    own = size.parts(case.device)[case.rank :: case.ranks]
    step = lambda: _train(model, own, size)  # noqa: E731
    return Contender(dict(model.named_parameters()), step, 2 * size.microbatches, summed=group)


def reference(case: Case, compiled: bool = False, order: tuple[int, ...] | None = None) -> Gradients:
    """The unsplit model's gradients, on every rank; microbatches go in this order, or in their own."""
    model, parts = case.model(compiled), case.size.parts(case.device)
    model.zero_grad()
    _train(model, [parts[microbatch] for microbatch in order or range(len(parts))], case.size)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def difference_of(found: Gradients, expected: Gradients) -> float:
    """The largest, relative to the largest number of each gradient; 0 only if all are equal to the bit."""
    return max((float((g - expected[n]).abs().max() / expected[n].abs().max()) for n, g in found.items()), default=0.0)


def _train(model: nn.Module, parts: list[tuple[Tensor, Tensor]], size: Size) -> None:
    for x, target in parts:
        (loss(model(x), target) / size.microbatches).backward()


def replicated(case: Case, sharded: bool = False) -> Contender:
    """DDP, or FSDP2 over blocks: each rank takes its share of the microbatches; gradients are reduced with the last."""
    group, size = case.processes(), case.size
    model = size.model(case.device)
    parts = size.parts(case.device)[case.rank :: case.ranks]
    if size.microbatches % case.ranks:
        raise NotThereError(f"{size.microbatches} microbatches are not the same number for each of {case.ranks} ranks")
    wrapped, until_last = _sharded(model, group, case.device) if sharded else _with_ddp(model, group, case.device)

    def step() -> None:
        for number, (x, target) in enumerate(parts, start=1):
            with until_last(number == len(parts)):
                (loss(wrapped(x), target) / len(parts)).backward()

    return Contender(dict(model.named_parameters()), step, 2 * size.microbatches, wrapped=True)


Wrapped = tuple[nn.Module, Callable[[bool], contextlib.AbstractContextManager[None]]]


def _with_ddp(model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> Wrapped:
    devices = [device] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model, devices, process_group=group)
    return wrapped, lambda last: contextlib.nullcontext() if last else wrapped.no_sync()


def _sharded(model: GPT, group: dist.ProcessGroup, device: torch.device) -> Wrapped:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device.type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
    assert isinstance(wrapped, nn.Module)  # the model itself, of a class made on the fly

    def until_last(last: bool) -> contextlib.AbstractContextManager[None]:
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_is_last_backward(last)
        return contextlib.nullcontext()

    return wrapped, until_last
