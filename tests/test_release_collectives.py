"""Captured graphs with collectives are released by hand, ahead of their process group, and captured again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


@pytest.fixture
def group():
    def begin():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

    begin()
    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()


def reduced(x):
    y = (x * 2).relu()
    return collectives.all_reduce(y, "sum", dist.group.WORLD.group_name) + 1


def plain(x):
    return x.relu() * 3


def serve(run, function):
    for n in (3, 6, 3, 1, 8):
        x = torch.randn(n, 4)
        torch.testing.assert_close(run(x), function(x))
    return pcg.stats(run)


@torch.no_grad()
def test_graphs_are_captured_again(group):
    run, other = pcg.piecewise(**OPTIONS)(reduced), pcg.piecewise(**OPTIONS)(plain)
    before, before_other = serve(run, reduced), serve(other, plain)
    assert before.captured > 0 and before.replays > 0
    pcg.release_collectives()
    pcg.release_collectives()
    assert pcg.stats(run) == before
    again, again_other = serve(run, reduced), serve(other, plain)
    assert again.captured == 2 * before.captured and again.compiled == before.compiled
    assert again.replays > before.replays and not again.fallbacks
    # Models without collectives keep theirs.
    assert again_other.captured == before_other.captured


@torch.no_grad()
def test_a_group_may_end_and_begin_again(group):
    run = pcg.piecewise(**OPTIONS)(reduced)
    serve(run, reduced)
    pcg.release_collectives()
    dist.destroy_process_group()
    group()
    torch._dynamo.reset()
    stats = serve(run, reduced)
    assert stats.captured > 0 and not stats.fallbacks


def test_nothing_to_release():
    pcg.release_collectives()


def test_torchs_own_function_is_not_replaced():
    assert dist.destroy_process_group.__module__ == "torch.distributed.distributed_c10d"
    assert dist.destroy_process_group is dist.distributed_c10d.destroy_process_group
    assert not hasattr(dist.destroy_process_group, "__wrapped__")


def test_a_program_that_leaves_its_group_to_the_exit():
    """Released when Python exits, ahead of exit handlers that were registered before the model was compiled."""
    code = """
import atexit, gc, torch, torch.distributed as dist, pcg_compile as pcg
import torch.distributed._functional_collectives as collectives
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
run = pcg.piecewise(compiler="eager", buckets=[4])(
    lambda x: collectives.all_reduce((x * 2).relu(), "sum", dist.group.WORLD.group_name) + 1
)
atexit.register(lambda: (print(before, captures()), dist.destroy_process_group()))
x = torch.randn(3, 4)
with torch.no_grad():
    run(x)

def captures():
    run_again = pcg.stats(run).captured
    with torch.no_grad():
        run(x)
    return pcg.stats(run).captured - run_again

before = captures()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    before, at_exit = run.stdout.split()
    assert int(before) == 0 and int(at_exit) > 0
