"""What a bundle has beside the program: a model, and words for its command line.

The model is the beginning of the file, byte for byte, so that the bundle is a GGUF file too: its readers map
it from there, and nothing is copied. Python finds the program, a zip, from the end."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from chatlm.common.program import program_root

ABOUT = "about.json"


class BundledModel(NamedTuple):
    """The model in a bundle."""

    name: str               # of its file, without .gguf
    size: int               # the bytes of the bundle that are its
    sha256: str


class Contents(NamedTuple):
    model: BundledModel | None = None
    words: tuple[str, ...] = ()     # of `bundle --args`

    def packed(self) -> bytes:
        return json.dumps(self).encode()


def contents_of(bundle: zipfile.ZipFile) -> Contents:
    if ABOUT not in bundle.namelist():
        return Contents()
    model, words = json.loads(bundle.read(ABOUT))
    return Contents(BundledModel(*model) if model else None, tuple(words))


@functools.cache
def own_contents() -> Contents:
    """What the running bundle has; nothing in a checkout or an installation."""
    root = program_root()
    if not root.is_file():
        return Contents()
    with zipfile.ZipFile(root) as bundle:
        return contents_of(bundle)


def own_model() -> tuple[Path, str] | None:
    """(the running bundle, the name of the model that it begins with), or None."""
    model = own_contents().model
    return (program_root(), model.name) if model else None
