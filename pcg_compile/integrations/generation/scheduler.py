"""Which requests run in a step, and with which tokens: continuous batching with chunked prefill and preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .pages import PagePool

__all__ = ["NeedsResults", "Request", "Sampling", "ScheduledStep", "Scheduler"]

Ints = npt.NDArray[np.int64]

#: Waiting requests that a step passes over because another one is computing their prefix.
_LOOK_AHEAD = 64


@dataclass
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    seed: int = 0

    @property
    def filters(self) -> bool:
        """Whether tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        id: its name in the results. index: the place of its prompt among those given.
        prompt: token ids. most: new tokens at the most. ends: ids that end it. stops: strings that end it.
        adapter: a LoRA adapter's name, or None.
        tokens: prompt and generated tokens, as far as the host has read them. logprobs: of the generated ones.
        error: why it failed, or None. finished: whether it wants no more tokens.
        slot: its row of the scheduler's arrays while it runs, else -1. pages: its pages, in order.
    """

    id: str
    index: int
    prompt: list[int]
    most: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: BaseException | None = None
    finished: bool = False
    started: float = -1.0
    ended: float = -1.0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    #: Index nodes of its full pages: the last one's, and how many pages are published.
    node: int = 0
    published: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[len(self.prompt) :]


@dataclass
class ScheduledStep:
    """What one step runs.

    Attributes:
        requests: in the order of the batch. slots, lengths: ``[requests]``, their rows and new tokens.
        cached: ``[requests]`` tokens before those.
        samples: ``[rows]`` places among the requests of those that sample a token: all but unfinished prompts.
        copies: (from, to) pages to copy before the step.
        admitted: requests whose slot is new.
    """

    requests: list[Request]
    slots: Ints
    lengths: Ints
    cached: Ints
    samples: Ints
    copies: list[tuple[int, int]]
    admitted: list[Request]

    @property
    def decodes(self) -> bool:
        """Whether every request has one token."""
        return bool(self.lengths.max() == 1)


class NeedsResults(Exception):
    """The next step depends on tokens that the host has not read yet."""


class Scheduler:
    """Requests in slots, with their lengths and pages in arrays, so that a decoding step needs no loop over requests.

    A step takes one token of every request that decodes, then chunks of prompts while ``most_tokens`` allow. A request
    gets a page when its next token needs one. Where none is left, the youngest request gives up its pages and is
    computed again later; what it has generated stays.
    """

    def __init__(
        self, pool: PagePool, slots: int, most_tokens: int, most_length: int, most_adapters: int | None = None
    ) -> None:
        self.pool, self.most_tokens, self.most_adapters = pool, max(most_tokens, slots), most_adapters
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._free_slots = list(range(slots - 1, -1, -1))
        self.table = np.zeros((slots, -(-most_length // pool.page_size)), dtype=np.int32)
        #: By slot: tokens whose keys and values are written or about to be; tokens in all, those in flight included;
        #: tokens that the host has read; tokens at the most; pages; order of arrival.
        self.cached, self.total, self.known, self.limit, self.pages = (
            np.zeros(slots, dtype=np.int64) for _ in range(5)
        )
        self.order = np.full(slots, np.iinfo(np.int64).max, dtype=np.int64)
        self._arrivals = 0
        self._copies: list[tuple[int, int, Request]] = []
        #: By adapter and first page, the last request that began to compute it.
        self._leaders: dict[tuple[str | None, tuple[int, ...]], Request] = {}
        self._admitted: list[Request] = []

    @property
    def in_flight(self) -> bool:
        """Whether the host has tokens to read."""
        return bool((self.total > self.known).any())

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def next_step(self) -> ScheduledStep | None:
        """The next step; None where nothing can run before results are read, or at all.

        Raises:
            NeedsResults: a page must be taken from a request whose last token is still on the device.
        """
        self._admit()
        if not self.running:
            return None
        slots = self._order_of(np.fromiter(self.running, dtype=np.int64, count=len(self.running)))
        todo = (self.total - self.cached)[slots]
        # A request that has all its tokens only waits to be read.
        wanted = (self.total[slots] < self.limit[slots]) & (todo > 0)
        slots, todo = slots[wanted], todo[wanted]
        decoding = todo == 1
        slots, todo = (
            np.concatenate([slots[decoding], slots[~decoding]]),
            np.concatenate([todo[decoding], todo[~decoding]]),
        )
        lengths = np.minimum(todo, np.maximum(self.most_tokens - (todo.cumsum() - todo), 0))
        slots, lengths, todo = slots[lengths > 0], lengths[lengths > 0], todo[lengths > 0]
        if not len(slots):
            return None
        if not self._give_pages(slots, lengths):
            # Somebody has lost its pages: what is left is another step.
            return self.next_step()
        cached = self.cached[slots]
        samples = np.flatnonzero(lengths == todo)
        requests = [self.running[slot] for slot in slots.tolist()]
        copies, self._copies = [(source, target) for source, target, _ in self._copies], []
        admitted, self._admitted = self._admitted, []
        return ScheduledStep(requests, slots, lengths, cached, samples, copies, admitted)

    def launched(self, step: ScheduledStep) -> None:
        """Notes that a step is on its way: what it writes can be read by the next."""
        self.cached[step.slots] += step.lengths
        self.total[step.slots[step.samples]] += 1
        for request, length in zip(step.requests, step.lengths.tolist(), strict=True):
            if length > 1 or self.cached[request.slot] % self.pool.page_size == 0:
                self._publish(request)

    def finish(self, request: Request) -> None:
        """Ends a request and releases its pages: a step in flight writes there ahead of whoever takes them next."""
        request.finished = True
        if request.slot < 0:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        self._leave(request)

    def read(self, request: Request, token: int, logprob: float) -> None:
        """Takes over a token that the host has read."""
        request.tokens.append(token)
        request.logprobs.append(logprob)
        self.known[request.slot] += 1

    # -- slots and pages ----------------------------------------------------------------------------------------------

    def _order_of(self, slots: Ints) -> Ints:
        return slots[self.order[slots].argsort()]

    def _admit(self) -> None:
        """Starts waiting requests while slots and pages for what they compute first are there."""
        put_off: list[Request] = []
        while self.waiting and self._free_slots and len(put_off) < _LOOK_AHEAD:
            request = self.waiting[0]
            pages = -(-len(request.tokens) // self.pool.page_size)
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
        shared = _common_pages(request.tokens, leader.tokens, self.pool.page_size)
        return bool(self.cached[leader.slot] < shared)

    def _awaits_adapter(self, request: Request) -> bool:
        """Whether the running requests use as many other adapters as fit the device at once."""
        if request.adapter is None or self.most_adapters is None:
            return False
        others = {other.adapter for other in self.running.values()} - {None, request.adapter}
        return len(others) >= self.most_adapters

    def _family(self, request: Request) -> tuple[str | None, tuple[int, ...]]:
        return request.adapter, tuple(request.tokens[: self.pool.page_size])

    def _start(self, request: Request) -> None:
        slot = request.slot = self._free_slots.pop()
        self.running[slot] = request
        match = self.pool.match(request.tokens, request.adapter)
        request.pages, request.node, request.published = match.pages, match.node, len(match.pages)
        cached = len(match.pages) * self.pool.page_size
        if match.source is not None and (page := self.pool.take()) is not None:
            self._copies.append((match.source, page, request))
            request.pages.append(page)
            cached = match.tokens
        self.table[slot] = 0
        self.table[slot, : len(request.pages)] = request.pages
        self.pages[slot], self.cached[slot] = len(request.pages), cached
        self.total[slot] = self.known[slot] = len(request.tokens)
        self.limit[slot] = len(request.prompt) + request.most
        self.order[slot] = self._arrivals
        self._arrivals += 1
        self._admitted.append(request)
        if len(request.tokens) - cached > self.pool.page_size:
            self._leaders[self._family(request)] = request

    def _leave(self, request: Request) -> None:
        slot = request.slot
        del self.running[slot]
        self.pool.release(request.pages)
        self._free_slots.append(slot)
        self.cached[slot] = self.total[slot] = self.known[slot] = self.pages[slot] = 0
        self.order[slot] = np.iinfo(np.int64).max
        request.slot, request.pages = -1, []
        self._admitted = [other for other in self._admitted if other is not request]
        self._copies = [copy for copy in self._copies if copy[2] is not request]

    def _give_pages(self, slots: Ints, lengths: Ints) -> bool:
        """Gives every request of a step the pages that its tokens need; False where one had to be preempted."""
        needed = -(-(self.cached[slots] + lengths) // self.pool.page_size)
        for place in np.flatnonzero(needed > self.pages[slots]).tolist():
            slot = int(slots[place])
            request = self.running[slot]
            while len(request.pages) < needed[place]:
                page = self.pool.take()
                if page is None:
                    if self.in_flight:
                        raise NeedsResults
                    self._preempt()
                    return False
                self.table[slot, len(request.pages)] = page
                request.pages.append(page)
                self.pages[slot] += 1
        return True

    def _preempt(self) -> None:
        youngest = max(self.running.values(), key=lambda request: self.order[request.slot])
        self._leave(youngest)
        self.waiting.appendleft(youngest)

    def _publish(self, request: Request) -> None:
        """Indexes pages of known tokens that are full; of a prompt, the last one too, for others to copy from."""
        size, cached = self.pool.page_size, min(int(self.cached[request.slot]), len(request.tokens))
        while (request.published + 1) * size <= cached:
            start = request.published * size
            page = request.pages[request.published]
            request.node = self.pool.publish(request.node, page, request.tokens[start : start + size])
            request.published += 1
        start = request.published * size
        if start < cached == len(request.tokens) == len(request.prompt):
            self.pool.publish_partial(request.node, request.pages[request.published], request.tokens[start:cached])


def _common_pages(one: Sequence[int], other: Sequence[int], size: int) -> int:
    """Tokens in the full pages that two sequences share, and that the first can use."""
    count = 0
    while (count + 1) * size <= min(len(one) - 1, len(other)) and one[count * size : (count + 1) * size] == other[
        count * size : (count + 1) * size
    ]:
        count += 1
    return count * size
