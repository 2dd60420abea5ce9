"""Chooses among implementations of attention by time.

Note [Attention by time]
"auto" begins with the first implementation that can run. Where another one is installed too, warm-up times all of them
at each bucket, on requests of up to 1,024 keys: those that a full CUDA graph holds as the graph would run them, others
with what the host does for them at every step. Attention that no full graph holds costs the step its graph as well, so
the time that the graph saves counts against it. A cache remembers what won, by shape and bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..runtime.timing import seconds_of
from .base import AttentionImpl, AttentionShape
from .cache import PagedKVCache
from .choose import candidates

__all__ = ["choose_by_time"]

#: Most keys of a request, and most tokens of a prompt, in batches that are timed.
_KEYS, _PROMPT = 1024, 1024
_CALLS = 8


def choose_by_time(
    cache: PagedKVCache, layers: Mapping[str, int], tokens: int, saved: float
) -> tuple[bool, str] | None:
    """Chooses what computes attention at a bucket; see Note [Attention by time].

    Args:
        layers: number of layers by encoded attention shape. tokens: the bucket's.
        saved: seconds of a step that a full CUDA graph saves.

    Returns:
        Whether a full CUDA graph can hold the choice, and what was measured; None where there is nothing to choose.
    """
    best: dict[str, AttentionImpl] = {}
    held: dict[str, AttentionImpl | None] = {}
    times: dict[AttentionImpl, float] = {}
    texts: list[str] = []
    for text, number in layers.items():
        shape = AttentionShape.decode(text)
        kinds, _ = candidates(shape, cache.device, cache.dtype)
        slow = {kind: reason for kind in kinds[1:] if (reason := kind.why_not_timed(shape)) is not None}
        texts += [f"{kind.name} not timed: {reason}" for kind, reason in slow.items()]
        # The others are made for this alone: their memory goes with them.
        apart = replace(cache.memory, workspaces={})
        impls = [cache.impl_named(text, kinds[0].name), *(k(shape, apart) for k in kinds[1:] if k not in slow)]
        if len(impls) > 1 and (batch := _batch(cache, tokens)) is not None:
            times |= {impl: _seconds(cache, impl, batch, number) for impl in impls}
            figures = ", ".join(f"{impl.name} {1e6 * times[impl] / number:.1f}" for impl in impls)
            texts.append(f"us a layer: {figures}; the full graph saves {1e6 * saved:.0f} us a step")
        best[text] = min(impls, key=lambda impl: times.get(impl, 0.0))
        held[text] = min((i for i in impls if i.capturable), key=lambda impl: times.get(impl, 0.0), default=None)
    if not texts:
        return None
    in_graph = {text: impl for text, impl in held.items() if impl is not None}
    total = {
        name: sum(times.get(i, 0.0) for i in some.values()) for name, some in (("best", best), ("graph", in_graph))
    }
    if len(in_graph) == len(best) and total["graph"] <= saved + total["best"]:
        best = in_graph
    for text, impl in best.items():
        cache.faster[text, tokens] = impl.name
    names = " and ".join(dict.fromkeys(impl.name for impl in best.values()))
    return all(impl.capturable for impl in best.values()), f"attention by {names} ({'; '.join(texts)})"


def _batch(cache: PagedKVCache, tokens: int) -> Batch | None:
    """Requests of one token where the bucket holds so few, else prompts; None where the cache cannot hold them."""
    requests = tokens if tokens <= cache.max_requests else -(-tokens // _PROMPT)
    requests = min(requests, cache.num_pages - 1)
    new = np.diff(np.arange(requests + 1) * tokens // requests)
    pages = min((cache.num_pages - 1) // requests, -(-max(_KEYS, int(new.max())) // cache.page_size))
    room = pages * cache.page_size
    if int(new.max()) > room:
        return None
    return Batch(new, np.maximum(new, min(_KEYS, room)), np.arange(1, 1 + requests * pages).reshape(requests, pages))


def _seconds(cache: PagedKVCache, impl: AttentionImpl, batch: Batch, layers: int) -> float:
    """Seconds that attention of some layers takes in a step. Nothing is written but what the device holds of a step."""
    shape, device, tokens = impl.shape, cache.device, batch.num_tokens
    prepared = cache.prepare(batch, (tokens, tokens, None), again=True)
    with torch.inference_mode(False), torch.no_grad():
        q = torch.randn((tokens, shape.num_heads, shape.head_dim), device=device).to(shape.dtype)
        out = torch.empty((tokens, shape.num_heads, shape.v_dim), device=device, dtype=shape.dtype)
        extra = [torch.zeros(shape.num_heads, device=device) if one in shape.extras else None for one in "sa"]
        call, plan = cache.call(0, q, out, *extra), impl.plan(prepared)

        def calls() -> None:
            for _ in range(_CALLS):
                impl.run(call, plan)

        impl.enqueue(plan)
        calls()
        timed = partial(seconds_of, None, device=device)
        if not impl.capturable:
            return timed(lambda: impl.plan(prepared)) + layers * timed(calls) / _CALLS
        return layers * timed(_captured(calls) if device.type == "cuda" else calls) / _CALLS


def _captured(calls: Callable[[], None]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls()
    graph.replay()
    return graph.replay
