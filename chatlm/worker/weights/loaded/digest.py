"""The profile of KV pages: identifies the weights and arithmetic that computed them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.files import opened, read_object
from chatlm.common.hub.stamps import mmproj_of
from chatlm.common.interface import INTERFACE
from chatlm.common.program import program_sources
from chatlm.worker.weights.files.weight_files import files_of_adapters, files_of_weights

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.model.transformer import Transformer

# of each file
SAMPLES = 256
SAMPLE_BYTES = 4096
KNOWN_DIGESTS = "weights.json"  # in a store: fingerprint of files -> their digest


def files_of(source: ModelSource, settings: Settings) -> list[Path]:
    """All files that decide what a model computes. OSError or ConfigError if one is missing."""
    files = [*files_of_weights(source.path), *files_of_adapters(settings.lora)]
    if mmproj := mmproj_of(source.path, settings):
        files.append(mmproj)
    for folder in (source.path, *(Path(folder).expanduser() for folder in settings.lora)):
        # finds nothing if it is a file
        files += [*folder.glob("*.json"), *folder.glob("*.bin"), *folder.glob("*.yaml")]
    return sorted(files)


def fingerprint_of(files: Iterable[Path]) -> str:
    """Changes whenever a file does: a change of its content sets its ctime, which no program can reset."""
    stats = []
    for path in files:
        status = path.stat()
        stats.append((path.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                      status.st_ctime_ns))
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def sampled_digest(path: Path, adapters: Iterable[str] = ()) -> str:
    """`weights_digest` in /v1/models: a hash of each weight file's size and of samples spread over it.

    Models that are only listed have it too; hashing all of them in full would take as long as reading them.
    It tells models and training runs apart, wherever their files lie. It does not prove that a file is
    unchanged, so pages that outlive the server use `whole_digest`."""
    digest = hashlib.sha256()
    for file in (*files_of_weights(path), *files_of_adapters(adapters)):
        with opened(file) as data:
            size = data.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for sample in range(SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()


def digest_of(files: Iterable[Path]) -> str:
    """A hash of the files' entire contents; takes half a second per GB."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with opened(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def whole_digest(files: list[Path], fingerprint: str, store: Path | None) -> str:
    """The fingerprint if nothing outlives the server (no `store`), else the files' digest, which the store
    caches. OSError if the files no longer match the fingerprint."""
    if store is None:
        return fingerprint
    known = {}
    path = store / KNOWN_DIGESTS
    with suppress(ConfigError):
        known = read_object(path)
    if not isinstance(digest := known.get(fingerprint), str):
        digest = digest_of(files)
        if fingerprint_of(files) != fingerprint:
            raise OSError("the model's files have changed since they were loaded")
        new = store / f".{secrets.token_hex(8)}.json"
        with suppress(OSError):  # a read-only folder
            descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "w") as file:
                json.dump(dict([*known.items()][-100:]) | {fingerprint: digest}, file)
            new.replace(path)
    return digest


@functools.cache
def code_digest() -> str:
    """A hash of the modules, and of the compiled core, that compute a page."""
    code = hashlib.sha256()
    for room in ("kernels", "model", "ops", "weights", "arrays"):
        for name, text in program_sources(folder=f"chatlm/worker/{room}").items():
            code.update(name.encode() + text)
    if compiled := getattr(decode_core(), "__file__", None):
        code.update(Path(compiled).read_bytes())
    return code.hexdigest()


def arithmetic_of(transformer: Transformer, settings: Settings) -> list[str]:
    """Everything except the weights that may change the bits of a page, or their layout."""
    kernels = transformer.kernels
    version = getattr(sys.modules.get("torch"), "__version__", "")  # of what computes, if it does
    return [code_digest(), version, str(INTERFACE), str(sorted(kernels.names.items())),
            str(transformer.device.type), str(transformer.dtype), str(settings.dtype), str(settings.quantize),
            settings.arithmetic, transformer.weight_types, repr(transformer.model), repr(transformer.groups),
            repr(transformer.layout)]


def profile_of(digest: str, arithmetic: list[str]) -> bytes:
    """16 bytes: pages with equal profiles, tokens and owners are equal bit for bit."""
    text = json.dumps([digest, *arithmetic])
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"profile").digest()
