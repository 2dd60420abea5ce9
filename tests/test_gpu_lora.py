"""LoRA inside CUDA graphs: another mix of adapters in every step, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.lora.packed import decode, pack
from pcg_compile.lora.routing import Router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ADAPTERS, RANK, WIDTH = 4, 16, 128
NAMES = ["a", "b", "c", "d", None]


class Source:
    def slots_of(self, names):
        return [-1 if name is None else "abcd".index(name) for name in names]

    def begin_step(self, slots):
        pass

    def end_step(self, slots):
        pass


class Layer(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.base, self.router = nn.Linear(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16), router
        a, b = torch.randn(ADAPTERS, RANK, WIDTH) / 10, torch.randn(ADAPTERS, WIDTH, RANK) / 10
        scalings, ranks = torch.tensor([0.5, 1.0, 2.0, 1.5]), torch.tensor([16, 1, 8, 5], dtype=torch.int32)
        parts = (a.to("cuda", torch.bfloat16), b.to("cuda", torch.bfloat16), scalings, ranks)
        factors, self.layout = pack(*parts, [WIDTH], router.id)
        self.register_buffer("factors", factors)

    def forward(self, x):
        y = self.base(x)
        torch.ops.pcg.lora(y, x, self.factors, self.layout)
        return y

    def expected(self, x, slots):
        """In float32, one token at a time."""
        y = nn.functional.linear(x.float(), self.base.weight.float(), self.base.bias.float())
        a, b, scalings, ranks = decode(self.layout).views(self.factors, WIDTH)
        for row, slot in enumerate(slots):
            if slot >= 0:
                rank = int(ranks[slot])
                down = x[row].float() @ a[slot, :rank].float().t()
                y[row] += scalings[slot] * (down @ b[slot, :, :rank].float().t())
        return y


@pytest.fixture(scope="module")
def setup():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Layer(Router(Source(), ADAPTERS, torch.device("cuda")))
    return layer, torch.compile(layer, backend="pcg", options={"buckets": [8, 32, 128]})


def step(compiled, x, lengths, names):
    with pcg.step(pcg.Batch(lengths, adapters=names)), torch.no_grad():
        return compiled(x)


def test_every_mix_is_right_and_nothing_is_captured_again(setup):
    layer, compiled = setup
    generator = torch.Generator().manual_seed(1)
    for n in (5, 6, 20, 100, 8):
        step(compiled, torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16), [n], [None])
    before = pcg.stats(compiled)
    for n in (5, 6, 20, 100, 8, 31, 128, 7):
        cuts = torch.randint(1, n, (3,), generator=generator).unique().tolist()
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        names = [NAMES[i] for i in torch.randint(0, 5, (len(lengths),), generator=generator).tolist()]
        x = torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16)
        slots = [s for length, name in zip(lengths, names, strict=True) for s in [NAMES.index(name)] * length]
        want = layer.expected(x, [-1 if s == 4 else s for s in slots])
        got = step(compiled, x, lengths, names).float()
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.abs().max().item())
    after = pcg.stats(compiled)
    assert after.captured == before.captured and after.replays > before.replays and after.fallbacks == ()


def test_a_steady_step_does_not_wait(setup):
    _, compiled = setup
    x = torch.randn(20, WIDTH, device="cuda", dtype=torch.bfloat16)
    mixes = [["a", None, "b"], ["c", "c", "d"], [None, None, None], ["d", "b", "a"]]
    for names in mixes:
        step(compiled, x, [3, 10, 7], names)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for names in mixes:
            step(compiled, x, [3, 10, 7], names)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for names in mixes:
            step(compiled, x, [3, 10, 7], names)
    assert not [e.name for e in trace.events() if "Pageable" in e.name]
