"""Runs a transformers model on continuous batches: one call a step, tokens read one step late."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ...attention import PagedKVCache
from ...batch import Batch, step
from ...errors import GenerationError, OptionsError, message
from ...piecewise import piecewise
from .pages import PagePool
from .sampler import SamplingState, make_sampler
from .scheduler import NeedsResults, Request, ScheduledStep, Scheduler

__all__ = ["Engine", "Session", "attending_through_pcg", "routers_of"]

#: Steps whose host arrays may still be on their way to the device.
_STAGING = 4


class Engine:
    """A model compiled for generation, with the cache that its captured graphs read. It outlives a session.

    Weights that change in place, by an optimizer's step or ``load_state_dict``, are used by the next step: captured
    graphs read them where they lie.
    """

    def __init__(self, model: Any, cache: PagedKVCache, slots: int, most_tokens: int, options: dict[str, Any]) -> None:
        self.model, self.cache, self.slots, self.most_tokens = model, cache, slots, most_tokens
        self.options = options
        self.device = cache.device
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.state = SamplingState.empty(slots, self.device)
        self.host_state = SamplingState.empty(slots, torch.device("cpu"))
        self.busy = False
        picks_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters

        def forward(
            ids: torch.Tensor, source: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, last: torch.Tensor
        ) -> torch.Tensor:
            """Logits ``[rows, vocabulary]``. ``source``: the slot whose last token stands in for an id, or -1."""
            ids = torch.where(source < 0, ids, last[source.clamp_min(0)])
            keep = {"logits_to_keep": rows} if picks_rows else {}
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep).logits[0]
            return logits if picks_rows else logits[rows]

        dynamic = {"ids": 0, "source": 0, "positions": 0, "rows": 0}
        self.forward = piecewise(dynamic=dynamic, guards="inputs", **options)(_of_one_model(forward))
        self._samplers: dict[tuple[bool, bool, bool], Callable[..., Any]] = {}
        self._ring: deque[tuple[torch.Tensor, Any]] = deque()

    def sampler(self, sampling: bool, filtering: bool, penalizing: bool) -> Callable[..., Any]:
        """The captured sampler for batches that need only so much."""
        key = (sampling, filtering, penalizing)
        if key not in self._samplers:
            dynamic = {"logits": 0, "slots": 0, "counter": 0}
            self._samplers[key] = piecewise(dynamic=dynamic, guards="inputs", **self.options)(
                _of_one_model(make_sampler(*key))
            )
        return self._samplers[key]

    def to_device(self, *arrays: Any) -> list[torch.Tensor]:
        """int64 arrays on the device, brought there by one copy."""
        sizes = [len(array) for array in arrays]
        total = sum(sizes)
        if self.device.type == "cpu":
            return [torch.from_numpy(np.array(array, dtype=np.int64)) for array in arrays]
        if len(self._ring) == _STAGING:
            host, event = self._ring.popleft()
            event.synchronize()
            if host.numel() < total:
                host = torch.empty(total, dtype=torch.int64, pin_memory=True)
        else:
            host, event = torch.empty(max(total, 1024), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        np.concatenate(arrays, out=host.numpy()[:total])
        device = host[:total].to(self.device, non_blocking=True)
        event.record()
        self._ring.append((host, event))
        return list(device.split(sizes))

    def admit(self, requests: Sequence[Request]) -> None:
        """Brings the sampling settings of requests to their slots."""
        host = self.host_state
        for request in requests:
            slot, settings = request.slot, request.sampling
            host.temperature[slot], host.top_p[slot], host.min_p[slot] = (
                settings.temperature, settings.top_p, settings.min_p,
            )  # fmt: skip
            host.top_k[slot] = min(settings.top_k or self.vocabulary, self.vocabulary)
            host.penalty[slot], host.seed[slot] = settings.penalty, settings.seed
        for name in ("temperature", "top_k", "top_p", "min_p", "penalty", "seed"):
            getattr(self.state, name).copy_(getattr(host, name))
        if any(request.sampling.penalty != 1 for request in requests) and self.state.seen.shape[1] == 1:
            self.state.seen = torch.zeros(self.slots, self.vocabulary, dtype=torch.bool, device=self.device)
        if self.state.seen.shape[1] > 1:
            for request in requests:
                self.state.seen[request.slot] = False
                self.state.seen[request.slot, torch.tensor(request.tokens, device=self.device)] = True

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies pages in all layers."""
        source, target = self.to_device(*np.array(copies, dtype=np.int64).T)
        for pages in (*self.cache.k, *self.cache.v):
            pages.index_copy_(0, target, pages.index_select(0, source))


