"""The arithmetic of a ragged batch, on the host: lengths, positions, groups, adapters."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import BatchError, message

__all__ = [
    "MOST",
    "check_adapters",
    "check_count",
    "integers",
    "positions_of",
    "read_ids",
    "read_lengths",
    "spans_of",
]

#: Note [few calls]. With a few dozen requests each call of numpy costs as much as its work, 1 to 3 us on a server
#: among other code, and lies ahead of a step's first launch. Hence argmin() and argmax(), which cost a quarter of
#: min(), max() and any(); ufuncs that accumulate; and one look for several errors, told apart once there is one.
Ints = npt.NDArray[Any]

#: Of tokens and of pages: metadata are int32.
MOST = np.iinfo(np.int32).max


def read_lengths(name: str, values: Any) -> Ints:
    """``[requests]`` int64 from a sequence, an array or a CPU tensor of whole numbers of at least 1.

    Raises:
        BatchError: anything else, naming the request and the figure.
    """
    array = integers(name, values)
    if array.ndim != 1:
        raise BatchError(message(f"{name} has {array.ndim} dimensions", why="It is one number a request."))
    # A copy, as the caller may fill the same array for the next batch; what int64 does not hold becomes negative.
    lengths = array.astype(np.int64, copy=type(values) is not list)
    # Note [few calls]
    if len(lengths) and lengths[request := lengths.argmin()] < 1:
        raise BatchError(
            message(
                f"request {request} has {name}[{request}] = {array[request]}",
                why=f"A request of a batch has at least one token, and at most {MOST}.",
                cure="Leave requests without tokens out of the batch.",
            )
        )
    return lengths


def read_ids(values: Any, tokens: int) -> Ints:
    """``[tokens]`` token ids.

    Raises:
        BatchError: another number of them, or no whole numbers.
    """
    ids = integers("ids", values)
    if ids.shape != (tokens,):
        raise BatchError(message(f"ids has the shape {list(ids.shape)} for {tokens} tokens", why="It is one a token."))
    return ids


def check_count(name: str, value: Any) -> int:
    """``value`` as an int.

    Raises:
        BatchError: it is no whole number, or more than int32 holds.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise BatchError(message(f"{name} is {value!r}", why="It is a whole number.")) from None
    if number > MOST:
        raise BatchError(message(f"{name} is {number}", why=f"At most {MOST}: int32."))
    return number


def integers(name: str, values: Any) -> Ints:
    try:
        array = _packed(values) if type(values) is list else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            message(f"{name} is no list of whole numbers on the host", why=str(error).splitlines()[0])
        ) from None
    if array.size and array.dtype.kind not in "iu":
        raise BatchError(
            message(
                f"{name} holds {array.dtype} values",
                why="It holds whole numbers.",
                cure="Write: page_table=[[3, 4], [5]]" if name == "page_table" else f"Write: {name}=[1, 1, 57]",
            )
        )
    return array


def _packed(values: list[Any]) -> Ints:
    """A list as an array of int64: numpy looks at each number several times, which takes four times as long."""
    # Dynamo traces numpy, where a batch is made in a compiled function, but not this.
    if not values or type(values[0]) is not int or torch.compiler.is_compiling():
        return np.asarray(values)
    try:
        # A copy: Dynamo does not take arrays that lie in bytes.
        packed: Ints = np.frombuffer(struct.pack(f"{len(values)}q", *values), dtype=np.int64).copy()
        return packed
    except struct.error:
        return np.asarray(values)


def positions_of(qo: Ints, kv: Ints) -> Ints:
    """``[tokens]`` int64: the position of every token in its request."""
    ends = np.add.accumulate(qo)
    tokens = int(ends[-1]) if len(ends) else 0
    if tokens == len(qo):
        return kv - 1
    starts: Ints = (kv - ends).repeat(qo)
    return np.arange(tokens) + starts


def spans_of(groups: Any, qo: Ints, kv: Ints) -> Ints:
    """``[tokens, 2]`` int32: the first and the last position of each token's group, its own where it has none.

    Args:
        groups: a number for each token; neighbours of one request with the same one, from 0 on, are a group.

    Raises:
        BatchError: another number of entries than tokens; a group with other tokens in between.
    """
    numbers, positions = integers("groups", groups), positions_of(qo, kv)
    tokens = len(positions)
    if numbers.shape != (tokens,):
        raise BatchError(
            message(
                f"groups has the shape {list(numbers.shape)} for {tokens} tokens",
                why="It is one number a token: tokens of a request that see each other have the same, others -1.",
            )
        )
    owners = np.arange(len(qo)).repeat(qo)
    begins = np.ones(tokens, dtype=bool)
    begins[1:] = (numbers[1:] != numbers[:-1]) | (numbers[1:] < 0) | (owners[1:] != owners[:-1])
    firsts = np.flatnonzero(begins)
    heads = np.stack([owners[firsts], numbers[firsts]], 1)[numbers[firsts] >= 0]
    if len(np.unique(heads, axis=0)) != len(heads):
        named, counts = np.unique(heads, axis=0, return_counts=True)
        request, group = named[counts.argmax()]
        raise BatchError(
            message(
                f"group {group} of request {request} has other tokens in between",
                why="The tokens of a group follow each other.",
                cure="Give each block of tokens a number of its own.",
            )
        )
    lengths = np.diff(firsts, append=tokens)
    first = positions[firsts]
    return np.stack([first.repeat(lengths), (first + lengths - 1).repeat(lengths)], 1).astype(np.int32)


def check_adapters(
    adapters: Sequence[Any] | torch.Tensor | None, requests: int, tokens: int
) -> tuple[str | None, ...] | torch.Tensor | None:
    """One adapter name or None for each request, or a tensor of slots, one for each token.

    Raises:
        BatchError: another number of them, or something else than a name.
    """
    if adapters is None:
        return None
    if isinstance(adapters, torch.Tensor):
        if adapters.shape != (tokens,) or adapters.dtype not in (torch.int32, torch.int64):
            raise BatchError(
                f"adapters is a tensor {list(adapters.shape)} of {adapters.dtype}; slots are int32 or int64 "
                f"[{tokens}], one a token"
            )
        return adapters
    if not isinstance(adapters, Iterable):
        raise BatchError(message(f"adapters is {adapters!r}; it is one name a request", cure="Write: adapters=['fr']"))
    if isinstance(adapters, str):
        raise BatchError(
            message(f"adapters is {adapters!r}; it is one name a request", cure=f"Write: adapters=[{adapters!r}]")
        )
    result = tuple(adapters)
    if len(result) != requests:
        raise BatchError(f"adapters has {len(result)} entries for {requests} requests")
    for request, name in enumerate(result):
        if name is not None and not isinstance(name, str):
            raise BatchError(f"request {request} has the adapter {name!r}, which is no name (None: the base model)")
    return result
