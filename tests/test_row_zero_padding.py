"""Padding repeats row 0: an index made of several inputs stays in range for padding as well, in any order of sizes."""

from __future__ import annotations

import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv

import pcg_compile as pcg
from pcg_compile.options import Options
from pcg_compile.registry import runtimes
from pcg_compile.runtime import row_padding
from pcg_compile.runtime.buckets import BucketChooser

ROWS = 24
TABLE = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
#: Each is within the table for a row's own values, and for few pairs of values of different rows.
INDICES = {
    "sum": lambda a, b, c, t: a + b,
    "difference": lambda a, b, c, t: c - b,
    "product": lambda a, b, c, t: (a * b) // b + b,
    "quotient": lambda a, b, c, t: (a + b) // (c - a - b + 1) % ROWS,
    "remainder": lambda a, b, c, t: (a + b) % (c - a - b + 25) % ROWS,
    "behind": lambda a, b, c, t: a + b - ROWS,
    "looked up": lambda a, b, c, t: torch.arange(ROWS)[a + b],
    "floating": lambda a, b, c, t: ((a.float() + b.float()) * 1.0).long(),
    "of three": lambda a, b, c, t: a + b + t,
    "chosen": lambda a, b, c, t: torch.where(t == 0, a + b, c * 1000),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["small", "large"])
def entries(request, monkeypatch):
    """Inputs too large to expand an index for, or not."""
    if request.param == "large":
        monkeypatch.setattr(row_padding, "_MOST_EXPANDED", 4)
    return request.param


def rows_of(n: int, draw: random.Random) -> list[torch.Tensor]:
    """a + b and c - b lie in the table, row by row; t is zero."""
    places = [draw.randrange(ROWS) for _ in range(n)]
    # Far from each other, so sums of several rows' values are no index.
    offsets = [draw.choice([1, 7, 500, 10_000]) for _ in range(n)]
    a = [place - offset for place, offset in zip(places, offsets, strict=True)]
    c = [place + offset for place, offset in zip(places, offsets, strict=True)]
    return [torch.tensor(values) for values in (a, offsets, c, [0] * n)]


def look_up(a, b, c, t):
    found = [F.embedding(INDICES[name](a, b, c, t) % (ROWS if name == "behind" else 10**6), TABLE) for name in INDICES]
    return (*found, TABLE[a + b - ROWS], TABLE.index_select(0, a + b), TABLE[c - b, (a + b) % 4])


def test_indices_of_several_inputs():
    draw = random.Random(0)
    compiled = pcg.piecewise(dynamic={"a": 0, "b": 0, "c": 0, "t": 0}, buckets=[4, 8, 16], compiler="eager")(look_up)
    sizes = list(range(1, 19)) * 2
    draw.shuffle(sizes)
    with torch.no_grad():
        for n in sizes:
            given = rows_of(n, draw)
            for got, want in zip(compiled(*given), look_up(*given), strict=True):
                assert torch.equal(got, want)
    stats = pcg.stats(compiled)
    assert stats.replays > 20 and not [f for f in stats.fallbacks if "beyond the largest" not in f.reason]


def test_in_several_dimensions(entries):
    """Two inputs with sizes of their own, offsets of rows and of columns, and a dimension between padded ones."""
    table = torch.randn(100, generator=torch.Generator().manual_seed(1))

    def function(i, j, ids, past, x):
        outer = table[i[:, None] + j[None, :]]
        return outer, table[ids + past[:, None]], table[ids - ids[:, :1] + i[:, None]], x.relu() * 2

    dynamic = {"i": 0, "j": 0, "ids": (0, 1), "past": 0, "x": (0, 2)}
    compiled = pcg.piecewise(dynamic=dynamic, buckets=[4, 8], compiler="eager")(function)
    draw = random.Random(1)
    with torch.no_grad():
        for n, m in [(3, 5), (2, 7), (4, 4), (7, 3), (3, 5), (5, 8), (8, 2), (6, 6), (3, 3)]:
            high = draw.choice([0, 90])
            i, j = torch.randint(0, 5, (n,)) + high, torch.randint(0, 5, (m,)) + (0 if high else draw.choice([0, 90]))
            ids = torch.randint(0, 5, (n, m)) + torch.tensor([[draw.choice([0, 1000])] for _ in range(n)])
            past = torch.where(ids[:, 0] >= 1000, -1000, draw.choice([0, 95]))
            given = i, j, ids, past, torch.randn(n, 3, m)
            for got, want in zip(compiled(*given), function(*given), strict=True):
                assert torch.equal(got, want)
    assert pcg.stats(compiled).replays >= 9 and not pcg.stats(compiled).fallbacks


@torch.library.custom_op("row_zero::sorted", mutates_args=())
def _sorted(x: torch.Tensor) -> torch.Tensor:
    return x.sort(descending=True).values


@_sorted.register_fake
def _(x):
    return torch.empty_like(x)


