"""What explain() and dump() say of passes, buckets, fallbacks and inserted nodes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from models import ToyLlama
from paged_model import LAYERS, Model, Traffic

import pcg_compile as pcg
from pcg_compile.fx.places import place_parts
from pcg_compile.registry import runtimes
from pcg_compile.report.items import number_range
from pcg_compile.report.render import fold, summary
from pcg_compile.torch_compat.inductor import inductor_output

OPTIONS = {"buckets": [4, 8], "compiler": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def passes_of(report):
    return {p.name: p for p in report.graphs[-1].passes}


def test_each_pass_has_a_verdict_with_reason_and_line():
    def mixed(x):
        y = torch.ops.silly.fresh(x * 2)
        return y - y.mean(0)

    report = pcg.explain(mixed, torch.randn(5, 3))
    safety = passes_of(report)["padding_safety"]
    assert safety.verdict == "1 row-wise, 1 mixing"
    assert re.match(r"piece 1: mixing: .*mean.*test_explain\.py:\d+", safety.findings[0])
    names = {"scalar_writes", "capture_hazards", "pad_metadata", "route_lora", "prepare_batch", "padding_safety"}
    assert all({p.name for p in graph.passes} == names for graph in report.graphs)


def test_hazards_are_listed_under_their_pass():
    def syncs(x, mask):
        y = torch.ops.silly.fresh(x)
        y[mask] = x[mask]
        return y * 2

    report = pcg.explain(syncs, torch.randn(4, 3), torch.tensor([True, False, True, False]))
    hazards = passes_of(report)["capture_hazards"]
    assert hazards.verdict.endswith("found") and "test_explain.py" in hazards.findings[0]
    assert "hazard" in str(report) and "test_explain.py" in report._repr_html_()


def test_rewrites_are_noted():
    traffic, model = Traffic(), Model().eval()
    batch = traffic.batch({1: 3})
    compiled = torch.compile(model, backend="pcg", options=OPTIONS)
    with pcg.step(batch, traffic.caches[0]):
        report = pcg.explain(compiled, torch.arange(3), batch.positions)
    found = passes_of(report)
    assert (
        found["prepare_batch"].verdict == "rewrote the graph" and "prepare_batch" in found["prepare_batch"].findings[0]
    )
    assert found["capture_hazards"].findings == () and found["padding_safety"].verdict == f"{LAYERS + 1} row-wise"


def test_paged_attention_is_no_hazard():
    traffic, model = Traffic(), Model().eval()
    batch = traffic.batch({1: 3})
    compiled = torch.compile(model, backend="pcg", options={**OPTIONS, "strict": True})
    with pcg.step(batch, traffic.caches[0]):
        assert pcg.check(model, torch.arange(3), batch.positions) == []
        compiled(torch.arange(3), batch.positions)


def test_buckets_and_fallbacks_are_in_every_form():
    run = pcg.piecewise(**OPTIONS)(lambda x: torch.ops.silly.fresh(x * 2).softmax(0))
    with torch.no_grad():
        for n in (3, 7, 5):
            run(torch.randn(n, 2))
    report = pcg.explain(run)
    text, markup, data = str(report), report._repr_html_(), json.loads(report.to_json())
    for form in (text, markup):
        assert "25% padding" in form and "25%" in form and "softmax" in form
    # 7 and 5 tokens in a bucket of 8.
    assert data["stats"]["buckets"]["8"]["padding"] == pytest.approx(4 / 16)
    assert data["stats"]["buckets"]["8"]["hits"] == 2 and data["stats"]["sizes"] == {"3": 1, "7": 1, "5": 1}
    assert data["stats"]["fallbacks"][0]["count"] == 3


def test_no_path_is_cut_off_and_nearby_ones_are_short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report = pcg.explain(ToyLlama(layers=1), torch.arange(3))
    flat = re.sub(r"\s+", "", str(report))
    assert "models.py" in flat and "…" not in flat and __file__.rpartition("/")[0].replace(" ", "") in flat
    monkeypatch.chdir(__file__.rpartition("/")[0])
    assert __file__.rpartition("/")[0] not in str(report)


def test_the_report_of_32_layers_fits_on_a_screen():
    compiled = torch.compile(ToyLlama(layers=32).eval(), backend="pcg", options=OPTIONS)
    with torch.no_grad():
        for n in (3, 5):
            compiled(torch.randint(0, 128, (n,)))
    report = pcg.explain(compiled)
    text = str(report)
    assert len(text.splitlines()) < 50 and max(map(len, text.splitlines())) <= 120
    # Two graphs: the first call's size became dynamic with the second.
    assert text.startswith("captured: 66 pieces (6 different), 64 split ops between them\n")
    assert text.count("piece 1-31") == text.count("layers.0-30.out .. layers.1-31") == 2 and text.count("x31") == 4
    assert "dynamic sizes: ids.shape[0]" in text and "no fallbacks" in text


@pytest.mark.parametrize(
    ("keys", "runs"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("aaa", [(0, 1, 3)]),
        ("xababaz", [(0, 1, 1), (1, 2, 2), (5, 1, 1), (6, 1, 1)]),
        ("abcabcab", [(0, 3, 2), (6, 1, 1), (7, 1, 1)]),
        ("aabaab", [(0, 3, 2)]),
    ],
)
def test_what_repeats_is_folded(keys, runs):
    assert list(fold(keys)) == runs
    assert sum(length * times for _, length, times in runs) == len(keys)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        ("layers.0.mlp", "layers.31.mlp", "layers.0-31.mlp"),
        ("layers.3", "layers.3", "layers.3"),
        ("a.0 .. b.1", "a.7 .. b.8", "a.0-7 .. b.1-8"),
        ("embed", "norm", "embed"),
    ],
)
def test_names_of_equal_layers_are_a_range(first, last, text):
    assert number_range(first, last) == text


def _cutting(x):
    y = x + 1
    print(end="")
    return y * 2


@pytest.mark.parametrize(
    ("function", "options", "calls", "cure"),
    [
        (lambda x: x + 1, {}, [9], "larger bucket"),
        (lambda x: x + 1, {"buckets": [4, 1024], "max_padding": 1.25}, [300], "suggest_buckets"),
        (lambda x: x - x.mean(0), {}, [3], "split op"),
        (lambda x: x + 1, {"memory_budget": 0}, [3, 3], "memory_budget"),
        (_cutting, {}, [3], "torch.compiler.disable"),
        (lambda x: x + 1, {"compiler": lambda gm, inputs: 1 / 0}, [3], "doctor"),
    ],
)
def test_the_summary_says_what_to_do(function, options, calls, cure):
    run = pcg.piecewise(dynamic={"x": 0}, **{**OPTIONS, **options})(function)
    with torch.no_grad():
        for n in calls:
            run(torch.ones(n, 3))
    text = "\n".join(summary(pcg.explain(run)))
    (fallback, *_) = pcg.stats(run).fallbacks
    assert fallback.reason.partition(":")[2][:30] in text and cure in text.partition("to do:")[2], text


def test_dump_has_both_graphs_the_inserted_nodes_and_named_calls(tmp_path):
    traffic, model = Traffic(), Model().eval()
    compiled = torch.compile(model, backend="pcg", options=OPTIONS)
    with pcg.dump(tmp_path):
        for qo_lens in ({1: 3}, {1: 1, 2: 4}, {1: 1, 2: 5}):
            traffic.check(model, compiled, qo_lens)
    graph = tmp_path / "graph_0"
    before, after = (graph / "dynamo.py").read_text(), (graph / "graph.py").read_text()
    assert before.count("paged_attention") >= LAYERS and "pcg.attend" not in before
    after = re.sub("# File.*", "", after)
    assert "pcg.paged_attention" not in after and after.count("pcg.attend.default") == LAYERS
    inserted = (graph / "inserted.txt").read_text()
    assert "slot_mapping" in inserted and "prepare_batch" in inserted and inserted.count("store_kv.default") == LAYERS
    calls = [line.split()[1] for line in (graph / "program_6.txt").read_text().splitlines()[1:]]
    assert [call for call in calls if call != "Load"] == [
        *("PrepareMetadata", "Replay"), *["RunSplitOp", "Replay"] * LAYERS, "Emit",
    ]  # fmt: skip
    assert not (graph / "inductor.txt").exists()
    index = (tmp_path / "index.html").read_text()
    for link in re.findall(r'href="([^"#]+)"', index):
        assert (tmp_path / unquote(link)).exists()
    assert all(f'id="{anchor}"' in index for anchor in re.findall(r'href="#([^"]+)"', index))
    assert "graph_0/program_6.txt" in index and "layers.1" in index and "src=" not in index


def test_dump_numbers_pieces_as_explain_does_and_highlights_code(tmp_path):
    run = pcg.piecewise(dynamic={"ids": 0}, **OPTIONS)(ToyLlama(layers=3).eval().forward)
    with pcg.dump(tmp_path), torch.no_grad():
        run(torch.arange(3))
    lines = (tmp_path / "graph_0" / "pieces.txt").read_text().splitlines()
    items = pcg.explain(run).graphs[0].items
    assert [line[:24].strip() for line in lines] == [item.name for item in items]
    # Two of the layers share what was compiled.
    assert {p.name for p in tmp_path.glob("graph_0/piece_*")} == {"piece_0.py", "piece_1.py", "piece_3.py"}
    assert lines[4].split()[2] == "piece_1.py" and "layers.1.out" in lines[4]
    index = (tmp_path / "index.html").read_text()
    assert '<span class="k">class</span>' in index and "Too long" not in index


@pytest.mark.parametrize("module", ["jinja2", "pygments"])
def test_without_its_libraries_dump_says_what_to_install(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}.*\n.*pip install jinja2 pygments"), pcg.dump(tmp_path):
        raise AssertionError("nothing runs that cannot be written")


def depyf_works(folder):
    """Whether this depyf can decompile what this torch compiles, pcg left aside."""
    import depyf

    plain = torch.compile(ToyLlama(layers=1).eval(), backend="eager")
    try:
        with depyf.prepare_debug(str(folder)), torch.no_grad():
            for n in (3, 5):
                plain(torch.arange(n))
    except Exception:
        return False
    return True


def test_dump_holds_what_depyf_decompiles(tmp_path):
    if not depyf_works(tmp_path / "plain"):
        pytest.skip("depyf cannot decompile what this torch and this Python make of the model without pcg")
    torch._dynamo.reset()
    compiled = torch.compile(ToyLlama(layers=1).eval(), backend="pcg", options=OPTIONS)
    with pcg.dump(tmp_path / "dump") as folder, torch.no_grad():
        for n in (3, 5):
            compiled(torch.arange(n))
    assert "depyf could not" not in (folder / "index.html").read_text()
    (full,) = (folder / "depyf").glob("full_code_for_forward*.py")
    assert "__compiled_fn" in full.read_text()


def test_dump_goes_on_where_depyf_fails(tmp_path, monkeypatch):
    import depyf

    def fails(directory):
        raise RuntimeError("no such bytecode <3")

    monkeypatch.setattr(depyf, "prepare_debug", fails)
    run = pcg.piecewise(**OPTIONS)(lambda x: torch.ops.silly.fresh(x) + 1)
    with pcg.dump(tmp_path), torch.no_grad():
        run(torch.randn(3, 2))
    index = (tmp_path / "index.html").read_text()
    assert "depyf could not start: RuntimeError: no such bytecode &lt;3" in index
    assert (tmp_path / "graph_0" / "graph.py").exists()


def test_inductors_output_is_found(tmp_path):
    run = pcg.piecewise(buckets=[4])(lambda x: torch.ops.silly.fresh(x * 2) + 1)
    with pcg.dump(tmp_path), torch.no_grad():
        run(torch.randn(3, 2))
    lines = (tmp_path / "graph_0" / "inductor.txt").read_text().splitlines()
    pieces = [item for item in runtimes(run)[0].plan.items if hasattr(item, "compiled") and not item.trivial]
    assert len(lines) == len(pieces) == 2
    for line in lines:
        script, path = line.split("  ")
        assert (tmp_path / "graph_0" / script).exists() and "def call(" in Path(path).read_text()
    assert inductor_output(lambda x: x) is None


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("/a b/model.py:7 in forward", ("/a b/model.py", 7)),
        ("/a/model.py:7", ("/a/model.py", 7)),
        ("/a/model.py:12 in <lambda> (in the library, /b/torch.py:3 in g)", ("/a/model.py", 12)),
        ("Cell In[9], line 7 in quantize: `x / 2`", ("Cell In[9]", 7)),
        ("Cell In[9], line 7: `x / 2`", ("Cell In[9]", 7)),
        ("node relu (call_function relu)", (None, 0)),
    ],
)
def test_places_are_read_back(where, parts):
    assert place_parts(where) == parts
