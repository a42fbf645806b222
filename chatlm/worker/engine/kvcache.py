"""Who owns which page of the KV cache.

    a page is   free      in `free`, content meaningless
              | owned     by `refs` >= 1 sequences; a full page may be in the prefix index and shared
              | cached    refs == 0, in the prefix index, in `evictable` (least recently released first)

Only full pages, with every slot computed, enter the index, so sharing needs no copy-on-write.

Layers with a window need only a few pages of a long sequence. If some layers have a window and others do not,
the layers form groups, and a page holds the keys and values of 16 tokens in the layers of one group. All
pages have the same size, so layers that store more per token share a page with fewer others. The pages of all
groups come from one pool. Each row of a sequence's table lists a page of each group; a page that the window
has passed returns to the pool and leaves a hole in the table."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.engine.states import StateTables

if TYPE_CHECKING:
    from chatlm.worker.engine.keeper import Addresses
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.engine.states import StatePool


Key = tuple[int | str, tuple[int, ...]]  # of the prefix index: serial of the parent's content, 16 tokens


@dataclass(eq=False)
class Content:
    """An entry of the prefix index: 16 tokens after a prefix, and the page of each group that has them."""

    serial: int
    pages: list[int]


class PagePool:
    """Allocator of KV pages with reference counts and a prefix index over full pages. No tensors here.

    If layers keep `states`, a prefix is usable only up to its last content that has a snapshot.

    The index maps (serial of the parent's content, 16 tokens) to their Content. A serial names one content
    and is never reused, so a chain of keys determines the whole prefix. The dictionary compares the tokens
    themselves, so a hash collision can never confuse two prefixes."""

    ROOT = ""  # the serial before the first page; an owner who shares no pages has their name instead

    page_size = PAGE_SIZE
    MOST_BARE = 1 << 16  # contents without a page that are kept

    def __init__(self, num_pages: int, windows: Seq[int] = (0,), states: StatePool | None = None):
        self.states = states
        self.num_pages = num_pages
        self.windows = tuple(windows)
        self.groups = len(windows)
        self.hole = num_pages  # stands in tables for a page that is missing or was released
        self.free = list(range(num_pages - 1, -1, -1))
        self.refs = [0] * num_pages
        self.keys: list[tuple[int, Key] | None] = [None] * num_pages
        self.index: dict[Key, Content] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        # contents of restored prefixes outside every window: without a page to evict they would stay forever
        self.bare: OrderedDict[Key, None] = OrderedDict()
        self.last_serial = 0
        self.addresses: Addresses | None = None  # of contents, if these outlive the process
        self.fresh: deque[tuple[Key, Content]] = deque(maxlen=1 << 16)

    @property
    def available(self) -> int:
        return len(self.free) + len(self.evictable)

    def note_addresses(self, addresses: Addresses):
        """From now on give each content an address by which a later process finds it, and list the new ones
        in `fresh`."""
        self.addresses = addresses

    def gauges(self) -> dict[str, float]:
        """Also those of the states; a pool without states has no such gauges."""
        gauges: dict[str, float] = {
            "kv_pages_used": self.num_pages - self.available, "kv_pages_total": self.num_pages}
        return gauges | self.states.gauges() if self.states else gauges

    def first_seen(self, position: int, window: int) -> int:
        """The index of the first page that the token at `position` sees in layers with this window."""
        return max(0, position + 1 - window) // self.page_size if window else 0

    def pages_for(self, length: int, chunk: int) -> int:
        """The most pages that a sequence of `length` tokens holds if computed in chunks of `chunk`."""
        whole = -(-length // self.page_size)
        size = self.page_size
        return sum(min(whole, -(-(window + chunk) // size) + 1) if window else whole
                   for window in self.windows)

    def match_prefix(self, tokens: Seq[int], root: str = ROOT) -> tuple[list[int], int | str]:
        """Find the longest indexed prefix of `tokens` below `root` and reference the pages later tokens see.

        The match never includes the last token, since its logits must be computed.
        Returns the prefix's table and the serial of its last content."""
        chain = []
        begins = [0] * self.groups
        matched = 0
        serial = root
        size = self.page_size
        for start in range(0, len(tokens) - size, size):
            content = self.index.get((serial, tuple(tokens[start:start + size])))
            if content is None:
                break
            chain.append(content)
            serial = content.serial
            for group, page in enumerate(content.pages):
                if page == self.hole:
                    begins[group] = len(chain)
            seen = all(begin <= self.first_seen(start + size, window)
                       for begin, window in zip(begins, self.windows))
            if seen and (self.states is None or serial in self.states):
                matched = len(chain)
        first = [self.first_seen(matched * size, window) for window in self.windows]
        table = [page if index >= first[group] else self.hole for index, content in enumerate(chain[:matched])
                 for group, page in enumerate(content.pages)]
        for page in table:
            if page != self.hole:
                self.evictable.pop(page, None)
                self.refs[page] += 1
        return table, chain[matched - 1].serial if matched else root

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, one reference each, evicting cached ones as needed; None if too few exist."""
        if count > self.available:
            return None
        while len(self.free) < count:
            self._evict()
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
        return pages

    def take(self, count: int) -> list[int]:
        """Take `count` pages, as `allocate` does, of those that are known to be available."""
        pages = self.allocate(count)
        assert pages is not None
        return pages

    def _evict(self):
        page, _ = self.evictable.popitem(last=False)
        group, key = self.keys[page]  # pyright: ignore[reportGeneralTypeIssues]  an evictable page has a key
        pages = self.index[key].pages
        pages[group] = self.hole
        if pages.count(self.hole) == len(pages):
            self._forget(key)
        self.keys[page] = None
        self.free.append(page)

    def _forget(self, key: Key):
        serial = self.index.pop(key).serial
        if self.addresses:
            self.addresses.forget(serial)
        if self.states:
            self.states.forget(serial)

    def _forget_bare(self, most: int):
        """Keep at most this many contents without a page."""
        while len(self.bare) > most:
            key, _ = self.bare.popitem(last=False)
            if (content := self.index.get(key)) and content.pages.count(self.hole) == len(content.pages):
                self._forget(key)

    def register(self, parent: int | str, tokens: Seq[int], pages: Seq[int]) -> int:
        """Add full, computed pages, one of each group, to the index below the content `parent`; returns the
        content's serial.

        If the same prefix is already indexed, its entry stays and the page remains private to its owner."""
        key = (parent, tuple(tokens))
        if (content := self.index.get(key)) is None:
            self.last_serial += 1
            content = self.index[key] = Content(self.last_serial, [self.hole] * self.groups)
            if self.addresses:
                self.addresses.note(key, content.serial)
                self.fresh.append((key, content))
        for group, page in enumerate(pages):
            if content.pages[group] == self.hole != page:
                content.pages[group] = page
                self.keys[page] = group, key
        if content.pages.count(self.hole) == self.groups:
            self.bare[key] = None
            self._forget_bare(self.MOST_BARE)
        return content.serial

    def release(self, pages: Seq[int]):
        """Drop one reference to each; at 0, indexed pages become evictable (end of the chain first), others
        free."""
        for page in reversed(pages):
            if page == self.hole:
                continue
            self.refs[page] -= 1
            if self.refs[page] == 0 and self.keys[page] is None:
                self.free.append(page)
            elif self.refs[page] == 0:
                self.evictable[page] = None

    def exchange(self, own: Seq[int], shared: Seq[int]):
        """Give up a reference to each of a sequence's own pages for one to indexed pages."""
        for page in shared:
            self.evictable.pop(page, None)
            self.refs[page] += 1
        self.release(own)

    def forget_cached(self):
        """Free all cached pages and remove them from the prefix index."""
        while self.evictable:
            self._evict()
        self._forget_bare(0)


class PageTables:
    """The tables of running sequences: row r has the pages of tokens 16 r to 16 r + 15, one of each group of
    layers."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.holes = any(pool.windows)  # may tables have holes?
        self.states = StateTables(pool.states, pool.page_size) if pool.states else None

    def missing(self, sequence: Sequence, whole: int, near: int) -> list[int]:
        """The entries of a sequence's table without a page, up to row `whole`; with a window, to `near`."""
        groups = self.pool.groups
        have = len(sequence.pages) // self.pool.groups
        if have >= whole and (sequence.filled >= near or not self.holes):
            return []
        return [index * groups + group for group, window in enumerate(self.pool.windows)
                for index in (range(sequence.filled, near) if window else range(have, whole))]

    def fill(self, sequence: Sequence, entries: Seq[int], pages: Seq[int], near: int):
        """Put pages into entries of a sequence's table; in layers with a window, up to row `near`."""
        table = sequence.pages
        groups = self.pool.groups
        rows = max(entries, default=-1) // groups + 1
        table += [self.pool.hole] * (rows * groups - len(table))
        for entry, page in zip(entries, pages):
            table[entry] = page
        sequence.filled = max(sequence.filled, near)

    def held(self, sequence: Sequence) -> int:
        """How many pages it holds."""
        return len(sequence.pages) - (sequence.pages.count(self.pool.hole) if self.holes else 0)

    def advance(self, sequence: Sequence, count: int):
        """Count its next `count` tokens as computed: add the pages that they fill to the prefix index, and
        release those that no later token sees."""
        size = self.pool.page_size
        groups = self.pool.groups
        before = sequence.computed
        sequence.computed = sequence.computed + count
        for index in range(before // size, sequence.computed // size):
            tokens = sequence.tokens[index * size:(index + 1) * size]
            pages = sequence.pages[index * groups:(index + 1) * groups]
            sequence.serial = self.pool.register(sequence.serial, tokens, pages)
            if self.states:
                self.states.pass_content(sequence, (index + 1) * size)
        if self.states:
            self.states.advance(sequence)
        for group, window in enumerate(self.pool.windows if self.holes else ()):
            begin, end = (self.pool.first_seen(position, window) * groups + group
                          for position in (before, sequence.computed))
            passed = slice(begin, end, groups)
            self.pool.release(sequence.pages[passed])
            sequence.pages[passed] = [self.pool.hole] * len(sequence.pages[passed])

    def release(self, sequence: Sequence):
        """Release all its pages and states; its tokens would have to be computed again."""
        self.pool.release(sequence.pages)
        if self.states:
            self.states.release(sequence)
        sequence.pages = []
        sequence.computed = 0
        sequence.filled = 0
        sequence.serial = sequence.root


def longest_context(pool: PagePool, most: int, chunk: int) -> int:
    """How many tokens one sequence may have in the pool's pages, at most `most`."""
    pages = range(-(-most // PAGE_SIZE) + 1)
    fit = bisect.bisect_right(pages, pool.num_pages, key=lambda n: pool.pages_for(n * PAGE_SIZE, chunk)) - 1
    return min(most, fit * PAGE_SIZE)
