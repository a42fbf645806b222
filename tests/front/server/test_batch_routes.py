"""/v1/files and /v1/batches: OpenAI's client uses them unchanged, and no line is lost or answered twice."""

import json
import os
import random
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial

import openai
import psutil
import pytest

from chatlm.front.annexes.batches.file_routes import requests_of
from nightly import by_day
from real_server import SCRIPT, get, post, server, wait_for


def ask_line(custom_id, text="Hello", url="/v1/chat/completions", **more):
    return {"custom_id": custom_id, "method": "POST", "url": url,
            "body": {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}}


def jsonl(lines):
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


@contextmanager
def batching(model, store, *words, keys=(), port=0):
    """A server of its own, for what kills it or counts what its database has."""
    with server(model, f"--database={store}", *words, *(word for key in keys for word in ("--api-key", key))) as (process, url):
        yield process, openai.OpenAI(base_url=url + "/v1", api_key=(keys or ["none"])[0], max_retries=0)
        process.kill()


def ended(client, batch, limit_s=60):
    deadline_s = time.monotonic() + limit_s
    while (batch := client.batches.retrieve(batch.id)).status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.1)
    return batch


def begun(client, lines, endpoint="/v1/chat/completions", **more):
    data = lines if isinstance(lines, bytes) else jsonl(lines)
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def results(client, name):
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


@pytest.fixture(scope="module")
def model(nanochat_fixtures):
    return nanochat_fixtures / "gen5"


@pytest.fixture
def running(keeping_server):
    return openai.OpenAI(base_url=keeping_server.url + "/v1", api_key="none", max_retries=0)


def test_a_batch_of_each_endpoint_is_answered(running):
    bodies = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}, "/v1/completions": {"prompt": "Once", "max_tokens": 3},
              "/v1/responses": {"input": "Hi", "max_output_tokens": 16}, "/v1/embeddings": {"input": "Hi"}}
    for endpoint, body in bodies.items():
        batch = begun(running, [{"custom_id": "a", "method": "POST", "url": endpoint, "body": body}], endpoint, metadata={"night": "1"})
        assert batch.object == "batch" and batch.status == "validating" and batch.metadata == {"night": "1"}
        batch = ended(running, batch)
        assert (batch.status, batch.error_file_id, batch.request_counts.completed) == ("completed", None, 1)
        assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at and batch.expires_at == batch.created_at + 86400
        [found] = results(running, batch.output_file_id)
        assert found["custom_id"] == "a" and found["response"]["status_code"] == 200 and found["error"] is None
        assert found["response"]["body"]["object"] in ("chat.completion", "text_completion", "response", "list")


def test_bad_lines_are_errors_and_the_others_run(running):
    lines = [ask_line("a"), "", "no json", ask_line("b", stream=True), ask_line("c", model="nope"), ask_line("a", "again"), ask_line("d", temperature=9),
             ask_line("e", url="/v1/files"), {"custom_id": "f", "url": "/v1/completions", "body": {"prompt": "x"}}, ask_line("g", "x" * 100_000), ask_line("h")]
    file = running.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    assert "6 of 10 lines" in file.status_details and "line 3: is not JSON" in file.status_details
    kept = jsonl(line for line in lines if line)        # without the blank one, which counts all the same
    assert running.files.content(file.id).content == kept and file.bytes == len(kept)
    batch = ended(running, running.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"))
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 10, 2, 8)
    assert [found["custom_id"] for found in results(running, batch.output_file_id)] == ["a", "h"]
    errors = results(running, batch.error_file_id)
    assert [(found["error"] or found["response"]["body"]["error"])["code"] for found in errors] == [
        "invalid_line", "invalid_line", "model_not_found", "invalid_line", "invalid_value", "invalid_line", "invalid_line", "context_length_exceeded"]
    assert [found["custom_id"] for found in errors] == [None, None, "c", "a", "d", None, "f", "g"]


