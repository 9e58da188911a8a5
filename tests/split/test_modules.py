"""What a model can be made of: shared and tied weights, hooks, checkpoints, compiled blocks, buffers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from pipework import CaptureError, CutError, pipe_split, pipeline
from pipework.split.trees import held
from tests.models import linear, linears, numbers, trunk
from tests.split.equality import after, before, check, same

# ---------------------------------------------------------------------- one module, many calls


def test_block_called_twice_in_a_stage() -> None:
    @trunk(shared=nn.Sequential(linear(), nn.Tanh()), out=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x))
        pipe_split()
        return self.out(x)

    check(model, (numbers(grad=True),), want=2)


def test_modules_passed_to_a_block_are_its_stages_too() -> None:
    """One of a layer that another stage uses, as decoders do with an embedding, and one that nobody else has."""

    class Decoder(nn.Module):
        def forward(self, x: Tensor, table: nn.Module, heads: Any) -> Tensor:
            return heads["two"](heads["one"][0](x)) @ table.weight.T

    @trunk(table=nn.Embedding(6, 8), decoder=Decoder(), one=nn.ModuleList([linear()]), two=linear())
    def model(self: nn.Module, ids: Tensor) -> Tensor:
        x = self.table(ids)
        pipe_split()
        return self.decoder(x.tanh(), table=self.table, heads={"one": self.one, "two": self.two})

    pipe = check(model, (torch.tensor([[0, 2, 5]]),), want=2)
    assert dict(pipe.get_stage_module(1).named_parameters()).keys() == {
        "table.weight", "one.0.weight", "one.0.bias", "two.weight", "two.bias"
    }  # fmt: skip


def test_block_called_in_two_stages() -> None:
    @trunk(shared=linear(), other=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.other(self.shared(x)).tanh() + x
            pipe_split()
        return self.shared(x)

    pipe = check(model, (numbers(grad=True),), want=4)
    weights = {id(pipe.get_stage_module(i).get_parameter("shared.weight")) for i in range(4)}
    assert weights == {id(model.shared.weight)}


def test_part_of_a_block_called_before_the_block() -> None:
    @trunk(block=nn.Sequential(linear(), nn.Tanh()), out=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.out(self.block(self.block[0](x)))

    check(model, (numbers(grad=True),), spec=before("out"), want=2)


def test_cut_at_each_call_of_a_shared_block() -> None:
    @trunk(shared=linear(), out=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.shared(x)
        return self.out(x)

    check(model, (numbers(grad=True),), spec=after("shared"), want=4)


def test_cut_inside_a_shared_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = linear(8, 16), linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x))
            pipe_split()
            h = self.down(h)
            h.add_(x)
            return h

    @trunk(shared=Block(), out=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.shared(x)
        return self.out(x)

    check(model, (numbers(grad=True),), want=4)


def test_cut_in_a_loop() -> None:
    @trunk(layers=linears(4))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i:
                pipe_split()
            x = layer(x).relu() + x
        return x

    check(model, (numbers(grad=True),), want=4)


def test_one_module_under_two_names() -> None:
    shared = linear()

    @trunk(first=shared, second=shared, out=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        pipe_split()
        return self.out(self.second(x))

    check(model, (numbers(grad=True),), want=2)


def test_weights_tied_across_stages_and_inside_one() -> None:
    @trunk(
        embed=nn.Embedding(11, 8),
        layers=linears(2),
        head=nn.Linear(8, 11, bias=False),
        aux=nn.Linear(8, 11, bias=False),
    )
    def model(self: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x), self.aux(x)

    model.head.weight = model.embed.weight
    model.aux.weight = model.embed.weight
    check(model, (torch.arange(10).view(2, 5),), spec=before("layers.1", "head"), want=3)
    check(model, (torch.arange(10).view(2, 5),), spec=before("layers.1", "aux"), want=3)


def test_parameters_read_by_the_trunk_in_several_stages() -> None:
    @trunk(
        embed=nn.Embedding(11, 8),
        scale=nn.Parameter(numbers(8)),
        layer=linear(),
        table=nn.ParameterDict({"b": numbers(11)}),
    )
    def model(self: nn.Module, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        pipe_split()
        x = self.layer(x) * self.scale
        pipe_split()
        return F.linear(x * self.scale, self.embed.weight, self.table["b"])

    check(model, (torch.arange(10).view(2, 5),), want=3)


def test_unused_parameter() -> None:
    @trunk(one=linear(), never=linear(), alone=nn.Parameter(numbers(3)), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        return self.two(x)

    check(model, (numbers(grad=True),), want=2)


# ---------------------------------------------------------------------- blocks that stay the user's own


class Branching(nn.Module):
    """Data-dependent control flow, isinstance, a method and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = linear(), 0

    def forward(self, x: Any) -> Tensor:
        assert isinstance(x, Tensor)
        self.calls += 1
        if x.sum() > 0:
            return self.lin(x)
        for _ in range(int(x[0, 0].abs().item() * 3)):
            x = x * 0.9
        return -self.lin(x)


