"""What a mistake is answered with: place, cause and cure; and each cure, taken, works."""

import logging
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile import cli
from pcg_compile.errors import BatchError, Hazard, message
from pcg_compile.fx.places import name_of_input

if sys.version_info >= (3, 11):
    import tomllib

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}
ROOT = Path(__file__).resolve().parents[1]


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(dropout))])
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids):
        x = self.embed(ids)
        for part in self.parts:
            x = part(x)
        return x * self.scale


class Attention(nn.Module):
    def forward(self, x):
        share = 0.1 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=share) + 1


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(model, **options):
    return torch.compile(model, backend="pcg", options={**OPTIONS, **options}, dynamic=True)


def reasons(model):
    return [f"{f.reason} | {f.where}" for f in pcg.stats(model).fallbacks]


IDS = torch.tensor([1, 2, 3])

# -- gradients ----------------------------------------------------------------------------------------------------


def _child():
    model = Block().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.parts[0][0].bias)
    return model


@pytest.mark.parametrize(
    ("make", "args", "name"),
    [
        (_child, (IDS,), "parts.0.0.bias"),
        (lambda: lambda d: d["a"] * 2, ({"a": torch.ones(3, 4, requires_grad=True)},), "d['a']"),
    ],
)
def test_gradients_name_what_the_user_calls_it_and_are_logged_once(make, args, name, caplog, monkeypatch):
    monkeypatch.setattr("pcg_compile.uncaptured.compile_all_with_inductor", lambda gm, inputs: gm.forward)
    model = compiled(make())
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "pcg_compile"):
        for _ in range(2):
            model(*args)
        # Another size may be another graph.
        if args[0] is IDS:
            model(torch.tensor([1, 2, 3, 4, 5]))
    (text,) = set(reasons(model))
    assert f"gradients are enabled and {name} requires them" in text and "torch.inference_mode()" in text
    assert "L[" not in text and "_modules" not in text
    assert sum("gradients are enabled" in record.message for record in caplog.records) == 1
    with torch.inference_mode(), pcg.expect(model, replays=1):
        model(*args)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['embed']._parameters['weight']", "embed.weight"),
        ("L['fn']._modules['0']._modules['q_proj']._parameters['bias']", "0.q_proj.bias"),
        ("L['self']._buffers['scale']", "scale"),
        ("L['model']._modules['a.b']._parameters['w']", "a.b.w"),
        ("L['x']", "x"),
        ("L['args'][0]", "args[0]"),
        ("L['batch']['ids']", "batch['ids']"),
        ("L['batch'].ids", "batch.ids"),
        ("G['TABLE']", "TABLE"),
        ("L['self'].table", "self.table"),
        ("something else", "l_x_ is x"),
        (None, "l_x_ is x"),
    ],
)
def test_inputs_have_the_names_that_users_gave(source, name):
    node = torch.fx.Graph().placeholder("l_x_")
    if source is not None:
        node._dynamo_source = SimpleNamespace(name=source)
    assert name_of_input(node) == name.rpartition(" is ")[2]


# -- training mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "x"), [(lambda: Block(0.1), IDS), (lambda: nn.Dropout(0.5), torch.ones(3, 4)),
                    (Attention, torch.ones(3, 2, 5, 4)), (lambda: nn.Dropout1d(0.5), torch.ones(3, 4, 2))]
)  # fmt: skip
def test_training_mode_says_eval_and_eval_helps(make, x, caplog):
    model = make().train()
    fast = compiled(model)
    for _ in range(2):
        fast(x)
    assert any("training mode" in reason and "model.eval()" in reason for reason in reasons(fast)), reasons(fast)
    with pytest.raises(Exception, match=r"model\.eval\(\)"):
        compiled(model, strict=True)(x)
    torch._dynamo.reset()
    model.eval()
    fast = compiled(model, strict=True)
    fast(x)
    torch.testing.assert_close(fast(x), model(x))
    found = pcg.stats(fast)
    # Of a dropout layer alone there is nothing left.
    assert found.replays or not found.pieces
    assert not found.fallbacks


def test_check_names_dropout_of_attention():
    (hazard,) = pcg.check(Attention().train(), torch.ones(3, 2, 5, 4))
    assert hazard.kind == "rng" and "training mode" in hazard.reason and "model.eval()" in hazard.cure
    assert hazard.file == __file__ and "test_messages.py" in str(hazard).splitlines()[0]
    assert pcg.check(Attention().eval(), torch.ones(3, 2, 5, 4)) == []


# -- numbers and devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x, k: x * k, "k"), (lambda x, top: x + top * 2, "top"), (lambda x, k: torch.full_like(x, k) + x, "k")],
)
def test_an_int_that_changes_is_named_and_a_tensor_instead_is_captured(function, name):
    model = compiled(function)
    for k in (2, 3, 4):
        torch.testing.assert_close(model(torch.ones(3, 2), k), function(torch.ones(3, 2), k))
    if pcg.stats(model).fallbacks:
        (text,) = reasons(model)
        assert f"depends on {name}, a number that changes" in text and "torch.tensor(value" in text
    if "full_like" in function.__code__.co_names:
        return  # it takes no tensor
    model = compiled(function)
    x = torch.ones(3, 2)
    for k in (2, 3, 4):
        value = torch.tensor(k, device=x.device)
        torch.testing.assert_close(model(x, value), function(x, k))
    assert pcg.stats(model).replays == 3


