"""Responses that come late: whatever order the server answers in, the page shows what was asked for last."""

import pytest

from browsing import (answers, ask, button, chats, command, expect, expect_answered, fake_front, inside, menu, message_box, needs_browser, open_page,
                      questions, said)
from chatlm.common.config import ApiKey

pytestmark = needs_browser

# Holds the responses to what `path` matches: `late[0]()` delivers the first, as it was when it was asked for.
HOLD = """path => {
    const real = window.fetch;
    window.late = [];
    window.fetch = async (url, options) => {
        const response = await real(url, options);
        if (!new RegExp(path).test(url)) return response;
        await response.clone().text();
        return new Promise(deliver => late.push(() => deliver(response)));
    };
    window.release = () => { window.fetch = real; };
}"""
SETTLED = "async () => { for (let i = 0; i < 3; i++) await new Promise(done => requestAnimationFrame(() => setTimeout(done))); }"


def hold(page, path):
    page.evaluate(HOLD, path)


def deliver(page, *numbers):
    """Deliver held responses in this order, each wholly taken in by the page before the next."""
    page.wait_for_function("count => late.length >= count", arg=max(numbers) + 1)
    for number in numbers:
        page.evaluate("number => late[number]()", number)
        page.evaluate(SETTLED)


@pytest.fixture
def front(page):
    with fake_front() as url:
        open_page(page, url)
        yield page


def test_a_slow_prompt_does_not_replace_a_later_one(front):
    for count, text in enumerate(("first question", "second question"), 1):
        ask(front, text)
        expect_answered(front, count)
    hold(front, "apply-template")
    for turn in (answers(front).last, answers(front).first):
        inside(turn, "Prompt")
        expect(front.locator("#prompt-dialog")).to_be_visible()        # its script loads when it is needed first
        front.keyboard.press("Escape")
    inside(answers(front).first, "Prompt")
    deliver(front, 2, 1, 0)
    expect(front.locator("#prompt-text")).to_contain_text("first question")
    expect(front.locator("#prompt-text")).not_to_contain_text("second question")
    expect(front.locator("#prompt-counts")).not_to_contain_text("second question")


def test_settings_show_their_own_model_s_template(front):
    hold(front, "apply-template")
    for _ in range(2):
        button(front, "Settings").click()
        expect(front.locator("#template")).to_be_empty()
        front.keyboard.press("Escape")
    deliver(front, 1)
    front.evaluate("document.getElementById('template').textContent = 'the later one'")
    deliver(front, 0)
    expect(front.locator("#template")).to_have_text("the later one")


def models(*states):
    return [{"id": f"m{i}", "state": state, "owned_by": "chat_server", "capabilities": {}, "defaults": {}} for i, state in enumerate(states)]


def test_a_late_list_of_models_replaces_no_newer_one(page, stand_in):
    stand_in.several = models("ready", "loading")
    open_page(page, stand_in.url)
    hold(page, "v1/models")
    page.evaluate("void Server.lookAtModels()")
    page.wait_for_function("() => late.length === 1")
    stand_in.several = models("ready", "ready", "ready")
    page.evaluate("void Server.lookAtModels()")
    deliver(page, 1, 0)
    choice = page.get_by_role("combobox", name="Model", exact=True)
    expect(choice.locator("option")).to_have_text(["m0 · loaded", "m1 · loaded", "m2 · loaded"])


def test_an_old_list_stays_if_no_newer_one_comes(page, stand_in):
    stand_in.several = models("ready", "unloaded")
    open_page(page, stand_in.url)
    hold(page, "v1/models")
    stand_in.several = models("ready", "ready")
    page.evaluate("() => { Server.lookAtModels(); Server.lookAtModels(); }")
    deliver(page, 0)
    expect(page.get_by_role("combobox", name="Model", exact=True).locator("option").last).to_have_text("m1 · loaded")


def test_a_look_at_the_server_is_for_its_own_view(page, stand_in):
    open_page(page, stand_in.url)
    hold(page, "/stats")
    stand_in.restarts = 1
    page.evaluate("Views.openStatus()")
    page.wait_for_function("() => late.length === 1")
    page.evaluate("Status.close()")
    stand_in.restarts = 2
    page.evaluate("Views.openStatus()")
    page.wait_for_function("() => late.length === 2")
    stand_in.restarts = 3
    page.evaluate("void Status.look()")
    deliver(page, 2, 0, 1)
    assert page.evaluate("Status.shown.samples.length") == 1
    expect(page.locator("#status-workers")).to_contain_text("3")
    page.evaluate("Status.close()")


