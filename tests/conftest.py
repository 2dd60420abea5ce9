"""What all tests share: few threads, and GPU tests that skip themselves where there is no GPU."""

from __future__ import annotations

import os

# Before torch is imported: small tensors gain nothing from threads, and machines that test have few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

#: Minutes each: begun first, so two processes end at the same time.
LONG = ("tensor_parallel", "examples", "families", "soak", "notebooks", "random_graphs", "benchmarks", "encoders")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skips tests marked ``gpu`` on a machine without a CUDA device."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
