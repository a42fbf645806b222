"""The role `hub`: what the Hugging Face hub and its cache have, and downloads, for a server's front.

The front starts one for each download. To cancel it is to end the process: what was written stays, and the
next download of the model continues there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence as Seq
from pathlib import Path

from chatlm.common.errors import ChatServerError, ConfigError, bad_value, printable, shown
from chatlm.common.files import Truncated
from chatlm.common.hub.better import BETTER, SHARE
from chatlm.common.hub.huggingface import (
    BESIDE_MODEL, FOLDER_FILES, HEADER_BYTES, INDEX, SPLIT_GGUF, WHOLE, Bounds, CannotRun, Unreachable,
    fetch, folder_bytes, hub_errors, hub_files, hub_listing, hub_model, is_plain_path, load_hub,
    other_tokenizers, refuse_early, why_unreachable)
from chatlm.common.hub.local import download_lock
from chatlm.common.hub.short_names import PARAMETERS, SHORT_NAMES
from chatlm.common.messages.protocol import (
    HUB_PIPE, Crashed, HubFetch, HubFetched, HubOffers, HubProgress, HubQuestion, Offer, Unusable)
from chatlm.common.processes.child import join_parent

MOST_FOUND = 30          # results of a search
SEARCH_S = 10.0          # that a search may take
MOST_BEST = 3            # models that are offered as those that fit best
MOST_HEADER = 64 << 20   # of a GGUF file: beyond that the download itself looks
CONFIG_BYTES = 1 << 20   # of a config.json
# between two reports of progress; whichever comes first
SPEAK_S = 0.1
SPEAK_BYTES = 4 << 20
BUSY_S = 3.0             # that a process which was just ended may still hold its lock


def named_model(text: str) -> tuple[str, str]:
    """(repository, file or "") of a name that came over HTTP. RequestError for anything but a short name, an
    id, or an id with a file of its repository after a colon: nothing here becomes a path of its own."""
    found = hub_model(text) if len(text) <= 300 else None
    if not found or found[1] and not is_plain_path(found[1]) or ".." in found[0]:
        raise bad_value("model", text, "the name of a model of the Hugging Face hub (owner/name, "
                        "owner/name:FILE, owner/name:Q4_K_M, or a short name such as llama3.2-1b)")
    return found


def joined_name(repository: str, file: str) -> str:
    return f"{repository}:{file}" if file else repository


def is_of_hub(path: Path, repository: str, file: str) -> bool:
    """Is a model's path one of a repository in the hub's cache, or of this GGUF file of it?"""
    if folder_of(repository).name not in path.parts:
        return False
    name = re.sub(SPLIT_GGUF, "", path.name, flags=re.IGNORECASE).lower().removesuffix(".gguf")
    wanted = re.sub(SPLIT_GGUF, "", file, flags=re.IGNORECASE).lower().removesuffix(".gguf")
    return not file or path.suffix.lower() == ".gguf" and name.endswith(wanted.rpartition("/")[2])


def parameters_of(name: str) -> int:
    """About how many parameters a model has, by its name: 8B, 0.6b, 30B-A3B, 8x7B; 0 if it does not say."""
    match = re.search(r"(?<![A-Za-z\d.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z\d])", name.lower())
    if not match:
        return 0
    return int(int(match[1] or 1) * float(match[2]) * {"b": 1e9, "m": 1e6}[match[3]])


def active_share(name: str) -> float:
    """About which share of its weights a model reads for a token, by its name: 30B-A3B reads a tenth."""
    active = re.search(r"(?<![A-Za-z\d])[Aa](\d+(?:\.\d+)?)[Bb](?![A-Za-z\d])", name)
    whole = parameters_of(name)
    return min(1.0, float(active[1]) * 1e9 / whole) if active and whole else 1.0


def short_offers() -> list[Offer]:
    """One for each model with a short name; `bytes` is estimated from its name, as 16-bit weights."""
    first = {repository: name for name, repository in reversed(SHORT_NAMES.items())}
    return [Offer(name, 2 * (PARAMETERS.get(name) or parameters_of(repository)))
            for repository, name in reversed(first.items())]


def best_offers(memory: float) -> list[Offer]:
    """What fits best into this much memory: quantized files, the largest first."""
    return [Offer(model, size, kind="gguf") for needed, size, model in BETTER
            if needed <= SHARE * memory][:MOST_BEST]


# what the hub has ---------------------------------------------------------------------------------


def search(hub, text: str) -> list[Offer]:
    """The models whose names match, the most downloaded first; sizes are estimates."""
    with hub_errors(hub, shown(text)):
        try:
            found = [each for each in models_found(hub, text) if isinstance(each, dict)]
        except Exception as error:
            if isinstance(error, hub.errors.HfHubHTTPError):
                raise
            raise ConfigError(f"no connection to the hub: {why_unreachable(hub, error)}") from None
    offers = []
    for each in found[:MOST_FOUND]:
        name = str(each.get("id"))
        if hub_model(name) is None or not is_plain_path(name):
            continue
        kind = next((kind for kind in ("gguf", "safetensors") if kind in (each.get("tags") or ())), "")
        offers.append(Offer(name, estimated_bytes(name, each, kind), kind=kind, gated=bool(each.get("gated")),
                            downloads=each.get("downloads") or 0,
                            problem="" if kind else "it has neither safetensors nor GGUF files"))
    return offers


def models_found(hub, text: str) -> list:
    """What the hub's search answers. HfApi.list_models is not used: without a network it tries for 23 s."""
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
    """About how large a model that a search found is: by what the hub counted, else by its name. Of GGUF
    files, one of about 4.9 bits for a weight, as Q4_K_M."""
    counted = model.get(kind)
    counted = counted if isinstance(counted, dict) else {}
    parameters = counted.get("parameters")
    total = counted.get("total")
    if kind == "safetensors" and isinstance(parameters, dict):
        return int(sum(count * BITS.get(str(of_type).upper(), 16) // 8
                       for of_type, count in parameters.items() if isinstance(count, int)))
    known = total if isinstance(total, int) else 0
    return int((known or parameters_of(name)) * (0.61 if kind == "gguf" else 2))


