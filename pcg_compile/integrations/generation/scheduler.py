"""Which requests run in a step, and with which tokens: continuous batching with chunked prefill and preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .pages import PagePool, common
from .requests import Request

__all__ = ["NeedsResults", "Scheduler", "Step"]

#: Waiting requests that a step passes over because another one is computing their prefix.
_LOOK_AHEAD = 64
#: Tokens that a decoding request gets pages for ahead, so its steps can advance on the device.
_AHEAD = 32


@dataclass(frozen=True)
class Step:
    """What one step runs.

    Attributes:
        requests, lengths: in the order of the batch, with the number of new tokens of each.
        samples: places among the requests of those that sample a token: all but unfinished prompts.
        decodes: whether it takes one token, sampled by the step before, of every request.
        follows: whether it is the step before with one more token a request, on pages that it had already.
    """

    requests: Sequence[Request]
    lengths: Sequence[int]
    samples: Sequence[int]
    decodes: bool
    follows: bool = False


class NeedsResults(Exception):
    """The next step depends on tokens that the host has not read yet."""


class Scheduler:
    """Requests that wait and requests that run.

    A step takes one token of every request that decodes, then chunks of prompts while ``most_tokens`` allow. Decoding
    requests get pages ahead while there are plenty. Where none is left, pages ahead come back first; then the youngest
    request gives up its pages and is computed again later; what it has generated stays.

    Attributes:
        running: by slot, in the order in which they began to run. table: ``[slots, pages]`` int32, pages by slot.
    """

    def __init__(
        self, pool: PagePool, slots: int, most_tokens: int, most_length: int, most_adapters: int | None = None
    ) -> None:
        self.pool, self.most_tokens, self.most_adapters = pool, max(most_tokens, slots), most_adapters
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.table = np.zeros((slots, self._pages_of(most_length)), dtype=np.int32)
        self.most_length = self.table.shape[1] * pool.page_size
        self._free_slots = list(range(slots - 1, -1, -1))
        #: The last step, while the requests that run are the same; steps that may follow it on the pages given.
        self._last: Step | None = None
        self._room = 0

    def admit(self) -> tuple[list[Request], list[tuple[int, int]]]:
        """Starts waiting requests while there are slots, and pages for what they compute first.

        Returns:
            The requests that start, and (from, to) pages to be copied before their first step.
        """
        started: list[Request] = []
        copies: list[tuple[int, int]] = []
        put_off: list[Request] = []
        while self.waiting and self._free_slots and len(put_off) < _LOOK_AHEAD:
            request = self.waiting[0]
            if self.running and self.pool.available < self._pages_of(len(request.tokens)) + len(self.running):
                break
            self.waiting.popleft()
            if self._awaits_prefix(request) or self._awaits_adapter(request):
                put_off.append(request)
            else:
                copies += self._start(request)
                started.append(request)
        self.waiting.extendleft(reversed(put_off))
        return started, copies

    def next_step(self) -> Step | None:
        """The next step; None where nothing can run before results are read, or at all.

        Raises:
            NeedsResults: a page must be taken from a request whose last token is still on the device.
        """
        if self._last is not None and self._room > 0:
            self._room -= 1
            return replace(self._last, follows=True)
        self._last = None
        chosen = self._choose()
        while not self._give_pages(chosen):
            if any(request.in_flight for request in self.running.values()):
                raise NeedsResults
            youngest = next(reversed(self.running.values()))
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            chosen = self._choose()
        if not chosen:
            return None
        samples = [place for place, (request, n) in enumerate(chosen) if request.cached + n == request.total]
        decodes = all(request.cached >= request.first for request, _ in chosen)
        return Step([request for request, _ in chosen], [n for _, n in chosen], samples, decodes)

    def launched(self, step: Step) -> None:
        """Notes that a step is on its way: what it writes can be read by the next."""
        for request, length in zip(step.requests, step.lengths, strict=True):
            prompt = request.cached < request.first
            request.cached += length
            if prompt:
                self._publish(request)
        for place in step.samples:
            step.requests[place].in_flight += 1
        if step.decodes:
            self._last = step

    def read(self, step: Step, tokens: Sequence[int], logprobs: Sequence[float]) -> list[tuple[Request, int]]:
        """Takes over what a step has sampled; returns the requests that are still there, and their tokens."""
        found = []
        for place, token, logprob in zip(step.samples, tokens, logprobs, strict=True):
            request = step.requests[place]
            # It may have ended with the token before, which the host had not read when this step was launched.
            if not request.finished:
                request.in_flight -= 1
                request.tokens.append(token)
                request.logprobs.append(logprob)
                found.append((request, token))
        return found

    def finish(self, request: Request) -> None:
        """Ends a request and releases its pages: a step in flight writes there ahead of whoever takes them next."""
        request.finished = True
        if request.slot >= 0:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    # -- slots and pages ----------------------------------------------------------------------------------------------

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether a running request is computing pages that this one can share once they are written."""
        size = self.pool.page_size
        wanted = request.tokens[:-1]
        return any(
            other.cached < common(wanted, other.tokens) // size * size
            for other in self.running.values()
            if other.cached < other.first and other.adapter == request.adapter
        )

    def _awaits_adapter(self, request: Request) -> bool:
        """Whether the running requests use as many other adapters as fit the device at once."""
        if request.adapter is None or self.most_adapters is None:
            return False
        others = {other.adapter for other in self.running.values()} - {None, request.adapter}
        return len(others) >= self.most_adapters

    def _start(self, request: Request) -> list[tuple[int, int]]:
        slot = request.slot = self._free_slots.pop()
        self.running[slot], self._last = request, None
        pages, request.parent, source, tokens = self.pool.match(request.tokens, request.adapter)
        request.pages, request.published, request.first = pages, len(pages), len(request.tokens)
        request.cached = len(pages) * self.pool.page_size
        self.table[slot, : len(pages)] = [page.number for page in pages]
        if source is None or not self.pool.available:
            return []
        self._grow(request, len(pages) + 1)
        request.cached = tokens
        return [(source.number, request.pages[-1].number)]

    def _leave(self, request: Request) -> None:
        # Whoever continues it, or it itself once it is computed again, finds what it has computed.
        self._publish(request)
        del self.running[request.slot]
        self._last = None
        self.pool.release(request.pages)
        self._free_slots.append(request.slot)
        request.slot, request.pages, request.in_flight = -1, [], 0

    def _choose(self) -> list[tuple[Request, int]]:
        """Requests and the tokens of each that the next step has room for, those that decode first."""
        wanting = [(request.total - request.cached, request) for request in self.running.values()]
        # A request that has all its tokens only waits to be read.
        wanting = [(todo, request) for todo, request in wanting if request.total < request.limit]
        wanting.sort(key=lambda pair: pair[0] > 1)
        chosen, left = [], self.most_tokens
        for todo, request in wanting:
            if left > 0:
                chosen.append((request, min(todo, left)))
                left -= todo
        return chosen

    def _give_pages(self, chosen: Sequence[tuple[Request, int]]) -> bool:
        """Gives every request of a step the pages that its tokens need; False where there are too few."""
        needed = [self._pages_of(request.cached + n) for request, n in chosen]
        # Ahead for those that decode from now on.
        counts = [
            self._pages_of(min(request.cached + n + _AHEAD, request.limit))
            if request.cached + n == request.total
            else least
            for (request, n), least in zip(chosen, needed, strict=True)
        ]
        if self._lacks(chosen, counts) + len(self.running) > self.pool.available:
            counts = needed
            if self._lacks(chosen, counts) > self.pool.available:
                self._take_back()
                if self._lacks(chosen, counts) > self.pool.available:
                    return False
        self._room = 1 << 30
        for (request, n), count in zip(chosen, counts, strict=True):
            self._grow(request, count)
            on_pages = len(request.pages) * self.pool.page_size - request.cached - n
            self._room = min(self._room, on_pages, request.limit - request.total - 1)
        return True

    def _lacks(self, chosen: Sequence[tuple[Request, int]], counts: Sequence[int]) -> int:
        return sum(max(0, n - len(request.pages)) for (request, _), n in zip(chosen, counts, strict=True))

    def _grow(self, request: Request, count: int) -> None:
        for place in range(len(request.pages), count):
            page = self.pool.take()
            self.table[request.slot, place] = page.number
            request.pages.append(page)

    def _take_back(self) -> None:
        """Takes pages ahead from requests that have some."""
        for request in self.running.values():
            kept = self._pages_of(request.cached)
            self.pool.release(request.pages[kept:])
            del request.pages[kept:]

    def _publish(self, request: Request) -> None:
        """Indexes pages of known tokens that are full; of a prompt, the last one too, for others to copy from."""
        size, tokens = self.pool.page_size, request.tokens
        cached = min(request.cached, len(tokens))
        start = request.published * size
        while start + size <= cached:
            page = request.pages[request.published]
            request.parent = self.pool.publish(request.parent, page, tokens[start : start + size])
            request.published, start = request.published + 1, start + size
        if start < cached == len(tokens) == len(request.prompt):
            self.pool.publish_partial(request.parent, request.pages[request.published], tokens[start:cached])

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)
