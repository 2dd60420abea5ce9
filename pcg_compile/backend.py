"""The backend: graph in, passes, split, pieces, callable out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from .attention.ops import refuse_gradients
from .calls import Counted, check_shown_sizes, graph_handed, traced_code, weights_of_call
from .distributed.lowering import (
    agreement_of,
    collective_outside_captures,
    first_collective,
    has_subclasses,
    lowered,
    release_at_exit,
)
from .errors import Hazard, OptionsError, PCGError, SplitOpNotFound, UnsafePadding
from .fx.attributes import attributes_as_inputs
from .fx.changing_floats import REASON as CHANGES
from .fx.changing_floats import isolate_numbers
from .fx.contexts import region_without_gradients, switches_gradients_on
from .fx.facts import Calls, DataDecide, NodeFacts, calls_of, squeezed_sizes, trace_facts, update_facts
from .fx.fake_storages import told_apart
from .fx.inplace_shapes import shape_by_views
from .fx.places import name_of_input, place_of, place_of_stack, place_parts
from .fx.plan import PieceItem, Plan, SplitOpItem, make_plan
from .fx.sizes import expr_of, sizes_of, symbol_values
from .fx.splitting import find_cuts, name_tuple_elements, op_names, segments_of
from .fx.submodules import Compiled, compile_piece, copy_graph, structure_of
from .fx.unsupported_tensors import strange_tensor
from .options import Options
from .passes import metadata_passes, safety_passes
from .passes.context import PassContext
from .passes.padding_safety.analysis import PieceSafety, analyze_piece
from .passes.padding_safety.masks import OTHER, WILD, mask_inputs
from .registry import (
    add_runtime,
    graphs_of_caller,
    present_caller,
    reset,
    runtimes_of_caller,
)
from .runtime.binding import Shared
from .runtime.buckets import BucketChooser
from .runtime.capture import engine_for
from .runtime.runner import GraphRuntime
from .split_ops import check_registration
from .stats import Counters
from .torch_compat.dynamo_graphs import changing_floats, graph_break_of, is_asked_for, traced_function
from .torch_compat.dynamo_traces import watch_traces
from .torch_compat.dynamo_wrappers import calling_wrapper
from .torch_compat.fake_tensors import fake_inputs, fake_mode_of
from .torch_compat.guards import layouts_apart, shape_guards
from .torch_compat.inductor import compile_all_with_inductor, prepare_inductor, start_inductor_workers
from .traces import watch_all

__all__ = ["compile_graph", "pcg", "watched"]

_LOG = logging.getLogger("pcg_compile")


def pcg(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """The Dynamo backend: ``torch.compile(model, backend="pcg", options={...})``.

    Raises:
        OptionsError: a bad option; see :class:`pcg_compile.options.Options`.
        SplitOpNotFound: a split op named in the options that the graph does not have.
        GraphBreakingScalarWrite, CaptureHazard: what no captured graph can hold, and cannot be isolated.
    """
    return compile_graph(gm, example_inputs, Options.parse(options, mode), calling_wrapper() or pcg)


def watched(wrapper: Any) -> tuple[object, Options] | None:
    """The owner and the options of what ``torch.compile`` made of a backend, None where the backend is not pcg's.

    It is asked ahead of each trace: what compiling will wait for begins here.

    Raises:
        OptionsError: a mode was given, which is none of pcg's.
    """
    backend = wrapper.compiler_fn
    if backend is pcg:
        Options.parse(None, wrapper.kwargs.get("mode"))
        try:
            options = Options.parse(wrapper.kwargs.get("options"))
        except OptionsError:
            return None  # raised again where a graph is compiled
    elif getattr(backend, "watched", False):
        options = backend.options
    else:
        return None
    if options.compiler == "inductor" and torch.cuda.is_initialized():
        start_inductor_workers()
    return (wrapper if backend is pcg else backend), options


def compile_graph(gm: fx.GraphModule, real_inputs: Sequence[Any], options: Options, owner: object) -> Any:
    """Compiles one Dynamo graph; ``owner`` is the backend that it is compiled by, or what torch.compile made of it."""
    watch_traces()
    floats = {node.name: value for node, value in changing_floats(gm, traced_code()).items()}
    graph_handed()
    broken = graph_break_of(gm)
    lifted, weights = attributes_as_inputs(gm)
    inputs = [*real_inputs, *weights]
    weights_now = weights_of_call(weights)
    strange = strange_tensor(lifted, inputs)
    if strange is not None and _requires_grad(lifted, inputs) is None:
        function = _uncaptured(lifted.forward, owner, Counters(strict=options.strict, graphs=1), *strange)
    elif has_subclasses(inputs) and not torch.is_grad_enabled():
        function = lowered(lifted, inputs, lambda plain, fakes: _compile(plain, fakes, options, owner, broken, floats))
    else:
        function = _compile(lifted, inputs, options, owner, broken, floats)
    return partial(_with_weights, function, weights_now) if weights else function


def _with_weights(function: Callable[..., Any], weights: Callable[[], Sequence[torch.Tensor]], *args: Any) -> Any:
    return function(*args, *weights())


def _compile(
    gm: fx.GraphModule,
    real_inputs: Sequence[Any],
    options: Options,
    owner: object,
    broken: tuple[str, Any] | None,
    floats: Mapping[str, float],
) -> Any:
    ends_step = broken is None
    example_inputs = fake_inputs(real_inputs)
    device = capture_device(example_inputs)
    counters = Counters(strict=options.strict, graphs=1)
    plain = not has_subclasses(real_inputs)
    region = region_without_gradients(gm) if plain and torch.is_grad_enabled() else None
    trainable = _requires_grad(gm, example_inputs) if region is None else None
    if trainable is not None and any("pcg::paged_attention" in op_names(node, None) for node in gm.graph.nodes):
        # When the model runs, not now: an error of a backend would be wrapped in one of Dynamo's.
        check_shown_sizes(fake_mode_of(example_inputs))
        add_runtime(owner, counters, None)
        return refuse_gradients
    if trainable is not None:
        reason = (
            f'gradients are enabled and {trainable} requires them: compiled as backend="inductor" would; '
            "for inference, call the model under torch.inference_mode()"
        )
        return _uncaptured(compile_all_with_inductor(gm, real_inputs), owner, counters, reason)
    if not torch.is_grad_enabled() and switches_gradients_on(gm):
        return _uncaptured(gm.forward, owner, counters, "a part of the graph switches gradients on: it runs eagerly")
    ready = prepare_inductor(device) if options.compiler == "inductor" else lambda: None
    # Dynamo goes on using its own graph.
    rewritable = copy_graph(gm)
    numbers = isolate_numbers(rewritable, floats) if floats else []
    if numbers is None:
        return _uncaptured(gm.forward, owner, counters, "the graph returns a float that changes: it runs eagerly")
    with torch.no_grad():
        try:
            facts = trace_facts(rewritable, example_inputs)
        except DataDecide as error:
            reason = f"only the data tell what {error.node.name} gives: the graph runs eagerly"
            return _uncaptured(gm.forward, owner, counters, reason, str(place_of(error.node)))
        context = PassContext(options, device, facts, _token_symint(example_inputs))
        context.source, context.continued, context.moved = gm, broken is not None, _moved_before(gm, owner)
        layouts = layouts_apart(fake_mode_of(example_inputs))
        # Comparing makes guards, so that another graph serves the sizes where a squeeze does something.
        if any(bool(size <= 1) for size in squeezed_sizes(context.facts)):
            reason = "a dynamic size is squeezed, and is 1: the graph runs eagerly"
            return _uncaptured(gm.forward, owner, counters, reason)
        check_shown_sizes(fake_mode_of(example_inputs))
        context.splits.update(dict.fromkeys(numbers, CHANGES))
        context.counted.update(numbers)
        gm = run_passes(rewritable, example_inputs, context)
        for reason, where in context.remarks:
            counters.fall_back(reason, where)
        plan, compiled = plan_pieces(gm, context, options, counters, ends_step and not graphs_of_caller(owner), ready)
        _check_padding(plan, counters)
    for call in plan.items:
        if isinstance(call, SplitOpItem):
            call.counted = call.node in context.counted
    pieces = [s for s in plan.items if isinstance(s, PieceItem) and s.is_piece]
    counters.pieces = len(pieces)
    counters.capturable = sum(s.refusal is None for s in pieces) if plan.refusal is None else 0
    counters.compiled = compiled
    checked = [item.safety for item in pieces if item.safety is not None]
    equals = tuple(dict.fromkeys(pair for safety in checked for pair in safety.equals))
    reaches = tuple(reach for safety in checked for reach in safety.reaches)
    conditions = shape_guards(fake_mode_of(example_inputs))
    assumed = dict.fromkeys(c for item in pieces for c in item.compiled.conditions_in(item.piece.symbols))
    chooser = BucketChooser(
        options,
        [*conditions, *layouts],
        _products(plan),
        equals,
        tuple(assumed),
        reaches,
        rows=_rows(plan),
        layouts=plan.layouts,
    )
    agreement = agreement_of(plan.facts)
    if agreement is not None:
        plan.first_collective = first_collective(plan.items, plan.facts)
        release_at_exit()
    shared = Shared(plan, options, counters, chooser, engine_for(device), device, agreement)
    # Compiling has made further conditions.
    check_shown_sizes(fake_mode_of(example_inputs))
    runtime = GraphRuntime(plan, shared, ends_step, context)
    add_runtime(owner, counters, runtime)
    if broken is None and region is None:
        graph_handed(runtime, fake_mode_of(example_inputs), layouts)
    # A method, unlike the object, has code to look at, which depyf asks for.
    function = runtime.__call__
    if broken is not None and not is_asked_for(broken[0]):
        reason = f"Dynamo breaks the graph, and what follows runs eagerly: {broken[0].strip().partition(chr(10))[0]}"
        function = Counted(function, counters, reason, str(place_of_stack(broken[1]))).__call__
    return function if region is None else region()(function)


def _uncaptured(
    function: Callable[..., Any], owner: object, counters: Counters, reason: str, where: str = ""
) -> Callable[..., Any]:
    """A graph that runs as ``function``, counted at each call; under ``strict`` an error at once."""
    check_shown_sizes(fake_mode_of([]))
    if counters.strict:
        counters.fall_back(reason, where)
    add_runtime(owner, counters, None)
    return Counted(function, counters, reason, where).__call__


def capture_device(example_inputs: Sequence[Any]) -> torch.device:
    """CUDA where an input lies there, else the CPU.

    Raises:
        PCGError: inputs on two CUDA devices.
    """
    devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise PCGError(
            f"the graph has inputs on several CUDA devices ({names})\n"
            "  A captured graph belongs to one device.\n"
            "  Compile the part on each device by itself, or move the inputs: tensor.to(model.device)"
        )
    return next(iter(devices), torch.device("cpu"))


def _moved_before(gm: fx.GraphModule, owner: object) -> str:
    """Why rows that an earlier graph of the model gave out are not tokens in order, if so; not for its own function."""
    contexts = [runtime.context for runtime in runtimes_of_caller(present_caller(owner))]
    mine = traced_function(gm)
    others = (c for c in contexts if c.continued and c.moved and (mine is None or traced_function(c.source) != mine))
    return next((context.moved for context in others), "")


def _requires_grad(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return name_of_input(node)
    return None


def _token_symint(example_inputs: Sequence[Any]) -> Any:
    for value in example_inputs:
        if isinstance(value, torch.SymInt):
            return value
    return None


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], context: PassContext) -> fx.GraphModule:
    """All graph passes in order; facts are made anew after each that rewrites the graph."""
    check_registration(dict.fromkeys(name for node in gm.graph.nodes for name in op_names(node, None)))
    if shape_by_views(gm, context.facts):
        context.facts = trace_facts(gm, example_inputs)
    for rewrites, one_pass in (*safety_passes(), *metadata_passes()):
        notes, hazards = len(context.notes), len(context.hazards)
        before = calls_of(gm)
        gm = one_pass(gm, context)
        context.outcomes.append((one_pass.__name__, context.notes[notes:], context.hazards[hazards:]))
        if rewrites and not _same_calls(before, calls_of(gm)):
            context.facts = update_facts(gm, context.facts, before)
    if name_tuple_elements(gm, context.facts):
        context.facts = refresh_facts(gm, example_inputs, context)
    return gm


def _same_calls(one: Calls, other: Calls) -> bool:
    """By identity: whatever is written to a node is another object, and sizes must not be compared."""
    return len(one) == len(other) and all(
        node is another and all(a is b for a, b in zip(mine, theirs, strict=True))
        for (node, mine), (another, theirs) in zip(one.items(), other.items(), strict=True)
    )


def refresh_facts(gm: fx.GraphModule, example_inputs: Sequence[Any], context: PassContext) -> dict[fx.Node, NodeFacts]:
    """Facts of a rewritten graph, whose added placeholders stand behind Dynamo's."""
    added = [
        node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder") if "pcg_step_input" in node.meta
    ]
    return trace_facts(gm, [*example_inputs, *added])


