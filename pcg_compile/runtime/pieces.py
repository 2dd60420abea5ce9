"""Pieces that run from a captured graph, made where there is none yet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..distributed.agreement import RankFailed
from ..errors import PCGError
from ..fx.facts import storage_of
from ..fx.plan import PieceItem
from ..fx.sizes import evaluate
from ..fx.uninitialized import uninitialized_results
from ..memory.buffers import extent
from ..memory.views import assign, has_layout
from ..torch_compat.cuda import unowned_alias
from .build_state import Building
from .capture import StaticReplay
from .probe import Argument, NoVerdict, few_rows, probe

__all__ = ["conformer", "run_captured"]

#: A captured graph keeps its results: logits of 4,096 tokens would hold a gigabyte.
_RESULT_LIMIT = 256 << 20
#: Probes without a verdict after which steps of sizes that were met are built for good.
_MOST_PROBES = 8


def run_captured(b: Building, item: PieceItem) -> bool:
    """Runs a piece from a captured graph, making it where there is none. False: it must run at its exact size."""
    assert b.bucket is not None
    if item.refusal is not None:
        if item.is_piece:
            b.program.fallbacks.append((item.refusal, item.where))
        return False
    if any(node not in b.static for node in item.reads):
        return False
    weight = _result_bytes(b, item)
    if weight > _result_limit(b):
        share = ", more than a quarter of memory_budget" if b.shared.options.memory_budget is not None else ""
        reason = f"the results of a piece would hold {weight >> 20} MiB{share}; it runs without a captured graph"
        b.program.fallbacks.append((reason, item.where))
        return _run_uncaptured(b, item)
    key = (item.index, tuple(b.bucket[s] for s in item.piece.symbols))
    if b.binding.failures.get(key, 0) > 1:
        b.program.fallbacks.append(("a piece could not be captured, twice; it runs uncaptured", item.where))
        return _run_uncaptured(b, item)
    if item.needs_probe and not item.probed and key[1] not in item.probed_at and not _probe(b, item, key):
        return False
    if item.probed:
        b.program.fallbacks.append((f"opaque, and by the probe mixing: {item.probed}", item.where))
        return False
    captured = b.binding.captured_graphs.get(key)
    if captured is not None:
        captured.replay()
    else:
        captured = _capture(b, item, key)
        if captured is None:
            return _run_uncaptured(b, item)
    b.static.update(zip(item.outputs, captured.outputs, strict=True))
    if not item.idle:
        b.program.ops.append(captured.replay)
    if not item.trivial:
        b.program.capture_keys.append(key)
        b.program.replays += 1
    return True


def _run_uncaptured(b: Building, item: PieceItem) -> bool:
    """False where a piece may run at its exact size; else runs it at the bucket, as a replay that nothing holds.

    Its results share memory with something that is written later, of which exact results would be copies.
    """
    if not item.shares_written:
        return False
    piece = item.piece
    inputs = [b.static[node] for node in piece.inputs]
    numbers = [b.at[s] for s in piece.symbols]
    function = item.compiled.function if b.compiled else piece.gm.forward
    with torch.inference_mode(False), torch.no_grad():
        made = StaticReplay().capture(lambda: function(*numbers, *inputs), _placer(b, item, inputs), None)
    b.static.update(zip(item.outputs, made.outputs, strict=True))
    b.program.ops.append(made.replay)
    return True


def _probe(b: Building, item: PieceItem, key: tuple[int, tuple[int, ...]]) -> bool:
    """Probes a piece at a bucket, with this step's rows; False where there is no verdict."""
    assert b.bucket is not None
    piece = item.piece
    from_step = {s.node for s in b.plan.inputs if s.kind == "step"}
    rows = b.plan.row_indices
    padded = {s.node for s in b.plan.inputs if s.pad_value is not None or s.node.name in b.plan.zeroed}
    fixed = padded | from_step | rows.keys()
    arguments = [
        Argument(
            b.static[node], b.plan.value(node), i in piece.writes, node in fixed, int(node in from_step), rows.get(node)
        )
        for i, node in enumerate(piece.inputs)
    ]
    uninitialized = uninitialized_results(b.plan, item)
    filled = [b.plan.value(node) for i, node in enumerate(piece.outputs) if i not in uninitialized]
    # Where the step fills its bucket, its last row plays the padding.
    dims = b.plan.dims & set(piece.symbols)
    sizes: Mapping[sympy.Symbol, int] = {s: n - 1 if n == b.bucket[s] and s in dims else n for s, n in b.sizes.items()}
    few = few_rows(arguments, filled, b.sizes, b.bucket, sorted(dims, key=str), b.shared.chooser.allows)
    if not few:
        reason = f"opaque: {item.safety.reason}; too small a bucket to probe it"
        b.program.fallbacks.append((reason, item.where))
        return False
    if not b.shared.chooser.allows(sizes):
        sizes = few[-1]

    def run(tensors: Sequence[Any], at: Mapping[sympy.Symbol, int]) -> Sequence[torch.Tensor]:
        holds = item.compiled.broken_at(piece.symbols, at) is None
        function = item.compiled.function if holds else piece.gm.forward
        results = function(*(at[s] for s in piece.symbols), *tensors)
        return [result for i, result in enumerate(results) if i not in uninitialized]

    try:
        with _rng_unchanged(b.shared.device):
            verdict = probe(run, arguments, filled, sizes, b.bucket, few)
    except NoVerdict as unknown:
        reason = f"opaque: {item.safety.reason}; the probe could not tell: {unknown}"
        b.program.fallbacks.append((reason, item.where))
        # Other rows may tell more: the next steps try again, those of this size too for some time.
        item.no_verdicts += 1
        b.program.provisional = item.no_verdicts <= _MOST_PROBES
        return False
    # "" where the probe found nothing, at any bucket so far.
    item.probed = verdict or ""
    item.probed_at.add(key[1])
    return True


