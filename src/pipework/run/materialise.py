"""Tensors without values made real: a model is built on the meta device, and each process holds only its stages.

    model on meta ──pipeline──▶ stages on meta ──initialize, load──▶ process 0: stage 0 real, stage 1 on meta
                                                                     process 1: stage 0 on meta, stage 1 real

A function that fills in the tensors of one module is given each module by itself, with random numbers that begin from
(seed, the module's FQN): whatever the cut, and whatever else a process holds, a tensor gets the same values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipework.errors import InputError
from pipework.split.draws import reseed
from pipework.split.fakes import swap
from pipework.split.pipe import Pipe
from pipework.split.torch_private import buffers_of, is_persistent, parameters_of, version_of
from pipework.split.trees import leaves

Initialize = Callable[[nn.Module], object]
"""Fills in the tensors that a module owns itself, not those of its children."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a model, with all the names that it has, the first first, and whether a state dict holds it."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    saved: bool

    @property
    def owner(self) -> str:
        """The FQN of the module that owns it; of a tied tensor, the first that does."""
        return self.names[0].rpartition(".")[0]


def slots(model: nn.Module) -> list[Slot]:
    """The parameters and buffers of a model, each once."""
    found: dict[int, Slot] = {}
    for around, module in model.named_modules(remove_duplicate=False):
        for key, tensor in _own(module).items():
            name = f"{around}.{key}".lstrip(".")
            saved = key in parameters_of(module) or is_persistent(module, key)
            known = found.get(id(tensor), Slot(tensor, (), False))
            found[id(tensor)] = Slot(tensor, (*known.names, name), known.saved or saved)
    return list(found.values())


