"""Paged attention by FlashInfer's batch prefill kernels (FA2), which serve decode, prefill and mixed batches alike.

Any version from 0.6.13 on is used through ``BatchPrefillWithPagedKVCacheWrapper``. In versions that were read, the
planner and the kernel are called directly, as the wrapper calls them: its own ``plan()`` copies from pageable memory at
every step, and loops over requests in Python.

A plan holds the batch, so no CUDA graph holds the attention: it runs between captured pieces.

FA2, not FA3: it splits long KV sequences over thread blocks, which decode requests in a mixed batch need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import BatchError, message
from ..memory.staging import StagingRing
from .base import PLAIN, AttentionImpl, AttentionShape, Layer

if TYPE_CHECKING:
    from .cache import PagedKVCache, Prepared

__all__ = ["FlashInferAttention", "FlashInferWrapper", "why_not"]

#: FlashInfer versions whose planner and kernel take the arguments given here.
_READ_IN = ("0.6.13",)
#: The first whose wrapper is known.
_LEAST = (0, 6, 13)
_HEAD_DIMS = (64, 128, 256)
_FLOAT_WORKSPACE = 128 << 20
_INT_WORKSPACE = 2 << 20
_LARGEST_WORKSPACE = 8 << 30


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
    version = _version()
    if _numbers(version) < _LEAST:
        return None, f"FlashInfer {version} is older than pcg knows ({cure})"
    return flashinfer.prefill, None


def _version() -> str:
    import flashinfer

    return str(flashinfer.__version__).split("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3])


def why_not(shape: AttentionShape, device: torch.device, kv_dtype: torch.dtype) -> str | None:
    """Why FlashInfer does not compute a shape on a device, None where it does."""
    if device.type != "cuda":
        return f"FlashInfer computes on CUDA, the cache is on {device.type}"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashInfer computes float16 and bfloat16, not {shape.dtype}"
    if kv_dtype != shape.dtype:
        return f"pcg calls FlashInfer with keys and values of {shape.dtype}, not {kv_dtype}"
    if shape.head_dim not in _HEAD_DIMS or shape.v_dim != shape.head_dim:
        return (
            f"FlashInfer has head sizes {', '.join(map(str, _HEAD_DIMS))}, not {shape.head_dim} with values of "
            f"{shape.v_dim}"
        )
    lacks = [
        name
        for name, asked in (
            ("chunks", shape.chunk is not None),
            ("windows that are not causal", shape.window is not None and not shape.causal),
            ("sinks", "s" in shape.extras),
            ("ALiBi slopes of its own", "a" in shape.extras),
        )
        if asked
    ]
    if lacks:
        return f"pcg calls FlashInfer without {' and '.join(lacks)}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"FlashInfer needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return _installed()[1]


def implementation() -> type[AttentionImpl]:
    """The class for the installed version."""
    return FlashInferAttention if _version() in _READ_IN else FlashInferWrapper


def _refuse_groups(prepared: Prepared) -> None:
    if prepared.spans is not None:
        raise BatchError(
            message(
                "the batch has groups of tokens that see each other, which pcg does not have FlashInfer compute",
                cure='Write: options={"attention_backend": "triton"}',
            )
        )


class _Plan(NamedTuple):
    """The arguments of the kernel that change from step to step."""

    head: tuple[Any, ...]
    metadata: tuple[torch.Tensor, ...]


class FlashInferAttention(AttentionImpl):
    """One attention shape. Its integer workspace holds the plan, so a new plan ends the one before.

    Copies and kernels are ordered by the stream, so the device side needs no guard; the pinned memory that the planner
    copies from does, and is a ring guarded by events.
    """

    exact_pages = True

    def __init__(self, shape: AttentionShape, cache: PagedKVCache) -> None:
        super().__init__(shape, cache)
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
            None, (MaskMode.CAUSAL if shape.causal else MaskMode.NON_CAUSAL).value, TensorLayout["NHD"].value,
            self._window_left, device_support_pdl(self.device),
            None, None, None, None, None, None, float(softcap or 0.0), float(shape.scale), None, None, None, 1.0, 1e4,
            0, 0,
        )  # fmt: skip

    def plan(self, prepared: Prepared) -> _Plan:
        padded = prepared.padded
        _refuse_groups(prepared)
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
                    False, self.shape.head_dim, self.shape.head_dim, self.shape.causal,
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

    def workspaces(self) -> Sequence[Any]:
        return [self._ints]

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
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        layer: Layer = PLAIN,
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


class FlashInferWrapper(AttentionImpl):
    """One attention shape by FlashInfer's public wrapper, for versions that were not read."""

    exact_pages = True

    def __init__(self, shape: AttentionShape, cache: PagedKVCache) -> None:
        super().__init__(shape, cache)
        prefill, reason = _installed()
        if prefill is None:
            raise RuntimeError(reason)
        floats = cache.workspaces.get("float")
        if floats is None:
            with torch.inference_mode(False):
                floats = torch.empty(_FLOAT_WORKSPACE, dtype=torch.uint8, device=self.device)
            cache.workspaces["float"] = floats
        self._wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(floats, "NHD", backend="fa2")

    def plan(self, prepared: Prepared) -> Any:
        padded, shape = prepared.padded, self.shape
        _refuse_groups(prepared)
        self._wrapper.plan(
            padded.qo_indptr, padded.kv_indptr, prepared.array(4), padded.last_page_len, shape.num_heads,
            shape.num_kv_heads, shape.head_dim, self.page_size, causal=shape.causal, sm_scale=shape.scale,
            window_left=-1 if shape.window is None else shape.window - 1, logits_soft_cap=shape.softcap,
            q_data_type=shape.dtype, kv_data_type=shape.dtype,
        )  # fmt: skip
        return self._wrapper

    def bind(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        layer: Layer = PLAIN,
    ) -> Callable[[Any], None]:
        def run(wrapper: Any) -> None:
            wrapper.run(q if q.stride(-1) == 1 else q.contiguous(), (k_cache, v_cache), out=out)

        return run
