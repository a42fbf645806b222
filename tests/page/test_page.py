"""The page in a real browser: asking, answers, streams and errors, with chat_server.py and its default model.
A scripted stand-in plays what a real model cannot be made to do."""

import json
import re

import pytest

from browsing import (SLOW_MS, answers, ask, button, chats, command, expect, expect_accessible, expect_answered, fake_front, figures, message_box, more,
                      needs_browser, open_page, questions, reload, said, settled)
from nightly import by_day

pytestmark = needs_browser


# with a model ---------------------------------------------------------------------------------------------------------

def test_an_answer_streams_in_and_shows_its_speed(page, server_url):
    open_page(page, server_url)
    command(page, "/temperature 0")
    ask(page, "What is the capital of Japan?")
    expect(questions(page)).to_contain_text("What is the capital of Japan?")
    expect(answers(page)).to_contain_text("The capital of Japan is Tokyo.", timeout=SLOW_MS)
    expect_answered(page)
    expect(figures(answers(page))).to_contain_text(re.compile(r"first token after [\d.]+ m?s · \d+ tokens"))
    command(page, "/maxtokens 40")
    ask(page, "Tell me the story of a sailor and a whale.")     # a short answer may come at once, and has no speed then
    line = answers(page).nth(1).locator(".speed")
    expect(line).to_have_text(re.compile(r"^[\d.]+ tok/s · cut at the length limit$"), timeout=2 * SLOW_MS)
    expect(figures(answers(page).nth(1))).to_contain_text(re.compile(r"[\d.]+ tok/s · cut at the length limit · first token after [\d.]+ m?s · 40 tokens · [\d.]+ s"))
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.slow
def test_stop_ends_the_answer_and_keeps_its_text(page, server_url):
    open_page(page, server_url)
    ask(page, "Write a very long story about a river, with many chapters.")
    expect(said(answers(page))).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SLOW_MS)
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")
    expect(button(page, "Send")).to_be_visible()
    expect(button(page, "Stop")).to_be_hidden()
    expect(said(answers(page))).to_have_text(re.compile(r"\w+ \w+"))
    expect(button(page, "Regenerate")).to_be_enabled()


@pytest.mark.slow
def test_a_real_answer_goes_on_after_a_reload(page, server_url):
    open_page(page, server_url)
    command(page, "/seed 3")        # of a story that does not end by itself
    ask(page, "Write a very long story about a river, with many chapters.")
    expect(said(answers(page))).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SLOW_MS)
    reload(page)
    before = said(answers(page)).inner_text()
    expect(said(answers(page))).to_have_text(re.compile(r"[\s\S]{%d}" % (len(before) + 100)), timeout=SLOW_MS)
    assert said(answers(page)).inner_text().startswith(before[:-5])
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")


