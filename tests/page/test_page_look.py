"""Looking inside: probabilities of tokens, answers made again, the prompt, the server. With the default model."""

import gzip
import json
import re

import pytest

from browsing import (ROOT, SLOW_MS, answers, ask, button, command, expect, expect_accessible, expect_answered, inside, menu,
                      message_box, needs_browser, open_page, reload, said, settled)
from nightly import by_day

pytestmark = needs_browser


@pytest.fixture
def asked(page, server_url):
    """A page with an answer of chance."""
    open_page(page, server_url)
    for text in ("/temperature 1.2", "/minp 0", "/seed 5", "/maxtokens 16"):
        command(page, text)
    ask(page, "What is the capital of Japan?")
    expect_answered(page)
    return page


def test_a_lens_shows_what_stood_beside_each_token(asked, theme):
    page, first = asked, said(answers(asked)).inner_text()
    inside(answers(page), "Token lens")
    tokens = page.get_by_role("listbox", name="Tokens of the answer")
    panel = answers(page).locator(".beside")
    expect(answers(page).get_by_text("Choose a token to see")).to_be_visible(timeout=SLOW_MS)
    assert re.sub(r"<\|.*", "", tokens.text_content().replace("↵\n", "\n")).split() == first.split()
    tokens.press("ArrowRight")
    tokens.press("ArrowRight")
    tokens.press("ArrowRight")
    expect(panel).to_contain_text(re.compile(r"· token \d+ · [<\d. ]+\s%"))
    expect(panel.get_by_role("button")).to_have_count(5)
    expect(answers(page)).to_contain_text("Token lens: on.")
    expect(answers(page).locator(".legend span")).to_have_text(["80\u00a0% or more", "50 to 80\u00a0%", "20 to 50\u00a0%", "5 to 20\u00a0%", "under 5\u00a0%",
                                                                    "drafted this time"])
    page.evaluate("""(() => {
        const lens = Look.lensOf(Chat.lastNode().id);
        lens.tokens = lens.tokens.map((token, i) => ({...token, drafted: i === 2}));
        Lens.update(Turns.viewOf(Chat.lastNode().id));
    })()""")
    expect(tokens.locator(".drafted")).to_have_count(1)
    tokens.press("Home")
    tokens.press("ArrowRight")
    expect(panel).not_to_contain_text("drafted")
    tokens.press("ArrowRight")
    expect(panel).to_contain_text("drafted this time")
    expect_accessible(page, theme=theme)
    lens = page.evaluate("Look.lensOf(Chat.lastNode().id).tokens.map(({id, share, beside}) => [id, share, beside?.length])")
    before = [token[0] for token in lens[:2]]
    tokens.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("2/2")
    expect_answered(page)
    node = page.evaluate("({...Chat.lastNode()})")
    assert node["ids"][:2] == before and node["prefix"] == node["ids"][:3] and len(node["ids"]) <= 16 and node["seed"] == 5
    assert node["weights"] == page.evaluate("Server.models[0].weights_digest") and re.fullmatch("[0-9a-f]{64}", node["weights"])
    inside(answers(page), "Check that it repeats")
    expect(answers(page)).to_contain_text(f"the same {len(node['ids'])} tokens", timeout=SLOW_MS)
    inside(answers(page), "Token lens")
    expect(answers(page).get_by_text("Choose a token to see")).to_be_visible(timeout=SLOW_MS)
    assert page.evaluate("Look.lensOf(Chat.lastNode().id).tokens.slice(0, -1).every(token => token.share > 0)")
    exported = page.evaluate("Tree.exportOf([Chat.current], () => [...Chat.nodes.values()])")
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps(exported))
    settled(page)
    brought = page.evaluate("({...Chat.lastNode()})")
    assert [brought[name] for name in ("ids", "prefix", "weights", "seed", "content")] == [node[name] for name in ("ids", "prefix", "weights", "seed", "content")]
    reload(page)
    inside(answers(page), "Token lens")
    expect(answers(page).get_by_text("Choose a token to see")).to_be_visible(timeout=SLOW_MS)
    seen = page.evaluate("Look.lensOf(Chat.lastNode().id).tokens.map(({id, share, beside}) => [id, share, beside?.length])")
    assert [token[0] for token in seen] == node["ids"] and all(share > 0 and count == 5 for _, share, count in seen[:-1])
    # what was forced has the probability that it had when it was drawn; the default model's penalties cost its last digits
    assert [token[1] for token in seen[:2]] == pytest.approx([token[1] for token in lens[:2]], rel=1e-6) and [token[0] for token in seen[:2]] == before
    inside(answers(page), "Token lens")
    page.evaluate("Chat.lastNode().ids[4]++")          # as if it had been made by another model
    inside(answers(page), "Check that it repeats")
    expect(answers(page)).to_contain_text("it differs from token 5 on", timeout=SLOW_MS)
    expect(answers(page)).to_contain_text("2/3")


