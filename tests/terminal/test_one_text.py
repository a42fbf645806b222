"""One body, one text: whatever route or command asks a model whose file says how its tokens are drawn."""

import json
import time

import openai
import pytest
from real_server import post, server
from run_here import run_forked
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
OWN = {"temperature": 1.2, "top_k": 10, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
USUAL = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
IN_FILES = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
QUESTION = {"messages": [{"role": "user", "content": "hello"}]}
DRAWN = {"seed": 7, "max_tokens": 32}
CHAT = QUESTION | DRAWN
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
pytestmark = pytest.mark.timeout(300)


def write_model(path, own):
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template": TEMPLATE} | {
        f"general.sampling.{IN_FILES.get(name, name)}": value for name, value in own.items()}
    tensors = random_llama()
    tensors["output_norm.weight"] *= 60     # so that some tokens are much likelier than others
    return write_gguf(path, tensors, LLAMA_NUMBERS, metadata)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "own.gguf", OWN)


@pytest.fixture(scope="module")
def url(model):
    with server(model) as (_, url):
        yield url


def run(command, *words):
    """The lines of JSON that a command prints."""
    ended = run_forked(command, *words)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def answer(url, route, body):
    return json.loads(post(url + route, body).read())


def of_chat(body):
    return body["choices"][0]["message"]["content"]


def streamed(url, route, body, part):
    """The text of a stream whose events have the part that a function finds."""
    lines = post(url + route, body | {"stream": True}).read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith(("data: {", "{"))]
    return "".join(part(event) or "" for event in events)


def of_routes(url):
    """The text of each route that answers a conversation."""
    chat = "/v1/chat/completions"
    found = {
        "native": streamed(url, "/chat/completions", CHAT, lambda event: event.get("token")),
        "chat": of_chat(answer(url, chat, CHAT)),
        "a large body": of_chat(answer(url, chat, CHAT | {"metadata": {"x": "y" * 70_000}})),
        "a streamed chat": streamed(url, chat, CHAT, lambda event: event["choices"][0]["delta"].get("content")),
        "a base URL without /v1": of_chat(answer(url, "/chat/completions", CHAT | {"model": "default", "stream": False})),
        "functions": of_chat(answer(url, chat, CHAT | {"function_call": "none"})),
        "responses": answer(url, "/v1/responses", {"input": "hello", "seed": 7, "max_output_tokens": 32})[
            "output"][0]["content"][0]["text"],
        "messages": answer(url, "/v1/messages", CHAT)["content"][0]["text"],
        "ollama chat": answer(url, "/api/chat", QUESTION | {"stream": False, "options": {"seed": 7, "num_predict": 32}})[
            "message"]["content"],
        "ollama generate": streamed(url, "/api/generate", {"prompt": "hello", "options": {"seed": 7, "num_predict": 32}},
                                    lambda event: event.get("response")),
        "two priorities": of_chat(answer(url, chat, CHAT | {"priority": "low"}))}
    compared = streamed(url, "/v1/compare", CHAT | {"variants": [{}, {"seed": 8}]},
                        lambda event: event.get("token") if event.get("index") == 0 else "")
    return found | {"compare": compared}


def of_batch_route(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    file = client.files.create(file=("in.jsonl", json.dumps(LINE).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=LINE["url"], completion_window="24h")
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        time.sleep(0.02)        # between two questions to a process of its own
    return of_chat(json.loads(client.files.content(batch.output_file_id).text)["response"]["body"])


def by_batch_command(folder, name, *words):
    source, out = folder / f"{name}.jsonl", folder / f"{name}.out"
    source.write_text(json.dumps(LINE) + "\n")
    run("batch", *words, source, "-o", out)
    return of_chat(json.loads(out.read_text())["response"]["body"])


def test_batch_draws_as_the_model_s_file_says(model, url, tmp_path):
    served = of_routes(url)
    for name, value in USUAL.items():       # each of these has its effect, so none may be forgotten
        assert of_chat(answer(url, "/v1/chat/completions", CHAT | {name: value})) != served["chat"], name
    # the template adds nothing to the text
    assert answer(url, "/v1/completions", {"prompt": "hello"} | DRAWN)["choices"][0]["text"] == served["chat"]
    assert {name for name, text in served.items() if text != served["chat"]} == set(), served
    assert by_batch_command(tmp_path, "here", model) == served["chat"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["a tiny model", "the default model"])
def test_all_routes_draw_as_the_model_s_file_says(which, model, default_model_path, tmp_path):
    """Every route and command gives the text that the model's file asks for."""
    model = model if which == "a tiny model" else default_model_path
    flags = "-p", "hello", "--seed", "7", "-m", "32", "--json"
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    found = {"generate": run("generate", model, *flags)[0]["text"], "chat": run("chat", model, *flags)[0]["text"],
             "batch": by_batch_command(tmp_path, "here", model)}
    found["compare"], found["compare's second"] = (line["text"] for line in run("compare", model, other, *flags))
    with server(model, f"--database={tmp_path / 'store.db'}") as (_, url):
        found |= {f"{name} of a server": text for name, text in of_routes(url).items()}
        found["batch route"] = of_batch_route(url)
        found["batch --url"] = by_batch_command(tmp_path, "there", "--url", url)
        found["generate --url"] = run("generate", "--url", url, *flags)[0]["text"]
        found["chat --url"] = run("chat", "--url", url, *flags)[0]["text"]
    with server(model, other) as (_, url):
        found |= {f"{name} of two models": text for name, text in of_routes(url).items()}
        compared = run("compare", model, other, "--url", url, *flags)
        found |= {f"compare --url, {index}": line["text"] for index, line in enumerate(compared)}
    assert {name: text for name, text in found.items() if text != found["generate"]} == {}


def test_a_batch_stops_at_other_defaults(tmp_path):
    """A batch does not go on with other defaults of the model's file."""
    path = write_model(tmp_path / "own.gguf", OWN)
    by_batch_command(tmp_path, "here", path)
    write_model(path, OWN | {"min_p": 0.2})     # a file of the same size, with the same weights
    words = "batch", path, tmp_path / "here.jsonl", "-o", tmp_path / "here.out"
    ended = run_forked(*words)
    assert ended.returncode == 2 and "has answers with default min_p 0.1, not 0.2" in ended.stderr, ended.stderr


def test_evaluations_ignore_the_model_s_file(model, url):
    """Its answers are the likeliest ones, and its samples are of temperature 1, here and at a server."""
    [here] = run("eval", model, "--suite", "sample", "--json")
    [there] = run("eval", "--url", url, "--suite", "sample", "--json")
    greedy = [answer(url, "/v1/completions", {"prompt": one["prompt"], "max_tokens": 16, "temperature": 0,
                                              "repetition_penalty": 1})["choices"][0]["text"] for one in here["samples"]]
    penalized = answer(url, "/v1/completions", {"prompt": here["samples"][0]["prompt"], "max_tokens": 16, "temperature": 0})
    assert [one["text"] for one in here["samples"]] == [one["text"] for one in there["samples"]] == greedy
    assert penalized["choices"][0]["text"] != greedy[0]
    assert here["free_samples"] == there["free_samples"] != []
