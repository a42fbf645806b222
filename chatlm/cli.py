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
from typing import NamedTuple, TYPE_CHECKING

from chatlm import __version__
from chatlm.common.commands import OTHER_COMMANDS
from chatlm.common.config import (
    DEFAULT_MODEL_NAME, FLAGS, PROGRAM_COMMANDS, ModelChoice, Settings, file_name, read_api_keys, size)
from chatlm.common.contents import own_contents
from chatlm.common.core import kernels_line
from chatlm.common.errors import ConfigError, did_you_mean, require_library
from chatlm.common.files import read_operators
from chatlm.common.hub.find import SUPPORTED_MODELS
from chatlm.common.hub.huggingface import hub_model
from chatlm.common.invocation import program_command
from chatlm.common.messages.requests import SAMPLING_FLAGS

if TYPE_CHECKING:
    from chatlm.common.config import Flag


class Help(NamedTuple):
    """What --help shows for a command in addition to its flags."""

    usage: str
    opening: str
    examples: str = ""


PROGRAM = "python chat_server.py"  # in HELP; --help shows the command that started the program
HELP = {
    "serve": Help("""\
python chat_server.py [serve|chat|generate|compare|score|eval|embed|batch|check] [MODEL] [flags]
       python chat_server.py quantize|imatrix MODEL -o FILE [flags]
       python chat_server.py bundle [FILE] [--with-libraries] [--with-model MODEL]
       python chat_server.py export MODEL -o FOLDER [flags]
       python chat_server.py push FOLDER ORG/NAME [--public]
       python chat_server.py store FOLDER [--prune SIZE]""",
        "Serve a model: a chat page, and the APIs of OpenAI, Anthropic, Ollama and nanochat. This is the "
        "default command. The others are: chat, in the terminal; generate, which answers one prompt; "
        "compare, which asks several models the same question; score, which measures how well a model "
        "predicts a text; eval, which evaluates models on tasks; embed, which makes vectors of the texts of "
        "a file; batch, which answers a file of requests; check, which finds what is wrong with a model, or "
        "without one verifies and times the compiled kernels; quantize, which writes it as a smaller "
        "file; imatrix, which measures which weights matter; bundle, which packs the program into "
        "one file; export, which writes a model for other programs; push, which uploads that to the "
        "Hugging Face hub; store, which lists the contents of --prefix-store. Each has a --help. If "
        "there are several MODELs, each is loaded when a request names it.", """
  python chat_server.py                                     a nanochat checkpoint or a small model
  python chat_server.py qwen3:0.6b --host 127.0.0.1         for this machine only; downloaded once
  python chat_server.py model.gguf -p 8080 --api-key-file keys.txt"""),
    "chat": Help("python chat_server.py chat [MODEL] [flags]",
        "Chat with a model in the terminal. Ctrl-C stops an answer; /help lists the commands.", """
  python chat_server.py chat                                a nanochat checkpoint or a small model
  python chat_server.py chat --continue                     continue the last chat
  python chat_server.py chat --url http://127.0.0.1:8000    use a server that is already running"""),
    "generate": Help("python chat_server.py generate [MODEL] [PROMPT] [flags]",
        "Answer one prompt: the answer goes to stdout, everything else to stderr. A one-word PROMPT "
        "needs MODEL before it, or --prompt.", """
  python chat_server.py generate "Why is the sky blue?"
  python chat_server.py generate -p - --system "Summarize this letter." < letter.txt
  python chat_server.py generate model.gguf -p "Name a color." --json --seed 1"""),
    "compare": Help("python chat_server.py compare MODEL MODEL ... --prompt TEXT [flags]",
        "Ask several models the same question with the same seed, and show where each answer first differs "
        "from the first one. With --url, the MODELs are a server's, such as the checkpoints of --watch.", """
  python chat_server.py compare a.gguf b.gguf -p "Name a color." --seed 1
  python chat_server.py compare qwen3:0.6b llama3.2-1b -p - --json < question.txt
  python chat_server.py compare d20@12000 d20@14000 -p "Hello" --url http://127.0.0.1:8000"""),
    "score": Help("python chat_server.py score MODEL ... --text FILE [flags]",
        "Measure how well models predict a text, in bits per byte (lower is better). The text is read in "
        "windows of one context, half a context apart, and each token is scored once.", """
  python chat_server.py score model.gguf --text book.txt
  python chat_server.py score a.gguf b.gguf --text book.txt --context-length 1024
  python chat_server.py score ~/.cache/nanochat -g d20 -s 12000 --text book.txt --json"""),
    "eval": Help("python chat_server.py eval MODEL ... --suite SUITE [flags]",
        "Evaluate models as nanochat does. SUITE is core, chat, bpb, sample, a FOLDER or a FILE.jsonl: the "
        "CORE metric from the bundle that nanochat has fetched, its tasks for chat models, bits per byte, "
        "samples, or tasks of your own. Data come only from this "
        "machine's disk. The answer to each item is kept, so a second run, or one after a kill, goes on.", """
  python chat_server.py eval ~/.cache/nanochat -g d20 --suite core --max-per-task 100
  python chat_server.py eval d20@12000 d20@14000 --suite core --url http://127.0.0.1:8000
  python chat_server.py eval model.gguf --suite questions.jsonl --json"""),
    "embed": Help("python chat_server.py embed MODEL FILE.jsonl -o FILE [flags]",
        "Make a vector of each text of a file, whose lines are JSON: a text, or an object with a `text`. "
        "FILE may be `-`, stdin. MODEL is one that was made for it, such as qwen3-embedding or all-minilm; "
        "others make vectors too, which are worse for a search.", """
  python chat_server.py embed qwen3-embedding texts.jsonl -o vectors.npy
  python chat_server.py embed model.gguf queries.jsonl -o vectors.jsonl --prompt-name query"""),
    "batch": Help("python chat_server.py batch [MODEL] FILE.jsonl -o FILE [flags]",
        "Answer a file of requests, whose lines are those of OpenAI's Batch API. What was interrupted goes "
        "on where it was when the same command runs again.", """
  python chat_server.py batch model.gguf requests.jsonl -o answers.jsonl
  python chat_server.py batch requests.jsonl -o answers.jsonl --url http://127.0.0.1:8000"""),
    "check": Help("python chat_server.py check [MODEL] [--json] [--against ORIGINAL] [flags]",
        "Find what is wrong with a model before it is served: its tokenizer, chat template and weights, and "
        "whether it fits here. The exit status is 1 if there is an error, else 0. Without MODEL: verify and "
        "time the compiled kernels. Each op is compared with its reference in torch; without torch, only the "
        "products are, by numpy. The report can be pasted into an issue, the exit status is 1 if an op is "
        "wrong, and it takes about a minute.", """
  python chat_server.py check                               the compiled kernels
  python chat_server.py check model.gguf                    a verdict of a few lines
  python chat_server.py check model-Q4_K_M.gguf --against model-BF16.gguf --json"""),
    "quantize": Help("python chat_server.py quantize MODEL -o FILE.gguf [--type TYPE] [flags]",
        "Write a model as one GGUF file of a smaller type: a GGUF file, a nanochat checkpoint or a plain "
        "Hugging Face folder. The types and their mixes are llama-quantize's, and so are the bytes. The file "
        "appears once it is complete, and a command that was interrupted goes on when it runs again.", """
  python chat_server.py quantize model-BF16.gguf -o model-Q4_K_M.gguf
  python chat_server.py quantize model-BF16.gguf -o model-Q3_K_M.gguf --type q3_k_m --imatrix imatrix.gguf
  python chat_server.py quantize ~/.cache/nanochat -g d20 -o d20-Q8_0.gguf --type q8_0"""),
    "imatrix": Help("python chat_server.py imatrix MODEL -f TEXT -o FILE [--chunks N] [flags]",
        "Measure how much a model uses the columns of each of its matrices while it reads a text. FILE has "
        "llama.cpp's format, and `quantize --imatrix FILE` keeps more of what is used more.", """
  python chat_server.py imatrix model-BF16.gguf -f book.txt -o imatrix.gguf
  python chat_server.py imatrix model-BF16.gguf -f book.txt -o imatrix.gguf --chunks 100"""),
}
ANSWERS = "Answers, unless a request says otherwise"  # a heading of the table of flags
HEADINGS = {  # instead of it, in commands without any of the flags that it is about
    "embed": "Texts and vectors", "batch": "Requests and answers", "score": "The text", "eval": "Tasks",
    "quantize": "The file", "imatrix": "The text and the file"}
