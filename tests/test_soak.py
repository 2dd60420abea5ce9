"""Random traffic: adapters come and go, buckets too, and the numbers stay eager's. ``PCG_SOAK_SECONDS``: for how long,
instead of 500 steps."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import soak
from benchmarks.__main__ import main


def run(folder, *arguments):
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    main(["soak", "--device", device, "--out", str(folder), *arguments])


def test_soak(tmp_path):
    seconds = os.environ.get("PCG_SOAK_SECONDS")
    run(tmp_path, *(["--seconds", seconds] if seconds else ["--steps", "500"]))
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert row["faults"] == [] and row["recompiled"] == 0
    assert row["steps"] > 100 and row["compared"] >= row["steps"] // 50 and row["evicted"] > 0
    assert row["adapter_loads"] > 5 and row["replays"] > row["steps"]


@pytest.mark.parametrize("value", [1e-1, float("nan")])
def test_a_wrong_value_is_a_fault(tmp_path, monkeypatch, value):
    compare = soak.Soak._compare

    def spoiled(self, batch, ids, got):
        got[-1, -1] += value
        compare(self, batch, ids, got)

    monkeypatch.setattr(soak.Soak, "_compare", spoiled)
    with pytest.raises(SystemExit, match="step 0: differs from eager by"):
        run(tmp_path, "--steps", "1")


def test_a_leak_is_a_fault(tmp_path, monkeypatch):
    kept, step = [], soak.Soak.step

    def leaking(self, compare):
        step(self, compare)
        kept.extend([self.steps] for _ in range(200))

    monkeypatch.setattr(soak.Soak, "step", leaking)
    with pytest.raises(SystemExit, match="objects grew from"):
        run(tmp_path, "--steps", "150")
