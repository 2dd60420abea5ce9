"""What each op does with dimensions that hold padding.

A rule is a function ``rule(call) -> Dims``, a list of them for an op with several results. ``call`` (:class:`Call`) has
the op's arguments by name, tensors as :class:`Tracked`, whose ``dims`` say of each dimension what it consists of (see
:mod:`.dims`). The rule says the same of the results, and raises :class:`Mixing` where real entries of a result may
depend on padding. What it returns is checked against the shapes of the results.
"""

from __future__ import annotations

from . import elementwise, indexing, linear, reduce, shapes
from .call import Call, Tracked, register_row_rule, rule_for
from .dims import Mixing, broadcast, dims_of, has_tokens, need_static

__all__ = [
    "Call",
    "Mixing",
    "Tracked",
    "broadcast",
    "dims_of",
    "elementwise",
    "has_tokens",
    "indexing",
    "linear",
    "need_static",
    "reduce",
    "register_row_rule",
    "rule_for",
    "shapes",
]