def plan_pieces(
    gm: fx.GraphModule,
    context: PassContext,
    options: Options,
    counters: Counters,
    only_graph: bool,
    ready: Callable[[], None] = lambda: None,
) -> tuple[Plan, int]:
    """Cuts the graph, judges and compiles each distinct piece once; returns the plan and their number.

    Args:
        only_graph: a split op that is not here is nowhere.
        ready: waits for what the compiler needs.
    """

    def missing(error: SplitOpNotFound) -> None:
        if only_graph:
            raise error
        counters.fall_back(str(error).splitlines()[0] + " here; the model has several graphs")

    facts = context.facts
    cuts = find_cuts(gm, facts, options.split_ops, context.splits, missing, collective_outside_captures)
    values = symbol_values([facts[node].value for node in gm.graph.find_nodes(op="placeholder")])
    plan = make_plan(gm, facts, segments_of(gm, facts, cuts), options, values, context.device)
    items = [item for item in plan.items if isinstance(item, PieceItem)]
    keys = {item.index: structure_of(item.piece) for item in items}
    scratch = {s.node for s in plan.inputs if (s.step is not None and s.step.scratch) or s.pad_value is not None}
    masks = mask_inputs(plan)
    finiteness = {spec.node: OTHER for spec in plan.inputs if spec.step is not None}
    finiteness |= {node: OTHER for item in plan.items if isinstance(item, SplitOpItem) and item.mode == "request"
                   for node in (*item.outputs, *item.writes)}  # fmt: skip
    safety: dict[Any, tuple[tuple[sympy.Symbol, ...], PieceSafety]] = {}
    for item in items:
        if item.split_reason is not None:
            continue
        numbered = list(enumerate(item.piece.inputs, len(item.piece.symbols)))
        marked = tuple(i for i, node in numbered if node in scratch)
        masking = {i: masks[node] for i, node in numbered if node in masks}
        levels = {i: finiteness[node] for i, node in numbered if node in finiteness}
        key = (keys[item.index], marked, tuple(masking.items()), tuple(levels.items()))
        if key not in safety:
            example = told_apart(item.piece.example)
            found = analyze_piece(item.piece.gm, example, scratch=marked, masks=masking, finiteness=levels)
            safety[key] = (item.piece.symbols, found)
        symbols, found = safety[key]
        item.safety = found.renamed(dict(zip(symbols, item.piece.symbols, strict=True)))
        finiteness |= {node: found.finiteness_of(i) for i, node in enumerate(item.piece.outputs)}
        finiteness |= {item.piece.inputs[i]: WILD for i in item.piece.writes}
    ready()
    fake_mode = fake_mode_of([f.value for f in facts.values()])
    distinct: dict[Any, PieceItem] = {}
    for item in items:
        if not item.trivial:
            distinct.setdefault(keys[item.index], item)
    compiled: dict[Any, Compiled] = {}
    for key, first in distinct.items():
        compiled[key] = compile_piece(first.piece, options.compiler, fake_mode, CHANGES in context.splits.values())
        failure = compiled[key].failure
        if failure is not None:
            counters.fall_back(f"a piece runs eagerly: {failure}", first.where)
    for item in items:
        item.compiled = Compiled(item.piece.gm.forward) if item.trivial else compiled[keys[item.index]]
    return plan, len(distinct)


