"""guards="inputs": calls that look like a traced one reach their graph without Dynamo; all others go through it."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8], "guards": "inputs"}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.tied = self.layers[0]
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.shift = torch.ones(6)

    def forward(self, x, factor=1.0, *, mask=None):
        for layer in self.layers:
            x = x + self.drop(layer(x)).relu()
        x = self.tied(x) * self.scale * factor + self.shift
        return x if mask is None else x * mask


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(model, **options):
    return pcg.piecewise(dynamic={"x": 0}, **{**OPTIONS, **options})(model.forward)


@contextmanager
def without_dynamo(run):
    """Fails where a call takes the way through Dynamo."""
    function = run.__pcg_function__

    def refuse(*args, **kwargs):
        raise AssertionError("a call went through Dynamo")

    way, function.compiled = function.compiled, refuse
    try:
        yield
    finally:
        function.compiled = way


def goes_without_dynamo(run, *args, **kwargs):
    try:
        with without_dynamo(run):
            run(*args, **kwargs)
    except AssertionError:
        return False
    return True


def matches(run, model, *args, **kwargs):
    torch.testing.assert_close(run(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("first", [1, 5])
def test_all_sizes_after_the_first_call(first):
    model = Model().eval()
    run = compiled(model)
    matches(run, model, torch.randn(first, 6))
    with without_dynamo(run), pcg.expect(run, steps=5, replays=4, graphs=0):
        for n in (3, 1, 8, 4, 11):
            matches(run, model, torch.randn(n, 6))
    (fallback,) = pcg.stats(run).fallbacks
    assert fallback.count == 1 and "beyond the largest bucket" in fallback.reason


def test_a_new_size_within_a_bucket_compiles_nothing():
    model = Model().eval()
    run = compiled(model)
    pcg.warmup(run, torch.randn(5, 6), progress=False)
    run(torch.randn(5, 6))
    counters = torch._dynamo.utils.counters
    counters.clear()
    with pcg.expect(run, graphs=0, compiled=0, captured=0, steps=6, replays=6):
        for n in (6, 7, 8, 3, 2, 1):
            matches(run, model, torch.randn(n, 6))
    assert not counters["frames"] and not counters["stats"]


CALLS = {
    "keyword": lambda x: ((), {"x": x}),
    "positional default": lambda x: ((x, 1.0), {}),
    "other constant": lambda x: ((x, 3.0), {}),
    "int for a float": lambda x: ((x, 1), {}),
    "mask": lambda x: ((x,), {"mask": torch.ones(6)}),
    "dtype": lambda x: ((x.double().float().t().contiguous().t(),), {}),
    "strides": lambda x: ((torch.randn(6, x.shape[0]).t(),), {}),
    "conjugate": lambda x: ((torch.randn(x.shape[0], 6, dtype=torch.complex64).conj().imag,), {}),
    "parameter": lambda x: ((nn.Parameter(x, requires_grad=False),), {}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_any_call_is_right_whatever_its_form(kind):
    model = Model().eval()
    run = compiled(model)
    run(torch.randn(3, 6))
    for n in (3, 5, 3):
        args, kwargs = CALLS[kind](torch.randn(n, 6))
        matches(run, model, *args, **kwargs)
        matches(run, model, torch.randn(n, 6))
    assert goes_without_dynamo(run, torch.randn(2, 6))
    assert goes_without_dynamo(run, torch.randn(2, 6), 1.0) and goes_without_dynamo(run, x=torch.randn(2, 6))


STATES = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a mode": lambda: torch.utils.flop_counter.FlopCounterMode(display=False),
    "a device": lambda: torch.device("cpu"),
    "a stance": lambda: torch.compiler.set_stance("force_eager"),
}


@pytest.mark.parametrize("name", STATES)
def test_other_states_of_torch_go_through_dynamo(name):
    import torch.utils.flop_counter

    model = Model().eval()
    run = compiled(model)
    x = torch.randn(3, 6)
    run(x)
    with STATES[name]():
        assert not goes_without_dynamo(run, x)
        for n in (3, 5):
            matches(run, model, torch.randn(n, 6))
    matches(run, model, x)
    assert goes_without_dynamo(run, x)


def test_training_is_noticed():
    model = Model().eval()
    run = compiled(model)
    x = torch.randn(5, 6)
    run(x)
    for part in (model, model.drop):
        part.train()
        assert not goes_without_dynamo(run, x)
        part.eval()
        assert goes_without_dynamo(run, x)


def _replace(module, name):
    setattr(module, name, nn.Parameter(torch.randn_like(getattr(module, name))))


def _move(module, name):
    getattr(module, name).data = torch.randn_like(getattr(module, name))


def _put_another_layer(model):
    model.layers[1] = nn.Linear(6, 6)


def _untie(model):
    model.tied = nn.Linear(6, 6)


def _untie_one_weight(model):
    shared = model.layers[0].weight
    model.tied.other = nn.Linear(6, 6)
    model.tied.other.weight = shared
    model.tied.weight = nn.Parameter(torch.randn(6, 6))


CHANGES = {
    "written": lambda m: m.layers[1].weight.mul_(2),
    "replaced": lambda m: _replace(m.layers[1], "weight"),
    "moved": lambda m: _move(m.layers[1], "bias"),
    "buffer of one element": lambda m: setattr(m, "scale", torch.full((1,), 2.0)),
    "then written": lambda m: (setattr(m, "scale", m.scale.clone()), m.scale.fill_(3)),
    "buffer moved": lambda m: m._buffers.update(scale=torch.full((1,), 5.0)),
    "plain attribute": lambda m: setattr(m, "shift", torch.full((6,), 4.0)),
    "layer": _put_another_layer,
    "tied layer": _untie,
    "tied weight": _untie_one_weight,
    "loaded": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change_are_noticed(name):
    model = Model().eval()
    run = compiled(model)
    for n in (3, 5):
        matches(run, model, torch.randn(n, 6))
    for _ in range(2):
        CHANGES[name](model)
        for n in (3, 5, 3):
            matches(run, model, torch.randn(n, 6))
    assert goes_without_dynamo(run, torch.randn(3, 6))
    assert not [f for f in pcg.stats(run).fallbacks if "Dynamo" in f.reason]


def test_instances_of_a_decorated_class_have_their_own_weights():
    class Decorated(Model):
        forward = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(Model.forward)

    models = [Decorated().eval() for _ in range(3)]
    for _ in range(2):
        for model in models:
            x = torch.randn(3, 6)
            torch.testing.assert_close(model(x), Model.forward(model, x))
    assert all(goes_without_dynamo(model.forward, torch.randn(5, 6)) for model in models)
    assert [pcg.stats(model).steps for model in models] == [3] * 3 and pcg.stats(Decorated.forward).graphs == 1
    alive = [weakref.ref(model.layers[1].weight) for model in models]
    del models, model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


WEIGHT = torch.ones(6)


def test_a_buffer_or_parameter_that_was_none_is_noticed():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))
            self.register_buffer("shift", None)

        def forward(self, x):
            x = x if self.scale is None else x * self.scale
            return x if self.shift is None else x + self.shift

    model = Optional()
    run = compiled(model)
    tensors = {"scale": model.scale, "shift": torch.randn(6)}
    for name, value in (
        ("scale", model.scale),
        ("shift", torch.randn(6)),
        ("scale", None),
        ("shift", None),
        *tensors.items(),
    ):
        setattr(model, name, value)
        for n in (3, 5, 3):
            matches(run, model, torch.randn(n, 6))
        assert goes_without_dynamo(run, torch.randn(2, 6))


def test_modules_in_a_closure_are_followed():
    model = Model().eval()
    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x: model(x) + 1)
    for _ in range(2):
        x = torch.randn(3, 6)
        torch.testing.assert_close(run(x), model(x) + 1)
        assert goes_without_dynamo(run, torch.randn(5, 6))
        _replace(model.layers[2], "weight")


def test_tensors_that_lie_in_no_module_go_through_dynamo(monkeypatch):
    model = nn.Linear(6, 6)

    def forward(x):
        return model(x) * WEIGHT

    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(forward)
    x = torch.randn(3, 6)
    for n in (3, 5):
        x = torch.randn(n, 6)
        torch.testing.assert_close(run(x), model(x) * WEIGHT)
    monkeypatch.setitem(globals(), "WEIGHT", torch.full((6,), 3.0))
    torch.testing.assert_close(run(x), model(x) * 3)
    assert not goes_without_dynamo(run, x)
    assert "through Dynamo: its code fetches weights" in str(pcg.explain(run, x))


def test_a_branch_on_the_size_has_a_graph_for_each_side():
    model = nn.Linear(6, 6)
    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x: model(x) * 2 if x.shape[0] > 4 else model(x) - 1)
    for n in (3, 7):
        run(torch.randn(n, 6))
    with without_dynamo(run):
        for n in (2, 8, 4, 5, 1):
            x = torch.randn(n, 6)
            torch.testing.assert_close(run(x), model(x) * 2 if n > 4 else model(x) - 1)
    assert pcg.stats(run).graphs == 2


def test_results_and_effects_are_those_of_the_function():
    class Effects(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.last = None

        def forward(self, xs, seen):
            self.last = xs["x"] * 2
            seen.append(xs["x"].shape[0])
            xs["x"].add_(1)
            return {"y": [self.linear(xs["x"]), None], "n": xs["x"].shape[0], "same": xs["x"]}

    model = Effects()
    run = pcg.piecewise(dynamic={"xs": 0}, **OPTIONS)(model.forward)
    for n in (3, 5, 3):
        x, seen = torch.randn(n, 6), []
        want = x + 1
        got = run({"x": x}, seen)
        torch.testing.assert_close(got["y"][0], model.linear(want))
        torch.testing.assert_close(model.last, (want - 1) * 2)
        assert got["same"] is x and got["n"] == n and seen == [n] and x.equal(want)
    assert goes_without_dynamo(run, {"x": torch.randn(4, 6)}, [])
    assert not goes_without_dynamo(run, {"x": torch.randn(4, 6), "z": 1}, [])


def test_objects_of_ones_own_go_through_dynamo():
    class Settings:
        factor = 2

    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x, settings: x * settings.factor)
    settings = Settings()
    for factor in (2, 3):
        settings.factor = factor
        assert run(torch.ones(3, 6), settings).eq(factor).all()
    assert "settings is a Settings" in run.__pcg_function__.slow


def test_one_tensor_for_two_arguments_is_not_two():
    def function(x, y):
        x.add_(1)
        return x * y

    run = pcg.piecewise(dynamic={"x": 0, "y": 0}, **OPTIONS)(function)
    for same in (False, True, False):
        x, y = torch.full((3, 4), 2.0), torch.full((3, 4), 2.0)
        assert run(x, x if same else y).eq(9 if same else 6).all()


FUNCTIONS = {
    "a branch on whether the size is even": lambda x, n: x * 2 if x.shape[0] % 2 == 0 else x * 3,
    "a branch on whether an int is the size": lambda x, n: x * 2 if x.shape[0] == n else x * 3,
    "a branch on an int": lambda x, n: x * 2 + n if n == 7 else x * n,
    "a branch on a sum": lambda x, n: x * 2 if x.shape[0] + n == 8 else x * 3,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_trace_found_of_sizes_and_ints_is_compared(name):
    function = FUNCTIONS[name]
    run = pcg.piecewise(**OPTIONS)(function)
    numbers = [(4, 4), (5, 5), (3, 3), (3, 7), (6, 7), (6, 2), (5, 3), (2, 5), (7, 1), (1, 7), (4, 4)]
    for n, number in [*((n, 9) for n in (4, 3, 2, 5)), *numbers]:
        x = torch.randn(n, 6)
        torch.testing.assert_close(run(x, number), function(x, number))


def test_one_list_for_two_arguments_is_not_two():
    def function(x, a, b):
        a.append(1)
        b.append(2)
        return x * len(a)

    run = pcg.piecewise(**OPTIONS)(function)
    x, both = torch.randn(3, 6), []
    assert run(x, both, both).equal(x * 2)
    for _ in range(2):
        a, b = [], []
        assert run(x, a, b).equal(x) and (a, b) == ([1], [2])


class Configured(nn.Module):
    def __init__(self, layers=2, factor=1, activation=nn.ReLU):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.activation, self.factor = activation(), factor

    def forward(self, x):
        for layer in self.layers:
            x = self.activation(layer(x)) * self.factor
        return x


class Tied(Configured):
    def __init__(self):
        super().__init__()
        self.layers[1] = self.layers[0]


OTHERS = {
    "more layers": lambda: Configured(3),
    "fewer layers": lambda: Configured(1),
    "a factor": lambda: Configured(factor=3),
    "a child": lambda: Configured(activation=nn.Sigmoid),
    "tied weights": Tied,
}


@pytest.mark.parametrize("way", ["method", "argument", "keyword"])
@pytest.mark.parametrize("name", OTHERS)
def test_modules_that_differ_in_more_than_weights_have_graphs_of_their_own(name, way):
    if way == "method":
        decorated = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(Configured.forward)
        run = lambda model, x: decorated(model, x)
    else:
        decorated = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda model, x: model(x))
        run = lambda model, x: decorated(model, x) if way == "argument" else decorated(model=model, x=x)
    models = [Configured(), OTHERS[name](), Configured()]
    for n in (3, 5, 3):
        for model in models:
            x = torch.randn(n, 6)
            torch.testing.assert_close(run(model, x), model(x))


def test_an_object_that_is_no_module_is_compared():
    class Runner:
        def __init__(self, factor):
            self.factor, self.model = factor, nn.Linear(6, 6)

        def plain(self, x):
            return self.model(x) * self.factor

        step = pcg.piecewise(**OPTIONS)(plain)

    runners = [Runner(2), Runner(3)]
    runs = [runner.step for runner in runners] + [pcg.piecewise(**OPTIONS)(runners[0].plain)]
    for _ in range(3):
        for runner, run in zip((*runners, runners[0]), runs, strict=True):
            x = torch.randn(3, 6)
            torch.testing.assert_close(run(x), runner.plain(x))
        runners[0].factor, runners[0].model = runners[0].factor + 5, nn.Linear(6, 6)


def test_a_module_in_a_closure_that_is_replaced_is_noticed():
    model = nn.Linear(6, 6)
    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x: model(x) + 1)
    for _ in range(3):
        for n in (3, 5):
            x = torch.randn(n, 6)
            torch.testing.assert_close(run(x), model(x) + 1)
        assert goes_without_dynamo(run, torch.randn(2, 6))
        model = nn.Linear(6, 6)


def test_weights_that_require_gradients_later_are_noticed():
    model = Model().eval().requires_grad_(False)
    run = compiled(model)
    x = torch.randn(3, 6)
    with torch.enable_grad():
        for trained in (False, True, False):
            model.requires_grad_(trained)
            assert run(x).requires_grad is trained and run(x).requires_grad is trained
        model.requires_grad_(True)
        run(x).sum().backward()
    assert model.layers[1].weight.grad is not None


def test_a_reset_of_dynamo_traces_again():
    model = Model().eval()
    run = compiled(model)
    run(torch.randn(3, 6))
    torch._dynamo.reset()
    assert not goes_without_dynamo(run, torch.randn(3, 6))
    matches(run, model, torch.randn(3, 6))
    assert goes_without_dynamo(run, torch.randn(3, 6))


def test_strict_lets_nothing_run_without_a_graph():
    model = Model().eval()
    run = compiled(model, strict=True, buckets=[8])
    run(torch.randn(3, 6))
    with without_dynamo(run), pytest.raises(pcg.errors.PCGError, match="beyond the largest bucket"):
        run(torch.randn(9, 6))


@pytest.mark.parametrize("guards", ["inputs", "dynamo"])
def test_explain_says_how_long_a_call_takes_to_its_graph(guards):
    model = Model().eval()
    run = compiled(model, guards=guards)
    report = pcg.explain(run, torch.randn(3, 6))
    (graph,) = report.graphs
    assert 0 < graph.entry_seconds < 1
    way = "without Dynamo" if guards == "inputs" else "through Dynamo, which evaluates its guards"
    assert graph.entry == way and f"us from the call to the graph, {way}" in " ".join(str(report).split())


def test_arguments_are_loaded_before_weights_are_compared(monkeypatch):
    from pcg_compile.registry import runtimes
    from pcg_compile.weights import Weights

    model = Model().eval()
    run = compiled(model)
    x = torch.randn(3, 6)
    run(x)
    (runtime,) = runtimes(run)
    (program,) = runtime.current.steps.values()
    done, known = [], Weights.known

    def compared(weights, module):
        done.append("weights")
        return known(weights, module)

    monkeypatch.setattr(Weights, "known", compared)
    program._load_calls = (lambda: done.append("loads"), *program._load_calls)
    program.body.calls = (lambda: done.append("replay"), *program.body.calls)
    with without_dynamo(run):
        matches(run, model, x)
    assert done == ["loads", "weights", "replay"]
    done.clear()
    # The captured graphs that read the old memory are not replayed.
    model.shift.data = torch.full((6,), 3.0)
    with without_dynamo(run):
        matches(run, model, x)
    assert done == ["loads", "weights", "weights"]
    done.clear()
    model.layers[1].weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    matches(run, model, x)
    assert "replay" not in done and goes_without_dynamo(run, x)


def test_two_traces_of_one_form_serve_in_turns():
    model = Model()
    run = compiled(model)
    for n in (3, 5, 2):
        for training in (True, False):
            model.train(training)
            x = torch.randn(n, 6)
            torch.manual_seed(n)
            got = run(x)
            torch.manual_seed(n)
            torch.testing.assert_close(got, model(x))
    with without_dynamo(run):
        for training in (True, False, True):
            run(torch.randn(4, 6)) if model.train(training) else None
    assert pcg.stats(run).steps == 9
