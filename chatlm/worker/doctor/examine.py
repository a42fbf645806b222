"""The role `doctor`: runs the checks on one model, each with limits on its time and memory."""

from __future__ import annotations

import logging
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, lack_of_memory, error_text, printable
from chatlm.common.log import log
from chatlm.common.memory import limit_memory
from chatlm.common.messages.doctor import DoctorConfig, Examined, Examining, Finding, Opened
from chatlm.worker.doctor.checks import CHECKS, Check
from chatlm.worker.doctor.findings import Findings, error, note, warning
from chatlm.worker.doctor.examined_model import ExaminedModel

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Channel


WALL_PER_CPU = 4.0  # seconds on a busy machine for one of the processor
OPENING = "opening"  # the name of what is said while the files are opened


class OutOfTime(BaseException):
    """A check's time is over. It is no Exception, because templates catch those."""


class KeptLog(logging.Handler):
    """A log handler that keeps records, which become findings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord):
        self.lines.append(record.getMessage())


def examine(channel: Channel, config: DoctorConfig):
    """Open the model and run its checks. Raises ConfigError if it cannot be opened."""
    examined = ExaminedModel(config.source, config.settings, config.against, config.threads)
    said = KeptLog()
    log.addHandler(said)
    log.propagate = False  # what a worker would log is a finding here
    began_s = time.monotonic()
    examined.tokenizer  # opens the model too
    checks = [check for check in CHECKS if check.name not in config.skip and check.needs(examined)]
    names = tuple(check.name for check in checks)
    channel.send(Opened(examined.source.name, examined.model.description, (OPENING, *names)))
    if OPENING not in config.skip:
        notes = [note(line) for line in (*said.lines, *examined.model.notes)]
        channel.send(Examined(OPENING, time.monotonic() - began_s, labelled(OPENING, notes)))
    for check in checks:
        channel.send(Examining(check.name, WALL_PER_CPU * check.limit_s))
        began_s = time.monotonic()
        findings = labelled(check.name, findings_of(check, examined))
        channel.send(Examined(check.name, time.monotonic() - began_s, findings))


def labelled(name: str, findings: Findings) -> tuple[Finding, ...]:
    """The findings of a check with its name. Text from the model's files is made safe to show."""
    return tuple(finding._replace(check=name, what=printable(finding.what), where=printable(finding.where),
                                  advice=printable(finding.advice)) for finding in findings)


def findings_of(check: Check, examined: ExaminedModel) -> list[Finding]:
    """Run a check and yield its findings. A check that breaks or takes too long adds a finding about that."""
    findings = list[Finding]()
    try:
        with limited(check):
            findings.extend(check.function(examined))
    except OutOfTime:
        findings.append(error(f"the check was ended after {check.limit_s:g} s of the processor"))
    except ConfigError as reason:
        findings.append(error(str(reason)))
    except Exception as reason:
        if lack_of_memory(reason):
            findings.append(error(
                f"the check takes more memory than the {check.memory >> 20:,} MiB that it may"
                if check.memory else str(lack_of_memory(reason))))
        else:
            findings.append(warning(f"the check itself failed: {error_text(reason)}",
                                    advice="this is an error of chat_server; please report it"))
    return findings


@contextmanager
def limited(check: Check) -> Iterator[None]:
    """Raise OutOfTime or MemoryError in code that takes more than the check may."""
    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if check.memory is not None:
        limit_memory(check.memory)
    signal.setitimer(signal.ITIMER_PROF, check.limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
