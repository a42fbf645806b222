"""Forms with a file: each part counts, whatever it is called, and nothing is kept of what is not read."""

import asyncio

import pytest

from chatlm.common.config import ApiKey
from chatlm.front.annexes.batches.file_routes import Upload
from embedding_pool import knowing

FILES = "/v1/files"
KEYS = [ApiKey.hashed(name * 20, name) for name in "ab"]
A, B = "a" * 20, "b" * 20
FILE = 'name="file"; filename="note.txt"'


def by_key(key):
    return {"Authorization": f"Bearer {key}"}


def part(disposition, data=b"x", headers=""):
    return b"--b\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n" + headers.encode() + b"\r\n" + data + b"\r\n"


def form(*parts):
    return b"".join(parts) + b"--b--\r\n"


PURPOSE = part('name="purpose"', b"user_data")


@pytest.fixture
async def ask(tmp_path):
    async with knowing(tmp_path / "k.db", *KEYS, headers_of=by_key) as asking:
        yield asking


async def send(ask, data, key=A):
    """(status, body) of a form."""
    place = ask.place
    headers = {**by_key(key), "Content-Type": "multipart/form-data; boundary=b"}
    async with place.client.post(place.url + FILES, data=data, headers=headers) as response:
        return response.status, await response.json()


async def is_uploaded(ask, *parts):
    status, body = await send(ask, form(*parts, PURPOSE, part(FILE, b"Wombats dig.")))
    return (status, body.get("bytes"), body.get("filename")) == (200, 12, "note.txt")


@pytest.mark.parametrize("parts", [
    [part(f'name="{number}"', b"v" * 1000) for number in range(70)],             # many fields
    [part('name="large"', b"v" * 100_000)],                                       # one that nobody reads
    [part(f'name="{"n" * 7000}"') for _ in range(10)],                            # long names
    [part('name="x"', headers=f"X-More: {'h' * 7000}\r\n") for _ in range(10)],   # long headers
], ids=["fields", "one field", "names", "headers"])
async def test_all_bytes_of_other_parts_count(ask, parts):
    status, body = await send(ask, form(*parts, PURPOSE, part(FILE, b"Wombats dig.")))
    assert status == 413 and body["error"]["code"] == "form_too_large", body
    assert "all fields of the form but the file" in body["error"]["message"]
    assert "65536 bytes" in body["error"]["message"], body
    assert await is_uploaded(ask)


async def test_empty_parts_count(ask):
    status, body = await send(ask, form(*[part('name="x"', b"")] * (Upload.PARTS + 1)))
    assert status == 400 and f"more than {Upload.PARTS} parts" in body["error"]["message"]


async def test_a_field_that_is_read_is_short(ask):
    status, body = await send(ask, form(part('name="purpose"', b"v" * 1001), part(FILE)))
    assert status == 400 and body["error"]["param"] == "purpose" and "1000 bytes" in body["error"]["message"], body


async def test_fields_that_are_not_read_are_taken_and_forgotten(ask):
    assert await is_uploaded(ask, part('name="user"', b"v" * 5000), *[part('name="again"')] * 20)


@pytest.mark.parametrize("value", [b"utf-8", b"no such charset", b"v" * 100, b"\xff\xff"])
async def test_a_form_that_names_its_charset_is_refused(ask, value):
    """aiohttp reads that field itself, and then cannot go on."""
    status, body = await send(ask, form(part('name="_charset_"', value), PURPOSE, part(FILE)))
    assert status == 400 and "the form cannot be read" in body["error"]["message"]
    assert await is_uploaded(ask)


@pytest.mark.parametrize("header", ["Content-Transfer-Encoding: rot13", "Content-Length: -5", "Content-Length: nine", "Content-Encoding: gzip"])
async def test_a_part_is_taken_as_it_is(ask, header):
    status, body = await send(ask, form(PURPOSE, part(FILE, b"Wombats dig.", f"{header}\r\n")))
    assert status == 200 and body["bytes"] == 12, body


@pytest.mark.parametrize("data", [
    form(part('name="_charset_"', b"utf-8")),
    form(part('name="inner"', b"--c\r\n\r\nx\r\n--c--", "Content-Type: multipart/mixed; boundary=c\r\n"), part(FILE)),
    form(part("x"), part(FILE)),
    form(PURPOSE, part(FILE), part(FILE)),
    b"--b\r\n" + b"x: y\r\n" * 300 + b"\r\n",
    b"--b\r\nno header\r\n\r\nx",
    b"--b--",
    b"",
], ids=lambda data: str(data[:40]))
async def test_odd_forms_are_refused_in_words(ask, data):
    status, body = await send(ask, data)
    assert status == 400, body
    assert body["error"]["message"], body
    assert (await ask(A, FILES))[1]["data"] == []
    assert await is_uploaded(ask)


async def test_a_form_that_another_key_sends_on_costs_nothing(ask):
    """It comes part by part and does not end by itself; meanwhile another key's is taken, and what it leaves is its own error."""
    uploaded = asyncio.Event()

    async def slow():
        yield part('name="x"', b"v" * 50_000)
        await uploaded.wait()
        while True:
            yield part('name="x"', b"v" * 50_000)

    sending = asyncio.ensure_future(send(ask, slow()))
    status, body = await send(ask, form(PURPOSE, part(FILE, b"Wombats dig.")), B)
    assert status == 200 and body["bytes"] == 12
    uploaded.set()
    status, body = await sending
    assert status == 413, body
    assert (await ask(A, FILES))[1]["data"] == []
