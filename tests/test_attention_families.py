"""What transformers' families ask of attention beside causal masks: sinks, values of another size."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from benchmarks import families
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.integrations.transformers import attention, cache_for


@pytest.mark.parametrize("page_size", [1, 16])
def test_caches_have_values_of_their_own_size(page_size):
    config = families.small_config("deepseek_v3")
    for source in (config, families.both(config, families.class_of("deepseek_v3"))[1]):
        cache = cache_for(source, 8, page_size)
        assert (cache.num_kv_heads, cache.head_dim, cache.v_head_dim) == (4, 16, 8)
        assert cache.k[0].shape == (8, page_size, 4, 16) and cache.v[0].shape == (8, page_size, 4, 8)


@pytest.mark.parametrize("window", [4, 64])
def test_sinks_are_part_of_the_softmax(window):
    """Large ones, so leaving them out shows."""
    config = families.small_config("gpt_oss")
    config.sliding_window = window
    eager, model = families.both(config, tf.GptOssForCausalLM)
    with torch.no_grad():
        for one in (eager, model):
            for layer in one.model.layers:
                layer.self_attn.sinks.copy_(torch.linspace(-2, 4, 4))
        assert families.worst_of_steps(eager, model, len(families.STEPS)) < 1e-5
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
        assert families.worst_of_steps(eager, model, len(families.STEPS)) > 1e-2


def test_sinks_that_a_model_has_and_does_not_pass_are_refused(monkeypatch):
    """Its own attention, which the trial looks at, has more to it than it says."""
    config = copy.deepcopy(families.small_config("gpt_oss"))
    monkeypatch.setitem(tf.AttentionInterface._global_mapping, "pcg", lambda *a, s_aux=None, **k: attention(*a, **k))
    _, model = families.both(config, tf.GptOssForCausalLM)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(3.0)
    with pytest.raises((OptionsError, BatchError), match="computes more than softmax"):
        cache_for(model, 8)
