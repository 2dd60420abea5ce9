"""Inside a step a transformers model gets from the step what a call leaves out, and refuses what contradicts it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import pcg_compile as pcg
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.integrations.transformers import cache_for

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**MORE, num_key_value_heads=2),
    "mistral": lambda: tf.MistralConfig(**MORE, num_key_value_heads=2, sliding_window=3),
    "gpt2": lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "roberta": lambda: tf.RobertaConfig(**MORE, is_decoder=True),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**{**MORE, "pad_token_id": 1}, is_decoder=True),
}  # fmt: skip
NEW, HAVE = ((5, 4), (1, 3), (2, 1)), ((5, 4), (6, 7), (8, 8))


def pair(name):
    torch.manual_seed(0)
    eager = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="pcg").eval()
    model.load_state_dict(eager.state_dict())
    return eager, model


def ways_to_call(model, way):
    """The model; compiled; and called by a function that is compiled."""
    torch._dynamo.reset()
    options = {"buckets": [4, 16], "compiler": "eager"}
    if way == "plain":
        return model
    if way == "compiled":
        return torch.compile(model, backend="pcg", options=options)
    return torch.compile(lambda **kwargs: model(**kwargs), backend="pcg", options=options)


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "plain") for name in CONFIGS), ("roberta", "compiled"), ("llama", "inside")]
)
def test_positions_and_masks_may_be_left_out(name, way):
    """Also where a model's own positions begin elsewhere, as RoBERTa's behind its padding index."""
    eager, model = pair(name)
    run, cache = ways_to_call(model, way), cache_for(model, num_pages=9, page_size=4)
    texts, pages = torch.randint(3, 60, (2, 9)), [cache.allocate(3), cache.allocate(3)]
    with torch.no_grad():
        alone = [eager(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    for new, have in list(zip(NEW, HAVE, strict=True))[: 3 if way == "plain" else 2]:
        spans = [slice(b - a, b) for a, b in zip(new, have, strict=True)]
        ids = torch.cat([text[span] for text, span in zip(texts, spans, strict=True)])[None]
        wanted = torch.cat([rows[span] for rows, span in zip(alone, spans, strict=True)])
        batch = pcg.Batch(new, have, pages)
        with pcg.step(batch, cache):
            for given in ({}, {"position_ids": batch.positions[None]}, {"attention_mask": torch.ones_like(ids)}):
                result = run(input_ids=ids, **given)
                assert result.get("past_key_values") is None and result.get("cache") is None
                torch.testing.assert_close(result.logits[0], wanted, rtol=1e-4, atol=1e-4)
    if way == "compiled":
        # What is left out is completed outside of the graph.
        assert pcg.stats(run).replays > 0 and not pcg.stats(run).fallbacks


def a_cache(model):
    return tf.DynamicCache(config=model.config)


@pytest.mark.parametrize("way", ["plain", "compiled"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda model: {"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "an attention mask that hides tokens"),
        (lambda model: {"attention_mask": torch.tensor([[True, True, True, False]])}, "an attention mask"),
        (lambda model: {"attention_mask": torch.zeros(1, 1, 4, 4)}, "an attention mask"),
        (lambda model: {"use_cache": True}, "use_cache=True inside a step"),
        (lambda model: {"past_key_values": a_cache(model)}, "past_key_values inside a step"),
        (lambda model: {"input_ids": torch.ones(2, 2, dtype=torch.int64)}, "2 rows of tokens"),
        (lambda model: {"input_ids": torch.ones(1, 3, dtype=torch.int64)}, "3 tokens, the batch of the step has 4"),
    ],
)
def test_what_contradicts_the_step_is_refused(given, reason, way):
    _, model = pair("llama")
    run, cache = ways_to_call(model, way), cache_for(model, num_pages=4)
    batch = pcg.Batch([4], [4], [cache.allocate(1)])
    with pcg.step(batch, cache), pytest.raises(BatchError, match=reason):
        run(**{"input_ids": torch.ones(1, 4, dtype=torch.int64), **given(model)})


def test_arguments_may_be_positional():
    eager, model = pair("llama")
    cache = cache_for(model, num_pages=4)
    ids = torch.randint(3, 60, (1, 5))
    with torch.no_grad():
        wanted = eager(ids).logits
    with pcg.step(pcg.Batch([5], [5], [cache.allocate(1)]), cache):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(BatchError, match="inside a step"):
            model(ids, None, None, a_cache(model))


def test_generate_says_what_to_call_instead():
    _, model = pair("llama")
    cache, ids = cache_for(model, num_pages=4), torch.ones(1, 4, dtype=torch.int64)
    for run in (model, torch.compile(model, backend="pcg")):
        with pytest.raises(BatchError, match=r"generate_batch(.|\n)*set_attn_implementation\(\"sdpa\"\)"):
            run.generate(ids, max_new_tokens=3)
        with (
            pcg.step(pcg.Batch([4], [4], [[1]]), cache),
            pytest.raises(BatchError, match=r"generate\(\) makes no steps"),
        ):
            run.generate(ids, max_new_tokens=3)
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 4


def test_fullgraph_takes_positions_and_names_the_cure_without():
    _, model = pair("llama")
    cache = cache_for(model, num_pages=4)
    torch._dynamo.reset()
    run = torch.compile(model, backend="pcg", fullgraph=True, options={"compiler": "eager", "buckets": [4]})
    batch, ids = pcg.Batch([4], [4], [cache.allocate(1)]), torch.ones(1, 4, dtype=torch.int64)
    with pcg.step(batch, cache):
        assert run(input_ids=ids, position_ids=batch.positions[None]).logits.shape == (1, 4, 64)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"position_ids=batch\.positions\[None\]"):
            run(input_ids=ids)


def test_image_blocks_that_only_the_mask_has_are_refused():
    """Gemma 3 lets the tokens of an image see each other, where its call says which tokens those are."""
    text = tf.Gemma3TextConfig(**MORE, num_key_value_heads=2, head_dim=8, sliding_window=4)
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16
    )
    config = tf.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    model = tf.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "pcg", "vision_config": "sdpa"}
    ).eval()
    cache, ids = cache_for(model, num_pages=4), torch.randint(3, 60, (1, 6))
    batch = pcg.Batch([6], [6], [cache.allocate(1)])
    with pcg.step(batch, cache):
        assert model(input_ids=ids).logits.isfinite().all()
        with pytest.raises(BatchError, match="does not have as groups"):
            model(input_ids=ids, token_type_ids=torch.tensor([[0, 1, 1, 1, 1, 0]]))


def test_a_copy_and_another_implementation_keep_or_lose_the_completion():
    eager, model = pair("mistral")
    copied, ids = copy.deepcopy(model), torch.randint(3, 60, (1, 6))
    cache = cache_for(copied, num_pages=4)
    with torch.no_grad():
        wanted = eager(input_ids=ids, use_cache=False).logits
        with pcg.step(pcg.Batch([6], [6], [cache.allocate(1)]), cache):
            torch.testing.assert_close(copied(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        model.set_attn_implementation("sdpa")
        hidden = torch.tensor([[0, 0, 1, 1, 1, 1]])
        torch.testing.assert_close(
            model(ids, attention_mask=hidden, use_cache=True).logits[:, 2:],
            eager(ids, attention_mask=hidden, use_cache=True).logits[:, 2:],
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    "config",
    [
        lambda: tf.Gemma4TextConfig(
            **MORE, num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=6,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        lambda: tf.LlamaConfig(**MORE, num_key_value_heads=2, per_layer_config={1: {"num_key_value_heads": 4}}),
    ],
    ids=["head_dim", "kv heads"],
)  # fmt: skip
def test_layers_that_differ_have_no_cache(config):
    config = config()
    with pytest.raises(OptionsError, match="differ"):
        cache_for(config, num_pages=4)


def test_a_cache_is_made_for_what_layers_store():
    """JetMoe's config has 2 key heads, its attention gets them once for each of the experts that a token has."""
    config = tf.JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    eager = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="pcg").eval()
    model.load_state_dict(eager.state_dict())
    cache, ids = cache_for(model, num_pages=4), torch.randint(3, 60, (1, 6))
    assert cache.num_kv_heads == 4
    with pcg.step(pcg.Batch([6], [6], [cache.allocate(1)]), cache):
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_dtype_of_a_config_may_be_a_name():
    config = tf.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    config.dtype = "float64"
    assert cache_for(config, num_pages=2).dtype == torch.float64
