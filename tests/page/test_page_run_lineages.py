"""The page's view of a lineage: base, SFT and RL of a tag in one view, training loss and reward, a second run beside it, what is stale or gone."""

import json
import re
import shutil
import urllib.request

import pytest

from browsing import SLOW_MS, ask, button, expect, expect_accessible, expect_answered, menu, needs_browser, open_page, started_server, visitor
from nightly import by_day
from page_server import MODEL

pytestmark = needs_browser


class Runs:
    """Lineages as the server has them: `models` for /v1/models, and the answers of /v1/runs; `asked` names what was requested."""

    def __init__(self):
        self.steps = {}
        self.asked = []

    def add(self, lineage, stage, step, state="unloaded", stale=(), warning=None, **metrics):
        run = f"{lineage}-{stage}"
        found = {"model": f"{run}@{step}", "run": run, "stage": stage, "step": step, "state": state, "weights_digest": f"{run}{step}",
                 "metrics": metrics, "stale": list(stale), "judged": False, "samples": []}
        self.steps.setdefault(lineage, []).append(found | ({"warning": warning} if warning else {}))
        return found

    def models(self):
        return [MODEL | {"id": step["model"], "run": step["run"], "lineage": lineage, "stage": step["stage"], "step": step["step"], "state": step["state"],
                         "bits_per_byte": step["metrics"].get("bits_per_byte"), "capabilities": {"compare": True, "token_ids": True}, "default": False}
                for lineage, steps in self.steps.items() for step in steps if step["state"] != "removed"]

    def answer(self, route):
        name = route.request.url.rpartition("/v1/runs")[2].lstrip("/")
        self.asked.append(name)
        if not name:
            data = [{"object": "run", "id": lineage, "runs": [{"id": run, "stage": run.rpartition("-")[2], "steps": 1, "latest": ""} for run in
                    dict.fromkeys(step["run"] for step in steps)]} for lineage, steps in self.steps.items()]
            return route.fulfill(json={"object": "list", "data": data})
        steps = [step for lineage, own in self.steps.items() for step in own if name in (lineage, step["run"])]
        return route.fulfill(json={"object": "run", "id": name, "runs": [], "steps": steps}) if steps else route.fulfill(status=404, json={})


@pytest.fixture
def runs(page, stand_in):
    """d4 from base to RL, and d6 in base and SFT."""
    known = Runs()
    for step in (400, 800, 1200):
        known.add("d4", "base", step, "removed" if step == 400 else "ready", stale=["val_bpb"] if step == 1200 else (), val_bpb=1.2 - step / 4000,
                  train_loss=4 - step / 1000, tokens=step * 1000)
    for step in (200, 449):
        known.add("d4", "sft", step, val_bpb=0.6 - step / 5000, train_loss=1.5 - step / 1000)
    for step in (60, 99):
        known.add("d4", "rl", step, reward=step / 200)
    for step in (500, 1000):
        known.add("d6", "base", step, val_bpb=1.1 - step / 4000, train_loss=3.8 - step / 1000, tokens=step * 2000)
    known.add("d6", "sft", 300, val_bpb=0.5)
    stand_in.several = known.models()
    page.route("**/v1/runs*", known.answer)
    page.route("**/v1/runs/**", known.answer)
    return known


def curve(page, metric="curve"):
    """The chosen metric's chart, or that of another one."""
    return page.locator("#run-curve" if metric == "curve" else f"#run-chart-{metric}")


def spot(page, metric, model):
    """Where a step's point lies in the window."""
    return page.evaluate("""([metric, model]) => { const {plot, box} = Run.shown.charts.get(metric); box.scrollIntoView({block: "center"});
        const {left, top} = plot.over.getBoundingClientRect(), {x, y} = box.shown.points.find(({step}) => step.id === model); return [left + plot.valToPos(x, "x"), top + plot.valToPos(y, "y")]; }""", [metric, model])


