"""A trial: what a model computes around its attention, seen by calling it with a few tokens.

A step with packed requests is right if, around attention, every token is computed from its id and position alone, and
if attention is what paged attention computes. A few calls with an attention that mixes no tokens tell that:

* without ``position_ids``, and with 0, 1, 2, ...: the same numbers, or the model's positions begin elsewhere;
* a request twice: the same numbers, or the model counts positions through the packed requests;
* others at late positions: the same numbers, or rotary frequencies follow the longest request;
* others' results not a number: finite, or tokens mix elsewhere (a convolution, a state, attention of its own);
* transformers' own attention function of the layer, on the same queries and keys: the same numbers, or it has more to
  it (a bias) than it says.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import BatchError, OptionsError, PCGError, message
from ...running import RUNNING
from .counted import CountedPositions
from .known import known_of
from .masks import TRIAL, Sees, StepMask

__all__ = ["Trial", "prove", "refused"]

#: One trial at a time: its model is shared by all threads.
_LOCK = threading.RLock()
#: Three requests that begin with the same tokens; the second one is looked at.
_LENGTHS = (3, 3, 2)
_LOOKED_AT = slice(3, 6)
_TOKENS = sum(_LENGTHS)
#: Where positions are looked for at most.
_MOST_OFFSET = 4


@dataclass
class Call:
    """One call of attention: its layer, its shape, what the mask lets it see, and its tensors."""

    layer: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    sees: tuple[int | None, int | None, int | None]
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Trial:
    """One forward pass with attention that gives every token its own value.

    Attributes:
        poison: rows whose results are not a number. compare: whether to hold the layers' own attention against ours.
        calls: what was seen, in order.
    """

    poison: tuple[slice, ...] = ()
    compare: bool = False
    calls: list[Call] = field(default_factory=list)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sees: Sees,
        scaling: float | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """What :func:`attention` returns in this trial; arguments as there."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if any(call.layer == layer for call in self.calls):
            raise BatchError(
                message(
                    f"{type(module).__name__} attends several times with layer_idx {layer}",
                    why="A page holds one key and value a layer.",
                )
            )
        if query.shape[1] % key.shape[1]:
            raise BatchError(f"{type(module).__name__} has {query.shape[1]} query heads for {key.shape[1]} key heads")
        limits = (sees.nearest, sees.farthest, sees.chunk)
        self.calls.append(Call(layer, key.shape[1], key.shape[3], value.shape[3], limits, (query, key, value)))
        if self.compare:
            _compare(module, query.shape[1], key.shape[1], query.shape[3], sees, scaling, options)
        result = value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2).contiguous()
        for rows in self.poison:
            result[:, rows] = torch.nan
        return result


