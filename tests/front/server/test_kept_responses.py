"""Responses that are kept, continued and deleted, and conversations: with OpenAI's client, unchanged."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress

import openai
import psutil
import pytest

from chatlm.front.api.message_readers import chat_messages
from chatlm.front.api.response_items import response_messages
from chatlm.front.api.kept_items import kept_items
from openai_routes import call
from real_server import SCRIPT, post, server


@contextmanager
def keeping(model, store, *words, keys=()):
    """A server of its own, for what restarts it or changes its database."""
    with server(
        model, f"--database={store}", *words, *(word for key in keys for word in ("--api-key", key))
    ) as (process, url):
        yield openai.OpenAI(base_url=url + "/v1", api_key=(keys or ["none"])[0], max_retries=0)


@pytest.fixture(scope="module")
def model(nanochat_fixtures):
    return nanochat_fixtures / "gen5"


@pytest.fixture
def store(keeping_server):
    return keeping_server.database


@pytest.fixture
def running(keeping_server):
    return openai.OpenAI(base_url=keeping_server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def first_key(two_keys_server):
    """The client of one of two keys."""
    return openai.OpenAI(base_url=two_keys_server.url + "/v1", api_key="first-key", max_retries=0)


def ask(client, text="Hello", **more):
    return client.responses.create(
        model="default", input=text, **{"max_output_tokens": 16, "temperature": 0} | more
    )


def test_a_response_is_kept_and_found_and_deleted(running):
    response = ask(running)
    assert (
        response.store is True
        and running.responses.retrieve(response.id).model_dump() == response.model_dump()
    )
    with pytest.raises(
        openai.BadRequestError, match="kept once it has ended"
    ):  # its client would see a stream without events
        running.responses.retrieve(response.id, stream=True)
    [item] = running.responses.input_items.list(response.id).data
    assert item.role == "user" and item.content[0].text == "Hello"
    running.responses.delete(response.id)
    for gone in (running.responses.retrieve, running.responses.delete, running.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            gone(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        ask(running, previous_response_id=response.id)


def test_a_continued_response_sees_all_before_it(running):
    """What continues a response is answered as the whole conversation is."""
    first = ask(running, "One")
    second = ask(running, "Two", previous_response_id=first.id)
    third = ask(running, [{"role": "user", "content": "Three"}], previous_response_id=second.id)
    said = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Three"},
    ]
    whole = ask(running, said, store=False)
    assert (third.output_text, third.usage.input_tokens) == (whole.output_text, whole.usage.input_tokens)
    assert third.previous_response_id == second.id and whole.previous_response_id is None
    items = running.responses.input_items.list(third.id, order="asc").data
    assert [item.content[0].text for item in items] == [each["content"] for each in said]
    assert len({item.id for item in items}) == 5
    page = running.responses.input_items.list(third.id, limit=2)
    assert [item.content[0].text for item in page] == [each["content"] for each in said[::-1]]


def test_a_response_with_store_false_is_not_kept(running, store):
    response = ask(running, "a text that nobody keeps", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        running.responses.retrieve(response.id)
    running.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "a text that nobody keeps"}], max_tokens=4
    )
    for path in store.parent.iterdir():
        assert b"a text that nobody keeps" not in path.read_bytes()


def test_a_streamed_response_is_kept_before_its_end(running):
    """It is kept before its client has the end."""
    with running.responses.stream(
        model="default", input="Hello", max_output_tokens=16, temperature=0
    ) as stream:
        for event in stream:
            if event.type in ("response.completed", "response.incomplete"):
                assert (
                    running.responses.retrieve(event.response.id).model_dump() == event.response.model_dump()
                )
    assert ask(running, "And?", previous_response_id=event.response.id).output_text


def reference(item):
    return {"type": "item_reference", "id": item.id}


def test_a_reference_is_the_kept_item_itself(running):
    """Items are then kept again, so what continues such a response needs no first one."""
    first = ask(running, "One")
    [question] = running.responses.input_items.list(first.id).data
    said = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two"},
    ]
    whole = ask(running, said, store=False)
    for items in (
        [reference(question), reference(first.output[0])],
        [{"id": question.id}, {"id": first.output[0].id}],
    ):
        for padding in "", "x" * 100_000:  # a large body is opened in a sandbox
            second = ask(running, [*items, said[2]], extra_body={"padding": padding})
            assert (second.output_text, second.usage.input_tokens) == (
                whole.output_text,
                whole.usage.input_tokens,
            )
    running.responses.delete(first.id)
    kept = running.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in kept] == [each["content"] for each in said] and kept[
        0
    ].id != question.id
    both = ask(running, [reference(kept[1]), said[2]], previous_response_id=second.id)
    assert both.usage.input_tokens > second.usage.input_tokens
    for gone in question, first.output[0]:
        with pytest.raises(openai.BadRequestError, match=gone.id):
            ask(running, [reference(gone)])


@pytest.mark.parametrize(
    "name, match",
    [
        ("msg_unknown", r'input\[1\], an item_reference: there is no item "msg_unknown"'),
        ("", 'there is no item ""'),
        ("x" * 5000, 'there is no item "xxx'),
        ("\ud800", "there is no item"),
        ("' OR 1 --", "there is no item"),
        (7, "names an item by its id"),
        (None, "names an item by its id"),
    ],
)
def test_unknown_references_are_refused_by_name(running, name, match):
    for padding in "", "x" * 100_000:
        body = {
            "input": [{"role": "user", "content": "Hello"}, {"type": "item_reference", "id": name}],
            "padding": padding,
        }
        status, _, answer = call(str(running.base_url).removesuffix("/v1/"), "/v1/responses", body)
        assert (
            status == 400
            and re.search(match, answer["error"]["message"])
            and answer["error"]["param"] == "input[1]"
        ), answer


def test_an_item_is_referred_to_once(running):
    [item] = ask(running, "One").output
    with pytest.raises(openai.BadRequestError, match=r"input\[2\] and input\[0\] refer to the same item"):
        ask(running, [reference(item), {"role": "user", "content": "x"}, reference(item)])
    many = {
        "input": [{"id": f"msg_{index}"} for index in range(4097)]
    }  # over which openai's client takes seconds
    status, _, answer = call(str(running.base_url).removesuffix("/v1/"), "/v1/responses", many)
    assert status == 400 and "4097 given, at most 4096 allowed" in answer["error"]["message"]


def begun(client):
    """A streamed response whose text has begun, and its id."""
    stream = client.responses.create(
        model="default",
        input="Hello",
        max_output_tokens=3000,
        stream=True,
        temperature=1,
        extra_body={"ignore_eos": True},
    )
    name = next(event.response.id for event in stream if event.type == "response.created")
    next(event for event in stream if event.type == "response.output_text.delta")
    return stream, name


def test_an_unkept_stream_is_not_complete(running, store):
    """A streamed response that cannot be kept does not say that it is complete."""
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        stream, _ = begun(running)
        other.execute("BEGIN IMMEDIATE")  # for longer than the store waits
        types = [event.type for event in stream]
        assert (
            types[-1] == "response.failed"
            and "response.completed" not in types
            and "response.incomplete" not in types
        )
        with pytest.raises(
            openai.InternalServerError, match="its log says why"
        ):  # before anything is computed
            ask(running)
        assert ask(running, store=False).output_text
        other.execute("ROLLBACK")
    assert ask(running).store is True


def get(url, key="none"):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def status_of(client, name, deadline_s):
    """The status of a response that is about to be kept."""
    while True:
        try:
            return client.responses.retrieve(name).status
        except openai.NotFoundError:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_a_lost_client_s_response_is_kept(running):
    """It is kept as cancelled."""
    deadline_s, status = time.monotonic() + 100, None
    while (
        status != "cancelled"
    ):  # the tiny model may have ended its answer before the server sees that the client has left
        assert status in (None, "incomplete") and time.monotonic() < deadline_s
        stream, name = begun(running)
        stream.close()
        status = status_of(running, name, deadline_s)
    assert running.responses.retrieve(name).output_text


def test_a_response_cancelled_by_id_is_kept(running):
    """It is kept as cancelled."""
    deadline_s, status = time.monotonic() + 100, None
    while status != "cancelled":  # as above, it may have ended
        assert status in (None, "incomplete") and time.monotonic() < deadline_s
        stream, name = begun(running)
        with suppress(urllib.error.HTTPError):
            post(f"{running.base_url}cancel/{name}", {})
        for _ in stream:
            pass
        status = status_of(running, name, deadline_s)


def test_a_large_conversation_goes_on_in_a_sandbox(running):
    first = ask(
        running,
        [{"role": "user", "content": "One"}, *({"role": "user", "content": "x" * 30} for _ in range(20))],
        truncation="auto",
    )
    large = [{"role": "user", "content": "y" * 100_000}]
    with pytest.raises(openai.BadRequestError, match="tokens"):
        ask(running, large, previous_response_id=first.id)
    metadata = {str(number): "m" * 500 for number in range(16)}
    found = ask(
        running,
        [{"role": "user", "content": "Two"}],
        previous_response_id=first.id,
        metadata=metadata,
        truncation="auto",
        extra_body={"ignored": "z" * 100_000},
    )
    assert (
        found.previous_response_id == first.id
        and running.responses.input_items.list(found.id, order="asc", limit=100).data[-1].content[0].text
        == "Two"
    )
    assert len(running.responses.input_items.list(found.id, limit=100).data) == 23


def spelled(name):
    """A name in JSON, with escapes that JSON allows."""
    return "".join(f"\\u{ord(each):04x}" if each in "_aeiou" else each for each in name)


@pytest.mark.parametrize("more", [{}, {"ignored": "z" * 100_000}])
def test_equal_spellings_of_a_name_are_equal(running, more):
    """In a body that is read in the front, and in one that a sandbox reads."""
    first = ask(running)
    conversation = running.conversations.create()
    body = {"model": "default", "max_output_tokens": 4, "truncation": "auto", **more}
    reference = {"type": "item_reference", "id": first.output[0].id}
    for continued, count in (
        ({"previous_response_id": first.id}, 3),
        ({"conversation": conversation.id}, 1),
        ({"conversation": {"id": conversation.id}}, None),
        ({"input": [reference, {"role": "user", "content": "Two"}]}, 2),
    ):
        text = json.dumps({"input": "Two", **body, **continued})
        for name in ("previous_response_id", "conversation", "input", "type", "id", "item_reference"):
            text = text.replace(f'"{name}"', f'"{spelled(name)}"')
        assert "\\u00" in text
        request = urllib.request.Request(
            f"{running.base_url}responses", text.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        if "conversation" in continued:
            assert answer["conversation"] == {"id": conversation.id}
        items = running.responses.input_items.list(answer["id"]).data
        assert answer["previous_response_id"] == continued.get("previous_response_id")
        assert count is None or len(items) == count, items
    assert len(running.conversations.items.list(conversation.id).data) == 4


def test_a_conversation_grows_with_its_responses(running):
    conversation = running.conversations.create(
        items=[{"type": "message", "role": "user", "content": "One"}], metadata={"topic": "x"}
    )
    assert (
        conversation.object == "conversation"
        and running.conversations.retrieve(conversation.id) == conversation
    )
    first = ask(running, "Two", conversation=conversation.id)
    assert first.conversation.id == conversation.id
    second = ask(running, "Three", conversation={"id": conversation.id})
    items = running.conversations.items.list(conversation.id, order="asc").data
    assert [item.content[0].text for item in items] == [
        "One",
        "Two",
        first.output_text,
        "Three",
        second.output_text,
    ]
    whole = ask(
        running, [{"role": item.role, "content": item.content[0].text} for item in items[:-1]], store=False
    )
    assert whole.output_text == second.output_text
    added = running.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "Four"}]
    ).data
    assert (
        running.conversations.items.retrieve(added[0].id, conversation_id=conversation.id).content[0].text
        == "Four"
    )
    running.conversations.items.delete(added[0].id, conversation_id=conversation.id)
    assert len(running.conversations.items.list(conversation.id).data) == 5
    assert running.conversations.update(conversation.id, metadata={"topic": "y"}).metadata == {"topic": "y"}
    assert running.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        running.conversations.retrieve(conversation.id)
    with pytest.raises(openai.NotFoundError, match="there is no conversation"):
        ask(running, conversation=conversation.id)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"previous_response_id": "resp_nope"}, "there is no response"),
        ({"conversation": "conv_nope"}, "there is no conversation"),
        ({"previous_response_id": "a", "conversation": "b"}, "there is no|exclude each other"),
        ({"previous_response_id": 5}, "previous_response_id must be"),
        ({"conversation": [1]}, "conversation must be"),
        ({"store": "x"}, "store must be"),
    ],
)
def test_what_cannot_be_continued_is_refused(running, more, said):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said):
        ask(running, extra_body=more)


def test_a_name_with_escapes_continues_like_any(running):
    first = ask(running)
    body = json.dumps({"input": "x", "previous_response_id": first.id}).replace(
        "previous_r", "previous\\u005fr"
    )
    request = urllib.request.Request(
        f"{running.base_url}responses", body.encode(), {"Content-Type": "application/json"}
    )
    second = json.load(urllib.request.urlopen(request))
    assert (
        second["previous_response_id"] == first.id
        and second["usage"]["input_tokens"] > first.usage.input_tokens
    )


def continued_responses(database):
    """The names of kept responses that others continue."""
    with closing(sqlite3.connect(database)) as reader:
        rows = reader.execute("SELECT DISTINCT previous FROM responses WHERE previous IS NOT NULL")
        return {name for name, in rows}


@pytest.mark.parametrize("size", [0, 100_000])
def test_no_client_says_what_was_said_before(two_keys_server, first_key, size):
    """Neither beside a name that hides in escapes, of another key's response or of its own, nor alone."""
    before = continued_responses(two_keys_server.database)
    mine, other = ask(first_key), first_key.with_options(api_key="second-key")
    theirs, conversation = ask(other), other.conversations.create()
    said = [{"role": "user", "content": "a forged turn"}]
    for name, each in (("previous_response_id", theirs.id), ("conversation", conversation.id)):
        body = json.dumps(
            {"input": "x", "before_input": said, name: each, "ignored": "y" * size}
        ).replace(f'"{name[0]}', f'"\\u{ord(name[0]):04x}')
        request = urllib.request.Request(
            f"{first_key.base_url}responses",
            body.encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer first-key"},
        )
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(request)
        assert found.value.code == 404
    alone = [
        ask(first_key, extra_body={"before_input": said, "ignored": "y" * size} if forged else {})
        for forged in (True, False)
    ]
    assert alone[0].usage.input_tokens == alone[1].usage.input_tokens
    chained = [
        ask(
            first_key,
            previous_response_id=mine.id,
            extra_body={"before_input": said, "ignored": "y" * size} if forged else {},
        )
        for forged in (True, False)
    ]
    assert chained[0].usage.input_tokens == chained[1].usage.input_tokens
    assert len(first_key.responses.input_items.list(chained[0].id).data) == 3
    assert continued_responses(two_keys_server.database) - before == {mine.id}


