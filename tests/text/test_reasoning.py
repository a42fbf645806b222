"""Reasoning apart from content: what a model thinks before it answers, in the formats of several families."""

import aiohttp
import pytest

import chat_server
from chat_server import Answer, Piece, SamplingParams, StreamDecoder
from fake_pool import FakePool, Letters, frames, serving
from works import assignment

THINK = ("<think>", "</think>")
NAMES = ("weather", "time")
ROME = ("call", ("weather", '{"city": "Rome"}'))


class Vocabulary(Letters):
    """Letters, and tokens of their own for these markers: special ones, or with text as in Qwen's files."""

    def __init__(self, tool_format=None, thoughts=None, tokens=(), text_of_its_own=False):
        super().__init__()
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

    def tokens(self, text):
        """Its tokens, where a marker is between two bars (¦ or |): |<think>| is the token, <think> is text."""
        return [token for index, part in enumerate(text.split("¦" if "¦" in text else "|"))
                for token in ([self.ids[part]] if index % 2 else self.encode(part))]


def told_by(vocabulary, text, prompt="", resumed=0, reason="eos", **params):
    """What an answer tells after each of its tokens, and how many were reasoning."""
    ids = [*vocabulary.tokens(text)]
    work = assignment("a", (256, *vocabulary.tokens(prompt)), SamplingParams(), 999, resumed_ids=tuple(ids[:resumed]),
                      chat=True, **{"tool_names": NAMES if vocabulary.tool_format else ()} | params)
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
    parts = []
    for said in (each for saids, _ in told for each in saids):
        for kind, what in (("reasoning", said.reasoning), ("text", said.text), *(("call", call) for call in said.calls)):
            if kind == "call" and what.name:
                parts.append((kind, (what.name, what.arguments)))
            elif kind == "call":
                parts[-1] = (kind, (parts[-1][1][0], parts[-1][1][1] + what.arguments))
            elif what and parts and parts[-1][0] == kind:
                parts[-1] = (kind, parts[-1][1] + what)
            elif what:
                parts.append((kind, what))
    return parts


HARMONY = dict(tool_format="harmony", thoughts=("<|message|>", "<|end|>"), tokens=chat_server.HARMONY)
TAGS = dict(tool_format="tagged", thoughts=THINK, tokens=(*THINK, "<tool_call>", "</tool_call>"))
CASES = {
    "qwen": (TAGS, "", "|<think>|\nHm, <b>.\n|</think>|\n\nIt is\n late. ", [("reasoning", "Hm, <b>."), ("text", "It is\n late. ")]),
    "look-alikes are text": (TAGS, "", "A <think> tag </think> <tool_call>", [("text", "A <think> tag </think> <tool_call>")]),
    "nothing thought": (TAGS, "", "|<think>|\n\n|</think>|\n\nYes", [("text", "Yes")]),
    "opened by the template": (TAGS, "assistant\n|<think>|\n", "Hm.\n|</think>|\n\nYes", [("reasoning", "Hm."), ("text", "Yes")]),
    "closed by the template": (TAGS, "assistant\n|<think>|\n\n|</think>|\n\n", "Yes", [("text", "Yes")]),
    "spelled out": (dict(thoughts=THINK), "", "<think>a <thin</think>b <think>", [("reasoning", "a <thin"), ("text", "b <think>")]),
    "never ended": (TAGS, "", "|<think>|Hm\n\nhm ", [("reasoning", "Hm\n\nhm")]),
    "brackets": (dict(thoughts=("[THINK]", "[/THINK]"), tokens=("[THINK]", "[/THINK]")), "", "|[THINK]|a|[/THINK]|b", [("reasoning", "a"), ("text", "b")]),
    "then a call": (TAGS, "", 'x|<think>|a|</think>|Let me.|<tool_call>|\n{"name": "weather", "arguments": {"city": "Rome"}}\n|</tool_call>|',
                    [("text", "x"), ("reasoning", "a"), ("text", "\n\nLet me."), ROME]),
    "harmony": (HARMONY, "¦<|start|>¦assistant", "¦<|channel|>¦analysis¦<|message|>¦Hm, <|end|>.¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦final¦<|message|>¦Yes.",
                [("reasoning", "Hm, <|end|>."), ("text", "Yes.")]),
    "harmony's preamble and call": (
        HARMONY, "¦<|start|>¦assistant", "¦<|channel|>¦analysis¦<|message|>¦Hm.¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦commentary¦<|message|>¦Let me."
        '¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦commentary to=functions.weather ¦<|constrain|>¦json¦<|message|>¦{"city": "Rome"}¦<|call|>¦',
        [("reasoning", "Hm."), ("text", "Let me."), ROME]),
    "a call in the role part, on the analysis channel": (
        HARMONY, "¦<|start|>¦assistant", ' to=functions.weather¦<|channel|>¦analysis code¦<|message|>¦{"city": "Rome"}', [ROME]),
    "a call of no function": (HARMONY, "¦<|start|>¦assistant", "¦<|channel|>¦commentary to=python¦<|message|>¦1 + 1", [("reasoning", "1 + 1")]),
    "harmony goes on from the middle of its answer": (
        HARMONY, "¦<|start|>¦assistant¦<|channel|>¦final¦<|message|>¦It is ", "late.", [("text", "late.")]),
    "two thoughts": (HARMONY, "¦<|start|>¦assistant", "¦<|channel|>¦analysis¦<|message|>¦A¦<|end|>¦¦<|start|>¦assistant¦<|channel|>¦analysis¦<|message|>¦B",
                     [("reasoning", "A\n\nB")]),
    "no harmony at all": (HARMONY, "¦<|start|>¦assistant", "Yes, it is.", [("text", "Yes, it is.")]),
}


