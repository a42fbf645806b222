"""Chats on all devices: browsers that share nothing but the server, with the real program and a database."""

import pytest

from browsing import (ask, button, chats, expect, expect_answered, menu, needs_browser, open_page, questions, said)
from real_server import server

pytestmark = needs_browser


@pytest.fixture(scope="module")
def kept(tmp_path_factory, nanochat_fixtures):
    folder = tmp_path_factory.mktemp("kept")
    with server(nanochat_fixtures / "gen5", "--database", folder / "store.db") as (_, url):
        yield url + "/"


@pytest.fixture
def devices(browser, kept):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        open_page(page, kept)
    yield pages
    for context in contexts:
        context.close()


def choose(page, name):
    menu(page, "Chats on all your devices")
    return page.get_by_role("dialog", name="Chats on all your devices")


def keep(page):
    dialog = choose(page, "Chats on all your devices")
    button(dialog, "Keep them").click()
    expect(dialog).to_be_hidden()


def link_of(page):
    dialog = choose(page, "Chats on all your devices")
    link = dialog.locator("#sync-link").inner_text()
    button(dialog, "Go on").click()
    return link


def join(page, link):
    page.goto("about:blank")
    page.goto(link)
    dialog = page.get_by_role("dialog", name="Chats on all your devices")
    button(dialog, "Keep them").click()
    expect(dialog).to_be_hidden()


def asked(page, text):
    button(page, "New chat").click()
    ask(page, text)
    expect_answered(page)


def test_a_chat_is_on_the_other_device_and_changes_there_too(devices):
    phone, laptop = devices
    asked(phone, "apples are red")               # before: it is offered to the server too
    asked(laptop, "bananas are yellow")
    keep(phone)
    join(laptop, link_of(phone))
    for page in devices:
        expect(chats(page)).to_have_count(2)
        expect(chats(page).filter(has_text="bananas")).to_be_visible()
    chats(laptop).filter(has_text="apples").click()
    expect(said(questions(laptop))).to_have_text(["apples are red"])
    row = laptop.get_by_role("listitem").filter(has_text="apples")
    row.hover()
    button(row, "Rename").click()
    laptop.get_by_role("textbox", name="Title").fill("Fruit")
    laptop.get_by_role("textbox", name="Title").press("Enter")
    expect(chats(phone).filter(has_text="Fruit")).to_be_visible()
    ask(laptop, "and green ones")                # a message of the laptop, in the chat of the phone
    expect_answered(laptop, 2)
    chats(phone).filter(has_text="Fruit").click()
    expect(said(questions(phone))).to_have_text(["apples are red", "and green ones"])


def test_what_is_deleted_is_gone_on_both_and_can_be_undone_before(devices):
    phone, laptop = devices
    keep(phone)
    asked(phone, "first words")
    asked(phone, "second words")
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_count(2)
    row = phone.get_by_role("listitem").filter(has_text="first words")
    row.hover()
    button(row, "Delete").click()
    button(phone, "Undo").click()
    expect(chats(phone)).to_have_count(2)
    row = phone.get_by_role("listitem").filter(has_text="second words")
    row.hover()
    button(row, "Delete").click()
    button(phone, "Dismiss").click()
    expect(chats(laptop)).to_have_text(["first words"])
    expect(chats(phone)).to_have_text(["first words"])


def test_what_was_done_without_the_server_is_sent_later(devices):
    phone, laptop = devices
    keep(phone)
    asked(phone, "before the tunnel")
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_count(1)
    phone.context.set_offline(True)
    row = phone.get_by_role("listitem").filter(has_text="tunnel")
    row.hover()
    button(row, "Rename").click()
    phone.get_by_role("textbox", name="Title").fill("In the tunnel")
    phone.get_by_role("textbox", name="Title").press("Enter")
    row = laptop.get_by_role("listitem").filter(has_text="tunnel")
    row.hover()
    button(row, "Pin").click()
    phone.context.set_offline(False)
    for page in devices:
        expect(chats(page)).to_have_text(["In the tunnel"], timeout=30_000)
        expect(page.get_by_role("heading", name="Pinned")).to_be_visible(timeout=30_000)


def test_what_a_closed_page_had_not_sent_is_sent_by_the_next(devices):
    phone, laptop = devices
    keep(phone)
    asked(phone, "unsent words")
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_text(["unsent words"])
    phone.route("**/v1/chats/changes", lambda route: route.abort())
    row = phone.get_by_role("listitem").filter(has_text="unsent")
    row.hover()
    button(row, "Rename").click()
    phone.get_by_role("textbox", name="Title").fill("Sent by the next page")
    phone.get_by_role("textbox", name="Title").press("Enter")
    expect(chats(phone)).to_have_text(["Sent by the next page"])
    phone.unroute("**/v1/chats/changes")
    tab = phone.context.new_page()
    phone.close()
    open_page(tab, laptop.url)
    expect(chats(laptop)).to_have_text(["Sent by the next page"], timeout=30_000)


def test_a_server_without_a_database_is_not_asked(page, stand_in):
    open_page(page, stand_in.url)
    button(page, "Menu").click()
    expect(button(page, "Server status")).to_be_visible()
    expect(button(page, "Chats on all your devices")).to_have_count(0)
