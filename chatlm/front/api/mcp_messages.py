"""Tool servers in Anthropic's Messages: which of the operator's a body asks for, and earlier calls of them.

As in Responses (mcp_tools.py), a body names them by the labels that they have in --mcp-config. This API has
no approvals: only tools that run without asking anybody are offered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as Seq
from itertools import groupby
from typing import Any, NamedTuple

from chatlm.common.errors import bad_value, invalid, shown
from chatlm.common.jsontext import is_text
from chatlm.front.api.dialect import NamedServer
from chatlm.front.api.fields import ToolChoice
from chatlm.front.api.mcp_tools import McpTools, own_entries, refuse_in_batches, text, texts_of
from chatlm.front.tools.rules import UNKNOWN_OUTCOME, model_name

TOOLSET = "mcp_toolset"
MCP_BLOCKS = frozenset(("mcp_tool_use", "mcp_tool_result"))


# which tools

def servers_of_message(body: Mapping) -> Iterator[NamedServer]:
    """The tool servers that the body of a message names."""
    servers = body.get("mcp_servers")
    for index, server in enumerate(servers if isinstance(servers, list) else ()):
        if isinstance(server, dict) and is_text(server.get("name")):
            url = server.get("url")
            yield NamedServer(f"mcp_servers[{index}]", server["name"], url if is_text(url) else "", True)


def tools_of_message(values: Mapping, offered: Seq[Mapping] | None) -> McpTools:
    """The tools that a body asks for with `mcp_servers`, and with `mcp_toolset` or, as older clients do, with
    `tool_configuration`. offered: as for McpTools; None: nothing is run for it."""
    servers = values.get("mcp_servers", ())
    toolsets = read_toolsets(values.get("tools", ()))
    tools = []
    names: list[str] = []
    for index, server in enumerate(servers):
        param = f"mcp_servers[{index}]"
        name = read_server(server, param, names)
        names.append(name)
        if offered is None:
            raise refuse_in_batches()
        toolset = toolsets.get(name)
        if toolset and server.get("tool_configuration") is not None:
            raise invalid(f"{param}.tool_configuration", f"{param}.tool_configuration and the {TOOLSET} "
                          f"{toolset.param} exclude each other")
        if toolsets and not toolset:
            raise invalid(f"{param}.name", f"{param}: the tools have no {TOOLSET} for the server {name}")
        enabled = toolset or read_configuration(
            server.get("tool_configuration"), f"{param}.tool_configuration")
        own = [one for one in offered if one["label"] == name]
        tools.append({"type": "mcp", "server_label": name, "allowed_tools": enabled.names(name, own),
                      "require_approval": "never"})
    for name, toolset in toolsets.items():
        if name not in names:
            raise bad_value(f"{toolset.param}.mcp_server_name", name, "the name of one of mcp_servers")
    return McpTools([*tools, *own_entries(values.get("tools", ()), offered)], offered or ())


def read_server(server: Mapping, param: str, before: Seq[str]) -> str:
    """The name of a server, which was checked. before: those of the servers before it."""
    if server.get("type") != "url":
        raise bad_value(f"{param}.type", server.get("type"), '"url"')
    name = server.get("name")
    if not is_text(name) or name in before:
        raise bad_value(f"{param}.name", name, "the label of a tool server, each at most once")
    if not isinstance(server.get("url"), str | None):
        raise bad_value(f"{param}.url", server["url"], "a string")
    if server.get("authorization_token"):
        raise invalid(f"{param}.authorization_token", f"{param}.authorization_token: how one signs in at a "
                      "tool server is the operator's (--mcp-config); leave it out")
    return name


class Enabled(NamedTuple):
    """Which tools of a server a body enables."""

    param: str              # where it says so
    named: dict[str, bool]  # tools of which it says whether they are enabled
    default: bool           # whether the others are

    def names(self, label: str, own: Seq[Mapping]) -> list[str]:
        """The tools that are enabled, of those that the client may have of the server. Raises RequestError
        for a tool that it names and can't have, and if no tool at all can be had."""
        known = [one["tool"] for one in own]
        free = [one["tool"] for one in own if not one["ask"]]
        for name, enabled in self.named.items():
            if name not in known:
                raise invalid(self.param, f"{self.param}: {shown(name)} is no tool of {label}; here it has "
                              f"{', '.join(known) or 'none'}")
            if enabled and name not in free:
                raise invalid(self.param, f"{self.param}: a person must approve of each call of {name}, and "
                              "Messages has no approvals; the operator can allow it (alwaysAllow)")
        if self.default and not free:
            raise invalid(self.param, f"{self.param}: no tool of the server {label} runs without an "
                          "approval, and Messages has none; the operator can allow tools (alwaysAllow)")
        return [name for name in free if self.named.get(name, self.default)]


