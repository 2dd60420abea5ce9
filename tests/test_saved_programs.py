"""pcg.save and pcg.load: a program in a file runs without Dynamo and Inductor, or is refused with what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import ProgramError
from pcg_compile.saved_programs import _digest

OPTIONS = {"compiler": "eager", "buckets": [4, 8, 16]}
HEADS, DIM, VOCAB = 2, 8, 50


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        hidden = HEADS * DIM
        self.norm, self.qkv = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, 3 * hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden))
        self.attention = pcg.PagedAttention(index, HEADS, HEADS, DIM)

    def forward(self, x, positions):
        q, k, v = (part.view(-1, HEADS, DIM) for part in self.qkv(self.norm(x)).chunk(3, -1))
        turn = (positions[:, None, None] / 50).cos()
        x = x + self.attention(q * turn, k * turn, v).view(-1, HEADS * DIM)
        return x + self.mlp(x)


class Paged(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HEADS * DIM)
        self.layers = nn.ModuleList(Layer(i) for i in range(layers))

    def forward(self, ids, positions, scale: float = 1.0):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, positions)
        return {"hidden": x * scale, "rows": x.shape[0]}


class Plain(nn.Module):
    def __init__(self, width=6, eps=1e-5):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width, eps=eps), nn.Linear(width, width)

    def forward(self, x):
        return self.linear(self.norm(x)).relu()


class Other(Plain):
    def forward(self, x):
        return self.linear(self.norm(x)).sigmoid()


class Decorated(Plain):
    @pcg.piecewise(dynamic={"x": 0}, **OPTIONS)
    def forward(self, x):
        return super().forward(x)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(way, model, dynamic, **options):
    options = {**OPTIONS, **options}
    if way == "torch.compile":
        return torch.compile(model, backend="pcg", options=options, dynamic="positions" not in dynamic or None)
    return pcg.piecewise(dynamic=dynamic, guards=way, **options)(model.forward)


def saved_plain(path, way="inputs", model=None, **options):
    model = model if model is not None else Plain().eval()
    run = compiled(way, model, {"x": 0}, **options)
    for n in (3, 5):
        run(torch.randn(n, 6))
    pcg.save(run, path)
    return model


class Steps:
    """Prefills and decodes the same requests in two caches: by the model as it is, and compiled."""

    def __init__(self, model):
        self.model = model
        self.caches = [
            pcg.PagedKVCache(len(model.layers), 64, 4, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
            for _ in range(2)
        ]
        self.pages, self.lengths = {}, {}

    def __call__(self, run, new):
        for request, count in new.items():
            self.lengths[request] = self.lengths.get(request, 0) + count
            pages = self.pages.setdefault(request, [])
            while len(pages) * 4 < self.lengths[request]:
                pages += self.caches[0].allocate(1)
                assert self.caches[1].allocate(1) == pages[-1:]
        batch = pcg.Batch(list(new.values()), [self.lengths[r] for r in new], [self.pages[r] for r in new])
        ids, found = torch.randint(0, VOCAB, (batch.num_tokens,)), []
        for forward, cache in zip((self.model, run), self.caches, strict=True):
            with pcg.step(batch, cache):
                found.append(forward(ids, batch.positions))
        torch.testing.assert_close(found[1]["hidden"], found[0]["hidden"])
        assert found[1]["rows"] == found[0]["rows"]


WAYS = ["inputs", "dynamo", "torch.compile"]


@pytest.mark.parametrize("way", WAYS)
def test_a_paged_model_runs_its_program_without_dynamo(way, tmp_path):
    model = Paged().eval()
    steps = Steps(model)
    run = compiled(way, model, {"ids": 0, "positions": 0})
    steps(run, {0: 5, 1: 3})
    pcg.save(run, tmp_path / "program")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    again = pcg.load(model, tmp_path / "program")
    for new in ({0: 1, 1: 1}, {0: 1}, {2: 11, 0: 1}, {0: 1, 1: 1, 2: 1}):
        steps(again, new)
    assert not torch._dynamo.utils.counters["frames"] and not torch._dynamo.utils.counters["stats"]
    stats = pcg.stats(again)
    assert (stats.steps, stats.graphs, stats.pieces, stats.fallbacks) == (4, 1, 4, ()) and stats.replays == 16


@pytest.mark.parametrize("way", WAYS)
def test_what_load_returns_is_what_was_compiled(way, tmp_path):
    model = saved_plain(tmp_path / "program", way)
    run = pcg.load(model, tmp_path / "program", **OPTIONS)
    pcg.warmup(run, torch.randn(3, 6), progress=False)
    assert (pcg.stats(run).captured == 3 and set(pcg.stats(run).buckets) == {4, 8, 16}) or way != "inputs"
    with pcg.expect(run, graphs=0, captured=0, steps=4):
        for n in (3, 8, 2 if way == "torch.compile" else 1, 16):
            x = torch.randn(n, 6)
            torch.testing.assert_close(run(x), model(x))
    assert "piece 0" in str(pcg.explain(run, torch.randn(3, 6)))
    # Weights are the model's, and are followed.
    model.linear.weight = nn.Parameter(torch.randn(6, 6))
    model.norm.weight.data = torch.randn(6)
    x = torch.randn(5, 6)
    torch.testing.assert_close(run(x), model(x))
    pcg.reset(run)
    torch.testing.assert_close(run(x), model(x))
    # What the program is not for goes through Dynamo.
    torch.testing.assert_close(run(x.double().float().t().contiguous().t()), model(x))
    model.linear = nn.Linear(6, 6)
    torch.testing.assert_close(run(x), model(x))
    assert pcg.stats(run).fallbacks == ()
    if way == "torch.compile":
        hook = model.register_forward_hook(lambda module, args, result: result + 1)
        torch.testing.assert_close(run(x), model(x))
        hook.remove()
        assert isinstance(run, type(torch.compile(model)))


@pytest.mark.parametrize("way", WAYS)
def test_other_weights_of_the_same_form_are_used(way, tmp_path):
    saved_plain(tmp_path / "program", way)
    other = Plain().eval()
    with torch._dynamo.config.patch(disable=True):
        x = torch.randn(3, 6)
        torch.testing.assert_close(pcg.load(other, tmp_path / "program")(x), other(x))


def test_a_file_holds_no_weights(tmp_path):
    saved_plain(tmp_path / "program")
    sizes = [info.file_size for info in zipfile.ZipFile(tmp_path / "program").infolist()]
    large = Plain(512).eval()
    run = compiled("inputs", large, {"x": 0})
    run(torch.randn(3, 512))
    pcg.save(run, tmp_path / "large")
    # No weights: a megabyte of them adds nothing.
    assert abs(sum(i.file_size for i in zipfile.ZipFile(tmp_path / "large").infolist()) - sum(sizes)) < 200


def test_a_decorated_class(tmp_path):
    model = Decorated().eval()
    model(torch.randn(3, 6))
    pcg.save(model, tmp_path / "program")
    torch._dynamo.reset()
    other = Decorated().eval()
    assert pcg.load(other, tmp_path / "program") == other.forward
    torch._dynamo.utils.counters.clear()
    for n in (3, 7):
        x = torch.randn(n, 6)
        torch.testing.assert_close(other(x), Plain.forward(other, x))
    assert not torch._dynamo.utils.counters["frames"]


def _rewrite(path, change, sealed=True):
    """The file with its JSON changed, and a digest of what it holds now."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    content = json.loads(members["program.json"])
    change(content)
    members["program.json"] = json.dumps(content).encode()
    if sealed:
        members["digest"] = _digest(list(members.values())[:-1])
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


