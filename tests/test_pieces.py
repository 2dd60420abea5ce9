"""Splitting and replaying: the values are eager's, and the pieces are counted."""

from __future__ import annotations

import pytest
import torch
from models import ToyLlama, calls
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import OptionsError, SplitOpNotFound

COMPILERS = ["eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    calls.clear()
    with torch.no_grad():
        yield


def piecewise(function, **options):
    options.setdefault("compiler", "eager")
    options.setdefault("buckets", [4, 8, 16])
    return pcg.piecewise(dynamic=None, **options)(function)


def same(compiled, function, make, sizes=(5, 16, 3, 4, 1, 20, 8, 2)):
    """Compiled and plain agree at every size, on arguments and on what they do to them."""
    for n in sizes:
        ours, theirs = make(n), make(n)
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
        got, want = compiled(*ours), function(*theirs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert pcg.stats(compiled).replays > 0


class Example(nn.Module):
    """9x + 19 through two attentions."""

    def forward(self, x):
        x = x + 1
        x = x + 2
        out = torch.empty_like(x)
        torch.ops.silly.attention(x, x, x, out)
        x = out - 2
        x = x - 1
        out = torch.empty_like(x)
        torch.ops.silly.attention(x, x, x, out)
        return out + 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_example_counts(compiler):
    model = Example()
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[1, 2], compiler=compiler)(model.forward)
    with pcg.expect(graphs=1, pieces=3, capturable=3, captured=6):
        run(torch.randn(100))
        calls.clear()
        assert run(torch.zeros(2)).tolist() == [19, 19]
        assert run(torch.zeros(1)).tolist() == [19]
        assert run(torch.zeros(2)).tolist() == [19, 19]
    assert len(calls) == 6
    assert {size: use.hits for size, use in pcg.stats(run).buckets.items()} == {1: 1, 2: 2}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_toy_llama(compiler):
    model = ToyLlama().eval()
    run = pcg.piecewise(dynamic={"ids": 0}, buckets=[1, 2], compiler=compiler)(model.forward)
    with pcg.expect(pieces=13, capturable=13, captured=26, graphs=1):
        for n in (100, 2, 1, 2):
            ids = torch.randint(0, 128, (n,))
            torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert pcg.stats(run).compiled <= 4


def test_two_children_under_a_plain_parent():
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)

        @pcg.piecewise(dynamic={"x": 0}, buckets=[128, 256, 512, 1024], compiler="eager")
        def forward(self, x):
            x = self.norm_1(self.first(x))
            out = torch.empty_like(x)
            torch.ops.silly.attention(x, x, x, out)
            return self.second(self.norm_2(out))

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Child(), nn.Linear(16, 16)
            self.c = Other()

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    class Other(Child):
        @pcg.piecewise(dynamic={"x": 0}, buckets=[128, 256, 512, 1024], compiler="eager")
        def forward(self, x):
            x = self.norm_1(self.first(x))
            out = torch.empty_like(x)
            torch.ops.silly.attention(x, x, x, out)
            return self.second(self.norm_2(out))

    parent = Parent()
    with pcg.expect(graphs=2, pieces=4, capturable=4):
        for n in (128, 200, 512, 1000, 1024):
            x = torch.randn(n, 16)
            want = x
            for child in (parent.a, None, parent.c):
                if child is None:
                    want = parent.b(want)
                else:
                    h = child.norm_1(child.first(want))
                    want = child.second(child.norm_2(h * 3))
            torch.testing.assert_close(parent(x), want, rtol=1e-4, atol=1e-4)


def test_two_modules_of_one_class_keep_their_own_captured_graphs():
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @pcg.piecewise(dynamic={"x": 0}, buckets=[4], compiler="eager")
        def forward(self, x):
            return torch.ops.silly.fresh(self.linear(x)) + 1

    one, other = Child(), Child()
    for n in (3, 4, 1):
        x = torch.randn(n, 4)
        for child in (one, other, one):
            torch.testing.assert_close(child(x), child.linear(x) * 2 + 2)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_copy_taken_before_an_in_place_add_stays(compiler):
    def function(x):
        s = x.clone()
        out = torch.empty_like(x)
        torch.ops.silly.attention(x, x, x, out)
        x.add_(out)
        return s

    run = piecewise(function, compiler=compiler)
    for n in (3, 8, 1, 20, 3):
        x = torch.randn(n, 4)
        before = x.clone()
        assert torch.equal(run(x), before)
        torch.testing.assert_close(x, before * 4)


def test_size_of_a_tensor_crosses_a_boundary():
    def function(x):
        s = x.size()
        x = torch.ops.silly.fresh(x.sigmoid())
        return x.clone().view(s) + 1

    same(piecewise(function), function, lambda n: (torch.randn(n, 4),))


def test_number_crosses_a_boundary():
    def function(x):
        twice = x.shape[0] * 2
        y = torch.ops.silly.fresh(x)
        return y.view(twice, -1) * 3, twice

    run = piecewise(function)
    for n in (5, 4, 1, 20):
        x = torch.randn(n, 4)
        got, twice = run(x)
        assert twice == 2 * n
        torch.testing.assert_close(got, (x * 2 + 1).view(2 * n, -1) * 3)


def test_fresh_results_slices_of_them_and_several():
    def function(x):
        a = torch.ops.silly.fresh(x + 1)[:, 1:]
        b, c = torch.ops.silly.two(a * 2)
        return b.sum(1) + c[:, 0], c * 2

    same(piecewise(function), function, lambda n: (torch.randn(n, 4),))


