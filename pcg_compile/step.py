"""Where a step begins and ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import torch

from .batch import Batch
from .errors import BatchError, message
from .running import RUNNING
from .step_state import DoesNotFit, StepState

if TYPE_CHECKING:
    from .attention.cache import PagedKVCache

__all__ = ["RUNNING", "DoesNotFit", "StepState", "current_step", "require_step", "scratch_step", "step"]

_LOG = logging.getLogger("pcg_compile")


@contextmanager
def step(batch: Batch, cache: PagedKVCache | None = None) -> Iterator[Batch]:
    """Runs model calls for a batch, without gradients.

    Args:
        batch: the requests. cache: where their keys and values lie; None for a model without paged attention.

    Raises:
        BatchError: a step is running already, the cache is in another step, the batch does not fit the cache.
    """
    if not isinstance(batch, Batch):
        name = type(batch).__name__
        raise BatchError(message(f"pcg.step() takes a Batch, not {name}", cure="Write: pcg.step(pcg.Batch(...))"))
    if cache is not None and not hasattr(cache, "slot_mapping"):
        raise BatchError(message(f"the cache of a step is a PagedKVCache, not {type(cache).__name__}"))
    if current_step() is not None:
        raise BatchError(message("a step is running already", cure="Leave it before you enter the next one."))
    if cache is not None:
        if not batch.has_pages:
            raise BatchError(
                message(
                    "the batch has no page table, and the step has a cache",
                    cure="Write: pcg.Batch(..., page_table=[[3, 4], ...])",
                )
            )
        cache.check_batch(batch)
        if not cache.step_lock.acquire(blocking=False):
            raise BatchError(
                message("the cache is in a step of another thread", why="A cache serves one step at a time.")
            )
    state = StepState(batch, cache, None)
    token = RUNNING.set(state)
    try:
        with torch.no_grad():
            yield batch
        if cache is not None and not state.used and not cache.warned:
            cache.warned = True
            _LOG.warning(
                "the step has a cache, and no attention used it: a model that attends in its own way takes the packed "
                'requests for one. Make it with pcg.PagedAttention, or with attn_implementation="pcg"'
            )
        if state.adapters_unread():
            _LOG.warning(
                "the batch names adapters, and no LoRA layer ran in its step: all requests got the base model. "
                "Make a pool first: pcg.lora.AdapterPool(model, ...)"
            )
    finally:
        # A generator that was abandoned inside the step may be closed by another task or thread, whose step it is not.
        with suppress(ValueError):
            RUNNING.reset(token)
        if cache is not None:
            cache.step_lock.release()
        state.close()


@contextmanager
def scratch_step(tokens: int, cache: PagedKVCache | None) -> Iterator[StepState]:
    """A step of padding alone, for capture: it writes no page but 0. Inside a step it takes its place."""
    running = current_step()
    if running is not None:
        running.used = True
    state = StepState(Batch.of_padding(tokens), cache, running, scratch=True)
    token = RUNNING.set(state)
    try:
        with torch.no_grad():
            yield state
    finally:
        RUNNING.reset(token)


def current_step() -> StepState | None:
    """The running step of this thread or task, or None."""
    state = cast("StepState | None", RUNNING.get())
    return None if state is None or state.closed else state


def require_step(what: str) -> StepState:
    """The running step.

    Raises:
        BatchError: none is running; ``what`` needs it.
    """
    state = current_step()
    if state is None:
        raise BatchError(
            message(
                f"{what} needs to know the batch, and no step is running",
                why="Lengths, pages and adapters of the requests come from the step, not from the call.",
                cure="Call it inside: with pcg.step(batch, cache):",
            )
        )
    return state
