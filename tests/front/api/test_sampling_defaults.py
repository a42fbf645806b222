"""How a token is drawn if a request does not say: a flag's value, else the model's own, else the usual."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import real_server
from chatlm.cli import TABLE_FLAGS
from chatlm.common.config import FLAGS, Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import (
    SAMPLING_DEFAULTS, SAMPLING_FLAGS, SAMPLING_NAMES, Message, SamplingParams, sampling_defaults)
from chatlm.front.api.dialects.native import NATIVE_FIELDS
from chatlm.front.api.dialects.ollama import OLLAMA_OPTIONS
from chatlm.front.api.dialects.own import DRAWING_FIELDS
from chatlm.front.api.readers import sampling_params
from chatlm.front.api.tables import SAMPLED
from chatlm.terminal.chat import Chat, new_request
from chatlm.terminal.conversation import PARAMETERS
from chatlm.terminal.remote import RemotePool
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.rules import SAMPLING_KEYS, own_sampling
from command_line import parse_command_line
from fake_pool import FakePool, serving
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

USUAL = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny(folder, **sampling):
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template": TEMPLATE} | {
        f"general.sampling.{name}": value for name, value in sampling.items()}
    return write_gguf(folder / "tiny.gguf", random_llama(), LLAMA_NUMBERS, metadata)


def opened(path):
    settings = Settings(model=str(path))
    return open_model(resolve_model(settings), settings)


def test_a_request_wins_over_flag_over_model():
    """The model wins over what is usual."""
    settings = parse_command_line(["serve", "x.gguf", "--top-k", "3", "--min-p=0.0"],
                                  {"CHAT_SERVER_TOP_P": "0.7"})
    own = {"top_k": 64, "top_p": 0.95, "min_p": 0.1, "temperature": 1.0}
    settings = dataclasses.replace(settings, own_sampling=own, own_origin="its file")
    assert sampling_defaults(settings) == {
        "temperature": (1.0, "its file"), "top_k": (3, "--top-k"), "top_p": (0.7, "--top-p"),
        "min_p": (0.0, "--min-p"),
        "repetition_penalty": (1.0, "usual")}
    params = sampling_params({"top_k": 9, "repetition_penalty": 1.3}, settings)
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 9, 0.7)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.3)


@pytest.mark.parametrize("command, temperature", [("serve", 0.8), ("generate", 0.8), ("chat", 0.6)])
def test_without_any_of_them_usual_values_hold(command, temperature):
    settings = parse_command_line([command, "x.gguf"], {})
    found = {name: value for name, (value, _) in sampling_defaults(settings).items()}
    assert found == USUAL | {"temperature": temperature}
    assert {origin for _, origin in sampling_defaults(settings).values()} == {"usual"}


def test_a_gguf_file_says_its_makers_values(tmp_path):
    model = opened(tiny(tmp_path, temp=0.6, top_k=20, top_p=0.95, min_p=0.0, penalty_repeat=1.05))
    assert model.sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0,
                              "repetition_penalty": 1.05}
    assert model.sampling_origin == "general.sampling" and model.notes == ()
    assert opened(tiny(tmp_path)).sampling == {}


@pytest.mark.parametrize("name, value, words", [
    ("temp", 7.5, "temp is 7.5; it must be a finite number from 0 to 2"),
    ("top_p", float("nan"), "top_p is NaN"),
    ("top_k", "many", 'top_k is "many"; it must be an integer from 0'),
    ("penalty_repeat", 0.0, "penalty_repeat is 0.0")])
def test_an_impossible_value_is_ignored_with_a_line(tmp_path, name, value, words):
    """The others hold."""
    model = opened(tiny(tmp_path, **{"min_p": 0.25, name: value}))
    assert model.sampling == {"min_p": 0.25}
    (note,) = model.notes
    assert note.startswith(f"Ignored: {tmp_path / 'tiny.gguf'}: general.sampling.") and words in note


@pytest.mark.parametrize("found, sampling", [
    ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
      "eos_token_id": [1, 2]},
     {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}),
    ({"temperature": 1, "top_k": None}, {"temperature": 1.0}), ({"transformers_version": "5.0"}, {})])
def test_generation_config_says_its_makers_values(tmp_path, found, sampling):
    told = own_sampling(tmp_path / "generation_config.json", found)
    assert told == {"sampling": sampling, "sampling_origin": "generation_config.json" if sampling else "",
                    "notes": ()}


def test_the_default_model_s_values_end_its_answers(default_model_path):
    """The default model has values with which its answers end."""
    assert opened(default_model_path).sampling == {
        "temperature": 0.3, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": 0.2}


def test_a_model_s_penalties_are_for_drawn_answers():
    """A request's own are for all."""
    settings = Settings(
        own_sampling={"temperature": 0.3, "frequency_penalty": 0.2, "presence_penalty": 0.2,
                      "repetition_penalty": 1.1}, own_origin="its file")
    drawn, greedy, asked = (sampling_params(values, settings)
                            for values in (
                                {}, {"temperature": 0}, {"temperature": 0, "frequency_penalty": 0.5}))
    assert (drawn.frequency_penalty, drawn.presence_penalty) == (0.2, 0.2)
    assert (greedy.frequency_penalty, greedy.presence_penalty) == (0, 0)
    # as a file's own has always been
    assert asked.frequency_penalty == 0.5 and greedy.repetition_penalty == 1.1
    by_flag = sampling_params({}, dataclasses.replace(settings, temperature=0.0))
    assert by_flag.frequency_penalty == 0


