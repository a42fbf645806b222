"""Copies pages of the KV cache, and snapshots of states, into memory that outlives this process.

A page is copied after the step that filled it, in the engine's thread, since it is only a copy in memory. A
page is useless without those before it, so any of them that are no longer kept are copied again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.common.memory import populate
from chatlm.common.segments import PAGE, ROOT, STATE
from chatlm.worker.arrays.kinds import address_of
from chatlm.worker.engine.kept_pages import owner_address, page_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence as Seq
    from chatlm.worker.engine.kept_pages import KeptPages
    from chatlm.worker.engine.kvcache import Content, Key, PagePool
    from chatlm.worker.model.transformer import Transformer


UNCLAIMED = "unclaimed "  # and the first address: the root of a prefix whose owner is not known yet


class Addresses:
    """The address of each content of the prefix index, and its key there, by its serial."""

    def __init__(self):
        self.of: dict[int | str, bytes] = {}
        self.keys: dict[int | str, Key] = {}
        self.roots: dict[bytes, str] = {}  # address of a first page -> the root below which it is indexed

    def root_of(self, first: bytes) -> str:
        """The root below which a prefix with this address of its first page is indexed, or may be as long as
        nobody has asked for it."""
        return self.roots.get(first) or UNCLAIMED + first.hex()

    def __getitem__(self, serial: int | str) -> bytes | None:
        return owner_address(serial) if isinstance(serial, str) else self.of.get(serial)

    def unclaimed(self, root: str, first: tuple[int, ...]) -> Key | None:
        """The key of the prefix with this first page that an owner may claim, if there is one."""
        found = self.roots.get(page_address(owner_address(root), first), "")
        return (found, first) if found.startswith(UNCLAIMED) else None

    def note(self, key: Key, serial: int):
        root = key[0] if isinstance(key[0], str) else None
        if root and root.startswith(UNCLAIMED):
            address = bytes.fromhex(root[len(UNCLAIMED):])
        elif (parent := self[key[0]]) is not None:
            address = page_address(parent, key[1])
        else:
            return
        self.of[serial] = address
        self.keys[serial] = key
        if root is not None:
            self.roots[address] = root

    def forget(self, serial: int):
        address = self.of.pop(serial, None)
        key = self.keys.pop(serial, None)
        if address and key and self.roots.get(address) == key[0]:
            del self.roots[address]


class PageBytes:
    """The bytes of a model's KV pages and states, as arrays of uint8."""

    RUN = 16  # pages for which memory is provided at a time

    def __init__(self, transformer: Transformer, num_pages: int):
        layout = transformer.layout
        memory = transformer.cache
        depth = layout.size // layout.own if layout.own else 1
        pages = num_pages + transformer.groups.holes
        # (layers of a page, pages, bytes): a page is a column if its layers are not contiguous
        self.rows = (transformer.arrays.bytes(memory).reshape(depth, pages, -1) if layout.size else
                     numpy.empty((1, pages, 0), numpy.uint8))
        self.states = [transformer.arrays.bytes(state).reshape(len(state), -1)
                       for states in transformer.states for state in states]
        self.page_bytes = self.rows.shape[0] * self.rows.shape[2]
        self.state_bytes = sum(state.shape[1] for state in self.states)

    def pages(self, pages: Seq[int]) -> numpy.ndarray:
        """A copy of some pages, one after the other."""
        return numpy.concatenate([self.rows[:0].ravel(), *(self.rows[:, page].ravel() for page in pages)])

    def parts(self, payload: memoryview, count: int) -> numpy.ndarray:
        """So many copied pages, each as `rows` has it."""
        return numpy.asarray(payload, numpy.uint8).reshape(count, self.rows.shape[0], self.rows.shape[2])

    def provide(self, pages: Seq[int], is_over: Callable[[], bool]):
        """Have the system provide the memory of some pages, whatever they contain, until it `is_over`."""
        for run in runs(pages, self.RUN):
            if is_over():
                return
            for layer in self.rows[:, run[0]:run[-1] + 1]:
                populate(address_of(layer), layer.nbytes)

    def state(self, slot: int) -> numpy.ndarray:
        return numpy.concatenate([state[slot] for state in self.states])

    def put_state(self, slot: int, payload: memoryview):
        data = numpy.asarray(payload, numpy.uint8)
        begin = 0
        for state in self.states:
            state[slot] = data[begin:begin + state.shape[1]]
            begin += state.shape[1]


