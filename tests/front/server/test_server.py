"""The whole thing as a user runs it: `python chat_server.py` as a process, real models, real clients, real signals."""

import asyncio
import importlib.metadata
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from chatlm.common.config import Settings
from chatlm.common.core import decode_core, torch_installed
from chatlm.front.front import create_app
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.pool import make_pool
from chatlm.front.server.access import listen_on
from chatlm.front.server.connections import serving
from nightly import by_day
from pools import DYING, idle
from real_server import SCRIPT, ask, copy_program, events, get, gone, post, server, wait_for


def test_the_default_model_answers_over_both_apis(default_model_path):
    """The page is served."""
    with server() as (process, url):    # one of its own: it chooses the model, and has nothing in its cache
        answer = events(post(url + "/chat/completions", ask("What is the capital of Japan?")))
        assert "".join(event.get("token", "") for event in answer) == "The capital of Japan is Tokyo."
        assert answer[-1]["finish_reason"] == "stop" and answer[-1]["usage"]["completion_tokens"] == 8
        openai = json.load(post(url + "/v1/chat/completions", ask("What is the capital of Japan?", model="default")))
        assert openai["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."
        assert openai["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
        with urllib.request.urlopen(url, timeout=10) as page:
            assert b"page.js" in page.read()
        stats = get(url + "/stats")
        core = decode_core()
        assert stats["workers"][0]["state"] == "ready" and stats["row_invariant"] is (core is not None)
        assert stats["kernels"]["sample"] == (f"decode_core/{core.isa()}" if core else "numpy/reference")


def test_only_a_worker_without_core_loads_torch(nanochat_fixtures):
    """Torch is loaded by a worker without decode_core alone, and the worker opens no port."""
    with server(nanochat_fixtures / "gen5", forked="front") as (process, url):
        events(post(url + "/chat/completions", ask("hello", max_tokens=5)))
        assert not [m.path for m in psutil.Process(process.pid).memory_maps() if "libtorch" in m.path]
        (worker,) = psutil.Process(process.pid).children(recursive=True)
        assert any("libtorch" in m.path for m in worker.memory_maps()) == (decode_core() is None)
        assert worker.net_connections("inet") == []


@pytest.mark.parametrize("number, answering", [
    (signal.SIGKILL, True),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in ((signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGKILL, False)))])
def test_however_the_front_ends_no_process_stays(nanochat_fixtures, number, answering):
    with server(nanochat_fixtures / "gen5", "--num-workers", "2", forked="front") as (process, url):
        children = psutil.Process(process.pid).children(recursive=True)
        if answering:
            stream = post(url + "/chat/completions", ask("hello", max_tokens=4096, ignore_eos=True))
            stream.readline()
        process.send_signal(number)
        if answering and number != signal.SIGKILL:
            assert events(stream)[-1]["done"]           # draining let it finish
        assert process.wait(30) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        assert gone(children)


def test_a_front_killed_while_loading_leaves_nothing(nanochat_fixtures):
    process = subprocess.Popen([sys.executable, SCRIPT, nanochat_fixtures / "gen5", "--port", "0"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "importing libraries" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    process.stderr.close()
    assert gone(children)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process list stays as it is")
@pytest.mark.parametrize("flags", [("--api-key=sesame wörd", "--api-key", "more"), pytest.param(("--api-key", "sesame wörd"), marks=pytest.mark.slow)])
def test_a_flag_s_key_leaves_the_process_list(nanochat_fixtures, flags):
    """It still opens the server."""
    log = []
    with server(nanochat_fixtures / "gen5", *flags, log=log, forked=False) as (process, url):
        shown = psutil.Process(process.pid).cmdline()
        assert "sesame" not in " ".join(shown) and "more" not in shown
        assert shown[2] == str(nanochat_fixtures / "gen5") and shown[-4:] == ["--port", "0", "--host", "127.0.0.1"]
        assert "--api-key: other users of this machine could until now read the key" in "".join(log)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(url + "/stats")
        key = {"Authorization": "Bearer sesame wörd".encode()}
        request = urllib.request.Request(url + "/stats", headers=key)
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["model"]


def limited(megabytes):
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


@pytest.mark.parametrize("megabytes", by_day([200, 620, 720], 620))
def test_too_little_memory_is_one_line(nanochat_fixtures, megabytes):
    """It is, wherever memory runs out."""
    command = [sys.executable, SCRIPT, "generate", nanochat_fixtures / "gen5", "--prompt", "Hi", "-m", "3"]
    run = subprocess.run(command, preexec_fn=limited(megabytes), capture_output=True, text=True, timeout=100)
    lines = run.stderr.splitlines()
    if run.returncode == 0:             # enough for this model with these libraries
        assert re.match("[1-3] tokens? in ", lines[-1])     # the model may end its answer itself
    else:
        assert "Traceback" not in run.stderr and lines[-1].startswith("chat_server: ")
        assert "not enough memory" in lines[-1] or "MiB of memory are free" in lines[-1]


def test_memory_left_is_within_the_process_s_limit():
    code = "from chatlm.common.memory import available_memory; print(available_memory())"
    run = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, preexec_fn=limited(500),
                         capture_output=True, text=True, timeout=60, check=True)
    assert 0 < int(run.stdout) < 500 << 20


def test_an_answer_goes_on_after_a_killed_worker(nanochat_fixtures):
    """It goes on where it was."""
    with server(nanochat_fixtures / "gen5", "--dtype", "float32") as (process, url):    # float32: no near ties in 300 tokens
        before = events(post(url + "/chat/completions", ask("hello", max_tokens=300, ignore_eos=True)))
        stream = post(url + "/chat/completions", ask("hello", max_tokens=300, ignore_eos=True))
        stream.readline()
        os.kill(get(url + "/stats")["workers"][0]["pid"], signal.SIGKILL)
        text = "".join(event.get("token", "") for event in before)
        after = [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]
        usage = after[-1]["usage"]      # what the next worker finds kept of the prompt depends on when the first one was idle
        assert after[-1]["done"] and usage == before[-1]["usage"] | {"cached_tokens": usage["cached_tokens"]}
        assert 0 <= usage["cached_tokens"] <= usage["prompt_tokens"]
        assert text.endswith("".join(event.get("token", "") for event in after))
        wait_for(process, "restarting")


def test_a_restarting_model_keeps_its_name(nanochat_fixtures):
    """Another model's name is a 404 meanwhile, and its own waits."""
    with server(nanochat_fixtures / "gen5", "--served-model-name", "mine") as (process, url):
        os.kill(get(url + "/stats")["workers"][0]["pid"], signal.SIGKILL)
        wait_for(process, "restarting")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url + "/v1/chat/completions", ask("hello", model="other"))
        assert refused.value.code == 404
        assert json.load(post(url + "/v1/chat/completions", ask("hello", model="mine", max_tokens=4)))["usage"]["completion_tokens"] == 4


@asynccontextmanager
async def served(settings):
    """A WorkerPool behind the real HTTP front in this process: (pool, url)."""
    pool = make_pool(settings, worker_command=DYING)
    with listen_on("127.0.0.1", 0) as listener:
        async with serving(create_app(Catalogue(settings, pool), settings), listener):
            try:
                await pool.start()
                await pool.wait_ready()
                yield pool, f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                await pool.close()


@pytest.mark.parametrize("count", by_day([70, 200], 70))
async def test_200_vanishing_clients_leave_nothing(nanochat_fixtures, count):
    """They vanish at random moments."""
    generator = random.Random(7)
    async with served(Settings(model=str(nanochat_fixtures / "gen5"), kv_cache_memory=1 << 20, max_batch=8)) as (pool, url):

        async def client(session, number):
            body = ask("hello " * generator.randrange(1, 60), max_tokens=100, ignore_eos=True, seed=number, temperature=1)
            path = "/chat/completions" if number % 2 else "/v1/chat/completions"
            # lines to read before leaving; with 1000 it stays to the end
            leave_after = generator.choice((0, 0, 1, 2, 7, 1000))
            if leave_after == 0:        # queued or prefilling, streaming or not
                with pytest.raises(asyncio.TimeoutError):
                    async with asyncio.timeout(generator.random() / 20):
                        async with session.post(url + path, json=body | {"max_tokens": 4096}) as response:
                            await response.read()
                            await asyncio.Event().wait()
                return
            async with session.post(url + path, json=body | {"stream": True}) as response:
                assert response.status == 200
                async for line in response.content:
                    leave_after -= line.startswith(b"data")
                    if leave_after == 0:
                        response.close()
                        return

        gate = asyncio.Semaphore(24)

        async def one(session, number):
            async with gate:
                await client(session, number)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(one(session, number) for number in range(count)))
            while pool.dispatcher.jobs:        # the server may notice the last ones later
                await asyncio.sleep(0.01)
            await idle(pool)
            async with session.get(url + "/stats") as response:
                stats = await response.json()
            assert (stats["busy_workers"], stats["available_workers"], stats["queue_depth"]) == (0, 1, 0)
            async with session.post(url + "/chat/completions", json=ask("hello", max_tokens=3)) as response:
                assert b'"done"' in await response.read()


