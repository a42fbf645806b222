"""The terminal: what `chat` reads and shows, through a pty where it matters, with a server that answers from a list."""

import asyncio
import io
import json
import re
import time
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

import chat_server
from answers import said, thought
from browsing import HeldFront, fake_front
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import PromptProgress
from chatlm.front.pool import pool as pool_module
from chatlm.terminal import chat as terminal_chat
from chatlm.terminal.chat import generate, new_request, summary
from chatlm.terminal.conversation import Conversation, read_chats
from chatlm.terminal.remote import RemotePool, native_body
from chatlm.terminal.terminal import MarkdownWriter
from fake_pool import FakePool, Letters, finished
from page_server import BLOCKS, HOSTILE, MARKDOWN
from patching import patch
from piped_chats import chat_with
from run_here import run_forked
from typed_chats import chatting

# Markdown as it streams


def drawn(text, size, columns=60, rows=20, each=lambda writer: None, styles=False):
    """What is written for good of a text that comes in pieces of `size` characters, without spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=columns, height=rows, highlight=False, record=True, color_system="standard", force_terminal=False)
    writer = MarkdownWriter(console)
    for start in range(0, len(text), size):
        writer.push(said(text[start:start + size]))
        each(writer)
    writer.close()
    return re.sub(r" +$", "", console.export_text(styles=styles), flags=re.MULTILINE)


TRICKY = ("snake_case_name, __init__ and **kwargs alone; `a*b` **bold `c` x** [x](http://a) [1] 5 \\* 3 ***both*** _it_"
          "\n** no**\n`open\n\\[ x \\]\n\n1. \u2028a\n- b\n\n      <b>c\x0b\n```\n")


@pytest.mark.parametrize("text", [MARKDOWN, BLOCKS, HOSTILE, TRICKY], ids=["markdown", "blocks", "hostile", "tricky"])
def test_an_answer_looks_the_same_however_cut(text):
    whole = drawn(text, len(text), styles=True)
    for size in (1, 3, 64):
        assert drawn(text, size, styles=True) == whole


def test_markup_is_drawn_without_its_marks():
    """Headings, emphasis, lists and fences are drawn without their marks."""
    text = "# Title\nA **bold** and *soft* `word`.\n\n- one\n2. two\n\n```py\nx = **1**\n```\n> said\n---\n"
    assert drawn(text, 4) == ("Title\n\nA bold and soft word.\n\n • one\n\n 2 two\n\nx = **1**\n\n▌ said\n\n" + "-" * 60 + "\n")
    styled = drawn(text, 4, styles=True)
    assert "\x1b[1mbold\x1b[0m" in styled and "\x1b[3msoft\x1b[0m" in styled and "\x1b[36mx = **1**\x1b[0m" in styled


def test_what_is_no_markup_stays_as_it_is():
    """What is no markup and every line break stays as it is."""
    text = ("2*3 and snake_case_name, * alone, **not closed, $a_1 * b_2$, \\(x\\), C:\\new &lt; [1]\nroses are <b>red</b>\n"
            "    violets are blue\n====\n")
    assert drawn(text, 3, columns=200) == text.replace("    ", "")


def test_a_table_is_drawn_in_columns_that_fit():
    table = "| a | long name |\n|---|:-:|\n| **bee** | 2 |\n\nafter"
    assert drawn(table, 5) == " a    long name\n ──────────────\n bee      2\n\nafter\n"
    wide = drawn(f"| a | b |\n|---|---|\n| {'x ' * 40} | {'y ' * 40} |", 5)
    assert max(map(cell_len, wide.split("\n"))) <= 60 and (wide.count("x"), wide.count("y")) == (40, 40)


@pytest.mark.parametrize("text, columns", [
    ("The quick brown fox jumps over the lazy dog, again and again. " * 4, 32),
    ("- " + "An item that goes on for long enough to be broken in several places. " * 2, 32),
    ("日本の首都は東京です。" * 8, 31), ("exactly ten x" * 3, 20)])
def test_lines_break_where_their_script_allows(text, columns):
    """Lines break at spaces and between letters of scripts without them."""
    lines = drawn(text, 3, columns=columns).rstrip("\n").split("\n")
    assert len(lines) > 1 and all(cell_len(line) <= columns for line in lines)
    words = " ".join(line.strip() for line in lines).replace("•", "-") if " " in text else "".join(lines)
    assert words == text.strip()


def test_long_lines_of_code_stay_whole():
    """Long lines of code are not broken and none is lost in a list."""
    code = "value = " + " + ".join(f"part_{number}" for number in range(20))
    assert drawn(f"```\n{code}\n```", 7) == code + "\n"
    assert re.findall(r"part_\d+", drawn(f"- so:\n  ```\n  {code}\n  ```", 7)) == re.findall(r"part_\d+", code)


def test_what_is_redrawn_fits_on_the_screen():
    """What is drawn again fits on the screen and ends with the newest."""
    heights = []

    def each(writer):
        lines = writer.console.render_lines(writer, pad=False)
        heights.append(len(lines))
        newest = re.findall(r"item \d+", writer.text)[-1:]
        assert not newest or newest[0] in "".join(part.text for line in lines[-2:] for part in line)
    items = "".join(f"- item {number}\n" for number in range(40))
    written = drawn(items, 5, rows=12, each=each)
    assert max(heights) in (11, 12) and written == items.replace("-", " •")


def test_reasoning_is_drawn_dim_before_the_answer():
    console = Console(file=io.StringIO(), width=60, record=True, color_system="standard", force_terminal=False)
    writer = MarkdownWriter(console)
    for piece in (said(thought("Let me ")), said(thought("see.\n\nYes.")), said("It is **42**.")):
        writer.push(piece)
    writer.close()
    assert console.export_text(styles=True) == "\x1b[2mLet me see.\x1b[0m\n\n\x1b[2mYes.\x1b[0m\n\nIt is \x1b[1m42\x1b[0m.\n"


def test_a_model_cannot_send_control_sequences():
    text = "a\x1b[31mb\x07\x9b2Jc\rd\n```\n\x1b]0;title\x07\n```\n| \x1b[2J |\n|--|\n"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", drawn(text, 2))


# chats in files


def turns(pool):
    return [[(m.role, m.content) for m in request.messages] for request in pool.requests]


def test_a_saved_chat_can_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool = FakePool()
    lines = ["/system Be brief", "/set top-k 7", "One", "/retry", "/save kept.json", "/clear", "/system", "/set topk", "/load kept.json",
             "Two", "/save kept.json"]
    assert chat_with(pool, monkeypatch, lines) == 0
    system, answer = ("system", "Be brief"), ("assistant", "Hello, world!")
    assert turns(pool) == [[system, ("user", "One")]] * 2 + [[system, ("user", "One"), answer, ("user", "Two")]]
    assert [request.params.sampling.top_k for request in pool.requests] == [7, 7, 7]
    saved = json.loads((tmp_path / "kept.json").read_text())
    nodes = saved["conversations"][0]["nodes"]
    assert (saved["format"], saved["version"], saved["conversations"][0]["title"]) == ("chat_server chats", 2, "One")
    assert [node["role"] for node in nodes] == ["user", "assistant", "assistant", "user", "assistant"]
    assert nodes[1]["parent"] == nodes[2]["parent"] == nodes[0]["id"] and nodes[3]["parent"] == nodes[2]["id"]
    assert nodes[1]["timings"]["completion_tokens"] == 3 and nodes[1]["seed"] == pool.requests[0].params.sampling.seed


def test_parameters_are_set_with_or_without_set(monkeypatch, capsys):
    pool = FakePool()
    lines = ["/temperature 0.25", "/top_p 0.5", "/TopK 7", "/set parameter max_tokens 9", "/set system Be brief", "/stop END", "One",
             "/temperature", "/Seed 5", "Two", "/temperature 9", "/temprature 1"]
    assert chat_with(pool, monkeypatch, lines) == 1
    first, second = pool.requests
    sampling = first.params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, first.max_tokens, first.params.stop) == (0.25, 0.5, 7, 9, ("END",))
    assert first.messages[0].content == "Be brief"
    assert second.params.sampling.temperature != 0.25 and second.params.sampling.seed == 5 and second.params.sampling.top_k == 7
    err = capsys.readouterr().err
    assert "/set temperature: '9' is not a number from 0 to 2" in err and "there is no command /temprature; did you mean /temperature?" in err


def test_save_replaces_only_the_chat_s_own_file(tmp_path, monkeypatch, capsys):
    for name in ("notes.txt", "second.json.part"):
        (tmp_path / name).write_text("mine")
    two = {"conversations": [{"messages": [{"role": "user", "content": text}]} for text in ("First", "Second")]}
    (tmp_path / "two.json").write_text(json.dumps(two))
    lines = [f"/save {tmp_path}/notes.txt", f"/load {tmp_path}/two.json", f"/load {tmp_path}/two.json 2", f"/save {tmp_path}/two.json",
             f"/save {tmp_path}/second.json", "more", f"/save {tmp_path}/second.json"]
    pool = FakePool()
    assert chat_with(pool, monkeypatch, lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "second.json", "second.json.part", "two.json"]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "second.json.part").read_text() == "mine" and json.loads((tmp_path / "two.json").read_text()) == two
    assert [node["content"] for node in json.loads((tmp_path / "second.json").read_text())["conversations"][0]["nodes"]][:1] == ["Second"]
    err = capsys.readouterr().err
    assert err.count("exists: choose another name") == 2 and "2  Second" in err
    assert turns(pool)[0][-1] == ("user", "Second\n\nmore")        # two questions in a row are one message


@pytest.mark.parametrize("text, words", [
    ("not json", "not valid JSON"), ("[1]", "lacks a role"), ("{}", "no list"), ("[" * 9000, "not valid JSON"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "lacks a role"),
    ('{"conversations": [{"nodes": [{"id": "a", "role": "user", "content": "x"}, {"id": "a", "role": "user", "content": "y"}]}]}', "a duplicate one")])
def test_a_file_without_a_conversation_is_refused(text, words):
    """A file that is no conversation is refused with the reason."""
    with pytest.raises(ValueError, match=words):
        read_chats(text)


def test_a_hostile_file_is_made_harmless():
    nodes = [{"id": "a", "parent": "b", "role": "user", "content": "A", "created": "soon", "timings": [], "self": "\x1b[2J"},
             {"id": "b", "parent": "a", "role": "assistant", "content": "B", "parameters": {"top_k": 1e9}},
             {"id": "c", "parent": {"x": 1}, "role": "user", "content": "C", "created": 1e15}]
    chat = {"nodes": nodes, "leaf": "b", "parameters": {"temperature": "inf", "top_k": 5, "seed": True, "stop": ["", 1]}, "created": -5,
            "system": 7, "title": ["x"], "self": 1}
    found, = read_chats(json.dumps({"conversations": [chat]}))
    assert found.parameters == {"top_k": 5} and [node["content"] for node in found.path()] == ["A", "B"]
    assert (found.system, found.title, found.nodes["c"]["parent"]) == ("", "['x']", None)
    assert read_chats(json.dumps(found.exported()))[0].nodes == found.nodes


def test_message_lists_and_version_1_files_are_read():
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "# Hi\nthere"}, {"role": "assistant", "content": "Yes"}]
    for file in (messages, {"messages": messages}, {"messages": messages[1:], "settings": {"system": "Be brief", "temperature": 0.5}}):
        found, = read_chats(json.dumps(file))
        assert (found.system, found.title, [node["content"] for node in found.path()]) == ("Be brief", "Hi", ["# Hi\nthere", "Yes"])


# commands


def test_each_command_does_what_help_says(tmp_path, monkeypatch, capsys):
    """Each command does what `/help` says, and an unknown one is an error."""
    (tmp_path / "letter.txt").write_text("Dear\nmodel\n")
    pool = FakePool()
    lines = ["/help", "/hlep", "//slash", f"/read {tmp_path}/letter.txt", "/edit Dear server", "/continue", "/show", "/stats",
             "/set temperature 9", "/set colour red", "/read nowhere", "/load", "/exit", "not reached"]
    assert chat_with(pool, monkeypatch, lines) == 1
    asked = [messages[-1][1] for messages in turns(pool)]
    assert asked == ["/slash", "Dear\nmodel\n", "Dear server", "Hello, world!"]
    assert [content for _, content in turns(pool)[2]] == ["/slash", "Hello, world!", "Dear server"]
    out, err = capsys.readouterr()
    assert out == "Hello, world!\n" * 4
    for words in ("/save FILE", "there is no command /hlep; did you mean /help?", "temperature  0.6", "answers 4, tokens 12",
                  "/set temperature: '9' is not a number from 0 to 2", "one of temperature", "No such file", "the file name is missing"):
        assert words in err
    listed = err.partition("/help  ")[2].partition("\nerror")[0].splitlines()
    assert len(listed) > 15 and max(map(len, listed)) < 80


@pytest.mark.parametrize("typed, sent", [
    ("letter.txt", "Dear\nmodel\n"), ("letter.txt  Who wrote it?", "Dear\nmodel\n\nWho wrote it?"), ("my letter.txt", "Dear\nyou"),
    ("my letter.txt Why?", "Dear\nyou\n\nWhy?"), ("letter.txt letter.txt", "Dear\nmodel\n\nletter.txt")])
def test_a_question_may_follow_a_read_file_s_name(tmp_path, monkeypatch, typed, sent):
    """A question may follow the name of the file that `/read` sends."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_text("Dear\nmodel\n")
    (tmp_path / "my letter.txt").write_text("Dear\nyou")
    pool = FakePool()
    assert chat_with(pool, monkeypatch, [f"/read {typed}"]) == 0 and turns(pool) == [[("user", sent)]]


