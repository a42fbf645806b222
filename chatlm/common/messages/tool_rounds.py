"""What the server's own loop of tools is asked for, as a reader of bodies found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from chatlm.common.messages.requests import AnswerParams


@dataclass(frozen=True)
class CallItem:
    """How a response shows the calls of a tool that the server itself runs, where its API has items of their
    own for them: {"id", "type", "status", and these members, which the tool's results have}."""

    type: str                        # of the item
    prefix: str                      # of its id
    runs: str                        # the last part of the event that comes when the call runs
    members: tuple[str, ...]         # lists of the call's arguments, by their names
    asked_for: tuple[str, ...] = ()  # lists of objects, null unless the body's `include` names them


@dataclass(frozen=True)
class PlannedTool:
    """A tool that the server may call for a request."""

    name: str    # for the model
    label: str   # of its server; of a tool that the server itself runs, the name of its annex
    tool: str    # its name there
    digest: str  # of its description, when it was offered
    asks: bool   # must the client approve of each call?
    # of a tool that the server itself runs
    item: CallItem | None = None  # None: its calls are shown as those of tool servers
    first: str = ""  # the argument that has the last questions where it is called before the model is asked
    rounds: int = 0  # in which it may be called; 0: in all


@dataclass(frozen=True)
class ApprovedCall:
    """A call of an earlier answer, which the client now approves of."""

    id: str         # of the approval request; the message for its result has it as `tool_call_id`
    name: str       # for the model
    arguments: str  # JSON
    digest: str     # of the tool, when the client was asked


@dataclass(frozen=True)
class ApprovalMark:
    """What the ids of approval requests are made with, so that the server knows them again."""

    key: str = ""     # hexadecimal; the server's for one client
    until_s: int = 0  # until when they can be answered, in seconds since 1970


@dataclass(frozen=True)
class ToolPlan:
    """The tools that the server itself calls to answer a request, in rounds: the model answers, its calls are
    run, and it answers again."""

    tools: tuple[PlannedTool, ...]
    listed: tuple[str, ...] = ()              # servers whose tools the answer lists
    approved: tuple[ApprovedCall, ...] = ()   # run before the first round
    most_calls: int | None = None             # of these tools
    later: AnswerParams | None = None         # of the rounds after the first, where they differ
    pauses: bool = False                      # at the limit of rounds: end, instead of a round without tools
    mark: ApprovalMark = ApprovalMark()       # set by the front
    options: Mapping = field(default_factory=dict)  # of tools that the server itself runs, by their types;
                                                    # set by the front too
    first: tuple[str, ...] = ()               # names of such tools that are called before the first round too
