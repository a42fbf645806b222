"""Serves the models below a folder, which may appear, change and disappear while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterator, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapter_folders import AdapterFiles, adapters_below, base_of, is_other_base
from chatlm.common.hub.better import MEMORY_RATE
from chatlm.common.hub.folder import find_models, named_models
from chatlm.common.log import log
from chatlm.common.sizes import shown_bytes
from chatlm.front.pool.folder_scanner import FolderScanner
from chatlm.front.pool.names import accepted_names, is_among
from chatlm.front.pool.preferred import by_preference

if TYPE_CHECKING:
    from chatlm.common.config import ModelEntry
    from chatlm.common.hub.folder import ModelFiles
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.pool import WorkerPool


class FolderWatch:
    """Keeps a server's models up to date with the folder of --models.

    Files that are still being written are left alone. If the files of a model in memory change, they are read
    again once the model has left memory. Until they stop changing, its requests get 503 with Retry-After."""

    WATCH_S = 3.0  # between two scans

    def __init__(self, many: ManyModels):
        self.many = many
        self.registry = many.registry
        self.folder = Path(many.settings.models or "").expanduser()
        self.scanner = FolderScanner(lambda: find_models(self.folder, self._stop_if_closing),
                                     lambda: [model.stamp for model in self._mine.values()], self.WATCH_S)

    def _stop_if_closing(self):
        if self.many.closing:
            raise InterruptedError  # ends the thread, which the server would otherwise wait for

    async def begin(self):
        """Find the models at the start. The caller opens them."""
        await self.scanner.look()
        there = [*self.scanner.there.values()]
        for files, entry in zip(there, named_models(self.folder, there, taken=self._other_names())):
            model = await self._resolve(entry, files)
            if model:
                self.registry.add(model)

    async def prefer(self):
        """Sort the models, so that the best to chat with answers requests that name none. What is added
        later comes after them: no request is answered by another model because of it."""
        await asyncio.to_thread(MEMORY_RATE.measure)
        models = self.registry.models
        mine = sorted((model for model in models if model.stamp), key=by_preference(MEMORY_RATE))
        models[:] = [*(model for model in models if not model.stamp), *mine]

    async def run(self):
        await self.scanner.run(self.update)

    @property
    def _mine(self) -> dict[Path, ServedModel]:
        """Path -> model, for the models that were found below the folder."""
        return {Path(model.entry.path): model for model in self.registry.models if model.stamp}

    async def update(self, settled: Seq[ModelFiles]):
        """Drop models whose files have changed or are gone, and serve what has become complete."""
        there = self.scanner.there
        leaving = []
        for path, model in self._mine.items():
            is_changed = path not in there or there[path].stamp != model.stamp
            if is_changed and not self._in_memory(model):
                leaving.append(self._let_go(model, path in there))
        self.name_models()  # before the first await: a name may move from one model to another
        for pool in leaving:
            if pool:
                await self.many.remove(pool)
        known = self._mine
        for files, entry in self._named(settled):
            old = known.get(files.path)
            if files in settled and not (old and self._in_memory(old)):
                await self._open(entry, files, old)
        self.name_models()
        await self.many.opener.survey.close()
        await self.share_adapters()

    def is_coming(self, name: str) -> bool:
        """Is it a name of a model that is not served yet, because its files are still changing?"""
        mine = self._mine
        new = [files for files in self.scanner.there.values() if files.path not in mine]
        if not new:
            return False
        entries = [entry for files, entry in self._named(new) if files.path not in mine]
        return any(is_among(name, accepted_names((entry.name, *entry.aliases), entry.path))
                   for entry in entries)

    def _in_memory(self, model: ServedModel) -> bool:
        """Is it in memory, or does a request wait for it?"""
        share = self.many.residency.share_of(model.pool)
        return share is not None and (share.taken or share.pool.dispatcher.is_needed)

    def _let_go(self, model: ServedModel, there: bool) -> WorkerPool | None:
        """Forget what was read of a model, whose files have changed or, if not `there`, were removed. Returns
        the pool that it had."""
        if not there:
            log.info("the model %s was removed", model.name)
            self.registry.models.remove(model)
        elif model.pool or model.reason:
            log.info("the files of the model %s have changed", model.name)
        pool = model.pool
        model.pool = None
        model.source = None
        model.reason = ""
        return pool

    async def _open(self, entry: ModelEntry, files: ModelFiles, old: ServedModel | None):
        """Serve a new model, or the new revision of an old one."""
        model = await self._resolve(entry, files)
        if model is None:
            return
        await self.many.opener.open(model)
        log.info("%s %s (%s)", "read again:" if old else "new model:", model.name,
                 model.reason or shown_bytes(model.bytes))
        models = self.registry.models
        if old:
            models[models.index(old)] = model
        else:
            models.append(model)
        self.many.serve(model)

    async def _resolve(self, entry: ModelEntry, files: ModelFiles) -> ServedModel | None:
        """Find a model's files; None if they were removed meanwhile."""
        try:
            model = await self.many.opener.resolve(entry)
        except ConfigError:
            return None
        model.stamp = files.stamp
        return model

    def _other_names(self, there: Container[Path] = ()) -> set[str]:
        """The names of models that are not below the folder, or no longer."""
        others = [model for model in self.registry.models
                  if not model.stamp or Path(model.entry.path) not in there]
        return {name for model in others for name in (model.name, *model.entry.aliases)}

    def name_models(self):
        """Name the models after their current files. `latest` goes to the newest step that can be served."""
        there = self.scanner.there
        mine = self._mine
        for path in mine.keys() - there.keys():  # dropped once it is no longer in memory
            mine[path].rename(mine[path].name, ())
        for files, entry in self._named():
            mine[files.path].rename(entry.name, entry.aliases)

    def _named(self, new: Seq[ModelFiles] = ()) -> Iterator[tuple[ModelFiles, ModelEntry]]:
        """The files that are served, and these new ones, with the names that they should have."""
        there = self.scanner.there
        mine = self._mine
        shown = [files for files in there.values() if files.path in mine or files in new]
        unable = {str(files.path) for files in shown if files.path not in mine or not mine[files.path].pool}
        return zip(shown, named_models(self.folder, shown, unable, self._other_names(there)))

    async def share_adapters(self):
        """Give each adapter below the folder to the model that it was made for. An adapter whose base is
        unclear now stays where it is."""
        models = [*self.registry.models]
        adapters = await asyncio.to_thread(lambda: [
            (files, matching_bases(files.path, models)) for files in adapters_below(self.folder)])
        unclear = [(files, bases) for files, bases in adapters if len(bases) != 1]
        self.scanner.note("adapters", {
            files.path: f"the adapter {files.name} is not served: its base_model_name_or_path matches "
                        f"{'several' if bases else 'none'} of the models"
            for files, bases in unclear if files.stamp})
        for model in models:
            if not model.pool or model.pool.adapters.folders:  # such a pool watches its folders itself
                continue
            own = [files for files, bases in adapters if bases == [model]]
            own += [AdapterFiles(files.path) for files, _ in unclear]  # these stay as they are
            watch = model.pool.adapters.watch
            await watch.update(watch.scanner.compare(own))


def matching_bases(folder: Path, models: Seq[ServedModel]) -> list[ServedModel]:
    """The models that match the base in an adapter's config."""
    base = base_of(folder)
    return [model for model in models if base and model.source and not is_other_base(
        base, [*model.names, model.source.name, str(model.source.path)])]
