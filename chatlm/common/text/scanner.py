"""The text of an answer as it arrives (`Scanner`), and the parts that were read from it (`Deltas`)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Delta
from chatlm.common.text.formats import A_MARK, A_MARKER, MARKERS, MARKS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


class Scanner:
    """The text of an answer that nobody has read yet.

    Readers are generators: they take text from here, and yield when they need more. They also yield once when
    the answer is over and nothing is left to do. Where a marker is a token of the vocabulary, its mark stands
    for it in the text (see MARKS)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.markers = tokenizer.markers
        self.held = ""     # text that is not read yet
        self.closing = ""  # the text that would close what is open, if the answer ended here
        self.over = False  # the answer has ended,
        self.cut = False   # because there was no room for more

    def finish(self, cut: bool):
        """Note that no more text comes. Closes what is open, or drops it if the answer was cut."""
        self.over = True
        self.cut = cut
        if self.closing:
            self.held = "" if cut else self.held + self.closing

    def sign(self, marker: str) -> str:
        """The characters that stand for a marker in the text."""
        return MARKS[marker] if marker in self.markers else marker

    def signs(self, text: str) -> str:
        """Text in which each marker is replaced by the characters that stand for it."""
        return A_MARKER.sub(lambda marker: self.sign(marker[0]), text)

    def spelled(self, text: str) -> str:
        """Text whose marks turned out to mark nothing: each becomes its token's text, "" for a special
        token."""
        return A_MARK.sub(
            lambda mark: self.tokenizer.token_bytes(self.markers[MARKERS[mark[0]]]).decode(), text)

    def take(self, length: int) -> str:
        """Read the next `length` characters."""
        text = self.spelled(self.held[:length])
        self.held = self.held[length:]
        return text

    def until(self, write: Callable[[str], None], *signs: str,
              dropped: tuple[str, ...] = ()) -> Generator[None, None, str]:
        """Write text up to the first of these signs; remove the sign and return it. If the answer was cut
        before one came, do not write the beginning of one of `dropped` at its end."""
        while True:
            places = [(self.held.find(sign), sign) for sign in signs]
            found = [(place, sign) for place, sign in places if place >= 0]
            if found:
                place, sign = min(found)
                write(self.take(place))
                self.held = self.held[len(sign):]
                return sign
            undecided = max((begun_length(self.held, sign) for sign in signs), default=0)
            write(self.take(len(self.held) - undecided))
            if self.over and not (self.cut and any(sign.startswith(self.held) for sign in dropped)):
                write(self.take(len(self.held)))
            yield


def begun_length(text: str, sign: str) -> int:
    """How many characters of a sign the text ends with, all of the sign excepted."""
    for length in range(len(sign) - 1, 0, -1):
        if text.endswith(sign[:length]):
            return length
    return 0


def skip(text: str):
    """For `Scanner.until`: write nothing of text that nobody needs."""


class Deltas:
    """The parts of an answer that were read so far, in order.

    Leaves out white space around reasoning, and before the content that follows it. Puts a blank line between
    two parts of one kind, unless a call is between them."""

    def __init__(self):
        self.unread: list[Delta] = []
        self.part = "text"          # what is being written: "reasoning" or "text"
        self.kinds: list[str] = []  # the kinds of all parts so far, the latest last
        self.space = ""             # white space that is written before more text, if more comes
        self.stripping = False      # drop white space until this part has text
        # The call whose arguments have just begun, or begin with the next token, and what has arrived of
        # them. Whoever uses it sets it to None.
        self.begun_call: Delta | None = None

    def begin(self, part: str):
        """Begin another part."""
        self.part = part
        self.stripping = True
        self.space = "\n\n" if part in self.kinds and self.kinds[-1] != "call" else ""

    def write(self, text: str):
        """Add text to the current part."""
        if self.stripping:
            text = text.lstrip()
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
        """Begin a call whose arguments start with this unread text. A call ends reasoning."""
        if self.part == "reasoning":
            self.begin("text")
        self.arguments("", name)
        self.begun_call = Delta("call", text, name)

    def arguments(self, text: str, name: str = ""):
        """Add JSON text to the last call's arguments. With a name, begin another call."""
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
        """The parts added since the last call."""
        unread = self.unread
        self.unread = []
        return unread

    def forget(self):
        """Drop all that was read so far, because it belongs to the prompt."""
        self.unread = []
        self.kinds = []
        self.space = ""
