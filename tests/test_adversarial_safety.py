"""What a search for gaps in the safety passes, the guard, batches, routing and options has found."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from adapters import save_plain
from hazard_tracing import traced
from scalar_write_table import TABLE, WAITS, function_of, values

import pcg_compile as pcg
from pcg_compile.errors import BatchError, OptionsError
from pcg_compile.options import Options
from pcg_compile.passes.scalar_writes import host_scalar_write

copies = pytest.mark.skipif(host_scalar_write() == "fills", reason="this torch fills where others copy a host scalar")
WAITING = [row for row, verdict in TABLE if verdict == WAITS] + ["t[index[0]] = 3", "t.tolist()", "t[n[0].int()] = 3"]


@pytest.mark.parametrize("statement", WAITING)
def test_check_lists_what_dynamo_breaks_the_graph_at(statement):
    arguments = values("cpu")
    hazards = pcg.check(function_of(statement, list(arguments)), *arguments.values())
    assert {h.kind for h in hazards} & {"sync", "dynamic shape"}
    assert all(h.line == 2 and h.cure for h in hazards)


class Breaking(torch.nn.Module):
    def scale(self, x):
        return x * x.sum().item()

    def forward(self, x):
        x = self.scale(x)
        if x.sum() > 0:
            x = x + 1
        x[0, 0] = 3
        return x


def by_size(t, x):
    t[x.shape[0] - 2] = 3
    return t + 0


@copies
def test_check_sees_behind_a_break():
    found = [(h.kind, h.line) for h in pcg.check(Breaking(), torch.ones(5, 4))]
    first = Breaking.scale.__code__.co_firstlineno
    for one in (("sync", first + 1), ("sync", first + 5), ("scalar write", first + 7)):
        assert found.count(one) == 1
    assert not {"sync"} & {h.kind for h in pcg.check(by_size, torch.arange(6), torch.ones(4))}
    assert pcg.check(lambda x: (print("a break"), x + 1)[1], torch.ones(3)) == []


def by_call(t):
    t[len(t.shape)] = 0


def by_product(t):
    t[(1 + 1) * 2] = 3


def by_nothing(t):
    t.sum()[()] = 0


def twice(t):
    t[0] = t[1] = 2


@copies
@pytest.mark.parametrize(
    ("function", "cure"),
    [
        (by_call, "t[len(t.shape)].zero_()"),
        (by_product, "t[(1 + 1) * 2].fill_(3)"),
        (by_nothing, "t.sum()[()].zero_()"),
        (twice, "t[0:1].fill_(2)"),
    ],
)
def test_indices_are_quoted_whole(function, cure):
    assert f"device instead: {cure}" in traced(function, torch.ones(8)).hazards[0].cure
    written = traced(function, torch.ones(8), scalar_writes="rewrite")
    assert written.notes and not written.hazards and "None" not in written.notes[0]
    with pcg.capture_guard("warn") as found:
        function(torch.ones(8))
    assert function is twice or f"device instead: {cure}" in found[0].cure


def test_numpy_and_the_way_to_the_host_on_a_cpu_run():
    def to_host(t):
        return t + t.cpu()

    def elements(t):
        return t + torch.tensor([t[0], t[1]]).sum()

    def number(t):
        t[1] = np.int64(2)
        return t + 0

    def array(t):
        return t + torch.as_tensor(np.ones(8, dtype=np.float32), device=t.device)

    for function, kind in ((to_host, "sync"), (elements, "sync"), (number, "host copy"), (array, "host copy")):
        seen = traced(function, torch.arange(8.0))
        assert seen.kinds() == {kind}, function
        assert torch.equal(seen.result, function(torch.arange(8.0)))


def test_the_guard_on_a_cpu_knows_what_stays_on_the_host():
    device = torch.arange(6)

    def host():
        lengths = torch.tensor([3, 1, 2])
        kept = torch.where(lengths > 1, 0, lengths)
        spare = lengths.new_zeros(3)
        spare[0] = int(kept.max())
        pcg.lora.route([1, 0, -1], 2)
        return kept[kept > 0].tolist(), spare.tolist()

    with pcg.capture_guard(device="cpu"):
        assert host() == ([1], [1, 0, 0])
        torch.nn.functional.one_hot(device, 6)
    with pcg.capture_guard("warn", device="cpu") as found:
        torch.tensor([device[0], device[1]])
        device.new_tensor([device[0]])
        torch.nn.functional.one_hot(device)
        torch.where(device > 1, torch.tensor(0), device)
    assert [h.kind for h in found] == ["sync", "sync", "host copy", "sync", "host copy"]


HUGE = 2**31


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: pcg.Batch([2**63]), r"request 0 has qo_lens\[0\] = 9223372036854775808"),
        (lambda: pcg.Batch(np.array([2**63], dtype=np.uint64)), "request 0"),
        (lambda: pcg.Batch([2**62, 2**62]), r"qo_lens\[0\] = 4611686018427387904"),
        (lambda: pcg.Batch([HUGE // 2, HUGE // 2]), f"{HUGE} tokens"),
        (lambda: pcg.Batch([1, 1], [1, HUGE]), rf"request 1 has kv_lens\[1\] = {HUGE}"),
        (lambda: pcg.Batch([1], [1], [[HUGE]]).padded(2, 16), "request 0 uses page"),
        (lambda: pcg.Batch([1], [1], np.array([[HUGE]])).padded(2, 16), "request 0 uses page"),
        (lambda: pcg.Batch([1], [1], [[2**30]]).padded(2, 16).slot_mapping, f"slot {2**34} is in use"),
        (lambda: pcg.Batch([1], [1], [[[1]]]), "lists within"),
        (lambda: pcg.Batch([1]).padded(HUGE, 16), f"bucket is {HUGE}"),
        (lambda: pcg.Batch([1]).padded(2.0, 16), "bucket is 2.0"),
        (lambda: pcg.Batch([1]).padded(2, "16"), "page_size is '16'"),
        (lambda: pcg.Batch([1], adapters=5), "adapters is 5"),
    ],
)
def test_figures_that_no_metadata_hold(make, says):
    with pytest.raises(BatchError, match=says):
        make()


def test_a_batch_keeps_its_lengths():
    qo, kv = np.array([2, 3]), np.array([4, 3])
    batch = pcg.Batch(qo, kv)
    qo[:], kv[:] = 1, 9
    assert batch.padded(8, 1).qo_indptr.tolist() == [0, 2, 5, 8] and batch.host_positions().tolist() == [2, 3, 0, 1, 2]


def reference_routing(slots, adapters):
    keys = np.where((slots < 0) | (slots >= adapters), adapters, slots)
    return np.argsort(keys, kind="stable"), np.array([(keys < a).sum() for a in range(adapters + 1)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_routing_of_any_slots(dtype):
    random = np.random.default_rng(0)
    for tokens, adapters in ((0, 3), (1, 1), (7, 2), (64, 5), (300, 64)):
        slots = random.integers(-2, adapters + 3, tokens)
        permutation, seg_indptr = reference_routing(slots, adapters)
        out = pcg.lora.route([-1] * tokens, adapters)
        for given in (torch.tensor(slots, dtype=dtype), slots.tolist()):
            routing = pcg.lora.route(given, adapters, out=out)
            assert routing is out and routing.permutation.dtype == routing.seg_indptr.dtype == torch.int32
            assert routing.permutation.tolist() == permutation.tolist()
            assert routing.seg_indptr.tolist() == seg_indptr.tolist()


@pytest.mark.parametrize(
    ("slots", "adapters"),
    [([0.5], 2), ([True], 2), (torch.tensor([1], dtype=torch.int8), 200), ([0], -1), ([0], 1.5), ([0], True)],
)
def test_routing_refuses_what_is_no_slot(slots, adapters):
    with pytest.raises(ValueError, match=r"slots holds|max_adapters is"):
        pcg.lora.route(slots, adapters)


def test_options_of_numpy_and_of_no_kind():
    assert Options(buckets=np.array([4, 8]), max_tokens=np.int64(64)).buckets == (4, 8)  # type: ignore[arg-type]
    for bad in ({"capture": np.array([1, 2])}, 5, [("buckets", [8])]):
        with pytest.raises(OptionsError, match=r"options|option 'capture'"):
            Options.parse(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dims", "tensor"), [(1, torch.ones(3)), (-2, torch.ones(3)), (0, torch.tensor(1.0))])
def test_a_dimension_that_the_argument_lacks(dims, tensor):
    run = pcg.piecewise(dynamic={"x": dims}, compiler="eager")(lambda x: x + 1)
    with pytest.raises(OptionsError, match=rf"dynamic\['x'\] names dimension {dims} of a tensor of {tensor.dim()}"):
        run(tensor)
    several = pcg.piecewise(dynamic={"x": 0}, compiler="eager")(lambda x: x[0] + x[1])
    assert several([torch.ones(3), torch.tensor(1.0)]).tolist() == [2, 2, 2]


@torch.no_grad()
def test_a_load_cannot_take_the_slot_that_a_step_has_just_chosen(tmp_path, monkeypatch):
    folders = {name: save_plain(tmp_path / name, {"0": (4, 4)}) for name in "ab"}
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=2, target_modules=["0"])
    pool.load("a", folders["a"])
    x = torch.randn(2, 4)
    with pcg.step(pcg.Batch([2], adapters=["a"])):
        expected = model(x)
    begin = pool.begin_step
    loads = threading.Thread(target=pool.load, args=("b", folders["b"]))

    def late(slots):
        loads.start()
        loads.join(0.3)
        begin(slots)

    monkeypatch.setattr(pool, "begin_step", late)
    with pcg.step(pcg.Batch([2], adapters=["a"])):
        got = model(x)
    loads.join()
    assert torch.equal(got, expected) and pool.names == ("a", "b")
