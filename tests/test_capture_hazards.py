"""What no captured graph can hold is found, isolated, and gives eager's values; what it can hold is left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hazard_tracing import traced
from scalar_write_table import COPIES, FINE, REJECTED, TABLE, WAITS, function_of, values
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pcg_compile as pcg
from pcg_compile.errors import CaptureHazard
from pcg_compile.fx.facts import NodeFacts, OpCall, trace_facts
from pcg_compile.options import Options
from pcg_compile.passes.capture_hazards import capture_hazards
from pcg_compile.passes.context import PassContext
from pcg_compile.passes.hazard_rules import finding_of
from pcg_compile.passes.scalar_writes import scalar_writes

CUDA = torch.device("cuda")
aten = torch.ops.aten
ISOLATED = [row for row, verdict in TABLE if verdict in (COPIES, WAITS)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _compiled(function, **options):
    options = {"buckets": [4, 8, 16], "compiler": "eager", **options}
    return torch.compile(function, backend="pcg", options=options)


@pytest.mark.parametrize("statement", ISOLATED)
def test_an_isolated_statement_gives_the_values_of_eager(statement):
    function = function_of(statement, list(values("cpu")))
    compiled = _compiled(function)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for seed in range(3):
            arguments, eager = values("cpu"), values("cpu")
            for tensors in (arguments, eager):
                tensors["t"] += seed
                tensors["n"] += seed
            torch.manual_seed(seed)
            got = compiled(*arguments.values())
            torch.manual_seed(seed)
            want = function(*eager.values())
            for a, b in zip((*got, *arguments.values()), (*want, *eager.values()), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("statement", [row for row, verdict in TABLE if verdict == REJECTED])
def test_a_rewritten_statement_gives_the_values_of_eager(statement):
    function = function_of(statement, list(values("cpu")))
    compiled = _compiled(function, scalar_writes="rewrite")
    for _ in range(3):
        arguments, eager = values("cpu"), values("cpu")
        for got, want in zip(compiled(*arguments.values()), function(*eager.values()), strict=True):
            assert torch.equal(got, want)
    assert pcg.stats(compiled).replays > 0


def test_the_hazard_names_the_line_and_the_rest_is_captured():
    def function(x, y):
        x = x.sin()
        x[torch.tensor([0, 2])] = y[0]
        return x.cos()

    compiled = _compiled(function)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y), function(x, y))
    assert pcg.stats(compiled).pieces == 2 and pcg.stats(compiled).replays > 0
    (fallback,) = pcg.stats(compiled).fallbacks
    assert fallback.reason.startswith("between pieces: setitem: ") and fallback.count == 3
    (hazard,) = traced(function, x, y).hazards
    line = function.__code__.co_firstlineno + 2
    assert (hazard.file, hazard.line, hazard.kind, hazard.op) == (__file__, line, "host copy", "setitem")
    assert "register_buffer" in hazard.cure


def test_what_only_the_data_tell_runs_eagerly():
    """An index without dimensions is read on the host: Dynamo traces it, and nobody can say what it gives."""
    line = (row := lambda x, i: (x * 2)[i] + 1).__code__.co_firstlineno
    compiled = _compiled(row)
    x = torch.randn(4, 3)
    for i in (2, -1, 0):
        assert torch.equal(compiled(x, torch.tensor(i)), row(x, torch.tensor(i)))
    fallbacks = pcg.stats(compiled).fallbacks
    assert all("only the data tell" in f.reason and f"{__file__}:{line}" in f.where for f in fallbacks) and fallbacks
    strict = _compiled(row, strict=True)
    with pytest.raises(pcg.errors.PCGError, match="only the data tell"):
        strict(x, torch.tensor(2))


def test_strict_refuses_with_every_place():
    def function(t, mask, n):
        a = t + torch.tensor([5.0], device=t.device)
        a[mask] = n[0]
        return a

    arguments = torch.ones(4), torch.ones(4) > 0, torch.ones(1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        traced(function, *arguments, collect=False, strict=True)
    error, first = caught.value.inner_exception, function.__code__.co_firstlineno + 1
    assert isinstance(error, CaptureHazard)
    assert f"{__file__}:{first}" in str(error) and f"{__file__}:{first + 1}" in str(error)
    assert len(traced(function, *arguments, strict=True).hazards) == 2


def test_a_generator_of_its_own():
    """Dynamo breaks the graph at one so far; where a later one traces it, the draw is isolated."""
    with FakeTensorMode():
        x = torch.empty(3)
    for generator, kinds in ((torch.Generator(), ["rng"]), (torch.default_generator, []), (None, [])):
        gm = _graph(lambda g: g.call_method("bernoulli_", (g.placeholder("x"), 0.5)))
        nodes = list(gm.graph.nodes)
        call = OpCall(aten.bernoulli_.float, (x, 0.5), {"generator": generator})
        facts = {nodes[0]: NodeFacts(x, (), frozenset()), nodes[1]: NodeFacts(x, (call,), frozenset())}
        context = PassContext(Options(), torch.device("cpu"), facts)
        capture_hazards(gm, context)
        assert [h.kind for h in context.hazards] == kinds and len(context.splits) == len(kinds)


def test_registered_split_ops_are_left_alone():
    def function(x):
        return (x + 1).nonzero() + 1

    seen = traced(function, torch.ones(3), split_ops=["aten::nonzero"])
    assert not seen.hazards and not seen.splits


def test_a_hazard_inside_a_checkpointed_region_isolates_the_region():
    def region(x):
        return x * torch.tensor([2.0, 3.0], device=x.device)

    with torch.enable_grad():
        seen = traced(lambda x: checkpoint(region, x.sin(), use_reentrant=False).cos(), torch.ones(2))
    (node,) = seen.splits
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
    assert seen.hazards[0].reason.startswith("in its body, it makes a tensor of Python numbers")


def test_a_branch_on_data():
    def function(x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    seen = traced(function, torch.ones(3))
    assert seen.kinds() == {"sync"} and len(seen.splits) == 1


def test_a_hazard_under_vmap_does_not_stop_the_pass():
    def function(x, i):
        return torch.vmap(lambda row, k: row[k] * 2, in_dims=(0, None))(x, i)

    x, i = torch.randn(3, 4), torch.tensor([0, 2])
    torch.testing.assert_close(traced(function, x, i).result, function(x, i))


# Tensors on two devices, as fake ones: a machine without a GPU checks them too.


def _facts(gm, devices, device):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty(() if name.endswith("0") else 4, device=d) for name, d in devices.items()]
    context = PassContext(Options(), device, trace_facts(gm, inputs))
    return SimpleNamespace(gm=gm, passes=context, inputs=inputs)


def _on_cuda(function, **devices):
    """The passes' context for ``function`` of 4-element tensors (scalars where the name ends in 0) on ``devices``."""
    traced_graph = fx.symbolic_trace(function)
    made = _facts(traced_graph, devices, CUDA)
    gm = scalar_writes(made.gm, made.passes)
    made.passes.facts = trace_facts(gm, made.inputs)
    capture_hazards(gm, made.passes)
    return made.passes


