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

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import is_, itemgetter
from types import CodeType
from typing import Any, Self
from weakref import WeakKeyDictionary

import sympy
import torch

from .fx.sizes import expr_of
from .torch_compat.dynamo_calls import GlobalState, TensorChecks, function_of_code
from .torch_compat.fake_tensors import FakeTensorMode

__all__ = ["ArgumentForm", "FastCall", "NoFastCall", "TracedGraph", "Weights", "WeightsChanged", "named_constant"]

_training = itemgetter("training")
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NoFastCall(Exception):
    """Why calls of a function all go through Dynamo."""


class WeightsChanged(Exception):
    """The modules of a graph have other children now, or weights that were one tensor are several: trace again."""


def _values(name: str, value: Any, found: dict[str, Any]) -> Any:
    """Adds the values in nested containers to ``found``, by Dynamo's names; returns a key of the containers."""
    kind = type(value)
    if kind is dict:
        return (dict, *((key, _values(f"{name}[{key!r}]", one, found)) for key, one in value.items()))
    if kind is list or kind is tuple:
        return (kind, *[_values(f"{name}[{i}]", one, found) for i, one in enumerate(value)])
    found[name] = value
    return None


def named_constant(value: Any) -> str:
    """The dotted name of an object that is the same in every call and process, such as the mask of every step; or ""."""
    module, _, name = getattr(type(value), "constant_name", "").rpartition(".")
    return f"{module}.{name}" if module and getattr(sys.modules.get(module), name, None) is value else ""


class Binder:
    """Gives the parameters of a function, without that of its module, the values that they have in a call."""

    def __init__(self, function: Any, method: bool) -> None:
        parameters = dict(inspect.signature(function, follow_wrapped=False).parameters)
        first = next(iter(parameters.values()), None)
        if method and not hasattr(function, "__self__") and first is not None and first.kind != first.VAR_POSITIONAL:
            del parameters[first.name]
        self.names = tuple(parameters)
        self.signature = inspect.Signature(list(parameters.values()))
        self.defaults = {name: one.default for name, one in parameters.items()}
        kinds = [one.kind for one in parameters.values()]
        #: How many may be given by position, where neither *args nor **kwargs collect more.
        self.positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.plain = self.positional + kinds.count(inspect.Parameter.KEYWORD_ONLY) == len(kinds)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any] | None:
        """The values in the order of the parameters; None where the call does not fit them."""
        if not self.plain:
            try:
                bound = self.signature.bind(*args, **kwargs)
            except TypeError:
                return None
            bound.apply_defaults()
            return list(bound.arguments.values())
        given = len(args)
        if given > self.positional:
            return None
        if given == len(self.names):
            return args if not kwargs else None
        values, used = list(args), 0
        for name in self.names[given:]:
            if name in kwargs:
                used += 1
                values.append(kwargs[name])
            else:
                values.append(self.defaults[name])
        return values if used == len(kwargs) else None


@dataclass(frozen=True)
class Product:
    """A size or stride: a factor times sizes, by their places."""

    factor: int
    places: tuple[int, ...]

    @classmethod
    def of(cls, expr: Any, places: Mapping[sympy.Symbol, int]) -> Product:
        """The product that an expression is.

        Raises:
            NoFastCall: it is none.
        """
        coefficient, rest = sympy.sympify(expr).as_coeff_Mul()
        factors = [] if rest == 1 else list(sympy.Mul.make_args(rest))
        if not coefficient.is_Integer or not all(factor in places for factor in factors):
            raise NoFastCall(f"an argument has a size or stride {expr}, which is no product of sizes")
        return cls(int(coefficient), tuple(places[factor] for factor in factors))

    def at(self, sizes: Sequence[int]) -> int:
        return self.factor * prod([sizes[i] for i in self.places])


