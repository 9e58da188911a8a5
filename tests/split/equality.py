"""One question, asked of every model here: does its pipe do exactly what the model does, and leave the model alone?

It is asked of the pipe called in this process, and of a training step on ranks as threads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import pipework
from pipework import CutPoints, SplitPoint
from pipework.split.draws import DrawKey, drawing_for, streams
from pipework.split.trees import children
from tests.schedules import split_1f1b

SEED = 1234
MICROBATCHES = 2
Spec = Mapping[str, SplitPoint] | CutPoints


def before(*names: str) -> dict[str, SplitPoint]:
    return dict.fromkeys(names, SplitPoint.BEGINNING)


def after(*names: str) -> dict[str, SplitPoint]:
    return dict.fromkeys(names, SplitPoint.END)


def same(found: Any, wanted: Any, where: str = "output", strides: bool = True) -> None:
    """Equal in type and structure, in layout, and in every bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{where}: {type(found)}"
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), where
        assert not strides or found.stride() == wanted.stride(), f"{where}: {found.stride()}, not {wanted.stride()}"
        assert torch.equal(_bits(found), _bits(wanted)), f"{where}: {(found - wanted).abs().max()}"
        return
    assert type(found) is type(wanted), f"{where}: {type(found)}, not {type(wanted)}"
    parts = children(wanted)
    if parts is None:
        assert found == wanted, where
        return
    mine = children(found)
    assert mine is not None
    assert mine[0] == parts[0], where
    for accessor, one, other in zip(parts[0], mine[1], parts[1], strict=True):
        same(one, other, where + accessor, strides)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().contiguous()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor).contiguous()
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor.view(width) if tensor.is_floating_point() and width else tensor  # NaN equals NaN, and 0.0 is not -0.0


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = children(tree)
    return [] if parts is None else [t for child in parts[1] for t in tensors(child)]


def backward(output: Any) -> None:
    """The backward of a loss that reads every differentiable tensor of the output, each element with its own weight."""
    found = [t for t in dict.fromkeys(tensors(output)) if t.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in found]
    if found:
        torch.autograd.backward(found, weights)


@dataclasses.dataclass(frozen=True)
class State:
    """All of a model that a capture could change."""

    tensors: Mapping[str, torch.Tensor]
    objects: Mapping[str, Mapping[str, Any]]
    generator: torch.Tensor
    python: object

    @classmethod
    def of(cls, model: nn.Module) -> State:
        owned = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_meta}
        return cls(
            {name: tensor.detach().clone() for name, tensor in owned.items()},
            {name: cls._attributes(m) for name, m in model.named_modules()},
            torch.get_rng_state(),
            random.getstate(),
        )

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, Any]:
        """Every attribute by identity; hooks, parameters, buffers and submodules by order and identity."""
        found = {key: id(value) for key, value in module.__dict__.items()}
        tables = {key: [(k, id(v)) for k, v in v.items()] for key, v in module.__dict__.items() if isinstance(v, dict)}
        parameters = [(k, p) for k, p in module.__dict__["_parameters"].items() if p is not None]
        flags = {name: (p.requires_grad, id(p.grad)) for name, p in parameters}
        kind = type(module)
        methods = {
            "call": id(kind.__call__),
            "forward": id(getattr(kind, "forward", None)),
            "training": module.training,
        }
        return {**found, **tables, **flags, **methods}

    def assert_still(self, model: nn.Module) -> None:
        now = State.of(model)
        for name, attributes in self.objects.items():
            changed = [
                key for key in {**attributes, **now.objects[name]} if attributes.get(key) != now.objects[name].get(key)
            ]
            assert not changed, f"the capture changed {changed} of {name!r}"
        assert now.tensors.keys() == self.tensors.keys()
        for name, tensor in now.tensors.items():
            same(tensor, self.tensors[name], f"{name} after the capture")
        assert torch.equal(now.generator, self.generator), "the capture drew from the generator"
        assert now.python == self.python, "the capture drew from Python's generator"


def copied(tree: Any) -> Any:
    """The tree with tensors of its own, which require gradients and are laid out as before."""
    return copy.deepcopy(tree)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one call of a model or a pipe gave: all of it is compared."""

    output: Any
    gradients: Mapping[str, torch.Tensor | None]
    input_gradients: list[torch.Tensor | None]
    inputs: list[torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    generator: torch.Tensor


def outcome(call: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any, unwrap: bool = False) -> Outcome:
    """Call, go back, and gather; `model` is where the parameters are, `unwrap` takes a pipe's bare tensor out."""
    model.zero_grad()
    args, kwargs = copied((args, kwargs))
    torch.manual_seed(SEED)
    output = call(*args, **kwargs)
    generator = torch.get_rng_state()
    if torch.is_grad_enabled():
        backward(output)
    given = tensors((args, kwargs))
    return Outcome(
        output[0] if unwrap else output,
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        [t.grad if t.is_leaf else None for t in given],
        given,
        {n: b.clone() for n, b in model.named_buffers()},
        generator,
    )


