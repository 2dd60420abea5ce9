"""Ops that declare their metadata, and are given more than a padding request covers: eager's values all the same."""

import itertools
import random

import pytest
import torch

import pcg_compile as pcg

WIDTH, PAGE = 4, 4
#: Of each call: rows of q, the last entry of qo_indptr, requests.
SEEN = []
Tensor = torch.Tensor


def _rows(cu):
    return list(itertools.pairwise(cu.tolist()))


def _note(q, cu, dim=0):
    assert cu[-1] <= q.shape[dim]
    SEEN.append((q.shape[dim], int(cu[-1]), len(cu) - 1))


@pcg.split_op("req::means", mutates_args=("out",), qo_indptr="cu")
def means(x: Tensor, cu: Tensor, out: Tensor) -> None:
    """Each row less the mean of its request, over features too."""
    _note(x, cu)
    for a, b in _rows(cu):
        out[a:b] = x[a:b] - x[a:b].mean()


@pcg.split_op("req::features", mutates_args=("out",), qo_indptr="cu")
def features(x: Tensor, cu: Tensor, out: Tensor) -> None:
    _note(x, cu)
    out.copy_(x / (1 + x.abs().mean(-1, keepdim=True)) + x.shape[-1])


@pcg.split_op("req::scaled", mutates_args=("out",), qo_indptr="cu")
def scaled(x: Tensor, cu: Tensor, scales: Tensor, out: Tensor) -> None:
    """A scale, or a row of features, for each request."""
    _note(x, cu)
    assert len(scales) >= len(cu) - 1
    for r, (a, b) in enumerate(_rows(cu)):
        out[a:b] = x[a:b] * scales[r]


@pcg.split_op("req::same_number", mutates_args=("out",), qo_indptr="cu")
def same_number(x: Tensor, cu: Tensor, scales: Tensor, out: Tensor) -> None:
    assert len(scales) == len(cu) - 1
    scaled(x, cu, scales, out)


@pcg.split_op("req::counted", mutates_args=("out",), qo_indptr="cu")
def counted(x: Tensor, cu: Tensor, requests: int, out: Tensor) -> None:
    _note(x, cu)
    assert requests == len(cu) - 1
    out.copy_(x * requests)


@pcg.split_op("req::transposed", mutates_args=("out",), qo_indptr="cu")
def transposed(q: Tensor, cu: Tensor, out: Tensor) -> None:
    """q and out as ``[features, tokens]``."""
    _note(q, cu, 1)
    assert q.shape[1] == int(cu[-1])
    for a, b in _rows(cu):
        out[:, a:b] = q[:, a:b] - q[:, a:b].mean(1, keepdim=True)


@pcg.split_op("req::biased", mutates_args=("out",), qo_indptr="cu")
def biased(x: Tensor, bias: Tensor, cu: Tensor, out: Tensor) -> None:
    """A bias of ``[tokens, tokens]``, summed as a whole."""
    _note(x, cu)
    out.copy_(x + bias.sum())


@pcg.split_op("req::cross", mutates_args=("out",), qo_indptr="cu", kv_indptr="cu_k")
def cross(x: Tensor, keys: Tensor, cu: Tensor, cu_k: Tensor, out: Tensor) -> None:
    """Keys with a number of tokens of their own."""
    _note(x, cu)
    assert cu_k[-1] == len(keys)
    for (a, b), (c, d) in zip(_rows(cu), _rows(cu_k), strict=True):
        out[a:b] = x[a:b] + keys[c:d].sum(0)


@pcg.split_op("req::tables", mutates_args=("out",), qo_indptr="cu")
def tables(x: Tensor, cache: Tensor, table: Tensor, cu: Tensor, out: Tensor) -> None:
    """Block tables ``[requests, pages]`` without a role."""
    _note(x, cu)
    assert len(table) >= len(cu) - 1
    for r, (a, b) in enumerate(_rows(cu)):
        out[a:b] = x[a:b] + cache[table[r]].sum((0, 1))


@pcg.split_op("req::trailing", mutates_args=("out",), qo_indptr="cu")
def trailing(x: Tensor, cu: Tensor, out: Tensor) -> None:
    """Rows behind the last request are left alone."""
    _note(x, cu)
    for a, b in _rows(cu):
        out[a:b] = x[a:b] - x[a:b].mean(0)


def _totals(x, cu):
    return x.new_empty(x.shape[1])


@pcg.split_op("req::totals", fake=_totals, qo_indptr="cu")
def totals(x: Tensor, cu: Tensor) -> Tensor:
    """A result without rows: over everything that it is given."""
    _note(x, cu)
    return x.sum(0)


def _per_request(x, cu):
    return x.new_empty(cu.shape[0] - 1, x.shape[1])


@pcg.split_op("req::per_request", fake=_per_request, qo_indptr="cu")
def per_request(x: Tensor, cu: Tensor) -> Tensor:
    _note(x, cu)
    return torch.stack([x[a:b].sum(0) for a, b in _rows(cu)])


