"""Facts of repeated layers are copied, and equal facts of a full trace; the short way to aten equals torch's own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ToyLlama
from same_facts import compare
from torch import fx
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

import pcg_compile as pcg
from pcg_compile import backend
from pcg_compile.fx.facts import NodeFacts, storage_of, tensors_in, trace_all_facts, trace_facts
from pcg_compile.fx.fake_storages import Storage, look_alike_of, told_apart
from pcg_compile.fx.submodules import Compiled, copy_graph
from pcg_compile.options import Options
from pcg_compile.passes.padding_safety import analysis as padding_safety
from pcg_compile.torch_compat.fake_tensors import fake_inputs, fake_mode_of, python_dispatcher
from pcg_compile.torch_compat.inductor import prepare_inductor

decorator = importlib.import_module("pcg_compile.piecewise")

LAYERS = 4
W = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(LAYERS)]
Facts = Mapping[fx.Node, NodeFacts]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _written(x: torch.Tensor, w: torch.Tensor, i: int) -> torch.Tensor:
    y = x @ w
    y[:, :2].add_(1)
    first, second = y.chunk(2, dim=-1)
    second.mul_(first)
    return y


def _turned(x: torch.Tensor, w: torch.Tensor, i: int) -> torch.Tensor:
    y = (x @ w).relu()
    if i == 2:
        y.t_()
        y = y.t()
    return y + x


def _cast(x: torch.Tensor, w: torch.Tensor, i: int) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 1):
        return (x @ w).float() + x


def _selected(x: torch.Tensor, w: torch.Tensor, i: int) -> torch.Tensor:
    return x + x[(x[:, 0] > 0).nonzero()[:, 0]].sum(0)


BLOCKS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "linear": lambda x, w, i: F.linear(x, w).relu() + x,
    "views": lambda x, w, i: torch.cat([part * 2 for part in (x @ w).view(-1, 2, 2).transpose(1, 2).unbind(1)], -1),
    "written": _written,
    "the same twice": lambda x, w, i: torch.add(x, x if i % 2 else x * 1) @ w,
    "several results": lambda x, w, i: (x @ w).sort(-1).values + x.max(-1, keepdim=True).values,
    "random": lambda x, w, i: x @ w + torch.rand_like(x),
    "numbers": lambda x, w, i: x * (0.0, -0.0, 1, True)[i] + w[0],
    "sizes": lambda x, w, i: (x @ w) / x.shape[0] + torch.arange(x.shape[0])[:, None],
    "strides": lambda x, w, i: (x @ w).t().contiguous().t() + x.as_strided(x.shape, x.stride()) + x.unsqueeze(0)[0],
    "picked": lambda x, w, i: (x @ w)[torch.arange(4) % 2].sum(0) + x,
    "turned": _turned,
    "cast": _cast,
    "selected": _selected,
    "mapped": lambda x, w, i: torch.vmap(lambda row: row * 2)(x @ w) + x,
}


def layered(block: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i, w in enumerate(weights):
            x = block(x, w, i)
        return x

    return run


def facts_of(function: Callable[..., Any], *args: torch.Tensor) -> tuple[Facts, Facts]:
    """Facts with copies, and those of a full trace."""
    found: list[Facts] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        copy, fakes = copy_graph(gm), fake_inputs(inputs)
        found.extend((trace_facts(copy, fakes), trace_all_facts(copy, fakes)))
        return gm.forward

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.mark_dynamic(args[0], 0)
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    copied, traced = found
    return copied, traced


def look_alikes(facts: Facts) -> int:
    return sum(hasattr(tensor, "_pcg_storage") for fact in facts.values() for tensor in tensors_in(fact.value))


@pytest.mark.parametrize("name", BLOCKS)
def test_layers(name: str) -> None:
    copied, traced = facts_of(layered(BLOCKS[name]), torch.randn(5, 4), *W)
    compare(copied, traced)
    assert look_alikes(copied) > 0 or name in ("numbers", "selected", "cast", "mapped")
    assert look_alikes(traced) == 0


def test_values_of_several_layers_meet() -> None:
    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        kept = [x := (x @ w).relu() for w in weights]
        return torch.stack(kept[1:]).sum(0) + kept[3] @ (kept[1].t() @ kept[2])

    copied, traced = facts_of(run, torch.randn(4, 4), *W)
    compare(copied, traced)
    assert look_alikes(copied) > 0


def test_a_view_beside_a_look_alike_of_its_storage() -> None:
    """Two layers' results stand for memory of their own in one storage of torch's: whose is a view of one of them?"""

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        kept = [x := (x @ w).relu() for w in weights]
        view = kept[2].view_as(kept[3])
        view.add_(1)
        return kept[2] + kept[3]

    copied, traced = facts_of(run, torch.randn(5, 4), *W)
    compare(copied, traced)
    assert look_alikes(copied) == 0


def test_look_alikes_are_told_apart_for_torch() -> None:
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        fakes = fake_inputs(inputs)
        tensor = next(x for x in fakes if isinstance(x, torch.Tensor))
        with fake_mode_of(fakes):
            row = tensor[1:]
        one, other = Storage(), Storage()
        given = [
            tensor,
            look_alike_of(tensor, one),
            look_alike_of(row, one),
            look_alike_of(row, other),
            look_alike_of(tensor, Storage(tensor)),
            3,
        ]
        made = told_apart(given)
        tensors = [x for x in made if isinstance(x, torch.Tensor)]
        ours = [storage_of(x) for x in given if isinstance(x, torch.Tensor)]
        theirs = [x.untyped_storage()._cdata for x in tensors]
        seen.append([ours.index(x) for x in ours] == [theirs.index(x) for x in theirs] == [0, 1, 1, 3, 0])
        seen.append(made[0] is tensor and made[-1] == 3)
        for x, y in zip(tensors, given, strict=False):
            assert (x.shape, x.stride(), x.dtype, x.storage_offset()) == (
                y.shape,
                y.stride(),
                y.dtype,
                y.storage_offset(),
            )
        return gm.forward

    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert seen == [True, True]


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_layers_compiled(compiler: str) -> None:
    """The last piece's inputs are copies, and it is compiled for what they stand for."""
    model = ToyLlama(hidden=16, mlp=32, layers=5).eval()
    run = pcg.piecewise(dynamic={"ids": 0}, buckets=[4, 8], compiler=compiler)(model.forward)
    with pcg.expect(graphs=1, pieces=6):
        for n in (5, 3, 8):
            ids = torch.randint(0, 128, (n,))
            torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert pcg.stats(run).compiled == 3
    assert not pcg.stats(run).fallbacks


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("selected", "mapped")])
def test_functional_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict from the short way to aten is the verdict from torch's tracer."""
    verdicts: list[Any] = []
    short = padding_safety.functional_form

    def both(gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Any) -> fx.GraphModule:
        fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        with fake_mode_of(inputs), python_dispatcher(), torch.no_grad(), preserve_node_meta():
            torchs = make_fx(dispatch_functionalize(gm.forward), record_module_stack=False)(*fresh)
        made = short(gm, inputs, decompositions)
        verdicts.extend(padding_safety._Analysis(one, ()).run() for one in (torchs, made))
        return made

    monkeypatch.setattr(padding_safety, "functional_form", both)
    function = layered(BLOCKS[name])
    run = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    run(x, *W)
    theirs, ours = verdicts
    assert (ours.kind, ours.row_indices, ours.equals) == (theirs.kind, theirs.row_indices, theirs.equals)
    assert [(v.kind, v.op, v.reason) for v in ours.nodes] == [(v.kind, v.op, v.reason) for v in theirs.nodes]


