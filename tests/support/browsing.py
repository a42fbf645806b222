"""What the tests of the page share: a browser, servers, and functions for what people do. conftest.py imports
the fixtures.

`CHAT_SERVER_URL` names a running server to use instead of starting one; `PAGE_STAND_IN=1` uses the stand-in
for all tests.
"""

import asyncio
import contextlib
import os
import queue
import re
import shutil
import threading
from pathlib import Path

import pytest

from nightly import by_day

try:
    from playwright import sync_api as playwright
    from playwright.sync_api import expect
    expect.set_options(timeout=15_000)      # for busy machines
except ImportError:
    playwright = expect = None

ROOT = Path(__file__).resolve().parents[2]
# the headless shell is the same browser without its windows; it needs half the processor time
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not (CHROMIUM and playwright), reason="no chromium on PATH (Debian: apt install chromium-headless-shell)"
                                   if playwright else "the page is tested with playwright")
SLOW_MS = 30_000            # a real model on a busy machine
WINDOW = {"width": 1280, "height": 800}


# servers and pages ----------------------------------------------------------------------------------------------------

class Running:
    """The browser, and a page in it that test after test uses."""

    def __init__(self):
        self.ends = contextlib.ExitStack()
        driver = self.ends.enter_context(playwright.sync_playwright())
        self.browser = driver.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--host-resolver-rules=MAP *.test 127.0.0.1, MAP *.test. 127.0.0.1"])
        self.ends.callback(self.browser.close)
        self.context = None
        self.faults = []

    @contextlib.contextmanager
    def visit(self):
        """What `visitor` does, with the page of the last visit if that can be made as new: to open it again takes half as long."""
        if self.context is None:
            # an animation draws sixty frames a second while tests wait; visitors see them move
            self.context = new_context(self.browser, self.faults, reduced_motion="reduce")
            self.page = self.context.new_page()
            self.page.__class__ = UsedPage
            self.console = self.context.new_cdp_session(self.page)
        self.faults.clear()
        self.page.visited = set()
        self.page.is_new = True
        try:
            yield self.page
        finally:
            found = [*self.faults]
            if self.page.is_new:
                self.leave()
            else:
                self.context.close()
                self.context = None
        assert found == [], found

    def leave(self):
        """Forget what the page has stored, and whatever it was told."""
        page = self.page
        page.unroute_all(behavior="ignoreErrors")
        if page.url.startswith("http"):
            page.evaluate("sessionStorage.clear()")
        page.goto("about:blank")        # what a page writes when it ends goes, too
        for origin in page.visited:
            self.console.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        self.console.send("Page.resetNavigationHistory")
        page.mouse.move(-9, -9)
        page.emulate_media(color_scheme="null", media="null", reduced_motion="reduce", forced_colors="null", contrast="null")
        page.set_viewport_size(WINDOW)

    def close(self):
        self.ends.close()


if playwright:
    class UsedPage(playwright.Page):
        """A page that notes which origins it visits, and whether it is told what it cannot be made to forget."""

        def goto(self, url, **options):
            self.visited.add("/".join(url.split("/", 3)[:3]))
            return super().goto(url, **options)

        @property
        def context(self):
            self.is_new = False
            return super().context

        @property
        def clock(self):
            self.is_new = False
            return super().clock

    def noted(name):
        def method(self, *words, **options):
            self.is_new = False
            return getattr(playwright.Page, name)(self, *words, **options)
        return method

    for name in ("add_init_script", "add_locator_handler", "close", "expose_binding", "expose_function", "go_back", "on", "once", "route_web_socket",
                 "set_default_timeout", "set_extra_http_headers"):
        setattr(UsedPage, name, noted(name))

running = []        # the browser, while tests of the page follow each other


@pytest.fixture(scope="module")
def browser():
    if not running:
        running.append(Running())
    return running[0].browser


def end_browser():
    """Its event loop must not outlive the tests of the page."""
    if running:
        running.pop().close()


@pytest.fixture(scope="session")
def server_url():
    """The server of the main tests, with a real model."""
    if os.environ.get("CHAT_SERVER_URL"):
        yield os.environ["CHAT_SERVER_URL"]
    elif os.environ.get("PAGE_STAND_IN"):
        from page_server import StandIn
        server = StandIn()
        yield server.url
        server.close()
    else:
        with started_server() as url:
            yield url


@contextlib.contextmanager
def started_server(*flags, forked=True):
    """The URL of chat_server.py; its front is a process that Python starts only if it is not `forked`."""
    from real_server import server
    with server(*flags, forked=forked) as (_, url):
        yield url + "/"


@contextlib.contextmanager
def fake_front(pieces=("Hello", ", ", "world!"), tool_format=None, chats=True, pool=None, **settings):
    """The URL of the real HTTP side over a pool without a model, in a thread."""
    from chatlm.common.config import Settings
    from fake_pool import FakePool, Letters, serving
    loop, url, stop, pool = asyncio.new_event_loop(), queue.SimpleQueue(), asyncio.Event(), pool or FakePool(pieces)
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format, pool.tokenizer.has_chat_template = tool_format, chats

    async def serve():
        async with serving(pool, Settings(**settings)) as at:
            url.put(at + settings.get("prefix", "") + "/")
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield url.get(timeout=30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


class HeldFront:
    """The real HTTP side, in a thread, over a pool whose answers get another word with each `admit`."""

    WORDS = ["one ", "two ", "three ", "four ", "five"]

    def __init__(self, port=0):
        self.loop, started = asyncio.new_event_loop(), queue.SimpleQueue()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(started, port),))
        self.thread.start()
        self.url = started.get(timeout=30)

    async def _serve(self, started, port):
        from chatlm.front.front import create_app
        from chatlm.common.config import Settings
        from chatlm.front.server import access, connections
        from fake_pool import FakePool, catalogue_of
        self.stop, self.pool, self.gate = asyncio.Event(), FakePool(self.WORDS), asyncio.Semaphore(0)
        self.gate.wait, self.pool.gate = self.gate.acquire, self.gate
        app = create_app(catalogue_of(self.pool, Settings()), Settings())
        with access.listen_on("127.0.0.1", port) as listener:
            async with connections.serving(app, listener) as self.runner:
                started.put(f"http://127.0.0.1:{listener.getsockname()[1]}/")
                await self.stop.wait()

    def run(self, work):
        async def call():
            return work()
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)

    def admit(self, count):
        self.run(lambda: [self.gate.release() for _ in range(count)])

    def drop(self):
        """Break every connection."""
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


