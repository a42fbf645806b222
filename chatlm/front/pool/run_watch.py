"""Serves a training run: each complete checkpoint is a model, and `latest` is the newest one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TYPE_CHECKING

from chatlm.common.config import ModelEntry
from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapter_folders import CONFIG, base_of
from chatlm.common.hub.nanochat_checkpoints import checkpoint_flags
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.common.hub.val_bpb import evaluation_of
from chatlm.common.hub.recorded_metrics import Logs, written_beside
from chatlm.common.log import log
from chatlm.front.pool.names import accepted_names, is_among
from chatlm.front.pool.residency import NoRoom, Residency
from chatlm.front.pool.run_names import RunNames
from chatlm.front.pool.folder_scanner import FolderScanner

if TYPE_CHECKING:
    from chatlm.common.hub.run_checkpoints import CheckpointFiles
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.run_names import RunName


class CheckpointWork(Protocol):
    """What a server does for each checkpoint while no request needs it (`CheckpointEvaluator`)."""

    async def begin(self):
        """Awaited before the first checkpoint is opened."""

    async def opened(self, checkpoint: CheckpointFiles, model: ServedModel):
        """A checkpoint is served."""

    async def note_written(self, model: ServedModel):
        """What its training has written about a checkpoint has changed."""

    async def removed(self, watched: Path, runs: Mapping[str, RunName],
                      there: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
        """The steps of runs below a folder whose files are gone. runs: the runs that are or were there, by
        folder. there: (folder, number) of the steps whose files are there."""
        ...

    async def run(self):
        """Work for one checkpoint after another."""


class RunWatch:
    """Serves the checkpoints below --watch while they are written.

    Each checkpoint is a model of its own, `RUN@STEP`, with its own workers. So weights never change during an
    answer. `RUN@latest` is a name that moves from one model to the next. While the old model is in use, the
    new one is loaded first, if memory holds both; otherwise requests wait for it. The old one leaves memory
    once its answers have ended and it has had no request for a while.

    A model belongs to one complete revision of its files, which a stamp identifies. Workers refuse other
    revisions. So an overwritten checkpoint becomes a new model, and the old one ends with its answers."""

    WATCH_S = 2.0    # between two scans
    AT_ONCE = 8      # this many checkpoints are opened between two scans, the newest first
    LEAVE_S = 30.0   # a step that is not the latest leaves memory this long after its last request
    SURVEY_S = 20.0  # the process that reads headers ends this long after the last checkpoint

    def __init__(self, many: ManyModels,
                 make_evaluator: Callable[[ManyModels, Mapping[CheckpointFiles, ServedModel]],
                                          CheckpointWork]):
        self.many = many
        self.registry = many.registry
        self.folder = Path(many.settings.watch or "").expanduser().absolute()
        self.models: dict[CheckpointFiles, ServedModel] = {}  # being served
        self.left_out: list[CheckpointFiles] = []       # what -g and -i leave out
        self.scanner = FolderScanner(
            self._find, lambda: [checkpoint.stamp for checkpoint in self.models], self.WATCH_S)
        self.names = RunNames(self.folder)
        self.last: dict[Path, ServedModel] = {}    # by run: the model that has the name `latest`
        self.opened_s = 0.0                  # when a checkpoint was last opened
        self.logs = Logs()
        self.work = make_evaluator(many, self.models)

    async def begin(self):
        """Open the last step of each run. The others follow while requests are served."""
        await self.work.begin()
        last = {checkpoint.run: checkpoint for checkpoint in await self.scanner.look()}
        await self._open([*last.values()])
        await self._read_logs()
        if not self.models:
            log.info("--watch %s: no complete checkpoint%s yet", self.folder, self._flags())
        if self.left_out:
            log.info("--watch serves only what fits%s; left out: %s", self._flags().removeprefix(" of"),
                     ", ".join(sorted({run_of(checkpoint) for checkpoint in self.left_out})))

    def _flags(self) -> str:
        flags = checkpoint_flags(self.many.settings)
        return f" of {flags}" if flags else ""

    def _find(self) -> list[CheckpointFiles]:
        """Folders without any file of a checkpoint are ignored."""
        found = [checkpoint for checkpoint in find_steps(self.folder)
                 if checkpoint.stamp or not checkpoint.missing]
        chosen: list[CheckpointFiles] = []
        self.left_out = []
        for checkpoint in found:
            (chosen if checkpoint.is_chosen(self.many.settings) else self.left_out).append(checkpoint)
        return chosen

    async def run(self):
        await self.scanner.run(self.update, self._pause)

    async def _pause(self, seconds: float):
        next_s = time.monotonic() + seconds
        while (left_s := next_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.1) if self.follow() else left_s)

    async def update(self, settled: Seq[CheckpointFiles]):
        """Serve checkpoints that have become complete. Stop serving those that have changed or are gone."""
        await self._read_logs()  # first: nothing may wait between a dismissal and `follow`
        for checkpoint, model in [*self.models.items()]:
            now = self.scanner.there.get(checkpoint.path)
            if not now or now.stamp != checkpoint.stamp:
                self._dismiss(checkpoint, "was replaced" if now and not now.missing else "was removed")
            elif model.is_read:  # a worker found other files, which have been put back since
                self._dismiss(checkpoint, "is read again")
        await self._open(settled[::-1][:self.AT_ONCE])
        if time.monotonic() - self.opened_s > self.SURVEY_S:
            await self.many.opener.survey.close()

    def is_coming(self, name: str) -> bool:
        """Is it the name of a checkpoint that is not served yet, because its files are being written,
        replaced or read? The same holds for `latest` of a run that only has such checkpoints."""
        for checkpoint in self.scanner.there.values():
            if checkpoint in self.models or self.scanner.is_final(checkpoint):
                continue
            of_run = self.names.of(checkpoint.run)
            latest = () if checkpoint.run in self.last else (of_run.latest,)
            names = of_run.checkpoint_name(checkpoint.step), *of_run.older_steps(checkpoint.step), *latest
            if is_among(name, accepted_names(names, str(checkpoint.path))):
                return True
        return False

    async def removed_steps(self) -> list[dict[str, Any]]:
        """The steps whose files are gone, as GET /v1/runs/ID lists them."""
        folders = {run: os.path.realpath(run) for run in self.names.known}
        runs = {folders[run]: name for run, name in self.names.known.items()}
        there = {(folders.get(checkpoint.run, ""), checkpoint.step)
                 for checkpoint in self.scanner.there.values()}
        there |= {(os.path.realpath(checkpoint.run), checkpoint.step) for checkpoint in self.left_out}
        return await self.work.removed(Path(os.path.realpath(self.folder)), runs, there)

    async def _open(self, checkpoints: Iterable[CheckpointFiles]):
        self.names.learn(self.scanner.there.values())  # whichever of them is complete first
        for checkpoint in checkpoints:
            name = self.names.of(checkpoint.run).checkpoint_name(checkpoint.step)
            if checkpoint.missing:
                self._refuse(checkpoint, f"the checkpoint {checkpoint.path.name} of {name} is not complete: "
                                   f"{checkpoint.missing} is missing")
                continue
            await self._open_one(checkpoint, name)
            self.opened_s = time.monotonic()
            self.follow()

    async def _open_one(self, checkpoint: CheckpointFiles, name: str):
        path = str(checkpoint.path)
        merged = {}
        if checkpoint.adapts:  # served as its base with the adapter merged
            path = await asyncio.to_thread(base_of, checkpoint.path)
            merged = {"lora": (str(checkpoint.path),)}
        name = self.registry.renamed(ModelEntry(str(checkpoint.path), name)).name
        entry = ModelEntry(path, name, changes={
            "source": None, "model_tag": None, "step": None, **merged})
        try:
            if not path:
                raise ConfigError(f"it is an adapter whose {CONFIG} has no base_model_name_or_path")
            written, evaluation = await asyncio.to_thread(
                lambda: (written_beside(checkpoint.path), evaluation_of(checkpoint.path)))
            model = await self.many.opener.resolve(entry)
            failure = await self.many.opener.open(model)
        except ConfigError as error:  # it was removed
            return self._refuse(checkpoint, f"the checkpoint {name} is not served: {error}")
        if model.pool is None:
            return self._refuse(checkpoint, f"the checkpoint {name} is not served: {model.reason}",
                                is_whole=isinstance(failure, NoRoom))
        model.run = self.names.of(checkpoint.run)
        model.step = checkpoint.step
        model.written, model.stale = written
        model.saved_s, model.evaluation = checkpoint.changed_s, evaluation
        self.registry.add(model)
        self.registry.models.sort(key=order)
        self.models[checkpoint] = model
        self.many.serve(model)
        log.info("the checkpoint %s is available", model.name)
        await self.work.opened(checkpoint, model)

    async def _read_logs(self):
        """Add the metrics in the logs of stages. A step's line may be written after its checkpoint. Metrics
        stay if their log is removed."""
        paths = {checkpoint.run: checkpoint.path for checkpoint in self.models if checkpoint.place}
        metrics = await asyncio.to_thread(
            lambda: {run: self.logs.metrics_of(path) for run, path in paths.items()})
        for checkpoint, model in [*self.models.items()]:
            logged = model.logged | metrics.get(checkpoint.run, {}).get(checkpoint.step, {})
            if logged != model.logged:
                model.logged = logged
                await self.work.note_written(model)

    def _refuse(self, checkpoint: CheckpointFiles, reason: str, is_whole: bool = False):
        self.scanner.refuse(checkpoint.stamp, is_whole=is_whole)
        log.warning("%s", reason)

    def _give_latest(self):
        """Give the last step of each run its names. If only runs are served, the one that was written last
        answers requests without a model."""
        only_runs = all(model in self.models.values() for model in self.registry.models)
        changed_s = {run: max(checkpoint.changed_s for checkpoint in self.models if checkpoint.run == run)
                     for run in self.last}
        default = max(changed_s, key=changed_s.__getitem__) if only_runs and changed_s else None
        for run in self.last:
            self.names.is_furthest(run)
        for run, model in self.last.items():
            name = self.names.of(run)
            names = [name.latest, *[name.latest_of_lineage] * self.names.is_furthest(run)]
            model.entry = replace(model.entry, aliases=tuple(dict.fromkeys(names)), default=run == default)

    def _dismiss(self, checkpoint: CheckpointFiles, why: str):
        """Stop accepting requests for a checkpoint. Those that it has may end."""
        model = self.models.pop(checkpoint)
        log.info("the checkpoint %s %s", model.name, why)
        if self.last.get(checkpoint.run) is model:
            del self.last[checkpoint.run]
            self._give_latest()
        self.many.dismiss(model, self.WATCH_S)

    def follow(self) -> bool:
        """Move each run's `latest` to its newest step. Returns whether such a step is still loading."""
        coming = False
        for run in {checkpoint.run for checkpoint in self.models}:
            able = {checkpoint.step: model for checkpoint, model in self.models.items()
                    if checkpoint.run == run and model.pool}
            if not able:
                continue
            newest = able[max(able)]
            holder = self.last.get(run)
            if newest is holder:
                continue
            if holder and in_use(holder, self.many.residency) and newest.state != "ready":
                coming = True
                if newest.state == "unloaded":
                    newest.load()
                continue
            if holder:
                holder.entry = replace(holder.entry, aliases=(), default=False)
                if share := self.many.residency.share_of(holder.pool):
                    share.idle_s = share.idle_s or self.LEAVE_S
                if holder.pool and newest.pool:
                    newest.pool.dispatcher.use.succeed(holder.pool.dispatcher.use)
            self.last[run] = newest
            self._give_latest()
            for alias in newest.entry.aliases:
                log.info("%s is now %s", alias, newest.name)
        return coming


def run_of(checkpoint: CheckpointFiles) -> str:
    return f"{checkpoint.place.lineage}-{checkpoint.place.stage}" if checkpoint.place else checkpoint.tag


def order(model: ServedModel) -> tuple:
    """A sort key: first the models of no run, then the steps of each run."""
    return model.run.order if model.run else ("", -1, ""), model.step


def in_use(model: ServedModel, residency: Residency) -> bool:
    """Is it in memory and recently used, and is there memory for a second one like it?"""
    share = residency.share_of(model.pool)
    if not (share and share.taken and share.pool.dispatcher.in_use):
        return False
    return 2 * share.size <= residency.room_beside_pinned(share)