def _split_names(context):
    return [node.name for node in context.splits]


def _graph(build):
    graph = fx.Graph()
    graph.output(build(graph))
    return fx.GraphModule(nn.Module(), graph)


def _check_padding(build, **devices):
    made = _facts(_graph(build), devices, CUDA)
    gm = scalar_writes(made.gm, made.passes)
    made.passes.facts = trace_facts(gm, made.inputs)
    capture_hazards(gm, made.passes)
    return made.passes


def test_copies_between_devices():
    context = _on_cuda(lambda y, x: x + y.to("cuda:0"), y="cpu", x="cuda")
    assert [h.kind for h in context.hazards] == ["host copy"] and _split_names(context) == ["to"]
    context = _on_cuda(lambda x: x.to("cpu"), x="cuda")
    assert [h.kind for h in context.hazards] == ["sync"]
    context = _on_cuda(lambda x, y: (x + y).to("cuda:0").to(torch.float64), x="cuda", y="cuda")
    assert not context.hazards and not context.splits


def test_host_ops_beside_a_captured_graph():
    context = _on_cuda(lambda x, y: (x.sin(), (y + 1).view(2, 2)), x="cuda", y="cpu")
    assert [h.kind for h in context.hazards] == ["host op", "host op"] and _split_names(context) == ["add", "view"]
    context = _on_cuda(lambda x, y0: (x * y0).sin(), x="cuda", y0="cpu")
    # The value would be baked into the captured graph.
    assert [h.kind for h in context.hazards] == ["host op"] and _split_names(context) == ["mul"]


