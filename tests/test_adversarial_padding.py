"""Functions whose padding once reached real rows, or well might: values are eager's at every size."""

from __future__ import annotations

import models  # noqa: F401 - defines the silly ops
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
    "rolled by n": (lambda x: x.roll(x.shape[0], 1) + 1, tokens),
    "n looked for": (lambda x: x + torch.searchsorted(torch.arange(20.0), x.shape[0]), tokens),
    "added n times": (
        lambda x: x + torch.zeros(4).index_add(0, x[:1].argmax(1), torch.ones(1), alpha=x.shape[0]),
        tokens,
    ),
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
CAPTURED = {
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
def test_what_mixes_is_not_captured(name):
    stats = run_as_eager(*MIXING[name])
    assert stats.replays == 0 and sum(f.count for f in stats.fallbacks) >= stats.steps


@pytest.mark.parametrize("name", CAPTURED)
def test_what_does_not_is(name):
    stats = run_as_eager(*CAPTURED[name])
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


def test_an_index_of_as_many_rows_or_of_fewer():
    """Which of the two it is only the step's sizes tell."""
    sizes = [5, 3, 8, 4, 16, 2]
    write = lambda x, i: (x * 1).scatter(1, i, 9.0) + 1
    assert run_as_eager(write, lambda n: (torch.randn(n, 4), torch.randint(0, 4, (n, 2))), sizes).replays == 6
    stats = run_as_eager(write, lambda n: (torch.randn(n, 4), torch.randint(0, 4, (n - 1, 2))), sizes)
    assert stats.replays == 0 and [f.count for f in stats.fallbacks] == [6]


def test_pieces_of_equal_structure_count_rows_of_their_own():
    """Two towers of different sizes share one piece's code and verdict, not the names of its sizes."""

    def towers(x, y, i, j):
        tail = lambda hidden, rows: torch.ops.silly.fresh(torch.ops.silly.fresh(hidden)[rows] * 2)
        return tail(x, i), tail(y, j)

    torch._dynamo.reset()
    run = pcg.piecewise(dynamic={"x": 0, "y": 0}, buckets=[4, 8, 16], compiler="eager")(towers)
    with torch.no_grad():
        for n, m in ((3, 7), (7, 2), (1, 16), (12, 5), (3, 7)):
            i, j = torch.tensor([-1, 0, -n]), torch.tensor([-m, m - 1, -1])
            x, y = torch.randn(n, 4), torch.randn(m, 4)
            torch.testing.assert_close(run(x, y, i, j), towers(x, y, i, j))
    assert pcg.stats(run).replays == 10 and pcg.stats(run).fallbacks == ()


#: Indices that padding may lead astray: (function, arguments for n tokens, whether a bucket of 16 serves).
REACHING = {
    "positions": (lambda x: x + F.embedding(torch.arange(x.shape[0]), TABLE), tokens, False),
    "shifted positions": (lambda x: x + TABLE[torch.arange(-3, x.shape[0] - 3)], tokens, False),
    "counted ones": (
        lambda x: x + F.embedding(torch.ones(x.shape[0], dtype=torch.long).cumsum(0) - 1, TABLE),
        tokens,
        False,
    ),
    "positions around": (lambda x: x + F.embedding(torch.arange(x.shape[0]) % 12, TABLE), tokens, True),
    "the largest of sums": (lambda x: F.embedding(x.cumsum(0).argmax(1), TABLE), tokens, True),
    "from one": (lambda i: F.embedding(i - 1, TABLE), lambda n: (torch.randint(1, 13, (n, 2)),), True),
    "differences": (
        lambda i, j: F.embedding(i - j, TABLE),
        lambda n: (torch.arange(n) + 50, torch.arange(n) + 50 - torch.randint(0, 12, (n,))),
        True,
    ),
}


@pytest.mark.parametrize("name", REACHING)
def test_no_index_leaves_its_table(name):
    """On a GPU one that does is fatal, not an error: it is never tried."""
    function, make, fits = REACHING[name]
    stats = run_as_eager(function, make, sizes=[1, 3, 12, 9, 2, 7, 10, 11, 4])
    assert (16 in stats.buckets) == fits and stats.replays >= (9 if fits else 5)
    assert all("leave" in f.reason for f in stats.fallbacks) and bool(stats.fallbacks) != fits


def test_an_index_that_counts_data_is_not_captured():
    stats = run_as_eager(lambda m: F.embedding(12 - m.cumsum(0), TABLE), lambda n: (torch.ones(n, dtype=torch.long),))
    assert stats.replays == 0 and "counts on through the padding" in stats.fallbacks[0].reason
