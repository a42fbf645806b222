"""What operators use: metrics, logs, request ids, draining, configuration, sub-paths."""

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

import chat_server
from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.log import CalmLog, JsonLines, ProgressDisplay, TextLines, tell
from chatlm.common.messages.protocol import BROKEN_INVARIANTS
from chatlm.common.messages.requests import Finished
from chatlm.common.program import program_root
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.serve import announce, serve_forever
from command_line import parse_command_line
from fake_pool import FakePool, conversation, frames, serving
from real_server import server

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"


# metrics


async def metrics(client, url):
    """{name{labels}: value} of /metrics."""
    async with client.get(url + "/metrics") as response:
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain")
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def test_a_prompt_of_several_answers_counts_once(client):
    """Usage counts it once too."""
    async with serving(FakePool(["a", "b", "c"])) as url:
        async with client.post(url + OPENAI, json=conversation() | {"n": 3}) as response:
            usage = (await response.json())["usage"]
        counts = await metrics(client, url)
    tokens = {kind: counts[f'chat_server_tokens_total{{kind="{kind}"}}'] for kind in ("prompt", "prompt_cached", "generated")}
    assert tokens == {"prompt": 4, "prompt_cached": 3, "generated": 9}
    assert tokens["prompt"] + tokens["prompt_cached"] + tokens["generated"] == usage["total_tokens"]


async def test_an_answer_is_counted_and_timed(client):
    async with serving(FakePool(["a", "b", "c"])) as url:
        before = await metrics(client, url)
        for path in (NATIVE, OPENAI):
            await (await client.post(url + path, json=conversation())).read()
        after = await metrics(client, url)
    assert before['chat_server_requests_total{finish_reason="stop"}'] == before["chat_server_time_to_first_token_seconds_count"] == 0
    assert after['chat_server_requests_total{finish_reason="stop"}'] == 2
    assert after['chat_server_tokens_total{kind="generated"}'] == 6
    assert after['chat_server_tokens_total{kind="prompt"}'] == 8 and after['chat_server_tokens_total{kind="prompt_cached"}'] == 6
    counts = {name: after[f"chat_server_{name}_seconds_count"] for name in ("time_to_first_token", "inter_token_latency", "queue")}
    assert counts == {"time_to_first_token": 2, "inter_token_latency": 4, "queue": 2}
    assert after["chat_server_queue_seconds_sum"] == pytest.approx(2 * 0.25e-3)
    assert after['chat_server_request_duration_seconds_count{finish_reason="stop"}'] == 2
    assert after['chat_server_http_responses_total{route="/v1/chat/completions",status="200"}'] == 1


@pytest.mark.parametrize("error, reason", [
    (EngineFailure("broken"), "error"), (ZeroDivisionError(), "error"), (Overloaded("full"), "refused"),
    (RequestError("too long"), "refused"), (RequestError("stopped", status=499, code="cancelled"), "cancelled")])
async def test_what_fails_is_counted_by_its_reason(client, error, reason):
    async with serving(FakePool(refuse=error)) as url:
        await (await client.post(url + NATIVE, json=conversation())).read()
        counts = await metrics(client, url)
    assert {name: value for name, value in counts.items() if "requests_total" in name and value} == {
        f'chat_server_requests_total{{finish_reason="{reason}"}}': 1}


async def test_a_client_that_leaves_counts_as_cancelled(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + NATIVE, json=conversation()) as response:
            response.close()
        await pool.until_open(0)
        assert (await metrics(client, url))['chat_server_requests_total{finish_reason="cancelled"}'] == 1


