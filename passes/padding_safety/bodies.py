"""The graphs inside ops of a higher order: checkpointed regions, nested compile regions, branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pcg_compile.fx.facts import DataDecide, NodeFacts, trace_facts

__all__ = ["bodies_of"]

#: What ops raise of operands in another order than the body's: other shapes, types, or no tensors at all.
_MISTRACED = (
    ArithmeticError, AssertionError, AttributeError, DataDecide, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def bodies_of(
    gm: fx.GraphModule, node: fx.Node, facts: Mapping[fx.Node, NodeFacts], notes: list[str]
) -> Iterator[tuple[fx.GraphModule, dict[fx.Node, NodeFacts]]]:
    """The bodies of a node and their facts; none for a node that has no body, or whose body cannot be traced alone.

    A body's inputs are the last operands of the op: before them stand names, conditions and further bodies. What
    cannot be traced is added to ``notes``, which explain() shows.
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    leaves = tree_leaves((node.args, dict(node.kwargs)))
    bodies = [
        body
        for leaf in leaves
        if isinstance(leaf, fx.Node)
        and leaf.op == "get_attr"
        and isinstance(body := getattr(gm, str(leaf.target), None), fx.GraphModule)
    ]
    operands = [facts[n].value for n in leaves if isinstance(n, fx.Node) and n.op != "get_attr"]
    for body in bodies:
        count = len(body.graph.find_nodes(op="placeholder"))
        if count > len(operands):
            continue
        try:
            inner = trace_facts(body, operands[len(operands) - count :], keep_results=True)
        except _MISTRACED as error:
            first = str(error).splitlines()[0] if str(error) else ""
            notes.append(f"{node.name} is judged as a whole: its body cannot be traced alone ({first})")
            continue
        yield body, inner
