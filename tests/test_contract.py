"""What the contract promises of batches, checked by a stranger's own arithmetic: metadata that an op declares among its
arguments, requests that come and go, model families, and errors instead of wrong numbers."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import transformers as tf
from declared_metadata import SEEN, WIDTH, Packed, indptr
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import BatchError, OptionsError, PCGError
from pcg_compile.integrations.transformers import cache_for


def ragged(rng):
    return [rng.choice([1, rng.randint(1, 9)]) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("padding", ["request", "slice"])
@pytest.mark.parametrize(
    ("way", "dynamic"),
    [("one_source", None), ("one_source", True), ("in_place", None), ("computed", True), ("from_data", None)],
)
def test_declared_metadata_covers_the_padding_request(way, padding, dynamic):
    torch._dynamo.reset()
    rng, model = random.Random(3), Packed(way).eval()
    compiled = torch.compile(
        model, backend="pcg", dynamic=dynamic, options={"buckets": [4, 16, 40], "compiler": "eager", "padding": padding}
    )
    more = []
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        for lengths in [[3, 2], [1], *(ragged(rng) for _ in range(5))]:
            x, metadata = torch.randn(sum(lengths), WIDTH), (indptr(lengths), max(lengths))
            wanted = model(x, *metadata)
            SEEN.clear()
            torch.testing.assert_close(compiled(x, *metadata), wanted)
            more += [rows - len(x) for rows in SEEN]
    assert any(more) == (padding == "request") and pcg.stats(compiled).replays > 0


@pytest.mark.parametrize("scratch", [0, 7])
@pytest.mark.parametrize("page_size", [1, 5])
@pytest.mark.parametrize("way", ["paged", "paged_computed"])
def test_padding_goes_to_the_scratch_page_alone(way, page_size, scratch):
    """Also where slots are no argument of the call, and where the cache comes first and has a dynamic size."""
    torch._dynamo.reset()
    pcg.register_split_op(
        "contract::paged", qo_indptr="qi", kv_indptr="ki", kv_indices="pages", last_page_len="last",
        slot_mapping="slots", page_size=page_size, scratch_page=scratch,
    )  # fmt: skip
    rng, model = random.Random(page_size), Packed(way).eval()
    compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [4, 16, 40], "compiler": "eager"})
    caches = [torch.zeros(90, page_size, WIDTH) for _ in range(2)]
    SEEN.clear()
    for _ in range(7):
        qo = ragged(rng)
        kv = [n + rng.choice([0, 9]) for n in qo]
        free = [page for page in range(90) if page != scratch]
        rng.shuffle(free)
        table = [[free.pop() for _ in range(-(-n // page_size))] for n in kv]
        slots = [
            row[i // page_size] * page_size + i % page_size
            for row, n, have in zip(table, qo, kv, strict=True)
            for i in range(have - n, have)
        ]
        metadata = (
            indptr(qo), indptr(map(len, table)), torch.tensor([*itertools.chain(*table)], dtype=torch.int32),
            torch.tensor([(n - 1) % page_size + 1 for n in kv]), torch.tensor(slots),
        )  # fmt: skip
        x, before = torch.randn(sum(qo), WIDTH), [cache.normal_().clone() for cache in caches]
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, *caches, *metadata), model(x, *before, *metadata))
        for cache, wanted in zip(caches, before, strict=True):
            cache[scratch] = wanted[scratch] = 0
            torch.testing.assert_close(cache, wanted)
    assert pcg.stats(compiled).replays > 0 and any(rows in (4, 16, 40) for rows in SEEN)


class Decoder(nn.Module):
    """Token embedding, then layers of paged attention of different kinds."""

    def __init__(self, kinds, heads=4, kv_heads=2, head_dim=6):
        super().__init__()
        width = heads * head_dim
        self.embed, self.split = nn.Embedding(40, width), [width, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = nn.ModuleList(nn.Linear(width, sum(self.split)) for _ in kinds)
        self.attention = nn.ModuleList(
            pcg.PagedAttention(layer=i, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **kind)
            for i, kind in enumerate(kinds)
        )

    def forward(self, ids, positions):
        x = self.embed(ids) * (1 + positions[:, None] / 64)
        for qkv, attention in zip(self.qkv, self.attention, strict=True):
            q, k, v = (t.unflatten(-1, (-1, attention.head_dim)) for t in qkv(x).split(self.split, -1))
            x = torch.tanh(x + attention(q, k, v).flatten(1))
        return x

    def alone(self, ids):
        """One request from its first token on, without a cache."""
        x = self.embed(ids) * (1 + torch.arange(len(ids))[:, None] / 64)
        for qkv, layer in zip(self.qkv, self.attention, strict=True):
            q, k, v = (t.unflatten(-1, (-1, layer.head_dim)).transpose(0, 1) for t in qkv(x).split(self.split, -1))
            k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
            scores = q @ k.transpose(1, 2) * layer.scale
            if layer.softcap is not None:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
            unseen = (distance < 0) | (distance >= (layer.window or len(ids)))
            x = torch.tanh(
                x + (torch.softmax(scores.masked_fill(unseen, -torch.inf), -1) @ v).transpose(0, 1).flatten(1)
            )
        return x


@pytest.mark.parametrize("cudagraph_mode", ["piecewise", "full"])
@pytest.mark.parametrize(("page_size", "dynamic"), [(1, None), (3, True), (16, None)])
def test_requests_come_go_share_prefixes_and_are_cut_into_chunks(page_size, dynamic, cudagraph_mode):
    torch._dynamo.reset()
    torch.manual_seed(page_size)
    rng = random.Random(page_size)
    model = Decoder([{}, {"window": 3, "softcap": 4.0}, {"scale": 0.2, "window": 9}]).eval()
    cache = pcg.PagedKVCache(
        num_layers=3, num_pages=30 + 300 // page_size, page_size=page_size, max_requests=3, num_kv_heads=2, head_dim=6
    )
    compiled = torch.compile(
        model,
        backend="pcg",
        dynamic=dynamic,
        options={"buckets": [4, 16, 48], "compiler": "eager", "cudagraph_mode": cudagraph_mode},
    )
    requests, users = [], {}
    for _ in range(9):
        for _ in range(rng.randint(0, 2) if requests else 2):
            ids, done, pages = [rng.randrange(40) for _ in range(rng.randint(1, 20))], 0, []
            parent = rng.choice(requests) if requests and rng.random() < 0.5 else None
            whole = parent["done"] // page_size if parent else 0
            if whole:
                ids, done, pages = parent["ids"][: whole * page_size] + ids, whole * page_size, parent["pages"][:whole]
                for page in pages:
                    users[page] += 1
            requests.append({"ids": ids, "done": done, "pages": list(pages)})
        rng.shuffle(requests)
        qo = []
        for r in requests:
            if r["done"] == len(r["ids"]):
                r["ids"].append(rng.randrange(40))
            left = len(r["ids"]) - r["done"]
            qo.append(rng.choice([left, rng.randint(1, left)]))
            new = cache.allocate(-(-(r["done"] + qo[-1]) // page_size) - len(r["pages"]))
            users.update(dict.fromkeys(new, 1))
            r["pages"] += new
        kv = [r["done"] + n for r, n in zip(requests, qo, strict=True)]
        ids = torch.tensor([i for r, end in zip(requests, kv, strict=True) for i in r["ids"][r["done"] : end]])
        batch = pcg.Batch(qo_lens=qo, kv_lens=kv, page_table=[r["pages"] for r in requests])
        with pcg.step(batch, cache):
            results = compiled(ids, batch.positions).split(qo)
        for r, end, result in zip(requests, kv, results, strict=True):
            r["done"] = end
            with torch.no_grad():
                wanted = model.alone(torch.tensor(r["ids"][:end]))[-len(result) :]
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
        for r in [r for r in requests if rng.random() < 0.25]:
            requests.remove(r)
            for page in r["pages"]:
                users[page] -= 1
                if not users[page]:
                    cache.free([page])
    assert pcg.stats(compiled).replays > 0


SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_key_value_heads": 2,
}  # fmt: skip
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
#: The model, its config, the config's fields beside the small ones.
SERVED = [
    ("Cohere2", {"sliding_window": 5}),
    ("Gemma3", {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    ("GPTBigCode", GPT),
    ("GPTJ", {**GPT, "rotary_dim": 4}),
]  # fmt: skip
#: What would be wrong without a word, and a part of the reason.
REFUSED = [
    ("Bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}, "by itself"),
    ("Falcon", {"hidden_size": 32, "num_attention_heads": 4, "alibi": True}, "by itself"),
    ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "by itself"),
    ("Llama", {**SMALL, "rope_parameters": DYNAMIC_ROPE}, "longest request"),
    ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "state"),
    ("Lfm2", {**SMALL, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}, "conv"),
    ("Bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "position_ids"),
    ("DiffLlama", SMALL, "layer_idx"),
    ("Dory", {**SMALL, "head_dim": 8}, "layer_idx"),
]


def family(name, fields, implementation):
    config = getattr(tf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(tf, "GPTBigCodeForCausalLM" if name == "GPTBigCode" else f"{name}ForCausalLM", None)
    model = model or getattr(tf, f"{name}LMHeadModel")
    torch.manual_seed(0)
    return model._from_config(config(**fields), attn_implementation=implementation).eval()


@pytest.mark.parametrize(("name", "fields"), SERVED, ids=[name for name, _ in SERVED])
def test_families_give_what_each_request_gets_alone(name, fields):
    torch._dynamo.reset()
    if name == "GPTJ" and not hasattr(tf.models.gptj.modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
        # As it was before transformers 5.24.
        with pytest.raises(OptionsError, match="by itself"):
            family(name, fields, "pcg")
        return
    fields = fields if "n_embd" in fields else {**SMALL, "bos_token_id": 1, "eos_token_id": 2, **fields}
    eager, model = (family(name, fields, implementation) for implementation in ("eager", "pcg"))
    cache = cache_for(model, num_pages=32, page_size=4)
    compiled = torch.compile(model, backend="pcg", options={"buckets": [8, 32], "compiler": "eager"})
    ids = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(1))
    pages, done = [cache.allocate(6) for _ in ids], [0, 0, 0]
    for run, qo in ((model, [4, 13, 7]), (compiled, [5, 1, 1]), (compiled, [1, 1, 2]), (compiled, [1, 2, 12])):
        kv = [have + n for have, n in zip(done, qo, strict=True)]
        batch = pcg.Batch(qo_lens=qo, kv_lens=kv, page_table=pages)
        packed = torch.cat([row[a:b] for row, a, b in zip(ids, done, kv, strict=True)])
        with pcg.step(batch, cache):
            logits = run(input_ids=packed[None], position_ids=batch.positions[None]).logits[0]
        with torch.no_grad():
            alone = [eager(input_ids=row[None, :n], use_cache=False).logits[0] for row, n in zip(ids, kv, strict=True)]
        wanted = torch.cat([rows[-n:] for rows, n in zip(alone, qo, strict=True)])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        done = kv


@pytest.mark.parametrize(("name", "fields", "reason"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_families_that_would_be_wrong_are_refused(name, fields, reason):
    if not hasattr(tf, f"{name}Config"):
        pytest.skip("this transformers does not have it")
    fields = {"vocab_size": 60, **fields}
    with pytest.raises(OptionsError, match=reason):
        # A model whose layers show what they do only as they run is refused with its cache.
        cache_for(family(name, fields, "pcg"), num_pages=4)
    assert family(name, fields, "eager") is not None


@pytest.mark.parametrize("name", ["DiffLlama", "Dory"])
def test_a_cache_made_by_hand_lets_no_refused_model_run(name):
    if not hasattr(tf, f"{name}Config"):
        pytest.skip("this transformers does not have it")
    fields = next(fields for refused, fields, _ in REFUSED if refused == name)
    model = family(name, fields, "pcg")
    cache = pcg.PagedKVCache(num_layers=4, num_pages=8, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    batch = pcg.Batch(qo_lens=[4], kv_lens=[4], page_table=[cache.allocate(1)])
    with torch.no_grad(), pcg.step(batch, cache), pytest.raises(OptionsError, match="layer_idx"):
        model(input_ids=torch.randint(3, 60, (1, 4)), position_ids=batch.positions[None])


def test_a_cache_for_latent_attention_holds_whole_heads():
    config = tf.DeepseekV3Config(**SMALL, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    assert cache_for(config, num_pages=4).head_dim == 8


class Chain(nn.Module):
    """Attention whose result is the next layer's query as it is; both layers store keys of their own."""

    def __init__(self, second):
        super().__init__()
        self.layers = nn.ModuleList(pcg.PagedAttention(layer, 2, 1, 4) for layer in (0, second))

    def forward(self, q, k, v):
        return self.layers[1](self.layers[0](q, k, v), k * 2, v)


