"""Layers with adapters: what calls them, what is copied of them, and what they were before."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from adapters import save_plain
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import AdapterError, BatchError
from pcg_compile.lora.packed import PackedFactors

WIDTH = 8


def pool_for(model, tmp_path, modules, **options):
    """A pool on some layers, with an adapter "a" on all of them, and the model with that adapter in its weights."""
    from safetensors.torch import load_file

    folder = save_plain(tmp_path / "a", dict.fromkeys(modules, (WIDTH, WIDTH)), 2)
    merged = deepcopy(model)
    weights = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name in modules:
            a, b = (weights[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
            merged.get_submodule(name).weight += b @ a
    pool = pcg.lora.AdapterPool(model, 2, 4, list(modules), **options)
    pool.load("a", folder)
    return pool, merged


class TwoCalls(nn.Module):
    """One layer called by position, one by keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.two(input=torch.relu(self.one(x)))


@torch.no_grad()
def check(model, merged, plain, tokens=3, of=lambda model: model, tolerance=1e-5):
    x = torch.randn(tokens, WIDTH)
    for adapters, want in ((["a"], merged), ([None], plain)):
        with pcg.step(pcg.Batch([tokens], adapters=adapters)):
            torch.testing.assert_close(model(x), of(want)(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiler", [None, "eager", "inductor"])
def test_calls_by_position_and_by_keyword(tmp_path, compiler):
    torch._dynamo.reset()
    model = TwoCalls().eval()
    plain = deepcopy(model)
    _, merged = pool_for(model, tmp_path, ["one", "two"])
    if compiler:
        model = torch.compile(model, backend="pcg", options={"compiler": compiler, "buckets": [4]})
    check(model, merged, plain)


def test_layers_whose_owner_calls_them_only_where_they_have_hooks(tmp_path):
    """nn.TransformerEncoderLayer hands its layers' weights to a kernel of its own."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True, dropout=0.0).eval()
    plain = deepcopy(model)
    pool, merged = pool_for(model, tmp_path, ["linear1", "linear2"])
    check(model, merged, plain)
    pool.close()
    assert not model.linear1._forward_hooks
    check(model, plain, plain)


def test_products_of_attention_that_nobody_calls():
    model = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH)
    with pytest.raises(AdapterError, match="self_attn.out_proj, whose weight nn.MultiheadAttention reads"):
        pcg.lora.AdapterPool(model, target_modules=["linear1", "out_proj"])
    assert "2 layers" in repr(pcg.lora.AdapterPool(model, target_modules="all-linear"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("calls_its_class", [False, True])
def test_layers_with_a_forward_of_their_own(tmp_path, calls_its_class, compiled):
    torch._dynamo.reset()
    model = TwoCalls().eval()
    plain = deepcopy(model)
    run = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4]}) if compiled else model
    layer = model.one

    def own(x):
        return 2 * (type(layer).forward(layer, x) if calls_its_class else torch.nn.functional.linear(x, layer.weight))

    def twice(model):
        one = model.one
        bias = one.bias if calls_its_class else 0
        return lambda x: model.two(
            torch.relu(2 * (x @ plain.one.weight.T + bias) + x @ (one.weight - plain.one.weight).T)
        )

    layer.forward = own
    check(run, plain, plain, of=twice)
    pool, merged = pool_for_own(model, plain, tmp_path)
    check(run, merged, plain, of=twice)
    pool.close()
    assert vars(layer)["forward"] is own
    check(run, plain, plain, of=twice)


def pool_for_own(model, plain, tmp_path):
    """:func:`pool_for`, where the model itself can't be copied: its layer's forward belongs to one layer."""
    spare = deepcopy(plain)
    _, merged = pool_for(spare, tmp_path, ["one", "two"])
    pool = pcg.lora.AdapterPool(model, 2, 4, ["one", "two"])
    pool.load("a", tmp_path / "a")
    return pool, merged


def test_a_forward_that_is_the_class_s_own_again(tmp_path):
    """As libraries leave it that replace a forward for a while."""
    model = TwoCalls().eval()
    plain = deepcopy(model)
    model.one.forward = model.one.forward
    pool, merged = pool_for(model, tmp_path, ["one", "two"])
    check(model, merged, plain)
    pool.close()
    assert vars(model.one)["forward"] == model.one.forward
    check(model, plain, plain)


def test_parametrized_layers_and_their_copies(tmp_path):
    """They have a class of their own, which copies what it finds."""
    model = TwoCalls().eval()
    nn.utils.parametrizations.weight_norm(model.one)
    plain = deepcopy(model)
    pool = pcg.lora.AdapterPool(model, 2, 4, ["one", "two"])
    pool.load("a", save_plain(tmp_path / "a", {"one": (WIDTH, WIDTH)}, 2))
    copy = deepcopy(model)
    assert type(copy.one) is type(plain.one) and copy.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, WIDTH)
    with torch.no_grad(), pcg.step(pcg.Batch([3], adapters=["a"])):
        assert (model(x) - plain(x)).abs().max() > 1e-3
        with pytest.raises(BatchError, match="a copy of the one"):
            copy(x)
    torch.testing.assert_close(copy(x), plain(x))
    pool.close()
    assert type(model.one) is type(plain.one)


def test_a_class_that_changes_while_there_is_a_pool(tmp_path):
    model = TwoCalls().eval()
    plain = deepcopy(model)
    pool, merged = pool_for(model, tmp_path, ["one", "two"])
    top = type("Top", (type(model.one),), {})
    model.one.__class__ = top
    check(model, merged, plain)
    pool.close()
    assert type(model.one) is top
    check(model, plain, plain)
    again = pcg.lora.AdapterPool(model, 2, 4, ["one", "two"])
    again.load("a", tmp_path / "a")
    check(model, merged, plain)
    again.close()
    model.one.forward = partial(plain.one.forward)
    with pytest.raises(AdapterError, match="got another class and a forward of its own"):
        pcg.lora.AdapterPool(model, target_modules=["two", "one"])
    assert type(model.two) is nn.Linear


@pytest.mark.parametrize("own_forward", [False, True])
def test_a_pool_that_cannot_be_made_leaves_no_trace(tmp_path, monkeypatch, own_forward):
    """Memory runs out at the second layer."""
    model = TwoCalls().eval()
    if own_forward:
        model.two.forward = lambda input: nn.functional.linear(input, model.two.weight, model.two.bias)
    before = [dict(vars(layer)) for layer in (model.one, model.two)]
    empty, calls = PackedFactors.empty, []

    def fails(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return empty(self, *args)

    monkeypatch.setattr(PackedFactors, "empty", fails)
    with pytest.raises(torch.OutOfMemoryError):
        pcg.lora.AdapterPool(model, 2, 4, ["one", "two"])
    assert type(model.one) is type(model.two) is nn.Linear
    assert [vars(layer) for layer in (model.one, model.two)] == before
    plain = TwoCalls().eval()
    _, merged = pool_for_own(model, plain, tmp_path)
    check(model, merged, plain)
