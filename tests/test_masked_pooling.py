"""Sums, means and maxima over padded tokens, where a mask proves that padding adds nothing."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertConfig, BertModel

import pcg_compile as pcg

INF = float("inf")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def expanded(h, mask):
    return mask.unsqueeze(-1).expand(h.size()).float()


def mean(h, mask):
    real = expanded(h, mask)
    return torch.sum(h * real, 1) / torch.clamp(real.sum(1), min=1e-9)


def weighted_mean(h, mask):
    weights = torch.arange(1, h.shape[1] + 1)[None, :, None].expand(h.size()).float()
    real = expanded(h, mask) * weights
    return (h * real).sum(1) / real.sum(1).clamp(min=1e-9)


def attentive(h, mask):
    weights = h.sum(-1).masked_fill(mask == 0, -INF).softmax(1)
    return (h * weights[..., None]).sum(1)


def first_and_mean(h, mask):
    return h[:, 0] + (h.tanh() * mask[..., None]).sum(dim=1, keepdim=True)[:, 0]


PROVEN = {
    "mean": mean,
    "mean of a layer": lambda h, mask: mean(torch.nn.functional.gelu(h @ torch.eye(4)), mask),
    "weighted mean": weighted_mean,
    "root of the length": lambda h, mask: (h * expanded(h, mask)).sum(1) / mask.float().sum(1)[:, None].clamp(1).sqrt(),
    "einsum": lambda h, mask: torch.einsum("bs,bsd->bd", mask.to(h.dtype), h),
    "bmm": lambda h, mask: (mask[:, None].to(h.dtype) @ h)[:, 0],
    "where and maximum": lambda h, mask: torch.where(mask.bool()[..., None], h, -INF).amax(1),
    "fill and maximum": lambda h, mask: h.masked_fill(~mask.bool()[..., None], -INF).max(1).values,
    "fill and minimum": lambda h, mask: h.masked_fill(mask[..., None] == 0, INF).min(1)[0],
    "compared": lambda h, mask: (h * (mask > 0)[..., None]).sum(1),
    "attention": attentive,
    "first and mean": first_and_mean,
    "norm": lambda h, mask: torch.linalg.vector_norm(h * mask[..., None], dim=1),
    "any": lambda h, mask: (h * mask[..., None]).sum(1) * mask.bool().any(1, keepdim=True),
}
NOT_PROVEN = {
    "no mask": lambda h, mask: h.mean(1) * mask[:, :1],
    "mean of products": lambda h, mask: (h * mask[..., None]).mean(1),
    "shifted": lambda h, mask: ((h + 1) * mask[..., None] + 1).sum(1),
    "turned around": lambda h, mask: (h * (1 - mask.float())[..., None]).sum(1),
    "a large number": lambda h, mask: h.masked_fill(mask[..., None] == 0, -5.0).amax(1),
    # Rows from 11 on would be divided by 0, which no real row is.
    "infinite padding": lambda h, mask: ((h / (torch.arange(h.shape[1]) - 11.0)[:, None]) * mask[..., None]).sum(1),
    "divided by it": lambda h, mask: (h / (mask.float() - 3)[..., None].log2() * mask[..., None]).nansum(1),
    "infinite by the mask": lambda h, mask: (torch.where(mask.bool()[..., None], h, INF) * mask[..., None]).nansum(1),
    "an index": lambda h, mask: (h * mask[..., None]).sum(1) + torch.eye(4)[mask.long() + 2].sum((1, 2))[:, None],
    "filtered twice": lambda h, mask: (h * mask[..., None]).cumsum(1).sum(1),
}


def batches(dtype, seed, holes=True):
    draw = random.Random(seed)
    for _ in range(9):
        batch, length = draw.randint(2, 9), draw.randint(2, 11)
        mask = torch.rand(batch, length) > (0.4 if holes else -1)
        mask[:, draw.randrange(length)] = True
        yield torch.randn(batch, length, 4) * 3, mask.to(dtype)


def run(function, dtype, sizes=(2, 4, 8, 16)):
    compiled = pcg.piecewise(dynamic={"h": (0, 1), "mask": (0, 1)}, buckets=sizes, compiler="eager")(function)
    with torch.no_grad():
        for h, mask in batches(dtype, str(dtype)):
            torch.testing.assert_close(compiled(h, mask), function(h, mask), rtol=1e-5, atol=1e-5)
    return pcg.stats(compiled)


@pytest.mark.parametrize("name", PROVEN)
def test_masked(name):
    dtype = {"einsum": torch.float32, "bmm": torch.bool, "any": torch.int32}.get(name, torch.int64)
    stats = run(PROVEN[name], dtype)
    assert stats.replays == 9 and not stats.fallbacks


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float16])
def test_types_of_masks(dtype):
    stats = run(lambda h, mask: (mean(h, mask), (h * mask.to(h.dtype)[..., None]).sum(1)), dtype)
    assert stats.replays == 9 and not stats.fallbacks


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name):
    """Right all the same, at the exact size, and counted."""
    stats = run(NOT_PROVEN[name], torch.int64)
    assert any("mixing" in f.reason for f in stats.fallbacks)


def test_one_row_at_a_time():
    """A mask of one dimension, and sums over the only one that is padded."""
    function = lambda x, w: ((x * w[:, None]).sum(0) / w.sum(), x.relu() * w[:, None])
    compiled = pcg.piecewise(dynamic={"x": 0, "w": 0}, buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        for n in (3, 8, 5, 1, 7, 4, 2):
            x, w = torch.randn(n, 4), torch.rand(n) + 0.1
            for got, want in zip(compiled(x, w), function(x, w), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert pcg.stats(compiled).replays == 7 and not pcg.stats(compiled).fallbacks


class Encoder(torch.nn.Module):
    """A BERT and its pooling, as sentence-transformers does it."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60,
            max_position_embeddings=64,
        )  # fmt: skip
        self.bert = BertModel(config).eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        hidden = self.bert(**given).last_hidden_state
        return torch.nn.functional.normalize(mean(hidden, attention_mask), p=2, dim=1)


