"""The guard for eager metadata code: raises at the line, on any machine, and accepts the fixed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scalar_write_table import EAGER_ONLY, FINE, KINDS, NUMBER_BY_INDEX, REJECTED, TABLE, run, values

from pcg_compile.capture_guard import capture_guard
from pcg_compile.errors import CaptureHazard, GraphBreakingScalarWrite, OptionsError
from pcg_compile.passes.scalar_writes import host_scalar_write


@pytest.mark.parametrize(("statement", "verdict"), TABLE + EAGER_ONLY)
def test_the_table(statement, verdict):
    if host_scalar_write() == "fills" and (verdict == REJECTED or statement in NUMBER_BY_INDEX):
        verdict = FINE
    tensors = values("cpu")
    with capture_guard("warn", device="cpu") as found:
        run(statement, tensors)
    assert {found[0].kind} <= KINDS[verdict] if verdict != FINE else not found, found
    tensors = values("cpu")
    error = {FINE: None, REJECTED: GraphBreakingScalarWrite}.get(verdict, CaptureHazard)
    if error is None:
        with capture_guard(device="cpu"):
            run(statement, tensors)
    else:
        with pytest.raises(error), capture_guard(device="cpu"):
            run(statement, tensors)


def compute_routing(slots, max_adapters, fixed):
    permutation = torch.argsort(torch.where(slots < 0, max_adapters, slots), stable=True)
    seg_indptr = torch.empty(max_adapters + 1, dtype=torch.int64, device=slots.device)
    if fixed:
        seg_indptr[0:1].zero_()
    else:
        seg_indptr[0] = 0
    adapters = torch.arange(max_adapters, device=slots.device)
    torch.cumsum((slots[None] == adapters[:, None]).sum(1), 0, out=seg_indptr[1:])
    return permutation, seg_indptr


def test_metadata_code():
    slots = torch.tensor([2, 0, 1, 0, 2, 2])
    with capture_guard(device="cpu"):
        permutation, seg_indptr = compute_routing(slots, 4, fixed=True)
    assert permutation.tolist() == [1, 3, 2, 0, 4, 5] and seg_indptr.tolist() == [0, 2, 3, 6, 6]
    if host_scalar_write() == "fills":
        return
    with pytest.raises(GraphBreakingScalarWrite) as caught, capture_guard(device="cpu"):
        compute_routing(slots, 4, fixed=False)
    line = compute_routing.__code__.co_firstlineno + 6
    assert str(caught.value) == (
        "`seg_indptr[0] = 0` writes a host scalar into a tensor on cpu\n"
        f"  at {__file__}:{line} in compute_routing\n"
        "  A CUDA graph cannot capture it: the 0 is copied from host memory at every step.\n"
        "  Write it on the device instead: seg_indptr[0:1].zero_()"
    )


def test_the_message_of_a_wait():
    t = torch.ones(3)
    with pytest.raises(CaptureHazard) as caught, capture_guard(device="cpu"):
        length = int(t[0])  # noqa: F841
    text = str(caught.value)
    assert text.startswith("`length = int(t[0])") and "aten::_local_scalar_dense waits for the device" in text
    assert f"{__file__}:" in text and "in test_the_message_of_a_wait" in text


def test_host_data_may_be_read_and_written():
    """On a CPU run: what is made of Python or numpy data without a device, and what follows from it."""
    t = torch.zeros(4)
    with capture_guard(device="cpu"):
        host = torch.tensor([1, 2, 3])
        host[0] = 7
        assert host.tolist() == [7, 2, 3] and int(host[1:][0]) == 2
        assert (host.cumsum(0) + 1).max().item() == 13
        assert torch.from_numpy(np.arange(3)).sum().item() == 3
        t.add_(torch.tensor(2.0))
    # The same tensors, on the device by a copy.
    for statement in ("t[:3].copy_(host)", "t[host] = 0", "host.to(t.device)", "t.add_(t[host[:1]])"):
        with capture_guard(device="cpu"):
            host = torch.tensor([1, 2, 3])
            with pytest.raises(CaptureHazard):
                exec(statement, {"t": t, "host": host})


def test_a_tensor_made_before_counts_as_one_on_the_device():
    host = torch.tensor([1, 2, 3])
    with pytest.raises(CaptureHazard), capture_guard(device="cpu"):
        host.tolist()


def test_warn_collects_every_finding_once():
    t, mask = torch.zeros(4), torch.ones(4) > 0
    with capture_guard("warn", device="cpu") as found:
        t[mask] = t[0]
        count = t.new_tensor([5])
        t.tolist()
        print(t)
        t[0:1] = 2
    assert [h.kind for h in found] == ["sync", "host copy", "sync", "sync"]
    assert len({h.line for h in found}) == 4 and {h.file for h in found} == {__file__}
    # What is found is still carried out.
    assert t.tolist() == [2, 0, 0, 0] and count.tolist() == [5]


def test_a_call_from_a_library_names_both_lines(tmp_path):
    path = tmp_path / "site-packages" / "lib.py"
    path.parent.mkdir()
    path.write_text("def read(t):\n    return t.item()\n")
    scope: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    with pytest.raises(CaptureHazard) as caught, capture_guard(device="cpu"):
        scope["read"](torch.ones(()))
    assert f"{__file__}:" in str(caught.value) and f"(in the library, {path}:2 in read)" in str(caught.value)


def test_nothing_is_left_behind():
    t = torch.ones(3)
    for _ in range(2):
        with pytest.raises(CaptureHazard), capture_guard(device="cpu"):
            t.tolist()
    with pytest.raises(KeyError), capture_guard(device="cpu"):
        {}["x"]
    t[0] = 4
    assert t.tolist() == [4, 1, 1]


def test_guards_nest():
    t = torch.ones(3)
    with capture_guard("warn", device="cpu") as outer:
        with capture_guard("warn", device="cpu") as inner:
            t[0].item()
        t[1].item()
    assert len(inner) == 1 and len(outer) == 2


def test_a_host_device_run_beside_cuda_is_not_checked():
    if torch.cuda.is_available():
        pytest.skip("there the device's own tensors are checked")
    with capture_guard(device="cuda"):
        t = torch.zeros(4)
        t[0] = 0
        assert t.tolist() == [0, 0, 0, 0]


def test_a_bad_mode():
    with pytest.raises(OptionsError, match="bad mode"), capture_guard("ignore"):  # type: ignore[arg-type]
        pass
