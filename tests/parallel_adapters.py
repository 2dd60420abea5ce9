"""What one rank does in the tests of adapters on models in parts; run by parallel_worker.py."""

from __future__ import annotations

from pathlib import Path

import torch
from parallel_worker import DEVICE, HIDDEN, WORLD, cache, compiled_of, make, parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pcg_compile as pcg
from pcg_compile.errors import AdapterError

#: What each request of a batch names; c is loaded while serving.
MIX, LATER = ["a", None, "b"], ["c", "a", None]
#: Tokens of the requests, for all buckets.
LENGTHS = [[5, 3, 4], [1, 1, 1], [2, 3, 1], [1, 1, 2], [1, 3, 3]]


def worst(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def pool_of(model, root, names="ab", **options):
    options = {"target_modules": ["q", "k", "v", "out", "up", "down"], **options}
    pool = pcg.lora.AdapterPool(model, max_adapters=3, max_rank=8, **options)
    for name in names:
        pool.load(name, Path(root) / name)
    return pool


def batches(mix, lengths=LENGTHS):
    for lens in lengths:
        yield sum(lens), pcg.Batch(lens, lens, [[1, 2], [3, 4], [5, 6]], adapters=mix)


def serve(call, kv, mix):
    results = []
    for n, batch in batches(mix):
        x = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n), device="cpu").to(DEVICE)
        # One graph for all sizes.
        torch._dynamo.mark_dynamic(x, 0)
        with pcg.step(batch, kv):
            results.append(call(x))
    return results


def serve_tokens(call, kv, mix, lengths=LENGTHS):
    results = []
    for n, batch in batches(mix, lengths):
        ids = torch.arange(n)[None]
        with pcg.step(batch, kv):
            results.append(call(input_ids=ids, position_ids=batch.positions[None]).logits[0])
    return results


def another(pool, root, compiled, kv, serve, want):
    """Loads an adapter while serving; ``want``: results for LATER, and of the base model."""
    with pcg.expect(compiled, graphs=0, captured=0):
        pool.load("c", Path(root) / "c")
        later, base = serve(compiled, kv, LATER), serve(compiled, kv, [None] * 3)
    stats = pcg.stats(compiled)
    pool.unload("c")
    return {
        "another": worst(want[0], later), "base": worst(want[1], base),
        "graphs": stats.graphs, "pieces": stats.pieces, "replays": stats.replays,
        "fallbacks": [f.reason for f in stats.fallbacks],
    }  # fmt: skip


def wanted(model, serve, pool):
    """Results of one process for MIX, LATER and the base model."""
    found = [serve(model, cache(1), mix) for mix in (MIX, LATER, [None] * 3)]
    pool.close()
    return found


def adapters(root):
    """Adapters on all layers of a model in parts, and on layers that are split in other ways."""
    whole = make(1)
    want = wanted(whole, serve, pool_of(whole, root, "abc"))
    model = parallel()
    pool = pool_of(model, root)
    found = {"uncompiled": worst(want[0], serve(model, cache(WORLD), MIX)), "apart": worst(want[2], want[0])}
    for compiler in ("eager", "inductor"):
        compiled, kv = compiled_of(model, compiler), cache(WORLD)
        mixed = worst(want[0], serve(compiled, kv, MIX))
        found[compiler] = {"mixed": mixed, **another(pool, root, compiled, kv, serve, want[1:])}
    return {**found, "styles": layouts(root), "refused": refusals(root)}


def adapters_on_a_plan(folder, root):
    """transformers' own plan: each rank loads its part of a saved model, and compiles it before its pool is made."""
    from transformers import AutoModelForCausalLM

    import pcg_compile.integrations.transformers  # noqa: F401 - registers the attention

    options = {"attn_implementation": "pcg", "dtype": torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(folder, **options).eval().to(DEVICE)
    want = wanted(whole, serve_tokens, pool_of(whole, root, "abc", target_modules="all-linear"))
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **options).eval()
    compiled, kv = compiled_of(model), cache(WORLD)
    found = {"before": worst(want[2][:1], serve_tokens(compiled, kv, [None] * 3, LENGTHS[:1]))}
    forwards = [module.forward for module in model.modules()]
    pool = pool_of(model, root, target_modules="all-linear")
    found |= {"uncompiled": worst(want[0], serve_tokens(model, cache(WORLD), MIX)), "apart": worst(want[2], want[0])}
    # The second size comes first: a graph for all sizes, at once.
    lengths = [*LENGTHS[1:], LENGTHS[0]]
    mixed = worst([*want[0][1:], want[0][0]], serve_tokens(compiled, kv, MIX, lengths))
    found["eager"] = {"mixed": mixed, **another(pool, root, compiled, kv, serve_tokens, want[1:])}
    pool.close()
    assert forwards == [module.forward for module in model.modules()]
    return found


