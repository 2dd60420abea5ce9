"""Model families of transformers from tiny configs. With their own attention: right at any length, and what padding
analysis refuses to capture is only what does mix tokens. With pcg's: right in packed steps or refused with a reason, of
which ``docs/families.md`` has the table."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pcg_compile as pcg
from benchmarks import families

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LENGTHS = [5, 9, 16, 3, 31, 7, 8, 17, 2, 12, 24, 15]

FAMILIES = {
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**GROUPED)),
    "qwen3-moe": lambda: tf.Qwen3MoeModel(tf.Qwen3MoeConfig(**GROUPED, **EXPERTS)),
    "mixtral": lambda: tf.MixtralModel(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gemma": lambda: tf.GemmaModel(tf.GemmaConfig(**GROUPED)),
    "gemma2": lambda: tf.Gemma2Model(tf.Gemma2Config(**GROUPED, sliding_window=8)),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, use_cache=False)),
    "opt": lambda: tf.OPTModel(
        tf.OPTConfig(vocab_size=60, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=2,
                     max_position_embeddings=128, word_embed_proj_dim=32, use_cache=False)
    ),
    "phi": lambda: tf.PhiModel(tf.PhiConfig(**SMALL, use_cache=False)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SMALL)),
    "modernbert": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(**SMALL, local_attention=8, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: tf.T5EncoderModel(
        tf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "mamba": lambda: tf.MambaModel(
        tf.MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False)
    ),
}  # fmt: skip

#: Reasons that may come up: by family, a text that each refusal holds.
MIXING = {
    # Tokens are sorted by expert, so an expert's tokens lie side by side.
    "qwen3-moe": ("mixing", "depends on data", "opaque"),
    "mixtral": ("mixing", "depends on data", "opaque"),
    # Computes attention out of plain ops, so the whole model is one piece that mixes tokens.
    "gemma2": ("_softmax",),
    # Branches on whether its window covers the whole sequence.
    "modernbert": ("guards allow",),
    # Loops over tokens in Python: a graph for each length.
    "mamba": ("guards allow", "opaque"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16, 32]})
    with torch.no_grad():
        for n in LENGTHS[: 2 if name == "mamba" else None]:
            ids = torch.randint(1, 60, (1, n))
            want, got = (call(input_ids=ids).last_hidden_state for call in (model, compiled))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    stats = pcg.stats(compiled)
    assert stats.replays > 0 or name == "gemma2"
    refused = [f for f in stats.fallbacks if not any(text in f.reason for text in MIXING.get(name, ()))]
    assert not refused, "\n".join(f"{f.count} x {f.reason} (at {f.where})" for f in refused)


#: Of each kind one: what is right, and each way to be refused.
SERVED = {
    "llama": "right", "gemma3_text": "right", "gpt2": "right", "opt": "right", "roberta": "right", "phimoe": "right",
    "qwen2_moe": "right", "jetmoe": "right", "mixtral": "right",
    "bart": "takes no position_ids", "mamba": "carries a state", "gpt_oss": "right",
    "diffllama": "several times with layer_idx", "git": "chooses its attention by itself", "rembert": "by itself",
    "deepseek_v3": "right", "gemma4_text": "differ", "lfm2": "layers of type conv",
    "llama4_text": "right", "doge": "by itself",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_packed_steps_are_right_or_refused(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this transformers does not have it")
    result = families.outcome(name)
    assert result == SERVED[name] if SERVED[name] == "right" else result.startswith("refused: ")
    assert SERVED[name] in result


@pytest.mark.skipif(not hasattr(tf, "Llama4ForCausalLM"), reason="this transformers does not have it")
def test_chunked_attention_is_right():
    """Llama 4 without the scale that it counts positions for: a chunk of five tokens, the cache in pages of four."""
    config = families.small_config("llama4_text")
    config.attn_temperature_tuning = False
    assert config.layer_types == 3 * ["chunked_attention"] + ["full_attention"] and config.attention_chunk_size == 5
    eager, model = families.both(config, tf.Llama4ForCausalLM)
    assert families.worst_of_steps(eager, model, plain=4) < 1e-5


def test_the_table_has_right_or_refused_families_alone():
    table = families.read_page()
    others = [row[2] for row in table.values() if row[2] not in families.RIGHT]
    assert len(table) - len(others) > 90
    assert all(other.startswith(("refused: ", "not run here: ImportError")) for other in others), others
    assert sum(other.startswith("not run here") for other in others) <= 1


def test_the_table_names_every_family_of_its_transformers():
    table, text = families.read_page(), families.PAGE.read_text()
    if tf.__version__ not in text:
        pytest.skip("the table is that of another transformers")
    assert set(table) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
