"""How the page behaves, in a real browser: servers that are lost, attachments and the gauge, thoughts in the text, empty
answers, and small things that people expect."""

import json
import re

import pytest

from browsing import (ROOT, SLOW_MS, answers, ask, button, chats, command, expect, expect_accessible, expect_answered, fake_front, figures, menu, message_box,
                      needs_browser, open_page, questions, reload, said, settled)
from page_server import StandIn

pytestmark = needs_browser


# servers --------------------------------------------------------------------------------------------------------------

def test_a_question_to_a_lost_server_sends_itself(page):
    server = StandIn()
    url, port = server.url, int(server.url.split(":")[-1].strip("/"))
    open_page(page, url)
    ask(page, "held markdown")
    expect(said(answers(page))).to_contain_text("Sorting")
    server.close()                                              # in the middle of an answer
    expect(page.locator("#lamp.unreachable")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"The server stopped in the middle of this answer \([\w ]+\)\.Try again"))
    ask(page, "hello")
    expect(answers(page).last).to_contain_text(f"The server at {url} no longer answers; still trying. Your message will then be sent.")
    expect(page.get_by_role("alert")).to_have_count(1)
    server = StandIn(port=port)
    expect(said(answers(page).last)).to_have_text("You said: hello (answer 1)")
    expect(page.locator("#lamp.ready")).to_be_visible()
    server.close()                                              # while nothing is asked, so that nobody knows
    ask(page, "who waits?")
    expect(answers(page).last).to_contain_text("no longer answers; still trying. Your message will then be sent.")
    button(page, "Stop").click()
    expect(answers(page).last).to_contain_text("The answer was stopped before its first word.")
    expect(page.get_by_role("alert")).to_have_count(1)
    server = StandIn(port=port)
    expect(page.locator("#lamp.ready")).to_be_visible()
    server.close()
    page.evaluate("dispatchEvent(new Event('focus'))")          # looks after it
    expect(page.locator("#state")).to_have_text(f"The server at {url} no longer answers; still trying.")


def test_a_refusing_server_is_told_from_a_missing_one(page, stand_in):
    page.route("http://127.0.0.1:8000/**", lambda route: route.abort())
    page.goto((ROOT / "static" / "index.html").as_uri())
    expect(page.get_by_text("No server answers at http://127.0.0.1:8000/; still trying.")).to_be_visible()
    with fake_front() as url:
        menu(page, "Server")
        page.get_by_role("textbox", name="URL").fill(url)
        button(page, "Done").click()
        expect(page.get_by_text(f"The server at {url} does not allow this page. Start it with --cors-origin null.")).to_be_visible()
        expect(page.locator("#lamp.refusing")).to_be_visible()


# attachments and the gauge --------------------------------------------------------------------------------------------

def pick(page, name, content):
    page.locator("#files-picker").set_input_files({"name": name, "mimeType": "text/plain", "buffer": content})


def test_files_of_several_encodings_are_read(page, stand_in):
    open_page(page, stand_in.url)
    gauge = page.locator("#context")
    ask(page, "progress")
    expect(answers(page)).to_contain_text("in the queue")
    expect(gauge).to_have_text("about 2 of 8,192 tokens")                   # nobody has counted it yet
    stand_in.release()
    expect(gauge).to_have_text("2,000 of 8,192 tokens")
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")
    expect(gauge).to_have_text("2,000 of 8,192 tokens")
    button(page, "New chat").click()
    expect(gauge).to_be_hidden()
    ask(page, "markdown")
    expect_answered(page)
    expect(gauge).to_have_text("111 of 8,192 tokens")                       # as the server counted
    ask(page, "one")
    expect_answered(page, 2)
    button(answers(page).last, "More").click()
    button(page.get_by_role("group", name="More"), "Edit").click()
    page.get_by_role("textbox", name="Edited text").fill("Nothing. " * 100)
    button(page, "Save").click()
    expect(gauge).to_have_text("about 337 of 8,192 tokens")               # 111, a question, and 900 characters
    settled(page)
    reload(page)
    expect(gauge).to_have_text("about 337 of 8,192 tokens")
    button(page, "New chat").click()
    pick(page, "latin.txt", "Grüße, café".encode("latin-1"))
    expect(page.locator("#files")).to_contain_text("11 characters, read as Latin-1")
    pick(page, "marked.txt", "日本 hi".encode("utf-16"))
    pick(page, "bare.csv", "a;b\n1;2\n".encode("utf-16-be"))
    expect(page.locator("#files")).to_contain_text("8 characters, read as UTF-16")
    for name, content in (("x.gz", b"\x1f\x8b\x08\x00ab"), ("y.bin", bytes(range(256))), ("sjis.txt", "日本、".encode("shift-jis"))):
        pick(page, name, content)
        expect(page.get_by_role("alert")).to_have_text(f"{name} is neither a text file nor a document (PDF, DOCX, PPTX, XLSX, ODT, ODS, ODP, EPUB, HTML).")
    button(page, "Send").click()
    expect_answered(page)
    assert stand_in.bodies[-1]["messages"][0]["content"] == \
        "latin.txt:\n```txt\nGrüße, café\n```\n\nmarked.txt:\n```txt\n日本 hi\n```\n\nbare.csv:\n```csv\na;b\n1;2\n```"


