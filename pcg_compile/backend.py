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
from .calls import Counted, check_shown_sizes, graph_handed, traced_code, watch_all
from .distributed import (
    agreement_of,
    collective_outside_recordings,
    first_collective,
    has_subclasses,
    lowered,
    release_at_exit,
)
from .errors import Hazard, OptionsError, PCGError, SplitOpNotFound, UnsafePadding
from .graph.attributes import attributes_as_inputs
from .graph.contexts import region_without_gradients, switches_gradients_on
from .graph.facts import Calls, DataDecide, NodeFacts, calls_of, squeezed_sizes, trace_facts, update_facts
from .graph.inplace_shapes import shape_by_views
from .graph.numbers import REASON as CHANGES
from .graph.numbers import isolate_numbers
from .graph.pieces import Compiled, compile_piece, copy_graph, structure_of
from .graph.plain import strange_tensor
from .graph.plan import CallSite, PieceSite, Plan, make_plan
from .graph.scalars import expr_of, sizes_of, symbol_values
from .graph.split import find_cuts, name_tuple_elements, op_names, segments_of
from .graph.storages import told_apart
from .graph.where import name_of_input, place_of, place_of_stack, place_parts
from .ops import check_registration
from .options import Options
from .passes import metadata_passes, safety_passes
from .passes.context import PassContext
from .passes.padding_safety import PieceSafety, analyze_piece
from .passes.safety_masks import OTHER, WILD, mask_inputs
from .registry import (
    add_runtime,
    graphs_of_caller,
    present_caller,
    reset,
    runtimes_of_caller,
)
from .report.stats import Counters
from .runtime.binding import Shared
from .runtime.buckets import BucketChooser
from .runtime.capture import engine_for
from .runtime.graph import GraphRuntime
from .torch_compat.dynamo_graphs import changing_floats, graph_break_of, is_asked_for, traced_function
from .torch_compat.dynamo_traces import watch_traces
from .torch_compat.dynamo_wrappers import calling_wrapper
from .torch_compat.fake_tensors import fake_inputs, fake_mode_of
from .torch_compat.guards import layouts_apart, shape_guards
from .torch_compat.inductor import compile_whole_with_inductor, prepare_inductor, start_inductor_workers

__all__ = ["compile_graph", "pcg", "watched"]

_LOG = logging.getLogger("pcg_compile")


