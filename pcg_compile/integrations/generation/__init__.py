"""Continuous batching for transformers models: scheduler, sampler and loop behind ``generate_batch``."""

from __future__ import annotations

from .engine import Engine, Session
from .generate import accelerate, generate_batch
from .scheduler import Request, Sampling

__all__ = ["Engine", "Request", "Sampling", "Session", "accelerate", "generate_batch"]
