"""What the operator names: values of a --config file have the types of their keys, and a name that is no file, or never ends, is refused
with one line that says so, whichever flag has it."""

import json
import os
import subprocess
import sys
import threading

import pytest

import chat_server
from chatlm.common import files
from chatlm.common.config import FLAGS, Settings
from chatlm.common.errors import ConfigError
from chatlm.common.files import read_operators
from command_line import parse_command_line

TYPED = [   # a line of a --config file, and what its refusal says
    ("[[models]]\npath = 'a'\naliases = [1, 2]", "[[models]] 1: aliases must be text in quotes, or a list of these"),
    ("[[models]]\npath = 'a'\naliases = 3", "aliases must be text"), ("[[models]]\npath = 'a'\naliases = ['']", "aliases must not be empty"),
    ("[[models]]\npath = 'a'\naliases = [['b']]", "aliases must be text"), ("[[models]]\npath = 'a'\naliases = {b = 'c'}", "aliases must be text"),
    ("[[models]]\npath = 5", "path must be text"), ("[[models]]\npath = ['a']", "path must be text"), ("[[models]]\npath = ' '", "path must not be empty"),
    ("[[models]]\npath = 'a'\nname = true", "name must be text"), ("[[models]]\npath = 'a'\npin = 1", "pin must be true or false"),
    ("[[models]]\npath = 'a'\nreplicas = true", "replicas must be a whole number"), ("[[models]]\npath = 'a'\nreplicas = [2]", "replicas must be a whole number"),
    ("[[models]]\npath = 'a'\nreplicas = 0", "replicas must be a whole number"), ("[[models]]\npath = 'a'\nreplicas = 257", "from 1 to 256"), ("[[models]]\npath = 'a'\nlora = [1]", "lora must be text"),
    ("[[models]]\npath = 'a'\nadapter = {one = 1}", "adapter.one must be text"), ("[[models]]\npath = 'a'\nmax-batch = true", "max-batch must be a number or text"),
    ("[[models]]\npath = 'a'\nquantize = 8", "quantize must be text"), ("[[models]]\npath = 'a'\ndrafts = 'maybe'", "drafts"),
    ("served-model-name = [1]", "served-model-name must be text in quotes, or a list"), ("served-model-name = 1.5", "served-model-name must be text"),
    ("api-key = 12345678", "api-key must be text"), ("host = 127", "host must be text"), ("model-tag = 20", "model-tag must be text"),
    ("models = ['a']", "models must be text"), ("models = 3", "models must be text"), ("model = [3]", "model must be text"), ("prefix-store = 5", "prefix-store must be text"),
    ("max-batch = [8]", "max-batch must be a number or text"), ("port = true", "port must be a number"), ("port = 1979-05-27", "port must be a number"),
    ("share-prefixes = 'x'", "share_prefixes"), ("share-prefixes = [true]", "share-prefixes must be true or false"), ("adapter = {one = ['a']}", "adapter.one must be text"),
    ("cors-origin = [['*']]", "cors-origin must be text"), ("temperature = [0.5]", "temperature must be a number")]


@pytest.mark.parametrize("line, words", TYPED)
def test_a_value_of_a_wrong_type_is_named(tmp_path, line, words):
    """A value of another type than its key's is refused and named."""
    (tmp_path / "c.toml").write_text(line)
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["--config", str(tmp_path / "c.toml")], {})
    assert words in str(caught.value) and "12345678" not in str(caught.value)


