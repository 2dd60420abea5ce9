"""LoRA: many adapters in one batch."""

from __future__ import annotations

from .route import Routing, route

__all__ = ["Routing", "route"]