@dataclass
class ArgumentForm:
    """What a traced call's arguments look like, as far as its graph depends on it. Plain data, but for ``checks``.

    Attributes:
        parameters: the function's, that of its module left out. structure: the containers in their values.
        constants: (place among the values in the containers, value); floats, integers: places of numbers that differ.
        tensors: (place, dtype, device, whether it requires gradients, is a parameter, comes from inference mode);
            sizes, strides: of each tensor, None where they may differ, or Dynamo has not looked.
        symbols: the dynamic sizes; sources: where each comes from: (place, dimension), or (place, -1) for an int.
        derived: sizes and strides that follow from these: (place, dimension, whether it is a stride, product).
        conditions: on the symbols.
    """

    parameters: tuple[str, ...]
    structure: list[Any]
    constants: list[tuple[int, Any]] = field(default_factory=list)
    floats: list[int] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    tensors: list[tuple[int, torch.dtype, torch.device, bool, bool, bool]] = field(default_factory=list)
    sizes: list[list[int | None]] = field(default_factory=list)
    strides: list[list[int | None]] = field(default_factory=list)
    symbols: tuple[sympy.Symbol, ...] = ()
    sources: list[tuple[int, int]] = field(default_factory=list)
    derived: list[tuple[int, int, bool, Product]] = field(default_factory=list)
    conditions: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flat = all(one is None for one in self.structure)
        self.places = [place for place, *_ in self.tensors]
        #: Sizes that satisfy the conditions.
        self.known: set[tuple[int, ...]] = set()
        examples = []
        for (_, dtype, device, trained, parameter, inference), sizes in zip(self.tensors, self.sizes, strict=True):
            with torch.inference_mode(inference):
                one = torch.empty((1,) * len(sizes), dtype=dtype, device=device)
                examples.append(torch.nn.Parameter(one, trained) if parameter else one.requires_grad_(trained))
        self.check = TensorChecks(examples, self.sizes, self.strides).check if examples else None

    @classmethod
    def of(cls, code: CodeType, given: Mapping[str, Any], seen: Mapping[str, Any], conditions: Sequence[Any]) -> Self:
        """The form of a call.

        Args:
            code: the function's. given: its local variables at the call.
            seen: what Dynamo looked at in the trace, by name: fake tensors and symbolic numbers.
            conditions: on the sizes.

        Raises:
            NoFastCall: Dynamo may check more of an argument than this does.
        """
        names = parameters_of(code)
        if names and isinstance(given[names[0]], torch.nn.Module):
            names = names[1:]
        values: dict[str, Any] = {}
        form = cls(names, [_values(f"L[{name!r}]", given[name], values) for name in names])
        if names and type(given[names[0]]) is tuple and isinstance((*given[names[0]], None)[0], torch.nn.Module):
            # A method with *args alone has its module among them.
            del values[f"L[{names[0]!r}][0]"]
            form.structure[0] = (tuple, *form.structure[0][2:])
        symbols: dict[sympy.Symbol, int] = {}

        def place(expr: Any, source: tuple[int, int]) -> None:
            if isinstance(expr, sympy.Symbol) and expr not in symbols:
                symbols[expr] = len(symbols)
                form.sources.append(source)

        fakes: list[tuple[int, Any]] = []
        for i, (name, value) in enumerate(values.items()):
            fake = seen.get(name)
            if isinstance(value, torch.Tensor):
                kind = type(value)
                if kind not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                    raise NoFastCall(f"{name[2:-1]} is a {kind.__name__} of layout {value.layout}")
                about = (value.requires_grad, kind is torch.nn.Parameter, value.is_inference())
                form.tensors.append((i, value.dtype, value.device, *about))
                fakes.append((i, fake))
                for d, size in enumerate(fake.shape if fake is not None else ()):
                    place(expr_of(size), (i, d))
            elif isinstance(fake, torch.SymInt) and type(value) is int:
                place(expr_of(fake), (i, -1))
                form.integers.append(i)
            elif fake is not None and type(value) is float:
                form.floats.append(i)
            elif type(value) in CONSTANTS or named_constant(value):
                form.constants.append((i, value))
            else:
                raise NoFastCall(f"{name[2:-1]} is a {type(value).__name__}, of which Dynamo may check more")
        every = list(values.values())
        if len({id(every[i]) for i, *_ in form.tensors}) < len(form.tensors):
            raise NoFastCall("one tensor is passed as several arguments")
        for i, fake in fakes:
            for numbers, into in (("shape", form.sizes), ("stride", form.strides)):
                if fake is None:
                    into.append([None] * every[i].dim())
                    continue
                exprs = [expr_of(n) for n in (fake.shape if numbers == "shape" else fake.stride())]
                into.append([None if isinstance(expr, sympy.Basic) else int(expr) for expr in exprs])
                for d, expr in enumerate(exprs):
                    if isinstance(expr, sympy.Basic) and (numbers == "stride" or (i, d) not in form.sources):
                        form.derived.append((i, d, numbers == "stride", Product.of(expr, symbols)))
        form.symbols = tuple(symbols)
        # Sizes that Dynamo found to be numbers are compared as such.
        found = [one.args for one in conditions if isinstance(one, sympy.Eq) and one.args[1].is_Integer]
        fixed = {symbol: number for symbol, number in found if symbol not in symbols}
        form.conditions = [one for one in (c.xreplace(fixed) for c in conditions) if one != sympy.true]
        for condition in form.conditions:
            if not condition.free_symbols <= symbols.keys():
                raise NoFastCall(f"the graph is right under a condition on other numbers: {condition}")
        form.__post_init__()
        return form

    def accepts(self, values: Sequence[Any]) -> bool:
        """Whether the values of a call's parameters have this form."""
        if not self.flat:
            found: dict[str, Any] = {}
            if [_values(name, one, found) for name, one in zip(self.parameters, values, strict=True)] != self.structure:
                return False
            values = list(found.values())
        for i, constant in self.constants:
            given = values[i]
            if given is not constant and (type(given) is not type(constant) or given != constant):
                return False
        for i in self.floats:
            if type(values[i]) is not float:
                return False
        for i in self.integers:
            if type(values[i]) is not int:
                return False
        if self.check is not None:
            tensors = [values[i] for i in self.places]
            if not self.check(*tensors) or (len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors)):
                return False
        sizes = tuple([values[i].shape[d] if d >= 0 else values[i] for i, d in self.sources])
        for i, d, stride, product in self.derived:
            if (values[i].stride(d) if stride else values[i].shape[d]) != product.at(sizes):
                return False
        return sizes in self.known or self._holds_at(sizes)

    def _holds_at(self, sizes: tuple[int, ...]) -> bool:
        values = {symbol: sympy.Integer(n) for symbol, n in zip(self.symbols, sizes, strict=True)}
        if any(condition.xreplace(values) != sympy.true for condition in self.conditions):
            return False
        if len(self.known) < 1 << 16:
            self.known.add(sizes)
        return True


