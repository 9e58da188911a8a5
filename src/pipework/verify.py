"""Proof that a pipelined step equals the unsplit model, to the last bit.

The reference is the unsplit model, run microbatch by microbatch. A parameter's gradients are added in the order in
which its stage goes backward, since floating-point sums depend on their order; nothing else of the pipeline enters
it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from pipework.errors import InputError, nearest
from pipework.plan import FAMILIES, Family, Kind, Layout, Schedule
from pipework.run import Runner
from pipework.run.losses import own_loss
from pipework.split.arguments import Arguments, bind
from pipework.split.arguments import named as arguments_by_name
from pipework.split.draws import DrawKey, drawing_for, streams
from pipework.split.marks import SplitPoint
from pipework.split.microbatch import UNSAID, chunk, merge
from pipework.split.pipe import Pipe, pipeline
from pipework.split.points import CutPoints
from pipework.split.torch_private import compile_like, is_compiled_in_place
from pipework.split.trees import map_leaves, named_leaves

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor, compared: how far the pipeline's is from the reference's, and why they differ if not in numbers."""

    kind: str  # loss, output, gradient, buffer
    name: str
    equal: bool
    difference: float  # the largest absolute one
    note: str = ""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: every tensor that was compared."""

    title: str
    comparisons: tuple[Comparison, ...]

    @property
    def equal(self) -> bool:
        """Whether all were equal, and there was something to compare."""
        return bool(self.comparisons) and all(c.equal for c in self.comparisons)

    def text(self) -> str:
        """A table by kind, and the worst of what differs."""
        lines = [self.title, f"{'':10}{'compared':>10}{'equal':>10}{'largest difference':>22}"]
        for kind in dict.fromkeys(c.kind for c in self.comparisons):
            group = [c for c in self.comparisons if c.kind == kind]
            equal, worst = sum(c.equal for c in group), max(c.difference for c in group)
            lines.append(f"{kind:10}{len(group):>10}{equal:>10}{worst:>22.3g}")
        different = sorted((c for c in self.comparisons if not c.equal), key=lambda c: -c.difference)
        lines += [f"  {c.kind} {c.name}: {c.note or f'differs by {c.difference:.3g}'}" for c in different[:10]]
        if len(different) > 10:
            lines.append(f"  and {len(different) - 10} more")
        lines.append("bitwise equal to the unsplit model" if self.equal else "NOT equal to the unsplit model")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "title": self.title,
            "equal": self.equal,
            "comparisons": [dataclasses.asdict(c) for c in self.comparisons],
        }


def verify(  # noqa: PLR0913 (one for each thing that a user may vary)
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Any = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    split_spec: Mapping[str, SplitPoint] | CutPoints | None = None,
    stages: int | None = None,
    schedule: str | Schedule | Callable[[Layout, int], Schedule] = "one_f_one_b",
    ranks: int = 2,
    microbatches: int = 4,
    group: dist.ProcessGroup | None = None,
) -> Report:
    """Compare one pipelined training step with the unsplit model: loss, outputs, every gradient, every buffer.

    `args`, `kwargs` and `target` are one whole batch. The step runs on copies of the model, which stays as it is.
    Ranks are threads of this process, or the processes of `group`, each of which makes the same call and gets the
    same report. The model's mode counts: in train mode dropout is compared too. What is compiled in the model is
    compiled in both copies, so that the reference is the compiled model; stages compiled as a whole (`Pipe.compile`)
    are not compared here.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
    >>> batch, target = torch.ones(8, 4), torch.zeros(8, 2)
    >>> report = pipework.verify(model, (batch,), target=target, loss=torch.nn.functional.mse_loss, stages=2)
    >>> print(report.text())
    one_f_one_b: 2 ranks, 2 stages, 4 microbatches, 16 actions
                compared     equal    largest difference
    loss               1         1                     0
    output             1         1                     0
    gradient           4         4                     0
    bitwise equal to the unsplit model
    """
    pipelined, reference = _copied(model), _copied(model)
    for twin in (pipelined, reference):
        twin.zero_grad(set_to_none=True)
    if isinstance(schedule, Schedule):
        ranks, microbatches = schedule.layout.ranks, schedule.microbatches
    named: dict[str, Any]
    args, named = _own((args, dict(kwargs or {})))
    batch = bind(model, *_own((args, named)))
    parts = [batch.with_values(values) for values in chunk(batch.values, microbatches)]
    wanted = _family(schedule) if isinstance(schedule, str) else schedule
    if isinstance(wanted, Family):
        usual = wanted.layout(ranks).stages
    else:
        usual = wanted.layout.stages if isinstance(wanted, Schedule) else ranks
    pipe = _pipe(pipelined, parts[0], split_spec, stages, usual)
    plan = _schedule(wanted, pipe, ranks, microbatches)
    runner = Runner(pipe, plan, loss=loss, group=group)
    runner.keep_outputs = True
    untouched = {name: (parameter, parameter.grad) for name, parameter in model.named_parameters()}
    total = runner.step(*args, target=target, **named)
    _refuse_touched(untouched, runner)
    expected = _reference(reference, parts, target, loss, pipe, plan, runner.seed)
    found = [*_compared("loss", "", total, expected.loss)]
    if runner.outputs is not None:
        found += _compared_trees(runner.outputs, expected.output)
    for name, parameter in runner.named_parameters():
        found += _compared("gradient", name, parameter.grad, expected.gradients[name])
    if group is None:  # of processes each has a share of an input's gradient
        for (name, one), (_, other) in zip(_inputs(bind(model, args, named)), _inputs(batch), strict=True):
            found += _compared("gradient", name, one.grad, other.grad)
    buffers = dict(reference.named_buffers())
    for name, buffer in runner.named_buffers():
        found += _compared("buffer", name, buffer, buffers[name])
    comparisons = dict.fromkeys(c for told in runner.exchange(found) for c in told)
    order = {"loss": 0, "output": 1, "gradient": 2, "buffer": 3}
    return Report(plan.describe(), tuple(sorted(comparisons, key=lambda c: order[c.kind])))


def _copied(model: nn.Module) -> nn.Module:
    """A copy whose modules are compiled where the model's are, which a plain copy would forget."""
    found = copy.deepcopy(model)
    for module, twin in zip(model.modules(), found.modules(), strict=True):
        if is_compiled_in_place(module):
            compile_like(module, twin)
    return found


