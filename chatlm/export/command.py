"""The command `export`: its words, and what it does with them."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.cli import CommandLine, add_flag, check_path, unflagged_value
from chatlm.common.config import FLAGS, Settings, file_name, size
from chatlm.common.errors import ConfigError, printable
from chatlm.common.hub.find import SUPPORTED_MODELS, resolve_model
from chatlm.common.hub.stamps import refuse_changed
from chatlm.common.invocation import program_command
from chatlm.common.log import ProgressDisplay
from chatlm.common.processes.child import die_with_parent
from chatlm.export.card import LICENSE, Card, license_of, tags_of, training_facts
from chatlm.export.families import family_model
from chatlm.export.hub_folder import write_folder
from chatlm.export.nanochat_folders import as_transformers_own, with_own_code
from chatlm.export.rounding import difference
from chatlm.export.unfinished import unfinished
from chatlm.worker.weights.formats.checkpoint import CheckpointModel
from chatlm.worker.weights.formats.gguf.model import GgufModel
from chatlm.worker.weights.load import FORMATS, merge_adapters, name_tensors

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource
    from chatlm.export.hub_model import HubModel
    from chatlm.worker.weights.formats.stored_model import Merged

OUTPUT_FORMATS = ("hf", "transformers", "gguf")
OUTPUTS = ("-o FOLDER writes a Hugging Face folder: --format hf, or for a nanochat checkpoint of generation "
           "1 --format transformers. -o FILE.gguf writes a GGUF file, with the flags of quantize")
ABOUT = ("Write a model in a format that other programs read. FOLDER becomes a Hugging Face folder: a "
         "nanochat checkpoint of any generation, exactly, with the code that transformers needs for it; or a "
         "model of a llama-like family, from a GGUF file or a folder, with the adapters of --lora merged. "
         "The folder has its name once it is complete, and MODEL is never changed.")
READ_FLAGS = ("source", "model_tag", "step", "softcap", "lora", "downloads", "models_disk")
DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5 * 1000**3


def parse_export_words(words: Seq[str]) -> tuple[argparse.Namespace, Settings]:
    """What to write, and the Settings for reading MODEL. ConfigError for what does not go together."""
    parser = CommandLine(prog=f"{program_command()} export", allow_abbrev=False, description=ABOUT,
                         epilog=f"MODEL may be: {SUPPORTED_MODELS}.")
    parser.add_argument("model", metavar="MODEL", nargs="?", default=None)
    parser.add_argument("-o", "--output", metavar="OUT", type=file_name, required=True,
                        help="the new folder; with FILE.gguf this is `quantize`")
    parser.add_argument("--format", choices=OUTPUT_FORMATS, default=None,
                        help="hf (the default for a folder): exact, for nanochat with code of its own; "
                             "transformers: as transformers' own nanochat, which is generation 1")
    parser.add_argument("--dtype", choices=DTYPES, default=None,
                        help="type of the matrices (default: the model's, or bfloat16 if they are packed)")
    parser.add_argument("--license", metavar="ID", default=None,
                        help="license for the card, as the hub calls it: mit, apache-2.0 (default: that of "
                             "the model's own card, or none)")
    parser.add_argument("--name", metavar="NAME", default=None, help="name for the card (default: FOLDER's)")
    parser.add_argument("--shard-size", metavar="SIZE", type=size, default=SHARD_BYTES,
                        help="most bytes of one file of weights (default: 5 GB)")
    flags = {flag.field: flag for flag in FLAGS if flag.field in READ_FLAGS}
    for flag in flags.values():
        add_flag(parser, flag)
    values = parser.parse_args(words)
    if values.model is not None:
        check_path(values.model, "MODEL")
    if not values.output.strip():
        parser.error("-o: it is empty")
    if values.license is not None and not re.fullmatch(LICENSE, values.license):
        parser.error(f"--license {printable(values.license)!r} is not a license as the hub calls it, such as "
                     f"mit or "
                     "apache-2.0")
    if values.name is not None and not re.fullmatch(r"[\w.+ /-]{1,200}", values.name):
        parser.error(f"--name {printable(values.name)!r}: a name has letters, digits, spaces and . + / -")
    if values.shard_size < 1:
        parser.error("--shard-size must be more than 0")
    read = {}
    for name, flag in flags.items():
        value = getattr(values, name)
        read[name] = unflagged_value(parser, flag, os.environ, {}) if value is None else value
        if flag.many:
            read[name] = tuple(read[name] or ())
    values.format = chosen_format(parser, values)
    return values, Settings(command="export", model=values.model, dtype=values.dtype, **read)


def chosen_format(parser: CommandLine, values: argparse.Namespace) -> str:
    """The format that the output's name and --format mean. The only place that decides it."""
    chosen = values.format or "hf"
    if Path(values.output).suffix.lower() == ".gguf":
        parser.error(f"--format {chosen}: -o {printable(values.output)} does not fit it. {OUTPUTS}")
    return chosen


