"""The command `bundle`: its words, and what it does with them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence as Seq
from functools import partial
from pathlib import Path

from chatlm.cli import CommandLine, parse_command_line
from chatlm.common.bundle import Wanted, write_bundle
from chatlm.common.commands import Command, command_named
from chatlm.common.config import DEFAULT_MODEL_NAME, file_name
from chatlm.common.errors import ConfigError
from chatlm.common.hub.default_model import fetch_default_model
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.repository import SPLIT_GGUF
from chatlm.common.invocation import program_command
from chatlm.common.unbundle import own_bundle, unpack_bundle, verified

ABOUT = ("Pack the program into one file, with the page and the compiled core of this platform: `python "
         "FILE` runs it on any machine that has the libraries. --with-libraries packs them too: then the "
         "machine needs nothing but the Python that the file was made for.")


def parse_bundle_words(words: Seq[str], commands: Seq[Command]) -> argparse.Namespace:
    """Parse `bundle`, which has no Settings. ConfigError for what does not go together."""
    parser = CommandLine(prog=f"{program_command()} bundle", allow_abbrev=False, description=ABOUT)
    parser.add_argument("file", metavar="FILE", nargs="?", default=None, type=file_name,
                        help="a new file, or a bundle to replace (default: chat_server.pyz)")
    parser.add_argument("--without-core", action="store_true",
                        help="leave out decode_core: a tenth of the size, and runs on other platforms too")
    parser.add_argument("--with-libraries", action="store_true",
                        help="pack all libraries too, for this Python on this platform")
    parser.add_argument("--pythons", metavar="X.Y,X.Y", type=python_versions, default=(),
                        help="with --with-libraries: for these Pythons; pip fetches the libraries, and each "
                             "Python must be here as pythonX.Y")
    parser.add_argument("--wheels", metavar="FOLDER", type=file_name, default=None,
                        help="with --with-libraries: a folder with a wheel of chat_server for each Python, "
                             "for its compiled core")
    parser.add_argument("--with-model", metavar="MODEL", default=None,
                        help="pack a model too, which runs where no other is named: a GGUF file, a name that "
                             "stands for one, or `default`")
    parser.add_argument("--args", metavar="WORDS", default="", type=partial(kept_words, commands),
                        help="words for the command line, before those that are given there: "
                             "--args \"--port 8080 --max-batch 8\"")
    parser.add_argument("--verify", action="store_true",
                        help="check each byte of FILE, or of the bundle that runs, and of what was unpacked "
                             "from it")
    parser.add_argument("--unpack", metavar="FOLDER", default=None, type=file_name,
                        help="unpack the bundle that runs into a new folder, where it needs no cache")
    values = parser.parse_args(join_args(words))
    for name, value in vars(values).items():
        if value == "":                         # as of a variable that a script has not set
            parser.error(f"{'FILE' if name == 'file' else '--' + name.replace('_', '-')}: it is empty")
    making = [f"--{name.replace('_', '-')}" for name in (
        "without_core", "with_libraries", "pythons", "wheels", "with_model", "args") if getattr(values, name)]
    others = making + (["FILE"] if values.unpack and values.file else [])
    action = ""
    if values.unpack:
        action = "--unpack"
    if values.verify:
        action = "--verify"
    if values.verify and values.unpack:
        parser.error("--verify and --unpack are two commands")
    if action and others:
        parser.error(f"{others[0]} is for making a bundle, not for {action}")
    if values.without_core and values.with_libraries:
        parser.error("--without-core: a bundle with libraries has no torch, which would compute instead")
    if values.with_model and values.args:
        settings = parse_command_line(values.args, {}, commands)
        if settings.model or settings.several or settings.models:
            parser.error("--args names a MODEL, which would run instead of that of --with-model")
    for name in ("pythons", "wheels"):
        if getattr(values, name) and not values.with_libraries:
            parser.error(f"--{name} needs --with-libraries")
    return values


def join_args(words: Seq[str]) -> list[str]:
    """The words with --args and its value in one: argparse takes a value such as --no-drafts for a flag."""
    words = list(words)
    if "--args" in words[:-1]:
        place = words.index("--args")
        words[place:place + 2] = [f"--args={words[place + 1]}"]
    return words


def python_versions(text: str) -> tuple[str, ...]:
    """An argparse type: "3.11,3.13"."""
    versions = tuple(dict.fromkeys(re.split(r"\s*,\s*", text.strip())))
    for version in versions:
        if not re.fullmatch(r"3\.[1-9]\d", version):
            raise argparse.ArgumentTypeError(
                f"{version!r} is not a version of Python such as 3.11; it must be 3.10 or newer")
    return versions


def kept_words(commands: Seq[Command], text: str) -> tuple[str, ...]:
    """An argparse type: words of a command line, which must be right."""
    try:
        words = tuple(shlex.split(text))
        if any(word.partition("=")[0] == "--api-key" for word in words):
            raise ConfigError("everyone who gets the file could read a key; use --api-key-file")
        if any(word in ("--help", "-h", "--version") for word in words):
            raise ConfigError("--help and --version run nothing")
        command = command_named(words, commands)
        if command and not command.run:
            raise ConfigError(f"a file that is a chat cannot begin with {command.name}")
        parse_command_line(words, {}, commands)
    except (ConfigError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return words


def bundle_lines(words: Seq[str], commands: Seq[Command]) -> Iterator[str]:
    """Make, check or unpack a bundle; yields the lines to print."""
    # what packs libraries takes 10 ms to import, which no server should wait for
    asked = parse_bundle_words(words, commands)
    if asked.verify:
        path = Path(asked.file).expanduser() if asked.file else own_bundle("bundle --verify")
        yield from verified(path)
    elif asked.unpack:
        yield unpack_bundle(own_bundle("bundle --unpack FOLDER"), Path(asked.unpack).expanduser())
    else:
        wheels = Path(asked.wheels).expanduser() if asked.wheels else None
        model = model_file(asked.with_model, commands) if asked.with_model else None
        yield write_bundle(Path(asked.file or "chat_server.pyz"), Wanted(
            asked.without_core, asked.with_libraries, asked.pythons, wheels, model, asked.args or ()))


def model_file(word: str, commands: Seq[Command]) -> Path:
    """The GGUF file of --with-model. ConfigError if MODEL is of another kind."""
    if word in ("default", DEFAULT_MODEL_NAME):
        return fetch_default_model()
    source = resolve_model(parse_command_line(["serve", word], {}, commands))
    if source.kind != "gguf" or re.search(SPLIT_GGUF, source.path.name):
        raise ConfigError(f"--with-model {word}: a bundle takes a model of one GGUF file, and this is "
                          f"{'one of several parts' if source.kind == 'gguf' else source.chosen}")
    return source.path
