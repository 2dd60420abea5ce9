"""Warm-up: buckets are captured ahead of time, and kept where they pay."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..attention.by_time import choose_by_time
from ..attention.cache import PagedKVCache
from ..counters import Counters
from ..fx.plan import SplitOpItem
from ..fx.sizes import evaluate, expr_of, shape_at
from ..memory.views import real_rows
from ..step import scratch_step
from ..step_state import StepState
from .binding import Binding
from .budget import respect_budget
from .builder import build_and_run
from .capture import rng_unchanged, undone
from .full_graph import FullGraph
from .program import Program
from .state import GraphState
from .timing import seconds_of

__all__ = ["WarmUp", "requested_warm_up", "warm_up", "warm_up_context"]

_LOG = logging.getLogger("pcg_compile")

#: A bucket that takes longer than this many times the step without captured graphs is not used.
_GAIN_LIMIT = 1.05

#: What runs attention between pieces: (q, out, layer, encoded shape, ...).
_ATTEND = "pcg::attend"

#: Combinations of buckets that a first call captures at most.
_MOST_AT_FIRST = 64


@dataclass
class WarmUp:
    """A request to capture buckets, while it is in force: calls then leave no effects.

    Attributes:
        buckets: what to capture, one size or a tuple for each dynamic size; None: the table.
        report: called before each captured graph with (done, total, name of the bucket).
        observe: called once with (the graph's runtime, the call's arguments, the running step or None).
        served: how many graphs have answered it. dynamic: whether one of them has a dynamic size.
        counters: their figures.
    """

    buckets: Sequence[int | tuple[int, ...]] | None = None
    report: Callable[[int, int, Any], None] = lambda done, total, name: None
    observe: Callable[[GraphState, Sequence[Any], StepState | None], None] = lambda runtime, args, step: None
    #: ``capture="first_call"``: of a graph with several dynamic sizes, every combination of buckets.
    first_call: bool = False
    served: int = 0
    dynamic: bool = False
    counters: list[Counters] = field(default_factory=list)
    #: When its first graph was reached, by ``time.perf_counter``.
    began: float = 0.0


_WARM_UP: ContextVar[WarmUp | None] = ContextVar("pcg_warm_up", default=None)


def requested_warm_up() -> WarmUp | None:
    """The request in force, if any."""
    return _WARM_UP.get()


@contextlib.contextmanager
def warm_up_context(request: WarmUp) -> Iterator[None]:
    """Calls of compiled graphs inside capture instead of serving."""
    token = _WARM_UP.set(request)
    try:
        yield
    finally:
        _WARM_UP.reset(token)


def warm_up(graph: GraphState, args: Sequence[Any], request: WarmUp) -> Any:
    """Captures buckets with a call's arguments as the example, and answers the call; nothing else changes."""
    request.began = request.began or time.perf_counter()
    request.served += 1
    request.dynamic = request.dynamic or bool(graph.plan.dims)
    request.counters.append(graph.shared.counters)
    graph.order_streams()
    sizes = dict(zip(graph.plan.symbols, graph.sizes_of(args), strict=True))
    step = graph.step()
    wanted = _wanted(graph, request, sizes)
    # The largest bucket comes first: once one pays, so do the smaller ones.
    # Ranks measure different times, and must not choose by them.
    alone = graph.shared.agreement is None
    doubtful = alone and len(graph.bucketed) == 1 and graph.shared.device.type == "cuda"
    with graph.shared.engine.session():
        for done, bucket in enumerate(wanted):
            request.report(done, len(wanted), graph.name(tuple(bucket[s] for s in graph.plan.symbols)))
            real = {s: min(n, bucket[s]) if s in graph.plan.dims else n for s, n in sizes.items()}
            doubtful = _capture_bucket(graph, _shrunk(graph, args, real), real, bucket, doubtful)
    request.report(len(wanted), len(wanted), None)
    with _no_effects(graph, args):
        request.observe(graph, args, step)
    result = _answer(graph, args, sizes, step)
    # Kernels were warmed up, and steps measured, in memory that no captured graph uses.
    graph.shared.engine.give_back()
    return result