OTHERS = {
    "torch": lambda c: c["versions"].update(torch="1.0"),
    "Python": lambda c: c["versions"].update(Python="3.0"),
    "the version of pcg": lambda c: c["versions"].update(pcg="0.0"),
    "format": lambda c: c.update(format=0),
    "the device": lambda c: c.update(device={"type": "cuda", "name": "NVIDIA B9", "capability": [99, 0]}),
    "the code of forward": lambda c: c["sources"][0].__setitem__(4, "0"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_machine_version_or_code_is_refused(what, tmp_path):
    path = tmp_path / "program"
    model = saved_plain(path)
    _rewrite(path, OTHERS[what])
    if what == "the device" and torch.cuda.is_available():
        what = "the GPU"
    with pytest.raises(ProgramError, match=f"(?s){what}.*pcg.save") as caught:
        pcg.load(model, path)
    assert "\n  " in str(caught.value)


MODELS = {
    "normalized_shape=": lambda: Plain(8).eval(),
    "the model is .*Other": lambda: Other().eval(),
    "eps=": lambda: Plain(eps=1e-3).eval(),
    "training=": lambda: Plain().train(),
    "torch.float64": lambda: Plain().eval().double(),
    "the model is .*Sequential": lambda: nn.Sequential(Plain()),
    "linear.bias": lambda: _without_bias(),
}


def _without_bias():
    model = Plain().eval()
    model.linear.bias = None
    return model


@pytest.mark.parametrize("what", MODELS)
def test_another_model_is_refused(what, tmp_path):
    saved_plain(tmp_path / "program")
    with pytest.raises(ProgramError, match=what):
        pcg.load(MODELS[what](), tmp_path / "program")


class Detailed(Plain):
    limit = 1

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)

    def forward(self, x):
        x = super().forward(x) * self.limit
        if hasattr(self, "function"):
            x = self.function(x)
        if hasattr(self, "settings"):
            x = x * self.settings["scale"]
        if hasattr(self, "nested"):
            x = x * self.nested[0][0]
        if hasattr(self, "config"):
            x = x * self.config.inner.size
        return x + self.more if hasattr(self, "more") else x


def _times(factor):
    return lambda x: x * factor


def _config(size):
    return SimpleNamespace(inner=SimpleNamespace(size=size))


DETAILS = {
    "function": (lambda: _times(2), lambda: _times(3)),
    "settings": (lambda: {"scale": 2}, lambda: {"scale": 3}),
    "nested": (lambda: [[2], {"a"}], lambda: [[3], {"a"}]),
    "config": (lambda: _config(2), lambda: _config(3)),
    "more": (lambda: torch.ones(6), lambda: torch.ones(1, 6)),
}


@pytest.mark.parametrize("name", DETAILS)
@pytest.mark.parametrize("way", ["inputs", "torch.compile"])
def test_details_of_a_model_are_compared(name, way, tmp_path):
    saved, other = DETAILS[name]
    saved_plain(tmp_path / "program", way, Detailed(**{name: saved()}).eval())
    for different in (Detailed(**{name: other()}), Detailed()):
        with pytest.raises(ProgramError, match=f"{name}="):
            pcg.load(different.eval(), tmp_path / "program")
    same = Detailed(**{name: saved()}).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(pcg.load(same, tmp_path / "program")(x), same(x))


def test_hooks_inside_and_class_attributes_are_compared(tmp_path, monkeypatch):
    saved_plain(tmp_path / "program", model=Detailed().eval())
    hooked = Detailed().eval()
    hooked.linear.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(ProgramError, match="hook .*lambda"):
        pcg.load(hooked, tmp_path / "program")
    monkeypatch.setattr(Detailed, "limit", 2)
    with pytest.raises(ProgramError, match="Detailed.limit=2"):
        pcg.load(Detailed().eval(), tmp_path / "program")


def _other_op(content):
    node = next(node for node in content["graph"] if "relu" in node[1])
    node[2] = node[2].replace("relu", "tanh")


CHANGES = {
    "an op": _other_op,
    "a part": lambda content: content.pop("graph"),
    "a type": lambda content: content.update(form=17),
    "a weight's place": lambda content: content.update(weights=[]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_was_changed_is_refused(what, tmp_path):
    path = tmp_path / "program"
    model = saved_plain(path)
    _rewrite(path, CHANGES[what], sealed=False)
    with pytest.raises(ProgramError, match="damaged .*changed after it was written"):
        pcg.load(model, path)


def _adapted(folder, before=0):
    """A Llama of transformers with a pool, and a cache; ``before`` it were other pools."""
    from adapters import llama

    for _ in range(before):
        pcg.lora.AdapterPool(llama(), max_adapters=1)
    model = llama()
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=8)
    pool.load("one", folder)
    cache = pcg.PagedKVCache(2, 8, 16, num_kv_heads=2, head_dim=8)
    # Its first step shows that the model may be given packed requests: a condition of the trace.
    logits(Logits(model), cache, None, 4)
    return model, pool, cache


def logits(run, cache, adapter, n):
    batch = pcg.Batch([n], [n], [[1]], adapters=[adapter])
    with pcg.step(batch, cache):
        return run(torch.arange(n)[None], batch.positions[None])


@pytest.mark.parametrize("guards", [None, "dynamo", "inputs"])
def test_a_model_with_adapters(tmp_path, guards):
    from adapters import llama, save_with_peft

    import pcg_compile.integrations.transformers  # noqa: F401 - the attention "pcg"

    folder = save_with_peft(tmp_path / "one", llama(), r=4, target_modules=["q_proj", "v_proj"])

    model, _pool, cache = _adapted(folder)
    if guards is None:
        compiled = torch.compile(Logits(model), backend="pcg", options=OPTIONS)
    else:
        compiled = pcg.piecewise(dynamic={"ids": 1, "positions": 1}, guards=guards, **OPTIONS)(Logits(model).forward)
    want = {(name, n): logits(compiled, cache, name, n) for name in ("one", None) for n in (5, 3)}
    assert (want["one", 5] - want[None, 5]).abs().max() > 0.01
    pcg.save(compiled, tmp_path / "program")
    torch._dynamo.reset()
    # Its pool has another number.
    other, _other_pool, cache = _adapted(folder, before=1)
    wrapped = Logits(other)
    loaded = pcg.load(wrapped if guards is None else wrapped.forward, tmp_path / "program")
    torch._dynamo.utils.counters.clear()
    for (name, n), result in want.items():
        torch.testing.assert_close(logits(loaded, cache, name, n), result)
    assert not torch._dynamo.utils.counters["frames"] and pcg.stats(loaded).replays > 0
    bare = Logits(llama())
    with pytest.raises(ProgramError, match="q_proj"):
        pcg.load(bare if guards is None else bare.forward, tmp_path / "program")


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        self.eval()

    def forward(self, ids, positions):
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits


def test_other_options_are_refused(tmp_path):
    model = saved_plain(tmp_path / "program")
    with pytest.raises(ProgramError, match="option 'buckets'"):
        pcg.load(model, tmp_path / "program", buckets=[4])
    with pytest.raises(ProgramError, match="unknown option"):
        pcg.load(model, tmp_path / "program", nonsense=1)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, -1])