def _refuse_touched(before: Mapping[str, tuple[torch.nn.Parameter, torch.Tensor | None]], runner: Runner) -> None:
    """Raise on every rank where a step on a copy gave gradients to the model itself; they are put back."""
    touched = [name for name, (parameter, gradient) in before.items() if parameter.grad is not gradient]
    for parameter, gradient in before.values():
        parameter.grad = gradient
    if names := [name for told in runner.exchange(touched) for name in told]:
        raise InputError(
            f"the loss, or a block, uses the model's own {names[0]!r}",
            why="the step ran on a copy of the model, so that this gradient would be compared with nothing",
            remedy="use it in the model's own forward, outside of blocks: a penalty can be one of its outputs",
        )


def _inputs(arguments: Arguments) -> list[tuple[str, torch.Tensor]]:
    """The input tensors that want a gradient."""
    found = [pair for pair in arguments_by_name(arguments.values) if isinstance(pair[1], torch.Tensor)]
    return [(name, leaf) for name, leaf in found if leaf.requires_grad]


def _own(given: Any) -> Any:
    """The same arguments with tensors of their own, since a model may write into them, and gradients go to them."""
    twins: dict[int, torch.Tensor] = {}  # one that is passed twice stays one

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = copy.deepcopy(leaf.detach()).requires_grad_(leaf.requires_grad)
        return twins.setdefault(id(leaf), made)

    return map_leaves(twin, given)


def _pipe(
    model: nn.Module,
    example: Arguments,
    split_spec: Mapping[str, SplitPoint] | CutPoints | None,
    stages: int | None,
    usual: int,
) -> Pipe:
    args, kwargs = example.split()
    if split_spec is None and stages is None:
        pipe = pipeline(model, args, kwargs)
        return pipe if pipe.num_stages > 1 else pipeline(model, args, kwargs, stages=usual)
    return pipeline(model, args, kwargs, split_spec=split_spec, stages=stages)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise InputError(
            f"there is no schedule {name!r}",
            why="the families are" + f" {', '.join(FAMILIES)}{nearest(name, FAMILIES)}",
        )
    if not FAMILIES[name].runs:
        raise InputError(
            f"{name} can be planned but not run",
            why="a pipe has one of each stage, and stages hand nothing from slice to slice of a sequence",
            remedy="verify another family",
        )
    return FAMILIES[name]


