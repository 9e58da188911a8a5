"""The command line: `pipework demo`, `split`, `draw`, `compare`, `verify` and `search`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipework.errors import PipeworkError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, that of the process unless given; gives the exit code.

    0: all is well. 1: `verify` or the demo found a difference. 2: wrong input, said in one line on standard error.

    >>> main(["draw", "gpipe", "--ranks", "2", "--microbatches", "2"])
    rank 0  F0F1......B0--B1--
    rank 1  ..F0F1B0--B1--....
    makespan 9, span 9, bubble 33.3 %, peak per rank 2
    0
    """
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as missing:
        return _refuse(f"{missing.name} is not installed; run: pip install 'pipework[cli]'")

    from pipework.cli.app import app

    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        return int(app(given or ["--help"], prog_name="pipework", standalone_mode=False) or 0)
    except typer.TyperException as error:
        return _refuse(error.format_message())
    except PipeworkError as error:
        return _refuse(in_one_line(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130  # as shells report a process that ended on Ctrl-C


def in_one_line(error: PipeworkError) -> str:
    """All parts of an error, in one line.

    >>> in_one_line(PipeworkError("stage 2 is empty", where="model.py:3", remedy="remove one cut"))
    'stage 2 is empty (model.py:3); remove one cut'
    """
    details = "; ".join(filter(None, (error.where, error.why)))
    what = f"{error.what} ({details})" if details else error.what
    return "; ".join(filter(None, (what, error.remedy)))


def _refuse(what: str) -> int:
    print("pipework:", " ".join(what.split()), file=sys.stderr)
    return 2
