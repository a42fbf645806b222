"""Calls and reasoning of LFM2, MiniCPM 3, Qwen3.5 and Gemma 4: read from answers, asked for by grammar, written back into the history."""

import json
import random
import re
from dataclasses import replace
from functools import partial

import aiohttp
import llguidance
import pytest

from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import Delta, SamplingParams
from chatlm.common.text.formats import CALL_FORMATS, thoughts_of, with_markers
from chatlm.common.text.grammar import byte_vocabulary, check_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.reader import AnswerReader
from chatlm.front.api.call_grammars import call_grammar, parameter_types, tool_grammar
from chatlm.front.api.message_readers import openai_messages
from chatlm.worker.engine.answer import Answer
from chatlm.worker.engine.grammar import Grammar
from chatlm.worker.weights.formats.gguf.description import gguf_text
from answers import together
from engines import load
from fake_pool import FakePool, Letters, frames, serving
from tiny_gguf import small_gguf_metadata
from works import assignment, told_with_types

# What the published templates do with tools, thoughts, calls and results, in our words: LiquidAI/LFM2-1.2B, LiquidAI/LFM2.5-8B-A1B, openbmb/MiniCPM3-4B,
# Qwen/Qwen3.5-4B, google/gemma-4-31B-it as of July 2026 and as of April 2026.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
CHATML_ENDS = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
GEMMA_VALUES = """{%- macro value(x) -%}{%- if x is string -%}{{ '<|"|>' + x + '<|"|>' }}{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- elif x is none -%}null{%- elif x is mapping -%}{{ '{' + pairs(x) + '}' }}{%- elif x is sequence -%}[{%- for item in x -%}{{ ',' if not loop.first }}{{ value(item) }}{%- endfor -%}]
{%- else -%}{{ x }}{%- endif -%}{%- endmacro -%}
{%- macro pairs(x) -%}{%- for name, item in x | dictsort -%}{{ ',' if not loop.first }}{{ name }}:{{ value(item) }}{%- endfor -%}{%- endmacro -%}
{%- if tools or enable_thinking -%}{{ '<|turn>system\n' }}{{ '<|think|>\n' if enable_thinking }}{%- for tool in tools or [] -%}{{ '<|tool>declaration:' + tool.function.name + '<tool|>' }}{%- endfor -%}{{ '<turn|>\n' }}{%- endif -%}"""
GEMMA_CALLS = """{%- for c in m.tool_calls or [] -%}{{ '<|tool_call>call:' + c.function.name + '{' + pairs(c.function.arguments) + '}<tool_call|>' }}{%- endfor -%}"""
TEMPLATES = {
    "lfm2 list": "{% if tools %}<|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}" + CHATML + (
        "{{ '<|tool_response_start|>' + m.content + '<|tool_response_end|>' if m.role == 'tool' else m.content }}") + CHATML_ENDS + "{% endif %}",
    "lfm2": "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + """{%- if m.thinking -%}{{ '<think>' + m.thinking + '</think>' }}{%- endif -%}{{ m.content }}
{%- if m.tool_calls -%}<|tool_call_start|>[{%- for c in m.tool_calls -%}{{ ', ' if not loop.first }}{{ c.function.name }}({%- for name, value in c.function.arguments.items() -%}
{{ ', ' if not loop.first }}{{ name }}={{ "'" + value + "'" if value is string else value | tojson if value is mapping else value | string }}{%- endfor -%}){%- endfor -%}]<|tool_call_end|>{%- endif -%}"""
    + CHATML_ENDS + "{% endif %}",
    "minicpm fenced": "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + """{%- if m.thought -%}{{ '<|thought_start|>\n' + m.thought + '\n<|thought_end|>\n' }}{%- endif -%}
{%- if m.tool_calls -%}{{ '<|tool_call_start|>\n```python\n' }}{%- for c in m.tool_calls -%}{{ c.function.name }}({%- for name, value in c.function.arguments.items() -%}
{{ ', ' if not loop.first }}{{ name }}={{ value | tojson if value is string or value is mapping else value | string }}{%- endfor -%}){{ '\n' }}{%- endfor -%}{{ '```\n<|tool_call_end|>\n' }}{%- endif -%}
{{ m.content }}""" + CHATML_ENDS + "{% endif %}",
    "qwen tags": "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + """{%- if m.role == 'assistant' -%}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif -%}{{ m.content }}
{%- for c in m.tool_calls or [] -%}{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}{%- for name, value in c.function.arguments | items -%}
{{ '<parameter=' + name + '>\n' }}{{ value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}{{ '\n</parameter>\n' }}{%- endfor -%}{{ '</function>\n</tool_call>' }}{%- endfor -%}"""
    + CHATML_ENDS + "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}{% endif %}",
    "gemma": GEMMA_VALUES + """{%- for m in messages if m.role != 'tool' -%}
{%- if not (m.role == 'assistant' and loop.previtem is defined and loop.previtem.role == 'assistant') -%}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{%- endif -%}
{%- if m.reasoning -%}{{ '<|channel>thought\n' + m.reasoning + '\n<channel|>' }}{%- endif -%}""" + GEMMA_CALLS + """
{%- for c in m.tool_calls or [] -%}{%- for r in messages if r.tool_call_id == c.id -%}{{ '<|tool_response>response:' + c.function.name + '{value:' + value(r.content) + '}<tool_response|>' }}{%- endfor -%}{%- endfor -%}
{{ m.content }}{%- if not m.tool_calls and not (loop.nextitem is defined and loop.nextitem.role == m.role) -%}{{ '<turn|>\n' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt and not messages[-1].tool_call_id -%}{{ '<|turn>model\n' }}{{ '<|channel>thought\n<channel|>' if not enable_thinking }}{%- elif enable_thinking -%}{{ '<|channel>thought\n' }}{%- endif -%}""",
    "first gemma": GEMMA_VALUES + """{%- for m in messages -%}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}""" + GEMMA_CALLS + """
{%- for r in m.tool_responses or [] -%}{{ '<|tool_response>response:' + r.name + '{' + (pairs(r.response) if r.response is mapping else 'value:' + value(r.response)) + '}<tool_response|>' }}{%- endfor -%}
{{ m.content }}{%- if not (m.tool_responses and not m.content) -%}{{ '<turn|>\n' }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt and not messages[-1].tool_responses -%}{{ '<|turn>model\n' }}{%- endif -%}"""}
TRIP = {"type": "function", "function": {"name": "trip", "parameters": {
    "type": "object", "required": ["text"], "properties": {
        "text": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": "number"}, "far": {"type": "boolean"}, "note": {"type": ["string", "null"]},
        "stops": {"type": "array", "items": {"type": "object"}}, "first": {"type": "object"}, "number": {"type": "string"}, "anything": {}}}}}
TIME = {"type": "function", "function": {"name": "time"}}
GO = {"text": 'Say "hi" to\n<b>Ro & \\ Bonn</b>, it\'s 日\n', "days": 3, "share": 0.5, "far": True, "note": None, "stops": [{"at": "Rome"}, {"at": "</p>"}],
      "first": {"at": "Ulm", "on": False}, "number": "007", "anything": [1, ["{", {"a": None}]]}
CALLS = [("trip", GO), ("time", {}), ("trip", {"text": "", "days": -1})]
TYPES = tuple(map(parameter_types, (TRIP, TIME)))


def history(*more):
    calls = [{"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}} for number, (name, arguments) in enumerate(CALLS)]
    return openai_messages([{"role": "user", "content": "Trip?"}, {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls},
                            *({"role": "tool", "tool_call_id": call["id"], "content": '{"ok": true}' if call["id"] == "c0" else "no"} for call in calls), *more], with_tools=True)


def templated(path, family):
    return open_tokenizer(replace(load(path).text, system=None, chat_template=TEMPLATES[family]))


class Marked(Letters):
    """Letters, and these markers as special tokens."""

    def __init__(self, tool_format, markers, thoughts=None):
        super().__init__()
        self.tool_format, self.thoughts, self.vocab_size = tool_format, thoughts, 300 + len(markers)
        self.words = {marker: 300 + number for number, marker in enumerate(markers)}
        self.specials = self.specials | self.words

    def ids(self, text):
        parts = re.split("(" + "|".join(map(re.escape, self.words)) + ")", text) if self.words else [text]
        return [token for part in parts for token in ([self.words[part]] if part in self.words else part.encode())]


told_by = partial(told_with_types, TYPES)


def read(told):
    """The text and the calls, [(name, arguments as JSON)], of an answer that is told."""
    parts = together(delta for deltas in told for delta in deltas)
    return "".join(text for kind, text, _ in parts if kind == "text"), [(name, text) for kind, text, name in parts if kind == "call"]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("tokens", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["markers are tokens", "markers are text"])
def test_template_calls_are_read_at_every_cut(default_model_path, family, tokens):
    """Calls that a template writes are read back at every cut, and by a worker that takes over."""
    tokenizer = templated(default_model_path, family)
    row, tool_format = CALL_FORMATS[tokenizer.tool_format], tokenizer.tool_format
    assert tool_format == family.removeprefix("first ") and tokenizer.native_tools
    shown = tokenizer.show(tokenizer.render(history(), [TRIP, TIME]))
    begin, end = row.marks[:2]
    written = shown[shown.index(begin, shown.index("Trip?")):shown.rindex(end) + len(end)]
    reader = Marked(tool_format, [marker for marker in row.markers if marker in written and tokens])
    ids = reader.ids("Well. " + written)
    told = told_by(reader, ids)
    text, calls = read(told)
    assert (text.strip(), [(name, json.loads(arguments)) for name, arguments in calls]) == ("Well.", CALLS)
    deltas = [delta for each in told for delta in each if delta.kind == "call"]
    assert deltas[0].name == "trip" and len(deltas) > len(GO["text"])       # the name first, then what arrives as it does
    for cut in range(1, len(ids), 17 if tokens else 23):
        assert told_by(reader, ids, cut) == told[cut:]
        text, calls = read(told_by(reader, ids[:cut], reason="length"))     # cut by length: no part of a marker is text
        assert not re.search("<|call:|func|param", text) and [name for name, _ in calls] == [name for name, _ in CALLS][:len(calls)]
        whole = read(told_by(reader, ids[:cut]))[1]                         # ended by the model: what is open is closed
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole if tokens)
    pieces = AnswerReader(reader, ["trip", "time"], TYPES)
    for place in range(0, len(written), 5):     # several characters a token
        pieces.push(pieces.scanner.signs(written)[place:place + 5])
    pieces.finish()
    assert [(name, json.loads(arguments)) for name, arguments in read([pieces.take()])[1]] == CALLS


ROME, NOW = ("trip", '{"text": "Rome"}'), ("time", "{}")


@pytest.mark.parametrize("text, rest, calls", [
    ("[trip(text='Rome'), time()]", "", [ROME, NOW]), (' [ trip ( text = "Rome" , ) ]\n', "", [ROME]), ("trip(text='Rome')", "", [ROME]),
    ("[trip('Rome', 3)]", "", [("trip", '{"text": "Rome", "days": 3}')]), ("[trip(text=Rome)]", "", [ROME]),
    ("[trip(text='it's late', number='sed -n '1,9p' f')]", "", [("trip", '{"text": "it\'s late", "number": "sed -n \'1,9p\' f"}')]),
    ('[trip(text="""a"b\'\n""", number="")]', "", [("trip", '{"text": "a\\"b\'\\n", "number": ""}')]),
    (r"[trip(text='\'\x41\u00e9\U0001F600\d\n\ud83d')]", "", [("trip", '{"text": "\'Aé\U0001f600\\\\d\\n\\ud83d"}')]),
    ("[trip(days=07, share=-.5, anything=1_000, number=007, note=None, far=true)]", "",
     [("trip", '{"days": 7, "share": -0.5, "anything": 1000, "number": "007", "note": null, "far": true}')]), ("[trip(note=12)]", "", [("trip", '{"note": "12"}')]),
    ("[trip(share=1e999, days=0x10, anything=(1, [2, (3,)], {'a': {1: 'b'}}))]", "",
     [("trip", '{"share": "1e999", "days": 16, "anything": [1, [2, [3]], {"a": {"1": "b"}}]}')]),
    ("[trip(stops=[{'at': 'Rome'], days=2)]", "", [("trip", '{"stops": [{"at": "Rome"}], "days": 2}')]), ("[trip(text=)]", "", [("trip", '{"text": null}')]),
    ('[{"name": "trip", "arguments": {"text": "Rome"}}]', "", [ROME]), ("[rm(x=1)]", None, []), ("[]", None, []), ("no call", None, []), ("[trip, time]", None, []),
    ("[trip(text='Rome'), rm(x='y')]", ", rm(x='y')]", [ROME])])
