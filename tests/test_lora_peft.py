"""Many adapters in one batch against PEFT, one request at a time, on a transformers model."""

from __future__ import annotations

import pytest
import torch
from adapters import llama, save_with_peft

import pcg_compile as pcg
from pcg_compile.integrations.transformers import cache_for

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 16, "lora_alpha": 4, "target_modules": TARGETS},
    "root": {"r": 8, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    "mixed": {
        "r": 2, "lora_alpha": 2, "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 9},
        "target_modules": ["q_proj", "v_proj"],
    },
}  # fmt: skip
MIXES = [["a", None, "b", "a"], ["root", "mixed", None, "b"], [None] * 4, ["mixed", "mixed", "a", "root"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_with_peft(root / name, llama("sdpa"), **config) for name, config in ADAPTERS.items()}


@torch.no_grad()
def alone(folder, prompt):
    """A request by itself, in PEFT where it has an adapter."""
    from peft import PeftModel

    model = llama("sdpa")
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    return model(prompt[None]).logits[0]


@pytest.mark.parametrize("compiler", [None, "eager", "inductor"])
def test_mixed_batches_equal_peft(folders, compiler):
    torch._dynamo.reset()
    model = llama()
    pool = pcg.lora.AdapterPool(model, max_adapters=4, max_rank=16, target_modules=TARGETS)
    for name, folder in folders.items():
        pool.load(name, folder)
    call = model
    if compiler is not None:
        call = torch.compile(model, backend="pcg", options={"compiler": compiler, "buckets": [8, 16, 32]})
    cache = cache_for(model, num_pages=16)
    pages = [cache.allocate(1) for _ in range(4)]
    torch.manual_seed(1)
    for mix in MIXES[: 2 if compiler == "inductor" else 4]:
        lengths = torch.randint(1, 8, (4,)).tolist()
        prompts = [torch.randint(0, 60, (n,)) for n in lengths]
        batch = pcg.Batch(lengths, lengths, pages, adapters=mix)
        with pcg.step(batch, cache):
            logits = call(input_ids=torch.cat(prompts)[None], position_ids=batch.positions[None]).logits[0]
        for name, prompt, got in zip(mix, prompts, logits.split(lengths), strict=True):
            want = alone(folders.get(name), prompt)
            assert (got - want).abs().max() < 1e-4
            if name is not None:
                assert (got - alone(None, prompt)).abs().max() > 1e-2
    if compiler is not None:
        assert pcg.stats(call).replays > 0


def test_decoding_goes_on_with_the_same_adapters(folders):
    torch._dynamo.reset()
    model = llama()
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=16, target_modules=TARGETS)
    for name in ("a", "b", "root"):
        pool.load(name, folders[name])
    compiled = torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 16]})
    cache = cache_for(model, num_pages=16)
    requests = {0: ("a", [5, 6, 7]), 1: (None, [8, 9]), 2: ("b", [3])}
    pages = {r: cache.allocate(1) for r in requests}
    tokens = {r: list(prompt) for r, (_, prompt) in requests.items()}
    done = dict.fromkeys(requests, 0)
    for _ in range(5):
        new = {r: tokens[r][done[r] :] for r in requests}
        lengths = [len(t) for t in new.values()]
        done = {r: len(tokens[r]) for r in requests}
        batch = pcg.Batch(
            lengths, list(done.values()), list(pages.values()), adapters=[n for n, _ in requests.values()]
        )
        with pcg.step(batch, cache):
            ids = torch.tensor([[t for some in new.values() for t in some]])
            logits = compiled(input_ids=ids, position_ids=batch.positions[None]).logits[0]
        for r, row in zip(requests, torch.tensor(lengths).cumsum(0) - 1, strict=True):
            tokens[r].append(int(logits[row].argmax()))
    for r, (name, prompt) in requests.items():
        want = list(prompt)
        for _ in range(5):
            want.append(int(alone(folders.get(name), torch.tensor(want))[-1].argmax()))
        assert tokens[r] == want


def test_gpt2_whose_linear_layers_are_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60)).eval()

    folder = save_with_peft(tmp_path / "x", make(), r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = make()
    pool = pcg.lora.AdapterPool(model, max_adapters=1, max_rank=4, target_modules=["c_attn", "c_proj"])
    pool.load("x", folder)
    from peft import PeftModel

    ids = torch.randint(0, 60, (1, 6))
    with torch.no_grad():
        want = PeftModel.from_pretrained(make(), folder).eval()(ids).logits
        with pcg.step(pcg.Batch([6], adapters=["x"])):
            got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_wrapped_model_still_does_what_transformers_asks_of_it(folders, tmp_path):
    plain, model = llama("sdpa"), llama("sdpa")
    model.tie_weights()
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=16, target_modules="all-linear")
    assert "lm_head" not in {layer.name for layer in pool._layers}
    pool.load("b", folders["b"])
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 4, "do_sample": False}
    torch.testing.assert_close(model.generate(prompt, **options), plain.generate(prompt, **options))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert again.state_dict().keys() == plain.state_dict().keys()
    for loaded in (model.load_state_dict(again.state_dict()), model.load_state_dict(again.state_dict(), assign=True)):
        assert not loaded.missing_keys and not loaded.unexpected_keys
    with torch.no_grad():
        assert model(prompt).logits.equal(plain(prompt).logits)
        with pcg.step(pcg.Batch([3], adapters=["b"])):
            got = model(prompt, use_cache=False).logits[0]
    assert (got - alone(folders["b"], prompt[0])).abs().max() < 1e-4
