"""Each row of CALL_FORMATS, and the classes that read answers, one by one."""

import json
import random
import re
from dataclasses import replace

import llguidance
import pytest

from chatlm.common.text import formats
from chatlm.common.text.calls import CallStart, JsonCalls, TaggedCalls
from chatlm.common.text.formats import CALL_FORMATS, HARMONY, NO_CALLS, tool_format_of, with_markers
from chatlm.common.text.grammar import byte_vocabulary, check_grammar
from chatlm.common.text.reader import AnswerReader, Harmony, Prose
from chatlm.common.text.scanner import Deltas, Scanner
from chatlm.common.text.value_calls import ValueCalls
from chatlm.front.api.call_grammars import tool_grammar
from fake_pool import Letters

WEATHER = {"function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}}}
TAG = CALL_FORMATS["tagged"]


def written(row, arguments='{"city": "Rome"}'):
    """One call of `weather`, as a row says that its models write it."""
    if row.tags:
        arguments = "".join(row.tags.parameter.replace("{name}", name) + value + row.tags.value_end for name, value in json.loads(arguments).items())
    if row.notation:
        arguments = row.notation.arguments(json.loads(arguments))
    call = row.call.replace("{name}", "weather").replace("{quoted}", '"weather"').replace("{digit}", "0").replace("{arguments}", arguments)
    return row.calls.replace("{calls}", call)


def read_in_pieces(reader, text, dice):
    """What a reader makes of a text in pieces of any length."""
    while text:
        size = dice.choice((1, 3, 50))
        reader.push(text[:size])
        text = text[size:]
    reader.finish()
    return reader.take()


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_row_s_calls_are_written_and_read(name):
    """A call as a row says it is what its grammar allows and what its reader finds."""
    row, dice = CALL_FORMATS[name], random.Random(1)
    text = written(row)
    grammar = tool_grammar([WEATHER, {"function": {"name": "time"}}], name, True)
    check_grammar(grammar, "tools")
    matcher = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
    assert matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
    tokenizer = Letters()
    tokenizer.tool_format = name
    for _ in range(10):
        assert read_in_pieces(AnswerReader(tokenizer, ["weather"], [{"city": "string"}]), text, dice) == [("call", '{"city": "Rome"}', "weather")]


def test_a_new_family_s_format_is_one_row(monkeypatch):
    row = replace(CALL_FORMATS["deepseek fenced"], template_has=("<call:",), marks=("<call:", ":call>"), inside=(), calls="{calls}",
                  call="<call:{name}```json{arguments}:call>")
    monkeypatch.setattr(formats, "CALL_FORMATS", {"ours": row, **CALL_FORMATS})
    assert formats.tool_format_of("{% if tools %}<call:") == "ours"
    monkeypatch.setitem(CALL_FORMATS, "ours", row)
    test_a_row_s_calls_are_written_and_read("ours")


def test_no_row_hides_a_later_one():
    """A template has the format of the first row that fits."""
    for name, row in CALL_FORMATS.items():
        assert tool_format_of("{% if tools %}" + " ".join(row.template_has)) == name
    assert tool_format_of("<tool_call>") is None and tool_format_of("<|channel|><|message|>") == "harmony"


def driven(scanner, deltas, reading, *pieces, cut=False):
    """What a reader by itself has read: [(kind, text, name)]."""
    for piece in pieces:
        scanner.held += piece
        next(reading)
    scanner.finish(cut)
    next(reading)
    return deltas.take()


def forever(make):
    """A reader of calls as the readers around it use it: again and again, and the rest is text."""
    reader, scanner = make()

    def read():
        while True:
            yield from reader.read((yield from scanner.until(reader.deltas.write, *reader.starts)))
    return read()


@pytest.fixture
def parts():
    return Scanner(Letters()), Deltas()


def test_a_scanner_holds_back_what_may_be_a_sign(parts):
    """A scanner writes up to a sign and holds back what may begin one."""
    scanner, said = parts[0], []
    reading = scanner.until(said.append, "<end>", "stop")
    scanner.held = "a<e"
    next(reading)
    assert ("".join(said), scanner.held) == ("a", "<e")
    scanner.held += "nd>b"
    with pytest.raises(StopIteration) as returned:
        next(reading)
    assert (returned.value.value, scanner.held) == ("<end>", "b")
    for cut, rest in ((False, ["<e"]), (True, [])):
        scanner, said = Scanner(Letters()), []
        reading = scanner.until(said.append, "<end>", dropped=("<end>",))
        scanner.held = "<e"
        next(reading)
        scanner.finish(cut)
        next(reading)
        assert [text for text in said if text] == rest


def test_deltas_come_in_order_with_right_spaces(parts):
    """Deltas come in order, with blank lines between parts and no white space around reasoning."""
    deltas = parts[1]
    deltas.begin("reasoning")
    for text in (" a ", "b ", ""):
        deltas.write(text)
    deltas.begin("text")
    deltas.write("\n c ")
    deltas.begin_call("f", "{")
    for text in ("{", "}"):
        deltas.arguments(text)
    deltas.begin("reasoning")
    deltas.write("d")
    deltas.begin("text")
    deltas.write("e")
    deltas.begin("reasoning")
    deltas.write("g")
    assert deltas.begun_call == ("call", "{", "f")
    assert deltas.take() == [("reasoning", "a b", ""), ("text", "c ", ""), ("call", "{}", "f"), ("reasoning", "d", ""), ("text", "\n\ne", ""),
                             ("reasoning", "\n\ng", "")]
    assert deltas.take() == []


def test_an_opening_waits_until_a_call_is_certain(parts):
    """An opening waits until it is decided whether a call begins."""
    scanner, deltas = parts

    def head(text):
        return re.match(r"(f)\(", text) or "f(".startswith(text)
    for text, name, left in (("f(1", "f", "f(1"), ("g", None, "")):
        reading, scanner.held = CallStart(scanner, deltas, ["f"]).read(head, "", ""), ""
        next(reading)
        scanner.held += text
        with pytest.raises(StopIteration) as returned:
            next(reading)
        match = returned.value.value
        assert (match and match[1], scanner.held) == (name, left)
    assert deltas.take() == [("text", "g", "")]


def test_json_calls_need_no_other_reader(parts):
    """Calls in JSON are read without the other readers."""
    scanner, deltas = parts
    reading = forever(lambda: (JsonCalls(scanner, deltas, ["f"], TAG), scanner))
    assert driven(scanner, deltas, reading, 'a<tool', '_call>{"name": "f", "argum', 'ents": {"x": "}"}}</tool_call>', "b") == [
        ("text", "a", ""), ("call", '{"x": "}"}', "f"), ("text", "b", "")]


@pytest.mark.parametrize("cut, closed", [(False, '{"x": "1"}'), (True, '{"x": "1')])
def test_tag_calls_need_no_other_reader(parts, cut, closed):
    """Calls in tags are read alone, and closed unless they are cut."""
    scanner, deltas = parts
    reading = forever(lambda: (TaggedCalls(scanner, deltas, ["f"], CALL_FORMATS["qwen tags"], [{"x": "string"}]), scanner))
    assert driven(scanner, deltas, reading, "a<tool_call>\n<function=f>\n<para", "meter=x>\n1", cut=cut) == [("text", "a", ""), ("call", closed, "f")]


@pytest.mark.parametrize("cut, closed", [(False, '{"x": "1", "y": [2]}'), (True, '{"x": "1", "y": [')])
def test_value_calls_need_no_other_reader(parts, cut, closed):
    """Calls of values are read alone, and closed unless they are cut."""
    scanner, deltas = parts
    reading = forever(lambda: (ValueCalls(scanner, deltas, ["f"], CALL_FORMATS["lfm2"]), scanner))
    assert driven(scanner, deltas, reading, "a<|tool_call_sta", 'rt|>[f(x="1', '", y=[2', cut=cut) == [("text", "a", ""), ("call", closed, "f")]


def test_no_end_is_made_up_for_a_cut_value(parts):
    """A value that is cut while its end is in doubt is not made up."""
    scanner, deltas = parts
    reading = forever(lambda: (TaggedCalls(scanner, deltas, ["f"], CALL_FORMATS["qwen tags"]), scanner))
    assert driven(scanner, deltas, reading, '<tool_call>\n<function=f>\n<parameter=x>\n["a</parameter>\n', cut=True) == [("call", "", "f")]


def test_reasoning_and_content_need_no_calls(parts):
    """Reasoning and content are read without calls."""
    scanner, deltas = parts
    prose = Prose(scanner, deltas, JsonCalls(scanner, deltas, (), NO_CALLS), ("<think>", "</think>"))
    assert driven(scanner, deltas, prose.read(), "<think>a</th", "ink>b<tool_call>") == [("reasoning", "a", ""), ("text", "b<tool_call>", "")]


def test_harmony_needs_no_other_reader(parts):
    scanner, deltas = parts
    start, channel, _, message, end, *_ = map(scanner.sign, HARMONY)
    text = f'{channel}analysis{message}a{end}{start}assistant{channel}commentary to=functions.f {message}{{}}'
    assert driven(scanner, deltas, Harmony(scanner, deltas, ["f"]).read(), text[:30], text[30:]) == [("reasoning", "a", ""), ("call", "{}", "f")]


def test_a_marker_in_a_call_s_arguments_is_spelled():
    """It came out as the lone surrogate that stands for the token."""
    tokenizer = Letters()
    tokenizer.tool_format, tokenizer.thoughts, tokenizer.added = "tagged", ("<think>", "</think>"), {300: b"<think>"}
    tokenizer.token_bytes = tokenizer.added.get
    reader = AnswerReader(tokenizer, ["f"])
    reader.push('<tool_call>{"arguments": {"a": "' + tokenizer.marks(True)[300] + '"}, "name": "f"}</tool_call>')
    assert reader.take() == [("call", '{"a": "<think>"}', "f")]
