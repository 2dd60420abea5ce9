"""Pages that sequences share: reference counts, and an index of prefixes whose keys and values are in the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...attention import PagedKVCache

__all__ = ["Match", "PagePool"]


@dataclass
class Match:
    """The longest prefix of a sequence that is in the cache.

    Attributes:
        pages: full pages, in order; each has one reference more.
        node: the index's node behind them, for :meth:`PagePool.publish`.
        source: a page whose first ``copied`` tokens continue the prefix and are to be copied, or None.
        tokens: tokens in ``pages`` and the copy together.
    """

    pages: list[int]
    node: int
    source: int | None
    copied: int
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
        self._references: dict[int, int] = {}
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}
        self._page_of: dict[int, int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        #: Indexed pages without readers, the longest unused first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        #: By node, the tokens in pages that are still filling up, those of a prompt; and the node of each such page.
        self._partial: dict[int, dict[int, tuple[int, ...]]] = {}
        self._partial_node: dict[int, int] = {}
        self._roots: dict[Hashable, int] = {}
        self._next = 0

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """All pages."""
        return len(self._all)

    def take(self) -> int:
        """A page of one's own; ``available`` tells whether there is one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Ends one sequence's use of its pages."""
        # The last first: a prefix outlives what follows it in the index.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            del self._references[page]
            self._drop_partial(page)
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[int], kind: Hashable) -> Match:
        """The longest cached prefix of ``tokens``, the last token left out: its logits are wanted.

        Args:
            kind: what else the keys and values depend on, such as the adapter.
        """
        node, size = self._root(kind), self.page_size
        pages: list[int] = []
        most = len(tokens) - 1
        while (len(pages) + 1) * size <= most:
            found = self._nodes.get((node, tuple(tokens[len(pages) * size : (len(pages) + 1) * size])))
            if found is None:
                break
            node = found
            pages.append(self._page_of[node])
        for page in pages:
            self._references[page] = self._references.get(page, 0) + 1
            self._idle.pop(page, None)
        start = len(pages) * size
        rest, source, copied = tuple(tokens[start : min(start + size, most)]), None, 0
        for page, held in self._partial.get(node, {}).items():
            same = _common(rest, held)
            if same > copied:
                source, copied = page, same
        return Match(pages, node, source, copied, start + copied)

    def publish(self, node: int, page: int, tokens: Sequence[int]) -> int:
        """Indexes a full page behind ``node``; returns the node of the page, or of one that holds the same."""
        key = (node, tuple(tokens))
        known = self._nodes.get(key)
        if known is not None:
            return known
        self._next += 1
        self._nodes[key], self._page_of[self._next], self._key_of[page] = self._next, page, key
        self._drop_partial(page)
        return self._next

    def publish_partial(self, node: int, page: int, tokens: Sequence[int]) -> None:
        """Lets others copy the first tokens of a page that is still filling up."""
        self._partial.setdefault(node, {})[page] = tuple(tokens)
        self._partial_node[page] = node

    def close(self) -> None:
        """Gives every page back to the cache."""
        self.cache.free(self._all)
        self._all, self._free = [], []

    def _root(self, kind: Hashable) -> int:
        if kind not in self._roots:
            self._next += 1
            self._roots[kind] = self._next
        return self._roots[kind]

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page)
        node = self._nodes.pop(key)
        del self._page_of[node]
        for partial in self._partial.pop(node, {}):
            del self._partial_node[partial]

    def _drop_partial(self, page: int) -> None:
        node = self._partial_node.pop(page, None)
        if node is not None:
            del self._partial[node][page]
            if not self._partial[node]:
                del self._partial[node]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
