"""The whole loop of tools with a model that calls them by itself, in the page and in the terminal: what they tell the model is the same."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

import fake_tools
from browsing import ROOT, SLOW_MS, answers, ask, button, expect, expect_answered, needs_browser, open_page, said, started_server
from chatlm.terminal.conversation import read_chats
from piped_chats import conversation

pytestmark = needs_browser
CALLER = str(ROOT / "tests/fixtures/caller")
CITIES = "What time is it in Tokyo and in Paris?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("calling")


def still_clock(place):
    return {"command": sys.executable, "args": [fake_tools.__file__, "clock", str(place / "asked")], "alwaysAllow": ["*"]}


@contextmanager
def calling(place, **programs):
    """A server with the model and these tool servers."""
    config = place / "mcp.json"
    config.write_text(json.dumps({"mcpServers": programs}))
    with started_server("--lora", CALLER, "--mcp-config", str(config), "--kv-cache-memory", "60M", "--temperature", "0") as url:
        yield url


@pytest.fixture(scope="module")
def calling_url(place):
    """With the real clock, too."""
    with calling(place, fake=still_clock(place), time={"command": sys.executable, "args": ["-m", "mcp_server_time"]}) as url:
        yield url


@pytest.fixture(scope="module")
def still_url(place):
    """With a clock that stands still."""
    with calling(place, fake=still_clock(place)) as url:
        yield url


def chat_with(page, url, *tools, **parameters):
    open_page(page, url)
    expect(button(page, re.compile("^Tools"))).to_be_visible(timeout=SLOW_MS)
    page.evaluate("changes => Chat.change(Chat.current, changes)", {"tools": sorted(tools), "parameters": parameters})


@pytest.mark.slow
def test_the_time_is_asked_for_and_told(page, calling_url):
    """As a reader does it, from the choice of the tool to the answer; the clock is the real one."""
    open_page(page, calling_url)
    button(page, "Tools").click()
    page.get_by_role("dialog", name="Tools").get_by_role("checkbox", name=re.compile("^time")).check()
    button(page.get_by_role("dialog", name="Tools"), "Done").click()
    ask(page, "Hello!")
    expect_answered(page, 1)
    expect(page.get_by_role("region", name=re.compile("^Call of"))).to_have_count(0)
    ask(page, "What time is it in Tokyo?")
    card = page.get_by_role("region", name="Call of time__get_current_time")
    button(card, "Once").click(timeout=SLOW_MS)
    expect(card).to_contain_text('"timezone": "Asia/Tokyo"', timeout=SLOW_MS)
    expect_answered(page, 3)
    result = json.loads(page.evaluate("[...Chat.nodes.values()].flatMap(({calls = []}) => calls)[0].result"))
    expect(said(answers(page).last)).to_have_text(f"It is {result['datetime'][11:16]} in Tokyo.")


@pytest.mark.slow
def test_the_model_reads_that_it_was_not_allowed(page, calling_url):
    chat_with(page, calling_url, "time__get_current_time")
    ask(page, "What time is it in Paris?")
    button(page.get_by_role("region", name="Call of time__get_current_time"), "No").click(timeout=SLOW_MS)
    expect_answered(page, 2)
    expect(said(answers(page).last)).to_contain_text("You did not allow it")


@pytest.mark.slow
def test_without_a_tool_there_is_no_call(page, calling_url):
    chat_with(page, calling_url)
    ask(page, CITIES)
    expect_answered(page)
    expect(said(answers(page).last)).to_have_text("I have no tool that tells me the time.")


def test_page_and_terminal_say_the_same(page, still_url, place):
    """The same seed, model and tools give the same rounds, calls, results and texts."""
    chat_with(page, still_url, "fake__get_current_time", temperature=1, seed=5)
    questions = [CITIES, "Thank you.", "What time is it in Tokyo?"]
    for question in questions:
        ask(page, question)
        page.wait_for_function("() => { const node = Chat.lastNode(); return node.role === 'assistant' && node.timings && !node.calls?.length; }",
                               timeout=SLOW_MS, polling=100)      # without a frame for each look
    saved = place / "terminal.json"
    lines = ["/tools on fake__get_current_time", *questions, f"/save {saved}"]
    subprocess.run([sys.executable, ROOT / "chat_server.py", "chat", "--url", still_url, "--temperature", "1", "--seed", "5"],
                   input="\n".join(lines) + "\n", text=True, check=True, timeout=120)
    [chat] = read_chats(saved.read_text())
    here, there = conversation(page.evaluate("Chat.path")), conversation(chat.path())
    assert here == there and [len(calls) for _, _, calls, _ in here] == [0, 2, 0, 0, 0, 0, 1, 0]
