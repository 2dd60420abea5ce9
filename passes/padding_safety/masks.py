"""What is known of padding: the values that masks leave there, and whether it is finite.

A mask that is padded with zeros makes whatever it is multiplied with zero there, and so sums over it right: a zero
adds nothing. ``0 * x`` is zero where x is finite. Padding that repeats row 0 is finite where row 0 is, and where that
is not, nor is the sum of eager. Values that differ from all that real rows hold (an index that counts on, the zeros of
a mask) stay finite through most ops, not through a division.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from pcg_compile.fx.facts import storage_of
from pcg_compile.fx.node_facts import tensors_in
from pcg_compile.fx.plan import Plan
from pcg_compile.fx.sizes import is_scalar, symbols_of

from .dims import Dims, is_dynamic
from .rules import OTHER, REPEATED, WILD, Call, Known, Tracked, packet_of

__all__ = ["OTHER", "WILD", "finiteness", "known_after", "mask_inputs"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _names(
    "view _unsafe_view reshape _reshape_alias unsqueeze squeeze permute transpose t expand detach alias clone "
    "lift_fresh contiguous slice select unflatten flatten"
)
_PRODUCTS = _names("mul logical_and bitwise_and")
_COMPARISONS = _names("eq ne gt ge lt le logical_not logical_and logical_or bitwise_not bitwise_and bitwise_or")
_SELECTIONS = _names("where masked_fill index_put")
_CONTRACTIONS = _names("mm bmm baddbmm addmm matmul mv dot")
_SOFTMAXES = _names("_softmax softmax _safe_softmax")
_LOG_SOFTMAXES = _names("_log_softmax log_softmax")
#: Ops whose results are finite where what they read is. An overflow of padding alone is left out of account: its values
#: are sums and products of what real rows hold as well.
_FINITE = (
    _VIEWS
    | _COMPARISONS
    | _SELECTIONS
    | _CONTRACTIONS
    | _SOFTMAXES
    | _LOG_SOFTMAXES
    | _names(
        "mul add sub rsub neg abs sign linear native_layer_norm layer_norm rms_norm _fused_rms_norm "
        "native_group_norm _native_batch_norm_legit_no_training gelu relu silu tanh sigmoid hardtanh hardswish "
        "hardsigmoid elu leaky_relu softplus mish sin cos erf clamp clamp_min clamp_max maximum minimum relu6 "
        "threshold floor ceil round trunc embedding index _unsafe_index index_select gather cat stack repeat split "
        "split_with_sizes chunk unbind copy _to_copy sum mean amax amin max min argmax argmin topk sort argsort any "
        "all cumsum arange full zeros ones empty full_like zeros_like ones_like empty_like new_full new_zeros "
        "new_ones new_empty scalar_tensor fill constant_pad_nd tril triu isin bucketize searchsorted convolution "
        "pixel_shuffle slice_scatter select_scatter logsumexp glu prelu square"
    )
)


def finiteness(packet: str, call: Call, starts: bool) -> int:
    """Of an op's result; ``starts``: its padding counts on."""
    level = max((t.finiteness for t in call.tensors()), default=REPEATED)
    if starts:
        level = max(level, OTHER)
    if packet in _SOFTMAXES and call.zeroed:
        return OTHER
    if level == OTHER and packet not in _FINITE:
        return WILD
    numbers = [*call.arguments.values(), *(t.uniform for t in call.tensors())]
    if level == OTHER and any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        # What a mask fills with infinity is infinite in the padding alone.
        return WILD
    return level


def known_after(packet: str, node: fx.Node, call: Call, dims: Dims) -> frozenset[Known]:
    """What is known of the padding of an op's one result."""
    found = set(_known(packet, node, call, dims))
    carried = [f for dim in dims for f in dim if is_dynamic(f)]
    # Of a size that two dimensions carry, it is not known along which.
    return frozenset(
        k for k in found if carried.count(k.symbol) == 1 and sum(_mentions(f, k.symbol) for f in carried) == 1
    )


def _mentions(factor: Any, symbol: sympy.Symbol) -> bool:
    return not isinstance(factor, sympy.Basic) or symbol in factor.free_symbols


def _known(packet: str, node: fx.Node, call: Call, dims: Dims) -> Iterator[Known]:
    tensors = call.tensors()
    if packet in _VIEWS:
        yield from tensors[0].known
    elif packet in _PRODUCTS:
        for i, one in enumerate(tensors):
            if all(other.finiteness < WILD for j, other in enumerate(tensors) if j != i):
                yield from (k for k in _aligned(one, dims) if k.value == 0)
    elif packet in _SELECTIONS:
        yield from _selected(packet, call, dims)
    elif packet in _SOFTMAXES | _LOG_SOFTMAXES:
        for k in tensors[0].known:
            if k.value == -math.inf and (k.source, k.along) in call.zeroed:
                yield k if packet in _LOG_SOFTMAXES else Known(k.symbol, 0, k.source, k.along)
    elif len(tensors) == 1 and (packet == "_to_copy" or torch.Tag.pointwise in getattr(node.target, "tags", ())):
        for k in tensors[0].known:
            value = _computed(node, k.value)
            if value is not None and not math.isnan(value):
                yield Known(k.symbol, value, k.source, k.along)