def look(hub, text: str) -> list[Offer]:
    """What there is of a model: the folder of safetensors and each GGUF file. The header of the first, or of
    the file that `text` names, says whether this program can run it."""
    repository, file = named_model(text)
    with hub_errors(hub, repository):
        try:
            sizes, revision, _ = hub_listing(hub, repository)
        except Unreachable as error:
            raise ConfigError(f"no connection to the hub: {why_unreachable(hub, error.args[0])}") from None
        wanted = hub_files(repository, file, sizes) if file or not several_ggufs(repository, sizes) else []
        problem = problem_of(hub, repository, revision, wanted, sizes) if wanted else ""
        offers = []
        for name, names in models_of(repository, sizes):
            here = [hub.try_to_load_from_cache(repository, each, revision=revision) for each in names]
            kept = sum(sizes[each] for each, path in zip(names, here) if isinstance(path, str))
            offers.append(Offer(name, sum(sizes[each] for each in names), kept, all(
                isinstance(path, str) for path in here), problem if names == wanted else "",
                kind="gguf" if names[0].lower().endswith(".gguf") else "safetensors"))
    return sorted(offers, key=lambda offer: offer.name != joined_name(repository, file))


def several_ggufs(repository: str, sizes: dict[str, int]) -> bool:
    try:
        return not hub_files(repository, "", sizes)
    except ConfigError:
        return any(name.lower().endswith(".gguf") for name in sizes)


