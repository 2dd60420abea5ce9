"""The adapter pool: slots, eviction, pinning, what it refuses, and that serving goes on meanwhile."""

from __future__ import annotations

import io
import threading
from copy import deepcopy

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
        ({"target_modules": ["up", "dwon"]}, "names 'dwon', which no module"),
        ({"target_modules": []}, "names '', which no module"),
        ({"target_modules": "(up"}, "is no regular expression"),
        ({"target_modules": "u"}, "names 'u', which no module"),
        ({"max_adapters": 0}, "max_adapters=0"),
        ({"max_rank": 257}, "max_rank=257"),
        ({"fused": {"up": {"x": 3, "y": 3}}}, "do not add up to its 10 outputs"),
        ({"fused": {"up": ["x", "y", "z"]}}, "do not add up to its 10 outputs"),
        ({"fused": {"up": list("abcde")}}, "up has 5 parts"),
        ({"fused": {"qkv": {"x": 3, "y": 3}}}, "fused names 'qkv', which no module"),
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
    assert isinstance(model.up, nn.Linear)
    ids = torch.tensor([3, 1])
    torch.testing.assert_close(model(ids), plain(ids))
    # Training the base model is nobody's business here.
    model(ids).sum().backward()
    assert model.up.weight.grad is not None
    pool.close()
    assert not [name for name, _ in model.named_buffers()]
    assert type(model.up) is nn.Linear and vars(model.up).keys() == vars(plain.up).keys()
    torch.testing.assert_close(model(ids), plain(ids))
    pcg.lora.AdapterPool(model, target_modules="all-linear")


def test_parts_of_a_fused_layer(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.qkv = nn.Linear(6, 16)
    fused = {"qkv": {"q": 8, "k": 4, "v": 4}}
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=4, target_modules=["qkv"], fused=fused)
    apart = save_plain(tmp_path / "apart", {"q": (6, 8), "v": (6, 4)}, 2, lora_alpha=3)
    patterned = save_plain(tmp_path / "patterned", {"q": (6, 8), "k": (6, 4)}, 2, alpha_pattern={"k": 7})
    whole = save_plain(tmp_path / "whole", {"qkv": (6, 16)}, 4)
    from safetensors.torch import load_file

    x = torch.randn(3, 6)
    base = model.qkv.weight.data.clone(), model.qkv.bias.data
    # In one slot, so each finds what the one before left there.
    for folder, scalings in [(whole, {"qkv": 1.0}), (apart, {"q": 1.5, "v": 1.5}), (patterned, {"q": 1.0, "k": 3.5})]:
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


def test_parts_of_one_width_by_name_alone(tmp_path):
    model = nn.Sequential()
    model.gate_up = nn.Linear(6, 8)
    fused = {"gate_up": ["gate", "up"]}
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=4, target_modules=["gate_up"], fused=fused)
    # A part that does nothing beside one that does: the layer's one scaling must not be the first's.
    folder = save_plain(tmp_path / "x", {"gate": (6, 4), "up": (6, 4)}, 2, alpha_pattern={"gate": 0})
    pool.load("x", folder)
    x = torch.randn(3, 6)
    with pcg.step(pcg.Batch([3], adapters=["x"])):
        got = model.gate_up(x) - nn.functional.linear(x, model.gate_up.weight, model.gate_up.bias)
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors")[f"base_model.model.up.lora_{f}.weight"] for f in "AB")
    torch.testing.assert_close(got, torch.cat([torch.zeros(3, 4), x @ a.t() @ b.t()], 1), rtol=1e-4, atol=1e-5)
    for modules, text in [({"gate_up": (6, 8), "up": (6, 4)}, "changes up twice"), ({"gate": (6, 5)}, "6 -> 5")]:
        with pytest.raises(AdapterError, match=text):
            pool.load("y", save_plain(tmp_path / text[:4], modules))
    assert pool.names == ("x",)


def test_expressions_and_classes_that_look_linear(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 10
            self.weight = nn.Parameter(torch.randn(10, 6))

        def forward(self, x):
            return x @ self.weight.t()

    model = nn.Sequential()
    model.first, model.second = Own(), nn.Linear(10, 6)
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=2, target_modules="f.*st")
    pool.load("x", save_plain(tmp_path / "x", {"first": (6, 10)}))
    x = torch.randn(2, 6)
    with pcg.step(pcg.Batch([2], adapters=["x"])):
        assert not torch.allclose(model.first(x), x @ model.first.weight.t())
    with pytest.raises(AdapterError, match="changes second, which the pool does not cover"):
        pool.load("y", save_plain(tmp_path / "y", {"second": (10, 6)}))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_compiled_model_notices_pools_that_come_and_go(folders, compiler):
    torch._dynamo.reset()
    model = Model().eval()
    compiled = torch.compile(model, backend="pcg", options={"compiler": compiler, "buckets": [4]})
    ids = torch.tensor([3, 1, 4])
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))
    others = []
    for widths in ([10], [3, 7], [7, 3], [7, 3]):
        options = {"max_adapters": 2, "max_rank": 4, "target_modules": ["up", "down"]}
        parts = {f"part{i}": width for i, width in enumerate(widths)}
        pool = pcg.lora.AdapterPool(model, **options, fused={"up": parts})
        pool.load("a", folders["a"])
        check(compiled, folders, ["a"])
        check(compiled, folders, [None])
        pool.close()
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), expected(None, ids))
        # Takes the number that the next pool would have had.
        others.append(pcg.lora.AdapterPool(Model(), **options))


