"""Makes docs/flags.md from the table of flags.

    python docs/flags.py
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from chatlm.common.config import FLAGS      # noqa: E402

INTRODUCTION = """\
# Flags

`.venv/bin/python docs/flags.py` makes this file from `Settings` in `chatlm/common/config.py`, and a test compares the two. `.venv/bin/python
chat_server.py --help` shows the same, and `chat --help`, `generate --help` and so on show the flags of these commands.
`bundle --help` shows those of `bundle`, and `store` has `--prune SIZE`.

A value comes from the first of these that sets it:

1. the flag: `--max-tokens 512`
2. the environment variable of the same name: `CHAT_SERVER_MAX_TOKENS=512`. For a flag that may repeat, values are separated by commas
3. the file that `--config` or `CHAT_SERVER_CONFIG` names, in TOML: `max-tokens = 512`, `served-model-name = ["a", "b"]`; text is in quotes
4. the default

MODEL is `CHAT_SERVER_MODEL` and `model = "model.gguf"`; for several models, `[[models]]` has a table for each
([models](models.md#many-models)). A switch is turned off by `no` before its name, as in `--no-drafts`, or by `false`
in the other two. Sizes have the suffixes K, M, G and T. A flag belongs to `serve`, `chat`, `generate`, `compare`, `score`, `eval` and `embed`
unless its row names its commands.

`-p` has two meanings, as in nanochat: the port for `serve`, the prompt for `chat`, `generate` and `compare`.
"""

SAMPLING = """
Without a sampling flag the model's authors decide, if they specify values: in the `general.sampling` keys of a GGUF file, or in the
`generation_config.json` of a folder (`do_sample: false` is temperature 0). For the default model these are temperature 0.3, min-p 0.1,
and a frequency and a presence penalty of 0.2, with which its answers end by themselves. Such penalties are for drawn answers: at temperature 0
a model's own are left out. They count the tokens that an answer wrote itself: one that goes on from a text, as with the page's Continue, begins
to count anew.
The log and `/stats` say which values apply and where each comes from.
"""
ALL_COMMANDS = "serve chat generate compare score eval"


def default(flag) -> str:
    if isinstance(flag.default, bool):
        return "on" if flag.default else ""
    value = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    return "" if value in (None, (), "") else f"`{value}`"


def row(flag) -> str:
    """A row of a table: names and commands, short form, default, meaning."""
    names = " ".join(f"`--{name}`" for name in flag.names)
    commands = "" if flag.commands == ALL_COMMANDS else f" ({', '.join(flag.commands.split())})"
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