def read_toolsets(tools: Seq[Mapping]) -> dict[str, Enabled]:
    """The toolsets among the tools of a body, by the names of their servers."""
    toolsets = {}
    for index, tool in enumerate(tools):
        if tool.get("type") != TOOLSET:
            continue
        param = f"tools[{index}]"
        name = tool.get("mcp_server_name")
        if not is_text(name) or name in toolsets:
            raise bad_value(f"{param}.mcp_server_name", name, "the name of one of mcp_servers, each at most "
                                                              "once")
        configs = tool.get("configs")
        if not isinstance(configs, dict | None):
            raise bad_value(f"{param}.configs", configs, "an object with an object for each tool")
        default = read_enabled(tool.get("default_config"), f"{param}.default_config", True)
        named = {one: read_enabled(config, f"{param}.configs.{one}", default)
                 for one, config in (configs or {}).items()}
        toolsets[name] = Enabled(param, named, default)
    return toolsets


def read_enabled(config: Any, param: str, default: bool) -> bool:
    enabled = config.get("enabled") if isinstance(config, dict) else None
    if not isinstance(config, dict | None) or not isinstance(enabled, bool | None):
        raise bad_value(param, config, "an object whose `enabled` is true or false")
    return default if enabled is None else enabled


def read_configuration(config: Any, param: str) -> Enabled:
    """A server's `tool_configuration`, the older form."""
    enabled = read_enabled(config, param, True)
    names = config.get("allowed_tools") if config else None
    if not isinstance(names, list | None) or not all(map(is_text, names or ())):
        raise bad_value(f"{param}.allowed_tools", names, "a list of tools' names")
    if names is None or not enabled:
        return Enabled(param, {}, enabled)
    return Enabled(f"{param}.allowed_tools", dict.fromkeys(names, True), False)


def choice_among(mcp: McpTools, functions: Seq[Mapping], choice: ToolChoice) -> ToolChoice:
    """The tool choice of a body, which may name a tool as its server does."""
    own = {function["function"]["name"] for function in functions}
    names = []
    for name in choice.names or ():
        found = [tool.name for tool in mcp.planned if tool.tool == name]
        if len(found) > 1 and name not in own:
            raise bad_value("tool_choice.name", name, f"one of {', '.join(found)}")
        names.append(found[0] if found and name not in own else name)
    return choice._replace(names=tuple(names)) if names else choice


# earlier calls

class RoleBlocks(NamedTuple):
    """Blocks of a message that belong to one role."""

    role: str
    blocks: list[Any]
    first: int  # the index of the first one in the message


def parts_of(role: str, blocks: Seq[Any], param: str) -> list[RoleBlocks]:
    """The blocks of a message, as the model has seen them. The calls of tools that the server ran, and their
    results, become those of functions: the results are the user's. param: the message, for errors."""
    if not any(kind_of(block) in MCP_BLOCKS for block in blocks):
        return [RoleBlocks(role, [*blocks], 0)]
    if role != "assistant":
        raise invalid(param, f"{param}: mcp_tool_use and mcp_tool_result are blocks of the assistant")
    parts = []
    answered = {*texts_of(blocks, "mcp_tool_result", "tool_use_id")}
    called = set[str]()  # that have no result yet
    for are_results, group in groupby(enumerate(blocks), lambda each: kind_of(each[1]) == "mcp_tool_result"):
        pairs = [*group]
        part = RoleBlocks("user" if are_results else role, [], pairs[0][0])
        parts.append(part)
        lost = []
        for index, block in pairs:
            if are_results:
                call = block.get("tool_use_id")
                if not is_text(call) or call not in called:
                    raise bad_value(f"{param}.content[{index}].tool_use_id", call,
                                    "the id of a block mcp_tool_use before it, once")
                called.remove(call)
                block = {**block, "type": "tool_result"}
            elif kind_of(block) == "mcp_tool_use":
                block = call_block(block)
                called.add(block["id"])
                if block["id"] not in answered:
                    lost.append(block["id"])
            part.blocks.append(block)
        if lost:
            parts.append(RoleBlocks("user", [{"type": "tool_result", "tool_use_id": name,
                                              "content": UNKNOWN_OUTCOME} for name in lost], part.first))
    return parts


def kind_of(block: Any) -> str:
    """The type of a block; "" if it has none that is a text."""
    kind = block.get("type") if isinstance(block, dict) else None
    return kind if is_text(kind) else ""


def call_block(block: Mapping) -> dict:
    """A call of a tool that the server ran, as the call of a function."""
    name = model_name(text(block, "server_name"), text(block, "name"))
    return {"type": "tool_use", "id": text(block, "id"), "name": name, "input": block.get("input")}
