"""generate_batch: every answer equals the request's generated alone, and every page comes back."""

from __future__ import annotations

import pytest
import torch
from adapters import llama, save_with_peft

import pcg_compile as pcg
from pcg_compile.integrations import generation
from pcg_compile.integrations.generation import Engine, Request, Sampling, Session, generate_batch
from pcg_compile.integrations.generation.engine import attending_through_pcg
from pcg_compile.integrations.generation.pages import PagePool
from pcg_compile.integrations.generation.sampler import SamplingState, make_sampler
from pcg_compile.integrations.transformers import cache_for

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = (5, 1, 40, 17, 3, 33, 16, 32, 21)
PROMPTS = [torch.randint(3, 60, (n,), generator=GENERATOR).tolist() for n in LENGTHS] + [[7] * 20] * 3
SMALL = {"max_batch_tokens": 32, "options": {"buckets": [4, 8, 16, 32]}}


@pytest.fixture
def model():
    torch._dynamo.reset()
    made = llama("sdpa")
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


def tokens(outputs):
    return [output.generated_tokens for output in outputs.values()]


def greedily(model, prompt, most):
    with torch.no_grad():
        return model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)[0, len(prompt) :].tolist()


def free_pages(model):
    return model._pcg_generation.engine.cache.free_pages


def all_pages(model):
    return model._pcg_generation.engine.cache.num_pages - 1


