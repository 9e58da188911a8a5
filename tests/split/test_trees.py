"""Trees, arguments, tables and the balance: the small parts."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipework import CutError, InputError, pipeline
from pipework.split.arguments import bind
from pipework.split.table import ranges, rows, size_text
from pipework.split.trees import children, fill, held, leaves, map_leaves, named_leaves, remade
from tests.models import linear, numbers, trunk
from tests.split.equality import before, check

Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    one: Any
    two: Any = None


def trees() -> st.SearchStrategy[Any]:
    simple = st.one_of(st.integers(), st.none(), st.text(max_size=3), st.floats(allow_nan=False))
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.one_of(st.text(max_size=2), st.integers()), inner, max_size=3),
            st.tuples(inner, inner).map(Point._make),
            st.builds(Frozen, inner, inner),
            st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
            st.lists(inner, max_size=2).map(lambda found: defaultdict(list, {"k": found})),
        ),
        max_leaves=12,
    )


@given(trees())
def test_walking_putting_together_and_naming_agree(tree: Any) -> None:
    found = leaves(tree)
    assert [leaf for _, leaf in named_leaves(tree)] == found
    assert fill(tree, found) == tree
    assert map_leaves(lambda leaf: leaf, tree) is tree
    changed = map_leaves(repr, tree)
    assert leaves(changed) == [repr(leaf) for leaf in found]
    assert fill(changed, found) == tree
    assert type(changed) is type(tree) or children(tree) is None


@given(trees())
def test_names_reach_their_leaves(tree: Any) -> None:
    for name, leaf in named_leaves(tree, "tree"):
        assert eval(name, {"tree": tree}) == leaf


def test_nodes_of_many_kinds() -> None:
    t = torch.ones(2, 3)
    best = t.max(dim=0)
    assert [id(leaf) for leaf in leaves(best)] == [id(best.values), id(best.indices)]
    assert type(fill(best, [t, t])) is type(best)
    assert leaves(t.shape) == [t.shape]  # a fact, not a container
    assert leaves(slice(1, t, None))[1] is t
    assert leaves([]) == []
    assert map_leaves(str, ()) == ()
    kept = defaultdict(int, a=1)
    twin = map_leaves(lambda leaf: leaf + 1, kept)
    assert twin == {"a": 2}
    assert twin.default_factory is int
    assert kept == {"a": 1}


class Declared(OrderedDict[str, Any]):
    """As transformers' ModelOutput: a registered dict that is made with its keys in an order of its own."""


torch.utils._pytree.register_pytree_node(
    Declared,
    lambda node: (list(node.values()), list(node)),
    lambda values, keys: Declared(sorted(zip(keys, values, strict=True))),
)


def test_registered_dict_keeps_the_order_of_its_keys() -> None:
    assert list(fill(Declared(b=1, a=2), [3, 4]).items()) == [("b", 3), ("a", 4)]


class Box:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_tensors_held_by_objects() -> None:
    t = torch.ones(2)
    loop = Box(inner=Box(kept={"a": [t]}))
    loop.self = loop
    assert [id(found) for found in held(loop)] == [id(t)]
    assert children(loop) is None  # it has no end
    assert [id(found) for found in held(UserDict(a=t))] == [id(t)]
    for leaf in (nn.Linear(2, 2), 3, None, Box(a=1), Box):
        assert not list(held(leaf))
        assert children(leaf) is None


def test_objects_with_tensors_are_nodes() -> None:
    t = torch.ones(2)
    box = Box(name="a", empty=Box(inner=[]), kept={"a": [t, None]})
    assert [name for name, _ in named_leaves(box, "box")] == [
        "box.name",
        "box.empty",
        "box.kept['a'][0]",
        "box.kept['a'][1]",
    ]
    twins = [map_leaves(lambda leaf: leaf, box), remade(box, lambda leaf: leaf), fill(box, ["a", box.empty, t, None])]
    for twin in twins:
        assert twin is not box
        assert leaves(twin)[2] is t
        assert twin.kept["a"] is not box.kept["a"]
    assert twins[0].empty.inner is not box.empty.inner  # what a call may fill is no one else's
    assert remade([box, box], lambda leaf: leaf)[0].kept is not box.kept


# ---------------------------------------------------------------------- arguments


