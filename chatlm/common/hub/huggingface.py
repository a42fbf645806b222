"""Models from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence as Seq
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, error_text, require_library, shown
from chatlm.common.files import MOST_INDEX, read_object, read_text
from chatlm.common.hub.guesses import near_model
from chatlm.common.hub.local import FULL, download_lock, has_room, sha256_of
from chatlm.common.hub.repository import (
    FOLDER_FILES, INDEX, TOKENIZERS, WHOLE, hub_files, mmproj_for, other_tokenizers)
from chatlm.common.invocation import tool_command
from chatlm.common.log import log
from chatlm.common.new_files import create, replace_with, take_up
from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress


class DownloadLimits(NamedTuple):
    """What a download may take."""

    downloads: bool = True   # False (--no-downloads): read the cache only
    disk: int | None = None  # --models-disk: bytes that all models in the cache may take
    reserved: int = 0        # bytes that other downloads of this server still need
    images: bool = True      # False: the model will read text only


class DownloadPlan(NamedTuple):
    """What a download will do."""

    revision: str
    sizes: dict[str, int]  # every file of the repository and its bytes
    names: list[str]       # the files that make up the model
    missing: list[str]     # the files to download, perhaps with an image encoder's
    begun: int             # bytes of the missing files that are on the disk already

    @property
    def whole(self) -> int:
        """Bytes of all missing files."""
        return sum(self.sizes[name] for name in self.missing)


ReportBytes = Callable[[str, int, int], None]  # (stage, bytes so far, bytes in all); may raise to stop


def status_of(error) -> int:
    return error.response.status_code


class Unreachable(Exception):
    """The hub does not answer, or fails. `args[0]` is the library's error."""


def why_unreachable(hub, error: BaseException) -> str:
    """Why the hub cannot be asked, as part of a sentence."""
    if hub.constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{hub.constants.ENDPOINT} cannot be reached ({error_text(error)})"


def load_hub(purpose: str):
    hub = require_library("huggingface_hub", purpose)
    for part in ("constants", "errors", "file_download"):
        importlib.import_module(f"huggingface_hub.{part}")
    logging.getLogger("huggingface_hub").handlers.clear()  # they would repeat lines of our log
    for name in ("httpx", "httpx2"):  # its HTTP client logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    return hub


@contextlib.contextmanager
def hub_errors(hub, repository: str) -> Iterator[None]:
    """Turn the library's exceptions into a ConfigError that says what the user must do."""
    errors = hub.errors
    endpoint = hub.constants.ENDPOINT
    try:
        yield
        return
    except (ConfigError, InterruptedError, Unreachable):
        raise
    except errors.GatedRepoError:
        reason = (f"it is gated: accept its licence at {endpoint}/{repository}, "
                  f"then run `{tool_command('hf')} auth login` or set HF_TOKEN")
    except errors.RepositoryNotFoundError:
        reason = (f"no file or folder of that name is here, and {endpoint} has no such model"
                  f"{near_model(repository)} (if it is private: run `{tool_command('hf')} auth login` or set "
                  "HF_TOKEN)")
    except errors.HfHubHTTPError as error:
        status = status_of(error)
        remedy = f"; check HF_TOKEN, or run `{tool_command('hf')} auth login`" if status in (401, 403) else ""
        reason = f"{endpoint} answers with HTTP status {status}{remedy}"
    except Exception as error:
        if getattr(error, "errno", None) in FULL:
            raise no_hub_room(hub, repository, "more") from None
        reason = error_text(error)
    raise ConfigError(f"{repository} cannot be downloaded: {reason}")


def fetch_from_hub(repository: str, file: str, progress: Progress,
                   limits: DownloadLimits = DownloadLimits()) -> Path:
    """Like `fetch`, but reports progress as a share of the bytes."""
    def report(stage: str, done: int, whole: int):
        progress(stage, min(1.0, done / whole) if whole else 0.0)

    return fetch(repository, file, report, limits)


