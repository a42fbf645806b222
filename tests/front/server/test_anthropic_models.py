"""Anthropic's clients list models as their API has them; OpenAI's, on the same route, as theirs."""

import datetime
import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
from real_server import get, server
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

NAMES = [f"model{number}" for number in range(5)]
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    paths = [write_gguf(folder / f"{name}.gguf", random_llama(), LLAMA_NUMBERS, metadata) for name in NAMES]
    with server(*paths, "--api-key", "key") as (_, url):
        yield url


def asked(url, path="/v1/models", headers=VERSION, key="key", **query):
    """(status, body)."""
    request = urllib.request.Request(f"{url}{path}?{urllib.parse.urlencode(query)}", headers={"X-Api-Key": key, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ids(body):
    return [model["id"] for model in body["data"]]


def test_models_have_the_shape_of_anthropics_client(url):
    status, body = asked(url)
    assert status == 200 and ids(body) == NAMES and (body["has_more"], body["first_id"], body["last_id"]) == (False, NAMES[0], NAMES[-1])
    for model in body["data"]:
        assert model["type"] == "model" and model["display_name"] == model["id"] and model["max_input_tokens"] == 128
        assert datetime.datetime.fromisoformat(model["created_at"].replace("Z", "+00:00")).year > 2020
    for path in ("/v1/models", "/models"):
        status, body = asked(url, path, {})
        assert status == 200 and body["object"] == "list" and ids(body) == NAMES and "first_id" not in body
    assert asked(url, "/models")[1]["object"] == "list"     # a route that Anthropic's API does not have
    status, model = asked(url, "/v1/models/model3")
    assert (status, model["type"], model["id"], model["display_name"]) == (200, "model", "model3", "model3")
    assert asked(url, "/v1/models/model3", {})[1]["object"] == "model"


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 1000])
def test_model_pages_go_forward_and_backward(url, limit):
    found, query = [], {}
    while True:
        status, body = asked(url, limit=limit, **query)
        assert status == 200 and 0 < len(body["data"]) <= limit and (ids(body)[0], ids(body)[-1]) == (body["first_id"], body["last_id"])
        found += ids(body)
        if not body["has_more"]:
            break
        query = {"after_id": body["last_id"]}
    assert found == NAMES
    found, query = [NAMES[-1]], {"before_id": NAMES[-1]}
    while True:
        status, body = asked(url, limit=limit, **query)
        found = ids(body) + found
        if not body["has_more"]:
            break
        query = {"before_id": body["first_id"]}
    assert found == NAMES
    for name, place in (("after_id", -1), ("before_id", 0)):
        assert asked(url, **{name: NAMES[place]})[1] == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("query, words", [
    ({"limit": 0}, "limit must be an integer from 1 to 1000"), ({"limit": 1001}, "from 1 to 1000"), ({"limit": "x"}, "limit must be an integer"),
    ({"limit": "1" * 5000}, "limit must be"), ({"limit": "\u00b2"}, "limit must be"), ({"limit": ""}, "limit must be"), ({"after_id": "nope"}, "after_id must be the id of one"),
    ({"before_id": ""}, "before_id must be"), ({"before_id": "model1", "after_id": "model2"}, "exclude each other"), ({"after_id": "x" * 4000}, "after_id")])
def test_a_query_for_no_page_is_refused(url, query, words):
    """A query that names no page is refused in Anthropic's shape."""
    status, body = asked(url, **query)
    assert status == 400 and (body["type"], body["error"]["type"]) == ("error", "invalid_request_error") and words in body["error"]["message"]
    assert len(body["error"]["message"]) < 300


def test_other_errors_have_anthropics_shape_too(url):
    status, body = asked(url, "/v1/models/nope")
    assert status == 404 and body["error"]["type"] == "not_found_error" and body["error"]["message"].startswith("model: nope")
    status, body = asked(url, key="wrong")
    assert status == 401 and body["error"]["type"] == "authentication_error" and "x-api-key" in body["error"]["message"]
    assert asked(url, "/v1/models/nope", {})[1]["error"]["code"] == "model_not_found"


def test_a_limited_key_lists_only_its_models(tmp_path):
    metadata = small_gguf_metadata("gpt-2")
    paths = [write_gguf(tmp_path / f"{name}.gguf", random_llama(), LLAMA_NUMBERS, metadata) for name in NAMES[:2]]
    keys = tmp_path / "keys"
    keys.write_text("ann: one models=model1\nall: two\n")
    with server(*paths, "--api-key-file", keys) as (_, url):
        assert ids(asked(url, key="one")[1]) == ["model1"] and ids(asked(url, key="two")[1]) == NAMES[:2]
        assert asked(url, key="one", after_id="model0")[0] == 400


def test_the_default_model_is_listed(default_url):
    [model] = asked(default_url)[1]["data"]
    assert model["id"] == get(default_url + "/v1/models")["data"][0]["id"]
