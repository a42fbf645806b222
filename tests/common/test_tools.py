"""Tools: what templates are told about the client's functions, and which calls are found in answers."""

import contextlib
import json
import random
from dataclasses import replace
from functools import partial
import re

import aiohttp
import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import Delta, Message, SamplingParams
from chatlm.common.text import calls as text_calls, schema_rules
from chatlm.common.text.calls import typed_value
from chatlm.common.text.formats import CALL_FORMATS, HARMONY, tool_format_of, with_markers
from chatlm.common.text.grammar import byte_vocabulary, check_grammar, json_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.reader import AnswerReader
from chatlm.common.text.schema_rules import STRING_FORMATS
from chatlm.front.api.call_grammars import call_grammar, parameter_types, tool_grammar
from chatlm.front.api.dialects.openai import OPENAI_FIELDS
from chatlm.front.api.message_readers import openai_messages
from chatlm.front.api.fields import parse_fields, read_choice
from chatlm.front.api.readers import parse_openai_request
from chatlm.worker.engine.answer import Answer, RepeatedCalls
from chatlm.worker.engine.grammar import Grammar
from answers import calls_of
from engine_parts import use_tokenizer
from engines import draft_eagerly, load, make_engine, pieces, step_pieces
from fake_pool import FakePool, Letters, frames, serving
from nightly import WHOLE, by_day
from patching import patch
from works import assignment, told_with_types

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{{ message.content or '' }}{% for call in message.tool_calls or [] -%}
<tool_call>\n{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>
{%- endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TAG_FORMATS = [name for name, row in CALL_FORMATS.items() if row.tags]
ASK = {"messages": [{"role": "user", "content": "Weather in Rome?"}], "tools": [WEATHER, TIME]}


@pytest.fixture(scope="module")
def tokenizer(default_model_path):
    return open_tokenizer(replace(load(default_model_path).text, system=None, chat_template=TEMPLATE))


@pytest.fixture
def pool():
    pool = FakePool(list(CALL))
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    return pool


def read(tool_format, pieces, cut=False):
    tokenizer = Letters()
    tokenizer.tool_format = tool_format
    reader, told = AnswerReader(tokenizer, ["weather", "time"]), []
    for piece in pieces:
        reader.push(piece)
        told += reader.take()
    reader.finish(cut)
    told += reader.take()
    return together(told)


def together(deltas):
    """The text and the calls of an answer with these deltas."""
    calls = []
    for delta in (delta for delta in deltas if delta.kind == "call"):
        calls += [{"name": delta.name, "arguments": ""}] if delta.name else []
        calls[-1]["arguments"] += delta.text
    return "".join(delta.text for delta in deltas if delta.kind == "text"), calls


def deltas_of(pieces):
    return [delta for piece in pieces for delta in piece.deltas]


def joined(deltas):
    """The calls that a client assembles from a stream: only the first delta of a call has more than
    arguments."""
    calls = []
    for delta in deltas:
        if delta["index"] == len(calls):
            calls.append(
                {name: delta[name] for name in ("id", "type")} | {"function": dict(delta["function"])}
            )
        else:
            assert (
                delta["index"] == len(calls) - 1
                and delta.keys() == {"index", "function"}
                and delta["function"].keys() == {"arguments"}
            )
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


ROME, NOW = {"name": "weather", "arguments": '{"city": "Rome"}'}, {"name": "time", "arguments": "{}"}


@pytest.mark.parametrize(
    "tool_format, text, rest, calls",
    [
        ("tagged", CALL, "", [ROME]),
        (
            "tagged",
            "Let me see. " + CALL + '\n<tool_call>{"name": "time"}</tool_call>',
            "Let me see. ",
            [ROME, NOW],
        ),
        ("tagged", "1 < 2 and <tool> and <tool_cal", "1 < 2 and <tool> and <tool_cal", []),
        ("tagged", "<tool_call>no JSON</tool_call>!", "<tool_call>no JSON</tool_call>!", []),
        ("tagged", '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        ("tagged", '<tool_call>{"name": "time"', '<tool_call>{"name": "time"', []),
        (
            "tagged",
            '<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call> Done.',
            "Done.",
            [ROME],
        ),
        (
            "tagged",
            (
                '<tool_call>{"name": "weather", "arguments": {"a": [{}, "}</tool_call>\\\\\\"{"]}, "id":'
                ' 1}</tool_call>\n'
            ),
            "",
            [{"name": "weather", "arguments": '{"a": [{}, "}</tool_call>\\\\\\"{"]}'}],
        ),
        (
            "tagged",
            '<tool_call>{"name": "weather", "arguments": {"city": "Ro',
            "",
            [{"name": "weather", "arguments": '{"city": "Ro'}],
        ),
        (
            "tagged",
            '<tool_call>{"name": "rm", "arguments": {"x": 1}}</tool_call>',
            '<tool_call>{"name": "rm", "arguments": {"x": 1}}</tool_call>',
            [],
        ),
        ("json", '{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        (
            "json",
            ' [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}]',
            "",
            [ROME, NOW],
        ),
        ("json", '{"answer": 42}', '{"answer": 42}', []),
        ("json", "It is {late}.", "It is {late}.", []),
        ("json", "", "", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(tool_format, text, rest, calls):
    dice = random.Random(1)
    for _ in range(30):
        cuts = sorted(dice.sample(range(len(text) + 1), min(len(text), dice.randrange(6))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert read(tool_format, pieces) == (rest, calls)


class Tags(Letters):
    """Letters, and the tags of calls are special tokens."""

    vocab_size, tool_format = 259, "tagged"

    def __init__(self):
        super().__init__()
        self.specials |= {"<tool_call>": 257, "</tool_call>": 258}


OPEN, CLOSE = [257], [258]
ASKS = '\n{"name": "weather", "arguments": {"city": "Rome"}}\n'


def told_by(ids, resumed=0, tokenizer=None, **params):
    """What an answer tells after each of its tokens; the first `resumed` were drawn by a worker that died."""
    work = assignment(
        "a",
        (1,),
        SamplingParams(),
        999,
        resumed_ids=tuple(ids[:resumed]),
        tool_names=("weather", "time"),
        chat=True,
        **params,
    )
    answer, told = Answer(work, tokenizer or Tags()), []
    for number, token in enumerate(ids[resumed:], resumed + 1):
        answer.push(token, number, 999 - number)
        told.append(answer.take())
    return told


@pytest.mark.parametrize(
    "parts, params, rest, calls",
    [
        (["Well. ", OPEN, ASKS, CLOSE, "\n", OPEN, '{"name": "time"}', CLOSE], {}, "Well. ", [ROME, NOW]),
        (["It is ", CALL], {}, "It is " + CALL, []),  # looks like tags, of ordinary tokens
        (
            [OPEN, ASKS[:-9], '"</tool_call>"}}', CLOSE, "Done."],
            {},
            "Done.",
            [ROME | {"arguments": '{"city": "</tool_call>"}'}],
        ),
        (["Hm, ", OPEN, "no JSON", CLOSE, "!", CLOSE], {}, "Hm, no JSON!", []),
        (
            [OPEN, ASKS[:-6], CLOSE, " Oh."],
            {},
            "Oh.",
            [ROME | {"arguments": '{"city": "Ro'}],
        ),  # the tag ends what is incomplete
        ([OPEN, ASKS[:-6], OPEN, ASKS[-6:], CLOSE], {}, "", [ROME]),
        ([[0xE6], OPEN, ASKS, CLOSE, "日"], {}, "\ufffd日", [ROME]),  # a character that the tag cuts
        (["a", OPEN, ASKS, CLOSE, "bc"], {"stop": ('a\n', "ab", "bc")}, "a", [ROME]),
        (["<tool_call> ", OPEN, ASKS, CLOSE], {"stop": ("Rome", "_call> ")}, "<tool", []),
        (
            ["Well. ", OPEN, ASKS, CLOSE, OPEN, '{"name": "time"}', CLOSE, "!"],
            {"parallel_calls": False},
            "Well. ",
            [ROME],
        ),
    ],
)
def test_only_special_tokens_are_call_tags(parts, params, rest, calls):
    """Tags that are special tokens are seen, and ordinary text like them is text."""
    ids = [token for part in parts for token in (part if isinstance(part, list) else part.encode())]
    told = told_by(ids, **params)
    assert together([delta for deltas in told for delta in deltas]) == (rest, calls)
    for cut in range(len(ids)):  # a worker that takes over knows from the ids alone what has been told
        assert told_by(ids, cut, **params) == told[cut:]


# What the templates of these families say about calls (deepseek-ai/DeepSeek-V3.1, deepseek-ai/DeepSeek-R1, moonshotai/Kimi-K2-Thinking), after
# a list of the tools; the rest of these templates is left out.
TELLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.role + ': ' }}"
ENDS = "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
FAMILIES = {
    "deepseek": TELLS + """{%- if message['tool_calls'] -%}{%- for tool in message['tool_calls'] -%}
{%- if loop.first -%}{%- if message['content'] is none -%}{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}
{%- else -%}{{message['content'] + '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}{%- endif -%}
{%- else -%}{{'<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}{%- endif -%}
{%- endfor -%}{{'<｜tool▁calls▁end｜>'}}{%- else -%}{{ message.content }}{%- endif -%}""" + ENDS,
    "deepseek fenced": (
        TELLS
        + """{%- if message['tool_calls'] -%}{%- for tool in message['tool_calls'] -%}{%- if loop.first -%}
{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- else -%}
{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- endif -%}
{%- endfor -%}{{'<｜tool▁calls▁end｜>'}}{%- endif -%}{%- if message['content'] is not none -%}{{ message.content }}{%- endif -%}"""
        + ENDS
    ),
    "kimi": (
        TELLS
        + """{%- if message['role'] == 'tool' -%}## Return of {{ message.tool_call_id }}\n{%- endif -%}{{ message.content }}
{%- if message['tool_calls'] -%}<|tool_calls_section_begin|>{%- for tool_call in message['tool_calls'] -%}{%- set formatted_id = tool_call['id'] -%}
<|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{% if tool_call['function']['arguments'] is string %}{{ tool_call['function']['arguments'] }}{% else %}{{ tool_call['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>{%- endif -%}"""
        + ENDS
    ),
}
HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"c{number}", "type": "function", "function": call}
            for number, call in enumerate((ROME, NOW))
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Noon"},
]


@pytest.mark.parametrize("tool_format", FAMILIES)
def test_calls_are_read_in_the_family_s_words(default_model_path, tool_format):
    """Calls in the words of a family are read as its template writes them."""
    text = replace(load(default_model_path).text, system=None, chat_template=FAMILIES[tool_format])
    tokenizer = open_tokenizer(text)
    assert tokenizer.tool_format == tool_format and tokenizer.native_tools
    shown = tokenizer.show(tokenizer.render(openai_messages(HISTORY, with_tools=True), [WEATHER]))
    written = shown.partition("assistant: ")[2].partition("tool: ")[0]
    assert tool_format != "kimi" or "## Return of functions.time:1" in shown
    marks = [mark for mark in CALL_FORMATS[tool_format].markers if mark in written]
    assert len(marks) == 5
    for text in (written, "Let me see. " + written):
        for size in (1, 3, 7, 1000):
            told = read(tool_format, [text[at : at + size] for at in range(0, len(text), size)])
            assert told == (text.removesuffix(written), [ROME, NOW])
    for cut in range(len(written)):  # no part of a marker is text, nor a name that is cut
        told, calls = read(tool_format, [written[:cut]], cut=True)
        assert (told, [call["name"] for call in calls]) == ("", ["weather", "time"][: len(calls)])
    # the same from ids, where the markers are tokens, and a worker takes over anywhere
    words = {mark: 300 + number for number, mark in enumerate(marks)}
    pieces = re.split("(" + "|".join(map(re.escape, words)) + ")", written)
    ids = [token for piece in pieces for token in ([words[piece]] if piece in words else piece.encode())]
    told = told_by(ids, tokenizer=Marked(tool_format, words))
    assert together([delta for deltas in told for delta in deltas]) == ("", [ROME, NOW])
    names = [number for number, deltas in enumerate(told) for delta in deltas if delta.name]
    assert ids[names[0]] == ord("{") and len(told[names[0] + 1 :]) > len(
        "city"
    )  # the name came before the arguments
    for cut in range(len(ids)):
        assert told_by(ids, cut, tokenizer=Marked(tool_format, words)) == told[cut:]


# What the templates of these families say about calls (Qwen/Qwen3-Coder-30B-A3B-Instruct, zai-org/GLM-4.6, zai-org/GLM-4.7, ByteDance-Seed/Seed-OSS).
TAG_FAMILIES = {
    "qwen tags": (
        TELLS
        + """{{- message.content }}{%- for tool_call in message.tool_calls or [] %}{%- set tool_call = tool_call.function %}{{- '\n<tool_call>\n<function=' + tool_call.name + '>\n' }}
{%- for args_name, args_value in tool_call.arguments|items %}{{- '<parameter=' + args_name + '>\n' }}
{%- set args_value = args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string) else args_value | string %}{{- args_value }}{{- '\n</parameter>\n' }}
{%- endfor %}{{- '</function>\n</tool_call>' }}{%- endfor %}"""
        + ENDS
    ),
    "seed tags": (
        TELLS
        + """{{- message.content }}{%- for tool_call in message.tool_calls or [] %}{%- set tool_call = tool_call.function %}{{ "\n<seed:tool_call>\n<function=" + tool_call.name + ">\n" }}
{%- for arg_name, arg_value in tool_call.arguments | items %}{{ "<parameter=" + arg_name + ">" }}{%- set arg_value = arg_value if arg_value is string else arg_value | string %}{{ arg_value+"</parameter>\n" }}
{%- endfor %}{{ "</function>\n</seed:tool_call>" }}{%- endfor %}"""
        + ENDS
    ),
    "glm tags": (
        TELLS
        + """{{- message.content }}{% for tc in message.tool_calls or [] %}{%- set tc = tc.function %}{{ '\n<tool_call>' + tc.name }}
{% set _args = tc.arguments or {} %}
{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}"""
        + ENDS
    ),
    "glm tags without lines": (
        TELLS
        + """{{- message.content }}{% for tc in message.tool_calls or [] %}{%- set tc = tc.function %}{{ '<tool_call>' + tc.name }}
{%- for k, v in tc.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson if v is not string else v }}</arg_value>{% endfor %}</tool_call>{% endfor %}"""
        + ENDS
    ),
}
TRIP = {
    "type": "function",
    "function": {
        "name": "trip",
        "parameters": {
            "type": "object",
            "required": ["text", "days"],
            "$defs": {
                "Unit": {"enum": ["C", "F"]},
                "Stop": {"type": "object", "properties": {"at": {"type": "string"}}},
            },
            "properties": {
                "text": {"type": "string"},
                "days": {"type": "integer"},
                "share": {"type": "number"},
                "far": {"type": "boolean"},
                "unit": {"$ref": "#/$defs/Unit"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}},
                "first": {"$ref": "#/$defs/Stop"},
                "number": {"type": "string"},
                "anything": {},
            },
        },
    },
}
GO = {
    "text": 'Say "hi" to\n\n<b>Ro & \\ Bonn</b>, é日\n',
    "days": 3,
    "share": 0.5,
    "far": True,
    "unit": "F",
    "note": None,
    "stops": [{"at": "Rome"}, {"at": "</p>"}],
    "first": {"at": "Ulm"},
    "number": "007",
    "anything": [1, {"a": None}],
}
TRIPS = [
    {"name": "trip", "arguments": json.dumps(GO)},
    NOW,
    {"name": "trip", "arguments": '{"text": "", "days": -1}'},
]


told_of_trips = partial(told_with_types, tuple(map(parameter_types, (TRIP, TIME))))


@pytest.mark.parametrize("family", TAG_FAMILIES)
@pytest.mark.parametrize(
    "tokens",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["markers are tokens", "markers are text"],
)
def test_calls_in_tags_have_the_tools_types(default_model_path, family, tokens):
    """They are told as JSON of the types that the tools say."""
    tokenizer = open_tokenizer(
        replace(load(default_model_path).text, system=None, chat_template=TAG_FAMILIES[family])
    )
    tool_format = tokenizer.tool_format
    assert tool_format == " ".join(family.split()[:2]) and tokenizer.native_tools
    history = [
        HISTORY[0],
        HISTORY[1] | {"tool_calls": [{"type": "function", "id": "c", "function": call} for call in TRIPS]},
    ]
    shown = tokenizer.show(tokenizer.render(openai_messages(history, with_tools=True), [TRIP, TIME]))
    written = shown.partition("assistant: ")[2].removesuffix("assistant: ").strip()
    marks = [mark for mark in CALL_FORMATS[tool_format].markers if mark in written and tokens]
    reader = Marked(tool_format, words := {mark: 300 + number for number, mark in enumerate(marks)})
    parts = (
        re.split("(" + "|".join(map(re.escape, words)) + ")", "Well. " + written + "\n")
        if words
        else ["Well. " + written]
    )
    ids = [token for part in parts for token in ([words[part]] if part in words else part.encode())]
    told = told_of_trips(reader, ids)
    text, calls = together([said for each in told for said in each])
    assert (text.strip(), [(call["name"], json.loads(call["arguments"])) for call in calls]) == (
        "Well.",
        [(call["name"], json.loads(call["arguments"])) for call in TRIPS],
    )
    # the name comes first, and each letter of a string as soon as it is read
    deltas = [delta for each in told for delta in each if delta.kind == "call"]
    assert deltas[0].name == "trip" and len(deltas) > len(GO["text"])
    for cut in range(
        1, len(ids), 5 if WHOLE else 41
    ):  # a worker that takes over knows from the ids alone what has been told
        assert told_of_trips(reader, ids, cut) == told[cut:]
        text, calls = together(
            [said for each in told_of_trips(reader, ids[:cut], reason="length") for said in each]
        )
        assert (
            not re.search("<.*(tool|func|arg|param)", text)
            and [call["name"] for call in calls] == [call["name"] for call in TRIPS][: len(calls)]
        )
        assert all(json.loads(call["arguments"]) for call in calls[:-1] if call["name"] == "trip")
        if calls and calls[-1]["name"] == "trip" and tokens:  # what the model leaves open is closed
            whole = together([said for each in told_of_trips(reader, ids[:cut]) for said in each])[1]
            assert isinstance(json.loads(whole[-1]["arguments"]), dict)


@pytest.mark.parametrize(
    "text, rest, calls",
    [
        (
            "<function=time>\n</function>\n</tool_call> Done.",
            "Done.",
            [NOW],
        ),  # Qwen3-Coder may leave out the first tag
        (
            "<tool_call><function=trip>\n<parameter=text>\nRome",
            "",
            [TRIPS[0] | {"arguments": '{"text": "Rome"}'}],
        ),
        (
            "<tool_call> <function = trip> <parameter=text> **/a  </tool_call>!",
            "<tool_call> <function = trip> <parameter=text> **/a  </tool_call>!",
            [],
        ),
        (
            "<tool_call> <function=trip> <parameter=text> **/a  </tool_call>!",
            "!",
            [TRIPS[0] | {"arguments": '{"text": " **/a  "}'}],
        ),
        (
            (
                "<tool_call>\n<function=time>\n</function>\n<function=trip>\n<parameter=days>\nabout"
                " 3\n</parameter></function></tool_call>"
            ),
            "",
            [NOW, TRIPS[0] | {"arguments": '{"days": "about 3"}'}],
        ),
        (
            "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
            "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
            [],
        ),
        ("a <function=rm> b <fun", "a <function=rm> b <fun", []),
        ("<tool_call>\n<function=time>\n</function>\nWell", "Well", [NOW]),
        (
            (
                "<tool_call>\n<function=trip>\n<parameter=stops>\n[{'at':"
                " None}]\n</parameter>\n<parameter=far>\nFalse\n</parameter>\n<parameter=new>\nNaN\n</parameter></function></tool_call>"
            ),
            "",
            [TRIPS[0] | {"arguments": '{"stops": [{"at": null}], "far": false, "new": "NaN"}'}],
        ),
    ],
)
def test_wrong_tags_are_read_as_far_as_possible(text, rest, calls):
    """What models write amiss in tags."""
    for tokens in ({}, {"<tool_call>": 300, "</tool_call>": 301}):
        reader = Marked("qwen tags", tokens)
        parts = re.split("(</?tool_call>)", text)
        ids = [token for part in parts for token in ([tokens[part]] if part in tokens else part.encode())]
        told, found = together([said for each in told_of_trips(reader, ids) for said in each])
        lost = re.compile(
            "</?tool_call>" if tokens else "$^"
        )  # a special token that marks nothing has no text
        assert (told, found) == (lost.sub("", rest), calls)


@pytest.mark.parametrize(
    "parameters",
    [
        5,
        {"properties": 5},
        {"properties": {"a": 5, "b": True}},
        {"properties": {"a": {"$ref": "#/nope"}, "b": {"$ref": "#/properties/b"}, "c": {"type": [{}]}}},
        {
            "properties": {
                "a": {"anyOf": 5},
                "b": {"enum": 5},
                "c": {"enum": [1e999]},
                "d": {"anyOf": [{"$ref": "#/properties/d"}] * 9},
            }
        },
    ],
)
def test_untyped_values_are_read_by_their_look(parameters):
    """Schemas that say no types leave values to how they look."""
    types = parameter_types({"function": {"name": "f", "parameters": parameters}})
    assert set(types.values()) <= {""}


class Marked(Letters):
    """Letters, and markers that are special tokens."""

    vocab_size = 320

    def __init__(self, tool_format, words):
        super().__init__()
        self.tool_format = tool_format
        self.specials = self.specials | words


def test_only_templates_that_read_tools_know_them(default_model_path):
    assert not open_tokenizer(load(default_model_path).text).native_tools
    assert tool_format_of(TEMPLATE) == "tagged"
    assert tool_format_of("{%- if not tools is defined %}{% endif %}") == "json"
    assert tool_format_of("You have no tools. {{ messages }}") is None


def test_the_template_gets_tools_and_earlier_calls(tokenizer):
    messages = openai_messages(
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Rome<|im_end|>"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
        ],
        with_tools=True,
    )
    tokens = tokenizer.render(messages, [WEATHER])
    text = tokenizer.show(tokens)
    assert '# Tools\n{"type": "function", "function": {"name": "weather"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome<|im_end|>"}}\n</tool_call>' in text
    assert text.endswith("<|im_start|>tool\nSunny<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.specials["<|im_end|>"]
    assert tokens.count(end) == 4  # the one inside the argument is text
    assert tokenizer.render(messages[:1]) == tokenizer.render(messages[:1], [])


def test_what_is_too_deep_for_the_template_is_refused(tokenizer):
    deep = {}
    for _ in range(3000):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="nested too deeply"):
        tokenizer.render([Message("user", "x")], [{"function": deep}])


@pytest.mark.parametrize("field", ["tools", "response_format", "stream_options", "metadata"])
async def test_a_field_s_values_are_not_searched_deeply(pool, field):
    deep = {}
    for _ in range(500):  # json.loads takes more
        deep = {"a": deep}
    body = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}],
        "metadata": deep,
        "stream_options": deep,
        "response_format": {"type": "json_schema", "json_schema": {"schema": deep}},
    }
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        async with client.post(url + "/v1/chat/completions", json=ASK | {field: body[field]}) as response:
            assert response.status in (200, 400), await response.text()


async def test_a_call_is_a_message_without_text(pool):
    """It has tool_calls and no text."""
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        body = await (await client.post(url + "/v1/chat/completions", json=ASK)).json()
    (choice,) = body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["function"] == ROME and call["id"].startswith("call_")
    assert pool.requests[0].tools == (WEATHER, TIME)


async def test_a_call_streams_its_name_then_its_arguments(pool):
    """Arguments come in pieces, and tags never show."""
    pool.pieces = ["Sure. ", *CALL, "\n", '<tool_call>{"name": "time", "arguments": {}}</tool_call>']
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        *chunks, done = frames(
            await (await client.post(url + "/v1/chat/completions", json=ASK | {"stream": True})).read()
        )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"] for call in joined(calls)] == [ROME, NOW]
    assert [call["index"] for call in calls] == [0] * len(ROME["arguments"]) + [
        1
    ]  # its letters came one by one
    assert "".join(delta.get("content") or "" for delta in deltas) == "Sure. "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "tool_calls"
    ]


