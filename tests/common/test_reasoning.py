"""Reasoning apart from content: what a model thinks before it answers, in the formats of several families."""

import asyncio
import json
import re
from dataclasses import replace

import aiohttp
import pytest

from chatlm.common.config import Settings
from chatlm.common.messages.requests import Delta, Message, Piece, SamplingParams, ThinkingEnds
from chatlm.common.text import formats
from chatlm.common.text.formats import thoughts_of, tool_format_of
from chatlm.common.text.grammar import check_grammar, json_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.dialects.openai import OPENAI_FIELDS
from chatlm.front.api.fields import parse_fields
from chatlm.front.api.message_readers import openai_messages
from chatlm.front.api.readers import parse_openai_request
from chatlm.worker.engine.answer import Answer
from chatlm.worker.weights.formats.gguf.description import gguf_text
from answers import asked, calls_of, said, thought, together
from engine_parts import use_tokenizer
from engines import draft_eagerly, load, make_engine, pieces, tokens_of
from fake_pool import FakePool, Letters, frames, serving
from nightly import by_day
from tiny_gguf import small_gguf_metadata
from works import assignment, changed

THINK = ("<think>", "</think>")
NAMES = ("weather", "time")
ROME = ("call", ("weather", '{"city": "Rome"}'))


class Vocabulary(Letters):
    """Letters, and tokens of their own for these markers: special ones, or with text as in Qwen's files."""

    def __init__(self, tool_format=None, thoughts=None, tokens=(), text_of_its_own=False, wrapper=("", "")):
        super().__init__()
        self.wrapper = wrapper
        self.tool_format, self.thoughts = tool_format, thoughts
        ids = {name: 300 + index for index, name in enumerate(tokens)}
        if text_of_its_own:
            self.added = {token: name.encode() for name, token in ids.items()}
        else:
            self.specials |= ids
        self.ids, self.vocab_size = ids, 300 + len(ids)

    def piece(self, token):
        return self.added.get(token) or super().piece(token)

    def encode(self, text, begins=True):
        return list(text.encode())

    def encode_with_specials(self, text):
        return (
            self.tokens("¦".join(re.split(f"({'|'.join(map(re.escape, self.ids))})", text)))
            if self.ids
            else self.encode(text)
        )

    def tokens(self, text):
        """Its tokens, where a marker is between two bars (¦ or |): |<think>| is the token, <think> is
        text."""
        return [
            token
            for index, part in enumerate(text.split("¦" if "¦" in text else "|"))
            for token in ([self.ids[part]] if index % 2 else self.encode(part))
        ]


def told_by(vocabulary, text, prompt="", resumed=0, reason="eos", **params):
    """What an answer tells after each of its tokens, and how many were reasoning."""
    ids = [*vocabulary.tokens(text)]
    work = assignment(
        "a",
        (256, *vocabulary.tokens(prompt)),
        SamplingParams(),
        999,
        resumed_ids=tuple(ids[:resumed]),
        chat=True,
        **{"tool_names": NAMES if vocabulary.tool_format else ()} | params,
    )
    answer, told = Answer(work, vocabulary), []
    for number, token in enumerate(ids[resumed:], resumed + 1):
        answer.push(token, number, 999 - number)
        told.append((answer.take(), answer.reasoning_tokens))
        if answer.reason:
            return told
    answer._end("length" if reason == "length" else "stop", reason)
    return [*told, (answer.take(), answer.reasoning_tokens)]


def joined(told):
    """[(kind, text)], with the calls as (name, arguments), of what an answer told."""
    parts = together(delta for deltas, _ in told for delta in deltas)
    return [(kind, (name, text) if kind == "call" else text) for kind, text, name in parts]


