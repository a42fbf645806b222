"""Commands with --url say in a line what is wrong with a server that does not answer as ours does."""

import http.client
import http.server
import json
import random
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from bundles import write_bundle
from chat_tasks import write_chat_data
from chatlm.common.config import Settings
from chatlm.common.errors import ChatServerError, EngineFailure
from chatlm.terminal.batch_command import ByteBudget, batch
from chatlm.terminal.evaluate import evaluate
from chatlm.terminal.remote_streams import strict_object


@contextmanager
def serving(answer):
    """A server whose responses are those of answer(method, path, body): (status, body)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            size = int(self.headers.get("Content-Length") or 0)
            status, body = answer(self.command, self.path, self.rfile.read(size))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) + 50 * body.endswith(b"cut")))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def other_server(*answers):
    """A server of others that gives these bodies, in turn, to requests for answers."""
    left = iter(answers)

    def answer(method, path, body):
        if path == "/health":
            return 200, b"{}"
        if method == "GET":
            return 200, b'{"data": [{"id": "odd", "owned_by": "vllm"}]}'
        return next(left)

    return serving(answer)


async def answered_lines(tmp_path, *answers):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"custom_id": str(number), "url": "/v1/completions", "body": {"prompt": "Hi"}}) + "\n" for number in range(len(answers))))
    with other_server(*answers) as url:
        status = await batch(Settings(command="batch", texts=str(source), output=str(out), url=url))
    return status, [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]


# the command batch


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"yes"', b"7", b"null", b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": 1e999}', b'{"a":' * 100_000, b"\xff\xfe", b'{"a": 1} x', b'{"a"'])
async def test_a_response_must_be_a_json_object(tmp_path, body):
    """Any other response is an error of its line."""
    status, [line] = await answered_lines(tmp_path, (200, body))
    assert status == 1 and line["response"]["status_code"] == 502
    assert "answered with status 200, but not with a JSON object" in line["response"]["body"]["error"]["message"]
    assert (strict_object(body), strict_object(b'{"a": [1.5, "NaN"]}')) == (None, {"a": [1.5, "NaN"]})


async def test_other_lines_have_their_answers(tmp_path):
    status, lines = await answered_lines(tmp_path, (200, b'{"choices": []}'), (500, b"<html>"), (400, b'{"error": NaN}'), (201, b"ok"), (200, b'{"choices": [1]}'))
    assert status == 1 and sorted(line["response"]["status_code"] for line in lines) == [200, 200, 400, 500, 502]


async def test_a_cut_response_ends_a_run_that_resumes(tmp_path):
    """A response that is cut ends the command and the same command goes on."""
    with pytest.raises(EngineFailure, match="the connection to http://127.0.0.1:[0-9]+ broke"):
        await answered_lines(tmp_path, (200, b'{"choices": cut'))
    assert (tmp_path / "out.jsonl.part").exists() and not (tmp_path / "out.jsonl").exists()


async def test_those_who_need_memory_take_turns():
    room, log = ByteBudget(10), []
    async with room.taken(6), room.taken(4):
        assert room.left == 0
    with pytest.raises(ValueError):
        async with room.taken(10):
            raise ValueError
    assert room.left == 10 and log == []


# the command eval


def leaves(value, path=()):
    """The paths to all members of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inner:
        yield (*path, key)
        yield from leaves(member, (*path, key))


ODD = None, True, -1, 0.5, 10**30, "x", "", [], {}, [[]], {"a": 1}, "\ud800"


def spoiled(value, draw):
    """JSON with one member gone, doubled or of another type; or something else instead."""
    paths = [*leaves(value)]
    if not paths or draw.random() < 0.1:
        return draw.choice(ODD)
    *path, key = draw.choice(paths)
    place = value
    for name in path:
        place = place[name]
    way = draw.random()
    if way < 0.3:
        del place[key]
    elif way < 0.4 and isinstance(place, list):
        place.append(place[key])
    else:
        place[key] = draw.choice(ODD)
    return value


@contextmanager
def spoiling(url, seed):
    """A proxy that spoils some of a server's responses."""
    draw, lock = random.Random(seed), threading.Lock()
    share = draw.choice((0.1, 0.3, 1.0))

    def answer(method, path, body):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        with lock:
            if path == "/health" or draw.random() > share:
                return response.status, text
            way = draw.random()
            if way < 0.1:
                return response.status, draw.choice((b"", b"<html>", b"NaN", b"[" * 10_000, text[:-5] + b"cut", b"\xff"))
            if way < 0.15:
                return draw.choice((400, 404, 500)), text
            return response.status, json.dumps(spoiled(json.loads(text), draw)).encode()

    with serving(answer) as proxy:
        yield proxy


async def evaluated(url, suite, tmp_path, seed):
    """Whether it came to its end: no other exception than one of ours, in one line, is allowed."""
    try:
        await evaluate(Settings(command="eval", url=url, suite=str(suite), max_per_task=2 if suite == "chat" else 4, results=str(tmp_path / f"results-{seed}"), json=True,
                                text=str(tmp_path / "text.txt") if suite == "bpb" else None))
    except ChatServerError as error:
        assert str(error) and "\n" not in str(error)[:200]
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_eval_of_a_broken_server_ends_with_a_line(float_url, tmp_path, monkeypatch, capsys):
    """`eval` of a server that spoils its responses ends with a line."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    write_chat_data(tmp_path / "base")
    bundle = write_bundle(tmp_path / "bundle")
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 40)
    whole = 0
    for suite in (bundle, "chat", "bpb", "sample"):
        assert await evaluated(float_url, suite, tmp_path, "unspoiled")
        for seed in range(60):
            with spoiling(float_url, seed) as proxy:
                whole += await evaluated(proxy, suite, tmp_path, f"{seed}")
    assert whole < 120
    for line in capsys.readouterr().out.splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("body, said", [
    (b"<html>", "no JSON object"), (b"{}", "KeyError: 'tokens'"), (b'{"tokens": "x"}', '"x" is not a list of tokens'), (b'{"tokens": [1.5]}', "a list of 1 is not a list of tokens"), (b'{"tokens": [1, 2]}', "is not one token")])
async def test_a_wrong_token_is_named(tmp_path, body, said):
    model = {"id": "odd", "owned_by": "chat_server", "weights_digest": "0", "context_length": 64}

    def answer(method, path, asked):
        if path.startswith("/tokenizer_info"):
            return 200, b'{"bos_token": "<s>"}'
        return 200, json.dumps({"data": [model]}).encode() if method == "GET" else body

    with serving(answer) as url, pytest.raises(EngineFailure, match="does not answer like a chat_server: tokenize: ") as error:
        await evaluate(Settings(command="eval", url=url, suite="sample"))
    assert said in str(error.value)
