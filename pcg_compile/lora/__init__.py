"""LoRA: many adapters in one batch."""

from __future__ import annotations

from .pool import AdapterPool
from .route import Routing, route

__all__ = ["AdapterPool", "Routing", "route"]