def test_what_lfm2_writes_amiss_is_read_if_possible(text, rest, calls):
    check_amiss("lfm2", text, rest, calls)


@pytest.mark.parametrize("text, rest, calls", [
    ('call:trip{text:<|"|>Rome<|"|>}', "", [ROME]), ('call:trip{text: <|"|>Rome<|"|>, }', "", [ROME]), ('call:trip{"text":"Rome"}', "", [ROME]),
    ('call:trip{<|"|>text<|"|>:<|"|>Rome<|"|>}', "", [ROME]), ("call:trip{text:Rome}", "", [ROME]), ("call:time{}", "", [NOW]),
    ('call:trip{anything:{a b:{},c:[]},text:<|"|>}],{"\\n<|"|>,note:None}', "", [("trip", '{"anything": {"a b": {}, "c": []}, "text": "}],{\\"\\\\n", "note": null}')]),
    ('call:trip{text:<|"|>Rome', "", [ROME]), ('call:trip{stops:[{at:<|"|>Rome<|"|>', "", [("trip", '{"stops": [{"at": "Rome"}]}')]),
    ('call:trip{text:<|"|>Rome<|"|>}<|tool_call>call:time{}', "", [ROME, NOW]), ('call:trip{text:<|"|>Rome<|tool_call>call:time{}', "", [ROME, NOW]), ("call:rm{}", None, []), ("{}", None, [])])
