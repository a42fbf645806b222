"""The page's view of models to download: what there is, how large, whether it fits; getting, cancelling, continuing, deleting."""

import os
import re

import pytest

from browsing import (SLOW_MS, ask, button, expect, expect_accessible, expect_answered, menu, message_box, needs_browser, open_page, reload, started_server, visitor)
from fake_hub import fake_hub
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

pytestmark = needs_browser
TEXT = {**small_gguf_metadata("gpt-2"), "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
WIDE = LLAMA_NUMBERS | {"llama.feed_forward_length": 8192}
LARGE = gguf_bytes({**WIDE, **TEXT}, random_llama(numbers=WIDE))
SMALL = gguf_bytes({**LLAMA_NUMBERS, **TEXT}, random_llama())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    monkeypatch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    with fake_hub(org__large={"large-Q8_0.gguf": LARGE, "large-Q4_0.gguf": SMALL, "large-F16.gguf": SMALL}, org__odd={"odd.gguf": gguf_bytes({**LLAMA_NUMBERS, **TEXT, "general.architecture": "rwkv7"}, random_llama())}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub") / "hf"))
        yield hub
        hub.released.set()
    monkeypatch.undo()


@pytest.fixture(scope="module")
def served(hub, nanochat_fixtures):
    """A server for all tests, which has downloaded nothing when one begins."""
    with started_server("--models", str(nanochat_fixtures / "gen5"), "--kv-cache-memory", "4M") as url:
        yield url


def region(page):
    return page.get_by_role("region", name="Get a model")


def row(page, text):
    return region(page).get_by_role("row").filter(has_text=text)


def search(page, words):
    region(page).get_by_role("textbox", name="Search the hub").fill(words)
    button(region(page), "Search").click()


def test_a_model_is_found_downloaded_and_deleted(page, hub, served, theme):
    hub.held = {"large-Q8_0.gguf": 12 << 20}
    open_page(page, served)
    menu(page, "Get a model")
    expect(region(page)).to_contain_text(re.compile(r"A model may take .* of memory · .* are free on the disk"), timeout=SLOW_MS)
    expect(row(page, "llama3.1-70b")).to_contain_text("about 140 GB")
    expect(row(page, "llama3.1-70b")).to_contain_text("does not fit in memory")
    expect(row(page, "smollm2-135m")).to_contain_text(re.compile("about 270 MB.*fits"))
    expect_accessible(page, theme=theme)
    search(page, "org")
    button(region(page), "Files of org/large").click()
    expect(row(page, "org/large:large-Q8_0.gguf")).to_contain_text(re.compile("26 MB.*fits"), timeout=SLOW_MS)
    button(region(page), "Files of org/odd").click()
    expect(row(page, "org/odd:odd.gguf")).to_contain_text("cannot run rwkv7", timeout=SLOW_MS)
    expect(button(region(page), "Get org/odd:odd.gguf")).to_be_disabled()
    button(region(page), "Get org/large:large-Q8_0.gguf").click()
    bar = region(page).get_by_role("progressbar", name="Download of org/large:large-Q8_0.gguf")
    expect(bar).to_have_attribute("value", "10485760", timeout=SLOW_MS)
    expect(region(page)).to_contain_text("10 MB of 26 MB")
    expect_accessible(page, theme=theme)
    reload(page)                    # it goes on, and is found again
    expect(bar).to_have_attribute("value", "10485760", timeout=SLOW_MS)
    button(region(page), "Cancel org/large:large-Q8_0.gguf").click()
    expect(region(page)).to_contain_text("cancelled; what is here stays")
    expect(region(page).get_by_role("row").filter(has_text="a part of it is here")).to_have_count(1)
    expect_accessible(page, "#get-found", "#get-best", theme=theme)       # the tables of the first look
    hub.released.set()
    button(region(page), "Continue org/large:large-Q8_0.gguf").first.click()
    expect(region(page)).to_contain_text("org/large:large-Q8_0.gguf is here and served.", timeout=SLOW_MS)
    button(region(page), "Chat with org/large:large-Q8_0.gguf").first.click()
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("org/large:large-Q8_0.gguf")
    ask(page, "/maxtokens 4")
    ask(page, "hello")
    expect_answered(page)
    menu(page, "Get a model")
    button(region(page), "Delete org/large:large-Q8_0.gguf").click()
    expect(page.get_by_role("dialog")).to_contain_text("26 MB are removed from the cache")
    expect_accessible(page, "#get-found", "#get-best", theme=theme)
    button(page.get_by_role("dialog"), "Delete").click()
    expect(region(page).get_by_role("heading", name="On this machine")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(message_box(page)).to_be_focused()


@pytest.mark.slow
def test_a_server_that_downloads_nothing_says_so(page, hub, nanochat_fixtures, theme):
    with started_server("--models", str(nanochat_fixtures / "gen5"), "--kv-cache-memory", "4M", "--no-downloads") as url:
        open_page(page, url, "#get")
        expect(region(page).get_by_role("alert")).to_contain_text("This server downloads no models (--no-downloads)")
        expect(region(page).get_by_role("textbox")).to_be_hidden()
        expect_accessible(page, theme=theme)


@pytest.mark.slow
def test_the_view_fits_a_phone(browser, hub, served, theme):
    with visitor(browser, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        open_page(page, served, "#get")
        expect(row(page, "smollm2-135m")).to_be_visible(timeout=SLOW_MS)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        search(page, "nothing at all")
        expect(region(page)).to_contain_text("The hub has nothing for “nothing at all”.", timeout=SLOW_MS)
        search(page, "large")
        button(region(page), "Files of org/large").tap()
        for name in ("Get org/large", "Get org/large:large-Q4_0.gguf"):
            button(region(page), name).scroll_into_view_if_needed()
            expect(button(region(page), name)).to_be_in_viewport(ratio=1)
        assert page.locator("#get .table").evaluate_all("tables => tables.every(each => each.scrollWidth <= each.clientWidth)")
        expect_accessible(page, theme=theme)


def test_without_a_network_one_line_says_so(page, hub, nanochat_fixtures, monkeypatch, theme):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with started_server("--models", str(nanochat_fixtures / "gen5"), "--kv-cache-memory", "4M") as url:
        open_page(page, url, "#get")
        expect(row(page, "smollm2-135m")).to_be_visible(timeout=SLOW_MS)
        search(page, "qwen")
        expect(region(page).get_by_role("status")).to_have_text("Looking…")
        expect(region(page).get_by_role("alert")).to_have_text(re.compile(r"^No connection to the hub: http://127.0.0.1:9 cannot be reached \(.*\)\.$"), timeout=SLOW_MS)
        expect(region(page).get_by_role("status")).to_be_hidden()
        expect(region(page)).not_to_contain_text("The hub has nothing")
        expect(row(page, "smollm2-135m")).to_be_visible()       # what is known without the hub is still there
        expect_accessible(page, "#get-found", "#get-best", theme=theme)
        button(region(page), "Dismiss").click()
        expect(region(page).get_by_role("alert")).to_be_hidden()
        expect(region(page).get_by_role("textbox")).to_be_focused()
        button(region(page), "Get smollm2-135m").click()
        expect(region(page).get_by_role("listitem")).to_contain_text("cannot be reached", timeout=SLOW_MS)
        button(region(page), "Dismiss HuggingFaceTB/SmolLM2-135M-Instruct").click()
        expect(region(page).get_by_role("listitem")).to_have_count(0)


def test_a_waiting_search_shows_that_it_looks(page, stand_in):
    open_page(page, stand_in.url)
    known = {"memory": 9e9, "disk": 9e9, "models_disk": None, "cached": [], "downloads": [], "short_names": [], "found": [], "best": []}
    held = []
    page.route("**/models/hub*", lambda route: held.append(route) if "search" in route.request.url else route.fulfill(json=known))
    page.evaluate("void Views.openGet()")
    search(page, "a")
    expect(region(page).get_by_role("status")).to_have_text("Looking…")
    expect(region(page)).not_to_contain_text("The hub has nothing")
    with page.expect_request(lambda request: "search" in request.url and request.url.endswith("b")):
        search(page, "b")
    page.evaluate("0")                                          # the request's route has been called by now
    assert len(held) == 2
    for route in reversed(held):                                # the answer for a comes last, and is old news
        route.fulfill(json=known | {"found": [{"model": "org/" + route.request.url[-1], "bytes": 0, "kind": "gguf", "here": 0}]})
    expect(row(page, "org/b")).to_contain_text("see its files")
    expect(row(page, "org/a")).to_have_count(0)
    expect(region(page).get_by_role("status")).to_be_hidden()


def test_what_fits_best_stands_first(page, hub, served):
    open_page(page, served, "#get")
    expect(row(page, "smollm2-135m")).to_contain_text(re.compile(r"fits · about [\d.,]+ tok/s"), timeout=SLOW_MS)
    best = page.locator("#get-best").get_by_role("row").filter(has_text="fits best here")
    best.or_(page.locator("#get-best:empty")).first.wait_for(state="attached")
    if best.count():                                        # of a machine with less memory nothing
        expect(best).to_contain_text(re.compile(r"Qwen/Qwen3-.*Q(4_K_M|8_0)\.gguf.*GB.*about [\d.,]+ tok/s"))
    assert page.locator("#get tbody tr td:nth-child(2)").evaluate_all("all => all.length > 50 && all.every(each => each.textContent)")
    search(page, "org")
    button(region(page), "Files of org/large").click()
    files = region(page).locator(".of-model td:first-child")
    expect(files).to_have_text([re.compile("Q8_0"), re.compile("Q4_0"), re.compile("F16")], timeout=SLOW_MS)
    expect(row(page, "org/large:large-Q8_0.gguf")).to_contain_text("fits best here")


@pytest.mark.slow
def test_a_broken_progress_stream_is_followed_again(page, hub, served):
    hub.held = {"large-Q8_0.gguf": 12 << 20}
    broken = []
    hub.released.clear()
    open_page(page, served, "#get")
    page.route("**/models/downloads", lambda route: (broken.append(route), route.abort()) if not broken else route.continue_())
    search(page, "large")
    button(region(page), "Files of org/large").click()
    button(region(page), "Get org/large:large-Q8_0.gguf").click()
    expect(region(page).get_by_role("progressbar")).to_have_attribute("value", "10485760", timeout=SLOW_MS)
    assert len(broken) == 1