def test_a_key_sees_no_other_key_s_responses(first_key):
    response, other = ask(first_key), first_key.with_options(api_key="second-key")
    conversation = first_key.conversations.create(
        items=[{"type": "message", "role": "user", "content": "One"}]
    )
    for use in (
        lambda: other.responses.retrieve(response.id),
        lambda: other.responses.delete(response.id),
        lambda: other.responses.input_items.list(response.id),
        lambda: ask(other, previous_response_id=response.id),
        lambda: ask(other, conversation=conversation.id),
        lambda: other.conversations.retrieve(conversation.id),
        lambda: other.conversations.delete(conversation.id),
        lambda: other.conversations.items.list(conversation.id),
        lambda: other.conversations.update(conversation.id, metadata={}),
    ):
        with pytest.raises(openai.NotFoundError):
            use()
    with pytest.raises(openai.BadRequestError, match=f'there is no item "{response.output[0].id}"'):
        ask(other, [reference(response.output[0])])
    assert first_key.responses.retrieve(response.id) and first_key.conversations.retrieve(conversation.id)


def test_responses_outlive_the_server(model, tmp_path):
    """They are there until their days are over."""
    with keeping(model, tmp_path / "a.db") as client:
        first, conversation = (
            ask(client, "One"),
            client.conversations.create(items=[{"type": "message", "role": "user", "content": "One"}]),
        )
    with keeping(model, tmp_path / "a.db") as client:
        assert client.responses.retrieve(first.id).output_text == first.output_text
        assert ask(client, "Two", previous_response_id=first.id).output_text
    with closing(sqlite3.connect(tmp_path / "a.db")) as writer:
        assert writer.execute("SELECT DISTINCT expires - created FROM responses").fetchall() == [
            (30 * 86400,)
        ]
        writer.execute("UPDATE responses SET expires = 1")
        writer.execute("UPDATE conversations SET expires = 1")
        writer.commit()
    with keeping(model, tmp_path / "a.db") as client:
        deadline_s = time.monotonic() + 60
        while True:
            with closing(sqlite3.connect(tmp_path / "a.db")) as reader:
                if reader.execute(
                    "SELECT (SELECT count(*) FROM responses) + (SELECT count(*) FROM conversations) + (SELECT"
                    " count(*) FROM items)"
                ).fetchone() == (0,):
                    break
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        with pytest.raises(openai.NotFoundError):
            client.conversations.retrieve(conversation.id)


