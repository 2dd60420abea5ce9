"""Pages that sequences share: reference counts, and an index of prefixes whose keys and values are in the cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from ...attention import PagedKVCache

__all__ = ["Match", "Page", "PagePool"]

#: A page by what it holds: the page before it, or what else the keys and values depend on, and its tokens.
Key = tuple[Hashable, tuple[int, ...]]


class Page:
    """A page in use or in the index; the one that takes its number later is another object.

    Attributes:
        number: its place in the cache. readers: sequences that read it. key: what the index has it under, or None.
    """

    __slots__ = ("key", "number", "readers")

    def __init__(self, number: int) -> None:
        self.number, self.readers = number, 1
        self.key: Key | None = None


class Match(NamedTuple):
    """The longest prefix of a sequence that is in the cache.

    Attributes:
        pages: full pages, in order; each has one reader more.
        parent: what the index has the next page behind, for :meth:`PagePool.publish`.
        source: a page whose first tokens continue the prefix and are to be copied, or None.
        tokens: tokens in ``pages`` and the copy together.
    """

    pages: list[Page]
    parent: Hashable
    source: Page | None
    tokens: int


class PagePool:
    """Pages of one cache, counted by the sequences that read them.

    Full pages are indexed by the tokens that they hold and the page before, as in vLLM's automatic prefix caching, so
    that a prompt finds what another one has computed. A page that nobody reads stays indexed until it is needed.

    The pool takes every free page of the cache; :meth:`close` gives all of them back.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache, self.page_size = cache, cache.page_size
        self._all = cache.allocate(cache.free_pages)
        self._free = list(self._all)
        self._index: dict[Key, Page] = {}
        #: Indexed pages without readers, the longest unused first.
        self._idle: dict[Page, None] = {}
        #: Pages that are still filling up, with the prompt's tokens in them.
        self._partial: dict[Page, Key] = {}

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """All pages."""
        return len(self._all)

    def take(self) -> Page:
        """A page for one sequence; ``available`` tells whether there is one."""
        if self._free:
            return Page(self._free.pop())
        page = next(iter(self._idle))
        del self._idle[page]
        assert page.key is not None
        # Pages behind it stay in the index, out of reach, until they are needed.
        del self._index[page.key]
        return Page(page.number)

    def release(self, pages: Sequence[Page]) -> None:
        """Ends one sequence's use of its pages."""
        # The last first: a prefix outlives what follows it in the index.
        for page in reversed(pages):
            page.readers -= 1
            if page.readers:
                continue
            self._partial.pop(page, None)
            if page.key is not None:
                self._idle[page] = None
            else:
                self._free.append(page.number)

    def match(self, tokens: Sequence[int], kind: Hashable) -> Match:
        """The longest cached prefix of ``tokens``, the last token left out: its logits are wanted.

        Args:
            kind: what else the keys and values depend on, such as the adapter.
        """
        size, most = self.page_size, len(tokens) - 1
        parent: Hashable = ("root", kind)
        pages: list[Page] = []
        for start in range(0, most - size + 1, size):
            page = self._index.get((parent, tuple(tokens[start : start + size])))
            if page is None:
                break
            self._idle.pop(page, None)
            page.readers += 1
            pages.append(page)
            parent = page
        start = len(pages) * size
        rest, source, copied = tuple(tokens[start : min(start + size, most)]), None, 0
        for page, (before, held) in self._partial.items():
            same = common(rest, held) if before == parent else 0
            if same > copied:
                source, copied = page, same
        return Match(pages, parent, source, start + copied)

    def publish(self, parent: Hashable, page: Page, tokens: Sequence[int]) -> Page:
        """Indexes a full page behind ``parent``; returns the page that the index has for it, which may be another."""
        self._partial.pop(page, None)
        key = parent, tuple(tokens)
        found = self._index.setdefault(key, page)
        if found is page:
            page.key = key
        return found

    def publish_partial(self, parent: Hashable, page: Page, tokens: Sequence[int]) -> None:
        """Lets others copy the first tokens of a page that is still filling up."""
        self._partial[page] = parent, tuple(tokens)

    def forget(self) -> None:
        """Empties the index; pages in use stay so."""
        for page in self._index.values():
            page.key = None
        self._free += [page.number for page in self._idle]
        self._index, self._idle, self._partial = {}, {}, {}

    def close(self) -> None:
        """Gives every page back to the cache."""
        self.cache.free(self._all)
        self._all, self._free = [], []


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences, both lists or both tuples, begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
