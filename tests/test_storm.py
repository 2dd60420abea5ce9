"""Every size once must not cost more than the buckets do."""

from __future__ import annotations

import random

import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.registry import runtimes


def test_every_size_once():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager"})
    sizes = list(range(1, 4097))
    random.Random(0).shuffle(sizes)
    with torch.inference_mode():
        for n in (4096, 4095, 2, 4, 8, 16, 32, 64, 128, 256):
            compiled(torch.randn(n, 4))
        for b in runtimes(compiled)[-1].shared.chooser.table:
            if b <= 4096:
                compiled(torch.randn(b, 4))
        before = sum(runtime.nbytes() for runtime in runtimes(compiled))
        graphs = pcg.stats(compiled).graphs
        for i, n in enumerate(sizes):
            x = torch.randn(n, 4)
            got = compiled(x)
            if i % 50 == 0:
                torch.testing.assert_close(got, model(x))
    stats = pcg.stats(compiled)
    assert sum(runtime.nbytes() for runtime in runtimes(compiled)) <= before * 1.01
    # Dynamo's own graphs for 1 and for the first size, and one for all others.
    assert stats.graphs <= graphs + 1 and stats.graphs <= 3
    for runtime in runtimes(compiled):
        for binding in runtime.bindings:
            assert len(binding.steps) <= 512
            assert len(binding.captured_graphs) <= len(stats.buckets) + 1
    assert stats.captured <= len(stats.buckets) + 1