def _schedule(
    wanted: Family | Schedule | Callable[[Layout, int], Schedule], pipe: Pipe, ranks: int, microbatches: int
) -> Schedule:
    if isinstance(wanted, Schedule):
        return wanted
    if isinstance(wanted, Family):
        schedule = wanted.build(pipe.layout(ranks, wanted.layout), microbatches)
    else:
        schedule = wanted(pipe.layout(ranks), microbatches)
    if not schedule.trains:
        raise InputError(f"{schedule.name} only goes forward", remedy="verify a schedule that trains")
    return schedule


@dataclasses.dataclass(frozen=True, slots=True)
class _Expected:
    loss: torch.Tensor
    output: Any
    gradients: Mapping[str, torch.Tensor | None]


def _reference(
    model: nn.Module, parts: Sequence[Arguments], target: Any, loss: Any, pipe: Pipe, plan: Schedule, seed: int
) -> _Expected:
    """One step of the unsplit model, microbatch by microbatch.

    Where all stages take them in turn, gradients add up in `.grad` as in the step: a reentrant checkpoint adds its own
    as soon as it has it. Where not, each microbatch's are made by themselves and added up in each stage's order.
    """
    count, orders = len(parts), dict(_orders(pipe, plan))
    is_in_turn = all(order == list(range(count)) for order in orders.values())
    targets = [values["target"] for values in chunk({"target": target}, count)]
    drawing = pipe.variant(parts[0]).drawing
    losses: list[torch.Tensor] = []
    outputs: list[Any] = []
    gradients: list[dict[str, torch.Tensor | None]] = []
    with streams(dict(model.named_modules()), drawing):
        for microbatch, part in enumerate(parts):
            with drawing_for(DrawKey(seed, 0, microbatch)):
                output = part.call(model)
                own = own_loss(output) if loss is None else loss(output, targets[microbatch])
                (own / count).backward()
            losses.append(own.detach())
            outputs.append(output)
            gradients.append({name: p.grad for name, p in model.named_parameters()})
            if not is_in_turn:
                model.zero_grad(set_to_none=True)
    summed = {
        name: gradients[-1][name] if is_in_turn else _summed([gradients[m][name] for m in order])
        for name, order in orders.items()
    }
    return _Expected(torch.stack(losses).sum() / count, merge(outputs, UNSAID), summed)


def _orders(pipe: Pipe, plan: Schedule) -> Iterator[tuple[str, list[int]]]:
    """For each parameter the order in which its stage makes its gradients; for a tied one, its first stage is last."""
    last = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
    for stage in reversed(range(plan.layout.stages)):
        order = plan.orders[plan.layout.rank_of[stage]]
        made = [action.microbatch for action in order if action.stage == stage and action.kind in last]
        for name, _ in pipe.get_stage_module(stage).named_parameters():
            yield pipe.names[name], made


def _summed(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    total: torch.Tensor | None = None
    for gradient in gradients:
        if gradient is not None:
            total = gradient.clone() if total is None else total + gradient
    return total


def _compared_trees(found: Any, expected: Any) -> Iterator[Comparison]:
    ours, theirs = list(named_leaves(found)), list(named_leaves(expected))
    if type(found) is not type(expected) or [name for name, _ in ours] != [name for name, _ in theirs]:
        yield Comparison(
            "output", "", False, 0.0, f"is a {type(found).__name__}, not the same {type(expected).__name__}"
        )
        return
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            yield from _compared("output", name, one, other)


def _compared(kind: str, name: str, found: Any, expected: Any) -> Iterator[Comparison]:
    if found is None or expected is None:
        note = "" if found is expected else f"is {'there' if expected is None else 'missing'}, against the reference"
        yield Comparison(kind, name, found is expected, 0.0, note)
        return
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        note = f"{tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        yield Comparison(kind, name, False, 0.0, note)
        return
    same = bool(((found == expected) & _signs(found, expected) | (found.isnan() & expected.isnan())).all())
    wide = torch.complex128 if found.is_complex() else torch.float64
    gap = 0.0 if same else float((found.to(wide) - expected.to(wide)).abs().nan_to_num(torch.inf).max())
    yield Comparison(kind, name, same, gap)


def _signs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where the signs are the same: 0.0 equals -0.0, but not to the last bit."""
    if one.is_complex():
        return (torch.view_as_real(one).signbit() == torch.view_as_real(other).signbit()).all(-1)
    return one.signbit() == other.signbit()
