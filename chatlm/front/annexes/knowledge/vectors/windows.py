"""The windows of stores: read from the database, and kept in memory while there is room.

What is kept is brought up to date before each scan. Windows are only added, with numbers that are never used
again, or go with their file. So windows above the last number are read, and those of files that are gone no
longer count, nor those of files that are not completed yet."""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy

from chatlm.front.annexes.knowledge.vectors.scan import Block, rows_of_block

BUSY_S = 5.0  # how long another process may hold the database
WINDOWS = ("SELECT vector, scale, passage, file, number FROM knowledge_windows "
           "WHERE store = ? AND embedder = ? AND number > ? AND typeof(vector) = 'blob' "
           "AND typeof(scale) = 'real' AND abs(scale) < 1e9 AND typeof(passage) = 'integer' "
           "AND typeof(file) = 'integer' ORDER BY number")
FILES = ("SELECT number, windows, passages FROM knowledge_files "
         "WHERE store = ? AND deleted = 0 AND status = 'completed' ORDER BY number")
Files = Mapping[int, tuple[int, int]]  # the windows and passages of each


class BadVectors(Exception):
    """The database does not have what it should; the text says what."""


@dataclass
class Kept:
    """The windows of a store that one embedder has made."""

    blocks: list[Block] = field(default_factory=list)
    last: int = 0     # the highest number that was read
    bytes: int = 0
    files: Files = field(default_factory=dict)  # as they were when they were read

    def add(self, block: Block, size: int):
        """size: numbers of a vector."""
        if self.blocks and len(self.blocks[-1]) + len(block) <= rows_of_block(size):
            block = self.blocks.pop().joined(block)
        self.blocks.append(block)
        self.bytes = sum(block.bytes for block in self.blocks)


    def has_windows_of(self, files: Files) -> bool:
        """Are there as many windows as each file has? Not if some were read of a file that was begun, and
        then begun again."""
        there = numpy.concatenate([numpy.zeros(0, numpy.int64), *(block.files for block in self.blocks)])
        numbers, counts = numpy.unique(there, return_counts=True)
        found = dict(zip(numbers.tolist(), counts.tolist()))
        return all(found.get(number, 0) == windows for number, (windows, _) in files.items())


class Windows:
    """The windows of all stores. `kept_bytes` limits what is kept; a store that does not fit is read again
    for each scan."""

    def __init__(self, database: Path, kept_bytes: int):
        self.database = database
        self.kept_bytes = kept_bytes
        self.kept: OrderedDict[tuple[int, int], Kept] = OrderedDict()  # the one that was used last at the end
        self.place: tuple[int, int] | None = None

    def connect(self) -> sqlite3.Connection:
        """A connection that only reads. Forgets what is kept if the database is another file now."""
        found = os.stat(self.database)
        if (found.st_dev, found.st_ino) != self.place:
            self.kept.clear()
            self.place = found.st_dev, found.st_ino
        return sqlite3.connect(f"file:{quote(str(self.database))}?mode=ro", uri=True, timeout=BUSY_S,
                               isolation_level=None)

    @contextmanager
    def read(self, store: int, embedder: int, size: int) -> Iterator[tuple[numpy.ndarray, Iterator[Block]]]:
        """The numbers of a store's files, which ascend, and its windows, both as they are now. size: numbers
        of a vector. Raises sqlite3.Error, OSError, BadVectors."""
        with closing(self.connect()) as connection:
            connection.execute("BEGIN")  # one state of the database for all that is read
            files = {number: (windows, passages)
                     for number, windows, passages in connection.execute(FILES, (store,))}
            blocks = self._blocks(connection, store, embedder, files, size)
            yield numpy.fromiter(files, numpy.int64, len(files)), blocks

    def _blocks(self, connection: sqlite3.Connection, store: int, embedder: int, files: Files,
                size: int) -> Iterator[Block]:
        kept = self._usable(store, embedder, files)
        yield from kept.blocks
        fits = True
        for block, last in read_windows(connection, store, embedder, kept.last, size):
            yield block
            fits = fits and self._make_room(kept.bytes + block.bytes)
            if fits:
                kept.add(block, size)
                kept.last = last
            else:
                kept = Kept()
        if fits and (files == kept.files or kept.has_windows_of(files)):
            kept.files = files
            self.kept[store, embedder] = kept

    def _usable(self, store: int, embedder: int, files: Files) -> Kept:
        """What is kept of a store, unless some of it was replaced, or half of it is of files that have
        gone."""
        kept = self.kept.pop((store, embedder), None) or Kept()
        same = sum(files.get(number) == sizes for number, sizes in kept.files.items())
        changed = any(number in files and files[number] != sizes for number, sizes in kept.files.items())
        return Kept() if changed or 2 * same < len(kept.files) else kept

    def _make_room(self, size: int) -> bool:
        """Forget other stores until this one may take `size` bytes. Returns whether it may."""
        if size > self.kept_bytes:
            return False
        while size + sum(kept.bytes for kept in self.kept.values()) > self.kept_bytes:
            self.kept.popitem(last=False)
        return True


def read_windows(connection: sqlite3.Connection, store: int, embedder: int, after: int,
                 size: int) -> Iterator[tuple[Block, int]]:
    """The windows above a number, in blocks, each with its highest number. Rows that were damaged are left
    out."""
    cursor = connection.execute(WINDOWS, (store, embedder, after))
    while rows := cursor.fetchmany(rows_of_block(size)):
        sound = [row for row in rows if len(row[0]) == size]
        if not sound:
            raise BadVectors(f"a vector of the store has {len(rows[0][0]):,} numbers, and the question's "
                             f"{size:,}")
        vectors, scales, passages, files, numbers = zip(*sound)
        yield Block(numpy.frombuffer(b"".join(vectors), numpy.int8).reshape(-1, size),
                    numpy.array(scales, numpy.float64), numpy.array(passages, numpy.int64),
                    numpy.array(files, numpy.int64)), numbers[-1]