def test_kept_responses_survive_a_lost_wal(model, tmp_path):
    """What was kept before and after the WAL was removed survives a kill."""
    with keeping(model, tmp_path / "a.db") as client:
        before = ask(client, "One")
        (tmp_path / "a.db-wal").unlink()
        after = ask(client, "Two", previous_response_id=before.id)
    with keeping(model, tmp_path / "a.db") as client:
        assert (
            len(client.responses.input_items.list(after.id).data) == 3
            and client.responses.retrieve(before.id).output_text == before.output_text
        )


def test_without_the_flag_nothing_is_continued(tiny_url):
    """The error names the flag."""
    client = openai.OpenAI(base_url=tiny_url + "/v1", api_key="none", max_retries=0)
    response = ask(client, store=True)
    assert response.store is False
    for more in ({"previous_response_id": response.id}, {"conversation": "conv_1"}):
        with pytest.raises(openai.BadRequestError, match="without --database"):
            ask(client, **more)
    for call in (
        lambda: client.responses.retrieve(response.id),
        lambda: client.conversations.create(),
        lambda: client.conversations.retrieve("conv_1"),
    ):
        with pytest.raises(openai.NotFoundError, match="without --database"):
            call()


def test_a_long_conversation_comes_in_pages(running):
    """Items that are too much for a page come in several."""
    conversation = running.conversations.create()
    for number in range(90):
        running.conversations.items.create(
            conversation.id,
            items=[{"type": "message", "role": "user", "content": f"{number:03}" + "x" * 60_000}],
        )
    for order in ("asc", "desc"):
        page = running.conversations.items.list(conversation.id, limit=100, order=order)
        assert (
            len(page.data) < 90
            and page.has_more
            and (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
        )
        numbers = [int(item.content[0].text[:3]) for item in page]  # the client asks for the others
        assert numbers == [*range(90)][:: 1 if order == "asc" else -1]
    assert (
        running.conversations.items.retrieve(page.data[3].id, conversation_id=conversation.id) == page.data[3]
    )
    url = f"{running.base_url}conversations/{conversation.id}/items?limit=100"
    head = urllib.request.urlopen(urllib.request.Request(url, method="HEAD"))
    assert int(head.headers["Content-Length"]) > 4_000_000 and head.read() == b""
    assert running.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        running.conversations.items.list(conversation.id)


def test_of_equal_items_one_is_deleted(running):
    same = {"type": "message", "role": "user", "content": "Equal", "id": "msg_equal"}
    conversation = running.conversations.create(items=[same, same])
    running.conversations.items.create(
        conversation.id, items=[same, same | {"id": "not an id"}, same | {"id": 5}]
    )
    items = running.conversations.items.list(conversation.id, order="asc").data
    assert (
        len({item.id for item in items}) == 5
        and items[0].id == "msg_equal"
        and {item.content[0].text for item in items} == {"Equal"}
    )
    for count, item in enumerate(items, 1):
        assert (
            running.conversations.items.delete(item.id, conversation_id=conversation.id).id == conversation.id
        )
        assert [each.id for each in running.conversations.items.list(conversation.id, order="asc").data] == [
            each.id for each in items[count:]
        ]
    with pytest.raises(openai.NotFoundError, match="there is no item"):
        running.conversations.items.delete("msg_equal", conversation_id=conversation.id)


JUNK = "what nobody reads"
UNREAD = [
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "a", "junk": JUNK}],
        "junk": JUNK,
        "id": JUNK,
        "status": JUNK,
        "type": None,
    },
    {
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "output_text", "text": "b", "annotations": [JUNK], "logprobs": [JUNK]},
            {"type": "refusal", "refusal": "no", "text": JUNK},
        ],
        "phase": JUNK,
    },
    {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "c", "junk": JUNK}],
        "encrypted_content": JUNK,
    },
]


