"""Tokens of GGUF files that mark turns, whatever type the file gives them.

Some files, Google's own among them, say that such a token is an ordinary one. Then no text becomes it: the
template's `<end_of_turn>` would be seven tokens, which the model has never seen there. llama.cpp overrides
these types too."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence as Seq

from chatlm.common.text.infill import NAMES
from chatlm.worker.weights.text.pipelines import NORMAL, USER_DEFINED

END_TOKENS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
              "<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>", "<EOT>", "_<EOT>",
              "\u2581<EOT>", "[EOT]", "</assistant>", "<\uff5cend\u2581of\u2581sentence\uff5c>"}
INFILL = frozenset(itertools.chain(*NAMES.values()))
BEGINS = frozenset(name[0] for name in ("<", "[", *END_TOKENS, *INFILL))  # of a token that marks something
LIKE_A_NAME = re.compile(r"[<\[][^<>\s]*[>\]]")  # as <unused7>
# what a template writes around turns: <|im_start|>, <｜User｜>, <start_of_turn>, <|turn>, [INST]
LIKE_A_MARK = re.compile(
    r"<\|[^<>|\s]+\|?>|<\uff5c[^<>\s]+\uff5c>|<(?:start|begin|end)_of_\w+>|\[/?[A-Z_]+\]")


def misnamed(tokens: Seq[str], types: Seq[int], ids: Iterable[int | None], template: str | None) -> list[int]:
    """The ids of control tokens that the file gives another type: those that end a turn or fill gaps, those
    that the metadata name (`ids`), and those that the template writes around turns."""
    named = {token for token in ids if token is not None and LIKE_A_NAME.fullmatch(tokens[token])}
    found = []
    for token in sorted(named | {token for token, text in enumerate(tokens) if text[:1] in BEGINS}):
        text = tokens[token]
        kind = types[token]
        if kind not in (NORMAL, USER_DEFINED):
            continue
        if text in END_TOKENS or token in named or kind == NORMAL and (
                text in INFILL or text[:1] in ("<", "[") and written_as_mark(text, template)):
            found.append(token)
    return found


def written_as_mark(text: str, template: str | None) -> bool:
    return template is not None and LIKE_A_MARK.fullmatch(text) is not None and text in template