def _constant(graph, value=0.5, **kwargs):
    return graph.call_function(torch.tensor, (value,), kwargs)


def test_a_constant_on_the_host_may_be_captured():
    def scaled(graph):
        x, scale = graph.placeholder("x"), _constant(graph)
        half = graph.call_function(torch.neg, (scale,))
        return graph.call_function(torch.mul, (x, half))

    context = _check_padding(scaled, x="cuda")
    assert not context.hazards and not context.splits


def test_a_constant_that_is_written_or_random_may_not():
    def written(graph):
        x, scale = graph.placeholder("x"), _constant(graph)
        graph.call_method("add_", (scale, 1))
        return graph.call_function(torch.mul, (x, scale))

    def random(graph):
        x = graph.placeholder("x")
        scale = graph.call_function(torch.bernoulli, (_constant(graph),))
        return graph.call_function(torch.mul, (x, scale))

    assert len(_check_padding(written, x="cuda").splits) == 3
    assert set(_split_names(_check_padding(random, x="cuda"))) - {"tensor"} == {"bernoulli", "mul"}


def test_a_constant_read_by_an_op_that_copies_it():
    def chosen(graph):
        x, zero = graph.placeholder("x"), _constant(graph, 0.0)
        mask = graph.call_function(torch.gt, (x, 1))
        return graph.call_function(torch.where, (mask, zero, x))

    context = _check_padding(chosen, x="cuda")
    assert [h.kind for h in context.hazards] == ["host copy"] and "where" in _split_names(context)


def test_a_constant_read_by_two_pieces_is_isolated():
    def scaled(graph):
        x, scale = graph.placeholder("x"), _constant(graph)
        y = graph.call_function(torch.mul, (x, scale))
        z = graph.call_method("to", (y, torch.device("cpu")))
        back = graph.call_method("to", (z, torch.device("cuda", 0)))
        return graph.call_function(torch.mul, (back, scale))

    context = _check_padding(scaled, x="cuda")
    assert set(_split_names(context)) == {"tensor", "mul", "to", "to_1", "mul_1"}


def test_a_number_put_on_the_device_is_filled_in_there():
    def made(graph):
        x = graph.placeholder("x")
        a = graph.call_function(torch.mul, (x, _constant(graph, 0.1, device=CUDA)))
        b = graph.call_method("to", (_constant(graph, 0.1), torch.device("cuda", 0), torch.float64))
        return graph.call_function(torch.mul, (a, b))

    context = _check_padding(made, x="cuda")
    fills = [node for node in context.facts if node.target is torch.full]
    assert len(fills) == 2 and not context.splits
    assert [node.args[1] for node in fills] == [torch.tensor(0.1).item(), torch.tensor(0.1).item()]
    assert {context.facts[node].value.dtype for node in fills} == {torch.float32, torch.float64}


class Beside:
    """A capture device; tensors of other devices lie on the host."""

    def __init__(self, device=CUDA):
        self.device = device

    def on_host(self, tensor):
        return tensor.device.type != self.device.type

    def is_pinned(self, tensor):
        return False


