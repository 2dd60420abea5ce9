"""The LoRA ops: what a layer calls, and what the graph pass makes of it. Inductor and Dynamo keep each as one node.

A layer calls ``pcg::lora``, which finds the routing of the running step. In a compiled graph the pass ``route_lora``
makes of it ``pcg::lora_apply``, which reads the routing from static memory inside the captured piece, and one
``pcg::prepare_lora`` a step that fills that memory for all layers. ``pcg::prepare_one_lora`` does so for layers whose
rows are not known to be the batch's tokens: it wants a batch of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.fx.node import has_side_effect

from ..step import current_step
from .packed import decode
from .route import route
from .routing import router_by_id

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")


def lora(y: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, layout: str) -> None:
    """Adds each token's adapter to ``y``, as the batch of the running step says; outside a step all are the base's.

    Args:
        y: ``[..., out]``. x: ``[..., in]``, the same tokens.
        factors, layout: the layer's :class:`~pcg_compile.lora.packed.PackedFactors`, the layout encoded.

    Raises:
        BatchError: an unknown adapter, other tokens than the batch's.
    """
    rows = y.numel() // y.shape[-1]
    state = current_step()
    if state is not None and state.batch.adapters is not None:
        state.check_tokens(rows)
    routing = router_by_id(decode(layout).pool).routing(state, rows)
    if routing is not None:
        # Tokens in two dimensions, at the bucket's strides, are no rows: then a copy is worked on.
        flat = y.reshape(-1, y.shape[-1])
        torch.ops.pcg.lora_apply(flat, x.reshape(-1, x.shape[-1]), factors, *routing, layout)
        if flat.data_ptr() != y.data_ptr():
            y.copy_(flat.view(y.shape))


def route_rows(slots: torch.Tensor, adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`pcg_compile.lora.route` as an op: rows in an order that only the device knows.

    Args:
        slots: int32 ``[rows]``, the adapter slot of each row, -1 for the base model. adapters: number of slots.
    """
    return tuple(route(slots, adapters))  # type: ignore[return-value]


def lora_apply(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    layout: str,
) -> None:
    """Adds to each token's row of ``y`` what its adapter makes of its row of ``x``; base tokens stay as they are.

    For token t of segment s and slice j of the columns, with r = ranks[s] and i = j * max_rank:
    ``y[t, slice j] += scalings[s] * (x[t] @ a[s, i : i + r].T) @ b[s, slice j, :r].T``, accumulated in float32.
    Factors at or above an adapter's rank have no part in it: they may be another adapter's. The Triton kernels round
    what lies between the two products to x's dtype, as two linear layers in a row do; plain PyTorch, on the CPU and
    for float64, keeps it.

    Args:
        y: ``[..., out]``, written; its leading dimensions are contiguous rows. x: ``[..., in]`` of the same dtype.
        factors: a, b, scalings and ranks, as :func:`pcg_compile.lora.packed.pack` makes one tensor of them.
        permutation, seg_indptr: int32, as :func:`pcg_compile.lora.route` gives them.
        layout: the encoded :class:`~pcg_compile.lora.packed.PackedFactors`; its slices are widths of the columns that
            have factors of their own, such as those of q, k and v in a fused layer, and add up to ``out``.
    """
    lora_apply_many([y], x, [factors], permutation, seg_indptr, layout)


def lora_apply_many(
    y: Sequence[torch.Tensor],
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    layouts: str,
) -> None:
    """:func:`lora_apply` for layers of one pool that read the same ``x``, such as q, k and v: on a GPU, two launches.

    Args:
        y, factors: one of each for each layer; no y shares memory with another.
        layouts: of all layers, with ";" between them; at most 4 slices in all on a GPU.
    """
    rows_x, every = x.reshape(-1, x.shape[-1]), [decode(text) for text in layouts.split(";")]
    parts = [layout.views(packed, x.shape[-1]) for layout, packed in zip(every, factors, strict=True)]
    # The model may have been cast since the factors were.
    layers = [
        (one.view(-1, one.shape[-1]), a.to(x.dtype), b.to(x.dtype), scalings, ranks)
        for one, (a, b, scalings, ranks) in zip(y, parts, strict=True)
    ]
    of_each = [layout.slices for layout in every]
    if x.device.type == "cuda" and x.dtype != torch.float64:
        from .launch import add_adapters_on_gpu

        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments' is.
            add_adapters_on_gpu(layers, rows_x, permutation, seg_indptr, of_each)
    else:
        for (rows_y, a, b, scalings, ranks), own in zip(layers, of_each, strict=True):
            add_adapters(rows_y, rows_x, a, b, scalings, ranks, permutation, seg_indptr, own)


