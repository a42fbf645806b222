"""The panel of a model that only makes vectors: it compares texts, and loads with such a model alone."""

import json

import pytest

from browsing import button, expect, fake_front, needs_browser, open_page

pytestmark = needs_browser
VECTORS = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 4.0], "<b>d</b>": [1.0, 0.0]}


@pytest.fixture
def embedder(page):
    """The page of a server whose only model embeds. Yields the bodies that it was sent."""
    bodies, able = [], {"chat": False, "completion": False, "embedding": True, "rerank": False}

    def embed(route):
        bodies.append(json.loads(route.request.post_data))
        if any(text not in VECTORS for text in bodies[-1]["input"]):
            return route.fulfill(status=400, json={"error": {"message": "input[0] is <i>odd</i>", "code": None}})
        return route.fulfill(json={"data": [{"embedding": VECTORS[text]} for text in bodies[-1]["input"]]})

    with fake_front() as url:
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "vectors-1", "owned_by": "chat_server", "capabilities": able}]}))
        page.route("**/v1/embeddings", embed)
        open_page(page, url)
        yield bodies


def compare(page, text):
    page.get_by_role("textbox", name="Texts, one on each line").fill(text)
    button(page, "Compare").click()


def test_texts_become_a_table_of_similarities(page, embedder):
    compare(page, "a\n\n b \nc\n<b>d</b>\n")
    cells = page.locator(".vectors td")
    expect(cells).to_have_text("1.00 0.00 0.60 1.00 0.00 1.00 0.80 0.00 0.60 0.80 1.00 0.60 1.00 0.00 0.60 1.00".split())
    assert embedder == [{"model": "vectors-1", "input": ["a", "b", "c", "<b>d</b>"]}]
    expect(page.locator(".vectors tbody th")).to_have_text(["1 a", "2 b", "3 c", "4 <b>d</b>"])
    expect(page.locator(".vectors [role=status]")).to_have_text("Cosines of vectors of 2 numbers.")
    compare(page, "\n".join(["a"] * 99))
    expect(cells).to_have_count(24 * 24)


def test_what_the_server_refuses_is_said_as_text(page, embedder):
    compare(page, "a")
    expect(page.locator(".vectors td")).to_have_text(["1.00"])
    compare(page, "odd")
    expect(page.locator(".vectors [role=status]")).to_have_text("input[0] is <i>odd</i> (HTTP 400).")
    expect(page.locator(".vectors td")).to_have_count(0)
    compare(page, " \n ")
    assert len(embedder) == 2


def test_a_chat_model_does_not_load_vectors_js(page):
    with fake_front() as url:
        open_page(page, url)
        expect(page.locator(".vectors")).to_have_count(0)
        assert page.locator("script[src*=vectors]").count() == 0
    able = {"chat": False, "completion": False, "embedding": False, "rerank": True}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "ranks-1", "owned_by": "chat_server", "capabilities": able}]}))
    with fake_front() as url:
        open_page(page, url)
        expect(page.locator(".empty")).to_contain_text("ranks-1 ranks documents; it cannot chat.")
        assert page.locator("script[src*=vectors]").count() == 0
