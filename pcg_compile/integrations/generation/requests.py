"""A request: a prompt, how its tokens are chosen, and what has come of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from ...errors import OptionsError
from .pages import Page

__all__ = ["Request", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("temperature", self.temperature >= 0, "0 or more"), ("top_k", (self.top_k or 1) >= 1, "1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"), ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("penalty", self.penalty > 0, "above 0"),
        ):  # fmt: skip
            if not fits:
                raise OptionsError(f"{name} is {getattr(self, name)}: it is {range_}")

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether a token is drawn, whether some tokens are left out first, and whether there is a penalty."""
        draws = self.temperature > 0
        return draws, draws and (self.top_k is not None or self.top_p < 1 or self.min_p > 0), self.penalty != 1


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        id: its name in the results. index: the place of its prompt among those given.
        prompt: token ids. most: new tokens at the most. ends: ids that end it. stops: strings that end it.
        adapter: a LoRA adapter's name, or None.
        tokens, logprobs: prompt and generated tokens, and log probabilities of the generated ones, as far as the host
            has read them.
        error: why it failed, or None. finished: whether it wants no more tokens.
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
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    # The scheduler's, while the request runs:
    #: Its row in tables, else -1; its pages, in order.
    slot: int = -1
    pages: list[Page] = field(default_factory=list)
    #: Tokens when it began to run; tokens whose keys and values are written or about to be; sampled tokens that are
    #: still on the device.
    first: int = 0
    cached: int = 0
    in_flight: int = 0
    #: Pages that the index has, and what it has the next one behind.
    published: int = 0
    parent: Hashable = None

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)
        #: Tokens at the most.
        self.limit = len(self.prompt) + self.most

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def total(self) -> int:
        """Tokens, those included that are still on the device."""
        return len(self.tokens) + self.in_flight
