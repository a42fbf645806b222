"""Chats on all devices: browsers that share nothing but the server, with the real program and a database."""

import re

import pytest

from browsing import (ask, button, chats, expect, expect_answered, menu, message_box, needs_browser, open_page, questions, said)
from real_server import server
from shared_chats import choose, join, keep, link_of

pytestmark = needs_browser


@pytest.fixture
def kept(keeping_server):
    return keeping_server.url + "/"


@pytest.fixture
def devices(browser, kept):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        open_page(page, kept)
    yield pages
    for context in contexts:
        context.close()


def asked(page, text):
    button(page, "New chat").click()
    ask(page, text)
    expect_answered(page)


def delete(page, text):
    row = page.get_by_role("listitem").filter(has_text=text)
    row.hover()
    button(row, "Delete").click()


def asked_and_joined(devices, text):
    """A chat of the first device, which the other has then too."""
    phone, laptop = devices
    keep(phone)
    asked(phone, text)
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_text([text])
    return devices


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
    delete(phone, "first words")
    button(phone, "Undo").click()
    expect(chats(phone)).to_have_count(2)
    delete(phone, "second words")
    button(phone, "Dismiss").click()
    expect(chats(laptop)).to_have_text(["first words"])
    expect(chats(phone)).to_have_text(["first words"])


def test_news_of_what_another_tab_has_just_deleted_do_not_bring_it_back(devices):
    """The tab that hears of the server's chats hears of these only when the other has deleted one, and may still undo that."""
    phone, laptop = devices
    news, held, deleted = re.compile(r"/v1/chats/changes\?"), [], False
    phone.context.route(news, lambda route: route.continue_() if deleted else held.append(route))
    with phone.expect_request(news):
        keep(phone)
    tab = phone.context.new_page()
    open_page(tab, phone.url)
    asked(tab, "deleted soon")
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_text(["deleted soon"])        # so the server has it
    chats(laptop).click()
    expect(said(questions(laptop))).to_have_text(["deleted soon"])
    laptop.evaluate("Store.get('drafts', '')")                  # after the chat's draft, which takes the place of what is typed before
    ask(laptop, "said there meanwhile")
    expect_answered(laptop, 2)
    asked(laptop, "news of the laptop")
    delete(tab, "deleted soon")
    expect(chats(phone)).to_have_count(0)
    deleted = True
    for route in held:
        route.continue_()
    for page in (phone, tab):
        expect(chats(page)).to_have_text(["news of the laptop"])
    button(tab, "Undo").click()
    for page in (phone, tab, laptop):
        expect(chats(page)).to_have_count(2)
        chats(page).filter(has_text="deleted soon").click()
        expect(said(questions(page))).to_have_text(["deleted soon", "said there meanwhile"])


def test_what_a_tab_has_deleted_can_be_undone_though_another_opens(devices):
    phone, laptop = asked_and_joined(devices, "deleted and back")
    delete(phone, "deleted and back")
    tab = phone.context.new_page()
    open_page(tab, phone.url)
    asked(tab, "sent by the new tab")
    expect(chats(laptop)).to_have_count(2)
    button(phone, "Undo").click()
    expect(chats(phone)).to_have_count(2)
    asked(phone, "sent after it")
    expect(chats(laptop)).to_have_count(3)
    for page in (phone, tab, laptop):
        expect(chats(page).filter(has_text="deleted and back")).to_be_visible()


def test_what_a_closed_tab_had_deleted_is_deleted_by_the_next(devices):
    phone, laptop = asked_and_joined(devices, "deleted at the end")
    delete(phone, "deleted at the end")
    tab = phone.context.new_page()
    phone.close()
    open_page(tab, laptop.url)
    expect(chats(laptop)).to_have_count(0, timeout=45_000)


def test_what_was_done_without_the_server_is_sent_later(devices):
    phone, laptop = asked_and_joined(devices, "before the tunnel")
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
    phone, laptop = asked_and_joined(devices, "unsent words")
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


