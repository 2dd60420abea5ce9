"""Paged attention: against a loop over tokens, padded and not, and opened by the graph pass."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcg_compile.attention import AttentionShape, PagedAttention, PagedKVCache, choose_impl, ops, reference
from pcg_compile.batch import Batch
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.fx.facts import trace_facts
from pcg_compile.fx.submodules import copy_graph
from pcg_compile.options import Options
from pcg_compile.passes.context import PassContext
from pcg_compile.passes.prepare_batch import prepare_batch
from pcg_compile.step import current_step, scratch_step, step
from pcg_compile.torch_compat.fake_tensors import fake_inputs


class Requests:
    """A few requests served together: their keys and values so far, and their pages."""

    def __init__(self, count, cache, seed=0):
        self.cache, self.random = cache, torch.Generator().manual_seed(seed)
        shape = (0, cache.num_kv_heads, cache.head_dim)
        self.k = [torch.zeros(shape, dtype=cache.dtype) for _ in range(count)]
        self.v = [torch.zeros(shape, dtype=cache.dtype) for _ in range(count)]
        self.tables = [[] for _ in range(count)]

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.cache.dtype)

    def new(self, lens, heads):
        """The next tokens of each request: the batch, q, k, v."""
        n = sum(lens)
        q = self.draw(n, heads, self.cache.head_dim)
        k, v = (self.draw(n, self.cache.num_kv_heads, self.cache.head_dim) for _ in range(2))
        for r, (new_k, new_v) in enumerate(zip(k.split(lens), v.split(lens), strict=True)):
            self.k[r], self.v[r] = torch.cat([self.k[r], new_k]), torch.cat([self.v[r], new_v])
            self.tables[r] += self.cache.allocate(-(-len(self.k[r]) // self.cache.page_size) - len(self.tables[r]))
        return Batch(lens, [len(k) for k in self.k], self.tables), q, k, v

    def expected(self, q, lens, module):
        """One token and one head at a time."""
        rows, group = [], module.num_heads // module.num_kv_heads
        for r, some in enumerate(q.double().split(lens)):
            first = len(self.k[r]) - len(some)
            for i, token in enumerate(some):
                begin = 0 if module.window is None else max(0, first + i - module.window + 1)
                heads = []
                for h in range(module.num_heads):
                    keys, values = (t[r][begin : first + i + 1, h // group].double() for t in (self.k, self.v))
                    scores = keys @ token[h] * module.scale
                    if module.softcap is not None:
                        scores = module.softcap * torch.tanh(scores / module.softcap)
                    heads.append(torch.softmax(scores, 0) @ values)
                rows.append(torch.stack(heads))
        return torch.stack(rows).to(q.dtype)


def make(
    window=None, softcap=None, heads=4, kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32, scale=None, pages=200
):
    cache = PagedKVCache(2, pages, page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    return cache, PagedAttention(1, heads, kv_heads, head_dim, window, softcap, scale)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"window": 3}, {"window": 1}, {"softcap": 2.0}, {"window": 6, "softcap": 1.5}, {"scale": 0.1},
        {"heads": 4, "kv_heads": 4}, {"heads": 6, "kv_heads": 1}, {"page_size": 1}, {"page_size": 64},
    ],
)  # fmt: skip
def test_prefill_decode_and_mixed_steps(variant, dtype):
    cache, attention = make(**variant, dtype=dtype)
    requests = Requests(5, cache)
    for lens in ([7, 1, 12, 30, 4], [1, 1, 1, 1, 1], [1, 9, 1, 2, 17], [3, 3, 3, 3, 3]):
        batch, q, k, v = requests.new(lens, attention.num_heads)
        with step(batch, cache):
            result = attention(q, k, v)
        assert result.is_contiguous()
        torch.testing.assert_close(
            result, requests.expected(q, lens, attention), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 15), min_size=3, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([None, 1, 4]),
    st.integers(0, 40),
)
def test_padding_as_a_request_changes_no_real_row(steps, page_size, window, pad):
    """Both ways of padding, bound as a program binds them, give eager's rows; pad rows are finite."""
    cache, attention = make(page_size=page_size, window=window)
    requests = Requests(3, cache)
    shape = AttentionShape(4, 2, 8, window, None, 8**-0.5, torch.float32).encode()
    for lens in steps:
        batch, q, k, v = requests.new(lens, 4)
        n, bucket = sum(lens), sum(lens) + pad
        with step(batch, cache):
            eager = attention(q, k, v)
            bound = torch.full((bucket, 4, 8), 7.0)
            bound[:n] = q
            keys, values = torch.full((2, bucket, 2, 8), -3.0)
            keys[:n], values[:n] = k, v
            for mode, rows in (("request", bucket), ("slice", n)):
                ops.bind_prepare_batch(bucket, shape, mode=mode)()
                ops.store_kv(keys, values, cache.flat_k[1], cache.flat_v[1], current_step().slot_mapping(bucket))
                out = torch.full((bucket, 4, 8), torch.nan)
                ops.bind_attend(bound[:rows], out[:rows], 1, shape)()
                assert torch.equal(out[:n], eager) and out[:rows].isfinite().all()
    used = {page for table in requests.tables for page in table}
    for page in range(1, cache.num_pages):
        assert bool(cache.k[1][page].any()) == (page in used)


