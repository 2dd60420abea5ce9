"""What a program runs between captured graphs: split ops, and pieces at their exact size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..fx.plan import Item, PieceItem, SplitOpItem
from ..fx.sizes import evaluate, expr_of, is_scalar, learned_from, shape_at, strides_at, symbols_of
from ..memory.views import assign, looks_like, real_rows
from .draft import Draft
from .program import Call, CopyRows, Frame, Operation, PrepareMetadata, RepeatRowZero, RunPiece, RunSplitOp
from .row_padding import repeat_row_zero

__all__ = ["add_exact", "add_split_op"]

#: Ops that passes insert for a step's metadata.
_METADATA = ("pcg::prepare_", "pcg::pad_")


@dataclass(frozen=True)
class _Late:
    """An argument that is only known when the step runs: a position in the frame."""

    slot: int


@dataclass(frozen=True)
class _LateNumber:
    """A number that depends on data of the step, and the sizes that are known before."""

    value: Any
    known: Mapping[sympy.Symbol, int]
    least: int | None = None

    def at(self, learned: Mapping[sympy.Symbol, int]) -> Any:
        """The number, once the step has told what was unknown."""
        number = evaluate(self.value, {**learned, **self.known})
        return number if self.least is None else max(number, self.least)


@dataclass
class _Around:
    """What a call needs besides: copies ahead of it and behind it, and padding of what it wrote."""

    before: list[Call] = field(default_factory=list)
    after: list[CopyRows | RepeatRowZero] = field(default_factory=list)


def add_exact(d: Draft, item: PieceItem) -> None:
    """Adds a piece at the step's real sizes, and runs it."""
    piece, around = item.piece, _Around()
    numbers = [d.sizes.get(s, _LateNumber(v, d.sizes)) for s, v in zip(piece.symbols, piece.example, strict=False)]
    function = _function_at(d, item, d.sizes)
    arguments = [_real(d, node, i in piece.writes, item, around) for i, node in enumerate(piece.inputs)]
    module = getattr(function, "__self__", None)
    last = [d.slots[node] for node in d.last_read_at(item.index) if node in piece.inputs]
    if last and isinstance(module, fx.GraphModule):
        call = _caller(d.frame, d.shared.boxed(module), (*numbers, *arguments), {}, last)
    else:
        call = _caller(d.frame, function, (*numbers, *arguments), {})
    written = [piece.inputs[i] for i in piece.writes]
    _finish(d, item, call, around, written, [(node, (i,)) for i, node in enumerate(piece.outputs)], False)


def _function_at(d: Draft, item: PieceItem, sizes: Mapping[sympy.Symbol, int]) -> Callable[..., Any]:
    """What computes a piece at sizes that no bucket was chosen for: eager where the compiler assumed others."""
    if not d.compiled:
        return item.piece.gm.forward
    broken = item.compiled.broken_at(item.piece.symbols, sizes)
    if broken is None:
        return item.compiled.function
    d.fallbacks.append((f"a piece runs eagerly: it was compiled for {broken}", item.where))
    return item.piece.gm.forward


