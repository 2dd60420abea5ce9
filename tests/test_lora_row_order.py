"""LoRA layers get the adapters of their rows, wherever the graph moved them, or are refused by name."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from row_programs import REFUSED, RIGHT, WIDTH, Check, adapter_on

import pcg_compile as pcg
from pcg_compile.errors import AdapterError, PCGError
from pcg_compile.passes.lora_rows import rules


def dispatched(p, x, h, pick):
    """Top-2 routing: tokens sorted by expert, a layer, back in order, summed up."""
    order = h[:, :3].topk(2, dim=-1).indices.reshape(-1).argsort(stable=True)
    y = p.lin(1, pick(h, order))
    out = torch.empty_like(y)
    out[order] = y
    both = out.view(x.shape[0], 2, p.width)
    return p.lin(2, p.add(both[:, 0], both[:, 1]))


def sorted_and_back(p, x):
    h = p.lin(0, x)
    order = h[:, 0].argsort()
    return p.lin(2, p.add(h, p.lin(1, h[order])[order.argsort()]))


def put_back(p, x):
    h = p.lin(0, x)
    order = h[:, 0].argsort()
    out = torch.zeros_like(h)
    out[order] = p.lin(1, h[order])
    return p.lin(2, p.add(out, h))


def through_a_buffer(p, x):
    h = p.lin(0, x)
    moved = torch.empty_like(h)
    moved.view(-1, p.width).copy_(h.flip(0))
    return p.lin(1, moved)


def in_place(p, x):
    h = p.lin(0, x)
    h[:] = h.flip(0).clone()
    return p.lin(1, h)


def inverse_by_scatter(p, x):
    h = p.lin(0, x)
    order = h[:, 0].argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(x.shape[0])
    return p.lin(2, p.add(p.lin(1, h[order])[inverse], h))


def added_back(p, x, key):
    """Top-2 routing as an index_add_ of each expert's rows; the number of a row's token is not added up."""
    h = p.lin(0, x)
    order = h[:, :3].topk(2, dim=-1).indices.reshape(-1).argsort(stable=True)
    tokens = key(order, x.shape[0])
    out = torch.zeros_like(h)
    out[:, :WIDTH].index_add_(0, tokens, p.lin(1, h[tokens])[:, :WIDTH])
    return p.lin(2, p.add(torch.cat([out[:, :WIDTH], h[:, WIDTH:]], -1), h))


def column_by_column(p, x):
    h = p.lin(0, x)
    copy = torch.empty_like(h)
    copy[:, :2], copy[:, 2:] = h[:, :2], h[:, 2:]
    return p.lin(1, copy)


def index_written(p, x, change):
    """An index that changes between two uses: rows are not put back to where they came from."""
    h = p.lin(0, x)
    order = h[:, 0].argsort()
    y = p.lin(1, h[order])
    change(order)
    out = torch.zeros_like(h)
    out[order] = y
    return p.lin(2, out)


FLAT = {
    "as they came": lambda p, x: p.lin(1, p.act(p.lin(0, x))),
    "reversed": lambda p, x: p.lin(1, p.act(p.lin(0, x)).flip(0)),
    "reversed twice": lambda p, x: p.lin(2, p.add(p.lin(1, p.lin(0, x).flip(0)).flip(0), x)),
    "sorted": lambda p, x: p.lin(1, p.lin(0, x)[x[:, 0].argsort()]),
    "sorted and back": sorted_and_back,
    "sorted and put back": put_back,
    "an inverse by scatter": inverse_by_scatter,
    "gathered": lambda p, x: p.lin(1, p.lin(0, x).gather(0, x[:, :1].argsort(0).expand(-1, p.width))),
    "the last": lambda p, x: p.lin(1, p.lin(0, x)[-1:]),
    "all but the first": lambda p, x: p.lin(1, p.lin(0, x)[1:]),
    "every other": lambda p, x: p.lin(1, p.lin(0, x)[::2]),
    "halves swapped": lambda p, x: p.lin(1, torch.cat([p.lin(0, x)[1:], p.lin(0, x)[:1]])),
    "twice": lambda p, x: p.lin(1, torch.cat([p.lin(0, x), x.flip(0)])),
    "each repeated": lambda p, x: p.lin(1, p.lin(0, x).repeat_interleave(2, 0)),
    "all repeated": lambda p, x: p.lin(1, p.lin(0, x).repeat(2, 1)),
    "dispatched": lambda p, x: dispatched(p, x, p.lin(0, x), lambda h, order: h[order // 2]),
    "dispatched, repeated": lambda p, x: dispatched(
        p, x, p.lin(0, x), lambda h, order: h.repeat_interleave(2, 0)[order]
    ),
    "added back, divided": lambda p, x: added_back(p, x, lambda order, n: order // 2),
    "added back, looked up": lambda p, x: added_back(
        p, x, lambda order, n: torch.arange(n).repeat_interleave(2)[order]
    ),
    "column by column": column_by_column,
    "written in place": in_place,
    "written through a view": through_a_buffer,
}
#: What could be followed and is not.
REFUSED_TOO = {
    "rolled": lambda p, x: p.lin(1, p.lin(0, x).roll(1, 0)),
    "through a prefix": lambda p, x: p.lin(1, torch.cat([p.rows(2), p.lin(0, x)])[2:]),
}
UNKNOWN = {
    **REFUSED_TOO,
    "two orders added": lambda p, x: p.lin(1, p.add(p.lin(0, x), x.flip(0))),
    "a prefix": lambda p, x: p.lin(1, torch.cat([p.rows(2), p.lin(0, x)])),
    "averaged": lambda p, x: p.lin(1, p.add(x.mean(0, keepdim=True), p.rows(1))),
}


def lengths_of(n):
    return [n] if n == 1 else [1, n - 1] if n % 2 else [1] * n


@pytest.mark.parametrize("program", FLAT.values(), ids=FLAT)
def test_rows_that_the_graph_moves(program):
    check = Check(program, {"x": 0})
    for n in (5, 3, 4, 8, 9):
        lengths = lengths_of(n)
        names = [("a", None, "b")[i % 3] for i in range(len(lengths))]
        assert check(lengths, names, torch.randn(n, WIDTH)) == RIGHT, check.reason


@pytest.mark.parametrize("program", UNKNOWN.values(), ids=UNKNOWN)
def test_rows_of_no_one_token_are_refused_by_name(program):
    check = Check(program, {"x": 0})
    for n in (5, 3, 4, 9):
        x, count = torch.randn(n, WIDTH), len(lengths_of(n))
        assert check(lengths_of(n), ["a", None, "b", "a"][:count] if count > 1 else ["a"], x) == REFUSED
        assert "layers.1" in check.reason and "layers.0" not in check.reason
        # Of one adapter all rows are, and of none; the refusal left nothing behind.
        assert check(lengths_of(n), ["b"] * count, x) == RIGHT
        assert check(lengths_of(n), [None] * count, x) == RIGHT


BATCHES = {
    "as they came": (lambda p, x: p.lin(1, p.lin(0, x)), RIGHT),
    "flattened": (lambda p, x: p.lin(1, p.lin(0, x).flatten(0, 1)).view(x.shape), RIGHT),
    "the other way round": (lambda p, x: p.lin(1, p.lin(0, x).transpose(0, 1)), RIGHT),
    "the last of each": (lambda p, x: p.lin(1, p.lin(0, x)[:, -1]), RIGHT),
    "reversed in each": (lambda p, x: p.lin(1, p.lin(0, x).flip(1)), RIGHT),
    "reversed in all": (lambda p, x: p.lin(1, p.lin(0, x).flip(0, 1)), RIGHT),
    "all but the first of each": (lambda p, x: p.lin(1, p.lin(0, x)[:, 1:].clone()), RIGHT),
    "columns first, every other": (lambda p, x: p.lin(1, p.lin(0, x).transpose(0, 1).flatten(0, 1)[::2]), REFUSED),
    "flattened and reversed": (lambda p, x: p.lin(1, p.lin(0, x).flatten(0, 1).flip(0)).view(x.shape), RIGHT),
    "each repeated": (lambda p, x: p.lin(1, p.lin(0, x).repeat_interleave(2, 1)), RIGHT),
    "twice": (lambda p, x: p.lin(1, p.lin(0, x).repeat(2, 1, 1)), RIGHT),
    "other requests": (lambda p, x: p.lin(1, p.lin(0, x)[x[:, 0, 0].argsort()]), REFUSED),
    "sorted in each": (lambda p, x: p.lin(1, p.lin(0, x).gather(1, x[..., :1].argsort(1).expand(x.shape))), REFUSED),
    "sorted in all": (
        lambda p, x: p.lin(1, p.lin(0, x).flatten(0, 1)[x.flatten(0, 1)[:, 0].argsort()]).view(x.shape), RIGHT
    ),
    "one behind the other in each": (lambda p, x: p.lin(1, torch.cat([p.lin(0, x), x], 1)), REFUSED),
}  # fmt: skip


IN_ORDER = ("as they came", "flattened")


@pytest.mark.parametrize("dynamic", [0, (0, 1)])
@pytest.mark.parametrize("program", BATCHES)
def test_tokens_in_two_dimensions(program, dynamic):
    function, outcome = BATCHES[program]
    check = Check(function, {"x": dynamic})
    for b, s in [(3, 3), (2, 3), (5, 3)] if dynamic == 0 else [(3, 3), (2, 5), (4, 2)]:
        names = ["a", None, "b", "a", "b"][:b]
        found = check([s] * b, names, torch.randn(b, s, WIDTH))
        # Where padding lies between tokens, only rows in their order are served.
        assert found == outcome or (dynamic == (0, 1) and found == REFUSED and program not in IN_ORDER)


@pytest.mark.parametrize("change", [lambda o: o.copy_(o.flip(0)), lambda o: o.view(-1).copy_(o.flip(0))])
def test_an_index_that_is_written_between(change):
    check = Check(lambda p, x: index_written(p, x, change), {"x": 0})
    for n in (5, 3, 4):
        assert check([1] * n, ["a", "b", *[None] * (n - 2)], torch.randn(n, WIDTH)) == REFUSED
        assert check([1] * n, ["a"] * n, torch.randn(n, WIDTH)) == RIGHT


@pytest.mark.parametrize("program", ["reversed", "dispatched"])
def test_rows_that_inductor_moves(program):
    check = Check(FLAT[program], {"x": 0}, compiler="inductor")
    for n in (5, 3, 8):
        names = [("a", None, "b")[i % 3] for i in range(n)]
        assert check([1] * n, names, torch.randn(n, WIDTH)) == RIGHT, check.reason


def test_rows_that_an_argument_picks():
    """As many as there are tokens, fewer, more: the count decides nothing."""
    check = Check(lambda p, x, rows: p.lin(1, p.lin(0, x)[rows]), {"x": 0, "rows": 0}, arguments=("rows",))
    for n, rows in [(3, [0, 1, 2]), (3, [2, 0, 1]), (5, [4, -1, 0]), (4, [3, 3, 2, 1, 0, 0]), (7, [6])]:
        names = ["a", None, "b", "a", "b", None, "a"][:n]
        assert check([1] * n, names, torch.randn(n, WIDTH), torch.tensor(rows)) == RIGHT, check.reason


@pytest.mark.parametrize("own", [False, True])
def test_rows_of_another_argument(own):
    """An encoder's states are as many as the tokens, by chance; they are of no token."""
    model = torch.nn.Module()
    model.q, model.k = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    pool = pcg.lora.AdapterPool(model, 2, 2, ["q", "k"] if own else ["k"])
    for name in "ab":
        pool.load(name, adapter_on(["q", "k"] if own else ["k"]))

    @pcg.piecewise(dynamic={"x": 0, "states": 0}, buckets=[4, 8], compiler="eager")
    def attend(x, states):
        keys = model.k(states)
        return x + torch.softmax(model.q(x) @ keys.T, -1) @ keys

    for n in (3, 5, 4):
        with pytest.raises(AdapterError, match="rows of k are not"), pcg.step(
            pcg.Batch([1] * n, adapters=["a", "b", *[None] * (n - 2)])
        ):  # fmt: skip
            attend(torch.randn(n, WIDTH), torch.randn(n, WIDTH))
        with pcg.step(pcg.Batch([1] * n)):
            attend(torch.randn(n, WIDTH), torch.randn(n, WIDTH))


