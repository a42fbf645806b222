"""Segments: files, in memory or on a disk, in which KV pages outlive the process that computed them.

    segment = head, record, record, ..       record = header, payload
    head    = magic, random id               header = Record: what the payload is, its checksum, its own guard

A segment has one writer, which holds its lock (flock) and only appends; anybody else reads. A reader believes
nothing: a record counts once it is there whole and its header has the right guard, and its payload once
that has the right checksum. So a writer may end anywhere, and a file may be cut, changed or deleted.

Files are read (pread), not mapped: where a mapped file is cut, or its disk fails, the process dies by
SIGBUS."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError

HEAD = struct.Struct("<8s8s")   # magic, id
MAGIC = b"cskv0001"
HEADER = struct.Struct(f"<4sHH16s16s{PAGE_SIZE}IQ16s")
GUARD_BYTES = 8
HEADER_BYTES = HEADER.size + GUARD_BYTES
PAGE, STATE, MODEL = 0, 1, 2    # contents of a record: KV pages, a snapshot of states, the name of a model
SUFFIX = ".pages"


class Record(NamedTuple):
    """The header of a record."""

    content: int             # PAGE, STATE or MODEL
    groups: int              # bits: the groups of layers whose page of these tokens is in the payload
    profile: bytes           # 16 bytes: which weights, and which arithmetic
    address: bytes           # 16 bytes: which tokens before and in it, whose
    tokens: tuple[int, ...]  # the page's own; without any, zeros
    size: int                # bytes of the payload
    checksum: bytes          # 16 bytes, of the payload

    def pack(self) -> bytes:
        header = HEADER.pack(b"CSKV", self.content, self.groups, self.profile, self.address, *self.tokens,
                             self.size, self.checksum)
        return header + guard(header)

    @classmethod
    def unpack(cls, data: bytes) -> Record | None:
        """None if it is no header."""
        header = data[:HEADER.size]
        if len(data) < HEADER_BYTES or guard(header) != data[HEADER.size:HEADER_BYTES]:
            return None
        _, content, groups, profile, address, *tokens, size, checksum = HEADER.unpack(header)
        return cls(content, groups, profile, address, tuple(tokens), size, checksum)

    @property
    def key(self) -> bytes:
        """What tells it from all other records."""
        return bytes([self.content]) + self.profile + self.address


def guard(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=GUARD_BYTES).digest()


def model_record(profile: bytes, name: str) -> bytes:
    """A whole record that names the model of a profile."""
    payload = name.encode()[:1000]
    return Record(MODEL, 0, profile, profile, (0,) * PAGE_SIZE, len(payload),
                  hashlib.blake2b(payload, digest_size=16).digest()).pack() + payload


class Segment:
    """An open segment, and how far its records have been looked at."""

    def __init__(self, path: str | Path, name: str, writable: bool = False):
        """OSError if it cannot be opened, or is another user's."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self.file = FileIO(os.open(path, flags), "r+b" if writable else "rb")
        self.name, self.id, self.end = name, b"", 0
        status = os.fstat(self.file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(f"{path} is not a file of this user's")

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    @property
    def used_s(self) -> float:
        """When something was last read from it or written to it."""
        return os.fstat(self.file.fileno()).st_mtime

    def touch(self):
        with suppress(OSError):  # a read-only file system
            os.utime(self.file.fileno())

    def lock(self) -> bool:
        """Become its writer, unless it has one."""
        with suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def unlock(self):
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def restart(self):
        """As its writer: forget all that is in it."""
        os.ftruncate(self.file.fileno(), 0)
        self.id = secrets.token_bytes(8)
        os.pwrite(self.file.fileno(), HEAD.pack(MAGIC, self.id), 0)
        self.end = HEAD.size

    def restarted(self) -> bool:
        """Has its writer forgotten what was in it when it was last looked at? It is then looked at anew."""
        head = os.pread(self.file.fileno(), HEAD.size, 0)
        magic, id_ = HEAD.unpack(head) if len(head) == HEAD.size else (b"", b"")
        if magic == MAGIC and id_ == self.id:
            return False
        self.id, self.end = (id_, HEAD.size) if magic == MAGIC else (b"", 0)
        return True

    def news(self) -> Iterator[tuple[int, Record]]:
        """The records that were added since, each with the place of its payload."""
        descriptor, size = self.file.fileno(), self.size
        while self.end and self.end + HEADER_BYTES <= size:
            record = Record.unpack(os.pread(descriptor, HEADER_BYTES, self.end))
            if record is None or self.end + HEADER_BYTES + record.size > size:
                return
            place = self.end + HEADER_BYTES
            self.end = place + record.size
            yield place, record

    def append(self, record: Record, payload) -> int:
        """As its writer: add a record; returns the place of its payload. OSError if there is no room, and
        then it is as before."""
        descriptor, header = self.file.fileno(), record.pack()
        try:
            for place, data in ((self.end, header), (self.end + HEADER_BYTES, payload)):
                write_whole(descriptor, data, place)
        except OSError:
            os.ftruncate(descriptor, self.end)
            raise
        place = self.end + HEADER_BYTES
        self.end = place + record.size
        return place

    def read(self, place: int, size: int) -> tuple[Record, memoryview] | None:
        """What is there: a record whose payload begins at this place and has so many bytes, or None. Whether
        it is the right one, its key and its checksum say."""
        view, done = memoryview(bytearray(HEADER_BYTES + size)), 0
        while done < len(view):
            if not (count := os.preadv(self.file.fileno(), [view[done:]], place - HEADER_BYTES + done)):
                return None
            done += count
        record = Record.unpack(bytes(view[:HEADER_BYTES]))
        return (record, view[HEADER_BYTES:]) if record and record.size == size else None


def write_whole(descriptor: int, data, place: int):
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count


# The store: a folder of segments

def check_folder(path: Path) -> Path:
    """The folder of a store, made if it is missing; only its user may look into it. ConfigError if it cannot
    be trusted."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except FileExistsError:
        raise ConfigError(f"--prefix-store {path}: it is not a folder") from None
    except OSError as error:
        raise ConfigError(f"--prefix-store {path}: {error.strerror or error}") from None
    if status.st_uid != os.geteuid():
        raise ConfigError(f"--prefix-store {path}: the folder belongs to another user")
    if status.st_mode & 0o077 and all(name.endswith((SUFFIX, ".json")) for name in os.listdir(path)):
        with suppress(OSError):  # a read-only file system
            path.chmod(0o700)
    if path.stat().st_mode & 0o022:
        raise ConfigError(f"--prefix-store {path}: other users may write into the folder (chmod 700)")
    return path


def segment_paths(folder: Path) -> list[Path]:
    """OSError if the folder cannot be read."""
    return [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)]


def prune(folder: Path, most_bytes: int, most_files: int = 1 << 30) -> int:
    """Delete the least recently used segments that nobody writes until the others have at most so many bytes;
    returns how many were deleted."""
    sizes = {}
    for path in segment_paths(folder):
        with suppress(OSError):
            status = path.stat()
            sizes[path] = status.st_mtime, status.st_size
    total, deleted = sum(size for _, size in sizes.values()), 0
    for path in sorted(sizes, key=sizes.__getitem__):
        if total <= most_bytes and len(sizes) - deleted <= most_files:
            break
        with suppress(OSError):
            segment = Segment(path, path.name)
            with segment.file:
                if segment.lock():
                    path.unlink()
                    total, deleted = total - sizes[path][1], deleted + 1
    return deleted


def listed_store(folder: Path, most_bytes: int | None = None) -> list[str]:
    """What lies in a store, in lines; before that it is pruned to so many bytes, if told. ConfigError if it
    cannot be read."""
    if most_bytes is not None:
        try:
            pruned = prune(folder, most_bytes)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror or error}") from None
        return [f"{pruned:,} segments deleted", *listed_store(folder)]
    names, pages, states, sizes = {}, Counter(), Counter(), Counter()
    used, total, count = {}, 0, 0
    try:
        for path in segment_paths(folder):
            with suppress(FileNotFoundError):
                segment = Segment(path, path.name)
                with segment.file:
                    total, count = total + segment.size, count + 1
                    segment.restarted()
                    for place, record in segment.news():
                        if record.content == MODEL:
                            text = os.pread(segment.file.fileno(), record.size, place)
                            names[record.profile] = text.decode(errors="replace")
                        counted = pages if record.content == PAGE else states
                        counted[record.profile] += record.content < MODEL
                        sizes[record.profile] += HEADER_BYTES + record.size
                        used[record.profile] = max(used.get(record.profile, 0.0), segment.used_s)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}") from None
    lines = [f"{folder}: {count:,} segments, {total / 1e6:,.1f} MB"]
    for profile in sorted(used, key=used.__getitem__, reverse=True):
        snapshots = f" and {states[profile]:,} snapshots of states" if states[profile] else ""
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(used[profile]))
        name = json.dumps(names.get(profile, "an unnamed model"), ensure_ascii=False)[1:-1]
        lines.append(
            f"  {name}: {pages[profile] * PAGE_SIZE:,} tokens in {pages[profile]:,} pages{snapshots}, "
            f"{sizes[profile] / 1e6:,.1f} MB, last used {at}, profile {profile.hex()[:12]}")
    return lines
