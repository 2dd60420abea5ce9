"""The form of a call's arguments: what must be the same for the graph of one call to be right for another."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import CodeType
from typing import Any

import sympy
import torch

from .fx.graph_data import named_constant
from .fx.sizes import expr_of
from .torch_compat.dynamo_calls import TensorChecks

__all__ = ["ArgumentForm", "Binder", "NoFastCall"]

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NoFastCall(Exception):
    """Why calls of a function all go through Dynamo."""


def _values(name: str, value: Any, found: dict[str, Any], containers: list[Any]) -> Any:
    """Adds the values in nested containers to ``found``, by Dynamo's names; returns a key of the containers.

    Those that can be written to are added to ``containers``.
    """
    kind = type(value)
    if kind is dict:
        containers.append(value)
        named = [(key, f"{name}[{key!r}]", one) for key, one in value.items()]
        # 1 and True are equal.
        return (dict, *((type(key).__name__, key, _values(path, one, found, containers)) for key, path, one in named))
    if kind is list or kind is tuple:
        if kind is list:
            containers.append(value)
        return (kind, *[_values(f"{name}[{i}]", one, found, containers) for i, one in enumerate(value)])
    found[name] = value
    return None


def _repeats(values: Sequence[Any]) -> bool:
    """Whether one object is there twice."""
    return len(values) > 1 and len(set(map(id, values))) < len(values)


def _shown(name: str) -> str:
    """A name of Dynamo's, for people: ``xs[0]`` for ``L['xs'][0]``."""
    first, _, rest = name.removeprefix("L['").partition("']")
    return first + rest


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


def _product(expr: Any, places: Mapping[sympy.Symbol, int]) -> tuple[int, tuple[int, ...]]:
    """A size or stride as a factor times sizes, these by their places.

    Raises:
        NoFastCall: it is no such product.
    """
    coefficient, rest = sympy.sympify(expr).as_coeff_Mul()
    factors: list[Any] = [] if rest == 1 else list(sympy.Mul.make_args(rest))
    if not coefficient.is_Integer or not all(factor in places for factor in factors):
        raise NoFastCall(f"an argument has a size or stride {expr}, which is no product of sizes")
    return int(coefficient), tuple(places[factor] for factor in factors)


@dataclass
class ArgumentForm:
    """What a traced call's arguments look like, as far as its graph depends on it. Plain data, but for ``checks``.

    Attributes:
        parameters: the function's, that of its module left out. structure: the containers in their values.
        constants: (place among the values in the containers, value); floats, integers: places of numbers that differ.
        tensors: (place, dtype, device, whether it requires gradients, is a parameter, comes from inference mode);
            sizes, strides: of each tensor, None where they may differ, or Dynamo has not looked.
        symbols: the dynamic sizes; sources: where each comes from: (place, dimension), or (place, -1) for an int.
        derived: what follows from these: (place, dimension, whether it is a stride, factor, places of sizes), the
            product of these; dimension -1 for an int.
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
    derived: list[tuple[int, int, bool, int, tuple[int, ...]]] = field(default_factory=list)
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
    def of(
        cls, code: CodeType, given: Mapping[str, Any], seen: Mapping[str, Any], conditions: Sequence[Any]
    ) -> ArgumentForm:
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
        containers: list[Any] = []
        form = cls(names, [_values(f"L[{name!r}]", given[name], values, containers) for name in names])
        if _repeats(containers):
            raise NoFastCall("one container is passed as several arguments")
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
        equal: list[tuple[int, Any]] = []
        for i, (name, value) in enumerate(values.items()):
            fake = seen.get(name)
            if isinstance(value, torch.Tensor):
                kind = type(value)
                if kind not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                    raise NoFastCall(f"{_shown(name)} is a {kind.__name__} of layout {value.layout}")
                about = (value.requires_grad, kind is torch.nn.Parameter, value.is_inference())
                form.tensors.append((i, value.dtype, value.device, *about))
                fakes.append((i, fake))
                for d, size in enumerate(fake.shape if fake is not None else ()):
                    place(expr_of(size), (i, d))
            elif isinstance(fake, torch.SymInt) and type(value) is int and isinstance(expr_of(fake), sympy.Symbol):
                place(expr_of(fake), (i, -1))
                form.integers.append(i)
                if (i, -1) not in form.sources:
                    equal.append((i, expr_of(fake)))
            elif fake is not None and type(value) is float:
                form.floats.append(i)
            elif type(value) in _CONSTANTS or named_constant(value):
                form.constants.append((i, value))
            else:
                raise NoFastCall(f"{_shown(name)} is a {type(value).__name__}, and Dynamo may check more of it")
        every = list(values.values())
        if _repeats([every[i] for i, *_ in form.tensors]):
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
                        form.derived.append((i, d, numbers == "stride", *_product(expr, symbols)))
        form.derived += [(i, -1, False, *_product(expr, symbols)) for i, expr in equal]
        form.symbols = tuple(symbols)
        # Sizes and ints that Dynamo found to be numbers are compared as such.
        found = [one.args for one in conditions if isinstance(one, sympy.Eq) and one.args[1].is_Integer]
        fixed = {symbol: number for symbol, number in found if symbol.is_Symbol and symbol not in symbols}
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
            held: list[Any] = []
            named = zip(self.parameters, values, strict=True)
            if [_values(name, one, found, held) for name, one in named] != self.structure or _repeats(held):
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
            if not self.check(*tensors) or _repeats(tensors):
                return False
        sizes = tuple([values[i].shape[d] if d >= 0 else values[i] for i, d in self.sources])
        for i, d, stride, factor, places in self.derived:
            given = values[i] if d < 0 else values[i].stride(d) if stride else values[i].shape[d]
            if given != factor * prod([sizes[place] for place in places]):
                return False
        return sizes in self.known or self._holds_at(sizes)

    def _holds_at(self, sizes: tuple[int, ...]) -> bool:
        # torch takes the symbol of a size for positive, and no condition says so.
        if any(d >= 0 and n < 1 for (_, d), n in zip(self.sources, sizes, strict=True)):
            return False
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
