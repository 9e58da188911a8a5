"""What every test stands on: one thread per process, no network, the same examples on every run."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads, here and in every process a test starts; read when torch loads
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # never depends on how this machine's own name resolves

import pytest
from hypothesis import HealthCheck, settings

from tests.gloo import GlooPool

# The same examples on every run. To look for new ones: pytest --hypothesis-profile=explore
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Four processes over Gloo: `gloo_pool.run(function, *args, ranks=2)`."""
    pool = GlooPool(ranks=4)
    yield pool
    pool.close()
