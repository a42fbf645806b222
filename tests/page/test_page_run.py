"""The page's view of a training run: the curve, chats with its steps, two steps side by side, what is loaded and scored now."""

import json
import re
import shutil
import urllib.request

import pytest

import tiny_training
from browsing import (SLOW_MS, answers, ask, button, expect, expect_accessible, expect_answered, menu, message_box, needs_browser, open_page,
                      questions, reload, said, started_server, visitor)
from nightly import by_day
from page_server import MODEL

pytestmark = needs_browser


def steps(*states, run="d4", scores=True):
    """What the server lists of a run: step 10, 20, ..., the last one also as the latest."""
    entries = [MODEL | {"id": f"{run}@{10 * count}", "run": run, "step": 10 * count, "state": state, "capabilities": {"compare": True, "token_ids": True},
                        "bits_per_byte": 3 - count / 100 if scores else None} for count, state in enumerate(states, 1)]
    entries[-1] |= {"aliases": [f"{run}@latest"], "default": True}
    return entries


def row(page, step):
    return page.get_by_role("row").filter(has=page.get_by_role("cell", name=str(step), exact=True))


def point(page, step):
    """Where a step's point lies in the window."""
    return page.evaluate("""step => { const {plot, box} = [...Run.shown.charts.values()][0], {left, top} = plot.over.getBoundingClientRect();
        return [left + plot.valToPos(box.shown.points.find(point => point.step.step === step).x, "x"), top + plot.over.clientHeight / 2]; }""", step)


def opened(page, stand_in, path="#run/d4"):
    open_page(page, stand_in.url, path)
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()


