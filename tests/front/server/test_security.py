"""Who may come in: API keys, other origins, host names, slow senders."""

import asyncio
import contextlib
import json
import logging
import pickle

import aiohttp
import pytest

from chatlm.common.config import ApiKey, Settings, read_api_keys
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.messages.requests import Message
from chatlm.front.serve import announce
from chatlm.front.server import connections, streams
from chatlm.terminal.chat import new_request
from chatlm.terminal.remote import RemotePool
from command_line import parse_command_line
from fake_pool import FakePool, conversation, serving
from patching import patch

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"
KEYS = (ApiKey.hashed("alices-secret", "alice"), ApiKey.hashed("bobs-secret", "bob"))
ALICE, BOB = {"Authorization": "Bearer alices-secret"}, {"X-Api-Key": "bobs-secret"}


# keys


@pytest.mark.parametrize("method, path", [
    ("POST", NATIVE), ("POST", OPENAI), ("GET", "/v1/models"), ("GET", "/models"), ("GET", "/v1/models/fake-model"),
    ("POST", "/v1/cancel/x"), ("GET", "/stats"), ("GET", "/nothing"), ("GET", "/v1/chat/completions"), ("GET", "/static/../stats"),
    ("GET", "//stats"), ("GET", "/%73tats"), ("GET", "/livez/../stats")])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"X-Api-Key": ""},
                                     {"Authorization": "Basic alices-secret"}, {"Authorization": "Bearer alices-secre"}])
async def test_without_a_right_key_all_else_is_401(client, method, path, headers):
    pool = FakePool()
    async with serving(pool, Settings(keys=KEYS)) as url:
        target = aiohttp.client.URL(url + path, encoded=True)
        async with client.request(method, target, headers=headers, json=conversation()) as response:
            body = await response.json()
            if path.startswith("/static"):      # yarl turns it into /stats, or the file server refuses it
                assert response.status in (401, 403, 404)
                return
            assert response.status == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    assert body["error"]["code"] == "invalid_api_key" and "secret" not in json.dumps(body) and not pool.requests


@pytest.mark.parametrize("headers", [ALICE, BOB, {"Authorization": "bearer  alices-secret "}])
async def test_any_of_the_keys_opens_in_either_header(client, headers):
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for path in (NATIVE, OPENAI):
            async with client.post(url + path, json=conversation(), headers=headers) as response:
                assert response.status == 200
        assert (await client.get(url + "/v1/models", headers=headers)).status == 200


async def test_page_and_health_need_no_key(client):
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for path in ("/", "/static/chat.js", "/livez", "/readyz", "/health"):
            assert (await client.get(url + path)).status == 200, path


async def test_only_its_own_key_stops_an_answer(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, Settings(keys=KEYS)) as url:
        async with client.post(url + NATIVE, json=conversation(), headers=ALICE | {"X-Request-Id": "mine"}):
            assert pool.requests[0].client == "alice"
            assert (await client.post(url + "/v1/cancel/mine?reasoning=true", headers=BOB)).status == 404 and not pool.hurried
            assert (await client.post(url + "/v1/cancel/mine?reasoning=true", headers=ALICE)).status == 200
            assert (await client.post(url + "/v1/cancel/mine", headers=BOB)).status == 404
            assert (await client.post(url + "/v1/cancel/mine", headers=ALICE)).status == 200
        body = conversation() | {"variants": [{}, {"seed": 1}]}
        async with client.post(url + "/v1/compare", json=body, headers=ALICE | {"X-Request-Id": "both"}):
            for name in ("both", "both-0", "both?reasoning=true"):
                assert (await client.post(url + "/v1/cancel/" + name, headers=BOB)).status == 404
            assert (await client.post(url + "/v1/cancel/both", headers=ALICE)).status == 200


def test_keys_come_from_flags_files_and_environment(tmp_path):
    """Only their hashes stay."""
    path = tmp_path / "keys"
    path.write_text("# people\nalice: sk-one\n\nsk-two\ncarol: sk:four\n")
    settings = parse_command_line(["--api-key-file", str(path), "--api-key", "sk-three"], {})
    assert settings.keys == (ApiKey.hashed("sk-three", "key-1"), ApiKey.hashed("sk-one", "alice"), ApiKey.hashed("sk-two", "line-4"),
                             ApiKey.hashed("sk:four", "carol"))
    assert parse_command_line([], {"CHAT_SERVER_API_KEY": "a,b"}).keys == (ApiKey.hashed("a", "key-1"), ApiKey.hashed("b", "key-2"))
    assert "sk-" not in repr(settings) and b"sk-" not in pickle.dumps(settings)


