"""A request: a prompt, how its tokens are chosen, and what has come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Ints", "Request", "Sampling"]

Ints = npt.NDArray[np.int64]


@dataclass
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    seed: int = 0

    @property
    def filters(self) -> bool:
        """Whether tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        id: its name in the results. index: the place of its prompt among those given.
        prompt: token ids. most: new tokens at the most. ends: ids that end it. stops: strings that end it.
        adapter: a LoRA adapter's name, or None.
        error: why it failed, or None. finished: whether it wants no more tokens.
        slot: its row of the scheduler's arrays while it runs, else -1. pages: its pages, in order.
        kept: prompt and generated tokens when it began to run last, or ended. kept_logprobs: of the generated ones.
    """

    id: str
    index: int
    prompt: list[int]
    most: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    adapter: str | None = None
    error: BaseException | None = None
    finished: bool = False
    started: float = -1.0
    ended: float = -1.0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    kept_logprobs: list[float] = field(default_factory=list)
    #: While it runs: its rows of ids and log probabilities, and the number of tokens that the host has read.
    rows: tuple[Ints, npt.NDArray[np.float32], Ints] | None = None
    #: Index nodes of its full pages: the last one's, and how many pages are published.
    node: int = 0
    published: int = 0

    def __post_init__(self) -> None:
        self.kept = self.kept or list(self.prompt)

    @property
    def tokens(self) -> list[int]:
        """Prompt and generated tokens, as far as the host has read them."""
        return self.kept if self.rows is None else self.rows[0][: self.rows[2][0]].tolist()

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def logprobs(self) -> list[float]:
        """Log probabilities of the new tokens."""
        if self.rows is None:
            return self.kept_logprobs
        new: list[float] = self.rows[1][len(self.prompt) : self.rows[2][0]].tolist()
        return new