@pytest.mark.parametrize(
    "tool_format, text",
    [
        (
            "tagged",
            (
                'Sure. <tool_call>{"name": "time", "arguments": {}}</tool_call>\n<tool_call>{"name":'
                ' "weather", "arguments": {"city": "Rome"}}</tool_call>'
            ),
        ),
        (
            "mistral",
            (
                'Sure. [TOOL_CALLS][{"name": "time", "arguments": {}}, {"name": "weather", "arguments":'
                ' {"city": "Rome"}}]'
            ),
        ),
        ("lfm2", 'Sure. <|tool_call_start|>[time(), weather(city="Rome")]<|tool_call_end|>'),
        (
            "minicpm fenced",
            'Sure. <|tool_call_start|>\n```python\ntime()\nweather(city="Rome")\n```\n<|tool_call_end|>',
        ),
        (
            "gemma",
            (
                'Sure.'
                ' <|tool_call>call:time{}<tool_call|><|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
            ),
        ),
    ],
)
def test_no_part_of_a_cut_tag_is_text(tool_format, text):
    for cut in range(len(text)):
        told, calls = read(tool_format, [text[:cut]], cut=True)
        assert told == "Sure. "[:cut], text[:cut]
        assert [call["name"] for call in calls] == ["time", "weather"][: len(calls)]