def color_at(page, metric, model):
    """The colour of the canvas in the middle of a step's mark: red, green, blue."""
    return page.evaluate("""([metric, model]) => { const {plot, box} = Run.shown.charts.get(metric), {x, y} = box.shown.points.find(({step}) => step.id === model);
        return [...plot.ctx.getImageData(Math.round(plot.valToPos(x, "x", true)), Math.round(plot.valToPos(y, "y", true)), 1, 1).data].slice(0, 3); }""", [metric, model])


def row(page, model):
    return page.get_by_role("row").filter(has=page.get_by_role("cell", name=model, exact=True))


def opened(page, stand_in, path="#run/d4"):
    open_page(page, stand_in.url, path)
    page.wait_for_function("() => typeof Run !== \"undefined\" && Run.shown?.charts.size")


def test_a_lineage_is_one_view_from_base_to_rl(page, stand_in, runs, theme):
    opened(page, stand_in)
    expect(page.locator("#run-about")).to_have_text("7 steps: 3 of base, 2 of sft, 2 of rl · the latest is d4-rl@99")
    expect(curve(page)).to_have_attribute("aria-label", "d4-base@400: 1.100, d4-base@800: 1.000, d4-base@1200: 0.900 (of an earlier step), "

                                          "400: 1.100, 800: 1.000, 1,200: 0.900 (of an earlier step)" if False else
                                          re.compile("^d4-base@400: 1.100, .*, d4-sft@449: 0.510$"))
    expect(page.locator("#run-steps").get_by_role("rowheader")).to_have_text(["d4-rl · 2 steps", "d4-sft · 2 steps", "d4-base · 3 steps"])
    expect(row(page, "d4-sft@449")).to_contain_text("0.510−0.050")
    expect(row(page, "d4-sft@200").get_by_role("cell").nth(2)).to_be_empty()            # its change is none of base's
    order = [spot(page, "val_bpb", model)[0] for model in ("d4-base@400", "d4-base@1200", "d4-sft@200", "d4-sft@449")]
    assert order == sorted(order), "the stages lie one after the other"
    assert page.evaluate("Run.shown.charts.get('val_bpb').box.shown.layout.parts.map(({stage}) => stage)") == ["base", "sft", "rl"]
    expect_accessible(page, theme=theme)


def test_loss_and_reward_have_their_own_charts(page, stand_in, runs):
    opened(page, stand_in)
    expect(page.locator("#run-caption")).to_contain_text("Validation bits per byte, on each stage's own data, less is better.")
    expect(page.get_by_text("Training loss, nats per token, smoothed, less is better")).to_be_visible()
    expect(curve(page, "train_loss")).to_have_attribute("aria-label", re.compile("^d4-base@400: 3.600, .*d4-sft@449: 1.051$"))
    expect(curve(page, "reward")).to_have_attribute("aria-label", "d4-rl@60: 0.300, d4-rl@99: 0.495")
    expect(page.locator("#run-steps thead th")).to_have_text(["Step", "Validation bits per byte", "Change", "Training loss", "Reward", "State", "Try it"])
    expect(row(page, "d4-rl@99")).to_contain_text("0.495")
    page.get_by_role("combobox", name="Metric").select_option("reward")
    expect(curve(page)).to_have_attribute("aria-label", "d4-rl@60: 0.300, d4-rl@99: 0.495")
    expect(curve(page, "reward")).to_have_count(0)                                      # it is the large one now
    expect(curve(page, "val_bpb")).to_be_visible()
    page.mouse.click(*spot(page, "val_bpb", "d4-sft@200"))
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d4-sft@200")


