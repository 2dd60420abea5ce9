"""Pieces in a program: replayed from captured graphs, which are made where there are none yet, or run uncaptured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..fx.facts import storage_of
from ..fx.plan import PieceItem
from ..fx.sizes import evaluate
from ..fx.uninitialized import uninitialized_results
from ..memory.buffers import extent
from ..memory.views import assign, has_layout
from ..torch_compat.cuda import unowned_alias
from .capture import CapturedGraph, StaticReplay, rng_unchanged
from .draft import Draft
from .probe import Argument, NoVerdict, few_rows, probe
from .program import Replay, RunPiece

__all__ = ["add_at_bucket", "conformer"]

#: A captured graph keeps its results: logits of 4,096 tokens would hold a gigabyte.
_RESULT_LIMIT = 256 << 20
#: Probes without a verdict after which steps of sizes that were met are built for good.
_MOST_PROBES = 8

Key = tuple[int, tuple[int, ...]]


def add_at_bucket(d: Draft, item: PieceItem) -> bool:
    """Adds a piece at the bucket's size, captured where it can be, and runs it; False: run it at its exact size."""
    assert d.bucket is not None
    if item.refusal is not None:
        if item.is_piece:
            d.fallbacks.append((item.refusal, item.where))
        return False
    if any(node not in d.static for node in item.reads):
        return False
    key = (item.index, tuple(d.bucket[s] for s in item.piece.symbols))
    reason = _too_large(d, item)
    if reason is None and d.binding.failures.get(key, 0) > 1:
        reason = "a piece could not be captured, twice; it runs uncaptured"
    if reason is not None:
        d.fallbacks.append((reason, item.where))
        return _add_uncaptured(d, item)
    if item.needs_probe and not item.probed and key[1] not in item.probed_at and not _probe(d, item, key):
        return False
    if item.probed:
        d.fallbacks.append((f"opaque, and by the probe mixing: {item.probed}", item.where))
        return False
    captured = d.binding.captured_graphs.get(key)
    if captured is not None:
        captured.replay()
    elif (captured := _capture(d, item, key)) is None:
        return _add_uncaptured(d, item)
    d.static.update(zip(item.outputs, captured.outputs, strict=True))
    if not item.idle:
        d.operations.append(Replay.of(item, captured.replay))
    if not item.trivial:
        d.capture_keys.append(key)
    return True


