"""Everything around the conversation, in a real browser: names, accessibility, looks, composer, settings,
keys, servers."""

import json
import re
import urllib.request

import pytest

from browsing import (ROOT, answers, ask, button, chats, command, expect, expect_accessible, expect_answered, fake_front, menu, message_box, more,
                      needs_browser, open_page, questions, reload, said, settled, violations, visitor)
from chatlm.common.config import ApiKey
from nightly import by_day
from page_server import StandIn

pytestmark = needs_browser


# names and accessibility ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_promised_accessible_names_are_there(page, stand_in):
    open_page(page, stand_in.url)
    expect(page.get_by_role("log", name="Conversation", exact=True)).to_be_visible()
    expect(page.get_by_role("navigation", name="Chats").get_by_role("textbox", name="Search chats", exact=True)).to_be_visible()
    for name in ("Send", "New chat", "Settings"):
        expect(button(page, name)).to_have_count(1)
    ask(page, "markdown")
    expect_answered(page)
    log = page.get_by_role("log")
    for name in ("You", "Assistant"):
        expect(log.get_by_role("article", name=name, exact=True)).to_have_count(1)
    for name, count in (("Edit", 1), ("Regenerate", 1), ("Copy", 2), ("Copy code", 2)):
        expect(button(log, name)).to_have_count(count)
    for name in ("Rename", "Delete"):
        expect(button(page.get_by_role("navigation", name="Chats"), name)).to_have_count(1)
    button(page, "Menu").click()
    for name in ("Export", "Import", "Server", "Theme"):
        expect(button(page, name)).to_have_count(1)
    button(page, "Export").click()
    for name in ("This chat (JSON)", "All chats (JSON)", "Markdown", "HTML page"):
        expect(button(page, name)).to_have_count(1)
    page.keyboard.press("Escape")
    ask(page, "story")
    expect(button(page, "Stop")).to_be_visible()
    button(page, "Stop").click()
    expect(button(log, "Continue")).to_be_visible()
    button(log, "Regenerate").last.click()
    button(page, "Stop").click()
    expect(answers(page).last).to_contain_text("2/2")
    expect(button(log, "Previous answer")).to_be_enabled()
    expect(button(log, "Next answer")).to_be_disabled()


def test_a_screen_reader_hears_start_and_finish(page, stand_in):
    open_page(page, stand_in.url)
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "off")
    ask(page, "held markdown")
    expect(page.locator("#announcer")).to_have_text("Answering")
    stand_in.release()
    expect(page.locator("#announcer")).to_have_text("Answer finished")


SCREENS = {
    "empty": lambda page: None,
    "conversation": lambda page: (ask(page, "markdown"), expect_answered(page)),
    "thinking": lambda page: (ask(page, "thoughts"), expect(page.get_by_text("think about")).to_be_visible()),
    "error": lambda page: (ask(page, "broken"), expect(page.get_by_role("alert")).to_be_visible()),
    "refused": lambda page: (ask(page, "refuse"), expect(page.get_by_role("alert")).to_be_visible()),
    "editing": lambda page: (ask(page, "one"), expect_answered(page), button(page, "Edit").click()),
    "answers": lambda page: (ask(page, "one"), expect_answered(page), button(page, "Regenerate").click(),
                             expect(answers(page)).to_contain_text("2/2")),
    "notice": lambda page: command(page, "/help"),
    "files": lambda page: (attach(page, "notes.py", "x = 1\n"), message_box(page).fill("look"), button(page, "Send").click(),
                           expect_answered(page), page.get_by_text("notes.py", exact=True).click(), attach(page, "more.txt", "words")),
    "deleted": lambda page: (ask(page, "one"), expect_answered(page), more(answers(page), "Delete from here on")),
    "menu": lambda page: button(page, "Menu").click(),
    "settings": lambda page: (button(page, "Settings").click(), page.get_by_text("How the model's template").click()),
    "server": lambda page: menu(page, "Server"),
    "keys": lambda page: menu(page, "Keyboard shortcuts"),
    "status": lambda page: menu(page, "Server status"),
    "search": lambda page: (ask(page, "one"), expect_answered(page), page.get_by_role("textbox", name="Search chats").fill("nowhere"),
                            expect(page.get_by_text("No chat contains all")).to_be_visible()),
}


