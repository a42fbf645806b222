"""Calls that a model writes as plain JSON at the end of its answer, fenced or not: Qwen2.5-Coder does."""

import json
import random
from types import SimpleNamespace

import pytest

from chatlm.common.text.fitting import Fitting, arguments_fit
from chatlm.common.text.formats import CALL_FORMATS
from chatlm.common.text.reader import AnswerReader
from chatlm.front.api.readers import schemas_of_loose_calls
from answers import together
from fake_pool import Letters

WEATHER = {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}
TIME = {"name": "time"}
CALL = '{"name": "weather", "arguments": {"city": "Rome {a}"}}'
MADE = ("weather", {"city": "Rome {a}"})
TWICE = ("time", {})


def read(text, pieces=1, cut=False, functions=(WEATHER, TIME), tool_format="tagged"):
    """The text and the calls [(name, arguments)] of an answer that arrives `pieces` characters at a time."""
    tokenizer = Letters()
    tokenizer.tool_format = tool_format
    names = [function["name"] for function in functions]
    reader = AnswerReader(tokenizer, names, (), schemas_of_loose_calls(functions, tool_format))
    deltas = []
    for place in range(0, len(text), pieces):
        reader.push(text[place:place + pieces])
        deltas += reader.take()
    reader.finish(cut)
    deltas += reader.take()
    parts = together(deltas)
    calls = [(name, json.loads(text)) for kind, text, name in parts if kind == "call"]
    return "".join(text for kind, text, _ in parts if kind == "text"), calls


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("text, content, calls", [
    (CALL, "", [MADE]),
    (f"```json\n{CALL}\n```", "", [MADE]),
    (f"```\n{CALL}\n```\n", "", [MADE]),
    (f"```json\n{CALL}", "", [MADE]),                                             # the fence stays open
    (f"I look it up.\n\n```json\n{CALL}\n```", "I look it up.\n\n", [MADE]),
    (f"I look it up: {CALL}", "I look it up: ", [MADE]),
    ('{{"name": "weather", "arguments": {"city": "Rome {a}"}}}', "", [MADE]),     # one pair too many
    ('```json\n{{"name": "weather", "arguments": {{"city": "Rome {a}"}}}}\n```', "", [MADE]),  # all are doubled
    ('{"arguments": {"city": "Rome {a}"}, "name": "weather"}', "", [MADE]),
    ('{"name": "weather", "parameters": {"city": "Rome {a}"}}', "", [MADE]),
    (f'{CALL}\n{{"name": "time", "arguments": {{}}}}', "", [MADE, TWICE]),
    (f'```json\n{CALL}\n```\n```json\n{{"name": "time"}}\n```', "", [MADE, TWICE]),
    (f'First {{a}} and ```x``` too.\n{CALL}', "First {a} and ```x``` too.\n", [MADE]),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [MADE]),                           # as its template asks
])
def test_an_answer_that_ends_with_calls_makes_them(text, content, calls, pieces):
    assert read(text, pieces) == (content, calls)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("text", [
    f"```json\n{CALL}\n```\nThis is how you would call it.",                      # prose after it
    f"{CALL} is a call.",
    f'{CALL}\n{{"name": "other", "arguments": {{}}}}',                            # another name
    '{"name": "weather", "arguments": {"days": 3}}',                              # without what is required
    '{"name": "weather", "arguments": {"city": 3}}',                              # of another type
    '{"name": "weather", "arguments": "Rome"}',
    '{"name": "weather", "arguments": {"city": "Rome"}, "note": 1}',              # no call has this key
    '```json\n{"city": "Rome"}\n```',
    '```json\n[1, 2]\n```',
    '```python\nprint({"name": "weather"})\n```',
    '```json\n{"name": "weather", "arguments": {"city": "Ro',
    "``` and { and {{ and ```json",
    "```json\n```", "{", "```", "`", "{}", "a {",
    'f"{{x}}" {"name": "weather"',
])
def test_what_only_shows_json_stays_text_to_the_byte(text, pieces):
    assert read(text, pieces) == (text, [])