def test_a_stage_with_far_other_values_flattens_no_other(page, stand_in, runs):
    """Then each stage has a scale of its own, with its ends beside it; the values stay what they are."""
    steps = {"base": {500: 1.02, 1000: 0.98, 2000: 0.95}, "sft": {100: 0.32, 200: 0.31}}
    for stage, values in steps.items():
        for step, value in values.items():
            runs.add("d8", stage, step, val_bpb=value)
    stand_in.several = runs.models()
    opened(page, stand_in, "#run/d8")
    height = page.evaluate("Run.shown.charts.get('val_bpb').plot.over.clientHeight")
    for stage, values in steps.items():
        tops = [spot(page, "val_bpb", f"d8-{stage}@{step}")[1] for step in values]
        assert tops == sorted(tops) and tops[-1] - tops[0] > height / 2
    expect(curve(page)).to_have_attribute("aria-label", re.compile("d8-base@500: 1.020, .*d8-sft@200: 0.310"))
    page.mouse.move(*spot(page, "val_bpb", "d8-sft@100"))
    expect(curve(page).locator(".tip")).to_contain_text("0.320")
    opened(page, stand_in, "#run/d6")                         # 0.98 to 0.5: one scale
    assert page.evaluate("Run.shown.charts.get('val_bpb').box.shown.scales") is None


@pytest.mark.parametrize("values", [[0.8001, 0.8002, 0.8004], [12345.1, 12345.4, 12345.9], [1.5, 1.5, 1.5], [3, 2, 1]])
def test_labels_of_values_differ(page, stand_in, runs, values):
    for number, value in enumerate(values, 1):
        runs.add("d9", "base", number * 100, val_bpb=value)
    stand_in.several = runs.models()
    opened(page, stand_in, "#run/d9")
    texts = [text for text in page.evaluate("Run.shown.charts.get('val_bpb').plot.axes[1]._values") if text]
    assert texts and len({*texts}) == len(texts), texts


def test_a_stage_alone_has_the_address_of_its_run(page, stand_in, runs):
    opened(page, stand_in, "#run/d4-sft")
    expect(page.get_by_role("heading", name="Training run d4-sft")).to_be_visible()
    expect(page.locator("#run-about")).to_have_text("2 steps, 200 to 449 · the latest is d4-sft@449")
    expect(curve(page)).to_have_attribute("aria-label", "200: 0.560, 449: 0.510")
    expect(page.locator("#run-steps").get_by_role("rowheader")).to_have_count(0)
    choice = page.get_by_role("combobox", name="Training run")
    expect(choice.locator("option")).to_have_text(["d4", "d4-base", "d4-sft", "d4-rl", "d6", "d6-base", "d6-sft"])
    choice.select_option("d4")
    expect(page.locator("#run-about")).to_contain_text("7 steps")
    assert page.url.endswith("#run/d4")
    page.go_back()
    expect(page.get_by_role("heading", name="Training run d4-sft")).to_be_visible()


def test_a_stale_value_is_hollow_and_says_so(page, stand_in, runs):
    opened(page, stand_in)
    expect(row(page, "d4-base@1200")).to_contain_text("0.900 (of an earlier step)")
    expect(page.locator("#run-legend")).to_have_text("hollow: the value is of an earlier step")
    assert color_at(page, "val_bpb", "d4-base@1200") == [253, 253, 252] != color_at(page, "val_bpb", "d4-base@800")      # the page's own
    page.mouse.move(*spot(page, "val_bpb", "d4-base@1200"))
    expect(page.locator("#run-curve .tip")).to_have_text("d4-base@1200 · 0.900 (of an earlier step)")
    expect(page.locator("#run-curve .tip")).to_be_visible()
    expect(page.locator("#run-chosen")).to_contain_text("Validation bits per byte: 0.900 (of an earlier step) · −0.100 since the step before · Training loss: 2.800")


