"""Conversations in the form that chat templates expect: how earlier calls and their results are shown."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from functools import partial

from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import calculations_of, shift_calls, with_calls
from chatlm.common.text.notations import PYTHON, Notation


GENERIC_TOOLS = """You can call functions. Each line here describes one of them:
{}

To call a function, write
<tool_call>
{{"name": "the function", "arguments": {{...}}}}
</tool_call>
You then get what it returns in <tool_response>. Where no function helps, answer in words."""
CALL_BEGIN = "<tool_call>\n"
CALL_END = "\n</tool_call>"
RESULT_BEGIN = "<tool_response>\n"
RESULT_END = "\n</tool_response>"
SYSTEM_BEGIN = "<system>\n"
SYSTEM_END = "\n</system>"


def with_system(messages: Seq[Message], system: str | None) -> Seq[Message]:
    """The conversation with this system prompt, if it has none and there is one."""
    if system is None or messages and messages[0].role == "system":
        return messages
    return [Message("system", system), *messages]


def with_generic_tools(messages: Seq[Message], tools: Seq[dict], has_system: bool = True) -> list[Message]:
    """A conversation for a template without tools: the system message (or, if the model has no system role,
    the first message) describes them, and calls and their results are text in tags."""
    turns: list[Message] = []
    has_tools = bool(tools)
    for message in messages:
        role = message.role
        content = message.content
        if message.tools:
            described = described_tools(message.tools)
            written = described if has_tools else GENERIC_TOOLS.format(described)
            content = "\n".join(filter(None, (content, written)))
            has_tools = True
        more = {**(message.more or {})}
        calls = more.pop("tool_calls", ())
        texts = [content, *(f"{CALL_BEGIN}{json.dumps(call['function'], ensure_ascii=False)}{CALL_END}"
                            for call in calls)]
        content = "\n".join(filter(None, texts))
        if is_result := role == "tool":
            role = "user"
            content = f"{RESULT_BEGIN}{content}{RESULT_END}"
            more = {}
        if turns and turns[-1].role == role and (
                is_result or calls or turns[-1].content.endswith((CALL_END, RESULT_END))):
            last = turns.pop()  # many templates want roles to alternate
            before = f"{last.content}\n" if last.content else ""
            more = with_calls({**(last.more or {}), **more},
                              [*calculations_of(last), *shift_calls(more.get("calculator", ()), len(before))])
            content = before + content
        turns.append(Message(role, content, more or None))
    if tools:
        prompt = GENERIC_TOOLS.format(described_tools(tools))
        if turns[0].role == "system":
            turns[0] = replace(turns[0], content=f"{turns[0].content}\n\n{prompt}".strip())
        elif has_system:
            turns.insert(0, Message("system", prompt))
        else:
            turns[0] = replace(turns[0], content=f"{prompt}\n\n{turns[0].content}".strip())
    return turns


def described_tools(tools: Seq[dict]) -> str:
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)


def with_later_systems(messages: Seq[Message]) -> list[Message]:
    """The conversation for a format without system messages after the first message: these are text of the
    user."""
    turns: list[Message] = []
    for index, message in enumerate(messages):
        if index and message.role == "system":
            message = Message("user", f"{SYSTEM_BEGIN}{message.content}{SYSTEM_END}")
        last = turns[-1] if turns else None
        if last and last.role == message.role == "user" and (
                SYSTEM_END in (last.content[-len(SYSTEM_END):], message.content[-len(SYSTEM_END):])):
            turns[-1] = replace(last, content=f"{last.content}\n{message.content}")
        else:
            turns.append(message)
    return turns


# The functions from here on get conversations as templates do, as lists of objects.


def calls_in(dialogue: list[dict]) -> itertools.chain[dict]:
    return itertools.chain.from_iterable(message.get("tool_calls", ()) for message in dialogue)


class Unanswered:
    """The calls that have no result yet, in order."""

    def __init__(self):
        self.calls: dict[int, dict] = {}  # by the object's id
        # by what finds them; answered ones leave when they come first
        self.queues: defaultdict[tuple, deque[dict]] = defaultdict(deque)

    def add(self, call: dict):
        self.calls[id(call)] = call
        for key in ((), ("id", call.get("id")), ("name", call["function"]["name"])):
            self.queues[key].append(call)

    def take(self, *keys: tuple) -> dict | None:
        """The first call that any of these keys finds: ("id", ID), ("name", NAME), or () for every call."""
        for key in keys:
            queue = self.queues[key]
            while queue and id(queue[0]) not in self.calls:
                queue.popleft()
            if queue:
                return self.calls.pop(id(queue[0]))
        return None


def with_ids(dialogue: list[dict]):
    """Give an id to each call without one, and to each result without one that of its call: of the function
    that it names, or else of the first that has no result yet. Ollama's clients send none, and templates
    refuse that."""
    taken = {call.get("id") for call in calls_in(dialogue)}
    free = (name for number in itertools.count() if (name := f"call{number:05}") not in taken)
    unanswered = Unanswered()
    for message in dialogue:
        for call in message.get("tool_calls", ()):
            if not call.get("id"):
                call["id"] = next(free)
            unanswered.add(call)
        if message["role"] != "tool":
            continue
        if call_id := message.get("tool_call_id"):
            unanswered.take(("id", call_id))
        elif call := unanswered.take(("name", message.get("name")), ()):
            message["tool_call_id"] = call["id"]


def nine_character_ids(dialogue: list[dict]):
    """Ids of calls as Mistral's templates accept them."""
    for holder, key in (*((message, "tool_call_id") for message in dialogue),
                        *((call, "id") for call in calls_in(dialogue))):
        holder[key] = re.sub("[^A-Za-z0-9]", "", holder.get(key) or "")[-9:].rjust(9, "0")