def test_what_gemma_writes_amiss_is_read_if_possible(text, rest, calls):
    check_amiss("gemma", text, rest, calls)


def check_amiss(tool_format, text, rest, calls):
    """Read as tokens; a marker that marks nothing has no text then."""
    row = CALL_FORMATS[tool_format]
    begin, end = row.marks
    reader = Marked(tool_format, row.markers)
    ids = reader.ids(f"Well. {begin}{text}{end} Done.")
    told = told_by(reader, ids)
    assert read(told) == (f"Well. {text} Done." if rest is None else f"Well. {rest} Done." if rest else "Well. Done.", calls)
    for cut in range(1, len(ids), 3):
        assert told_by(reader, ids, cut) == told[cut:]


PLACE = {"type": "object", "required": ["city", "days"], "properties": {
    "city": {"type": "string", "maxLength": 10}, "days": {"type": "integer", "minimum": 1}, "on": {"type": ["boolean", "null"]}, "sort": {"enum": ["beach", "5", 5, None, ["x"]]},
    "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}}, "where": {"type": "object", "properties": {"x": {"type": "number"}, "s": {"enum": ["a", "b"]}}, "required": ["x"]},
    "any": {}}}
FREE = {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize("tool_format, parameters, allowed, refused", [
    ("lfm2", PLACE, ['city="Rome", days=3', 'city="Rome", days=3, on=True, sort=None, tags=["a", "b"], where={"x": 1.5, "s": "a"}', 'city="R", days=1, any={"a": [True, {"b": "c"}]}',
                     'city="R", days=1, sort=["x"]', 'city="\\"", days=1, sort="5"'],
     ['city="Rome"', 'days=3, city="R"', 'city="RomeRomeRome", days=3', 'city="Rome", days=0', 'city="R", days=1, on=true', 'city="R", days=1, sort="6"', 'city="R", days=1, tags=["A"]',
      'city="R", days=1, where={"s": "a"}', 'city=R, days=1', 'city="R", days=1, new=1']),
    ("gemma", PLACE, ['city:<|"|>Rome<|"|>,days:3', 'city:<|"|>Ro "<|"|>,days:3,on:true,sort:null,tags:[<|"|>a<|"|>,<|"|>b<|"|>],where:{x:1.5,s:<|"|>a<|"|>}',
                      'city:<|"|><|"|>,days:1,any:{a:[true,{b:<|"|>c<|"|>}]}', 'city:<|"|>R<|"|>,days:1,sort:[<|"|>x<|"|>]', 'city:<|"|>R<|"|>,days:1,sort:5'],
     ['city:<|"|>Rome<|"|>', 'city:<|"|>RomeRomeRome<|"|>,days:3', 'city:"Rome",days:3', 'city:<|"|>R<|"|>,days:1,sort:<|"|>6<|"|>', 'city:<|"|>R<|"|>,days:1,tags:[<|"|>A<|"|>]',
      'city:<|"|>R<|"|>,days:1,where:{s:<|"|>a<|"|>}', 'city:<|"|>R<|"|>,days:1,new:1']),
    ("lfm2", FREE, ["", "a=1", "a=1, b=2"], ['a="x"', "a b=1"]), ("gemma", FREE, ["", "a:1", "a:1,b:2"], ["a:true", "a{:1"]),
    ("lfm2", {}, ["", 'a="x"'], ["x"]), ("gemma", {"properties": {"a": {"const": "x"}}}, ["", 'a:<|"|>x<|"|>'], ['a:<|"|>y<|"|>', "b:1"])])
def test_a_required_call_has_allowed_values(tool_format, parameters, allowed, refused):
    """A required call has the values that its schema allows, and its reader finds them."""
    function, row = {"name": "f", "parameters": parameters}, CALL_FORMATS[tool_format]
    grammar = tool_grammar([{"function": function}], tool_format, False)
    check_grammar(grammar, "tools")
    start = llguidance.LLMatcher(byte_vocabulary(), with_markers(grammar, {}), log_level=0)
    strict = Marked(tool_format, row.markers)
    held = Grammar(strict, with_markers(call_grammar(function, tool_format), strict.markers))

    def fits(arguments):
        call, matcher = row.calls.replace("{calls}", row.call.replace("{name}", "f").replace("{arguments}", arguments)), start.deep_copy()
        fit = matcher.consume_tokens(list(call.encode())) and matcher.is_accepting()
        ids, as_tokens = strict.ids(arguments + row.around_arguments[1]), held.copy()
        assert all(map(as_tokens.feed, ids)) == fit          # where the markers are tokens, and the call has begun
        if fit:
            reader = AnswerReader(strict, ["f"])
            reader.push(reader.scanner.signs(call))
            text, [(_, said)] = read([reader.take()])
            assert text == "" and isinstance(json.loads(said), dict)
        return fit
    assert [each for each in allowed if not fits(each)] == [] == [each for each in refused if fits(each)]


@pytest.mark.parametrize("tool_format, parameters", [
    ("lfm2", {"properties": {"a=b": {}}}), ("lfm2", {"properties": {" a": {}}}), ("gemma", {"properties": {"a": {"type": "object", "properties": {"b:c": {}}}}})])
def test_a_required_call_needs_a_writable_name(tool_format, parameters):
    """A name that cannot be written without quotes is refused where a call is required."""
    with pytest.raises(RequestError, match="this model's calls cannot have a parameter .*; a name has 1 to 200 characters"):
        tool_grammar([{"function": {"name": "f", "parameters": parameters}}], tool_format, True)


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
WRITTEN = {"lfm2": '<|tool_call_start|>[weather(city="Rome", days=2)]<|tool_call_end|>', "gemma": '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>',
           "qwen tags": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"}
ASK = [{"role": "user", "content": "Weather in Rome?"}]


def calls_streamed(path, body):
    """The text and the calls of a whole stream, as clients of this API put them together."""
    if path == "/api/chat":
        messages = [json.loads(line)["message"] for line in body.decode().splitlines()]
        calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
        return "".join(message["content"] for message in messages), [(call["name"], call["arguments"]) for call in calls]
    events, text, calls = [event for event in frames(re.sub(b"event: .*\n", b"", body)) if event != "[DONE]"], "", []
    for event in events:
        delta = event["choices"][0]["delta"] if event.get("choices") else event.get("delta", {})
        if event.get("type") == "response.output_text.delta":
            text += delta
        elif event.get("type") == "response.output_item.added" and event["item"]["type"] == "function_call":
            calls.append([event["item"]["name"], ""])
        elif event.get("type") == "response.function_call_arguments.delta":
            calls[-1][1] += delta
        elif event.get("type") == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append([event["content_block"]["name"], ""])
        elif isinstance(delta, dict):
            text += delta.get("content") or delta.get("text") or ""
            for call in delta.get("tool_calls", []):
                calls += [[call["function"]["name"], ""]] if call["index"] == len(calls) else []
                calls[-1][1] += call["function"]["arguments"]
            calls and calls[-1].append(delta.get("partial_json", ""))
    return text, [(name, json.loads("".join(arguments))) for name, *arguments in calls]


@pytest.mark.parametrize("tool_format", WRITTEN)
async def test_a_call_streams_in_the_events_of_every_api(tool_format):
    pool = FakePool(["Sure. ", *WRITTEN[tool_format]])
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = tool_format
    tool = {"type": "function", "function": WEATHER}
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        for path, body in (("/v1/chat/completions", {"messages": ASK, "tools": [tool]}), ("/v1/responses", {"input": "Weather?", "tools": [{"type": "function", **WEATHER}]}),
                           ("/v1/messages", {"messages": ASK, "max_tokens": 99, "tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}]}),
                           ("/api/chat", {"messages": ASK, "tools": [tool]})):
            async with client.post(url + path, json=body | {"stream": True}) as response:
                text, calls = calls_streamed(path, await response.read())
            assert (text.strip(), calls) == ("Sure.", [("weather", {"city": "Rome", "days": 2})]), path


def test_gemma_gets_results_where_it_expects_them(default_model_path):
    """The template puts the text of a message behind its calls and their results; its second version shows reasoning beside calls alone, and its
    first knows neither reasoning nor a message of a tool."""
    later = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Thanks"}]
    newest, thought = TEMPLATES["gemma"], "<|channel>thought\nHm.\n<channel|>"
    second = newest.replace("if m.reasoning -%}", "if m.reasoning and m.tool_calls -%}")
    assert second != newest
    for template, response, thought in ((newest, 'value:<|"|>{"ok": true}<|"|>', thought), (second, 'value:<|"|>{"ok": true}<|"|>', thought),
                                        (TEMPLATES["first gemma"], "ok:true", "")):
        tokenizer = open_tokenizer(replace(load(default_model_path).text, system=None, chat_template=template))
        shown = tokenizer.show(tokenizer.render(history(), [TRIP, TIME]))
        assert f"<|turn>model\n{thought}Let me see.<|tool_call>call:trip{{" in shown and shown.count("Let me see.") == 1
        assert "<tool_call|><|tool_response>response:trip{" + response + '}<tool_response|><|tool_response>response:time{value:<|"|>no<|"|>}<tool_response|>' in shown
        assert shown.endswith("<tool_response|>")       # the model goes on in its own turn
        shown = tokenizer.show(tokenizer.render(history(*later), [TRIP, TIME]))
        assert "<tool_response|>Done.<turn|>\n<|turn>user\nThanks<turn|>\n<|turn>model\n" in shown
        ids = tokenizer.render(openai_messages([*ASK, {"role": "assistant", "content": "Hi.", "reasoning": "Hm."}, *ASK]), [TRIP], {"reasoning_effort": "high"})
        assert "<|think|>" in tokenizer.show(ids)


@pytest.mark.parametrize("said, shown", [
    ({"properties": {"a": {"enum": ["x", "y"]}, "b": {"const": 3}}, "required": ["a"]},
     {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "y"]}, "b": {"type": "number", "enum": [3]}}, "required": ["a"]}),
    ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "A.", "default": None}}},
     {"type": "object", "properties": {"a": {"type": "string", "nullable": True, "description": "A.", "default": None}}}),
    ({"type": "object", "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": ["string", "number"]}, "c": {}, "d": True}},
     {"type": "object", "properties": {"a": {"type": "integer", "nullable": True}, "b": {"type": ["string", "number"]}, "c": {}, "d": {}}}),
    ({"properties": {"at": {"$ref": "#/$defs/place", "description": "Where."}, "all": {"items": {"$ref": "#/$defs/place"}}},
      "$defs": {"place": {"title": "Place", "properties": {"x": {"minimum": 0}, "near": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]}}}}},
     {"type": "object", "properties": {
         "at": (place := {"type": "object", "title": "Place", "description": "Where.",
                          "properties": {"x": {"type": "number", "minimum": 0}, "near": {"type": "object", "title": "Place"}}}),
         "all": {"type": "array", "items": {name: place[name] for name in place if name != "description"}}}}),
    ({"properties": {"a": {"anyOf": [{"properties": {"b": {"pattern": "x"}}}, {"type": "array"}]}, "c": {"not": {}}}},
     {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "string", "pattern": "x"}}}, "c": {"not": {}}}}),
    ({"properties": 7, "$ref": "#/nowhere"}, {"type": "object", "properties": 7, "$ref": "#/nowhere"}), ({}, {}), (None, None)])