def _check_padding(plan: Plan, counters: Counters) -> None:
    """Refuses captured graphs of pieces whose real rows may depend on padding, or that depend on a plain number."""
    for item in plan.items:
        if not isinstance(item, PieceItem) or item.split_reason is not None:
            continue
        if item.refusal is None:
            item.refusal = _refusal(item, plan, counters.strict)
        if item.refusal is not None and item.is_piece and counters.strict:
            counters.fall_back(item.refusal, item.where, UnsafePadding)
    checked = {id(item.safety): item.safety for item in plan.items if isinstance(item, PieceItem) and item.safety}
    for verdict in (v for safety in checked.values() for v in safety.nodes if v.failed):
        counters.fall_back(f"{verdict.op}: {verdict.reason}; the piece is probed", verdict.where)
    rows: dict[fx.Node, set[sympy.Symbol]] = {}
    for item in plan.items:
        if isinstance(item, PieceItem):
            for node, symbol in _row_indices(item):
                rows.setdefault(node, set()).add(symbol)
    for node, (symbol, *others) in rows.items():
        several = "row indices pick rows of tensors of several sizes"
        reason = several if others else _why_not_row_index(node, symbol, plan)
        if reason is None:
            plan.row_indices[node] = symbol
            continue
        for item in plan.items:
            if isinstance(item, PieceItem) and node in item.reads and item.refusal is None:
                item.refusal = f"mixing: {reason}"
    for name, symbol in {z for item in plan.items if isinstance(item, PieceItem) and item.refusal is None
                         and item.safety is not None for z in item.safety.zeroed}:  # fmt: skip
        plan.zeroed.setdefault(name, set()).add(symbol)
    for item in plan.items:
        if isinstance(item, PieceItem) and item.shares_written and (item.refusal or item.needs_probe):
            plan.refusal = plan.refusal or (
                f"a piece that cannot be captured gives a view of memory that is written later "
                f"({item.refusal or item.safety.reason}; at {item.where})"
            )