def test_workers_start_before_the_graph_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's processes take seconds to start; pieces are compiled once its keys are made."""
    from pcg_compile.torch_compat import inductor

    events: list[str] = []
    monkeypatch.setattr(inductor, "_maybe_warm_pool", lambda: lambda: events.append("pool"))

    def fails() -> bytes:
        events.append("key")
        raise OSError("unreadable")

    monkeypatch.setattr(inductor, "_torch_key", lambda: fails)
    prepare_inductor(torch.device("cuda"))()
    assert events == ["pool", "key"]
    prepare_inductor(torch.device("cpu"))()
    assert events == ["pool", "key", "key"]


@pytest.mark.parametrize("way", ["torch.compile", "piecewise"])
@pytest.mark.parametrize(("compiler", "started"), [("inductor", True), ("eager", False)])
def test_workers_start_before_the_trace(
    way: str, compiler: str, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing a model takes as long as they do."""
    events: list[str] = []
    monkeypatch.setattr(backend, "start_inductor_workers", lambda: events.append("workers"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(backend, "compile_piece", lambda piece, *rest: Compiled(piece.gm.forward))
    compile_graph = backend.compile_graph

    def compiling(*args: Any) -> Any:
        events.append("compile")
        return compile_graph(*args)

    monkeypatch.setattr(backend, "compile_graph", compiling)
    monkeypatch.setattr(decorator, "compile_graph", compiling)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    if way == "piecewise":
        compiled: Any = pcg.piecewise(compiler=compiler)(f)
    else:
        compiled = torch.compile(f, backend="pcg", options={"compiler": compiler})
    torch.compile(f, backend="eager")(torch.ones(3))
    assert events == []
    with torch.no_grad():
        compiled(torch.ones(4))
    assert events == ["workers", "compile"] if started else ["compile"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_number_of_a_module_does_not_have_the_model_traced_twice(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamic=True Dynamo makes tensors of floats, which pcg has no use for, and would begin again."""
    traced: list[bool] = []
    changing_floats = backend.changing_floats

    def count(gm: fx.GraphModule, code: Any) -> Any:
        traced.append(torch._dynamo.config.specialize_float)
        if fails:
            raise RuntimeError("no more")
        return changing_floats(gm, code)

    monkeypatch.setattr(backend, "changing_floats", count)

    class Scaled(torch.nn.Module):
        scale = 0.3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.scale).relu()

    model = Scaled()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager"}, dynamic=True)
    x = torch.randn(5, 4)
    if fails:
        with pytest.raises(Exception, match="no more"):
            compiled(x)
    else:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert traced == [True]
    assert not torch._dynamo.config.specialize_float


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_number_that_code_branches_on_may_change_at_every_call(dynamic: bool | None) -> None:
    """It is a constant of the first trace alone."""
    graphs: list[fx.GraphModule] = []

    def f(x: torch.Tensor, temperature: float) -> torch.Tensor:
        return x * 2 if temperature > 0.5 else x - 1

    def counted(gm: fx.GraphModule, inputs: Any, **keywords: Any) -> Any:
        made = backend.pcg(gm, inputs, **keywords)
        graphs.append(gm)
        return made

    counted.options = Options(compiler="eager")  # type: ignore[attr-defined]
    compiled = torch.compile(f, backend=counted, dynamic=dynamic, options={"compiler": "eager"})
    for i in range(20):
        x = torch.randn(3 + i, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, i / 10), f(x, i / 10))
    assert len(graphs) <= 4 and not torch._dynamo.config.specialize_float


def test_traces_are_watched_from_the_import_on_and_after_a_reset() -> None:
    code = (
        "import torch, pcg_compile; from torch._dynamo.utils import get_hook_for_recompile_user_context as hooks; "
        "from pcg_compile.torch_compat.dynamo_traces import _before_trace; assert hooks() == [_before_trace]; "
        "torch._dynamo.reset(); "
        "torch.compile(lambda x: x + 1, backend='pcg', options={'compiler': 'eager'})(torch.ones(3)); "
        "assert hooks() == [_before_trace]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
