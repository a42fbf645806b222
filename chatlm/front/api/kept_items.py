"""Items of responses and conversations as they are kept: what the server understood of each, and no more."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import as_json, dump, is_number, is_text, whole_unicode
from chatlm.common.messages.protocol import KeptItem
from chatlm.front.api.earlier_calculations import read_calculations
from chatlm.front.api.encode import calculator_member
from chatlm.front.api.mcp_tools import text
from chatlm.front.api.picture_parts import picture_in

if TYPE_CHECKING:
    from chatlm.common.messages.tool_rounds import CallItem


PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_",
            "mcp_call": "mcp_", "mcp_approval_request": "mcpr_", "mcp_approval_response": "mcpa_",
            "mcp_list_tools": "mcpl_", "file_search_call": "fs_",
            "tool_search_call": "tsc_", "tool_search_output": "tso_", "additional_tools": "at_"}
TOOL_MEMBERS = {  # type -> what is kept of an item about tools, as it was sent
    "mcp_call": ("server_label", "name", "arguments", "status", "approval_request_id", "output", "error"),
    "mcp_list_tools": ("server_label", "tools", "error"),
    "file_search_call": ("status", "queries", "results"),
    "mcp_approval_request": ("server_label", "name", "arguments"),
    "mcp_approval_response": ("approval_request_id", "approve", "reason"),
    "tool_search_call": ("status", "call_id", "execution", "arguments"),
    "tool_search_output": ("status", "call_id", "execution", "tools"),
    "additional_tools": ("role", "tools")}
NAMING = ("server_label", "name", "arguments")
TEXTS = {"mcp_call": NAMING, "mcp_approval_request": ("id", *NAMING)}  # what of these must be texts
# What the server itself makes of its calls of tools: what clients put back of it is kept, though a model that
# is not offered these tools is not shown it
MADE = frozenset(("mcp_call", "mcp_list_tools", "mcp_approval_request", "file_search_call"))
CITATION = {"type": str, "file_id": str, "filename": str, "index": int, "passage": int}
PHASES = "commentary", "final_answer"  # of a message of the assistant
STATUSES = "completed", "incomplete", "in_progress"
AN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def kept_items(items: Iterable[Mapping], own_ids: bool = False,
               own: Iterable[CallItem] = ()) -> tuple[KeptItem, ...]:
    """Items that response_messages has read, as they are kept. own_ids: an item that has an id keeps it. own:
    those of tools that the server itself runs.

    A request for an approval always keeps its id, to which the answer refers."""
    kept = []
    of_tools = {item.type: item for item in own}
    prefixes = PREFIXES | {kind: item.prefix for kind, item in of_tools.items()}
    for item in items:
        tool = of_tools.get(item.get("type") or "")
        whole = members_of_call(item, tool) if tool else understood_members(item)
        name = prefixes[whole["type"]] + secrets.token_hex(12)
        sent = item.get("id")
        keeps_id = own_ids or whole["type"] == "mcp_approval_request"
        if keeps_id and is_text(sent) and AN_ID.fullmatch(sent):
            name = sent
        try:
            kept.append(KeptItem(name, dump(whole)))
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None
    return tuple(kept)


def members_of_call(item: Mapping, tool: CallItem) -> dict:
    """The members of an item of a tool that the server itself runs."""
    status = item.get("status")
    return {"type": tool.type, "status": status if status in (*STATUSES, "failed") else "completed",
            **{name: item.get(name) for name in (*tool.members, *tool.asked_for)}}


def understood_members(item: Mapping) -> dict:
    """The members of an item that response_messages reads, in the form in which the API shows items."""
    kind = item.get("type") or "message"
    status = item.get("status")
    if kind in TOOL_MEMBERS:
        for member in TEXTS.get(kind, ()):
            text(item, member)
        return {"type": kind, **{member: item[member] for member in TOOL_MEMBERS[kind] if member in item}}
    kept = {"type": kind, "status": status if status in STATUSES else "completed"}
    if kind == "message":
        text_type = "output_text" if item["role"] == "assistant" else "input_text"
        phase = {"phase": item["phase"]} if item.get("phase") in PHASES else {}
        return kept | {"role": item["role"], "content": parts(item.get("content"), text_type), **phase}
    if kind == "reasoning":
        summary = item.get("summary")
        content = item.get("content")
        return kept | {"summary": [] if content else parts(summary, "summary_text"),
                       "content": parts(content, "reasoning_text")}
    call_id = item.get("call_id")
    call = {"call_id": str(call_id)} if is_text(call_id) or is_number(call_id) else {}
    if kind == "function_call":
        arguments = item.get("arguments")
        if not is_text(arguments):
            arguments = as_json({} if arguments is None else arguments)
        return kept | call | {"name": item["name"], "arguments": arguments}
    output = item.get("output") or ""
    return kept | call | {"output": parts(output, "") if isinstance(output, list) else whole_unicode(output)}


def parts(content: Any, text_type: str) -> list[dict]:
    """The parts of a content, which may be one text."""
    if is_text(content):
        content = [{"type": text_type, "text": content}]
    return [understood_part(part, text_type) for part in content or ()]


def understood_part(part: Mapping, text_type: str) -> dict:
    kind = part["type"]
    if picture_in(part):
        return {"type": kind, "picture": part["picture"]}
    member = "refusal" if kind == "refusal" else "text"
    said = whole_unicode(part.get(member) or "")
    more: dict = {}
    if kind == "output_text":
        given = part.get("annotations")
        more = {"annotations": [*filter(is_citation, given)] if isinstance(given, list) else []}
        if part.get("logprobs") == []:  # of an answer whose request asked for none
            more["logprobs"] = []
    is_said = text_type == "output_text"  # by the assistant
    calls = read_calculations(part.get("calculator"), said, "calculator") if is_said else []
    return {"type": kind, member: said, **more, **calculator_member(calls)}


def is_citation(value: Any) -> bool:
    """Is it one as the server itself makes them?"""
    return isinstance(value, dict) and value.keys() <= CITATION.keys() and all(
        isinstance(value.get(name), kind) for name, kind in CITATION.items() if name in value or kind is str)
