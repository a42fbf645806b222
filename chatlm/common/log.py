"""Log formats, lines for the operator, and loading progress on stderr."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

from chatlm.common.errors import UNSEEN, printable, visible
from chatlm.common.jsontext import dump
from chatlm.common.standard_streams import Unfailing

if TYPE_CHECKING:
    from chatlm.common.config import Settings


log = logging.getLogger("chat_server")
CLEAR = "\r\x1b[K"  # a terminal's line


def utc(at_s: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


def wrapped(text: str, file: TextIO) -> str:
    """Text for `file`: on a terminal, long lines are wrapped at words, and what continues one is indented."""
    if not file.isatty():
        return text
    width = 80
    with suppress(OSError, ValueError):
        width = max(os.get_terminal_size(file.fileno()).columns, 24)
    fill = partial(textwrap.fill, width=width, subsequent_indent="    ", expand_tabs=False,
                   replace_whitespace=False, break_long_words=False, break_on_hyphens=False)
    return "\n".join(fill(line) if len(line) > width else line for line in text.split("\n"))


class TextLines(logging.Formatter):
    """--log-format text. A record's later lines are indented, so that a file name with line breaks cannot
    look like a record of its own."""

    def __init__(self):
        super().__init__("%(asctime)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record)).replace("\n", "\n    ")


class JsonLines(logging.Formatter):
    """--log-format json: one object per line, including the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        at = f"{utc(record.created)[:-1]}.{record.msecs:03.0f}Z"
        library = {} if record.name == log.name else {"logger": record.name}
        body = {"time": at, "level": record.levelname.lower(), "message": record.getMessage(), **library,
                **getattr(record, "fields", {})}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return re.sub(UNSEEN, lambda found: f"\\u{ord(found[0]):04x}", dump(body).decode())


class CalmLog(logging.StreamHandler):
    """The log. A repeated warning or error is written once per second, followed by its count, because clients
    can trigger some as often as they like."""

    over_bar = False  # whether the terminal's last line is a progress bar, which the next log line replaces

    def __init__(self):
        super().__init__()
        self.second = 0
        self.repeats: dict[tuple, list] = {}  # this second's warnings by kind: [first line, repeat count]

    def emit(self, record: logging.LogRecord):
        if int(record.created) != self.second:
            self._log_repeats()
            self.second = int(record.created)
        if record.levelno >= logging.WARNING:
            error = record.exc_info and record.exc_info[0]
            key = record.name, record.levelno, str(record.msg).partition("\n")[0], error
            if key in self.repeats:
                self.repeats[key][1] += 1
                return
            self.repeats[key] = [record.getMessage().partition("\n")[0], 0]
        if self.over_bar and self.stream.isatty():
            self.stream.write(CLEAR)
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return wrapped(text, self.stream) if isinstance(self.formatter, TextLines) else text

    def _log_repeats(self):
        for (name, level, *_), (line, count) in self.repeats.items():
            if count:
                super().emit(logging.LogRecord(name, level, "", 0, "%d more times: %s", (count, line), None))
        self.repeats = {}

    def close(self):
        self._log_repeats()
        super().close()


def start_logging(settings: Settings):
    handler = CalmLog()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if settings.command == "serve" else logging.WARNING)
    logging.captureWarnings(True)


def json_handler() -> CalmLog | None:
    """The log's handler if it writes JSON, else None."""
    for handler in logging.root.handlers:
        if isinstance(handler, CalmLog) and isinstance(handler.formatter, JsonLines):
            return handler


@contextmanager
def output_as_log() -> Iterator[None]:
    """With a JSON log, everything that this process and its children write to stdout or stderr becomes part
    of it: JSON lines unchanged, any other line as a warning."""
    if not (handler := json_handler()):
        yield
        return
    own = [os.dup(number) for number in (1, 2)]
    handler.setStream(Unfailing(io.BufferedWriter(io.FileIO(own[1], "w")), "utf-8", "replace"))
    reading, writing = os.pipe()
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    reader = threading.Thread(target=read_output, args=(reading, handler), daemon=True)
    reader.start()
    try:
        yield
    finally:
        for number, stream, before in zip((1, 2), (sys.stdout, sys.stderr), own):
            stream.flush()
            os.dup2(before, number)
        reader.join(2)  # a child that outlives us keeps the pipe open


def read_output(reading: int, handler: CalmLog):
    """Pass on the lines of a pipe until it ends."""
    with open(reading, "rb") as pipe:
        for line in iter(partial(pipe.readline, 1 << 24), b""):
            text = line.decode("utf-8", "replace").rstrip()
            if text.startswith('{"time": "') and text.endswith("}"):
                handler.acquire()
                handler.stream.write(text + "\n")
                handler.flush()
                handler.release()
            elif text:
                log.warning(text)


def tell(text: str, level: int = logging.INFO, file: TextIO | None = None):
    """Print a line for the operator: to a JSON log, else to stderr or another `file`."""
    if json_handler():
        log.log(level, text.strip())
    else:
        screen = file or sys.stderr
        print(wrapped(visible(text), screen), file=screen, flush=True)


class ProgressDisplay:
    """Shows loading progress on stderr: a bar on a terminal, else one line per stage."""

    def __init__(self):
        self.stage = ""
        self.bar = sys.stderr.isatty()

    def __call__(self, stage: str, fraction: float):
        stage = printable(stage)
        if self.bar:
            done = round(30 * min(max(fraction, 0.0), 1.0))
            print(f"{CLEAR}{stage} [{'#' * done:30}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)
            CalmLog.over_bar = True
        elif stage != self.stage:
            tell(f"{stage} ...")
        self.stage = stage

    def close(self):
        if self.bar and self.stage:
            print(CLEAR, end="", file=sys.stderr, flush=True)
            CalmLog.over_bar = False
