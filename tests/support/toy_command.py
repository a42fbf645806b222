"""A command of the tests that has Settings, a row. As a program: chat_server with this command."""

import sys

import chat_server
from chatlm.common.commands import Command
from chatlm.front.annex import Annex
from chatlm.front.annexes import ANNEXES


async def count(settings, program):
    """Its exit status is how many MODELs are named."""
    names = [choice.name for choice in settings.several]
    print(f"{settings.command}: {names} of context {settings.context_length}, among {len(program.commands)}")
    return len(names)


COUNT = Command(
    "count", "which counts models", "MODEL ... [flags]", run=count, flags_of="score", several=True,
    needs_model=True, also="number", opening="Count models.", heading="What is counted",
    flag_help={"text": "a text that is not read"}, more_help=lambda: "It is a toy.",
    examples="\n  python chat_server.py count a.gguf b.gguf")
COUNTING = Annex("counting", lambda: lambda front: None, command=COUNT)

if __name__ == "__main__":
    sys.exit(chat_server.main(annexes=(*ANNEXES, COUNTING)))
