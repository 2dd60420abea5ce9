"""Requests that are generated together: one call a step, tokens read one step late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...batch import Batch
from ...errors import GenerationError, OptionsError, message
from ...step import step
from .engine import ROWS, Engine, routers_of
from .pages import PagePool
from .requests import Request
from .scheduler import NeedsResults, ScheduledStep, Scheduler

__all__ = ["Session"]


class _Launched(NamedTuple):
    """A step on its way. result: ``[2, rows]`` on the host once the event is over."""

    step: ScheduledStep
    result: Any
    event: torch.cuda.Event | None


class Session:
    """Requests that are generated together. Use it as a context manager: its pages go back at the end.

    ``add`` requests at any time, then iterate over :meth:`run`, which ends when nothing is left to do::

        with Session(engine, tokenizer=tokenizer) as session:
            session.add(request)
            for request, token in session.run():
                ...
    """

    def __init__(self, engine: Engine, most_length: int, tokenizer: Any = None) -> None:
        if engine.busy:
            raise GenerationError(
                message("the model is generating already", why="Its cache serves one session at a time.",
                        cure="Add the requests to the running session, or wait for it to end.")
            )  # fmt: skip
        self.engine, self.tokenizer = engine, tokenizer
        self.pool = PagePool(engine.cache)
        adapters = min((router.max_adapters for router in routers_of(engine.model)), default=None)
        self.scheduler = Scheduler(self.pool, engine.slots, engine.most_tokens, most_length, adapters)
        self.requests: dict[str, Request] = {}
        self._in_flight: _Launched | None = None
        self._ended: deque[Request] = deque()
        #: What requests so far need of the sampler: few variants of the step are compiled.
        self._variant, self._adapted = (False, False, False), False
        #: The last step's batch and rows, for a step that follows it.
        self._batch: Batch | None = None
        self._rows: torch.Tensor | None = None
        engine.busy = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives every page back; requests that have not finished are lost."""
        if self.engine.busy and self.pool.capacity:
            self.pool.close()
            self.engine.busy = False

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            OptionsError: it can never fit the cache.
        """
        room = self.pool.capacity * self.pool.page_size
        if len(request.prompt) + request.most > min(room, self.scheduler.most_length):
            raise OptionsError(
                message(
                    f"prompt {request.index} has {len(request.prompt)} tokens and wants {request.most} more; "
                    f"the cache holds {room}",
                    cure="Pass fewer max_new_tokens, or more num_pages.",
                )
            )
        self.requests[request.id] = request
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request with what it has. Unknown or finished ones are left alone."""
        request = self.requests.get(request_id)
        if request is not None and not request.finished:
            self._finish(request)

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends a request with an error; the others go on."""
        request.error = error
        self._finish(request)

    def run(self, tokens: bool = True) -> Iterator[tuple[Request, int | None]]:
        """Runs steps until nothing is left; yields each request with each new token, and with None when it ends.

        A step is launched before the tokens of the one before are read. ``tokens=False`` yields ends alone: then no
        step looks at each request by itself.
        """
        while True:
            launched = self._launch_next()
            last, self._in_flight = self._in_flight, launched
            if last is not None:
                yield from self._read(last, tokens)
            while self._ended:
                yield self._ended.popleft(), None
            if launched is None and last is None and not self.scheduler.running:
                if not self.scheduler.waiting:
                    return
                if not self.pool.available:
                    raise AssertionError("requests wait, and none can start")

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch_next(self) -> _Launched | None:
        scheduler = self.scheduler
        try:
            scheduled = scheduler.next_step()
        except NeedsResults:
            return None
        if scheduled is None:
            return None
        try:
            launched = self._launch(scheduled)
        except Exception as error:
            # Whatever a model raises in a step is the error of that step's requests; the others go on.
            for slot in scheduled.slots.tolist():
                self.fail(scheduler.running[slot], error)
            return None
        scheduler.launched(scheduled)
        return launched

    def _launch(self, scheduled: ScheduledStep) -> _Launched | None:
        engine, state = self.engine, self.engine.state
        if scheduled.admitted:
            self._admit(scheduled.admitted)
        if scheduled.copies:
            engine.copy_pages(scheduled.copies)
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

    def _admit(self, requests: Sequence[Request]) -> None:
        now = time.perf_counter()
        for request in requests:
            request.started, one = now if request.started < 0 else request.started, request.sampling
            needs = (one.temperature > 0, one.filters, one.penalty != 1)
            self._variant = tuple(a or b for a, b in zip(self._variant, needs, strict=True))  # type: ignore[assignment]
            self._adapted = self._adapted or request.adapter is not None
        self.engine.admit(requests)

    def _new_batch(self, scheduled: ScheduledStep) -> tuple[Batch, torch.Tensor]:
        """The batch of a step, its ids included, and its rows on the device."""
        scheduler, slots, lengths, cached = self.scheduler, scheduled.slots, scheduled.lengths, scheduled.cached
        ends = lengths.cumsum()
        if scheduled.decodes:
            ids = -1 - slots
        else:
            starts = ends - lengths
            at = np.arange(ends[-1]) + (cached - starts).repeat(lengths)
            ids = scheduler.ids[slots.repeat(lengths), at]
            on_device = cached >= scheduler.known[slots]
            ids[starts[on_device]] = -1 - slots[on_device]
        running = scheduler.running
        adapters = [running[slot].adapter for slot in slots.tolist()] if self._adapted else None
        pages = scheduler.pages[slots]
        batch = Batch(
            lengths, cached + lengths, scheduler.table[slots, : int(pages.max())], adapters=adapters,
            page_counts=pages, ids=ids,
        )  # fmt: skip
        # A step whose prompts all go on samples nothing; its first row keeps the graph's form.
        samples = scheduled.samples if len(scheduled.samples) else np.zeros(1, dtype=np.int64)
        if not scheduled.decodes:
            rows = next((n for n in ROWS if n >= len(samples)), len(samples))
            samples = np.concatenate([samples, samples[:1].repeat(min(rows, self.engine.slots) - len(samples))])
        return batch, self.engine.send(np.stack([ends[samples] - 1, slots[samples]]))

    # -- results ------------------------------------------------------------------------------------------------------

    def _read(self, launched: _Launched, each: bool) -> Iterator[tuple[Request, int | None]]:
        if launched.event is not None:
            launched.event.synchronize()
        scheduler, count = self.scheduler, len(launched.step.samples)
        tokens, logprobs = launched.result[0, :count], launched.result[1, :count].astype(np.int32).view(np.float32)
        slots, tokens, ending = scheduler.read(launched.step, tokens, logprobs)
        requests = {slot: scheduler.running[slot] for slot in slots[ending].tolist()}
        if self.tokenizer is not None:
            for slot in slots.tolist():
                if self._stops(request := scheduler.running[slot]):
                    requests[slot] = request
        pairs = zip(slots.tolist(), tokens.tolist(), strict=True) if each else ()
        told = [(scheduler.running[slot], token) for slot, token in pairs]
        for request in requests.values():
            self._finish(request)
        yield from told

    def _stops(self, request: Request) -> bool:
        if not request.stops:
            return False
        text = self.tokenizer.decode(request.generated)
        return any(stop in text for stop in request.stops)

    def _finish(self, request: Request) -> None:
        request.ended = time.perf_counter()
        self.scheduler.finish(request)
        self._ended.append(request)
