"""The command line: flags, environment, `chat`, `generate` and `--url`, over pools without a model."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

import chat_server
from aiohttp import web
from chatlm import __version__
from chatlm.common import core
from chatlm.common.config import FLAGS, Settings
from chatlm.common.core import kernels_line
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError, require_library
from chatlm.common.hub.guesses import near_model
from chatlm.common.invocation import pip_command, program_command
from chatlm.common.messages.requests import Finished, Message
from chatlm.front.pool import pool as pool_module
from chatlm.front.server import connections
from chatlm.front.server.access import listen_on
from chatlm.terminal.chat import LAST_CHAT, Chat, chat, generate, new_request
from chatlm.terminal.remote import RemotePool
from chatlm.terminal.terminal import PlainWriter, state_file
from command_line import parse_command_line
from answers import said
from fake_pool import FakePool, finished, serving
from patching import patch
from run_here import run_forked


def parsed(line="", **environment):
    return parse_command_line(line.split(), environment)


# flags


@pytest.mark.parametrize("words, model, prompt", [
    (["Why is the sky blue?"], None, "Why is the sky blue?"), (["m.gguf", "Why is it?"], "m.gguf", "Why is it?"),
    (["Why\nnot?", "-t", "0", "m.gguf"], "m.gguf", "Why\nnot?"), (["m.gguf"], "m.gguf", None), (["m.gguf", "-p", "two words"], "m.gguf", "two words"),
    (["word "], "word ", None), (["m.gguf", "Hello"], "m.gguf", "Hello"), (["qwen3:0.6b", "Hello"], "qwen3:0.6b", "Hello"), (["m.gguf", "Hello."], "m.gguf", "Hello."),
    (["Hello", "-t", "0", "m.gguf"], "m.gguf", "Hello"), (["Why?"], None, "Why?"), (["m.gguf", "Why?"], "m.gguf", "Why?"), (["你好"], None, "你好"), (["Hello"], "Hello", None),
    (["tiny", "Hello", "--url", "here"], "tiny", "Hello"), (["моя", "-p", "Hello"], "моя", "Hello")])
def test_generate_takes_words_with_spaces_as_prompt(words, model, prompt):
    settings = parse_command_line(["generate", *words], {})
    assert (settings.model, settings.prompt) == (model, prompt)


def test_generate_takes_a_model_path_with_a_space(tmp_path):
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"GGUF")
    settings = parse_command_line(["generate", str(path), "Why is it?"], {"CHAT_SERVER_MODEL": "other"})
    assert (settings.model, settings.prompt) == (str(path), "Why is it?")


@pytest.mark.parametrize("words, error", [
    (["Why is it?", "-p", "What is it?"], "only one prompt is allowed; this is another: 'Why is it?'"),
    (["Why is it?", "What is it?"], "only one prompt is allowed; this is another: 'What is it?'"), (["a.gguf", "b.gguf"], "unrecognized arguments: b.gguf")])
def test_generate_takes_one_prompt_and_one_model(words, error):
    with pytest.raises(ConfigError, match=re.escape(error)):
        parse_command_line(["generate", *words], {})


def test_no_words_serve_with_the_defaults():
    assert parsed() == Settings()


@pytest.mark.parametrize("line, changed", [
    ("model.gguf --port 80", dict(model="model.gguf", port=80)), ("--port 80 model.gguf", dict(model="model.gguf", port=80)),
    ("serve -p 80 model.gguf --host ::1", dict(model="model.gguf", port=80, host="::1")),
    ("server -n auto -m 7", dict(num_gpus="auto", max_tokens=7)), ("--max-new-tokens 9", dict(max_tokens=9)),
    ("chat -p hi x.gguf", dict(command="chat", prompt="hi", model="x.gguf", temperature=None)),
    ("generate --prompt - -t 0 -k 1", dict(command="generate", prompt="-", temperature=0.0, top_k=1)),
    ("--served-model-name a --served-model-name b", dict(served_model_name=("a", "b"))),
    ("--kv-cache-memory 2G --log-conversations", dict(kv_cache_memory=2 << 30, log_conversations=True)),
    ("-i mid -g d20 -s 300 -d float32", dict(source="mid", model_tag="d20", step=300, dtype="float32"))])
def test_flags_and_model_come_in_any_order(line, changed):
    assert parsed(line) == dataclasses.replace(Settings(), **changed)


def test_a_flag_wins_over_its_variable():
    """Each flag has an environment variable, and the flag wins."""
    environment = {"CHAT_SERVER_PORT": "81", "CHAT_SERVER_LOG_CONVERSATIONS": "yes", "CHAT_SERVER_SERVED_MODEL_NAME": "a,b",
                   "CHAT_SERVER_MODEL": "m", "CHAT_SERVER_TOP_K": "", "CHAT_SERVER_DTYPE": "float32"}
    assert parsed("", **environment) == Settings(port=81, log_conversations=True, served_model_name=("a", "b"), model="m",
                                                 dtype="float32")
    line = "other --port 82 --no-log-conversations --served-model-name c -d bfloat16"
    assert parsed(line, **environment) == Settings(port=82, served_model_name=("c",), model="other", dtype="bfloat16")


def test_variables_ignore_case_and_spaces():
    """Words of the environment may be of any case and have spaces between."""
    settings = parsed("", CHAT_SERVER_DTYPE="Float32", CHAT_SERVER_LOG_FORMAT="JSON", CHAT_SERVER_DRAFTS="FALSE",
                      CHAT_SERVER_SERVED_MODEL_NAME="a, b ,c")
    assert settings == Settings(dtype="float32", log_format="json", served_model_name=("a", "b", "c"), drafts="none")


@pytest.mark.parametrize("line, environment, words", [
    ("--port x", {}, "--port"), ("--port 70000", {}, "65535"), ("chat a b", {}, "b"), ("--nonsense", {}, "--nonsense"),
    ("--por 80", {}, "--por"), ("-t nan", {}, "'nan' is not a number from 0 to 2"), ("-k -1", {}, "'-1' is not a whole number of at least 0"),
    ("-k 1" + "0" * 400, {}, "000... is not a whole number of at least 0"),
    ("-s 1.5", {}, "'1.5' is not a whole number"), ("--kv-cache-memory x", {}, "'x' is not a size such as 512M"),
    ("--idle-unload inf", {}, "not a number of at least 0"), ("--max-tokesn 3", {}, "did you mean --max-tokens?"),
    ("--model x", {}, "MODEL is given by itself"), ("--model=x", {}, "MODEL is given by itself"),
    ("--prompt hi", {}, "--prompt is a flag of chat and generate"), ("--system hi chat", {}, "the command comes first"), ("-i moon", {}, "moon"), ("chat --port 80", {}, "--port"),
    ("--kv-cache-memory much", {}, "kv-cache-memory"), ("", {"CHAT_SERVER_PORT": "x"}, "CHAT_SERVER_PORT"),
    ("--kv-cache-memory " + "9" * 400 + "T", {}, "kv-cache-memory"), ("--kv-cache-memory 8388608T", {}, "kv-cache-memory"),
    ("", {"CHAT_SERVER_LOG_CONVERSATIONS": "perhaps"}, "true, yes"), ("", {"CHAT_SERVER_SOURCE": "moon"}, "CHAT_SERVER_SOURCE: argument -i/--source: invalid choice: 'moon'")])
def test_a_wrong_value_is_a_config_error(line, environment, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        parsed(line, **environment)


@pytest.mark.parametrize("number", ["0x" + "f" * 6000, "1" + "0" * 6000, "[1, 0o" + "7" * 9000 + "]"])
def test_a_huge_number_in_a_config_is_an_error(tmp_path, number):
    """A number of thousands of digits in a config file is a config error."""
    (tmp_path / "config.toml").write_text(f"port = {number}\n")
    with pytest.raises(ConfigError, match="config.toml: (Exceeds the limit|port must be a number)"):
        parse_command_line(["serve", "--config", str(tmp_path / "config.toml")], {})


@pytest.mark.parametrize("text, words", [
    ("[serve]\nport = 1", "[serve] is a table, but flags belong outside tables: `port = 8000`"),
    ("max-tokesn = 1", "there is no flag --max-tokesn; did you mean --max-tokens?")])
def test_a_wrong_config_file_says_what_is_right(tmp_path, text, words):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_command_line(["--config", str(tmp_path / "config.toml")], {})


def test_a_config_error_is_one_line_and_status_2():
    """A config error is one line and status 2, and the version is printed."""
    run = run_forked("chat", "--top-k", "x")
    assert run.returncode == 2 and run.stdout == "" and re.fullmatch(r"chat_server: [^\n]*--top-k[^\n]*\n", run.stderr)
    run = subprocess.run([sys.executable, chat_server.__file__, "--version"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, f"chat_server {__version__}; {kernels_line()}\n")


@pytest.mark.parametrize("flag", ["--config", "--api-key-file"])
@pytest.mark.parametrize("path, words", [
    ("/none/x", "No such file"), ("~nobody-here/x", "home directory"), ("a\0b", "null"),
    ("/dev/null/x", "Not a directory")])
def test_a_file_that_cannot_be_opened_is_named(flag, path, words):
    with pytest.raises(ConfigError, match=f"{flag}:? .*{words}"):
        parse_command_line(["serve", flag, path], {})


def test_help_and_log_warn_of_a_visible_key(local_pool, capsys, caplog):
    """A key on the command line can be seen by others, which the help and the log say."""
    with pytest.raises(SystemExit):
        parsed("serve --help")
    assert "other users can see it in `ps`" in " ".join(capsys.readouterr().out.split())
    for words, said in ((["--api-key", "k"], True), (["--api-key=k"], True), (["--system", "k"], False)):
        caplog.clear()
        run_main("generate", "--prompt", "Hi", *words)
        assert ("read the key in the process list" in caplog.text) is said


def test_no_child_process_inherits_a_key(local_pool, monkeypatch):
    """No process that the server starts finds a key in its environment."""
    monkeypatch.setenv("CHAT_SERVER_API_KEY", "secret")
    run_main("generate", "--prompt", "Hi")
    assert "secret" not in os.environ.values() and "CHAT_SERVER_API_KEY" not in os.environ


def test_each_command_s_help_lists_its_flags(capsys):
    for command, flag, foreign in (("serve", "--port", "--prompt"), ("chat", "--system", "--port"), ("generate", "--url", "--host")):
        with pytest.raises(SystemExit) as left:
            parsed(f"{command} --help")
        text = capsys.readouterr().out
        assert left.value.code == 0 and flag in text and foreign not in text


def test_the_help_has_every_flag_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parsed("serve --help")
    text = capsys.readouterr().out
    title = None
    parts = {part.partition(":\n")[0]: part for part in re.split(r"\n(?=\S[^\n]*:\n)", text)}
    for flag in FLAGS:
        title = flag.heading or title
        if "serve" in flag.commands:
            assert f"--{flag.names[0]}" in parts[title], flag
    assert f"usage: {program_command()} [serve|chat|generate|compare|score|eval|embed|batch|check] [MODEL] [flags]\n" in text and text.count("MODEL may be") == 1


def test_each_command_s_help_has_right_examples(capsys, tmp_path):
    """The help of each command is its own and shows examples that are right."""
    (tmp_path / "keys.txt").write_text("key")
    openings = set()
    for command in ("serve", "chat", "generate", "compare", "score", "check"):
        with pytest.raises(SystemExit):
            parsed(f"{command} --help")
        text = capsys.readouterr().out
        openings.add(text.split("\n\n")[1])
        examples = re.findall(rf"^  {re.escape(program_command())}(.*?)(?: {{3,}}.*)?$", text.partition("Examples:")[2], re.MULTILINE)
        assert len(examples) == 3
        for example in examples:
            words = shlex.split(example.partition(" < ")[0].replace("keys.txt", str(tmp_path / "keys.txt")))
            assert parse_command_line(words, {}).command == command
        assert "(default: )" not in text and not re.search(r"-g MODEL_TAG|-p PORT|-p PROMPT", text)
    assert len(openings) == 6
    with pytest.raises(SystemExit):
        parsed("serve --help")
    text = capsys.readouterr().out
    for line in ("-g, --model-tag MODEL_TAG", "-m, --max-tokens, --max-new-tokens MAX_TOKENS", "-d, --dtype {bfloat16,float32}", "--drafts {none,lookup,mtp,model,auto}"):
        assert f"\n  {line}\n" in text or f"\n  {line} " in text, line


def test_all_missing_packages_are_named_at_once(monkeypatch):
    there = importlib.util.find_spec
    gone = {"gguf", "tokenizers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else there(name, *more))
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"packages gguf, tokenizers .*pip install gguf tokenizers$"):
        require_library("gguf", "a GGUF file")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"package prometheus_client .*pip install prometheus_client$"):
        require_library("prometheus_client", "/metrics")


def test_a_library_s_advice_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "page_of_advice.py").write_text("raise ImportError('\\nPLEASE READ THIS\\n\\nOriginal error was: libx.so: cannot open\\n')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^x needs the Python package page_of_advice \(libx.so: cannot open\); install with"):
        require_library("page_of_advice", "x")


@pytest.mark.parametrize("compilers, words", [((), "install a C++ compiler (Debian: apt install g++), then `"),
                                              (("g++",), "reference ops run; `")])
def test_a_missing_compiler_is_named(monkeypatch, local_pool, capsys, compilers, words):
    monkeypatch.delenv("CXX", raising=False)
    patch(monkeypatch, core, "decode_core", lambda: None)
    patch(monkeypatch, core, "installed_core", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    patch(monkeypatch, core, "torch_installed", lambda: True)
    assert run_main("generate", "--prompt", "Hi") == 0
    assert f"{words}{pip_command('.')}` in the checkout" in capsys.readouterr().err


# generate


@pytest.fixture
def local_pool(monkeypatch):
    """Every command starts this pool instead of one with a model."""
    pool = FakePool()
    patch(monkeypatch, pool_module, "make_pool", lambda settings: pool)
    return pool


def run_main(*argv):
    """main() without a logging set-up that would reach other tests."""
    return chat_server.main(argv)


def test_generate_sends_its_speed_to_stderr(local_pool, capsys):
    """`generate` writes the answer to stdout and its speed to stderr."""
    assert run_main("generate", "--prompt", "Hi", "--system", "Be brief", "-t", "0", "--seed", "4", "-m", "9") == 0
    out, err = capsys.readouterr()
    assert out == "Hello, world!\n" and re.search(r"^3 tokens in \d+ ms, 212 tok/s, first token after 8 ms$", err, re.M)
    request = local_pool.requests[0]
    assert [(m.role, m.content) for m in request.messages] == [("system", "Be brief"), ("user", "Hi")]
    assert (request.params.sampling.temperature, request.params.sampling.seed, request.max_tokens) == (0.0, 4, 9)
    assert local_pool.closed


@pytest.mark.parametrize("words", [["--prompt", "-"], []])
def test_generate_reads_stdin(local_pool, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert run_main("generate", *words) == 0
    assert local_pool.requests[0].messages[0].content == "two\nlines"


def test_generate_asks_for_a_missing_prompt(local_pool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert run_main("generate") == 2
    assert "prompt" in capsys.readouterr().err and local_pool.requests == []


def test_generate_continues_without_a_chat_template(local_pool):
    """A model without a chat template continues the text."""
    local_pool.chats = False
    assert run_main("generate", "--prompt", "Once") == 0
    assert (local_pool.requests[0].prompts, local_pool.requests[0].messages) == (("Once",), None)


async def test_chat_continues_without_a_chat_template(local_pool, typist, capsys):
    """`chat` with a model that has no chat template continues each text."""
    local_pool.chats, local_pool.continues = False, False
    typist.type("Once\nTwice\n/continue\n")
    typist.leave()
    assert await chat(Settings(command="chat", system="Be brief")) == 0
    assert [request.prompts for request in local_pool.requests] == [("Once",), ("Twice",), ("TwiceHello, world!",)]
    assert "it continues the text that you type" in capsys.readouterr().err


@pytest.mark.parametrize("error, status", [(ConfigError("no model"), 2), (EngineFailure("broken"), 1), (Overloaded("busy"), 1),
                                           (RequestError("too long"), 1)])
def test_failures_are_one_line_and_a_status(local_pool, capsys, error, status):
    local_pool.refuse = error
    assert run_main("generate", "--prompt", "Hi") == status
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].endswith(str(error)) and "Traceback" not in err and local_pool.closed


def test_a_chat_with_a_prompt_answers_once(local_pool, capsys):
    assert run_main("chat", "-p", "Hi") == 0
    assert capsys.readouterr().out == "Hello, world!\n"
    assert local_pool.requests[0].params.sampling.temperature == 0.6


# chat


class Typist:
    """stdin of `chat` as a pipe: the test types into it while `chat` runs as a task."""

    def __init__(self, monkeypatch):
        read, write = os.pipe()
        self.end = os.fdopen(write, "wb", buffering=0)
        monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def type(self, text):
        self.end.write(text.encode())

    def leave(self):
        self.end.close()


@pytest.fixture
def typist(monkeypatch):
    typist = Typist(monkeypatch)
    yield typist
    typist.leave()
    for thread in threading.enumerate():
        if thread.name == "stdin":              # else it might read from the next test's pipe, if that gets the same number
            thread.join()


async def test_chat_keeps_a_conversation_until_cleared(local_pool, typist, capsys):
    typist.type("One\n\n  \nTwo\n/clear\nThree\nclear\n/help\nquit\nnot reached\n")
    assert await chat(Settings(command="chat", system="Be brief")) == 0
    turns = [[(m.role, m.content) for m in request.messages] for request in local_pool.requests]
    system, answer = ("system", "Be brief"), ("assistant", "Hello, world!")
    assert turns == [[system, ("user", "One")], [system, ("user", "One"), answer, ("user", "Two")], [system, ("user", "Three")]]
    out, err = capsys.readouterr()
    assert out == "Hello, world!\n" * 3 and err.count("3 tokens in ") == 3
    assert "\x1b" not in err and "Ctrl-C" in err and local_pool.closed


@pytest.mark.parametrize("last", ["exit\n", "/quit\n", "EXIT\n", "no newline at the end"])
async def test_chat_ends_on_exit_quit_or_end_of_file(local_pool, typist, last):
    typist.type(last)
    typist.leave()
    assert await chat(Settings(command="chat")) == 0
    assert len(local_pool.requests) == (last[0] == "n")


async def test_ctrl_c_stops_only_the_answer(local_pool, typist, capsys):
    local_pool.pieces, local_pool.gate = ["Hel", "lo"], Tickets(1)
    task = asyncio.ensure_future(chat(Settings(command="chat")))
    typist.type("Hi\n")
    await local_pool.gate.used_up.wait()
    signal.raise_signal(signal.SIGINT)
    await local_pool.until_open(0)
    local_pool.gate = None
    typist.type("Go on\nquit\n")
    assert await task == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hel\n") and "[stopped]\n" in err
    assert [m.content for m in local_pool.requests[1].messages] == ["Hi", "Hel", "Go on"]


class Tickets:
    """A gate for the first `count` pieces."""

    def __init__(self, count):
        self.count, self.used_up = count, asyncio.Event()

    async def wait(self):
        self.count -= 1
        if self.count < 0:
            self.used_up.set()
            await asyncio.Event().wait()


async def test_ctrl_c_at_an_empty_prompt_leaves(local_pool, typist, capsys):
    task = asyncio.ensure_future(chat(Settings(command="chat")))
    typist.type("Hi\n")
    while "tok/s" not in capsys.readouterr().err:
        await asyncio.sleep(0)
    signal.raise_signal(signal.SIGINT)
    assert await task == 0 and local_pool.closed


async def test_a_failed_message_is_shown_and_dropped(local_pool, typist, capsys):
    local_pool.pieces = [EngineFailure("a worker died")]
    typist.type("Hi\n")
    task = asyncio.ensure_future(chat(Settings(command="chat")))
    await local_pool.until_open(1)
    await local_pool.until_open(0)
    local_pool.pieces = ["fine"]
    typist.type("Again\nquit\n")
    assert await task == 1
    assert "error: a worker died" in capsys.readouterr().err
    assert [m.content for m in local_pool.requests[1].messages] == ["Again"]


async def test_old_turns_make_room_for_an_answer(local_pool, typist, capsys):
    """An answer may take the rest of the context and old turns make room."""
    plain, local_pool.answer = local_pool.answer, lambda request: with_dropped(request, plain)
    typist.type("One\nquit\n")
    assert await chat(Settings(command="chat")) == 0
    assert (local_pool.requests[0].max_tokens, local_pool.requests[0].truncate) == (None, True)
    assert "without the 2 oldest messages, which no longer fit" in capsys.readouterr().err


async def with_dropped(request, answer):
    async for event in answer(request):
        yield dataclasses.replace(event, dropped_messages=2) if isinstance(event, Finished) else event


async def test_a_message_too_long_leaves_the_chat_alive(local_pool, typist, capsys):
    """A message that can never fit is refused, and the chat goes on."""
    local_pool.refuse = RequestError("the prompt has 99 tokens, but the context holds 64", code="context_length_exceeded")
    typist.type("long\nquit\n")
    assert await chat(Settings(command="chat")) == 1
    assert "error: the prompt has 99 tokens" in capsys.readouterr().err


async def test_a_pasted_text_is_one_message(local_pool, monkeypatch):
    create_pipe_input = pytest.importorskip("prompt_toolkit.input").create_pipe_input
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.output import DummyOutput
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("\x1b[200~first line\nsecond line\x1b[201~\r")
        keys.send_text("\x03\x03")              # Ctrl-C at an empty prompt hints, and then leaves
        assert await chat(Settings(command="chat")) == 0
    assert [m.content for m in local_pool.requests[0].messages] == ["first line\nsecond line"]


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    PlainWriter(silent=False).push(said("a\x1b[31mb\x07\n\tc\x9b"))
    assert capsys.readouterr().out == "a[31mb\n\tc"


# --url


def remote(url, command="chat"):
    return Settings(command=command, url=url)


async def test_a_remote_pool_yields_the_same_events():
    local = FakePool(["日本", "", "🎉"], reason="length", stop_reason="max_tokens")
    async with serving(local) as url:
        pool = RemotePool(remote(url + "/v1/"))
        await pool.start()
        await pool.wait_ready()
        request = new_request(remote(url), messages=(Message("user", "Hi"),))
        events = [event async for event in pool.answer(request)]
        await pool.close()
    assert request.params.sampling.seed == local.requests[0].params.sampling.seed
    assert events[1:3] == [said("日本"), said("🎉")]
    expected = finished(local.pieces, "length", "max_tokens")
    assert events[3] == dataclasses.replace(expected, queue_ms=0.2, ttft_ms=8.1, tokens_per_second=212.3)
    sent = local.requests[0]
    assert (sent.params.sampling.seed, sent.max_tokens, sent.messages) == (request.params.sampling.seed, None, request.messages)
    assert sent.truncate and sent.resumable


@pytest.mark.parametrize("error", [RequestError("the prompt has 9 tokens", code="context_length_exceeded"), RequestError("bad"),
                                   Overloaded("busy", retry_after_s=7), EngineFailure("broken")])
@pytest.mark.parametrize("late", [False, True])
async def test_a_remote_pool_raises_the_server_s_errors(error, late):
    async with serving(FakePool(["Hel", error]) if late else FakePool(refuse=error)) as url:
        pool = RemotePool(remote(url))
        await pool.start()
        with pytest.raises(ChatServerError) as caught:
            async for _ in pool.answer(new_request(remote(url), messages=(Message("user", "Hi"),))):
                pass
        await pool.close()
    assert (type(caught.value), str(caught.value), caught.value.code) == (type(error), str(error), error.code)
    assert late or getattr(caught.value, "retry_after_s", 0) == getattr(error, "retry_after_s", 0)


async def test_a_remote_pool_ends_thinking():
    """A remote pool ends thinking where the server can, and sends its budget."""
    local = FakePool(gate=asyncio.Event())
    async with serving(local) as url:
        pool = RemotePool(remote(url))
        await pool.start()
        await pool.wait_ready()
        request = new_request(Settings(command="chat", url=url, reasoning_budget=7), messages=(Message("user", "Hi"),))
        events = pool.answer(request)
        await anext(events)
        await local.until_open(1)
        assert local.requests[0].params.thinking_budget == 7
        assert not await pool.end_thinking(request.id) and not local.hurried        # an older server would end the answer
        pool.model["capabilities"]["reasoning_budget"] = True
        assert await pool.end_thinking(request.id) and local.hurried == [request.id]
        local.thinking = False
        assert not await pool.end_thinking(request.id)
        await events.aclose()
        await pool.close()


async def test_leaving_a_remote_answer_cancels_it():
    local = FakePool(gate=asyncio.Event())
    async with serving(local) as url:
        pool = RemotePool(remote(url))
        await pool.start()
        events = pool.answer(new_request(remote(url), messages=(Message("user", "Hi"),)))
        await anext(events)
        await local.until_open(1)
        await events.aclose()
        await local.until_open(0)
        await pool.close()


async def test_chat_talks_to_a_running_server(typist, capsys):
    typist.type("One\nTwo\nquit\n")
    local = FakePool()
    async with serving(local) as url:
        assert await chat(remote(url)) == 0
    assert [len(request.messages) for request in local.requests] == [1, 3]
    assert capsys.readouterr().err.count("212 tok/s") == 2


async def test_model_with_url_chooses_at_the_server(capsys):
    """`--model` beside `--url` chooses there or is refused."""
    bodies = []

    async def answer(http):
        bodies.append(await http.json())
        return web.Response(text='data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')

    async def models(http):
        return web.json_response({"object": "list", "data": [{"id": "first"}, {"id": "org/second"}]})

    async with answering([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)]) as url:
        for model, asked in ((None, "first"), ("first", "first"), ("org/second", "org/second")):
            assert await generate(Settings(command="generate", prompt="Hi", url=url, model=model)) == 0
            assert bodies[-1]["model"] == asked
        with pytest.raises(ConfigError, match="^MODEL org/secnd: the server at .* has no such model; it has first, org/second; did you mean"):
            await generate(Settings(command="generate", prompt="Hi", url=url, model="org/secnd"))
    capsys.readouterr()
    async with serving(FakePool()) as url:
        for model in ("default", FakePool.model_name):      # names that this program's own server knows
            assert await generate(Settings(command="generate", prompt="Hi", url=url, model=model)) == 0
        with pytest.raises(ConfigError, match=f"no such model; it has {FakePool.model_name}$"):
            await generate(Settings(command="generate", prompt="Hi", url=url, model="/models/other.gguf"))

    async def health(http):
        return web.json_response({"status": "ok", "ready": True})

    async with answering([web.get("/health", health)]) as url:
        with pytest.raises(ConfigError, match="has no such model; it does not list its models"):
            await generate(Settings(command="generate", prompt="Hi", url=url, model="d20"))


def test_flags_of_a_local_model_are_refused_with_url(capsys):
    for words in ("-g d20", "-s 100", "--lora folder"):
        assert run_main("generate", "--prompt", "Hi", "--url", "localhost:1", *words.split()) == 2
        assert capsys.readouterr().err == f"chat_server: {words}: only for a model that is loaded here, but --url names a server\n"


async def test_a_nanochat_only_server_is_asked_there(capsys):
    bodies = []

    async def answer(http):
        bodies.append(await http.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await response.write(b'data: {"token": "x", "gpu": 2}\n\ndata: {"token": "y", "gpu": 2}\n\ndata: {"done": true}\n\n')
        return response

    async def health(http):
        return web.json_response({"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1})

    routes = [web.get("/health", health), web.post("/chat/completions", answer)]
    async with answering(routes) as url:
        assert await generate(Settings(command="generate", prompt="Hi", url=url)) == 0
    out, err = capsys.readouterr()
    assert out == "xy\n" and "2 tokens in" in err and "max_tokens" not in bodies[0]
    assert bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]


@contextlib.asynccontextmanager
async def answering(routes):
    """Some routes on a port of 127.0.0.1; yields the base URL."""
    app = web.Application()
    app.add_routes(routes)
    with listen_on("127.0.0.1", 0) as listener:
        async with connections.serving(app, listener):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_missing_server_is_named_by_its_url(capsys):
    with listen_on("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    assert run_main("generate", "--prompt", "Hi", "--url", f"localhost:{port}") == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"chat_server: no server answers at http://localhost:{port}: Connection refused\n")


async def test_a_server_of_another_kind_is_named():
    async def no_json(http):
        return web.Response(text="welcome")
    async with answering([web.get("/health", no_json)]) as url:
        with pytest.raises(ConfigError, match="not a chat server"):
            await generate(Settings(command="generate", prompt="Hi", url=url))


@pytest.mark.parametrize("line, environment, drafts", [
    ("", {}, "auto"), ("--no-drafts", {}, "none"), ("--drafts", {}, "auto"), ("", {"CHAT_SERVER_DRAFTS": "0"}, "none"),
    ("--drafts", {"CHAT_SERVER_DRAFTS": "0"}, "auto"), ("--drafts false", {}, "none"), ("--drafts=True", {}, "auto"),
    ("--drafts lookup", {}, "lookup"), ("--drafts=MTP", {}, "mtp"), ("", {"CHAT_SERVER_DRAFTS": "Lookup"}, "lookup"),
    ("--drafts --verbose", {"CHAT_SERVER_DRAFTS": "true"}, "auto")])
def test_drafts_can_be_chosen_or_switched_off(line, environment, drafts):
    assert parsed(line, **environment).drafts == drafts


def test_a_bare_draft_flag_leaves_the_model_alone():
    """The word after a bare flag of drafts is the model."""
    settings = parsed("--drafts a.gguf")
    assert (settings.drafts, settings.model) == ("auto", "a.gguf")


@pytest.mark.parametrize("line, environment", [("--drafts=maybe", {}), ("", {"CHAT_SERVER_DRAFTS": "maybe"})])
def test_an_unknown_kind_of_drafts_names_the_known(line, environment):
    with pytest.raises(ConfigError, match="none.*lookup.*mtp.*model.*auto"):
        parsed(line, **environment)


def test_every_switch_does_what_its_name_says():
    for flag in FLAGS:
        if flag.parse is None:
            assert not flag.field.startswith("no_"), "argparse makes --no-x of a switch called x, and False of one called no-x"
            for word, value in ((f"--{flag.names[0]}", True), (f"--no-{flag.names[0]}", False)):
                assert getattr(parsed(f"{flag.commands.split()[0]} {word}"), flag.field) is value


# Words that were meant as something else


def refusal(line, **environment):
    with pytest.raises(ConfigError) as raised:
        parse_command_line(shlex.split(line), environment)
    return str(raised.value)


@pytest.mark.parametrize("line, words", [
    ("--drafts magic", "invalid choice: 'magic'"), ("generate --drafts magic", "invalid choice: 'magic'"),
    ("--drafts lokup", "did you mean lookup?"), ("--quantize q4k", "did you mean q4_k?"), ("-i sfft", "did you mean sft?")])
def test_a_wrong_choice_names_the_right_ones(line, words):
    said = refusal(line)
    assert words in said and all(kind in said for kind in ("lookup", "mtp", "model", "auto") if "drafts" in line)


def test_a_model_may_follow_the_draft_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for model in ("folder", "qwen3:0.6b", "org/name", "model.gguf", "d20@100"):
        assert parsed(f"--drafts {model}") == dataclasses.replace(Settings(), drafts="auto", model=model)


@pytest.mark.parametrize("line, words", [
    ("generate Why is it", "unrecognized arguments: is it; Why was taken as MODEL, and a prompt of several words needs quotes"),
    ("generate a.gguf Hello you", "a.gguf was taken as MODEL"), ("generate Why not", "Why was taken as MODEL"), ("generate Hello world!", "Hello was taken as MODEL"),
    ("generate a.gguf Hello -p Hi", "a.gguf was taken as MODEL")])
def test_generate_says_which_word_was_the_model(line, words):
    assert words in refusal(line)


@pytest.mark.parametrize("command, asked, words", [
    ("generate", "", "Hello was taken as MODEL (a prompt of one word needs -p: `"), ("generate", "some text", "no model at 'Hello', and a prompt needs -p: `"),
    ("chat", "", "no model at 'Hello', and a prompt needs -p: `")])
def test_a_lone_word_may_have_been_the_prompt(command, asked, words):
    done = run_forked(command, "Hello", given=asked)
    assert done.returncode == 2 and words in done.stderr and f"chat_server.py {command} -p Hello`" in done.stderr


def test_embed_says_that_one_word_is_the_file(tmp_path):
    for model in (tmp_path / "model.gguf", tmp_path):
        done = run_forked("embed", model, "-o", tmp_path / "x")
        assert done.returncode == 2 and f"embed takes a FILE of JSON lines and -o FILE" in done.stderr
        assert f"; {model} was taken as FILE" in done.stderr


@pytest.mark.parametrize("model, guess", [
    ("qwen3:0.6", "qwen3-0.6b"), ("smolm2", "smollm2"), ("Qwen/Qwen3-0.6", "Qwen/Qwen3-0.6B"), ("meta-lama/llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    ("genrate", "the command generate"), ("{}/modle.gguf", "{}/model.gguf"), ("{}/foldr", "{}/folder")])
def test_a_mistyped_model_gets_a_guess(model, guess, tmp_path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").touch()
    guessed = near_model(model.format(tmp_path), ["serve", "generate"])
    assert guessed == f"; did you mean {guess.format(tmp_path)}?"


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "xyzzy", "/nowhere/x.gguf"])
def test_a_right_or_odd_word_gets_no_guess(model):
    """What is right or like nothing that is known gets no guess."""
    assert near_model(model, ["serve", "generate"]) == ""


def test_the_program_s_error_shows_the_guess(tmp_path):
    (tmp_path / "model.gguf").touch()
    for model, words in ((tmp_path / "modle.gguf", f"did you mean {tmp_path}/model.gguf?"), ("smolm2", "did you mean smollm2? --help says"),
                         ("Qwen/Qwen3-0.6", "did you mean Qwen/Qwen3-0.6B?")):
        done = run_forked(model, "--port=0", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("command", ["embed", "batch"])
def test_a_command_s_help_is_about_it_alone(command, capsys):
    with pytest.raises(SystemExit):
        parsed(f"{command} --help")
    text = " ".join(capsys.readouterr().out.split())
    assert {"embed": "Texts and vectors:", "batch": "Requests and answers:"}[command] in text
    assert "Answers, unless a request says otherwise" not in text and "batch: " not in text
    assert ("file for the vectors" in text) == (command == "embed")


async def test_nothing_of_a_temporary_chat_is_kept(local_pool, typist, capsys, tmp_path, monkeypatch):
    """Neither for --continue nor by the server, until /clear or /load ends it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    last = state_file(LAST_CHAT)
    last.write_text("")
    typist.type(f"/temporary\nMarzipan\n/save {tmp_path / 'own.json'}\n/clear\nTwo\n/temporary\nLanterns\n/load {tmp_path / 'own.json'}\nThree\n")
    typist.leave()
    talk = Chat(local_pool, Settings(command="chat"))
    talk.kept = True
    assert await talk.run() == 0
    assert [request.params.temporary for request in local_pool.requests] == [True, False, True, False]
    assert [len(request.messages) for request in local_pool.requests] == [1, 1, 1, 3]
    assert "Lanterns" not in last.read_text() and "Three" in last.read_text()
    assert "unless you /save it" in capsys.readouterr().err