def test_rows_that_a_graph_break_hides():
    def program(p, x):
        h = p.lin(0, x).flip(0)
        torch._dynamo.graph_break()
        return p.lin(1, h)

    check = Check(program, {"x": 0})
    for n in (3, 5, 4):
        assert check([1] * n, ["a", "b", *[None] * (n - 2)], torch.randn(n, WIDTH)) == REFUSED
        assert check([1] * n, ["a"] * n, torch.randn(n, WIDTH)) == RIGHT


def test_an_op_that_nobody_knows():
    with torch.library._scoped_library("rowtest", "FRAGMENT") as lib:
        lib.define("turn(Tensor x) -> Tensor")
        lib.impl("turn", lambda x: x.flip(0), "CompositeExplicitAutograd")
        torch.library.register_fake("rowtest::turn", torch.empty_like, lib=lib)
        check = Check(lambda p, x: p.lin(1, torch.ops.rowtest.turn(p.lin(0, x))), {"x": 0})
        for n in (3, 5):
            assert check([1] * n, ["a", "b", *[None] * (n - 2)], torch.randn(n, WIDTH)) == REFUSED
            assert "rowtest::turn" in check.reason


def test_a_rule_that_fails_is_counted(monkeypatch):
    def fails(call):
        raise ZeroDivisionError("no such arguments")

    monkeypatch.setitem(rules._NAMED, "aten::flip", fails)
    check = Check(FLAT["reversed"], {"x": 0})
    assert check([1] * 3, ["a", "b", None], torch.randn(3, WIDTH)) == REFUSED
    assert "aten::flip could not be followed: ZeroDivisionError" in check.reason
    counted = [f.reason for f in pcg.stats(check.run).fallbacks]
    assert any("aten::flip could not be followed" in reason and "no such arguments" in reason for reason in counted)