def test_files_that_cannot_be_read_are_all_named(page, stand_in):
    open_page(page, stand_in.url)
    drop = """names => { const data = new DataTransfer();
        for (const name of names) data.items.add(new File([name.endsWith("txt") ? "good" : new Uint8Array([31, 139, 8, 0, 97])], name));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true})); }"""
    page.evaluate(drop, ["a.gz", "fine.txt", "b.gz"])
    reason = "is neither a text file nor a document (PDF, DOCX, PPTX, XLSX, ODT, ODS, ODP, EPUB, HTML)."
    expect(page.get_by_role("alert")).to_have_text(f"a.gz {reason}\nb.gz {reason}")
    expect(page.locator("#files")).to_contain_text("fine.txt")
    page.evaluate(drop, [f"{count}.gz" for count in range(50)])
    expect(page.get_by_role("alert")).to_have_text("\n".join([*(f"{count}.gz {reason}" for count in range(6)), "44 more files could not be read."]))
    message_box(page).fill("never mind")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.slow
def test_the_gauge_counts_what_the_server_says(page, server_url):
    open_page(page, server_url)
    page.evaluate("""() => { window.gauges = []; const look = () => { const node = Chat.lastNode();
        if (Tree.isGrowing(node) && node.content) gauges.push(Parts.$("context").textContent); requestAnimationFrame(look); }; look(); }""")
    ask(page, "Write a very long story about a river, with many chapters.")
    page.wait_for_function("() => gauges.length > 20", timeout=SLOW_MS)
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")
    expect(page.locator("#context")).to_have_text(re.compile(r"^\d+ of 8,192 tokens$"))          # though it never came to its end
    assert [text for text in page.evaluate("gauges") if "about" in text][2:] == []       # until it is painted


def full_answer(context=100, tokens=88):
    return {"prompt_tokens": context - tokens, "completion_tokens": tokens, "finish_reason": "length"}


def test_continue_on_a_full_context_says_so_first(page, stand_in):
    stand_in.model |= {"context_length": 100}
    stand_in.model["capabilities"] |= {"continue_final_message": True}
    open_page(page, stand_in.url)
    ask(page, "half")                                                         # 12 + 4 of 100 tokens: there is room
    expect_answered(page)
    button(page, "Continue").click()
    expect(said(answers(page))).to_have_text(re.compile("Once upon a time.+"))
    posted = len(stand_in.bodies)
    page.evaluate("facts => { Object.assign(Chat.lastNode(), {timings: facts, note: null}); Page.render(); }", full_answer())
    button(page, "Continue").click()
    full = page.get_by_role("log").get_by_text("The question and this answer fill the context of 100 tokens, so the answer cannot go on.")
    expect(full).to_be_visible()
    assert len(stand_in.bodies) == posted
    # after another question, which is short: the server can leave out what was before it
    ask(page, "half")
    expect(answers(page)).to_have_count(2)
    expect_answered(page, 2)
    expect(full).to_have_count(0)
    page.evaluate("facts => { Object.assign(Chat.lastNode(), {timings: facts, note: null}); Page.render(); }", full_answer())
    button(page, "Continue").click()
    expect(said(answers(page).last)).to_have_text(re.compile("Once upon a time.+"))
    assert len(stand_in.bodies) == posted + 2


