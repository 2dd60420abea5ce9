"""What every model with ``attn_implementation="pcg"`` does with its arguments before it runs."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ...errors import BatchError, message
from ...step import current_step
from .attention import rows_message
from .counted import CountedPositions
from .images import check_images
from .known import NAME, Known
from .masks import STEP_MASK, TRIAL, Sees, StepMask
from .trial import prove

__all__ = ["Arguments"]

_LOG = logging.getLogger("pcg_compile")
#: Where models take a cache of transformers' own.
_CACHES = ("past_key_values", "cache", "cache_params")
#: What to do instead of calling generate(), which knows nothing of steps.
_GENERATE = (
    "generate() makes no steps: write pcg_compile.integrations.transformers.generate_batch(model, prompts), or "
    'generate with model.set_attn_implementation("sdpa").'
)
#: What Dynamo says under fullgraph=True.
_OUTSIDE = (
    "position_ids are left out, a mask or a cache is passed, or the model was never tried: pass "
    "position_ids=batch.positions[None] alone, and make the cache with cache_for(model)"
)


class Arguments:
    """A forward pre-hook that completes a call from the running step, or refuses it.

    It is a hook of the instance, since a model is called in many ways: compiled or not, by a model around it, by PEFT.
    Dynamo traces it where the model is inside of what is compiled, and runs it as it is on the outermost module.
    """

    #: pcg calls it also where a forward is compiled by itself, as ``pcg.piecewise(model.forward)``.
    completes_call = True

    def __init__(self, known: Known) -> None:
        self.known = known

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        known = self.known
        if known.config._attn_implementation != NAME:
            return None
        if known.trying and TRIAL.get() is not None:
            return None
        if args:
            kwargs = {**dict(zip(known.names, args, strict=False)), **kwargs}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, (StepMask, Sees, dict)):
            # A model around this one has been here, and may have made the masks already.
            return (), kwargs
        if (
            not torch.compiler.is_compiling()
            or not known.proven
            or known.offset
            or mask is not None
            or kwargs.get("position_ids") is None
            or kwargs.get("use_cache")
            or any(kwargs.get(name) is not None for name in _CACHES)
            or (known.image_blocks and kwargs.get("token_type_ids") is not None)
        ):
            kwargs = self._complete(module, kwargs)
        kwargs = {**kwargs, "attention_mask": STEP_MASK}
        if "use_cache" in known.names:
            kwargs["use_cache"] = False
        if known.counts:
            kwargs["cache"] = CountedPositions(kwargs["position_ids"])
        return (), kwargs

    @torch.compiler.disable(reason=_OUTSIDE)  # type: ignore[untyped-decorator]
    def _complete(self, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with those that only the step knows; looks at values, and so runs outside of graphs.

        Raises:
            BatchError: no step, requests in rows, a mask that hides something, a cache of transformers'.
        """
        name, state = type(module).__name__, current_step()
        if state is None:
            raise BatchError(
                message(
                    f'{name} has attn_implementation="pcg", and no step is running',
                    why="Lengths and pages of the requests come from the step.",
                    cure=f"Call the model inside: with pcg.step(batch, cache):\n  {_GENERATE}",
                )
            )
        for cache in _CACHES:
            if kwargs.get(cache) is not None:
                self._refuse_cache(name, cache)
        if kwargs.get("use_cache"):
            self._refuse_cache(name, "use_cache=True")
        tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        if isinstance(tokens, torch.Tensor):
            if tokens.dim() < 2 or tokens.shape[0] != 1:
                raise BatchError(rows_message(name, tokens.shape[0] if tokens.dim() > 1 else 0))
            try:
                state.check_tokens(tokens.shape[1])
            except BatchError as error:
                raise BatchError(f"{error}\n  {_GENERATE}") from None
        mask = kwargs.get("attention_mask")
        if mask is not None:
            self._check_mask(name, mask)
        if not self.known.proven:
            prove(module)
        if self.known.image_blocks and (types := kwargs.get("token_type_ids")) is not None:
            check_images(name, state.batch, types, getattr(self.known.config, "sliding_window", None))
            kwargs = {**kwargs, "token_type_ids": None}
        positions = kwargs.get("position_ids")
        if positions is None or self.known.offset:
            positions = state.user_positions()[None] + self.known.offset
        return {**kwargs, "position_ids": positions}

    def _refuse_cache(self, name: str, what: str) -> None:
        raise BatchError(
            message(
                f"{name} got {what} inside a step",
                why="The step's PagedKVCache holds keys and values; a cache of transformers' own would hold nothing.",
                cure=f"Leave it out.\n  {_GENERATE}",
            )
        )

    def _check_mask(self, name: str, mask: Any) -> None:
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.is_meta:
            if not self.known.warned and mask.device.type != "cpu":
                self.known.warned = True
                _LOG.warning("%s got an attention_mask: a look at it waits for the device. Leave it out.", name)
            if bool((mask != 0).all()):
                return
        raise BatchError(
            message(
                f"{name} got an attention mask that hides tokens or is not [1, tokens]",
                why="Requests are packed, without padding: what a token sees follows from the step's batch.",
                cure="Leave attention_mask out, and pass real tokens only.",
            )
        )
