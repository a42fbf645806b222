"""Tools that run: chosen for a chat, approved by the reader, and their results sent back. A real server, the default model, a real tool server."""

import json
import re
import sys

import pytest

import fake_tools
import hostile_tools
from browsing import (SLOW_MS, answers, ask, button, expect, expect_accessible, expect_answered, needs_browser, open_page, started_server)

pytestmark = needs_browser


@pytest.fixture(scope="module")
def tool_url(tmp_path_factory):
    config = tmp_path_factory.mktemp("tools") / "mcp.json"
    program = {"command": sys.executable, "args": [fake_tools.__file__], "cwd": str(config.parent)}  # where a model may name any file
    config.write_text(json.dumps({"mcpServers": {"fake": program, "free": {**program, "alwaysAllow": ["add"]}, "lost": {"command": "no-such-program"},
                                                 "deep": {"command": sys.executable, "args": [hostile_tools.__file__, "deep-schema"]}}}))
    with started_server("--mcp-config", str(config), "--tool-rounds", "2", "--tool-result", "600", "--kv-cache-memory", "60M") as url:
        yield url


def chat_with(page, url, *tools, **parameters):
    """A new chat in which the model must call one of these tools."""
    open_page(page, url)
    expect(button(page, re.compile("^Tools"))).to_be_visible(timeout=SLOW_MS)
    new_chat_with(page, *tools, **parameters)


def new_chat_with(page, *tools, **parameters):
    """The same, where the page is open."""
    page.evaluate("changes => { Chat.openNew(); Chat.change(Chat.current, changes); }",
                  {"tools": list(tools), "parameters": {"tool_choice": "required", "temperature": 0, "max_tokens": 120, **parameters}})


def cards(page, name):
    return page.get_by_role("region", name=f"Call of {name}")


def calls_of(page):
    return page.evaluate("[...Chat.nodes.values()].flatMap(({calls = []}) => calls)")


def test_tools_are_chosen_for_a_chat(page, tool_url, theme):
    open_page(page, tool_url)
    button(page, "Tools").click()
    dialog = page.get_by_role("dialog", name="Tools")
    expect(dialog.get_by_text("no-such-program: No such file or directory")).to_be_visible()
    expect(dialog.get_by_text("1 tool is left out (deep): its schema is nested more than 100 deep")).to_be_visible()
    expect_accessible(page, theme=theme)
    dialog.get_by_role("checkbox", name=re.compile("^add")).first.check()
    dialog.get_by_role("checkbox", name=re.compile("^free")).check()
    button(dialog, "Done").click()
    chosen = page.evaluate("Chat.current.tools")
    assert "fake__add" in chosen and "fake__slow" not in chosen and "free__slow" in chosen and chosen == sorted(chosen)
    expect(button(page, f"Tools ({len(chosen)} on)")).to_be_visible()
    page.evaluate("Chat.openNew()")
    expect(page.get_by_role("button", name="Tools", exact=True)).to_be_visible()


def test_a_long_description_does_not_shrink_the_box_beside_it(page, tool_url):
    page.set_viewport_size({"width": 360, "height": 700})
    open_page(page, tool_url)
    button(page, "Tools").click()
    boxes = page.get_by_role("dialog", name="Tools").locator("#tools-list input")
    expect(boxes.nth(8)).to_be_visible()
    # the list may be drawn anew meanwhile, and what has gone has no size
    page.wait_for_function("() => [...document.querySelectorAll('#tools-list input')].every(box => "
                           "box.offsetWidth === 18 && box.offsetHeight === 18)")


def test_the_list_of_tools_says_which_calls_run_without_asking(page, tool_url):
    """Those that the operator allows, and those that the reader has allowed."""
    open_page(page, tool_url)
    button(page, "Tools").click()
    dialog = page.get_by_role("dialog", name="Tools")
    asks = "The model may call what is checked, in this chat. You are asked before a call runs"
    expect(dialog.get_by_text(asks + ", unless its tool runs without asking.")).to_be_visible()
    marked = dialog.get_by_text("runs without asking", exact=False).filter(has_not_text="unless")
    expect(marked).to_have_count(1)
    digest = page.evaluate("async () => (await Server.jsonOf(Server.request('v1/tools'))).data.find(({name}) => name === 'fake__add').digest")
    page.evaluate("digest => { Chat.change(Chat.current, {allowed: {fake__add: digest}}); }", digest)
    button(dialog, "Done").click()
    button(page, re.compile("^Tools")).click()
    expect(marked).to_have_count(2)


