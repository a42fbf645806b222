"""How a chat template shows earlier calls and their results: found by filling it in, and looking.

Templates differ in what they want: arguments as an object or as text, one call in a message or several,
results as messages or beside their calls. Some lose results, or show no calls. What a template's source says
is no proof, so short conversations, whose words are in no template, are tried in one form after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import Forms, HistoryForm, Message
from chatlm.common.text.formats import CALL_FORMATS, GENERIC_FORMAT, CallFormat
from chatlm.common.text.history import before_call, calls_in, counted_ids, result_of_call
from chatlm.common.text.tokenizer import REFUSED


T = TypeVar("T")
# Something that needs a template to be filled in: it yields the values, and is sent the text that they make.
# If the template fails, the RequestError is thrown into it.
Filling = Generator[dict, str, T]


def write_calls(dialogue: list[dict], form: HistoryForm, call_format: CallFormat):
    """Rewrite a conversation's calls in this form."""
    for call in calls_in(dialogue):
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str) and (form.wraps_text or form.calls == "text"):
            arguments = {"arguments": arguments}
        if form.arguments_as_text and not isinstance(arguments, str):
            arguments = as_json(arguments)
        function["arguments"] = arguments
    if form.calls == "members":
        return
    if call_format.thoughts:  # calls are messages of their own, which a message cannot contain
        call_format = CALL_FORMATS[GENERIC_FORMAT]
    if "{digit}" in call_format.call:
        counted_ids(dialogue)
    for message in dialogue:
        if calls := message.pop("tool_calls", ()):
            texts = [message["content"], call_format.written(calls)]
            message["content"] = "\n".join(filter(None, texts))


def differences(forms: Forms) -> list[str]:
    """What an operator should know about a template's forms, a sentence each."""
    where = (" where a request has no functions", " where a request has functions")
    losses: dict[str, list[int]] = {}  # what is lost -> the forms that lose it
    for has_tools, form in enumerate(forms):
        if form.calls == "text":
            losses.setdefault(CALLS_LOST, []).append(has_tools)
        if form.results == "text":
            losses.setdefault(RESULTS_LOST, []).append(has_tools)
    return [text if len(cases) == len(forms) else text + where[cases[0]] for text, cases in losses.items()]


CALLS_LOST = "it loses earlier calls, which are shown as text of their messages"
RESULTS_LOST = "it loses results of calls, which are shown as messages of the user"
TEXT_ALONE = HistoryForm("text", "text")  # works with every template that shows messages


def usual_form(template: str) -> HistoryForm:
    """The form that a template's source suggests."""
    members = "tool_responses" in template and "tool_call_id" not in template
    return HistoryForm("members" if members else "messages", single="tool_calls[0]" in template,
                       arguments_as_text="<｜tool▁sep｜>" in template,
                       nine_character_ids="length != 9" in template)


def forms_of(template: str) -> list[HistoryForm]:
    """The forms in which a template may show calls and results, the best first."""
    switches = itertools.product((False, True), repeat=3)
    ways = [HistoryForm(single=single, arguments_as_text=as_text, text_apart=apart)
            for single, as_text, apart in switches]
    forms = []
    if usual_form(template).results == "members":
        forms += [replace(way, results="members") for way in ways]
    forms += ways
    forms += [HistoryForm(calls="text"), HistoryForm(calls="text", single=True)]
    forms += [replace(way, results="text") for way in ways]
    forms.append(TEXT_ALONE)
    return forms


# The words of the conversations that are tried. No template has them.
ASKED, SAID, NAME, ARGUMENT, RESULT, ANSWER, MORE, TWICE, CUT = (
    f"zq{word}qz" for word in (
        "asked", "said", "name", "argument", "result", "answer", "more", "twice", "cut"))
VALUES = tuple(f"zqvalue{letter}qz" for letter in "abc")
A_FUNCTION = {"type": "function", "function": {
    "name": NAME, "description": "a function", "parameters": {
        "type": "object", "properties": {ARGUMENT: {"type": "string", "description": "a word"}},
        "required": [ARGUMENT]}}}


