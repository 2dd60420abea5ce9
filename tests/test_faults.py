"""What goes wrong while serving: each fault is injected, counted where it costs speed, and the numbers stay right."""

from __future__ import annotations

import os
import signal
import weakref

import models  # noqa: F401 - defines the silly ops
import pytest
import torch
from three_pieces import Model, check, compile_it, pair, warm
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import StaleAddress
from pcg_compile.registry import runtimes
from pcg_compile.runtime.capture import StaticReplay


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Failing:
    """Makes some of the captured graphs fail, before or after the piece ran."""

    def __init__(self, monkeypatch, which, error, late=False):
        self.seen = 0
        record = StaticReplay.capture

        def broken(engine, run, place, warm_up, pool=None, *rest):
            if pool is None:
                return record(engine, run, place, warm_up, pool, *rest)
            self.seen += 1
            if self.seen in which:
                if late:
                    run()
                raise error
            return record(engine, run, place, warm_up, pool, *rest)

        monkeypatch.setattr(StaticReplay, "capture", broken)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("which", [{1}, {2}, {3}])
def test_a_capture_fails_once(monkeypatch, which, late):
    ours, theirs = pair()
    compiled = compile_it(ours)
    warm(compiled, theirs)
    failing = Failing(monkeypatch, which, RuntimeError("out of memory"), late)
    check(compiled, theirs, 12, 13, 12, 14, 16, 2)
    assert ours.calls.item() == theirs.calls.item()
    (fallback,) = pcg.stats(compiled).fallbacks
    assert fallback.reason == "capture failed: RuntimeError: out of memory" and fallback.count == 1
    # The bucket was dropped whole and captured at the next step; then the small one.
    assert failing.seen == 3 + 3 + 3
    assert pcg.stats(compiled).buckets[16].hits > 0


def test_a_capture_that_always_fails_is_tried_twice(monkeypatch):
    ours, theirs = pair()
    compiled = compile_it(ours)
    warm(compiled, theirs)
    Failing(monkeypatch, set(range(2, 99)), torch.OutOfMemoryError("no memory"))
    check(compiled, theirs, 12, 13, 12, 14, 16)
    reasons = {f.reason: f.count for f in pcg.stats(compiled).fallbacks}
    assert reasons["capture failed: OutOfMemoryError: no memory"] <= 2 * 3
    assert any("could not be captured, twice" in reason for reason in reasons)


def test_an_exception_in_a_split_op():
    asked = {"raise": False}

    @pcg.split_op("faults::maybe")
    def maybe(x: torch.Tensor) -> torch.Tensor:
        if asked["raise"]:
            raise ValueError("asked to")
        return x * 2

    def function(x):
        return torch.ops.faults.maybe(x + 1) + 1

    compiled = compile_it(function)
    check(compiled, function, 3, 5, 6)
    for n in (5, 12):
        asked["raise"] = True
        with pytest.raises(ValueError, match="asked to"), torch.no_grad():
            compiled(torch.randn(n, 4))
        asked["raise"] = False
        check(compiled, function, n, n + 1, 3)
    assert pcg.stats(compiled).replays > 0


def test_inductor_fails_on_one_piece(monkeypatch):
    from pcg_compile.fx import submodules as pieces

    inner, calls = pieces.compile_with_inductor, []

    def broken(gm, inputs):
        calls.append(gm)
        if len(calls) == 2:
            raise RuntimeError("no kernel for this")
        return inner(gm, inputs)

    monkeypatch.setattr(pieces, "compile_with_inductor", broken)
    ours, theirs = pair()
    compiled = compile_it(ours, compiler="inductor")
    check(compiled, theirs, 3)
    assert any("no kernel for this" in f.reason for f in pcg.stats(compiled).fallbacks)
    assert pcg.stats(compiled).replays > 0


def test_interrupted_warm_up(monkeypatch):
    ours, theirs = pair()
    compiled = compile_it(ours)
    Failing(monkeypatch, {5}, KeyboardInterrupt())
    x = torch.randn(3, 4)
    before = ours.calls.clone()
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        pcg.warmup(compiled, x, progress=False)
    assert torch.equal(ours.calls, before)
    check(compiled, theirs, 3, 5, 12, 16, 2)
    assert ours.calls.item() == theirs.calls.item()


def replaced(model):
    model.first.weight = nn.Parameter(torch.full((4, 4), 0.5))


def assigned(model):
    model.load_state_dict({k: v.clone() * 0.5 for k, v in model.state_dict().items()}, assign=True)


def converted(model):
    model.double().float()


def data_replaced(model):
    model.second.weight.data = model.second.weight.data.clone() + 1


def registered_anew(model):
    model.register_buffer("calls", torch.full((1,), 7.0))


def resized(model):
    model.first, model.second = nn.Linear(4, 9), nn.Linear(9, 4)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.fill_(0.1 * i)


def copied_over(model):
    with torch.no_grad():
        model.first.weight.copy_(torch.ones(4, 4))


def rounded(model):
    with torch.no_grad():
        model.first.weight = nn.Parameter((model.first.weight * 8).round().half().float() / 8)


