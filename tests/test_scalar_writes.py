"""Python numbers written to tensors: the table of verdicts, rewriting, and what the messages say."""

from __future__ import annotations

import linecache
import operator
import re
import sys
import types

import pytest
import torch
from hazard_tracing import traced
from scalar_write_table import FINE, NUMBER_BY_INDEX, REJECTED, TABLE, VERDICT_OF, function_of, values
from torch import fx
from torch.utils.checkpoint import checkpoint

from pcg_compile.errors import GraphBreakingScalarWrite
from pcg_compile.fx.facts import NodeFacts, OpCall, trace_facts
from pcg_compile.fx.places import Place, place_of
from pcg_compile.options import Options
from pcg_compile.passes.capture_hazards import capture_hazards
from pcg_compile.passes.context import PassContext
from pcg_compile.passes.scalar_writes import host_scalar_write, scalar_writes

copies = pytest.mark.skipif(host_scalar_write() == "fills", reason="this torch fills where others copy a host scalar")


def verdict_of(kinds: set[str]) -> str:
    verdicts = {VERDICT_OF[kind] for kind in kinds} or {FINE}
    assert len(verdicts) == 1, kinds
    return verdicts.pop()


@pytest.mark.parametrize(("statement", "verdict"), TABLE)
def test_the_table(statement, verdict):
    arguments = values("cpu")
    seen = traced(function_of(statement, list(arguments)), *arguments.values())
    if host_scalar_write() == "fills" and (verdict == REJECTED or statement in NUMBER_BY_INDEX):
        verdict = FINE
    assert verdict_of(seen.kinds()) == verdict, seen.hazards
    # What is not fine is isolated, and what is fine is not; a single number that is put on the device is filled in.
    assert bool(seen.splits) == (verdict != FINE)


@pytest.mark.parametrize("statement", [row for row, verdict in TABLE if verdict == FINE])
def test_what_is_fine_is_left_alone_by_rewrite(statement):
    arguments = values("cpu")
    assert traced(function_of(statement, list(arguments)), *arguments.values(), scalar_writes="rewrite").notes == []


def test_the_probe_agrees_with_what_is_dispatched():
    seen = traced(lambda t: t.__setitem__(0, 0), torch.zeros(3))
    assert (host_scalar_write() == "copies") == bool(seen.hazards)


def compute_routing(seg_indptr):
    seg_indptr[0] = 0
    return seg_indptr.cumsum(0)


@copies
def test_the_message():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        traced(compute_routing, torch.ones(4), collect=False)
    assert isinstance(caught.value.inner_exception, GraphBreakingScalarWrite)
    line = compute_routing.__code__.co_firstlineno + 1
    assert str(caught.value.inner_exception) == (
        "`seg_indptr[0] = 0` writes a host scalar into a tensor on cpu\n"
        f"  at {__file__}:{line} in compute_routing\n"
        "  A CUDA graph cannot capture it: the 0 is copied from host memory at every step.\n"
        '  Write it on the device instead: seg_indptr[0:1].zero_()   (or options={"scalar_writes": "rewrite"})'
    )
    assert str(caught.value.inner_exception) in str(caught.value)


