"""pcg: piecewise CUDA graphs for any PyTorch model, as a ``torch.compile`` backend."""

from __future__ import annotations

from typing import Any as _Any

from . import builtin_ops as builtin_ops  # registers the split ops that need no registration
from . import errors, integrations, lora
from .attention import PagedAttention, PagedKVCache
from .backend import pcg as _backend
from .batch import Batch
from .capture_guard import capture_guard
from .distributed.lowering import release_collectives
from .logs import read_environment as _read_environment
from .logs import trace
from .passes.padding_safety.analysis import register_row_rule
from .piecewise import piecewise
from .registry import expect, reset, stats
from .report.dump import dump
from .report.explain import Report, check, explain
from .saved_programs import load, save
from .split_ops import register_split_op, split_op
from .stats import BucketStats, Fallback, Stats
from .step import step
from .torch_compat.dynamo_wrappers import ensure_backend as _ensure_backend
from .version import __version__
from .warmup import warmup


def accelerate(model: _Any, **defaults: _Any) -> _Any:
    """Gives a model of transformers a ``generate_batch`` that runs on captured graphs; returns the model.

    See :func:`pcg_compile.integrations.transformers.generate_batch`, whose keyword arguments ``defaults`` are.

    Raises:
        OptionsError: the model cannot generate.
    """
    return integrations.transformers.accelerate(model, **defaults)


__all__ = [
    "Batch",
    "BucketStats",
    "Fallback",
    "PagedAttention",
    "PagedKVCache",
    "Report",
    "Stats",
    "__version__",
    "accelerate",
    "capture_guard",
    "check",
    "dump",
    "errors",
    "expect",
    "explain",
    "integrations",
    "load",
    "lora",
    "piecewise",
    "register_row_rule",
    "register_split_op",
    "release_collectives",
    "reset",
    "save",
    "split_op",
    "stats",
    "step",
    "trace",
    "warmup",
]

# An installed package is found by its entry point; this serves a checkout on the path.
_ensure_backend("pcg", _backend)
_read_environment()
