"""Which inputs share memory is a fact of a step: layouts that the trace never saw give eager's values and views."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.memory.ranges import overlap, range_of
from pcg_compile.registry import runtimes

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


@pcg.split_op("memory_by_range::double", fake=lambda x: torch.empty_like(x))
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def compile_it(function: Callable[..., Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="pcg", options={**OPTIONS, **options})


def overlapped(compiled: Any) -> int:
    return sum(f.count for f in pcg.stats(compiled).fallbacks if "overlaps" in f.reason)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- the comparison of two tensors ---------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> set[int]:
    places = {tensor.data_ptr()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = {place + i * stride * tensor.element_size() for place in places for i in range(size)}
    return {place + i for place in places for i in range(tensor.element_size())} if tensor.numel() else set()


def random_view(base: torch.Tensor, rng: random.Random) -> torch.Tensor:
    typed = base.view(rng.choice([torch.uint8, torch.int16, torch.float32]))
    shape = [rng.choice([0, 1, 1, 2, 3, 4]) for _ in range(rng.randint(0, 3))]
    strides = [rng.choice([0, 1, 2, 3, 5]) for _ in shape]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    return typed.as_strided(shape, strides, rng.randint(0, max(len(typed) - 1 - last, 0)))


def test_two_tensors_overlap_where_they_have_a_byte_in_common():
    rng, base = random.Random(0), torch.zeros(160, dtype=torch.uint8)
    seen = {True: 0, False: 0}
    for _ in range(1500):
        one, other = random_view(base, rng), random_view(base, rng)
        ranges = range_of(one), range_of(other)
        want = not bytes_of(one).isdisjoint(bytes_of(other))
        if None in ranges:
            assert not want
            continue
        assert overlap(*ranges) == overlap(*reversed(ranges)) == want, (one.shape, one.stride(), other.stride())
        seen[want] += 1
    assert min(seen.values()) > 60


# -- random graphs, random layouts ---------------------------------------------------------------------------------


def random_function(rng: random.Random, count: int, rows: bool) -> Callable[..., Any]:
    """A function of ``count`` matrices that reads, writes and returns them, views of them and what follows from them.

    With ``rows`` from one row on, which no padded step does.
    """
    steps = [(rng.choice("wvsrtdm"), rng.randrange(count), rng.randrange(count)) for _ in range(rng.randint(2, 6))]
    results = [(rng.choice("axyzt"), rng.randrange(count)) for _ in range(rng.randint(1, 3))]

    def function(*args: torch.Tensor) -> Any:
        total = args[0] * 1
        for what, i, j in steps:
            if what == "w":
                args[i].add_(1)
            elif what == "v":
                (args[i][1:] if rows else args[i][:, 1:]).mul_(2)
            elif what == "s":
                args[i].copy_(args[j] * 3)
            elif what == "r":
                total = total + args[i]
            elif what == "t":
                total = total + args[i][:, :1]
            elif what == "d":
                total = torch.ops.memory_by_range.double(total) + args[j]
            else:
                args[i].T[1].sub_(args[j][:, 0])
        views = {
            "a": lambda t: t,
            "x": lambda t: t[1:] if rows else t[:, 2],
            "y": lambda t: t[:, 1:3],
            "z": lambda t: t.T[2:],
        }
        made = [total.T if what == "t" else views[what](args[i]) for what, i in results]
        return [*made, total, total[:, :1]]

    return function


def random_layout(rng: random.Random, stride: int) -> tuple[int, int, int]:
    """(storage, offset, stride of rows) of a matrix of 4 columns: rows of their own, or columns of a wider one."""
    columns = rng.choice([0, 2, 4, 8]) if stride > 4 else 4 * rng.randrange(4)
    return rng.randrange(2), columns + stride * rng.randrange(3), stride


def views_of(bases: Sequence[torch.Tensor], layouts: Sequence[tuple[int, int, int]], n: int) -> list[torch.Tensor]:
    made: dict[Any, torch.Tensor] = {}
    return [
        made.setdefault(layout, bases[layout[0]].as_strided((n, 4), (layout[2], 1), layout[1])) for layout in layouts
    ]


def form(result: torch.Tensor, bases: Sequence[torch.Tensor], args: Sequence[torch.Tensor]) -> Any:
    """Layout of a result, in whose memory it lies where, and whether it is an argument itself."""
    where = [b.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() for b in bases]
    same = [result is a for a in args]
    return result.shape, result.stride(), where, result.storage_offset() if any(where) else 0, same


@pytest.mark.parametrize("seed", range(10))
def test_random_layouts_of_arguments(seed):
    rng = random.Random(seed)
    count = rng.randint(2, 3)
    function = random_function(rng, count, seed % 3 == 2)
    compiled = compile_it(function, buckets=[4, 8, 16])
    stride = rng.choice([4, 12])
    layouts = [random_layout(rng, stride) for _ in range(count)]
    for call in range(9):
        n = rng.choice([3, 5, 8])
        # Strides are guarded by Dynamo; where things lie in their storages is not.
        if call % 4 == 1:
            layouts = [(k % 2, 200 * (k // 2), stride) for k in range(count)]
        elif call:
            layouts = [random_layout(rng, stride) for _ in range(count)]
        start = [torch.randn(400, generator=torch.Generator().manual_seed(10 * call + k)) for k in range(2)]
        ours, theirs = [b.clone() for b in start], [b.clone() for b in start]
        a, b = views_of(ours, layouts, n), views_of(theirs, layouts, n)
        got, want = compiled(*a), function(*b)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other), (call, layouts)
            assert form(one, ours, a) == form(other, theirs, b), (call, layouts)
        assert [torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)] == [True, True], (call, layouts)
        shared = [(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()) for x in got for y in got]
        assert shared == [x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for x in want for y in want]
    assert pcg.stats(compiled).replays > 0 or seed % 3 == 2


class State(nn.Module):
    """Writes one buffer, reads another and a parameter, and takes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.arange(320.0)
        self.register_buffer("state", memory[:64].view(16, 4))
        self.register_buffer("table", memory[64:128].view(16, 4))
        self.weight = nn.Parameter(memory[128:144].view(4, 4) / 100)
        self.memory = memory

    def forward(self, x: torch.Tensor) -> Any:
        y = x @ self.weight
        self.state.mul_(2)
        return x + self.table[0], torch.ops.memory_by_range.double(y + x), self.state[1], self.table