@copies
@pytest.mark.parametrize(
    ("statement", "cure"),
    [
        ("t[-1] = 7", "t[-1:].fill_(7)"),
        ("t[-2] = 7", "t[-2:-1].fill_(7)"),
        ("t[0, ...] = 2", "t[0, ...].fill_(2)"),
        ("t2[1, 2] = 1.0", "t2[1, 2].fill_(1.0)"),
        ("t0[()] = 0", "t0[()].zero_()"),
        ("t[n.shape[0]] = n.shape[0]", "t[3:4].fill_(3)"),
        ("t[0] = 1; t2[0, 0] = 0", "t[0:1].fill_(1)"),
    ],
)
def test_the_cure_is_code_that_does_the_same(statement, cure):
    arguments = values("cpu")
    eager = {name: tensor.clone() for name, tensor in arguments.items()}
    seen = traced(function_of(statement, list(arguments)), *arguments.values())
    assert cure in with_names(seen.hazards[0].cure, list(arguments))
    exec(statement.split(";")[0], {}, eager)
    cured = values("cpu")
    exec(cure, {}, cured)
    assert all(torch.equal(eager[name], cured[name]) for name in eager)


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@copies
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0, 3, -2, 2.7, True, float("inf"), float("nan"), 1e10, 1 + 2j])
def test_rewriting_gives_the_same_values(dtype, value):
    def write(t, t2, t0):
        t[0] = value
        t[-1] = value
        t[2, ...] = value
        t[3:5][1] = value
        t2[1, 2] = value
        t0[...] = value
        t2[t.shape[0] - 5, 0] = value
        return t + t, t2[1]

    arguments = [torch.ones(6, dtype=dtype), torch.ones(3, 4, dtype=dtype), torch.ones((), dtype=dtype)]
    eager = [a.clone() for a in arguments]
    try:
        expected = write(*eager)
    except (RuntimeError, TypeError):
        pytest.skip("eager refuses the value")
    seen = traced(write, *arguments, collect=False, scalar_writes="rewrite")
    assert len(seen.notes) == 7 and not seen.hazards
    for got, want in zip((*seen.result, *arguments), (*expected, *eager), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert not any(n.target is operator.setitem for n in seen.graphs[0].graph.nodes)


def test_rewriting_a_write_through_index_tensors():
    def write(t, t2, index):
        t[index] = 4
        t2[index, 0] = 2.5
        t2[1:, index] = True
        return t * 1, t2 * 1

    arguments = [torch.zeros(4, dtype=torch.int32), torch.zeros(3, 3), torch.tensor([0, 2])]
    expected = write(*(a.clone() for a in arguments))
    seen = traced(write, *arguments, collect=False, scalar_writes="rewrite")
    assert len(seen.notes) == 3 and not seen.hazards and not seen.splits
    for got, want in zip(seen.result, expected, strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


@copies
def test_a_dynamic_size_as_index_and_value():
    def write(t, x):
        t[x.shape[0]] = x.shape[0]
        return t * 2

    x = torch.ones(5)
    torch._dynamo.mark_dynamic(x, 0)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="writes a host scalar"):
        traced(write, torch.zeros(9), x, collect=False)
    seen = traced(write, torch.zeros(9), x, collect=False, scalar_writes="rewrite")
    assert torch.equal(seen.result, write(torch.zeros(9), x))


@copies
def test_a_write_inside_a_checkpointed_region():
    def region(t):
        t = t.clone()
        t[0] = 5
        return t.sin()

    def function(t):
        return checkpoint(region, t, use_reentrant=False) + 1

    with torch.enable_grad():
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="writes a host scalar"):
            traced(function, torch.ones(3), collect=False)
        seen = traced(function, torch.ones(3), collect=False, scalar_writes="rewrite")
        torch.testing.assert_close(seen.result, function(torch.ones(3)))
    assert len(seen.notes) == 1


@pytest.mark.parametrize("value", [3, 0.1, True, -7, float("-inf"), 2j])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_one_number_put_on_the_device_becomes_a_fill(value, dtype):
    def function(x):
        a = torch.tensor(value, dtype=dtype, device=x.device)
        b = torch.tensor(value).to(x.device, torch.complex128)
        return a, b, x * a

    x = torch.ones(3)
    try:
        expected = function(x)
    except (RuntimeError, TypeError, OverflowError):
        pytest.skip("eager refuses the value")
    seen = traced(function, x, collect=False)
    assert len(seen.notes) == 2 and not seen.splits and seen.kinds() == {"host copy"}
    for got, want in zip(seen.result, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_an_empty_tensor_copies_nothing():
    seen = traced(lambda x: torch.cat([torch.tensor([], device=x.device), x]), torch.ones(3))
    assert not seen.hazards and not seen.splits


def _graph():
    """The graph of ``t[0] = 0``, and its facts on CPU tensors."""
    graph = fx.Graph()
    t = graph.placeholder("t")
    write = graph.call_function(operator.setitem, (t, 0, 0))
    graph.output(graph.call_function(torch.add, (t, 1)))
    return fx.GraphModule(torch.nn.Module(), graph), write


@copies
def test_a_host_tensor_beside_a_cuda_capture_is_accepted():
    gm, write = _graph()
    facts = trace_facts(gm, [_fake(torch.zeros(4))])
    context = PassContext(Options(), torch.device("cuda"), facts)
    scalar_writes(gm, context)
    capture_hazards(gm, context)
    # It runs on the host, between captured graphs.
    assert not any(h.kind == "scalar write" for h in context.hazards) and write in context.splits
    with pytest.raises(GraphBreakingScalarWrite):
        scalar_writes(gm, PassContext(Options(), torch.device("cpu"), facts))


def test_the_verdict_follows_the_dispatch():
    """On a torch that dispatches a fill, the same statement is fine."""
    gm, write = _graph()
    facts = trace_facts(gm, [_fake(torch.zeros(4))])
    t = next(iter(facts.values())).value
    filled = NodeFacts(None, (OpCall(torch.ops.aten.fill_.Scalar, (t, 0), {}),), facts[write].writes)
    context = PassContext(Options(), torch.device("cpu"), {**facts, write: filled})
    scalar_writes(gm, context)
    capture_hazards(gm, context)
    assert not context.hazards and not context.splits


def _fake(tensor):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor)


