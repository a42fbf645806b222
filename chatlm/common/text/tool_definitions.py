"""The functions that a model learns of in the middle of a conversation, written as its chat template writes
those in the head of a prompt.

No template has a place for them. So the definitions are taken from what the template writes when it is filled
in with these functions in a short conversation. In the conversation itself a sign stands for them, which
nobody can type."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import Message
from chatlm.common.text.tokenizer import REFUSED

if TYPE_CHECKING:
    from chatlm.common.text.formats import CallFormat
    from chatlm.common.text.history_forms import Filling


FIRST_TOOLS = """You can call these functions:
{}

To call one, write
{}"""
SYSTEM, ASKED = "zqsystemqz", "zqaskedqz"  # the texts of the short conversation
PARAMETER = "zqparameterqz"  # of the example
WORDS = f"{SYSTEM}|{ASKED}"
ROLES = "system|developer|user"
MOST_CUT = 40  # characters
# What may enclose a list of definitions, by its own line or directly
OPENS = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\]|namespace \w+ \{)\s*\[?\s*\Z")
CLOSES = re.compile(r"\s*\]?\s*(<[^<>\s]+>|\[/[A-Z_]+\]|\} // namespace \w+)")


class ToolForm(NamedTuple):
    """How a template writes functions."""

    single: str   # the definition of the function that `example` makes
    opening: str  # before a list of definitions; "": nothing encloses it
    closing: str  # after it
    before: str   # all that it writes before the list: the same, and how functions are called
    after: str


def example(name: str) -> dict:
    """A function with a name and everything else that a template may show."""
    return {"type": "function", "function": {
        "name": name, "description": "an example", "parameters": {
            "type": "object", "properties": {PARAMETER: {"type": "string", "description": "a word"}},
            "required": [PARAMETER]}}}


class Part(NamedTuple):
    """A part of a text that stands there three times."""

    begin: int   # of the first
    end: int     # of the first
    period: int  # from each to the next


def repeated_part(text: str, name: str) -> Part | None:
    """Of a text in which the same definition stands three times, the longest part that stands there so often
    and has the name; None if the three are not written alike. name: of the function, in each of them."""
    places = [found.start() for found in re.finditer(re.escape(name), text)]
    for first, second in itertools.combinations(places, 2):
        period = second - first
        last = second + period
        if (text[first:second] == text[second:last] and text.startswith(name, last)
                and PARAMETER in text[first:second]):
            return Part(*extended(text, first, last + len(name), period), period)
    return None


def extended(text: str, begin: int, end: int, period: int) -> tuple[int, int]:
    """Where the first of three equal parts begins and ends, as far as the text repeats itself around the one
    from `begin` to `end`, which has the beginning of each."""
    while begin > 0 and text[begin - 1] == text[begin - 1 + period]:
        begin -= 1
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return begin, end - 2 * period


def shorter_parts(text: str, part: Part) -> Iterator[Part]:
    """What of a repeated part may be the definition alone, the longest first. What is before the list may end
    as a definition does, and what is after it begin as one: `<tools> <tool>..</tool> </tools>`."""
    cuts = [(left, right) for left in range(MOST_CUT) for right in range(MOST_CUT)]
    for left, right in sorted(cuts, key=sum):
        single = text[part.begin + left:part.end - right]
        begin = part.begin + left + len(single) - len(single.lstrip())
        single = single.strip()
        if is_whole(single) and len(single) <= part.period:
            yield Part(begin, begin + len(single), part.period)


def is_whole(definition: str) -> bool:
    """Does a text neither begin with what closes something nor end in what was opened?"""
    return (bool(definition) and definition[0] not in ">}])," and definition[-1] not in "<{[("
            and definition.rfind("<") <= definition.rfind(">"))


def enclosing(before: str, after: str) -> tuple[str, str]:
    """What encloses a list of definitions, of the texts before and after it: a pair of tags or markers about
    tools, with the brackets of a list if it has them; empty texts if there is none."""
    opens, closes = OPENS.search(before), CLOSES.match(after)
    if not opens or not closes:
        return "", ""
    names = [re.sub(r"\W|start|end|begin|of_|namespace", "", found[1].lower()) for found in (opens, closes)]
    if names[0] != names[1] or not re.search("tool|function", names[0]):
        return "", ""
    return opens[0], closes[0]


def form_of(text: str, part: Part, ends_of_turns: str) -> ToolForm:
    """How functions are written in a filled-in template in which `part` is the definition of the example.
    ends_of_turns: a pattern for the special tokens that separate turns."""
    before, after = text[:part.begin], text[part.end + 2 * part.period:]
    opening, closing = enclosing(before, after)
    head = re.compile(rf"(?:{ends_of_turns})(?:{ROLES})?\s*|{WORDS}")
    tail = re.compile(rf"{ends_of_turns}|{WORDS}")
    start = 0
    for found in head.finditer(before, 0, len(before) - len(opening)):
        start = found.end()
    end = tail.search(after, len(closing))
    return ToolForm(text[part.begin:part.end], opening, closing, before[start:],
                    after[:end.start() if end else len(after)])


def between(text: str, fence: str) -> list[str]:
    """The texts between the places of a fence, without what separates definitions."""
    return [part.strip().strip(",").strip() for part in text.split(fence)[1:-1]]


class ToolDefinitions:
    """Writes the functions that messages make known. It learns how for the first conversation that has
    any."""

    def __init__(self, mark: str, call_format: CallFormat, specials: Callable[[], Iterable[str]],
                 guard: Callable[[str], str]):
        """mark: text that nobody can type. specials: the names of tokens that no text spells. guard: breaks
        these up in the text of a client."""
        self.mark = mark
        self.call_format = call_format
        self.specials = specials
        self.guard = guard
        self.names = [f"zq{secrets.token_hex(8)}qz" for _ in range(2)]  # of examples: nobody knows them
        self.signs = re.compile(rf'{mark}\ue005(\d+)(\\?)"\ue005')
        self.is_learned = False
        self.form: ToolForm | None = None  # None: the template's is not understood

    def signed(self, content: str, number: int) -> str:
        """The text of a message that makes functions known. The sign has a quotation mark, so that it shows
        whether the template writes the message as a JSON string."""
        return "\n".join(filter(None, (content, f'{self.mark}\ue005{number}"\ue005')))

    def placed(self, text: str, definitions: Seq[str]) -> str:
        """A filled-in template with definitions in the place of their signs."""
        def written(sign: re.Match) -> str:
            definition = definitions[int(sign[1])]
            return as_json(definition)[1:-1] if sign[2] else definition
        return self.signs.sub(written, text) if definitions else text

    def write(self, places: Seq[Seq[dict]], has_others: bool,
              arguments: Callable[[Seq[Message], Seq[dict]], dict]) -> Filling[list[str]]:
        """The text for each of these places, which make functions known. has_others: are there any in the
        head of the prompt? arguments: makes the values to fill in the template with."""
        if not self.is_learned:
            self.form = yield from self._learn(arguments)
            self.is_learned = True
        lists = []
        if self.form:
            lists = yield from self._lists(places, self.form, arguments)
        if not lists:
            lists = ["\n".join(self.guard(as_json(tool)) for tool in tools) for tools in places]
        texts = [*lists]
        if self.form:
            texts = [self.form.opening + text + self.form.closing for text in lists]
        if not has_others:
            texts[0] = self._first(lists[0])
        return [text.strip() for text in texts]

    def _first(self, definitions: str) -> str:
        """The first functions of a conversation, with how they are called."""
        if self.form and (self.form.before.strip() or self.form.after.strip()):
            return self.form.before + definitions + self.form.after
        if self.call_format.thoughts:  # calls are messages of their own, which no message can show
            return definitions
        call = {"id": "call:0", "function": {"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}}
        return FIRST_TOOLS.format(definitions, self.call_format.written([call]))

    def _learn(self, arguments: Callable) -> Filling[ToolForm | None]:
        name, other = self.names
        text = yield from self._filled([example(name)] * 3, arguments)
        part = repeated_part(text, name)
        if part is None:
            return None
        separators = {*self.specials()} - {*self.call_format.marks}
        ends_of_turns = "|".join(map(re.escape, filter(None, separators))) or "(?!)"
        # if another one between two of these is not written alike, the part is not what it looks like
        proof = yield from self._filled([example(name), example(other), example(name)], arguments)
        for shorter in shorter_parts(text, part):
            single = text[shorter.begin:shorter.end]
            is_definition = name in single and PARAMETER in single
            if is_definition and between(proof, single) == [single.replace(name, other)]:
                return form_of(text, shorter, ends_of_turns)
        return None

    def _lists(self, places: Seq[Seq[dict]], form: ToolForm, arguments: Callable) -> Filling[list[str]]:
        """What the template writes for the functions of each place; [] if that cannot be told apart."""
        fence = example(self.names[0])
        tools = [fence]
        for place in places:
            tools += [*place, fence]
        text = yield from self._filled(tools, arguments)
        lists = between(text, form.single)
        return lists if len(lists) == len(places) else []

    def _filled(self, tools: Seq[dict], arguments: Callable) -> Filling[str]:
        """The template filled in with these functions; "" if it refuses them."""
        asked = Message("user", ASKED)
        for messages in ([Message("system", SYSTEM), asked], [asked]):
            try:
                return (yield arguments(messages, tools))
            except RequestError as error:
                if error.code != REFUSED:
                    raise
        return ""
