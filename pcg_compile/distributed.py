"""Models in parts on several processes: tensor subclasses taken apart, and what a recording may hold of collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .graph.facts import NodeFacts
from .runtime.agreement import Agreement
from .torch_internals import group_backend, is_subclass, lower_subclasses

__all__ = ["agreement_of", "collective_outside_recordings", "has_subclasses", "lowered"]

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d")


def has_subclasses(inputs: Sequence[Any]) -> bool:
    """Whether an input is made of other tensors: a DTensor of a parallelized model, a quantized weight."""
    return any(is_subclass(value) for value in inputs)


def lowered(
    gm: fx.GraphModule, inputs: Sequence[Any], compile_plain: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Callable[..., Any]:
    """Compiles a graph with such inputs by its graph over the plain tensors that they are made of.

    AOTAutograd writes that graph, and takes the inputs apart at each call; for a DTensor it holds each rank's own part
    and the collectives between them.
    """
    return lower_subclasses(gm, list(inputs), compile_plain)


def agreement_of(facts: Mapping[fx.Node, NodeFacts]) -> Agreement | None:
    """How the ranks of a graph with collectives agree; None for a graph without."""
    calls = (call for fact in facts.values() for call in fact.ops)
    if any(isinstance(call.op, torch._ops.OpOverload) and call.op.namespace in _NAMESPACES for call in calls):
        return Agreement()
    return None


def collective_outside_recordings(node: fx.Node, facts: NodeFacts | None) -> str | None:
    """Why a collective runs between pieces: only NCCL's can be recorded. None for what is no collective, or NCCL's."""
    for call in facts.ops if facts else ():
        if not isinstance(call.op, torch._ops.OpOverload) or call.op.namespace not in _NAMESPACES:
            continue
        backend = next((group_backend(arg) for arg in reversed(node.args) if isinstance(arg, str)), None)
        if backend is None:
            # wait_tensor, which names no group.
            tensors = [a for a in call.args if isinstance(a, torch.Tensor)]
            backend = "nccl" if tensors and tensors[0].device.type == "cuda" else "gloo"
        if backend != "nccl":
            return f"{call.op} runs on {backend}, whose collectives no recording can hold"
    return None