def test_a_layer_of_the_cache_is_stored_once_a_step():
    cache = pcg.PagedKVCache(num_layers=2, num_pages=9, page_size=4, num_kv_heads=1, head_dim=4)
    batch = pcg.Batch(qo_lens=[3, 1], kv_lens=[3, 5], page_table=[[1], [2, 3]])
    tensors = torch.randn(4, 2, 4), torch.randn(4, 1, 4), torch.randn(4, 1, 4)
    for second in (1, 0):
        torch._dynamo.reset()
        model = Chain(second)
        compiled = torch.compile(model, backend="pcg", options={"buckets": [8], "compiler": "eager"})
        with pcg.step(batch, cache):
            wanted = model(*tensors)
            if second:
                torch.testing.assert_close(compiled(*tensors), wanted)
            else:
                with pytest.raises(BatchError, match="layer 0 of the cache"):
                    compiled(*tensors)


def test_attention_has_no_gradients():
    cache = pcg.PagedKVCache(num_layers=1, num_pages=9, page_size=4, num_kv_heads=1, head_dim=4)
    q = torch.randn(3, 2, 4, requires_grad=True)
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache), torch.enable_grad():
        result = pcg.PagedAttention(0, 2, 1, 4)(q, torch.randn(3, 1, 4), torch.randn(3, 1, 4))
        with pytest.raises(BatchError, match="no gradients"):
            result.sum().backward()


