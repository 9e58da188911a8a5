from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest

import pipework


def run(code: str) -> Any:
    """What `code` prints as JSON in a Python process of its own."""
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("module", ["pipework", "pipework.errors", "pipework.plan", "pipework.show"])
def test_does_not_import_torch(module: str) -> None:
    assert (
        run(f"import json, sys, {module}; print(json.dumps([n for n in sys.modules if n.startswith('torch')]))") == []
    )


def test_import_costs_little_more_than_starting_python() -> None:
    # Both are CPU time of one process, so a busy machine changes neither. Measured: 1.1; with torch it would be 60.
    code = "import time; start = time.process_time(); import pipework; print(time.process_time() / start - 1)"
    assert min(run(code) for _ in range(3)) < 4


@pytest.mark.parametrize("name", pipework.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    value = getattr(pipework, name)
    assert vars(pipework)[name] is value  # asked for once only
    if name != "__version__":
        assert inspect.getdoc(value)


def test_the_three_lists_of_names_agree() -> None:
    assert sorted(pipework.__all__) == sorted([*pipework._HOME_OF, "schedules", "__version__"])
    assert set(pipework.__all__) <= set(dir(pipework))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'pipework' has no attribute 'pipelin'"):
        _ = pipework.pipelin  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "first",
    [
        "pass",
        "import pipework.verify",
        "import pipework.verify as v",
        "from pipework.verify import verify",
        "pipework.verify; import pipework.verify",
        "import importlib; importlib.import_module('pipework.verify')",
    ],
)
def test_verify_is_the_function_however_it_is_reached(first: str) -> None:
    assert run(f"import pipework; {first}; print('[\"' + type(pipework.verify).__name__ + '\"]')") == ["function"]


def test_verify_can_be_pickled_and_its_module_be_reached() -> None:
    assert isinstance(pipework.verify, FunctionType)
    assert pickle.loads(pickle.dumps(pipework.verify)) is pipework.verify
    assert isinstance(sys.modules["pipework.verify"], ModuleType)