HARMONY = dict(tool_format="harmony", thoughts=("<|message|>", "<|end|>"), tokens=formats.HARMONY)
TAGS = dict(tool_format="tagged", thoughts=THINK, tokens=(*THINK, "<tool_call>", "</tool_call>"))
ERNIE = TAGS | dict(wrapper=("<response>", "</response>"))  # spelled out, or tokens
ERNIE_TOKENS = ERNIE | dict(tokens=(*TAGS["tokens"], *ERNIE["wrapper"]))
GEMMA = dict(
    tool_format="gemma",
    thoughts=("<|channel>", "<channel|>"),
    tokens=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
)
CASES = {
    "qwen": (
        TAGS,
        "",
        "|<think>|\nHm, <b>.\n|</think>|\n\nIt is\n late. ",
        [("reasoning", "Hm, <b>."), ("text", "It is\n late. ")],
    ),
    "look-alikes are text": (
        TAGS,
        "",
        "A <think> tag </think> <tool_call>",
        [("text", "A <think> tag </think> <tool_call>")],
    ),
    "nothing thought": (TAGS, "", "|<think>|\n\n|</think>|\n\nYes", [("text", "Yes")]),
    "opened by the template": (
        TAGS,
        "assistant\n|<think>|\n",
        "Hm.\n|</think>|\n\nYes",
        [("reasoning", "Hm."), ("text", "Yes")],
    ),
    "closed by the template": (TAGS, "assistant\n|<think>|\n\n|</think>|\n\n", "Yes", [("text", "Yes")]),
    "spelled out": (
        dict(thoughts=THINK),
        "",
        "<think>a <thin</think>b <think>",
        [("reasoning", "a <thin"), ("text", "b <think>")],
    ),
    "never ended": (TAGS, "", "|<think>|Hm\n\nhm ", [("reasoning", "Hm\n\nhm")]),
    "brackets": (
        dict(thoughts=("[THINK]", "[/THINK]"), tokens=("[THINK]", "[/THINK]")),
        "",
        "|[THINK]|a|[/THINK]|b",
        [("reasoning", "a"), ("text", "b")],
    ),
    "a wrapper": (
        ERNIE,
        "|<think>|\n",
        "Hm.\n|</think>|\n\n<response>\nIt is\n late.\n</response>\n",
        [("reasoning", "Hm."), ("text", "It is\n late.")],
    ),
    "a wrapper of tokens": (
        ERNIE_TOKENS,
        "|<think>|\n",
        "Hm.\n|</think>|\n\n|<response>|\nLate.\n\n|</response>|\n",
        [("reasoning", "Hm."), ("text", "Late.\n")],
    ),
    "a wrapper's end in text": (
        ERNIE,
        "",
        "<response>\nWrite a\n</response>\nat the end.\n</response>",
        [("text", "Write a\n</response>\nat the end.")],
    ),
    "a wrapper in text": (
        ERNIE,
        "",
        "Use <response> and </response>\n",
        [("text", "Use <response> and </response>\n")],
    ),
    "a wrapper, then a call": (
        ERNIE,
        "|<think>|\n",
        (
            'Hm.\n|</think>|\n\n<response>\nLet me.\n</response>\n|<tool_call>|\n{"name": "weather",'
            ' "arguments": {"city": "Rome"}}\n|</tool_call>|\n'
        ),
        [("reasoning", "Hm."), ("text", "Let me."), ROME],
    ),
    "a call without a wrapper": (
        ERNIE,
        "|<think>|\n",
        (
            'Hm.\n|</think>|\n\n|<tool_call>|\n{"name": "weather", "arguments": {"city":'
            ' "Rome"}}\n|</tool_call>|\n'
        ),
        [("reasoning", "Hm."), ROME],
    ),
    "a wrapper that the prompt begins": (
        ERNIE,
        "|</think>|\n\n<response>\nIt",
        "'s late.\n</response>\n",
        [("text", "'s late.")],
    ),
    "then a call": (
        TAGS,
        "",
        (
            'x|<think>|a|</think>|Let me.|<tool_call>|\n{"name": "weather", "arguments": {"city":'
            ' "Rome"}}\n|</tool_call>|'
        ),
        [("text", "x"), ("reasoning", "a"), ("text", "\n\nLet me."), ROME],
    ),
    "harmony": (
        HARMONY,
        "¦<|start|>¦assistant",
        (
            "¦<|channel|>¦analysis¦<|message|>¦Hm,"
            " <|end|>.¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦final¦<|message|>¦Yes."
        ),
        [("reasoning", "Hm, <|end|>."), ("text", "Yes.")],
    ),
    "harmony's preamble and call": (
        HARMONY,
        "¦<|start|>¦assistant",
        (
            "¦<|channel|>¦analysis¦<|message|>¦Hm.¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦commentary¦<|message|>¦Let"
            " me.¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦commentary to=functions.weather"
            " ¦<|constrain|>¦json¦<|message|>¦{\"city\": \"Rome\"}¦<|call|>¦"
        ),
        [("reasoning", "Hm."), ("text", "Let me."), ROME],
    ),
    "a call in the role part, on the analysis channel": (
        HARMONY,
        "¦<|start|>¦assistant",
        ' to=functions.weather¦<|channel|>¦analysis code¦<|message|>¦{"city": "Rome"}',
        [ROME],
    ),
    "a call of no function": (
        HARMONY,
        "¦<|start|>¦assistant",
        "¦<|channel|>¦commentary to=python¦<|message|>¦1 + 1",
        [("reasoning", "1 + 1")],
    ),
    "harmony goes on from the middle of its answer": (
        HARMONY,
        "¦<|start|>¦assistant¦<|channel|>¦final¦<|message|>¦It is ",
        "late.",
        [("text", "late.")],
    ),
    "two thoughts": (
        HARMONY,
        "¦<|start|>¦assistant",
        "¦<|channel|>¦analysis¦<|message|>¦A¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦analysis¦<|message|>¦B",
        [("reasoning", "A\n\nB")],
    ),
    "gemma": (
        GEMMA,
        "model\n",
        "¦<|channel>¦thought\nHm, <channel|>.\n¦<channel|>¦It is\n late.",
        [("reasoning", "Hm, <channel|>."), ("text", "It is\n late.")],
    ),
    "gemma after a result": (
        GEMMA,
        "¦<|channel>¦thought\n",
        "thought\nHm.¦<channel|>¦Yes.¦<channel|>¦",
        [("reasoning", "thought\nHm."), ("text", "Yes.")],
    ),
    "gemma without thinking": (GEMMA, "model\n¦<|channel>¦thought\n¦<channel|>¦", "Yes.", [("text", "Yes.")]),
    "gemma without its heading": (
        GEMMA,
        "",
        "¦<|channel>¦thoughts¦<channel|>¦Yes.",
        [("reasoning", "thoughts"), ("text", "Yes.")],
    ),
    "gemma's call": (
        GEMMA,
        "",
        'a¦<|channel>¦thought\nHm.¦<|tool_call>¦call:weather{city:¦<|"|>¦Rome¦<|"|>¦}¦<tool_call|>¦b',
        [("text", "a"), ("reasoning", "Hm."), ROME, ("text", "b")],
    ),
    "no harmony at all": (HARMONY, "¦<|start|>¦assistant", "Yes, it is.", [("text", "Yes, it is.")]),
}


