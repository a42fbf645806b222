"""Calls of nanochat's calculator in answers: cards between the words, and the calls that go back with them."""

import json
import re

import pytest

from answers import said as piece
from browsing import (answers, ask, button, expect, expect_accessible, expect_answered, inside, message_box, more, needs_browser, open_page, said)
from chatlm.common.messages.requests import Delta

pytestmark = needs_browser


def call(expression, result, **more):
    return Delta("calculator", json.dumps({"expression": expression, "result": result, **more}))


APPLES = [piece("😀 Tom has 12+30 = "), piece(call("12+30", "42"), "42 apples,"), piece(" and **5*5** is ", call("5*5", "25"), "25.")]
CALLS = [{"start": 18, "expression": "12+30", "result": "42"}, {"start": 44, "expression": "5*5", "result": "25"}]
SHOWN = "😀 Tom has 12+30 = 12+30 = 4242 apples, and 5*5 is 5*5 = 2525."


def cards(page):
    return said(answers(page).last).get_by_role("group", name="Calculator")


def sent(front):
    """What the last request has of the assistant."""
    return [(message.content, (message.more or {}).get("calculator")) for message in front.pool.requests[-1].messages if message.role == "assistant"]


def test_a_call_is_a_card_and_goes_back(page, held_front, theme):
    held_front.pool.pieces = APPLES
    open_page(page, held_front.url)
    ask(page, "How many?")
    held_front.admit(2)
    expect(cards(page)).to_have_text(["12+30 = 42"])
    expect(said(answers(page).last)).to_have_text(SHOWN.partition(" and")[0])
    held_front.admit(1)
    expect_answered(page)
    expect(cards(page)).to_have_text(["12+30 = 42", "5*5 = 25"])
    expect(said(answers(page).last)).to_have_text(SHOWN)
    expect(said(answers(page).last).locator("strong")).to_have_text("5*5")
    expect_accessible(page, theme=theme)
    held_front.admit(100)
    ask(page, "And?")
    expect_answered(page, 2)
    content = "😀 Tom has 12+30 = 42 apples, and **5*5** is 25."
    assert sent(held_front) == [(content, CALLS)]
    page.reload()                                       # kept chats
    expect(cards(page)).to_have_text(["12+30 = 42", "5*5 = 25"])
    ask(page, "Again?")
    expect_answered(page, 3)
    assert sent(held_front) == [(content, CALLS)] * 2


def test_what_is_copied_and_exported_is_sensible(page, held_front):
    held_front.pool.pieces = APPLES
    held_front.admit(100)
    open_page(page, held_front.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "How many?")
    expect_answered(page)
    button(answers(page).last, "Copy").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "😀 Tom has 12+30 = 42 apples, and **5*5** is 25."
    html = page.evaluate("navigator.clipboard.read().then(([item]) => item.getType('text/html')).then(blob => blob.text())")
    assert re.sub("<[^>]*>", "", html).strip() == "😀 Tom has 12+30 = 42 apples, and 5*5 is 25."
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.assistant .body'))")
    assert page.evaluate("String(getSelection())").strip() == "😀 Tom has 12+30 = 42 apples, and 5*5 is 25."
    assert page.evaluate("Calculator.withCode(Chat.path[1])") == "😀 Tom has 12+30 =  `12+30 = 42` 42 apples, and **5*5** is  `5*5 = 25` 25."
    exported = page.evaluate("Tree.exportOf([Chat.current], () => [...Chat.nodes.values()])")
    [brought] = page.evaluate("text => Tree.importOf(text)", json.dumps(exported))
    assert brought["nodes"][1]["calculator"] == CALLS
    exported["conversations"][0]["nodes"][1]["calculator"] = [{"start": 999, "expression": "1"}, {"start": 0, "expression": {}}, 7, CALLS[0] | {"more": 1}]
    [brought] = page.evaluate("text => Tree.importOf(text)", json.dumps(exported))
    assert brought["nodes"][1]["calculator"] == CALLS[:1]


def test_an_edited_answer_keeps_untouched_calls(page, held_front):
    held_front.pool.pieces = APPLES
    held_front.admit(100)
    open_page(page, held_front.url)
    ask(page, "How many?")
    expect_answered(page)
    more(answers(page).last, "Edit")
    page.get_by_role("textbox", name="Edited text").fill("😀 Ann has 12+30 = 42 pears, and **5*5** is 25.")
    button(page, "Save").click()
    expect(cards(page)).to_have_text(["5*5 = 25"])
    ask(page, "And?")
    expect_answered(page, 2)
    assert sent(held_front) == [("😀 Ann has 12+30 = 42 pears, and **5*5** is 25.", [CALLS[1] | {"start": 43}])]
    assert page.evaluate("[Calculator.afterEdit('abc', 'abXc', [{start: 2}, {start: 3}]), Calculator.afterEdit('a😀c', 'c', [{start: 2}])]") == [[{"start": 2}, {"start": 4}], [{"start": 0}]]


