"""What a mistyped MODEL may have meant."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path

from chatlm.common.errors import did_you_mean, nearest
from chatlm.common.hub.short_names import SHORT_NAMES

MOST_FILES = 10_000  # of a folder, whose names are compared


def near_model(model: str, commands: Seq[str] = ()) -> str:
    """The words "; did you mean X?", or nothing: one of these commands, a file or folder, a short name, or
    an id of the hub. A command is no MODEL: it was not the first word."""
    if model in commands:
        return f"; the command {model} must come first, before all flags."
    if "/" in model:
        return near_path(model) or near_id(model)
    return (did_you_mean(model, commands, "the command ")
            or near_path(model)
            or did_you_mean(model.lower().replace(":", "-"), SHORT_NAMES)
            or near_id(model))


def near_path(model: str) -> str:
    """A model that is in the folder in which this one is not."""
    path = Path(model).expanduser()
    names = list[str]()
    with suppress(OSError, RuntimeError):
        for entry in path.parent.iterdir():
            if entry.suffix.lower() == ".gguf" or (entry / "config.json").exists():
                names.append(entry.name)
            if len(names) == MOST_FILES:
                break
    near = nearest(path.name, names)
    return "" if near is None else f"; did you mean {path.parent / near}?"


def near_id(model: str) -> str:
    """An id that has a short name; upper and lower case are alike, and so is one without its organization."""
    ids = {part: name for name in SHORT_NAMES.values()
           for part in (name.lower(), name.lower().partition("/")[2])}
    if model in ids.values():
        return ""
    near = nearest(model.lower(), ids)
    return "" if near is None else f"; did you mean {ids[near]}?"