def attach(page, name, text):
    page.locator("#files-picker").set_input_files({"name": name, "mimeType": "text/plain", "buffer": text.encode()})
    expect(button(page, f"Remove {name}")).to_be_visible()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_screen(browser, stand_in, scheme):
    with visitor(browser, color_scheme=scheme) as page:
        for name, reach in SCREENS.items():
            page.goto("about:blank")
            page.goto(stand_in.url)
            open_page(page, stand_in.url)
            button(page, "New chat").click()
            reach(page)
            assert violations(page) == [], name
            stand_in.loop.call_soon_threadsafe(lambda: stand_in.held and stand_in.held.set())


def test_axe_finds_nothing_on_a_phone_or_while_loading(browser, stand_in):
    with visitor(browser, viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True) as page:
        open_page(page, stand_in.url)
        ask(page, "markdown")
        expect_answered(page)
        assert violations(page) == []
        button(page, "Show or hide chats").tap()
        expect(chats(page)).to_be_visible()
        assert violations(page) == []
        stand_in.loading = {"stage": "reading weights", "fraction": 0.43}
        page.evaluate("history.replaceState(null, '', location.pathname); localStorage.clear()")
        page.goto(stand_in.url)
        expect(page.get_by_role("progressbar")).to_be_visible()
        assert violations(page) == []


# looks ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width", by_day([320, 390, 768, 1280], 320))
def test_nothing_sticks_out_of_the_window(page, stand_in, width):
    page.set_viewport_size({"width": width, "height": 700})
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    for name in ("Settings", "Menu", "Send", "Show or hide chats"):
        expect(button(page, name)).to_be_in_viewport(ratio=1)
    wide = "() => [...document.querySelectorAll('header, main, footer, article, article *')].filter(node => node.getBoundingClientRect().right"\
        " > innerWidth + 1 && !node.closest('pre, .table, math')).map(node => node.outerHTML.slice(0, 80))"
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    button(page, "Settings").click()
    expect(button(page, "Done")).to_be_in_viewport(ratio=1)
    button(page, "Done").click()
    button(page, "Menu").click()
    expect(button(page, "Keyboard shortcuts")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("width", by_day([390, 1280], 1280))
def test_what_belongs_together_stands_together(page, stand_in, width):
    page.set_viewport_size({"width": width, "height": 700})
    open_page(page, stand_in.url)
    for count in (1, 2):
        ask(page, "markdown")
        expect_answered(page, count)
    gaps = page.evaluate("""() => {
        const box = node => node.getBoundingClientRect(), [first, answer, second] = document.querySelectorAll(".turn");
        const last = answer.querySelector(".body").lastElementChild, [item] = answer.querySelectorAll("li > p");
        return {below: box(answer).top - box(first.querySelector(".body")).bottom,
                above: box(second).top - box(answer.querySelector(".speed")).bottom,
                inside: box(answer.querySelector(".body")).bottom - box(last).bottom,
                nested: box(answer.querySelector("li ul")).top - box(answer.querySelector("li:has(ul) > p")).bottom,
                line: parseFloat(getComputedStyle(answer.querySelector("pre")).lineHeight)};
    }""")
    assert gaps["below"] < 40 and gaps["inside"] == 0 and gaps["nested"] < 8 and gaps["line"] < 23, gaps
    assert width < 640 or gaps["below"] < gaps["above"] + 10, gaps
    button(page, "Settings").click()
    tops = page.locator("#settings-dialog > form > .row > button").evaluate_all("buttons => buttons.map(each => each.offsetTop + each.offsetHeight / 2)")
    assert max(tops) - min(tops) < 4
    button(page, "Done").click()
    if width < 860:
        button(page, "Show or hide chats").click()
    widths = page.evaluate("['#search', '#chats li'].map(each => document.querySelector(each).getBoundingClientRect().right)")
    assert abs(widths[0] - widths[1]) < 1


def test_the_theme_is_the_system_s_until_chosen(browser, stand_in):
    with visitor(browser, color_scheme="dark") as page:
        open_page(page, stand_in.url)
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        menu(page, "Theme")
        expect(page.locator("#announcer")).to_have_text("Theme: Light")
        light = page.evaluate(paper)
        assert light != dark
        page.goto(stand_in.url)
        assert page.evaluate(paper) == light
        menu(page, "Theme")
        menu(page, "Theme")
        page.emulate_media(color_scheme="light")
        assert page.evaluate(paper) == light and page.locator("html").get_attribute("data-theme") == ""


def icon_of(turn, name):
    """Is the icon of a turn's button painted?"""
    return turn.get_by_role("button", name=name, exact=True).evaluate("node => getComputedStyle(node, '::before').visibility")


def test_on_a_phone_the_chats_are_a_drawer(browser, stand_in):
    with visitor(browser, viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True) as page:
        open_page(page, stand_in.url)
        expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
        message_box(page).fill("one")
        message_box(page).press("Enter")
        expect(message_box(page)).to_have_value("one\n")            # Enter is a new line here
        button(page, "Send").tap()
        expect_answered(page)
        button(page, "Show or hide chats").tap()
        expect(chats(page)).to_have_text(["one"])
        expect(button(page.get_by_role("listitem"), "Delete")).to_be_in_viewport(ratio=1)
        button(page, "New chat").tap()
        expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
        expect(page.get_by_role("article")).to_have_count(0)
        button(page, "Show or hide chats").tap()
        chats(page).tap()
        expect(said(questions(page))).to_have_text(["one"])
        button(page, "Show or hide chats").tap()
        page.keyboard.press("Escape")
        expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
        expect(button(answers(page), "Copy")).to_be_visible()
        ask(page, "two")
        expect_answered(page, 2)            # also the buttons of turns before the last, which a mouse would have to find
        assert icon_of(answers(page).first, "Copy") == icon_of(answers(page).last, "Copy") == "visible"


# typing and scrolling -------------------------------------------------------------------------------------------------

def test_enter_for_an_input_method_does_not_send(page, stand_in):
    open_page(page, stand_in.url)
    message_box(page).focus()
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Enter", "code": "Enter",
                                             "windowsVirtualKeyCode": 229})
    message_box(page).evaluate("field => field.dispatchEvent(new KeyboardEvent('keydown', "
                               "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))")
    keyboard.send("Input.insertText", {"text": "日本"})
    expect(message_box(page)).to_have_value("日本")
    expect(page.get_by_role("article")).to_have_count(0)
    message_box(page).press("Enter")
    expect(said(questions(page))).to_have_text(["日本"])


