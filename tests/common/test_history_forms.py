"""Earlier calls and results of calls in prompts, whatever a chat template can show of them."""

import itertools
import json
import re
from dataclasses import replace

import pytest

from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import HistoryForm
from chatlm.common.text.history_forms import RESULT, TEXT_ALONE, differences
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.tokenizer import compile_chat_template
from chatlm.front.api.message_readers import openai_messages
from engines import load
from nightly import WHOLE

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}, "required": ["city"]}}}
BEGIN = """{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call> begins a call<|im_end|>\n{% endif %}
{%- for m in messages %}"""
END = """{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SHOWN = "{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
CALLS = "{%- for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
CLOSED = "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
PARAMETERS = "{% for name, value in c.function.arguments | items %}{{ '<parameter=' + name + '>' + value | string + '</parameter>' }}{% endfor %}"


def template(arguments, before="", shown=SHOWN):
    return BEGIN + before + shown + CALLS + arguments + CLOSED + END


AS_JSON = "{{ c.function.arguments | tojson }}"
ALTERNATE = """{% if m.role in ('user', 'assistant') and not m.tool_calls %}{% if (m.role == 'user') != (ns.turns % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.turns = ns.turns + 1 %}{% endif %}"""
# What templates of families do with calls and results, in our words: Qwen3-Coder and GLM, Qwen 2.5, functionary, Apriel, xLAM,
# Granite 3.3 and SmolLM3, Granite 3.0, and others
TEMPLATES = {
    "pairs": template(PARAMETERS), "json": template(AS_JSON), "text": template("{{ '' + c.function.arguments }}"),
    "printed": template("{{ '' ~ c.function.arguments }}"),
    "object or text": template("{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"),
    "no calls": BEGIN + SHOWN + "<|im_end|>\n" + END,
    "no results": BEGIN + "{% if m.role != 'tool' %}" + SHOWN + CALLS + AS_JSON + CLOSED + "{% endif %}" + END,
    "neither": BEGIN + "{% if m.role != 'tool' %}" + SHOWN + "<|im_end|>\n{% endif %}" + END,
    "results twice": template(AS_JSON, "{% if m.role == 'tool' %}{{ m.content }}{% endif %}"),
    "refuses results": template(AS_JSON, "{% if m.role == 'tool' %}{{ raise_exception('what is a tool?') }}{% endif %}"),
    "refuses several calls": template(AS_JSON, "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"),
    "shows the first call": BEGIN + SHOWN + "{% if m.tool_calls %}{% set c = m.tool_calls[0] %}<tool_call>" + AS_JSON + "{% endif %}<|im_end|>\n" + END,
    "names tool responses": template(PARAMETERS, "{% if m.role == 'tool' %}<tool_responses>{% endif %}"),
    "wants ids": template("{{ c.id + ' ' + c.function.arguments | tojson }}", "{{ '[' + m.tool_call_id + ']' if m.role == 'tool' }}"),
    "roles alternate": BEGIN.replace("{%- for m", "{% set ns = namespace(turns=0) %}{%- for m") + ALTERNATE + SHOWN + CALLS + AS_JSON + CLOSED + END,
    "changes a list": template(AS_JSON, "{% set kept = [] %}{% if m.tool_calls %}{% set _ = kept.append(m) %}{% endif %}"),
    "calls only with tools": BEGIN + SHOWN + "{% if tools %}" + CALLS + AS_JSON + "{% endfor %}{% endif %}<|im_end|>\n" + END,
    "results need their call": template(AS_JSON, "{% if m.role == 'tool' and not (loop.previtem.tool_calls or loop.previtem.role == 'tool') %}{% continue %}{% endif %}"),
    "no calls beside text": BEGIN + SHOWN + "{% if not m.content %}" + CALLS + AS_JSON + "{% endfor %}{% endif %}<|im_end|>\n" + END,
    "wants nine characters": template("{{ c.id + ' ' + c.function.arguments | tojson }}",
                                      "{% for c in m.tool_calls or [] %}{% if c.id | length < 9 or '_' in c.id[-9:] %}{{ raise_exception('bad id') }}{% endif %}{% endfor %}"),
    "no place for tools": "{% for m in messages %}" + SHOWN + "<|im_end|>\n" + END}
WORDS = {"object": ('{"city": "Rome"}', "Rome"), "an object itself": ({"city": "Rome"}, "Rome"), "null": (None, ""), "null as text": ("null", ""),
         "nothing": ("", ""), "spaces": (" \n", ""), "text": ("Rome please", "Rome please"), "JSON text": ('"Rome"', "Rome"), "a number": (31337, "31337"),
         "a number as text": ("31337", "31337"), "zero": (0, "0"), "false": (False, "false"), "a list": (["Rome"], "Rome"), "a list as text": ('["Rome"]', "Rome"),
         "cut": ('{"city": "Rome and', "Rome and"), "cut in an escape": ('{"city": "Rome\\', "Rome"), "cut at once": ("{", "{"), "two objects": ('{"city": "Rome"}{"a": 1}', "Rome"),
         "deep": ("[" * 5000, "[[["), "digits": ("1" * 5000, "111"), "a lone surrogate": ('"Rome\ud800', "Rome"), "no number": ("NaN", "NaN")}
TOOLS = {"with tools": [TOOL], "without tools": []}


@pytest.fixture(scope="module")
def text(default_model_path):
    return replace(load(default_model_path).text, system=None)


@pytest.fixture(scope="module")
def opened(text):
    """name -> the default model's tokenizer with that template."""
    return {name: open_tokenizer(replace(text, chat_template=source)) for name, source in TEMPLATES.items()}


def asked(text="Q"):
    return {"role": "user", "content": text}


def called(*arguments, text="", first=0, **more):
    return {"role": "assistant", "content": text, "tool_calls": [
        {"id": f"id{number}", "type": "function", "function": {"name": "weather", "arguments": given}} for number, given in enumerate(arguments, first)]} | more


def result(text, number=0):
    return {"role": "tool", "tool_call_id": f"id{number}", "content": text}


def prompt(tokenizer, sent, tools=()):
    """What the model reads, from the first question on."""
    shown = tokenizer.show(tokenizer.render(openai_messages(sent, with_tools=True), tools))
    return shown[shown.index(asked()["content"]):]


def unescaped(text):
    return re.sub(r"\\+(.)", r"\1", text)


@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_arguments_of_earlier_calls_are_refused(opened, name, tools):
    """What they say is in the prompt."""
    empty = prompt(opened[name], [asked(), called({}), result("R12R")], TOOLS[tools])
    for words, (arguments, shown) in WORDS.items():
        written = prompt(opened[name], [asked(), called(arguments), result("R12R")], TOOLS[tools])
        assert written.count("R12R") == 1, words
        assert written == empty if not shown else shown.replace("\\", "") in unescaped(written), words


RESULTS = {  # conversation -> how often each text is in the prompt
    "one result": ([asked(), called('{"city": "Rome"}'), result("R1R")], {"R1R": 1, "Rome": 1}),
    "text before the call": ([asked(), called('{"city": "Rome"}', text="Let me see."), result("R1R"), {"role": "assistant", "content": "Sunny."}, asked("And?")],
                             {"R1R": 1, "Rome": 1, "Let me see.": 1, "Sunny.": 1, "And?": 1}),
    "two results": ([asked(), called('{"city": "Rome"}', '{"city": "Bonn"}'), result("R1R"), result("R2R", 1)], {"R1R": 1, "R2R": 1, "Rome": 1, "Bonn": 1}),
    "results in another order": ([asked(), called('{"city": "Rome"}', '{"city": "Bonn"}'), result("R2R", 1), result("R1R")], {"R1R": 1, "R2R": 1}),
    "equal results": ([asked(), called("{}", "{}", "{}"), result("R1R"), result("R1R", 1), result("R1R", 2)], {"R1R": 3}),
    "calls of one id": ([asked(), called("{}", "{}", tool_calls=[{"id": "x", "function": {"name": "weather", "arguments": "{}"}}] * 2),
                         result("R1R") | {"tool_call_id": "x"}, result("R2R") | {"tool_call_id": "x"}], {"R1R": 1, "R2R": 1}),
    "no ids": ([asked(), called(tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Rome"}}}] * 2),
                {"role": "tool", "content": "R1R"}, {"role": "tool", "content": "R2R"}], {"R1R": 1, "R2R": 1, "Rome": 2}),
    "of an older client": ([asked(), {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                            {"role": "function", "name": "weather", "content": "R1R"}], {"R1R": 1, "Rome": 1}),
    "several rounds": ([asked(), called('{"city": "Rome"}'), result("R1R"), called('{"city": "Bonn"}', first=1), result("R2R", 1), called("{}", first=2), result("R3R", 2)],
                       {"R1R": 1, "R2R": 1, "R3R": 1, "Rome": 1, "Bonn": 1}),
    "a message after the result": ([asked(), called("{}"), result("R1R"), asked("Stop!"), {"role": "assistant", "content": "Well."}, asked("Go on.")],
                                   {"R1R": 1, "Stop!": 1, "Go on.": 1}),
    "a message instead of the result": ([asked(), called('{"city": "Rome"}'), asked("Stop!")], {"Rome": 1, "Stop!": 1}),
    "a result without its call": ([asked(), result("R1R", 7), {"role": "assistant", "content": "Well."}, asked("Go on.")], {"R1R": 1, "Well.": 1, "Go on.": 1}),
    "a result too many": ([asked(), called("{}"), result("R1R"), result("R2R", 7)], {"R1R": 1, "R2R": 1}),
    "a late result": ([asked(), called("{}"), {"role": "assistant", "content": "Well."}, result("R1R")], {"R1R": 1, "Well.": 1}),
    "an empty result": ([asked(), called('{"city": "Rome"}', "{}"), result(""), result("R2R", 1)], {"R2R": 1, "Rome": 1}),
    "a result of nothing": ([asked(), called('{"city": "Rome"}'), result(None)], {"Rome": 1}),
    "JSON": ([asked(), called("{}"), result('{"t": "R1R", "a": [{"b": null}]}')], {"R1R": 1}),
    "markup": ([asked(), called("{}"), result("</tool_response> <tool_call> {{ x }} {% if %} <|im_end|> R1R </s>")], {"R1R": 1, "{{ x }} {% if %}": 1}),
    "a result after the answer": ([asked(), called("{}"), result("R1R"), {"role": "assistant", "content": "Sunny.R"}], {"R1R": 1, "Sunny.R": 1})}


@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_result_is_in_the_prompt_as_often_as_given(opened, name, tools):
    for words, (sent, counts) in RESULTS.items():
        shown = prompt(opened[name], sent, TOOLS[tools])
        assert {text: shown.count(text) for text in counts} == counts, (words, shown)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_before_a_call_stays_outside_it(opened, name):
    sent = [asked(), called('{"city": "Rome"}', text="Let me see."), result("R1R")]
    shown = prompt(opened[name], sent, [TOOL])
    assert shown.index("Let me see.") < shown.index("Rome") and "Let me see.weather" not in shown
    assert shown[:shown.index("R1R")].count("weather") == ("weather" in TEMPLATES[name]) + (name != "shows the first call")


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_in_results_stay_text(opened, name):
    """The names of special tokens in results and arguments stay text."""
    tokenizer = opened[name]
    end = tokenizer.specials["<|im_end|>"]

    def ends(word):
        sent = [asked(), called(json.dumps({"city": word, word: "x"}), word, text=word), result(word), asked("more")]
        return tokenizer.render(openai_messages(sent, with_tools=True), [TOOL]).count(end)
    assert ends("a<|im_end|>b") == ends("word")


def test_filling_in_a_template_shows_its_calls(opened):
    """How a template shows calls is found by filling it in."""
    def found(name):
        prompt(opened[name], [asked()])
        without, with_tools = opened[name].forms
        assert without == with_tools or name == "calls only with tools"
        return with_tools
    usual = HistoryForm()
    assert {name: found(name) for name in TEMPLATES if name != "no place for tools"} == {
        "pairs": replace(usual, wraps_text=True), "json": usual, "text": replace(usual, arguments_as_text=True),
        "printed": replace(usual, arguments_as_text=True), "object or text": usual, "no calls": replace(usual, calls="text"),
        "no results": replace(usual, results="text"), "neither": TEXT_ALONE, "results twice": replace(usual, results="text"),
        "refuses results": replace(usual, results="text"), "refuses several calls": replace(usual, single=True),
        "shows the first call": replace(usual, single=True), "names tool responses": replace(usual, wraps_text=True),
        "wants ids": replace(usual, gives_ids=True), "wants nine characters": replace(usual, nine_character_ids=True), "roles alternate": replace(usual, answers_results=True),
        "changes a list": replace(usual, calls="text"), "calls only with tools": usual,
        "results need their call": replace(usual, moves_orphans=True), "no calls beside text": replace(usual, text_apart=True)}
    assert not opened["no place for tools"].forms       # a system prompt describes them, and everything is text


@pytest.mark.parametrize("name, told", [
    ("json", []), ("no results", ["it loses results of calls, which are shown as messages of the user"]),
    ("calls only with tools", ["it loses earlier calls, which are shown as text of their messages where a request has no functions"])])
def test_what_a_template_loses_is_told_in_words(opened, name, told):
    prompt(opened[name], [asked()])
    assert differences(opened[name].forms) == told


def test_a_template_is_tried_only_once(text, monkeypatch):
    """It is tried once, and then filled in once for each conversation."""
    tokenizer = open_tokenizer(replace(text, chat_template=TEMPLATES["no results"]))
    filled = itertools.count()
    whole = compile_chat_template(TEMPLATES["no results"])

    class Counted:
        def render(self, *arguments):
            next(filled)
            return whole.render(*arguments)
    tokenizer.template = Counted()
    prompt(tokenizer, [asked()])
    first = next(filled)
    assert first < 50
    for number in range(1, 4):
        prompt(tokenizer, RESULTS["two results"][0], [TOOL])
    assert next(filled) == first + 4


def test_what_a_template_refuses_becomes_text(text, caplog):
    """Mistral's Ministral 3 wants an answer after results, and refuses an empty one."""
    refuses = """{% if m.role == 'user' and not loop.first and loop.previtem.role != 'user' and not loop.previtem.content %}{{ raise_exception('No!') }}{% endif %}
        {%- if m.role == 'user' and not loop.first and loop.previtem.role == 'tool' %}{{ raise_exception('Answer first') }}{% endif %}"""
    tokenizer = open_tokenizer(replace(text, chat_template=template(AS_JSON, refuses)))
    assert "<|im_start|>tool" in prompt(tokenizer, RESULTS["one result"][0], [TOOL])
    for _ in range(2):
        shown = prompt(tokenizer, RESULTS["a message after the result"][0], [TOOL])
        assert "<|im_start|>tool" not in shown and "<tool_response>\nR1R\n</tool_response>\nStop!" in shown
    assert caplog.text.count("shown as text in a conversation, since the model's chat template refused the messages: Answer first") == 1
    never = open_tokenizer(replace(text, chat_template=template(AS_JSON, "{{ raise_exception('Never after ' + loop.previtem.role) if 'no!' in m.content }}")))
    for before in ([], [called("{}"), result("x")]):        # the reason is that of the first try
        with pytest.raises(RequestError, match=f"refused the messages: Never after {'tool' if before else 'user'}"):
            prompt(never, [asked(), *before, asked("no!")])


def test_a_call_in_text_is_in_the_family_s_format(text):
    tags = BEGIN.replace("<tool_call> begins a call", "<tool_call><function=f><parameter=p>") + SHOWN + "<|im_end|>\n" + END
    shown = prompt(open_tokenizer(replace(text, chat_template=tags)), [asked(), called('{"city": "Rome", "days": [3]}', "Bo", text="Well."), result("R1R")], [TOOL])
    assert "Well.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n[3]\n</parameter>\n</function>\n</tool_call>\n" in shown
    assert "<parameter=arguments>\nBo\n</parameter>" in shown
    counted = BEGIN.replace("<tool_call> begins a call", "<|tool_call_begin|>") + SHOWN + "{{ m.tool_call_id if m.role == 'tool' }}<|im_end|>\n" + END
    shown = prompt(open_tokenizer(replace(text, chat_template=counted)), [asked(), called('{"city": "Rome"}', "{}"), result("R1R"), result("R2R", 1)], [TOOL])
    assert ('<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
            '<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>') in shown
    assert "R2Rfunctions.weather:1" in shown


@pytest.mark.parametrize("arguments", ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"])
def test_deepseek_s_arguments_are_an_object(text, arguments):
    """vLLM's template for V3.1 writes them as JSON, and the model's own adds them to a text."""
    source = template("<｜tool▁sep｜>" + arguments)
    assert open_tokenizer(replace(text, chat_template=source)).tool_format == "deepseek"
    assert '<｜tool▁sep｜>{"city": "Rome"}' in prompt(open_tokenizer(replace(text, chat_template=source)), RESULTS["one result"][0], [TOOL])


def test_a_result_without_id_finds_its_call(opened):
    """A result without an id is that of the call it names or else of the first without one."""
    calls = [{"id": sent, "function": {"name": name, "arguments": "{}"}} for sent, name in ((None, "time"), ("call00000", "weather"), (None, "weather"))]
    results = [{"role": "tool", "name": "weather", "content": "R1R"}, {"role": "tool", "content": "R2R"}, {"role": "tool", "tool_name": "weather", "content": "R3R"}]
    shown = prompt(opened["wants ids"], [asked(), called(tool_calls=calls), *results], [TOOL])
    assert re.findall(r"call\d{5}", shown) == ["call00001", "call00000", "call00002", "call00000", "call00001", "call00002"]


def test_an_answer_and_its_call_become_one_message(opened):
    """An answer and its call in two messages are one where calls are text."""
    shown = prompt(opened["no place for tools"], [asked(), {"role": "assistant", "content": "Let me see."}, called('{"city": "Rome"}'), result("R1R")], [TOOL])
    assert shown.count("<|im_start|>assistant") == 2 and "Let me see.\n<tool_call>" in shown


def test_thousands_of_calls_are_all_in_the_prompt(opened):
    """Thousands of calls and results of one turn are all in the prompt."""
    calls = [{"id": f"i{number}", "function": {"name": "weather", "arguments": "{}"}} for number in range(2000)]
    backwards = [{"role": "tool", "tool_call_id": f"i{number}", "content": "R1R"} for number in reversed(range(2000))]
    without = [{"role": "tool", "content": "R1R"}] * 2000
    for place, name in enumerate(("wants ids", "refuses several calls", "results need their call", "neither", "names tool responses")):
        for results in (backwards, without) if WHOLE else [(backwards, without)[place % 2]]:
            assert prompt(opened[name], [asked(), called(tool_calls=calls), *results], [TOOL]).count("R1R") == 2000


def test_the_words_of_a_trial_are_in_no_prompt(opened):
    for name in TEMPLATES:
        assert "zq" not in prompt(opened[name], RESULTS["several rounds"][0], [TOOL]), RESULT
