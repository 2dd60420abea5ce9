"""Paged attention by pcg's Triton kernels: no plan on the host, one capture for every batch that fits a bucket."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .base import AttentionCall, AttentionImpl, AttentionShape, CacheMemory

if TYPE_CHECKING:
    from .prepared import Prepared
    from .ragged import RaggedAttention, Schedule

__all__ = ["TritonAttention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SMALLEST_HEAD, _LARGEST_HEAD = 8, 512
#: Bytes that decide which kernel Triton compiles for a pointer.
_ALIGNMENT = 16
_HERE = nullcontext()
#: Rows of a bucket from which on tiles are large.
_LARGE = 1024


@functools.cache
def _installed() -> str | None:
    """Why Triton cannot be used, None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        from . import ragged  # noqa: F401 - whether it imports
    except Exception as error:  # Whatever a broken installation raises: it is shown, and another one attends.
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


class _Plan(NamedTuple):
    """What the kernels read in a step; all of it lies on the device.

    Attributes:
        kernels, schedule: for the batch's kind. requests: entries of the metadata.
        qo_indptr, kv_indptr, kv_lens, kv_indices: of all requests, the padding and unused entries included.
        spans: ``[rows, 2]`` positions that tokens see beside those of the mask, or None.
    """

    kernels: RaggedAttention
    schedule: Schedule
    requests: int
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_lens: torch.Tensor
    kv_indices: torch.Tensor
    spans: torch.Tensor | None


class TritonAttention(AttentionImpl):
    """One attention shape over one cache.

    The kernels exist for three kinds of batches, which differ in the sizes of blocks alone: each is right for every
    batch, so the kind is chosen by what is likely to be fast.
    """

    name = "triton"
    capturable = plan_lasts = True

    def __init__(self, shape: AttentionShape, memory: CacheMemory) -> None:
        super().__init__(shape, memory)
        self._group = shape.num_heads // shape.num_kv_heads
        self._kernels: dict[Hashable, RaggedAttention] = {}
        self._schedules: dict[Hashable, Schedule] = {}

    @classmethod
    def why_not(cls, shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype) -> str | None:
        if shape.dtype not in _DTYPES:
            return f"Triton attention computes float16, bfloat16 and float32, not {shape.dtype}"
        if not all(_SMALLEST_HEAD <= size <= _LARGEST_HEAD for size in (shape.head_dim, shape.v_dim)):
            return f"Triton attention has head sizes of {_SMALLEST_HEAD} to {_LARGEST_HEAD}, not {shape.head_dim}"
        reason = _installed()
        if reason is not None:
            return reason
        from .ragged import is_interpreted

        if is_interpreted():
            return None
        if device.type != "cuda":
            return f"Triton compiles for GPUs, not {device.type} (its interpreter runs there: TRITON_INTERPRET=1)"
        if torch.version.hip is not None:
            return None
        least = (8, 9) if kv_dtype == torch.float8_e4m3fn else (7, 5) if shape.dtype != torch.bfloat16 else (8, 0)
        capability = torch.cuda.get_device_capability(device)
        if capability < least:
            return (
                f"Triton attention needs compute capability {least[0]}.{least[1]} for {shape.dtype} over {kv_dtype}, "
                f"this GPU has {capability[0]}.{capability[1]}"
            )
        return None

    def capture_key(self, prepared: Prepared) -> Hashable:
        return self._kind(prepared), prepared.spans is not None

    def _kind(self, prepared: Prepared) -> str:
        if prepared.longest * self._group <= max(16, self._group):
            return "decode"
        return "mixed" if prepared.rows < _LARGE else "prefill"

    def plan(self, prepared: Prepared) -> _Plan:
        qo_indptr, kv_indptr, _, kv_lens, kv_indices = prepared.arrays
        kind, rows, requests, spans = self._kind(prepared), prepared.rows, prepared.requests, prepared.spans
        kernels = self._kernels_of(kind, rows, spans is not None)
        # At exact sizes each step has others: memory for powers of two.
        most = kernels.most_items(rows, requests)
        key = (kernels, 1 << (most - 1).bit_length())
        schedule = self._schedules.get(key)
        if schedule is None:
            with torch.inference_mode(False):
                schedule = self._schedules[key] = kernels.new_schedule(key[1])
        schedule = schedule._replace(most=most)
        return _Plan(kernels, schedule, requests, qo_indptr, kv_indptr, kv_lens, kv_indices, spans)

    def workspaces(self) -> Sequence[Any]:
        return [schedule[:2] for schedule in self._schedules.values()]

    def enqueue(self, plan: _Plan) -> None:
        with self._here():
            plan.kernels.schedule(plan.schedule, plan.qo_indptr, plan.kv_indptr, plan.kv_lens, plan.requests)

    def run(self, call: AttentionCall, plan: _Plan) -> None:
        # All else that a launch takes is the layer's, or follows from the kernels.
        spans = None if plan.spans is None else plan.spans.data_ptr()
        key = (id(plan.kernels), plan.schedule.items.data_ptr(), plan.kv_indices.data_ptr() % _ALIGNMENT, spans)
        with self._here():
            launch = call.kept.get(key)
            if launch is not None:
                launch(plan.schedule.most, plan.kv_indices)
                return
            strided = call.q.stride(-1) != 1
            one = replace(call, q=call.q.contiguous()) if strided else call
            space = self._workspace(plan.kernels)
            launch = plan.kernels.attend(plan.schedule, one, plan.kv_indices, space, plan.spans)
            if launch is not None and not strided:
                call.kept[key] = launch

    def _here(self) -> AbstractContextManager[Any]:
        """Makes the cache's device the current one, where another is: Triton launches there."""
        elsewhere = self.device.type == "cuda" and torch.cuda.current_device() != self.device.index
        return torch.cuda.device(self.device) if elsewhere else _HERE

    def _kernels_of(self, kind: str, rows: int, spans: bool) -> RaggedAttention:
        from .ragged import RaggedAttention, tiling_for

        shape = self.shape
        tiling = tiling_for(
            kind, max(shape.head_dim, shape.v_dim), self._group, self.page_size, rows * shape.num_kv_heads,
            shape.dtype.itemsize, self.memory.dtype == torch.float8_e4m3fn, self.device,
        )  # fmt: skip
        kernels = self._kernels.get((tiling, spans))
        if kernels is None:
            kernels = RaggedAttention(shape, self.page_size, tiling, self.device, spans)
            self._kernels[tiling, spans] = kernels
            self._workspace(kernels)
        return kernels

    def _workspace(self, kernels: RaggedAttention) -> torch.Tensor:
        """Memory for partial results; kernels that follow each other on a stream share it.

        Captured graphs hold its address: one that is too small for other kernels stays with those that it was made for.
        """
        made: dict[int, torch.Tensor] = self.memory.workspaces.setdefault(self.name, {})
        size = 1 << (kernels.workspace_floats - 1).bit_length()
        space = made.get(size)
        if space is None:
            with torch.inference_mode(False):
                space = made[size] = torch.empty(size, dtype=torch.float32, device=self.device)
        return space
