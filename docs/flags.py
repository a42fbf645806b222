"""Makes docs/flags.md from the table of flags.

    python docs/flags.py
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from chatlm.common.config import ANSWERING, CHOOSING, FLAGS, READING      # noqa: E402

EVERYWHERE = f"{ANSWERING} score eval embed batch"    # the commands of a flag whose row names none

INTRODUCTION = f"""\
# Flags

`.venv/bin/python chat_server.py --help` shows these flags too. `chat --help`, `generate --help` and so on show the flags of one command.
`bundle --help`, `export --help` and `push --help` show those of these commands, and `store` has `--prune SIZE`. (`.venv/bin/python docs/flags.py` makes this file from `Settings` in `chatlm/common/config.py`, and a test
compares the two.)

A flag's value comes from the first of these that sets it:

1. the flag: `--max-tokens 512`
2. the environment variable of the same name: `CHAT_SERVER_MAX_TOKENS=512`. If a flag may repeat, separate its values by commas
3. the file that `--config` or `CHAT_SERVER_CONFIG` names, in TOML: `max-tokens = 512`, `served-model-name = ["a", "b"]`; text is in quotes
4. the default

In the environment MODEL is `CHAT_SERVER_MODEL`, in the file `model = "model.gguf"`. For several models the file has a `[[models]]` table for each
([models](models/many.md#many-models)). To turn a switch off, put `no` before its name, as in `--no-drafts`, or write `false`
in the environment and the file. Sizes have the suffixes K, M, G and T.

A row names the commands that take its flag. If it names none, these commands take it: {', '.join(f'`{name}`' for name in EVERYWHERE.split())}. "also check" adds `check` to them.

`-p` has two meanings, as in nanochat: the port for `serve`, the prompt for `chat`, `generate` and `compare`.
"""

SAMPLING = """
Without a sampling flag, the values of the model's authors apply, if there are any: in the `general.sampling` keys of a GGUF file, or in the
`generation_config.json` of a folder (`do_sample: false` is temperature 0). For the default model these are temperature 0.3, min-p 0.1,
and a frequency and a presence penalty of 0.2, with which its answers end by themselves. A model's own penalties apply only to drawn answers, not at temperature 0.
They count only the tokens that the answer itself has written: an answer that continues a text, as with the page's Continue, begins
to count anew.
The log and `/stats` say which values apply and where each comes from.
"""


def default(flag) -> str:
    if isinstance(flag.default, bool):
        return "on" if flag.default else ""
    value = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    return "" if value in (None, (), "") else f"`{value}`"


def row(flag) -> str:
    """A row of a table: names and commands, short form, default, meaning."""
    names = " ".join(f"`--{name}`" for name in flag.names)
    commands = f" ({', '.join(flag.commands.split())})"
    if flag.commands == EVERYWHERE:
        commands = ""
    elif flag.commands == READING:          # EVERYWHERE and check
        commands = " (also check)"
    elif flag.commands == CHOOSING:
        commands = " (also check, quantize, imatrix)"
    meaning = flag.help + (f": {', '.join(flag.choices)}" if flag.choices else "")
    return f"| {names}{commands} | {f'`-{flag.short}`' if flag.short else ''} | {default(flag)} | {meaning} |"


def page() -> str:
    """docs/flags.md."""
    parts = [INTRODUCTION]
    for flag in FLAGS:
        if flag.heading:
            parts.append(f"\n## {flag.heading}\n\n| flag | short | default | meaning |\n|---|---|---|---|\n")
        parts.append(row(flag) + "\n")
    return "".join(parts).replace("\n\n## In the terminal", f"\n{SAMPLING}\n## In the terminal", 1)


if __name__ == "__main__":
    (DOCS / "flags.md").write_text(page(), encoding="utf-8")