# a copy of the script and the page, with just the libraries that it needs


def requirements_of(names):
    """`names` and the distributions that they need, without extras and without markers that do not apply."""
    from packaging.requirements import Requirement
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name.lower().replace("_", "-") in found:
            continue
        distribution = importlib.metadata.distribution(name)
        found[name.lower().replace("_", "-")] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def bare_python(folder, names):
    """The interpreter of a virtual environment that has only `names` and what they need, linked from this
    one."""
    if "torch" in names and not torch_installed():
        pytest.skip("torch is not installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements_of(names).values():
        for file in {Path(entry).parts[0] for entry in distribution.files if not str(entry).startswith("..")}:
            if file != "__pycache__" and not (site / file).exists():
                (site / file).symlink_to(Path(distribution.locate_file(file)))
    return folder / "bin/python"


LIBRARIES = {"nanochat": ["torch", "aiohttp", "numpy", "tiktoken"],
             "gguf": ["torch", "aiohttp", "numpy", "tokenizers", "jinja2"]}


@pytest.fixture
def copied(tmp_path):
    """Only the program and its page, in an empty folder."""
    return copy_program(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nanochat", "gguf"])
def test_a_copy_of_program_and_page_works(form, copied, tmp_path, nanochat_fixtures, default_model_path):
    """It is a working deployment."""
    python = bare_python(tmp_path / "venv", LIBRARIES[form])
    model = nanochat_fixtures / "gen5" if form == "nanochat" else default_model_path
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GOMP_SPINCOUNT": "1000"}
    log = []
    with server(model, script=copied, python=python, env=env, log=log) as (process, url):
        assert "decode_core is not installed, so slower reference ops run" in "".join(log)
        answer = events(post(url + "/chat/completions", ask("What is the capital of Japan?", max_tokens=12)))
        assert answer[-1]["done"]
        if form == "gguf":
            assert answer[0]["token"] == "The"
        assert get(url + "/stats")["kernels"]["sample"] == "numpy/reference"
        with urllib.request.urlopen(url, timeout=10) as page:
            assert b"page.js" in page.read()


@pytest.mark.slow
@pytest.mark.parametrize("form, missing", [("gguf", "tokenizers"), ("nanochat", "torch"), ("nanochat", "tiktoken"), ("nanochat", "aiohttp"), ("nanochat", "numpy"),
                                           ("gguf", "jinja2")])
def test_each_missing_library_names_the_pip_command(form, missing, copied, tmp_path, nanochat_fixtures, default_model_path):
    """It does so in one line."""
    python = bare_python(tmp_path / "venv", LIBRARIES[form])
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / missing).unlink()
    model = nanochat_fixtures / "gen5" if form == "nanochat" else default_model_path
    ended = subprocess.run([python, copied, model, "--port", "0", "--host", "127.0.0.1"], capture_output=True, text=True, timeout=60,
                           env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if not line.endswith(" ...")]        # before weights are read
    assert f"pip install {missing}" in line
    assert "Traceback" not in ended.stderr


# the real clients on the real model


def test_the_openai_package_chats_with_a_real_model(default_url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=default_url + "/v1", api_key="none", max_retries=0) as client:
        question = {"model": client.models.list().data[0].id, "temperature": 0,
                    "messages": [{"role": "user", "content": "What is the capital of Japan?"}]}
        whole = client.chat.completions.create(**question)
        assert whole.choices[0].message.content == "The capital of Japan is Tokyo." and whole.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The capital of Japan is Tokyo."
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 8
        longer = client.chat.completions.create(**question, max_tokens=30, extra_body={"ignore_eos": True})
        assert longer.usage.completion_tokens == 30 and longer.choices[0].finish_reason == "length"


def test_emoji_and_cjk_arrive_as_whole_characters(default_url):
    answer = events(post(default_url + "/chat/completions", ask("Repeat exactly: 日本語 👩‍👩‍👧 🎉🎉", max_tokens=60)))
    pieces = [event["token"] for event in answer if "token" in event]
    assert all("\ufffd" not in piece for piece in pieces)
    assert re.search(r"[\u3040-\u9fff]|[\U0001f300-\U0001faff]", "".join(pieces))     # several tokens a character


def cli(*arguments, stdin=None):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=90)


