"""What clients of Responses send and read beyond a question: log-probabilities, calls of other servers'
tools, and nothing at all."""

import json

import pytest

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import Delta, TokenLogprob
from answers import said, thought
from fake_pool import FakePool, serving
from openai_routes import ask, call, need_exact
from real_server import post

RESPONSES, CONVERSATIONS = "/v1/responses", "/v1/conversations"
HI, LOGPROBS = "What is the capital of Japan?", "message.output_text.logprobs"


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


NO_SPECIALS = {str(token): -100 for token in range(275, 284)}       # of the tiny model: they are no text


@pytest.fixture(scope="module")
def tiny(tiny_url):
    return tiny_url


def asked(url, **changes):
    status, headers, body = call(url, RESPONSES,
                                 {"input": HI, "temperature": 0, "max_output_tokens": 20} | changes)
    return status, headers, body


def streamed(url, **changes):
    with post(url + RESPONSES,
              {"input": HI, "temperature": 0, "max_output_tokens": 20, "stream": True} | changes) as response:
        return [json.loads(line[6:]) for line in response if line.startswith(b"data: ")]


def plain(entries):
    """Without what may differ from answer to answer: whether a token was drafted."""
    return [{name: value for name, value in entry.items() if name != "drafted"} for entry in entries]


def of_text(response):
    return plain(response["output"][-1]["content"][0]["logprobs"])


# log-probabilities


def test_responses_have_the_logprobs_of_chats(url):
    """Whole answers and every event have them."""
    need_exact(url)
    wanted = ask(url, messages=[{"role": "user", "content": HI}], max_tokens=20, logprobs=True,
                 top_logprobs=2)["choices"][0]
    status, headers, whole = asked(url, include=[LOGPROBS], top_logprobs=2)
    assert status == 200 and "X-Ignored-Fields" not in headers and whole["top_logprobs"] == 2
    assert (whole["output"][0]["content"][0]["text"] == wanted["message"]["content"]
            and of_text(whole) == plain(wanted["logprobs"]["content"]))
    events = streamed(url, include=[LOGPROBS], top_logprobs=2)
    by_type = {event["type"]: event for event in events}
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert plain([entry for event in deltas for entry in event["logprobs"]]) == of_text(whole)
    assert all("".join(entry["token"] for entry in event["logprobs"]) == event["delta"] for event in deltas)
    assert plain(by_type["response.output_text.done"]["logprobs"]) == of_text(whole)
    assert plain(by_type["response.content_part.done"]["part"]["logprobs"]) == plain(
        by_type["response.output_item.done"]["item"]["content"][0]["logprobs"])
    assert of_text(by_type["response.completed"]["response"]) == of_text(whole)
    assert by_type["response.content_part.added"]["part"]["logprobs"] == []


@pytest.mark.parametrize("more", [{}, {"stop": ["e", "日"]}])
def test_every_token_of_odd_text_has_its_logprobs(tiny, more):
    """As in Chat Completions, but for those of a character that the answer did not finish: they are no text.
    Drafts, stop strings and characters of several tokens change nothing. The tokens of a tiny model are
    bytes."""
    url = tiny
    need_exact(url)
    for seed in range(4):
        question, drawn = "Write emojis and Chinese: 日本 😀", {
            "temperature": 2, "seed": seed, "logit_bias": NO_SPECIALS, **more}
        chat = ask(url, messages=[{"role": "user", "content": question}], max_tokens=40, logprobs=True,
                   **drawn)["choices"][0]
        wanted = [entry["id"] for entry in chat["logprobs"]["content"]]
        body = asked(url, input=question, max_output_tokens=40, include=[LOGPROBS], **drawn)[2]
        found = [entry["id"] for entry in of_text(body)]
        assert body["output"][0]["content"][0]["text"] == chat["message"]["content"]
        assert found == wanted[:len(found)] and len(wanted) - len(found) < 4, (found, wanted)
        events = streamed(url, input=question, max_output_tokens=40, include=[LOGPROBS], **drawn)
        assert [entry["id"] for event in events if event["type"] == "response.output_text.delta"
                for entry in event["logprobs"]] == found


