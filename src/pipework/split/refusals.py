"""What a trunk may not do, because no stages could do the same; each is refused where it is done, before it is done.

The blocks may: whatever a module that stays whole does is its own. So the remedy is most often to put the code in one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from pipework.errors import CaptureError, CutError
from pipework.split.trees import leaves

IN_A_BLOCK = "put this code in a module that stays whole"


def module_called(name: str) -> str:
    """A module by its FQN, for people."""
    return f"module {name!r}" if name else "the model itself"


def refuse_modules(model: nn.Module, opened: Collection[str]) -> None:
    """Raise `CutError` for modules that count on one backward after each forward, and for a cut inside a script."""
    for name, module in model.named_modules():
        if name in opened and isinstance(module, torch.jit.ScriptModule):
            raise CutError(
                f"a cut lies inside {module_called(name)}, which is a ScriptModule",
                why="its forward runs without Python, so that nobody sees what it calls",
                remedy="cut before or after it, or use the module that it was made of",
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise CutError(
                f"{module_called(name)} is a DistributedDataParallel",
                why="it averages gradients once for each forward, and in a pipeline several microbatches are under way",
                remedy="cut the module inside of it (.module); after the steps average over the replicas the gradients "
                "of runner.parameters()",
            )


def refuse_call(name: str, args: Any, kwargs: Mapping[str, Any], where: str) -> None:
    """Raise `CaptureError` for a call of the trunk that goes backward, or draws from a generator of the user's own."""
    if name == "backward":
        raise CaptureError(
            "the trunk calls backward()",
            where=where,
            why="it would go back from every microbatch a second time, and through stages that are elsewhere",
            remedy=f"return the tensor and add it to the loss, or {IN_A_BLOCK}",
        )
    if any(isinstance(leaf, torch.Generator) for leaf in leaves((args, dict(kwargs)))):
        raise CaptureError(
            "the trunk draws from a generator of its own",
            where=where,
            why="its state belongs to no stage: other ranks have a copy, which would draw other numbers",
            remedy=f"draw from torch's default generator, which the runner seeds for each microbatch, or {IN_A_BLOCK}",
        )


def refuse_parameter_write(parameter: str, where: str) -> None:
    """Raise `CaptureError` for a write into a parameter by the trunk."""
    raise CaptureError(
        f"the trunk writes into the parameter {parameter!r} in place",
        where=where,
        why="microbatches that are before their backward were computed with the value that it has now",
        remedy="write after the step, or compute with a changed copy (parameter.clamp(...) instead of .clamp_())",
    )


def refuse_nested(tensor: torch.Tensor, where: str) -> None:
    """Raise `CaptureError` for a nested tensor in the trunk."""
    if tensor.is_nested:
        raise CaptureError(
            "the trunk works on a nested tensor",
            where=where,
            why="its sizes are no plain numbers, so that no stage can be written down for them",
            remedy=f"{IN_A_BLOCK} which takes and returns plain tensors (values and offsets, or padded ones)",
        )


def refuse_strangers(name: str, module: nn.Module, own: Mapping[int, Any], where: str) -> None:
    """Raise `CaptureError` for a call of a closed module with other parameters than the model's."""
    for parameter, tensor in module.named_parameters():
        if id(tensor) not in own:
            raise CaptureError(
                f"the trunk calls {module_called(name)} with another {parameter!r} than the module's own",
                where=where,
                why="the stage would call it with its own (torch.func.functional_call exchanges them for a moment)",
                remedy=f"{IN_A_BLOCK}, or write the layer as a function (F.linear(x, weight, bias))",
            )


def refuse_thread(where: str) -> None:
    """Raise `CaptureError` for a thread that the trunk starts."""
    raise CaptureError(
        "the trunk starts a thread",
        where=where,
        why="what another thread computes is not seen, and would be a constant of the stages",
        remedy=f"compute it in the forward's own thread, or {IN_A_BLOCK}",
    )


def refuse_changed_modules(name: str, key: str) -> None:
    """Raise `CaptureError` for a submodule or parameter that the trunk put in another's place."""
    raise CaptureError(
        f"the trunk puts another module or parameter in place of {f'{name}.{key}'.lstrip('.')!r}",
        where=module_called(name),
        why="a stage holds the one that was there, so the next forward would use the wrong one",
        remedy="choose between them by a flag, and call the one that is wanted",
    )


def unknown_maker(tensor: torch.Tensor, where: str) -> CaptureError:
    """The error for a tensor that came to the trunk by a way that cannot be seen."""
    if isinstance(tensor, nn.Parameter):
        return CaptureError(
            f"a parameter of shape {tuple(tensor.shape)} is used that the forward itself made",
            where=where,
            why="it is none of the model's, so that no optimizer knows it and no stage holds it",
            remedy="make modules and parameters in __init__",
        )
    if type(tensor) not in (torch.Tensor, nn.Buffer):
        return CaptureError(
            f"a tensor of type {type(tensor).__name__} is used, and what made it was not seen",
            where=where,
            why="a subclass of Tensor decides itself what a call of torch does (__torch_function__)",
            remedy=f"{IN_A_BLOCK} which takes and returns plain tensors",
        )
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} is used that came out of a module other than by its return",
        where=where,
        why="a hook, an attribute or an object passed in carries it, which the stages cannot see",
        remedy="return it from the module's forward, or cut so that maker and user lie in one whole module",
    )


WRITING = frozenset({"__setitem__", "__set__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow"))})
NOT_WRITING = frozenset({"requires_grad_", "retain_grad", "share_memory_"})


def is_written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The tensor into which a call by this name writes; None if by its name it writes into none."""
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    writes = name in WRITING or (name.endswith("_") and not name.endswith("__") and name not in NOT_WRITING)
    return args[0] if writes and args and isinstance(args[0], torch.Tensor) else None
