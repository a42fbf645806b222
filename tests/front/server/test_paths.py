"""A path with slashes too many is the path without them, and opens nothing that the other does not."""

import asyncio
import json
import re

import aiohttp
import pytest
from yarl import URL

from chatlm.common.config import ApiKey, Settings
from chatlm.front.front import ROUTES
from fake_pool import FakePool, conversation, serving

KEYS = (ApiKey.hashed("everything", "ann"), ApiKey.hashed("some", "bob", ("other-model",)))
SECRET = {"Authorization": "Bearer everything"}


async def asked(url, method, target, headers=None, body=b""):
    """(status, text) of a request whose target is sent as it stands, which no client library would do."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(body)}",
             *(f"{name}: {value}" for name, value in (headers or {}).items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, text = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), text, head


@pytest.mark.parametrize("target", ["//v1/models", "/v1//models", "///v1///models//", "//v1/models?x=//y", "http://a.example//v1//models"])
async def test_slashes_too_many_are_one(target):
    async with serving(FakePool()) as url:
        status, text, head = await asked(url, "GET", target)
        assert status == 200 and "fake-model" in text
        assert "X-Content-Type-Options: nosniff" in head and "X-Request-Id" in head     # as any other response


async def test_a_base_url_may_end_in_a_slash(client):
    """Whole and streamed answers come all the same."""
    pool = FakePool()
    async with serving(pool, Settings(prefix="/chat")) as url:
        for path in ("//chat//v1/chat/completions", "/chat//v1//chat/completions/"):
            for stream in (False, True):
                async with client.post(URL(url + path, encoded=True), json=conversation() | {"stream": stream}) as response:
                    assert response.status == 200 and "world!" in await response.text()
    assert len(pool.requests) == 4


@pytest.mark.parametrize("method, path", [(route.method, route.pattern) for route in ROUTES if not route.open])
async def test_no_spelling_of_a_path_avoids_a_key(method, path):
    """Whatever is in front of it or in it, a route that needs a key is refused without one, or not there."""
    path = re.sub(r"{\w+}", "x", path)
    inner = path[1:]
    spellings = ["/" + path, "//" + path, path.replace("/", "//"), "/." + path, "/./" + path, "/livez/.." + path, "/livez/%2e%2e" + path,
                 "/%2f" + inner, "/%2F%2f" + inner, "/static/.." + path, "/static//.." + path, "//livez/.." + path, "/livez//" + path,
                 "/livez;" + path, "/livez?" + path, "/livez%00" + path, "/livez%3f" + path, "/livez#" + path, path.replace("/", "/%2f"),
                 "/\\" + inner, "http://x//livez/.." + path, "http://livez" + path, "//static/x@h" + path]
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for spelling in spellings:
            status, text, _ = await asked(url, method, spelling)
            opened = spelling.startswith(("/livez?", "/livez#")) and method == "GET"
            assert status in ((200,) if opened else (400, 401, 404, 405)), (spelling, status, text)
            assert "fake-model" not in text and "models" not in text or opened or "there is no" in text


async def test_slashes_give_a_limited_key_nothing():
    """They give a key that is no operator's nothing either."""
    async with serving(FakePool(), Settings(keys=KEYS)) as url:
        for path in ("/models/load", "//models/load", "/models//unload", "//models///delete", "//api//pull"):
            status, text, _ = await asked(url, "POST", path, {"Authorization": "Bearer some"}, b'{"model": "fake-model"}')
            assert status == 403 and "limited to some models" in text, text
        status, text, _ = await asked(url, "GET", "//v1//models", {"Authorization": "Bearer some"})
        assert (status, json.loads(text)["data"]) == (200, [])
        status, text, _ = await asked(url, "GET", "//v1/models/fake-model", {"Authorization": "Bearer some"})
        assert status == 404
    async with serving(FakePool()) as url:          # without keys, only this machine, and no proxy
        assert (await asked(url, "POST", "//models//load", {"X-Forwarded-For": "8.8.8.8"}, b"{}"))[0] == 403


async def test_percent_and_dots_are_not_read_as_slashes():
    async with serving(FakePool()) as url:
        for target in ("/v1%2fmodels", "/v1/%2e/models", "/v1/./models", "/v1/../v1/models", "/%2fv1/models"):
            assert (await asked(url, "GET", target))[0] == 404, target
        status, text, _ = await asked(url, "GET", "//nothing//here")
        assert status == 404 and "there is no /nothing/here" in text


async def test_the_real_server_reads_odd_paths_too(default_url):
    status, text, _ = await asked(default_url, "GET", "//v1//models")
    assert status == 200 and "SmolLM2" in text
    body = json.dumps(conversation("Hi") | {"max_tokens": 3}).encode()
    async with aiohttp.ClientSession() as client:
        async with client.post(URL(default_url + "//v1/chat/completions", encoded=True), data=body) as response:
            assert response.status == 200 and (await response.json())["choices"]
