"""Guards: the conditions on sizes of a trace, and those that are kept out of Dynamo's guards (torch 2.11 to 2.13)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .fake_tensors import FakeTensorMode
from .probe import attributes

__all__ = [
    "guards_apart",
    "guards_hold_at",
    "inputs_only",
    "layouts_apart",
    "set_replacements",
    "shape_guards",
]

attributes(
    "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    "2.11 to 2.13",
    "guards axioms replacements divisible backed_var_to_val var_to_range var_to_range_sloc bound_sympy replace "
    "simplify get_implications size_like _update_version_counter",
    ShapeEnv,
)


def shape_guards(fake_mode: FakeTensorMode) -> list[Any]:
    """The conditions on sizes under which a graph is right: of the trace and of compiling (2.11 to 2.13)."""
    env = fake_mode.shape_env
    if env is None:
        return []
    conditions = [guard.expr for guard in env.guards]
    for symbol, bounds in env.var_to_range.items():
        for relation, bound in ((sympy.Ge, bounds.lower), (sympy.Le, bounds.upper)):
            if isinstance(bound, (int, sympy.Integer)) or getattr(bound, "is_Integer", False):
                conditions.append(relation(symbol, bound))
    # A symbol that was found equal to another is no longer anybody's size; one that was found to be a number still is.
    fixed = [sympy.Eq(symbol, value) for symbol, value in env.replacements.items() if value.is_number]
    return [*(env.replace(condition) for condition in conditions), *fixed]


def layouts_apart(fake_mode: FakeTensorMode) -> list[Any]:
    """Takes out of Dynamo's guards that a size is not 1 where only an op's layout asked; returns them (2.11 to 2.13).

    torch asks whether a size is 1 where it lays out a view, and Dynamo would trace again for that size. The graph is
    the same; its pieces are captured at larger sizes. Branches of the code itself, and all else that Dynamo asks,
    stay guards. That a size is not 0 becomes one: torch takes its symbols for positive, and answers whatever the code
    asks about 0 without a guard.
    """
    env = fake_mode.shape_env
    if env is None:
        return []
    for symbol in env.size_like & env.backed_var_to_val.keys():
        bounds = env.var_to_range[symbol]
        # A trace without rows has numbers for them, but for the tensor that an argument is a view of.
        if bounds.lower < 1 <= env.backed_var_to_val[symbol]:
            env.var_to_range[symbol] = type(bounds)(1, bounds.upper)
            env._update_version_counter()
    taken = [
        guard
        for guard in env.guards
        if isinstance(guard.expr, sympy.Ne)
        and isinstance(guard.expr.lhs, sympy.Symbol)
        and guard.expr.rhs == 1
        and getattr(getattr(guard.sloc, "framework_loc", None), "name", "") == "run_node"
    ]
    if taken:
        env.guards[:] = [guard for guard in env.guards if all(guard is not one for one in taken)]
        axioms: dict[Any, Any] = env.axioms
        for guard in taken:
            for implied, _ in env.get_implications(env.simplify(guard.expr)):
                axioms.pop(implied, None)
        env._update_version_counter()
    return [guard.expr for guard in taken]


@contextmanager
def guards_apart(fake_mode: FakeTensorMode) -> Iterator[list[Any]]:
    """What a compiler assumes of sizes inside becomes no guard of Dynamo's, but is listed afterwards (2.11 to 2.13).

    Inductor asks whether a size is 1 where it lays out a view, say, and Dynamo would compile the whole model again for
    that size. What other sizes do not satisfy either stays a guard: for those, there will be a graph of their own. But
    not what this call's own sizes do not satisfy, when the compiler was shown others: Dynamo takes that for a bug.
    """
    env, found = fake_mode.shape_env, []  # type: ignore[var-annotated]
    if env is None:
        yield found
        return
    count, replacements = len(env.guards), dict(env.replacements)
    tables: list[Any] = [env.axioms, env.var_to_range, env.var_to_range_sloc]
    before, divisible = [dict(table) for table in tables], set(env.divisible)
    try:
        yield found
    finally:
        made, known = [guard.expr for guard in env.guards[count:]], dict(env.backed_var_to_val)
        untrue = any(condition.xreplace(known) == sympy.false for condition in made)
        same = env.replacements == replacements
        if untrue or (made and same and all(_is_of_0_and_1(env.replace(condition), env) for condition in made)):
            if not same:
                set_replacements(env, replacements)
            found += [env.replace(condition) for condition in made]
            del env.guards[count:]
            for table, old in zip(tables, before, strict=True):
                table.clear()
                table.update(old)
            env.divisible = divisible
            env._update_version_counter()


#: Sizes of all kinds: small and large, odd, powers of two.
_SAMPLES = (2, 3, 5, 8, 17, 64, 1000, 4096, 100_000)


def _is_of_0_and_1(condition: sympy.Basic, env: Any) -> bool:
    """Whether a condition on sizes holds at all but 0 and 1, as far as samples tell."""
    known, symbols = dict(env.backed_var_to_val), condition.free_symbols
    if not symbols <= known.keys():
        return False
    changes = [dict.fromkeys(symbols, sympy.Integer(n)) for n in _SAMPLES]
    changes += [{symbol: sympy.Integer(n)} for symbol in symbols for n in _SAMPLES]
    return all(condition.xreplace({**known, **change}) == sympy.true for change in changes)


def set_replacements(env: Any, replacements: dict[sympy.Symbol, Any]) -> None:
    env.replacements.clear()
    env.replacements.update(replacements)
    if hasattr(env, "_replacements_version_counter"):
        env._replacements_version_counter += 1
    env._update_version_counter()


def guards_hold_at(real: int, shown: int, fake_mode: FakeTensorMode) -> bool:
    """Whether a trace that :func:`show_more_rows` showed more rows is right for the size of the call (2.11 to 2.13)."""
    env = fake_mode.shape_env
    if env is None:
        return False
    known = {s: sympy.Integer(real) if value == shown else value for s, value in env.backed_var_to_val.items()}
    return all(condition.xreplace(known) == sympy.true for condition in shape_guards(fake_mode))


#: Names of guards on modules: on one that a method is called on, and on what lies in one.
_OF_MODULE = re.compile(r"\bself\b|\._modules\b|\._parameters\b|\._buffers\b")


def inputs_only(entries: Sequence[Any]) -> list[bool]:
    """A ``guard_filter_fn`` that keeps guards on arguments, sizes, modes and training flags (2.11 to 2.13)."""
    return [
        entry.name == ""
        or entry.name.endswith(".training")
        or not (entry.is_global or _OF_MODULE.search(entry.name) is not None)
        for entry in entries
    ]
