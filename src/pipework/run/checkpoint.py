"""Weights from safetensors files: each process reads the tensors of its own stages, and of the others only the headers.

    model-00001-of-00002.safetensors   [header][ embed ][ layers.0 ][ layers.1 ]      process 0 reads embed, layers.0
    model-00002-of-00002.safetensors   [header][ layers.2 ][ layers.3 ][ head ]       and both headers

From the headers every process knows the name, shape and dtype of every tensor, so that all of them find the same faults
and cut the model alike.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipework.errors import InputError, nearest
from pipework.run.materialise import (
    Initialize,
    Slot,
    blank,
    chosen,
    filled,
    moved,
    put,
    refuse_valueless_attributes,
    slots,
    stages_of,
    tensors_in,
)
from pipework.split.pipe import Pipe

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is stored, and as what; `dtype` is None for what is no floating-point number to torch."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def load(
    pipe: Pipe,
    held: Sequence[nn.Module],
    path: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype | None,
    function: Initialize | None,
    strict: bool,
    seed: int,
) -> None:
    """Read the parameters and persistent buffers of the stages `held`, and fill in the rest; see `Runner.load`."""
    known, used, own = slots(pipe.model), tensors_in(stages_of(pipe)), tensors_in(held)
    found = stored(path)
    matches = _matched(path, known, used, found, strict)
    unsaved = [s for s in known if id(s.tensor) in used and s.tensor.is_meta and id(s.tensor) not in matches]
    filler = chosen(pipe, unsaved, function)
    new: dict[int, torch.Tensor] = {}
    for slot in known:
        old, match = slot.tensor, matches.get(id(slot.tensor))
        if old.is_meta and match is not None:
            wanted = (dtype or match.dtype or old.dtype) if old.is_floating_point() else old.dtype
            if id(old) in own:
                new[id(old)] = blank(old, device, wanted)
            elif wanted != old.dtype:  # so that every process cuts the model as it is on the others
                new[id(old)] = blank(old, old.device, wanted)
    _read({id(s.tensor): new.get(id(s.tensor), s.tensor) for s in known if id(s.tensor) in own}, matches)
    new |= filled(pipe.model, [s for s in unsaved if id(s.tensor) in own], held, filler, device, seed)
    put(pipe, moved(held, device) | new)
    refuse_valueless_attributes(held)
    if any(id(s.tensor) in new and new[id(s.tensor)].dtype != s.tensor.dtype for s in known):
        pipe.forget()


def stored(path: str | PathLike[str]) -> dict[str, Stored]:
    """What is stored under each name, read from the headers of a file, or of the files of a directory.

    A directory has `model.safetensors.index.json`, which lists files, or `model.safetensors`. Raises `InputError` for
    what is not there or is no such file.
    """
    found: dict[str, Stored] = {}
    for file in _files(Path(path)):
        with _opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is no dict)
                kept = reader.get_slice(name)
                found[name] = Stored(name, file, tuple(kept.get_shape()), _FLOATS.get(kept.get_dtype()))
    return found


def _files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        listed = json.loads(index.read_text())["weight_map"]
        return [path / name for name in sorted(set(listed.values()))]
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there are no weights at {str(path)!r}",
            why=f"it has neither {INDEX} nor {WHOLE}" if path.is_dir() else "there is no such file",
            remedy="pass a directory that has one of the two, or a .safetensors file",
        )
    return [file]


def _opened(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(
            "the package safetensors is not installed",
            why="weights are read from its files",
            remedy="run: pip install 'pipework[hf]'",
        ) from error
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(file)!r} could not be read", why=f"{type(error).__name__}: {error}") from error


def _matched(
    path: str | PathLike[str], known: Sequence[Slot], used: set[int], found: Mapping[str, Stored], strict: bool
) -> dict[int, Stored]:
    """What is stored for each tensor, by the tensor's id: a tied one is stored under any of its names."""
    saved = [slot for slot in known if slot.saved]
    stored_as = {id(slot.tensor): next((found[name] for name in slot.names if name in found), None) for slot in saved}
    matches = {key: match for key, match in stored_as.items() if match is not None}
    names = {name for slot in saved for name in slot.names}
    unexpected = sorted(found.keys() - names)
    missing = [s.names[0] for s in saved if id(s.tensor) in used and id(s.tensor) not in matches]
    faults = [f"not stored: {_beside(missing, unexpected)}"] if missing else []
    if strict and unexpected:
        faults.append(f"not in the model: {_beside(unexpected, missing)}")
    other = [(s, m) for s in saved if (m := matches.get(id(s.tensor))) and m.shape != tuple(s.tensor.shape)]
    if other:
        shapes = [f"{m.name!r} is {m.shape}, in the model {tuple(s.tensor.shape)}" for s, m in other]
        faults.append(f"of another shape: {_listed(shapes)}")
    if faults:
        raise InputError(
            f"the weights at {str(path)!r} do not fit the model",
            why="; ".join(faults),
            remedy="load what was saved from this model; with strict=False names that it does not have are passed over",
        )
    return matches


def _listed(things: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(things[:4]) + (f", and {len(things) - 4} more" if len(things) > 4 else "")


def _beside(names: Sequence[str], others: Collection[str]) -> str:
    return _listed([repr(name) + (nearest(name, others) if place < 4 else "") for place, name in enumerate(names)])


def _read(targets: Mapping[int, torch.Tensor], matches: Mapping[int, Stored]) -> None:
    """Copy what is stored into the tensors, file by file, one tensor at a time."""
    wanted = sorted(((matches[key], target) for key, target in targets.items() if key in matches), key=_place)
    for file in dict.fromkeys(match.file for match, _ in wanted):
        with _opened(file) as reader, torch.no_grad():
            for match, target in wanted:
                if match.file == file:
                    target.copy_(reader.get_tensor(match.name))


def _place(wanted: tuple[Stored, torch.Tensor]) -> tuple[Path, str]:
    return wanted[0].file, wanted[0].name