@pytest.mark.parametrize("own_text", [False, True], ids=["special tokens", "tokens with text"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_tell_reasoning_content_and_calls(case, own_text):
    """Reasoning, content and calls are told apart by tokens, also by a worker that takes over."""
    about, prompt, text, parts = CASES[case]
    vocabulary = Vocabulary(**about, text_of_its_own=own_text and "harmony" not in about.values())
    told = told_by(vocabulary, text, prompt)
    assert joined(told) == parts
    assert (told[-1][1] > 0) == ("reasoning" in dict(parts) or case == "nothing thought")
    for cut in range(len(vocabulary.tokens(text))):
        assert told_by(vocabulary, text, prompt, cut) == told[cut:]


def test_reasoning_tokens_include_the_markers():
    """Reasoning tokens are those between the markers and these."""
    told = told_by(Vocabulary(**TAGS), "|<think>|four|</think>|content")
    assert told[-1][1] == 6


# a budget, and "Answer now"


class Written:
    """An answer whose drawn tokens depend on their place alone, as those of a model do; forced ones come in
    between."""

    def __init__(
        self,
        vocabulary,
        script,
        prompt="",
        resumed_ids=(),
        on_token=lambda written: None,
        length=30,
        **params,
    ):
        work = assignment(
            "a",
            (256, *vocabulary.tokens(prompt)),
            SamplingParams(),
            999,
            resumed_ids=resumed_ids,
            chat=True,
            **params,
        )
        self.answer, self.ids, drawn = Answer(work, vocabulary), [*resumed_ids], vocabulary.tokens(script)
        self.ends, self.told = [], []  # after each drawn token: how many there are, what is told
        while len(self.ids) < length:
            on_token(self)
            token = drawn[len(self.ids) % len(drawn)]
            self.ids += self.answer.push(token, len(self.ids) + 1, 999)
            self.ends.append(len(self.ids))
            self.told.append((self.answer.take(), self.answer.reasoning_tokens))

    @property
    def parts(self):
        return joined(self.told)


OPENED = "assistant|<think>|\n"
BUDGETS = {  # vocabulary, prompt, what the model would write, budget and last thought, the parts that its answer begins with
    "opened by the template": (
        TAGS,
        OPENED,
        "abcdefgh",
        dict(thinking_budget=5),
        [("reasoning", "abcde"), ("text", "ghabcdefghabcdefghabcdef")],
    ),
    "with a last thought": (
        TAGS,
        OPENED,
        "abcdefgh",
        dict(thinking_budget=5, last_thought="Now."),
        [("reasoning", "abcde\n\nNow."), ("text", "fghabcdefghabcdef")],
    ),
    "opened by the model": (
        TAGS,
        "",
        "|<think>|abcdefgh",
        dict(thinking_budget=3),
        [("reasoning", "abc"), ("text", "efgh")],
    ),
    "the last thought comes once": (
        TAGS,
        "",
        "|<think>|abcdefgh",
        dict(thinking_budget=3, last_thought="Now."),
        [("reasoning", "abc\n\nNow."), ("text", "cdefgh\n\nbcdefgh")],
    ),
    "no thinking at all": (
        TAGS,
        "",
        "|<think>|abcdefgh",
        dict(thinking_budget=0),
        [("text", "bcdefgh\n\nbcdefgh")],
    ),
    "spelled out": (
        dict(thoughts=THINK),
        "",
        "<think>abcdefgh",
        dict(thinking_budget=3),
        [("reasoning", "abc"), ("text", "ink>abc")],
    ),
    "a character is finished": (
        TAGS,
        OPENED,
        "日",
        dict(thinking_budget=4),
        [("reasoning", "日日"), ("text", "\ufffd\ufffd日")],
    ),
    "harmony": (
        HARMONY,
        "¦<|start|>¦assistant",
        "¦<|channel|>¦analysis¦<|message|>¦abcdefghijklmno",
        dict(thinking_budget=3, last_thought="Now."),
        [("reasoning", "abc\n\nNow.")],
    ),
    "gemma": (
        GEMMA,
        "¦<|channel>¦thought\n",
        "abcdefgh",
        dict(thinking_budget=5, last_thought="Now."),
        [("reasoning", "abcde\n\nNow."), ("text", "fghabcdef")],
    ),
    "more than it thinks": (
        TAGS,
        OPENED,
        "ab|</think>|cd",
        dict(thinking_budget=99),
        [("reasoning", "ab"), ("text", "cdabcdab")],
    ),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_reasoning_ends_after_its_budget(case):
    """Reasoning ends after its budget, also by a worker that takes over."""
    about, prompt, script, params, parts = BUDGETS[case]
    vocabulary = Vocabulary(**about)
    whole = Written(vocabulary, script, prompt, **params)
    for (kind, text), (found_kind, found) in zip(parts, whole.parts, strict=False):
        assert (
            kind == found_kind and found.startswith(text)
            if (kind, text) == parts[-1]
            else (kind, text) == (found_kind, found)
        )
    for step, end in enumerate(whole.ends[:-1], 1):
        rest = Written(vocabulary, script, prompt, tuple(whole.ids[:end]), **params)
        assert (rest.ids, rest.told) == (whole.ids, whole.told[step:])


def test_harmony_may_continue_with_any_message():
    """Harmony goes on with any message, and with the final one if it would think again."""
    vocabulary = Vocabulary(**HARMONY)
    script = "¦<|channel|>¦analysis¦<|message|>¦ab" + "¦<|channel|>¦analysis¦<|message|>¦".join(
        "c" * 12 for _ in range(2)
    )
    written = Written(vocabulary, script, "¦<|start|>¦assistant", thinking_budget=2, length=80)
    shown = vocabulary.show(written.ids)
    assert shown.startswith("<|channel|>analysis<|message|>ab<|end|><|start|>assistant")
    assert shown.count(
        "analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ) == 1 and written.parts[0] == ("reasoning", "ab")


@pytest.mark.parametrize("asked_after", range(6))
def test_ended_thinking_ends_at_the_same_token(asked_after):
    """Thinking that somebody ended ends at the same token, also by a worker that takes over."""
    vocabulary, told = Vocabulary(**TAGS), []

    def ask(written):
        if len(written.ids) == asked_after:
            told.append(written.answer.end_thinking())
            assert written.answer.end_thinking() == told[-1]  # asked twice

    whole = Written(vocabulary, "abcdefgh", OPENED, on_token=ask, last_thought="Now.", thinking_budget=8)
    assert told == [asked_after + 1]
    assert (
        whole.parts[0] == ("reasoning", "abcdefgh"[: asked_after + 1] + "\n\nNow.")
        and whole.answer.end_thinking() is None
    )
    for step, end in enumerate([0, *whole.ends[:-1]]):
        rest = Written(
            vocabulary,
            "abcdefgh",
            OPENED,
            tuple(whole.ids[:end]),
            thinking_ends=told[0],
            last_thought="Now.",
            thinking_budget=8,
        )
        assert (rest.ids, rest.told) == (whole.ids, whole.told[step:])


def test_nothing_is_ended_where_nothing_thinks():
    written = Written(Vocabulary(**TAGS), "abc", thinking_budget=0)
    assert written.parts == [("text", "abc" * 10)] and written.answer.end_thinking() is None
    raw = Answer(assignment("a", (256,), SamplingParams(), 99, thinking_budget=0), Vocabulary(**TAGS))
    assert raw.push(mark := vocabulary_mark("<think>"), 1, 50) == [mark] and raw.end_thinking() is None


def vocabulary_mark(name):
    return Vocabulary(**TAGS).ids[name]


def test_stop_strings_are_sought_in_content_alone():
    vocabulary = Vocabulary(**TAGS)
    told = told_by(
        vocabulary,
        '|<think>|END|</think>|a|<tool_call>|{"name": "time", "arguments": {"x": "END"}}|</tool_call>|b'
        ' END c',
        stop=("END",),
    )
    assert joined(told) == [
        ("reasoning", "END"),
        ("text", "a"),
        ("call", ("time", '{"x": "END"}')),
        ("text", "b "),
    ]
    assert len(told) == len(
        vocabulary.tokens(
            '|<think>|END|</think>|a|<tool_call>|{"name": "time", "arguments": {"x":'
            ' "END"}}|</tool_call>|b END'
        )
    )


def test_a_raw_completion_is_all_text():
    vocabulary = Vocabulary(**TAGS, text_of_its_own=True)
    work = assignment("a", (256,), SamplingParams(), 99)
    answer = Answer(work, vocabulary)
    for number, token in enumerate(vocabulary.tokens("|<think>|a|</think>|b")):
        answer.push(token, number, 50)
    assert answer.take() == (Delta("text", "<think>a</think>b"),) and answer.reasoning_tokens == 0


@pytest.fixture
def thinking():
    return FakePool(
        [said(thought("Hm, "), tokens=(1,)), said(thought("well."), tokens=(2,)), said("Hello", tokens=(3,))]
    )


async def post(url, path, body):
    async with aiohttp.ClientSession() as client, client.post(url + path, json=body) as response:
        return (
            frames(await response.read())
            if body.get("stream") or not path.startswith("/v1")
            else await response.json()
        )


HI = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_a_message_has_both_names_of_reasoning(thinking):
    async with serving(thinking) as url:
        body = await post(url, "/v1/chat/completions", HI)
        *chunks, _ = await post(url, "/v1/chat/completions", HI | {"stream": True})
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (
        "Hm, well.",
        "Hm, well.",
        "Hello",
    )
    assert "reasoning_tokens" in body["usage"]["completion_tokens_details"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[1:4] == [
        {"reasoning_content": "Hm, ", "reasoning": "Hm, "},
        {"reasoning_content": "well.", "reasoning": "well."},
        {"content": "Hello"},
    ]


async def test_reasoning_events_show_old_clients_nothing(thinking):
    """Native events of reasoning have no token that old clients would show."""
    async with serving(thinking) as url:
        events = await post(url, "/chat/completions", HI)
    assert events[:3] == [
        {"reasoning": "Hm, ", "gpu": 0},
        {"reasoning": "well.", "gpu": 0},
        {"token": "Hello", "gpu": 0},
    ]
    assert events[3]["usage"]["reasoning_tokens"] == 0


async def test_messages_take_reasoning_by_either_name(thinking):
    """Reasoning comes back in messages under either name, and options reach the request."""
    for name in ("reasoning_content", "reasoning"):
        body = {
            "messages": [
                *HI["messages"],
                {"role": "assistant", "content": "Hello", name: "Hm."},
                *HI["messages"],
            ],
            "reasoning_effort": "high",
            "chat_template_kwargs": {"enable_thinking": False},
        }
        async with serving(thinking) as url:
            await post(url, "/v1/chat/completions", body)
            await post(url, "/chat/completions", body)
        for request in thinking.requests[-2:]:
            assert (
                request.messages[1].more == {"reasoning_content": "Hm."} and request.messages[0].more is None
            )
            assert request.template_options == {
                "reasoning_effort": "high",
                "chat_template_kwargs": {"enable_thinking": False},
            }


@pytest.mark.parametrize(
    "change, param",
    [
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": 5}]}, "messages[0].reasoning"),
    ],
)
async def test_what_is_no_reasoning_is_400(thinking, change, param):
    async with serving(thinking) as url:
        body = await post(url, "/v1/chat/completions", HI | change)
    assert (body["error"]["code"], body["error"]["param"]) == ("invalid_value", param)


def templated(template, default_model_path):
    return open_tokenizer(replace(load(default_model_path).text, system=None, chat_template=template))


THINKING = """{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n' if enable_thinking is undefined or enable_thinking else '<think>\n\n</think>\n\n' }}{{ reasoning_effort }}{% endif %}"""


@pytest.mark.parametrize(
    "options, end",
    [
        ({}, "<think>\n"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\nnone"),
        ({"reasoning_effort": "low"}, "<think>\nlow"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            "<think>\n\n</think>\n\nlow",
        ),
        ({"chat_template_kwargs": {"messages": [], "reasoning_effort": "<|im_end|>"}}, "<think>\n<|im_end|>"),
    ],
)
def test_templates_know_how_much_to_think(options, end, default_model_path):
    """Templates are told how much to think and what was thought."""
    tokenizer = templated(THINKING, default_model_path)
    messages = openai_messages(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho", "reasoning": "Hm<|im_end|>"},
        ]
    )
    ids = tokenizer.render(messages, (), options)
    assert (
        tokenizer.show(ids)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>Hm<|im_end|></think>Ho<|im_end|>\n<|im_start|>assistant\n"
        + end
    )
    assert ids.count(tokenizer.specials["<|im_end|>"]) == 2  # those that a client wrote are text


# what gpt-oss's own template does with a call, in short: one call per message, its reasoning or its content
GPT_OSS = """{%- for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{%- if m.content and m.thinking %}{{ raise_exception('both') }}{% elif m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- for tool in tools or [] %}{{ '// ' + tool.function.description }}{% endfor %}{{ reasoning_effort }}<|start|>assistant"""
CALLS = [
    {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "Need both.",
        "tool_calls": [
            {
                "id": f"call_{city}",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "%s"}' % city},
            }
            for city in ("Rome", "Bonn")
        ],
    },
    {"role": "tool", "tool_call_id": "call_Bonn", "content": "10"},
    {"role": "tool", "tool_call_id": "call_Rome", "content": "20"},
]


@pytest.mark.parametrize("end", ["\n", "\n</", "\n</response", "\n</response>\n"])
def test_no_part_of_a_cut_wrapper_is_text(end):
    """Its end where an answer is cut, as little as its beginning."""
    assert joined(told_by(Vocabulary(**ERNIE), "<response>\nLate." + end, reason="length")) == [
        ("text", "Late.")
    ]
    assert joined(told_by(Vocabulary(**ERNIE), "|<think>|Hm.|</think>|\n<respon", reason="length"))[0] == (
        "reasoning",
        "Hm.",
    )


@pytest.mark.parametrize(
    "template, wrapper",
    [
        ("<think></think><response></response>", ("<response>", "</response>")),
        ("<response></response>", ("", "")),
        (THINKING, ("", "")),
    ],
)
def test_a_thinking_template_may_wrap_content(template, wrapper, default_model_path):
    """What encloses the content of ERNIE 4.5 and Granite 3.3."""
    assert templated(template, default_model_path).wrapper == wrapper


def test_harmony_s_history_has_one_call_per_message(default_model_path):
    """Harmony's history has one call per message with reasoning and preamble before it."""
    tokenizer = templated(GPT_OSS, default_model_path)
    tokenizer.specials |= {name: 49152 + index for index, name in enumerate(formats.HARMONY)}
    ids = tokenizer.render(
        openai_messages(CALLS, True),
        [{"type": "function", "function": {"name": "weather"}}],
        {"reasoning_effort": "minimal"},
    )
    assert (
        tokenizer.show(ids)
        == "<|start|>assistant<|channel|>analysis<|message|>Need"
        " both.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me"
        " look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary"
        " json<|message|>{\"city\": \"Rome\"}<|call|><|start|>tool<|message|>20<|end|><|start|>assistant"
        " to=functions.weather<|channel|>commentary json<|message|>{\"city\":"
        " \"Bonn\"}<|call|><|start|>tool<|message|>10<|end|>// low<|start|>assistant"
    )
    assert ids.count(tokenizer.specials["<|end|>"]) == 4


def test_mistral_s_call_ids_have_nine_characters(default_model_path):
    tokenizer = templated(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{"
        " raise_exception('9') }}{% endif %}{{ c.id }} {% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id"
        " }} {% endif %}{% endfor %}{% if tools %}[TOOL_CALLS]{% endif %}",
        default_model_path,
    )
    text = tokenizer.show(tokenizer.render(openai_messages(CALLS, True)))
    rome, bonn, *results = text.split()
    assert results == [bonn, rome] and rome != bonn


@pytest.mark.parametrize(
    "template, tool_format, thoughts",
    [
        (THINKING, None, THINK),
        (GPT_OSS, "harmony", ("<|message|>", "<|end|>")),
        ("{% if tools %}[TOOL_CALLS][ARGS][THINK][/THINK]", "mistral name", ("[THINK]", "[/THINK]")),
        (
            "{% if tools %}[MODEL_SETTINGS][TOOL_CALLS][ARGS][THINK][/THINK]",
            "mistral settings",
            ("[THINK]", "[/THINK]"),
        ),
        (
            "{% if tools %}<|thought_start|><|thought_end|><|tool_call_start|>\n```python",
            "minicpm fenced",
            ("<|thought_start|>", "<|thought_end|>"),
        ),
        ("{% if tools %}<|tool_call_start|>\n```python<think></think>", "minicpm fenced", THINK),  # MiniCPM 4
        (
            "{% if tools %}<tool_call>name\n<arg_key></arg_key><think></think></assistant>",
            "glm tags",
            THINK,
        ),  # Laguna
        ("{% if tools %}<tool_call></tool_call><think></think>", "tagged", THINK),  # Youtu-LLM, ERNIE 4.5
        ("{% if tools %}[TOOL_CALLS]", "mistral", None),
        ("{{ messages }}", None, None),
    ],
)
def test_a_template_tells_its_formats(template, tool_format, thoughts):
    assert (tool_format_of(template), thoughts_of(template)) == (tool_format, thoughts)


# on the default model, whose vocabulary has spare special tokens


PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["age"],
    "additionalProperties": False,
}
SPARE = {"<think>": 5, "</think>": 6, **{name: 7 + index for index, name in enumerate(formats.HARMONY)}}


@pytest.fixture(scope="module")
def engine(default_model_path):
    return make_engine(default_model_path, num_pages=100, max_batch=8, as_stored=True)


VOCABULARIES = {}  # by special tokens: what grammars know of a tokenizer, whatever its template


def with_template(engine, default_model_path, template, names=()):
    if known := vars(engine.tokenizer).get("bare_vocabulary"):
        VOCABULARIES[frozenset(engine.tokenizer.specials.items())] = known
    tokenizer = use_tokenizer(engine, templated(template, default_model_path))
    tokenizer.specials = {
        name: token for name, token in tokenizer.specials.items() if token not in SPARE.values()
    } | {name: SPARE[name] for name in names}
    tokenizer.stop_tokens = load(default_model_path).text.stop_tokens
    if known := VOCABULARIES.get(frozenset(tokenizer.specials.items())):
        tokenizer.bare_vocabulary = known


def run_all(engine, work):
    return pieces(engine, [work])[work.id]


def test_the_default_model_thinks_then_answers(engine, default_model_path):
    """The default model thinks and answers, and so does a worker that takes over."""
    with_template(engine, default_model_path, THINKING)
    prompt = tuple(engine.tokenizer.render([Message("user", "What is the capital of Japan?")]))
    opening = tuple(engine.tokenizer.encode("The user wants a city.\n</think>\n\n"))
    whole = run_all(
        engine,
        assignment("a", prompt, SamplingParams(0.0), len(opening) + 12, resumed_ids=opening, chat=True),
    )
    ids = (*opening, *(token for piece in whole for token in piece.tokens))
    assert "".join(piece.text for piece in whole).strip() and not any(
        piece.joined("reasoning") for piece in whole
    )
    assert whole.end.usage.reasoning_tokens >= len(opening) - 3
    answer = Answer(assignment("a", prompt, SamplingParams(0.0), 99, chat=True), engine.tokenizer)
    for number, token in enumerate(ids):
        answer.push(token, number, 50)
    reasoning, text = answer.take()
    assert reasoning == thought("The user wants a city.")
    assert text.kind == "text" and text.text.startswith("".join(piece.text for piece in whole)[:5])


@pytest.mark.parametrize(
    "template, names, opened",
    [
        pytest.param(
            THINKING, SPARE.keys() - set(formats.HARMONY), True, marks=pytest.mark.slow
        ),  # by day where a budget ends it, below
        (THINKING.replace("'<think>\n' if", "'' if"), SPARE.keys() - set(formats.HARMONY), False),
        (THINKING, (), True),
        pytest.param(GPT_OSS, formats.HARMONY, False, marks=pytest.mark.slow),
    ],
    ids=["opened by the template", "opened by the model", "spelled out", "harmony"],
)
def test_a_schema_leaves_reasoning_free(engine, default_model_path, template, names, opened):
    """A schema holds for the content, and reasoning before it is free."""
    with_template(engine, default_model_path, template, names)
    prompt = tuple(engine.tokenizer.render([Message("user", "How old is Ann? Answer in JSON.")]))
    close = engine.tokenizer.specials.get(
        "<|end|>" if "harmony" == engine.tokenizer.tool_format else "</think>"
    )
    # a special token that the model never learned needs a push
    bias = (
        ((close, 18.0),) if close else tuple((token, 25.0) for token in engine.tokenizer.encode("</think>"))
    )
    source = json_grammar(PERSON, "response_format")
    found = run_all(
        engine,
        assignment(
            "a",
            prompt,
            SamplingParams(1.0, seed=3, logit_bias=bias),
            150,
            grammar=source,
            grammar_param="response_format",
            chat=True,
        ),
    )
    text, reasoning = ("".join(piece.joined(kind) for piece in found) for kind in ("text", "reasoning"))
    assert (found.end.reason, found.end.stop_reason) == ("stop", "grammar"), (text, reasoning)
    assert 0 <= json.loads(text)["age"] <= 130
    if opened:
        assert found.end.usage.reasoning_tokens > 0
    for cut in (1, len(found) - 2):  # the same answer continues elsewhere
        ids = tuple(token for piece in found[:cut] for token in piece.tokens)
        rest = run_all(
            engine,
            assignment(
                "b",
                prompt,
                SamplingParams(1.0, seed=3, logit_bias=bias),
                150,
                grammar=source,
                grammar_param="response_format",
                chat=True,
                resumed_ids=ids,
            ),
        )
        assert "".join(piece.text for piece in rest) == "".join(piece.text for piece in found[cut:])
        assert [token for piece in rest for token in piece.tokens] == [
            token for piece in found[cut:] for token in piece.tokens
        ]


@pytest.mark.parametrize(
    "names",
    [SPARE.keys() - set(formats.HARMONY), pytest.param((), marks=pytest.mark.slow)],
    ids=["tokens", "spelled out"],
)
def test_default_thinking_ends_at_one_place(engine, default_model_path, names, monkeypatch):
    """The default model's: alone, batched, drafted and resumed."""
    draft_eagerly(monkeypatch)
    with_template(engine, default_model_path, THINKING, names)
    prompt = tuple(
        engine.tokenizer.render([Message("user", "Say it again: " + "one two three four five six. " * 8)])
    )
    like = dict(
        sampling=SamplingParams(0.2, seed=3),
        max_tokens=40,
        ignore_eos=True,
        chat=True,
        last_thought="Enough.",
    )
    works = [assignment(f"budget {budget}", prompt, **like, thinking_budget=budget) for budget in (3, 12)]
    alone = {work.id: run_all(engine, work) for work in works}
    for work in works:
        found = alone[work.id]
        mark = len(engine.tokenizer.encode_with_specials("</think>"))
        assert "".join(piece.joined("reasoning") for piece in found).endswith("\n\nEnough.")
        spare = (
            found.end.usage.reasoning_tokens
            - work.params.thinking_budget
            - mark
            - len(engine.tokenizer.encode("\n\nEnough.\n", False))
        )
        assert 0 <= spare <= 3
    same = {name: [(piece.tokens, piece.deltas) for piece in found] for name, found in alone.items()}
    assert sum(found.end.usage.drafted_tokens for found in alone.values()) > 0
    told = lambda found: [token for tokens, _ in found for token in tokens]  # noqa: E731
    batched = {
        name: told((piece.tokens, piece.deltas) for piece in found)
        for name, found in pieces(engine, works).items()
    }
    assert batched == {name: told(found) for name, found in same.items()}
    engine.drafts = False
    try:
        assert tokens_of(engine, works) == batched
        for cut in (2, 14):
            ids = tuple(told(same["budget 12"][:cut]))
            assert (*ids, *tokens_of(engine, [changed(works[1], resumed_ids=ids)])["budget 12"]) == tuple(
                batched["budget 12"]
            )
    finally:
        engine.drafts = True


@pytest.mark.parametrize(
    "template, names, opening",
    [
        (THINKING, SPARE.keys() - set(formats.HARMONY), ""),
        pytest.param(THINKING, (), "", marks=pytest.mark.slow),
        pytest.param(
            THINKING.replace("'<think>\n' if", "'' if"),
            SPARE.keys() - set(formats.HARMONY),
            "<think>",
            marks=pytest.mark.slow,
        ),
        (GPT_OSS, formats.HARMONY, "<|channel|>analysis<|message|>"),
    ],
    ids=["opened by the template", "spelled out", "opened by the model", "harmony"],
)
def test_a_schema_holds_after_ended_thinking(engine, default_model_path, template, names, opening):
    """A budget or somebody ended it."""
    with_template(engine, default_model_path, template, names)
    prompt = tuple(engine.tokenizer.render([Message("user", "How old is Ann? Answer in JSON.")]))
    work = assignment(
        "a",
        prompt,
        SamplingParams(1.0, seed=3),
        150,
        grammar=json_grammar(PERSON, "response_format"),
        grammar_param="response_format",
        chat=True,
        last_thought="Let me answer.",
        resumed_ids=tuple(engine.tokenizer.encode_with_specials(opening)),
    )
    for ended in (dict(thinking_budget=9), dict(thinking_ends=9 + len(work.resumed_ids)))[
        : 1 if opening else 2
    ]:
        found = run_all(engine, changed(work, **ended))
        text, reasoning = ("".join(piece.joined(kind) for piece in found) for kind in ("text", "reasoning"))
        assert (found.end.reason, found.end.stop_reason) == ("stop", "grammar"), (text, reasoning)
        assert 0 <= json.loads(text)["age"] <= 130 and reasoning.endswith("\n\nLet me answer.")
        for cut in (min(9, len(found) - 2), len(found) - 2):
            ids = (*work.resumed_ids, *(token for piece in found[:cut] for token in piece.tokens))
            rest = run_all(engine, changed(work, resumed_ids=ids, **ended))
            assert "".join(piece.text for piece in rest) == "".join(piece.text for piece in found[cut:])
            assert [token for piece in rest for token in piece.tokens] == [
                token for piece in found[cut:] for token in piece.tokens
            ]


def test_an_engine_ends_a_running_answer_s_thinking(engine, default_model_path):
    """An engine ends the thinking of a running answer, and tells where."""
    with_template(engine, default_model_path, THINKING, SPARE.keys() - set(formats.HARMONY))
    prompt = tuple(engine.tokenizer.render([Message("user", "What is the capital of Japan?")]))
    work = assignment("a", prompt, SamplingParams(1.0, seed=3), 60, chat=True, last_thought="Enough.")
    engine.add(work)
    events, ended = [], False
    while engine.busy:
        if not ended and sum(isinstance(event, Piece) for event in events) > 4:
            engine.end_thinking("a")
            engine.end_thinking("another")
            ended = True
        events += [event for _, event in engine.step()]
    engine.add(work)
    engine.end_thinking("a")
    events_before = [event for _, event in engine.step()]
    engine.cancel("a")
    [place] = [event.position for event in events if isinstance(event, ThinkingEnds)]
    ids = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    assert 5 < place < 9 and engine.tokenizer.show(ids[place:]).startswith("\n\nEnough.\n</think>")
    assert tokens_of(engine, [changed(work, thinking_ends=place)])["a"] == ids
    assert [event.position for event in events_before if isinstance(event, ThinkingEnds)] == [
        1
    ]  # before its first token


def test_a_prompt_without_thinking_closes_it(default_model_path):
    """It ends the reasoning that its template begins."""
    always = templated(
        THINKING.replace("if enable_thinking is undefined or enable_thinking", "if true"), default_model_path
    )
    knows = templated(THINKING, default_model_path)
    for tokenizer, options, end in (
        (always, {}, "<think>\n</think>"),
        (knows, {"thinking_budget": 0}, "<think>\n\n</think>\n\n"),
    ):
        request = asked(
            messages=(Message("user", "Hi"),), chat=True, thinking_budget=0, template_options=options
        )
        [ids] = asyncio.run(PromptMaker(tokenizer, 512).admit(request)).prompt_ids
        assert tokenizer.show(ids).endswith(f"<|im_start|>assistant\n{end}")
    seed = templated("{{ thinking_budget }}</think>", default_model_path)  # a template that tells the model
    assert seed.show(seed.render([Message("user", "Hi")], (), {"thinking_budget": 512})) == "512</think>"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


@pytest.mark.parametrize(
    "tool_format",
    by_day(["tagged", "json", "mistral", "mistral name", "harmony"], "json", "mistral name", "harmony"),
)
@pytest.mark.parametrize(
    "choice", by_day(["required", {"type": "function", "function": {"name": "weather"}}], "required")
)
def test_a_required_call_has_the_family_s_format(engine, default_model_path, tool_format, choice):
    with_template(
        engine,
        default_model_path,
        GPT_OSS if tool_format == "harmony" else "{{ messages[0].content }}<|im_start|>assistant\n",
        formats.HARMONY if tool_format == "harmony" else (),
    )
    engine.tokenizer.tool_format = tool_format
    values = parse_fields(
        {**HI, "tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": False}, OPENAI_FIELDS
    )
    request = parse_openai_request(values, Settings(), tool_format)
    check_grammar(request.params.grammar, request.params.grammar_param)
    prompt = tuple(engine.tokenizer.render([Message("user", "Weather in Rome?")]))
    bias = ((engine.tokenizer.specials["<|end|>"], 18.0),) if tool_format == "harmony" else ()
    found = run_all(
        engine,
        assignment(
            "a",
            prompt,
            SamplingParams(1.0, seed=1, logit_bias=bias),
            150,
            grammar=request.params.grammar,
            grammar_param="tools",
            tool_names=request.params.tool_names,
            chat=True,
        ),
    )
    calls = calls_of(found)
    names = [call.name for call in calls if call.name]
    assert found.end.reason == "stop" and len(names) == 1 and "".join(piece.text for piece in found) == ""
    arguments = json.loads("".join(call.text for call in calls))
    assert (
        names == ["weather"]
        and len(arguments["city"]) <= 10
        or names == ["time"]
        and arguments == {}
        and choice == "required"
    )


def test_a_harmony_message_s_end_ends_no_answer():
    metadata = small_gguf_metadata("gpt-4o", **{"tokenizer.chat_template": GPT_OSS})
    first = len(metadata["tokenizer.ggml.tokens"]) - 1  # its last token is <|end|>, the file's eos
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>", "<|start|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3, 3]
    text = gguf_text("x.gguf", metadata)
    assert text.stop_tokens == {first} and open_tokenizer(text).stop_tokens == {first + 1, first + 2}
