"""Tools of type `mcp` in a response: which of the operator's a body asks for, and earlier calls of them.

A body names tool servers by the labels that they have in --mcp-config, and nothing else of them: no request
says what is started or which address is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from types import MappingProxyType
from typing import Any

from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import as_json, is_text
from chatlm.common.messages.tool_rounds import ApprovedCall, CallItem, PlannedTool
from chatlm.front.api.approval_ids import digest_in
from chatlm.front.api.dialect import NamedServer
from chatlm.front.api.fields import ToolChoice
from chatlm.front.api.found_tools import Functions
from chatlm.front.tools.rules import NOT_SHOWN, UNANSWERED, UNKNOWN_OUTCOME, denied, model_name

MCP_ITEMS = frozenset(("mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools"))
OPERATORS = ("server_url", "connector_id", "tunnel_id", "authorization", "headers")
NO_TOOLS: Mapping[str, bool] = MappingProxyType({})


# which tools

def is_mcp(tool: Mapping) -> bool:
    return tool.get("type") == "mcp"


def servers_of_response(body: Mapping) -> Iterator[NamedServer]:
    """The tool servers that the body of a response names."""
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and is_mcp(tool) and is_text(tool.get("server_label")):
            yield NamedServer(f"tools[{index}].server_label", tool["server_label"])


def own_entries(tools: Seq[Mapping], offered: Seq[Mapping] | None) -> list[Mapping]:
    """The entries of `tools` that ask for tools which the server itself runs: only these are offered with a
    type."""
    types = [one["type"] for one in offered or () if "type" in one]
    return [tool for tool in tools if tool.get("type") in types]


class McpTools:
    """The tools that entries of a body's `tools` ask for: those of type `mcp`, and those of types that the
    server itself runs."""

    def __init__(self, tools: Seq[Mapping], offered: Seq[Mapping]):
        """offered: the tools that this client may have of the servers that the body names."""
        self.labels: list[str] = []
        self.functions: list[dict] = []      # as in `tools` of Chat Completions
        self.planned: list[PlannedTool] = []
        self.operators: dict[str, bool] = {}  # name -> can calls of it be held to its parameters?
        for index, tool in enumerate(tools):
            if is_mcp(tool):
                self._add(tool, f"tools[{index}]", offered)
            for one in offered:
                if "type" in one and one["type"] == tool.get("type"):
                    self._offer(one, asks=False)
        self.first: tuple[str, ...] = ()  # names of those that are called before the model is asked

    def _add(self, tool: Mapping, name: str, offered: Seq[Mapping]):
        label = tool.get("server_label")
        if not is_text(label) or label in self.labels:
            raise bad_value(f"{name}.server_label", label, "the label of a tool server, each at most once")
        for member in OPERATORS:
            if tool.get(member):  # Vercel's package can't leave server_url out, but send an empty one
                raise invalid(f"{name}.{member}", f"{name}.{member}: tool servers are the operator's "
                              "(--mcp-config); leave it out, and name the server by its server_label alone")
        self.labels.append(label)
        own = [one for one in offered if one["label"] == label]
        allowed = ToolFilter(tool.get("allowed_tools"), f"{name}.allowed_tools", own)
        approvals = ApprovalRules(tool.get("require_approval"), f"{name}.require_approval", own)
        for one in own:
            if allowed.is_empty or allowed.matches(one):
                self._offer(one, approvals.asks(one))

    def _offer(self, one: Mapping, asks: bool):
        if one["name"] in self.operators:  # two entries ask for it
            return
        function = {"name": one["name"], "description": one["description"], "parameters": one["parameters"]}
        if one["strict"]:
            function["strict"] = True
        self.functions.append({"type": "function", "function": function})
        self.operators[one["name"]] = one["strict"]
        item = one.get("item")
        self.planned.append(PlannedTool(
            one["name"], one["label"], one["tool"], one["digest"], asks, item and call_item(item),
            one.get("first", ""), one.get("rounds", 0)))

    @property
    def labels_of_tools(self) -> dict[str, str]:
        """The labels of the tools' servers, by the tools' names."""
        return {tool.name: tool.label for tool in self.planned}

    def beside(self, functions: Functions) -> Functions:
        """These tools after the body's own functions. Raises RequestError for a function with the name of one
        of these tools."""
        own = {function["function"]["name"] for function in (*functions.head, *functions.found)}
        for tool in self.planned:
            if tool.name in own:
                raise invalid("tools", f"tools: the function {tool.name} has the name of the tool "
                              f"{tool.tool} of the server {tool.label}; call it otherwise")
        return functions._replace(head=(*functions.head, *self.functions))

    def choice(self, sent: Any, choice: ToolChoice) -> ToolChoice:
        """The tool choice of a body, which may choose tools of these servers. sent: as it was sent."""
        if not isinstance(sent, dict) or not self.planned and not self.labels:
            return choice
        if is_mcp(sent) and self.labels:
            return ToolChoice("required", self._chosen(sent))
        if own := self._own(sent):
            return ToolChoice("required", own)
        if sent.get("type") != "allowed_tools":
            return choice
        names = [*(choice.names or ())]
        for tool in sent["tools"]:
            names += self._chosen(tool) if is_mcp(tool) and self.labels else self._own(tool)
        return choice._replace(names=tuple(names))

    def _own(self, sent: Mapping) -> tuple[str, ...]:
        """The name of the tool that the server itself runs, of a type that a choice has."""
        return tuple(tool.name for tool in self.planned
                     if tool.label not in self.labels and tool.tool == sent.get("type"))

    def called_first(self, choice: ToolChoice, functions: Seq[dict], native: bool) -> ToolChoice:
        """Decide which tools are called before the model is asked: those that can be, if the choice requires
        one of them, or if the model never learned to call functions. Such a model is not offered them.
        Returns the choice that is left.

        functions: the body's own; native: has the model learned that?"""
        able = [tool.name for tool in self.planned if tool.first]
        names = [*(tool["function"]["name"] for tool in functions), *(tool.name for tool in self.planned)]
        allowed = [name for name in names if choice.names is None or name in choice.names]
        wanted = [name for name in able if name in allowed and choice.mode != "none"]
        if choice.mode == "required" and allowed and not {*allowed} - {*able} or not native:
            self.first = tuple(wanted)
        if self.first and choice.mode == "required":
            choice = choice._replace(mode="auto")
        if not native and able:
            self.functions = [each for each in self.functions if each["function"]["name"] not in able]
            if choice.names is not None:
                choice = choice._replace(names=tuple(name for name in choice.names if name not in able))
        return choice

    def _chosen(self, sent: Mapping) -> tuple[str, ...]:
        label = sent.get("server_label")
        if label not in self.labels:
            raise bad_value("tool_choice.server_label", label, "the server_label of one of the tools")
        name = sent.get("name")
        chosen = tuple(tool.name for tool in self.planned
                       if tool.label == label and name in (None, tool.tool))
        if not chosen:
            raise bad_value("tool_choice.name", name, f"a tool that the server {label} offers here")
        return chosen


