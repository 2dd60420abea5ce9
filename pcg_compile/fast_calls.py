"""Calls that look like one that was traced reach their graph without Dynamo.

Note [Fast calls]
Dynamo's code for a function, called as a plain function, does what a call behind ``torch.compile`` does, except that
nobody evaluates guards and looks the code up. A :class:`FastCall` holds such code and what it may be used for: the
:class:`ArgumentForm` of the traced call, the :class:`~pcg_compile.torch_compat.dynamo_calls.GlobalState` of torch, and
the :class:`Weights` of the modules. A call that differs in any of these takes the way through Dynamo, which decides.
So the form may be stricter than Dynamo's guards on arguments, and is never looser. Not compared: what ``guards="inputs"``
does not see, and Python attributes of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import CO_VARARGS
from math import prod
from operator import is_, itemgetter
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch

from .fx.sizes import expr_of
from .torch_compat.dynamo_calls import GlobalState, TensorChecks, function_of_code
from .torch_compat.fake_tensors import FakeTensorMode

__all__ = ["ArgumentForm", "FastCall", "NoFastCall", "TracedGraph", "Weights", "WeightsChanged", "names_of_arguments"]

_training = itemgetter("training")
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
#: Containers that are compared by type and length; a dict's keys and their order too.
_CONTAINERS = (list, tuple, dict)


class NoFastCall(Exception):
    """Why calls of a function all go through Dynamo."""


class WeightsChanged(Exception):
    """The modules of a graph have other children now, or weights that were one tensor are several: trace again."""


def names_of_arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: int) -> list[str]:
    """What Dynamo calls the values among a call's arguments and in their containers.

    Args:
        first: the number of parameters ahead of ``args``: 1 for a method.
    """
    code = getattr(function, "__func__", function).__code__
    named, more = code.co_varnames[: code.co_argcount], code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    by_name = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    found: list[str] = []

    def visit(name: str, value: Any) -> None:
        if type(value) is dict:
            for key, one in value.items():
                visit(f"{name}[{key!r}]", one)
        elif type(value) in (list, tuple):
            for i, one in enumerate(value):
                visit(f"{name}[{i}]", one)
        else:
            found.append(name)

    for i, value in enumerate(args, first):
        visit(f"L[{named[i]!r}]" if i < len(named) else f"L[{more[0]!r}][{i - len(named)}]", value)
    keywords = more[1] if code.co_flags & CO_VARARGS and len(more) > 1 else (more or ("",))[0]
    for key, value in kwargs.items():
        visit(f"L[{key!r}]" if key in by_name else f"L[{keywords!r}][{key!r}]", value)
    return found


def _structure(value: Any, leaves: list[Any]) -> Any:
    """Appends the leaves of a value to ``leaves``; returns a key of its containers."""
    kind = type(value)
    if kind is dict:
        return (dict, *((key, _structure(one, leaves)) for key, one in value.items()))
    if kind is list or kind is tuple:
        return (kind, *[_structure(one, leaves) for one in value])
    leaves.append(value)
    return None


class _Product:
    """A size or stride as a factor times symbols."""

    def __init__(self, expr: Any, places: Mapping[sympy.Symbol, int]) -> None:
        coefficient, rest = sympy.sympify(expr).as_coeff_Mul()
        factors = [] if rest == 1 else list(sympy.Mul.make_args(rest))
        if not coefficient.is_Integer or not all(factor in places for factor in factors):
            raise NoFastCall(f"an argument has a size or stride {expr}, which is no product of sizes")
        self.factor, self.places = int(coefficient), tuple(places[factor] for factor in factors)

    def at(self, sizes: Sequence[int]) -> int:
        return self.factor * prod([sizes[i] for i in self.places])


@dataclass
class TracedGraph:
    """What is known of a graph's trace beside the graph: for calls without Dynamo, and for saving it.

    Attributes:
        runtime: what runs it, and knows the graph itself.
        seen: what Dynamo has looked at of the arguments, by name: fake tensors and symbolic numbers.
        codes: the code of all functions that the trace went through.
        weights: where the tensors lie that are attributes of Dynamo's graph; None where there are none.
        code: what Dynamo made of the function's code. conditions: on the sizes.
    """

    runtime: Any
    seen: dict[str, Any]
    codes: list[CodeType]
    fake_mode: FakeTensorMode
    weights: Weights | None = None
    code: CodeType | None = None
    conditions: list[Any] = field(default_factory=list)


class ArgumentForm:
    """What a traced call's arguments look like, as far as its graph depends on it.

    Args:
        args, kwargs: as the function was called, its module left out.
        names: Dynamo's names of the values, see :func:`names_of_arguments`.
        graph: the graph's trace.

    Raises:
        NoFastCall: Dynamo may check more of an argument than this does.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Sequence[str],
        graph: TracedGraph,
    ) -> None:
        self.count, self.names = len(args), tuple(kwargs)
        self.flat = not any(type(value) in _CONTAINERS for value in (*args, *kwargs.values()))
        leaves: list[Any] = []
        self.structure = [_structure(value, leaves) for value in (*args, *kwargs.values())]
        self.tensors: list[int] = []
        self.constants: list[tuple[int, type, Any]] = []
        self.floats: list[int] = []
        self.integers: list[int] = []
        fakes: list[Any] = []
        #: Where each symbol's value comes from: (leaf, dimension), or (leaf, -1) for an int.
        self.sources: list[tuple[int, int]] = []
        places: dict[sympy.Symbol, int] = {}

        def place(expr: Any, source: tuple[int, int]) -> None:
            if isinstance(expr, sympy.Symbol) and expr not in places:
                places[expr] = len(places)
                self.sources.append(source)

        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            fake = graph.seen.get(name)
            if isinstance(leaf, torch.Tensor):
                if type(leaf) not in (torch.Tensor, torch.nn.Parameter) or leaf.layout != torch.strided:
                    raise NoFastCall(f"{name[3:-2]} is a {type(leaf).__name__} of layout {leaf.layout}")
                self.tensors.append(i)
                fakes.append(fake)
                if fake is not None:
                    for d, size in enumerate(fake.shape):
                        place(expr_of(size), (i, d))
            elif isinstance(fake, torch.SymInt) and type(leaf) is int:
                place(expr_of(fake), (i, -1))
                self.integers.append(i)
            elif fake is not None and type(leaf) is float:
                self.floats.append(i)
            elif type(leaf) in _CONSTANTS:
                self.constants.append((i, type(leaf), leaf))
            else:
                raise NoFastCall(f"{name[3:-2]} is a {type(leaf).__name__}, of which Dynamo may check more")
        if len({id(leaves[i]) for i in self.tensors}) < len(self.tensors):
            raise NoFastCall("one tensor is passed as several arguments")
        #: Sizes and strides that follow from the symbols: (leaf, dimension, whether it is a stride, product).
        self.derived: list[tuple[int, int, bool, _Product]] = []
        examples, sizes, strides = [leaves[i] for i in self.tensors], [], []
        for i, fake, example in zip(self.tensors, fakes, examples, strict=True):
            if fake is None:
                # Dynamo has not looked at it.
                sizes.append([None] * example.dim())
                strides.append([None] * example.dim())
                continue
            for values, into, stride in ((fake.shape, sizes, False), (fake.stride(), strides, True)):
                exprs = [expr_of(value) for value in values]
                into.append([None if isinstance(expr, sympy.Basic) else int(expr) for expr in exprs])
                for d, expr in enumerate(exprs):
                    if isinstance(expr, sympy.Basic) and (stride or (i, d) not in self.sources):
                        self.derived.append((i, d, stride, _Product(expr, places)))
        self.examples = [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad, type(t)) for t in examples]
        self.sizes, self.strides = sizes, strides
        self.checks = TensorChecks(examples, sizes, strides) if examples else None
        self.symbols = tuple(places)
        self.conditions = [condition for condition in graph.conditions if condition != sympy.true]
        for condition in self.conditions:
            free = getattr(condition, "free_symbols", set()) - places.keys()
            if free:
                raise NoFastCall(f"the graph is right under a condition on {', '.join(map(str, free))}: {condition}")
        #: Sizes that satisfy the conditions.
        self.known: set[tuple[int, ...]] = set()

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call's arguments have this form."""
        if len(args) != self.count or len(kwargs) != len(self.names):
            return False
        leaves: Sequence[Any] = args
        if kwargs:
            try:
                leaves = [*args, *[kwargs[name] for name in self.names]]
            except KeyError:
                return False
        if not self.flat:
            values, leaves = leaves, []
            if [_structure(value, leaves) for value in values] != self.structure:
                return False
        for i, kind, value in self.constants:
            given = leaves[i]
            if given is not value and (type(given) is not kind or given != value):
                return False
        for i in self.floats:
            if type(leaves[i]) is not float:
                return False
        for i in self.integers:
            if type(leaves[i]) is not int:
                return False
        if self.checks is not None:
            tensors = [leaves[i] for i in self.tensors]
            if not self.checks.check(*tensors):
                return False
            if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
                return False
        sizes = tuple([leaves[i].shape[d] if d >= 0 else leaves[i] for i, d in self.sources])
        for i, d, stride, product in self.derived:
            if (leaves[i].stride(d) if stride else leaves[i].shape[d]) != product.at(sizes):
                return False
        return sizes in self.known or self._holds_at(sizes)

    def _holds_at(self, sizes: tuple[int, ...]) -> bool:
        values = {symbol: sympy.Integer(n) for symbol, n in zip(self.symbols, sizes, strict=True)}
        if any(condition.xreplace(values) != sympy.true for condition in self.conditions):
            return False
        if len(self.known) < 1 << 16:
            self.known.add(sizes)
        return True


