"""The log's formats, and loading progress on stderr."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump

if TYPE_CHECKING:
    from chatlm.common.config import Settings


log = logging.getLogger("chat_server")


def utc(at_s: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


class JsonLines(logging.Formatter):
    """--log-format json: one object per line, including the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        at = f"{utc(record.created)[:-1]}.{record.msecs:03.0f}Z"
        body = {"time": at, "level": record.levelname.lower(), "message": record.getMessage(),
                **getattr(record, "fields", {})}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return dump(body).decode()


class CalmLog(logging.StreamHandler):
    """The log. A repeated warning or error is written once per second, followed by its count, because clients
    can trigger some as often as they like."""

    def __init__(self):
        super().__init__()
        self.second = 0
        self.repeats: dict[tuple, list] = {}  # this second's warnings by kind: [first line, repeat count]

    def emit(self, record: logging.LogRecord):
        if int(record.created) != self.second:
            self._tell_repeats()
            self.second = int(record.created)
        if record.levelno >= logging.WARNING:
            error = record.exc_info and record.exc_info[0]
            key = record.name, record.levelno, str(record.msg).partition("\n")[0], error
            if key in self.repeats:
                self.repeats[key][1] += 1
                return
            self.repeats[key] = [record.getMessage().partition("\n")[0], 0]
        super().emit(record)

    def _tell_repeats(self):
        for (name, level, *_), (line, count) in self.repeats.items():
            if count:
                super().emit(logging.LogRecord(name, level, "", 0, "%d times more: %s", (count, line), None))
        self.repeats = {}

    def close(self):
        self._tell_repeats()
        super().close()


def start_logging(settings: Settings):
    handler = CalmLog()
    handler.setFormatter(
        JsonLines() if settings.log_format == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if settings.command == "serve" else logging.WARNING)


class ProgressDisplay:
    """Shows loading progress on stderr: a bar on a terminal, else one line per stage."""

    def __init__(self):
        self.stage, self.bar = "", sys.stderr.isatty()

    def __call__(self, stage: str, fraction: float):
        if self.bar:
            done = round(30 * min(max(fraction, 0.0), 1.0))
            print(f"\r\x1b[K{stage} [{'#' * done:30}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)
        elif stage != self.stage:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self.stage = stage

    def close(self):
        if self.bar and self.stage:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
