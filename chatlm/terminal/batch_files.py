"""The files of the command `batch`: the lines that it reads, and an output that says what it is of.

Beside an output `X` lies `X.of`: digests of the input and of the output, the model and the settings. Only an
output whose `X.of` fits counts as done. While the command runs, results are in `X.part`, whose first lines
say the same. A file of one of these names that the command did not write is never changed, moved or read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chatlm.common.errors import ConfigError
from chatlm.common.jsontext import may_have_member
from chatlm.common.new_files import create
from chatlm.front.api.batch_lines import LONGEST_LINE
from chatlm.terminal.output_path import named_errors, output_path, shown_path

SYNC_S = 1.0           # between moments at which what was answered survives a power cut
LONGEST_HEAD = 1 << 20  # bytes of a part's first line, or of what lies beside an output
KIND = "batch"         # of files that this command has written


class BatchResult(NamedTuple):
    """The line of the output for one of the input."""

    number: int
    text: str
    failed: bool


class InputFile:
    """The input file, which is read twice. ConfigError if it cannot be, or has no line."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0              # lines that are not blank
        self.models = set[str]()    # that lines name
        digest = hashlib.sha256()
        with named_errors(path):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ConfigError(f"{shown_path(path)} is read twice, so it must be a regular file")
            self.file = path.open("rb")
            self.version = self._version()
        for _, line in self._numbered():
            digest.update(line)
            self.count += bool(line.strip())
            self._note_model(line)
        if not self.count:
            raise ConfigError(f"{shown_path(path)} has no lines")
        self.digest = digest.hexdigest()

    def _version(self) -> tuple[int, int]:
        now = os.fstat(self.file.fileno())
        return now.st_size, now.st_mtime_ns

    def _note_model(self, line: bytes):
        if may_have_member(line, "model"):
            with suppress(ValueError, RecursionError, KeyError, TypeError):
                self.models.add(str(json.loads(line)["body"]["model"])[:1000])

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        with named_errors(self.path):
            self.file.seek(0)
            number = 0
            while line := self.file.readline(LONGEST_LINE + 1):
                number += 1
                yield number, line
                while not line.endswith(b"\n") and (line := self.file.readline(LONGEST_LINE)):
                    pass  # the rest of a line that is too long

    def lines(self, done: set[int]) -> Iterator[tuple[int, bytes]]:
        """(number, text) of the lines that are not done."""
        return ((number, line.strip()) for number, line in self._numbered()
                if line.strip() and number not in done)

    def check_unchanged(self):
        if self._version() != self.version:
            raise ConfigError(f"{shown_path(self.path)} has changed while its lines were answered: its "
                              "answers would be of two inputs")


