"""A transformers Llama on FlashInfer and CUDA graphs: ragged batches, and a steady step that waits for nothing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import pcg_compile as pcg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer"),
]
BUCKETS = [2, 4, 8, 16, 32, 64, 128]


@pytest.fixture(scope="module", params=["piecewise", "full"])
def setup(request):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pcg_compile.integrations.transformers import cache_for

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pcg", dtype=torch.bfloat16).cuda().eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": BUCKETS, "cudagraph_mode": request.param})
    return model, compiled, [cache_for(model, num_pages=512) for _ in range(2)]


class Requests:
    def __init__(self, caches):
        self.caches, self.lengths, self.pages = caches, {}, {}

    def batch(self, new):
        for request, n in new.items():
            self.lengths[request] = self.lengths.get(request, 0) + n
            pages = self.pages.setdefault(request, [])
            missing = -(-self.lengths[request] // 16) - len(pages)
            taken = self.caches[0].allocate(missing)
            assert self.caches[1].allocate(missing) == taken
            pages += taken
        return pcg.Batch(list(new.values()), [self.lengths[r] for r in new], [list(self.pages[r]) for r in new])


def logits(call, ids, batch, cache):
    with pcg.step(batch, cache):
        return call(input_ids=ids[None], position_ids=batch.positions[None]).logits[0]


def test_every_bucket_at_its_edges(setup):
    model, compiled, caches = setup
    requests = Requests(caches)
    sizes = [n for low, high in zip([0, *BUCKETS], BUCKETS, strict=False) for n in {low + 1, high - 1, high} if n > 0]
    worst = 0.0
    for i, n in enumerate([*sizes, 200, *reversed(sizes)]):
        # Decode requests that exist, and one that is new.
        old = list(requests.lengths)[-min(n // 2, 8) :] if n > 1 else []
        new = {**dict.fromkeys(old, 1), 1000 + i: n - len(old)}
        ids = torch.randint(0, 1000, (n,), device="cuda")
        batch = requests.batch(new)
        want, got = (logits(call, ids, batch, cache) for call, cache in ((model, caches[0]), (compiled, caches[1])))
        scale = want.float().abs().max()
        worst = max(worst, ((got.float() - want.float()).abs().max() / scale).item())
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05 * scale.item())
        if sum(len(p) for p in requests.pages.values()) > 350:
            for pages in requests.pages.values():
                for cache in caches:
                    cache.free(pages)
            requests.lengths.clear()
            requests.pages.clear()
    print(f"worst difference over scale: {worst:.4f}")
    stats = pcg.stats(compiled)
    assert all(stats.buckets[b].hits > 0 for b in BUCKETS if b != 2) and stats.replays > 0
    # 200 tokens are beyond the largest bucket.
    assert all("beyond the largest bucket" in f.reason for f in stats.fallbacks), stats.fallbacks


def test_a_steady_step_does_not_wait(setup):
    _, compiled, caches = setup
    cache = caches[1]
    pages = cache.allocate(12)
    ids = torch.randint(0, 1000, (6,), device="cuda")

    def serve(length):
        batch = pcg.Batch([1] * 6, [length + r for r in range(6)], [pages[2 * r : 2 * r + 2] for r in range(6)])
        return logits(compiled, ids, batch, cache)

    for length in range(3, 9):
        serve(length)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for length in range(9, 15):
            serve(length)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as trace:
        for length in range(15, 20):
            serve(length)
    names = {event.name for event in trace.events()}
    assert not any("Pageable" in name for name in names), [n for n in names if "Pageable" in n]
    # The profiler itself synchronizes when it stops.
    waits = [e.name for e in trace.events() if "StreamSynchronize" in e.name or "EventSynchronize" in e.name]
    assert not waits, waits
    cache.free(pages)