@pytest.mark.parametrize(
    ("move", "name"),
    [
        (lambda model: (model, IDS.to("meta")), "ids"),
        (lambda model: (model.to("meta"), IDS), "embed.weight"),
        (lambda model: (model, IDS), None),
    ],
)
def test_a_tensor_on_another_device_is_named_with_both_devices(move, name):
    model, ids = move(Block().eval())
    fast = compiled(model)
    try:
        fast(ids)
    except Exception as error:
        texts = [str(error)]
    else:
        texts = reasons(fast)
    if name is None:
        assert texts == []
    else:
        assert any("meta" in text and ("cpu" in text and name in text) for text in texts), texts


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bukets": [4]}, ["unknown option 'bukets'", "Did you mean 'buckets'?"]),
        ({"nothing": 1}, ["unknown option 'nothing'", "Allowed: buckets"]),
        ({"buckets": [8, 4]}, ["'buckets': [8, 4]", "ascending"]),
        ({"strict": "yes"}, ["'strict': 'yes'", "True or False"]),
        ({"attention": "captured"}, ["'cudagraph_mode'"]),
    ],
)
def test_options_are_checked_when_a_function_is_decorated(options, parts):
    for decorate in (lambda: pcg.piecewise(**options), lambda: pcg.piecewise(**options)(torch.relu)):
        with pytest.raises(pcg.errors.OptionsError) as raised:
            decorate()
        assert all(part in str(raised.value) for part in parts)


# -- how things print ---------------------------------------------------------------------------------------------


def test_a_hazard_prints_as_one_line_then_cause_and_cure():
    hazard = Hazard("sync", "aten.item", "/a/b.py", 7, "it waits for the device", "Keep it there")
    assert str(hazard) == "/a/b.py:7: sync: aten.item\n  it waits for the device\n  Keep it there"
    assert str(Hazard("sync", "op", None, 0, "why", "cure")) == "unknown file: sync: op\n  why\n  cure"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x + x.sum(0), "mixing"),
        (lambda x: x[0].item() + x, "sync"),
        (lambda x: x + torch.tensor([5.0], device=x.device), "host copy"),
    ],
)
def test_found_hazards_begin_with_a_place_that_can_be_clicked(function, kind):
    hazards = pcg.check(function, torch.ones(3))
    first, cause, *cure = str(hazards[0]).splitlines()
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+: {kind}: \S.*", first), first
    assert cause.startswith("  ") and cure and all(line.startswith("  ") for line in cure)
    assert int(first.split(":")[1]) == function.__code__.co_firstlineno


def test_stats_print_as_a_short_table_and_keep_their_names():
    model = compiled(lambda x: x + 1)
    for n in (3, 4, 9):
        model(torch.ones(n))
    found = pcg.stats(model)
    text = str(found)
    names, counts, *_ = text.splitlines()
    assert dict(zip(names.split(), counts.split(), strict=True)) == {
        "steps": "3", "graphs": "1", "pieces": "1", "capturable": "1", "compiled": "1", "captured": "1",
        "replays": "2", "padding": "12%",
    }  # fmt: skip
    assert "bucket" in text and "a size is beyond the largest bucket, 8" in text
    assert len(text.splitlines()) == 8 and max(map(len, text.splitlines())) <= 120
    assert len(str(pcg.Stats()).splitlines()) == 2
    assert "steps=3" in repr(found) and found.steps == 3


# -- the package --------------------------------------------------------------------------------------------------


def test_the_version_is_written_in_one_place(capsys):
    assert pcg.__version__ == "0.2.0"
    project = (ROOT / "pyproject.toml").read_text()
    assert "0.2.0" not in project and 'attr = "pcg_compile.version.__version__"' in project
    assert cli.main(["version"]) == 0 and capsys.readouterr().out == "pcg-compile 0.2.0\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_command_is_declared_and_named_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"pcg-compile": "pcg_compile.cli:main"}
    extras = project["optional-dependencies"]
    folders = ("pcg_compile", "docs", "examples")
    texts = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.[pm][yd]")]
    named = set(re.findall(r"pip install '?\.\[([\w,]+)\]", "\n".join([*texts, (ROOT / "README.md").read_text()])))
    assert named and all(extra in extras for one in named for extra in one.split(","))
    # It is on no index: advice that names the distribution cannot be followed.
    assert not any("pcg-compile[" in text for text in texts)


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_the_module_runs_as_the_command(monkeypatch, capsys, argument):
    monkeypatch.setattr(sys, "argv", ["pcg_compile", argument])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("pcg_compile", run_name="__main__")
    assert raised.value.code == 0 and capsys.readouterr().out == f"pcg-compile {pcg.__version__}\n"


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["docter"])
    assert raised.value.code == 2 and "doctor" in capsys.readouterr().err


def test_an_error_of_traced_code_reaches_the_caller_without_a_graph_break():
    """Dynamo traces attention and LoRA layers, whose checks raise."""

    def check(x, ok):
        if not ok:
            raise BatchError(message("the batch is wrong", cure="Make another."))
        return x + 1

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(check, backend="pcg", fullgraph=True)
    with pytest.raises(Exception, match="Observed exception"):
        compiled(torch.ones(3), False)
    assert not torch._dynamo.utils.counters["graph_break"]