def test_a_key_may_have_colons(tmp_path):
    """No part of it is a name."""
    path = tmp_path / "keys"
    path.write_text("carol: sk:with:colons\n")
    assert read_api_keys((), str(path)) == (ApiKey.hashed("sk:with:colons", "carol"),)


@pytest.mark.parametrize("content", [None, "", "# only a comment\n", b"\xff\xfe", "alice: sk-one\nbob:\n", "alice: sk-one\n:\n"])
def test_a_file_without_keys_opens_no_server(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError):
        read_api_keys((), str(path))
    with pytest.raises(ConfigError):
        read_api_keys(("",), None)


async def test_the_terminal_chat_brings_its_key():
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for key, fails in (("alices-secret", False), ("wrong", True)):
            settings = parse_command_line(["chat", "--url", url, "--api-key", key], {})
            pool = RemotePool(settings)
            await pool.start()
            request = new_request(settings, messages=(Message("user", "Hi"),))
            try:
                events = [event async for event in pool.answer(request)]
                assert not fails and events
            except RequestError as error:
                assert fails and error.code == "invalid_api_key"
            await pool.close()


async def test_a_key_is_never_logged(client, caplog):
    with caplog.at_level(logging.DEBUG):
        async with serving(FakePool(), Settings(keys=KEYS)) as url:
            for headers in (ALICE, BOB, {"Authorization": "Bearer alices-secret-mistyped"}):
                await client.post(url + NATIVE, json=conversation(), headers=headers)
                await client.get(url + "/v1/models?api_key=alices-secret", headers=headers)
    assert "POST /chat/completions 200" in caplog.text and "secret" not in caplog.text


async def test_an_open_server_on_the_network_is_warned_of(capsys):
    """A locked one is not."""
    for host, keys in (("0.0.0.0", ()), ("0.0.0.0", KEYS), ("127.0.0.1", ())):
        announce(FakePool(), Settings(host=host, keys=keys), 8000)
        assert ("Warning" in capsys.readouterr().out) == (host == "0.0.0.0" and not keys)


# other origins


def preflight(client, url, origin, **headers):
    return client.options(url + NATIVE, headers={"Origin": origin, "Access-Control-Request-Method": "POST",
                                                 "Access-Control-Request-Headers": "authorization, x-stainless-os", **headers})


@pytest.mark.parametrize("origin", ["https://chat.example.org", "null", "http://127.0.0.1:3000"])
async def test_by_default_other_origins_may_do_nothing(client, origin):
    pool = FakePool()
    async with serving(pool) as url:
        answers = [await preflight(client, url, origin), await client.get(url + "/v1/models", headers={"Origin": origin}),
                   await client.post(url + NATIVE, json=conversation(), headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})]
        headers = {"Origin": origin, "Content-Type": "text/plain"}          # as browsers do for plain http
        for path in (NATIVE, OPENAI, "/v1/completions", "/tokenize", "/v1/cancel/x", "/", "/nothing"):
            answers.append(await client.post(url + path, json=conversation(), headers=headers))
    assert {answer.status for answer in answers} == {403} and not pool.requests
    assert not any(name.startswith("Access-Control") for answer in answers for name in answer.headers)


@pytest.mark.parametrize("allowed, origin, admitted", [
    ("https://a.example", "https://a.example", True), ("https://a.example", "https://b.example", False),
    ("https://a.example", "https://a.example.evil", False), ("https://a.example", "null", False), ("null", "null", True),
    ("null", "https://a.example", False), ("*", "https://a.example", True), ("*", "null", True)])