def parameters_of(code: CodeType) -> tuple[str, ...]:
    """The names of a code's parameters, in the order of its signature."""
    count, names = code.co_argcount, list(code.co_varnames)
    end = count + code.co_kwonlyargcount
    more = names[end : end + bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)]
    collected = [more.pop(0)] if code.co_flags & inspect.CO_VARARGS else []
    return (*names[:count], *collected, *names[count:end], *more)


@dataclass
class TracedGraph:
    """What is known of a graph's trace beside the graph: for calls without Dynamo, and for saving it.

    Attributes:
        runtime: what runs it, and knows the graph itself.
        seen: what Dynamo has looked at of the arguments, by name: fake tensors and symbolic numbers.
        codes: the code of all functions that the trace went through.
        layouts: conditions that hold at every bucket and are no guards; see ``layouts_apart``.
        weights: where the tensors lie that are attributes of Dynamo's graph; None where it has weights as inputs.
        original, code: the function's code, and what Dynamo made of it.
        form: of the traced call's arguments; or why calls cannot do without Dynamo.
    """

    runtime: Any
    seen: dict[str, Any]
    codes: list[CodeType]
    fake_mode: FakeTensorMode
    layouts: Sequence[Any]
    weights: Weights | None = None
    original: CodeType | None = None
    code: CodeType | None = None
    form: ArgumentForm | NoFastCall = field(default_factory=lambda: NoFastCall("Dynamo made no code for the function"))
    state: GlobalState | None = None

    def complete(self, code: CodeType, compiled: CodeType, given: Mapping[str, Any], conditions: Sequence[Any]) -> None:
        """Notes what Dynamo made of the function's code."""
        self.original, self.code, self.state = code, compiled, GlobalState()
        try:
            self.form = ArgumentForm.of(code, given, self.seen, conditions)
        except NoFastCall as reason:
            self.form = reason
        self.seen = {}


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

    @classmethod
    def at(cls, places: Sequence[Sequence[Sequence[str]]], others: Sequence[torch.nn.Module]) -> Weights:
        """The same from known places: several (path, kind, name) of each tensor."""
        weights = cls([], None, others)
        weights.places = [[(path, kind, name) for path, kind, name in several] for several in places]
        return weights

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
        self, function: Callable[..., Any], binder: Binder, form: ArgumentForm, state: GlobalState, weights: Weights
    ) -> None:
        self.function, self.binder, self.form, self.state, self.weights = function, binder, form, state, weights

    @classmethod
    def of(cls, function: Any, graph: TracedGraph | None, module: torch.nn.Module | None) -> FastCall:
        """What serves calls like one that has just been traced.

        Args:
            function: the function or bound method that Dynamo traced.
            graph: what came of the trace; None where the call was more than a graph.
            module: what it was called on.

        Raises:
            NoFastCall: only Dynamo can serve them.
        """
        if graph is None:
            raise NoFastCall("the call is no single graph that is captured")
        if isinstance(graph.form, NoFastCall):
            raise graph.form
        assert graph.code is not None and graph.state is not None
        if graph.weights is None:
            raise NoFastCall("its code fetches weights, from where they cannot be looked up once")
        binder = Binder(function, module is not None)
        if binder.names != graph.form.parameters:
            raise NoFastCall("Dynamo traced a function inside this one")
        return cls(function_of_code(graph.code, function, {}), binder, graph.form, graph.state, graph.weights)

    def weights_of(
        self, module: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequence[torch.Tensor] | None:
        """The tensors that its graph has as attributes, for a call that it may serve; None for any other call.

        Args:
            module: what the function is called on; for a plain function None.
            args, kwargs: without the module.
        """
        if not self.state.holds():
            return None
        values = self.binder(args, kwargs)
        if values is None or not self.form.accepts(values):
            return None
        return self.weights.known(module)
