"""The role `hub`: answers the front's questions about the Hugging Face hub and its cache, and downloads.

The front starts one process for each download, and ends the process to cancel it. What was written stays, and
the next download of the model continues there."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence as Seq
from pathlib import Path

from chatlm.common.errors import ChatServerError, ConfigError, bad_value, printable, shown
from chatlm.common.files import Truncated
from chatlm.common.hub.better import BETTER, SHARE, parameters_of
from chatlm.common.hub.huggingface import (
    HEADER_BYTES, CannotRun, DownloadLimits, Unreachable, fetch, folder_bytes, hub_errors, indexed_shards,
    is_plain_path, list_repository, load_hub, refuse_early, revision_of, why_unreachable)
from chatlm.common.hub.repository import (
    BESIDE_MODEL, INDEX, SPLIT_GGUF, WHOLE, hub_files, hub_model, other_tokenizers,
    tokenizers_of)
from chatlm.common.hub.local import download_lock, hub_cache
from chatlm.common.hub.short_names import PARAMETERS, SHORT_NAMES
from chatlm.common.messages.protocol import (
    HUB_PIPE, Crashed, HubFetch, HubFetched, HubOffers, HubProgress, Offer, Unusable)
from chatlm.common.processes.child import join_parent

MOST_FOUND = 30          # results of a search
SEARCH_S = 10.0          # timeout of a search
MOST_BEST = 3            # models offered as the ones that fit best
MOST_HEADER = 64 << 20   # of a GGUF file; a longer header is examined while the file is downloaded
CONFIG_BYTES = 1 << 20   # the largest config.json that is read
SPEAK_S = 0.1            # progress is reported after this time,
SPEAK_BYTES = 4 << 20    # or after as many bytes if that comes first
BUSY_S = 3.0             # a process that was just ended may hold its lock this long


def named_model(text: str) -> tuple[str, str]:
    """(repository, file or "") of a name that came over HTTP.

    Raises RequestError for anything but a short name, an id, or an id with a file of its repository after a
    colon, so that no name leads to a path outside the cache."""
    found = hub_model(text) if len(text) <= 300 else None
    if not found or found[1] and not is_plain_path(found[1]) or ".." in found[0]:
        raise bad_value("model", text, "the name of a model of the Hugging Face hub (owner/name, "
                        "owner/name:FILE, owner/name:Q4_K_M, or a short name such as llama3.2-1b)")
    return found


def joined_name(repository: str, file: str) -> str:
    return f"{repository}:{file}" if file else repository


def is_of_hub(path: Path, repository: str, file: str) -> bool:
    """Whether a model's path belongs to a repository in the hub's cache, or to this GGUF file of it."""
    if folder_of(repository).name not in path.parts:
        return False
    name = re.sub(SPLIT_GGUF, "", path.name).lower().removesuffix(".gguf")
    wanted = re.sub(SPLIT_GGUF, "", file).lower().removesuffix(".gguf")
    return not file or path.suffix.lower() == ".gguf" and name.endswith(wanted.rpartition("/")[2])


def short_offers() -> list[Offer]:
    """One for each model with a short name; `bytes` is estimated from its name, as 16-bit weights."""
    first = {repository: name for name, repository in reversed(SHORT_NAMES.items())}
    return [Offer(name, 2 * (PARAMETERS.get(name) or parameters_of(repository)))
            for repository, name in reversed(first.items())]


def best_offers(memory: float) -> list[Offer]:
    """The best quantized files that fit into this much memory, the largest first."""
    return [Offer(model, size, kind="gguf") for needed, size, model in BETTER
            if needed <= SHARE * memory][:MOST_BEST]


# what the hub has ---------------------------------------------------------------------------------


def search(hub, text: str) -> list[Offer]:
    """The models whose names match, the most downloaded first; sizes are estimates."""
    with hub_errors(hub, shown(text)):
        try:
            found = [each for each in ask_for_models(hub, text) if isinstance(each, dict)]
        except Exception as error:
            if isinstance(error, hub.errors.HfHubHTTPError):
                raise
            raise ConfigError(f"no connection to the hub: {why_unreachable(hub, error)}") from None
    offers = []
    for each in found[:MOST_FOUND]:
        name = str(each.get("id"))
        if hub_model(name) is None or not is_plain_path(name):
            continue
        tags = each.get("tags") or ()
        kind = next((kind for kind in ("gguf", "safetensors") if kind in tags), "")
        problem = "" if kind else "it has neither safetensors nor GGUF files"
        offers.append(Offer(
            name, estimated_bytes(name, each, kind), kind=kind, gated=bool(each.get("gated")),
            downloads=each.get("downloads") or 0, problem=problem))
    return offers


def ask_for_models(hub, text: str) -> list:
    """What the hub's search answers. Not by HfApi.list_models, which tries for 23 s without a network."""
    words = [("search", text), ("sort", "downloads"), ("direction", "-1"), ("limit", str(MOST_FOUND))]
    fields = [("expand[]", name) for name in ("tags", "gated", "downloads", "gguf", "safetensors")]
    session = hub.utils.get_session()
    url = f"{hub.constants.ENDPOINT}/api/models"
    for query in (words + fields, words + [("full", "true")]):  # a mirror may not know the fields
        answer = session.get(url, params=query, headers=hub.utils.build_hf_headers(), timeout=SEARCH_S)
        if answer.status_code != 400:
            break
    hub.utils.hf_raise_for_status(answer)
    found = answer.json()
    return found if isinstance(found, list) else []


