"""The callable that Dynamo gets for one graph: picks the program of a step, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import sympy
import torch

from ..calls import graph_ran
from ..distributed.agreement import Agreement
from ..errors import PCGError
from ..fx.plan import PieceItem, SplitOpItem
from ..fx.sizes import evaluate, expr_of
from ..step_state import StepState
from ..torch_compat.profiling import in_range, profiler_records
from .ahead_of_time import WarmUp, requested_warm_up, warm_up, warm_up_context
from .binding import Binding
from .budget import respect_budget
from .builder import build_and_run
from .capture import undone
from .program import Program, size_name
from .state import GraphState

__all__ = ["GraphRuntime", "with_attributes"]


class GraphRuntime(GraphState):
    """One compiled graph. Calls from several threads are served one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._token_sizes = self.plan.token_sizes
        self._places = {symbol: i for i, symbol in enumerate(self.plan.symbols)}
        #: Of each number of tokens its place among the sizes (-1 where it is none of them), and whether only adapters
        #: need it.
        self._token_places = [
            (self._places.get(expr_of(size), -1), size, op.optional_step) for size, op in self._token_sizes
        ]
        #: Positions of the dynamic sizes among the plan's symbols.
        self._dims = [i for i, symbol in enumerate(self.plan.symbols) if symbol in self.plan.dims]
        #: The same, of each tensor that has any.
        carried = {tuple(self._places[s] for s in symbols) for symbols in self.shared.chooser.products if symbols}
        self._carried = carried or {(i,) for i in self._dims}
        #: Of a graph without dynamic sizes, those of its inputs.
        users = [s.value for s in self.plan.inputs if s.kind == "user" and not self.plan.symbols]
        self._fixed = tuple(int(size) for value in users for size in value.shape)

    def __call__(self, *args: Any) -> Any:
        graph_ran()
        try:
            with self.lock:
                self._running += 1
                try:
                    return self._serve(args)
                finally:
                    self._running -= 1
        finally:
            if self._lost:
                self.bury_lost()

    def _serve(self, args: Sequence[Any]) -> Any:
        counters = self.shared.counters
        if counters.serve():
            # Another compiled model of the class: its binding is looked up, and noted as its own.
            self.current = None
        if self.shared.options.capture == "first_call" and counters.first_call():
            everything = WarmUp(first_call=True)
            with warm_up_context(everything):
                warm_up(self, self.complete(args), everything)
        request = requested_warm_up()
        if request is not None:
            return warm_up(self, self.complete(args), request)
        self.order_streams()
        if len(args) < self._first:
            args = self.complete(args)
        sizes = self.sizes_of(args)
        step = self.step()
        if self.shared.agreement is not None:
            self._propose(self.shared.agreement, sizes, step)
        result, program = self._run_known(sizes, args, step)
        if program is None:
            args = self.complete(args)
            binding = self.binding(args, step)
            result, program = self._run_known(sizes, args, step)
            if program is None:
                result, program = self._first_of(binding, sizes, args, step)
        self._count(sizes, program)
        return result

    def _run_known(self, sizes: tuple[int, ...], args: Sequence[Any], step: StepState | None) -> tuple[Any, Any]:
        """A step by a program of the binding that served last: its outputs and the program; None where it has none.

        The arguments are loaded before addresses are compared, so the device begins meanwhile. Loads write static
        memory of the binding, and nothing else reads it between steps.
        """
        binding = self.current
        if binding is None or binding.step_key != (step.key if step is not None else None):
            return None, None
        program = binding.program(sizes)
        if program is None or not (program.covered is None or program.covered(args, False)):
            return None, None
        if self.memory.watched and not self._apart(program, binding, args, step):
            return None, None
        if step is not None:
            self._check_tokens(step, sizes)
        if program.bucket is None:
            args = self.complete(args)  # it reads all of them in place

        def check(given: Sequence[Any]) -> Sequence[Any] | None:
            every = self.complete(given)
            if not self.is_bound(binding, every):
                return None
            # Ahead of the step: under strict, nothing of it may run.
            for reason, where in program.fallbacks:
                self.shared.counters.fall_back(reason, where)
            return every

        result = (program.run_in_range if profiler_records() else program.run)(args, check)
        if result is None:
            return None, None
        if self.shared.grew:
            respect_budget(self, binding, program.bucket)
        return result, program

    def program_for(self, args: Sequence[Any], step: StepState | None) -> tuple[tuple[int, ...], Program]:
        """The sizes of a call and the program that serves it; one without captures if its bucket has none."""
        sizes = self.sizes_of(args)
        binding = self.binding(args, step)
        program = binding.steps.get(sizes)
        if program is None:
            named = dict(zip(self.plan.symbols, sizes, strict=True))
            bucket, _ = self._choose(binding, named)
            captured = {p.bucket for p in binding.steps.values()} | binding.bodies.keys()
            if bucket is not None and tuple(bucket[s] for s in self.plan.symbols) not in captured:
                bucket = None
            program, _ = build_and_run(binding, named, bucket, args, step)
        return sizes, program

    def _propose(self, agreement: Agreement, sizes: tuple[int, ...], step: StepState | None) -> None:
        """Tells the other ranks of this call's sizes; of a graph without dynamic ones, the sizes of its inputs."""
        if not sizes:
            sizes = self._fixed if step is None else (step.batch.num_tokens,)
        reason = agreement.propose(sizes)
        if reason is not None:
            self.shared.counters.fall_back(reason)

    def _check_tokens(self, step: StepState, sizes: tuple[int, ...]) -> None:
        """The step's batch must be the call's, wherever it matters."""
        for place, size, optional in self._token_places:
            if optional and step.batch.adapters is None:
                continue
            # Usually it is one of the sizes: an evaluation at every step would cost more than all the rest.
            named = dict(zip(self.plan.symbols, sizes, strict=True)) if place < 0 else {}
            step.check_tokens(sizes[place] if place >= 0 else int(evaluate(size, named)))

    def _count(self, sizes: tuple[int, ...], program: Program | None) -> None:
        bucket, dims = program.bucket if program is not None else None, self._dims
        n = sizes[dims[0]] if len(dims) == 1 else None
        if bucket is None:
            self.shared.counters.count_step(self.ends_step, n, None, 0, 0)
        elif n is not None:
            self.shared.counters.count_step(self.ends_step, n, bucket[dims[0]], n, bucket[dims[0]])
        else:
            # Of one tensor: another may carry the same rows under a symbol of its own, as a mask does.
            carried = [(prod(sizes[i] for i in at), prod(bucket[i] for i in at)) for at in self._carried if dims]
            real, padded = max(carried, default=(0, 0))
            self.shared.counters.count_step(self.ends_step, None, tuple(bucket[i] for i in dims), real, padded)

    def _first_of(
        self, binding: Binding, sizes: tuple[int, ...], args: Sequence[Any], step: Any
    ) -> tuple[Any, Program | None]:
        """The first step of some sizes, for one set of addresses."""
        named = dict(zip(self.plan.symbols, sizes, strict=True))
        if self.shared.agreement is not None:
            self.shared.agreement.confirm(building=True)
        if step is not None:
            self._check_tokens(step, sizes)
        reason, counters = self.plan.eager, self.shared.counters
        if reason is None and self.memory.overlapping(binding, args, step):
            reason = "an input that the graph writes overlaps another one in memory"
        if reason is not None:
            reason = f"{reason}; the graph runs eagerly"
            counters.fall_back(reason)
            return self.run_eagerly(args), None
        bucket, reason = self._choose(binding, named)
        if reason:
            counters.fall_back(reason)
        with self._undone_if_refused(args), in_range(f"pcg step: {size_name(sizes)} builds its program"):
            program, result = build_and_run(binding, named, bucket, args, step)
            for fallback in program.fallbacks:
                counters.fall_back(*fallback)
        if reason:
            program.fallbacks += ((reason, ""),)
        if program.complete:
            if self.memory.watched:
                self.memory.remember(program.apart, self.memory.addresses(args))
            if not program.provisional:
                binding.remember(sizes, program)
        respect_budget(self, binding, program.bucket)
        return result, program

    @contextmanager
    def _undone_if_refused(self, args: Sequence[Any]) -> Iterator[None]:
        """Under ``strict``, takes back what the graph wrote where it turns out that it is not captured."""
        if not self.shared.options.strict:
            yield
            return
        restore = undone(self.written(args))
        try:
            yield
        except PCGError:
            restore()
            raise

    def _choose(
        self, binding: Binding, sizes: Mapping[sympy.Symbol, int]
    ) -> tuple[Mapping[sympy.Symbol, int] | None, str]:
        if self.plan.refusal is not None:
            return None, self.plan.refusal
        if not any(isinstance(s, PieceItem) and s.refusal is None and s.is_piece for s in self.plan.items):
            reasons = [s for s in self.plan.items if isinstance(s, PieceItem) and s.is_piece and s.refusal]
            if reasons:
                return None, f"no piece can be captured: {reasons[0].refusal} (at {reasons[0].where})"
            calls = [s.name for s in self.plan.items if isinstance(s, SplitOpItem)]
            return None, f"nothing to capture: the graph runs split ops only ({', '.join(calls)})" if calls else ""
        choice = self.shared.chooser.choose(sizes, self.bucketed)
        if choice.sizes is None:
            return None, choice.reason
        given_up = binding.given_up.get(tuple(choice.sizes[s] for s in self.plan.symbols))
        return (None, given_up) if given_up else (choice.sizes, "")

    def _apart(self, program: Program, binding: Binding, args: Sequence[Any], step: StepState | None) -> bool:
        """Whether nothing that the graph writes overlaps another input: looked into where an address is new."""
        addresses = self.memory.addresses(args)
        if addresses in program.apart:
            return True
        if self.memory.overlapping(binding, args, step):
            return False
        self.memory.remember(program.apart, addresses)
        return True

    def release(self) -> None:
        """Drops all captured graphs, at once also those that somebody still refers to."""
        with self.lock:
            self.bindings = []
            self.current = None
            self.shared.engine.release()

    def reset(self, callers: Sequence[object] | None = None) -> None:
        """Drops all captured graphs and zeroes the figures; of some callers, or all."""
        with self.lock:
            if callers is None:
                self.bindings = []
            else:
                self._bury([b for caller in callers for b in self.bindings_of(caller)])
            self.current = None
            self.shared.counters.reset(callers)


def with_attributes(
    function: Callable[..., Any], attributes: Callable[[], Sequence[torch.Tensor]], given: int
) -> Callable[..., Any]:
    """What serves a graph whose callers give the first inputs alone.

    Args:
        function: serves it with all inputs. attributes: gives the others. given: how many callers give.
    """
    runtime = getattr(function, "__self__", None)
    if not isinstance(runtime, GraphRuntime):
        return lambda *args: function(*args, *attributes())
    # It looks at them while the device works on the arguments.
    runtime.attributes, runtime.given = attributes, given
    return function
