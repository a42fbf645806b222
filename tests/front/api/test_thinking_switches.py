"""Whether a model thinks, in the words of each API, and what becomes of its thoughts. The model is the
default one with a template that opens <think>."""

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.front.api.reading import read_answer
from openai_routes import call, need_exact
from real_server import events, post, server
from thinking_model import thinking_model

CHAT, NATIVE, MESSAGES = "/v1/chat/completions", "/chat/completions", "/v1/messages"
OLLAMA, RESPONSES = "/api/chat", "/v1/responses"
HI = [{"role": "user", "content": "What is the capital of Japan?"}]
DRAW = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with server(thinking_model(tmp_path_factory.mktemp("thinking")), "--reasoning-budget", "3",
                "--max-tokens", "40") as (_, url):
        yield url


def chat(url, **changes):
    status, headers, body = call(url, CHAT, {"messages": HI, **DRAW, **changes})
    assert status == 200, body
    message = body["choices"][0]["message"]
    return message.get("reasoning_content"), message["content"], headers.get("X-Ignored-Fields")


SWITCHED_OFF = [{"enable_thinking": False}, {"enable_thinking": "false"}, {"thinking": {"type": "disabled"}},
                {"thinking": False},
                {"enable_thinking": False, "thinking": {"type": "disabled"},
                 "chat_template_kwargs": {"enable_thinking": False}}]
SWITCHED_ON = [{}, {"enable_thinking": True}, {"thinking": {"type": "enabled"}},
               {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "auto"}},
               {"thinking": True}, {"enable_thinking": None, "thinking": None}]


def test_a_model_thinks_unless_switched_off(url):
    """The switch is at the top level."""
    need_exact(url)
    off, on = chat(url, chat_template_kwargs={"enable_thinking": False}), chat(url)
    assert on[0] and not off[0] and off[1]
    assert [chat(url, **more) for more in SWITCHED_OFF] == [off] * len(SWITCHED_OFF)
    assert [chat(url, **more) for more in SWITCHED_ON] == [on] * len(SWITCHED_ON)
    assert chat(url, thinking={"type": "disabled"}, padding="x" * 100_000) == (*off[:2], "padding")


def test_nanochat_and_the_tokenizer_know_switches(url):
    """Nanochat's route and the tokenizer's know the switches."""
    for more in SWITCHED_OFF:
        with post(url + NATIVE, {"messages": HI, **DRAW, **more}) as response:
            assert not any("reasoning" in event for event in events(response))
        for path, member in (("/apply-template", "prompt"), ("/tokenize", "tokens")):
            wanted = call(url, path,
                          {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}})[2][member]
            assert call(url, path, {"messages": HI, **more})[2][member] == wanted
            assert call(url, path, {"messages": HI})[2][member] != wanted


def test_a_budget_beside_the_switch_is_the_budget(url):
    for more, most in (({"thinking": {"type": "enabled", "budget_tokens": 3}}, 3),
                       ({"thinking_budget": 3, "thinking": {"type": "enabled", "budget_tokens": 3}}, 3)):
        _, _, body = call(url, CHAT, {"messages": HI, **DRAW, **more})
        assert (body["choices"][0]["message"]["reasoning_content"]
                and body["usage"]["completion_tokens_details"]["reasoning_tokens"] <= most + 6)
    status, _, body = call(url, CHAT,
                           {"messages": HI, "thinking_budget": 4,
                            "thinking": {"type": "enabled", "budget_tokens": 3}})
    assert status == 400 and "one budget" in body["error"]["message"]


@pytest.mark.parametrize("more, param", [
    ({"enable_thinking": 5}, "enable_thinking"), ({"thinking": "disabled"}, "thinking"),
    ({"thinking": {"type": "off"}}, "thinking"), ({"thinking": {}}, "thinking"),
    ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "thinking"),
    ({"enable_thinking": False, "thinking": True}, "thinking"),
    ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
     "chat_template_kwargs.enable_thinking"),
    ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}},
     "chat_template_kwargs.thinking")])
def test_a_contradictory_switch_is_refused(url, more, param):
    """The error names it; it names what is no switch too."""
    for path in (CHAT, "/apply-template"):
        status, _, body = call(url, path, {"messages": HI, **more})
        assert (status, body["error"]["param"]) == (400, param), body


TEMPLATES = {"told": "{% if enable_thinking %}<think>{% endif %}</think>", "untold": "<think></think>",
             "thoughtless": "{{ messages }}"}
OFF = [(CHAT, {"enable_thinking": False}), (CHAT, {"thinking": {"type": "disabled"}}),
       (NATIVE, {"thinking": {"type": "disabled"}}),
       (MESSAGES, {"thinking": {"type": "disabled"}}), (OLLAMA, {"think": False}),
       ("/api/generate", {"think": False}),
       (RESPONSES, {"reasoning": {"effort": "none"}}), (CHAT, {"reasoning_effort": "none"})]


