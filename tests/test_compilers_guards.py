"""What Inductor assumes of sizes while it compiles a piece is the piece's own affair: nothing is compiled again."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

import pcg_compile as pcg


class Heads(nn.Module):
    """Rows in heads, as attention wants them. Inductor lays out the last view for two rows or more."""

    def __init__(self, mixing=False):
        super().__init__()
        self.project, self.mixing = nn.Linear(64, 64), mixing

    def forward(self, x):
        y = self.project(x).view(1, x.shape[1], 4, 16).transpose(1, 2)
        if self.mixing:
            # No bucket can serve this.
            y = y + y.mean(2, keepdim=True)
        return y[0].transpose(0, 1) * 2


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)


def rows(n):
    return torch.randn(1, n, 64)


@pytest.mark.parametrize("first", [30, 1])
@pytest.mark.parametrize("guards", ["dynamo", "inputs"])
def test_one_row_is_no_second_graph(guards, first):
    model = Heads().eval()
    compiled = pcg.piecewise(dynamic={"x": 1}, guards=guards)(model.forward)
    with torch.no_grad():
        for n in (first, 1, 30, 7, 1):
            x = rows(n)
            torch.testing.assert_close(compiled(x), model(x))
    stats = pcg.stats(compiled)
    assert stats.graphs == 1 and stats.steps == 5 and stats.fallbacks == ()


def test_warmup_serves_one_row():
    model = Heads().eval()
    compiled = torch.compile(model, backend="pcg", options={"buckets": [1, 2, 32]})
    x = rows(30)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    with torch.no_grad():
        pcg.warmup(compiled, x, progress=False)
        with pcg.expect(compiled, graphs=0, captured=0):
            for n in (1, 30, 2, 1):
                x = rows(n)
                torch.testing.assert_close(compiled(x), model(x))
    assert pcg.stats(compiled).fallbacks == ()


def test_code_for_other_sizes_is_not_run(monkeypatch):
    """An exact run of one row, where the compiler relies on two: eager, and counted."""

    def relies_on_two(gm, inputs):
        rows = next(value for value in inputs if isinstance(value, torch.SymInt))
        assert rows > 1

        def run(*args):
            assert args[0] > 1
            return gm(*args)

        return run

    model = Heads(mixing=True).eval()
    compiled = pcg.piecewise(dynamic={"x": 1}, compiler=relies_on_two)(model.forward)
    with torch.no_grad():
        for n in (30, 1, 7, 1):
            x = rows(n)
            torch.testing.assert_close(compiled(x), model(x))
    stats = pcg.stats(compiled)
    (found,) = [f for f in stats.fallbacks if "a piece runs eagerly: it was compiled for" in f.reason]
    assert found.count == 2 and stats.graphs == 1 and stats.steps == 4


@pytest.mark.parametrize("test", [lambda n: int(n) == n, lambda n: n < 20, lambda n: n % 2 == 0])
def test_a_compiler_for_some_sizes_is_asked_again(test):
    """What many sizes do not satisfy stays Dynamo's guard."""
    asked = []

    def for_some_sizes(gm, inputs):
        asked.append([bool(test(value)) for value in inputs if isinstance(value, torch.SymInt)])
        return gm

    model = Heads().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": for_some_sizes}, dynamic=True)
    with torch.no_grad():
        for n in (30, 7, 30, 14, 7):
            x = rows(n)
            torch.testing.assert_close(compiled(x), model(x))
    stats = pcg.stats(compiled)
    assert stats.graphs >= 2 and len(asked) == stats.graphs and stats.replays > 0


class Scaled(nn.Module):
    """A product of weights, which a compiler may compute ahead of time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(257, 131))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * 2 + 1).relu()


@pytest.mark.parametrize("freezing", [False, True])
def test_no_second_copy_of_weights(freezing, caplog):
    model, x = Scaled().eval(), torch.randn(7, 131)

    def storages():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        large = [t for t in tensors if not is_fake(t) and t.device.type == "cpu" and t.numel() >= 257 * 131]
        return {t.untyped_storage().data_ptr() for t in large}

    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        before = storages()
        compiled = torch.compile(model, backend="pcg", dynamic=True, options={"buckets": [8]})
        torch.testing.assert_close(compiled(x), model(x))
        assert storages() == before
        model.weight.data = model.weight.data + 1
        torch.testing.assert_close(compiled(x), model(x))
        assert pcg.stats(compiled).fallbacks == () and torch._inductor.config.freezing == freezing
    assert sum("freezing" in record.message for record in caplog.records) == freezing


class OnlyOneRow(nn.Module):
    """Products behind attention, whose trace with one row holds for one row alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(torch.tanh(x)).chunk(3, -1)
            x = x + self.out(torch.sigmoid(nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]))
        return x.relu()


class FewRows(nn.Module):
    """A branch that is traced for a range of sizes, with a product in it."""

    def __init__(self, most):
        super().__init__()
        torch.manual_seed(0)
        self.most, self.one, self.two = most, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        if x.shape[0] <= self.most:
            return torch.tanh(x + self.one(torch.sigmoid(x)))
        return self.two(x)


class Shared(nn.Module):
    """Two arguments over one memory: their sizes can't be shown as others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, y):
        return torch.tanh(x + self.one(torch.sigmoid(x))) + self.two(torch.sigmoid(y))


@torch.no_grad()
@pytest.mark.parametrize("make", [OnlyOneRow, lambda: FewRows(1), lambda: FewRows(3), lambda: FewRows(12), Shared])
def test_a_first_call_with_one_row(make):
    """Inductor must not be told of a symbol that is 1: it computed products of one row from memory beside them."""
    torch._dynamo.reset()
    model = make().eval()
    names = ("x", "y") if isinstance(model, Shared) else ("x",)
    compiled = pcg.piecewise(dynamic=dict.fromkeys(names, 0), buckets=[2, 8, 20])(model.forward)
    for n in (1, 1, 5, 2, 1, 3, 12, 13, 20):
        x = torch.randn(n, 16)
        args = (x, x.view_as(x)) if len(names) == 2 else (x,)
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("assumes", "used"), [(lambda n: n >= 4, {8, 16}), (lambda n: n == 16, {16})])
def test_what_a_compiler_assumes_of_sizes_that_it_was_only_shown(assumes, used):
    """A first call with one row; Dynamo takes a guard that its own call breaks for a bug of its own."""
    torch._dynamo.reset()
    asked = []

    def compiler(gm, inputs):
        asked.extend(bool(assumes(x.shape[0])) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2)
        return gm.forward

    def model(x):
        return torch.relu(x @ torch.ones(4, 4))

    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[2, 8, 16], compiler=compiler)(model)
    for n in (1, 2, 8, 1, 16):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))
    assert asked and all(asked)
    stats = pcg.stats(compiled)
    assert stats.graphs == 1 and set(stats.buckets) == used and not stats.fallbacks
