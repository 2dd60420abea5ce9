"""Programs with numbers that only the data tell: what ``.item()`` gives, and sizes that follow from it."""

import operator

import pytest
import torch
from torch import nn

import pcg_compile as pcg


def _ints(*values):
    return torch.tensor(values)


class Scaled(nn.Module):
    """Reads a parameter and a buffer on the host."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return x * self.scale.item() + self.count.item()


def _bound(x, n):
    k = n.item()
    torch._check(k >= 0)
    torch._check(k <= x.shape[0])
    return x[:k] * 2


def _message(x, n):
    k = n.item()
    torch._check(k < 4, lambda: "at most three")
    return x * k


def _after_a_write(x, n):
    x.add_(1)
    k = n.item()
    torch._check(k != 2)
    return x * k


def _branch(x, t):
    k = t.item()
    torch._check(k >= 1)
    return torch.ones(k) if k >= 1 else x


def _two(x, n):
    a, b = n.tolist()
    torch._check(a >= 1)
    torch._check(b >= 1)
    torch._check(a + b <= 6)
    return torch.full((a, b), 2.0) * a + b, a * b


def _found(x, n):
    rows = (x[:, 0] > 0).nonzero()
    torch._check(rows.shape[0] <= 3)
    return rows + 1, rows.shape[0]


def _between(x, n):
    y = x.relu() + 1
    k = n.item()
    return y * k + (k // 2) - (k % 3)


def _floats(x, t):
    k = t.item()
    return x * (k * 0.1) + k / 3 - k**2, k * 0.1 * 0.2, k > 1, int(k)


def _cond(x, t):
    return torch.cond(t > 1, lambda x: x * 2, lambda x: x - 1, (x,))


def _where(x, t):
    k = t.item()
    return torch.where(x > k, x, x * 0 + k)


def _bools(x, t):
    low, some = (x < 0).all().item(), (t > 1).any().item()
    return x + 1, low, some


def _bool_as_a_number(x, t):
    return x * (t > 1).any().item()


def _unpadded_assert(x, t):
    torch._assert_async((t > 0).all())
    return x + t


def _mean(x, t):
    return x - x.mean().item()


def _piece_behind(x, t):
    k = t.item()
    y = (x * k).softmax(-1)
    return y + 1, y.sum(-1) * k


def _half(x, t):
    # Rounds as Python does.
    return x + round(t.item()), t.item()


TENSORS = [torch.tensor(0.7), torch.tensor(-3.25), torch.tensor(1e9), torch.tensor(float("nan")), torch.tensor(2.5)]
#: Of one dimension: Dynamo takes the value of a number on the CPU for a size.
INTS = [torch.tensor([v]) for v in (3, 0, 2, -2, 7, 1)]
NUMBERS = [torch.tensor(v) for v in (3, 0, 2, 1)]
TABLE = [
    *((f, INTS) for f in (_bound, _message, _after_a_write, _branch, _between, _unpadded_assert, _where)),
    *((f, TENSORS) for f in (_cond, _where, _bools, _bool_as_a_number, _unpadded_assert, _mean, _piece_behind)),
    *((f, NUMBERS) for f in (_between, _where, _piece_behind)),
    (_floats, [torch.tensor(v) for v in (0.7, -3.25, 1e9, 0.0, 2.5)]),
    (_half, [torch.tensor(v) for v in (0.5, 1.5, -2.5, 0.49999997)]),
    (_two, [_ints(2, 3), _ints(1, 1), _ints(0, 3), _ints(4, 3), _ints(5, 1)]),
    (_found, [torch.tensor(0)] * 4),
    (lambda x, t: x * t.item(), [torch.tensor([2]), torch.tensor([5])]),
    (lambda x, t: (x.double() * t.item(), t.item()), [torch.tensor(0.1), torch.tensor(1 / 3)]),
    (lambda x, t: (x, operator.neg(t.item())), INTS),
]


def _outcome(function, *args):
    """The result, or "raises": eager's RuntimeError is one of Dynamo's where it is found while tracing."""
    try:
        return function(*args)
    except RuntimeError:
        return "raises"


def _compile(function, **options):
    options = {"compiler": "eager", "buckets": [4, 8], **options}
    return torch.compile(function, backend="pcg", fullgraph=True, options=options)


@pytest.fixture(autouse=True)
def _scalars():
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True),
    ):
        yield


@pytest.mark.parametrize(("function", "numbers"), TABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_values_and_errors_are_eagers(function, numbers):
    compiled = _compile(function)
    for n, number in zip((3, 5, 4, 3, 7, 1), [*numbers, *numbers], strict=False):
        x = torch.randn(n, 6)
        mine, theirs = x.clone(), x.clone()
        want, got = _outcome(function, theirs, number), _outcome(compiled, mine, number)
        if isinstance(want, str) or isinstance(got, str):
            assert got == want, (n, number)
        else:
            torch.testing.assert_close(got, want, equal_nan=True)
            assert torch.equal(mine, theirs)


def test_parameters_and_buffers_are_read_at_each_step():
    model = Scaled()
    compiled = _compile(model)
    for n, scale in ((3, 2.5), (5, -1.0), (3, 0.25)):
        model.scale.data.fill_(scale)
        model.count.fill_(n)
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), model(x))


def test_what_stands_before_a_number_is_replayed_and_the_rest_is_counted():
    compiled = _compile(_between)
    for n in (3, 5, 4):
        compiled(torch.randn(n, 6), _ints(n))
    stats = pcg.stats(compiled)
    assert stats.replays
    assert stats.fallbacks
    assert all(fallback.reason for fallback in stats.fallbacks)
