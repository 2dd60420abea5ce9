"""What Dynamo keeps from the backend: each call is captured, or counted with a reason; under strict nothing has run."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.callback import CallbackTrigger, callback_handler

import pcg_compile as pcg
from pcg_compile.errors import OptionsError, PCGError

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Counting(nn.Module):
    """Counts its calls in a buffer, ahead of whatever may be refused."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def work(self, x):
        raise NotImplementedError

    def forward(self, x):
        self.calls.add_(1)
        return self.work(x)


class Prints(Counting):
    def work(self, x):
        y = x * 2
        print(end="")
        return y + 1


class Disabled(Counting):
    @torch._dynamo.disable
    def hidden(self, x):
        return x * 2

    def work(self, x):
        return self.hidden(x).relu()


class Reads(Counting):
    def work(self, x):
        return x * 2 if x.sum().item() > 1e9 else x - 1


class Recurrent(Counting):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 5, batch_first=True)

    def work(self, x):
        return self.layer(x[:, None])[0]


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})


class Generates(Counting):
    def forward(self, x):
        self.calls.add_(1)
        yield x * 2


REFUSED = {
    "LSTM": lambda: nn.LSTM(4, 5),
    "GRU in a module": lambda: Recurrent(nn.GRU),
    "RNN in a module": lambda: Recurrent(nn.RNN),
    "quantize_dynamic": quantized,
    "BatchNorm with an average over all steps": lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None)).train(),
    "print": Prints,
    "disabled function": Disabled,
    "item": Reads,
}


def results(value):
    return list(value) if hasattr(value, "__next__") else value


def compiled_in(way, model, **options):
    if way == "piecewise":
        return pcg.piecewise(**OPTIONS, **options)(model.forward)
    return torch.compile(model, backend="pcg", options={**OPTIONS, **options})


@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
@pytest.mark.parametrize("name", REFUSED)
def test_each_call_is_counted_and_each_reason_logged_once(name, way, caplog):
    ours, theirs = REFUSED[name](), REFUSED[name]()
    theirs.load_state_dict(ours.state_dict())
    run = compiled_in(way, ours)
    with caplog.at_level(logging.WARNING, logger="pcg_compile"):
        for n in (3, 2, 5, 3):
            x = torch.randn(n, 4)
            torch.testing.assert_close(run(x), theirs(x))
    stats = pcg.stats(run)
    # With a graph before the break a reason is counted by graph.
    assert max(fallback.count for fallback in stats.fallbacks) >= (4 if stats.graphs == 0 else 1)
    assert sum(f.count for f in stats.fallbacks) >= 4
    logged = [record.getMessage() for record in caplog.records if record.name == "pcg_compile"]
    assert len(logged) <= max(stats.graphs, len(stats.fallbacks)) + len(stats.fallbacks)
    assert all(fallback.where for fallback in stats.fallbacks if "eagerly" in fallback.reason)


@pytest.mark.parametrize("name", [*REFUSED, "generator"])
def test_strict_raises_before_anything_is_written(name):
    model = {**REFUSED, "generator": Generates}[name]()
    run = compiled_in("piecewise", model, strict=True)
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for n in (3, 2, 3):
        with pytest.raises(PCGError, match="strict"):
            results(run(torch.randn(n, 4)))
    for key, value in state.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    assert sum(fallback.count for fallback in pcg.stats(run).fallbacks) == 3


@pytest.mark.parametrize("model", [Prints, Disabled])
def test_strict_torch_compile_refuses_a_graph_that_ends_early(model):
    ours = model()
    run = compiled_in("torch.compile", ours, strict=True)
    for _ in range(2):
        with pytest.raises(PCGError, match="breaks the graph"):
            run(torch.randn(3, 4))
    assert ours.calls == 0


def test_a_generator_is_counted():
    model = Generates()
    run = compiled_in("piecewise", model)
    x = torch.randn(3, 4)
    assert [results(run(x))[0].equal(x * 2) for _ in range(2)] == [True, True]
    (fallback,) = pcg.stats(run).fallbacks
    assert fallback.count == 2 and "generator" in fallback.reason


