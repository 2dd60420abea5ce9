"""Options: one frozen, validated dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, TypedDict, get_args

from .errors import OptionsError, message

__all__ = ["Options", "OptionsDict"]

_Capture = Literal["lazy", "first_call"]
_Padding = Literal["auto", "request", "slice"]
_ScalarWrites = Literal["reject", "rewrite"]
_Outputs = Literal["copy", "view"]
_CudagraphMode = Literal["auto", "piecewise", "full"]
_AttentionBackend = Literal["auto", "triton", "flashinfer", "reference"]
_Compiler = Literal["inductor", "eager"]

_CHOICES: Mapping[str, Any] = {
    "capture": _Capture,
    "padding": _Padding,
    "scalar_writes": _ScalarWrites,
    "outputs": _Outputs,
    "cudagraph_mode": _CudagraphMode,
    "attention_backend": _AttentionBackend,
}

#: Former names of options and values: what an error points to.
_RENAMED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "attention": ("cudagraph_mode", {"auto": "auto", "eager": "piecewise", "captured": "full"}),
}


class OptionsDict(TypedDict, total=False):
    """Types of the fields of :class:`Options` as keywords, for ``@pcg.piecewise`` and ``pcg.load``, and as a dict."""

    buckets: Iterable[int] | None
    split_ops: Iterable[str]
    max_tokens: int
    capture: _Capture
    compiler: _Compiler | Callable[..., Any]
    padding: _Padding
    max_padding: float | None
    scalar_writes: _ScalarWrites
    outputs: _Outputs
    cudagraph_mode: _CudagraphMode
    attention_backend: _AttentionBackend
    memory_budget: int | None
    strict: bool


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="pcg", options={...})`` takes.

    Raises:
        OptionsError: an unknown name, or a bad value; the message lists what is allowed.
    """

    #: Token counts to capture at, ascending; None: the default table up to ``max_tokens``.
    buckets: tuple[int, ...] | None = None
    #: Further ops to split at, by packet name ("aten::add") or overload name ("aten::add.Tensor").
    split_ops: tuple[str, ...] = ()
    #: Largest default bucket; bounds the product of the dynamic sizes that one tensor carries.
    max_tokens: int = 8192
    #: "lazy": a bucket is captured when first met; "first_call": all at the first call.
    capture: _Capture = "lazy"
    #: What a piece is compiled with: "inductor", "eager", or ``fn(gm, example_inputs) -> callable``.
    compiler: _Compiler | Callable[..., Any] = "inductor"
    #: "request": a padding request; "slice": the op gets the real rows only; "auto": by what the op declares.
    padding: _Padding = "auto"
    #: Largest bucket over tokens ratio, for steps of more than 256 tokens; None: 1.25 with the default table.
    max_padding: float | None = None
    #: "reject" or "rewrite" (to a device fill) host scalar writes such as ``t[0] = 0``.
    scalar_writes: _ScalarWrites = "reject"
    #: "copy": outputs stay the caller's; "view": overwritten by the next step.
    outputs: _Outputs = "copy"
    #: Split ops between captured pieces ("piecewise"), one CUDA graph of a step ("full"), or as measured ("auto").
    cudagraph_mode: _CudagraphMode = "auto"
    #: What computes paged attention: pcg's Triton kernels, FlashInfer, plain PyTorch, or the best one here ("auto").
    attention_backend: _AttentionBackend = "auto"
    #: Bytes that captured graphs may hold; None: no limit.
    memory_budget: int | None = None
    #: True turns every fallback into an error.
    strict: bool = False

    def __post_init__(self) -> None:
        for name, choice in _CHOICES.items():
            value, allowed = getattr(self, name), get_args(choice)
            if not isinstance(value, str) or value not in allowed:
                raise _bad(name, value, " or ".join(map(repr, allowed)))
        if self.compiler not in get_args(_Compiler) and not callable(self.compiler):
            raise _bad("compiler", self.compiler, "'inductor', 'eager' or a callable (gm, example_inputs)")
        if self.buckets is not None:
            object.__setattr__(self, "buckets", _buckets(self.buckets))
        object.__setattr__(self, "split_ops", _split_ops(self.split_ops))
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise _bad("max_tokens", self.max_tokens, "an int >= 1")
        object.__setattr__(self, "max_tokens", int(self.max_tokens))
        if self.max_padding is not None and not (
            isinstance(self.max_padding, (int, float))
            and not isinstance(self.max_padding, bool)
            and self.max_padding >= 1
        ):
            raise _bad("max_padding", self.max_padding, "None or a number >= 1")
        if self.memory_budget is not None and (not _is_int(self.memory_budget) or self.memory_budget < 0):
            raise _bad("memory_budget", self.memory_budget, "None or a number of bytes >= 0")
        if not isinstance(self.strict, bool):
            raise _bad("strict", self.strict, "True or False")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """The options of a mapping, as ``torch.compile(options=...)`` hands it over; it hands ``mode`` over likewise.

        Raises:
            OptionsError: see the class.
        """
        if mode not in (None, "default"):
            raise OptionsError(
                message(
                    f"torch.compile(mode={mode!r}) is Inductor's, and pcg has no modes",
                    why="pcg captures CUDA graphs by itself, and an ignored mode would promise what is not done.",
                    cure=_INSTEAD_OF_MODE.get(str(mode), 'Write: torch.compile(model, backend="pcg")'),
                )
            )
        if options is None:
            return cls()
        if isinstance(options, Options):
            return options
        names = [f.name for f in fields(cls)]
        if not isinstance(options, Mapping):
            raise OptionsError(
                message(
                    f"options is {options!r}",
                    why=f"It is a dict of: {', '.join(names)}.",
                    cure='Write: torch.compile(model, backend="pcg", options={"buckets": [8, 64, 512]})',
                )
            )
        for name in options:
            if name not in names:
                raise _unknown(name, options[name], names)
        return cls(**options)


