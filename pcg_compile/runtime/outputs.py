"""What a step returns: copies out of static memory that look exactly as eager's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..fx.facts import storage_of
from ..fx.plan import InputSpec
from ..fx.sizes import evaluate, expr_of, is_scalar, symbols_of
from ..memory.views import assign, copier, real_rows
from .build_state import Building
from .split_op_calls import attribute

__all__ = ["emitter"]


def emitter(b: Building) -> Callable[[Sequence[Any]], Any]:
    """Makes what turns a step's arguments, and what the program computed, into the results."""
    leaves, spec = tree_flatten(b.plan.outputs, is_leaf=lambda x: isinstance(x, fx.Node))
    tensors = [s for s in b.plan.inputs if isinstance(s.value, torch.Tensor)]
    # By value: what an op in place returns is the argument itself.
    positions = {id(s.value): s.position for s in tensors if s.position >= 0}
    bases = {storage_of(s.value): s for s in tensors if s.position >= 0}
    from_step = {storage_of(s.value) for s in tensors if s.position < 0}
    groups: dict[int, list[int]] = {}
    makers: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
    constants = list(leaves)
    #: Results that are one object, as what an op in place gives and was given are.
    first: dict[int, int] = {}
    again: list[tuple[int, int]] = []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node):
            continue
        if leaf.op == "get_attr":
            constants[i] = attribute(b.plan.gm, str(leaf.target))
            continue
        value = b.plan.value(leaf)
        if is_scalar(value):
            if symbols_of(value) <= b.sizes.keys():
                constants[i] = evaluate(value, b.sizes)
            else:
                makers.append((i, _late_number(b, value)))
        elif not isinstance(value, torch.Tensor):
            # A device mesh, for one, which a DTensor that leaves the graph is made of.
            makers.append((i, _from_frame(b, leaf)))
        elif id(value) in first:
            again.append((i, first[id(value)]))
            continue
        elif id(value) in positions:
            makers.append((i, itemgetter(positions[id(value)])))
        elif b.bucket is not None and storage_of(value) in bases:
            makers.append((i, _view_of_argument(b, value, bases[storage_of(value)])))
        elif leaf in b.static:
            if b.shared.options.outputs == "view" or storage_of(value) in from_step:
                # Not the tensor that the next step uses: the caller may change its shape in place.
                view = real_rows(b.static[leaf], value, b.sizes)
                makers.append((i, lambda args, view=view: view.detach()))  # type: ignore[misc]
            else:
                groups.setdefault(storage_of(value), []).append(i)
        else:
            makers.append((i, _from_frame(b, leaf)))
        first[id(value)] = i
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
        for i, same in again:
            results[i] = results[same]
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
    """A result that is a view of an argument in eager is one here, after what was written came back.

    It keeps its place in the argument, wherever that lies in its storage now.
    """
    apart = fake.storage_offset() * fake.itemsize - base.value.storage_offset() * base.value.itemsize
    numbers = (fake.shape, fake.stride(), apart)
    layout = evaluate(numbers, b.sizes) if symbols_of(numbers) <= b.sizes.keys() else None
    learned = b.program.sizes

    def view(args: Sequence[Any]) -> torch.Tensor:
        argument = args[base.position]
        # Strides of the argument may be numbers of their own, and data may tell where a slice ends.
        shape, strides, distance = layout or evaluate(numbers, {**_strides(base.value, argument), **learned})
        if argument.dtype == fake.dtype:
            return argument.as_strided(shape, strides, argument.storage_offset() + distance // fake.itemsize)
        # Counted in the result's elements, as torch.real's are.
        start = (argument.storage_offset() * argument.itemsize + distance) // fake.itemsize
        typed = torch.empty(0, dtype=fake.dtype, device=argument.device)
        return typed.set_(argument.untyped_storage(), start, shape, strides)

    return view


def _strides(fake: torch.Tensor, real: torch.Tensor) -> dict[sympy.Symbol, int]:
    """The symbols that stand for strides of a tensor."""
    found = zip(map(expr_of, fake.stride()), real.stride(), strict=True)
    return {expr: stride for expr, stride in found if isinstance(expr, sympy.Symbol)}


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