def _refusal(item: PieceItem, plan: Plan, strict: bool) -> str | None:
    foreign = [n for n in item.reads if plan.value(n).device != plan.device]
    numbers = [
        s
        for s in item.piece.symbols
        if s not in plan.dims and (s in item.piece.numbers or s not in plan.layouts.symbols)
    ]
    if numbers:
        return (
            f"a piece depends on {_name_of_number(numbers[0], plan)}, a number that changes and is no tensor's size; "
            "pass it as a tensor, torch.tensor(value, device=x.device), or keep it constant"
        )
    if foreign:
        name, there = name_of_input(foreign[0]), plan.value(foreign[0]).device
        return f"a piece reads {name}, which is on {there}, while the graph is captured on {plan.device}; " + (
            f'move it: {name}.to("{plan.device}")' if there.type != "meta" else f"{name} has no data: load it first"
        )
    if item.piece.symbols and item.safety.kind in ("mixing", "unknown"):
        item.where = item.safety.where or item.where
        if item.safety.kind == "mixing":
            return f"mixing: {item.safety.reason}"
        if strict:
            return f"opaque: {item.safety.reason}"
        item.needs_probe = True
    return None


def _name_of_number(symbol: sympy.Symbol, plan: Plan) -> str:
    for spec in plan.inputs:
        if not isinstance(spec.value, torch.Tensor) and expr_of(spec.value) == symbol:
            return name_of_input(spec.node)
    return str(symbol)