def test_any_bytes_spoil_only_their_own_line(running):
    """Whatever they are: no upload fails for one."""
    good = [json.dumps(ask_line(name, max_tokens=1)).encode() for name in ("b\0\x1b[1m\u202e\r\n", "c", "d")]
    half = json.dumps(ask_line("e")).encode().replace(b'"e"', b'"\\ud800"')
    lines = [b"\xef\xbb\xbf" + good[0], b"", b"\xff" + good[0], half, b" \t" + good[1] + b" \r", good[1], json.dumps(ask_line("f")).encode("utf-16"),
             json.dumps(ask_line("g", "x" * 200_000, temperature=99)).encode(), b"\0\0", b"[" * 200_000, good[2]]
    file = running.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    assert running.files.content(file.id).content == b"\n".join(line for line in lines if line) and file.status_details.startswith("7 of 10 lines cannot be run")
    batch = ended(running, running.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"))
    assert [found["custom_id"] for found in results(running, batch.output_file_id)] == ["b\0\x1b[1m\u202e\r\n", "c", "d"]
    said = [(found["custom_id"], (found["error"] or found["response"]["body"]["error"])["message"]) for found in results(running, batch.error_file_id)]
    assert said == [(None, "line 3: is not JSON in UTF-8"), (None, "line 4: custom_id must be a text of at most 512 characters"), ("c", 'line 6: an earlier line has its custom_id, "c"'),
                    (None, "line 7: is not JSON in UTF-8"), ("g", "temperature must be a finite number from 0 to 2, not 99"),
                    (None, "line 9: is not JSON in UTF-8"), (None, "line 10: is not JSON in UTF-8")]


def test_blank_lines_are_those_of_a_plain_split():
    dice = random.Random(5)
    for _ in range(2000):
        data = b"".join(dice.choice((b"\n", b"\n", b" ", b"\r\n", b"\t", b"\x0b\x0c", b"a", b"{}", b"\x1c", b"\xa0", b"\0")) for _ in range(dice.randrange(1, 30)))
        plain = [line + b"\n" for line in data.split(b"\n")]
        plain[-1] = plain[-1][:-1]
        assert [*requests_of(data, 7)] == [(number, line) for number, line in enumerate(plain, 7) if line.strip()]


def test_blank_lines_are_counted_and_never_stored(model, tmp_path):
    """Six million of them, and lines of blanks, before, between and after two requests."""
    lines = [json.dumps(ask_line(name, max_tokens=1)).encode() for name in "ab"]
    blank = b"\n" * (3 << 20)
    with batching(model, tmp_path / "a.db") as (_, client):
        data = blank + lines[0] + b"\n" + (b" " * 999 + b"\r\n") * 1000 + b"no json\n" + blank + lines[1] + b"\n\n \n"
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        assert file.bytes == sum(map(len, lines)) + 10 and file.status_details == f"1 of 3 lines cannot be run as they are; the first: line {(3 << 20) + 1002:,}: is not JSON in UTF-8"
        assert client.files.content(file.id).content == lines[0] + b"\nno json\n" + lines[1] + b"\n" and rows_of(tmp_path / "a.db")[1] == 3
        batch = ended(client, client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"))
        assert [found["custom_id"] for found in results(client, batch.output_file_id)] == ["a", "b"]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 << 20


def test_a_name_that_no_text_can_be_is_refused(running):
    for name in ("previous_response_id", "conversation"):
        with pytest.raises(urllib.error.HTTPError) as found:
            post(f"{running.base_url}responses", {"input": "x", name: "\ud800"})
        assert found.value.code == 400 and b"half of a character" in found.value.read()


def test_a_batch_of_bad_lines_fails_and_says_why(running):
    batch = ended(running, begun(running, ["no", "json"]))
    assert batch.status == "failed" and [(error.line, error.code) for error in batch.errors.data] == [(1, "invalid_line"), (2, "invalid_line")]
    assert batch.output_file_id is None and batch.request_counts.failed == 2


def test_batches_are_listed_in_pages(running):
    """What was deleted is gone from them."""
    files = [running.files.create(file=(f"{index}.jsonl", jsonl([ask_line("a")])), purpose="batch") for index in range(5)]
    names = [file.id for file in files]
    page = running.files.list(limit=2, purpose="batch")
    assert [file.id for file in page.data] == names[:-3:-1] and page.has_more
    assert [file.id for file, _ in zip(running.files.list(limit=2, purpose="batch"), range(5))] == names[::-1]
    assert [file.id for file in running.files.list(limit=2, after=names[0], order="asc").data] == names[1:3]
    assert running.files.delete(names[0]).deleted
    for gone in (running.files.retrieve, running.files.content, running.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(names[0])
    with pytest.raises(openai.NotFoundError):
        running.batches.create(input_file_id=names[0], endpoint="/v1/completions", completion_window="24h")
    batches = [begun(running, [ask_line("a", max_tokens=1)]) for _ in range(3)]
    assert [batch.id for batch, _ in zip(running.batches.list(limit=2), range(3))] == [batch.id for batch in batches[::-1]]
    with pytest.raises(openai.BadRequestError, match="after"):
        running.batches.list(after="batch_nope")
    with pytest.raises(openai.BadRequestError, match="from 1 to 100"):
        running.batches.list(limit=0)
    for batch in batches:
        ended(running, batch)


def test_a_cancelled_batch_keeps_its_answers(running):
    """Its input can be deleted only then."""
    batch = begun(running, [ask_line(str(index), max_tokens=50, ignore_eos=True) for index in range(1000)])
    while not running.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.01)
    with pytest.raises(openai.ConflictError, match=f"{batch.id} still needs this file"):
        running.files.delete(batch.input_file_id)
    assert running.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(running, batch)
    assert batch.status == "cancelled" and batch.cancelling_at <= batch.cancelled_at and 0 < batch.request_counts.completed < 1000
    assert len(results(running, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
        running.batches.cancel(batch.id)
    assert running.files.delete(batch.input_file_id).deleted and running.batches.retrieve(batch.id).input_file_id == batch.input_file_id


@pytest.mark.parametrize("changes, said", [
    ({"endpoint": "/v1/rerank"}, "endpoint must be"), ({"completion_window": "3w"}, "completion_window must be"), ({"completion_window": "31d"}, "completion_window"),
    ({"metadata": {"a": "x" * 513}}, "metadata must be"), ({"input_file_id": "file-\x1b[2Jno"}, "there is no file"), ({"output_expires_after": {"seconds": 5}}, "output_expires_after")])
def test_a_batch_that_cannot_be_is_refused(running, changes, said):
    file = running.files.create(file=("in.jsonl", jsonl([ask_line("a")])), purpose="batch")
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said):
        running.batches.create(**{"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | changes)


@pytest.mark.parametrize("name", ["../../etc/passwd", "x" * 3000, "\u202egnp.jsonl"])
def test_a_file_s_name_is_only_shown(running, name):
    file = running.files.create(file=(name, jsonl([ask_line("a")])), purpose="batch")
    assert len(file.filename) <= 255 and file.filename.isprintable() and file.filename
    assert running.files.content(file.id).content == jsonl([ask_line("a")])


def form(*parts, boundary=b"edge"):
    return b"".join(b"--" + boundary + b"\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + body + b"\r\n" for head, body in parts) + b"--" + boundary + b"--\r\n"


PURPOSE, LINE = (b'name="purpose"', b"batch"), jsonl([ask_line("a")])
ODD_FORMS = {
    "control characters in a name": (form(PURPOSE, (b'name="file"; filename="a\x1b[2Jb"', LINE)), "form cannot be read"),
    "a form without its end": (form(PURPOSE, (b'name="file"; filename="a"', LINE))[:-40], "form cannot be read|200"),
    "no form at all": (b"nothing of the kind", "form cannot be read"),
    "two files": (form(PURPOSE, (b'name="file"; filename="a"', LINE), (b'name="file"; filename="b"', LINE)), "one file"),
    "a field without a name": (form(PURPOSE, (b'filename="a"', LINE)), "one file"),
    "a long field": (form((b'name="purpose"', b"batch" * 1000), (b'name="file"; filename="a"', LINE)), "has more than"),
    "no purpose": (form((b'name="file"; filename="a"', LINE)), "purpose must be"),
    "no file": (form(PURPOSE), "file is missing"),
    **{f"an expiry of {text}": (form(PURPOSE, (b'name="expires_after[seconds]"', text.encode()), (b'name="file"; filename="a"', LINE)),
                                "expires_after\\[seconds\\] must be an integer from 3600")
       for text in ("\u00b2", "\u2463", "36\u0660\u0660\u00b2", "9" * 900, "-3600", "3600.0", "", " ", "\0")},
    "a line that is too long": (form(PURPOSE, (b'name="file"; filename="a"', b"x" * (17 << 20))), "line 1 has more than"),
    "too many lines": (form(PURPOSE, (b'name="file"; filename="a"', b"{}\n" * 50_001)), "more than 50,000 lines"),
}


@pytest.mark.parametrize("what", ODD_FORMS)
def test_an_unreadable_form_leaves_nothing(running, what):
    """Forms that cannot be read are refused."""
    body, said = ODD_FORMS[what]
    before = [file.id for file in running.files.list()]
    request = urllib.request.Request(f"{running.base_url}files", body, {"Content-Type": "multipart/form-data; boundary=edge"})
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request, timeout=60)
    assert found.value.code in (400, 413) and re.search(said, found.value.read().decode())
    assert [file.id for file in running.files.list()] == before


def test_a_form_with_the_file_first_is_read(running):
    body = form((b'name="file"; filename="a"', b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + b"\r\n" + LINE.replace(b'"a"', b'"b"')[:-1]), PURPOSE)
    request = urllib.request.Request(f"{running.base_url}files", body, {"Content-Type": "multipart/form-data; boundary=edge"})
    file = json.load(urllib.request.urlopen(request, timeout=60))
    assert file["status_details"] is None
    batch = ended(running, running.batches.create(input_file_id=file["id"], endpoint="/v1/chat/completions", completion_window="1h"))
    assert batch.request_counts.completed == 2 and batch.expires_at == batch.created_at + 3600


def rows_of(store):
    with closing(sqlite3.connect(store)) as reader:
        return reader.execute("SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM lines)").fetchone()


def free_pages(store):
    with closing(sqlite3.connect(store)) as reader:
        return reader.execute("PRAGMA freelist_count").fetchone()[0]


def test_an_upload_that_is_cut_leaves_nothing(model, tmp_path):
    with batching(model, tmp_path / "a.db") as (_, client):
        host = client.base_url.host, client.base_url.port
        with socket.create_connection(host) as cut:
            cut.sendall(b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=edge\r\nContent-Length: 9000000\r\n\r\n"
                        + form(PURPOSE, (b'name="file"; filename="a"', LINE * 3000))[:-300])
            while not rows_of(tmp_path / "a.db")[1]:
                time.sleep(0.01)
        deadline_s = time.monotonic() + 60
        while rows_of(tmp_path / "a.db") != (0, 0):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_uploads_at_once_keep_their_lines_apart(running):
    contents = [jsonl([ask_line(f"{index}-{number}", "x" * 200) for number in range(300)]) for index in range(4)]
    with ThreadPoolExecutor(4) as threads:
        files = [*threads.map(lambda data: running.files.create(file=("in.jsonl", data), purpose="batch"), contents)]
    assert [running.files.content(file.id).content for file in files] == contents


def mixed_lines(count):
    """Greedy and seeded answers, several choices, some errors."""
    return [ask_line(str(number), f"Tell me about {number}", max_tokens=8 + number % 24, temperature=number % 2, **({"n": 2} if number % 7 == 3 else {}),
                     **({"model": "nope"} if number % 29 == 5 else {}), **({"top_k": -5} if number % 31 == 6 else {})) for number in range(count)]


def answered_lines(store):
    with closing(sqlite3.connect(store)) as reader:
        return sum(reader.execute("SELECT completed + failed FROM batches ORDER BY id DESC LIMIT 1").fetchone())


def charged(store):
    with closing(sqlite3.connect(store)) as reader:
        return reader.execute("SELECT TOTAL(requests), TOTAL(prompt_tokens), TOTAL(completion_tokens) FROM usage WHERE background").fetchone()


def check_charges(store, output, batches):
    """So many batches with these answers were charged what their files say, to the token, though servers were killed meanwhile."""
    usage = [json.loads(line)["response"]["body"]["usage"] for line in output.splitlines()]
    told = len(usage), *(sum(one[name] for one in usage) for name in ("prompt_tokens", "completion_tokens"))
    assert charged(store) == tuple(batches * one for one in told)


def disturbed(model, store, lines, kills):
    """The files of a batch during which processes are killed, and those of an undisturbed one on the same input.

    kills: after how many lines each kill comes; every third is of the worker, the others are of the server."""
    name, kills, limit_s = None, [*enumerate(kills)], 60 + 0.1 * len(lines)
    while True:
        with batching(model, store) as (process, client):
            if name is None:
                name = begun(client, lines).id
            while kills:
                number, least = kills[0]
                assert (done := answered_lines(store)) < len(lines), "it ended too early"
                if done >= least:
                    kills.pop(0)
                    if number % 3 != 1:
                        process.send_signal(signal.SIGKILL)
                        break
                    [worker] = get(str(client.base_url.join("/stats")))["workers"]
                    with suppress(ProcessLookupError):
                        os.kill(worker["pid"], signal.SIGKILL)
                time.sleep(0.005)
            else:
                batch = ended(client, client.batches.retrieve(name), limit_s)
                again = ended(client, client.batches.create(input_file_id=batch.input_file_id, endpoint=batch.endpoint, completion_window="24h"), limit_s)
                contents = [[client.files.content(name).content for name in (one.output_file_id, one.error_file_id)] for one in (batch, again)]
                check_charges(store, contents[1][0], 2)
                return batch, *contents


def check_disturbed(batch, found, undisturbed, count):
    assert found == undisturbed and batch.status == "completed"
    numbers = sorted(int(json.loads(line)["custom_id"]) for content in found for line in content.splitlines())
    assert numbers == [*range(count)] and batch.request_counts.total == count
    assert batch.request_counts.failed == len(found[1].splitlines()) and batch.request_counts.completed == len(found[0].splitlines())


def test_a_killed_batch_gives_the_same_output(model, tmp_path):
    """A batch goes on after kills; its output is that of an undisturbed one."""
    check_disturbed(*disturbed(model, tmp_path / "a.db", mixed_lines(120), [1, 14, 28]), 120)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_lines_outlast_twenty_kills(model, tmp_path):
    check_disturbed(*disturbed(model, tmp_path / "a.db", mixed_lines(10_000), [*range(200, 9800, 480)][:20]), 10_000)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_a_batch_waits_while_the_disk_is_full(model, tmp_path):
    """A batch waits while nothing can be written and then goes on."""
    with batching(model, tmp_path / "a.db") as (process, client):
        batch = begun(client, [ask_line(str(number), max_tokens=15, ignore_eos=True) for number in range(200)])
        while answered_lines(tmp_path / "a.db") < 20:
            time.sleep(0.005)
        front = psutil.Process(process.pid)
        front.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))      # as on a full disk
        with pytest.raises(openai.APIStatusError, match="database cannot be used now") as found:
            client.responses.create(model="default", input="x", max_output_tokens=16)
        assert found.value.status_code == 503
        with pytest.raises(openai.APIStatusError, match="database cannot be used now"):
            client.files.create(file=("in.jsonl", LINE), purpose="batch")
        stuck = answered_lines(tmp_path / "a.db")
        assert client.responses.create(model="default", input="x", max_output_tokens=16, store=False, extra_body={"ignore_eos": True}).status == "incomplete"
        assert answered_lines(tmp_path / "a.db") == stuck < 200
        front.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        batch = ended(client, batch)
        assert [found["custom_id"] for found in results(client, batch.output_file_id)] == [str(number) for number in range(200)]


def again(client, batch):
    """The output of another batch on the same input."""
    batch = ended(client, client.batches.create(input_file_id=batch.input_file_id, endpoint=batch.endpoint, completion_window="24h"))
    return client.files.content(batch.output_file_id).content


@pytest.mark.slow
def test_a_batch_outlasts_a_held_store(model, tmp_path):
    """A batch goes on after another program has held the store, and chats do meanwhile."""
    with batching(model, tmp_path / "a.db") as (process, client):
        batch = begun(client, [ask_line(str(number), max_tokens=15) for number in range(160)])
        while answered_lines(tmp_path / "a.db") < 20:
            time.sleep(0.005)
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=60)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for _ in range(2):
                assert client.responses.create(model="default", input="x", max_output_tokens=16, store=False, extra_body={"ignore_eos": True}).status == "incomplete"
                with pytest.raises(openai.APIStatusError, match="database cannot be used now") as found:
                    client.batches.retrieve(batch.id)
                assert found.value.status_code == 503
            stuck = answered_lines(tmp_path / "a.db")
        assert stuck < 160
        batch = ended(client, batch)
        whole = client.files.content(batch.output_file_id).content
        assert again(client, batch) == whole and len(whole.splitlines()) == 160


def test_a_failing_batch_is_tried_until_it_goes_on(model, tmp_path):
    """Another program has put a trigger into the store: recording a line is an error that is none of a full disk's."""
    def change(statement):
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=60)) as other:
            other.execute(statement)
    with batching(model, tmp_path / "a.db") as (process, client):
        batch = begun(client, [ask_line(str(number), max_tokens=30) for number in range(100)])
        while answered_lines(tmp_path / "a.db") < 10:
            time.sleep(0.005)
        change("CREATE TRIGGER refuse BEFORE INSERT ON lines WHEN NEW.custom_id IS NULL BEGIN SELECT RAISE(ABORT, 'an odd failure'); END")
        for _ in range(2):      # after a pause
            wait_for(process, f"working on {batch.id} failed: an odd failure")
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert client.responses.create(model="default", input="x", max_output_tokens=16, store=False, extra_body={"ignore_eos": True}).status == "incomplete"
        change("DROP TRIGGER refuse")
        batch = ended(client, batch)
        whole = client.files.content(batch.output_file_id).content
        assert again(client, batch) == whole and batch.request_counts.completed == 100
        check_charges(tmp_path / "a.db", whole, 2)


