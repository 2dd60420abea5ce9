"""The backend: Dynamo's graph in, callable out, in named stages.

:func:`compile_graph` is where a graph comes in. :func:`_stages` reads like this line: trace facts, run passes, split,
decide padding, compile pieces, bind, and make the runner, which serves each step (``runtime/runner.py``). What cannot
be captured at all raises :class:`Uncaptured` in its stage, and is counted in one place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from .calls import Counted, check_shown_sizes, graph_handed, traced_code, weights_of_call
from .counters import Counters
from .distributed.lowering import (
    agreement_of,
    collective_outside_captures,
    first_collective,
    has_subclasses,
    lowered,
    release_at_exit,
)
from .errors import SplitOpNotFound
from .fx.assemble import make_plan
from .fx.changing_floats import REASON as CHANGES
from .fx.changing_floats import isolate_numbers
from .fx.facts import DataDecide, calls_of, same_calls, trace_facts, update_facts
from .fx.graph_inputs import attributes_as_inputs, strange_tensor
from .fx.inplace_shapes import shape_by_views, without_idle_dropout
from .fx.padding_decisions import decide_padding
from .fx.places import place_of, place_of_stack
from .fx.plan import PieceItem, Plan
from .fx.sizes import expr_of, sizes_of, symbol_values
from .fx.splitting import find_cuts, name_tuple_elements, op_names, segments_of
from .fx.submodules import Compiled, compile_piece, copy_graph
from .options import Options
from .passes import metadata_passes, safety_passes
from .passes.context import PassContext
from .registry import add_runtime, graphs_of_caller, present_caller, reset, runtimes_of_caller
from .report.items import add_plan
from .runtime.buckets import BucketChooser
from .runtime.capture import capture_device, engine_for
from .runtime.runner import GraphRuntime, with_attributes
from .runtime.shared import Shared
from .split_ops import check_registration
from .torch_compat.dynamo_graphs import changing_floats, graph_break_of, is_asked_for, traced_function
from .torch_compat.dynamo_traces import watch_traces
from .torch_compat.dynamo_wrappers import calling_wrapper
from .torch_compat.fake_tensors import fake_inputs, fake_mode_of
from .torch_compat.guards import layouts_apart, shape_guards
from .torch_compat.inductor import prepare_inductor, start_inductor_workers
from .traces import watch_all
from .uncaptured import Uncaptured, refuse_gradients, refuse_squeezed_sizes, refuse_strange_tensors
from .weights import Weights

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
        OptionsError: a bad option, or a mode, which is none of pcg's.
    """
    backend = wrapper.compiler_fn
    if backend is pcg:
        options = Options.parse(wrapper.kwargs.get("options"), wrapper.kwargs.get("mode"))
    elif getattr(backend, "watched", False):
        options = backend.options
    else:
        return None
    if options.compiler == "inductor" and torch.cuda.is_initialized():
        start_inductor_workers()
    return (wrapper if backend is pcg else backend), options


@dataclass
class _Graph:
    """One of Dynamo's graphs on its way through the stages.

    Attributes:
        source: as Dynamo, or the lowering of tensor subclasses, wrote it. inputs: real, or fake where lowered.
        owner: the backend that it is compiled by, or what torch.compile made of it.
        broken: why Dynamo ended the graph early, and the stack there; None at the end of the frame.
        floats: values of inputs that are floats and change from call to call, by the node's name.
        region: what it runs under where it lies in a region without gradients. layouts: which inputs lie apart, as
            conditions on their sizes.
    """

    source: fx.GraphModule
    inputs: Sequence[Any]
    options: Options
    owner: object
    counters: Counters
    broken: tuple[str, Any] | None
    floats: Mapping[str, float]
    region: Callable[..., Any] | None = None
    layouts: Sequence[sympy.Basic] = ()

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.examples = fake_inputs(self.inputs)
        self.device, self.fake_mode = capture_device(self.examples), fake_mode_of(self.examples)


def compile_graph(
    gm: fx.GraphModule, real_inputs: Sequence[Any], options: Options, owner: object, weights: Weights | None = None
) -> Any:
    """Compiles one Dynamo graph for its owner (see :class:`_Graph`); calls of it leave out ``weights``."""
    watch_traces()
    floats = {node.name: value for node, value in changing_floats(gm, traced_code()).items()}
    graph_handed()
    broken = graph_break_of(gm)
    lifted, tensors = attributes_as_inputs(gm)
    inputs = [*real_inputs, *tensors]
    attributes = weights_of_call(tensors) if weights is None else weights.of_call
    given = len(real_inputs) - (len(weights.places) if weights is not None else 0)

    def compile_it(source: fx.GraphModule, given: Sequence[Any]) -> Any:
        return _compile(source, given, options, owner, broken, floats)

    subclasses = has_subclasses(inputs) and not torch.is_grad_enabled() and strange_tensor(lifted, inputs) is None
    function = lowered(lifted, inputs, compile_it) if subclasses else compile_it(lifted, inputs)
    return function if attributes is None else with_attributes(function, attributes, given)