BITS = {"F64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I8": 8, "U8": 8, "F8_E4M3": 8}


def estimated_bytes(name: str, model: dict, kind: str) -> int:
    """Estimate the bytes of a model that a search found, from the hub's counts or else from its name. A GGUF
    file is taken for one of type Q4_K_M, which has about 4.9 bits a weight."""
    counted = model.get(kind)
    if not isinstance(counted, dict):
        counted = {}
    by_type = counted.get("parameters")
    if kind == "safetensors" and isinstance(by_type, dict):
        bits = [count * BITS.get(str(of_type).upper(), 16)
                for of_type, count in by_type.items() if isinstance(count, int)]
        return int(sum(bits) // 8)
    total = counted.get("total")
    parameters = total if isinstance(total, int) and total else parameters_of(name)
    weight_bytes = 0.61 if kind == "gguf" else 2
    return int(parameters * weight_bytes)


def look(hub, text: str) -> list[Offer]:
    """The forms of one model that the hub has: the folder of safetensors, and each GGUF file. Says whether
    this program can run it, judged by the header of the file that `text` names, or of the first."""
    repository, file = named_model(text)
    with hub_errors(hub, repository):
        try:
            sizes, revision, _ = list_repository(hub, repository)
        except Unreachable as error:
            raise ConfigError(f"no connection to the hub: {why_unreachable(hub, error.args[0])}") from None
        wanted = []
        problem = ""
        if file or not several_ggufs(repository, sizes):
            wanted = hub_files(repository, file, sizes)
            problem = problem_of(hub, repository, revision, wanted, sizes)
        offers = []
        for name, names in models_of(repository, sizes):
            cached = [each for each in names if isinstance(
                hub.try_to_load_from_cache(repository, each, revision=revision), str)]
            offers.append(Offer(
                name, total_bytes(names, sizes), total_bytes(cached, sizes), len(cached) == len(names),
                problem if names == wanted else "", kind=kind_of(names)))
    return sorted(offers, key=lambda offer: offer.name != joined_name(repository, file))


def total_bytes(names: Seq[str], sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names)


def kind_of(names: Seq[str]) -> str:
    """The kind of a model with these files, as offers name it."""
    return "gguf" if names[0].lower().endswith(".gguf") else "safetensors"


def several_ggufs(repository: str, sizes: dict[str, int]) -> bool:
    try:
        return not hub_files(repository, "", sizes)
    except ConfigError:
        return any(name.lower().endswith(".gguf") for name in sizes)


def models_of(repository: str, names: dict[str, int] | Seq[str]) -> Iterator[tuple[str, list[str]]]:
    """(MODEL, its files) of all that a repository has: the folder of safetensors or the nanochat checkpoint,
    and each GGUF file."""
    with contextlib.suppress(ConfigError):
        files = hub_files(repository, "", names)
        if "config.json" in files or files[-1].endswith(".pt"):
            yield repository, files
    ggufs = set()
    for name in names:
        if name.lower().endswith(".gguf") and ":" not in name and not re.fullmatch(BESIDE_MODEL, name):
            ggufs.add(re.sub(SPLIT_GGUF, "", name))
    for name in sorted(ggufs):
        with contextlib.suppress(ConfigError):
            yield f"{repository}:{name}", hub_files(repository, name, names)


def problem_of(hub, repository: str, revision: str, names: Seq[str], sizes: dict[str, int]) -> str:
    """Why this program cannot run a model, as far as its config.json or the beginning of its GGUF file tells;
    "" if it can."""
    with tempfile.TemporaryDirectory(prefix="chat_server-") as folder:
        try:
            if names[0].lower().endswith(".gguf"):
                length = HEADER_BYTES
                while length <= MOST_HEADER:
                    place = Path(folder, "model.gguf")
                    place.write_bytes(beginning(hub, repository, revision, names[0], length))
                    if refuse_early(joined_name(repository, names[0]), place, sizes[names[0]]):
                        break
                    length *= 2
                return ""
            if names[-1].endswith(".pt"):  # nanochat's: all its architectures are known
                return ""
            if not tokenizers_of(sizes):
                return "it has no tokenizer.json" + other_tokenizers(sizes)
            Path(folder, "config.json").write_bytes(
                beginning(hub, repository, revision, "config.json", CONFIG_BYTES))
            refuse_early(repository, Path(folder))
        except CannotRun as error:
            return str(error).partition(" is not downloaded: ")[2] or str(error)
        except Truncated:
            return ""
    return ""


class Enough(Exception):
    """The bytes of a file that were wanted have arrived."""


class Beginning(io.BytesIO):
    """A file that takes the first `most` bytes, then raises Enough."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def write(self, data) -> int:
        super().write(bytes(data)[:self.most - self.tell()])
        if self.tell() >= self.most:
            raise Enough
        return len(data)


def beginning(hub, repository: str, revision: str, name: str, most: int) -> bytes:
    """Download the first `most` bytes of a file."""
    hub.utils.disable_progress_bars()
    file = Beginning(most)
    headers = {**hub.utils.build_hf_headers(), "Range": f"bytes=0-{most - 1}"}
    with contextlib.suppress(Enough):
        try:
            hub.file_download.http_get(
                hub.hf_hub_url(repository, name, revision=revision), file, headers=headers)
        except OSError:  # the library expects the whole file
            if not file.tell():
                raise
    return file.getvalue()


# what the cache has -------------------------------------------------------------------------------


def folder_of(repository: str) -> Path:
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def cached_models() -> list[Offer]:
    """The models in the cache, unfinished ones included."""
    offers = []
    for folder in sorted(hub_cache().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        if hub_model(repository) is None or folder.is_symlink():
            continue
        names = names_in(folder)
        found = []
        for name, files in models_of(repository, names):
            size = total_bytes(files, names)
            found.append(Offer(name, size, size, is_whole(folder, names, files), kind=kind_of(files)))
        begun = sum(part.stat().st_size for part in folder.glob(".chat_server.*") if part.is_file())
        if not found or begun:
            found.append(Offer(repository, here=begun or folder_bytes(folder)))
        offers += found
    return offers


def snapshot_of(folder: Path) -> Path | None:
    """The snapshot that is used without a connection; if none is noted, the newest."""
    if (revision := revision_of(folder)) and (main := folder / "snapshots" / revision).is_dir():
        return main
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def names_in(folder: Path) -> dict[str, int]:
    """The files of a repository's snapshot, with their sizes."""
    names: dict[str, int] = {}
    if snapshot := snapshot_of(folder):
        for path in snapshot.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    names[path.relative_to(snapshot).as_posix()] = path.stat().st_size
    return names


def is_whole(folder: Path, names: dict[str, int], files: Seq[str]) -> bool:
    """Whether all files of a model are in the cache."""
    if split := re.search(r"(?i)-of-(\d{5})\.(gguf|safetensors)$", files[-1]):
        if len([name for name in files if name.endswith(split[0])]) != int(split[1]):
            return False
    if INDEX in files and WHOLE not in names:
        with contextlib.suppress(ConfigError):
            return indexed_shards((snapshot_of(folder) or folder) / INDEX) <= {*names}
        return False
    return True


def delete_model(repository: str, file: str) -> int:
    """Remove a model's repository, or one GGUF file of it, from the cache. Returns the bytes that this frees.

    Raises ConfigError if it is not there, or while another process downloads into it."""
    folder = folder_of(repository)
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{repository} is not in the cache")

    before = folder_bytes(folder)
    began_s = time.monotonic()

    def busy(stage: str, fraction: float):
        if time.monotonic() - began_s > BUSY_S:
            raise ConfigError(f"{repository} is being downloaded by another process")
    try:
        with download_lock(folder, busy):
            if file:
                delete_file(repository, file, folder)
            if not file or not any(path.is_file() for path in folder.glob("snapshots/*/**/*")):
                shutil.rmtree(folder)
                shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{repository} cannot be deleted: {error.strerror}") from None
    return before - folder_bytes(folder)


def delete_file(repository: str, file: str, folder: Path):
    """Remove a GGUF file from all snapshots, with all its parts, then the blobs that no snapshot links to. If
    no snapshot has the file, remove its unfinished download."""
    there = set()
    for snapshot in folder.glob("snapshots/*"):
        there.update(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.[gG][gG][uU][fF]"))
    try:
        names = hub_files(repository, file, there)
    except ConfigError:
        if parts := [*folder.glob(".chat_server.*")]:
            names = []
            for part in parts:
                part.unlink()
        else:
            raise ConfigError(f"{joined_name(repository, file)} is not in the cache") from None
    left = there.difference(names)
    if all(re.fullmatch(BESIDE_MODEL, name) for name in left):
        names = there  # an image encoder is of no use without its model
    for snapshot in folder.glob("snapshots/*"):
        for name in names:
            (snapshot / name).unlink(missing_ok=True)
    linked = {path.resolve() for path in folder.glob("snapshots/*/**/*") if path.is_file()}
    for blob in folder.glob("blobs/*"):
        if blob.resolve() not in linked:
            blob.unlink()


QUESTIONS: dict[str, Callable[..., list[Offer]]] = {"search": search, "look": look}


# the process --------------------------------------------------------------------------------------


def hub_main(arguments: Seq[str]) -> int:
    """The role `hub`: answer questions, or download a model."""
    channel = join_parent(arguments, HUB_PIPE)
    last = HubProgress("", 0, 0)
    spoke_s = 0.0

    def report(stage: str, done: int, whole: int):
        nonlocal last, spoke_s
        news = stage != last.stage or done - last.done >= SPEAK_BYTES
        if news or time.monotonic() - spoke_s >= SPEAK_S:
            last = HubProgress(stage, done, whole)
            spoke_s = time.monotonic()
            channel.send(last)

    def answer(message) -> HubOffers | HubFetched:
        if isinstance(message, HubFetch):
            repository, file = named_model(message.name)
            limits = DownloadLimits(True, message.disk, message.reserved)
            return HubFetched(fetch(repository, file, report, limits))
        question = QUESTIONS[message.kind]
        return HubOffers(tuple(question(load_hub("the Hugging Face hub"), message.text)))

    while True:
        try:
            (message,) = channel.receive(wait=True, most=1)
            try:
                channel.send(answer(message))
            except ChatServerError as error:
                channel.send(Unusable(printable(str(error))))
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                channel.send(Crashed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        except (EOFError, ConnectionError):  # the front has ended
            return 0
