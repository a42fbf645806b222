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
    """Until the template is filled in, a sign that nobody can type stands for a picture in a message's text.
    Then texts with signs become lists of parts where the template reads such, and it writes the model's
    marker; elsewhere the sign goes through. Either becomes the picture's tokens."""

    def __init__(self, spec: TextSpec, mark: str):
        template = spec.chat_template or ""
        self.vision = spec.vision
        self.sign = mark + "\ue004" + mark
        self.lists = "image" in template and re.search(r"\btype\b", template) is not None
        self.only_lists = self.lists and "string" not in template  # it reads texts letter by letter
        marker = self.vision.marker if self.vision else ""
        self.pattern = re.compile("|".join(map(re.escape, filter(None, (self.sign, marker)))))
        self.marker = re.escape(marker) or "(?!)"

    def guarded(self, specials: re.Pattern) -> re.Pattern:
        """What may not stand in a user's text: special tokens, and the marker even if it is none."""
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
        return [{**message, "content": self._parts(content)} if isinstance(
                    content := message.get("content"), str) and self.lists and (
                        self.only_lists or self.sign in content) else message
                for message in dialogue]

    def _parts(self, content: str) -> list[dict]:
        parts = list[dict]()
        for number, text in enumerate(content.split(self.sign)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        return parts or [{"type": "text", "text": ""}]

    def placed(self, text: str, pictures: Seq[Picture]) -> list[str | list[int]]:
        """A rendered template as texts, and the ids of what stands for rows of its pictures. RequestError if
        the template left one out."""
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