def _compile(source: fx.GraphModule, inputs: Sequence[Any], options: Options, owner: object, *rest: Any) -> Any:
    """A graph through all stages; where one says that it cannot be captured, its eager form, counted at each call."""
    counters = Counters(strict=options.strict, graphs=1)
    try:
        refuse_strange_tensors(source, inputs)
        return _stages(_Graph(source, inputs, options, owner, counters, *rest))
    except Uncaptured as error:
        function, reason, where = error.args
    check_shown_sizes(fake_mode_of([]))
    if counters.strict and reason:
        counters.fall_back(reason, where)
    add_runtime(owner, counters, None)
    return Counted(function, counters, reason, where).__call__ if reason else function


def _stages(graph: _Graph) -> Callable[..., Any]:
    """The way of a graph to the callable that serves its steps."""
    graph.region = refuse_gradients(graph.source, graph.inputs, graph.examples)
    ready = prepare_inductor(graph.device) if graph.options.compiler == "inductor" else lambda: None
    with torch.no_grad():
        gm, context = trace(graph)
        gm = run_passes(gm, graph.examples, context)
        for reason, where in context.remarks:
            graph.counters.fall_back(reason, where)
        plan = split(gm, context, graph.counters, graph.broken is None and not graphs_of_caller(graph.owner))
        decide_padding(plan, graph.counters)
        ready()
        compile_pieces(plan, context, graph.counters)
    return make_runner(graph, bind(graph, plan), context)


# -- 1: facts ---------------------------------------------------------------------------------------------------------


def trace(graph: _Graph) -> tuple[fx.GraphModule, PassContext]:
    """Traces what each node gives, dispatches and writes; returns a graph for passes to rewrite, and their context."""
    # Dynamo goes on using its own graph.
    gm, source = without_idle_dropout(copy_graph(graph.source)), graph.source
    numbers = isolate_numbers(gm, graph.floats) if graph.floats else []
    if numbers is None:
        raise Uncaptured(source.forward, "the graph returns a float that changes: it runs eagerly")
    try:
        facts = trace_facts(gm, graph.examples)
    except DataDecide as error:
        reason = f"only the data tell what {error.node.name} gives: the graph runs eagerly"
        raise Uncaptured(source.forward, reason, str(place_of(error.node))) from None
    context = PassContext(graph.options, graph.device, facts, token_symint(graph.examples), source=source)
    context.continued, context.moved = graph.broken is not None, _moved_before(source, graph.owner)
    context.splits.update(dict.fromkeys(numbers, CHANGES))
    context.counted.update(numbers)
    graph.layouts = layouts_apart(graph.fake_mode)
    refuse_squeezed_sizes(source, facts)
    check_shown_sizes(graph.fake_mode)
    return gm, context


def token_symint(example_inputs: Sequence[Any]) -> Any:
    return next((value for value in example_inputs if isinstance(value, torch.SymInt)), None)


def _moved_before(gm: fx.GraphModule, owner: object) -> str:
    """Why rows that an earlier graph of the model gave out are not tokens in order, if so; not for its own function."""
    contexts = [runtime.context for runtime in runtimes_of_caller(present_caller(owner))]
    mine = traced_function(gm)
    others = (c for c in contexts if c.continued and c.moved and (mine is None or traced_function(c.source) != mine))
    return next((context.moved for context in others), "")


# -- 2: passes --------------------------------------------------------------------------------------------------------


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], context: PassContext) -> fx.GraphModule:
    """All graph passes in order; facts are traced again after each pass that rewrites the graph."""
    check_registration(dict.fromkeys(name for node in gm.graph.nodes for name in op_names(node, None)))
    if shape_by_views(gm, context.facts):
        context.facts = trace_facts(gm, example_inputs)
    for rewrites, one_pass in (*safety_passes(), *metadata_passes()):
        notes, hazards = len(context.notes), len(context.hazards)
        before = calls_of(gm)
        gm = one_pass(gm, context)
        context.outcomes.append((one_pass.__name__, context.notes[notes:], context.hazards[hazards:]))
        if rewrites and not same_calls(before, calls_of(gm)):
            context.facts = update_facts(gm, context.facts, before)
    if name_tuple_elements(gm, context.facts):
        # Placeholders that passes added stand behind Dynamo's.
        placeholders = gm.graph.find_nodes(op="placeholder")
        added = [node.meta["example_value"] for node in placeholders if "pcg_step_input" in node.meta]
        context.facts = trace_facts(gm, [*example_inputs, *added])
    return gm


# -- 3: split ---------------------------------------------------------------------------------------------------------


