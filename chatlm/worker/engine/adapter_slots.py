"""The adapters of an engine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.files import MOST_OBJECT, opened, read_small
from chatlm.common.hub.stamps import ADAPTER_FILES, Changed, adapter_stamp
from chatlm.worker.engine.part import EnginePart
from chatlm.worker.weights.adapters.serving import reading_thread

if TYPE_CHECKING:
    from concurrent.futures import Future
    from chatlm.common.hub.stamps import Stamp
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.ranks import RankZero


class AdapterSlots(EnginePart):
    """Each adapter has a slot number, by which batches name it. It is the same in all ranks, and never used
    again."""

    GONE = "the adapter's files have changed or been removed during this answer: send the request again"

    def __init__(self, transformer: Transformer, ranks: RankZero | None):
        self.transformer = transformer
        self.ranks = ranks
        self.slots: dict[str, int] = {}      # by id
        self.digests: dict[int, str] = {}    # of their files, by slot
        self.sizes: dict[int, int] = {}      # bytes, by slot
        self.reading: dict[str, tuple[int, Future[tuple[int, str]]]] = {}  # by id, with their slots
        self.thread = reading_thread()
        self.last = 0

    def gauges(self) -> dict[str, float]:
        return {"adapter_bytes": sum(self.sizes.values())}

    def comes(self, sequence: Sequence) -> str:
        """Set the slot of its adapter."""
        adapter_id = sequence.work.params.adapter
        if not adapter_id:
            return ""
        sequence.adapter = self.slots.get(adapter_id, 0)
        sequence.adapter_digest = self.digests.get(sequence.adapter, "")
        return "" if sequence.adapter else self.GONE

    def load(self, adapter_id: str, folder: Path) -> tuple[int, str]:
        """`begin`, then `end`."""
        self.begin(adapter_id, folder)
        return self.end(adapter_id)

    def begin(self, adapter_id: str, folder: Path, stamp: Stamp = (), digest: str = ""):
        """Start to read an adapter, in all ranks, while steps continue. Its files must match the stamp and
        the digest, if given: unfinished answers depend on them."""
        self.last += 1
        if self.ranks:
            self.ranks.tell_adapter(self.last, str(folder), stamp)
        self.reading[adapter_id] = self.last, self.thread.submit(self._read, self.last, folder, stamp, digest)

    def _read(self, slot: int, folder: Path, stamp: Stamp, digest: str) -> tuple[int, str]:
        stamp = stamp or adapter_stamp(folder)
        actual = adapter_digest(folder)
        if digest not in ("", actual):
            raise Changed(folder)
        nbytes = self.transformer.load_adapter(slot, folder, stamp)
        return nbytes, actual

    def has_ended(self, adapter_id: str) -> bool:
        return self.reading[adapter_id][1].done()

    def end(self, adapter_id: str) -> tuple[int, str]:
        """Wait until an adapter is read, then accept answers with it; returns its bytes and the digest of its
        files. ConfigError if it cannot be served."""
        slot, future = self.reading.pop(adapter_id)
        try:
            nbytes, digest = future.result()
        except BaseException:
            self._forget(slot)
            raise
        self.slots[adapter_id] = slot
        self.digests[slot] = digest
        self.sizes[slot] = nbytes
        return nbytes, digest

    def drop(self, adapter_id: str) -> int:
        """Forget an adapter; returns the slot it had, or 0."""
        if slot := self.slots.pop(adapter_id, 0):
            del self.digests[slot], self.sizes[slot]
            self._forget(slot)
        return slot

    def _forget(self, slot: int):
        self.transformer.adapters.pop(slot, None)
        if self.ranks:
            self.ranks.tell_adapter(slot, "")


def adapter_digest(folder: Path) -> str:
    """A hash of an adapter's files. ConfigError if they cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    config, weights = ADAPTER_FILES
    digest.update(read_small(folder / config, MOST_OBJECT))
    with opened(folder / weights) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
