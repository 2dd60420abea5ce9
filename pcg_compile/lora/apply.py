"""The op that adds each token's adapter: ``pcg::lora_apply``. Inductor and Dynamo keep it as one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plain import add_adapters

__all__ = ["lora_apply"]

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
_LIBRARY.define(
    "lora_apply(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scalings, Tensor ranks, Tensor permutation, "
    "Tensor seg_indptr, int[] slices) -> ()"
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
    rows_y, rows_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if y.device.type == "cuda" and y.dtype != torch.float64:
        from .kernels import add_adapters_on_gpu

        with torch.cuda.device_of(y):  # Triton launches on the current device, whatever its arguments' is.
            add_adapters_on_gpu(rows_y, rows_x, a, b, scalings, ranks, permutation, seg_indptr, slices)
    else:
        add_adapters(rows_y, rows_x, a, b, scalings, ranks, permutation, seg_indptr, slices)


_LIBRARY.impl("lora_apply", lora_apply, "CompositeExplicitAutograd")
torch.library.register_fake("pcg::lora_apply", lambda *args: None, lib=_LIBRARY)
