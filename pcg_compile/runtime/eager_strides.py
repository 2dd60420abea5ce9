"""The strides that eager's results have in dimensions of size 1.

Note [Dimensions of size 1]. No address depends on the stride of a dimension of size 1, so torch's kernels and its fake
tensors lay such dimensions out differently, and captured graphs write what fake tensors tell. What a step returns has
the strides of the kernels: they are learned by running the piece that makes a result, as Dynamo wrote it, on zeros of
the step's sizes, which reads and writes nothing of the step. A stride is one entry of another dimension, or a number;
two runs tell which, and later sizes with ones at the same places are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..fx.plan import PieceItem
from ..fx.sizes import evaluate, shape_at, strides_at, symbols_of
from ..fx.submodules import Piece
from ..memory.buffers import extent
from .capture import rng_unchanged
from .draft import Draft
from .shared import StrideRule

__all__ = ["like_eager"]

#: Most bytes of zeros for one run.
_MOST_ZEROS = 1 << 26
#: What torch's ops raise of zeros, as a factorization does: the strides are those of fake tensors then.
_RAISED = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def like_eager(d: Draft, node: fx.Node) -> torch.Tensor:
    """The fake tensor of a result of a step; one with eager's strides where it has a dimension of size 1."""
    fake: torch.Tensor = d.plan.value(node)
    if not symbols_of(fake) <= d.sizes.keys() or fake.layout != torch.strided:
        return fake
    shape, before = shape_at(fake, d.sizes), strides_at(fake, d.sizes)
    if all(n > 1 for n in shape):
        return fake
    strides = _strides(d, node, shape, before)
    if strides == before:
        return fake
    offset = evaluate(fake.storage_offset(), d.sizes)
    base = torch.empty(offset + extent(shape, strides), dtype=fake.dtype, device="meta")
    return base.as_strided(shape, strides, offset)


def _strides(d: Draft, node: fx.Node, shape: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    known = d.shared.stride_rules
    ones = frozenset(symbol for symbol, n in d.sizes.items() if n == 1)
    runs, rules = known.get((node, ones), (0, []))
    if runs < 2:
        for made, strides in _run(d, node).items():
            fake = d.plan.value(made)
            found = _rules(shape_at(fake, d.sizes), strides, strides_at(fake, d.sizes))
            _, old = known.get((made, ones), (0, found))
            known[made, ones] = runs + 1, [[r for r in a if r in b] for a, b in zip(old, found, strict=True)]
        _, rules = known.setdefault((node, ones), (2, []))
    if not all(rules):
        return before
    return tuple([_stride(rule[0], shape, before, own) for rule, own in zip(rules, before)] or before)


def _run(d: Draft, node: fx.Node) -> dict[fx.Node, tuple[int, ...]]:
    """The strides of all results of a node's piece, as eager gives them; {} where that cannot be told."""
    item = next((one for one in d.plan.items if node in one.outputs), None)
    # An opaque op is not called but for its step; nor is a collective.
    if not isinstance(item, PieceItem) or item.needs_probe or d.shared.agreement is not None:
        return {}
    piece = item.piece
    if not d.sizes.keys() >= set(piece.symbols):
        return {}
    try:
        with torch.inference_mode(False), torch.no_grad(), rng_unchanged(d.shared.device):
            inputs = _inputs(d, piece)
            if inputs is None:
                return {}
            results = piece.gm.forward(*(d.sizes[s] for s in piece.symbols), *inputs)
    except _RAISED:
        return {}
    pairs = zip(piece.outputs, results, strict=True)
    return {made: result.stride() for made, result in pairs if isinstance(result, torch.Tensor)}


def _inputs(d: Draft, piece: Piece) -> list[torch.Tensor] | None:
    """What stands for a piece's inputs: weights that are only read, else zeros laid out as in the step.

    None where zeros would take much memory, as for a cache of keys and values, or for what the step brings.
    """
    specs = {spec.node: spec for spec in d.plan.inputs}
    found: list[torch.Tensor] = []
    room = _MOST_ZEROS
    for i, node in enumerate(piece.inputs):
        spec, fake = specs.get(node), d.plan.value(node)
        if (spec is not None and spec.kind == "step") or not symbols_of(fake) <= d.sizes.keys():
            return None
        given: Any = d.frame.args[spec.position] if spec is not None else None
        if spec is not None and spec.kind != "user" and i not in piece.writes:
            found.append(given)
            continue
        shape, strides = shape_at(fake, d.sizes), strides_at(fake, d.sizes) if given is None else given.stride()
        room -= extent(shape, strides) * fake.dtype.itemsize
        if room < 0:
            return None
        found.append(torch.empty_strided(shape, strides, dtype=fake.dtype, device=fake.device).zero_())
    return found


def _rules(shape: Sequence[int], strides: Sequence[int], before: Sequence[int]) -> list[list[StrideRule]]:
    """What each stride may follow from; nothing where strides differ that addresses depend on."""
    empty = 0 in shape
    if not empty and any(n > 1 and a != b for n, a, b in zip(shape, strides, before, strict=True)):
        return [[] for _ in shape]
    rules: list[list[StrideRule]] = []
    for size, stride, own in zip(shape, strides, before, strict=True):
        same: list[StrideRule] = [None] if stride == own else []
        if size == 1 or empty:
            same += [("of", d) for d, n in enumerate(shape) if n > 1 and before[d] * n == stride]
            same.append(("is", stride))
        rules.append(same)
    return rules


def _stride(rule: StrideRule, shape: Sequence[int], before: Sequence[int], own: int) -> int:
    if rule is None:
        return own
    kind, number = rule
    return shape[number] * before[number] if kind == "of" else number
