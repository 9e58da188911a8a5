"""What a model itself says about where it may be cut, as those of the transformers library do."""

from __future__ import annotations

import dataclasses

from torch import nn

NO_SPLIT = "_no_split_modules"
"""The attribute in which a model names the classes whose instances stay whole."""

PLAN = "pp_plan"
"""The attribute in which a model names its parts for a pipeline: FQNs as keys; what a container holds, one by one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hints:
    """Which modules stay whole, and which a stage may begin with."""

    whole: frozenset[str]  # FQNs, by class or by plan
    planned: frozenset[str]  # FQNs of the plan's parts

    @classmethod
    def of(cls, model: nn.Module) -> Hints:
        """What the model and its submodules say.

        >>> model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Linear(2, 2))
        >>> model._no_split_modules = ["Linear"]
        >>> sorted(Hints.of(model).whole)
        ['1']
        """
        classes: set[str] = set()
        planned: set[str] = set()
        for name, module in model.named_modules():
            classes |= set(getattr(module, NO_SPLIT, None) or ())
            for key in getattr(module, PLAN, None) or {}:
                planned |= _parts(model, f"{name}.{key}".lstrip("."))
        whole = {name for name, module in model.named_modules() if type(module).__name__ in classes}
        return cls(frozenset(whole | planned), frozenset(planned))

    def may_begin(self, name: str) -> bool:
        """Whether a stage may begin with this module: beside the parts of a plan, only another of its parts."""
        parent = name.rpartition(".")[0]
        beside = {part.rpartition(".")[0] for part in self.planned}
        return name in self.planned or parent not in beside


def _parts(model: nn.Module, name: str) -> set[str]:
    try:
        part = model.get_submodule(name)
    except AttributeError:
        return set()  # a plan made for a class names what this one may not have
    if isinstance(part, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return {f"{name}.{child}" for child, _ in part.named_children()}
    return {name}
