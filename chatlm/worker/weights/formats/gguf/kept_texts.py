"""Tokenizers of GGUF files in this user's cache. Making one takes 0.1 s for 49,152 tokens, and 2 s for the
262,144 of a Gemma.

A kept one is found by a digest of all that it is made of: every byte of the file's metadata, and the source
of the modules that read them. So a file that was replaced or edited, even within its time stamp, finds
nothing or what is its own, and so does another version of the program. It begins with a digest of the rest,
which is checked each time: one that is cut off or damaged is made again. Nothing depends on the cache:
whatever fails, the tokenizer is made."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from chatlm.common.messages.requests import TextSpec
from chatlm.common.messages.wire import as_plain_json, object_restorer
from chatlm.common.new_files import beside, create, regular
from chatlm.common.program import program_sources
from chatlm.common.unpack import cache_folder, check_ours
from chatlm.worker.weights.text.vocabulary import Vocabulary

FOLDER = "texts"
MOST_KEPT = 8             # files of 2 to 30 MB; those that were used longest ago go first
MOST_BYTES = 1 << 28
LEAST_BYTES = 1 << 18     # of metadata: what is made of fewer is made as fast as it is found
MADE_BY = "chatlm/worker/weights", "chatlm/common/text", "chatlm/common/messages"  # folders of modules


class MadeText(NamedTuple):
    """What a file's metadata say of its texts."""

    text: TextSpec
    vocabulary: Vocabulary | None
    misnamed: list[str] = []   # what counts as a control token though the file says otherwise
    templates: list[str] = []  # the names of chat templates that are not used


class KeptFields(NamedTuple):
    """The JSON in a kept file. `payload`, `texts`, `ends`: the bytes of what follows it."""

    text: TextSpec       # without its payload
    added: list[dict]
    decoder: dict | None
    misnamed: list[str]
    templates: list[str]
    payload: int
    texts: int
    ends: int


def kept_or_made(metadata: memoryview, make: Callable[[], MadeText]) -> MadeText:
    """What `make` returned when it was called for these bytes before, or what it returns now."""
    if len(metadata) < LEAST_BYTES:
        return make()
    path = None
    with suppress(Exception):  # nothing is kept, or something else is in its place
        path = place_of(metadata)
        return read_kept(path)
    made = make()
    if path and made.vocabulary:
        with suppress(OSError):
            keep(path, made, made.vocabulary)
    return made


def place_of(metadata: memoryview) -> Path:
    """Where the text is kept; OSError if that cannot be said, or if others can write there."""
    folder = cache_folder().with_name(FOLDER)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(folder.lstat(), folder)
    digest = hashlib.sha256(metadata)
    sources = 0
    for name, source in sources_of_makers():
        digest.update(f"{name} {len(source)}\n".encode() + source)
        sources += 1
    if not sources:
        raise OSError("the program has no sources here")
    return folder / digest.hexdigest()


def sources_of_makers() -> Iterator[tuple[str, bytes]]:
    for folder in MADE_BY:
        yield from program_sources(folder=folder).items()


def read_kept(path: Path) -> MadeText:
    """An error of any kind if nothing is kept there, or something else."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(regular(opened), "rb") as file:
        check_ours(os.fstat(file.fileno()), path)
        data = memoryview(file.read(MOST_BYTES))
    size = hashlib.sha256().digest_size
    if len(data) <= size or hashlib.sha256(data[size:]).digest() != data[:size]:
        raise OSError(f"{path} is damaged")
    with suppress(OSError):
        os.utime(path, follow_symlinks=False)
    end = size + 8
    end += int.from_bytes(data[size:end], "little")
    fields = object_restorer(KeptFields)(json.loads(bytes(data[size + 8:end])))
    parts = []
    for length in (fields.payload, fields.texts, fields.ends):
        parts.append(bytes(data[end:end + length]))
        end += length
    payload, texts, ends = parts
    vocabulary = Vocabulary(texts, array("I", ends), fields.added, fields.decoder)
    return MadeText(replace(fields.text, payload=payload), vocabulary, fields.misnamed, fields.templates)


def keep(path: Path, made: MadeText, vocabulary: Vocabulary):
    """Processes that start together may each write it: the last one wins, with the same bytes."""
    texts, ends, added, decoder = vocabulary
    payload = made.text.payload
    fields = KeptFields(replace(made.text, payload=b""), added, decoder, made.misnamed, made.templates,
                        len(payload), len(texts), len(ends) * ends.itemsize)
    stated = as_plain_json(fields).encode()
    content = b"".join((len(stated).to_bytes(8, "little"), stated, payload, texts, ends.tobytes()))
    if len(content) > MOST_BYTES // 2:
        return
    new = beside(path, "new")
    try:
        with create(new, 0o600) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    remove_oldest(path.parent)


def remove_oldest(folder: Path):
    files = [(path.lstat().st_mtime, path) for path in folder.iterdir()]
    for _, path in sorted(files, reverse=True)[MOST_KEPT:]:
        path.unlink(missing_ok=True)