class ToolFilter:
    """Chooses tools of a server: a list of names, or an object with `tool_names` and `read_only`."""

    def __init__(self, sent: Any, name: str, own: Seq[Mapping]):
        """own: the tools of the server."""
        self.is_empty = sent is None
        names = sent.get("tool_names") if isinstance(sent, dict) else sent
        read_only = sent.get("read_only") if isinstance(sent, dict) else None
        if (not isinstance(names, list | None) or not all(map(is_text, names or ()))
                or not isinstance(read_only, bool | None)):
            raise bad_value(name, sent, "a list of tools' names, or an object with tool_names, such a list, "
                                        "and read_only, true or false")
        known = [one["tool"] for one in own]
        if strange := [one for one in names or () if known and one not in known]:
            raise bad_value(name, strange[0], f"among {', '.join(known)}")
        self.names = names
        self.read_only = read_only

    def matches(self, one: Mapping) -> bool:
        is_named = self.names is None or one["tool"] in self.names
        return is_named and self.read_only in (None, one["read_only"])


class ApprovalRules:
    """Of which calls the client must approve: of all, unless the operator and the client both want it
    otherwise."""

    def __init__(self, sent: Any, name: str, own: Seq[Mapping]):
        if sent not in (None, "always", "never") and not isinstance(sent, dict):
            raise bad_value(name, sent, '"always", "never", or an object with filters `always` and `never`')
        filters = sent if isinstance(sent, dict) else {}
        self.never_asks = sent == "never"
        self.always = ToolFilter(filters.get("always"), f"{name}.always", own)
        self.never = ToolFilter(filters.get("never"), f"{name}.never", own)

    def asks(self, one: Mapping) -> bool:
        if one["ask"]:
            return True
        if not self.always.is_empty and self.always.matches(one):
            return True
        return not (self.never_asks or not self.never.is_empty and self.never.matches(one))


# earlier calls

