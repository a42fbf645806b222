"""Collections of documents in the page: made, filled, chosen with #, asked, and their passages opened."""

import json

import pytest

from chatlm.terminal.knowing import wanted
from browsing import ask, button, expect, menu, needs_browser, open_page, reload
from real_server import server

pytestmark = [needs_browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory, nanochat_fixtures, default_embedder_path):
    folder = tmp_path_factory.mktemp("knowing")
    (folder / "docs").mkdir()
    (folder / "docs" / "pump.md").write_text("# Pump\n\nPrime it with water.\n\n# Valve\n\nTurn it left.")
    (folder / "docs" / ".secret").write_text("hidden")
    with server(nanochat_fixtures / "gen5", "--embedder", "--database", folder / "store.db",
                "--knowledge", f"manuals={folder / 'docs'}") as (_, url):
        yield url + "/"


@pytest.fixture
def page(browser, knowing):
    context = browser.new_context()
    page = context.new_page()
    open_page(page, knowing)
    yield page
    context.close()


def opened(page):
    menu(page, "Collections")
    return page.get_by_role("dialog", name="Collections")


def test_a_collection_is_made_filled_and_deleted(page):
    dialog = opened(page)
    dialog.get_by_label("Name of the collection").fill("cats")
    dialog.get_by_label("Name of the collection").press("Enter")       # as its button does
    with page.expect_file_chooser() as chooser:
        button(dialog, "Add files").click()
    chooser.value.set_files([
        {"name": "cats.md", "mimeType": "text/markdown", "buffer": b"Cats sleep a lot."},
        {"name": "odd.bin", "mimeType": "application/octet-stream", "buffer": bytes(range(256))}])
    expect(dialog.get_by_text("1 file · 1 failed", exact=True)).to_be_visible(timeout=60_000)
    expect(dialog.get_by_text("of none of the formats that can be read")).to_be_visible()
    button(dialog, "Delete: odd.bin").click()
    expect(dialog.get_by_text("odd.bin")).to_have_count(0)
    button(dialog, "Delete: cats").first.click()
    expect(dialog.get_by_text("cats.md")).to_have_count(0)


def test_a_file_in_another_language_names_an_embedder_that_reads_it(page):
    dialog = opened(page)
    dialog.get_by_label("Name of the collection").fill("haus")
    button(dialog, "New collection").click()
    expect(dialog.get_by_text("The server's embedder reads English alone")).to_contain_text("--embedder multilingual-e5-small (91 MB)")
    german = "Der Hausmeister leert die Kästen im Keller, und wer die Wohnung kündigt, muss es drei Monate vorher sagen. Das ist nicht neu, aber auch nicht für alle leicht zu tun."
    with page.expect_file_chooser() as chooser:
        button(dialog, "Add files").click()
    chooser.value.set_files([{"name": "haus.txt", "mimeType": "text/plain", "buffer": german.encode("cp1252")}])
    expect(dialog.get_by_text("most of it is not in English")).to_contain_text("start the server with --embedder multilingual-e5-small (91 MB)", timeout=60_000)
    button(dialog, "Delete: haus").last.click()


def test_a_followed_folder_says_what_it_has_and_offers_no_change(page):
    dialog = opened(page)
    button(dialog, "manuals").click()
    expect(dialog.get_by_text("it is hidden: its name begins with a dot")).to_be_visible(timeout=60_000)
    expect(dialog.get_by_text("follows a folder of the server")).to_be_visible()
    expect(dialog.get_by_role("button", name="Delete: manuals")).to_have_count(0)
    expect(dialog.get_by_role("button", name="Delete: pump.md")).to_have_count(0)
    expect(dialog.get_by_role("button", name="Add files")).to_have_count(0)


def answered(page, knowing):
    """Have the server's answer be one with a passage: the small model's context has no room for any."""
    rows = page.request.get(f"{knowing}v1/vector_stores").json()["data"]
    [store] = [row for row in rows if row["name"] == "manuals"]
    while page.request.get(f"{knowing}v1/vector_stores/{store['id']}").json()["status"] == "in_progress":
        pass  # the server says when it has read them
    files = page.request.get(f"{knowing}v1/vector_stores/{store['id']}/files?filter=completed").json()["data"]
    passage = {"index": 1, "vector_store_id": store["id"], "file_id": files[0]["id"], "filename": "pump.md",
               "page": None, "heading": "Pump", "start": 0, "cut": False, "score": 0.8}
    given = {"mode": "search", "read": 1, "of": 40, "words_only": False, "passages": [passage]}
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "knowledge": given},
              {"choices": [{"index": 0, "delta": {"content": "With water [1], not [7] or `a[1]`."}}]},
              {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=body))