def single_calls(dialogue: list[dict]) -> list[dict]:
    """The conversation with one call in each assistant message, followed by its result."""
    results: defaultdict[str, deque[dict]] = defaultdict(deque)
    for message in dialogue:
        if message["role"] == "tool" and message.get("tool_call_id"):
            results[message["tool_call_id"]].append(message)
    split: list[dict] = []
    placed: set[int] = set()
    for message in dialogue:
        calls = message.get("tool_calls", ())
        if len(calls) < 2 and id(message) not in placed:
            split.append(message)
        for call in calls if len(calls) > 1 else ():
            split.append({**(message if call is calls[0] else {"role": "assistant", "content": ""}),
                          "tool_calls": [call]})
            # some clients give all calls one id
            if waiting := results.get(call.get("id", "")):
                split.append(waiting.popleft())
                placed.add(id(split[-1]))
    return split


def with_text_apart(dialogue: list[dict]) -> list[dict]:
    """The conversation with text before calls in a message of its own."""
    apart: list[dict] = []
    for message in dialogue:
        if message.get("tool_calls") and message["content"]:
            apart.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": "assistant", "content": "", "tool_calls": message["tool_calls"]}
        apart.append(message)
    return apart


def with_tool_responses(dialogue: list[dict]) -> list[dict]:
    """The conversation for Gemma 4's first templates: a message with calls also has their results and the
    text after them."""
    turns: list[dict] = []
    calls: dict[str | None, str] = {}  # of the last turn: id -> name,
    names: list[str] = []              # and these alone
    for message in dialogue:
        last = turns[-1] if turns else {}
        if message["role"] == "tool" and calls:
            responses = last.setdefault("tool_responses", [])
            name = calls.get(message.get("tool_call_id")) or names[min(len(responses), len(names) - 1)]
            responses.append({"name": name, "response": object_or_text(message["content"])})
        elif message["role"] == "assistant" and "tool_responses" in last and not (
                last["content"] or message.get("tool_calls")):
            last["content"] = message["content"]
        else:
            turns.append(message)
            calls = {call.get("id"): call["function"]["name"] for call in message.get("tool_calls", ())}
            names = [*calls.values()]
    return turns


def orphans_of(dialogue: list[dict]) -> list[dict]:
    """The results that do not follow their call: between these are only other results."""
    orphans: list[dict] = []
    unanswered = Unanswered()
    for message in dialogue:
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if unanswered.take(*([("id", call_id), ("id", None)] if call_id else [()])) is None:
                orphans.append(message)
            continue
        unanswered = Unanswered()
        for call in message.get("tool_calls", ()):
            unanswered.add(call)
    return orphans


def results_as_turns(dialogue: list[dict], results: list[dict]) -> list[dict]:
    """The conversation with those of its messages that are results as text of the user."""
    return moved_to_user(dialogue, {id(message): f"{RESULT_BEGIN}{message['content']}{RESULT_END}"
                                    for message in results if message["role"] == "tool"})


def systems_as_turns(dialogue: list[dict]) -> list[dict]:
    """The conversation with system messages after the first message as text of the user."""
    return moved_to_user(dialogue, {id(message): f"{SYSTEM_BEGIN}{message['content']}{SYSTEM_END}"
                                    for message in dialogue[1:] if message["role"] == "system"})


def moved_to_user(dialogue: list[dict], moved: Mapping[int, str]) -> list[dict]:
    """The conversation with some messages as text of the user. moved: their texts, by the objects' ids."""
    turns: list[dict] = []
    texts: list[str] = []  # of the last turn
    for message in dialogue:
        is_moved = id(message) in moved
        if is_moved:
            message = {"role": "user", "content": moved[id(message)]}
        if message["role"] == "user" and texts and (
                is_moved or texts[-1].endswith((RESULT_END, SYSTEM_END))):
            texts.append(message["content"])  # many templates want roles to alternate
            continue
        if len(texts) > 1:
            turns[-1]["content"] = "\n".join(texts)
        turns.append(message)
        texts = [message["content"]] if message["role"] == "user" else []
    if len(texts) > 1:
        turns[-1]["content"] = "\n".join(texts)
    return turns