def test_the_log_follows_its_end_until_scrolled_up(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "paragraphs")
    expect(page.get_by_text("Paragraph 39.")).to_be_in_viewport()
    page.get_by_role("log").hover()
    page.mouse.wheel(0, -60)
    expect(button(page, "Jump to latest")).to_be_visible()
    top = page.get_by_role("log").evaluate("log => log.scrollTop")
    stand_in.release()
    expect_answered(page)
    assert page.get_by_role("log").evaluate("log => log.scrollTop") == top
    expect(page.get_by_text("Paragraph 79.")).not_to_be_in_viewport()
    button(page, "Jump to latest").click()
    expect(page.get_by_text("Paragraph 79.")).to_be_in_viewport()
    expect(button(page, "Jump to latest")).to_be_hidden()


def test_arrow_up_brings_back_what_was_asked(page, stand_in):
    open_page(page, stand_in.url)
    for number, text in enumerate(("one", "two"), 1):
        ask(page, text)
        expect_answered(page, number)
    box = message_box(page)
    for key, text in (("ArrowUp", "two"), ("ArrowUp", "one"), ("ArrowUp", "one"), ("ArrowDown", "two"), ("ArrowDown", "")):
        box.press(key)
        expect(box).to_have_value(text)
    box.fill("typed")
    box.press("ArrowUp")
    expect(box).to_have_value("typed")