def test_the_last_chat_can_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="--continue: there is no chat to continue"):
        chat_with(FakePool(), monkeypatch, ["One"], continue_=True)
    assert chat_with(FakePool(), monkeypatch, ["One"]) == 0 and not (tmp_path / "chat_server/last-chat.json").read_text()      # a pipe's are not kept
    pool, kept = FakePool(), Conversation("Be brief", {"top_k": 7})
    kept.add({"role": "user", "content": "One", "parent": None})
    (tmp_path / "chat_server/last-chat.json").write_text(json.dumps(kept.exported()))
    assert chat_with(pool, monkeypatch, ["/retry", "Two"], continue_=True) == 0
    assert chat_with(pool, monkeypatch, ["Three"], continue_=True, system="") == 0
    answer = ("assistant", "Hello, world!")
    assert turns(pool)[1] == [("system", "Be brief"), ("user", "One"), answer, ("user", "Two")] and pool.requests[1].params.sampling.top_k == 7
    assert turns(pool)[2] == [*turns(pool)[1][1:], answer, ("user", "Three")]
    assert "> One\nHello, world!\n\n> Two\n" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave out --prompt"):
        chat_with(pool, monkeypatch, [], continue_=True, prompt="Four")
    (tmp_path / "chat_server/last-chat.json").write_text("{")
    with pytest.raises(ConfigError, match="--continue: cannot read .*last-chat.json: it is not valid JSON"):
        chat_with(pool, monkeypatch, [], continue_=True)


