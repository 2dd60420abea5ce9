"""Ops that see the memory around a tensor, or give it other memory or another form in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .facts import NodeFacts, alias_of, storage_of
from .node_facts import OpCall, arguments_of
from .places import place_of
from .sizes import expr_of
from .splitting import Segment

#: Whose result may lie outside the tensor that they are given, anywhere in its storage.
_AROUND = frozenset(f"aten::{name}" for name in ("as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter"))
#: What changes the tensor itself, and not what its elements hold.
_CHANGES = frozenset(
    [f"aten::{name}" for name in ("resize_", "resize_as_", "set_", "is_set_to", "t_", "transpose_", "squeeze_",
                                  "unsqueeze_", "swapaxes_", "swapdims_")]
    + ["inductor::resize_storage_bytes_", "fsdp::set_"]
)  # fmt: skip
_NEW_MEMORY = frozenset(["aten::set_", "fsdp::set_"])


def reason_to_run_eagerly(
    gm: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], segments: Sequence[Segment]
) -> str | None:
    """Why a graph can only run as it is, on the caller's own tensors; None for nearly all.

    A copy of an argument has neither the memory around it nor the caller's object. Of a value that crosses a boundary
    between pieces the same holds, as it may lie in a static buffer.
    """
    arguments = alias_of([facts[node].value for node in gm.graph.find_nodes(op="placeholder")])
    for segment in segments:
        inside = set(segment.nodes)
        sources = [n for node in segment.nodes for n in node.all_input_nodes if n not in inside]
        outside = alias_of([facts[n].value for n in sources])
        for node in segment.nodes:
            for call in facts[node].ops:
                name = getattr(getattr(call.op, "_schema", None), "name", "")
                if name in _NEW_MEMORY:
                    return f"a tensor is given other memory at {place_of(node)}"
                tensor = call.args[0] if name in _AROUND or name in _CHANGES else None
                if not isinstance(tensor, torch.Tensor) or storage_of(tensor) not in outside:
                    continue
                if name in _CHANGES:
                    return f"{name} changes or compares a tensor made elsewhere, at {place_of(node)}"
                if not _within(call, storage_of(tensor) in arguments):
                    return f"{name} reads the memory around a tensor at {place_of(node)}"
    return None


def _within(call: OpCall, argument: bool) -> bool:
    """Whether what ``as_strided`` reads certainly lies in the tensor that it is given.

    Offsets count from the start of the storage, where an ``argument`` may lie anywhere at the next call.
    """
    given = arguments_of(call.op, call.args, call.kwargs)
    tensor, offset = given["self"], given.get("storage_offset")
    if offset is not None and (argument or expr_of(offset) != expr_of(tensor.storage_offset())):
        return False
    # A difference in which sizes remain is not looked into: comparing them would make a guard.
    beyond = sympy.sympify(expr_of(_last(given["size"], given["stride"]) - _last(tensor.shape, tensor.stride())))
    return bool(beyond.is_number and beyond <= 0)


def _last(shape: Sequence[Any], strides: Sequence[Any]) -> Any:
    """The distance from the first element to the last, in elements."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