def test_files_and_long_pastes_are_chips(page, stand_in):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(page, stand_in.url)
    attach(page, "fence.md", "```\ncode\n```\n")
    page.evaluate("navigator.clipboard.writeText('pasted words '.repeat(500))")
    message_box(page).press("Control+v")
    expect(button(page, "Remove Pasted text 2.txt")).to_be_visible()
    expect(message_box(page)).to_have_value("")
    page.locator("#files-picker").set_input_files({"name": "cat.mp3", "mimeType": "audio/mpeg", "buffer": b"\x89ID3\x00\xff"})
    expect(page.get_by_role("alert")).to_have_text("cat.mp3 is neither a text file nor a document (PDF, DOCX, PPTX, XLSX, ODT, ODS, ODP, EPUB, HTML).")
    attach(page, "gone.txt", "not this one")
    button(page, "Remove gone.txt").click()
    settled(page)
    reload(page)                                        # they are part of the draft
    expect(button(page, "Remove fence.md")).to_be_visible()
    message_box(page).fill("What is this?")
    message_box(page).press("Enter")
    expect_answered(page)
    content = stand_in.bodies[-1]["messages"][-1]["content"]
    assert content == "What is this?\n\nfence.md:\n````md\n```\ncode\n```\n````\n\nPasted text 2.txt:\n```txt\n" + "pasted words " * 500 + "\n```"
    expect(questions(page)).to_contain_text(re.compile("^What is this\\?"))
    expect(questions(page).locator("details")).to_have_count(2)
    expect(questions(page).locator("pre")).to_have_count(0)            # folded
    questions(page).get_by_text("fence.md").click()
    expect(questions(page).locator("pre")).to_contain_text("```\ncode\n```")
    button(page, "Edit").click()
    expect(page.get_by_role("textbox", name="Edited text")).to_have_value("What is this?")
    page.get_by_role("textbox", name="Edited text").fill("And this?")
    button(page, "Update").click()
    expect(answers(page)).to_contain_text("You said: And this?")
    assert stand_in.bodies[-1]["messages"][-1]["content"] == content.replace("What is", "And")


def test_what_is_too_long_is_said_before_sending(page, stand_in):
    stand_in.model["context_length"] = 100
    open_page(page, stand_in.url)
    ask(page, "markdown")                                       # 12 + 99 tokens
    expect_answered(page)
    expect(page.locator("#context")).to_have_text("111 of 100 tokens")
    expect(page.locator("#warning")).to_have_text("The context is full: the oldest messages will be left out.")
    button(page, "New chat").click()
    expect(page.locator("#warning")).to_be_empty()
    message_box(page).fill("word " * 60)
    expect(page.locator("#context")).to_have_text("0 + 60 of 100 tokens")
    message_box(page).fill("word " * 120)
    expect(page.locator("#warning")).to_contain_text("This message has 122 tokens, but the model's limit is 100")
    expect(page.locator("#gauge")).to_be_hidden()
    message_box(page).fill("refuse " + "word " * 120)
    expect(page.locator("#warning")).to_contain_text("This message has 123 tokens")
    message_box(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the limit is 8,000")           # one of the two, not both
    expect(page.locator("#warning")).to_be_empty()


# commands, settings, keys ---------------------------------------------------------------------------------------------

def test_settings_and_commands_reach_the_server(page, stand_in):
    stand_in.model["defaults"] = {"temperature": 0.8, "top_k": 50}
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page, 1)
    # nothing but the command
    assert set(stand_in.bodies[0]) == {"messages", "resumable", "truncate", "progress", "stream", "stream_options", "stop_on_repetition"}
    command(page, "/topk 7")
    expect(page.get_by_role("log").get_by_text("Top-k is now 7.")).to_be_visible()
    button(page, "Settings").click()
    temperature = page.get_by_role("spinbutton", name="Temperature")
    expect(temperature).to_have_attribute("placeholder", "0.8")
    expect(page.get_by_role("spinbutton", name="Top-k")).to_have_value("7")
    expect(page.get_by_role("spinbutton", name="Max tokens")).to_have_attribute("placeholder", "rest of context")
    temperature.fill("9")                                       # is not taken
    temperature.fill("0.25")
    page.get_by_role("spinbutton", name="Min-p").fill("0.1")
    page.get_by_role("textbox", name="Stop strings").fill("END\nSTOP")
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    page.get_by_text("How the model's template").click()
    expect(page.locator("#template")).to_have_text("<|system|>Be a stand-in.<|system|>Be brief.<|user|>…")
    page.get_by_role("textbox", name="System prompt").fill("")
    expect(page.locator("#template")).to_have_text("<|system|>Be a stand-in.<|user|>…")
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    button(page, "Done").click()
    ask(page, "two")
    expect_answered(page, 2)
    body = stand_in.bodies[1]
    assert (body["top_k"], body["temperature"], body["min_p"], body["stop"]) == (7, 0.25, 0.1, ["END", "STOP"])
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    command(page, "/temperature")
    command(page, "/system Be long.")
    command(page, "/seed 5")
    ask(page, "three")
    expect_answered(page, 3)
    body = stand_in.bodies[2]
    assert "temperature" not in body and body["seed"] == 5 and body["messages"][0]["content"] == "Be long."
    command(page, "/help")
    expect(page.get_by_role("log").get_by_text("/temperature N")).to_be_visible()
    command(page, "/clear")
    expect(page.get_by_role("article")).to_have_count(0)
    ask(page, "hello")                                          # another chat has its own
    expect_answered(page)
    assert "top_k" not in stand_in.bodies[3] and len(stand_in.bodies[3]["messages"]) == 1


