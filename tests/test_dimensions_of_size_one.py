"""Results have eager's strides in dimensions of size 1 too, whatever lays them out."""

from __future__ import annotations

import random

import models  # noqa: F401 - defines the silly ops
import pytest
import torch
from torch.nn import functional as F

import pcg_compile as pcg

WEIGHT = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_like_eager(function, makes, sizes, compiler="eager", **options):
    run = pcg.piecewise(compiler=compiler, **{"buckets": [4, 8], **options})(lambda *args: function(*args))
    for n in sizes:
        args = makes(n)
        got, want = run(*args), function(*args)
        got, want = ((value,) if isinstance(value, torch.Tensor) else value for value in (got, want))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride(), (n, tuple(ours.shape))
    return pcg.stats(run)


TOKENS = {
    "transposed": lambda x: x.t() * 2,
    "transposed and copied": lambda x: x.t().contiguous() + 1,
    "heads": lambda x: x.view(-1, 2, 2).transpose(0, 1).contiguous() * 2,
    "einsum": lambda x: torch.einsum("nd,hde->nhe", x, WEIGHT),
    "einsum to heads": lambda x: torch.einsum("nd,hde->hne", x, WEIGHT),
    "added dimensions": lambda x: (x[:, None] * 2, x[None].transpose(0, 1) + 1, x[..., None] * 3),
    "one column": lambda x: (x[:, :1] + 1, x[:, 1:2].expand(-1, 3) * 2),
    "views of the argument": lambda x: (x.t(), x[:, None], x.unsqueeze(0).transpose(1, 2)),
    "results that share memory": lambda x: (lambda y: (y, y.t(), y[:, None]))(x * 2),
    "around a split op": lambda x: (lambda y: (y.t() * 2, y[:, None].transpose(0, 1) + 1))(_attention(x)),
}


def _attention(x):
    out = torch.empty_like(x)
    torch.ops.silly.attention(x, x + 1, x, out)
    return out


@pytest.mark.parametrize("buckets", [[1, 4, 8], [4, 8]])
@pytest.mark.parametrize("name", TOKENS)
def test_one_token(name, buckets):
    stats = assert_like_eager(TOKENS[name], lambda n: (torch.randn(n, 4),), (3, 1, 5, 1), buckets=buckets)
    assert stats.replays


def test_one_token_under_inductor():
    def function(x):
        return torch.einsum("nd,hde->nhe", x, WEIGHT), x.t() * 2

    assert_like_eager(function, lambda n: (torch.randn(n, 4),), (3, 1), "inductor")


@pytest.mark.parametrize("layout", ["transposed", "columns", "one column", "one batch"])
def test_arguments_of_one_row(layout):
    makes = {
        "transposed": lambda n: torch.randn(4, n).t(),
        "columns": lambda n: torch.randn(n, 8)[:, 2:6],
        "one column": lambda n: torch.randn(n, 1, 4).transpose(1, 2),
        "one batch": lambda n: torch.randn(1, n, 4).transpose(0, 1),
    }
    assert_like_eager(lambda x: (x * 2, x.transpose(0, 1) + 1), lambda n: (makes[layout](n),), (3, 1, 5))


OPS = {
    "scale": lambda x: x * 2,
    "relu": torch.relu,
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "copy": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "swap first": lambda x: x.transpose(0, 1),
    "swap last": lambda x: x.transpose(1, 2),
    "swap ends": lambda x: x.permute(2, 1, 0),
    "add a dimension": lambda x: (x[:, None] + 1).squeeze(1),
    "own matrix": lambda x: x @ x.transpose(-1, -2) @ x,
    "first": lambda x: x[..., :1] + x,
    "sum": lambda x: x + x.sum(-1, keepdim=True),
    "flat": lambda x: x.reshape(-1).view(x.shape) if x.is_contiguous() else x,
    "like": lambda x: torch.full_like(x, 2.0) * x,
    "joined": lambda x: torch.cat([x, x], -1)[..., ::2],
    "between": lambda x: torch.ops.silly.fresh(x.reshape(-1, 4)).view(x.shape) if x.is_contiguous() else x,
}
SHAPES = [lambda n: (n, 1, 4), lambda n: (1, n, 4), lambda n: (n, 3, 4), lambda n: (3, n, 4), lambda n: (1, 1, 4 * n)]


@pytest.mark.parametrize("seed", range(24))
def test_random_ops(seed):
    """Every result of a chain of ops is returned, at sizes that make ones of one dimension or of several."""
    draw = random.Random(seed)
    names = [draw.choice(sorted(OPS)) for _ in range(draw.randint(2, 5))]
    shape = draw.choice(SHAPES)

    def function(x):
        values = []
        for name in names:
            x = OPS[name](x)
            values.append(x)
        return values

    assert_like_eager(function, lambda n: (torch.randn(shape(n)),), (3, 1, 5, 1, 7, 2), buckets=[1, 4, 8])


def test_a_step_does_not_run_twice_for_its_strides():
    """Weights, arguments and random numbers are as after one eager step, and opaque ops are called once a step."""

    def function(x, seen):
        seen.add_(x.sum(0))
        return (x.t() * torch.rand(1)).contiguous()

    run = pcg.piecewise(compiler="eager", buckets=[4])(function)
    ours, theirs = torch.zeros(4), torch.zeros(4)
    for n in (2, 1, 1):
        x = torch.randn(n, 4)
        torch.manual_seed(n)
        got, after = run(x, ours), torch.get_rng_state()
        torch.manual_seed(n)
        want = function(x, theirs)
        torch.testing.assert_close((got, ours), (want, theirs))
        assert torch.equal(after, torch.get_rng_state())


def test_what_stands_for_a_large_cache_takes_no_memory(monkeypatch):
    """The strides of a result beside a cache that is written are those of fake tensors, not worth a second cache."""
    sizes, real = [], torch.empty_strided

    def empty_strided(shape, *args, **kwargs):
        made = real(shape, *args, **kwargs)
        if type(made) is torch.Tensor and made.device.type != "meta":
            sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    cache, wanted = torch.zeros(1 << 18, 128), 0

    def function(x, cache):
        cache.add_(1)
        return x.t() * cache[0, 0]

    run = pcg.piecewise(compiler="eager", buckets=[4], dynamic={"x": 0})(function)
    for n in (3, 1, 1):
        x, wanted = torch.randn(n, 4), wanted + 1
        torch.testing.assert_close(run(x, cache), x.t() * wanted)
    assert pcg.stats(run).replays == 3 and max(sizes, default=0) < cache.numel()
