"""What Ollama's clients send and read beyond a question and its answer: log-probabilities, and conversations
that do not fit."""

import json
import urllib.error

import pytest

from answers import said, thought
from chatlm.common.messages.requests import Delta, TokenLogprob
from fake_pool import FakePool, serving
from openai_routes import ask as openai_answer, call, need_exact
from real_server import post

CHAT, GENERATE = "/api/chat", "/api/generate"
HI = "What is the capital of Japan?"
BODIES = {CHAT: {"messages": [{"role": "user", "content": HI}]}, GENERATE: {"prompt": HI}}
both = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def url(short_url):
    return short_url


def lines(url, path, **changes):
    """The objects of an answer, one if it is whole."""
    options = {"temperature": 0, "num_predict": 20} | changes.pop("options", {})
    with post(url + path, BODIES[path] | {"options": options} | changes) as response:
        return [json.loads(line) for line in response]


def text_of(answer):
    return "".join(line["message"]["content"] if "message" in line else line["response"] for line in answer)


def scored(answer):
    """The entries of all lines, without whether their tokens were drafted, which may differ from answer to
    answer."""
    return [{name: value for name, value in entry.items() if name != "drafted"} for line in answer
            for entry in line.get("logprobs", ())]


@both
def test_ollama_logprobs_are_those_of_openai(url, path):
    """They are in lines and whole those of Chat Completions."""
    need_exact(url)
    wanted = openai_answer(url, messages=BODIES[CHAT]["messages"], max_tokens=20, logprobs=True,
                           top_logprobs=2)["choices"][0]
    plain, streamed, [whole] = (lines(url, path, **more)
                                for more in ({}, {"logprobs": True, "top_logprobs": 2},
                                                                       {"logprobs": True, "top_logprobs": 2,
                                                                        "stream": False}))
    assert (text_of(plain) == text_of(streamed) == text_of([whole]) == wanted["message"]["content"]
            and not scored(plain))
    assert scored(streamed) == scored([whole]) and sum("logprobs" in line for line in streamed) > 1
    numbers = [[entry["token"], entry["logprob"], entry["bytes"],
                [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]]
               for entry in wanted["logprobs"]["content"]]
    assert [[entry["token"], entry["logprob"], entry["bytes"],
             [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]]
            for entry in whole["logprobs"]] == numbers
    assert b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]).decode() == text_of([whole])


@both
def test_without_top_logprobs_there_is_no_list(url, path):
    """No list of other tokens is there."""
    for more in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0, "stream": False}):
        found = scored(lines(url, path, **more))
        assert (found
                and all({"token", "logprob",
                         "bytes"} <= entry.keys() and "top_logprobs" not in entry for entry in found))
    assert not scored(lines(url, path, logprobs=False, top_logprobs=3))


def test_a_text_to_continue_has_logprobs_and_a_format(url):
    for more in ({"raw": True, "prompt": "The capital of Japan is"},
                 {"format": "json", "options": {"num_predict": 40}}):
        [whole] = lines(url, GENERATE, logprobs=True, top_logprobs=1, stream=False, **more)
        assert (b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]).decode() == text_of([whole])
                and whole["response"])
        assert scored(lines(url, GENERATE, logprobs=True, top_logprobs=1, **more)) == scored([whole])


@both
def test_logprobs_of_a_stop_string_are_left_out(url, path):
    streamed, [whole] = (lines(url, path, logprobs=True, stream=stream, options={"stop": [" Japan is"]})
                         for stream in (True, False))
    assert text_of(streamed) == text_of([whole]) == "The capital of"
    assert ("".join(entry["token"] for entry in whole["logprobs"]) == "The capital of"
            and scored(streamed) == scored([whole]))


@both
@pytest.mark.parametrize("more",
                         [{"logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": -1},
                          {"logprobs": True, "top_logprobs": "2"}])
def test_wrong_counts_of_logprobs_are_refused(url, path, more):
    """The error names them."""
    status, _, body = call(url, path, BODIES[path] | more)
    assert status == 400 and list(more)[-1] in body["error"]


def score(token):
    return TokenLogprob(token, -0.5, ((token, -0.5),))


async def test_no_token_loses_its_logprobs(client):
    """Each token's is in one line, whatever the step brought besides it."""
    pieces = [said(thought("Hm"), logprobs=(score(1),)), said(logprobs=(score(2),)),
              said(thought("m"), "So", logprobs=(score(3), score(4))),
              said(Delta("call", "", "add"), logprobs=(score(5),)),
              said(Delta("call", "{}"), logprobs=(score(6),)), said("!", logprobs=(score(7),)),
              said(logprobs=(score(8),))]
    for reason, stop_reason, last in (("stop", "eos", [8]), ("stop", "END", [])):
        async with serving(FakePool(pieces, reason=reason, stop_reason=stop_reason)) as url:
            for stream in (True, False):
                body = BODIES[CHAT] | {"logprobs": True, "stream": stream, "options": {"stop": "END"}}
                async with client.post(url + CHAT, json=body) as response:
                    found = [json.loads(line) for line in (await response.text()).splitlines()]
                assert [entry["id"] for entry in scored(found)] == [1, 2, 3, 4, 5, 6, 7, *last]
                assert (len(found) == 1) != stream


