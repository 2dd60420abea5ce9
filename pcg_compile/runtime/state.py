"""What one compiled graph knows of itself: its sizes, its step, and its bindings."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from ..errors import StaleAddress, message
from ..fx.places import name_of_input
from ..fx.plan import PieceItem, Plan, SplitOpItem
from ..fx.sizes import evaluate
from ..memory.buffers import FlatBuffers
from ..memory.views import looks_like
from ..step import current_step, require_step
from ..step_state import StepState
from ..torch_compat.cuda import CurrentStream, data_ptrs_equal
from .binding import Binding
from .overlap import StepMemory
from .shared import Shared

__all__ = ["GraphState"]

#: Sets of addresses that one graph keeps captured graphs for, before it stops binding users' tensors by address.
_BOUND_CHANGES = 8


@dataclass(eq=False)
class GraphState:
    """A compiled graph's plan and its bindings."""

    plan: Plan
    shared: Shared
    #: Whether a call of it ends a step: the last of the graphs that one forward was broken into.
    ends_step: bool
    #: What the passes found and did, for explain() and dump().
    context: Any = None
    #: The trace that it came of, where that gave this one graph; for saving it.
    traced: Any = None
    #: What gives the graph's last inputs, which its caller leaves out: tensors that are attributes of Dynamo's graph.
    attributes: Callable[[], Sequence[torch.Tensor]] | None = None
    #: How many inputs its caller gives.
    given: int = 0
    bindings: list[Binding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.current: Binding | None = None
        #: Steps under way: more than one where a split op calls its own graph.
        self._running = 0
        #: Bindings whose parameters or cache are gone, to be dropped between two steps.
        self._lost: list[Binding] = []
        self._stream: Any = None
        self._handle: int | None = None
        self._cuda = self.shared.device.type == "cuda"
        self._current_stream = CurrentStream(self.shared.device)
        self._find_bound()
        ours = [s.op for s in self.plan.items if isinstance(s, SplitOpItem) and s.op.own_metadata]
        self._uses_step = bool(ours)
        self._needs_step = any(not op.optional_step for op in ours)
        self.bucketed = self._bucketed_symbols()

    def _find_bound(self) -> None:
        self.bound = [s.position for s in self.plan.inputs if s.kind in ("static", "bound")]
        self.memory = StepMemory(self.plan)
        read = [s.position for s in self.plan.inputs if s.kind not in ("static", "bound")]
        #: Arguments that must be there to choose a program and to load what is copied.
        self._first = 1 + max((*read, *(position for position, _ in self.plan.sizes)), default=-1)

    def complete(self, args: Sequence[Any]) -> Sequence[Any]:
        """All arguments of the graph."""
        if self.attributes is None or len(args) > self.given:
            return args
        return (*args, *self.attributes())

    def _bucketed_symbols(self) -> tuple[sympy.Symbol, ...]:
        used: dict[sympy.Symbol, None] = {}
        for item in self.plan.items:
            if isinstance(item, PieceItem) and item.refusal is None and not item.trivial:
                used.update(dict.fromkeys(item.piece.symbols))
        return tuple(s for s in self.plan.symbols if s in used and s in self.plan.dims)

    def sizes_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple([args[p] if dim < 0 else args[p].size(dim) for p, dim in self.plan.sizes])

    def tokens(self, sizes: tuple[int, ...]) -> int:
        """The tokens that a step's metadata are prepared for."""
        named = dict(zip(self.plan.symbols, sizes, strict=True))
        return int(evaluate(self.plan.token_sizes[0][0], named)) if self.plan.token_sizes else 0

    def step(self) -> StepState | None:
        if not self._uses_step:
            return None
        return require_step("a model with paged attention") if self._needs_step else current_step()

    def order_streams(self) -> None:
        """Orders a step behind the last one, where the caller is on another stream now."""
        if not self._cuda:
            return
        handle = self._current_stream.handle()
        if handle == self._handle:
            return
        stream = self._current_stream()
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._handle = stream, handle

    def binding(self, args: Sequence[Any], step: Any) -> Binding:
        """The captured graphs made with the addresses of this call: known ones, or none yet."""
        key = step.key if step is not None else None
        for binding in self.bindings:
            if binding.step_key == key and self.is_bound(binding, args):
                break
        else:
            self._check_parameters(args)
            binding = self._new_binding(args, key)
            self._watch(binding, args, step)
        self.current = binding
        self._use(binding)
        return binding

    def is_bound(self, binding: Binding, args: Sequence[Any]) -> bool:
        """Whether what captured graphs read in place lies where it did."""
        return data_ptrs_equal(list(args), binding.by_position, self.bound)

    def _use(self, binding: Binding) -> None:
        """Notes that the present caller uses a binding. Models that share weights share it."""
        caller = self.shared.counters.caller
        if caller is not None and not binding.used_by(caller):
            binding.callers = [*(ref for ref in binding.callers if ref() is not None), weakref.ref(caller)]

    def bindings_of(self, caller: object | None) -> list[Binding]:
        """The bindings that a caller uses; None: all."""
        return [b for b in self.bindings if caller is None or b.used_by(caller)]

    def _check_parameters(self, args: Sequence[Any]) -> None:
        """Raises where a parameter has another form than the code was compiled for: guards="inputs" lets it pass."""
        sizes = dict(zip(self.plan.symbols, self.sizes_of(args), strict=True))
        for spec in self.plan.inputs:
            if spec.kind != "static":
                continue
            new, old = args[spec.position], spec.value
            if new.dtype != old.dtype or new.device != old.device or not looks_like(new, old, sizes):
                name, before = name_of_input(spec.node), _form(old)
                raise StaleAddress(
                    message(
                        f"{name} is {_form(new)} now, and was {before} when the model was compiled",
                        why='With guards="inputs" a parameter that changes its form does not compile the model again.',
                        cure='Call torch.compiler.reset() after the change, or leave out guards="inputs".',
                    )
                )

    def _new_binding(self, args: Sequence[Any], key: Hashable) -> Binding:
        if self._running < 2:
            self._bury([b for b in self.bindings if b.stale()])
        if len(self.bindings) >= _BOUND_CHANGES:
            self._unbind_what_changes(args)
        by_position = [0] * (1 + max(self.bound, default=-1))
        for position in self.bound:
            by_position[position] = args[position].data_ptr()
        self.bindings.append(Binding(self.shared, by_position, key, FlatBuffers(self.shared.device)))
        return self.bindings[-1]

    def _watch(self, binding: Binding, args: Sequence[Any], step: Any) -> None:
        """Captured graphs hold memory, and must not outlive the parameters and the cache that they read."""
        graph, dying = weakref.ref(self), weakref.ref(binding)

        def lose(_: Any) -> None:
            state, dead = graph(), dying()
            if state is not None and dead is not None:
                dead.anchor_lost = True
                state._lost.append(dead)
                state.bury_lost()

        statics = [s.position for s in self.plan.inputs if s.kind == "static"]
        binding.parameters = [(weakref.ref(args[p], lose), args[p].data_ptr()) for p in statics]
        binding.cache = weakref.ref(step.cache, lose) if step is not None and step.cache is not None else None

    def bury_lost(self) -> None:
        """Drops bindings whose parameters or cache are gone; never inside a step, which may be using one.

        Weak references call back wherever the last strong one goes, inside a split op of this very step too. A thread
        in a step does this when it leaves it.
        """
        while self._lost and self.lock.acquire(blocking=False):
            try:
                if self._running:
                    return
                lost, self._lost = self._lost, []
                self._bury(lost)
            finally:
                self.lock.release()

    def _bury(self, dead: Sequence[Binding]) -> None:
        if not dead:
            return
        # A new list: this may happen while another one is gone through.
        self.bindings = [b for b in self.bindings if b not in dead]
        if self.current in dead:
            self.current = None
        for binding in dead:
            binding.forget()

    def _unbind_what_changes(self, args: Sequence[Any]) -> None:
        """A user's tensor that comes at a new address each time is copied in from then on."""
        last, bound = self.bindings[-1].by_position, [s for s in self.plan.inputs if s.kind == "bound"]
        changing = {s.position for s in bound if args[s.position].data_ptr() != last[s.position]}
        if changing:
            inputs = self.plan.inputs
            self.plan.inputs = tuple(replace(s, kind="user") if s.position in changing else s for s in inputs)
            self._find_bound()
            self.bindings = []

    def written(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The arguments of a call that the graph writes."""
        return [args[s.position] for s in self.plan.inputs if s.node in self.plan.mutated and s.position >= 0]

    def run_eagerly(self, args: Sequence[Any]) -> Any:
        """Dynamo's own graph, on the caller's own tensors."""
        return self.context.source.forward(*args)

    def hits(self, bucket: tuple[int, ...]) -> int:
        """Steps that a bucket has served."""
        return self.shared.counters.hits(self.name(bucket))

    def drop(self, caller: object | None, bucket: tuple[int, ...], reason: str) -> None:
        """Drops a caller's captures of a bucket; a later step makes them again."""
        for binding in self.bindings_of(caller):
            binding.forget(bucket)
        self.shared.counters.fall_back(reason)

    def name(self, bucket: Any) -> Any:
        sizes = tuple(b for s, b in zip(self.plan.symbols, bucket, strict=True) if s in self.plan.dims)
        return sizes[0] if len(sizes) == 1 else sizes

    def caches(self, callers: Sequence[object] | None = None) -> list[Any]:
        """The caches that steps of some callers, or all, have used."""
        bindings = self.bindings if callers is None else [b for one in callers for b in self.bindings_of(one)]
        return [cache for b in bindings if b.cache is not None and (cache := b.cache()) is not None]

    def nbytes(self, caller: object | None = None) -> int:
        """Bytes that captured graphs and their static memory hold, of one caller or all."""
        return self.shared.engine.nbytes() + sum(binding.nbytes() for binding in self.bindings_of(caller))


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