def test_a_removed_step_stays_but_nobody_chats_with_it(page, stand_in, runs):
    opened(page, stand_in)
    expect(row(page, "d4-base@400")).to_contain_text("files removed")
    expect(row(page, "d4-base@400").get_by_role("button")).to_have_count(0)
    expect(button(page, "Compare d4-base@800 with the step before")).to_be_disabled()     # it would be the removed one
    expect(button(page, "Compare d4-sft@200 with the step before")).to_be_enabled()       # the last one of base
    page.mouse.click(*spot(page, "val_bpb", "d4-base@400"))
    expect(page.locator("#run-chosen")).to_have_text("d4-base@400 · Validation bits per byte: 1.100 · Training loss: 3.600 · its files were removed")
    expect(button(page, "Chat with this step")).to_be_hidden()
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()
    for step in runs.steps["d4"][-2:]:                               # while the view is open
        step["state"] = "removed"
    stand_in.several = runs.models()
    expect(page.locator("#run-about")).to_contain_text("the latest is d4-sft@449")
    expect(row(page, "d4-rl@99")).to_contain_text("files removed")
    expect(curve(page, "reward")).to_have_attribute("aria-label", "d4-rl@60: 0.300, d4-rl@99: 0.495")


def test_the_latest_step_is_chosen_at_first(page, stand_in, runs):
    opened(page, stand_in)
    expect(page.locator("#run-chosen")).to_contain_text("d4-rl@99")
    runs.add("d4", "rl", 120, reward=0.6)
    stand_in.several = runs.models()
    expect(page.locator("#run-chosen")).to_contain_text("d4-rl@120")
    page.get_by_role("slider", name="Step").press("Home")
    runs.add("d4", "rl", 180, reward=0.7)
    stand_in.several = runs.models()
    expect(row(page, "d4-rl@180")).to_contain_text("0.700")
    expect(page.locator("#run-chosen")).to_contain_text("d4-base@400")


@pytest.mark.parametrize("path, metrics", by_day([("#run/d4", ("val_bpb", "train_loss", "reward")), ("#run/d4-base", ("val_bpb", "train_loss"))],
                                                 ("#run/d4", ("val_bpb", "train_loss", "reward"))))
def test_steps_that_come_draw_what_a_fresh_page_draws(page, stand_in, runs, path, metrics):
    opened(page, stand_in, path)
    drawn = """metric => Run.shown.charts.get(metric).plot.ctx.canvas.toDataURL()"""
    for step in (2000, 3000, 4000):                             # beside them the reward has the same values, at other places
        runs.add("d4", "base", step)
    stand_in.several = runs.models()
    expect(page.locator("#run-about")).to_contain_text("4,000" if "base" in path else "6 of base")
    settle = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.evaluate(settle)
    live = [page.evaluate(drawn, metric) for metric in metrics]
    page.goto("about:blank")
    opened(page, stand_in, path)
    expect(page.locator("#run-about")).to_contain_text("4,000" if "base" in path else "6 of base")
    page.wait_for_function("count => Run.shown.charts.size === count", arg=len(metrics))
    page.evaluate(settle)
    assert [page.evaluate(drawn, metric) == before for metric, before in zip(metrics, live, strict=True)] == [True] * len(metrics)


@pytest.mark.slow
def test_a_run_with_only_scores_can_be_looked_at(page, stand_in, runs):
    for step in runs.steps["d6"]:
        step["state"] = "removed"
    stand_in.several = runs.models()
    opened(page, stand_in)
    page.get_by_role("combobox", name="Training run").select_option("d6")
    expect(page.locator("#run-about")).to_have_text("3 steps: 2 of base, 1 of sft")
    expect(curve(page)).to_have_attribute("aria-label", "d6-base@500: 0.975, d6-base@1000: 0.850, d6-sft@300: 0.500")
    expect(page.locator("#run-steps").get_by_role("button")).to_have_count(0)
    expect(page.locator("#run-compare")).to_be_hidden()


def test_a_warning_is_said_once_with_its_steps(page, stand_in, runs, theme):
    for step in runs.steps["d4"][-4:]:
        step["warning"] = "this checkpoint was trained with another forward: 0.98 there, 1.06 here"
    opened(page, stand_in)
    expect(page.locator("#run-warnings li")).to_have_text([re.compile("^d4-sft@200 and 3 more: this checkpoint was trained with another forward")])
    expect(row(page, "d4-rl@99")).to_contain_text("0.98 there, 1.06 here")
    expect(page.locator("#run-legend")).to_contain_text("ringed: see the warning")
    expect_accessible(page, theme=theme)


