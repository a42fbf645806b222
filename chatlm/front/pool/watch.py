"""A training run as models: each checkpoint that is complete can be asked, `latest` is the last of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import ModelChoice
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure
from chatlm.common.hub.adapters import CONFIG, base_of
from chatlm.common.hub.steps import find_steps
from chatlm.common.log import log
from chatlm.front.pool.models import Served
from chatlm.front.pool.score import read_scored, score_text
from chatlm.front.pool.sightings import Sightings

if TYPE_CHECKING:
    from chatlm.common.hub.steps import Step
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import Model
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.residency import Residency


IN_USE_S = 60.0  # a model that was asked so recently is followed by one that is loaded already


class Postponed(ChatServerError):
    """A checkpoint is scored later."""


class RunWatch:
    """Serves the checkpoints below --watch while they are written.

    A checkpoint is a model of its own, `TAG@STEP`, with workers of its own. So nothing is ever swapped under
    an answer: `TAG@latest` is a name that goes from one model to the next. While the old one answers, the new
    one is loaded first, if memory holds both; else requests wait for it. The old one leaves memory when its
    answers have ended and nobody has asked for it for a while.

    A model belongs to its files as they were seen complete: their stamp. Workers refuse other files, so what
    is overwritten becomes a new model, and the old one ends with its answers."""

    WATCH_S = 2.0    # between two looks
    AT_ONCE = 8      # checkpoints opened between two looks, the last ones first
    LEAVE_S = 30.0   # a step before the last leaves memory when nobody has asked for it so long
    SURVEY_S = 20.0  # the process that reads headers lives so long after the last checkpoint

    def __init__(self, many: ManyModels):
        self.many, self.registry = many, many.registry
        self.folder = Path(many.settings.watch or "").expanduser().absolute()
        self.models: dict[Step, Model] = {}  # those served
        self.sightings = Sightings(  # a folder that has no file of a checkpoint yet is nothing
            lambda: [step for step in find_steps(self.folder) if step.stamp or not step.missing],
            lambda: [step.stamp for step in self.models], self.WATCH_S)
        self.tags: dict[Path, str] = {}      # of each run
        self.last: dict[Path, Model] = {}    # of each run: the model that is called `latest`
        self.opened_s = 0.0                  # when a checkpoint was last opened
        self.scores = StepScores(many, self.models)

    async def begin(self):
        """Open the last step of each run; the others follow while requests are served."""
        last = {step.run: step for step in await self.sightings.look()}
        await self._open([*last.values()])
        if not self.models:
            log.info("--watch %s: there is no complete checkpoint yet", self.folder)

    async def run(self):
        await self.sightings.run(self.update, self._pause)

    async def _pause(self, seconds: float):
        next_s = time.monotonic() + seconds
        while (left_s := next_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.1) if self.follow() else left_s)

    async def update(self, settled: Seq[Step]):
        """Serve what has become complete, and stop to serve what is not the same any more."""
        for step in [*self.models]:
            now = self.sightings.there.get(step.path)
            if not now or now.stamp != step.stamp:
                self._dismiss(step, "was replaced" if now and not now.missing else "has gone")
        await self._open(settled[::-1][:self.AT_ONCE])
        if time.monotonic() - self.opened_s > self.SURVEY_S:
            await self.many.opener.survey.close()

    async def _open(self, steps: Iterable[Step]):
        for step in self.sightings.there.values():  # names do not depend on what is complete first
            self._tag_of(step.run)
        for step in steps:
            name = f"{self._tag_of(step.run)}@{step.step}"
            if step.missing:
                self._refuse(step, f"the checkpoint {step.path.name} of {name} is not complete: "
                                   f"{step.missing} is missing")
                continue
            await self._open_one(step, name)
            self.opened_s = time.monotonic()
            self.follow()

    async def _open_one(self, step: Step, name: str):
        path, merged = str(step.path), {}
        if step.adapts:  # a model of its own too: its base with the adapter merged
            path, merged = base_of(step.path), {"lora": (str(step.path),)}
        name = self.registry.renamed(ModelChoice(str(step.path), name)).name
        choice = ModelChoice(path, name, changes={
            "source": None, "model_tag": None, "step": None, **merged})
        try:
            if not path:
                raise ConfigError(f"it is an adapter, and its {CONFIG} names no base_model_name_or_path")
            model = await asyncio.to_thread(self.many.opener.resolve, choice, lambda *progress: None)
            await self.many.opener.open(model)
        except ConfigError as error:  # it has gone
            return self._refuse(step, f"the checkpoint {name} is not served: {error}")
        if model.pool is None:
            return self._refuse(step, f"the checkpoint {name} is not served: {model.reason}")
        model.run, model.step = self._tag_of(step.run), step.step
        self.registry.add(model)
        self.registry.models.sort(key=lambda model: (model.run, model.step))  # "": those of no run stay first
        self.models[step] = model
        self.many.serve(model)
        log.info("the checkpoint %s is available", model.name)

    def _refuse(self, step: Step, reason: str):
        self.sightings.refuse(step.stamp)
        log.warning("%s", reason)

    def _tag_of(self, run: Path) -> str:
        """A run has the name of its folder; if another run has that name already, its path."""
        if run not in self.tags:
            inside = run.is_relative_to(self.folder) and run != self.folder
            path = str(run.relative_to(self.folder)) if inside else run.name
            self.tags[run] = path if run.name in self.tags.values() else run.name
        return self.tags[run]

    def _latest(self, run: Path) -> str:
        return f"{self._tag_of(run)}@latest"

    @staticmethod
    def _give_names(model: Model, names: tuple[str, ...], is_default: bool = False):
        model.choice = replace(model.choice, aliases=names, default=is_default)

    def _dismiss(self, step: Step, why: str):
        """Take no more requests for a checkpoint; those it has may end."""
        model = self.models.pop(step)
        log.info("the checkpoint %s %s", model.name, why)
        self.registry.models.remove(model)
        if self.last.get(step.run) is model:
            del self.last[step.run]
        if model.pool:
            self.many.leaving.append(model.pool)
            self.many.run(f"ending {model.name}", partial(self._end, model, model.pool))

    async def _end(self, model: Model, pool: WorkerPool):
        """Close the pool of a model that no request can find any more, once its answers have ended."""
        await asyncio.sleep(self.WATCH_S)  # those who have found it just now are still being read
        while jobs := [*pool.dispatcher.jobs.values()]:
            if not pool.supervisor.ready_workers:  # nor can any come: its files are others now
                pool.dispatcher.fail(EngineFailure(
                    f"the checkpoint {model.name!r} has changed or gone before it was loaded"), *jobs)
            await asyncio.sleep(0.1)
        self.many.leaving.remove(pool)
        if model.pool:
            await self.many.remove(pool, model.place)

    def follow(self) -> bool:
        """Have `latest` of each run be its last step. Returns whether one of them is still loading."""
        coming = False
        for run in {step.run for step in self.models}:
            able = {step.step: model for step, model in self.models.items() if step.run == run and model.pool}
            if not able:
                continue
            newest, holder = able[max(able)], self.last.get(run)
            if newest is holder:
                continue
            if holder and in_use(holder, self.many.residency) and not (newest.place and newest.place.loaded):
                coming = True
                if newest.state == "unloaded":
                    self.many.load(newest)
                continue
            if holder:
                self._give_names(holder, ())
                if holder.place:
                    holder.place.idle_s = holder.place.idle_s or self.LEAVE_S
                if holder.pool and newest.pool:  # who talked to it talks to the new one
                    newest.pool.dispatcher.asked_s = holder.pool.dispatcher.asked_s
            self.last[run] = newest
            self._give_names(newest, (self._latest(run),))
            log.info("%s is %s now", self._latest(run), newest.name)
            self._mark_default()
        return coming

    def _mark_default(self):
        """Without another model, requests that name none are for the run that was written last."""
        if any(model not in self.models.values() for model in self.registry.models):
            return
        by_time = sorted(self.last, key=lambda run: max(
            step.changed_s for step in self.models if step.run == run))
        for run in by_time:
            self._give_names(self.last[run], (self._latest(run),), is_default=run == by_time[-1])


class StepScores:
    """Scores one checkpoint after another by --watch-text, the last ones first, in rows and memory that
    nobody else wants."""

    WINDOWS = 2  # computed at a time

    def __init__(self, many: ManyModels, models: Mapping[Step, Model]):
        path = many.settings.watch_text
        self.text = None if path is None else read_scored(path, "--watch-text")
        self.many, self.models = many, models
        self.unscorable: set[Step] = set()

    async def run(self):
        while self.text is not None:
            unscored = [step for step, model in self.models.items() if model.pool and not model.score
                        and step not in self.unscorable and self._may_load(model)]
            if step := max(unscored, key=lambda step: step.changed_s, default=None):
                await self._score(self.models[step], step, self.text)
            else:
                await asyncio.sleep(0.5)

    async def _score(self, model: Model, step: Step, text: str):
        def check_room():
            if not self._may_load(model):
                raise Postponed("others need the memory")

        pool, was_loaded = Served(model).pool, model.state == "ready"
        try:
            model.score = await score_text(pool, text, yields=check_room, windows=self.WINDOWS)
            log.info("the checkpoint %s: %.4f bits per byte", model.name, model.score.bits_per_byte)
        except Postponed:
            return
        except ChatServerError as error:
            self.unscorable.add(step)
            log.warning("the checkpoint %s is not scored: %s", model.name, error)
        if not (was_loaded or pool.dispatcher.jobs or asked_lately(pool)):
            self.many.unload(model)

    def _may_load(self, model: Model) -> bool:
        """Is it loaded, or is there memory for it that no model has and none waits for?"""
        place, residency = model.place, self.many.residency
        return place is not None and (
            place.serves or place.missing <= residency.budget - residency.used
            and not any(other.waits for other in residency.places if other is not place))


def in_use(model: Model, residency: Residency) -> bool:
    """Is it in memory, has it been asked lately, and does memory hold another beside it?"""
    place, pool = model.place, model.pool
    if not (pool and place and place.taken and asked_lately(pool)):
        return False
    return 2 * place.size <= residency.room_beside_pinned(place)


def asked_lately(pool: WorkerPool) -> bool:
    """Does somebody talk to it, other than with low priority?"""
    return pool.dispatcher.busy or time.monotonic() - pool.dispatcher.asked_s < IN_USE_S