def test_a_prompt_shows_its_special_tokens(asked, theme):
    page = asked
    inside(answers(page), "Prompt")
    dialog = page.get_by_role("dialog", name="Prompt")
    expect(dialog.locator("#prompt-text .special").first).to_have_text("<|im_start|>")
    expect(dialog.locator("#prompt-text")).to_contain_text("What is the capital of Japan?<|im_end|>")
    expect(dialog.locator("#prompt-counts li").first).to_have_text(re.compile(r"^YouWhat is the capital of Japan\?7 tokens"))
    count = page.evaluate("Chat.lastNode().timings.prompt_tokens")
    expect(dialog.locator("#prompt-facts")).to_have_text(re.compile(rf"^{count} tokens of [\d,]+"))
    expect_accessible(page, theme=theme)
    button(dialog, "Done").click()


def test_the_server_is_drawn_at_a_glance(asked, server_url, theme):
    page = asked
    menu(page, "Server status")
    region = page.get_by_role("region", name="Server status")
    expect(region.get_by_role("img")).to_have_count(6, timeout=SLOW_MS)
    expect(region.locator("canvas")).to_have_count(6)
    expect(region).to_contain_text("Workers ready1 / 1")
    assert page.evaluate("Status.shown.samples.length > 0 && Status.shown.samples[0].at < performance.timeOrigin / 1000")       # since the server started
    expect(region.get_by_role("link", name="Usage by day, key and model")).to_have_attribute("href", f"{server_url}usage")
    expect(message_box(page)).to_be_hidden()
    expect_accessible(page, theme=theme)
    reload(page)
    expect(region.get_by_role("cell", name="ready").first).to_be_visible(timeout=SLOW_MS)
    button(page, "Back to the chat").click()
    expect(said(answers(page))).to_be_visible()
    assert not page.url.endswith("#server")


def test_one_of_the_answers_side_by_side_is_chosen(asked, theme):
    page, first = asked, said(answers(asked)).inner_text()
    inside(answers(page), "Compare")
    dialog = page.get_by_role("dialog", name="Compare")
    columns = dialog.get_by_role("region")
    expect(columns).to_have_count(2)
    expect(columns.nth(0).get_by_role("spinbutton", name="Seed")).to_have_value("5")
    button(dialog, "Add a column").click()
    columns.nth(2).get_by_role("spinbutton", name="Temperature").fill("0")
    button(dialog, "Compare").click()
    expect(columns.get_by_role("button", name="Continue with this")).to_have_count(3, timeout=SLOW_MS)
    assert columns.nth(0).locator(".compared").inner_text().strip() == first.strip()
    expect(columns.nth(1)).to_contain_text(re.compile(r"Differs from token \d+ on: the first answer's token had a probability of [<\d. ]+\s%, this one(?:'s had [<\d. ]+\s%| ended there)\."))
    expect_accessible(page, theme=theme)
    text = columns.nth(2).locator(".compared").inner_text()
    columns.nth(2).get_by_role("button", name="Continue with this").click()
    expect(answers(page)).to_contain_text("2/2")
    assert said(answers(page)).inner_text().split() == text.split()
    assert page.evaluate("Chat.lastNode().parameters.temperature") == 0
    inside(answers(page), "Check that it repeats")
    expect(answers(page)).to_contain_text("It repeats: the same", timeout=SLOW_MS)