def test_escape_stops_the_answer_too(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(said(answers(page))).to_have_text(re.compile(r"\w+ \w+ \w+"))
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")


@pytest.mark.slow
def test_an_edited_question_keeps_the_old_one_beside(page, server_url):
    open_page(page, server_url)
    command(page, "/temperature 0")
    command(page, "/maxtokens 24")
    ask(page, "Say hello")
    expect_answered(page)
    button(page, "Edit").click()
    page.get_by_role("textbox", name="Edited text").fill("What is the capital of Japan?")
    button(page, "Update").click()
    expect(questions(page)).to_have_count(1)
    expect(questions(page)).to_contain_text("What is the capital of Japan?")
    expect(questions(page)).to_contain_text("2/2")
    expect(answers(page)).to_contain_text("Tokyo", timeout=SLOW_MS)
    button(page, "Previous version").click()
    expect(said(questions(page))).to_have_text(["Say hello"])
    expect_answered(page)


def test_a_reload_keeps_chat_settings_and_draft(page, stand_in):
    open_page(page, stand_in.url)
    command(page, "/maxtokens 12")
    ask(page, "Say hello")
    expect_answered(page)
    before = answers(page).inner_text()
    message_box(page).fill("half a thought")
    reload(page)
    expect(questions(page)).to_contain_text("Say hello")
    assert answers(page).inner_text() == before
    expect(message_box(page)).to_have_value("half a thought")
    button(page, "Settings").click()
    expect(page.get_by_role("spinbutton", name="Max tokens")).to_have_value("12")


def test_the_page_works_with_the_keyboard_alone(page, stand_in):
    open_page(page, stand_in.url)
    expect(message_box(page)).to_be_focused()
    page.keyboard.type("/maxtokens 8\n")
    page.keyboard.type("Say")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("hello\n")
    expect(said(questions(page))).to_have_text("Say\nhello", use_inner_text=True)
    expect_answered(page)
    expect(message_box(page)).to_be_focused()
    expect(message_box(page)).to_have_value("")


def test_the_real_server_continues_a_cut_answer(page, server_url):
    def without_penalties(route):     # which count what an answer wrote itself, not what it goes on from
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"frequency_penalty": 0, "presence_penalty": 0}))
    page.route("**/v1/chat/completions", without_penalties)
    open_page(page, server_url)
    message_box(page).fill("word " * 300)
    expect(page.locator("#context")).to_contain_text(re.compile(r"^0 \+ 3\d\d of 8,192 tokens"))
    message_box(page).fill("word " * 9000)
    expect(page.locator("#warning")).to_contain_text("Shorten it")
    command(page, "/maxtokens 5")
    expect(page.locator("#warning")).to_be_empty()
    ask(page, "Tell me about Japan.")
    expect(answers(page)).to_contain_text("cut at the length limit", timeout=SLOW_MS)
    command(page, "/maxtokens 4")
    prompt = page.evaluate("Chat.path.at(-1).timings.prompt_tokens")
    before = said(answers(page)).inner_text()
    button(page, "Continue").click()
    expect(said(answers(page))).to_have_text(re.compile(f"{re.escape(before)}.+", re.DOTALL), timeout=SLOW_MS)
    expect_answered(page)
    expect(figures(answers(page))).to_contain_text("9 tokens")          # of both parts
    expect(page.locator("#context")).to_have_text(f"{page.evaluate('Chat.path.at(-1).timings.prompt_tokens') + 9} of 8,192 tokens")
    assert page.evaluate("Chat.path.at(-1).timings.prompt_tokens") == prompt
    cut = page.evaluate("() => Chat.path.at(-1)")
    # together they are what the same seed gives in one go
    whole = page.evaluate("""seed => Server.post("v1/chat/completions", {messages: [{role: "user", content: "Tell me about Japan."}], seed,
        max_tokens: 9}).then(response => response.json()).then(body => body.choices[0].message.content)""", cut["seed"])
    assert cut["content"] == whole and questions(page).count() == 1


# streams --------------------------------------------------------------------------------------------------------------