def test_a_batch_without_budget_holds_nobody_up(model, tmp_path):
    """Its lines wait without a slot; with tokens again they are answered, to the byte as others'."""
    def keys(tokens):
        (tmp_path / "keys").write_text(f"broke: first-key tokens-per-day={tokens} over-budget=refuse\nfree: second-key\n")
        (tmp_path / "keys").chmod(0o600)
        return "--api-key-file", tmp_path / "keys", "--max-batch", "2"
    lines = [ask_line(str(number), f"Tell me about {number}") for number in range(16)]
    with batching(model, tmp_path / "a.db", *keys(0)) as (_, client):
        client = client.with_options(api_key="first-key")
        waiting, cancelled = begun(client, lines), begun(client, lines)
        other = client.with_options(api_key="second-key")
        assert ended(other, begun(other, lines[:3])).request_counts.completed == 3
        client.batches.cancel(cancelled.id)
        assert ended(client, cancelled).request_counts.completed == client.batches.retrieve(waiting.id).request_counts.completed == 0
    with batching(model, tmp_path / "a.db", *keys(0)) as (_, client):       # it waits on after a restart
        other = client.with_options(api_key="second-key")
        free = ended(other, begun(other, lines))
        answers = other.files.content(free.output_file_id).content
        assert client.with_options(api_key="first-key").batches.retrieve(waiting.id).status == "in_progress"
    with batching(model, tmp_path / "a.db", *keys(10**9)) as (_, client):
        client = client.with_options(api_key="first-key")
        done = client.files.content(ended(client, waiting).output_file_id).content.splitlines()
        created = [json.loads(content[0])["response"]["body"]["created"] for content in (done, answers.splitlines())]
        assert [line.replace(b'"created": %d' % created[0], b'"created": %d' % created[1]) for line in done] == answers.splitlines()


