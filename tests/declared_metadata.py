"""Ops that declare metadata among their arguments, and a model that calls them with metadata from several sources."""

from __future__ import annotations

import itertools

import torch
from torch import nn

import pcg_compile as pcg

WIDTH = 8
#: Rows of each call of an op.
SEEN: list[int] = []
LIBRARY = torch.library.Library("contract", "DEF")
LIBRARY.define("varlen(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int max_q, int max_k) -> Tensor")
LIBRARY.define(
    "varlen_out(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor cu_q, *, Tensor cu_k, SymInt max_q) -> ()"
)
LIBRARY.define(
    "paged(Tensor(a!) kc, Tensor(b!) vc, Tensor q, Tensor k, Tensor v, Tensor qi, Tensor ki, Tensor pages, "
    "Tensor last, Tensor slots) -> Tensor"
)


def attend(q, k, v):
    """The last rows of a sequence see the keys up to their own."""
    late = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
    return (torch.softmax((q.double() @ k.double().T).masked_fill(late, -torch.inf), -1) @ v.double()).to(q.dtype)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    qs, ks = cu_q.tolist(), cu_k.tolist()
    assert len(qs) == len(ks) and qs[-1] == len(q) and ks[-1] == len(k)
    assert max_q >= max(b - a for a, b in itertools.pairwise(qs))
    assert max_k >= max(b - a for a, b in itertools.pairwise(ks))
    SEEN.append(len(q))
    pairs = zip(itertools.pairwise(qs), itertools.pairwise(ks), strict=True)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in pairs])


def varlen_out(q, k, v, out, cu_q, *, cu_k, max_q):
    out.copy_(varlen(q, k, v, cu_q, cu_k, max_q, max_q))


def paged(kc, vc, q, k, v, qi, ki, pages, last, slots):
    """Stores keys and values at slots, then attends to what lies in the pages."""
    assert len(qi) == len(ki) == len(last) + 1 and qi[-1] == len(q) == len(slots) and ki[-1] == len(pages)
    kc.view(-1, WIDTH)[slots] = k
    vc.view(-1, WIDTH)[slots] = v
    rows, size = [], kc.shape[1]
    for r, (a, b) in enumerate(itertools.pairwise(qi.tolist())):
        mine = pages[ki[r] : ki[r + 1]].long()
        have = (len(mine) - 1) * size + int(last[r])
        assert have >= b - a
        rows.append(attend(q[a:b], kc[mine].reshape(-1, WIDTH)[:have], vc[mine].reshape(-1, WIDTH)[:have]))
    SEEN.append(len(q))
    return torch.cat(rows)


for name, function, fake in (
    ("varlen", varlen, lambda q, *rest: torch.empty_like(q)),
    ("varlen_out", varlen_out, lambda *args, **kwargs: None),
    ("paged", paged, lambda kc, vc, q, *rest: torch.empty_like(q)),
):
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"contract::{name}", fake, lib=LIBRARY)
pcg.register_split_op("contract::varlen", qo_indptr="cu_q", kv_indptr="cu_k", max_qo_len="max_q", max_kv_len="max_k")
pcg.register_split_op("contract::varlen_out", qo_indptr="cu_q", kv_indptr="cu_k", max_qo_len="max_q")

OPS = torch.ops.contract


class Packed(nn.Module):
    """Two layers of one of the ops above, whose metadata come in several ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.project = way, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, *metadata):
        for _ in range(1 if self.way.startswith("paged") else 2):
            q, k, v = self.project(x).chunk(3, -1)
            x = x + getattr(self, self.way)(q, k, v, *metadata)
        return x

    def one_source(self, q, k, v, cu, longest):
        return OPS.varlen(q, k, v, cu, cu, longest, longest)

    def in_place(self, q, k, v, cu, longest):
        out = torch.empty_like(q)
        OPS.varlen_out(q, k, v, out, cu, cu_k=cu, max_q=longest)
        return out

    def computed(self, q, k, v, cu, longest):
        ends = cu[1:] * 1
        cu = torch.cat([torch.zeros_like(cu[:1]), ends])
        return OPS.varlen(q, k, v, cu, cu, longest, longest)

    def from_data(self, q, k, v, cu, longest):
        return self.in_place(q, k, v, cu, (cu[1:] - cu[:-1]).max().item())

    def paged(self, q, k, v, kc, vc, qi, ki, pages, last, slots):
        return OPS.paged(kc, vc, q, k, v, qi, ki, pages, last, slots)

    def paged_computed(self, q, k, v, kc, vc, qi, ki, pages, last, slots):
        return OPS.paged(kc, vc, q, k, v, qi, ki, pages, last, slots // 2 + (slots + 1) // 2)


def indptr(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
