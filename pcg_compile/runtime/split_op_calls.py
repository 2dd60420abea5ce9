"""What runs between captured graphs: split ops, and pieces at their exact size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..fx.contexts import Autocast
from ..fx.plan import Item, PieceItem, SplitOpItem
from ..fx.sizes import evaluate, expr_of, is_scalar, learned_from, shape_at, strides_at, symbols_of
from ..memory.views import assign, looks_like, real_rows
from .binding import wants_static
from .build_state import Building
from .program import Op
from .row_padding import repeat_row_zero

__all__ = ["attribute", "callable_of", "function_at", "run_call", "run_exact"]


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


def run_exact(b: Building, item: PieceItem) -> None:
    """Runs a piece at the step's real sizes."""
    piece = item.piece
    numbers = [b.sizes.get(s, _LateNumber(v, b.sizes)) for s, v in zip(piece.symbols, piece.example, strict=False)]
    function = function_at(b, item, b.sizes)
    before: list[Op] = []
    after: list[Op] = []
    arguments = [_real(b, node, i in piece.writes, item, before, after) for i, node in enumerate(piece.inputs)]
    written = [piece.inputs[i] for i in piece.writes]
    module = getattr(function, "__self__", None)
    last = [b.slots[node] for node in b.last_read_at(item.index) if node in piece.inputs]
    if last and isinstance(module, fx.GraphModule):
        call = _caller(b, b.shared.boxed(module), (*numbers, *arguments), {}, last)
    else:
        call = _caller(b, function, (*numbers, *arguments), {})
    _finish(b, item, call, before, after, written, [(node, (i,)) for i, node in enumerate(piece.outputs)], False)


def function_at(b: Building, item: PieceItem, sizes: Mapping[sympy.Symbol, int]) -> Callable[..., Any]:
    """What computes a piece at sizes that no bucket was chosen for: eager where the compiler assumed others."""
    if not b.compiled:
        return item.piece.gm.forward
    broken = item.compiled.broken_at(item.piece.symbols, sizes)
    if broken is None:
        return item.compiled.function
    b.program.fallbacks.append((f"a piece runs eagerly: it was compiled for {broken}", item.where))
    return item.piece.gm.forward


