"""Functions that a model learns of in the middle of a conversation.

A function with `defer_loading` is not in the head of the prompt. It becomes known where a message refers to
it: the result of a search, or a system message that adds it. From there on its definition is in the prompt,
and it may be called. So the head stays the same, whatever is found later. A message may also bring functions
that the body did not declare, or take some away."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import is_text
from chatlm.front.api.fields import (
    SOME_OBJECTS, ToolChoice, allowed_tools, flat_functions_among, matches, no_tools)
from chatlm.front.tools.rules import model_name

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message

DEFERRED = "defer_loading"
UNRESOLVED = "tool_reference_unresolved"
NOTHING_FOUND = "No functions were found."
KNOWN = "The function {} is known already."
AGAIN = "The function {} can be called again."
GONE = "The function {} can no longer be called."

# (tools as an API has them, where they are) -> the functions as Chat Completions has them, and the types of
# the other tools
Reader = Callable[[Seq[dict], str], tuple[tuple[dict, ...], tuple[str, ...]]]


def functions_of_response(tools: Seq[dict], param: str = "tools") -> tuple[tuple[dict, ...], tuple[str, ...]]:
    return flat_functions_among(tools, ["function", None], "parameters", param)


def functions_of_message(tools: Seq[dict], param: str = "tools") -> tuple[tuple[dict, ...], tuple[str, ...]]:
    return flat_functions_among(tools, [None, "custom"], "input_schema", param)


class Functions(NamedTuple):
    """The functions of a request, in the form of Chat Completions."""

    head: Seq[dict] = ()           # in the head of the prompt
    found: Seq[dict] = ()          # that messages make known
    removed: Collection[str] = ()  # names of those that a message has taken away

    @property
    def able(self) -> list[dict]:
        """Those that may be called once the last message was read. One that was found under the name of one
        in the head replaces that."""
        others = {*self.removed, *map(name_of, self.found)}
        return [*(tool for tool in self.head if name_of(tool) not in others), *self.found]


class Change(NamedTuple):
    """What a part of a message does to the functions."""

    tools: Seq[dict] = ()  # makes these known
    texts: Seq[str] = ()   # says this to the model


class KnownFunctions:
    """Which functions a conversation has made known so far. It is told of each message in order."""

    def __init__(self, declared: Iterable[dict] = (), others: Iterable[str] = (),
                 read: Reader = functions_of_response):
        """declared: the functions of a body. others: the names of its tools that are no functions, which no
        model gets here. read: reads tools that a message brings."""
        self.head: list[dict] = []
        self.deferred: dict[str, dict] = {}
        for tool in declared:
            tool, is_deferred = without_flag(tool)
            if is_deferred:
                self.deferred.setdefault(name_of(tool), tool)
            else:
                self.head.append(tool)
        self.others = {*others}
        self.read = read
        self.described = {name_of(tool): tool for tool in reversed(self.head)}  # what the prompt says of each
        self.found: dict[str, dict] = {}   # those of these that are not in the head
        self.removed: set[str] = set()
        self.served: dict[str, str] = {}   # tools that the server runs -> the labels of their servers
        self.ignored: list[str] = []       # types of tools that messages bring and no model gets here

    @property
    def functions(self) -> Functions:
        """All of them, once the last message was read."""
        found = (tool for name, tool in self.found.items() if name not in self.removed)
        return Functions(tuple(self.head), tuple(found), frozenset(self.removed))

    def serve(self, tools: Iterable[dict], labels: Mapping[str, str]):
        """Tools that the server runs are in the head too. labels: of their servers, by the tools' names."""
        for tool in tools:
            name = name_of(tool)
            self.described.setdefault(name, tool)
            self.served[name] = labels[name]

    def refer(self, name: Any, param: str) -> Change:
        """A message refers to a function. Raises RequestError if nothing declares the name."""
        if not is_text(name):
            raise bad_value(param, name, "the name of a tool")
        tool = self.described.get(name) or self.deferred.get(name)
        if tool:
            return self._add([tool])
        if name not in self.others:
            raise unresolved(name, param)
        return Change()

    def bring(self, tools: Any, param: str) -> Change:
        """A message brings tools of its own. They are known from here on, whatever their `defer_loading`
        says."""
        if not matches(SOME_OBJECTS, tools):
            raise bad_value(param, tools, "a list of tools")
        functions, others = self.read(tools, param)
        self.ignored += others
        return self._add(without_flag(tool)[0] for tool in functions)

    def _add(self, tools: Iterable[dict]) -> Change:
        new = {}
        texts = []
        for tool in tools:
            name = name_of(tool)
            if not is_same(self.described.get(name), tool):
                self.described[name] = self.found[name] = new[name] = tool
            elif name not in new:
                texts.append((AGAIN if name in self.removed else KNOWN).format(name))
            self.removed.discard(name)
        return Change([*new.values()], texts)

    def remove(self, name: Any, param: str) -> Change:
        """A message takes a function away. Raises RequestError if nothing declares the name."""
        if not is_text(name):
            raise bad_value(param, name, "the name of a tool")
        if name in self.described:
            self.removed.add(name)
            return Change((), [GONE.format(name)])
        if name not in self.deferred and name not in self.others:
            raise unresolved(name, param)
        return Change()

    def of_servers(self, tool: Mapping, param: str) -> list[str]:
        """The names of the tools to which a reference to a tool server, or to one of its tools, refers. If
        the server runs none, all such references have no effect."""
        label, name = tool.get("server_name"), tool.get("name")
        names = [served for served, server in self.served.items() if server == label]
        if "name" in tool and is_text(label) and is_text(name):
            names = [model_name(label, name)] if model_name(label, name) in names else []
        if not names and self.served:
            raise unresolved(f"{label}.{name}" if "name" in tool else label, param)
        return names


