"""POST /extract on a running server: documents in bodies and forms, attacks, and what stays behind."""

import asyncio
import json
import os
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest

from chatlm.front.admission.admission import Admission
import documents
from fake_pool import serving
from nightly import by_day
from real_server import ask, descendants, events, post, server

for module in ("pypdfium2", "mammoth", "markdownify", "openpyxl", "pptx"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def running(nanochat_fixtures):
    """A server of its own, whose sandboxes are counted."""
    with server(nanochat_fixtures / "gen5", "--api-key", "k") as (process, url):
        yield process, url


@pytest.fixture
def url(running):
    return running[1]


def extract(url, data, name="", kind="application/octet-stream", key="k"):
    """(status, body)."""
    query = f"?name={urllib.parse.quote(name)}" if name else ""
    request = urllib.request.Request(f"{url}/extract{query}", data, {"Content-Type": kind, "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_document_is_the_body_or_a_form_s_file(url, tmp_path):
    data = documents.pdf(["one", "two"])
    expected = {"text": "[page 1]\none\n\n[page 2]\ntwo", "pages": 2, "cut": None}
    assert extract(url, data) == (200, expected)
    (tmp_path / "my report.pdf").write_bytes(data)
    sent = subprocess.run(["curl", "-sS", "-H", "X-Api-Key: k", "-F", f"file=@{tmp_path}/my report.pdf", url + "/extract"], capture_output=True, check=True)
    assert json.loads(sent.stdout) == expected
    assert extract(url, b"<p>text", "a.html") == (200, {"text": "text", "pages": None, "cut": None})


def test_document_refusals_say_what_is_allowed(url):
    """They also say what is wrong."""
    for data, name, words, code in (
            (b"", "", "the body is empty", 400), (b"te\0xt", "a\x1b[31m.txt", '"a\\u001b[31m.txt" is of none of the formats that can be read: PDF, DOCX', 400),
            (documents.ENCRYPTED_PDF, "", "encrypted: save it without its password", 400), (documents.pdf([""]), "", "has no text", 400),
            (b"x" * ((32 << 20) + 1), "", "exceeds the maximum size of 33554432 bytes", 413)):
        status, body = extract(url, data, name)
        assert status == code and words in body["detail"], body
    assert extract(url, b"--B--", kind="multipart/form-data; boundary=B")[1]["detail"].startswith("the form has no file")
    assert extract(url, documents.pdf(["x"]), key="wrong")[0] == 401


@pytest.mark.parametrize("limit_s, paragraphs", by_day([(2.0, 400_000), (12.0, 2_400_000)], (2.0, 400_000)))
async def test_a_document_bomb_is_refused(start_pool, monkeypatch, limit_s, paragraphs):
    """A DOCX of 250 KB, of 2.4 million paragraphs, takes all the time or memory that it may."""
    monkeypatch.setattr(Admission, "DOCUMENT_S", limit_s)
    pool = await start_pool()
    async with serving(pool, pool.settings) as url:
        status, body = await asyncio.to_thread(extract, url, documents.docx("<w:p><w:r><w:t>x</w:t></w:r></w:p>" * paragraphs))
        assert status == 400 and f"too complex: this takes more than {limit_s:g} s of processor time or 1024 MiB" in body["detail"], body
        assert (await asyncio.to_thread(extract, url, documents.pdf(["alive"])))[1]["text"] == "alive"


@pytest.mark.parametrize("count", by_day([2, 4], 2))
def test_broken_documents_leave_no_process(running, count):
    """Bytes are changed, cut and repeated at random; whatever the libraries do, each gets text or a reason."""
    process, url = running
    dice = random.Random(65)
    for good in (documents.pdf(["some text"] * 3), documents.docx(), documents.pptx([("a", "b", "c")]), documents.xlsx({"s": [[1, 2]]}),
                 documents.epub({"a.xhtml": "<p>x"}), b"<html><p>x</html>"):
        for _ in range(count):
            data = bytearray(good)
            for _ in range(dice.randint(1, 20)):
                data[dice.randrange(4, len(data))] = dice.randrange(256)
            if dice.random() < 0.3:
                del data[dice.randrange(5, len(data)):]
            status, body = extract(url, bytes(data))
            assert status in (200, 400) and ("text" in body) == (status == 200), body
            assert status == 200 or len(body["detail"]) < 400 and "\n" not in body["detail"]
    waits_until(lambda: not sandboxes_of_documents(process))


def sandboxes_of_documents(process):
    """Its children that have loaded PDFium or wait for a document."""
    return [child for child in descendants(process)
            if any("pdfium" in each.path or "_elementpath" in each.path for each in maps_of(child))]


def maps_of(process):
    try:
        return process.memory_maps()
    except psutil.NoSuchProcess:
        return []


def waits_until(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        os.sched_yield()


def test_a_document_disturbs_nobody_who_chats(running):
    """A client that leaves and others that chat are not disturbed."""
    process, url = running
    host, port = url.removeprefix("http://").split(":")
    data = documents.pdf(["word " * 300] * 400)
    head = f"POST /extract HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    for part in (head, head + data[:1000], head + data):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(part)
    request = urllib.request.Request(url + "/chat/completions", json.dumps(ask("hello", max_tokens=5)).encode(),
                                     {"Content-Type": "application/json", "Authorization": "Bearer k"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert events(response)[-1]["done"]
    answers = []
    threads = [threading.Thread(target=lambda i=i: answers.append((i, extract(url, documents.pdf([f"text {i}"]))[1]["text"]))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(i, f"text {i}") for i in range(6)]
    waits_until(lambda: not sandboxes_of_documents(process))


def test_without_its_libraries_extract_names_them(nanochat_fixtures, tmp_path):
    """The server says what to install."""
    for name in ("pypdfium2", "bs4"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('no such thing')")
    with server(nanochat_fixtures / "gen5", env=os.environ | {"PYTHONPATH": str(tmp_path)}) as (_, url):
        status, body = extract(url, documents.pdf(["x"]))
        assert status == 501 and "reading PDF files needs the Python package" in body["detail"] and body["detail"].endswith("pip install markdownify mammoth openpyxl pypdfium2 python-pptx")
        assert extract(url, b"<html>x")[0] == 501


@pytest.mark.slow
def test_the_default_model_reads_a_document(default_url):
    """The default model answers about a document."""
    _, read = extract(default_url, documents.pdf(["The treasure lies under the old oak tree.", "Nothing else."]))
    question = ask(f"{read['text']}\n\nWhere does the treasure lie?", max_tokens=30)
    answer = json.load(post(default_url + "/v1/chat/completions", question))
    assert "oak" in answer["choices"][0]["message"]["content"]
