"""What parts cost, and where the balance falls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipework import CutError, CutPoint, InputError, ModuleCosts, module_costs, pipeline, simulate
from pipework.plan import one_f_one_b
from pipework.split.cost import OPERATIONS_PER_ELEMENT, Cost
from pipework.split.parts import Part
from tests.models import linear, numbers, trunk
from tests.split.equality import State, check


class Block(nn.Module):
    """A residual block of two halves that weigh about the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(linear(8, 32), linear(32, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


def blocks(count: int) -> nn.Sequential:
    return nn.Sequential(*[Block() for _ in range(count)])


def names(costs: ModuleCosts) -> list[str]:
    return [part.begins.module for part in costs.parts]


def parts(work: list[float], boundary: list[int] | None = None) -> ModuleCosts:
    sizes = boundary or [1] * len(work)
    found = (Part(CutPoint(str(i)), Cost(w), b) for i, (w, b) in enumerate(zip(work, sizes, strict=True)))
    return ModuleCosts(tuple(found))


# ---------------------------------------------------------------------- costs


def test_a_linear_layer_by_hand() -> None:
    batch, wide, narrow = 4, 8, 2
    model = nn.Sequential(linear(wide, narrow), linear(narrow, wide))
    product, each = 2 * batch * wide * narrow, OPERATIONS_PER_ELEMENT
    weights = product + each * wide * narrow
    first, second = module_costs(model, (numbers(batch, wide),), stages=2).parts
    assert first.cost == Cost(product + each * batch * narrow, 0, weights + each * narrow, 4 * batch * wide)
    assert second.cost == Cost(
        product + each * batch * wide, product + each * batch * narrow, weights + each * wide, 4 * batch * narrow
    )
    assert (first.boundary, second.boundary) == (0, 4 * batch * narrow)


def test_what_has_no_gradient_costs_none() -> None:
    model, x = nn.Sequential(linear(), linear(), linear()), numbers()
    model[:2].requires_grad_(False)
    frozen = module_costs(model, (x,), stages=3)
    assert [(p.cost.input_gradient, p.cost.weight_gradient > 0) for p in frozen.parts] == [
        (0, False),
        (0, False),
        (0, True),
    ]
    model[0].requires_grad_(True)
    assert [p.cost.input_gradient > 0 for p in module_costs(model, (x,), stages=3).parts] == [False, True, True]
    assert [p.cost.weight_gradient > 0 for p in module_costs(model, (x,), stages=3).parts] == [True, False, True]
    with torch.no_grad():
        whole = module_costs(model, (x,), stages=3)
    assert whole.work == sum(p.cost.forward for p in whole.parts) > 0
    assert all(p.cost.activation == 0 for p in whole.parts)


def test_activations_are_kept_once_and_parameters_not_at_all() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.three(self.one(x) + self.two(x))

    assert [p.cost.activation for p in module_costs(model, (numbers(),), stages=3).parts] == [128, 0, 128]


def test_of_what_is_kept_through_views_the_whole_memory_counts() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.both(x).chunk(2, dim=-1)
            return gate * value

    x = numbers(4, 8)
    (part,) = module_costs(nn.Sequential(Gated()), (x,), stages=1).parts
    assert part.cost.activation == x.nbytes + 2 * x.nbytes


class Checkpointed(nn.Module):
    """A block in checkpoints, the innermost first; each runs all inside it again in the backward."""

    def __init__(self, *reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = Block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        run: Callable[[Tensor], Any] = self.block
        for use_reentrant in self.reentrant:
            run = partial(checkpoint, run, use_reentrant=use_reentrant)
        return run(x)


@pytest.mark.parametrize("reentrant", [(False,), (True,), (False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stages", [3, 6])  # the block stays whole, or is opened
def test_what_a_checkpoint_does_again_counts_as_input_gradient(reentrant: tuple[bool, ...], stages: int) -> None:
    def whole(*reentrant: bool) -> Cost:
        model = nn.Sequential(linear(), Checkpointed(*reentrant), linear())
        model._no_split_modules = ["Checkpointed"] * (stages == 3)
        found = module_costs(model, (numbers(4, 8),), stages=stages)
        assert (names(found) == ["0", "1", "2"]) == (stages == 3)
        return sum((part.cost for part in found.parts), Cost())

    block = sum((part.cost for part in module_costs(nn.Sequential(Block()), (numbers(4, 8),), stages=1).parts), Cost())
    plain, found = whole(), whole(*reentrant)
    assert found.forward == plain.forward
    assert found.weight_gradient == plain.weight_gradient
    assert found.input_gradient == plain.input_gradient + len(reentrant) * block.forward
    assert found.activation < plain.activation


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_checkpoint_without_a_gradient_does_nothing_again() -> None:
    model = nn.Sequential(Checkpointed(True), Checkpointed(False), linear())
    model[:2].requires_grad_(False)
    assert all(part.cost.input_gradient == 0 for part in module_costs(model, (numbers(4, 8),), stages=3).parts)


def test_without_values_the_counts_are_the_same() -> None:
    with torch.device("meta"):
        unreal = blocks(3)
    assert module_costs(unreal, (numbers(),), stages=2) == module_costs(blocks(3), (numbers(),), stages=2)
    with pytest.raises(InputError, match="take no time"):
        module_costs(unreal, (numbers(),), stages=2, repeats=1)


def test_a_gradient_taken_in_the_forward() -> None:
    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.func.grad(lambda z: z.sin().sum())(x.detach())

    model = nn.Sequential(linear(), Slope(), linear())
    assert pipeline(model, (numbers(),), stages=2).num_stages == 2


def test_measured_costs_are_seconds_and_change_nothing() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(8), nn.Dropout(), Block())
    state, x = State.of(model), numbers(grad=True)
    found = module_costs(model, (x,), stages=4, repeats=2)
    state.assert_still(model)
    assert x.grad is None
    counts = module_costs(model, (x,), stages=4)
    assert (found.unit, counts.unit) == ("s", "")
    assert names(found) == names(counts)
    assert all(part.cost.forward > 0 for part in found.parts)
    assert [p.cost.activation for p in found.parts] == [p.cost.activation for p in counts.parts]
    assert pipeline(model, (x,), split_spec=found.cut_points(4)).num_stages == 4


def test_measured_with_checkpoints_and_writes_in_place() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    model = nn.Sequential(linear(), Written(), Checkpointed(False), linear())
    assert all(part.cost.forward > 0 for part in module_costs(model, (numbers(),), stages=3, repeats=1).parts)
    with pytest.raises(InputError, match=r"(?s)cannot be measured by parts.*use_reentrant=False"):
        module_costs(nn.Sequential(linear(), Checkpointed(True)), (numbers(),), stages=2, repeats=1)


def test_costs_per_stage_drive_a_timeline() -> None:
    model, x = blocks(4), numbers()
    costs, pipe = module_costs(model, (x,), stages=2), pipeline(model, (x,), stages=2)
    assert costs.cut_points(2) == pipe.cut_points
    per_stage = costs.per_stage(2)
    assert isinstance(per_stage.forward, tuple)
    assert sum(per_stage.forward) == sum(part.cost.forward for part in costs.parts)
    assert simulate(one_f_one_b(pipe.layout(ranks=2), microbatches=4), per_stage).makespan > 4 * costs.heaviest(2)


# ---------------------------------------------------------------------- balance


@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_no_cut_between_the_parts_is_better(data: st.DataObject, work: list[int]) -> None:
    boundary = data.draw(st.lists(st.integers(0, 5), min_size=len(work), max_size=len(work)))
    stages = data.draw(st.integers(1, len(work)))

    def figure(cuts: tuple[int, ...]) -> tuple[int, int]:
        bounds = (0, *cuts, len(work))
        return max(sum(work[a:b]) for a, b in itertools.pairwise(bounds)), sum(boundary[cut] for cut in cuts)

    costs = parts([float(w) for w in work], boundary)
    chosen = tuple(int(p.module) for p in costs.cut_points(stages) if isinstance(p, CutPoint))
    best = min(figure(cuts) for cuts in itertools.combinations(range(1, len(work)), stages - 1))
    assert figure(chosen) == best
    assert costs.heaviest(stages) == best[0]
    begin, end = costs.heaviest_span(stages)
    assert end - begin == best[0]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from((4, 16, 64)), min_size=3, max_size=7), st.integers(2, 3))
def test_of_layers_of_any_width_the_best_cut_is_found(widths: list[int], stages: int) -> None:
    model = nn.Sequential(*[nn.Sequential(linear(8, width), linear(width, 8)) for width in widths])
    x = numbers()
    every = module_costs(model, (x,), stages=2 * len(widths))  # every layer a part of its own
    work = [part.cost.work for part in every.parts]
    assert len(work) == 2 * len(widths)
    pipe = pipeline(model, (x,), stages=stages)
    found = [names(every).index(f"{p.module}.0" if p.module.count(".") == 0 else p.module) for p in pipe.cut_points]  # type: ignore[union-attr]

    def heaviest(cuts: Any) -> float:
        return max(sum(work[a:b]) for a, b in itertools.pairwise((0, *cuts, len(work))))

    best = min(map(heaviest, itertools.combinations(range(1, len(work)), stages - 1)))
    shallow = min(map(heaviest, itertools.combinations(range(2, len(work), 2), stages - 1)))
    assert best <= heaviest(found) <= shallow
    # Opening only what straddles an even cut may miss the very best, but by no more than one layer.
    assert heaviest(found) <= max(1.05 * sum(work) / stages, best + max(work))


def test_no_deeper_than_it_pays() -> None:
    pipe = pipeline(blocks(4), (numbers(),), stages=2)
    assert str(pipe.cut_points) == "before 2"
    assert names(module_costs(blocks(4), (numbers(),), stages=2)) == ["0", "1", "2", "3"]


def test_deeper_where_that_balances() -> None:
    pipe = pipeline(blocks(5), (numbers(),), stages=2)
    assert str(pipe.cut_points) == "before 2.two"
    check(blocks(5), (numbers(grad=True),), stages=2, want=2)


def test_classes_that_the_model_wants_whole() -> None:
    model = blocks(5)
    model._no_split_modules = ["Block"]
    assert str(pipeline(model, (numbers(),), stages=2).cut_points) in {"before 2", "before 3"}
    with pytest.raises(CutError, match="cannot be cut into 6 stages") as error:
        pipeline(model, (numbers(),), stages=6)
    assert "keep whole: Block" in error.value.why
    assert "at most 5" in error.value.remedy
    assert "split_spec" in error.value.remedy


def test_a_plan_names_the_parts() -> None:
    @trunk(embed=linear(), mask=linear(), layers=blocks(3), head=Block())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mask(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    assert names(module_costs(model, (numbers(),), stages=4))[:2] == ["embed", "mask"]
    model.pp_plan = {"embed": ([], []), "layers": ([], []), "head": ([], []), "norm": ([], [])}
    assert names(module_costs(model, (numbers(),), stages=4)) == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    with pytest.raises(CutError, match="into 6 stages"):
        pipeline(model, (numbers(),), stages=6)


def test_a_cut_that_is_refused_is_passed_over() -> None:
    @trunk(one=linear(), norm=nn.BatchNorm1d(8), two=linear(), last=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.last(self.norm(self.two(self.norm(self.one(x)))).relu())

    assert model.training
    assert str(pipeline(model, (numbers(),), stages=2).cut_points) in {"before norm", "before last"}
    with pytest.raises(CutError, match=r"norm\.") as error:
        pipeline(model, (numbers(),), stages=4)
    assert error.value.remedy


def test_a_module_that_cannot_be_opened_stays_whole_or_says_why() -> None:
    class Hooked(Block):
        pass

    model = nn.Sequential(*[Hooked() for _ in range(5)])
    for block in model:
        block.register_full_backward_hook(lambda *_: None)
    assert str(pipeline(model, (numbers(),), stages=2).cut_points) in {"before 2", "before 3"}
    with pytest.raises(CutError, match="has backward hooks"):
        pipeline(model, (numbers(),), stages=6)


def test_calls_inside_whole_modules_count_too() -> None:
    shared = linear()
    model = nn.Sequential(nn.Sequential(linear(), shared), shared, linear(), shared)
    pipe = pipeline(model, (numbers(),), stages=4)
    assert pipe.num_stages == 4
    check(model, (numbers(grad=True),), stages=4, want=4)


def test_a_model_without_modules() -> None:
    @trunk()
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return x.sin()

    assert pipeline(model, (numbers(),), stages=1).num_stages == 1
    with pytest.raises(CutError, match="cannot be cut into 2 stages"):
        pipeline(model, (numbers(),), stages=2)
