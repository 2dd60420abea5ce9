"""Every benchmark runs on a CPU in seconds; a variant with wrong numbers is not timed."""

from __future__ import annotations

import argparse
import contextlib
import json

import pytest
import torch

from benchmarks import common, step
from benchmarks.__main__ import main
from benchmarks.common import Results, resolve
from benchmarks.compiled import Compiled
from benchmarks.crossover import crossing
from benchmarks.models import SHAPES, make_cache, make_lists, make_model, share
from benchmarks.padding import waste
from benchmarks.report import tables
from benchmarks.traffic import TRAFFIC
from benchmarks.variants import Eager, Pcg, World


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def run(command, folder, *arguments):
    """What one command wrote."""
    grad = torch.is_grad_enabled()
    main([command, "--device", "cpu", "--tiny", "--out", str(folder), *arguments])
    assert torch.is_grad_enabled() == grad
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text())
    assert data["command"] == command and "stopped" not in data and data["rows"]
    assert data["machine"]["cpu"] and data["versions"]["torch"] == torch.__version__ and data["date"]
    assert all(tables(data)) and path.with_suffix(".png").stat().st_size > 1000
    return data


def test_step(tmp_path):
    data = run("step", tmp_path, "--sizes", "1,5")
    ran = {(row["variant"], row["n"]) for row in data["rows"] if row["right"] and row["ready_wall_ms"] > 0}
    assert ran == {(v, n) for v in ("eager", "pcg", "pcg-inputs", "pcg-whole", "pcg-slice") for n in (1, 5)}
    assert all(row["lists_wall_ms"] > 0 and row["error"] < 1e-4 for row in data["rows"])
    # What needs a GPU says so.
    for name in ("limit-exact", "limit-bucket", "breakable", "partition", "reduce-overhead"):
        assert any(remark.startswith(f"{name} is left out: needs CUDA") for remark in data["remarks"])


def test_tensor_parallel(tmp_path):
    rows = run("tensor_parallel", tmp_path, "--sizes", "5", "--layers", "1")["rows"]
    ways = ("eager", "pcg", "pcg-inputs")
    assert [(row["ranks"], row["variant"]) for row in rows] == [(r, v) for r in (1, 2) for v in ways]
    assert all(row["error"] < 1e-5 and row["wall_ms"] > 0 for row in rows)
    for alone, parts in zip(rows[1:3], rows[4:6], strict=True):
        # Two all-reduces a layer on gloo, which are calls between pieces.
        assert alone["collectives"] == 0 and parts["collectives"] > 0 and parts["fallbacks"] == 0


def test_host(tmp_path):
    rows = run("host", tmp_path)["rows"]
    entries = [row for row in rows if row["what"] == "entry"]
    assert len(entries) == 3 and all(row["pieces"] == 5 and row["calls"] == 10 for row in entries)
    for row in entries:
        assert 0 < row["entry_us"] < row["first_launch_us"] < row["first_replay_us"]
        assert 0 < row["address_check_us"] < row["first_replay_us"]
    assert [row["requests"] for row in rows if row["what"] == "metadata"] == [2, 34, 64, 256, 1024]


def test_serve(tmp_path):
    rows = run("serve", tmp_path)["rows"]
    assert [row["way"] for row in rows] == ["piecewise", "full", 'guards="inputs"']
    assert all(row["replays_a_step"] >= 1 and not row["fallbacks"] for row in rows)
    assert all(row["late_ms"] > 0 and row["at_once_ms"] > 0 and row["no_wait_ms"] > 0 for row in rows)


def test_memory(tmp_path):
    data = run("memory", tmp_path, "--buckets", "3")
    assert [row["way"] for row in data["rows"]] == ["pcg", "pcg piecewise"]
    (remark,) = data["remarks"]
    assert remark.startswith("breakable is left out: needs")


def test_capture(tmp_path):
    rows = run("capture", tmp_path)["rows"]
    assert [row["buckets"] for row in rows] == [4, 6]
    assert all(row["captured"] == 3 * row["buckets"] and row["mib"] > 0 and not row["fallbacks"] for row in rows)


def test_padding(tmp_path):
    rows = run("padding", tmp_path)["rows"]
    wasted = {(row["traffic"], row["table"]): row["waste"] for row in rows if row["what"] == "waste"}
    assert len(wasted) == 6
    for traffic in TRAFFIC:
        assert 0 < wasted[traffic, "default"] < wasted[traffic, "powers of two"]
    kinds = [row for row in rows if row["what"] == "kinds"]
    assert len(kinds) == 3 and all(row["error"] < 1e-4 for row in kinds)


