"""A model far larger than memory: built on the meta device, cut, and laid on ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, GIB = 60.0, 4.0

CODE = """
import time
import torch, transformers
import pipework

config = transformers.LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
    vocab_size=128256, use_cache=False,
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(1, 4096, dtype=torch.long)
begin = time.perf_counter()
{cut}
runner = pipework.Runner(pipe, pipework.schedules.one_f_one_b(pipe.layout(ranks=8), microbatches=16))
seconds = time.perf_counter() - begin
assert pipe.num_stages == 8
assert sum(p.numel() for p in runner.parameters()) == sum(p.numel() for p in model.parameters()) > 70e9
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(seconds, peak / 2**20)
"""
CUTS = {
    "balanced": 'pipe = pipework.pipeline(model, (), {"input_ids": ids}, stages=8)',
    "named": """
spec = {f"model.layers.{i}": pipework.SplitPoint.BEGINNING for i in range(10, 80, 10)}
pipe = pipework.pipeline(model, (), {"input_ids": ids}, split_spec=spec)
""",
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux tells it")
@pytest.mark.parametrize("how", CUTS)
def test_a_llama_of_70_billion_parameters_is_cut_into_8_stages(how: str) -> None:
    pytest.importorskip("transformers")
    code = CODE.replace("{cut}", CUTS[how])
    called = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=140)
    assert called.returncode == 0, called.stderr
    seconds, gib = map(float, called.stdout.split())
    assert seconds < SECONDS
    assert gib < GIB
