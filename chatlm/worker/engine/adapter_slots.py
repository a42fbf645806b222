"""The adapters that an engine computes answers with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, cannot_read
from chatlm.common.files import check_regular
from chatlm.common.hub.adapters import CONFIG, WEIGHTS
from chatlm.worker.model.transformer import load_adapter

if TYPE_CHECKING:
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.ranks import RankZero


class AdapterSlots:
    """A slot for each adapter, in all ranks: what batches call it. No other adapter ever gets it."""

    def __init__(self, transformer: Transformer, ranks: RankZero | None):
        self.transformer, self.ranks = transformer, ranks
        self.slots: dict[str, int] = {}      # by id
        self.digests: dict[int, str] = {}    # of their files, by slot
        self.last = 0

    def load(self, adapter_id: str, folder: Path) -> tuple[int, str]:
        """Take answers with an adapter from now on; returns its bytes and a digest of its files. ConfigError
        if it cannot be served."""
        digest = adapter_digest(folder)
        nbytes = load_adapter(self.transformer, self.last + 1, folder)
        if adapter_digest(folder) != digest:
            del self.transformer.adapters[self.last + 1]
            raise ConfigError(f"{folder} has changed while it was read")
        self.last = self.slots[adapter_id] = self.last + 1
        self.digests[self.last] = digest
        if self.ranks:
            self.ranks.tell_adapter(self.last, str(folder))
        return nbytes, digest

    def drop(self, adapter_id: str) -> int:
        """Forget an adapter; returns the slot that it had, 0 if it had none."""
        if slot := self.slots.pop(adapter_id, 0):
            del self.transformer.adapters[slot], self.digests[slot]
            if self.ranks:
                self.ranks.tell_adapter(slot, "")
        return slot


def adapter_digest(folder: Path) -> str:
    """A hash of all that an adapter is. ConfigError where its files cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        try:
            check_regular(folder / name)
            with (folder / name).open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise cannot_read(folder / name, error) from None
    return digest.hexdigest()
