"""Servers that many modules ask: one of each kind, as long as the session, for all tests of a process.

What a test leaves, others find. So it uses names of its own, and compares what was there before and after.
A test that ends a server, restarts it, counts all that it did or needs other flags starts its own.
"""

import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest

import fake_tools
from real_server import server

KEYS = "first-key", "second-key"


@dataclass(frozen=True)
class KeepingServer:
    """A server with a database."""

    url: str
    database: Path
    process: Popen

    def copy_database(self, folder):
        """The path of a copy, for another server."""
        copy = folder / "copy.db"
        with closing(sqlite3.connect(self.database)) as ours, closing(sqlite3.connect(copy)) as theirs:
            ours.backup(theirs)
        return copy


@pytest.fixture(scope="session")
def default_server(default_model_path, tmp_path_factory):
    """(URL, first lines of its log) of a server of the default model, which keeps responses."""
    database = tmp_path_factory.mktemp("kept") / "kept.db"
    log = []
    with server(default_model_path, "--verbose", "--database", database, log=log) as (_, url):
        yield url, log


@pytest.fixture(scope="session")
def default_url(default_server):
    return default_server[0]


@pytest.fixture(scope="session")
def short_url(default_model_path):
    """The URL of a server of the default model with a context of 512 tokens and the name gpt-4o."""
    with server(default_model_path, "--context-length", "512", "--served-model-name", "gpt-4o") as (_, url):
        yield url


@pytest.fixture(scope="session")
def tiny_url(nanochat_fixtures):
    """The URL of a server of a tiny model."""
    with server(nanochat_fixtures / "gen5") as (_, url):
        yield url


@pytest.fixture(scope="session")
def float_url(nanochat_fixtures):
    """The URL of a server of a tiny model named `tiny` in float32, whose scores are those of a command."""
    with server(nanochat_fixtures / "gen5", "--dtype", "float32", "--served-model-name", "tiny") as (_, url):
        yield url


@pytest.fixture(scope="session")
def keeping_server(nanochat_fixtures, tmp_path_factory):
    """A server of a tiny model that keeps responses, files and chats."""
    database = tmp_path_factory.mktemp("keeping") / "store.db"
    with server(nanochat_fixtures / "gen5", f"--database={database}") as (process, url):
        yield KeepingServer(url, database, process)


@pytest.fixture(scope="session")
def two_keys_server(nanochat_fixtures, tmp_path_factory):
    """A keeping_server for the owners of two KEYS."""
    database = tmp_path_factory.mktemp("two-keys") / "store.db"
    flags = [f"--api-key={key}" for key in KEYS]
    with server(nanochat_fixtures / "gen5", f"--database={database}", *flags) as (process, url):
        yield KeepingServer(url, database, process)


def logging_tools(folder):
    """A tool server that writes a line of the file `calls` for each call of its tool `pick`."""
    return {"command": sys.executable, "args": [fake_tools.__file__, "log", str(folder / "calls")]}


@pytest.fixture(scope="session")
def tools_server(default_model_path, tmp_path_factory):
    """A server of the default model with a database and tools: `asks` runs after a yes, the others at once."""
    folder = tmp_path_factory.mktemp("tools_server")
    tools = logging_tools(folder)
    allowed = {"alwaysAllow": ["*"]}
    many = {"command": sys.executable, "args": [fake_tools.__file__, "many"]}
    servers = {"fake": tools | allowed, "asks": tools, "many": many | allowed}
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    flags = "--mcp-config", folder / "mcp.json", "--kv-cache-memory", "64M", "--max-batch", "2"
    with server(default_model_path, f"--database={folder / 'kept.db'}", *flags) as (process, url):
        yield KeepingServer(url, folder / "kept.db", process)


@pytest.fixture(scope="session")
def knowing_server(default_model_path, default_embedder_path, tmp_path_factory):
    """A server of the default model and the real all-MiniLM-L6-v2, with tools, for the owners of two KEYS.

    Tests of it kill its workers: others come, and lose nothing."""
    folder = tmp_path_factory.mktemp("knowing")
    tools = logging_tools(folder) | {"alwaysAllow": ["*"]}
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"fake": tools}}))
    (folder / "keys").write_text("".join(f"{key}: {key} tools=*\n" for key in KEYS))
    (folder / "keys").chmod(0o600)
    flags = "--mcp-config", folder / "mcp.json", "--api-key-file", folder / "keys"
    with server(default_model_path, "--embedder", f"--database={folder / 'k.db'}", *flags) as (process, url):
        yield KeepingServer(url, folder / "k.db", process)
