"""Which requests run in a step, and with which tokens: continuous batching with chunked prefill and preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pages import PagePool
from .requests import Ints, Request

__all__ = ["NeedsResults", "ScheduledStep", "Scheduler"]

#: Waiting requests that a step passes over because another one is computing their prefix.
_LOOK_AHEAD = 64
#: Tokens that a decoding request gets pages for ahead, so its steps can advance on the device.
_AHEAD = 32
_FREE = np.iinfo(np.int64).max


@dataclass
class ScheduledStep:
    """What one step runs.

    Attributes:
        slots, lengths, cached: ``[requests]``, rows, new tokens and tokens before those, in the order of the batch.
        samples: ``[rows]`` places among the requests of those that sample a token: all but unfinished prompts.
        sampled: ``[rows]`` their slots. stamps: ``[rows]`` who had these slots.
        copies: (from, to) pages to copy before the step. admitted: requests whose slot is new.
        decodes: whether it takes one token, sampled by the step before, of every request.
        follows: whether it is the step before with one more token a request, on pages that it had already.
    """

    slots: Ints
    lengths: Ints
    cached: Ints
    samples: Ints
    sampled: Ints
    stamps: Ints
    copies: list[tuple[int, int]]
    admitted: list[Request]
    decodes: bool
    follows: bool = False


class NeedsResults(Exception):
    """The next step depends on tokens that the host has not read yet."""


class Scheduler:
    """Requests in slots, all about them in arrays: a decoding step needs no loop over requests.

    A step takes one token of every request that decodes, then chunks of prompts while ``most_tokens`` allow. Decoding
    requests get pages ahead while there are plenty. Where none is left, pages ahead come back first; then the youngest
    request gives up its pages and is computed again later; what it has generated stays.
    """

    def __init__(
        self, pool: PagePool, slots: int, most_tokens: int, most_length: int, most_adapters: int | None = None
    ) -> None:
        self.pool, self.most_tokens, self.most_adapters = pool, max(most_tokens, slots), most_adapters
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._free_slots = list(range(slots - 1, -1, -1))
        pages = -(-most_length // pool.page_size)
        self.most_length = pages * pool.page_size
        self.table = np.zeros((slots, pages), dtype=np.int32)
        self.ids = np.zeros((slots, self.most_length + 1), dtype=np.int64)
        self.logprobs = np.zeros((slots, self.most_length + 1), dtype=np.float32)
        #: By slot: tokens whose keys and values are written or about to be; tokens in all, those in flight included;
        #: tokens that the host has read; tokens at the start and at the most; pages; order of arrival.
        self.cached, self.total, self.known, self.first, self.limit, self.pages = (
            np.zeros(slots, dtype=np.int64) for _ in range(6)
        )
        self.order = np.full(slots, _FREE, dtype=np.int64)
        #: By slot, ids that end a request; as wide as the most of any.
        self.ends = np.full((slots, 0), -1, dtype=np.int64)
        self._arrivals = 0
        self._copies: list[tuple[int, int, Request]] = []
        #: By adapter and first page, the last request that began to compute it.
        self._leaders: dict[tuple[str | None, tuple[int, ...]], Request] = {}
        self._admitted: list[Request] = []
        #: The last step, while the requests that run are the same; steps that may follow it on the pages given.
        self._last: ScheduledStep | None = None
        self._room = 0

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def next_step(self, admit: bool = True) -> ScheduledStep | None:
        """The next step; None where nothing can run before results are read, or at all.

        Args:
            admit: whether waiting requests may start.

        Raises:
            NeedsResults: a page must be taken from a request whose last token is still on the device.
        """
        if admit and self.waiting and self._free_slots:
            self._admit()
        last = self._last
        if last is not None and self._room > 0 and bool((self.total[last.slots] < self.limit[last.slots]).all()):
            self._room -= 1
            last.cached, last.copies, last.admitted, last.follows = last.cached + 1, [], [], True
            return last
        self._last = None
        if not self.running:
            return None
        slots = np.fromiter(self.running, dtype=np.int64, count=len(self.running))
        slots = slots[self.order[slots].argsort()]
        todo = (self.total - self.cached)[slots]
        # A request that has all its tokens only waits to be read.
        wanted = (self.total[slots] < self.limit[slots]) & (todo > 0)
        slots, todo = slots[wanted], todo[wanted]
        one = todo == 1
        slots, todo = np.concatenate([slots[one], slots[~one]]), np.concatenate([todo[one], todo[~one]])
        lengths = np.minimum(todo, np.maximum(self.most_tokens - (todo.cumsum() - todo), 0))
        some = lengths > 0
        slots, lengths, todo = slots[some], lengths[some], todo[some]
        if not len(slots):
            return None
        if not self._give_pages(slots, lengths, todo):
            # Somebody has lost its pages: a step of those left takes them first, or it would be admitted and lose them
            # again.
            return self.next_step(admit=False)
        cached, samples = self.cached[slots], np.flatnonzero(lengths == todo)
        sampled = slots[samples]
        copies, self._copies = [(source, target) for source, target, _ in self._copies], []
        admitted, self._admitted = self._admitted, []
        decodes = bool((cached >= self.first[slots]).all())
        return ScheduledStep(slots, lengths, cached, samples, sampled, self.order[sampled], copies, admitted, decodes)

    def launched(self, step: ScheduledStep) -> None:
        """Notes that a step is on its way: what it writes can be read by the next."""
        self.cached[step.slots] += step.lengths
        self.total[step.sampled] += 1
        if step.decodes:
            self._last = step
            return
        for slot in step.slots[step.cached < self.first[step.slots]].tolist():
            self._publish(self.running[slot], self.running[slot].kept)

    def read(
        self, step: ScheduledStep, tokens: Ints, logprobs: npt.NDArray[np.float32]
    ) -> tuple[Ints, Ints, list[int]]:
        """Takes over what a step has sampled.

        Returns:
            The slots whose requests are still there, their tokens, and the places among them of those that end.
        """
        slots, there = step.sampled, self.order[step.sampled] == step.stamps
        if not there.all():
            # They ended with the token before, which the host had not read when this step was launched.
            slots, tokens, logprobs = slots[there], tokens[there], logprobs[there]
        known = self.known[slots]
        self.ids[slots, known], self.logprobs[slots, known] = tokens, logprobs
        self.known[slots] = known = known + 1
        done = known >= self.limit[slots]
        if self.ends.shape[1]:
            done |= (tokens[:, None] == self.ends[slots]).any(1)
        return slots, tokens, np.flatnonzero(done).tolist()

    def finish(self, request: Request) -> None:
        """Ends a request and releases its pages: a step in flight writes there ahead of whoever takes them next."""
        request.finished = True
        if request.slot < 0:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        self._leave(request)

    # -- slots and pages ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Starts waiting requests while slots and pages for what they compute first are there."""
        put_off: list[Request] = []
        while self.waiting and self._free_slots and len(put_off) < _LOOK_AHEAD:
            request = self.waiting[0]
            pages = -(-len(request.kept) // self.pool.page_size)
            if self.running and self.pool.available < pages + len(self.running):
                break
            self.waiting.popleft()
            if self._awaits_prefix(request) or self._awaits_adapter(request):
                put_off.append(request)
            else:
                self._start(request)
        self.waiting.extendleft(reversed(put_off))

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether a running request is computing pages that this one can share once they are written."""
        leader = self._leaders.get(self._family(request))
        if leader is None or leader.slot < 0:
            return False
        shared = _common_pages(request.kept, leader.kept, self.pool.page_size)
        return bool(self.cached[leader.slot] < shared)

    def _awaits_adapter(self, request: Request) -> bool:
        """Whether the running requests use as many other adapters as fit the device at once."""
        if request.adapter is None or self.most_adapters is None:
            return False
        others = {other.adapter for other in self.running.values()} - {None, request.adapter}
        return len(others) >= self.most_adapters

    def _family(self, request: Request) -> tuple[str | None, tuple[int, ...]]:
        return request.adapter, tuple(request.kept[: self.pool.page_size])

    def _start(self, request: Request) -> None:
        slot = request.slot = self._free_slots.pop()
        self.running[slot], self._last = request, None
        tokens = request.kept
        match = self.pool.match(tokens, request.adapter)
        request.pages, request.node, request.published = match.pages, match.node, len(match.pages)
        cached = len(match.pages) * self.pool.page_size
        if match.source is not None and self.pool.available:
            page = self.pool.take()
            self._copies.append((match.source, page, request))
            request.pages.append(page)
            cached = match.tokens
        self.table[slot, : len(request.pages)] = request.pages
        self.pages[slot], self.cached[slot] = len(request.pages), cached
        self.total[slot] = self.known[slot] = self.first[slot] = len(tokens)
        self.limit[slot] = len(request.prompt) + request.most
        self.ids[slot, : len(tokens)] = tokens
        self.logprobs[slot, len(request.prompt) : len(tokens)] = request.kept_logprobs
        request.rows = self.ids[slot], self.logprobs[slot], self.known[slot : slot + 1]
        if len(request.ends) > self.ends.shape[1]:
            more = np.full((len(self.ends), len(request.ends) - self.ends.shape[1]), -1)
            self.ends = np.concatenate([self.ends, more], 1)
        self.ends[slot], self.ends[slot, : len(request.ends)] = -1, list(request.ends)
        self.order[slot] = self._arrivals
        self._arrivals += 1
        self._admitted.append(request)
        if len(tokens) - cached > self.pool.page_size:
            self._leaders[self._family(request)] = request

    def _leave(self, request: Request) -> None:
        slot = request.slot
        request.kept, request.kept_logprobs, request.rows = request.tokens, request.logprobs, None
        # Whoever continues it, or it itself once it is computed again, finds what it has computed.
        self._publish(request, request.kept)
        del self.running[slot]
        self.pool.release(request.pages)
        self._free_slots.append(slot)
        self.cached[slot] = self.total[slot] = self.known[slot] = self.pages[slot] = 0
        self.order[slot], self._last = _FREE, None
        request.slot, request.pages = -1, []
        self._admitted = [other for other in self._admitted if other is not request]
        self._copies = [copy for copy in self._copies if copy[2] is not request]

    def _give_pages(self, slots: Ints, lengths: Ints, todo: Ints) -> bool:
        """Gives every request of a step the pages that its tokens need; False where one had to be preempted."""
        size, have, ends = self.pool.page_size, self.pages[slots], self.cached[slots] + lengths
        needed = -(-ends // size)
        # Ahead for those that decode from now on.
        ahead = -(-np.minimum(ends + _AHEAD, self.limit[slots]) // size)
        ahead = np.maximum(np.where(lengths == todo, ahead, needed), have)
        if int((ahead - have).sum()) + len(self.running) > self.pool.available:
            ahead = np.maximum(needed, have)
            if int((ahead - have).sum()) > self.pool.available:
                self._take_back(slots, needed)
                have = self.pages[slots]
                ahead = np.maximum(needed, have)
                if int((ahead - have).sum()) > self.pool.available:
                    if bool((self.total > self.known).any()):
                        raise NeedsResults
                    self._preempt()
                    return False
        for place in np.flatnonzero(ahead > have).tolist():
            slot = int(slots[place])
            request = self.running[slot]
            new = [self.pool.take() for _ in range(int(ahead[place] - have[place]))]
            self.table[slot, len(request.pages) : len(request.pages) + len(new)] = new
            request.pages += new
        self.pages[slots] = ahead
        self._room = int((ahead * size - ends).min())
        return True

    def _take_back(self, slots: Ints, needed: Ints) -> None:
        """Takes pages ahead from requests that have some."""
        keep = -(-self.cached // self.pool.page_size)
        keep[slots] = np.maximum(keep[slots], needed)
        for slot in np.flatnonzero(self.pages > keep).tolist():
            request, kept = self.running[slot], int(keep[slot])
            self.pool.release(request.pages[kept:])
            del request.pages[kept:]
            self.pages[slot] = kept

    def _preempt(self) -> None:
        youngest = max(self.running.values(), key=lambda request: self.order[request.slot])
        self._leave(youngest)
        self.waiting.appendleft(youngest)

    def _publish(self, request: Request, tokens: list[int]) -> None:
        """Indexes pages of known tokens that are full; of a prompt, the last one too, for others to copy from."""
        size, cached = self.pool.page_size, min(int(self.cached[request.slot]), len(tokens))
        while (request.published + 1) * size <= cached:
            start = request.published * size
            page = request.pages[request.published]
            request.node = self.pool.publish(request.node, page, tokens[start : start + size])
            request.published += 1
        start = request.published * size
        if start < cached == len(tokens) == len(request.prompt):
            self.pool.publish_partial(request.node, request.pages[request.published], tokens[start:cached])


def _common_pages(one: Sequence[int], other: Sequence[int], size: int) -> int:
    """Tokens in the full pages that two sequences share, and that the first can use."""
    count = 0
    while (count + 1) * size <= min(len(one) - 1, len(other)) and one[count * size : (count + 1) * size] == other[
        count * size : (count + 1) * size
    ]:
        count += 1
    return count * size