def _compare(
    module: torch.nn.Module,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sees: Sees,
    scaling: float | None,
    options: dict[str, Any],
) -> None:
    """Holds the attention function that stands beside a layer's class against what paged attention computes."""
    own = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if own is None:
        return
    device, draw = next(module.parameters(), torch.empty(0)).device, torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, _TOKENS, head_dim, generator=draw, dtype=torch.float32).to(device)
        for n in (heads, kv_heads, kv_heads)
    )
    q, k = q * head_dim**-0.25, k * head_dim**-0.25
    distance = torch.arange(_TOKENS, device=device)[:, None] - torch.arange(_TOKENS, device=device)
    unseen = (distance < 0) | (distance > (_TOKENS if sees.farthest is None else sees.farthest))
    if sees.chunk is not None:
        chunk = torch.arange(_TOKENS, device=device) // sees.chunk
        unseen |= chunk[:, None] != chunk
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, device=device).masked_fill(unseen, torch.finfo(torch.float32).min)
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        theirs = own(module, q, k, v, mask, scaling=scale, dropout=0.0, **given)[0]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # What it needs is its own: no verdict.
        return
    scores = (q * scale) @ k.repeat_interleave(heads // kv_heads, 1).transpose(2, 3)
    softcap = options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(unseen, -torch.inf)
    sinks = options.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(1, heads, _TOKENS, 1)], -1)
    weights = torch.softmax(scores, -1)[..., :_TOKENS]
    ours = (weights @ v.repeat_interleave(heads // kv_heads, 1)).transpose(1, 2)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3):
        raise BatchError(f"{type(module).__name__} computes more than softmax(q k) v, and does not say what")


def prove(model: Any) -> None:
    """Tries a model once, and notes in its hook what its layers need of a cache.

    Raises:
        OptionsError: packed requests would get other numbers than each alone.
    """
    with _LOCK:
        if (known := known_of(model)) is None or known.proven:
            return
        reason, seen = _try(model)
        if reason is not None:
            raise OptionsError(refused(type(model).__name__, reason))
        for module in model.modules():
            inner = known_of(module)
            if inner is not None:
                inner.proven, inner.offset, inner.layers = True, seen.offset, seen.layers


def refused(name: str, reason: str) -> str:
    """The message for a model that packed requests would get wrong numbers from."""
    return message(
        f'attn_implementation="pcg" would give wrong numbers with {name}',
        why=reason,
        cure='Use another attn_implementation, such as "sdpa", without pcg.step().',
    )


@dataclass
class Seen:
    """What a trial has shown: (key heads, elements of a key's, of a value's) by layer; where positions begin."""

    layers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    offset: int = 0


def _try(model: Any) -> tuple[str | None, Seen]:
    """Why a model with the hook cannot be served, or None, and what was seen."""
    name, first, seen = type(model).__name__, Trial(compare=True), Seen()
    try:
        device = model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        device = next(model.parameters()).device
    runs = _Runs(model, device)
    try:
        runs.run(first, runs.straight)
        if not first.calls:
            return f"{name} computes attention by itself, whatever attn_implementation says.", seen
        seen.layers = {call.layer: (call.kv_heads, call.head_dim, call.v_head_dim) for call in first.calls}
        offset = _offset(runs, first)
        if offset is None:
            why = "computes other numbers than with 0, 1, 2, ... or any other start"
            return f"{name} called without position_ids {why}: its positions depend on more than a token's place.", seen
        seen.offset = runs.offset = offset
        return _by_numbers(runs, name), seen
    except BatchError as error:
        return str(error), seen
    except (torch.OutOfMemoryError, PCGError):
        raise
    except Exception as error:  # A model may ask for anything, pictures for example.
        return f"{name} cannot be called with input_ids and position_ids alone: {type(error).__name__}: {error}", seen


def _offset(runs: _Runs, first: Trial) -> int | None:
    """What is to be added to 0, 1, 2, ... for the positions that a model takes by itself; None where nothing is."""
    dense = Trial()
    runs.run(dense, None)
    if not _differ(dense, first):
        return 0
    for offset in range(1, _MOST_OFFSET + 1):
        shifted = Trial()
        runs.run(shifted, runs.straight + offset)
        if not _differ(dense, shifted):
            return offset
    return None


def _by_numbers(runs: _Runs, name: str) -> str | None:
    """Why requests that are packed get other numbers, or None."""
    packed, far, poisoned = Trial(), Trial(), Trial(poison=(slice(0, 3), slice(6, 8)))
    expected = runs.run(packed, runs.packed)
    spoilt = runs.run(poisoned, runs.packed, other=True)
    alike = all(
        _close(a[:, :, _LOOKED_AT], b[:, :, _LOOKED_AT])
        for a, b in zip(packed.calls[0].tensors, poisoned.calls[0].tensors, strict=True)
    )
    results = [*(tensor[:, :, _LOOKED_AT] for call in poisoned.calls for tensor in call.tensors), spoilt[:, _LOOKED_AT]]
    if not alike or (bool(expected.isfinite().all()) and not all(bool(t.isfinite().all()) for t in results)):
        return f"{name} mixes tokens outside of attention: a convolution, a state, or attention of its own."
    if _differ(packed, packed, slice(0, 3), _LOOKED_AT):
        return f"{name} counts positions by itself, through the packed requests."
    latest = getattr(runs.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(latest, int) and latest > 2 * _TOKENS + _MOST_OFFSET:
        late = runs.packed.clone()
        late[:, :3] += latest - 3 - 2 * runs.offset
        runs.run(far, late)
        known = known_of(runs.model)
        if known is not None and known.counts and latest > 2 * getattr(known.config, "floor_scale", latest):
            layers = zip(packed.calls, far.calls, known.config.no_rope_layers, strict=False)
            if any(not rope and _close(a.tensors[0][:, :, :3], b.tensors[0][:, :, :3]) for a, b, rope in layers):
                return f"{name} scales queries by positions that it counts by itself, whatever cache it is given."
        if _differ(packed, far, _LOOKED_AT, _LOOKED_AT):
            why = "so a request would get other numbers in other company."
            return f"the positional embedding of {name} follows the longest request of a step, {why}"
    return None


def _differ(one: Trial, other: Trial, of_one: slice = slice(None), of_other: slice = slice(None)) -> bool:
    """Whether two trials give their layers other queries, keys or values, in some rows each.

    A layer whose tensors differ by rounding ends the comparison: rounding can send a token to other experts further on.
    """
    if len(one.calls) != len(other.calls):
        return True
    for a, b in zip(one.calls, other.calls, strict=True):
        if a.sees != b.sees:
            return True
        pairs = [(x[:, :, of_one], y[:, :, of_other]) for x, y in zip(a.tensors, b.tensors, strict=True)]
        if not all(_close(x, y) for x, y in pairs):
            return True
        if not all(torch.equal(x, y) for x, y in pairs):
            return False
    return False


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they differ by rounding alone: the same rows of a product may be summed in another order."""
    bound = 8 * torch.finfo(one.dtype).eps * float(one.abs().amax())
    return bool(((one - other).abs() <= bound).all())


class _Runs:
    """Calls a model with a few tokens, outside of any step."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        config = model.config.get_text_config()
        special = {value for key, value in vars(config).items() if key.endswith("token_id") and isinstance(value, int)}
        size = getattr(config, "vocab_size", None) or 1 << 30
        plain = [i for i in range(min(size, 64 + len(special))) if i not in special] or [0]
        self.ids = [plain[i % len(plain)] for i in range(6)]
        self.straight = torch.arange(_TOKENS, device=device)[None]
        self.packed = torch.cat([torch.arange(n, device=device) for n in _LENGTHS])[None]
        #: Where the model's own positions begin.
        self.offset = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, trial: Trial, positions: torch.Tensor | None, other: bool = False) -> torch.Tensor:
        """The model's first result, ``[1, tokens, ...]``; ``positions`` None: as a model alone is called.

        Args:
            other: gives all requests but the one that is looked at other tokens.
        """
        a, b, c, *rest = self.ids
        others = rest if other else [a, b, c]
        ids = torch.tensor([[*others, a, b, c, *others[:2]]], device=self.device)
        known = known_of(self.model)
        given: dict[str, Any] = {"input_ids": ids}
        if known is not None and "use_cache" in known.names:
            given["use_cache"] = False
        if positions is not None:
            given.update(position_ids=positions + self.offset, attention_mask=StepMask(trial))
            if known is not None and known.counts:
                given["cache"] = CountedPositions(given["position_ids"])
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            _no_step(),
            _trying(self.model, trial),
        ):
            torch.manual_seed(0)
            result = self.model(**given)
        first: torch.Tensor = (result.to_tuple() if hasattr(result, "to_tuple") else result)[0]
        return first


@contextmanager
def _no_step() -> Iterator[None]:
    """Outside of the running step, where adapters add nothing, and without gradients."""
    token = RUNNING.set(None)
    try:
        with torch.no_grad():
            yield
    finally:
        RUNNING.reset(token)


@contextmanager
def _trying(model: Any, trial: Trial) -> Iterator[None]:
    hooks = [hook for module in model.modules() if (hook := known_of(module)) is not None]
    token = TRIAL.set(trial)
    for hook in hooks:
        hook.trying = True
    try:
        yield
    finally:
        TRIAL.reset(token)
        for hook in hooks:
            hook.trying = False