def assert_same(found: Outcome, wanted: Outcome, strides: bool = True) -> None:
    same(found.output, wanted.output, strides=strides)
    for one, other in zip(tensors(found.output), tensors(wanted.output), strict=True):
        assert one.requires_grad == other.requires_grad
    same(dict(found.gradients), dict(wanted.gradients), "gradients", strides=False)
    same(found.input_gradients, wanted.input_gradients, "input gradients", strides=False)
    same(dict(found.buffers), dict(wanted.buffers), "buffers")
    assert torch.equal(found.generator, wanted.generator), "another number of draws"


def weighed(output: Any) -> torch.Tensor | None:
    """As `backward`, as one number."""
    found = [t for t in dict.fromkeys(tensors(output)) if t.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in found]
    parts = [(t * weight).sum().real for t, weight in zip(found, weights, strict=True)]
    return torch.stack(parts).sum() if parts else None


def assert_trains(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    spec: Spec | None = None,
    stages: int | None = None,
    halves: bool = True,
) -> None:
    """A step with the backward in one piece, and in `halves`, each microbatch the whole example, against the model."""
    model = copy.deepcopy(model)
    model.zero_grad()
    reference = copy.deepcopy(model)
    seed, losses, rows = torch.initial_seed(), [], []
    drawing = pipework.pipeline(model, args, kwargs, split_spec=spec, stages=stages)
    with streams(dict(reference.named_modules()), drawing.variant(drawing.example).drawing):
        for microbatch in range(MICROBATCHES):
            own_args, own_kwargs = copied((args, kwargs))
            with drawing_for(DrawKey(seed, 0, microbatch)):
                loss = weighed(reference(*own_args, **own_kwargs))
                if loss is None:
                    return  # nothing to train
                (loss / MICROBATCHES).backward()
            losses.append(loss.detach())
            rows.append(tensors((own_args, own_kwargs)))
    for schedule in (pipework.schedules.one_f_one_b, split_1f1b)[: 1 + halves]:
        twin, (own_args, own_kwargs) = copy.deepcopy(model), copied((args, kwargs))
        pipe = pipework.pipeline(twin, args, kwargs, split_spec=spec, stages=stages)
        plan = schedule(pipe.layout(pipe.num_stages), MICROBATCHES)
        whole = dict.fromkeys(pipe.example.values)
        runner = pipework.Runner(pipe, plan, loss=lambda output, _: weighed(output), chunk_spec=whole)
        same(runner.step(*own_args, **own_kwargs), torch.stack(losses).sum() / MICROBATCHES, "loss of the step")
        gradients, wanted = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, reference))
        same(gradients, wanted, f"gradients of the step, {plan.name}", strides=False)
        for position, given in enumerate(tensors((own_args, own_kwargs))):
            reached = [row[position].grad for row in rows if row[position].is_leaf and row[position].grad is not None]
            wanted = functools.reduce(torch.add, reached) if reached else None
            same(given.grad, wanted, f"gradient of input {position}", strides=False)
        same(dict(twin.named_buffers()), dict(reference.named_buffers()), "buffers after the step")


def check(  # noqa: PLR0913 (one for each thing that a test may vary)
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: Spec | None = None,
    stages: int | None = None,
    want: int | None = None,
    modes: tuple[bool, ...] = (True, False),
    calls: int = 2,
    strides: bool = True,
    halves: bool = True,
) -> pipework.Pipe:
    """Cut the model and compare the pipe with a copy of the model, in train and in eval mode, `calls` times each.

    Then train it for a step on ranks as threads. Also: the capture changes nothing, and the stages hold the model's own
    parameters under the model's own names.
    """
    kwargs = dict(kwargs or {})
    reference, fresh = copy.deepcopy(model), copy.deepcopy(model)
    state = State.of(model)
    pipe = pipework.pipeline(model, args, kwargs, split_spec=spec, stages=stages)
    state.assert_still(model)
    if want is not None:
        assert pipe.num_stages == want
    for mode in modes:
        reference.train(mode)
        pipe.train(mode)
        for _ in range(calls):
            wanted = outcome(reference, reference, args, kwargs)
            found = outcome(pipe, model, args, kwargs, unwrap=isinstance(wanted.output, torch.Tensor))
            assert_same(found, wanted, strides)
    assert_names(pipe, model)
    assert_trains(fresh.train(modes[0]), args, kwargs, spec, stages, halves)
    return pipe


def assert_names(pipe: pipework.Pipe, model: nn.Module) -> None:
    """Stages hold the model's own parameters and buffers under its own names, and all those that got a gradient."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    held: set[int] = set()
    for index in range(pipe.num_stages):
        stage = pipe.get_stage_module(index)
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            assert parameters[name] is parameter, f"stage {index}: {name}"
            held.add(id(parameter))
        for name, buffer in stage.named_buffers(remove_duplicate=False):
            assert name.startswith("constant_") or buffers[name] is buffer, f"stage {index}: {name}"
        assert stage.state_dict().keys() <= model.state_dict().keys()
    for name, parameter in parameters.items():
        assert id(parameter) in held or parameter.grad is None, f"no stage holds {name}"