class ToolPart(NamedTuple):
    """A kind of part that changes the functions, in a message's content."""

    roles: Seq[str]  # of the messages that may have it
    read: Callable[[KnownFunctions, Mapping, str], Change]  # with where the part is


def read_reference(known: KnownFunctions, part: Mapping, param: str) -> Change:
    return known.refer(part.get("tool_name"), f"{param}.tool_name")


def read_change(known: KnownFunctions, part: Mapping, param: str, adds: bool) -> Change:
    """A block `tool_addition` or `tool_removal` of Messages."""
    sent = part.get("tool")
    tool: Mapping = sent if isinstance(sent, dict) else {}
    param = f"{param}.tool"
    kind = tool.get("type")
    change = known.refer if adds else known.remove
    if kind == "tool_reference":
        return change(tool.get("name"), f"{param}.name")
    if kind == "tool_definition" and adds:
        return known.bring([tool.get("definition")], f"{param}.definition")
    if kind in ("mcp_tool_reference", "mcp_toolset_reference"):
        changes = [change(name, param) for name in known.of_servers(tool, param)]
        return Change((), [text for each in changes for text in each.texts])
    definition = "a tool_definition, " if adds else ""
    raise bad_value(param, sent, f"a tool_reference, {definition}an mcp_tool_reference or an "
                                 "mcp_toolset_reference")


RESULTS = ("tool", "function")
SYSTEMS = ("system", "developer")
TOOL_PARTS = {
    "tool_reference": ToolPart(RESULTS, read_reference),
    "tool_addition": ToolPart(SYSTEMS, partial(read_change, adds=True)),
    "tool_removal": ToolPart(SYSTEMS, partial(read_change, adds=False))}


def taken_out(content: Any, role: str, known: KnownFunctions, param: str) -> tuple[Any, list[dict]]:
    """A message's content without the parts that change the functions, but with what the model is told of
    them, and the functions that it makes known. param: where the content is."""
    if not isinstance(content, list):
        return content, []
    left = []
    tools: list[dict] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        row = TOOL_PARTS.get(kind) if is_text(kind) else None
        if row is None or role not in row.roles:
            left.append(part)
            continue
        change = row.read(known, part, f"{param}[{index}]")
        tools += change.tools
        left += [{"type": "text", "text": text} for text in change.texts]
    return left, tools


def is_same(first: Any, second: Any) -> bool:
    try:
        return first == second
    except RecursionError:
        raise RequestError("tools are nested too deeply", param="tools") from None


def name_of(tool: Mapping) -> str:
    return tool["function"]["name"]


def without_flag(tool: dict) -> tuple[dict, bool]:
    """A function without what says that it becomes known later, and whether it does."""
    function = tool["function"]
    if DEFERRED not in tool and DEFERRED not in function:
        return tool, False
    is_deferred = tool.get(DEFERRED) is True or function.get(DEFERRED) is True
    bare = {name: value for name, value in tool.items() if name != DEFERRED}
    bare["function"] = {name: value for name, value in function.items() if name != DEFERRED}
    return bare, is_deferred


def unresolved(name: Any, param: str) -> RequestError:
    return RequestError(f"{param} refers to {shown(name)}, which is not in tools", code=UNRESOLVED,
                        param=param)


def chosen(functions: Functions, choice: ToolChoice, tool_format: str | None) -> Functions:
    """The functions that a choice leaves. Raises RequestError if the model cannot call any, or if the choice
    names one that is not known."""
    if choice.mode == "none":
        return Functions()
    able = functions.able
    if tool_format is None:
        if able:
            raise no_tools("tools")
        if choice.mode == "required":
            raise no_tools("tool_choice")
    allowed_tools(able, choice)
    if choice.names is None:
        return functions
    names = {*choice.names}
    return functions._replace(
        head=tuple(tool for tool in functions.head if name_of(tool) in names),
        found=tuple(tool for tool in functions.found if name_of(tool) in names))


def with_chosen(messages: Seq[Message], choice: ToolChoice) -> tuple[Message, ...]:
    """The messages, which make only those functions known that a choice leaves."""
    if choice.mode == "none":
        return without_tools(messages)
    if choice.names is None:
        return tuple(messages)
    names = {*choice.names}
    return tuple(message if not message.tools else replace(message, tools=tuple(
        tool for tool in message.tools if name_of(tool) in names)) for message in messages)


def without_tools(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The messages, which make no functions known."""
    return tuple(replace(message, tools=()) if message.tools else message for message in messages)
