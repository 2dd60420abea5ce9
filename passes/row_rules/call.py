"""What a rule is given, and the registry of rules.

A rule is ``rule(call) -> Dims`` (a list of them for an op with several results): the dimensions of the results, given
those of the arguments. It raises :class:`~.dims.Mixing` where real results may depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch.utils._pytree import tree_leaves

from .dims import Dim, Dims, Mixing, as_expr, dims_of, has_tokens, is_dynamic, need_static

__all__ = ["Call", "RowRule", "Rule", "Tracked", "Values", "check_numbers", "register_row_rule", "rule_for", "rules"]


@dataclass(frozen=True)
class Values:
    """What is known of a tensor's entries, those in the padding included.

    Attributes:
        low, high: bounds (ints or expressions), None where unknown.
        given: where not None, an entry in the padding is either what an earlier step made of a real entry of one input,
            or what ``zero`` bounds, made of a zero. Tensors of equal ``given`` are made of the same entries.
        positional: all entries, the padding too, are what an unpadded run at the bucket's sizes would compute.
    """

    low: Any = None
    high: Any = None
    given: Any = None
    zero: tuple[Any, Any] = (None, None)
    positional: bool = False

    @property
    def constant(self) -> bool:
        """Whether all entries are one known number."""
        return self.low is not None and bool(self.low == self.high)


@dataclass(frozen=True)
class Tracked:
    """A tensor of the piece.

    Attributes:
        dims: where its real entries lie.
        values: what is known of its entries.
        scratch: it is an index whose padding points to memory that nobody reads.
        source: the position of the piece's input whose entries these are, unchanged, or None.
    """

    dims: Dims
    dtype: torch.dtype | None = None
    values: Values = Values()
    scratch: bool = False
    source: int | None = None

    @property
    def dynamic(self) -> bool:
        """Whether any of its dimensions changes with the bucket."""
        return any(has_tokens(dim) for dim in self.dims)


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: the overload. name: of the node.
        arguments: by name, defaults included, tensors as :class:`Tracked`; those that are None are left out.
        shapes, dtypes: of the results that are tensors.
        kind: a rule sets "prefix" where rows depend on earlier rows.
        row_indices: (position of an input, symbol) for row indices that count from the real size of ``symbol``.
        other_uses: positions of inputs that index ops use otherwise.
        limits: conditions on the bucket's sizes under which no index is out of range in the padding.
    """

    op: Any
    name: str
    arguments: dict[str, Any]
    shapes: list[tuple[Any, ...]]
    dtypes: list[torch.dtype]
    kind: Literal["row-wise", "prefix"] = "row-wise"
    row_indices: list[tuple[int, Any]] = field(default_factory=list)
    other_uses: list[int] = field(default_factory=list)
    limits: list[Any] = field(default_factory=list)

    def tensor(self, name: str) -> Tracked:
        """A tensor argument."""
        value = self.arguments[name]
        if not isinstance(value, Tracked):
            raise Mixing(f"its argument {name} is no tensor")
        return value

    def tensors(self) -> list[Tracked]:
        """All tensor arguments, those in lists too."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tracked)]

    @property
    def base(self) -> str:
        """The op's name without namespace, overload and the suffix of copying views."""
        return str(self.op).split(".")[1]


Rule = Callable[[Call], Any]


@dataclass(frozen=True)
class RowRule:
    """A rule, and which arguments may be dynamic sizes. ``layout``: it moves entries and changes none."""

    function: Rule
    sizes: frozenset[str] = frozenset()
    layout: bool = False


#: Registry of rules by op name, "aten::sum" or with an overload, "aten::sum.dim_IntList".
_RULES: dict[str, RowRule] = {}


def register_row_rule(op_name: str, rule: Rule | Literal["row-wise"], *, sizes: Collection[str] = ()) -> None:
    """Tells padding safety what an op of yours does with dimensions that hold padding.

    Args:
        op_name: as "mylib::op", of an op that mutates nothing.
        rule: "row-wise" for an op each row of whose results depends on that row alone of its tensors, rows being
            counted along dimension 0 of the results and of every tensor that has as many; the other dimensions, and
            tensors without rows such as weights, must not hold padding. Or a function ``rule(call)`` that returns the
            dimensions of each result, see :mod:`pcg_compile.passes.row_rules`.
        sizes: names of arguments that only say how large results are; any other dynamic number is refused.
    """
    if rule != "row-wise" and not callable(rule):
        raise TypeError(f'the rule for {op_name} must be "row-wise" or a function, not {rule!r}')
    _RULES[op_name] = RowRule(_rows if rule == "row-wise" else rule, frozenset(sizes))  # type: ignore[arg-type]


def _rows(call: Call) -> list[Dims]:
    rows: Dim | None = None
    for tensor in call.tensors():
        for dim in tensor.dims[1:]:
            need_static(dim, "reads across")
        if tensor.dynamic:
            if rows is not None and rows != tensor.dims[0]:
                raise Mixing("it reads tensors with different rows")
            rows = tensor.dims[0]
    results = []
    for dims in (dims_of(shape) for shape in call.shapes):
        for dim in dims[1:] if rows is not None else dims:
            need_static(dim, "returns")
        results.append((rows, *dims[1:]) if rows is not None and dims else dims)
    return results


def rules(*names: str, sizes: Collection[str] = (), layout: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule of this package for aten ops."""

    def enter(function: Rule) -> Rule:
        for name in names:
            _RULES[f"aten::{name}"] = RowRule(function, frozenset(sizes), layout)
        return function

    return enter


def rule_for(op: Any) -> RowRule | None:
    """The rule of an op: by overload, by name, as the copying twin of a view, as a random or a pointwise op."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    name = op.name()
    packet = name.split(".")[0]
    tags = op.tags
    found = _RULES.get(name) or _RULES.get(packet)
    if found is None and packet.startswith("aten::") and packet.endswith("_copy"):
        found = _RULES.get(packet.removesuffix("_copy"))
    if found is None and torch.Tag.nondeterministic_seeded in tags:
        found = _RULES.get("aten::rand")
    if found is None and torch.Tag.pointwise in tags:
        found = _RULES.get("aten::add")
    return found


def check_numbers(call: Call, sizes: Collection[str]) -> None:
    """Raises :class:`Mixing` if an argument other than those in ``sizes`` is a number that changes with the bucket."""
    for name, value in call.arguments.items():
        if name not in sizes and any(is_dynamic(as_expr(leaf)) for leaf in _numbers(value)):
            raise Mixing(f"it uses a dynamic size as a number ({name})")


def _numbers(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Basic)):
            yield leaf
