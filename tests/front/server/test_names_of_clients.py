"""Names that clients choose and look up in the store cost no other client anything."""

import sqlite3
from contextlib import closing
from functools import partial

import explained
import pytest
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import KeptItem
from chatlm.front.store import batches, file_rows, migrate, responses
from chatlm.front.store import store as stores
from chatlm.front.store.responses import NewResponse
from chatlm.front.store.schema import NAMES, STEPS
from chatlm.front.store.store import Store
from in_parts import done

ID = "mcpr_chosen"
COUNT = 3000
FEW = 5  # thousands of steps of SQLite's machine; one step a row would be more


@pytest.fixture
async def store(tmp_path):
    made = Store(tmp_path / "a.db")
    made.open()
    yield made
    await made.close()


def response(number, owner="mallory", items=(), previous=None):
    kept = [KeptItem(name, b'{"type": "message"}') for name in items]
    return NewResponse(f"resp_{owner}_{number}", owner, 1, 4_000_000_000, previous, None, kept, [], b"{}")


async def kept(store, new):
    await store.run(lambda connection: [done(responses.keep(connection, each)) for each in new])


async def costs(store, function, **values):
    """(result, thousands of steps) of a lookup; RequestError is a result too."""
    def work(connection):
        steps = []
        connection.set_progress_handler(lambda: steps.append(1) and None, 1000)
        try:
            return done(function(connection, **values)), len(steps)
        except RequestError as error:
            return error, len(steps)
        finally:
            connection.set_progress_handler(None, 0)
    return await store.run(work)


async def test_one_id_given_thousands_of_times_is_one_item_s(store):
    """The others have names of their own, and each page of them begins where the one before ended."""
    await kept(store, [response(0, items=[ID] * COUNT)])
    seen = []
    after = ""
    while True:
        page, steps = await costs(store, responses.inputs, name="resp_mallory_0", owner="mallory",
                                  after=after, ascending=True, limit=100)
        assert steps <= FEW
        seen += [place.name for place in page.rows]
        if not page.more:
            break
        after = seen[-1]
    assert len(seen) == len({*seen}) == COUNT and seen[0] == ID


async def test_an_input_takes_no_name_of_the_output(store):
    new = response(0, items=["msg_said", "other"])._replace(output=[KeptItem("msg_said", b"{}")])
    await kept(store, [new])
    [place] = await store.run(partial(responses.item_places, names=["msg_said"], owner="mallory"))
    first, second = (await store.run(partial(
        responses.inputs, name=new.name, owner="mallory", after="", ascending=True, limit=9))).rows
    assert second.name == "other" and first.name.startswith("item_")
    assert place.row not in (first.row, second.row)


@pytest.mark.parametrize("owner, foreign", [("key mallory", "key alice"), ("@192.0.2.1", "@192.0.2.2")])
async def test_an_id_of_thousands_of_responses_is_found_at_once(store, owner, foreign):
    await kept(store, [response(number, owner, [ID]) for number in range(COUNT)])
    await kept(store, [response(0, foreign, [ID])])
    for who in owner, foreign, "key nobody", "@192.0.2.9":
        [place], steps = await costs(store, responses.item_places, names=[ID], owner=who)
        assert steps <= FEW and (place is None) == (who[0] != owner[0] or who == "key nobody")
    # in a chain, too
    chained = [response(COUNT + number, foreign, [f"msg_{number}"],
                        f"resp_{foreign}_{COUNT + number - 1}" if number else None) for number in range(5)]
    await kept(store, chained)
    for after, is_known in ("msg_2", True), (ID, False):
        page, steps = await costs(store, responses.inputs, name=chained[-1].name, owner=foreign, after=after,
                                  ascending=True, limit=5)
        assert steps <= FEW and isinstance(page, RequestError) != is_known


async def test_deleted_items_of_an_id_cost_little(store):
    await kept(store, [response(number, items=[ID]) for number in range(COUNT)])
    await store.run(lambda connection: connection.execute("UPDATE responses SET deleted = 1"))
    assert await costs(store, responses.item_places, names=[ID], owner="mallory") == ([None], 0)
    while await store.run(responses.purge):
        pass
    left = "SELECT (SELECT COUNT(*) FROM parts), (SELECT COUNT(*) FROM part_names)"
    assert await store.run(lambda connection: connection.execute(left).fetchone()) == (0, 0)


