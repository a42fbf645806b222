"""How the page is put together: what each script registers, and the few names that it shares with the others."""

import re

import pytest

from browsing import (ROOT, answers, ask, button, expect, expect_answered, menu, needs_browser, open_page, playwright)

pytestmark = needs_browser

STATIC = ROOT / "static"
SCRIPTS = {path.name: path.read_text() for path in STATIC.glob("*.js")}
EXTRA = """Parts.register({
  strings: {extra: "Extra words", extraButton: "Say it"},
  bind() { document.body.dataset.bound = Parts.TEXT.extra; },
  menu: () => [[Parts.TEXT.extra, "chart", () => { location.hash = "#extra"; }]],
  render() { document.body.dataset.rendered = Chat.path.length; },
  answer: {buttons: view => [view.extra = Parts.iconButton(Parts.TEXT.extraButton, "chart", () => Chat.say(view.node.content))],
           update(view, growing) { view.extra.disabled = growing; }},
  view: {hash: "#extra", open() { document.body.dataset.open = "yes"; Page.render(); }, isOpen: () => "open" in document.body.dataset,
         close() { delete document.body.dataset.open; }},
  recoloured() { document.body.dataset.recoloured = "yes"; },
});
"""


def names_of(script):
    """(shared with other scripts, declared at the outer level of the script)"""
    owner = re.search(r"^const (\w+) = \(\(\) => \{$", script, re.M)
    if owner:
        return {owner[1]}, set()
    shared = {name for each in re.findall(r"^Parts\.share\(\{(.*?)\}\);", script, re.M | re.S) for name in re.findall(r"[\w$]+", each)}
    outside = script[:script.index("\n{\n")] if "\n{\n" in script else script
    declared = r"^(?:const|let|(?:async )?function\*?|class) ([\w$]+)"
    return shared | set(re.findall(declared, outside, re.M)), set(re.findall(declared, script, re.M))


def test_a_script_shares_the_names_that_it_says_and_nothing_else_of_it_is_known(opened_page):
    tests = "".join(path.read_text() for folder in ("tests/page", "tests/support", "docs") for path in (ROOT / folder).glob("*.py"))
    count = 0
    for script, text in SCRIPTS.items():
        shared, declared = names_of(text)
        others = "".join(other for name, other in SCRIPTS.items() if name != script)
        assert [name for name in shared if not re.search(rf"(?:\.\.\.|(?<![\w.])){re.escape(name)}\b", others + tests)] == [], script
        everything = sorted(shared | declared)
        known = ", ".join(f"typeof {name} !== 'undefined' && !({name} instanceof Element) && !('{name}' in Object.prototype)" for name in everything)
        seen = opened_page.evaluate(f"[{known}]")
        assert {name for name, is_known in zip(everything, seen, strict=True) if is_known} == shared, script
        count += len(declared - shared)
    assert count        # some names are a script's own


def test_a_new_script_is_a_tag_in_the_page_and_what_it_registers(page, stand_in):
    page.route(stand_in.url, lambda route: route.fulfill(response=(had := route.fetch()), body=had.text().replace(
        '<script defer src="page.js">', '<script defer src="extra.js"></script>\n<script defer src="page.js">')))
    page.route("**/static/extra.js", lambda route: route.fulfill(body=EXTRA, content_type="text/javascript"))
    open_page(page, stand_in.url)
    body = page.locator("body")
    expect(body).to_have_attribute("data-bound", "Extra words")
    ask(page, "one")
    expect_answered(page)
    expect(body).to_have_attribute("data-rendered", "2")
    button(answers(page), "Say it").click()
    expect(page.get_by_role("log").locator(".notice")).to_have_text("You said: one (answer 1)")
    menu(page, "Theme")
    expect(body).to_have_attribute("data-recoloured", "yes")
    menu(page, "Extra words")
    expect(page.get_by_role("log")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.get_by_role("log")).to_be_visible()
    expect(answers(page)).to_have_count(1)


def test_no_two_scripts_register_one_word(opened_page):
    with pytest.raises(playwright.Error, match="two scripts register send"):
        opened_page.evaluate("""Parts.register({strings: {send: "Post", extra: "Extra"}})""")
    assert opened_page.evaluate("[Parts.TEXT.send, Parts.TEXT.extra]") == ["Send", None]


def test_an_element_is_bound_by_one_script_alone():
    bound = {}
    for script, text in SCRIPTS.items():
        for name in set(re.findall(r"""\$\("([\w-]+)"\)(?:\.querySelector\("form"\))?\.(?:on\w+ =|addEventListener)""", text)):
            bound.setdefault(name, []).append(script)
    assert bound and {name: scripts for name, scripts in bound.items() if len(scripts) > 1} == {}
