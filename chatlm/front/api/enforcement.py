"""Whether a model's calls of a function can be held to its parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, printable
from chatlm.common.messages.requests import AnswerParams
from chatlm.front.api.call_grammars import call_grammar

if TYPE_CHECKING:
    from chatlm.front.admission.admission import Admission


async def why_unenforced(function: Mapping, tool_format: str | None, admission: Admission,
                         lane: str = "") -> str:
    """Why calls in this format can't be held to the function's parameters; "" if they can.

    tool_format: how the model writes calls; None: it can't. lane: whose turn in the sandbox it is."""
    if tool_format is None:
        return "the model can't call tools"
    try:
        grammar = await asyncio.to_thread(call_grammar, function, tool_format)
        await admission.check_grammar(AnswerParams(call_grammars=(grammar,), grammar_param="tools"), lane, "")
    except RequestError as error:
        return printable(str(error))
    return ""