def test_data_dependent_control_flow_in_blocks() -> None:
    model = nn.Sequential(Branching(), Branching(), Branching())
    pipe = check(model, (numbers(grad=True),), spec=before("1", "2"), want=3)
    for seed in range(6):
        same(pipe(numbers(seed=seed))[0], model(numbers(seed=seed)))


def test_hooks_of_blocks_run() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model[1].register_forward_hook(lambda m, a, out: (seen.append("forward"), out + 1)[1])
    model[2].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    pipe = check(model, (numbers(grad=True),), spec=before("1", "2"), want=3)
    seen.clear()
    pipe(numbers(grad=True))[0].sum().backward()
    assert seen == ["forward", "backward"]


def test_hook_on_an_open_module_is_part_of_the_trunk() -> None:
    model = nn.Sequential(nn.Sequential(linear(), linear()), linear())
    model[0].register_forward_hook(lambda m, a, out: out * 2 + a[0])
    model.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    check(model, (numbers(grad=True),), spec=before("0.1"), want=2)


def test_backward_hook_on_an_open_module_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(linear(), linear()), linear())
    model[0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    with pytest.raises(CutError, match="'0' has backward hooks"):
        pipeline(model, (numbers(grad=True),), split_spec=before("0.1"))


def test_tensor_hook_in_the_trunk() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        if h.requires_grad:
            h.register_hook(lambda g: g * 2)
        pipe_split()
        return self.two(h)

    check(model, (numbers(grad=True),), want=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_in_a_block(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant) + x

    model = nn.Sequential(Block(), Block(), Block())
    check(model, (numbers(grad=True),), spec=before("1", "2"), want=3)


def test_checkpoint_sequential_in_a_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.parts, 2, x, use_reentrant=False)

    check(nn.Sequential(Block(), Block()), (numbers(grad=True),), spec=before("1"), want=2)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.power = power
        return x**power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * 7 * x, None  # on purpose not the derivative


def test_custom_function_in_the_trunk_and_in_a_block() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(x, 2)

    @trunk(one=linear(), block=Block(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = Cube.apply(self.one(x), 3)
        pipe_split()
        return self.two(Cube.apply(self.block(x), 3))

    check(model, (numbers(grad=True),), want=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as the compiler looks at it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks() -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear(), nn.Tanh()), linear())
    model[1] = torch.compile(model[1], backend="eager")
    model[0].compile(backend="eager")
    check(model, (numbers(grad=True),), spec=before("1", "2"), want=3, halves=False)  # see tests/run/test_compiled.py


def test_parametrized_and_weight_normed_blocks() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(linear()),
        parametrizations.orthogonal(linear()),
        parametrizations.spectral_norm(linear()),
    )
    check(model, (numbers(grad=True),), spec=before("1", "2"), want=3)


def test_parametrized_weight_read_by_the_trunk() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        return F.linear(x, self.one.weight) + self.two(x)

    parametrizations.weight_norm(model.one)
    check(model, (numbers(grad=True),), want=2)


def test_old_weight_norm() -> None:
    with pytest.warns(FutureWarning):
        model = nn.Sequential(torch.nn.utils.weight_norm(linear()), nn.Tanh(), linear())
    check_later = pipeline(model, (numbers(),), split_spec=before("1"))
    same(check_later(numbers())[0], model(numbers()))


def test_block_that_copies_and_pickles_itself() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = linear()

        def forward(self, x: Tensor) -> Tensor:
            twin = copy.deepcopy(self.lin)
            other = pickle.loads(pickle.dumps(self.lin))
            return twin(x) + other(x) + self.lin(x)

    model = nn.Sequential(linear(), Block())
    check(model, (numbers(grad=True),), spec=before("1"), want=2)


def test_the_model_can_be_copied_and_saved_after_the_cut() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(8), linear())
    pipe = pipeline(model, (numbers(),), split_spec=before("1"))
    twin = copy.deepcopy(model)
    other = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert set(pipe.get_stage_module(0).state_dict()) | set(pipe.get_stage_module(1).state_dict()) == set(
        model.state_dict()
    )
    same(twin.eval()(numbers()), other.eval()(numbers()))


