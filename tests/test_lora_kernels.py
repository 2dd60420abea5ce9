"""The LoRA op against float64: Triton's kernels under its interpreter, or for real on a GPU; plain PyTorch beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from benchmarks import lora_kernels
from pcg_compile.lora import route
from pcg_compile.lora.ops import add_adapters, lora_apply
from pcg_compile.lora.packed import pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CASES = [
    # tokens, in, slices, max_rank, ranks, slots
    pytest.param(7, 24, [40], 8, [8, 3, 1], [0, 1, 2, 0, -1, 2, 0], id="mixed ranks"),
    pytest.param(5, 32, [16], 16, [16, 16], [-1] * 5, id="all base"),
    pytest.param(33, 48, [24, 8, 8], 16, [5, 16, 0, 9], [i % 5 - 1 for i in range(33)], id="fused q, k, v"),
    pytest.param(70, 130, [33, 70], 20, [20, 7], [0] * 40 + [1] * 10 + [-1] * 20, id="gate and up, long segments"),
    pytest.param(150, 64, [64], 64, [64, 1, 33], [i // 50 for i in range(150)], id="prefill"),
    pytest.param(1, 16, [16], 256, [256], [0], id="rank 256"),
    pytest.param(1100, 32, [16], 4, [4, 2], [i % 3 - 1 for i in range(1100)], id="many tokens"),
    pytest.param(20, 1100, [16], 96, [96, 65, 64, 1], [i % 5 - 1 for i in range(20)], id="a sum in parts"),
    pytest.param(40, 16, [1, 150, 16, 1], 8, [3, 7, 8], [i % 4 - 1 for i in range(40)], id="four slices, some of 1"),
]


def make(tokens, width, slices, max_rank, ranks, dtype=torch.float32, device="cpu"):
    """Factors with NaN wherever an adapter of smaller rank left another's rows."""
    adapters, out = len(ranks), sum(slices)
    a = torch.randn(adapters, len(slices) * max_rank, width)
    b = torch.randn(adapters, out, max_rank)
    for slot, rank in enumerate(ranks):
        a[slot].view(len(slices), max_rank, width)[:, rank:] = float("nan")
        b[slot, :, rank:] = float("nan")
    x, y = torch.randn(tokens, width), torch.randn(tokens, out + 3)[:, :out]
    scalings = torch.linspace(0.5, 2, adapters)
    floats = [t.to(device, dtype) for t in (x, a, b)]
    wide = torch.zeros(tokens, out + 3, dtype=dtype, device=device)
    wide[:, :out] = y.to(device, dtype)
    return wide[:, :out], *floats, scalings.to(device), torch.tensor(ranks, dtype=torch.int32, device=device)


def expected(y, x, a, b, scalings, ranks, slots, slices):
    result, max_rank = y.double().clone(), b.shape[2]
    for token, slot in enumerate(slots):
        first = 0
        for j, width in enumerate(slices if slot >= 0 else []):
            rank = int(ranks[slot])
            down = a[slot, j * max_rank : j * max_rank + rank].double()
            up = b[slot, first : first + width, :rank].double()
            result[token, first : first + width] += float(scalings[slot]) * (x[token].double() @ down.t() @ up.t())
            first += width
    return result


def check(run, tokens, width, slices, max_rank, ranks, slots, dtype=torch.float32, device="cpu", tolerance=1e-4):
    """Adapters that no token has, and rows of x that no adapter is for, hold NaN: none of it may arrive."""
    torch.manual_seed(0)
    y, x, a, b, scalings, ranks = make(tokens, width, slices, max_rank, ranks, dtype, device)
    base = torch.tensor([slot < 0 for slot in slots], device=device)
    x[base] = float("nan")
    for slot in set(range(len(ranks))) - set(slots):
        a[slot], b[slot], scalings[slot] = float("nan"), float("nan"), float("nan")
    before, beside = y.clone(), y._base[:, y.shape[1] :].clone()
    want = expected(y, x, a, b, scalings, ranks, slots, slices)
    run(y, x, a, b, scalings, ranks, *route(torch.tensor(slots, device=device), len(ranks)), slices)
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    assert torch.equal(y[base], before[base]) and torch.equal(y._base[:, y.shape[1] :], beside)


@pytest.mark.parametrize(("tokens", "width", "slices", "max_rank", "ranks", "slots"), CASES)
def test_plain(tokens, width, slices, max_rank, ranks, slots):
    check(add_adapters, tokens, width, slices, max_rank, ranks, slots)


