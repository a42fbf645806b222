"""What clients of LM Studio and llama-server ask first, with the values of the model that is served."""

import json
import urllib.request

import pytest

from openai_routes import call
from real_server import server


@pytest.fixture
def url(short_url):
    return short_url


def test_lm_studio_s_list_has_the_model(url):
    (model,) = call(url, "/api/v0/models")[2]["data"]
    context = call(url, "/v1/models")[2]["data"][0]["context_length"]
    assert model["object"] == "model" and model["type"] == "llm" and model["state"] == "loaded"
    assert model["arch"] == "llama" and model["compatibility_type"] == "gguf" and model["quantization"] == "Q4_1"
    assert model["max_context_length"] == model["loaded_context_length"] == context
    assert call(url, f"/api/v0/models/{model['id']}")[2] == model
    status, _, refused = call(url, "/api/v0/models/other")
    assert status == 404 and refused["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("route, body", [
    ("chat/completions", {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 5, "temperature": 0}),
    ("completions", {"prompt": "One, two,", "max_tokens": 5, "temperature": 0}),
    ("embeddings", {"input": "One, two"}),
    ("embeddings", {"input": 1.5}),
    ("chat/completions", {"messages": []})])
def test_who_finds_lm_studio_s_list_is_answered_there(url, route, body):
    """The plugin llm-lmstudio asks below /api/v0 once it has found the list of models there."""
    ours, theirs = ((status, found.get("error"), found.get("data"), [
        each.get("text", each.get("message")) for each in found.get("choices", ())])
        for status, _, found in (call(url, f"{root}/{route}", body) for root in ("/v1", "/api/v0")))
    assert theirs == ours and ours[0] in (200, 400)


def test_llama_server_s_properties_are_the_model_s(url):
    body = call(url, "/props")[2]
    stats = call(url, "/stats")[2]
    settings = body["default_generation_settings"]
    assert settings["n_ctx"] == stats["context_length"]
    assert settings["params"]["temperature"] == stats["sampling"]["temperature"]["value"] == 0.3
    assert "<|im_start|>" in body["chat_template"] and body["eos_token"] == "<|im_end|>"
    assert body["modalities"] == {"vision": False, "audio": False}
    assert "/" not in body["model_path"], "no path of this machine"
    slots = call(url, "/slots")[2]
    assert len(slots) == body["total_slots"] and not any(slot["is_processing"] for slot in slots)
    assert call(url, "/props?model=other")[0] == 404


def test_slots_show_no_work_of_other_keys(tmp_path):
    """A key sees its own answer as a busy row, and none of others."""
    keys = tmp_path / "keys"
    keys.write_text("one: secret-of-one\ntwo: secret-of-two\n")

    def asked(url, key, path, body=None):
        request = urllib.request.Request(url + path, body and json.dumps(body).encode(), {
            "Authorization": f"Bearer secret-of-{key}", "Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    def busy(url, key):
        return sum(slot["is_processing"] for slot in json.load(asked(url, key, "/slots")))
    with server("--api-key-file", keys) as (_, url):    # the default model: its answer lasts
        long = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "ignore_eos": True, "max_tokens": 4000}
        with asked(url, "one", "/v1/chat/completions", long) as answer:
            answer.readline()
            assert (busy(url, "one"), busy(url, "two")) == (1, 0)