def test_a_wrong_command_stays_in_the_composer(page, stand_in):
    open_page(page, stand_in.url)
    wrong = [("/temprature 1", "There is no command /temprature."), ("/etc/passwd is what?", "no command /etc/passwd"),
             ("/topk many", "takes a number from 0 to 2147483647"), ("/temperature 3", "takes a number"), ("/topk 1.5", "takes a number"),
             ("/constructor", "no command /constructor")]
    for count, (text, reason) in enumerate(wrong, 1):
        command(page, text)
        expect(page.get_by_role("alert")).to_contain_text(reason)
        expect(message_box(page)).to_have_value(text)
        message_box(page).fill("/" + text)
        expect(page.get_by_role("alert")).to_have_count(0)
        message_box(page).press("Enter")
        expect(said(questions(page)).last).to_have_text(text)           # // sends a slash
        expect_answered(page, count)
        assert stand_in.bodies[-1]["messages"][-1]["content"] == text


def test_settings_stand_beside_the_chat_and_follow_it(page, stand_in, theme):
    stand_in.model["defaults"] = {"temperature": 0.8}
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    button(page, "Settings").click()
    dialog, field = page.get_by_role("dialog", name="Settings"), page.get_by_role("spinbutton", name="Temperature")
    expect(button(page, "Settings")).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#about-temperature")).to_have_text("How random the answer is; 0 = greedy.")
    expect(dialog.get_by_text("Use for new chats: they begin with what is set here")).to_have_count(1)
    slider = dialog.locator(".parameter", has_text="Temperature").locator("[type=range]")
    assert slider.input_value() == "0.8" and field.input_value() == ""          # it stands at the default
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    expect(field).to_have_value("2")
    expect(page.locator("#changed")).to_contain_text("temperature 2")           # while the settings are open
    field.press("ArrowDown")
    expect(field).to_have_value("1.95")
    expect(slider).to_have_js_property("value", "1.95")
    field.fill("3")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#about-temperature")).to_have_text("This must be a number from 0 to 2.")
    expect(page.locator("#changed")).to_be_hidden()
    command(page, "/temperature 0.5")                                           # the chat can be used
    expect(field).to_have_value("0.5")
    expect(page.locator("#about-temperature")).to_have_text("How random the answer is; 0 = greedy.")
    expect_accessible(page)
    button(page, "New chat").click()
    expect(field).to_have_value("")
    ask(page, "two")
    expect_answered(page)
    assert "temperature" not in stand_in.bodies[-1]
    chats(page).last.click()
    expect(field).to_have_value("0.5")
    button(page, "Temperature: back to the default").click()
    expect(field).to_be_focused()
    expect(field).to_have_value("")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(button(page, "Settings")).to_have_attribute("aria-expanded", "false")
    button(page, "Settings").click()
    page.set_viewport_size({"width": 700, "height": 700})                       # over the chat, where there is no room beside it
    expect(dialog).to_be_visible()
    expect(page.locator("#settings-dialog:modal")).to_have_count(1)
    expect_accessible(page, theme=theme)
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_slider_stays_within_its_parameter(opened_page):
    wrong = opened_page.evaluate("""() => Parameters.all.filter(({slider, min, max}) => slider && !(min <= slider[0] && slider[0] < slider[1] && slider[1] <= max && slider[2] > 0))
        .map(({name}) => name)""")
    without = opened_page.evaluate("Parameters.all.filter(({slider}) => !slider).map(({name}) => name)")
    assert wrong == [] and without == ["reasoning_effort", "thinking_budget", "seed"]