def _result_bytes(b: Building, item: PieceItem) -> int:
    return sum(extent(shape, strides) * dtype.itemsize for shape, strides, dtype in b.layouts(item.outputs))


def _result_limit(b: Building) -> int:
    budget = b.shared.options.memory_budget
    return _RESULT_LIMIT if budget is None else budget // 4


def _capture(b: Building, item: PieceItem, key: tuple[int, tuple[int, ...]]) -> Any:
    piece, compiled = item.piece, item.compiled
    function = compiled.function if b.compiled else piece.gm.forward
    inputs = [b.static[node] for node in piece.inputs]
    numbers = [b.at[s] for s in piece.symbols]
    conform = conformer(b, piece)
    engine = StaticReplay() if item.trivial else b.shared.engine

    def run() -> Sequence[torch.Tensor]:
        return conform(function(*numbers, *inputs))

    # What comes from the step is written at the step's slots, so that writing twice is writing once.
    step_inputs = {s.node for s in b.plan.inputs if s.kind == "step"}
    written = [inputs[i] for i in piece.writes if piece.inputs[i] not in step_inputs]
    before = [t.clone() for t in written]

    def restore() -> None:
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)

    def warm_up() -> None:
        with _rng_unchanged(b.shared.device):
            run()
        restore()

    agreement = b.shared.agreement if not item.trivial else None
    started = time.perf_counter()
    try:
        with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
            captured = engine.capture(
                run,
                _placer(b, item, inputs),
                None if key[1] in compiled.warm else warm_up,
                frozenset(piece.symbols),
                agreement.all_ready if agreement is not None else lambda: None,
            )
    except PCGError:
        raise
    except Exception as error:
        restore()
        if agreement is not None and not isinstance(error, RankFailed):
            agreement.all_ready(False)
        b.binding.failures[key] = b.binding.failures.get(key, 0) + 1
        b.program.complete = False
        reason = f"capture failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        b.shared.counters.fall_back(reason, item.where)
        return None
    compiled.warm.add(key[1])
    if captured.nbytes >= 0 and not isinstance(engine, StaticReplay):
        b.keep.setdefault(_release_after(b, item), []).extend(captured.outputs)
        captured.outputs = [unowned_alias(t) for t in captured.outputs]
    b.binding.captured_graphs[key] = captured
    b.new.append(key)
    if not item.trivial:
        b.shared.counters.captured += 1
        use = b.shared.counters.bucket(b.bucket_name())
        use.seconds += time.perf_counter() - started
        use.bytes += captured.nbytes
    return captured


def _release_after(b: Building, item: PieceItem) -> int:
    """The item after which later captured graphs may reuse the memory of this one's results."""
    ends = [b.plan.last_use.get(node, len(b.plan.items)) for node in item.outputs]
    return max(ends, default=item.index)


def conformer(b: Building, piece: Any) -> Callable[[Any], Sequence[torch.Tensor]]:
    """Makes results look as the next piece was compiled for, where a compiler chose other strides."""
    layouts = b.layouts(piece.outputs)

    def conform(results: Any) -> Sequence[torch.Tensor]:
        checked = []
        for result, (shape, strides, dtype) in zip(results, layouts, strict=True):
            if not has_layout(result, shape, strides):
                result = assign(torch.empty_strided(shape, strides, dtype=dtype, device=result.device), result)
            checked.append(result)
        return checked

    return conform


def _placer(
    b: Building, item: PieceItem, inputs: Sequence[torch.Tensor]
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    # Found when first asked for: a CUDA graph places its results itself.
    owned: set[int] = set()
    groups: dict[int, list[fx.Node]] = {}

    def place(i: int, result: torch.Tensor) -> torch.Tensor:
        node = item.outputs[i]
        fake = b.plan.value(node)
        shape, strides, _ = b.layouts([node])[0]
        if not groups:
            owned.update(t.untyped_storage().data_ptr() for t in inputs)
            for other in item.outputs:
                groups.setdefault(storage_of(b.plan.value(other)), []).append(other)
        if result.untyped_storage().data_ptr() in owned and result.numel():
            return result
        group = groups[storage_of(fake)]
        if len(group) == 1:
            return b.binding.place(node, ("value", b.plan.slots[node]), shape, strides, fake.dtype)
        offset = int(evaluate(fake.storage_offset(), b.at))
        size = int(evaluate(fake.untyped_storage().nbytes(), b.at))
        base = b.binding.place((item.index, group[0], "group"), ("group", group[0]), (size,), (1,), torch.uint8)
        if all(s > 0 or n <= 1 for n, s in zip(shape, strides, strict=True)):
            usable = base[: size // fake.dtype.itemsize * fake.dtype.itemsize].view(fake.dtype)
            return usable.as_strided(shape, strides, offset)
        return b.binding.place(node, ("value", b.plan.slots[node]), shape, strides, fake.dtype)

    return place


@contextlib.contextmanager
def _rng_unchanged(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A cast weight in autocast's cache would be freed under a captured graph that reads it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
