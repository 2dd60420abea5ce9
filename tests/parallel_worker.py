"""One rank of the tensor-parallel tests; run by test_tensor_parallel.py, two at a time. Prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pcg_compile as pcg
from pcg_compile.runtime.capture import CudaGraphs, StaticReplay

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
HIDDEN = HEADS * DIM
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CUDA = os.environ.get("PCG_TEST_DEVICE") == "cuda"
DEVICE = torch.device("cuda", RANK) if CUDA else torch.device("cpu")
ENGINE = CudaGraphs if CUDA else StaticReplay


KEPT = []


class Layer(nn.Module):
    """Attention and an MLP; each rank has its own heads."""

    def __init__(self, index, ranks):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, h * DIM, bias=False) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        self.attention = pcg.PagedAttention(index, HEADS // ranks, KV_HEADS // ranks, DIM)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (linear(y).view(x.shape[0], -1, DIM) for linear in (self.q, self.k, self.v))
        x = x + self.out(self.attention(q, k, v).flatten(1))
        return x + self.down(torch.relu(self.up(self.norm(x))))


def make(ranks, layers=LAYERS):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(i, ranks) for i in range(layers))).eval()


def parallel(mesh=None, layers=LAYERS):
    mesh = mesh or init_device_mesh(DEVICE.type, (WORLD,))
    model = make(mesh.size(), layers)
    plan = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {name: RowwiseParallel() for name in ("out", "down")}
    for layer in model:
        parallelize_module(layer, mesh, plan)
    return model


def cache(ranks):
    return pcg.PagedKVCache(LAYERS, 32, 4, num_kv_heads=KV_HEADS // ranks, head_dim=DIM)


def batches(sizes):
    """A decode request of growing length, and a prefill for the rest of the tokens."""
    for i, n in enumerate(sizes):
        lens = [1, n - 1] if n > 1 else [1]
        kv = [5 + i, n - 1][: len(lens)]
        yield n, pcg.Batch(lens, kv, [[1, 2, 3, 4, 5, 6][: -(-kv[0] // 4)], [7, 8, 9, 10]][: len(lens)])


def serve(call, kv, sizes):
    results = []
    for n, batch in batches(sizes):
        x = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n), device="cpu").to(DEVICE)
        with pcg.step(batch, kv):
            results.append(call(x))
    return results


def compiled_of(model, compiler="eager"):
    return torch.compile(model, backend="pcg", options={"compiler": compiler, "buckets": [4, 8, 16]})


SIZES = [3, 5, 6, 9, 4, 1, 16, 7]


def values(compiler="eager"):
    want = serve(make(1), cache(1), SIZES)
    compiled = compiled_of(parallel(), compiler)
    got = serve(compiled, cache(WORLD), SIZES)
    stats = pcg.stats(compiled)
    return {
        "worst": max((a - b).abs().max().item() for a, b in zip(want, got, strict=True)),
        "graphs": stats.graphs, "pieces": stats.pieces, "captured": stats.captured, "replays": stats.replays,
        "buckets": sorted(str(b) for b in stats.buckets), "fallbacks": [f.reason for f in stats.fallbacks],
    }  # fmt: skip


def capture_fails():
    """On rank 1 alone, once."""
    compiled, kv = compiled_of(parallel()), cache(WORLD)
    want = serve(make(1), cache(1), SIZES)
    record, failed = ENGINE.capture, []

    def broken(self, run, place, warm_up, pool=None, ready=lambda: None):
        if RANK == 1 and len(failed) < 1 and pool:
            failed.append(1)
            raise RuntimeError("out of memory")
        return record(self, run, place, warm_up, pool, ready)

    ENGINE.capture = broken
    got = serve(compiled, kv, SIZES)
    return {
        "worst": max((a - b).abs().max().item() for a, b in zip(want, got, strict=True)),
        "fallbacks": [f.reason for f in pcg.stats(compiled).fallbacks],
        "captured": pcg.stats(compiled).captured,
    }  # fmt: skip


def different_sizes(cases):
    """Rank 1 is called with one token more than rank 0, after calls that were alike; for each case the error."""
    errors = []
    for before, size in json.loads(cases):
        torch._dynamo.reset()
        compiled, kv = compiled_of(parallel(layers=1)), cache(WORLD)
        serve(compiled, kv, before)
        try:
            serve(compiled, kv, [size + RANK])
            errors.append(None)
        except pcg.errors.BatchError as error:
            errors.append(str(error))
        # The step after it is as before.
        serve(compiled, kv, before)
    return errors


def no_gloo():
    """Rank 1 finds no way to rank 0 but the store."""
    from pcg_compile.distributed import agreement

    def unreachable(ranks):
        raise RuntimeError("no such host")

    if RANK == 1:
        agreement.GroupMaximum = unreachable
    else:
        agreement.GroupMaximum = lambda ranks: None
    compiled, kv = compiled_of(parallel(layers=1)), cache(WORLD)
    want, got = serve(make(1, layers=1), cache(1), [3, 5, 6, 5]), serve(compiled, kv, [3, 5, 6, 5])
    result = {"worst": max((a - b).abs().max().item() for a, b in zip(want, got, strict=True))}
    try:
        serve(compiled, kv, [7 + RANK])
    except pcg.errors.BatchError as error:
        result["error"] = str(error)
    return result | {"fallbacks": [f.reason for f in pcg.stats(compiled).fallbacks]}


def dies():
    """Rank 1 ends between two steady steps."""
    compiled, kv = compiled_of(parallel(layers=1)), cache(WORLD)
    serve(compiled, kv, [3, 6, 3, 6])
    if RANK == 1:
        print("RESULT {}", flush=True)
        os._exit(0)
    try:
        serve(compiled, kv, [3, 6])
    except pcg.errors.PCGError as error:
        print("RESULT " + json.dumps({"error": str(error)}), flush=True)
    os._exit(0)


def two_by_two():
    """Two copies of a model in two parts each, which serve batches of their own."""
    mesh = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("copies", "parts"))
    compiled = compiled_of(parallel(mesh["parts"], layers=1))
    mine = [3, 5, 6, 9] if RANK < 2 else [8, 5, 2, 12, 4]
    want = serve(make(1, layers=1), cache(1), mine)
    got = serve(compiled, cache(2), mine)
    worst = max((a - b).abs().max().item() for a, b in zip(want, got, strict=True))
    return {"worst": worst, "replays": pcg.stats(compiled).replays, "steps": pcg.stats(compiled).steps}


def split_op_raises():
    @pcg.split_op("parallel::checked")
    def checked(x: torch.Tensor) -> torch.Tensor:
        if RANK == 1 and x.shape[0] == 6:
            raise ValueError("rank 1 gives up")
        return x.clone()

    model = parallel()
    compiled = compiled_of(nn.Sequential(model[0].up, nn.ReLU(), _Checked(), model[0].down))
    with torch.no_grad():
        for n in (3, 5, 6):
            try:
                compiled(torch.randn(n, HIDDEN))
            except Exception as error:
                if CUDA:
                    raise
                # A rank that is left alone hears of it from the collective.
                return {"n": n, "error": f"{type(error).__name__}: {error}"[:300]}
    if CUDA:
        torch.cuda.synchronize()
    return {"error": None}


def destroyed():
    """The process group is destroyed while somebody holds the captured graphs."""
    compiled, kv = compiled_of(parallel()), cache(WORLD)
    serve(compiled, kv, [3, 6, 3, 6])
    KEPT.extend((compiled, kv))
    stats = pcg.stats(compiled)
    return {"captured": stats.captured, "replays": stats.replays}


def kernels():
    """Names of the kernels that steady steps launch, and whether the host launched any but by replays."""
    compiled, kv = compiled_of(parallel()), cache(WORLD)
    serve(compiled, kv, [3, 6, 3, 6])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        serve(compiled, kv, [3])
        torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    return {
        "nccl": sorted({name for name in names if "nccl" in name.lower() and "kernel" in name.lower()}),
        "calls": sum("c10d" in name or "_c10d_functional" in name for name in names),
    }


class _Checked(nn.Module):
    def forward(self, x):
        return torch.ops.parallel.checked(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.set_default_device(DEVICE)
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(seconds=20))
    name, *arguments = sys.argv[1:]
    if name.startswith("adapters"):
        import parallel_adapters

        function = getattr(parallel_adapters, name)
    elif name == "generation":
        from parallel_generation import generation as function
    else:
        function = globals()[name]
    result = function(*arguments)
    print("RESULT " + json.dumps(result), flush=True)
    if name != "split_op_raises":
        dist.barrier()
        pcg.release_collectives()
        dist.destroy_process_group()
