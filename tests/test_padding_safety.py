"""What padding can reach: the verdict on each kind of op, and the values that follow from it."""

from __future__ import annotations

import models  # noqa: F401 - defines the silly ops
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import UnsafePadding
from pcg_compile.passes.padding_safety.dims import regroup
from pcg_compile.registry import runtimes

LIBRARY = torch.library.Library("opaque", "FRAGMENT")
for _name, _function in {
    "row": lambda x: x * 2 + 1,
    "mix": lambda x: x + x.sum(0),
    "size": lambda x: x + x.shape[0],
}.items():
    LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opaque::{_name}", lambda x: torch.empty_like(x), lib=LIBRARY)

W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
CONV = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(1))


def _fill(x, mask):
    x[mask] = 0.0
    return x


ROW_WISE = {
    "pointwise": lambda x: torch.relu(x) * 2 + x.exp(),
    "linear": lambda x: F.linear(x, W) @ W,
    "norms": lambda x: F.layer_norm(x, (4,)) + F.rms_norm(x, (4,)),
    "softmax over features": lambda x: x.softmax(-1) + x.log_softmax(1),
    "reduce features": lambda x: x.sum(1, keepdim=True) + x.amax(-1, keepdim=True) - x.var(1, keepdim=True),
    "view apart and back": lambda x: (x.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)) * 2,
    "view rows times features": lambda x: x.reshape(-1) * 3,
    "views of double size": lambda x: x.view(x.shape[0] * 2, 2) + 1,
    "arange": lambda x: x + torch.arange(x.shape[0])[:, None],
    "zeros and ones": lambda x: torch.zeros(x.size()) + x.new_ones(x.shape[0], 4) * x,
    "sort features": lambda x: x.sort(dim=-1).values + x.topk(2, dim=-1).values.sum(-1, keepdim=True),
    "gather features": lambda x: x.gather(1, x.argsort(1)),
    "one-hot scatter": lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0),
    "cat features": lambda x: torch.cat([x, x * 2], -1).chunk(2, -1)[1],
    "stack and unbind": lambda x: torch.stack([x, x + 1], 1).unbind(1)[1],
    "first row": lambda x: x[0] + x,
    "all but some": lambda x: x[1:] * 2 if x.shape[0] > 1 else x,
    "per-token quantization": lambda x: (x / x.abs().amax(-1, keepdim=True)).mul(127).round().to(torch.int8),
    "pairs": lambda x: (x[:, None, :] * W[None]).sum(-1),
    "masked by index": lambda x: _fill(x * 2, x[:, 0] > 0) + _fill(x * 3, x < 0.5),
    "the first row": lambda x: x * x[:1],
    "behind fixed rows": lambda x: torch.cat([W[:2], x])[2:] + torch.cat([x[:1], x])[:-1],
    "counting": lambda x: x[torch.arange(x.shape[0])] + torch.arange(64.0)[: x.shape[0], None],
    "masked": lambda x: x.masked_fill(x > 0, 0.0) + torch.where(x < 0, x, 1.0),
    "in place": lambda x: x.clone().add_(1).mul_(2),
    "in place on a view": lambda x: _write(x),
    "outer product of rows": lambda x: (x @ x.t()).relu(),
    "pad features": lambda x: F.pad(x, (1, 2)),
    "expand": lambda x: W[0].expand(x.shape[0], 4) * x,
    "einsum": lambda x: torch.einsum("nd,de->ne", x, W),
    "group norm": lambda x: F.group_norm(x, 2),
    "embedding": lambda x: F.embedding(x.argmax(1), W),
    "conv over features": lambda x: F.conv1d(x[:, None], CONV[:1, :1], padding=1),
}
PREFIX = {
    "cumsum": lambda x: x.cumsum(0),
    "cumulative maximum": lambda x: x.cummax(0).values,
    "causal convolution": lambda x: F.conv1d(x.t()[None], CONV, padding=2)[..., : x.shape[0]],
}
MIXING = {
    "sum": lambda x: x.sum(0),
    "mean of all": lambda x: x.mean() + x,
    "softmax over rows": lambda x: x.softmax(0),
    "last row": lambda x: x[-1] + x,
    "last rows": lambda x: x[-1:],
    "second row": lambda x: x[min(1, x.shape[0] - 1)] + 0 if x.shape[0] > 40 else x.flip(0),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "sort rows": lambda x: x.sort(0).values,
    "cumsum then last": lambda x: x.cumsum(0)[-1],
    "cat rows": lambda x: torch.cat([x, x]),
    "gram": lambda x: x.t() @ x,
    "size as a number": lambda x: x / x.shape[0],
    "mean by hand": lambda x: x.sum(0) / x.shape[0],
    "filled with the size": lambda x: x + torch.full((4,), float(1)) * x.shape[0],
    "per-tensor quantization": lambda x: (x / x.abs().max()).mul(127).round(),
    "feature-major rows": lambda x: x.t().reshape(-1),
    "scores then softmax": lambda x: (x @ x.t()).softmax(-1) @ x,
    "pad rows": lambda x: F.pad(x, (0, 0, 1, 1)),
    "random": lambda x: x + torch.rand_like(x) * 0,
    "centred convolution": lambda x: F.conv1d(x.t()[None], CONV, padding=1),
    "windows": lambda x: x.unfold(0, 2, 1).sum(-1),
    "unfold": lambda x: x.cumsum(0).flip(0),
}