def test_an_answer_is_on_the_other_device_though_its_page_has_gone(devices):
    """The server writes it, once: a page that comes back finds it too."""
    phone, laptop = asked_and_joined(devices, "first of all")
    chats(laptop).click()
    with phone.expect_request(lambda request: request.url.endswith("v1/chat/completions")) as sent:
        ask(phone, "and then go on")
    assert set(sent.value.post_data_json["chat"]) == {"id", "node", "parent"}
    sent.value.response()                        # the server has accepted it
    tab = phone.context.new_page()
    phone.close()
    expect(said(questions(laptop))).to_have_text(["first of all", "and then go on"], timeout=30_000)
    expect_answered(laptop, 2)
    expect(laptop.get_by_text("interrupted")).to_have_count(0)
    tab.goto(laptop.url)
    expect(said(questions(tab))).to_have_text(["first of all", "and then go on"], timeout=30_000)
    expect_answered(tab, 2)


def test_what_another_device_has_changed_is_not_lost_to_a_change_of_this_one(devices):
    """The answer to a change has what the other device had said."""
    phone, laptop = asked_and_joined(devices, "both change it")
    laptop.route(re.compile(r"/v1/chats/changes\?"), lambda route: route.abort())     # it hears nothing by itself
    laptop.reload()
    row = phone.get_by_role("listitem").filter(has_text="both")
    row.hover()
    button(row, "Rename").click()
    phone.get_by_role("textbox", name="Title").fill("Named there")
    with phone.expect_response(lambda response: response.url.endswith("/v1/chats/changes")):
        phone.get_by_role("textbox", name="Title").press("Enter")
    row = laptop.get_by_role("listitem").filter(has_text="both")
    row.hover()
    button(row, "Pin").click()
    expect(chats(laptop)).to_have_text(["Named there"])
    expect(laptop.get_by_role("heading", name="Pinned")).to_be_visible()


def test_a_server_without_a_database_is_not_asked(page, stand_in):
    open_page(page, stand_in.url)
    button(page, "Menu").click()
    expect(button(page, "Server status")).to_be_visible()
    expect(button(page, "Chats on all your devices")).to_have_count(0)


def test_the_server_searches_and_the_page_jumps_to_the_message(devices):
    """Also a message on a branch that is not shown, and what only this browser has."""
    phone, laptop = devices
    keep(phone)
    asked(phone, "Pumpernickel is dark")
    ask(phone, "and Zwieback is dry")
    expect_answered(phone, 2)
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_count(1)
    button(laptop, "New chat").click()
    asked_at = []
    laptop.on("request", lambda request: asked_at.append(request.url) if "/v1/chats/search" in request.url else None)
    search = laptop.get_by_role("textbox", name="Search chats")
    search.fill("ZWIEB pumper")
    expect(chats(laptop)).to_have_text(["Pumpernickel is dark"])
    expect(laptop.locator("#chats .snippet")).to_contain_text("and Zwieback is dry")
    assert asked_at
    chats(laptop).click()
    expect(said(questions(laptop))).to_have_text(["Pumpernickel is dark", "and Zwieback is dry"])
    expect(questions(laptop).last).to_be_in_viewport()
    search.fill("nowhere to be found")
    expect(laptop.get_by_text("No chat contains all of these words.")).to_be_visible()
    search.fill("")
    laptop.context.set_offline(True)
    search.fill("zwieb")
    expect(chats(laptop)).to_have_text(["Pumpernickel is dark"])         # the browser has it too
    laptop.context.set_offline(False)
    search.fill("")
    menu(laptop, "Temporary chat")
    ask(laptop, "Only here: Knäckebrot")
    expect_answered(laptop)
    search.fill("KNÄCKE")
    expect(chats(laptop)).to_have_text(["Temporary chat"])