def test_gemma_s_template_gets_every_parameter_s_type(said, shown):
    """It shows `type` alone: without it, as pydantic writes what may be null or is a model of its own, even brackets stay open."""
    found = CALL_FORMATS["gemma"].function({"name": "f", "parameters": said})["parameters"]
    found and found.pop("$defs", None)
    assert found == shown


def test_early_lfm2_calls_are_in_the_content(default_model_path):
    """Calls of LFM2's first templates are in the content, and what a client writes is no marker."""
    tokenizer = templated(default_model_path, "lfm2 list")
    tokenizer.specials |= {"<|tool_call_start|>": 5, "<|tool_call_end|>": 6}
    calls = [{"id": "c", "type": "function", "function": {"name": "trip", "arguments": '{"text": "<|tool_call_end|>\\n", "far": true, "note": null}'}}]
    messages = openai_messages([*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "tool_call_id": "c", "content": "ok"}], with_tools=True)
    ids = tokenizer.render(messages, [TRIP])
    assert '<|im_start|>assistant\n<|tool_call_start|>[trip(text="<|tool_call_end|>\\n", far=True, note=None)]<|tool_call_end|><|im_end|>' in tokenizer.show(ids)
    assert (ids.count(5), ids.count(6)) == (1, 1)


@pytest.mark.parametrize("family, effort, end", [
    ("qwen tags", None, "<think>\n"), ("qwen tags", "none", "<think>\n\n</think>\n\n"), ("gemma", None, "<|channel>thought\n<channel|>"), ("gemma", "high", "<|turn>model\n")])
