"""Random workloads of generate_batch against generating each request alone, without pcg, token by token."""

from __future__ import annotations

import random

import pytest
import torch
from adapters import llama, save_with_peft
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import pcg_compile as pcg
from pcg_compile.integrations.generation import Engine, Request, Sampling, Session
from pcg_compile.integrations.generation.engine import attending_through_pcg
from pcg_compile.integrations.generation.sampler import _gumbel
from pcg_compile.integrations.transformers import cache_for

PAGES, PAGE, LONGEST = 40, 4, 48


class World:
    """A model with adapters and one engine on it, and the same models without pcg."""

    def __init__(self, folder):
        torch._dynamo.reset()
        self.model = llama("sdpa")
        pool = pcg.lora.AdapterPool(self.model, max_adapters=1, max_rank=4, target_modules=["q_proj", "v_proj"])
        self.alone = {None: llama("sdpa")}
        for name in ("a", "b"):
            settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
            path = save_with_peft(folder / name, llama("sdpa"), **settings)
            pool.load(name, path)
            from peft import PeftModel

            self.alone[name] = PeftModel.from_pretrained(llama("sdpa"), path).merge_and_unload().eval()
        cache = cache_for(self.model.config, num_pages=PAGES + 1, page_size=PAGE)
        self.engine = Engine(self.model, cache, 6, 16, {"compiler": "eager", "buckets": [2, 4, 8, 16]})

    @torch.no_grad()
    def one_by_one(self, request):
        """Tokens and log probabilities of a request, from dense forwards and transformers' own processors."""
        settings, ids, logprobs = request.sampling, list(request.prompt), []
        while len(ids) < request.limit and not (logprobs and ids[-1] in request.ends):
            scores = self.alone[request.adapter](torch.tensor([ids])).logits[:, -1].float()
            if settings.penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(settings.penalty)(torch.tensor([ids]), scores)
            noisy = scores
            if settings.temperature > 0:
                scores = TemperatureLogitsWarper(settings.temperature)(None, scores)
                scores = TopKLogitsWarper(settings.top_k)(None, scores) if settings.top_k else scores
                scores = TopPLogitsWarper(settings.top_p)(None, scores) if settings.top_p < 1 else scores
                scores = MinPLogitsWarper(settings.min_p)(None, scores) if settings.min_p else scores
                noisy = scores + _gumbel(torch.tensor([settings.seed]), torch.tensor([len(ids)]), scores.shape[-1])
            ids.append(int(noisy.argmax()))
            logprobs.append(float(scores.log_softmax(-1)[0, ids[-1]]))
            if any(stop in " ".join(map(str, ids[len(request.prompt) :])) for stop in request.stops):
                break
        return ids[len(request.prompt) :], logprobs


class Words:
    """A tokenizer whose words are the ids."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("adapters"))


def workload(chance):
    """Requests that share prefixes, or whole prompts."""
    stems = [[chance.randrange(3, 60) for _ in range(chance.randint(1, 26))] for _ in range(3)]
    for i in range(chance.randint(1, 12)):
        stem = chance.choice(stems)
        prompt = stem[: chance.choice([len(stem), chance.randint(1, len(stem))])]
        prompt = prompt + [chance.randrange(3, 60) for _ in range(chance.choice([0, 0, 1, 5]))]
        sampling = Sampling(
            temperature=chance.choice([0.0, 0.0, 0.7, 1.5]), top_k=chance.choice([None, None, 1, 5]),
            top_p=chance.choice([1.0, 1.0, 0.6]), min_p=chance.choice([0.0, 0.0, 0.2]),
            penalty=chance.choice([1.0, 1.0, 1.3]), seed=chance.randrange(2**62),
        )  # fmt: skip
        ends = frozenset(chance.sample(range(60), chance.choice([0, 0, 3])))
        stops = (chance.choice(["7", "1 2", "33"]),) if chance.random() < 0.2 else ()
        adapter = chance.choice([None, None, "a", "b"])
        yield Request(str(i), i, prompt, chance.randint(1, LONGEST - len(prompt)), sampling, ends, stops, adapter)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_every_answer_is_the_one_of_the_request_alone(world, seed):
    """Whatever else runs: late arrivals, cancellations, steps that fail, preemption in a cache that is nearly full."""
    chance = random.Random(seed)
    requests = list(workload(chance))
    engine, free = world.engine, chance.randint(LONGEST // PAGE, PAGES)
    hidden = engine.cache.allocate(PAGES - free)
    late = requests[chance.randint(1, len(requests)) :]
    cancelled = {request.id: chance.randint(1, 6) for request in requests if chance.random() < 0.2}
    failing = chance.randint(1, 30) if chance.random() < 0.3 else None
    counts = dict.fromkeys(cancelled, 0)
    with torch.no_grad(), attending_through_pcg(world.model), Session(engine, LONGEST, Words()) as session:
        # One variant of the step; another test compares the variants.
        session._variant = (True, True, True)
        launch, launches = session._launch, []

        def launching(step):
            launches.append(step)
            if len(launches) == failing:
                raise RuntimeError("this step fails")
            return launch(step)

        session._launch = launching
        for request in requests:
            if request not in late:
                session.add(request)
        told = {}
        for request, token in session.run():
            told.setdefault(request.id, []).append(token)
            if late and chance.random() < 0.5:
                session.add(late.pop())
            if request.id in cancelled and token is not None:
                counts[request.id] += 1
                if counts[request.id] == cancelled[request.id]:
                    session.cancel(request.id)
        for request in late:
            session.add(request)
        for request, token in session.run():
            told.setdefault(request.id, []).append(token)
        assert session.pool.available == session.pool.capacity == free
    engine.cache.free(hidden)
    assert engine.cache.free_pages == PAGES
    for request in requests:
        tokens, logprobs = world.one_by_one(request)
        count = len(request.generated)
        assert request.generated == tokens[:count], (seed, request)
        torch.testing.assert_close(torch.tensor(request.logprobs), torch.tensor(logprobs[:count]), atol=1e-4, rtol=1e-3)
        assert request.finished and told[request.id] == [*request.generated, None], (seed, request)
        if request.error is None and request.id not in cancelled:
            assert count == len(tokens), (seed, request)
