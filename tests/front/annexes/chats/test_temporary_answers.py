"""Nothing of a temporary chat is kept: its words are looked for wherever a server could have left them."""

import json
import os
import signal
import struct
import urllib.error
import urllib.request

import pytest

from real_server import server

SECRET = "The zebrafinch Quollomar hides forty-one marzipan lanterns below Wexcombe bridge, near the osier beds."
LONG = "Remember this sentence, for I shall ask about it later on, and tell me briefly what it is about: "
SPACE = {"X-Chat-Space": "T" * 22}


def posted(url, path, body, **headers):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers | {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


def asked(url, text, path="/v1/chat/completions", **more):
    body = {"messages": [{"role": "user", "content": LONG + text}], "max_tokens": 48, "temperature": 0, **more}
    return json.loads(posted(url, path, body, **SPACE))


def refusal(url, **more):
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(url, SECRET, **more)
    return refused.value.code, json.loads(refused.value.read())["error"]


def spellings(url, sentence):
    """A sentence's words and tokens as a file could have them."""
    ids = json.loads(posted(url, "/tokenize", {"content": " " + sentence, "add_special": False}))["tokens"]
    runs = [ids[at:at + 4] for at in range(2, len(ids) - 6)]
    return {word.encode() for word in sentence.split() if len(word) > 8} | {
        struct.pack(f"<4{code}", *run) for run in runs for code in "iq"}


def found_below(folder, words):
    """The files of a folder that have any of these words."""
    return {path.name for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in words)}


def ended_well(process):
    """Ends a server as an operator does; all that it has logged since it was ready."""
    process.send_signal(signal.SIGTERM)
    process.wait()
    return "".join(process.stdout)


def test_words_of_a_temporary_chat_are_nowhere(default_model_path, tmp_path):
    """With all that keeps something: a database, a prefix store, texts to draft from, a log of conversations. The same
    words in an ordinary chat are found, so the search finds them."""
    homes = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "STATE", "DATA")}
    for folder in ("prefixes", "db"):
        (tmp_path / folder).mkdir()
    flags = [default_model_path, "--database", tmp_path / "db" / "store.db", "--prefix-store", tmp_path / "prefixes",
             "--log-conversations"]
    environment = {**os.environ, **homes}   # all that its own servers may write is below one folder
    temporary = {"prompt_cache_retention": "in_memory"}
    with server(*flags, env=environment) as (process, url):
        secret = spellings(url, SECRET)
        first = asked(url, SECRET, **temporary)
        again = asked(url, SECRET, **temporary)
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        asked(url, SECRET, stream=False, n=2, **temporary)
        kept = json.loads(posted(url, "/v1/responses", {"input": LONG + SECRET, "max_output_tokens": 24, "store": False,
                                                        **temporary}, **SPACE))
        assert kept["status"] in ("completed", "incomplete")
        told = {"messages": [{"role": "user", "content": LONG + SECRET}], "max_tokens": 24, "model": "default"}
        assert json.loads(posted(url, "/v1/messages", told | temporary, **SPACE))["type"] == "message"
        posted(url, "/v1/completions", {"prompt": LONG + SECRET, "max_tokens": 24, **temporary}, **SPACE)
        log = ended_well(process)
    assert not any(word in log.encode() for word in secret)
    assert not found_below(tmp_path, secret)
    with server(*flags, env=environment) as (process, url):
        later = asked(url, SECRET)
        assert later["choices"][0]["message"] == first["choices"][0]["message"]
        assert later["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert asked(url, SECRET)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        read = asked(url, SECRET, **temporary)
        assert read["choices"][0]["message"] == first["choices"][0]["message"]
        log = ended_well(process)
    assert any(word in log.encode() for word in secret)
    assert found_below(tmp_path / "prefixes", secret)


def test_what_cannot_be_is_said(keeping_server):
    url = keeping_server.url
    assert refusal(url, prompt_cache_retention="for ever")[0] == 400
    place = {name: f"{number:032x}" for number, name in enumerate(("id", "node", "parent"))}
    code, error = refusal(url, stream=True, chat=place, prompt_cache_retention="in_memory")
    assert code == 400 and error["param"] == "chat" and "prompt_cache_retention" in error["message"]
    asked(url, SECRET, prompt_cache_retention="24h")
    asked(url, SECRET, prompt_cache_retention=None)
