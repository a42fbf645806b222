"""Models below a folder, which may appear, change and disappear while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterator, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapters import AdapterFiles, adapters_below, base_of, is_other_base
from chatlm.common.hub.folder import find_models, named_models
from chatlm.common.log import log
from chatlm.front.pool.names import accepted_names, is_among
from chatlm.front.pool.residency import shown_bytes
from chatlm.front.pool.sightings import Sightings

if TYPE_CHECKING:
    from chatlm.common.config import ModelChoice
    from chatlm.common.hub.folder import Files
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import Model
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Place


class FolderWatch:
    """Serves the models that --models contains now.

    Files that are still being written are left alone. If the files of a model in memory change, they are read
    again once it has left memory. Until they stop changing, its requests get 503 with Retry-After."""

    WATCH_S = 3.0  # between two scans

    def __init__(self, many: ManyModels):
        self.many = many
        self.registry = many.registry
        self.folder = Path(many.settings.models or "").expanduser()
        self.sightings = Sightings(lambda: find_models(self.folder, self._going_on),
                                   lambda: [model.stamp for model in self._mine.values()], self.WATCH_S)

    def _going_on(self):
        if self.many.closing:  # ends the thread, which the server would otherwise wait for
            raise InterruptedError

    async def begin(self):
        """Find the models at the start; the caller opens them."""
        await self.sightings.look()
        found = [*self.sightings.there.values()]
        for files, choice in zip(found, named_models(self.folder, found, taken=self._taken())):
            if model := await self._resolve(choice, files):
                self.registry.add(model)

    async def run(self):
        await self.sightings.run(self.update)

    @property
    def _mine(self) -> dict[Path, Model]:
        """The models found below the folder."""
        return {Path(model.choice.path): model for model in self.registry.models if model.stamp}

    async def update(self, settled: Seq[Files]):
        there = self.sightings.there
        leaving = [self._let_go(model, path in there) for path, model in self._mine.items()
                   if (path not in there or there[path].stamp != model.stamp) and not in_memory(model)]
        self.name_models()  # before the first await: a name may move from one model to another
        for pool, place in leaving:
            if pool:
                await self.many.remove(pool, place)
        known = self._mine
        for files, choice in self._named(settled):
            old = known.get(files.path)
            if files in settled and not (old and in_memory(old)):
                await self._open(choice, files, old)
        self.name_models()
        await self.many.opener.survey.close()
        await self.share_adapters()

    def is_coming(self, name: str) -> bool:
        """Is it a name of a model whose files are there but still change, so that it is not served yet?"""
        mine = self._mine
        new = [files for files in self.sightings.there.values() if files.path not in mine]
        return bool(new) and any(
            is_among(name, accepted_names((choice.name, *choice.aliases), choice.path))
            for files, choice in self._named(new) if files.path not in mine)

    def _let_go(self, model: Model, there: bool) -> tuple[WorkerPool | None, Place | None]:
        """Forget what was read of a model whose files changed or, if not `there`, were removed. Returns the
        pool and the place that it had."""
        if not there:
            log.info("the model %s was removed", model.name)
            self.registry.models.remove(model)
        elif model.pool or model.reason:
            log.info("the files of the model %s have changed", model.name)
        pool = model.pool
        place = model.place
        model.pool = None
        model.place = None
        model.source = None
        model.reason = ""
        return pool, place

    async def _open(self, choice: ModelChoice, files: Files, old: Model | None):
        """Serve a new model, or the new version of an old one."""
        if model := await self._resolve(choice, files):
            await self.many.opener.open(model)
            log.info("%s %s (%s)", "read again:" if old else "new model:", model.name,
                     model.reason or shown_bytes(model.bytes))
            at = self.registry.models.index(old) if old else len(self.registry.models)
            self.registry.models[at:at + bool(old)] = [model]
            self.many.serve(model)

    async def _resolve(self, choice: ModelChoice, files: Files) -> Model | None:
        """None if it was removed meanwhile."""
        try:
            model = await self.many.opener.resolve(choice)
        except ConfigError:
            return None
        model.stamp = files.stamp
        return model

    def _taken(self, there: Container[Path] = ()) -> set[str]:
        """Names of models that are not, or no longer, below the folder."""
        others = [model for model in self.registry.models
                  if not model.stamp or Path(model.choice.path) not in there]
        return {name for model in others for name in (model.name, *model.choice.aliases)}

    def name_models(self):
        """Name the models after their current files: `latest` goes to the newest step that can be served."""
        there = self.sightings.there
        mine = self._mine
        for path in mine.keys() - there.keys():  # dropped once it is no longer in memory
            mine[path].rename(mine[path].name, ())
        for files, choice in self._named():
            mine[files.path].rename(choice.name, choice.aliases)

    def _named(self, new: Seq[Files] = ()) -> Iterator[tuple[Files, ModelChoice]]:
        """What is served, and these new files, with the names that they should have."""
        there = self.sightings.there
        mine = self._mine
        shown = [files for files in there.values() if files.path in mine or files in new]
        unable = {str(files.path) for files in shown if files.path not in mine or not mine[files.path].pool}
        return zip(shown, named_models(self.folder, shown, unable, self._taken(there)))

    async def share_adapters(self):
        """Give each adapter below the folder to the model it was made for. An adapter whose base cannot be
        determined now stays where it is."""
        models = [*self.registry.models]
        found = await asyncio.to_thread(lambda: [
            (files, made_for(files.path, models)) for files in adapters_below(self.folder)])
        self.sightings.note("adapters", {
            files.path: f"the adapter {files.name} is not served: its base_model_name_or_path matches "
                        f"{'several' if bases else 'none'} of the models"
            for files, bases in found if files.stamp and len(bases) != 1})
        for model in models:
            if model.pool and not model.pool.adapters.folders:  # it watches those itself
                watch = model.pool.adapters.watch
                await watch.update(watch.sightings.compare(
                    files if bases == [model] else AdapterFiles(files.path)
                    for files, bases in found if bases == [model] or len(bases) != 1))


def in_memory(model: Model) -> bool:
    """Is it in memory, or does a request wait for it?"""
    return bool(model.pool and model.place and (model.place.taken or model.pool.dispatcher.jobs))


def made_for(folder: Path, models: Seq[Model]) -> list[Model]:
    """The models that match the base in an adapter's config."""
    base = base_of(folder)
    return [model for model in models if base and model.source and not is_other_base(
        base, [*model.names, model.source.name, str(model.source.path)])]
