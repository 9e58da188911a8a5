"""What a run of a model leaves behind in it: put back, and told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipework.errors import CaptureError
from pipework.split.generators import unmoved
from pipework.split.refusals import refuse_changed_modules
from pipework.split.torch_private import children_of, parameters_of
from pipework.split.trees import held, is_empty_object, leaves, remade

_SIMPLE = (type(None), bool, int, float, str)


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back whatever a run of the model changes: attributes, buffers, random states."""
    saved = [(m, dict(m.__dict__), _containers(m)) for m in module.modules()]
    plain = [v for m in module.modules() for v in m.__dict__.values() if isinstance(v, torch.Tensor)]
    gradients = [(p, p.grad) for p in module.parameters()]
    contents = [(t, t.detach().clone()) for t in (*module.buffers(), *plain) if not t.is_meta]
    gpus = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(gpus)), unmoved():
            yield
    finally:
        for m, attributes, containers in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for tensor, content in contents:
                if not torch.equal(tensor, content):  # batch_norm writes its statistics without a change of version
                    tensor.copy_(content)


@contextlib.contextmanager
def unfilled(arguments: Any) -> Iterator[None]:
    """Put back objects among the arguments into which a run of the model puts tensors (an empty cache)."""
    saved = [(leaf, remade(leaf, lambda inner: inner)) for leaf in leaves(arguments) if is_empty_object(leaf)]
    try:
        yield
    finally:
        for leaf, twin in saved:
            if next(held(leaf), None) is not None:
                vars(leaf).clear()
                vars(leaf).update(vars(twin))


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's dicts, lists and sets (parameters, hooks, counters of its own), each with a copy."""
    return [(v, v.copy()) for v in module.__dict__.values() if isinstance(v, (dict, list, set))]


def simple_attributes(module: nn.Module) -> dict[str, Any]:
    """The module's plain Python values (flags, counters, rates), on which its forward may branch."""
    return {name: value for name, value in module.__dict__.items() if type(value) in _SIMPLE}


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The module's attributes as they are now, with copies of its tables."""
    return {key: v.copy() if isinstance(v, dict) else v for key, v in module.__dict__.items()}


def changes(module: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, str, Any], ...]:
    """The plain attributes that the trunk changed, as (module, name, value); tensors and modules are refused."""
    found: list[tuple[str, str, Any]] = []
    for name, attributes in before.items():
        inner = module.get_submodule(name)
        now = inner.__dict__
        for table, old in ((children_of(inner), "_modules"), (parameters_of(inner), "_parameters")):
            for key, member in attributes[old].items():
                if table.get(key) is not member:
                    refuse_changed_modules(name, key)
        for key, old in attributes.items():
            new = now.get(key, old)
            if isinstance(old, torch.Tensor) and new is not old:
                raise CaptureError(
                    f"the trunk assigns a new tensor to the attribute {f'{name}.{key}'.lstrip('.')!r}",
                    why="an attribute that is no buffer is a constant: the next forward would read the old one",
                    remedy="register it as a buffer (register_buffer, persistent=False if it need not be saved)",
                )
            if type(old) in _SIMPLE and type(new) in _SIMPLE and new != old:
                found.append((name, key, new))
    return tuple(found)
