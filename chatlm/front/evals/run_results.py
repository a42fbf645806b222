"""What is known of the steps of training runs: a line for each result in --results, which outlives the server
and the files of the step.

A result belongs to weights, not to a name: it is found by the digest of the weights and of what was asked (a
text, prompts, a suite), in the file of any run. So a run that was renamed or moved is not computed again, and
other files or another text are. A step whose files are gone stays in the curve of its run."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.hub.nanochat_checkpoints import AS_TRAINED
from chatlm.common.hub.recorded_metrics import is_number
from chatlm.common.log import log
from chatlm.common.new_files import open_growing, open_kept
from chatlm.front.evals.bits import Score
from chatlm.front.evals.answers_file import file_word
from chatlm.front.pool.run_names import RunName

if TYPE_CHECKING:
    from chatlm.front.evals.run_log import RunLog


WRITTEN = "written"
FORWARD = "forward"
TEXT = "text"
SAMPLES = "samples"
SUITE = "suite"
KINDS = WRITTEN, FORWARD, TEXT, SAMPLES, SUITE  # of results, in the order in which they are shown
# what each line has, whatever its result
NAMES = "tag", "lineage", "stage", "step", "weights_digest", "folder", "saved_s", "computed_with"
MOST_BYTES = 16 << 20  # of a line; longer ones are skipped


class EvaluatedCheckpoint(NamedTuple):
    """A step, as its results name it."""

    run: str
    lineage: str
    stage: str
    step: int
    folder: str     # of the run's checkpoints
    saved_s: float  # when the training wrote it; 0.0 if that is not known
    digest: str     # of its weights


class CheckpointResult(NamedTuple):
    """Something that was found out about some weights."""

    kind: str      # one of KINDS
    key: str = ""  # identifies the question: see `text_key`, `prompts_key`, `suite_key`
    fields: Mapping[str, Any] = {}  # the members of its line, without those that name the step
    metrics: Mapping[str, float] = {}
    samples: tuple[dict[str, str], ...] = ()
    verdicts: Mapping[str, str] = {}  # by task: 1 or 0 for each item
    score: Score | None = None
    made_by: str = ""  # a digest of everything else that decides it; "" for results of earlier versions


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prompts_key(prompts: Seq[str]) -> str:
    return hashlib.sha256(json.dumps([*prompts]).encode()).hexdigest()


def suite_key(digest: str, most: int | None) -> str:
    return f"{digest} {most}"


def judged_metrics(body: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in the results of a suite, by upstream's names."""
    metrics = {f"centered_results/{label}": value for label, value in body["centered_results"].items()}
    for name, value in body.items():
        if name.endswith(("core_metric", "core_standard_error")):
            metrics[name] = value
    return {name: value for name, value in metrics.items() if is_number(value)}


@dataclass
class CheckpointResults:
    """All results of a step, by kind, key and `made_by`."""

    checkpoint: EvaluatedCheckpoint
    results: dict[tuple[str, str, str], CheckpointResult] = field(default_factory=dict)


