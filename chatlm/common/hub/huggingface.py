"""Models from the Hugging Face hub."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from functools import partial
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, named, require_library, shown
from chatlm.common.hub.guesses import near_model
from chatlm.common.hub.local import FULL, download_lock, has_room, sha256_of
from chatlm.common.hub.nanochat import published
from chatlm.common.hub.short_names import SHORT_NAMES
from chatlm.common.hub.trainers import is_litgpt
from chatlm.common.invocation import tool_command
from chatlm.common.log import log
from chatlm.common.processes.start import PROCESS_COMMAND

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress


SPLIT_GGUF = r"-\d{5}-of-\d{5}(?=\.gguf$)"  # of one part of a model in several files
BESIDE_MODEL = r"(?i).*(?<![a-z])(mmproj|imatrix)(?![a-z])[^/]*"  # encoders of images, and of quantizers
# in one file; of several
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOLDER_FILES = {"config.json", "generation_config.json", INDEX, "tokenizer.json", "added_tokens.json",
                "tokenizer_config.json", "special_tokens_map.json",
                "chat_template.jinja", "chat_template.json",
                "additional_chat_templates/tool_use.jinja", "modules.json", "1_Pooling/config.json",
                "config_sentence_transformers.json", "sentence_bert_config.json",
                "preprocessor_config.json", "processor_config.json",
                "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
DENSE_FILES = r"\d+_Dense/(config\.json|model\.safetensors)"  # of an embedder's modules after its pooling


def hub_model(text: str) -> tuple[str, str] | None:
    """(repository, file or "") if MODEL is a short name or has the form of a Hugging Face id."""
    text = SHORT_NAMES.get(text.lower().replace(":", "-"), text)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:\\]+))?", text, re.ASCII)
    if not match or not match[2] and Path(text).suffix.lower() == ".gguf":
        return None
    return match[1], match[2] or ""


class Bounds(NamedTuple):
    """What a download may take."""

    downloads: bool = True   # False, by --no-downloads: only the cache is read
    disk: int | None = None  # --models-disk: bytes that all models in the cache may take
    reserved: int = 0        # bytes that other downloads of this server still need
    images: bool = True      # False: the model will read texts alone


class Plan(NamedTuple):
    """What a download will do."""

    revision: str
    sizes: dict[str, int]  # of the repository's files
    names: list[str]       # those that make up the model
    missing: list[str]     # those that the cache lacks, perhaps one more with which it sees images
    begun: int             # bytes of these that are in the cache already

    @property
    def whole(self) -> int:
        return sum(self.sizes[name] for name in self.missing)


Report = Callable[[str, int, int], None]  # (stage, bytes so far, bytes in all); may raise to end the work


def status_of(error) -> int:
    return error.response.status_code


class Unreachable(Exception):
    """No connection to the hub, or it fails; `args[0]` is the library's error."""


def why_unreachable(hub, error: BaseException) -> str:
    """One line about a hub that cannot be asked."""
    if hub.constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{hub.constants.ENDPOINT} cannot be reached ({named(error)})"


def load_hub(purpose: str):
    hub = require_library("huggingface_hub", purpose)
    for part in ("constants", "errors", "file_download"):
        importlib.import_module(f"huggingface_hub.{part}")
    logging.getLogger("huggingface_hub").handlers.clear()  # our log has these lines already
    for name in ("httpx", "httpx2"):  # its HTTP client logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    return hub


@contextlib.contextmanager
def hub_errors(hub, repository: str) -> Iterator[None]:
    """What the library raises becomes a ConfigError that says what the user must do."""
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
        reason = named(error)
    raise ConfigError(f"{repository} cannot be downloaded: {reason}")


def fetch_from_hub(repository: str, file: str, progress: Progress, bounds: Bounds = Bounds()) -> Path:
    """As `fetch`, with progress as a share of the bytes."""
    return fetch(repository, file, lambda stage, done, whole: progress(
        stage, min(1.0, done / whole) if whole else 0.0), bounds)


