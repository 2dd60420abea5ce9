"""The table on a GPU: the verdict is what a real capture does, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scalar_write_table import (
    COPIES,
    EAGER_ONLY,
    FINE,
    KINDS,
    MAY_BE_CAPTURED,
    ON_A_GPU,
    REJECTED,
    TABLE,
    VERDICT_OF,
    WAITS,
    function_of,
    run,
    values,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROWS = TABLE + ON_A_GPU + EAGER_ONLY
#: What the host does beside a captured graph can be captured, but a replay would not repeat it: it is isolated.
STALE = ("host[0] = 0", "host[[1, 2]] = 4")


def capture(statement: str) -> str | None:
    """Why a CUDA graph cannot capture a statement, or None if it can."""
    code = compile(statement.replace("[i, j]", "[1, 2]"), "<statement>", "exec")
    with torch.no_grad():
        exec(code, {"torch": torch, **values("cuda")})
        tensors = values("cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                exec(code, {"torch": torch, **tensors})
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            return str(error).splitlines()[0]
    return None


def _capture_rows(numbers: list[int]) -> dict[int, str | None]:
    """In processes of their own: after some failed captures a process can make no other."""
    results: dict[int, str | None] = {}
    while set(numbers) - results.keys():
        rest = [str(n) for n in numbers if n not in results]
        done = subprocess.run([sys.executable, os.path.abspath(__file__), *rest], capture_output=True, text=True)
        new = {int(k): v for k, v in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))}
        assert new, done.stderr[-2000:]
        results |= new
    return results


@pytest.fixture(scope="module")
def captured() -> dict[str, str | None]:
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(_capture_rows, [list(range(i, len(ROWS), workers)) for i in range(workers)])
        results = {k: v for part in parts for k, v in part.items()}
    return {ROWS[k][0]: why for k, why in results.items()}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("statement", "verdict"), ROWS)
def test_the_verdict_is_what_capture_does(statement, verdict, captured):
    if statement in MAY_BE_CAPTURED and captured[statement] is None:
        pytest.skip("this torch captures it; the verdict is the one of older ones")
    from pcg_compile.passes.scalar_writes import host_scalar_write

    if verdict == REJECTED and host_scalar_write() == "fills":
        verdict = FINE
    assert (captured[statement] is None) == (verdict == FINE), captured[statement]


@pytest.mark.parametrize(("statement", "verdict"), TABLE + ON_A_GPU)
def test_the_passes_on_cuda_tensors(statement, verdict):
    from hazard_tracing import traced

    from pcg_compile.passes.scalar_writes import host_scalar_write

    if verdict == REJECTED and host_scalar_write() == "fills":
        verdict = FINE
    tensors = values("cuda")
    seen = traced(function_of(statement, list(tensors)), *tensors.values())
    if statement in STALE:
        assert seen.kinds() == {"host op"} and seen.splits
        return
    verdicts = {VERDICT_OF.get(kind) for kind in seen.kinds()} or {FINE}
    assert verdict in verdicts and (verdict == FINE) == (verdicts == {FINE}), seen.hazards
    assert bool(seen.splits) == (verdict != FINE)


@pytest.mark.parametrize(("statement", "verdict"), ROWS)
def test_the_guard_on_cuda_tensors(statement, verdict):
    from pcg_compile.capture_guard import capture_guard
    from pcg_compile.passes.scalar_writes import host_scalar_write

    if verdict == REJECTED and host_scalar_write() == "fills":
        verdict = FINE
    tensors = values("cuda")
    with capture_guard("warn") as found:
        run(statement, tensors)
    assert {found[0].kind} <= KINDS[verdict] if verdict != FINE else not found, found


@pytest.mark.parametrize("statement", [row for row, verdict in TABLE + ON_A_GPU if verdict in (COPIES, WAITS)])
def test_an_isolated_statement_beside_captured_graphs(statement):
    import pcg_compile as pcg

    names = list(values("cuda"))
    statement_only = function_of(statement, names)

    def function(*arguments):
        arguments = [a.clone() if a.is_cuda else a for a in arguments]
        return [x.sin() for x in statement_only(*arguments)]

    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for seed in range(3):
            torch.manual_seed(seed)
            got = compiled(*values("cuda").values())
            torch.manual_seed(seed)
            want = function(*values("cuda").values())
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    assert pcg.stats(compiled).replays > 0


def test_the_probe_is_what_capture_does(captured):
    from pcg_compile.passes.scalar_writes import host_scalar_write

    assert (captured["t[0] = 0"] is None) == (host_scalar_write() == "fills")


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        why = capture(ROWS[number][0])
        print(json.dumps([number, why]), flush=True)
        if why is not None and not why.startswith("Cannot copy"):
            os._exit(0)
    os._exit(0)