def test_a_call_waits_for_its_reader(page, tool_url, theme):
    """Once runs this one only; the next round asks again. After two rounds the model answers without tools."""
    chat_with(page, tool_url, "fake__add")
    ask(page, "Add 2 and 3.")
    card = cards(page, "fake__add").first
    expect(card).to_contain_text("adds two numbers", timeout=SLOW_MS)
    expect_accessible(page, theme=theme)
    assert [call.get("result") for call in calls_of(page)] == [None]
    button(card, "Once").click()
    expect(cards(page, "fake__add")).to_have_count(2, timeout=SLOW_MS)
    first = calls_of(page)[0]
    numbers = json.loads(first["arguments"])
    assert first["result"] == str(numbers["a"] + numbers["b"])
    button(cards(page, "fake__add").nth(1), "Once").click()
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)
    expect_answered(page, 3)
    assert len(calls_of(page)) == 2 and page.evaluate("Chat.lastNode().content") != ""


def test_a_question_waits_until_the_tools_are_known(page, tool_url):
    """A reader may ask before the page has read them."""
    held = []
    page.route("**/v1/tools?*", lambda route: held.append(route))
    open_page(page, tool_url)
    new_chat_with(page, "free__add")
    ask(page, "Add 2 and 3.")
    page.wait_for_function("() => Chat.lastNode()?.stream")
    for route in held:
        route.continue_()
    expect(cards(page, "free__add").first).to_be_visible(timeout=SLOW_MS)
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)      # the operator's free tool runs without asking


def test_a_denied_call_is_told_to_the_model(page, tool_url):
    chat_with(page, tool_url, "fake__add")
    ask(page, "Add 2 and 3.")
    button(cards(page, "fake__add").first, "No").click(timeout=SLOW_MS)
    expect(cards(page, "fake__add").first).to_contain_text("The user did not allow this call.")
    expect(answers(page)).to_have_count(2, timeout=SLOW_MS)
    messages = page.evaluate("Chat.messagesToSend(Chat.path, '')")
    assert [message["content"] for message in messages if message["role"] == "tool"][0] == "The user did not allow this call."


def test_what_was_allowed_runs_by_itself(page, tool_url):
    """This chat: only in it. Always: in every chat of this browser, until the tool changes."""
    chat_with(page, tool_url, "fake__add")
    ask(page, "Add 2 and 3.")
    button(cards(page, "fake__add").first, "This chat").click(timeout=SLOW_MS)
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)      # both rounds
    new_chat_with(page, "fake__add")
    ask(page, "Add 2 and 3.")
    button(cards(page, "fake__add").first, "Always").click(timeout=SLOW_MS)
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)
    new_chat_with(page, "fake__add")
    ask(page, "Add 2 and 3.")
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)
    page.evaluate("Settings.change({allowed: {fake__add: '0000000000000000'}})")
    new_chat_with(page, "fake__add")
    ask(page, "Add 2 and 3.")
    expect(button(cards(page, "fake__add").first, "Once")).to_be_visible(timeout=SLOW_MS)
    assert calls_of(page)[0].get("result") is None


@pytest.mark.slow
def test_the_operator_s_free_tools_are_not_asked_about(page, tool_url):
    chat_with(page, tool_url, "free__add")
    ask(page, "Add 2 and 3.")
    expect(answers(page)).to_have_count(3, timeout=SLOW_MS)
    assert all(call["result"].lstrip("-").isdigit() or "twice" in call["result"] for call in calls_of(page))


def test_a_running_call_shows_progress_and_can_be_cancelled(page, tool_url, tmp_path):
    """After it the reader goes on, not the page."""
    chat_with(page, tool_url, "fake__slow")
    ask(page, "Wait.")
    card = cards(page, "fake__slow").first
    button(card, "Once").click(timeout=SLOW_MS)
    expect(card).to_contain_text("still waiting", timeout=SLOW_MS)
    button(card, "Cancel").click()
    expect(card).to_contain_text("The user cancelled this call.")
    expect(answers(page)).to_have_count(1)
    button(page, "Continue").last.click()
    expect(answers(page)).to_have_count(2, timeout=SLOW_MS)


def test_a_long_result_is_folded_and_pictures_are_shown(page, tool_url):
    chat_with(page, tool_url, "fake__picture")
    ask(page, "Show a picture.")
    card = cards(page, "fake__picture").first
    button(card, "Once").click(timeout=SLOW_MS)
    expect(card.get_by_role("img", name="Picture of picture")).to_be_visible(timeout=SLOW_MS)
    assert card.get_by_role("img").evaluate("image => image.naturalWidth") == 1
    results = [message["content"] for message in page.evaluate("Chat.messagesToSend(Chat.path, '')") if message["role"] == "tool"]
    assert results[0] == "[picture 1]\none pixel\n[You are not shown the pictures of this result.]"      # the default model does not see
    new_chat_with(page, "fake__show")
    ask(page, "Show it.")
    card = cards(page, "fake__show").first
    button(card, "Once").click(timeout=SLOW_MS)
    expect(card).to_contain_text("PATH", timeout=SLOW_MS)


