"""Checks that the forward which serves a run's checkpoints gives them the loss that their training
measured."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.val_bpb import (
    Evaluation, LossComparison, RowScore, chosen_rows, compare, former_size, is_of_known_texts,
    validation_shards)
from chatlm.common.log import log
from chatlm.front.evals.run_results import FORWARD, CheckpointResult, forward_result
from chatlm.front.evals.scores import PoolScorer

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.evals.checkpoint_evaluator import EvaluationInput
    from chatlm.front.pool.models import ServedModel
    from chatlm.front.pool.pool import WorkerPool


class ForwardCheck:
    """Compares the val_bpb that base training wrote with our own.

    It compares the newest checkpoint of each run, and each new one. If that one agrees, the run's earlier
    checkpoints count as right; if not, they are compared too. A compared checkpoint has `own_val_bpb` and, if
    it does not agree, a `warning`."""

    kind = FORWARD
    key = ""

    def __init__(self):
        self.agreed_s: dict[str, float] = {}  # by run: when the newest checkpoint that agrees was saved
        self.said: set[tuple[str, str]] = set()  # (run, warning) that the log has already
        self.rows: tuple[tuple, list[list[int]]] = ((), [])  # of the last shard, for the next checkpoint

    def done(self, model: ServedModel) -> bool:
        return model.evaluation is None or model.is_compared or (
            model.saved_s <= self.agreed_s.get(run_of(model), -1.0))

    def show(self, model: ServedModel, result: CheckpointResult):
        """What did not agree is compared again by the next server: the right texts may be here now."""
        if result.fields and result.fields["forward"]["agrees"]:
            model.is_compared = True
            model.own_val_bpb = result.metrics.get("own_val_bpb")
            run = run_of(model)
            self.agreed_s[run] = max(model.saved_s, self.agreed_s.get(run, -1.0))

    async def find(self, work: EvaluationInput) -> CheckpointResult:
        """Compare a checkpoint, if its shard is here and can be read."""
        model = work.model
        evaluation = work.model.evaluation
        assert evaluation is not None and model.source is not None
        path = model.source.path
        lack = why_not(model, work.pool, evaluation)
        found = list[LossComparison]()
        for shard in [] if lack else await asyncio.to_thread(validation_shards, path):
            try:
                found.append(await self._compare(work, evaluation, shard))
            except ConfigError as reason:
                lack = str(reason)
                continue
            if found[-1].agrees:
                break
        model.is_compared = True
        if found:
            return self._result(model, min(found, key=lambda one: abs(one.ours - one.theirs)), path)
        if lack:
            self._say(run_of(model), f"the val_bpb of {model.name} is not compared with our own: {lack}")
        return CheckpointResult(FORWARD)

    def _result(self, model: ServedModel, found: LossComparison, path: Path) -> CheckpointResult:
        own = round(found.ours, 6) if math.isfinite(found.ours) else None
        model.own_val_bpb = own
        if found.agrees:
            log.info("the checkpoint %s: %s", model.name, found.agreement)
        else:
            doubt = "" if is_of_known_texts(path) else ", unless training evaluated other texts"
            model.warning = found.sentence + doubt
            self._say(run_of(model), f"the checkpoint {model.name}: {model.warning}", about=FORWARD)
        return forward_result({"own_val_bpb": own, "agrees": found.agrees, "val_bpb": found.theirs,
                               "rows": found.rows, "of_rows": found.of_rows, "shard": found.shard})

    def _say(self, run: str, text: str, about: str = ""):
        """Log a warning once for each run."""
        if (run, about) not in self.said:
            self.said.add((run, about))
            log.warning("%s", text)

    async def _compare(self, work: EvaluationInput, evaluation: Evaluation, shard: Path) -> LossComparison:
        model = work.model
        scorer = PoolScorer(work.pool, work.yields)
        scores = list[RowScore]()
        for row in await self._rows(run_of(model), evaluation, shard, scorer):
            [found] = await scorer.score([row], [1], 0)
            scores.append(row_score(scorer.tokenizer, row, [one.logprob or 0.0 for one in found]))
        return compare(evaluation, scores, shard, model.settings.dtype == "float32")

    async def _rows(self, run: str, evaluation: Evaluation, shard: Path,
                    scorer: PoolScorer) -> list[list[int]]:
        """ConfigError if the shard cannot be read."""
        try:
            status = await asyncio.to_thread(shard.stat)
        except OSError as error:
            raise ConfigError(f"cannot read {shard}: {error.strerror}") from None
        key = run, shard, status.st_size, status.st_mtime_ns, evaluation.targets, evaluation.rows
        if key != self.rows[0]:
            begin = scorer.begin
            encode = scorer.tokenizer.encode
            self.rows = key, await asyncio.to_thread(
                chosen_rows, evaluation, shard, lambda text: begin + encode(text))
        return self.rows[1]


def run_of(model: ServedModel) -> str:
    return model.run.run if model.run else ""


def why_not(model: ServedModel, pool: WorkerPool, evaluation: Evaluation) -> str:
    """Why a model as it is served cannot be compared; "" if it can."""
    settings = model.settings
    scorer = PoolScorer(pool)
    if settings.quantize or settings.kv_cache_dtype.startswith("q"):
        return "it is served in fewer bits than it was trained in"
    if evaluation.targets >= scorer.longest:
        return (f"it was evaluated on rows of {evaluation.targets:,} tokens, and its context is "
                f"{scorer.room:,}")
    return "" if scorer.begin else "it has no token that begins a text"


def row_score(tokenizer: Tokenizer, row: Seq[int], logprobs: Seq[float]) -> RowScore:
    """What the tokens of a row after its first one cost; special ones do not count."""
    texts = [tokenizer.token_bytes(token) for token in row[1:]]
    nats = -math.fsum(logprob for logprob, text in zip(logprobs, texts, strict=True) if text)
    return RowScore(nats, sum(map(len, texts)), sum(map(former_size, texts)))
