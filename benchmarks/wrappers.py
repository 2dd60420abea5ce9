"""FlashInfer's own wrapper, used as its manual says: what a hand-made server would call."""

from __future__ import annotations

from typing import Any

import torch

import pcg_compile as pcg
from pcg_compile.padding_request import PaddedBatch

__all__ = ["Wrapper", "pages"]


def pages(flat: torch.Tensor, page_size: int = 16) -> torch.Tensor:
    """``[slots, heads, head_dim]`` as ``[pages, page_size, heads, head_dim]``."""
    return flat.unflatten(0, (-1, page_size))


class Wrapper:
    """``BatchPrefillWithPagedKVCacheWrapper`` for the layers of one cache.

    With ``requests`` its buffers are static and have that many request slots, so a graph may capture
    :meth:`attend` and serve every batch that is planned later.
    """

    def __init__(
        self,
        cache: pcg.PagedKVCache,
        num_heads: int,
        requests: int | None = None,
        workspace: torch.Tensor | None = None,
        workspace_bytes: int = 256 << 20,
    ) -> None:
        import flashinfer

        self.cache, self.num_heads = cache, num_heads
        device = cache.device
        if workspace is None:
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        buffers: dict[str, Any] = {}
        if requests is not None:
            ints = {"dtype": torch.int32, "device": device}
            buffers = {
                "use_cuda_graph": True,
                "qo_indptr_buf": torch.zeros(requests + 1, **ints),
                "paged_kv_indptr_buf": torch.zeros(requests + 1, **ints),
                "paged_kv_indices_buf": torch.zeros(cache.num_pages + 1024, **ints),
                "paged_kv_last_page_len_buf": torch.zeros(requests, **ints),
            }
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2", **buffers)

    def plan(self, padded: PaddedBatch) -> None:
        """Plans a batch, from arrays on the host."""
        assert padded.kv_indices is not None
        self.wrapper.plan(
            padded.qo_indptr,
            padded.kv_indptr,
            padded.kv_indices,
            padded.last_page_len,
            self.num_heads,
            self.cache.num_kv_heads,
            self.cache.head_dim,
            self.cache.page_size,
            causal=True,
            q_data_type=self.cache.dtype,
            kv_data_type=self.cache.dtype,
            seq_lens=padded.kv_lens,
        )

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layer: int) -> torch.Tensor:
        """What ``bench::attend`` calls."""
        size = self.cache.page_size
        result: torch.Tensor = self.wrapper.run(q, (pages(k_cache, size), pages(v_cache, size)))
        return result