class Configured(Counting):
    """Attributes that Dynamo makes constants of."""

    setting: object = None

    def work(self, x):
        if isinstance(self.setting, str):
            return x * len(self.setting)
        return x * float(hash(self.setting) % 7)


SETTINGS = {
    "string": ["a" * n for n in range(1, 7)],
    "int and back": [0, 1] * 2 + list(range(6)),
}


@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_limit_on_recompilations_is_counted_or_raised(name, strict, way):
    model = Configured()
    served = refused = 0
    with torch._dynamo.config.patch(recompile_limit=3):
        run = compiled_in(way, model, strict=strict)
        for setting in SETTINGS[name]:
            model.setting = setting
            x = torch.randn(3, 4)
            before = model.calls.clone()
            want = model.work(x)
            try:
                assert run(x).equal(want)
                served += 1
                assert model.calls == before + 1
            except PCGError as error:
                refused += 1
                assert "recompile_limit (3)" in str(error) and model.calls == before
    stats = pcg.stats(run)
    counted = sum(fallback.count for fallback in stats.fallbacks)
    assert stats.graphs == 3 and counted == len(SETTINGS[name]) - stats.steps > 0
    assert refused == (counted if strict else 0) and served + refused == len(SETTINGS[name])


@pytest.mark.parametrize("strict", [False, True])
def test_twenty_sizes_with_a_graph_each(strict):
    run = torch.compile(lambda x: x * 2, backend="pcg", dynamic=False, options={**OPTIONS, "strict": strict})
    refused = 0
    for n in range(1, 21):
        try:
            assert run(torch.ones(n, 4)).eq(2).all()
        except PCGError:
            refused += 1
    stats = pcg.stats(run)
    assert stats.steps + sum(fallback.count for fallback in stats.fallbacks) == 20 and stats.steps == 8
    assert refused == (12 if strict else 0)


def test_models_that_share_code_have_limits_of_their_own():
    class Layer(nn.Module):
        kind = 0

        def forward(self, x):
            return x * self.kind

    runs = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for kind in range(6):
            model = Layer()
            model.kind = kind
            runs.append(pcg.piecewise(**OPTIONS)(model.forward))
            assert runs[-1](torch.ones(3, 4)).eq(kind).all()
    assert [(pcg.stats(run).graphs, pcg.stats(run).fallbacks) for run in runs] == [(1, ())] * 6


@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
def test_a_function_that_first_computes_nothing_is_captured_later(way):
    class Sometimes(nn.Module):
        def forward(self, x, work):
            return x * 2 if work else x

    run = compiled_in(way, Sometimes())
    for work in (False, True, False, True):
        run(torch.ones(3, 4), work)
    stats = pcg.stats(run)
    assert stats.graphs == 2 and stats.replays == 2 and not stats.fallbacks


def test_calls_that_dynamo_is_told_to_leave_alone_are_counted():
    run = compiled_in("torch.compile", nn.Linear(4, 4))
    run(torch.ones(3, 4))
    torch.compiler.set_stance("force_eager")
    try:
        run(torch.ones(3, 4))
    finally:
        torch.compiler.set_stance("default")
    (fallback,) = pcg.stats(run).fallbacks
    assert fallback.count == 1 and "without any graph" in fallback.reason


