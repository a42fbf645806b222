"""Pictures in a conversation: how its chat template is shown them, and their tokens in what it writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.vision.layout import layout_of
from chatlm.common.vision.pictures import row_ids

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message, Picture, TextSpec


def pictures_of(messages: Iterable[Message]) -> tuple[Picture, ...]:
    return tuple(picture for message in messages for picture in message.pictures)


class ShownPictures:
    """Takes pictures through a chat template.

    In a message's text a sign, which nobody can type, stands for each picture. If the template reads lists of
    parts, the text becomes such a list, and the template writes the model's marker. If not, the template
    passes the sign on. In the rendered text the marker or the sign becomes the picture's tokens."""

    def __init__(self, spec: TextSpec, mark: str):
        template = spec.chat_template or ""
        self.vision = spec.vision
        self.sign = mark + "\ue004" + mark
        self.lists = "image" in template and re.search(r"\btype\b", template) is not None
        self.only_lists = self.lists and "string" not in template  # it would read a text letter by letter
        marker = self.vision.marker if self.vision else ""
        self.pattern = re.compile("|".join(map(re.escape, filter(None, (self.sign, marker)))))
        self.marker = re.escape(marker) or "(?!)"

    def guarded(self, specials: re.Pattern) -> re.Pattern:
        """A pattern for what may not stand in a user's text: special tokens, and the marker even if it is not
        a special token."""
        return re.compile(f"{specials.pattern}|{self.marker}") if self.vision else specials

    def signed(self, message: Message) -> Message:
        if not message.pictures:
            return message
        if self.vision is None:
            raise RequestError("this model cannot see images", param="messages")
        content = "".join(part if isinstance(part, str) else self.sign for part in message.parts)
        return replace(message, content=content)

    def as_parts(self, dialogue: list[dict]) -> list[dict]:
        """The messages as the template reads them."""
        return [self._with_parts(message) for message in dialogue] if self.lists else dialogue

    def _with_parts(self, message: dict) -> dict:
        content = message.get("content")
        if not isinstance(content, str) or not (self.only_lists or self.sign in content):
            return message
        parts = []
        for number, text in enumerate(content.split(self.sign)):
            if number > 0:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return {**message, "content": parts or [{"type": "text", "text": ""}]}

    def placed(self, text: str, pictures: Seq[Picture]) -> list[str | list[int]]:
        """A rendered template as texts and, for each picture, the ids that stand for its rows. Raises
        RequestError if the template left a picture out."""
        if not pictures or self.vision is None:
            return [text]
        texts = self.pattern.split(text)
        if len(texts) != 1 + len(pictures):
            raise RequestError(f"the model's chat template shows {len(texts) - 1} of {len(pictures)} images",
                               param="messages")
        placed: list[str | list[int]] = [texts[0]]
        for picture, text in zip(pictures, texts[1:]):
            layout = layout_of(self.vision, picture.width, picture.height)
            ids = row_ids(self.vision, picture.digest, layout.tokens)
            for part in (*layout.parts, text):
                if isinstance(part, int):
                    placed.append(ids[:part])
                    ids = ids[part:]
                elif isinstance(placed[-1], str):
                    placed[-1] += part
                else:
                    placed.append(part)
        return placed
