"""The ops that add each token's adapter, for one layer and for several. Inductor and Dynamo keep them as one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packed import decode
from .plain import add_adapters
from .route import route

__all__ = ["lora_apply", "lora_apply_many", "route_rows"]

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
_LIBRARY.define(
    "lora_apply(Tensor(a!) y, Tensor x, Tensor factors, Tensor permutation, Tensor seg_indptr, str layout) -> ()"
)
_LIBRARY.define(
    "lora_apply_many(Tensor(a!)[] y, Tensor x, Tensor[] factors, Tensor permutation, Tensor seg_indptr, "
    "str layouts) -> ()"
)
_LIBRARY.define("lora_route_rows(Tensor slots, int adapters) -> (Tensor, Tensor)")


def route_rows(slots: torch.Tensor, adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`pcg_compile.lora.route` as an op: rows in an order that only the device knows.

    Args:
        slots: int32 ``[rows]``, the adapter slot of each row, -1 for the base model. adapters: number of slots.
    """
    return tuple(route(slots, adapters))  # type: ignore[return-value]


def _fake_route_rows(slots: torch.Tensor, adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slots.new_empty(slots.shape[0]), slots.new_empty(adapters + 1)


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
        from .kernels import add_adapters_on_gpu

        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments' is.
            add_adapters_on_gpu(layers, rows_x, permutation, seg_indptr, of_each)
    else:
        for (rows_y, a, b, scalings, ranks), own in zip(layers, of_each, strict=True):
            add_adapters(rows_y, rows_x, a, b, scalings, ranks, permutation, seg_indptr, own)


for _name, _function in (("lora_apply", lora_apply), ("lora_apply_many", lora_apply_many)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", lambda *args: None, lib=_LIBRARY)
_LIBRARY.impl("lora_route_rows", route_rows, "CompositeExplicitAutograd")
torch.library.register_fake("pcg::lora_route_rows", _fake_route_rows, lib=_LIBRARY)
