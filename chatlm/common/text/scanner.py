"""An answer's text as it arrives, and what has been read of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Delta
from chatlm.common.text.formats import A_MARK, A_MARKER, MARKERS, MARKS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


class Scanner:
    """The unread text of an answer.

    Readers are generators over it. They yield when they need more text, and once when the answer is over and
    nothing is left to do. If a marker is a token of the vocabulary, its mark stands for it (see MARKS)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.markers = tokenizer.markers
        self.held = ""                # text not read yet
        self.closing = ""             # what the answer lacks here if it ends
        # no more text comes; cut: there was no room for more
        self.over = False
        self.cut = False

    def finish(self, cut: bool):
        """The text is complete. Whatever is open is closed, or dropped if the answer was cut."""
        self.over = True
        self.cut = cut
        if self.closing:
            self.held = "" if cut else self.held + self.closing

    def sign(self, marker: str) -> str:
        """How a marker looks in the text."""
        return MARKS[marker] if marker in self.markers else marker

    def signs(self, text: str) -> str:
        """How text with markers looks."""
        return A_MARKER.sub(lambda marker: self.sign(marker[0]), text)

    def spelled(self, text: str) -> str:
        """Text whose markers turned out to mark nothing, without its special tokens, which have no text."""
        return A_MARK.sub(
            lambda mark: self.tokenizer.token_bytes(self.markers[MARKERS[mark[0]]]).decode(), text)

    def take(self, length: int) -> str:
        """Read the next `length` characters."""
        text = self.spelled(self.held[:length])
        self.held = self.held[length:]
        return text

    def until(self, write: Callable[[str], None], *signs: str,
              dropped: tuple[str, ...] = ()) -> Generator[None, None, str]:
        """Write text up to the first of these signs; removes and returns the sign. If a cut answer ends
        earlier, the beginning of one of `dropped` at its end is not written."""
        while True:
            if found := [(place, sign) for sign in signs if (place := self.held.find(sign)) >= 0]:
                place, sign = min(found)
                write(self.take(place))
                self.held = self.held[len(sign):]
                return sign
            # what is held may end with the beginning of a sign
            write(self.take(len(self.held) - max((n for sign in signs for n in range(1, len(sign))
                                                  if self.held.endswith(sign[:n])), default=0)))
            if self.over and not (self.cut and any(sign.startswith(self.held) for sign in dropped)):
                write(self.take(len(self.held)))
            yield


def skip(text: str):
    """What `until` writes of text that nobody needs."""


class Deltas:
    """The parts of an answer read so far, in order.

    White space around reasoning and before the content after it is left out; a blank line separates two parts
    of one kind, unless a call does."""

    def __init__(self):
        self.unread: list[Delta] = []
        self.part = "text"        # reasoning or text: what is being written
        self.kinds: list[str] = []  # all so far, the latest last
        self.space = ""           # comes before more text, if there is more
        self.stripping = False    # is white space dropped until this part has text?
        # the latest call whose arguments begin, or will with the next token, with what has arrived of them;
        # until somebody removes it
        self.begun_call: Delta | None = None

    def begin(self, part: str):
        """Another part begins."""
        self.part = part
        self.stripping = True
        self.space = "\n\n" if part in self.kinds and self.kinds[-1] != "call" else ""

    def write(self, text: str):
        """More of this part."""
        text = text.lstrip() if self.stripping else text
        if not text:
            return
        text = self.space + text
        self.space = ""
        self.stripping = False
        if self.part == "reasoning":
            self.space = text[len(text.rstrip()):]
            text = text.rstrip()
        self._add(self.part, text)

    def begin_call(self, name: str, text: str):
        """Begin a call, whose arguments begin with this unread text. It ends reasoning."""
        if self.part == "reasoning":
            self.begin("text")
        self.arguments("", name)
        self.begun_call = Delta("call", text, name)

    def arguments(self, text: str, name: str = ""):
        """More of the last call's arguments, as JSON text; with a name, the beginning of another call."""
        self._add("call", text, name)

    def _add(self, kind: str, text: str, name: str = ""):
        if not text and not name:
            return
        self.kinds = [other for other in self.kinds if other != kind] + [kind]
        if not name and self.unread and self.unread[-1].kind == kind:
            last = self.unread.pop()
            text = last.text + text
            name = last.name
        self.unread.append(Delta(kind, text, name))

    def take(self) -> list[Delta]:
        """The parts added since the last time."""
        unread = self.unread
        self.unread = []
        return unread

    def forget(self):
        """Drop what was read so far, which belongs to the prompt."""
        self.unread = []
        self.kinds = []
        self.space = ""
