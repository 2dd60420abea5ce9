"""What the probe makes of opaque ops: those whose rows depend on others, or on their number, are never captured."""

from __future__ import annotations

import pytest
import torch
from paged_model import Model, Traffic

import pcg_compile as pcg

LIBRARY = torch.library.Library("probe_sees", "FRAGMENT")


def _refuses_nan(x):
    if not torch.isfinite(x).all():
        raise ValueError("not finite")
    return x * 3


def _refuses_few(x):
    if x.shape[0] < 3:
        raise ValueError("too few rows")
    return x * 3


ROW_WISE = {
    "double": lambda x: x * 2 + 1,
    "norm": lambda x: x / (x.norm(dim=1, keepdim=True) + 1),
    "small": lambda x: x * 1e-6,
    "product": lambda x: x @ torch.linspace(-1, 1, 16, dtype=x.dtype).view(4, 4),
    "first": lambda x: x + x[:1],
    "running": lambda x: x.cumsum(0),
    "refuses_nan": _refuses_nan,
}
MIXING = {
    "over_count": lambda x: x / x.shape[0],
    "small_over_count": lambda x: x * 1e-4 / x.shape[0],
    "slightly_by_count": lambda x: x * (1 + 2e-5 * x.shape[0]),
    "one_row": lambda x: x * 2 if x.shape[0] == 1 else x,
    "odd": lambda x: x * (1 + x.shape[0] % 2),
    "mean": lambda x: x - x.mean(0),
    "tiny_mean": lambda x: x + 1e-4 * x.mean(0),
    "last": lambda x: x + x[-1],
    "largest": lambda x: x / x.abs().max(),
    "least": lambda x: x - x.min(),
    "softmax": lambda x: x.softmax(0),
    "sorted": lambda x: x.sort(0).values,
    "ranks": lambda x: x.argsort(0).argsort(0).to(x.dtype),
    "turned": lambda x: x.flip(0),
    "shifted": lambda x: x.roll(1, 0),
    "others": lambda x: x @ x.T @ x,
    "next": lambda x: x + torch.cat([x[1:], x[:1]]),
    "counted": lambda x: x * (x > 0).sum(),
    "capacity": lambda x: x * (torch.arange(x.shape[0])[:, None] < x.shape[0] // 2),
    "from_the_end": lambda x: x * torch.arange(x.shape[0], 0, -1)[:, None],
}
OTHERS = {
    "refuses_few": _refuses_few,
    "nothing": lambda x: x * 0,
    "from_six_rows_on": lambda x: x * 2 if x.shape[0] > 5 else x,
}
for _name, _function in {**ROW_WISE, **MIXING, **OTHERS}.items():
    LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"probe_sees::{_name}", lambda x: torch.empty_like(x), lib=LIBRARY)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def run(name, dtype=torch.float32, sizes=(4, 3, 1, 8, 5, 13, 16, 7), scale=1.0, buckets=(4, 8, 16)):
    function = lambda x: getattr(torch.ops.probe_sees, name)(x.relu() + x) * 2
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=buckets, compiler="eager")(function)
    near = TOLERANCE[dtype]
    with torch.no_grad():
        for n in sizes:
            x = (torch.randn(n, 4) * scale).to(dtype)
            torch.testing.assert_close(compiled(x), function(x), rtol=near, atol=0 if name in MIXING else near * scale)
    return pcg.stats(compiled)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise(name, dtype):
    stats = run(name, dtype)
    assert stats.replays == 8 and not stats.fallbacks


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("name", MIXING)
def test_never_captured(name, scale):
    stats = run(name, torch.float32, scale=scale)
    assert stats.replays == 0 and any("by the probe" in f.reason for f in stats.fallbacks)


@pytest.mark.parametrize("name", ["over_count", "mean", "one_row", "sorted", "last"])
def test_coarse_types(name):
    assert run(name, torch.bfloat16, sizes=(60, 33, 16, 50, 64), buckets=(64,)).replays == 0


def test_each_bucket_is_probed():
    """Rows matter above five only, which the smallest bucket does not show."""
    function = lambda x: torch.ops.probe_sees.from_six_rows_on(x + 1)
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        for n in (3, 5, 7, 4, 5, 8):
            x = torch.randn(n, 4)
            assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize(("name", "why"), [("refuses_few", "it raises at all sizes"), ("nothing", "all zero")])
def test_no_verdict(name, why):
    """What the probe cannot see it does not decide: the piece runs at its exact size, and says why."""
    stats = run(name, sizes=(4, 3), buckets=(4,))
    assert stats.replays == 0 and any(why in f.reason for f in stats.fallbacks)
    assert not any("by the probe mixing" in f.reason for f in stats.fallbacks)