def test_a_chat_asks_the_collection_that_a_hash_chose_and_shows_its_passages(page, knowing):
    answered(page, knowing)
    message = page.get_by_label("Message", exact=True)
    message.press_sequentially("What of the #man")
    option = page.get_by_role("option", name="#manuals")
    expect(option).to_be_visible()
    message.press("Enter")
    expect(message).to_have_value("What of the ")
    expect(button(page, "Do not ask manuals")).to_be_visible()
    message.press_sequentially("pump?")
    with page.expect_request("**/v1/chat/completions") as asked:
        message.press("Enter")
    sent = asked.value.post_data_json["knowledge"]
    assert [*sent] == ["stores", "return_text"] and len(sent["stores"]) == 1
    expect(page.get_by_text("1 of 40 parts were read")).to_be_visible(timeout=60_000)
    assert asked.value.post_data_json["knowledge"] == wanted({sent["stores"][0]: "manuals"}, {})["knowledge"] | {"return_text": True}      # the page asks again; the terminal does not
    both = page.get_by_role("button", name="Passage 1, pump.md")
    expect(both).to_have_count(2)       # in the text, and below it; not in code, nor a number without passage
    expect(page.get_by_text("With water [1], not [7] or a[1].")).to_be_visible()
    both.first.click()
    dialog = page.get_by_role("dialog", name="pump.md")
    expect(dialog.locator("mark")).to_have_count(1)
    expect(dialog.locator("mark")).to_contain_text("it")
    button(dialog, "Done").click()
    button(page, "Do not ask manuals").click()
    expect(button(page, "Do not ask manuals")).to_have_count(0)


def test_a_chat_says_how_many_passages_it_reads(page, knowing):
    answered(page, knowing)
    made(page, "few")
    dialog = opened(page)
    dialog.get_by_text("How many passages this chat reads").click()
    dialog.get_by_label("Passages at most").fill("3")
    dialog.get_by_label("Least score").fill("0.25")
    button(dialog, "Done").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What of the pump?")
    knowledge = asked.value.post_data_json["knowledge"]
    assert knowledge == wanted(dict.fromkeys(knowledge["stores"]), {"max_num_results": 3, "score_threshold": 0.25})["knowledge"] | {"return_text": True}
    expect(page.get_by_text("1 of 40 parts were read")).to_be_visible(timeout=60_000)
    reload(page)
    dialog = opened(page)
    dialog.get_by_text("How many passages this chat reads").click()
    expect(dialog.get_by_label("Passages at most")).to_have_value("3")
    dialog.get_by_label("Passages at most").fill("99")
    dialog.get_by_label("Least score").fill("")
    assert page.evaluate("Chat.current.search") == {"max_num_results": 3, "score_threshold": 0.25}      # a wrong number changes nothing
    dialog.get_by_label("Passages at most").fill("")
    dialog.get_by_label("Passages at most").press("Tab")
    assert page.evaluate("Chat.current.search") == {}


def made(page, name):
    """A collection that the page has made and chosen for its chat."""
    dialog = opened(page)
    dialog.get_by_label("Name of the collection").fill(name)
    button(dialog, "New collection").click()
    expect(button(dialog, name).first).to_be_visible()
    button(dialog, "Done").click()
    message = page.get_by_label("Message", exact=True)
    message.press_sequentially(f"#{name[:3]}")
    expect(page.get_by_role("option", name=f"#{name}")).to_be_visible()
    message.press("Enter")
    expect(button(page, f"Do not ask {name}")).to_be_visible()


ID = """async name => (await (await Server.request('v1/vector_stores')).json()).data
    .find(each => each.name === name).id"""


def test_a_collection_that_was_deleted_elsewhere_leaves_the_chat_and_the_message_is_sent(page, knowing):
    made(page, "gone")
    page.evaluate("async id => Server.request(`v1/vector_stores/${id}`, {method: 'DELETE'})",
                  page.evaluate(ID, "gone"))
    message = page.get_by_label("Message", exact=True)
    message.fill("Hello")
    message.press("Enter")
    expect(page.get_by_text("The collection gone is gone from the server")).to_be_visible(timeout=60_000)
    expect(button(page, "Do not ask gone")).to_have_count(0)
    with page.expect_request("**/v1/chat/completions") as asked:
        button(page, "Try again").click()
    assert "knowledge" not in asked.value.post_data_json
    expect(page.get_by_text("is gone from the server")).to_have_count(0, timeout=60_000)


