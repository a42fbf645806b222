"""Pages of other origins cannot make the server compute; the server's own page works by every name."""

import contextlib
import http.server
import json
import re
import threading
import urllib.request

import pytest

from browsing import answers, ask, expect, fake_front, needs_browser, open_page
from nightly import by_day

pytestmark = needs_browser

# Browsers send no `Sec-Fetch-Site` to a plain http address with a name, such as chat.test here (see `browser`).

@contextlib.contextmanager
def foreign_page(name):
    """The URL of somebody else's web server, with an empty page."""
    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer((name if name[0].isdigit() else "127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://{name}:{server.server_port}/"
        finally:
            server.shutdown()


FETCH = """async ([url, body]) => {
    const sent = {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"}, body}
    await fetch(url, sent).catch(() => 0)
}"""
FORM = """([url, body]) => {
    const form = document.createElement("form"), input = document.createElement("input")
    Object.assign(form, {method: "POST", action: url, enctype: "text/plain"})
    Object.assign(input, {name: body.slice(0, -1) + ', "x": "', value: '"}'})
    form.append(input)
    document.body.append(form)
    form.submit()
}"""


def posts_answered(url):
    """How many requests were answered, and the statuses of posted chats."""
    text = urllib.request.urlopen(url + "metrics").read().decode()
    answers = sum(float(count) for count in re.findall(r"^chat_server_requests_total{.*} (\S+)$", text, re.MULTILINE))
    return answers, set(re.findall(r'http_responses_total{route="(?:/v1)?/chat/completions",status="(\d+)"}', text))


@pytest.mark.parametrize("name, server_name", by_day([
    ("evil.test", "chat.test"), ("chat.test", "chat.test"), ("evil.test", "127.0.0.1"), ("127.0.0.2", "127.0.0.1"), ("localhost", "localhost")],
    ("evil.test", "chat.test"), ("127.0.0.2", "127.0.0.1")))
@pytest.mark.parametrize("post", [FETCH, FORM], ids=["fetch", "form"])
def test_a_foreign_page_makes_nothing_computed(page, name, server_name, post):
    with fake_front(host="127.0.0.1", allowed_host=("chat.test",)) as url, foreign_page(name) as foreign_url:
        target = url.replace("127.0.0.1", server_name) + "chat/completions"
        page.goto(foreign_url)
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
        page.evaluate(post, [target, body])
        if post is FORM:
            page.wait_for_url(target)
        assert posts_answered(url) == (0, {"403"})


def test_the_page_may_ask_by_name_over_plain_http(page):
    with fake_front(host="127.0.0.1", allowed_host=("chat.test",)) as url:
        open_page(page, url.replace("127.0.0.1", "Chat.test."))
        ask(page, "hello")
        expect(answers(page)).to_contain_text("Hello, world!")
        assert posts_answered(url) == (1, {"200"})
