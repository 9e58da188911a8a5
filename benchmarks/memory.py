"""What a rank takes of a model larger than it should hold: memory, and tensors read from disk.

    python -m benchmarks.memory [--layers 38] [--width 2048]

A model of linear layers is saved in several safetensors files. Two processes build it on the meta device, cut it in
two, and each loads its stage. Memory is resident memory (of Linux) above that before loading.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

import pipework
from benchmarks.ranks import on_ranks
from benchmarks.results import Result

CLAIM = "MiB of each rank when two ranks load a model cut in two: its own share, and nothing of the other's."
MIB = 2**20


def model(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def write(folder: Path, layers: int, width: int, files: int) -> None:
    """The model's weights in files that each rank needs a part of, one file in memory at a time."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        own = {f"{layer}.weight": torch.randn(width, width) * width**-0.5 for layer in range(number, layers, files)}
        save_file(own, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def status(key: str) -> float:
    """MiB of this process: VmHWM (peak) or VmRSS (now) of resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


class Counted:
    """`safetensors.safe_open`, noting what is read."""

    read: ClassVar[dict[str, int]] = {}
    opens: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = Counted.opens(*args, **kwargs)

    def __enter__(self) -> Counted:
        self.file.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.file.__exit__(*args)

    def keys(self) -> list[str]:
        return self.file.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        Counted.read[name] = tensor.nbytes
        return tensor


def on_rank(group: dist.ProcessGroup, folder: str, layers: int, width: int) -> dict[str, Any]:
    import safetensors

    Counted.opens, safetensors.safe_open = safetensors.safe_open, Counted  # type: ignore[misc, assignment]
    with torch.device("meta"):
        whole = model(layers, width)
    pipe = pipework.pipeline(whole, (torch.empty(1, width),), stages=2)
    schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=2), microbatches=2)
    runner = pipework.Runner(pipe, schedule, loss=nn.functional.mse_loss, group=group)
    before, peak_before = status("VmRSS"), status("VmHWM")
    runner.load(folder)
    found = {
        "own": sum(p.nbytes for p in runner.parameters()) / MIB,
        "whole": sum(p.nbytes for p in whole.parameters()) / MIB,
        "read": sum(Counted.read.values()) / MIB,
        "tensors": sorted(Counted.read),
        "peak": status("VmHWM") - before,
        "after": status("VmRSS") - before,
    }
    assert status("VmHWM") > peak_before, "the peak was made by something else"
    assert runner.step(torch.ones(2, width), target=torch.zeros(2, width)).isfinite()
    return found


def benchmark(layers: int = 38, width: int = 2048, files: int = 5) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), layers, width, files)
        ranks = on_ranks(on_rank, folder, layers, width)
    keys = ("whole", "own", "read", "peak", "after")
    rows = [
        [str(rank), *(f"{found[key]:.0f}" for key in keys), f"{len(found['tensors'])} of {layers}"]
        for rank, found in enumerate(ranks)
    ]
    columns = ["rank", "the model", "its stage", "read", "peak while loading", "held afterwards", "tensors read"]
    assert not set(ranks[0]["tensors"]) & set(ranks[1]["tensors"])
    return Result("memory", CLAIM, columns, rows, {"layers": layers, "width": width, "files": files, "ranks": ranks})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=38)
    parser.add_argument("--width", type=int, default=2048)
    given = parser.parse_args()
    benchmark(given.layers, given.width).write()


if __name__ == "__main__":
    main()
