"""Conversations in the page's export format (static/tree.js)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence as Seq
from contextlib import suppress
from functools import partial
from pathlib import Path

from chatlm.common.config import FLAGS, LIMITS
from chatlm.common.jsontext import is_text
from chatlm.common.log import utc
from chatlm.common.messages.requests import SAMPLING_FLAGS, Message
from chatlm.common.new_files import beside
from chatlm.common.text.calculations import with_calls, with_names
from chatlm.front.api.message_readers import earlier_arguments
from chatlm.front.tools.rules import PICTURES_OF_RESULTS, SEEN_PICTURES, UNSEEN_PICTURES
from chatlm.terminal.calculator import calls_of_file, joined_calls, marked


CHAT_FORMAT = {"format": "chat_server chats", "version": 2}
PARAMETERS = {flag.field: flag.parse for flag in FLAGS
              if flag.parse and flag.field in (*SAMPLING_FLAGS, "max_tokens")}
SETTABLE = (*PARAMETERS, "stop")


def now_ms() -> int:
    return int(time.time() * 1e3)


def title_of(text: str) -> str:
    line = next(filter(None, (re.sub(r"^[#>*\s-]+|`", "", line).strip() for line in text.split("\n"))), "")
    return line if len(line) <= 60 else re.sub(r"\s+\S*$", "", line[:60]) + "…"


def known_parameters(parameters) -> dict:
    """The parameters of a file that are known and have valid values."""
    parameters = parameters if isinstance(parameters, dict) else {}
    known = {}
    for name, parse in PARAMETERS.items():
        with suppress(ValueError, TypeError, argparse.ArgumentTypeError):
            if not isinstance(value := parameters.get(name), (dict, list, bool)):
                known[name] = parse(str(value))
    stop = parameters.get("stop")
    if isinstance(stop, list) and stop and all(map(is_text, stop)):
        known["stop"] = stop[:LIMITS.stop_strings]
    return known


def pictures_of(node: Mapping) -> list[str]:
    """The data URIs of a message's pictures; nothing else that a file may have there."""
    listed = node.get("pictures")
    return [each["picture"] for each in (listed if isinstance(listed, list) else ())
            if isinstance(each, dict) and is_text(each.get("picture"))]


def calls_in(node: Mapping) -> list[dict]:
    """The calculator's calls in an answer."""
    return calls_of_file(node.get("calculator"), node["content"]) if node["role"] == "assistant" else []


def answered_calls(node: Mapping) -> list[dict]:
    """The calls of functions in an answer, if all of them have results; nothing else that a file may have."""
    calls = node.get("calls")
    if node["role"] != "assistant" or not isinstance(calls, list):
        return []
    whole = [call for call in calls if isinstance(call, dict) and all(
        is_text(call.get(name)) for name in ("id", "name", "arguments", "result"))]
    return whole if len(whole) == len(calls) else []


def images_of(call: Mapping) -> list[str]:
    """The data URIs of the pictures in a call's result; nothing else that a file may have there."""
    listed = call.get("images")
    return [f"data:{each['mime_type']};base64,{each['data']}"
            for each in (listed if isinstance(listed, list) else ())
            if isinstance(each, dict) and is_text(each.get("mime_type")) and is_text(each.get("data"))]


def pictured_calls(nodes: Seq[Mapping]) -> set[int]:
    """The calls whose results' pictures are sent, by id(): the newest that fit into a request."""
    left = PICTURES_OF_RESULTS
    found = set()
    for node in reversed(nodes):
        for call in reversed(answered_calls(node)):
            pictures = len(images_of(call))
            left -= pictures
            if pictures and left >= 0:
                found.add(id(call))
    return found


def result_messages(calls: Seq[Mapping], pictured: Collection[int]) -> list[Message]:
    """The results of an answer's calls. Pictures follow in a message of the user: no other place is known to
    every chat template."""
    messages = []
    pictures = []
    for call in calls:
        text = call["result"]
        if id(call) in pictured:
            pictures += images_of(call)
        elif images_of(call):
            text += f"\n{UNSEEN_PICTURES}"
        messages.append(Message("tool", text, {"tool_call_id": call["id"], "name": call["name"]}))
    if pictures:
        messages.append(Message("user", SEEN_PICTURES, {"pictures": pictures}))
    return messages