class Trial(NamedTuple):
    """A conversation, and what a rendering of it must show."""

    messages: Seq[Message]
    counts: Mapping[str, int]  # how often each result must appear
    arguments: Seq[str] = ()   # the calls' values, which must appear
    order: Seq[str] = ()       # texts that must follow each other so


def user_message(text: str) -> Message:
    return Message("user", text)


def system_message(text: str) -> Message:
    return Message("system", text)


def assistant_message(text: str) -> Message:
    return Message("assistant", text)


def assistant_calls(text: str, *arguments: dict | str, first: int = 0) -> Message:
    """An assistant's message with a call for each of the arguments. `first`: the number of the first call."""
    calls = [{"id": f"zqcall{number}qz", "type": "function", "function": {"name": NAME, "arguments": given}}
             for number, given in enumerate(arguments, first)]
    return Message("assistant", text, {"tool_calls": calls})


def result_of(number: int, text: str) -> Message:
    return Message("tool", text, {"tool_call_id": f"zqcall{number}qz"})


def with_other_ids(message: Message, changed: Callable[[str], dict]) -> Message:
    """A copy of a message with other ids. `changed` makes an id into a member, or into {} to leave it out."""
    more = dict(message.more or {})
    if "tool_call_id" in more:
        ids = changed(more.pop("tool_call_id"))
        more |= {"tool_call_id": ids["id"]} if ids else {}
    if calls := more.get("tool_calls"):
        more["tool_calls"] = [{"type": "function", "function": call["function"], **changed(call["id"])}
                              for call in calls]
    return replace(message, more=more or None)


def usual_with_ids(changed: Callable[[str], dict]) -> Trial:
    return USUAL._replace(messages=tuple(with_other_ids(message, changed) for message in USUAL.messages))


ONE, *BOTH = ({ARGUMENT: value} for value in VALUES)
USUAL = Trial((  # one call, then two calls at once with equal results
    user_message(ASKED), assistant_calls("", ONE), result_of(0, RESULT), assistant_message(ANSWER),
    user_message(MORE), assistant_calls("", *BOTH, first=1), result_of(1, TWICE), result_of(2, TWICE)),
    {RESULT: 1, TWICE: 2}, VALUES)
BESIDE_TEXT = Trial((user_message(ASKED), assistant_calls(SAID, ONE), result_of(0, RESULT)),
                    {RESULT: 1}, VALUES[:1])
UNUSUAL = {  # a switch of the form, and the conversation that it is for; tried if a template does not show it
    "wraps_text": Trial((user_message(ASKED), assistant_calls("", f'{{"{ARGUMENT}": "{CUT}'),
                         result_of(0, RESULT)),
                        {RESULT: 1}, (CUT,)),
    "nine_character_ids": usual_with_ids(lambda given: {"id": "call_" + given[-3:]}),
    "gives_ids": usual_with_ids(lambda given: {}),
    "moves_orphans": Trial((user_message(ASKED), result_of(8, TWICE), assistant_calls("", ONE),
                            result_of(0, RESULT),
                            assistant_message(ANSWER), user_message(MORE), result_of(9, TWICE)),
                           {RESULT: 1, TWICE: 2}, VALUES[:1]),
    "answers_results": Trial((user_message(ASKED), assistant_calls("", ONE), result_of(0, RESULT),
                              user_message(MORE)),
                             {RESULT: 1, MORE: 1}, VALUES[:1])}
LATER_SYSTEMS = {  # the same, for whether a request has functions or not
    "moves_systems": Trial((user_message(ASKED), system_message(MORE), assistant_message(ANSWER),
                            user_message(TWICE), system_message(SAID), assistant_message(RESULT)),
                           dict.fromkeys((ASKED, MORE, ANSWER, TWICE, SAID, RESULT), 1), (),
                           (ASKED, MORE, ANSWER, TWICE, SAID, RESULT))}


