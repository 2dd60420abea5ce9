"""Opens paged attention: the KV write joins its piece, attention stands between pieces, metadata come first.

    out = pcg::paged_attention(q, k, v, layer, shape)

becomes

    pcg::prepare_batch(tokens, shapes)                       once, ahead of everything
    pcg::store_kv(k, v, k_cache, v_cache, slot_mapping)      caches, scales and slots come from the step
    out = empty_like(q)
    pcg::attend(q, out, layer, shape)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from pcg_compile.attention import ops as _ops
from pcg_compile.attention.base import AttentionShape
from pcg_compile.errors import BatchError, message
from pcg_compile.fx.facts import arguments_of
from pcg_compile.fx.places import place_of
from pcg_compile.fx.sizes import expr_of
from pcg_compile.step import current_step, require_step

from .context import PassContext, StepInput
from .rewriting import Rewriter

_TARGETS = (torch.ops.pcg.paged_attention, torch.ops.pcg.paged_attention.default)
_NAMES = ("q", "k", "v", "layer", "shape", "sinks", "slopes")


def prepare_batch(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Rewrites every ``pcg::paged_attention``; a graph without one stays as it is.

    Raises:
        BatchError: no step with a cache is running, so the size of its pages is unknown; a layer that the cache
            does not fit; attention layers that see different numbers of tokens, or that store other keys or values in
            one layer of the cache.
    """
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _TARGETS]
    if not calls:
        return gm
    _check_layers(calls)
    rewriter = _Attention(gm, context, _one_size(calls, context))
    shapes: dict[str, None] = {}
    for node in calls:
        shapes[rewriter.open(node)] = None
    encoded = _ops.join_shapes(list(shapes))
    rewriter.ahead_of_all(calls[0], torch.ops.pcg.prepare_batch.default, rewriter.tokens, encoded)
    context.notes.append(
        f"pcg::prepare_batch ahead of {len(calls)} attention layers: {len(shapes)} distinct shapes to plan a step"
        + rewriter.computed_by(shapes)
    )
    return rewriter.done()


def _arguments(node: fx.Node) -> list[Any]:
    given = arguments_of(node.target, node.args, node.kwargs)
    return [given.get(name) for name in _NAMES]


def _check_layers(calls: Sequence[fx.Node]) -> None:
    """Raises :class:`BatchError` where keys and values that one call stored would be overwritten by another."""
    stored: dict[int, tuple[Any, Any, fx.Node]] = {}
    for node in calls:
        _, k, v, layer, *_ = _arguments(node)
        first = stored.setdefault(layer, (k, v, node))
        if first[:2] != (k, v):
            raise BatchError(
                message(
                    f"two calls of paged attention store other keys or values in layer {layer} of the cache",
                    where=f"{place_of(first[2])} and {place_of(node)}",
                    why="Later steps would read what the last one stored.",
                    cure="Give each a layer of its own: pcg.PagedAttention(layer=i, ...), and the cache as many.",
                )
            )


def _one_size(calls: Sequence[fx.Node], context: PassContext) -> Any:
    """The number of tokens, an int or a SymInt, that all attention layers see."""
    sizes = {str(expr_of(size)): (size, node) for node in calls for size in [_rows(_arguments(node)[0], context)]}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.values())[:2]
        raise BatchError(
            message(
                f"attention layers of one model see different numbers of tokens: {one} and {other}",
                where=f"{place_of(first)} and {place_of(second)}",
                why="A step has one batch.",
            )
        )
    return next(iter(sizes.values()))[0]


def _rows(node: fx.Node, context: PassContext) -> Any:
    return context.facts[node].value.shape[0]


