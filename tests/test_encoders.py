"""Unmodified Hugging Face encoders with SDPA, at any batch and sequence length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    ViTConfig,
    ViTModel,
)

import pcg_compile as pcg

BUCKETS = [2, 4, 8, 16, 32]
SIZES = [(3, 5), (7, 9), (2, 17), (5, 24), (3, 5), (8, 16), (4, 31), (7, 12)]
SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "attn_implementation": "sdpa",
}  # fmt: skip


def bert(**changes: Any) -> torch.nn.Module:
    return BertModel(BertConfig(**{**SMALL, **changes}))


def modern_bert() -> torch.nn.Module:
    return ModernBertModel(ModernBertConfig(**SMALL, local_attention=8, bos_token_id=1, eos_token_id=2,
                                            cls_token_id=1, sep_token_id=2))  # fmt: skip


def llama() -> torch.nn.Module:
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False))


def vit() -> torch.nn.Module:
    text_only = ("vocab_size", "max_position_embeddings", "pad_token_id")
    shape = {name: SMALL[name] for name in SMALL if name not in text_only}
    return ViTModel(ViTConfig(**shape, image_size=16, patch_size=4))


def text(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    """Token ids, and a mask whose rows have different lengths where ``padded``."""
    ids = torch.randint(3, 60, (batch, length))
    lengths = torch.randint(1, length + 1, (batch,)) if padded else torch.full((batch,), length)
    lengths[0] = length
    return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long()}


def image(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Any, bool]] = {
    "bert": (bert, text, True),
    "bert-full": (bert, text, False),
    "minilm-like": (lambda: bert(num_hidden_layers=6, hidden_size=48, num_attention_heads=12), text, True),
    "modernbert": (modern_bert, text, True),
    "llama": (llama, text, True),
    "vit": (vit, image, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_eager_and_captured(name: str) -> None:
    """Right at every size; after the first sizes nothing is compiled, and steps replay captured graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, inputs, padded = MODELS[name]
    model = make().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": BUCKETS})
    with torch.inference_mode():
        for i, (batch, length) in enumerate(SIZES * 2):
            if i == 3:
                before = pcg.stats(compiled)
            given = inputs(batch, length, padded)
            wanted, result = model(**given).last_hidden_state, compiled(**given).last_hidden_state
            assert result.shape == wanted.shape
            real = given.get("attention_mask", torch.ones(wanted.shape[:2])).bool()
            torch.testing.assert_close(result[real], wanted[real], rtol=1e-5, atol=1e-5)
    after = pcg.stats(compiled)
    print(name, after)
    assert after.graphs == before.graphs and after.compiled == before.compiled
    assert after.replays > before.replays > 0
    assert not after.fallbacks


@pytest.mark.parametrize("example", [(3, 12), (8, 8)])
@pytest.mark.parametrize("make", [bert, modern_bert, llama])
def test_warmup_by_batch_and_length(make, example):
    """A mask's sizes are those of the ids, and follow their buckets."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": BUCKETS})
    with torch.no_grad():
        pcg.warmup(compiled, **text(*example, False), buckets=[(2, 16), (4, 16), (8, 32)], progress=False)
        with pcg.expect(compiled, graphs=0, captured=0):
            for batch, length in [(3, 12), (1, 9), (4, 16), (2, 10), (7, 20), (1, 16), (8, 31)]:
                inputs = text(batch, length, True)
                want, got = (call(**inputs).last_hidden_state for call in (model, compiled))
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert pcg.stats(compiled).fallbacks == ()


def test_warmup_names_the_sizes_that_a_bucket_lacks():
    torch._dynamo.reset()
    compiled = torch.compile(bert().eval(), backend="pcg", options={"compiler": "eager"})
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"4 sizes, the model has 2 dynamic ones: dimension 0 of l_.*"),
    ):
        pcg.warmup(compiled, **text(3, 12, False), buckets=[(2, 16, 2, 16)], progress=False)
