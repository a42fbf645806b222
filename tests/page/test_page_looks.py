"""How the page looks, by the geometry and colours that a real browser computes: formulas, high contrast, paper, low windows,
slow loads, what is cut off."""

import json
import re

import pytest

from browsing import (answers, ask, button, expect, expect_accessible, expect_answered, figures, message_box, needs_browser,
                      open_page, settled, visitor)
from nightly import by_day

pytestmark = needs_browser

LONG_LINE = "words = [" + ", ".join(f"{number}" for number in range(100)) + "]"
WIDE_TABLE = "|" + " a column |" * 20 + "\n|" + "---|" * 20 + "\n|" + " words and words |" * 20
ANSWER = f"**Bold** words.\n\n```python\n{LONG_LINE}\n```\n\n{WIDE_TABLE}\n\n$$\\sum_{{i=1}}^n i$$"


def show_chat(page, turns):
    """Shows a chat whose answers have wide code and a wide table."""
    messages = [message for number in range(turns) for message in
                ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": ANSWER})]
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps({"messages": messages}))
    settled(page)
    expect(page.get_by_role("article").last.locator("strong")).to_be_visible()


# formulas -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawn_formula(opened_page):
    """A function that draws a formula, and asks `measure` (JavaScript of one argument, the formula) about it."""
    opened_page.evaluate("document.fonts.load('16px Formulas')")
    return lambda tex, measure: opened_page.evaluate(f"""tex => {{
        const answer = document.createElement("div");
        answer.className = "markdown";
        document.getElementById("log").replaceChildren(answer);
        answer.append(Markdown.mathNode(tex, true));
        const box = node => node.getBoundingClientRect();
        return ({measure})(answer.querySelector("math"));
    }}""", tex)


# left and right end of what is in each cell, row by row
CELLS = """math => [...math.querySelectorAll("mtr")].map(row => [...row.querySelectorAll(":scope > mtd:has(*)")].map(cell => {
    const {left, right} = box(cell.firstElementChild);
    return [left, right];
}))"""
ENDS = {"l": 0, "r": 1}


@pytest.mark.parametrize("tex, columns", [
    (r"\begin{aligned} aaa + b &= c \\ x &= ddd + eee \\ y + z &= f \end{aligned}", "rl"),
    (r"\begin{aligned} a &= b & ccc &= d \\ aaa &= bbb & c &= ddd \end{aligned}", "rlrl"),
    (r"\begin{align} aaa + b &= c \\ x &= ddd + eee \tag{2} \end{align}", "rl"),
    (r"\begin{cases} 1 & x > 0 \\ -100 & \text{otherwise} \end{cases}", "ll"),
    (r"\begin{array}{l|c|r} 1 & 2 & 3 \\ 444 & 555 & 666 \end{array}", "lcr"),
    (r"\begin{pmatrix*}[r] 1 & -2 \\ -33 & 4 \end{pmatrix*}", "rr"),
    (r"\begin{pmatrix} 1 & -2 \\ -33 & 4 \end{pmatrix}", "cc"),
    (r"\begin{gathered} a \\ bbb + ccc \end{gathered}", "c"),
])
def test_columns_of_a_formula_are_aligned(drawn_formula, tex, columns):
    rows = drawn_formula(tex, CELLS)
    assert len(rows) > 1
    for number, align in enumerate(columns):
        ends = [row[number] for row in rows]
        places = [sum(each) / 2 for each in ends] if align == "c" else [each[ENDS[align]] for each in ends]
        assert max(places) - min(places) < 1, (number, align, ends)
        assert len({round(right - left) for left, right in ends}) > 1        # else any alignment would do
    for row in rows:
        assert all(after[0] >= before[1] for before, after in zip(row, row[1:]))
        if columns.startswith("rl"):
            assert row[1][0] - row[0][1] < 8


def test_limits_and_boxes_of_formulas_are_in_place(drawn_formula):
    limits = """math => { const [sign, below, above] = math.querySelector("msubsup").children;
        return [box(above).left + parseFloat(getComputedStyle(above).paddingLeft) - box(sign).right, parseFloat(getComputedStyle(math).fontSize)]; }"""
    for tex in (r"\int_0^1 x", r"\oint_C^D x", r"\iint_a^{b+c} x"):
        gap, em = drawn_formula(tex, limits)
        assert gap > 0.1 * em, tex
    height = """math => box(math.querySelector("mfrac")).height"""
    assert drawn_formula(r"\frac{a}{b} \tag{1}", height) == drawn_formula(r"\frac{a}{b}", height)
    assert drawn_formula(r"\frac{a}{b} \tag{1}", """math => {
        const formula = box(math.querySelector("mfrac")), tag = box([...math.querySelectorAll("mtext")].at(-1));
        return tag.left - formula.right > 20 && tag.top > formula.top && tag.bottom < formula.bottom;
    }""")
    assert "(7)" in drawn_formula(r"\begin{align} a &= b \tag{7} \end{align}", "math => math.querySelector('mtable').textContent")
    borders = """math => { const {borderTopWidth: top, borderLeftWidth: left} = getComputedStyle(math.querySelector("menclose")); return [top, left]; }"""
    assert drawn_formula(r"\boxed{x}", borders) == ["1px", "1px"]
    assert drawn_formula(r"\begin{array}{c} \hline x \\ \hline \end{array}", borders) == ["1px", "0px"]


