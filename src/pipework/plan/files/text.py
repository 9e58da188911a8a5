"""Reading and writing text, bounded in size and with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from pipework.errors import InputError, ScheduleError

File = str | os.PathLike[str] | IO[Any]

LARGEST = 2**24  # bytes: about ten for each of as many actions as there may be
MANY = 2_000_000  # actions, or needs between them: what can be gone through in seconds
STAGES = 100_000


def name_of(file: File) -> str:
    """What to call the file in an error."""
    if isinstance(file, str | os.PathLike):
        return str(file)
    return str(getattr(file, "name", "the text"))


def read(file: File) -> str:
    """The file's text; raises InputError if it cannot be read, and ScheduleError if no schedule can be in it."""
    try:
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:
                found: str | bytes = opened.read(LARGEST + 1)
        else:
            found = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, a text file that is not UTF-8, a closed one
        raise InputError(
            f"cannot read {name_of(file)!r}: {error}", remedy="name a file that exists and is text"
        ) from error
    if len(found) > LARGEST:
        raise ScheduleError(
            "the file is too large for a schedule", where=name_of(file), why=f"it has more than {LARGEST} bytes"
        )
    if isinstance(found, str):
        return found
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScheduleError(
            "the file is not text in UTF-8",
            where=f"{name_of(file)}, byte {error.start}",
            remedy="give a file that pipework or torch wrote",
        ) from error


def write(file: File, text: str) -> None:
    """Write the text; raises InputError if that is not possible."""
    try:
        if isinstance(file, str | os.PathLike):
            Path(file).write_text(text, encoding="utf-8", newline="")
        else:
            file.write(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write {name_of(file)!r}: {error}", remedy="name a file in a folder that exists"
        ) from error
