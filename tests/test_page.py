"""The page in a real browser: against chat_server.py with its default model, for the edges against a scripted stand-in.

`CHAT_SERVER_URL` names a running server to test instead of starting one; `PAGE_STAND_IN=1` uses the stand-in for all.
"""
import asyncio
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import chat_server
from fake_pool import FakePool, serving
from page_server import BLOCKS, HOSTILE, MARKDOWN, StandIn

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
expect = playwright.expect

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on PATH (Debian: apt install chromium)")
SLOW_MS = 30_000            # a real model on a busy machine


# servers and pages ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server_url():
    """The server of the main tests, with a model that answers."""
    if os.environ.get("CHAT_SERVER_URL"):
        yield os.environ["CHAT_SERVER_URL"]
    elif os.environ.get("PAGE_STAND_IN"):
        server = StandIn()
        yield server.url
        server.close()
    else:
        yield from started_server()


def started_server():
    script = Path(os.environ.get("CHAT_SERVER_DIR") or ROOT) / "chat_server.py"       # see conftest.py
    process = subprocess.Popen([sys.executable, script, "--port", "0", "--host", "127.0.0.1"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+\S*", line):
            break
    else:
        pytest.fail("chat_server.py did not start:\n" + "".join(lines))
    threading.Thread(target=process.stdout.read, daemon=True).start()      # a full pipe would stop the server
    yield found[0].rstrip("/") + "/"
    process.terminate()
    process.communicate(timeout=30)


@contextlib.contextmanager
def fake_front(**settings):
    """The real HTTP side over a pool without a model, in a thread: its URL."""
    loop, url, stop = asyncio.new_event_loop(), queue.SimpleQueue(), asyncio.Event()

    async def serve():
        async with serving(FakePool(), chat_server.Settings(**settings)) as at:
            url.put(at + settings.get("prefix", "") + "/")
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield url.get(timeout=30)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


class HeldFront:
    """The real HTTP side, in a thread, over a pool whose answers have one more word with each `admit`."""

    WORDS = ["one ", "two ", "three ", "four ", "five"]

    def __init__(self):
        self.loop, started = asyncio.new_event_loop(), queue.SimpleQueue()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(started),))
        self.thread.start()
        self.url = started.get(timeout=30)

    async def _serve(self, started):
        self.stop, self.pool, self.gate = asyncio.Event(), FakePool(self.WORDS), asyncio.Semaphore(0)
        self.gate.wait, self.pool.gate = self.gate.acquire, self.gate
        app = chat_server.create_app(self.pool, chat_server.Settings())
        with chat_server.listen_on("127.0.0.1", 0) as listener:
            async with chat_server.serving(app, listener) as self.runner:
                started.put(f"http://127.0.0.1:{listener.getsockname()[1]}/")
                await self.stop.wait()

    def run(self, work):
        async def call():
            return work()
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)

    def admit(self, count):
        self.run(lambda: [self.gate.release() for _ in range(count)])

    def drop(self):
        """Every connection breaks."""
        self.run(lambda: [connection.transport.abort() for connection in self.runner.server.connections if connection.transport])

    def until_open(self, count):
        asyncio.run_coroutine_threadsafe(self.pool.until_open(count), self.loop).result(30)

    def close(self):
        self.run(self.stop.set)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def held_front():
    front = HeldFront()
    yield front
    front.close()


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def page(browser):
    """A page in a fresh browser profile that fails the test on any script error or violation of the security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(SLOW_MS)
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert faults == []


def message_box(page):
    return page.get_by_role("textbox", name="Message")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def answers(page):
    return page.get_by_role("article", name="Assistant")


def questions(page):
    return page.get_by_role("article", name="You")


def ask(page, text):
    message_box(page).fill(text)
    button(page, "Send").click()


def command(page, text):
    message_box(page).fill(text)
    message_box(page).press("Enter")


def expect_answered(page, count=1):
    expect(answers(page)).to_have_count(count, timeout=SLOW_MS)
    expect(answers(page).last).to_contain_text("tok/s", timeout=SLOW_MS)


def open_page(page, url, path=""):
    page.goto(url + path)
    expect(page.get_by_text(re.compile("^Running"))).to_be_visible(timeout=SLOW_MS)


# with a model ---------------------------------------------------------------------------------------------------------

def test_an_answer_streams_in_and_shows_its_speed(page, server_url):
    open_page(page, server_url)
    command(page, "/temperature 0")
    ask(page, "What is the capital of Japan?")
    expect(questions(page)).to_contain_text("What is the capital of Japan?")
    expect(answers(page)).to_contain_text("The capital of Japan is Tokyo.", timeout=SLOW_MS)
    expect(answers(page)).to_contain_text(re.compile(r"[\d.]+ tok/s · TTFT \d+ ms · \d+ tokens"), timeout=SLOW_MS)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_stop_ends_the_answer_and_keeps_its_text(page, server_url):
    open_page(page, server_url)
    ask(page, "Write a very long story about a river, with many chapters.")
    expect(answers(page).locator(".body")).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SLOW_MS)
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")
    expect(button(page, "Send")).to_be_visible()
    expect(button(page, "Stop")).to_be_hidden()
    expect(answers(page).locator(".body")).to_have_text(re.compile(r"\w+ \w+"))
    expect(button(page, "Regenerate")).to_be_enabled()


def test_a_real_answer_goes_on_after_a_reload_and_can_be_stopped(page, server_url):
    open_page(page, server_url)
    ask(page, "Write a very long story about a river, with many chapters.")
    expect(answers(page).locator(".body")).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SLOW_MS)
    page.reload()
    before = answers(page).locator(".body").inner_text()
    expect(answers(page).locator(".body")).to_have_text(re.compile(r"[\s\S]{%d}" % (len(before) + 100)), timeout=SLOW_MS)
    assert answers(page).locator(".body").inner_text().startswith(before[:-5])
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")


def test_escape_stops_the_answer_too(page, server_url):
    open_page(page, server_url)
    ask(page, "Write a very long story about a mountain, with many chapters.")
    expect(answers(page).locator(".body")).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SLOW_MS)
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")


def test_new_chat_clears_and_the_last_chat_can_be_brought_back(page, server_url):
    open_page(page, server_url)
    command(page, "/maxtokens 8")
    ask(page, "Say hello")
    expect_answered(page)
    button(page, "New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    button(page, "Bring back the last chat").click()
    expect(questions(page)).to_contain_text("Say hello")
    expect(answers(page)).to_have_count(1)


def test_an_edited_question_is_asked_anew(page, server_url):
    open_page(page, server_url)
    command(page, "/temperature 0")
    command(page, "/maxtokens 24")
    ask(page, "Say hello")
    expect_answered(page)
    button(page, "Edit").click()
    page.get_by_role("textbox", name="Edited text").fill("What is the capital of Japan?")
    button(page, "Update").click()
    expect(questions(page)).to_have_count(1)
    expect(questions(page)).to_contain_text("What is the capital of Japan?")
    expect(answers(page)).to_contain_text("Tokyo", timeout=SLOW_MS)


def test_a_reload_keeps_conversation_settings_and_draft(page, server_url):
    open_page(page, server_url)
    command(page, "/maxtokens 12")
    ask(page, "Say hello")
    expect_answered(page)
    before = answers(page).inner_text()
    message_box(page).fill("half a thought")
    page.reload()
    expect(questions(page)).to_contain_text("Say hello")
    assert answers(page).inner_text() == before
    expect(message_box(page)).to_have_value("half a thought")
    button(page, "Settings").click()
    expect(page.get_by_role("spinbutton", name="Max tokens")).to_have_value("12")


def test_the_page_works_with_the_keyboard_alone(page, server_url):
    open_page(page, server_url)
    expect(message_box(page)).to_be_focused()
    page.keyboard.type("/maxtokens 8\n")
    page.keyboard.type("Say")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("hello\n")
    expect(questions(page).locator(".body")).to_have_text("Say\nhello", use_inner_text=True)
    expect_answered(page)
    expect(message_box(page)).to_be_focused()
    expect(message_box(page)).to_have_value("")


# names ----------------------------------------------------------------------------------------------------------------

def test_the_promised_accessible_names_are_there(page, stand_in):
    open_page(page, stand_in.url)
    expect(page.get_by_role("log", name="Conversation", exact=True)).to_be_visible()
    for name in ("Send", "New chat", "Settings", "Export", "Import", "Server"):
        expect(button(page, name)).to_have_count(1)
    ask(page, "markdown")
    expect_answered(page)
    expect(page.get_by_role("log").get_by_role("article", name="You", exact=True)).to_have_count(1)
    expect(page.get_by_role("log").get_by_role("article", name="Assistant", exact=True)).to_have_count(1)
    for name, count in (("Edit", 1), ("Regenerate", 1), ("Copy", 2), ("Copy code", 2)):
        expect(button(page, name)).to_have_count(count)
    ask(page, "story")
    expect(button(page, "Stop")).to_be_visible()
    button(page, "Stop").click()


def test_a_screen_reader_hears_start_and_finish_but_not_every_token(page, stand_in):
    open_page(page, stand_in.url)
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "off")
    ask(page, "held markdown")
    expect(page.locator("#announcer")).to_have_text("Answering")
    stand_in.release()
    expect(page.locator("#announcer")).to_have_text("Answer finished")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out_of_the_window(page, stand_in, width):
    page.set_viewport_size({"width": width, "height": 700})
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    for name in ("New chat", "Export", "Import", "Server", "Settings", "Send"):
        expect(button(page, name)).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# streams --------------------------------------------------------------------------------------------------------------

def test_stop_closes_the_request_so_that_the_server_can_cancel_it(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(answers(page)).to_contain_text("and then")
    button(page, "Stop").click()
    assert stand_in.cancelled.wait(10)


def test_new_chat_while_an_answer_streams_cancels_it(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(answers(page)).to_contain_text("and then")
    button(page, "New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    assert stand_in.cancelled.wait(10)
    ask(page, "again")
    expect(answers(page)).to_contain_text("You said: again")


def ask_for_two_words(page, front):
    open_page(page, front.url)
    ask(page, "count")
    front.admit(2)
    expect(answers(page).locator(".body")).to_have_text("one two")


def expect_all_words(page, front):
    """The whole answer, from one request, as if nothing had happened."""
    expect(answers(page).locator(".body")).to_have_text("one two three four five")
    expect_answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(button(page, "Send")).to_be_visible()
    assert len(front.pool.requests) == 1


@pytest.mark.parametrize("seen", ["nothing", "something"])
def test_a_reload_in_the_middle_of_an_answer_loses_nothing(page, held_front, seen):
    if seen == "something":
        ask_for_two_words(page, held_front)
    else:                   # not even the first word was there
        open_page(page, held_front.url)
        ask(page, "count")
        held_front.until_open(1)
        held_front.admit(2)
    page.reload()
    expect(answers(page).locator(".body")).to_have_text("one two")
    expect(button(page, "Stop")).to_be_visible()
    held_front.admit(1)
    expect(answers(page).locator(".body")).to_have_text("one two three")
    page.reload()
    held_front.admit(2)
    expect_all_words(page, held_front)


def test_an_answer_that_ended_while_the_page_was_away_is_there_when_it_comes_back(page, held_front):
    ask_for_two_words(page, held_front)
    page.goto("about:blank")
    held_front.admit(3)
    held_front.until_open(0)
    page.goto(held_front.url)
    expect_all_words(page, held_front)


def test_stop_still_works_after_a_reload(page, held_front):
    ask_for_two_words(page, held_front)
    page.reload()
    expect(answers(page).locator(".body")).to_have_text("one two")
    held_front.until_open(1)
    button(page, "Stop").click()
    held_front.until_open(0)
    expect(answers(page)).to_contain_text("stopped")
    page.reload()
    expect(answers(page).locator(".body")).to_have_text("one two")
    expect(button(page, "Send")).to_be_visible()


def test_a_dropped_connection_is_taken_up_again(page, held_front):
    ask_for_two_words(page, held_front)
    held_front.drop()
    held_front.admit(1)
    expect(answers(page).locator(".body")).to_have_text("one two three")
    held_front.drop()
    held_front.admit(2)
    expect_all_words(page, held_front)


def test_while_the_network_is_away_the_page_says_so_and_goes_on_when_it_is_back(page, held_front):
    ask_for_two_words(page, held_front)
    page.context.set_offline(True)
    held_front.drop()
    expect(page.locator("#state")).to_contain_text("The connection is lost; trying again")
    held_front.admit(3)
    held_front.until_open(0)
    page.context.set_offline(False)
    expect_all_words(page, held_front)


def test_stop_works_while_the_network_is_away(page, held_front):
    ask_for_two_words(page, held_front)
    page.context.set_offline(True)
    held_front.drop()
    expect(page.locator("#state")).to_contain_text("The connection is lost; trying again")
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")


def test_a_server_that_no_longer_has_the_answer_leaves_it_as_interrupted(page, held_front):
    ask_for_two_words(page, held_front)
    page.route("**/v1/streams/*", lambda route: route.fulfill(status=404, body="{}"))
    page.reload()
    expect(answers(page)).to_contain_text("interrupted")
    expect(answers(page).locator(".body")).to_have_text("one two")
    expect(button(page, "Regenerate")).to_be_enabled()


def test_waiting_is_shown_and_pings_are_no_text(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "silence")
    expect(page.get_by_text("Waiting for the first token")).to_be_visible()
    stand_in.release()
    expect_answered(page)
    expect(answers(page).locator(".body")).to_have_text("Here I am.")


def test_characters_split_over_chunks_arrive_whole(page, stand_in):
    page.add_init_script("""const real = fetch;
        const transform = (chunk, out) => chunk.forEach(byte => out.enqueue(Uint8Array.of(byte)));
        window.fetch = async (url, options) => {
            const response = await real(url, options);
            if (!url.endsWith("chat/completions")) return response;
            return new Response(response.body.pipeThrough(new TransformStream({transform})));
        };""")
    open_page(page, stand_in.url)
    ask(page, "world")
    expect_answered(page)
    expect(answers(page).locator(".body")).to_have_text("日本の首都は東京です。👩‍🚀 κόσμε")
    expect(answers(page)).to_contain_text("cut at the length limit")


def test_regenerate_replaces_the_last_answer(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect(answers(page)).to_contain_text("You said: one (answer 1)")
    ask(page, "two")
    expect(answers(page).last).to_contain_text("You said: two (answer 2)")
    button(page, "Regenerate").click()
    expect(answers(page).last).to_contain_text("You said: two (answer 3)")
    expect(answers(page)).to_have_count(2)
    roles = [message["role"] for message in stand_in.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_an_edit_in_the_middle_drops_what_came_after(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page, 1)
    ask(page, "two")
    expect_answered(page, 2)
    button(page, "Edit").first.click()
    page.get_by_role("textbox", name="Edited text").press("Escape")
    expect(questions(page)).to_have_count(2)
    button(page, "Edit").first.click()
    page.get_by_role("textbox", name="Edited text").fill("three")
    page.get_by_role("textbox", name="Edited text").press("Enter")
    expect(answers(page)).to_contain_text("You said: three (answer 3)")
    expect(questions(page)).to_have_count(1)
    assert stand_in.bodies[-1]["messages"] == [{"role": "user", "content": "three"}]


def test_settings_and_slash_commands_reach_the_server(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page, 1)
    assert set(stand_in.bodies[0]) == {"messages", "resumable", "truncate"}         # untouched settings are the server's business
    command(page, "/topk 7")
    expect(page.get_by_role("log").get_by_text("topk is now 7.")).to_be_visible()
    button(page, "Settings").click()
    page.get_by_role("spinbutton", name="Temperature").fill("0.25")
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    button(page, "Done").click()
    ask(page, "two")
    expect_answered(page, 2)
    body = stand_in.bodies[1]
    assert (body["top_k"], body["temperature"]) == (7, 0.25)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    command(page, "/help")
    expect(page.get_by_role("log").get_by_text("/temperature N")).to_be_visible()
    command(page, "/clear")
    expect(page.get_by_role("article")).to_have_count(0)
    ask(page, "/etc/passwd is what?")
    expect(answers(page)).to_contain_text("You said: /etc/passwd is what?")


# errors ---------------------------------------------------------------------------------------------------------------

def test_a_refused_request_is_an_alert_with_the_servers_words(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "refuse")
    expect(page.get_by_role("alert")).to_contain_text("Message 1 has 8,001 characters; the limit is 8,000 (HTTP 400)")
    expect(button(page, "Regenerate")).to_be_enabled()


def test_an_overloaded_server_can_be_asked_again(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "overload")
    expect(page.get_by_role("alert")).to_contain_text("The queue is full (HTTP 429, try again in 1 s)")
    button(page, "Regenerate").click()
    expect(answers(page)).to_contain_text("You said: overload")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("question, text", [("broken", "The worker died"), ("cut off", "ended before the answer did")])
def test_an_error_in_the_stream_keeps_the_text_before_it(page, stand_in, question, text):
    open_page(page, stand_in.url)
    ask(page, question)
    expect(page.get_by_role("alert")).to_contain_text(text)
    expect(answers(page).locator(".body")).to_have_text("Half an answer")
    ask(page, "go on")
    expect(answers(page).last).to_contain_text("You said: go on")


def test_a_server_that_went_away_is_an_alert(page, stand_in):
    open_page(page, stand_in.url)
    page.route("**/chat/completions", lambda route: route.abort())
    ask(page, "anybody there?")
    expect(page.get_by_role("alert")).to_contain_text("is the server running?")


def test_while_the_model_loads_the_page_says_so_and_then_wakes_up(page, stand_in):
    stand_in.loading = {"stage": "reading weights", "fraction": 0.43}
    page.goto(stand_in.url)
    expect(page.locator("#state")).to_contain_text("reading weights 43\u00a0%")
    message_box(page).fill("early")
    expect(button(page, "Send")).to_be_disabled()
    message_box(page).press("Enter")
    expect(page.get_by_role("article")).to_have_count(0)
    stand_in.loading = None
    expect(button(page, "Send")).to_be_enabled()
    button(page, "Send").click()
    expect(answers(page)).to_contain_text("You said: early")


def test_a_server_that_stops_in_between_can_be_asked_again_when_it_is_back(page, stand_in):
    open_page(page, stand_in.url)
    stand_in.loading = {"stage": "draining", "fraction": None}
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("The server is stopping (HTTP 503)")
    expect(button(page, "Regenerate")).to_be_disabled()
    expect(page.locator("#state")).to_contain_text("draining")
    stand_in.loading = None
    button(page, "Regenerate").click()
    expect(answers(page)).to_contain_text("You said: hello")


# rendering ------------------------------------------------------------------------------------------------------------

def test_markdown_code_tables_and_formulas_are_drawn(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    answer = answers(page)
    expect(answer.get_by_role("heading", name="Sorting")).to_be_visible()
    expect(answer.locator("strong")).to_have_text("stable")
    expect(answer.get_by_role("link", name="the page")).to_have_attribute("rel", "noopener noreferrer")
    expect(answer.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(answer.locator("pre").last).to_have_text("an open fence, never closed\n", use_inner_text=False)
    expect(answer.get_by_role("table").get_by_role("cell")).to_have_count(4)
    expect(answer.locator("math")).to_have_count(3)
    expect(answer.locator("blockquote")).to_have_text("It costs $5 to $9, which is no formula.")


def test_an_open_code_block_is_already_code_and_finished_blocks_are_not_drawn_again(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "held markdown")
    expect(answers(page).locator("pre")).to_contain_text("a, b = pair")
    heading = answers(page).locator("h1").element_handle()
    stand_in.release()
    expect_answered(page)
    assert heading.evaluate("node => node.isConnected")
    expect(answers(page).locator("h1")).to_have_count(1)
    expect(answers(page).locator("pre").first).to_contain_text("both at once")


@pytest.mark.parametrize("text", [MARKDOWN, HOSTILE, BLOCKS], ids=["usual", "hostile", "odd"])
def test_text_drawn_piece_by_piece_equals_text_drawn_at_once(page, stand_in, text):
    open_page(page, stand_in.url)
    grown, whole = page.evaluate("""text => {
        const [grown, whole] = [0, 1].map(() => assistantView({role: "assistant", content: ""}));
        for (let end = 0; end < text.length; end++) drawMarkdown(grown, text.slice(0, end), false);
        drawMarkdown(grown, text, true);
        drawMarkdown(whole, text, true);
        return [grown.body.innerHTML, whole.body.innerHTML];
    }""", text)
    assert re.sub(r">\n", ">", grown) == re.sub(r">\n", ">", whole)          # newlines between blocks do not show


def test_a_hostile_answer_is_inert(page, stand_in):
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    open_page(page, stand_in.url)
    ask(page, "hostile")
    expect_answered(page)
    answer = answers(page).locator(".body")
    expect(answer).to_contain_text("the end")
    expect(answer).to_contain_text("<script>window.hacked = 1</script>")      # shown as the text it is
    expect(answer.locator("script, img, iframe, svg, style, [id], [style], [onclick], [onerror]")).to_have_count(0)
    assert answer.evaluate("node => [...node.querySelectorAll('[href]')].map(link => link.getAttribute('href'))") \
        == ["https://example.org/pixel.png"]
    for link in answer.locator("a").all():
        link.dispatch_event("click")
    ask(page, HOSTILE)                                                         # and as a question
    expect_answered(page, 2)
    assert page.evaluate("window.hacked") is None
    assert [url for url in fetched if not url.startswith(stand_in.url)] == []


def test_copy_code_copies_exactly_the_code(page, stand_in):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    button(page, "Copy code").first.click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == \
        "def swap(pair: tuple) -> tuple:\n    a, b = pair  # both at once\n    return b, a"


# typing and scrolling -------------------------------------------------------------------------------------------------

def test_enter_that_confirms_an_input_method_does_not_send(page, stand_in):
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
    expect(questions(page).locator(".body")).to_have_text("日本")


def test_on_a_touch_screen_enter_is_a_new_line(browser, stand_in):
    context = browser.new_context(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_page(page, stand_in.url)
    message_box(page).fill("one")
    message_box(page).press("Enter")
    expect(message_box(page)).to_have_value("one\n")
    button(page, "Send").tap()
    expect(questions(page).locator(".body")).to_have_text("one")
    context.close()


def test_the_log_follows_its_end_until_the_reader_scrolls_up(page, stand_in):
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


# where it runs --------------------------------------------------------------------------------------------------------

def test_the_page_works_under_a_sub_path(page):
    server = StandIn("/deep/down")
    open_page(page, server.url)
    ask(page, "hello")
    expect(answers(page)).to_contain_text("You said: hello")
    server.close()


def test_the_page_opens_from_a_file_and_says_which_server_it_wants(page, stand_in):
    page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
    page.goto((ROOT / "static" / "index.html").as_uri())
    expect(page.locator("#state")).to_contain_text("No server at http://127.0.0.1:8000/")
    page.route(stand_in.url + "**", lambda route: route.fulfill(
        response=route.fetch(), headers={"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*"}))
    button(page, "Server").click()
    page.get_by_role("textbox", name="URL").fill(stand_in.url)
    page.get_by_label("API key").fill("secret")
    button(page, "Done").click()
    expect(page.get_by_role("heading", name="stand-in-135m").first).to_be_visible()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "hello")
    assert sent.value.headers["authorization"] == "Bearer secret"
    expect(answers(page)).to_contain_text("You said: hello")


def test_a_server_with_keys_asks_for_one_and_the_page_keeps_it(page):
    keys = (chat_server.ApiKey.hashed("right key", "alice"),)
    with fake_front(keys=keys) as url:
        page.goto(url)
        expect(page.get_by_role("alert")).to_have_text("This server wants an API key.")
        page.keyboard.type("wrong")             # the field has the focus
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not know this API key.")
        page.get_by_label("API key").fill("right key")
        button(page, "Done").click()
        expect(page.get_by_role("heading", name="fake-model").first).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="fake-model").first).to_be_visible()
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")
        expect(page.get_by_role("alert")).to_have_count(0)


def test_the_page_works_under_the_server_s_own_prefix(page):
    with fake_front(prefix="/deep/down") as url:
        open_page(page, url.rstrip("/"))            # the server adds the slash
        assert page.url == url
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")


def test_a_page_from_a_file_talks_to_a_server_that_admits_it(page):
    with fake_front(cors_origin=("null",), keys=(chat_server.ApiKey.hashed("key", "alice"),)) as url:
        page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
        page.goto((ROOT / "static" / "index.html").as_uri())
        button(page, "Server").click()
        page.get_by_role("textbox", name="URL").fill(url)
        page.get_by_label("API key").fill("key")
        button(page, "Done").click()
        expect(page.get_by_role("heading", name="fake-model").first).to_be_visible()
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")


def test_an_exported_conversation_can_be_imported(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "keep me")
    expect_answered(page)
    with page.expect_download() as download:
        button(page, "Export").click()
    path = tmp_path / "chat.json"
    download.value.save_as(path)
    chat = json.loads(path.read_text())
    assert chat["model"] == "stand-in-135m"
    assert [message["content"] for message in chat["messages"]][0] == "keep me"
    assert chat["messages"][1]["stats"]["tokens_per_second"] == 212.3
    button(page, "New chat").click()
    page.locator("#file").set_input_files(path)
    expect(questions(page)).to_contain_text("keep me")
    expect(answers(page)).to_contain_text("212.3 tok/s")
    path.write_text('{"messages": [{"role": "user"}]}')
    page.locator("#file").set_input_files(path)
    expect(page.get_by_role("log").get_by_text("is not a conversation")).to_be_visible()
    expect(questions(page)).to_contain_text("keep me")


def test_a_second_tab_shows_the_same_conversation(page, stand_in):
    open_page(page, stand_in.url)
    other = page.context.new_page()
    open_page(other, stand_in.url)
    ask(page, "hello")
    expect_answered(page)
    expect(answers(other)).to_contain_text("You said: hello")
    expect(answers(other)).to_contain_text("tok/s")