@pytest.mark.parametrize("size", [1, 8000])  # the second one is read in a sandbox
def test_only_understood_items_are_kept(running, store, size):
    """Only what was understood of items is kept."""
    text = json.dumps(UNREAD).replace(JUNK, JUNK * size)
    first = ask(running, json.loads(text), truncation="auto", extra_body={"junk": JUNK * size})
    shown = running.responses.input_items.list(first.id, order="asc").data
    assert [item.type for item in shown] == ["message", "message", "reasoning"] and {
        item.status for item in shown
    } == {"completed"}
    assert (
        [item.content[0].text for item in shown[:2]] == ["a", "b"]
        and shown[1].content[1].refusal == "no"
        and shown[2].summary[0].text == "c"
    )
    assert shown[1].content[0].annotations == []
    whole = ask(
        running,
        [
            *({"role": item["role"], "content": item["content"]} for item in UNREAD[:2]),
            UNREAD[2],
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "d"},
        ],
        store=False,
    )
    assert ask(running, "d", previous_response_id=first.id).usage.input_tokens == whole.usage.input_tokens
    if size == 1:
        conversation = running.conversations.create(items=UNREAD)
        running.conversations.items.create(conversation.id, items=UNREAD)
        assert [
            item.type for item in running.conversations.items.list(conversation.id, order="asc").data
        ] == ["message", "message", "reasoning"] * 2
    for path in store.parent.iterdir():
        assert JUNK.encode() not in path.read_bytes()