@pcg.split_op(
    "req::paged", mutates_args=("cache", "out"), qo_indptr="cu", kv_indptr="kv", kv_indices="pages",
    last_page_len="last", slot_mapping="slots", page_size=PAGE, scratch_page=0,
)  # fmt: skip
def paged(
    x: Tensor, cache: Tensor, cu: Tensor, kv: Tensor, pages: Tensor, last: Tensor, slots: Tensor, out: Tensor
) -> None:
    _note(x, cu)
    assert len(x) == cu[-1] == len(slots) and len(cu) == len(kv) == len(last) + 1 and kv[-1] <= len(pages)
    cache.flatten(0, 1)[slots] = x
    for r, (a, b) in enumerate(_rows(cu)):
        mine = cache[pages[int(kv[r]) : int(kv[r + 1])].long()].flatten(0, 1)
        out[a:b] = mine[: len(mine) - PAGE + int(last[r])].sum(0)


def _lengths(rng, n, requests):
    cuts = sorted(rng.sample(range(1, n), min(requests, n) - 1)) if n > 1 else []
    return [b - a for a, b in itertools.pairwise([0, *cuts, n])]


def _cu(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


OPS = torch.ops.req


def _in_place(op):
    def forward(x, *rest):
        x = x + 1
        out = torch.zeros_like(x)
        getattr(OPS, op)(x, *rest, out)
        return out * 2

    return forward


def _transposed(x, cu):
    q = (x + 1).T.contiguous()
    out = torch.zeros_like(q)
    OPS.transposed(q, cu, out)
    return out.T * 2


def _biased(x, cu):
    x = x + 1
    out = torch.zeros_like(x)
    OPS.biased(x, x[:, :1] * x[:, 0], cu, out)
    return out * 2


def _counted(x, cu):
    x = x + 1
    out = torch.zeros_like(x)
    OPS.counted(x, cu, cu.shape[0] - 1, out)
    return out * 2


#: name: (the function, arguments behind x and cu by (rng, lengths), dynamic dimensions of those, padded by a request)
CASES = {
    "means": (_in_place("means"), lambda rng, ls: (), (), True),
    "scales": (_in_place("scaled"), lambda rng, ls: (torch.randn(len(ls)),), (0,), False),
    "more scales": (_in_place("scaled"), lambda rng, ls: (torch.randn(len(ls) + rng.randint(0, 2)),), (0,), False),
    "features of each": (_in_place("scaled"), lambda rng, ls: (torch.randn(len(ls), WIDTH),), (0,), False),
    "as many scales": (_in_place("same_number"), lambda rng, ls: (torch.randn(len(ls)),), (0,), False),
    "a fixed number of scales": (_in_place("scaled"), lambda rng, ls: (torch.randn(8),), (None,), None),
    "a number of requests": (_counted, lambda rng, ls: (), (), False),
    "transposed": (_transposed, lambda rng, ls: (), (), False),
    "bias": (_biased, lambda rng, ls: (), (), False),
    "totals": (lambda x, cu: x + OPS.totals(x + 1, cu), lambda rng, ls: (), (), False),
    "one result a request": (lambda x, cu: OPS.per_request(x + 1, cu) * 2, lambda rng, ls: (), (), False),
}


def _compile(function, way, dynamic, padding="auto"):
    torch._dynamo.reset()
    options = {"buckets": [4, 8, 16], "compiler": "eager", "padding": padding}
    if way == "piecewise":
        return pcg.piecewise(dynamic=dynamic, **options)(function)
    return torch.compile(function, backend="pcg", dynamic=True if way == "dynamic" else None, options=options)


def _check(compiled, function, args):
    """Compares a step with eager; returns the rows beyond the real ones that the op was given."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    want = function(*copies)
    SEEN.clear()
    got = compiled(*args)
    torch.testing.assert_close(got, want)
    return SEEN[-1][0] - args[0].shape[0]


WAYS = [("piecewise", "auto"), ("compile", "auto"), ("dynamic", "auto"), ("piecewise", "slice")]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("way", "padding"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_what_no_padding_request_covers_is_given_the_real_rows(name, way, padding):
    function, more, dims, covered = CASES[name]

    rng = random.Random(len(name))
    if dims:

        def forward(x, cu, third):
            return function(x, cu, third)

    else:

        def forward(x, cu):
            return function(x, cu)

    dynamic = {"x": 0, "cu": 0, **({"third": dims[0]} if dims and dims[0] is not None else {})}
    compiled, extra = _compile(forward, way, dynamic, padding), []
    for n in (3, 5, 4, 7, 8, 2, 11, 1):
        lengths = _lengths(rng, n, rng.randint(1, 5))
        args = (torch.randn(n, WIDTH), _cu(lengths), *more(rng, lengths))
        extra.append(_check(compiled, forward, args))
    assert pcg.stats(compiled).replays
    if covered is not None and way == "piecewise":
        assert any(extra) == (covered and padding == "auto")


@pytest.mark.parametrize("op", ["means", "features"])
@pytest.mark.parametrize("way", ["piecewise", "compile", "dynamic"])
def test_dynamic_features_are_not_padded(op, way):
    function = _in_place(op)

    def forward(x, cu):
        return function(x, cu)

    compiled = _compile(forward, way, {"x": (0, 1), "cu": 0})
    rng = random.Random(1)
    for n, width in itertools.product((3, 5, 8), (3, 5, 4, 7)):
        _check(compiled, forward, (torch.randn(n, width), _cu(_lengths(rng, n, 2))))
    assert pcg.stats(compiled).replays


@pytest.mark.parametrize("way", ["piecewise", "compile", "dynamic"])
def test_keys_of_another_number(way):
    function = _in_place("cross")

    def forward(x, keys, cu, cu_k):
        return function(x, keys * 1, cu, cu_k)

    compiled = _compile(forward, way, {"x": 0, "keys": 0, "cu": 0, "cu_k": 0})
    rng = random.Random(2)
    for n, k in ((3, 9), (5, 5), (8, 7), (6, 6), (4, 11), (5, 13)):
        requests = rng.randint(1, 3)
        cus = [_cu(_lengths(rng, size, requests)) for size in (n, k)]
        _check(compiled, forward, (torch.randn(n, WIDTH), torch.randn(k, WIDTH), *cus))


@pytest.mark.parametrize("rows", [4, 7])
@pytest.mark.parametrize("way", ["piecewise", "compile"])
def test_block_tables_without_a_role(way, rows):
    """Of the requests, or of a fixed number of rows that holds anything behind them."""
    function = _in_place("tables")

    def forward(x, cache, table, cu):
        return function(x, cache, table, cu)

    dynamic = {"x": 0, "cu": 0}
    compiled = _compile(forward, way, dynamic)
    rng, cache = random.Random(rows), torch.randn(20, PAGE, WIDTH)
    for n in (3, 5, 8, 6, 11, 4):
        lengths = _lengths(rng, n, rng.randint(1, 4))
        table = torch.full((rows, 3), 10**6)
        table[: len(lengths)] = torch.randint(20, (len(lengths), 3))
        assert _check(compiled, forward, (torch.randn(n, WIDTH), cache, table, _cu(lengths))) == 0


@pytest.mark.parametrize("way", ["piecewise", "compile", "dynamic"])
def test_rows_behind_the_last_request_stay_as_they_are(way):
    """Also where a step of the same sizes had none."""
    function = _in_place("trailing")

    def forward(x, cu):
        return function(x, cu)

    compiled = _compile(forward, way, {"x": 0, "cu": 0})
    for n, end in ((5, 5), (6, 6), (5, 3), (5, 5), (6, 4), (3, 1), (3, 3), (7, 2), (8, 6), (5, 5)):
        _check(compiled, forward, (torch.randn(n, WIDTH), _cu([1, end - 1] if end > 1 else [1])))
    assert pcg.stats(compiled).replays


def test_a_computed_sum_that_ends_early_is_an_error():
    function = _in_place("trailing")

    def forward(x, lengths):
        return function(x, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    compiled = _compile(forward, "piecewise", {"x": 0, "lengths": 0})
    for n in (5, 7, 3):
        _check(compiled, forward, (torch.randn(n, WIDTH), torch.tensor([2, n - 2])))
    with pytest.raises(pcg.errors.BatchError, match="slice"):
        compiled(torch.randn(5, WIDTH), torch.tensor([2, 1]))
    _check(compiled, forward, (torch.randn(5, WIDTH), torch.tensor([2, 3])))


@pytest.mark.parametrize(
    ("way", "padding"),
    [("piecewise", "auto"), ("piecewise", "request"), ("piecewise", "slice"), ("compile", "auto"), ("dynamic", "auto")],
)
def test_pages_slots_and_tokens_agree(way, padding):
    """Slots and rows have symbols of their own; there may be more page indices than pages are used."""
    function = _in_place("paged")

    def forward(x, cache, cu, kv, pages, last, slots):
        return function(x, cache, cu, kv, pages, last, slots)

    dynamic = dict.fromkeys(["x", "cu", "kv", "pages", "last", "slots"], 0)
    compiled, extra = _compile(forward, way, dynamic, padding), []
    rng = random.Random(5)
    for n in (3, 2, 6, 2, 7, 8, 9, 1, 3):
        lengths = _lengths(rng, n, rng.randint(1, 4))
        counts = [-(-length // PAGE) for length in lengths]
        kv = _cu(counts)
        used = int(kv[-1])
        pages = torch.arange(1, 1 + used + rng.choice([0, 0, 3])).int()
        slots = [int(pages[kv[r]]) * PAGE + i for r, length in enumerate(lengths) for i in range(length)]
        last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths]).int()
        cache = torch.zeros(12, PAGE, WIDTH)
        args = (torch.randn(n, WIDTH), cache, _cu(lengths), kv, pages, last, torch.tensor(slots))
        copy = cache.clone()
        want = forward(args[0], copy, *args[2:])
        SEEN.clear()
        torch.testing.assert_close(compiled(*args), want)
        torch.testing.assert_close(cache[1:], copy[1:])
        rows, end, _ = SEEN[-1]
        assert rows == end
        extra.append(rows - n)
    if way != "dynamic":  # where the features, which nothing fixes, are dynamic too
        assert any(extra) == (padding != "slice")
