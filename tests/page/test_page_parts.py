"""How the page is put together: the object that each script owns, and what it registers."""

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


def owner_of(script):
    """The object of a script, which has its name: Chat of chat.js. "" if it has none."""
    return next(iter(re.findall(r"^const (\w+) = \(\(\) => \{$", SCRIPTS[script], re.M)), "")


OWNERS = {owner: script for script in SCRIPTS if (owner := owner_of(script))}
LIBRARIES = {"marked", "DOMPurify", "hljs", "katex", "uPlot", "qrcode"}       # vendor/
OWN_PROPERTIES = """() => {
    const frame = document.body.appendChild(document.createElement("iframe")), blank = new Set(Object.getOwnPropertyNames(frame.contentWindow));
    frame.remove();
    return Object.getOwnPropertyNames(window).filter(name => !blank.has(name));
}"""
UNPROTECTED = """owner => [...Object.isFrozen(owner) ? [] : ["the object"],
    ...Object.entries(Object.getOwnPropertyDescriptors(owner)).filter(([, {set, writable}]) => set || writable).map(([name]) => name)]"""


def evaluated(page, expression):
    """(value, error) of an expression, as a script of the page would have it."""
    found = page.context.new_cdp_session(page).send("Runtime.evaluate", {"expression": expression, "returnByValue": True})
    return found["result"].get("value"), found.get("exceptionDetails", {}).get("exception", {}).get("description", "")


def mentioned_by(script):
    """The objects of other scripts that a script mentions."""
    code = re.sub(r"^\s*//.*$", "", SCRIPTS[script], flags=re.M)
    return {owner for owner in OWNERS if owner != owner_of(script) and re.search(rf"(?:\.\.\.|(?<![\w.])){owner}\.\w|=> {owner}, ", code)}


def test_the_page_s_globals_are_its_scripts_objects(opened_page):
    names = opened_page.context.new_cdp_session(opened_page).send("Runtime.globalLexicalScopeNames")["names"]
    assert sorted(names) == sorted(OWNERS)
    assert all(owner == script.removesuffix(".js").capitalize() for owner, script in OWNERS.items())
    assert set(opened_page.evaluate(OWN_PROPERTIES)) == LIBRARIES


@pytest.mark.parametrize("owner", sorted(OWNERS))
def test_no_script_can_assign_to_another_s_object(opened_page, owner):
    assert opened_page.evaluate(f"({UNPROTECTED})({owner})") == []
    assert evaluated(opened_page, f"{owner} = null")[1].startswith("TypeError: Assignment to constant variable.")
    assert '"use strict";\n' in SCRIPTS[OWNERS[owner]]         # else an assignment would fail without a word


def test_assigning_to_another_s_state_is_an_error(page, stand_in):
    open_page(page, stand_in.url)
    for wrong in ("Chat.path = []", "Server.phase = 'locked'", "Settings.preferences.theme = 'dark'", "Composer.setDraft = () => {}", "Chat.extra = 1"):
        assert evaluated(page, f"(() => {{ 'use strict'; {wrong}; }})()")[1].startswith("TypeError: Cannot "), wrong
    assert evaluated(page, "[Chat.path.length, Server.phase, Settings.preferences.theme]")[0] == [0, "ready", ""]


def test_what_an_object_offers_is_used_elsewhere(opened_page):
    texts = SCRIPTS | {"": "".join(path.read_text() for folder in ("tests/page", "tests/support", "docs", "bench") for path in (ROOT / folder).glob("*.py"))}
    named_in, taken_in, late_in = ({script: re.findall(pattern, text) for script, text in texts.items()} for pattern in (
        r"(?:\.\.\.|(?<![\w.]))([A-Z]\w*)\.([\w$]+)", r"const \{([^}]*)\} = (\w+)", r'=> (\w+), "(\w+)"'))
    for owner, script in OWNERS.items():
        others = texts.keys() - {script}
        named = {name for each in others for its, name in named_in[each] if its == owner}
        taken = {name for each in others for names, its in taken_in[each] if its == owner for name in re.findall(r"[\w$]+", names)}
        late = {name for each in others for its, name in late_in[each] if its == owner} | ({"start"} if owner == "Page" else set())
        unused = [name for name in opened_page.evaluate(f"Object.keys({owner})")
                  if name not in named | taken | late]
        assert unused == [], owner


def test_a_script_shares_only_the_names_it_says():
    text = (STATIC / "README.md").read_text()
    rows = {script: (owner, calls) for script, owner, calls in re.findall(r"^\| `(\w+\.js)` \| (.*?) \|.*\| ([^|]*) ?\|$", text, re.M)}
    assert set(rows) == set(SCRIPTS) - {"usage.js"} and "`usage.js`" in text
    for script, (owner, calls) in rows.items():
        assert owner.strip("`").replace("none", "") == owner_of(script), script
        assert set(re.findall(r"\w+", calls)) == mentioned_by(script) - {"Parts"}, script


def test_a_new_script_is_a_tag_and_its_registration(page, stand_in):
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


def test_a_late_script_without_its_object_is_said(page, stand_in):
    open_page(page, stand_in.url)
    for wrong in ("() => Missing", "() => { throw new ReferenceError(); }"):
        page.evaluate(f"async () => {{ Chat.say(''); await Parts.late('charts', {wrong}, 'open')(); }}")
        expect(page.get_by_role("log").locator(".notice")).to_have_text("This part of the page could not be loaded: is the server running?")
    assert page.evaluate("Parts.late('curves', () => Curves, 'placeOfStage')('sft')") == 2          # base, mid, sft


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


def test_an_element_is_one_script_s_alone():
    used = {}
    for script, text in SCRIPTS.items():
        for name in set(re.findall(r"""\$\("([\w-]+)"\)""", text)):
            used.setdefault(name, set()).add(script)
    shared = {name: scripts for name, scripts in used.items() if len(scripts) > 1}
    assert used and set(shared) == {"log", "status"}, shared        # where the turns stand; where charts resolve colours