def test_thinking_commands_need_a_thinking_model(page, stand_in):
    stand_in.model["capabilities"] |= {"reasoning": False}
    open_page(page, stand_in.url)
    message_box(page).fill("/")
    expect(page.get_by_role("option", name="/temperature")).to_be_visible()
    assert page.get_by_role("option").evaluate_all("all => all.filter(each => /^.(effort|budget)/.test(each.textContent)).length") == 0
    stand_in.model["capabilities"] |= {"reasoning": True}
    page.reload()
    message_box(page).fill("/")
    expect(page.get_by_role("option", name="/effort")).to_be_visible()


@pytest.mark.slow
def test_presets_and_defaults_for_new_chats(page, stand_in):
    open_page(page, stand_in.url)
    button(page, "Settings").click()
    page.get_by_role("textbox", name="System prompt").fill("Talk like a pirate.")
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    page.get_by_role("textbox", name="Name of the preset").fill("Pirate")
    page.get_by_role("textbox", name="Name of the preset").press("Enter")
    expect(page.get_by_role("combobox", name="Preset")).to_have_value("Pirate")
    page.get_by_role("combobox", name="Preset").select_option("Repeatable")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("0")
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value("Talk like a pirate.")
    button(page, "Defaults").click()
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value("")
    page.get_by_role("combobox", name="Preset").select_option("Pirate")
    button(page, "Use for new chats").click()
    button(page, "Done").click()
    settled(page)
    reload(page)
    button(page, "New chat").click()
    ask(page, "hello")
    expect_answered(page)
    assert stand_in.bodies[0]["temperature"] == 1.5 and stand_in.bodies[0]["messages"][0]["content"] == "Talk like a pirate."
    button(page, "Settings").click()
    page.get_by_role("combobox", name="Preset").select_option("Pirate")
    button(page, "Delete preset").click()
    expect(page.get_by_role("option", name="Pirate")).to_have_count(0)


