"""Functions whose padding once reached real rows, or well might: values are eager's at every size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pcg_compile as pcg

TABLE = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
SIZES = [5, 3, 8, 1, 9, 2, 12, 10, 4]


def tokens(n):
    return (torch.randn(n, 4),)


def with_index(n, low, high, *shape):
    return torch.randn(n, 4), torch.randint(low, high, shape)


@torch.library.custom_op("adversarial_padding::above_mean_kind", mutates_args=())
def above_mean_kind(kind: torch.Tensor) -> torch.Tensor:
    """Depends on the largest kind of all rows, which rows drawn from the real ones never change."""
    return kind * 2 // (kind.max() + 1)


above_mean_kind.register_fake(torch.empty_like)

#: What mixes rows, and once went unseen: (function, arguments for n tokens).
MIXING = {
    "training batch norm": (lambda x: F.batch_norm(x, None, None, training=True), lambda n: tokens(n + 1)),
    "instance norm": (lambda x: F.instance_norm(x.t()[None]), lambda n: tokens(n + 1)),
    "entries from the end": (lambda x, i: x.take(i) + 1, lambda n: with_index(n, -n if n < 5 else 0, n, 3)),
    "fewer rows of an index": (
        lambda x, i: (x * 1).scatter(1, i, 9.0) + 1,
        lambda n: (torch.randn(n + 3, 4), torch.randint(0, 4, (n, 2))),
    ),
    "a kernel of tokens": (
        lambda x: F.conv1d(TABLE.t()[None], x.t()[None].expand(4, 4, -1), padding=x.shape[0]),
        tokens,
    ),
    "a random number below n": (lambda x: torch.randint(0, x.shape[0], (3,)) + x[0, 0], tokens),
    "members of a set of tokens": (
        lambda i: torch.isin(torch.arange(6), i) * 1,
        lambda n: (torch.randint(0, 6, (n,)),),
    ),
    "a largest integer": (above_mean_kind, lambda n: (torch.randint(0, n + 2, (n,)),)),
    "bags of tokens": (
        lambda i: F.embedding_bag(i, TABLE, torch.tensor([0, 1]), mode="max"),
        lambda n: (torch.randint(0, 12, (n + 1,)),),
    ),
}  # fmt: skip
#: What pads where no real row looks.
RECORDED = {
    "as many rows of an index": (lambda x: (x * 1).scatter(1, x.argsort(1)[:, :2], 9.0) + 1, tokens),
    "complex numbers": (
        lambda x, f: torch.view_as_real(torch.view_as_complex(x.view(-1, 2, 2)) * f[:, None]).flatten(1),
        lambda n: (torch.randn(n, 4), torch.polar(torch.ones(n), torch.arange(n).float())),
    ),
    "one memory, two dtypes": (lambda x: (lambda y: (y, y.view(torch.int32), y.view(torch.int32)[1:]))(x * 2), tokens),
    "integer product": (
        lambda x: torch._int_mm(x.to(torch.int8), torch.ones(4, 8, dtype=torch.int8)),
        lambda n: (torch.randn(n, 4) * 20,),
    ),
}  # fmt: skip


def run_as_eager(function, make, sizes=SIZES, **options):
    torch._dynamo.reset()
    run = pcg.piecewise(buckets=[4, 8, 16], compiler="eager", **options)(function)
    with torch.no_grad():
        for n in sizes:
            torch.manual_seed(n)
            arguments = make(n)
            torch.manual_seed(1)
            want = function(*arguments)
            torch.manual_seed(1)
            torch.testing.assert_close(run(*arguments), want, rtol=1e-5, atol=1e-5)
    return pcg.stats(run)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_not_recorded(name):
    stats = run_as_eager(*MIXING[name])
    assert stats.replays == 0 and sum(f.count for f in stats.fallbacks) >= stats.steps


@pytest.mark.parametrize("name", RECORDED)
def test_what_does_not_is(name):
    stats = run_as_eager(*RECORDED[name])
    assert stats.replays > 5 and stats.fallbacks == ()


def test_index_select_has_no_negative_rows():
    """Where ``x[rows]`` has: a row of -1 is the error that eager raises, also at a bucket."""

    def select(x, rows):
        return (x * 2).index_select(0, rows) + 1

    torch._dynamo.reset()
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(select)
    with torch.no_grad():
        for n in (3, 4, 3):
            x = torch.randn(n, 4)
            assert torch.equal(run(x, torch.tensor([0, n - 1])), select(x, torch.tensor([0, n - 1])))
            for row in (-1, n):
                with pytest.raises(IndexError):
                    run(x, torch.tensor([0, row]))
    assert pcg.stats(run).replays >= 3