def test_generate_needs_no_server(default_model_path, nanochat_fixtures):
    """It answers with a pool of its own, from a flag and from stdin."""
    said = cli("generate", "--prompt", "What is the capital of Japan?", "-t", "0")
    assert (said.returncode, said.stdout) == (0, "The capital of Japan is Tokyo.\n")
    assert re.search(r"^8 tokens in [\d.]+ m?s", said.stderr, re.MULTILINE)
    piped = cli("generate", nanochat_fixtures / "gen5", "--prompt", "-", "-t", "0", "-m", "3", stdin="What is the capital of Japan?\n")
    assert piped.returncode == 0 and "3 tokens" in piped.stderr


def test_chat_with_a_server_remembers_and_clears(default_url):
    """It quits too."""
    said = cli("chat", "--url", default_url, "-t", "0", "-m", "30",
               stdin="What is the capital of Japan?\nAnd of France?\nclear\nAnd of France?\nquit\nnever read\n")
    assert said.returncode == 0
    japan, france, forgotten = said.stdout.split("\n", 2)
    assert "The capital of Japan is Tokyo." in japan and "The capital of France is Paris." in france
    assert "Paris" not in forgotten and "The conversation has been cleared." in said.stderr
    assert "tok/s" not in said.stdout and said.stderr.count("first token after") == 3