def test_slots_from_the_device_follow_rows_too():
    check = Check(FLAT["sorted"], {"x": 0})
    slots = check.pool.slots_of(["a", "b"])
    for n in (3, 5, 4, 9):
        x = torch.randn(n, WIDTH)
        names = ["a", "b", *["a"] * (n - 2)]
        with pcg.step(pcg.Batch([n], adapters=torch.tensor([slots[name == "b"] for name in names]))):
            got = check.run(x)
        with pcg.step(pcg.Batch([1] * n, adapters=names)):
            torch.testing.assert_close(got, check.run(x))


STEPS = {
    "lin": lambda p, h, x, k: p.lin(k % 3, h),
    "act": lambda p, h, x, k: p.act(h),
    "flip": lambda p, h, x, k: h.flip(0),
    "roll": lambda p, h, x, k: h.roll(k - 1, 0),
    "sort": lambda p, h, x, k: h[h[:, k % 2].argsort()],
    "pick": lambda p, h, x, k: h.index_select(0, (torch.arange(h.shape[0]) * (k + 2)) % h.shape[0]),
    "gather": lambda p, h, x, k: h.gather(0, h[:, :1].argsort(0).expand(-1, p.width)),
    "cut": lambda p, h, x, k: h[k % 2 :],
    "join": lambda p, h, x, k: torch.cat([h, h.flip(0)] if k % 2 else [h[1:], h[:1]]),
    "repeat": lambda p, h, x, k: h.repeat_interleave(2, 0) if k % 2 else h.repeat(2, 1),
    "prefix": lambda p, h, x, k: torch.cat([p.rows(2), h])[2 * (k % 2) :],
    "add": lambda p, h, x, k: p.add(h, h) if k % 2 else p.add(h, h.flip(0)),
    "token": lambda p, h, x, k: p.add(x, x.flip(0).flip(0)),
    "view": lambda p, h, x, k: h.unsqueeze(0).transpose(0, 1).reshape(-1, p.width),
}


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3)), min_size=1, max_size=5),
    st.lists(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["a", "b", None])), min_size=1, max_size=4),
             min_size=3, max_size=4),
)  # fmt: skip
def test_any_program_of_any_batch_is_right_or_refused(steps, batches):
    def program(p, x):
        h = p.lin(0, x)
        for name, k in steps:
            h = STEPS[name](p, h, x, k)
        return p.lin(2, h)

    check = Check(program, {"x": 0})
    for requests in batches:
        lengths, names = [n for n, _ in requests], [name for _, name in requests]
        check(lengths, names, torch.randn(sum(lengths), WIDTH))