def test_calls_and_their_outputs_are_kept():
    """They are kept as they were understood."""
    items = [
        {"type": "function_call", "call_id": 5, "name": "f", "arguments": {"a": 1}, "junk": JUNK},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"b": 2}'},
        {"type": "function_call_output", "call_id": "c", "output": "x", "name": JUNK},
        {"type": "function_call_output", "output": [{"type": "input_text", "text": "y", "z": JUNK}]},
        {"type": "function_call_output", "call_id": {"a": JUNK}, "output": None},
        {"role": "user"},
        {"role": "user", "content": "half \ud800"},
        {"type": "reasoning", "content": "z", "summary": JUNK},
        {"type": "reasoning"},
    ]
    kept = kept_items(items)
    assert JUNK.encode() not in b"".join(item.body for item in kept) and len(
        {item.name for item in kept}
    ) == len(items)
    again = [json.loads(item.body) for item in kept]
    # what is read of them is what was read the first time, and what is kept of that is the same
    assert chat_messages(response_messages({"input": again}), True) == chat_messages(
        response_messages({"input": items}), True
    )
    assert [item.body for item in kept_items(again)] == [item.body for item in kept]


def test_without_keys_an_id_opens_a_conversation(model, tmp_path):
    """Whoever knows its id may continue it, so what they say belongs to it."""
    with keeping(model, tmp_path / "a.db") as client:
        conversation = client.conversations.create()
    with closing(sqlite3.connect(tmp_path / "a.db")) as writer:
        writer.execute("UPDATE conversations SET owner = '@10.0.0.9'")
        writer.commit()
    with keeping(model, tmp_path / "a.db") as client:
        ask(client, "One", conversation=conversation.id)
        assert len(client.conversations.items.list(conversation.id).data) == 2