FLAG_HELP = {  # what --help says of a flag that is not the same in all commands
    ("embed", "texts"): "FILE may also be given so",
    ("embed", "output"): "file for the vectors: one a line, or numpy's format if it is called .npy; `-` is "
                         "stdout",
    ("batch", "texts"): "FILE may also be given so",
    ("batch", "output"): "file for the answers",
    ("quantize", "output"): "the GGUF file to write",
    ("imatrix", "output"): "the file to write",
    ("imatrix", "text"): "the text that the model reads",
    ("imatrix", "context_length"): "tokens of a chunk, which see each other (default: 512)",
    ("check", "json"): "one JSON object with all findings"}
# the commands in which MODEL may not be left out, or that means another thing
WITH_MODEL = "check", "compare", "embed", "quantize", "imatrix"
SEVERAL = "serve", "compare", "score", "eval"  # the commands that take several MODELs
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


def as_quantize(argv: Seq[str]) -> Seq[str]:
    """`export MODEL -o FILE.gguf` is another name of `quantize`: the same words for that command. Other words
    stay as they are."""
    if argv[:1] != ["export"]:
        return argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--format", default="")
    with suppress(SystemExit), redirect_stderr(io.StringIO()):  # a flag without its value: `export` says so
        known, others = parser.parse_known_args(argv[1:])
        to_file = Path(known.output).suffix.lower() == ".gguf"
        if known.format == "gguf" or to_file and not known.format:
            output = ["-o", known.output] if known.output else []
            return ["quantize", *others, *output]
    return argv


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


