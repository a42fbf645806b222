"""Who owns which page of the KV cache.

    a page is   free      in `free`, content meaningless
              | owned     by `refs` >= 1 sequences; a full page may be in the prefix index and shared
              | cached    refs == 0, in the prefix index, in `evictable` (least recently released first)

Only full pages, with every slot computed, enter the index, so sharing needs no copy-on-write.

Layers with a window need only a few pages of a long sequence. Where some layers have a window and others do
not, the layers form groups, and a page holds the keys and values of 16 tokens in the layers of one group. All
pages have the same size, so layers that store more per token share a page with fewer others. The pages of all
groups come from one pool. Each row of a sequence's table lists a page of each group. A page that the window
has passed returns to the pool and leaves a hole in the table."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence as Seq
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
    pages: list[int]  # PagePool.hole for a group without one


class PagePool:
    """Allocator of KV pages with reference counts and a prefix index over full pages. No tensors here.

    The index maps (serial of the parent's content, 16 tokens) to their Content. A serial names one content
    and is never reused, so a chain of keys determines the whole prefix. The dictionary compares the tokens
    themselves, so a hash collision can never confuse two prefixes.

    If layers keep `states`, a prefix is usable only up to its last content that has a snapshot."""

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
        self.keys: list[tuple[int, Key] | None] = [None] * num_pages  # group and key of each indexed page
        self.index: dict[Key, Content] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        # contents without a page: of restored prefixes outside every window. No eviction would end them.
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
        """The row of the first page that the token at `position` sees in layers with this window."""
        return max(0, position + 1 - window) // self.page_size if window else 0

    def pages_for(self, length: int, chunk: int) -> int:
        """The most pages that a sequence of `length` tokens holds if computed in chunks of `chunk`."""
        size = self.page_size
        whole = -(-length // size)
        count = 0
        for window in self.windows:
            count += min(whole, -(-(window + chunk) // size) + 1) if window else whole
        return count

    def match_prefix(self, tokens: Seq[int], root: str = ROOT) -> tuple[list[int], int | str]:
        """Find the longest indexed prefix of `tokens` below `root`, and reference the pages of it that later
        tokens see. It never includes the last token, since its logits must be computed.

        Returns the prefix's table and the serial of its last content."""
        chain = self._usable_chain(tokens, root)
        first = [self.first_seen(len(chain) * self.page_size, window) for window in self.windows]
        table = []
        for row, content in enumerate(chain):
            for group, page in enumerate(content.pages):
                table.append(page if row >= first[group] else self.hole)
        self._reference(table)
        return table, chain[-1].serial if chain else root

    def _usable_chain(self, tokens: Seq[int], root: str) -> list[Content]:
        """The contents of the longest indexed prefix that has all pages, and the snapshot, that it needs."""
        chain: list[Content] = []
        begins = [0] * self.groups  # the row after the last hole in each group
        usable = 0
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
            has_pages = all(begin <= self.first_seen(start + size, window)
                            for begin, window in zip(begins, self.windows))
            if has_pages and (self.states is None or serial in self.states):
                usable = len(chain)
        return chain[:usable]

    def _reference(self, pages: Iterable[int]):
        """Add one reference to each of these indexed pages."""
        for page in pages:
            if page != self.hole:
                self.evictable.pop(page, None)
                self.refs[page] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, one reference each, evicting cached ones as needed; None if there are too
        few."""
        if count > self.available:
            return None
        while len(self.free) < count:
            self._evict()
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
        return pages

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages that are known to be available."""
        pages = self.allocate(count)
        assert pages is not None
        return pages

    def _evict(self):
        page, _ = self.evictable.popitem(last=False)
        group, key = self.keys[page]  # pyright: ignore[reportGeneralTypeIssues]  an evictable page has a key
        content = self.index[key]
        content.pages[group] = self.hole
        if self._is_bare(content):
            self._forget(key)
        self.keys[page] = None
        self.free.append(page)

    def _forget(self, key: Key):
        serial = self.index.pop(key).serial
        if self.addresses:
            self.addresses.forget(serial)
        if self.states:
            self.states.forget(serial)

    def _is_bare(self, content: Content) -> bool:
        """Does it have no page in any group?"""
        return content.pages.count(self.hole) == self.groups

    def _forget_bare(self, most: int):
        """Keep at most this many contents without a page."""
        while len(self.bare) > most:
            key, _ = self.bare.popitem(last=False)
            content = self.index.get(key)
            if content and self._is_bare(content):
                self._forget(key)

    def register(self, parent: int | str, tokens: Seq[int], pages: Seq[int]) -> int:
        """Add full, computed pages, one of each group, to the index below the content `parent`; returns the
        serial of their content.

        If the same prefix is already indexed, its entry stays, and the pages remain private to their
        owner."""
        key = (parent, tuple(tokens))
        content = self.index.get(key) or self._add_content(key)
        for group, page in enumerate(pages):
            if content.pages[group] == self.hole != page:
                content.pages[group] = page
                self.keys[page] = group, key
        if self._is_bare(content):
            self.bare[key] = None
            self._forget_bare(self.MOST_BARE)
        return content.serial

    def claim(self, tokens: Seq[int], root: str):
        """Find a prefix that was restored before its owner was known below `root` from now on, if that is
        its owner: the address of its first page shows it."""
        first = tuple(tokens[:self.page_size])
        if self.addresses is None or len(tokens) <= self.page_size or (root, first) in self.index:
            return
        key = self.addresses.unclaimed(root, first)
        if key is None:
            return
        content = self.index.pop(key)
        self.index[root, first] = content
        for group, page in enumerate(content.pages):
            if page != self.hole:
                self.keys[page] = group, (root, first)
        if key in self.bare:
            del self.bare[key]
            self.bare[root, first] = None
        self.addresses.note((root, first), content.serial)

    def _add_content(self, key: Key) -> Content:
        self.last_serial += 1
        content = Content(self.last_serial, [self.hole] * self.groups)
        self.index[key] = content
        if self.addresses:
            self.addresses.note(key, content.serial)
            self.fresh.append((key, content))
        return content

    def release(self, pages: Seq[int]):
        """Drop one reference to each. At 0 an indexed page becomes evictable, the end of a chain first; any
        other page is free."""
        for page in reversed(pages):
            if page == self.hole:
                continue
            self.refs[page] -= 1
            if self.refs[page]:
                continue
            if self.keys[page] is None:
                self.free.append(page)
            else:
                self.evictable[page] = None

    def exchange(self, own: Seq[int], shared: Seq[int]):
        """Reference the `shared` pages, which are indexed, in place of a sequence's own ones."""
        self._reference(shared)
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
        """The entries of a sequence's table that lack a page, up to row `whole`; in groups with a window, up
        to row `near`."""
        groups = self.pool.groups
        have = len(sequence.pages) // groups
        if have >= whole and (sequence.filled >= near or not self.holes):
            return []
        entries = []
        for group, window in enumerate(self.pool.windows):
            rows = range(sequence.filled, near) if window else range(have, whole)
            entries += [row * groups + group for row in rows]
        return entries

    def fill(self, sequence: Sequence, entries: Seq[int], pages: Seq[int], near: int):
        """Put pages into entries of a sequence's table; groups with a window then have pages up to row
        `near`."""
        table = sequence.pages
        groups = self.pool.groups
        rows = max(entries, default=-1) // groups + 1
        table += [self.pool.hole] * (rows * groups - len(table))
        for entry, page in zip(entries, pages):
            table[entry] = page
        sequence.filled = max(sequence.filled, near)

    def held_pages(self, sequence: Sequence) -> int:
        """How many pages it holds."""
        holes = sequence.pages.count(self.pool.hole) if self.holes else 0
        return len(sequence.pages) - holes

    def advance(self, sequence: Sequence, count: int):
        """Count its next `count` tokens as computed: add the pages that they fill to the prefix index, unless
        nobody may share them, and release those that no later token sees."""
        size = self.pool.page_size
        groups = self.pool.groups
        before = sequence.computed
        sequence.computed += count
        for row in range(before // size, sequence.computed // size) if sequence.shares_pages else ():
            tokens = sequence.tokens[row * size:(row + 1) * size]
            pages = sequence.pages[row * groups:(row + 1) * groups]
            sequence.serial = self.pool.register(sequence.serial, tokens, pages)
            if self.states:
                self.states.pass_content(sequence, (row + 1) * size)
        if self.states:
            self.states.advance(sequence)
        if self.holes:
            self._release_passed(sequence, before)

    def _release_passed(self, sequence: Sequence, before: int):
        """Release the pages that windows have passed since `before` tokens were computed."""
        pool = self.pool
        for group, window in enumerate(pool.windows):
            begin = pool.first_seen(before, window) * pool.groups + group
            end = pool.first_seen(sequence.computed, window) * pool.groups + group
            passed = slice(begin, end, pool.groups)
            pages = sequence.pages[passed]
            pool.release(pages)
            sequence.pages[passed] = [pool.hole] * len(pages)

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
    rows = range(-(-most // PAGE_SIZE) + 1)
    fitting = bisect.bisect_right(
        rows, pool.num_pages, key=lambda count: pool.pages_for(count * PAGE_SIZE, chunk)) - 1
    return min(most, fitting * PAGE_SIZE)
