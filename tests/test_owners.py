"""Whose figures a call counts for: the compiled model that was called, whoever's graph serves it."""

import gc
import threading

import pytest
import torch
from torch import nn

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


class Decorated(Layer):
    @pcg.piecewise(dynamic={"x": 0}, **OPTIONS)
    def forward(self, x):
        return self.linear(x).relu()

    @pcg.piecewise(dynamic={"x": 0}, **OPTIONS)
    def encode(self, x):
        return self.linear(x) * 2


class Derived(Decorated):
    def forward(self, x):
        return super().forward(x + 1)


def compiled(function):
    return torch.compile(function, backend="pcg", options=OPTIONS)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    pcg.reset()
    with torch.no_grad():
        yield


def traffic(models, sizes=(3, 4, 7, 3, 9)):
    """Each model gets another number of calls: the first sizes, and once more for its place."""
    called = []
    for i, model in enumerate(models):
        of_model = [*sizes, *[5] * i]
        for n in of_model:
            model(torch.ones(n, 4))
        called.append(of_model)
    return called


def by_class(count):
    return [compiled(Layer()) for _ in range(count)]


def by_function(count):
    def double(x):
        return x * 2

    return [compiled(double) for _ in range(count)]


def of_one_model(count):
    model = Layer()
    return [compiled(model) for _ in range(count)]


def by_method(count):
    def one():
        model = Layer()
        model.compile(backend="pcg", options=OPTIONS)
        return model

    return [one() for _ in range(count)]


def decorated(count):
    return [Decorated() for _ in range(count)]


def derived(count):
    return [Derived() for _ in range(count)]


def decorated_functions(count):
    return [pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(Layer().forward) for _ in range(count)]


def by_a_backend_of_ones_own(count):
    from pcg_compile.backend import pcg as backend

    def mine(gm, inputs):
        return backend(gm, inputs, options=OPTIONS)

    return [torch.compile(Layer(), backend=mine) for _ in range(count)]


