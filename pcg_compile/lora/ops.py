"""The LoRA ops: what a layer calls, and what the graph pass makes of it.

A layer calls ``pcg::lora``, which finds the routing of the running step. In a compiled graph the pass ``route_lora``
makes of it ``pcg::lora_apply``, which reads the routing from static memory inside the captured piece, and one
``pcg::prepare_lora`` a step that fills that memory for all layers. ``pcg::prepare_one_lora`` does so for layers whose
rows are not known to be the batch's tokens: it wants a batch of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ..step import current_step
from . import apply as apply  # defines pcg::lora_apply
from .packed import decode
from .routing import router_by_id

__all__ = ["bind_prepare_lora", "bind_prepare_one_lora", "lora", "route_form", "row_wise_form", "row_wise_form_of_many"]

_LIBRARY = torch.library.Library("pcg", "FRAGMENT")
_LIBRARY.define(
    "lora(Tensor(a!) y, Tensor x, Tensor factors, str layout) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_LIBRARY.define("prepare_lora(SymInt rows, int pool, int memory) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
_LIBRARY.define("prepare_one_lora(SymInt unused, int pool, int memory) -> ()", tags=(torch.Tag.cudagraph_unsafe,))


def lora(y: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, layout: str) -> None:
    """Adds each token's adapter to ``y``, as the batch of the running step says; outside a step all are the base's.

    Args:
        y: ``[..., out]``. x: ``[..., in]``, the same tokens.
        factors, layout: the layer's :class:`~pcg_compile.lora.packed.PackedFactors`, the layout encoded.

    Raises:
        BatchError: an unknown adapter, other tokens than the batch's.
    """
    rows = y.numel() // y.shape[-1]
    state = current_step()
    if state is not None and state.batch.adapters is not None:
        state.check_tokens(rows)
    routing = router_by_id(decode(layout).pool).routing(state, rows)
    if routing is not None:
        # Tokens in two dimensions, at the bucket's strides, are no rows: then a copy is worked on.
        flat = y.reshape(-1, y.shape[-1])
        torch.ops.pcg.lora_apply(flat, x.reshape(-1, x.shape[-1]), factors, *routing, layout)
        if flat.data_ptr() != y.data_ptr():
            y.copy_(flat.view(y.shape))


def bind_prepare_lora(
    rows: int, pool: int, memory: int, *, mode: Literal["request", "slice"] = "slice", ahead: bool = False
) -> Callable[[], None]:
    """``pcg::prepare_lora`` for a bucket of ``rows``: prepares whatever step runs when it is called."""
    place = router_by_id(pool).memory(memory)

    def prepare() -> None:
        place.prepare(current_step(), rows)

    return prepare


def bind_prepare_one_lora(unused: int, pool: int, memory: int) -> Callable[[], None]:
    """``pcg::prepare_one_lora``: prepares whatever step runs when it is called, for any number of rows."""
    place = router_by_id(pool).memory(memory)

    def prepare() -> None:
        place.prepare(current_step(), 0)

    return prepare


def row_wise_form(y: torch.Tensor, x: torch.Tensor, factors: torch.Tensor, *rest: Any) -> None:
    """What ``pcg::lora_apply`` does with rows, for the padding analysis: each reads its own row and one adapter.

    Which one, and what it holds, is nothing that rows have.
    """
    row_wise_form_of_many([y], x, [factors], *rest)


def row_wise_form_of_many(
    y: Sequence[torch.Tensor], x: torch.Tensor, factors: Sequence[torch.Tensor], *rest: Any
) -> None:
    """:func:`row_wise_form` of ``pcg::lora_apply_many``."""
    for one in y:
        one.add_(x @ x.new_zeros(x.shape[-1], one.shape[-1]))


def route_form(slots: torch.Tensor, adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``pcg::lora_route_rows`` is to the padding analysis: rows are added to by their own slot alone.

    The routing lists padding rows too, but ``pcg::lora_apply`` does to each row what it would without the others.
    """
    return slots + 0, slots.new_zeros(adapters + 1)


def _prepare(rows: int, pool: int, memory: int) -> None:
    bind_prepare_lora(rows, pool, memory)()


def _prepare_one(unused: int, pool: int, memory: int) -> None:
    bind_prepare_one_lora(unused, pool, memory)()


def _nothing(*args: Any) -> None:
    return None


for _name, _function in (("lora", lora), ("prepare_lora", _prepare), ("prepare_one_lora", _prepare_one)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcg::{_name}", _nothing, lib=_LIBRARY)
for _op in (torch.ops.pcg.prepare_lora.default, torch.ops.pcg.prepare_one_lora.default):
    torch.fx.node.has_side_effect(_op)
