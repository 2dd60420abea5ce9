"""Batches: what they refuse, how they are padded, and the step they live in."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pcg_compile as pcg
from pcg_compile.attention import PagedKVCache
from pcg_compile.batch import Batch
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.memory.staging import StagingRing
from pcg_compile.step import current_step, require_step, scratch_step, step


def pages_for(kv_lens, page_size, first=1):
    """A page table of pages that no two requests share."""
    table, page = [], first
    for kv in kv_lens:
        needed = -(-kv // page_size)
        table.append(list(range(page, page + needed)))
        page += needed
    return table


def small_cache(num_pages=64, page_size=4, max_requests=256):
    return PagedKVCache(1, num_pages, page_size, max_requests, num_kv_heads=1, head_dim=4)


@pytest.mark.parametrize(
    ("qo", "kv", "page", "bucket", "qo_indptr", "kv_indptr", "last"),
    [
        ([3, 5], [5, 9], 1, 12, [0, 3, 8, 12], [0, 5, 14, 18], [1, 1, 1]),
        ([3, 5], [5, 9], 16, 12, [0, 3, 8, 12], [0, 1, 2, 3], [5, 9, 4]),
        ([3, 5], [5, 9], 16, 8, [0, 3, 8], [0, 1, 2], [5, 9]),
        ([7], [100], 16, 8, [0, 7, 8], [0, 7, 8], [4, 1]),
        ([17, 3, 8], [17, 3, 40], 16, 32, [0, 17, 20, 28, 32], [0, 2, 3, 6, 7], [1, 3, 8, 4]),
        ([2, 2], [16, 32], 4, 10, [0, 2, 4, 10], [0, 4, 12, 14], [4, 4, 2]),
    ],
)
@pytest.mark.parametrize("paged", [True, False])
def test_padding_request(qo, kv, page, bucket, qo_indptr, kv_indptr, last, paged):
    padded = Batch(qo, kv, pages_for(kv, page) if paged else None).padded(bucket, page)
    for tensor, expected in (
        (padded.qo_indptr, qo_indptr),
        (padded.kv_indptr, kv_indptr),
        (padded.last_page_len, last),
    ):
        assert tensor.dtype == torch.int32 and tensor.device.type == "cpu" and tensor.tolist() == expected
    if paged:
        real = [p for row in pages_for(kv, page) for p in row]
        assert padded.kv_indices.tolist() == real + [0] * (kv_indptr[-1] - len(real))
        assert padded.slot_mapping.tolist()[sum(qo) :] == [0] * (bucket - sum(qo))
    else:
        assert padded.kv_indices is None and padded.slot_mapping is None


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 90)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(lengths, st.sampled_from([1, 4, 16, 64]), st.integers(0, 70), st.booleans())
def test_padding_of_any_batch(requests, page, pad, full):
    if full:
        requests = requests * 12  # 12 to 144 requests, beyond max_requests below
    qo = [q for q, _ in requests]
    kv = [q + past for q, past in requests]
    table = pages_for(kv, page)
    batch, bucket = Batch(qo, kv, table), sum(qo) + pad
    padded, exact = batch.padded(bucket, page), batch.padded(sum(qo), page)
    n, indptr, pages = len(qo), padded.qo_indptr.tolist(), padded.kv_indptr.tolist()
    assert indptr[-1] == bucket and all(a < b for a, b in itertools.pairwise(indptr))
    assert all(a < b for a, b in itertools.pairwise(pages)) and len(padded.kv_indices) == pages[-1]
    assert len(indptr) == len(pages) == n + 1 + (pad > 0) and len(padded.last_page_len) == n + (pad > 0)
    whole = [
        (b - a - 1) * page + last for a, b, last in zip(pages, pages[1:], padded.last_page_len.tolist(), strict=False)
    ]
    assert whole == padded.kv_lens.tolist() == kv + [pad] * (pad > 0)
    assert all(k >= b - a for k, a, b in zip(whole, indptr, indptr[1:], strict=False))
    for name in ("qo_indptr", "kv_indptr", "last_page_len", "kv_indices", "slot_mapping"):
        real = getattr(exact, name).tolist()
        assert getattr(padded, name).tolist()[: len(real)] == real
    slots = padded.slot_mapping.tolist()
    positions = [k - q + i for q, k in zip(qo, kv, strict=True) for i in range(q)]
    owners = [r for r, q in enumerate(qo) for _ in range(q)]
    assert (
        slots[: sum(qo)] == [table[r][p // page] * page + p % page for r, p in zip(owners, positions, strict=True)]
        and slots[sum(qo) :] == [0] * pad
    )

    cache = PagedKVCache(1, 1 + sum(map(len, table)), page, max_requests=20, num_kv_heads=1, head_dim=1)
    address = cache.slot_mapping(bucket).data_ptr()
    with step(batch, cache) as inside:
        prepared = require_step("test").prepare(bucket, "request")
        assert inside.positions.tolist() == positions and inside.slot_mapping.tolist() == slots[: sum(qo)]
    assert prepared.slots.tolist() == slots and prepared.slots.data_ptr() == address
    for i in range(5):
        assert prepared.array(i).tolist() == padded.array(i).tolist()


def test_more_pages_than_needed_and_arrays_are_read_alike():
    qo, kv = [1, 5, 2], [6, 5, 9]
    exact = Batch(qo, kv, [[3, 4], [5, 6], [9, 2, 1]]).padded(16, 4)
    roomy = Batch(qo, kv, [[3, 4, 7], [5, 6], [9, 2, 1, 8, 10]]).padded(16, 4)
    table = np.array([[3, 4, -1, 0], [5, 6, 0, 0], [9, 2, 1, 0]])
    for other in (
        roomy,
        Batch(qo, kv, table).padded(16, 4),
        Batch(torch.tensor(qo), kv, torch.tensor(table)).padded(16, 4),
    ):
        assert np.array_equal(exact.flat, other.flat) and exact.slot_mapping.tolist() == other.slot_mapping.tolist()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"qo_lens": []}, "no requests"),
        ({"qo_lens": [1, 0, 2]}, r"request 1 has qo_lens\[1\] = 0"),
        ({"qo_lens": [1, 2, -3]}, r"request 2 has qo_lens\[2\] = -3"),
        ({"qo_lens": [1.5]}, "float64"),
        ({"qo_lens": [[1]]}, "2 dimensions"),
        ({"qo_lens": ["a"]}, "whole numbers"),
        ({"qo_lens": [1, 1], "kv_lens": [4]}, "kv_lens has 1 entries for 2 requests"),
        ({"qo_lens": [1, 5], "kv_lens": [1, 4]}, "request 1 has a KV length of 4 and 5 new tokens"),
        ({"qo_lens": [1, 1], "page_table": [[1]]}, "page_table has 1 rows for 2 requests"),
        ({"qo_lens": [1, 1], "page_table": [[1], [2, 0]]}, "request 1 uses page 0(.|\n)*scratch page"),
        ({"qo_lens": [1, 1], "page_table": [[1], [-2]]}, "request 1 uses page -2"),
        ({"qo_lens": [1], "page_table": [3]}, "no list of lists"),
        ({"qo_lens": [1, 1], "adapters": ["a"]}, "adapters has 1 entries for 2 requests"),
        ({"qo_lens": [1, 1], "adapters": ["a", 3]}, "request 1 has the adapter 3"),
    ],
)
def test_bad_batches(arguments, text):
    with pytest.raises(BatchError, match=text):
        Batch(**arguments)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (lambda: Batch([1, 9], page_table=[[1], [2, 3]]), r"request 1 has 2 pages and needs 3(.|\n)*KV length.* is 9"),
        (lambda: Batch([1], page_table=[[64]]), "request 0 uses page 64; the cache has pages 1 to 63"),
        (lambda: Batch([1, 1], page_table=np.array([[1], [0]])), "request 1 uses page 0"),
        (lambda: Batch([1, 2], [2, 6], [[7], [8, 7]]), "request 0 writes page 7, which request 1 uses too"),
        (lambda: Batch([1, 2], [5, 6], [[8, 9], [8, 9]]), "writes page 9"),
        (lambda: Batch([5], page_table=[[3, 3]]), "request 0 writes page 3, which its row lists twice"),
        (lambda: Batch([1]), "no page table"),
    ],
)
def test_batches_that_do_not_fit_the_cache(batch, text):
    with pytest.raises(BatchError, match=text), step(batch(), small_cache()):
        pass
    assert current_step() is None


def test_a_common_prefix_may_be_shared():
    Batch([1, 1], [5, 6], [[8, 9], [8, 10]]).tables(4)


@pytest.mark.parametrize("spread", [1, 1_000_000])
def test_a_shared_page_is_found_among_many(spread):
    table = [[(2 * r + i + 1) * spread for i in range(2)] for r in range(600)]
    Batch([1] * 600, [8] * 600, table).tables(4)
    table[599][0] = table[7][1]
    with pytest.raises(BatchError, match=f"request 7 writes page {16 * spread}, which request 599 uses too"):
        Batch([1] * 600, [8] * 600, table).tables(4)


def test_bucket_below_the_tokens():
    with pytest.raises(BatchError, match="has 5 tokens, the bucket 4"):
        Batch([5]).padded(4, 16)
    with step(Batch([5], page_table=[[1, 2]]), small_cache()):
        for mode in ("request", "slice"):
            with pytest.raises(BatchError, match="5 tokens, the bucket 4"):
                require_step("test").prepare(4, mode)


def test_step_sets_and_resets_everything():
    batch = Batch([2, 1], adapters=["a", None])
    assert current_step() is None and batch.adapters == ("a", None) and batch.num_tokens == 3
    with pytest.raises(KeyError), step(batch) as entered:
        assert entered is batch and not torch.is_grad_enabled()
        assert batch.positions.tolist() == [0, 1, 0] and batch.positions.dtype == torch.int64
        with pytest.raises(BatchError, match="a step is running already"), step(Batch([1])):
            pass
        assert current_step().batch is batch
        raise KeyError
    assert current_step() is None and torch.is_grad_enabled()
    with pytest.raises(BatchError, match=r"with pcg\.step\(batch, cache\)"):
        require_step("attention")
    with pytest.raises(BatchError, match="inside the batch's step only"):
        _ = batch.positions
    with step(batch), pytest.raises(BatchError, match="slot_mapping needs a cache"):
        _ = batch.slot_mapping
    with pytest.raises(BatchError, match="takes a Batch, not list"), step([1]):
        pass


def test_positions_are_the_callers_to_keep():
    cache = small_cache()
    with step(Batch([2], [6], [[1, 2]]), cache) as batch:
        kept = batch.positions, batch.slot_mapping
        assert batch.positions is kept[0]
    with step(Batch([2], [9], [[1, 2, 3]]), cache) as batch:
        assert batch.positions.tolist() == [7, 8]
    assert kept[0].tolist() == [4, 5] and kept[1].tolist() == [8, 9]


def test_a_call_with_other_tokens_is_refused():
    with step(Batch([2, 1])):
        current_step().check_tokens(3)
        with pytest.raises(BatchError, match="called with 4 tokens, the batch of the step has 3"):
            current_step().check_tokens(4)


def test_once_is_once_a_step():
    calls = []
    for _ in range(2):
        with step(Batch([1])):
            for _ in range(3):
                assert current_step().once("key", lambda: calls.append(1) or len(calls)) == len(calls)
    assert len(calls) == 2


def test_each_thread_has_its_own_step():
    seen, ready, leave = {}, threading.Event(), threading.Event()
    cache, table = small_cache(), [[1]]

    def other():
        seen["before"] = current_step()
        with step(Batch([1])):
            seen["batch"] = current_step().batch.num_tokens
            ready.set()
            leave.wait(10)
        try:
            with step(Batch([2], page_table=table), cache):
                pass
        except BatchError as error:
            seen["error"] = str(error)

    with step(Batch([2], page_table=table), cache):
        thread = threading.Thread(target=other)
        thread.start()
        assert ready.wait(10) and current_step().batch.num_tokens == 2
        leave.set()
        thread.join()
    assert seen["before"] is None and seen["batch"] == 1 and "step of another thread" in seen["error"]
    with step(Batch([2], page_table=table), cache):
        pass


@pytest.mark.parametrize("closer", ["task", "thread"])
def test_a_step_that_somebody_else_leaves_is_over_for_all(closer):
    """A generator that was abandoned inside its step is closed where the step was never entered."""
    cache = small_cache()
    enter = lambda: step(Batch([1], page_table=[[1]]), cache)

    def serve():
        with enter():
            yield current_step()

    async def serve_in_tasks():
        with enter():
            yield current_step()

    async def step_later(over):
        await over.wait()
        return current_step()

    async def main():
        over = asyncio.Event()
        abandoned = serve_in_tasks()
        state = await anext(abandoned)
        begun_inside = asyncio.create_task(step_later(over))
        del abandoned
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)
        over.set()
        assert state.closed and await begun_inside is None

    if closer == "task":
        asyncio.run(main())
    else:
        abandoned = serve()
        next(abandoned)
        thread = threading.Thread(target=abandoned.close)
        thread.start()
        thread.join()
        torch.set_grad_enabled(True)
    assert current_step() is None and not cache.in_step
    with enter() as batch:
        assert current_step().batch is batch


def test_preparing_is_idempotent_and_follows_the_batch():
    cache = small_cache()
    with step(Batch([3], [5], [[1, 2]]), cache):
        state = current_step()
        first = state.prepare(8, "request")
        assert state.prepare(8, "request") is first
        assert first.slots.tolist() == [6, 7, 8, 0, 0, 0, 0, 0] and first.rows == 8
        sliced = state.prepare(8, "slice")
        assert sliced is not first and sliced.rows == 3 and sliced.slots.data_ptr() == first.slots.data_ptr()
        assert sliced.array(0).tolist() == [0, 3]
        # A scratch step of the same bucket writes the same memory; the step then writes its own again.
        with scratch_step(8, cache) as scratch:
            assert current_step() is scratch and scratch.key == state.key
            assert scratch.prepare(8, "request").slots.tolist() == [0] * 8
            assert scratch.prepare(8, "request").array(0).tolist() == [0, 8]
            scratch.check_tokens(5)
        assert current_step() is state
        assert state.prepare(8, "slice").slots.tolist() == [6, 7, 8, 0, 0, 0, 0, 0]
    with step(Batch([8], page_table=[[3, 4]]), cache):
        assert current_step().prepare(8, "request").slots.tolist() == list(range(12, 20))


def test_addresses_of_slots_stay_whatever_comes():
    cache = small_cache(num_pages=400, max_requests=2)
    addresses = {bucket: cache.slot_mapping(bucket).data_ptr() for bucket in (1, 16, 17, 300)}
    for requests in (1, 3, 250, 2):  # 250 requests are more than max_requests: other buffers grow, these stay
        batch = Batch([1] * requests, page_table=[[r + 1] for r in range(requests)])
        with step(batch, cache):
            prepared = current_step().prepare(300, "request")
            assert prepared.array(1)[: requests + 1].tolist() == list(range(requests + 1))
            assert prepared.slots.data_ptr() == addresses[300]
    assert addresses == {bucket: cache.slot_mapping(bucket).data_ptr() for bucket in addresses}


def test_keys_of_caches_differ():
    one, two = small_cache(), small_cache()
    keys = []
    for cache in (one, two, one, None):
        with step(Batch([1], page_table=[[1]]), cache):
            keys.append(current_step().key)
    assert keys[0] == keys[2] != keys[1] and keys[3] is None


def test_allocating_pages():
    cache = small_cache(num_pages=4)
    pages = cache.allocate(3)
    assert sorted(pages) == [1, 2, 3] and cache.free_pages == 0
    with pytest.raises(BatchError, match="1 pages wanted, 0 of 3 are free"):
        cache.allocate(1)
    cache.free(pages[:1])
    for wrong in (pages[:1], [0], [9], [pages[1], pages[1]]):
        with pytest.raises(BatchError, match="not in use"):
            cache.free(wrong)
    assert cache.allocate(1) == pages[:1]


@pytest.mark.parametrize("sizes", [{"num_pages": 1}, {"page_size": 0}, {"num_layers": 1.5}, {"max_requests": 0}])
def test_bad_caches(sizes):
    arguments = {"num_layers": 1, "num_pages": 4, "page_size": 4, "num_kv_heads": 1, "head_dim": 4}
    with pytest.raises(OptionsError, match=next(iter(sizes))):
        PagedKVCache(**{**arguments, **sizes})


def test_staging_grows_and_copies_whole_arrays():
    ring = StagingRing(torch.device("cpu"), nbytes=16)
    for n in (1, 2, 900, 3):
        target = torch.full((n,), -1, dtype=torch.int64)
        ring.send(np.arange(n), target)
        assert target.tolist() == list(range(n))


def test_a_cache_that_no_attention_uses_is_warned_of(caplog):
    cache = pcg.PagedKVCache(num_layers=1, num_pages=4, page_size=4, num_kv_heads=1, head_dim=4)
    attention = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)
    x = torch.randn(3, 1, 4)
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
        attention(x, x, x)
    assert not caplog.records
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    (record,) = caplog.records
    assert "no attention used it" in record.message and 'attn_implementation="pcg"' in record.message


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_step_inside_a_compiled_function(made, dynamic):
    """Dynamo traces into the batch, and gives up where it must; the numbers are eager's."""
    torch._dynamo.reset()
    cache = PagedKVCache(num_layers=1, num_pages=32, page_size=4, num_kv_heads=1, head_dim=4)
    attend = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)

    def run(x, batch, n):
        if batch is None:
            batch = pcg.Batch([1, n - 1], [1, n - 1], [[1, 2, 3], [4, 5, 6]])
        with pcg.step(batch, cache):
            y = attend(x, x + 1, x * 2) * 2
            torch._dynamo.graph_break()
            y = y + batch.positions[:, None, None]
        return y + 1

    compiled = torch.compile(run, backend="pcg", dynamic=dynamic, options={"compiler": "eager", "buckets": [4, 8]})
    for n in (3, 6, 8, 3):
        x = torch.randn(n, 1, 4)
        batch = None if made == "inside" else pcg.Batch([1, n - 1], [1, n - 1], [[1, 2, 3], [4, 5, 6]])
        want = run(x, batch, n)
        torch.testing.assert_close(compiled(x, batch, n), want)
        assert current_step() is None and torch.is_grad_enabled()