def test_stop_closes_the_request(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(answers(page)).to_contain_text("and then")
    button(page, "Stop").click()
    assert stand_in.cancelled.wait(10)


def test_live_figures_count_tokens_and_not_events(page, stand_in):
    stand_in.model["capabilities"] |= {"token_ids": True}
    open_page(page, stand_in.url)
    ask(page, "drafts")
    expect(page.locator("#state")).to_have_text(re.compile(r"^Writing · [\d.]+ tok/s · 15 tokens$"))
    run = page.evaluate("(run => ({tokens: run.tokens, first: run.first, speed: Chat.liveSpeed(run), s: (run.lastAt - run.firstAt) / 1000}))([...Chat.runs.values()][0])")
    assert run["speed"] == pytest.approx((15 - 3) / run["s"])           # those of the first event took no time that is known
    stand_in.release()
    expect(figures(answers(page))).to_contain_text("15 tokens")


@pytest.mark.slow
def test_an_answer_goes_on_while_another_chat_shows(page, held_front):
    ask_for_two_words(page, held_front)
    button(page, "New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    ask(page, "count too")                      # both at once; each word goes to one of them
    expect(questions(page)).to_contain_text("count too")
    held_front.admit(8)
    expect(said(answers(page))).to_have_text("one two three four five")
    chats(page).filter(has_text=re.compile("^count$")).click()
    expect_all_words(page)
    assert len(held_front.pool.requests) == 2


def ask_for_two_words(page, front):
    open_page(page, front.url)
    ask(page, "count")
    front.admit(2)
    expect(said(answers(page))).to_have_text("one two")


def expect_all_words(page):
    """The whole answer, as if nothing had happened."""
    expect(said(answers(page))).to_have_text("one two three four five")
    expect_answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(button(page, "Send")).to_be_visible()


@pytest.mark.parametrize("seen", by_day(["nothing", "something"], "something"))
def test_a_reload_in_an_answer_loses_nothing(page, held_front, seen):
    if seen == "something":
        ask_for_two_words(page, held_front)
    else:                   # not even the first word had come
        open_page(page, held_front.url)
        ask(page, "count")
        held_front.until_open(1)
        held_front.admit(2)
    reload(page)
    expect(said(answers(page))).to_have_text("one two")
    expect(button(page, "Stop")).to_be_visible()
    held_front.admit(1)
    expect(said(answers(page))).to_have_text("one two three")
    expect(page.locator("#state")).to_contain_text("Resumed")
    reload(page)
    held_front.admit(2)
    expect_all_words(page)
    assert len(held_front.pool.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shown", [True, False])
def test_an_answer_ended_while_away_is_there(page, held_front, shown):
    ask_for_two_words(page, held_front)
    if not shown:
        button(page, "New chat").click()
        settled(page)
    page.goto("about:blank")
    held_front.admit(3)
    held_front.until_open(0)
    page.goto(held_front.url)
    if not shown:
        expect(page.get_by_role("article")).to_have_count(0)
        expect(chats(page).and_(page.locator(".running"))).to_have_count(0)
        chats(page).click()
    expect_all_words(page)
    assert len(held_front.pool.requests) == 1


@pytest.mark.slow
def test_stop_still_works_after_a_reload(page, held_front):
    ask_for_two_words(page, held_front)
    reload(page)
    expect(said(answers(page))).to_have_text("one two")
    held_front.until_open(1)
    button(page, "Stop").click()
    held_front.until_open(0)
    expect(answers(page)).to_contain_text("stopped")
    reload(page)
    expect(said(answers(page))).to_have_text("one two")
    expect(button(page, "Send")).to_be_visible()


def test_a_dropped_connection_is_taken_up_again(page, held_front):
    ask_for_two_words(page, held_front)
    held_front.drop()
    held_front.admit(1)
    expect(said(answers(page))).to_have_text("one two three")
    held_front.drop()
    held_front.admit(2)
    expect_all_words(page)
    assert len(held_front.pool.requests) == 1


def test_the_page_says_when_the_network_is_away(page, held_front):
    ask_for_two_words(page, held_front)
    page.context.set_offline(True)
    held_front.drop()
    expect(page.locator("#state")).to_contain_text("The connection is lost; trying again")
    held_front.admit(3)
    held_front.until_open(0)
    page.context.set_offline(False)
    expect_all_words(page)


def test_enter_queues_a_question_during_an_answer(page, held_front, theme):
    ask_for_two_words(page, held_front)
    message_box(page).fill("and then?")
    expect(button(page, "Send")).to_be_visible()                    # for a phone, whose Enter is a new line
    message_box(page).press("Enter")
    queued = page.get_by_text("Your question is queued: it is sent when this answer has ended.")
    expect(queued).to_be_visible()
    expect(button(page, "Send")).to_be_hidden()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect_accessible(page, theme=theme)
    message_box(page).press("!")                                    # changed: it is not sent as it is
    expect(queued).to_be_hidden()
    button(page, "Send").click()
    expect(queued).to_be_visible()
    held_front.admit(8)
    expect(questions(page)).to_have_count(2)
    expect(said(questions(page)).last).to_have_text("and then?!")
    expect(said(answers(page)).last).to_have_text("one two three four five")
    expect(message_box(page)).to_have_value("")


def test_a_queued_question_waits_for_its_chat(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "story")
    expect(said(answers(page))).to_contain_text("and then")
    message_box(page).fill("the next one")
    message_box(page).press("Enter")
    button(page, "New chat").click()
    expect(message_box(page)).to_have_value("")
    expect(page.get_by_text("Your question is queued")).to_be_hidden()
    ask(page, "elsewhere")
    expect_answered(page)
    page.get_by_role("navigation", name="Chats").get_by_role("link", name="story").click()
    expect(page.get_by_text("Your question is queued")).to_be_visible()
    expect(message_box(page)).to_have_value("the next one")
    button(page, "Stop").click()
    expect(said(questions(page))).to_have_text(["story", "the next one"])
    expect(said(answers(page)).last).to_contain_text("You said: the next one")
    assert [body["messages"][-1]["content"] for body in stand_in.bodies] == ["story", "elsewhere", "the next one"]


def test_a_queued_question_goes_with_no_refused_one(page, stand_in):
    open_page(page, stand_in.url)
    held = []
    page.route("**/chat/completions", lambda route: held.append(route))
    ask(page, "refuse this")
    message_box(page).fill("the next one")
    message_box(page).press("Enter")
    expect(page.get_by_text("Your question is queued")).to_be_visible()
    held[0].continue_()
    expect(page.get_by_role("alert")).to_contain_text("the limit is 8,000")
    expect(message_box(page)).to_have_value("refuse this\n\nthe next one")
    expect(questions(page)).to_have_count(0)
    assert len(stand_in.bodies) == 1


@pytest.mark.slow
def test_enter_queues_while_the_server_is_away(page, held_front, theme):
    ask_for_two_words(page, held_front)
    message_box(page).fill("and then?")
    page.context.set_offline(True)
    held_front.drop()
    expect(page.locator("#state")).to_contain_text("Enter queues your next question")
    message_box(page).press("Enter")
    queued = page.get_by_text("Your question is queued: it is sent when this answer has ended.")
    expect(queued).to_be_visible()
    expect_accessible(page, theme=theme)
    expect(page.get_by_role("alert")).to_have_count(0)
    message_box(page).press("!")                                    # changed: it is not sent as it is
    expect(queued).to_be_hidden()
    message_box(page).press("Enter")
    expect(queued).to_be_visible()
    held_front.admit(3)
    held_front.until_open(0)
    page.context.set_offline(False)
    expect(questions(page)).to_have_count(2)
    expect(said(questions(page).last)).to_have_text("and then?!")
    expect(message_box(page)).to_have_value("")
    expect(queued).to_be_hidden()
    held_front.admit(5)
    expect(said(answers(page).last)).to_have_text("one two three four five")


@pytest.mark.slow
def test_stop_works_while_the_network_is_away(page, held_front):
    ask_for_two_words(page, held_front)
    page.context.set_offline(True)
    held_front.drop()
    expect(page.locator("#state")).to_contain_text("The connection is lost; trying again")
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("stopped")


def test_a_forgotten_answer_stays_as_interrupted(page, held_front):
    ask_for_two_words(page, held_front)
    page.route("**/v1/streams/*", lambda route: route.fulfill(status=404, body="{}"))
    reload(page)
    expect(answers(page)).to_contain_text("interrupted")
    expect(said(answers(page))).to_have_text("one two")
    expect(button(page, "Regenerate")).to_be_enabled()
    expect(button(page, "Continue")).to_be_enabled()


def test_waiting_is_shown_and_pings_are_no_text(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "silence")
    expect(page.get_by_text("Waiting for the first token")).to_be_visible()
    stand_in.release()
    expect_answered(page)
    expect(said(answers(page))).to_have_text("Here I am.")


def test_the_page_shows_queue_and_prompt_progress(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "progress")
    expect(answers(page)).to_contain_text("Number 3 in the queue")
    stand_in.release()
    expect(answers(page)).to_contain_text("Reading the prompt, 43\u00a0%")
    stand_in.release()
    expect_answered(page)
    assert stand_in.bodies[0]["progress"] is True


def test_a_call_being_written_ends_the_prompt_s_progress(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "held call")
    expect(answers(page)).to_contain_text("Reading the prompt, 43\u00a0%")
    stand_in.release()
    expect(page.get_by_role("region", name="Call of calculator")).to_be_visible()
    expect(answers(page)).not_to_contain_text("Reading the prompt")
    stand_in.release()
    expect_answered(page)


def test_reasoning_is_folded_and_not_sent_back(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "thoughts")
    thinking = answers(page).locator("details", has_text="Thinking")
    expect(thinking.get_by_text("about it")).to_be_visible()            # while it thinks
    expect(page.get_by_role("log").locator(".status")).to_contain_text("Thinking")
    expect(button(page, "Answer now")).to_be_hidden()                   # this server cannot
    stand_in.release()
    expect(said(answers(page))).to_have_text("It is 42.")
    expect(thinking.get_by_text("about it")).to_be_hidden()
    answers(page).get_by_text("Thinking").click()
    expect(thinking.locator("strong")).to_have_text("it")
    ask(page, "and now?")
    expect_answered(page, 2)
    assert stand_in.bodies[1]["messages"][1] == {"role": "assistant", "content": "It is 42."}
    stand_in.model["capabilities"] |= {"reasoning_history": True, "reasoning_budget": True}    # for a template that asks for it
    reload(page)
    ask(page, "again")
    expect_answered(page, 3)
    assert stand_in.bodies[2]["messages"][1]["reasoning_content"] == "Let me think about **it**, slowly."
    ask(page, "thoughts")
    now = button(page, "Answer now")
    with page.expect_response(re.compile("/v1/cancel/")) as refused:
        now.click()
    assert refused.value.status == 409 and stand_in.holds.wait(30)
    expect(message_box(page)).to_be_focused()
    now.click()                                                         # so it can be tried again
    expect(said(answers(page).nth(3))).to_have_text("It is 42.")
    expect(now).to_be_hidden()
    assert len(set(stand_in.hurried)) == 1 and len(stand_in.hurried) == 2


def test_characters_split_over_chunks_stay_whole(page, stand_in):
    page.add_init_script("""const real = fetch;
        const transform = (chunk, out) => chunk.forEach(byte => out.enqueue(Uint8Array.of(byte)));
        window.fetch = async (url, options) => {
            const response = await real(url, options);
            if (!url.endsWith("chat/completions")) return response;
            return new Response(response.body.pipeThrough(new TransformStream({transform})));
        };""")
    open_page(page, stand_in.url)
    ask(page, "world")
    expect_answered(page)
    expect(said(answers(page))).to_have_text("日本の首都は東京です。👩‍🚀 κόσμε")
    expect(answers(page)).to_contain_text("cut at the length limit")


# several answers to a question ----------------------------------------------------------------------------------------

def test_regenerate_keeps_the_other_answers(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect(answers(page)).to_contain_text("You said: one (answer 1)")
    ask(page, "two")
    expect(answers(page).last).to_contain_text("You said: two (answer 2)")
    button(page, "Regenerate").last.click()
    expect(answers(page).last).to_contain_text("You said: two (answer 3)")
    expect(answers(page)).to_have_count(2)
    assert [message["role"] for message in stand_in.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    expect(answers(page).last).to_contain_text("2/2")
    button(answers(page).last, "Previous answer").click()
    expect(answers(page).last).to_contain_text("You said: two (answer 2)")
    expect(answers(page).last).to_contain_text("1/2")
    expect(button(answers(page).last, "Previous answer")).to_be_disabled()
    ask(page, "three")                          # continues what is shown
    expect(answers(page).last).to_contain_text("You said: three")
    assert "(answer 2)" in stand_in.bodies[-1]["messages"][3]["content"]
    reload(page)
    expect(answers(page)).to_contain_text(["You said: one", "(answer 2)", "You said: three"])
    button(answers(page).nth(1), "Next answer").click()
    expect(answers(page)).to_contain_text(["You said: one", "(answer 3)"])


def test_a_refused_answer_leaves_the_old_one(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    stand_in.busy = True
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_have_text("The queue is full (HTTP 429, try again in 1 s).")
    expect(answers(page)).to_contain_text("You said: one (answer 1)")
    expect(answers(page).get_by_text("1/2")).to_have_count(0)


def test_an_edit_in_the_middle_begins_a_branch(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page, 1)
    ask(page, "two")
    expect_answered(page, 2)
    button(page, "Edit").first.click()
    page.get_by_role("textbox", name="Edited text").press("Escape")
    expect(questions(page)).to_have_count(2)
    button(page, "Edit").first.click()
    page.get_by_role("textbox", name="Edited text").fill("three")
    page.get_by_role("textbox", name="Edited text").press("Enter")
    expect(answers(page)).to_contain_text("You said: three (answer 3)")
    expect(questions(page)).to_have_count(1)
    assert stand_in.bodies[-1]["messages"] == [{"role": "user", "content": "three"}]
    button(page, "Previous version").click()
    expect(said(questions(page))).to_have_text(["one", "two"])


def test_an_answer_is_sent_as_edited(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "one")
    expect_answered(page)
    more(answers(page), "Edit")
    page.get_by_role("textbox", name="Edited text").fill("I said **nothing**.")
    button(page, "Save").click()
    expect(answers(page).locator("strong")).to_have_text("nothing")
    expect(answers(page)).to_contain_text("2/2")
    expect(answers(page)).to_contain_text("edited")
    ask(page, "two")
    expect_answered(page, 2)
    assert stand_in.bodies[-1]["messages"][1]["content"] == "I said **nothing**."


@pytest.mark.parametrize("able, model", by_day([
    (True, {"capabilities": {"continue_final_message": True}}), (False, {"capabilities": {"continue_final_message": False}}),
    (True, {"capabilities": None, "owned_by": "vllm"}), (False, {"capabilities": None, "owned_by": "someone"})],
    (True, {"capabilities": {"continue_final_message": True}}), (False, {"capabilities": None, "owned_by": "someone"})))
def test_continue_goes_on_with_a_cut_answer(page, stand_in, able, model):
    stand_in.model |= model
    open_page(page, stand_in.url)
    ask(page, "half")
    expect(answers(page)).to_contain_text("cut at the length limit")
    button(page, "Continue").click()
    if able:                                    # the stand-in takes the last message for a question
        expect(said(answers(page))).to_have_text("Once upon a timeYou said: Once upon a time (answer 2)")
        assert stand_in.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "Once upon a time"}
        sent = stand_in.bodies[-1]
        assert (sent["continue_final_message"], sent["add_generation_prompt"], sent["seed"]) == (True, False, 7)
        expect(button(page, "Continue")).to_be_hidden()
    else:
        expect(answers(page).last).to_contain_text("You said: Please continue.")
        expect(questions(page)).to_have_count(2)


def test_a_base_model_continues_texts_on_the_page(page):
    """As /v1/models of the real server says it of a model without a chat template."""
    with fake_front(pieces=[" there", " was"], chats=False) as url:
        open_page(page, url)
        expect(page.locator(".empty")).to_contain_text("it continues the text that you type")
        for text, before in (("Once upon a time", ""), (" a mill ", "Once upon a time there was")):
            with page.expect_request("**/v1/completions") as asked:
                ask(page, text)
            body = json.loads(asked.value.post_data)
            assert body["prompt"] == before + text and not body.keys() & {"messages", "truncate"}
            expect(said(answers(page).last)).to_have_text(" there was")
            expect(button(page, "Continue")).to_have_count(1)
        assert len({box["y"] for box in (body.bounding_box() for body in page.locator(".turn > .body").all())}) == 1     # one line of text
        said(answers(page).last).click()
        expect(page.get_by_role("textbox", name="Edited text")).to_have_count(0)
        said(questions(page).first).click()
        expect(page.get_by_role("textbox", name="Edited text")).to_have_value("Once upon a time")
        page.keyboard.press("Escape")
        able = {"chat": False, "completion": False, "embedding": True}
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "vectors-1", "capabilities": able}]}))
        open_page(page, url)
        button(page, "New chat").click()
        expect(page.locator(".empty")).to_contain_text("vectors-1 is an embedding model; it cannot chat.")
        expect(page.locator(".examples button")).to_have_count(0)


