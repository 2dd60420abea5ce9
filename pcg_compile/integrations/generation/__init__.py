"""Continuous batching for transformers models: scheduler, sampler and loop behind ``generate_batch``."""

from __future__ import annotations

from .engine import Engine
from .generate import accelerate, generate_batch
from .requests import Request, Sampling
from .session import Session

__all__ = ["Engine", "Request", "Sampling", "Session", "accelerate", "generate_batch"]