def export_lines(words: Seq[str]) -> Iterator[str]:
    """Export a model; yields the lines to print."""
    asked, settings = parse_export_words(words)
    progress = ProgressDisplay()
    try:
        source = resolve_model(settings, progress)
        with unfinished(Path(asked.output).expanduser()) as part:
            target = Path(os.path.abspath(Path(asked.output).expanduser()))
            with FORMATS[source.kind].readable(source.path):
                merged = read_merged(source, settings)
                model = hub_model(merged, settings, asked.format)
                card = card_of(asked, source, merged, model, target)
                write_folder(part, target, model, card.text(), asked.shard_size, progress)
            refuse_changed(source, settings)
    finally:
        progress.close()
    yield f"{target}: {source.chosen}, as {model.config['model_type']} in {model.config['dtype']}"
    yield from model.notes


def end_at_once(*_):
    """Remove what is unfinished, also if the signal comes again meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def export_main(arguments: Seq[str]) -> int:
    """The role `export PARENT MODEL -o FOLDER ...`, which a server starts. Exit status 2: stderr says what is
    wrong."""
    parent, *words = arguments
    die_with_parent(int(parent))
    signal.signal(signal.SIGTERM, end_at_once)
    try:
        for _ in export_lines(words):
            pass
    except ConfigError as error:
        print(printable(str(error)), file=sys.stderr, flush=True)
        return 2
    return 0


def read_merged(source: ModelSource, settings: Settings) -> Merged:
    """A model in its files, with the adapters of --lora."""
    stored = FORMATS[source.kind].read(source, settings)
    return merge_adapters(settings, stored, name_tensors(stored))


def hub_model(merged: Merged, settings: Settings, chosen: str) -> HubModel:
    """The folder's contents. ConfigError if this format cannot hold the model."""
    stored = merged.stored
    if isinstance(stored, CheckpointModel) and stored.family == "nanochat":
        if chosen == "transformers":
            return as_transformers_own(stored, merged.added, settings.dtype,
                                       lambda: difference(stored, settings))
        return with_own_code(stored, merged.added, settings.dtype)
    if chosen == "transformers":
        raise ConfigError(f"--format transformers is for nanochat checkpoints of generation 1, and this is "
                          f"{stored.title}. --format hf is transformers' own format for it")
    if isinstance(stored, CheckpointModel):
        raise ConfigError(f"{stored.source.path}: --format hf cannot hold a model of {stored.family}. It can "
                          "hold nanochat's and those of llama-like families")
    return family_model(merged, settings)


def card_of(asked: argparse.Namespace, source: ModelSource, merged: Merged, model: HubModel,
            target: Path) -> Card:
    stored = merged.stored
    is_nanochat = isinstance(stored, CheckpointModel)
    stated = None
    if isinstance(stored, GgufModel):
        stated = str(stored.metadata.get("general.license") or "")
        stated = stated.lower() if re.fullmatch(LICENSE, stated) else None
    elif not is_nanochat:
        stated = license_of(source.path)
    notes = model.notes
    if is_nanochat and settings_lora(merged):
        notes = (*notes, settings_lora(merged))
    return Card(asked.name or target.name, f"{source.name}: {stored.title}.", asked.license or stated,
                training_facts(source.path) if is_nanochat else (), notes, tuple(tags_of(stored.family)),
                bool(model.code), is_nanochat or bool(model.text.chat_template))


def settings_lora(merged: Merged) -> str:
    """A sentence about merged adapters, or ""."""
    found = re.search(r"LoRA (.*) merged into", merged.described)
    return f"The LoRA adapter {found[1]} is merged into the weights." if found else ""