FOCUSED = """() => { const its = document.activeElement;
    return its.getAttribute("aria-label") ?? its.labels?.[0]?.textContent.trim() ?? its.textContent.trim(); }"""


def go_to(page, name, key="Tab"):
    """Presses a key until what has this name has the focus."""
    names = []
    while not names or names[-1] != name:
        assert len(names) < 40, f"{name} is not among {names}"
        page.keyboard.press(key)
        names.append(page.evaluate(FOCUSED))


@pytest.mark.slow
def test_the_keyboard_alone_reaches_every_look(asked):
    page = asked
    dialog = page.locator("dialog[open]")
    go_to(page, "Look inside", "Shift+Tab")
    page.keyboard.press("Enter")
    go_to(page, "Token lens", "ArrowDown")
    page.keyboard.press("Enter")
    expect(answers(page).get_by_text("Choose a token to see")).to_be_visible(timeout=SLOW_MS)
    go_to(page, "Tokens of the answer", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("2/2")
    expect_answered(page)
    page.keyboard.press("Escape")
    message_box(page).focus()
    go_to(page, "Look inside", "Shift+Tab")
    page.keyboard.press("Enter")
    go_to(page, "Check that it repeats", "ArrowDown")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("It repeats: the same", timeout=SLOW_MS)
    assert page.evaluate(FOCUSED) == "Look inside"
    page.keyboard.press("Enter")
    go_to(page, "Prompt", "ArrowDown")
    page.keyboard.press("Enter")
    expect(dialog.locator("#prompt-facts")).to_contain_text("tokens")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert page.evaluate(FOCUSED) == "Look inside"
    page.keyboard.press("Enter")
    go_to(page, "Compare", "ArrowDown")
    page.keyboard.press("Enter")
    go_to(page, "Seed")
    page.keyboard.type("7")
    go_to(page, "Compare")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("button", name="Continue with this")).to_have_count(2, timeout=SLOW_MS)
    go_to(page, "Continue with this")
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(answers(page)).to_contain_text("3/3")
    message_box(page).focus()
    go_to(page, "Model", "Shift+Tab")
    go_to(page, "Menu")
    page.keyboard.press("Enter")
    go_to(page, "Server status", "ArrowDown")
    page.keyboard.press("Enter")
    region = page.get_by_role("region", name="Server status")
    expect(region.get_by_role("cell", name="ready").first).to_be_visible(timeout=SLOW_MS)
    go_to(page, "Back to the chat")
    page.keyboard.press("Escape")
    expect(region).to_be_hidden()
    expect(message_box(page)).to_be_focused()


@pytest.mark.parametrize("speed", by_day([7, 12_345], 12_345))
def test_the_labels_beside_a_chart_are_whole(opened_page, speed):
    rooms = opened_page.evaluate("""async speed => {
        const workers = [{gpu_id: 0, device: "cpu", state: "ready", tokens_per_second: speed, memory_used: 987e9, kv_pages_used: 4e6, kv_pages_total: 5e6}];
        await Views.openStatus();
        for (const queued of [0, 98765]) Status.addSample(Status.shown, {workers, queue_depth: queued}, new Map());
        Status.show({workers}, Status.shown);
        await new Promise(requestAnimationFrame);
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.font = `11px ${getComputedStyle(document.documentElement).fontFamily}`;
        return Status.shown.charts.map(({plot: {axes: [, axis]}}) => axis._size - Math.max(...axis._values.map(text => canvas.measureText(text).width)));
    }""", speed)
    assert len(rooms) > 4 and min(rooms) >= 5, rooms      # uPlot leaves 5 pixels between labels and chart
    opened_page.evaluate("Status.close()")


LOADED = "() => performance.getEntriesByType('resource').map(({name}) => name.split('/static/')[1]).filter(name => /\\.(js|css|woff2)$/.test(name))"


