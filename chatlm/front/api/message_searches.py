"""Searches of tools in earlier messages of Anthropic's API, which a server has run there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from itertools import groupby
from typing import Any

from chatlm.common.errors import bad_value
from chatlm.common.jsontext import is_text
from chatlm.front.api.found_tools import NOTHING_FOUND
from chatlm.front.api.mcp_messages import RoleBlocks, kind_of

SEARCHES = "tool_search_tool_"  # the names of such tools begin so
RESULT = "tool_search_tool_result"


def is_search(block: Any) -> bool:
    """Is a block the call of a search?"""
    if kind_of(block) != "server_tool_use":
        return False
    name = block.get("name")
    return is_text(name) and name.startswith(SEARCHES)


def searches_apart(role: str, blocks: Seq[Any], param: str) -> list[RoleBlocks]:
    """The blocks of a message, with searches as calls of functions, whose results are the user's. A search
    without a result is left out. param: the message, for errors."""
    if not any(kind_of(block) == RESULT or is_search(block) for block in blocks):
        return [RoleBlocks(role, [*blocks], 0)]
    answered = {block.get("tool_use_id") for block in blocks
                if kind_of(block) == RESULT and is_text(block.get("tool_use_id"))}
    parts = []
    for are_results, group in groupby(enumerate(blocks), lambda each: kind_of(each[1]) == RESULT):
        pairs = [*group]
        part = RoleBlocks("user" if are_results else role, [], pairs[0][0])
        parts.append(part)
        for index, block in pairs:
            if are_results:
                content = references_of(block.get("content"), f"{param}.content[{index}].content")
                block = {**block, "type": "tool_result", "content": content}
            elif is_search(block):
                name = block.get("id")
                is_answered = is_text(name) and name in answered
                block = {**block, "type": "tool_use"} if is_answered else block
            part.blocks.append(block)
    return parts


def references_of(content: Any, param: str) -> list[Mapping] | str:
    """What a search has found, as the content of a result."""
    kind = kind_of(content)
    if kind == "tool_search_tool_result_error":
        return f"The search failed: {content.get('error_code')}"
    if kind != "tool_search_tool_search_result" or not isinstance(content.get("tool_references"), list):
        raise bad_value(param, content, "an object of type tool_search_tool_search_result with "
                        "tool_references, or of type tool_search_tool_result_error")
    return content["tool_references"] or NOTHING_FOUND