def test_arguments_that_lie_in_a_modules_memory():
    ours = State()
    theirs = copy.deepcopy(ours)
    compiled = compile_it(ours)
    expected = 0
    for n in (3, 5):
        compiled(torch.ones(n, 4)), theirs(torch.ones(n, 4))
    # Rows of the written buffer, of the one that is read, of the parameter, and of no one's part of that memory.
    for first, n in ((0, 3), (16, 4), (15, 3), (13, 3), (32, 4), (40, 5), (0, 8), (17, 3)):
        a, b = (m.memory.as_strided((n, 4), (4, 1), 4 * first) for m in (ours, theirs))
        expected += first < 16
        for one, other in zip(compiled(a), theirs(b), strict=True):
            assert torch.equal(one, other), (first, n)
    assert overlapped(compiled) == expected
    assert pcg.stats(compiled).replays > 0
    assert compiled(torch.ones(3, 4))[3] is ours.table


def test_columns_of_one_matrix_are_captured():
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y.copy_(x * 2)
        return y + 1

    compiled = compile_it(function)
    matrix = torch.randn(16, 8)
    for n in (3, 5, 6, 3):
        x, y = matrix[:n, :4], matrix[:n, 4:]
        assert torch.equal(compiled(x, y), x * 2 + 1) and torch.equal(y, x * 2)
    assert not pcg.stats(compiled).fallbacks and pcg.stats(compiled).replays > 0
    x, y = matrix[:5, :4], matrix[:5, 3:7]
    want = x * 2 + 1
    assert torch.equal(compiled(x, y), want) and overlapped(compiled) == 1


