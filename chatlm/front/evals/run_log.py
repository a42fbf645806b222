"""--run-log: the metrics of runs as TensorBoard's event files, a folder for each run.

They are written and read by the package `tensorboard`, which needs neither TensorFlow nor torch for it; where
one of these is installed, it is not imported."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence as Seq
from pathlib import Path
from types import ModuleType
from typing import Any

from chatlm.common.errors import ConfigError, require_library
from chatlm.common.log import log
from chatlm.front.evals.answers_file import file_word

FLAG = "--run-log"
VERSION = "brain.Event:2"          # what an event file begins with
NO_TF = "tensorboard.compat.notf"  # a module whose presence keeps tensorboard from importing TensorFlow
Scalar = tuple[str, int, bytes]    # name, step and value, as `packed`


class RunLog:
    """Writes each metric of each step once, also over several starts of the server: it reads what the files
    of a run have before it adds to them. A folder that cannot be written costs one warning."""

    def __init__(self, folder: str):
        """ConfigError without the package, or if the folder cannot be written."""
        try:
            self.folder = Path(folder).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{FLAG} {folder}: {error}") from None
        sys.modules.setdefault(NO_TF, ModuleType(NO_TF))
        self.records = require_library("tensorboard.summary.writer.record_writer", FLAG)
        self.loader = require_library("tensorboard.backend.event_processing.event_file_loader", FLAG)
        self.events = require_library("tensorboard.compat.proto.event_pb2", FLAG)
        self.written: dict[str, set[Scalar]] = {}   # by run
        self.read_to: dict[Path, int] = {}          # size of each file when it was read
        self.files: dict[str, EventFile] = {}       # by run: its file of this server
        self.is_warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial = self.folder / f".chat_server-{secrets.token_hex(8)}"
            trial.touch(exist_ok=False)
            trial.unlink()
        except OSError as error:
            raise ConfigError(f"{FLAG} {folder}: {error.strerror}") from None

    def is_new(self, run: str) -> bool:
        """Has this server not written of the run yet, or has somebody removed what it wrote?"""
        return run not in self.written or run in self.files and not self.files[run].path.exists()

    def write(self, run: str, rows: Seq[tuple[int, float, Mapping[str, float]]]):
        """Add what is new among the steps of a run: step, when it was written, metrics."""
        folder = self.folder.joinpath(*map(file_word, run.split("/")))
        try:
            if self.is_new(run):
                self.written[run] = set()
                self.files.pop(run, None)
                self.read_to = {path: size for path, size in self.read_to.items() if path.parent != folder}
            self._read(run, folder)
            for step, saved_s, metrics in rows:
                new = {name: value for name, value in metrics.items()
                       if packed(name, step, value) not in self.written[run]}
                if new:
                    self._file_of(run, folder).add(self._event(step, saved_s, new))
                    self.written[run] |= {packed(name, step, value) for name, value in new.items()}
            self.is_warned = False
        except OSError as error:
            if not self.is_warned:
                log.warning("%s %s: %s; nothing is added until that works again", FLAG, folder,
                            error.strerror)
            self.is_warned = True

    def _file_of(self, run: str, folder: Path) -> EventFile:
        if run not in self.files:
            folder.mkdir(parents=True, exist_ok=True)
            file = EventFile(folder, self.records.RecordWriter)
            file.add(self.events.Event(wall_time=time.time(), file_version=VERSION))
            self.files[run] = file
        return self.files[run]

    def _event(self, step: int, saved_s: float, metrics: Mapping[str, float]) -> Any:
        """At the time at which the training wrote the step, so that TensorBoard's axis of time is the
        training's."""
        event = self.events.Event(wall_time=saved_s or time.time(), step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=value)
        return event

    def _read(self, run: str, folder: Path):
        """Read the files of other servers, and of earlier starts of this one, that have grown."""
        own = self.files[run].path if run in self.files else None
        for path in folder.glob("events.out.tfevents.*"):
            size = path.stat().st_size
            if path != own and path.is_file() and self.read_to.get(path) != size:
                self.read_to[path] = size
                self.written[run].update(self._scalars_in(path))

    def _scalars_in(self, path: Path) -> Iterator[Scalar]:
        """Its scalars up to where it is broken, if it is."""
        try:
            for event in self.loader.LegacyEventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    if value.WhichOneof("value") == "simple_value":
                        yield packed(value.tag, event.step, value.simple_value)
        except OSError:
            raise
        except Exception as error:  # of protobuf, and what the reader raises for broken records
            log.warning("%s: %s is broken after some events: %s", FLAG, path, error)


class EventFile:
    """A new event file. A record is in it whole or not at all: after a part of one, readers would find
    nothing more."""

    def __init__(self, folder: Path, record_writer: type):
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"{name}.{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self.file = os.fdopen(os.open(self.path, flags, 0o644), "wb", buffering=0)
        self.size = 0
        self.writer = record_writer(self)

    def add(self, event: Any):
        """OSError if it cannot be written."""
        self.writer.write(event.SerializeToString())

    def write(self, data: bytes):
        """For the record writer."""
        written = self.file.write(data)
        if written != len(data):
            self.file.truncate(self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += written


def packed(name: str, step: int, value: float) -> Scalar:
    """A scalar as event files have it, with 32 bits."""
    return name, step, struct.pack("<f", max(min(value, 3.4e38), -3.4e38))
