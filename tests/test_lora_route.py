"""LoRA routing: stable, one segment for each adapter, base tokens last."""

from __future__ import annotations

import pytest
import torch

import pcg_compile as pcg

TABLE = [
    ([2, 0, 1, 0, 2, 2], 4, [1, 3, 2, 0, 4, 5], [0, 2, 3, 6, 6]),
    ([3, 3, 0, 3], 4, [2, 0, 1, 3], [0, 1, 1, 1, 4]),
    ([-1, 1, -1, 0, 1], 2, [3, 1, 4, 0, 2], [0, 1, 3]),
    ([-1, -1], 3, [0, 1], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("slots", "adapters", "permutation", "seg_indptr"), TABLE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_table(slots, adapters, permutation, seg_indptr, dtype):
    routing = pcg.lora.route(torch.tensor(slots, dtype=dtype), adapters)
    assert routing.permutation.tolist() == permutation and routing.seg_indptr.tolist() == seg_indptr
    assert all(torch.equal(a, b) for a, b in zip(pcg.lora.route(slots, adapters), routing, strict=True))
    out = pcg.lora.Routing(torch.zeros_like(routing.permutation), torch.zeros_like(routing.seg_indptr))
    addresses = [t.data_ptr() for t in out]
    again = pcg.lora.route(torch.tensor(slots, dtype=dtype), adapters, out=out)
    assert again is out and [t.data_ptr() for t in again] == addresses
    assert again.permutation.tolist() == permutation and again.seg_indptr.tolist() == seg_indptr


def test_bad_arguments():
    with pytest.raises(ValueError, match="dimensions"):
        pcg.lora.route(torch.zeros(2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="out is for"):
        pcg.lora.route(torch.zeros(3, dtype=torch.int64), 2, out=pcg.lora.route(torch.zeros(2, dtype=torch.int64), 2))