@pytest.mark.parametrize("length, content, arguments", [(30, "", None), (51, None, '{"city')])
async def test_a_cut_call_finishes_as_length(pool, length, content, arguments):
    """It is its beginning, but never text."""
    pool.pieces, pool.reason, pool.stop_reason = [CALL[:length]], "length", "max_tokens"
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        body = await (await client.post(url + "/v1/chat/completions", json=ASK)).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == content
    assert [call["function"]["arguments"] for call in choice["message"].get("tool_calls", [])] == (
        [arguments] if arguments else []
    )


@pytest.mark.parametrize(
    "change, code",
    [
        ({"tools": [{"type": "function", "function": {}}]}, "invalid_value"),
        ({"tools": "x"}, "invalid_value"),
        ({"tools": [None]}, "invalid_value"),
        ({"tool_choice": "sometimes"}, "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "invalid_value"),
        ({"tools": None, "tool_choice": "required"}, "invalid_value"),
        ({"functions": [{}]}, "invalid_value"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "invalid_value"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}],
                "tool_choice": "required",
            },
            "invalid_json_schema",
        ),
    ],
)
async def test_what_is_no_tool_is_400(pool, change, code):
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        async with client.post(url + "/v1/chat/completions", json=ASK | change) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    "tool_format",
    [
        "tagged",
        "json",
        "deepseek",
        "deepseek fenced",
        "kimi",
        "lfm2",
        "minicpm fenced",
        "gemma",
        *TAG_FORMATS,
    ],
)
def test_a_tool_s_references_are_to_its_parameters(tool_format):
    """Nested models as pydantic writes them: $defs, and $refs to them that start at the parameters' root."""
    parameters = {
        "$defs": {"City": {"enum": ["Rome"]}},
        "type": "object",
        "required": ["city"],
        "additionalProperties": False,
        "properties": {"city": {"$ref": "#/$defs/City"}, "next": {"$ref": "#"}},
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("go", "fly")
    ]
    check_grammar(tool_grammar(tools, tool_format, True), "tools")
    with pytest.raises(RequestError, match="/nope"):
        wrong = parameters | {"properties": {"city": {"$ref": "#/nope"}}}
        check_grammar(
            tool_grammar([{"function": {"name": "go", "parameters": wrong}}], tool_format, True), "tools"
        )


