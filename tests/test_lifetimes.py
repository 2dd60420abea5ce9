"""How long memory lives: callers' tensors, values between pieces, captured graphs, programs."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import BatchError
from pcg_compile.fx import assemble
from pcg_compile.registry import runtimes
from pcg_compile.runtime import binding

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}

#: What a split op does while it runs, and the memory of what it was given and gave.
during: list[Callable[[], None]] = []
live: weakref.WeakSet[Any] = weakref.WeakSet()
most = [0]


@pcg.split_op("lifetimes::between", fake=lambda x: torch.empty_like(x))
def between(x: torch.Tensor) -> torch.Tensor:
    for action in during:
        action()
    return tracked(x)


@torch.library.custom_op("lifetimes_inside::copied", mutates_args=())
def copied(x: torch.Tensor) -> torch.Tensor:
    return tracked(x)


@copied.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def tracked(x: torch.Tensor) -> torch.Tensor:
    # numpy's array goes with the last tensor over its memory.
    array = x.numpy().copy()
    live.add(Memory(array))
    most[0] = max(most[0], len(live))
    return torch.from_numpy(array)


class Memory:
    """Lives as long as an array's memory."""

    def __init__(self, array: np.ndarray) -> None:
        weakref.finalize(array, live.discard, self)


def compile_it(function: Callable[..., Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="pcg", options={**OPTIONS, **options})


@pytest.fixture(autouse=True)
def fresh():
    during.clear()
    with torch.no_grad():
        yield
    during.clear()


# -- callers' tensors ----------------------------------------------------------------------------------------------

KINDS = {
    "read": lambda t, x: x + t[0],
    "written": lambda t, x: (t[0].add_(1), x + t[0])[1],
    "written whole": lambda t, x: (t.mul_(2), x + t[0])[1],
    "a view returned": lambda t, x: (x + t[0], t[1:])[0],
    "between pieces": lambda t, x: torch.ops.lifetimes.between(t)[0] + x * t[0],
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_dropped_argument_is_freed(name, large, monkeypatch):
    if large:
        monkeypatch.setattr(assemble, "_BIND_BYTES", 16)
    compiled = compile_it(KINDS[name])
    seen = []
    for n in (3, 5, 5, 9, 3, 5):
        array = np.ones((8, 6), np.float32)
        seen.append(weakref.ref(array))
        t, x, want = torch.from_numpy(array), torch.ones(n, 6), torch.from_numpy(array.copy())
        assert torch.equal(compiled(t, x), KINDS[name](want, torch.ones(n, 6)))
        del array, t, x
    gc.collect()
    assert [one() for one in seen] == [None] * len(seen)
    assert pcg.stats(compiled).replays > 0


def test_an_address_that_comes_back_with_other_values():
    """The allocator gives a dropped tensor's place to the next one: what was captured there reads the new values."""
    compiled = compile_it(lambda t, x: (t.add_(1), x + t[0])[1])
    memory = np.zeros(64, np.float32)
    for k in range(12):
        memory[:] = k
        t = torch.from_numpy(memory[:24].reshape(4, 6))
        assert torch.equal(compiled(t, torch.ones(3, 6)), torch.full((3, 6), k + 2.0))
        del t
    assert len(runtimes(compiled)[-1].bindings) == 1


def test_weights_of_a_model_that_is_gone():
    model = nn.Linear(6, 6)
    compiled = compile_it(model)
    for n in (3, 5):
        compiled(torch.ones(n, 6))
    memory = np.zeros((6, 6), np.float32)
    gone = weakref.ref(memory)
    model.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    del memory
    compiled(torch.ones(3, 6))
    graph = runtimes(compiled)[-1]
    model.weight = nn.Parameter(torch.ones(6, 6), requires_grad=False)
    gc.collect()
    assert gone() is None and graph.bindings == []


class Replaced(nn.Module):
    """Loses its weight while a step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.lifetimes.between(x @ self.weight) + x @ self.weight


def test_a_weight_that_goes_inside_a_step():
    """A weak reference calls back in the middle of the step whose captured graphs it would drop."""
    model = Replaced()
    compiled = compile_it(model)
    for n in (3, 4, 3):
        compiled(torch.ones(n, 6))
    graph = runtimes(compiled)[-1]
    seen = []

    def lose() -> None:
        binding = graph.current
        # As if the parameter had gone: what its weak reference calls.
        binding.parameters[0][0].__callback__(None)
        seen.append((len(binding.captured_graphs), graph.current is binding))

    during.append(lose)
    assert torch.equal(compiled(torch.ones(3, 6)), torch.full((3, 6), 2.0))
    during.clear()
    assert seen == [(seen[0][0], True)] and seen[0][0] > 0
    assert graph.bindings == [] and graph.current is None
    assert torch.equal(compiled(torch.ones(3, 6)), torch.full((3, 6), 2.0))


def test_a_weight_that_goes_while_another_thread_is_in_a_step():
    model = Replaced()
    compiled = compile_it(model)
    for n in (3, 4, 3):
        compiled(torch.ones(n, 6))
    graph = runtimes(compiled)[-1]
    seen = []

    def lose() -> None:
        thread = threading.Thread(target=graph.current.parameters[0][0].__callback__, args=(None,))
        thread.start()
        thread.join()
        seen.append(len(graph.bindings))

    during.append(lose)
    assert torch.equal(compiled(torch.ones(3, 6)), torch.full((3, 6), 2.0))
    assert seen == [1] and graph.bindings == []


# -- values between pieces -----------------------------------------------------------------------------------------


def chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(12):
        x = torch.ops.lifetimes.between(x * 1.5)
    return x.sum(-1)


def residual(x: torch.Tensor) -> torch.Tensor:
    for _ in range(8):
        y = torch.ops.lifetimes.between(x + 1)
        x = x + torch.ops.lifetimes.between(y.relu()).tanh()
    return x


def chain_inside(x: torch.Tensor) -> torch.Tensor:
    """Within a piece an input goes where eager drops it."""
    for _ in range(4):
        x = torch.ops.lifetimes.between(x)
        x = torch.ops.lifetimes_inside.copied(torch.ops.lifetimes_inside.copied(torch.ops.lifetimes_inside.copied(x)))
    return x


def read_late(x: torch.Tensor) -> Any:
    first = torch.ops.lifetimes.between(x)
    y = first
    for _ in range(6):
        y = torch.ops.lifetimes.between(y + 1)
    return first[1:], y + first


@pytest.mark.parametrize("function", [chain, chain_inside, residual, read_late])
def test_values_of_uncaptured_steps_go_after_their_last_reader(function):
    compiled = compile_it(function, buckets=[4])
    for n in (3, 5, 9):
        compiled(torch.randn(n, 6))
    x = torch.randn(9, 6)
    counts = []
    for run in (function, compiled):
        gc.collect()
        most[0] = len(live)
        start = len(live)
        result = run(x)
        counts.append(most[0] - start)
        del result
    assert counts[1] <= counts[0] <= 4
    assert any("beyond the largest bucket" in f.reason for f in pcg.stats(compiled).fallbacks)


# -- results -------------------------------------------------------------------------------------------------------


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(24.0).view(4, 6))
        self.register_buffer("state", torch.zeros(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        self.state.add_(1)
        y = x * 2
        z = y.add_(1)
        return self.table[0], self.state[1:3], self.table.T, x[:, :2], y, z, y.T, self.state


@pytest.mark.parametrize("outputs", ["copy", "view"])
def test_results_are_the_callers_objects(outputs):
    ours, theirs = Giving(), Giving()
    compiled = compile_it(ours, outputs=outputs)
    changes = [lambda t: t.unsqueeze_(0), lambda t: t.t_() if t.dim() == 2 else t, lambda t: t.squeeze_()]
    for step, n in enumerate((3, 5, 5, 3, 4, 9, 4)):
        x = torch.randn(n, 6)
        got, want = compiled(x), theirs(x)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride(), step
        assert [a is b for a in got for b in got] == [a is b for a in want for b in want]
        assert got[0].data_ptr() == ours.table.data_ptr() and got[-1] is ours.state
        for result in got[:-1]:
            changes[step % 3](result)
    assert pcg.stats(compiled).replays > 0


# -- programs and budgets ------------------------------------------------------------------------------------------


def test_the_longest_unused_program_goes(monkeypatch):
    monkeypatch.setattr(binding, "_KEPT_STEPS", 3)
    compiled = compile_it(lambda x: x * 2)
    compiled(torch.ones(3, 6))
    for n in (2, 3, 4, 2, 5):
        compiled(torch.ones(n, 6))
    kept = [sizes for one in runtimes(compiled)[-1].bindings for sizes in one.steps]
    assert kept == [(4,), (2,), (5,)]


def many(x: torch.Tensor) -> list[torch.Tensor]:
    """Small pieces: what one of them gives is little beside the whole."""
    results = []
    for _ in range(12):
        x = torch.ops.lifetimes.between(x + 1)
        results.append(x)
    return results


def serve(sizes: list[int], **options: Any) -> tuple[list[int], Any]:
    """Bytes held after each step, and the graph."""
    compiled = compile_it(many, **options)
    held = []
    for n in sizes:
        x = torch.randn(n, 16)
        torch._dynamo.mark_dynamic(x, 0)
        for one, other in zip(compiled(x), many(x), strict=True):
            assert torch.equal(one, other)
        (graph,) = runtimes(compiled)
        held.append(graph.nbytes())
    return held, graph


def test_static_buffers_are_counted_once():
    """Buckets share their buffers; those that a larger bucket outgrew live as long as what was captured with them."""
    descending, ascending = serve([8, 7, 4])[0], serve([4, 8])[0]
    assert len(set(descending)) == 1 and descending[0] > 0
    assert ascending == [descending[0] // 2, descending[0] * 3 // 2]


def test_a_bucket_that_fits_alone_is_captured_again():
    """Ascending sizes leave outgrown buffers behind: the bucket that no longer fits comes back once all are gone."""
    sizes = [3, 8, 8, 4, 3]
    alone = serve([8])[0][0]
    held, graph = serve(sizes, memory_budget=alone)
    assert held == [alone // 2, 0, alone, alone, alone] and not any(one.given_up for one in graph.bindings)
    counted = graph.shared.counters.snapshot().fallbacks
    assert [one.count for one in counted if "dropped with all" in one.reason] == [1]
    held, graph = serve(sizes, memory_budget=alone - 1)
    assert max(held) == held[-1] == alone // 2 and any(one.given_up for one in graph.bindings)


def test_one_of_many_threads_gets_the_cache():
    cache = pcg.PagedKVCache(1, 8, 4, num_kv_heads=1, head_dim=4, device="cpu", max_requests=4)
    batch = pcg.Batch(qo_lens=[1], kv_lens=[1], page_table=[[1]])
    ready, entered, refused = threading.Barrier(8), [], []
    done = threading.Event()

    def enter() -> None:
        ready.wait()
        try:
            with pcg.step(batch, cache):
                entered.append(1)
                done.wait(10)
        except BatchError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(entered), len(refused)) == (1, 7) and not cache.in_step
    with pcg.step(batch, cache):
        assert cache.in_step
