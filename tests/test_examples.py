"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def run(*arguments, timeout=240):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_quickstart():
    assert "request of 33 tokens: 12 of 12 tokens equal generate()'s" in run(
        EXAMPLES / "quickstart.py", "--compiler", "eager"
    )
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()
    assert len(lines) < 80


def test_many_adapters():
    assert "0 new recordings" in run(EXAMPLES / "many_adapters.py")


def test_tensor_parallel():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run(*torchrun, EXAMPLES / "tensor_parallel.py")
    assert "7 pieces" in out and out.count("ms in parts") == 4


@pytest.mark.parametrize("budget", [7, 64])
def test_continuous_batching_equals_generation_one_by_one(budget, tmp_path):
    import continuous_batching as example

    assert len(Path(example.__file__).read_text().splitlines()) < 250
    torch._dynamo.reset()
    model, adapters = example.make_model("cpu", tmp_path)
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16, 32, 64]})
    cache = cache_for(model, num_pages=24)
    requests = example.make_requests(10, adapters, seed=3)
    for tokens, running, _ in example.serve(compiled, cache, example.trickle(requests), budget, most_requests=5):
        assert 0 < tokens <= budget and running <= 5
    assert cache.free_pages == 23
    for request in requests:
        alone = example.Request(request.name, request.prompt, request.want, request.adapter)
        for _ in example.serve(model, cache, iter([alone])):
            pass
        assert request.output == alone.output and len(request.output) == request.want
    assert pcg.stats(compiled).replays > 0
    random.seed()


def test_continuous_batching_streams_its_tokens(monkeypatch, capsys):
    import continuous_batching as example

    torch._dynamo.reset()
    monkeypatch.setattr(sys, "argv", ["continuous_batching.py", "--requests", "2", "--no-adapters", "--check"])
    example.main()
    printed = " ".join(capsys.readouterr().out.split())
    for request in example.make_requests(2, []):
        start = printed.index(f"{request.name} (base):")
        assert re.match(rf"\S+ \(base\):(?: \d+){{{request.want}}}(?!\d)", printed[start:])
    assert "tokens/s" in printed and "2 of 2 answers equal those of requests served alone" in printed
