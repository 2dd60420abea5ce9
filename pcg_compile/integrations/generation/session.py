"""Requests that are generated together: one call a step, tokens read one step late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ...batch import Batch
from ...errors import GenerationError, OptionsError, message
from ...step import step
from .engine import ROWS, Engine, routers_of
from .pages import PagePool
from .ranks import Ending
from .requests import Request
from .scheduler import NeedsResults, Scheduler, Step

__all__ = ["Session"]


class _Launched(NamedTuple):
    """A step on its way. result: ``[2, rows]`` on the host once the event is over."""

    step: Step
    result: Any
    event: torch.cuda.Event | None


class Session:
    """Requests that are generated together. Use it as a context manager: its pages go back at the end.

    ``add`` requests at any time, then iterate over :meth:`run`, which ends when nothing is left to do::

        with Session(engine, most_length=256) as session:
            session.add(request)
            for request, token in session.run():
                ...

    Args:
        most_length: tokens of a request at the most, its prompt included.
        tokenizer: for requests with stop strings.
    """

    def __init__(self, engine: Engine, most_length: int, tokenizer: Any = None) -> None:
        if engine.busy:
            raise GenerationError(
                message("the model is generating already", why="Its cache serves one session at a time.",
                        cure="Add the requests to the running session, or wait for it to end.")
            )  # fmt: skip
        engine.begin()
        self.engine, self.tokenizer, self._open = engine, tokenizer, True
        self.pool = PagePool(engine.cache)
        adapters = min((router.max_adapters for router in routers_of(engine.model)), default=None)
        self.scheduler = Scheduler(self.pool, engine.slots, engine.most_tokens, most_length, adapters)
        self.requests: dict[str, Request] = {}
        self._in_flight: _Launched | None = None
        self._ended: deque[Request] = deque()
        self._endings: list[Ending] = []
        #: What requests so far need of the sampler, and whether one had an adapter: few variants are compiled.
        self._variant, self._adapted = (False, False, False), False
        #: The last step's batch and rows, for a step that follows it.
        self._batch: Batch | None = None
        self._rows: torch.Tensor | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives every page back; requests that have not finished are lost."""
        if self._open:
            self._open = False
            self.pool.close()
            self.engine.end()

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            OptionsError: it can never fit the cache.
        """
        room = self.pool.capacity * self.pool.page_size
        if request.limit > min(room, self.scheduler.most_length):
            raise OptionsError(
                message(
                    f"prompt {request.index} has {len(request.prompt)} tokens and wants {request.most} more; "
                    f"the cache holds {room}",
                    cure="Pass fewer max_new_tokens, or more num_pages.",
                )
            )
        self.requests[request.id] = request
        self.scheduler.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request with what it has, ahead of the next step. Unknown or finished ones are left alone."""
        self._endings.append((request_id, None))

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends a request with an error, ahead of the next step; the others go on."""
        self._endings.append((request.id, error))

    def run(self, tokens: bool = True) -> Iterator[tuple[Request, int | None]]:
        """Runs steps until nothing is left; yields each request with each new token, and with None when it ends.

        A step is launched before the tokens of the one before are read. ``tokens=False`` yields ends alone.
        """
        while True:
            launched = self._launch_next()
            last, self._in_flight = self._in_flight, launched
            if last is not None:
                read = self._read(last)
                yield from read if tokens else ()
            while self._ended:
                yield self._ended.popleft(), None
            # A rank where a step failed has none to read: whether it is over must not depend on that.
            idle = launched is None and not self.scheduler.running and not self.scheduler.waiting
            if idle and not self._end_some():
                return

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch_next(self) -> _Launched | None:
        self._end_some()
        concerned: list[Request] = []
        try:
            concerned, copies = self.scheduler.admit()
            if concerned:
                self._admit(concerned, copies)
            scheduled = self.scheduler.next_step()
            if scheduled is None:
                return None
            concerned = list(scheduled.requests)
            launched = self._launch(scheduled)
            self.scheduler.launched(scheduled)
            return launched
        except NeedsResults:
            return None
        except Exception as error:
            # What a model raises in a step is the error of that step's requests; the others go on.
            if not concerned:
                raise
            for request in concerned:
                self.fail(request, error)
            return None

    def _end_some(self) -> bool:
        """Ends what was cancelled or has failed, here or on another rank; whether there was anything."""
        endings, self._endings = self.engine.ranks.share(self._endings), []
        for name, error in endings:
            request = self.requests.get(name)
            if request is None:
                continue
            if error is not None:
                request.error = request.error or error
                # Ranks may have come to different places in a step that failed.
                self.pool.forget()
            if not request.finished:
                self._finish(request)
        return bool(endings)

    def _admit(self, requests: list[Request], copies: list[tuple[int, int]]) -> None:
        now = time.perf_counter()
        for request in requests:
            request.started = now if request.started < 0 else request.started
            a, b, c = (x or y for x, y in zip(self._variant, request.sampling.needs, strict=True))
            self._variant, self._adapted = (a, b, c), self._adapted or request.adapter is not None
        self.engine.admit(requests, copies)

    def _launch(self, scheduled: Step) -> _Launched | None:
        engine, state = self.engine, self.engine.state
        if scheduled.follows and self._batch is not None:
            batch = self._batch.advance()
        else:
            self._batch = None
            batch, self._rows = self._new_batch(scheduled)
        rows, samples = self._rows, len(scheduled.samples)
        assert rows is not None
        with step(batch, engine.cache):
            result = engine.forward(*self._variant)(
                batch.ids, batch.positions, rows[0], rows[1], state.last, state.floats, state.longs, state.seen
            )
            if samples:
                chosen, slots = result[0], rows[1]
                if samples < rows.shape[1]:
                    chosen, slots = chosen[:samples], slots[:samples]
                state.last.index_copy_(0, slots, chosen)
                if self._variant[2]:
                    state.seen[slots, chosen] = True
        self._batch = batch if scheduled.decodes else None
        return _Launched(scheduled, *engine.take_result(result)) if samples else None

    def _new_batch(self, scheduled: Step) -> tuple[Batch, torch.Tensor]:
        """The batch of a step, its ids included, and its rows on the device."""
        requests, table = scheduled.requests, self.scheduler.table
        slots = np.array([request.slot for request in requests])
        lengths = np.array(scheduled.lengths)
        cached = np.array([request.cached for request in requests])
        pages = np.array([len(request.pages) for request in requests])
        ids: list[int] = []
        for request, length in zip(requests, scheduled.lengths, strict=True):
            if request.cached >= request.first:
                # Sampled: it is on the device, whether or not the host has read it.
                ids.append(-1 - request.slot)
            else:
                ids += request.tokens[request.cached : request.cached + length]
        batch = Batch(
            lengths, cached + lengths, table[slots, : int(pages.max())], page_counts=pages, ids=np.array(ids),
            adapters=[request.adapter for request in requests] if self._adapted else None,
        )  # fmt: skip
        # A step whose prompts all go on samples nothing; its first row keeps the graph's form.
        samples = list(scheduled.samples) or [0]
        if not scheduled.decodes:
            rows = next((n for n in ROWS if n >= len(samples)), len(samples))
            samples += samples[:1] * (min(rows, self.engine.slots) - len(samples))
        return batch, self.engine.send(np.stack([lengths.cumsum()[samples] - 1, slots[samples]]))

    # -- results ------------------------------------------------------------------------------------------------------

    def _read(self, launched: _Launched) -> list[tuple[Request, int]]:
        if launched.event is not None:
            launched.event.synchronize()
        count = len(launched.step.samples)
        logprobs = launched.result[1, :count].astype(np.int32).view(np.float32)
        read = self.scheduler.read(launched.step, launched.result[0, :count].tolist(), logprobs.tolist())
        for request, token in read:
            if len(request.tokens) >= request.limit or token in request.ends or self._stops(request):
                self._finish(request)
        return read

    def _stops(self, request: Request) -> bool:
        if not request.stops:
            return False
        # A token has a byte at least, so a stop string lies in the last tokens; some more for characters cut in two.
        most = max(len(stop.encode()) for stop in request.stops) + 8
        text = self.tokenizer.decode(request.generated[-most:])
        return any(stop in text for stop in request.stops)

    def _finish(self, request: Request) -> None:
        request.ended = time.perf_counter()
        self.scheduler.finish(request)
        self._ended.append(request)
