"""What @pcg.split_op and register_split_op define: calls by Python name, definitions run again, checked roles."""

import gc

import pytest
import torch

import pcg_compile as pcg

OPTIONS = {"compiler": "eager", "buckets": [4, 8]}


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def define(name, factor=2.0, **metadata):
    @pcg.split_op(f"definitions::{name}", mutates_args=("out",), **metadata)
    def scaled(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> None:
        """Docstring of the function."""
        out.copy_((q * factor + k) / (q.sum() != 0))

    return scaled


def model_of(call):
    def model(x):
        out = torch.empty_like(x)
        call(x + 1, x, out)
        return out - 1

    return model


def run(compiled, factor, sizes=(4, 3, 8, 1, 9)):
    for n in sizes:
        x = torch.rand(n, 2)
        torch.testing.assert_close(compiled(x), ((x + 1) * factor + x) - 1)


@pytest.mark.parametrize("by", ["Python name", "torch.ops", "default overload", "keywords"])
def test_a_call_is_split_however_the_op_is_named(by):
    scaled = define("called")
    call = {
        "Python name": scaled,
        "torch.ops": lambda *a: torch.ops.definitions.called(*a),
        "default overload": lambda *a: torch.ops.definitions.called.default(*a),
        "keywords": lambda q, k, out: scaled(q, out=out, k=k),
    }[by]
    compiled = torch.compile(model_of(call), backend="pcg", options=OPTIONS, dynamic=True)
    run(compiled, 2.0, (4, 3, 8))
    found = pcg.stats(compiled)
    assert found.pieces == 2 * found.graphs and found.replays and not found.fallbacks


def test_what_is_returned_looks_like_the_function():
    scaled = define("documented")
    assert scaled.__name__ == "scaled" and scaled.__doc__ == "Docstring of the function."
    x = torch.ones(2, 2)
    out = torch.empty_like(x)
    assert scaled(x, x, out) is None and torch.equal(out, x * 3)


def test_results_and_defaults_and_lists():
    @pcg.split_op("definitions::parts", fake=lambda x, sizes, scale=2.0: [x.new_empty(s, x.shape[1]) for s in sizes])
    def parts(x: torch.Tensor, sizes: list[int], scale: float = 2.0) -> list[torch.Tensor]:
        return [part * scale for part in x.split(sizes)]

    compiled = torch.compile(lambda x: parts(x + 1, [1, 2])[1] * 3, backend="pcg", options=OPTIONS)
    x = torch.rand(3, 2)
    torch.testing.assert_close(compiled(x), (x[1:] + 1) * 6)
    assert pcg.stats(compiled).pieces == 2


def test_a_definition_that_is_run_again_replaces_the_op_also_in_compiled_models():
    first = define("again", 2.0)
    compiled = torch.compile(model_of(lambda *a: torch.ops.definitions.again(*a)), backend="pcg", options=OPTIONS)
    run(compiled, 2.0)
    for factor in (3.0, 4.0, 5.0):
        again = define("again", factor)
        gc.collect()
        run(compiled, factor)
        run(torch.compile(model_of(again), backend="pcg", options=OPTIONS), factor, (4,))
        # The function that an earlier definition returned calls the op of today.
        run(model_of(first), factor, (4,))


def _other_schema():
    @pcg.split_op("definitions::changed", mutates_args=("out",))
    def scaled(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, by: float = 7.0) -> None:
        out.copy_(q * by + k)

    return scaled


def _other_roles():
    return define("changed", 7.0, any_strides=True)


@pytest.mark.parametrize("redefine", [_other_schema, _other_roles])
def test_a_definition_of_another_form_is_never_run_as_the_old_one(redefine):
    old = define("changed", 2.0)
    compiled = torch.compile(model_of(lambda *a: torch.ops.definitions.changed(*a)), backend="pcg", options=OPTIONS)
    run(compiled, 2.0, (4, 3))
    redefine()
    gc.collect()
    try:
        run(compiled, 7.0, (4, 3))
    except pcg.errors.OptionsError as error:
        assert "was defined again" in str(error) and "torch.compiler.reset()" in str(error)
        torch._dynamo.reset()
    run(compiled, 7.0)
    run(model_of(old), 7.0, (4,))
    assert pcg.stats(compiled).replays


BAD_ROLES = [
    ({"qo_indptr": "cu_seqlen"}, ["qo_indptr='cu_seqlen' names no argument", "q, cu_seqlens, longest", '"cu_seqlens"']),
    ({"kv_indptr": "nothing_like_it"}, ["kv_indptr='nothing_like_it'", "It takes: q, cu_seqlens, longest"]),
    ({"qo_indptr": "cu_seqlens", "max_qo_len": "long"}, ["max_qo_len='long'", 'max_qo_len="longest"']),
    ({"slot_mapping": "longest"}, ["slot_mapping='longest'", "the type int", "a tensor of ints"]),
    ({"max_kv_len": "q"}, ["max_kv_len='q'", "the type Tensor", "It is an int"]),
]


@pytest.mark.parametrize(("roles", "parts"), BAD_ROLES)
def test_a_role_that_fits_no_argument_is_an_error_at_definition(roles, parts):
    with pytest.raises(pcg.errors.OptionsError) as raised:

        @pcg.split_op("definitions::bad_roles", **roles)
        def bad(q: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
            return q

    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert "definitions::bad_roles" not in pcg.split_ops.registered_split_ops()
    assert not hasattr(torch.ops.definitions, "bad_roles")


@pytest.mark.parametrize(("roles", "parts"), BAD_ROLES)
def test_registering_an_op_of_somebody_elses_checks_its_roles_too(roles, parts):
    if not hasattr(torch.ops.definitions, "foreign"):
        torch.library.define("definitions::foreign", "(Tensor q, Tensor cu_seqlens, int longest) -> Tensor")
    for name in ("definitions::foreign", "definitions::foreign.default"):
        with pytest.raises(pcg.errors.OptionsError) as raised:
            pcg.register_split_op(name, **roles)
        assert all(part in str(raised.value) for part in parts), str(raised.value)
        assert name not in pcg.split_ops.registered_split_ops()


def test_an_op_that_is_defined_later_is_checked_when_a_graph_has_it():
    pcg.register_split_op("definitions::later", qo_indptr="cu")
    torch.library.define("definitions::later", "(Tensor q, Tensor cu_seqlens) -> Tensor")
    torch.library.impl("definitions::later", "CompositeExplicitAutograd", lambda q, cu_seqlens: q + 1)
    torch.library.register_fake("definitions::later", lambda q, cu_seqlens: torch.empty_like(q))
    compiled = torch.compile(
        lambda q, c: torch.ops.definitions.later(q * 2, c) * 2, backend="pcg", options=OPTIONS, dynamic=True
    )
    with pytest.raises(Exception, match="qo_indptr='cu' names no argument") as raised:
        compiled(torch.ones(3, 2), torch.tensor([0, 3]))
    assert 'qo_indptr="cu_seqlens"' in str(raised.value)
    pcg.register_split_op("definitions::later", qo_indptr="cu_seqlens")
    torch._dynamo.reset()
    compiled(torch.ones(3, 2), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("name", "keywords", "parts"),
    [
        ("nameless", {}, ["'nameless' is not the name of an op", 'pcg.register_split_op("mylib::attention")']),
        ("a::b::c", {}, ["'a::b::c' is not the name"]),
        ("::c", {}, ["'::c' is not the name"]),
        (3, {}, ["3 is not the name"]),
        ("definitions::x", {"qo_indpt": "q"}, ["'qo_indpt'", "Did you mean 'qo_indptr'?"]),
        ("definitions::x", {"mutates": ("q",)}, ["'mutates'", "mutates_args, fake"]),
        ("definitions::x", {"mutates_args": ("o",)}, ["mutates 'o'", "It takes: q", 'mutates_args=("q",)']),
    ],
)
def test_other_mistakes_of_a_definition(name, keywords, parts):
    with pytest.raises(pcg.errors.OptionsError) as raised:

        @pcg.split_op(name, **keywords)
        def bad(q: torch.Tensor) -> torch.Tensor:
            return q

    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert name not in pcg.split_ops.registered_split_ops()
