"""The attention ops: what a module calls, and what the graph pass makes of it.

A module calls ``pcg::paged_attention``, one node whatever attention does inside. Run eagerly it stores keys and
values and attends. In a compiled graph the pass ``prepare_batch`` makes of it ``pcg::store_kv``, which the compiler
fuses into the piece, and ``pcg::attend``, which runs between pieces on what ``pcg::prepare_batch`` planned once for
all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch.fx.node import has_side_effect

from ..errors import BatchError, message
from ..step import require_step
from .base import AttentionShape

__all__ = [
    "bind_attend",
    "bind_prepare_batch",
    "bind_prepare_full_graph",
    "join_shapes",
    "paged_attention",
    "refuse_gradients",
    "why_plain",
    "why_uncapturable",
]

_WHAT = "paged attention"
_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
#: Captured by a compiler's own graphs, they would keep the plan of the first batch.
_TAGS = (torch.Tag.cudagraph_unsafe,)

_LIBRARY.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, int layer, str shape, Tensor? sinks=None, Tensor? slopes=None) "
    "-> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
)
_LIBRARY.define("prepare_batch(SymInt tokens, str shapes) -> ()", tags=_TAGS)
_LIBRARY.define(
    "attend(Tensor q, Tensor(a!) out, int layer, str shape, Tensor? sinks=None, Tensor? slopes=None) -> ()", tags=_TAGS
)


def join_shapes(shapes: list[str]) -> str:
    """Encoded attention shapes as the one text that ``pcg::prepare_batch`` takes."""
    return ";".join(shapes)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    shape: str,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stores k, v and attends, in the running step.

    Args:
        q: ``[tokens, num_heads, head_dim]``. k, v: ``[tokens, num_kv_heads, head_dim]`` or ``v_dim``.
        layer: its place in the cache. shape: an encoded :class:`AttentionShape`.
        sinks, slopes: as :class:`~pcg_compile.attention.base.AttentionCall` has them.

    Raises:
        BatchError: no step or no cache, another number of tokens than the batch's, a cache that does not fit.
    """
    state = require_step(_WHAT)
    cache, tokens = state.require_cache(), q.shape[0]
    cache.check(layer, AttentionShape.decode(shape), q.device)
    state.check_tokens(tokens)
    slots = state.prepare(tokens, "slice", [shape]).slots
    call = cache.call(layer, q, _fake_attention(q, k, v, layer, shape), sinks, slopes)
    store_kv(k, v, cache.flat_k[layer], cache.flat_v[layer], slots, call.k_scale, call.v_scale)
    impl, plan = state.plan(shape, tokens)
    impl.run(call, plan)
    return call.out


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes the tokens' keys and values ``[tokens, num_kv_heads, head_dim]`` to their slots.

    Args:
        k_cache, v_cache: ``[slots, num_kv_heads, head_dim]``; with scales, e4m3 numbers as uint8.
        slot_mapping: ``[tokens]`` int64. k_scale, v_scale: ``[num_kv_heads]`` float32, for fp8 caches.
    """
    k_cache.index_copy_(0, slot_mapping, k if k_scale is None else _to_fp8(k, k_scale))
    v_cache.index_copy_(0, slot_mapping, v if v_scale is None else _to_fp8(v, v_scale))


def _to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``values / scale`` in e4m3, as bytes; what is beyond its range is clamped, which the conversion makes NaN."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scaled = (values.float() / scale[:, None]).clamp(-largest, largest)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def bind_prepare_batch(tokens: int, shapes: str, *, mode: Literal["request", "slice"] = "slice") -> Callable[[], None]:
    """``pcg::prepare_batch`` for a bucket of ``tokens``: prepares whatever step runs when it is called.

    Attention is planned by the first layer that attends, when the device is busy with the piece before it.
    """

    def prepare() -> None:
        require_step(_WHAT).prepare(tokens, mode)

    return prepare


def bind_prepare_full_graph(tokens: int, shapes: str) -> Callable[[], Hashable]:
    """``pcg::prepare_batch`` for a full CUDA graph of ``tokens``; see :meth:`StepState.prepare_full_graph`."""
    names = tuple(shapes.split(";")) if shapes else ()
    return lambda: require_step(_WHAT).prepare_full_graph(tokens, names)


def bind_attend(
    q: torch.Tensor, out: torch.Tensor, layer: int, shape: str, *extra: torch.Tensor | None
) -> Callable[[], None]:
    """``pcg::attend`` with its tensors bound, and the cache of the step that is running now.

    The callable serves every step with that cache, at ``q.shape[0]`` tokens, padding included.
    """
    cache = require_step(_WHAT).require_cache()
    cache.check(layer, AttentionShape.decode(shape), q.device)
    call, rows = cache.call(layer, q, out, *extra), q.shape[0]
    # Not the cache itself, which would live as long as its captured graphs.
    key = cache.key
    del cache

    def attend() -> None:
        state = require_step(_WHAT)
        if state.key is not key:
            raise BatchError(
                message(
                    "attention was bound to another cache than the step's", why="A captured graph belongs to one cache."
                )
            )
        impl, plan = state.plan(shape, rows)
        impl.run(call, plan)

    return attend


def why_plain(q: object, out: object, layer: int, shape: str, *rest: object) -> str | None:
    """Why ``pcg::attend``, bound to the running step's cache, is not what its device is meant to have, or None."""
    return require_step(_WHAT).require_cache().reasons.get(shape)


def why_uncapturable(q: object, out: object, layer: int, shape: str, *rest: object) -> str | None:
    """Why a full CUDA graph cannot hold ``pcg::attend``, bound to the running step's cache, or None."""
    impl = require_step(_WHAT).require_cache().impl(shape)
    return None if impl.capturable else f"attention by {type(impl).__name__} is planned on the host for each batch"


def _prepare_batch(tokens: int, shapes: str) -> None:
    bind_prepare_batch(tokens, shapes)()


def _attend(q: torch.Tensor, out: torch.Tensor, layer: int, shape: str, *rest: torch.Tensor | None) -> None:
    bind_attend(q, out, layer, shape, *rest)()


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, shape: str, *rest: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)


def refuse_gradients(*args: Any) -> None:
    """What a model with paged attention does where gradients are asked of it: outside of a step that is the error.

    Raises:
        BatchError: always.
    """
    require_step(_WHAT)
    _no_gradients(None)


def _no_gradients(context: Any, *gradients: Any) -> None:
    raise BatchError(message("paged attention has no gradients", cure="Serve in torch.no_grad(), as pcg.step() does."))


def _fake_nothing(*args: Any) -> None:
    return None


for _name, _function, _fake in (
    ("paged_attention", paged_attention, _fake_attention),
    ("prepare_batch", _prepare_batch, _fake_nothing),
    ("attend", _attend, _fake_nothing),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("pcg::paged_attention", _no_gradients, lib=_LIBRARY)
_LIBRARY.impl("store_kv", store_kv, "CompositeImplicitAutograd")
has_side_effect(torch.ops.pcg.prepare_batch.default)