def fetch(repository: str, file: str, report: ReportBytes, limits: DownloadLimits) -> Path:
    """Download what is missing of a model. Returns its GGUF file or folder in huggingface_hub's cache.

    The library honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME. Without a connection the cached
    files are used. Raises ConfigError, which says what is missing or what the user must do."""
    hub = load_hub(f"the Hugging Face model {repository}")
    if not limits.downloads:
        return cached_from_hub(hub, repository, file, "--no-downloads is set")
    report(f"looking for {repository}", 0, 0)
    with hub_errors(hub, repository):
        try:
            plan = plan_download(hub, repository, file, limits.images)
        except Unreachable as error:
            return cached_from_hub(hub, repository, file, why_unreachable(hub, error.args[0]))
        disk = DiskCheck(hub, repository, plan, report, limits)
        disk.check(0)
        examined = "config.json" not in plan.names
        done = 0
        for name in plan.missing:
            if not examined and name not in FOLDER_FILES:  # the weights come next
                config = hub_path(hub, repository, ["config.json"], plan.revision)
                examined = refuse_early(repository, config)
                if not {*TOKENIZERS} & plan.sizes.keys():
                    raise ConfigError(f"{repository} is not downloaded: it has no tokenizer.json"
                                      + other_tokenizers(plan.sizes))
            if name not in plan.names and not can_see_with(hub, repository, name, plan):
                plan.sizes[name] = 0
                continue
            download_from_hub(hub, repository, name, disk, done)
            done += plan.sizes[name]
            if name == "config.json":
                refuse_early(repository, hub_path(hub, repository, [name], plan.revision))
        path = hub_path(hub, repository, plan.names, plan.revision)
        note_revision(hub_folder(hub, repository), plan.revision)
        return path


def plan_download(hub, repository: str, file: str, images: bool) -> DownloadPlan:
    """Raises ConfigError if the repository has no such model, and Unreachable without a connection."""
    sizes, revision, digests = list_repository(hub, repository)
    names = hub_files(repository, file, sizes)
    wanted = list(names)
    if images:
        wanted += mmproj_for(names[0], sizes)
    missing = []
    begun = 0
    for name in wanted:
        if isinstance(hub.try_to_load_from_cache(repository, name, revision=revision), str):
            continue
        missing.append(name)
        if name in digests:
            part = part_path(hub, repository, digests[name])
            begun += part.stat().st_size if part.exists() else 0
    return DownloadPlan(revision, sizes, names, missing, begun)


def part_path(hub, repository: str, digest: str) -> Path:
    """Where a file is written until it is complete."""
    return hub_folder(hub, repository) / f".chat_server.{digest}"


SAFE = r"(?!\.)[A-Za-z0-9._-]{1,128}"  # words of a hub that become part of a path


def list_repository(hub, repository: str) -> tuple[dict[str, int], str, dict[str, str]]:
    """(bytes of each file, the revision, SHA-256 of each large file). Leaves out files whose names could lead
    out of the cache."""
    try:
        info = hub.HfApi().model_info(repository, files_metadata=True, timeout=10)
    except InterruptedError:
        raise
    except Exception as error:  # no connection, in the words of whatever HTTP library it uses
        if isinstance(error, hub.errors.HfHubHTTPError) and status_of(error) < 500:
            raise
        raise Unreachable(error) from None
    sizes = {}
    digests = {}
    for file in info.siblings or ():
        if is_plain_path(file.rfilename):
            sizes[file.rfilename] = file.size or 0
            if file.lfs and re.fullmatch(SAFE, str(file.lfs.sha256)):
                digests[file.rfilename] = file.lfs.sha256
    return sizes, check_safe(repository, info.sha), digests


def is_plain_path(name: str) -> bool:
    """Whether a path stays below the folder that it is joined to, and has no odd characters."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & {*name.split("/")}


def check_safe(repository: str, word: str | None) -> str:
    if not re.fullmatch(SAFE, word or ""):
        raise ConfigError(f"{repository} cannot be downloaded: the hub calls a version of it {shown(word)}")
    return word or ""


def revision_of(folder: Path) -> str:
    """Which version of a model is complete, as the cache notes it; "" if it does not."""
    with contextlib.suppress(ConfigError):
        revision = read_text(folder / "refs" / "main", 1000).strip()
        return revision if re.fullmatch(SAFE, revision) else ""
    return ""


def indexed_shards(index: Path) -> set[str]:
    """The files that an index names. ConfigError if it is no index."""
    shards = read_object(index, MOST_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ConfigError(f"{index}: weight_map is {shown(shards)}; it must map tensors to names of files")
    return {*shards.values()}


def note_revision(folder: Path, revision: str):
    """Note which version of a model is complete. Without a connection that version is used."""
    main = folder / "refs" / "main"
    if revision_of(folder) == revision:
        return
    main.parent.mkdir(parents=True, exist_ok=True)
    replace_with(main, revision.encode())


def cache_bytes(cache: Path) -> int:
    """Bytes of all models in the library's cache, unfinished downloads included."""
    return sum(map(folder_bytes, cache.glob("models--*")))


def folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(path, name))
                if stat.S_ISREG(status.st_mode):
                    total += status.st_size
    return total


