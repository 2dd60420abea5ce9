"""What transformers' families ask of attention beside causal masks: sinks, values of another size."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import pcg_compile as pcg
from benchmarks import families
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.integrations.transformers import attention, cache_for, image_groups
from pcg_compile.integrations.transformers.counted import CountedPositions


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


def test_layers_that_count_positions_get_the_steps(monkeypatch):
    """Llama 4 scales queries by positions, here from the third on, in layers without rotation."""
    eager, model = families.both(families.small_config("llama4_text"), tf.Llama4ForCausalLM)
    assert families.worst_of_steps(eager, model, len(families.STEPS)) < 1e-5
    monkeypatch.setattr(CountedPositions, "get_seq_length", lambda self, layer_idx=0: 0)
    assert families.worst_of_steps(eager, model, len(families.STEPS)) > 1e-3
    _, model = families.both(families.small_config("llama4_text"), tf.Llama4ForCausalLM)
    with pytest.raises(OptionsError, match="counts"):
        cache_for(model, 8)


def test_llama_4_with_rope_in_all_layers_counts_nothing():
    config = families.small_config("llama4_text")
    config.no_rope_layers = [1] * 4
    eager, model = families.both(config, tf.Llama4ForCausalLM)
    assert families.worst_of_steps(eager, model, len(families.STEPS)) < 1e-5


IMAGE = 60


def gemma_with_images(window=8):
    config = families.small_config("gemma3")
    config.image_token_id, config.text_config.sliding_window = IMAGE, window
    return families.both(config, tf.Gemma3ForConditionalGeneration)


@pytest.mark.parametrize("compiled", [False, True])
def test_images_of_packed_requests_equal_each_request_alone(compiled):
    """Prompts of two, one and no images in one step, then their decode steps."""
    eager, model = gemma_with_images()
    torch.manual_seed(0)
    prompts = [torch.randint(3, 50, (n,)) for n in (14, 9, 5)]
    prompts[0][1:5] = prompts[0][7:11] = prompts[1][5:9] = IMAGE
    pictures, owners = torch.randn(3, 3, 32, 32), [slice(0, 2), slice(2, 3), slice(3, 3)]
    after = torch.randint(3, 50, (3, 2))
    wanted = []
    with torch.no_grad():
        for prompt, own, more in zip(prompts, owners, after, strict=True):
            ids = torch.cat([prompt, more])[None]
            images = {"pixel_values": pictures[own]} if len(pictures[own]) else {}
            wanted.append(eager(input_ids=ids, token_type_ids=(ids == IMAGE).long(), **images).logits[0])
    cache = cache_for(model, 32, 4)
    if compiled:
        # Pictures are made into embeddings by the model around it.
        torch._dynamo.reset()
        model.model.language_model.compile(backend="pcg", options={"compiler": "eager", "buckets": [4, 32]})
    lens, packed = [len(prompt) for prompt in prompts], torch.cat(prompts)
    types, pages = (packed == IMAGE).long(), [cache.allocate(4) for _ in prompts]
    with pcg.step(pcg.Batch(lens, lens, pages, groups=image_groups(types, lens)), cache) as batch:
        got = model(packed[None], pixel_values=pictures, position_ids=batch.positions[None], token_type_ids=types[None])
    alone = torch.cat([one[:n] for one, n in zip(wanted, lens, strict=True)])
    torch.testing.assert_close(got.logits[0], alone, rtol=1e-4, atol=1e-4)
    for i in range(2):
        batch = pcg.Batch([1] * 3, [n + i + 1 for n in lens], pages)
        with pcg.step(batch, cache):
            got = model(after[:, i][None], position_ids=batch.positions[None])
        alone = torch.stack([one[n + i] for one, n in zip(wanted, lens, strict=True)])
        torch.testing.assert_close(got.logits[0], alone, rtol=1e-4, atol=1e-4)


def test_images_that_the_batch_does_not_have_are_refused():
    _, model = gemma_with_images(window=3)
    cache, ids = cache_for(model, 8, 4), torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7]])
    types = (ids == IMAGE).long()
    for groups, match in ((None, "does not have as groups"), ([-1, 0, 0, 1, 1, -1], "does not have"),
                          (image_groups(types, [6]), "a window of 3 would cut")):  # fmt: skip
        with pcg.step(pcg.Batch([6], [6], [[1, 2]], groups=groups), cache), pytest.raises(BatchError, match=match):
            model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), token_type_ids=types)


def test_image_groups_end_with_their_request():
    assert image_groups([0, 1, 1, 1, 1, 0, 1], [3, 4]) == [-1, 0, 0, 1, 1, -1, 2]
    assert image_groups(torch.tensor([[0, 0]]), [1, 1]) == [-1, -1]
