"""The adapter pool: slots, eviction, pinning, what it refuses, and that serving goes on meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch
from adapters import save_plain
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import AdapterError, BatchError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(20, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        return x + self.down(torch.relu(self.up(x)))


MODULES = {"up": (6, 10), "down": (10, 6)}


@pytest.fixture
def folders(tmp_path):
    return {name: save_plain(tmp_path / name, MODULES, rank) for name, rank in (("a", 1), ("b", 2), ("c", 4))}


def make(folders, names="abc", **options):
    model = Model().eval()
    pool = pcg.lora.AdapterPool(
        model, **{"max_adapters": 2, "max_rank": 4, "target_modules": ["up", "down"], **options}
    )
    for name in names:
        pool.load(name, folders[name])
    return model, pool


def expected(folder, ids):
    """The base model with an adapter merged into its weights."""
    from safetensors.torch import load_file

    model = Model().eval()
    if folder is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        for name in MODULES:
            a, b = (weights[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
            getattr(model, name).weight.data += b @ a
    return model(ids)


@torch.no_grad()
def check(call, folders, names, lengths=None):
    lengths = lengths or [3] * len(names)
    ids = torch.randint(0, 20, (sum(lengths),))
    with pcg.step(pcg.Batch(lengths, adapters=names)):
        got = call(ids)
    parts = zip(names, ids.split(lengths), got.split(lengths), strict=True)
    for name, some, result in parts:
        torch.testing.assert_close(result, expected(folders.get(name), some), rtol=1e-4, atol=1e-4)


def test_slots_are_given_to_whom_a_batch_names(folders):
    model, pool = make(folders)
    assert pool.names == ("a", "b", "c") and set(pool.resident) == {"b", "c"}
    for names in (["a", None, "b"], ["c", "c", "a"], [None], ["b", "c"], ["a"]):
        check(model, folders, names)
        assert set(names) - {None} <= set(pool.resident) and len(pool.resident) <= 2


def test_the_least_recently_used_adapter_leaves(folders):
    model, pool = make(folders)
    check(model, folders, ["b"])
    check(model, folders, ["a"])
    assert set(pool.resident) == {"a", "b"}
    pool.pin("b")
    check(model, folders, ["c"])
    check(model, folders, ["a"])
    assert set(pool.resident) == {"a", "b"}
    pool.unpin("b")


def test_a_reload_reads_no_file(folders, tmp_path):
    model, _ = make(folders)
    files = {name: folder.rename(tmp_path / f"moved-{name}") for name, folder in folders.items()}
    check(model, files, ["a", "b"])
    check(model, files, ["c", None])


def test_serving_goes_on_while_adapters_come_and_go(folders):
    torch._dynamo.reset()
    model, pool = make(folders, "ab")
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8, 16]})
    for lengths in ([3], [4], [5], [9], [16]):
        check(compiled, folders, [None], lengths)
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    with pcg.expect(compiled, graphs=0, captured=0):
        for names in (["a", "b"], ["b", None]):
            check(compiled, folders, names, [1, 3])
        pool.load("c", folders["c"])
        check(compiled, folders, ["c", "a"], [7, 2])
        pool.unload("a")
        check(compiled, folders, ["b", "c", None], [1, 1, 1])
    assert addresses == [buffer.data_ptr() for buffer in model.buffers()]
    assert pcg.stats(compiled).replays > 0


def test_a_running_batch_keeps_its_adapters(folders):
    model, pool = make(folders, "ab")
    ids = torch.randint(0, 20, (4,))
    with torch.no_grad(), pcg.step(pcg.Batch([4], adapters=["a"])):
        model(ids)
        for act in (lambda: pool.unload("a"), lambda: pool.load("a", folders["c"])):
            with pytest.raises(AdapterError, match="'a' is in a running batch"):
                act()
        # Takes the other slot, b's.
        pool.load("c", folders["c"])
        assert set(pool.resident) == {"a", "c"}
        torch.testing.assert_close(model(ids), expected(folders["a"], ids), rtol=1e-4, atol=1e-4)
    pool.unload("a")
    assert pool.names == ("b", "c")


def test_an_error_in_a_step_frees_its_slots(folders):
    model, pool = make(folders, "ab")
    with pytest.raises(ZeroDivisionError), pcg.step(pcg.Batch([2], adapters=["a"])):
        model(torch.tensor([1, 2]))
        _ = 1 // 0
    pool.unload("a")


def test_batches_that_cannot_be_served(folders):
    model, pool = make(folders)
    ids = torch.tensor([1, 2, 3])
    for names, text in [
        (["a", "x", None], "request 1 names the adapter 'x'"),
        (["a", "b", "c"], "names 3 adapters, and the pool has 2 slots"),
    ]:
        with pytest.raises(BatchError, match=text), pcg.step(pcg.Batch([1, 1, 1], adapters=names)):
            model(ids)
    pool.pin("a")
    with (
        pytest.raises(BatchError, match="no slot for adapter"),
        pcg.step(pcg.Batch([1, 1, 1], adapters=["b", "c", "b"])),
    ):
        model(ids)
    pool.unpin("a")
    check(model, folders, ["c", None, "b"])


def test_what_a_pool_refuses(folders, tmp_path):
    for options, text in [
        ({"target_modules": ["embed"]}, "names embed, which is an Embedding"),
        ({"target_modules": ["norm", "up"]}, "names norm, which is a LayerNorm"),
        ({"target_modules": ["q_proj"]}, "Its linear layers are: up, down"),
        ({"max_adapters": 0}, "max_adapters=0"),
        ({"max_rank": 257}, "max_rank=257"),
        ({"fused": {"up": {"x": 3, "y": 3}}}, "do not add up to its 10 outputs"),
    ]:
        with pytest.raises(AdapterError, match=text):
            make(folders, "", **options)
    model, pool = make(folders, "", target_modules=["up"], max_rank=2)
    for name, text in [("a", "changes down, which the pool does not cover"), ("c", "the pool max_rank=2|down")]:
        with pytest.raises(AdapterError, match=text):
            pool.load(name, folders[name])
    wrong = save_plain(tmp_path / "wrong", {"up": (6, 9)}, 2)
    with pytest.raises(AdapterError, match="6 -> 9, the model's 6 -> 10"):
        pool.load("wrong", wrong)
    with pytest.raises(AdapterError, match="belongs to another adapter pool"):
        pcg.lora.AdapterPool(model, target_modules=["up"])
    with pytest.raises(AdapterError, match="no adapter is named 'zzz'"):
        pool.unload("zzz")
    assert pool.names == ()


def test_the_model_stays_what_it_was(folders):
    plain = Model().eval()
    model, pool = make(folders)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    assert type(model.up) is nn.Linear
    ids = torch.tensor([3, 1])
    torch.testing.assert_close(model(ids), plain(ids))
    # Training the base model is nobody's business here.
    model(ids).sum().backward()
    assert model.up.weight.grad is not None
    pool.close()
    assert not [name for name, _ in model.named_buffers()]
    torch.testing.assert_close(model(ids), plain(ids))
    pcg.lora.AdapterPool(model, target_modules="all-linear")


def test_parts_of_a_fused_layer(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.qkv = nn.Linear(6, 16)
    fused = {"qkv": {"q": 8, "k": 4, "v": 4}}
    pool = pcg.lora.AdapterPool(model, max_adapters=3, max_rank=4, target_modules=["qkv"], fused=fused)
    apart = save_plain(tmp_path / "apart", {"q": (6, 8), "v": (6, 4)}, 2, lora_alpha=3)
    patterned = save_plain(tmp_path / "patterned", {"q": (6, 8), "k": (6, 4)}, 2, alpha_pattern={"k": 7})
    whole = save_plain(tmp_path / "whole", {"qkv": (6, 16)}, 4)
    from safetensors.torch import load_file

    x = torch.randn(3, 6)
    base = model.qkv.weight.data.clone(), model.qkv.bias.data
    for folder, scalings in [(apart, {"q": 1.5, "v": 1.5}), (patterned, {"q": 1.0, "k": 3.5}), (whole, {"qkv": 1.0})]:
        pool.load(folder.name, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        changed = base[0].clone()
        rows = {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16), "qkv": slice(0, 16)}
        for part, scaling in scalings.items():
            a, b = (weights[f"base_model.model.{part}.lora_{f}.weight"] for f in "AB")
            changed[rows[part]] += scaling * (b @ a)
        with torch.no_grad(), pcg.step(pcg.Batch([3], adapters=[folder.name])):
            got = model.qkv(x)
        torch.testing.assert_close(got, nn.functional.linear(x, changed, base[1]), rtol=1e-4, atol=1e-4)


def test_loading_from_another_thread(folders):
    model, pool = make(folders, "a", max_adapters=3)
    stop, errors = threading.Event(), []

    def churn():
        try:
            while not stop.is_set():
                for name in "bc":
                    pool.load(name, folders[name])
                    pool.unload(name)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(50):
            check(model, folders, ["a", None])
    finally:
        stop.set()
        thread.join()
    assert not errors