@pytest.mark.skipif(CUDA or INTERPRETED or sys.platform != "linux", reason="the kernels run as they are")
def test_kernels_under_the_interpreter():
    """Triton decides at import whether it interprets, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "on_kernels",
    ]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def kernels(test):
    """For a GPU; the interpreter's process runs it too."""
    skip = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA GPU, or TRITON_INTERPRET=1")
    return skip(test if INTERPRETED else pytest.mark.gpu(test))


def check_many(run, widths, max_rank, ranks, slots, in_features=40, dtype=torch.float32, tolerance=1e-4, device="cpu"):
    """Layers that read one x in one call, each with ranks of its own."""
    torch.manual_seed(0)
    made = [make(len(slots), in_features, own, max_rank, of, dtype, device) for own, of in zip(widths, ranks)]
    x = made[0][1]
    x[torch.tensor([slot < 0 for slot in slots], device=device)] = float("nan")
    layers = [(y, a, b, scalings * (i + 1), of) for i, (y, _, a, b, scalings, of) in enumerate(made)]
    want = [expected(y, x, *rest, slots, own) for (y, *rest), own in zip(layers, widths)]
    run(layers, x, *route(torch.tensor(slots, device=device), len(ranks[0])), widths)
    for (y, *_), right in zip(layers, want):
        torch.testing.assert_close(y.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
        assert not y._base[:, y.shape[1] :].any()


def run_many(layers, x, permutation, seg_indptr, widths):
    packed = [pack(*rest, own) for (_, *rest), own in zip(layers, widths, strict=True)]
    factors, layouts = [one for one, _ in packed], ";".join(layout for _, layout in packed)
    torch.ops.pcg.lora_apply_many([y for y, *_ in layers], x, factors, permutation, seg_indptr, layouts)


def run_many_kernels(*args):
    from pcg_compile.lora.launch import add_adapters_on_gpu

    add_adapters_on_gpu(*args)


MANY = [
    pytest.param([[48], [16], [16]], 16, [[16, 3, 0], [0, 3, 8], [1, 0, 16]], [0, 2, 1, -1, 2, 0, 0], id="q, k, v"),
    pytest.param([[70], [33]], 20, [[20, 7], [20, 0]], [0] * 30 + [-1] * 9 + [1] * 31, id="gate and up"),
    pytest.param([[24, 8], [9], [64]], 96, [[96, 1], [65, 64], [0, 0]], [i % 3 - 1 for i in range(150)], id="slices"),
    pytest.param([[7], [1], [130], [64]], 1, [[1]] * 4, [0, -1, 0], id="four of rank 1"),
]


@pytest.mark.parametrize(("widths", "max_rank", "ranks", "slots"), MANY)
def test_several_layers(widths, max_rank, ranks, slots):
    check_many(run_many, widths, max_rank, ranks, slots)


def run_kernels(y, x, a, b, scalings, ranks, permutation, seg_indptr, slices):
    from pcg_compile.lora.launch import add_adapters_on_gpu

    add_adapters_on_gpu([(y, a, b, scalings, ranks)], x, permutation, seg_indptr, [slices])


def launches(y, x, a, b, scalings, ranks, permutation, seg_indptr, slices, overlap=None):
    from pcg_compile.lora.launch import launches

    return launches([(y, a, b, scalings, ranks)], x, permutation, seg_indptr, [slices], overlap=overlap)


@kernels
@pytest.mark.parametrize(("tokens", "width", "slices", "max_rank", "ranks", "slots"), CASES)
def test_cases_on_kernels(tokens, width, slices, max_rank, ranks, slots):
    check(run_kernels, tokens, width, slices, max_rank, ranks, slots, device=DEVICE)


@kernels
# The interpreter multiplies the bits of bfloat16 as whole numbers.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if CUDA else [])])
def test_half_precision_on_kernels(dtype):
    slots = [0, 1, -1, 1, 2, 0, 0]
    check(run_kernels, 7, 64, [48], 16, [16, 4, 9], slots, dtype=dtype, device=DEVICE, tolerance=2e-2)


mixes = st.lists(st.integers(-1, 3), min_size=1, max_size=40)


@st.composite
def four_ranks(draw, most):
    """A pool's largest rank, and what four adapters have of it; 0 is an empty slot."""
    max_rank = draw(st.sampled_from(most))
    return max_rank, draw(st.lists(st.integers(0, max_rank), min_size=4, max_size=4))


@kernels
@pytest.mark.parametrize(("widths", "max_rank", "ranks", "slots"), MANY)
def test_several_layers_on_kernels(widths, max_rank, ranks, slots):
    check_many(run_many_kernels, widths, max_rank, ranks, slots, device=DEVICE)
    check_many(run_many_kernels, widths, max_rank, ranks, slots, 1100, torch.float16, 2e-2, device=DEVICE)


@kernels
@pytest.mark.parametrize(("max_rank", "turns"), [(16, 8), (64, 2), (80, 2), (80, 8)])
def test_tiles_of_other_sizes_on_kernels(max_rank, turns):
    """Columns in several turns, the last ones beyond a layer."""
    from pcg_compile.lora.launch import Blocks, launches

    def run_tiles(layers, x, permutation, seg_indptr, widths):
        blocks = Blocks(rows=16, sum=32, splits=2, columns=16, turns=turns)
        for launch in launches(layers, x, permutation, seg_indptr, widths, blocks):
            launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)

    ranks = [[max_rank, 3, 0], [9, max_rank, 8], [1, 0, 16]]
    slots = [0] * 20 + [-1] * 3 + [2] * 3 + [1] * 5
    check_many(run_tiles, [[100], [33], [16]], max_rank, ranks, slots, 90, device=DEVICE)


