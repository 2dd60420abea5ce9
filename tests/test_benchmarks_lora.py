"""The LoRA benchmark runs on a CPU in seconds; what serves a wrong adapter is not timed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import lora, lora_world
from benchmarks.__main__ import main
from benchmarks.report import tables

PCG, PEFT = ("pcg", "pcg-lora", "pcg-base"), ("peft-lora", "peft-base")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.fixture
def other_pefts(monkeypatch):
    """PEFT as it is, then with each adapter under another's name, then none at all."""
    load, calls = lora_world.load_peft, []

    def load_peft(model, folders):
        calls.append(folders)
        if len(calls) == 3:
            raise ImportError("peft")
        return load(model, folders if len(calls) == 1 else dict(zip(folders, reversed(folders.values()), strict=True)))

    monkeypatch.setattr(lora_world, "load_peft", load_peft)


def test_all_ways_agree_and_what_is_wrong_is_not_timed(tmp_path, other_pefts):
    arguments = ["--layers", "1", "--repeats", "2", "--adapters", "4", "--ranks", "mixed,16,8"]
    main(["lora", "--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert "stopped" not in data and all(tables(data)) and path.with_suffix(".png").stat().st_size > 1000
    kinds: dict[str, list] = {}
    for row in data["rows"]:
        kinds.setdefault(row["what"], []).append(row)
    steps = {(row["ranks"], row["tokens"], row["variant"]): row for row in kinds["step"]}

    for tokens in ("decode 6", "prefill 20"):
        for name in (*PCG, *PEFT):
            row = steps["mixed", tokens, name]
            assert row["right"] and row["ready_wall_ms"] > 0 and row["lists_wall_ms"] > 0
        assert all(steps["mixed", tokens, name]["replays"] == 2 for name in PCG)
        assert steps["mixed", tokens, "pcg-lora"]["effect"] > 0.2
        wrong = steps["16", tokens, "pcg-lora"]
        assert wrong["right"] is False and wrong["worst"] > 0.1 and "ready_wall_ms" not in wrong
        assert all(steps["16", tokens, name]["ready_wall_ms"] > 0 for name in ("pcg", "pcg-base", *PEFT))
        assert [name for label, at, name in steps if (label, at) == ("8", tokens)] == list(PCG)
        assert all(steps["8", tokens, name]["ready_wall_ms"] > 0 for name in PCG)
    assert data["remarks"] == ["PEFT is left out, and pcg compared with the uncompiled model: needs peft"]
    for row in kinds["ratio"]:
        want = None
        if row["ranks"] == "mixed":
            one, other = (steps["mixed", row["tokens"], name]["ready_wall_ms"] for name in ("peft-lora", "pcg-lora"))
            want = pytest.approx(one / other, rel=0.01)
        assert row["peft_over_lora"] == want

    assert [load["ranks"] for load in kinds["load"]] == ["mixed", "16", "8"]
    for load in kinds["load"]:
        assert load["adapters"] == 17 and load["made"] == 0 and load["captured_before"] == load["captured_after"] > 0
        assert min(load["load_ms"], load["reload_ms"]) > 0
    plain, pooled = kinds["captures"]
    assert plain["captured"] == pooled["captured"] and pooled["pool_mib"] > 0 and plain["mib"] > 0


def test_ratios():
    times = {"pcg": 2.0, "pcg-lora": 2.4, "pcg-base": 2.1, "peft-lora": 48.0, "peft-base": 12.0}
    rows = {name: {"ready_wall_ms": ms, "lists_wall_ms": ms, "ready_gpu_ms": ms} for name, ms in times.items()}
    found = lora._ratios(rows, 0.1, "decode", "16")
    assert (found["lora_over_pcg"], found["peft_over_lora"], found["peft_over_peft_base"]) == (1.2, 20, 4)
    assert found["lora_gpu_ms"] == 0.4 and found["over_floor"] == 4 and found["met"] is True
    assert lora._ratios(rows, 0.1, "prefill", "16")["met"] is False
    rows["peft-lora"]["ready_wall_ms"] = 24.0
    assert lora._ratios(rows, 0.1, "decode", "16")["met"] is False
    assert "met" not in lora._ratios(rows, 0.1, "decode", "64")
