"""Servers that only answer: one for all files whose tests run in a process."""

import pytest

from real_server import server


@pytest.fixture(scope="session")
def default_server(default_model_path, tmp_path_factory):
    """(URL, first lines of its log) of a server of the default model, which keeps responses."""
    log = []
    with server(default_model_path, "--verbose", "--database", tmp_path_factory.mktemp("kept") / "kept.db", log=log) as (_, url):
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
