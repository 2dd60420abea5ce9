"""explain, check, dump and bucket fitting."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from models import ToyLlama

import pcg_compile as pcg
from pcg_compile.passes.scalar_writes import host_scalar_write
from pcg_compile.report.suggest import fit_buckets


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled_llama():
    return torch.compile(ToyLlama(layers=2).eval(), backend="pcg", options={"buckets": [4, 8], "compiler": "eager"})


def test_explain_lists_pieces_and_captures_nothing():
    compiled = compiled_llama()
    with pcg.expect(captured=0, steps=0):
        report = pcg.explain(compiled, torch.randint(0, 128, (3,)))
    (graph,) = report.graphs
    assert [item.kind for item in graph.items] == ["piece", "split op", "piece", "split op", "piece"]
    assert all("models.py" in item.where for item in graph.items)
    text = str(report)
    assert "silly::attention" in text and "captured" in text
    assert json.loads(report.to_json())["stats"]["pieces"] == 3


def test_explain_a_plain_function_names_what_mixes():
    report = pcg.explain(lambda x: torch.ops.silly.fresh(x).softmax(0), torch.randn(3, 4))
    piece = next(item for item in report.graphs[0].items if item.kind == "piece")
    assert "not captured" in piece.verdict and "softmax" in piece.reason and "test_reports.py" in piece.where


def test_html_is_escaped():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.ops.silly.fresh(x) + 1

    report = pcg.explain(Odd(), torch.randn(3, 4))
    markup = report._repr_html_()
    assert "<lambda>" not in markup and "<table>" in markup
    mixes = pcg.explain(lambda x: torch.ops.silly.fresh(x).softmax(0), torch.randn(3, 4))
    assert "&lt;lambda&gt;" in mixes._repr_html_() and "<lambda>" not in mixes._repr_html_()


def test_plot_draws():
    compiled = compiled_llama()
    for n in (3, 7):
        compiled(torch.randint(0, 128, (n,)))
    assert pcg.explain(compiled).plot().axes


def test_check_lists_hazards_without_compiling():
    def function(x, t):
        t[0] = 0
        return torch.ops.silly.fresh(x).sum(0) + t

    with pcg.expect(graphs=0):
        hazards = pcg.check(function, torch.randn(3, 4), torch.zeros(4))
    kinds = {hazard.kind for hazard in hazards}
    assert "mixing" in kinds and ("scalar write" in kinds) == (host_scalar_write() == "copies")
    assert all(hazard.file == __file__ and hazard.line and hazard.cure for hazard in hazards)
    found = pcg.check(lambda x: torch.ops.silly.fresh(x) + 1, torch.randn(3, 4))
    assert found == [] and str(found) == repr(found) == "nothing found"


def test_dump_is_readable_and_its_pieces_run(tmp_path):
    compiled = compiled_llama()
    with pcg.dump(tmp_path / "debug") as folder:
        for n in (3, 5):
            compiled(torch.randint(0, 128, (n,)))
    graphs = sorted(folder.glob("graph_*"))
    assert len(graphs) == 2 and (folder / "index.html").exists()
    assert any(graph.glob("program_*.txt") for graph in graphs)
    pieces = sorted(graphs[-1].glob("piece_*.py"))
    assert len(pieces) == 3
    done = subprocess.run([sys.executable, str(pieces[0])], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<lambda>" not in (folder / "index.html").read_text()


def unusual(x, p):
    """Expanded inputs, a region that is an op's argument, a function of Python's math, an op of somebody else's."""
    y = torch.utils.checkpoint.checkpoint(lambda t: (t * p).cos(), x, use_reentrant=False)
    return torch.ops.silly.fresh(torch.ops.usual.negative(y)) + math.ceil(x.shape[0] / 4) * p


@torch.library.custom_op("usual::negative", mutates_args=())
def negative(x: torch.Tensor) -> torch.Tensor:
    """-x"""
    return -x


negative.register_fake(torch.empty_like)


def test_pieces_of_every_kind_run(tmp_path):
    compiled = torch.compile(unusual, backend="pcg", options={"buckets": [4, 8], "compiler": "eager"})
    with pcg.dump(tmp_path) as folder:
        for n in (3, 5):
            compiled(torch.randn(n, 4), torch.randn(1, 4).expand(n, 4))
    scripts = sorted(folder.glob("graph_*/piece_*.py"))
    assert len(scripts) == 4
    for script in scripts:
        runpy.run_path(str(script), run_name="__main__")
    texts = "\n".join(script.read_text() for script in scripts)
    assert "# Import what defines usual.negative here." in texts and "from math import ceil" in texts


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_fitted_buckets_are_the_best(k):
    sizes = {3: 5, 4: 1, 9: 2, 17: 7, 18: 1, 40: 2}

    def cost(buckets):
        if max(buckets) < max(sizes):
            return float("inf")
        return sum(steps * min(b for b in buckets if b >= size) for size, steps in sizes.items())

    best = min(cost(c) for r in range(1, k + 1) for c in itertools.combinations(sizes, min(r, len(sizes))))
    assert cost(fit_buckets(sizes, k)) == best and len(fit_buckets(sizes, k)) <= k


def test_suggestions_follow_the_traffic():
    run = pcg.piecewise(buckets=[16], compiler="eager")(lambda x: torch.ops.silly.fresh(x) + 1)
    assert pcg.stats(run).suggest_buckets(2) == ()
    for n in (3, 3, 5, 12, 12):
        run(torch.randn(n, 2))
    assert pcg.stats(run).suggest_buckets(2) == (5, 12)
    with pytest.raises(ValueError, match="at least 1"):
        pcg.stats(run).suggest_buckets(0)