def test_a_closed_pool(folders):
    model, pool = make(folders, "a")
    with pcg.step(pcg.Batch([1], adapters=["a"])):
        model(torch.tensor([1]))
        with pytest.raises(AdapterError, match="a running batch uses the pool"):
            pool.close()
    pool.close()
    for act in (lambda: pool.load("b", folders["b"]), lambda: pool.slots_of(["a"])):
        with pytest.raises(AdapterError, match="is closed"):
            act()


def test_a_model_that_moves(folders):
    model, pool = make(folders, "a")
    model.double()
    pool.load("b", folders["b"])
    ids = torch.tensor([3, 1, 4])
    for name in "ab":
        with pcg.step(pcg.Batch([3], adapters=[name])):
            torch.testing.assert_close(model(ids).float(), expected(folders[name], ids), rtol=1e-4, atol=1e-4)
    model.to("meta")
    with pytest.raises(AdapterError, match="is on meta, and its adapter pool was made on cpu"):
        pool.load("c", folders["c"])


def test_a_compiled_model_that_is_cast(folders):
    torch._dynamo.reset()
    model, pool = make(folders, "a")
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4]}, dynamic=True)
    ids = torch.tensor([3, 1, 4])
    with torch.no_grad():
        for cast in (lambda: None, model.double, lambda: None):
            cast()
            with pcg.step(pcg.Batch([3], adapters=["a"])):
                got = compiled(ids).float()
            torch.testing.assert_close(got, expected(folders["a"], ids), rtol=1e-4, atol=1e-4)
    assert pool._layers[0].factors.dtype == torch.uint8 and pool._layers[0].layout.dtype == torch.float64


def test_numbers_that_the_layer_cannot_hold(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    file = folders["a"] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.lora_A.weight"][0, 0] = 1e6
    save_file(tensors, file)
    model = Model().half()
    pool = pcg.lora.AdapterPool(model, target_modules=["up", "down"])
    with pytest.raises(AdapterError, match=r"up are too large for torch\.float16"):
        pool.load("a", folders["a"])
    pool.load("b", folders["b"])


def test_gradients_inside_a_step_are_refused(folders):
    model, _ = make(folders, "a")
    refused = pytest.raises(BatchError, match="gradients are enabled")
    with pcg.step(pcg.Batch([1], adapters=["a"])), torch.enable_grad(), refused:
        model(torch.tensor([1]))


def test_a_copy_that_fails_costs_no_slot(folders, monkeypatch):
    model, pool = make(folders, "ab")
    put = type(pool._layers[1]).put

    def failing(layer, slot, factors):
        if layer.name == "down":
            raise RuntimeError("out of memory")
        put(layer, slot, factors)

    with monkeypatch.context() as patch:
        patch.setattr(type(pool._layers[1]), "put", failing)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                pool.load("c", folders["c"])
    check(model, folders, ["c", None, "a"])
    check(model, folders, ["b", "c"])


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


@torch.no_grad()
def test_a_copy_of_the_model_has_no_adapters_until_it_gets_a_pool(folders):
    """What is loaded later reaches the original alone: a copy that went on would compute with old factors."""
    model, pool = make(folders, names="a")
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    ids, batch = torch.randint(0, 20, (4,)), pcg.Batch([4], adapters=["b"])
    for copy in (deepcopy(model), torch.load(pickled, weights_only=False)):
        assert copy.state_dict().keys() == Model().state_dict().keys()
        for none in (None, [None]):
            with pcg.step(pcg.Batch([4], adapters=none)):
                torch.testing.assert_close(copy(ids), expected(None, ids))
        with pcg.step(batch), pytest.raises(BatchError, match="a copy of the one"):
            copy(ids)
        own = pcg.lora.AdapterPool(copy, max_adapters=1, max_rank=2, target_modules=["up", "down"])
        own.load("b", folders["b"])
        pool.load("b", folders["a"])
        for one, folder in ((copy, folders["b"]), (model, folders["a"])):
            with pcg.step(batch):
                torch.testing.assert_close(one(ids), expected(folder, ids))
        own.close()
        torch.testing.assert_close(copy(ids), expected(None, ids))