class DiskCheck:
    """Watches a download: reports its bytes, and checks before it and during it that the disk and
    --models-disk have room for the rest."""

    EVERY_BYTES = 16 << 20  # downloaded between two checks

    def __init__(self, hub, repository: str, plan: DownloadPlan, report: ReportBytes,
                 limits: DownloadLimits):
        self.hub = hub
        self.repository = repository
        self.plan = plan
        self.report = report
        self.limits = limits
        self.folder = Path(hub.constants.HF_HUB_CACHE)
        self.checked = 0  # bytes of the download at the last check

    def check(self, done: int):
        """Raises ConfigError if there is no room for the bytes after the first `done`."""
        self.checked = done
        left = self.plan.whole - max(done, self.plan.begun)
        self.folder.mkdir(parents=True, exist_ok=True)
        if left <= 0:
            return
        if not has_room(self.folder, left + self.limits.reserved):
            raise no_hub_room(self.hub, self.repository, f"{left:,} bytes")
        if self.limits.disk is None:
            return
        used = cache_bytes(self.folder)
        others = self.limits.reserved
        if used + left + others > self.limits.disk:
            also = f", and other downloads need {others:,}" if others else ""
            raise ConfigError(
                f"no room for {self.repository}: --models-disk allows {self.limits.disk:,} bytes, models in "
                f"the cache have {used:,}, {left:,} more must be downloaded{also}. Delete a model")

    def correct(self, name: str, size: int, before: int):
        """Note a file's real size, which the repository's list may have understated."""
        if size > self.plan.sizes[name]:
            self.plan.sizes[name] = size
            self.check(before)

    def note(self, before: int, stage: str, count: int, unwritten: int = 0):
        """Report progress: `count` bytes of the current file have arrived, after `before` bytes of earlier
        files. The last `unwritten` of them are not on the disk yet."""
        done = before + count
        if done > self.plan.whole + self.EVERY_BYTES:
            raise ConfigError(f"{self.repository} is not downloaded: the hub sends more than it announced")
        if done - self.checked >= self.EVERY_BYTES:
            self.check(done - unwritten)
        size = f" ({self.plan.whole / 1e9:.1f} GB)" if self.plan.whole >= 1e8 else ""
        self.report(f"{stage} {self.repository}{size}", done, self.plan.whole)


PREVIEW_S = 300         # enough on a machine whose processors are all busy
HEADER_BYTES = 4 << 20  # usually hold a GGUF file's whole header; if not, twice as many are tried, and so on


class CannotRun(ConfigError):
    """This program cannot run the model, on any machine."""


def refuse_early(repository: str, path: Path, size: int | None = None) -> bool:
    """Raises CannotRun if this program cannot run a model, judged by the small files of its folder, or by
    the beginning of its GGUF file of `size` bytes. Returns False if it takes more of the file to tell."""
    arguments = [] if size is None else [str(size)]
    known, reason = preview(path, *arguments)
    if reason:
        reason = reason.replace(f"{path}/", "").replace(str(path), "its file" if size else "it")
        raise CannotRun(f"{repository} is not downloaded: {reason}")
    return known


def preview(path: Path, *arguments: str) -> tuple[bool, str]:
    """Ask a worker's loader about files that are still incomplete. Returns whether it could tell, and why it
    refuses them ("" if it does not)."""
    command = [*PROCESS_COMMAND, "preview", str(path), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PREVIEW_S,
                              pass_fds=PROGRAM)
    except (OSError, subprocess.TimeoutExpired):
        return True, ""  # the worker will tell
    refusal = done.stdout.decode("utf-8", "replace").strip() if done.returncode == 1 else ""
    return done.returncode != 2, refusal


def can_see_with(hub, repository: str, mmproj: str, plan: DownloadPlan) -> bool:
    """Whether a downloaded GGUF model can see images with this encoder. If not, the log says why."""
    if importlib.util.find_spec("PIL") is None:
        reason = "images are read with the Python package Pillow, which is not installed"
    else:
        path = hub_path(hub, repository, plan.names, plan.revision)
        reason = preview(path, str(path.stat().st_size), "tower")[1].replace(str(path), "its file")
    if reason:
        log.info("%s reads texts alone, and %s is not downloaded: %s", repository, mmproj, reason)
    return not reason


def hub_path(hub, repository: str, names: Seq[str], revision: str) -> Path:
    """Where the model that consists of these files lies in the cache: a GGUF file, a folder or a checkpoint's
    file."""
    paths = [hub.try_to_load_from_cache(repository, name, revision=revision) for name in names]
    if not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{repository} changed while it was downloaded; start again")
    if "config.json" in names:
        return Path(paths[names.index("config.json")]).parent
    return Path(paths[-1] if names[-1].endswith(".pt") else paths[0])


def hub_folder(hub, repository: str) -> Path:
    name = hub.file_download.repo_folder_name(repo_id=repository, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE) / name


