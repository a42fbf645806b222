"""Functions, formats, prompts that are kept, and the words of a search."""

import json
import re

import pytest

from browsing import (SLOW_MS, answers, ask, button, chats, command, expect, expect_accessible, expect_answered, menu, message_box,
                      needs_browser, open_page, said, settled)

pytestmark = needs_browser
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}


def open_tools(page):
    button(page, "Settings").click()
    page.get_by_text("Functions and answer format").click()


def test_a_call_is_a_card_and_sends_its_result_back(page, stand_in, theme):
    stand_in.model["capabilities"] |= {"tools": True, "json_schema": True, "reasoning_budget": True}
    open_page(page, stand_in.url)
    command(page, "/budget 20")
    open_tools(page)
    functions = page.get_by_role("textbox", name="Functions that the model may call (JSON)")
    for text, problem in (("{", "This is not valid JSON"), ('[{"name": "a b"}]', "Function 1 needs a name")):
        functions.fill(text)
        expect(page.locator("#functions-problem")).to_contain_text(problem)
    functions.fill('{"name": "look_up", "parameters": {"type": "object"}}')
    button(page, "Add a calculator").click()
    expect(page.locator("#budget-text")).to_have_text("20 tokens")       # between two places
    assert page.evaluate("Chat.current.parameters.thinking_budget") == 20
    page.get_by_role("slider", name="Thinking budget").fill("2")
    expect(page.locator("#budget-text")).to_have_text("64 tokens")
    expect_accessible(page, theme=theme)
    button(page, "Done").click()
    ask(page, "call")
    card = page.get_by_role("region", name="Call of calculator")
    expect(card).to_contain_text('"expression"')
    expect(card.get_by_role("textbox", name="Result")).to_have_value("42")
    expect_accessible(page, theme=theme)
    other = page.get_by_role("region", name="Call of look_up").get_by_role("textbox", name="Result")
    other.fill("sunny")
    button(page, "Send results").click()
    expect_answered(page, 2)
    expect(said(answers(page).last)).to_contain_text("You said: sunny")
    first, last = (body for body in stand_in.bodies if body.get("stream"))
    assert [tool["function"]["name"] for tool in first["tools"]] == ["look_up", "calculator"] and first["thinking_budget"] == 64
    calls = last["messages"][-3]["tool_calls"]
    assert [(message["role"], message.get("tool_call_id")) for message in last["messages"][-2:]] == [("tool", call["id"]) for call in calls]
    assert [message["content"] for message in last["messages"][-2:]] == ["42", "sunny"]
    expect(card.get_by_role("textbox")).to_have_count(0)
    exported = page.evaluate("Tree.exportOf([Chat.current], () => [...Chat.nodes.values()])")
    brought = page.evaluate("text => Tree.importOf(text)", json.dumps(exported))[0]
    assert [node["calls"][0]["result"] for node in brought["nodes"] if "calls" in node] == ["42"] and len(brought["conversation"]["parameters"]["tools"]) == 2


@pytest.mark.parametrize("expression, value", [("2*(3+4)-1", "13"), ("-1.5e1 / 4", "-3.75"), ("1,000 * 2", "2000"), ("1/0", ""), ("2 +", ""), ("alert(1)", ""), ("", "")])
def test_the_calculator_works_out_only_arithmetic(opened_page, expression, value):
    assert opened_page.evaluate("text => Calls.calculated(text)", json.dumps({"expression": expression})) == value


def test_an_answer_follows_the_schema_of_its_chat(page, server_url):
    open_page(page, server_url)
    open_tools(page)
    schema = page.get_by_role("textbox", name="JSON schema of answers")
    schema.fill('{"not": {"type": "string"}}')
    expect(page.locator("#schema-problem")).to_contain_text("not", timeout=SLOW_MS)
    schema.fill(json.dumps(CITY))
    expect(page.locator("#schema-problem")).to_have_text("")
    button(page, "Done").click()
    ask(page, "Which city is the capital of Japan? Answer in JSON.")
    expect_answered(page)
    assert json.loads(said(answers(page)).inner_text()).keys() == {"city"}