def test_module_with_call_of_its_own() -> None:
    class Twice(nn.Linear):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    check(nn.Sequential(Twice(8, 8), Twice(8, 8)), (numbers(grad=True),), spec=before("1"), want=2)


def test_method_other_than_forward_of_a_submodule() -> None:
    class Tied(nn.Embedding):
        def attend(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    @trunk(embed=Tied(11, 8), mid=linear())
    def model(self: nn.Module, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        pipe_split()
        x = self.mid(x)
        pipe_split()
        return self.embed.attend(x)

    check(model, (torch.arange(6),), want=3)


def test_forward_called_directly() -> None:
    @trunk(one=linear(), two=nn.Sequential(linear(), nn.Tanh()))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one.forward(x)
        pipe_split()
        return self.two.forward(x)

    check(model, (numbers(grad=True),), want=2)


def test_mask_made_by_vmap_in_the_trunk() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])
        mask = torch.vmap(torch.vmap(lambda i, j: i >= j, in_dims=(None, 0)), in_dims=(0, None))(rows, rows)
        x = self.one(x)
        pipe_split()
        return self.two(mask.to(x.dtype) @ x)

    check(model, (numbers(grad=True),), want=2)


class Reached(torch.autograd.Function):
    """Whether a position is reached, as `TransformGetItemToIndex` looks into masks under vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mask: Tensor, i: Tensor) -> Tensor:
        return torch.ops.aten.index(mask, [i])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class Asking(TorchFunctionMode):
    """Turns `mask[i]` into `Reached`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return Reached.apply(*args)
        return func(*args, **(kwargs or {}))


def test_function_mode_put_on_in_the_trunk_while_it_is_recorded() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])
        with Asking():
            mask = torch.vmap(torch.vmap(lambda i, j: i >= rows[j], in_dims=(None, 0)), in_dims=(0, None))(rows, rows)
            x = self.one(x)
        pipe_split()
        return self.two(mask.to(x.dtype) @ x)

    check(model, (numbers(grad=True),), want=2)


def test_functional_gradient_in_the_trunk() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        (slope,) = torch.autograd.grad(h.pow(2).sum(), h, create_graph=True)
        pipe_split()
        return self.two(slope)

    check(model, (numbers(grad=True),), want=2, modes=(True,))


def test_iteration_unpacking_and_comparison_in_the_trunk() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        first, *others = self.one(x)
        q, k = self.one(x).chunk(2, dim=-1)
        pipe_split()
        for row in others:
            first = first + row
        best, index = (q * k).max(dim=0)
        return self.two(first) + torch.where(index > 1, best, -best).sum() + x.T.mean() - x.mT.real.sum()

    check(model, (numbers(grad=True),), want=2)


# ---------------------------------------------------------------------- buffers and other tensors