def test_advance_is_the_next_decode_step():
    """As a new batch from lists would be, until a request has no room; prompts and adapters included."""
    tables = [[3, 1], [4, 2, 7]]
    batch = Batch([5, 2], [5, 9], tables, adapters=["a", None])
    for step_ahead in range(1, 4):
        batch = batch.advance()
        fresh = Batch([1, 1], [5 + step_ahead, 9 + step_ahead], tables, adapters=["a", None])
        assert (batch.qo_lens, batch.kv_lens, batch.num_tokens) == (fresh.qo_lens, fresh.kv_lens, fresh.num_tokens)
        assert batch.adapters == fresh.adapters
        for bucket in (2, 5):
            one, other = batch.padded(bucket, 4, 6), fresh.padded(bucket, 4, 6)
            assert one.flat.tolist() == other.flat.tolist() and one.slots.tolist() == other.slots.tolist()
    with pytest.raises(BatchError, match="request 0 has 2 pages and needs 3"):
        batch.advance().tables(4)
    with pytest.raises(BatchError, match="adapters of the next step"):
        Batch([2], [2], [[1]], adapters=torch.zeros(2, dtype=torch.int32)).advance()


@pytest.mark.parametrize("bucket", [3, 8])
@pytest.mark.parametrize("listed", [True, False], ids=["lists", "array"])
def test_metadata_advance_on_the_device_while_pages_have_room(monkeypatch, bucket, listed):
    """Slots, positions and lengths are those of a new batch, and nothing is read from the host."""
    cache = small_cache(num_pages=40)
    written, write = [], PagedKVCache._write
    monkeypatch.setattr(PagedKVCache, "_write", lambda self, *args: written.append(args) or write(self, *args))
    lists, kv = [[3, 5, 9, 8], [2, 7, 11], [2, 20, 21]], [5, 9, 5]  # page 2 is a prefix that two share
    table = np.full((3, 6), -7)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    batch = Batch([1] * 3, kv, lists) if listed else Batch([1] * 3, kv, table, page_counts=[4, 3, 3])
    for age in range(8):
        lens = [n + age for n in kv]
        with step(batch, cache):
            prepared = current_step().prepare(bucket, "request")
            assert batch.positions.tolist() == [n - 1 for n in lens]
            assert prepared.padded.kv_lens.tolist()[:3] == prepared.array(3).tolist()[:3] == lens
            slots = [lists[i][(n - 1) // 4] * 4 + (n - 1) % 4 for i, n in enumerate(lens)]
            assert prepared.slots.tolist() == slots + [0] * (bucket - 3)
            assert batch.slot_mapping.tolist() == slots
        # Request 1 has room for 12 tokens.
        assert len(written) == 1
        if age == 3:
            break
        batch = batch.advance()
    with pytest.raises(BatchError, match="request 1 has 3 pages and needs 4"), step(batch.advance(), cache):
        pass


def test_what_advanced_is_written_again_where_it_must_be():
    cache = small_cache(num_pages=40)
    batch = Batch([1, 1], [5, 6], [[1, 2, 3], [4, 5, 6]])
    with step(batch, cache):
        first = current_step().prepare(4, "request")
    later = batch.advance()
    with step(later, cache):
        assert current_step().prepare(4, "request") is first
        # Another bucket has memory of its own, and a step that ran in between another content.
        assert current_step().prepare(32, "request") is not first
        assert current_step().prepare(32, "request").slots.tolist()[:2] == [9, 22]
    with step(Batch([1], [1], [[30]]), cache):
        current_step().prepare(4, "request")
    for again in (later, batch, batch.advance().advance()):
        with step(again, cache):
            age = again.age
            assert current_step().prepare(4, "request").slots.tolist()[:2] == [8 + age, 21 + age]
    # What a step looks ahead to is no page of the cache, or another request's: it is written when it is needed.
    for pages in ([[1, 2, 99], [4, 5, 6]], [[1, 2, 6], [4, 5, 6]]):
        batch = Batch([1, 1], [8, 8], pages)
        with step(batch, cache):
            current_step().prepare(4, "request")
        with pytest.raises(BatchError, match=r"uses page 99|writes page 6"), step(batch.advance(), cache):
            pass


def test_ids_travel_with_the_metadata():
    cache = small_cache(num_pages=40)
    for _ in range(2):
        batch = Batch([2, 1], [5, 6], [[1, 2], [4, 5]], ids=[7, 8, 9])
        with step(batch, cache):
            assert batch.ids.tolist() == [7, 8, 9] and batch.positions.tolist() == [3, 4, 5]
            current_step().prepare(4, "request")
    batch = Batch([1], ids=[3])
    with step(batch):
        assert batch.ids.tolist() == [3]
    with step(batch.advance()) as later:
        assert later.ids.tolist() == [3]
    with pytest.raises(BatchError, match="no ids"), step(Batch([2], ids=[3, 4]).advance()) as later:
        _ = later.ids
    with pytest.raises(BatchError, match="one a token"):
        Batch([1], ids=[3, 4])
    with pytest.raises(BatchError, match="page_counts"):
        Batch([1], [1], np.array([[1, 2]]), page_counts=[3])
