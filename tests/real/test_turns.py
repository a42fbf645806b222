"""Two real models take turns in memory that has room for one of them."""

import itertools
import threading

from openai_routes import call
from real_server import server

TURNS = 6
TEXTS = "Count to three.", "Name a colour."


def names_of_two(url):
    """Once the headers of both files have been read."""
    while True:
        _, _, listed = call(url, "/v1/models")
        names = [model["id"] for model in listed["data"] if model.get("context_length")]
        if len(names) == 2:
            return names


def test_two_models_asked_without_pause_answer_as_alone(qwen, default_model_path, tmp_path):
    """No answer is cut, and most follow one of the same model."""
    for path in (qwen, default_model_path):
        (tmp_path / path.name).symlink_to(path)
    answers = []    # (model, text, answer), as they come

    def ask(url, model, text, turns):
        for _ in range(turns):
            status, _, body = call(url, "/v1/chat/completions", {
                "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0,
                "max_tokens": 12, "ignore_eos": True})
            assert status == 200 and body["usage"]["completion_tokens"] == 12, body
            answers.append((model, text, body["choices"][0]["message"]["content"]))

    flags = "--models-memory", "900M", "--kv-cache-memory", "64M", "--prefix-memory", 0, "--no-drafts"
    with server("--models", tmp_path, *flags) as (_, url):
        models = names_of_two(url)
        alone = [(model, text) for model in models for text in TEXTS]
        for model, text in alone:
            ask(url, model, text, 1)
        expected = {(model, text): answer for model, text, answer in answers}
        answers.clear()
        clients = [threading.Thread(target=ask, args=(url, model, text, TURNS)) for model, text in alone]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        _, _, listed = call(url, "/v1/models")
    assert sorted(model["state"] for model in listed["data"]) == ["ready", "unloaded"]
    assert len(answers) == len(alone) * TURNS
    assert all(expected[model, text] == answer for model, text, answer in answers)
    changes = sum(before[0] != after[0] for before, after in itertools.pairwise(answers))
    assert changes <= len(answers) // 4