def _of_one_model(function: Any) -> Any:
    """The function, its code named like no other: Dynamo remembers by the name what changed from call to call.

    Another model's vocabulary or scale would make a dynamic size, or a changing float, of this one's.
    """
    function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{uuid4().hex}")
    return function


class _Launched:
    """A step on its way: its sampled tokens, and when they can be read."""

    def __init__(self, step: ScheduledStep, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        self.requests = [step.requests[i] for i in step.samples.tolist()]
        self.event = None
        if tokens.device.type == "cuda":
            self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.logprobs = torch.empty(logprobs.shape, dtype=logprobs.dtype, pin_memory=True)
            self.tokens.copy_(tokens, non_blocking=True)
            self.logprobs.copy_(logprobs, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.tokens, self.logprobs = tokens, logprobs

    def read(self) -> tuple[list[int], list[float]]:
        """Tokens and log probabilities by request; waits for the step."""
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist(), self.logprobs.tolist()


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
        self._last: _Launched | None = None
        self._events: deque[tuple[Request, int | None]] = deque()
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
        if len(request.prompt) + request.most > min(room, self.scheduler.table.shape[1] * self.pool.page_size):
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

    def run(self) -> Iterator[tuple[Request, int | None]]:
        """Runs steps until nothing is left; yields each request with each new token, and with None when it ends."""
        while True:
            launched = self._launch_next()
            last, self._last = self._last, launched
            if last is not None:
                self._read(last)
            while self._events:
                yield self._events.popleft()
            if launched is None and last is None and not self.scheduler.running:
                if not self.scheduler.waiting:
                    return
                if not self._can_start():
                    raise AssertionError("requests wait, and none can start")

    def _can_start(self) -> bool:
        return bool(self.pool.available)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch_next(self) -> _Launched | None:
        try:
            scheduled = self.scheduler.next_step()
        except NeedsResults:
            return None
        if scheduled is None:
            return None
        now = time.perf_counter()
        for request in scheduled.admitted:
            request.started = now if request.started < 0 else request.started
        try:
            launched = self._launch(scheduled)
        except Exception as error:
            # Whatever a model raises in a step is the error of that step's requests; the others go on.
            for request in scheduled.requests:
                self.fail(request, error)
            return None
        self.scheduler.launched(scheduled)
        return launched

    def _launch(self, scheduled: ScheduledStep) -> _Launched | None:
        engine, lengths = self.engine, scheduled.lengths
        if scheduled.admitted:
            engine.admit(scheduled.admitted)
        if scheduled.copies:
            engine.copy_pages(scheduled.copies)
        adapters = [request.adapter for request in scheduled.requests] if self._adapted(scheduled) else None
        pages = -(-int((scheduled.cached + lengths).max()) // self.pool.page_size)
        batch = Batch(
            lengths, scheduled.cached + lengths, self.scheduler.table[scheduled.slots, :pages], adapters=adapters
        )
        ids, source = self._ids(scheduled)
        ends = lengths.cumsum() - 1
        samples = scheduled.samples
        # A step whose prompts all go on samples nothing; its first row keeps the graph's form.
        rows, slots = (ends[samples], scheduled.slots[samples]) if len(samples) else (ends[:1], scheduled.slots[:1])
        counter = (scheduled.cached + lengths)[samples] if len(samples) else lengths[:1]
        device_ids, device_source, device_rows, device_slots, device_counter = engine.to_device(
            ids, source, rows, slots, counter
        )
        with step(batch, engine.cache):
            logits = engine.forward(device_ids, device_source, batch.positions, device_rows, engine.state.last)
        if not len(samples):
            return None
        chosen = [scheduled.requests[i].sampling for i in samples.tolist()]
        state = engine.state
        sample = engine.sampler(
            any(s.temperature > 0 for s in chosen), any(s.filters for s in chosen), any(s.penalty != 1 for s in chosen)
        )
        with torch.no_grad():
            tokens, logprobs = sample(
                logits, device_slots, device_counter, state.temperature, state.top_k, state.top_p, state.min_p,
                state.penalty, state.seed, state.seen,
            )  # fmt: skip
            state.last.index_copy_(0, device_slots, tokens)
            if state.seen.shape[1] > 1:
                state.seen[device_slots, tokens] = True
        return _Launched(scheduled, tokens, logprobs)

    def _adapted(self, scheduled: ScheduledStep) -> bool:
        return any(request.adapter is not None for request in scheduled.requests)

    def _ids(self, scheduled: ScheduledStep) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and for tokens that only the device knows the slot that sampled them (else -1)."""
        scheduler, lengths = self.scheduler, scheduled.lengths
        total = int(lengths.sum())
        ids, source = np.zeros(total, dtype=np.int64), np.full(total, -1, dtype=np.int64)
        starts = lengths.cumsum() - lengths
        on_device = scheduled.cached >= scheduler.known[scheduled.slots]
        source[starts[on_device]] = scheduled.slots[on_device]
        for place in np.flatnonzero(~on_device).tolist():
            request, start = scheduled.requests[place], int(starts[place])
            first, length = int(scheduled.cached[place]), int(lengths[place])
            ids[start : start + length] = request.tokens[first : first + length]
        return ids, source

    # -- results ------------------------------------------------------------------------------------------------------

    def _read(self, launched: _Launched) -> None:
        tokens, logprobs = launched.read()
        for request, token, logprob in zip(launched.requests, tokens, logprobs, strict=True):
            if request.finished:
                # It ended with the token before, which the host had not read when this step was launched.
                continue
            self.scheduler.read(request, token, logprob)
            self._events.append((request, token))
            if token in request.ends or len(request.logprobs) >= request.most or self._stops(request):
                self._finish(request)

    def _stops(self, request: Request) -> bool:
        if not request.stops:
            return False
        text = self.tokenizer.decode(request.generated)
        return any(stop in text for stop in request.stops)

    def _finish(self, request: Request) -> None:
        request.ended = time.perf_counter()
        self.scheduler.finish(request)
        self._events.append((request, None))


def routers_of(model: Any) -> list[Any]:
    """The routers of the adapter pools that a model's layers belong to."""
    routers = (getattr(module, "pcg_lora_router", None) for module in model.modules())
    return list({id(router): router for router in routers if router is not None}.values())


@contextmanager
def attending_through_pcg(model: Any) -> Iterator[None]:
    """The model attends through pcg and is in eval mode inside; afterwards everything is as it was."""
    from ..transformers.known import outermost
    from ..transformers.trial import prove

    config = model.config.get_text_config()
    before, use_cache = model.config._attn_implementation, config.use_cache
    training = [module for module in model.modules() if module.training]
    try:
        if before != "pcg":
            model.set_attn_implementation("pcg")
        model.eval()
        # Ahead of the first trace: a model is tried outside of graphs.
        prove(outermost(model))
        yield
    finally:
        if before != "pcg":
            model.set_attn_implementation(before)
        config.use_cache = use_cache
        for module in training:
            module.training = True