@pytest.mark.slow
def test_only_the_last_edited_answer_can_go_on(page, stand_in):
    stand_in.model["capabilities"]["continue_final_message"] = True
    open_page(page, stand_in.url)
    ask(page, "half")
    expect(button(page, "Continue")).to_be_visible()
    ask(page, "more")
    expect_answered(page, 2)
    expect(button(page, "Continue")).to_have_count(0)           # hidden ones are not in the accessibility tree
    more(answers(page).last, "Edit")
    page.get_by_role("textbox", name="Edited text").fill("You said so")
    button(page, "Save").click()
    button(page, "Continue").click()
    expect(said(answers(page).last)).to_have_text("You said soYou said: You said so (answer 3)")
    assert stand_in.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "You said so"}


@pytest.mark.parametrize("able", by_day([True, False], True))
def test_an_answer_cut_in_thinking_goes_on_thinking(page, stand_in, able):
    stand_in.model["capabilities"] |= {"continue_final_message": True, "reasoning_history": able}
    open_page(page, stand_in.url)
    ask(page, "half a thought")
    expect(answers(page)).to_contain_text("cut at the length limit")
    expect(button(page, "Continue")).to_have_count(int(able))
    if able:
        button(page, "Continue").click()
        expect(said(answers(page))).to_contain_text("(answer 2)")
        assert stand_in.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "", "reasoning_content": "Let me see"}
        assert stand_in.bodies[-1]["continue_final_message"] is True and questions(page).count() == 1


