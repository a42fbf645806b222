"""What an answer was given to read, put where the server put it: whatever asks again asks with all that the first request had."""

import pytest

from browsing import answers, ask, button, command, expect, expect_answered, fake_front, inside, needs_browser, open_page, reload, settled
from chatlm.common.messages.requests import Message
from chatlm.front.admission.questions import before_question
from chatlm.front.annexes.knowledge.prompting import with_documents

pytestmark = needs_browser
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TALKS = [
    [{"role": "user", "content": "one"}], [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "an answer that goes on"}], [{"role": "user", "content": [PIXEL, {"type": "text", "text": "one"}]}]]


@pytest.fixture(scope="module")
def front_url():
    with fake_front() as url:
        yield url


def said(message):
    """The texts of a message, together."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@pytest.mark.parametrize("mode, put", [("search", before_question), ("whole", with_documents)])
def test_page_and_server_put_it_in_the_same_place(page, front_url, mode, put):
    open_page(page, front_url)
    for talk in TALKS:
        by_page = page.evaluate("([messages, knowledge]) => Knowledge.given(messages, knowledge)", [talk, {"mode": mode, "text": "Read this. "}])
        by_server = put([Message(message["role"], said(message)) for message in talk], "Read this. ")
        assert [(message["role"], said(message)) for message in by_page] == [(message.role, message.content) for message in by_server]
        assert [part for message in by_page for part in message["content"] if part == PIXEL] == [part for message in talk for part in message["content"] if part == PIXEL]
    assert page.evaluate("messages => Knowledge.given(messages, {mode: 'search', read: 0, passages: []})", TALKS[0]) == TALKS[0]


def sent_by(page, act, route):
    with page.expect_request(f"**/{route}") as sent:
        act()
    return sent.value.post_data_json


def test_whatever_looks_into_an_answer_asks_with_all_that_it_was_asked_with(page, server_url):
    """Its passages, tools, parameters and system prompt: the lens, the check that it repeats, the prompt and the comparison."""
    open_page(page, server_url)
    command(page, "/maxtokens 8")
    ask(page, "How is it primed?")
    expect_answered(page)
    knowledge = {"mode": "search", "read": 1, "of": 9, "text": "Passages.\n\n[1] Prime it.\n\n", "passages": [{"index": 1, "vector_store_id": "vs", "file_id": "f", "filename": "a.md", "start": 0}]}
    page.evaluate("knowledge => { Object.assign(Chat.lastNode(), {knowledge, system: 'Be brief.'}); Store.change('nodes', Chat.lastNode().id, {knowledge, system: 'Be brief.'}); Page.render(); }", knowledge)
    wanted = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Passages.\n\n[1] Prime it.\n\nHow is it primed?"}]
    answer = answers(page).last
    assert sent_by(page, lambda: inside(answer, "Check that it repeats"), "v1/chat/completions")["messages"] == wanted
    assert sent_by(page, lambda: inside(answer, "Token lens"), "v1/chat/completions")["messages"] == wanted
    assert sent_by(page, lambda: inside(answer, "Prompt"), "apply-template")["messages"] == wanted
    page.keyboard.press("Escape")
    inside(answer, "Compare")
    dialog = page.get_by_role("dialog", name="Compare")
    assert sent_by(page, lambda: button(dialog, "Compare").click(), "v1/compare")["messages"] == wanted
    page.keyboard.press("Escape")
    settled(page)
    reload(page)
    exported = page.evaluate("async () => Tree.exportOf([Chat.current], () => [...Chat.nodes.values()])")
    kept = [node["knowledge"] for node in exported["conversations"][0]["nodes"] if node["role"] == "assistant"]      # a repetition that differs is kept beside it
    assert kept and all(each == knowledge for each in kept)
