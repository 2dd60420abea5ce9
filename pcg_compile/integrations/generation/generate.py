"""``generate_batch``: transformers' signature and results, on captured graphs."""

from __future__ import annotations

import copy
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ...errors import GenerationError, OptionsError, message
from .engine import Engine, attending_through_pcg, routers_of
from .ranks import Ranks
from .requests import Request, Sampling
from .session import Session

__all__ = ["accelerate", "generate_batch"]

#: Tokens of a step at the most, and requests that run at once.
_MOST_TOKENS, _SLOTS = 8192, 256
#: Share of the free memory of a GPU that a cache takes; bytes of one on a CPU.
_SHARE, _CPU_BYTES = 0.6, 1 << 30
#: Stop strings of a request at the most: each is searched for after each token.
_MOST_STOPS = 64
#: Settings of a GenerationConfig that change results, by the value, beside None, that leaves them alone.
_UNSUPPORTED: dict[Any, str] = {
    0: "penalty_alpha epsilon_cutoff eta_cutoff no_repeat_ngram_size encoder_no_repeat_ngram_size min_length "
    "min_new_tokens",
    1: "num_beams typical_p encoder_repetition_penalty guidance_scale",
    (): "top_h bad_words_ids forced_bos_token_id forced_eos_token_id sequence_bias suppress_tokens watermarking_config "
    "begin_suppress_tokens exponential_decay_length_penalty prompt_lookup_num_tokens dola_layers max_time",
}


class _Holder:
    """What was compiled for a model, an attribute of the model: it lives as long, and copies have none."""

    engine: Engine | None = None

    def __reduce__(self) -> Any:
        return _Holder, ()


@torch.no_grad()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    *,
    adapters: Sequence[str | None] | None = None,
    seeds: Sequence[int] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    num_pages: int | None = None,
    page_size: int = 16,
    max_batch_tokens: int = _MOST_TOKENS,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """Generates for many prompts at once: continuous batching with chunked prefill and shared prefixes.

    The arguments of transformers' own method come first. On a model that is split over processes, all ranks call it
    alike.

    Args:
        model: a causal language model of transformers, in any attention implementation and mode. Inside, it attends
            through pcg and is in eval mode; afterwards it is as before, but for where weights of linear layers that
            run as one lie in memory.
        prompts: token ids of each prompt, at least one each.
        generation_config: as for ``model.generate``; the model's own where None. Used: ``max_new_tokens`` (or
            ``max_length``), ``eos_token_id``, ``stop_strings`` (with ``tokenizer``), ``do_sample``, ``temperature``,
            ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``num_return_sequences``.
        continuous_batching_config, persistent_manager, warmup: accepted for compatibility with transformers; pcg sizes
            its cache itself and keeps what it has captured.
        record_timestamps: whether results have the time at which the host read each token.
        adapters: a LoRA adapter's name for each prompt, None for the base model; see
            :class:`pcg_compile.lora.AdapterPool`.
        seeds: one for each result, in order; None draws them from torch's generator. A result depends on its seed and
            its prompt, not on what runs beside it.
        streamer: called as ``streamer(request_id, token)`` for each token once the host has read it, and with None at
            the end; returning False cancels the request. With a single prompt, also a streamer of transformers.
        tokenizer: for ``stop_strings``.
        num_pages, page_size: of the cache; sized by the prompts and the device's memory where None.
        max_batch_tokens: tokens of a step; longer prompts run in chunks.
        options: of the backend, as for ``torch.compile(backend="pcg")``.
        kwargs: settings of the generation config, such as ``max_new_tokens``.

    Returns:
        ``{request_id: GenerationOutput}`` in the order of the prompts, with ``prompt_ids``, ``generated_tokens`` and
        ``logprobs`` (of the distribution that was sampled from).

    Raises:
        OptionsError: a setting, prompt or adapter that cannot be served, before anything runs.
        GenerationError: a step or the streamer raised; ``outputs`` holds every result, the failed ones with ``error``.
    """
    config = _config(model, generation_config, kwargs)
    requests = _requests(model, prompts, config, adapters, seeds, tokenizer)
    if not requests:
        return {}
    notify = _notifier(streamer, len(requests))
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    with attending_through_pcg(model):
        engine = _engine(model, requests, num_pages, page_size, max_batch_tokens, options)
        longest, each = max(request.limit for request in requests), notify is not None or record_timestamps
        with Session(engine, longest, tokenizer) as session, tqdm(total=len(requests), disable=not progress_bar) as bar:
            for request in requests:
                session.add(request)
            for request, token in session.run(tokens=each):
                if token is not None:
                    times[request.id].append(time.perf_counter())
                _tell(session, notify, request, token)
                bar.update(token is None)
    outputs = {one.id: _output(one, times[one.id] if record_timestamps else None) for one in requests}
    failed = [request for request in requests if request.error is not None]
    if failed:
        first = failed[0]
        what = f"prompt {first.index} failed: {type(first.error).__name__}: {first.error}"
        why = f"{len(failed)} of {len(requests)} requests failed; the others are in error.outputs."
        raise GenerationError(message(what.splitlines()[0], why=why), outputs) from first.error
    return outputs