def fetch(repository: str, file: str, report: Report, bounds: Bounds) -> Path:
    """A GGUF file or a folder of safetensors in huggingface_hub's cache; what is missing is downloaded.

    The library honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME. Without a connection the cached
    files serve. Raises ConfigError saying what is missing, or what the user must do."""
    hub = load_hub(f"the Hugging Face model {repository}")
    if not bounds.downloads:
        return cached_from_hub(hub, repository, file, "--no-downloads is set")
    report(f"looking for {repository}", 0, 0)
    with hub_errors(hub, repository):
        try:
            plan = hub_plan(hub, repository, file, bounds.images)
        except Unreachable as error:
            return cached_from_hub(hub, repository, file, why_unreachable(hub, error.args[0]))
        disk = DiskCheck(hub, repository, plan, report, bounds)
        disk.check(0)
        looked = "config.json" not in plan.names
        done = 0
        for name in plan.missing:
            if not looked and name not in FOLDER_FILES:
                looked = refuse_early(repository, hub_path(hub, repository, ["config.json"], plan.revision))
                if "tokenizer.json" not in plan.sizes:
                    raise ConfigError(f"{repository} is not downloaded: it has no tokenizer.json"
                                      + other_tokenizers(plan.sizes))
            if name not in plan.names and not sees(hub, repository, name, plan):
                plan.sizes[name] = 0
                continue
            download_from_hub(hub, repository, name, disk, done)
            done += plan.sizes[name]
        path = hub_path(hub, repository, plan.names, plan.revision)
        note_revision(hub_folder(hub, repository), plan.revision)
        return path


def hub_plan(hub, repository: str, file: str, images: bool) -> Plan:
    """ConfigError if the repository has no such model; Unreachable without a connection."""
    sizes, revision, begun = hub_listing(hub, repository)
    names = hub_files(repository, file, sizes)
    missing = [name for name in [*names, *(mmproj_for(names[0], sizes) if images else ())]
               if not isinstance(hub.try_to_load_from_cache(repository, name, revision=revision), str)]
    parts = [hub_folder(hub, repository) / f".chat_server.{begun[name]}" for name in missing if name in begun]
    return Plan(revision, sizes, names, missing, sum(part.stat().st_size for part in parts if part.exists()))


SAFE = r"(?!\.)[A-Za-z0-9._-]{1,128}"  # of what a hub says and becomes part of a path


def hub_listing(hub, repository: str) -> tuple[dict[str, int], str, dict[str, str]]:
    """(sizes of a repository's files, its revision, SHA-256 of its large files). Files whose names could lead
    out of the cache are left out."""
    try:
        info = hub.HfApi().model_info(repository, files_metadata=True, timeout=10)
    except InterruptedError:
        raise
    except Exception as error:  # no connection, in the words of whatever HTTP library it uses
        if isinstance(error, hub.errors.HfHubHTTPError) and status_of(error) < 500:
            raise
        raise Unreachable(error) from None
    files = [each for each in info.siblings or () if is_plain_path(each.rfilename)]
    revision = check_safe(repository, info.sha)
    hashes = {each.rfilename: each.lfs.sha256 for each in files if each.lfs}
    return ({each.rfilename: each.size or 0 for each in files}, revision,
            {name: digest for name, digest in hashes.items() if re.fullmatch(SAFE, str(digest))})


def is_plain_path(name: str) -> bool:
    """Does a name stay below the folder that it is put in, and has it no odd characters?"""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & {*name.split("/")}


def check_safe(repository: str, word: str | None) -> str:
    if not re.fullmatch(SAFE, word or ""):
        raise ConfigError(f"{repository} cannot be downloaded: the hub calls a version of it {shown(word)}")
    return word or ""


def note_revision(folder: Path, revision: str):
    """Note which version of a model is complete: what is used without a connection."""
    main = folder / "refs" / "main"
    with contextlib.suppress(OSError):
        if main.exists() and main.read_text().strip() == revision:
            return
    main.parent.mkdir(parents=True, exist_ok=True)
    new = main.with_name(".chat_server.main")
    new.write_text(revision)
    os.replace(new, main)


def cache_bytes(cache: Path) -> int:
    """Bytes of all models in the library's cache, also of those that are being downloaded."""
    return sum(map(folder_bytes, cache.glob("models--*")))


def folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(path, name))
                total += status.st_size * stat.S_ISREG(status.st_mode)
    return total


class DiskCheck:
    """Passes on how many bytes of a model are here, and checks before and meanwhile that the disk and
    --models-disk have room for the others."""

    EVERY_BYTES = 16 << 20

    def __init__(self, hub, repository: str, plan: Plan, report: Report, bounds: Bounds):
        self.hub = hub
        self.repository = repository
        self.plan = plan
        self.report = report
        self.bounds = bounds
        self.folder = Path(hub.constants.HF_HUB_CACHE)
        self.checked = 0

    def check(self, done: int):
        """ConfigError if the bytes after `done` have no room."""
        self.checked, left = done, self.plan.whole - max(done, self.plan.begun)
        self.folder.mkdir(parents=True, exist_ok=True)
        if left <= 0:
            return
        if not has_room(self.folder, left + self.bounds.reserved):
            raise no_hub_room(self.hub, self.repository, f"{left:,} bytes")
        if self.bounds.disk is None:
            return
        used = cache_bytes(self.folder)
        others = self.bounds.reserved
        if used + left + others > self.bounds.disk:
            raise ConfigError(
                f"no room for {self.repository}: --models-disk allows {self.bounds.disk:,} bytes, models in "
                f"the cache have {used:,}, {left:,} more must be downloaded"
                + (f", and other downloads need {others:,}" if others else "") + ". Delete a model")

    def correct(self, name: str, size: int, before: int):
        """A file has `size` bytes, which the list of files may not have said."""
        if size > self.plan.sizes[name]:
            self.plan.sizes[name] = size
            self.check(before)

    def note(self, before: int, stage: str, count: int, unwritten: int = 0):
        """`count` bytes of a file are here, the last of them not on the disk yet, and `before` of the files
        before it."""
        done = before + count
        if done > self.plan.whole + self.EVERY_BYTES:
            raise ConfigError(f"{self.repository} is not downloaded: the hub sends more than it announced")
        if done - self.checked >= self.EVERY_BYTES:
            self.check(done - unwritten)
        size = f" ({self.plan.whole / 1e9:.1f} GB)" if self.plan.whole >= 1e8 else ""
        self.report(f"{stage} {self.repository}{size}", done, self.plan.whole)


