"""Inputs that are slices, transposes or expansions of other tensors, and the strides of outputs."""

import pytest
import torch

import pcg_compile as pcg

SIZES = (3, 5, 4, 1, 8, 7)


INPUTS = {
    "columns": lambda n, w: torch.randn(n, 8 + w)[:, :6],
    "later columns": lambda n, w: torch.randn(n, 8 + w)[:, w % 3 : w % 3 + 6],
    "one of several": lambda n, w: torch.randn(n, 2 + w, 6)[:, w % 2],
    "every other": lambda n, w: torch.randn(2 * n, 6)[::2],
    "every few": lambda n, w: torch.randn((1 + w) * n, 6)[:: 1 + w],
    "transposed": lambda n, w: torch.randn(6, n).T,
    "part of transposed": lambda n, w: torch.randn(6, n + w)[:, w:].T,
    "heads first": lambda n, w: torch.randn(n, 2, 3).transpose(0, 1).transpose(0, 1).flatten(1),
    "rows from": lambda n, w: torch.randn(n + w, 6)[w:],
    "expanded": lambda n, w: torch.randn(n, 1).expand(n, 6),
    "expanded rows": lambda n, w: torch.randn(1, 6).expand(n, 6),
    "one and one": lambda n, w: torch.randn(1, n, 1, 6)[0, :, 0],
}


def _rowwise(x):
    y = x * 2 + 1
    return y, y.softmax(-1), torch.empty_like(x).copy_(x) - 1


def _views(x):
    y = x.relu()
    return y[:, None], y.unflatten(-1, (2, 3)), y.unflatten(-1, (2, 3)).transpose(1, 2) * 2, y[:, 1:4] + 0


def _linear(x):
    return x @ torch.full((6, 4), 0.5, dtype=x.dtype), x.clone(), x.contiguous() + 1


def _same(got, want):
    """Values, and strides in dimensions of more than one: of others, fake tensors and CPU kernels differ in PyTorch."""
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
        ones = [size == 1 for size in theirs.shape]
        strides = zip(ones, mine.stride(), theirs.stride(), strict=True)
        assert all(one or a == b for one, a, b in strides), (mine.shape, mine.stride(), theirs.stride())


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", INPUTS)
def test_strides_are_no_sizes(kind):
    """Whatever the stride, and however it changes: eager's values and strides, from a bucket."""

    def function(x):
        return *_rowwise(x), *_views(x), *_linear(x)

    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    for i, n in enumerate((*SIZES, 5, 3)):
        x = INPUTS[kind](n, 1 + i * 5 % 7)
        _same(compiled(x), function(x))
    stats = pcg.stats(compiled)
    assert stats.replays
    assert not stats.fallbacks


def test_a_captured_graph_serves_all_strides():
    compiled = torch.compile(lambda x: x * 2, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    for width in range(12, 40, 3):
        x = torch.randn(5 + width % 3, width)[:, :6]
        torch.testing.assert_close(compiled(x), x * 2)
    assert pcg.stats(compiled).captured <= 2  # one of the first, static, graph


def test_a_stride_used_as_a_number_is_the_steps_own():
    compiled = torch.compile(lambda x: x + x.stride(0), backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    for n, width in ((3, 9), (5, 20), (4, 13), (5, 17)):
        x = torch.zeros(n, width)[:, :6]
        torch.testing.assert_close(compiled(x), x + width)


def test_writes_reach_a_slice_and_nothing_beside_it():
    def write(x):
        x.mul_(2)
        return x.sum(-1)

    compiled = torch.compile(write, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    for n, width in ((3, 9), (5, 20), (4, 13), (5, 17), (7, 11)):
        mine = torch.randn(n, width)
        theirs = mine.clone()
        torch.testing.assert_close(compiled(mine[:, 1:7]), write(theirs[:, 1:7]))
        torch.testing.assert_close(mine, theirs)


def test_a_returned_view_has_the_strides_of_the_argument():
    compiled = torch.compile(lambda x: (x[:, 1:3], x + 1), backend="pcg", options={"compiler": "eager", "buckets": [8]})
    for n, width in ((3, 9), (5, 20), (4, 13), (5, 17)):
        x = torch.randn(n, width)[:, 2:8]
        view, _ = compiled(x)
        assert view.data_ptr() == x[:, 1:3].data_ptr()
        assert view.stride() == (width, 1)


def test_dimensions_of_size_one_have_eagers_strides():
    def forward(x):
        y = x + 1
        return y, y.transpose(0, 1), (x * 2)[:, None], y.transpose(1, 2).contiguous(), y.sum(-1, keepdim=True)

    options = {"compiler": "eager", "buckets": [4, 8, 16]}
    compiled = torch.compile(forward, backend="pcg", dynamic=True, options=options)
    for n in (3, 5, 4, 9, 16, 8, 11):
        x = torch.randn(1, n, 3)
        want = forward(x)
        for mine, theirs in zip(compiled(x), want, strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride(), theirs.shape


def test_batches_of_one_behind_a_graph_break_are_replayed():
    def forward(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    compiled = torch.compile(forward, backend="pcg", options={"compiler": "eager"})
    for n in (30, 50, 60, 120, 200):
        x = torch.randn(1, n, 8)
        torch.testing.assert_close(compiled(x), forward(x))
    assert not pcg.stats(compiled).fallbacks


def test_a_layout_that_would_overlap_runs_exactly():
    """A size that no bucket is chosen for is a stride of another input: at a bucket its rows would share memory."""

    def forward(x, y):
        return x.sum(0), y * 2

    compiled = torch.compile(forward, backend="pcg", dynamic=True, options={"compiler": "eager", "buckets": [4, 8, 16]})
    for n, k in ((7, 5), (9, 6), (6, 3), (11, 9)):
        x, y = torch.randn(n, 6), torch.randn(6, n)[:, :k].T
        got, want = compiled(x, y), forward(x, y)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "rows", [lambda n: torch.randn(n + 1, 4).unfold(0, 2, 1), lambda n: torch.randn(n + 4).as_strided((n, 4), (1, 1))]
)
def test_rows_that_share_memory_run_exactly(rows):
    """Padding would lie where the last real rows do."""
    compiled = torch.compile(lambda x: x.tanh() * 2, backend="pcg", options={"compiler": "eager", "buckets": [8, 16]})
    for n in (5, 12, 8, 3):
        x = rows(n)
        torch.testing.assert_close(compiled(x), x.tanh() * 2)
    assert any("its rows share memory" in fallback.reason for fallback in pcg.stats(compiled).fallbacks)


def test_windows_inside_a_row_are_replayed():
    """Entries of one row that share memory have the same padding."""
    compiled = torch.compile(lambda x: x.tanh() * 2, backend="pcg", options={"compiler": "eager", "buckets": [8, 16]})
    for n in (5, 12, 8, 3):
        x = torch.randn(n, 6).unfold(1, 3, 1)
        torch.testing.assert_close(compiled(x), x.tanh() * 2)
    assert pcg.stats(compiled).replays