@pytest.fixture(scope="module")
def engine(default_model_path):
    return make_engine(default_model_path, num_pages=100, max_batch=8, as_stored=True)


@pytest.mark.parametrize(
    "tool_format",
    by_day(
        [
            "tagged",
            "json",
            "tagged by special tokens",
            "deepseek",
            "deepseek fenced",
            "kimi",
            "lfm2",
            "gemma",
            *TAG_FORMATS,
        ],
        "tagged by special tokens",
        "deepseek fenced",
        "lfm2",
        "gemma",
        *list(TAG_FORMATS)[:1],
    ),
)
@pytest.mark.parametrize(
    "choice", by_day(["required", {"type": "function", "function": {"name": "weather"}}], "required")
)
def test_a_model_without_tools_makes_required_calls(engine, tool_format, choice, monkeypatch):
    """A required call is made by a model that has never heard of tools."""
    if tool_format == "tagged by special tokens":
        tool_format = "tagged"
        monkeypatch.setitem(engine.tokenizer.specials, "<tool_call>", 1)
    monkeypatch.setattr(engine.tokenizer, "tool_format", tool_format)
    values = parse_fields(
        ASK | {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}, OPENAI_FIELDS
    )
    request = parse_openai_request(values, Settings(), tool_format)
    prompt = tuple(engine.tokenizer.render([Message("user", "Weather in Rome?")]))
    work = assignment(
        "a",
        prompt,
        SamplingParams(0.0),
        80,
        grammar=request.params.grammar,
        grammar_param="tools",
        tool_names=request.params.tool_names,
        chat=True,
    )
    text, calls = together(deltas_of(pieces(engine, [work])["a"]))
    assert (
        text == ""
        and [call["name"] for call in calls] == ["weather"]
        and len(json.loads(calls[0]["arguments"])["city"]) <= 10
    )


def test_the_default_model_makes_several_calls(default_model_path):
    """The default model makes several calls in tags, and so does a worker that takes over."""
    engine = make_engine(default_model_path, num_pages=200, max_batch=8, as_stored=True)
    text = replace(load(default_model_path).text, system=None, chat_template=TAG_FAMILIES["qwen tags"])
    use_tokenizer(engine, open_tokenizer(text))
    tool = {
        "type": "function",
        "function": {
            "name": "trip",
            "parameters": {
                "type": "object",
                "required": ["city", "days", "kind"],
                "properties": {
                    "city": {"type": "string", "minLength": 3, "maxLength": 12, "pattern": "^[A-Z][a-z ]+$"},
                    "days": {"type": "integer", "minimum": 2, "maximum": 9},
                    "kind": {"enum": ["beach", "5", 5]},
                    "with": {
                        "type": ["array", "null"],
                        "items": {"type": "string", "maxLength": 9},
                        "maxItems": 2,
                    },
                },
            },
        },
    }
    values = parse_fields(
        ASK | {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": True}, OPENAI_FIELDS
    )
    request = parse_openai_request(values, Settings(), "qwen tags")
    assert request.params.tool_types == (
        {"city": "string", "days": "integer", "kind": "integer number string", "with": "array null"},
    )
    check_grammar(request.params.grammar, "tools")
    prompt = tuple(
        engine.tokenizer.render([Message("user", "Two days in Rome, then three in Bonn.")], [tool])
    )
    work = assignment(
        "a",
        prompt,
        SamplingParams(0.7, seed=2),
        400,
        grammar=request.params.grammar.replace('("\\n" call){0,63}', '"\\n" call'),
        grammar_param="tools",
        tool_names=request.params.tool_names,
        tool_types=request.params.tool_types,
        chat=True,
    )
    found = pieces(engine, [work])["a"]
    text, calls = together(deltas_of(found))
    assert (
        text == ""
        and [call["name"] for call in calls] == ["trip", "trip"]
        and found.end.stop_reason == "grammar"
    )
    for call in calls:
        arguments = json.loads(call["arguments"])
        assert (
            re.fullmatch("[A-Z][a-z ]{2,11}", arguments["city"])
            and 2 <= arguments["days"] <= 9
            and arguments["kind"] in ("beach", 5)
        )
        assert len(arguments.get("with") or ()) <= 2
    for cut in (*([3] if WHOLE else []), len(found) // 2, len(found) - 9):
        ids = tuple(token for piece in found[:cut] for token in piece.tokens)
        rest = pieces(engine, [replace(work, id="b", resumed_ids=ids)])["b"]
        assert [token for piece in rest for token in piece.tokens] == [
            token for piece in found[cut:] for token in piece.tokens
        ]
        assert "".join(delta.name + delta.text for delta in deltas_of(rest)) == "".join(
            delta.name + delta.text for delta in deltas_of(found[cut:])
        )


@pytest.mark.parametrize(
    "body, many",
    [
        ({"tool_choice": "required"}, False),
        ({"tool_choice": "required", "parallel_tool_calls": True}, True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, False),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
                "parallel_tool_calls": True,
            },
            False,
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "weather"}}],
                    },
                },
                "parallel_tool_calls": True,
            },
            True,
        ),
    ],
)
def test_a_required_call_is_one_unless_parallel(body, many):
    """A required call is one unless parallel calls are asked for."""
    request = parse_openai_request(
        parse_fields(ASK | {"tools": [WEATHER]} | body, OPENAI_FIELDS), Settings(), "tagged"
    )
    assert ("{0,63}" in request.params.grammar.split("\ncall:")[0]) == many