def hub_files(repository: str, file: str, names: Iterable[str]) -> list[str]:
    """Those of a repository's files that make up the model: a GGUF file, a checkpoint of nanochat's, or
    config.json, weights and so on.

    `file` is the GGUF file's or the checkpoint's name, or the end of the first before .gguf: `Q8_0`."""
    parts = collections.defaultdict(list)
    names = set(names)
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        parts[re.sub(SPLIT_GGUF, "", name, flags=re.IGNORECASE)].append(name)
    ggufs = models_among(parts)  # without the numbers of parts
    if not file and "config.json" in names:
        weights = {name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
        whole = {WHOLE} & names
        if whole or weights:
            more = {name for name in names if re.fullmatch(DENSE_FILES, name)}
            described = (FOLDER_FILES - {INDEX} if whole else FOLDER_FILES) & names
            return sorted(described) + sorted((whole or weights) | more)
    if (checkpoint := published(names, file)) and (file or not ggufs):
        return checkpoint
    end = (file or "q4_k_m").lower().removesuffix(".gguf")
    chosen = [name for name, files in parts.items() if file in (name, *files)] or \
             [name for name in ggufs if name.lower().removesuffix(".gguf").endswith(end)] or \
             ([] if file else ggufs)
    if len(chosen) != 1:
        there = (f"its GGUF files: {', '.join(ggufs)}" if ggufs else
                 f"it has no GGUF file{other_weights(names)}")
        what = f"no single file {file}" if file else "several GGUF files" if ggufs else "no model.safetensors"
        how = f". Name one: {repository}:FILE" if ggufs else ""
        raise ConfigError(f"{repository} has {what}; {there}{how}")
    return parts[chosen[0]]


MMPROJ_TYPES = ("f16", "bf16", "q8_0", "f32")  # the best first


def mmproj_for(model: str, names: Iterable[str]) -> list[str]:
    """With what a GGUF model sees images: the mmproj*.gguf in its folder, of several the one of the best
    type. [] without any, or if that is what was asked for."""
    def rank(name: str) -> tuple[int, str]:
        name = name.lower()
        return next((rank for rank, kind in enumerate(MMPROJ_TYPES) if re.search(f"(?<![a-z]){kind}", name)),
                    len(MMPROJ_TYPES)), name

    folder, _, own = model.rpartition("/")
    beside = [name for name in names if re.fullmatch(r"(?i)mmproj[^/]*\.gguf", name.rpartition("/")[2])
              and name.rpartition("/")[0] == folder]
    if not own.lower().endswith(".gguf") or re.fullmatch(BESIDE_MODEL, own):
        return []
    return sorted(beside, key=rank)[:1]


def models_among(ggufs: Iterable[str]) -> list[str]:
    """Those of the GGUF files that are models by their names, or all if none is."""
    ggufs = list(ggufs)
    return [name for name in ggufs if not re.fullmatch(BESIDE_MODEL, name)] or ggufs


def other_weights(names: Iterable[str]) -> str:
    """What to say of weights in formats that are not read, as the end of a sentence; "" without any."""
    names = list(names)
    if is_litgpt(names):
        return ("; its files are litgpt's: download them into a folder (`hf download ID --local-dir FOLDER`) "
                "and give that")
    others = [name for name in sorted(names) if re.fullmatch(
        r"pytorch_model.*\.bin|consolidated.*\.pth|.*\.(h5|msgpack|onnx|ckpt|npz)", name)]
    return f"; {others[0]} is in a format that this server does not read: convert it with transformers " \
           "(from_pretrained, then save_pretrained writes safetensors)" if others else ""


def other_tokenizers(names: Iterable[str]) -> str:
    """What a folder of these files has instead of a tokenizer.json, as the end of a sentence."""
    names = sorted(names)
    others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt",
                                "spiece.model", "tiktoken.model") if name in names]
    if not others:
        return f"; it has {', '.join(names[:20])}"
    return (f"; it has {' and '.join(others)}, which this server does not read. transformers can write one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")