def test_batch_norm_in_every_stage() -> None:
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(inplace=True))

    check(
        nn.Sequential(block(1, 4), block(4, 4), block(4, 2)), (numbers(3, 1, 9, 9, grad=True),), spec=before("1", "2")
    )
    flat = nn.Sequential(*block(1, 4), *block(4, 2))
    check(flat, (numbers(3, 1, 9, 9, grad=True),), spec=before("1", "2", "4"), want=4)


def test_batch_norm_shared_by_two_stages_is_refused() -> None:
    @trunk(norm=nn.BatchNorm1d(8), one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        pipe_split()
        return self.norm(self.two(x))

    with pytest.raises(CutError, match=r"norm\..*used by stages \[0, 1\]"):
        pipeline(model, (numbers(),))
    model.eval()
    assert pipeline(model, (numbers(),)).num_stages == 2


def test_buffer_written_through_data_by_two_stages_is_refused() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return x - self.mean

    @trunk(norm=Average(), one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        pipe_split()
        return self.norm(self.two(x))

    with pytest.raises(CutError, match=r"norm\.mean"):
        pipeline(model, (numbers(),))
    assert torch.equal(model.norm.mean, torch.zeros(8))


def test_buffers_written_in_place_by_the_trunk() -> None:
    @trunk(one=linear(), two=linear(), mean=nn.Buffer(torch.zeros(8)), steps=nn.Buffer(torch.tensor(0)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.steps += 1
        return self.two(x - self.mean) / self.steps

    check(model, (numbers(grad=True),), want=2, calls=3)


def test_buffers_assigned_by_the_trunk() -> None:
    @trunk(
        one=linear(), two=linear(), mean=nn.Buffer(torch.zeros(8)), last=nn.Buffer(torch.zeros(4, 8), persistent=False)
    )
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        pipe_split()
        y = self.two(x) + self.last
        self.last = y.detach()
        return y

    check(model, (numbers(grad=True),), want=2, calls=3)


def test_buffer_assigned_in_one_stage_and_read_in_another() -> None:
    @trunk(one=linear(), two=linear(), mean=nn.Buffer(torch.ones(8)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x) * self.mean
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        pipe_split()
        return self.two(x) + self.mean

    check(model, (numbers(grad=True),), want=2, calls=3)


def test_buffer_read_in_one_stage_and_assigned_in_a_later_one_is_refused() -> None:
    @trunk(one=linear(), two=linear(), mean=nn.Buffer(torch.ones(8)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x) * self.mean
        pipe_split()
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return self.two(x)

    with pytest.raises(CutError, match="mean"):
        pipeline(model, (numbers(),))


def test_buffer_written_in_place_in_one_stage_and_read_in_another_is_refused() -> None:
    @trunk(one=linear(), two=linear(), mean=nn.Buffer(torch.ones(8)))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x) * self.mean
        pipe_split()
        self.mean.add_(1)
        return self.two(x)

    with pytest.raises(CutError, match="mean"):
        pipeline(model, (numbers(),))


def test_plain_tensor_attributes() -> None:
    @trunk(one=linear(), two=linear(), table=numbers(4, 8), tables=[numbers(8), numbers(8, seed=5)])
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x) + self.table
        pipe_split()
        return self.two(x) * self.tables[1] + self.table

    check(model, (numbers(grad=True),), want=2)


def test_plain_tensor_attribute_written_in_the_forward() -> None:
    @trunk(one=linear(), two=linear(), total=torch.zeros(8))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        self.total.add_(x.detach().sum(0))
        return self.two(x) + self.total

    check(model, (numbers(grad=True),), want=2, calls=3)


def test_python_counter_of_the_trunk() -> None:
    @trunk(one=linear(), two=linear(), steps=0)
    def model(self: nn.Module, x: Tensor) -> Tensor:
        self.steps += 1
        x = self.one(x) * self.steps
        pipe_split()
        return self.two(x)

    check(model, (numbers(grad=True),), want=2, calls=3)


def test_tensor_kept_by_the_trunk_in_an_attribute() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        self.kept = self.one(x)
        pipe_split()
        return self.two(self.kept)

    check(model, (numbers(grad=True),), want=2)


def test_tensor_that_leaves_a_block_by_a_back_door_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = linear()

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = x.pow(2).mean()
            return self.lin(x)

    @trunk(layers=nn.ModuleList([Block(), Block()]))
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return x, sum(layer.penalty for layer in self.layers)

    for mode in (True, False):
        with torch.set_grad_enabled(mode), pytest.raises(CaptureError, match="other than by its return"):
            pipeline(model, (numbers(),), split_spec=before("layers.1"))


class Cache:
    """A plain object that blocks fill, as a key-value cache is."""

    def __init__(self, parts: int = 0) -> None:
        self.kept: list[Tensor] = []
        self.named: dict[str, Any] = {"parts": [Cache() for _ in range(parts)]}
        self.calls = 0


class Filling(nn.Module):
    """Puts new tensors and given ones into what it is given, and replaces one."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.lin, self.index = linear(), index

    def forward(self, x: Tensor, cache: Cache, found: dict[str, Any], rows: list[Tensor]) -> Tensor:
        assert cache.calls == self.index == len(rows)
        cache.calls += 1
        cache.kept += [x, self.lin(x).tanh()]
        part = cache.named["parts"][self.index]
        assert not part.kept  # not what an earlier step left there
        part.kept.append(x.exp())
        found["last"], found[f"old {self.index}"] = x * 2, found.get("last")
        rows.append(cache.kept[-1] + 1)
        return self.lin(x) + cache.kept[1] * cache.named["parts"][0].kept[0]


@pytest.mark.parametrize("stages", [2, 3])
def test_objects_dicts_and_lists_that_blocks_fill(stages: int) -> None:
    @trunk(layers=nn.ModuleList(map(Filling, range(4))), end=linear())
    def model(self: nn.Module, x: Tensor) -> Any:
        cache, found, rows = Cache(len(self.layers)), {}, []
        for layer in self.layers:
            x = layer(x, cache, found=found, rows=rows)
            cache.kept[0] = cache.kept[0] * 0.5
        assert cache.calls == 4
        return self.end(x), found, rows, cache

    check(model, (numbers(grad=True),), spec=before("layers.1", "layers.3") if stages == 3 else before("layers.2"))


def test_object_given_by_the_caller() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.calls += 1
            return x * cache.named["scale"]

    @trunk(one=linear(), two=Block())
    def model(self: nn.Module, x: Tensor, cache: Cache) -> tuple[Tensor, int]:
        x = self.one(x) * cache.kept[0]
        pipe_split()
        return self.two(x, cache), cache.calls

    cache = Cache()
    cache.kept.append(numbers(seed=8, grad=True))
    cache.named["scale"] = numbers(seed=9, grad=True)
    check(model, (numbers(grad=True), cache), want=2)
    assert cache.calls == 0  # stages are given twins


def test_empty_object_given_by_the_caller_stays_empty() -> None:
    @trunk(layers=nn.ModuleList(map(Filling, range(2))))
    def model(self: nn.Module, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        found: dict[str, Any] = {}
        rows: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, cache, found, rows)
        return x, cache

    cache = Cache(2)
    pipe = pipeline(model, (numbers(), cache), split_spec=before("layers.1"))
    for _ in range(2):
        same(pipe(numbers(), cache), model(numbers(), Cache(2)))
        assert not list(held(cache))
        assert cache.calls == 0


def test_object_without_an_end_is_refused() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.kept.append(x * 2)
            return x + cache.kept[0]

    @trunk(layers=nn.ModuleList([Block(), Block()]))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        cache = Cache()
        cache.named["self"] = cache
        for layer in self.layers:
            x = layer(x, cache)
        return x

    with pytest.raises(CaptureError, match="Cache that carries activations"):
        pipeline(model, (numbers(),), split_spec=before("layers.1"))
