"""What importing costs: `import pipework` in a fresh process, beside starting Python and beside `import torch`.

python -m benchmarks.imports [--repeats 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

from benchmarks.results import Result, alternated, milliseconds

CLAIM = "Milliseconds of an import in a fresh process, beside the start of Python; below 100 is wanted, without torch."
CODE = """
import sys, time
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin, "torch" in sys.modules)
"""
MODULES = ("pipework", "pipework.plan", "pipework.show", "torch")


def imported(module: str) -> tuple[float, bool]:
    """Seconds, and whether torch is there afterwards."""
    called = subprocess.run(
        [sys.executable, "-c", CODE.format(module=module)], check=True, capture_output=True, text=True
    )
    seconds, torch_too = called.stdout.split()
    return float(seconds), torch_too == "True"


def benchmark(repeats: int = 15) -> Result:
    torch_too = {module: imported(module)[1] for module in MODULES}  # and the files are in the cache from here on
    times = alternated(
        {module: partial(lambda m: imported(m)[0], module) for module in MODULES}, repeats, say=lambda line: None
    )
    rows = [
        [f"`import {module}`", milliseconds(found), f"{max(found) * 1e3:.1f}", "yes" if torch_too[module] else "no"]
        for module, found in times.items()
    ]
    data = {"repeats": repeats, "seconds": times, "imports torch": torch_too}
    return Result("imports", CLAIM, ["what", "median", "greatest", "imports torch"], rows, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    benchmark(parser.parse_args().repeats).write()


if __name__ == "__main__":
    main()
