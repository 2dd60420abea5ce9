"""The callable that Dynamo gets for one graph: picks the program of a step, and runs it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from ..batch import StepState, current_step, require_step, scratch_step
from ..errors import StaleAddress, message
from ..graph.plan import CallSite, PieceSite, Plan
from ..graph.scalars import evaluate, expr_of, shape_at
from ..torch_internals import data_ptrs_equal
from .binding import Binding, Shared
from .buffers import FlatBuffers
from .program import Program, build_and_run
from .timing import seconds_of
from .views import looks_like, real_rows
from .whole import WholeStep

__all__ = ["GraphRuntime", "WarmUp", "warming_up"]

#: A bucket that takes longer than this many times the step without recordings is not used.
_GAIN_LIMIT = 1.05

#: Tokens from which on one recording of a whole step gains nothing, and attention's workspace takes 100 MB and more.
_LARGEST_AUTO_WHOLE = 1024

#: Sets of addresses that one graph keeps recordings for, before it stops binding users' tensors by address.
_BOUND_CHANGES = 8


@dataclass
class WarmUp:
    """A request to record buckets, while it is in force: calls then leave no effects.

    Attributes:
        buckets: what to record, one size or a tuple for each dynamic size; None: the table.
        report: called before each recording with (done, total, name of the bucket).
        observe: called once with (the graph's runtime, the call's arguments, the running step or None).
    """

    buckets: Sequence[int | tuple[int, ...]] | None = None
    report: Callable[[int, int, Any], None] = lambda done, total, name: None
    observe: Callable[[GraphRuntime, Sequence[Any], StepState | None], None] = lambda runtime, args, step: None


_WARM_UP: ContextVar[WarmUp | None] = ContextVar("pcg_warm_up", default=None)


@contextlib.contextmanager
def warming_up(request: WarmUp) -> Iterator[None]:
    """Calls of compiled graphs inside record instead of serving."""
    token = _WARM_UP.set(request)
    try:
        yield
    finally:
        _WARM_UP.reset(token)


@dataclass(eq=False)
class GraphRuntime:
    """One compiled graph. Calls from several threads are served one after the other."""

    plan: Plan
    shared: Shared
    #: Whether a call of it ends a step: the last of the graphs that one forward was broken into.
    ends_step: bool
    #: What the passes found and did, for explain() and dump().
    context: Any = None
    bindings: list[Binding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._current: Binding | None = None
        self._stream: Any = None
        self._bound = [s.position for s in self.plan.inputs if s.kind in ("static", "bound")]
        ours = [s.op for s in self.plan.sites if isinstance(s, CallSite) and s.op.own_metadata]
        self._uses_step = bool(ours)
        self._needs_step = any(not op.optional_step for op in ours)
        self._token_sizes = self.plan.token_sizes
        self._places = {symbol: i for i, symbol in enumerate(self.plan.symbols)}
        self._first_call = True
        #: Positions of the dynamic sizes among the plan's symbols.
        self._dims = [i for i, symbol in enumerate(self.plan.symbols) if symbol in self.plan.dims]
        self._may_alias = any(s.node in self.plan.mutated and s.kind != "static" for s in self.plan.inputs)
        self._bucketed = self._bucketed_symbols()

    def _bucketed_symbols(self) -> tuple[sympy.Symbol, ...]:
        used: dict[sympy.Symbol, None] = {}
        for site in self.plan.sites:
            if isinstance(site, PieceSite) and site.refusal is None and not site.trivial:
                used.update(dict.fromkeys(site.piece.symbols))
        return tuple(s for s in self.plan.symbols if s in used and s in self.plan.dims)

    # -- a step -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            if self._first_call and self.shared.options.capture == "first_call":
                self._first_call = False
                with warming_up(WarmUp()):
                    self._warm_up(args, WarmUp())
            request = _WARM_UP.get()
            if request is not None:
                return self._warm_up(args, request)
            self._order_streams()
            sizes = self._sizes(args)
            step = self._step()
            binding = self._binding(args, step)
            program = binding.steps.get(sizes)
            counters = self.shared.counters
            if program is None or (self._may_alias and self._overlap(args)):
                result, program = self._first_of(binding, sizes, args, step)
            else:
                if step is not None:
                    self._check_tokens(step, sizes)
                result = program.run(args)
            for reason, where in program.fallbacks:
                counters.fall_back(reason, where)
            if self.ends_step:
                counters.steps += 1
            if len(self._dims) == 1:
                n = sizes[self._dims[0]]
                counters.sizes[n] = counters.sizes.get(n, 0) + 1
            if program.bucket is not None:
                self._count(sizes, program)
            return result

    def program_for(self, args: Sequence[Any], step: StepState | None) -> tuple[tuple[int, ...], Program]:
        """The sizes of a call and the program that serves it; where its bucket has no recordings, one without any."""
        sizes = self._sizes(args)
        binding = self._binding(args, step)
        program = binding.steps.get(sizes)
        if program is None:
            named = dict(zip(self.plan.symbols, sizes, strict=True))
            bucket, _ = self._choose(binding, named)
            recorded = {p.bucket for p in binding.steps.values()} | binding.bodies.keys()
            if bucket is not None and tuple(bucket[s] for s in self.plan.symbols) not in recorded:
                bucket = None
            program, _ = build_and_run(binding, named, bucket, args, step)
        return sizes, program

    def _sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(args[p] if dim < 0 else args[p].shape[dim] for p, dim in self.plan.sizes)

    def _tokens(self, sizes: tuple[int, ...]) -> int:
        """The tokens that a step's metadata are prepared for."""
        named = dict(zip(self.plan.symbols, sizes, strict=True))
        return int(evaluate(self._token_sizes[0][0], named)) if self._token_sizes else 0

    def _step(self) -> StepState | None:
        if not self._uses_step:
            return None
        return require_step("a model with paged attention") if self._needs_step else current_step()

    def _check_tokens(self, step: StepState, sizes: tuple[int, ...]) -> None:
        """The step's batch must be the call's, wherever it matters."""
        for size, op in self._token_sizes:
            if not op.optional_step or step.batch.adapters is not None:
                step.check_tokens(self._size(size, sizes))

    def _size(self, size: Any, sizes: tuple[int, ...]) -> int:
        """A size at the real ones; usually it is one of them, which must not cost an evaluation at every step."""
        place = self._places.get(expr_of(size))
        if place is not None:
            return sizes[place]
        return int(evaluate(size, dict(zip(self.plan.symbols, sizes, strict=True))))

    def _count(self, sizes: tuple[int, ...], program: Program) -> None:
        real, padded, name = 1, 1, []
        assert program.bucket is not None
        for symbol, n, b in zip(self.plan.symbols, sizes, program.bucket, strict=True):
            if symbol in self.plan.dims:
                real, padded = real * n, padded * b
                name.append(b)
        use = self.shared.counters.bucket(name[0] if len(name) == 1 else tuple(name))
        use.hits += 1
        use.tokens += real if name else 0
        use.padded_tokens += padded if name else 0

    def _first_of(
        self, binding: Binding, sizes: tuple[int, ...], args: Sequence[Any], step: Any
    ) -> tuple[Any, Program]:
        """The first step of some sizes, for one set of addresses."""
        named = dict(zip(self.plan.symbols, sizes, strict=True))
        if self.shared.agreement is not None:
            self.shared.agreement.same("sizes", list(sizes))
        if step is not None:
            self._check_tokens(step, sizes)
        if self._may_alias and self._overlap(args):
            program, result = build_and_run(binding, named, None, args, step, compiled=False)
            self.shared.counters.fall_back("arguments that the graph writes overlap in memory; run eagerly")
            return result, program
        bucket, reason = self._choose(binding, named)
        program, result = build_and_run(binding, named, bucket, args, step)
        if reason:
            program.fallbacks.append((reason, ""))
        if program.complete:
            binding.remember(sizes, program)
            self._respect_budget(binding, program)
        return result, program

    def _choose(
        self, binding: Binding, sizes: Mapping[sympy.Symbol, int]
    ) -> tuple[Mapping[sympy.Symbol, int] | None, str]:
        if self.plan.refusal is not None:
            return None, self.plan.refusal
        if not any(isinstance(s, PieceSite) and s.refusal is None and s.is_piece for s in self.plan.sites):
            reasons = [s for s in self.plan.sites if isinstance(s, PieceSite) and s.is_piece and s.refusal]
            return None, f"no piece can be recorded: {reasons[0].refusal} (at {reasons[0].where})" if reasons else ""
        choice = self.shared.chooser.choose(sizes, self._bucketed)
        if choice.sizes is None:
            return None, choice.reason
        given_up = binding.given_up.get(tuple(choice.sizes[s] for s in self.plan.symbols))
        return (None, given_up) if given_up else (choice.sizes, "")

    def _overlap(self, args: Sequence[Any]) -> bool:
        """Whether a tensor that the graph writes shares memory with another argument."""
        storages: dict[int, int] = {}
        for spec in self.plan.inputs:
            if spec.position >= 0 and isinstance(spec.value, torch.Tensor):
                pointer = args[spec.position].untyped_storage().data_ptr()
                storages[pointer] = storages.get(pointer, 0) + 1
        return any(
            storages[args[s.position].untyped_storage().data_ptr()] > 1
            for s in self.plan.inputs
            if s.node in self.plan.mutated and s.kind != "static" and s.value.numel() != 0
        )

    def _order_streams(self) -> None:
        if self.shared.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.shared.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    # -- bindings ---------------------------------------------------------------------------------------------

    def _binding(self, args: Sequence[Any], step: Any) -> Binding:
        """The recordings made with the addresses of this call, checked in every step."""
        key = step.key if step is not None else None
        current = self._current
        if (
            current is not None
            and current.step_key == key
            and data_ptrs_equal(list(args), current.by_position, self._bound)
        ):
            return current
        addresses = [args[i].data_ptr() for i in self._bound]
        for binding in self.bindings:
            if binding.addresses == addresses and binding.step_key == key:
                self._current = binding
                return binding
        self._check_parameters(args)
        self._current = self._new_binding(addresses, key)
        return self._current

    def _check_parameters(self, args: Sequence[Any]) -> None:
        """Raises where a parameter has another form than the code was compiled for: guards="inputs" lets it pass."""
        sizes = dict(zip(self.plan.symbols, self._sizes(args), strict=True))
        for spec in self.plan.inputs:
            if spec.kind != "static":
                continue
            new, old = args[spec.position], spec.value
            if new.dtype != old.dtype or new.device != old.device or not looks_like(new, old, sizes):
                raise StaleAddress(
                    message(
                        f"{spec.node.name} is {_form(new)} now, and was {_form(old)} when the model was compiled",
                        why='With guards="inputs" a parameter that changes its form does not compile the model again.',
                        cure='Call torch._dynamo.reset() after the change, or leave out guards="inputs".',
                    )
                )

    def _new_binding(self, addresses: list[int], key: Hashable) -> Binding:
        if self.bindings:
            self._unbind_what_changes(addresses)
        binding = Binding(self.shared, addresses, key, FlatBuffers(self.shared.device))
        binding.by_position = [0] * (1 + max(self._bound, default=-1))
        for position, address in zip(self._bound, addresses, strict=True):
            binding.by_position[position] = address
        self.bindings.append(binding)
        return binding

    def _unbind_what_changes(self, addresses: list[int]) -> None:
        """A user's tensor that comes at a new address each time is copied in from then on."""
        if len(self.bindings) < _BOUND_CHANGES:
            return
        last = self.bindings[-1].addresses
        specs = {s.position: i for i, s in enumerate(self.plan.inputs) if s.kind == "bound"}
        changing = [p for p, old, new in zip(self._bound, last, addresses, strict=True) if old != new and p in specs]
        if not changing:
            return
        inputs = list(self.plan.inputs)
        for position in changing:
            inputs[specs[position]] = replace(inputs[specs[position]], kind="user")
        self.plan.inputs = tuple(inputs)
        self._bound = [s.position for s in inputs if s.kind in ("static", "bound")]
        self.plan.__dict__.pop("users_memory", None)
        self.bindings.clear()
        addresses[:] = [a for a, p in zip(addresses, list(self._bound_before(changing)), strict=True) if p]

    def _bound_before(self, changed: Sequence[int]) -> Iterator[bool]:
        positions = sorted([*self._bound, *changed])
        return (p not in changed for p in positions)

    def _respect_budget(self, binding: Binding, newest: Program) -> None:
        budget = self.shared.options.memory_budget
        if budget is None or newest.bucket is None:
            return
        agreement = self.shared.agreement
        while agreement.any_of(self.nbytes() > budget) if agreement is not None else self.nbytes() > budget:
            buckets = {
                p.bucket for b in self.bindings for p in b.steps.values() if p.bucket not in (None, newest.bucket)
            }
            if not buckets:
                binding.forget(newest.bucket)
                binding.given_up[newest.bucket] = f"bucket {newest.bucket} exceeds memory_budget={budget}"
                return
            uses = self.shared.counters.buckets
            least = min(buckets, key=lambda b: uses[self._name(b)].hits if self._name(b) in uses else 0)  # type: ignore[arg-type]
            for other in self.bindings:
                other.forget(least)
            self.shared.counters.fall_back(
                f"bucket {self._name(least)} dropped: recordings exceed memory_budget={budget}"
            )

    def _name(self, bucket: Any) -> Any:
        sizes = tuple(b for s, b in zip(self.plan.symbols, bucket, strict=True) if s in self.plan.dims)
        return sizes[0] if len(sizes) == 1 else sizes

    def nbytes(self) -> int:
        """Bytes that recordings and their static memory hold."""
        return sum(
            sum(r.nbytes for r in b.recordings.values()) + sum(w.nbytes for w in b.wholes.values()) + b.buffers.nbytes()
            for b in self.bindings
        )

    def reset(self) -> None:
        """Drops all recordings and zeroes the figures."""
        with self._lock:
            self.bindings.clear()
            self._current = None
            self._first_call = True
            self.shared.counters.reset()

    # -- warm-up ----------------------------------------------------------------------------------------------

    def _warm_up(self, args: Sequence[Any], request: WarmUp) -> Any:
        """Records buckets with a call's arguments as the example, and answers the call; nothing else changes."""
        self._order_streams()
        sizes = dict(zip(self.plan.symbols, self._sizes(args), strict=True))
        step = self._step()
        wanted = self._wanted(request, sizes)
        # The largest bucket comes first: once one pays, so do the smaller ones.
        # Ranks measure different times, and must not choose by them.
        alone = self.shared.agreement is None
        doubtful = alone and len(self._bucketed) == 1 and self.shared.device.type == "cuda"
        for done, bucket in enumerate(wanted):
            request.report(done, len(wanted), self._name(tuple(bucket[s] for s in self.plan.symbols)))
            real = {s: min(n, bucket[s]) for s, n in sizes.items()}
            doubtful = self._record_bucket(self._shrunk(args, real), real, bucket, doubtful)
        request.report(len(wanted), len(wanted), None)
        with self._no_effects(args):
            request.observe(self, args, step)
        with self._no_effects(args):
            if step is None:
                binding = self._binding(args, None)
                _, result = build_and_run(binding, sizes, None, args, None)
                return result
            with scratch_step(self._tokens(tuple(sizes.values())), step.cache) as scratch:
                binding = self._binding(args, scratch)
                _, result = build_and_run(binding, sizes, None, args, scratch)
                return result

    def _wanted(self, request: WarmUp, sizes: Mapping[sympy.Symbol, int]) -> list[dict[sympy.Symbol, int]]:
        if self.plan.refusal is not None:
            return []
        if not self._bucketed:
            return [dict(sizes)]
        if request.buckets is None and len(self._bucketed) > 1:
            raise ValueError(
                f"the model has {len(self._bucketed)} dynamic sizes: pass buckets=[(b, ...), ...] to pcg.warmup(), "
                "one tuple a bucket"
            )
        table = request.buckets if request.buckets is not None else self.shared.chooser.table
        wanted: list[dict[sympy.Symbol, int]] = []
        for entry in table:
            entries = entry if isinstance(entry, tuple) else (entry,) * len(self._bucketed)
            if len(entries) != len(self._bucketed):
                raise ValueError(
                    f"bucket {entry} has {len(entries)} sizes, the model has {len(self._bucketed)} dynamic ones"
                )
            choice = self.shared.chooser.choose(
                {**sizes, **dict(zip(self._bucketed, entries, strict=True))}, self._bucketed
            )
            if choice.sizes is None:
                self.shared.counters.fall_back(f"bucket {entry} was not recorded: {choice.reason}")
            elif dict(choice.sizes) not in wanted:
                wanted.append(dict(choice.sizes))
        # Largest first: smaller buckets then fit into the memory of larger ones.
        return sorted(wanted, key=lambda bucket: tuple(bucket[s] for s in self._bucketed), reverse=True)

    def _shrunk(self, args: Sequence[Any], real: Mapping[sympy.Symbol, int]) -> list[Any]:
        result = list(args)
        for spec in self.plan.inputs:
            if spec.position < 0:
                continue
            if isinstance(spec.value, torch.Tensor):
                if spec.kind == "user":
                    result[spec.position] = real_rows(args[spec.position], spec.value, real)
            elif spec.kind == "size":
                result[spec.position] = evaluate(spec.value, real)
        return result

    def _record_bucket(
        self,
        args: Sequence[Any],
        real: Mapping[sympy.Symbol, int],
        bucket: Mapping[sympy.Symbol, int],
        doubtful: bool,
    ) -> bool:
        """Records one bucket. Where it is ``doubtful`` that this pays, measures it; returns whether it still is."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._no_effects(args))
            step = self._step()
            if step is not None:
                tokens = self._tokens(tuple(bucket[s] for s in self.plan.symbols))
                step = stack.enter_context(scratch_step(tokens, step.cache))
            binding = self._binding(args, step)
            program, _ = build_and_run(binding, real, bucket, args, step)
            if program.complete:
                if doubtful and not self._pays(binding, program, bucket, args, step):
                    return True
                if program.whole is not None and self._may_record_whole(program.whole, step):
                    program.start(args)
                    program.whole.warm_up(program.run_pieces)
                self._respect_budget(binding, program)
        return False

    def _pays(
        self, binding: Binding, program: Program, bucket: Mapping[sympy.Symbol, int], args: Sequence[Any], step: Any
    ) -> bool:
        """Whether replaying a full bucket is as fast as running it without recordings; gives the bucket up if not."""
        full = [self._at_bucket(binding, position, bucket, args) for position in range(len(args))]
        exact, _ = build_and_run(binding, bucket, None, full, step)
        device, replays = self.shared.device, self.shared.counters.replays
        replayed = seconds_of(step, program.run_pieces, device, runs=4)
        plain = seconds_of(step, lambda: exact.run(full), device, runs=4)
        self.shared.counters.replays = replays
        if replayed <= _GAIN_LIMIT * plain:
            return True
        assert program.bucket is not None
        binding.forget(program.bucket)
        binding.given_up[program.bucket] = (
            f"bucket {self._name(program.bucket)} does not pay: {1e3 * replayed:.2f} ms replayed, "
            f"{1e3 * plain:.2f} ms without recordings"
        )
        return False

    def _at_bucket(
        self, binding: Binding, position: int, bucket: Mapping[sympy.Symbol, int], args: Sequence[Any]
    ) -> Any:
        """An argument that fills the bucket: the static memory that it is copied to, as warm-up left it."""
        spec = next(s for s in self.plan.inputs if s.position == position)
        if not isinstance(spec.value, torch.Tensor):
            return evaluate(spec.value, bucket) if spec.kind == "size" else args[position]
        return binding.placed.get((spec.node, shape_at(spec.value, bucket)), args[position])

    def _may_record_whole(self, whole: WholeStep, step: StepState | None) -> bool:
        """Whether warm-up tries one recording for a whole step: on a CPU, where a replay runs the same calls, if told.

        Attention's workspace grows with tokens and request slots, so that "auto" leaves large buckets alone.
        """
        if whole.wanted is None and (self.shared.device.type != "cuda" or self.shared.agreement is not None):
            return False
        return whole.wanted is not None or step is None or whole.at_tokens() <= _LARGEST_AUTO_WHOLE

    @contextlib.contextmanager
    def _no_effects(self, args: Sequence[Any]) -> Iterator[None]:
        """Puts back what the graph mutates, and the state of the random number generators."""
        written = [args[s.position] for s in self.plan.inputs if s.node in self.plan.mutated and s.position >= 0]
        before = [t.clone() for t in written]
        devices = [self.shared.device] if self.shared.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(written, before, strict=True):
                    tensor.copy_(old)


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
