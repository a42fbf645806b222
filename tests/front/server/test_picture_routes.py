"""A server whose model sees: pictures through every API, bodies of all sizes, files that lie, two models of which one sees."""

import asyncio
import base64
import io
import json
import random
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib

import aiohttp
import pytest

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
from real_server import SCRIPT, events, get, post, server    # noqa: E402
from tiny_sight import make_smolvlm, save_sight    # noqa: E402

pytestmark = pytest.mark.timeout(120)
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    save_sight(folder, "smolvlm", make_smolvlm())
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("kept") / "store.db"
    with server(folder, "--dtype", "float32", "--served-model-name", "sees", "--no-drafts", f"--database={store}") as (_, url):
        yield url


def file_of(size=(90, 60), kind="PNG", seed=0, **options):
    target = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(target, kind, **options)
    return target.getvalue()


def bare(data):
    return base64.b64encode(data).decode()


def part(data):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{bare(data)}"}}


PHOTO, OTHER = file_of(), file_of(seed=1)


def asked(*parts, **more):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], "temperature": 0, "max_tokens": 12, "ignore_eos": True} | more


def answer(url, *parts, **more):
    body = json.load(post(f"{url}/v1/chat/completions", asked(*parts, **more)))
    return body["choices"][0]["message"]["content"], body["usage"]


def refusal(url, body, route="/v1/chat/completions"):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url + route, body)
    return refused.value.code, json.load(refused.value)["error"]


@pytest.mark.parametrize("size", [pytest.param((90, 60), marks=pytest.mark.slow), (700, 500)])     # the second one is read in a sandbox
def test_a_kept_response_goes_on_with_its_pictures(url, size):
    greedy = {"temperature": 0, "max_output_tokens": 16, "ignore_eos": True}
    source = part(file_of(size))["image_url"]["url"]
    shown = {"role": "user", "content": [{"type": "input_image", "image_url": source}, {"type": "input_text", "text": QUESTION}]}

    def respond(items, **more):
        body = json.load(post(f"{url}/v1/responses", {"input": items} | greedy | more))
        return body, next(item for item in body["output"] if item["type"] == "message")["content"][0]["text"]

    first, said = respond([shown])
    second, continued = respond("And now?", previous_response_id=first["id"])
    whole, text = respond([shown, {"role": "assistant", "content": said}, {"role": "user", "content": "And now?"}], store=False)
    assert continued == text and second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert respond([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said}, {"role": "user", "content": "And now?"}])[1] != text
    newest, oldest = (get(f"{url}/v1/responses/{second['id']}/input_items?order={order}")["data"][0] for order in ("desc", "asc"))
    assert newest["content"][0]["text"] == "And now?" and oldest["content"][0]["image_url"] == source


