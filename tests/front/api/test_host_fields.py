"""The sampling parameters of llama-server's users, asked of a real server."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import pytest

from nightly import by_day

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Tell me a story about a dog. " * 3}]


@pytest.fixture
def url(tiny_url):
    return tiny_url


def call(url, path, body):
    """(status, headers, body) of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        response = urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": "application/json"}), timeout=120)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.headers, json.loads(response.read())


def content(url, **changes):
    body = {"messages": HI, "seed": 7, "max_tokens": 40, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0,
            "frequency_penalty": 0, "presence_penalty": 0, "ignore_eos": True} | changes
    status, headers, answer = call(url, CHAT, body)
    assert status == 200 and "X-Ignored-Fields" not in headers, answer
    return answer["choices"][0]["message"]["content"]


MANY = {"max_tokens": 80}      # some come again


@pytest.fixture(scope="module")
def tiny(tiny_url):
    return tiny_url


@pytest.fixture(scope="module")
def plain(tiny):
    return content(tiny, **MANY)


# (what changes the answer, what of the same fields leaves it as it is)
EFFECTS = [({"dry_multiplier": 5, "dry_allowed_length": 1}, {"dry_multiplier": 0, "dry_base": 3, "dry_sequence_breakers": ["x"]}),
           ({"dry_multiplier": 5, "dry_penalty_last_n": -1, "dry_allowed_length": 0, "dry_sequence_breakers": []}, {"dry_multiplier": 5, "dry_penalty_last_n": 0}),
           ({"xtc_probability": 1}, {"xtc_probability": 0, "xtc_threshold": 0.2}), ({"xtc_probability": 0.5}, {"xtc_probability": 1, "xtc_threshold": 0.6}),
           ({"typical_p": 0.2}, {"typical_p": 1}), ({"top_n_sigma": 0.5}, {"top_n_sigma": -1})]


@pytest.mark.parametrize("acts, is_off", EFFECTS)
def test_a_parameter_that_is_off_changes_nothing(tiny, plain, acts, is_off):
    """One that is on changes the answer."""
    assert content(tiny, **MANY, **is_off) == plain != content(tiny, **MANY, **acts)


@pytest.mark.parametrize("model", by_day(["tiny_url", "default_url"], "tiny_url"))
def test_answers_at_once_equal_those_one_by_one(request, model):
    url = request.getfixturevalue(model)
    asked = [acts for acts, _ in EFFECTS] + [{}, {"min_p": 0.1}]
    asked = [changes | {"max_tokens": 8} for changes in asked]
    alone = [content(url, **changes) for changes in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda changes: content(url, **changes), asked))
    if json.loads(urllib.request.urlopen(url + "/stats").read())["row_invariant"]:
        assert together == alone


REFUSED = [("dry_multiplier", -1, "from 0 to 100"), ("dry_base", 0.5, "from 1 to 100"), ("dry_allowed_length", 1.5, "an integer"),
           ("dry_allowed_length", -1, "from 0 to 2147483647"), ("dry_penalty_last_n", -2, "from -1 to 2147483647"),
           *(("dry_sequence_breakers", value, "a list of at most 64 strings, none above 40 characters")
             for value in ("x", [1], ["x" * 10**6], ["x"] * 10**5, {"a": 1}, [["x"]], [None])),
           ("xtc_probability", 2, "from 0 to 1"), ("xtc_threshold", -1, "from 0 to 1"), ("xtc_threshold", "x" * 10**6, "a finite number"),
           ("typical_p", 1.01, "from 0 to 1"), ("typical_p", -0.1, "from 0 to 1"), ("top_n_sigma", -1.5, "from -1 to 1000"), ("top_n_sigma", "1", "a finite number"), ("top_n_sigma", True, "a finite number"),
           ("top_n_sigma", [1], "a finite number"), ("top_n_sigma", 1e400, "a finite number")]


@pytest.mark.parametrize("name, value, allowed", REFUSED)
def test_a_bad_value_is_refused_with_what_is_allowed(url, name, value, allowed):
    status, _, answer = call(url, CHAT, {"messages": HI, name: value})
    assert status == 400 and answer["error"]["param"] == name and allowed in answer["error"]["message"], answer
    assert len(answer["error"]["message"]) < 500


def test_nan_is_no_json(url):
    for name in dict.fromkeys(name for name, *_ in REFUSED):
        status, _, answer = call(url, CHAT, b'{"messages": [{"role": "user", "content": "x"}], "%s": NaN}' % name.encode())
        assert status == 400, answer


def test_mirostat_is_ignored_and_named(url):
    assert call(url, CHAT, {"messages": HI, "max_tokens": 1, "mirostat": 2})[1]["X-Ignored-Fields"] == "mirostat"
