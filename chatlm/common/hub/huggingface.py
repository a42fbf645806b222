"""Models from the Hugging Face hub."""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, named, require_library
from chatlm.common.hub.local import FULL, download_lock, has_room, sha256_of
from chatlm.common.log import log
from chatlm.common.processes.start import PROCESS_COMMAND

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress


SHORT_NAMES = {  # of each row, the first size needs no name; a GGUF file's after a colon
    name: repository.format(size) for short, repository, sizes in (
        ("llama3.1", "meta-llama/Llama-3.1-{}-Instruct", "8B 70B"),
        ("llama3.2", "meta-llama/Llama-3.2-{}-Instruct", "3B 1B"),
        ("llama3.3", "meta-llama/Llama-3.3-{}-Instruct", "70B"),
        ("qwen2.5", "Qwen/Qwen2.5-{}-Instruct", "7B 0.5B 1.5B 3B 14B 32B 72B"),
        ("qwen3", "Qwen/Qwen3-{}", "8B 0.6B 1.7B 4B 14B 32B 30B-A3B 235B-A22B"),
        ("qwen3.5", "Qwen/Qwen3.5-{}", "4B 0.8B 2B 9B 27B 35B-A3B 122B-A10B 397B-A17B"),
        ("qwen3.6", "Qwen/Qwen3.6-{}", "27B 35B-A3B"),
        ("qwen3-next", "Qwen/Qwen3-Next-{}-Instruct", "80B-A3B"),
        ("lfm2", "LiquidAI/LFM2-{}", "1.2B 350M 700M 2.6B 8B-A1B 24B-A2B"),
        ("lfm2.5", "LiquidAI/LFM2.5-{}-Instruct", "1.2B"),
        ("granite3.3", "ibm-granite/granite-3.3-{}-instruct", "8b 2b"),
        ("granite4", "ibm-granite/granite-4.0-{}", "micro 1b 350m"),
        ("granite4-h", "ibm-granite/granite-4.0-h-{}", "tiny micro small"),
        ("gemma2", "google/gemma-2-{}-it", "9b 2b 27b"),
        ("gemma3", "google/gemma-3-{}-it", "1b 270m 4b 12b 27b"),
        ("gemma4", "google/gemma-4-{}-it", "E4B E2B 12B 26B-A4B 31B"),
        ("smollm2", "HuggingFaceTB/SmolLM2-{}-Instruct", "1.7B 135M 360M"),
        ("smollm3", "HuggingFaceTB/SmolLM3-{}", "3B"),
        ("mistral", "mistralai/Mistral-{}-Instruct-v0.3", "7B"),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Instruct-2407", ""),
        ("mistral-small", "mistralai/Mistral-Small-24B-Instruct-2501", ""),
        ("ministral3", "mistralai/Ministral-3-{}-Instruct-2512", "8B 3B 14B"),
        ("mixtral", "mistralai/Mixtral-{}-Instruct-v0.1", "8x7B 8x22B"),
        ("olmo2", "allenai/OLMo-2-1124-{}-Instruct", "7B 13B"),
        ("olmo2-1b", "allenai/OLMo-2-0425-1B-Instruct", ""),
        ("olmo3", "allenai/Olmo-3-{}-Instruct", "7B"), ("olmo3.1", "allenai/Olmo-3.1-{}-Instruct", "32B"),
        ("olmoe", "allenai/OLMoE-1B-7B-0125-Instruct", ""), ("glm4", "zai-org/GLM-4-{}-0414", "9B 32B"),
        ("exaone4", "LGAI-EXAONE/EXAONE-4.0-{}", "1.2B 32B"),
        ("seed-oss", "ByteDance-Seed/Seed-OSS-{}-Instruct", "36B"),
        ("hunyuan", "tencent/Hunyuan-{}-Instruct", "7B 0.5B 1.8B 4B"),
        ("command-r", "CohereLabs/c4ai-command-r-08-2024", ""),
        ("command-r7b", "CohereLabs/c4ai-command-r7b-12-2024", ""),
        ("command-a", "CohereLabs/c4ai-command-a-03-2025", ""),
        ("starcoder2", "bigcode/starcoder2-{}", "3b 7b 15b"),
        ("pythia", "EleutherAI/pythia-{}", "1b 70m 160m 410m 1.4b 2.8b 6.9b 12b"),
        ("gpt2", "openai-community/gpt2", ""), ("gpt2-xl", "openai-community/gpt2-xl", ""),
        ("nemotron-nano2", "nvidia/NVIDIA-Nemotron-Nano-{}-v2", "9B 12B"),
        ("nemotron3-nano", "nvidia/NVIDIA-Nemotron-3-Nano-{}-BF16", "30B-A3B"),
        ("nemotron3-super", "nvidia/NVIDIA-Nemotron-3-Super-{}-BF16", "120B-A12B"),
        ("phi3.5", "microsoft/Phi-3.5-mini-instruct", ""),
        ("phi3.5-moe", "microsoft/Phi-3.5-MoE-instruct", ""),
        ("phi4", "microsoft/phi-4", ""), ("phi4-mini", "microsoft/Phi-4-mini-instruct", ""),
        ("gpt-oss", "openai/gpt-oss-{}", "20b 120b"),
        ("qwen3-embedding", "Qwen/Qwen3-Embedding-{}", "0.6B 4B 8B"),
        ("qwen3-reranker", "Qwen/Qwen3-Reranker-{}", "0.6B 4B 8B"),
        ("all-minilm", "sentence-transformers/all-MiniLM-{}-v2", "L6 L12"),
        ("all-mpnet-base", "sentence-transformers/all-mpnet-base-v2", ""),
        ("bge", "BAAI/bge-{}-en-v1.5", "base small large"),
        ("bge-m3", "gpustack/bge-m3-GGUF:Q8_0", ""),
        ("bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3", ""),
        ("embeddinggemma", "google/embeddinggemma-{}", "300m"),
        ("multilingual-e5", "intfloat/multilingual-e5-{}", "large small base"),
        ("mxbai-embed-large", "mixedbread-ai/mxbai-embed-large-v1", ""),
        ("nomic-embed-text", "nomic-ai/nomic-embed-text-{}", "v1.5"),
        ("nomic-embed-text-v2-moe", "nomic-ai/nomic-embed-text-v2-moe", ""),
        ("snowflake-arctic-embed", "Snowflake/snowflake-arctic-embed-{}", "l xs s m"),
        ("snowflake-arctic-embed2", "Snowflake/snowflake-arctic-embed-l-v2.0", ""))
    for index, size in enumerate(sizes.split() or [""])
    for name in (short, f"{short}-{size.lower()}")[index > 0:1 + (size > "")]}