class Weights:
    """Where the tensors lie that a graph has as attributes: in the module that is called, and in fixed ones.

    Of each module the tensors are looked up once. Later calls compare, without a loop in Python, the entries of all
    dicts of children and of all dicts that hold these tensors with what they were. Another tensor in an entry is used
    from then on; other children raise :class:`WeightsChanged`.

    Args:
        tensors: the graph's attributes. module: the module that was called, or None. others: modules that the
            function reaches otherwise.

    Raises:
        NoFastCall: a tensor lies in none of the modules.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], module: torch.nn.Module | None, others: Sequence[torch.nn.Module]
    ) -> None:
        self.others = tuple(others)
        found: dict[int, list[tuple[str, str, str]]] = {id(tensor): [] for tensor in tensors}
        for path, one in self._modules(module):
            for kind, entries in _entries(one):
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor) and id(value) in found:
                        found[id(value)].append((path, kind, name))
        if not all(found.values()):
            raise NoFastCall("a weight lies in no module that the function is called with or refers to")
        self.places = [found[id(tensor)] for tensor in tensors]
        self._of: WeakKeyDictionary[Any, _Snapshot] = WeakKeyDictionary()

    def _modules(self, module: torch.nn.Module | None) -> Iterable[tuple[str, torch.nn.Module]]:
        for i, root in enumerate(([module] if module is not None else []) + list(self.others)):
            for path, one in root.named_modules():
                yield f"{i}.{path}", one

    def known(self, module: torch.nn.Module | None) -> list[torch.Tensor] | None:
        """The tensors of the graph in a module if nothing has changed since they were looked up, else None."""
        snapshot = self._of.get(module if module is not None else self)
        return snapshot.tensors if snapshot is not None and snapshot.holds() else None

    def of(self, module: torch.nn.Module | None) -> list[torch.Tensor]:
        """The tensors of the graph in a module; the list is kept.

        Raises:
            WeightsChanged: the module or one inside has other children now, or tensors in several places differ.
        """
        key = module if module is not None else self
        snapshot = self._of.get(key)
        if snapshot is None or not snapshot.holds():
            if snapshot is not None and not snapshot.same_children():
                raise WeightsChanged("a module has been replaced")
            snapshot = self._of[key] = _Snapshot(dict(self._modules(module)), self.places)
        return snapshot.tensors


class _Snapshot:
    """The entries of one module's dicts at one time."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], places: Sequence[Sequence[tuple[str, str, str]]]) -> None:
        self.children = [one._modules for one in modules.values() if one._modules]
        self.old_children = [dict(entries) for entries in self.children]
        self.tensors: list[torch.Tensor] = []
        dicts: dict[int, dict[str, Any]] = {}
        alone: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for several in places:
            entries = []
            for path, kind, name in several:
                if path not in modules or name not in (holder := dict(_entries(modules[path]))[kind]):
                    raise WeightsChanged(f"{path}.{name} is gone")
                entries.append((kind, holder, name))
            tensor = entries[0][1][entries[0][2]]
            if not isinstance(tensor, torch.Tensor) or any(holder[name] is not tensor for _, holder, name in entries):
                raise WeightsChanged("weights that were one tensor are several now")
            self.tensors.append(tensor)
            for kind, holder, name in entries:
                # Comparing tensors of one element gives an answer, and one that says nothing of their identity.
                if kind == "attribute" or tensor.numel() < 2:
                    alone.append((holder, name, tensor))
                else:
                    dicts[id(holder)] = holder
        self.dicts = list(dicts.values())
        self.old_dicts = [dict(entries) for entries in self.dicts]
        # Other entries beside them may be of one element too.
        for holder in self.dicts:
            alone += [(holder, n, t) for n, t in holder.items() if isinstance(t, torch.Tensor) and t.numel() < 2]
        self.alone = [(holder, name) for holder, name, _ in alone]
        self.old_alone = [tensor for *_, tensor in alone]
        training = {id(one): vars(one) for one in modules.values()}
        self.flags = list(training.values())
        self.old_flags = list(map(_training, self.flags))

    def same_children(self) -> bool:
        return self.children == self.old_children

    def holds(self) -> bool:
        """Whether all entries are the objects that they were, and all training flags the same."""
        try:
            # Dicts are compared in C, their values by identity first.
            if self.children != self.old_children or self.dicts != self.old_dicts:
                return False
        except (RuntimeError, TypeError, ValueError):
            return False  # tensors that are not the same object do not compare
        if self.alone and not all(map(is_, [holder.get(name) for holder, name in self.alone], self.old_alone)):
            return False
        return list(map(_training, self.flags)) == self.old_flags


