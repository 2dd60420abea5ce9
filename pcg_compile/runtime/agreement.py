"""Ranks that agree: what one process decides by itself while recording must be what all of them do.

A recording that fails on one rank would leave it in other collectives than the rest, which then wait for ever. So ranks
tell each other through the process group's store, only while a program is built: a steady step exchanges nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import BatchError, PCGError, message
from ..torch_internals import default_store

__all__ = ["Agreement", "RankFailed"]

#: How long ranks wait for each other; recording one piece takes a fraction of a second, compiling came before.
_TIMEOUT = timedelta(seconds=60)


class RankFailed(RuntimeError):
    """Another rank could not record what this one recorded."""


class Agreement:
    """The agreements of one graph; every rank must make the same ones in the same order."""

    def __init__(self) -> None:
        # Ranks compile the same graphs in the same order.
        self._name = f"graph-{default_store().add(f'pcg/graphs/{dist.get_rank()}', 1)}"
        self._rounds: Iterator[int] = itertools.count()

    def same(self, what: str, value: Any) -> None:
        """Checks that all ranks have the same value.

        Raises:
            BatchError: they do not; the message has every rank's.
            PCGError: a rank said nothing for 60 s.
        """
        values = self._exchange(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise BatchError(
                message(
                    f"ranks were called with different {what} ({listed})",
                    why="They run the same collectives, so that all need the same batch.",
                    cure="Send each step's batch to all ranks: torch.distributed.broadcast_object_list([batch])",
                )
            )

    def all_ready(self, ready: bool = True) -> None:
        """Called once for each recording, when it is captured and before anything runs it.

        Raises:
            RankFailed: another rank failed; this one must do without the recording as well.
        """
        failed = [rank for rank, other in enumerate(self._exchange(ready)) if not other]
        if ready and failed:
            raise RankFailed(f"rank {failed[0]} could not record the piece")

    def any_of(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self._exchange(value))

    def _exchange(self, value: Any) -> list[Any]:
        store, rank, world = default_store(), dist.get_rank(), dist.get_world_size()
        key = f"pcg/{self._name}/{next(self._rounds)}"
        store.set(f"{key}/{rank}", json.dumps(value))
        try:
            store.wait([f"{key}/{other}" for other in range(world)], _TIMEOUT)
            values = [json.loads(store.get(f"{key}/{other}")) for other in range(world)]
        except (RuntimeError, ValueError) as error:
            raise PCGError(
                message(
                    f"a rank did not answer for {_TIMEOUT.seconds} s while a bucket was being recorded",
                    why="It died, or was not called with the same batch.",
                    cure="Look at the other ranks' output, and give all of them every batch.",
                )
            ) from error
        if rank == 0 and world > 1:
            # The round before is over for all: each has entered this one.
            self._forget(store, key, world)
        return values

    def _forget(self, store: Any, key: str, world: int) -> None:
        prefix, _, number = key.rpartition("/")
        if int(number) > 0:
            for other in range(world):
                store.delete_key(f"{prefix}/{int(number) - 1}/{other}")
