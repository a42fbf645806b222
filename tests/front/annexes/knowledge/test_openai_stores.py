"""OpenAI's client over a real server with the real all-MiniLM-L6-v2, and servers that are killed."""

import signal
import sqlite3
import time
from contextlib import closing, contextmanager

import openai
import pytest

from documents import docx, pdf
from real_server import children_of_role, server
from shared_servers import KEYS

pytestmark = pytest.mark.timeout(600)
ZOO = b"# Cats\n\nCats sleep a lot.\n\n## Food\n\nThey eat fish and milk.\n\n# Cars\n\nA car needs fuel."
BOOK = "\n\n".join(
    f"Chapter {number} tells how {number} ships sailed to the island number {number * 3}."
    for number in range(120)
).encode()


@contextmanager
def knowing(store):
    """A server of its own, for a test that kills it."""
    with server("--embedder", f"--database={store}") as (process, url):
        yield process, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(knowing_server):
    return openai.OpenAI(base_url=knowing_server.url + "/v1", api_key=KEYS[0], max_retries=0)


def test_a_file_is_uploaded_polled_and_found(client):
    store = client.vector_stores.create(name="zoo")
    assert store.status == "completed" and store.file_counts.total == 0
    file = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("zoo.md", ZOO), attributes={"kind": "notes"}
    )
    assert file.status == "completed" and file.last_error is None and file.usage_bytes > 0
    found = client.vector_stores.search(store.id, query="What do cats eat?", max_num_results=2).data
    assert found[0].content[0].text == "## Food\n\nThey eat fish and milk." and found[0].filename == "zoo.md"
    assert (
        0.3 < found[0].score <= 1
        and found[0].score > found[1].score
        and found[0].attributes == {"kind": "notes"}
    )
    none = client.vector_stores.search(
        store.id, query="cats", filters={"type": "eq", "key": "kind", "value": "book"}
    ).data
    assert none == []
    texts = [part.text for part in client.vector_stores.files.content(file.id, vector_store_id=store.id)]
    assert "\n\n".join(texts) == ZOO.decode()
    assert client.vector_stores.retrieve(store.id).file_counts.completed == 1
    again = client.vector_stores.search(store.id, query="What do cats eat?", max_num_results=2).data
    assert again == found


def test_pdf_and_office_are_read_in_a_sandbox(client):
    store = client.vector_stores.create()
    pages = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("a.pdf", pdf(["Cats purr.", "The Eiffel tower is in Paris."]))
    )
    office = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.docx", docx()))
    assert (pages.status, office.status) == ("completed", "completed")
    [hit] = client.vector_stores.search(store.id, query="Where is the Eiffel tower?", max_num_results=1).data
    assert (hit.filename, hit.page, hit.content[0].text) == ("a.pdf", 2, "The Eiffel tower is in Paris.")


def test_a_batch_is_polled_and_its_files_are_listed(client):
    store = client.vector_stores.create()
    batch = client.vector_stores.file_batches.upload_and_poll(
        store.id, files=[("a.txt", b"alpha"), ("b.txt", b"beta"), ("c.bin", b"\0\0\0")]
    )
    assert batch.status == "completed" and (batch.file_counts.completed, batch.file_counts.failed) == (2, 1)
    [bad] = client.vector_stores.file_batches.list_files(
        batch.id, vector_store_id=store.id, filter="failed"
    ).data
    assert bad.last_error.code == "unsupported_file"
    assert client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id).status == "completed"


def test_lists_are_followed_to_their_ends(client):
    made = {client.vector_stores.create(name=f"list {number}").id for number in range(5)}
    listed = [store.id for store in client.vector_stores.list(limit=2)]
    assert made <= {*listed} and len(listed) == len({*listed})
    for store in made:
        assert client.vector_stores.delete(store).object == "vector_store.deleted"
    assert not made & {store.id for store in client.vector_stores.list(limit=2)}
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(made.pop())


def test_a_store_is_updated_as_the_client_does(client):
    store = client.vector_stores.create(file_ids=[], chunking_strategy={"type": "auto"}, metadata={"a": "b"})
    changed = client.vector_stores.update(
        store.id, name="new", expires_after={"anchor": "last_active_at", "days": 7}
    )
    assert (changed.name, changed.metadata, changed.expires_after.days) == ("new", {"a": "b"}, 7)
    file = client.files.create(file=("a.txt", b"text"), purpose="user_data")
    strategy = {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 20}}
    client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id, chunking_strategy=strategy)
    found = client.vector_stores.files.update(file.id, vector_store_id=store.id, attributes={"n": 1})
    assert found.attributes == {"n": 1} and found.chunking_strategy.static.chunk_overlap_tokens == 20
    assert client.vector_stores.files.delete(file.id, vector_store_id=store.id).deleted
    assert client.files.retrieve(file.id).purpose == "user_data"


def test_a_killed_server_goes_on_where_it_was(default_embedder_path, tmp_path):
    """Killed while it ingests, it has each file whole or not at all; after the next start all are there."""
    path = tmp_path / "k.db"
    with knowing(path) as (process, client):
        files = [
            client.files.create(file=(f"{number}.txt", BOOK), purpose="assistants").id for number in range(3)
        ]
        store = client.vector_stores.create(file_ids=files)
        until = time.monotonic() + 120
        while client.vector_stores.retrieve(store.id).file_counts.completed < 1:
            assert time.monotonic() < until
            time.sleep(0.02)  # between two questions to a process of its own
        process.send_signal(signal.SIGKILL)
        process.wait()
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT number, status, passages, windows FROM knowledge_files").fetchall()
        assert {row[1] for row in rows} == {"completed", "in_progress"}
        for number, status, *wanted in rows:
            found = [
                connection.execute(
                    f"SELECT COUNT(*) FROM knowledge_{what} WHERE file = ?", (number,)
                ).fetchone()[0]
                for what in ("passages", "windows")
            ]
            assert found == wanted and (found[0] > 0) == (status == "completed")
    with knowing(path) as (_, client):
        for file in files:
            assert client.vector_stores.files.poll(file, vector_store_id=store.id).status == "completed"
        found = client.vector_stores.retrieve(store.id)
        assert found.status == "completed" and found.file_counts.completed == 3
        hits = client.vector_stores.search(
            store.id, query="Which chapter tells of island number 33?", max_num_results=3
        ).data
        assert len({hit.file_id for hit in hits}) == 3


def test_a_worker_that_is_killed_loses_no_file(knowing_server, client):
    file = client.files.create(file=("book.txt", BOOK * 2), purpose="assistants").id
    client.embeddings.create(model="all-minilm", input="loaded")
    store = client.vector_stores.create(file_ids=[file])
    workers = children_of_role(knowing_server.process, "worker")
    for worker in workers:
        worker.kill()
    assert workers
    assert client.vector_stores.files.poll(file, vector_store_id=store.id).status == "completed"
    assert client.vector_stores.retrieve(store.id).file_counts.completed == 1