def test_a_second_lineage_lies_in_the_same_charts(page, stand_in, runs, theme):
    opened(page, stand_in)
    beside = page.get_by_role("combobox", name="Beside")
    expect(beside.locator("option")).to_have_text(["none", "d6", "d6-base", "d6-sft"])      # none of its own stages
    beside.select_option("d6")
    expect(curve(page)).to_have_attribute("aria-label", re.compile("d4-sft@449: 0.510, d6-base@500: 0.975, d6-base@1000: 0.850, d6-sft@300: 0.500$"))
    expect(page.locator("#run-legend li").first).to_have_text("d4")
    expect(page.locator("#run-legend li").nth(1)).to_have_text("d6")
    expect(page.locator("#run-steps").get_by_role("rowheader")).to_have_text(
        ["d4-rl · 2 steps", "d4-sft · 2 steps", "d4-base · 3 steps", "d6-sft · 1 step", "d6-base · 2 steps"])
    assert color_at(page, "val_bpb", "d4-base@800") != color_at(page, "val_bpb", "d6-base@500")
    assert page.evaluate("Run.shown.charts.get('val_bpb').plot.series.slice(1).map(({dash}) => dash.length > 0)") == [False, False, True, True]
    assert spot(page, "val_bpb", "d4-base@800")[0] < spot(page, "val_bpb", "d6-base@1000")[0] < spot(page, "val_bpb", "d4-base@1200")[0], "one scale of steps"
    page.mouse.move(*spot(page, "val_bpb", "d6-sft@300"))
    expect(page.locator("#run-chosen")).to_contain_text("d6-sft@300")
    expect_accessible(page, theme=theme)
    assert page.url.endswith("#run/d4?with=d6")
    page.goto("about:blank")
    opened(page, stand_in, "#run/d4?with=d6")
    expect(beside).to_have_value("d6")
    page.get_by_role("slider", name="Step").press("End")
    expect(page.locator("#run-chosen")).to_contain_text("d6-sft@300")                       # the keyboard reaches both
    button(page, "Latest against latest").click()
    page.wait_for_function("() => typeof Compare !== 'undefined' && Compare.shown?.columns.length === 2")
    assert page.evaluate("Compare.shown.columns.map(({model}) => model.value)") == ["d4-rl@99", "d6-sft@300"]
    page.keyboard.press("Escape")
    beside.select_option("none")
    expect(page.locator("#run-steps").get_by_role("rowheader")).to_have_count(3)
    assert page.url.endswith("#run/d4")


@pytest.mark.parametrize("path", by_day(["#run/d4?with=d4-base", "#run/d4-base?with=d4", "#run/d4?with=gone", "#run/d4?with=%E0%A4%A", "#run/d4?with="],
                                       "#run/d4?with=%E0%A4%A"))
def test_a_useless_second_run_changes_nothing(page, stand_in, runs, path):
    opened(page, stand_in, path)
    models = page.locator("#run-steps tbody tr:not(.group)")
    expect(models).to_have_count(3 if "d4-base?" in path else 7)
    assert len(page.evaluate("Run.shown.charts.get('val_bpb').plot.series")) == (2 if "d4-base?" in path else 3)


