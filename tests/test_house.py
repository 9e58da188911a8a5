"""The rules of the house, read off the source: who may import whom, who may touch what, how long things may be."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
TORCH_PRIVATE = "pipework.split.torch_private"  # the one module that may touch private names of torch

LAYERS = ["errors", "plan", "show", "split", "run", "verify"]  # each may import itself and what stands left of it
SHELLS = ["cli", "compat", "demo", "integrations", "testing"]  # stand above all layers
PURE = ["errors", "plan", "show"]  # the standard library is enough for them
SOLVER = "pipework.plan.solver"  # the one module that may use OR-tools, an extra, once a function of it is called

LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 70  # its docstring not counted

Found = Iterator[tuple[int, str]]
Rule = Callable[[str, ast.Module], Found]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """`plan` for pipework.plan.rules; empty for the package itself, which offers all layers to the user."""
    return ".".join(module.split(".")[1:2])


def imports(tree: ast.Module) -> Found:
    """The line and the full name of everything imported anywhere, in functions and under `if` too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(names=names):
                start = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in names)
            case ast.Call(args=[ast.Constant(value=str(name))]) if "import" in ast.unparse(node.func):
                yield node.lineno, name  # import_module("torch.distributed")
            case _:
                pass


def layers(module: str, tree: ast.Module) -> Found:
    own = layer_of(module)
    if not own:
        return
    if own not in LAYERS + SHELLS:
        yield 1, f"{own} is not a layer"
        return
    allowed = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else LAYERS + SHELLS
    for line, name in imports(tree):
        if name.startswith("."):
            yield line, f"{name}: write the import in full"
        elif name.split(".")[0] == "pipework" and layer_of(name) not in allowed:
            yield line, f"{own} imports {name}, which does not stand left of it"


def pure(module: str, tree: ast.Module) -> Found:
    if layer_of(module) in PURE:
        for line, name in imports(tree):
            if name.split(".")[0] == "ortools" and module == SOLVER:
                continue
            if name.split(".")[0] not in {"", "pipework", *sys.stdlib_module_names}:
                yield line, f"{layer_of(module)} imports {name}"


def split_knows_no_ranks(module: str, tree: ast.Module) -> Found:
    if layer_of(module) == "split":
        for line, name in [*imports(tree), *attributes(tree)]:
            if name.startswith("torch.distributed"):
                yield line, f"split uses {name}"


