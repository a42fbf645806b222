"""Each kind of line has the same answer from the command `batch`, from that with --url, and from /v1/batches."""

import base64
import io
import json
import random
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
import openai    # noqa: E402

from real_server import SCRIPT, server    # noqa: E402
from tiny_sight import make_smolvlm, save_sight    # noqa: E402

CHAT, TEXT, RESPONSES, EMBEDDINGS = ENDPOINTS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
FLAGS = "--dtype", "float32", "--no-drafts"
FORM = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def picture(kind="PNG", size=(90, 60), seed=0):
    target = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(target, kind)
    return base64.b64encode(target.getvalue()).decode()


def chat(*parts, **more):
    return CHAT, {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}], "max_tokens": 8, "ignore_eos": True} | more


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def response(*parts, **more):
    return RESPONSES, {"input": [{"role": "user", "content": [*parts, {"type": "input_text", "text": "What is this?"}]}], "max_output_tokens": 16} | more


PNG, JPEG, WEBP = "data:image/png;base64," + picture(), "data:image/jpeg;base64," + picture("JPEG", seed=1), "data:image/webp;base64," + picture("WEBP", (300, 40), 2)
LINES = {
    "a chat": chat(), "a likeliest chat": chat(temperature=0), "a seed": chat(seed=5), "two answers": chat(n=2), "log-probabilities": chat(logprobs=True, top_logprobs=3),
    "a tool": chat(tools=[{"type": "function", "function": {"name": "look", "parameters": FORM}}], tool_choice="required", max_tokens=60), "no conversation": (CHAT, {"messages": []}),
    "a schema": chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": FORM}}, max_tokens=40), "a temperature": chat(temperature=9), "two systems": chat(model=7),
    "a picture": chat(image(PNG)), "a likeliest answer to a picture": chat(image(PNG), temperature=0), "three pictures": chat(image(PNG), image(JPEG), image(WEBP)), "the same picture twice": chat(image(PNG), image(PNG)),
    "bare base64": chat(image(picture())), "a URL alone": chat({"type": "image_url", "image_url": PNG}), "Anthropic's form": chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": picture()}}),
    "two answers to a picture": chat(image(JPEG), n=2), "a large picture": chat(image("data:image/png;base64," + picture(size=(700, 500)))),
    "a large picture and a long text": chat(image("data:image/png;base64," + picture(size=(700, 500))), ignored="x" * 200_000),
    "a URL elsewhere": chat(image("http://127.0.0.1:1/cat.png")), "a file here": chat(image("file:///etc/passwd")), "no base64": chat(image("!!")), "no picture": chat(image(base64.b64encode(b"<svg/>").decode())),
    "half a picture": chat(image(PNG[:200])), "17 pictures": chat(*[image(PNG)] * 17), "a number of a picture": chat({"type": "image", "picture": 0}), "a picture that was filled in": chat({"type": "image", "picture": [90, 60, "0" * 32]}),
    "sound": chat({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}), "no URL": chat({"type": "image_url"}), "Ollama's images": (CHAT, {"messages": [{"role": "user", "content": "What?", "images": [picture()]}], "max_tokens": 8}),
    "a text": (TEXT, {"prompt": "Once", "max_tokens": 8}), "two texts": (TEXT, {"prompt": ["Once", "Twice"], "max_tokens": 8, "n": 2, "echo": True}), "tokens": (TEXT, {"prompt": [1, 2, 3], "max_tokens": 4, "logprobs": 2}),
    "a response": (RESPONSES, {"input": "Hi", "max_output_tokens": 16, "instructions": "Be brief"}), "a response to a picture": response({"type": "input_image", "image_url": PNG}), "a picture by its file": response({"type": "input_image", "file_id": "file-1"}),
    "a response that is kept": (RESPONSES, {"input": "Hi", "max_output_tokens": 16, "store": True}), "a predecessor": (RESPONSES, {"input": "Hi", "previous_response_id": "resp_1"}),
    "an embedding": (EMBEDDINGS, {"input": "Hi"}), "two embeddings": (EMBEDDINGS, {"input": ["Hi", "Ho"], "encoding_format": "base64"}), "no input": (EMBEDDINGS, {"input": []})}
GOOD = {"a chat", "two answers", "a picture", "three pictures", "bare base64", "a large picture", "two answers to a picture", "a text", "a response", "a response to a picture"}


def without_ids(value):
    if isinstance(value, dict):
        return {name: without_ids(inner) for name, inner in value.items() if name not in ("id", "request_id", "created", "created_at", "completed_at", "call_id", "store")}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


def read(text):
    return {(line := json.loads(part))["custom_id"]: without_ids(line) for part in text.splitlines()}


def by_command(source, out, *words):
    command(source, out, *words)
    return read(out.read_text())


def command(source, out, *words):
    return subprocess.run([sys.executable, str(SCRIPT), "batch", *map(str, words), str(source), "-o", str(out)], capture_output=True, text=True, timeout=150)


def by_route(client, source):
    """What the lines of each endpoint become: each batch has the whole file, so that a line keeps its number."""
    found = {}
    for endpoint in ENDPOINTS:
        file = client.files.create(file=("in.jsonl", source.read_bytes()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
        while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
            time.sleep(0.02)
        for name in filter(None, (batch.output_file_id, batch.error_file_id)):
            found |= {custom_id: line for custom_id, line in read(client.files.content(name).text).items() if LINES[custom_id][0] == endpoint}
    return found


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_command_and_routes_answer_each_kind_alike(tmp_path):
    folder, source = tmp_path / "seeing", tmp_path / "in.jsonl"
    folder.mkdir()
    save_sight(folder, "smolvlm", make_smolvlm())
    source.write_text("".join(json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n" for name, (url, body) in LINES.items()))
    here = by_command(source, tmp_path / "here", folder, *FLAGS)
    with server(folder, *FLAGS, f"--database={tmp_path / 'store.db'}") as (_, url):
        there = by_command(source, tmp_path / "there", "--url", url)
        routed = by_route(openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0), source)
    assert here.keys() == there.keys() == routed.keys() == LINES.keys()
    right = {name for name, line in here.items() if line["response"] and line["response"]["status_code"] == 200}
    assert right >= GOOD and LINES.keys() - right >= {"a URL elsewhere", "a file here", "no picture", "half a picture", "17 pictures", "a number of a picture", "a temperature"}
    assert [name for name in LINES if here[name] != routed[name]] == []
    assert [name for name in LINES if here[name] != there[name]] == []
    assert "has the answers to all" in command(source, tmp_path / "here", folder, *FLAGS).stderr
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    ended = command(source, tmp_path / "here", folder, *FLAGS)
    assert ended.returncode == 2 and "has answers with template" in ended.stderr