def test_greedy_equals_generate(model):
    outputs = generate_batch(model, PROMPTS, max_new_tokens=12, **SMALL)
    assert list(outputs) == [f"req_{i}" for i in range(len(PROMPTS))]
    for prompt, output in zip(PROMPTS, outputs.values(), strict=True):
        assert output.prompt_ids == prompt
        assert output.generated_tokens == greedily(model, prompt, 12)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + output.generated_tokens])).logits[0].log_softmax(-1)
        want = logprobs[len(prompt) - 1 : -1].gather(-1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), want, atol=1e-4, rtol=1e-4)
    assert free_pages(model) == all_pages(model)
    engine = model._pcg_generation.engine
    stats = pcg.stats(engine.forward())
    assert stats.replays > 0 and stats.graphs == 1 and not stats.fallbacks, stats


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2, "temperature": 2.0},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_does_not_depend_on_the_company(model, settings):
    seeds = list(range(100, 100 + len(PROMPTS)))
    settings = {"do_sample": True, "max_new_tokens": 8, "top_k": None, **SMALL, **settings}
    together = tokens(generate_batch(model, PROMPTS, seeds=seeds, **settings))
    alone = [tokens(generate_batch(model, [p], seeds=[s], **settings))[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert together != tokens(generate_batch(model, PROMPTS, seeds=[s + 1 for s in seeds], **settings))


def test_a_full_cache_preempts_and_loses_nothing(model):
    want = tokens(generate_batch(model, PROMPTS, max_new_tokens=30, **SMALL))
    # The longest request alone needs 5 of these 7 pages.
    assert tokens(generate_batch(model, PROMPTS, max_new_tokens=30, num_pages=8, **SMALL)) == want
    assert free_pages(model) == all_pages(model) == 7


@pytest.mark.parametrize("pages", [9, 11, 14])
def test_prompts_that_fit_the_cache_one_at_a_time_only(model, pages):
    """The one that is preempted waits for a step of the others: admitted at once, it would be preempted again."""
    prompts = [torch.randint(3, 60, (28,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    outputs = generate_batch(model, prompts, max_new_tokens=4, num_pages=pages, page_size=4)
    assert tokens(outputs) == [greedily(model, prompt, 4) for prompt in prompts]
    assert free_pages(model) == all_pages(model)


def test_identical_prompts_share_their_pages(model):
    prompt = PROMPTS[2]
    computed = []

    class Counting(Session):
        def _launch(self, scheduled):
            computed.append(sum(scheduled.lengths))
            return super()._launch(scheduled)

    want = greedily(model, prompt, 6)
    cache = cache_for(model.config, num_pages=64)
    with attending_through_pcg(model), torch.no_grad():
        engine = Engine(model, cache, 16, 64, {"compiler": "eager"})
        with Counting(engine, 64) as session:
            for i in range(8):
                session.add(Request(f"r{i}", i, prompt, 6, Sampling()))
            list(session.run())
            assert all(request.generated == want for request in session.requests.values())
    # The first computes 40 tokens; each other one shares two full pages and copies 7 tokens of the third.
    # As the number of tokens is known, no step runs that nobody needs.
    assert sum(computed) == 40 + 7 * 1 + 8 * 5
    assert cache.free_pages == 63


def test_decoding_steps_read_nothing_from_the_host(model, monkeypatch):
    """While the same requests decode on pages that they have, a step's metadata come from those of the step before."""
    written, write = [], pcg.PagedKVCache._write
    monkeypatch.setattr(pcg.PagedKVCache, "_write", lambda self, *args: written.append(args[0]) or write(self, *args))
    want = [greedily(model, prompt, 90) for prompt in PROMPTS[:4]]
    generate_batch(model, PROMPTS[:4], max_new_tokens=90, **SMALL)
    written.clear()
    outputs = generate_batch(model, PROMPTS[:4], max_new_tokens=90, **SMALL)
    assert tokens(outputs) == want
    # Pages come for 32 tokens at a time; prompts share the first steps.
    assert len(written) < 12 and sum(batch.num_tokens == batch.num_requests for batch in written) >= 3
    assert free_pages(model) == all_pages(model)


@pytest.mark.parametrize("pages", [8, 9, 11, 16])
def test_pages_ahead_are_no_reason_to_preempt(model, monkeypatch, pages):
    """They come back first: three requests of 33 tokens fit 9 pages, and all are computed once."""
    left, leave = [], generation.scheduler.Scheduler._leave
    monkeypatch.setattr(
        generation.scheduler.Scheduler, "_leave", lambda self, r: left.append(r.finished) or leave(self, r)
    )
    prompts = [PROMPTS[0], PROMPTS[4], PROMPTS[5][:5]]
    outputs = generate_batch(model, prompts, max_new_tokens=28, num_pages=pages + 1, **SMALL)
    assert tokens(outputs) == [greedily(model, prompt, 28) for prompt in prompts]
    assert all(left) or pages < 9
    assert free_pages(model) == all_pages(model) == pages


def test_samples_of_one_prompt(model):
    outputs = generate_batch(
        model, PROMPTS[:3], do_sample=True, num_return_sequences=3, max_new_tokens=5, seeds=list(range(9)), **SMALL
    )
    assert list(outputs)[:4] == ["req_0__child#0", "req_0__child#1", "req_0", "req_1__child#0"]
    assert len({tuple(t) for t in tokens(outputs)}) > 3


def test_end_tokens_and_stop_strings(model):
    class Tokenizer:
        def decode(self, ids):
            return " ".join(map(str, ids))

    long = greedily(model, PROMPTS[0], 12)
    cut = long.index(long[4])
    assert tokens(generate_batch(model, PROMPTS[:1], max_new_tokens=12, eos_token_id=long[4], **SMALL)) == [
        long[: cut + 1]
    ]
    stop = f"{long[2]} {long[3]}"
    (found,) = tokens(
        generate_batch(model, PROMPTS[:1], max_new_tokens=12, stop_strings=[stop], tokenizer=Tokenizer(), **SMALL)
    )
    assert found == long[: len(found)] and Tokenizer().decode(found).endswith(stop)
    assert free_pages(model) == all_pages(model)


def test_streams_and_cancels(model):
    seen: dict[str, list] = {}

    def streamer(name, token):
        seen.setdefault(name, []).append(token)
        return not (name == "req_1" and len(seen[name]) == 3)

    outputs = generate_batch(model, PROMPTS[:4], max_new_tokens=9, streamer=streamer, **SMALL)
    assert len(outputs["req_1"].generated_tokens) == 3
    for name, output in outputs.items():
        assert seen[name] == [*output.generated_tokens, None]
    assert free_pages(model) == all_pages(model)


def test_a_streamer_that_raises_fails_its_request_alone(model):
    want = tokens(generate_batch(model, PROMPTS[:4], max_new_tokens=9, **SMALL))

    def streamer(name, token):
        if name == "req_2":
            raise RuntimeError("broken pipe")

    with pytest.raises(pcg.errors.GenerationError, match="prompt 2 failed: RuntimeError: broken pipe") as caught:
        generate_batch(model, PROMPTS[:4], max_new_tokens=9, streamer=streamer, **SMALL)
    outputs = tokens(caught.value.outputs)
    assert [outputs[i] for i in (0, 1, 3)] == [want[i] for i in (0, 1, 3)]
    assert caught.value.outputs["req_2"].error == "RuntimeError: broken pipe"
    assert free_pages(model) == all_pages(model)


def test_an_error_in_a_step_fails_its_requests_alone(model):
    want = greedily(model, PROMPTS[0], 4)
    cache = cache_for(model.config, num_pages=16)
    with attending_through_pcg(model), torch.no_grad():
        engine = Engine(model, cache, 8, 8, {"compiler": "eager"})
        with Session(engine, 64) as session:
            session.add(Request("bad", 0, [59] * 5, 4, Sampling()))
            engine.forward = lambda *args: (_ for _ in ()).throw(RuntimeError("no memory"))
            list(session.run())
            del engine.forward
            session.add(Request("good", 1, PROMPTS[0], 4, Sampling()))
            list(session.run())
            assert str(session.requests["bad"].error) == "no memory"
            assert session.requests["good"].generated == want
    assert cache.free_pages == 15


def test_weights_updated_in_place_are_used_at_once(model):
    first = tokens(generate_batch(model, PROMPTS[:2], max_new_tokens=6, **SMALL))
    forward = model._pcg_generation.engine.forward()
    captured = pcg.stats(forward).captured
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=GENERATOR) * 0.2)
    second = tokens(generate_batch(model, PROMPTS[:2], max_new_tokens=6, **SMALL))
    assert second != first and second == [greedily(model, p, 6) for p in PROMPTS[:2]]
    assert pcg.stats(forward).captured == captured


def test_an_adapter_for_each_request(model, tmp_path):
    targets = ["q_proj", "v_proj"]
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=8, target_modules=targets)
    for name in ("a", "b"):
        pool.load(name, save_with_peft(tmp_path / name, llama("sdpa"), r=4, lora_alpha=16, target_modules=targets))
    mix = ["a", None, "b", "a", "b"]
    together = tokens(generate_batch(model, PROMPTS[:5], max_new_tokens=6, adapters=mix, **SMALL))
    alone = [
        tokens(generate_batch(model, [p], max_new_tokens=6, adapters=[a], **SMALL))[0]
        for p, a in zip(PROMPTS, mix, strict=False)
    ]
    assert together == alone
    assert together[1] == greedily(llama("sdpa"), PROMPTS[1], 6)
    with pytest.raises(pcg.errors.OptionsError, match="prompt 1 names the adapter 'nobody'"):
        generate_batch(model, PROMPTS[:2], adapters=[None, "nobody"], **SMALL)


def test_the_model_is_as_before(model):
    model.train()
    generate_batch(model, PROMPTS[:2], max_new_tokens=2, **SMALL)
    assert model.training and model.config._attn_implementation == "sdpa" and model.config.use_cache
    loss = model(torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_accelerate_gives_a_model_the_method(model):
    assert pcg.integrations.generation.accelerate(model, max_batch_tokens=32) is model
    config = model.generation_config
    config.max_new_tokens = 4
    outputs = model.generate_batch(
        [PROMPTS[0]], generation_config=config, continuous_batching_config=None, progress_bar=False
    )
    assert tokens(outputs) == [greedily(model, PROMPTS[0], 4)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompts": [[3], []]}, "prompt 1 is empty"),
        ({"prompts": [[3], [4, 99]]}, "prompt 1 is no list of token ids"),
        ({"prompts": ["text"]}, "prompt 0 is no list of token ids"),
        ({"max_new_tokens": 10_000}, "prompt 0 has 5 tokens and wants 10000 more; the model takes 2048"),
        ({"max_new_tokens": 64, "num_pages": 3}, "prompt 0 has 5 tokens and wants 64 more; the cache holds 32"),
        ({"num_beams": 4}, "does not support num_beams=4"),
        ({"beams": 4}, "does not know beams"),
        ({"stop_strings": ["x"]}, "stop_strings need a tokenizer"),
        ({"stop_strings": [""], "tokenizer": object()}, "a stop string is empty"),
        ({"stop_strings": ["x"] * 65, "tokenizer": object()}, "65 stop strings"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5: it is above 0, at most 1"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0: it is 0 or more"),
        ({"do_sample": True, "top_k": -3}, "top_k is -3: it is 1 or more"),
        ({"repetition_penalty": 0.0}, "penalty is 0.0: it is above 0"),
        ({"num_return_sequences": 2}, "Greedy methods"),
        ({"adapters": ["a", "b"]}, "adapters has 2 entries for 1 prompts"),
        ({"adapters": ["a"]}, "prompt 0 names the adapter 'a', which is not loaded"),
        ({"seeds": [1, 2]}, "seeds has 2 entries for 1 results"),
        ({"streamer": 3}, "the streamer is a int"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_refused_before_anything_runs(model, arguments, text):
    arguments = {"prompts": PROMPTS[:1], **SMALL, **arguments}
    with pytest.raises(pcg.errors.OptionsError, match=text.replace("(", r"\(")):
        generate_batch(model, arguments.pop("prompts"), **arguments)
    assert model.config._attn_implementation == "sdpa"
    assert tokens(generate_batch(model, PROMPTS[:1], max_new_tokens=3, **SMALL)) == [greedily(model, PROMPTS[0], 3)]


# -- parts ----------------------------------------------------------------------------------------------------------


def test_the_sampler_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rows = 20_000
    state = SamplingState(1, torch.device("cpu"))
    state.floats[:, 0], state.longs[:, 0] = torch.tensor([0.8, 1.0, 0.0, 1.0]), torch.tensor([3, 0])
    sample = make_sampler(True, True, False)
    slots, counter = torch.zeros(rows, dtype=torch.long), torch.arange(rows)
    found, logprobs = sample(logits.expand(rows, 4), slots, counter, state.floats, state.longs, state.seen)
    want = (logits[0, :3] / 0.8).softmax(-1)
    shares = torch.bincount(found, minlength=4) / rows
    assert shares[3] == 0
    torch.testing.assert_close(shares[:3], want, atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs.exp(), want[found])


def test_filters_equal_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from pcg_compile.integrations.generation.sampler import _filtered

    torch.manual_seed(0)
    for top_k, top_p, min_p in ((5, 1.0, 0.0), (50, 0.7, 0.0), (50, 1.0, 0.3), (7, 0.8, 0.1), (1, 1.0, 0.0)):
        scores = torch.randn(40, 50) * 3
        want = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        want = MinPLogitsWarper(min_p)(None, want) if min_p else want
        rows = torch.ones(40)
        got = _filtered(scores, (rows * top_k).long(), rows[:, None] * top_p, rows[:, None] * min_p)
        assert torch.equal(got, want), (top_k, top_p, min_p)


def test_pages_are_counted_and_evicted():
    cache = pcg.PagedKVCache(1, 6, 4, num_kv_heads=1, head_dim=8)
    pool = PagePool(cache)
    tokens = list(range(10))
    first = [pool.take() for _ in range(3)]
    parent = pool.match(tokens, None).parent
    for i in range(2):
        parent = pool.publish(parent, first[i], tokens[4 * i : 4 * i + 4])
    pool.publish_partial(parent, first[2], tokens[8:])
    match = pool.match([*tokens, 50], None)
    assert match.pages == first[:2] and (match.source, match.tokens) == (first[2], 10)
    assert pool.match([*tokens[:9], 50, 51], None).tokens == 9
    assert pool.match([*tokens, 50], "adapter").pages == []
    pool.release(first), pool.release(match.pages), pool.release(match.pages)
    assert pool.available == 5
    again = pool.match(tokens, None)
    assert again.pages == first[:2] and again.source is None
    pool.release(again.pages)
    assert len({pool.take().number for _ in range(5)}) == 5 and not pool.available
    pool.close()
    assert cache.free_pages == 5


# -- transformers' interface ----------------------------------------------------------------------------------------


def test_arguments_and_results_are_those_of_transformers(model):
    """Each argument of transformers' method, at its place or by its name; each field of its results."""
    import dataclasses
    import inspect

    from transformers.generation.continuous_batching.requests import GenerationOutput

    theirs = list(inspect.signature(type(model).generate_batch).parameters.values())[2:]
    mine = list(inspect.signature(generate_batch).parameters.values())[2:]
    for one, other in zip(theirs, mine, strict=False):
        if one.kind is not inspect.Parameter.VAR_KEYWORD:
            assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    generation.accelerate(model, max_batch_tokens=32)
    config = model.generation_config
    config.max_new_tokens = 4
    config.do_sample, config.num_return_sequences = True, 2
    outputs = model.generate_batch(PROMPTS[:2], config, None, True, False, False, False)
    assert list(outputs) == ["req_0__child#0", "req_0", "req_1__child#0", "req_1"]
    for name, output in outputs.items():
        assert type(output) is GenerationOutput and output.request_id == name and output.is_finished()
        assert output.error is None and len(output.logprobs) == len(output.generated_tokens) == 4
        assert output.timestamps == sorted(output.timestamps) and len(output.timestamps) == 4
        assert output.created_time <= output.lifespan[0] <= output.timestamps[0] <= output.lifespan[1] + 1
        named = {"request_id", "prompt_ids", "generated_tokens", "logprobs", "error", "status", "created_time"}
        assert {field.name for field in dataclasses.fields(output)} == named | {"lifespan", "timestamps"}
    assert model.generate_batch([]) == {}


def test_only_sampled_logits_are_computed(model):
    rows, head = [], model.lm_head.forward
    generate_batch(model, PROMPTS[:1], max_new_tokens=2, **SMALL)
    forward = model._pcg_generation.engine.forward()
    stats = pcg.stats(forward)
    model.lm_head.forward = lambda hidden: rows.append(hidden.shape[-2]) or head(hidden)
    model._pcg_generation.engine = None
    torch._dynamo.reset()
    generate_batch(model, [PROMPTS[2]], max_new_tokens=2, max_batch_tokens=64, options={"compiler": "eager"})
    assert stats.replays > 0 and rows and max(map(int, rows)) <= 16 < len(PROMPTS[2])


def test_a_model_and_its_engine_are_freed(model):
    import gc
    import weakref
    from copy import deepcopy

    generate_batch(model, PROMPTS[:1], max_new_tokens=2, **SMALL)
    assert deepcopy(model)._pcg_generation.engine is None
    alone = weakref.ref(llama("sdpa"))
    assert alone() is None
    other = llama("sdpa")
    other.generation_config.eos_token_id = None
    generate_batch(other, PROMPTS[:1], max_new_tokens=2, **SMALL)
    gone = weakref.ref(other)
    del other
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


# -- linear layers that run as one ------------------------------------------------------------------------------------


def test_layers_of_one_input_share_memory_and_the_model_is_as_before(model, tmp_path):
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    attention = model.model.layers[0].self_attn
    before, modules, states = deepcopy(model), list(model.modules()), list(model.state_dict())
    want = [greedily(model, prompt, 5) for prompt in PROMPTS[:3]]
    assert tokens(generate_batch(model, PROMPTS[:3], max_new_tokens=5, **SMALL)) == want
    storages = {id(m): m.weight.untyped_storage().data_ptr() for m in (attention.q_proj, attention.k_proj)}
    assert len(set(storages.values())) == 1
    assert list(map(id, model.modules())) == list(map(id, modules)) and list(model.state_dict()) == states
    for parameter, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter.is_contiguous() and parameter.requires_grad
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))
    # Training, and what load_state_dict and a cast do, go on as on memory of their own.
    ids = torch.tensor([PROMPTS[2]])
    for one in (model, before):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        one(ids, labels=ids).loss.backward()
        optimizer.step()
    for parameter, other in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)
    assert tokens(generate_batch(model, PROMPTS[:3], max_new_tokens=5, **SMALL)) == [
        greedily(before, prompt, 5) for prompt in PROMPTS[:3]
    ]
    model.double()
    assert tokens(generate_batch(model, PROMPTS[:3], max_new_tokens=5, **SMALL)) == [
        greedily(before.double(), prompt, 5) for prompt in PROMPTS[:3]
    ]


def test_layers_that_are_not_plain_are_left_alone(model):
    from pcg_compile.integrations.generation.merging import MergedLayers

    layers = [layer.self_attn for layer in model.model.layers]
    layers[0].k_proj.register_forward_hook(lambda module, args, output: output * 2)
    layers[1].v_proj.weight = layers[1].k_proj.weight
    merged = MergedLayers(model)
    with torch.inference_mode():
        merged.install()
    names = {name for module, name, _ in merged._installed}
    merged.remove()
    assert names == {"gate_proj", "up_proj"}
    assert not any(parameter.is_inference() for parameter in model.parameters())
    want = [greedily(model, prompt, 5) for prompt in PROMPTS[:3]]
    assert tokens(generate_batch(model, PROMPTS[:3], max_new_tokens=5, **SMALL)) == want