class FormFinder:
    """Finds out in which form a template shows calls and results, in requests with functions and without."""

    def __init__(self, template: str, mark: str, mend: Callable[[str], str],
                 arguments: Callable[[Seq[Message], Seq[dict], HistoryForm], dict], has_tools: bool = True):
        """mark: as in history.py. mend: corrects what the template writes. arguments: makes the values to
        fill it in with. has_tools: has it a place for functions?"""
        self.template = template
        self.mark = mark
        self.mend = mend
        self.arguments = arguments
        self.has_tools = has_tools

    def find(self) -> Filling[Forms]:
        """The form for requests without functions, and the one for requests with functions; () if there is
        nothing to know of a template that has no place for these."""
        if not self.has_tools:
            form = usual = usual_form(self.template)
            with suppress(RequestError):  # it takes too long
                form = yield from self._changed((), usual, LATER_SYSTEMS)
            return () if form == usual else (form, form)
        forms = list[HistoryForm]()
        for tools in ((), (A_FUNCTION,)):
            try:
                form = yield from self._find(tools)
            except RequestError:  # it takes too long
                form = yield from self._find_in_short(tools)
            forms.append(form)
        return tuple(forms)

    def _find_in_short(self, tools: Seq[dict]) -> Filling[HistoryForm]:
        with suppress(RequestError):
            if (yield from self._shows(USUAL, tools, TEXT_ALONE)):
                return TEXT_ALONE
        return usual_form(self.template)

    def _find(self, tools: Seq[dict]) -> Filling[HistoryForm]:
        for form in forms_of(self.template):
            if (yield from self._shows(BESIDE_TEXT, tools, form)) and (
                    yield from self._shows(USUAL, tools, form)):
                break
        else:
            return usual_form(self.template)
        return (yield from self._changed(tools, form, UNUSUAL | LATER_SYSTEMS))

    def _changed(self, tools: Seq[dict], form: HistoryForm,
                 trials: Mapping[str, Trial]) -> Filling[HistoryForm]:
        """The form with those switches without which the template does not show their trials."""
        for change, trial in trials.items():
            if not (yield from self._shows(trial, tools, form)):
                changed = replace(form, **{change: True})
                if (yield from self._shows(trial, tools, changed)):
                    form = changed
        return form

    def _shows(self, trial: Trial, tools: Seq[dict], form: HistoryForm) -> Filling[bool]:
        """Whether the template shows a conversation rightly: each result as often as it should, each call's
        arguments and not as a Python object, and no text inside a call."""
        try:
            text = self.mend((yield self.arguments(trial.messages, tools, form)))
        except RequestError as error:
            if error.code != REFUSED:
                raise
            return False
        if before_call(self.mark) in text or result_of_call(self.mark) in text:
            return False  # it could be corrected in part only
        text = text.replace(self.mark, "")
        if any(text.count(result) != count for result, count in trial.counts.items()):
            return False
        places = [text.find(words) for words in trial.order]
        if places != sorted(places):
            return False
        for value in trial.arguments:
            if value not in text or f"'{ARGUMENT}': '{value}'" in text:
                return False
        return SAID + NAME not in text and NAME + SAID not in text


def rendering(messages: Seq[Message], forms: Forms, tools: Seq[dict],
              arguments: Callable[[HistoryForm | None], dict], tell: Callable[[str], Any]) -> Filling[str]:
    """Render a conversation. If the template refuses it, write calls and results as text, and call `tell`
    with the refusal."""
    form = forms[bool(tools)] if forms else None
    try:
        return (yield arguments(form))
    except RequestError as error:
        has_calls = any(message.role == "tool" or "tool_calls" in (message.more or {})
                        for message in messages)
        if error.code != REFUSED or not has_calls or form in (None, TEXT_ALONE):
            raise
        refusal = error
    try:
        text = yield arguments(replace(TEXT_ALONE, moves_systems=form.moves_systems))
    except RequestError:
        raise refusal from None
    tell(str(refusal))
    return text