@pytest.mark.parametrize(
    "choice, many",
    [
        ({"type": "any"}, None),
        ({"type": "any", "disable_parallel_tool_use": True}, False),
        ({"type": "any", "disable_parallel_tool_use": False}, True),
        ({"type": "tool", "name": "f", "disable_parallel_tool_use": False}, False),
        ("required", None),
    ],
)
def test_messages_choose_whether_calls_are_several(choice, many):
    """A choice of Messages says itself whether several calls may come."""
    assert read_choice(choice) == ("required", ("f",) if "name" in choice else None, many)


@pytest.mark.parametrize("cut", [1, 2, 3, 99])
def test_a_repeating_call_is_held_back(cut):
    def told(*calls):
        repeated, text = RepeatedCalls(), []
        for name, arguments in calls:
            parts = [arguments[place : place + cut] for place in range(0, len(arguments), cut)]
            for more in [Delta("call", "", name), *(Delta("call", part) for part in parts)]:
                assert not repeated.complete
                text.append(repeated.push(more))
        return (
            "".join(f"|{more.name}:{more.text}" if more.name else more.text for more in text),
            repeated.complete,
        )

    a, ab, b = ("f", '{"x": 1}'), ("f", '{"x": 12}'), ("g", '{"x": 1}')
    assert told(a, ab, b) == ('|f:{"x": 1}|f:{"x": 12}|g:{"x": 1}', False)
    assert (
        told(a, a) == ('|f:{"x": 1}', True)
        and told(a, b, b) == ('|f:{"x": 1}|g:{"x": 1}', True)
        and told(a, b, a)[1] is False
    )
    assert told(("f", "{}"), ("f", "{}"))[1] and told(a)[1] is False


@pytest.mark.parametrize("tool_format", by_day(["tagged", "qwen tags"], "tagged"))
def test_a_repeated_call_ends_the_answer(engine, tool_format, monkeypatch):
    """The same after another worker takes over; without parallel calls there is one."""
    monkeypatch.setattr(engine.tokenizer, "tool_format", tool_format)
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"on": {"type": "boolean"}},
                    "required": ["on"],
                },
            },
        }
        for name in ("light", "heating")
    ]
    prompt = tuple(engine.tokenizer.render([Message("user", "Switch the light on.")]))

    def work(name, seed, parallel=True, **more):
        values = parse_fields(
            ASK | {"tools": tools, "tool_choice": "required", "parallel_tool_calls": parallel}, OPENAI_FIELDS
        )
        params = parse_openai_request(values, Settings(), tool_format).params
        return assignment(
            name,
            prompt,
            SamplingParams(1.0, seed=seed),
            900,
            grammar=params.grammar,
            grammar_param="tools",
            tool_names=params.tool_names,
            tool_types=params.tool_types,
            chat=True,
            **more,
        )

    works = [work(f"a{seed}", seed) for seed in range(6)]
    batched, counts = pieces(engine, works), []
    for one in works:
        found = batched[one.id]
        text, calls = together(deltas_of(found))
        said = [(call["name"], call["arguments"]) for call in calls]
        assert (
            text == ""
            and all(before != after for before, after in zip(said, said[1:]))
            and all(set(json.loads(arguments)) == {"on"} for _, arguments in said)
        )
        counts.append((found.end.stop_reason, len(said)))
    assert "repeated call" in dict(counts) and max(number for _, number in counts) > 1, counts
    repeating = next(one for one, (reason, _) in zip(works, counts) if reason == "repeated call")
    ids = [token for piece in batched[repeating.id] for token in piece.tokens]
    for cut in (len(ids) // 2, len(ids) - 6, len(ids) - 1):
        rest = pieces(engine, [replace(repeating, id="b", resumed_ids=tuple(ids[:cut]))])["b"]
        assert [token for piece in rest for token in piece.tokens] == ids[
            cut:
        ] and rest.end.stop_reason == "repeated call"
    one = pieces(engine, [work("c", 0, parallel=False)])["c"]
    assert len(together(deltas_of(one))[1]) == 1 and one.end.stop_reason == "grammar"


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ({"type": "object", "required": 5}, "properties of one object"),
        ({"properties": {"a": 5}}, ""),
        ({"properties": {"a" * 201: {}}}, "1 to 200 characters"),
        ({"properties": []}, "properties of one object"),
        ({"properties": {"a>b": {}}}, "a>b"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|(b$"}}}, "unclosed group"),
        ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}, "required": ["a"]}, ""),
        ({"properties": {"a": {"type": "nope"}}}, "type must be one of"),
        ({"type": "string"}, "no object fits"),
    ],
)
def test_parameters_unfit_for_tags_are_refused(parameters, reason):
    """Parameters that tags cannot have are refused where a call is required."""
    with pytest.raises(RequestError, match="(?i)tools.*" + reason):
        check_grammar(
            tool_grammar([{"function": {"name": "f", "parameters": parameters}}], "glm tags", True), "tools"
        )


def pushed(tool_format, start, rest, types=()):
    """What is told of an answer after its start, and a reader that has read it."""
    tokenizer = Letters()
    tokenizer.tool_format = tool_format
    reader = AnswerReader(tokenizer, ["f"], types)
    reader.push(start)
    for piece in rest:
        reader.push(piece)
    reader.finish()
    return together(reader.take())


def test_a_repetitive_answer_is_cheap_to_read(monkeypatch):
    """Each piece that arrives has the reader search what is new, not all that it holds."""
    searched = []

    class Counted:
        def __init__(self, pattern):
            self.pattern = pattern

        def search(self, text, start=0):
            searched.append(len(text) - start)
            return self.pattern.search(text, start)

        def __getattr__(self, name):
            return getattr(self.pattern, name)

    class CountingRe:
        def compile(self, *pattern):
            return Counted(chat_server_re.compile(*pattern))

        def __getattr__(self, name):
            return getattr(chat_server_re, name)

    chat_server_re = re
    patch(monkeypatch, text_calls, "re", CountingRe())
    listed = ", ".join(["1"] * 3000)
    assert pushed(
        "qwen tags",
        "<tool_call><function=f>",
        [*" " * 3000, "<parameter=a>\n[", *listed, "]\n</parameter></function>"],
    ) == ("", [{"name": "f", "arguments": '{"a": [' + listed + "]}"}])
    assert len(searched) > 10_000 and max(searched) < 600


@pytest.mark.parametrize(
    "tool_format, start, end",
    [
        ("qwen tags", "<tool_call>\n<function=f>\n<parameter=", ">\n1\n</parameter>\n</function>"),
        ("glm tags", "<tool_call>f\n<arg_key>", "</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"),
    ],
)
def test_parameter_names_in_tags_have_a_length(tool_format, start, end):
    """Names of parameters in tags have a length, and white space in them costs little."""
    # 20,000 spaces: a search whose cost grows with their square takes minutes
    assert (
        pushed(tool_format, start, [" " * 20_000, "a" + " " * 20_000 + "b", end, end])[1][0]["arguments"]
        == "{}"
    )
    assert pushed(tool_format, start, [" a  b ", end])[1] == [{"name": "f", "arguments": '{"a  b": 1}'}]
    assert pushed(tool_format, "<tool_call>" + " " * 20_000, ["!"])[1] == []


VALUE = '{"a": ["x</parameter>\\"\\n</parameter>\\n</tool_call>"]}'


@pytest.mark.parametrize(
    "value, more, told",
    [
        (VALUE, "\n</parameter>\n<parameter=b>\n2\n</parameter>\n", f'{{"p": {VALUE}, "b": 2}}'),
        (VALUE, "</tool_call>", f'{{"p": {VALUE}}}'),
        (VALUE, "", f'{{"p": {VALUE}}}'),  # the answer ends in the value
        (
            '{"a": "x',
            '\n</parameter>\n<parameter=b>\n2\n</parameter>\n',
            '{"p": "{\\"a\\": \\"x", "b": 2}',
        ),  # its string never ends
        ('say "x', "</parameter>\n<parameter=b>\n2</parameter>\n", '{"p": "say \\"x", "b": 2}'),
    ],
)
@pytest.mark.parametrize("tokens", [{}, {"<tool_call>": 300, "</tool_call>": 301}], ids=["text", "tokens"])
def test_a_value_ends_at_the_first_tag_outside_a_string(value, more, told, tokens):
    """A value ends at the first tag that is not inside a string of its JSON."""
    text = f"<tool_call><function=f><parameter=p>\n{value}{more}" + "</function></tool_call>Done." * (
        more != "" and more != "</tool_call>"
    )
    tokenizer = Marked("qwen tags", tokens)
    outer = re.split("(^<tool_call>|</tool_call>(?=Done|$))", text)
    ids = [token for part in outer for token in ([tokens[part]] if part in tokens else part.encode())]
    work = assignment("a", (1,), SamplingParams(), 999, chat=True, tool_names=("f",))
    answer = Answer(work, tokenizer)
    for number, token in enumerate(ids, 1):
        answer.push(token, number, 999)
    answer._end("stop", "eos")
    rest, calls = together(answer.take())
    assert (rest, calls) == ("Done." * text.endswith("Done."), [{"name": "f", "arguments": told}])


