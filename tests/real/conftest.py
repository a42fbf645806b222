"""Real models of other people (tests/support/real_models.py). All tests here are slow: the models take half a gigabyte each."""

import pytest

from real_models import CannotBeHad, real_model
from real_server import server

QWEN, GEMMA = "qwen-0.5b", "gemma-270m"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/real/" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.slow)


def model_or_skip(name):
    try:
        return real_model(name)
    except CannotBeHad as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def qwen():
    return model_or_skip(QWEN)


@pytest.fixture(scope="session")
def gemma():
    return model_or_skip(GEMMA)


@pytest.fixture(scope="session")
def qwen_url(qwen):
    with server(qwen, "--max-batch", 8) as (_, url):
        yield url


@pytest.fixture(scope="session")
def gemma_url(gemma):
    with server(gemma, "--max-batch", 8) as (_, url):
        yield url