async def test_the_gauges_are_the_pool_s_at_that_moment(client):
    pool = FakePool()
    worker = {"state": "ready", "running": 3, "restarts": 2, "crashes_in_row": 0, "kv_pages_used": 10, "kv_pages_total": 64, "gpu_id": 0,
              "device": "cuda:0", "memory_used": 5 << 30, "memory_total": 80 << 30, "utilization": 0.75, "batch_fill": 0.5,
              "preemptions": 7, "drafted_lookup": 9, "accepted_lookup": 8, "drafted_forced": 3, "integrity_checks": 12, "broken_pages": 2}
    dead = worker | {"state": "dead", "restarts": 1, "crashes_in_row": 4, "gpu_id": 1, "device": "cuda:1", "utilization": None}
    pool.stats = lambda: {"total_workers": 2, "available_workers": 0, "busy_workers": 1, "queue_depth": 5, "delayed_answers": 0, "workers": [worker, dead]}
    async with serving(pool) as url:
        shown = await metrics(client, url)
    wanted = {"running": 6, "queued": 5, "kv_pages_used": 20, "kv_pages": 128, "workers": 2, "workers_up": 1, "worker_restarts_total": 3,
              "workers_in_crash_loop": 1}
    assert {name: shown[f"chat_server_{name}"] for name in wanted} == wanted
    of = {name: {gpu: shown.get(f'chat_server_worker_{name}{{device="cuda:{gpu}",worker="{gpu}"}}') for gpu in (0, 1)}
          for name in ("memory_used", "memory_total", "utilization", "batch_fill", "preemptions_total")}
    assert of == {"memory_used": {0: 5 << 30, 1: 5 << 30}, "memory_total": {0: 80 << 30, 1: 80 << 30}, "utilization": {0: 0.75, 1: None},
                  "batch_fill": {0: 0.5, 1: 0.5}, "preemptions_total": {0: 7, 1: 7}}
    assert shown["chat_server_invariant_checks_total"] == 24
    assert {name: shown[f'chat_server_broken_invariants_total{{what="{name}"}}'] for name in BROKEN_INVARIANTS} == dict.fromkeys(BROKEN_INVARIANTS, 0) | {"pages": 4}
    drafts = {(name, source): shown[f'chat_server_worker_{name}_tokens_total{{device="cuda:1",source="{source}",worker="1"}}']
              for name in ("drafted", "accepted") for source in ("lookup", "forced", "mtp", "model")}
    assert {key: value for key, value in drafts.items() if value} == {
        ("drafted", "lookup"): 9, ("accepted", "lookup"): 8, ("drafted", "forced"): 3}


async def test_without_prometheus_metrics_say_why(client, monkeypatch):
    """The server serves all the same."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with serving(FakePool()) as url:
        assert (await client.post(url + NATIVE, json=conversation())).status == 200
        response = await client.get(url + "/metrics")
        assert response.status == 501 and "prometheus_client" in await response.text()


# logs and ids


async def test_every_response_has_an_id(client):
    """It is the client's, if the client gave one."""
    async with serving(FakePool()) as url:
        for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/nothing"), ("POST", NATIVE), ("POST", OPENAI), ("GET", "/static/chat.js")):
            async with client.request(method, url + path, json=conversation()) as drawn:
                assert re.fullmatch("[0-9a-f]{32}", drawn.headers["X-Request-Id"]), path
            async with client.request(method, url + path, json=conversation(), headers={"X-Request-Id": "trace-1.2_3"}) as given:
                assert given.headers["X-Request-Id"] == "trace-1.2_3", path


async def test_a_completion_has_the_id_of_header_and_log(client, caplog):
    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(FakePool(), Settings(keys=(ApiKey.hashed("key", "alice"),))) as url:
            async with client.post(url + OPENAI, json=conversation(), headers={"X-Request-Id": "mine", "X-Api-Key": "key"}) as response:
                assert (await response.json())["id"] == "chatcmpl-mine"
    assert "POST /v1/chat/completions 200" in caplog.text and "[alice mine]" in caplog.text


def json_lines(records):
    return [json.loads(JsonLines().format(record)) for record in records]


async def test_the_json_log_has_fields_and_no_text(client, caplog):
    """It has the fields of each request."""
    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(FakePool()) as url:
            await (await client.post(url + NATIVE, json=conversation("my secret"), headers={"X-Request-Id": "x"})).read()
            await client.get(url + "/no\u2028such?secret=1")
            await client.get(url + "/health")
    lines = json_lines(caplog.records)
    assert len(lines) == 2 and "secret" not in json.dumps(lines)
    assert lines[0] | {"ms": 0, "time": "", "message": ""} == {
        "time": "", "level": "info", "message": "", "method": "POST", "path": NATIVE, "status": 200, "ms": 0, "client": "127.0.0.1",
        "id": "x", "prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 3, "reasoning_tokens": 0,
        "reason": "stop"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["time"]) and lines[1]["status"] == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_counts_choices_and_their_ends(client, caplog, stream):
    """The log counts all choices and says in which ways they ended."""
    class Cutting(FakePool):
        async def answer(self, request):        # choice 1 is cut; each prompt has 7 tokens, 3 of them cached
            async for event in super().answer(request):
                cut = isinstance(event, Finished) and event.choice == 1
                yield replace(event, reason="length") if cut else event

    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(Cutting(["a", "b"])) as url:
            body = {"prompt": ["one", "two"], "n": 2, "stream": stream}
            await (await client.post(url + "/v1/completions", json=body)).read()
    (line,) = json_lines(caplog.records)
    assert {name: line[name] for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reason")} == {
        "prompt_tokens": 14, "completion_tokens": 8, "cached_tokens": 6, "reason": "length,stop"}
    assert " 14+8 tokens length,stop " in line["message"]