class Int8Linear(nn.Module):
    """Weights in eight bits, and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantized(model):
    for name in ("first", "second"):
        linear = getattr(model, name)
        if not isinstance(linear, Int8Linear):
            setattr(model, name, Int8Linear(linear))


def narrowed(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float64)


def restrided(model):
    # A copy: at the old address only Dynamo's guards would see it.
    transposed = torch.empty_strided((4, 4), (1, 4)).copy_(model.second.weight.data)
    model.second.weight.data = transposed


SAME_FORM = [replaced, assigned, converted, data_replaced, registered_anew, copied_over, rounded]
OTHER_FORM = [resized, quantized, restrided]


@pytest.mark.parametrize(
    ("change", "guards"),
    # With guards="inputs", a module that was replaced is traced again, so its weights may have another form.
    [*((c, "dynamo") for c in SAME_FORM + OTHER_FORM), *((c, "inputs") for c in [*SAME_FORM, resized])],
)
def test_parameters_change_after_the_capture(change, guards):
    ours, theirs = pair()
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8, 16], compiler="eager", guards=guards)(ours.forward)
    warm(compiled, theirs)
    change(ours)
    change(theirs)
    replays = pcg.stats(compiled).replays
    check(compiled, theirs, 5, 6, 3, 12)
    change(ours)
    change(theirs)
    check(compiled, theirs, 6, 16, 6)
    assert pcg.stats(compiled).replays > replays


@pytest.mark.parametrize("change", [restrided, narrowed])
def test_parameters_of_another_form_are_refused_where_no_guard_sees_them(change):
    ours, theirs = pair()
    compiled = pcg.piecewise(dynamic={"x": 0}, buckets=[4, 8, 16], compiler="eager", guards="inputs")(ours.forward)
    warm(compiled, theirs)
    change(ours)
    for n in (5, 6, 12):
        with torch.no_grad(), pytest.raises(StaleAddress, match="weight is torch.float(.|\n)*compiler.reset") as caught:
            compiled(torch.randn(n, 4))
        assert len(str(caught.value).splitlines()) == 3
    torch._dynamo.reset()
    if change is not narrowed:
        change(theirs)
        check(compiled, theirs, 5, 6, 12)


def test_resets_between_steps():
    ours, theirs = pair()
    compiled = compile_it(ours)
    for reset in (pcg.reset, torch._dynamo.reset, lambda: pcg.reset(compiled)):
        warm(compiled, theirs)
        check(compiled, theirs, 12, 6)
        assert pcg.stats(compiled).replays > 0
        reset()
        assert pcg.stats(compiled).replays == 0
    warm(compiled, theirs)


def test_guards_that_change_are_counted_recompiles():
    class Flagged(Model):
        flag = 0

        def forward(self, x):
            return super().forward(x) * (self.flag + 1)

    ours, theirs = Flagged().eval(), Flagged().eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = compile_it(ours)
    warm(compiled, theirs)
    graphs = pcg.stats(compiled).graphs
    for flag in (1, 2, 0, 1):
        ours.flag = theirs.flag = flag
        check(compiled, theirs, 5, 6, 12)
    assert graphs < pcg.stats(compiled).graphs <= graphs + 4


@torch._dynamo.config.patch(recompile_limit=3)
def test_recompiles_end():
    class Flagged(Model):
        flag = 0

        def forward(self, x):
            return super().forward(x) + self.flag * 2.5

    ours, theirs = Flagged().eval(), Flagged().eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = compile_it(ours)
    for flag in range(8):
        ours.flag = theirs.flag = flag
        check(compiled, theirs, 5, 6)
    assert pcg.stats(compiled).graphs <= 3


def test_a_memory_budget_is_kept():
    def serve(budget):
        torch._dynamo.reset()
        ours, theirs = pair()
        compiled = compile_it(ours, memory_budget=budget)
        warm(compiled, theirs)
        held = []
        for n in [2, 7, 16, 3, 12] * 3:
            check(compiled, theirs, n)
            held.append(sum(runtime.nbytes() for runtime in runtimes(compiled)))
        return max(held), pcg.stats(compiled)

    most, stats = serve(None)
    assert stats.fallbacks == ()
    for budget in (1, most // 2, most - 1):
        held, stats = serve(budget)
        assert held <= budget
        assert any("memory_budget" in f.reason for f in stats.fallbacks)
    assert serve(most)[1].fallbacks == ()


def test_a_child_process_goes_on():
    """After a fork the child has captured graphs of its own on a CPU; on a GPU CUDA itself refuses."""
    ours, theirs = pair()
    compiled = compile_it(ours)
    warm(compiled, theirs)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            check(compiled, theirs, 5, 12)
            os.write(writer, b"right")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"right"
    check(compiled, theirs, 5, 12)


def test_captured_graphs_go_with_the_parameters_they_read():
    ours, theirs = pair()
    compiled = compile_it(ours)
    warm(compiled, theirs)
    for _ in range(5):
        memory = weakref.ref(ours.first.weight.untyped_storage())
        weights = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
        weights["calls"] = ours.calls
        ours.load_state_dict(weights, assign=True)
        assert memory() is None, "a captured graph keeps replaced weights in memory"
        theirs.load_state_dict(weights)
        check(compiled, theirs, 5, 3, 6)
        assert max(len(runtime.bindings) for runtime in runtimes()) == 1
    # The object stays, its memory moves.
    ours.first.weight.data = ours.first.weight.data.clone()
    check(compiled, theirs, 5, 3, 6)
    assert max(len(runtime.bindings) for runtime in runtimes()) == 1
    assert pcg.stats(compiled).replays > 0


def test_captured_graphs_go_with_the_cache_they_read():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)

        def forward(self, x):
            return self.attention(x, x + 1, x * 2) * 2

    model = Attends().eval()
    compiled = compile_it(model)
    x = torch.randn(3, 1, 4)
    results = []
    for _ in range(3):
        cache = pcg.PagedKVCache(num_layers=1, num_pages=8, page_size=4, num_kv_heads=1, head_dim=4)
        memory = weakref.ref(cache.k[0].untyped_storage())
        for _ in range(2):
            with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
                results.append(compiled(x))
        del cache
        assert memory() is None, "a captured graph keeps a cache in memory"
    assert all(torch.equal(result, results[0]) for result in results)
    assert pcg.stats(compiled).replays > 0 and not any(runtime.bindings for runtime in runtimes())
