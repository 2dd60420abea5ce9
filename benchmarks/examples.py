"""The programs of ``examples/``, to be measured as they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load"]


def load(name: str) -> ModuleType:
    """A program as a module, whose ``main`` does not run."""
    known = f"benchmarks.examples.{name}"
    if known not in sys.modules:
        path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Before it runs: a dataclass looks its module up.
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]
