"""Sampling on the device: one function of logits and per-request settings, the same whoever shares the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .requests import Sampling

__all__ = ["SamplingState", "make_sampler"]

#: The multipliers of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), signed.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class SamplingState:
    """Settings of the running requests, one entry a slot, on the device.

    Attributes:
        floats: ``[4, slots]`` float32: temperature, 0 for greedy; top_p and min_p, 1 and 0 for all tokens; the
            repetition penalty, 1 for none. longs: ``[2, slots]`` int64: top_k, the vocabulary's size for all tokens;
            seed. host_floats, host_longs: the same on the host.
        last: ``[slots]`` int64, the token that each slot sampled last.
        seen: ``[slots, vocabulary]`` bool, tokens that a penalty applies to; ``[slots, 1]`` while no request has one.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.host_floats, self.host_longs = np.zeros((4, slots), np.float32), np.zeros((2, slots), np.int64)
        self.floats = torch.zeros(4, slots, device=device)
        self.longs = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self.last = torch.zeros(slots, dtype=torch.int64, device=device)
        self.seen = torch.zeros(slots, 1, dtype=torch.bool, device=device)

    def set(self, slot: int, settings: Sampling, vocabulary: int) -> None:
        """Notes the settings of a slot on the host. Greedy requests leave no token out, whatever they say."""
        top_p, min_p, top_k = (
            (settings.top_p, settings.min_p, settings.top_k) if settings.needs[1] else (1.0, 0.0, None)
        )
        self.host_floats[:, slot] = settings.temperature, top_p, min_p, settings.penalty
        self.host_longs[:, slot] = min(top_k or vocabulary, vocabulary), settings.seed


def make_sampler(draws: bool, filters: bool, penalizes: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Returns ``sample(logits, slots, counter, ...) -> (tokens, logprobs)`` for batches that need only so much.

    ``draws``: some request has a temperature. ``filters``: some has top_k, top_p or min_p. ``penalizes``: some has a
    repetition penalty. A request gets the same token from each variant that covers its settings.

    The function takes ``logits [rows, vocabulary]``, ``slots [rows]`` int64, ``counter [rows]`` int64 (the number of
    tokens before the one that is sampled) and ``floats``, ``longs`` and ``seen`` of :class:`SamplingState`. It returns
    tokens ``[rows]`` int64, and float32 log probabilities under the distribution that was sampled from, as transformers
    does.
    """

    def sample(
        logits: torch.Tensor,
        slots: torch.Tensor,
        counter: torch.Tensor,
        floats: torch.Tensor,
        longs: torch.Tensor,
        seen: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.float()
        if penalizes:
            factor = floats[3][slots][:, None]
            penalized = torch.where(scores < 0, scores * factor, scores / factor)
            scores = torch.where(seen[slots], penalized, scores)
        noisy = scores
        if draws:
            heat = floats[0][slots][:, None]
            greedy = heat <= 0
            scores = scores / torch.where(greedy, 1.0, heat)
            if filters:
                scores = _filtered(scores, longs[0][slots], floats[1][slots][:, None], floats[2][slots][:, None])
            noisy = scores + torch.where(greedy, 0.0, _gumbel(longs[1][slots], counter, scores.shape[-1]))
        # Two passes over the vocabulary: the largest ones, and the sum.
        tokens, top = noisy.argmax(-1), scores.amax(-1)
        chosen = scores.gather(-1, tokens[:, None])[:, 0] if draws else top
        return tokens, chosen - top - (scores - top[:, None]).exp().sum(-1).log()

    return sample


def _filtered(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Scores with -inf for tokens that top-k, top-p or min-p leave out, in transformers' order."""
    ordered = scores.sort(-1, descending=True).values
    least = ordered.gather(-1, (top_k - 1)[:, None])
    ordered = torch.where(ordered < least, -torch.inf, ordered)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The most likely token always stays: nothing comes before it.
    keep = (before < top_p) & (probabilities >= min_p * probabilities[:, :1]) & (ordered > -torch.inf)
    keep = keep | (torch.arange(scores.shape[-1], device=scores.device) == 0)
    least = torch.where(keep, ordered, torch.inf).amin(-1, keepdim=True)
    return torch.where(scores < least, -torch.inf, scores)


def _gumbel(seed: torch.Tensor, counter: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``[rows, vocabulary]`` standard Gumbel noise, a function of seed, counter and token alone.

    The largest score with such noise is a sample of the softmax. No generator is advanced, so a request's tokens depend
    neither on the batch that it runs in nor on the order of steps.
    """
    row = _mixed(seed * _GOLDEN + counter)[:, None]
    bits = _mixed(row + torch.arange(vocabulary, device=seed.device) * _GOLDEN)
    # 23 bits and a half are exact in float32: neither 0 nor 1 comes up.
    uniform = (_shifted(bits, 41).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right of int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