def gated_pool(count):
    """A pool whose answers have `count` pieces, and then wait for ever; `waits_again` says that one does."""
    pool = FakePool(gate=asyncio.Semaphore(count))
    pool.waits_again = asyncio.Event()

    async def wait():
        if pool.gate.locked():
            pool.waits_again.set()
        await pool.gate.acquire()

    pool.gate.wait = wait
    return pool


@pytest.mark.parametrize("route", [NATIVE, OPENAI, "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_counts_the_tokens_of_an_answer_whose_client_left(client, caplog, route, stream):
    with caplog.at_level(logging.INFO, logger="chat_server"):
        pool = gated_pool(2)            # of its three pieces, a token each
        async with serving(pool) as url:
            body = {"stream": stream, "max_tokens": 9, "input": "Hi"} if route == "/v1/responses" else {
                **conversation(), "stream": stream, "max_tokens": 9}
            asked = asyncio.ensure_future(client.post(url + route, json=body))
            await pool.until_open(1)
            await pool.waits_again.wait()
            if stream or route == NATIVE:
                (await asked).close()
            else:
                asked.cancel()
            await pool.until_open(0)
    (line,) = json_lines(caplog.records)
    assert (line["status"], line["prompt_tokens"], line["completion_tokens"], line["reason"]) == (499, 7, 2, "cut")
    assert " 7+2 tokens cut " in line["message"]


async def test_the_log_counts_the_tokens_of_a_cancelled_answer(client, caplog):
    with caplog.at_level(logging.INFO, logger="chat_server"):
        pool = gated_pool(1)
        async with serving(pool) as url:
            asked = asyncio.ensure_future(client.post(url + OPENAI, json=conversation(), headers={"X-Request-Id": "a"}))
            await pool.until_open(1)
            await pool.waits_again.wait()
            assert (await client.post(url + "/v1/cancel/a")).status == 200
            assert (await asked).status == 499
    lines = [line for line in json_lines(caplog.records) if line["path"] == OPENAI]
    assert [(line["status"], line["prompt_tokens"], line["completion_tokens"]) for line in lines] == [(499, 7, 1)]


async def test_polls_are_not_logged_but_missing_keys_are(client, caplog):
    """Attempts without a key are logged with their address."""
    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(FakePool(), Settings(keys=(ApiKey.hashed("key", "alice"),))) as url:
            for path in ("/health", "/livez", "/readyz", "/stats", "/metrics"):
                await client.get(url + path, headers={"X-Api-Key": "key"})
            await client.get(url + "/stats", headers={"X-Request-Id": "x"})
    (record,) = caplog.records
    assert re.fullmatch(r"GET /stats 401 \d+ ms  \[127.0.0.1 x\]", record.getMessage())


def test_a_traceback_stays_one_json_line():
    try:
        raise ZeroDivisionError("one\ntwo")
    except ZeroDivisionError:
        record = logging.LogRecord("chat_server", logging.ERROR, "", 0, "broke: %s", ("x\ny",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "broke: x\ny" and "ZeroDivisionError" in json.loads(line)["traceback"]


@pytest.mark.parametrize("format_, wanted", [("json", r'\{"time": .*"message": "hello"\}\n'), ("text", r"\d{4}-.* hello\n")])
def test_log_format_chooses_the_format(format_, wanted):
    code = f"from chatlm.common.config import Settings; " \
           f"from chatlm.common.log import log, start_logging; " \
           f"start_logging(Settings(log_format={format_!r})); log.info('hello')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=program_root())
    assert re.fullmatch(wanted, run.stderr)


NOISE = """
import os, sys, warnings
if "-c" in sys.orig_argv:           # a worker or a sandbox
    os.write(2, b"a C library \\x1b[31mwarns\\xff\\n{half an object\\n")
    print("and prints", flush=True)
    warnings.warn("a library warns")
"""


def test_each_line_of_a_json_log_is_json(nanochat_fixtures, tmp_path):
    """Also what libraries write past the log, in workers and sandboxes too."""
    (tmp_path / "sitecustomize.py").write_text(NOISE)
    log, environment = [], os.environ | {"PYTHONPATH": str(tmp_path)}
    with server(nanochat_fixtures / "gen5", "--log-format", "json", "--api-key", "k", env=environment, log=log) as (process, url):
        for path in ("/", "/static/chat.js", "/static/none.js", "/health"):
            request = urllib.request.Request(url + path, headers={"X-Request-Id": "page"})
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=30).close()
        process.terminate()
        log += process.stdout
        assert process.wait(30) == 0
    lines = [json.loads(line) for line in log]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    messages = [line["message"] for line in lines]
    for words in ("a C library \x1b[31mwarns\ufffd", "{half an object", "and prints", "Application startup complete", url,
                  "Stopping: running answers may finish; a second signal stops now."):
        assert words in messages
    assert any("UserWarning: a library warns" in message for message in messages) and any("--api-key: other users" in message for message in messages)
    assert [(line["path"], line["status"]) for line in lines if line.get("id") == "page"] == [("/", 200), ("/static/none.js", 404)]


def test_the_log_ends_with_the_address(nanochat_fixtures, log_shown):
    """It says in few lines what runs."""
    shown = log_shown(nanochat_fixtures / "gen5")
    lines = [line for line in shown if not re.search(r" \.\.\.$|the chatlm in .* runs", line)]
    assert [line.split()[0] for line in lines] == ["nanochat", "Model", "Running", "KV", "Application", "http://127.0.0.1:%s" % lines[-1].split(":")[-1]], lines
    assert "kernels:" in lines[2] and "context " in lines[3]
    assert any(line.startswith("This is a demonstration model") for line in log_shown())
    more = "\n".join(log_shown(nanochat_fixtures / "gen5", "-v"))
    for words in ("The model fits: ", "decode_core", "Prefixes outlive", "Tools: ", "Sampling unless a request"):
        assert words in more and words not in "\n".join(lines[:2] + lines[3:]), words
    assert more.index("Sampling unless") < more.index("Application startup complete") < more.index("http://127.0.0.1")


@pytest.fixture
def log_shown():
    def shown(*words):
        with server(*words, log=(lines := [])):
            return [line.rstrip("\n") for line in lines]
    return shown


def test_long_lines_for_a_terminal_wrap_at_words(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((40, 20)))
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

        def fileno(self):
            return 2
    text = "a line whose words are wrapped before the fortieth column and " + "x" * 60 + "\nanother\n  http://127.0.0.1:8000"
    handler = CalmLog()
    handler.setFormatter(TextLines())
    for is_terminal in (True, False):
        tell(text, file=(stream := Stream()))
        handler.setStream(stream)
        handler.emit(logging.LogRecord("chat_server", logging.INFO, "", 0, text, (), None))
        lines = stream.getvalue().splitlines()
        assert " ".join(stream.getvalue().split()).count(" ".join(text.split())) == 2       # nothing is lost or cut
        assert max(len(line) for line in lines if "x" * 60 not in line) <= 40
        assert ("    the fortieth" in "\n".join(lines)) is is_terminal and "  http://127.0.0.1:8000" in lines


@pytest.mark.parametrize("words", [["no-such-model"], ["--max-batch", "x"]])
def test_a_failed_start_is_json_too(words):
    """It is the line that says why the server does not start."""
    run = subprocess.run([sys.executable, chat_server.__file__, *words, "--port=0", "--log-format=json"], capture_output=True, text=True, timeout=60)
    *_, last = [json.loads(line) for line in run.stderr.splitlines()]
    assert (run.returncode, run.stdout, last["level"]) == (2, "", "error")
    assert last["message"].startswith("chat_server: ") and words[-1] in last["message"]


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_log_line_replaces_the_progress_bar(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    handler, progress = CalmLog(), ProgressDisplay()
    handler.handle(logging.LogRecord("chat_server", logging.INFO, "", 0, "before", (), None))
    progress("loading", 0.5)
    handler.handle(logging.LogRecord("chat_server", logging.INFO, "", 0, "between", (), None))
    progress.close()
    handler.handle(logging.LogRecord("chat_server", logging.INFO, "", 0, "after", (), None))
    bar = "\r\x1b[Kloading [###############               ]  50%"
    assert screen.getvalue() == f"before\n{bar}\r\x1b[Kbetween\n\r\x1b[Kafter\n"


async def test_bytes_that_are_no_http_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    async with serving(FakePool()) as url:
        for request in (b"GET /\x00secret HTTP/1.1\r\n\r\n", b"secret\r\n\r\n", b"GET / HTTP/1.1\r\nAuthorization\x01: secret\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(request)
            assert (await reader.read()).startswith(b"HTTP/1.") and not writer.close()
    assert "is not HTTP" in caplog.text and "secret" not in caplog.text


# draining


async def test_answers_beyond_the_drain_time_get_an_error(client, capsys):
    """They end with an error event."""
    pool = FakePool(["one"], gate=asyncio.Event())
    server = asyncio.ensure_future(serve_forever(Settings(host="127.0.0.1", port=0, drain_timeout=0.01), Catalogue(Settings(), pool)))
    printed = ""
    while not (found := re.search(r"  (http://\S+)\n", printed)):
        await asyncio.sleep(0)
        printed += capsys.readouterr().out
    async with client.post(found[1] + NATIVE, json=conversation()) as running:
        signal.raise_signal(signal.SIGTERM)
        last = frames(await running.read())[-1]
    assert "error" in last and await server == 0


# configuration


def configured(tmp_path, text, line="", **environment):
    path = tmp_path / "server.toml"
    path.write_text(text)
    return parse_command_line([*line.split(), "--config", str(path)], environment)


def test_flags_win_over_environment_over_file(tmp_path):
    text = 'model = "from-file"\nport = 1\nmax-batch = 2\ntop_p = 0.5\nserved-model-name = ["a", "b"]\nlog-conversations = true\n' \
           'api-key = "secret"\nkv-cache-memory = "1G"\nmax-new-tokens = 7\nprompt = "of another command"\n'
    settings = configured(tmp_path, text, "--port 3", CHAT_SERVER_MAX_BATCH="4", CHAT_SERVER_PORT="5")
    path = str(tmp_path / "server.toml")
    assert settings == Settings(model="from-file", port=3, max_batch=4, top_p=0.5, served_model_name=("a", "b"), log_conversations=True,
                                keys=(ApiKey.hashed("secret", "key-1"),), kv_cache_memory=1 << 30, max_tokens=7, config=path)
    assert parse_command_line(["--no-log-conversations", "m"], {"CHAT_SERVER_CONFIG": path}).model == "m"


@pytest.mark.parametrize("text, words", [
    ("prot = 1", "no flag --prot"), ("port = 99999", "config: port"), ("port = [1, 2]", "port must be a number or text"), ("[port]\nx = 1", "flags belong outside tables"),
    ("port =", "server.toml"), ("source = 'moon'", "config: source: argument -i/--source: invalid choice"), ("log-conversations = 'perhaps'", "true, yes"), ("temperature = nan", "temperature")])
def test_a_wrong_config_file_is_one_clear_error(tmp_path, text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        configured(tmp_path, text)
    with pytest.raises(ConfigError, match="No such file"):
        parse_command_line(["--config", str(tmp_path / "missing.toml")], {})


# under a sub-path


@pytest.mark.parametrize("given, used", [("/chat", "/chat"), ("chat/", "/chat"), ("/a/b/", "/a/b"), ("/", ""), ("", "")])
def test_a_prefix_is_normalized(given, used):
    assert parse_command_line(["--prefix", given], {}).prefix == used


@pytest.mark.parametrize("wrong", ["/a b", "/{x}", "/a//b", "/ä"])
def test_a_prefix_that_is_no_path_is_refused(wrong):
    with pytest.raises(ConfigError, match="not a path"):
        parse_command_line(["--prefix", wrong], {})


async def test_everything_is_served_under_the_prefix(client, capsys):
    """Nothing is served elsewhere."""
    settings = Settings(prefix="/deep/chat", keys=(ApiKey.hashed("key", "alice"),))
    async with serving(FakePool(), settings) as url:
        bare = await client.get(url + "/deep/chat", allow_redirects=False)
        assert (bare.status, bare.headers["Location"]) == (308, "/deep/chat/")
        page = await client.get(url + "/deep/chat/")
        assert 'href="static/"' in await page.text()
        for path in ("static/chat.js", "livez", "health"):
            assert (await client.get(f"{url}/deep/chat/{path}")).status == 200
        for path in (NATIVE, OPENAI):
            assert (await client.post(url + "/deep/chat" + path, json=conversation())).status == 401
            assert (await client.post(url + "/deep/chat" + path, json=conversation(), headers={"X-Api-Key": "key"})).status == 200
            assert (await client.post(url + path, json=conversation(), headers={"X-Api-Key": "key"})).status == 404
        wrong = await client.post(url + "/deep/chat" + OPENAI, json={}, headers={"X-Api-Key": "key"})
        assert (await wrong.json())["error"]["param"] == "messages"
    announce(FakePool(), settings, 8000)
    assert "http://127.0.0.1:8000/deep/chat/" in capsys.readouterr().out