class _Attention(Rewriter):
    def __init__(self, gm: fx.GraphModule, context: PassContext, tokens: Any) -> None:
        super().__init__(gm, context)
        self.tokens = tokens
        state = current_step() if context.collect else require_step("compiling a model with paged attention")
        self.cache = state.require_cache() if state is not None and not context.collect else None

    def open(self, node: fx.Node) -> str:
        """Replaces one call; returns its shape."""
        q, k, v, layer, text, *extra = _arguments(node)
        value = self.facts[q].value
        shape, device = AttentionShape.decode(text), value.device
        if shape.backend != self.context.options.attention_backend:
            shape = replace(shape, backend=self.context.options.attention_backend)
            text = shape.encode()
        if self.cache is not None:
            self.cache.check(layer, shape, device)
            # A backend that cannot compute it is an error ahead of the first step.
            self.cache.impl(text)
        caches = [self._cache_input(name, layer, shape, device) for name in ("k_cache", "v_cache")]
        scales = [self._cache_input(name, layer, shape, device) for name in ("k_scale", "v_scale") if self._is_fp8()]
        slots = self.step_input(
            StepInput(
                "slot_mapping",
                lambda tokens: torch.empty(tokens, dtype=torch.int64, device=device),
                lambda state, bucket: state.slot_mapping(bucket),
                self.tokens,
                scratch=True,
            )
        )
        with self.graph.inserting_before(node):
            if not _is_contiguous(value):
                q = self.call(node, "contiguous", (q,), lambda: torch.empty(value.shape, **_options(value)))
            self.call(node, torch.ops.pcg.store_kv.default, (k, v, *caches, slots, *scales))
            if shape.v_dim == shape.head_dim:
                out = self.call(node, torch.empty_like, (q,), lambda: torch.empty(value.shape, **_options(value)))
            else:
                size = (*value.shape[:2], shape.v_dim)
                rows = self.size_node(value.shape[0])
                args = (q, (rows, shape.num_heads, shape.v_dim))
                out = self.call(node, "new_empty", args, lambda: torch.empty(size, **_options(value)))
            self.call(node, torch.ops.pcg.attend.default, (q, out, layer, text, *_given(extra)))
        # It may be the next layer's query as it is.
        self.facts[out] = self.facts[node]
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        return str(text)

    def computed_by(self, shapes: Iterable[str]) -> str:
        """What computes attention in the step's cache, and why it is not something faster."""
        if self.cache is None:
            return ""
        names = sorted({type(self.cache.impl(text)).__name__ for text in shapes})
        reasons = sorted({self.cache.reasons[text] for text in shapes if text in self.cache.reasons})
        return f", by {' and '.join(names)}" + (f" ({'; '.join(reasons)})" if reasons else "")

    def _cache_input(self, name: str, layer: int, shape: AttentionShape, device: torch.device) -> fx.Node:
        """One layer's keys, values or scales, which the step's cache has."""
        # Traced by pcg.check() outside a step, any number of slots does.
        slots = self.cache.num_pages * self.cache.page_size if self.cache is not None else 32
        width = shape.head_dim if name == "k_cache" else shape.v_dim
        size: tuple[int, ...] = (slots, shape.num_kv_heads, width)
        dtype = torch.uint8 if self._is_fp8() else shape.dtype
        if name in ("k_scale", "v_scale"):
            size, dtype = (shape.num_kv_heads,), torch.float32

        def get(state: Any, bucket: int) -> torch.Tensor:
            cache = state.require_cache()
            cache.check(layer, shape, device)
            found: torch.Tensor = getattr(cache, {"k_cache": "flat_k", "v_cache": "flat_v"}.get(name, name))[layer]
            return found

        fake = lambda tokens: torch.empty(size, dtype=dtype, device=device)
        return self.step_input(StepInput(f"{name}_{layer}", fake, get, self.tokens))

    def _is_fp8(self) -> bool:
        return self.cache is not None and self.cache.k_scale is not None


def _given(extra: Sequence[Any]) -> Sequence[Any]:
    """Optional arguments up to the last one that is given."""
    return extra if extra[-1] is not None else extra[:-1] if extra[0] is not None else ()


def _options(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": value.dtype, "device": value.device}


def _is_contiguous(value: torch.Tensor) -> bool:
    """Whether rows lie one after the other, read from the strides so that no guard on a size is made."""
    heads, head_dim = value.shape[1], value.shape[2]
    return tuple(value.stride()[1:]) == (head_dim, 1) and str(value.stride(0)) == str(heads * head_dim)