def read_table(parser: CommandLine, table: dict, key: str) -> ModelChoice:
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
    return ModelChoice(texts["path"][0], table.get("name", ""), tuple(texts.get("aliases", ())),
                       table.get("pin", False), table.get("default", False), replicas, changes)


def chosen_models(parser: CommandLine, names: Seq[str], tables: Seq[dict], in_folder: bool,
                  config: str | None) -> tuple[ModelChoice, ...]:
    """The models of `serve`, if there are or may be several; () for a single one. `in_folder`: --models or
    --watch finds more."""
    if len(names) < 2 and not tables and not in_folder:
        return ()
    choices = [*map(ModelChoice, names), *(
        read_table(parser, table, f"--config {config}: [[models]] {index}")
        for index, table in enumerate(tables, 1))]
    if sum(choice.default for choice in choices) > 1:
        raise ConfigError(f"--config {config}: only one of [[models]] may have default = true")
    return tuple(choices)


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


def better_model_here() -> str:
    """What the help of `chat` says about models that are better than the default one."""
    from chatlm.common.hub.better import MEMORY_RATE, advice_of
    from chatlm.common.memory import available_memory
    MEMORY_RATE.measure()
    return advice_of(DEFAULT_MODEL_NAME, available_memory())


def may_be_model(word: str) -> bool:
    """Whether a word after a flag that needs no value is another flag, a prompt, or has the form of a
    MODEL."""
    return bool(re.search(r"^-|\s|[/@.]", word) or hub_model(word) or os.path.exists(word))


