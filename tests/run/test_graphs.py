"""What of whole-step graphs needs no GPU: what is refused. The rest is in tests/end_to_end/test_gpu_graphs.py."""

from __future__ import annotations

from typing import Any

import pytest

from pipework import InputError
from tests.gloo import GlooPool
from tests.models import WIDTH, numbers
from tests.run.pipes import piped, runner_of, sequence


def refusal(group: Any, rank: int) -> str:
    runner = runner_of(piped(sequence(), "2"), group=group, graphs=True)
    with pytest.raises(InputError) as caught:
        runner.step(numbers(8, WIDTH), target=numbers(8, WIDTH))
    return str(caught.value)


def test_a_model_on_the_cpu(gloo_pool: GlooPool) -> None:
    for said in (refusal(None, 0), *gloo_pool.run(refusal)):
        assert "graphs=True, and this process works on cpu" in said
        assert "move the model to the process's GPU" in said