def test_retry_draws_again_with_another_seed(monkeypatch):
    """`/retry` answers again with another seed and sends nothing twice."""
    pool = FakePool()
    chat_with(pool, monkeypatch, ["/retry", "One", "/retry"])
    assert turns(pool) == [[("user", "One")]] * 2 and len({request.params.sampling.seed for request in pool.requests}) == 2


@pytest.mark.parametrize("able", [True, False])
def test_continue_extends_the_same_answer(tmp_path, monkeypatch, capsys, able):
    """`/continue` goes on in the same answer where the server can."""
    pool = FakePool(["Hello, ", "wor"], reason="length")
    pool.continues = able
    lines = ["/continue", "/set temperature 0.5", "One", "/continue", f"/save {tmp_path}/kept.json", "Two"]
    assert chat_with(pool, monkeypatch, lines) == 1
    assert "there is no answer to continue" in capsys.readouterr().err
    first, second = pool.requests[:2]
    nodes = json.loads((tmp_path / "kept.json").read_text())["conversations"][0]["nodes"]
    if able:
        assert dict(second.template_options) == {"continue_final_message": True, "add_generation_prompt": False}
        assert (second.params.sampling, turns(pool)[1]) == (first.params.sampling, [("user", "One"), ("assistant", "Hello, wor")])
        assert [node["content"] for node in nodes] == ["One", "Hello, worHello, wor"] and nodes[1]["timings"]["finish_reason"] == "length"
        assert nodes[1]["parent"] == nodes[0]["id"] and not pool.requests[2].template_options
    else:
        assert turns(pool)[1][-1] == ("user", "Please continue.") and not second.template_options and len(nodes) == 4