# high contrast, paper -------------------------------------------------------------------------------------------------

UNSEEN = """selector => [...document.querySelectorAll(selector)].filter(node => node.checkVisibility({visibilityProperty: true})).filter(node => {
    const icon = node.matches(".icon") ? getComputedStyle(node, "::before") : getComputedStyle(node);
    let behind = node.matches(".icon") ? node : node.parentElement;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return icon.backgroundColor === (behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)");
}).map(node => node.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_every_icon_is_seen_in_forced_colours(browser, stand_in, scheme):
    with visitor(browser, color_scheme=scheme, forced_colors="active") as page:
        open_page(page, stand_in.url)
        show_chat(page, 1)
        page.locator("#files-picker").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"words"})
        expect(page.locator("#files li")).to_be_visible()
        button(page, "Menu").click()
        assert page.locator(".icon").count() > 15
        assert page.evaluate(UNSEEN, ".icon, #lamp.ready") == []
        edges = page.evaluate("""() => ["#send", ".user .body"].map(each => getComputedStyle(document.querySelector(each)).borderTopWidth)""")
        assert edges == ["1px", "1px"]


def test_paper_gets_the_whole_chat_and_no_buttons(browser, stand_in):
    with visitor(browser, color_scheme="dark", viewport={"width": 800, "height": 600}) as page:
        open_page(page, stand_in.url)
        show_chat(page, 25)
        undrawn = page.locator(".turn:not(:has(.actions))")
        assert undrawn.count() > 10
        pages = len(re.findall(rb"/Type /Page\b", page.pdf()))
        assert pages > 5 and undrawn.count() == 0             # printing draws what was never near the window
        page.emulate_media(media="print", color_scheme="dark")
        expect(button(page, "Copy")).to_have_count(0)
        expect(page.get_by_role("button")).to_have_count(0)
        expect(page.get_by_role("textbox")).to_have_count(0)
        expect(page.get_by_role("navigation")).to_have_count(0)
        expect(page.get_by_role("heading", name="question 0")).to_be_visible()
        assert page.evaluate("""() => {
            const [log, code, table] = ["#log", ".turn pre", ".turn .table"].map(each => document.querySelector(each)), rgb = getComputedStyle(document.body).backgroundColor;
            return [log.clientHeight === log.scrollHeight, document.documentElement.scrollHeight > log.clientHeight,
                code.scrollWidth <= code.clientWidth, table.scrollWidth <= table.clientWidth, rgb];
        }""") == [True, True, True, True, "rgb(253, 253, 252)"]


# the first picture ----------------------------------------------------------------------------------------------------

def test_the_landing_is_read_from_its_top(page, stand_in):
    stand_in.model |= {"id": "SmolLM2-135M-x", "better": "Qwen/Qwen3-30B-A3B-GGUF:Qwen3-30B-A3B-Q4_K_M.gguf"}    # has the notice
    page.set_viewport_size({"width": 1280, "height": 420})
    open_page(page, stand_in.url)
    log = page.get_by_role("log")
    expect(log.get_by_role("heading")).to_be_in_viewport(ratio=1)
    assert log.evaluate("log => [log.scrollTop, log.scrollHeight > log.clientHeight]") == [0, True]
    expect(button(page, "Jump to latest")).to_be_hidden()
    expect(page.get_by_text("SmolLM2-135M-x")).to_have_count(1)
    widths = log.locator(".notice").evaluate("""notice => {
        const range = document.createRange(), {paddingLeft, paddingRight} = getComputedStyle(notice);
        range.selectNodeContents(notice);
        return [range.getBoundingClientRect().width, notice.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight)];
    }""")
    assert widths[0] > 0.85 * widths[1]
    message_box(page).fill("/help")                     # a notice below it is scrolled to
    message_box(page).press("Enter")
    expect(log.get_by_text("/temperature N")).to_be_in_viewport(ratio=1)
    button(page, "New chat").click()
    expect(log.get_by_role("heading")).to_be_in_viewport(ratio=1)


PLACES = """() => Object.fromEntries(["header", "#new", "#search", "#log", "#composer", "#message", "#send", "footer .below"].map(each => {
    const {x, y, width, height} = document.querySelector(each).getBoundingClientRect();
    return [each, [x, y, width, height].map(Math.round)];
}))"""


def test_late_scripts_move_nothing_on_the_page(browser, stand_in):
    held = []
    for sidebar in (True, False):
        with visitor(browser) as page:
            page.add_init_script(f"localStorage.setItem('chat_server preferences', '{{\"sidebar\": {str(sidebar).lower()}}}')")
            page.route("**/page.js", lambda route: held.append(route))
            page.goto(stand_in.url, wait_until="commit")
            page.wait_for_function("() => document.querySelector('#files-picker') && getComputedStyle(document.querySelector('#composer')).display === 'grid'")
            before = page.evaluate(PLACES)
            assert (before["#composer"][0] > 272) == sidebar
            expect(page.locator("#send")).to_be_disabled()
            page.locator("#message").fill("typed early")
            held.pop().continue_()
            expect(page.locator("#lamp.ready")).to_be_visible()
            settled(page)
            expect(message_box(page)).to_have_value("typed early")
            expect(button(page, "Send")).to_be_enabled()
            after = page.evaluate(PLACES)                   # but for what rounding does to the height of a text field
            assert max(abs(a - b) for place in before for a, b in zip(before[place], after[place])) <= 1, {place: (before[place], after[place]) for place in before if before[place] != after[place]}


# what is cut off, and what can be pressed -----------------------------------------------------------------------------

def test_cut_parts_have_shadows_and_buttons_have_edges(page, stand_in):
    page.set_viewport_size({"width": 1280, "height": 800})
    open_page(page, stand_in.url)
    show_chat(page, 1)
    shaded = """selector => { const style = getComputedStyle(document.querySelector(selector)); return [style.backgroundAttachment, style.backgroundImage]; }"""
    for selector in (".code pre", ".table", ".markdown math", "#settings-dialog .fields", "#server-dialog .fields", "#chats", "#template"):
        page.locator(selector).first.wait_for(state="attached")         # what a message holds comes with the next frames
        attachment, image = page.evaluate(shaded, selector)
        assert attachment == "local, local, scroll, scroll" and image.count("linear-gradient") == 4, selector
    button(page, "Settings").click()
    for width, height in ((1280, 800), (800, 800)):
        page.set_viewport_size({"width": width, "height": height})
        expect(button(page, "Done")).to_be_in_viewport(ratio=1)
        page.get_by_role("checkbox", name="Click a message").scroll_into_view_if_needed()
        expect(page.get_by_role("checkbox", name="Click a message")).to_be_in_viewport(ratio=1)
    for name in ("Save as preset", "Defaults", "Use for new chats"):
        assert button(page, name).evaluate("node => getComputedStyle(node).borderTopStyle") == "solid", name
    page.set_viewport_size({"width": 400, "height": 400})               # the fields scroll between the title and the buttons
    form, fields = [page.locator(f"#settings-dialog {part}") for part in ("form", ".fields")]
    assert fields.evaluate("node => node.scrollHeight > node.clientHeight")
    assert form.evaluate("node => node.scrollHeight <= node.clientHeight")
    expect(button(page, "Done")).to_be_in_viewport(ratio=1)


# quiet ----------------------------------------------------------------------------------------------------------------

def test_one_quiet_line_stands_below_an_answer(page, stand_in, theme):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    answer, line = answers(page), answers(page).locator(".speed")
    more = answer.get_by_role("group", name="Figures")
    expect(line).to_have_text("212 tok/s")                    # and not the only model's name
    line.locator(".short").hover()
    expect(more).to_contain_text("stand-in-135m")
    expect(more).to_contain_text("first token after 81 ms")
    expect(more).to_be_in_viewport(ratio=1)
    page.mouse.move(0, 0)
    expect(more).to_have_count(0)
    expect(figures(answer)).to_be_visible()
    page.mouse.move(0, 0)
    expect(more).to_be_visible()                                # it was asked for
    expect(line.locator(".short")).to_have_attribute("aria-expanded", "true")
    expect_accessible(page, theme=theme)
    page.keyboard.press("Escape")
    expect(more).to_have_count(0)
    figures(answer)
    message_box(page).click()
    expect(more).to_have_count(0)
    page.evaluate("Chat.lastNode().model = 'another'; Page.render()")
    expect(line).to_have_text("another212 tok/s")             # the server has one, the chat another


def test_figures_without_a_speed_are_not_lost(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(answers(page)).to_contain_text("and then")
    button(page, "Stop").click()
    line = answers(page).locator(".short")
    expect(line).to_contain_text("stopped")
    page.evaluate("Chat.lastNode().timings = {ttft_ms: 81, completion_tokens: 3, finish_reason: 'stop'}; Page.render()")
    expect(line).to_have_text("stopped · first token after 81 ms")


@pytest.mark.slow
def test_a_tap_shows_figures_beside_their_line(browser, stand_in):
    with visitor(browser, viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True) as page:
        open_page(page, stand_in.url)
        show_chat(page, 3)
        ask(page, "markdown")
        expect(answers(page).last.locator(".short")).to_have_text("212 tok/s")
        answers(page).last.locator(".short").tap()
        panel = page.get_by_role("group", name="Figures")
        expect(panel).to_be_in_viewport(ratio=1)
        page.get_by_role("log").evaluate("log => log.scrollTo(0, log.scrollTop - 15)")
        expect(panel).to_be_in_viewport(ratio=1)
        page.get_by_role("log").evaluate("log => log.scrollTo(0, 0)")
        expect(panel).to_have_count(0)                          # its line is out of sight


PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("options", by_day([{}, PHONE], {}), ids=["window", "phone"])
def test_new_chat_stays_with_a_hidden_list(browser, stand_in, options):
    with visitor(browser, **options) as page:
        open_page(page, stand_in.url)
        ask(page, "one")
        expect_answered(page)
        if not options:
            button(page, "Show or hide chats").click()
        expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
        button(page, "New chat").click()
        expect(page.get_by_role("article")).to_have_count(0)
        expect(message_box(page)).to_be_focused() if not options else None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        button(page, "Show or hide chats").click()
        expect(button(page, "New chat")).to_have_count(1)   # that of the list


@pytest.mark.slow
def test_deleting_all_chats_stands_at_the_end(page, stand_in, theme):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    button(page, "Menu").click()
    entries = page.get_by_role("group", name="Menu").get_by_role("button")
    expect(entries.last).to_have_text("Delete all chats")
    above, last = [entries.nth(entries.count() - back).bounding_box() for back in (2, 1)]
    assert last["y"] - above["y"] - above["height"] > 8
    expect_accessible(page, theme=theme)


def test_the_empty_page_offers_a_better_model(page, stand_in, theme):
    stand_in.model |= {"better": "Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q4_K_M.gguf"}
    open_page(page, stand_in.url)
    log = page.get_by_role("log")
    expect(log.get_by_role("heading")).to_have_text(re.compile("^Good (morning|afternoon|evening). What would you like to know?"))
    assert page.evaluate("[0, 5, 12, 18].map(hour => Parts.TEXT.welcome(hour).split(' ')[1])") == ["evening.", "morning.", "afternoon.", "evening."]
    expect(log).not_to_contain_text("python")
    expect_accessible(page, theme=theme)
    expect(button(log, "Get a better one: Qwen3-4B")).to_be_visible()
    stand_in.model["better"] = ""                               # none fits
    page.goto("about:blank")
    open_page(page, stand_in.url)
    expect(button(log, "Get another model")).to_be_visible()


def test_the_better_model_stands_above_the_first_answer_until_used_or_closed(page, stand_in):
    better = {"better": "Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q4_K_M.gguf", "better_tokens_per_second": 11.6}
    stand_in.model |= better
    open_page(page, stand_in.url)
    log = page.get_by_role("log")
    offer = button(log, "Get a better one: Qwen3-4B, about 12 tokens a second here")
    ask(page, "hello")
    expect_answered(page)
    expect(offer).to_be_visible()
    offered, text, closing = (found.bounding_box() for found in (
        offer, log.get_by_text("This is a very small demonstration model"), button(log, "Dismiss")))
    assert closing["y"] < text["y"] + text["height"]            # beside the text, not below it
    assert closing["x"] >= max(offered["x"] + offered["width"], text["x"] + text["width"])
    ask(page, "again")
    expect(answers(page)).to_have_count(2)
    expect(offer).to_have_count(0)                              # only the first one
    button(page, "New chat").click()
    offer.click()
    expect(page.get_by_role("region", name="Get a model")).to_be_visible()
    page.reload()
    button(page, "New chat").click()
    expect(log.get_by_role("heading")).to_be_visible()
    expect(offer).to_have_count(0)                              # used once, it is gone


def test_settings_have_sections_with_their_buttons(page, stand_in):
    open_page(page, stand_in.url)
    button(page, "Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    owners = dialog.get_by_role("button").evaluate_all("""all => Object.fromEntries(all.map(each => [each.textContent,
        each.closest("section")?.querySelector("h3, summary").textContent ?? ""]).filter(([name]) => name))""")
    assert owners == {"Save as preset": "Presets", "Use for new chats": "Keep or reset", "Defaults": "Keep or reset", "Done": ""}
    for name, hint in (("Use for new chats", "they begin with what is set here"), ("Defaults", "Defaults empties")):
        act, text = button(dialog, name).bounding_box(), dialog.get_by_text(hint).bounding_box()
        assert text["y"] <= act["y"] + act["height"] / 2 <= text["y"] + text["height"] + 20 and text["x"] < act["x"]