def test_a_collection_that_is_deleted_here_leaves_the_chat_at_once(page):
    made(page, "here")
    dialog = opened(page)
    button(dialog, "Delete: here").click()
    expect(button(dialog, "Delete: here")).to_have_count(0)
    button(dialog, "Done").click()
    expect(button(page, "Do not ask here")).to_have_count(0)


def test_more_files_and_collections_than_a_page_of_the_list_are_shown(page, knowing):
    """The lists are served here: a page of the real ones has a hundred rows."""
    counts = {"in_progress": 0, "completed": 250, "failed": 0, "cancelled": 0, "total": 250}
    rows = [{"id": f"vs_{number}", "name": f"store {number}", "file_counts": counts, "status": "completed",
             "read_only": False, "problem": None} for number in range(130)]
    files = [{"id": f"file-{number}", "filename": f"file {number}.md", "status": "completed",
              "last_error": None, "cut": None, "attributes": {}} for number in range(250)]
    files[0] |= {"status": "failed", "last_error": {"code": "server_error", "message": "It died."}}

    def serve(route):
        whole = files if "/files" in route.request.url else rows
        if route.request.method == "POST":
            files[0] |= {"status": "completed", "last_error": None}
            return route.fulfill(json=files[0])
        after = route.request.url.partition("after=")[2]
        begin = 1 + [row["id"] for row in whole].index(after) if after else 0
        part = whole[begin:begin + 100]
        return route.fulfill(json={"data": part, "has_more": begin + 100 < len(whole),
                                   "last_id": part[-1]["id"]})
    page.route("**/v1/vector_stores**", serve)
    page.route("**/v1/vector_stores/**", serve)
    dialog = opened(page)
    expect(dialog.get_by_role("button", name="Delete: store")).to_have_count(130)
    button(dialog, "store 129").click()
    listed = dialog.get_by_role("button", name="Delete: file")
    expect(listed).to_have_count(100)
    expect(dialog.get_by_text("The newest 100 of 250.")).to_be_visible()
    for count in 200, 250:
        button(dialog, "Show more").click()
        expect(listed).to_have_count(count)
    expect(button(dialog, "Show more")).to_have_count(0)
    with page.expect_request(lambda request: request.method == "POST") as asked:
        button(dialog, "Read again: file 0.md").click()
    assert asked.value.post_data_json == {"file_id": "file-0", "attributes": {}}
    expect(dialog.get_by_text("It died.")).to_have_count(0)


@pytest.mark.parametrize("start, marked", [(30, "Prime it with water."), (31, None)])
def test_a_passage_of_a_pdf_is_opened_under_its_page(page, start, marked):
    parts = [{"type": "text", "text": text, "start": begin, "page": number, "heading": ""}
             for text, begin, number in (
                 ("Contents", 0, 1), ("Chapter", 10, 2), ("Prime it with water.", 30, 2))]
    page.route("**/content?page=0", lambda route: route.fulfill(json={"data": parts, "next_page": None}))
    given = {"read": 1, "of": 3, "passages": [{
        "index": 1, "vector_store_id": "vs_1", "file_id": "file-1", "filename": "pump.pdf", "page": 2,
        "heading": "", "start": start}]}
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "knowledge": given},
              {"choices": [{"index": 0, "delta": {"content": "Water [1]."}}]},
              {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=body))
    page.get_by_label("Message", exact=True).fill("?")
    page.get_by_label("Message", exact=True).press("Enter")
    page.get_by_role("button", name="Passage 1, pump.pdf").first.click()
    dialog = page.get_by_role("dialog", name="pump.pdf · page 2")
    expect(dialog.get_by_role("heading", name="page", exact=False)).to_have_text(
        ["pump.pdf · page 2", "page 1", "page 2"])
    expect(dialog.locator("mark")).to_have_text([marked] if marked else [])
    expect(dialog.get_by_text("the passage is no longer in it")).to_have_count(0 if marked else 1)


def test_each_entry_of_the_menu_has_an_icon_of_its_own(page):
    button(page, "Menu").click()
    icons = page.evaluate("[...document.querySelectorAll('header .menu button')].map(({className}) => className.match(/i-[a-z]+/)[0])")
    assert len(icons) > 8 and len({*icons}) == len(icons), icons