def split(gm: fx.GraphModule, context: PassContext, counters: Counters, only_graph: bool) -> Plan:
    """Cuts the graph into pieces and split ops; a name in the options that matches nothing is an error or counted.

    ``only_graph``: a split op that is not here is nowhere.
    """

    def missing(error: SplitOpNotFound) -> None:
        if only_graph:
            raise error
        counters.fall_back(str(error).splitlines()[0] + " here; the model has several graphs")

    facts, options = context.facts, context.options
    cuts = find_cuts(gm, facts, options.split_ops, context.splits, missing, collective_outside_captures)
    values = symbol_values([facts[node].value for node in gm.graph.find_nodes(op="placeholder")])
    return make_plan(gm, facts, segments_of(gm, facts, cuts), options, values, context.device, context.counted)


# -- 4: compile pieces ------------------------------------------------------------------------------------------------


def compile_pieces(plan: Plan, context: PassContext, counters: Counters) -> None:
    """Compiles each distinct piece once; one that its compiler fails on runs eagerly, counted."""
    fake_mode = fake_mode_of([f.value for f in plan.facts.values()])
    compiled: dict[Any, Compiled] = {}
    for item in plan.items:
        if not isinstance(item, PieceItem):
            continue
        if item.trivial:
            item.compiled = Compiled(item.piece.gm.forward)
            continue
        key = item.piece.structure
        if key not in compiled:
            floats_change = CHANGES in context.splits.values()
            compiled[key] = compile_piece(item.piece, context.options.compiler, fake_mode, floats_change)
            if compiled[key].failure is not None:
                counters.fall_back(f"a piece runs eagerly: {compiled[key].failure}", item.where)
        item.compiled = compiled[key]
    pieces = [item for item in plan.items if isinstance(item, PieceItem) and item.is_piece]
    counters.pieces, counters.compiled = len(pieces), len(compiled)
    counters.capturable = sum(item.refusal is None for item in pieces) if plan.refusal is None else 0


# -- 5: bind ----------------------------------------------------------------------------------------------------------


def bind(graph: _Graph, plan: Plan) -> Shared:
    """What all steps share: the sizes that buckets may have, the engine that captures, how ranks agree."""
    pieces = [item for item in plan.items if isinstance(item, PieceItem) and item.is_piece]
    checked = [item.safety for item in pieces if item.safety is not None]
    assumed = dict.fromkeys(c for item in pieces for c in item.compiled.conditions_in(item.piece.symbols))
    carried = (sizes_of(spec.value) for spec in plan.inputs)
    sizes = [expr_of(n) for spec in plan.inputs if isinstance(spec.value, torch.Tensor) for n in spec.value.shape]
    chooser = BucketChooser(
        graph.options,
        conditions=[*shape_guards(graph.fake_mode), *graph.layouts],
        products=[tuple(sorted(symbols, key=str)) for symbols in carried if symbols],
        equals=tuple(dict.fromkeys(pair for safety in checked for pair in safety.equals)),
        assumed=tuple(assumed),
        reaches=tuple(reach for safety in checked for reach in safety.reaches),
        layouts=plan.layouts,
        rows=[n for n in dict.fromkeys(sizes) if isinstance(n, sympy.Expr) and not isinstance(n, sympy.Symbol)],
    )
    agreement = agreement_of(plan.facts)
    if agreement is not None:
        plan.first_collective = first_collective(plan.items, plan.facts)
        release_at_exit()
    return Shared(plan, graph.options, graph.counters, chooser, engine_for(graph.device), graph.device, agreement)


# -- 6: runner --------------------------------------------------------------------------------------------------------


def make_runner(graph: _Graph, shared: Shared, context: PassContext) -> Callable[..., Any]:
    """The callable that serves each step, registered for reports and figures."""
    # Compiling has made further conditions.
    check_shown_sizes(graph.fake_mode)
    runtime = GraphRuntime(shared.plan, shared, graph.broken is None, context)
    add_runtime(graph.owner, graph.counters, runtime)
    _log_compiled(graph, shared, context)
    if graph.broken is None and graph.region is None:
        graph_handed(runtime, graph.fake_mode, graph.layouts)
    # A method, unlike the object, has code to look at, which depyf asks for.
    function = runtime.__call__
    if graph.broken is not None and not is_asked_for(graph.broken[0]):
        why = graph.broken[0].strip().partition("\n")[0]
        reason = f"Dynamo breaks the graph, and what follows runs eagerly: {why}"
        function = Counted(function, graph.counters, reason, str(place_of_stack(graph.broken[1]))).__call__
    return function if graph.region is None else graph.region()(function)


def _log_compiled(graph: _Graph, shared: Shared, context: PassContext) -> None:
    figures, sizes = graph.counters, ", ".join(map(str, shared.plan.symbols)) or "none"
    text = "compiled a graph: %d pieces, %d of them different, %d can be captured; dynamic sizes: %s; %.1f s"
    _LOG.info(text, figures.pieces, figures.compiled, figures.capturable, sizes, time.perf_counter() - graph.began)
    for note in context.notes:
        _LOG.debug("%s", note)
    add_plan(shared.plan, shared.number)


pcg.reset = partial(reset, None)  # type: ignore[attr-defined]
#: What torch.compile makes of it is known as pcg's before it has compiled anything.
pcg.__pcg_backend__ = True  # type: ignore[attr-defined]
watch_all(watched)
