"""Answers of Muse Glimmer: messages to "self", to "user" and to functions, whose arguments are in tags."""

import json
from dataclasses import replace
from functools import partial

import llguidance
import pytest

from chatlm.common.text.formats import CALL_FORMATS, MUSE, thoughts_of, tool_format_of, with_markers
from chatlm.common.text.grammar import byte_vocabulary, check_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.front.api.call_grammars import parameter_types, tool_grammar
from chatlm.front.api.message_readers import openai_messages
from answers import together
from engines import load
from fake_pool import Letters
from works import told_with_types

# What the published template does with tools, thoughts, calls and results, in our words: meta-models/Muse-Glimmer-30B as of August 2026
TEMPLATE = """{% if tools %}{{ '<|start|>system<|message|>' }}{% for tool in tools %}{{ tool.function.description + tool.function.name }}{% endfor %}{{ '<|eot|>' }}{% endif %}
{%- for m in messages -%}{%- if m.role == 'tool' -%}{{ '<|start|>tool<|message|><tool_output>' + m.content + '</tool_output><|eot|>' }}
{%- elif m.role == 'assistant' -%}{{ '<|start|>assistant to=self<|message|>' + m.reasoning_content + '<|eom|>' if m.reasoning_content }}
{%- for c in m.tool_calls or [] -%}{{ '<|start|>assistant to=' + c.function.name + '<|message|><atem:function_calls>\n<atem:invoke name="' + c.function.name + '">\n' }}
{%- for name, value in c.function.arguments.items() -%}{{ '<atem:parameter name="' + name + '">' + (value if value is string else value | tojson) + '</atem:parameter>\n' }}{%- endfor -%}
{{ '</atem:invoke>\n</atem:function_calls>' + ('<|eot|>' if loop.last else '<|eom|>') }}{%- else -%}{{ '<|start|>assistant to=user<|message|>' + m.content + '<|eot|>' }}{%- endfor -%}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|eot|>' }}{%- endif -%}{%- endfor -%}{{ '<|start|>assistant' if add_generation_prompt }}"""
TRIP = {"type": "function", "function": {"name": "trip", "parameters": {"type": "object", "properties": {
    "text": {"type": "string"}, "days": {"type": "integer"}, "stops": {"type": "array"}}}}}
TIME = {"type": "function", "function": {"name": "time"}}
GO = {"text": ' to "Bonn"\n<b>&', "days": 3, "stops": [{"at": "Rome"}]}
CALL = ('<atem:function_calls>\n<atem:invoke name="trip">\n<atem:parameter name="text"> to "Bonn"\n<b>&</atem:parameter>\n<atem:parameter name="days">3</atem:parameter>\n'
        '<atem:parameter name="stops">[{"at": "Rome"}]</atem:parameter>\n</atem:invoke>\n</atem:function_calls>')
NOW = '<atem:function_calls>\n<atem:invoke name="time">\n</atem:invoke>\n</atem:function_calls>'
ANSWERS = {
    "thoughts and an answer": (" to=self<|message|>Hm,\nwell.<|eom|><|start|>assistant to=user<|message|>Yes, `to=self`.<|eot|>", [("reasoning", "Hm,\nwell."), ("text", "Yes, `to=self`.")]),
    "an answer": (" to=user<|message|>Yes.", [("text", "Yes.")]), "no recipient": ("<|message|>Yes.", [("text", "Yes.")]),
    "two calls": (f" to=self<|message|>Go.<|eom|><|start|>assistant to=trip<|message|>{CALL}<|eom|><|start|>assistant to=time<|message|>{NOW}<|eot|>",
                  [("reasoning", "Go."), ("trip", GO), ("time", {})]),
    "a call in thoughts is none": (f" to=self<|message|>{NOW}<|eom|><|start|>assistant to=user<|message|>No.", [("reasoning", NOW), ("text", "No.")]),
    "a call in an answer is none": (f" to=user<|message|>{NOW}", [("text", NOW)]),
    "of an unknown function": (f" to=other<|message|>{NOW}<|eom|><|start|>assistant to=user<|message|>No.", [("reasoning", NOW), ("text", "No.")])}


class Messages(Letters):
    """Letters, and Muse Glimmer's markers as special tokens."""

    def __init__(self):
        super().__init__()
        self.tool_format, self.thoughts, self.vocab_size = "muse", CALL_FORMATS["muse"].thoughts, 300 + len(MUSE)
        self.specials = self.specials | {marker: 300 + number for number, marker in enumerate(MUSE)}

    def ids(self, text):
        found = []
        while text:
            marker = next((marker for marker in MUSE if text.startswith(marker)), "")
            found.append(self.specials[marker] if marker else text[0].encode()[0])
            text = text[len(marker) or 1:]
        return found


told_by = partial(told_with_types, tuple(map(parameter_types, (TRIP, TIME))))


def read(told):
    """The parts of an answer, [(kind, text) or (name of a function, arguments)]."""
    parts = together(delta for deltas in told for delta in deltas)
    return [(name, json.loads(text)) if kind == "call" else (kind, text) for kind, text, name in parts]


@pytest.mark.parametrize("answer, parts", ANSWERS.values(), ids=ANSWERS)
def test_each_message_goes_to_its_recipient(answer, parts):
    """Messages are read alike by a worker that takes over at any token."""
    reader = Messages()
    ids = reader.ids(answer)
    told = told_by(reader, ids)
    assert read(told) == parts
    for cut in range(1, len(ids), 7):
        assert told_by(reader, ids, cut) == told[cut:]


def test_the_template_s_history_is_read_back(default_model_path):
    """What the template makes of earlier calls and thoughts is what the reader reads."""
    tokenizer = open_tokenizer(replace(load(default_model_path).text, system=None, chat_template=TEMPLATE))
    assert tokenizer.tool_format == tool_format_of(TEMPLATE) == "muse" and tokenizer.thoughts == thoughts_of(TEMPLATE) == ("<|message|>", "<|eom|>")
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}} for i, (name, given) in enumerate([("trip", GO), ("time", {})])]
    dialogue = openai_messages([{"role": "user", "content": "Trip?"}, {"role": "assistant", "content": None, "reasoning_content": "Go.", "tool_calls": calls},
                                *({"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in calls)], with_tools=True)
    shown = tokenizer.show(tokenizer.render(dialogue, [TRIP, TIME]))
    written = shown.partition("<|start|>assistant")[2].partition("<|eot|>")[0]
    assert read(told_by(Messages(), Messages().ids(written))) == ANSWERS["two calls"][1] and shown.endswith("<|start|>assistant")


@pytest.mark.parametrize("call, fits", [
    (f" to=trip<|message|>{CALL}", True), (f" to=time<|message|>{NOW}", True), (f" to=time<|message|>{CALL}", False), (f" to=user<|message|>{CALL}", False),
    (f" to=trip<|message|>{CALL.replace('>3<', '>three<')}", False), (CALL, False),
    (f" to=time<|message|>{NOW}<|eom|><|start|>assistant to=time<|message|>{NOW}", True)])
def test_a_required_call_is_a_message(call, fits):
    grammar = tool_grammar([TRIP, TIME], "muse", parallel=True)
    check_grammar(grammar, "tools")
    matcher = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
    assert (matcher.consume_tokens(list(call.encode())) and matcher.is_accepting()) == fits