def pcg(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """The Dynamo backend: ``torch.compile(model, backend="pcg", options={...})``.

    Raises:
        OptionsError: a bad option; see :class:`pcg_compile.options.Options`.
        SplitOpNotFound: a split op named in the options that the graph does not have.
        GraphBreakingScalarWrite, CaptureHazard: what no recording can hold, and cannot be isolated.
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
    strange = strange_tensor(lifted, inputs)
    if strange is not None and _requires_grad(lifted, inputs) is None:
        function = _uncaptured(lifted.forward, owner, Counters(strict=options.strict, graphs=1), *strange)
    elif has_subclasses(inputs) and not torch.is_grad_enabled():
        function = lowered(lifted, inputs, lambda plain, fakes: _compile(plain, fakes, options, owner, broken, floats))
    else:
        function = _compile(lifted, inputs, options, owner, broken, floats)
    return partial(_with_weights, function, weights) if weights else function


def _with_weights(function: Callable[..., Any], weights: Sequence[torch.Tensor], *args: Any) -> Any:
    return function(*args, *weights)


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
    device = recording_device(example_inputs)
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
        return _uncaptured(compile_whole_with_inductor(gm, real_inputs), owner, counters, reason)
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
        _judge(plan, counters)
    for call in plan.sites:
        if isinstance(call, CallSite):
            call.counted = call.node in context.counted
    pieces = [s for s in plan.sites if isinstance(s, PieceSite) and s.is_piece]
    counters.pieces = len(pieces)
    counters.capturable = sum(s.refusal is None for s in pieces) if plan.refusal is None else 0
    counters.compiled = compiled
    judged = [site.safety for site in pieces if site.safety is not None]
    equals = tuple(dict.fromkeys(pair for safety in judged for pair in safety.equals))
    reaches = tuple(reach for safety in judged for reach in safety.reaches)
    conditions = shape_guards(fake_mode_of(example_inputs))
    assumed = dict.fromkeys(c for site in pieces for c in site.compiled.conditions_in(site.piece.symbols))
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
        plan.first_collective = first_collective(plan.sites, plan.facts)
        release_at_exit()
    shared = Shared(plan, options, counters, chooser, engine_for(device), device, agreement)
    # Compiling has made further conditions.
    check_shown_sizes(fake_mode_of(example_inputs))
    runtime = GraphRuntime(plan, shared, ends_step, context)
    add_runtime(owner, counters, runtime)
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


def recording_device(example_inputs: Sequence[Any]) -> torch.device:
    """CUDA where an input lies there, else the CPU.

    Raises:
        PCGError: inputs on two CUDA devices.
    """
    devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise PCGError(
            f"the graph has inputs on several CUDA devices ({names})\n"
            "  A recording belongs to one device.\n"
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
    cuts = find_cuts(gm, facts, options.split_ops, context.splits, missing, collective_outside_recordings)
    values = symbol_values([facts[node].value for node in gm.graph.find_nodes(op="placeholder")])
    plan = make_plan(gm, facts, segments_of(gm, facts, cuts), options, values, context.device)
    sites = [site for site in plan.sites if isinstance(site, PieceSite)]
    keys = {site.index: structure_of(site.piece) for site in sites}
    scratch = {s.node for s in plan.inputs if (s.step is not None and s.step.scratch) or s.pad_value is not None}
    masks = mask_inputs(plan)
    finiteness = {spec.node: OTHER for spec in plan.inputs if spec.step is not None}
    finiteness |= {node: OTHER for site in plan.sites if isinstance(site, CallSite) and site.mode == "request"
                   for node in (*site.outputs, *site.writes)}  # fmt: skip
    safety: dict[Any, tuple[tuple[sympy.Symbol, ...], PieceSafety]] = {}
    for site in sites:
        if site.split_reason is not None:
            continue
        numbered = list(enumerate(site.piece.inputs, len(site.piece.symbols)))
        marked = tuple(i for i, node in numbered if node in scratch)
        masking = {i: masks[node] for i, node in numbered if node in masks}
        levels = {i: finiteness[node] for i, node in numbered if node in finiteness}
        key = (keys[site.index], marked, tuple(masking.items()), tuple(levels.items()))
        if key not in safety:
            example = told_apart(site.piece.example)
            found = analyze_piece(site.piece.gm, example, scratch=marked, masks=masking, finiteness=levels)
            safety[key] = (site.piece.symbols, found)
        symbols, found = safety[key]
        site.safety = found.renamed(dict(zip(symbols, site.piece.symbols, strict=True)))
        finiteness |= {node: found.finiteness_of(i) for i, node in enumerate(site.piece.outputs)}
        finiteness |= {site.piece.inputs[i]: WILD for i in site.piece.writes}
    ready()
    fake_mode = fake_mode_of([f.value for f in facts.values()])
    distinct: dict[Any, PieceSite] = {}
    for site in sites:
        if not site.trivial:
            distinct.setdefault(keys[site.index], site)
    compiled: dict[Any, Compiled] = {}
    for key, first in distinct.items():
        compiled[key] = compile_piece(first.piece, options.compiler, fake_mode, CHANGES in context.splits.values())
        failure = compiled[key].failure
        if failure is not None:
            counters.fall_back(f"a piece runs eagerly: {failure}", first.where)
    for site in sites:
        site.compiled = Compiled(site.piece.gm.forward) if site.trivial else compiled[keys[site.index]]
    return plan, len(distinct)


def _judge(plan: Plan, counters: Counters) -> None:
    """Refuses recordings of pieces whose real rows may depend on padding, or that depend on a plain number."""
    for site in plan.sites:
        if not isinstance(site, PieceSite) or site.split_reason is not None:
            continue
        if site.refusal is None:
            site.refusal = _refusal(site, plan, counters.strict)
        if site.refusal is not None and site.is_piece and counters.strict:
            counters.fall_back(site.refusal, site.where, UnsafePadding)
    judged = {id(site.safety): site.safety for site in plan.sites if isinstance(site, PieceSite) and site.safety}
    for verdict in (v for safety in judged.values() for v in safety.nodes if v.failed):
        counters.fall_back(f"{verdict.op}: {verdict.reason}; the piece is probed", verdict.where)
    rows: dict[fx.Node, set[sympy.Symbol]] = {}
    for site in plan.sites:
        if isinstance(site, PieceSite):
            for node, symbol in _row_indices(site):
                rows.setdefault(node, set()).add(symbol)
    for node, (symbol, *others) in rows.items():
        several = "row indices pick rows of tensors of several sizes"
        reason = several if others else _why_not_row_index(node, symbol, plan)
        if reason is None:
            plan.row_indices[node] = symbol
            continue
        for site in plan.sites:
            if isinstance(site, PieceSite) and node in site.reads and site.refusal is None:
                site.refusal = f"mixing: {reason}"
    for name, symbol in {z for site in plan.sites if isinstance(site, PieceSite) and site.refusal is None
                         and site.safety is not None for z in site.safety.zeroed}:  # fmt: skip
        plan.zeroed.setdefault(name, set()).add(symbol)
    for site in plan.sites:
        if isinstance(site, PieceSite) and site.shares_written and (site.refusal or site.needs_probe):
            plan.refusal = plan.refusal or (
                f"a piece that cannot be recorded gives a view of memory that is written later "
                f"({site.refusal or site.safety.reason}; at {site.where})"
            )


def _refusal(site: PieceSite, plan: Plan, strict: bool) -> str | None:
    foreign = [n for n in site.reads if plan.value(n).device != plan.device]
    numbers = [
        s
        for s in site.piece.symbols
        if s not in plan.dims and (s in site.piece.numbers or s not in plan.layouts.symbols)
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
    if site.piece.symbols and site.safety.kind in ("mixing", "unknown"):
        site.where = site.safety.where or site.where
        if site.safety.kind == "mixing":
            return f"mixing: {site.safety.reason}"
        if strict:
            return f"opaque: {site.safety.reason}"
        site.needs_probe = True
    return None


def _name_of_number(symbol: sympy.Symbol, plan: Plan) -> str:
    for spec in plan.inputs:
        if not isinstance(spec.value, torch.Tensor) and expr_of(spec.value) == symbol:
            return name_of_input(spec.node)
    return str(symbol)


def _row_indices(site: PieceSite) -> list[tuple[fx.Node, sympy.Symbol]]:
    found = site.safety.row_indices if site.safety is not None else ()
    return [(site.piece.inputs[position - len(site.piece.symbols)], symbol) for position, symbol in found]


def _why_not_row_index(node: fx.Node, symbol: sympy.Symbol, plan: Plan) -> str | None:
    """Row indices count from the real size; pcg makes negative ones positive where it copies them in."""
    if not any(spec.node is node and spec.kind == "user" for spec in plan.inputs):
        return "row indices that are no argument of the call may count from the end"
    for site in plan.sites:
        if node in site.reads and not (isinstance(site, PieceSite) and (node, symbol) in _row_indices(site)):
            return "row indices are used for something else as well"
    return None


def hazards_of(
    gm: fx.GraphModule, example_inputs: Sequence[Any], facts: dict[fx.Node, NodeFacts], options: Options
) -> list[Hazard]:
    """All findings of the passes and of the padding analysis, without compiling; ``gm`` may be rewritten."""
    device = recording_device(example_inputs)
    context = PassContext(options, device, facts, _token_symint(example_inputs), collect=True)
    gm = run_passes(gm, example_inputs, context)
    counters = Counters()
    plan, _ = plan_pieces(gm, context, replace(options, compiler="eager"), counters, only_graph=False)
    _judge(plan, counters)
    found = list(context.hazards)
    for site in plan.sites:
        if not isinstance(site, PieceSite) or site.trivial or site.safety is None or not site.safety.nodes:
            continue
        verdict = site.safety.nodes[0]
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