LITTLE_ROOM = """
import sys
sys.path.insert(0, {root!r})
from chatlm.common.config import LIMITS
object.__setattr__(LIMITS, "kept_bytes", 100_000)
import chat_server
sys.exit(chat_server.main())
"""


def test_a_key_that_keeps_too_much_is_refused(model, tmp_path):
    """Until it deletes some; others are not refused."""
    script = tmp_path / "little_room.py"
    script.write_text(LITTLE_ROOM.format(root=str(SCRIPT.parent)))
    with server(
        model,
        f"--database={tmp_path / 'a.db'}",
        "--api-key",
        "first-key",
        "--api-key",
        "second-key",
        script=script,
    ) as (_, url):
        client = openai.OpenAI(base_url=url + "/v1", api_key="first-key", max_retries=0)
        other, kept = client.with_options(api_key="second-key"), []
        line = json.dumps(
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "x", "max_tokens": 3},
            }
        ).encode()
        file = client.files.create(file=("in.jsonl", line), purpose="batch")
        with pytest.raises(
            openai.PermissionDeniedError,
            match=r'more than 100,000 bytes together: delete some, or send \"store\": false',
        ):
            while True:
                kept.append(ask(client, [{"role": "user", "content": "x" * 60}] * 60, truncation="auto"))
        assert (
            2 < len(kept) < 20 and ask(client, "x" * 60, store=False).output_text and ask(other).store is True
        )
        conversation = None
        with pytest.raises(openai.PermissionDeniedError, match="100,000 bytes"):
            while True:  # what is left
                conversation = client.conversations.create(
                    items=[{"type": "message", "role": "user", "content": "x" * 2000}]
                )
        full = {
            "item": lambda: client.conversations.items.create(
                conversation.id, items=[{"type": "message", "role": "user", "content": "x" * 3000}]
            ),
            "metadata": lambda: client.conversations.update(
                conversation.id, metadata={str(index): "m" * 512 for index in range(16)}
            ),
        }
        for refused in full.values():
            with pytest.raises(openai.PermissionDeniedError, match="100,000 bytes"):
                refused()
        client.conversations.update(conversation.id, metadata={})  # takes no more
        with pytest.raises(openai.PermissionDeniedError, match="100,000 bytes"):
            while True:
                client.files.create(file=("in.jsonl", line * 40), purpose="batch")
        with pytest.raises(openai.PermissionDeniedError, match="100,000 bytes"):
            while True:
                client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/completions",
                    completion_window="24h",
                    metadata={str(index): "m" * 512 for index in range(16)},
                )
        for response in kept:
            client.responses.delete(response.id)
        for each in client.files.list():
            with suppress(openai.ConflictError):
                client.files.delete(each.id)
        lines = b"".join(
            json.dumps(
                {
                    "custom_id": str(number),
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"prompt": "x", "n": 4, "max_tokens": 8, "logprobs": 5, "ignore_eos": True},
                }
            ).encode()
            + b"\n"
            for number in range(300)
        )
        batch = client.batches.create(
            input_file_id=client.files.create(file=("in.jsonl", lines), purpose="batch").id,
            endpoint="/v1/completions",
            completion_window="24h",
        )
        deadline_s = time.monotonic() + 60
        while (batch := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        # what there was room for when it began is kept, each other line says why it is not
        errors = [
            json.loads(line)["error"]["code"]
            for line in client.files.content(batch.error_file_id).text.splitlines()
        ]
        assert (
            {*errors} == {"storage_full"}
            and batch.request_counts.completed + len(errors) == 300
            and batch.request_counts.completed > 2
        )
        for name in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            client.files.delete(name)
        for again in full.values():
            again()
        assert ask(client).store is True


@pytest.mark.slow
def test_a_large_conversation_costs_one_page(model, tmp_path):
    """It costs what a page of it does."""
    with server(model, f"--database={tmp_path / 'a.db'}") as (process, url):
        client, front, url = (
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0),
            psutil.Process(process.pid),
            url + "/v1/",
        )
        conversation = client.conversations.create().id
        for number in range(1000):  # 60 MB
            post(
                f"{url}conversations/{conversation}/items",
                {"items": [{"role": "user", "content": f"{number:04}" + "x" * 60_000}]},
            )
        items, before = f"{url}conversations/{conversation}/items", front.memory_info().rss
        for query in ("limit=1", "limit=100", "limit=1&order=asc"):
            page = get(f"{items}?{query}")
            assert page["has_more"] and get(f"{items}/{page['last_id']}") == page["data"][-1]
        assert client.conversations.delete(conversation).deleted
        assert front.memory_info().rss - before < 20 << 20  # all of it took 250 MB
        deadline_s = time.monotonic() + 60
        while rows_of_items(tmp_path / "a.db"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def rows_of_items(store):
    """How many rows of items are there."""
    with closing(sqlite3.connect(store)) as reader:
        return reader.execute("SELECT COUNT(*) FROM items").fetchone()[0]


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_slow_readers_stay_within_the_budget(model, tmp_path):
    """They hold no more memory than it has."""
    with (
        server(
            model, f"--database={tmp_path / 'a.db'}", "--api-key", "first-key", "--api-key", "second-key"
        ) as (process, url),
        ExitStack() as readers,
    ):
        client, front = (
            openai.OpenAI(base_url=url + "/v1", api_key="first-key", max_retries=0),
            psutil.Process(process.pid),
        )
        conversation = client.conversations.create()
        for _ in range(100):
            client.conversations.items.create(
                conversation.id, items=[{"type": "message", "role": "user", "content": "x" * 60_000}]
            )
        line = json.dumps(
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "x" * 8_000_000},
            }
        ).encode()
        file, before = client.files.create(file=("in.jsonl", line), purpose="batch"), front.memory_info().rss
        paths = [f"/v1/conversations/{conversation.id}/items?limit=100", f"/v1/files/{file.id}/content"]
        for number in range(60):
            reader = readers.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            reader.sendall(
                f"GET {paths[number % 2]} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer"
                " first-key\r\n\r\n".encode()
            )
            assert number > 5 or reader.recv(100).startswith(b"HTTP/1.1 200")  # the others wait for memory
        other = client.with_options(api_key="second-key")
        for _ in range(20):
            assert ask(other).store is True
        assert front.memory_info().rss - before < 200 << 20  # it was two gigabytes


