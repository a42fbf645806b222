"""The models below a folder, which come, change and go while others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapters import adapters_below, base_of, is_other_base
from chatlm.common.hub.folder import find_models, named_models
from chatlm.common.log import log
from chatlm.front.pool.residency import shown_bytes

if TYPE_CHECKING:
    from chatlm.common.config import ModelChoice
    from chatlm.common.hub.adapters import AdapterFiles
    from chatlm.common.hub.folder import Files
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import Model
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Place


class Troubles:
    """What is wrong with a folder and in it: each is logged once, and again when it has changed."""

    def __init__(self):
        self.known: Mapping[str, str] = {}

    def note(self, troubles: Mapping[str, str]):
        """troubles: all there are now, each with what it is about."""
        for about, trouble in troubles.items():
            if self.known.get(about) != trouble:
                log.error(trouble)  # whole, as lines of one kind in a second are counted
        self.known = troubles


class FolderWatch:
    """Serves the models below --models as they are there now.

    Files that still grow are left alone, and so is a model that is in memory: when it has left, it is read
    again if its files have changed. Until they stand still its requests are told to come again."""

    WATCH_S = 3.0  # between two looks

    def __init__(self, many: ManyModels):
        self.many, self.registry = many, many.registry
        self.folder = Path(many.settings.models or "").expanduser()
        self.before: dict[str, tuple] = {}  # path -> stamp of its files, at the last look
        self.of_folder, self.of_models, self.of_adapters = Troubles(), Troubles(), Troubles()

    async def look(self) -> list[Files]:
        """What is there now and can be read."""
        found = await asyncio.to_thread(find_models, self.folder, self._going_on)
        self.of_models.note({files.choice.path: f"{files.choice.name} is not served: {files.trouble}"
                             for files in found if files.trouble})
        return [files for files in found if files.stamp]

    def _going_on(self):
        if self.many.closing:  # raised in the thread, for whose end the server would wait
            raise InterruptedError

    async def begin(self) -> list[Files]:
        """Find the models at the start; they are opened with those that are named."""
        found = await self.look()
        for files, choice in zip(found, named_models(self.folder, found, taken=self._taken())):
            if model := await self._resolve(choice, files):
                self.registry.add(model)
        return found

    async def run(self):
        while True:
            await asyncio.sleep(self.WATCH_S)
            try:
                await self.update(await self.look())
                await self.share_adapters()
                self.of_folder.note({})
            except (ConfigError, OSError) as error:  # the folder has gone
                self.of_folder.note({"": str(error)})

    @property
    def _mine(self) -> dict[str, Model]:
        """The models that were found below the folder, by path."""
        return {model.choice.path: model for model in self.registry.models if model.stamp}

    async def update(self, found: Seq[Files]):
        stamps = {files.choice.path: files.stamp for files in found}
        settled = {path for path, stamp in stamps.items() if self.before.get(path) == stamp}
        self.before = stamps
        leaving = [self._let_go(model, path in stamps) for path, model in self._mine.items()
                   if stamps.get(path) != model.stamp and not in_memory(model)]
        self.name_models(found)  # before anything is waited for: a name may go from one model to another
        for pool, place in leaving:
            if pool:
                await self.many.remove(pool, place)
        known = self._mine
        shown = [files for files in found if files.choice.path in known or files.choice.path in settled]
        able = {path for path, model in known.items() if model.pool}
        unable = {files.choice.path for files in shown} - able
        names = named_models(self.folder, shown, unable, self._taken(stamps))
        for files, choice in zip(shown, names):
            old = known.get(choice.path)
            if choice.path in settled and (not old or old.stamp != files.stamp and not in_memory(old)):
                await self._open(choice, files, old)
        self.name_models(found)
        await self.many.opener.survey.close()

    def _let_go(self, model: Model, there: bool) -> tuple[WorkerPool | None, Place | None]:
        """The files of a model that is not in memory have changed or gone. Returns what it had."""
        if not there:
            log.info("the model %s has gone", model.name)
            self.registry.models.remove(model)
        elif model.pool or model.reason:
            log.info("the files of the model %s have changed", model.name)
        pool, place = model.pool, model.place
        model.pool, model.place, model.source, model.reason = None, None, None, ""
        return pool, place

    async def _open(self, choice: ModelChoice, files: Files, old: Model | None):
        """Serve new files, or what they are now."""
        if model := await self._resolve(choice, files):
            await self.many.opener.open(model)
            log.info("%s %s (%s)", "the model was read again:" if old else "a new model:", model.name,
                     model.reason or shown_bytes(model.bytes))
            at = self.registry.models.index(old) if old else len(self.registry.models)
            self.registry.models[at:at + bool(old)] = [model]
            self.many.serve(model)

    async def _resolve(self, choice: ModelChoice, files: Files) -> Model | None:
        """None if it has gone meanwhile."""
        try:
            model = await asyncio.to_thread(self.many.opener.resolve, choice, lambda *progress: None)
        except ConfigError:
            return None
        model.stamp = files.stamp
        return model

    def _taken(self, there: Container[str] = ()) -> set[str]:
        """Names of models that are not below the folder, or not any more."""
        others = [model for model in self.registry.models
                  if not model.stamp or model.choice.path not in there]
        return {name for model in others for name in (model.name, *model.choice.aliases)}

    def name_models(self, found: Seq[Files]):
        """Give the models the names that their files have now: `latest` goes to the last step that can
        answer."""
        stamps, mine = {files.choice.path: files.stamp for files in found}, self._mine
        for path in mine.keys() - stamps.keys():  # it leaves when it is no longer in memory
            mine[path].rename(mine[path].name, ())
        shown = [files for files in found if files.choice.path in mine]
        unable = {path for path, model in mine.items() if not model.pool}
        for choice in named_models(self.folder, shown, unable, self._taken(stamps)):
            mine[choice.path].rename(choice.name, choice.aliases)

    async def share_adapters(self):
        """Give each adapter below the folder to the model that it was made for."""
        found = await asyncio.to_thread(adapters_below, self.folder)
        shared: dict[int, list[AdapterFiles]] = {}
        troubles = {}
        for files in found:
            bases = await asyncio.to_thread(made_for, files.folder, self.registry.models)
            if len(bases) == 1:
                shared.setdefault(id(bases[0]), []).append(files)
            else:
                troubles[str(files.folder)] = (
                    f"the adapter {files.name} is not served: its base_model_name_or_path names "
                    f"{'several' if bases else 'none'} of the models")
        self.of_adapters.note(troubles)
        for model in self.registry.models:
            if model.pool and not model.pool.adapters.folders:  # which it watches itself
                model.pool.adapters.update(shared.get(id(model), ()))


def in_memory(model: Model) -> bool:
    """Is it there, or does a request wait for it?"""
    return bool(model.pool and model.place and (model.place.taken or model.pool.dispatcher.jobs))


def made_for(folder: Path, models: Seq[Model]) -> list[Model]:
    """Those of some models that an adapter's config names."""
    base = base_of(folder)
    return [model for model in models if base and model.source and not is_other_base(
        base, [*model.names, model.source.name, str(model.source.path)])]