def attributes(tree: ast.Module) -> Found:
    """Every dotted name that is written out, and the second argument of getattr and its like as `?.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield (
                node.lineno,
                ast.unparse(node) if isinstance(node.value, ast.Name | ast.Attribute) else f"?.{node.attr}",
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr", "delattr"}:
            match node.args[1:2]:
                case [ast.Constant(value=str(name))]:
                    yield node.lineno, f"?.{name}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def own_private_names() -> set[str]:
    """Private names that pipework itself defines: as a function, class, variable, field or attribute of self."""
    names = {"_make", "_replace", "_asdict", "_fields", "_getframe", "_exit"}  # documented: of namedtuples, sys and os
    for path in FILES:
        if module_of(path) == TORCH_PRIVATE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


def private_torch(module: str, tree: ast.Module) -> Found:
    """No private name of torch. Whose an attribute is cannot be read off, so: none that pipework does not define."""
    if module == TORCH_PRIVATE:
        return
    own = own_private_names()
    for line, name in imports(tree):
        if name.split(".")[0] == "torch" and any(map(is_private, name.split("."))):
            yield line, f"private name of torch: {name}"
    for line, name in attributes(tree):
        if any(is_private(part) and part not in own for part in name.split(".")[1:]):
            yield line, f"private name that is not pipework's: {name}"


def only_layout_steps_stages(module: str, tree: ast.Module) -> Found:
    if module == "pipework.plan.layout":
        return
    for node in ast.walk(tree):
        match node:
            case (
                ast.BinOp(left=side, op=ast.Add() | ast.Sub(), right=ast.Constant(value=1))
                | ast.BinOp(left=ast.Constant(value=1), op=ast.Add(), right=side)
                | ast.AugAssign(target=side, op=ast.Add() | ast.Sub(), value=ast.Constant(value=1))
            ) if ast.unparse(side).split(".")[-1] == "stage":
                yield node.lineno, f"{ast.unparse(node)}: ask the layout which stage comes next"


def short(module: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = ast.get_docstring(node, clean=False)
            first = node.body[0] if documentation is None else node.body[1] if len(node.body) > 1 else node
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                yield node.lineno, f"{node.name} is {lines} lines long"


RULES: list[Rule] = [layers, pure, split_knows_no_ranks, private_torch, only_layout_steps_stages, short]


@pytest.mark.parametrize("rule", RULES)
def test_the_source_keeps(rule: Rule) -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {message}"
        for path in FILES
        for line, message in rule(module_of(path), ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    assert {str(path): lines for path in FILES if (lines := len(path.read_text().splitlines())) > LINES_OF_A_FILE} == {}


LONG = "def long():\n" + "    pass\n" * (LINES_OF_A_FUNCTION + 1)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (layers, "pipework.plan.rules", "from pipework.split import pipeline"),
        (layers, "pipework.plan.rules", "from pipework import verify"),
        (layers, "pipework.split.cut", "import pipework"),
        (layers, "pipework.split.cut", "def f():\n    if x:\n        import pipework.run.runner"),
        (layers, "pipework.run.runner", "importlib.import_module('pipework.cli')"),
        (layers, "pipework.run.runner", "from ..cli import main"),
        (layers, "pipework.tools", ""),
        (pure, "pipework.plan.rules", "import numpy as np"),
        (pure, "pipework.show.text", "from torch import Tensor"),
        (pure, "pipework.plan.search", "from ortools.sat.python import cp_model"),
        (split_knows_no_ranks, "pipework.split.cut", "from torch import distributed"),
        (split_knows_no_ranks, "pipework.split.cut", "torch.distributed.barrier()"),
        (private_torch, "pipework.split.cut", "from torch._C import x"),
        (private_torch, "pipework.split.cut", "from torch.overrides import _get_current_function_mode"),
        (private_torch, "pipework.split.cut", "torch._C._get_tracing_state()"),
        (private_torch, "pipework.split.cut", "f(module)._forward_hooks.clear()"),
        (private_torch, "pipework.split.cut", "getattr(tensor, '_base')"),
        (private_torch, "pipework.split.cut", "import_module('torch._functorch.vmap')"),
        (only_layout_steps_stages, "pipework.plan.rules", "following = action.stage + 1"),
        (only_layout_steps_stages, "pipework.plan.rules", "stage -= 1"),
        (only_layout_steps_stages, "pipework.plan.rules", "f(1 + stage)"),
        (short, "pipework.plan.rules", LONG),
    ],
)
def test_the_rules_catch(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


def test_the_rules_let_through() -> None:
    lines = [
        "import torch.nn",
        "from pipework.plan import Action",
        "self.stages + 1",
        "f.__call__",
        "pair._replace(a=1)",
    ]
    source = "\n".join(lines)
    assert [list(rule("pipework.run.runner", ast.parse(source))) for rule in RULES] == [[]] * len(RULES)


def test_private_names_of_torch_exist() -> None:
    module = importlib.import_module(TORCH_PRIVATE)  # fails by itself if a name that it imports is gone
    text = Path(str(module.__file__)).read_text()
    things = [
        torch.Tensor,
        torch.UntypedStorage,
        torch.nn.Module(),
        torch.ops.aten,
        torch.ops.aten.add.Tensor,
        torch.ops.aten,
        torch,
        torch.utils.checkpoint,
        torch.autograd.profiler,
    ]
    things += [torch.distributed.ProcessGroup, torch.distributed.ProcessGroupGloo._Options()]
    things += [torch.compile(print), torch.compile(torch.nn.Linear(1, 1)), torch.compiler.disable(print)]
    things += [module.compiler()]
    owners = [*things, *vars(module).values()]
    used = [name for _, dotted in attributes(ast.parse(text)) for name in dotted.split(".")[1:] if is_private(name)]
    quoted = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    used += [name for name in quoted if isinstance(name, str) and re.fullmatch(r"_\w+", name)]
    assert [name for name in used if not any(hasattr(owner, name) for owner in owners)] == []
