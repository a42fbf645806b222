"""aiohttp.web is imported without aiohttp's clients, which come when something asks for them."""

import subprocess
import sys

import pytest

SERVES = """
import asyncio, json, sys, urllib.request
sys.path[:0] = ["tests/support"]
import chat_server
from chatlm.front.lazy import import_web
import_web()
found = ["aiohttp.connector" in sys.modules, "aiohttp.client" in sys.modules]
import fake_pool

async def main():
    async with fake_pool.serving(fake_pool.FakePool(["a"])) as url:
        ask = urllib.request.Request(url + "/chat/completions", json.dumps(fake_pool.conversation()).encode(),
                                     {"Content-Type": "application/json"})
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(ask).read())
        import aiohttp
        from aiohttp import ClientSession, web
        async with ClientSession() as client, client.get(url + "/health") as response:
            return b'"done": true' in answer, response.status, web is sys.modules["aiohttp.web"] is aiohttp.web, aiohttp.__version__ != ""

print(json.dumps([*found, *asyncio.run(main()), "aiohttp.connector" in sys.modules]))
"""


def run(code, path=None):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                           env={"PYTHONPATH": str(path)} if path else None)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_a_server_needs_no_clients():
    """They work all the same once they are asked for."""
    assert run(SERVES) == "[false, false, true, 200, true, true, true]"


WAYS = {
    "asks its package for a client": ("__version__ = '4.0'\nclass ClientError(Exception): pass\nfrom . import web\n",
                                      "from . import ClientError\nname = ClientError.__name__\n"),
    "asks it for a module that asks back": ("__version__ = '4.0'\nfrom .client import ClientError\n", "from . import ClientError\nname = ClientError.__name__\n"),
    "has its version elsewhere": ("from .version import __version__\nfrom .client import ClientError\n", "name = 'ClientError'\n"),
    "knows no version": ("from .client import ClientError\n", "name = 'ClientError'\n")}


@pytest.mark.parametrize("way", WAYS)
def test_an_aiohttp_that_needs_them_gets_them(way, tmp_path):
    """A future version may be put together in another way."""
    package = tmp_path / "aiohttp"
    package.mkdir()
    own, web = WAYS[way]
    (package / "__init__.py").write_text(own)
    (package / "version.py").write_text("__version__ = '4.0'\n")
    (package / "client.py").write_text("from . import web\nclass ClientError(Exception): pass\n")
    (package / "web.py").write_text("import sys\n" + web if "back" not in way else
                                    "def __getattr__(name):\n    from . import ClientError\n    return ClientError.__name__\n")
    code = ("import sys; sys.path.insert(0, '.'); from chatlm.front.lazy import import_web, web; import_web(); import aiohttp; "
            "print(web.name, aiohttp.ClientError.__name__)")
    assert run(code, tmp_path) == "ClientError ClientError"


def test_without_aiohttp_the_error_names_it(tmp_path):
    code = ("import sys; sys.path.insert(0, '.'); sys.modules['aiohttp'] = None\nfrom chatlm.front.lazy import import_web\n"
            "try: import_web()\nexcept Exception as error: print(type(error).__name__, error)")
    assert run(code).startswith("ConfigError chat_server needs the Python package")
