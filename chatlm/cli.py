"""Parses the command line, environment variables and --config into `Settings`."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence as Seq
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm import __version__
from chatlm.common.commands import Command, chosen_command, command_named
from chatlm.common.config import (
    EMBEDDER, FLAGS, MULTILINGUAL, ModelEntry, Settings, file_name, read_api_keys)
from chatlm.common.contents import own_contents
from chatlm.common.core import kernels_line
from chatlm.common.errors import ConfigError, did_you_mean, require_library
from chatlm.common.files import read_operators
from chatlm.common.hub.find import SUPPORTED_MODELS
from chatlm.common.hub.repository import hub_model
from chatlm.common.invocation import program_command
from chatlm.common.messages.requests import SAMPLING_FLAGS

if TYPE_CHECKING:
    from chatlm.common.config import Flag


PROGRAM = "python chat_server.py"  # in rows of commands; --help shows the command that started the program
ANSWERS = "Answers, unless a request says otherwise"  # a heading of the table of flags
ABOUT_MODELS = f"MODEL may be: {SUPPORTED_MODELS}."
ABOUT_FLAGS = ("Each flag has an environment variable: --max-tokens is CHAT_SERVER_MAX_TOKENS. "
               "--config FILE.toml may set them too.")


class CommandLine(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError: one line, exit status 2."""

    origin = ""  # where the words come from, if not from the command line

    def error(self, message: str):
        if message.startswith("unrecognized arguments: -"):
            flag = message.split()[2].partition("=")[0]
            commands = [row.commands.split() for row in FLAGS if flag.removeprefix("--") in row.names]
            if flag == "--model":  # as vLLM and others have it
                message += "; MODEL is given by itself, without a flag"
            elif commands:
                message += f"; {flag} is a flag of {' and '.join(commands[0])}, and the command comes first"
            else:
                message += did_you_mean(flag, self._option_string_actions)
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"[^\s,']+", found[2]))
        raise ConfigError(f"{self.origin}{message} (--help lists the flags)")