def test_a_sentence_encoder_is_captured():
    """All pieces, the pooling too."""
    model = Encoder()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [2, 4, 8, 16, 32]})
    with torch.inference_mode():
        for batch, length in [(3, 5), (7, 9), (2, 17), (3, 6), (8, 16)]:
            ids = torch.randint(3, 60, (batch, length))
            lengths = torch.randint(1, length + 1, (batch, 1))
            mask = (torch.arange(length)[None] < lengths).long()
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
            torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-5, atol=1e-5)
    stats = pcg.stats(compiled)
    assert stats.capturable == stats.pieces == 2 * stats.graphs and not stats.fallbacks


TUPLES = {
    "chunk": lambda x, mask: [x.sum(-1) * part for part in mask.chunk(1, 0)],
    "unbind": lambda x, mask: mask.unbind(1)[0] * x[:, 0, 0],
    "broadcast_tensors": lambda x, mask: torch.broadcast_tensors(mask.unsqueeze(-1), x),
    "meshgrid": lambda x, mask: torch.meshgrid(mask[:, 0], mask[0], indexing="ij"),
    "max with indices": lambda x, mask: mask.max(1),
    "split in place": lambda x, mask: [x.sum(-1), *(part.add_(1) for part in (mask * 1).split(1, 1))],
}


@pytest.mark.parametrize("name", TUPLES)
def test_masks_in_ops_of_several_results(name):
    function = TUPLES[name]
    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    with torch.no_grad():
        for n, m in ((3, 5), (4, 6), (2, 7), (3, 5)):
            x, mask = torch.randn(n, m, 2), (torch.rand(n, m) > 0.3).float()
            torch.testing.assert_close(compiled(x, mask.clone()), function(x, mask.clone()))