def test_another_server_s_late_refusal_asks_no_key(page):
    with fake_front() as url, fake_front(cors_origin=(url.rstrip("/"),), keys=(ApiKey.hashed("key", "alice"),)) as locked:
        open_page(page, url)
        hold(page, locked + "(v1/models|stats)")
        page.evaluate("home => Settings.useServer(home)", locked)
        page.wait_for_function("() => late.length === 2")
        page.evaluate("() => { release(); Settings.useServer(Server.PAGE_HOME); }")
        expect(page.locator("#lamp.ready")).to_be_visible()
        page.evaluate("() => late.forEach(deliver => deliver())")
        page.evaluate(SETTLED)
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.locator("#lamp.ready")).to_be_visible()


def test_a_late_word_on_an_old_schema_is_not_shown(page, stand_in):
    stand_in.model["capabilities"] |= {"json_schema": True}
    open_page(page, stand_in.url)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": "this schema cannot be enforced"}}))
    hold(page, "v1/chat/completions")
    button(page, "Settings").click()
    page.get_by_text("Functions and answer format").click()
    schema = page.get_by_label("JSON schema of answers")
    schema.fill('{"type": "object"}')
    page.wait_for_function("() => late.length === 1")
    schema.fill("")
    deliver(page, 0)
    expect(page.locator("#schema-problem")).to_be_empty()
    schema.fill('{"type": "object"}')
    deliver(page, 1)
    expect(page.locator("#schema-problem")).to_contain_text("cannot be enforced")


def test_a_late_health_does_not_lock_the_page(page, stand_in):
    open_page(page, stand_in.url)
    stand_in.loading = {"stage": "reading weights", "fraction": None}
    hold(page, "health")
    page.evaluate("void Server.isAway()")
    page.wait_for_function("() => late.length === 1")
    stand_in.loading = None
    page.evaluate("void Server.isAway()")
    deliver(page, 1, 0)
    expect(page.locator("#lamp.ready")).to_be_visible()


def test_what_is_typed_while_the_model_loads_is_sent_when_it_is_ready(page, stand_in):
    """From nothing to a key press: the message box has the focus at the first paint, whatever is loading."""
    stand_in.loading = {"stage": "reading weights", "fraction": 0.4}
    page.goto(stand_in.url)
    expect(page.locator("#lamp.loading")).to_be_visible()
    page.keyboard.type("hello")                                 # nobody clicked anywhere
    page.keyboard.press("Enter")
    expect(page.get_by_text("Your question is sent when the model is ready.")).to_be_visible()
    expect(message_box(page)).to_have_value("hello")
    assert stand_in.bodies == []
    stand_in.loading = None
    expect_answered(page)
    expect(message_box(page)).to_have_value("")
    assert len(stand_in.bodies) == 1


def test_a_question_of_the_page_waits_for_an_open_one(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    page.evaluate("""() => { window.said = [];
        for (const title of ["First?", "Second?"]) Page.confirmed(title, [], "No", "Yes").then(yes => said.push([title, yes])); }""")
    dialog = page.locator("#ask-dialog")
    expect(dialog).to_contain_text("First?")
    button(dialog, "Yes").click()
    expect(dialog).to_contain_text("Second?")
    button(dialog, "No").click()
    page.wait_for_function("() => said.length === 2")
    assert page.evaluate("said") == [["First?", True], ["Second?", False]]


def test_a_slowly_read_file_stays_with_its_chat(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    page.evaluate("""() => { const real = File.prototype.arrayBuffer;
        File.prototype.arrayBuffer = function () { return new Promise(go => { window.readNow = () => go(real.call(this)); }); }; }""")
    page.locator("#files-picker").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"my notes"})
    page.wait_for_function("() => window.readNow")
    button(page, "New chat").click()
    expect(questions(page)).to_have_count(0)
    page.evaluate("readNow()")
    page.evaluate(SETTLED)
    expect(button(page, "Remove notes.txt")).to_have_count(0)
    chats(page).first.click()
    expect(button(page, "Remove notes.txt")).to_be_visible()


def test_an_early_chat_stays_when_stored_ones_come(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    page.add_init_script("""() => {}; const open = IDBFactory.prototype.open;
        IDBFactory.prototype.open = function (...all) {
            const request = open.apply(this, all);
            Object.defineProperty(request, "onsuccess", {set(act) { request.addEventListener("success", event => { window.opened = () => act(event); }); }});
            return request;
        };""")
    page.reload()
    page.wait_for_function("() => window.opened")
    button(page, "New chat").click()
    command(page, "/seed 3")
    page.evaluate("opened()")
    page.wait_for_function("() => Page.started")
    expect(chats(page)).to_have_count(1)
    expect(questions(page)).to_have_count(0)
    assert page.evaluate("Chat.current.parameters") == {"seed": 3}
    message_box(page).fill("two")
    button(page, "Send").click()
    expect(said(questions(page))).to_have_text(["two"])