class Model(nn.Module):
    def forward(self, a: Any, /, b: Any, *rest: Any, c: Any = 3, **others: Any) -> Any:
        return a, b, rest, c, dict(sorted(others.items()))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2), {}),
        ((1,), {"b": 2}),
        ((1, 2, 3, 4), {"c": 5}),
        ((1, 2), {"z": 1, "y": 2, "c": None}),
        ((1,), {"b": 2, "y": 1}),
    ],
)
def test_call_gives_the_model_what_it_was_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = Model()
    assert bind(model, args, kwargs).call(model) == model(*args, **kwargs)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1,), {}), ((1, 2), {"b": 3}), ((1,), {"a": 1, "c": 2})])
def test_arguments_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"do not fit Model\.forward") as error:
        bind(Model(), args, kwargs)
    assert error.value.why


def test_the_key_says_what_a_capture_depends_on() -> None:
    def key(*args: Any, **kwargs: Any) -> Any:
        return bind(Model(), args, kwargs).key()

    x = torch.ones(2, 3)
    assert key(x, 1) == key(torch.zeros(2, 3), 1)
    assert key(x, b=1) == key(x, 1)
    assert key(x, 1, z=1, y=2) == key(x, 1, y=2, z=1)
    different = [
        key(x, 1), key(x, 1.0), key(x, True), key(x, None), key(x, "1"), key(x, 1, 1), key(x, 1, y=1), key([x], 1),
        key(x.t(), 1), key(x.double(), 1), key(x[:1], 1), key(x.clone().requires_grad_(), 1),
        key(x, x), key(x, x.clone()),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


# ---------------------------------------------------------------------- table


def test_table_and_rows() -> None:
    model = nn.Sequential(linear(), nn.Sequential(*[linear() for _ in range(3)]), nn.ReLU(), linear())
    pipe = pipeline(model, (numbers(),), split_spec=before("1.2", "3"))
    assert [row["stage"] for row in rows(pipe)] == [0, 1, 2]
    assert [row["parameters"] for row in rows(pipe)] == [216, 72, 72]
    assert [row["sends"] for row in rows(pipe)] == [{1: 128}, {2: 128}, {}]
    lines = str(pipe).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["0", "0,", "1.0-1", "216", "to", "1:", "128", "B"]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "-"),
        (["a"], "a"),
        (["layers.0"], "layers.0"),
        (["layers.0", "layers.1", "layers.3"], "layers.0-1, layers.3"),
        (["a.0", "b.1", "b.2", "c"], "a.0, b.1-2, c"),
        (["x.9", "x.10", "x.11"], "x.9-11"),
        (["x.0", "norm", "x.1"], "x.0, norm, x.1"),
    ],
)
def test_ranges(names: list[str], text: str) -> None:
    assert ranges(names) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**40, "1024.0 GiB")])
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


# ---------------------------------------------------------------------- balance


def heaviest(model: nn.Module, stages: int) -> list[int]:
    pipe = pipeline(model, (numbers(),), stages=stages)
    assert pipe.num_stages == stages
    return [len(part.modules) for part in pipe.variant(pipe.example).cut.parts]


def test_equal_layers_are_shared_equally() -> None:
    assert heaviest(nn.Sequential(*[linear() for _ in range(8)]), 4) == [2, 2, 2, 2]
    assert heaviest(nn.Sequential(*[linear() for _ in range(3)]), 3) == [1, 1, 1]
    assert heaviest(nn.Sequential(linear()), 1) == [1]


def test_a_heavy_layer_stands_alone() -> None:
    model = nn.Sequential(linear(), linear(8, 800), linear(800, 8), linear(), linear())
    assert heaviest(model, 4)[1:3] == [1, 1]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_balanced_pipe_equals_the_model(stages: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), linear(8, 32), linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu_(self.up(self.norm(x))))

    @trunk(embed=linear(), blocks=nn.Sequential(*[Block() for _ in range(3)]), head=linear(8, 20))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))

    check(model, (numbers(grad=True),), stages=stages, want=stages)


def test_shared_layers_are_cut_at_one_call() -> None:
    @trunk(shared=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        for _ in range(6):
            x = self.shared(x).tanh()
        return x

    check(model, (numbers(grad=True),), stages=3, want=3)


def test_more_stages_than_layers() -> None:
    with pytest.raises(CutError, match="cannot be cut into 3 stages") as error:
        pipeline(nn.Sequential(linear(), linear()), (numbers(),), stages=3)
    assert "at most 2" in error.value.remedy
