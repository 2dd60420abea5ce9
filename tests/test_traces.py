"""What a trace makes: floats that change, weights as attributes, one graph for all sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8, 64]}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled_in(way, function, **dynamic):
    if way == "piecewise":
        return pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(function)
    return torch.compile(function, backend="pcg", options=OPTIONS, **dynamic)


FLOATS = {
    "factor": lambda x, s: x.sin() * s + 1,
    "divisor": lambda x, s: (x / (s + 0.5)).softmax(-1),
    "in place": lambda x, s: x.clone().mul_(s).add_(x, alpha=s),
    "keyword": lambda x, s: F.leaky_relu(x, negative_slope=s) + F.elu(x, alpha=s),
    "computed": lambda x, s: x * (s * 2 + 1) ** 2 - x.clamp(max=s / 3),
    "filled": lambda x, s: torch.where(x > s, x, torch.full_like(x, s)).cumsum(-1),
    "several results": lambda x, s: torch.stack((x * s, x)).unbind(0)[0].relu(),
    "a branch": lambda x, s: x * s if s > 1.7 else x - s,
}


@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_that_changes_is_data(name, way):
    """The op that reads it runs between pieces, counted; what is around it is captured."""
    function = FLOATS[name]
    run = compiled_in(way, function)
    values = [0.5 + 0.25 * i for i in range(20)]
    for value in values:
        x = torch.randn(3, 6)
        torch.testing.assert_close(run(x.clone(), value), function(x, value))
    stats = pcg.stats(run)
    assert stats.graphs <= (4 if name == "a branch" else 2) and stats.steps == 20
    assert any("a float that changes" in fallback.reason for fallback in stats.fallbacks)
    assert sum(fallback.count for fallback in stats.fallbacks) >= 18


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.eps = nn.Linear(4, 4), 0.0, 1e-5

    def forward(self, x):
        return F.layer_norm(self.layer(x) * self.scale, (4,), eps=self.eps)


@pytest.mark.parametrize("dynamic", [None, True])
def test_only_the_floats_of_a_module_that_change_are_data(dynamic):
    model = Scaled()
    run = compiled_in("torch.compile", model, dynamic=dynamic)
    for i in range(12):
        model.scale = 1 + i / 2
        for n in (3, 5):
            x = torch.randn(n, 4)
            torch.testing.assert_close(run(x), model(x))
    stats = pcg.stats(run)
    assert stats.graphs <= 4 and stats.replays > 0
    assert {fallback.reason.partition(":")[0] for fallback in stats.fallbacks} == {"between pieces"}
    assert len(stats.fallbacks) == 1 and "a float that changes" in stats.fallbacks[0].reason


def test_a_changing_float_writes_nothing_under_strict():
    def function(x, s):
        x.add_(1)
        return x * s

    run = torch.compile(function, backend="pcg", options={**OPTIONS, "strict": True})
    x = torch.zeros(3, 4)
    run(x, 0.5)
    for value in (1.5, 2.5):
        with pytest.raises(pcg.errors.PCGError, match="a float that changes"):
            run(x, value)
    assert x.eq(1).all()


class Weights(nn.Module):
    """Weights at several depths, a shared one, a buffer that is read, and one that is written."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2)])
        self.tied = self.layers[0][0]
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        self.seen.add_(1)
        for layer in self.layers:
            x = layer(x).relu()
        branch = torch.cond(x.shape[0] > 100, lambda y: y + 1, lambda y: y - 1, (x,))
        return self.tied(branch) + self.shift


