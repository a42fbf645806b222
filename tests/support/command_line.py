"""The command line of the program, with all of its commands."""

from functools import partial

from chatlm import cli
from chatlm.commands import COMMANDS

parse_command_line = partial(cli.parse_command_line, commands=COMMANDS)
