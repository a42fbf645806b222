"""The command `push`: an exported folder or a GGUF file goes to a repository of the Hugging Face hub.

Large files are uploaded first, one after the other, and then one commit makes all of them visible: nobody
sees half a model. The hub knows a file by its SHA-256, so a push that was interrupted does not upload its
files again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from pathlib import Path

from chatlm.cli import CommandLine
from chatlm.common.config import file_name
from chatlm.common.errors import ConfigError, error_text, printable
from chatlm.common.hub.huggingface import load_hub, status_of
from chatlm.common.hub.repository import FOLDER_FILES, INDEX, hub_model
from chatlm.common.hub.links import refuse_outside
from chatlm.common.invocation import program_command, tool_command
from chatlm.common.log import ProgressDisplay

ABOUT = ("Upload an exported folder, or a GGUF file, to a repository of the Hugging Face hub, which is made "
         "if it is not there: private, unless --public. The token is that of `hf auth login`, or HF_TOKEN. "
         "What was interrupted goes on where it was when the same command runs again.")
STALE = rf"model(-\d+-of-\d+)?\.safetensors|{re.escape(INDEX)}"  # weights that another export has left there

# What a model needs; a folder may also have the optimizer, logs and notes of its training
NEEDED = "|".join((
    *map(re.escape, sorted(FOLDER_FILES)), r"[^./][^/]*\.(safetensors|gguf|safetensors\.index\.json)",
    r"(additional_chat_templates|chat_templates)/[\w.-]+\.jinja",
    r"\d+_\w+/(config\.json|model\.safetensors)", r"adapter_config\.json|imatrix\.dat",
    r"vocab\.(json|txt)|merges\.txt|(spiece|sentencepiece\.bpe)\.model|video_preprocessor_config\.json",
    r"(README|LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)(\.(md|txt|pdf))?",
    r"(configuration|modeling|tokenization|processing|image_processing)_\w+\.py"))
MOST_NAMED = 8  # files, by a line


def parse_push_words(words: Seq[str]) -> argparse.Namespace:
    parser = CommandLine(prog=f"{program_command()} push", allow_abbrev=False, description=ABOUT)
    parser.add_argument("path", metavar="FOLDER", type=file_name,
                        help="what `export` has written: a folder, or a .gguf file")
    parser.add_argument("repository", metavar="ORG/NAME", help="the repository")
    parser.add_argument("--public", action="store_true", help="everybody may read it")
    parser.add_argument("--message", default="Upload a model", help="of the commit (default: Upload a model)")
    values = parser.parse_args(words)
    known = hub_model(values.repository)
    if known is None or known != (values.repository, ""):
        parser.error(f"{printable(values.repository)!r} is not the name of a repository such as org/name")
    if not values.message.strip():
        parser.error("--message: it is empty")
    return values


def push_lines(words: Seq[str]) -> Iterator[str]:
    """Push what the words name; yields the lines to print."""
    asked = parse_push_words(words)
    path = Path(asked.path).expanduser()
    files = files_to_push(path)
    hub = load_hub("push")
    if left := left_out(path, files):
        yield left
    progress = ProgressDisplay()
    if not progress.bar:
        hub.utils.disable_progress_bars()
    try:
        with push_errors(hub, asked.repository):
            url = push(hub, asked, files, progress)
    finally:
        progress.close()
    yield url


def files_to_push(path: Path) -> dict[str, Path]:
    """Name in the repository -> file, of all that a model needs. ConfigError for what is not a model that
    `export` has written, and for a file that lies elsewhere."""
    if path.name.startswith(".") and path.name.endswith(".unfinished"):
        raise ConfigError(f"{path} is an export that is not complete: run `export` again")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return {path.name: path}
    if not path.is_dir():
        raise ConfigError(f"{path} is neither a folder that `export` has written nor a .gguf file")
    files = {}
    for name, file in files_below(path):
        if re.fullmatch(NEEDED, name):
            refuse_outside(file, path)
            files[name] = file
    has_weights = any(name.endswith(".safetensors") for name in files)
    has_gguf = any(name.lower().endswith(".gguf") for name in files)
    if not (has_gguf or has_weights and "config.json" in files):
        raise ConfigError(f"{path} is no model: it must have a config.json and *.safetensors, or *.gguf")
    return files


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def left_out(path: Path, files: Mapping[str, Path]) -> str:
    """A line about what of a folder is not uploaded; "" if all of it is."""
    left = [name for name, _ in files_below(path) if name not in files] if path.is_dir() else []
    more = f" and {len(left) - MOST_NAMED:,} more" if len(left) > MOST_NAMED else ""
    return f"not uploaded, as no model needs it: {', '.join(left[:MOST_NAMED])}{more}" if left else ""


def push(hub, asked: argparse.Namespace, files: dict[str, Path], progress: ProgressDisplay) -> str:
    """Upload the files and commit them. Returns the repository's address."""
    api = hub.HfApi()
    name = asked.repository
    api.create_repo(name, private=not asked.public, exist_ok=True)
    there = api.model_info(name)
    if not asked.public and there.private is False:
        raise ConfigError(f"{name} is public already; --public says that everybody may read the model")
    operations: list = [hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file))
                        for path, file in files.items()]
    for number, operation in enumerate(operations):
        if not progress.bar:  # else the library shows bars of its own
            progress(f"uploading {operation.path_in_repo}", number / len(operations))
        api.preupload_lfs_files(name, [operation], free_memory=False)
    stale = [each.rfilename for each in there.siblings or () if re.fullmatch(STALE, each.rfilename)]
    if "config.json" in files:
        operations += [hub.CommitOperationDelete(path_in_repo=path) for path in stale if path not in files]
    api.create_commit(name, operations, commit_message=asked.message)
    return f"{api.endpoint}/{name}"


@contextmanager
def push_errors(hub, name: str) -> Iterator[None]:
    """Turn the library's exceptions into a ConfigError that says what the user must do."""
    log_in = f"`{tool_command('hf')} auth login`, or set HF_TOKEN"
    try:
        yield
        return
    except ConfigError:
        raise
    except hub.errors.LocalTokenNotFoundError:
        reason = f"the hub must know who you are: run {log_in}"
    except hub.errors.HfHubHTTPError as error:
        status = status_of(error)
        reason = f"{hub.constants.ENDPOINT} answers with HTTP status {status}"
        if status in (401, 403, 404):
            reason += f": the token must be allowed to write to {name}; run {log_in}"
    except Exception as error:
        reason = error_text(error.__cause__ or error)
        if hub.constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
    raise ConfigError(f"{name} cannot be pushed: {reason}. What is uploaded stays there, and the same "
                      "command goes on")
