"""The page's view of a run: what its steps write after prompts, the items that two of them judge differently, each in the token lens."""

import pytest

from browsing import button, expect, expect_accessible, menu, needs_browser, open_page
from page_server import MODEL

pytestmark = needs_browser

PROMPTS = ("The capital of France is", "My favorite color is")


@pytest.fixture
def run_of_three(page, stand_in):
    """A run whose first step has no samples yet; how its steps are answered by the stand-in's routes."""
    stand_in.several = [MODEL | {"id": f"d4@{step}", "run": "d4", "step": step, "state": "ready", "bits_per_byte": None, "default": step == 30,
                                 "capabilities": {"compare": True, "token_ids": True}} for step in (10, 20, 30)]
    found = [{"model": f"d4@{step}", "step": step, "metrics": {}, "judged": step > 10, "samples": [
        {"prompt": prompt, "text": f" <b>{step}</b>\n{place}"} for place, prompt in enumerate(PROMPTS)] if step > 10 else []} for step in (10, 20, 30)]
    flips = {"gained": 60, "lost": 1, "items": [
        {"task": "arc", "item": 4, "correct": True, "chat": False, "texts": ["Shot: x\n\nQ: sea? a", "Shot: x\n\nQ: sea? b"], "gold": 1},
        {"task": "MMLU", "item": 1234, "correct": False, "chat": True, "texts": ["Multiple Choice question: what?"], "gold": "C"}]}
    asked = []

    def of_run(route):
        query = route.request.url.partition("?")[2]
        asked.append(query)
        route.fulfill(json={"object": "run", "id": "d4", "steps": found, **({"flips": flips} if query else {})})

    page.route("**/v1/runs/d4*", of_run)
    open_page(page, stand_in.url)
    menu(page, "Training run")
    return found, flips, asked


def answer_with_tokens(page, route, texts, bodies):
    """Log-probabilities of these tokens from a route that the lens asks."""
    def fulfil(call):
        bodies.append(call.request.post_data_json)
        content = [{"id": id_, "token": text, "logprob": None if text == "<first>" else -0.1 * id_, "bytes": [], "top_logprobs": [
            {"id": 99, "token": "other", "logprob": -2.0}]} for id_, text in enumerate(texts)]
        call.fulfill(json={"choices": [{"index": 0, "logprobs": {"content": content}}]})

    page.route(f"**/{route}", fulfil)
    page.route("**/tokenize", lambda call: call.fulfill(json={"tokens": [{"id": id_, "piece": texts[id_]} for id_ in call.request.post_data_json["content"]]}))


def test_samples_open_in_the_lens(page, run_of_three, theme):
    table = page.locator("#run-samples")
    expect(table.get_by_role("columnheader")).to_have_text(["Step", *PROMPTS])
    expect(table.locator("tbody tr")).to_have_count(2)                 # the latest first; step 10 has none
    expect(table.locator("tbody tr").first.locator("td")).to_have_text(["30", " <b>30</b>\n0", " <b>30</b>\n1"])
    bodies = []
    answer_with_tokens(page, "v1/completions", ["<first>", " blue", "!"], bodies)
    button(page, "Token lens: d4@20, My favorite color is").click()
    dialog = page.get_by_role("dialog", name="d4@20")
    expect(dialog.get_by_role("option")).to_have_text([" blue", "!"])
    assert [bodies[0][name] for name in ("model", "prompt", "max_tokens", "temperature")] == ["d4@20", PROMPTS[1], 16, 0] and "echo" not in bodies[0]
    dialog.get_by_role("option").first.click()
    expect(dialog).to_contain_text("other")
    expect(dialog.get_by_role("button")).to_have_count(1)              # no other answer can be begun from here
    expect_accessible(page, theme=theme)
    button(dialog, "Done").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name="Training run d4")).to_be_visible()


def test_changed_items_open_in_the_lens(page, run_of_three, theme):
    _, flips, asked = run_of_three
    expect(page.get_by_label("From step")).to_have_value("d4@20")
    expect(page.get_by_label("to step")).to_have_value("d4@30")
    button(page, "Show items").click()
    expect(page.locator("#flips")).to_contain_text("60 now right, 1 now wrong; the first 2:")
    assert "before=d4%4020&after=d4%4030" in asked
    items = page.locator("#flips li")
    expect(items.nth(0)).to_contain_text("Now right arc · 4")
    expect(items.nth(0).locator("p")).to_have_text(["Q: sea? a", "Q: sea? b (right)"])        # without the examples before
    expect(items.nth(1)).to_contain_text("Right: C")
    bodies = []
    answer_with_tokens(page, "v1/completions", ["<first>", "Q", "b"], bodies)
    button(page, "Token lens: d4@30, arc 4, 2").click()
    expect(page.get_by_role("dialog", name="d4@30").get_by_role("option")).to_have_text(["Q", "b"])
    assert bodies[0]["prompt"] == flips["items"][0]["texts"][1] and bodies[0]["echo"] is True and bodies[0]["max_tokens"] == 0
    page.keyboard.press("Escape")
    answer_with_tokens(page, "v1/chat/completions", ["A"], bodies)
    button(page, "Token lens: d4@30, MMLU 1234").click()
    expect(page.get_by_role("dialog", name="d4@30").get_by_role("option")).to_have_text(["A"])
    assert bodies[1]["messages"] == [{"role": "user", "content": "Multiple Choice question: what?"}]
    page.keyboard.press("Escape")
    page.get_by_label("From step").select_option("30")
    expect(page.locator("#flips")).to_be_empty()                      # they were of other steps
    expect_accessible(page, theme=theme)


def test_a_run_without_samples_shows_none(page, run_of_three):
    found, _, _ = run_of_three
    expect(page.locator("#run-samples")).to_be_visible()
    page.route("**/v1/runs/d4?*", lambda route: route.fulfill(status=409, json={"error": {"message": "the files of --watch-suite have changed", "code": None}}))
    button(page, "Show items").click()
    expect(page.locator("#flips")).to_contain_text("The files of --watch-suite have changed")
    for step in found:
        step |= {"samples": [], "judged": False}
    expect(page.locator("#run-samples")).to_have_count(0)
    expect(page.locator("#flips")).to_have_count(0)