MODES = ["max-autotune", "reduce-overhead", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_an_error_that_says_what_to_write(mode):
    run = torch.compile(nn.Linear(4, 4), backend="pcg", mode=mode)
    with pytest.raises(OptionsError, match='torch.compile\\(model, backend="pcg"\\)') as caught:
        run(torch.ones(3, 4))
    assert ("max_autotune" in str(caught.value)) == mode.startswith("max-autotune")


def test_a_decorated_function_is_inlined_in_another_one_that_is_compiled():
    inner = pcg.piecewise(**OPTIONS)(lambda x: x * 2)
    outer = torch.compile(lambda x: inner(x) + 1, backend="pcg", options=OPTIONS, fullgraph=True)
    assert outer(torch.ones(3, 4)).eq(3).all()
    assert pcg.stats(outer).graphs == 1 and pcg.stats(inner).graphs == 0


def test_another_thread_that_compiles_meanwhile_is_unaffected():
    """Its compile counts for Dynamo's callbacks, its settings are its own, and its tensors are not marked."""
    import torch.fx.experimental._config as shapes

    seen: list[tuple[bool, bool, bool]] = []
    inside, done = threading.Event(), threading.Event()

    def backend(gm, inputs):
        config = torch._dynamo.config
        seen.append((shapes.backed_size_oblivious, config.specialize_float, config.allow_empty_graphs))
        return gm.forward

    def other():
        with torch.no_grad(), callback_handler.install_callbacks(CallbackTrigger.CUDAGRAPH_RECORDING, "0/0"):
            inside.set()
            for n in range(2, 5):
                torch.compile(lambda x: x + 1, backend=backend)(torch.ones(n))
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    run = pcg.piecewise(**OPTIONS)(lambda x: x.relu() + 1)
    try:
        run(torch.randn(3, 4))
    finally:
        done.set()
        thread.join()
    for n in (5, 1, 7):
        run(torch.randn(n, 4))
    stats = pcg.stats(run)
    assert stats.graphs == 1 and not stats.fallbacks
    assert len(seen) >= 2 and set(seen) == {(False, False, False)}
    assert not shapes.backed_size_oblivious and not torch._dynamo.config.allow_empty_graphs


@pytest.mark.parametrize("way", ["torch.compile", "dynamic=True", "piecewise", "an error", "no graph"])
def test_code_that_runs_sees_no_setting_of_a_trace(way):
    """Not even ahead of the first graph: settings end with the trace that they are for."""
    import torch.fx.experimental._config as shapes

    seen: list[tuple[bool, ...]] = []

    @torch.compiler.disable
    def look(x):
        config = torch._dynamo.config
        marked = any(name.startswith("_dynamo_") and "dynamic" in name for name in vars(x))
        seen.append((shapes.backed_size_oblivious, config.specialize_float, config.allow_empty_graphs, marked))

    def function(x):
        look(x)
        if way == "no graph":
            return x
        y = x * 2
        look(x)
        return y.relu() + 1

    if way == "piecewise":
        run = pcg.piecewise(**OPTIONS)(function)
    elif way == "an error":
        run = torch.compile(function, backend="pcg", options={**OPTIONS, "compiler": "eager", "split_ops": ["no::op"]})
    else:
        run = torch.compile(function, backend="pcg", options=OPTIONS, dynamic=True if way == "dynamic=True" else None)
    x = torch.randn(3, 4)
    for _ in range(2):
        with contextlib.suppress(Exception):
            run(x)
    look(x)
    assert len(seen) >= 3 and set(seen) == {(False, False, False, False)}


@pytest.mark.parametrize("kind", ["size beyond the largest bucket", "overlapping arguments", "mixing piece"])
def test_strict_refuses_a_step_before_it_writes(kind):
    def function(x, y):
        x.add_(1)
        return x * 2 + y

    run = pcg.piecewise(dynamic={"x": 0, "y": 0}, strict=True, **OPTIONS)(function)
    rows = 9 if kind.startswith("size") else 3
    if kind == "mixing piece":
        run = pcg.piecewise(dynamic={"x": 0}, strict=True, **OPTIONS)(lambda x, y: x.add_(1).cumsum(0).flip(0) + y)
        y = torch.zeros(4)
    else:
        run(torch.zeros(3, 4), torch.zeros(3, 4))
        y = torch.zeros(rows, 4)
    x = torch.zeros(rows, 4)
    for _ in range(3):
        with pytest.raises(Exception, match="strict"):
            run(x, x.view(rows, 4) if kind == "overlapping arguments" else y)
    assert x.eq(0).all()


def test_a_graph_of_split_ops_alone_is_counted():
    """Nothing of it is replayed."""
    attend = torch.nn.functional.scaled_dot_product_attention
    compiled = pcg.piecewise(buckets=[4], compiler="eager")(lambda q: attend(q, q, q))
    with torch.no_grad():
        for n in (3, 2, 3):
            q = torch.randn(n, 2, 5, 4)
            torch.testing.assert_close(compiled(q), attend(q, q, q))
    stats = pcg.stats(compiled)
    (fallback,) = stats.fallbacks
    assert "split ops only" in fallback.reason and fallback.count == stats.steps == 3
