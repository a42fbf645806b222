"""The page's chats in a real browser: what is stored, the list, several tabs, export and import."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import chat_server
from browsing import (answers, ask, button, chats, command, expect, expect_accessible, expect_answered, menu, message_box, more,
                      needs_browser, open_page, questions, reload, said, settled)
from nightly import by_day

pytestmark = needs_browser


def new_tab(page, url):
    other = page.context.new_page()
    open_page(other, url)
    return other


# the list -------------------------------------------------------------------------------------------------------------

def test_chats_are_opened_renamed_pinned_and_found(page, stand_in):
    open_page(page, stand_in.url)
    for text in ("apples are red", "bananas are yellow", "cherries are red too"):
        button(page, "New chat").click()
        ask(page, text)
        expect_answered(page)
    expect(chats(page)).to_have_text(["cherries are red too", "bananas are yellow", "apples are red"])
    expect(page.get_by_role("heading", name="Today")).to_be_visible()
    chats(page).filter(has_text="bananas").click()
    expect(said(questions(page))).to_have_text(["bananas are yellow"])
    expect(page.get_by_role("heading", name="bananas are yellow")).to_be_visible()
    row = page.get_by_role("listitem").filter(has_text="apples")
    row.hover()
    button(row, "Rename").click()
    page.get_by_role("textbox", name="Title").fill("Fruit")
    page.get_by_role("textbox", name="Title").press("Enter")
    button(page.get_by_role("listitem").filter(has_text="Fruit"), "Pin").click()
    expect(page.get_by_role("heading", name="Pinned")).to_be_visible()
    expect(chats(page)).to_have_text(["Fruit", "cherries are red too", "bananas are yellow"])
    search = page.get_by_role("textbox", name="Search chats")
    search.fill("said RED")                             # words of the messages, in any order and case
    expect(chats(page)).to_have_text(["Fruit", "cherries are red too"])
    search.fill("nowhere")
    expect(page.get_by_text("No chat contains all of these words.")).to_be_visible()
    search.press("Escape")
    reload(page)
    expect(chats(page)).to_have_text(["Fruit", "cherries are red too", "bananas are yellow"])
    # at the place where it was left
    expect(said(questions(page))).to_have_text(["bananas are yellow"])


def test_a_search_shows_where_the_words_are(page, stand_in, theme):
    open_page(page, stand_in.url)
    for text in ("apples\n" + "and so on " * 30 + "the GOLDEN   pear <b>fell</b> far " + "from the tree " * 30, "bananas"):
        button(page, "New chat").click()
        ask(page, text)
        expect_answered(page)
    search, cross = page.get_by_role("textbox", name="Search chats"), button(page, "Clear the search")
    expect(cross).to_be_hidden()
    search.fill("golden fell")
    expect(chats(page)).to_have_text(["apples"])
    snippet = page.locator("#chats .snippet:visible")
    expect(snippet).to_have_text(re.compile(r"^….*the GOLDEN pear <b>fell</b> far .*…$"))
    assert len(snippet.inner_text()) < 130
    page.wait_for_function("() => CSS.highlights.get('found')?.size === 2")         # both in the snippet
    expect_accessible(page, theme=theme)
    snippet.click()
    expect(said(questions(page))).to_contain_text("GOLDEN")
    search.fill("banana")                                     # in the title already
    expect(chats(page)).to_have_text(["bananas"])
    expect(snippet).to_have_count(0)
    cross.click()
    expect(chats(page)).to_have_text(["bananas", "apples"])
    expect(search).to_have_value("")
    expect(search).to_be_focused()
    expect(cross).to_be_hidden()
    search.fill("tree")
    expect(snippet).to_have_count(1)
    search.press("Escape")
    expect(cross).to_be_hidden()
    expect(snippet).to_have_count(0)


def test_a_deleted_chat_can_be_brought_back(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "keep me")
    expect_answered(page)
    page.get_by_role("listitem").hover()
    button(page, "Delete").click()
    expect(chats(page)).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(0)
    button(page, "Undo").click()
    expect(said(questions(page))).to_have_text(["keep me"])
    expect(chats(page)).to_have_text(["keep me"])
    page.get_by_role("listitem").hover()
    button(page, "Delete").click()
    settled(page)
    reload(page)
    expect(chats(page)).to_have_count(0)


@pytest.mark.slow
def test_address_and_back_button_find_chats(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "first")
    expect_answered(page)
    first = page.url
    button(page, "New chat").click()
    ask(page, "second")
    expect_answered(page)
    page.go_back()
    expect(page.get_by_role("article")).to_have_count(0)
    page.go_back()
    expect(said(questions(page))).to_have_text(["first"])
    assert page.url == first
    other = new_tab(page, first)
    expect(said(questions(other))).to_have_text(["first"])


@pytest.mark.slow
def test_drafts_belong_to_their_chats(page, stand_in):
    open_page(page, stand_in.url)
    message_box(page).fill("begun")
    reload(page)
    expect(message_box(page)).to_have_value("begun")
    ask(page, "first")
    expect_answered(page)
    expect(message_box(page)).to_have_value("")
    message_box(page).fill("more for the first")
    button(page, "New chat").click()
    expect(message_box(page)).to_have_value("")
    message_box(page).fill("something new")
    chats(page).click()
    expect(message_box(page)).to_have_value("more for the first")
    settled(page)
    page.context.pages[0].close()
    other = new_tab_of(page.context, stand_in.url)       # a later visit, whose own storage is empty
    expect(message_box(other)).to_have_value("more for the first")
    button(other, "New chat").click()
    expect(message_box(other)).to_have_value("something new")


def test_words_typed_while_a_draft_is_read_stay(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "first")
    expect_answered(page)
    button(page, "New chat").click()
    page.locator("#files-picker").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"})
    expect(button(page, "Remove notes.txt")).to_be_visible()
    message_box(page).fill("old")
    chats(page).click()
    expect(message_box(page)).to_have_value("")
    settled(page)
    page.evaluate("""() => {                            // reading the database takes until letGo()
        const gate = new Promise(resolve => window.letGo = resolve);
        for (const {prototype} of [IDBObjectStore, IDBIndex]) {
            const real = prototype.getAll;
            prototype.getAll = function (...wanted) {
                const request = real.apply(this, wanted), held = {get result() { return request.result; }};
                request.onsuccess = () => gate.then(() => held.onsuccess());
                return held;
            };
        }
    }""")
    button(page, "New chat").click()
    expect(message_box(page)).to_have_value("old")
    message_box(page).fill("old and new")
    page.evaluate("letGo()")
    expect(button(page, "Remove notes.txt")).to_be_visible()
    expect(message_box(page)).to_have_value("old and new")
    settled(page)
    reload(page)
    expect(button(page, "Remove notes.txt")).to_have_count(1)
    expect(message_box(page)).to_have_value("old and new")


def new_tab_of(context, url):
    page = context.new_page()
    open_page(page, url)
    return page


# the tree -------------------------------------------------------------------------------------------------------------

def test_a_deleted_message_can_be_brought_back(page, stand_in):
    open_page(page, stand_in.url)
    for number, text in enumerate(("one", "two"), 1):
        ask(page, text)
        expect_answered(page, number)
    more(questions(page).last, "Delete from here on")
    expect(said(questions(page))).to_have_text(["one"])
    expect(page.locator(".toast")).to_contain_text("Deleted 2 messages.")
    button(page, "Undo").click()
    expect(said(questions(page))).to_have_text(["one", "two"])
    expect(answers(page)).to_have_count(2)
    more(questions(page).first, "Delete from here on")
    expect(page.get_by_role("article")).to_have_count(0)
    settled(page)
    reload(page)
    expect(page.get_by_role("article")).to_have_count(0)


@pytest.mark.slow
def test_a_branch_becomes_a_chat_of_its_own(page, stand_in):
    open_page(page, stand_in.url)
    command(page, "/system Be brief.")
    for number, text in enumerate(("one", "two"), 1):
        ask(page, text)
        expect_answered(page, number)
    more(answers(page).first, "Branch into a new chat")
    expect(said(questions(page))).to_have_text(["one"])
    ask(page, "three")
    expect_answered(page, 2)
    assert [message["content"] for message in stand_in.bodies[-1]["messages"]] == \
        ["Be brief.", "one", "You said: one (answer 1)", "three"]
    expect(chats(page)).to_have_text(["one (2)", "one"])
    more(answers(page).first, "Branch into a new chat")
    expect(chats(page)).to_have_text(["one (3)", "one (2)", "one"])
    chats(page).last.click()
    expect(said(questions(page))).to_have_text(["one", "two"])


# several tabs ---------------------------------------------------------------------------------------------------------

def test_a_second_tab_shows_the_growing_chat(page, held_front):
    open_page(page, held_front.url)
    ask(page, "count")
    held_front.admit(2)
    expect(said(answers(page))).to_have_text("one two")
    other = new_tab(page, held_front.url)
    expect(said(answers(other))).to_have_text("one two")
    expect(button(other, "Stop")).to_be_visible()
    held_front.admit(1)
    expect(said(answers(other))).to_have_text("one two three")
    assert len(held_front.pool.requests) == 1
    button(other, "Stop").click()
    for tab in (page, other):
        expect(answers(tab)).to_contain_text("stopped")
        expect(button(tab, "Send")).to_be_visible()
    ask(other, "again")                                 # and in the other direction
    expect(said(questions(page))).to_have_text(["count", "again"])
    held_front.admit(5)
    expect(said(answers(page)).last).to_have_text("one two three four five")


def test_another_tab_goes_on_for_a_closed_one(page, held_front):
    open_page(page, held_front.url)
    ask(page, "count")
    held_front.admit(2)
    expect(said(answers(page))).to_have_text("one two")
    other = new_tab(page, held_front.url)
    expect(said(answers(other))).to_have_text("one two")
    page.close(run_before_unload=False)
    held_front.admit(3)
    expect(said(answers(other))).to_have_text("one two three four five")
    expect_answered(other)
    assert len(held_front.pool.requests) == 1


@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.slow)])
def test_two_tabs_that_ask_at_once_keep_both_answers(page, stand_in, order):
    open_page(page, stand_in.url)
    ask(page, "start")
    expect_answered(page)
    tabs = [page, new_tab(page, stand_in.url)]
    held = []
    for tab in tabs:                                    # neither learns of the other before both have asked
        expect(said(answers(tab))).to_contain_text("You said: start")
        tab.evaluate("""() => {
            window.late = [];
            window.hear = Store.channel.onmessage;
            Store.channel.onmessage = event => late.push(event);
        }""")
        tab.route("**/v1/chat/completions", lambda route: held.append(route))
    for number, tab in enumerate(tabs):
        with tab.expect_request("**/v1/chat/completions"):
            ask(tab, f"question {number}")
    for number in order:
        held[number].continue_()
        expect(answers(tabs[number]).last).to_contain_text(f"You said: question {number}")
        settled(tabs[number])
    for tab in tabs:
        tab.evaluate("() => { Store.channel.onmessage = hear; late.forEach(hear); }")
        expect(questions(tab).last).to_contain_text("/2")
    reload(page)
    texts = set()
    for step in ("Previous version", "Next version"):
        texts.add((said(questions(page)).last.inner_text(), said(answers(page)).last.inner_text()))
        if button(questions(page).last, step).is_enabled():
            button(questions(page).last, step).click()
            texts.add((said(questions(page)).last.inner_text(), said(answers(page)).last.inner_text()))
    assert {question for question, _ in texts} == {"question 0", "question 1"}
    assert all(f"You said: {question}" in answer for question, answer in texts)


@pytest.mark.slow
def test_tabs_with_other_chats_do_not_meddle(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "mine")
    expect_answered(page)
    other = new_tab(page, stand_in.url)
    button(other, "New chat").click()
    message_box(page).fill("half typed")
    ask(other, "yours")
    expect_answered(other)
    expect(chats(page)).to_have_text(["yours", "mine"])
    expect(said(questions(page))).to_have_text(["mine"])
    expect(message_box(page)).to_have_value("half typed")
    row = other.get_by_role("listitem").filter(has_text="mine")
    row.hover()
    button(row, "Delete").click()
    expect(page.get_by_text("This chat was deleted in another tab.")).to_be_visible()
    expect(chats(page)).to_have_text(["yours"])


# storage that fails ---------------------------------------------------------------------------------------------------

def test_without_a_database_the_page_says_it_forgets(page, stand_in):
    page.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
    open_page(page, stand_in.url)
    expect(page.get_by_role("status").filter(has_text="stores nothing")).to_be_visible()
    ask(page, "hello")
    expect_answered(page)
    button(page, "New chat").click()
    chats(page).click()
    expect(said(answers(page))).to_contain_text("You said: hello")


def test_full_storage_loses_nothing(page, stand_in):
    open_page(page, stand_in.url)
    # before the first write, because the browser remembers how much room there was
    browser = page.context.new_cdp_session(page)
    browser.send("Storage.overrideQuotaForOrigin", {"origin": stand_in.url.rstrip("/"), "quotaSize": 1000})
    ask(page, "while it is full")
    expect_answered(page)
    expect(page.get_by_role("status").filter(has_text="storage is full")).to_be_visible()
    button(page, "New chat").click()
    chats(page).click()
    expect(said(answers(page))).to_contain_text("while it is full")              # from memory
    browser.send("Storage.overrideQuotaForOrigin", {"origin": stand_in.url.rstrip("/")})
    ask(page, "after")
    expect_answered(page, 2)
    expect(page.get_by_role("status").filter(has_text="storage is full")).to_be_hidden()
    settled(page)
    reload(page)
    expect(said(answers(page))).to_contain_text(["while it is full", "after"])


def test_the_first_versions_chat_is_taken_over(page, stand_in):
    old = {"turns": [{"role": "user", "content": "old question"},
                     {"role": "assistant", "content": "old **answer**", "stats": {"tokens_per_second": 31.5, "finish_reason": "stop"}}],
           "previous": [{"role": "user", "content": "older"}, {"role": "assistant", "content": "", "error": "it failed"}],
           "settings": {"temperature": "0.3", "top_k": "", "top_p": "", "max_tokens": "", "seed": "", "system": "Be old."},
           "server": {"url": "", "key": "secret"}, "draft": ""}
    page.add_init_script("const key = `chat_server ${location.origin}/`; if (!localStorage.taken) {"
                         f" localStorage.setItem(key, {json.dumps(json.dumps(old))}); localStorage.taken = 1; }}")
    open_page(page, stand_in.url)
    expect(chats(page)).to_have_text(["old question", "older"])
    chats(page).first.click()
    expect(answers(page).locator("strong")).to_have_text("answer")
    expect(answers(page)).to_contain_text("32 tok/s")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "new question")
    assert sent.value.headers["authorization"] == "Bearer secret"
    expect_answered(page, 2)
    body = stand_in.bodies[-1]
    assert body["temperature"] == 0.3 and body["messages"][0] == {"role": "system", "content": "Be old."}
    settled(page)
    reload(page)
    expect(chats(page)).to_have_count(2)
    assert page.evaluate("localStorage.getItem(`chat_server ${location.origin}/`)") is None


# export and import ----------------------------------------------------------------------------------------------------

def exported(page, tmp_path, name):
    with page.expect_download() as download:
        menu(page, "Export", name)
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def imported(page, path, replace=None):
    page.locator("#import-file").set_input_files(path)
    dialog = page.get_by_role("dialog", name=f"Import {Path(path).name}?")
    if replace is not None:
        dialog.get_by_role("checkbox").set_checked(replace)
    button(dialog, "Import").click()


def test_a_chat_goes_out_and_in_with_its_branches(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    command(page, "/temperature 0.3")
    ask(page, "keep me")
    expect_answered(page)
    button(page, "Regenerate").click()
    expect(answers(page)).to_contain_text("(answer 2)")
    path = exported(page, tmp_path, "This chat (JSON)")
    assert path.name == "keep-me.json"
    file = json.loads(path.read_text())
    assert (file["format"], file["version"]) == ("chat_server chats", 2)
    chat, = file["conversations"]
    assert [node["role"] for node in chat["nodes"]] == ["user", "assistant", "assistant"]
    answer = chat["nodes"][2]
    assert answer["model"] == "stand-in-135m" and answer["seed"] == 7 and answer["parameters"] == {"temperature": 0.3}
    assert answer["timings"]["tokens_per_second"] == 212.3
    imported(page, path, replace=False)
    expect(page.get_by_role("log").get_by_text("Imported 1 chat with 3 messages from keep-me.json.")).to_be_visible()
    expect(chats(page)).to_have_text(["keep me", "keep me"])
    expect(answers(page)).to_contain_text("2/2")
    expect(answers(page)).to_contain_text("212 tok/s")
    button(page, "Previous answer").click()
    expect(answers(page)).to_contain_text("(answer 1)")


@pytest.mark.parametrize("count", by_day([1200, 5000], 1200))
def test_a_large_file_is_shown_before_it_is_written(page, stand_in, count):
    open_page(page, stand_in.url)
    other = new_tab(page, stand_in.url)
    other.evaluate("() => { window.drawn = 0; Parts.register({render() { drawn++; }}); }")
    nodes = [{"id": f"n{i}", "parent": None, "role": "user", "content": f"question {i}", "created": 10**12 + i} for i in range(count)]
    shown = page.evaluate("""text => { Chats.importAll(Tree.importOf(text), "it"); return [Chat.nodes.size, Boolean(Store.flushing)]; }""",
                          json.dumps({"title": "many", "nodes": nodes}))
    assert shown == [count, True]
    expect(said(questions(page))).to_have_text([f"question {count - 1}"])
    expect(chats(other)).to_have_text(["many"])
    assert other.evaluate("drawn") < 5
    settled(page)
    chats(other).click()
    expect(said(questions(other))).to_have_text([f"question {count - 1}"])
    expect(questions(other)).to_contain_text(f"{count}/{count}")


def test_chats_move_between_page_and_terminal(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    command(page, "/system Be brief")
    ask(page, "from the page")
    expect_answered(page)
    button(page, "Regenerate").click()
    expect(answers(page)).to_contain_text("(answer 2)")
    path, saved = exported(page, tmp_path, "This chat (JSON)"), tmp_path / "from-terminal.json"
    typed = f"/load {path}\nfrom the terminal\n/retry\n/save {saved}\n"
    run = subprocess.run([sys.executable, chat_server.__file__, "chat", "--url", stand_in.url], input=typed,
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    sent = stand_in.bodies[2]["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert sent[2]["content"] == "You said: from the page (answer 2)" and sent[3]["content"] == "from the terminal"
    imported(page, saved)
    expect(page.get_by_role("log").get_by_text("Imported 1 chat with 6 messages")).to_be_visible()
    expect(answers(page)).to_contain_text(["(answer 2)", "(answer 4)"])
    expect(answers(page).nth(0)).to_contain_text("2/2")
    expect(answers(page).nth(1)).to_contain_text("2/2")
    expect(answers(page).nth(1)).to_contain_text("212 tok/s")
    button(page, "Settings").click()
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value("Be brief")


@pytest.mark.slow
def test_all_chats_go_out_together(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    for text in ("one", "two"):
        button(page, "New chat").click()
        ask(page, text)
        expect_answered(page)
    path = exported(page, tmp_path, "All chats (JSON)")
    file = json.loads(path.read_text())
    assert sorted(chat["title"] for chat in file["conversations"]) == ["one", "two"]
    page.locator("#import-file").set_input_files(path)
    dialog = page.get_by_role("dialog", name=f"Import {path.name}?")
    expect(dialog).to_contain_text("It contains 2 chats with 4 messages.")
    expect(dialog.get_by_role("listitem")).to_contain_text(["one2 messages", "two2 messages"])
    boxes = dialog.get_by_role("checkbox", name="Replace the existing chat")
    expect(boxes).to_have_count(2)
    button(dialog, "Leave it").click()
    settled(page)
    expect(chats(page)).to_have_text(["two", "one"])
    button(page, "Regenerate").click()                                  # now the one that is here is newer than the file
    expect(answers(page)).to_contain_text("2/2")
    page.locator("#import-file").set_input_files(path)
    expect(dialog).to_contain_text("Replace the existing chat (3 messages")
    assert [box.is_checked() for box in boxes.all()] == [True, False]
    button(dialog, "Import").click()
    expect(page.locator(".toast")).to_have_text("Replaced 1 chat.Undo")
    expect(chats(page)).to_have_text(["two", "two", "one"])
    settled(page)
    reload(page)
    expect(chats(page)).to_have_text(["two", "two", "one"])
    page.locator("#import-file").set_input_files(path)
    expect(boxes).to_have_count(2)
    for box in boxes.all():
        box.check()
    button(dialog, "Import").click()
    expect(page.locator(".toast")).to_have_text("Replaced 2 chats.Undo")
    button(page, "Undo").click()
    expect(chats(page)).to_have_text(["two", "two", "one"])


def test_a_chat_goes_out_as_markdown_and_as_a_page(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    ask(page, "hostile")
    expect_answered(page, 2)
    text = exported(page, tmp_path, "Markdown").read_text()
    assert text.startswith("# markdown\n\n## You\n\nmarkdown\n\n## stand-in-135m\n\n# Sorting") and "| bubble | $n^2$ |" in text
    path = exported(page, tmp_path, "HTML page")
    html = path.read_text()
    assert "default-src 'none'" in html and not re.search(r"<(script|button|link|img|iframe|svg)", html.lower())
    page.context.set_offline(True)
    reader = page.context.new_page()
    reader.goto(path.as_uri())
    expect(reader.get_by_role("cell", name="bubble")).to_be_visible()
    expect(reader.locator("pre").first).to_contain_text("return b, a")
    expect(reader.get_by_text("You", exact=True)).to_have_count(2)
    assert reader.evaluate("window.hacked") is None
    sizes = reader.evaluate("""() => [".speaker", ".said h1", "body > h1"].map(each => parseFloat(getComputedStyle(document.querySelector(each)).fontSize))""")
    assert sizes[0] < 16 < sizes[1] < sizes[2]              # a heading of an answer is no speaker's name


LOOKS = """root => [...document.querySelectorAll(`${root} :is([class^=hljs-], th, td, mtd)`)].map(node => {
    const {color, textAlign} = getComputedStyle(node);
    return [node.className, node.textContent, node.matches("span") ? color : textAlign];
})"""


@pytest.mark.slow
def test_an_exported_page_keeps_colours_and_alignment(page, stand_in, tmp_path):
    languages = {"python": "@a\nclass B:  # c\n    x = 1 + len('s')\n    self.x = None", "js": "const re = /x+/g; let a = `x ${b}`;",
                 "diff": "+ added\n- gone", "css": "a:hover { color: #fff; }", "xml": '<a b="c">d</a>', "markdown": "# head\n- item\n> quote"}
    text = "".join(f"```{name}\n{code}\n```\n\n" for name, code in languages.items())
    text += "| a | b | c |\n|:--|:-:|--:|\n| 1 | 2 | 3 |\n\n$$\\begin{aligned} a &= b \\end{aligned}$$"
    messages = [{"role": "user", "content": "Look:\n```python\nx = 'y'\n```"}, {"role": "assistant", "content": text}]
    open_page(page, stand_in.url)
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps({"messages": messages}))
    expect(page.locator(".assistant .hljs-keyword").first).to_be_visible()
    reader = page.context.new_page()
    reader.goto(exported(page, tmp_path, "HTML page").as_uri())
    for scheme in ("light", "dark"):
        for each in (page, reader):
            each.emulate_media(color_scheme=scheme)
        here = page.evaluate(LOOKS, "#log")
        assert reader.evaluate(LOOKS, "body") == here
        assert len({look for name, _, look in here if name.startswith("hljs")}) > 5
        assert {"center", "right"} <= {look for _, _, look in here}


BAD_FILES = {                  # name -> (text, what is said of it)
    "half.json": ('{"messages": [', "is not valid JSON"),
    "number.json": ("5", "must be JSON"),
    "null.json": ("null", "must be JSON"),
    "lacks.json": ('{"messages": [{"role": "user"}, {"content": "x"}]}', "message 2 of chat 1 lacks"),
    "role.json": ('[{"role": "robot", "content": "x"}]', "message 1 of chat 1 lacks"),
    "type.json": ('{"conversations": [{"nodes": [{"id": 1, "role": "user", "content": {"a": 1}}]}]}', "message 1 of chat 1 lacks"),
    "ids.json": ('{"conversations": [{"nodes": [{"id": "a", "role": "user", "content": ""}, {"id": "a", "role": "user", "content": ""}]}]}',
                 "same id"),
    "chats.json": ('{"conversations": [{"nodes": []}, 7]}', "must be JSON"),
}


def test_a_file_without_a_chat_changes_nothing(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "keep me")
    expect_answered(page)
    for name, (text, reason) in BAD_FILES.items():
        (tmp_path / name).write_text(text)
        page.locator("#import-file").set_input_files(tmp_path / name)
        notice = page.get_by_role("log").locator(".notice").last
        expect(notice).to_contain_text(name)
        expect(notice).to_contain_text(reason)
        expect(said(questions(page))).to_have_text(["keep me"])
        expect(chats(page)).to_have_text(["keep me"])


def test_a_hostile_file_is_made_harmless(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "keep me")
    expect_answered(page)
    mine = page.evaluate("Chat.path.map(node => node.id)")
    before = page.evaluate("JSON.stringify(Settings.preferences)")
    nodes = [{"id": mine[0], "parent": "b", "role": "user", "content": "<img src=x onerror='window.hacked = 1'>", "conversation": "x"},
             {"id": "b", "parent": mine[0], "role": "assistant", "content": "[x](javascript:window.hacked=2)",
              "stream": {"id": "../../v1/cancel", "next": 0}, "timings": {"tokens_per_second": "<b>9</b>", "ttft_ms": 5},
              "attachments": [{"name": "x", "at": -1, "length": 9e9}], "parameters": {"temperature": "hot", "top_k": 5, "evil": 1}}]
    file = {"format": "chat_server chats", "version": 2, "__proto__": {"polluted": 1}, "preferences": {"server": "http://evil.example/"},
            "conversations": [{"title": "<script>window.hacked = 3</script>", "created": "yesterday", "leaf": "nowhere", "nodes": nodes,
                               "parameters": {"temperature": 99, "seed": 4, "stop": [1]}, "server": {"url": "http://evil.example"}}]}
    (tmp_path / "evil.json").write_text(json.dumps(file))
    imported(page, tmp_path / "evil.json")
    expect(said(questions(page))).to_have_text(["<img src=x onerror='window.hacked = 1'>"])
    expect(said(answers(page)).locator("a")).not_to_have_attribute("href", re.compile("."))
    expect(answers(page)).to_contain_text("first token after 5 ms")
    expect(button(page, "Send")).to_be_visible()                       # nothing streams
    assert page.evaluate("[window.hacked, ({}).polluted]") == [None, None]
    assert page.evaluate("JSON.stringify(Settings.preferences)") == before
    ask(page, "go on")
    expect_answered(page, 2)
    assert {name: value for name, value in stand_in.bodies[-1].items() if name in ("temperature", "seed", "stop", "top_k")} == {"seed": 4}
    chats(page).filter(has_text="keep me").click()
    expect(said(questions(page))).to_have_text(["keep me"])               # its nodes were not replaced
    assert page.evaluate("Chat.path.map(node => node.id)") == mine


def test_messages_and_version_1_can_be_imported(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "Hi!", "stats": {"tokens_per_second": 12.5}}]
    (tmp_path / "list.json").write_text(json.dumps(messages))
    old = {"format": "chat_server conversation", "version": 1, "settings": {"top_k": "7", "system": "Be quick."}, "messages": messages[1:]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    for name, system in (("list.json", "Be kind."), ("old.json", "Be quick.")):
        imported(page, tmp_path / name)
        expect(page.get_by_role("log").get_by_text(f"with 2 messages from {name}")).to_be_visible()
        expect(answers(page)).to_contain_text("13 tok/s")
        ask(page, "and?")
        expect_answered(page, 2)
        assert stand_in.bodies[-1]["messages"][0] == {"role": "system", "content": system}
    assert stand_in.bodies[-1]["top_k"] == 7


def said_by(role, text="", **more):
    """A message of ChatGPT's export."""
    return {"author": {"role": role}, "create_time": 1700000001.5, "content": {"content_type": "text", "parts": [text]}, "recipient": "all", "metadata": {}} | more


