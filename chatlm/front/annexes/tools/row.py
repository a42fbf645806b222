"""Tools of --mcp-config, and answers in rounds, for which the server calls tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import A_TEXT, Field, list_schema, object_schema
from chatlm.front.api.tool_calls import CALL_FIELDS
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.tools.rounds import Rounds
    from chatlm.front.annexes.tools.routes import ToolRoutes
    from chatlm.front.front import Front


def with_tools(front: Front) -> bool:
    return front.settings.mcp_config is not None


def with_rounds(front: Front) -> bool:
    return with_tools(front) or any(annex.tools and annex.wanted(front) for annex in front.annexes)


MODEL = Field("model", TEXT, "whose format of calls decides which parameters can be enforced")
A_TOOL = object_schema(
    ["name", "server", "tool", "digest"], name=A_TEXT, server=A_TEXT, tool=A_TEXT, description=A_TEXT,
    parameters={"type": "object"}, annotations={"type": "object"}, digest=A_TEXT,
    enforced={"description": "true, or why calls can't be held to the parameters"},
    ask={"type": "boolean", "description": "whether a person should approve of each call"})
A_LIST = object_schema(["data", "servers"], data=list_schema(A_TOOL), servers=list_schema(
    object_schema(["label", "state"], label=A_TEXT, state=A_TEXT, reason=A_TEXT, notices=list_schema(
        A_TEXT | {"description": "such as that tools are left out, and why"}))))
TOOL_ROUTES: tuple[Route[ToolRoutes], ...] = (
    Route("GET", "/v1/tools", OPENAI, lambda tools, http: tools.handle_list(http),
          "the tools of --mcp-config that this client may use", query=(MODEL,), returns=A_LIST),
    Route("POST", "/v1/tools/call", OPENAI, lambda tools, http: tools.handle_call(http),
          "call one of these tools", body=CALL_FIELDS),
)
TOOLS: Annex[ToolRoutes] = Annex(
    "tools", importer("chatlm.front.annexes.tools.routes:ToolRoutes.of"), TOOL_ROUTES, with_tools,
    lambda tools: tools.start(), lambda tools: tools.close(),
    offers=lambda tools, http, envelope: tools.offered_to(http, envelope),
    metrics=lambda tools, families: tools.metric_families(families))
ROUNDS: Annex[Rounds] = Annex(
    "rounds", importer("chatlm.front.annexes.tools.rounds:Rounds.of"), wanted=with_rounds,
    start=lambda rounds: rounds.approvals.open(),
    joins=lambda parsed: parsed.plan is not None, prepare=lambda rounds, parsed: rounds.marked(parsed),
    around=lambda rounds, begin, ask: rounds.around(begin, ask))
