"""What torch is set to around a call changes its results as it changes eager's, whatever was traced before."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

import pcg_compile as pcg


@contextmanager
def setting(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype):
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


STATES = {
    "no_grad": [torch.no_grad],
    "inference": [torch.inference_mode],
    "gradients": [torch.enable_grad],
    "bfloat16": [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "bfloat16 gradients": [torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "bfloat16 inference": [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "float16": [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.float16)],
    "autocast off": [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)],
    "float64 default": [torch.no_grad, lambda: default_dtype(torch.float64)],
    "default device": [torch.no_grad, lambda: torch.device("meta")],
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        return y, self.second(y.relu()), torch.full((2,), 1.5)


@pytest.mark.parametrize("entry", ["torch.compile", "piecewise", "inputs", "load"])
def test_results_follow_the_ambient_state(entry, tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, options = Model().eval(), {"compiler": "eager", "buckets": [4, 8]}
    if entry == "piecewise":
        run = pcg.piecewise(**options)(model.forward)
    elif entry == "inputs":
        run = pcg.piecewise(guards="inputs", **options)(model.forward)
    else:
        run = torch.compile(model, backend="pcg", options=options, dynamic=True)
    if entry == "load":
        with torch.no_grad():
            run(torch.randn(5, 8))
        pcg.save(run, tmp_path / "program")
        torch._dynamo.reset()
        run = pcg.load(model, tmp_path / "program")
    # More states than Dynamo compiles one function for.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name in ("no_grad", *STATES, *reversed(STATES)):
            x = torch.randn(3, 8)
            with ExitStack() as stack:
                for state in STATES[name]:
                    stack.enter_context(state())
                got, want = run(x), model(x)
            for ours, theirs in zip(got, want, strict=True):
                about = [(t.dtype, t.device, t.requires_grad, t.is_inference()) for t in (ours, theirs)]
                assert about[0] == about[1], name
                if not theirs.is_meta:
                    torch.testing.assert_close(ours, theirs)