def with_answers(dialogue: list[dict]) -> list[dict]:
    """The conversation with an empty answer between results of calls and a user's message after them."""
    turns: list[dict] = []
    for message in dialogue:
        if message["role"] == "user" and turns and turns[-1]["role"] == "tool":
            turns.append({"role": "assistant", "content": ""})
        turns.append(message)
    return turns


def object_or_text(text: str):
    """The text parsed as a JSON object, or else the text."""
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    return text


# The functions of CALL_FORMATS below change a conversation in place. `mark` is text that no client can type,
# which marks a position in the rendered template.


def before_call(mark: str) -> str:
    """The marks around text before a call, put before the function's name."""
    return mark + "\ue002"


def result_of_call(mark: str) -> str:
    """The marks around the result of a call."""
    return mark + "\ue003"


def counted_ids(dialogue: list[dict], mark: str = ""):
    """Kimi's ids of calls name the function and count the calls."""
    ids = {}
    numbers = itertools.count()
    for call in calls_in(dialogue):
        old = call.get("id")
        call["id"] = ids[old] = f"functions.{call['function']['name']}:{next(numbers)}"
    for message in dialogue:
        if (old := message.get("tool_call_id")) in ids:
            message["tool_call_id"] = ids[old]


def no_empty_content(dialogue: list[dict], mark: str):
    """DeepSeek's templates ask of a message with calls whether there is any content."""
    for message in dialogue:
        if message.get("tool_calls"):
            message["content"] = message["content"] or None


def marked_for_gemma(dialogue: list[dict], mark: str):
    """Gemma 4's templates put the text of a message behind its calls, even behind their results: where it
    came before them, the first call's name says it, for as_gemma to put it there."""
    for message in dialogue:
        if message.get("tool_calls") and message["content"]:
            function = message["tool_calls"][0]["function"]
            text = message["content"].strip()
            sign = before_call(mark)
            function["name"] = sign + text + sign + function["name"]
            message["content"] = ""


def as_gemma(text: str, mark: str) -> str:
    """Put texts before the calls whose names contain them; results of calls repeat the names. Put functions
    that a result makes known behind the result, whose text is in quotes."""
    said = f"{before_call(mark)}(.*?){before_call(mark)}"
    sign = re.escape("<|tool_call>call:")
    tools = re.escape(mark) + '\ue005\\d+"\ue005'
    result_end = r'(?:(?!<tool_response\|>).){0,40}<tool_response\|>'
    text = re.sub(rf"\n?({tools})({result_end})", r"\2\1", text, flags=re.DOTALL)
    text = re.sub(sign + said, r"\1<|tool_call>call:", text, flags=re.DOTALL)
    return re.sub(said, "", text, flags=re.DOTALL)


def calls_as_content(dialogue: list[dict], mark: str):
    """Move calls into the content: LFM2's first templates show only content, and the model writes its calls
    before it."""
    for message in dialogue:
        if calls := [call["function"] for call in message.pop("tool_calls", ())]:
            written = ", ".join(f"{call['name']}({arguments_of(call, PYTHON)})" for call in calls)
            message["content"] = f"<|tool_call_start|>[{written}]<|tool_call_end|>{message['content']}"


def arguments_of(function: dict, notation: Notation) -> str:
    """The arguments of an earlier call; a client may send ones that are not a JSON object."""
    arguments = function["arguments"]
    return notation.arguments(arguments) if isinstance(arguments, dict) else str(arguments)


def marked_for_harmony(dialogue: list[dict], mark: str):
    """Mark what gpt-oss's template would lose or quote, so that as_harmony can restore it."""
    preamble = before_call(mark)
    result = result_of_call(mark)
    for message in dialogue:
        if message["role"] == "tool":
            message["content"] = result + message["content"] + result
        elif message["content"] and message.get("tool_calls"):
            function = message["tool_calls"][0]["function"]
            function["name"] = preamble + message["content"] + preamble + function["name"]
            message["content"] = ""  # its template takes reasoning or content


def as_harmony(text: str, mark: str) -> str:
    """Correct gpt-oss's template where it differs from OpenAI's renderer: results of calls in quotes, text
    before a call as reasoning or not at all, blank lines after instructions."""
    preamble = before_call(mark)
    result = result_of_call(mark)
    resolve = partial(re.sub, flags=re.DOTALL)
    text = resolve(f'"{result}(.*?){result}"', lambda quoted: json.loads(f'"{quoted[1]}"'), text)
    text = resolve(rf"(<\|start\|>assistant(?:(?!<\|start\|>).)*?){preamble}(.*?){preamble}",
                   r"<|start|>assistant<|channel|>commentary<|message|>\2<|end|>\1", text)
    text = resolve(f"{preamble}.*?{preamble}|{result}", "", text)
    return resolve(r"(<\|start\|>developer<\|message\|>(?:(?!<\|end\|>).)*?)\n\n<\|end\|>", r"\1<|end|>",
                   text)
