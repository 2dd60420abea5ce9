"""What the rules of the padding analysis are given, and their registry.

A rule is ``rule(call)`` and returns the dimensions of the result, or a list of them for several results. It raises
:class:`Mixing` where real results may depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .dims import Dim, Dims, Mixing, as_expr, broadcast, dims_of, has_tokens, is_dynamic

#: What padding holds: some real row's values; other finite ones; anything.
REPEATED, OTHER, WILD = 0, 1, 2


@dataclass(frozen=True)
class Known:
    """Padding along ``symbol`` is ``value`` if the input ``source`` is padded with zeros along ``along``."""

    symbol: sympy.Symbol
    value: float
    source: str
    along: sympy.Symbol


@dataclass(frozen=True)
class Tracked:
    """A tensor's dimensions, and what is known of its padding.

    Attributes:
        scratch: an index whose padding points to memory that nobody reads.
        source: the position of the input whose values these are, unchanged, or None.
        is_mask: it is boolean: as an index it selects.
        known: values that its padding holds. finiteness: REPEATED, OTHER or WILD.
        uniform: the one value that all its entries have, or None.
    """

    dims: Dims
    scratch: bool = False
    source: int | None = None
    is_mask: bool = False
    known: frozenset[Known] = frozenset()
    finiteness: int = REPEATED
    uniform: Any = None


@dataclass
class Call:
    """One call: its arguments by name (tensors as :class:`Tracked`), and what its rule finds.

    Attributes:
        shapes: of its results. kind: "prefix" where rows depend on earlier rows.
        row_indices: (input, size): row indices that count from the real size.
        sized: which of its indices follow from sizes alone.
        equals: (size, size): equal in a step, or the padding of one would meet real rows of the other.
        zeroed: (input, size): masks that must be padded with zeros along a size.
    """

    op: Any
    arguments: dict[str, Any]
    shapes: list[tuple[Any, ...]]
    kind: str = "row-wise"
    row_indices: list[tuple[Any, Any]] = field(default_factory=list)
    sized: set[int] = field(default_factory=set)
    equals: list[tuple[Any, Any]] = field(default_factory=list)
    zeroed: set[tuple[str, Any]] = field(default_factory=set)

    def reads_over(self, tensor: Tracked, axis: int, what: str, neutral: float | None) -> None:
        """Reads all entries along a dimension; ``neutral`` ones make no difference.

        Raises:
            Mixing: its padding is not known to be neutral.
        """
        for factor in filter(is_dynamic, tensor.dims[axis]):
            known = [k for k in tensor.known if k.symbol == factor and k.value == neutral]
            if not known:
                raise Mixing(f"it {what} a dimension that holds padding")
            self.zeroed |= {(k.source, k.along) for k in known}

    def tensor(self, name: str) -> Tracked:
        """A tensor argument."""
        value = self.arguments[name]
        if not isinstance(value, Tracked):
            raise Mixing(f"its argument {name} is no tensor")
        return value

    def tensors(self) -> list[Tracked]:
        """All tensor arguments, in order."""
        return tensors_of(self.arguments.values())


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}

#: Arguments of torch's ops that say how large a result or a part is.
_COUNTS = ("size", "sizes", "shape", "repeats", "start", "end", "split_size", "split_sizes", "n", "m", "N", "C", "HxW")


def register_row_rule(op_name: str, rule: Rule) -> None:
    """Tells the padding analysis what an op does with dynamic dimensions; ``op_name`` as "mylib::op"."""
    _RULES[op_name] = rule


def rule_for(op: Any) -> Rule | None:
    """The rule of an op: its own, or the one of all pointwise or of all random ops."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    packet = name.split(".")[0]
    # Functional form has a copying form of every view.
    rule = _RULES.get(name) or _RULES.get(packet) or _RULES.get(packet.removesuffix("_copy"))
    tags = getattr(op, "tags", ())
    if rule is None and torch.Tag.pointwise in tags:
        return pointwise
    if rule is None and torch.Tag.nondeterministic_seeded in tags:
        return random
    return rule


def rule(names: str) -> Callable[[Rule], Rule]:
    """Enters a rule for aten ops, their names separated by spaces."""

    def enter(rule: Rule) -> Rule:
        for name in names.split():
            register_row_rule(f"aten::{name}", rule)
        return rule

    return enter


def packet_of(op: Any) -> str:
    """An op's name without namespace, overload and the ``_copy`` of a copying view."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    name = name.split("::")[-1].partition(".")[0]
    return name if name in ("_to_copy", "index_copy") else name.removesuffix("_copy")


def tensors_of(values: Iterable[Any]) -> list[Tracked]:
    """The tensors among arguments, those in lists too."""
    leaves = (leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else [value]))
    return [leaf for leaf in leaves if isinstance(leaf, Tracked)]


def static_number(value: Any, what: str) -> None:
    """Raises :class:`Mixing` for a number that follows from a dynamic size."""
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        expr = as_expr(leaf)
        if isinstance(leaf, (torch.SymFloat, torch.SymBool)) or (isinstance(expr, sympy.Basic) and expr.free_symbols):
            raise Mixing(f"it uses a dynamic size as a number ({what})")


def numbers_are_static(call: Call, *shapes: str) -> None:
    """Raises :class:`Mixing` for a dynamic number among the arguments, those named ``shapes`` aside."""
    for name, value in call.arguments.items():
        if name not in shapes:
            static_number(value, name)


def no_size_as_number(call: Call) -> None:
    """Where an op of torch takes a dynamic number, and not to say how large something is, its result is another one."""
    name = str(call.op)
    if name.startswith("aten.") and call.shapes:
        numbers_are_static(call, *_COUNTS, *(["stride"] if "strided" in name or "alias" in name else []))


def axis_of(dims: Sequence[Any], index: int) -> int:
    """A dimension counted from the front."""
    return index % len(dims) if dims else 0


def need_static(dim: Dim, what: str) -> None:
    """Raises :class:`Mixing` for a dimension that holds padding."""
    if has_tokens(dim):
        raise Mixing(f"it {what} a dimension that holds padding")


@rule("where masked_fill copy contiguous lift_fresh nan_to_num _conj fill logical_not hardtanh hardswish floor_divide "
      "rsub polar complex zero fake_quantize_per_tensor_affine prelu")  # fmt: skip
def pointwise(call: Call) -> Dims | list[Dims]:
    """Every index stays where it is."""
    numbers_are_static(call)
    dims = broadcast([t.dims for t in call.tensors()])
    return dims if len(call.shapes) <= 1 else [dims] * len(call.shapes)


@rule("detach alias _to_copy clone lift_fresh_copy")
def same(call: Call) -> Tracked:
    """The same values."""
    numbers_are_static(call)
    source = call.tensors()[0]
    return Tracked(source.dims, source.scratch, source.source)


def random(call: Call) -> list[Dims]:
    """As many numbers are drawn as there are entries, padding included: the real ones would not be eager's."""
    dims = [*(t.dims for t in call.tensors()), *map(dims_of, call.shapes)]
    if any(has_tokens(d) for one in dims for d in one):
        # In inference no dropout is left.
        drops = any(name in str(call.op) for name in ("dropout", "bernoulli")) or call.arguments.get("dropout_p")
        cure = "; if this is dropout, the model is in training mode: call model.eval()" if drops else ""
        raise Mixing(f"it draws random numbers for padding too, so the real rows get others{cure}")
    numbers_are_static(call)
    return [dims_of(shape) for shape in call.shapes]
