"""Checks that our forward gives a nanochat checkpoint the validation loss that its training measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.common.hub.val_bpb import (
    LEAST_ROWS, LossComparison, Evaluation, RowScore, chosen_rows, compare, evaluation_of, former_size,
    is_of_known_texts, validation_shards)
from chatlm.common.memory import available_memory
from chatlm.worker.doctor.findings import Findings, error, note, warning
from chatlm.worker.doctor.running import ready, row_bytes, step
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.sizes import weight_bytes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.doctor.examined_model import ExaminedModel
    from chatlm.worker.model.transformer import Transformer

CHUNK = 128           # tokens in a step
LIMIT_S = 60.0        # for computing a shard's rows once,
LIMIT_CPU_S = 500.0   # on all processors together
MOST_SHARDS = 3       # of different data sets
SOFTCAPS = 15.0, 20.0, 30.0  # upstream's, today's and that of one week, and what others take
ADVICE = "compare nanochat/gpt.py of the code that trained it with upstream's: softcap, windows, gates"


def is_trained(examined: ExaminedModel) -> bool:
    """Whether the training of this checkpoint has written a loss that we can compute too."""
    return examined.kind == "nanochat" and evaluation_of(examined.path) is not None


def check_forward(examined: ExaminedModel) -> Findings:
    """Compare the meta file's val_bpb with our own, on as many rows of the same texts as a minute allows."""
    evaluation = evaluation_of(examined.path)
    assert evaluation is not None
    settings = settings_for(examined)
    lack = why_not(examined, settings, evaluation)
    compared = list[LossComparison]()
    for shard in [] if lack else validation_shards(examined.path)[:MOST_SHARDS]:
        try:
            found = compared_on(examined, settings, evaluation, shard)
        except ConfigError as reason:
            lack = str(reason)
            continue
        if found is None:
            lack = f"{LEAST_ROWS} rows take more than {LIMIT_S:g} s here"
            continue
        compared.append(found)
        if found.agrees:
            yield note(found.agreement, **facts_of(found))
            return
    if not compared:
        yield note(f"its val_bpb of {evaluation.val_bpb:.4f} was not compared with our own: "
                   f"{lack or 'no validation shard is in its base folder'}")
        return
    closest = min(compared, key=lambda found: abs(found.ours - found.theirs))
    advice = softcap_advice(examined, settings, evaluation, closest) or ADVICE
    if is_of_known_texts(examined.path):
        yield error(closest.sentence, where="val_bpb", advice=advice, **facts_of(closest))
    else:
        yield warning(f"{closest.sentence}, unless training evaluated other texts", where="val_bpb",
                      advice=advice, **facts_of(closest))


def facts_of(found: LossComparison) -> dict:
    """The facts for --json, which has no NaN."""
    ours = round(found.ours, 6) if found.ours == found.ours else None
    return {"val_bpb": found.theirs, "own_val_bpb": ours, "tolerance": round(found.tolerance, 6),
            "rows": found.rows, "of_rows": found.of_rows, "shard": found.shard}


def settings_for(examined: ExaminedModel) -> Settings:
    """The arithmetic that is closest to exact, whatever the model is served with."""
    settings = replace(examined.settings, quantize=None, kv_cache_dtype="auto", context_length=None,
                       arithmetic="fine", max_batch=CHUNK, prefill_chunk=CHUNK, drafts="none")
    exact = replace(settings, dtype="float32")
    return exact if memory_of(examined, exact) < available_memory() // 2 else settings


def memory_of(examined: ExaminedModel, settings: Settings) -> int:
    """The bytes of a model and of a step's activations."""
    model = open_model(examined.source, settings, "cpu")
    return weight_bytes(model, None) + 3 * CHUNK * row_bytes(model.architecture)


def why_not(examined: ExaminedModel, settings: Settings, evaluation: Evaluation) -> str:
    """Why nothing can be compared; "" if it can."""
    needed = memory_of(examined, settings)
    free = available_memory()
    if needed > free:
        return f"that takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
    context = open_model(examined.source, settings, "cpu").context_length
    if evaluation.targets > context:
        return f"it was evaluated on rows of {evaluation.targets:,} tokens, and its context is {context:,}"
    return "" if examined.text.bos_token is not None else "it has no token that begins a text"


def compared_on(examined: ExaminedModel, settings: Settings, evaluation: Evaluation,
                shard: Path) -> LossComparison | None:
    """Compare on a shard's rows. None if LIMIT_S is too short for enough rows. Raises ConfigError if the
    shard cannot be read."""
    begin = [token for token in (examined.text.bos_token,) if token is not None]
    rows = chosen_rows(evaluation, shard, lambda text: begin + examined.tokenizer.encode(text))
    scores = list[RowScore]()
    ends_s = time.monotonic() + LIMIT_S
    ends_cpu_s = time.process_time() + LIMIT_CPU_S
    for score in row_scores(examined, settings, rows, evaluation.targets):
        scores.append(score)
        if time.monotonic() > ends_s or time.process_time() > ends_cpu_s:
            break
    if len(scores) < min(evaluation.rows, LEAST_ROWS):
        return None
    return compare(evaluation, scores, shard, settings.dtype == "float32")


def row_scores(examined: ExaminedModel, settings: Settings, rows: Iterable[Seq[int]],
               targets: int) -> Iterator[RowScore]:
    transformer = ready(open_model(examined.source, settings, "cpu"), settings, targets)
    sizes = {}
    for row in rows:
        for token in row:
            if token not in sizes:
                text = examined.tokenizer.token_bytes(token)
                sizes[token] = len(text), former_size(text)
        nats = nats_of(transformer, row)
        scored = numpy.array([sizes[token][0] > 0 for token in row[1:]])
        yield RowScore(float(nats[scored].sum(dtype=numpy.float64)),
                       sum(sizes[token][0] for token in row[1:]), sum(sizes[token][1] for token in row[1:]))


def nats_of(transformer: Transformer, row: Seq[int]) -> numpy.ndarray:
    """(len(row) - 1,): what each token after the first one costs."""
    ids = row[:-1]
    found = []
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        logits = transformer.arrays.numpy(step(transformer, ids, begin, end, range(end - begin)))
        logits = logits.astype(numpy.float32)
        most = logits.max(1)
        sums = numpy.log(numpy.exp(logits - most[:, None]).sum(1)) + most
        found.append(sums - logits[numpy.arange(end - begin), row[begin + 1:end + 1]])
    return numpy.concatenate(found)


def softcap_advice(examined: ExaminedModel, settings: Settings, evaluation: Evaluation,
                   worse: LossComparison) -> str:
    """The flag with which the losses agree, if a usual softcap makes them; else ""."""
    shard = next((one for one in validation_shards(examined.path) if one.name == worse.shard), None)
    head = open_model(examined.source, settings, "cpu").architecture.head
    for softcap in SOFTCAPS:
        if shard is None or head is None or softcap == head.softcap:
            continue
        found = compared_on(examined, replace(settings, softcap=softcap), evaluation, shard)
        if found and found.agrees:
            return f"serve it with --softcap {softcap:g}: {found.numbers}"
    return ""