def _answer(graph: GraphState, args: Sequence[Any], sizes: Mapping[sympy.Symbol, int], step: Any) -> Any:
    """The outputs of the call that asked for a warm-up."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_effects(graph, args))
        if step is not None:
            step = stack.enter_context(scratch_step(graph.tokens(tuple(sizes.values())), step.cache))
        binding = graph.binding(args, step)
        if graph.plan.eager is not None or graph.memory.overlapping(binding, args, step):
            # What the graph does to a tensor itself happens to others over the same memory.
            return graph.run_eagerly([a.detach() if isinstance(a, torch.Tensor) else a for a in args])
        _, result = build_and_run(binding, sizes, None, args, step)
        return result


def _wanted(graph: GraphState, request: WarmUp, sizes: Mapping[sympy.Symbol, int]) -> list[dict[sympy.Symbol, int]]:
    if graph.plan.refusal is not None:
        return []
    if not graph.bucketed:
        return [dict(sizes)]
    groups = _alike(graph, sizes)
    table: Sequence[int | tuple[int, ...]] = graph.shared.chooser.table
    if request.buckets is not None:
        table = request.buckets
    elif len(groups) > 1 and request.first_call:
        if len(table) ** len(groups) > _MOST_AT_FIRST:
            _LOG.warning(
                'capture="first_call": %d buckets for each of %d dynamic sizes (%s) are too many to capture ahead; '
                "each combination is captured when it is first met",
                *(len(table), len(groups), _named(graph, groups)),
            )
            return []
        table = list(itertools.product(graph.shared.chooser.table, repeat=len(groups)))
    elif len(groups) > 1:
        raise ValueError(
            f"the model has {len(groups)} dynamic sizes ({_named(graph, groups)}): pass buckets=[(b, ...), ...] to "
            "pcg.warmup(), one tuple a bucket"
        )
    wanted: list[dict[sympy.Symbol, int]] = []
    for entry in table:
        entries = entry if isinstance(entry, tuple) else (entry,) * len(groups)
        if len(entries) == len(graph.bucketed):
            groups = [[symbol] for symbol in graph.bucketed]
        if len(entries) != len(groups):
            raise ValueError(
                f"bucket {entry} has {len(entries)} sizes, the model has {len(groups)} dynamic ones: "
                f"{_named(graph, groups)}"
            )
        of_each = {symbol: n for group, n in zip(groups, entries, strict=True) for symbol in group}
        choice = graph.shared.chooser.choose({**sizes, **of_each}, graph.bucketed)
        if choice.sizes is None:
            graph.shared.counters.fall_back(f"bucket {entry} was not captured: {choice.reason}")
        elif dict(choice.sizes) not in wanted:
            wanted.append(dict(choice.sizes))
    # Largest first: smaller buckets then fit into the memory of larger ones.
    return sorted(wanted, key=lambda bucket: tuple(bucket[s] for s in graph.bucketed), reverse=True)


def _alike(graph: GraphState, sizes: Mapping[sympy.Symbol, int]) -> list[list[sympy.Symbol]]:
    """The sizes to bucket; as one those of several tensors with one dimension and value, such as ids and their mask."""
    groups: dict[tuple[int, int], list[sympy.Symbol]] = {}
    for symbol in graph.bucketed:
        groups.setdefault((_place(graph, symbol)[0], sizes[symbol]), []).append(symbol)
    return list(groups.values())


def _place(graph: GraphState, symbol: sympy.Symbol) -> tuple[int, str]:
    """The input and dimension that a size is read from; -1 for a number."""
    for spec in graph.plan.inputs:
        if isinstance(spec.value, torch.Tensor):
            for dim, size in enumerate(spec.value.shape):
                if expr_of(size) == symbol:
                    return dim, spec.node.name
    return -1, str(symbol)


def _named(graph: GraphState, groups: Sequence[Sequence[sympy.Symbol]]) -> str:
    """Whose sizes they are."""
    places = [_place(graph, group[0]) for group in groups]
    return ", ".join(f"dimension {dim} of {name}" for dim, name in places)


def _shrunk(graph: GraphState, args: Sequence[Any], real: Mapping[sympy.Symbol, int]) -> list[Any]:
    result = list(args)
    for spec in graph.plan.inputs:
        if spec.position < 0:
            continue
        if isinstance(spec.value, torch.Tensor):
            if spec.kind == "user":
                result[spec.position] = real_rows(args[spec.position], spec.value, real)
        elif spec.kind == "size":
            result[spec.position] = evaluate(spec.value, real)
    return result


def _capture_bucket(
    graph: GraphState,
    args: Sequence[Any],
    real: Mapping[sympy.Symbol, int],
    bucket: Mapping[sympy.Symbol, int],
    doubtful: bool,
) -> bool:
    """Captures one bucket. Where it is ``doubtful`` that this pays, measures it; returns whether it still is."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_effects(graph, args))
        step = graph.step()
        tokens = graph.tokens(tuple(bucket[s] for s in graph.plan.symbols)) if step is not None else 0
        if step is not None:
            step = stack.enter_context(scratch_step(tokens, step.cache))
        binding, alone = graph.binding(args, step), graph.shared.agreement is None
        program, _ = build_and_run(binding, real, bucket, args, step)
        if program.complete:
            if doubtful and not _pays(graph, binding, program, bucket, args, step):
                return True
            if step is not None and step.cache is not None and graph.shared.device.type == "cuda":
                # Kernels that a kind of batch needs are compiled now, not while serving.
                replays = graph.shared.counters.replays
                for _ in step.each_kind(tokens):
                    program.load(args)
                    program.run_body()
                graph.shared.counters.replays = replays
            full_graph = program.body.full_graph
            if full_graph is not None and _may_capture_full_graph(graph, full_graph):
                program.load(args)
                full_graph.warm_up(program.run_body)
            if step is not None and step.cache is not None and alone:
                _choose_attention(graph, full_graph, graph.name(program.bucket), step.cache, tokens)
            program.frame.clear()
            respect_budget(graph, binding, program.bucket)
    return False


