"""The examples in the docstrings see torch and pipework, as a user's session does."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def names_of_a_session(doctest_namespace: dict[str, Any]) -> None:
    """What `import pipework, torch` gives."""
    import torch

    import pipework

    doctest_namespace.update(torch=torch, pipework=pipework)