def parse_command_line(argv: Seq[str], environment: Mapping[str, str]) -> Settings:
    """Settings from words and environment. ConfigError if invalid; SystemExit for --help and --version."""
    words = with_bare_values(argv)
    command = "serve"
    if words and words[0] in PROGRAM_COMMANDS:
        command = words.pop(0).replace("server", "serve")
    usage, opening, examples = (text.replace(PROGRAM, program_command()) for text in HELP[command])
    models = ABOUT_MODELS
    if command in WITH_MODEL:
        models = re.sub(r"nothing \(.*?\), ", "", ABOUT_MODELS)
    about = [opening, models, ABOUT_FLAGS]
    if command == "chat" and {"-h", "--help"} & {*words}:
        about.append(better_model_here())
    width = max(24, min(96, shutil.get_terminal_size((98, 24)).columns - 2))
    parser = CommandLine(prog="chat_server.py", usage=usage, allow_abbrev=False, formatter_class=help_lines,
                         description="\n\n".join(textwrap.fill(part, width) for part in about),
                         epilog=examples and f"Examples:\n{examples[1:]}")
    several_words = command in (*SEVERAL, "generate", "embed", "batch")
    parser.add_argument("model", metavar="MODEL", nargs="*" if several_words else "?", default=None,
                        help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="print the version and the kernels in use")
    flags = {flag.field: flag for flag in FLAGS if command in flag.commands.split()}
    group: argparse._ActionsContainer = parser
    for flag in FLAGS:
        if flag.heading:
            heading = HEADINGS.get(command, ANSWERS) if flag.heading == ANSWERS else flag.heading
            group = parser.add_argument_group(heading)
        if flag.field in flags:
            add_flag(group, flag._replace(help=FLAG_HELP.get((command, flag.field), flag.help)))
    if several_words:  # they may stand between flags: MODEL --port 8080 MODEL
        values = vars(parser.parse_intermixed_args(words))
    else:
        values = vars(parser.parse_args(words))
    if values.pop("version"):
        print(f"chat_server {__version__}; {kernels_line()}")
        raise SystemExit(0)
    if command == "check" and values["model"] is None:  # check the kernels
        given = [name for name in flags if values[name] is not None]
        if given:
            parser.error(f"--{flags[given[0]].names[0]} is for checking a model: give MODEL too")
        return Settings(command=command)
    if command == "generate":
        at_server = bool(values["url"] or environment.get("CHAT_SERVER_URL"))
        values["model"], values["prompt"] = with_prompt(
            parser, values["model"] or [], values["prompt"], at_server)
    if command == "embed" and len(values["model"] or ()) > 1:
        values["texts"] = one_file(parser, values)
        values["model"] = values["model"][:1]
    if command == "batch" and values["model"]:  # the MODEL may be left out
        if not values["model"][1:]:
            values["model"] = [None, *values["model"]]
        values["texts"] = one_file(parser, values)
        values["model"] = [*filter(None, values["model"][:1])]
    config_file = values["config"] or environment.get("CHAT_SERVER_CONFIG") or None
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
    if command == "serve":  # only the hashes are kept from here on
        values["keys"] = read_api_keys(values.pop("api_key"), values["api_key_file"])
        in_folder = values["models"] is not None or values["watch"] is not None
        values["several"] = chosen_models(parser, models, tables, in_folder, config_file)
        if values["several"] or in_folder:
            values["model"] = None
        for name in ("watch_text", "watch_prompts", "watch_suite", "run_log"):
            if values[name] is not None and values["watch"] is None:
                raise ConfigError(f"--{name.replace('_', '-')} is for the checkpoints of --watch: give that "
                                  "folder too")
        if values["watch"] is not None and values["step"] is not None and not models:
            raise ConfigError("--watch serves every step of a run, as TAG@STEP: leave out -s (--step)")
    elif command in SEVERAL and models:  # each word of `compare`, `score` and `eval` is a MODEL
        values["model"] = None
        values["several"] = tuple(ModelChoice(name, name) for name in models)
    return Settings(command=command, **values)


def one_file(parser: CommandLine, values: Mapping) -> str:
    """The FILE of `embed` and `batch`, which comes after the MODEL."""
    _, file, *others = values["model"]
    if others or values["texts"] is not None:
        parser.error(f"unrecognized arguments: {' '.join(others) or file}")
    check_path(file, "FILE")
    return file


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


def parse_store_words(words: Seq[str]) -> tuple[Path, int | None]:
    """Parse `store`, which has no Settings: (FOLDER, the bytes of --prune or None)."""
    parser = CommandLine(prog=f"{program_command()} store", allow_abbrev=False, description=(
        "List the contents of a --prefix-store folder: the tokens stored for each model, as KV pages."))
    parser.add_argument("folder", metavar="FOLDER", type=file_name)
    parser.add_argument("--prune", metavar="SIZE", type=size,
                        help="first delete the least recently used until SIZE is left, 0 = all; what a "
                             "running server is writing to is kept")
    values = parser.parse_args(words)
    return Path(values.folder).expanduser(), values.prune


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


def with_kept_words(words: Seq[str]) -> list[str]:
    """A command line with the words that the running bundle keeps, if they are for its command. Without a
    command, theirs runs."""
    kept = list(own_contents().words)
    command = kept.pop(0) if kept[:1] and kept[0] in PROGRAM_COMMANDS else "serve"
    given = words[0] if words[:1] and words[0] in (*PROGRAM_COMMANDS, *OTHER_COMMANDS) else ""
    if not kept and command == "serve" or given not in ("", command):
        return list(words)
    return [command, *kept, *(words[1:] if given else words)]
