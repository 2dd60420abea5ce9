"""``memory_budget``: which buckets go when the captured graphs of a model hold more than it allows."""

from __future__ import annotations

from ..registry import runtimes_of_caller
from .binding import Binding
from .state import GraphState

__all__ = ["respect_budget"]

Bucket = tuple[int, ...]


def respect_budget(graph: GraphState, binding: Binding, newest: Bucket | None) -> None:
    """Drops the least used buckets of the calling model's graphs until its captures fit ``memory_budget``.

    To be called after each step that captured something or made static memory: one that built a program, and one that
    captured a full CUDA graph for a kind of batch that its bucket had not met.

    Args:
        binding: of the step. newest: its bucket, which goes last; None for a step that ran at its exact sizes.
    """
    shared, agreement = graph.shared, graph.shared.agreement
    budget, caller = shared.options.memory_budget, shared.counters.caller
    shared.grew = False
    if budget is None or newest is None:
        return
    graphs: list[GraphState] = (runtimes_of_caller(caller) if caller is not None else []) or [graph]

    def over() -> bool:
        held = sum(one.nbytes(caller) for one in graphs)
        return agreement.any_of(held > budget) if agreement is not None else held > budget

    alone = True
    while over():
        if _drop_least_used(graphs, caller, (graph, newest), budget):
            alone = False
        elif newest in binding.full_graphs and binding.full_graphs[newest].captured_graphs:
            # Its memory is that of the bucket's pieces, and comes back with them; they are captured again without it.
            binding.forget(newest)
            binding.piecewise.add(newest)
            shared.counters.fall_back(f"bucket {graph.name(newest)} runs piece by piece: memory_{budget=}")
            return
        else:
            _give_up(graph, binding, newest, budget, alone)
            return


def _drop_least_used(
    graphs: list[GraphState], caller: object | None, kept: tuple[GraphState, Bucket], budget: int
) -> bool:
    """Drops one bucket of the caller's, ``kept`` left aside; False where there is none."""
    held = ((one, bucket) for one in graphs for b in one.bindings_of(caller) for bucket in sorted(b.buckets))
    found = [entry for entry in dict.fromkeys(held) if entry != kept]
    for graph, bucket in sorted(found, key=lambda entry: entry[0].hits(entry[1])):
        # Another thread may be in a step of another graph.
        if graph.lock.acquire(blocking=False):
            try:
                reason = f"bucket {graph.name(bucket)} dropped: captured graphs exceed memory_{budget=}"
                graph.drop(caller, bucket, reason)
                return True
            finally:
                graph.lock.release()
    return False


def _give_up(graph: GraphState, binding: Binding, bucket: Bucket, budget: int, alone: bool) -> None:
    """Drops the newest bucket, which does not fit.

    Buckets share their memory, which comes back with the last one: a bucket that found the memory of others may
    fit by itself, and is captured again once.
    """
    binding.forget(bucket)
    again = binding.squeezed_out[bucket] = binding.squeezed_out.get(bucket, 0) + 1
    if alone or again > 1:
        binding.given_up[bucket] = f"bucket {graph.name(bucket)} exceeds memory_{budget=}"
    else:
        graph.shared.counters.fall_back(
            f"bucket {graph.name(bucket)} dropped with all that it shares memory with: memory_{budget=}"
        )