def test_a_cut_answer_goes_on_with_the_whole_call(page, held_front):
    held_front.pool.pieces, held_front.pool.reason, held_front.pool.stop_reason = [piece("One is "), piece(call("1", None, cut=True))], "length", "max_tokens"
    held_front.admit(100)
    open_page(page, held_front.url)
    ask(page, "What?")
    expect_answered(page)
    expect(cards(page)).to_have_text(["1…"])
    held_front.pool.pieces, held_front.pool.reason, held_front.pool.stop_reason = [piece(call("1+0", "1"), "1.")], "stop", "eos"
    button(page, "Continue").click()
    expect(said(answers(page).last)).to_have_text("One is 1+0 = 11.")
    expect_answered(page)
    assert held_front.pool.requests[-1].template_options["continue_final_message"]
    ask(page, "And?")
    expect_answered(page, 2)
    assert sent(held_front) == [("One is 1.", [{"start": 7, "expression": "1+0", "result": "1"}])]


def test_an_answer_may_be_a_call_alone(page, held_front):
    held_front.pool.pieces = [piece(call("6*7", "42"))]
    held_front.admit(100)
    open_page(page, held_front.url)
    ask(page, "What?")
    expect_answered(page)
    expect(cards(page)).to_have_text(["6*7 = 42"])
    expect(answers(page).last.locator("> .nothing").first).to_be_hidden()
    ask(page, "And?")
    expect_answered(page, 2)
    assert sent(held_front) == [("", [{"start": 0, "expression": "6*7", "result": "42"}])]


def test_no_text_can_forge_a_card(page, held_front):
    hostile = "<img src=x onerror='window.hacked=1'>`**x**|$y$ \n# z"
    held_front.pool.pieces = [piece("\ufdd00031\ufdd10032\ufdd2 and `c", call("1", "1"), "` and **b ", call(hostile, "<b>"), " c** and $x", call("2", "3"), "$\n```\n", call("4", "4"), "\n```\n"),
                              piece(call("9" * 900, None), call(None, "7"), Delta("calculator", '{"stray": "python_end"}'), "end")]
    held_front.admit(100)
    open_page(page, held_front.url)
    ask(page, "What?")
    expect_answered(page)
    expect(cards(page)).to_have_count(3)
    assert cards(page).nth(0).text_content() == hostile + " = <b>" and cards(page).nth(2).text_content() == " = 7"
    assert cards(page).nth(1).text_content() == "9" * 400 + "…"
    body = said(answers(page).last)
    expect(body.locator("strong")).to_contain_text("b <img")
    expect(body.locator("code").first).to_have_text("c1 = 1")
    expect(body.locator("pre")).to_contain_text("4 = 4")
    expect(body).to_contain_text("\ufffd0031\ufffd0032\ufffd and")
    assert page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_compared_answers_have_cards_too(page, held_front):
    held_front.pool.pieces = APPLES
    held_front.admit(100)
    open_page(page, held_front.url)
    ask(page, "How many?")
    expect_answered(page)
    inside(answers(page).last, "Compare")
    page.locator("#start-compare").click()
    column = page.get_by_role("region", name="Answer 1")
    expect(column.get_by_role("group", name="Calculator")).to_have_text(["12+30 = 42", "5*5 = 25"])
    column.get_by_role("button", name="Continue with this").click()
    expect(cards(page)).to_have_text(["12+30 = 42", "5*5 = 25"])
    assert page.evaluate("Chat.lastNode().calculator") == CALLS


def test_without_a_template_marks_go_back(page, held_front):
    held_front.pool.tokenizer.has_chat_template = held_front.pool.chats = False
    held_front.pool.pieces = APPLES
    held_front.admit(100)
    open_page(page, held_front.url)
    message_box(page).fill("Once ")
    message_box(page).press("Enter")
    expect_answered(page)
    expect(cards(page)).to_have_text(["12+30 = 42", "5*5 = 25"])
    message_box(page).fill(" and")
    message_box(page).press("Enter")
    expect_answered(page, 2)
    assert "= <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>42 apples" in held_front.pool.requests[-1].prompts[0]


def test_a_reload_loses_no_call_and_moves_none(page, held_front):
    pool = held_front.pool
    pool.pieces, pool.reason, pool.stop_reason = [piece("One is ", call("1+0", "1"), "1. ")], "length", "max_tokens"
    held_front.admit(1)
    open_page(page, held_front.url)
    ask(page, "What?")
    expect_answered(page)
    pool.pieces, pool.reason, pool.stop_reason = [piece("Two "), piece(call("1+1", "2")), piece("and "), piece(call("1+2", "3"), "3.")], "stop", "eos"
    button(page, "Continue").click()
    held_front.admit(2)
    expect(cards(page)).to_have_text(["1+0 = 1", "1+1 = 2"])
    page.reload()
    expect(cards(page)).to_have_text(["1+0 = 1", "1+1 = 2"])
    held_front.admit(2)
    expect(said(answers(page).last)).to_have_text("One is 1+0 = 11. Two 1+1 = 2and 1+2 = 33.")
    expect_answered(page)
    assert page.evaluate("Chat.lastNode().calculator.map(({start}) => start)") == [7, 14, 18]