# errors ---------------------------------------------------------------------------------------------------------------

def test_a_refused_text_returns_to_the_composer(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "refuse")
    expect(page.get_by_role("alert")).to_contain_text("Message 1 has 8,001 characters; the limit is 8,000 (HTTP 400)")
    expect(message_box(page)).to_have_value("refuse")
    expect(page.get_by_role("article")).to_have_count(0)
    expect(chats(page)).to_have_count(0)
    ask(page, "shorter")
    expect(answers(page)).to_contain_text("You said: shorter")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert stand_in.bodies[-1]["messages"] == [{"role": "user", "content": "shorter"}]
    ask(page, "refuse again")                   # in a chat with messages
    expect(message_box(page)).to_have_value("refuse again")
    expect(questions(page)).to_have_count(1)
    button(page, "Edit").click()                # and an edit
    page.get_by_role("textbox", name="Edited text").fill("refuse this too")
    button(page, "Update").click()
    expect(message_box(page)).to_have_value("refuse this too\n\nrefuse again")
    expect(said(questions(page))).to_have_text(["shorter"])


@pytest.mark.slow
def test_typed_words_follow_a_text_that_returns(page, held_front):
    open_page(page, held_front.url)
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    with page.expect_request("**/v1/chat/completions"):
        ask(page, "x" * 40_000)
    message_box(page).fill("and one more thing")
    held[0].fulfill(status=413, body='{"error": {"message": "too much"}}')
    expect(page.get_by_role("alert")).to_have_text("Too much (HTTP 413).")
    expect(message_box(page)).to_have_value("x" * 40_000 + "\n\nand one more thing")
    expect(page.get_by_role("article")).to_have_count(0)


