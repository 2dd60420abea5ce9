"""Graph passes: free functions ``(gm, context) -> gm``, each readable alone."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable

from torch import fx

if __name__ == "passes":
    # Imported by the folder's own name, from a checkout: the same modules as pcg_compile.passes, not second copies of
    # their registries and classes. Python takes what it finds in sys.modules afterwards.
    _package = importlib.import_module("pcg_compile.passes")
    for _found in pkgutil.walk_packages(_package.__path__, "pcg_compile.passes."):
        sys.modules[_found.name.removeprefix("pcg_compile.")] = importlib.import_module(_found.name)
    sys.modules[__name__] = _package

from .context import PassContext

Pass = Callable[[fx.GraphModule, PassContext], fx.GraphModule]

__all__ = ["Pass", "metadata_passes", "safety_passes"]


def safety_passes() -> tuple[tuple[bool, Pass], ...]:
    """What must not reach a captured graph: (whether the pass rewrites the graph, the pass)."""
    from .capture_hazards import capture_hazards
    from .scalar_writes import scalar_writes

    return ((True, scalar_writes), (False, capture_hazards))


def metadata_passes() -> tuple[tuple[bool, Pass], ...]:
    """What prepares the batch: padding, adapters, slots, attention plans."""
    from .pad_metadata import pad_metadata
    from .prepare_batch import prepare_batch
    from .route_lora import route_lora

    return ((True, pad_metadata), (True, route_lora), (True, prepare_batch))