def _selected(packet: str, call: Call, dims: Dims) -> Iterator[Known]:
    """Where a condition is known in the padding, so is what it selects, if that is one value."""
    if packet == "where":
        condition, chosen = call.arguments["condition"], {1: call.arguments["self"], 0: call.arguments["other"]}
    elif packet == "masked_fill":
        condition, chosen = call.arguments["mask"], {1: call.arguments["value"]}
    else:
        conditions = [t for t in call.arguments.get("indices", ()) if hasattr(t, "known")]
        if len(conditions) != 1 or not conditions[0].is_mask or call.arguments.get("accumulate"):
            return
        condition, chosen = conditions[0], {1: call.arguments["values"]}
        if len(condition.dims) != len(dims):
            return
    for k in _aligned(condition, dims):
        value = chosen.get(int(k.value))
        value = getattr(value, "uniform", value)
        if isinstance(value, (int, float)) and not math.isnan(value):
            yield Known(k.symbol, value, k.source, k.along)


def _aligned(tensor: Tracked, dims: Dims) -> Iterator[Known]:
    """What is known of an operand, in the sizes of the result: equal sizes may have several names."""
    for k in tensor.known:
        for i, dim in enumerate(reversed(tensor.dims)):
            one, other = ([f for f in d if f != 1] for d in (dim, dims[len(dims) - 1 - i]))
            if one == [k.symbol] and len(other) == 1 and isinstance(other[0], sympy.Symbol):
                yield Known(other[0], k.value, k.source, k.along)
            elif k.symbol in one and one == other:
                yield k


def _computed(node: fx.Node, value: float) -> float | None:
    """What an elementwise op makes of one value."""
    numbers = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.Tensor)]
    if numbers:
        return None
    (given,) = (n for n in node.all_input_nodes)
    scalar = torch.tensor(value, dtype=given.meta["val"].dtype, device="cpu")
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory", "memory_format")}
    try:
        return float(node.target(*map_arg(node.args, lambda n: scalar), **kwargs))  # type: ignore[operator]
    except (RuntimeError, TypeError, NotImplementedError):
        # No kernel for such a value on the host.
        return None


#: What may read a mask: other shapes and types of it, and uses that a zero cannot make worse than a real value.
_SHAPES = _VIEWS | _names("_to_copy index gather index_select _unsafe_index")
_MASKS = _PRODUCTS | _COMPARISONS | _SELECTIONS | _CONTRACTIONS
_MASK_READERS = _MASKS | _names(
    "sum any all rsub sub add clamp clamp_min amax max softmax scalar_tensor full zeros_like ones_like"
)
_LOOKUPS = _names(
    "embedding index _unsafe_index index_select gather take scatter scatter_add scatter_reduce index_put "
    "index_copy index_add index_fill put _unsafe_index_put _unsafe_masked_index embedding_bag _embedding_bag"
)


def mask_inputs(plan: Plan) -> dict[fx.Node, str]:
    """The inputs that only mask, with their names: padded with zeros where that proves a sum."""
    found = {}
    for spec in plan.inputs:
        value = spec.value
        if spec.kind != "user" or not isinstance(value, torch.Tensor) or spec.pad_value is not None:
            continue
        shaped = value.dtype is torch.bool or all(isinstance(n, torch.SymInt) or n == 1 for n in value.shape)
        if not shaped or not symbols_of(value) or value.is_complex() or spec.node in plan.mutated:
            continue
        if _only_masks(plan, spec.node):
            found[spec.node] = spec.node.name
    return found


def _only_masks(plan: Plan, mask: fx.Node) -> bool:
    """Whether all that reads it, or what is made of it, is content with zeros; and something masks with it."""
    cuts = {getattr(item, "node", None) for item in plan.items}
    same, made = {mask}, {mask}
    masks = False
    for node in plan.gm.graph.nodes:
        fact = plan.facts.get(node)
        reads = [n for n in node.all_input_nodes if n in made]
        if not reads or fact is None or node.op == "output":
            continue
        if node in cuts:
            # It is given real rows, and what it gives is padded by its own row 0.
            masks = True
            continue
        if is_scalar(fact.value):
            continue
        packets = {packet_of(call.op) for call in fact.ops} - {"device"}
        written = {storage_of(t) for n in same for t in tensors_in(plan.value(n))} & fact.writes
        indexed = reads if "embedding" in packets else [n for n in reads if not node.args or n is not node.args[0]]
        numbers = any(t.dtype is not torch.bool for n in indexed for t in tensors_in(plan.value(n)))
        if written or (packets & _LOOKUPS and numbers):
            return False
        if any(n in same for n in reads):
            if packets <= _SHAPES:
                same.add(node)
            elif packets <= _SHAPES | _MASK_READERS:
                masks = masks or bool(packets & _MASKS)
            else:
                return False
        made.add(node)
    return masks
