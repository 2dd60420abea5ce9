"""Ranks that agree: what one process decides by itself must be what all of them do.

A captured graph that fails on one rank, or a batch that only one rank has, would leave it in other collectives than the
rest, which then wait forever. While a program is built ranks tell each other through the process group's store. In a
steady step they compare two numbers, over gloo and so without the device, while it is busy with what comes ahead of the
first collective.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import BatchError, PCGError, message
from ..torch_compat.process_groups import GroupMaximum, default_store

__all__ = ["Agreement", "RankFailed", "release_channels"]

#: How long ranks wait for each other; captured graph one piece takes a fraction of a second, compiling came before.
_TIMEOUT = timedelta(seconds=60)


class RankFailed(RuntimeError):
    """Another rank could not capture what this one captured."""


class Agreement:
    """The agreements of one graph; every rank must make the same ones in the same order.

    Args:
        groups: the ranks of each process group that the graph's collectives use, this one among them. In a mesh of
            several dimensions what ranks tell each other goes from group to group.
    """

    def __init__(self, groups: Iterable[Sequence[int]]) -> None:
        self._channel = _channel_of(groups)
        # Ranks compile the same graphs in the same order.
        self._number = next(self._channel.graphs)
        self._sizes: Sequence[int] = ()

    def propose(self, sizes: Sequence[int]) -> str | None:
        """Starts to compare the sizes of a step; ranks go on meanwhile.

        Returns:
            Why steady steps cannot be compared, the first time; else None.
        """
        self._sizes = sizes
        # Hashes of numbers are the same in every process.
        return self._channel.start(hash((self._number, *sizes)))

    def confirm(self, building: bool = False) -> None:
        """Ends the comparison, ahead of the step's first collective; nothing where none was started.

        Args:
            building: whether all ranks build the step's program, so they may talk through the store as well.

        Raises:
            BatchError: ranks were called with other sizes; the message has every rank's.
            PCGError: a rank is gone, or ranks run different graphs.
        """
        if self._channel.all_equal(building):
            return
        found = self._channel.gather([self._number, list(self._sizes)])
        sizes = {rank: value[1] for rank, value in found.items()}
        if len(set(map(str, sizes.values()))) == 1:
            raise PCGError(
                message(
                    f"ranks run different graphs ({_listed({rank: value[0] for rank, value in found.items()})})",
                    why="They compiled at different calls, so they would wait in different collectives.",
                    cure="Give all ranks the same calls in the same order, from the first one on.",
                )
            )
        raise BatchError(
            message(
                f"ranks were called with different sizes ({_listed(sizes)})",
                why="They run the same collectives, so all need the same batch.",
                cure="Send each step's batch to all ranks: torch.distributed.broadcast_object_list([batch])",
            )
        )

    def all_ready(self, ready: bool = True) -> None:
        """Called once for each captured graph, when it is captured and before anything runs it.

        Raises:
            RankFailed: another rank failed; this one must do without the captured graph as well.
        """
        failed = [rank for rank, other in self._channel.gather(ready).items() if not other]
        if ready and failed:
            raise RankFailed(f"rank {failed[0]} could not capture the piece")

    def any_of(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self._channel.gather(value).values())


class _Channel:
    """What ranks exchange, over the groups of some graphs."""

    def __init__(self, groups: tuple[tuple[int, ...], ...]) -> None:
        self.graphs: Iterator[int] = itertools.count(1)
        self._groups = groups
        rank = dist.get_rank()
        # Process groups that were destroyed and made again start from a new store; channels of one store differ by it.
        turns = [default_store().add(f"pcg/{_name(group)}/{rank}", 1) for group in groups]
        self._names = [f"pcg/{_name(group)}-{turn}" for group, turn in zip(groups, turns, strict=True)]
        self._rounds: list[Iterator[int]] = [itertools.count() for _ in groups]
        self._maxima: list[GroupMaximum] | None = None
        self._value: int | None = None

    def start(self, value: int) -> str | None:
        """Starts to find out whether all ranks have the same value; the first time, why only :meth:`gather` can."""
        reason = self._connect() if self._maxima is None else None
        self._value = value
        if self._maxima:
            self._maxima[0].start((value, -value))
        return reason

    def _connect(self) -> str | None:
        maxima, reason = [], ""
        try:
            maxima = [GroupMaximum(group) for group in self._groups]
        except RuntimeError as error:
            # A host whose name leads nowhere, say; NCCL finds its own way.
            reason = str(error).splitlines()[0]
        # All or none.
        reasons = [other for other in self.gather(reason).values() if other]
        self._maxima = [] if reasons else maxima
        if not reasons:
            return None
        return f"ranks compare sizes only when new, since gloo found no way between them: {reasons[0]}"

    def all_equal(self, building: bool) -> bool:
        """Whether they have; True where nothing was started, or where none but ``building`` ranks could tell."""
        value, self._value = self._value, None
        if value is None or not self._groups:
            return True
        if not self._maxima:
            return not building or len(set(self.gather(value).values())) == 1
        try:
            # The largest, and the smallest with its sign turned.
            largest, smallest = self._maxima[0].wait()
            for maximum in self._maxima[1:]:
                maximum.start((largest, smallest))
                largest, smallest = maximum.wait()
        except RuntimeError as error:
            raise PCGError(
                message(
                    f"a rank took no part in the step: {str(error).splitlines()[0]}",
                    why="It died, or was not called with the same batch.",
                    cure="Look at the other ranks' output, and give all of them every batch.",
                )
            ) from error
        return largest == -smallest

    def gather(self, value: Any) -> dict[int, Any]:
        """Every rank's value, by rank.

        Raises:
            PCGError: a rank said nothing for 60 s.
        """
        found = {dist.get_rank(): value}
        for group, name, rounds in zip(self._groups, self._names, self._rounds, strict=True):
            for part in self._exchange(group, f"{name}/{next(rounds)}", list(found.items())):
                found |= dict(part)
        return dict(sorted(found.items()))

    def _exchange(self, group: Sequence[int], key: str, value: Any) -> list[Any]:
        store, rank = default_store(), dist.get_rank()
        store.set(f"{key}/{rank}", json.dumps(value))
        try:
            store.wait([f"{key}/{other}" for other in group], _TIMEOUT)
            values = [json.loads(store.get(f"{key}/{other}")) for other in group]
        except (RuntimeError, ValueError) as error:
            raise PCGError(
                message(
                    f"a rank did not answer for {_TIMEOUT.seconds} s while a bucket was being captured",
                    why="It died, or was not called with the same batch.",
                    cure="Look at the other ranks' output, and give all of them every batch.",
                )
            ) from error
        if rank == group[0]:
            # The round before is over for all: each has entered this one.
            prefix, _, number = key.rpartition("/")
            if int(number) > 0:
                for other in group:
                    store.delete_key(f"{prefix}/{int(number) - 1}/{other}")
        return values

    def release(self) -> None:
        """Lets go of the process groups."""
        self._maxima = None


#: Graphs of the same ranks share a channel, so ranks that run different graphs hear of it. It outlives them: when
#: the last one is collected, differs from rank to rank.
_CHANNELS: dict[tuple[tuple[int, ...], ...], _Channel] = {}


def release_channels() -> None:
    """Lets go of process groups, ahead of their end."""
    for channel in _CHANNELS.values():
        channel.release()


def _channel_of(groups: Iterable[Sequence[int]]) -> _Channel:
    key = tuple(sorted({tuple(group) for group in groups if len(group) > 1}))
    channel = _CHANNELS.get(key)
    if channel is None:
        channel = _CHANNELS[key] = _Channel(key)
    return channel


def _name(group: Sequence[int]) -> str:
    return "-".join(map(str, group))


def _listed(values: dict[int, Any]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