def _entries(module: torch.nn.Module) -> list[tuple[str, dict[str, Any]]]:
    return [("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module))]  # type: ignore[list-item]


class FastCall:
    """Calls of one form, on modules that were called through Dynamo before; see Note [Fast calls].

    Attributes:
        function: Dynamo's code as a function, or bound method.
        weights: where the graph's attributes lie.
    """

    def __init__(
        self, function: Callable[..., Any], form: ArgumentForm, state: GlobalState, weights: Weights
    ) -> None:
        self.function, self.form, self.state, self.weights = function, form, state, weights

    @classmethod
    def of(
        cls,
        function: Any,
        graph: TracedGraph | None,
        whole: bool,
        module: torch.nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> FastCall:
        """What serves calls like one that has just been traced.

        Args:
            function: the function or bound method that Dynamo traced.
            graph: what came of the trace; whole: whether the call was one trace that gave one graph.
            module: what it was called on. args, kwargs: of the call, the module of an unbound method among them.

        Raises:
            NoFastCall: only Dynamo can serve them.
        """
        if graph is None or not whole:
            raise NoFastCall("the call is no single graph that is captured")
        if graph.code is None:
            raise NoFastCall("Dynamo made no code for the function itself")
        if graph.weights is None:
            raise NoFastCall("its code fetches weights, from where they cannot be looked up once")
        method = hasattr(function, "__self__")
        rest = args[1:] if module is not None and not method else args
        form = ArgumentForm(rest, kwargs, names_of_arguments(function, rest, kwargs, int(method or rest is not args)), graph)
        if not form.accepts(rest, kwargs):
            raise NoFastCall("the call changed the form of its own arguments")
        return cls(function_of_code(graph.code, function, {}), form, GlobalState(), graph.weights)

    def weights_of(
        self, module: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequence[torch.Tensor] | None:
        """The tensors that its graph has as attributes, for a call that it may serve; None for any other call.

        Args:
            module: what the function is called on; for a plain function None.
            args, kwargs: without the module.
        """
        if self.state.holds() and self.form.accepts(args, kwargs):
            return self.weights.known(module)
        return None