def as_quantize(words: Seq[str]) -> Seq[str] | None:
    """`export MODEL -o FILE.gguf` is another name of `quantize`: the same words for that command. None for
    other words after `export`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--format", default="")
    with suppress(SystemExit), redirect_stderr(io.StringIO()):  # a flag without its value: `export` says so
        known, others = parser.parse_known_args(words)
        to_file = Path(known.output).suffix.lower() == ".gguf"
        if known.format == "gguf" or to_file and not known.format:
            output = ["-o", known.output] if known.output else []
            return ["quantize", *others, *output]
    return None


def help_lines(prog: str) -> argparse.HelpFormatter:
    """argparse's formatter, which shows a flag's value once, after all its names, as newer versions do."""
    formatter = argparse.RawDescriptionHelpFormatter(prog)

    def spelled(action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        choices = action.choices and "{%s}" % ",".join(map(str, action.choices))
        return names if action.nargs == 0 else f"{names} {action.metavar or choices}"

    setattr(formatter, "_format_action_invocation", spelled)
    return formatter


SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True,
                "0": False, "false": False, "no": False, "off": False}


def as_words(value, key: str, flag: Flag | None = None, many: bool = False) -> list[str]:
    """A --config value as the words of a flag, or of a key that has no flag and takes text.
    ConfigError if it has the wrong type."""
    types = (int, float, str)
    allowed = "a number or text"
    if flag is None or flag.is_text:
        types = (str,)
        allowed = "text in quotes"
        if flag and flag.off:
            types = (bool, int, str)
            allowed = "text in quotes, true or false"
    elif flag.parse is None:
        types = (bool, int, str)
        allowed = "true or false"
    many = many or flag is not None and flag.many
    words = value if many and isinstance(value, list) else [value]
    if not all(type(word) in types for word in words):
        raise ConfigError(f"{key} must be {allowed}{', or a list of these' * many}")
    return [str(word) for word in words]


def check_path(text: str, key: str):
    """ConfigError if no file can have this name."""
    try:
        file_name(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{key}: {error}") from None


def words_of_table(table: Mapping, key: str) -> list[str]:
    """A table of adapters, NAME = "FOLDER", as the words of --adapter."""
    return [f"{name}={as_words(folder, f'{key}.{name}')[0]}" for name, folder in table.items()]


def read_config(file: str | None) -> tuple[dict[str, list[str]], list[dict]]:
    """The flags of a --config TOML file, as words by field name, and its [[models]] tables. ConfigError for
    unknown names."""
    if file is None:
        return {}, []
    tomllib = require_library("tomllib" if sys.version_info >= (3, 11) else "tomli", "--config")
    flags = {}
    for flag in FLAGS:
        flags |= dict.fromkeys(flag.names, flag)
    words = {}
    tables = []
    try:
        for name, value in tomllib.loads(read_operators(file)).items():
            if name == "models" and isinstance(value, list) and all(isinstance(item, dict) for item in value):
                tables = value
                continue
            if name == "models" and isinstance(value, dict):
                raise ValueError("[models] must be [[models]], one table per model")
            if isinstance(value, dict) and name == "adapter":
                value = words_of_table(value, f"--config {file}: {name}")
            if isinstance(value, dict):
                raise ValueError(f"[{name}] is a table, but flags belong outside tables: `port = 8000`, "
                                 "or `served-model-name = [\"a\", \"b\"]` for a flag that may repeat")
            spelled = name.replace("_", "-")
            if spelled not in (*flags, "model"):
                raise ValueError(f"there is no flag --{name}{did_you_mean(spelled, flags, '--')}")
            flag = flags.get(spelled)
            words[flag.field if flag else "model"] = as_words(
                value, f"--config {file}: {name}", flag, many=flag is None)
    except (OSError, RuntimeError, ValueError, RecursionError) as error:  # str() refuses 5,000-digit ints
        raise ConfigError(f"--config {file}: {getattr(error, 'strerror', None) or error}") from None
    return words, tables


# The flags that a [[models]] table may have, in addition to TABLE_KEYS
TABLE_FLAGS = {flag.field: flag for flag in FLAGS if flag.field in (
    "source", "model_tag", "step", "softcap", "lora", "adapter", "dtype", "quantize", "context_length",
    "kv_cache_dtype", "arithmetic", "kv_cache_memory", "max_batch", "stream_interval", "prefill_chunk",
    "mmproj", "drafts", "draft_text", "draft_memory", "draft_model", "idle_unload", "max_tokens",
    "reasoning_budget", "reasoning_budget_message", *SAMPLING_FLAGS)
    and "serve" in flag.commands}
TABLE_KEYS = ("name", "path", "aliases", "pin", "default", "replicas")


def read_table(parser: CommandLine, table: dict, key: str) -> ModelEntry:
    """Parse a [[models]] table. ConfigError for missing or unknown keys and invalid values."""
    spelled = {name.replace("-", "_"): name for name in table}
    for field, name in spelled.items():
        if field not in (*TABLE_KEYS, *TABLE_FLAGS):
            names = [*TABLE_KEYS, *(known.replace("_", "-") for known in TABLE_FLAGS)]
            raise ConfigError(f"{key}: {name} is not a key of a model{did_you_mean(name, names)}"
                              f" (allowed: {', '.join(names)})")
    words = {}
    for field, flag in TABLE_FLAGS.items():
        name = spelled.get(field)
        if not name:
            continue
        if field == "adapter" and isinstance(table[name], dict):
            words[field] = words_of_table(table[name], f"{key}: {name}")
        else:
            words[field] = as_words(table[name], f"{key}: {name}", flag)
    texts = {name: as_words(table[name], f"{key}: {name}", many=name == "aliases")
             for name in ("name", "path", "aliases") if name in table}
    if empty := [name for name, values in texts.items() if not all(map(str.strip, values))]:
        raise ConfigError(f"{key}: {empty[0]} must not be empty")
    if "path" not in texts:
        raise ConfigError(f"{key}: path is missing; it names the MODEL")
    for name in ("pin", "default"):
        if not isinstance(table.get(name, False), bool):
            raise ConfigError(f"{key}: {name} must be true or false")
    replicas = table.get("replicas")
    if replicas is not None and not (type(replicas) is int and 1 <= replicas <= 256):
        raise ConfigError(f"{key}: replicas must be a whole number from 1 to 256")
    check_path(texts["path"][0], f"{key}: path")
    changes = {field: parsed_words(parser, TABLE_FLAGS[field], f"{key}: {spelled[field]}", words[field])
               for field in words}
    return ModelEntry(
        texts["path"][0], table.get("name", ""), tuple(texts.get("aliases", ())), table.get("pin", False),
        table.get("default", False), replicas=replicas, changes=changes)


def chosen_models(parser: CommandLine, names: Seq[str], tables: Seq[dict], in_folder: bool,
                  config: str | None) -> tuple[ModelEntry, ...]:
    """The models of `serve`, if there are or may be several; () for a single one. `in_folder`: --models or
    --watch finds more."""
    if len(names) < 2 and not tables and not in_folder:
        return ()
    entries = [*map(ModelEntry, names), *(
        read_table(parser, table, f"--config {config}: [[models]] {index}")
        for index, table in enumerate(tables, 1))]
    if sum(entry.default for entry in entries) > 1:
        raise ConfigError(f"--config {config}: only one of [[models]] may have default = true")
    return tuple(entries)


# Flags about MODEL, which do not hold for the model of --embedder: `Settings` has these instead
OF_NO_MODEL = {"source": None, "model_tag": None, "step": None, "softcap": None, "context_length": None,
               "quantize": None, "lora": (), "mmproj": None, "draft_model": None}


def model_alone(model: str | None, names: Seq[str]) -> ModelEntry:
    """The model of `serve` beside which only that of --embedder is served: loaded at the start, it stays.
    names: those of --served-model-name."""
    return ModelEntry(model or "", "".join(names[:1]), tuple(names[1:]), pin=True, default=True)


def embedder_entry(model: str) -> ModelEntry:
    """The model of --embedder."""
    aliases = (model,) if model in (EMBEDDER, MULTILINGUAL) else ()
    return ModelEntry(model, aliases=aliases, spare=True, replicas=1, changes=dict(OF_NO_MODEL))


def unflagged_value(parser: CommandLine, flag: Flag, environment: Mapping[str, str],
                    config: Mapping[str, list[str]]):
    """The value of a flag that was not given: from its environment variable, --config, or its default."""
    name = flag.field
    origin = f"--config: {name}"
    words = config.get(name)
    if text := environment.get(flag.variable, "").strip():
        origin = flag.variable
        words = re.split(r"\s*,\s*", text) if flag.many else [text]
    if words is None:
        return flag.default
    return parsed_words(parser, flag, origin, words)


def parsed_words(parser: CommandLine, flag: Flag, origin: str, words: list[str]):
    """The value of a flag from words of that origin. ConfigError if they are invalid."""
    if len(words) != 1 and not flag.many:
        raise ConfigError(f"{origin} must be one value")
    if flag.parse is None:
        if words[0].lower() not in SWITCH_WORDS:
            raise ConfigError(f"{origin}={words[0]!r} must be one of {', '.join(SWITCH_WORDS)}")
        return SWITCH_WORDS[words[0].lower()]
    if flag.choices:
        words = [word.lower() for word in words]
    parser.origin = f"{origin}: "
    value = getattr(parser.parse_args([f"--{flag.names[0]}={word}" for word in words]), flag.field)
    return tuple(value or ()) if flag.many else value


def add_flag(group: argparse._ActionsContainer, flag: Flag):
    spellings = [f"-{flag.short}"] if flag.short else []
    spellings += [f"--{name}" for name in flag.names]
    known = flag.default in (None, (), False, "") or "default" in flag.help
    taking: dict = {"action": argparse.BooleanOptionalAction}
    if flag.parse:
        taking = {"action": "append" if flag.many else "store",
                  "type": partial(switched, flag) if flag.off else flag.parse,
                  "choices": flag.choices or None,
                  "metavar": None if flag.choices else flag.field.upper()}
    if flag.bare:
        taking |= {"nargs": "?", "const": flag.bare}
    group.add_argument(*spellings, dest=flag.field, default=None, **taking,
                       help=flag.help + ("" if known else f" (default: {flag.default})"))
    if flag.off:
        group.add_argument(*(f"--no-{name}" for name in flag.names), dest=flag.field, action="store_const",
                           const=flag.off, help=argparse.SUPPRESS)


def switched(flag: Flag, word: str) -> str:
    """The value of a flag that may be given like a switch."""
    if (on := SWITCH_WORDS.get(word.lower())) is None:
        return word.lower()
    return flag.bare if on else flag.off


def with_bare_values(words: Seq[str]) -> list[str]:
    """Give each flag that was written like a switch its value. Otherwise argparse would take the next word
    for the value."""
    flags = {}
    for flag in FLAGS:
        if flag.off:
            flags |= {f"--{name}": flag for name in flag.names}
    found = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        flag = flags.get(name)
        following = words[place + 1] if words[place + 1:] else ""
        if flag and not equals and following.lower() in (*flag.choices, *SWITCH_WORDS):
            found.append(name)
        elif flag and not equals and flag.choices and following and not may_be_model(following):
            found.append(name)  # the parser says what it may be
        elif flag and not equals:
            found.append(f"{name}={flag.bare}")
        else:
            found.append(word)
    return found


def may_be_model(word: str) -> bool:
    """Whether a word after a flag that needs no value is another flag, a prompt, or has the form of a
    MODEL."""
    return bool(re.search(r"^-|\s|[/@.]", word) or hub_model(word) or os.path.exists(word))


def usage_of(command: Command, commands: Seq[Command]) -> str:
    """The first lines of a command's --help. The default command's lists all commands."""
    if command is not commands[0]:
        return f"{program_command()} {command.name} {command.usage or command.takes}"
    groups: dict[str, list[str]] = {}  # what some commands take -> their names
    for each in commands:
        groups.setdefault(each.takes, []).append(each.name)
    lines = []
    for takes, names in groups.items():
        joined = "|".join(names)
        lines.append(f"{program_command()} {f'[{joined}]' if command.name in names else joined} {takes}")
    return ("\n" + " " * len("usage: ")).join(lines)


def parser_of(command: Command, commands: Seq[Command], wants_help: bool) -> CommandLine:
    """What parses the words of a command that has `run`."""
    others = "; ".join(f"{other.name}, {other.brief}" for other in commands[1:])
    models = ABOUT_MODELS
    if command.needs_model:
        models = re.sub(r"nothing \(.*?\), ", "", ABOUT_MODELS)
    about = [command.opening.replace("{others}", others), models, ABOUT_FLAGS]
    if command.more_help and wants_help:
        about.append(command.more_help())
    width = max(24, min(96, shutil.get_terminal_size((98, 24)).columns - 2))
    examples = command.examples.replace(PROGRAM, program_command())
    parser = CommandLine(prog="chat_server.py", usage=usage_of(command, commands), allow_abbrev=False,
                         formatter_class=help_lines,
                         description="\n\n".join(textwrap.fill(part, width) for part in about),
                         epilog=examples and f"Examples:\n{examples[1:]}")
    parser.add_argument("model", metavar="MODEL", nargs="*" if takes_words(command) else "?", default=None,
                        help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="print the version and the kernels in use")
    fields = flags_of(command)
    group: argparse._ActionsContainer = parser
    for flag in FLAGS:
        if flag.heading:
            heading = command.heading if flag.heading == ANSWERS else ""
            group = parser.add_argument_group(heading or flag.heading)
        if flag.field in fields:
            add_flag(group, flag._replace(help=command.flag_help.get(flag.field, flag.help)))
    return parser


def takes_words(command: Command) -> bool:
    """Whether it may have several words, which may stand between flags: MODEL --port 8080 MODEL."""
    return command.several or bool(command.operand)


def flags_of(command: Command) -> dict[str, Flag]:
    """The flags of a command, by field of Settings."""
    name = command.flags_of or command.name
    return {flag.field: flag for flag in FLAGS if name in flag.commands.split()}


def parse_command_line(argv: Seq[str], environment: Mapping[str, str],
                       commands: Seq[Command]) -> Settings:
    """Settings from words and environment. ConfigError if invalid; SystemExit for --help and --version."""
    command, words = chosen_command(argv, commands)
    words = with_bare_values(words)
    parser = parser_of(command, commands, bool({"-h", "--help"} & {*words}))
    flags = flags_of(command)
    if takes_words(command):
        values = vars(parser.parse_intermixed_args(words))
    else:
        values = vars(parser.parse_args(words))
    if values.pop("version"):
        print(f"chat_server {__version__}; {kernels_line()}")
        raise SystemExit(0)
    names = tuple(name for each in commands for name in each.names)
    if command.flags_are_for and values["model"] is None:
        given = [name for name in flags if values[name] is not None]
        if given:
            parser.error(f"--{flags[given[0]].names[0]} is for {command.flags_are_for}: give MODEL too")
        return Settings(command=command.name, commands=names)
    tell_operand(parser, command, values, environment)
    config_file = values.get("config") or environment.get("CHAT_SERVER_CONFIG") or None
    config, tables = read_config(config_file)
    words = values["model"] or environment.get("CHAT_SERVER_MODEL") or config.get("model") or []
    models = [words] if isinstance(words, str) else words
    for word in models:
        check_path(word, "MODEL")
    values["model"] = models[0] if models else None
    for name, flag in flags.items():
        if values[name] is None:
            values[name] = unflagged_value(parser, flag, environment, config)
    values |= {name: tuple(values[name] or ()) for name in flags if flags[name].many}
    if command.name == "serve":
        values["keys"] = read_api_keys(values.pop("api_key"), values["api_key_file"])  # only their hashes
        in_folder = values["models"] is not None or values["watch"] is not None
        values["several"] = chosen_models(parser, models, tables, in_folder, config_file)
        check_folders(values)
        if values["embedder"] is not None:
            if not values["several"] and not in_folder:
                values["several"] = (model_alone(values["model"], values["served_model_name"]),)
                values["served_model_name"] = ()
            values["several"] += (embedder_entry(values["embedder"]),)
        if values["several"] or in_folder:
            values["model"] = None
        check_watch(values, models)
    elif command.several and models:
        values["model"] = None
        values["several"] = tuple(ModelEntry(name, name) for name in models)
    return Settings(command=command.name, commands=names, **values)


def check_watch(values: Mapping[str, Any], models: Seq[str]):
    """ConfigError for flags of `serve` that do not go together with --watch, or without it."""
    for name in ("watch_text", "watch_prompts", "watch_suite", "run_log"):
        if values[name] is not None and values["watch"] is None:
            raise ConfigError(f"--{name.replace('_', '-')} is for the checkpoints of --watch: give that "
                              "folder too")
    if values["watch"] is not None and values["step"] is not None and not models:
        raise ConfigError("--watch serves every step of a run, as TAG@STEP: leave out -s (--step)")


def check_folders(values: Mapping[str, Any]):
    """ConfigError for flags --knowledge that no server can follow."""
    names = [text.partition("=")[0] for text in values["knowledge"]]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--knowledge {name} is given twice: each vector store has one folder")
    if names and values["database"] is None:
        raise ConfigError("--knowledge keeps its vector stores in the database: give --database too")
    for text in values["knowledge"]:
        folder = os.path.expanduser(text.partition("=")[2])
        try:
            with os.scandir(folder):
                pass
        except OSError as error:
            raise ConfigError(f"--knowledge {text}: the folder {folder} cannot be read: "
                              f"{error.strerror}") from None


def tell_operand(parser: CommandLine, command: Command, values: dict[str, Any],
                 environment: Mapping[str, str]):
    """Tell MODEL from the PROMPT or FILE that may follow it."""
    words = values["model"] or []
    if command.operand == "PROMPT":
        at_server = bool(values["url"] or environment.get("CHAT_SERVER_URL"))
        values["model"], values["prompt"] = with_prompt(parser, words, values["prompt"], at_server)
    elif command.operand == "FILE" and words:
        if values["texts"] is None:
            *words, file = words
            check_path(file, "FILE")
            values["texts"] = file
        if words[1:]:
            parser.error(f"unrecognized arguments: {' '.join(words[1:])}")
        values["model"] = words


def has_words(word: str) -> bool:
    """Whether it has several words, and is no file."""
    return bool(re.search(r"\S\s+\S", word)) and not os.path.exists(os.path.expanduser(word))


def is_prompt(word: str) -> bool:
    """Whether a single word must be a prompt: it is no file, and has characters that no name of a model has,
    such as a question mark or Chinese ones."""
    unnamed = re.search(r"[^\x20-\x7e]|[?!\"'()<>]", word.strip())
    return bool(unnamed) and not os.path.exists(os.path.expanduser(word))


def is_model(word: str) -> bool:
    """Whether it is a file, or looks like a MODEL, as a prompt of one word hardly ever does."""
    return word.lower().endswith(".gguf") or bool(hub_model(word)) or os.path.exists(os.path.expanduser(word))


def with_prompt(parser: CommandLine, words: Seq[str], prompt: str | None,
                at_server: bool) -> tuple[Seq[str], str | None]:
    """Tell MODEL and the prompt of `generate` apart. The prompt comes after MODEL, or has several words.

    A single word is MODEL if it can be, so that a mistyped name is not answered as a prompt.
    at_server: MODEL is a server's name for a model, which may have any form."""
    asked = [word for word in words if has_words(word)]
    models = [word for word in words if word not in asked]
    if len(asked) + (prompt is not None) > 1:
        parser.error(f"only one prompt is allowed; this is another: {asked[-1]!r}")
    if not asked and prompt is None and len(models) == 1 and is_prompt(models[0]):
        return [], models[0]
    if not asked and prompt is None and len(models) == 2:
        first, second = models
        if at_server or may_be_model(first) and not is_model(second):
            return [first], second
        if is_model(second) and not may_be_model(first):
            return [second], first
    if models[1:]:
        parser.error(f"unrecognized arguments: {' '.join(models[1:])}; {models[0]} was taken as MODEL, and a "
                     "prompt of several words needs quotes, or of one -p")
    return models, asked[0] if asked else prompt


