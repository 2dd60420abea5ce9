"""Runs a transformers model on continuous batches: the model and the sampler are one captured step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ...attention import PagedKVCache
from ...lora.adapted import routers_of
from ...piecewise import piecewise
from ...runtime.buckets import default_table
from .merging import MergedLayers
from .ranks import Ranks
from .requests import Request
from .sampler import SamplingState, make_sampler

__all__ = ["ROWS", "Engine", "attending_through_pcg", "routers_of"]

#: Rows that steps with prompts sample, at the least: few numbers, so few combinations with tokens are captured.
ROWS = (16, 64, 256, 1024)
#: Buckets for many requests that decode, beside the powers of two: attention and the vocabulary follow their number.
_BUCKETS = (160, 192, 224)
#: Steps under way, at the most, whose results have host memory.
_RESULTS = 4


class Engine:
    """A model compiled for generation, with the cache that its captured graphs read. It outlives a session.

    Weights that change in place, by an optimizer's step or ``load_state_dict``, are used by the next step: captured
    graphs read them where they lie.

    Args:
        slots: requests that run at once. most_tokens: tokens of a step. options: of the backend.
    """

    def __init__(self, model: Any, cache: PagedKVCache, slots: int, most_tokens: int, options: dict[str, Any]) -> None:
        self.model, self.cache, self.slots, self.most_tokens = model, cache, slots, most_tokens
        self.options = options
        self.device = cache.device
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.state = SamplingState(slots, self.device)
        self.busy = False
        self.ranks = Ranks.of(model)
        self._merged = MergedLayers(model)
        self._picks_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._forwards: dict[tuple[bool, bool, bool], Callable[..., torch.Tensor]] = {}
        pinned, size = self.device.type == "cuda", 2 * max(slots, ROWS[0])
        self._results = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(_RESULTS)]

    def begin(self) -> None:
        """Makes the model ready for steps."""
        self.busy = True
        self._merged.install()

    def end(self) -> None:
        """Leaves the model as it was."""
        self.busy = False
        self._merged.remove()

    def forward(self, draws: bool = False, filters: bool = False, penalizes: bool = False) -> Callable[..., Any]:
        """The captured step, model and sampler in one, for requests that need only so much of the sampler.

        It takes ``ids [tokens]`` (one below 0 stands for the last token of slot -1 - id), ``positions [tokens]``,
        ``rows [rows]`` and ``slots [rows]`` (which tokens are followed by a sampled one, and their slots), ``last`` and
        the sampler's ``floats``, ``longs`` and ``seen``. It returns ``[2, rows]`` int64, tokens and the bits of their
        log probabilities.
        """
        key = (draws, filters, penalizes)
        if key in self._forwards:
            return self._forwards[key]
        merged, sample, picks_rows = self._merged, make_sampler(*key), self._picks_rows

        def forward(
            ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, last: torch.Tensor,
            floats: torch.Tensor, longs: torch.Tensor, seen: torch.Tensor,
        ) -> torch.Tensor:  # fmt: skip
            ids = torch.where(ids < 0, last[(-1 - ids).clamp_min(0)], ids)
            keep = {"logits_to_keep": rows} if picks_rows else {}
            logits = merged.forward(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep).logits[
                0
            ]
            logits = logits if picks_rows else logits[rows]
            chosen, logprobs = sample(logits, slots, positions[rows] + 1, floats, longs, seen)
            return torch.stack([chosen, logprobs.view(torch.int32).long()])

        dynamic = {"ids": 0, "positions": 0, "rows": 0, "slots": 0}
        buckets = sorted({*default_table(self.options.get("max_tokens", self.most_tokens)), *_BUCKETS})
        options = {"buckets": buckets, **self.options} if buckets[-1] > _BUCKETS[-1] else self.options
        self._forwards[key] = piecewise(dynamic=dynamic, guards="inputs", **options)(_of_one_model(forward))
        return self._forwards[key]

    def send(self, array: Any) -> torch.Tensor:
        """An int64 array on the device, by way of pinned memory."""
        values = np.ascontiguousarray(array, dtype=np.int64)
        target = torch.empty(values.shape, dtype=torch.int64, device=self.device)
        self.cache.staging.send(values, target)
        return target

    def admit(self, requests: Sequence[Request], copies: Sequence[tuple[int, int]]) -> None:
        """Brings sampling settings of requests to their slots, and copies pages, (from, to), in all layers."""
        state, staging = self.state, self.cache.staging
        for request in requests:
            state.set(request.slot, request.sampling, self.vocabulary)
        staging.send(state.host_floats, state.floats)
        staging.send(state.host_longs, state.longs)
        if any(request.sampling.penalty != 1 for request in requests) and state.seen.shape[1] == 1:
            state.seen = torch.zeros(self.slots, self.vocabulary, dtype=torch.bool, device=self.device)
        if state.seen.shape[1] > 1:
            for request in requests:
                state.seen[request.slot] = False
                state.seen[request.slot, self.send(request.tokens)] = True
        if copies:
            source, target = self.send(np.array(copies).T)
            for pages in (*self.cache.k, *self.cache.v):
                pages.index_copy_(0, target, pages.index_select(0, source))

    def take_result(self, result: torch.Tensor) -> tuple[Any, torch.cuda.Event | None]:
        """A step's result on its way to the host: an array, and the event after which it is there."""
        if self.device.type == "cpu":
            return result.numpy(), None
        memory = self._results.pop(0)
        self._results.append(memory)
        host, event = memory[: result.numel()].view(result.shape), torch.cuda.Event()
        host.copy_(result, non_blocking=True)
        event.record()
        return host.numpy(), event


def _of_one_model(function: Any) -> Any:
    """The function, its code named like no other: Dynamo remembers by the name what changed from call to call.

    Another model's vocabulary or scale would make a dynamic size, or a changing float, of this one's.
    """
    function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{uuid4().hex}")
    return function


@contextmanager
def attending_through_pcg(model: Any) -> Iterator[None]:
    """The model attends through pcg and is in eval mode inside; afterwards everything is as it was."""
    from ..transformers.early import served_model
    from ..transformers.trial import prove

    config = model.config.get_text_config()
    before, use_cache = model.config._attn_implementation, config.use_cache
    training = [module for module in model.modules() if module.training]
    try:
        if before != "pcg":
            model.set_attn_implementation("pcg")
        model.eval()
        # Ahead of the first trace: a model is tried outside of graphs.
        prove(served_model(model))
        yield
    finally:
        if before != "pcg":
            model.set_attn_implementation(before)
        config.use_cache = use_cache
        for module in training:
            module.training = True