def test_pictures_are_on_the_other_device_and_gone_with_their_message(devices):
    """On the server each is a file, whatever shows it; here it is in its message."""
    phone, laptop = devices
    keep(phone)
    sent = []
    phone.on("request", lambda request: sent.append(request.method) if request.url.endswith("/v1/chats/files") else None)
    large = phone.evaluate("""() => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 90, height: 90}), paper = canvas.getContext("2d");
        const pixels = paper.createImageData(90, 90);
        for (let i = 0, x = 1; i < pixels.data.length; i++) { x = x * 16807 % 2147483647; pixels.data[i] = i % 4 === 3 ? 255 : x % 256; }
        paper.putImageData(pixels, 0, 0);
        return canvas.toDataURL();
    }""")
    assert len(large) > 4000
    phone.evaluate("""picture => {
        const chat = Tree.newConversation({title: "Cats"}), small = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
        const one = Tree.newNode(chat.id, null, "user", "See", {pictures: [{name: "cat.png", picture}, {name: "dot.gif", picture: small}]});
        Chat.addChat(chat, [one, Tree.newNode(chat.id, one.id, "user", "Again", {pictures: [{name: "same.png", picture}]})]);
        Page.render();
    }""", large)
    join(laptop, link_of(phone))
    expect(chats(laptop)).to_have_text(["Cats"])
    chats(laptop).click()
    expect(questions(laptop).first.get_by_role("img")).to_have_count(2)
    shown = laptop.evaluate("[...Chat.nodes.values()].map(({pictures}) => pictures)")
    assert sorted([picture["name"], picture["picture"] == large] for each in shown for picture in each) == [
        ["cat.png", True], ["dot.gif", False], ["same.png", True]]
    assert sent == ["POST"]
    laptop.evaluate("""() => { const node = [...Chat.nodes.values()].find(({content}) => content === "See"); Store.change("nodes", node.id, {content: "Look"}); }""")
    chats(phone).click()
    expect(said(questions(phone)).first).to_contain_text("Look")
    assert phone.evaluate("[...Chat.nodes.values()].find(({content}) => content === 'Look').pictures[0].picture") == large


def test_an_answer_that_goes_on_is_written_though_its_page_has_gone(devices):
    """In the same node, behind the text that it had."""
    phone, laptop = devices
    keep(phone)
    message_box(phone).fill("/maxtokens 3")
    message_box(phone).press("Enter")
    asked_here = "tell me something"
    ask(phone, asked_here)
    expect_answered(phone)
    join(laptop, link_of(phone))
    chats(laptop).first.click()
    expect_answered(laptop)
    before = laptop.evaluate("Chat.path.at(-1).content")
    message_box(phone).fill("/maxtokens 40")
    message_box(phone).press("Enter")
    with phone.expect_request(lambda request: request.url.endswith("v1/chat/completions")) as sent:
        button(phone, "Continue").click()
    body = sent.value.post_data_json
    assert body["continue_final_message"] and set(body["chat"]) == {"id", "node", "parent"}
    assert sent.value.response().status == 200
    phone.close()
    laptop.wait_for_function("before => Chat.path.at(-1).timings?.completion_tokens > 3 && !Chat.path.at(-1).stream", arg=before)
    assert laptop.evaluate("Chat.path.at(-1).content").startswith(before)
    assert laptop.evaluate("[Chat.path.length, Chat.nodes.size]") == [2, 2]


@pytest.fixture(scope="module")
def named(nanochat_fixtures, tmp_path_factory):
    """A server that is reached by a name, too."""
    database = tmp_path_factory.mktemp("named") / "store.db"
    with server(nanochat_fixtures / "gen5", f"--database={database}", "--allowed-host=box.test") as (_, url):
        yield url + "/"


def test_the_link_is_shown_at_once_and_can_be_copied(devices, named):
    """By an address of this computer alone it says so; by another it has a QR code."""
    phone, laptop = devices
    for page, url in ((phone, named), (laptop, re.sub("//[^:]*", "//box.test", named))):
        open_page(page, url)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        dialog = choose(page)
        button(dialog, "Keep them").click()
        link = dialog.locator("#sync-link").inner_text()
        assert re.fullmatch(re.escape(url) + "#join/[A-Za-z0-9_-]{22,64}", link)
        expect(dialog.locator("button.primary")).to_have_text("Done")
        button(dialog, "Copy the link").click()
        page.wait_for_function("async text => await navigator.clipboard.readText() === text", arg=link) if page is phone else None
    expect(phone.get_by_text("is an address of this computer alone")).to_be_visible()
    expect(phone.get_by_role("img", name="QR code of the link")).to_have_count(0)
    expect(laptop.get_by_text("is an address of this computer alone")).to_have_count(0)
    expect(laptop.get_by_role("img", name="QR code of the link")).to_be_visible()
    drawn = laptop.locator(".qr path").get_attribute("d")
    corners = [(x, y) for x, y in ((4, 4), (10, 4), (4, 10), (7, 7), (5, 5)) if f"M{x} {y}h1v1h-1z" in drawn]
    assert corners == [(4, 4), (10, 4), (4, 10), (7, 7)]        # a finder pattern: its ring, its middle, and what is light between them
    button(laptop.get_by_role("dialog", name="Chats on all your devices"), "Stop keeping them").click()
    expect(choose(laptop).get_by_role("button", name="Keep them")).to_be_visible()
