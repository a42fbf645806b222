"""The last questions of a conversation, and what stands before the last one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.front.admission.prompts import last_question

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message


QUESTION_CHARACTERS = 4_000  # of a question, that are looked for


def questions_in(messages: Seq[Message]) -> list[str]:
    """What is searched for: the last question, and this with the one before it, which may say what it is
    about. () if there is none."""
    texts = [message.content.strip()[:QUESTION_CHARACTERS] for message in messages if message.role == "user"]
    texts = [text for text in texts if text]
    if len(texts) < 2:
        return texts
    return [texts[-1], f"{texts[-1]}\n{texts[-2]}"]


def with_text_before(message: Message, text: str) -> Message:
    parts = (text, *message.parts) if message.parts else ()
    return replace(message, content=text + message.content, parts=parts)


def before_question(messages: Seq[Message], text: str) -> tuple[Message, ...]:
    """A conversation whose last question comes after a text."""
    last = last_question([message.role for message in messages])
    return (*messages[:last], with_text_before(messages[last], text), *messages[last + 1:])