def run_call(b: Building, item: SplitOpItem) -> None:
    """Runs a split op, at the bucket in request mode, else at the real sizes."""
    if item.counted:
        b.program.fallbacks.append((f"between pieces: {item.reason}", item.where))
    request = item.mode == "request" and b.bucket is not None and (b.requests or item.request is None)
    sizes = b.at if request else b.sizes
    before: list[Op] = []
    after: list[Op] = []
    written = set(item.writes)
    done: dict[fx.Node, Any] = {}

    def resolve(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(b.plan.gm, str(node.target))
        value = b.plan.value(node)
        if is_scalar(value):
            return evaluate(value, sizes) if symbols_of(value) <= sizes.keys() else _LateNumber(value, sizes)
        if node not in done:
            if request and node in b.static:
                done[node] = b.static[node]
            else:
                done[node] = _real(b, node, node in written, item, before, after)
        return done[node]

    arguments = fx.node.map_arg(item.node.args, resolve)
    keywords = fx.node.map_arg(item.node.kwargs, resolve)
    if request and "pcg_maxima" in item.node.meta:
        arguments, keywords = _raise_maxima(b, item, arguments, keywords)
    extra: dict[str, Any] = {}
    if item.op.bucket_args:
        # Metadata that are padded for an op stay as they are where it gets the real rows.
        at = b.at if b.requests or not item.op.late else b.sizes
        arguments = tuple(
            _at(b, item.node.args[i], at) if i in item.op.bucket_args else a for i, a in enumerate(arguments)
        )
        extra["mode"] = item.mode
    if item.op.bind is not None:
        call = _binder(b, item.op.bind, arguments, {**keywords, **extra})
        reason = item.op.fallback(*item.node.args, **item.node.kwargs) if item.op.fallback is not None else None
        if reason is not None:
            b.program.fall_back_with_bucket(reason, item.where)
    else:
        call = _caller(b, _function_of(item), arguments, keywords)
    if item.autocast:
        call = _in_autocast(call, item.autocast)
    paths = [(node, _path(node, item.node)) for node in item.outputs]
    _finish(b, item, call, before, after, [] if request else list(item.writes), paths, request)


def _raise_maxima(b: Building, item: SplitOpItem, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    """Declared maxima are at least the bucket: the padding request may be the longest."""
    tokens, places = item.node.meta["pcg_maxima"]
    least = _at(b, tokens, b.at)

    def raised(value: Any) -> Any:
        return replace(value, least=least) if isinstance(value, _LateNumber) else max(value, least)

    arguments = tuple(raised(value) if i in places else value for i, value in enumerate(arguments))
    return arguments, {name: raised(value) if name in places else value for name, value in keywords.items()}


def _at(b: Building, argument: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    return evaluate(b.plan.value(argument), sizes) if isinstance(argument, fx.Node) else argument


def _real(b: Building, node: fx.Node, written: bool, item: Item, before: list[Op], after: list[Op]) -> Any:
    """A tensor argument at its real size, looking exactly as eager's."""
    if node not in b.static:
        return _Late(b.late(node))
    fake = b.plan.value(node)
    view = real_rows(b.static[node], fake, b.sizes)
    if looks_like(view, fake, b.sizes) or (isinstance(item, SplitOpItem) and item.op.any_strides):
        return view
    shape, strides = shape_at(fake, b.sizes), strides_at(fake, b.sizes)
    with torch.inference_mode(False), torch.no_grad():
        exact = torch.empty_strided(shape, strides, dtype=view.dtype, device=view.device)
    before.append(partial(exact.copy_, view))
    if written:
        after.append(partial(view.copy_, exact))
    return exact


def _caller(
    b: Building,
    function: Callable[..., Any],
    arguments: Any,
    keywords: Mapping[str, Any],
    last: Sequence[int] | None = None,
) -> Op:
    """A call of ``function`` whose late arguments come from the frame.

    Given the slots that nobody reads afterwards, ``last``, it passes all arguments as one list that ``function``
    empties. Nothing else refers to those then: a piece frees an input where eager does, not when all of it has run.
    """
    flat, spec = tree_flatten((tuple(arguments), dict(keywords)))
    late = [(i, leaf.slot) for i, leaf in enumerate(flat) if isinstance(leaf, _Late)]
    numbers = [(i, leaf) for i, leaf in enumerate(flat) if isinstance(leaf, _LateNumber)]
    if not late and not numbers:
        return partial(function, *arguments, **keywords)
    frame, sizes = b.program.frame, b.program.sizes

    def call() -> Any:
        leaves = list(flat)
        for i, slot in late:
            leaves[i] = frame[slot]
        for i, number in numbers:
            leaves[i] = number.at(sizes)
        if last is not None:
            for slot in last:
                frame[slot] = None
            return function(leaves)
        args, kwargs = tree_unflatten(leaves, spec)
        return function(*args, **kwargs)

    return call


def _binder(b: Building, bind: Callable[..., Op], arguments: Any, keywords: Mapping[str, Any]) -> Op:
    if any(_has_late(value) for value in (*arguments, *keywords.values())):
        late = _caller(b, bind, arguments, keywords)
        return lambda: late()()
    return bind(*arguments, **keywords)


def _has_late(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return any(isinstance(leaf, (_Late, _LateNumber)) for leaf in tree_flatten(value)[0])
    return isinstance(value, (_Late, _LateNumber))


def _finish(
    b: Building,
    item: Item,
    call: Op,
    before: list[Op],
    after: list[Op],
    written: Sequence[fx.Node],
    paths: Sequence[tuple[fx.Node, tuple[int, ...]]],
    request: bool,
) -> None:
    """Adds a call and what its results need: copies into static memory, padding rows that repeat row 0."""
    for node in written:
        if node in b.static:
            after.extend(repeat_row_zero(b.static[node], b.plan.value(node), b.sizes))
    late_results = isinstance(item, SplitOpItem) and item.op.late
    stores = [_store(b, node, path, request, late_results, after) for node, path in paths]
    for op in before:
        b.add(op)
    if not stores:
        b.add(call)
    else:

        def call_and_store() -> None:
            result = call()
            for store in stores:
                store(result)

        b.add(call_and_store)
    for op in after:
        b.add(op)


def _store(
    b: Building, node: fx.Node, path: tuple[int, ...], request: bool, late: bool, after: list[Op]
) -> Callable[[Any], None]:
    fake = b.plan.value(node)
    learn = _learner(b, fake)
    if not isinstance(fake, torch.Tensor):
        return lambda result: learn(_follow(result, path))
    if b.bucket is None or late or not (request or wants_static(b.plan, node)):
        slot, frame = b.late(node), b.program.frame

        def keep(result: Any) -> None:
            frame[slot] = value = _follow(result, path)
            learn(value)

        return keep
    shape, strides = shape_at(fake, b.at), strides_at(fake, b.at)
    place = b.binding.place(node, ("value", b.plan.slots[node]), shape, strides, fake.dtype)
    b.static[node] = place
    target = place if request else real_rows(place, fake, b.sizes)
    if not request:
        after.extend(repeat_row_zero(place, fake, b.sizes))
    if not path and 0 not in target.stride():
        return target.copy_
    return lambda result: assign(target, _follow(result, path))  # type: ignore[func-returns-value]


def _learner(b: Building, fake: Any) -> Callable[[Any], None]:
    """Notes the sizes that only a result tells."""
    sizes = b.program.sizes
    if not isinstance(fake, torch.Tensor):
        told = learned_from(fake)
        if told is None:
            return lambda value: None

        def note(value: Any) -> None:
            symbol, number = told(value)
            sizes[symbol] = number

        return note
    unknown = [(read, expr_of(n)) for read, n in _layout_of(fake) if not symbols_of(n) <= b.sizes.keys()]
    if not unknown:
        return lambda value: None

    def note_shape(value: Any) -> None:
        for read, expr in unknown:
            if isinstance(expr, sympy.Symbol):
                sizes[expr] = read(value)

    return note_shape


def _function_of(item: SplitOpItem) -> Callable[..., Any]:
    target: Any = item.node.target
    if item.op.function is not None:
        return item.op.function
    if item.node.op == "call_method":
        name = str(target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    return target


def callable_of(item: SplitOpItem) -> Callable[..., Any]:
    """What a split op calls, under the autocast regions that it stood in."""
    function = _function_of(item)
    return _in_autocast(function, item.autocast) if item.autocast else function


def _path(node: fx.Node, source: fx.Node) -> tuple[int, ...]:
    path: list[int] = []
    while node is not source:
        path.insert(0, node.args[1])  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return tuple(path)


def _layout_of(tensor: torch.Tensor) -> list[tuple[Callable[[torch.Tensor], int], Any]]:
    """Every number of a tensor's layout, and how to read it from a tensor like it."""
    numbers: list[tuple[Callable[[torch.Tensor], int], Any]] = []
    for d, size in enumerate(tensor.shape):
        numbers.append((lambda t, d=d: t.shape[d], size))  # type: ignore[misc]
    if tensor.layout == torch.strided:
        for d, stride in enumerate(tensor.stride()):
            numbers.append((lambda t, d=d: t.stride(d), stride))  # type: ignore[misc]
        numbers.append((torch.Tensor.storage_offset, tensor.storage_offset()))
    return numbers


def _follow(result: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        result = result[index]
    return result


def attribute(owner: Any, name: str) -> Any:
    """What a dotted name stands for."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def _in_autocast(call: Callable[..., Any], regions: Autocast) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in regions:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            return call(*args, **kwargs)

    return run