def head_of(line: bytes) -> dict[str, Any] | None:
    """What the first line of a file of ours says; None of any other file."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("chat_server") == KIND else None


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first member in which two descriptions differ, in words; "" if none does."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            return f"{name} {json.dumps(found.get(name))}, not {json.dumps(wanted.get(name))}"
    return ""


class OutputFile:
    """The output file, which appears under its name once it is complete, in the order of the input. Until
    then its results are in a part file, as they come: `NUMBER STATUS RESULT`, after a line that says of what
    input they are and one that says of what model."""

    def __init__(self, text: str, source: InputFile):
        self.path = output_path(text)
        self.source = source
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.side = self.path.with_name(f"{self.path.name}.of")
        self.done = set[int]()
        self.of: dict[str, Any] | None = None  # the model and the settings of what is done
        self.created = int(time.time())
        self.run = secrets.token_hex(8)        # in the names of its other files
        self.file: int | None = None           # the part
        self.size = 0                          # of its whole lines
        self.synced_s = 0.0
        self.finished = False                  # is the output of this input there already?

    @property
    def complete(self) -> bool:
        """Is there nothing left to do?"""
        return self.finished and self.file is None

    def __enter__(self) -> OutputFile:
        for path in (self.path, self.part, self.side):
            with named_errors(path), suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(self.source.file.fileno())):
                    raise ConfigError(f"-o {shown_path(self.path)}: {shown_path(path)} is the input")
        if os.path.lexists(self.path):
            self.of = self._finished()
        elif os.path.lexists(self.side) and side_of(self.side) is None:
            raise self._foreign(self.side)
        if os.path.lexists(self.part) or not self.finished:
            try:
                self._open_part()
            except BaseException:
                self._close()
                raise
        return self

    def _finished(self) -> dict[str, Any]:
        """The model and the settings of the output that is there. ConfigError if it is not of this input."""
        where = f"-o {shown_path(self.path)} exists, and "
        other = "; choose another -o, or move it away"
        made = side_of(self.side)
        if made is None:
            raise ConfigError(f"{where}no {shown_path(self.side)} says what it is of{other}")
        if made.get("input") != self.source.digest:
            raise ConfigError(f"{where}is not the output for this file but for another input{other}")
        with named_errors(self.path):
            if made.get("output") != digest_of(self.path):
                raise ConfigError(f"{where}has changed since it was written{other}")
        self.finished = True
        return made.get("of") or {}

    def _open_part(self):
        with named_errors(self.path):
            if not os.path.lexists(self.part):
                self._new_part()
                return
            if not stat.S_ISREG(os.lstat(self.part).st_mode):
                raise self._foreign(self.part)
            self.file = os.open(self.part, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
            with open(self.file, "rb", closefd=False) as reading:
                self._take_up(reading)

    @staticmethod
    def _foreign(path: Path) -> ConfigError:
        return ConfigError(f"{shown_path(path)} exists, and no batch has written it; choose another -o, or "
                           "move it away")

    def _take_up(self, reading: BinaryIO):
        head = head_of(reading.readline(LONGEST_HEAD)) or {}
        created = head.get("created")
        run = head.get("run")
        if type(created) is not int or not re.fullmatch("[0-9a-f]{16}", str(run)):
            raise self._foreign(self.part)
        self._lock()
        if head.get("input") != self.source.digest:
            raise ConfigError(f"{shown_path(self.part)} is of another input; delete it to begin again, or "
                              "choose another -o")
        self.created = created
        self.run = str(run)
        self._read(reading)

    def _lock(self):
        assert self.file is not None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run writes {shown_path(self.part)}") from None
        if not self._is_ours():
            raise ConfigError(f"another run has just written {shown_path(self.path)}")

    def _is_ours(self) -> bool:
        """Is the file at the part's name still the one that is open?"""
        assert self.file is not None
        try:
            return os.path.samestat(os.stat(self.part, follow_symlinks=False), os.fstat(self.file))
        except FileNotFoundError:
            return False

    def _new_part(self):
        """A part is never seen without its first line: what is empty is not ours."""
        new, name = tempfile.mkstemp(prefix=f".{self.path.name[:100]}.", dir=self.path.parent)
        try:
            self.file = os.open(name, os.O_RDWR | os.O_APPEND)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self._append(json.dumps({"chat_server": KIND, "input": self.source.digest,
                                     "created": self.created, "run": self.run}))
            link_new(name, self.part)
        except FileExistsError:
            raise ConfigError(f"another run writes {shown_path(self.part)}") from None
        finally:
            os.close(new)
            with suppress(FileNotFoundError):
                os.unlink(name)

    def _read(self, reading: BinaryIO):
        """Take up what an earlier run has left; a line that it could not finish is dropped."""
        self.of = None
        reading.seek(0)
        self.size = len(reading.readline())
        about = reading.readline(LONGEST_HEAD)
        if about.endswith(b"\n") and (found := head_of(about)) is not None:
            self.of = dict(found.get("of") or {})
            self.size += len(about)
            for line in reading:
                number = re.match(rb"(\d{1,9}) (ok|failed) .", line)
                if not number or not line.endswith(b"\n"):
                    break
                self.done.add(int(number[1]))
                self.size += len(line)
        assert self.file is not None
        os.ftruncate(self.file, self.size)

    def begin(self, of: dict[str, Any]):
        """Note of which model and settings the results are, or check that these are the same. ConfigError if
        not."""
        if self.of is None:
            self._append(json.dumps({"chat_server": KIND, "of": of}))
            self.of = of
        elif other := difference(self.of, of):
            there = self.path if self.finished else self.part
            way = "move it away" if self.finished else "delete it to begin again"
            raise ConfigError(f"{shown_path(there)} has answers with {other}; {way}, or choose another -o")

    def write(self, result: BatchResult):
        self._append(f"{result.number} {'failed' if result.failed else 'ok'} {result.text}")
        self.done.add(result.number)

    def _append(self, text: str):
        """Add a line, whole or not at all."""
        assert self.file is not None
        data = text.encode("utf-8", "replace") + b"\n"
        goes_on = (f"; {len(self.done):,} of {self.source.count:,} lines are answered, and the same command "
                   "goes on")
        with named_errors(self.part, goes_on):
            try:
                write_all(self.file, data)
                if time.monotonic() - self.synced_s > SYNC_S:
                    os.fsync(self.file)
                    self.synced_s = time.monotonic()
            except OSError:
                os.ftruncate(self.file, self.size)
                raise
        self.size += len(data)

    def finish(self) -> int:
        """Write the output in the order of the input; returns how many of its lines are errors."""
        self.source.check_unchanged()
        assert self.file is not None
        new = self.path.with_name(f".{self.path.name[:100]}.{self.run}.new")
        note = self.path.with_name(f".{self.path.name[:100]}.{self.run}.of")
        goes_on = "; all lines are answered, and the same command writes them again"
        with named_errors(self.path, goes_on):
            try:
                for path in (new, note):  # of a run that was killed here
                    path.unlink(missing_ok=True)
                digest, failed = self._write_in_order(new)
                made = {"chat_server": KIND, "input": self.source.digest, "of": self.of,
                        "created": self.created, "output": digest}
                write_file(note, json.dumps(made).encode() + b"\n")
                os.replace(note, self.side)  # first: an output that it does not fit is refused
                if self.finished:
                    os.replace(new, self.path)
                else:
                    link_new(new, self.path)
            except FileExistsError:
                raise ConfigError(f"-o {shown_path(self.path)} has appeared meanwhile, and is not the output "
                                  f"for this file; move it away{goes_on}") from None
            finally:
                for path in (new, note):
                    path.unlink(missing_ok=True)
            if self._is_ours():
                self.part.unlink()
        return failed

    def _write_in_order(self, new: Path) -> tuple[str, int]:
        """(the output's digest, how many lines of it are errors)."""
        assert self.file is not None
        places = dict[int, tuple[int, int]]()
        failed = 0
        digest = hashlib.sha256()
        with open(self.file, "rb", closefd=False) as part, create(new) as output:
            part.seek(0)
            place = len(part.readline())
            place += len(part.readline())
            for line in part:
                number, status, text = line.split(b" ", 2)
                places[int(number)] = place + len(line) - len(text), len(text)
                place += len(line)
                failed += status == b"failed"
            for _, (begin, size) in sorted(places.items()):
                part.seek(begin)
                line = part.read(size)
                digest.update(line)
                output.write(line)
            output.flush()
            os.fsync(output.fileno())
        return digest.hexdigest(), failed

    def __exit__(self, *error):
        with suppress(OSError):
            if self.file is not None and self.of is None and self._is_ours():
                self.part.unlink()  # nothing was begun
        self._close()

    def _close(self):
        self.source.file.close()
        if self.file is not None:
            os.close(self.file)
            self.file = None


def side_of(path: Path) -> dict[str, Any] | None:
    """What a file beside an output says of it; None if it is none of ours."""
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                return head_of(os.read(file, LONGEST_HEAD))
        finally:
            os.close(file)
    return None


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_all(file: int, data: bytes):
    view = memoryview(data)
    while view:
        view = view[os.write(file, view):]


def write_file(path: Path, data: bytes):
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def link_new(new: str | Path, path: Path):
    """Give a file a second name. FileExistsError if that is taken."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError from None
        os.rename(new, path)
