"""What is logged, and what a profiler sees."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import subprocess
import sys
import timeit

import pytest
import torch
from models import ToyLlama
from test_paged_model import Model, Traffic

import pcg_compile as pcg
from pcg_compile import cli
from pcg_compile.report.trace_file import read_trace
from pcg_compile.torch_compat import structured_trace
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
    assert cli.main(["explain-trace", str(tmp_path / name)]) == 0
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


def test_explain_trace_says_what_was_replayed_and_where_the_time_went(tmp_path, capsys):
    run, fixed = llama(), torch.compile(lambda x: x * 2, backend="pcg", options=OPTIONS, dynamic=False)
    for n in (7, 9):
        run(torch.arange(n))
    fixed(torch.ones(3))
    with pcg.trace(tmp_path / "t.json"):
        for n in (7, 9, 7, 5):
            run(torch.arange(n))
        fixed(torch.ones(3))
    assert cli.main(["explain-trace", str(tmp_path / "t.json")]) == 0
    text = capsys.readouterr().out
    first, host, fallback, cure, *_ = text.splitlines()
    assert first.startswith("5 steps in ") and first.endswith(
        " ms: 3 replayed piece by piece, 1 not captured, 1 the first of a size, which builds its program"
    )
    assert "host: " in host and "replays" in host and "device" not in text
    assert fallback == "  1 time: a size is beyond the largest bucket, 8" and "add a larger bucket" in cure
    table = text.partition("milliseconds a step\n")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [re.split(r"  +", line) for line in table]
    assert {row[0]: row[1] for row in rows} == {"8": "2", "exact size": "1", "first of a size": "1", "fixed size": "1"}
    assert re.search(r"replays +piece 1-2 \(layers.0-1.out\) +0.8 ", text), text
    assert re.search(r"split ops +silly::attention \(layers.0-1\) +1.2 ", text), text


def test_explain_trace_gives_kernels_to_the_step_that_launched_them(tmp_path):
    """Kineto's form of a trace on a GPU: kernels are tied to launches by their correlation."""

    def event(cat, name, ts, dur, tid=1, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}

    events = [
        event("user_annotation", "pcg step: 7 in bucket 8", 0, 100),
        event("cuda_runtime", "cudaMemcpyAsync", 5, 5, correlation=1),
        event("user_annotation", "pcg replay: piece 0 (a)", 10, 20),
        event("cuda_runtime", "cudaGraphLaunch", 12, 10, correlation=2),
        event("user_annotation", "pcg split op: x::y (a)", 40, 30),
        event("cuda_driver", "cuLaunchKernelEx", 45, 5, correlation=3),
        event("user_annotation", "pcg step: 7 in bucket 8, full CUDA graph", 200, 40),
        event("cuda_runtime", "cudaGraphLaunch", 210, 20, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 400, 5, correlation=5),
        event("gpu_memcpy", "Memcpy HtoD", 10, 10, tid=7, correlation=1),
        event("kernel", "gemm", 30, 40, tid=7, correlation=2),
        event("kernel", "norm", 70, 10, tid=7, correlation=2),
        event("kernel", "attend", 100, 20, tid=7, correlation=3),
        event("kernel", "all", 230, 70, tid=7, correlation=4),
        event("kernel", "another's", 410, 70, tid=7, correlation=5),
        # The same ranges on the device's lane are no steps.
        event("gpu_user_annotation", "pcg step: 7 in bucket 8", 10, 110, tid=7),
        {"ph": "M", "name": "process_name", "pid": 1},
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events}))
    one, whole = read_trace(path).steps
    assert (one.bucket, one.host, one.busy, one.waited) == ("8", 100, 80, 30)
    assert [(r.kind, r.host, r.device) for r in one.ranges] == [("replay", 20, 50), ("split op", 30, 20)]
    assert (whole.bucket, whole.busy) == ("8, full graph", 70)
    assert [(r.kind, r.host, r.device) for r in whole.ranges] == [("replay", 20, 70)]
    text = str(read_trace(path))
    assert "2 steps in 0.24 ms: 1 replayed piece by piece, 1 replayed as one full graph" in text
    assert "busy 62% of the time: the device waits for the host" in text and "full CUDA graph" in text


@pytest.mark.parametrize(("text", "said"), [(None, "No such file"), ("[]", "no step of pcg"), ("{}", "is no trace")])
def test_explain_trace_says_what_is_wrong_with_a_file(tmp_path, capsys, text, said):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["explain-trace", str(path)]) == (text != "[]")
    assert said in "".join(capsys.readouterr())


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


def test_torch_trace_holds_graphs_pieces_and_programs(tmp_path):
    """What tlparse reads: artifacts of the compilation 0/0, whose payloads are the lines behind them."""
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("*.log")
    found = {}
    for entry in re.split(r"^V\d{4} .*?\] ", log.read_text(), flags=re.M)[1:]:
        head, _, payload = entry.partition("\n")
        about = json.loads(head)
        name = about.get("artifact", {}).get("name", "")
        if name.startswith("pcg"):
            assert (about["frame_id"], about["frame_compile_id"]) == (0, 0)
            found[name] = payload
    assert list(found) == ["pcg_graph", "pcg_pieces", "pcg_program_4"]
    assert "add" in found["pcg_graph"] and "piece 0" in found["pcg_pieces"] and "Replay" in found["pcg_program_4"]


def test_a_torch_without_structured_traces_gets_none(monkeypatch):
    monkeypatch.setattr(structured_trace, "_trace_structured", None)
    monkeypatch.setattr(structured_trace, "_CompileContext", None)
    run = llama()
    assert torch.equal(run(IDS), run(IDS)) and structured_trace.compile_id() is None
