"""transformers models with ``attn_implementation="pcg"``, uncompiled, against transformers' own generate."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")


import pcg_compile.integrations.transformers as integration  # noqa: E402
from pcg_compile.batch import Batch  # noqa: E402
from pcg_compile.errors import BatchError  # noqa: E402
from pcg_compile.step import step  # noqa: E402

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = dict(
    **COMMON, intermediate_size=48, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=4, attn_logit_softcapping=3.0, query_pre_attn_scalar=12
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip
PROMPTS = (7, 1, 12)
NEW = 6


def both(name):
    """A model with transformers' attention, and one with ours and the same weights."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = auto.from_config(copy.deepcopy(config), attn_implementation="pcg").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.7)  # Random tokens would follow each other whatever attention does.
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_of_ragged_requests_equal_generate(name):
    theirs, ours = both(name)
    prompts = [torch.randint(1, 96, (n,)) for n in PROMPTS]
    expected = [
        theirs.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=NEW, do_sample=False)[0]
        for p in prompts
    ]
    assert len({tuple(e[len(p) :].tolist()) for e, p in zip(expected, prompts, strict=True)}) > 1
    cache = integration.cache_for(ours, num_pages=32, page_size=4)
    tables: list[list[int]] = [[] for _ in prompts]
    texts, news = [p.tolist() for p in prompts], [p.tolist() for p in prompts]
    for _ in range(NEW):
        for table, text in zip(tables, texts, strict=True):
            table += cache.allocate(-(-len(text) // 4) - len(table))
        batch = Batch([len(n) for n in news], [len(t) for t in texts], tables)
        with step(batch, cache):
            result = ours(torch.tensor([[token for new in news for token in new]]), position_ids=batch.positions[None])
        assert result.get("past_key_values") is None
        last = torch.tensor(batch.qo_lens).cumsum(0) - 1
        news = [[token] for token in result.logits[0, last].argmax(-1).tolist()]
        texts = [text + new for text, new in zip(texts, news, strict=True)]
    assert texts == [e.tolist() for e in expected]


def test_logits_are_those_of_transformers_to_rounding():
    theirs, ours = both("gemma2")
    ids = torch.randint(1, 96, (11,))
    cache = integration.cache_for(ours, num_pages=8, page_size=4)
    batch = Batch([11], page_table=[cache.allocate(3)])
    with step(batch, cache):
        logits = ours(ids[None], position_ids=batch.positions[None]).logits
    with torch.no_grad():
        expected = theirs(ids[None]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_use_cache_is_off(name):
    config = CONFIGS[name]()
    assert config.use_cache
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pcg")
    assert not model.config.use_cache
    other = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa")
    assert other.config.use_cache
    other.set_attn_implementation("pcg")
    assert not other.config.use_cache


def test_cache_for_reads_a_config_and_a_model():
    config = CONFIGS["qwen3"]()
    cache = integration.cache_for(config, num_pages=3, page_size=2, max_requests=4)
    assert tuple(cache.k[0].shape) == (3, 2, 2, 16) and len(cache.k) == 3 and cache.max_requests == 4
    gpt2 = integration.cache_for(CONFIGS["gpt2"](), num_pages=3, dtype=torch.bfloat16)
    assert tuple(gpt2.v[0].shape) == (3, 16, 4, 8) and gpt2.dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pcg").double()
    assert integration.cache_for(model, num_pages=2).dtype == torch.float64


def test_outside_a_step_the_cure_is_named():
    _, ours = both("llama")
    with pytest.raises(BatchError, match=r"with pcg\.step\(batch, cache\)"):
        ours(torch.ones(1, 3, dtype=torch.int64))


def test_what_it_cannot_do_is_refused():
    _, ours = both("llama")
    cache = integration.cache_for(ours, num_pages=8)
    batch = Batch([2, 2], page_table=[[1], [2]])
    ids = torch.ones(2, 2, dtype=torch.int64)
    with step(batch, cache):
        with pytest.raises(BatchError, match="2 rows of tokens"):
            ours(ids)
        with pytest.raises(BatchError, match="3 tokens, the batch of the step has 4"):
            ours(torch.ones(1, 3, dtype=torch.int64))
        with pytest.raises(BatchError, match="attention mask"):
            ours(torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 1, 4, 4))
        for name in ("past_key_values", "cache"):
            with pytest.raises(BatchError, match=f"{name} inside a step"):
                ours(torch.ones(1, 4, dtype=torch.int64), **{name: transformers.DynamicCache(config=ours.config)})
        with pytest.raises(BatchError, match="use_cache=True inside a step"):
            ours(torch.ones(1, 4, dtype=torch.int64), use_cache=True)


def test_training_mode_with_dropout_is_refused():
    config = transformers.LlamaConfig(**LLAMA, attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pcg").train()
    cache = integration.cache_for(model, num_pages=8)
    with step(Batch([4], page_table=[[1]]), cache), pytest.raises(BatchError, match=r"model\.eval\(\)"):
        model(torch.ones(1, 4, dtype=torch.int64))
