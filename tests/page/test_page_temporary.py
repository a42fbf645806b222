"""A temporary chat: nothing of it is in the browser's profile or on the server, whose real program has a database."""

import re

import pytest

from browsing import (CHROMIUM, ask, button, chats, expect, expect_answered, menu, needs_browser, open_page, questions, said)
from real_server import server

pytestmark = needs_browser
SECRET = "Quollomar hides marzipan lanterns below Wexcombe bridge"
WORDS = [word for word in SECRET.split() if len(word) > 6]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, nanochat_fixtures):
    folder = tmp_path_factory.mktemp("kept")
    with server(nanochat_fixtures / "gen5", "--database", folder / "store.db", "--prefix-store", folder) as (_, url):
        yield url + "/", folder


def spelled(words):
    return [word.encode(code) for word in words for code in ("utf-8", "utf-16-le")]


def found_below(folder, words):
    return {path.name for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in spelled(words))}


def begin(page):
    menu(page, "Temporary chat")
    expect(page.get_by_text("Nothing of this chat is kept: not in this browser")).to_be_visible()


def keep(page):
    menu(page, "Chats on all your devices")
    dialog = page.get_by_role("dialog", name="Chats on all your devices")
    button(dialog, "Keep them").click()
    button(dialog, "Done").click()
    expect(dialog).to_be_hidden()


def profile(browser, folder, url, act):
    """Has a browser with a profile of its own do something, and ends it as a person does."""
    context = browser.browser_type.launch_persistent_context(folder, executable_path=CHROMIUM, args=["--no-sandbox"])
    open_page(context.pages[0], url)
    act(context.pages[0])
    context.close()


def test_words_are_in_no_profile_and_on_no_server(browser, kept, tmp_path):
    """With chats on all devices; while it is written, typed, answered, edited, deleted and brought back."""
    url, folder = kept

    def talk(page):
        keep(page)
        begin(page)
        box = page.get_by_role("textbox", name="Message")
        box.fill(SECRET)
        box.fill("")
        ask(page, SECRET)
        expect_answered(page)
        ask(page, f"{SECRET} too")
        expect_answered(page, 2)
        expect(page).to_have_title(re.compile("^Temporary chat - "))
        box.fill(f"{SECRET} unsent")
        row = page.get_by_role("listitem").filter(has_text="Temporary chat")
        row.hover()
        button(row, "Delete").click()
        button(page, "Undo").click()
        expect(said(questions(page))).to_have_text([SECRET, f"{SECRET} too"])
        page.evaluate("Store.leave()")

    profile(browser, tmp_path / "temporary", url, talk)
    assert not found_below(tmp_path / "temporary", WORDS)
    assert not found_below(folder, WORDS)

    def say(page):
        keep(page)
        ask(page, SECRET)
        expect_answered(page)
        page.wait_for_function("() => Store.flushing === null")       # a bare expression needs eval, which the page forbids
        page.wait_for_function("() => Store.get('nodes', Chat.path[0].id).then(node => Boolean(node?.rev))")      # the server has it

    profile(browser, tmp_path / "usual", url, say)
    assert found_below(tmp_path / "usual", WORDS) and found_below(folder, WORDS), "the search finds what is kept"


def test_it_is_only_in_its_tab(browser, kept):
    url, _ = kept
    context = browser.new_context()
    one, other = context.new_page(), context.new_page()
    for page in (one, other):
        open_page(page, url)
    ask(one, "an ordinary question")
    expect_answered(one)
    expect(chats(other)).to_have_count(1)
    button(one, "New chat").click()
    one.get_by_role("textbox", name="Message").fill("typed before the switch")
    begin(one)
    expect(one.get_by_role("textbox", name="Message")).to_have_value("typed before the switch")
    ask(one, "whispered words")
    expect_answered(one)
    ask(one, "and on")
    expect_answered(one, 2)
    assert "#" not in one.url
    expect(chats(one)).to_have_count(2)
    chats(one).filter(has_text="ordinary").click()
    chats(one).filter(has_text="Temporary chat").click()
    expect(said(questions(one))).to_have_text(["whispered words", "and on"])
    expect(chats(other)).to_have_text(["an ordinary question"])
    with one.expect_download() as download:
        menu(one, "Export")
        one.get_by_role("button", name="All chats (JSON)").click()
    assert "whispered" not in download.value.path().read_text()
    one.reload()
    expect(chats(one)).to_have_text(["an ordinary question"])
    expect(one.get_by_role("textbox", name="Message")).to_have_value("")
    context.close()


def test_the_server_is_asked_to_keep_nothing(page, stand_in):
    open_page(page, stand_in.url)
    box = page.get_by_role("textbox", name="Message")
    box.fill("/temporary")
    box.press("Enter")
    box.press("Enter")
    expect(page.get_by_text("Nothing of this chat is kept: not in this browser")).to_be_visible()
    ask(page, "one")
    expect_answered(page)
    body = stand_in.bodies[-1]
    assert body["prompt_cache_retention"] == "in_memory" and body["resumable"] is False
    count = len(stand_in.bodies)
    menu(page, "Ordinary chat")
    ask(page, "two")
    expect_answered(page)
    assert len(stand_in.bodies) >= count + 1
    body = next(body for body in stand_in.bodies[count:] if body["messages"][-1]["content"] == "two")
    assert "prompt_cache_retention" not in body and body["resumable"] is True
    assert not any("title" in str(body["messages"][-1]["content"]).lower() and "one" in str(body["messages"]) for body in stand_in.bodies)
