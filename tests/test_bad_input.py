"""What users get wrong: each is an error with a cure, or works as eager does."""

from __future__ import annotations

from copy import deepcopy

import models  # noqa: F401 - defines the silly ops
import pytest
import torch
from torch import nn

import pcg_compile as pcg
from pcg_compile.errors import BatchError, OptionsError, SplitOpNotFound


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"bucket": [4]}, OptionsError, "buckets"),
        ({"buckets": []}, OptionsError, "buckets"),
        ({"buckets": [4, -8]}, OptionsError, "-8"),
        ({"buckets": [0, 4]}, OptionsError, "0"),
        ({"buckets": [8, 4]}, OptionsError, "8"),
        ({"buckets": [4, 4]}, OptionsError, "4"),
        ({"buckets": ["4"]}, OptionsError, "4"),
        ({"buckets": 4}, OptionsError, "buckets"),
        ({"max_tokens": 0}, OptionsError, "max_tokens"),
        ({"compiler": "tvm"}, OptionsError, "inductor"),
        ({"padding": "left"}, OptionsError, "request"),
        ({"split_ops": ["no::such_op"]}, SplitOpNotFound, "no::such_op"),
    ],
)
def test_options(options, kind, says):
    for compiled in (
        lambda: torch.compile(nn.Linear(4, 4), backend="pcg", options=options),
        lambda: pcg.piecewise(dynamic={"x": 0}, **options)(lambda x: x + 1),
    ):
        with torch.no_grad(), pytest.raises(kind, match=says) as caught:
            compiled()(torch.randn(3, 4))
        # What happened, and at least one line of why or how to cure it.
        assert type(caught.value) is kind and len(str(caught.value).splitlines()) >= 2


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = pcg.PagedAttention(layer=0, num_heads=1, num_kv_heads=1, head_dim=4)

    def forward(self, x):
        y = self.linear(x)[:, None]
        return self.attention(y, y + 1, y * 2)[:, 0]


def make_cache(**changes):
    sizes = {"num_layers": 1, "num_pages": 8, "page_size": 4, "num_kv_heads": 1, "head_dim": 4}
    return pcg.PagedKVCache(**{**sizes, **changes})


@pytest.fixture
def serving():
    model = Attends().eval()
    return model, torch.compile(model, backend="pcg", options={"compiler": "eager", "buckets": [4, 8]})


def test_a_model_that_lies_on_another_device_than_its_cache(serving):
    for call in serving:
        with pytest.raises(BatchError, match="meta") as caught:  # noqa: SIM117
            with pcg.step(pcg.Batch([3], [3], [[1]]), make_cache(device="meta")):
                call(torch.randn(3, 4))
        assert "cpu" in str(caught.value)


def test_a_call_outside_of_a_step_says_to_enter_one(serving):
    model, compiled = serving
    with pytest.raises(BatchError, match=r"with pcg\.step\(batch, cache\)"):
        compiled(torch.randn(3, 4))
    cache = make_cache()
    x = torch.randn(3, 4)
    with pcg.step(pcg.Batch([3], [3], [[1]]), cache):
        want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    with torch.no_grad(), pytest.raises(BatchError, match=r"with pcg\.step\(batch, cache\)"):
        compiled(x)


def test_nested_steps_and_exceptions_inside(serving):
    model, compiled = serving
    cache, x = make_cache(), torch.randn(3, 4)
    batch = pcg.Batch([3], [3], [[1]])
    with pcg.step(batch, cache):
        want = model(x)
        with pytest.raises(BatchError, match="running already"), pcg.step(batch, make_cache()):
            pass
        torch.testing.assert_close(compiled(x), want)
    with pytest.raises(ZeroDivisionError), pcg.step(batch, cache):
        compiled(x)
        1 / 0  # noqa: B018
    with pcg.step(batch, cache):
        torch.testing.assert_close(compiled(x), want)


def test_no_tokens(serving):
    for lens in ([], [0], [2, 0]):
        with pytest.raises(BatchError):
            pcg.Batch(lens, lens, [[1]] * len(lens))
    layer = nn.Linear(4, 4).eval()
    compiled = torch.compile(layer, backend="pcg", dynamic=True, options={"compiler": "eager", "buckets": [4, 8]})
    with torch.no_grad():
        for n in (3, 0, 5, 0, 3):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), layer(x))


def test_a_model_in_training_mode():
    """Statistics over the batch must not see padding, and dropout must go on dropping other entries each time."""
    ours = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    theirs = deepcopy(ours)
    options = {"compiler": "eager", "buckets": [4, 8]}
    compiled = torch.compile(ours, backend="pcg", options=options)
    with torch.no_grad():
        for n in (3, 5, 8, 6, 3):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), theirs(x))
            torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)
    assert any("mix" in f.reason for f in pcg.stats(compiled).fallbacks)
    drop = torch.compile(nn.Dropout(0.5).train(), backend="pcg", options=options)
    with torch.no_grad():
        results = [drop(torch.ones(6, 50)) for _ in range(4)]
    assert all(set(r.unique().tolist()) == {0.0, 2.0} for r in results)
    assert len({tuple(r.flatten().tolist()) for r in results}) == 4