@pytest.mark.parametrize("rest", ["", "\n", "<", "\n</tool", "<func"])
def test_an_answer_after_a_tag_call_gets_no_other_text(rest):
    """An answer that ends after a call in tags gets no text that the model did not write."""
    assert pushed("qwen tags", "<function=f>\n</function>", [rest]) == (
        "",
        [{"name": "f", "arguments": "{}"}],
    )


def test_long_values_are_not_read_as_python():
    """Long values and expressions are not read as Python."""
    assert typed_value("[True, 'a', None]", "") == '[true, "a", null]'
    for text in ("0x10", "1_000", "(1)", "[" + "'a'," * 3000 + "]"):
        assert typed_value(text, "") == json.dumps(text)


class Counted(dict):
    """A schema that counts how often it is read."""

    reads = 0

    def get(self, *key):
        Counted.reads += 1
        return super().get(*key)

    def keys(self):
        Counted.reads += 1
        return super().keys()


def test_small_schemas_that_say_much_cost_little(monkeypatch):
    parameters = {
        "properties": {f"p{number}": {"$ref": "#/$defs/x"} for number in range(600)},
        "$defs": {"x": {"anyOf": [Counted(enum=[*range(64)])] * 62}},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in "fg"]
    values = parse_fields(ASK | {"tools": tools}, OPENAI_FIELDS)
    types = parse_openai_request(values, Settings(), "qwen tags").params.tool_types
    assert (
        types[0]["p0"] == "integer number"
        and types[1].get("p599", "") == ""
        and 100 < Counted.reads < 100_000
    )
    # what a required call's grammar refers to often is in it once
    item = {"type": "array", "items": {"$ref": "#/$defs/x"}}
    parameters = {
        "properties": {f"p{number}": {"anyOf": [item] * 62} for number in range(10)},
        "$defs": {"x": {"enum": ["x" * 30_000]}},
    }
    assert (
        tool_grammar([{"function": {"name": "f", "parameters": parameters}}], "qwen tags", True).count(
            "x" * 30_000
        )
        == 1
    )
    many = {"properties": {str(number): {} for number in range(2000)}}
    for parameters in (
        {"allOf": [{"anyOf": [{}, {}]}] * 10},
        {"$ref": "#"},
        many | {"anyOf": [{}, {}]},
    ):  # 1024 forms; one without end; 4000 parameters
        with pytest.raises(RequestError, match="nested too deeply|too many schemas|at most 65536"):
            tool_grammar([{"function": {"name": "f", "parameters": parameters}}], "qwen tags", True)


@pytest.mark.parametrize("kind", STRING_FORMATS)
def test_a_string_in_tags_has_its_json_format(kind):
    """JSON grammars know more of months, and of IPv4 within IPv6."""
    import llguidance

    root = {"properties": {"a": {"type": "string", "format": kind}}}
    grammars = {
        "<tool_call>\n<function=f>\n<parameter=a>\n%s\n</parameter>\n</function>\n</tool_call>": tool_grammar(
            [{"function": {"name": "f", "parameters": root}}], "qwen tags", False
        ),
        '"%s"': json_grammar(root["properties"]["a"], "a"),
    }
    texts = (
        "2026-11-21",
        "2026-13-01",
        "23:59:60Z",
        "12:00:00.5+02:00",
        "12:00:00",
        "24:00:00Z",
        "2026-11-21T12:00:00Z",
        "2026-11-21 12:00:00Z",
        "P1D",
        "P1Y2M",
        "PT1H2M",
        "P",
        "P1DT",
        "a@b",
        "a.b+c@d-e.f",
        "a b@c.d",
        "@b.c",
        "a-b.c",
        "-a",
        "1.2.3.4",
        "256.1.1.1",
        "01.2.3.4",
        "::1",
        "2001:db8::ff00:42:8329",
        "g::1",
        "::",
        "1::",
        "1:2:3:4:5:6:7:8",
        "1:2:3:4:5:6:7::",
        "::2:3:4:5:6:7:8",
        "1::3:4:5:6:7:8",
        "1:2:3:4:5:6:7",
        "1::2::3",
        "1:2::3:4:5:6:7:8",
        "12345678-1234-1234-1234-1234567890aB",
        "http://a/b?c=d#e",
        "a:b",
        "//a",
        "http://a b",
        "",
    )
    said = []
    for before, grammar in grammars.items():
        compiled = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
        matchers = [(compiled.deep_copy(), before % text) for text in texts]
        said.append(
            [
                text
                for text, (matcher, whole) in zip(texts, matchers)
                if matcher.consume_tokens(list(whole.encode())) and matcher.is_accepting()
            ]
        )
    assert said[0] == said[1] and said[0]


@pytest.mark.parametrize("tool_format", ["tagged", "qwen tags"])
def test_names_too_long_for_a_worker_are_refused(tool_format):
    """Names that do not fit into a message to a worker."""
    long = {"type": "function", "function": {"name": "f" * 1_400_000}}
    many = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {f"{number:0199d}": {} for number in range(6_000)}},
        },
    }
    for tool in (long, *[many] * (tool_format == "qwen tags")):
        values = parse_fields(ASK | {"tools": [tool]}, OPENAI_FIELDS)
        with pytest.raises(RequestError, match=r"names.* in tools take 1,\d+,\d+ bytes, at most 1,048,576"):
            parse_openai_request(values, Settings(), tool_format)
    assert parameter_types({"function": {"parameters": {"properties": {"a" * 201: {}, "b": {}}}}}) == {
        "b": ""
    }


@pytest.mark.parametrize(
    "schema, types",
    [
        ({"type": "string", "anyOf": [{"format": "date"}, {"format": "time"}]}, "string"),
        ({"type": "string", "allOf": [{"minLength": 1}]}, "string"),
        ({"type": ["string", "null"], "enum": ["x", None]}, "null string"),
        ({"type": "integer", "enum": [1, 2]}, "integer"),
        ({"type": "string", "$ref": "#/$defs/few"}, "string"),
    ],
)
def test_what_stands_beside_schema_branches_counts(schema, types):
    assert parameter_types(
        {"function": {"parameters": {"properties": {"a": schema}, "$defs": {"few": {"maxLength": 3}}}}}
    ) == {"a": types}