def test_without_include_there_are_no_logprobs(url):
    for more, ignored in (({}, None), ({"include": []}, None), ({"top_logprobs": 2}, "top_logprobs"),
                          ({"include": ["reasoning.encrypted_content"]},
                           "include.reasoning.encrypted_content")):
        status, headers, body = asked(url, **more)
        assert (status == 200 and of_text(body) == [] and headers.get("X-Ignored-Fields") == ignored
                and body["top_logprobs"] == 0)
    assert all(event.get("logprobs", []) == [] for event in streamed(url))


def test_large_bodies_and_formats_have_logprobs(url):
    """A kept response has none."""
    for more in ({"padding": "x" * 100_000}, {"text": {"format": {"type": "json_object"}}}):
        _, _, body = asked(url, include=[LOGPROBS], **more)
        assert "".join(entry["token"] for entry in of_text(body)) == body["output"][-1]["content"][0]["text"]
    kept = call(url, f"{RESPONSES}/{body['id']}")[2]
    assert (of_text(kept) == []
            and kept["output"][0]["content"][0]["text"] == body["output"][0]["content"][0]["text"])


@pytest.mark.parametrize("more",
                         [{"include": LOGPROBS}, {"include": [5]},
                          {"include": [LOGPROBS], "top_logprobs": 21}, {"include": {}}])
def test_wrong_logprobs_fields_are_refused_by_name(url, more):
    """They are no list or out of range."""
    status, _, body = asked(url, **more)
    assert status == 400 and list(more)[-1] in body["error"]["message"]


def score(token, count=1):
    return TokenLogprob(token, -0.5, ((token, -0.5),) * count)


async def responses(client, pieces, **body):
    async with serving(FakePool(pieces)) as url:
        async with client.post(url + RESPONSES,
                               json={"input": "Hi", "include": [LOGPROBS],
                                     "top_logprobs": 20} | body) as response:
            text = await response.text()
            assert response.status == 200, text
            return [json.loads(line[6:]) for line in text.split("\n")
                    if line.startswith("data: ")] if body.get("stream") else json.loads(text)


async def test_a_text_has_only_its_own_tokens_logprobs(client):
    """In a step with a draft there may be tokens of reasoning, of a mark, of the text and of a call. Every
    byte is a token here, 256 is special."""
    scores = lambda text: tuple(score(byte) for byte in text)       # noqa: E731
    pieces = [said(thought("Hm"), logprobs=scores(b"Hm")),
              said(thought("m"), "So", logprobs=(*scores(b"m"), score(256), *scores(b"\n\nSo"))),
              said(logprobs=scores("日".encode()[:2])), said(" 日"[1:], logprobs=scores("日".encode()[2:])),
              said("!", Delta("call", "{}", "add"), logprobs=(*scores(b"!"), *scores(b'add{"a"')))]
    whole = await responses(client, pieces)
    [text] = [item for item in whole["output"] if item["type"] == "message"]
    assert text["content"][0]["text"] == "So日!"
    assert bytes(byte for entry in text["content"][0]["logprobs"]
                 for byte in entry["bytes"]).decode() == "So日!"
    events = await responses(client, pieces, stream=True)
    assert [[entry["id"] for entry in event["logprobs"]] for event in events
            if event["type"] == "response.output_text.delta"] == [
        [*b"So"], [*"日".encode()], [*b"!"]]


async def test_a_spelled_logprobs_place_is_not_filled(client):
    """A text spells it."""
    for spelled in ('"logprobs": ["x"]', '", "logprobs": ["', as_json({"logprobs": ["0" * 24]})):
        pieces = [said(spelled, logprobs=(score(ord('"')),))]
        for stream in (False, True):
            found = await responses(client, pieces, stream=stream)
            whole = found[-1]["response"] if stream else found
            assert whole["output"][0]["content"][0]["text"] == spelled and len(of_text(whole)) == 1


