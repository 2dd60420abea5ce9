"""The ragged attention kernels against float64, by feature: under Triton's interpreter, or for real on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ragged_attention import FEATURES, Ragged, error, expected, random_case

from pcg_compile.attention.ragged import Tiling, tiling_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: Batches of each feature; 500 for a large run on a GPU.
SEEDS = range(int(os.environ.get("PCG_ATTENTION_BATCHES", "20" if CUDA else "1")))
#: The interpreter takes some 10 ms for a work item.
SMALL_LENGTHS = {} if CUDA else {"longest": 30, "prompt": 12}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def here(test):
    """For tests of the kernels: where Triton can run them."""
    skip = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA GPU, or TRITON_INTERPRET=1")
    return skip(test if INTERPRETED else pytest.mark.gpu(test))


@pytest.mark.skipif(CUDA or INTERPRETED or sys.platform != "linux", reason="the kernels run as they are")
def test_this_file_under_the_interpreter():
    """Triton decides when a kernel is made: a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def check(case, rows, entries, tolerance):
    kernels = Ragged(case, rows, entries)
    # Twice: a merge leaves its counters as they were.
    out, lse = kernels(times=2)
    want, want_lse = expected(case)
    n = len(case.q)
    assert error(out[:n], want) < tolerance
    assert error(lse[:n], want_lse) < max(1e-5, tolerance)
    assert out.isfinite().all() and lse.isfinite().all()


@here
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_equals_float64(feature):
    """Exact rows, rows padded by a request, and entries that no request uses."""
    for seed in SEEDS:
        case = random_case(seed + 3, **FEATURES[feature], **SMALL_LENGTHS, device=DEVICE)
        n, requests = len(case.q), len(case.qo_lens)
        pad = [0, 1, 13][seed % 3]
        tolerance = TOLERANCE[case.q.dtype] * (2 if feature.startswith("fp8") else 1)
        check(case, n + pad, requests + (pad > 0) + seed % 4, tolerance)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", ["causal", "many parts", "fp8"])
def test_dtypes(feature, dtype):
    for seed in SEEDS:
        case = random_case(seed + 3, **FEATURES[feature], **SMALL_LENGTHS, dtype=dtype, device=DEVICE)
        check(case, len(case.q) + 3, len(case.qo_lens) + 2, TOLERANCE[dtype])


@here
def test_one_grid_serves_every_batch_of_as_many_rows():
    """Nothing on the host changes from batch to batch: the lists are rewritten in place."""
    rows, entries = 40, 9
    first = Ragged(random_case(0, page_size=4, device=DEVICE), rows, entries)
    for seed in range(1, 3):
        # Longer by far than what the first one had: no maximum is baked in.
        case = random_case(seed, page_size=4, longest=50 * seed, device=DEVICE)
        if len(case.q) > rows:
            continue
        first.case = case
        out, _ = first()
        want, _ = expected(case)
        assert error(out[: len(case.q)], want) < 2e-6


@here
def test_items_of_a_batch_that_was_divided_reach_no_later_one():
    """flashinfer#4794: entries that nothing wrote, where no keys are divided."""
    tiling = Tiling(16, 16, programs=2)
    divided = random_case(3, longest=200, prompt=4, tiling=tiling, device=DEVICE)
    kernels = Ragged(divided, 20, 8)
    kernels()
    assert int((kernels.schedule.items[8:].view(-1, 8)[:, 6] > 1).sum())
    whole = random_case(4, longest=0, prompt=1, tiling=tiling, device=DEVICE)
    kernels.case = whole
    out, _ = kernels()
    number = int(kernels.schedule.items[0])
    assert int((kernels.schedule.items[8 : 8 + 8 * number].view(-1, 8)[:, 6] > 1).sum()) == 0
    assert error(out[: len(whole.q)], expected(whole)[0]) < 2e-6


