"""The processes that a model is split over: they take the same steps, and one's errors end requests on all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

__all__ = ["Ending", "Ranks"]

#: A request's name, and why it ends: an error, or None where it was cancelled.
Ending = tuple[str, BaseException | None]

#: How long ranks wait for each other; another one may be compiling.
_TIMEOUT = timedelta(minutes=5)

#: Registry: the ranks of a model, while it lives.
_RANKS: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


class Ranks:
    """The ranks of a model's mesh, over gloo; a model in one process has none to talk to."""

    def __init__(self, model: Any) -> None:
        self.group: Any = None
        if not dist.is_available() or not dist.is_initialized():
            return
        meshes = [getattr(model, "_device_mesh", None), *(getattr(p, "device_mesh", None) for p in model.parameters())]
        mesh = next((mesh for mesh in meshes if mesh is not None), None)
        if mesh is not None and mesh.size() > 1:
            ranks = mesh.mesh.flatten().tolist()
            self.group = dist.new_group(ranks, _TIMEOUT, backend="gloo", use_local_synchronization=True)

    @staticmethod
    def of(model: Any) -> Ranks:
        """The ranks of a model; the first call of all ranks together."""
        if model not in _RANKS:
            _RANKS[model] = Ranks(model)
        return _RANKS[model]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, endings: Sequence[Ending]) -> list[Ending]:
        """Every rank's endings in one order; other ranks' errors as their texts."""
        if self.group is None:
            return list(endings)
        # Nearly always there are none: one number tells.
        most = torch.tensor([len(endings)])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        if not most.item():
            return []
        mine, found = dist.get_group_rank(self.group, dist.get_rank()), []
        texts = [(name, None if error is None else f"{type(error).__name__}: {error}") for name, error in endings]
        for rank, others in enumerate(self.gather(texts)):
            for place, (name, text) in enumerate(others):
                error = endings[place][1] if rank == mine else text and RuntimeError(f"rank {rank}: {text}")
                found.append((name, error))
        return found
