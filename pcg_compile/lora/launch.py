"""How the LoRA kernels are launched: sizes of tiles, grids, arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import kernels
from .packed import MOST_SLICES

#: Tiles, times the parts of the sum, from which on more parts of the shrink's sum do not pay.
_TILES, _MOST_SPLITS = 160, 8
#: Programs of the expand, from which on more of them do not pay, and blocks of columns that one has at most.
_PROGRAMS, _MOST_TURNS = 256, 8
#: Places of a rank that the expand multiplies at once, where it is above 16.
_WIDE = 64


class Blocks(NamedTuple):
    """Sizes of tiles: rows (tokens), the shrink's sum and the parts that it is split into, the expand's columns; and
    how many blocks of columns a program has, one after the other."""

    rows: int
    sum: int
    splits: int
    columns: int
    turns: int


class Launch(NamedTuple):
    """One kernel with its grid, its arguments in order, and its compile-time constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[torch.Tensor | int, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def blocks_for(tokens: int, in_features: int, out_features: int, itemsize: int = 2, adapters: int = 16) -> Blocks:
    """Few tokens: short tiles, and the sum split until the GPU is full. Many: tiles that fill the tensor cores.

    Tuned on an H100 and an H200, 16 adapters, 64 to 4,000 tokens, ranks 16 and 64.

    Args:
        itemsize: bytes of an element of x; wide ones get smaller tiles, for what they take of memory and registers.
        adapters: slots of the pool; each may begin a tile of its own.
    """
    rows = 16 if tokens <= 128 else 32 if tokens <= 512 else 64
    columns = 64 if itemsize > 2 or (tokens <= 128 and out_features <= 4096) else 128
    tiles, splits, turns = triton.cdiv(tokens, rows), 1, 1
    # Each part has four steps of the loop at least, or its start and end cost more than it saves.
    while splits < _MOST_SPLITS and splits * tiles < _TILES and in_features >= 1024 * splits:
        splits *= 2
    programs = (tiles + min(adapters, tokens) // 2) * triton.cdiv(out_features, columns)
    while turns < _MOST_TURNS and programs >= 2 * turns * _PROGRAMS:
        turns *= 2
    return Blocks(rows, 128 * 2 // max(2, itemsize), splits, columns, turns)


class _Part(NamedTuple):
    """Columns of one layer that have factors of their own; a begins at their rows, b and y at their columns."""

    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scalings: torch.Tensor
    ranks: torch.Tensor


def _parts(layer: Sequence[Any], slices: Sequence[int]) -> Iterator[_Part]:
    y, a, b, scalings, ranks = layer
    if y.stride(1) != 1:
        raise ValueError("the columns of y are not contiguous")
    first, max_rank = 0, b.shape[2]
    for j, width in enumerate(slices):
        columns = slice(first, first + width)
        yield _Part(y[:, columns], a[:, j * max_rank : (j + 1) * max_rank], b[:, columns], scalings, ranks)
        first += width


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and hasattr(tl.extra.cuda, "gdc_wait")


@functools.cache
def _is_roomy(device: torch.device) -> bool:
    """Whether a program may have more shared memory than the 64 KiB of the smallest GPUs."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 96 << 10


def launches(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[Sequence[int]],
    blocks: Blocks | None = None,
    overlap: bool | None = None,
) -> tuple[Launch, Launch]:
    """The shrink and the expand of :func:`add_adapters_on_gpu`, to run in this order.

    Args:
        blocks: overrides the rule. overlap: whether a kernel starts while the one before it ends (programmatic
            dependent launch); where None, if the GPU and Triton know how.
    """
    if overlap is None:
        overlap = _can_overlap(x.device)
    tokens, in_features = x.shape
    parts = [part for layer, widths in zip(layers, slices, strict=True) for part in _parts(layer, widths)]
    if len(parts) > MOST_SLICES:
        raise ValueError(f"layers of at most {MOST_SLICES} slices are served at once, not of {len(parts)}")
    adapters, _, max_rank = parts[0].b.shape
    widths = [part.y.shape[1] for part in parts]
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = blocks or blocks_for(tokens, in_features, sum(widths), x.element_size(), adapters)
    places = max(16, triton.next_power_of_2(max_rank))
    rank, tiles = min(32, places), triton.cdiv(tokens, blocks.rows) + adapters
    split_size = triton.cdiv(triton.cdiv(in_features, blocks.splits), blocks.sum) * blocks.sum
    splits = triton.cdiv(in_features, split_size)
    h = torch.empty((splits, tokens, len(parts) * max_rank), dtype=torch.float32, device=x.device)
    common = {
        "PARTS": len(parts),
        "MAX_RANK": max_rank,
        "ADAPTERS": adapters,
        "PADDED": triton.next_power_of_2(adapters),
        "ROWS": blocks.rows,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "OVERLAP": overlap,
    }
    # Places that are not used get what the first part has, of the right type; no program reads it.
    every = [*parts, *[parts[0]] * (MOST_SLICES - len(parts))]
    routing, options = (permutation, seg_indptr), {"launch_pdl": True} if overlap else {}
    ranks = [part.ranks for part in every]
    shrink = Launch(
        kernels.shrink,
        (tiles, len(parts) * triton.cdiv(max_rank, rank), splits),
        (
            h, x, *(part.a for part in every), *ranks, *routing, x.stride(0), in_features, h.stride(0), h.stride(1),
            *(part.a.stride(0) for part in every), split_size,
        ),
        {"RANK": rank, "SUM": blocks.sum, **common},
        {"num_warps": 4, "num_stages": 3 if blocks.rows < 64 or _is_roomy(x.device) else 2, **options},
    )  # fmt: skip
    expand = Launch(
        kernels.expand,
        (tiles, sum(triton.cdiv(width, blocks.columns * blocks.turns) for width in widths)),
        (
            h, *(part.y for part in every), *(part.b for part in every), *(part.scalings for part in every), *ranks,
            *routing, h.stride(0), h.stride(1), *(part.y.stride(0) for part in every),
            *(part.b.stride(0) for part in every), *widths, *[0] * (MOST_SLICES - len(parts)),
        ),
        {
            "SPLITS": splits, "WIDE": min(places, _WIDE), "COLUMNS": blocks.columns, "TURNS": blocks.turns, **common,
        },
        {"num_warps": 4, "num_stages": 2, **options},
    )  # fmt: skip
    return shrink, expand


def add_adapters_on_gpu(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    permutation: torch.Tensor,
    seg_indptr: torch.Tensor,
    slices: Sequence[Sequence[int]],
) -> None:
    """:func:`pcg_compile.lora.ops.lora_apply` on rows, of one or several layers that read the same. Can be captured.

    Args:
        layers: of each layer y ``[n, out]``, a, b, scalings, ranks. x: ``[n, in]``. slices: of each layer.

    Raises:
        ValueError: more than 4 slices in all; columns of a y that are not contiguous.
    """
    if x.shape[0] == 0:
        return
    for launch in launches(layers, x, permutation, seg_indptr, slices):
        launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)