def test_tensor_index_after_a_mutating_op():
    def function(x, rows):
        out = torch.zeros_like(x)
        torch.ops.silly.attention(x, x, x, out)
        y = out[rows]
        return y * 2

    for sizes in ((5, 2), (8, 3), (5, 1), (17, 4)):
        run = piecewise(function)
        x, rows = torch.randn(sizes[0], 4), torch.randint(0, sizes[0], (sizes[1],))
        torch.testing.assert_close(run(x, rows), function(x, rows))


@pytest.mark.parametrize(
    "expression",
    [
        lambda x, w: torch.full(x.size(), 2.0),
        lambda x, w: w.broadcast_to(x.size()) + 0,
        lambda x, w: torch.zeros(size=x.size()) + 1,
        lambda x, w: x.new_ones(x.shape[0], 3),
        lambda x, w: x.view(x.shape[0] * 2, -1).relu(),
    ],
)
def test_sizes_as_arguments(expression):
    def function(x, w):
        y = torch.ops.silly.fresh(x)
        return expression(y, w) * 2, y

    w = torch.randn(4)
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(function)
    for n in (3, 4, 7, 1, 9):
        x = torch.randn(n, 4)
        torch.testing.assert_close(run(x, w), function(x, w))


def test_split_ops_are_named_by_packet_and_overload():
    def function(x):
        return (x * 2) + 1

    x = torch.randn(4, 4)
    for name, pieces in (("aten::add", 1), ("aten::add.Tensor", 1)):
        with pcg.expect(pieces=pieces):
            run = piecewise(function, split_ops=[name])
            torch.testing.assert_close(run(x), function(x))
    with pytest.raises(SplitOpNotFound, match="aten::add.Scalar"):
        piecewise(function, split_ops=["aten::add.Scalar"])(x)


def test_a_changed_flag_is_seen():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = False

        def forward(self, x):
            y = torch.ops.silly.fresh(x)
            return y * 2 if self.twice else y

    model = Flagged()
    run = pcg.piecewise(dynamic={"x": 0}, buckets=[4], compiler="eager")(model.forward)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x), x * 2 + 1)
    model.twice = True
    with pcg.expect(run, graphs=1):
        torch.testing.assert_close(run(x), (x * 2 + 1) * 2)


def test_break_point_inputs_across_buckets():
    def function(x):
        return torch.ops.silly.fresh(x * 3) - 1

    run = piecewise(function)
    for n in (8, 4, 8, 8, 4):
        x = torch.randn(n, 4)
        torch.testing.assert_close(run(x), x * 6)
    assert all(use.hits > 0 for use in pcg.stats(run).buckets.values())


def test_plain_torch_compile_static_then_dynamic():
    model = ToyLlama(layers=2).eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [4, 8, 16], "compiler": "eager"})
    for n in (7, 7, 5, 16, 1, 1, 30):
        ids = torch.randint(0, 128, (n,))
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)
    stats = pcg.stats(compiled)
    assert stats.graphs == 3 and stats.steps == 7 and stats.replays > 0
    pcg.reset(compiled)
    assert pcg.stats(compiled).steps == 0


def test_outputs_stay_the_callers():
    def function(x):
        return torch.ops.silly.fresh(x) + 1

    run = piecewise(function)
    x = torch.randn(4, 4)
    first = run(x)
    kept = first.clone()
    run(torch.randn(4, 4))
    assert torch.equal(first, kept)


def test_views_of_arguments_are_views():
    def function(x):
        y = x.view(-1)
        torch.ops.silly.attention(x, x, x, x)
        return y, x[1:]

    run = piecewise(function)
    for n in (4, 6):
        x = torch.ones(n, 4)
        y, tail = run(x)
        assert y.data_ptr() == x.data_ptr() and tail.data_ptr() == x[1:].data_ptr()
        assert x.tolist() == [[3] * 4] * n


@pytest.mark.parametrize("bad", [{"bucket": [1]}, {"buckets": []}, {"buckets": [-1]}, {"buckets": [4, 2]}])
def test_bad_options(bad):
    with pytest.raises(OptionsError):
        pcg.piecewise(**bad)
    with pytest.raises(OptionsError):
        torch.compile(lambda x: x + 1, backend="pcg", options=bad)(torch.ones(2))


def test_gradients_fall_back_and_are_right(caplog):
    with torch.enable_grad():
        linear = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="pcg")
        x = torch.randn(3, 4)
        linear(x).sum().backward()
    assert all(p.grad is not None for p in linear.parameters())
    fallback = pcg.stats(linear).fallbacks[0]
    assert "inference_mode" in fallback.reason and "weight" in fallback.reason


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 5, 6)])
def test_a_linear_with_bias_on_three_dimensions_keeps_its_size_dynamic(shape):
    layer = torch.nn.Linear(6, 6)

    @pcg.piecewise(dynamic={"x": 1}, buckets=[8, 16], compiler="eager")
    def function(x):
        return layer(x) + 1

    for n in (5, 9, 16, 1):
        x = torch.randn(shape[0], n, 6)
        with torch.no_grad():
            torch.testing.assert_close(function(x), layer(x) + 1)
    assert pcg.stats(function).graphs == 1 and pcg.stats(function).replays > 0


def test_numbers_that_dynamo_made_symbols_leave_a_piece_to_inductor():
    """dynamic=True makes the epsilon of a norm a symbol, which Inductor wants traced again as a constant."""
    model = nn.Sequential(nn.RMSNorm(4, eps=1e-5), nn.LayerNorm(4)).eval()
    compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [4, 8, 16]})
    same(compiled, model, lambda n: [torch.randn(n, 4)])
    assert [f.reason for f in pcg.stats(compiled).fallbacks] == ["a size is beyond the largest bucket, 16"]