@pytest.mark.parametrize(
    "parameters, allowed, refused",
    [
        (
            {"properties": {"a": {"type": ["string", "null"], "enum": ["x", None]}}},
            [{"a": "x"}, {"a": "null"}],
            [{"a": "y"}, {"a": "5"}],
        ),
        (
            {"properties": {"a": {"enum": [1, "x", {"b": 2}]}}},
            [{"a": "x"}, {"a": "1"}, {"a": '{"b": 2}'}],
            [{"a": "2"}, {"a": '"x"'}],
        ),
        (
            {"properties": {"a": {"type": "string", "pattern": r"^https?:\/\/"}}},
            [{"a": "http://b"}],
            [{"a": "b"}],
        ),
        ({"properties": {"a": {"type": "string", "pattern": "^a//b/$"}}}, [{"a": "a//b/"}], [{"a": "a/b/"}]),
        (
            {"properties": {"a": {"type": "string", "pattern": r"^\d+\$"}}},
            [{"a": "5$"}, {"a": "5$ each"}],
            [{"a": "5"}],
        ),
        ({"properties": {"a": {"type": "string", "pattern": "^a\nb$"}}}, [{"a": "a\nb"}], [{"a": "ab"}]),
        ({"properties": {"a": {"type": "string", "allOf": [{"minLength": 2}]}}}, [{"a": "xy"}], [{"a": "x"}]),
        (
            {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": "x"}, {"b": "x"}, {"a": "x", "b": "x"}],
            [{}],
        ),
        (
            {"properties": {"a": {"type": "string", "format": "date"}}},
            [{"a": "2026-11-21"}],
            [{"a": "2026-11"}, {"a": "today"}],
        ),
        (
            {
                "properties": {
                    "a": {
                        "allOf": [
                            {"pattern": "^a"},
                            {"pattern": "b$"},
                            {"anyOf": [{"minLength": 3}, {"type": "null"}]},
                        ],
                        "type": "string",
                    }
                }
            },
            [{"a": "acb"}],
            [{"a": "ab"}, {"a": "bca"}, {"a": "null"}],
        ),
        (
            {
                "properties": {
                    "a": {
                        "anyOf": [
                            {"type": "string", "format": "ipv4"},
                            {"allOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"},
                        ]
                    }
                }
            },
            [{"a": "1.2.3.4"}, {"a": "2"}],
            [{"a": "4"}, {"a": "1.2.3.400"}],
        ),
        (
            {
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/o"}, {"properties": {"c": {"const": 2}}}]}},
                "$defs": {"o": {"type": "object", "properties": {"b": {"const": 1}}, "required": ["b"]}},
            },
            [{"a": '{"b": 1, "c": 2}'}],
            [{"a": '{"c": 2}'}, {"a": '{"b": 1, "c": 3}'}, {"a": "b"}],
        ),
        (
            {
                "allOf": [
                    {"$ref": "#/$defs/base"},
                    {"properties": {"b": {"type": "integer"}, "a": {"maxLength": 1}}, "required": ["b"]},
                ],
                "$defs": {"base": {"properties": {"a": {"type": "string"}}, "required": ["a"]}},
            },
            [{"a": "x", "b": "1"}],
            [{"a": "x"}, {"a": "xy", "b": "1"}],
        ),
        (
            {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            [{}, {"a": "null", "b": "1", "c d": "2"}],
            [{"b": "x"}, {"a": "1"}],
        ),
        ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": "x"}], [{"b": "x"}]),
        ({"additionalProperties": True}, [{"a": "x"}], []),
        (
            {
                "properties": {"a": {}},
                "required": ["a"],
                "anyOf": [{"properties": {"b": {"type": "null"}}, "required": ["b"]}, {}],
            },
            [{"a": "x"}, {"a": "x", "b": "null"}],
            [{"b": "null"}, {"a": "x", "b": "y"}],
        ),
    ],
)
def test_a_required_call_in_tags_has_allowed_values(parameters, allowed, refused):
    import llguidance

    grammar = tool_grammar([{"function": {"name": "f", "parameters": parameters}}], "qwen tags", False)
    check_grammar(grammar, "tools")

    def fits(arguments):
        matcher = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
        values = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items())
        return (
            matcher.consume_tokens(
                list(f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>".encode())
            )
            and matcher.is_accepting()
        )

    assert all(map(fits, allowed)) and not any(map(fits, refused))


@pytest.mark.parametrize("tool_format", TAG_FORMATS)
@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"allOf": 5}, "allOf must be a list of schemas, not 5"),
        ({"allOf": [5]}, "a schema must be an object, true or false, not 5"),
        ({"properties": ["a"]}, "properties must be an object of schemas, not a list of 1"),
        ({"properties": {"a": None}}, "a schema must be an object, true or false, not null"),
        (
            {"properties": {"a": {}}, "required": [["a"]]},
            "required must be a list of strings, not a list of 1",
        ),
        ({"required": "a"}, "required must be a list of strings, not \"a\""),
        (
            {"type": "objects"},
            (
                "type must be one of null, boolean, string, number, integer, array, object, or a list of"
                " these, not \"objects\""
            ),
        ),
        *(
            ({"properties": {"a": {"type": "string", **wrong}}}, said)
            for wrong, said in (
                ({"minLength": 1e999}, "minLength must be an integer of at least 0, not Infinity"),
                ({"maxLength": "5"}, "maxLength must be an integer of at least 0, not \"5\""),
                ({"minLength": -1}, "minLength must be an integer of at least 0, not -1"),
                ({"anyOf": {}}, "anyOf must be a list of schemas, not an object of 0"),
                ({"oneOf": "x"}, "oneOf must be a list of schemas, not \"x\""),
                ({"pattern": 5}, "pattern must be a string, not 5"),
                ({"pattern": "a\\"}, 'the pattern "a\\\\" cannot be read: it ends within an escape'),
                ({"format": []}, "format must be a string, not a list of 0"),
                ({"enum": {"x": 1}}, "enum must be a list, not an object of 1"),
                ({"$ref": 5}, "$ref must be a string, not 5"),
                ({"allOf": [False]}, "no value fits \"a\""),
            )
        ),
        (
            {"properties": {"a": {"type": "number", "maximum": float("nan")}}},
            "maximum must be a finite number, not NaN",
        ),
    ],
)
def test_a_wrong_keyword_in_tag_parameters_is_refused(tool_format, parameters, said):
    """As for required calls, so for strict functions; what the model may call freely is only described to
    it."""
    function = {"name": "f", "parameters": parameters}
    for make in (
        lambda: tool_grammar([{"function": function}], tool_format, True),
        lambda: call_grammar(function, tool_format),
    ):
        with pytest.raises(RequestError) as refused:
            make()
        assert str(refused.value).startswith("tools cannot be enforced: ") and str(refused.value).endswith(
            said
        )
    assert set(parameter_types({"function": function}).values()) <= {"", "string", "number", "integer number"}


def test_large_shared_schema_members_are_read_rarely(monkeypatch):
    """A pattern of 50,000 slashes, referred to 60 times, held up the event loop for 1.5 s."""
    read, text_with = [], schema_rules.text_with
    patch(
        monkeypatch,
        schema_rules,
        "text_with",
        lambda pattern: read.append(len(pattern)) or text_with(pattern),
    )
    often = [{"$ref": "#/$defs/e"}] * 60

    def refused(parameters):
        with pytest.raises(RequestError, match="at most 65536 characters|too many schemas"):
            tool_grammar([{"function": {"name": "f", "parameters": parameters}}], "qwen tags", True)

    refused({"properties": {"p": {"allOf": often}}, "$defs": {"e": {"pattern": "/" * 50_000}}})
    assert 1 <= read.count(50_000) <= 2
    refused({"allOf": often, "$defs": {"e": {"properties": {str(number): {} for number in range(6000)}}}})


@pytest.mark.parametrize("tool_format", CALL_FORMATS)
def test_lone_surrogates_in_a_function_are_refused(tool_format):
    """Lone surrogates in the names and values of a function are refused as such, and whole pairs are not."""
    half, whole = "\ud83d", "\U0001f600"
    for sign in (half, whole):
        for name, parameters in (
            ("f" + sign, {}),
            ("f", {"properties": {sign: {}}, "additionalProperties": True}),
            ("f", {"properties": {"a": {"enum": [sign]}}}),
            ("f", {"properties": {"a": {"type": "string", "pattern": sign}}}),
        ):
            with (
                pytest.raises(
                    RequestError, match=r"tools cannot be enforced: it has a lone surrogate, \"\\ud83d\""
                )
                if sign is half
                else contextlib.nullcontext()
            ):
                check_grammar(
                    tool_grammar([{"function": {"name": name, "parameters": parameters}}], tool_format, True),
                    "tools",
                )


def test_a_token_without_text_or_name_fits_no_grammar():
    """The mask allowed such a token wherever one of several special tokens may come, and an answer that drew
    it failed."""
    for grammar in ('start: (<[300]> | <[301]>) "a"', 'start: (<[300]> | "b")'):
        made = Grammar(Marked("tagged", {"<a>": 300, "<b>": 301}), grammar)
        made.masks.set_result(made.compute_masks())
        assert set(made.allowed(320).nonzero()[0]) <= {300, 301, ord("b")}


STRICT = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "required": ["city", "days"],
            "additionalProperties": False,
            "properties": {
                "city": {"enum": ["Oslo", "Bonn"]},
                "days": {"type": "integer", "minimum": 7, "maximum": 9},
            },
        },
    },
}


def strictly(tool_format, tools=(STRICT,), **more):
    values = parse_fields(ASK | {"tools": list(tools)} | more, OPENAI_FIELDS)
    return parse_openai_request(values, Settings(), tool_format)


