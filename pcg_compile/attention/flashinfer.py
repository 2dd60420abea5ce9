"""Paged attention by FlashInfer's batch prefill kernels (FA2), which serve decode, prefill and mixed batches alike.

The planner and the kernel are called directly, as ``BatchPrefillWithPagedKVCacheWrapper`` calls them: the wrapper's
own ``plan()`` copies from pageable memory at every step, and loops over requests in Python.

FA2, not FA3: it splits long KV sequences over thread blocks, which decode requests in a mixed batch need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..runtime.staging import StagingRing
from .base import AttentionImpl, AttentionShape

if TYPE_CHECKING:
    from .cache import PagedKVCache, Prepared

__all__ = ["FlashInferAttention", "why_not"]

#: FlashInfer versions whose planner and kernel take the arguments given here.
_READ_IN = ("0.6.13",)
_HEAD_DIMS = (64, 128, 256)
_FLOAT_WORKSPACE = 128 << 20
_INT_WORKSPACE = 2 << 20
_LARGEST_WORKSPACE = 8 << 30


@lru_cache(maxsize=1)
def _installed() -> tuple[Any, str | None]:
    """FlashInfer's module of prefill kernels, or why there is none."""
    cure = f"pip install flashinfer-python=={_READ_IN[-1]}"
    if importlib.util.find_spec("flashinfer") is None:
        return None, f"FlashInfer is not installed ({cure})"
    try:
        import flashinfer
        import flashinfer.prefill
    except Exception as error:
        return None, f"FlashInfer cannot be imported: {type(error).__name__}: {error}"
    version = flashinfer.__version__.split("+")[0]
    if version not in _READ_IN:
        return None, f"FlashInfer {version} is not one that pcg knows ({cure})"
    return flashinfer.prefill, None


def why_not(shape: AttentionShape, device: torch.device) -> str | None:
    """Why FlashInfer does not compute a shape on a CUDA device, None where it does."""
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashInfer computes float16 and bfloat16, not {shape.dtype}"
    if shape.head_dim not in _HEAD_DIMS:
        return f"FlashInfer has head sizes {', '.join(map(str, _HEAD_DIMS))}, not {shape.head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"FlashInfer needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return _installed()[1]


class _Plan(NamedTuple):
    """The arguments of the kernel that change from step to step."""

    head: tuple[Any, ...]
    metadata: tuple[torch.Tensor, ...]


class FlashInferAttention(AttentionImpl):
    """One attention shape. Its integer workspace holds the plan, so a new plan ends the one before.

    Copies and kernels are ordered by the stream, so the device side needs no guard; the pinned memory that the planner
    copies from does, and is a ring guarded by events.
    """

    def __init__(self, shape: AttentionShape, cache: PagedKVCache) -> None:
        super().__init__(shape, cache)
        self.recordable = True
        prefill, reason = _installed()
        if prefill is None:
            raise RuntimeError(reason)
        from flashinfer.utils import MaskMode, PosEncodingMode, TensorLayout, device_support_pdl

        dtype, size = shape.dtype, shape.head_dim
        window, softcap = shape.window, shape.softcap
        self._window_left = -1 if window is None else window - 1
        with torch.cuda.device(self.device):
            self._module = prefill.get_batch_prefill_module(
                "fa2", dtype, dtype, dtype, torch.int32, size, size, PosEncodingMode["NONE"].value,
                window is not None, softcap is not None, False,
            )  # fmt: skip
        self._workspaces = cache.workspaces
        with torch.inference_mode(False):
            self._ints = torch.empty(_INT_WORKSPACE, dtype=torch.uint8, device=self.device)
        self._pinned = StagingRing(self.device, _INT_WORKSPACE, most=4)
        #: Behind ``out``: lse, mask mode, layout, window, PDL, custom mask and its indptr, alibi, prefix lengths, item
        #: positions, longest item, soft cap, scale, scales of q, k and v, rope scale and theta, item length, workspace.
        self._tail = (
            None, MaskMode.CAUSAL.value, TensorLayout["NHD"].value, self._window_left, device_support_pdl(self.device),
            None, None, None, None, None, None, float(softcap or 0.0), float(shape.scale), None, None, None, 1.0, 1e4,
            0, 0,
        )  # fmt: skip

    def plan(self, prepared: Prepared) -> _Plan:
        padded = prepared.padded
        while True:
            floats = self._workspaces.get("float")
            if floats is None:
                with torch.inference_mode(False):
                    floats = torch.empty(_FLOAT_WORKSPACE, dtype=torch.uint8, device=self.device)
                self._workspaces["float"] = floats
            pinned = self._pinned.take(self._ints.numel())
            try:
                info = self._module.plan(
                    floats, self._ints, pinned.host, padded.qo_indptr, padded.kv_indptr, padded.kv_lens,
                    padded.bucket, padded.requests, self.shape.num_heads, self.shape.num_kv_heads, self.page_size,
                    padded.request_slots is not None, self.shape.head_dim, self.shape.head_dim, True,
                    self._window_left, -1, False, 0,
                )  # fmt: skip
            except Exception as error:
                if not self._grow(str(error)):
                    raise
                continue
            finally:
                pinned.sent()
            qo_indptr, kv_indptr, last_page_len, _, kv_indices = prepared.arrays
            return _Plan((floats, self._ints, info), (qo_indptr, kv_indptr, kv_indices, last_page_len))

    def recording_key(self, plan: _Plan) -> Hashable:
        """The workspaces, and the kernel's grid and offsets: with fixed request slots equal for all batches."""
        floats, ints, info = plan.head
        return floats.data_ptr(), ints.data_ptr(), tuple(info)

    def _grow(self, error: str) -> bool:
        """Doubles the workspace that a plan overflowed; False where that was not what went wrong."""
        if "Increase the workspace buffer size" not in error:
            return False
        name = "float" if "_tmp_" in error else "int"
        old = self._workspaces["float"] if name == "float" else self._ints
        if 2 * old.numel() > _LARGEST_WORKSPACE:
            return False
        with torch.inference_mode(False):
            new = torch.empty(2 * old.numel(), dtype=torch.uint8, device=self.device)
        if name == "float":
            self._workspaces["float"] = new
        else:
            self._ints = new
        return True

    def bind(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor
    ) -> Callable[[_Plan], None]:
        kernel, tail = self._module.paged_run, self._tail
        if q.stride(-1) != 1:
            original = q
            q = torch.empty(q.shape, dtype=q.dtype, device=q.device)

            def run_on_copy(plan: _Plan) -> None:
                q.copy_(original)
                kernel(*plan.head, q, k_cache, v_cache, *plan.metadata, out, *tail)

            return run_on_copy

        def run(plan: _Plan) -> None:
            kernel(*plan.head, q, k_cache, v_cache, *plan.metadata, out, *tail)

        return run