@pytest.mark.parametrize("model, able", [
    ({"capabilities": {"continue_final_message": True}}, True), ({"owned_by": "vllm"}, True), ({"owned_by": "llamacpp"}, True),
    ({"capabilities": {"continue_final_message": "no"}}, False), ({"capabilities": [], "owned_by": "someone"}, False), ({}, False)])
def test_which_servers_can_continue_an_answer(model, able):
    pool = RemotePool(Settings(command="chat", url="http://127.0.0.1:1"))
    pool.model = model
    assert pool.continues is able
    pool.native = True
    assert not pool.continues


def test_a_growing_block_is_drawn_from_its_start():
    console = Console(file=io.StringIO(), width=60, height=20, record=True, force_terminal=False)
    writer = MarkdownWriter(console, "First.\n\n```python\nx = 1\ny =")
    writer.push(said(" 2 * 3 * 4\n```\n*Done*"))
    writer.close()
    assert re.sub(r" +$", "", console.export_text(), flags=re.MULTILINE) == "x = 1\ny = 2 * 3 * 4\n\nDone\n"


def test_a_block_is_one_message_also_in_a_pipe(monkeypatch):
    pool = FakePool()
    chat_with(pool, monkeypatch, ['"""', "/one", "two", '"""', '"""three"""', '"""open', "at the end"])
    assert [messages[-1][1] for messages in turns(pool)] == ["/one\ntwo", "three", "open\nat the end"]


