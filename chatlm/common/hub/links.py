"""Links in a model's folder. Whoever made the folder chose where they lead: a chat template that is a link to
a private file would be shown to every client, copied by `export` and published by `push`.

So a link stays inside the folder or leads into a cache of the hub, which keeps its files that way."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.hub.local import hub_cache

# Files whose text a model shows or says. Weights may lie on another disk: as such nothing but weights is read
OF_TEXT = (".json", ".jinja", ".yaml", ".txt", ".model", ".tiktoken", ".bpe", ".pkl")
MOST_ENTRIES = 2000


def refuse_links_out(folder: Path):
    """ConfigError if a text of a model, in its folder or one folder below, lies elsewhere."""
    for path in texts_in(folder):
        refuse_outside(path, folder)


def refuse_outside(path: Path, folder: Path):
    """ConfigError if a file of a model's folder lies elsewhere: not in the folder, nor in a cache of the
    hub."""
    lies = Path(os.path.realpath(path))
    if not any(lies.is_relative_to(root) for root in roots_of(folder)):
        raise ConfigError(f"{path} leads to {lies}, outside of the model's folder; links may lead to files "
                          "in the folder or in the hub's cache: copy the file there")


def roots_of(folder: Path) -> Iterator[Path]:
    """Where the files of a folder may lie."""
    real = Path(os.path.realpath(folder))
    yield real
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
    yield Path(os.path.realpath(hub_cache()))


def texts_in(folder: Path) -> Iterator[Path]:
    for path in itertools.islice(folder.iterdir(), MOST_ENTRIES):
        if path.is_dir():
            below = itertools.islice(path.iterdir(), MOST_ENTRIES)
            yield from (each for each in below if each.suffix in OF_TEXT)
        elif path.suffix in OF_TEXT:
            yield path
