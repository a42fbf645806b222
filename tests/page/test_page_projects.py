"""Projects in the page: chats with a prompt, files and collections in common; and what is done with several chats at once."""

import json

import pytest

from browsing import (
    answers, ask, button, chats, expect, expect_accessible, expect_answered, menu, message_box, needs_browser, open_page, questions, reload,
    said, theme)
from real_server import server
from shared_chats import keep_and_join

pytestmark = needs_browser


def asked(page, text):
    button(page, "New chat").click()
    ask(page, text)
    expect_answered(page)


def row_of(page, text):
    return page.get_by_role("navigation", name="Chats").get_by_role("listitem").filter(has_text=text)


def group_of(page, name):
    return page.locator("[data-project]").filter(has=page.get_by_role("heading", name=name))


def project_menu(page, name, *names):
    heading = page.get_by_role("heading", name=name)
    button(heading, f"More: {name}").click()
    for each in names:
        button(page.get_by_role("group", name=f"More: {name}"), each).click()


def chat_menu(page, text, name):
    row = row_of(page, text)
    row.hover()
    button(row, "Move or select").click()
    page.get_by_role("group", name="Move or select").get_by_role("button", name=name, exact=True).click()


def make_project(page, name, prompt="", files=()):
    menu(page, "New project")
    dialog = page.get_by_role("dialog", name="New project")
    dialog.get_by_role("textbox", name="Name of the project").fill(name)
    dialog.get_by_role("textbox", name="What every chat of it tells the model first").fill(prompt)
    for file in files:
        with page.expect_file_chooser() as chooser:
            button(dialog, "Add files").click()
        chooser.value.set_files(file)
        expect(dialog.get_by_text(file["name"])).to_be_visible()
    button(dialog, "Save").click()
    expect(dialog).to_be_hidden()


def system_of(body):
    return [message["content"] for message in body["messages"] if message["role"] == "system"]


def test_its_chats_tell_the_model_its_prompt_and_files(page, stand_in, theme):
    page.emulate_media(color_scheme=theme)
    open_page(page, stand_in.url)
    make_project(page, "Boats", "Answer as a sailor.", [{"name": "ropes.txt", "mimeType": "text/plain", "buffer": b"A sheet is a rope."}])
    expect(page.get_by_role("heading", name="Boats")).to_be_visible()
    project_menu(page, "Boats", "New chat in this project")
    expect(page.locator("#asked-stores")).to_have_text("Boats")
    message_box(page).fill("/system Be brief.")
    message_box(page).press("Enter")
    ask(page, "What is a sheet?")
    expect_answered(page)
    body = next(body for body in reversed(stand_in.bodies) if body["messages"][-1]["content"] == "What is a sheet?")
    assert system_of(body) == ["Answer as a sailor.\n\nropes.txt:\n```txt\nA sheet is a rope.\n```\n\nBe brief."]
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["What is a sheet?"])
    asked(page, "Elsewhere")
    assert system_of(next(body for body in reversed(stand_in.bodies) if body["messages"][-1]["content"] == "Elsewhere")) == []
    expect_accessible(page, theme=theme)
    reload(page)
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["What is a sheet?"])


def test_chats_are_moved_by_menu_and_by_hand(page, stand_in):
    open_page(page, stand_in.url)
    for text in ("one", "two", "three"):
        asked(page, text)
    make_project(page, "Boats")
    make_project(page, "Attic")
    assert page.locator("#chats h2.project").all_inner_texts() == ["Attic", "Boats"]
    chat_menu(page, "one", "Boats")
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["one"])
    row_of(page, "two").drag_to(group_of(page, "Attic"))
    expect(group_of(page, "Attic").get_by_role("link")).to_have_text(["two"])
    row_of(page, "two").drag_to(group_of(page, "Boats"))
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["two", "one"])
    row_of(page, "two").drag_to(group_of(page, "Today"))
    expect(group_of(page, "Today").get_by_role("link")).to_have_text(["three", "two"])
    chat_menu(page, "one", "Out of the project")
    expect(group_of(page, "Today").get_by_role("link")).to_have_text(["three", "two", "one"])
    reload(page)
    expect(group_of(page, "Today").get_by_role("link")).to_have_text(["three", "two", "one"])
    expect(page.locator("#chats h2.project")).to_have_text(["Attic", "Boats"])


