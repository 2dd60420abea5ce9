"""Real rows, padding rows, and copies that look exactly as eager's tensors would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch

from ..fx.sizes import SymType, shape_at, strides_at
from .buffers import extent

__all__ = ["assign", "copier", "expanded_dims", "has_layout", "looks_like", "real_rows", "tails", "unexpanded"]

Sizes = Mapping[sympy.Symbol, int]
#: Of the largest element.
_ALIGNMENT = 16


def real_rows(static: torch.Tensor, fake: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The view of a bucket-sized tensor that holds the real rows, along every dynamic dimension.

    Dimensions of size 1, whose strides nothing follows, have eager's: Dynamo looks at them in the graph behind.
    """
    shape = shape_at(fake, sizes)
    view = static
    with torch.inference_mode(False), torch.no_grad():
        for dim, size in enumerate(shape):
            if view.shape[dim] != size:
                view = view.narrow(dim, 0, size)
        if 1 in shape or 0 in shape:
            both = zip(shape, view.stride(), strides_at(fake, sizes), strict=True)
            strides = tuple([eager if size <= 1 else own for size, own, eager in both])
            if strides != view.stride():
                view = view.as_strided(shape, strides, view.storage_offset())
    return view


def tails(
    static: torch.Tensor, fake: torch.Tensor, sizes: Sizes, dims: Collection[int] | None = None
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """The padding of a bucket-sized tensor along all its dimensions, or along ``dims``, where it has memory of its own.

    Returns:
        (dimension, padding, the tensor that the padding is behind the real rows of) in order. The padding along one
        dimension is that of the real rows along those before, so whoever copies rows goes from the last to the first.
    """
    result: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    rest = static
    with torch.inference_mode(False), torch.no_grad():
        for dim, size in enumerate(shape_at(fake, sizes)):
            if rest.shape[dim] != size and (dims is None or dim in dims):
                if rest.stride(dim):
                    result.append((dim, rest.narrow(dim, size, rest.shape[dim] - size), rest))
                rest = rest.narrow(dim, 0, size)
    return result


def looks_like(tensor: torch.Tensor, fake: torch.Tensor, sizes: Sizes) -> bool:
    """Whether a tensor has the shape and the strides that eager's would have at ``sizes``."""
    return has_layout(tensor, shape_at(fake, sizes), strides_at(fake, sizes))


def has_layout(tensor: torch.Tensor, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether shape and strides are these, where strides matter."""
    if tensor.shape != shape:
        return False
    own = tensor.stride()
    return own == strides or all(s <= 1 or a == b for s, a, b in zip(shape, own, strides, strict=True))


def copier(views: Sequence[tuple[torch.Tensor, torch.Tensor]], sizes: Sizes) -> Callable[[], list[torch.Tensor]]:
    """A function that copies results out of static memory.

    ``views`` are (view of the real rows, fake value) of results that share one storage in eager, so the
    copies share one as well; each has eager's shape and strides.
    """
    if len(views) == 1:
        view, fake = views[0]
        shape, strides = shape_at(fake, sizes), strides_at(fake, sizes)
        if _clone_keeps(view, strides):
            return lambda: [view.clone()]
        # Of an expanded result, entries share memory in eager too.
        return lambda: [assign(torch.empty_strided(shape, strides, dtype=view.dtype, device=view.device), view)]

    # In bytes: a view may be of another dtype.
    layouts = [(shape_at(f, sizes), strides_at(f, sizes), _offset(f, sizes) * f.itemsize) for _, f in views]
    first = min(offset for _, _, offset in layouts) // _ALIGNMENT * _ALIGNMENT
    ends = [
        offset + extent(shape, strides) * fake.itemsize
        for (shape, strides, offset), (_, fake) in zip(layouts, views, strict=True)
    ]
    total = -(-(max(ends) - first) // _ALIGNMENT) * _ALIGNMENT

    def copy_group() -> list[torch.Tensor]:
        base = torch.empty(total, dtype=torch.uint8, device=views[0][0].device)
        results = []
        for (view, _), (shape, strides, offset) in zip(views, layouts, strict=True):
            place = base.view(view.dtype).as_strided(shape, strides, (offset - first) // view.itemsize)
            results.append(assign(place, view))
        return results

    return copy_group


def _offset(fake: torch.Tensor, sizes: Sizes) -> int:
    offset: Any = fake.storage_offset()
    if isinstance(offset, SymType):
        offset = offset.node.expr.xreplace({s: sympy.Integer(n) for s, n in sizes.items()})
    return int(offset)


def _clone_keeps(view: torch.Tensor, strides: Sequence[int]) -> bool:
    probe = torch.empty_strided(tuple(view.shape), view.stride(), dtype=view.dtype, device="meta")
    return probe.clone().stride() == tuple(strides)


def assign(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``target.copy_(source)``, where the target's entries may share memory because it is expanded."""
    dims = expanded_dims(target)
    unexpanded(target, dims).copy_(unexpanded(source, dims))
    return target


def expanded_dims(tensor: torch.Tensor) -> list[int]:
    """The dimensions along which all entries lie in one place."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return [dim for dim, (size, stride) in enumerate(sizes) if size > 1 and stride == 0]


def unexpanded(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The first entries along ``dims``."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor
