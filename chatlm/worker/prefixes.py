"""Has the prefixes that a worker computes outlive it, and restores those of earlier workers."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.config import store_place
from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.segments import MOST_GROUPS
from chatlm.worker.engine.keeper import PageKeeper
from chatlm.worker.engine.kept_pages import KeptPages
from chatlm.worker.weights.loaded.digest import (
    arithmetic_of, files_of, fingerprint_of, profile_of, whole_digest)

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.worker.engine.engine import Engine


class PrefixPlan:
    """Which files the prefixes of a worker belong to. Their fingerprint is taken before they are read, so
    that no prefix is ever taken for one of files that came later."""

    PATIENCE_S = 2.0  # how long a start waits for the weights to be identified

    def __init__(self, config: WorkerConfig):
        self.config = config
        self.files: list[Path] = []
        self.fingerprint = ""  # "": no prefixes are kept
        if config.prefix_memory and config.source:
            with suppress(OSError, ConfigError):  # loading will report what is wrong
                self.files = files_of(config.source, config.settings)
                self.fingerprint = fingerprint_of(self.files)

    def keep(self, engine: Engine):
        """Have the engine's pages outlive this process, and restore those of earlier processes."""
        if not self.fingerprint:
            return
        settings = self.config.settings
        if engine.page_groups > MOST_GROUPS:
            log.warning("prefixes are not kept: the layers of this model are in %d groups, and at most "
                        "%d can be kept", engine.page_groups, MOST_GROUPS)
            return
        store = store_place(settings.prefix_store)[0] if settings.prefix_store else None
        name = self.config.source.name if self.config.source else ""
        try:
            kept = KeptPages(self.config.prefix_memory, self.config.prefix_bytes, store, name)
        except OSError as error:
            log.warning("prefixes are not kept: %s", error)
            return

        def profile() -> bytes:
            digest = whole_digest(self.files, self.fingerprint, store)
            return profile_of(digest, arithmetic_of(engine.transformer, settings))

        keeper = PageKeeper(engine.pool, engine.transformer, kept, engine.times)
        engine.keep(keeper)
        keeper.begin(profile, self.PATIENCE_S)
