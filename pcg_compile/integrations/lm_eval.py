"""lm-eval's model ``"pcg"``: its Hugging Face models, generated with and scored by captured graphs.

Importing this module registers the model; from the command line::

    python -m pcg_compile.integrations.lm_eval --model pcg --model_args pretrained=Qwen/Qwen3-0.6B --tasks gsm8k
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..attention import PagedKVCache
from ..batch import Batch
from ..piecewise import piecewise
from ..step import step
from .generation import generate_batch
from .generation.engine import attending_through_pcg
from .transformers import cache_for

__all__ = ["PCGLM"]

_PAGE, _MOST_REQUESTS = 16, 256
#: Tokens to score, with the number of those at the end that are the continuation.
Scored = tuple[tuple[int, ...], int]


@register_model("pcg")
class PCGLM(HFLM):  # type: ignore[misc]
    """A causal language model of transformers under lm-eval.

    Args:
        pretrained, kwargs: as for lm-eval's ``hf``. ``batch_size`` has no effect: steps hold whatever fits.
        max_batch_tokens: tokens of a step. num_pages: of the cache that generation uses; see :func:`generate_batch`.
        options: of the backend.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        batch_size: Any = None,
        max_batch_tokens: int = 2048,
        num_pages: int | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # lm-eval hands over all requests of equal settings at once.
        super().__init__(pretrained, batch_size=1 << 30, **kwargs)
        self.max_batch_tokens = int(max_batch_tokens)
        compiler = "inductor" if self.device.type == "cuda" else "eager"
        self.options = {"compiler": compiler, "max_tokens": self.max_batch_tokens, **(options or {})}
        self._generation = {"max_batch_tokens": self.max_batch_tokens, "num_pages": num_pages, "options": self.options}
        self._cache: PagedKVCache | None = None
        model = self.model
        keeps_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters

        def forward(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            """Logits ``[rows, vocabulary]`` of packed requests."""
            keep = {"logits_to_keep": rows} if keeps_rows else {}
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep).logits[0]
            return logits if keeps_rows else logits[rows]

        self.forward = piecewise(dynamic={"ids": 0, "positions": 0, "rows": 0}, **self.options)(forward)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Prompts padded on the left -> these with what was generated, padded on the right."""
        if not kwargs.get("temperature"):
            kwargs = {**kwargs, "do_sample": False, "temperature": None}
        prompts = [ids[mask != 0].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
        outputs = generate_batch(
            self.model, prompts, max_new_tokens=max_length - context.shape[1], stop_strings=stop or None,
            tokenizer=self.tokenizer, **self._generation, **kwargs,
        )  # fmt: skip
        new = [torch.tensor(output.generated_tokens, device=context.device) for output in outputs.values()]
        padding = self.tokenizer.pad_token_id
        return torch.cat([context, torch.nn.utils.rnn.pad_sequence(new, True, padding)], 1)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether greedy search would have chosen it.

        Continuations of one token behind the same tokens, as of a multiple choice, are scored by one row of logits.
        """
        places: dict[Scored, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            ids = tuple((context + continuation)[-(self.max_length + 1) : -1])
            places.setdefault((ids, min(len(continuation), len(ids))), []).append(place)
        answers: list[Any] = [None] * len(requests)
        with (
            attending_through_pcg(self.model),
            tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar,
        ):
            for group in self._groups(sorted(places, key=lambda scored: -len(scored[0]))):
                for scored, logprobs in zip(group, self._logprobs(group), strict=True):
                    greedy = logprobs.argmax(-1)
                    for place in places[scored]:
                        text, _, continuation = requests[place]
                        wanted = torch.tensor(continuation[-scored[1] :], device=logprobs.device)
                        score = float(logprobs.gather(-1, wanted[:, None]).sum())
                        answers[place] = (score, bool((greedy == wanted).all()))
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answers[place])
                    bar.update(len(places[scored]))
        return answers

    def _groups(self, every: list[Scored]) -> Iterator[list[Scored]]:
        """What runs in one step each: one request at least, in all ``max_batch_tokens`` at most."""
        group: list[Scored] = []
        for scored in every:
            tokens = sum(len(ids) for ids, _ in group) + len(scored[0])
            if group and (tokens > self.max_batch_tokens or len(group) == _MOST_REQUESTS):
                yield group
                group = []
            group.append(scored)
        if group:
            yield group

    def _logprobs(self, group: list[Scored]) -> Iterator[torch.Tensor]:
        """For each request ``[continuation, vocabulary]`` float32."""
        lengths = [len(ids) for ids, _ in group]
        pages = -(-max(self.max_batch_tokens, lengths[0]) // _PAGE) + _MOST_REQUESTS
        if self._cache is None or self._cache.num_pages <= pages:
            self._cache = cache_for(self.model, num_pages=pages + 1, page_size=_PAGE, max_requests=_MOST_REQUESTS)
        free = iter(range(1, self._cache.num_pages))
        batch = Batch(lengths, lengths, [[next(free) for _ in range(-(-n // _PAGE))] for n in lengths])
        ids = torch.tensor([token for ids, _ in group for token in ids], device=self.device)
        rows: list[int] = []
        end = 0
        for length, (_, last) in zip(lengths, group, strict=True):
            end += length
            rows += range(end - last, end)
        with step(batch, self._cache):
            logits = self.forward(ids, batch.positions, torch.tensor(rows, device=self.device))
        for part in logits.split([last for _, last in group]):
            yield part.log_softmax(-1, dtype=torch.float32)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
