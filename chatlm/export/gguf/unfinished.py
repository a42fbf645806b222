"""A file that is written piece by piece and appears once it is complete: `UnfinishedFile`.

FILE.part is what there is so far. FILE.part.json is its note: the job that it belongs to, and how many of the
pieces are safely on the disk. The same job goes on after them, another one begins anew. A lock on FILE.part
keeps two commands from writing it at once.

Neither is followed if it is a link, nor emptied if it is somebody else's. The note is written first. So a
FILE.part without a note, or one that does not begin as a GGUF file does, was not written here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import ConfigError, visible
from chatlm.common.new_files import create, not_ours, replace_with, take_up
from chatlm.common.sizes import shown_bytes

with suppress(ImportError):  # Windows has none; there nothing is locked
    import fcntl

CHANGED = "the model's files have changed while they were read"
SAFE_EVERY = 64 << 20  # bytes after which the disk is asked to have them
BEGIN = b"GGUF"
LONGEST_NOTE = 10_000


class ResumePoint(NamedTuple):
    """What FILE.part.json says."""

    job: str     # a digest of all that the file depends on
    pieces: int  # that are complete
    at: int      # where they end


def digest_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """One line for what the system says of the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> ConfigError:
    if error.errno == errno.EFAULT:  # what was to be written is memory that is mapped from a file
        return ConfigError(f"{CHANGED}; {visible(str(path))} is not complete")
    kept = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        kept = "; make room and run the same command, which goes on where it was"
    return ConfigError(f"-o {visible(str(path))}: {error.strerror or error}{kept}")


class UnfinishedFile:
    """Writes FILE.part and renames it to FILE at the end. ConfigError for what the system refuses."""

    def __init__(self, path: Path, job: str):
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.side = path.with_name(f"{path.name}.part.json")
        self.job = job
        self.at = 0          # where the next bytes go
        self.pieces = 0
        self.unsafe = 0      # bytes that the disk may not have yet
        with named_errors(self.part):
            self.file = self._open()
        try:
            self._lock()
            self._go_on()
        except BaseException:
            os.close(self.file)
            raise

    def _open(self) -> int:
        """The file's descriptor: a new one, or what an earlier run has left. ConfigError if something else
        has the name of the file or of its note."""
        stated = self._note()
        if os.path.lexists(self.side) and stated is None:
            raise not_ours(self.side)
        with suppress(FileNotFoundError):
            number = take_up(self.part)
            if stated is None or not BEGIN.startswith(os.pread(number, len(BEGIN), 0)):
                os.close(number)
                raise not_ours(self.part)
            return number
        self._write_note(ResumePoint(self.job, 0, 0))
        try:
            with create(self.part) as file:
                return os.dup(file.fileno())
        except FileExistsError:
            raise ConfigError(f"{visible(str(self.part))}: another command is writing it") from None

    def _lock(self):
        if "fcntl" not in globals():
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{visible(str(self.part))}: another command is writing it") from None
        with named_errors(self.part):
            here = os.fstat(self.file)
            try:
                there = os.lstat(self.part)
            except FileNotFoundError:
                there = None
        if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise ConfigError(f"{visible(str(self.path))}: another command has just written it")

    def _go_on(self):
        """Take over what an earlier run of the same job has written; drop anything else."""
        note = self._note()
        with named_errors(self.part):
            if note and note.job == self.job and os.fstat(self.file).st_size >= note.at:
                self.pieces = note.pieces
                self.at = note.at
            else:  # first: the other job must not go on after pieces of this one
                self._write_note(ResumePoint(self.job, 0, 0))
            os.ftruncate(self.file, self.at)

    def _note(self) -> ResumePoint | None:
        """What the note says; None if there is none, or it is not ours."""
        try:
            number = take_up(self.side, os.O_RDONLY)
            with open(number, "rb") as file:
                stated = json.loads(file.read(LONGEST_NOTE))
            note = ResumePoint(**stated)
        except (OSError, ValueError, TypeError, RecursionError, ConfigError):
            return None
        is_sound = type(note.job) is str and all(type(count) is int and count >= 0 for count in note[1:])
        return note if is_sound else None

    def _write_note(self, note: ResumePoint):
        replace_with(self.side, json.dumps(note._asdict()).encode())

    def reserve(self, size: int):
        """ConfigError at once if the disk has no room for the whole file."""
        with named_errors(self.path):
            with suppress(AttributeError):
                free = os.statvfs(self.part)
                has = os.fstat(self.file).st_blocks * 512
                if free.f_bavail * free.f_frsize + has < size:
                    raise OSError(errno.ENOSPC, f"no room for the file's {shown_bytes(size)}: "
                                                f"{shown_bytes(free.f_bavail * free.f_frsize)} are free")

    def write(self, data: bytes | memoryview):
        view = memoryview(data).cast("B")
        with named_errors(self.path):
            while view:
                count = os.pwrite(self.file, view, self.at)
                self.at += count
                self.unsafe += count
                view = view[count:]

    def end_piece(self):
        """What is written so far need not be written again."""
        self.pieces += 1
        if self.unsafe >= SAFE_EVERY:
            self.make_safe()

    def make_safe(self):
        with named_errors(self.path):
            os.fsync(self.file)
            self.unsafe = 0
            self._write_note(ResumePoint(self.job, self.pieces, self.at))

    def finish(self):
        """The file takes its name."""
        with named_errors(self.path):
            os.fsync(self.file)
            os.replace(self.part, self.path)
            with suppress(OSError):
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            with suppress(FileNotFoundError):
                os.unlink(self.side)

    def close(self):
        os.close(self.file)