def _row_indices(item: PieceItem) -> list[tuple[fx.Node, sympy.Symbol]]:
    found = item.safety.row_indices if item.safety is not None else ()
    return [(item.piece.inputs[position - len(item.piece.symbols)], symbol) for position, symbol in found]


def _why_not_row_index(node: fx.Node, symbol: sympy.Symbol, plan: Plan) -> str | None:
    """Row indices count from the real size; pcg makes negative ones positive where it copies them in."""
    if not any(spec.node is node and spec.kind == "user" for spec in plan.inputs):
        return "row indices that are no argument of the call may count from the end"
    for item in plan.items:
        if node in item.reads and not (isinstance(item, PieceItem) and (node, symbol) in _row_indices(item)):
            return "row indices are used for something else as well"
    return None


def hazards_of(
    gm: fx.GraphModule, example_inputs: Sequence[Any], facts: dict[fx.Node, NodeFacts], options: Options
) -> list[Hazard]:
    """All findings of the passes and of the padding analysis, without compiling; ``gm`` may be rewritten."""
    device = capture_device(example_inputs)
    context = PassContext(options, device, facts, _token_symint(example_inputs), collect=True)
    gm = run_passes(gm, example_inputs, context)
    counters = Counters()
    plan, _ = plan_pieces(gm, context, replace(options, compiler="eager"), counters, only_graph=False)
    _check_padding(plan, counters)
    found = list(context.hazards)
    for item in plan.items:
        if not isinstance(item, PieceItem) or item.trivial or item.safety is None or not item.safety.nodes:
            continue
        verdict = item.safety.nodes[0]
        if verdict.kind in ("mixing", "unknown"):
            file, line = place_parts(verdict.where)
            kind = "mixing" if verdict.kind == "mixing" else "opaque"
            cure = (
                "the piece runs at its exact size; keep row-wise work in pieces of its own, with a split op between"
                if kind == "mixing"
                else f'tell pcg what it does: pcg.register_row_rule("{verdict.op}", rule)'
            )
            found.append(Hazard(kind, verdict.op, file, line, verdict.reason, cure))
    return found


def _products(plan: Plan) -> list[tuple[sympy.Symbol, ...]]:
    carried = (sizes_of(spec.value) for spec in plan.inputs)
    return [tuple(sorted(symbols, key=str)) for symbols in carried if symbols]


def _rows(plan: Plan) -> tuple[sympy.Expr, ...]:
    """The sizes of inputs that are computed from symbols."""
    sizes = [expr_of(n) for spec in plan.inputs if isinstance(spec.value, torch.Tensor) for n in spec.value.shape]
    return tuple(dict.fromkeys(n for n in sizes if isinstance(n, sympy.Basic) and not isinstance(n, sympy.Symbol)))


def _reset() -> None:
    reset(None)


pcg.reset = _reset  # type: ignore[attr-defined]
#: What torch.compile makes of it is known as pcg's before it has compiled anything.
pcg.__pcg_backend__ = True  # type: ignore[attr-defined]
watch_all(watched)
