"""The command `check`: a model's findings as a report, or without a model the proof of the kernels."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

from chatlm import __version__
from chatlm.common.errors import ConfigError, printable
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.local import no_progress
from chatlm.common.interrupts import masked_interrupts
from chatlm.common.log import ProgressDisplay, wrapped
from chatlm.common.messages.doctor import (
    DOCTOR_PIPE, SEVERITIES, DoctorConfig, Examined, Examining, Finding, Opened)
from chatlm.common.messages.protocol import Crashed, Loading, Unusable
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import (
    PROCESS_COMMAND, PROGRAM, exit_in_words, patient, process_environment, start_child, threads_per_worker)
from chatlm.front.admission.sandbox import next_message

if TYPE_CHECKING:
    from chatlm.common.config import Settings

OPENING_S = 300.0  # to read the headers of a model's files
MOST_NOTES = 6     # on a terminal; --json has all


async def check(settings: Settings) -> int:
    """The `check` command: 0, or 1 if the model has an error or an op is wrong. ConfigError if the model
    cannot be opened."""
    if settings.model is None:
        return await check_kernels()
    progress = ProgressDisplay()
    of_checks = progress if progress.bar else no_progress
    try:
        source = resolve_model(settings, progress)
        against = settings.against and resolve_model(replace(settings, model=settings.against), progress)
        config = DoctorConfig(replace(settings, keys=(), api_key=()), source, against or None,
                              threads_per_worker(1))
        report = await Examination(config, of_checks).run()
    finally:
        progress.close()
    print(json.dumps(report.body(), indent=1) if settings.json else
          wrapped("\n".join(report.lines()), sys.stdout))
    return int(report.verdict == "error")


async def check_kernels() -> int:
    """Show what the role `check` says; this process needs no torch."""
    with masked_interrupts():
        process = subprocess.Popen([*PROCESS_COMMAND, "check"], stdout=subprocess.PIPE, text=True,
                                   pass_fds=PROGRAM)
    try:
        return await asyncio.to_thread(shown_until_end, process)
    except BaseException:
        process.kill()
        raise


def shown_until_end(process: subprocess.Popen) -> int:
    """Print what a process says. Returns its exit status."""
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            print(line, end="", flush=True)
    return process.wait()


class ModelReport(NamedTuple):
    """What all checks of a model have found."""

    model: str
    description: str
    examined: tuple[Examined, ...]

    @property
    def findings(self) -> list[Finding]:
        """The worst first."""
        found = [finding for one in self.examined for finding in one.findings]
        return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))

    @property
    def verdict(self) -> str:
        """"error", "warning" or "fine"."""
        worst = self.findings[0].severity if self.findings else "note"
        return "fine" if worst == "note" else worst

    @property
    def counts(self) -> Counter[str]:
        return Counter(finding.severity for finding in self.findings)

    def body(self) -> dict:
        """For --json."""
        return {"model": self.model, "description": self.description, "verdict": self.verdict,
                "counts": {severity: self.counts[severity] for severity in SEVERITIES},
                "findings": [finding._asdict() for finding in self.findings],
                "checks": [{"name": one.check, "took_s": round(one.took_s, 3)} for one in self.examined],
                "version": __version__}

    def lines(self) -> Iterator[str]:
        """For a terminal: the verdict, then a line for each finding, the worst first."""
        took_s = sum(one.took_s for one in self.examined)
        counts = []
        for severity in SEVERITIES:
            count = self.counts[severity]
            if count:
                counts.append(f"{count:,} {severity}" if count == 1 else f"{count:,} {severity}s")
        result = "fine" if self.verdict == "fine" else ", ".join(counts)
        yield printable(f"{self.model}: {result} ({len(self.examined)} checks, {took_s:.1f} s)")
        yield printable(f"  {self.description}")
        notes = 0
        for finding in self.findings:
            notes += finding.severity == "note"
            if notes <= MOST_NOTES:
                yield printable(line_of(finding))
        if notes > MOST_NOTES:
            yield f"  {notes - MOST_NOTES:,} more notes: --json shows all"


def line_of(finding: Finding) -> str:
    where = f" ({finding.where})" if finding.where else ""
    advice = f". {finding.advice[:1].upper()}{finding.advice[1:]}" if finding.advice else ""
    return f"  {finding.severity}: {finding.check}: {finding.what}{where}{advice}"


class Examination:
    """Runs the doctor's process, and another one for the checks that are left if a check ends it."""

    def __init__(self, config: DoctorConfig, progress: Callable[[str, float], None]):
        self.config = config
        self.progress = progress
        self.opened: Opened | None = None
        self.left = list[str]()  # the names of the checks that are not done; the first is under way
        self.limit_s = OPENING_S
        self.began_s = time.monotonic()
        self.examined = list[Examined]()

    async def run(self) -> ModelReport:
        while self.opened is None or self.left:
            await self._run_process()
        return ModelReport(self.opened.name, self.opened.description, tuple(self.examined))

    async def _run_process(self):
        """Note what a process finds, and why it has ended if it could not make all checks."""
        process, ours = start_child(PROCESS_COMMAND, "doctor", process_environment(self.config.threads))
        reader, writer = await asyncio.open_connection(sock=ours)
        late = False
        cut = False
        self.limit_s = OPENING_S
        try:
            writer.write(DOCTOR_PIPE.packed(replace(
                self.config, skip=tuple(one.check for one in self.examined))))
            while self.opened is None or self.left:
                self._note(await asyncio.wait_for(next_message(reader, DOCTOR_PIPE), patient(self.limit_s)))
        except asyncio.TimeoutError:
            late = True
        except (asyncio.IncompleteReadError, ConnectionError, BadMessage):
            cut = True
        finally:
            writer.close()
            if not cut:
                process.kill()
            status = await asyncio.to_thread(process.wait)
        if late or cut:
            why = "it takes too long" if late else f"the process ended, {exit_in_words(status)}"
            if self.opened is None:
                raise ConfigError(f"{self.config.source.path}: reading its headers: {why}")
            name = self.left.pop(0)
            self.examined.append(Examined(name, time.monotonic() - self.began_s, (
                Finding(name, "error", f"the check has no result: {why}"),)))

    def _note(self, message):
        match message:
            case Opened():
                if self.opened is None:
                    self.opened = message
                    self.left = [*message.checks]
            case Examining(name, limit_s):
                self.limit_s = limit_s
                self.began_s = time.monotonic()
                done = len(self.examined)
                self.progress(f"checking: {name}", done / (done + len(self.left)))
            case Examined(name):
                self.limit_s = OPENING_S
                self.left.remove(name)
                self.examined.append(message)
            case Unusable(text):
                raise ConfigError(text)
            case Crashed(error):
                raise ConfigError(f"{self.config.source.path}: {error}")
            case Loading():
                pass
