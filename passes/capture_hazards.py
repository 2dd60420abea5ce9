"""Finds what no CUDA graph can capture, and isolates it: such nodes run between pieces.

On a CPU run the capture device is the CPU, and the same statements get the same verdict as far as they tell what a
GPU would do (see :class:`~pcg_compile.passes.host_tensors.GraphMemory`): ``torch.tensor([5], device=x.device)`` copies
from the host, ``x.copy_(y)`` of two inputs does not. Nothing is ever refused for being unclear: isolating a node is
always right, and only ``strict`` makes an error of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from pcg_compile.errors import CaptureHazard, Hazard, message
from pcg_compile.fx.contexts import is_mode_switch
from pcg_compile.fx.facts import NodeFacts, arguments_of, bodies_of, storage_of, tensors_in
from pcg_compile.fx.places import Place, place_of
from pcg_compile.fx.splitting import find_cuts, op_names, segments_of
from pcg_compile.split_ops import registered_split_ops

from .context import PassContext
from .hazard_rules import MADE_FROM_DATA, Finding, finding_of, hazard_at, reads_host_scalars, tensor_arguments
from .host_tensors import FROM_DATA, GraphMemory, data_of, is_lifted_number

_DROPOUT = Finding(
    "rng", "attention drops weights at random: the model is in training mode", "call model.eval() for inference"
)
_TO_HOST = Finding(
    "sync", "it copies to the host, and waits for the device", "Keep the value on the device until after the step"
)
_CONDITION = Finding(
    "sync", "it waits for the device, to read the condition", "Compute both and choose: torch.where(condition, a, b)"
)
_HOST_OP = Finding(
    "host op", "it runs on the host, so a replay would find the result of the captured graph",
    "Give it the device: device=x.device",
)  # fmt: skip
_MOVES = ("to", "cuda", "type")
_BRANCHES = ("cond", "while_loop")
#: Ops of pcg's own that a later pass takes apart.
_OPENED = frozenset({"pcg::paged_attention", "pcg::lora"})


def capture_hazards(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Puts every node that no captured graph can hold into ``context.splits``, and a Hazard into ``context.hazards``.

    The graph stays as it is. Registered split ops are left alone: they run between pieces anyway.

    Raises:
        CaptureHazard: under ``strict``, unless ``context.collect``; it names every such node.
    """
    found: list[tuple[Hazard, Place]] = []
    for node, finding in _findings(gm, context):
        place = place_of(node)
        op = _op_name(node, context.facts)
        found.append((hazard_at(place, finding, op), place))
        context.splits[node] = f"{op}: {finding.reason}"
        if finding.kind != "unsafe op":
            context.counted.add(node)
    for node in gm.graph.nodes:
        if _drops_in_attention(node, context):
            place, op = place_of(node), _op_name(node, context.facts)
            context.hazards.append(hazard_at(place, _DROPOUT, op))
            context.remarks.append((f"{op}: {_DROPOUT.reason}; {_DROPOUT.cure}", str(place)))
    context.hazards += [hazard for hazard, _ in found]
    if found and context.options.strict and not context.collect:
        raise _refusal(found)
    for node in _scattered_constants(gm, context):
        context.splits[node] = f"{_op_name(node, context.facts)}: a constant on the host, read by several pieces"
    return gm


def _findings(gm: fx.GraphModule, context: PassContext) -> Iterator[tuple[fx.Node, Finding]]:
    facts = context.facts
    memory = GraphMemory(gm.graph, facts, context.device)
    constants = _constants(gm.graph, facts, context.device)
    split_ops = registered_split_ops().keys() | set(context.options.split_ops) | _OPENED
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or node not in facts or is_mode_switch(node):
            continue
        if node in context.splits or op_names(node, facts[node]) & split_ops:
            continue
        finding = node_finding(node, memory, constants) or _finding_in_body(gm, node, context)
        if finding is not None:
            yield node, finding


def node_finding(node: fx.Node, memory: GraphMemory, constants: frozenset[fx.Node] = frozenset()) -> Finding | None:
    """The first finding for a node, or None.

    ``constants``: nodes whose host scalars are the same in every step.
    """
    found = _in_statement(node, memory)
    if found is not None:
        return found
    memory.enter(node)
    of_ops = (finding_of(call, memory) for call in memory.facts[node].ops)
    return next((one for one in of_ops if one is not None), None) or _on_host(node, memory, constants)


