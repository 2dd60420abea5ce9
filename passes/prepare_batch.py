"""Opens paged attention: the KV write joins its piece, attention stands between pieces, metadata come first.

    out = pcg::paged_attention(q, k, v, layer, shape)

becomes

    pcg::prepare_batch(tokens, shapes)                       once, ahead of everything
    pcg::store_kv(k, v, k_cache, v_cache, slot_mapping)      caches and slots come from the step
    out = empty_like(q)
    pcg::attend(q, out, layer, shape)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from pcg_compile.attention import ops as _ops
from pcg_compile.attention.base import AttentionShape
from pcg_compile.batch import current_step, require_step
from pcg_compile.errors import BatchError, message
from pcg_compile.graph.facts import NodeFacts
from pcg_compile.graph.scalars import expr_of
from pcg_compile.graph.where import place_of
from pcg_compile.torch_internals import expression_nodes, fake_mode_of

from .context import PassContext, StepInput

__all__ = ["prepare_batch"]

_TARGETS = (torch.ops.pcg.paged_attention, torch.ops.pcg.paged_attention.default)
_NAMES = ("q", "k", "v", "layer", "shape")


def prepare_batch(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Rewrites every ``pcg::paged_attention``; a graph without one stays as it is.

    Raises:
        BatchError: no step with a cache is running, so that the size of its pages is unknown; a layer that the cache
            does not fit; attention layers that see different numbers of tokens.
    """
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _TARGETS]
    if not calls:
        return gm
    rewriter = _Rewriter(gm, context, _one_size(calls, context))
    shapes: dict[str, None] = {}
    for node in calls:
        shapes[rewriter.open(node)] = None
    rewriter.insert_prepare(_ops.join_shapes(list(shapes)), calls[0])
    context.notes.append(
        f"pcg::prepare_batch ahead of {len(calls)} attention layers: {len(shapes)} distinct shapes to plan a step"
    )
    gm.graph.lint()
    gm.recompile()
    return gm


def _arguments(node: fx.Node) -> list[Any]:
    given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    return [given[name] for name in _NAMES]


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


class _Rewriter:
    def __init__(self, gm: fx.GraphModule, context: PassContext, tokens: Any) -> None:
        self.gm, self.graph, self.context, self.tokens = gm, gm.graph, context, tokens
        self.facts: dict[fx.Node, NodeFacts] = context.facts
        self.fake_mode = fake_mode_of([f.value for f in context.facts.values()])
        self.placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self.inputs: dict[str, fx.Node] = {}
        state = current_step() if context.collect else require_step("compiling a model with paged attention")
        self.cache = state.require_cache() if state is not None and not context.collect else None

    def open(self, node: fx.Node) -> str:
        """Replaces one call; returns its shape."""
        q, k, v, layer, text = _arguments(node)
        value = self.facts[q].value
        shape, device = AttentionShape.decode(text), value.device
        if self.cache is not None:
            self.cache.check(layer, shape, device)
        caches = [self._cache_input(which, layer, shape, device) for which in ("k", "v")]
        slots = self._step_input(
            StepInput(
                "slot_mapping",
                lambda tokens: torch.empty(tokens, dtype=torch.int64, device=device),
                lambda state, bucket: state.slot_mapping(bucket),
                scratch=True,
            )
        )
        with self.graph.inserting_before(node):
            if not _is_contiguous(value):
                q = self._add(node, torch.Tensor.contiguous, (q,), lambda: torch.empty(value.shape, **_options(value)))
            self._add(node, torch.ops.pcg.store_kv.default, (k, v, *caches, slots), None)
            out = self._add(node, torch.empty_like, (q,), lambda: torch.empty(value.shape, **_options(value)))
            self._add(node, torch.ops.pcg.attend.default, (q, out, layer, text), None)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        return text

    def insert_prepare(self, shapes: str, like: fx.Node) -> None:
        """``pcg::prepare_batch`` ahead of everything that is computed."""
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            tokens = self._tokens_node()
            self._add(like, torch.ops.pcg.prepare_batch.default, (tokens, shapes), None)

    def _tokens_node(self) -> fx.Node | int:
        expr = expr_of(self.tokens)
        if not isinstance(expr, sympy.Basic) or not expr.free_symbols:
            return int(expr)
        sources: dict[Any, fx.Node] = {}
        for node in self.placeholders:
            value = self.facts[node].value
            if isinstance(value, torch.SymInt):
                if expr_of(value) == expr:
                    return node
                sources.setdefault(expr_of(value), node)
        return expression_nodes(self.graph, expr, {s: sources[s] for s in expr.free_symbols})

    def _cache_input(self, which: str, layer: int, shape: AttentionShape, device: torch.device) -> fx.Node:
        # Traced by pcg.check() outside a step, any number of slots does.
        slots = self.cache.num_pages * self.cache.page_size if self.cache is not None else 32

        def fake(tokens: Any) -> torch.Tensor:
            return torch.empty((slots, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=device)

        def get(state: Any, bucket: int) -> torch.Tensor:
            cache = state.require_cache()
            cache.check(layer, shape, device)
            return (cache.flat_k if which == "k" else cache.flat_v)[layer]

        return self._step_input(StepInput(f"{which}_cache_{layer}", fake, get))

    def _step_input(self, step_input: StepInput) -> fx.Node:
        name = step_input.name
        if name not in self.inputs:
            after = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(after):
                node = self.graph.placeholder(name)
            with self.fake_mode:
                node.meta["example_value"] = step_input.fake(self.tokens)
            node.meta["pcg_step_input"] = step_input
            self.inputs[name] = node
        return self.inputs[name]

    def _add(
        self, like: fx.Node, target: Any, args: tuple[Any, ...], fake: Callable[[], torch.Tensor] | None
    ) -> fx.Node:
        if target is torch.Tensor.contiguous:
            node = self.graph.call_method("contiguous", args)
        else:
            node = self.graph.call_function(target, args)
        node.stack_trace = like.stack_trace
        node.meta.update({key: like.meta[key] for key in ("nn_module_stack", "source_fn_stack") if key in like.meta})
        if fake is not None:
            with self.fake_mode:
                node.meta["example_value"] = fake()
        return node


def _options(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": value.dtype, "device": value.device}


def _is_contiguous(value: torch.Tensor) -> bool:
    """Whether rows lie one after the other, read from the strides so that no guard on a size is made."""
    heads, head_dim = value.shape[1], value.shape[2]
    return tuple(value.stride()[1:]) == (head_dim, 1) and str(value.stride(0)) == str(heads * head_dim)