def test_a_damaged_file_is_refused(keep, tmp_path):
    path = tmp_path / "program"
    model = saved_plain(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ProgramError, match="damaged"):
        pcg.load(model, path)
    middle = len(data) // 3
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    with pytest.raises(ProgramError):
        pcg.load(model, path)
    with pytest.raises(FileNotFoundError):
        pcg.load(model, tmp_path / "nothing")


def _breaks(x):
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


class Settings:
    factor = 2


UNSAVABLE = {
    "not called yet": lambda: (pcg.piecewise(**OPTIONS)(Plain().forward), ()),
    "2 graphs": lambda: (pcg.piecewise(**OPTIONS)(_breaks), (torch.randn(3, 6),)),
    "neither a decorated function": lambda: (torch.compile(_breaks, backend="pcg"), ()),
    "settings is a Settings": lambda: (
        pcg.piecewise(**OPTIONS)(lambda x, settings: x * settings.factor),
        (torch.randn(3, 6), Settings()),
    ),
    "gradients": lambda: (pcg.piecewise(**OPTIONS)(Plain().forward), (torch.randn(3, 6),)),
    "the compiler": lambda: (
        pcg.piecewise(compiler=lambda gm, inputs: gm, buckets=[4])(Plain().forward),
        (torch.randn(3, 6),),
    ),
    "part of the graph": lambda: (
        pcg.piecewise(**OPTIONS)(lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))),
        (torch.randn(3, 6),),
    ),
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_what_cannot_be_saved_is_named(what, tmp_path):
    run, args = UNSAVABLE[what]()
    if args:
        with torch.set_grad_enabled(what == "gradients"):
            run(*args)
    with pytest.raises(ProgramError, match=what):
        pcg.save(run, tmp_path / "program")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        pcg.save(Plain(), tmp_path / "program")


_CHILD = """
import sys, torch
import torch._inductor.compile_fx as inductor
from tests.test_saved_programs import Paged, Steps
import pcg_compile as pcg

def refuse(*args, **kwargs):
    raise AssertionError("Inductor compiles")

inductor.fx_codegen_and_compile = refuse
torch.manual_seed(0)
with torch.no_grad():
    model = Paged(1).eval()
    steps = Steps(model)
    run = pcg.load(model, sys.argv[1])
    for new in ({0: 5, 1: 3}, {0: 1, 1: 1}, {0: 1}):
        steps(run, new)
counters = torch._dynamo.utils.counters
assert not counters["frames"] and not counters["stats"], counters
assert not counters["inductor"]["fxgraph_cache_miss"], counters
stats = pcg.stats(run)
assert stats.steps == 3 and stats.replays == 6 and stats.fallbacks == (), stats
print("done")
"""


def test_a_new_process_neither_traces_nor_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    model = Paged(1).eval()
    run = compiled("inputs", model, {"ids": 0, "positions": 0}, compiler="inductor")
    Steps(model)(run, {0: 5, 1: 3})
    pcg.save(run, tmp_path / "program")
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "second"),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "program")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "done", done.stderr[-3000:]
