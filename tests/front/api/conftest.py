"""Servers that only answer: one for all files whose tests run in a process."""

import pytest

from real_server import server


@pytest.fixture(scope="session")
def default_url(default_model_path, tmp_path_factory):
    """The URL of a server of the default model, which keeps responses."""
    with server(default_model_path, "--database", tmp_path_factory.mktemp("kept") / "kept.db") as (_, url):
        yield url


@pytest.fixture(scope="session")
def tiny_url(nanochat_fixtures):
    """The URL of a server of a tiny model."""
    with server(nanochat_fixtures / "gen5") as (_, url):
        yield url