def add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scalings: torch.Tensor,
    ranks: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[int],
) -> None:
    """:func:`lora_apply` on rows: ``y [n, out]``, ``x [n, in]``."""
    tokens, max_rank = len(permutation), b.shape[2]
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    place = torch.empty_like(permutation)
    place[permutation.long()] = torch.arange(tokens, dtype=place.dtype, device=place.device)
    columns = torch.arange(max_rank, device=x.device)
    inputs = x.to(dtype)
    for slot in range(a.shape[0]):
        mine = ((place >= seg_indptr[slot]) & (place < seg_indptr[slot + 1]))[:, None]
        used = columns < ranks[slot]
        first = 0
        for j, width in enumerate(slices):
            down = torch.where(used[:, None], a[slot, j * max_rank : (j + 1) * max_rank].to(dtype), 0)
            up = torch.where(used, b[slot, first : first + width].to(dtype), 0)
            part = y[:, first : first + width]
            added = part.to(dtype) + (inputs @ down.t()) @ up.t() * scalings[slot]
            part.copy_(torch.where(mine, added.to(y.dtype), part))
            first += width


def bind_prepare_lora(
    rows: int, pool: int, memory: int, *, mode: Literal["request", "slice"] = "slice", ahead: bool = False
) -> Callable[[], None]:
    """``pcg::prepare_lora`` for a bucket of ``rows``: prepares the step that runs when it is called."""
    place = router_by_id(pool).memory(memory)

    def prepare() -> None:
        place.prepare(current_step(), rows)

    return prepare


def bind_prepare_one_lora(unused: int, pool: int, memory: int) -> Callable[[], None]:
    """``pcg::prepare_one_lora``: prepares the step that runs when it is called, for any number of rows."""
    place = router_by_id(pool).memory(memory)

    def prepare() -> None:
        place.prepare(current_step(), 0)

    return prepare


def row_wise_form(y: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, *rest: Any) -> None:
    """What ``pcg::lora_apply`` does with rows, for the padding analysis: each reads its own row and one adapter.

    Other rows never decide which adapter that is.
    """
    row_wise_form_of_many([y], x, [factors], *rest)


def row_wise_form_of_many(
    y: Sequence[torch.Tensor], x: torch.Tensor, factors: Sequence[torch.Tensor], *rest: Any
) -> None:
    """:func:`row_wise_form` of ``pcg::lora_apply_many``."""
    for one in y:
        one.add_(x @ x.new_zeros(x.shape[-1], one.shape[-1]))


def route_form(slots: torch.Tensor, adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``pcg::lora_route_rows`` is to the padding analysis: rows are added to by their own slot alone.

    The routing lists padding rows too, but ``pcg::lora_apply`` does to each row what it would without the others.
    """
    return slots + 0, slots.new_zeros(adapters + 1)


_ROUTING = "Tensor permutation, Tensor seg_indptr"
_OPS: tuple[tuple[str, Callable[..., Any], Callable[..., Any] | None], ...] = (
    ("lora(Tensor(a!) y, Tensor x, Tensor factors, str layout) -> ()", lora, None),
    (f"lora_apply(Tensor(a!) y, Tensor x, Tensor factors, {_ROUTING}, str layout) -> ()", lora_apply, None),
    (f"lora_apply_many(Tensor(a!)[] y, Tensor x, Tensor[] factors, {_ROUTING}, str layouts) -> ()", lora_apply_many,
     None),
    ("lora_route_rows(Tensor slots, int adapters) -> (Tensor, Tensor)", route_rows,
     lambda slots, adapters: (slots.new_empty(slots.shape[0]), slots.new_empty(adapters + 1))),
    ("prepare_lora(SymInt rows, int pool, int memory) -> ()", lambda *args: bind_prepare_lora(*args)(), None),
    ("prepare_one_lora(SymInt unused, int pool, int memory) -> ()", lambda *args: bind_prepare_one_lora(*args)(), None),
)  # fmt: skip
for _schema, _function, _fake in _OPS:
    _name = _schema.partition("(")[0]
    _captured = _name in ("lora_apply", "lora_apply_many", "lora_route_rows")
    _LIBRARY.define(_schema, tags=() if _captured else (torch.Tag.cudagraph_unsafe,))
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", _fake or (lambda *args: None), lib=_LIBRARY)
for _op in (torch.ops.pcg.prepare_lora.default, torch.ops.pcg.prepare_one_lora.default):
    has_side_effect(_op)
