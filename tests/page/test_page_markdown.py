"""How the page draws answers, in a real browser: Markdown while it streams in, hostile text, long chats."""

import re

import pytest

from browsing import (SLOW_MS, answers, ask, button, expect, expect_accessible, expect_answered, more, needs_browser, open_page, questions,
                      said, visitor)
from nightly import by_day
from page_server import BLOCKS, HOSTILE, MARKDOWN

pytestmark = needs_browser

DRAWN = """([text, step]) => {            // text drawn in steps, and at once; and the most that any step parsed and made
    const [grown, whole] = [0, 1].map(() => new Markdown.View(document.createElement("div")));
    const most = {characters: 0, nodes: 0};
    for (let end = 0; end < text.length; end += step) {
        const before = {...Markdown.work};
        grown.update(text.slice(0, end));
        for (const name in most) most[name] = Math.max(most[name], Markdown.work[name] - before[name]);
    }
    grown.update(text, true);
    whole.update(text, true);
    return [grown.root.innerHTML, whole.root.innerHTML, most];
}"""


def drawn(page, text, step=1):
    return page.evaluate(DRAWN, [text, step])


def test_markdown_tables_and_formulas_are_drawn(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    answer = answers(page)
    expect(answer.get_by_role("heading", name="Sorting")).to_be_visible()
    expect(answer.locator("strong")).to_have_text("stable")
    expect(answer.get_by_role("link", name="the page")).to_have_attribute("rel", "noopener noreferrer")
    expect(answer.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(answer.locator("pre").last).to_have_text("an open fence, never closed\n", use_inner_text=False)
    expect(answer.get_by_role("table").get_by_role("cell")).to_have_count(4)
    expect(answer.locator("math")).to_have_count(3)
    expect(answer.locator("blockquote")).to_have_text("It costs $5 to $9, which is no formula.")
    expect(answer.get_by_role("listitem")).to_have_text(["Compare neighbours", "Swap themuntil nothing moves", "until nothing moves"])


@pytest.mark.parametrize("tex, spaces", [("n \\log n", "n_log_n"), ("2\\sin x", "2_sin_x"), ("\\log(n)", "log(n)"), ("x\\cos^2 y", "x_cos2_y"),
                                         ("\\lim_{x\\to 0} f", "limx→0_f"), ("\\operatorname{rank} A", "rank_A"), ("ab", "ab")])
def test_names_of_functions_stand_apart(opened_page, tex, spaces):
    assert opened_page.evaluate("""tex => {
        const node = document.createElement("p");
        node.append(Markdown.mathNode(tex, false));
        node.querySelector("annotation").remove();
        for (const space of node.querySelectorAll("mspace")) space.textContent = space.getAttribute("width") === "0.17em" ? "_" : "?";
        return node.textContent.replaceAll("\u2061", "");
    }""", tex) == spaces


def test_formulas_load_their_font_when_first_drawn(browser, stand_in):
    with visitor(browser) as page:          # one that has no font in its memory
        fetched = []
        page.on("request", lambda request: fetched.append(request.url) if "woff2" in request.url else None)
        open_page(page, stand_in.url)
        assert fetched == []
        ask(page, "markdown")
        expect_answered(page)
        page.wait_for_function("() => [...document.fonts].some(font => font.status === 'loaded')")
        assert len(fetched) == 1 and fetched[0].endswith("static/vendor/formulas.woff2")
        heights = page.evaluate("""tex => {
            const node = document.createElement("p");
            node.className = "markdown";
            document.querySelector(".body.markdown").append(node);
            node.append(Markdown.mathNode(tex, true));
            return [...node.querySelectorAll("mo, mi")].map(each => each.getBoundingClientRect().height);
        }""", r"\sum x \begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}")
        total, letter, opening, closing = heights
        assert total > 1.5 * letter and opening > 3 * letter and opening == closing, heights


def test_an_open_code_block_is_already_code(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "held markdown")
    expect(answers(page).locator("pre")).to_contain_text("a, b = pair")
    kept = [answers(page).locator(selector).element_handle() for selector in ("h1", "p >> nth=0", "pre")]
    stand_in.release()
    expect_answered(page)
    assert all(node.evaluate("node => node.isConnected") for node in kept)
    expect(answers(page).locator("h1")).to_have_count(1)
    expect(answers(page).locator("pre").first).to_contain_text("both at once")


PYTHON = "import os\n\n\n" + 'class Point:\n    """A point\n    of two numbers."""\n\n    def move(self, by: int = 1) -> "Point":\n' \
    "        return Point(self.x + by)  # moved\n\n" * 20
TEXTS = {
    "usual": MARKDOWN, "hostile": HOSTILE, "odd": BLOCKS,
    "code": f"Before:\n\n```python\n{PYTHON}```\n\nafter",
    "long paragraph": "Words, *some* of **them** `coded` and [linked](https://example.org/a_b), cost $5 or 5 * 3 or a_b_c. " * 4,
    "never closed": "An *opening, then a `tick and [a bracket " + "and so on " * 400,
    "list": "".join(f"{i}. Item **{i}**\n   - with a `part`\n\n     ```js\n     f({i}); // code\n     ```\n" for i in range(1, 30)),
    "table": "Here:\n| a | b |\n|:-:|--:|\n" + "".join(f"| {i} | `x\\|y` |\n" for i in range(60)) + "\nafter",
    "definitions": "See [one] and [two][2].\n\n[one]: https://example.org/1\n[2]: https://example.org/2 'title'\n\nThe end.",
    "formulas": "$$\nx = 1\n\ny = 2\n$$\n\n\\[ a^2 \\]\n\n$$never closed\n\ntext $x$ and $$y$$ end\n- \\(z\\)",
    "quotes": "> quoted\n> - a\n>   - b\nlazy\n\n> > deeper\n> ```\n> code\nno longer\n\nend",
    "footnotes": "A claim[^1], another[^why] and [^none].\n\nMore[^2] `[^1]` [^a-z].\n\n[^1]: First *note*.\n[^why]: Because\n    of this.\n\n"
                 "    - second paragraph\n[^2]: [link](https://example.org)\n\nThe end.\n\n- [^3]: in a list\n\n[^4]:",
    "details": "Before\n<details>\n<summary>The **sum** <b>x</b></summary>\n\nInside *it*\n\n- one\n- two\n\n```html\n</details>\n```\n\n<details open class=x onclick=y><summary>inner"
               "</summary>short</details>\n\nlast words</details>\nafter `</details>` it\n\n<details>\n<summary>\nlong\nsummary\n</summary>\ntext\n</details>\n\n"
               "- <details><summary>in a list</summary>\n\n  words\n  </details>\n- next\n\n</details> stray\n<summary>stray</summary>\n\n> <details>\n> quoted\n\nout\n\n<details>\nnever closed",
    "environments": "So\n\\begin{align}\na &= b \\\\[2pt]\n&= c\n\\end{align}\nand \\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix} in a line.\n\n\\begin{equation*}x\\end{equation*} behind\n\n"
                    "- \\begin{cases}1\\\\\n  2\\end{cases}\n\n\\begin{itemize}\n\\item x\n\\end{itemize}\n\n\\begin{align}\nnever $$ closed\n\ntext",
    "arabic": "# English\n\nمرحبا بالعالم `f(x)` hello\n\nEnglish again مرحبا\n\n- واحد\n- two\n\n> اقتباس\n\n| اسم | b |\n|--|--|\n| x | قيمة |",
    "windows": "# Head\r\n\r\ntext  \r\nmore\r\n\r\n```\r\ncode\r\n```\r\n",
}


TEXTS["very long paragraph"] = TEXTS["long paragraph"] * 12


@pytest.mark.parametrize("name", by_day(TEXTS, *TEXTS.keys() - {"very long paragraph"}))
def test_text_drawn_in_pieces_equals_the_whole(opened_page, name):
    for step in (1, 3, 17):
        grown, whole, _ = drawn(opened_page, TEXTS[name], step)
        assert grown == whole
    assert whole


@pytest.mark.parametrize("text, characters, nodes", [
    ("plain words without an end " * 600, 600, 20),
    ("some *emphasis* and `code` and **strong** words " * 400, 900, 40),
    (f"```python\n{PYTHON * 8}", 1500, 120),
    # never returns to the initial state, so highlighting waits for the end
    ("```python\ntext = '''" + "a line of a long text\n" * 1000, 7000, 20),
    ("```\n" + "no language\n" * 2000, 0, 5),
    ("".join(f"- item {i} with **bold** words\n" for i in range(800)), 100, 20),
    # inside containers too
    ("- one item\n\n  ```python\n" + PYTHON.replace("\n", "\n  ") * 8, 1500, 120),
    ("> " + "quoted words, and more " * 600, 600, 20),
    ("| a | b |\n|---|---|\n" + "".join(f"| {i} | some words |\n" for i in range(800)), 100, 20),
    ("a *never closed emphasis and more " * 500, 5000, 200),
    ("<details>\n<summary>s</summary>\n\n" + "words in details " * 600, 600, 20),
    ("[^1]: " + "words of a footnote " * 500, 600, 20),
], ids=["words", "marks", "code", "long string", "plain code", "list", "code in a list", "quote", "table", "unclosed", "details", "footnote"])
def test_a_frame_s_work_stays_as_answers_grow(opened_page, text, characters, nodes):
    assert len(text) > 8000
    _, _, most = drawn(opened_page, text, 12)
    assert most["characters"] <= characters and most["nodes"] <= nodes, most


HOSTILE_BLOCKS = {
    "attributes": "<details open ontoggle=\"window.hacked=1\" id=message name=state style='position:fixed' class=toast><summary onclick=\"window.hacked=2\" id=send>"
                  "<img src=x onerror=window.hacked=3> **x**</summary><script>window.hacked=4</script></details>",
    "broken tags": "<details\n><summary\n<details/onclick=window.hacked=1>\n<details <script>window.hacked=2</script>>\n<details x='>'><summary x=\">\">a</summary\n></details x=1>\n</details/></summary>",
    "never closed": "<details><details><summary><summary><details>\n<summary>\n<details>\n</summary></summary>x</details></details></details></details></details>\nthe end",
    "notes": "[^<img src=x onerror=window.hacked=1>] [^\"><script>window.hacked=2</script>] [^__proto__] [^constructor]\n\n[^__proto__]: <img src=x onerror=window.hacked=3>\n"
             "[^\"onclick=window.hacked=4]: x\n[^constructor]: [a](javascript:window.hacked=5)\n[^]: x\n[^ ]: y\n[^a]b]: z\n[constructor] [__proto__] [x][toString]",
    "formulas": "\\begin{align}\\href{javascript:window.hacked=1}{x}</math><img src=x onerror=window.hacked=2>\\end{align}\n\n\\begin{matrix}<script>window.hacked=3</script>\\end{matrix} "
                "\\begin{array}{<img src=x onerror=window.hacked=4>}1\\end{array}\n\\begin{align}\\htmlClass{toast}{x}\\end{align}",
    "mixed": "<details><summary>[^1] $x$ `</summary>`</summary>\n[^1]: <details>\n    <summary>x</summary>\n    </details>\n> <details>\n</details>\n- [^1]: > <details>\n\n</details>",
}

WATCHED = """async ([text, step]) => {                // what is not allowed in text that is cut after each `step` characters, and what was run
    const fine = new Set("P BR EM STRONG DEL CODE SUP SUB KBD A UL OL LI BLOCKQUOTE HR H1 H2 H3 H4 H5 H6 TABLE THEAD TBODY TR TH TD PRE DIV SPAN BUTTON DETAILS SUMMARY".split(" "));
    const named = new Set("dir class href target rel open role tabindex type title aria-label aria-pressed hidden start data-note data-display".split(" ")), wrong = new Set();
    const root = document.createElement("div");
    document.body.append(root);
    const look = () => root.querySelectorAll("*:not(math, math *)").forEach(node => {
        if (!fine.has(node.tagName)) wrong.add(node.tagName);
        for (const {name, value} of node.attributes) if (!named.has(name) || name === "href" && !/^(https?|mailto):/.test(value)) wrong.add(`${node.tagName} ${name}=${value}`);
        if (node.tagName === "DETAILS" && node.attributes.length > 1) wrong.add(node.cloneNode().outerHTML);
    });
    const lookAtFormulas = () => root.querySelectorAll("math *").forEach(node => { for (const {name} of node.attributes) if (/^(on|href|src|style|id|name|xlink)/.test(name)) wrong.add(name); });
    for (let end = 0; end <= text.length; end += step) {
        const view = new Markdown.View(root);
        view.update(text.slice(0, end), true);       // as if the answer ended here
        look();
    }
    const grown = new Markdown.View(root);
    for (let end = 0; end < text.length; end += step) { grown.update(text.slice(0, end)); look(); }
    grown.update(text, true);
    look();
    lookAtFormulas();
    root.querySelectorAll("details").forEach(each => { each.open = !each.open; });
    root.querySelectorAll("summary, .note a").forEach(each => each.click());
    await new Promise(end => setTimeout(end, 50));
    const said = root.textContent;
    root.remove();
    return [[...wrong], window.hacked ?? null, said];
}"""


@pytest.mark.parametrize("name", HOSTILE_BLOCKS)
def test_cut_details_and_footnotes_inject_nothing(opened_page, name):
    wrong, hacked, said = opened_page.evaluate(WATCHED, [HOSTILE_BLOCKS[name], 1])
    assert wrong == [] and hacked is None and said
    grown, whole, _ = drawn(opened_page, HOSTILE_BLOCKS[name])
    assert grown == whole


def shown(page, text):
    """The answer with this text, in a chat."""
    page.evaluate("""text => { Chat.openNew(); Chat.addNode(null, "user", "q"); Chat.showLeaf(Chat.addNode(Chat.leaf, "assistant", text, {}).id); }""", text)
    return said(answers(page).last)


def test_details_fold_their_markdown(opened_page, theme):
    answer = shown(opened_page, TEXTS["details"])
    details = answer.locator("details")
    assert details.evaluate_all("all => all.map(each => each.open)") == [False, True, False, False, True, True]
    expect(details.first.locator("> summary strong")).to_have_text("sum")
    expect(details.first.locator("> summary")).to_have_text("The sum <b>x</b>")
    expect(details.first.get_by_text("two")).to_be_hidden()
    details.first.locator("> summary").click()
    expect(details.first.get_by_text("two")).to_be_visible()
    expect(details.first.locator("details > p")).to_have_text("short")
    expect(details.nth(2).locator("summary")).to_have_text("longsummary", use_inner_text=False)
    expect(answer.locator("> p").nth(1)).to_have_text("after </details> it")
    expect(answer).to_contain_text("</details> stray")
    expect_accessible(opened_page, theme=theme)
    opened_page.evaluate("Chat.openNew()")


def test_marks_lead_to_footnotes_that_stand_apart(opened_page, theme):
    answer = shown(opened_page, TEXTS["footnotes"])
    marks, notes = answer.locator(".note"), answer.locator(".footnote")
    expect(marks).to_have_text(["1", "why", "2"])
    expect(notes).to_have_text([re.compile("^1First note.$"), re.compile("^whyBecause.*second paragraph$", re.S), "2link", "3in a list", "4"])
    expect(notes.first.locator("em")).to_have_text("note")
    expect(answer.locator("> p").first).to_contain_text("and [^none].")
    expect(answer.locator("> p").nth(1)).to_contain_text("[^1] [^a-z]")
    assert opened_page.evaluate("""() => { let led = null; for (const note of document.querySelectorAll(".footnote")) note.scrollIntoView = () => { led = note.dataset.note; };
        document.querySelectorAll(".note a")[1].click(); return led; }""") == "^why"
    expect_accessible(opened_page, theme=theme)
    opened_page.evaluate("Chat.openNew()")


def test_environments_are_formulas_without_dollars(opened_page):
    answer = shown(opened_page, TEXTS["environments"])
    expect(answer.locator("math")).to_have_count(4)
    expect(answer.locator("math mtable")).to_have_count(4)
    expect(answer).to_contain_text("\\begin{itemize}")
    expect(answer).to_contain_text("never $$ closed")
    opened_page.evaluate("Chat.openNew()")


def test_each_block_runs_in_its_words_direction(opened_page):
    answer = shown(opened_page, TEXTS["arabic"])
    directions = answer.evaluate("""body => [...body.querySelectorAll("h1, p, ul, blockquote, table, th, td, code")].map(each => [each.localName, getComputedStyle(each).direction])""")
    assert directions == [["h1", "ltr"], ["p", "rtl"], ["code", "ltr"], ["p", "ltr"], ["ul", "rtl"], ["p", "rtl"], ["p", "ltr"], ["blockquote", "rtl"], ["p", "rtl"],
                          ["table", "rtl"], ["th", "rtl"], ["th", "ltr"], ["td", "ltr"], ["td", "rtl"]]
    left, right = answer.locator("p").first.evaluate("""each => { const range = document.createRange(); range.selectNodeContents(each);
        const words = range.getBoundingClientRect(), box = each.parentElement.getBoundingClientRect(); return [words.left - box.left, box.right - words.right]; }""")
    assert right < 5 < left
    opened_page.evaluate("Chat.openNew()")


def test_a_hostile_answer_is_inert(page, stand_in):
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    open_page(page, stand_in.url)
    ask(page, "hostile")
    expect_answered(page)
    answer = said(answers(page))
    expect(answer).to_contain_text("the end")
    expect(answer).to_contain_text("<script>window.hacked = 1</script>")      # shown as the text it is
    expect(answer.locator("script, img, iframe, svg, style, [id], [style], [onclick], [onerror]")).to_have_count(0)
    assert answer.evaluate("node => [...node.querySelectorAll('[href]')].map(link => link.getAttribute('href'))") \
        == ["https://example.org/pixel.png"]
    for link in answer.locator("a").all():
        link.dispatch_event("click")
    ask(page, HOSTILE)                                                         # and as a question
    expect_answered(page, 2)
    assert page.evaluate("window.hacked") is None
    assert [url for url in fetched if not url.startswith(stand_in.url)] == []


def test_no_script_can_make_elements_from_text(browser, stand_in):
    """require-trusted-types-for: what a forgotten innerHTML would do."""
    # not the page fixture, because violations are expected here
    context = browser.new_context()
    page = context.new_page()
    open_page(page, stand_in.url)
    made = page.evaluate("""() => {
        const ways = {html: () => document.body.innerHTML = "<b>x</b>", parser: () => new DOMParser().parseFromString("<b>x</b>", "text/html"),
            script: () => document.createElement("script").src = "https://example.org/x.js", policy: () => trustedTypes.createPolicy("mine", {})};
        return Object.keys(ways).filter(name => { try { ways[name](); return true; } catch (error) { return false; } });
    }""")
    context.close()
    assert made == []


@pytest.mark.parametrize("language", by_day(["python", "text", "nonsense"], "python"))
def test_nobody_sees_the_parts_of_long_code(page, stand_in, language):
    code = "\n".join(f"line_{number} = {number}" + "\n" * (number % 7 == 0) for number in range(120))
    open_page(page, stand_in.url)
    ask(page, f"this\n```{language}\n{code}\n```")        # the answer says it again
    expect_answered(page)
    block = answers(page).locator("pre code").first
    expect(block.locator(".part").nth(5)).to_be_attached()     # when the highlighter has been fetched
    text, selected, parts, height, line = block.evaluate("""code => {
      getSelection().selectAllChildren(code);
      return [code.textContent, getSelection().toString(), code.querySelectorAll(".part").length,
        code.parentElement.scrollHeight - parseFloat(getComputedStyle(code.parentElement).paddingTop) -
        parseFloat(getComputedStyle(code.parentElement).paddingBottom), parseFloat(getComputedStyle(code).lineHeight)];
    }""")
    assert text.startswith(code) and selected.startswith(code) and parts > 5
    assert abs(height / line - len(text.rstrip("\n").split("\n"))) < 1.5


def test_copy_code_copies_exactly_the_code(page, stand_in):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    button(page, "Copy code").first.click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == \
        "def swap(pair: tuple) -> tuple:\n    a, b = pair  # both at once\n    return b, a"


@pytest.mark.parametrize("secure", [True, False])
def test_an_answer_is_copied_with_its_looks(page, stand_in, secure):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if not secure:              # as on plain http from another machine
        page.add_init_script("navigator.clipboard.write = () => Promise.reject(new Error('not here'))")
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    button(answers(page), "Copy").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    read = """async () => {
        const [item] = await navigator.clipboard.read();
        return Promise.all(["text/plain", "text/html"].map(async type => item.types.includes(type) ? (await item.getType(type)).text() : ""));
    }"""
    text, html = page.evaluate(read)
    assert text == MARKDOWN and "<strong>stable</strong>" in html and "Copy code" not in html
    more(answers(page), "Copy as Markdown")
    page.wait_for_function("async () => !(await navigator.clipboard.read())[0].types.includes('text/html')")
    assert page.evaluate(read) == [MARKDOWN, ""]


def test_a_question_shows_its_code_as_code(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "Why does `x = [1]` and\n\n```python\ndef f():\n    return 1\n```\n\nnot *work*?\n# no heading")
    question = said(questions(page))
    expect(question.locator("pre code")).to_have_text("def f():\n    return 1")
    expect(question.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(question.locator(":scope > code")).to_have_text("x = [1]")
    expect(question).to_contain_text("not *work*?\n# no heading")
    expect(question.locator("h1, em")).to_have_count(0)


def test_late_libraries_draw_what_lacked_them(page, stand_in):
    held = []
    page.route(re.compile("highlight|katex"), lambda route: held.append(route))
    page.goto(stand_in.url, wait_until="domcontentloaded")
    ask(page, "markdown")
    expect_answered(page)
    expect(answers(page).locator("pre").first).to_contain_text("return b, a")
    expect(answers(page).locator("code.tex")).to_have_text(["n^2", "n \\log n", "\\sum_{i=1}^{n} i = \\frac{n(n+1)}{2}"])
    for route in held:
        route.continue_()
    expect(answers(page).locator("pre .hljs-keyword").first).to_have_text("def")
    expect(answers(page).locator("math")).to_have_count(3)


@pytest.mark.slow
def test_a_long_chat_is_drawn_where_it_is_looked_at(page, stand_in):
    open_page(page, stand_in.url)
    page.evaluate("""() => {
        const messages = [];
        for (let i = 0; i < 1000; i++) messages.push({role: "user", content: `question ${i}`}, {role: "assistant", content: `**answer** ${i}\\n\\n- a\\n- b`});
        return Chats.importAll(Tree.importOf(JSON.stringify({messages, title: "long"})), "it");
    }""")
    expect(answers(page)).to_have_count(1000)
    expect(answers(page).last).to_contain_text("answer 999")
    expect(answers(page).last.locator("strong")).to_be_in_viewport()
    assert answers(page).locator("strong").count() < 100
    # not drawn, but a search in the page finds it
    expect(answers(page).first).to_contain_text("**answer** 0")
    page.get_by_role("log").evaluate("log => { log.scrollTop = 0; }")
    expect(answers(page).first.locator("strong")).to_be_in_viewport(timeout=SLOW_MS)
    expect(button(page, "Jump to latest")).to_be_visible()
    button(page, "Jump to latest").click()
    expect(answers(page).last.locator("strong")).to_be_in_viewport()
    ask(page, "one more")
    expect(answers(page)).to_have_count(1001)
    expect_answered(page, 1001)


def test_near_turns_take_a_few_milliseconds_a_frame(page, stand_in):
    open_page(page, stand_in.url)
    most = page.evaluate("""async () => {
        const messages = [];
        for (let i = 0; i < 200; i++) messages.push({role: i % 2 ? "assistant" : "user", content: `**${i}**`});
        await Chats.importAll(Tree.importOf(JSON.stringify({messages})), "it");
        const drawn = () => Chat.path.filter(({id}) => Turns.viewOf(id)?.complete).length;
        let clock = 0, before = drawn(), most = 0;
        performance.now = () => clock += 10;                // as if each turn took long
        Parts.$("log").scrollTop = 0;
        for (let frame = 0; frame < 300 && Chat.path.some(node => !Turns.viewOf(node.id).complete && near20(node)); frame++) {
            await new Promise(requestAnimationFrame);
            most = Math.max(most, drawn() - before);
            before = drawn();
        }
        function near20(node) { return Chat.path.indexOf(node) < 20; }
        return most;
    }""")
    assert most == 1 and answers(page).first.locator("strong").inner_text() == "1"
    assert page.locator(".turn:not(:has(.actions))").count() > 100
    page.evaluate("() => { Parts.$('log').scrollTop = Parts.$('log').scrollHeight; }")     # what is drawn and out of sight costs a frame nothing
    page.wait_for_function("() => !document.querySelector('.turn:has(.actions) .body').checkVisibility({contentVisibilityAuto: true})")


DEEP = {        # thousands of elements inside each other crash a browser's tab
    "emphasis": "*a " * 9_000 + "a* " * 9_000, "quotes": ">" * 20_000, "items": "1. " * 9_000, "both": "> 1. " * 4_000, "tags": "<sub>" * 9_000,
    "fractions": "$" + "\\frac{1}{" * 1_500 + "x" + "}" * 1_500 + "$", "a long formula": "$" + "x+" * 20_000 + "x$",
    "roots": "$" + "\\sqrt{" * 600 + "x" + "}" * 600 + "$", "powers": "$" + "x^{" * 700 + "x" + "}" * 700 + "$"}


@pytest.mark.parametrize("name", DEEP)
def test_thousands_of_nested_parts_are_shown(opened_page, name):
    deepest, shown = opened_page.evaluate("""text => {
        const root = document.createElement("div");
        document.body.append(root);
        new Markdown.View(root).update(text, true);
        const depth = node => Math.max(0, ...Array.from(node.children, each => 1 + depth(each)));
        const found = [depth(root), root.offsetHeight >= 0 && root.textContent.length > 0];
        root.remove();
        return found;
    }""", DEEP[name])
    assert shown and deepest < 200
    opened_page.get_by_role("textbox", name="Message").fill("still here")


def test_usual_nesting_is_drawn_as_before(opened_page):
    text = "".join("  " * depth + f"- {depth}\n" for depth in range(20)) + "\n" + "> " * 20 + "deep\n\n"
    text += "$\\sqrt{\\sqrt{\\frac{1}{\\sqrt{\\frac{x^{2^{2^2}}}{y}}}}}$"
    html, whole, _ = drawn(opened_page, text)
    assert html == whole and html.count("<li>") == 20 and html.count("<blockquote>") == 20
    assert html.count("<msqrt>") == 3 and html.count("<mfrac>") == 2


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("text, formulas", [
    ("Set PATH=$HOME/bin:$PATH first", 0), ("Compare $AAPL/$TSLA today", 0), ("It takes 20$-30$ each", 0),
    ("from 5$/month to 10$/month", 0), ("so $x$ and ($y$) and $z$.", 3), ("sum $a+b$, done", 1)])
def test_dollars_beside_words_open_no_formula(opened_page, text, formulas, step):
    grown, whole, _ = drawn(opened_page, text, step)
    assert grown == whole and whole.count("</math>") == formulas, whole


def test_empty_headings_are_no_headings(opened_page):
    """The default model writes many: "# " on a line."""
    answer = shown(opened_page, "# One\n#\n# \n## Two\n\ntext")
    expect(answer.get_by_role("heading")).to_have_text(["One", "Two"])
    expect_accessible(opened_page, theme="light")
    gap = answer.evaluate("""body => { const [one, two] = [...body.querySelectorAll("h1, h2")].filter(each => each.checkVisibility());
        return two.getBoundingClientRect().top - one.getBoundingClientRect().bottom; }""")
    assert gap < 20
    opened_page.evaluate("Chat.openNew()")


@pytest.mark.parametrize("tex, is_sign", [
    ("x = -1", True), ("x = \\pm 1", True), ("(-1)", True), ("(a, -1)", True), ("x \\leq +1", True), ("-1", True),
    ("x - 1", False), ("(x) - 1", False), ("n! - 1", False), ("|x| - 1", False), ("f' - 1", False)])
def test_signs_stand_at_their_numbers(opened_page, tex, is_sign):
    gap = opened_page.evaluate("""tex => {
        const root = document.createElement("p");
        root.className = "markdown";
        document.body.append(root);
        root.append(Markdown.mathNode(tex, true));
        const [number, sign] = ["mn", "mo"].map(name => [...root.querySelectorAll(name)]
            .filter(each => name === "mn" || /^[-−+±]$/.test(each.textContent)).at(-1).getBoundingClientRect());
        root.remove();
        return (number.left - sign.right) / sign.width;
    }""", tex)
    assert (gap < 0.05) == is_sign, gap


# what a text can repeat: each mark, alone and beside a word, and whole texts of a given length
REPEATED = ["[", "![", "\\[", "= 2*3*4 ", "*** ", "~a~", "[1][2]", "_*", "[^1]", "a\n", "$a$", "`a` ", "a*b*", "***", "***a ", "**a", "**「日」**", "_a", "_ a", "*a_b ", "~~a ", "](", "[](",
            "[[]", "[a]", "[a](b ", "[a](b)", "![a](b)", "[a](<", "[^", "[a]: b\n", "[^a]: b\n", "$a ", "$$a ", "$$\n", "\\(", "\\begin{align}", "\\", "\\\\ ", "`", "`a``b```", "`` ` ", "<", "<a ",
            "<a b=", "<b>", "<sub>x</sub>", "<sub>", "<!--", "<?", "<![CDATA[", "</", "&amp;", "&a", "@", "a@b.c ", "http://a.b ", "www.a", "a|b\n", "|", "- ", "* a\n", "1. a\n", "> ", "> [!note]\n",
            "<details>\n", "</details>\n", "<details>\n<summary>\n", "# ", " #", "a\n===\n", "```\n", "```a\n", "~~~\n", " ", "\t", "\u00a0", "\r", "\ufdd0", "word ", "日", "😀"]
BLOCKS_OF = {
    "mathematics": lambda n: "$$\n" + "a\n" * (n // 2),
    "an environment": lambda n: "\\begin{align}\n" + "a\n" * (n // 2),
    "formulas": lambda n: "".join("\n\n$$\n" + f"\\lim_{{x{i}}} " * 100 + "\n$$\n" for i in range(n // 1000)),
    "a wide table": lambda n: "|a" * (n // 6) + "\n" + "|-" * (n // 6) + "\n" + "|\n" * (n // 6),
    "a long table": lambda n: "|a|b|\n|-|-|\n" + "|a|b|\n" * (n // 6),
    "a line that is no delimiter": lambda n: "a\n---" + " " * n + "x",
    "a task": lambda n: "- [x] " + "a\n  " * (n // 4),
    "code": lambda n: "```python\n" + "x = 'a' # b\n" * (n // 12),
    "a line of code": lambda n: "```python\n" + "x = 'a' + " * (n // 10),
}
LONG = {**{mark: lambda n, mark=mark: mark * (n // len(mark)) for mark in REPEATED}, **BLOCKS_OF}
# the least time of some tries, for machines are busy, of a text and of one of ten times the length
TIMES = """texts => texts.map(text => {
    const began = performance.now();
    new Markdown.View(document.createElement("div")).update(text, true);
    return performance.now() - began;
})"""


@pytest.mark.parametrize("name", by_day(list(LONG), *REPEATED[:8], *BLOCKS_OF), ids=repr)
def test_a_text_is_drawn_in_time_proportional_to_it(opened_page, name):
    """Where it takes the square, ten times the text takes a hundred times the time."""
    opened_page.evaluate("Promise.all(['katex', 'highlight'].map(name => Parts.need(name)))")
    texts = [LONG[name](n) for n in (10_000, 100_000)]
    least = [float("inf")] * 2
    for _ in range(6):
        least = [min(pair) for pair in zip(least, opened_page.evaluate(TIMES, texts))]
        if least[1] < 20 * least[0] or least[1] < 50:
            return
    pytest.fail(f"{least} ms")


@pytest.mark.parametrize("text", ["**" + "word " * 380 + "word** end " + "plain " * 900 + "`" + "code " * 380 + "` end", "An *opening " + "and so on " * 900, "[" * 9000, "x" * 9000 + " *y* " + "z" * 5000,
                                  "😀" * 4000, "line *a*\n" * 900, "<sub>" + "a " * 3000 + "</sub> *b*"], ids=lambda text: text[:8])
def test_windows_of_a_long_paragraph_are_not_seen(opened_page, text):
    """Marks of up to a window belong together, wherever they stand, and no character is lost."""
    grown, whole, most = drawn(opened_page, text, 97)
    assert grown == whole and most["characters"] < 10_000
    if "`" in text:
        assert whole.count("<strong>") == whole.count("<code>") == 1
    assert "\ufffd" not in whole
    if not set("*`<") & set(text):
        assert whole == f'<p dir="auto">{text}</p>'
