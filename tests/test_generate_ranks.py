"""generate_batch on two ranks over gloo: one schedule, and one rank's errors end requests on both."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from adapters import llama
from ranks import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_ranks_take_the_same_steps_and_end_requests_together(tmp_path):
    llama("sdpa").save_pretrained(tmp_path / "model")
    first, second = ranks("generation", str(tmp_path / "model"))
    want = first["want"]
    for found in (first, second):
        assert found["got"] == want
        assert found["sampled"] == first["sampled"] != want
        # Prompt 0 failed with its second token, prompt 2 was cancelled with its third, by rank 1 alone.
        assert found["after_error"] == [want[0][:2], want[1], want[2][:3], want[3]]
        assert found["after_step"] and not any(found["after_step"])
        assert found["free"] == found["pages"]
    assert second["error"] == "prompt 0 failed: RuntimeError: broken pipe"
    assert first["error"] == "prompt 0 failed: RuntimeError: rank 1: RuntimeError: broken pipe"
    assert second["step"] == "prompt 0 failed: RuntimeError: no memory"
    assert first["step"] == "prompt 0 failed: RuntimeError: rank 1: RuntimeError: no memory"
