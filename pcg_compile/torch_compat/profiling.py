"""Whether one of torch's profilers records (torch 2.11 to 2.13)."""

from __future__ import annotations

import torch.autograd.profiler as _profiler

from .probe import attributes

attributes("torch.autograd.profiler", "2.11 to 2.13", "_is_profiler_enabled")


def profiler_records() -> bool:
    """Whether ``torch.profiler.profile`` or ``emit_nvtx`` is running, in any thread (2.11 to 2.13)."""
    return getattr(_profiler, "_is_profiler_enabled", False)
