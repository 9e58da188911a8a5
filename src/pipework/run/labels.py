"""The instructions of a step by their text, such as `2F0` and `send 2F0>3`, in the profile that is being made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from pipework.split.torch_private import makes_nvtx_ranges, profiler_is_on

Label = Callable[[object], AbstractContextManager[object]]
"""Whatever happens in the block it gives is labelled with the text of the object."""


def labels() -> Label | None:
    """How to label in the profile that this thread makes, or another that sees this one; None if there is none.

    `torch.profiler` shows labels of the threads it sees: the one that it was started on, and all with
    `experimental_config=torch.profiler._ExperimentalConfig(profile_all_threads=True)`. Inside
    `torch.autograd.profiler.emit_nvtx()` they are NVTX ranges, on all ranks that are threads too. Its traces have them
    as they are; its tables take `2F0` for a name of C++ that is two letters long, and write `F0`.
    """
    if not profiler_is_on():
        return None
    return _nvtx_range if makes_nvtx_ranges() else _record_function


def _record_function(what: object) -> AbstractContextManager[object]:
    return torch.profiler.record_function(str(what))


def _nvtx_range(what: object) -> AbstractContextManager[object]:
    # `record_function` would add a number of its own to the text, and be silent on threads that do not emit.
    return torch.cuda.nvtx.range(str(what))