def test_templates_of_2026_know_whether_to_think(default_model_path, family, effort, end):
    tokenizer = templated(default_model_path, family)
    assert tokenizer.thoughts == thoughts_of(TEMPLATES[family]) == (("<think>", "</think>") if family == "qwen tags" else ("<|channel>", "<channel|>"))
    assert tokenizer.show(tokenizer.render(openai_messages(ASK), [], {"reasoning_effort": effort} if effort else {})).endswith(end)


def test_gemma_s_answers_end_with_its_turn():
    """llama.cpp's files have the markers as text, Hugging Face's as special tokens; some name <eos> alone."""
    metadata = small_gguf_metadata("gpt-4o", **{"tokenizer.chat_template": TEMPLATES["gemma"]})
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<eos>", "<turn|>", "<|tool_response>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"]
    metadata["tokenizer.ggml.eos_token_id"] = first
    for types in ([3, 3, 4, 4, 4, 4, 4, 4], [3] * 8):
        text = gguf_text("x.gguf", metadata | {"tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + types})
        assert {first, first + 1} <= text.stop_tokens        # also without the template: a raw completion
        tokenizer = open_tokenizer(text)
        assert tokenizer.stop_tokens == {first, first + 1, first + 2}
        assert tokenizer.marks(with_calls=True).keys() == set(range(first + 3, first + 8))       # what the reader must see
        answer = Answer(assignment("a", (1,), SamplingParams(), 99, chat=True, tool_names=("trip",), tool_types=TYPES[:1]), tokenizer)
        for number, token in enumerate(tokenizer.encode_with_specials('<|channel>thought\nHm<channel|><|tool_call>call:trip{text:<|"|>a<|"|>}<tool_call|><|tool_response>'), 1):
            assert answer.reason is None
            answer.push(token, number, 99)
        assert answer.reason == "stop" and together(answer.take()) == [["reasoning", "Hm", ""], ["call", '{"text": "a"}', "trip"]]


def test_a_call_token_within_reasoning_ends_it():
    """Qwen3.5 may leave out </think> before a call. A marker in words, or one that begins no call, is a thought."""
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    for tokens, call in ((markers, True), (markers[:2], False)):
        tokenizer = Marked("qwen tags", tokens, ("<think>", "</think>"))
        ids = tokenizer.ids("<think>Hm, <tool_call>? <tool_call>\n<function=trip>\n<parameter=text>\nRome\n</parameter>\n</function>\n</tool_call></think>Well.")
        answer = Answer(assignment("a", (1,), SamplingParams(), 999, chat=True, tool_names=("trip",), tool_types=TYPES[:1], thinking_budget=None), tokenizer)
        for number, token in enumerate(ids, 1):
            answer.push(token, number, 999)
        parts = [tuple(part) for part in together(answer.take())]
        assert parts[1 if call else 0:] == ([("call", '{"text": "Rome"}', "trip"), ("text", "Well.", "")] if call else [parts[0], ("text", "Well.", "")])
        assert parts[0][0] == "reasoning" and parts[0][1].startswith("Hm, ") and ("<function" in parts[0][1]) != call
        assert not call or answer.reasoning_tokens < 30 < len(ids) - 30 and answer.end_thinking() is None


def test_a_call_of_values_reads_alike_however_cut():
    """Random calls, in pieces of any length and letter by letter."""
    dice = random.Random(3)
    signs = ["[", "]", "{", "}", "(", ")", ",", ":", "=", "'", '"', "\\", '<|"|>', "a", "7", " ", "\n", "None", "trip(", "call:trip{", "text=", "日"]
    for tool_format in ("lfm2", "gemma"):
        begin, end = CALL_FORMATS[tool_format].marks
        for _ in range(150):
            text = begin + dice.choice(("[trip(", "call:trip{", "")) + "".join(dice.choices(signs, k=dice.randrange(14))) + dice.choice((end, "", end + "x"))
            cut, found = dice.random() < 0.3, []
            for size in (1, 1000, dice.randrange(2, 9)):
                tokenizer = Letters()
                tokenizer.tool_format = tool_format
                reader = AnswerReader(tokenizer, ["trip"])
                for place in range(0, len(text), size):
                    reader.push(text[place:place + size])
                reader.finish(cut)
                found.append(together(reader.take()))
            assert found[0] == found[1] == found[2], text
            for kind, said, _ in found[0]:
                assert kind != "call" or cut or isinstance(json.loads(said), dict), text


def test_a_call_s_delta_within_reasoning_is_none():
    """A delta of a call in reasoning is no reasoning."""
    tokenizer = Marked("lfm2", ("<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"), ("<think>", "</think>"))
    reader = AnswerReader(tokenizer, ["time"])
    reader.push(reader.scanner.signs("<think>Hm<|tool_call_start|>[time("))
    assert not reader.thinking and reader.take() == [Delta("reasoning", "Hm"), Delta("call", "", "time")]