def asks_for_json(words: Seq[str], environment: Mapping[str, str]) -> bool:
    """Whether a command line, which may be invalid, asks for a JSON log."""
    text = " ".join(words).replace("=", " ").lower()
    return "--log-format json" in text or environment.get("CHAT_SERVER_LOG_FORMAT", "").lower() == "json"


def hide_api_keys() -> bool:
    """Overwrite the keys of --api-key where other users see them (`ps`). False if that is not possible.

    Linux reads a command line from the process's memory, from arg_start to arg_end (proc_pid_stat(5)).
    We write through /proc/self/mem, which rejects wrong addresses; Python has its own copy by then."""
    try:
        start, end = map(int, Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[45:47])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            words = memory.read(end - start)
            if words != b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv):
                return False
            memory.seek(start)
            memory.write(re.sub(rb"(?<=\0--api-key[\0=])[^\0]+", lambda key: b"*" * len(key[0]), words))
        return True
    except (OSError, ValueError):
        return False


def with_kept_words(words: Seq[str], commands: Seq[Command]) -> list[str]:
    """A command line with the words that the running bundle keeps, if they are for its command. Without a
    command, theirs runs."""
    kept = list(own_contents().words)
    command = command_named(kept, commands)
    if command is not None:
        del kept[0]
    command = command or commands[0]
    given = command_named(words, commands)
    if not kept and command is commands[0] or given not in (None, command):
        return list(words)
    return [command.name, *kept, *(words[1:] if given else words)]