@kernels
def test_more_slices_than_the_kernels_take():
    with pytest.raises(ValueError, match="at most 4 slices"):
        check_many(run_many_kernels, [[8, 8], [8, 8], [8]], 4, [[4]] * 3, [0], device=DEVICE)


@kernels
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(mixes, four_ranks([1, 8, 12, 64, 256]))
def test_random_mixes_on_kernels(slots, ranks):
    check(run_kernels, len(slots), 40, [24, 9], *ranks, slots, device=DEVICE)


@hypothesis.given(mixes, four_ranks([1, 12, 256]))
def test_random_mixes(slots, ranks):
    check(add_adapters, len(slots), 8, [6, 3], *ranks, slots)


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="needs Triton's compiler")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [64, 1000, 4000])
@pytest.mark.parametrize(("width", "slices", "max_rank"), [(2048, [2048], 64), (4096, [4096, 1024, 1], 256)])
def test_kernels_compile_for_a_gpu(tokens, width, slices, max_rank, dtype):
    """As a launch would compile them for an H100, on any machine; the shared memory of smaller GPUs is enough."""
    y, *rest = make_empty(tokens, width, slices, max_rank, dtype)
    overlap = tokens == 64
    for launch in launches(y, *rest, slices, overlap):
        compiled = compile_for_hopper(launch)
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == overlap
        assert compiled.metadata.shared <= 64 * 1024
        assert ("mma" in compiled.asm["ptx"]) == (dtype != torch.float32)
        assert ".v4" in compiled.asm["ptx"]


def make_empty(tokens, width, slices, max_rank, dtype, adapters=8):
    """Arguments of the op, up to the slices."""
    out = sum(slices)
    shapes = ((tokens, out), (tokens, width), (adapters, len(slices) * max_rank, width), (adapters, out, max_rank))
    integers = [torch.empty(n, dtype=torch.int32) for n in (adapters, tokens, adapters + 1)]
    return *(torch.empty(shape, dtype=dtype) for shape in shapes), torch.empty(adapters), *integers


