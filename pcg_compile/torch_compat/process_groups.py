"""Process groups: their store, ranks and backends, and numbers compared from host to host (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .probe import private

_READ = "2.11 to 2.13"
_get_default_store = private("torch.distributed.distributed_c10d._get_default_store", _READ)
_get_default_group = private("torch.distributed.distributed_c10d._get_default_group", _READ)
_resolve_process_group = private("torch.distributed.distributed_c10d._resolve_process_group", _READ)


def default_store() -> Any:
    """The key-value store that a process group was made with (2.11 to 2.13)."""
    return _get_default_store()


def group_backend(name: str) -> str | None:
    """The backend ("nccl", "gloo") of a process group by its name; None where no group has it (2.11 to 2.13)."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    try:
        group = _resolve_process_group(name)
    except (LookupError, RuntimeError, ValueError):
        return None
    return str(dist.get_backend(group))


def ranks_of_group(name: str) -> list[int] | None:
    """The ranks of a process group by its name, in the world's numbers; None where no group has it (2.11 to 2.13)."""
    try:
        return list(dist.get_process_group_ranks(_resolve_process_group(name)))
    except (LookupError, RuntimeError, ValueError):
        return None


class GroupMaximum:
    """The largest of two numbers over some ranks, each pair's own, from host to host: a gloo group of its own.

    The backend is called directly: through the dispatcher it would cost twice the time.

    Raises:
        RuntimeError: gloo finds no way between the ranks; from :meth:`wait` also where one is gone, or has not answered
            within the timeout of the default process group.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        default = _get_default_group()
        options = getattr(default._get_backend(default._device_types[0]), "options", None)
        group: Any = dist.new_group(
            list(ranks), getattr(options, "_timeout", None), backend="gloo", use_local_synchronization=True
        )
        self._backend: Any = group._get_backend(torch.device("cpu"))
        self._largest = dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        with torch.inference_mode(False):
            numbers = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._numbers, self._array = [numbers], numbers.numpy()
        self._work: Any = None

    def start(self, numbers: tuple[int, int]) -> None:
        """Sends this rank's numbers. Those of a step that ended early, which nobody waited for, have come by now."""
        if self._work is not None:
            self._work.wait()
        self._array[:] = numbers
        self._work = self._backend.allreduce(self._numbers, self._largest)

    def wait(self) -> tuple[int, int]:
        """The largest of all ranks' numbers."""
        self._work.wait()
        self._work = None
        first, second = self._array.tolist()
        return first, second