@pytest.mark.parametrize("setting", ["install_free_tensors", "prepare_freezing"])
@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
def test_weights_may_be_attributes_of_the_graph(setting, way):
    ours, theirs = Weights().eval(), Weights().eval()
    theirs.load_state_dict(ours.state_dict())
    run = compiled_in(way, ours if way == "torch.compile" else ours.forward)
    with torch._dynamo.config.patch({setting: True}):
        for n in (3, 5, 4, 3):
            x = torch.randn(n, 6)
            torch.testing.assert_close(run(x), theirs(x))
    torch.testing.assert_close(ours.seen, theirs.seen)
    stats = pcg.stats(run)
    assert stats.replays > 0
    with torch.no_grad():
        for model in (ours, theirs):
            model.shift.fill_(3)
            model.tied.weight.mul_(2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(run(x), theirs(x))


VIEWS = {
    "heads of a fused layer": lambda x: torch.cat([p.view(-1, 2, 4).flip(1) for p in x.split([8, 16, 8], -1)[::2]], -1),
    "reshape of a slice": lambda x: x[:, 4:20].reshape(-1, 2, 8).sum(-1),
    "chunks that are flattened": lambda x: x.chunk(2, -1)[1].unflatten(-1, (4, 4)).transpose(1, 2).contiguous(),
    "columns": lambda x: x.unbind(-1)[3] * 2,
    "strided": lambda x: x[:, ::2].view(-1, 4, 4).mean(1),
}


@pytest.mark.parametrize("order", [(1, 7, 40), (40, 1, 2), (0, 5, 1)])
@pytest.mark.parametrize("name", VIEWS)
def test_one_graph_lays_views_out_for_all_sizes(name, order):
    function = VIEWS[name]
    run = compiled_in("piecewise", lambda x: function(x * 2) + 1)
    for n in (*order, *order):
        x = torch.randn(n, 32)
        torch.testing.assert_close(run(x), function(x * 2) + 1)
    stats = pcg.stats(run)
    assert stats.graphs == (2 if 0 in order else 1)
    assert not stats.fallbacks


BRANCHES = {
    "on one row": lambda x: x * 2 if x.shape[0] == 1 else x - 1,
    "on few rows": lambda x: x * 2 if x.shape[0] < 6 else x - 1,
    "squeeze": lambda x: x.squeeze(0) * 2,
    "an index": lambda x: x[4] if x.shape[0] > 4 else x[0],
    "without an op": lambda x: x if x.shape[0] == 1 else None,
    "a number": lambda x: (x + 1, x.shape[0]),
    "contiguous": lambda x: x.t().is_contiguous(),
    "broadcast": lambda x: x + torch.ones(1, 4),
}
#: torch takes the symbol of a size for positive, and drops these branches without a guard.
BRANCHES_ON_NO_ROWS = {
    "a size": lambda x: x.mean(0) if x.shape[0] else torch.full((4,), 7.0),
    "equal": lambda x: torch.full((4,), 7.0) if x.shape[0] == 0 else x.mean(0),
    "elements": lambda x: x.mean(0) if x.numel() else torch.full((4,), 7.0),
    "length": lambda x: {"some": len(x) > 0, "x": x * 2},
    "another shape": lambda x: x * 2 if x.size(0) else torch.ones(1, 4),
    "a loop": lambda x: [x[i] * 2 for i in range(min(x.shape[0], 2))],
    "a logarithm": lambda x: x.sum() + math.log(x.shape[0] + 1),
    "a set": lambda x: (sorted({1, x.shape[0]}), x + 1),
    "a computed size": lambda x: x[1:].sum() if x[1:].shape[0] else x.sum() * 3,
}


@pytest.mark.parametrize("order", [(0, 4, 1, 5), (5, 1, 0, 4)])
@pytest.mark.parametrize("guards", ["dynamo", "inputs"])
@pytest.mark.parametrize("name", BRANCHES_ON_NO_ROWS)
def test_what_code_does_without_rows_stays_its_own(name, guards, order):
    function = BRANCHES_ON_NO_ROWS[name]
    run = pcg.piecewise(guards=guards, **OPTIONS)(lambda x: function(x))
    for n in (*order, *order):
        for x in (torch.randn(n, 4), torch.randn(n, 8)[:, ::2]):
            got, want = run(x), function(x)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", [(1, 7, 3), (7, 1, 3)])
@pytest.mark.parametrize("name", BRANCHES)
def test_what_code_does_at_one_row_stays_its_own(name, order):
    """The trace of a first call of one row is shown more rows, and must not be used where the code asks."""
    function = BRANCHES[name]
    run = compiled_in("piecewise", lambda x: function(x))
    for n in (*order, *order):
        x = torch.randn(n, 4)
        got, want = run(x), function(x)
        torch.testing.assert_close(got, want)


def test_rows_that_must_match_an_argument_that_is_not_dynamic():
    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x, y: torch.cat((x, y), 1) * 2)
    for n in (1, 1, 3):
        x, y = torch.randn(n, 4), torch.randn(n, 2)
        torch.testing.assert_close(run(x, y), torch.cat((x, y), 1) * 2)
    assert pcg.stats(run).graphs == 2