def _unknown(name: Any, value: Any, names: Sequence[str]) -> OptionsError:
    example = '"buckets": [8, 64, 512]'
    if name in _RENAMED:
        new, values = _RENAMED[name]
        hint = f" It is called {new!r} now."
        example = f'"{new}": "{values.get(value, "auto") if isinstance(value, str) else "auto"}"'
    else:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
    return OptionsError(
        message(
            f"unknown option {name!r}.{hint}",
            why=f"Allowed: {', '.join(names)}.",
            cure=f'Write: torch.compile(model, backend="pcg", options={{{example}}})',
        )
    )


_TUNED = """Write: torch._inductor.config.max_autotune = True
         torch.compile(model, backend="pcg")"""
_INSTEAD_OF_MODE: Mapping[str, str] = {"max-autotune": _TUNED, "max-autotune-no-cudagraphs": _TUNED}


def _is_int(value: Any) -> bool:
    """Whether it is a whole number, numpy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _bad(name: str, value: Any, allowed: str) -> OptionsError:
    return OptionsError(
        message(
            f"bad value for option {name!r}: {value!r}",
            why=f"Allowed: {allowed}.",
            cure=f'Write, for example: options={{"{name}": {_EXAMPLES[name]}}}',
        )
    )


_EXAMPLES: Mapping[str, str] = {
    "buckets": "[8, 64, 512]",
    "split_ops": '["mylib::attention"]',
    "max_tokens": "8192",
    "capture": '"lazy"',
    "compiler": '"eager"',
    "padding": '"slice"',
    "max_padding": "1.25",
    "scalar_writes": '"rewrite"',
    "outputs": '"copy"',
    "cudagraph_mode": '"full"',
    "attention_backend": '"triton"',
    "memory_budget": "2 * 1024**3",
    "strict": "True",
}


def _buckets(buckets: Any) -> tuple[int, ...]:
    allowed = "None or a non-empty ascending list of ints >= 1, without repeats"
    if isinstance(buckets, (str, bytes)) or not isinstance(buckets, Iterable):
        raise _bad("buckets", buckets, allowed)
    given = tuple(buckets)
    if not given or any(not _is_int(b) or b < 1 for b in given):
        raise _bad("buckets", list(given), allowed)
    sizes = tuple(map(int, given))
    if any(a >= b for a, b in pairwise(sizes)):
        raise _bad("buckets", list(sizes), allowed)
    return sizes


def _split_ops(names: Any) -> tuple[str, ...]:
    allowed = 'a list of op names such as "mylib::attention" or "aten::add.Tensor"'
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise _bad("split_ops", names, allowed)
    result = tuple(names)
    for name in result:
        if not isinstance(name, str) or name.count("::") != 1 or not all(name.split("::")):
            raise _bad("split_ops", list(result), allowed)
    return result
