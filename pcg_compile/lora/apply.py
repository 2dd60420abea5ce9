"""The ops that add each token's adapter, for one layer and for several. Inductor and Dynamo keep them as one node."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from .plain import add_adapters

__all__ = ["lora_apply", "lora_apply_many"]

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
_LIBRARY.define(
    "lora_apply(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scalings, Tensor ranks, Tensor permutation, "
    "Tensor seg_indptr, int[] slices) -> ()"
)
_LIBRARY.define(
    "lora_apply_many(Tensor(a!)[] y, Tensor x, Tensor[] a, Tensor[] b, Tensor[] scalings, Tensor[] ranks, "
    "Tensor permutation, Tensor seg_indptr, int[] slices, int[] counts) -> ()"
)


def lora_apply(
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
    """Adds to each token's row of ``y`` what its adapter makes of its row of ``x``; base tokens stay as they are.

    For token t of segment s and slice j of the columns, with r = ranks[s] and i = j * max_rank:
    ``y[t, slice j] += scalings[s] * (x[t] @ a[s, i : i + r].T) @ b[s, slice j, :r].T``, accumulated in float32.
    Factors at or above an adapter's rank have no part in it: they may be another adapter's. The Triton kernels round
    what lies between the two products to x's dtype, as two linear layers in a row do; plain PyTorch, on the CPU and
    for float64, keeps it.

    Args:
        y: ``[..., out]``, written; its leading dimensions are contiguous rows. x: ``[..., in]`` of the same dtype.
        a: ``[max_adapters, slices * max_rank, in]``. b: ``[max_adapters, out, max_rank]``.
        scalings: float32 ``[max_adapters]``. ranks: int32 ``[max_adapters]``.
        permutation, seg_indptr: int32, as :func:`pcg_compile.lora.route` gives them.
        slices: widths of the columns that have factors of their own, such as those of q, k and v in a fused layer;
            they add up to ``out``.
    """
    lora_apply_many([y], x, [a], [b], [scalings], [ranks], permutation, seg_indptr, slices, [len(slices)])


def lora_apply_many(
    y: Sequence[torch.Tensor],
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scalings: Sequence[torch.Tensor],
    ranks: Sequence[torch.Tensor],
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[int],
    counts: Sequence[int],
) -> None:
    """:func:`lora_apply` for layers of one pool that read the same ``x``, such as q, k and v: on a GPU, two launches.

    Args:
        y, a, b, scalings, ranks: one of each for each layer; no y shares memory with another.
        slices: of all layers, one after the other; at most 4 on a GPU. counts: how many of them are each layer's.
    """
    rows_x, widths = x.reshape(-1, x.shape[-1]), iter(slices)
    layers = list(zip([one.view(-1, one.shape[-1]) for one in y], a, b, scalings, ranks, strict=True))
    of_each = [list(islice(widths, count)) for count in counts]
    if x.device.type == "cuda" and x.dtype != torch.float64:
        from .kernels import add_adapters_on_gpu

        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments' is.
            add_adapters_on_gpu(layers, rows_x, permutation, seg_indptr, of_each)
    else:
        for (rows_y, down, up, factors, sizes), own in zip(layers, of_each, strict=True):
            add_adapters(rows_y, rows_x, down, up, factors, sizes, permutation, seg_indptr, own)


for _name, _function in (("lora_apply", lora_apply), ("lora_apply_many", lora_apply_many)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", lambda *args: None, lib=_LIBRARY)
