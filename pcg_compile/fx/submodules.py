"""A piece: a run of nodes as a graph of its own; equal pieces compile once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_map

from ..torch_compat.dynamo_graphs import TRACE_AGAIN, keep_traced_function
from ..torch_compat.expressions import expression_nodes
from ..torch_compat.fake_tensors import FakeTensorMode, isolated_tracing
from ..torch_compat.guards import guards_apart
from ..torch_compat.inductor import compile_with_inductor
from ..torch_compat.shown_sizes import shown_larger
from .contexts import Autocast
from .facts import NodeFacts, storage_of
from .fake_storages import told_apart
from .sizes import SymType, expr_of, is_scalar, plain, symbols_of

__all__ = ["Compiled", "Piece", "build_piece", "compile_piece", "copy_graph", "structure_of"]

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast


@dataclass
class Piece:
    """A maximal run of nodes between split ops.

    Attributes:
        graph: the run; its placeholders are ``symbols`` and then ``inputs``, its output is a tuple.
        attributes: what its ``get_attr`` nodes name.
        symbols: the dynamic sizes that it uses, each handed over as an int.
        inputs: the nodes of the whole graph whose tensors it reads.
        outputs: the nodes of the whole graph that it makes and that are used outside.
        example: the fake values of its placeholders.
        writes: positions in ``inputs`` of the tensors that it mutates.
    """

    graph: fx.Graph
    attributes: Mapping[str, Any]
    symbols: tuple[sympy.Symbol, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    example: tuple[Any, ...]
    writes: tuple[int, ...]

    @cached_property
    def gm(self) -> fx.GraphModule:
        """The graph as a module. Making one writes and compiles its code: of equal pieces, only one needs it."""
        return fx.GraphModule(dict(self.attributes), self.graph)

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """A key that is equal for pieces that one compiled function can serve, with their own weights."""
        return structure_of(self)

    @cached_property
    def numbers(self) -> tuple[sympy.Symbol, ...]:
        """The symbols that it computes with, beside having tensors of such sizes and strides."""
        return tuple(s for s, node in zip(self.symbols, self.graph.nodes, strict=False) if node.users)


@dataclass
class Compiled:
    """What a distinct piece was compiled to.

    Attributes:
        failure: why the compiler asked for was not used.
        conditions: what the compiler assumed of the sizes; symbols: the piece's, in whose terms it did.
    """

    function: Callable[..., Any]
    failure: str | None = None
    conditions: tuple[sympy.Basic, ...] = ()
    symbols: tuple[sympy.Symbol, ...] = ()
    #: Sizes that it has run at: kernels that load or tune themselves for a size must not do so while capturing.
    warm: set[tuple[int, ...]] = field(default_factory=set)

    def conditions_in(self, symbols: Sequence[sympy.Symbol]) -> list[sympy.Basic]:
        """The conditions for a piece like it, with symbols of its own."""
        names = dict(zip(self.symbols, symbols, strict=True)) if self.conditions else {}
        return [condition.xreplace(names) for condition in self.conditions]

    def broken_at(self, symbols: Sequence[sympy.Symbol], sizes: Mapping[sympy.Symbol, int]) -> sympy.Basic | None:
        """A condition that sizes do not satisfy, of a piece with those symbols; None where all hold."""
        values = {symbol: sympy.Integer(n) for symbol, n in sizes.items()}
        return next((c for c in self.conditions_in(symbols) if c.xreplace(values) != sympy.true), None)


class _Builder:
    """Copies a run of nodes into a graph of its own."""

    def __init__(self, owner: fx.GraphModule, facts: Mapping[fx.Node, NodeFacts], nodes: Sequence[fx.Node]) -> None:
        self.owner, self.facts, self.nodes = owner, facts, nodes
        self.inside = set(nodes)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.symbol_nodes: dict[sympy.Symbol, fx.Node] = {}
        self.expressions: dict[Any, fx.Node | int] = {}
        self.attributes: dict[str, fx.Node] = {}

    def build(self, regions: Mapping[fx.Node, Autocast], outputs: Sequence[fx.Node]) -> None:
        self._placeholders(outputs)
        current: list[tuple[tuple[Any, ...], fx.Node]] = []
        for node in self.nodes:
            current = self._switch(current, regions.get(node, ()))
            copy = self.graph.node_copy(node, self._argument)
            copy.stack_trace = node.stack_trace
            copy.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "grapharg")}
            if isinstance(self.facts[node].value, torch.Tensor):
                # AOTAutograd's cache takes a method call only where this says that it is a tensor's.
                copy.meta["example_value"] = self.facts[node].value
            self.env[node] = copy
        self._switch(current, ())
        self.graph.output(tuple(self.env[node] for node in outputs))

    def _placeholders(self, outputs: Sequence[fx.Node]) -> None:
        used: list[fx.Node] = []
        symbols: dict[sympy.Symbol, Any] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source in self.inside or source.op == "get_attr":
                    continue
                value = self.facts[source].value
                if is_scalar(value):
                    symbols.update(dict.fromkeys(sorted(symbols_of(value), key=str)))
                elif source not in used:
                    used.append(source)
        for node in (*used, *outputs):
            symbols.update(dict.fromkeys(sorted(symbols_of(self.facts[node].value), key=str)))
        for symbol in symbols:
            self.symbol_nodes[symbol] = self.graph.placeholder(f"size_{len(self.symbol_nodes)}")
        for node in used:
            self.inputs.append(node)
            self.env[node] = self.graph.placeholder(f"input_{len(self.inputs) - 1}")

    def _argument(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            return self._attribute(node)
        value = self.facts[node].value
        return tree_map(self._scalar, plain(value))

    def _attribute(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        if name not in self.attributes:
            # get_attr nodes may stand anywhere before their use.
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _scalar(self, leaf: Any) -> Any:
        if not isinstance(leaf, SymType):
            return leaf
        expr = expr_of(leaf)
        if not isinstance(expr, sympy.Basic) or not expr.free_symbols:
            return bool(leaf) if isinstance(leaf, torch.SymBool) else type(leaf.node.hint)(expr)
        if expr not in self.expressions:
            self.expressions[expr] = expression_nodes(self.graph, expr, self.symbol_nodes)
        return self.expressions[expr]

    def _switch(self, current: list[tuple[tuple[Any, ...], fx.Node]], wanted: Autocast) -> Any:
        kept = 0
        while kept < min(len(current), len(wanted)) and current[kept][0] == wanted[kept]:
            kept += 1
        for _, entered in reversed(current[kept:]):
            self.graph.call_function(_EXIT, (entered,))
        result = current[:kept]
        for arguments in wanted[kept:]:
            result.append((arguments, self.graph.call_function(_ENTER, arguments)))
        return result


def build_piece(
    owner: fx.GraphModule,
    facts: Mapping[fx.Node, NodeFacts],
    nodes: Sequence[fx.Node],
    regions: Mapping[fx.Node, Autocast],
    symbol_values: Mapping[sympy.Symbol, Any],
    readers: Collection[fx.Node],
) -> Piece:
    """A piece from a run of nodes of ``owner``.

    ``symbol_values`` gives the SymInt of each symbol, ``readers`` all nodes that read tensors (a node that only
    asks a size does not).
    """
    inside = set(nodes)
    outputs = [
        node
        for node in nodes
        if any(user not in inside and user in readers for user in node.users)
        and not is_scalar(facts[node].value)
        and isinstance(facts[node].value, torch.Tensor)
    ]
    builder = _Builder(owner, facts, nodes)
    builder.build(regions, outputs)
    attributes = {name: _get(owner, name) for name in builder.attributes}
    written: set[int] = set().union(*(facts[node].writes for node in nodes))
    writes = [i for i, node in enumerate(builder.inputs) if storage_of(facts[node].value) in written]
    symbols = tuple(builder.symbol_nodes)
    example = (*(symbol_values[s] for s in symbols), *(facts[node].value for node in builder.inputs))
    return Piece(builder.graph, attributes, symbols, tuple(builder.inputs), tuple(outputs), example, tuple(writes))


def _get(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def structure_of(piece: Piece) -> tuple[Any, ...]:
    """A key that is equal for pieces that one compiled function can serve, with their own weights.

    It covers ops, arguments, and of every input its type, shape and strides in terms of the piece's own
    symbols, and which inputs share a storage.
    """
    symbol_names = {symbol: sympy.Symbol(f"size_{i}", integer=True) for i, symbol in enumerate(piece.symbols)}
    positions = {node: i for i, node in enumerate(piece.graph.nodes)}
    storages: dict[int, int] = {}

    def of_argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", positions[value])
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(of_argument, value))
        if isinstance(value, dict):
            return ("dict", *((k, of_argument(v)) for k, v in value.items()))
        if isinstance(value, slice):
            return ("slice", of_argument(value.start), of_argument(value.stop), of_argument(value.step))
        # The type as well: 1, 1.0 and True are equal in Python, and so are 0.0 and -0.0.
        return (type(value).__name__, repr(value))

    def of_size(size: Any) -> Any:
        expr = expr_of(size)
        return str(expr.xreplace(symbol_names)) if isinstance(expr, sympy.Basic) else expr

    def of_input(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return ("number", of_size(value))
        alias = storages.setdefault(storage_of(value), len(storages))
        return (
            "tensor", value.dtype, str(value.device), alias,
            tuple(map(of_size, value.shape)), tuple(map(of_size, value.stride())), of_size(value.storage_offset()),
            value.is_conj(), value.is_neg(), type(value).__name__,
        )  # fmt: skip

    def of_node(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return ("get_attr", id(piece.attributes[str(node.target)]))
        target = node.target if isinstance(node.target, str) and node.op != "placeholder" else id(node.target)
        if node.op == "placeholder":
            target = ""
        return (node.op, target, of_argument(node.args), of_argument(node.kwargs))

    return (*map(of_input, piece.example), *map(of_node, piece.graph.nodes))


def compile_piece(piece: Piece, compiler: Any, fake_mode: FakeTensorMode, floats_change: bool = False) -> Compiled:
    """Compiles one distinct piece. What no compiler can take, and what fails, is left to eager, and says why.

    Args:
        compiler: "inductor", "eager" or a Dynamo-style ``fn(gm, example_inputs) -> callable``.
        floats_change: whether the graph has floats that change from call to call. Where none does, Inductor may have
            Dynamo trace again with all floats as constants; else that would go on for each value.
    """
    if compiler == "eager" or not any(n.op.startswith("call_") for n in piece.graph.nodes):
        return Compiled(piece.gm.forward)
    if _writes_shared(piece):
        # AOTAutograd compiles for a common base, which it tells from how the views were made: other views than ours.
        return Compiled(piece.gm.forward, "it writes an input that shares its memory with another one")
    compile_it = compile_with_inductor if compiler == "inductor" else compiler
    # The compiler may rewrite what it is given; the piece itself is kept for explain, dump and eager runs.
    copy = copy_graph(piece.gm)
    example = told_apart(piece.example)
    with (
        isolated_tracing(fake_mode),
        torch.no_grad(),
        guards_apart(fake_mode) as conditions,
        shown_larger(example, piece.symbols, fake_mode, conditions) as shown,
    ):
        for node, value in zip(copy.graph.find_nodes(op="placeholder"), shown, strict=True):
            node.meta["example_value"] = value
        try:
            function = compile_it(copy, list(shown))
        except TRACE_AGAIN:
            if not floats_change:
                raise
            return Compiled(piece.gm.forward, "the compiler takes no float that changes")
        except Exception as error:
            # Anybody's compiler, which may fail in any way; the caller counts it.
            first = str(error).splitlines()[0] if str(error) else ""
            return Compiled(piece.gm.forward, f"the compiler failed: {type(error).__name__}: {first}")
    return Compiled(function, conditions=tuple(conditions), symbols=piece.symbols)


def _writes_shared(piece: Piece) -> bool:
    """Whether an input that the piece writes shares its memory with another input."""
    storages = [storage_of(value) if isinstance(value, torch.Tensor) else None for value in piece.example]
    written = [storages[len(piece.symbols) + i] for i in piece.writes]
    return any(storages.count(storage) > 1 for storage in written)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in nodes of its own, over the same parameters."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copied in copies.items():
        # What Dynamo knows an input by, for messages.
        source = getattr(node, "_dynamo_source", None)
        if source is not None:
            copied._dynamo_source = source
    copy = fx.GraphModule(gm, graph)
    keep_traced_function(copy, gm)
    return copy
