"""What a step returns: copies out of static memory that look exactly as eager's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..graph.facts import storage_of
from ..graph.plan import InputSpec
from ..graph.scalars import evaluate, is_scalar, shape_at, strides_at, symbols_of
from .building import Building
from .calls import attribute
from .views import assign, copier, real_rows

__all__ = ["emitter"]


def emitter(b: Building) -> Callable[[Sequence[Any]], Any]:
    """Makes what turns a step's arguments, and what the program computed, into the results."""
    leaves, spec = tree_flatten(b.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
    # By value: what an op in place returns is the argument itself.
    positions = {id(s.value): s.position for s in b.plan.inputs if s.position >= 0}
    bases = {storage_of(s.value): s for s in b.copied}
    groups: dict[int, list[int]] = {}
    makers: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
    constants = list(leaves)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node):
            continue
        if leaf.op == "get_attr":
            constants[i] = attribute(b.plan.gm, str(leaf.target))
            continue
        value = b.plan.value(leaf)
        if id(value) in positions and not is_scalar(value):
            makers.append((i, itemgetter(positions[id(value)])))
        elif is_scalar(value):
            if symbols_of(value) <= b.sizes.keys():
                constants[i] = evaluate(value, b.sizes)
            else:
                makers.append((i, _late_number(b, value)))
        elif not isinstance(value, torch.Tensor):
            # A device mesh, for one, which a DTensor that leaves the graph is made of.
            makers.append((i, _from_frame(b, leaf)))
        elif storage_of(value) in bases:
            makers.append((i, _view_of_argument(b, value, bases[storage_of(value)])))
        elif leaf in b.static:
            if b.shared.options.outputs == "view" or storage_of(value) in b.plan.users_memory:
                constants[i] = real_rows(b.static[leaf], value, b.sizes)
            else:
                groups.setdefault(storage_of(value), []).append(i)
        else:
            makers.append((i, _from_frame(b, leaf)))
    copies = [(indices, _copier(b, [leaves[i] for i in indices])) for indices in groups.values()]
    back = [
        (spec.position, real_rows(b.static[spec.node], spec.value, b.sizes))
        for spec in b.copied
        if spec.node in b.plan.mutated
    ]

    def emit(args: Sequence[Any]) -> Any:
        for position, static in back:
            args[position].copy_(static)
        results = list(constants)
        for indices, copy in copies:
            for i, result in zip(indices, copy(), strict=True):
                results[i] = result
        for i, make in makers:
            results[i] = make(args)
        return tree_unflatten(results, spec)

    return emit


def _copier(b: Building, nodes: Sequence[fx.Node]) -> Callable[[], list[torch.Tensor]]:
    fakes = [b.plan.value(node) for node in nodes]
    views = [real_rows(b.static[node], fake, b.sizes) for node, fake in zip(nodes, fakes, strict=True)]
    return copier(list(zip(views, fakes, strict=True)), b.sizes)


def _late_number(b: Building, value: Any) -> Callable[[Sequence[Any]], Any]:
    sizes = b.program.sizes
    return lambda args: evaluate(value, sizes)


def _view_of_argument(b: Building, fake: torch.Tensor, base: InputSpec) -> Callable[[Sequence[Any]], torch.Tensor]:
    """A result that is a view of an argument in eager is one here, after what was written came back."""
    shape, strides = shape_at(fake, b.sizes), strides_at(fake, b.sizes)
    first = int(evaluate(base.value.storage_offset(), b.sizes)) * base.value.itemsize // fake.itemsize
    offset = int(evaluate(fake.storage_offset(), b.sizes)) - first

    def view(args: Sequence[Any]) -> torch.Tensor:
        argument = args[base.position]
        if argument.dtype == fake.dtype:
            return argument.as_strided(shape, strides, argument.storage_offset() + offset)
        # Counted in the result's elements, as torch.real's are.
        start = argument.storage_offset() * argument.itemsize // fake.itemsize + offset
        typed = torch.empty(0, dtype=fake.dtype, device=argument.device)
        return typed.set_(argument.untyped_storage(), start, shape, strides)

    return view


def _from_frame(b: Building, node: fx.Node) -> Callable[[Sequence[Any]], Any]:
    slot, frame = b.late(node), b.program.frame
    ours = {t.untyped_storage().data_ptr() for t in b.static.values()} if b.bucket is not None else set()
    users = {
        b.args[s.position].untyped_storage().data_ptr()
        for s in b.plan.inputs
        if s.position >= 0 and isinstance(s.value, torch.Tensor)
    }
    value = frame[slot]
    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in ours - users:

        def copy(args: Sequence[Any]) -> torch.Tensor:
            kept = frame[slot]
            # clone() would close the gaps of a view.
            return assign(torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=kept.device), kept)

        return copy
    return lambda args: frame[slot]
