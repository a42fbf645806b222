"""Documents in the page: what the server reads of them is attached, and what it left out is seen before sending."""

import importlib.util

import pytest

import documents
from browsing import button, expect, expect_accessible, expect_answered, message_box, needs_browser, open_page, questions

pytestmark = [needs_browser, pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in (
    "pypdfium2", "mammoth", "markdownify", "openpyxl", "pptx")), reason="the extra `documents` is not installed")]


@pytest.fixture
def front(tiny_url):
    """A server that reads documents; its model is not the point."""
    return tiny_url + "/"


def attach(page, name, content):
    page.locator("#files-picker").set_input_files({"name": name, "mimeType": "application/octet-stream", "buffer": content})


def test_a_document_is_attached_as_text_with_pages(page, front, theme):
    open_page(page, front)
    attach(page, "report.pdf", documents.pdf(["The treasure lies under the old oak.", "", "The end."]))
    chip = page.locator("#files li")
    expect(chip).to_contain_text("report.pdf")
    expect(chip).to_contain_text("3 pages")
    expect(chip.locator(".cut")).to_have_text("Incomplete: no text on page 2, which may be pictures.")
    expect_accessible(page, theme=theme)
    message_box(page).fill("Where is it?")
    with page.expect_request("**/v1/chat/completions") as request:
        button(page, "Send").click()
    expect_answered(page)
    expect(questions(page)).to_contain_text("report.pdf")
    assert request.value.post_data_json["messages"][-1]["content"] == "Where is it?\n\nreport.pdf:\n```\n[page 1]\nThe treasure lies under the old oak.\n\n[page 3]\nThe end.\n```"


def test_an_unreadable_document_says_why(page, front):
    open_page(page, front)
    attach(page, "secret.pdf", documents.ENCRYPTED_PDF)
    expect(page.get_by_role("alert")).to_contain_text("secret.pdf: The PDF is encrypted: save it without its password")
    attach(page, "a.docx", b"no document\0")
    expect(page.get_by_role("alert")).to_contain_text("a.docx: \"a.docx\" is of none of the formats that can be read")
    expect(page.locator("#files li")).to_have_count(0)
    attach(page, "page.html", b"<h1>Title</h1><script>1</script>")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#files li")).to_contain_text("page.html")


def test_the_page_reads_bytes_as_the_server_does(page, front):
    """So does the server in tests/front/documents/test_formats.py."""
    open_page(page, front)
    read = page.evaluate("cases => cases.map(({hex}) => Tree.textOf(Uint8Array.from(hex.match(/../g), pair => parseInt(pair, 16)))?.text ?? null)", documents.encodings())
    assert read == [case["text"] for case in documents.encodings()]


def test_another_servers_page_attaches_text_only(page, stand_in):
    stand_in.model["owned_by"] = "vllm"
    open_page(page, stand_in.url)
    attach(page, "report.pdf", documents.pdf(["x"]) + b"\0\1")
    expect(page.get_by_role("alert")).to_contain_text("report.pdf is neither a text file nor a document")