def test_the_keyboard_opens_what_the_mouse_opens(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    page.keyboard.press("Control+k")
    expect(page.get_by_role("textbox", name="Search chats")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("ArrowDown")
    expect(chats(page)).to_be_focused()
    page.keyboard.press("Control+Shift+o")
    expect(page.get_by_role("article")).to_have_count(0)
    expect(message_box(page)).to_be_focused()
    page.keyboard.type("?")                                     # is text here
    expect(message_box(page)).to_have_value("?")
    button(page, "Menu").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(button(page, "Export")).to_be_focused()
    for key, name in (("ArrowDown", "Import"), ("End", "Delete all chats"), ("ArrowDown", "Export"), ("ArrowUp", "Delete all chats"), ("ArrowUp", "Keyboard shortcuts")):
        page.keyboard.press(key)
        expect(button(page, name)).to_be_focused()
    page.keyboard.press("Escape")
    expect(button(page, "Menu")).to_be_focused()
    expect(button(page, "Export")).to_have_count(0)


def test_a_click_on_a_message_does_nothing_unasked(page, stand_in):
    page.add_init_script("""localStorage.setItem("chat_server preferences", JSON.stringify({clicks: true}))""")      # as it used to be
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    said(answers(page)).click()
    said(questions(page)).click()
    expect(page.get_by_role("textbox", name="Edited text")).to_have_count(0)
    assert len(stand_in.bodies) == 1
    button(page, "Settings").click()
    expect(page.get_by_role("checkbox", name="Click a message")).not_to_be_checked()


@pytest.mark.slow
def test_a_plain_click_can_act_as_it_used_to(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    button(page, "Settings").click()
    page.get_by_role("checkbox", name="Click a message").check()
    button(page, "Done").click()
    said(answers(page)).select_text()
    said(answers(page)).click()                                 # ends a selection
    said(questions(page)).dblclick()                            # selects a word
    page.get_by_role("log").click(position={"x": 5, "y": 300})
    expect(answers(page).get_by_text("/2")).to_have_count(0)
    page.evaluate("getSelection().removeAllRanges()")
    page.keyboard.press("Escape")
    said(answers(page)).click()
    expect(answers(page)).to_contain_text("(answer 2)")
    said(questions(page)).click()
    expect(page.get_by_role("textbox", name="Edited text")).to_be_focused()
    page.keyboard.press("Escape")
    button(page, "Settings").click()
    page.get_by_role("checkbox", name="Click a message").uncheck()
    button(page, "Done").click()
    said(answers(page)).click()
    said(questions(page)).click()
    expect(page.get_by_role("textbox", name="Edited text")).to_have_count(0)
    expect(answers(page)).to_contain_text("2/2")


# where it runs --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_page_works_under_a_sub_path(page):
    server = StandIn("/deep/down")
    open_page(page, server.url)
    ask(page, "hello")
    expect(answers(page)).to_contain_text("You said: hello")
    assert chats(page).get_attribute("href").startswith("/deep/down/#")
    server.close()


def test_the_page_works_under_the_server_s_prefix(page):
    with fake_front(prefix="/deep/down") as url:
        open_page(page, url.rstrip("/"))            # the server adds the slash
        assert page.url == url
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")


def page_file():
    return (ROOT / "static" / "index.html").as_uri()


@pytest.mark.slow
def test_a_page_from_a_file_says_which_server_it_wants(page, stand_in):
    page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
    page.goto(page_file())
    expect(page.get_by_text("No server answers at http://127.0.0.1:8000/; still trying.")).to_be_visible()
    stand_in.admits = True
    menu(page, "Server")
    page.get_by_role("textbox", name="URL").fill("not a server!")
    button(page, "Done").click()
    expect(page.get_by_role("alert")).to_contain_text("is not an address")
    page.get_by_role("textbox", name="URL").fill(stand_in.url.removeprefix("http://").rstrip("/") + "/v1")
    page.get_by_label("API key").fill("secret")
    button(page, "Done").click()
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("stand-in-135m")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "hello")
    assert sent.value.headers["authorization"] == "Bearer secret"
    expect(answers(page)).to_contain_text("You said: hello")
    settled(page)
    page.reload()
    expect(answers(page)).to_contain_text("You said: hello")


def test_a_server_in_the_address_is_asked_about_first(page, stand_in):
    requests = []
    page.on("request", lambda request: requests.append(request))
    page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
    stand_in.admits = True
    page.goto(page_file())
    menu(page, "Server")
    page.get_by_label("API key").fill("secret of the first")
    button(page, "Done").click()
    page.goto(page_file() + f"?server={stand_in.url}")
    expect(page.get_by_role("dialog")).to_contain_text(stand_in.url)
    button(page, "Stay here").click()
    expect(page.get_by_text("No server answers at http://127.0.0.1:8000/; still trying.")).to_be_visible()
    assert not [request for request in requests if request.url.startswith(stand_in.url)]
    page.reload()
    button(page, "Use this server").click()
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("stand-in-135m")
    ask(page, "hello")
    expect_answered(page)
    theirs = [request for request in requests if request.url.startswith(stand_in.url)]
    assert theirs and not [request for request in theirs if "authorization" in request.headers]
    page.reload()                                               # now it is known
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("stand-in-135m")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_server_with_keys_asks_for_one(page, theme):
    keys = (ApiKey.hashed("right key", "alice"),)
    with fake_front(keys=keys) as url:
        page.goto(url)
        dialog = page.get_by_role("dialog", name="This server needs a key")
        expect(dialog.get_by_role("textbox")).to_have_count(1)
        expect(page.get_by_role("textbox", name="URL")).to_be_hidden()
        expect_accessible(page, theme=theme)
        page.keyboard.type("wrong")             # the field has the focus
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not accept this API key.")
        expect(page.locator("#lamp.locked")).to_be_attached()
        field = page.get_by_label("API key")
        expect(field).to_have_accessible_description("The server does not accept this API key.")
        assert field.bounding_box()["y"] < page.get_by_role("alert").bounding_box()["y"] < button(page, "Done").bounding_box()["y"]
        dialog.get_by_text("Another server").click()
        expect(page.get_by_role("textbox", name="URL")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("The server does not accept this API key.").first).to_be_visible()
        button(page, "Enter the key").click()
        page.keyboard.press("Escape")
        ask(page, "early")                      # waits for the key, and is sent with it
        expect(answers(page)).to_contain_text("Your message will then be sent.")
        expect(field).to_be_focused()
        field.fill("right key")
        button(page, "Done").click()
        expect(answers(page)).to_contain_text("Hello, world!")
        expect(page.locator("#lamp.ready")).to_be_attached()
        button(page, "New chat").click()
        expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("fake-model")
        page.reload()
        expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("fake-model")
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")
        expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.slow
def test_a_page_from_a_file_talks_to_a_willing_server(page):
    with fake_front(cors_origin=("null",), keys=(ApiKey.hashed("key", "alice"),)) as url:
        page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
        page.goto(page_file())
        menu(page, "Server")
        page.get_by_role("textbox", name="URL").fill(url)
        page.get_by_label("API key").fill("key")
        button(page, "Done").click()
        expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("fake-model")
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")


@pytest.mark.slow
def test_the_default_model_is_called_what_it_is(page, server_url, stand_in):
    open_page(page, stand_in.url)
    expect(page.get_by_text("demonstration model")).to_have_count(0)
    open_page(page, server_url)
    expect(page.get_by_text("very small demonstration model")).to_be_visible()
    better = next(model["better"] for model in json.load(urllib.request.urlopen(server_url + "v1/models", timeout=30))["data"])
    label = f"Get a better one: {better.split('/')[1].split('-GGUF')[0]}" if better else "Get another model"
    page.get_by_role("button", name=re.compile(f"^{re.escape(label)}")).click()
    expect(page.get_by_role("region", name="Get a model")).to_contain_text("A model may take")


def test_every_word_is_in_the_table_of_strings():
    page = (ROOT / "static" / "index.html").read_text()
    body = re.sub(r"<!--.*?-->|<noscript>.*?</noscript>", "", page[page.index("<body>"):], flags=re.S)
    assert re.findall(r">\s*([^<>\s][^<>]*)<", body) == []
    named = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', page))
    scripts = "".join(path.read_text() for path in (ROOT / "static").glob("*.js"))
    registered = "".join(re.findall(r"^  strings: \{\n(.*?)^  \},$", scripts, re.M | re.S))
    table = (ROOT / "static" / "parts.js").read_text() + re.sub("^  ", "", registered, flags=re.M)
    assert [name for name in named if not re.search(rf"\b{name}:", table)] == []
    used = set(re.findall(r"\bTEXT\.(\w+)", "".join(path.read_text() for path in (ROOT / "static").glob("*.js"))))
    assert [name for name in used if not re.search(rf"\b{name}:", table)] == []
    given = set(re.findall(r"(?:^  |[,{] )(\w+): ", table[table.index("const TEXT"):], re.M))
    assert {"send", "cut"} <= given


@pytest.mark.slow
def test_settings_show_the_real_server_s_defaults(page):
    with fake_front(temperature=0.3, top_k=7) as url:
        open_page(page, url)
        button(page, "Settings").click()
        hints = {name: page.get_by_label(name, exact=True).get_attribute("placeholder") for name in
                 ("Temperature", "Top-k", "Top-p", "Min-p", "Max tokens", "Seed")}
    assert hints == {"Temperature": "0.3", "Top-k": "7", "Top-p": "1", "Min-p": "0", "Max tokens": "rest of context",
                     "Seed": "random"}


def test_hidden_actions_leave_no_gap(page, stand_in):
    open_page(page, stand_in.url)
    for count, text in ((1, "one"), (2, "half")):
        ask(page, text)
        expect_answered(page, count)
    page.mouse.move(0, 0)
    turn = answers(page).first
    assert (icon_of(turn, "Copy"), icon_of(answers(page).last, "Copy")) == ("hidden", "visible")
    turn.hover()
    assert icon_of(turn, "Copy") == "visible"
    page.mouse.move(0, 0)
    button(turn, "Copy").focus()
    assert icon_of(turn, "Copy") == "visible"
    message_box(page).focus()
    box = lambda locator: locator.bounding_box()       # noqa: E731
    first, second = (answers(page).nth(i) for i in (0, 1))
    assert len(first.locator(".speed").inner_text()) < len(second.locator(".speed").inner_text())
    assert box(button(first, "Copy"))["x"] == box(button(second, "Copy"))["x"]
    for answer in (first, second):          # at the other end of the same line
        row, speed = box(answer.locator(".actions")), box(answer.locator(".speed"))
        assert abs(row["x"] + row["width"] - speed["x"] - speed["width"]) < 2 and row["height"] < 40
