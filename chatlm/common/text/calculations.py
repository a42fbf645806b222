"""Calls of nanochat's calculator in an answer: beside its text, and as tokens of a later prompt.

A model that wants to calculate writes `<|python_start|>12+30<|python_end|>`, and the worker forces
`<|output_start|>42<|output_end|>` behind it. The text of the answer is what stands outside of these tokens,
as "12+30 = 42 apples": models repeat the result in their words. A call stands beside the text, as an object:

    {"start": 8, "expression": "12+30", "result": "42"}

`start` counts the characters of the text before it. `result` is null where the worker forced none. So that
any tokens of an answer come back as they were, there is also what badly trained models write: `"cut": true`
where the call lacks its last mark, an `expression` of null where a result has no call before it, and
`{"start": 8, "stray": "python_end"}` for an end without a beginning.

A message has its calls as `calculator` in its `more`, or there `special_tokens` where its content has their
marks by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message
    from chatlm.common.text.tokenizer import Tokenizer


STRAY_MARKS = "python_end", "output_end"
OWN = "calculator", "special_tokens"  # of a message's `more`


def calculations_of(message: Message) -> list[dict]:
    return (message.more or {}).get("calculator", [])


def shift_calls(calls: Iterable[dict], by: int) -> list[dict]:
    """Calls in a text that now stands `by` characters later in another one."""
    return [{**call, "start": call["start"] + by} for call in calls]


def with_calls(more: Mapping, calls: Seq[dict]) -> dict:
    others = {name: value for name, value in more.items() if name != "calculator"}
    return {**others, "calculator": [*calls]} if calls else others


def without_own(more: Mapping | None) -> dict:
    """What a chat template gets of a message's `more`."""
    return {name: value for name, value in (more or {}).items() if name not in OWN}


def text_in(calls: Iterable[dict]) -> str:
    """All that calls have of text, a line for each part, to measure it."""
    return "".join(f"{call.get('expression') or ''}\n{call.get('result') or ''}\n" for call in calls)


def without_unfinished(message: Message) -> Message:
    """A message that is to be continued: a call at its end without the whole result is written again."""
    calls = calculations_of(message)
    if not calls or "stray" in calls[-1] or calls[-1]["start"] < len(message.content):
        return message
    is_whole = not calls[-1].get("cut") and calls[-1].get("result") is not None
    return message if is_whole else replace(message, more=with_calls(message.more or {}, calls[:-1]))


def said_tokens(tokenizer: Tokenizer, message: Message) -> list[int]:
    """The tokens of the assistant's message, those of its calls too."""
    content = message.content
    if tokenizer.tool_tokens is None:
        return tokenizer.encode(content)
    if (message.more or {}).get("special_tokens"):
        return named_tokens(tokenizer, content)
    tokens = list[int]()
    begin = 0
    for call in calculations_of(message):
        tokens += tokenizer.encode(content[begin:call["start"]])
        tokens += call_tokens(tokenizer, call)
        begin = call["start"]
    return tokens + tokenizer.encode(content[begin:])


def call_tokens(tokenizer: Tokenizer, call: Mapping) -> list[int]:
    ids = tokenizer.tool_tokens
    expression = call.get("expression")
    result = call.get("result")
    assert ids
    if "stray" in call:
        return [getattr(ids, call["stray"])]
    tokens = list[int]()
    if expression is not None:
        tokens += [ids.python_start, *tokenizer.encode(expression), ids.python_end]
    if result is not None:
        tokens += [ids.output_start, *tokenizer.encode(result), ids.output_end]
    return tokens[:-1] if call.get("cut") else tokens


def with_names(content: str, calls: Seq[Mapping]) -> str:
    """A text with its calls in it, whose marks are spelled out as in a raw prompt."""
    text = ""
    begin = 0
    for call in calls:
        text += content[begin:call["start"]]
        begin = call["start"]
        marks = [(call.get("expression"), "python"), (call.get("result"), "output")]
        spelled = "".join(f"<|{name}_start|>{said}<|{name}_end|>" for said, name in marks if said is not None)
        if call.get("cut"):
            spelled = spelled[:spelled.rindex("<|")]
        text += f"<|{call['stray']}|>" if "stray" in call else spelled
    return text + content[begin:]


def named_tokens(tokenizer: Tokenizer, content: str) -> list[int]:
    """The tokens of a text in which the names of the calculator's four mean these. All others are text."""
    ids = tokenizer.tool_tokens
    tokens = list[int]()
    assert ids
    by_name = {tokenizer.special_names[token]: token for token in ids}
    for part in re.split(f"({'|'.join(map(re.escape, by_name))})", content):
        tokens += [by_name[part]] if part in by_name else tokenizer.encode(part)
    return tokens
