"""Pads the metadata that a split op declares among its arguments by one padding request.

For pad = bucket - n > 0, ``qo_indptr`` and ``kv_indptr`` grow by one entry, so the op can run on bucket-sized
tensors: the padding tokens form a request of their own, which no real one sees. Each distinct source is padded once,
for all layers. Slots of padding tokens lie in the scratch page, and declared maxima are raised to the tokens of the
bucket, since the padding request may be the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad as pad_tensor

from pcg_compile.errors import BatchError, OptionsError, message
from pcg_compile.fx.splitting import op_names
from pcg_compile.split_ops import SplitOp, add_split_op, registered_split_ops

from .context import PassContext
from .request_mode import Unproven, prove_request

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")

# Each returns new memory even without padding: the memory of a source that a piece computed is reused once its last
# reader has run.


def pad_indptr(indptr: torch.Tensor, bucket: int, tokens: int, page_size: int) -> torch.Tensor:
    """``[requests + 1]`` -> ``[requests + 2]``: one more request, of ``bucket - tokens`` tokens in whole pages."""
    pad = bucket - tokens
    return indptr.clone() if pad == 0 else torch.cat([indptr, indptr[-1:] + -(-pad // page_size)])


def pad_indices(indices: torch.Tensor, bucket: int, tokens: int, page_size: int, scratch_page: int) -> torch.Tensor:
    """``[pages]`` (exactly ``kv_indptr[-1]`` of them) and the scratch page once for each page of padding."""
    return pad_tensor(indices, (0, -(-(bucket - tokens) // page_size)), value=scratch_page)


def pad_last_page_len(last_page_len: torch.Tensor, bucket: int, tokens: int, page_size: int) -> torch.Tensor:
    """``[requests]`` -> ``[requests + 1]``."""
    pad = bucket - tokens
    return last_page_len.clone() if pad == 0 else pad_tensor(last_page_len, (0, 1), value=(pad - 1) % page_size + 1)


def pad_slots(slots: torch.Tensor, bucket: int, tokens: int, page_size: int, scratch_page: int) -> torch.Tensor:
    """``[tokens, ...]`` -> ``[bucket, ...]``: the padding tokens go to the first slot of the scratch page."""
    shape = (bucket - tokens, *slots.shape[1:])
    return torch.cat([slots, slots.new_full(shape, scratch_page * page_size)])


def pad_tokens(indptr: torch.Tensor, bucket: int, tokens: int, page_size: int) -> torch.Tensor:
    """:func:`pad_indptr` of a cumulative sum of tokens.

    Raises:
        BatchError: it does not end at the number of tokens, so padding would belong to a real request.
    """
    if bucket != tokens and indptr.device.type == "cpu" and int(indptr[-1]) != tokens:
        raise BatchError(
            message(
                f"a split op has {tokens} rows, and a cumulative sum of them that it gets ends at {int(indptr[-1])}",
                why="The padding request begins behind the last row of the last request.",
                cure='For an op that takes more rows than its requests have, write: options={"padding": "slice"}',
            )
        )
    return pad_indptr(indptr, bucket, tokens, page_size)


#: By role, what pads it.
_PADDERS: dict[str, Callable[..., torch.Tensor]] = {
    "qo_indptr": pad_tokens,
    "kv_indptr": pad_indptr,
    "kv_indices": pad_indices,
    "last_page_len": pad_last_page_len,
    "slot_mapping": pad_slots,
}
#: Padders that are told the scratch page.
_SCRATCH = ("pad_indices", "pad_slots")
_MAXIMA = ("max_qo_len", "max_kv_len")


def _like_unpadded(source: torch.Tensor, *args: Any) -> torch.Tensor:
    """The trace sees no padding; nothing but the split op reads the result."""
    return torch.empty_like(source)


for _function in _PADDERS.values():
    _name = _function.__name__
    _extra = ", int scratch_page" if _name in _SCRATCH else ""
    _LIBRARY.define(f"{_name}(Tensor source, SymInt bucket, SymInt tokens, int page_size{_extra}) -> Tensor")
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", _like_unpadded, lib=_LIBRARY)
    add_split_op(SplitOp(f"pcg::{_name}", any_strides=True, function=_function, bucket_args=(1,), late=True))


def pad_metadata(gm: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """Inserts the padding nodes ahead of the first reader, and points each split op at them.

    A split op that is padded by a request has what is left to check of each step in ``node.meta["pcg_request"]``.

    Raises:
        OptionsError: ``padding="request"`` for an op that declares pages but no scratch page.
    """
    padded: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in list(gm.graph.nodes):
        op = _declared(node, context)
        if op is None:
            continue
        arguments = _arguments(node, context)
        try:
            _check_options(op, arguments, context)
            tokens, request = prove_request(node, op, arguments, context)
        except Unproven as reason:
            context.notes.append(f"{op.name}: real rows only ({reason})")
            continue
        node.meta["pcg_request"] = request
        for role, argument in op.metadata.items():
            source = arguments.get(argument)
            if role in _MAXIMA:
                # Not a node of the graph: an op that takes plain ints would specialize it, and the token count with it.
                if source is not None:
                    node.meta.setdefault("pcg_maxima", (tokens, []))[1].append(_place(node, argument, source))
                continue
            if role == "slot_mapping" and isinstance(source, fx.Node) and source.op == "placeholder":
                # A piece may read it too.
                source.meta["pcg_pad_value"] = (op.scratch_page or 0) * op.page_size
            if role not in _PADDERS or not isinstance(source, fx.Node):
                continue
            # Without pages, keys have the tokens' size.
            padder = _PADDERS["qo_indptr" if role == "kv_indptr" and not op.paged else role].__name__
            if (source, role) not in padded:
                page_size = 1 if role == "qo_indptr" else op.page_size
                extra = (op.scratch_page or 0,) if padder in _SCRATCH else ()
                place = source if source.op != "placeholder" else gm.graph.find_nodes(op="placeholder")[-1]
                with gm.graph.inserting_after(_later(gm, place, tokens)):
                    new = gm.graph.call_function(
                        getattr(torch.ops.pcg, padder).default, (source, tokens, tokens, page_size, *extra)
                    )
                new.stack_trace = node.stack_trace
                padded[source, role] = new
                context.notes.append(f"{new.name} = pcg::{padder}({source.name}), read by every {op.name}")
            _replace(node, argument, source, padded[source, role])
    if padded:
        gm.graph.lint()
        gm.recompile()
    return gm


def _declared(node: fx.Node, context: PassContext) -> SplitOp | None:
    if node.op not in ("call_function", "call_method") or node not in context.facts:
        return None
    registry = registered_split_ops()
    for name in sorted(op_names(node, context.facts[node]) & registry.keys(), reverse=True):
        if "qo_indptr" in registry[name].metadata:
            return registry[name]
    return None


def _arguments(node: fx.Node, context: PassContext) -> dict[str, Any]:
    """The node's arguments by the names of the op's schema."""
    schemas = (_schema(node), *(getattr(call.op, "_schema", None) for call in context.facts[node].ops))
    schema = next((s for s in schemas if s is not None), None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) or getattr(getattr(node.target, "default", None), "_schema", None)


def _check_options(op: SplitOp, arguments: dict[str, Any], context: PassContext) -> None:
    if context.options.padding == "slice":
        raise Unproven('padding="slice"')
    if op.paged and op.scratch_page is None:
        if context.options.padding == "request":
            raise OptionsError(
                message(
                    f'padding="request" needs a scratch page for {op.name}',
                    why="Page 0 of somebody's cache is somebody's: the padding request would write into it.",
                    cure=f'Write: pcg.register_split_op("{op.name}", ..., scratch_page=0), a page you never give out',
                )
            )
        raise Unproven("it declares no scratch page")
    given = [name for name in op.needs_none if arguments.get(name) is not None]
    if given:
        raise Unproven(f"its argument {given[0]} is given")


def _later(gm: fx.GraphModule, first: fx.Node, second: Any) -> fx.Node:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return max((first, second), key=lambda n: order[n]) if isinstance(second, fx.Node) else first


def _place(node: fx.Node, name: str, value: Any) -> str | int:
    """Where a node holds an argument: the name of a keyword, or a position."""
    if name in node.kwargs:
        return name
    schema = _schema(node)
    positions = [a.name for a in schema.arguments] if schema is not None else []
    return positions.index(name) if name in positions else list(node.args).index(value)


def _replace(node: fx.Node, name: str, old: fx.Node, new: fx.Node) -> None:
    """Replaces one argument only: the same tensor may be read for another purpose as well."""
    place = _place(node, name, old)
    if isinstance(place, str):
        node.kwargs = {**node.kwargs, place: new}
    else:
        node.args = (*node.args[:place], new, *node.args[place + 1 :])
