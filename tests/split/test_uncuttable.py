"""Models that cannot be cut there: the error says what, where in the user's code, why, and a remedy that then works."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import CaptureError, CutError, PipeworkError, pipe_split, pipeline
from tests.gloo import GlooPool
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import Spec, State, after, before, check

X = numbers(grad=True)
Forward = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A model, where it is to be cut, what the error says, and what to do instead: another forward, or another cut."""

    forward: Forward | nn.Module
    says: tuple[str, ...]
    instead: Forward | nn.Module | None = None
    spec: Spec | None = None
    spec_instead: Spec | None = None
    kind: type[PipeworkError] = CaptureError
    attributes: Callable[[], dict[str, Any]] = dict


CASES: dict[str, Refused] = {}


def made(forward: Forward | nn.Module, attributes: Callable[[], dict[str, Any]]) -> nn.Module:
    """A model with layers `a` and `b` around a forward that knows them."""
    if isinstance(forward, nn.Module):
        return forward
    return trunk(**{"a": linear(), "b": linear(), **attributes()})(forward)


class Block(nn.Module):
    """Its forward is the function that it is made with, on a layer of its own."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layer, self.does = linear(), forward

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


def _thread(self: Any, x: Tensor) -> Tensor:
    h, found = self.a(x), []
    worker = threading.Thread(target=lambda: found.append(torch.ones(8) * 2))
    worker.start()
    worker.join()
    pipe_split()
    return self.b(h) * found[0]


def _thread_in_a_block(self: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(torch.ones(8) * 2))
    worker.start()
    worker.join()
    return self.layer(x) * found[0]


CASES["a thread"] = Refused(
    _thread,
    ("the trunk starts a thread", "the model itself"),
    nn.Sequential(linear(), Block(_thread_in_a_block)),
    spec_instead=before("1"),
)


def _writes_a_weight(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    with torch.no_grad():
        self.b.weight.clamp_(-0.1, 0.1)
    return self.b(h)


def _copies_a_weight(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    return F.linear(h, self.b.weight.clamp(-0.1, 0.1), self.b.bias)


CASES["a write into a parameter"] = Refused(_writes_a_weight, ("the parameter 'b.weight' in place",), _copies_a_weight)


def _writes_a_row(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    self.b.weight.data[0].zero_()
    return self.b(h)


CASES["a write into a part of a parameter"] = Refused(_writes_a_row, ("the parameter 'b.weight' in place",))


def _goes_backward(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    F.mse_loss(h, x.detach()).backward(retain_graph=True)
    pipe_split()
    return self.b(h)


def _returns_the_loss(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.a(x)
    early = F.mse_loss(h, x.detach())
    pipe_split()
    return self.b(h), early


CASES["backward() in the forward"] = Refused(_goes_backward, ("the trunk calls backward()",), _returns_the_loss)


def _own_generator(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    return self.b(h) * torch.rand(8, generator=self.generator)


def _default_generator(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    return self.b(h) * torch.rand(8)


CASES["a generator of its own"] = Refused(
    _own_generator,
    ("draws from a generator of its own",),
    _default_generator,
    attributes=lambda: {"generator": torch.Generator().manual_seed(1)},
)


def _gradient_through_the_cut(self: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    h = self.a(x).tanh()
    pipe_split()
    energy = (self.b(h).tanh() * x).sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force


def _gradient_before_the_cut(self: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (force,) = torch.autograd.grad(self.a(x).tanh().sum(), x, create_graph=True)
    pipe_split()
    return self.b(force)


CASES["a gradient taken through the cut"] = Refused(
    _gradient_through_the_cut,
    ("torch.autograd.grad in stage 1", "through pipe_split() at"),
    _gradient_before_the_cut,
    kind=CutError,
)


def _functional_call(self: Any, x: Tensor) -> Tensor:
    doubled = {name: p * 2 for name, p in self.a.named_parameters()}
    h = torch.func.functional_call(self.a, doubled, (x,))
    pipe_split()
    return self.b(h)


def _functional_linear(self: Any, x: Tensor) -> Tensor:
    h = F.linear(x, self.a.weight * 2, self.a.bias * 2)
    pipe_split()
    return self.b(h)


CASES["other parameters for a call"] = Refused(
    _functional_call, ("module 'a' with another 'weight' than the module's own",), _functional_linear
)


def _exchanges(self: Any, x: Tensor) -> Tensor:
    self.a, self.b = self.b, self.a
    h = self.a(x)
    pipe_split()
    return self.b(h)


def _chooses(self: Any, x: Tensor) -> Tensor:
    self.turn = not self.turn
    first, second = (self.b, self.a) if self.turn else (self.a, self.b)
    h = first(x)
    pipe_split()
    return second(h)


CASES["submodules exchanged"] = Refused(
    _exchanges, ("another module or parameter in place of",), _chooses, attributes=lambda: {"turn": False}
)


def _nested(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    rows = torch.nested.as_nested_tensor([h[:1], h[1:]], layout=torch.jagged)
    pipe_split()
    return self.b(rows.values())


CASES["a nested tensor"] = Refused(_nested, ("works on a nested tensor",))


class Marked(torch.Tensor):
    """A tensor of another type."""


def _subclass(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).as_subclass(Marked)
    pipe_split()
    return self.b(h).as_subclass(torch.Tensor)


CASES["a subclass of Tensor"] = Refused(_subclass, ("a tensor of type Marked is used", "module 'b'"))


def _makes_a_layer(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    return nn.Linear(8, 8)(h)


CASES["a layer made in the forward"] = Refused(_makes_a_layer, ("a parameter of shape (8, 8)", "in __init__"))


def _by_attribute(self: Any, x: Tensor) -> Tensor:
    h = self.block(x)
    pipe_split()
    return self.b(h) * self.block.penalty


def _keeps_a_penalty(self: Any, x: Tensor) -> Tensor:
    self.penalty = x.pow(2).mean()
    return self.layer(x)


def _by_return(self: Any, x: Tensor) -> Tensor:
    h, penalty = self.block(x)
    pipe_split()
    return self.b(h) * penalty


def _returns_a_penalty(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.layer(x), x.pow(2).mean()


CASES["a tensor by the back door"] = Refused(
    _by_attribute,
    ("came out of a module other than by its return",),
    made(_by_return, lambda: {"block": Block(_returns_a_penalty)}),
    attributes=lambda: {"block": Block(_keeps_a_penalty)},
)


def _forces(self: Any, x: Tensor) -> Tensor:
    def energy(row: Tensor) -> Tensor:
        return self.b(self.a(row).tanh()).sum()

    return torch.vmap(torch.func.grad(energy))(x)


def _forces_in_a_block(self: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda row: self.layer(row).tanh().sum()))(x)


CASES["inside torch.func"] = Refused(
    _forces,
    ("lies inside a call of torch.func",),
    nn.Sequential(Block(_forces_in_a_block), linear()),
    before("b"),
    before("1"),
    CutError,
)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(nn.Sequential(linear(), linear())), linear())


CASES["inside a ScriptModule"] = Refused(
    scripted(),
    ("inside module '0', which is a ScriptModule",),
    nn.Sequential(nn.Sequential(linear(), linear()), linear()),
    before("0.1"),
    kind=CutError,
)


def hooked(name: str) -> nn.Module:
    model = nn.Sequential(nn.Sequential(linear(), linear()), linear())
    model.get_submodule(name).register_full_backward_hook(lambda module, inward, outward: (inward[0] * 2,))
    return model


CASES["a backward hook around the cut"] = Refused(
    hooked("0"), ("the module '0' has backward hooks",), hooked("0.1"), before("0.1"), kind=CutError
)


def _normed_twice(self: Any, x: Tensor) -> Tensor:
    h = self.norm(self.a(x))
    pipe_split()
    return self.norm(self.b(h))


def _normed_in_one_stage(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    pipe_split()
    return self.norm(self.b(self.norm(h)))


CASES["statistics shared by two stages"] = Refused(
    _normed_twice,
    ("'norm.", "used by stages [0, 1]", "stage 0 at"),
    _normed_in_one_stage,
    kind=CutError,
    attributes=lambda: {"norm": nn.BatchNorm1d(8)},
)


def _written_view(self: Any, x: Tensor) -> Tensor:
    h, turned = self.block(x)
    pipe_split()
    turned.mul_(2)
    return self.b(h + turned)


def _written_copy(self: Any, x: Tensor) -> Tensor:
    h, turned = self.block(x)
    pipe_split()
    return self.b(h + turned * 2)


def _aliases(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.layer(x)
    return h, h.view(h.shape)


CASES["a write through an alias"] = Refused(
    _written_view,
    ("writes in place into memory that values from earlier stages share", "block at"),
    _written_copy,
    kind=CutError,
    attributes=lambda: {"block": Block(_aliases)},
)


def _keeps_a_tensor(self: Any, x: Tensor) -> Tensor:
    h = self.a(x) + self.mean
    self.mean = self.mean * 0.9 + h.detach().mean(0) * 0.1
    pipe_split()
    return self.b(h)


CASES["a tensor attribute that is replaced"] = Refused(
    _keeps_a_tensor,
    ("assigns a new tensor to the attribute 'mean'",),
    made(_keeps_a_tensor, lambda: {"mean": nn.Buffer(torch.zeros(8))}),
    attributes=lambda: {"mean": torch.zeros(8)},
)


def _crosses_nothing(self: Any, x: Tensor) -> Tensor:
    self.a(x)
    pipe_split()
    return self.b(x)


CASES["nothing crosses"] = Refused(_crosses_nothing, ("no tensor crosses the cut before stage 1",), kind=CutError)
CASES["between two cuts"] = Refused(
    nn.Sequential(*linears(3)),
    ("stage 1 would be empty", "the end of '0'", "the beginning of '1'"),
    spec=after("0") | before("1"),
    spec_instead=before("1"),
    kind=CutError,
)

LINELESS = {"submodules exchanged", "a tensor attribute that is replaced", "a backward hook around the cut"}
LINELESS |= {"inside a ScriptModule", "between two cuts"}  # what is refused there is no line of a forward


@pytest.mark.parametrize("name", CASES)
def test_the_error_says_it_and_the_remedy_works(name: str) -> None:
    case = CASES[name]
    model = made(case.forward, case.attributes)
    state = State.of(model)
    with pytest.raises(case.kind) as error:
        pipeline(model, (X,), split_spec=case.spec)
    state.assert_still(model)
    for text in case.says:
        assert text in str(error.value)
    assert error.value.why
    assert error.value.remedy
    assert ("test_uncuttable.py:" in error.value.where) == (name not in LINELESS), error.value.where
    if case.instead is not None or case.spec_instead is not None:
        right = case.forward if case.instead is None else case.instead
        spec = case.spec if case.spec_instead is None else case.spec_instead
        check(made(right, case.attributes), (X,), spec=spec, want=2, modes=(True,))


def replicated(group: dist.ProcessGroup, rank: int) -> list[str]:
    inner = nn.Sequential(linear(), linear())
    model = nn.Sequential(nn.parallel.DistributedDataParallel(inner, process_group=group), linear())
    with pytest.raises(CutError) as error:
        pipeline(model, (X,), split_spec=before("1"))
    assert pipeline(nn.Sequential(inner, linear()), (X,), split_spec=before("1")).num_stages == 2
    return [error.value.what, error.value.remedy]


def test_replicas_are_refused(gloo_pool: GlooPool) -> None:
    for what, remedy in gloo_pool.run(replicated):
        assert what == "module '0' is a DistributedDataParallel"
        assert ".module" in remedy