def runs(pages: Seq[int], most: int) -> Iterator[list[int]]:
    """The pages in runs of at most `most` that follow each other."""
    run: list[int] = []
    for page in pages:
        if run and (page != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(page)
    if run:
        yield run


class Copier:
    """Copies contents of the prefix index to kept pages."""

    STEP_BYTES = 64 << 20  # copied between two steps
    LOOK_S = 0.25          # between two looks at what other workers have dropped
    STORED_S = 5.0         # while memory is full: the longest wait for its pages to be stored
    RETRY_S = 60.0         # after a failure

    def __init__(self, pool: PagePool, kept: KeptPages, memory: PageBytes, counts: dict[str, int],
                 scan_store: Callable[[], None]):
        """counts: of pages and bytes kept. scan_store: starts a scan, which shows what the store has
        taken."""
        self.pool = pool
        self.kept = kept
        self.memory = memory
        self.counts = counts
        self.scan_store = scan_store
        self.retry_s = 0.0  # when to try again after a failure
        self.trouble = ""   # the last failure; "" once it is over
        self.full_s = 0.0   # since when memory has been full; 0: it is not
        self.looked_s = -self.LOOK_S
        self.waits = False  # for the store, to take pages out of memory
        self.copied = 0     # bytes, since the last step
        self.spent_s = 0.0  # of the processor

    def copy(self):
        """Keep the pages filled so far. Call it while no step is under way."""
        now_s = time.monotonic()
        states = self.pool.states
        has_news = self.pool.fresh or states and states.fresh
        if not self.kept.profile or now_s < self.retry_s or not has_news:
            return
        began_s = time.thread_time()
        self.copied = 0
        if now_s - self.looked_s > self.LOOK_S:
            self.looked_s = now_s
            self.kept.look_at_memory()
        try:
            self._copy_pages(now_s)
            while states and states.fresh and not self.pool.fresh and self.copied < self.STEP_BYTES:
                self._keep_state(states.fresh.popleft())
            self.trouble = ""
        except OSError as error:
            self._note_trouble(error.strerror or str(error), now_s)
        self.spent_s += time.thread_time() - began_s

    def _copy_pages(self, now_s: float):
        """Keep new pages in turn, until enough are copied or memory is full."""
        pool = self.pool
        while pool.fresh and self.copied < self.STEP_BYTES:
            key, content = pool.fresh[0]
            is_indexed = pool.index.get(key) is content
            self.waits = is_indexed and not self._keep_chain(content.serial) and self._may_fit_soon(now_s)
            if self.waits:
                return
            pool.fresh.popleft()

    def _note_trouble(self, trouble: str, now_s: float):
        self.retry_s = now_s + self.RETRY_S
        if self.trouble != trouble:
            self.trouble = trouble
            log.warning("prefixes are not kept in memory for a while: %s", trouble)

    @property
    def behind(self) -> bool:
        """Are there pages to keep, and no failure that prevents it?"""
        return bool(self.kept.profile and self.pool.fresh and not self.trouble)

    def _may_fit_soon(self, now_s: float) -> bool:
        """Memory is full. Is it worth waiting until the store has taken some pages out of it?"""
        self.full_s = self.full_s or now_s
        if self.kept.folder is None or now_s - self.full_s > self.STORED_S:
            return False
        self.scan_store()
        return True

    def _keep_chain(self, serial: int | str) -> bool:
        """Keep a page, and those before it that are no longer kept. False if there is no room."""
        chain = []  # from the page back to the first that is not kept
        addresses = self.pool.addresses
        while addresses and not isinstance(serial, str):
            address = addresses[serial]
            key = addresses.keys.get(serial)
            if address is None or key is None:
                return True
            if self.kept.key(PAGE, address) in self.kept:
                break
            chain.append((key, address))
            serial = key[0]
        for (serial, tokens), address in reversed(chain):
            content = self.pool.index.get((serial, tokens))
            parent = addresses and addresses[serial]
            if content is None or not self._is_whole(content) or parent is None:
                return True
            if not self._keep_page(content, address, ROOT if isinstance(serial, str) else parent, tokens):
                return False
            self.full_s = 0.0
        return True

    def _is_whole(self, content: Content) -> bool:
        """Does it have a page in every group of layers that see all tokens?"""
        return all(window or page != self.pool.hole for page, window in zip(content.pages, self.pool.windows))

    def _keep_page(self, content: Content, address: bytes, parent: bytes, tokens: tuple[int, ...]) -> bool:
        pages = [page for page in content.pages if page != self.pool.hole]
        groups = sum(1 << group for group, page in enumerate(content.pages) if page != self.pool.hole)
        payload = self.memory.pages(pages)
        if not self.kept.add(PAGE, address, payload, groups, tokens, parent):
            return False
        self.counts["kept_pages"] += 1
        self.counts["kept_bytes"] += len(payload)
        self.copied += len(payload)
        return True

    def _keep_state(self, serial: int | str):
        states = self.pool.states
        address = self.pool.addresses and self.pool.addresses[serial]
        if states is None or address is None or serial not in states:
            return
        if self.kept.key(STATE, address) in self.kept or not self._keep_chain(serial):
            return
        slot = (states.ends if serial in states.ends else states.passed)[serial]
        payload = self.memory.state(slot)
        if self.kept.add(STATE, address, payload, parent=address):
            self.counts["kept_bytes"] += len(payload)
            self.copied += len(payload)
