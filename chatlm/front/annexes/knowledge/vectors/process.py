"""The role `vectors`: a process that the front asks for the passages nearest to a vector."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.child import join_parent
from chatlm.front.annexes.knowledge.vectors.messages import (
    VECTORS_PIPE, Scan, Scanned, ScanFailed, VectorsConfig)
from chatlm.front.annexes.knowledge.vectors.scan import Best, Question, is_among
from chatlm.front.annexes.knowledge.vectors.windows import BadVectors, Windows

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Channel


def vectors_main(arguments: Seq[str]) -> int:
    """The role `vectors FD PARENT`: answer each Scan until the front hangs up."""
    channel = join_parent(arguments, VECTORS_PIPE)
    try:
        serve(channel)
    except (EOFError, ConnectionError):
        pass
    except BadMessage:
        return 1
    return 0


def serve(channel: Channel):
    [config] = channel.receive(wait=True, most=1)
    if not isinstance(config, VectorsConfig):
        raise BadMessage(f"its first message is {type(config).__name__}")
    windows = Windows(Path(config.database), config.kept_bytes)
    while True:
        [scan] = channel.receive(wait=True, most=1)
        try:
            channel.send(scanned(windows, scan))
        except (sqlite3.Error, OSError, BadVectors, MemoryError) as error:
            if isinstance(error, ConnectionError):
                raise
            channel.send(ScanFailed(str(error) or type(error).__name__))


def scanned(windows: Windows, scan: Scan) -> Scanned:
    """The answer to a Scan."""
    vector = numpy.frombuffer(scan.vector, "<f4")
    wanted = None if scan.files is None else numpy.unique(numpy.array(scan.files, numpy.int64))
    question = Question(vector)
    best = Best(question, scan.most, scan.others)
    for store in scan.stores:
        with windows.read(store, scan.embedder, question.size) as (there, blocks):
            files = there if wanted is None else there[is_among(there, wanted)]
            for block in blocks:
                best.compare(block, files)
    return Scanned(*best.result(), best.windows)