def accelerate(model: Any, **defaults: Any) -> Any:
    """Gives a model of transformers a ``generate_batch`` that runs on captured graphs; returns the model.

    ``defaults`` are keyword arguments of :func:`generate_batch` for every call. The model keeps its own attention
    outside of it, so it trains as before.
    """
    if not hasattr(model, "generation_config") or not hasattr(model, "set_attn_implementation"):
        raise OptionsError(
            message(f"pcg.accelerate() takes a generating model of transformers, not {type(model).__name__}",
                    cure="model = pcg.accelerate(AutoModelForCausalLM.from_pretrained(...))")
        )  # fmt: skip
    reference = weakref.ref(model)

    @functools.wraps(generate_batch)
    def bound(inputs: Any, *args: Any, **kwargs: Any) -> dict[str, GenerationOutput]:
        return generate_batch(reference(), inputs, *args, **{**defaults, **kwargs})

    model.generate_batch = bound
    return model


def _config(model: Any, given: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
    config = copy.deepcopy(given if given is not None else model.generation_config)
    try:
        unknown = config.update(**kwargs)
    except ValueError as error:
        raise OptionsError(str(error)) from error
    if unknown:
        raise OptionsError(message(f"generate_batch() does not know {', '.join(sorted(unknown))}"))
    for neutral, names in _UNSUPPORTED.items():
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and value != neutral and value != []:
                raise OptionsError(
                    message(f"generate_batch() does not support {name}={value!r}",
                            why="Supported: greedy search, temperature, top_k, top_p, min_p, repetition_penalty.",
                            cure=f"Use model.generate(), or leave {name} out.")
                )  # fmt: skip
    return config


def _requests(
    model: Any, prompts: Any, config: GenerationConfig, adapters: Any, seeds: Any, tokenizer: Any
) -> list[Request]:
    vocabulary = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    samples = config.num_return_sequences or 1
    ends = config.eos_token_id
    ends = frozenset(() if ends is None else (ends if isinstance(ends, (list, tuple)) else (int(ends),)))
    stops = _stops(config.stop_strings, tokenizer)
    for name, given, count, of in (
        ("adapters", adapters, len(prompts), "prompts"), ("seeds", seeds, len(prompts) * samples, "results"),
    ):  # fmt: skip
        if given is not None and len(given) != count:
            raise OptionsError(f"{name} has {len(given)} entries for {count} {of}")
    _check_adapters(model, adapters)
    if seeds is None:
        (seeds, *_) = Ranks.of(model).gather(torch.randint(2**62, (len(prompts) * samples,)).tolist())
    requests = []
    for index, prompt in enumerate(prompts):
        ids = _ids_of(prompt, index, vocabulary)
        most = config.max_new_tokens
        if most is None:
            most = config.max_length - len(ids) if config.max_length else 20
        if most < 1:
            raise OptionsError(f"prompt {index} has {len(ids)} tokens, and max_length leaves none to generate")
        if limit is not None and len(ids) + most > limit:
            raise OptionsError(
                message(f"prompt {index} has {len(ids)} tokens and wants {most} more; the model takes {limit}",
                        cure=f"Pass max_new_tokens={max(1, limit - len(ids))} at the most, or a shorter prompt.")
            )  # fmt: skip
        for sample in range(samples):
            # As transformers names them.
            name = f"req_{index}" if sample == samples - 1 else f"req_{index}__child#{sample}"
            sampling = _sampling(config, int(seeds[index * samples + sample]))
            adapter = adapters[index] if adapters is not None else None
            requests.append(Request(name, index, ids, int(most), sampling, ends, stops, adapter))
    return requests


def _ids_of(prompt: Any, index: int, vocabulary: int) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
    if not ids:
        raise OptionsError(message(f"prompt {index} is empty", why="There is nothing to continue.",
                                   cure="Pass the beginning-of-sequence token."))  # fmt: skip
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise OptionsError(
            message(f"prompt {index} is no list of token ids", why=f"An id is an int in 0 .. {vocabulary - 1}.",
                    cure="Pass tokenizer(text).input_ids, one list a prompt.")
        )  # fmt: skip
    return ids


def _stops(given: Any, tokenizer: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if stops and tokenizer is None:
        raise OptionsError(message("stop_strings need a tokenizer", cure="generate_batch(..., tokenizer=tokenizer)"))
    if any(not stop for stop in stops):
        raise OptionsError(message("a stop string is empty", why="It would end every request at once."))
    if len(stops) > _MOST_STOPS:
        raise OptionsError(message(f"{len(stops)} stop strings", why=f"At most {_MOST_STOPS}: each token is searched."))
    return stops


def _sampling(config: GenerationConfig, seed: int) -> Sampling:
    penalty = 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)
    if not config.do_sample or config.temperature == 0:
        return Sampling(penalty=penalty, seed=seed)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    top_p = 1.0 if config.top_p is None else float(config.top_p)
    return Sampling(temperature, config.top_k or None, top_p, float(config.min_p or 0.0), penalty, seed)


def _check_adapters(model: Any, adapters: Any) -> None:
    wanted = {name for name in adapters or () if name is not None}
    if not wanted:
        return
    pools = [router.source for router in routers_of(model)]
    unknown = sorted(name for name in wanted if not pools or any(name not in pool.names for pool in pools))
    if unknown:
        index = next(i for i, name in enumerate(adapters) if name == unknown[0])
        raise OptionsError(
            message(f"prompt {index} names the adapter {unknown[0]!r}, which is not loaded",
                    cure=f"pool = pcg.lora.AdapterPool(model, ...); pool.load({unknown[0]!r}, folder)")
        )  # fmt: skip


def _notifier(streamer: Any, requests: int) -> Callable[[str, int | None], Any] | None:
    if streamer is None:
        return None
    if hasattr(streamer, "put") and hasattr(streamer, "end"):
        if requests != 1:
            raise OptionsError(
                message("a streamer of transformers serves one request", why=f"There are {requests}.",
                        cure="Pass a function: streamer(request_id, token)")
            )  # fmt: skip
        return lambda name, token: streamer.end() if token is None else streamer.put(torch.tensor([token]))
    if not callable(streamer):
        raise OptionsError(
            message(f"the streamer is a {type(streamer).__name__}", cure="Pass streamer(request_id, token)")
        )
    return streamer  # type: ignore[no-any-return]


def _tell(session: Session, notify: Any, request: Request, token: int | None) -> None:
    if notify is None or request.error is not None:
        return
    try:
        if notify(request.id, token) is False and token is not None:
            session.cancel(request.id)
    except Exception as error:
        # A streamer is the caller's code: what it raises is the error of its request.
        session.fail(request, error)


def _engine(
    model: Any, requests: Sequence[Request], num_pages: int | None, page_size: int, most_tokens: int, options: Any
) -> Engine:
    from ..transformers.caches import cache_for

    parameter = next(model.parameters())
    chosen = {"compiler": "inductor" if parameter.is_cuda else "eager", "max_tokens": most_tokens, **(options or {})}
    sizes = [-(-request.limit // page_size) for request in requests]
    # A power of two, so later calls that need a few more pages find room.
    wanted = num_pages or 1 << sum(sizes).bit_length()
    holder: _Holder = vars(model).setdefault("_pcg_generation", _Holder())
    engine = holder.engine
    if engine is not None:
        cache = engine.cache
        fits = cache.num_pages == wanted if num_pages else cache.num_pages >= min(wanted, _most_pages(model, cache))
        same = (cache.dtype, cache.device, cache.page_size) == (parameter.dtype, parameter.device, page_size)
        if fits and same and (engine.options, engine.most_tokens) == (chosen, most_tokens):
            return engine
        holder.engine = engine = None
        del cache
    if num_pages is None:
        most = _most_pages(model, cache_for(model, num_pages=2, page_size=page_size))
        wanted = max(min(wanted, most), 1 + max(sizes))
    slots = min(_SLOTS, most_tokens)
    cache = cache_for(model, num_pages=wanted, page_size=page_size, max_requests=slots)
    holder.engine = Engine(model, cache, slots, most_tokens, chosen)
    return holder.engine


def _most_pages(model: Any, cache: Any) -> int:
    """Pages that a cache like this one may have, on the rank with the least memory."""
    page: int = sum(t[0].numel() * t.element_size() for t in (*cache.k, *cache.v))
    on_gpu = cache.device.type == "cuda"
    room = int(_SHARE * torch.cuda.mem_get_info(cache.device)[0]) if on_gpu else _CPU_BYTES
    rooms: list[int] = Ranks.of(model).gather(room // page)
    return max(2, min(rooms))


def _output(request: Request, times: list[float] | None) -> GenerationOutput:
    return GenerationOutput(
        request.id,
        prompt_ids=list(request.prompt),
        generated_tokens=request.generated,
        logprobs=request.logprobs,
        error=None if request.error is None else f"{type(request.error).__name__}: {request.error}",
        status=RequestStatus.FINISHED if request.error is None else RequestStatus.FAILED,
        created_time=request.started,
        lifespan=(request.started, request.ended),
        timestamps=times,
    )