def cached_from_hub(hub, repository: str, file: str, why: str) -> Path:
    """The model in the cache, when nothing can be downloaded. Raises ConfigError if a file is missing."""
    cache = hub_folder(hub, repository)
    lacks = ConfigError(f"no file or folder {repository} is here, {why}, and the cache {cache.parent} does "
                        f"not have all files of that model{near_model(repository)}")
    try:
        revision = revision_of(cache)
        if not revision:
            raise lacks
        folder = cache / "snapshots" / revision
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if not names:
            raise lacks
        path = hub_path(hub, repository, hub_files(repository, file, names), revision)
        index = path / INDEX
        if WHOLE not in names and index.exists() and not indexed_shards(index) <= {*names}:
            raise lacks
    except (OSError, ValueError, ConfigError):
        raise lacks from None
    log.warning("%s: serving the cached files of %s", why, repository)
    return path


def no_hub_room(hub, repository: str, what: str) -> ConfigError:
    folder = hub.constants.HF_HUB_CACHE
    return ConfigError(f"no room for {repository} in {folder}: {what} must be downloaded, and "
                       f"{shutil.disk_usage(folder).free:,} bytes are free. Make room, or set HF_HOME to a "
                       "folder on a larger disk")


def append_to(part: Path) -> BinaryIO:
    """A file that an earlier download has left, or a new one, to write at its end."""
    with contextlib.suppress(FileNotFoundError):
        return open(take_up(part, os.O_WRONLY | os.O_APPEND), "ab")
    return create(part)


def download_from_hub(hub, repository: str, name: str, disk: DiskCheck, before: int):
    """Download one file into huggingface_hub's cache, after `before` bytes of other files.

    The library would start a file again if its process ended in the middle. So we write the file beside the
    cache's blobs, where the next start finds it, and move it to the blobs when it is complete; the library
    then finds it there. A model's first GGUF file is examined as soon as its header has arrived."""
    plan = disk.plan
    note = partial(disk.note, before)

    class Bar(contextlib.AbstractContextManager):
        """The part of tqdm's interface that the library uses."""

        examine_at = sys.maxsize  # bytes on the disk
        if name == plan.names[0] and name.lower().endswith(".gguf"):
            examine_at = HEADER_BYTES

        def __init__(self, *_, initial: int = 0, total: int | None = None, **__):
            self.n = initial
            self.total = total

        def update(self, count: int = 1):
            self.n += count
            note("downloading", self.n, count)
            written = part.stat().st_size if part.exists() else 0
            if written >= Bar.examine_at:
                examined = refuse_early(f"{repository}:{name}", part, remote.size)
                Bar.examine_at = sys.maxsize if examined else 2 * written

        def __exit__(self, *_):
            pass

        def __getattr__(self, name: str):
            return lambda *_, **__: None

    url = hub.hf_hub_url(repository, name, revision=plan.revision)
    cache = hub_folder(hub, repository)
    note("downloading", 0)
    remote = hub.get_hf_file_metadata(url, timeout=10)
    disk.correct(name, remote.size or 0, before)
    etag = check_safe(repository, remote.etag)
    blob = cache / "blobs" / etag
    part = part_path(hub, repository, etag)
    largest = hub.constants.MAX_HTTP_DOWNLOAD_SIZE  # beyond it the library uses a protocol of its own
    if 1 << 20 < (remote.size or 0) <= largest and not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(cache, lambda stage, fraction: note("waiting for", 0)), append_to(part) as file:
            if file.tell() > remote.size:
                file.truncate(0)
            while not blob.exists() and (start := file.tell()) < remote.size:
                try:
                    hub.file_download.http_get(
                        url, file, resume_size=start, tqdm_class=Bar, expected_size=remote.size,
                        headers=hub.utils.build_hf_headers())
                except (hub.errors.HfHubHTTPError, InterruptedError):
                    raise
                except CannotRun:
                    part.unlink()
                    raise
                except ConfigError:  # no room for the rest
                    raise
                except Exception as error:  # the connection broke: retry while bytes arrive
                    if getattr(error, "errno", None) in FULL:
                        raise
                    if file.tell() == start:
                        raise ConfigError(
                            f"the download of {name} of {repository} broke at byte {start:,} of "
                            f"{remote.size:,}: {error_text(error)}. The next start continues there") from None
            if not blob.exists():  # else another process has downloaded it
                file.flush()
                os.fsync(file.fileno())
                note("checking", remote.size)
                if re.fullmatch("[0-9a-f]{64}", etag) and sha256_of(part) != etag:
                    part.unlink()
                    raise ConfigError(f"{name} of {repository} was downloaded in parts that do not fit "
                                      "together; start again")
                os.replace(part, blob)
            part.unlink(missing_ok=True)
    hub.hf_hub_download(repository, name, revision=plan.revision, tqdm_class=Bar)