def test_a_repeating_answer_says_so_and_can_go_on(monkeypatch, capsys):
    pool = FakePool(reason="stop", stop_reason="repetition")
    chat_with(pool, monkeypatch, ["One"])
    assert "ended because it repeats itself; /continue continues it" in capsys.readouterr().err
    assert pool.requests[0].params.stop_on_repetition


def test_json_prints_an_object_a_line(monkeypatch, capsys):
    """JSON is one object a line and errors are too."""
    pool = FakePool(reason="length", stop_reason="max_tokens")
    assert chat_with(pool, monkeypatch, ["One", "/nothing"], json=True) == 1
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert (first["text"], first["finish_reason"], first["usage"]["completion_tokens"]) == ("Hello, world!", "length", 3)
    assert first["timings"]["ttft_ms"] == 8.1 and first["seed"] == pool.requests[0].params.sampling.seed
    assert "/nothing" in second["error"]["message"] and "cut at the length limit" in err


def test_generate_answers_as_json(monkeypatch, capsys):
    patch(monkeypatch, pool_module, "make_pool", lambda settings: FakePool())
    assert chat_server.main(["generate", "--prompt", "Hi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Hello, world!"


def test_reasoning_is_separate_and_not_sent_back(monkeypatch, capsys):
    pool = FakePool([said(thought("Let me think. "), tokens=(1,)), "It is 42."])
    chat_with(pool, monkeypatch, ["One", "Two"], json=True)
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (out[0]["reasoning"], out[0]["text"]) == ("Let me think. ", "It is 42.")
    assert turns(pool)[1] == [("user", "One"), ("assistant", "It is 42."), ("user", "Two")]


@pytest.mark.parametrize("speed, shown", [(None, "3 tokens in 2.0 s, first token after 8 ms"), (7.25, "7.2 tok/s"), (37.4, ", 37 tok/s,")])
def test_the_line_below_an_answer_has_its_figures(speed, shown):
    assert shown in summary(replace(finished("abc"), tokens_per_second=speed), 2.0)


# a server that breaks


def test_a_stream_that_breaks_is_resumed(capsys):
    front = HeldFront()
    try:
        async def run():
            settings = Settings(command="generate", prompt="Hi", url=front.url)
            task = asyncio.ensure_future(generate(settings))
            await asyncio.to_thread(front.until_open, 1)
            await asyncio.to_thread(front.admit, 2)
            while "two" not in (shown := "".join(seen) + capsys.readouterr().out):
                seen[:] = [shown]
                await asyncio.sleep(0)
            seen[:] = [shown]
            await asyncio.to_thread(front.drop)
            await asyncio.to_thread(front.admit, 3)
            return await task
        seen = []
        assert asyncio.run(run()) == 0
        assert "".join(seen) + capsys.readouterr().out == "one two three four five\n"
        assert len(front.pool.requests) == 1
    finally:
        front.close()


# through a pty


def asked(front):
    return [request.messages[-1].content for request in front.pool.requests]


@pytest.fixture
def front():
    front = HeldFront()
    front.admit(1000)
    yield front
    front.close()


def test_messages_reach_the_server_as_typed(front, tmp_path):
    """Messages, blocks and pastes reach the server as they were typed."""
    with chatting(front.url, tmp_path=tmp_path) as pty:
        for keys in ("Hello\r", "two\x1b\rlines\r", '"""\rfirst\rsecond"""\r', "\x1b[200~pasted\nlines\n\x1b[201~ and more\r"):
            pty.type(keys)
            pty.expect("tok/s|first token after")
            pty.expect("> ")
        pty.type("quit\r")
        assert pty.leave() == 0
    assert asked(front) == ["Hello", "two\nlines", "first\nsecond", "pasted\nlines\n and more"]


def test_help_wraps_at_words_beside_the_names(front, tmp_path):
    with chatting(front.url, tmp_path=tmp_path, columns=50) as pty:
        pty.type("/help\r")
        rows = pty.expect("Ctrl-D +leave").split("/help\n")[-1].splitlines()
    assert max(map(len, rows)) <= 50 and len(rows) > 20
    shown = " ".join(row.strip() for row in rows)
    for row in rows:
        assert row[:19].strip() and row[19] == " " or row[:20] == " " * 20, row
    for name in ("/save", "/read", "/set"):
        help = terminal_chat.COMMANDS[name[1:]].__doc__.split(": ", 1)[1]
        assert help in shown and name in shown          # no word is cut


def test_ctrl_c_stops_then_clears_then_leaves(tmp_path):
    """Ctrl-C stops the answer, then clears the line, then leaves."""
    front = HeldFront()
    try:
        with chatting(front.url, tmp_path=tmp_path) as pty:
            pty.type("Hello\r")
            front.until_open(1)
            front.admit(2)
            pty.expect("one two")
            pty.type("\x03")
            assert "three" not in pty.expect(r"\[stopped\]")
            front.until_open(0)             # the server has stopped too, although the stream could be resumed
            pty.expect("> ")
            pty.type("typed")
            pty.expect("typed")
            pty.type("\x03")
            front.admit(1000)
            pty.type("Again\r")
            pty.expect("five")
            pty.expect("> ")
            pty.type("\x03")
            pty.expect("Press Ctrl-C again.*> ")
            pty.type("\x03")
            assert pty.leave() == 0
        assert asked(front) == ["Hello", "Again"]
        assert [m.content for m in front.pool.requests[1].messages] == ["Hello", "one two ", "Again"]
    finally:
        front.close()


def test_tab_ends_the_thinking_alone(tmp_path):
    front = HeldFront()
    front.pool.tokenizer = Letters()
    front.pool.tokenizer.thoughts = ("<think>", "</think>")
    front.pool.pieces = ["<think>Let me ", "see.", "</think>It is", " 42."]
    try:
        with chatting(front.url, tmp_path=tmp_path) as pty:
            start = len(pty.raw)
            pty.type("Hello\r")
            front.until_open(1)
            front.admit(1)
            pty.expect("Let me.*Tab: answer now")
            pty.type("Next\t")                  # what is typed before stays
            while not front.pool.hurried:
                time.sleep(0.01)
            front.admit(3)
            pty.expect("It is 42.*> .*Next")
            shown = pty.raw[start:]
            assert [line for line in screen(shown[shown.index("Hello"):], 40) if "Tab" in line] == []
            pty.type("\x03/quit\r")
            assert pty.leave() == 0
        assert front.pool.hurried == [front.pool.requests[0].id]
    finally:
        front.close()


def test_history_is_private_and_can_be_off(front, tmp_path):
    """The history is kept for its owner alone and can be switched off."""
    with chatting(front.url, tmp_path=tmp_path) as pty:
        pty.type("Remember me\r")
        pty.expect("five")
        pty.expect("> ")
        pty.type("\x04")
        assert pty.leave() == 0
    path, last = tmp_path / "chat_server" / "history", tmp_path / "chat_server" / "last-chat.json"
    assert "Remember me" in path.read_text() and path.stat().st_mode & 0o777 == last.stat().st_mode & 0o777 == 0o600
    with chatting(front.url, "--continue", tmp_path=tmp_path) as pty:
        assert "one two three four five" in pty.text
        pty.type("\x1b[A")
        pty.expect("Remember me")
        pty.type("\r")
        pty.expect("five")
        pty.expect("> ")
        pty.type(f"/read {path}\r")
        pty.expect("Your question about .*> ")
        pty.type("Who?\r")
        pty.expect("five")
        pty.expect("> ")
    assert len(front.pool.requests[2].messages) == 5 and "Remember me" in asked(front)[2] and asked(front)[2].endswith("\n\nWho?")
    before = path.read_text(), last.read_text()
    with chatting(front.url, "--no-history", tmp_path=tmp_path) as pty:
        pty.type("Forget me\r")
        pty.expect("five")
        pty.expect("> ")
        pty.type("\x04")
        assert pty.leave() == 0
    assert (path.read_text(), last.read_text()) == before and [text for text in asked(front) if "Who?" not in text] == [
        "Remember me", "Remember me", "Forget me"]


def test_tab_completes_commands(front, tmp_path):
    """Commands are completed, and `/edit` begins with the old text."""
    with chatting(front.url, tmp_path=tmp_path) as pty:
        pty.type("Hello\r")
        pty.expect("five")
        pty.expect("> ")
        pty.type("/ed\t\r")
        pty.expect("> .*Hello")
        pty.type(" there\r")
        pty.expect("five")
        pty.expect("> ")
        pty.type("/st\t\r")
        pty.expect("answers 2, tokens 10")
    assert asked(front) == ["Hello", "Hello there"] and len(front.pool.requests[1].messages) == 1


def test_a_loaded_chat_has_no_control_sequences(front, tmp_path):
    messages = [{"role": "user", "content": "a\x1b]0;evil\x07b"}, {"role": "assistant", "content": "c\x1b[2Jd"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    with chatting(front.url, tmp_path=tmp_path) as pty:
        start = len(pty.raw)
        pty.type(f"/load {tmp_path}/chat.json\r")
        pty.expect("Loaded")
        assert r"a\x1b]0;evil\x07b" in pty.raw[start:] and r"c\x1b[2Jd" in pty.raw[start:]
        assert "\x1b]0;evil" not in pty.raw[start:] and "\x1b[2J" not in pty.raw[start:]


def screen(raw, rows):
    """The lines that a terminal shows and has scrolled, of what was sent to it; its cursor may never leave the screen's top."""
    lines, row, lowest = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z]|\r|\n)|([^\x1b\r\n]+)", raw):
        if code.endswith("A") and code.startswith("\x1b"):
            row -= int(code[2:-1] or 1)
            assert row > lowest - rows
        elif code == "\n":
            row, lowest = row + 1, max(row + 1, lowest)
            lines += [""] * (len(lines) == row)
        elif code == "\x1b[2K":
            lines[row] = ""
        lines[row] += text
    return lines


def test_waiting_is_shown_before_the_answer(tmp_path):
    """The queue and the reading of the prompt are shown where the answer will begin."""
    told = PromptProgress(3, 200), PromptProgress(0, 200, 84)
    with fake_front([*told, "Hello."]) as url, chatting(url, tmp_path=tmp_path) as pty:
        start = len(pty.raw)
        pty.type("Go\r")
        pty.expect("first token after")
    shown = pty.raw[start:]
    assert shown.index("...") < shown.index("number 3 in the queue") < shown.index("reading the prompt, 42%") < shown.index("Hello.")
    assert [line for line in screen(shown[shown.index("Go"):], 40) if "prompt" in line] == []


@pytest.mark.parametrize("no_color", [None, "1"])
def test_an_answer_stays_on_the_screen_once(tmp_path, no_color):
    """An answer stays on the screen once and its words are not broken."""
    words = " ".join(f"word{number}" for number in range(60))
    with fake_front(["# Title\n\n", "Some **bo", "ld** text: ", words, "\n\n```py\nx = 1\n```\n"]) as url:
        with chatting(url, tmp_path=tmp_path, columns=50, rows=12, **({"NO_COLOR": no_color} if no_color else {})) as pty:
            start = len(pty.raw)
            pty.type("Go\r")
            pty.expect("first token after")
            answer = pty.raw[start:]
            assert "\x1b[1mbold" in answer and ("\x1b[36m" in answer) != bool(no_color)
            lines = screen(answer[answer.index("Go"):], 12)
            shown = "\n".join(lines)
            assert re.findall(r"word\d+", shown) == words.split() and shown.count("x = 1") == shown.count("Title") == 1
            assert max(len(line) for line in lines if "word" in line) <= 50


def test_a_pipe_gets_nothing_but_the_answers(front, tmp_path):
    run = run_forked("chat", "--url", front.url, given="Hello\n/help\nAgain\n", FORCE_COLOR="1")
    assert (run.returncode, run.stdout) == (0, "one two three four five\n" * 2)
    assert "\x1b" not in run.stderr and "/save FILE" in run.stderr and run.stderr.count("5 tokens in") == 2


def test_file_sends_a_document_s_text(tmp_path, monkeypatch, capsys):
    """`/file` sends the text of a document and says first what it lacks."""
    pytest.importorskip("pypdfium2")
    import documents
    (tmp_path / "my report.pdf").write_bytes(documents.pdf(["One", "", "Three"]))
    (tmp_path / "secret.pdf").write_bytes(documents.ENCRYPTED_PDF)
    monkeypatch.chdir(tmp_path)
    pool = FakePool()
    assert chat_with(pool, monkeypatch, ["/file my report.pdf What is it?", "/file secret.pdf", "/read none.docx"]) == 1
    assert turns(pool) == [[("user", "[page 1]\nOne\n\n[page 3]\nThree\n\nWhat is it?")]]
    err = capsys.readouterr().err
    assert "my report.pdf: 3 pages, 28 characters; incomplete: no text on page 2, which may be pictures" in err
    assert "error: the PDF is encrypted: save it without its password" in err and "none.docx" in err


def test_image_sends_a_picture_that_stays(tmp_path, monkeypatch, capsys):
    """`/image` sends a picture, which stays with the chat and moves to the page."""
    image = pytest.importorskip("PIL.Image")
    from chatlm.front.admission.admission import Admission, SharedAdmission
    image.new("RGB", (4, 3), "red").save(tmp_path / "a red.png")
    (tmp_path / "letter.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    pool = FakePool()
    pool.sees = True

    async def decode_picture(data, client):         # in a sandbox, as a pool does
        admission = Admission(lambda request_id, client: None, SharedAdmission())
        try:
            return await admission.decode_picture(data, client)
        finally:
            await admission.shared.close()
    pool.decode_picture = decode_picture
    assert chat_with(pool, monkeypatch, ["/image a red.png What is it?", "/save it.json", "/image letter.png", "/image", "/edit Which colour?", "/load it.json", "And now?"]) == 1
    first, edited, later = ([(m.role, m.parts or m.content) for m in request.messages] for request in pool.requests)
    assert first == [("user", (0, "What is it?"))] and edited == [("user", (0, "Which colour?"))]
    assert later[0] == first[0] and later[-1] == ("user", "And now?")
    (picture,) = pool.requests[-1].messages[0].pictures
    assert (picture.width, picture.height, picture.pixels[:3]) == (4, 3, b"\xff\0\0") and pool.requests[0].messages[0].more is None
    (node, *_) = json.loads((tmp_path / "it.json").read_text())["conversations"][0]["nodes"]
    assert node["pictures"][0]["name"] == "a red.png" and node["pictures"][0]["picture"].startswith("data:image/png;base64,iVBOR")
    err = capsys.readouterr().err
    assert "does not represent a valid image: it is of another format, allowed are PNG, JPEG, WebP, GIF" in err and "the file name is missing" in err


def test_image_says_when_the_model_cannot_see(tmp_path, monkeypatch, capsys):
    """`/image` says when the model cannot see, and a server gets parts."""
    (tmp_path / "red.gif").write_bytes(b"GIF89a...")
    monkeypatch.chdir(tmp_path)
    pool = FakePool()
    assert chat_with(pool, monkeypatch, ["/image red.gif What?"]) == 1 and not pool.requests
    assert "this model cannot see images" in capsys.readouterr().err
    chat = Conversation()
    chat.add({"role": "user", "content": "What?", "parent": None, "pictures": [{"name": "x", "picture": "data:image/gif;base64,R0lG"}, {"name": "y"}, 7]})
    body = native_body(new_request(Settings(), messages=chat.messages()))
    assert body["messages"] == [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lG"}}, {"type": "text", "text": "What?"}]}]