class RunResults:
    """The results of all runs, in a folder with a file for each run.

    The folder is read once. What other servers add to a run's file is read before something is computed for
    that run. If the folder cannot be written, there is one warning; results then stay in memory, and are
    written when that is possible again."""

    AGAIN_S = 30.0  # between two tries to write what could not be written
    WARN_S = 3600.0  # between two warnings

    def __init__(self, folder: Path | None, run_log: RunLog | None = None):
        """folder: --results; None keeps results in memory only."""
        self.folder = folder
        self.run_log = run_log
        self.asked: dict[str, str] = {WRITTEN: ""}  # by kind: the key whose results are shown
        # by folder; by step and digest
        self.folders: dict[str, dict[tuple[int, str], CheckpointResults]] = {}
        self.of_weights: dict[str, dict[tuple[str, str, str], CheckpointResult]] = {}  # by digest
        self.read_to: dict[Path, int] = {}    # bytes of each file that have been read
        self.unwritten: list[tuple[Path, bytes]] = []
        self.tried_s = 0.0
        self.turn = threading.Lock()          # of the threads that read and write
        self.warned_s = -math.inf
        self.changes = 0                      # results that were noted
        self.gone: tuple[tuple, list[dict[str, Any]]] = ((), [])  # what `removed` was asked last, and found
        self.looking = threading.Lock()       # of the threads that look for removed steps

    # reading

    async def load(self):
        """Read all results in the folder."""
        await asyncio.to_thread(self._load)

    def _load(self):
        with self.turn:
            if self.folder:
                for path in sorted(self.folder.glob("run-*.jsonl")):
                    self._read(path)

    async def refresh(self, checkpoint: EvaluatedCheckpoint):
        """Read what other servers have added to the file of a step's run."""
        if self.folder:
            await asyncio.to_thread(self._refresh, self._file_of(checkpoint))

    def _refresh(self, path: Path):
        with self.turn:
            self._read(path)

    def _read(self, path: Path):
        """Read the new lines of a file. Skips broken lines, which a full disk leaves behind."""
        begin = self.read_to.get(path, 0)
        try:
            with open_kept(path) as file:
                if file.seek(0, os.SEEK_END) < begin:  # it was written anew
                    begin = 0
                file.seek(begin)
                while line := file.readline(MOST_BYTES):
                    if line.endswith(b"\n"):
                        begin += len(line)
                    if found := result_in(line):
                        self._remember(*found)
        except FileNotFoundError:
            return
        except OSError as error:
            self.warn(path, error)
        self.read_to[path] = begin

    def _remember(self, checkpoint: EvaluatedCheckpoint, result: CheckpointResult) -> bool:
        """Note a result. Returns whether it is new."""
        of_run = self.folders.setdefault(checkpoint.folder, {})
        known = of_run.setdefault((checkpoint.step, checkpoint.digest), CheckpointResults(checkpoint))
        if not known.checkpoint.saved_s or 0 < checkpoint.saved_s < known.checkpoint.saved_s:
            known.checkpoint = checkpoint
        key = result.kind, result.key, result.made_by
        old = known.results.get(key)
        is_new = old is None or old.metrics != result.metrics
        known.results[key] = result
        self.changes += 1
        self.of_weights.setdefault(checkpoint.digest, {})[key] = result
        return is_new

    def find(self, digest: str, kind: str, key: str, made_by: str) -> CheckpointResult | None:
        """The result of these weights, whichever step of whichever run they belong to."""
        of_weights = self.of_weights.get(digest, {})
        return of_weights.get((kind, key, made_by)) or of_weights.get((kind, key, ""))

    # writing

    async def add(self, checkpoint: EvaluatedCheckpoint, result: CheckpointResult):
        """Keep a result of a step."""
        await asyncio.to_thread(self._add, checkpoint, result)

    def _add(self, checkpoint: EvaluatedCheckpoint, result: CheckpointResult):
        with self.turn:
            path = self._file_of(checkpoint) if self.folder else None
            if path:
                self._read(path)
            if self._remember(checkpoint, result) and path and result.fields:
                line = {"tag": checkpoint.run, "lineage": checkpoint.lineage, "stage": checkpoint.stage,
                        "step": checkpoint.step, "weights_digest": checkpoint.digest,
                        "folder": checkpoint.folder, "saved_s": checkpoint.saved_s,
                        "computed_with": result.made_by, **result.fields}
                self.unwritten.append((path, json.dumps(line).encode() + b"\n"))
                self._write()
            if self.run_log:
                self._log(checkpoint)

    async def write_again(self):
        """Try again to write what could not be written, if the last try is long enough ago."""
        if self.unwritten and time.monotonic() - self.tried_s > self.AGAIN_S:
            await asyncio.to_thread(self.write_now)

    def write_now(self):
        if self.unwritten:
            with self.turn:
                self._write()

    def _write(self):
        self.tried_s = time.monotonic()
        while self.unwritten:
            path, line = self.unwritten[0]
            try:
                append_line(path, line)
            except OSError as error:
                return self.warn(path, error)
            self.unwritten.pop(0)

    def warn(self, path: Path, error: OSError):
        if time.monotonic() - self.warned_s > self.WARN_S:
            self.warned_s = time.monotonic()
            log.warning("%s: %s; results stay in memory until that works again", path, error.strerror)

    def _file_of(self, checkpoint: EvaluatedCheckpoint) -> Path:
        assert self.folder
        return self.folder / f"run-{file_word(checkpoint.run)}.jsonl"

    # showing

    def metrics_of(self, known: CheckpointResults) -> dict[str, float]:
        """The metrics of a step: those that its training wrote, and those that this server finds."""
        metrics = {}
        for result in self._shown(known):
            metrics |= result.metrics
        return metrics

    def _shown(self, known: CheckpointResults) -> list[CheckpointResult]:
        """The last result of each kind that answers what this server is asked."""
        last = {result.kind: result for result in [*known.results.values()]
                if self.asked.get(result.kind) == result.key}
        return [last[kind] for kind in KINDS if kind in last]

    def removed(self, watched: Path, runs: Mapping[str, RunName], there: Collection[tuple[str, int]],
                served: Collection[str] = ()) -> list[dict[str, Any]]:
        """The steps of runs below the watched folder whose files are gone, as GET /v1/runs/ID lists them.

        runs: by folder, the runs that are there or were there. there: (folder, number) of each step whose
        files are there. served: digests of weights that are served; weights that have only moved to another
        folder are not gone.

        The list is made anew only if something has changed. With thousands of steps that takes a while, so
        call it in a thread."""
        with self.looking:
            asked = self.changes, dict(self.asked), watched, dict(runs), {*there}, {*served}
            if self.gone[0] != asked:
                self.gone = asked, self._find_removed(watched, runs, there, served)
            return self.gone[1]

    def _find_removed(self, watched: Path, runs: Mapping[str, RunName], there: Collection[tuple[str, int]],
                      served: Collection[str]) -> list[dict[str, Any]]:
        folders = {folder for folder, _ in there}
        taken = {name.run for name in runs.values()}
        found: list[dict[str, Any]] = []
        for folder in [*self.folders]:
            if not Path(folder).is_relative_to(watched):
                continue
            for known in self._curve(folder):
                name = runs.get(folder)
                is_other = name is None and known.checkpoint.run in taken  # another folder has its name now
                moved = folder not in folders and known.checkpoint.digest in served
                is_there = (folder, known.checkpoint.step) in there
                if not (is_other or moved or is_there) and self.metrics_of(known):
                    found.append(self._removed(known, name))
        return found

    def _removed(self, known: CheckpointResults, name: RunName | None) -> dict[str, Any]:
        checkpoint = known.checkpoint
        name = name or RunName(checkpoint.run, checkpoint.lineage, checkpoint.stage, ())
        samples = []
        for result in self._shown(known):
            samples += result.samples
        return {"model": name.checkpoint_name(checkpoint.step), "run": name.run, "lineage": name.lineage,
                "stage": name.stage, "step": checkpoint.step, "state": "removed",
                "weights_digest": checkpoint.digest,
                "metrics": self.metrics_of(known), "judged": False, "samples": samples}

    def _curve(self, folder: str) -> Iterator[CheckpointResults]:
        """The steps of a run's last training, the newest first. If a training began again at an earlier step,
        the steps of the previous training from there on do not count any more."""
        least = None
        for known in sorted([*self.folders[folder].values()],
                            key=lambda one: (one.checkpoint.saved_s, one.checkpoint.step), reverse=True):
            if least is None or known.checkpoint.step < least:
                least = known.checkpoint.step
                yield known

    def _log(self, checkpoint: EvaluatedCheckpoint):
        """Write the metrics of a step to --run-log. If the log has nothing of its run yet, write the whole
        run."""
        assert self.run_log
        steps = [known for known in self._curve(checkpoint.folder)
                 if self.run_log.is_new(checkpoint.run) or known.checkpoint.step == checkpoint.step]
        rows = [(known.checkpoint.step, known.checkpoint.saved_s, self.metrics_of(known))
                for known in sorted(steps, key=lambda known: known.checkpoint.step)]
        self.run_log.write(checkpoint.run, rows)


