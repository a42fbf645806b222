"""What a command of the program is: a row of `chatlm/commands.py`, or of an annex."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence as Seq
from typing import Any, NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.annex import Annex


class Application(NamedTuple):
    """What the program was started with; each command gets it."""

    commands: Seq[Command]  # the first is the default one
    annexes: Seq[Annex[Any]]


class Command(NamedTuple):
    """A command, `python chat_server.py NAME ...`. It has `run` or `lines`; both import its modules.

    With `run`, its words become Settings: its flags are the rows of `Settings` that name it. With `lines`, it
    reads its words itself, and has a --help of its own."""

    name: str
    brief: str  # in the list of commands: "generate, which answers one prompt"
    takes: str = "[MODEL] [flags]"  # and there after its name
    run: Callable[[Settings, Application], Coroutine[Any, Any, int]] | None = None  # returns the exit status
    lines: Callable[[Seq[str], Application], Iterable[str]] | None = None           # to print
    # The --help of a command with `run`
    usage: str = ""  # after its name, if that is not `takes`
    opening: str = ""
    more_help: Callable[[], str] | None = None  # a part that has to be found out
    examples: str = ""
    heading: str = ""  # of the flags about answers, in commands that have few of them
    flag_help: Mapping[str, str] = {}  # field of Settings -> the help of that flag, if not the usual one
    # The words of a command with `run`
    flags_of: str = ""  # the command whose flags it has, if not its own
    needs_model: bool = False  # MODEL may not be left out, or that means another thing
    several: bool = False      # each word is a MODEL
    operand: str = ""          # what may follow MODEL: PROMPT, FILE
    flags_are_for: str = ""    # "checking a model": then without MODEL it takes no flags
    # Of all commands
    also: str = ""  # another name
    instead: Callable[[Seq[str]], Seq[str] | None] | None = None  # words of another command that some mean
    worker_ahead: bool = False  # its worker is like the one that `start_worker_ahead` starts

    @property
    def names(self) -> list[str]:
        return [self.name, *filter(None, [self.also])]


def command_named(words: Seq[str], commands: Iterable[Command]) -> Command | None:
    """The command whose name is the first word; None if the first word is no command."""
    return next((command for command in commands if words and words[0] in command.names), None)


def chosen_command(words: Seq[str], commands: Seq[Command]) -> tuple[Command, Seq[str]]:
    """The command of a command line, the default one if it names none, and the words after its name."""
    command = command_named(words, commands)
    if command is None:
        return commands[0], words
    others = command.instead and command.instead(words[1:])
    return chosen_command(others, commands) if others else (command, words[1:])