def test_a_server_says_which_values_hold(tmp_path):
    """Its log, stats and models say where they come from."""
    log = []
    path = tiny(tmp_path, temp=0.0, top_k=7, top_p=2.0)
    flags = "--min-p", "0.05", "--kv-cache-memory", "8M", "--verbose"
    with real_server.server(path, *flags, log=log) as (_, url):
        stats, (model,) = real_server.get(url + "/stats"), real_server.get(url + "/v1/models")["data"]
        # greedy, as the model's file says: two seeds give the same answer
        answers = [real_server.post(url + "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "hello"}], "seed": seed, "max_tokens": 16}).read()
            for seed in (1, 2)]
        # large bodies are read in another process
        answers.append(real_server.post(url + "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "hello"}], "seed": 3, "max_tokens": 16,
            "metadata": {"x": "y" * 70_000}}).read())
    assert stats["sampling"] == {
        "temperature": {"value": 0.0, "from": "general.sampling"},
        "top_k": {"value": 7, "from": "general.sampling"},
        "top_p": {"value": 1.0, "from": "usual"}, "min_p": {"value": 0.05, "from": "--min-p"},
        "repetition_penalty": {"value": 1.0, "from": "usual"}}
    assert model["defaults"] == USUAL | {"temperature": 0.0, "top_k": 7, "min_p": 0.05, "max_tokens": None}
    text = "".join(log)
    words = ("temperature 0 (general.sampling), top_k 7 (general.sampling), top_p 1 (usual), "
             "min_p 0.05 (--min-p)")
    assert words in text
    assert text.count("general.sampling.top_p is 2.0; it must be") == 1
    texts = [json.loads(answer)["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1] == texts[2]


async def sent_by_a_terminal(server, parameters=None, **flags):
    """What arrives at a server when the terminal of --url asks without and with parameters of its own."""
    async with serving(server) as url:
        settings = Settings(command="chat", url=url, **flags)
        pool = RemotePool(settings)
        await pool.start()
        await pool.wait_ready()
        request = new_request(settings, parameters, messages=(Message("user", "Hi"),))
        _ = [event async for event in pool.answer(request)]
        await pool.close()
    return server.requests[0].params.sampling


async def test_a_terminal_leaves_unset_values_to_the_server():
    server = FakePool()
    server.own_sampling = {"temperature": 0.3, "top_k": 11}, "its file"
    sampling = await sent_by_a_terminal(server)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.3, 11, 1.0)


async def test_a_terminal_sends_flags_and_user_s_values():
    """A terminal sends its flags and what the user set."""
    server = FakePool()
    server.own_sampling = {"temperature": 0.3, "top_k": 11, "top_p": 0.5}, "its file"
    sampling = await sent_by_a_terminal(server, {"top_k": 5}, temperature=0.9)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.9, 5, 0.5)


async def test_show_in_a_terminal_names_server_values(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    server = FakePool()
    server.own_sampling = {"temperature": 0.3}, "its file"
    async with serving(server) as url:
        settings = Settings(command="chat", url=url)
        pool = RemotePool(settings)
        await pool.start()
        await pool.wait_ready()
        Chat(pool, settings).slash_show("")
        await pool.close()
    assert "temperature  0.3" in capsys.readouterr().err


def test_every_list_of_parameters_is_the_same():
    """It is that of sampling_params."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"choice"}
    # a row for each, and no row without
    assert set(SAMPLED) == set(SAMPLING_NAMES) == fields
    assert set(SAMPLING_KEYS) == set(SAMPLING_DEFAULTS) == set(USUAL)           # what files of models may set
    native = {field.name for field in NATIVE_FIELDS} & fields
    assert native == set(SAMPLING_FLAGS) == set(PARAMETERS) - {"max_tokens"}
    assert native == {flag.field for flag in FLAGS} & fields
    assert set(TABLE_FLAGS) & fields == native - {"seed"}
    assert fields <= {field.means or field.name for field in OLLAMA_OPTIONS}
    assert fields <= {field.name for field in DRAWING_FIELDS}