SPLIT_GGUF = r"-\d{5}-of-\d{5}(?=\.gguf$)"  # of one part of a model in several files
BESIDE_MODEL = r"(?i).*(?<![a-z])(mmproj|imatrix)(?![a-z])[^/]*"  # encoders of images, and of quantizers
FOLDER_FILES = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
                "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
                "additional_chat_templates/tool_use.jinja", "modules.json", "1_Pooling/config.json",
                "config_sentence_transformers.json", "sentence_bert_config.json",
                "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
DENSE_FILES = r"\d+_Dense/(config\.json|model\.safetensors)"  # of an embedder's modules after its pooling


def hub_model(text: str) -> tuple[str, str] | None:
    """(repository, file or "") if MODEL is a short name or has the form of a Hugging Face id."""
    text = SHORT_NAMES.get(text.lower().replace(":", "-"), text)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:\\]+))?", text, re.ASCII)
    if not match or not match[2] and Path(text).suffix.lower() == ".gguf":
        return None
    return match[1], match[2] or ""


def http_status(error) -> int:
    return error.response.status_code


def fetch_from_hub(repository: str, file: str, progress: Progress) -> Path:
    """A GGUF file or a folder of safetensors in huggingface_hub's cache; what is missing is downloaded.

    The library honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME. Without a connection the cached
    files serve. Raises ConfigError saying what is missing, or what the user must do."""
    hub = require_library("huggingface_hub", f"the Hugging Face model {repository}")
    for part in ("constants", "errors", "file_download"):
        importlib.import_module(f"huggingface_hub.{part}")
    logging.getLogger("huggingface_hub").handlers.clear()  # our log has these lines already
    for name in ("httpx", "httpx2"):  # its HTTP client logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    progress(f"looking for {repository}", 0.0)
    try:
        try:
            info = hub.HfApi().model_info(repository, files_metadata=True, timeout=10)
        except InterruptedError:
            raise
        except Exception as error:  # no connection, in the words of whatever HTTP library it uses
            if isinstance(error, errors.HfHubHTTPError) and http_status(error) < 500:
                raise
            return cached_from_hub(hub, repository, file, error)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        names = hub_files(repository, file, sizes)
        missing = [name for name in names
                   if not isinstance(hub.try_to_load_from_cache(repository, name, revision=info.sha), str)]
        done, whole = 0, sum(sizes[name] for name in missing) or 1
        folder = Path(hub.constants.HF_HUB_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        if not has_room(folder, whole):
            raise no_hub_room(hub, repository, f"{whole:,} bytes")
        looked = "config.json" not in names
        for name in missing:
            if not looked and name not in FOLDER_FILES:
                looked = refuse_early(repository, hub_path(hub, repository, ["config.json"], info.sha))
                if "tokenizer.json" not in sizes:
                    raise ConfigError(f"{repository} is not downloaded: it has no tokenizer.json"
                                      + other_tokenizers(sizes))
            download_from_hub(hub, repository, name, lambda count: progress(
                f"downloading {repository}", min(1.0, (done + count) / whole)), name == names[0])
            done += sizes[name]
        return hub_path(hub, repository, names, info.sha)
    except (ConfigError, InterruptedError):
        raise
    except errors.GatedRepoError:
        reason = (f"it is gated: accept its licence at {endpoint}/{repository}, "
                  "then run `hf auth login` or set HF_TOKEN")
    except errors.RepositoryNotFoundError:
        reason = (f"no file or folder of that name is here, and {endpoint} has no such model (if it is "
                  "private: run `hf auth login` or set HF_TOKEN)")
    except errors.HfHubHTTPError as error:
        status = http_status(error)
        remedy = "; check HF_TOKEN, or run `hf auth login`" if status in (401, 403) else ""
        reason = f"{endpoint} answers with HTTP status {status}{remedy}"
    except Exception as error:
        if getattr(error, "errno", None) in FULL:
            raise no_hub_room(hub, repository, "more") from None
        reason = named(error)
    raise ConfigError(f"{repository} cannot be downloaded: {reason}")


def hub_files(repository: str, file: str, names: Iterable[str]) -> list[str]:
    """Those of a repository's files that make up the model: a GGUF file, or config.json, weights and so on.

    `file` is the GGUF file's name, or the end of it before .gguf: `Q8_0`."""
    parts, names = collections.defaultdict(list), set(names)
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        parts[re.sub(SPLIT_GGUF, "", name, flags=re.IGNORECASE)].append(name)
    ggufs = models_among(parts)  # without the numbers of parts
    if not file and "config.json" in names:
        weights = {name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
        weights = {"model.safetensors"} & names or weights
        if weights:
            weights |= {name for name in names if re.fullmatch(DENSE_FILES, name)}
            return sorted(FOLDER_FILES & names) + sorted(weights)
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


def models_among(ggufs: Iterable[str]) -> list[str]:
    """Those of the GGUF files that are models by their names, or all if none is."""
    ggufs = list(ggufs)
    return [name for name in ggufs if not re.fullmatch(BESIDE_MODEL, name)] or ggufs


def other_weights(names: Iterable[str]) -> str:
    """What to say of weights in formats that are not read, as the end of a sentence; "" without any."""
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


def refuse_early(repository: str, path: Path, size: int | None = None) -> bool:
    """ConfigError if no server can run a model, by the small files of its folder or the beginning of its
    GGUF file of `size` bytes; False if more of that is needed to tell."""
    command = [*PROCESS_COMMAND, "preview", str(path), *([] if size is None else [str(size)])]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PREVIEW_S)
    except (OSError, subprocess.TimeoutExpired):
        return True  # the worker will tell
    if done.returncode == 1 and (reason := done.stdout.decode("utf-8", "replace").strip()):
        reason = reason.replace(f"{path}/", "").replace(str(path), "its file" if size else "it")
        raise ConfigError(f"{repository} is not downloaded: {reason}")
    return done.returncode != 2


def hub_path(hub, repository: str, names: Seq[str], revision: str) -> Path:
    """The GGUF file, or the folder, that these files of the cache make."""
    paths = [hub.try_to_load_from_cache(repository, name, revision=revision) for name in names]
    if not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{repository} changed while it was downloaded; start again")
    return Path(paths[names.index("config.json")]).parent if "config.json" in names else Path(paths[0])


def hub_folder(hub, repository: str) -> Path:
    name = hub.file_download.repo_folder_name(repo_id=repository, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE) / name


def cached_from_hub(hub, repository: str, file: str, error: Exception) -> Path:
    """What the cache has of a model, without a connection; ConfigError if that is not all of it."""
    cache = hub_folder(hub, repository)
    why = "HF_HUB_OFFLINE is set" if hub.constants.is_offline_mode() else \
        f"{hub.constants.ENDPOINT} cannot be reached ({named(error)})"
    lacks = ConfigError(f"no file or folder {repository} is here, {why}, and the cache {cache.parent} does "
                        "not have all files of that model")
    try:
        revision = (cache / "refs" / "main").read_text().strip()
        folder = cache / "snapshots" / revision
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if not names:
            raise lacks
        path = hub_path(hub, repository, hub_files(repository, file, names), revision)
        index = path / "model.safetensors.index.json"
        shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ()
        if not {*shards} <= {*names}:
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


def download_from_hub(hub, repository: str, name: str, progress: Callable[[int], None], is_first: bool):
    """Put a file into huggingface_hub's cache. The first GGUF file of a model is looked at as soon as its
    header is here.

    The library itself begins a file again when its process ended in the middle. So a file is first written
    beside the cache's blobs, where the next start finds it; then the library finds a complete blob."""
    class Bar(contextlib.AbstractContextManager):
        """The part of tqdm's interface that the library uses."""

        look_at = HEADER_BYTES if is_first and name.lower().endswith(".gguf") else sys.maxsize

        def __init__(self, *_, initial: int = 0, total: int | None = None, **__):
            self.n, self.total = initial, total

        def update(self, count: int = 1):
            self.n += count
            progress(self.n)
            if part.exists() and (written := part.stat().st_size) >= Bar.look_at:
                checked = refuse_early(f"{repository}:{name}", part, remote.size)
                Bar.look_at = sys.maxsize if checked else 2 * written

        def __exit__(self, *_):
            pass

        def __getattr__(self, name: str):
            return lambda *_, **__: None

    url, cache = hub.hf_hub_url(repository, name), hub_folder(hub, repository)
    remote = hub.get_hf_file_metadata(url, timeout=10)
    blob, part = cache / "blobs" / str(remote.etag), cache / f".chat_server.{remote.etag}"
    largest = hub.constants.MAX_HTTP_DOWNLOAD_SIZE  # beyond it the library uses a protocol of its own
    if remote.etag and 1 << 20 < (remote.size or 0) <= largest and not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(cache, lambda stage, fraction: progress(0)), open(part, "ab") as file:
            resumed = file.tell()
            while (before := file.tell()) < remote.size:
                try:
                    hub.file_download.http_get(
                        url, file, resume_size=before, tqdm_class=Bar, expected_size=remote.size,
                        headers=hub.utils.build_hf_headers())
                except (hub.errors.HfHubHTTPError, InterruptedError):
                    raise
                except ConfigError:  # no server can run it
                    part.unlink()
                    raise
                except Exception as error:  # the connection broke: retry while bytes arrive
                    if getattr(error, "errno", None) in FULL:
                        raise
                    if file.tell() == before:
                        raise ConfigError(
                            f"the download of {name} of {repository} broke at byte {before:,} of "
                            f"{remote.size:,}: {named(error)}. The next start continues there") from None
            file.flush()
            os.fsync(file.fileno())
            if resumed and re.fullmatch("[0-9a-f]{64}", remote.etag) and sha256_of(part) != remote.etag:
                part.unlink()
                raise ConfigError(f"{name} of {repository} was downloaded in parts that do not fit together; "
                                  "start again")
            os.replace(part, blob)
    hub.hf_hub_download(repository, name, tqdm_class=Bar)
