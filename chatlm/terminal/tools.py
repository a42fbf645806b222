"""The tools of `chat`: those of --mcp-config, which run here, or those of a server at --url."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence as Seq
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError, shown
from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import Message
from chatlm.front.aio import interruptible
from chatlm.front.api.enforcement import why_unenforced
from chatlm.front.api.readers import (
    conversation_tokens, schemas_of_loose_calls, strict_grammars, types_of_parameters)
from chatlm.front.tools.results import ToolPicture, ToolResult
from chatlm.front.tools.rules import CANCELLED, CHANGED, why_not_run
from chatlm.front.tools.toolbox import Toolbox
from chatlm.terminal.remote import RemotePool
from chatlm.terminal.remote_streams import refusal, strict_object, whole_body

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Request
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.terminal.remote import Pool


SHORT = (Message("user", "Hi"),)  # a prompt in which tools are counted


@dataclass(frozen=True)
class ChatTool:
    """A tool as the user and the model see it."""

    name: str         # for the model
    server: str
    description: str
    parameters: Mapping
    ask: bool         # whether the user must approve each call
    digest: str
    enforced: bool    # whether calls are held to the parameters

    @property
    def function(self) -> dict[str, Any]:
        """The function as in `tools` of a request."""
        strict = {"strict": True} if self.enforced else {}
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": self.parameters, **strict}}


class OwnTools:
    """The tools of --mcp-config, which run beside this program."""

    def __init__(self, toolbox: Toolbox, pool: WorkerPool):
        self.toolbox = toolbox
        self.pool = pool

    async def listed(self) -> tuple[list[ChatTool], list[str]]:
        """The tools, and a line about each server that does not run."""
        await self.toolbox.refresh()
        tokenizer = self.pool.tokenizer
        tool_format = tokenizer.tool_format if tokenizer else None
        tools = []
        for offered in self.toolbox.offered().values():
            why = await why_unenforced(offered.function, tool_format, self.pool.admission)
            tools.append(ChatTool(offered.name, offered.label, offered.tool.description,
                                  offered.tool.parameters, offered.ask, offered.digest, not why))
        troubles = []
        for server in self.toolbox.servers:
            said = [*([f"{server.state.value}, {server.reason}"] if server.reason else []),
                    *self.toolbox.notices(server)]
            troubles += [f"{server.config.label}: {text}" for text in said]
        return tools, troubles

    async def tokens_of(self, tools: Seq[ChatTool]) -> int | None:
        """The tokens of a short prompt with these tools; None if the model has no place for them."""
        tokenizer = self.pool.tokenizer
        prompts = self.pool.admission.prompts
        if not tokenizer or tokenizer.tool_format is None or not prompts:
            return None
        return len(await conversation_tokens(prompts, SHORT, [tool.function for tool in tools], "", {}))

    async def call(self, tool: ChatTool, arguments: Mapping[str, Any]) -> ToolResult:
        """A result, also a failed one. If the model sees, it can be shown the pictures."""
        offered = self.toolbox.offered().get(tool.name)
        if offered is None or offered.digest != tool.digest:
            return ToolResult(CHANGED, is_error=True)
        result = await self.toolbox.call(offered, arguments, "")
        if not self.pool.sees:
            return result
        return await result.with_readable_pictures(lambda data: self.pool.admission.decode_picture(data, ""))


class ServersTools:
    """The tools of a server at --url, which run beside that server."""

    def __init__(self, pool: RemotePool):
        self.pool = pool

    async def listed(self) -> tuple[list[ChatTool], list[str]]:
        body = await self.pool.get(f"v1/tools?model={self.pool.wanted or ''}")
        tools = [ChatTool(tool["name"], tool["server"], tool.get("description") or "", tool["parameters"],
                          tool.get("ask") is not False, tool["digest"], tool.get("enforced") is True)
                 for tool in body.get("data") or () if isinstance(tool, dict)]
        troubles = []
        for server in body.get("servers") or ():
            reason = server.get("reason")
            said = [*([f"{server.get('state')}, {reason}"] if reason else []), *(server.get("notices") or ())]
            troubles += [f"{server.get('label')}: {text}" for text in said]
        return tools, troubles

    async def tokens_of(self, tools: Seq[ChatTool]) -> int | None:
        """As the server counts them; None if it does not."""
        body = {"model": self.pool.model_name, "messages": [{"role": "user", "content": SHORT[0].content}],
                "tools": [{"name": tool.name, "description": tool.description,
                           "input_schema": tool.parameters} for tool in tools]}
        async with await self.pool.ask("POST", "v1/messages/count_tokens", json=body) as response:
            found = strict_object(await whole_body(self.pool.url, response)) or {}
            count = found.get("input_tokens")
            return count if response.status == 200 and type(count) is int else None

    async def call(self, tool: ChatTool, arguments: Mapping[str, Any]) -> ToolResult:
        body = {"name": tool.name, "arguments": arguments, "digest": tool.digest}
        try:
            async with await self.pool.ask("POST", "v1/tools/call", json=body) as response:
                if response.status != 200:
                    raise await refusal(response)
                found = await response.json()
        except ChatServerError as error:
            return ToolResult(f"{error}. If it was begun, its outcome is unknown.", is_error=True)
        listed = found.get("images")
        pictures = [ToolPicture(str(one.get("mime_type")), str(one.get("data")))
                    for one in (listed if isinstance(listed, list) else ()) if isinstance(one, dict)]
        return ToolResult(str(found.get("text", "")), pictures=tuple(pictures))


class ToolUse:
    """Which tools a chat has, what the user has allowed, and the calls of a question."""

    def __init__(self, source: OwnTools | ServersTools):
        self.source = source
        self.tools: dict[str, ChatTool] = {}
        self.on: set[str] = set()
        self.troubles: list[str] = []
        self.allowed: dict[str, str] = {}  # name -> digest of what the user has allowed for this chat

    async def read(self):
        """Ask which tools there are."""
        tools, self.troubles = await self.source.listed()
        self.tools = {tool.name: tool for tool in tools}
        self.on &= {*self.tools}

    async def about(self) -> str:
        """How many tools are on, and what that costs: each prompt has them all, with their schemas. None are
        on at first, since a model on a CPU may read all of them for minutes."""
        count = len(self.tools)
        if self.on:
            words = f"{len(self.on)} of {count} tools are on"
            return words + await self.cost(self.chosen, " and take {:,} tokens of each prompt")
        words = f"none of {count} tools is on; /tools on NAME (a tool, a server, or all) switches them on"
        return words + await self.cost([*self.tools.values()], ". All take {:,} tokens of each prompt")

    async def cost(self, tools: Seq[ChatTool], words: str) -> str:
        """What the prompts of these tools cost in tokens, in words; "" if that is unknown."""
        if not tools:
            return ""
        with suppress(ChatServerError, ValueError):
            plain = await self.source.tokens_of([])
            whole = await self.source.tokens_of(tools)
            if plain is not None and whole is not None and whole > plain:
                return words.format(whole - plain)
        return ""

    @property
    def chosen(self) -> list[ChatTool]:
        return [self.tools[name] for name in sorted(self.on)]

    def choose(self, names: Seq[str], is_on: bool):
        """Switch tools on or off: names of tools, of servers, or "all". ValueError for others."""
        if not self.tools:
            raise ValueError("there are no tools: " + ("; ".join(self.troubles) or "no tool server has any"))
        for name in names:
            meant = {tool.name for tool in self.tools.values() if name in ("all", tool.server, tool.name)}
            if not meant:
                servers = sorted({tool.server for tool in self.tools.values()})
                raise ValueError(f"there is no tool and no tool server {shown(name)} (servers: "
                                 f"{', '.join(servers)})")
            self.on = self.on | meant if is_on else self.on - meant

    def needs_approval(self, tool: ChatTool) -> bool:
        return tool.ask and self.allowed.get(tool.name) != tool.digest

    def refusal(self, call: Mapping[str, str], earlier: Seq[Mapping[str, str]]) -> str:
        """Why a call is not run at all, for the model; "" if it may be. earlier: the question's calls before
        it."""
        if call["name"] not in self.on:
            return f"Not run: there is no tool {call['name']}."
        before = [(one["name"], one["arguments"]) for one in earlier]
        return why_not_run(call["name"], call["arguments"], before)

    async def run(self, call: dict[str, Any]):
        """Give a call its result, and the pictures of that. Ctrl-C cancels the call."""
        tool = self.tools[call["name"]]
        found = await interruptible(self.source.call(tool, json.loads(call["arguments"])))
        call["result"] = CANCELLED if found is None else found.text
        if found and found.pictures:
            call["images"] = [picture.body for picture in found.pictures]


async def switch_on(use: ToolUse, settings: Settings):
    """Switch on what --tools names. ConfigError if that is no tool."""
    if not settings.tools:
        return
    await use.read()
    try:
        use.choose([name for name in map(str.strip, settings.tools.split(",")) if name], True)
    except ValueError as error:
        raise ConfigError(f"--tools: {error}") from None


def with_tools(request: Request, tools: Seq[ChatTool], pool: Pool) -> Request:
    """The request with functions that the model may call. ConfigError if it can't call any."""
    functions = [tool.function for tool in tools]
    if isinstance(pool, RemotePool):
        return replace(request, tools=tuple(functions))
    tool_format = pool.tokenizer.tool_format if pool.tokenizer else None
    if tool_format is None:
        raise ConfigError("this model can't call tools: its chat template has no place for them")
    known = tuple(functions)
    offered = [tool["function"] for tool in known]
    names = tuple(function["name"] for function in offered)
    params = replace(request.params, tool_names=names, grammar_param="tools", parallel_calls=True,
                     tool_types=types_of_parameters(known, names, tool_format),
                     tool_schemas=schemas_of_loose_calls(offered, tool_format),
                     call_grammars=strict_grammars(offered, tool_format))
    return replace(request, params=params, tools=known)


def shown_call(call: Mapping[str, str]) -> str:
    """A call on one line."""
    try:
        arguments = as_json(json.loads(call["arguments"]))
    except (ValueError, RecursionError):
        arguments = call["arguments"]
    return f"{call['name']} {arguments[:1000]}"


@asynccontextmanager
async def open_tools(settings: Settings, pool: Pool) -> AsyncIterator[ToolUse | None]:
    """The tools that a chat may have; None if there are none."""
    if isinstance(pool, RemotePool):
        if settings.mcp_config:
            raise ConfigError("--mcp-config: the tools of a server at --url run there; give it to that "
                              "server")
        use = ToolUse(ServersTools(pool))
        await switch_on(use, settings)
        yield use
        return
    if not settings.mcp_config:
        if settings.tools:
            raise ConfigError("--tools: --mcp-config FILE, or a server at --url, says which tools there are")
        yield None
        return
    toolbox = Toolbox.of(settings)
    toolbox.start()
    try:
        use = ToolUse(OwnTools(toolbox, pool))
        await use.read()
        await switch_on(use, settings)
        yield use
    finally:
        await toolbox.close()