def test_chatgpt_s_export_comes_with_its_branches(page, stand_in, tmp_path):
    mapping = {"root": (None, None), "hidden": ("root", said_by("system")), "q": ("hidden", said_by("user", "What is a mill?")),
               "old": ("q", said_by("assistant", "A machine.", metadata={"model_slug": "gpt-4"})),
               "thought": ("q", said_by("assistant", content={"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "Mills grind."}]})),
               "call": ("thought", said_by("assistant", "search()", recipient="web")), "result": ("call", said_by("tool", "found")),
               "new": ("result", said_by("assistant", "It grinds **corn**.", create_time=1700000009, metadata={"model_slug": "gpt-5"})),
               "q2": ("new", said_by("user", content={"content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}, "And this?"]}))}
    chat = {"title": "Mills", "create_time": 1700000000.25, "update_time": 1700000100, "current_node": "q2",
            "mapping": {id: {"id": id, "parent": parent, "message": message, "children": []} for id, (parent, message) in mapping.items()}}
    (tmp_path / "conversations.json").write_text(json.dumps([chat, {"title": "empty", "mapping": {"root": {"id": "root", "parent": None, "message": None}}}]))
    open_page(page, stand_in.url)
    imported(page, tmp_path / "conversations.json")
    expect(page.get_by_role("log").get_by_text("Imported 1 chat with 4 messages")).to_be_visible()
    expect(said(questions(page))).to_have_text(["What is a mill?", "And this?"])
    expect(said(answers(page))).to_have_text("It grinds corn.")
    expect(answers(page)).to_contain_text("2/2")
    assert page.evaluate("(({title, created}) => [title, created])(Chat.current)") == ["Mills", 1700000000250]
    assert page.evaluate("(({model, reasoning}) => [model, reasoning])(Chat.path[1])") == ["gpt-5", "Mills grind."]
    button(page, "Previous answer").click()
    expect(said(answers(page))).to_have_text("A machine.")
    ask(page, "and?")
    expect_answered(page, 2)


def import_dialog(page, path):
    page.locator("#import-file").set_input_files(path)
    return page.get_by_role("dialog")


PIXEL = "data:image/png;base64,iVBORw0KGgo="
CITED = "Corn is ground.\ue200cite\ue202turn0search1\ue201 Twice.\ue200cite\ue202turn0search2\ue201 Thrice.【4†source】"


def test_the_import_of_chatgpt_says_what_it_leaves_out(page, stand_in, tmp_path):
    """Canvases, pictures, files, calls, and marks of sources without a link; a question that is only a picture stays one."""
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://file-1", "width": 5}
    mapping = {"q": (None, said_by("user", content={"content_type": "multimodal_text", "parts": [picture]}, metadata={"attachments": [{"name": "a.png", "mime_type": "image/png"}, {"name": "b.pdf", "mime_type": "application/pdf"}]})),
               "a": ("q", said_by("assistant", CITED, metadata={"model_slug": "gpt-5", "content_references": [{"matched_text": "\ue200cite\ue202turn0search1\ue201", "alt": "([Mills](https://example.org))"}, {"matched_text": " ", "alt": None}, 5]})),
               "made": ("a", said_by("assistant", recipient="canmore.create_textdoc", content={"content_type": "code", "text": '{"name": "x"}'})),
               "changed": ("made", said_by("assistant", recipient="canmore.update_textdoc")), "called": ("changed", said_by("assistant", "run()", recipient="python"))}
    chat = {"title": "Mills", "create_time": 1700000000, "current_node": "called", "mapping": {id: {"parent": parent, "message": message} for id, (parent, message) in mapping.items()}}
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("conversations-000.json", "[]")
        archive.writestr("conversations-001.json", json.dumps([chat]))
        archive.writestr("conversations-002.json", "")
    open_page(page, stand_in.url)
    dialog = import_dialog(page, tmp_path / "export.zip")
    expect(dialog).to_contain_text("1 picture, 1 file, 1 canvas, 2 marks of sources, 1 call of a tool.")
    expect(dialog).to_contain_text("The answers are of gpt-5.")
    button(dialog, "Import").click()
    expect(said(questions(page))).to_have_text(["(1 picture, 1 file)"])
    expect(said(answers(page))).to_have_text("Corn is ground.(Mills) Twice. Thrice.")
    assert page.evaluate("Chat.lastNode().content") == "Corn is ground.([Mills](https://example.org)) Twice. Thrice."


def test_an_export_of_claude_can_be_imported(page, stand_in, tmp_path):
    asked = {"uuid": "q", "sender": "human", "text": "Look", "content": [{"type": "text", "text": "Look"}], "created_at": "2026-01-02T03:04:05.5+00:00", "parent_message_uuid": "00000000-0000-4000-8000-000000000000",
             "attachments": [{"file_name": "a.txt", "extracted_content": "one\ntwo"}, {"file_name": "b.docx"}], "files": [{"file_name": "c.png"}]}
    said_then = {"uuid": "a", "sender": "assistant", "text": "", "created_at": "2026-01-02T03:04:06Z", "parent_message_uuid": "q", "content": [
        {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Two lines.", "citations": [{"url": "https://example.org"}]},
        {"type": "tool_use", "name": "artifacts", "input": {"command": "create", "content": "x"}}, {"type": "tool_use", "name": "artifacts", "input": {"command": "update"}},
        {"type": "tool_use", "name": "web_search", "input": {}}, {"type": "tool_result", "content": []}, 5]}
    other = said_then | {"uuid": "b", "created_at": "2026-01-02T03:04:07Z", "content": [{"type": "text", "text": "Others."}]}
    plain = {"uuid": "z", "name": "", "created_at": "2026-02-02T00:00:00Z", "chat_messages": [{"uuid": "1", "sender": "human", "text": "old form"}, {"uuid": "2", "sender": "assistant", "text": "Yes."}]}
    chat = {"uuid": "x", "name": "Lines", "created_at": "2026-01-02T03:04:05Z", "updated_at": "2026-01-02T03:05:00Z", "chat_messages": [asked, said_then, other], "current_leaf_message_uuid": "a"}
    (tmp_path / "conversations.json").write_text(json.dumps([chat, plain, {"uuid": "e", "name": "empty", "chat_messages": []}]))
    open_page(page, stand_in.url)
    dialog = import_dialog(page, tmp_path / "conversations.json")
    expect(dialog).to_contain_text("It contains 2 chats with 5 messages.")
    expect(dialog).to_contain_text("1 picture, 1 file, 1 canvas, 1 mark of a source, 1 call of a tool.")
    button(dialog, "Import").click()
    chats(page).filter(has_text="Lines").click()
    expect(questions(page)).to_contain_text("a.txt")
    expect(said(answers(page))).to_have_text("Two lines.")
    expect(answers(page)).to_contain_text("1/2")
    assert page.evaluate("(({created, reasoning}) => [created, reasoning])(Chat.lastNode())") == [1767323046000, "Hm."]
    assert page.evaluate("Tree.partsOf(Chat.path[0])") == {"text": "Look", "files": [{"name": "a.txt", "text": "one\ntwo"}]}
    chats(page).filter(has_text="old form").click()
    expect(said(answers(page))).to_have_text("Yes.")


def test_our_own_file_with_damaged_values_says_so(page, stand_in, tmp_path):
    nodes = [{"id": "a", "parent": None, "role": "user", "content": "q", "created": 1, "pictures": [{"name": 5}]}, {"id": "b", "parent": "a", "role": "assistant", "content": "x", "created": 2, "model": "far-away", "ids": "7", "note": {}}]
    (tmp_path / "mine.json").write_text(json.dumps({"format": "chat_server chats", "version": 2, "conversations": [{"title": "t", "created": 1, "updated": 2, "leaf": "b", "leftOut": {"pictures": 99}, "nodes": nodes}]}))
    open_page(page, stand_in.url)
    dialog = import_dialog(page, tmp_path / "mine.json")
    expect(dialog).to_contain_text("for it here: 3 damaged values.")
    expect(dialog).to_contain_text("The answers are of far-away.")


def test_an_export_of_open_webui_can_be_imported(page, stand_in, tmp_path):
    thoughts = '<details type="reasoning" done="true" duration="2">\n<summary>Thought for 2 seconds</summary>\n> Two\n> lines.\n</details>\n'
    messages = {"a": {"id": "a", "parentId": None, "role": "user", "content": "hello", "timestamp": 1700000000},
                "b": {"id": "b", "parentId": "a", "role": "assistant", "content": thoughts + "Hi.", "model": "llama3.2:1b", "timestamp": 1700000001},
                "c": {"id": "c", "parentId": "a", "role": "assistant", "content": "Good day.", "model": "qwen3", "timestamp": 1700000002, "sources": [{"source": {"name": "x"}}]},
                "d": {"id": "d", "parentId": "c", "role": "user", "content": "", "timestamp": 1700000003, "files": [
                    {"type": "image", "url": PIXEL}, {"type": "file", "name": "n.txt", "file": {"data": {"content": "words"}}}, {"type": "image", "url": "/api/v1/files/1/content"}, {"type": "collection", "name": "all"}]}}
    chat = {"id": "x", "title": "Greetings", "created_at": 1700000000, "updated_at": 1700000009, "pinned": True,
            "chat": {"params": {"system": "Be kind."}, "history": {"messages": messages, "currentId": "b"}, "messages": []}}
    bare = {"chat": {"title": "In a row", "timestamp": 1700000000123, "messages": [{"id": "1", "role": "user", "content": "one"}, {"id": "2", "role": "assistant", "content": "two"}]}}
    (tmp_path / "export.json").write_text(json.dumps([chat, bare]))
    open_page(page, stand_in.url)
    dialog = import_dialog(page, tmp_path / "export.json")
    expect(dialog).to_contain_text("1 picture, 1 file, 1 mark of a source.")
    button(dialog, "Import").click()
    expect(page.get_by_role("log").get_by_text("Imported 2 chats with 6 messages")).to_be_visible()
    expect(said(answers(page))).to_have_text("Hi.")
    assert page.evaluate("[...Chat.nodes.values()].filter(({pictures}) => pictures).map(Tree.partsOf)") == [{"text": "", "files": [{"name": "picture", "picture": PIXEL}, {"name": "n.txt", "text": "words"}]}]
    expect(answers(page)).to_contain_text("1/2")
    assert page.evaluate("(({reasoning, model}) => [reasoning, model])(Chat.lastNode())") == ["Two\nlines.", "llama3.2:1b"]
    assert page.evaluate("(({system, pinned, created}) => [system, pinned, created])(Chat.current)") == ["Be kind.", True, 1700000000000]
    chats(page).filter(has_text="In a row").click()
    expect(said(answers(page))).to_have_text("two")
    (tmp_path / "nothing.json").write_text(json.dumps([{"title": "x", "mapping": {}}]))
    page.locator("#import-file").set_input_files(tmp_path / "nothing.json")
    expect(page.get_by_role("log").get_by_text("nothing.json is not a conversation")).to_be_visible()


def test_only_chats_with_messages_are_exported(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    button(page, "Menu").click()
    expect(button(page, "Import")).to_be_visible()
    expect(button(page, "Export")).to_have_count(0)
    page.keyboard.press("Escape")
    for text in ("one", "two"):
        button(page, "New chat").click()
        ask(page, text)
        expect_answered(page)
    page.evaluate("Chat.deleteNode(Chat.path[0])")                      # the chat stays, without messages
    button(page, "Menu").click()
    button(page, "Export").click()
    expect(button(page, "All chats (JSON)")).to_be_visible()
    expect(button(page, "This chat (JSON)")).to_have_count(0)
    page.keyboard.press("Escape")
    path = exported(page, tmp_path, "All chats (JSON)")
    assert [chat["title"] for chat in json.loads(path.read_text())["conversations"]] == ["one"]


def test_a_title_follows_its_question_until_renamed(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "What is a mil?")
    expect_answered(page)
    for text, title in (("What is a mill?", "What is a mill?"), ("refuse this", "What is a mill?")):
        button(questions(page), "Edit").click()
        page.get_by_role("textbox", name="Edited text").fill(text)
        button(page, "Update").click()
        expect(chats(page)).to_have_text([title])
        expect(button(page, "Stop")).to_be_hidden()
    expect(page.get_by_role("alert")).to_contain_text("the limit is 8,000")
    expect(chats(page)).to_have_text(["What is a mill?"])
    button(questions(page), "Edit").click()
    page.get_by_role("textbox", name="Edited text").fill("refuse this")
    page.evaluate("""() => { const real = window.fetch; window.fetch = async (url, options) => {
        const response = await real(url, options);
        if (/completions/.test(url)) Chat.change(Chat.current, {title: "Mills"});           // before the page hears of the refusal
        return response;
    }; }""")
    button(page, "Update").click()
    expect(page.get_by_role("alert")).to_contain_text("the limit is 8,000")
    expect(chats(page)).to_have_text(["Mills"])
    button(questions(page), "Edit").click()
    page.get_by_role("textbox", name="Edited text").fill("And a windmill?")
    button(page, "Update").click()
    expect(said(answers(page))).to_contain_text("And a windmill?")
    expect(chats(page)).to_have_text(["Mills"])