def test_a_model_without_adapters_in_its_batch_is_never_refused():
    check = Check(UNKNOWN["two orders added"], {"x": 0})
    for n in (3, 6, 9):
        with torch.no_grad():
            torch.testing.assert_close(check.run(x := torch.randn(n, WIDTH)), check.base(x))
    with pytest.raises(PCGError, match="two orders|several orders"), pcg.step(pcg.Batch([2, 1], adapters=["a", None])):
        check.run(torch.randn(3, WIDTH))


REGIONS = {
    "in order": (lambda p, x, region: p.lin(2, region(lambda h: p.lin(1, h), p.lin(0, x))), RIGHT),
    "moved behind it": (lambda p, x, region: p.lin(2, region(p.act, p.lin(0, x)).flip(0)), RIGHT),
    "moved inside, used behind it": (lambda p, x, region: p.lin(2, region(lambda h: h.flip(0), p.lin(0, x))), RIGHT),
    "moved ahead of it": (lambda p, x, region: region(lambda h: p.lin(1, h), p.lin(0, x).flip(0)), REFUSED),
    "moved inside": (lambda p, x, region: region(lambda h: p.lin(1, h.flip(0)), p.lin(0, x)), REFUSED),
}


@pytest.mark.parametrize("program", REGIONS)
def test_regions_that_are_graphs_of_their_own(program):
    function, outcome = REGIONS[program]

    def run(p, x):
        def region(body, h):
            return torch.utils.checkpoint.checkpoint(body, h, use_reentrant=False) if p.width == WIDTH else body(h)

        return function(p, x, region)

    check = Check(run, {"x": 0})
    for n in (3, 5, 4):
        assert check([1] * n, ["a", "b", *[None] * (n - 2)], torch.randn(n, WIDTH)) == outcome