@pytest.mark.parametrize("path, more", OFF)
def test_an_untold_template_ends_thinking_at_once(path, more):
    """It cannot be told, so thinking ends as it begins."""
    body = {"input": "Hi"} if path == RESPONSES else {"prompt": "Hi"} if path == "/api/generate" else {
        "messages": HI}
    budgets = {name: read_answer(path, body | more,
                                 Known(Settings(), None, template=template)).request.params.thinking_budget
               for name, template in TEMPLATES.items()}
    assert budgets == {"told": None, "untold": 0, "thoughtless": None}
    untold = read_answer(path, body, Known(Settings(), None, template=TEMPLATES["untold"]))
    assert untold.request.params.thinking_budget is None
    if path == CHAT and "reasoning_effort" not in more:
        parsed = read_answer(path, body | more | {"thinking_budget": 5},
                             Known(Settings(), None, template=TEMPLATES["untold"]))
        assert parsed.request.params.thinking_budget == 5       # who says how much, says that it thinks


# Messages


def message(url, **changes):
    status, _, body = call(url, MESSAGES, {"messages": HI, **DRAW, **changes})
    assert status == 200, body
    return [(block["type"], block.get("text", block.get("thinking"))) for block in body["content"]], body


def streamed(url, **changes):
    with post(url + MESSAGES, {"messages": HI, **DRAW, **changes, "stream": True}) as response:
        return events(response)


def test_without_thinking_the_first_block_is_text(url):
    """The request has none."""
    need_exact(url)
    thoughts, text, _ = chat(url)
    assert thoughts and text
    for more in ({}, {"thinking": None}, {"output_config": {"effort": "high"}}):
        blocks, body = message(url, **more)
        assert blocks == [("text", text)] and body["usage"]["output_tokens"] > 3
        found = streamed(url, **more)
        begun = [event for event in found if event["type"] == "content_block_start"]
        assert [(event["index"], event["content_block"]["type"]) for event in begun] == [(0, "text")]
        assert "".join(event["delta"]["text"] for event in found
                       if event["type"] == "content_block_delta") == text
    for kind in ("enabled", "adaptive"):
        assert message(url, thinking={"type": kind})[0] == [("thinking", thoughts), ("text", text)]
        begun = [event for event in streamed(url, thinking={"type": kind})
                 if event["type"] == "content_block_start"]
        assert [event["content_block"]["type"] for event in begun] == ["thinking", "text"]
    assert message(url, thinking={"type": "disabled"})[0] == [("text", chat(url, enable_thinking=False)[1])]


def test_tokens_count_as_the_prompt_has_them(url):
    """It may think or not."""
    counts = []
    for more in ({}, {"thinking": {"type": "disabled"}},
                 {"thinking": {"type": "enabled", "budget_tokens": 4}}):
        _, body = message(url, **more)
        status, headers, counted = call(url, MESSAGES + "/count_tokens", {"messages": HI, **more})
        assert status == 200 and "X-Ignored-Fields" not in headers
        usage = body["usage"]
        assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
        counts.append(counted["input_tokens"])
    assert counts[0] == counts[2] != counts[1]


def test_an_answer_cut_in_thinking_has_no_text(url):
    """Its text is empty."""
    blocks, body = message(url, max_tokens=2)
    assert (blocks == [("text", "")] and body["stop_reason"] == "max_tokens"
            and body["usage"]["output_tokens"] == 2)
    assert [event["content_block"]["type"] for event in streamed(url, max_tokens=2)
            if event["type"] == "content_block_start"] == ["text"]


def test_other_apis_send_thoughts_beside_the_text(url):
    need_exact(url)
    thoughts, text, _ = chat(url)
    assert thoughts and text
    _, _, body = call(url, RESPONSES, {"input": HI[0]["content"], "temperature": 0, "max_output_tokens": 40})
    assert [(item["type"], item["content"][0]["text"])
            for item in body["output"]] == [("reasoning", thoughts), ("message", text)]
    _, _, body = call(url, OLLAMA,
                      {"messages": HI, "stream": False, "options": {"temperature": 0, "num_predict": 40}})
    assert (body["message"]["thinking"], body["message"]["content"]) == (thoughts, text)


def test_a_switch_in_a_budget_s_place_is_refused():
    with pytest.raises(RequestError, match="thinking.budget_tokens"):
        read_answer(CHAT, {"messages": HI, "thinking": {"type": "enabled", "budget_tokens": True}},
                    Known(Settings(), None))