def _add_to_cache(x, cache):
    """Writes as many slots of a cache as there are rows."""
    cache[: x.shape[0]] = x * 2
    return x + 1


def _count_calls(x, calls):
    """Writes a number that has no dimension."""
    calls += 1
    return x * 2


def _count_rows(x, calls):
    calls += x.shape[0]
    return x * 2


for _function, _written in ((_add_to_cache, "cache"), (_count_calls, "calls"), (_count_rows, "calls")):
    _name = _function.__name__[1:]
    LIBRARY.define(f"{_name}(Tensor x, Tensor(a!) {_written}) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"probe_sees::{_name}", lambda x, written: torch.empty_like(x), lib=LIBRARY)


def run_writing(name, start):
    """Calls with rows and a tensor that is written, which must hold what eager wrote after each of them."""
    op = getattr(torch.ops.probe_sees, name)
    function = lambda x, written: op(x.relu() + x, written) * 2
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(function)
    ours, theirs = start.clone(), start.clone()
    with torch.no_grad():
        for n in (3, 1, 4, 7, 5, 8, 2, 3):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x, ours), function(x, theirs))
            torch.testing.assert_close(ours, theirs)
    return pcg.stats(compiled)


def test_a_cache_of_which_few_rows_write_few_slots():
    """Padding would write slots that no row has: the cache of a caller has no scratch page."""
    assert run_writing("add_to_cache", torch.zeros(16, 4)).replays == 0


def test_a_steps_cache_beside_an_opaque_op():
    """Fewer rows write fewer slots of the step's cache, which says nothing of the op."""

    class Double(torch.nn.Module):
        def forward(self, x):
            return torch.ops.probe_sees.double(x)

    model, traffic = Model().eval(), Traffic()
    model.layers[0].norm = Double()
    options = {"buckets": [4, 8, 16], "cudagraph_mode": "piecewise", "compiler": "eager"}
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **options)(model.forward)
    for qo_lens in ({1: 5}, {1: 1, 2: 7}, {1: 1, 2: 1, 3: 11}, {1: 1, 2: 1, 3: 1}, {4: 6}):
        traffic.check(model, compiled, qo_lens)
    stats = pcg.stats(compiled)
    assert stats.replays == 5 * (len(model.layers) + 1) and not stats.fallbacks


def test_a_number_that_is_written():
    assert run_writing("count_calls", torch.zeros(())).replays > 0


def test_a_number_that_counts_padding_rows():
    assert run_writing("count_rows", torch.zeros(())).replays == 0


def test_a_later_step_may_tell():
    """Zeros, as a warm-up may pass, show nothing; ids that are alike do not either."""
    function = lambda x, ids: (torch.ops.probe_sees.double(x + 1) - 1, torch.ops.probe_sees.least(ids) * 2)
    compiled = pcg.piecewise(dynamic={"x": 0, "ids": 0}, buckets=[8], compiler="eager")(function)
    with torch.no_grad():
        for ids in (torch.full((7,), 5), torch.arange(3, 10), torch.arange(9, 2, -1)):
            given = torch.randn(7, 4), ids
            for got, want in zip(compiled(*given), function(*given), strict=True):
                assert torch.equal(got, want)
    reasons = [f.reason for f in pcg.stats(compiled).fallbacks]
    assert any("alike" in reason for reason in reasons) and any("by the probe mixing" in reason for reason in reasons)


def test_row_indices_stay_within_few_rows():
    function = lambda x, rows: torch.ops.probe_sees.double(x + 1)[rows] * 2
    compiled = pcg.piecewise(dynamic={"x": 0, "rows": 0}, buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        for n, rows in ((7, [6, -1, 0]), (5, [4, 3, 2, 1, 0]), (8, [7])):
            given = torch.randn(n, 4), torch.tensor(rows)
            assert torch.equal(compiled(*given), function(*given))
    assert pcg.stats(compiled).replays == 3


def test_probed_stays_visible():
    function = lambda x: torch.ops.probe_sees.double(x)
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        compiled(torch.randn(3, 4))
    assert "probed" in str(pcg.explain(compiled))
    torch._dynamo.reset()
    with pytest.raises(pcg.errors.UnsafePadding, match="opaque"), torch.no_grad():
        pcg.piecewise(dynamic={"x": 0}, buckets=[4], compiler="eager", strict=True)(function)(torch.randn(3, 4))