def tensors_in(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters and buffers of modules."""
    return {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}


def stages_of(pipe: Pipe) -> list[nn.Module]:
    """All stages of a pipe."""
    return [pipe.get_stage_module(index) for index in range(pipe.num_stages)]


def initialize(
    pipe: Pipe, held: Sequence[nn.Module], function: Initialize | None, device: torch.device, seed: int
) -> None:
    """Fill in all parameters and buffers of the stages `held`; see `Runner.initialize`."""
    known, used, own = slots(pipe.model), tensors_in(stages_of(pipe)), tensors_in(held)
    filler = chosen(pipe, [slot for slot in known if id(slot.tensor) in used], function)
    wanted = [slot for slot in known if id(slot.tensor) in own]
    put(pipe, moved(held, device) | filled(pipe.model, wanted, held, filler, device, seed))
    refuse_valueless_attributes(held)


def chosen(pipe: Pipe, wanted: Sequence[Slot], function: Initialize | None) -> Initialize:
    """The function to fill in with: by default each module's own `reset_parameters`.

    `wanted` lies in any stage, so that all processes refuse alike. Raises `InputError` for modules without one.
    """
    if function is not None:
        return function
    owners = {slot.owner: slot.names[0] for slot in reversed(wanted)}
    for stage in stages_of(pipe):
        owners |= {name: f"{name}.{key}".lstrip(".") for name, key in _valueless_attributes(stage)}
    lacking = [name for owner, name in owners.items() if not _resets(pipe.model.get_submodule(owner))]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise InputError(
            f"nothing says what the values of {', '.join(map(repr, lacking[:4]))}{more} are",
            why="they are on the meta device and not read from a file, and their modules have no reset_parameters()",
            remedy="pass initialize=, a function that fills in the tensors of the one module it is given "
            "(for a model of transformers, model._init_weights), or build these tensors on a real device",
        )
    return lambda module: module.reset_parameters()  # type: ignore[operator]


def filled(
    model: nn.Module,
    wanted: Sequence[Slot],
    held: Sequence[nn.Module],
    function: Initialize,
    device: torch.device,
    seed: int,
) -> dict[int, torch.Tensor]:
    """What the function makes of the wanted tensors, by the id of the tensor to be replaced.

    A module gets blanks in place of all its own tensors, also of those that this process does not want, so that the
    numbers drawn for the others do not depend on which it holds. Tensors with values are filled where they are.
    """
    modules: dict[str, set[int]] = {name: set() for stage in held for name, _ in _valueless_attributes(stage)}
    for slot in wanted:
        modules.setdefault(slot.owner, set()).add(id(slot.tensor))
    new: dict[int, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, own in modules.items():
            reseed(f"{seed}/initialize/{name}", device)
            new |= _filled(name, model.get_submodule(name), own, function, device)
    return new


def _filled(
    name: str, module: nn.Module, wanted: set[int], function: Initialize, device: torch.device
) -> dict[int, torch.Tensor]:
    before: dict[str, Any] = _own(module)
    given = {id(old): old if id(old) in wanted and not old.is_meta else blank(old, device) for old in before.values()}
    for old in before.values():
        if old.is_meta and _can_be_nan(old):
            given[id(old)].fill_(math.nan)  # shows afterwards where nothing was written
    versions = {key: version_of(given[id(old)]) for key, old in before.items()}
    swap(module, lambda tensor: given.get(id(tensor), tensor))
    try:
        function(module)
        after = _own(module)
    except Exception as error:
        raise InputError(
            f"initialize failed on the module {name!r} ({type(module).__name__})",
            why=f"{type(error).__name__}: {error}",
            remedy="it is called with each module that owns parameters or buffers, and fills in those alone",
        ) from error
    finally:
        for table in (parameters_of(module), buffers_of(module)):
            table.update({key: before[key] for key in table.keys() & before.keys()})
        originals = {id(given[id(old)]): old for old in before.values()}
        swap(module, lambda tensor: originals.get(id(tensor), tensor))
    for key, old in before.items():
        new = after.get(key)
        if id(old) in wanted and (new is None or _is_unwritten(old, given[id(old)], new, versions[key])):
            raise InputError(
                f"{f'{name}.{key}'.lstrip('.')!r} has no values yet",
                where=f"in the module {name!r} ({type(module).__name__})",
                why="it was built on the meta device, no file gave its values, and initialize did not fill it in",
                remedy="have initialize fill it in (a buffer that is no random number: compute it there again)",
            )
    return {id(old): after[key] for key, old in before.items() if id(old) in wanted}


def _is_unwritten(old: torch.Tensor, given: torch.Tensor, new: torch.Tensor, version: int) -> bool:
    if new.is_meta or not old.is_meta or not new.numel():
        return new.is_meta
    if _can_be_nan(new):
        return math.isnan(new.amax().item())
    return new is given and version_of(new) == version


def _can_be_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def put(pipe: Pipe, new: Mapping[int, torch.Tensor]) -> None:
    """Put new tensors in place of old ones, by their ids, wherever the model and the stages hold them."""
    for module in dict.fromkeys((*pipe.model.modules(), *pipe.modules())):
        swap(module, lambda tensor: new.get(id(tensor), tensor))


def moved(held: Sequence[nn.Module], device: torch.device) -> dict[int, torch.Tensor]:
    """The buffers and constants of stages that have values elsewhere, on the device, by the id of the old one."""
    buffers = [buffer for stage in held for buffer in stage.buffers()]
    return {id(b): b.to(device) for b in buffers if not b.is_meta and b.device != device}


def blank(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor laid out as another one, without values: parameter or buffer, with its attributes."""
    new = torch.empty_like(tensor, device=device, dtype=dtype or tensor.dtype, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    vars(new).update(vars(tensor))  # type: ignore[attr-defined]
    return new


def refuse_valueless_attributes(held: Sequence[nn.Module]) -> None:
    """Raise `InputError` where a tensor is left that is neither parameter nor buffer and has no values."""
    for stage in held:
        for name, key in _valueless_attributes(stage):
            raise InputError(
                f"the attribute {f'{name}.{key}'.lstrip('.')!r} has no values",
                why="it was built on the meta device, and is neither a parameter nor a buffer, so nothing gives it any",
                remedy="register it as a buffer, assign it in initialize(module), or build it with device='cpu'",
            )


def _valueless_attributes(stage: nn.Module) -> Iterator[tuple[str, str]]:
    """Tensors on the meta device in the attributes of modules, as (module, attribute)."""
    own = tensors_in([stage])  # which attributes may list too, as those of an RNN do
    for name, module in stage.named_modules():
        tables = (parameters_of(module), buffers_of(module))
        for key, value in vars(module).items():
            if any(value is table for table in tables):
                continue
            if any(isinstance(x, torch.Tensor) and x.is_meta and id(x) not in own for x in leaves(value)):
                yield name, key


def _resets(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that a module owns itself, by their name in it."""
    tables = (*parameters_of(module).items(), *buffers_of(module).items())
    return {key: tensor for key, tensor in tables if tensor is not None}