def test_several_chats_are_moved_exported_and_deleted_at_once(page, stand_in):
    open_page(page, stand_in.url)
    for text in ("one", "two", "three", "four"):
        asked(page, text)
    make_project(page, "Boats")
    chat_menu(page, "one", "Select several")
    for text in ("two", "three"):
        row_of(page, text).get_by_role("link").click()
    bar = page.locator("#chosen")
    expect(bar).to_contain_text("3 selected")
    button(bar, "Move").click()
    page.get_by_role("group", name="Move").get_by_role("button", name="Boats").click()
    expect(bar).to_be_hidden()
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["three", "two", "one"])
    chat_menu(page, "two", "Select several")
    row_of(page, "one").get_by_role("checkbox").check()
    with page.expect_download() as download:
        button(bar, "Export the selected").click()
    file = json.loads(download.value.path().read_text())
    assert [each["title"] for each in file["conversations"]] == ["two", "one"] or [each["title"] for each in file["conversations"]] == ["one", "two"]
    assert [each["name"] for each in file["projects"]] == ["Boats"] and "prompts" not in file
    chat_menu(page, "two", "Select several")
    button(bar, "Select all that are listed").click()
    expect(bar).to_contain_text("4 selected")
    row_of(page, "four").get_by_role("link").click()
    button(bar, "Delete the selected").click()
    expect(chats(page)).to_have_text(["four"])
    button(page, "Undo").click()
    expect(chats(page)).to_have_count(4)


@pytest.mark.parametrize("with_chats", [False, True])
def test_a_deleted_project_s_chats_stay_or_go(page, stand_in, with_chats):
    open_page(page, stand_in.url)
    make_project(page, "Boats", "Answer as a sailor.")
    project_menu(page, "Boats", "New chat in this project")
    ask(page, "inside")
    expect_answered(page)
    asked(page, "outside")
    project_menu(page, "Boats", "Delete the project")
    dialog = page.get_by_role("dialog", name="Delete the project “Boats”?")
    if with_chats:
        dialog.get_by_role("checkbox", name="Delete its 1 chat too").check()
    button(dialog, "Delete").click()
    expect(page.get_by_role("heading", name="Boats")).to_have_count(0)
    expect(chats(page)).to_have_text(["outside"] if with_chats else ["outside", "inside"])
    button(page, "Undo").click()
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["inside"])
    project_menu(page, "Boats", "Delete the project")
    if with_chats:
        dialog.get_by_role("checkbox", name="Delete its 1 chat too").check()
    button(dialog, "Delete").click()
    reload(page)
    expect(chats(page)).to_have_text(["outside"] if with_chats else ["outside", "inside"])


def test_projects_come_with_files_of_chats(page, stand_in):
    open_page(page, stand_in.url)
    make_project(page, "Boats", "Answer as a sailor.", [{"name": "ropes.txt", "mimeType": "text/plain", "buffer": b"A sheet."}])
    project_menu(page, "Boats", "New chat in this project")
    ask(page, "inside")
    expect_answered(page)
    with page.expect_download() as download:
        menu(page, "Export", "All chats (JSON)")
    path = download.value.path()
    project_menu(page, "Boats", "Delete the project")
    dialog = page.get_by_role("dialog", name="Delete the project “Boats”?")
    dialog.get_by_role("checkbox").check()
    button(dialog, "Delete").click()
    expect(chats(page)).to_have_count(0)
    page.locator("#import-file").set_input_files({"name": "chats.json", "mimeType": "application/json", "buffer": path.read_bytes()})
    button(page.get_by_role("dialog"), "Import").click()
    expect(group_of(page, "Boats").get_by_role("link")).to_have_text(["inside"])
    project_menu(page, "Boats", "Edit the project")
    dialog = page.get_by_role("dialog", name="Edit the project")
    expect(dialog.get_by_role("textbox", name="What every chat of it tells the model first")).to_have_value("Answer as a sailor.")
    expect(dialog.get_by_text("ropes.txt")).to_be_visible()


def test_a_real_model_answers_from_a_project_s_file(page, default_model_path):
    file = {"name": "mill.md", "mimeType": "text/markdown", "buffer": b"The steam engine of the mill is called Adelaide."}
    with server(default_model_path, "--context-length", 1024, "--temperature", 0) as (_, url):
        open_page(page, url)
        make_project(page, "Mill", "Answer in one sentence.", [file])
        project_menu(page, "Mill", "New chat in this project")
        ask(page, "What is the steam engine of the mill called?")
        expect_answered(page)
        expect(said(answers(page).last)).to_contain_text("Adelaide")
        button(page, "New chat").click()
        ask(page, "What is the capital of France?")
        expect_answered(page)
        expect(said(answers(page).last)).to_contain_text("Paris")


@pytest.fixture
def devices(browser, keeping_server):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        open_page(page, keeping_server.url + "/")
    yield pages
    for context in contexts:
        context.close()


def test_projects_and_prompts_are_on_all_devices(devices):
    phone, laptop = devices
    make_project(phone, "Boats", "Answer as a sailor.")
    project_menu(phone, "Boats", "New chat in this project")
    ask(phone, "inside")
    expect_answered(phone)
    phone.evaluate("Prompts.keep([{name: 'Poem', text: 'Write a poem', starter: true}])")
    keep_and_join(phone, laptop)
    expect(group_of(laptop, "Boats").get_by_role("link")).to_have_text(["inside"])
    button(laptop, "New chat").click()
    expect(button(laptop, "Poem")).to_be_visible()
    project_menu(laptop, "Boats", "Edit the project")
    dialog = laptop.get_by_role("dialog", name="Edit the project")
    dialog.get_by_role("textbox", name="Name of the project").fill("Ships")
    button(dialog, "Save").click()
    expect(group_of(phone, "Ships").get_by_role("link")).to_have_text(["inside"])
    project_menu(phone, "Ships", "Delete the project")
    button(phone.get_by_role("dialog", name="Delete the project “Ships”?"), "Delete").click()
    button(phone, "Dismiss").click()
    expect(laptop.get_by_role("heading", name="Ships")).to_have_count(0)
    expect(chats(laptop)).to_have_text(["inside"])
    laptop.evaluate("Prompts.keep([])")
    button(phone, "New chat").click()
    expect(button(phone, "Poem")).to_have_count(0)