@pytest.mark.parametrize("text", [CALL, f"```json\n{CALL}\n```"])
def test_a_call_is_text_where_none_can_be(text):
    """No tools are offered, the answer was cut, or the model's format names no such calls."""
    assert read(text, functions=()) == (text, [])
    assert read(text, cut=True) == (text, [])
    assert read(text, tool_format="kimi") == (text, [])
    assert not CALL_FORMATS["kimi"].loose


def test_prose_before_a_call_is_streamed_and_a_call_is_held_back():
    tokenizer = Letters()
    tokenizer.tool_format = "tagged"
    reader = AnswerReader(tokenizer, ["weather"], (), schemas_of_loose_calls([WEATHER], "tagged"))
    reader.push("I look it up: ")
    assert [delta.text for delta in reader.take()] == ["I look it up: "]
    reader.push(CALL)
    assert reader.take() == []
    reader.push(" no")
    assert [delta.text for delta in reader.take()] == [CALL + " no"]


def test_no_text_is_lost_whatever_is_written():
    """Random texts of the signs that matter: with no function offered by that name, all of it is content."""
    dice = random.Random(7)
    parts = ["```", "```json\n", "{", "}", '"name"', ": ", '"weather"', '"arguments"', "\n", " a ", ",", CALL, "``", "[", "]", '"', "\\"]
    for _ in range(2000):
        text = "x" + "".join(dice.choices(parts, k=dice.randrange(1, 14)))
        content, calls = read(text, dice.choice([1, 2, 5, 1000]))
        assert content == text or calls and text.startswith(content), text
        assert read(text, 4, functions=[TIME]) == (text, [])


def test_reading_takes_each_character_once(monkeypatch):
    """Nested beginnings of calls are not read again from each brace."""
    text = '{"name": "weather", "arguments": ' * 2000
    tokenizer = Letters()
    tokenizer.tool_format = "tagged"
    reader = AnswerReader(tokenizer, ["weather"], (), schemas_of_loose_calls([WEATHER], "tagged"))
    taken = SimpleNamespace(characters=0)
    take = reader.scanner.take

    def counted(length):
        taken.characters += length
        return take(length)
    monkeypatch.setattr(reader.scanner, "take", counted)
    for place in range(0, len(text), 7):
        reader.push(text[place:place + 7])
    reader.finish()
    assert "".join(delta.text for delta in reader.take()) == text
    assert taken.characters <= 2 * len(text)


SCHEMAS = [
    ({"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}, {"a": "x"}, {"a": "y"}),
    ({"properties": {"a": {"type": "integer", "minimum": 2, "exclusiveMaximum": 5}}}, {"a": 4}, {"a": 5}),
    ({"properties": {"a": {"type": "array", "items": {"type": "string"}, "maxItems": 2}}}, {"a": ["x"]}, {"a": ["x", 2]}),
    ({"properties": {"a": {"type": "integer"}}, "additionalProperties": False}, {"a": 1}, {"a": 1, "b": 2}),
    ({"properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}}, "$defs": {"b": {"const": 7}}}, {"a": None}, {"a": 8}),
    ({"properties": {"a": {"minLength": 2, "type": "string"}}}, {"a": "xy"}, {"a": "x"}),
    ({"properties": {"a": {"type": "boolean"}}}, {"a": True, "b": 1}, {"a": 1}),
    ({"minProperties": 1}, {"a": 1}, {}),
]


@pytest.mark.parametrize("schema, fitting, other", SCHEMAS)
def test_arguments_are_compared_with_the_schema(schema, fitting, other):
    assert Fitting(schema).fits(fitting) and not Fitting(schema).fits(other)
    assert arguments_fit(fitting, json.dumps(schema)) and not arguments_fit(other, json.dumps(schema))


def test_a_schema_that_cannot_be_read_takes_any_object():
    for schema in ('{"type": 7}', '{"$ref": "#/nowhere"}', "[]", "{" * 10, ""):
        assert arguments_fit({"a": 1}, schema) and not arguments_fit("a", schema)
