"""Segments: files, in memory or on a disk, in which KV pages outlive the process that computed them.

    segment = head, record, record, ..       record = header, payload
    head    = magic, random id               header = Record: what the payload is, its checksum, its own guard

The pages of a segment are one chain: each continues the page before it, and the first one begins a prefix or
continues a page of another segment. So a segment may be cut anywhere, and the rest remains usable.

The holder of a segment's lock (flock) may append, or cut its end and give it another id. Others only read,
and trust nothing: a record counts once it is complete and its header has the right guard, and its payload
once that has the right checksum. So a writer may die at any point, and a file may be cut, changed or deleted.

Files are read (pread), not mapped: if a mapped file is cut, or its disk fails, the process dies of
SIGBUS."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError

HEAD = struct.Struct("<8s8s")   # magic, id
MAGIC = b"cskv0002"
MOST_GROUPS = 256               # of layers, as bits
HEADER = struct.Struct(f"<4sH{MOST_GROUPS // 8}s16s16s16s{PAGE_SIZE}IQ16s")
GUARD_BYTES = 8
HEADER_BYTES = HEADER.size + GUARD_BYTES
# contents of a record: KV pages, a snapshot of states, the name of a model
PAGE = 0
STATE = 1
MODEL = 2
ROOT = bytes(16)                # the parent of the first page of a prefix
SUFFIX = ".pages"


class Record(NamedTuple):
    """The header of a record."""

    content: int             # PAGE, STATE or MODEL
    groups: int              # bits: the groups of layers whose page of these tokens is in the payload
    profile: bytes           # 16 bytes: identifies the weights and the arithmetic
    address: bytes           # 16 bytes: identifies the tokens up to its end, and their owner
    parent: bytes            # 16 bytes: the address of the page before; of a state, of the page it follows
    tokens: tuple[int, ...]  # the page's own; zeros if it has none
    size: int                # bytes of the payload
    checksum: bytes          # 16 bytes, of the payload

    def pack(self) -> bytes:
        header = HEADER.pack(b"CSKV", self.content, self.groups.to_bytes(MOST_GROUPS // 8, "little"),
                             self.profile, self.address, self.parent, *self.tokens, self.size, self.checksum)
        return header + guard(header)

    @classmethod
    def unpack(cls, data: bytes) -> Record | None:
        """None if it is not a valid header."""
        header = data[:HEADER.size]
        if len(data) < HEADER_BYTES or guard(header) != data[HEADER.size:HEADER_BYTES]:
            return None
        _, content, groups, profile, address, parent, *tokens, size, checksum = HEADER.unpack(header)
        return cls(content, int.from_bytes(groups, "little"), profile, address, parent, tuple(tokens), size,
                   checksum)

    @property
    def key(self) -> bytes:
        """Identifies it among all records."""
        return key_of(self.content, self.profile, self.address)

    @property
    def parent_key(self) -> bytes:
        """The key of the page that it continues; b"" if it continues none."""
        return b"" if self.parent == ROOT else key_of(PAGE, self.profile, self.parent)


def key_of(content: int, profile: bytes, address: bytes) -> bytes:
    return bytes([content]) + profile + address


def guard(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=GUARD_BYTES).digest()


def model_record(profile: bytes, name: str) -> bytes:
    """A complete record that names the model of a profile."""
    payload = name.encode()[:1000]
    return Record(MODEL, 0, profile, profile, ROOT, (0,) * PAGE_SIZE, len(payload),
                  hashlib.blake2b(payload, digest_size=16).digest()).pack() + payload


class Entry(NamedTuple):
    """A record seen in a segment."""

    segment: Segment
    key: bytes
    parent: bytes  # Record.parent_key
    begin: int     # offset of its header
    size: int      # of its payload

    @property
    def end(self) -> int:
        return self.begin + HEADER_BYTES + self.size


class Segment:
    """A file of records, and the records seen in it."""

    def __init__(self, path: str | Path, name: str, file: FileIO | None = None):
        """file: an open file in memory. A store's files are opened only for use, so that a deleted one is
        gone."""
        self.path = path
        self.name = name
        self.file = file
        # when last looked at
        self.size = 0
        self.used_ns = 0
        self.entries: list[Entry] = []     # all but MODEL records
        self.last = b""                    # the key of its last page
        self.forget()

    def forget(self):
        """Forget its content."""
        self.id = b""
        self.end = 0
        self.entries = []
        self.last = b""

    @contextmanager
    def opened(self, writable: bool = False) -> Iterator[int]:
        """Its descriptor."""
        if self.file:
            yield self.file.fileno()
        else:
            with open_file(self.path, writable) as file:
                yield file.fileno()

    @property
    def parent(self) -> bytes:
        """The key of the page that its first record continues, or b""."""
        return self.entries[0].parent if self.entries else b""

    @property
    def has_its_id(self) -> bool:
        """Whether one in memory is unchanged since it was last looked at."""
        return self.file is None or os.pread(self.file.fileno(), HEAD.size, 0)[len(MAGIC):] == self.id

    def continues(self, record: Record) -> bool:
        """Whether a record may be appended. A page must continue its last page; a state, any of its pages."""
        return not self.entries or self.last == record.parent_key != b"" or record.content == STATE and any(
            record.parent_key == entry.key for entry in self.entries)

    def restart(self, descriptor: int):
        """Holding its lock: erase its content."""
        os.ftruncate(descriptor, 0)
        self.forget()
        self.id = secrets.token_bytes(8)
        write_whole(descriptor, HEAD.pack(MAGIC, self.id), 0)
        self.end = HEAD.size

    def restarted(self, descriptor: int) -> bool:
        """Whether it was cut or restarted since it was last looked at; reading then starts over."""
        head = os.pread(descriptor, HEAD.size, 0)
        magic, id_ = HEAD.unpack(head) if len(head) == HEAD.size else (b"", b"")
        if magic == MAGIC and id_ == self.id and self.end <= os.fstat(descriptor).st_size:
            return False
        self.forget()
        if magic == MAGIC:
            self.id = id_
            self.end = HEAD.size
        return True

    def news(self, descriptor: int) -> Iterator[tuple[Record, Entry]]:
        """The records added since then."""
        size = os.fstat(descriptor).st_size
        while self.end and self.end + HEADER_BYTES <= size:
            record = Record.unpack(os.pread(descriptor, HEADER_BYTES, self.end))
            if record is None or self.end + HEADER_BYTES + record.size > size:
                return
            yield record, self.note(record)

    def note(self, record: Record) -> Entry:
        """Note a record at its end."""
        return self.add(Entry(self, record.key, record.parent_key, self.end, record.size))

    def add(self, entry: Entry) -> Entry:
        """Note a record at its end that is a copy of another segment's."""
        entry = entry._replace(segment=self, begin=self.end)
        self.end = entry.end
        if entry.key[0] != MODEL:
            self.entries.append(entry)
        if entry.key[0] == PAGE:
            self.last = entry.key
        return entry

    def append(self, descriptor: int, record: Record, payload) -> Entry:
        """Holding its lock: add a record. OSError if there is no room; the segment is then unchanged."""
        try:
            write_whole(descriptor, record.pack(), self.end)
            write_whole(descriptor, payload, self.end + HEADER_BYTES)
        except OSError:
            os.ftruncate(descriptor, self.end)
            raise
        return self.note(record)

    def read(self, entry: Entry, buffer: bytearray | None = None) -> tuple[Record, memoryview] | None:
        """The record at an entry's offset, if its payload has the entry's size, else None. The caller checks
        its key and checksum. buffer: where to read it; one that is too small is replaced by another."""
        size = HEADER_BYTES + entry.size
        if buffer is None or len(buffer) < size:
            buffer = bytearray(size)
        view = memoryview(buffer)[:size]
        done = 0
        with self.opened() as descriptor:
            while done < len(view):
                if not (count := os.preadv(descriptor, [view[done:]], entry.begin + done)):
                    return None
                done += count
        record = Record.unpack(bytes(view[:HEADER_BYTES]))
        return (record, view[HEADER_BYTES:]) if record and record.size == entry.size else None


def open_file(path: str | Path, writable: bool) -> FileIO:
    """OSError unless it is a regular file of this user; opening a FIFO does not block."""
    mode, flags = ("r+b", os.O_RDWR) if writable else ("rb", os.O_RDONLY)
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(f"{path} is not a file of this user's")
    return FileIO(descriptor, mode)


@contextmanager
def locked(descriptor: int, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of an open segment; yields False, without waiting, if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def write_whole(descriptor: int, data, offset: int):
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = offset + count


# The store: a folder of segments

def check_folder(path: Path) -> Path:
    """The folder of a store, created if missing, with access for its user only. ConfigError if it cannot be
    trusted."""
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
        raise ConfigError(f"--prefix-store {path}: other users can write to the folder (chmod 700)")
    return path


def segment_paths(folder: Path) -> list[Path]:
    """The segment files in a store's folder. OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries
                if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False)]