def test_the_first_view_takes_200_kb(page, stand_in):
    stand_in.model["capabilities"] |= {"token_ids": True, "compare": True}
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    loaded = page.evaluate(LOADED)
    assert len(loaded) > 10 and len(loaded) == len(set(loaded))
    assert sum(len(gzip.compress((ROOT / "static" / name).read_bytes())) for name in ["index.html", *loaded]) < 200_000
    late = [name for name in re.findall(r'<script src="([^"]+)"', (ROOT / "static/index.html").read_text().split("<template")[1])]
    assert len(late) > 8 and [name for name in late if name in loaded] == []

    def came(*names):
        page.wait_for_function(f"names => {{ const found = ({LOADED})(); return names.every(name => found.includes(name)); }}", arg=names)
        assert sorted(name for name in page.evaluate(LOADED) if name not in loaded and name.endswith("js")) == sorted(names)
        loaded.extend(names)
    ask(page, "markdown")
    expect(answers(page).last.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(answers(page).last.locator("math")).to_have_count(3)
    came("vendor/highlight.min.js", "vendor/katex.min.js")
    inside(answers(page).first, "Compare")
    expect(page.get_by_role("dialog", name="Compare")).to_be_visible()
    came("compare.js")
    page.keyboard.press("Escape")
    inside(answers(page).first, "Prompt")
    expect(page.get_by_role("dialog", name="Prompt")).to_be_visible()
    came("lens.js")
    page.keyboard.press("Escape")
    menu(page, "Server status")
    expect(page.locator("#status-charts canvas").first).to_be_visible()
    came("status.js", "charts.js", "vendor/uplot.iife.min.js")
    page.evaluate("void Views.openRun('d4')")
    came("curves.js", "run.js")


def test_a_failed_script_is_said_and_loads_later(page, stand_in):
    page.route("**/compare.js", lambda route: route.abort())
    stand_in.model["capabilities"] |= {"token_ids": True, "compare": True}
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    inside(answers(page), "Compare")
    expect(page.get_by_role("log").get_by_text("This part of the page could not be loaded: is the server running?")).to_be_visible()
    page.unroute("**/compare.js")
    page.evaluate("Parts.libraries.delete('compare')")            # as after five seconds
    inside(answers(page), "Compare")
    expect(page.get_by_role("dialog", name="Compare")).to_be_visible()


@pytest.mark.slow
def test_a_missing_library_leaves_plain_code(page, stand_in):
    page.route(re.compile("highlight|katex|uplot"), lambda route: route.abort())
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    expect(answers(page).locator("pre").first).to_contain_text("return b, a")
    expect(answers(page).locator("code.tex").first).to_be_visible()
    page.evaluate("Views.openStatus()")
    expect(page.locator("#status-workers")).to_contain_text("cpu")
    expect(page.locator("#status-charts canvas")).to_have_count(0)


FIELDS = ["at", "running", "queued", "tokens_per_second", "kv_pages_used", "memory_used", "ttft_ms", "ttft_ms_p95", "itl_ms", "itl_ms_p95"]


def test_the_charts_begin_when_the_server_did(page, stand_in):
    page.route("**/stats/history", lambda route: route.fulfill(json={"fields": FIELDS, "samples": [[1.7e9, 1, 2, 30, 4, 5e9, 60, 70, None, None]]}))
    open_page(page, stand_in.url, "#server")
    expect(page.locator("#status-charts canvas")).to_have_count(6)
    assert page.evaluate("Status.shown.samples.slice(0, 1)") == [{"at": 1.7e9, "running": 1, "queued": 2, "speed": 30, "pages": 4, "memory": 5e9,
                                                             "firstToken": [60, 70], "interToken": [None, None]}]


def test_a_lonely_value_of_a_chart_is_a_point(page, stand_in):
    rows = [[1.7e9 + 2 * i, 0, 0, 0, 0, 0, first, None, None, None] for i, first in enumerate([None, 50, None, 60, 70, None])]
    page.route("**/stats/history", lambda route: route.fulfill(json={"fields": FIELDS, "samples": rows}))
    open_page(page, stand_in.url, "#server")
    expect(page.locator("#status-charts canvas")).to_have_count(6)
    drawn = page.evaluate("(plot => plot.series[1].points.filter(plot, 1))(Status.shown.charts.find(({name}) => name === 'firstToken').plot)")
    assert drawn == [1]


@pytest.mark.parametrize("answer", by_day([{"status": 403, "body": "{}"}, {"body": "[]"}, {"body": '{"fields": 7, "samples": [7]}'}, {"body": "odd"}],
                                          {"status": 403, "body": "{}"}, {"body": '{"fields": 7, "samples": [7]}'}))
def test_without_a_history_the_charts_begin_now(page, stand_in, answer):
    page.route("**/stats/history", lambda route: route.fulfill(**answer))
    open_page(page, stand_in.url, "#server")
    expect(page.locator("#status-charts canvas")).to_have_count(6)
    assert page.evaluate("Status.shown.samples[0].at > performance.timeOrigin / 1000 - 5")


def test_the_status_says_what_a_worker_lacks(page, stand_in):
    stand_in.worker = {"state": "ready", "problem": "", "without": ["--draft-model: <b>small.gguf</b> is no longer there"]}
    open_page(page, stand_in.url)
    page.evaluate("Views.openStatus()")
    expect(page.locator("#status-workers")).to_contain_text("ready; without --draft-model: <b>small.gguf</b> is no longer there")
    stand_in.worker = {"state": "dead", "problem": "exit status 3", "without": []}
    page.evaluate("void Status.look()")
    expect(page.locator("#status-workers")).to_contain_text("dead: exit status 3")


def test_a_server_without_a_feature_offers_none_of_it(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    expect(button(page, "Look inside")).to_have_count(0)


def test_only_differing_characters_are_marked(opened_page):
    page = opened_page
    page.evaluate("""() => { const node = Tree.newNode("x", null, "assistant", "", {seed: 3, model: Server.model.name}); Chat.nodes.set(node.id, node);
        Server.model.can = {token_ids: true, compare: true}; Chat.addNode(null, "user", "q"); window.told = Chat.addNode(Chat.leaf, "assistant", "a", {seed: 3, ids: [1], model: Server.model.name}); refresh_(); }
    """.replace("refresh_();", "Chat.showLeaf(told.id);"))
    inside(answers(page), "Compare")
    dialog = page.get_by_role("dialog", name="Compare")
    button(dialog, "Add a column").click()
    button(dialog, "Add a column").click()
    page.evaluate("""() => {
        const texts = ["The capital is Tokyo, a large city.", "The capital is Tokyo, a larger town!", "The capital is Tokyo, a large city.", "The capital"];
        Compare.shown.columns.forEach((column, i) => Object.assign(column, {text: texts[i], end: {model: "m"}, differs: i === 1 ? {position: 6, probabilities: [0.45, null]} : null}));
        Page.render(); }""")
    columns = dialog.get_by_role("region")
    expect(columns.nth(1).locator("mark")).to_have_text(["r", "town!"])
    expect(columns.nth(1).locator(".hint")).to_have_text("m · Differs from token 7 on: the first answer's token had a probability of 45\u00a0%, this one ended there.")
    expect(columns.nth(2)).to_contain_text("m · Identical to the first answer.")
    expect(columns.nth(3)).to_contain_text("m · The same as the first answer, as far as both go.")
    expect(dialog.locator("mark")).to_have_count(2)
    page.keyboard.press("Escape")
    page.evaluate("Chat.openNew()")


def test_code_differences_stay_with_late_colours(page, stand_in):
    stand_in.model["capabilities"] |= {"token_ids": True, "compare": True}
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    inside(answers(page), "Compare")
    expect(page.get_by_role("dialog", name="Compare")).to_be_visible()
    assert page.evaluate("typeof hljs") == "undefined"
    page.evaluate("""() => { Compare.shown.columns.forEach((column, i) => Object.assign(column, {text: "```py\\nx = " + i + "\\n```", end: {model: "m"}, differs: i ? {position: 6} : null}));
        Page.render(); }""")
    expect(page.locator("#compare-columns pre .hljs-number mark")).to_have_text("1")


def test_answers_side_by_side_are_markdown(opened_page):
    page = opened_page
    page.evaluate("""() => { Server.model.can = {token_ids: true, compare: true}; Chat.addNode(null, "user", "q");
        Chat.showLeaf(Chat.addNode(Chat.leaf, "assistant", "a", {seed: 3, ids: [1], model: Server.model.name}).id); }""")
    inside(answers(page), "Compare")
    dialog = page.get_by_role("dialog", name="Compare")
    page.evaluate("""() => {
        const texts = ["A **bold** word.\\n\\n- one\\n- two\\n\\n```py\\nx = 1\\n```\\n\\n$x^2$ end", "A **bald** word.\\n\\n- one\\n- three\\n\\n```py\\nx = 2\\n```\\n\\n$x^3$ end <img src=x onerror=alert(1)>"];
        Compare.shown.columns.forEach((column, i) => Object.assign(column, {text: texts[i], reasoning: "So *it* is.", end: {model: "m"}, differs: i ? {position: 6, probabilities: []} : null}));
        Page.render(); }""")
    columns = dialog.get_by_role("region")
    expect(columns.nth(0).locator("strong")).to_have_text("bold")
    expect(columns.nth(0).locator(".thoughts em")).to_have_text("it")
    expect(columns.nth(0).locator("mark")).to_have_count(0)
    expect(columns.nth(1).locator("strong mark")).to_have_text("a")
    expect(columns.nth(1).locator("li mark")).to_have_text("hree")
    expect(columns.nth(1).locator("pre mark")).to_have_text("2")
    expect(columns.nth(1).locator("mark math, mark code.tex")).to_have_count(1)
    expect(columns.nth(1).locator("img")).to_have_count(0)
    assert page.evaluate("Compare.shown.columns[1].answer.textContent").endswith("end <img src=x onerror=alert(1)>")
    seed = columns.nth(1).get_by_role("spinbutton", name="Seed")
    seed.fill("-5")
    seed.press("Enter")                                       # begins, and does not close the dialog
    expect(dialog.get_by_role("alert")).to_have_text("Answer 2, Seed: This must be a whole number from 0 to 9,007,199,254,740,991.")
    button(dialog, "Done").click()
    expect(dialog).to_be_hidden()
    page.evaluate("Chat.openNew()")


def test_a_run_is_compared_by_its_last_steps(page, stand_in, theme):
    entry = {"owned_by": "chat_server", "context_length": 8192, "run": "d2", "capabilities": {"token_ids": True, "compare": True}, "defaults": {}}
    stand_in.several = [entry | {"id": f"d2@{step}", "step": step, "state": "ready", "aliases": ["d2@latest"] if step == 60 else []} for step in (20, 40, 60)]
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    page.route("**/v1/compare", lambda route: None)                  # no answer yet
    dialog = page.get_by_role("dialog", name="Compare")
    for own, steps in (("d2@60", ["d2@40", "d2@60"]), ("d2@20", ["d2@20", "d2@60"])):
        page.evaluate("own => { Chat.lastNode().model = own; Page.render(); }", own)
        inside(answers(page), "Compare")
        expect(dialog).to_be_visible()
        assert dialog.get_by_role("slider", name="Step").evaluate_all("all => all.map(each => each.getAttribute('aria-valuetext'))") == steps
        seeds = dialog.get_by_role("spinbutton", name="Seed")
        assert [seeds.nth(i).input_value() for i in range(2)] == ["7", "7"]
        if own == "d2@60":
            page.keyboard.press("Escape")
    stand_in.several[0] |= {"state": "loading", "loading": 0.45}
    button(dialog, "Compare").click()
    expect(dialog.get_by_role("region").first).to_contain_text("Loading d2@20, 45\u00a0%")
    expect(dialog.get_by_role("region").nth(1)).to_contain_text("Waiting for the first token")
    expect_accessible(page, theme=theme)
