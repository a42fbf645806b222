"""Lists of which a client deletes what it reads: a page goes on behind a row that is gone, in every list."""

import time

import pytest

from chatlm.common.config import ApiKey
from chatlm.front.store import gone
from embedding_pool import knowing

A, B = "secret-a", "secret-b"
KEYS = ApiKey.hashed(A, "a"), ApiKey.hashed(B, "b")


async def of_files(ask):
    for number in range(5):
        await ask.file(A, f"text {number}")
    return "/v1/files", "/v1/files"


async def of_stores(ask):
    for number in range(5):
        await ask.store(A, name=str(number))
    return "/v1/vector_stores", "/v1/vector_stores"


async def of_files_of_a_store(ask):
    store, _ = await ask.store(A, *(f"text {number}" for number in range(5)))
    return (f"/v1/vector_stores/{store}/files",) * 2


async def of_files_of_a_batch(ask):
    store, _ = await ask.store(A)
    _, batch = await ask(A, f"/v1/vector_stores/{store}/file_batches", {"file_ids": [await ask.file(A, f"text {number}") for number in range(5)]})
    await ask.ended(A, f"/v1/vector_stores/{store}/file_batches/{batch['id']}")
    return f"/v1/vector_stores/{store}/file_batches/{batch['id']}/files", f"/v1/vector_stores/{store}/files"


async def of_items(ask):
    _, made = await ask(A, "/v1/conversations", {"items": [{"type": "message", "role": "user", "content": str(number)} for number in range(5)]})
    return (f"/v1/conversations/{made['id']}/items",) * 2


LISTS = [of_files, of_stores, of_files_of_a_store, of_files_of_a_batch, of_items]


@pytest.fixture
async def ask(tmp_path):
    async with knowing(tmp_path / "k.db", *KEYS, headers_of=lambda key: {"Authorization": f"Bearer {key}"}) as asking:
        yield asking


async def pages(ask, path, order, limit=2):
    """The ids of each page, before the next one is asked for."""
    last, more = "", True
    while more:
        status, page = await ask(A, f"{path}?limit={limit}&order={order}" + (f"&after={last}" if last else ""))
        assert status == 200, page
        more, last = page["has_more"], page["last_id"]
        yield [row["id"] for row in page["data"]]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("make", LISTS)
async def test_whoever_deletes_all_that_is_listed_ends_with_none(ask, make, swept, order):
    """Also once what was deleted is removed from the database."""
    listed, deleted = await make(ask)
    seen = []
    async for page in pages(ask, listed, order):
        for name in page:
            assert (await ask(A, f"{deleted}/{name}", method="DELETE"))[0] == 200
        seen += page
        if swept:
            await ask.swept()
    assert len({*seen}) == len(seen) == 5
    assert make is of_files_of_a_batch or (await ask(A, listed))[1]["data"] == []      # a batch goes with its last file


@pytest.mark.parametrize("make", LISTS)
async def test_only_whose_list_it_was_goes_on_behind_it(ask, make):
    """Another key is told no more than of a row that never was, and a list of others neither."""
    listed, deleted = await make(ask)
    first, *_ = [name async for page in pages(ask, listed, "asc") for name in page]
    assert (await ask(A, f"{deleted}/{first}", method="DELETE"))[0] == 200
    assert (await ask(A, f"{listed}?after={first}&order=asc"))[0] == 200
    statuses = {(await ask(B, f"{listed}?after={name}"))[0] for name in (first, "never")}
    assert len(statuses) == 1 and statuses < {400, 404}
    assert (await ask(A, f"/v1/batches?after={first}"))[0] == 400


async def test_what_is_noted_is_bounded_for_each_owner(ask, monkeypatch):
    """By number and by time; one owner's deletions do not put away another's."""
    await of_files(ask)
    [first, *_] = [name async for page in pages(ask, "/v1/files", "asc") for name in page]
    assert (await ask(A, f"/v1/files/{first}", method="DELETE"))[0] == 200
    theirs = [await ask.file(B, "text") for _ in range(3)]
    note = "INSERT INTO gone (owner, list, name, place, noted) SELECT owner, 'files', 'x', 1, strftime('%s', 'now') FROM files WHERE name = ?"
    for _ in range(gone.MOST_GONE + 5):
        await ask.rows(note, theirs[0])
    assert await ask.rows("SELECT COUNT(*) FROM gone GROUP BY owner ORDER BY 1") == [(1,), (gone.MOST_GONE,)]
    assert (await ask(A, f"/v1/files?after={first}&order=asc"))[0] == 200
    later = int(time.time()) + 2 * gone.DAY_S
    while await ask.place.front.store.run(lambda connection: gone.forget_gone(connection, later, 100)):
        pass
    assert await ask.rows("SELECT * FROM gone") == []