def test_two_runs_are_drawn_by_tokens_if_known(page, stand_in, runs):
    opened(page, stand_in, "#run/d4-base?with=d6-base")
    page.get_by_role("combobox", name="Axis").select_option("tokens")
    page.wait_for_function("() => Run.shown.charts.get('val_bpb').box.shown.layout.parts[0].by === 'tokens'")
    assert page.evaluate("Run.shown.charts.get('val_bpb').box.shown.points.map(({x}) => x)") == [400_000, 800_000, 1_200_000, 1_000_000, 2_000_000]
    page.get_by_role("combobox", name="Beside").select_option("d6-sft")                     # which knows none
    expect(page.get_by_role("combobox", name="Axis")).to_be_hidden()
    page.get_by_role("combobox", name="Beside").select_option("d6")
    expect(page.get_by_role("combobox", name="Axis")).to_be_visible()                       # its base does
    assert page.evaluate("Run.shown.charts.get('val_bpb').box.shown.layout.parts.map(({stage, by}) => [stage, by])") == [["base", "tokens"], ["sft", "step"]]


@pytest.mark.slow
def test_the_view_fits_a_phone(browser, stand_in, runs, theme):
    with visitor(browser, viewport={"width": 390, "height": 760}, has_touch=True) as page:
        page.route("**/v1/runs*", runs.answer)
        page.route("**/v1/runs/**", runs.answer)
        opened(page, stand_in, "#run/d4?with=d6")
        assert page.evaluate("document.getElementById('run').scrollWidth <= document.getElementById('run').clientWidth")
        for box in page.locator("#run .chart").all():
            assert box.bounding_box()["width"] <= 390
        expect_accessible(page, theme=theme)


@pytest.mark.parametrize("trained, rewarded", by_day([(160, 40), (800, 200)], (160, 40)))
def test_a_thousand_steps_change_only_what_is_new(page, stand_in, trained, rewarded):
    known = Runs()
    for step in range(1, trained + 1):
        known.add("d4", "base", 10 * step, val_bpb=1 + 1 / step, train_loss=3 + 1 / step)
    for step in range(1, rewarded + 1):
        known.add("d4", "rl", 10 * step, reward=step / rewarded)
    for run in range(19):
        known.add(f"e{run}", "base", 10, val_bpb=1)
    stand_in.several = known.models()
    page.route("**/v1/runs*", known.answer)
    page.route("**/v1/runs/**", known.answer)
    opened(page, stand_in)
    expect(page.locator("#run-steps tbody tr")).to_have_count(trained + rewarded + 2, timeout=60_000)
    expect(curve(page)).to_have_attribute("aria-label", f"{trained} points, d4-base@10: 2.000 to d4-base@{10 * trained}: {1 + 1 / trained:.3f}; least d4-base@{10 * trained}: {1 + 1 / trained:.3f}, most d4-base@10: 2.000. The table has all.")
    expect(page.locator("#run-steps th[scope=col]").nth(4)).to_have_text("Reward")      # the table has all that is known
    page.evaluate("""() => { window.changes = []; window.plot = Run.shown.charts.get("val_bpb").plot;
        new MutationObserver(found => changes.push(...found)).observe(document.getElementById("run-steps"), {childList: true, subtree: true}); }""")
    known.add("d4", "rl", 10 * rewarded + 10, reward=0.5)
    stand_in.several = known.models()
    expect(page.locator("#run-steps tbody tr")).to_have_count(trained + rewarded + 3)
    asked = len(known.asked)
    page.wait_for_function("rows => document.querySelectorAll('#run-steps tbody tr').length === rows", arg=trained + rewarded + 3)
    while len(known.asked) < asked + 2:                             # two more looks, at which nothing is new
        page.wait_for_timeout(50)
    assert page.evaluate("changes.reduce((sum, {addedNodes}) => sum + addedNodes.length, 0)") <= 4       # the new step and its group's heading
    assert page.evaluate("plot === Run.shown.charts.get('val_bpb').plot"), "the chart is kept"


NO_RUNS = ["[]", "null", "{", '{"steps": null}', '{"steps": [{}]}', '{"steps": [{"model": "d4-base@800", "metrics": null, "stale": null}]}',
           '{"steps": [{"model": "d4-base@800", "run": "d4-base", "metrics": {"val_bpb": "NaN", "reward": null}}]}']