def test_prompts_are_kept_and_exported(page, stand_in, theme):
    open_page(page, stand_in.url)
    menu(page, "Prompts")
    dialog = page.get_by_role("dialog", name="Prompts")
    for name, kind, text in (("Pirate", "System prompt", "Talk like a pirate."), ("Shorter", "Starter", "Say this in ten words: ")):
        dialog.get_by_role("textbox", name="Name of the prompt").fill(name)
        dialog.get_by_role("combobox", name="What it is").select_option(kind)
        dialog.get_by_role("textbox", name="Text of the prompt").fill(text)
        button(dialog, "Save prompt").click()
    expect_accessible(page, theme=theme)
    button(dialog, "Use: Pirate").click()
    page.reload()
    button(page, "Shorter").click()
    expect(message_box(page)).to_have_value("Say this in ten words: ")
    menu(page, "Prompts")
    button(dialog, "Use: Pirate").click()
    message_box(page).fill("yellow submarines")
    message_box(page).press("Enter")
    expect_answered(page)
    assert stand_in.bodies[-1]["messages"][0] == {"role": "system", "content": "Talk like a pirate."}
    button(page, "New chat").click()
    page.get_by_role("textbox", name="Search chats").fill("submarines")
    expect(chats(page)).to_have_count(1)
    chats(page).first.click()
    page.wait_for_function("() => CSS.highlights.get('found')?.size === 3")         # in the list, the question and the answer
    with page.expect_download() as saved:
        menu(page, "Export", "All chats (JSON)")
    exported = json.loads(saved.value.path().read_text())
    assert [prompt["name"] for prompt in exported["prompts"]] == ["Pirate", "Shorter"]
    page.evaluate("Prompts.keep([{name: 'Pirate', text: 'Arr.', starter: false}])")
    page.locator("#import-file").set_input_files(saved.value.path())
    button(page.get_by_role("dialog"), "Import").click()
    page.wait_for_function("() => Prompts.own().length === 3")
    assert page.evaluate("Prompts.own().map(({name}) => name)") == ["Pirate", "Pirate (2)", "Shorter"]
    settled(page)


def test_edited_prompts_stand_in_the_slash_menu(page, stand_in, theme):
    open_page(page, stand_in.url)
    page.evaluate("""Prompts.keep([{name: "Polite mail", text: "Rewrite politely:", starter: true}, {name: "Pirate", text: "Arr.", starter: false},
        {name: "Temperature", text: "How warm is it?", starter: true}, {name: "Höflich!", text: "Bitte: ", starter: true}])""")
    menu(page, "Prompts")
    dialog = page.get_by_role("dialog", name="Prompts")
    words, title = (dialog.get_by_role("textbox", name=name) for name in ("Text of the prompt", "Name of the prompt"))
    button(dialog, "Edit: Pirate").click()
    expect(words).to_have_value("Arr.")
    expect(words).to_be_focused()
    expect(dialog.get_by_role("combobox", name="What it is")).to_have_value("system")
    words.fill("Talk like a pirate.")
    title.fill("Polite mail")
    button(dialog, "Save prompt").click()
    expect(dialog.get_by_role("alert")).to_have_text("Another prompt is called “Polite mail”.")
    expect_accessible(page, theme=theme)
    title.fill("Captain")
    button(dialog, "Save prompt").click()
    expect(dialog.get_by_role("alert")).to_have_count(0)
    assert page.evaluate("Prompts.own().map(({name, text}) => [name, text])")[:2] == [["Polite mail", "Rewrite politely:"], ["Captain", "Talk like a pirate."]]
    page.keyboard.press("Escape")
    menu(page, "Prompts")
    expect(title).to_have_value("")
    page.keyboard.press("Escape")
    box, options = message_box(page), page.get_by_role("listbox", name="Commands").get_by_role("option")
    box.fill("/")
    names = [text.split("/")[1] for text in page.locator("#commands span").all_inner_texts()]
    assert names[:10] == ["system", "clear", "temporary", "help", "set", "polite-mail", "captain", "temperature-2", "höflich", "temperature"]
    box.fill("/pol")
    expect(options).to_have_text([re.compile("^/polite-mail.*Starter · Rewrite politely:")])
    box.press("Enter")
    expect(box).to_have_value("Rewrite politely:")
    command(page, "/polite-mail send me the money")
    expect(box).to_have_value("Rewrite politely: send me the money")
    assert stand_in.bodies == []
    box.fill("/cap")
    options.click()
    expect(page.get_by_role("log")).to_contain_text("The system prompt is now “Talk like a pirate.”.")
    expect(box).to_have_value("")
    for text, said in (("/set temperature 0.5", "Temperature is now 0.5."), ("/Temperature 0.25", "Temperature is now 0.25."), ("/set top-p 0.5", "Top-p is now 0.5."),
                       ("/max_tokens 7", "Max tokens is now 7."), ("/set parameter seed 3", "Seed is now 3."), ("/set stop END", "The stop string is now “END”."),
                       ("/set system Be brief.", "The system prompt is now “Be brief.”."), ("/set repetition_penalty 1.1", "Repetition penalty is now 1.1.")):
        command(page, text)
        expect(page.get_by_role("log")).to_contain_text(said)
    for text, said in (("/set colour red", "/set takes one of temperature, top_k,"), ("/set", "/set takes one of temperature"), ("/set temperature 9", "/temperature takes a number from 0 to 2")):
        command(page, text)
        expect(page.get_by_role("alert")).to_contain_text(said)
    ask(page, "one")
    expect_answered(page)
    body = stand_in.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"], body["stop"], body["repetition_penalty"]) == (0.25, 0.5, 7, 3, ["END"], 1.1)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