def test_long_lines_make_room_for_another_key(model, tmp_path):
    """Their answers stay the same."""
    long = [ask_line(str(number), f"Tell me about {number}", max_tokens=200, ignore_eos=True) for number in range(60)]
    with batching(model, tmp_path / "a.db", "--max-batch", "2", keys=("first-key", "second-key")) as (_, client):
        other = client.with_options(api_key="second-key")
        slow = begun(client, long)
        while not answered_lines(tmp_path / "a.db"):
            time.sleep(0.005)
        quick = ended(other, begun(other, [ask_line("a", max_tokens=5, ignore_eos=True)]))
        assert quick.request_counts.completed == 1 and client.batches.retrieve(slow.id).request_counts.completed < 60
        slow = ended(client, slow)
        assert client.files.content(slow.output_file_id).content == again(client, slow)


@pytest.mark.parametrize("least", by_day([0, 10, 20], 10))
def test_a_cancelled_batch_costs_what_it_has_written(model, tmp_path, least):
    with batching(model, tmp_path / "a.db") as (process, client):
        batch = begun(client, [ask_line(str(number), max_tokens=20) for number in range(200)])
        while answered_lines(tmp_path / "a.db") < least:
            time.sleep(0.005)
        client.batches.cancel(batch.id)
        batch = ended(client, batch)
        assert batch.status == "cancelled" and batch.request_counts.completed < 200
        check_charges(tmp_path / "a.db", client.files.content(batch.output_file_id).content if batch.output_file_id else b"", 1)