def test_the_rules_on_two_devices():
    with FakeTensorMode():
        t, t2 = torch.empty(4, device="cuda"), torch.empty(4, 4, device="cuda")
        mask, index = torch.empty(4, device="cuda", dtype=torch.bool), torch.empty(2, device="cuda", dtype=torch.long)
        host, host0, host_index = torch.empty(4), torch.empty(()), torch.empty(2, dtype=torch.long)
        device0, empty = torch.empty((), device="cuda"), torch.empty(0)
    cases = [
        (aten.copy_.default, (device0, host0), "host copy"),
        (aten.copy_.default, (t, host, True), "host copy"),
        (aten.copy_.default, (host, t), "sync"),
        (aten.copy_.default, (t, t), None),
        (aten.copy_.default, (host, host), None),
        (aten.fill_.Tensor, (t, host0), None),
        (aten.index_put_.default, (t, [mask], host0), None),
        (aten.index_put_.default, (t2, [None, mask], host0), None),
        (aten.index_put_.default, (t, [mask], host0, True), "host copy"),
        (aten.index_put_.default, (t2, [mask, mask], host0), "host copy"),
        (aten.index_put_.default, (t, [mask], device0), "sync"),
        (aten.index_put_.default, (t, [index], host0), "host copy"),
        (aten.index_put_.default, (t, [index], device0), None),
        (aten.index_put_.default, (t, [host_index], device0), "host copy"),
        (aten.index_put_.default, (host, [host_index], host0), None),
        (aten.index.Tensor, (t, [index]), None),
        (aten.index.Tensor, (t2, [None, index]), None),
        (aten.index.Tensor, (t, [mask]), "dynamic shape"),
        (aten.index.Tensor, (t, [host_index]), "host copy"),
        (aten.masked_fill_.Tensor, (t, mask, host0), None),
        (aten.masked_fill_.Tensor, (t, mask, device0), "sync"),
        (aten.masked_fill_.Scalar, (t, mask, 0), None),
        (aten.where.self, (mask, host0, t), "host copy"),
        (aten.where.self, (mask, device0, t), None),
        (aten._local_scalar_dense.default, (device0,), "sync"),
        (aten._local_scalar_dense.default, (host0,), None),
        (aten.nonzero.default, (mask,), "dynamic shape"),
        (aten.repeat_interleave.Tensor, (index,), "dynamic shape"),
        (aten.lift_fresh.default, (t,), "host copy"),
        (aten.lift_fresh.default, (host,), None),
        (aten.mul.Tensor, (t, host0), None),
    ]
    for op, arguments, kind in cases:
        finding = finding_of(OpCall(op, arguments, {}), Beside())
        assert (finding.kind if finding else None) == kind, (op, arguments)
    assert finding_of(OpCall(aten.repeat_interleave.Tensor, (index,), {"output_size": 3}), Beside()) is None
    to_cuda = {"device": torch.device("cuda:0")}
    assert finding_of(OpCall(aten._to_copy.default, (empty,), to_cuda), Beside()) is None
    assert finding_of(OpCall(aten._to_copy.default, (host,), to_cuda), Beside()).kind == "host copy"
    assert finding_of(OpCall(aten._to_copy.default, (t,), {"dtype": torch.int32}), Beside()) is None


# Ordinary models give no finding, so none is refused.


def _models():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    kv = {**sizes, "num_key_value_heads": 2}
    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    yield "BertModel", transformers.BertConfig(**sizes)
    yield "LlamaForCausalLM", transformers.LlamaConfig(**kv)
    yield "GPT2LMHeadModel", transformers.GPT2Config(**gpt2)
    yield "Gemma2ForCausalLM", transformers.Gemma2Config(**kv, head_dim=8)
    yield (
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig(**kv, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    )
    yield "T5EncoderModel", transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


@pytest.mark.parametrize("number", range(6))
def test_ordinary_models_are_not_refused(number):
    transformers = pytest.importorskip("transformers")
    name, config = list(_models())[number]
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen = traced(lambda i, m: model(i, attention_mask=m)[0], ids, mask, collect=False, fullgraph=False)
    assert not seen.splits
    torch.testing.assert_close(seen.result, model(ids, attention_mask=mask)[0])
    # Python numbers that the model puts on the device are filled in there, in every mode.
    assert {h.op for h in seen.hazards} <= {"torch.tensor"} and len(seen.notes) == len(seen.hazards)
    assert FINE not in {h.kind for h in seen.hazards}