async def test_a_named_origin_passes_the_preflight(client, allowed, origin, admitted):
    """It needs no key there, and reads even errors."""
    async with serving(FakePool(), Settings(keys=KEYS, cors_origin=("https://other.example", allowed))) as url:
        asked = await preflight(client, url, origin, **{"Access-Control-Request-Private-Network": "true"})
        assert asked.status == (204 if admitted else 403)
        if admitted:
            assert asked.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
            assert "POST" in asked.headers["Access-Control-Allow-Methods"] and asked.headers["Access-Control-Allow-Private-Network"] == "true"
        for path, headers, status in ((NATIVE, {}, 401), (NATIVE, ALICE, 200), (OPENAI, ALICE, 200), ("/nothing", ALICE, 404)):
            async with client.post(url + path, json=conversation(), headers=headers | {"Origin": origin}) as response:
                assert response.status == (status if admitted else 403)
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if admitted else None)
                assert ("X-Request-Id" in response.headers.get("Access-Control-Expose-Headers", "")) == admitted
                assert response.headers["Vary"] == "Origin" and "Access-Control-Allow-Credentials" not in response.headers
        cross = await client.post(url + NATIVE, json=conversation(), headers=ALICE | {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
        assert cross.status == (200 if admitted else 403)


async def test_page_and_programs_are_no_other_origin(client):
    async with serving(FakePool()) as url:
        same = {"Origin": url, "Sec-Fetch-Site": "same-origin"}
        for headers in (same, {"Sec-Fetch-Site": "none"}, {}, {"Origin": url}):
            assert (await client.post(url + NATIVE, json=conversation(), headers=headers)).status == 200


OWN = [         # Host, Origin
    ("box:8000", "http://box:8000"), ("BOX:8000", "http://box:8000"), ("box.:8000", "http://box:8000"),
    ("box", "http://box"), ("box", "https://box"), ("box:443", "https://box"), ("box:80", "http://box"),
    ("127.0.0.1:8000", "http://127.0.0.1:8000"), ("[2001:db8::1]:8000", "http://[2001:db8::1]:8000"),
    ("[2001:DB8::1]", "https://[2001:db8::1]"),
    ("10.0.0.5:8000", "https://chat.example"), ("10.0.0.5:8000", "http://chat.example"),        # --allowed-host
    ("10.0.0.5:8000", "https://CHAT.example:443")]
FOREIGN = [
    ("box:8000", "http://box"), ("box", "http://box:8000"), ("box:8000", "http://box:8001"),
    ("box:8000", "http://evil:8000"), ("box:8000", "http://box.evil:8000"), ("box:8000", "http://evil.box:8000"),
    ("127.0.0.1:8000", "http://localhost:8000"), ("127.0.0.1:8000", "http://127.0.0.2:8000"),
    ("[2001:db8::1]:8000", "http://[2001:db8::2]:8000"), ("box:8000", "null"), ("null", "null"), ("box:8000", ""),
    ("", ""), ("box:8000", "box:8000"), ("box:8000", "ftp://box:8000"), ("box:8000", "http://box:8000/"),
    ("box:8000", "http://box:8000, http://evil"), ("10.0.0.5:8000", "http://chat.example:3000"),
    ("10.0.0.5:8000", "https://other.chat.example")]


@pytest.mark.parametrize("host, origin", OWN + FOREIGN)
@pytest.mark.parametrize("path", ["/v1/models", NATIVE])
async def test_an_origin_is_own_by_name_and_port(client, host, origin, path):
    """Its scheme does not matter."""
    async with serving(FakePool(), parse_command_line(["--allowed-host", "Chat.Example"], {})) as url:
        headers, method = {"Host": host, "Origin": origin}, "POST" if path == NATIVE else "GET"
        async with client.request(method, url + path, json=conversation(), headers=headers) as response:
            if (host, origin) in OWN:
                assert response.status == 200
            else:
                assert response.status == 403 and "origin_not_allowed" in await response.text()


async def test_a_browser_may_refute_an_own_origin(client):
    """A server behind TLS and a page that came by plain http, which anybody on the way may have written."""
    pool = FakePool()
    async with serving(pool) as url:
        headers = {"Host": "chat.example", "Origin": "http://chat.example", "Sec-Fetch-Site": "cross-site"}
        assert (await client.post(url + NATIVE, json=conversation(), headers=headers)).status == 403
    assert not pool.requests


@pytest.mark.parametrize("wrong", ["https://a.example/", "a.example", "https://a.example/path", ""])
def test_an_origin_with_a_path_is_refused(wrong):
    """The server does not start."""
    with pytest.raises(ConfigError, match="origin"):
        parse_command_line([f"--cors-origin={wrong}"], {})


# host names


@pytest.mark.parametrize("name, status", [
    ("localhost:8000", 200), ("127.0.0.1", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("chat.example", 200),
    ("localhost.:8000", 200), ("Chat.Example.", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("[::2]", 403),
    ("x y", 403), ("", 403)])
async def test_loopback_answers_only_this_machine_s_names(client, name, status):
    for settings in (Settings(host="127.0.0.1", allowed_host=("chat.example",)), Settings(host="localhost", allowed_host=("chat.example",))):
        async with serving(FakePool(), settings) as url:
            async with client.get(url + "/", headers={"Host": name}) as response:
                assert response.status == status
    async with serving(FakePool(), Settings(host="0.0.0.0")) as url:
        assert (await client.get(url + "/", headers={"Host": "any.example"})).status == 200


@pytest.mark.parametrize("name, status", [
    ("chat.example", 200), ("chat.example:8000", 200), ("localhost", 200), ("192.0.2.7:8000", 200), ("[2001:db8::7]:8000", 200), ("gpu-box:8000", 200),
    ("evil.example", 403), ("192.0.2.7.evil.example", 403), ("192.0.2", 403), ("0x7f.1", 403)])
async def test_an_allowed_host_keeps_other_names_out(client, name, status):
    """They are kept out on every address."""
    async with serving(FakePool(), Settings(host="0.0.0.0", allowed_host=("chat.example",))) as url:
        async with client.get(url + "/", headers={"Host": name}) as response:
            assert response.status == status


async def test_responses_have_security_headers(client):
    """None of them tells a version."""
    async with serving(FakePool()) as url:
        for method, path in (("GET", "/"), ("GET", "/static/chat.js"), ("GET", "/nothing"), ("POST", NATIVE), ("GET", "/health")):
            async with client.request(method, url + path, json=conversation()) as response:
                for name in ("Content-Security-Policy", "Cross-Origin-Resource-Policy", "Referrer-Policy"):
                    assert name in response.headers, (path, name)
                assert response.headers["X-Content-Type-Options"] == "nosniff" and response.headers["Server"] == "chat_server"


# slow senders


async def connect(url):
    return await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))


@pytest.mark.parametrize("sent", [b"", b"POST /chat/compl", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_connection_without_a_header_is_closed(monkeypatch, sent):
    """A header that is cut does not count."""
    patch(monkeypatch, connections, "HEADER_S", 0.05)
    async with serving(FakePool()) as url:
        reader, writer = await connect(url)
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()


async def until_header_time_is_over(url):
    """Wait until the server has closed a connection that sent nothing."""
    reader, writer = await connect(url)
    assert await reader.read() == b""
    writer.close()


async def test_a_used_connection_may_be_silent_longer(client, monkeypatch):
    """A connection that has brought a request may be silent for longer."""
    patch(monkeypatch, connections, "HEADER_S", 0.05)
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        reader, writer = await connect(url)             # a running answer, while another connection is swept
        body = json.dumps(conversation()).encode()
        writer.write(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await pool.until_open(1)
        await until_header_time_is_over(url)
        pool.gate.set()
        assert b'"done": true' in await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()


async def test_later_headers_have_the_same_time_limit(monkeypatch):
    """Every later request has no longer for its header."""
    patch(monkeypatch, connections, "HEADER_S", 0.05)
    async with serving(FakePool()) as url:
        reader, writer = await connect(url)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b'{"alive": true}')
        await until_header_time_is_over(url)
        # no byte of it had come, so it may begin now
        for part in (b"GET /livez HTTP/1.1\r\nHo", b"st: x\r\n\r\n"):
            writer.write(part)
        await reader.readuntil(b'{"alive": true}')

        async def drip():
            for _ in range(8000):
                writer.write(b"x")
                await asyncio.sleep(0.001)
        writer.write(b"GET / HTTP/1.1\r\nX-Slow: ")
        dripping = asyncio.create_task(drip())              # new bytes do not buy time
        with contextlib.suppress(ConnectionError):          # sending to a closed connection resets it
            assert await reader.read() == b""
        assert not dripping.done()
        dripping.cancel()
        writer.close()


async def test_a_connection_is_kept_only_for_a_while(monkeypatch):
    """The limit holds between requests."""
    patch(monkeypatch, connections, "KEEP_ALIVE_S", 0.05)
    async with serving(FakePool()) as url:
        reader, writer = await connect(url)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).endswith(b'{"alive": true}')
        writer.close()


async def test_a_slow_body_is_not_taken_for_a_header(client, monkeypatch):
    """An answer that takes long is not taken for one either."""
    patch(monkeypatch, connections, "HEADER_S", 0.05)
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        reader, writer = await connect(url)
        body = json.dumps(conversation()).encode()
        writer.write(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:5])
        for rest in (body[5:9], body[9:]):
            await until_header_time_is_over(url)
            writer.write(rest)
        await pool.until_open(1)
        # what comes early waits its turn
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HT")
        await until_header_time_is_over(url)
        pool.gate.set()
        assert b'"done": true' in await reader.readuntil(b"\r\n0\r\n\r\n")
        await reader.readuntil(b'{"alive": true}')
        writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b'{"alive": true}')
        writer.close()


async def test_a_body_that_pauses_is_408(monkeypatch):
    patch(monkeypatch, streams, "BODY_S", 0.05)
    async with serving(FakePool()) as url:
        reader, writer = await connect(url)
        writer.write(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"messages"')
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408 ")
        writer.close()


# what aiohttp would answer by itself


async def exchange(url, request):
    """(status, header, body) of the response to raw bytes after which the connection ends."""
    reader, writer = await connect(url)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    header, _, body = answer.partition(b"\r\n\r\n")
    return int(header[9:12]), header, body


def posted(header=b"", path=b"/v1/chat/completions", body=json.dumps(conversation()).encode()):
    length = b"" if b"Content-Length" in header or b"chunked" in header else b"Content-Length: %d\r\n" % len(body)
    return b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s%s\r\n%s" % (path, header, length, body)


@pytest.mark.parametrize("expected", [b"\xe9", b"\xff\xfe", "jeżeli".encode(), b"more", b"100-continue, more", b"100-continue\xa0"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/chat/completions", b"/nothing", b"/livez"])
async def test_an_unknown_expectation_is_417(expected, path):
    pool = FakePool()
    async with serving(pool) as url:
        status, header, body = await exchange(url, posted(b"Expect: " + expected + b"\r\n", path))
    error = json.loads(body)
    assert status == 417 and error["error"]["code"] == "expectation_failed" and error["detail"] and not pool.requests
    assert b"X-Content-Type-Options: nosniff" in header and b"Server: chat_server\r\n" in header + b"\r\n"


@pytest.mark.parametrize("expected", [b"100-continue", b"100-Continue"])
async def test_a_client_waiting_for_100_is_told_to_go_on(expected):
    async with serving(FakePool()) as url:
        reader, writer = await connect(url)
        request = posted(b"Expect: " + expected + b"\r\n")
        header, body = request.split(b"\r\n\r\n")
        writer.write(header + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


GET = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n"


@pytest.mark.parametrize("request_", [
    posted(b"Content-Length: 5, 5\r\n"), posted(b"Content-Length: +5\r\n"), posted(b"Content-Length: -5\r\n"),
    posted(b"Content-Length: 5\r\nContent-Length: 6\r\n"), posted(b"Content-Length: 0x5\r\n"), posted(b"Content-Length: " + b"9" * 30 + b"\r\n"),
    posted(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), posted(b"Transfer-Encoding: chunked\r\n", body=b"zz\r\n\r\n"),
    GET % (b"/\xe9", b""), GET % (b"/?\xff", b""), GET % (b"http://\xff/livez", b""), GET % (b"livez", b""), b"GET /livez HTTP/1.1\r\n\r\n",
    GET % (b"/livez", b"Host: y\r\n"), GET % (b"/livez", b"X: " + b"a" * 9000 + b"\r\n"), GET % (b"/livez", b"X: a\r\n" * 200),
    GET % (b"/" + b"a" * 9000, b""), GET % (b"/livez", b"X: a\x00b\r\n"), GET % (b"/livez", b"X : a\r\n"), GET % (b"/livez", b"X: a\r\n b\r\n"),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_what_is_no_http_is_400_in_our_form(request_):
    pool = FakePool()
    async with serving(pool) as url:
        status, header, body = await exchange(url, request_)
    assert status == 400 and json.loads(body)["error"]["code"] == "bad_request" and not pool.requests
    assert b"Content-Type: application/json" in header and b"X-Content-Type-Options: nosniff" in header


@pytest.mark.parametrize("name", [b"X-Request-Id", b"Authorization", b"X-Api-Key", b"Origin", b"Host", b"Content-Type", b"Cookie", b"Accept-Encoding",
                                  b"Range", b"If-Range", b"If-None-Match", b"If-Modified-Since", b"Upgrade", b"Forwarded", b"Access-Control-Request-Headers"])
@pytest.mark.parametrize("value", [b"\xff\xfe", "é\u2028".encode(), b"Bearer \xff", b"a" * 8000])
async def test_no_header_value_is_too_odd(caplog, name, value):
    async with serving(FakePool(), Settings(cors_origin=("*",))) as url:
        for path in (b"/livez", b"/static/chat.js", b"/static/%00", b"/v1/models/%ff", b"/v1/streams/%ed%a0%80"):
            asked = b"OPTIONS %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: null\r\nAccess-Control-Request-Method: POST\r\n\r\n" % path
            for request in (GET % (path, b""), asked):
                lines = [line for line in request.split(b"\r\n") if not line.startswith(name + b": ")]
                status, header, _ = await exchange(url, b"\r\n".join([lines[0], name + b": " + value, *lines[1:]]))
                assert status < 500 and header.isascii(), path
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
