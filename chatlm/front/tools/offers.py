"""What tool servers offer to models: each tool with what is computed once when its server's list changes, and
the shares of the servers in what a model can be offered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import Any, TYPE_CHECKING

from chatlm.common.jsontext import as_json, dump
from chatlm.front.tools.client import Tool
from chatlm.front.tools.config import ServerConfig
from chatlm.front.tools.rules import model_name

if TYPE_CHECKING:
    from chatlm.front.tools.server import ToolServer

MOST_TOOLS = 128
OFFERED_BYTES = 256 << 10  # of their names, descriptions and schemas, as JSON
NAMED = 5               # tools that a notice names
NO_ROOM = (f"the tools of all servers together are at most {MOST_TOOLS}, with {OFFERED_BYTES:,} bytes; "
           "hide some with disabledTools")


@dataclass(frozen=True)
class OfferedTool:
    """A tool as a model and a page see it."""

    name: str  # for the model
    server: ToolServer
    tool: Tool
    ask: bool      # whether a person must approve each call
    digest: str    # of what a person approves: another description is another tool
    packed: bytes  # `function`, as JSON

    @classmethod
    def of(cls, server: ToolServer, tool: Tool) -> OfferedTool:
        label = server.config.label
        said = as_json([label, tool.name, tool.title, tool.description, tool.parameters, tool.annotations])
        digest = hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]
        name = model_name(label, tool.name)
        return cls(name, server, tool, asks(server.config, tool), digest, dump(function_of(name, tool)))

    @property
    def label(self) -> str:
        return self.server.config.label

    @property
    def function(self) -> dict[str, Any]:
        """The function as in `tools` of a request."""
        return function_of(self.name, self.tool)

    def with_members(self, members: Mapping[str, Any]) -> bytes:
        """The function with more members, as JSON. Its schema is not written again."""
        return b"%s, %s" % (self.packed[:-1], dump(members)[1:])


def function_of(name: str, tool: Tool) -> dict[str, Any]:
    return {"name": name, "description": tool.description or tool.title, "parameters": tool.parameters}


def asks(config: ServerConfig, tool: Tool) -> bool:
    """Whether a person must approve a call. What a tool says of itself counts only if the operator trusts the
    server."""
    if {"*", tool.name} & config.allowed:
        return False
    return not (config.trusts_read_only and tool.only_reads)


# shares

def shares(wanted: Seq[int], most: int) -> list[int]:
    """How much each gets of `most`: what it wants, or an equal share of what those leave that want less."""
    found = [0] * len(wanted)
    left = most
    smallest_first = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for place, index in enumerate(smallest_first):
        found[index] = min(wanted[index], left // (len(wanted) - place))
        left -= found[index]
    return found


def chosen(lists: Seq[Seq[OfferedTool]]) -> tuple[list[OfferedTool], list[list[str]]]:
    """The tools that a model is offered of several servers, and of each server the names of those for which
    there is no room: a server with many or long tools takes none away from others."""
    counts = shares([len(tools) for tools in lists], MOST_TOOLS)
    within = [tools[:count] for tools, count in zip(lists, counts)]
    rooms = shares([sum(len(tool.packed) for tool in tools) for tools in within], OFFERED_BYTES)
    offered = []
    left_out: list[list[str]] = []
    for tools, own, room in zip(lists, within, rooms):
        taken = set()
        for tool in own:
            if len(tool.packed) <= room:
                room -= len(tool.packed)
                offered.append(tool)
                taken.add(tool.name)
        left_out.append([tool.tool.name for tool in tools if tool.name not in taken])
    return offered, left_out


def notices_of(no_room: Seq[str], left_out: Mapping[str, str], note: str) -> list[str]:
    """What the operator and users should know of a server's list. left_out: tools that can't be used, with
    the reason."""
    found = [note] if note else []
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    if no_room:
        by_reason[NO_ROOM] = [*no_room]
    for why, names in by_reason.items():
        noun = "tool is" if len(names) == 1 else "tools are"
        found.append(f"{len(names)} {noun} left out ({some(names)}): {why}")
    return found


def some(names: Seq[str]) -> str:
    """The first few names."""
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])


def sorted_by_name(tools: Iterable[OfferedTool]) -> dict[str, OfferedTool]:
    """Tools by their names for a model, sorted: prompts then begin alike."""
    return {tool.name: tool for tool in sorted(tools, key=lambda one: one.name)}
