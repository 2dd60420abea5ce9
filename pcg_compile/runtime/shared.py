"""What all parts of one compiled graph's runtime have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..counters import Counters
from ..distributed.agreement import Agreement, RankFailed
from ..errors import PCGError
from ..fx.plan import Plan
from ..options import Options
from ..torch_compat.structured_trace import compile_id
from .buckets import BucketChooser
from .capture import CapturedGraph, Engine, StaticReplay, first_line, no_autocast_cache, rng_unchanged, undone

__all__ = ["Shared"]


#: A stride: None for the fake tensor's, ("of", d) for all entries of dimension d, or ("is", number).
StrideRule = tuple[str, int] | None


@dataclass
class Shared:
    """The plan of a graph, and what runs it.

    Attributes:
        agreement: for a graph with collectives, what ranks must decide together.
        number: of Dynamo's compilation of the graph.
        grew: whether a step has captured something since ``memory_budget`` was last looked at.
        stride_rules: by a result and the sizes that are 1, the runs so far and the rules for each of its strides; see
            Note [Dimensions of size 1].
    """

    plan: Plan
    options: Options
    counters: Counters
    chooser: BucketChooser
    engine: Engine
    device: torch.device
    agreement: Agreement | None = None
    number: Any = field(default_factory=compile_id)
    grew: bool = False
    stride_rules: dict[Hashable, tuple[int, list[list[StrideRule]]]] = field(default_factory=dict)
    _boxed: dict[fx.GraphModule, Callable[[list[Any]], Any]] = field(default_factory=dict)

    def boxed(self, module: fx.GraphModule) -> Callable[[list[Any]], Any]:
        """What a graph computes, as a function of one list of arguments that it empties."""
        if module not in self._boxed:
            graph = fx.Graph()
            arguments = graph.placeholder("arguments")
            copies: dict[fx.Node, fx.Node] = {}
            for node in module.graph.nodes:
                if node.op == "placeholder":
                    copies[node] = graph.call_method("pop", (arguments, 0))
                else:
                    copies[node] = graph.node_copy(node, copies.__getitem__)
            self._boxed[module] = fx.GraphModule(module, graph).forward
        return self._boxed[module]

    def capture(
        self,
        run: Callable[[], Sequence[torch.Tensor]],
        place: Callable[[int, torch.Tensor], torch.Tensor],
        pool: Hashable,
        written: Sequence[torch.Tensor],
        bucket: Hashable,
        warm: bool = False,
    ) -> CapturedGraph | str:
        """Captures ``run``, which also runs it once; the reason where that failed, with ``written`` as it was.

        Args:
            place, pool: see :meth:`Engine.capture`.
            written: what it writes. bucket: whose figures it counts to; None: it launches nothing, and is not counted.
            warm: whether kernels have loaded and tuned themselves for these sizes.
        """
        agreement, engine = (self.agreement, self.engine) if bucket is not None else (None, StaticReplay())
        restore, started = undone(written), time.perf_counter()

        def warm_up() -> None:
            with rng_unchanged(self.device):
                run()
            restore()

        try:
            with torch.inference_mode(False), torch.no_grad(), no_autocast_cache():
                ready = agreement.all_ready if agreement is not None else lambda: None
                captured = engine.capture(run, place, None if warm else warm_up, pool, ready)
        except PCGError:
            raise
        except Exception as error:
            # What a model runs may raise anything: the step goes on without the captured graph, and the caller counts.
            restore()
            if agreement is not None and not isinstance(error, RankFailed):
                agreement.all_ready(False)
            return first_line(error)
        if bucket is not None:
            self.grew = True
            self.counters.count_capture(bucket, time.perf_counter() - started, captured.nbytes)
        return captured
