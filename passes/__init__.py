"""Graph passes: free functions ``(gm, context) -> gm``, each readable alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from .context import PassContext

Pass = Callable[[fx.GraphModule, "PassContext"], fx.GraphModule]

__all__ = ["Pass", "metadata_passes", "safety_passes"]


def safety_passes() -> tuple[tuple[bool, Pass], ...]:
    """What must not reach a recording: (whether the pass rewrites the graph, the pass)."""
    from .capture_hazards import capture_hazards
    from .scalar_writes import scalar_writes

    return ((True, scalar_writes), (False, capture_hazards))


def metadata_passes() -> tuple[tuple[bool, Pass], ...]:
    """What prepares the batch: padding, adapters, slots, attention plans."""
    from .pad_metadata import pad_metadata
    from .prepare_batch import prepare_batch
    from .route_lora import route_lora

    return ((True, pad_metadata), (True, route_lora), (True, prepare_batch))
