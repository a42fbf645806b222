"""The numbers that cite passages: the page makes buttons of the same ones that the server's API names."""

from pathlib import Path

import pytest

from browsing import answers, chats, expect, fake_front, menu, needs_browser, open_page
from chatlm.front.api.citations import citations_in

pytestmark = needs_browser
TEXTS = [
    "Cats [1]. Dogs [1, 3] and [2;3].", "Both [1][2], [1,2]; not [1 , 2], [9], [1, 9], [0, 1], [01] or [].", "In code `rows[1]`, ``a`[2]``, and not: [3]", "An odd ` [1] tick", "- a [1]\n- **b [2]**\n\n> c [3]",
    "```py\nrows[1]\n```\n[2]", "~~~\n[1]\n```\n[1]\n~~~\n[2]", "```rows[1]``` [2]", "```\n[1, 2]", "| a | b |\n|---|---|\n| [1] | `[2]` |", "1. x\n   ```\n   y[1]\n   ```\n2. z [2]", "# Title [1]\n\ntext [2]\nmore [3]", "`a[1]`[2]`b[3]`"]
SOURCES = ["[1] 1.md · Part *1*", "[2] 2.md · page 1 · Part *2*", "[3] 3.md · page 2 · Part *3*"]


@pytest.fixture(scope="module")
def front_url():
    with fake_front() as url:
        yield url


def test_page_and_server_find_the_same_citations(page, front_url):
    open_page(page, front_url)
    passages = [{"index": index, "vector_store_id": "vs", "file_id": f"f{index}", "filename": f"{index}.md", "page": index - 1 or None, "heading": f"Part *{index}*", "start": 0} for index in (1, 2, 3)]
    for number, text in enumerate(TEXTS):
        chat, asked = f"{number:032x}", f"{number + 1000:032x}"
        common = {"conversation": chat, "created": 1}
        page.evaluate("""([chat, nodes]) => { Store.change("conversations", chat.id, chat, true); for (const node of nodes) Store.change("nodes", node.id, node, true); }""", [
            {"id": chat, "title": f"text {number}.", "created": 1, "updated": 1, "leaf": f"{number + 2000:032x}", "pinned": False, "system": "", "parameters": {}},
            [{"id": asked, "parent": None, "role": "user", "content": "q", **common}, {"id": f"{number + 2000:032x}", "parent": asked, "role": "assistant", "content": text, "knowledge": {"read": 3, "of": 3, "passages": passages}, **common}]])
    page.evaluate("async () => { while (Store.flushing) await Store.flushing; }")
    page.reload()
    for number, text in enumerate(TEXTS):
        chats(page).filter(has_text=f"text {number}.").click()
        expect(answers(page).locator(".passages .cited")).to_have_count(3)
        expect(answers(page).locator(".passages .cited")).to_have_text(SOURCES)
        found = [each["passage"] for each in citations_in(text, passages).get("annotations", [])]
        assert (text, [int(shown.strip("[]")) for shown in answers(page).locator(".body .cited").all_text_contents()]) == (text, found)
    files = {}
    for name in ("Markdown", "HTML page"):
        with page.expect_download() as download:
            menu(page, "Export", name)
        files[name] = Path(download.value.path()).read_text()
    assert files["Markdown"].endswith("Sources:\n\n- [1] 1.md · Part \\*1\\*\n- [2] 2.md · page 1 · Part \\*2\\*\n- [3] 3.md · page 2 · Part \\*3\\*\n")
    assert "<p>Sources:</p><ul><li>[1] 1.md · Part *1*</li><li>" in files["HTML page"]
