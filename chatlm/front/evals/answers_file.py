"""Keeps answers to the items of a suite in a file, a line for each item, so that a later run can go on.

There is a file for each suite and each model's weights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.new_files import open_growing, open_kept

if TYPE_CHECKING:
    from io import RawIOBase
    from chatlm.common.config import Settings
    from chatlm.front.evals.bpb import Texts
    from chatlm.front.evals.bundle import Suite
    from chatlm.front.evals.scores import Scorer


def results_folder(named: str | None) -> Path:
    """The folder of --results, or the user's own one, which only its owner can read. Raises ConfigError if it
    cannot be made."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        if named:
            path = Path(named).expanduser()
        else:
            path = Path(state or Path.home() / ".local" / "state") / "chat_server" / "evals"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not named:
            path.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--results {named or '~/.local/state/chat_server/evals'}: "
                          f"{getattr(error, 'strerror', None) or error}") from None
    return path


def file_word(text: str) -> str:
    """A name in the form that may be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", text)[:80].strip(".-") or "model"


def answers_file_name(settings: Settings, scorer: Scorer, model: str, suite: Suite | Texts,
                      cut: int | None) -> str:
    """The name of the file for a model's answers to a suite. Other weights, items, numbers of items or
    arithmetic have another name."""
    most = cut or "all"
    key = json.dumps([scorer.digest, scorer.longest, scorer.room, suite.digest, most, settings.dtype,
                      settings.quantize, settings.kv_cache_dtype, scorer.arithmetic, settings.softcap,
                      settings.lora, settings.url])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return f"{file_word(model)}-{file_word(suite.name)}-{most}-{digest}"


def answers_file_path(folder: Path, name: str) -> Path:
    """The file with a name of `answers_file_name`. If there is none, but one that the same weights have under
    another model's name, it is that one."""
    path = folder / f"{name}.jsonl"
    digest = re.search(r"-[0-9a-f]{24}$", name)
    if digest and not path.exists():
        return next(folder.glob(f"*{digest[0]}.jsonl"), path)
    return path


def is_answer(item: Mapping) -> bool:
    """Whether a line has the result of an item: a verdict, or the nats of a text. Raises KeyError if it has
    neither."""
    if type(item.get("correct")) is bool:
        return isinstance(item["margin"], (int, float, type(None)))
    return isinstance(item["nats"], float) and type(item["bytes"]) is int


class AnswersFile:
    """The answers of one model to one suite's items, those of earlier runs included. A line that a kill has
    cut off counts as absent."""

    def __init__(self, folder: Path | None, name: str,
                 unkept: Callable[[Path, OSError], None] | None = None):
        """folder: None keeps answers in memory only. unkept: called if the file cannot be read or written;
        then answers stay in memory. Without `unkept`, ConfigError is raised."""
        self.items: dict[tuple[str, int], Mapping] = {}
        self.writing: RawIOBase | None = None
        self.unkept = unkept
        if folder is None:
            return
        self.path = answers_file_path(folder, name)
        data = b""
        try:
            with suppress(FileNotFoundError):
                with open_kept(self.path) as file:
                    data = file.read()
                self._read(data)
            self.writing = open_growing(self.path)
            if data and not data.endswith(b"\n"):
                self.writing.write(b"\n")
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError):
        if not self.unkept:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        self.close()
        self.writing = None
        self.unkept(self.path, error)

    def _read(self, data: bytes):
        for line in data.split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                item = json.loads(line)
                if is_answer(item):
                    self.items[str(item["task"]), int(item["item"])] = item

    def find(self, task: str, index: int) -> Mapping | None:
        return self.items.get((task, index))

    def add(self, item: Mapping):
        self.items[item["task"], item["item"]] = item
        if self.writing:
            line = json.dumps(item).encode() + b"\n"
            try:
                if self.writing.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._fail(error)

    def close(self):
        if self.writing:
            self.writing.close()