def test_pages_without_a_cache_are_nobodys_concern():
    """A model that attends by itself still gets its positions from the step."""
    batch = pcg.Batch(qo_lens=[3, 1], kv_lens=[3, 5], page_table=[[1], [2, 3]])
    with pcg.step(batch):
        assert batch.positions.tolist() == [0, 1, 2, 4]
        with pytest.raises(BatchError, match="needs a cache"):
            _ = batch.slot_mapping


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pcg.Batch([1, 1], adapters="fr"), "one name a request"),
        (lambda: pcg.Batch([1], [1], [[2**32 + 5]]), "Pages are int32"),
        (lambda: pcg.Batch([1], [1], torch.tensor([[5 - 2**32]])).padded(2, 16), "page -"),
        (lambda: pcg.Batch([1], [1], [[1.0]]), r"page_table=\[\["),
        (lambda: pcg.step(pcg.Batch([1], [1], [[1]]), "cache").__enter__(), "PagedKVCache"),
        (lambda: pcg.PagedAttention(0, 2, 1, 4, scale="1"), "scale"),
        (lambda: pcg.PagedAttention(0, 2, 1, 4, scale=float("nan")), "scale"),
        (lambda: pcg.PagedAttention(0, 2, 1, 4, scale=1j), "scale"),
        (lambda: pcg.PagedAttention(0, 2, 1, 4, softcap=float("inf")), "softcap"),
        (lambda: pcg.PagedAttention(0, 2, 1, 4, softcap="30"), "softcap"),
        (lambda: cache_for(tf.MambaConfig(), num_pages=4), "num_attention_heads"),
    ],
)
def test_errors_instead_of_wrong_numbers(make, text):
    with pytest.raises(PCGError, match=text):
        make()