def breaking(count):
    def two_graphs(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    return [compiled(two_graphs) for _ in range(count)]


KINDS = [
    by_class, by_function, of_one_model, by_method, decorated, derived, decorated_functions, by_a_backend_of_ones_own,
    breaking,
]  # fmt: skip


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("make", KINDS)
def test_each_model_has_its_own_figures(make, count):
    if count > 2 and make is decorated_functions:
        pytest.skip("each has graphs of its own, and Dynamo's limit of them")
    models = make(count)
    steps, graphs, runtimes = pcg.stats().steps, pcg.stats().graphs, {id(r) for r in pcg.registry.runtimes()}
    called = traffic(models)
    for model, sizes in zip(models, called, strict=True):
        found = pcg.stats(model)
        assert found.steps == len(sizes)
        assert sum(use.hits for use in found.buckets.values()) >= sum(n <= 8 for n in sizes) > 0 and found.replays
        assert sum(f.count for f in found.fallbacks) >= sizes.count(9), found.fallbacks
    assert pcg.stats().steps - steps == sum(map(len, called))
    # Graphs that models share are counted once.
    new = {id(r) for model in models for r in pcg.registry.runtimes(model)} - runtimes
    assert pcg.stats().graphs - graphs == len(new)


@pytest.mark.parametrize("make", KINDS)
def test_expect_and_reset_are_the_models_own(make):
    first, second = make(2)
    traffic([first, second])
    with pcg.expect(second, steps=1), pcg.expect(first, steps=0, captured=0, replays=0):
        second(torch.ones(3, 4))
    before = pcg.stats(first)
    pcg.reset(second)
    assert pcg.stats(second).steps == pcg.stats(second).replays == 0 and not pcg.stats(second).fallbacks
    assert pcg.stats(first) == before
    second(torch.ones(3, 4))
    assert pcg.stats(second).steps == 1 and pcg.stats(second).captured >= 1  # again
    with pcg.expect(first, captured=0, steps=1):
        first(torch.ones(3, 4))


def test_figures_of_a_model_that_is_gone_stay_in_the_total_until_a_reset():
    before = pcg.stats(Decorated.forward).steps
    for _ in range(20):
        (model,) = decorated(1)
        model(torch.ones(3, 4))
    del model
    gc.collect()
    (last,) = decorated(1)
    last(torch.ones(3, 4))
    assert pcg.stats(Decorated.forward).steps == before + 21 and pcg.stats(last).steps == 1
    # Added up: figures of thousands of models that are gone are not kept apart.
    assert all(len(r.shared.counters._callers) == 1 for r in pcg.registry.runtimes(last))
    pcg.reset(Decorated.forward)
    assert pcg.stats(Decorated.forward).steps == 0


def test_the_budget_of_memory_is_each_models():
    options = {**OPTIONS, "memory_budget": 600}
    models = [torch.compile(Layer(), backend="pcg", options=options, dynamic=True) for _ in range(3)]
    for _ in range(2):
        for model in models:
            for n in (3, 7):
                model(torch.ones(n, 4))
    held = [pcg.registry.runtimes(models[0])[0].nbytes(r()) for r in _callers(models[0])]
    alone = torch.compile(lambda x: Layer.forward(models[0]._orig_mod, x) + 1, backend="pcg", options=OPTIONS)
    alone(torch.ones(7, 4))
    assert len(held) == 3 and 0 < max(held) <= 600 < sum(held), held
    assert not any("memory_budget" in f.reason for model in models for f in pcg.stats(model).fallbacks)


def _callers(model):
    (runtime,) = {id(r): r for r in pcg.registry.runtimes(model)}.values()
    return [figures.caller for figures in runtime.shared.counters._callers.values()]


# -- found by a module ---------------------------------------------------------------------------------------------


class Parent(nn.Module):
    def __init__(self, *children):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def _assigned():
    model = Layer()
    model.forward = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(model.forward)
    return model


def _through_a_function():
    model = Layer()
    model.fast = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(model.forward)
    return model


MODULES = {
    "decorated": lambda: Decorated(),
    "derived": lambda: Derived(),
    "assigned": _assigned,
    "parent of decorated": lambda: Parent(Decorated(), Layer(), Decorated()),
    "parent of compiled": lambda: Parent(compiled(Layer()), Layer()),
    "parent of compile()d": lambda: Parent(*by_method(2)),
    "grandparent": lambda: Parent(Parent(Decorated()), Layer()),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_is_found_by_its_decorated_or_compiled_parts(kind):
    model, other = MODULES[kind](), MODULES[kind]()
    x = torch.randn(3, 4)
    assert pcg.check(model, x) == []
    want = model(x)
    for n in (3, 5):
        model(torch.ones(n, 4))
    parts = {"parent of decorated": 2, "parent of compile()d": 2}.get(kind, 1)
    assert pcg.stats(model).steps == 3 * parts and pcg.stats(other).steps == 0
    with pcg.expect(model, steps=parts):
        torch.testing.assert_close(model(x), want)
    report = pcg.explain(model, x)
    assert report.graphs and "piece 0" in str(report) and report.stats.steps == 4 * parts
    pcg.warmup(model, x, progress=False)
    with pcg.expect(model, captured=0, steps=parts):
        model(torch.ones(8, 4))
    pcg.reset(model)
    assert pcg.stats(model).steps == 0


def test_a_bound_method_that_was_decorated_is_found_by_its_module():
    model = _through_a_function()
    model.fast(torch.ones(3, 4))
    assert pcg.stats(model).steps == 1
    other = Layer()
    fast = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(other.forward)
    fast(torch.ones(3, 4))
    assert pcg.stats(other).steps == pcg.stats(fast).steps == 1


def test_methods_have_their_own_figures_and_the_class_has_the_sum():
    one, two = Decorated(), Decorated()
    for n in (3, 4, 5):
        one(torch.ones(n, 4))
    one.encode(torch.ones(3, 4))
    two(torch.ones(3, 4))
    assert pcg.stats(one).steps == 4 and pcg.stats(two).steps == 1
    assert pcg.stats(one.forward).steps == 3 and pcg.stats(one.encode).steps == 1
    assert pcg.stats(Decorated.forward).steps == 4 and pcg.stats(Decorated.encode).steps == 1


def test_a_decorated_part_of_a_compiled_model_is_traced_with_it():
    model = compiled(Parent(Decorated(), Layer()))
    for n in (3, 4, 5):
        x = torch.randn(n, 4)
        torch.testing.assert_close(model(x), model._orig_mod.parts[1](torch.relu(model._orig_mod.parts[0].linear(x))))
    assert pcg.stats(model).steps == 3 and pcg.stats(model).pieces == pcg.stats(model).graphs


@pytest.mark.parametrize("what", [nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.ReLU()), len, 3, "m", Layer().forward])
def test_what_was_not_compiled_is_an_error_that_says_what_to_pass(what):
    for call in (pcg.stats, pcg.reset, lambda w: pcg.expect(w, steps=0).__enter__()):
        with pytest.raises(TypeError) as raised:
            call(what)
        text = str(raised.value)
        assert "was not compiled by pcg" in text and 'torch.compile(..., backend="pcg")' in text
        assert "children" in text and "\n" not in text


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("kind", ["compiled", "module", "function"])
def test_warmup_returns_nothing_and_captures_all(kind, progress):
    inner = compiled(Layer())
    model = {"compiled": inner, "module": Parent(inner), "function": lambda x: inner(x) + 1}[kind]
    assert pcg.warmup(model, torch.ones(3, 4), progress=progress) is None
    with pcg.expect(inner, captured=0, replays=3):
        for n in (3, 5, 8):
            model(torch.ones(n, 4))


# -- reports leave nothing -----------------------------------------------------------------------------------------


def test_explain_and_check_of_a_plain_model_leave_nothing_behind():
    model, before = Layer(), pcg.stats()
    graphs = len(pcg.registry.runtimes())
    for n in range(3, 13):
        report = pcg.explain(model, torch.ones(n, 4))
        assert len(report.graphs) == 1 and report.graphs[0].sizes
        assert pcg.check(model, torch.ones(n, 4)) == []
    assert pcg.stats() == before and len(pcg.registry.runtimes()) == graphs
    # Nor do they count towards Dynamo's limit of compiled versions.
    fast = compiled(model)
    for n in (3, 4, 5, 8):
        fast(torch.ones(n, 4))
    assert pcg.stats(fast).steps == 4 and pcg.stats(fast).replays


def test_explain_does_not_make_other_sizes_dynamic():
    for width in (4, 6, 8):
        report = pcg.explain(lambda x: x.relu() + 1, torch.ones(3, width))
        assert len(report.graphs[0].sizes) == 1


# -- threads -------------------------------------------------------------------------------------------------------


def test_stats_may_be_read_while_steps_run():
    models = [*by_class(2), *decorated(2)]
    for model in models:
        model(torch.ones(3, 4))
        model(torch.ones(5, 4))
    pcg.reset()
    stop, failures = threading.Event(), []

    def read():
        last = 0
        while not stop.is_set():
            try:
                total = pcg.stats()
                assert total.steps >= last
                last = total.steps
                for model in models:
                    found = pcg.stats(model)
                    # A step is counted at once.
                    assert sum(found.sizes.values()) == found.steps
                    assert (
                        sum(use.hits for use in found.buckets.values())
                        + sum(n for size, n in found.sizes.items() if size > 8)
                        == found.steps
                    )
                    str(found), repr(found)
            except Exception as error:
                failures.append(error)
                return

    def step(model):
        with torch.no_grad():
            for i in range(60):
                model(torch.ones(3 + i % 8, 4))

    reader = threading.Thread(target=read)
    threads = [threading.Thread(target=step, args=(model,)) for model in models]
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert not failures, failures
    assert [pcg.stats(model).steps for model in models] == [60] * len(models)


def test_expect_counts_fields_by_their_names_compiled_included():
    with pcg.expect(compiled=1, pieces=1, captured=1, graphs=1, steps=1):
        compiled(lambda x: x * 2)(torch.ones(4))
    with pytest.raises(TypeError, match="nonsense"), pcg.expect(nonsense=1):
        pass
    with pytest.raises(AssertionError, match=r"steps: expected \+1, counted \+0"), pcg.expect(steps=1):
        pass
