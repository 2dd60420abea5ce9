"""Whether one of torch's profilers records (torch 2.11 to 2.13)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.autograd.profiler as _profiler
from torch.profiler import record_function

from .probe import attributes

attributes("torch.autograd.profiler", "2.11 to 2.13", "_is_profiler_enabled")


def profiler_records() -> bool:
    """Whether ``torch.profiler.profile`` or ``emit_nvtx`` is running, in any thread (2.11 to 2.13)."""
    return getattr(_profiler, "_is_profiler_enabled", False)


def in_range(name: str) -> AbstractContextManager[object]:
    """A range of the running profiler; nothing where none records."""
    return record_function(name) if profiler_records() else nullcontext()
