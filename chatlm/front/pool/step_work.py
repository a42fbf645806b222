"""What a server does for each checkpoint of --watch while nobody needs it: scores, prompts, suites."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence as Seq
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import counted_path
from chatlm.common.errors import ChatServerError, ConfigError
from chatlm.common.files import read_text_of
from chatlm.common.log import log
from chatlm.front.evals.bundle import read_suite
from chatlm.front.evals.chat import chat_suite
from chatlm.front.evals.flips import Verdicts
from chatlm.front.evals.kept import Kept, file_word, kept_name, note, noted, results_folder
from chatlm.front.evals.run import as_json, drawn_items, mean_of, run_task
from chatlm.front.evals.samples import PROMPTS, SAMPLE_TOKENS
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.pool.models import Served
from chatlm.front.pool.score import score_text

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.hub.steps import Step
    from chatlm.front.evals.bundle import Suite
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import Model
    from chatlm.front.pool.pool import WorkerPool


IN_USE_S = 60.0  # a model that people have asked for is in use for so long


class Postponed(ChatServerError):
    """The checkpoint will be looked at later."""


class Duty(NamedTuple):
    """Something to do once for each checkpoint."""

    name: str
    done: Callable[[Model], bool]
    do: Callable[[Model, WorkerPool, Callable[[], None]], Awaitable[None]]  # calls the function often


class StepWork:
    """Does its duties for one checkpoint after another, newest first, with rows and memory that nothing else
    needs. What was found is kept in the checkpoint's model and, of suites and prompts, in --results."""

    WINDOWS = 2  # of --watch-text, computed at once

    def __init__(self, many: ManyModels, models: Mapping[Step, Model]):
        self.many, self.models, settings = many, models, many.settings
        self.failed: set[tuple[Step, str]] = set()
        self.duties = list[Duty]()
        if settings.watch_text is not None:
            text = read_text_of(settings.watch_text, "--watch-text")
            done = lambda model: model.score is not None
            self.duties.append(Duty("score", done, partial(self._score, text)))
        if settings.watch_prompts is not None:
            prompts = watched_prompts(settings.watch_prompts)
            done = lambda model: bool(model.samples)
            self.duties.append(Duty("prompts", done, partial(self._sample, prompts)))
        if settings.watch_suite is not None:
            word, most = counted_path(settings.watch_suite)
            suite = chat_suite(runs_code=False) if word == "chat" else read_suite(word, "--watch-suite")
            for task in suite.tasks:
                drawn_items(task, most)  # what is broken is said at once
            done = lambda model: model.judged is not None
            self.duties.append(Duty("suite", done, partial(self._judge, suite, most)))
        writes = settings.watch_prompts is not None or settings.watch_suite is not None
        self.folder = results_folder(settings.results) if writes else None

    async def run(self):
        while self.duties:
            left = [(step, duty) for duty in self.duties for step, model in self.models.items()
                    if model.pool and not duty.done(model) and (step, duty.name) not in self.failed
                    and self._may_load(model)]
            if left:
                await self._do(*max(left, key=lambda pair: pair[0].changed_s))  # of one step the first duty
            else:
                await asyncio.sleep(0.5)

    async def _do(self, step: Step, duty: Duty):
        model = self.models[step]

        def check_room():
            if not self._may_load(model):
                raise Postponed("other models need the memory")

        pool, was_loaded = Served(model).pool, model.state == "ready"
        try:
            await duty.do(model, pool, check_room)
        except Postponed:
            return
        except ChatServerError as error:
            self.failed.add((step, duty.name))
            log.warning("the checkpoint %s cannot be scored: %s", model.name, error)
        if not (was_loaded or pool.dispatcher.jobs or asked_lately(pool)):
            model.unload()

    async def _score(self, text: str, model: Model, pool: WorkerPool, yields: Callable[[], None]):
        model.scoring = True
        try:
            model.score = await score_text(pool, text, yields=yields, windows=self.WINDOWS)
        finally:
            model.scoring = False
        log.info("the checkpoint %s: %.4f bits per byte", model.name, model.score.bits_per_byte)

    async def _sample(self, prompts: Seq[str], model: Model, pool: WorkerPool,
                      yields: Callable[[], None]):
        scorer = PoolScorer(pool, yields)
        texts = self._sampled(prompts, model, scorer.digest) or [
            await scorer.complete(prompt, SAMPLE_TOKENS) for prompt in prompts]
        model.samples = tuple({"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts))
        self._note(model, scorer.digest, {"samples": model.samples})

    def _sampled(self, prompts: Seq[str], model: Model, digest: str) -> list[str]:
        """What an earlier server has noted of these prompts; [] if nothing."""
        for line in noted(self._file_of(model)):
            samples = line.get("samples")
            if line.get("weights_digest") == digest and isinstance(samples, list) and all(
                    isinstance(one, dict) and isinstance(one.get("text"), str) for one in samples) and [
                    one.get("prompt") for one in samples] == [*prompts]:
                return [one["text"] for one in samples]
        return []

    def _file_of(self, model: Model) -> Path:
        """The results of its run."""
        assert self.folder
        return self.folder / f"run-{file_word(name_of(model))}.jsonl"

    async def _judge(self, suite: Suite, most: int | None, model: Model, pool: WorkerPool,
                     yields: Callable[[], None]):
        assert self.folder
        scorer = PoolScorer(pool, yields)
        kept = Kept(self.folder, kept_name(model.settings, scorer, model.name, suite, most))
        try:
            results = [await run_task(scorer, task, most, kept, lambda stage, fraction: None, at_once=1)
                       for task in suite.tasks]
        finally:
            kept.close()
        body = as_json(suite, results)
        model.judged = {f"centered_results/{label}": value
                        for label, value in body["centered_results"].items()}
        model.judged |= {name: value for name, value in body.items()
                         if name.endswith(("core_metric", "core_standard_error"))}
        model.verdicts = Verdicts(suite, most, {one.task.label: one.verdicts for one in results})
        means = [f"{suite.mean} {mean_of(results)[0]:.4f}"] if suite.mean else [
            f"{label} {value:.4f}" for label, value in body["results"].items()]
        log.info("the checkpoint %s: %s", model.name, ", ".join(means))
        del body["seconds"]
        about = {"suite": suite.name, "suite_digest": suite.digest, "max_per_task": most}
        self._note(model, scorer.digest, about | body)

    def _note(self, model: Model, digest: str, found: Mapping[str, Any]):
        """Add a line to the run's file, unless an earlier server has added the same."""
        line = {"tag": name_of(model), "step": model.step, "weights_digest": digest, **found}
        note(self._file_of(model), line)

    def _may_load(self, model: Model) -> bool:
        """Is it loaded, or is there free memory for it that no other model waits for?"""
        place, residency = model.place, self.many.residency
        return place is not None and (
            place.serves or place.missing <= residency.budget - residency.used
            and not any(other.waits for other in residency.places if other is not place))


def name_of(model: Model) -> str:
    """The name of its run."""
    return model.run.run if model.run else ""


def asked_lately(pool: WorkerPool) -> bool:
    """Has it running or recent requests, other than with low priority?"""
    return pool.dispatcher.busy or time.monotonic() - pool.dispatcher.asked_s < IN_USE_S


def watched_prompts(path: str) -> tuple[str, ...]:
    """The prompts in a file, one a line; the word nanochat means those of nanochat. ConfigError if there are
    none."""
    if path == "nanochat":
        return PROMPTS
    prompts = tuple(line for line in read_text_of(path, "--watch-prompts").splitlines() if line.strip())
    if not 1 <= len(prompts) <= 100:
        raise ConfigError(f"--watch-prompts {path}: it must have 1 to 100 lines, each a prompt")
    return prompts