def test_values_of_the_right_types_are_taken(tmp_path):
    (tmp_path / "c.toml").write_text(
        "port = 8001\nkv-cache-memory = '64M'\nmax_batch = '8'\ndrafts = false\nshare-prefixes = 'yes'\ntemperature = 1\nnum-gpus = 2\nserved-model-name = 'a'\n"
        "adapter = {one = 'b'}\n[[models]]\npath = 'x'\naliases = 'y'\nreplicas = 2\nstep = 3\nlora = ['c', 'd']\ntemperature = 0.5\n"
        "[[models]]\npath = 'z'\naliases = ['v', 'w']\nmax-batch = 4\ndrafts = true\n")
    settings = parse_command_line(["--config", str(tmp_path / "c.toml")], {})
    assert (settings.port, settings.kv_cache_memory, settings.max_batch, settings.drafts, settings.share_prefixes) == (8001, 64 << 20, 8, "none", True)
    assert (settings.temperature, settings.num_gpus, settings.served_model_name, settings.adapter) == (1.0, "2", ("a",), ("one=b",))
    first, second = settings.several
    assert (first.aliases, first.replicas, first.changes) == (("y",), 2, {"step": 3, "lora": ("c", "d"), "temperature": 0.5})
    assert (second.aliases, second.changes) == (("v", "w"), {"max_batch": 4, "drafts": "auto"})


# Which flags name files or folders: every flag that takes a text is in one of these, so a new one has to be placed
PATHS = {
    "config": ["serve", "--config=*"], "api_key_file": ["serve", "--api-key-file=*"], "text": ["score", "--text=*"],
    "watch_text": ["serve", "--watch=/nowhere", "--watch-text=*"], "models": ["serve", "--models=*"], "watch": ["serve", "--watch=*"],
    "draft_text": ["serve", "gpt2", "--draft-text=*"], "draft_model": ["serve", "gpt2", "--draft-model=*"], "lora": ["generate", "gpt2", "--lora=*", "-p", "x"], "adapter": ["serve", "gpt2", "--adapter=a=*"], "prefix_store": ["serve", "gpt2", "--prefix-store=*"],
    "ray_tls": ["serve", "gpt2", "--ray-address=127.0.0.1:1", "--ray-tls=*"], "model_tag": ["generate", "--source=base", "--model-tag=*", "-p", "x"],
    "suite": ["eval", "gpt2", "--suite=*"], "results": ["eval", "gpt2", "--suite=/nowhere", "--results=*"], "database": ["serve", "gpt2", "--database=*"],
    "run_log": ["serve", "--watch=/nowhere", "--run-log=*"], "embedder": ["serve", "gpt2", "--embedder=*"], "knowledge": ["serve", "gpt2", "--database=k.db", "--knowledge=a=*"],
    "watch_suite": ["serve", "--watch=/nowhere", "--watch-suite=*"], "watch_prompts": ["serve", "--watch=/nowhere", "--watch-prompts=*"],
    "mmproj": ["serve", "gpt2", "--mmproj=*"], "against": ["check", "gpt2", "--against=*"], "texts": ["embed", "gpt2", "*"], "output": ["embed", "gpt2", "/nowhere", "--output=*"],
    "mcp_config": ["serve", "gpt2", "--mcp-config=*"], "export_folder": ["serve", "gpt2", "--export-folder=*"], "imatrix": ["quantize", "gpt2", "-o", "made.gguf", "--imatrix=*"],
    "MODEL": ["generate", "*", "-p", "x"], "MODELs": ["score", "*", "*", "--text=/nowhere"], "bundle": ["bundle", "*"], "store": ["store", "*"]}
OTHERS = {"type", "prompt_name", "served_model_name", "ray_address", "reasoning_budget_message", "system", "prompt", "tools", "url", "host", "prefix", "api_key", "allowed_host", "cors_origin"}


def test_each_text_flag_is_known_as_path_or_not():
    """Every flag that takes a text is known to name a path or not."""
    texts = {flag.field for flag in FLAGS if flag.is_text and not flag.choices}
    assert texts == OTHERS | {name for name in PATHS if name.islower() and name not in ("bundle", "store")}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("path", ["x" * 100_000, "x/" * 20_000, "~nobody" + "y" * 3000])
def test_an_endless_name_is_one_short_line(name, path, capsys):
    """A name without end is refused with one short line, whichever flag has it."""
    words = [word.replace("*", path) for word in PATHS[name]]
    assert chat_server.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 1000 and ("home directory" in err if path[0] == "~" else "is too long" in err), err