def test_a_large_line_is_answered_like_a_small_one(running):
    """It is read in a sandbox."""
    lines = [ask_line("small", "Hello", seed=5), ask_line("large", "Hello", seed=5, extra="x" * 200_000)]
    batch = ended(running, begun(running, lines))
    small, large = (found["response"]["body"] for found in results(running, batch.output_file_id))
    assert small["choices"] == large["choices"] and small["usage"] == large["usage"]


def test_ids_of_calls_and_items_follow_from_the_line(running):
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "Hi", "max_output_tokens": 16}}]
    batch = ended(running, begun(running, lines, "/v1/responses"))
    again = ended(running, running.batches.create(input_file_id=batch.input_file_id, endpoint=batch.endpoint, completion_window="24h"))
    assert running.files.content(batch.output_file_id).content == running.files.content(again.output_file_id).content
    [found] = results(running, batch.output_file_id)
    assert found["response"]["body"]["store"] is False
    with pytest.raises(openai.NotFoundError):
        running.responses.retrieve(found["response"]["body"]["id"])


def test_a_batch_output_shows_no_drafts(running):
    """It depends on what was said and measured before: an answer to the same question has it, where it is shown."""
    body = ask_line("a", "one two three " * 20, max_tokens=60, temperature=0, ignore_eos=True, logprobs=True)["body"]
    batch = begun(running, [{"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body} for number in range(4)])
    whole = running.files.content(ended(running, batch).output_file_id).content
    shown = running.post("/chat/completions", body=body, cast_to=object)
    tokens = [{name: value for name, value in token.items() if name != "drafted"} for token in shown["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == 60 and "drafted" in str(shown) and b"drafted" not in whole
    assert all(json.loads(line)["response"]["body"]["choices"][0]["logprobs"]["content"] == tokens for line in whole.splitlines())


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
def test_a_line_continues_no_response(running, name):
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "Hi", name: "x"}}]
    batch = ended(running, begun(running, lines, "/v1/responses"))
    assert "left out in a batch" in running.files.content(batch.error_file_id).text


@pytest.mark.slow
def test_a_backup_works_while_a_batch_runs(model, tmp_path):
    with batching(model, tmp_path / "a.db") as (_, client):
        batch = begun(client, [ask_line(str(number), max_tokens=20, ignore_eos=True) for number in range(200)])
        while not answered_lines(tmp_path / "a.db"):
            time.sleep(0.01)
        with closing(sqlite3.connect(tmp_path / "a.db")) as source, closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
            source.backup(copy, pages=5)
        batch = ended(client, batch)
        whole = client.files.content(batch.output_file_id).content
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",) and copy.execute("SELECT status FROM batches").fetchone() == ("in_progress",)
    with batching(model, tmp_path / "copy.db") as (_, client):      # the copy goes on where it was
        copied = ended(client, batch)
        assert client.files.content(copied.output_file_id).content == whole


def test_an_expired_batch_has_errors_for_its_rest(model, tmp_path):
    """An expired batch has an error for each line that is left."""
    with batching(model, tmp_path / "a.db") as (_, client):
        batch = begun(client, [ask_line(str(number), max_tokens=60, ignore_eos=True) for number in range(700)])
        while not answered_lines(tmp_path / "a.db"):
            time.sleep(0.01)
    with closing(sqlite3.connect(tmp_path / "a.db")) as writer:
        writer.execute("UPDATE batches SET expires = 1")
        writer.commit()
    with batching(model, tmp_path / "a.db") as (_, client):
        batch = ended(client, batch)
        assert batch.status == "expired" and batch.request_counts.completed + batch.request_counts.failed == 700
        errors = results(client, batch.error_file_id)
        assert {error["error"]["code"] for error in errors} == {"batch_expired"} and len(errors) == batch.request_counts.failed > 0
        numbers = sorted(int(found["custom_id"]) for name in (batch.output_file_id, batch.error_file_id) for found in results(client, name))
        assert numbers == [*range(700)]


def test_a_batch_whose_key_is_gone_expires(model, tmp_path):
    """It waits until then."""
    def status():
        with closing(sqlite3.connect(tmp_path / "a.db")) as reader:
            return reader.execute("SELECT status, completed FROM batches").fetchone()
    with batching(model, tmp_path / "a.db", keys=("first-key",)) as (_, client):
        batch = begun(client, [ask_line(str(number), max_tokens=60, ignore_eos=True) for number in range(400)])
        while not answered_lines(tmp_path / "a.db"):
            time.sleep(0.01)
    left = status()
    with batching(model, tmp_path / "a.db", keys=("other-key",)) as (_, client):
        other = ended(client, begun(client, [ask_line("a", max_tokens=1)]))     # has its turn
        assert other.status == "completed" and status() == left
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve(batch.id)
    with closing(sqlite3.connect(tmp_path / "a.db")) as writer:
        writer.execute("UPDATE batches SET expires = 1 WHERE status = 'in_progress'")
        writer.commit()
    with batching(model, tmp_path / "a.db", keys=("other-key",)):
        deadline_s = time.monotonic() + 60
        while status()[0] != "expired":
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    assert status() == ("expired", left[1])


def test_what_is_deleted_leaves_the_store(model, tmp_path):
    with batching(model, tmp_path / "a.db") as (process, client):
        batch = ended(client, begun(client, [ask_line(str(number), "a-secret-word" * 600, truncate="oldest", max_tokens=1) for number in range(700)]))
        assert sum((tmp_path / name).stat().st_size for name in ("a.db", "a.db-wal")) > 5 << 20
        for name in filter(None, (batch.input_file_id, batch.output_file_id, batch.error_file_id)):
            client.files.delete(name)
        deadline_s = time.monotonic() + 60
        while rows_of(tmp_path / "a.db") != (0, 0) or free_pages(tmp_path / "a.db") > 1000:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.db", "a.db-lock"} and b"a-secret-word" not in (data := (tmp_path / "a.db").read_bytes())
    assert len(data) < 5 << 20


def test_two_servers_cannot_have_one_store(model, tmp_path):
    with batching(model, tmp_path / "a.db") as (_, client):
        second = subprocess.run([sys.executable, str(SCRIPT), str(model), f"--database={tmp_path / 'a.db'}", "--port", "0", "--host", "127.0.0.1"],
                                capture_output=True, text=True, timeout=60)
        lines = [line for line in second.stderr.splitlines() if not line.endswith(" ...")]      # what it is doing, where that takes long
        assert second.returncode == 2 and len(lines) == 1 and "another server uses it" in lines[0]
        assert client.files.list().data == []


def test_uploads_that_are_no_batch_are_refused(running):
    for purpose, data, said in [("fine-tune", jsonl([ask_line("a")]), 'purpose must be "batch"'), ("batch", b"\n \n", "no lines"), ("batch", b"", "no lines")]:
        with pytest.raises(openai.BadRequestError, match=said):
            running.files.create(file=("in.jsonl", data), purpose=purpose)
    with pytest.raises(openai.BadRequestError, match="purpose|expires"):
        running.files.create(file=("in.jsonl", jsonl([ask_line("a")])), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})
    file = running.files.create(file=("in.jsonl", jsonl([ask_line("a")])), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
    assert file.expires_at == file.created_at + 7200


def test_without_the_flag_batch_routes_name_it(tiny_url):
    client = openai.OpenAI(base_url=tiny_url + "/v1", api_key="none", max_retries=0)
    for call in (lambda: client.files.list(), lambda: client.files.create(file=("a", b"x"), purpose="batch"), lambda: client.files.content("file-1"),
                 lambda: client.batches.list(), lambda: client.batches.create(input_file_id="file-1", endpoint="/v1/completions", completion_window="24h"),
                 lambda: client.batches.retrieve("batch_1"), lambda: client.batches.cancel("batch_1"), lambda: client.files.delete("file-1")):
        with pytest.raises(openai.NotFoundError, match="--database"):
            call()


def test_a_key_sees_only_its_files_and_batches(two_keys_server):
    client = openai.OpenAI(base_url=two_keys_server.url + "/v1", api_key="first-key", max_retries=0)
    other = client.with_options(api_key="second-key")
    before = [[each.id for each in listed] for listed in (other.files.list(), other.batches.list())]
    batch = ended(client, begun(client, [ask_line("a")]))
    assert [[each.id for each in listed] for listed in (other.files.list(), other.batches.list())] == before
    create = partial(other.batches.create, endpoint="/v1/chat/completions", completion_window="24h")
    for call in (
            lambda: other.files.retrieve(batch.input_file_id),
            lambda: other.files.content(batch.output_file_id),
            lambda: other.files.delete(batch.input_file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
            lambda: create(input_file_id=batch.input_file_id)):
        with pytest.raises(openai.NotFoundError):
            call()
    assert results(client, batch.output_file_id)
