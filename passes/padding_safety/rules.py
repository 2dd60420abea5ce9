"""What an op does with dynamic dimensions: a rule takes the abstract arguments and gives the result's.

A rule is ``rule(call) -> Dims | list[Dims]`` and raises :class:`Mixing` where real results may depend on padding.
Here: the registry, what rules share, and the rule of everything elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .dims import Dim, Dims, Mixing, as_expr, broadcast, dims_of, has_tokens, is_dynamic
from .masks import REPEATED, Known

__all__ = [
    "Call",
    "Rule",
    "Tracked",
    "axis_of",
    "need_static",
    "no_size_as_number",
    "numbers_are_static",
    "pointwise",
    "random",
    "register_row_rule",
    "rule",
    "rule_for",
    "same",
    "static_number",
]


@dataclass(frozen=True)
class Tracked:
    """A tensor's dimensions; ``scratch``: an index whose padding points to memory that nobody reads."""

    dims: Dims
    scratch: bool = False
    #: The placeholder whose values these are, unchanged, or None.
    source: Any = None
    #: Whether it is boolean: as an index it selects.
    is_mask: bool = False
    #: Values that its padding is known to hold.
    known: frozenset[Known] = frozenset()
    #: Of its padding, see :mod:`.masks`.
    finiteness: int = REPEATED
    #: The one value that all its entries have, or None.
    uniform: Any = None


@dataclass
class Call:
    """One call: its arguments by name (tensors as :class:`Tracked`), the shapes of its results, its kind so far."""

    op: Any
    arguments: dict[str, Any]
    shapes: list[tuple[Any, ...]]
    #: "prefix" where rows depend on earlier rows.
    kind: str = "row-wise"
    #: (placeholder, symbol): row indices that count from the real size.
    row_indices: list[tuple[Any, Any]] = field(default_factory=list)
    #: Which of its indices follow from sizes alone.
    sized: set[int] = field(default_factory=set)
    #: (size, size): equal in a step, or the padding of one would meet real rows of the other.
    equals: list[tuple[Any, Any]] = field(default_factory=list)
    #: (input, size): masks that must be padded with zeros along a size.
    zeroed: set[tuple[str, Any]] = field(default_factory=set)

    def reads_over(self, tensor: Tracked, axis: int, what: str, neutral: float | None) -> None:
        """Reads all entries along a dimension, of which ``neutral`` ones make no difference.

        Raises:
            Mixing: its padding is not known to be neutral.
        """
        used = set()
        for factor in tensor.dims[axis]:
            if not is_dynamic(factor):
                continue
            known = [k for k in tensor.known if k.symbol == factor and k.value == neutral]
            if not known:
                raise Mixing(f"it {what} a dimension that holds padding")
            used |= {(k.source, k.along) for k in known}
        self.zeroed |= used

    def tensor(self, name: str) -> Tracked:
        value = self.arguments[name]
        if not isinstance(value, Tracked):
            raise Mixing(f"its argument {name} is no tensor")
        return value

    def tensors(self) -> list[Tracked]:
        found: list[Tracked] = []
        for value in self.arguments.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tracked)]
        return found


Rule = Callable[[Call], Any]

#: Arguments of torch's ops that say how large a result or a part is.
_COUNTS = frozenset(
    ("size", "sizes", "shape", "repeats", "start", "end", "split_size", "split_sizes", "n", "m", "N", "C", "HxW")
)  # fmt: skip
_LAYOUT = _COUNTS | {"stride"}


#: Registry of rules by op name ("aten::sum", overload or packet).
_RULES: dict[str, Rule] = {}


def register_row_rule(op_name: str, rule: Rule) -> None:
    """Tells the padding analysis what an op does with dynamic dimensions; ``op_name`` as "mylib::op"."""
    _RULES[op_name] = rule


def rule_for(op: Any) -> Rule | None:
    """The rule of an op: its own, or the one of all pointwise or of all random ops."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    packet = name.split(".")[0]
    # Functional form has a copying twin of every view.
    rule = _RULES.get(name) or _RULES.get(packet) or _RULES.get(packet.removesuffix("_copy"))
    if rule is None and torch.Tag.pointwise in getattr(op, "tags", ()):
        return pointwise
    if rule is None and torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()):
        return random
    return rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        for name in names:
            register_row_rule(f"aten::{name}", rule)
        return rule

    return enter


def static_number(value: Any, what: str) -> None:
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        expr = as_expr(leaf)
        if isinstance(leaf, (torch.SymFloat, torch.SymBool)) or (isinstance(expr, sympy.Basic) and expr.free_symbols):
            raise Mixing(f"it uses a dynamic size as a number ({what})")


def numbers_are_static(call: Call, *shapes: str) -> None:
    for name, value in call.arguments.items():
        if name not in shapes and not isinstance(value, Tracked):
            leaves = value if isinstance(value, (list, tuple)) else [value]
            static_number([v for v in leaves if not isinstance(v, Tracked)], name)


def no_size_as_number(call: Call) -> None:
    """Where an op of torch takes a dynamic number, and not to say how large something is, its result is another one."""
    name = str(call.op)
    if name.startswith("aten.") and call.shapes:
        counts = _LAYOUT if "strided" in name or "alias" in name else _COUNTS
        numbers_are_static(call, *counts)


def axis_of(dims: Dims, index: int) -> int:
    return index % len(dims) if dims else 0


def need_static(dim: Dim, what: str) -> None:
    if has_tokens(dim):
        raise Mixing(f"it {what} a dimension that holds padding")


# Plain copies and elementwise functions keep every index where it is.
def pointwise(call: Call) -> Dims | list[Dims]:
    numbers_are_static(call)
    dims = broadcast([t.dims for t in call.tensors()])
    return dims if len(call.shapes) <= 1 else [dims] * len(call.shapes)


rule("where", "masked_fill", "copy", "contiguous", "lift_fresh", "nan_to_num", "_conj", "fill", "logical_not",
     "hardtanh", "hardswish", "floor_divide", "rsub", "polar", "complex", "zero",
     "fake_quantize_per_tensor_affine", "prelu")(pointwise)  # fmt: skip


@rule("detach", "alias", "_to_copy", "clone", "lift_fresh_copy")
def same(call: Call) -> Tracked:
    numbers_are_static(call)
    source = call.tensors()[0]
    return Tracked(source.dims, source.scratch, source.source)


def random(call: Call) -> Any:
    """As many numbers are drawn as there are entries, padding included: the real ones would not be eager's."""
    dims = [*(t.dims for t in call.tensors()), *map(dims_of, call.shapes)]
    if any(has_tokens(d) for one in dims for d in one):
        # Of dropout there is nothing left in inference.
        drops = any(name in str(call.op) for name in ("dropout", "bernoulli")) or call.arguments.get("dropout_p")
        cure = "; if this is dropout, the model is in training mode: call model.eval()" if drops else ""
        raise Mixing(f"it draws random numbers for padding too, so that the real rows get others{cure}")
    numbers_are_static(call)
    return [dims_of(shape) for shape in call.shapes]