LONG = [{"role": "user", "content": f"{number}. " + "sea " * 120} for number in range(6)]
SYSTEM = {"role": "system", "content": "Answer with the word Tokyo."}
LAST = {"role": "user", "content": HI}


def turns(count, extra=()):
    return [SYSTEM,
            *(message for each in LONG[:count]
              for message in (each, {"role": "assistant", "content": "Well."})), *extra, LAST]


@pytest.mark.parametrize("more", [{}, {"truncate": True}, {"truncate": None}])
def test_a_too_long_conversation_loses_oldest_turns(url, more):
    need_exact(url)
    [short] = lines(url, CHAT, messages=turns(0), stream=False)
    for stream in (False, True):
        *_, end = lines(url, CHAT, messages=turns(6), stream=stream, **more)
        assert end["done"] and end["prompt_eval_count"] <= 512 - 20 and end["dropped_messages"] >= 6
    two_left = lines(url, CHAT, messages=turns(6), stream=False)[0]
    again = lines(url, CHAT, messages=[SYSTEM, *turns(6)[1 + two_left["dropped_messages"]:]], stream=False)[0]
    assert (text_of([two_left]) == text_of([again])
            and two_left["prompt_eval_count"] == again["prompt_eval_count"])
    assert "dropped_messages" not in short and "dropped_messages" not in again


def test_large_bodies_are_cut_too(url):
    [whole] = lines(url, CHAT, messages=turns(6), stream=False, padding="x" * 100_000)
    assert whole["dropped_messages"] >= 6


def test_without_truncate_an_overflow_is_refused(url):
    """So is a last message that alone is too long."""
    for messages, more in ((turns(6), {"truncate": False}),
                           ([SYSTEM, {"role": "user", "content": "sea " * 2000}], {}),
                           ([*turns(3), {"role": "user", "content": "sea " * 2000}], {"truncate": True})):
        status, _, body = call(url, CHAT, {"messages": messages} | more)
        assert status == 400 and "tokens" in body["error"] and set(body) == {"error"}
    status, _, body = call(url, CHAT, BODIES[CHAT] | {"truncate": "oldest"})
    assert status == 400 and "truncate" in body["error"]


def test_results_of_tools_stay_with_their_calls(url):
    """What is dropped ends before a question, so no result is left without what asked for it."""
    agent = [{"role": "user", "content": "sea " * 100},
             {"role": "assistant", "content": "",
              "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
             {"role": "tool", "tool_name": "add", "content": "2"}, {"role": "assistant", "content": "2"}]
    tools = [{"type": "function",
              "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    [whole] = lines(url, CHAT, messages=[*agent, *agent, *agent, LAST], tools=tools, stream=False,
                    options={"num_predict": 4})
    assert whole["dropped_messages"] % 4 == 0 and whole["dropped_messages"]


def test_a_turn_loses_its_oldest_calls_first(url):
    """As an agent has it, which calls tools for a long time: each call goes with its result, and the last one
    stays."""
    need_exact(url)
    def steps(numbers):
        return [message for number in numbers for message in (
            {"role": "assistant", "content": "",
             "tool_calls": [{"function": {"name": "add", "arguments": {"a": number}}}]},
            {"role": "tool", "tool_name": "add", "content": f"{number}. " + "sea " * 40})]
    tools = [{"type": "function",
              "function": {"name": "add",
                           "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
    agent = {"tools": tools, "stream": False, "options": {"num_predict": 8}}
    [whole] = lines(url, CHAT, messages=[SYSTEM, *turns(1)[1:], *steps(range(12))], **agent)
    dropped = whole["dropped_messages"]
    assert dropped > 2 and dropped % 2 == 0
    left = 12 - (dropped - 2) // 2          # the first turn has two messages
    [again] = lines(url, CHAT, messages=[SYSTEM, LAST, *steps(range(12 - left, 12))], **agent)
    assert left >= 1 and "dropped_messages" not in again
    assert (whole["prompt_eval_count"], text_of([whole])) == (again["prompt_eval_count"], text_of([again]))
    with pytest.raises(urllib.error.HTTPError):
        lines(url, CHAT, messages=[SYSTEM, LAST, *steps(range(12))], truncate=False, **agent)
    [prefilled] = lines(url, CHAT,
                        messages=[SYSTEM, LAST, *steps(range(12)), {"role": "assistant", "content": "Well,"}],
                        **agent)
    assert prefilled["dropped_messages"] and prefilled["done"]


def test_the_model_says_the_name_clients_show(url):
    _, _, shown = call(url, "/api/show", {"model": "default"})
    [model] = call(url, "/api/tags")[2]["models"]
    assert shown["model_info"]["general.basename"] + ":latest" == model["name"]
    version = call(url, "/api/version")[2]
    assert tuple(map(int, version["version"].split("."))) >= (0, 13, 4) and version["chat_server"]