def test_a_run_has_an_address_a_curve_and_rows(page, stand_in, theme):
    stand_in.several = steps("unloaded", "ready", "loading")
    open_page(page, stand_in.url)
    menu(page, "Training run")
    region = page.get_by_role("region", name="Training run d4")
    curve = region.get_by_role("img", name="10: 2.990, 20: 2.980, 30: 2.970", exact=True)
    expect(curve).to_be_visible()
    painted = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"""
    page.wait_for_function("() => Run.shown.charts.size")
    assert curve.locator("canvas").evaluate(painted)
    expect(region.get_by_role("row").nth(1)).to_contain_text(re.compile(r"30.*2\.970.*−0\.010.*loading"))      # the latest first
    expect(row(page, 20)).to_contain_text("loaded")
    expect(region).to_contain_text("In memory: d4@20. Being loaded: d4@30.")
    expect(message_box(page)).to_be_hidden()
    expect_accessible(page, theme=theme)
    assert page.url.endswith("#run/d4")
    reload(page)
    expect(curve).to_be_visible()
    page.keyboard.press("Escape")
    expect(region).to_be_hidden()
    expect(message_box(page)).to_be_focused()
    page.go_back()
    expect(region).to_be_visible()


@pytest.mark.parametrize("path", by_day(["#run", "#run/"], "#run"))
def test_an_address_without_a_tag_opens_the_run(page, stand_in, path):
    stand_in.several = steps("ready", "ready")
    open_page(page, stand_in.url)
    page.evaluate("path => { location.hash = path; }", path)
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()
    page.wait_for_url("**/#run/d4")
    page.go_back()
    expect(message_box(page)).to_be_visible()
    stand_in.loading = {"stage": "weights"}                     # a run that is only known later
    page.goto("about:blank")
    page.goto(stand_in.url + path)
    expect(page.get_by_role("heading", name="Training run", exact=True)).to_be_visible()
    stand_in.loading = None
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()


def test_a_wrong_address_of_a_run_says_so(page, stand_in):
    open_page(page, stand_in.url, "#run")
    expect(page.get_by_text("The server serves no training run")).to_be_visible()
    page.goto("about:blank")
    open_page(page, stand_in.url, "#run/%E0%A4%A")
    expect(page.get_by_text("The server has no training run %E0%A4%A.")).to_be_visible()


def test_a_curve_is_drawn_however_late_its_library_is(page, stand_in):
    held = []
    page.route("**/uplot*.js*", lambda route: held.append(route))
    stand_in.several = steps("unloaded", "ready", "ready")
    open_page(page, stand_in.url)
    menu(page, "Training run")
    page.wait_for_function("() => typeof Charts !== 'undefined'")
    page.evaluate("Page.render()")           # as when the answer about the run's steps comes
    for route in held:
        route.continue_()
    expect(page.get_by_role("img", name="10: 2.990, 20: 2.980, 30: 2.970", exact=True)).to_be_visible()


def test_a_click_on_a_point_begins_a_chat(page, stand_in):
    stand_in.several = steps("ready", "ready", "ready")
    opened(page, stand_in)
    page.wait_for_function("() => Run.shown.charts.size")
    page.mouse.move(*point(page, 20))
    expect(page.locator("#run-chosen")).to_have_text("d4@20 · Bits per byte: 2.980 · −0.010 since the step before")
    x, y = page.locator("#run .mark").evaluate("mark => { const {x, y, width} = mark.getBoundingClientRect(); return [x + width / 2, y]; }")
    assert abs(x - point(page, 20)[0]) < 2 and y > 0
    page.mouse.click(*point(page, 20))
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d4@20")
    ask(page, "hello")
    expect_answered(page)
    assert stand_in.bodies[-1]["model"] == "d4@20"


def test_slider_and_rows_serve_the_keyboard(page, stand_in):
    stand_in.several = steps("ready", "failed", "ready")
    opened(page, stand_in)
    slider = page.get_by_role("slider", name="Step")
    slider.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "d4@10")
    expect(button(page, "Compare with the step before")).to_be_disabled()
    slider.press("ArrowRight")
    expect(button(page, "Chat with this step")).to_be_disabled()           # it failed
    expect(button(page, "Chat with d4@20")).to_be_disabled()
    slider.press("End")
    expect(button(page, "Compare with the step before")).to_be_enabled()
    slider.press("Home")
    button(page, "Chat with this step").press("Enter")
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d4@10")
    menu(page, "Training run")
    button(page, "Chat with d4@30").press("Enter")
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d4@30")


def test_scores_are_said_and_the_focus_stays(page, stand_in):
    stand_in.several = steps("unloaded", "unloaded", "unloaded", scores=False)
    opened(page, stand_in)
    expect(page.locator("#run-caption")).to_contain_text("No step is scored yet. A server with --watch-text")
    expect(page.locator("#run-curve")).to_be_hidden()
    button(page, "Chat with d4@10").focus()
    stand_in.several[2] |= {"scoring": True, "state": "ready"}
    expect(page.locator("#run-now")).to_have_text("In memory: d4@30. Being scored: d4@30. 3 steps wait for a score.")
    expect(row(page, 30)).to_contain_text("loaded being scored")
    expect(button(page, "Chat with d4@10")).to_be_focused()
    stand_in.several[2] |= {"scoring": False, "bits_per_byte": 2.5}
    expect(page.locator("#run-caption")).to_contain_text("appears with the second score")
    stand_in.several[1] |= {"bits_per_byte": 2.75}
    expect(page.get_by_role("img", name="20: 2.750, 30: 2.500", exact=True)).to_be_visible()
    expect(page.locator("#run-now")).to_contain_text("1 step waits for a score.")


def test_the_metrics_of_a_run_are_a_choice(page, stand_in, theme):
    stand_in.several = steps("ready", "ready", "failed", scores=False)
    known = [{"val_bpb": 0.9, "tokens": 5_000_000}, {"val_bpb": 0.8, "tokens": 10_000_000}, {}]
    page.route("**/v1/runs/d4", lambda route: route.fulfill(json={"object": "run", "id": "d4", "steps": [
        {"model": step["id"], "step": step["step"], "metrics": metrics} for step, metrics in zip(stand_in.several, known, strict=True)]}))
    opened(page, stand_in)
    choice = page.get_by_role("combobox", name="Metric")
    expect(choice.locator("option")).to_have_text(["Validation bits per byte", "Tokens trained on"])
    expect(page.get_by_role("img", name="10: 0.900, 20: 0.800", exact=True)).to_be_visible()
    choice.select_option("tokens")
    expect(page.get_by_role("img", name="10: 5M, 20: 10M", exact=True)).to_be_visible()
    choice.select_option("val_bpb")
    expect(page.locator("#run-caption")).to_contain_text("Validation bits per byte, less is better.")
    expect(page.get_by_role("columnheader", name="Validation bits per byte")).to_be_visible()
    expect(row(page, 20)).to_contain_text("0.800−0.100")
    known[2]["core_metric"] = 0.25
    expect(choice.locator("option")).to_have_text(["Validation bits per byte", "CORE", "Tokens trained on"])
    expect(choice).to_have_value("val_bpb")                        # as chosen
    expect_accessible(page, theme=theme)


def test_several_runs_are_a_choice(page, stand_in):
    stand_in.several = steps("ready", "ready") + steps("ready", run="run a/b")
    stand_in.several[1]["default"] = False
    open_page(page, stand_in.url, "#run/none")
    expect(page.get_by_text("The server has no training run none.")).to_be_visible()
    page.get_by_role("combobox", name="Training run").select_option("run a/b")
    expect(page.get_by_role("heading", name="Training run run a/b")).to_be_visible()
    assert page.url.endswith("#run/run%20a%2Fb")
    expect(button(page, "Previous against latest")).to_be_hidden()          # there is one step
    reload(page)
    expect(page.get_by_role("heading", name="Training run run a/b")).to_be_visible()
    button(page, "Back to the chat").click()
    expect(message_box(page)).to_be_visible()


def test_others_add_to_the_view_of_a_run(page, stand_in):
    stand_in.several = steps("ready", "ready")
    open_page(page, stand_in.url)
    page.evaluate("Parts.register({run: {nodes: steps => [Parts.element('p', {textContent: `${steps.length} steps of ${steps[0].run}`})]}})")
    menu(page, "Training run")
    expect(page.locator("#run-more")).to_have_text("2 steps of d4")


@pytest.mark.slow
def test_a_run_that_trains_is_seen_step_by_step(browser, nanochat_fixtures, tmp_path, theme):
    base, text = tmp_path / "base", tmp_path / "held_out.txt"
    shutil.copytree(nanochat_fixtures / "gen1" / "tokenizer", base / "tokenizer")
    text.write_text(tiny_training.TEXT)
    run = tiny_training.train(base, 60, 20)
    next(run)
    with started_server("--watch", str(base), "--watch-text", str(text), "--nice", "0") as url, visitor(browser) as page:
        open_page(page, url, "#run/d2")
        expect(page.get_by_text("1 step · the latest is d2-base@20")).to_be_visible(timeout=4 * SLOW_MS)
        assert [step for step, _ in run] == [40, 60]                      # while the view is open
        curve = page.get_by_role("img", name=re.compile(r"^20: [\d.]+, 40: [\d.]+, 60: [\d.]+$"))
        expect(curve).to_be_visible(timeout=4 * SLOW_MS)
        shown = [float(part.split(": ")[1]) for part in curve.get_attribute("aria-label").split(", ")]
        with urllib.request.urlopen(url + "v1/models") as response:
            scores = [model["bits_per_byte"] for model in json.load(response)["data"]]
        assert shown == pytest.approx(scores, abs=0.0006)
        page.get_by_role("textbox", name="Question").fill("hello")
        button(page, "Previous against latest").click()
        dialog = page.get_by_role("dialog", name="Compare")
        columns = dialog.get_by_role("region")
        expect(columns.get_by_role("button", name="Continue with this")).to_have_count(2, timeout=4 * SLOW_MS)
        assert page.evaluate("Compare.shown.columns.map(({end}) => end.model)") == ["d2-base@40", "d2-base@60"]
        assert len(set(page.evaluate("Compare.shown.columns.map(({end}) => end.seed)"))) == 1
        expect(dialog.get_by_text("hello", exact=True)).to_be_visible()
        expect_accessible(page, theme=theme)
        written = columns.nth(0).locator(".compared").inner_text()
        columns.nth(0).get_by_role("button", name="Continue with this").click()
        expect(said(questions(page))).to_have_text("hello")
        assert said(answers(page)).inner_text().split() == written.split()
        expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d2-base@40")
        ask(page, "and now?")
        expect_answered(page, 2)
        assert page.evaluate("Chat.lastNode().model") == "d2-base@40"


def test_an_operator_exports_a_step(browser, nanochat_fixtures, tmp_path, theme):
    """The folder has the step's name. A second export says that it is there."""
    with started_server("--watch", str(nanochat_fixtures / "gen5"), "--export-folder", str(tmp_path / "out")) as url, visitor(browser) as page:
        open_page(page, url, "#run/d4")
        export = button(page, "Export d4-sft@650")
        expect(export).to_be_visible(timeout=SLOW_MS)
        export.click()
        expect(row(page, 650)).to_contain_text("exported as d4-sft-650", timeout=4 * SLOW_MS)
        assert (tmp_path / "out" / "d4-sft-650" / "model.safetensors").exists()
        expect_accessible(page, theme=theme)
        export.click()
        expect(row(page, 650)).to_contain_text("d4-sft-650 exists", timeout=4 * SLOW_MS)


@pytest.mark.slow
def test_without_a_folder_for_exports_no_step_has_the_button(browser, nanochat_fixtures):
    with started_server("--watch", str(nanochat_fixtures / "gen5")) as url, visitor(browser) as page:
        open_page(page, url, "#run/d4")
        expect(button(page, "Chat with d4-sft@650")).to_be_visible(timeout=SLOW_MS)
        page.wait_for_function("() => Server.model.name")
        expect(button(page, "Export d4-sft@650")).to_have_count(0)
