"""What a step returns: copies out of static memory that look exactly as eager's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..fx.facts import storage_of
from ..fx.plan import InputSpec
from ..fx.sizes import evaluate, expr_of, is_scalar, symbols_of
from ..memory.views import assign, copier, real_rows
from .draft import Draft
from .eager_strides import like_eager
from .program import Emit, Frame

__all__ = ["emit_of"]

Make = Callable[[], Any]


def emit_of(d: Draft) -> Emit:
    """The operation that returns the outputs of a draft that has run, copied out of static memory.

    Dynamo's outputs are a flat tuple or list.
    """
    outputs = d.plan.outputs
    tensors = [s for s in d.plan.inputs if isinstance(s.value, torch.Tensor)]
    # By value: what an op in place returns is the argument itself.
    positions = {id(s.value): s.position for s in tensors if s.position >= 0}
    bases = {storage_of(s.value): s for s in tensors if s.position >= 0}
    from_step = {storage_of(s.value) for s in tensors if s.position < 0}
    groups: dict[int, list[tuple[fx.Node, torch.Tensor]]] = {}
    copied: dict[int, list[int]] = {}
    eager = d.shared.options.compiler == "eager"
    makes: list[tuple[int, Make]] = []
    results = list(outputs)
    #: Results that are one object, as what an op in place gives and was given are.
    first: dict[int, int] = {}
    again: list[tuple[int, int]] = []
    for i, leaf in enumerate(outputs):
        if not isinstance(leaf, fx.Node):
            continue
        if leaf.op == "get_attr":
            results[i] = d.plan.attribute(leaf)
            continue
        value = d.plan.value(leaf)
        # What kernels gave between captured graphs is laid out as eager's already.
        given = not isinstance(value, torch.Tensor) or (
            eager and leaf not in d.static and storage_of(value) not in bases
        )
        eagers = value if given else like_eager(d, leaf)
        if is_scalar(value):
            if symbols_of(value) <= d.sizes.keys():
                results[i] = evaluate(value, d.sizes)
            else:
                makes.append((i, partial(evaluate, value, d.frame.sizes)))
        elif not isinstance(value, torch.Tensor):
            # A device mesh, for one, which a DTensor that leaves the graph is made of.
            makes.append((i, _from_frame(d, leaf)))
        elif id(value) in first:
            again.append((i, first[id(value)]))
            continue
        elif id(value) in positions:
            makes.append((i, partial(_argument, d.frame, positions[id(value)])))
        elif d.bucket is not None and storage_of(value) in bases:
            makes.append((i, _view_of_argument(d, leaf, eagers, bases[storage_of(value)])))
        elif leaf not in d.static:
            makes.append((i, _from_frame(d, leaf, eagers if eagers is not value else None)))
        elif d.shared.options.outputs == "view" or storage_of(value) in from_step:
            # Not the tensor that the next step uses: the caller may change its shape in place.
            makes.append((i, real_rows(d.static[leaf], eagers, d.sizes).detach))
        else:
            groups.setdefault(storage_of(value), []).append((leaf, eagers))
            copied.setdefault(storage_of(value), []).append(i)
        first[id(value)] = i
    copies = [(copied[storage], _copier(d, group)) for storage, group in groups.items()]
    back = [
        (spec.position, real_rows(d.static[spec.node], spec.value, d.sizes))
        for spec in d.copied
        if spec.node in d.plan.mutated
    ]
    emit = partial(_emit, d.frame, back, results, copies, makes, again, type(outputs) is list)
    return Emit(emit, ", ".join(str(leaf) for leaf in outputs))


def _emit(
    frame: Frame,
    back: Sequence[tuple[int, torch.Tensor]],
    constants: Sequence[Any],
    copies: Sequence[tuple[Sequence[int], Callable[[], list[torch.Tensor]]]],
    makes: Sequence[tuple[int, Make]],
    again: Sequence[tuple[int, int]],
    as_list: bool,
) -> Any:
    """Writes ``back`` what the graph wrote to copied arguments, then makes each result."""
    for position, static in back:
        frame.args[position].copy_(static)
    results = list(constants)
    for indices, copy in copies:
        for i, result in zip(indices, copy(), strict=True):
            results[i] = result
    for i, make in makes:
        results[i] = make()
    for i, same in again:
        results[i] = results[same]
    return results if as_list else tuple(results)


def _copier(d: Draft, group: Sequence[tuple[fx.Node, torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    return copier([(real_rows(d.static[node], fake, d.sizes), fake) for node, fake in group], d.sizes)


def _argument(frame: Frame, position: int) -> Any:
    return frame.args[position]


def _view_of_argument(d: Draft, node: fx.Node, fake: torch.Tensor, base: InputSpec) -> Make:
    """A result that is a view of an argument in eager is one here, after what was written came back.

    It keeps its place in the argument, wherever that lies in its storage now.
    """
    apart = fake.storage_offset() * fake.itemsize - base.value.storage_offset() * base.value.itemsize
    numbers = (fake.shape, fake.stride(), apart)
    layout = evaluate(numbers, d.sizes) if symbols_of(numbers) <= d.sizes.keys() else None
    frame, detached = d.frame, _is_detached(node)

    def view() -> torch.Tensor:
        argument: torch.Tensor = frame.args[base.position]
        if detached:
            argument = argument.detach()
        # Strides of the argument may be numbers of their own, and data may tell where a slice ends.
        shape, strides, distance = layout or evaluate(numbers, {**_strides(base.value, argument), **frame.sizes})
        if argument.dtype == fake.dtype:
            return argument.as_strided(shape, strides, argument.storage_offset() + distance // fake.itemsize)
        # Counted in the result's elements, as torch.real's are.
        start = (argument.storage_offset() * argument.itemsize + distance) // fake.itemsize
        typed = torch.empty(0, dtype=fake.dtype, device=argument.device)
        return typed.set_(argument.untyped_storage(), start, shape, strides)

    return view


def _is_detached(node: fx.Node) -> bool:
    """Whether a view of an argument came through ``detach()`` or ``data``: without gradients, views keep that flag."""
    while node.op != "placeholder" and node.all_input_nodes:
        if getattr(node.target, "__name__", node.target) in ("detach", "detach_", "_get_data_attr"):
            return True
        node = node.all_input_nodes[0]
    return False


def _strides(fake: torch.Tensor, real: torch.Tensor) -> dict[sympy.Symbol, int]:
    """The symbols that stand for strides of a tensor."""
    found = zip(map(expr_of, fake.stride()), real.stride(), strict=True)
    return {expr: stride for expr, stride in found if isinstance(expr, sympy.Symbol)}


def _from_frame(d: Draft, node: fx.Node, eagers: torch.Tensor | None = None) -> Make:
    """A result that nothing static holds; a copy of it, where it is a view of what the next step overwrites.

    Args:
        eagers: what it is laid out like where a compiler chose other strides in dimensions of size 1.
    """
    slot, frame = d.late(node), d.frame
    ours = {t.untyped_storage().data_ptr() for t in d.static.values()} if d.bucket is not None else set()
    users = {
        frame.args[s.position].untyped_storage().data_ptr()
        for s in d.plan.inputs
        if s.position >= 0 and isinstance(s.value, torch.Tensor)
    }
    value = frame.values[slot]
    copies = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in ours - users

    def result() -> Any:
        kept = frame.values[slot]
        if eagers is not None:
            kept = kept.as_strided(eagers.shape, eagers.stride(), kept.storage_offset())
        if not copies:
            return kept
        # clone() would close the gaps of a view.
        return assign(torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=kept.device), kept)

    return result