def _write(x):
    y = x * 1
    y[:, 1:3].mul_(3)
    y[:, 0] = 1.5 * y[:, 1]
    return y


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run_at_all_sizes(
    function, make=lambda n: (torch.randn(n, 4),), sizes=(5, *range(17, 0, -1), *range(1, 18)), **options
):
    run = pcg.piecewise(buckets=[4, 8, 16], compiler="eager", **options)(function)
    for n in sizes:
        arguments = make(n)
        copies = [a.clone() for a in arguments]
        torch.testing.assert_close(run(*arguments), function(*copies), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(list(arguments), copies, rtol=1e-5, atol=1e-5)
    return run


def kinds(run):
    return {
        item.safety.kind for r in runtimes(run) for item in r.plan.items if hasattr(item, "piece") and item.is_piece
    }


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise(name):
    run = run_at_all_sizes(ROW_WISE[name])
    assert "mixing" not in kinds(run) and "unknown" not in kinds(run), [
        n for r in runtimes(run) for s in r.plan.items for n in s.safety.nodes
    ]
    assert pcg.stats(run).replays > 0


@pytest.mark.parametrize("name", PREFIX)
def test_prefix(name):
    run = run_at_all_sizes(PREFIX[name])
    assert kinds(run) == {"prefix"} and pcg.stats(run).replays > 0


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name):
    run = run_at_all_sizes(MIXING[name], sizes=(5, 17, 16, 4, 3, 2, 8))
    assert "mixing" in kinds(run)
    reasons = [f for f in pcg.stats(run).fallbacks if "mixing" in f.reason]
    assert reasons and all("test_padding_safety.py" in f.where or "test_padding_safety.py" in f.reason for f in reasons)


def test_strict_refuses_what_mixes():
    run = pcg.piecewise(buckets=[4], compiler="eager", strict=True)(lambda x: x.softmax(0))
    with pytest.raises(UnsafePadding, match="softmax"):
        run(torch.randn(3, 4))


@pytest.mark.parametrize(("op", "captured"), [("row", True), ("mix", False), ("size", False)])
def test_probe(op, captured):
    function = lambda x: getattr(torch.ops.opaque, op)(x + 1) * 2
    run = run_at_all_sizes(function, sizes=(4, 3, 1, 8, 5, 16))
    assert (pcg.stats(run).replays > 0) == captured
    assert captured or any("by the probe" in f.reason for f in pcg.stats(run).fallbacks)
    torch._dynamo.reset()
    strict = pcg.piecewise(buckets=[4], compiler="eager", strict=True)(function)
    with pytest.raises(UnsafePadding, match="opaque"):
        strict(torch.randn(3, 4))


def test_row_indices_count_from_the_real_size():
    def function(x, rows):
        return torch.relu(x + 1)[rows] * 2

    def make(n):
        return torch.randn(n, 4), torch.tensor([0, -1, n - 1, -n, n // 2])

    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8, 16], compiler="eager")(function)
    for n in (5, 16, 3, 1, 4, 17, 2):
        x, rows = make(n)
        before = rows.clone()
        torch.testing.assert_close(run(x, rows), function(x, rows))
        assert torch.equal(rows, before)
    assert pcg.stats(run).replays > 0


def test_rows_kept_are_a_size_of_their_own():
    def function(x, rows):
        y = torch.ops.silly.fresh(x @ W)
        return y[rows] @ W

    run = pcg.piecewise(dynamic={"x": 0, "rows": 0}, buckets=[2, 4, 8, 16], compiler="eager")(function)
    for n, k in ((5, 2), (5, 3), (16, 1), (7, 7), (3, 2), (16, 5)):
        x, rows = torch.randn(n, 4), torch.randint(-n, n, (k,))
        torch.testing.assert_close(run(x, rows), function(x, rows))
    stats = pcg.stats(run)
    assert stats.graphs == 1 and stats.captured == 3 + 6  # three sizes of x, six pairs


def test_a_caches_rows_are_not_written_by_padding():
    def function(cache, slots, x):
        cache[slots] = x * 2
        return x + 1

    run = pcg.piecewise(dynamic={"slots": 0, "x": 0}, buckets=[4, 8], compiler="eager")(function)
    ours, theirs = torch.zeros(20, 4), torch.zeros(20, 4)
    for n in (3, 5, 2, 8, 1):
        slots, x = torch.randperm(20)[:n], torch.randn(n, 4)
        torch.testing.assert_close(run(ours, slots, x), function(theirs, slots, x))
        assert torch.equal(ours, theirs)


def test_batch_and_sequence():
    norm = nn.LayerNorm(8)

    def function(x, mask):
        y = norm(F.gelu(x @ torch.ones(8, 8)))
        q = y.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None, None, :])
        return x + z.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8)

    run = pcg.piecewise(dynamic={"x": (0, 1), "mask": (0, 1)}, buckets=[2, 4, 8], compiler="eager")(function)
    for b, s in ((3, 5), (2, 8), (4, 3), (1, 4), (3, 5), (8, 2)):
        x, mask = torch.randn(b, s, 8), torch.rand(b, s) < 0.8
        mask[:, 0] = True
        torch.testing.assert_close(run(x, mask), function(x, mask), rtol=1e-5, atol=1e-5)
    # Up to 2.11 torch guards a reshape of transposed rows on a batch of one.
    most = 1 if torch.__version__ >= "2.12" else 2
    assert 1 <= pcg.stats(run).graphs <= most and pcg.stats(run).replays > 0
    assert all(isinstance(size, tuple) for size in pcg.stats(run).buckets)


def test_a_view_whose_size_is_written_otherwise():
    """``b * (m - 1)`` and ``b * m - b`` are one size; what is behind them is followed, and the search for it ends."""
    b, n = sympy.symbols("b n", integer=True, positive=True)
    frames = sympy.floor((n - 3) / 2) - 1
    shape = (sympy.Mul(b, frames, evaluate=False), 2, 3)
    assert regroup(((b,), (frames,), (6,)), shape) == ((b, frames), (2,), (3,))
