"""--embedder: a model that embeds texts beside any others, the real all-MiniLM-L6-v2 from nothing."""

import json
import os
import shutil
import urllib.error
import urllib.request

import pytest

from chatlm.cli import parse_command_line
from chatlm.commands import COMMANDS
from chatlm.common.hub.find import with_embedder
from encoders import cosine
from real_server import post, server
from run_here import run_forked

TEXTS = ["The cat sits outside", "A man is playing guitar"]


def models_of(url):
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return {model["id"]: model for model in json.load(response)["data"]}


def embedded(url, model):
    answer = json.load(post(f"{url}/v1/embeddings", {"model": model, "input": TEXTS}))
    return [item["embedding"] for item in answer["data"]]


@pytest.fixture(scope="module")
def vectors(default_embedder_path):
    """Of TEXTS, by the command `embed`."""
    lines = "".join(json.dumps(text) + "\n" for text in TEXTS)
    ended = run_forked("embed", "-", "-o", "-", "--nice", "0", given=lines)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_it_stands_beside_the_default_model(vectors):
    """It is loaded for the first text. What names no model goes to the model that chats."""
    with server("--embedder") as (_, url):
        found = models_of(url)
        assert {name: (model["default"], model["pinned"]) for name, model in found.items()} == {
            "SmolLM2-135M-Instruct": (True, True), "all-MiniLM-L6-v2": (False, False)}
        assert found["all-MiniLM-L6-v2"]["state"] == "unloaded"
        body = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
        answer = json.load(post(f"{url}/v1/chat/completions", body))
        assert answer["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."
        assert models_of(url)["all-MiniLM-L6-v2"]["state"] == "unloaded"
        for name in ("all-minilm", "all-MiniLM-L6-v2"):
            assert min(map(cosine, embedded(url, name), vectors)) > 1 - 1e-9
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{url}/v1/chat/completions", body | {"model": "all-minilm"})
        assert caught.value.code == 400


def test_it_stands_beside_checkpoints_with_their_own_flags(nanochat_fixtures, vectors):
    """-i, -g, -s, --context-length and --served-model-name are about the checkpoint."""
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(nanochat_fixtures / "gen5")}
    flags = "-i sft --context-length 64 --served-model-name mine --served-model-name our --embedder".split()
    with server(*flags, env=environment) as (_, url):
        found = models_of(url)
        assert [*found] == ["mine", "all-MiniLM-L6-v2"] and found["mine"]["aliases"] == ["our"]
        assert (found["mine"]["context_length"], found["all-MiniLM-L6-v2"]["context_length"]) == (64, 512)
        assert min(map(cosine, embedded(url, "all-minilm"), vectors)) > 1 - 1e-9
        assert json.load(post(f"{url}/v1/completions", {"model": "our", "prompt": "Hi", "max_tokens": 2}))


def test_beside_a_folder_it_is_no_default(nanochat_fixtures, tmp_path, vectors):
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "gen5")
    with server("--models", tmp_path, "--embedder") as (_, url):
        found = models_of(url)
        [default] = [name for name, model in found.items() if model["default"]]
        assert len(found) > 1 and default != "all-MiniLM-L6-v2"
        assert min(map(cosine, embedded(url, "all-minilm"), vectors)) > 1 - 1e-9


def settings_of(*words):
    return parse_command_line(["serve", *words], {}, COMMANDS)


@pytest.mark.parametrize("words, paths", [
    (["--embedder"], ["", "all-minilm"]), (["a.gguf", "--embedder"], ["a.gguf", "all-minilm"]),
    (["a.gguf", "b.gguf", "--embedder", "e.gguf"], ["a.gguf", "b.gguf", "e.gguf"]),
    (["--models", "x", "--embedder", "e.gguf"], ["e.gguf"]), (["a.gguf"], [])])
def test_it_is_the_last_of_the_models(words, paths):
    settings = settings_of(*words)
    assert [choice.path for choice in settings.several] == paths
    assert settings.model == (None if paths else "a.gguf")


def test_only_its_own_name_stands_for_the_packaged_one(default_embedder_path):
    for model in (None, "all-minilm"):
        settings = with_embedder(settings_of(*[model] * bool(model)))
        assert settings.model == str(default_embedder_path)
    assert with_embedder(settings_of("other.gguf")).model == "other.gguf"
