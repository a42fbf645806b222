"""The page of a server of many models: a choice of them, which a chat remembers, the steps of a training, adapters."""

import json
import re
import shutil

import pytest

import tiny_training
from browsing import (SLOW_MS, answers, ask, button, chats, command, expect, expect_accessible, expect_answered, figures, inside, menu, needs_browser,
                      open_page, questions, said, started_server, visitor)
from families import make_model, save
from lora import random_adapter

pytestmark = needs_browser


@pytest.mark.slow
def test_a_chat_remembers_its_model(browser, nanochat_fixtures, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    (tmp_path / "config.toml").write_text("".join(f'[[models]]\nname = "{name}"\npath = "{path}"\ntemperature = 0\nmax-tokens = 16\n' for name, path in (
        ("first", nanochat_fixtures / "gen5"), ("second", nanochat_fixtures / "gen3"), ("broken", tmp_path / "broken.gguf"))))
    with started_server("--config", str(tmp_path / "config.toml"), "--kv-cache-memory", "8M") as url, visitor(browser) as page:
        open_page(page, url)
        choice = page.get_by_role("combobox", name="Model", exact=True)
        expect(choice).to_have_value("first")
        expect(choice.locator("option")).to_have_text([re.compile(rf"^{name} · \d+ MB \+ \d+ MB KV$") for name in ("first", "second")] + [re.compile("^broken · failed: .")])
        expect(choice.locator("option").nth(2)).to_be_disabled()
        choice.select_option("second")
        asked = []
        page.on("request", lambda request: asked.append(request.post_data_json) if request.url.endswith("/chat/completions") else None)
        ask(page, "hello")
        expect(page.get_by_text("Loading second")).to_be_visible(timeout=SLOW_MS)
        expect(button(page, "Regenerate")).to_be_visible(timeout=SLOW_MS)
        assert asked[0]["model"] == "second" and said(answers(page)).inner_text()
        choice.focus()
        expect(choice.locator("option").nth(1)).to_have_text(re.compile("second · loaded · "))
        button(page, "New chat").click()
        expect(choice).to_have_value("second")      # as in the chat before
        choice.select_option("first")
        chats(page).first.click()
        expect(choice).to_have_value("second")
        page.reload()
        expect(choice).to_have_value("second")


@pytest.mark.slow
def test_steps_of_a_training_stand_on_a_slider(browser, nanochat_fixtures, tmp_path, theme):
    base, text = tmp_path / "base", tmp_path / "held_out.txt"
    shutil.copytree(nanochat_fixtures / "gen1" / "tokenizer", base / "tokenizer")
    text.write_text(tiny_training.TEXT)
    run = tiny_training.train(base, 60, 20)
    next(run)
    with started_server("--watch", str(base), "--watch-text", str(text), "--nice", "0") as url, visitor(browser) as page:
        open_page(page, url)
        choice = page.get_by_role("combobox", name="Model", exact=True)
        expect(choice.locator("option")).to_have_count(2, timeout=4 * SLOW_MS)
        expect(choice).to_have_value("d2-base@latest")
        for line in ("/temperature 1", "/seed 3", "/maxtokens 12"):
            command(page, line)
        ask(page, "hello")
        expect_answered(page)
        assert [step for step, _ in run] == [40, 60]                      # while the page is open
        choice.focus()
        expect(choice.locator("option").nth(2)).to_have_text(re.compile("^d2-base@latest · now d2-base@60"), timeout=4 * SLOW_MS)
        ask(page, "hello again")
        expect_answered(page, 2)
        assert page.evaluate("Chat.path.filter(({role}) => role === 'assistant').map(({model}) => model)") == ["d2-base@20", "d2-base@60"]
        inside(answers(page).last, "Compare")
        dialog = page.get_by_role("dialog", name="Compare")
        slider, columns = dialog.get_by_role("slider", name="Step"), dialog.get_by_role("region")
        expect(slider.nth(1)).to_have_attribute("aria-valuetext", "d2-base@60")
        for key, step in (("Home", "d2-base@20"), ("ArrowRight", "d2-base@40")):
            slider.nth(1).press(key)
            expect(slider.nth(1)).to_have_attribute("aria-valuetext", step)
        expect(columns.nth(1).get_by_role("spinbutton", name="Seed")).to_have_value("3")        # a fair comparison
        button(dialog, "Compare").click()
        expect(columns.get_by_role("button", name="Continue with this")).to_have_count(2, timeout=4 * SLOW_MS)
        expect_accessible(page, theme=theme)
        columns.nth(1).get_by_role("button", name="Continue with this").click()
        inside(answers(page).last, "Check that it repeats")
        expect(answers(page).last).to_contain_text("It repeats: the same 12 tokens.", timeout=4 * SLOW_MS)
        expect(answers(page).last).not_to_contain_text("weights have changed")


@pytest.mark.slow
def test_columns_of_a_comparison_have_adapters(browser, tmp_path, theme):
    base = save(make_model("llama3.1"), tmp_path / "tiny")
    config = json.loads((base / "config.json").read_text())
    shape = (config["num_attention_heads"] * config["head_dim"], config["hidden_size"])
    folders = [random_adapter(tmp_path / name, config["num_hidden_layers"], {"self_attn.q_proj": shape}, seed, size=0.3)
               for seed, name in enumerate(("law", "tone"))]
    flags = [flag for folder in folders for flag in ("--adapter", f"{folder.name}={folder}")]
    with started_server(str(base), *flags) as url, visitor(browser) as page:
        open_page(page, url)
        choice = page.get_by_role("combobox", name="Model", exact=True)
        expect(choice.locator("option")).to_have_text([re.compile("^tiny · loaded"), re.compile("^law · adapter of tiny · "), re.compile("^tone · adapter of tiny · ")])
        choice.select_option("law")
        command(page, "/maxtokens 8")
        ask(page, "hello")
        expect_answered(page)
        inside(answers(page), "Compare")
        dialog = page.get_by_role("dialog", name="Compare")
        adapters = dialog.get_by_role("combobox", name="Adapter")
        expect(dialog.get_by_role("combobox", name="Model")).to_have_count(0)                    # there is one
        expect(adapters.nth(0)).to_have_value("law")
        adapters.nth(1).select_option("tone")
        button(dialog, "Add a column").click()
        adapters.nth(2).select_option("none")
        button(dialog, "Compare").click()
        expect(dialog.get_by_role("button", name="Continue with this")).to_have_count(3, timeout=SLOW_MS)
        expect_accessible(page, theme=theme)
        assert page.evaluate("Compare.shown.columns.map(({end}) => end.model)") == ["law", "tone", "tiny"]
        assert len(set(page.evaluate("Compare.shown.columns.map(({end}) => end.seed)"))) == 1
        dialog.get_by_role("button", name="Continue with this").nth(1).click()
        inside(answers(page), "Check that it repeats")
        expect(answers(page)).to_contain_text("It repeats: the same 8 tokens.", timeout=SLOW_MS)
        assert page.evaluate("Chat.lastNode().weights") == page.evaluate("Look.weightsOf('tone')") != page.evaluate("Look.weightsOf('law')")


def test_each_answer_says_what_made_it(page, stand_in, theme):
    of_run = {"owned_by": "chat_server", "context_length": 8192, "state": "ready", "capabilities": {"token_ids": True, "compare": True},
              "defaults": {"temperature": 0.7}}
    stand_in.several = [of_run | {"id": "d2@60", "run": "d2", "step": 60, "aliases": ["d2@latest"], "default": True},
                        of_run | {"id": "law", "parent": "d2@60", "root": "d2@60"}]
    stand_in.model["id"] = "stand-in-135m"
    open_page(page, stand_in.url)
    chip = page.locator("#changed")
    expect(chip).to_be_hidden()
    for text in ("/temperature 0.7", "/topk 3", "/system Be brief."):           # 0.7 is the default
        command(page, text)
    expect(chip).to_have_text("top-k 3 · system prompt", use_inner_text=True)
    ask(page, "one")
    expect_answered(page)
    maker = answers(page).locator(".maker")
    for model, name, changes in (("stand-in-135m", "stand-in-135m", "temperature 0.7 · top-k 3 · system prompt"),        # not listed: nothing is known of its defaults
                                 ("d2@60", "d2, step 60", "top-k 3 · system prompt"), ("law", "law, adapter of d2@60", "top-k 3 · system prompt")):
        page.evaluate("model => { Chat.lastNode().model = model; Page.render(); }", model)
        expect(maker).to_have_text(name)
        expect(figures(answers(page)).locator("p").first).to_have_text(f"{name} · {changes}")
        page.keyboard.press("Escape")
    command(page, "/topk")                                      # of the next answer
    expect(chip).to_have_text("system prompt", use_inner_text=True)
    page.set_viewport_size({"width": 360, "height": 640})
    expect(chip).to_have_text("1 change", use_inner_text=True)
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(figures(answers(page))).to_contain_text("law, adapter of d2@60 · top-k 3")
    expect_accessible(page, theme=theme)
    page.keyboard.press("Escape")
    maker.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Compare")).to_be_visible()
    page.keyboard.press("Escape")
    chip.click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()


def test_each_model_s_size_and_workers_are_shown(opened_page):
    page = opened_page
    listed = page.evaluate("""[{id: "one", state: "ready", bytes: 3e9, weights_bytes: 27e7}, {id: "two", state: "unloaded", bytes: 5e6, weights_bytes: 5e6},
        {id: "three", state: "failed", reason: "no such file"}].map(each => Parts.TEXT.modelIs(each, each.id))""")
    assert listed == ["one · loaded · 270 MB + 2.7 GB KV", "two · 5 MB", "three · failed: no such file"]
    rows = page.evaluate("""async () => {
        const workers = ["one", "two"].map((model, gpu_id) => ({model, gpu_id, device: "cpu", state: "ready"}));
        await Views.openStatus();
        Status.addSample(Status.shown, {workers}, new Map());
        Status.show({workers, models: [{id: "three", state: "failed", reason: "no such file"}]}, Status.shown);
        return ["models", "workers"].map(name => [...document.querySelectorAll(`#status-${name} tr`)].map(row => row.textContent));
    }""")
    assert rows[0][1] == "threefailed: no such file" and [row[:5] for row in rows[1]] == ["Model", "one0c", "two1c"]
    page.evaluate("Status.close()")


@pytest.mark.slow
def test_a_base_checkpoint_chats_only_on_demand(browser, base_checkpoint, theme):
    """nanochat's tokenizer has the tokens of a chat from the start, so this one could chat too: it would ramble."""
    with started_server(str(base_checkpoint), "--kv-cache-memory", "8M", "--temperature", "0", "--max-tokens", "6") as url, visitor(browser) as page:
        asked = []
        page.on("request", lambda request: asked.append((request.url.removeprefix(url), request.post_data_json)) if re.search(
            "completions|compare", request.url) else None)
        open_page(page, url)
        empty, writing, wants_chat = page.locator(".empty"), re.compile("completing"), "Chat with it all the same"
        expect(empty).to_contain_text("This is a base checkpoint, which was not taught to chat: it continues the text that you type")
        expect(page.locator(".examples button")).to_have_count(0)
        expect_accessible(page, theme=theme)
        ask(page, "Once upon")
        expect(button(page, "Continue")).to_be_visible(timeout=SLOW_MS)
        assert (asked[-1][0], asked[-1][1]["prompt"]) == ("v1/completions", "Once upon")
        inside(answers(page), "Compare")
        dialog = page.get_by_role("dialog", name="Compare")
        button(dialog, "Compare").click()
        expect(dialog.locator(".compared").last).to_have_text(re.compile("."), timeout=SLOW_MS)
        expect(button(dialog, "Continue with this")).to_have_count(2, timeout=SLOW_MS)
        assert (asked[-1][0], asked[-1][1]["prompt"], "messages" in asked[-1][1]) == ("v1/compare", "Once upon", False)
        page.keyboard.press("Escape")
        button(page, "New chat").click()
        button(empty, wants_chat).click()
        expect(empty).to_contain_text("it will ramble")
        expect(page.locator(".examples button").first).to_be_visible()
        ask(page, "Hello")
        expect(button(page, "Continue")).to_be_visible(timeout=SLOW_MS)
        assert (asked[-1][0], asked[-1][1]["messages"]) == ("v1/chat/completions", [{"role": "user", "content": "Hello"}])
        page.reload()
        expect(said(questions(page))).to_have_text("Hello")
        expect(page.locator("body")).not_to_have_class(writing)       # the chat remembers it
        chats(page).last.click()
        expect(said(questions(page))).to_have_text("Once upon")
        expect(page.locator("body")).to_have_class(writing)
        menu(page, wants_chat)
        expect(page.locator("body")).not_to_have_class(writing)
        menu(page, "Write with it")
        expect(page.locator("body")).to_have_class(writing)
