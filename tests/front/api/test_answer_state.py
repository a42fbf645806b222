"""What an answer has so far: each event is folded into it once, and whoever needs the answer reads it."""

import ast
import itertools
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from answers import asked, said, together
from chatlm.common.errors import EngineFailure
from chatlm.common.messages.requests import (
    Accepted, CallApproved, CallEnded, Delta, Finished, Piece, RoundEnded, ToolsListed, Usage)
from chatlm.common.messages.tool_rounds import PlannedTool, ToolPlan
from chatlm.front.api.answer_state import AnswerState, ChoiceState, Part

END = Finished("stop", "eos", Usage(7, 3, 2), 0.0, 1.0, None, 0)
CALCULATION = Delta("calculator", '{"expression": "1+1", "result": "2"}')
KINDS = [Delta("text", "one "), Delta("text", "zwölf 🙂"), Delta("reasoning", "Hm."), Delta("call", "", "look"), Delta("call", "{}"), CALCULATION]


def folded(*events, **fields):
    state = AnswerState(asked(**fields))
    for event in events:
        state.fold(event)
    return state


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_has_the_parts_that_its_deltas_make(seed):
    """However many deltas came in a piece."""
    draw = random.Random(seed)
    deltas = [draw.choice(KINDS) for _ in range(30)]
    pieces = [tuple(group) for _, group in itertools.groupby(deltas, lambda _: draw.random() < 0.5)]
    choice = folded(*[Piece((1, 2), piece) for piece in pieces]).choices[0]
    shown = [delta._replace(kind="text", text="") if delta.kind == "calculator" else delta for delta in deltas]
    assert [[part.kind, part.text, part.name] for part in choice.parts] == together(shown)
    assert choice.token_ids.tolist() == [1, 2] * len(pieces)
    before = [sum(len(delta.text) for delta in deltas[:index] if delta.kind == "text")
              for index, delta in enumerate(deltas) if delta is CALCULATION]
    assert choice.calculations == [{"start": start, "expression": "1+1", "result": "2"} for start in before]
    assert [part.place for part in choice.calls] == list(range(len(choice.calls)))
    assert all(part.is_closed for part in choice.parts[:-1]) and not choice.parts[-1].is_closed


def test_each_choice_has_its_own():
    state = folded(said("a", choice=1), said("b", choice=0), said("c", choice=1), replace(END, choice=1), n=2)
    assert [choice.text() for choice in state.choices] == ["b", "ac"] and not state.has_ended
    with pytest.raises(EngineFailure, match="ended early"):
        state.usage()
    state.fold(END)
    assert state.has_ended and (state.usage().prompt_tokens, state.usage().completion_tokens) == (7, 6)


def test_calls_that_the_server_runs_have_their_numbers_and_results():
    plan = ToolPlan((PlannedTool("look", "eyes", "look", "", False),))
    state = AnswerState(asked(), plan)
    source = {"type": "file_citation", "file_id": "file-1"}
    events = (Accepted(7), ToolsListed("eyes", ()), CallApproved("look", "{}", "mcpr_1"), CallEnded(0, "a wall", cited=(source,)),
              said("I see. ", Delta("call", "", "look"), Delta("call", "{}", "mine")), RoundEnded(), CallEnded(1, "a door", True), said("Yes [1]"), END)
    for event in events:
        state.fold(event)
    parts = state.choices[0].parts
    assert [part.kind for part in parts] == ["list", "call", "result", "text", "call", "call", "result", "text"]
    assert [(call.name, call.result.text) for call in state.server_calls] == [("look", "a wall"), ("look", "a door")]
    assert parts[5].tool is None and parts[6].call is parts[4] and state.prompt_tokens == 7
    assert state.sources == [source] and [part.sources for part in parts] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert all(part.is_closed for part in parts)


def test_an_event_that_another_has_overtaken_is_not_encoded():
    first, second = said("a"), said("b")
    state = folded(first, second)
    assert state.parts_of(second) and state.choices[0].text() == "ab"
    with pytest.raises(AssertionError):
        state.parts_of(first)


def test_ids_are_derived_where_an_answer_may_be_given_again():
    event = said("a", Delta("call", "", "look"))
    first, second = (folded(event, id="x", low_priority=True).choices[0].parts for _ in range(2))
    assert [part.id for part in first] == [part.id for part in second] and len({part.id for part in first}) == 2
    assert folded(event).choices[0].parts[0].id != folded(event).choices[0].parts[0].id


# Whoever can reach the state of an answer, it or its encoder
NEIGHBOURS = ("chatlm.front.api.answer_state", "chatlm.front.api.encode", "chatlm.front.server.answering")
STATE = {field.name for kind in (Part, ChoiceState) for field in fields(kind)} | vars(AnswerState(asked())).keys()
CHANGES = {"append", "extend", "insert", "pop", "remove", "clear", "update", "write"}
OTHERS = {"last.parts",   # an AnswerBlock's
          "call.result",  # a Call's, of rounds
          "record.id"}    # a RequestLog's


def writes_in(source):
    """The attributes of others that a module assigns to or changes, and which are called as those of the state."""
    for node in ast.walk(ast.parse(source)):
        target = node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            target = node.func.value
        elif not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            continue
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Attribute) and target.attr in STATE and ast.unparse(target) != f"self.{target.attr}":
            yield ast.unparse(target)


def test_nothing_but_the_fold_writes_the_state():
    planted = "choice.done = end\nself.state.sources += [1]\npart.calculations[0]['start'] = 1\ndel state.latest\nchoice.parts.append(part)\nself.parts = len(part.text)"
    assert [*writes_in(planted)] == ["choice.done", "self.state.sources", "part.calculations", "state.latest", "choice.parts"]
    read = set()
    for path in sorted((Path(__file__).parents[3] / "chatlm").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name != "answer_state.py" and any(f"from {name} import" in source for name in NEIGHBOURS):
            assert set(writes_in(source)) <= OTHERS, path
            read.add(path.name)
    assert {"rounds.py", "writing.py", "messages.py"} <= read