@here
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_metadata_advance_as_they_would_be_written(page_size, steps):
    """The kernel alone, of more requests than one program takes; nothing beyond them is touched."""
    from pcg_compile.attention import advance_kernel

    requests, room = 200, 7
    draw = torch.Generator().manual_seed(page_size)
    positions = torch.randint(0, 50, (requests,), generator=draw)
    counts = (positions + room) // page_size + 1
    kv_indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    pages = (torch.randperm(int(counts.sum()), generator=draw) + 1).int()
    tokens = torch.full((3, 256), -7)
    tokens[1, :requests] = positions
    kv_lens = torch.full((256,), -7, dtype=torch.int32)
    kv_lens[:requests] = positions + 1
    on_device = [t.to(DEVICE) for t in (tokens, kv_lens, kv_indptr, pages)]
    advance_kernel._advance[(2,)](*on_device, requests, steps, 256, page_size, 128)
    later = positions + steps
    tokens[1, :requests], kv_lens[:requests] = later, (later + 1).int()
    tokens[0, :requests] = pages[kv_indptr[:requests] + later // page_size].long() * page_size + later % page_size
    assert torch.equal(on_device[0].cpu(), tokens) and torch.equal(on_device[1].cpu(), kv_lens)


@here
def test_keys_are_divided_where_there_are_few_tiles_and_only_there():
    few = Ragged(random_case(3, longest=200, tiling=Tiling(16, 16, programs=16), device=DEVICE), 64, 8)
    few()
    tiles = sum(-(-n // few.run.block_q) for n in (*few.case.qo_lens, 64 - len(few.case.q)))
    number = int(few.schedule.items[0])
    assert tiles < number <= few.schedule.most
    parts = few.schedule.items[8 : 8 + 8 * number].view(-1, 8)
    assert int((parts[:, 6] > 1).sum()) < few.run.slots
    slots = parts[parts[:, 6] > 1]
    assert len({int(s + p) for s, p in zip(slots[:, 7], slots[:, 5], strict=True)}) == len(slots)


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("decode", {"head_dim": 128}),
        ("mixed", {"head_dim": 96, "window": 100, "sinks": True, "spans": True}),
        ("decode", {"head_dim": 64, "kv_dtype": torch.float8_e4m3fn, "softcap": 9.0, "slopes": True}),
    ],
)
def test_kernels_compile_for_a_gpu(monkeypatch, kind, options):
    """As a launch would compile them for an H200, on any machine: what the interpreter runs, the compiler takes."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pcg_compile.attention import triton_kernels

    class Properties:
        multi_processor_count, shared_memory_per_block_optin = 132, 227 << 10

    case = random_case(0, heads=8, page_size=16, dtype=torch.bfloat16, **options)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    case.extra["tiling"] = tiling_for(
        kind, options["head_dim"], 4, 16, 64, 2, "kv_dtype" in options, torch.device("cuda", 0)
    )
    monkeypatch.undo()
    ragged = Ragged(case, len(case.q), 8)
    ragged.plan(case)
    args = ragged.run.arguments(
        ragged.schedule, ragged.call(case.k, case.v), ragged.kv_indices, ragged.workspace, ragged.spans
    )
    names, kernel = triton_kernels.attend.arg_names, triton_kernels.attend
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.float8_e4m3fn: "*fp8e4nv"}
    first = names.index("HEADS")
    signature = dict.fromkeys(names, "constexpr")
    for name, value in zip(names[:first], args[:first], strict=True):
        kinds = {float: "fp32", int: "i32"}
        signature[name] = types[value.dtype] if isinstance(value, torch.Tensor) else kinds[type(value)]
    hints = {(i,): [["tt.divisibility", 16]] for i in range(first) if names[i] not in ("scale", "softcap")}
    constants = {(first + i,): value for i, value in enumerate(args[first:])}
    tiling = case.extra["tiling"]
    compiled = compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )
    assert compiled.metadata.shared <= 227 << 10
    assert "mma" in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]