@pytest.mark.slow
def test_a_full_disk_leaves_room_to_delete(model, tmp_path):
    """A disk that one key fills leaves room to delete, to count and to start."""
    with small_disk(tmp_path / "disk", "100m") as disk:
        with keeping(model, disk / "a.db", keys=("first-key", "second-key")) as client:
            other, kept, conversation = (
                client.with_options(api_key="second-key"),
                ask(client),
                client.conversations.create(),
            )
            say = {"type": "message", "role": "user", "content": "x" * 60_000}
            line = json.dumps(
                {
                    "custom_id": "a",
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"prompt": "x", "n": 16, "max_tokens": 64, "logprobs": 5},
                }
            )
            lines = "".join(line.replace('"a"', f'"{number}"', 1) + "\n" for number in range(300)).encode()
            file = client.files.create(file=("in.jsonl", lines), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            with pytest.raises(openai.InternalServerError, match="almost full"):
                while True:
                    client.conversations.items.create(conversation.id, items=[say])
            full = {
                "a response": lambda: [
                    ask(client, [{"role": "user", "content": "y" * 300}] * 250, truncation="auto")
                    for _ in range(300)
                ],
                "a file": lambda: [
                    client.files.create(file=("in.jsonl", b"x" * 900_000), purpose="batch")
                    for _ in range(100)
                ],
            }
            for fill in full.values():
                with pytest.raises(openai.InternalServerError, match="almost full"):
                    fill()
            assert shutil.disk_usage(disk).free > 55 << 20
            assert ask(other, store=False).output_text
            used = get(f"{client.base_url}usage", "second-key")["total"]["requests"]
            client.responses.delete(kept.id)
        assert used >= 1
        with keeping(model, disk / "a.db", keys=("first-key", "second-key")) as client:  # after a kill
            assert get(f"{client.base_url}usage", "second-key")["total"]["requests"] == used
            client.batches.cancel(batch.id)
            client.conversations.delete(conversation.id)
            deadline_s = time.monotonic() + 60
            while True:  # it is purged in the background
                with suppress(openai.InternalServerError):
                    assert ask(client.with_options(api_key="second-key")).store is True
                    break
                assert time.monotonic() < deadline_s


WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "defer_loading": True}
SEARCHES = [
    {"role": "user", "content": "One"},
    {"type": "tool_search_call", "call_id": "c1", "execution": "client", "arguments": {"query": "x"}, "status": "completed"},
    {"type": "tool_search_output", "call_id": "c1", "execution": "client", "tools": [WEATHER], "status": "completed"},
    {"type": "additional_tools", "role": "developer", "tools": [WEATHER | {"name": "second"}]},
    {"role": "assistant", "content": "Now.", "phase": "commentary"},
]