def test_seven_tabs_hear_of_it_and_a_temporary_chat_is_in_one(devices):
    phone, _ = devices
    context = phone.context
    tabs = [phone, *(context.new_page() for _ in range(6))]
    for tab in tabs[1:]:
        open_page(tab, phone.url)
    keep_and_join(phone)
    make_project(tabs[3], "Boats")
    project_menu(tabs[3], "Boats", "New chat in this project")
    ask(tabs[3], "inside")
    expect_answered(tabs[3])
    menu(tabs[5], "Temporary chat")
    ask(tabs[5], "whispered")
    expect_answered(tabs[5])
    for tab in tabs:
        expect(group_of(tab, "Boats").get_by_role("link")).to_have_text(["inside"])
        expect(chats(tab)).to_have_count(2 if tab is tabs[5] else 1)
    project_menu(tabs[6], "Boats", "Delete the project")
    button(tabs[6].get_by_role("dialog", name="Delete the project “Boats”?"), "Delete").click()
    for tab in tabs:
        expect(tab.get_by_role("heading", name="Boats")).to_have_count(0)


WIDE = """() => [document.documentElement, ...document.querySelectorAll("main, nav, dialog[open], [popover]:popover-open")]
    .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => `${each.tagName}#${each.id}: ${each.scrollWidth} > ${each.clientWidth}`)"""
LONG = "Verylongnamewithoutaspace" * 8
@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_make_nothing_wider(page, stand_in, width):
    page.set_viewport_size({"width": width, "height": 800})
    open_page(page, stand_in.url)
    page.evaluate("""name => {
        Store.change("projects", "a".repeat(32), {id: "a".repeat(32), name, created: 1, prompt: name, files: [{name: `${name}.txt`, text: "x"}], stores: [{id: "vs", name}]});
        Store.change("prompts", "b".repeat(32), {id: "b".repeat(32), name, created: 1, text: name, starter: true});
    }""", LONG)
    reload(page)
    assert page.evaluate(WIDE) == []
    page.evaluate("name => { Chat.change(Chat.current, {stores: [{id: 'vs', name}]}); Projects.move([Chat.current], 'a'.repeat(32)); }", LONG)
    ask(page, LONG)
    expect_answered(page)
    page.evaluate("name => Chat.offerUndo(name, () => {})", LONG)
    assert page.evaluate(WIDE) == []
    if width < 800:
        button(page, "Show or hide chats").click()
        assert page.evaluate(WIDE) == []
    for entry, shown in (("Edit the project", "dialog"), ("Delete the project", "alertdialog")):
        project_menu(page, LONG, entry)
        expect(page.locator("dialog[open]")).to_be_visible()
        assert page.evaluate(WIDE) == []
        page.keyboard.press("Escape")


FIELDS = """() => [...document.querySelectorAll("dialog input")].filter(({type}) => ["text", "password", "search", "url", "number", "email"].includes(type)).map(field => [field.id || field.getAttribute("aria-label") || field.type,
    field.closest("[data-enter]") ? document.getElementById(field.closest("[data-enter]").dataset.enter)?.id ?? null : field.form.querySelector("button:not([type=button])").className])"""


def test_enter_in_a_field_of_any_dialog_does_its_main_action(page, stand_in):
    """It presses the button that the field is for, or the dialog's main one; never Cancel."""
    open_page(page, stand_in.url)
    menu(page, "New project")       # whose dialog is that of all questions
    found = dict(page.evaluate(FIELDS))
    assert {"preset-name", "prompt-name", "store-name", "server-key", "server-url"} <= found.keys() and len(found) >= 6
    assert {name: main for name, main in found.items() if main not in ("primary", "save-preset", "save-prompt", "new-store", "start-compare", "ask-yes")} == {}
    field = page.get_by_role("textbox", name="Name of the project")
    field.fill("Boats")
    field.press("Enter")
    expect(page.get_by_role("heading", name="Boats")).to_be_visible()
    expect(page.locator("#asked-stores")).to_have_text("Boats")       # a new one is open
    menu(page, "Prompts")
    page.get_by_role("textbox", name="Text of the prompt").fill("Be brief.")
    page.get_by_role("textbox", name="Name of the prompt").fill("short")
    page.get_by_role("textbox", name="Name of the prompt").press("Enter")
    expect(page.get_by_role("dialog", name="Prompts").locator("#prompts li")).to_contain_text("short")
