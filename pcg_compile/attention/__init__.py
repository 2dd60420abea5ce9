"""Paged attention: the cache, the module, the ops, and one file for each implementation."""

from __future__ import annotations

from .base import AttentionImpl, AttentionShape
from .cache import PagedKVCache
from .choose import choose_impl
from .layer import PagedAttention

__all__ = ["AttentionImpl", "AttentionShape", "PagedAttention", "PagedKVCache", "choose_impl"]