def test_what_a_split_op_gives_is_padded_alike():
    """Its rows and an input's make an index together, where zeros behind them would not."""
    pcg.register_split_op("row_zero::sorted")
    compiled = pcg.piecewise(dynamic={"ids": 0, "base": 0}, buckets=[4, 8], compiler="eager")
    function = lambda ids, base: TABLE[torch.ops.row_zero.sorted(ids + 1) - base]
    compiled = compiled(function)
    with torch.no_grad():
        for n in (3, 8, 5, 1, 2, 7):
            ids = torch.arange(n).flip(0) + 2000
            base = torch.full((n,), 2000)
            assert torch.equal(compiled(ids, base), function(ids, base))
    assert pcg.stats(compiled).replays > 0 and not pcg.stats(compiled).fallbacks


def test_padding_is_row_zero_at_every_load(entries):
    """Static memory after a load, whatever the step before left there. A load is one call for each input."""
    function = lambda ids, x, flags: (ids * 2, x + 1, ~flags)
    compiled = pcg.piecewise(dynamic={"ids": 0, "x": (0, 2), "flags": 1}, buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        for n, m in ((8, 8), (3, 5), (7, 2), (8, 3), (5, 5)):
            given = torch.randint(0, 1000, (n,)), torch.randn(n, 3, m), torch.rand(2, m) > 0.5
            compiled(*given)
            (runtime,) = runtimes(compiled)
            program = next(p for sizes, p in runtime.bindings[0].steps.items() if set(sizes) == {n, m})
            placed = runtime.bindings[0].placed
            static = {shape: t for (node, shape), t in placed.items() if node.op == "placeholder"}
            bucket, other = (next(b for b in (4, 8) if b >= size) for size in (n, m))
            for real, shape in zip(given, ((bucket,), (bucket, 3, other), (2, other)), strict=True):
                for dim, size in enumerate(real.shape):
                    index = torch.arange(shape[dim])
                    real = real.index_select(dim, torch.where(index < size, index, 0))
                assert torch.equal(static[shape], real)
            assert sum(len(load.name.split(", ")) for load in program.loads) == 3


@pytest.mark.parametrize("trailing", [(), (3,)])
def test_many_inputs_alike_are_loaded_together(trailing, entries):
    """However many there are, and right whatever the order of sizes."""
    function = lambda a, b, c, d, e: (a + b, c * d, e - a, TABLE[(a + b + c + d + e) % ROWS])
    compiled = pcg.piecewise(dynamic=dict.fromkeys("abcde", (0, 1)), buckets=[4, 8], compiler="eager")(function)
    with torch.no_grad():
        for n, m in ((3, 5), (8, 8), (4, 4), (2, 7), (7, 2), (8, 3), (3, 5)):
            given = [torch.randint(0, 1000, (n, m, *trailing)) for _ in range(5)]
            for got, want in zip(compiled(*given), function(*given), strict=True):
                assert torch.equal(got, want)
    (runtime,) = runtimes(compiled)
    loads = {tuple(load.name for load in program.loads) for program in runtime.bindings[0].steps.values()}
    # The table is an input too.
    assert loads == {("a, b, c, d, e, TABLE",), ("TABLE", "a, b, c, d, e")} and not pcg.stats(compiled).fallbacks


class Launches(TorchDispatchMode):
    """Counts ops that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "aten.expand" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count, launches", [(1, (1, 2)), (2, (2, 3)), (3, (3, 3)), (5, (2, 3))])
def test_launches_of_a_load(count, launches, entries):
    """At most one more than plain copies for inputs padded along two dimensions; two more for many large ones."""
    names = "abcde"[:count]
    scope = {"torch": torch}
    alike = "; ".join(f"torch._check({x}.shape[{d}] == a.shape[{d}])" for x in names[1:] for d in (0, 1)) or "pass"
    exec(f"def function({', '.join(names)}):\n {alike}\n return ({'+ 1, '.join(names)} + 1,)", scope)
    compiled = pcg.piecewise(dynamic=dict.fromkeys(names, (0, 1)), buckets=[8], compiler="eager")(scope["function"])
    given = [torch.randint(0, 9, (3, 5)) for _ in names]
    with torch.inference_mode():
        compiled(*given)
        (runtime,) = runtimes(compiled)
        (program,) = runtime.bindings[0].steps.values()
        places = {spec.node.name.strip("l_"): spec.position for spec in runtime.plan.inputs if spec.kind == "user"}
        args = [None] * (1 + max(spec.position for spec in runtime.plan.inputs))
        for name, tensor in zip(names, given, strict=True):
            args[places[name]] = tensor
        with Launches() as calls:
            program.load(args)
    assert calls.count == launches[entries == "large"]


def test_no_row_zero():
    """An input whose size follows from others may be empty where it is not at the bucket."""
    size = sympy.Symbol("s", integer=True, positive=True)
    chooser = BucketChooser(Options(buckets=(4, 8)), (), [(size,)], rows=(FloorDiv(size, 4),))
    assert chooser.choose({size: 3}, [size]).sizes is None and "row 0" in chooser.choose({size: 3}, [size]).reason
    assert chooser.choose({size: 5}, [size]).sizes == {size: 8}
