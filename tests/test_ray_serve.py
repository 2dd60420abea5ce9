"""The Ray Serve example on a local Ray: concurrent streams, clients that hang up, requests that make no sense."""

from __future__ import annotations

import asyncio
import json
import queue
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pcg_compile.integrations.transformers import generate_batch

ray = pytest.importorskip("ray", reason="pip install '.[ray]'")
serve = pytest.importorskip("ray.serve")
import examples.ray_serve  # noqa: E402 - it imports Ray

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "ray_serve.py"
ADDRESS = "http://127.0.0.1:8123/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer(["a", "b", "c", "d", "e", "f"])
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=len(tokenizer), num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def endpoint(folder):
    root = str(EXAMPLE.parent.parent)
    environment = {"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    serve.start(http_options={"port": 8123})
    serve.run(examples.ray_serve.app({"model": str(folder)}))
    yield ADDRESS
    serve.shutdown()
    ray.shutdown()


def post(body):
    return urllib.request.urlopen(urllib.request.Request(ADDRESS, json.dumps(body).encode()), timeout=120)


def tokens(body):
    *lines, last = [json.loads(line) for line in post(body)]
    assert last == {"finished": len(lines)}
    return [line["token"] for line in lines], "".join(line["text"] for line in lines)


def test_streams_are_those_of_generate_batch(endpoint, folder):
    prompts = [[5, 4, 3], [2, 3], [6] * 20, [1, 2, 3, 4, 5, 6]]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(tokens, [{"prompt": p, "max_new_tokens": 9 + i} for i, p in enumerate(prompts)]))
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    for i, (prompt, (ids, text)) in enumerate(zip(prompts, found, strict=True)):
        (expected,) = generate_batch(model, [prompt], max_new_tokens=9 + i, eos_token_id=[0]).values()
        assert ids == expected.generated_tokens
        assert text.split() == [word_tokenizer(["a", "b", "c", "d", "e", "f"]).decode([i]) for i in ids]
    # Text is tokenized by the replica; a seed decides what is drawn.
    assert tokens({"prompt": "d c b", "max_new_tokens": 3}) == tokens({"prompt": [4, 3, 2], "max_new_tokens": 3})
    drawn = [tokens({"prompt": "a", "max_new_tokens": 12, "temperature": 2.0, "seed": seed}) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": []}, "token ids from 0"),
        ({"prompt": [99]}, "token ids from 0"),
        ({"prompt": [1], "max_new_tokens": 10**6}, "max_new_tokens: from 1 to 2047"),
        ({"prompt": [1], "best_of": 3}, "best_of"),
        ({}, "prompt"),
    ],
)
def test_a_request_that_makes_no_sense_is_a_400(endpoint, body, reason):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(body)
    assert caught.value.code == 400 and reason in json.load(caught.value)["error"]


def test_a_client_that_hangs_up_ends_its_request(folder):
    generator = examples.ray_serve.Generator.func_or_class(str(folder))

    async def read_one_line():
        stream = generator._stream(generator._request([1, 2], 2000))
        await anext(stream)
        await stream.aclose()

    async def read_all():
        return [json.loads(line) async for line in generator._stream(generator._request([3], 2))]

    asyncio.run(read_one_line())
    # A request ends ahead of the next step, which another one waits for.
    assert asyncio.run(read_all())[-1] == {"finished": 2}
    running = queue.Queue()
    generator.inbox.put(lambda session: running.put((len(session.scheduler.running), session.pool.available)))
    assert running.get(timeout=60) == (0, generator.pages - 1)
    assert not generator.outboxes
    generator.check_health()


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 100
