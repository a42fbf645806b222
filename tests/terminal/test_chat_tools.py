"""Tools that run in `chat`: with tools of its own, with a server's, from a pipe and on a terminal."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

import fake_tools
from browsing import fake_front
from chatlm.common.errors import ConfigError
from chatlm.front.admission.admission import Admission, SharedAdmission
from chatlm.terminal.conversation import read_chats
from piped_chats import chat_with
from scripted_pool import ScriptedPool
from typed_chats import chatting

ADD = '<tool_call>\n{"name": "fake__add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
COUNT = '<tool_call>\n{"name": "fake__count", "arguments": {"path": "PATH"}}\n</tool_call>'


@pytest.fixture
def config(tmp_path):
    def written(**fields):
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": {"fake": {"command": sys.executable, "args": [fake_tools.__file__], **fields}}}))
        return str(path)
    return written


def sent(pool):
    """(role, content) of the messages of each request."""
    return [[(message.role, message.content) for message in request.messages] for request in pool.requests]


def test_a_piped_chat_runs_what_the_operator_allows(monkeypatch, config, capsys):
    pool = ScriptedPool(ADD, "It is five.")
    assert chat_with(pool, monkeypatch, ["2 + 3?"], mcp_config=config(alwaysAllow=["add"])) == 0
    assert sent(pool) == [[("user", "2 + 3?")], [("user", "2 + 3?"), ("assistant", ""), ("tool", "5")]]
    first, second = pool.requests
    assert [tool["function"]["name"] for tool in first.tools] == [tool["function"]["name"] for tool in second.tools] and len(first.tools) == 9
    call = second.messages[1].more["tool_calls"][0]
    assert call["function"] == {"name": "fake__add", "arguments": {"a": 2, "b": 3}} and second.messages[2].more["tool_call_id"] == call["id"]
    out = capsys.readouterr()
    assert out.out == "It is five.\n" and 'calling fake__add {"a": 2, "b": 3}' in out.err


def test_a_piped_chat_runs_nothing_that_wants_a_yes(monkeypatch, config, tmp_path):
    path = tmp_path / "calls"
    pool = ScriptedPool(COUNT.replace("PATH", str(path)), "Then not.")
    assert chat_with(pool, monkeypatch, ["count"], mcp_config=config()) == 0
    assert sent(pool)[1][-1] == ("tool", "The user did not allow this call.") and not path.exists()


def test_equal_calls_and_rounds_are_bounded(monkeypatch, config, tmp_path):
    """The third equal call is not run; after the last round the model gets no tools."""
    path = tmp_path / "calls"
    pool = ScriptedPool(COUNT.replace("PATH", str(path)))
    assert chat_with(pool, monkeypatch, ["count"], mcp_config=config(alwaysAllow=["*"]), tool_rounds=4) == 0
    assert path.read_text() == "called\n" * 2 and len(pool.requests) == 5
    assert [content for role, content in sent(pool)[-1] if role == "tool"][2:] == ["Not run: the same call was made twice before. Use its result."] * 2
    assert [bool(request.tools) for request in pool.requests] == [True] * 4 + [False]


@pytest.mark.parametrize("call, result", [
    ('{"name": "fake__wrong", "arguments": {}}', "it went wrong"), ('{"name": "fake__none", "arguments": {}}', "Not run: there is no tool fake__none.")])
def test_what_goes_wrong_is_told_to_the_model(monkeypatch, config, call, result):
    pool = ScriptedPool(f"<tool_call>\n{call}\n</tool_call>", "So what.")
    chat_with(pool, monkeypatch, ["go"], mcp_config=config(alwaysAllow=["*"]))
    assert len(pool.requests) == 1 or sent(pool)[1][-1] == ("tool", result)  # what no tool is called is text


def test_a_call_that_was_cut_off_is_not_run(monkeypatch, config):
    pool = ScriptedPool(ADD.removesuffix("}\n</tool_call>"), "So what.")
    pool.reason = "length"
    chat_with(pool, monkeypatch, ["go"], mcp_config=config(alwaysAllow=["*"]))
    assert sent(pool)[1][-1] == ("tool", "Not run: the call was cut off by the limit of tokens.")


def test_tools_can_be_switched_off(monkeypatch, config, capsys):
    pool = ScriptedPool("Fine.")
    chat_with(pool, monkeypatch, ["/tools off all", "/tools on fake__add", "hi", "/tools off nothing"], mcp_config=config())
    assert [tool["function"]["name"] for tool in pool.requests[0].tools] == ["fake__add"]
    assert "there is no tool and no tool server \"nothing\" (servers: fake)" in capsys.readouterr().err


def cost_in(text):
    """The tokens that it says tools take."""
    return [int(found.replace(",", "")) for found in re.findall(r"take ([\d,]+) tokens of each prompt", text)]


def test_no_tool_is_on_until_it_is_chosen_and_their_cost_is_told(monkeypatch, config, capsys):
    """All of them together may keep a model on a CPU busy for minutes."""
    async def rendered(messages, tools, client, options):
        return (1,) * (10 + 20 * bool(tools) + 300 * len(tools))

    pool = ScriptedPool("Fine.")
    pool.prompts.render = rendered
    lines = ["hi", "/tools on fake__add", "hi", "/tools on all", "hi"]
    assert chat_with(pool, monkeypatch, lines, mcp_config=config(), tools=None) == 0
    assert [len(request.tools) for request in pool.requests] == [0, 1, 9]
    said = capsys.readouterr().err
    assert "none of 9 tools is on; /tools on NAME (a tool, a server, or all) switches them on. All take" in said
    assert "1 of 9 tools are on and take" in said
    assert cost_in(said) == [2720, 320, 2720]


@pytest.mark.parametrize("tools, count", [("fake__add", 1), ("fake__add, fake__count", 2), ("fake", 9), ("all", 9), ("", 0)])
def test_the_tools_that_a_flag_names_are_on_from_the_start(monkeypatch, config, capsys, tools, count):
    pool = ScriptedPool("Fine.")
    assert chat_with(pool, monkeypatch, ["hi"], mcp_config=config(), tools=tools) == 0
    assert len(pool.requests[0].tools) == count
    assert (f"{count} of 9 tools are on" if count else "none of 9 tools is on") in capsys.readouterr().err


@pytest.mark.parametrize("settings, message", [
    ({"tools": "fake__ad"}, r'--tools: there is no tool and no tool server "fake__ad" \(servers: fake\)'),
    ({"mcp_config": None, "tools": "all"}, "--tools: --mcp-config FILE, or a server at --url, says which tools there are")])
def test_tools_that_are_not_there_are_refused(monkeypatch, config, settings, message):
    with pytest.raises(ConfigError, match=message):
        chat_with(ScriptedPool("Fine."), monkeypatch, ["hi"], **{"mcp_config": config()} | settings)


def test_a_file_whose_servers_do_not_start_says_why_there_are_no_tools(monkeypatch, config):
    with pytest.raises(ConfigError, match="--tools: there are no tools: fake: failed, it ended .*no-such-program"):
        chat_with(ScriptedPool("Fine."), monkeypatch, ["hi"], mcp_config=config(command="no-such-program"))


def test_a_model_that_cannot_call_says_so(monkeypatch, config, capsys):
    pool = ScriptedPool("Fine.")
    pool.tokenizer.tool_format = None
    assert chat_with(pool, monkeypatch, ["hi"], mcp_config=config()) == 1
    assert "this model can't call tools" in capsys.readouterr().err


def test_the_chat_ends_its_tool_servers(monkeypatch, config, tmp_path):
    mark = str(tmp_path / "mark").encode()
    chat_with(ScriptedPool("Fine."), monkeypatch, ["hi"], mcp_config=config(args=[fake_tools.__file__, "grandchild", mark.decode()]))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert Path(mark.decode()).exists() and not [command for command in commands if mark in command]


def test_a_saved_chat_keeps_calls_and_results(monkeypatch, config, tmp_path):
    pool = ScriptedPool(ADD, "It is five.", "Yes.")
    saved = tmp_path / "chat.json"
    chat_with(pool, monkeypatch, ["2 + 3?", f"/save {saved}", "sure?"], mcp_config=config(alwaysAllow=["add"]))
    [chat] = read_chats(saved.read_text())
    again = [(message.role, message.content) for message in chat.messages()]
    assert again == [*sent(pool)[1], ("assistant", "It is five.")] and sent(pool)[2] == [*again, ("user", "sure?")]


class SeeingPool(ScriptedPool):
    """Its model sees. Pictures are decoded in a sandbox, as a pool does it."""

    sees, reader = True, None

    async def decode_picture(self, data, client):
        self.reader = self.reader or Admission(lambda request_id, client: None, SharedAdmission())
        return await self.reader.decode_picture(data, client)

    async def close(self):
        if self.reader:
            await self.reader.shared.close()


PICTURE = '<tool_call>\n{"name": "fake__picture", "arguments": {}}\n</tool_call>'


def test_pictures_of_results_reach_a_model_that_sees(monkeypatch, config, tmp_path):
    """In a later question and from a saved chat, too."""
    saved = tmp_path / "chat.json"
    pool = SeeingPool(PICTURE, "One pixel.", "Yes.", "Still.")
    assert chat_with(pool, monkeypatch, ["show it", f"/save {saved}", "sure?", f"/load {saved}", "sure?"], mcp_config=config(alwaysAllow=["*"])) == 0
    for request in pool.requests[1:]:
        *_, result, shown = request.messages[:4]
        assert (result.role, result.content) == ("tool", "[picture 1]\none pixel")
        assert (shown.role, shown.parts, [(picture.width, picture.height) for picture in shown.pictures]) == ("user", (0, "The pictures of the results above."), [(1, 1)])


def test_a_model_that_does_not_see_is_told_of_pictures(monkeypatch, config, capsys):
    pool = ScriptedPool(PICTURE, "Nice.")
    assert chat_with(pool, monkeypatch, ["show it"], mcp_config=config(alwaysAllow=["*"])) == 0
    assert sent(pool)[1][2:] == [("tool", "[picture 1]\none pixel\n[You are not shown the pictures of this result.]")]
    assert "cannot see images" in capsys.readouterr().err


def test_only_the_newest_pictures_are_sent(monkeypatch, config):
    """Eight in a request."""
    pool = SeeingPool(*[PICTURE * 2, "Nice."] * 5)
    assert chat_with(pool, monkeypatch, ["show"] * 5, mcp_config=config(alwaysAllow=["*"])) == 0
    told = [len(message.pictures) or message.content.endswith("[You are not shown the pictures of this result.]")
            for message in pool.requests[-1].messages if message.role == "tool" or message.pictures]
    assert told == [True] * 2 + [False, False, 2] * 4


def test_a_picture_that_cannot_be_read_is_left_out(monkeypatch, config):
    pool = SeeingPool(PICTURE, "A pity.")
    assert chat_with(pool, monkeypatch, ["show it"], mcp_config=config(args=[fake_tools.__file__, "broken-picture"], alwaysAllow=["*"])) == 0
    [(role, content)] = sent(pool)[1][2:]
    assert role == "tool" and content.startswith("[picture 1]\none pixel\n[picture 1 can't be read: ")


def test_a_server_s_tools_are_asked_about_on_a_terminal(config, tmp_path):
    """They are off until /tools on; y runs one call, n none, a all calls of this tool."""
    path = tmp_path / "calls"
    texts = [COUNT.replace("PATH", str(path)), "Counted.", COUNT.replace("PATH", f"{path}2"), "Not counted."]
    with fake_front(tool_format="tagged", pool=ScriptedPool(*texts), mcp_config=config()) as url, chatting(url, tmp_path=tmp_path) as pty:
        pty.type("/tools\r")
        pty.expect("none of 9 tools is on")
        pty.type("/tools on fake\r")
        pty.expect("9 of 9 tools are on")
        pty.type("count\r")
        pty.expect("fake wants to run fake__count")
        pty.expect("y = yes, n = no")
        assert not path.exists()
        pty.type("y\r")
        pty.expect("Counted.")
        assert path.read_text() == "called\n"
        pty.type("count again\r")
        pty.expect("y = yes, n = no")
        pty.type("n\r")
        pty.expect("did not allow.*Not counted.")
        assert not (tmp_path / "calls2").exists()
        pty.type("/quit\r")
        assert pty.leave() == 0
