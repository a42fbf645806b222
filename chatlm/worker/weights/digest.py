"""What tells a model's weights and arithmetic from all others: the profile of the pages that they compute."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatlm.common.core import decode_core, seam
from chatlm.common.program import program_sources
from chatlm.worker.weights.files import files_of_adapters, files_of_weights

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.model.transformer import Transformer

SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file
KNOWN_DIGESTS = "weights.json"  # in a store: stamps of files -> their digest


def files_of(source: ModelSource, settings: Settings) -> list[Path]:
    """All files that decide what a model computes. OSError or ConfigError if one is gone."""
    files = [*files_of_weights(source.path), *files_of_adapters(settings.lora)]
    for folder in (source.path, *(Path(folder).expanduser() for folder in settings.lora)):
        # none are below a file
        files += [*folder.glob("*.json"), *folder.glob("*.bin")]
    return sorted(files)


def stamp_of(files: Iterable[Path]) -> str:
    """Changes whenever a file does: a change of its content sets its ctime, which no program can set back."""
    stats = [(path.name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
             for path in files for status in [path.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def sampled_digest(path: Path, adapters: Iterable[str] = ()) -> str:
    """`weights_digest` of /v1/models: of the size of each file of a model's weights, and of samples all over
    it. Also said of models that are only listed, and to hash all of these takes as long as to read them. It
    tells models and trainings apart, the same wherever the files lie; it does not prove that none was
    changed, so pages that outlive the server go by `whole_digest`."""
    digest = hashlib.sha256()
    for file in (*files_of_weights(path), *files_of_adapters(adapters)):
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for sample in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def digest_of(files: Iterable[Path]) -> str:
    """Of all that the files have; half a second for each GB."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def whole_digest(files: list[Path], stamp: str, store: Path | None) -> str:
    """The stamp, where nothing outlives the server; else the files' digest, which the store remembers.
    OSError if the files are not those of the stamp any more."""
    if store is None:
        return stamp
    known, place = {}, store / KNOWN_DIGESTS
    with suppress(OSError, ValueError):
        known = dict(json.loads(place.read_text()))
    if not isinstance(digest := known.get(stamp), str):
        digest = digest_of(files)
        if stamp_of(files) != stamp:
            raise OSError("the model's files have changed since they were loaded")
        new = store / f".{secrets.token_hex(8)}.json"
        with suppress(OSError):  # a read-only folder
            descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "w") as file:
                json.dump(dict([*known.items()][-100:]) | {stamp: digest}, file)
            new.replace(place)
    return digest


def arithmetic_of(transformer: Transformer, settings: Settings) -> list[str]:
    """All beside the weights that may change a bit of a page, or where it lies in it."""
    code, core = hashlib.sha256(), decode_core()
    for name, text in program_sources().items():
        if name.startswith(("chatlm/worker/model/", "chatlm/worker/ops/", "chatlm/worker/weights/")):
            code.update(name.encode() + text)
    if compiled := getattr(getattr(core, "_core", None), "__file__", None):
        code.update(Path(compiled).read_bytes())
    kernels = transformer.kernels
    return [code.hexdigest(), torch.__version__, seam(), str(sorted(kernels.names.items())),
            str(transformer.device.type), str(transformer.dtype), str(settings.dtype), str(settings.quantize),
            transformer.weight_types, repr(transformer.spec), repr(transformer.groups),
            repr(transformer.layout)]


def profile_of(digest: str, arithmetic: list[str]) -> bytes:
    """16 bytes: pages of equal profiles, tokens and owners are equal to the bit."""
    text = json.dumps([digest, *arithmetic])
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"profile").digest()
