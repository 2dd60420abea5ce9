"""The adapter pool on a GPU: loads on one stream while steps run on another, and what a load costs."""

from __future__ import annotations

import pytest
import torch
from adapters import save_plain
from torch import nn

import pcg_compile as pcg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WIDTH = 256
MODULES = {"0": (WIDTH, WIDTH), "1": (WIDTH, WIDTH)}
#: Cycles that keep a stream busy for some tens of milliseconds.
BUSY = 50_000_000


@pytest.fixture
def setup(tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    folders = {name: save_plain(tmp_path / name, MODULES, rank) for name, rank in (("a", 4), ("b", 16), ("c", 7))}
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).cuda().eval()
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=16, target_modules=["0", "1"])
    for name, folder in folders.items():
        pool.load(name, folder)
    return model, pool, folders


@torch.no_grad()
def expected(model, folder, x):
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors", device="cuda")
    for name, layer in model.named_children():
        a, b = (weights[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        x = nn.functional.linear(x, layer.weight + b @ a, layer.bias)
    return x


def close(got, want):
    return (got - want).abs().max() < 1e-2 * want.abs().max()


def step(call, x, name):
    with pcg.step(pcg.Batch([len(x)], adapters=[name])):
        return call(x)


def test_a_load_waits_for_the_steps_that_read_the_slot(setup):
    model, pool, folders = setup
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    x = torch.randn(8, WIDTH, device="cuda")
    step(compiled, x, "a")
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    got = step(compiled, x, "a")
    with torch.cuda.stream(torch.cuda.Stream()):
        pool.load("b", folders["b"])
    torch.cuda.synchronize()
    assert pool.resident == ("b",)
    assert close(got, expected(model, folders["a"], x))
    assert not close(got, expected(model, folders["b"], x))


def test_a_step_waits_for_loads_on_other_streams(setup):
    model, pool, folders = setup
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    x = torch.randn(8, WIDTH, device="cuda")
    step(compiled, x, "a")
    torch.cuda.synchronize()
    for name in "bc":
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(BUSY)
            pool.pin(name)
            pool.unpin(name)
    # Two streams of steps: neither may be forgotten.
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results.append(step(compiled, x, "c"))
            stream.synchronize()
    want = expected(model, folders["c"], x)
    assert all(close(got, want) for got in results)


def test_a_reload_is_one_pinned_copy_and_does_not_wait(setup):
    _, pool, _ = setup
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=activities) as trace:
            pool.pin("b")
            pool.unpin("b")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copies = [event.name for event in trace.events() if "HtoD" in event.name]
    assert len(copies) == 1 and "Pinned" in copies[0]


def test_a_load_changes_no_address_and_captures_nothing(setup):
    model, pool, folders = setup
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [8]})
    x = torch.randn(5, WIDTH, device="cuda")
    step(compiled, x, "a")
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    with pcg.expect(compiled, graphs=0, captured=0):
        for name in "bcab":
            pool.unload(name)
            pool.load(name, folders[name])
            assert close(step(compiled, x, name), expected(model, folders[name], x))
    assert addresses == [buffer.data_ptr() for buffer in model.buffers()]


def test_a_model_that_moves_to_the_gpu_afterwards(tmp_path):
    folder = save_plain(tmp_path / "a", {"0": (4, 4)})
    model = nn.Sequential(nn.Linear(4, 4))
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=2, target_modules=["0"])
    model.cuda()
    with pytest.raises(pcg.errors.AdapterError, match="is on cuda:0, and its adapter pool was made on cpu"):
        pool.load("a", folder)
