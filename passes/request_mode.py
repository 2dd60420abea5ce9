"""Whether a padding request covers all that an op is given: proven from sizes, or the op gets the real rows.

A padding request is one more entry in the metadata, and its rows behind the real ones in every tensor of tokens. An op
that is given anything else of a size that changes, such as a scale for each request or a feature dimension that is
dynamic too, would see the padding there without a request that covers it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from pcg_compile.fx.facts import storage_of
from pcg_compile.fx.request_conditions import Request
from pcg_compile.fx.sizes import SymType, expr_of, symbols_of
from pcg_compile.split_ops import SplitOp

from .context import PassContext

#: Types of page tables, lengths and flags.
_INDEX_LIKE = (torch.int32, torch.int64, torch.bool)


class Unproven(Exception):
    """Why an op cannot be padded by a request."""


def prove_request(
    node: fx.Node, op: SplitOp, arguments: dict[str, Any], context: PassContext
) -> tuple[fx.Node, Request]:
    """The node of the number of tokens, and what is left to check of each step's sizes and values.

    Raises:
        Unproven: something that the op is given, or gives, may not be covered.
    """
    roles = {role: arguments.get(name) for role, name in op.metadata.items()}
    others = {name: value for name, value in arguments.items() if name not in op.metadata.values()}
    requests = _metadata(roles, context)
    tokens, apart = _token_size(node, op, roles, others, context)
    fixed = [*_rest(others, tokens, requests, context), *(size for tensor in apart for size in tensor.shape)]
    numbers = (n for n, f in context.facts.items() if n.op == "placeholder" and isinstance(f.value, torch.SymInt))
    source = next((n for n in numbers if expr_of(context.facts[n].value) == tokens), None)
    if source is None:
        raise Unproven("only the data tell how many tokens it has")
    return source, _left_to_check(op, roles, tokens, fixed, context)


def _tensors(value: Any, context: PassContext) -> Iterator[torch.Tensor]:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    yield from (v for v in (context.facts[n].value for n in nodes) if isinstance(v, torch.Tensor))


def _dynamic(tensor: torch.Tensor) -> list[tuple[int, Any]]:
    return [(dim, expr_of(size)) for dim, size in enumerate(tensor.shape) if symbols_of(size)]


def _metadata(roles: dict[str, Any], context: PassContext) -> Any:
    """The size of ``qo_indptr``; all metadata have one entry a request, page or token along dimension 0 alone."""
    for role, source in roles.items():
        for tensor in _tensors(source, context):
            inner = tensor.shape[1:]
            if tensor.dim() == 0 or (inner and role != "slot_mapping") or any(symbols_of(size) for size in inner):
                raise Unproven(f"its {role} is a tensor of {tensor.dim()} dimensions")
    indptr = next(_tensors(roles["qo_indptr"], context), None)
    if indptr is None:
        raise Unproven("its qo_indptr is not given")
    return indptr.shape[0]


def _token_size(
    node: fx.Node, op: SplitOp, roles: dict[str, Any], others: dict[str, Any], context: PassContext
) -> tuple[sympy.Symbol, list[torch.Tensor]]:
    """The one dynamic size of the tensors without a role, and tensors that look like caches of other sizes."""
    given = [(name, tensor) for name, value in others.items() for tensor in _tensors(value, context)]
    results = list(_results(node, context))
    tokens = _one_size([*(t for _, t in given), *results])
    if tokens is None and op.paged:
        tokens = _one_size(results) or _one_size(list(_tensors(roles.get("slot_mapping"), context)))
    if tokens is None:
        raise Unproven("its tensors without a role do not have one dynamic size")
    for result in results:
        if [size for _, size in _dynamic(result)] != [tokens]:
            raise Unproven("a result does not have one row a token")
    written, seen = context.facts[node].writes, False
    apart: list[torch.Tensor] = []
    for name, tensor in given:
        sizes = {size for _, size in _dynamic(tensor)}
        if tokens in set().union(*(size.free_symbols for size in sizes)):
            (dim, size), *more = _dynamic(tensor)
            if more or size != tokens:
                raise Unproven(f"its argument {name} has other dynamic sizes than that of its tokens")
            if dim and storage_of(tensor) not in written:
                raise Unproven(f"dimension {dim} of its argument {name} is the dynamic one")
            seen = True
        elif sizes and not (op.paged and tensor.dim() > 2 and tensor.dtype not in _INDEX_LIKE):
            raise Unproven(f"its argument {name} has a dynamic size of its own, and no role")
        elif sizes:
            apart.append(tensor)
    if not seen:
        raise Unproven("its tokens have no dynamic size")
    return tokens, apart


def _one_size(tensors: list[torch.Tensor]) -> sympy.Symbol | None:
    """The dynamic size of some tensors, where they have one and the same."""
    sizes = {size for tensor in tensors for _, size in _dynamic(tensor)}
    found = next(iter(sizes)) if len(sizes) == 1 else None
    return found if isinstance(found, sympy.Symbol) else None


def _results(node: fx.Node, context: PassContext) -> Iterator[torch.Tensor]:
    """The results that somebody uses: of an attention op, not the state of its random numbers."""
    value = context.facts[node].value
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        taken = {u.args[1] for u in node.users if u.target is operator.getitem and u.users}
        whole = any(u.target is not operator.getitem for u in node.users)
        yield from (v for i, v in enumerate(value) if isinstance(v, torch.Tensor) and (whole or i in taken))
    elif isinstance(value, SymType):
        raise Unproven("it gives a number")


def _rest(others: dict[str, Any], tokens: sympy.Symbol, indptr: Any, context: PassContext) -> list[Any]:
    """Sizes of tensors of a fixed size, which may have an entry a request after all; numbers are checked here."""
    fixed: list[Any] = []
    count = indptr - 1 if isinstance(indptr, int) else None
    for name, value in others.items():
        nodes: list[fx.Node] = []
        map_arg(value, nodes.append)
        numbers = [context.facts[n].value for n in nodes] or [value]
        for number in numbers:
            if isinstance(number, SymType) and not symbols_of(number) <= {tokens}:
                raise Unproven(f"its argument {name} is a number that a padding request may change")
            if type(number) is int and number == count:
                raise Unproven(f"its argument {name} may be the number of requests")
        for tensor in _tensors(value, context):
            if _dynamic(tensor) or tensor.dim() == 0:
                continue
            if tensor.dtype in _INDEX_LIKE:
                raise Unproven(f"its argument {name} has no role, and may have an entry for each request")
            fixed += tensor.shape
    if count is not None and {count, count + 1} & set(fixed):
        raise Unproven("an argument without a role may have an entry for each request")
    return fixed


def _left_to_check(op: SplitOp, roles: dict[str, Any], tokens: Any, fixed: list[Any], context: PassContext) -> Request:
    def size(role: str) -> Any:
        tensor = next(_tensors(roles.get(role), context), None)
        return None if tensor is None else expr_of(tensor.shape[0])

    entries = size("qo_indptr")
    lengths = [(size("slot_mapping"), tokens), (size("kv_indptr"), entries)]
    last = size("last_page_len")
    if last is not None:
        lengths.append((last, entries - 1))
    ends = [(roles["qo_indptr"], tokens)]
    if roles.get("kv_indptr") is not None:
        # Without pages, keys have the tokens' size.
        keys = size("kv_indices") if op.paged else tokens
        if keys is not None:
            ends.append((roles["kv_indptr"], keys))
    return Request(
        tokens,
        entries,
        tuple((one, other) for one, other in lengths if one is not None),
        tuple((source, end) for source, end in ends if isinstance(source, fx.Node) and source.op == "placeholder"),
        tuple(dict.fromkeys(expr_of(size) for size in fixed)),
    )
