"""Pools made and dropped one after the other on one model: none is ever taken for another."""

import gc

import pytest
import torch
from adapters import save_plain
from torch import nn

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(x).relu()


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(0)
    return [save_plain(tmp_path / str(i), {"q_proj": (8, 8)}, target_modules=["q_proj"]) for i in range(2)]


def pool_on(model, folder, slots=2):
    pool = pcg.lora.AdapterPool(model, slots, 4, ["q_proj"])
    pool.load("a", folder)
    return pool


def check(model, compiled, sizes, adapters=("a", None)):
    for n in sizes:
        x = torch.randn(n, 8)
        for name in adapters:
            batch = [pcg.Batch([n], adapters=[name]) for _ in range(2)]
            with torch.no_grad(), pcg.step(batch[0]):
                got = compiled(x)
            with torch.no_grad(), pcg.step(batch[1]):
                torch.testing.assert_close(got, model(x))


def test_ids_are_never_given_out_twice(folders):
    model, seen = Model().eval(), set()
    for i in range(50):
        pool = pool_on(model, folders[i % 2])
        check(model, model, (3,))
        assert pool.id not in seen
        seen.add(pool.id)
        pool.close()
        del pool
        if i % 10 == 5:
            gc.collect()
    # The layer is the base model's again.
    x = torch.randn(3, 8)
    assert type(model.q_proj) is nn.Linear
    assert torch.equal(model(x), nn.functional.linear(x, *model.q_proj.parameters()).relu())


@pytest.mark.parametrize("collect", [True, False])
def test_compiled_steps_use_the_pool_of_today(folders, collect):
    torch._dynamo.reset()
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options=OPTIONS, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        for i in range(4):
            pool = pool_on(model, folders[i % 2], slots=1 + i % 3)
            check(model, compiled, (3, 5, 9) if i % 2 else (8, 2))
            pool.close()
            with torch.no_grad():
                x = torch.randn(4, 8)
                torch.testing.assert_close(compiled(x), model(x))
            if collect:
                del pool
                gc.collect()
    assert pcg.stats(compiled).replays


def test_two_models_with_pools_of_their_own_share_a_class(folders):
    torch._dynamo.reset()
    models = [Model().eval() for _ in range(2)]
    pools = [pool_on(model, folder) for model, folder in zip(models, folders, strict=True)]
    compiled = [torch.compile(model, backend="pcg", options=OPTIONS, dynamic=True) for model in models]
    for _ in range(2):
        for model, fast in zip(models, compiled, strict=True):
            check(model, fast, (3, 5, 8))
    assert pools[0].id != pools[1].id