@pytest.mark.parametrize("api, count", by_day([("v1", 2), ("v1", 5), ("native", 5)], ("v1", 2)))
def test_a_long_answer_ends_no_conversation(page, api, count):
    with fake_front(pieces=["word " * 2000, "word " * 2000]) as url:
        if api == "native":
            page.route("**/v1/models", lambda route: route.fulfill(status=404, body="{}"))
        open_page(page, url)
        for number in range(1, count + 1):      # 20,000 characters each
            ask(page, f"question {number}")
            expect_answered(page, number)
        expect(page.get_by_role("alert")).to_have_count(0)


def test_a_question_with_only_an_error_is_not_resent(page, stand_in):
    open_page(page, stand_in.url)
    ask(page, "overload")
    expect(page.get_by_role("alert")).to_contain_text("The queue is full")
    ask(page, "something else")
    expect(answers(page).last).to_contain_text("You said: something else")
    assert stand_in.bodies[-1]["messages"] == [{"role": "user", "content": "something else"}]
    ask(page, "broken")                         # half an answer is part of the conversation
    expect(page.get_by_role("alert").last).to_contain_text("The worker died")
    ask(page, "go on")
    expect(answers(page).last).to_contain_text("You said: go on")
    assert [message["content"] for message in stand_in.bodies[-1]["messages"]][-3:] == ["broken", "Half an answer", "go on"]