def _pays(
    graph: GraphState,
    binding: Binding,
    program: Program,
    bucket: Mapping[sympy.Symbol, int],
    args: Sequence[Any],
    step: Any,
) -> bool:
    """Whether replaying a full bucket is as fast as running it without captured graphs; gives the bucket up if not."""
    full = [_at_bucket(graph, binding, position, bucket, args) for position in range(len(args))]
    exact, _ = build_and_run(binding, bucket, None, full, step)
    device, replays = graph.shared.device, graph.shared.counters.replays

    def replay() -> None:
        program.load(args)
        program.run_body()

    replayed = seconds_of(step, replay, device, runs=4)
    plain = seconds_of(step, lambda: exact.run(full), device, runs=4)
    graph.shared.counters.replays = replays
    if replayed <= _GAIN_LIMIT * plain:
        return True
    assert program.bucket is not None
    binding.forget(program.bucket)
    binding.given_up[program.bucket] = (
        f"bucket {graph.name(program.bucket)} does not pay: {1e3 * replayed:.2f} ms replayed, "
        f"{1e3 * plain:.2f} ms without captured graphs"
    )
    return False


def _at_bucket(
    graph: GraphState, binding: Binding, position: int, bucket: Mapping[sympy.Symbol, int], args: Sequence[Any]
) -> Any:
    """An argument that fills the bucket: the static memory that it is copied to, as warm-up left it."""
    spec = next(s for s in graph.plan.inputs if s.position == position)
    if not isinstance(spec.value, torch.Tensor):
        return evaluate(spec.value, bucket) if spec.kind == "size" else args[position]
    return binding.placed.get((spec.node, shape_at(spec.value, bucket)), args[position])


def _choose_attention(
    graph: GraphState, full_graph: FullGraph | None, bucket: Hashable, cache: PagedKVCache, tokens: int
) -> None:
    """Has attention run by what is fastest at a bucket, where several implementations can."""
    calls = [item.node.args for item in graph.plan.items if isinstance(item, SplitOpItem) and item.name == _ATTEND]
    in_graph = full_graph is not None and bool(full_graph.wanted)
    if not calls or (in_graph and graph.shared.options.cudagraph_mode == "full"):
        return
    saved = full_graph.saves if full_graph is not None and in_graph else 0.0
    chosen = choose_by_time(cache, Counter(str(args[3]) for args in calls), tokens, saved)
    if chosen is None:
        return
    if full_graph is not None and in_graph and not chosen[0]:
        full_graph.give_up()
    figures = graph.shared.counters.bucket(bucket)
    figures.attention = "; ".join(filter(None, (figures.attention, chosen[1])))


def _may_capture_full_graph(graph: GraphState, full_graph: FullGraph) -> bool:
    """Whether warm-up tries a full CUDA graph: on a CPU, where a replay runs the same calls, only if told to."""
    return full_graph.wanted is not None or (graph.shared.device.type == "cuda" and graph.shared.agreement is None)


@contextlib.contextmanager
def _no_effects(graph: GraphState, args: Sequence[Any]) -> Iterator[None]:
    """Puts back what the graph mutates, and the state of the random number generators."""
    restore = undone(graph.written(args))
    try:
        with rng_unchanged(graph.shared.device):
            yield
    finally:
        restore()