def test_buffers_that_share_memory_are_written_as_eager_writes_them():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.arange(32.0).view(8, 4))
            self.register_buffer("part", self.whole[2:4])
            self.register_buffer("apart", self.whole[6:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.whole[:6].add_(1)
            return x + self.part[0] + self.apart[0]

    ours, theirs = Shared(), Shared()
    compiled = compile_it(ours)
    for n in (3, 5, 5):
        x = torch.randn(n, 4)
        assert torch.equal(compiled(x), theirs(x))
    # Facts are of tensors, and the whole buffer is one: what of it is written is not told apart.
    assert overlapped(compiled) > 0


class Peeking(nn.Module):
    """Attends, and afterwards reads a tensor that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q = x.view(-1, 1, 4) + 1
        return self.attention(q, q * 2, q * 3).view(-1, 4) + seen


def test_an_argument_that_lies_in_the_cache():
    model = Peeking()
    compiled = compile_it(model)
    caches = [pcg.PagedKVCache(1, 8, 4, num_kv_heads=1, head_dim=4, device="cpu", max_requests=4) for _ in range(2)]
    for step, (n, inside) in enumerate([(3, False), (4, False), (4, True), (3, True), (3, False)]):
        x = torch.randn(n, 4)
        results = []
        for run, cache in ((compiled, caches[0]), (model, caches[1])):
            batch = pcg.Batch(qo_lens=[n], kv_lens=[n], page_table=[[1]])
            seen = cache.k[0][1, :n, 0] if inside else torch.ones(n, 4)
            with pcg.step(batch, cache):
                results.append(run(x, seen))
        torch.testing.assert_close(*results, msg=f"step {step}")
    assert overlapped(compiled) == 2 and pcg.stats(compiled).replays > 0


def test_warming_up_with_arguments_that_overlap():
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    compiled = compile_it(function)
    for n in (3, 5):
        compiled(torch.ones(n, 4), torch.ones(n, 4))
    memory = torch.arange(32.0).view(8, 4)
    pcg.warmup(compiled, memory[:5], memory[1:6])
    assert torch.equal(memory, torch.arange(32.0).view(8, 4))
    want = 2 * (memory[1:6] + torch.tensor([1.0, 1, 1, 1, 0])[:, None])
    assert torch.equal(compiled(memory[:5], memory[1:6]), want) and overlapped(compiled) == 1


def test_tables_of_addresses_stay_small():
    compiled = compile_it(lambda x, y: y.copy_(x * 2) + 1)
    kept = [torch.zeros(3, 4) for _ in range(300)]
    for y in kept:
        compiled(torch.ones(3, 4), y)
    assert all(int(y.sum()) == 24 for y in kept) and not pcg.stats(compiled).fallbacks
    for runtime in runtimes(compiled):
        for binding in runtime.bindings:
            assert all(len(program.apart) <= 64 for program in binding.steps.values())


# -- ops that see a storage ----------------------------------------------------------------------------------------

SEES_STORAGE = {
    "from the start": lambda x: x.as_strided((2, 3), (6, 1), 0) * 2,
    "beyond": lambda x: x.as_strided((6, 6), (6, 1)) * 2,
    "beyond by stride": lambda x: torch.as_strided(x, (3, 6), (12, 1)) + x[0],
    "through a view": lambda x: x[1:].as_strided((2, 6), (6, 1), 6) + x.sum(),
    "written": lambda x: (x.as_strided((1, 6), (6, 1), 0).add_(1), x * 2)[1],
    "transposed": lambda x: torch.ops.aten.t_(x) + 1,
    "behind a cut": lambda x: torch.ops.memory_by_range.double(x)[1:].as_strided((2, 3), (6, 1), 0) + 1,
}


@pytest.mark.parametrize("name", SEES_STORAGE)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_ops_that_see_the_storage_see_the_callers(name, compiler):
    if compiler == "inductor" and name not in ("beyond", "behind a cut"):
        pytest.skip("runs eagerly whatever the compiler")
    function = SEES_STORAGE[name]
    compiled = compile_it(function, compiler=compiler)
    for seed, first in enumerate((2, 2, 3, 1)):
        ours = torch.arange(60.0).view(10, 6) + 1000 * seed
        theirs = ours.clone()
        x, y = ours[first : first + 3], theirs[first : first + 3]
        assert torch.equal(compiled(x), function(y)), (name, first)
        assert x.shape == y.shape and torch.equal(ours, theirs)
    assert pcg.stats(compiled).fallbacks


def test_as_strided_inside_a_tensor_is_captured():
    """Windows over a fresh tensor, and over an argument that has them."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return y.as_strided((2, 4), (2, 1)).sum(-1), x.as_strided((2, 2), (1, 1)) * 2

    compiled = compile_it(function)
    base = torch.randn(12, 4)
    for first in (0, 3, 5):
        x = base[first : first + 2].clone() if first else base[:2]
        for one, other in zip(compiled(x), function(x), strict=True):
            assert torch.equal(one, other)
    assert not pcg.stats(compiled).fallbacks and pcg.stats(compiled).replays > 0


def test_memory_exchanged_in_the_graph():
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.data = y
        return x + 1

    compiled = compile_it(function)
    for n in (3, 5):
        x, y = torch.zeros(n, 4), torch.ones(n, 4)
        assert torch.equal(compiled(x, y), y + 1) and x.data_ptr() == y.data_ptr()
    assert pcg.stats(compiled).fallbacks


def test_numpy_slices_of_one_array():
    """``from_numpy`` gives each slice a storage of its own: storages tell nothing, addresses do."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    compiled = compile_it(function)
    for n, apart in ((3, 3), (5, 5), (5, 1), (3, 2), (5, 5)):
        array = np.arange(80, dtype=np.float32).reshape(20, 4)
        x, y = torch.from_numpy(array[:n]), torch.from_numpy(array[apart : apart + n])
        want = np.arange(80, dtype=np.float32).reshape(20, 4)
        want[:n] += 1
        assert np.array_equal(compiled(x, y).numpy(), 2 * want[apart : apart + n])
    assert overlapped(compiled) == 2