def test_chunks_give_the_same_rows(monkeypatch):
    cache, attention = make(window=7)
    requests = Requests(5, cache)
    lens = [7, 1, 12, 30, 4]
    batch, q, k, v = requests.new(lens, 4)
    monkeypatch.setattr(reference, "_MOST_SCORES", 4 * 30 * 3)
    with step(batch, cache):
        result = attention(q, k, v)
        ((_, groups),) = current_step().prepared.plans.values()
        assert len(groups) > 10
    torch.testing.assert_close(result, requests.expected(q, lens, attention), rtol=1e-5, atol=1e-5)


def test_a_plan_serves_all_layers_and_only_its_step():
    cache, _ = make()
    layers = [PagedAttention(i, 4, 2, 8) for i in range(2)] + [PagedAttention(0, 4, 2, 8, window=2)]
    requests = Requests(2, cache)
    plans = []
    for lens in ([3, 2], [1, 1]):
        batch, q, k, v = requests.new(lens, 4)
        with step(batch, cache):
            for layer in layers:
                layer(q, k, v)
            plans.append(current_step().prepared.plans)
    assert [len(p) for p in plans] == [2, 2]
    assert not {id(p) for p in plans[0].values()} & {id(p) for p in plans[1].values()}


def test_stale_pages_and_a_poisoned_scratch_page_reach_no_real_row():
    cache, attention = make()
    requests = Requests(2, cache)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(torch.nan)
    batch, q, k, v = requests.new([3, 6], 4)
    with step(batch, cache):
        assert attention(q, k, v).isfinite().all()


def test_scratch_writes_page_0_alone():
    cache, attention = make()
    requests = Requests(2, cache)
    batch, q, k, v = requests.new([3, 6], 4)
    with step(batch, cache):
        expected = attention(q, k, v)
        before = [t.clone() for t in (*cache.k, *cache.v)]
        with scratch_step(16, cache) as scratch:
            assert scratch.batch.num_requests == 0
            for rows in (16, 5):
                assert (
                    attention(torch.ones(rows, 4, 8), torch.ones(rows, 2, 8), torch.ones(rows, 2, 8)).isfinite().all()
                )
        for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
            assert torch.equal(tensor[1:], old[1:])
        assert torch.equal(attention(q, k, v), expected)


def test_inference_mode_and_later_steps():
    cache, attention = make()
    requests = Requests(2, cache)
    for lens in ([3, 6], [1, 1], [2, 1]):
        batch, q, k, v = requests.new(lens, 4)
        with torch.inference_mode(lens[0] != 1), step(batch, cache):
            result = attention(q, k, v)
        torch.testing.assert_close(result.clone(), requests.expected(q, lens, attention), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "cast", "text"),
    [
        (PagedAttention(2, 4, 2, 8), torch.float32, "layer 2 has no place in a cache of 2 layers"),
        (PagedAttention(0, 4, 4, 8), torch.float32, "num_kv_heads is 4 in the layer, 2 in the cache"),
        (PagedAttention(0, 4, 2, 16), torch.float32, "head_dim is 16 in the layer, 8 in the cache"),
        (
            PagedAttention(0, 4, 2, 8),
            torch.bfloat16,
            "dtype is torch.bfloat16 in the layer, torch.float32 in the cache",
        ),
    ],
)
def test_modules_that_do_not_fit_the_cache(layer, cast, text):
    cache, _ = make()
    q = torch.zeros(2, 4, layer.head_dim, dtype=cast)
    k = torch.zeros(2, layer.num_kv_heads, layer.head_dim, dtype=cast)
    with step(Batch([2], page_table=[[1]]), cache), pytest.raises(BatchError, match=text):
        layer(q, k, k)