def test_crossover(tmp_path):
    data = run("crossover", tmp_path)
    assert [(row["bucket"], row["n"]) for row in data["rows"]] == [(4, 4), (4, 3), (16, 16), (16, 14)]
    assert all(row["ratio"] > 0 for row in data["rows"])


def test_startup(tmp_path):
    rows = run("startup", tmp_path)["rows"]
    assert [(row["layers"], row["pieces"], row["compiled"]) for row in rows] == [(4, 5, 3), (2, 3, 3)]
    assert all(row["first_step_s"] > row["second_size_s"] > 0 for row in rows)


@pytest.fixture
def world():
    shape, device = SHAPES["tiny"], torch.device("cpu")
    with torch.no_grad():
        model = make_model(shape, device)
        yield World(shape, model, make_cache(shape, device, 16), device, "eager", (5,))


class OtherWeights(Eager):
    """Right but for one layer's output weights."""

    def build(self, example):
        self.model = share(self.world.model, self.world.shape)
        self.model.blocks[1].out = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)


class ForgetsKeys(Eager):
    """Does not write the new keys and values."""

    @contextlib.contextmanager
    def enter(self, lists):
        with super().enter(lists) as call:
            tensors = self.world.cache.k + self.world.cache.v
            before = [t.clone() for t in tensors]
            hidden = call()
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        # What is in the cache now is what another step would read.
        with super().enter(lists):
            yield lambda: hidden + sum(t.sum() for t in tensors) * 0


class KeepsTheFirst(Eager):
    """Answers every batch as the first, as the captured graph of one batch's plan does."""

    def build(self, example):
        self.answer = None

    @contextlib.contextmanager
    def enter(self, lists):
        with super().enter(lists) as call:
            if self.answer is None:
                self.answer = call()
            yield lambda: (call(), self.answer)[1]


class Raises(Eager):
    @contextlib.contextmanager
    def enter(self, lists):
        raise RuntimeError("no such kernel")
        yield


def results(tmp_path):
    parser = argparse.ArgumentParser()
    common.add_common(parser)
    args = parser.parse_args(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    args.command = "step"
    return Results(resolve(args), "step")


def test_what_is_wrong_is_not_timed(world, tmp_path):
    kinds = {"eager": Eager, "pcg": Pcg, "weights": OtherWeights, "forgets": ForgetsKeys, "first": KeepsTheFirst,
             "raises": Raises}  # fmt: skip
    for name, kind in kinds.items():
        world.built[name] = kind(world)
        world.built[name].build(make_lists(world.shape, world.cache, 5, 0))
    with results(tmp_path) as found:
        step._size(world, 5, found, 3)
    rows = {row["variant"]: row for row in found.data["rows"]}
    assert rows["raises"]["skipped"] == "failed: RuntimeError: no such kernel" and "ready_wall_ms" not in rows["raises"]
    for name in ("weights", "forgets", "first"):
        assert rows[name]["right"] is False and "ready_wall_ms" not in rows[name], rows[name]
    for name in ("eager", "pcg"):
        assert rows[name]["right"] and rows[name]["ready_wall_ms"] > 0


def test_hand_bound_attention_is_the_models(world):
    """The model that the limit captures and Inductor compiles computes what the unmodified model does."""
    lists = make_lists(world.shape, world.cache, 5, 1)
    with Eager(world).enter(lists) as call:
        want = call()
    for padded in (False, True):
        by_hand = Compiled(world)
        by_hand.padded = padded
        by_hand.model = share(world.model, world.shape, world.cache)
        with by_hand.enter(lists) as call:
            torch.testing.assert_close(call(), want)


def test_figures():
    assert crossing([(1, 0.5), (2, 0.9), (4, 1.1)]) == 3
    assert crossing([(1, 0.5), (2, 1.2), (4, 0.9)]) is None and crossing([(8, 1.5)]) == 8
    assert waste([3, 4, 8], [4, 8]) == {
        "buckets": 2, "steps": 3, "waste": 0.0667, "worst_above_256": 1.0, "uncaptured": 0.0,
    }  # fmt: skip
    assert waste([3, 9], [4, 8])["uncaptured"] == 0.5
    for draw in TRAFFIC.values():
        sizes = draw(500, 8192)
        assert sizes == draw(500, 8192) and len(sizes) == 500 and min(sizes) >= 1 and max(sizes) <= 8192
