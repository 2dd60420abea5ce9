"""Sizes of steps, drawn from models of traffic: what bucket tables are measured with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

__all__ = ["TRAFFIC"]


def log_uniform(steps: int, most: int, seed: int = 0) -> list[int]:
    """Sizes whose logarithm is uniform from 1 to ``most``."""
    draw = random.Random(seed)
    return [min(most, max(1, round(math.exp(draw.uniform(0, math.log(most)))))) for _ in range(steps)]


def serving(steps: int, most: int, seed: int = 0) -> list[int]:
    """Steps of a server with continuous batching and chunked prefill.

    Requests arrive at random with prompts of log-normal length (median 400 tokens) and answers of geometric length
    (mean 150); a step decodes one token of each running request and fills up to ``most`` tokens with prompts, of
    which it takes no more than 2,048 tokens a step. The load swings between a third and the whole of what 200 running
    requests need, as it does over a day.
    """
    draw = random.Random(seed)
    waiting: list[int] = []
    running: list[int] = []
    sizes: list[int] = []
    step = 0
    while len(sizes) < steps:
        load = 2 / 3 + math.sin(2 * math.pi * step / 2000) / 3
        step += 1
        if draw.random() < min(0.95, 200 * load / 150):
            waiting.append(max(1, min(8000, round(draw.lognormvariate(math.log(400), 1.0)))))
        tokens = len(running)
        room = max(0, min(2048, most - tokens)) if len(running) < 256 else 0
        finished: list[int] = []
        while waiting and room:
            taken = min(room, waiting[0])
            room -= taken
            tokens += taken
            waiting[0] -= taken
            if not waiting[0]:
                waiting.pop(0)
                finished.append(1 + int(draw.expovariate(1 / 150)))
        running = [left - 1 for left in running if left > 1] + finished
        if tokens:
            sizes.append(min(tokens, most))
    return sizes


TRAFFIC: Mapping[str, Callable[[int, int], list[int]]] = {"log-uniform": log_uniform, "serving": serving}