@pytest.mark.parametrize("layout", ["transposed", "slice of columns", "expanded", "in a dict"])
def test_a_first_row_of_any_layout(layout):
    make = {
        "transposed": lambda n: torch.randn(4, n).t(),
        "slice of columns": lambda n: torch.randn(n, 9)[:, 2:6],
        "expanded": lambda n: torch.randn(1, 4).expand(n, 4),
        "in a dict": lambda n: torch.randn(n, 4),
    }[layout]
    wrap = (lambda t: {"a": [t], "b": 3}) if layout == "in a dict" else lambda t: t
    function = (lambda x: x["a"][0] * x["b"]) if layout == "in a dict" else lambda x: x * 3
    run = compiled_in("piecewise", function)
    for n in (1, 5, 1, 2):
        x = make(n)
        torch.testing.assert_close(run(wrap(x)), x * 3)
        assert not any("_dynamo_" in name for name in vars(x))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 32), nn.Linear(16, 16)
        self.attention = pcg.PagedAttention(0, 4, 2, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).split([16, 8, 8], -1)
        return x + self.out(self.attention(q.view(-1, 4, 4), k.view(-1, 2, 4), v.view(-1, 2, 4)).reshape(-1, 16))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("order", [(40, 1, 7, 1, 2), (1, 7, 40, 1), (7, 1, 40, 2, 1), (16, 16, 1, 4)])
def test_a_step_says_which_size_is_the_tokens(order, dynamic):
    model = Attends().eval()
    run = compiled_in("torch.compile", model, dynamic=dynamic)
    cache = pcg.PagedKVCache(1, 16, 16, num_kv_heads=2, head_dim=4)
    for n in order:
        batch, x = pcg.Batch([n], [n], [[1 + i for i in range(-(-n // 16))]]), torch.randn(n, 16)
        with pcg.step(batch, cache):
            got = run(x)
        with pcg.step(batch, cache):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
        assert not any("_dynamo_" in name for name in vars(x))
    stats = pcg.stats(run)
    assert stats.graphs <= 2 and not stats.fallbacks and stats.steps == len(order)


class Softened(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.layer = scale, torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.softplus(self.layer(x) * self.scale, self.scale) + self.scale


def test_inductor_takes_floats_that_differ_between_models():
    """Dynamo takes the second model's float for one that changes; what Inductor cannot compile then is counted."""
    torch._dynamo.reset()
    with torch.no_grad():
        for scale in (0.5, 0.7):
            model = Softened(scale)
            compiled = torch.compile(model, backend="pcg", options={"buckets": [4, 8]})
            for n in (3, 5):
                x = torch.randn(n, 4)
                torch.testing.assert_close(compiled(x), model(x))
            stats = pcg.stats(compiled)
            assert stats.graphs <= 2 and stats.replays + sum(one.count for one in stats.fallbacks) >= 2, stats


@pytest.mark.parametrize("guards", ["dynamo", "inputs"])
@pytest.mark.parametrize(
    "rows", [[(5, 5), (5, 1), (7, 1), (1, 1), (1, 7)], [(5, 1), (7, 1), (7, 7)], [(1, 1), (5, 1), (5, 5)]]
)
def test_an_argument_of_one_row_broadcasts(guards, rows):
    """Also after calls where it had as many rows as the others."""
    compiled = pcg.piecewise(buckets=[4, 8], compiler="eager", guards=guards)(lambda x, y: x * 2 + y)
    with torch.no_grad():
        for n, m in rows:
            x, y = torch.randn(n, 8), torch.randn(m, 8)
            torch.testing.assert_close(compiled(x, y), x * 2 + y)