def test_an_impossible_name_in_a_config_is_refused(tmp_path):
    """A long or impossible name in a config file is refused too."""
    for line in (f"models = '{'x' * 5000}'", f"model = '{'x' * 5000}'", f"[[models]]\npath = '{'x' * 5000}'", f"[[models]]\npath = 'a'\nlora = '{'x' * 5000}'",
                 'watch = "a\\u0000b"', 'model = "a\\u0000b"', f"adapter = {{one = '{'x' * 5000}'}}"):
        (tmp_path / "c.toml").write_text(line)
        with pytest.raises(ConfigError, match="is not a file name"):
            parse_command_line(["--config", str(tmp_path / "c.toml")], {})
    for variable in ("CONFIG", "MODEL", "MODELS", "API_KEY_FILE", "WATCH_TEXT"):
        with pytest.raises(ConfigError, match="is not a file name|File name too long"):
            parse_command_line(["serve"], {f"CHAT_SERVER_{variable}": "x" * 5000})


# Runs commands, lines of JSON, each in a process of its own in a folder; says how they end. What they say is in the folder.
RUN_EACH = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
from chatlm.common import files
import chat_server
files.WRITER_S = 0.2
for line in sys.stdin:
    words, folder = json.loads(line)
    if (pid := os.fork()) == 0:
        os.chdir(folder)
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.exit(chat_server.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runner():
    """A process that has imported the program."""
    with subprocess.Popen([sys.executable, "-c", RUN_EACH, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["config", "api_key_file", "text", "watch_text", "models", "watch", "lora", "adapter", "prefix_store", "MODEL", "bundle", "store"])
def test_a_pipe_without_a_writer_ends_the_start(name, tmp_path, nanochat_fixtures, runner):
    """A process each: they must end by themselves."""
    os.mkfifo(tmp_path / "fifo")
    words = [word.replace("*", str(tmp_path / "fifo")).replace("gpt2", str(nanochat_fixtures / "gen5")) for word in PATHS[name]]
    words = [word.replace("/nowhere", str(tmp_path)) for word in words] + ["--port=0"] * (words[0] == "serve")
    (folder := tmp_path / "here").mkdir()
    print(json.dumps([words, str(folder)]), file=runner.stdin, flush=True)
    status, said = int(runner.stdout.readline()), (folder / "stderr").read_text()
    assert status == 2 and "fifo" in said.splitlines()[-1] and "Traceback" not in said, said


def test_a_pipe_with_a_slow_writer_is_read_whole(tmp_path, monkeypatch):
    """A pipe with a writer is read whole however late it writes."""
    monkeypatch.setattr(files, "WRITER_S", 30)
    os.mkfifo(tmp_path / "fifo")
    text, half, opened = "port = 8002\n" + "# x\n" * 100_000, threading.Event(), threading.Event()

    def write():
        with open(tmp_path / "fifo", "w") as file:
            opened.set()
            half.wait(20)
            file.write(text)

    writer = threading.Thread(target=write)
    writer.start()
    reader = threading.Thread(target=lambda: found.append(read_operators(str(tmp_path / "fifo"))))
    found = []
    reader.start()
    assert opened.wait(20)
    half.set()
    reader.join(20)
    writer.join(20)
    assert found == [text]


@pytest.mark.parametrize("data", ["", "port = 8003\n"])
def test_a_pipe_of_the_shell_s_may_be_empty(data):
    reading, writing = os.pipe()
    os.write(writing, data.encode())
    os.close(writing)
    assert read_operators(f"/dev/fd/{reading}") == data
    os.close(reading)


def test_devices_and_folders_are_no_operator_files(tmp_path):
    """Devices, folders and sockets are no files of the operator's."""
    for path, words in (("/dev/zero", "more than"), (str(tmp_path), "Is a directory"), (str(tmp_path / "none"), "No such file")):
        with pytest.raises(ConfigError, match=words):
            parse_command_line(["--config", path], {})
    assert read_operators("/dev/null") == ""
