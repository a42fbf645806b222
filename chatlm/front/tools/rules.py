"""The rules of calls, which the terminal and the server's own loop share: which are not run, and what the
model is told instead. Also the names of tools for a model."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from chatlm.common.jsontext import read_json

EQUAL_CALLS = 2  # of one question; then the model is told to use the result that it has
NAME_CHARACTERS = 64
PICTURES_OF_RESULTS = 8  # that a request shows, the newest

DENIED = "The user did not allow this call."
CANCELLED = "The user cancelled this call."
CUT_OFF = "Not run: the call was cut off by the limit of tokens."
BAD_ARGUMENTS = "Not run: the arguments are not a complete JSON object."
CALLED_BEFORE = "Not run: the same call was made twice before. Use its result."
CHANGED = "Not run: the tool is not what it was any more."
UNANSWERED = "Not run: the user has not answered whether to allow this call."
UNKNOWN_OUTCOME = "The call was cut off, so its outcome is unknown."
TOO_MANY = "Not run: the limit of calls is reached."
NOT_SHOWN = "What was found is not shown here any more. Call again to read it."
QUESTION = "Question: "  # in front of the user's, where the result of a call stands before it
SEEN_PICTURES = "The pictures of the results above."
UNSEEN_PICTURES = "[You are not shown the pictures of this result.]"


def arguments_of(text: str) -> dict[str, Any] | None:
    """The arguments of a call; None if they are not a complete JSON object."""
    try:
        arguments = read_json(text)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def why_not_run(name: str, arguments: str, earlier: Iterable[tuple[str, str]]) -> str:
    """Why a call is not run, in words for the model; "" if it may be. earlier: names and arguments of the
    question's calls before it."""
    if arguments_of(arguments) is None:
        return BAD_ARGUMENTS
    same = Counter(earlier)[name, arguments]
    return CALLED_BEFORE if same >= EQUAL_CALLS else ""


def denied(reason: str = "") -> str:
    """What the model is told of a call that the user has denied."""
    return f"{DENIED} They say: {reason}" if reason else DENIED


def name_begin(label: str) -> str:
    """What the names of all tools of a server begin with, for a model."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{label}__")[:NAME_CHARACTERS - 9]


def model_name(label: str, tool: str) -> str:
    """`label__tool`, as models and APIs allow it: at most 64 of A-Z, a-z, 0-9, _ and -. A name that has to be
    changed for that ends in a hash of what it was."""
    name = f"{label}__{tool}"
    allowed = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if allowed == name and len(name) <= NAME_CHARACTERS:
        return name
    mark = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{allowed[:NAME_CHARACTERS - 9]}_{mark}"
