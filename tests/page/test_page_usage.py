"""The page /usage: it shows what /v1/usage says, with the key that the chat page keeps or one that is typed."""

import json
import urllib.request

import pytest

from chatlm.common.config import ApiKey
from browsing import browser, expect, expect_accessible, fake_front, needs_browser, visitor    # noqa: F401
from nightly import by_day

pytestmark = needs_browser


def chat(url, key):
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    urllib.request.urlopen(urllib.request.Request(url + "v1/chat/completions", body, headers)).read()


@pytest.mark.parametrize("path", by_day(["usage", "usage/"], "usage"))
def test_the_usage_page_shows_what_a_key_used(browser, path, theme):    # noqa: F811
    with fake_front(keys=(ApiKey.hashed("secret", "<b>ann</b>"),)) as url, visitor(browser) as page:
        url = url.rstrip("/") + "/"
        chat(url, "secret")
        page.goto(url + path)
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Show").click()
        expect(page.get_by_role("row")).to_have_count(3)        # the names of columns, a row, the sum
        expect(page.get_by_role("row").nth(1)).to_contain_text("<b>ann</b>fake-model")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect_accessible(page, theme=theme)


def test_the_usage_page_uses_the_chat_page_s_key(browser):    # noqa: F811
    with fake_front(keys=(ApiKey.hashed("secret", "ann"),)) as url, visitor(browser) as page:
        url = url.rstrip("/") + "/"
        page.add_init_script(f"localStorage.setItem('chat_server preferences', JSON.stringify({{keys: {{'{url.rstrip('/')}': 'secret'}}}}))")
        page.goto(url + "usage")
        expect(page.get_by_role("status")).to_contain_text("Nothing was used on these days.")
        chat(url, "secret")
        page.get_by_role("button", name="Show").click()
        expect(page.get_by_role("row").nth(1)).to_contain_text("ann")
