"""Launches the Triton kernels of :mod:`triton_kernels`: sizes of tiles, workspaces, grids.

Everything here depends on shapes and on the device, never on a batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from .base import AttentionCall, AttentionShape
from .triton_kernels import attend
from .triton_schedule import HEADER, ITEM, schedule

#: Place of the page lists among the kernel's arguments.
_INDICES = 6
#: Its constants, in order.
_CONSTANTS = (
    "HEADS", "GROUP", "K_DIM", "V_DIM", "K_PAD", "V_PAD", "PAGE", "ALIKE", "BLOCK_Q", "BLOCK_M", "BLOCK_N", "CAUSAL",
    "WINDOW", "CHUNK", "SPANS", "SOFTCAP", "SINKS", "ALIBI", "NEGATIVE", "LSE", "FP8", "WIDE", "PHASES", "MERGE_PARTS",
    "MERGE_ROWS", "PRECISION",
)  # fmt: skip

__all__ = ["RaggedAttention", "Schedule", "Tiling", "is_interpreted", "tiling_for"]

#: Elements per thread of the blocks that a merge of parts holds at once; with long blocks of keys.
_MERGE_ELEMENTS = (32, 64)
#: Multiprocessors that the interpreter is said to have, few enough for small tests to divide keys.
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class Tiling:
    """Sizes of blocks of one kernel.

    Attributes:
        block_m: rows of a tile, query heads of a group included. block_n: keys of a block.
        warps, stages: of Triton's compiler.
        programs: parts that fill the GPU, per multiprocessor; see Note [Parts].
        min_blocks: blocks of keys that a part has at least.
        phases: whether blocks that need no mask have a loop of their own.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 3
    programs: int = 2
    min_blocks: int = 1
    phases: bool = False


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` when they were first imported)."""
    return type(attend).__name__ == "InterpretedFunction"


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiling_for(
    kind: str, head_dim: int, group: int, page_size: int, rows: int, itemsize: int, fp8: bool, device: torch.device
) -> Tiling:
    """The tiling of a kind of batch. Tuned on an H200 (``python -m benchmarks attention --tune``).

    Args:
        kind: "decode" (each request has so few tokens that one small tile holds them), "mixed" or "prefill".
        head_dim: the larger one of keys and values. group: query heads per KV head.
        rows: rows of q times KV heads. itemsize: bytes of an element of q. fp8: whether keys and values are.
    """
    small = max(16, triton.next_power_of_2(group)) if kind == "decode" else 16
    if device.type != "cuda":
        return Tiling(small if kind == "decode" else 32, 16, programs=2, phases=kind != "decode")
    # Ahead of Ampere nothing is copied asynchronously, and a program has less shared memory.
    old = torch.cuda.get_device_capability(device) < (8, 0)
    if itemsize > 2 or old or head_dim > 256:
        return Tiling(small if kind == "decode" else 32, 16 if head_dim > 128 else 32, 4, 2)
    # The smallest of today's GPUs have 99 KiB of shared memory for a program, data center GPUs 163 or 227.
    deep = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 160 << 10
    stages = 5 if deep else 3
    if kind == "decode":
        if small > 32:
            return Tiling(small, 32 if head_dim > 128 else 64, 4, 3, 2)
        if head_dim > 128:
            return Tiling(small, 16, 2, stages, 2)
        if fp8:
            return Tiling(small, 128 if deep else 64, 4, 3, 2)
        load = rows / _processors(device)
        if head_dim <= 64:
            return Tiling(small, 64, 2, 3, 2) if load > 4 else Tiling(small, 128, 4, stages, 1)
        if load > 1 and group <= 2 and deep:
            # Requests of different lengths, 43 to 256 of them.
            return Tiling(small, 128, 4, 3, 2)
        if load > 4:
            return Tiling(small, 32, 1, 3, 4) if small == 16 else Tiling(small, 64, 2, 3, 2)
        return Tiling(small, 64, 4, stages, 1) if load > 1 or not deep else Tiling(small, 128, 4, stages, 1)
    if head_dim > 128:
        if kind == "mixed":
            return Tiling(32, 64 if deep else 32, 4, 3, 1)
        return Tiling(64, 32, 4, 3, 1, phases=True)
    if fp8:
        return Tiling(64, 64, 4, 3, 1) if kind == "mixed" or not deep else Tiling(128, 64, 4, 3, 1, phases=True)
    if kind == "mixed" or not deep or (head_dim > 64 and page_size % 64 == 0):
        return Tiling(64, 64, 4, stages, 1, phases=True)
    return Tiling(128, 64, 8, stages, 1, phases=True)


class Schedule(NamedTuple):
    """The work items of one step, and the grid that serves any batch of as many rows and request entries.

    Attributes:
        items: ``[words]`` int32 on the device. counters: ``[slots * KV heads]`` int32.
        most: items at most.
    """

    items: torch.Tensor
    counters: torch.Tensor
    most: int


class Launch(NamedTuple):
    """A compiled kernel with its arguments: Triton takes some 50 us to find out which kernel they need, this one 10.

    Valid for arguments that are aligned alike.
    """

    compiled: Any
    heads: int
    args: tuple[Any, ...]

    def __call__(self, most: int, kv_indices: torch.Tensor) -> None:
        """Launches it for ``most`` items and other page lists."""
        args = self.args
        self.compiled[(most * self.heads, 1, 1)](*args[:_INDICES], kv_indices, *args[_INDICES + 1 :])


class RaggedAttention:
    """Attention over paged keys and values for one shape and tiling.

    Args:
        shape: heads, mask and scale; see Note [Visible keys]. page_size: tokens per page.
        spans: whether tokens see keys beside those of the mask.
    """

    def __init__(
        self, shape: AttentionShape, page_size: int, tiling: Tiling, device: torch.device, spans: bool = False
    ) -> None:
        heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        self.num_kv_heads, self.tiling, self.device = heads, tiling, device
        self.block_q = max(1, tiling.block_m // group)
        self.block_m: int = max(16, triton.next_power_of_2(self.block_q * group))
        self.budget = max(1, _processors(device) * tiling.programs // heads)
        self.slots = 2 * self.budget
        self.v_pad: int = max(16, triton.next_power_of_2(shape.v_dim))
        self._scale = shape.scale / shape.softcap if shape.softcap else shape.scale
        self._softcap = shape.softcap or 0.0
        self._mask = {
            "CAUSAL": shape.causal, "WINDOW": shape.window or 0, "CHUNK": shape.chunk or 0, "SPANS": spans,
            "BLOCK_Q": self.block_q, "BLOCK_N": tiling.block_n,
        }  # fmt: skip
        rows = min(self.block_m, max(1, triton.next_power_of_2(group)))
        # They take registers that a loop over short blocks would rather have for more programs.
        elements = 32 * tiling.warps * _MERGE_ELEMENTS[tiling.block_n >= 128]
        parts = max(1, min(triton.next_power_of_2(self.slots), elements // (rows * self.v_pad)))
        self._constants: dict[str, Any] = {
            **self._mask, "HEADS": heads, "GROUP": group, "K_DIM": shape.head_dim, "V_DIM": shape.v_dim,
            "K_PAD": max(16, triton.next_power_of_2(shape.head_dim)), "V_PAD": self.v_pad, "PAGE": page_size,
            "BLOCK_M": self.block_m, "SOFTCAP": shape.softcap is not None, "NEGATIVE": shape.scale <= 0,
            "PHASES": tiling.phases, "MERGE_PARTS": parts, "MERGE_ROWS": rows,
            "PRECISION": "ieee" if shape.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    @property
    def workspace_floats(self) -> int:
        """float32 elements of a workspace: partial results and statistics."""
        return self.slots * self.num_kv_heads * self.block_m * (self.v_pad + 2)

    def most_items(self, rows: int, requests: int) -> int:
        """Number of work items at most; see Note [Parts]."""
        return (rows + requests * (self.block_q - 1)) // self.block_q + self.budget

    def new_schedule(self, most: int) -> Schedule:
        """Memory for ``most`` work items."""
        items = torch.zeros(HEADER + ITEM * most, dtype=torch.int32, device=self.device)
        counters = torch.zeros(self.slots * self.num_kv_heads, dtype=torch.int32, device=self.device)
        return Schedule(items, counters, most)

    def schedule(
        self, to: Schedule, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_lens: torch.Tensor, requests: int
    ) -> None:
        """Writes a step's work items. Can be captured.

        Args:
            qo_indptr, kv_indptr: ``[requests + 1]`` int32. kv_lens: ``[requests]`` int32.
        """
        schedule[(requests,)](
            to.items, to.counters, qo_indptr, kv_indptr, kv_lens, requests, self.budget, to.counters.numel(),
            **self._mask, MIN_BLOCKS=self.tiling.min_blocks, REQUESTS=max(16, triton.next_power_of_2(requests)),
            BLOCK=128, num_warps=4 if requests <= 1024 else 8,
        )  # fmt: skip

    def arguments(
        self, items: Schedule, call: AttentionCall, kv_indices: torch.Tensor, workspace: torch.Tensor,
        spans: torch.Tensor | None = None, lse: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """What the kernel takes, in order.

        Args:
            call: its tensors' last dimensions are contiguous.
            workspace: float32, :attr:`workspace_floats` elements.
            spans: ``[rows, 2]`` int32. lse: ``[rows, num_heads]`` float32, written.
        """
        q, k_cache, v_cache, out = call.q, call.k_cache, call.v_cache, call.out
        stats, rest = self.slots * self.num_kv_heads * self.block_m * self.v_pad, items.items
        some = (spans, call.sinks, call.slopes, call.k_scale, call.v_scale)
        constants = {
            **self._constants, "SINKS": call.sinks is not None, "ALIBI": call.slopes is not None,
            "LSE": lse is not None, "FP8": call.k_scale is not None,
            "ALIKE": k_cache.stride()[:3] == v_cache.stride()[:3],
            "WIDE": is_interpreted() and q.dtype == torch.bfloat16,
        }  # fmt: skip
        return (
            q, k_cache, v_cache, out, rest if lse is None else lse, rest, kv_indices,
            *(rest if one is None else one for one in some), workspace, workspace[stats:], items.counters,
            self._scale, self._softcap, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
            k_cache.stride(2), v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), out.stride(0), out.stride(1),
            0 if lse is None else lse.stride(0), *(constants[name] for name in _CONSTANTS),
        )  # fmt: skip

    def attend(self, items: Schedule, *args: Any, **kwargs: Any) -> Launch | None:
        """Attends, with what :meth:`arguments` takes. Can be captured.

        Returns:
            What launches the same kernel again; None under the interpreter.
        """
        every = self.arguments(items, *args, **kwargs)
        grid = (items.most * self.num_kv_heads, 1, 1)
        compiled = attend[grid](*every, num_warps=self.tiling.warps, num_stages=self.tiling.stages)
        # The interpreter compiles nothing.
        return None if compiled is None else Launch(compiled, self.num_kv_heads, every)