async def test_a_file_of_many_batches_is_deleted_at_once(store):
    def work(connection):
        file = file_rows.create(connection, "mallory", "x", "batch", 1, 10)
        for _ in range(COUNT):
            batch = batches.create(connection, "mallory", "", file, "/v1/completions", "24h", 1, 9, None, None)
            connection.execute("UPDATE batches SET status = 'completed' WHERE id = ?", (batch.id,))
        return file
    file = await store.run(work)
    assert await costs(store, batches.reads, file=file) == (None, 0)


@pytest.mark.parametrize("chosen, count", [
    ("", 0), (" AND purpose = 'batch'", 0), (" AND purpose = 'batch_output'", 2)])
async def test_a_list_passes_over_no_files_that_it_does_not_show(store, chosen, count):
    def fill(connection):
        for number in range(COUNT):
            file_rows.create(connection, "mallory", "x", "batch", 1, 10)
        for _ in range(count):
            file_rows.create(connection, "mallory", "x", "batch_output", 1, 10)
        connection.execute("UPDATE files SET state = 1 WHERE purpose = 'batch_output'")
        if not chosen:
            connection.execute("UPDATE files SET state = 2")
        elif count:
            connection.execute("UPDATE files SET state = 1")

    def rows(connection):
        more = f" AND state = 1{chosen}"
        return len(done(file_rows.list_rows(connection, "files", ["id"], "mallory", "", 10_000, more=more)))
    await store.run(fill)
    assert await costs(store, rows) == (count, 0)


async def test_a_batch_begins_at_its_first_good_line(store):
    def fill(connection):
        file = file_rows.create(connection, "mallory", "x", "batch", 1, 10)
        rows = [file_rows.LineRow(number, b"x" * 9000, "a", "/v1/completions") for number in range(COUNT)]
        file_rows.add_lines(connection, file.id, rows)
        source = file_rows.file_named(connection, file.name)
        return batches.create(connection, "mallory", "", source, "/v1/completions", "24h", 1, 9, None, None)
    batch = await store.run(fill)
    assert await costs(store, batches.begin, batch=batch, now=2) == (True, 0)


async def test_what_an_earlier_version_kept_is_found_by_name(tmp_path, monkeypatch):
    """Also where one response has one id several times; in pieces, after each of which a start may end."""
    path = tmp_path / "a.db"
    before = STEPS[:STEPS.index(NAMES)]
    monkeypatch.setattr(stores, "STEPS", before)
    store = Store(path)
    store.open()
    await store.close()
    with closing(sqlite3.connect(path)) as old:
        for number, owner in enumerate(["key a", "key b", "@192.0.2.1"], 1):
            old.execute("INSERT INTO responses (id, name, owner, created, expires, bytes) VALUES "
                        "(?, ?, ?, 1, 4000000000, 9)", (number, f"resp_{number}", owner))
            for kind, name in (0, ID), (0, ID), (1, "msg_1"), (2, f"resp_{number}"):
                old.execute("INSERT INTO parts (response, kind, name, body) VALUES (?, ?, ?, ?)",
                            (number, kind, name, b"{}"))
        old.commit()
    monkeypatch.setattr(migrate, "MOVED_ROWS", 2)
    for more in range(1, len(STEPS) - len(before) + 1):
        monkeypatch.setattr(stores, "STEPS", STEPS[:len(before) + more])
        store = Store(path)
        store.open()
        await store.close()
    store = Store(path)
    store.open()
    for owner, found in ("key a", 1), ("key b", 5), ("@192.0.2.7", 9), ("key c", None):
        places = await store.run(partial(responses.item_places, names=[ID, "msg_1", "resp_1"], owner=owner))
        assert [place and place.row for place in places] == [found, found and found + 2, None]
    await store.close()


async def test_a_scan_of_a_table_is_noticed(store):
    """What all tests are watched for."""
    planted = "/chatlm/front/store/planted.py"
    for statement in (
            "SELECT id FROM parts WHERE body = ?", "SELECT id FROM files WHERE owner = ? ORDER BY filename",
            "UPDATE items SET name = 'x' WHERE name = ?", "DELETE FROM batches WHERE endpoint = ?"):
        source = f"def work(connection):\n    connection.execute({statement!r}, ('x',)).fetchall()"
        names = {}
        exec(compile(source, explained.PROGRAM + planted, "exec"), names)
        await store.run(names["work"])
        [fault] = explained.take_faults()
        assert statement in fault