def test_every_api_shows_the_same_picture(url):
    text, usage = answer(url, part(PHOTO))
    assert len(text) > 3 and answer(url, part(OTHER))[0] != text != answer(url)[0]
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    responses = json.load(post(f"{url}/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": f"data:image/png;base64,{bare(PHOTO)}"}, {"type": "input_text", "text": QUESTION}]}], "max_output_tokens": 12} | greedy))
    assert responses["output"][0]["content"][0]["text"] == text and responses["usage"]["input_tokens"] == usage["prompt_tokens"]
    messages = json.load(post(f"{url}/v1/messages", {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": bare(PHOTO)}}, {"type": "text", "text": QUESTION}]}]} | greedy))
    assert messages["content"][0]["text"] == text
    native = events(post(f"{url}/chat/completions", asked(part(PHOTO))))
    assert "".join(event.get("token", "") for event in native) == text
    options = {"temperature": 0, "num_predict": 12}
    chat = json.load(post(f"{url}/api/chat", {"stream": False, "messages": [{"role": "user", "content": QUESTION, "images": [bare(PHOTO)]}], "options": options, "ignore_eos": True}))
    generated = json.load(post(f"{url}/api/generate", {"stream": False, "prompt": QUESTION, "images": [bare(PHOTO)], "options": options, "ignore_eos": True}))
    assert text.startswith(chat["message"]["content"]) and chat["message"]["content"] == generated["response"] and chat["prompt_eval_count"] == usage["prompt_tokens"]


def test_the_openai_package_sends_a_picture(url):
    """It streams the answer."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(model="sees", messages=asked(part(PHOTO))["messages"], temperature=0, max_tokens=12, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == answer(url, part(PHOTO))[0]
    assert client.models.list().data[0].model_extra["capabilities"]["vision"] is True


def test_only_a_picture_s_pixels_count(url):
    """A format changes nothing that they do not, and a second question is cached."""
    text, usage = answer(url, part(PHOTO))
    webp = file_of(kind="WEBP", lossless=True)
    again, cached = answer(url, part(webp))
    assert again == text and cached["prompt_tokens_details"]["cached_tokens"] > 0 and cached["prompt_tokens"] == usage["prompt_tokens"]


def test_a_picture_s_stream_is_replayed_as_it_was(url):
    first = [line for line in post(f"{url}/v1/chat/completions", asked(part(PHOTO), stream=True, resumable=True)) if line.startswith(b"data: {")]
    again = [line for line in urllib.request.urlopen(f"{url}/v1/streams/{json.loads(first[0][6:])['id']}") if line.startswith(b"data: {")]
    said = "".join(choice["delta"].get("content") or "" for choice in sum((json.loads(line[6:])["choices"] for line in first), []))
    assert again == first and said == answer(url, part(PHOTO))[0]


def test_a_body_of_megabytes_is_read_like_a_small_one(url):
    large = file_of((1400, 1100), seed=3)       # noise: 4.6 MB, more than is read in the event loop
    assert len(large) > 4 << 20
    first, usage = answer(url, part(large))
    assert answer(url, part(large))[0] == first and usage["prompt_tokens"] > 40
    assert answer(url, part(large), user="x" * 70_000) == (first, {**usage, "prompt_tokens_details": answer(url, part(large))[1]["prompt_tokens_details"]})
    both = answer(url, part(large), part(PHOTO))
    assert both[1]["prompt_tokens"] > usage["prompt_tokens"]
    huge = part(bytes(10 << 20))
    assert refusal(url, asked(*[huge] * 5))[0] == 413           # more than 64 MiB
    assert refusal(url, asked(huge))[1]["message"] == "messages[0].content[0].image_url.url: The image data you provided does not represent a valid image: it is of another format, allowed are PNG, JPEG, WebP, GIF"


def bomb(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image, said", [
    ("http://127.0.0.1:1/cat.png", "fetches no URLs"), ("file:///etc/passwd", "reads no files"), ("!!", "not base64"), (bare(b"<svg/>"), "an SVG"),
    (bare(PHOTO[:-40]), "damaged"), (bare(struct.pack("<4sIQ", b"II*\0", 8, 0) * 9), "a TIFF"), ((9000, 8000), "at most 64 million"), ((6000, 3), "one side")])
def test_what_is_no_picture_is_a_400(url, image, said):
    """It gives the reason. Two numbers are the width and height of a bomb."""
    image = bare(bomb(*image)) if isinstance(image, tuple) else image
    status, error = refusal(url, asked({"type": "image_url", "image_url": {"url": image}}))
    assert status == 400 and said in error["message"] and error["param"] == "messages[0].content[0].image_url.url"


def test_the_largest_allowed_picture_is_read(url):
    """It is read within the limits, and again: the first gives its memory back."""
    largest = part(bomb(8000, 8000))
    for _ in range(2):
        assert answer(url, largest)[1]["prompt_tokens"] > 40


@pytest.mark.slow
def test_many_large_pictures_give_their_memory_back(url):
    """Of a client, and again: the pixels of one such request are all that it may hold."""
    flat = []
    for level in range(16):
        Image.new("RGB", (2048, 2048), (level, 0, 0)).save(file := io.BytesIO(), "PNG")
        flat.append(part(file.getvalue()))
    for _ in range(2):
        assert answer(url, *flat)[1]["prompt_tokens"] > 16 * 40


@pytest.mark.slow
def test_sixty_megabytes_of_pictures_are_answered(url):
    noise = file_of((1400, 1100), seed=3)
    body = asked(*[part(noise)] * 10)
    assert 58 << 20 < len(json.dumps(body)) < 64 << 20
    assert json.load(post(f"{url}/v1/chat/completions", body))["usage"]["prompt_tokens"] > 10 * 40


def test_seventeen_pictures_are_too_many(url):
    """A bad one among good ones is named."""
    assert refusal(url, asked(*[part(PHOTO)] * 17))[1]["message"].startswith("images: 17 given, at most 16")
    assert refusal(url, asked(part(PHOTO), part(b"no")))[1]["param"] == "messages[0].content[1].image_url.url"


def test_text_that_spells_picture_marks_is_text(url):
    plain = {"messages": [{"role": "user", "content": "<image> <fake_token_around_image>"}], "max_tokens": 3, "temperature": 0}
    assert json.load(post(f"{url}/v1/chat/completions", plain))["usage"]["prompt_tokens"] < 80
    shown = json.load(post(f"{url}/apply-template", asked(part(PHOTO))))["prompt"]
    assert shown.count(QUESTION) == 1
    counted = json.load(post(f"{url}/v1/messages/count_tokens", {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": bare(PHOTO)}}, {"type": "text", "text": QUESTION}]}]}))
    assert counted["input_tokens"] == answer(url, part(PHOTO))[1]["prompt_tokens"]


async def test_clients_with_pictures_may_vanish(url):
    """A server that many of them leave still answers."""
    text = answer(url, part(PHOTO))[0]
    generator = random.Random(7)

    async def vanish(client, number):
        body = asked(part(file_of(seed=number)), stream=True, max_tokens=200)
        try:
            async with asyncio.timeout(generator.random()):
                async with client.post(f"{url}/v1/chat/completions", json=body) as response:
                    async for _ in response.content:
                        pass
        except (TimeoutError, aiohttp.ClientError):
            pass
    async with aiohttp.ClientSession() as client:
        await asyncio.gather(*(vanish(client, number) for number in range(2, 14)))
    assert answer(url, part(PHOTO))[0] == text
    assert all(worker["state"] == "ready" for worker in get(f"{url}/stats")["workers"])


def test_a_blind_model_names_the_one_that_sees(folder, nanochat_fixtures):
    with server(nanochat_fixtures / "gen5", folder, "--dtype", "float32", "--no-drafts") as (_, url):
        able = {model["id"]: model["capabilities"]["vision"] for model in get(f"{url}/v1/models")["data"]}
        assert sorted(able.values()) == [False, True]
        sees, blind = sorted(able, key=able.get, reverse=True)
        text = answer(url, part(PHOTO), model=sees)[0]
        status, error = refusal(url, asked(part(PHOTO), model=blind))
        assert status == 400 and error["message"] == "messages[0].content[0].image_url.url: this model cannot see images; of the models here, these can: \"" + sees + "\""
        large = part(file_of((300, 300)))
        assert "this model cannot see images" in refusal(url, asked(large, model=blind))[1]["message"]
        assert len(text) > 3
        compared = [json.loads(line[6:]) for line in post(f"{url}/v1/compare", asked(part(PHOTO), models=[sees, sees])) if line.startswith(b"data: {")]
        assert ["".join(event.get("token", "") for event in compared if event.get("index") == index) for index in (0, 1)] == [text, text]
        assert "cannot see images" in refusal(url, asked(part(PHOTO), models=[sees, blind]), "/v1/compare")[1]["message"]


def test_the_command_batch_shows_the_same_picture(url, folder, tmp_path):
    """It shows the model what a server shows it."""
    large = part(file_of((300, 200), seed=5))       # of 240 KB as base64: it is opened in a sandbox
    lines = [{"custom_id": str(number), "url": "/v1/chat/completions", "body": asked(each)} for number, each in enumerate((part(PHOTO), large))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [sys.executable, str(SCRIPT), "batch", "--dtype", "float32", str(folder), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    subprocess.run(words, check=True, capture_output=True, timeout=100)
    bodies = [json.loads(line)["response"]["body"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [body["choices"][0]["message"]["content"] for body in bodies] == [answer(url, each)[0] for each in (part(PHOTO), large)]


@pytest.mark.slow
def test_a_response_of_60_mb_of_pictures_is_kept(url):
    """It is shown and deleted too."""
    source = part(file_of((1400, 1100), seed=3))["image_url"]["url"]
    shown = {"role": "user", "content": [*[{"type": "input_image", "image_url": source}] * 10, {"type": "input_text", "text": QUESTION}]}
    response = json.load(post(f"{url}/v1/responses", {"input": [shown], "max_output_tokens": 16}))
    kept = f"{url}/v1/responses/{response['id']}"
    [item] = get(f"{kept}/input_items")["data"]
    assert [each.get("image_url") for each in item["content"]] == [source] * 10 + [None] and get(kept)["id"] == response["id"]
    code, error = refusal(url, {"input": "And now?", "previous_response_id": response["id"]}, "/v1/responses")
    assert code == 400 and "what was said before is too large" in error["message"]
    with urllib.request.urlopen(urllib.request.Request(kept, method="DELETE"), timeout=60) as deleted:
        assert json.load(deleted)["deleted"]
