"""Checks that a bundle, and what was unpacked from it, are what was packed; unpacks one into a folder."""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from chatlm.common.bundle import current_umask
from chatlm.common.contents import BundledModel, contents_of
from chatlm.common.errors import ConfigError
from chatlm.common.invocation import python_command
from chatlm.common.libraries import (
    THIS_PYTHON, DamagedBundle, fitting, opened_bundle, other_files, packed_files, packed_libraries,
    trees_folder)
from chatlm.common.program import SCRIPT, program_place, program_root
from chatlm.common.unpack import FOLDER, PLATFORM, about_core


def own_bundle(action: str) -> Path:
    """The running bundle. ConfigError in a checkout or an installation."""
    if not program_root().is_file():
        raise ConfigError(f"`{action}` is for a bundle that runs: "
                          f"{python_command()} chat_server.pyz {action}")
    return program_place()


def verified(path: Path) -> Iterator[str]:
    """Check each byte of a bundle and of what was unpacked from it; yields a line for each part that is
    right. ConfigError for the first that is not."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DamagedBundle(path, "it does not end as a bundle does")
    with opened_bundle(path) as bundle:
        if wrong := bundle.testzip():
            raise DamagedBundle(path, f"{wrong} is not what was packed")
        yield f"{path}: the program is what was packed"
        if about := about_core(bundle):
            if hashlib.sha256(bundle.read(about.library)).hexdigest() != about.sha256:
                raise DamagedBundle(path, f"{about.library} is not what was packed")
            yield f"{path}: decode_core for {about.platform} is what was packed"
        if model := contents_of(bundle).model:
            check_model(path, model)
            yield f"{path}: the model {model.name} is what was packed"
        for libraries in packed_libraries(bundle):
            count = sum(1 for _ in packed_files(bundle, libraries))
            yield f"{path}: the {count:,} files of the libraries for {libraries} are what was packed"
            tree = trees_folder() / libraries.digest[:32]
            if tree.exists():
                if others := other_files(tree, bundle, libraries):
                    more = f" and {len(others) - 5:,} more" if others[5:] else ""
                    raise ConfigError(f"{tree}/site has files that are not what was packed: "
                                      f"{', '.join(others[:5])}{more}; remove {tree}, and the next start "
                                      "unpacks it again")
                yield f"{tree}: its files are what was packed"
    yield f"{path}: its SHA-256 is {sha256_of(path)}"


def sha256_of(path: Path, size: int | None = None) -> str:
    """Of a file, or of its first bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def check_model(path: Path, model: BundledModel):
    if sha256_of(path, model.size) != model.sha256:
        raise DamagedBundle(path, f"the model {model.name} is not what was packed")


def unpack_bundle(path: Path, folder: Path) -> str:
    """Unpack the program and what it needs into a new folder, where it runs without a cache. Returns the line
    to print."""
    target = Path(os.path.abspath(folder))
    part = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError("it exists and is not an empty folder")
        part.mkdir(mode=0o777)
        with opened_bundle(path) as bundle:
            for name, data in unpacked_files(bundle):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(data)
            model, words = contents_of(bundle)
            version = f" Python {THIS_PYTHON}" if packed_libraries(bundle) else ""
        if model:
            copy_part(path, part / f"{model.name}.gguf", model)
        (part / SCRIPT).chmod(0o777 & ~current_umask())
        part.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot unpack into {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    command = ["python3", str(target / SCRIPT), *words]
    command += [str(target / f"{model.name}.gguf")] if model else []
    return f"{folder}: run it with{version}: {shlex.join(command)}"


def unpacked_files(bundle: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """The program's files, and the libraries or the core for this Python."""
    for entry in bundle.infolist():
        name = entry.filename
        if name.startswith((SCRIPT, "chatlm/", "static/")) and not name.endswith(".pyc"):
            yield name, bundle.read(entry)
    if libraries := fitting(bundle):
        yield from packed_files(bundle, libraries)
    elif (about := about_core(bundle)) and about.platform == PLATFORM:
        for name in bundle.namelist():
            if name.startswith(f"{FOLDER}/decode_core/") and not name.endswith(".pyc"):
                yield name.removeprefix(f"{FOLDER}/"), bundle.read(name)


def copy_part(path: Path, target: Path, model: BundledModel):
    with open(path, "rb") as source, open(target, "xb") as file:
        left = model.size
        while left and (data := source.read(min(left, 1 << 20))):
            file.write(data)
            left -= len(data)
    check_model(target, model)
