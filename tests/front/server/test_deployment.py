"""docs/deployment.md, as far as this machine can run it: behind nginx, checked by systemd-analyze."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import aiohttp
import pytest

import chat_server
from chatlm.common.config import Settings
from fake_pool import FakePool, conversation, frames, serving
from real_server import free_port

DEPLOYMENT = (Path(chat_server.__file__).parent / "docs" / "deployment.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx (Debian: apt install nginx-light)")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", DEPLOYMENT, re.DOTALL)[1]


@contextlib.asynccontextmanager
async def behind_nginx(folder, pool, **settings):
    """The URL of an nginx with its location block; behind it, with --prefix /chat, the real HTTP
    side over `pool`."""
    port = free_port()
    async with serving(pool, Settings(prefix="/chat", host="127.0.0.1", **settings)) as url:
        location = block("nginx").replace("http://127.0.0.1:8000", url)
        paths = "".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(f"daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;\n"
                                           "events {} http { access_log off; " + paths +
                                           f"server {{ listen 127.0.0.1:{port}; {location} }} }}")
        process = await asyncio.create_subprocess_exec(NGINX, "-p", folder, "-c", folder / "nginx.conf", stderr=subprocess.PIPE)
        try:
            while True:
                with contextlib.suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                assert process.returncode is None, (await process.stderr.read()).decode()
                await asyncio.sleep(0)
            yield f"http://127.0.0.1:{port}/chat"
        finally:
            process.terminate()
            await process.communicate()


@needs_nginx
async def test_behind_nginx_the_page_and_both_apis_work(tmp_path):
    async with behind_nginx(tmp_path, FakePool()) as url, aiohttp.ClientSession() as client:
        async with client.get(url + "/") as page:
            assert 'href="static/"' in await page.text()
        assert (await client.get(url + "/static/chat.js")).status == 200
        async with client.get(url) as redirected:       # nginx itself adds the slash
            assert redirected.status == 200 and str(redirected.url).endswith("/chat/")
        for path, body in (("/chat/completions", conversation()), ("/v1/chat/completions", conversation() | {"stream": True})):
            async with client.post(url + path, json=body, headers={"X-Request-Id": "traced"}) as response:
                assert response.headers["X-Request-Id"] == "traced" and len(frames(await response.read())) >= 4
        assert (await client.post(url + "/v1/chat/completions", json={})).status == 400


@needs_nginx
async def test_behind_nginx_only_own_pages_may_post(tmp_path):
    pool, names = FakePool(), {"allowed_host": ("chat.example",)}
    async with behind_nginx(tmp_path, pool, **names) as url, aiohttp.ClientSession() as client:
        port = url.split(":")[2].split("/")[0]

        async def post(host, origin):
            headers = {"Host": host, "Origin": origin}
            response = await client.post(url + "/chat/completions", json=conversation(), headers=headers)
            await response.read()
            return response.status

        for host in (f"127.0.0.1:{port}", f"chat.example:{port}", "chat.example", "localhost"):
            assert await post(host, f"http://{host}") == 200, host
        assert await post("chat.example", "https://chat.example") == 200        # nginx may speak TLS
        assert len(pool.requests) == 5
        for origin in ("https://evil.example", "http://127.0.0.1:1", "http://127.0.0.1", "null"):
            assert await post(f"127.0.0.1:{port}", origin) == 403, origin
        assert await post("evil.example", "http://evil.example") == 403
        assert len(pool.requests) == 5


@needs_nginx
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt install chromium-headless-shell)")
async def test_the_page_chats_through_nginx_by_name(tmp_path):
    """The page chats through nginx under a name of its own."""
    playwright = pytest.importorskip("playwright.async_api")
    nginx = behind_nginx(tmp_path, FakePool(), allowed_host=("chat.test",))
    async with nginx as url, playwright.async_playwright() as driver:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP chat.test 127.0.0.1"]
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = await browser.new_page()
        await page.goto(url.replace("127.0.0.1", "chat.test") + "/")
        await page.get_by_role("textbox", name="Message").fill("hello")
        await page.get_by_role("button", name="Send").click()
        await playwright.expect(page.get_by_role("log")).to_contain_text("Hello, world!")
        await browser.close()


class FirstPieceFree:
    """A gate that passes one piece and holds the others."""

    def __init__(self):
        self.used, self.rest = False, asyncio.Event()

    async def wait(self):
        if self.used:
            await self.rest.wait()
        self.used = True


@needs_nginx
async def test_nginx_passes_each_piece_on_at_once(tmp_path):
    """It also tells when the client leaves."""
    pool = FakePool(["one", "two"], gate=FirstPieceFree())
    async with behind_nginx(tmp_path, pool) as url, aiohttp.ClientSession() as client:
        async with client.post(url + "/chat/completions", json=conversation()) as response:
            assert b"one" in await response.content.readuntil(b"\n\n")         # the second is still held
            pool.gate.rest.set()
            assert frames(await response.read())[-1]["done"]
        pool.gate = asyncio.Event()
        async with client.post(url + "/chat/completions", json=conversation()) as response:     # headers, and no piece
            response.close()
        await pool.until_open(0)


@needs_nginx
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
async def test_an_http2_upgrade_does_not_hang(tmp_path):
    """It hangs neither behind nginx nor without it."""
    async with behind_nginx(tmp_path, FakePool()) as proxied, serving(FakePool()) as direct:
        for url in (proxied, direct):
            curl = await asyncio.create_subprocess_exec(
                "curl", "-sS", "--max-time", "30", "--http2", "-d", json.dumps(conversation()), url + "/chat/completions",
                stdout=subprocess.PIPE)
            answer, _ = await curl.communicate()
            assert curl.returncode == 0 and frames(answer)[-1]["done"]
