"""The routing of a step on the device: which tokens belong to which adapter slot."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch

from ..errors import AdapterError, BatchError, message
from ..memory.staging import StagingRing
from .route import Routing, route, route_requests

if TYPE_CHECKING:
    from ..step_state import StepState


class SlotSource(Protocol):
    """What a router asks for the adapter slots of a batch: an adapter pool."""

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each request's adapter, -1 for the base model; adapters that are not resident become so."""
        ...

    def begin_step(self, slots: Sequence[int]) -> None:
        """Called when a step begins to use slots, which must not change until :meth:`end_step`."""

    def end_step(self, slots: Sequence[int]) -> None:
        """Called with the same slots when the step is over."""


class _Area:
    """Memory for so many rows, in static memory a power of two: ``seg_indptr``, and behind it ``permutation``."""

    def __init__(self, capacity: int, max_adapters: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.words = torch.zeros(capacity + max_adapters + 1, dtype=torch.int32, device=device)
            self.in_order = torch.arange(capacity, dtype=torch.int32, device=device)
        self.seg_indptr = self.words.narrow(0, 0, max_adapters + 1)
        self.permutation = self.words.narrow(0, max_adapters + 1, capacity)
        self.permutation.copy_(self.in_order)
        #: The slot of each token, where a graph asks for it.
        self.slots: torch.Tensor | None = None
        #: Whose routing it holds: (step, rows); step None: no token has an adapter, whatever the rows.
        self.owner: tuple[StepState | None, int] = (None, 0)
        #: The line of that step's batch, and the slots of its requests.
        self.line: object = None
        self.requests: Any = None

    def holds(self, state: StepState, slots: Any) -> bool:
        """Whether the batch has advanced from the one whose routing it holds."""
        owner = self.owner[0]
        return owner is not None and self.line is state.batch.line and np.array_equal(self.requests, slots)


#: Weak registry of routers by id: a graph names a pool's router by number. No number is given out twice: a graph may
#: outlive its pool, and must not find another's.
_ROUTERS: WeakValueDictionary[int, Router] = WeakValueDictionary()
_IDS = itertools.count(1)


class Router:
    """Knows the adapter slots of a step's requests, for one pool; once a step, whatever the number of layers."""

    #: Which adapters it has is nothing that a saved program compares; layouts say how many there may be.
    changes_in_calls = True

    def __init__(self, source: SlotSource, max_adapters: int, device: torch.device) -> None:
        self.source, self.max_adapters, self.device = source, max_adapters, device
        #: Held from the choice of slots until they are in use: another thread's load could give them away between.
        self.lock = threading.RLock()
        self.id = next(_IDS)
        self._memory_ids = itertools.count(1)
        #: By number, never given out twice; a graph keeps its own alive.
        self._memories: WeakValueDictionary[int, RoutingMemory | OneAdapterMemory] = WeakValueDictionary()
        _ROUTERS[self.id] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """What it is known by is its number, and its pool is there once; a layer that is copied whole lets go of it."""
        return self

    def new_memory(self) -> RoutingMemory:
        """Static memory for one more compiled graph."""
        memory = RoutingMemory(self, next(self._memory_ids))
        self._memories[memory.id] = memory
        return memory

    def new_memory_of_one(self, layers: Mapping[str, str]) -> OneAdapterMemory:
        """The same for layers whose rows are unknown, by name, with the reasons."""
        memory = OneAdapterMemory(self, next(self._memory_ids), layers)
        self._memories[memory.id] = memory
        return memory

    def memory(self, number: int) -> RoutingMemory | OneAdapterMemory:
        """The static memory that a graph names."""
        return self._memories[number]

    def routing(self, state: StepState | None, rows: int) -> Routing | None:
        """The routing of a step's ``rows`` tokens in memory of the step's own: another thread's step has others.

        Returns:
            None where every token is the base model's.

        Raises:
            BatchError: an unknown adapter, too many adapters, fewer rows than the batch has tokens.
        """
        slots = self.slots(state)
        if slots is None:
            return None
        assert state is not None

        def make() -> Routing:
            area = _Area(rows, self.max_adapters, self.device)
            self.fill(area, rows, state, slots, state.staging(self.device))
            return Routing(area.permutation, area.seg_indptr)

        return state.once(("lora", self.id, rows), make)

    def slots(self, state: StepState | None) -> Any:
        """The slot of each request, or of each token where they came as a tensor; None where all are the base's."""
        return None if state is None else state.once(("lora", self.id), lambda: self._slots(state))

    def _slots(self, state: StepState) -> Any:
        adapters = state.batch.adapters
        if adapters is None:
            return None
        if isinstance(adapters, torch.Tensor):
            used: Sequence[int] = range(self.max_adapters)
            slots: Any = adapters.to(self.device, non_blocking=True)
            self.source.begin_step(used)
        else:
            with self.lock:
                slots = np.asarray(self.source.slots_of(adapters), dtype=np.int64)
                if not (slots >= 0).any():
                    return None
                used = sorted(set(slots[slots >= 0].tolist()))
                self.source.begin_step(used)
        state.on_exit(lambda: self.source.end_step(used))
        return slots

    def fill(self, area: _Area, rows: int, state: StepState, slots: Any, staging: StagingRing) -> None:
        """Writes the routing of a step to an area.

        Raises:
            BatchError: fewer rows than the batch has tokens.
        """
        tokens = state.batch.num_tokens
        if rows < tokens:
            raise BatchError(
                message(
                    f"a LoRA layer sees {rows} rows, and the batch of the step has {tokens} tokens",
                    why="Which row belongs to which request is then unknown.",
                    cure="Leave layers behind a selection of rows, such as lm_head, out of target_modules.",
                )
            )
        if isinstance(slots, torch.Tensor):
            padded = torch.nn.functional.pad(slots, (0, rows - slots.shape[0]), value=-1)
            route(padded, self.max_adapters, Routing(area.permutation.narrow(0, 0, rows), area.seg_indptr))
            if area.slots is not None:
                area.slots.narrow(0, 0, rows).copy_(padded)
            return
        words = self.max_adapters + 1 + rows
        buffer = staging.take(4 * words)
        route_requests(state.batch.qo_lens, slots, self.max_adapters, buffer.word_array[:words])
        area.words.narrow(0, 0, words).copy_(buffer.words.narrow(0, 0, words), non_blocking=True)
        buffer.sent()
        if area.slots is not None:
            buffer = staging.take(4 * rows)
            by_token = buffer.word_array[:rows]
            by_token[:tokens], by_token[tokens:] = np.repeat(slots, state.batch.qo_lens), -1
            area.slots.narrow(0, 0, rows).copy_(buffer.words.narrow(0, 0, rows), non_blocking=True)
            buffer.sent()


class RoutingMemory:
    """The static memory that the captured graphs of one graph read their routing from.

    They read nothing else: which adapters a batch mixes, none included, changes no address, no shape and no key. See
    Note [one function for key and metadata]. A graph serves one call at a time; two graphs, in two threads, may be in
    steps of their own, so each has memory of its own.

    Note [one function for key and metadata]
    The only key that routing has is the number of rows. What is written for it comes from :meth:`prepare` alone.
    """

    def __init__(self, router: Router, number: int) -> None:
        #: Weakly: a graph may outlive the model, and a router has its pool's layers.
        self._router, self.id, self.max_adapters = weakref.ref(router), number, router.max_adapters
        self._areas: dict[int, _Area] = {}
        self._staging = StagingRing(router.device)

    def routing(self, rows: int) -> Routing:
        """Static ``permutation [rows]`` and ``seg_indptr [max_adapters + 1]`` int32; filled by :meth:`prepare`."""
        area = self._area(rows)
        return Routing(area.permutation.narrow(0, 0, rows), area.seg_indptr)

    def slots(self, rows: int) -> torch.Tensor:
        """Static ``[rows]`` int32, the slot of each token; :meth:`prepare` fills it once it was asked for."""
        area = self._area(rows)
        if area.slots is None:
            with torch.inference_mode(False):
                area.slots = torch.full_like(area.permutation, -1)
            # Whoever asks in a step has not been prepared for.
            area.owner = (area.owner[0], 0)
        return area.slots.narrow(0, 0, rows)

    def prepare(self, state: StepState | None, rows: int) -> None:
        """Fills the static memory for ``rows`` tokens, those of the batch first and padding behind them.

        Raises:
            BatchError: an unknown adapter, too many adapters, fewer rows than the batch has tokens.
        """
        router = _there(self._router())
        area, slots = self._area(rows), router.slots(state)
        if slots is None:
            if area.owner[0] is not None:
                area.seg_indptr.zero_()
                # Fewer rows than before: what the longer permutation begins with is none of theirs.
                area.permutation.copy_(area.in_order)
                if area.slots is not None:
                    area.slots.fill_(-1)
                area.owner = (None, 0)
            return
        assert state is not None
        # What is written for more rows begins with what fewer rows need; batches that advance keep their adapters.
        same = area.owner[1] >= rows and isinstance(slots, np.ndarray) and area.holds(state, slots)
        if not same and (area.owner[0] is not state or area.owner[1] < rows):
            router.fill(area, rows, state, slots, self._staging)
            area.owner, area.line, area.requests = (state, rows), state.batch.line, slots

    def _area(self, rows: int) -> _Area:
        capacity = max(16, 1 << (rows - 1).bit_length())
        area = self._areas.get(capacity)
        if area is None:
            area = self._areas[capacity] = _Area(capacity, self.max_adapters, self._staging.device)
        return area


class OneAdapterMemory:
    """The routing of layers whose rows cannot be told apart, for batches whose requests all have one adapter, or none.

    Then all that a graph computes is of that adapter, whatever the order and number of rows.
    """

    def __init__(self, router: Router, number: int, layers: Mapping[str, str]) -> None:
        self._router, self.id, self.max_adapters = weakref.ref(router), number, router.max_adapters
        self.layers, self.device = dict(layers), router.device
        #: Whether one of the layers cannot have adapters at all.
        self.never = False
        #: By number of rows.
        self._known: dict[int, Routing] = {}
        self._slot = -1

    def routing(self, rows: int) -> Routing:
        """Static ``permutation [rows]``, in order, and ``seg_indptr [max_adapters + 1]`` int32."""
        if rows not in self._known:
            with torch.inference_mode(False):
                order = torch.arange(rows, dtype=torch.int32, device=self.device)
                segments = torch.zeros(self.max_adapters + 1, dtype=torch.int32, device=self.device)
            self._known[rows] = Routing(order, segments)
            self._write(rows)
        return self._known[rows]

    def prepare(self, state: StepState | None, rows: int = 0) -> None:
        """Fills the static memory for a step.

        Raises:
            AdapterError: the requests of the batch have several adapters, or only the device knows which.
        """
        slots = _there(self._router()).slots(state)
        slot = -1
        if slots is not None:
            if self.never or isinstance(slots, torch.Tensor) or len(set(slots.tolist())) > 1:
                raise AdapterError(self._text())
            slot = int(slots[0])
        if slot != self._slot:
            self._slot = slot
            for known in self._known:
                self._write(known)

    def _write(self, rows: int) -> None:
        segments = self._known[rows].seg_indptr
        segments.zero_()
        if self._slot >= 0:
            segments[self._slot + 1 :].fill_(rows)

    def _text(self) -> str:
        layers = "; ".join(f"{name}: {reason}" for name, reason in self.layers.items())
        names = ", ".join(self.layers)
        return message(
            f"the batch mixes adapters, and the rows of {names} are not known to be its tokens",
            why=f"Which row belongs to which request cannot be read from the graph ({layers}).",
            cure="Leave these layers out of target_modules, or give all requests of a batch one adapter.",
        )


def any_router() -> bool:
    """Whether there is an adapter pool."""
    return bool(_ROUTERS)


def router_by_id(router_id: int) -> Router:
    """The router that a graph names.

    Raises:
        BatchError: its pool is gone.
    """
    return _there(_ROUTERS.get(router_id))


def _there(router: Router | None) -> Router:
    if router is None:
        raise BatchError(
            message("the adapter pool of a LoRA layer is gone", cure="Keep the AdapterPool as long as the model.")
        )
    return router