PREVIEW_S = 300         # on a machine that has no processor for it
HEADER_BYTES = 4 << 20  # of a GGUF file may be its whole header; else it is looked at again at twice as many


class CannotRun(ConfigError):
    """No server of this program can run a model."""


def refuse_early(repository: str, path: Path, size: int | None = None) -> bool:
    """ConfigError if no server can run a model, by the small files of its folder or the beginning of its
    GGUF file of `size` bytes; False if more of that is needed to tell."""
    known, reason = preview(path, *([] if size is None else [str(size)]))
    if reason:
        reason = reason.replace(f"{path}/", "").replace(str(path), "its file" if size else "it")
        raise CannotRun(f"{repository} is not downloaded: {reason}")
    return known


def preview(path: Path, *arguments: str) -> tuple[bool, str]:
    """Is it known what a worker would say of these files? And its refusal, "" if there is none."""
    command = [*PROCESS_COMMAND, "preview", str(path), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PREVIEW_S)
    except (OSError, subprocess.TimeoutExpired):
        return True, ""  # the worker will tell
    return done.returncode != 2, done.stdout.decode("utf-8", "replace").strip() * (done.returncode == 1)


def sees(hub, repository: str, mmproj: str, plan: Plan) -> bool:
    """Can the model of a GGUF file that is here see images with this file? If not, the log says why."""
    if importlib.util.find_spec("PIL") is None:
        reason = "images are read with the Python package Pillow, which is not installed"
    else:
        path = hub_path(hub, repository, plan.names, plan.revision)
        reason = preview(path, str(path.stat().st_size), "eyes")[1].replace(str(path), "its file")
    if reason:
        log.info("%s reads texts alone, and %s is not downloaded: %s", repository, mmproj, reason)
    return not reason


def hub_path(hub, repository: str, names: Seq[str], revision: str) -> Path:
    """The GGUF file, the folder, or the checkpoint's file that these files of the cache make."""
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
    """What the cache has of a model, if nothing can be downloaded; ConfigError if that is not all of it."""
    cache = hub_folder(hub, repository)
    lacks = ConfigError(f"no file or folder {repository} is here, {why}, and the cache {cache.parent} does "
                        f"not have all files of that model{near_model(repository)}")
    try:
        revision = (cache / "refs" / "main").read_text().strip()
        folder = cache / "snapshots" / revision
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if not names:
            raise lacks
        path = hub_path(hub, repository, hub_files(repository, file, names), revision)
        index = path / INDEX
        shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ()
        if WHOLE not in names and not {*shards} <= {*names}:
            raise lacks
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise lacks from None
    log.warning("%s: serving the cached files of %s", why, repository)
    return path


def no_hub_room(hub, repository: str, what: str) -> ConfigError:
    folder = hub.constants.HF_HUB_CACHE
    return ConfigError(f"no room for {repository} in {folder}: {what} must be downloaded, and "
                       f"{shutil.disk_usage(folder).free:,} bytes are free. Make room, or set HF_HOME to a "
                       "folder on a larger disk")


def download_from_hub(hub, repository: str, name: str, disk: DiskCheck, before: int):
    """Put a file into huggingface_hub's cache, after `before` bytes of others. The first GGUF file of a model
    is looked at as soon as its header is here.

    The library itself begins a file again when its process ended in the middle. So a file is first written
    beside the cache's blobs, where the next start finds it; then the library finds a complete blob."""
    plan = disk.plan
    note = partial(disk.note, before)

    class Bar(contextlib.AbstractContextManager):
        """The part of tqdm's interface that the library uses."""

        look_at = HEADER_BYTES if name == plan.names[0] and name.lower().endswith(".gguf") else sys.maxsize

        def __init__(self, *_, initial: int = 0, total: int | None = None, **__):
            self.n = initial
            self.total = total

        def update(self, count: int = 1):
            self.n += count
            note("downloading", self.n, count)
            if part.exists() and (written := part.stat().st_size) >= Bar.look_at:
                checked = refuse_early(f"{repository}:{name}", part, remote.size)
                Bar.look_at = sys.maxsize if checked else 2 * written

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
    part = cache / f".chat_server.{etag}"
    largest = hub.constants.MAX_HTTP_DOWNLOAD_SIZE  # beyond it the library uses a protocol of its own
    if 1 << 20 < (remote.size or 0) <= largest and not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(cache, lambda stage, fraction: note("waiting for", 0)), open(part, "ab") as file:
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
                            f"{remote.size:,}: {named(error)}. The next start continues there") from None
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