def strict_work(engine, name, messages, tokens, **more):
    request = strictly(engine.tokenizer.tool_format)
    prompt = tuple(engine.tokenizer.render([Message(role, text) for role, text in messages]))
    return assignment(
        name,
        prompt,
        SamplingParams(0.0),
        tokens,
        chat=True,
        tool_names=request.params.tool_names,
        tool_types=request.params.tool_types,
        call_grammars=request.params.call_grammars,
        grammar_param=request.params.grammar_param,
        **more,
    )


def test_the_default_model_s_free_calls_are_strict(engine, monkeypatch):
    """The model repeats a call that the schema forbids; drafts propose it too. Preempted or taken over by
    another worker, it is the same."""
    draft_eagerly(monkeypatch)
    say = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    work = strict_work(
        engine,
        "a",
        [("user", "Repeat this:\n" + say), ("assistant", say), ("user", "Repeat this:\n" + say)],
        100,
    )
    free = pieces(engine, [replace(work, params=replace(work.params, call_grammars=()))])["a"]
    assert together(deltas_of(free)) == ("", [ROME | {"arguments": '{"city": "Rome", "days": 3}'}])
    drafted = engine.drafting.drafted.total
    found = pieces(engine, [work])["a"]
    text, calls = together(deltas_of(found))
    assert (
        text == ""
        and [call["name"] for call in calls] == ["weather"]
        and found.end.stop_reason == "eos"
        and engine.drafting.drafted.total > drafted
    )
    said = json.loads(calls[0]["arguments"])
    assert said["city"] in ("Oslo", "Bonn") and 7 <= said["days"] <= 9
    ids = [token for piece in found for token in piece.tokens]
    for cut in range(9, len(ids), 9):
        rest = pieces(engine, [replace(work, resumed_ids=tuple(ids[:cut]))])["a"]
        assert [token for piece in rest for token in piece.tokens] == ids[cut:]
    engine.add(work)
    again, preempted = [], engine.queue.preemptions
    with torch.inference_mode():
        while engine.busy:
            again += [token for _, piece in step_pieces(engine) for token in piece.tokens]
            if engine.queue.running and len(again) >= 12 and engine.queue.preemptions < preempted + 9:
                engine.queue.preempt(engine.queue.running[0])
    assert again == ids and engine.queue.preemptions == preempted + 9


OPENINGS = [
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments":'),
    ("mistral name", "[TOOL_CALLS]weather[ARGS]"),
    ("json", '{"name": "weather", "parameters":'),
    ("kimi", "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"),
    ("deepseek", "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>"),
    ("deepseek fenced", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"),
    ("qwen tags", "<tool_call>\n<function=weather>"),
    ("seed tags", "<seed:tool_call>\n<function=weather>"),
    ("glm tags", "<tool_call>weather\n"),
    ("lfm2", "<|tool_call_start|>[weather("),
    ("minicpm fenced", "<|tool_call_start|>\n```python\nweather("),
    ("mistral settings", "[TOOL_CALLS]weather[ARGS]"),
    ("gemma", "<|tool_call>call:weather{"),
]
# whose calls are required by day in test_a_model_without_tools_makes_required_calls or in test_reasoning.py
REQUIRED_BY_DAY = "json", "mistral name", "deepseek fenced", "qwen tags", "lfm2", "gemma"


@pytest.mark.parametrize(
    "tool_format, opening", by_day(OPENINGS, *(case for case in OPENINGS if case[0] not in REQUIRED_BY_DAY))
)
def test_strict_arguments_follow_the_schema(engine, tool_format, opening, monkeypatch):
    """Arguments of a strict function follow its schema in the words of every family."""
    monkeypatch.setattr(engine.tokenizer, "tool_format", tool_format)
    begun = tuple(engine.tokenizer.encode(opening))
    work = strict_work(
        engine, "a", [("user", "Weather in Rome for 3 days?")], len(begun) + 60, resumed_ids=begun
    )
    found = pieces(engine, [work])["a"]
    calls = "".join(call.text for call in calls_of(found))
    assert re.match(r'{"city": "(Oslo|Bonn)", "days": [789]', calls)


def test_harmony_s_strict_calls_are_held_from_a_marker():
    """A strict function of harmony's is held from the marker that begins its arguments."""
    tokenizer = Marked("harmony", {name: 300 + number for number, name in enumerate(HARMONY)})
    channel, constrain, message = (
        tokenizer.specials[f"<|{name}|>"] for name in ("channel", "constrain", "message")
    )
    request = strictly("harmony")
    work = assignment(
        "a",
        (1,),
        SamplingParams(),
        999,
        chat=True,
        tool_names=request.params.tool_names,
        call_grammars=request.params.call_grammars,
    )
    answer = Answer(work, tokenizer, None, lambda source: Grammar(tokenizer, source))
    for number, token in enumerate(
        [channel, *b"commentary to=functions.weather ", constrain, *b"json", message], 1
    ):
        assert not answer.awaits_grammar
        answer.push(token, number, 999)
    assert answer.awaits_grammar
    answer.hold_call()
    for token in b'{"city": "Oslo", "days": 7}':
        assert (
            not answer.grammar.copy().feed(ord("x"))
            and answer.push(token, 99, 999) == [token]
            and answer.reason is None
        )
    assert not answer.grammar and not answer.awaits_grammar


def test_a_strict_call_broken_by_one_token_is_left(engine):
    """What begins a strict call and breaks its schema in one token is left as it is."""
    answer = Answer(
        strict_work(engine, "a", [("user", "x")], 99),
        engine.tokenizer,
        None,
        lambda source: Grammar(engine.tokenizer, source),
    )
    answer.text.reader.deltas.begun_call = Delta("call", '{"town', "weather")
    answer.hold_call()
    assert answer.grammar is None and not answer.awaits_grammar


async def test_only_strict_functions_are_held(pool):
    """To their schemas; what cannot be enforced is a 400."""
    loose = {"type": "function", "function": STRICT["function"] | {"name": "loose", "strict": False}}
    request = strictly("tagged", [loose, STRICT, TIME], stop=["x"])
    assert (
        [bool(source) for source in request.params.call_grammars] == [False, True, False]
        and request.params.stop == ("x",)
        and not request.params.grammar
    )
    assert (
        strictly("tagged", [loose, TIME]).params.call_grammars
        == ()
        == strictly("tagged", tool_choice="required").params.call_grammars
    )
    wrong = {
        "name": "f",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"not": {"type": "null"}}}},
    }
    flat = {"name": "f", "strict": True}
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        for path, body in (
            ("chat/completions", ASK | {"tools": [{"type": "function", "function": wrong}]}),
            ("responses", {"input": "x", "tools": [{"type": "function"} | wrong]}),
            (
                "messages",
                {
                    "max_tokens": 9,
                    "messages": ASK["messages"],
                    "tools": [flat | {"input_schema": wrong["parameters"]}],
                },
            ),
        ):
            async with client.post(f"{url}/v1/{path}", json=body) as response:
                assert (
                    response.status == 400
                    and "tools cannot be enforced" in (await response.json())["error"]["message"]
                )


@pytest.mark.parametrize(
    "parameters, right, wrong",
    [
        (None, "{}", '{"a": 1}'),
        ({}, '{"a": 1, "b": 2}', "5"),
        ({"properties": {}}, "{}", '{"a": 1}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"b": 1}'),
        ({"type": None}, '{"a": 1, "b": 2}', "5"),
        ({"anyOf": [{"properties": {"a": {}}}, {"required": ["b"]}]}, '{"b": 2}', '{"a": 1, "b": 2}'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {}}}}}, '{"a": 1}', '{"a": 1, "b": 2}'),
    ],
)
def test_arguments_have_only_declared_keys(parameters, right, wrong):
    """Arguments are an object of declared keys even where the schema does not say so."""
    import llguidance

    function = {"name": "f", "parameters": parameters}
    for grammar, text in (
        (call_grammar(function, "tagged"), "%s"),
        (tool_grammar([{"function": function}], "mistral name", False), "[TOOL_CALLS]f[ARGS]%s"),
        (
            tool_grammar([{"function": function}], "tagged", False),
            '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>',
        ),
    ):
        for arguments in (right, wrong, "5", '"x"', "[]", "null"):
            matcher = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
            assert (matcher.consume_tokens(list((text % arguments).encode())) and matcher.is_accepting()) == (
                arguments == right
            )
