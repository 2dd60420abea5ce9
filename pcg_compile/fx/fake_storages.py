"""Which memory a fake tensor stands for.

Note [look-alikes]. Making a fake tensor with symbolic sizes takes a millisecond or two, nearly all of it arithmetic on
its sizes. A *look-alike* takes the sizes of another one, and so its storage. The memory that it stands for is written
down beside it: :func:`storage_of` reads it, torch does not. Call :func:`told_apart` or :func:`note_memory` before
look-alikes reach torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..torch_compat.fake_tensors import FakeTensor, empty_fake, fake_like, holds_data, without_transforms

_NOTE = "_pcg_storage"


class Storage:
    """The memory of some tensors: that of ``owner``, or one of its own.

    It is kept alive by the tensors in it, so its identity is nobody else's meanwhile.
    """

    def __init__(self, owner: torch.Tensor | None = None) -> None:
        self.owner = owner
        self.identity = id(self) if owner is None else _apparent(owner)


def storage_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage; two tensors alias when it is the same."""
    noted = getattr(tensor, _NOTE, None)
    return _apparent(tensor) if noted is None else noted.identity


def storage_behind(tensor: torch.Tensor) -> Storage:
    """The memory that a tensor lies in, to put others there."""
    noted: Storage | None = getattr(tensor, _NOTE, None)
    return noted if noted is not None else Storage(tensor)


def look_alike_of(tensor: FakeTensor, storage: Storage) -> torch.Tensor:
    """A fake tensor like another one, in other memory."""
    look_alike = fake_like(tensor)
    setattr(look_alike, _NOTE, storage)
    return look_alike


def note_memory(inputs: Iterable[torch.Tensor], made: Callable[[], Iterable[torch.Tensor]]) -> bool:
    """Notes the memory of the tensors that torch made of ``inputs``, look-alikes among them.

    False where it is unknown: a tensor lies in a storage that stands for the memory of several inputs.
    """
    known = {id(tensor): tensor for tensor in inputs}
    if not any(hasattr(tensor, _NOTE) for tensor in known.values()):
        return True
    behind: dict[int, Storage | None] = {}
    for tensor in known.values():
        one = storage_behind(tensor)
        other = behind.setdefault(_apparent(tensor), one)
        if other is not None and other.identity != one.identity:
            behind[_apparent(tensor)] = None
    told = True
    for tensor in made():
        apparent = _apparent(tensor)
        if id(tensor) in known or hasattr(tensor, _NOTE) or apparent not in behind:
            continue
        storage = behind[apparent]
        if storage is None:
            told = False
        else:
            setattr(tensor, _NOTE, storage)
    return told


def told_apart(values: Sequence[Any]) -> list[Any]:
    """The same values, look-alikes replaced by tensors that share memory where what they stand for does."""
    if not any(hasattr(value, _NOTE) for value in values):
        return list(values)
    plain = [value for value in values if isinstance(value, torch.Tensor)]
    memory: dict[int, torch.Tensor] = {storage_of(t): t for t in plain if not hasattr(t, _NOTE)}
    shared = [storage_of(t) for t in plain]
    made: list[Any] = []
    for value in values:
        if not hasattr(value, _NOTE):
            made.append(value)
        elif storage_of(value) not in memory and shared.count(storage_of(value)) == 1:
            made.append(empty_fake(value))
        else:
            base = memory.get(storage_of(value))
            if base is None:
                base = memory[storage_of(value)] = empty_fake(value, whole=True)
            made.append(empty_fake(value, inside=base))
    return made


def in_own_memory(inputs: Sequence[Any]) -> list[Any]:
    """A graph's fake inputs, each in memory of its own.

    Which inputs share memory is a fact of one call, not of the graph: the runtime compares their addresses at each step
    (``runtime/memory.py``). Facts hold where no written input overlaps another one.
    """
    seen: set[int] = set()
    apart: list[Any] = []
    for value in told_apart(inputs):
        if type(value) is FakeTensor and value.layout == torch.strided:
            storage = storage_of(value)
            if storage in seen and not (holds_data(value) or value.is_conj() or value.is_neg()):
                value = empty_fake(value)
            seen.add(storage)
        apart.append(value)
    return apart


def _apparent(tensor: torch.Tensor) -> int:
    try:
        return int(without_transforms(tensor).untyped_storage()._cdata)
    except NotImplementedError:
        # Inside vmap: a wrapper without memory of its own.
        return -id(tensor)