def test_figures_after_continue_are_of_all_of_it(opened_page):
    whole = opened_page.evaluate("""() => {
        const first = {ttft_ms: 100, queue_ms: 3, prompt_tokens: 50, cached_tokens: 16, completion_tokens: 100, tokens_per_second: 50, finish_reason: "length"};
        const second = {ttft_ms: 400, queue_ms: 9, prompt_tokens: 150, cached_tokens: 144, completion_tokens: 20, tokens_per_second: 10, finish_reason: "stop"};
        const both = Chat.wholeOf(first, second);
        return [both, Chat.wholeOf(both, {...second, prompt_tokens: 170}), Chat.wholeOf({measured: 20, completion_tokens: 40, prompt_tokens: 9}, second), Chat.wholeOf(first, {})];
    }""")
    assert whole[0] == {"ttft_ms": 100, "queue_ms": 3, "cached_tokens": 16, "prompt_tokens": 50, "completion_tokens": 120, "waited_ms": 400,
                        "tokens_per_second": 30, "finish_reason": "stop"}
    assert (whole[1]["prompt_tokens"], whole[1]["completion_tokens"], whole[1]["waited_ms"]) == (50, 140, 800)
    assert whole[2]["measured"] == 15 and "tokens_per_second" not in whole[2] and "ttft_ms" not in whole[2]
    assert whole[3]["completion_tokens"] == 100 and whole[3]["tokens_per_second"] == 50


def test_the_server_says_the_same_of_an_answer_that_went_on(opened_page):
    """It reads the same file: tests/front/annexes/chats/test_written_answers.py."""
    for case in json.loads((ROOT / "tests/fixtures/whole_answers.json").read_text()):
        assert opened_page.evaluate("({earlier, later}) => Chat.wholeOf(earlier, later)", case) == case["whole"]


@pytest.mark.slow
def test_a_too_long_attachment_is_refused_as_foretold(page, server_url):
    open_page(page, server_url)
    ask(page, "Say yes.")
    expect(answers(page)).to_contain_text("token", timeout=SLOW_MS)
    pick(page, "long.txt", b"one two three four " * 2400)
    expect(page.locator("#warning")).to_contain_text(re.compile(r"This message has 9,6\d\d tokens, but the model's limit is 8,192 .* Shorten it or remove a file\."))
    button(page, "Send").click()
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"This model's maximum context length is 8192 tokens\. However, your messages resulted in 9[67]\d\d tokens\. .*\(HTTP 400\)\."))
    expect(button(page, "Remove long.txt")).to_be_visible()


# thoughts in the text -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("api", ["v1", pytest.param("native", marks=pytest.mark.slow)])
def test_another_server_s_thoughts_are_folded(page, stand_in, api):
    stand_in.model = stand_in.model | {"owned_by": "someone"} if api == "v1" else None
    open_page(page, stand_in.url)
    ask(page, "tags")
    expect_answered(page)
    expect(said(answers(page))).to_have_text("It is x < 5.")
    answers(page).get_by_text("Thinking").click()
    expect(answers(page).locator("details strong")).to_have_text("see")
    ask(page, "closing tag")
    expect(said(answers(page).last)).to_have_text("Let me see")         # nothing tells yet that these are thoughts
    stand_in.release()
    expect(said(answers(page).last)).to_have_text("It is </think>.")
    expect(answers(page).last.locator("details")).to_contain_text("Let me see.")
    ask(page, "and now?")
    expect_answered(page, 3)
    assert [message["content"] for message in stand_in.bodies[-1]["messages"][1::2]] == ["It is x < 5.", "It is `</think>`."]
    assert "Let me" not in str(stand_in.bodies[-1])


@pytest.mark.slow
def test_our_server_s_text_keeps_its_tags(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "tags")
    expect_answered(page)
    expect(said(answers(page))).to_contain_text("It is x < 5.")
    assert page.evaluate("Chat.path[1].content").startswith("<think>")
    (tmp_path / "other.json").write_text('[{"role": "user", "content": "<think>q"}, {"role": "assistant", "content": "<think>a</think>b"}]')
    page.locator("#import-file").set_input_files(tmp_path / "other.json")
    button(page.get_by_role("dialog"), "Import").click()
    expect(said(questions(page))).to_have_text("<think>q")
    expect(said(answers(page))).to_have_text("b")
    assert page.evaluate("Chat.path[1].reasoning") == "a"


# answers --------------------------------------------------------------------------------------------------------------

