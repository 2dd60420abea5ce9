"""What ops on one tensor do with its dimensions, written once for padding and for the rows of LoRA layers.

:func:`map_of` says by name, arguments and sizes which dimension lies where in a result, and along which dimensions an
entry is made of several. The padding analysis (:mod:`.padding_safety`) refuses to read padding along those. The
analysis of rows (:mod:`.lora_rows`) learns which dimensions still go from token to token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: Where entry i is along dimensions that are read: in result i (a softmax), nowhere (a sum), elsewhere (a roll).
After = Literal["kept", "gone", "moved"]


@dataclass(frozen=True)
class DimensionMap:
    """What an op does with the dimensions of its first tensor.

    Attributes:
        results: for each result and each of its dimensions the tensor's dimension that lies there, or None.
        reads: dimensions along which one entry is made of several, or of another one.
        verb: what the op does there, as in "it <verb> a dimension".
        neutral: the value that makes no difference there; None where every value does.
    """

    results: tuple[tuple[int | None, ...], ...]
    reads: frozenset[int] = frozenset()
    verb: str = ""
    neutral: float | None = None
    after: After = "kept"


Arguments = Mapping[str, Any]
Dimensions = Callable[[Arguments, int], Iterable[int]]


def _given(*names: str, default: Any = ()) -> Dimensions:
    """Dimensions that an argument names; all of them where it is empty or left out, unless ``default`` says which."""

    def dims(given: Arguments, rank: int) -> Iterable[int]:
        found = next((given[name] for name in names if given.get(name) is not None), default)
        return [found] if isinstance(found, int) else found or range(rank)

    return dims


def _last(count: int) -> Dimensions:
    return lambda given, rank: range(rank - count, rank)


def _padded(given: Arguments, rank: int) -> Iterable[int]:
    widths = given["pad"]
    return [rank - 1 - i // 2 for i, width in enumerate(widths) if not (isinstance(width, int) and width == 0)]


_READS: tuple[tuple[str, Dimensions, str, After], ...] = (
    ("sum mean amax amin prod any all argmax argmin logsumexp linalg_vector_norm norm std var max min var_mean "
     "std_mean median nanmedian nansum count_nonzero aminmax", _given("dim", "dims"), "reduces", "gone"),
    ("mode kthvalue", _given("dim", default=-1), "reduces", "gone"),
    ("topk", _given("dim", default=-1), "selects from", "gone"),
    ("sort argsort", _given("dim", default=-1), "works along", "gone"),
    ("_softmax _log_softmax softmax log_softmax _safe_softmax", _given("dim", default=-1), "works along", "kept"),
    ("native_layer_norm _fused_rms_norm rms_norm layer_norm",
     lambda given, rank: range(rank - len(given["normalized_shape"]), rank), "normalizes over", "kept"),
    ("native_group_norm", lambda given, rank: range(1, rank), "normalizes over", "kept"),
    ("_native_batch_norm_legit_no_training _batch_norm_no_update", lambda given, rank: [1], "looks up by", "kept"),
    ("renorm", lambda given, rank: {*range(rank)} - {given["dim"] % rank}, "takes the norm over", "kept"),
    ("flip roll rot90", _given("dims"), "moves the entries of", "moved"),
    ("split split_with_sizes chunk unbind unsafe_split unsafe_chunk tensor_split", _given("dim", default=0),
     "splits", "moved"),
    ("constant_pad_nd", _padded, "pads", "moved"),
    ("unfold", _given("dimension"), "takes windows of", "moved"),
    # Pooling and resampling: the last dimensions are one image.
    ("avg_pool1d upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d reflection_pad1d replication_pad1d",
     _last(1), "mixes the entries of", "moved"),
    ("max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
     "_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
     "reflection_pad2d replication_pad2d col2im", _last(2), "mixes the entries of", "moved"),
    # With channels that become places, or places channels.
    ("max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
     "_upsample_nearest_exact3d upsample_trilinear3d reflection_pad3d replication_pad3d pixel_shuffle pixel_unshuffle "
     "im2col", _last(3), "mixes the entries of", "moved"),
)  # fmt: skip
_BY_NAME = {name: entry[1:] for entry in _READS for name in entry[0].split()}
_MOVES = ("permute", "transpose", "t", "mT", "adjoint", "expand", "broadcast_to", "view_as_real", "view_as_complex")
#: Ops that :func:`map_of` knows.
MAPPED = (*_BY_NAME, *_MOVES)

_NEUTRAL: dict[str, float] = {
    "sum": 0, "nansum": 0, "any": 0, "count_nonzero": 0, "prod": 1, "all": 1, "amin": math.inf, "min": math.inf,
    "argmin": math.inf, **dict.fromkeys(
        ("amax", "max", "argmax", "logsumexp", "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"),
        -math.inf),
}  # fmt: skip


def map_of(name: str, given: Arguments, sizes: Sequence[Any], shapes: Sequence[Sequence[Any]]) -> DimensionMap:
    """What an op does with dimensions.

    Args:
        name: one of :data:`MAPPED`. given: the op's arguments by the names of its schema.
        sizes: of its first tensor. shapes: of its results; sizes in both are ints or sympy expressions.
    """
    rank = len(sizes)
    if name in _MOVES:
        return DimensionMap((_moved(name, given, sizes, shapes[0]),))
    dims, verb, after = _BY_NAME[name]
    reads = frozenset(dim % rank for dim in dims(given, rank)) if rank else frozenset()
    neutral = _NEUTRAL.get(name)
    if name in ("norm", "linalg_vector_norm"):
        order = given.get("ord", given.get("p", 2))
        neutral = 0 if isinstance(order, (int, float)) and order >= 0 else None
    results: list[tuple[int | None, ...]] = []
    for shape in shapes:
        if after != "kept" and len(shape) == rank - len(reads):
            results.append(tuple(i for i in range(rank) if i not in reads))
            continue
        stays = [i not in reads or (after == "kept" and not results) for i in range(min(rank, len(shape)))]
        # Statistics of a norm have fewer dimensions: those that they share come first.
        same = [i if stays[i] and (len(shape) >= rank or sizes[i] == shape[i]) else None for i in range(len(stays))]
        results.append((*same, *[None] * (len(shape) - len(same))))
    return DimensionMap(tuple(results), reads, verb, neutral, after)


def _moved(name: str, given: Arguments, sizes: Sequence[Any], shape: Sequence[Any]) -> tuple[int | None, ...]:
    rank = len(sizes)
    order: list[int | None] = list(range(rank))
    if name == "permute":
        return tuple(dim % rank for dim in given["dims"])
    if name == "view_as_real":
        return (*order, None)
    if name == "view_as_complex":
        return tuple(order[:-1])
    if name in ("expand", "broadcast_to"):
        kept = [i if size != 1 else None for i, size in enumerate(sizes)]
        return (*[None] * (len(shape) - rank), *kept)
    if rank > 1:
        first, second = (-2, -1) if name in ("mT", "adjoint") else (given.get("dim0", 0), given.get("dim1", 1))
        order[first], order[second] = order[second], order[first]
    return tuple(order)