@pytest.mark.parametrize("name", by_day(["Try again", "Regenerate"], "Try again"))
def test_an_overloaded_server_can_be_asked_again(page, stand_in, name):
    open_page(page, stand_in.url)
    ask(page, "overload")
    expect(page.get_by_role("alert")).to_contain_text("The queue is full (HTTP 429, try again in 1 s)")
    button(page, name).click()
    expect(answers(page)).to_contain_text("You said: overload")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answers(page).get_by_text("/2")).to_have_count(0)            # the empty failure is gone


@pytest.mark.parametrize("question, text", [("broken", "The worker died"),
                                            pytest.param("cut off", "The server stopped in the middle of this answer", marks=pytest.mark.slow)])
def test_an_error_in_the_stream_keeps_earlier_text(page, stand_in, question, text):
    open_page(page, stand_in.url)
    ask(page, question)
    expect(page.get_by_role("alert")).to_contain_text(text)
    expect(said(answers(page))).to_have_text("Half an answer")
    expect(button(page, "Continue")).to_be_visible()
    ask(page, "go on")
    expect(answers(page).last).to_contain_text("You said: go on")


def test_a_server_that_went_away_is_an_alert(page, stand_in):
    open_page(page, stand_in.url)
    page.route("**/chat/completions", lambda route: route.abort())
    ask(page, "anybody there?")
    expect(page.get_by_role("alert")).to_contain_text("is the server running?")