def test_an_answer_without_a_word_says_so(page, stand_in):
    open_page(page, stand_in.url)
    for question, text in (("nothing", "The model gave no answer."), ("only thoughts", "The model thought about it but gave no answer."),
                           ("half a thought", "The model was still thinking when it reached the length limit.")):
        ask(page, question)
        expect_answered(page)
        expect(answers(page)).to_contain_text(text)
        if question != "half a thought":
            button(page, "New chat").click()
    expect(figures(answers(page))).to_contain_text("Prompt of 12 tokens, 4 tokens cached; queued for 0 ms.")
    button(page, "New chat").click()
    ask(page, "a long question " * 20)
    expect_answered(page)
    box = lambda locator: locator.bounding_box()       # noqa: E731
    question, answer = box(said(questions(page))), box(answers(page))
    assert 8 < answer["y"] - question["y"] - question["height"] < 24
    questions(page).hover()
    edit = box(button(questions(page), "Edit"))
    assert edit["x"] + edit["width"] < question["x"] and edit["y"] + edit["height"] <= question["y"] + question["height"] + 4


# what people expect ---------------------------------------------------------------------------------------------------

def test_commands_are_completed_from_a_list(page, stand_in):
    open_page(page, stand_in.url)
    box, options = message_box(page), page.get_by_role("listbox", name="Commands").get_by_role("option")
    box.press_sequentially("/t")
    expect(options).to_have_text([re.compile("^/temporary"), re.compile("^/temperatureN"), re.compile("^/topkN"), re.compile("^/toppN"), re.compile("^/typicalpN"),
                                   re.compile("^/topnsigmaN")])
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp"):
        box.press(key)
    expect(options.and_(page.get_by_role("option", selected=True))).to_contain_text("/topk")
    assert box.get_attribute("aria-activedescendant") == "command-topk"
    box.press("Tab")
    expect(box).to_have_value("/topk ")
    expect(options).to_have_count(0)
    box.press_sequentially("7")
    box.press("Enter")
    expect(page.get_by_role("log").get_by_text("Top-k is now 7.")).to_be_visible()
    box.fill("/eff")
    options.click()
    expect(box).to_have_value("/effort ")
    box.press_sequentially("much")
    box.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("/effort takes none, low, medium or high, not “much”.")
    box.fill("/")
    box.press("Escape")
    expect(options).to_have_count(0)
    box.fill("/he")
    box.press("Enter")                              # completes
    expect(box).to_have_value("/help")
    box.press("Enter")                              # sends
    expect(page.get_by_role("log")).to_contain_text("/effort none | low | medium | high · /budget N · /maxtokens N")
    assert stand_in.bodies == []


@pytest.mark.slow
def test_penalties_and_effort_are_set_and_sent(page, stand_in):
    open_page(page, stand_in.url)
    button(page, "Settings").click()
    page.get_by_text("More parameters").click()
    for name, value in (("Repetition penalty", "1.1"), ("Presence penalty", "-0.5"), ("Frequency penalty", "0.25")):
        page.get_by_role("spinbutton", name=name).fill(value)
    page.get_by_role("combobox", name="Thinking effort").select_option("low")
    button(page, "Done").click()
    ask(page, "one")
    expect_answered(page)
    sent = stand_in.bodies[0]
    assert (sent["repetition_penalty"], sent["presence_penalty"], sent["frequency_penalty"], sent["reasoning_effort"]) == (1.1, -0.5, 0.25, "low")
    command(page, "/effort")
    expect(page.get_by_role("log").get_by_text("Thinking effort is the server's default again.")).to_be_visible()
    stand_in.model["capabilities"]["reasoning"] = False
    settled(page)
    reload(page)
    button(page, "Settings").click()
    expect(page.get_by_role("spinbutton", name="Presence penalty")).to_have_value("-0.5")
    expect(page.get_by_role("combobox", name="Thinking effort")).to_have_count(0)       # this model does not think


@pytest.mark.slow
def test_code_is_wrapped_and_saved(page, stand_in, tmp_path):
    open_page(page, stand_in.url)
    ask(page, "markdown")
    expect_answered(page)
    wrap, code = button(answers(page), "Wrap lines").first, answers(page).locator("pre").first
    wrap.click()
    expect(wrap).to_have_attribute("aria-pressed", "true")
    expect(code).to_have_css("white-space-collapse", "preserve")
    expect(code).to_have_css("text-wrap-mode", "wrap")
    with page.expect_download() as saved:
        button(answers(page), "Download code").first.click()
    assert saved.value.suggested_filename == "code.py"
    assert saved.value.path().read_text().startswith("def swap(pair: tuple) -> tuple:\n")


