"""Typical mistakes: each ends in one message of pcg's that names what happened, where, and what to do."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.cures import cure_of
from pcg_compile.errors import AdapterError, BatchError, OptionsError, SplitOpNotFound, TraceError

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}
IDS = torch.tensor([1, 2, 3])
HERE = "test_mistakes.py"


class Layers(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout))

    def forward(self, ids):
        return self.layers(self.embed(ids))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(model, **options):
    return torch.compile(model, backend="pcg", options={**OPTIONS, **options}, dynamic=True)


def decorated(model, **options):
    return pcg.piecewise(**{**OPTIONS, **options})(model.forward if isinstance(model, nn.Module) else model)


def model_of(attention):
    transformers = pytest.importorskip("transformers")
    import pcg_compile.integrations.transformers  # noqa: F401 - registers "pcg"

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def in_step(call, lens=(3,), pages=((1,),), **batch):
    """``call(compile_it(model))`` inside a step of a paged model."""

    def run(compile_it):
        model = model_of("pcg")
        from pcg_compile.integrations.transformers import cache_for

        cache = cache_for(model, num_pages=8)
        with pcg.step(pcg.Batch(list(lens), list(lens), [list(row) for row in pages], **batch), cache):
            call(compile_it(model), cache)

    return run


def _half_elsewhere():
    model = Layers().eval()
    model.layers.to("meta")
    return model


def _unknown_adapter(model, cache):
    pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=4, target_modules=["q_proj"])
    try:
        model(IDS[None])
    finally:
        pool.close()


def _float_paged(model, cache):
    model(IDS[None].float())


def _misspelt_option(_):
    @pcg.split_op("mistakes::option", qo_indptrr="x")
    def op(x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _misspelt_role(_):
    @pcg.split_op("mistakes::role", qo_indptr="ends")
    def op(x: torch.Tensor, ens: torch.Tensor) -> torch.Tensor:
        return x + 1


def _second_pool(_):
    model = model_of("sdpa")
    for _ in range(2):
        pool = pcg.lora.AdapterPool(model, max_adapters=2, max_rank=4, target_modules=["q_proj"])
    pool.close()


def _pool(folder=None, targets=("q_proj",)):
    def run(_):
        pool = pcg.lora.AdapterPool(model_of("sdpa"), max_adapters=2, max_rank=4, target_modules=list(targets))
        pool.load("a", folder)

    return run


WAYS = {"torch.compile": compiled, "piecewise": decorated}
#: What is done, with something that compiles; the error, or RuntimeError with its note; what its text holds.
ERRORS = {
    "option name": (lambda c: c(Layers(), bucket=[4])(IDS), OptionsError, ["Did you mean 'buckets'?", "Write: "]),
    "option value": (lambda c: c(Layers(), compiler="tvm")(IDS), OptionsError, ["'tvm'", "inductor"]),
    "split op": (lambda c: c(Layers(), split_ops=["a::b"])(IDS), SplitOpNotFound, ["a::b", "Write: "]),
    "float ids": (lambda c: c(Layers().eval())(IDS.float()), RuntimeError, [HERE, "Write: ids.long()"]),
    "float ids, paged": (in_step(_float_paged), RuntimeError, ["modeling_llama.py", "Write: ids.long()"]),
    "shapes": (lambda c: c(nn.Linear(4, 4))(torch.ones(3, 5)), RuntimeError, ["linear.py"]),
    "weights elsewhere": (lambda c: c(_half_elsewhere())(IDS), RuntimeError, [HERE, "model.to(x.device)"]),
    "no step": (lambda c: c(model_of("pcg"))(IDS[None]), BatchError, ["with pcg.step(batch, cache):"]),
    "warm-up without a step": (lambda c: pcg.warmup(c(model_of("pcg")), IDS[None]), BatchError, ["with pcg.step("]),
    "padded prompts": (in_step(lambda m, _: m(torch.ones(2, 3, dtype=torch.long)), (3, 3), ((1,), (2,))), BatchError,
                       ["packed into one row", "input_ids[None]"]),
    "tokens": (in_step(lambda m, _: m(torch.ones(1, 4, dtype=torch.long))), BatchError, ["4 tokens", "has 3"]),
    "page 0": (in_step(lambda m, _: m(IDS[None]), pages=((0,),)), BatchError, ["page 0", "allocate()"]),
    "a page twice": (in_step(lambda m, _: None, (3, 2), ((1,), (1,))), BatchError, ["which request 1 uses too"]),
    "too few pages": (in_step(lambda m, _: None, (30,)), BatchError, ["needs 2", "cache.allocate(1)"]),
    "a step in a step": (in_step(lambda m, cache: pcg.step(pcg.Batch([3], [3], [[1]]), cache).__enter__()), BatchError,
                         ["running already", "Leave it"]),
    "hidden tokens": (in_step(lambda m, _: m(IDS[None], attention_mask=torch.tensor([[0, 1, 1]]))), BatchError,
                      ["attention mask", "Leave attention_mask out"]),
    "use_cache": (in_step(lambda m, _: m(IDS[None], use_cache=True)), BatchError, ["use_cache=True", "Leave it out"]),
    "adapter": (in_step(_unknown_adapter, adapters=["x"]), BatchError, ["adapter 'x'", "pool.load('x', folder)"]),
    "generate, paged": (lambda c: model_of("pcg").generate(IDS[None]), BatchError, ["generate_batch(model, prompts)"]),
    "target module": (_pool(targets=["qq"]), AdapterError, ["'qq'", "q_proj"]),
    "adapter folder": (_pool("/nonexistent"), AdapterError, ["is no folder", "save_pretrained()"]),
    "a second pool": (_second_pool, AdapterError, ["another adapter pool", "pool.close()"]),
    "mode": (lambda c: torch.compile(Layers(), backend="pcg", mode="max-autotune")(IDS), OptionsError,
             ["mode='max-autotune'", "max_autotune = True"]),
    "role's name": (_misspelt_option, OptionsError, ["Did you mean 'qo_indptr'?", "Write"]),
    "role": (_misspelt_role, OptionsError, ["'ends'", "ens"]),
    "stats of another model": (lambda c: pcg.stats(nn.Linear(2, 2)), TypeError, ["@pcg.piecewise", "forward"]),
    "count": (lambda c: pcg.expect(nothing=1).__enter__(), TypeError, ["expect() counts steps", "nothing"]),
}  # fmt: skip
BOTH = {"option name", "option value", "split op", "float ids", "float ids, paged", "shapes", "weights elsewhere",
        "no step", "warm-up without a step", "padded prompts", "tokens"}  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "way"), [(m, w) for m in ERRORS for w in WAYS if m in BOTH or w == "torch.compile"]
)
def test_an_error_is_one_message(mistake, way, caplog):
    run, error, parts = ERRORS[mistake]
    with pytest.raises(error) as raised:
        run(WAYS[way])
    found = raised.value
    text = "\n".join([str(found), *getattr(found, "__notes__", ())])
    if error is RuntimeError and way == "torch.compile":
        assert type(found) is TraceError
    if error is not RuntimeError or sys.version_info >= (3, 11) or way == "torch.compile":
        assert all(part in text for part in parts), text
    assert len(text.splitlines()) <= 6 and "Traceback" not in text and "ynamo" not in text and "FakeTensor" not in text
    # No other error is printed in front of it.
    assert found.__cause__ is None and (found.__context__ is None or found.__suppress_context__)
    assert not [record for record in caplog.records if record.name == "pcg_compile"]


def _sizes_that_are_fixed(_):
    run = torch.compile(Layers().eval(), backend="pcg", options=OPTIONS, dynamic=False)
    for n in range(1, 12):
        run(torch.ones(n, dtype=torch.long))


def _each(function, *values):
    def run(compile_it):
        fast = compile_it(function)
        for value in values:
            fast(torch.ones(3), value)

    return run


def _gradients(compile_it):
    with torch.enable_grad():
        compile_it(Layers().eval())(IDS)


def _attention_dropout(compile_it):
    compile_it(lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1) + 1)(torch.ones(3, 2, 5, 4))


def _generate(compile_forward):
    def run(_):
        model = model_of("sdpa")
        compile_forward(model)
        model.generate(IDS[None], max_new_tokens=6, do_sample=False, pad_token_id=0)

    return run


#: What is done; the one line that is logged holds these.
LOGGED = {
    "gradients": (_gradients, ["embed.weight requires them", "torch.inference_mode()"]),
    "an int": (_each(lambda x, k: x * k, 2, 3, 4), [HERE, "depends on k", "torch.tensor(value"]),
    "training": (lambda c: c(Layers(0.1).train())(IDS), [HERE, "call model.eval()"]),
    "attention's dropout": (_attention_dropout, [HERE, "call model.eval()"]),
    "a float": (_each(lambda x, t: (x / t) * 2 + 1, *(i / 7 for i in range(1, 12))), [HERE, "pass a tensor"]),
    "an LSTM": (lambda c: c(Recurrent().eval())(torch.ones(3, 2, 8)), [HERE, "allow_rnn = True"]),
    "fixed sizes": (_sizes_that_are_fixed, [HERE, "has reached Dynamo's", "@pcg.piecewise(dynamic={...})"]),
    "generate, model.compile": (_generate(lambda m: m.compile(backend="pcg", options=OPTIONS)),
                                ["cache_utils.py", "pcg.accelerate(model)", "model.generate_batch(prompts)"]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mistake", LOGGED)
def test_what_runs_otherwise_is_logged_once_with_the_cure(mistake, way, caplog, monkeypatch):
    monkeypatch.setattr("pcg_compile.uncaptured.compile_all_with_inductor", lambda gm, inputs: gm.forward)
    run, parts = LOGGED[mistake]
    with caplog.at_level(logging.WARNING, "pcg_compile"):
        run(WAYS[way])
    lines = [record.getMessage() for record in caplog.records if record.name == "pcg_compile"]
    (line,) = dict.fromkeys(line for line in lines if all(part in line for part in parts)) or [lines]
    assert lines.count(line) == 1 and all("to do: " in line or cure_of(line) is None for line in lines), lines


def test_a_generate_of_transformers_own_is_explained_in_a_report(caplog):
    model = model_of("sdpa")
    fast = compiled(model)
    fast.generate(IDS[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert "not compiled yet" in str(pcg.explain(fast))
