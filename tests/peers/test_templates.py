"""Every chat template of llama.cpp: prompts for thirteen conversations against those of transformers' apply_chat_template.

The templates are in the source package of llama-cpp-python, which the test downloads. Each difference is a row of DIFFERENCES with its reason."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest

from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.front.api.message_readers import openai_messages
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engines import load
from peer_packages import INSTALL_S, llama_cpp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_S + 300)]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather of a \"city\"", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Its name"}, "days": {"type": "integer", "description": "How many"}}}}}
TIME = {"type": "function", "function": {"name": "time", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, TIME]


def system(text="Be brief.\n\nAlways."):
    return {"role": "system", "content": text}


def user(text="Weather?"):
    return {"role": "user", "content": text}


def said(text="Sunny.", **more):
    return {"role": "assistant", "content": text, **more}


def calling(*arguments, text="", first=1, **more):
    calls = [{"id": f"call{number:05}", "type": "function", "function": {"name": "weather" if given else "time", "arguments": given}}
             for number, given in enumerate(arguments, first)]
    return said(text, tool_calls=calls, **more)


def result(number=1, text="20 degrees"):
    return {"role": "tool", "tool_call_id": f"call{number:05}", "content": text}


ROME, BONN = {"city": "Rome"}, {"city": "Bonn", "days": 3}
ALL_TYPES = {"city": 'Zürich "日本"\n', "days": -3, "share": 0.5, "far": True, "none": None, "stops": [{"at": "Ulm"}, []], "first": {"at": {"x": 1}}}
CONVERSATIONS = {  # the messages, and the tools of the request
    "a question": ([user()], []),
    "white space and markup": ([user("  x\n\n<b>{{ y }}</b> \"日本\" \\n \n")], []),
    "instructions": ([system(), user()], []),
    "turns": ([system(), user(), said(), user("And in Rome?"), said("Rain. "), user("Thanks")], []),
    "reasoning": ([user(), said(reasoning_content="Hm, let me think."), user("And in Rome?")], []),
    "functions": ([system(), user()], TOOLS),
    "a call and its result": ([user(), calling(ROME), result()], TOOLS),
    "arguments of all types": ([user(), calling(ALL_TYPES), result(text='{"t": 20, "sky": ["a", null]}')], TOOLS),
    "reasoning before a call": ([user(), calling(ROME, reasoning_content="I need it."), result()], TOOLS),
    "text before a call": ([system(), user(), calling(ROME, text="Let me see."), result()], TOOLS),
    "two calls": ([user(), calling(ROME, BONN), result(), result(2, "15 degrees")], TOOLS),
    "one call after another": ([user(), calling(ROME), result(), calling({}, first=2), result(2, "noon"), said(), user("Thanks")], TOOLS),
    "calls without functions": ([user(), calling(ROME), result(), said(), user("Thanks")], [])}

WITH_CALLS = tuple(name for name, (messages, _) in CONVERSATIONS.items() if any(message["role"] == "tool" for message in messages))
WITH_SYSTEM = ("instructions", "turns", "functions", "text before a call")


class Difference(NamedTuple):
    """Where a prompt is not that of apply_chat_template, and why."""

    templates: Sequence[str]
    conversations: Sequence[str]
    reason: str
    refused: bool = False   # does apply_chat_template raise?


DIFFERENCES = [
    Difference(("HuggingFaceTB-SmolLM3-3B", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
                "deepseek-ai-DeepSeek-V3.1", "llama-cpp-rwkv-world", "microsoft-Phi-3.5-mini-instruct"), ("functions", *WITH_CALLS),
               "it has no place for functions: the system message describes them, and calls and results are text"),
    Difference(("google-gemma-2-2b-it",), [name for name in WITH_CALLS if name not in WITH_SYSTEM],
               "the same, in the first message, as it refuses a system message", refused=True),
    Difference(("LFM2-8B-A1B", "LFM2.5-Instruct", "ibm-granite-granite-3.3-2B-Instruct"), WITH_CALLS,
               "it shows results, and none of the calls that they answer: calls are text of their messages"),
    Difference(("Kimi-K2-Instruct", "Kimi-K2-Thinking"), WITH_CALLS,
               "it appends to a list, which jinja's sandbox refuses: calls are text of their messages", refused=True),
    Difference(("meetkai-functionary-medium-v3.2",), WITH_CALLS, "it adds arguments to a text, so they are given as text", refused=True),
    Difference(("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct"), ("two calls",),
               "it refuses messages of several calls: each gets its own, followed by its result", refused=True),
    Difference(("GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B"), ("two calls",), "it shows the first call of a message: each gets its own message"),
    Difference(("google-gemma-4-31B-it-interleaved",), WITH_CALLS, "Gemma 4 reads results behind the call, in its turn: where the template reads tool_responses"),
    Difference(("google-gemma-4-31B-it",), ("text before a call",), "it puts text behind the call and its result; the model wrote it before"),
    Difference(("moonshotai-Kimi-K2",), WITH_CALLS, "Kimi names the call in its id, such as functions.weather:0"),
    Difference(("openai-gpt-oss-120b",), (*WITH_CALLS, "instructions", "turns"),
               "as OpenAI's own renderer has it (test_harmony.py): results without quotes, text before a call as a preamble, no blank lines after instructions"),
    Difference(("upstage-Solar-Open-100B",), ("reasoning before a call",), "it reads reasoning, whatever the client called it"),
]

WITHOUT_FUNCTIONS = [name for name, (_, tools) in CONVERSATIONS.items() if not tools]
REFUSALS = [        # both refuse these
    Difference(("google-gemma-2-2b-it",), WITH_SYSTEM, "it knows no system message"),
    Difference(("fireworks-ai-llama-3-firefunction-v2",), [*CONVERSATIONS], "it reads functions from a variable that only its makers' server sets"),
    Difference(("CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
               WITHOUT_FUNCTIONS, "it is the second of its model's templates, which serves requests with functions"),
    Difference(("llama-cpp-deepseek-r1",), [name for name in CONVERSATIONS if name not in WITHOUT_FUNCTIONS], "it writes a generator as JSON")]


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = llama_cpp(tmp_path_factory.mktemp("llama.cpp"), "models/templates/") / "models/templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


@pytest.fixture(scope="module")
def text(default_model_path):
    return replace(load(default_model_path).text, system=None)


@pytest.fixture(scope="module")
def prompts(text, templates):
    """(template, conversation) -> our prompt and that of apply_chat_template; None where it is refused."""
    names = open_tokenizer(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(text.payload), bos_token=names.name_of(text.bos_token),
                                        eos_token=names.name_of(text.eos_token))
    prompts = {}
    for name, template in templates.items():
        opened = open_tokenizer(replace(text, chat_template=template))
        opened.forms = opened.filled(opened.find_forms())
        prompts |= {(name, conversation): (ours(opened, *given), theirs(tokenizer, template, *given)) for conversation, given in CONVERSATIONS.items()}
    return prompts


def ours(tokenizer, sent, tools):
    """The prompt, or None if it is refused."""
    sent = json.loads(json.dumps(sent))
    for message in sent:  # clients of the API send arguments as text
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    try:
        written = tokenizer.filled(tokenizer.rendering(openai_messages(sent, with_tools=True), tools))
    except RequestError:
        return None
    return tokenizer.finished(written).replace(tokenizer.mark, "")


def theirs(tokenizer, template, sent, tools):
    try:
        return tokenizer.apply_chat_template(sent, tools or None, chat_template=template, add_generation_prompt=True, tokenize=False)
    except Exception:  # jinja's, or Python's in the template
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_prompt_is_apply_chat_template_s(prompts, conversation):
    """Where it is not there is a reason."""
    reasons = {name: (row.reason, row.refused) for row in DIFFERENCES if conversation in row.conversations for name in row.templates}
    differing = {name: (reasons.get(name, ("no row", None))[0], expected is None)
                 for (name, shown), (prompt, expected) in prompts.items() if shown == conversation and prompt != expected}
    assert differing == reasons


def test_a_refused_conversation_has_a_reason_too(prompts):
    """The function apply_chat_template refuses it as well."""
    refused = {case for case, (prompt, expected) in prompts.items() if prompt is None}
    assert refused == {(name, conversation) for row in REFUSALS for name in row.templates for conversation in row.conversations}
    assert all(prompts[case][1] is None for case in refused)


@pytest.mark.parametrize("conversation", WITH_CALLS)
def test_every_result_is_in_the_prompt_once(prompts, conversation):
    results = [message["content"] for message in CONVERSATIONS[conversation][0] if message["role"] == "tool"]
    for (name, shown), (prompt, _) in prompts.items():
        if shown == conversation and prompt is not None and conversation != "arguments of all types":   # which families write otherwise
            assert [prompt.count(text) for text in results] == [1] * len(results), name


def test_there_are_13_conversations_and_70_templates(templates):
    """There may be more templates."""
    assert len(CONVERSATIONS) == 13 and len(templates) >= 70


FIND = {"type": "function", "function": {"name": "find", "description": "Finds functions", "parameters": {
    "type": "object", "required": ["words"], "properties": {"words": {"type": "string", "description": "Words"}}}}}
NOT_WRITTEN = {  # templates that cannot be filled in with these functions, or write none
    "CohereForAI-c4ai-command-r-plus-tool_use": "it wants members of functions that OpenAI's API does not have",
    "fireworks-ai-llama-3-firefunction-v2": "it reads functions from a variable that only its makers' server sets",
    "llama-cpp-deepseek-r1": "it writes a generator as JSON"}


def test_functions_that_are_found_later_are_written_as_in_the_head(text, templates):
    """Of every template that has a place for functions, what stands behind a search is what it writes between two others in the head."""
    seen = set()
    for name, template in templates.items():
        opened = open_tokenizer(replace(text, chat_template=template))
        if not opened.native_tools or name in NOT_WRITTEN:
            continue
        opened.forms = opened.filled(opened.find_forms())
        conversation = [Message("user", "Q"), *openai_messages([calling(ROME), result()], True)]
        found = [*conversation[:-1], replace(conversation[-1], content="Found", tools=(WEATHER,))]
        prompt = opened.finished(opened.filled(opened.rendering(found, [FIND])))
        [written] = opened.filled(opened.definitions.write([(WEATHER,)], True, opened.template_arguments))
        form = opened.definitions.form
        assert form is not None, name
        single = written.removeprefix(form.opening.strip()).removesuffix(form.closing.strip()).strip()
        head = opened.filled(opened.rendering([Message("user", "Q")], [FIND, WEATHER, FIND])).text
        assert single and single in head, (name, single)
        assert "Weather of a" in prompt and "Weather of a" not in opened.filled(opened.rendering(conversation, [FIND])).text, name
        seen.add(name)
    assert len(seen) > 50


def test_system_messages_after_the_first_are_where_they_were(text, templates):
    """Whether a template shows them or not."""
    for name, template in templates.items():
        opened = open_tokenizer(replace(text, chat_template=template))
        opened.forms = opened.filled(opened.find_forms())
        messages = [Message("user", "U1U"), Message("system", "S2S"), Message("assistant", "A3A"), Message("user", "U4U")]
        try:
            prompt = opened.filled(opened.rendering(messages, [])).text
        except RequestError:
            assert name in {each for refusal in REFUSALS for each in refusal.templates}, name
            continue
        places = [prompt.find(words) for words in ("U1U", "S2S", "A3A", "U4U")]
        assert places == sorted(places) and -1 not in places, (name, places)