@pytest.mark.parametrize("body", by_day(NO_RUNS, NO_RUNS[-1]))
def test_answers_that_are_no_runs_end_nothing(page, stand_in, runs, body):
    opened(page, stand_in)
    page.route("**/v1/runs**", lambda route: route.fulfill(body=body, content_type="application/json"))
    page.route("**/v1/runs/**", lambda route: route.fulfill(body=body, content_type="application/json"))
    with page.expect_response("**/v1/runs/d4"):
        pass
    with page.expect_response("**/v1/models"):
        pass
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()
    expect(page.locator("#run-steps tbody tr:not(.group)")).to_have_count(6 if "d4-base" in body or body in ("[]", '{"steps": [{}]}', '{"steps": null}') else 7)
    button(page, "Chat with d4-base@1200").click()
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("d4-base@1200")


def test_names_and_warnings_are_always_text(page, stand_in):
    known = Runs()
    evil = "<img src=x onerror=alert(1)>/../?with=&#"
    for step in (1, 2):
        known.add(evil, "base", step, val_bpb=step, warning="<b>bad</b>")
    known.add("d4", "base", 1, val_bpb=1)
    stand_in.several = known.models()
    page.route("**/v1/runs*", lambda route: route.fulfill(json={"object": "list", "data": []}))
    page.route("**/v1/runs/**", lambda route: route.fulfill(json={"steps": known.steps[evil]}) if "%3Cimg" in route.request.url else route.fulfill(json={"steps": known.steps["d4"]}))
    open_page(page, stand_in.url, "#run/d4")
    page.get_by_role("combobox", name="Beside").select_option(evil)
    expect(page.locator("#run-legend li").nth(1)).to_have_text(evil)
    expect(page.locator("#run-warnings")).to_contain_text("<b>bad</b>")
    url = page.url
    page.goto("about:blank")
    page.goto(url)
    expect(page.get_by_role("combobox", name="Beside")).to_have_value(evil)
    page.get_by_role("combobox", name="Training run").select_option(evil)
    expect(page.get_by_role("heading", name=f"Training run {evil}")).to_be_visible()
    expect(page.locator("#run img")).to_have_count(0)


# a real server --------------------------------------------------------------------------------------------------------

FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def save_step(base, fixture, stage, step, tag="d4", **meta):
    """A checkpoint as upstream saves it at this stage: the weights of generation 5 with another meta file."""
    folder = base / FOLDERS[stage] / tag
    folder.mkdir(parents=True, exist_ok=True)
    source = fixture / "chatsft_checkpoints" / "d4"
    shutil.copy(source / "model_000650.pt", folder / f"model_{step:06d}.pt")
    known = json.loads((source / "meta_000650.json").read_text()) | {"step": step} | meta
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(known))


@pytest.fixture
def trained(nanochat_fixtures, tmp_path):
    """A base folder with d4 from base to RL and d6 in base, and a function that saves another step."""
    base, fixture = tmp_path / "base", nanochat_fixtures / "gen5"
    shutil.copytree(fixture / "tokenizer", base / "tokenizer")
    for step in (400, 800):
        for tag in ("d4", "d6"):
            save_step(base, fixture, "base", step, tag, val_bpb=1.2 - step / (4000 if tag == "d4" else 3000), total_batch_size=1000,
                      user_config={"eval_every": 400 if tag == "d6" else 250, "save_every": 400, "depth": 4},     # so d4's are stale
                      loop_state={"min_val_bpb": 0.9, "smooth_train_loss": 4 - step / 1000, "total_training_time": step})
    save_step(base, fixture, "sft", 449, val_bpb=0.5, loop_state={"smooth_train_loss": 1.5})
    save_step(base, fixture, "rl", 60)
    (base / FOLDERS["rl"] / "d4" / "rl.log").write_text("".join(f"Step {step}/120 | Average reward: {step / 400} | Average sequence length: 9\n" for step in (60, 120)))
    return base, lambda stage, step, **meta: save_step(base, fixture, stage, step, **meta)


