"""What clients of Anthropic's Messages send: documents and search results, an older name of the format, and
what other servers' tools did."""

import json

import pytest

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Known
from chatlm.front.api.reading import read_answer
from nightly import WHOLE
from openai_routes import call, need_exact

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = "What is the capital of Japan?"
SCHEMA = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"],
          "additionalProperties": False}
FORM = {"type": "json_schema", "schema": SCHEMA}


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


def asked(url, content, path=MESSAGES, **changes):
    drawn = {"temperature": 0, "max_tokens": 8} if path == MESSAGES else {}
    return call(url, path, {"messages": messages_of(content), **drawn, **changes})


def messages_of(content):
    return content if isinstance(content, list) and content and "role" in content[0] else [
        {"role": "user", "content": content}]


def text(words):
    return {"type": "text", "text": words}


def document(source, **more):
    return {"type": "document", "source": source, **more}


SEA = {"type": "text", "media_type": "text/plain", "data": "The sea is deep."}
PASSAGES = [        # (a block, the text that it is)
    (document(SEA), "The sea is deep."),
    (document(SEA, title="Seas", context="A book.", citations={"enabled": True}),
     "Seas\nA book.\nThe sea is deep."),
    (document({"type": "content", "content": "The sea is deep."}, title=None), "The sea is deep."),
    (document({"type": "content", "content": [text("The sea"), text("is deep.")]}, title="Seas"),
     "Seas\nThe sea\nis deep."),
    ({"type": "search_result", "source": "https://sea.example", "title": "Seas",
      "content": [text("The sea is deep.")], "citations": {"enabled": True}},
     "Seas\nhttps://sea.example\nThe sea is deep.")]


@pytest.mark.parametrize("block, words", PASSAGES)
def test_documents_and_search_results_are_texts(url, block, words):
    """They are beside others and in results of tools."""
    need_exact(url)
    tools = [{"name": "look", "input_schema": {"type": "object", "properties": {}}}]
    call_ = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]}
    for wrap, more in ((lambda each: [each, text(HI)], {}), (lambda each: [text(HI), each], {}),
                       (lambda each: [
            {"role": "user", "content": "Look."}, call_,
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [each]}]}],
            {"tools": tools})):
        bodies = ({"messages": messages_of(wrap(each)), "max_tokens": 8, "seed": 1, **more}
                  for each in (block, text(words)))
        read, plain = (read_answer(MESSAGES, body, Known(Settings(), "tagged")).request for body in bodies)
        assert read.messages == plain.messages and read == plain
        if not WHOLE and block is not PASSAGES[0][0]:       # by day a model answers one of them
            continue
        status, _, given = asked(url, wrap(block), **more)
        _, _, wanted = asked(url, wrap(text(words)), **more)
        assert status == 200 and given["content"] == wanted["content"], given
        counts = [each["usage"]["input_tokens"] + each["usage"]["cache_read_input_tokens"]
                  for each in (given, wanted)]
        assert counts[0] == counts[1]
        assert asked(url, wrap(block), COUNT, **more)[2] == asked(url, wrap(text(words)), COUNT, **more)[2]
    if WHOLE or block is PASSAGES[0][0]:
        assert asked(url, [block, text(HI)], padding="x" * 100_000)[2]["content"] == asked(url,
            [text(words), text(HI)])[2]["content"]


@pytest.mark.parametrize("block, named", [
    (document({"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}),
     "content[0].source is of type base64"),
    (document({"type": "url", "url": "https://x.example/a.pdf"}), "content[0].source is of type url"),
    (document({"type": "file", "file_id": "x"}), "of type file"),
    (document({"type": "text"}), "content[0].source.data"),
    (document({"type": "text", "data": 5}), "content[0].source.data"), (document({}), "content[0].source"),
    (document("x"), "content[0].source"), ({"type": "document"}, "content[0].source"),
    (document(SEA, title=5), "content[0].title"),
    (document(SEA, context=["x"]), "content[0].context"),
    (document({"type": "content"}), "content[0].source.content"),
    (document({"type": "content", "content": [5]}), "content[0].source.content[0]"),
    (document({"type": "content", "content": [document(SEA)]}), "content[0].source.content[0]"),
    (document({"type": "content", "content": [text(5)]}), "content[0].source.content[0].text"),
    (document({"type": "content",
               "content": [
                   {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}]}),
                   "cannot see images"),
    ({"type": "search_result"}, "content[0].content"),
    ({"type": "search_result", "content": [{"type": "image"}]}, "content[0].content[0]"),
    ({"type": "search_result", "title": {}, "content": []}, "content[0].title")])
def test_what_is_no_text_is_refused_by_its_place(url, block, named):
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [block]}
    for content, place in ((block, named), (result, named.replace("content[0]", "content[0].content[0]", 1))):
        for padding in ("", "x" * 100_000):
            status, _, body = asked(url, [content], padding=padding)
            assert (status == 400
                    and (place in body["error"]["message"]
                         or "cannot call functions" in body["error"]["message"])), body


def test_a_picture_in_a_document_is_seen():
    picture = {"type": "image", "picture": [8, 8, "0" * 32]}
    body = {"max_tokens": 5,
            "messages": [
                {"role": "user",
                 "content": [document({"type": "content", "content": [picture, text("x")]}, title="T")]}]}
    [message] = read_answer(MESSAGES, body, Known(Settings(), None)).request.messages
    assert ([(each.width, each.height) for each in message.pictures] == [(8, 8)]
            and message.parts == ("T", 0, "x"))


def test_output_format_is_the_format(url):
    """One that differs from the other is refused."""
    need_exact(url)
    wanted = asked(url, "Is Tokyo big?", output_config={"format": FORM})[2]["content"]
    assert set(json.loads(wanted[0]["text"])) == {"big"}
    for more in ({}, {"output_config": {"effort": "low"}}, {"output_config": {"format": FORM}},
                 {"output_config": {"format": None}}):
        status, headers, body = asked(url, "Is Tokyo big?", output_format=FORM, **more)
        assert (status == 200 and body["content"] == wanted
                and "output_format" not in headers.get("X-Ignored-Fields", ""))
    for form, more, named in (
        (FORM, {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         "differ"),
                              ({"type": "xml"}, {}, "output_format"), ("x", {}, "output_format"),
                              ({"type": "json_schema"}, {}, "output_format"),
                              ({"type": "json_schema", "schema": {"type": "nope"}}, {}, "output_format")):
        status, _, body = asked(url, "Is Tokyo big?", output_format=form, **more)
        assert status == 400 and named in body["error"]["message"], body


def test_blocks_of_other_servers_tools_are_skipped(url):
    """They are named."""
    need_exact(url)
    used = [{"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1",
             "content": [{"type": "web_search_result", "url": "x", "title": "y"}]}]
    history = lambda blocks: [{"role": "user", "content": HI},
                              {"role": "assistant", "content": [*blocks, text("Tokyo.")]},
                              {"role": "user", "content": "Sure?"}]  # noqa: E731
    _, headers, wanted = asked(url, history([]))
    assert "X-Ignored-Tools" not in headers
    status, headers, body = asked(url, history(used),
                                  tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert status == 200 and body["content"] == wanted["content"]
    assert headers["X-Ignored-Tools"] == "web_search_20250305, server_tool_use, web_search_tool_result"
    assert asked(url, history(used), COUNT)[2] == asked(url, history([]), COUNT)[2]
    status, _, body = asked(url, history([{"type": "server_tool"}]))
    assert status == 400 and "server_tool" in body["error"]["message"]
