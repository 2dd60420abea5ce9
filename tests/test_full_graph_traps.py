"""What has made full CUDA graphs of attention silently wrong elsewhere: the first batch's figures kept for later ones.

On a GPU the graphs are captured and Triton attends; elsewhere a replay runs the same calls on the same static memory.
"""

from __future__ import annotations

import pytest
import torch
from paged_model import DIM, HEADS, KV_HEADS, VOCAB, Model, Traffic

import pcg_compile as pcg

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def full(model, **options):
    options = {"compiler": "eager", "buckets": [16], "cudagraph_mode": "full", **options}
    return pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **options)(model.forward)


def test_no_longest_request_is_kept():
    """Captured with 3 tokens a request; later ones have 60 (transformers#45323 froze the maximum)."""
    model, traffic = Model().eval().to(DEVICE), Traffic(page_size=4, device=DEVICE)
    compiled = full(model, max_padding=100)
    for lens in ({1: 3, 2: 3}, {1: 1, 2: 1}):
        traffic.check(model, compiled, lens)
    for _ in range(4):
        traffic.check(model, compiled, {3: 14})
    with pcg.expect(compiled, captured=0, replays=2):
        traffic.check(model, compiled, {1: 1, 3: 1})
        traffic.check(model, compiled, {3: 1, 1: 1})
    assert max(traffic.lengths.values()) == 58


def test_no_window_has_the_plan_of_another():
    """Layers of three windows in one graph (TensorRT-LLM#18769 took one window's plan for the others)."""
    model, traffic = Model().eval(), Traffic(page_size=4, device=DEVICE)
    for layer, window in zip(model.layers, (3, None, 11), strict=True):
        layer.attention = pcg.PagedAttention(layer.attention.layer, HEADS, KV_HEADS, DIM, window=window)
    model.to(DEVICE)
    compiled = full(model)
    for lens in ({1: 12, 2: 3}, {1: 1, 2: 8}, {1: 1, 2: 1}, {1: 1, 2: 1}, {2: 1, 1: 1}):
        traffic.check(model, compiled, lens)
    assert pcg.stats(compiled).replays >= 3


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_padding_fits_beside_as_many_requests_as_a_cache_takes(page_size):
    """The padding request has pages and a last page of its own beside all others, in tokens (SGLang #21452 had not)."""
    model, traffic = Model(window=6).eval().to(DEVICE), Traffic(page_size, device=DEVICE)
    most = traffic.caches[1].max_requests
    compiled = full(model)
    for _ in range(3):
        traffic.check(model, compiled, dict.fromkeys(range(most), 1))
    traffic.check(model, compiled, {0: 9})
    with pcg.expect(compiled, captured=0, replays=1):
        traffic.check(model, compiled, dict.fromkeys(range(most), 1))
    assert not pcg.stats(compiled).fallbacks


def test_metadata_stay_where_a_graph_reads_them():
    """Whatever requests a batch has: one block of memory holds them all."""
    model, traffic = Model().eval().to(DEVICE), Traffic(page_size=4, device=DEVICE)
    compiled, places = full(model), set()
    batches = ({1: 5}, {1: 1, 2: 4}, {1: 1, 2: 1, 3: 3}, {4: 5})
    for lens in (*batches, *batches):
        traffic.check(model, compiled, lens)
        prepared = traffic.caches[1].current
        # A size's first step runs at that size.
        if prepared.made_for[2] is not None:
            assert prepared.static
            places.add((prepared.slots.data_ptr(), *(array.data_ptr() for array in prepared.arrays)))
    assert len(places) == 1 and pcg.stats(compiled).replays >= 4


def test_what_the_last_batch_left_reaches_no_real_row():
    """Slots, pages and lengths behind a short batch are another's; its scratch page may hold anything but NaN."""
    model, traffic = Model().eval().to(DEVICE), Traffic(page_size=4, device=DEVICE)
    compiled = full(model)
    traffic.check(model, compiled, {1: 5, 2: 5, 3: 5})
    cache = traffic.caches[1]
    for area in cache._areas.values():
        # As if an earlier batch had been longer, on pages of this one.
        area.fill_(1)
    cache.current = None
    for page in (tensor[0] for tensor in (*cache.k, *cache.v)):
        page.fill_(1e4)
    traffic.check(model, compiled, {1: 1})
    traffic.check(model, compiled, {2: 1, 4: 3})
    ids = torch.randint(0, VOCAB, (1,), device=DEVICE)
    with pcg.step(traffic.batch({1: 1}), cache) as batch:
        assert compiled(ids, batch.positions).isfinite().all()