def test_all_chats_are_deleted_and_come_back(page, stand_in):
    open_page(page, stand_in.url)
    for text in ("one", "two"):
        button(page, "New chat").click()
        ask(page, text)
        expect_answered(page)
    menu(page, "Delete all chats")
    dialog = page.get_by_role("dialog", name="Delete all 2 chats?")
    expect_accessible(page)
    button(dialog, "Cancel").click()
    expect(chats(page)).to_have_count(2)
    menu(page, "Delete all chats")
    assert button(dialog, "Delete").evaluate("node => getComputedStyle(node).backgroundColor") == "rgb(255, 155, 155)"        # in dark colours
    button(dialog, "Delete").click()
    expect(page.locator(".toast")).to_have_text("Deleted 2 chats.Undo")
    expect(chats(page)).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(0)
    settled(page)
    assert page.evaluate("Store.read('nodes')") == []
    button(page, "Undo").click()
    expect(chats(page)).to_have_text(["two", "one"])
    expect(said(questions(page))).to_have_count(1)


@pytest.mark.slow
def test_the_page_tells_of_an_answer_in_the_background(page, stand_in):
    page.context.grant_permissions(["notifications"])
    page.add_init_script("""window.notices = []; window.Notification = class {
        static requestPermission() { return Promise.resolve(window.permission ?? "denied"); }
        constructor(title, {body}) { notices.push([title, body]); }
    }; document.hasFocus = () => !window.away; Object.defineProperty(document, "hidden", {get: () => Boolean(window.away)});""")
    open_page(page, stand_in.url)
    button(page, "Settings").click()
    box = page.get_by_role("checkbox", name="Notify me when an answer ends in the background")
    box.click()
    expect(page.get_by_role("alert")).to_have_text("The browser does not allow notifications from this page.")
    expect(box).not_to_be_checked()
    page.evaluate("window.permission = 'granted'")
    box.check()
    button(page, "Done").click()
    ask(page, "silence")
    button(page, "New chat").click()
    stand_in.release()
    expect(page.get_by_text("The answer in “silence” is finished.").first).to_be_visible()      # another chat is shown
    button(page, "Show").click()
    expect(said(answers(page))).to_have_text("Here I am.")
    expect(button(page, "Show")).to_have_count(0)
    assert page.evaluate("notices") == []
    ask(page, "silence")
    page.evaluate("window.away = true")
    stand_in.release()
    expect(page).to_have_title(re.compile("^✓ silence"))                                        # another tab is shown
    assert page.evaluate("notices") == [["The answer in “silence” is finished.", "Here I am."]]
    page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page).to_have_title(re.compile("^silence"))


@pytest.mark.slow
def test_the_model_names_chats_if_wanted(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "are apples red?")
    expect_answered(page)
    button(page, "Settings").click()
    page.get_by_role("checkbox", name="Let the model name new chats").check()
    button(page, "Done").click()
    button(page, "New chat").click()
    ask(page, "which colours do apples have?")
    expect(chats(page)).to_have_text(["Colours of apples", "are apples red?"])
    ask(page, "one more")
    expect_answered(page, 2)
    settled(page)
    assert len(stand_in.bodies) == 4 and stand_in.bodies[2]["priority"] == "low"
    assert "which colours do apples have?" in stand_in.bodies[2]["messages"][0]["content"]


@pytest.mark.slow
def test_the_default_model_names_a_chat_on_a_cpu(page, server_url):
    open_page(page, server_url)
    expect(page.get_by_text("Running on the CPU with 8,192 tokens of context.")).to_be_visible()
    button(page, "Settings").click()
    page.get_by_role("checkbox", name="Let the model name new chats").check()
    button(page, "Done").click()
    question = "Which is the capital of Japan, in one sentence?"
    command(page, "/temperature 0")
    ask(page, question)
    expect(answers(page)).to_contain_text("Tokyo", timeout=SLOW_MS)
    expect(chats(page).first).not_to_have_text(question, timeout=SLOW_MS)
    expect(chats(page).first).not_to_have_text("")
