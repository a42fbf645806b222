"""The terminal shows calls of nanochat's calculator between the words, keeps them with the chat and sends them back."""

import io
import json
import sys

import pytest
from rich.console import Console

from answers import said
from browsing import fake_front
from chatlm.common.messages.requests import Delta
from chatlm.terminal import remote
from chatlm.terminal.calculator import marked, split_at_calls
from chatlm.terminal.conversation import Conversation, read_chats
from chatlm.terminal.terminal import MarkdownWriter, PlainWriter
from fake_pool import FakePool
from piped_chats import chat_with


def call(expression, result, **more):
    return Delta("calculator", json.dumps({"expression": expression, "result": result, **more}))


APPLES = said("Tom has 12+30 = ", call("12+30", "42"), "42 apples.")
CALL = {"start": 16, "expression": "12+30", "result": "42"}


def test_a_terminal_shows_calls_as_code(monkeypatch, capsys):
    console = Console(file=io.StringIO(), width=60, record=True, color_system="standard", force_terminal=False)
    writer = MarkdownWriter(console)
    for piece in (said("Tom has 12+30 = "), said(call("12+30", "42")), said("42 **apples**"), said(call("1/0", None)), said(call("`", "``")), said(" in all.")):
        writer.push(piece)
    writer.close()
    assert console.export_text() == "Tom has 12+30 = 12+30 = 42 42 apples 1/0 [` = ``] in all.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    writer = PlainWriter(silent=False)
    writer.push(APPLES)
    writer.close()
    assert capsys.readouterr().out == "Tom has 12+30 = [12+30 = 42] 42 apples.\n"


def test_calls_send_no_control_sequences():
    console = Console(file=io.StringIO(), width=60, record=True, force_terminal=False)
    writer = MarkdownWriter(console)
    writer.push(said(call("1\x1b[31m\n\n# 2", "\x9b2J")))
    writer.close()
    assert console.export_text() == "1[31m # 2 = 2J\n"


def test_a_pipe_gets_text_and_json_gets_calls(monkeypatch, capsys):
    """A pipe gets the text alone and JSON has the calls beside it."""
    assert chat_with(FakePool([APPLES]), monkeypatch, ["How many?"]) == 0
    assert capsys.readouterr().out == "Tom has 12+30 = 42 apples.\n"
    assert chat_with(FakePool([APPLES]), monkeypatch, ["How many?"], json=True) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["text"], line["calculator"]) == ("Tom has 12+30 = 42 apples.", [CALL])


def test_calls_are_saved_and_sent_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool = FakePool([APPLES])
    assert chat_with(pool, monkeypatch, ["How many?", "And?", "/save kept.json", "/clear", "/load kept.json", "More?"]) == 0
    _, second, third = pool.requests
    assert second.messages[1].more == {"calculator": [CALL]} and [message.more for message in third.messages[1::2]] == [{"calculator": [CALL]}] * 2
    assert "Tom has 12+30 = [12+30 = 42] 42 apples." in capsys.readouterr().err
    nodes = json.loads((tmp_path / "kept.json").read_text())["conversations"][0]["nodes"]
    assert [node.get("calculator") for node in nodes] == [None, [CALL], None, [CALL]]


def test_a_continued_answer_has_the_calls_of_both(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pool = FakePool([said("ab", call("12", None, cut=True))], reason="length", stop_reason="max_tokens")
    assert chat_with(pool, monkeypatch, ["How many?", "/continue", "/save kept.json"]) == 0
    [_, answer] = json.loads((tmp_path / "kept.json").read_text())["conversations"][0]["nodes"]
    assert answer["content"] == "abab" and answer["calculator"] == [{"start": 4, "expression": "12", "result": None, "cut": True}]      # the first is written again


def test_a_server_gets_its_own_calls_back(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with fake_front([APPLES]) as url:
        for native in (False, True):
            lines = ["How many?", "And?", f"/save {native}.json"]
            sent = []
            body_of = remote.native_body
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(remote, "native_body", lambda request: sent.append(body_of(request)) or body_of(request))
                patched.setattr(remote.RemotePool, "native", native, raising=False)
                if native:
                    patched.setattr(remote.RemotePool, "_routes", lambda self, request: [(remote.NATIVE_ROUTE, remote.native_body(request))])
                assert chat_with(None, monkeypatch, lines, url=url) == 0
            assert sent[-1]["messages"][1] == {"role": "assistant", "content": "Tom has 12+30 = 42 apples.", "calculator": [CALL]}
            nodes = json.loads((tmp_path / f"{native}.json").read_text())["conversations"][0]["nodes"]
            assert nodes[3]["calculator"] == [CALL]


@pytest.mark.parametrize("calls", [[{"start": 99, "expression": "1"}], "12", [{"start": 0}], [7], {"start": 0}])
def test_impossible_calls_in_a_file_are_left_out(calls):
    node = {"role": "assistant", "content": "Hi", "calculator": calls}
    [chat] = read_chats(json.dumps([{"role": "user", "content": "?"}, node]))
    assert chat.messages()[1].more is None and chat.lines()[1] == "Hi\n"


def test_merged_answers_keep_their_calls_in_place():
    chat = Conversation()
    for text in ("Tom has 12+30 = 42 apples.", "Tom has 12+30 = 43 apples."):
        chat.add({"role": "assistant", "content": text, "parent": chat.leaf, "calculator": [CALL]})
    [message] = chat.messages()
    assert [call["start"] for call in message.more["calculator"]] == [16, 44] and message.content[44:46] == "43"
    assert chat.last_text() == "".join(f"Tom has 12+30 = <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>{number} apples." for number in (42, 43))


def test_a_text_is_split_at_its_calls():
    assert split_at_calls("ab", [CALL | {"start": 11}], 10) == [Delta("text", "a"), call("12+30", "42"), Delta("text", "b")]
    assert marked("ab", [{"start": 1, "stray": "python_end"}, {"start": 2, "expression": None, "result": "3"}]) == "ab [= 3]"
