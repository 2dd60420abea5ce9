"""What pcg logs, and where to: the logger ``pcg_compile``, a trace of torch's profiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["read_environment", "trace"]

_LOG = logging.getLogger("pcg_compile")
_LEVELS = ("debug", "info", "warning", "error")


def read_environment() -> None:
    """Has the logger ``pcg_compile`` print to standard error from the level on that ``PCG_LOG`` names."""
    level = os.environ.get("PCG_LOG", "").lower()
    if not level:
        return
    if level not in _LEVELS:
        _LOG.warning("PCG_LOG=%s is ignored: it is one of %s", level, ", ".join(_LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s pcg %(levelname)s: %(message)s", "%H:%M:%S"))
    _LOG.addHandler(handler)
    _LOG.setLevel(level.upper())
    # The root logger's handlers would print each line once more.
    _LOG.propagate = False


@contextmanager
def trace(path: str | Path) -> Iterator[torch.profiler.profile]:
    """Records what runs inside to a file that ``ui.perfetto.dev`` and ``chrome://tracing`` open.

    Each step, replay and split op is a range with its size and bucket, or its module.

    Args:
        path: of the file to write, ``.json`` or ``.json.gz``.

    Returns:
        A context manager that gives the running ``torch.profiler.profile``.
    """
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profiler:
        yield profiler
        if on_gpu:
            # Kernels that have not run when the profiler stops are not in the trace.
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
