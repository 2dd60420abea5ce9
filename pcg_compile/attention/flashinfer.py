"""Paged attention by FlashInfer's batch prefill kernels (FA2), which serve decode, prefill and mixed batches alike.

It goes through the public ``BatchPrefillWithPagedKVCacheWrapper``, of any version from 0.6.13 on. A plan holds the
batch, so no CUDA graph holds the attention: it runs between captured pieces.

FA2, not FA3: it splits long KV sequences over thread blocks, which decode requests in a mixed batch need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BatchError, message
from .base import AttentionCall, AttentionImpl, AttentionShape, CacheMemory

if TYPE_CHECKING:
    from .prepared import Prepared

__all__ = ["FlashInferAttention"]

#: The first version whose wrapper is known.
_LEAST = (0, 6, 13)
_HEAD_DIMS = (64, 128, 256)
_FLOAT_WORKSPACE = 128 << 20
_LARGEST_WORKSPACE = 8 << 30
#: Plans that may be on their way to the device.
_WRAPPERS = 3


@lru_cache(maxsize=1)
def _installed() -> tuple[Any, str | None]:
    """FlashInfer's module of prefill kernels, or why there is none."""
    cure = f"pip install 'flashinfer-python>={'.'.join(map(str, _LEAST))}'"
    if importlib.util.find_spec("flashinfer") is None:
        return None, f"FlashInfer is not installed ({cure})"
    try:
        import flashinfer
        import flashinfer.prefill
    except Exception as error:  # Whatever a broken installation raises: it is shown, and another one attends.
        return None, f"FlashInfer cannot be imported: {type(error).__name__}: {error}"
    numbers = (int("".join(filter(str.isdigit, part)) or 0) for part in flashinfer.__version__.split(".")[:3])
    if tuple(numbers) < _LEAST:
        return None, f"FlashInfer {flashinfer.__version__} is older than pcg knows ({cure})"
    return flashinfer.prefill, None


class FlashInferAttention(AttentionImpl):
    """One attention shape by FlashInfer's wrapper.

    The wrapper copies a plan to the device from pinned memory of its own, so the next plan must wait until that has
    happened: a few wrappers take turns, each guarded by an event.
    """

    name = "flashinfer"
    exact_pages = True

    def __init__(self, shape: AttentionShape, memory: CacheMemory) -> None:
        super().__init__(shape, memory)
        prefill, reason = _installed()
        if prefill is None:
            raise RuntimeError(reason)
        kind, space = prefill.BatchPrefillWithPagedKVCacheWrapper, self._workspace()
        with torch.inference_mode(False):
            self._wrappers = [(kind(space, "NHD", backend="fa2"), torch.cuda.Event()) for _ in range(_WRAPPERS)]

    @classmethod
    def why_not(cls, shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"FlashInfer computes on CUDA, the cache is on {device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"FlashInfer computes float16 and bfloat16, not {shape.dtype}"
        if kv_dtype != shape.dtype:
            return f"pcg calls FlashInfer with keys and values of {shape.dtype}, not {kv_dtype}"
        if shape.head_dim not in _HEAD_DIMS or shape.v_dim != shape.head_dim:
            sizes = ", ".join(map(str, _HEAD_DIMS))
            return f"FlashInfer has head sizes {sizes}, not {shape.head_dim} with values of {shape.v_dim}"
        asked = {
            "chunks": shape.chunk is not None,
            "windows that are not causal": shape.window is not None and not shape.causal,
            "sinks": "s" in shape.extras,
            "ALiBi slopes of its own": "a" in shape.extras,
        }
        if any(asked.values()):
            return f"pcg calls FlashInfer without {' and '.join(name for name, lacks in asked.items() if lacks)}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"FlashInfer needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return _installed()[1]

    @classmethod
    def why_not_timed(cls, shape: AttentionShape) -> str | None:
        if importlib.util.find_spec("flashinfer_jit_cache") is not None:
            return None
        try:
            from flashinfer.jit import env
            from flashinfer.jit.attention import get_batch_prefill_uri

            dtype, size, window, cap = shape.dtype, shape.head_dim, shape.window is not None, shape.softcap is not None
            name = get_batch_prefill_uri("fa2", *[dtype] * 3, torch.int32, size, size, 0, window, cap, False)
            if any(env.FLASHINFER_JIT_DIR.glob(f"{name}*/*.so")):
                return None
        except (ImportError, AttributeError, TypeError, KeyError):  # Another version keeps its kernels elsewhere.
            pass
        return 'its kernels are not built: nvcc would take 40 s, attention_backend="flashinfer" does it'

    def _workspace(self) -> torch.Tensor:
        """Memory for partial results; all wrappers of a cache share it, as they follow each other on one stream."""
        space: torch.Tensor | None = self.memory.workspaces.get(self.name)
        if space is None:
            with torch.inference_mode(False):
                space = torch.empty(_FLOAT_WORKSPACE, dtype=torch.uint8, device=self.device)
            self.memory.workspaces[self.name] = space
        return space

    def workspaces(self) -> Sequence[Any]:
        return [wrapper._int_workspace_buffer for wrapper, _ in self._wrappers]

    def plan(self, prepared: Prepared) -> Any:
        if prepared.spans is not None:
            raise BatchError(
                message(
                    "the batch has groups of tokens that see each other, which pcg does not have FlashInfer compute",
                    cure='Write: options={"attention_backend": "triton"}',
                )
            )
        padded, shape = prepared.padded, self.shape
        self._wrappers.append(self._wrappers.pop(0))
        wrapper, sent = self._wrappers[-1]
        sent.synchronize()
        while True:
            try:
                wrapper.plan(
                    padded.qo_indptr, padded.kv_indptr, prepared.array(4), padded.last_page_len, shape.num_heads,
                    shape.num_kv_heads, shape.head_dim, self.page_size, causal=shape.causal, sm_scale=shape.scale,
                    window_left=-1 if shape.window is None else shape.window - 1, logits_soft_cap=shape.softcap,
                    q_data_type=shape.dtype, kv_data_type=shape.dtype,
                )  # fmt: skip
                break
            except Exception as error:  # The planner has no type of its own for memory that is too small.
                if not self._grow(str(error)):
                    raise
        sent.record(torch.cuda.current_stream(self.device))
        return wrapper

    def _grow(self, error: str) -> bool:
        """Doubles the workspaces that a plan overflowed; False where that was not what went wrong."""
        floats, ints = self._workspace(), self._wrappers[0][0]._int_workspace_buffer
        if "Increase the workspace buffer size" not in error or 2 * floats.numel() > _LARGEST_WORKSPACE:
            return False
        with torch.inference_mode(False):
            floats = torch.empty(2 * floats.numel(), dtype=torch.uint8, device=self.device)
            for wrapper, _ in self._wrappers:
                wrapper.reset_workspace_buffer(floats, ints.new_empty(2 * ints.numel()))
        self.memory.workspaces[self.name] = floats
        return True

    def run(self, call: AttentionCall, plan: Any) -> None:
        plan.run(call.q if call.q.stride(-1) == 1 else call.q.contiguous(), (call.k_cache, call.v_cache), out=call.out)