def counted(client, **body):
    return client.responses.input_tokens.count(model="default", **body).input_tokens


def test_what_was_found_stays_found_in_a_kept_response(running):
    """Its items are kept with their tools; the response that continues may call these."""
    first = ask(running, SEARCHES)
    items = running.responses.input_items.list(first.id, order="asc").data
    assert [item.type for item in items] == ["message", "tool_search_call", "tool_search_output", "additional_tools", "message"]
    assert items[1].arguments == {"query": "x"} and items[2].tools[0].name == "weather" and items[4].phase == "commentary"
    second = ask(running, "Two", previous_response_id=first.id, tool_choice={"type": "function", "name": "second"}, max_output_tokens=100)
    assert second.output[0].name == "second"
    conversation = running.conversations.create(items=SEARCHES)
    assert counted(running, conversation=conversation.id, input="Two") == counted(running, input=[*SEARCHES, {"role": "user", "content": "Two"}])
    with pytest.raises(openai.BadRequestError, match="a list of tools"):
        running.conversations.create(items=[{"type": "additional_tools", "role": "developer", "tools": 5}])


@pytest.mark.parametrize("size", [1, 100_000])  # the second one is read in a sandbox
def test_a_count_of_what_continues_is_that_of_the_response(running, size):
    first = ask(running, "One")
    count = counted(running, input="Two", previous_response_id=first.id, extra_body={"padding": "x" * size})
    assert count == ask(running, "Two", previous_response_id=first.id).usage.input_tokens > counted(running, input="Two")
    reference = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "Two"}]
    assert counted(running, input=reference) == ask(running, reference).usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        counted(running, input="Two", previous_response_id="resp_none")
