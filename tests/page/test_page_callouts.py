"""`> [!NOTE]` and its four siblings are boxes, as on GitHub."""

from pathlib import Path

import pytest

from browsing import answers, ask, expect, expect_accessible, expect_answered, menu, needs_browser, open_page

pytestmark = needs_browser

KINDS = ["NOTE", "TIP", "IMPORTANT", "WARNING", "CAUTION"]
ALL = "Before.\n\n" + "\n\n".join(f"> [!{kind}]\n> Mind **this** {kind} and `code`." for kind in KINDS) + "\n\nAfter."
CALLOUTS = {
    # text: the kinds and words of its boxes
    "usual": (ALL, [[kind.title(), f"Mind this {kind} and code."] for kind in KINDS]),
    "small letters": ("> [!note]\n> x", [["Note", "x"]]),
    "spaces behind it": (">[!TIP]  \n> x\n>\n> y", [["Tip", "x", "y"]]),
    "blocks in it": ("> [!WARNING]\n> - a\n> - b\n>\n> ```sh\n> rm\n> ```\n> > deep\n\nafter", [["Warning", "a", "b", "rm\n", "deep"]]),
    "two together": ("> [!TIP]\n> x\n\n> [!NOTE]\n> y", [["Tip", "x"], ["Note", "y"]]),
    "a list's": ("- item\n\n  > [!CAUTION]\n  > x\n- next", [["Caution", "x"]]),
    "in a quote": ("> > [!NOTE]\n> > x\n>\n> y", [["Note", "x"]]),
    "a lazy line": ("> [!NOTE]\nx\ny\n\nz", [["Note", "x\ny"]]),
    "no lazy list": ("> [!NOTE]\n- x", [["Note"]]),
    "empty": ("> [!NOTE]", [["Note"]]),
    "windows": ("> [!NOTE]\r\n> x\r\n", [["Note", "x"]]),
    "formulas and links": ("> [!IMPORTANT]\n> $x$ [a](https://example.org)[^1]\n\n[^1]: y", [["Important", "x a1"]]),
    # these are quotes: GitHub shows them as they are
    "words behind it": ("> [!NOTE] x\n> y", []),
    "another kind": ("> [!INFO]\n> x", []),
    "not the first line": ("> x\n> [!NOTE]\n> y", []),
    "no quote": ("[!NOTE]\nx", []),
    "code": ("> `[!NOTE]`\n> x\n\n    > [!NOTE]\n", []),
    "escaped": ("> \\[!NOTE]\n> x", []),
}
BOXES = """text => {
    const drawn = (text, step) => {
        const view = new Markdown.View(document.createElement("div"));
        for (let end = 0; end < text.length; end += step) view.update(text.slice(0, end));
        view.update(text, true);
        return view.root;
    };
    for (let end = 1; end <= text.length; end++) {          // each beginning may be all that comes
        const said = text.slice(0, end);
        if (drawn(said, 1).innerHTML !== drawn(said, Infinity).innerHTML) throw new Error(`differs: ${said}`);
    }
    const whole = drawn(text, Infinity);
    for (const each of whole.querySelectorAll("annotation, button, .code-bar")) each.remove();
    return [[...whole.querySelectorAll(".callout")].map(each => [...each.querySelectorAll(":is(p, code, li > p):not(li p code, p code)")]
        .map(part => { part.querySelectorAll("br").forEach(br => br.replaceWith("\\n")); return part.textContent; })), whole.textContent];
}"""


@pytest.mark.parametrize("name", CALLOUTS)
def test_a_callout_is_a_box_whole_and_streamed(opened_page, name):
    text, boxes = CALLOUTS[name]
    found, words = opened_page.evaluate(BOXES, text)
    assert found == boxes
    assert all(word in words for word in ("x", "y") if word in text and name != "usual")
    assert ("[!" in words) == (not boxes)


def test_callouts_differ_by_words_and_not_by_colour_alone(page, stand_in, theme):
    open_page(page, stand_in.url)
    ask(page, "\n" + ALL)
    expect_answered(page)
    boxes = answers(page).get_by_role("note")
    expect(boxes.locator("> p:first-child")).to_have_text([kind.title() for kind in KINDS])
    expect_accessible(page, theme=theme)
    colours = boxes.evaluate_all("all => all.map(each => getComputedStyle(each.firstChild).color)")
    assert len(set(colours)) == 5
    icons = boxes.evaluate_all("all => all.map(each => getComputedStyle(each.firstChild, '::before').maskImage)")
    assert len(set(icons)) == 5 and all(icon.startswith("url(") for icon in icons)


def test_an_exported_page_has_the_boxes(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "\n" + ALL)
    expect_answered(page)
    with page.expect_download() as download:
        menu(page, "Export", "HTML page")
    text = Path(download.value.path()).read_text()
    assert text.count('class="callout callout-') == 5 and ".callout-title::before" in text
