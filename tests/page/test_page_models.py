"""The page of a server of many models: a choice of them, which a chat remembers."""

import re

import pytest

from browsing import SLOW_MS, answers, ask, button, chats, expect, needs_browser, open_page, said, started_server, visitor

pytestmark = needs_browser


@pytest.mark.slow
def test_a_chat_chooses_its_model_and_remembers_it(browser, nanochat_fixtures, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    (tmp_path / "config.toml").write_text("".join(f'[[models]]\nname = "{name}"\npath = "{path}"\ntemperature = 0\nmax-tokens = 16\n' for name, path in (
        ("first", nanochat_fixtures / "gen5"), ("second", nanochat_fixtures / "gen3"), ("broken", tmp_path / "broken.gguf"))))
    with started_server("--config", str(tmp_path / "config.toml"), "--kv-cache-memory", "8M") as url, visitor(browser) as page:
        open_page(page, url)
        choice = page.get_by_role("combobox", name="Model", exact=True)
        expect(choice).to_have_value("first")
        expect(choice.locator("option")).to_have_text([re.compile(r"^first · 2\d\d MB$"), re.compile(r"^second · 2\d\d MB$"), "broken · failed"])
        expect(choice.locator("option").nth(2)).to_be_disabled()
        choice.select_option("second")
        asked = []
        page.on("request", lambda request: asked.append(request.post_data_json) if request.url.endswith("/chat/completions") else None)
        ask(page, "hello")
        expect(page.get_by_text("Loading second")).to_be_visible(timeout=SLOW_MS)
        expect(button(page, "Regenerate")).to_be_visible(timeout=SLOW_MS)
        assert asked[0]["model"] == "second" and said(answers(page)).inner_text()
        choice.focus()
        expect(choice.locator("option").nth(1)).to_have_text(re.compile("second · loaded · "))
        button(page, "New chat").click()
        expect(choice).to_have_value("second")      # as in the chat before
        choice.select_option("first")
        chats(page).first.click()
        expect(choice).to_have_value("second")
        page.reload()
        expect(choice).to_have_value("second")