class McpHistory:
    """Earlier calls of tools that the server has run, and what the client says of those that it was asked
    about. Such items become calls of functions and their outputs."""

    def __init__(self, before: Iterable, items: Any, tools: Seq[PlannedTool] = (), native: bool = True):
        """before: the items that a response continues. items: its input. tools: the server itself runs these;
        earlier calls of those that can be called first are not shown to a model that has not learned to call
        functions, which native says."""
        self.own = {tool.item.type: tool for tool in tools if tool.item}
        self.hidden = {kind for kind, tool in self.own.items() if tool.first and not native}
        sent = items if isinstance(items, list) else ()
        every = [*before, *sent]
        self.listed = set(texts_of(every, "mcp_list_tools", "server_label"))
        self.requests = {text(item, "id") for item in of_type(every, "mcp_approval_request")}
        self.called = set(texts_of(every, "mcp_call", "approval_request_id"))
        self.answers: dict[str, Mapping] = {}  # by the ids of the requests
        for item in of_type(every, "mcp_approval_response"):
            self._answer(item)
        self.newly_answered = set(texts_of(sent, "mcp_approval_response", "approval_request_id"))
        self.shown: set[str] = set()            # requests that were read
        self.approved: list[ApprovedCall] = []  # calls of these

    def _answer(self, item: Mapping):
        request = text(item, "approval_request_id")
        if request not in self.requests:
            raise bad_value("approval_request_id", request,
                            "the id of an item of type mcp_approval_request before it")
        if not isinstance(item.get("approve"), bool):
            raise bad_value("approve", item.get("approve"), "true or false")
        if request in self.answers:
            raise invalid("approval_request_id", f"the approval request {shown(request)} is answered twice")
        self.answers[request] = item

    def items(self, item: Any) -> Iterator[Any]:
        """The items that the model is shown for one."""
        kind = item.get("type") if isinstance(item, dict) else None
        if is_text(kind) and kind in self.own:
            if kind not in self.hidden:
                yield from own_call_items(item, self.own[kind])
        elif kind == "mcp_call":
            yield from call_items(item, text(item, "id"), output_of(item))
        elif kind == "mcp_approval_request":
            yield from self._request_items(item)
        elif not is_text(kind) or kind not in MCP_ITEMS:
            yield item

    def _request_items(self, item: Mapping) -> Iterator[dict]:
        name = text(item, "id")
        if name in self.called or name in self.shown:  # the call is an item of its own, or was sent twice
            return
        self.shown.add(name)
        answer = self.answers.get(name)
        if answer is None:
            output = UNANSWERED
        elif not answer["approve"]:
            output = denied(answer["reason"] if is_text(answer.get("reason")) else "")
        elif name not in self.newly_answered:  # an earlier response began it and did not end
            output = UNKNOWN_OUTCOME
        else:
            output = ""
            tool = model_name(text(item, "server_label"), text(item, "name"))
            self.approved.append(ApprovedCall(name, tool, text(item, "arguments"), digest_in(name)))
        yield from call_items(item, name, output)


def id_of_approved_call(approval_id: str) -> str:
    """The id of the item of a call: it says of which approval request the call was, so that a kept one is
    found."""
    return f"mcp_{hashlib.sha256(approval_id.encode('utf-8', 'replace')).hexdigest()[:48]}"


def of_type(items: Iterable, kind: str) -> Iterator[Mapping]:
    return (item for item in items if isinstance(item, dict) and item.get("type") == kind)


def texts_of(items: Iterable, kind: str, member: str) -> Iterator[str]:
    """A member of the items of a type, where it is a text."""
    return filter(is_text, (item.get(member) for item in of_type(items, kind)))


def call_items(item: Mapping, call_id: str, output: str) -> Iterator[dict]:
    """A call as the call of a function, and its output."""
    name = model_name(text(item, "server_label"), text(item, "name"))
    yield {"type": "function_call", "call_id": call_id, "name": name, "arguments": text(item, "arguments")}
    yield {"type": "function_call_output", "call_id": call_id, "output": output}


def own_call_items(item: Mapping, tool: PlannedTool) -> Iterator[dict]:
    """A call of a tool that the server itself runs as the call of a function, and its output: the texts of
    what was found, if the item has it."""
    assert tool.item
    name = item.get("id")
    call_id = name if is_text(name) else f"{tool.item.prefix}earlier"
    arguments = {member: as_texts(item.get(member)) for member in tool.item.members}
    found = [each for member in tool.item.asked_for for each in as_objects(item.get(member))]
    texts = [f"{each['filename']}\n{each['text']}" if is_text(each.get("filename")) else each["text"]
             for each in found if is_text(each.get("text"))]
    yield {"type": "function_call", "call_id": call_id, "name": tool.name, "arguments": as_json(arguments)}
    yield {"type": "function_call_output", "call_id": call_id, "output": "\n\n".join(texts) or NOT_SHOWN}


def as_texts(value: Any) -> list[str]:
    return [each for each in value if is_text(each)] if isinstance(value, list) else []


def as_objects(value: Any) -> list[dict]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def call_item(offered: Mapping) -> CallItem:
    """Its fields as JSON become lists."""
    return CallItem(offered["type"], offered["prefix"], offered["runs"], tuple(offered["members"]),
                    tuple(offered["asked_for"]))


def text(item: Mapping, member: str) -> str:
    """A member of an item that must be a text."""
    value = item.get(member)
    if not is_text(value):
        raise bad_value(f"{member} of an item of type {item.get('type')}", value, "a string")
    return value


def output_of(item: Mapping) -> str:
    """What the model was told of a call: its output, else its error."""
    output = item.get("output")
    if is_text(output):
        return output
    error = item.get("error")
    if is_text(error):
        return error
    if not isinstance(error, dict):
        return UNKNOWN_OUTCOME
    content = error.get("content")
    texts = [part["text"] for part in (content if isinstance(content, list) else ())
             if isinstance(part, dict) and is_text(part.get("text"))]
    if is_text(error.get("message")):
        texts.append(error["message"])
    return "\n".join(texts)


def refuse_in_batches() -> RequestError:
    return RequestError("a batch can't run tools: a line that is tried twice would act twice", param="tools",
                        code="not_available")