def compile_for_hopper(launch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, constants, hints = dict.fromkeys(names, "constexpr"), dict(launch.constants), {}
    for i, (name, argument) in enumerate(zip(names, launch.args)):
        if isinstance(argument, torch.Tensor):
            signature[name] = "*" + TYPES.get(argument.dtype, "i32")
        elif argument == 1:
            constants[name] = 1
            continue
        else:
            signature[name] = "i32"
        if isinstance(argument, torch.Tensor) or argument % 16 == 0:
            hints[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=values, attrs=hints)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


@pytest.mark.parametrize("in_features", [1, 32, 300, 2048, 14336])
@pytest.mark.parametrize("tokens", [1, 16, 129, 1000, 4000, 100_000])
def test_every_token_and_feature_has_a_program(tokens, in_features):
    pytest.importorskip("triton")
    with torch.device("meta"):
        shrink, expand = launches(*make_empty(tokens, in_features, [100, 33], 80, torch.bfloat16), [100, 33])
    tiles, ranks, splits = shrink.grid
    h, size = shrink.args[0], shrink.args[-1]
    assert tiles == expand.grid[0] and tiles * shrink.constants["ROWS"] >= tokens + 8
    assert ranks == 2 * -(-80 // shrink.constants["RANK"]) and splits == h.shape[0] == expand.constants["SPLITS"]
    # No part of the sum is empty: what no program writes, the expand would read.
    assert (splits - 1) * size < in_features <= splits * size and size % shrink.constants["SUM"] == 0
    columns = expand.constants["COLUMNS"] * expand.constants["TURNS"]
    assert expand.grid[1] == sum(-(-width // columns) for width in (100, 33))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_one_node_for_compilers(backend):
    def function(x, w, factors, layout, *routing):
        y = x @ w
        torch.ops.pcg.lora_apply(y, x, factors, *routing, layout)
        return y + 1

    compiled = torch.compile(function, backend=backend, dynamic=True)
    for slots in ([0, 1, -1, 0], [1, 1, 0], [-1, 0, 0, 0, 1, 1]):
        _, x, *rest = make(len(slots), 5, [8], 4, [4, 2])
        routing = route(torch.tensor(slots), 2)
        w = torch.randn(5, 8)
        want = expected(x @ w, x, *rest, slots, [8]) + 1
        torch.testing.assert_close(compiled(x, w, *pack(*rest, [8]), *routing).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_several_layers_on_a_gpu():
    slots = [i % 5 - 1 for i in range(64)]
    ranks = [[16, 3, 8, 1], [0, 16, 16, 2], [5, 5, 0, 0]]
    check_many(run_many, [[512], [128], [128]], 16, ranks, slots, 512, torch.bfloat16, 3e-2, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [64, 1000, 2000])
def test_one_captured_graph_serves_every_mix(tokens):
    y, x, *parts = make(tokens, 256, [128, 64], 16, [16, 3, 8, 1], torch.bfloat16, "cuda")
    factors, layout = pack(*parts, [128, 64])
    start, routing = y.clone(), route(torch.full((tokens,), -1, device="cuda"), 4)
    lora_apply(y, x, factors, *routing, layout)
    torch.cuda.synchronize()
    assert torch.equal(y, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_apply(y, x, factors, *routing, layout)
    for seed in range(3):
        slots = torch.randint(-1, 4, (tokens,), generator=torch.Generator().manual_seed(seed))
        route(slots.cuda(), 4, out=routing)
        y.copy_(start)
        graph.replay()
        want = expected(start, x, *parts, slots.tolist(), [128, 64])
        torch.testing.assert_close(y.double(), want, rtol=0.03, atol=0.03 * float(want.abs().max()))
        assert torch.equal(y[(slots < 0).cuda()], start[(slots < 0).cuda()])


def test_benchmark_says_that_it_needs_a_gpu(tmp_path):
    lora_kernels.main(["--device", "cpu", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "lora-kernels.json").read_text())
    assert data["rows"] == [] and data["remarks"] == ["needs a CUDA GPU: nothing is timed"]


def test_benchmark_floor():
    # 4,000 tokens, 2048 -> 512, rank 16, 4 adapters: x 16.384 MB, y twice 4.096 MB, factors 0.32768 MB.
    assert lora_kernels.bytes_of(4000, 2048, 512, 16, 4) == 16_384_000 + 8_192_000 + 327_680
    assert lora_kernels.floor_us(4000, 2048, 512, 16, 4, 3.35, 800) == pytest.approx(24.90368 / 3.35)
    assert lora_kernels.floor_us(4000, 2048, 512, 16, 4, 3.35, 1) == pytest.approx(2 * 4000 * 16 * 2560 / 1e6)
    assert lora_kernels.floor_us(4000, 2048, 512, 16, 0, 3.35, 800) == 0
    # A token reads one adapter at most.
    assert lora_kernels.bytes_of(1, 8, 8, 4, 16) == 2 * (8 + 16 + 4 * 16)


@pytest.mark.parametrize(("n", "adapters"), [(64, 16), (64, 0), (200, 4), (1, 16)])
def test_benchmark_work(n, adapters):
    """As many adapters as it says have tokens, evenly; both sides of the comparison do the same."""
    work = lora_kernels.make(n, 64, 32, 4, adapters, torch.device("cpu"))
    y, *_, indptr = work.tensors
    sizes = indptr.diff()
    assert (sizes > 0).sum() == min(n, adapters) and indptr[-1] == (n if adapters else 0)
    requests = 1 if n <= 128 else 4  # of each adapter; they differ by one token at most
    assert adapters == 0 or sizes[:adapters].max() - sizes[:adapters].min() <= requests
    before = y.clone()
    add_adapters(*work.tensors, work.slices)
    assert torch.equal(y, before) == (adapters == 0)
