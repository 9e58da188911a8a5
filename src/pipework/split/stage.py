"""One stage as a module: the original submodules at their original paths, and generated code that calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import nn

from pipework.split.compiled import compile_function, refuse_graphs
from pipework.split.cut import StagePart
from pipework.split.tape import Origin
from pipework.split.torch_private import buffers_of, children_of, is_persistent, parameters_of

Code = Callable[..., tuple[Any, ...]]


class Container(nn.Module):
    """Holds submodules and parameters at the path they have in the original model; it has no forward."""


@final
class Stage(nn.Module):
    """One stage of a pipe; its parameters and buffers have the names they have in the original model.

    Called with the stage's tensors, those of the model's inputs that it reads first, then what it receives, it
    returns the tuple of tensors that it hands on. `source` is the Python that runs.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), split_spec={"1": pipework.SplitPoint.END})
    >>> [name for name, _ in pipe.get_stage_module(1).named_parameters()]
    ['2.weight', '2.bias']
    >>> print(pipe.get_stage_module(0).source)
    def forward(self, input_1):
        v0 = getattr(self, '0')(input_1)
        del input_1
        v1 = getattr(self, '1')(v0)
        return (v1,)
    <BLANKLINE>
    """

    def __init__(
        self,
        index: int,
        choose: Callable[[], tuple[Code, str]],
        mode: Callable[[bool], object],
        forget: Callable[[], object],
    ) -> None:
        super().__init__()
        self.index = index
        self._choose = choose  # the code for the modes that the model is in now
        self._mode, self._forget = mode, forget
        self.compile_options: Mapping[str, Any] | None = None
        """What `torch.compile` is given for the stage's code; None where the stage is not compiled."""
        self._replaced: dict[
            str, tuple[nn.Module, str]
        ] = {}  # where the buffers that the stage assigns are in the model

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stage on its tensors."""
        return self._choose()[0](self, *tensors)

    @property
    def source(self) -> str:
        """The stage's forward as Python source."""
        return self._choose()[1]

    def compile(self, **options: Any) -> None:
        """Give this stage's code to `torch.compile`, as `Pipe.compile` does with that of all stages."""
        refuse_graphs(options)
        compile_function(lambda: None, options)  # so that options that are none are refused now
        self.compile_options = options
        self._forget()

    def train(self, mode: bool = True) -> Stage:
        """Put the stage, and the model's code between its modules, in train or eval mode."""
        self._mode(mode)
        return super().train(mode)

    def device_beside(self, tensor: torch.Tensor | None) -> torch.device:
        """The device of the stage's parameters and buffers; a stage without any works where its input is."""
        for own in self.parameters():
            return own.device
        for own in self.buffers():
            return own.device
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def replaced(self) -> list[dict[str, torch.Tensor | None]]:
        """The model's own tables of the buffers that the stage assigns."""
        return [buffers_of(owner) for owner, _ in self._replaced.values()]

    def assign(self, name: str, value: torch.Tensor) -> None:
        """Replace a buffer by a new tensor, here and in the model."""
        for owner, last in (self._owner(name), self._replaced[name]):
            buffers_of(owner)[last] = value

    def hold(self, part: StagePart, model: nn.Module, constants: Mapping[int, torch.Tensor]) -> dict[int, str]:
        """Take in what a part of a cut uses, unless it is here already; gives the names of its constants."""
        names: dict[int, str] = {}
        for name in part.modules:
            if not self._reaches(name) or isinstance(self.get_submodule(name), Container):
                owner, last = self._owner(name)
                owner.add_module(last, model.get_submodule(name))  # in place of a container for a part of it
        for index, (origin, name) in part.owned.items():
            if origin is Origin.CONSTANT:
                names[index] = self._hold_constant(constants[index])
            elif not self._reaches(name):
                self._hold_tensor(name, model)
        for name in part.assigned:
            if not self._reaches(name):
                self._hold_tensor(name, model)
            around, _, last = name.rpartition(".")
            self._replaced[name] = model.get_submodule(around), last
        return names

    def _hold_constant(self, tensor: torch.Tensor) -> str:
        known = [name for name, buffer in buffers_of(self).items() if buffer is tensor and name.startswith("constant_")]
        name = known[0] if known else f"constant_{len(buffers_of(self))}"
        self.register_buffer(name, tensor, persistent=False)
        return name

    def _hold_tensor(self, name: str, model: nn.Module) -> None:
        owner, last = self._owner(name)
        original = model.get_submodule(name.rpartition(".")[0])
        if last in parameters_of(original):
            owner.register_parameter(last, parameters_of(original)[last])
        else:
            owner.register_buffer(last, buffers_of(original)[last], persistent=is_persistent(original, last))

    def _reaches(self, name: str) -> bool:
        here: Any = self
        for part in name.split("."):
            here = getattr(here, part, None)
            if here is None:
                return False
        return True

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *around, last = name.split(".")
        here: nn.Module = self
        for part in around:
            if part not in children_of(here):
                here.add_module(part, Container())
            here = here.get_submodule(part)
        return here, last