@pytest.mark.parametrize("own_text", [False, True], ids=["special tokens", "tokens with text"])
@pytest.mark.parametrize("case", CASES)
def test_reasoning_content_and_calls_are_told_apart_by_tokens_also_by_a_worker_that_takes_over(case, own_text):
    about, prompt, text, parts = CASES[case]
    vocabulary = Vocabulary(**about, text_of_its_own=own_text and "harmony" not in about.values())
    told = told_by(vocabulary, text, prompt)
    assert joined(told) == parts
    assert (told[-1][1] > 0) == ("reasoning" in dict(parts) or case == "nothing thought")
    for cut in range(len(vocabulary.tokens(text))):
        assert told_by(vocabulary, text, prompt, cut) == told[cut:]


def test_reasoning_tokens_are_those_between_the_markers_and_these():
    told = told_by(Vocabulary(**TAGS), "|<think>|four|</think>|content")
    assert told[-1][1] == 6


def test_stop_strings_are_looked_for_in_content_alone():
    vocabulary = Vocabulary(**TAGS)
    told = told_by(vocabulary, '|<think>|END|</think>|a|<tool_call>|{"name": "time", "arguments": {"x": "END"}}|</tool_call>|b END c', stop=("END",))
    assert joined(told) == [("reasoning", "END"), ("text", "a"), ("call", ("time", '{"x": "END"}')), ("text", "b ")]
    assert len(told) == len(vocabulary.tokens('|<think>|END|</think>|a|<tool_call>|{"name": "time", "arguments": {"x": "END"}}|</tool_call>|b END'))


def test_a_raw_completion_is_all_text():
    vocabulary = Vocabulary(**TAGS, text_of_its_own=True)
    work = assignment("a", (256,), SamplingParams(), 99)
    answer = Answer(work, vocabulary)
    for number, token in enumerate(vocabulary.tokens("|<think>|a|</think>|b")):
        answer.push(token, number, 50)
    assert answer.take() == [("", "<think>a</think>b", ())] and answer.reasoning_tokens == 0


@pytest.fixture
def thinking():
    return FakePool([Piece("", (1,), "", reasoning="Hm, "), Piece("", (2,), "", reasoning="well."), Piece("", (3,), "Hello")])


async def post(url, path, body):
    async with aiohttp.ClientSession() as client, client.post(url + path, json=body) as response:
        return frames(await response.read()) if body.get("stream") or not path.startswith("/v1") else await response.json()


HI = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_a_message_has_its_reasoning_under_both_names(thinking):
    async with serving(thinking) as url:
        body = await post(url, "/v1/chat/completions", HI)
        *chunks, _ = await post(url, "/v1/chat/completions", HI | {"stream": True})
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm, well.", "Hm, well.", "Hello")
    assert "reasoning_tokens" in body["usage"]["completion_tokens_details"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[1:4] == [{"reasoning_content": "Hm, ", "reasoning": "Hm, "}, {"reasoning_content": "well.", "reasoning": "well."}, {"content": "Hello"}]


async def test_native_events_of_reasoning_have_no_token_that_old_clients_would_show(thinking):
    async with serving(thinking) as url:
        events = await post(url, "/chat/completions", HI)
    assert events[:3] == [{"reasoning": "Hm, ", "gpu": 0}, {"reasoning": "well.", "gpu": 0}, {"token": "Hello", "gpu": 0}]
    assert events[3]["usage"]["reasoning_tokens"] == 0