# Where a line comes from.


def _node(trace: str) -> fx.Node:
    graph = fx.Graph()
    node = graph.call_function(operator.add, (1, 2))
    node.meta["stack_trace"] = trace
    return node


def _exec(source: str, name: str = "<string>"):
    scope = {"torch": torch}
    exec(compile(source, name, "exec"), scope)
    return scope["f"]


def with_names(text: str, names: list[str]) -> str:
    """Up to 2.11 Dynamo calls the arguments of a function that has no file args_0, args_1, ..."""
    return re.sub(r"\bargs_(\d+)", lambda match: names[int(match[1])], text)


@copies
def test_places_without_source():
    function = _exec("def f(t):\n    t[0] = 0\n    t[1] = 1\n    return t\n")
    seen = traced(function, torch.zeros(3))
    # The names of the graph stand in for the source; Dynamo keeps no line of what has no file name.
    assert "t[1:2].fill_(1)" in with_names(seen.hazards[1].cure, ["t"])
    if torch.__version__ >= "2.12":
        assert [str(place_of(node)) for node in seen.splits] == ["<string> in f", "<string> in f"]
    named = traced(_exec("def f(t):\n    t[0] = 0\n    return t\n", "<made>"), torch.zeros(3))
    assert [(h.file, h.line) for h in named.hazards] == [("<made>", 2)]


@copies
def test_a_lambda():
    hazard = traced(lambda t: t.__setitem__(0, 0), torch.zeros(3)).hazards[0]
    assert hazard.file == __file__ and "t[0:1].zero_()" in hazard.cure


@copies
def test_a_notebook_cell(monkeypatch):
    name = "/tmp/ipykernel_77/12345.py"
    source = "def f(t):\n    t[0] = 0\n    return t\n"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    seen = traced(_exec(source, name), torch.zeros(3))
    node = next(iter(seen.splits))
    assert str(place_of(node)) == "a notebook cell, line 2 in f: `t[0] = 0`"

    class Shell:
        class compile:
            format_code_name = staticmethod(lambda file: ("Cell", "In[3]") if file == name else None)

    module = types.ModuleType("IPython")
    module.get_ipython = Shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert str(place_of(node)) == "Cell In[3], line 2 in f: `t[0] = 0`"


def test_a_library_names_both_lines(tmp_path):
    library = tmp_path / "site-packages" / "lib.py"
    library.parent.mkdir()
    library.write_text("def f(x):\n    return x + torch_tensor([5], device=x.device)\n")
    function = _exec(library.read_text().replace("torch_tensor", "torch.tensor"), str(library))
    hazard = traced(lambda x: function(x), torch.ones(1)).hazards[0]
    assert hazard.file == __file__ and f"{library}:2 in f" in hazard.reason


def test_frames_with_and_without_source_lines():
    trace = (
        '  File "/home/me/a.py", line 3, in forward\n    y = g(x)\n'
        '  File "<string>", line 9, in <lambda>\n'
        '  File "<string>", line 12, in h\n'
    )
    assert place_of(_node(trace)) == Place("<string>", 12, "h", "")
    assert str(place_of(_node(trace))) == "<string>:12 in h"
    assert str(place_of(_node('  File "/home/me/a.py", line 3, in forward\n    y = g(x)\n'))) == (
        "/home/me/a.py:3 in forward: `y = g(x)`"
    )
    assert "node add" in str(place_of(_node("")))