def append_line(path: Path, line: bytes):
    """Add a line in one call, so that lines of several servers do not mix. Raises OSError if that fails; then
    a part of the line may be in the file, and the next line begins after it."""
    with open_growing(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        written = file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written")


def result_in(line: bytes) -> tuple[EvaluatedCheckpoint, CheckpointResult] | None:
    """The result in a line; None if it has none, or is broken."""
    with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
        found = json.loads(line)
        digest = found["weights_digest"]
        number = found["step"]
        if not (isinstance(digest, str) and digest) or type(number) is not int:
            return None
        names = [found.get(name) for name in ("tag", "lineage", "stage", "folder", "computed_with")]
        run, lineage, stage, folder, made_by = (name if isinstance(name, str) else "" for name in names)
        stage = stage if stage in AS_TRAINED else ""
        saved_s = found.get("saved_s")
        saved_s = saved_s if is_number(saved_s) else 0.0
        checkpoint = EvaluatedCheckpoint(run, lineage or run, stage, number, folder, saved_s, digest)
        result = result_of(found)
        return (checkpoint, result._replace(made_by=made_by)) if result else None
    return None


def result_of(found: Mapping[str, Any]) -> CheckpointResult | None:
    """The result in a line's object. Raises ValueError, KeyError, TypeError or AttributeError if a member is
    missing or wrong."""
    fields = {name: value for name, value in found.items() if name not in NAMES}
    if "text_digest" in found:
        bits = found["bits"]
        size = found["bytes"]
        tokens = found["tokens"]
        if not (is_number(bits) and type(size) is type(tokens) is int and size > 0):
            return None
        return text_result(str(found["text_digest"]), Score(bits, size, tokens))
    if "suite_digest" in found:
        # KeyError for lines of earlier versions; a server makes new lines from the answers to the items
        verdicts = {str(label): str(right) for label, right in found["verdicts"].items()}
        key = suite_key(str(found["suite_digest"]), found["max_per_task"])
        return CheckpointResult(SUITE, key, fields, judged_metrics(found), verdicts=verdicts)
    if "samples" in found:
        samples = [{"prompt": str(one["prompt"]), "text": str(one["text"])} for one in found["samples"]]
        key = prompts_key([one["prompt"] for one in samples])
        return CheckpointResult(SAMPLES, key, {"samples": samples}, samples=tuple(samples))
    if "forward" in found:
        return forward_result(found["forward"])
    metrics = {str(name): value for name, value in found["written"].items() if is_number(value)}
    return CheckpointResult(WRITTEN, "", fields, metrics)


def forward_result(found: Mapping[str, Any]) -> CheckpointResult:
    """found: `own_val_bpb`, and whether it `agrees` with what training wrote."""
    own = found["own_val_bpb"]
    metrics = {"own_val_bpb": own} if is_number(own) else {}
    return CheckpointResult(FORWARD, "", {"forward": {**found, "agrees": found["agrees"] is True}}, metrics)


def text_result(key: str, score: Score) -> CheckpointResult:
    fields = {"text_digest": key, **score.as_json(), "bits": score.bits}
    return CheckpointResult(TEXT, key, fields, {"bits_per_byte": round(score.bits_per_byte, 6)}, score=score)
