"""Run the zoo: `python -m tests.zoo [--processes N] [--only PATTERN] [--again]`; goes on where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "zoo.jsonl"
COVERAGE = ROOT / "docs" / "coverage.md"
SECONDS = 120  # of processor time for one model
PATIENCE = 10 * SECONDS  # for one that hangs


def main() -> None:
    """Run what has no result yet, then print and write down what became of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="a regular expression: run these classes, again if need be")
    parser.add_argument("--retry", action="store_true", help="run again what did not pass")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--coverage", type=Path, default=COVERAGE)
    options = parser.parse_args()

    import torch
    import transformers

    from tests.zoo.catalogue import catalogue
    from tests.zoo.report import summary, table, written
    from tests.zoo.trial import Result, preload

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    preload()
    if options.again:
        options.results.unlink(missing_ok=True)
    options.results.parent.mkdir(exist_ok=True)
    state = f"{_commit()}, transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    known = _known(options.results)
    entries = catalogue()
    passed = {name for name, result in known.items() if not options.retry or result.get("train") == "right"}
    todo = [e for e in entries if (re.search(options.only, e.name) if options.only else e.name not in passed)]
    with options.results.open("a") as file:
        for number, result in enumerate(_each(todo, options.processes), 1):
            told = Result(**result | {"state": state})
            print(f"{number}/{len(todo)} {told.line()}", flush=True)
            file.write(json.dumps(dataclasses.asdict(told)) + "\n")
            file.flush()
    known = _known(options.results)
    results = [Result(**known[e.name]) for e in entries if e.name in known]
    options.coverage.write_text(written(results, len(entries)))
    print(table(results))
    print(summary(results))


def _commit() -> str:
    """The commit that is tried, and whether what is tried differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "src", "tests/zoo", "tests/split/equality.py")
    return f"commit {git('rev-parse', '--short', 'HEAD') or 'unknown'}{' with changes' if changed else ''}"


def _known(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


@dataclasses.dataclass(slots=True)
class _Running:
    """A model at work in a process of its own, and what was last heard of it."""

    process: Any
    start: float
    told: dict[str, Any]


def _each(entries: Sequence[Any], processes: int) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(entries))
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            entry = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(entry, theirs))
            process.start()
            theirs.close()
            running[ours] = _Running(process, time.monotonic(), {"name": entry.name, "kind": entry.kind})
        ready = wait(list(running), timeout=1)
        for end, one in list(running.items()):
            try:
                if end in ready:
                    one.told = end.recv()
                    continue
                why = f"hung for {PATIENCE} s" if time.monotonic() - one.start > PATIENCE else ""
            except EOFError:
                why = "" if one.told.get("seconds") else _end_of(one.process)
            if end not in ready and not why:
                continue
            if why:
                one.process.kill()
                own = one.told.get("own")
                one.told.update({"pipe": "crashed", "reason": why} if own == "right" else {"own": why})
            one.process.join()
            end.close()
            del running[end]
            yield one.told


def _end_of(process: Any) -> str:
    process.join()
    killed = process.exitcode == -signal.SIGXCPU
    return f"took longer than {SECONDS} s of processor time" if killed else "its process died"


def _child(entry: Any, end: Connection) -> None:
    """Tell what is known once the model itself ran, and again when all is done."""
    import torch

    from tests.zoo import trial

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    try:
        for result in trial.tried(entry):
            end.send(dataclasses.asdict(result))
    except BaseException as error:
        failed = trial.Result(entry.name, entry.kind, own="right", pipe="crashed", seconds=1, reason=repr(error)[:500])
        end.send(dataclasses.asdict(failed))


if __name__ == "__main__":
    main()
