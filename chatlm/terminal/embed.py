"""The command `embed`: the vectors of a file's texts, one a line or as a .npy file."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import struct
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence as Seq
from contextlib import aclosing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, RequestError, shown, visible
from chatlm.common.hub.find import with_embedder
from chatlm.common.hub.stamps import files_with
from chatlm.common.invocation import program_command
from chatlm.common.jsontext import is_text
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import Embedding
from chatlm.common.new_files import beside, create, refuse_inputs
from chatlm.front.api.dialects.retrieval import decoded_vector
from chatlm.front.api.reading import read_answer
from chatlm.front.pool.pool import known_about
from chatlm.terminal.chat import duration
from chatlm.terminal.output_path import named_errors, output_path, shown_path
from chatlm.terminal.remote import RemotePool, open_pool

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.pool import WorkerPool


TOGETHER = 256         # texts of a request
AHEAD = 2              # requests under way, so that the worker never waits for the next
LONGEST_LINE = 16 << 20
NPY_HEADER = 128       # bytes; with room for any number of vectors


class TextBatch(NamedTuple):
    """Some lines of the file."""

    first: int         # the number of its first line
    texts: list[str]
    share: float       # of the file that has been read with it


async def embed(settings: Settings) -> int:
    """The `embed` command. ConfigError for files that cannot be read or written, RequestError for texts that
    the model cannot embed."""
    texts = settings.texts
    is_model = settings.model is None and texts and (texts.lower().endswith(".gguf") or os.path.isdir(texts))
    if texts is None or settings.output is None or is_model:
        taken = f"; {visible(texts)} was taken as FILE" if texts else ""
        raise ConfigError("embed takes a FILE of JSON lines and -o FILE, and MODEL first if it is not the "
                          f"default embedder: `{program_command()} embed [MODEL] texts.jsonl -o vectors.npy`"
                          f"{taken}")
    began_s = time.monotonic()
    count = 0
    progress = ProgressDisplay()
    with open_texts(texts) as source, Vectors(settings.output, source) as vectors:
        try:
            settings = await asyncio.to_thread(with_embedder, settings, progress)
        finally:
            progress.close()
        async with open_pool(settings) as pool:
            assert not isinstance(pool, RemotePool) and pool.source  # the command has no --url
            if not vectors.to_stdout:
                refuse_inputs(vectors.path, files_with(pool.source.path, settings))
            try:
                async with aclosing(embedded(pool, settings, batches_of(texts, source))) as found:
                    async for batch, numbers in found:
                        vectors.write(numbers)
                        count += len(numbers)
                        progress("embedding", batch.share)
            finally:
                progress.close()
        vectors.finish()
    print(f"{count:,} vectors of {vectors.width:,} numbers in {duration(time.monotonic() - began_s)}",
          file=sys.stderr)
    return 0


async def embedded(pool: WorkerPool, settings: Settings,
                   batches: Iterator[TextBatch]) -> AsyncGenerator[tuple[TextBatch, list[Seq[float]]], None]:
    """The vectors of each batch, in order; the next ones are computed meanwhile."""
    under_way: list[tuple[TextBatch, asyncio.Task[list[Seq[float]]]]] = []
    try:
        for batch in batches:
            under_way.append((batch, asyncio.create_task(vectors_of(pool, settings, batch))))
            if len(under_way) == AHEAD:
                first, task = under_way.pop(0)
                yield first, await task
        while under_way:
            first, task = under_way.pop(0)
            yield first, await task
    finally:
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)


async def vectors_of(pool: WorkerPool, settings: Settings, batch: TextBatch) -> list[Seq[float]]:
    known = known_about(pool, settings)
    body = {"inputs": batch.texts, "truncate": settings.truncate, "dimensions": settings.dimensions,
            "prompt_name": settings.prompt_name}
    found: list[Seq[float]] = [[]] * len(batch.texts)
    try:
        request = replace(read_answer("/embed", body, known).request, id=secrets.token_hex(16))
        async with aclosing(pool.answer(request)) as events:
            async for event in events:
                if isinstance(event, Embedding):
                    found[event.choice] = [*decoded_vector(event)]
    except RequestError as error:
        last = batch.first + len(batch.texts) - 1
        raise RequestError(f"lines {batch.first:,} to {last:,} of {visible(settings.texts or '')}: {error}",
                           code=error.code, param=error.param) from None
    return found


@contextmanager
def open_texts(path: str) -> Iterator[BinaryIO]:
    """The file, or stdin for -. ConfigError if it cannot be opened."""
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        source = Path(path).expanduser().open("rb")
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{visible(path)}: {getattr(error, 'strerror', None) or error}") from None
    with source:
        yield source


def batches_of(path: str, source: BinaryIO) -> Iterator[TextBatch]:
    """The texts of a file of JSON lines: each a string, or an object with a `text`. Empty lines are skipped.
    ConfigError for any other line."""
    size = os.fstat(source.fileno()).st_size if path != "-" else 0
    texts = []
    first = 1
    number = 0
    read = 0
    while line := source.readline(LONGEST_LINE + 1):
        number = number + 1
        read = read + len(line)
        if len(line) > LONGEST_LINE:
            raise ConfigError(f"{visible(path)}: line {number:,} has more than {LONGEST_LINE >> 20} MiB")
        if line.strip():
            first = first if texts else number
            texts.append(text_of(line, f"{visible(path)}: line {number:,}"))
        if len(texts) == TOGETHER:
            yield TextBatch(first, texts, read / size if size else 0.0)
            texts = []
    if texts:
        yield TextBatch(first, texts, 1.0)


def text_of(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is not valid JSON: a text, or an object with a `text`") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not is_text(text) or not text.strip():
        raise ConfigError(f"{where} is {shown(value)}; it must be a text that is not empty, or an object "
                          "with such a `text`")
    return text


class Vectors:
    """The file of vectors, which appears under its name once it is complete: JSON lines, or numpy's format if
    it is called .npy. `-` is stdout."""

    def __init__(self, path: str, source: BinaryIO):
        self.to_stdout = path == "-"
        self.path = Path(path) if self.to_stdout else output_path(path)
        self.source = source
        self.width = 0
        self.count = 0
        self.is_array = self.path.suffix == ".npy"
        self.part = beside(self.path, "part")

    def __enter__(self) -> Vectors:
        if self.to_stdout:
            self.file: BinaryIO = sys.stdout.buffer
        else:
            with named_errors(self.path, flag="-o "), suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self.source.fileno())):
                    raise ConfigError(f"-o {shown_path(self.path)} is the input")
            with named_errors(self.path, flag="-o "):
                self.file = create(self.part)
        if self.is_array:
            self.file.write(self.header())
        return self

    def __exit__(self, *failure):
        if self.to_stdout:
            return
        with suppress(OSError):
            self.file.close()  # on a full disk it cannot write what it still has, as was said already
        self.part.unlink(missing_ok=True)

    def header(self) -> bytes:
        """https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""
        about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.count}, {self.width}), }}"
        return b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little") + \
            about.encode().ljust(NPY_HEADER - 11) + b"\n"

    def write(self, vectors: list[Seq[float]]):
        with self._named_errors():
            for vector in vectors:
                self.width = len(vector)
                self.count = self.count + 1
                self.file.write(struct.pack(f"<{len(vector)}f", *vector) if self.is_array else
                                b"[%s]\n" % ", ".join([f"{number:.9g}" for number in vector]).encode())

    def _named_errors(self):
        """ConfigError for what the system says of the file; stdout's errors are for the whole program."""
        return nullcontext() if self.to_stdout else named_errors(self.path, flag="-o ")

    def finish(self):
        """Complete the file."""
        with self._named_errors():
            if self.is_array:
                self.file.seek(0)
                self.file.write(self.header())
            self.file.flush()
            if not self.to_stdout:
                self.part.replace(self.path)
