"""Findings, and the messages between the command `check` and the doctor's process."""

from __future__ import annotations

from typing import NamedTuple

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Crashed, Loading, Unusable
from chatlm.common.messages.requests import ModelSource
from chatlm.common.messages.wire import Pipe, wire_message


class Finding(NamedTuple):
    """What a check says of a model."""

    check: str          # the name of the check
    severity: str       # one of SEVERITIES
    what: str           # a sentence without a full stop; may hold text from the model's files
    where: str = ""     # a file, a key of the metadata, a tensor, a line
    advice: str = ""    # what to do
    facts: dict | None = None  # numbers behind it, for --json


SEVERITIES = "error", "warning", "note"  # worst first; a note is nothing wrong


@wire_message(1 << 20)
class DoctorConfig:
    """Command to doctor, first: check this model."""

    settings: Settings  # without API keys
    source: ModelSource
    against: ModelSource | None  # the model that it was made of, to compare with
    threads: int
    skip: tuple[str, ...] = ()   # names of checks that were run, or ended the process before this one


@wire_message(1 << 20)
class Opened:
    """Doctor to command: the model's headers were read."""

    name: str
    description: str
    checks: tuple[str, ...]  # the names of those to come, in order


@wire_message(1 << 10)
class Examining:
    """Doctor to command: a check begins. The process is killed if it takes longer than this."""

    check: str
    limit_s: float


@wire_message(64 << 20)
class Examined:
    """Doctor to command: what a check has found."""

    check: str
    took_s: float
    findings: tuple[Finding, ...]


DOCTOR_PIPE = Pipe(DoctorConfig, Opened, Examining, Examined, Loading, Unusable, Crashed)