async def test_a_stream_s_last_events_repeat_little(client):
    """All is in the deltas. A whole answer has all too, which counts for what its client may hold."""
    pieces = [said("a", logprobs=(score(97, 20),)) for _ in range(LIMITS.repeated_bytes // 1000)]
    events = await responses(client, pieces, stream=True)
    assert sum(len(event["logprobs"]) for event in events
               if event["type"] == "response.output_text.delta") == len(pieces)
    assert (of_text(events[-1]["response"]) == []
            and max(len(json.dumps(event)) for event in events) < 2 * LIMITS.repeated_bytes)
    assert len(of_text(await responses(client, pieces))) == len(pieces)


# what other servers' tools did


SEARCH = {"type": "web_search_call", "id": "ws_1", "status": "completed",
          "action": {"type": "search", "query": "x"}}
PATCH = {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin"}
PATCHED = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
QUESTION = {"role": "user", "content": HI}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}


def test_other_tools_calls_are_skipped_and_named(url):
    """They are in the history."""
    need_exact(url)
    _, headers, without = asked(url, input=[QUESTION, SAID, QUESTION])
    assert "X-Ignored-Tools" not in headers
    for padding in ("", "x" * 100_000):
        status, headers, body = asked(url, input=[QUESTION, SEARCH, SAID, PATCH, PATCHED, SEARCH, QUESTION],
                                      padding=padding, tools=[{"type": "mcp"}])
        ignored = "mcp, web_search_call, custom_tool_call, custom_tool_call_output"
        assert status == 200 and headers["X-Ignored-Tools"] == ignored
        assert (body["output"][0]["content"] == without["output"][0]["content"]
                and body["usage"]["input_tokens"] == without["usage"]["input_tokens"])
    items = call(url, f"{RESPONSES}/{body['id']}/input_items")[2]["data"]
    assert [item["type"] for item in items] == ["message"] * 3        # what was understood is kept
    status, _, later = asked(url, input="And of France?", previous_response_id=body["id"])
    assert status == 200, later


def test_a_conversation_refuses_other_tools_items(url):
    """It says so."""
    status, headers, conversation = call(url, CONVERSATIONS, {"items": [QUESTION, SEARCH, SAID]})
    assert status == 200 and headers["X-Ignored-Tools"] == "web_search_call"
    status, headers, added = call(url, f"{CONVERSATIONS}/{conversation['id']}/items", {"items": [PATCH]})
    assert (status, added["data"]) == (200, []) and headers["X-Ignored-Tools"] == "custom_tool_call"
    assert len(call(url, f"{CONVERSATIONS}/{conversation['id']}/items")[2]["data"]) == 2


@pytest.mark.parametrize("item, named", [
    ({"type": "web_search"}, "web_search"), ({"type": "funtion_call"}, "funtion_call"),
    ({"type": "compaction"}, "compaction"), ({"type": ["x"]}, "input[1]"),
    ({"type": "item_reference", "id": "x"}, "item_reference"), ({"type": {}}, "input[1]"),
    ({"type": 5}, "input[1]")])
def test_an_unknown_tool_s_call_is_refused_by_place(url, item, named):
    """What is no call of a known tool is still refused."""
    status, _, body = asked(url, input=[SEARCH, item])
    assert status == 400 and named in body["error"]["message"] and "input[1]" in body["error"]["message"]


# nothing


@pytest.mark.parametrize("body",
                         [{}, {"input": None}, {"instructions": "Be brief."}, {"previous_response_id": None},
                          {"conversation": ""}, {"prompt": None}])
def test_a_request_for_nothing_is_openai_s_400(url, body):
    for stream in (False, True):
        for padding in ("", "x" * 100_000):
            status, _, answer = call(url, RESPONSES, body | {"stream": stream, "padding": padding})
            error = answer["error"]
            assert (status, error["type"], error["code"], error["param"]) == (400, "invalid_request_error",
                "missing_required_parameter", "input")
            assert all(name in error["message"] for name in (
                "input", "prompt", "previous_response_id", "conversation", "must be provided"))


def test_what_continues_something_needs_no_input(url):
    _, _, first = asked(url)
    status, _, body = call(url, RESPONSES, {"previous_response_id": first["id"], "max_output_tokens": 3})
    assert status == 200, body
    conversation = call(url, CONVERSATIONS, {"items": [QUESTION]})[2]["id"]
    assert call(url, RESPONSES, {"conversation": conversation, "max_output_tokens": 3})[0] == 200
