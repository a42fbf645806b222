"""What annexes add to the bodies of answers: fields, and types of tools that the server itself runs.

Whoever opens a body takes these out of it by their names, here or in a sandbox, so no reader knows them. The
front checks their values."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid
from chatlm.front.api.dialect import Form, may_run_tools
from chatlm.front.api.fields import Field, parse_fields, within_limit
from chatlm.front.api.mcp_tools import refuse_in_batches
from chatlm.front.api.spoken import all_paths, fields_of, form_of, has_body, path_of_form, paths_of
from chatlm.front.tools.rules import model_name

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Request
    from chatlm.common.messages.tool_rounds import CallItem
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.tools.results import ToolResult

T = TypeVar("T")
MOST_OWN_TOOLS = 16  # of a body


@dataclass(frozen=True)
class AddedField:
    """A field of an annex, and the kinds of bodies that have it."""

    field: Field
    forms: tuple[str, ...]  # paths, each for all routes with the same fields as that one


class ToolCall(NamedTuple):
    """A call of a tool that the server itself runs."""

    arguments: Mapping[str, Any]  # from the model
    options: Mapping[str, Any]    # from the body: the checked members of the tool's entry
    client: str
    owner: str                    # of KV pages and answers, see Owners.of_pages
    pool: WorkerPool              # of the model that answers
    request: Request              # what that was asked, with the conversation up to this call
    before: Seq[ToolResult] = ()  # of the answer's earlier calls of this tool


@dataclass(frozen=True)
class ServerTool(Generic[T]):
    """A tool that the server itself runs, where `tools` of a body has an entry of its type. The model calls
    it as if its annex were a tool server."""

    type: str
    description: str
    parameters: Mapping  # the JSON schema of its arguments
    call: Callable[[T, ToolCall], Awaitable[ToolResult]]
    options: tuple[Field, ...] = ()  # members of its entry; `entry` is where that stands in the body
    item: CallItem | None = None     # how Responses show its calls; None: as those of tool servers
    # The argument, a list of texts, that the last questions are, where it is called before the model is
    # asked: if `tool_choice` requires it, or if the model never learned to call functions. "": it is not
    first: str = ""
    rounds: int = 0                  # of an answer, in which it may be called; 0: in all

    def offered_by(self, annex: str) -> dict[str, Any]:
        """As readers get it, like the tools of tool servers."""
        return {"type": self.type, "label": annex, "name": model_name(annex, self.type), "tool": self.type,
                "description": self.description, "parameters": self.parameters, "strict": False,
                "read_only": True, "ask": False, "digest": "", "first": self.first, "rounds": self.rounds,
                "item": self.item and asdict(self.item)}


@dataclass(frozen=True)
class Addition:
    """What one annex adds to bodies."""

    annex: str                # its name
    wanted: bool = True       # False: this server runs without it
    needs: str = ""           # the flag that it needs, for errors
    fields: tuple[AddedField, ...] = ()
    tools: tuple[ServerTool[Any], ...] = ()
    changes_prompts: bool = False  # of bodies that ask for something of it; of all, if it adds nothing

    @property
    def why_not(self) -> str:
        needs = f" without {self.needs}" if self.needs else f" without {self.annex}"
        return f"left out: the server was started{needs}"

    def refusal(self, name: str, value: Any) -> RequestError:
        """The error for a body with a field of it. What needs a database is said as its routes say it."""
        error = bad_value(name, value, self.why_not)
        if self.needs != "--database":
            return error
        return RequestError(str(error), status=404, code="no_database", param=name)


class AddedNames(NamedTuple):
    """What to take out of a body."""

    fields: Seq[str] = ()
    tools: Seq[str] = ()  # types


class Asked(NamedTuple):
    """What a body asks of annexes, as it was sent."""

    fields: Mapping[str, Any] = {}
    tools: Seq[tuple[int, Mapping]] = ()  # entries of `tools`, with their indexes there


class Added(NamedTuple):
    """What a body asks of annexes, checked."""

    fields: Mapping[str, Any] = {}              # values by names
    tools: Mapping[str, Mapping[str, Any]] = {}  # the options of each type
    offered: tuple[dict, ...] = ()               # these tools, for readers
    changed_by: tuple[str, ...] = ()             # the annexes that may change its prompt


NO_NAMES = AddedNames()
NOTHING_ASKED = Asked()
NOTHING_ADDED = Added()


def take_out(fields: dict, names: AddedNames) -> Asked:
    """Remove from a body the fields of annexes; null is as good as none. Entries of its `tools` stay there,
    since a response repeats them. Raises RequestError for more than the front should read."""
    if not names.fields and not names.tools:
        return NOTHING_ASKED
    taken = {name: fields.pop(name) for name in names.fields if name in fields}
    taken = {name: value for name, value in taken.items() if value is not None}
    sent = fields.get("tools")
    tools = tuple((index, tool) for index, tool in enumerate(sent if isinstance(sent, list) else ())
                  if isinstance(tool, dict) and tool.get("type") in names.tools)
    within_limit("tools that the server runs", len(tools), MOST_OWN_TOOLS, "tools")
    if taken or tools:
        names_asked = [*taken, *(["tools"] if tools else [])]
        within_limit(f"bytes of {' and '.join(names_asked)}", json_bytes([taken, tools]),
                     LIMITS.inline_bytes, names_asked[0])
    return Asked(taken, tools)


def json_bytes(value: Any) -> int:
    """How many bytes a value takes as JSON. Raises RequestError if it is nested too deeply."""
    try:
        return len(json.dumps(value))
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def has_answer(path: str) -> bool:
    """Does a model answer the bodies of a path?"""
    return has_body(path) and isinstance(form_of(path), Form)


def is_alike(form: str, path: str) -> bool:
    """Have bodies of a path the same fields as those of this form? Asks no dialect but theirs."""
    return form == path or path in paths_of(form) and fields_of(path) is fields_of(form)


class Additions:
    """What all annexes add, made once. Raises ValueError for a row that cannot be; what only a dialect can
    tell is said once its route is asked, so that nothing imports dialects that nobody speaks."""

    def __init__(self, rows: Seq[Addition] = ()):
        self.rows = rows
        self.paths: dict[str, dict[str, tuple[Addition, Field]]] = {}  # fields by paths and names, if asked
        self.added = [(row, added) for row in rows for added in row.fields]
        self.added_names = [*dict.fromkeys(added.field.name for _, added in self.added)]
        for row, added in self.added:
            self._check_row(row, added)
        tools = [(row, tool) for row in rows if row.wanted for tool in row.tools]
        self.tools = {tool.type: (row, tool) for row, tool in tools}
        if len(self.tools) < len(tools):
            raise ValueError(f"two annexes run tools of one type, among {', '.join(self.tools)}")

    @staticmethod
    def _check_row(row: Addition, added: AddedField):
        what = f"annex {row.annex}: the field {added.field.name}"
        if added.field.required:
            raise ValueError(f"{what} must not be required: bodies of other servers lack it")
        for form in added.forms:
            if not has_body(form):
                raise ValueError(f"{what} joins {form}, which is no kind of body with an answer: "
                                 f"{', '.join(filter(has_answer, all_paths()))}")

    def _fields(self, path: str) -> dict[str, tuple[Addition, Field]]:
        """What is added to the bodies of a path, by names."""
        if path not in self.paths:
            own = {field.name for field in fields_of(path)}
            found: dict[str, tuple[Addition, Field]] = {}
            for row, added in self.added:
                name = added.field.name
                if not any(is_alike(form, path) for form in added.forms):
                    continue
                what = f"annex {row.annex}: the field {name} joins {path}, which"
                if not has_answer(path):
                    raise ValueError(f"{what} is no kind of body with an answer")
                if name in own or name in found:
                    raise ValueError(f"{what} has a field of this name")
                found[name] = row, added.field
            self.paths[path] = found
        return self.paths[path]

    def of_route(self, path: str) -> tuple[Field, ...]:
        """The fields that are added to the bodies of a route."""
        if not self.rows or not has_body(path):
            return ()
        return tuple(field for _, field in self._fields(path).values())

    def names(self, route: str) -> AddedNames:
        """What to take out of bodies of a route: also fields that only other routes have, to refuse them."""
        if not self.added_names and not self.tools:
            return NO_NAMES
        own = {field.name for field in fields_of(route)}
        names = [name for name in self.added_names if name not in own]
        runs_tools = has_body(route) and may_run_tools(form_of(route))
        return AddedNames(names, [*self.tools] if runs_tools else [])

    def read(self, route: str, asked: Asked, names_model: bool = False, in_batch: bool = False) -> Added:
        """Check what a body asks for. Raises RequestError for a field that this route, a line of a batch or
        this server does not have, and for a wrong value."""
        route = path_of_form(route, names_model)
        for name, value in asked.fields.items():
            self._check(route, name, value, in_batch)
        rows = [self._fields(route)[name] for name in asked.fields]
        fields = parse_fields({**asked.fields}, [field for _, field in rows])
        if in_batch and asked.tools:
            raise refuse_in_batches()
        if in_batch or not asked.tools and not fields and not self._change_all:
            return NOTHING_ADDED
        tools = self._all_options(asked.tools)
        users = {row.annex for row, _ in rows} | {self.tools[each][0].annex for each in tools}
        users |= {row.annex for row in self._change_all}
        changed_by = [row.annex for row in self.rows if row.changes_prompts and row.annex in users]
        offered = [self.tools[each][1].offered_by(self.tools[each][0].annex) for each in tools]
        return Added(fields, tools, tuple(offered), tuple(changed_by))

    @property
    def _change_all(self) -> list[Addition]:
        """Those that may change the prompts of all bodies."""
        return [row for row in self.rows
                if row.wanted and row.changes_prompts and not row.fields and not row.tools]

    def _check(self, route: str, name: str, value: Any, in_batch: bool):
        if in_batch:
            raise bad_value(name, value, "left out in a batch, whose lines have no such field")
        if not has_body(route) or name not in self._fields(route):
            named = [added for _, added in self.added if added.field.name == name]
            paths = [form for added in named for form in added.forms]
            raise bad_value(name, value, f"left out: {route} has no such field, unlike {', '.join(paths)}")
        row, _ = self._fields(route)[name]
        if not row.wanted:
            raise row.refusal(name, value)

    def _all_options(self, entries: Seq[tuple[int, Mapping]]) -> dict[str, Mapping[str, Any]]:
        """The options of each type that is asked for. Raises RequestError for a type with two entries."""
        found: dict[str, Mapping[str, Any]] = {}
        for index, entry in entries:
            if entry["type"] in found:
                raise invalid(f"tools[{index}]", f"tools[{index}] is a second entry of the type "
                              f"{entry['type']}: one answer has one")
            found[entry["type"]] = {**self._options(index, entry), "entry": f"tools[{index}]"}
        return found

    def _options(self, index: int, entry: Mapping) -> dict[str, Any]:
        """The checked members of an entry of `tools`."""
        _, tool = self.tools[entry["type"]]
        begin = f"tools[{index}]."
        fields = [field._replace(name=begin + field.name, means=field.name) for field in tool.options]
        return parse_fields({begin + name: value for name, value in entry.items()}, fields)


NO_ADDITIONS = Additions()
