"""The command `store`: lists what a --prefix-store keeps, and prunes it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from chatlm.cli import CommandLine
from chatlm.common.config import file_name, size
from chatlm.common.invocation import program_command
from chatlm.common.tiers import listed_store


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


def store_lines(words: Seq[str]) -> list[str]:
    """List a store, or prune it first; returns the lines to print."""
    return listed_store(*parse_store_words(words))