def _in_statement(node: fx.Node, memory: GraphMemory) -> Finding | None:
    """What a statement tells, where the ops that it dispatches do not: on a CPU run no copy to the device is one."""
    value, on_cpu = memory.facts[node].value, memory.device.type == "cpu"
    given = [t for n in node.all_input_nodes for t in tensors_in(memory.facts[n].value)]
    of_host = all(memory.on_host(t) for t in given)
    method = node.target if node.op == "call_method" else None
    if method == "new_tensor":
        return None if memory.on_host(value) or 0 in value.shape else MADE_FROM_DATA
    # torch.as_tensor(array, device=...) too, where Dynamo has made a tensor of numpy's array.
    from_data = data_of(node, memory.facts) is not None or (on_cpu and node.target in FROM_DATA and given and of_host)
    if node.kwargs.get("device") is not None and from_data and isinstance(value, torch.Tensor):
        return None if value.device.type != memory.device.type or 0 in value.shape else MADE_FROM_DATA
    data = node.args[0] if node.args else None
    from_list = getattr(node.target, "__name__", "") == "tensor" and isinstance(data, (list, tuple))
    if on_cpu and (method == "cpu" or (node.op == "call_function" and from_list)) and not of_host:
        return _TO_HOST
    if on_cpu and method in _MOVES and of_host:
        # torch.tensor([1, 2]).to(device)
        names_device = any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values()))
        return MADE_FROM_DATA if names_device else None
    if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _BRANCHES:
        return _CONDITION
    return None


def _on_host(node: fx.Node, memory: GraphMemory, constants: frozenset[fx.Node]) -> Finding | None:
    """Nodes that read or make host tensors beside a CUDA capture: a replay sees what they held when captured."""
    if memory.device.type == "cpu" or node in constants:
        return None
    facts = memory.facts
    if any(memory.on_host(t) for t in tensors_in(facts[node].value)):
        return _HOST_OP
    host = [
        n for n in node.all_input_nodes if n in facts and any(memory.on_host(t) for t in tensors_in(facts[n].value))
    ]
    if not host:
        return None
    if all(n in constants for n in host) and all(
        reads_host_scalars(call) for call in facts[node].ops if any(memory.on_host(t) for t in tensor_arguments(call))
    ):
        return None
    return Finding(
        "host op",
        f"it reads {host[0].name}, which lies on the host: a replay would find its value at the captured graph",
        "Pass the tensor on the device, or a Python number",
    )


def _constants(graph: fx.Graph, facts: Mapping[fx.Node, NodeFacts], device: torch.device) -> frozenset[fx.Node]:
    """Host scalars that no step changes, ``torch.tensor(0.5)`` and what follows from it: a capture may keep them."""
    if device.type == "cpu":
        return frozenset()
    written = frozenset().union(*(f.writes for f in facts.values()))
    output = next(iter(graph.find_nodes(op="output")))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = facts[node].value if node in facts else None
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.dim() != 0:
            continue
        if output in node.users or storage_of(value) in written:
            continue
        if node.all_input_nodes:
            random = any(torch.Tag.nondeterministic_seeded in getattr(call.op, "tags", ()) for call in facts[node].ops)
            constant = found.issuperset(node.all_input_nodes) and not random
        else:
            constant = is_lifted_number(node) or isinstance(data_of(node, facts), (bool, int, float, complex))
        if constant:
            found.add(node)
    return frozenset(found)


def _scattered_constants(gm: fx.GraphModule, context: PassContext) -> list[fx.Node]:
    """Host constants that no single piece holds together with all readers, and those readers.

    A piece that reads a host tensor from elsewhere could not be captured as a whole.
    """
    constants = _constants(gm.graph, context.facts, context.device) - context.splits.keys()
    if not constants:
        return []
    cuts = find_cuts(gm, context.facts, context.options.split_ops, context.splits, lambda error: None)
    home = {
        node: index
        for index, segment in enumerate(segments_of(gm, context.facts, cuts))
        for node in segment.nodes
        if segment.kind == "piece"
    }
    found: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node in constants and any(home.get(user) != home.get(node) for user in node.users):
            found += [n for n in (node, *node.users) if n not in cuts]
    return found


def _finding_in_body(gm: fx.GraphModule, node: fx.Node, context: PassContext) -> Finding | None:
    """The first finding inside an op of a higher order, which is isolated as a whole."""
    for body, facts in bodies_of(gm, node, context.facts, context.notes):
        inner = PassContext(context.options, context.device, facts)
        for _, finding in _findings(body, inner):
            return Finding(finding.kind, f"in its body, {finding.reason}", finding.cure)
    return None


def _drops_in_attention(node: fx.Node, context: PassContext) -> bool:
    """Whether a split op, which runs between pieces and is not looked into, has dropout."""
    if node not in context.facts or not op_names(node, context.facts[node]) & registered_split_ops().keys():
        return False
    for call in context.facts[node].ops:
        given = arguments_of(call.op, call.args, call.kwargs)
        # A kernel of attention that has it, or attention that was taken apart on its way to one that has not.
        share = given.get("p", 0.0) if "dropout" in str(call.op) else given.get("dropout_p", 0.0)
        if isinstance(share, float) and share > 0 and given.get("train") is not False:
            return True
    return False


def _op_name(node: fx.Node, facts: Mapping[fx.Node, NodeFacts]) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return f"torch.{name}" if data_of(node, facts) is not None else name


def _refusal(found: list[tuple[Hazard, Place]]) -> CaptureHazard:
    (first, place), others = found[0], found[1:]
    cure = "\n".join([first.cure, *(f"also {hazard.op} at {where}: {hazard.reason}" for hazard, where in others)])
    what = f"{first.op} cannot be captured: {first.reason}"
    return CaptureHazard(message(what, str(place), "strict=True forbids to isolate it.", cure.replace("\n", "\n  ")))