def test_a_call_that_a_reload_cut_is_asked_about_again(page, tool_url):
    """Nobody knows how it ended, so it is not repeated by itself."""
    chat_with(page, tool_url, "fake__slow")
    ask(page, "Wait.")
    card = cards(page, "fake__slow").first
    button(card, "This chat").click(timeout=SLOW_MS)
    expect(card).to_contain_text("still waiting", timeout=SLOW_MS)
    page.reload()
    expect(card).to_contain_text("nobody knows how it ended", timeout=SLOW_MS)
    expect(button(card, "Once")).to_be_visible()


def test_a_result_is_never_html(page, tool_url):
    open_page(page, tool_url)
    text = "<img src=x onerror=\"window.hit = 1\"><script>window.hit = 1</script>"
    page.evaluate("""text => { const node = {calls: [{id: "1", name: "a__b", server: "a", tool: "b", arguments: "{}", result: text}]};
        document.body.append(Tools.partOf(node.calls[0], node)); }""", text)
    expect(page.locator(".tool pre").last).to_have_text(text)
    assert page.evaluate("window.hit") is None


def test_an_imported_chat_brings_no_tool_and_no_approval(page, tool_url):
    """Nor a card that says of a call something else than the server does."""
    open_page(page, tool_url)
    chat = {"title": "x", "tools": ["fake__count"], "allowed": {"fake__count": "0" * 16}, "nodes": [
        {"id": "1", "parent": None, "role": "user", "content": "go"},
        {"id": "2", "parent": "1", "role": "assistant", "content": "", "calls": [
            {"id": "c", "name": "fake__count", "arguments": "{}", "server": "fake", "tool": "count", "about": "harmless", "digest": "0" * 16}]}]}
    [brought] = page.evaluate("text => Tree.importOf(text)", json.dumps({"format": "chat_server chats", "version": 2, "conversations": [chat]}))
    assert not {"tools", "allowed"} & brought["conversation"].keys()
    assert [node["calls"] for node in brought["nodes"] if "calls" in node] == [[{"id": "c", "name": "fake__count", "arguments": "{}"}]]


def test_pictures_follow_the_results_of_their_calls(opened_page):
    """As a message of the user, to a model that sees; the slow test sends one to a server."""
    messages = opened_page.evaluate("""() => {
        const {can} = Server.model;
        Server.model.can = {...can, vision: true};
        const calls = [["1", [{mime_type: "image/png", data: "AAAA"}]], ["2", []]].map(([id, images]) => ({id, name: "fake__picture", arguments: "{}", result: "one pixel", images}));
        const path = [Tree.newNode("x", null, "user", "Show a picture.", {}), Tree.newNode("x", null, "assistant", "", {calls})];
        const messages = Chat.messagesToSend(path, "");
        Server.model.can = can;
        return messages;
    }""")
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert [message["content"] for message in messages[2:4]] == ["one pixel"] * 2
    picture, text = messages[-1]["content"]
    assert picture == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}} and text["type"] == "text"


@pytest.mark.slow
def test_pictures_reach_a_model_that_sees(page, tmp_path):
    """They follow the results; a picture that can't be read is not sent."""
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    from tiny_sight import make_smolvlm, save_sight
    save_sight(tmp_path, "smolvlm", make_smolvlm())
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {name: {"command": sys.executable, "args": [fake_tools.__file__, *faults], "alwaysAllow": ["*"]}
                                                 for name, faults in {"fake": [], "broken": ["broken-picture"]}.items()}}))
    with started_server(str(tmp_path), "--mcp-config", str(config), "--tool-rounds", "1", "--kv-cache-memory", "60M") as url:
        open_page(page, url)
        for name, pictures in (("fake__picture", 1), ("broken__picture", 0)):
            new_chat_with(page, name, parallel_tool_calls=False)  # a second call of a random model would be cut by the limit of tokens
            ask(page, "Show a picture.")
            expect(answers(page)).to_have_count(2, timeout=SLOW_MS)
            expect_answered(page, 2)
            messages = page.evaluate("Chat.messagesToSend(Chat.path.slice(0, -1), '')")
            assert [message["role"] for message in messages] == ["user", "assistant", "tool", *["user"] * pictures]
            assert ("can't be read" in messages[2]["content"]) is not bool(pictures)
            if pictures:
                assert [part["type"] for part in messages[-1]["content"]] == ["image_url", "text"]
            assert page.evaluate("Chat.lastNode().error") is None      # which the server gives to a picture that it can't read


@pytest.mark.slow
def test_tools_on_a_phone(page, tool_url):
    page.set_viewport_size({"width": 360, "height": 700})
    chat_with(page, tool_url, "fake__add")
    ask(page, "Add 2 and 3.")
    row = cards(page, "fake__add").first.get_by_role("group", name="Allow add of fake?")
    expect(row).to_be_visible(timeout=SLOW_MS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    button(row, "Once").focus()
    page.keyboard.press("Enter")
    expect(cards(page, "fake__add").first).to_contain_text("Result", timeout=SLOW_MS)