def test_the_page_wakes_up_once_the_model_is_loaded(page, stand_in):
    stand_in.loading = {"stage": "reading weights", "fraction": 0.43}
    page.goto(stand_in.url)
    expect(page.get_by_text("reading weights 43\u00a0%")).to_have_count(1)          # once, not below the composer too
    message_box(page).fill("early")
    button(page, "Send").click()
    expect(page.get_by_text("Your question is sent when the model is ready.")).to_be_visible()
    expect(button(page, "Send")).to_be_disabled()               # once is enough
    expect(page.get_by_role("article")).to_have_count(0)
    expect(message_box(page)).to_have_value("early")
    stand_in.loading = None
    expect(answers(page)).to_contain_text("You said: early")


def test_the_page_says_that_no_checkpoint_is_there(page, stand_in):
    stand_in.status, stand_in.loading = "waiting", {"stage": "waiting for the first checkpoint in base", "fraction": 0.0}
    page.goto(stand_in.url)
    expect(page.get_by_text("Waiting for the first checkpoint in base.", exact=True)).to_have_count(1)
    expect(page.get_by_role("progressbar")).to_have_count(0)
    stand_in.loading = None
    expect(page.locator("#lamp.ready")).to_be_visible()


def test_a_stopped_server_can_be_asked_again(page, stand_in):
    open_page(page, stand_in.url)
    stand_in.loading = {"stage": "reading weights", "fraction": None}
    ask(page, "hello")
    expect(answers(page)).to_contain_text("The model is not ready: reading weights. Your message will then be sent.")
    expect(page.get_by_role("alert")).to_have_count(0)
    button(page, "Stop").click()
    expect(answers(page)).to_contain_text("The answer was stopped before its first word.")
    expect(button(page, "Regenerate")).to_be_disabled()
    expect(page.locator("#state")).to_contain_text("reading weights")
    stand_in.loading = None
    button(page, "Regenerate").click()
    expect(answers(page)).to_contain_text("You said: hello")


# both APIs ------------------------------------------------------------------------------------------------------------

def test_nanochat_s_only_route_is_asked(page, stand_in):
    stand_in.model = None
    open_page(page, stand_in.url)
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("stand-in-135m")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        ask(page, "hello")
    assert sent.value.url == stand_in.url + "chat/completions"
    expect_answered(page)
    assert stand_in.bodies[0]["truncate"] == "oldest" and "stream" not in stand_in.bodies[0]


def test_nanochat_s_route_is_asked_despite_models(page, stand_in):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=405, body="{}"))
    open_page(page, stand_in.url)
    for number in (1, 2):
        ask(page, "hello")
        expect_answered(page, number)
    assert len(stand_in.bodies) == 2


@pytest.mark.slow
def test_the_server_says_how_far_it_has_read(page, server_url):
    open_page(page, server_url)
    page.evaluate("""() => { window.said = new Set();
      new MutationObserver(() => said.add(document.querySelector("#log").textContent.match(/Reading the prompt, \\d+/)?.[0]))
        .observe(document.querySelector("#log"), {subtree: true, childList: true, characterData: true}); }""")
    command(page, "/maxtokens 4")
    ask(page, "Count: " + " ".join(str(number) for number in range(500)))
    expect(answers(page).last).to_contain_text("cut at the length limit", timeout=SLOW_MS)        # 4 tokens of one step have no speed
    assert page.evaluate("[...said].filter(Boolean).length") > 1


def test_an_answer_that_repeats_itself_can_go_on(page, stand_in):
    stand_in.model["capabilities"]["continue_final_message"] = True
    open_page(page, stand_in.url)
    ask(page, "repeats")
    expect(answers(page)).to_contain_text("it repeats itself")
    button(page, "Continue").click()
    expect(said(answers(page))).to_have_text("again againYou said: again again (answer 2)")
    expect(answers(page)).not_to_contain_text("it repeats itself")


@pytest.mark.slow
def test_a_repeating_answer_ends_and_can_go_on(page, server_url):
    open_page(page, server_url)
    command(page, "/temperature 0")
    ask(page, "Write a poem about the sea.")
    expect(answers(page)).to_contain_text("it repeats itself", timeout=SLOW_MS)
    before = said(answers(page)).inner_text()
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_contain_text("it repeats itself", timeout=SLOW_MS)
    expect(said(answers(page))).to_contain_text(before.splitlines()[0])
    page.wait_for_function("before => document.querySelector('#log').textContent.length > before", arg=len(before) + 200)