def _too_large(d: Draft, item: PieceItem) -> str | None:
    """Why a captured graph must not hold a piece's results."""
    budget = d.shared.options.memory_budget
    weight = sum(extent(shape, strides) * dtype.itemsize for shape, strides, dtype in d.layouts(item.outputs))
    if weight <= (_RESULT_LIMIT if budget is None else budget // 4):
        return None
    share = ", more than a quarter of memory_budget" if budget is not None else ""
    return f"the results of a piece would hold {weight >> 20} MiB{share}; it runs without a captured graph"


def _add_uncaptured(d: Draft, item: PieceItem) -> bool:
    """False where a piece may run at its exact size; else runs it at the bucket, as a replay that nothing holds.

    Its results share memory with something that is written later; exact results would be copies.
    """
    if not item.shares_written:
        return False
    inputs = [d.static[node] for node in item.piece.inputs]
    with torch.inference_mode(False), torch.no_grad():
        made = StaticReplay().capture(_at_bucket(d, item, inputs), _placer(d, item, inputs), None)
    d.static.update(zip(item.outputs, made.outputs, strict=True))
    d.operations.append(RunPiece.of(item, made.replay))
    return True


def _at_bucket(d: Draft, item: PieceItem, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    function = item.compiled.function if d.compiled else item.piece.gm.forward
    return partial(function, *(d.at[s] for s in item.piece.symbols), *inputs)


def _probe(d: Draft, item: PieceItem, key: Key) -> bool:
    """Probes a piece at a bucket, with this step's rows; False where there is no verdict."""
    assert d.bucket is not None
    piece = item.piece
    from_step = {s.node for s in d.plan.inputs if s.kind == "step"}
    rows = d.plan.row_indices
    padded = {s.node for s in d.plan.inputs if s.pad_value is not None or s.node.name in d.plan.zeroed}
    fixed = padded | from_step | rows.keys()
    arguments = [
        Argument(
            d.static[node], d.plan.value(node), i in piece.writes, node in fixed, int(node in from_step), rows.get(node)
        )
        for i, node in enumerate(piece.inputs)
    ]
    uninitialized = uninitialized_results(d.plan, item)
    filled = [d.plan.value(node) for i, node in enumerate(piece.outputs) if i not in uninitialized]
    # Where the step fills its bucket, its last row plays the padding.
    dims = d.plan.dims & set(piece.symbols)
    sizes: Mapping[sympy.Symbol, int] = {s: n - 1 if n == d.bucket[s] and s in dims else n for s, n in d.sizes.items()}
    few = few_rows(arguments, filled, d.sizes, d.bucket, sorted(dims, key=str), d.shared.chooser.allows)
    if not few:
        d.fallbacks.append((f"opaque: {item.safety.reason}; too small a bucket to probe it", item.where))
        return False
    if not d.shared.chooser.allows(sizes):
        sizes = few[-1]

    def run(tensors: Sequence[Any], at: Mapping[sympy.Symbol, int]) -> Sequence[torch.Tensor]:
        holds = item.compiled.broken_at(piece.symbols, at) is None
        function = item.compiled.function if holds else piece.gm.forward
        results = function(*(at[s] for s in piece.symbols), *tensors)
        return [result for i, result in enumerate(results) if i not in uninitialized]

    try:
        with rng_unchanged(d.shared.device):
            verdict = probe(run, arguments, filled, sizes, d.bucket, few)
    except NoVerdict as unknown:
        d.fallbacks.append((f"opaque: {item.safety.reason}; the probe could not tell: {unknown}", item.where))
        # Other rows may tell more: the next steps try again, those of this size too for some time.
        item.no_verdicts += 1
        d.provisional = item.no_verdicts <= _MOST_PROBES
        return False
    # "" where the probe found nothing, at any bucket so far.
    item.probed = verdict or ""
    item.probed_at.add(key[1])
    return True


def _capture(d: Draft, item: PieceItem, key: Key) -> CapturedGraph | None:
    """Captures a piece, which runs it; None, counted, where that failed."""
    piece, warm = item.piece, item.compiled.warm
    inputs = [d.static[node] for node in piece.inputs]
    function, conform = _at_bucket(d, item, inputs), conformer(d, piece)
    # What comes from the step is written at the step's slots, so writing twice is writing once.
    step_inputs = {s.node for s in d.plan.inputs if s.kind == "step"}
    captured = d.shared.capture(
        lambda: conform(function()),
        _placer(d, item, inputs),
        frozenset(piece.symbols),
        [inputs[i] for i in piece.writes if piece.inputs[i] not in step_inputs],
        None if item.trivial else d.bucket_name(),
        key[1] in warm,
    )
    if isinstance(captured, str):
        d.binding.failures[key] = d.binding.failures.get(key, 0) + 1
        d.complete = False
        d.shared.counters.fall_back(f"capture failed: {captured}", item.where)
        return None
    warm.add(key[1])
    if not item.trivial and not isinstance(d.shared.engine, StaticReplay):
        # Later captures may reuse the memory of the results once their last reader is captured.
        end = max((d.plan.last_use.get(node, len(d.plan.items)) for node in item.outputs), default=item.index)
        d.keep.setdefault(end, []).extend(captured.outputs)
        captured.outputs = [unowned_alias(t) for t in captured.outputs]
    d.binding.captured_graphs[key] = captured
    d.new.append(key)
    return captured


def conformer(d: Draft, piece: Any) -> Callable[[Any], Sequence[torch.Tensor]]:
    """Makes results look as the next piece was compiled for, where a compiler chose other strides."""
    layouts = d.layouts(piece.outputs)

    def conform(results: Any) -> Sequence[torch.Tensor]:
        checked = []
        for result, (shape, strides, dtype) in zip(results, layouts, strict=True):
            if not has_layout(result, shape, strides):
                result = assign(torch.empty_strided(shape, strides, dtype=dtype, device=result.device), result)
            checked.append(result)
        return checked

    return conform


def _placer(d: Draft, item: PieceItem, inputs: Sequence[torch.Tensor]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """``place(i, result)``: static memory for result ``i``; the result itself where it is a view of an input."""
    # Found when first asked for: a CUDA graph places its results itself.
    owned: set[int] = set()
    groups: dict[int, list[fx.Node]] = {}

    def place(i: int, result: torch.Tensor) -> torch.Tensor:
        node = item.outputs[i]
        fake = d.plan.value(node)
        if not groups:
            owned.update(t.untyped_storage().data_ptr() for t in inputs)
            for other in item.outputs:
                groups.setdefault(storage_of(d.plan.value(other)), []).append(other)
        if result.untyped_storage().data_ptr() in owned and result.numel():
            return result
        group = groups[storage_of(fake)]
        shape, strides, _ = d.layouts([node])[0]
        if len(group) == 1 or not all(s > 0 or n <= 1 for n, s in zip(shape, strides, strict=True)):
            return d.place(node)
        offset = int(evaluate(fake.storage_offset(), d.at))
        size = int(evaluate(fake.untyped_storage().nbytes(), d.at))
        base = d.binding.place((item.index, group[0], "group"), ("group", group[0]), (size,), (1,), torch.uint8)
        usable = base[: size // fake.dtype.itemsize * fake.dtype.itemsize].view(fake.dtype)
        return usable.as_strided(shape, strides, offset)

    return place