def test_calls_that_do_not_fit_the_step():
    cache, attention = make()
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    with pytest.raises(BatchError, match=r"with pcg\.step\(batch, cache\)"):
        attention(q, k, k)
    with step(Batch([3])), pytest.raises(BatchError, match="the step has none"):
        attention(q, k, k)
    with step(Batch([2], page_table=[[1]]), cache):
        with pytest.raises(BatchError, match="called with 3 tokens, the batch of the step has 2"):
            attention(q, k, k)
        with pytest.raises(BatchError, match="k has 2 tokens, q has 3"):
            attention(q, k[:2], k[:2])
        with pytest.raises(BatchError, match=r"v is torch\.float64, q is torch\.float32"):
            attention(q, k, k.double())
        with pytest.raises(BatchError, match="3 dimensions"):
            attention(q[None], k[None], k[None])
    other, _ = make()
    shape = AttentionShape(4, 2, 8, None, None, 8**-0.5, torch.float32).encode()
    with step(Batch([3], page_table=[[1]]), cache):
        bound = ops.bind_attend(q, torch.zeros(3, 4, 8), 0, shape)
    with step(Batch([3], page_table=[[1]]), other), pytest.raises(BatchError, match="another cache"):
        bound()


@pytest.mark.parametrize(
    "arguments", [(0, 4, 3, 8), (0, 0, 1, 8), (-1, 4, 2, 8), (0, 4, 2, 8, 0), (0, 4, 2, 8, None, 0.0), (0, 4, 2, 8.0)]
)
def test_bad_modules(arguments):
    with pytest.raises(OptionsError):
        PagedAttention(*arguments)


def test_shapes_survive_their_text():
    for window, softcap, scale, dtype in (
        (None, None, 1 / math.sqrt(96), torch.bfloat16),
        (5, 30.0, 1.0, torch.float64),
    ):
        shape = AttentionShape(32, 8, 96, window, softcap, scale, dtype)
        assert AttentionShape.decode(shape.encode()) == shape
        assert AttentionShape.decode(shape.encode()) is AttentionShape.decode(shape.encode())
    assert choose_impl(shape, torch.device("cpu")) == (reference.ReferenceAttention, None)


class Block(torch.nn.Module):
    """Two attention layers with work between them."""

    def __init__(self, window=None):
        super().__init__()
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 64) for _ in range(2))
        self.attention = torch.nn.ModuleList([PagedAttention(0, 4, 2, 8), PagedAttention(1, 4, 2, 8, window)])
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x):
        for qkv, attention in zip(self.qkv, self.attention, strict=True):
            q, k, v = qkv(x).split([32, 16, 16], -1)
            x = x + self.out(attention(q.view(-1, 4, 8), k.view(-1, 2, 8), v.view(-1, 2, 8)).flatten(1))
        return x


def step_inputs(gm):
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [node.meta["pcg_step_input"] for node in placeholders if "pcg_step_input" in node.meta]


def context_of(gm, inputs, **options):
    return PassContext(Options(), torch.device("cpu"), trace_facts(gm, fake_inputs(inputs)), **options)