@pytest.fixture(scope="session")
def one_stand_in():
    from page_server import StandIn
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def stand_in(one_stand_in):
    one_stand_in.forget()
    return one_stand_in


def new_context(browser, faults, **options):
    """A fresh browser profile that adds to `faults` any script error or violation of the security policy."""
    context = browser.new_context(**{"viewport": WINDOW, **options})
    context.set_default_timeout(SLOW_MS)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("console", lambda message: faults.append(message.text)
               if re.search("Content Security|Trusted", message.text) else None)
    return context


@contextlib.contextmanager
def visitor(browser, **options):
    """A page in a fresh profile that fails the test on any fault."""
    faults = []
    context = new_context(browser, faults, **options)
    try:
        yield context.new_page()
    finally:
        context.close()
    assert faults == [], faults


@pytest.fixture
def page(browser):
    with running[0].visit() as page:
        yield page


# what people do -------------------------------------------------------------------------------------------------------

def message_box(page):
    return page.get_by_role("textbox", name="Message", exact=True)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def answers(page):
    return page.get_by_role("article", name="Assistant")


def questions(page):
    return page.get_by_role("article", name="You")


def said(article):
    """The words of a turn, without its buttons."""
    return article.locator("> .body")


def chats(page):
    return page.get_by_role("navigation", name="Chats").get_by_role("link")


def ask(page, text):
    message_box(page).fill(text)
    button(page, "Send").click()


def command(page, text):
    message_box(page).fill(text)
    message_box(page).press("Enter")


def menu(page, *names):
    """Open the header's menu and choose an entry, also in submenus."""
    button(page, "Menu").click()
    for name in names:
        button(page, name).click()


def more(turn, name):
    """Choose an entry of a turn's own menu."""
    button(turn, "More").click()
    button(turn.page.get_by_role("group", name="More"), name).click()


def inside(turn, name):
    """Choose an entry of an answer's "Look inside"."""
    button(turn, "Look inside").click()
    button(turn.page.get_by_role("group", name="Look inside"), name).click()


def figures(answer):
    """All that is known of an answer: the panel that the line of figures below it opens."""
    answer.locator(".short").click()
    return answer.get_by_role("group", name="Figures")


def expect_answered(page, count=1):
    expect(answers(page)).to_have_count(count, timeout=SLOW_MS)
    # a few tokens that were drafted come too fast for a speed
    expect(answers(page).last).to_contain_text(re.compile("tok/s|first token after"), timeout=SLOW_MS)


def open_page(page, url, path=""):
    page.goto(url + path)
    expect(page.locator("#lamp.ready")).to_be_visible(timeout=SLOW_MS)
    settled(page)


@pytest.fixture(scope="module")
def opened_page(browser):
    """One page for all tests of a module that only call its functions: to open one takes a second."""
    from page_server import StandIn
    server = StandIn()
    with visitor(browser) as page:
        open_page(page, server.url)
        page.evaluate("Promise.all([...Parts.$('libraries').content.children].map(({src}) => Parts.need(src.match(/[^/]*(?=[.]js)/)[0].split('.')[0])))")
        yield page
    server.close()


def settled(page):
    """Wait until the page has opened its storage and written all pending changes."""
    page.wait_for_function("() => Page.started && !Store.flushing")


def reload(page):
    """Reload without waiting for anything first, as a reader may."""
    page.reload()
    expect(page.locator("#lamp.ready")).to_be_visible(timeout=SLOW_MS)
    settled(page)


AXE = ROOT / "tests" / "page" / "vendor" / "axe.min.js"
COLOUR_RULES = ["color-contrast", "link-in-text-block"]


def violations(page, known=(), **options):
    """axe-core's findings on the current page, without the elements that these selectors name: (rule, impact, elements)."""
    if not page.evaluate("'axe' in window"):
        page.evaluate("source => { (0, eval)(source); }", AXE.read_text())
    # wait until no transition of colours is running
    found = page.evaluate("""async ([exclude, options]) => {
        await Promise.all(document.getAnimations().filter(each => each.effect.getComputedTiming().endTime < 1e6).map(each => each.finished));
        return (await axe.run({exclude}, {resultTypes: ["violations"], ...options})).violations;
    }""", [list(known), options])
    return [(each["id"], each["impact"], [node["html"][:150] for node in each["nodes"]]) for each in found]


@pytest.fixture(params=by_day(["light", "dark"], "light"))
def theme(request):
    return request.param


def expect_accessible(page, *known, theme=None):
    """axe finds nothing, in this theme or in either; no other rule than those of colours depends on the theme."""
    for scheme, options in (("light", {}), ("dark", {"runOnly": COLOUR_RULES})):
        if theme in (scheme, None):
            page.emulate_media(color_scheme=scheme)
            found = violations(page, known, **options)
            assert found == [], found
