"""Who may come in: API keys, other origins, host names, slow senders."""

import asyncio
import json
import logging
import pickle

import aiohttp
import pytest
import pytest_asyncio

import chat_server
from chat_server import ApiKey, ConfigError, RemotePool, Settings, parse_command_line, read_api_keys
from fake_pool import FakePool, conversation, serving

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"
KEYS = (ApiKey.hashed("alices-secret", "alice"), ApiKey.hashed("bobs-secret", "bob"))
ALICE, BOB = {"Authorization": "Bearer alices-secret"}, {"X-Api-Key": "bobs-secret"}


@pytest_asyncio.fixture
async def client():
    async with aiohttp.ClientSession() as session:
        yield session


# keys


@pytest.mark.parametrize("method, path", [
    ("POST", NATIVE), ("POST", OPENAI), ("GET", "/v1/models"), ("GET", "/models"), ("GET", "/v1/models/fake-model"),
    ("POST", "/v1/cancel/x"), ("GET", "/stats"), ("GET", "/nothing"), ("GET", "/v1/chat/completions"), ("GET", "/static/../stats"),
    ("GET", "//stats"), ("GET", "/%73tats"), ("GET", "/livez/../stats")])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"X-Api-Key": ""},
                                     {"Authorization": "Basic alices-secret"}, {"Authorization": "Bearer alices-secre"}])
async def test_without_a_right_key_everything_else_is_401(client, method, path, headers):
    pool = FakePool()
    async with serving(pool, Settings(keys=KEYS)) as url:
        target = aiohttp.client.URL(url + path, encoded=True)
        async with client.request(method, target, headers=headers, json=conversation()) as response:
            body = await response.json()
            if path.startswith("/static"):      # yarl has made /stats of it, or the file server refuses
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


async def test_the_page_and_the_health_checks_need_no_key(client):
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for path in ("/", "/static/chat.js", "/livez", "/readyz", "/health"):
            assert (await client.get(url + path)).status == 200, path


async def test_only_its_own_key_stops_an_answer(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, Settings(keys=KEYS)) as url:
        async with client.post(url + NATIVE, json=conversation(), headers=ALICE | {"X-Request-Id": "mine"}):
            assert pool.requests[0].client == "alice"
            assert (await client.post(url + "/v1/cancel/mine", headers=BOB)).status == 404
            assert (await client.post(url + "/v1/cancel/mine", headers=ALICE)).status == 200


def test_keys_come_from_flags_files_and_the_environment_and_only_hashes_stay(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nalice: sk-one\n\nsk-two\n")
    settings = parse_command_line(["--api-key-file", str(path), "--api-key", "sk-three"], {})
    assert settings.keys == (ApiKey.hashed("sk-three", "key-1"), ApiKey.hashed("sk-one", "alice"), ApiKey.hashed("sk-two", "line-4"))
    assert parse_command_line([], {"CHAT_SERVER_API_KEY": "a,b"}).keys == (ApiKey.hashed("a", "key-1"), ApiKey.hashed("b", "key-2"))
    assert "sk-" not in repr(settings) and b"sk-" not in pickle.dumps(settings)


@pytest.mark.parametrize("content", [None, "", "# only a comment\n", b"\xff\xfe"])
def test_a_key_file_without_keys_does_not_open_the_server(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError):
        read_api_keys((), str(path))
    with pytest.raises(ConfigError):
        read_api_keys(("",), None)


async def test_the_terminal_chat_brings_its_key_to_a_server():
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for key, fails in (("alices-secret", False), ("wrong", True)):
            settings = parse_command_line(["chat", "--url", url, "--api-key", key], {})
            pool = RemotePool(settings)
            await pool.start()
            request = chat_server.new_request(settings, messages=(chat_server.Message("user", "Hi"),))
            try:
                events = [event async for event in pool.answer(request)]
                assert not fails and events
            except chat_server.RequestError as error:
                assert fails and error.code == "invalid_api_key"
            await pool.close()


async def test_a_key_is_never_logged(client, caplog):
    with caplog.at_level(logging.DEBUG):
        async with serving(FakePool(), Settings(keys=KEYS)) as url:
            for headers in (ALICE, BOB, {"Authorization": "Bearer alices-secret-mistyped"}):
                await client.post(url + NATIVE, json=conversation(), headers=headers)
                await client.get(url + "/v1/models?api_key=alices-secret", headers=headers)
    assert "POST /chat/completions 200" in caplog.text and "secret" not in caplog.text


async def test_an_open_server_on_the_network_is_warned_about_and_a_locked_one_is_not(capsys):
    for host, keys in (("0.0.0.0", ()), ("0.0.0.0", KEYS), ("127.0.0.1", ())):
        chat_server.announce(FakePool(), Settings(host=host, keys=keys), 8000)
        assert ("Warning" in capsys.readouterr().out) == (host == "0.0.0.0" and not keys)