class Styles(nn.Module):
    """Layers whose sizes no number of ranks divides, and one fused of three."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.back = nn.Linear(6, 16), nn.Linear(16, 6)
        self.wide, self.narrow = nn.Linear(6, 7), nn.Linear(7, 6)
        self.one, self.gathered, self.split = nn.Linear(6, 1), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = x + self.back(torch.relu(self.qkv(x)))
        x = x + self.narrow(torch.relu(self.wide(x)))
        return x + self.split(self.gathered(x))


FUSED = {"qkv": {"q": 8, "k": 4, "v": 4}}
NAMES = ["qkv", "back", "wide", "narrow", "gathered", "split"]


def mesh():
    return init_device_mesh(DEVICE.type, (WORLD,))


def styled():
    """The same in parts: uneven ones, DTensors between layers, tokens that are split."""
    plan = {
        "qkv": ColwiseParallel(output_layouts=Replicate()),
        "back": RowwiseParallel(input_layouts=Replicate()),
        "wide": ColwiseParallel(output_layouts=Replicate()),
        "narrow": RowwiseParallel(input_layouts=Replicate()),
        "gathered": ColwiseParallel(use_local_output=False),
        "split": RowwiseParallel(),
    }
    return parallelize_module(Styles(), mesh(), plan)


def tokens(n, mix):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n), device="cpu").to(DEVICE)
    return x, pcg.Batch([n - 3, 2, 1], adapters=mix)


@torch.no_grad()
def layouts(root):
    def results(call, sizes=(8, 5, 7), mix=("a", None, "styles")):
        found = []
        for n in sizes:
            x, batch = tokens(n, mix)
            torch._dynamo.mark_dynamic(x, 0)
            with pcg.step(batch):
                y = call(x)
            found.append(y.full_tensor() if isinstance(y, DTensor) else y)
        return found

    def with_pool(model):
        pools.append(pool_of(model, root, ["styles"], target_modules=NAMES, fused=FUSED))
        pools[-1].load("a", Path(root) / "styles")
        return model

    pools = []
    want = results(with_pool(Styles()))
    base = results(Styles(), mix=[None] * 3)
    model = with_pool(styled())
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    replicated = with_pool(distribute_module(Styles(), mesh()))
    split = with_pool(parallelize_module(Styles(), mesh(), {
        "qkv": ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
        "back": RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
    }))  # fmt: skip
    half = 8 // WORLD
    rank = mesh().get_rank()

    def of_split(x):
        """Each rank is given its own tokens, and its layers gather the step's."""
        mine = x[rank * half : (rank + 1) * half]
        return mine + split.back(torch.relu(split.qkv(mine)))

    whole = with_pool(Styles())
    mine = results(lambda x: x + whole.back(torch.relu(whole.qkv(x))), [8])[0][rank * half : (rank + 1) * half]

    def of_replicated(x):
        return replicated(DTensor.from_local(x, mesh(), [Replicate()]))

    return {
        "uncompiled": worst(want, results(model)), "apart": worst(want, base),
        "compiled": worst(want, results(compiled)),
        "replicated": worst(want, results(of_replicated)), "tokens split": worst([mine], results(of_split, [8])),
    }  # fmt: skip


@torch.no_grad()
def refusals(root):
    """What cannot be served right, and the errors about it."""
    x, batch = tokens(8, ["a", None, "a"])

    def error_of(model, prepare=lambda model: None, x=x, target="qkv", compile=False):
        pool = None
        try:
            pool = pool_of(model, root, [], target_modules=[target])
            pool.load("a", Path(root) / "qkv")
            prepare(model)
            with pcg.step(batch):
                (torch.compile(model.qkv, backend="pcg") if compile else model.qkv)(x)
        except AdapterError as error:
            return str(error)
        finally:
            if pool is not None:
                pool.close()
        return None

    def another_forward():
        model = columns()
        before = model.qkv.forward
        model.qkv.forward = lambda x: before(x)
        return model

    def columns(model=None, name="qkv"):
        return parallelize_module(model or Styles(), mesh(), {name: ColwiseParallel()})

    plain = Styles()
    plain.qkv.weight = nn.Parameter(plain.qkv.weight[: 16 // WORLD])

    from torch.distributed.fsdp import fully_shard

    parts = DTensor.from_local(x[: 8 // WORLD], mesh(), [Shard(0)])
    replicated = distribute_module(Styles(), mesh())
    gathered = Styles()
    fully_shard(gathered.qkv, mesh=mesh())
    summands = distribute_module(Styles(), mesh())
    summands.qkv.weight = nn.Parameter(DTensor.from_local(torch.ones(16, 6), mesh(), [Partial()]))
    return {
        "tokens": error_of(replicated, x=parts),
        "tokens, compiled": error_of(replicated, x=parts, compile=True),
        "later": error_of(Styles(), columns),
        "forward": error_of(another_forward()),
        "plain": error_of(plain),
        "summands": error_of(summands),
        "small": error_of(columns(name="one"), target="one"),
        "gathered": error_of(gathered),
    }
