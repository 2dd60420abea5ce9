"""A trial tells a model that computes each token by itself around attention from one that does not, of any class."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import transformers as tf
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

import pcg_compile as pcg
from pcg_compile.errors import OptionsError
from pcg_compile.integrations.transformers import cache_for

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What :class:`Biased` computes: attention with a bias that it does not pass on."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    scores = query @ key.transpose(2, 3) * scaling + attention_mask - 0.1 * distance
    return (torch.softmax(scores, -1) @ value).transpose(1, 2), None


class Biased(LlamaAttention):
    """Attention whose module has more to it than softmax."""


def llama(**fields):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**SIZES, **fields})
    return tf.LlamaForCausalLM._from_config(config, attn_implementation="pcg").eval()


def around(module, function):
    """Puts ``function(forward, *args, **kwargs)`` in the place of a module's forward."""
    forward = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: function(forward, *args, **kwargs), module)


def shifted_tokens(model):
    around(model.model.layers[0].mlp, lambda forward, x: forward(x) + 0.1 * x.roll(1, 1))


def mean_over_tokens(model):
    around(model.model.norm, lambda forward, x: forward(x - x.mean(1, keepdim=True)))


def neighbours_in_the_embedding(model):
    around(model.model.embed_tokens, lambda forward, ids: forward(ids) + 0.1 * forward(ids.roll(1, 1)))


def positions_of_its_own(model):
    def forward(inner, x, position_ids):
        return inner(x, position_ids=torch.arange(x.shape[1])[None])

    around(model.model.rotary_emb, forward)


def frequencies_by_the_longest(model):
    def forward(inner, x, position_ids):
        return inner(x, position_ids=position_ids / (1 + position_ids.max() // 32))

    around(model.model.rotary_emb, forward)


def positions_from(start, step=1):
    def change(model):
        def forward(inner, input_ids=None, position_ids=None, **kwargs):
            if position_ids is None:
                position_ids = (start + step * torch.arange(input_ids.shape[1]))[None]
            return inner(input_ids=input_ids, position_ids=position_ids, **kwargs)

        around(model.model, forward)

    return change


def bias_that_is_not_passed(model):
    for layer in model.model.layers:
        layer.self_attn.__class__ = Biased


def one_layer_twice(model):
    model.model.layers[1].self_attn.layer_idx = 0


def other_heads_in_a_layer(model):
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    model.model.layers[1].self_attn = LlamaAttention(config, 1)


def attention_without_a_mask(model):
    def forward(inner, *args, attention_mask=None, **kwargs):
        return inner(*args, attention_mask=None, **kwargs)

    around(model.model.layers[1].self_attn, forward)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shifted_tokens, "mixes tokens"),
        (mean_over_tokens, "mixes tokens"),
        (neighbours_in_the_embedding, "mixes tokens|positions"),
        (positions_of_its_own, "counts positions by itself"),
        (frequencies_by_the_longest, "follows the longest request"),
        (positions_from(0, step=2), "more than a token's place|depends on data"),
        (positions_from(40), "more than a token's place"),
        (bias_that_is_not_passed, "more than softmax"),
        (one_layer_twice, "several times with layer_idx 0"),
        (other_heads_in_a_layer, "differ"),
        (attention_without_a_mask, "no attention mask"),
    ],
)
def test_a_model_with_something_else_around_attention_is_refused(change, reason):
    model = llama()
    cache_for(copy.deepcopy(model), num_pages=4)
    change(model)
    with pytest.raises(OptionsError, match=reason):
        cache_for(model, num_pages=4)
    if reason != "differ":
        cache = pcg.PagedKVCache(2, 4, num_kv_heads=2, head_dim=8)
        with pcg.step(pcg.Batch([3], [3], [[1]]), cache), pytest.raises(OptionsError, match=reason):
            model(torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("start", [1, 3])
def test_positions_that_begin_elsewhere_are_completed(start):
    model = llama()
    ids = torch.randint(3, 60, (1, 5))
    positions_from(start)(model)
    cache = cache_for(model, num_pages=4)
    batch = pcg.Batch([5], [5], [cache.allocate(1)])
    with pcg.step(batch, cache):
        got = model(ids, position_ids=batch.positions[None]).logits
    other = llama()
    other.set_attn_implementation("eager")
    wanted = other(ids, position_ids=start + torch.arange(5)[None], use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        lambda: tf.LlamaConfig(**SIZES),
        lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
        lambda: tf.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        lambda: tf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
        lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[0, 1]),
    ],
    ids=["llama", "mixtral", "qwen3-moe", "gemma2", "gpt2", "smollm3"],
)
def test_rounding_is_no_reason_to_refuse(config, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config(), attn_implementation="pcg", dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        assert cache_for(model, num_pages=4).dtype == dtype


def test_a_trial_leaves_no_trace():
    """Random numbers, the mode, gradients and the running step are as before; a model is tried once."""
    model, calls = llama(attention_dropout=0.5).train(), []
    around(model.model.norm, lambda forward, x: calls.append(len(x)) or forward(x))
    state = torch.random.get_rng_state()
    cache = cache_for(model, num_pages=4)
    tried = len(calls)
    assert tried and torch.equal(torch.random.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    with pcg.step(pcg.Batch([3], [3], [cache.allocate(1)]), cache):
        model(torch.ones(1, 3, dtype=torch.int64))
    cache_for(model, num_pages=4)
    assert len(calls) == tried + 1


def test_a_model_without_memory_is_tried_in_its_first_step():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM._from_config(tf.LlamaConfig(**SIZES), attn_implementation="pcg").eval()
    cache = cache_for(model, num_pages=4, device="cpu")
    assert (cache.num_layers, cache.num_kv_heads, cache.head_dim) == (2, 2, 8)
    full = llama()
    model.to_empty(device="cpu")
    model.load_state_dict(full.state_dict())
    model.model.rotary_emb.load_state_dict(full.model.rotary_emb.state_dict())
    for name, buffer in full.named_buffers():
        model.get_buffer(name).copy_(buffer)
    positions_of_its_own(model)
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache), pytest.raises(OptionsError, match="counts positions by itself"):
        model(torch.ones(1, 3, dtype=torch.int64))
