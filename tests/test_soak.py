"""A minute of random traffic: adapters come and go, buckets too, and the numbers stay eager's."""

from __future__ import annotations

import json
import os

import torch

from benchmarks.__main__ import main


def test_soak(tmp_path):
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    main(["soak", "--device", device, "--seconds", os.environ.get("PCG_SOAK_SECONDS", "60"), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert row["faults"] == [] and row["recompiled"] == 0
    assert row["steps"] > 100 and row["compared"] >= row["steps"] // 50 and row["evicted"] > 0
    assert row["adapter_loads"] > 5 and row["replays"] > row["steps"]
