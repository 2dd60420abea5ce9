"""What is logged, and what a profiler sees."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import timeit

import pytest
import torch
from models import ToyLlama
from test_paged_model import Model, Traffic

import pcg_compile as pcg
from pcg_compile.torch_compat.profiling import profiler_records

OPTIONS = {"buckets": [4, 8], "compiler": "eager"}
IDS = torch.arange(7)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def llama():
    return pcg.piecewise(dynamic={"ids": 0}, **OPTIONS)(ToyLlama(layers=2).eval().forward)


def ranges(path):
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    events = sorted((e for e in json.loads(text)["traceEvents"] if e.get("ph") == "X"), key=lambda e: e["ts"])
    return [e["name"] for e in events if e["name"].startswith("pcg ")]


@pytest.mark.parametrize("name", ["trace.json", "folder/trace.json.gz"])
def test_a_trace_has_a_range_for_the_step_and_each_replay_and_split_op(tmp_path, name):
    run = llama()
    want = run(IDS)
    assert not profiler_records()
    with pcg.expect(run, replays=3), pcg.trace(tmp_path / name) as profiler:
        assert profiler_records()
        assert torch.equal(run(IDS), want)
    assert not profiler_records()
    attention = "pcg split op: silly::attention (layers.{})"
    assert ranges(tmp_path / name) == [
        "pcg step: 7 in bucket 8", "pcg replay: piece 0 (embed)", attention.format(0),
        "pcg replay: piece 1 (layers.0.out)", attention.format(1), "pcg replay: piece 2 (layers.1.out)",
    ]  # fmt: skip
    assert any("piece 1" in event.key for event in profiler.key_averages())


def test_a_step_that_raises_ends_its_ranges(tmp_path):
    @pcg.split_op("logs::fails")
    def fails(x: torch.Tensor) -> torch.Tensor:
        if x.sum() < 0:
            raise ValueError("as asked")
        return x + 1

    run = pcg.piecewise(dynamic={"x": 0}, **OPTIONS)(lambda x: torch.ops.logs.fails(x * 2) * 3)
    run(torch.ones(3))
    with pcg.trace(tmp_path / "t.json"):
        with pytest.raises(ValueError, match="as asked"):
            run(-torch.ones(3))
        assert torch.equal(run(torch.ones(3)), torch.full((3,), 9.0))
    assert [name for name in ranges(tmp_path / "t.json") if "step" in name] == ["pcg step: 3 in bucket 4"] * 2


def test_a_full_graph_is_named_as_one(tmp_path):
    model, traffic = Model().eval(), Traffic()
    run = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **OPTIONS, cudagraph_mode="full")(model.forward)
    for lens in ({1: 5}, {1: 3}, {1: 5}):
        traffic.check(model, run, lens)
    with pcg.trace(tmp_path / "t.json"):
        traffic.check(model, run, {1: 5})
    assert ranges(tmp_path / "t.json") == ["pcg step: 5 in bucket 8, full CUDA graph"]


def test_without_a_profiler_a_step_pays_one_look():
    assert min(timeit.repeat(profiler_records, number=1000, repeat=5)) / 1000 < 1e-6


def test_compiling_capturing_and_dropping_are_logged_once_each(caplog):
    run, small = llama(), pcg.piecewise(**OPTIONS, memory_budget=1)(lambda x: torch.ops.silly.fresh(x) + 1)
    with caplog.at_level(logging.INFO, "pcg_compile"):
        for _ in range(3):
            run(IDS)
            run(torch.arange(9))
            small(torch.ones(3, 2))
    lines = [record.getMessage() for record in caplog.records if record.name == "pcg_compile"]
    for text in (
        "compiled a graph: 3 pieces, 3 of them different",
        "captured bucket 8: 3 graphs, ",
        "bucket 4 exceeds memory_budget=1",
        "beyond the largest bucket, 8",
    ):
        assert sum(text in line for line in lines) == 1, (text, lines)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "pcg_compile"):
        llama()(IDS)
    assert any("Replay" in r.getMessage() and "piece 1" in r.getMessage() for r in caplog.records)


PROGRAM = """
import torch, pcg_compile as pcg
run = pcg.piecewise(dynamic={"x": 0}, buckets=[4], compiler="eager")(lambda x: x + 1)
with torch.no_grad():
    run(torch.ones(3))
"""


@pytest.mark.parametrize(
    ("environment", "wanted", "absent"),
    [
        ({}, [], ["compiled"]),
        ({"PCG_LOG": "info"}, ["pcg INFO: compiled a graph", "pcg INFO: captured bucket 4: 1 graphs"], ["Replay"]),
        ({"PCG_LOG": "debug"}, ["captured bucket 4", "Replay"], []),
        ({"PCG_LOG": "loud"}, ["PCG_LOG=loud is ignored: it is one of debug, info"], ["compiled"]),
        ({"TORCH_LOGS": "+pcg_compile"}, ["compiled a graph", "captured bucket 4", "Replay"], []),
    ],
)
def test_environment_variables_switch_logs_on(environment, wanted, absent):
    clean = {k: v for k, v in os.environ.items() if k not in ("PCG_LOG", "TORCH_LOGS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(done.stderr.count(text) == 1 for text in wanted if text != "Replay"), done.stderr
    assert "Replay" in done.stderr or "Replay" not in wanted
    assert not any(text in done.stderr for text in absent), done.stderr