def expect_shown(page, steps):
    """The table has what the server knows of these steps, and whatever two of them know of loss and reward has a chart."""
    for step in steps:
        shown = row(page, step["model"])
        for metric in ("val_bpb", "train_loss", "reward"):
            if metric in step["metrics"]:
                expect(shown).to_contain_text(f"{step['metrics'][metric]:.3f}")
        expect(shown.get_by_text("(of an earlier step)")).to_have_count(len(step.get("stale") or ()))
        expect(shown.get_by_text("files removed")).to_have_count(int(step["state"] == "removed"))
    for metric in ("train_loss", "reward"):
        expect(curve(page, metric)).to_have_count(int(sum(metric in step["metrics"] for step in steps) > 1))


@pytest.mark.slow
def test_a_real_run_is_seen_while_it_trains(browser, trained, theme):
    base, save = trained
    with started_server("--watch", str(base), "--results", str(base.parent / "results"), "--nice", "0") as url, visitor(browser) as page:
        open_page(page, url, "#run/d4?with=d6")
        rows = page.locator("#run-steps tbody tr:not(.group)")
        expect(rows).to_have_count(6, timeout=SLOW_MS)
        expect(page.locator("#run-steps").get_by_role("rowheader")).to_have_text(["d4-rl · 1 step", "d4-sft · 1 step", "d4-base · 2 steps", "d6-base · 2 steps"])
        stale = r"( \(of an earlier step\))?"
        expect(curve(page)).to_have_attribute("aria-label", re.compile(
            f"^d4-base@400: 1.100{stale}, d4-base@800: 1.000{stale}, d4-sft@449: 0.500, d6-base@400: 1.067, d6-base@800: 0.933$"))
        save("rl", 120)
        expect(page.locator("#run-about")).to_contain_text("the latest is d4-rl@120", timeout=SLOW_MS)
        for file in (base / "base_checkpoints" / "d4").glob("*_000400.*"):
            file.unlink()
        expect(button(page, "Chat with d4-base@400")).to_have_count(0, timeout=SLOW_MS)
        with urllib.request.urlopen(url + "v1/runs/d4") as response:
            expect_shown(page, json.load(response)["steps"])
        expect_accessible(page, theme=theme)
        page.get_by_role("combobox", name="Axis").select_option("tokens")
        button(page, "Chat with d4-rl@120").click()
        ask(page, "hello")
        expect_answered(page)
        assert page.evaluate("Chat.lastNode().model") == "d4-rl@120"
        shutil.rmtree(base / "chatrl_checkpoints")
        menu(page, "Training run")                                  # the lineage of the chat's model
        expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()
        expect(button(page, "Chat with d4-rl@120")).to_have_count(0, timeout=SLOW_MS)
        expect(page.locator("#run-about")).to_contain_text("the latest is d4-sft@449")


@pytest.mark.slow
def test_items_of_two_real_stages_are_compared(browser, trained, tmp_path):
    base, _ = trained
    shutil.rmtree(base / "base_checkpoints" / "d6")
    words = "The cat sat on the mat. The dog ran after the cat.".split()
    (suite := tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"context": " ".join(words[at:at + 3]), "continuation": words[at + 3]}) for at in range(6)))
    with started_server("--watch", str(base), "--watch-suite", str(suite), "--results", str(tmp_path / "results"), "--nice", "0") as url, visitor(browser) as page:
        open_page(page, url, "#run/d4")
        expect(page.locator("#flips-after option")).to_have_text(["d4-base@400", "d4-base@800", "d4-sft@449", "d4-rl@60"], timeout=4 * SLOW_MS)
        page.locator("#flips-before").select_option("d4-base@800")
        button(page, "Show items").click()
        expect(page.locator("#flips")).to_contain_text("0 now right, 0 now wrong")             # they have the same weights
        page.get_by_role("combobox", name="Training run").select_option("d4-base")
        expect(page.locator("#flips-after option")).to_have_text(["400", "800"])