def add_split_op(d: Draft, item: SplitOpItem) -> None:
    """Adds a split op, at the bucket in request mode, else at the real sizes, and runs it."""
    if item.counted:
        d.fallbacks.append((f"between pieces: {item.reason}", item.where))
    request = item.mode == "request" and d.bucket is not None and (d.requests or item.request is None)
    sizes = d.at if request else d.sizes
    around, done = _Around(), dict[fx.Node, Any]()

    def resolve(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return d.plan.attribute(node)
        value = d.plan.value(node)
        if is_scalar(value):
            return evaluate(value, sizes) if symbols_of(value) <= sizes.keys() else _LateNumber(value, sizes)
        if node not in done:
            static = request and node in d.static
            done[node] = d.static[node] if static else _real(d, node, node in item.writes, item, around)
        return done[node]

    arguments = map_arg(item.node.args, resolve)
    keywords = map_arg(item.node.kwargs, resolve)
    if request and "pcg_maxima" in item.node.meta:
        arguments, keywords = _raise_maxima(d, item, arguments, keywords)
    call = _bound(d, item, arguments, keywords)
    paths = [(node, item.path_of(node)) for node in item.outputs]
    _finish(d, item, call, around, [] if request else list(item.writes), paths, request)


def _bound(d: Draft, item: SplitOpItem, arguments: Any, keywords: Mapping[str, Any]) -> Call:
    """The call of a split op, bound once for all steps of the program where the op can."""
    op = item.op
    if op.bucket_args:
        # Metadata that are padded for an op stay as they are where it gets the real rows.
        at = d.at if d.requests or not op.late else d.sizes
        arguments = tuple(_at(d, item.node.args[i], at) if i in op.bucket_args else a for i, a in enumerate(arguments))
    if op.bind is None:
        return _caller(d.frame, item.function, arguments, keywords)
    call = _caller(d.frame, op.bind, arguments, {**keywords, "mode": item.mode} if op.bucket_args else keywords)
    bound = (lambda: call()()) if _has_late(arguments, keywords) else call()
    reason = op.fallback(*item.node.args, **item.node.kwargs) if op.fallback is not None else None
    if reason is not None:
        # Once a step, whatever the number of places.
        d.bucket_fallbacks.setdefault(reason, item.where)
    return item.in_autocast(bound)


def _raise_maxima(d: Draft, item: SplitOpItem, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    """Declared maxima are at least the bucket: the padding request may be the longest."""
    tokens, places = item.node.meta["pcg_maxima"]
    least = _at(d, tokens, d.at)

    def raised(value: Any) -> Any:
        return replace(value, least=least) if isinstance(value, _LateNumber) else max(value, least)

    arguments = tuple(raised(value) if i in places else value for i, value in enumerate(arguments))
    return arguments, {name: raised(value) if name in places else value for name, value in keywords.items()}


def _at(d: Draft, argument: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    return evaluate(d.plan.value(argument), sizes) if isinstance(argument, fx.Node) else argument


def _real(d: Draft, node: fx.Node, written: bool, item: Item, around: _Around) -> Any:
    """A tensor argument at its real size, looking exactly as eager's."""
    if node not in d.static:
        return _Late(d.late(node))
    fake = d.plan.value(node)
    view = real_rows(d.static[node], fake, d.sizes)
    if looks_like(view, fake, d.sizes) or (isinstance(item, SplitOpItem) and item.op.any_strides):
        return view
    shape, strides = shape_at(fake, d.sizes), strides_at(fake, d.sizes)
    with torch.inference_mode(False), torch.no_grad():
        exact = torch.empty_strided(shape, strides, dtype=view.dtype, device=view.device)
    around.before.append(partial(exact.copy_, view))
    if written:
        around.after.append(CopyRows.of(item, partial(view.copy_, exact)))
    return exact


def _caller(
    frame: Frame,
    function: Callable[..., Any],
    arguments: Any,
    keywords: Mapping[str, Any],
    last: Sequence[int] | None = None,
) -> Call:
    """A call of ``function`` whose late arguments come from the frame.

    Given the slots that nobody reads afterwards, ``last``, it passes all arguments as one list that ``function``
    empties. Nothing else refers to those then: a piece frees an input where eager does, not when all of it has run.
    """
    if not _has_late(arguments, keywords):
        return partial(function, *arguments, **keywords)
    flat, spec = tree_flatten((tuple(arguments), dict(keywords)))
    late = [(i, leaf.slot) for i, leaf in enumerate(flat) if isinstance(leaf, _Late)]
    numbers = [(i, leaf) for i, leaf in enumerate(flat) if isinstance(leaf, _LateNumber)]

    def call() -> Any:
        leaves, values = list(flat), frame.values
        for i, slot in late:
            leaves[i] = values[slot]
        for i, number in numbers:
            leaves[i] = number.at(frame.sizes)
        if last is not None:
            for slot in last:
                values[slot] = None
            return function(leaves)
        args, kwargs = tree_unflatten(leaves, spec)
        return function(*args, **kwargs)

    return call


def _has_late(arguments: Any, keywords: Mapping[str, Any]) -> bool:
    leaves, _ = tree_flatten((tuple(arguments), dict(keywords)))
    return any(isinstance(leaf, (_Late, _LateNumber)) for leaf in leaves)


def _finish(
    d: Draft,
    item: Item,
    call: Call,
    around: _Around,
    written: Sequence[fx.Node],
    paths: Sequence[tuple[fx.Node, tuple[int, ...]]],
    request: bool,
) -> None:
    """Adds a call and what its results need: copies into static memory, padding rows that repeat row 0."""
    for node in written:
        if node in d.static:
            _repeat_row_zero(d, item, node, around)
    stores = [_store(d, item, node, path, request, around) for node, path in paths]
    for copy in around.before:
        d.run(CopyRows.of(item, copy))
    kind: type[Operation] = RunPiece
    if isinstance(item, SplitOpItem):
        kind = PrepareMetadata if item.name.startswith(_METADATA) else RunSplitOp
    elif item.split_reason is not None:
        kind = RunSplitOp
    d.run(kind.of(item, partial(_call_and_store, call, stores) if stores else call))
    for operation in around.after:
        d.run(operation)


def _call_and_store(call: Call, stores: Sequence[Callable[[Any], Any]]) -> None:
    result = call()
    for store in stores:
        store(result)


def _repeat_row_zero(d: Draft, item: Item, node: fx.Node, around: _Around) -> None:
    calls = repeat_row_zero(d.static[node], d.plan.value(node), d.sizes)
    around.after.extend(RepeatRowZero.of(item, call) for call in calls)


def _store(
    d: Draft, item: Item, node: fx.Node, path: tuple[int, ...], request: bool, around: _Around
) -> Callable[[Any], Any]:
    """``store(result)`` keeps what a call gave for a node: in static memory, or in the frame."""
    fake, frame = d.plan.value(node), d.frame
    learn = _learner(d, fake)
    if not isinstance(fake, torch.Tensor):
        return lambda result: learn(_follow(result, path))
    late = isinstance(item, SplitOpItem) and item.op.late
    if d.bucket is None or late or not (request or d.plan.wants_static(node)):
        slot = d.late(node)

        def keep(result: Any) -> None:
            frame.values[slot] = value = _follow(result, path)
            learn(value)

        return keep
    d.static[node] = place = d.place(node)
    target = place if request else real_rows(place, fake, d.sizes)
    if not request:
        _repeat_row_zero(d, item, node, around)
    if not path and 0 not in target.stride():
        return target.copy_
    return lambda result: assign(target, _follow(result, path))


def _learner(d: Draft, fake: Any) -> Callable[[Any], None]:
    """Notes the sizes that only a result tells."""
    sizes = d.frame.sizes
    if not isinstance(fake, torch.Tensor):
        told = learned_from(fake)
        return (lambda value: sizes.update([told(value)])) if told is not None else _learn_nothing
    unknown = [(read, expr_of(n)) for read, n in _layout_of(fake) if not symbols_of(n) <= d.sizes.keys()]
    unknown = [(read, expr) for read, expr in unknown if isinstance(expr, sympy.Symbol)]
    return (lambda value: sizes.update((expr, read(value)) for read, expr in unknown)) if unknown else _learn_nothing


def _learn_nothing(value: Any) -> None:
    pass


def _layout_of(tensor: torch.Tensor) -> list[tuple[Callable[[Any], Any], Any]]:
    """Every number of a tensor's layout, and how to read it from a tensor like it."""
    numbers: list[tuple[Callable[[Any], Any], Any]] = []
    for i, size in enumerate(tensor.shape):
        numbers.append((partial(torch.Tensor.size, dim=i), size))
    if tensor.layout == torch.strided:
        for i, stride in enumerate(tensor.stride()):
            numbers.append((partial(torch.Tensor.stride, dim=i), stride))
        numbers.append((torch.Tensor.storage_offset, tensor.storage_offset()))
    return numbers


def _follow(result: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        result = result[index]
    return result