def models_of(repository: str, names: dict[str, int] | Seq[str]) -> Iterator[tuple[str, list[str]]]:
    """(MODEL, its files) of the folder of safetensors or nanochat's checkpoint, and of each GGUF file that a
    repository has."""
    with contextlib.suppress(ConfigError):
        files = hub_files(repository, "", names)
        if "config.json" in files or files[-1].endswith(".pt"):
            yield repository, files
    whole = {re.sub(SPLIT_GGUF, "", name, flags=re.IGNORECASE)
             for name in names if name.lower().endswith(".gguf") and ":" not in name
             and not re.fullmatch(BESIDE_MODEL, name)}
    for name in sorted(whole):
        with contextlib.suppress(ConfigError):
            yield f"{repository}:{name}", hub_files(repository, name, names)


def problem_of(hub, repository: str, revision: str, names: Seq[str], sizes: dict[str, int]) -> str:
    """Why this program cannot run a model, by its config.json or the beginning of its GGUF file; "" if it
    can, as far as these tell."""
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
            if names[-1].endswith(".pt"):  # of nanochat, whose architectures are all known
                return ""
            if "tokenizer.json" not in sizes:
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
    """As many bytes of a file are here as were wanted."""


class Beginning(io.BytesIO):
    """Takes the first `most` bytes that are written."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def write(self, data) -> int:
        super().write(bytes(data)[:self.most - self.tell()])
        if self.tell() >= self.most:
            raise Enough
        return len(data)


def beginning(hub, repository: str, revision: str, name: str, most: int) -> bytes:
    """The first bytes of a file, by a request for a range."""
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


def hub_cache() -> Path:
    """Where huggingface_hub keeps models. To import it takes half a second, so this follows its rules."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser().absolute()


def folder_of(repository: str) -> Path:
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def cached_models() -> list[Offer]:
    """The models in the cache, also those of which only a part is here."""
    offers = []
    for folder in sorted(hub_cache().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        if hub_model(repository) is None or folder.is_symlink():
            continue
        names = names_in(folder)
        found = [Offer(name, size := sum(names[each] for each in files), size, is_whole(folder, names, files),
                       kind="gguf" if files[0].lower().endswith(".gguf") else "safetensors")
                 for name, files in models_of(repository, names)]
        begun = sum(part.stat().st_size for part in folder.glob(".chat_server.*") if part.is_file())
        if not found or begun:
            found.append(Offer(repository, here=begun or folder_bytes(folder)))
        offers += found
    return offers


def snapshot_of(folder: Path) -> Path | None:
    """The snapshot that is used without a connection, or the newest."""
    with contextlib.suppress(OSError):
        main = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        if main.is_dir():
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
    """Are all parts of a model here?"""
    if split := re.search(r"-of-(\d{5})\.(gguf|safetensors)$", files[-1]):
        if len([name for name in files if name.endswith(split[0])]) != int(split[1]):
            return False
    if INDEX in files and WHOLE not in names:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            index = (snapshot_of(folder) or folder) / INDEX
            return {*json.loads(index.read_bytes())["weight_map"].values()} <= {*names}
        return False
    return True


def delete_model(repository: str, file: str) -> int:
    """Remove a model from the cache: all of its repository, or one GGUF file; returns the bytes. ConfigError
    if it is not there, or while another process downloads into it."""
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
    """Remove the parts of a GGUF file from all snapshots, then the blobs that no snapshot links to, and
    what was begun of others."""
    there = sorted({path.relative_to(snapshot).as_posix() for snapshot in folder.glob("snapshots/*")
                    for path in snapshot.rglob("*.gguf")})
    try:
        names = hub_files(repository, file, there)
    except ConfigError:
        if parts := [*folder.glob(".chat_server.*")]:
            names = []
            for part in parts:
                part.unlink()
        else:
            raise ConfigError(f"{joined_name(repository, file)} is not in the cache") from None
    if all(re.fullmatch(BESIDE_MODEL, name) for name in {*there} - {*names}):
        names = there  # what is left would have no model beside it
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
            return HubFetched(fetch(repository, file, report, Bounds(True, message.disk, message.reserved)))
        return HubOffers(tuple(QUESTIONS[message.kind](load_hub("the Hugging Face hub"), message.text)))

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
