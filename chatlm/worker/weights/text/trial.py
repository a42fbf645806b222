"""Tries a tokenizer with unpublished regular expressions on short texts, before this process opens it. Some
would take years, or any amount of memory. The trial runs in a process with limits on both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, RequestError, printable
from chatlm.common.memory import limit_memory
from chatlm.common.messages.requests import TextSpec
from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.text.splits import KNOWN_SPLITS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


MOST_SPLITS = 8          # more would take too long, however fast each is
# processor seconds to open a tokenizer, which may be large, and for the texts
OPEN_S = 60
TRIAL_S = 5
MEMORY = 2 << 30         # bytes
WALL_S = 600             # on a machine too busy to run it


def refuse_endless(path: Path, spec: TextSpec):
    """ConfigError if a tokenizer with unpublished expressions cannot be opened, or fails or takes too long on
    short texts."""
    if has_known_splits(spec):
        return
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run([*PROCESS_COMMAND, "trial", spec.kind], input=spec.payload, env=environment,
                              capture_output=True, timeout=WALL_S, pass_fds=PROGRAM)
        status = done.returncode
        reason = done.stdout.decode("utf-8", "replace").strip()
    except subprocess.TimeoutExpired:
        status = 1
        reason = ""
    if status:
        too_much = f"a short text takes more than {TRIAL_S} s of processor time or {MEMORY >> 20:,} MiB"
        raise ConfigError(f"{path}: {reason or too_much}")


def trial_main(arguments: Seq[str]) -> int:
    """The role `trial KIND`: try the tokenizer on stdin. Exit status 1: stdout has what is wrong with it."""
    [kind] = arguments
    spec = TextSpec(kind, sys.stdin.buffer.read())
    limit_memory(MEMORY)
    try:
        signal.setitimer(signal.ITIMER_PROF, OPEN_S)  # it ends the process whatever code is running
        tokenizer = open_tokenizer(spec)
        signal.setitimer(signal.ITIMER_PROF, TRIAL_S)
        for text in short_texts(patterns_of(spec)):
            try_text(tokenizer, text)
    except ConfigError as error:
        print(printable(str(error)), flush=True)
        return 1
    return 0


def try_text(tokenizer: Tokenizer, text: str):
    try:
        tokenizer.encode(text)
    except RequestError:
        raise ConfigError("its regular expressions give up on a short text") from None
    except Exception:  # the vocabulary may lack these characters
        pass


def has_known_splits(spec: TextSpec) -> bool:
    """Are all of a tokenizer's expressions published ones? A tokenizer.json is searched as bytes: parsing one
    of 8 MB takes nearly as long as trying it."""
    if spec.kind != "hf":
        return KNOWN_SPLITS.issuperset(patterns_of(spec))
    if re.search(rb"\\u00(52|65|67|78)", spec.payload):  # escaped letters in a key that may spell Regex
        return False
    texts = [match[1] for match in re.finditer(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")', spec.payload)]
    try:
        return len(texts) <= MOST_SPLITS and KNOWN_SPLITS.issuperset(map(json.loads, texts))
    except ValueError:  # opening it reports what is wrong
        return False


def patterns_of(spec: TextSpec) -> list[str]:
    """The regular expressions of a tokenizer."""
    patterns = []

    def collect(pairs: list[tuple]):  # duplicate keys included
        patterns.extend(text for key, text in pairs if key == "Regex" and isinstance(text, str))

    content = json.loads(spec.payload, object_pairs_hook=collect)
    return patterns if spec.kind == "hf" else content[:1]


MOST_TEXTS = 400


def short_texts(patterns: Seq[str]) -> Iterator[str]:
    """The worst texts for expressions that backtrack: each character of the expressions, and each pair of
    adjacent ones, repeated many times; then a character that none expects; and on another line what the
    expressions look for."""
    characters = "a1 .\n\u00e9\u65e5" + "".join(patterns)
    runs = dict.fromkeys([*characters, *map("".join, zip(characters, characters[1:]))])
    asked = "".join(re.sub(r"[()\[\]{}*+?.^$|\\]", "", pattern) + pattern for pattern in patterns)[:1000]
    for run in [*runs][:MOST_TEXTS]:
        yield run * 40 + "\u0001\n" + asked
