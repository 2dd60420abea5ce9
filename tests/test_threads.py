"""Several models and threads, and modes that change between steps."""

from __future__ import annotations

import sys
import threading
from functools import partial

import models  # noqa: F401 - defines the silly ops
import pytest
import torch
from adapters import save_plain
from paged_model import Model as Paged
from paged_model import Traffic
from three_pieces import Model, check, compile_it, pair, warm

import pcg_compile as pcg


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def together(*functions):
    errors, barrier = [], threading.Barrier(len(functions))

    def run(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_models_in_two_threads():
    def serve():
        ours, theirs = pair()
        compiled = compile_it(ours)
        warm(compiled, theirs)
        check(compiled, theirs, *[3, 12, 5, 16, 7, 4] * 4)
        assert ours.calls.item() == theirs.calls.item() and pcg.stats(compiled).replays > 0

    together(serve, serve)


def test_one_model_from_two_threads():
    class Plain(Model):
        def forward(self, x):
            return torch.ops.silly.fresh(self.first(x).relu()) + 1

    model = Plain().eval()
    compiled = compile_it(model)
    check(compiled, model, 3, 5, 12, 6)
    together(*[lambda: check(compiled, model, *[3, 12, 5, 16, 7, 4] * 8)] * 3)


def test_steps_of_two_threads_do_not_meet():
    model = Paged().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16]})
    served = [Traffic(), Traffic()]
    for traffic in served:
        for qo_lens in ({1: 5}, {1: 1, 2: 3}, {3: 2}):
            traffic.check(model, compiled, qo_lens)

    def serve(traffic):
        for _ in range(6):
            for qo_lens in ({1: 1, 2: 1}, {2: 1, 3: 4}, {1: 2, 2: 1, 3: 1}):
                traffic.check(model, compiled, qo_lens)

    together(*(lambda traffic=traffic: serve(traffic) for traffic in served))


def test_modes_that_change_between_steps():
    ours, theirs = pair()
    compiled = compile_it(ours)
    warm(compiled, theirs)
    modes = [
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad,
        lambda: torch.autocast("cpu", enabled=False), torch.inference_mode,
    ]  # fmt: skip
    for mode in modes * 2:
        for n in (3, 7, 12):
            x = torch.randn(n, 4)
            with torch.no_grad(), mode():
                got, want = compiled(x), theirs(x)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-2)
    assert ours.calls.item() == theirs.calls.item()


@torch.library.custom_op("threads::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_default_device_is_the_users_business():
    """What pcg makes for itself, rubbish for probes and metadata among it, lies where it belongs all the same."""
    attention = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)
    cache = pcg.PagedKVCache(num_layers=1, num_pages=8, page_size=4, num_kv_heads=1, head_dim=4)
    xs = {n: torch.randn(n, 1, 4) for n in (3, 5, 7, 8)}

    def function(x):
        return attention(x, x + 1, torch.ops.threads.opaque(x)) * 2

    compiled = torch.compile(function, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})
    with torch.device("meta"):
        for n in (3, 5, 7, 3, 8):
            results = []
            for call in (function, compiled):
                with pcg.step(pcg.Batch([n], [n], [[1, 2]]), cache):
                    results.append(call(xs[n]))
            torch.testing.assert_close(*results)
    stats = pcg.stats(compiled)
    assert stats.replays > 0 and stats.fallbacks == ()


class Adapted(torch.nn.Module):
    """Two layers for adapters, in graphs of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


def test_adapters_of_two_threads_do_not_meet(tmp_path):
    """Also where one of them calls the model uncompiled, or is in another graph of it."""
    model = Adapted().eval()
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=2, target_modules="all-linear")
    for name in "ab":
        pool.load(name, save_plain(tmp_path / name, {"first": (8, 8), "second": (8, 8)}))
    compiled, x = compile_it(model), torch.randn(5, 8)

    def serve(call, name):
        with pcg.step(pcg.Batch([5], adapters=[name])):
            return call(x)

    wanted = {name: serve(model, name) for name in ("a", "b", None)}
    serve(compiled, "a")

    def keep_serving(call, name):
        for _ in range(60):
            torch.testing.assert_close(serve(call, name), wanted[name])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        together(*(partial(keep_serving, call, name) for call in (model, compiled) for name in wanted))
    finally:
        sys.setswitchinterval(interval)