def opened(model, x, dynamic=True, collect=False):
    """The graph that Dynamo gives the pass, what the pass makes of it, and their context."""
    found = {}

    def backend(gm, inputs):
        gm = copy_graph(gm)
        context = context_of(gm, inputs, collect=collect)
        found.update(gm=prepare_batch(gm, context), inputs=inputs, context=context)
        extra = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder") if "pcg_step_input" in n.meta]
        found["facts"] = trace_facts(gm, [*fake_inputs(inputs), *extra])
        steps = step_inputs(gm)

        def run(*args):
            state = current_step()
            return gm(*args, *(s.get(state, state.batch.num_tokens) for s in steps))

        return run

    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, compiled(x), found


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_pass_opens_attention(dynamic):
    torch.manual_seed(0)
    model = Block(window=3)
    cache, _ = make()
    batch = Batch([3, 6], page_table=[[1], [2, 3]])
    x = torch.randn(9, 32)
    with step(batch, cache):
        eager = model(x)
        compiled, result, found = opened(model, x, dynamic)
    torch.testing.assert_close(result, eager)
    nodes = [n for n in found["gm"].graph.nodes if n.op == "call_function"]
    targets = [str(n.target) for n in nodes if "pcg." in str(n.target)]
    assert targets == ["pcg.prepare_batch.default"] + ["pcg.store_kv.default", "pcg.attend.default"] * 2
    assert nodes[0].target == torch.ops.pcg.prepare_batch.default and len(nodes[0].args[1].split(";")) == 2
    names = sorted(step_input.name for step_input in step_inputs(found["gm"]))
    assert names == ["k_cache_0", "k_cache_1", "slot_mapping", "v_cache_0", "v_cache_1"]
    for node in nodes:
        if "pcg." in str(node.target):
            assert "forward" in (node.stack_trace or "")
            writes = found["facts"][node].writes
            assert len(writes) == {"prepare_batch": 0, "store_kv": 2, "attend": 1}[node.target._opname]
    if dynamic:
        assert isinstance(nodes[0].args[0], torch.fx.Node) and nodes[0].args[0].op == "placeholder"
        with step(Batch([1, 1], [4, 7], [[1], [2, 3]]), cache):
            small = torch.randn(2, 32)
            torch.testing.assert_close(compiled(small), model(small))
    else:
        assert nodes[0].args[0] == 9


def test_the_pass_leaves_other_graphs_alone():
    def backend(gm, inputs):
        code = gm.code
        assert prepare_batch(gm, context_of(gm, inputs)) is gm
        assert gm.code == code
        return gm

    torch._dynamo.reset()
    assert torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2)).tolist() == [1, 1]


def test_the_pass_needs_a_step_but_to_collect():
    with pytest.raises(Exception, match=r"with pcg\.step\(batch, cache\)") as caught:
        opened(Block(), torch.randn(9, 32))
    assert isinstance(caught.value, BatchError) or isinstance(caught.value.inner_exception, BatchError)
    with step(Batch([9], page_table=[[1, 2, 3]]), make()[0]):
        _, _, found = opened(Block(), torch.randn(9, 32), collect=True)
    assert any("prepare_batch" in note for note in found["context"].notes)


def test_queries_that_are_not_contiguous():
    class Transposed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = PagedAttention(0, 4, 2, 8)

        def forward(self, q, k):
            return self.attention(q.transpose(0, 1), k.transpose(0, 1), k.transpose(0, 1)) + 1

    cache, _ = make()
    batch = Batch([3, 6], page_table=[[1], [2, 3]])
    q, k = torch.randn(4, 9, 8), torch.randn(2, 9, 8)
    with step(batch, cache):
        eager = Transposed()(q, k)
        torch._dynamo.reset()
        for tensor in (q, k):
            torch._dynamo.mark_dynamic(tensor, 1)
        seen = {}

        def backend(gm, inputs):
            gm = copy_graph(gm)
            gm = prepare_batch(gm, context_of(gm, inputs))
            seen["contiguous"] = any(n.target == "contiguous" for n in gm.graph.nodes)
            steps = step_inputs(gm)
            return lambda *args: gm(*args, *(s.get(current_step(), 9) for s in steps))

        result = torch.compile(Transposed(), backend=backend, fullgraph=True)(q, k)
    assert seen["contiguous"] and torch.equal(result, eager)


def test_attention_shapes_are_values():
    shape = AttentionShape(4, 2, 8, None, None, 1.0, torch.float32)
    assert dataclasses.replace(shape, window=3) != shape and hash(shape) == hash(dataclasses.replace(shape))
