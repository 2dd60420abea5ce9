"""Full CUDA graphs: all pieces and split ops of a bucket as one captured graph (``cudagraph_mode="full"``).

Everything that changes from step to step then lies in static memory: the step's metadata are written there, and
attention's plan, before the one replay. A batch that does not fit runs piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from ..fx.plan import PieceItem, SplitOpItem
from ..fx.sizes import evaluate, symbols_of
from ..memory.ranges import Range, any_overlap, range_of
from ..step import current_step
from ..step_state import DoesNotFit
from .capture import CapturedGraph
from .shared import Shared
from .timing import seconds_of

__all__ = ["FullGraph", "why_not_full"]

#: A batch that has no captured graph yet is captured when it is met; a batch that keeps failing is not tried forever.
_MOST_FAILURES = 2
#: Kept for one bucket: one for each kind of batch that attention has kernels for.
_MOST_CAPTURES = 8
#: Of the largest value: bfloat16 kernels differ by a hundredth, wrong ones by anything.
_AGREEMENT = 0.1
_STABLE = 0.01


def why_not_full(items: Sequence[Any], captured: Callable[[PieceItem], bool]) -> str | None:
    """Why a step cannot be one captured graph; None where it can, "" where it is one piece anyway."""
    calls = [item for item in items if isinstance(item, SplitOpItem) and item.op.bind_full_graph is None]
    if not calls:
        return ""
    for item in calls:
        if not item.op.recordable:
            return f"{item.op.name} does not declare itself recordable"
        if item.mode != "request":
            return f"{item.op.name} gets other rows at each step (padding by slices)"
        if item.op.uncapturable is not None:
            reason = item.op.uncapturable(*item.node.args, **item.node.kwargs)
            if reason is not None:
                return reason
    missing = next((item for item in items if isinstance(item, PieceItem) and not captured(item)), None)
    return f"a piece cannot be captured (at {missing.where})" if missing is not None else None


@dataclass
class FullGraph:
    """The full CUDA graphs of one bucket, by what they bake in (the kind of batch that attention has kernels for).

    Attributes:
        at: the bucket's sizes. name: the bucket. inputs, outputs: static memory by node.
        functions: what runs each piece, by item, its results looking as the next piece expects.
        wanted: whether steps use it; None until ``warmup`` has measured.
        measure: whether ``warmup`` measures, and gives the graphs up where pieces are faster ("auto").
        saves: seconds of a step that the graph was measured to save.
    """

    shared: Shared
    at: Mapping[sympy.Symbol, int]
    name: Hashable
    inputs: Mapping[fx.Node, torch.Tensor]
    outputs: Mapping[fx.Node, torch.Tensor]
    functions: Mapping[int, Callable[..., Sequence[torch.Tensor]]]
    wanted: bool | None
    measure: bool = False
    saves: float = 0.0
    captured_graphs: dict[Hashable, CapturedGraph] = field(default_factory=dict)
    _failures: int = 0

    def __post_init__(self) -> None:
        plan = self.shared.plan
        self._prepare: list[Callable[[], Hashable]] = []
        for item in plan.items:
            if isinstance(item, SplitOpItem) and item.op.bind_full_graph is not None:
                size, *rest = item.node.args
                self._prepare.append(item.op.bind_full_graph(self._number(size), *rest))
        self._ends: dict[int, list[fx.Node]] = {}
        for node, until in plan.last_use.items():
            self._ends.setdefault(until, []).append(node)

    def prepare(self) -> Hashable:
        """Brings the step's metadata to the device; returns the key of the captured graph that serves it.

        Raises:
            DoesNotFit: none can.
        """
        return tuple([prepare() for prepare in self._prepare])

    def run(self) -> bool:
        """One step, loaded; False where the batch must run piece by piece."""
        shared = self.shared
        if shared.agreement is not None:
            shared.agreement.confirm()
        try:
            key = self.prepare()
        except DoesNotFit as reason:
            shared.counters.fall_back(f"attention between pieces: {reason}")
            return False
        captured = self.captured_graphs.get(key)
        if captured is None:
            return self._capture(key)
        captured.replay()
        shared.counters.replays += 1
        return True

    def _capture(self, key: Hashable) -> bool:
        """Captures the step, which runs it."""
        shared, counters = self.shared, self.shared.counters
        if self._failures >= _MOST_FAILURES:
            counters.fall_back("attention between pieces: the full CUDA graph could not be captured, twice")
            return False
        written = [t for node, t in self.inputs.items() if node in shared.plan.mutated]
        with shared.engine.session():
            pool = frozenset(shared.plan.symbols)
            captured = shared.capture(self._run_all, lambda i, t: t, pool, written, self.name)
        if isinstance(captured, str):
            self._failures += 1
            counters.fall_back(f"capturing the full graph failed: {captured}")
            return False
        if len(self.captured_graphs) >= _MOST_CAPTURES:
            del self.captured_graphs[next(iter(self.captured_graphs))]
        self.captured_graphs[key] = captured
        counters.replays += 1
        return True

    def _run_all(self) -> Sequence[torch.Tensor]:
        """All pieces and split ops at the bucket's size; a value is let go of after its last reader."""
        plan, env, step = self.shared.plan, dict(self.inputs), current_step()
        if step is not None:
            step.enqueue_again()
        for item in plan.items:
            if isinstance(item, PieceItem):
                numbers = [self.at[s] for s in item.piece.symbols]
                results = self.functions[item.index](*numbers, *(env[node] for node in item.piece.inputs))
                env.update(zip(item.outputs, results, strict=True))
                del results  # the next piece may use the memory of what it does not read
            elif item.op.bind_full_graph is None:
                self._run_split_op(item, env)
            for node in self._ends.get(item.index, ()):
                env.pop(node, None)
        results = [self._apart(env[node], target) for node, target in self.outputs.items()]
        for result, target in zip(results, self.outputs.values(), strict=True):
            if result.data_ptr() != target.data_ptr():
                target.copy_(result)
        return ()

    def _apart(self, result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A result in memory that no result is copied to, but where it lies in its place; see Note [pools]."""
        given: list[torch.Tensor] = []
        targets = [t for t in self.outputs.values() if t is not target or result.data_ptr() != target.data_ptr()]
        while (here := range_of(result)) is not None and any_overlap([(here, True), *_ranges(targets)]):
            # Memory that is held is not given again.
            given.append(result)
            result, targets = torch.empty_like(given[0]), list(self.outputs.values())
        return result if not given else result.copy_(given[0])

    def _run_split_op(self, item: SplitOpItem, env: dict[fx.Node, torch.Tensor]) -> None:
        resolve = lambda node: env[node] if node in env else self._number(node)
        args = map_arg(item.node.args, resolve)
        kwargs = map_arg(item.node.kwargs, resolve)
        if item.op.bind is not None:
            item.op.bind(*args, **kwargs)()
            return
        result = item.function(*args, **kwargs)
        for node in item.outputs:
            env[node] = result
            for index in item.path_of(node):
                env[node] = env[node][index]

    def _number(self, argument: Any) -> Any:
        return evaluate(self.shared.plan.value(argument), self.at) if isinstance(argument, fx.Node) else argument

    def give_up(self) -> None:
        """Has steps run piece by piece from now on."""
        self.wanted = False
        self.captured_graphs.clear()

    # -- warm-up ----------------------------------------------------------------------------------------------

    def warm_up(self, between_pieces: Callable[[], Any]) -> None:
        """Captures what batches of short and of long requests need; under "auto" gives the graphs up if they lose.

        ``between_pieces`` runs the same step piece by piece.
        """
        step, counters = current_step(), self.shared.counters
        paged = step is not None and step.cache is not None
        longest, replays = self.at_tokens() if paged else None, counters.replays
        if not self._agrees(step, longest, between_pieces):
            self.wanted = False
        elif self.wanted is None or self.measure:
            _set_longest(step, longest)
            full = seconds_of(step, self.run, self.shared.device)
            _set_longest(step, None)
            between = seconds_of(step, between_pieces, self.shared.device)
            self.wanted, self.saves = full < between, between - full
            chosen = "full" if self.wanted else "piecewise"
            times = f"full {1e3 * full:.2f} ms, piecewise {1e3 * between:.2f} ms"
            counters.bucket(self.name).attention = f"{chosen} ({times})"
        _set_longest(step, None)
        if not self.wanted:
            self.give_up()
        elif step is not None and paged:
            for _ in step.each_kind(self.at_tokens()):
                self.run()
        else:
            self.run()
        counters.replays = replays

    def _agrees(self, step: Any, longest: int | None, between_pieces: Callable[[], Any]) -> bool:
        """Whether one captured graph gives what pieces give: an op may be wrong that declares itself recordable."""
        _set_longest(step, None)
        if step is not None and step.cache is not None:
            self._make_tokens_alike()
            self._stabilize(step.cache, between_pieces)
        runs = []
        for _ in range(3):
            between_pieces()
            runs.append([t.clone() for t in self.outputs.values()])
        want = runs[0]
        noise = max((_distance(a, b) for run in runs[1:] for a, b in zip(want, run, strict=True)), default=0.0)
        _set_longest(step, longest)
        if not self.run():
            return False
        if any(node in self.shared.plan.mutated for node in self.inputs):
            # Running twice is not running once.
            return True
        pairs = zip(want, self.outputs.values(), strict=True)
        if all(_distance(one, other) <= max(_AGREEMENT, 2 * noise) for one, other in pairs):
            return True
        reason = f"attention between pieces: captured, bucket {self.name} gave other numbers"
        self.shared.counters.fall_back(reason)
        return False

    def _make_tokens_alike(self) -> None:
        """All rows of the inputs become the first: padding shares one slot, and whose keys stay there is chance."""
        for spec in self.shared.plan.inputs:
            tensor = self.inputs.get(spec.node)
            if spec.kind != "user" or tensor is None or spec.node in self.shared.plan.mutated:
                continue
            first = tensor
            for dim, size in enumerate(spec.value.shape):
                if symbols_of(size) and tensor.stride(dim):
                    first = first.narrow(dim, 0, 1)
            if first.shape != tensor.shape:
                tensor.copy_(first.clone().expand_as(tensor))

    def _stabilize(self, cache: Any, between_pieces: Callable[[], Any]) -> None:
        """Runs until the scratch page holds one token's keys and values in all slots, layer after layer.

        Padding writes them to one slot, and reads as many slots as there are tokens before it: alike in the first
        layer, tokens would differ in the next by what lies in the other slots, and which is written last is chance.
        """
        before: list[torch.Tensor] = []
        for _ in range(cache.num_layers + 1):
            between_pieces()
            for page in (tensor[0] for tensor in (*cache.k, *cache.v)):
                page.copy_(page[:1].clone().expand_as(page))
            now = [t.clone() for t in self.outputs.values()]
            if before and all(_distance(a, b) <= _STABLE for a, b in zip(before, now, strict=True)):
                return
            before = now

    def at_tokens(self) -> int:
        """The tokens of the bucket."""
        sizes = self.shared.plan.token_sizes
        return int(evaluate(sizes[0][0], self.at)) if sizes else 0


def _ranges(tensors: Sequence[torch.Tensor]) -> list[tuple[Range, bool]]:
    return [(one, False) for one in map(range_of, tensors) if one is not None]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference over the largest value; 0 for what has no rounding, NaN where either holds one."""
    if not one.is_floating_point() or not one.numel():
        return 0.0
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _set_longest(step: Any, longest: int | None) -> None:
    if step is not None:
        step.longest = longest
        step.prepared = None