class Conversation:
    """A chat's tree of messages. The path to `leaf` is current; other answers and versions branch off."""

    def __init__(self, system: str = "", parameters: Mapping | None = None, fields=None):
        self.fields = {"title": "", "created": now_ms(), "pinned": False, **(fields or {})}
        self.system = system
        self.parameters = dict(parameters or {})
        self.nodes: dict[str, dict] = {}
        self.leaf: str | None = None

    def path(self) -> list[dict]:
        """The nodes from the first message to the leaf; a file's parents may form a cycle."""
        path = {}
        node = self.nodes.get(self.leaf or "")
        while node and node["id"] not in path:
            path[node["id"]] = node
            node = self.nodes.get(node["parent"])
        return list(path.values())[::-1]

    def add(self, node: dict) -> dict:
        node = {"id": secrets.token_hex(16), "created": now_ms()} | node
        self.nodes[node["id"]] = node
        self.leaf = node["id"]
        self.fields["title"] = self.title or title_of(node["content"])
        return node

    @property
    def title(self) -> str:
        return str(self.fields["title"])

    def last(self, role: str) -> dict | None:
        return next((node for node in reversed(self.path()) if node["role"] == role), None)

    def messages(self, sees: bool = True) -> tuple[Message, ...]:
        """The messages to send. Leaves out empty ones, and joins adjacent ones of the same role, because
        templates want roles to alternate. `more` has pictures as data URIs, and the calculator's calls.

        sees: whether the model is shown the pictures in results of tools."""
        messages = [Message("system", self.system)] if self.system.strip() else []
        said = [node for node in self.path()
                if node["content"] or pictures_of(node) or calls_in(node) or answered_calls(node)]
        # an answer with calls ends its group: the results follow it
        ends = itertools.accumulate((bool(answered_calls(node)) for node in said[:-1]), initial=0)
        pictured = pictured_calls(said) if sees else set()
        groups = itertools.groupby(zip(said, ends), key=lambda pair: (pair[0]["role"], pair[1]))
        for (role, _), group in groups:
            nodes = [node for node, _ in group]
            pictures = []
            for node in nodes:
                pictures += pictures_of(node)
            spoken = [node for node in nodes if node["content"] or calls_in(node)]
            texts = [node["content"] for node in spoken]
            more = with_calls({"pictures": pictures} if pictures else {},
                              joined_calls(texts, [*map(calls_in, spoken)], "\n\n"))
            results = answered_calls(nodes[-1])
            if results:
                more["tool_calls"] = [
                    {"id": call["id"], "type": "function",
                     "function": {"name": call["name"], "arguments": earlier_arguments(call["arguments"])}}
                    for call in results]
            messages.append(Message(role, "\n\n".join(texts), more or None))
            messages += result_messages(results, pictured)
        return tuple(messages)

    def last_text(self) -> str:
        """The user's last message and what follows it, for a completion model."""
        texts = [with_names(node["content"], calls_in(node)) for node in self.path()]
        begins = [index for index, node in enumerate(self.path()) if node["role"] == "user"]
        return "".join(texts[begins[-1] if begins else 0:])

    def exported(self) -> dict:
        chat = {**self.fields, "updated": now_ms(), "system": self.system, "parameters": self.parameters,
                "leaf": self.leaf or "", "nodes": list(self.nodes.values())}
        return {**CHAT_FORMAT, "exported": utc(), "conversations": [chat]}

    def write(self, path: Path, mode: int = 0o666):
        part = beside(path, "part")
        text = json.dumps(self.exported(), ensure_ascii=False, indent=2)
        try:
            with open(part, "x", encoding="utf-8", opener=partial(os.open, mode=mode)) as file:
                file.write(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """The lines that a terminal shows."""
        return [f"> {node['content']}" if node["role"] == "user" else
                marked(node["content"], calls_in(node)) + "\n" for node in self.path()]


def read_chats(text: str) -> list[Conversation]:
    """The conversations in an exported file, or in a list of messages. ValueError if it is neither."""
    try:
        file = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    file = {"messages": file} if isinstance(file, list) else file
    chats = file.get("conversations", [file]) if isinstance(file, dict) else None
    chats = chats if isinstance(chats, list) else [None]
    return [read_chat(chat, index) for index, chat in enumerate(chats, 1)]


def read_chat(chat, index: int) -> Conversation:
    chat = dict(chat) if isinstance(chat, dict) else {}
    listed = chat.pop("nodes", chat.pop("messages", None))
    leaf = chat.pop("leaf", None)
    if not isinstance(listed, list):
        raise ValueError('it has no list "messages" of {role, content}, and no "nodes"')
    old = chat.pop("settings", None)  # format version 1
    system = chat.pop("system", old.get("system") if isinstance(old, dict) else None)
    parameters = known_parameters(chat.pop("parameters", old))
    conversation = Conversation(system if is_text(system) else "", parameters, chat)
    for number, message in enumerate(listed, 1):
        message = {"parent": conversation.leaf, **message} if isinstance(message, dict) else {}
        message["content"] = text = message.get("content") or ""
        if message.get("role") not in ("user", "assistant", "system") or not is_text(text):
            raise ValueError(f"message {number} of chat {index} lacks a role or text")
        if message["role"] == "system":
            conversation.system = text
        elif is_text(message.get("id", "")) and message.get("id") not in conversation.nodes:
            conversation.add(message if is_text(message["parent"]) else message | {"parent": None})
        else:
            raise ValueError(f"message {number} of chat {index} has no id, or a duplicate one")
    conversation.leaf = leaf if is_text(leaf) and leaf in conversation.nodes else conversation.leaf
    return conversation
