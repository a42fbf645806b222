"""What a server does for each checkpoint of --watch while nobody needs it: scores, prompts, suites."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from chatlm.common.config import counted_path
from chatlm.common.errors import ChatServerError, ConfigError
from chatlm.common.files import read_small, read_text_of
from chatlm.common.log import log
from chatlm.front.evals.bits import score_text
from chatlm.front.evals.bundle import read_suite
from chatlm.front.evals.chat import chat_suite
from chatlm.front.evals.flips import Verdicts
from chatlm.front.evals.forward_check import ForwardCheck
from chatlm.front.evals.answers_file import AnswersFile, answers_file_name, results_folder
from chatlm.front.evals.run import as_json, drawn_items, mean_of, run_task
from chatlm.front.evals.run_log import RunLog
from chatlm.front.evals.run_results import (
    FORWARD, SAMPLES, SUITE, TEXT, WRITTEN, CheckpointResult, EvaluatedCheckpoint, RunResults, judged_metrics,
    prompts_key, suite_key, text_key, text_result)
from chatlm.front.evals.samples import PROMPTS, SAMPLE_TOKENS
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.pool.models import ModelOrAdapter

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.run_checkpoints import CheckpointFiles
    from chatlm.front.evals.bundle import Suite
    from chatlm.front.pool.many import ManyModels
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.pool.run_names import RunName


WEIGHTS = ".pt", ".pth", ".bin", ".safetensors"
SMALL_FILE = 64 << 20


class Postponed(ChatServerError):
    """The checkpoint will be looked at later."""


@dataclass
class EvaluationInput:
    """What a evaluation works with."""

    model: ServedModel
    pool: WorkerPool
    yields: Callable[[], None]  # a evaluation calls it often; it may raise an exception to end the work


class CheckpointEvaluation(Protocol):
    """Something to find out once about each checkpoint."""

    kind: str  # the kind and the key of its results
    key: str

    def done(self, model: ServedModel) -> bool:
        ...

    def show(self, model: ServedModel, result: CheckpointResult):
        """Let the model show a result, be it new or an old one."""
        ...

    async def find(self, work: EvaluationInput) -> CheckpointResult:
        ...


class TextEvaluation:
    """Scores --watch-text."""

    kind = TEXT
    WINDOWS = 2  # computed at the same time

    def __init__(self, text: str):
        self.text = text
        self.key = text_key(text)

    def done(self, model: ServedModel) -> bool:
        return model.bits_per_byte is not None

    def show(self, model: ServedModel, result: CheckpointResult):
        if result.score:
            model.bits_per_byte = result.score.bits_per_byte

    async def find(self, work: EvaluationInput) -> CheckpointResult:
        work.model.scoring = True
        try:
            scorer = PoolScorer(work.pool, work.yields)
            score = await score_text(scorer, self.text, windows=self.WINDOWS)
        finally:
            work.model.scoring = False
        log.info("the checkpoint %s: %.4f bits per byte", work.model.name, score.bits_per_byte)
        return text_result(self.key, score)


class PromptsEvaluation:
    """Continues the prompts of --watch-prompts."""

    kind = SAMPLES

    def __init__(self, prompts: Seq[str]):
        self.prompts = prompts
        self.key = prompts_key(prompts)

    def done(self, model: ServedModel) -> bool:
        return bool(model.samples)

    def show(self, model: ServedModel, result: CheckpointResult):
        model.samples = result.samples

    async def find(self, work: EvaluationInput) -> CheckpointResult:
        scorer = PoolScorer(work.pool, work.yields)
        samples = [{"prompt": prompt, "text": await scorer.complete(prompt, SAMPLE_TOKENS)}
                   for prompt in self.prompts]
        return CheckpointResult(SAMPLES, self.key, {"samples": samples}, samples=tuple(samples))


class SuiteEvaluation:
    """Runs --watch-suite. It keeps the answers to the items, so that an evaluation that broke off can go
    on."""

    kind = SUITE

    def __init__(self, suite: Suite, most: int | None, folder: Path | None,
                 unkept: Callable[[Path, OSError], None]):
        """Raises ConfigError for a task that cannot be read."""
        self.suite = suite
        self.most = most
        self.folder = folder
        self.unkept = unkept
        self.key = suite_key(suite.digest, most)
        for task in suite.tasks:
            drawn_items(task, most)  # raises now if an item is broken

    def done(self, model: ServedModel) -> bool:
        return model.judged is not None

    def show(self, model: ServedModel, result: CheckpointResult):
        model.judged = dict(result.metrics)
        model.verdicts = Verdicts(self.suite, self.most, result.verdicts)

    async def find(self, work: EvaluationInput) -> CheckpointResult:
        suite = self.suite
        model = work.model
        scorer = PoolScorer(work.pool, work.yields)
        name = answers_file_name(model.settings, scorer, model.name, suite, self.most)
        kept = await asyncio.to_thread(AnswersFile, self.folder, name, self.unkept)
        try:
            results = [await run_task(scorer, task, self.most, kept, lambda stage, fraction: None, at_once=1)
                       for task in suite.tasks]
        finally:
            kept.close()
        body = as_json(suite, results)
        if suite.mean:
            means = [f"{suite.mean} {mean_of(results)[0]:.4f}"]
        else:
            means = [f"{label} {value:.4f}" for label, value in body["results"].items()]
        log.info("the checkpoint %s: %s", model.name, ", ".join(means))
        del body["seconds"]
        verdicts = {one.task.label: one.verdicts for one in results}
        about = {"suite": suite.name, "suite_digest": suite.digest, "max_per_task": self.most}
        return CheckpointResult(SUITE, self.key, about | body | {"verdicts": verdicts}, judged_metrics(body),
                      verdicts=verdicts)


class CheckpointEvaluator:
    """Evaluates one checkpoint after another, the newest first, with rows and memory that nothing else needs.
    Results are kept in the checkpoint's model and in the results of its run."""

    def __init__(self, many: ManyModels, models: Mapping[CheckpointFiles, ServedModel]):
        self.many = many
        self.models = models
        settings = many.settings
        self.failed: set[tuple[CheckpointFiles, str]] = set()  # (step, kind of evaluation)
        # what `describe_checkpoint` says of each model
        self.described: WeakKeyDictionary[ServedModel, tuple[EvaluatedCheckpoint, str]] = WeakKeyDictionary()
        self.evaluations: list[CheckpointEvaluation] = [ForwardCheck()]
        run_log = RunLog(settings.run_log) if settings.run_log is not None else None
        self.results = RunResults(kept_folder(settings), run_log)
        if settings.watch_text is not None:
            self.evaluations.append(TextEvaluation(read_text_of(settings.watch_text, "--watch-text")))
        if settings.watch_prompts is not None:
            self.evaluations.append(PromptsEvaluation(watched_prompts(settings.watch_prompts)))
        if settings.watch_suite is not None:
            word, most = counted_path(settings.watch_suite)
            suite = chat_suite(runs_code=False) if word == "chat" else read_suite(word, "--watch-suite")
            self.evaluations.append(SuiteEvaluation(suite, most, self.results.folder, self.results.warn))
        self.results.asked |= {evaluation.kind: evaluation.key for evaluation in self.evaluations}

    async def begin(self):
        await self.results.load()

    async def removed(self, watched: Path, runs: Mapping[str, RunName],
                      there: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
        """The steps of runs below a folder whose files are gone, as GET /v1/runs/ID lists them."""
        described = [self.described[model] for model in self.models.values() if model in self.described]
        served = {checkpoint.digest for checkpoint, _ in described}
        return await asyncio.to_thread(self.results.removed, watched, runs, there, served)

    async def opened(self, checkpoint: CheckpointFiles, model: ServedModel):
        """Note that a checkpoint is served now: keep what its training wrote, and show what is known about
        its weights."""
        if not model.pool:
            return
        self.described[model] = await asyncio.to_thread(describe_checkpoint, checkpoint, model, model.pool)
        await self.note_written(model)
        for evaluation in self.evaluations:
            await self._recall(evaluation, model)

    async def note_written(self, model: ServedModel):
        """Keep what a checkpoint's training wrote about it, beside it and in logs."""
        if model in self.described:
            found = {**model.logged, **model.written}
            fields = {"written": found} if found else {}
            await self.results.add(self.described[model][0], CheckpointResult(WRITTEN, "", fields, found))

    async def _recall(self, evaluation: CheckpointEvaluation, model: ServedModel):
        """Show a result that is known of these weights, and keep it as a result of this step too."""
        checkpoint, made_by = self.described[model]
        found = self.results.find(checkpoint.digest, evaluation.kind, evaluation.key, made_by)
        if found:
            await self.results.add(checkpoint, found._replace(made_by=made_by))
            evaluation.show(model, found)

    async def run(self):
        try:
            while self.evaluations or self.results.folder:
                await self._do_next()
        finally:
            self.results.write_now()

    async def _do_next(self):
        left = []
        for checkpoint, model in self.models.items():
            if model in self.described and model.pool and self._may_load(model):
                left += [(checkpoint, evaluation) for evaluation in self._evaluations_left(checkpoint, model)]
        if left:
            # check the forward first, since evaluations say nothing if it is wrong; then the newest step
            checkpoint, evaluation = max(left, key=lambda pair: (pair[1].kind == FORWARD, pair[0].changed_s))
            await self._do(checkpoint, evaluation)
        else:
            await asyncio.sleep(0.5)
        await self.results.write_again()

    def _evaluations_left(self, checkpoint: CheckpointFiles,
                          model: ServedModel) -> list[CheckpointEvaluation]:
        return [evaluation for evaluation in self.evaluations
                if not evaluation.done(model) and (checkpoint, evaluation.kind) not in self.failed]

    async def _do(self, checkpoint: CheckpointFiles, evaluation: CheckpointEvaluation):
        model = self.models[checkpoint]
        of_run, made_by = self.described[model]
        await self.results.refresh(of_run)  # another server may have done the evaluation
        await self._recall(evaluation, model)
        if evaluation.done(model) or not model.pool:
            return

        def check_room():
            if not self._may_load(model):
                raise Postponed("other models need the memory")

        pool = ModelOrAdapter(model).pool
        was_loaded = model.state == "ready"
        try:
            result = await evaluation.find(EvaluationInput(model, pool, check_room))
            await self.results.add(of_run, result._replace(made_by=made_by))
            evaluation.show(model, result)
        except Postponed:
            return
        except ChatServerError as error:
            self.failed.add((checkpoint, evaluation.kind))
            log.warning("the checkpoint %s cannot be scored: %s", model.name, error)
        if not (was_loaded or pool.dispatcher.jobs or pool.dispatcher.in_use):
            model.unload()

    def _may_load(self, model: ServedModel) -> bool:
        """Whether a model is loaded, or fits into free memory that no other model waits for."""
        residency = self.many.residency
        share = residency.share_of(model.pool)
        if share is None:
            return False
        if share.serves:
            return True
        if any(other.waits for other in residency.shares if other is not share):
            return False
        return share.missing <= residency.budget - residency.used


def kept_folder(settings: Settings) -> Path | None:
    """The folder for results; None if nothing is computed, or if the user's own folder cannot be made. Raises
    ConfigError if --results names a folder that cannot be made."""
    computes = settings.watch_text, settings.watch_prompts, settings.watch_suite
    if settings.results is None and computes == (None, None, None):
        return None
    try:
        return results_folder(settings.results)
    except ConfigError as error:
        if settings.results is not None:
            raise
        log.warning("results stay in memory: %s", error)
        return None


def describe_checkpoint(checkpoint: CheckpointFiles, model: ServedModel,
                        pool: WorkerPool) -> tuple[EvaluatedCheckpoint, str]:
    """The names of a checkpoint in its results, and a digest of what decides these beside its weights and the
    question: its other files, and how it is computed here."""
    files = []
    saved_ns = [0]
    for name, size, time_ns in checkpoint.stamp:
        if name.endswith(WEIGHTS):
            saved_ns.append(time_ns)
        elif size <= SMALL_FILE:
            with suppress(ConfigError):
                files.append(hashlib.sha256(read_small(Path(name), SMALL_FILE)).hexdigest())
    card = pool.supervisor.card
    settings = model.settings
    key = json.dumps([files, card.facts.arithmetic, card.context_length, card.longest, settings.dtype,
                      settings.quantize, settings.kv_cache_dtype, settings.softcap])
    made_by = hashlib.sha256(key.encode()).hexdigest()[:24]
    assert model.run
    return EvaluatedCheckpoint(
        model.run.run, model.run.lineage, model.run.stage, checkpoint.step, os.path.realpath(checkpoint.run),
        max(saved_ns) / 1e9, card.facts.digest), made_by


def watched_prompts(path: str) -> tuple[str, ...]:
    """The prompts in a file, one in each line; "nanochat" stands for nanochat's own. Raises ConfigError if
    there are none."""
    if path == "nanochat":
        return PROMPTS
    prompts = tuple(line for line in read_text_of(path, "--watch-prompts").splitlines() if line.strip())
    if not 1 <= len(prompts) <= 100:
        raise ConfigError(f"--watch-prompts {path}: it must have 1 to 100 lines, each a prompt")
    return prompts
