"""What the store keeps of responses and conversations, row by row: pages, sums by owner, and databases of earlier versions."""

import asyncio
import json
import random
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import openai
import pytest

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import KeptItem
from chatlm.front.admission.sandbox import WRITE_BYTES
from chatlm.front.server.sweeper import vacuum
from chatlm.front.server.stored_lists import joined_small
from chatlm.front.store import batches, file_rows, migrate, quota, responses
from chatlm.front.store.pages import PAGE_BYTES, texts
from chatlm.front.store.responses import NewResponse
from chatlm.front.store.schema import STEPS
from chatlm.front.store.store import Store
from in_parts import done
from real_server import server

OLD = Path(__file__).resolve().parents[2] / "fixtures/store_4.sql"
FAR = 4_000_000_000


def opened(path):
    store = Store(path)
    store.open()
    return store


def old_database(path):
    with closing(sqlite3.connect(path)) as old:
        old.executescript(OLD.read_text(encoding="utf-8"))
    return path


def item(number, size=10):
    return KeptItem(f"msg_{number}", json.dumps({"type": "message", "content": f"{number}" + "x" * size}).encode())


def walked(find, limit, ascending):
    """The names of all rows, page by page."""
    found, after = [], ""
    while True:
        page = find(after=after, ascending=ascending, limit=limit)
        assert len(page.rows) <= limit and (page.rows or not page.more) and (page.bytes <= PAGE_BYTES or len(page.rows) == 1)
        found += [row.name for row in page.rows]
        if not page.more:
            return found
        after = found[-1]


async def test_pages_hold_items_in_order(tmp_path):
    """They do so whatever the sizes of the conversation's items."""
    store = opened(tmp_path / "a.db")
    sizes = [10, 10, PAGE_BYTES, 10, PAGE_BYTES + 1, PAGE_BYTES * 2, *[PAGE_BYTES // 3] * 7, *[100] * 30]
    new = [item(number, size) for number, size in enumerate(sizes)]

    def work(connection):
        name = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", new)).name
        other = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", new[:3])).name     # its items have the same ids
        for limit in (1, 2, 7, 100):
            for ascending in (True, False):
                names = [each.name for each in new][::1 if ascending else -1]
                assert walked(partial(responses.items, connection, name=name, owner="me"), limit, ascending) == names
        place = responses.item_named(connection, name, "msg_3", "me")
        assert done(texts(connection, [place])) == [new[3].body] and place.bytes == len(new[3].body)
        responses.drop_item(connection, name, "msg_3", "me")
        assert done(texts(connection, [place])) == [None] and "msg_3" not in walked(partial(responses.items, connection, name=name, owner="me"), 100, True)
        for find, said in ((partial(responses.items, name=name, after="msg_99"), "after"),
                           (partial(responses.items, name="conv_no", after=""), "no conversation")):
            with pytest.raises(RequestError, match=said):
                find(connection, owner="me", ascending=True, limit=3)
        for wrong in (partial(responses.items, name=name, after="", ascending=True, limit=3), partial(responses.delete_conversation, name=name),
                      partial(responses.item_named, conversation=name, name="msg_1"), partial(responses.drop_item, conversation=name, name="msg_1")):
            with pytest.raises(RequestError, match="no conversation"):
                wrong(connection, owner="another")
        assert len(walked(partial(responses.items, connection, name=other, owner="me"), 100, True)) == 3
    await store.run(work)
    await store.close()


async def test_input_pages_go_through_all_continued(tmp_path):
    """Pages of what a response was asked go through all that it continues."""
    store, chain, said = opened(tmp_path / "a.db"), [], []

    def work(connection):
        for turn in range(12):
            asked = [item(f"in{turn}_{number}", 10 if turn % 4 else PAGE_BYTES // 2) for number in range(turn % 3)]
            answered = [item(f"out{turn}_{number}") for number in range(1 + turn % 2)]
            new = NewResponse(f"resp_{turn}", "me", 1, FAR, chain[-1] if chain else None, None, asked, answered, b'{"id": 1}')
            done(responses.keep(connection, new))
            chain.append(new.name)
            names = said + [each.name for each in asked]
            for limit in (1, 3, 100):
                for ascending in (True, False):
                    assert walked(partial(responses.inputs, connection, name=new.name, owner="me"), limit, ascending) == names[::1 if ascending else -1]
            with pytest.raises(RequestError, match="after"):        # what it answered itself is no row of the list
                responses.inputs(connection, new.name, "me", answered[0].name, True, 3)
            said.extend(each.name for each in [*asked, *answered])
        with pytest.raises(RequestError, match="no response"):
            responses.inputs(connection, chain[-1], "another", "", True, 3)
        responses.delete(connection, chain[4], "me")
        with pytest.raises(RequestError, match=f"no response \"{chain[4]}\""):
            responses.inputs(connection, chain[-1], "me", "", True, 3)
        with pytest.raises(RequestError, match="no response"):
            done(responses.before(connection, chain[-1], "", "me"))
    await store.run(work)
    await store.close()


async def test_earlier_items_are_measured_before_reading(tmp_path, monkeypatch):
    store = opened(tmp_path / "a.db")
    new = [item(number, LIMITS.body_bytes // 3) for number in range(3)]

    def work(connection):
        small = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", new[:2])).name
        large = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", new)).name
        found = done(responses.before(connection, "", small, "me"))
        assert json.loads(found) == [{"id": each.name, **json.loads(each.body)} for each in new[:2]]
        assert len(found) <= done(responses.size_before(connection, "", small, "me")) <= len(found) + 2
        read = []
        connection.set_trace_callback(read.append)
        with pytest.raises(RequestError, match="too large: at most 16777216 bytes are allowed"):
            done(responses.size_before(connection, "", large, "me"))
        assert read and not [each for each in read if " body " in each.replace("LENGTH(body)", "")]
        connection.set_trace_callback(None)
    await store.run(work)
    await store.close()


async def test_a_taken_item_id_is_replaced(tmp_path):
    """An item whose id is taken gets another and is deleted alone."""
    store = opened(tmp_path / "a.db")

    def work(connection):
        name = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", [item(1), item(1)])).name
        added = done(responses.extend(connection, name, "me", [item(1), item(2)], FAR))
        names = walked(partial(responses.items, connection, name=name, owner="me"), 10, True)
        assert len(set(names)) == 4 and names[0] == "msg_1" and names[2:] == [each.name for each in added] and names[3] == "msg_2"
        for gone in names[::-1]:
            responses.drop_item(connection, name, gone, "me")
            assert walked(partial(responses.items, connection, name=name, owner="me"), 10, True) == names[:names.index(gone)]
    await store.run(work)
    await store.close()


@pytest.mark.parametrize("seed", range(3))
def test_small_parts_are_sent_together_in_order(seed):
    chance = random.Random(seed)
    parts = [b"%d " % number * chance.choice([0, 1, 20, 300_000, 30_000]) for number in range(100)]
    sent = [*joined_small(parts)]
    assert b"".join(sent) == b"".join(parts) and len([part for part in sent if len(part) < WRITE_BYTES // 2]) < len(parts) / 2
    assert [*joined_small([b"x"] * 1000)] == [b"x" * 1000] and b"".join(joined_small([])) == b""


RECOUNT = {
    "files": "SELECT owner, bytes + 512 + 128 * (SELECT COUNT(*) FROM lines WHERE file = files.id) FROM files WHERE state < 2",
    "batches": "SELECT owner, 512 + LENGTH(CAST(IFNULL(metadata, '') AS BLOB)) + LENGTH(CAST(IFNULL(problems, '') AS BLOB)) FROM batches",
    "responses": "SELECT owner, 512 + (SELECT SUM(LENGTH(body) + 256) FROM parts WHERE response = responses.id) FROM responses WHERE NOT deleted",
    "conversations": "SELECT owner, 512 + LENGTH(CAST(metadata AS BLOB)) + (SELECT IFNULL(SUM(LENGTH(body) + 256), 0) FROM items WHERE conversation = conversations.id) "
                     "FROM conversations WHERE NOT deleted"}


def check_holdings(connection):
    counted = {}
    for query in RECOUNT.values():
        for owner, size in connection.execute(query):
            counted[owner] = counted.get(owner, 0) + size
    assert {owner: size for owner, size in connection.execute("SELECT owner, bytes FROM holdings") if size} == counted
    return counted


@pytest.mark.parametrize("seed", range(5))
async def test_each_owner_holds_what_its_rows_take(tmp_path, seed):
    """It does so whatever happens."""
    store, chance = opened(tmp_path / "a.db"), random.Random(seed)
    owners, mine = ["key a", "key b", "@10.0.0.1"], {}

    def some(kind, owner):
        return chance.choice(mine.get((kind, owner)) or ["none"])

    def step(connection):
        owner, act = chance.choice(owners), chance.randrange(14)
        new = [item(chance.randrange(40), chance.randrange(3000)) for _ in range(chance.randrange(4))]
        metadata = json.dumps({"é": "ü" * chance.randrange(50)}, ensure_ascii=False)
        if act == 0:
            made = done(responses.create_conversation(connection, owner, "", 1, chance.choice([10, FAR]), metadata, new))
            mine.setdefault(("conversation", owner), []).append(made.name)
        elif act in (1, 2):
            done(responses.extend(connection, some("conversation", owner), owner, new, chance.choice([10, FAR])))
        elif act == 3:
            responses.set_metadata(connection, some("conversation", owner), owner, metadata)
        elif act == 4:
            responses.drop_item(connection, some("conversation", owner), f"msg_{chance.randrange(40)}", owner)
        elif act == 5:
            responses.delete_conversation(connection, some("conversation", owner), owner)
        elif act in (6, 7):
            name = f"resp_{chance.getrandbits(60)}"
            mine.setdefault(("response", owner), []).append(name)
            conversation = some("conversation", owner) if act == 7 else None
            done(responses.keep(connection, NewResponse(name, owner, 1, chance.choice([10, FAR]), None, conversation, new, new[:1], b'{"a": 1}')))
        elif act == 8:
            responses.delete(connection, some("response", owner), owner)
        elif act == 9:
            file = file_rows.create(connection, owner, "x", "batch", 1, 10)
            file_rows.add_lines(connection, file.id, [file_rows.LineRow(number, b"y" * chance.randrange(3000)) for number in range(1, 4)])
            connection.execute("UPDATE files SET state = 1 WHERE id = ?", (file.id,))
            mine.setdefault(("file", owner), []).append(file.name)
        elif act == 10:
            file_rows.delete(connection, file_rows.file_of_owner(connection, some("file", owner), owner))
        elif act == 11:
            batch = batches.create(connection, owner, "", file_rows.file_of_owner(connection, some("file", owner), owner), "/v1/completions", "24h", 1, FAR, metadata, None)
            connection.execute("UPDATE batches SET problems = ? WHERE id = ?", (metadata * 2, batch.id))
            batches.end(connection, batch, "failed", 5)
        elif act == 12:
            batches.forget(connection, chance.choice([1, 20]), 2, [])
            responses.forget(connection, chance.choice([1, 20]))
        else:
            file_rows.purge(connection)
            responses.purge(connection)
        check_holdings(connection)

    for _ in range(150):
        try:
            await store.run(step)
        except RequestError:        # of what is not there
            pass
    held = await store.run(check_holdings)
    assert len(held) == 3
    for kind in ("conversation", "response", "file"):
        for owner in owners:
            for name in mine.get((kind, owner), []):
                delete = {"conversation": responses.delete_conversation, "response": responses.delete,
                          "file": lambda connection, name, owner: file_rows.delete(connection, file_rows.file_of_owner(connection, name, owner))}[kind]
                try:
                    await store.run(partial(delete, name=name, owner=owner))
                except RequestError:
                    pass
    await store.run(partial(batches.forget, now=FAR, keep_s=1, uploads=[]))
    while await store.run(file_rows.purge) or await store.run(responses.purge):
        pass
    assert await store.run(check_holdings) == {}
    for table in ("files", "lines", "batches", "responses", "parts", "conversations", "items"):
        assert await store.run(lambda connection, table=table: connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()) == (0,)
    await store.close()


async def test_no_work_of_a_client_scans_a_table(tmp_path):
    """Nor does what is looked for again and again: it would take ever longer, for all keys."""
    store, said = opened(tmp_path / "a.db"), set()

    def work(connection):
        connection.set_trace_callback(said.add)
        file = file_rows.create(connection, "me", "x", "batch", 1, 10)
        file_rows.add_lines(connection, file.id, [file_rows.LineRow(1, b"y", "a", "/v1/completions")])
        connection.execute("UPDATE files SET state = 1 WHERE id = ?", (file.id,))
        file = file_rows.file_of_owner(connection, file.name, "me")
        for ascending, more in ((True, " AND state = 1"), (False, " AND state = 1"), (False, " AND state = 1 AND purpose = 'batch'")):
            for after in ("", file.name):
                done(file_rows.list_rows(connection, "files", file_rows.File._fields, "me", after, 10, ascending, more))
        file_rows.content(connection, file.id, 0), done(file_rows.longest_line(connection, file.id))
        batch = batches.create(connection, "me", "", file, "/v1/completions", "24h", 1, FAR, None, None)
        done(file_rows.list_rows(connection, "batches", batches.BatchRow._fields, "me", batch.name, 10))
        batches.unfinished(connection), batches.unfinished_of(connection, "me", ""), batches.reads(connection, file), done(batches.begin(connection, batch, 1))
        batches.shown_batch(connection, batch), done(batches.waiting_lines(connection, batch, 0, 200)), batches.line(connection, batch, 1)
        batches.record(connection, batch, [(1, b"done", False)]), batches.cancel(connection, batch.name, "me", 1), batches.end(connection, batch, "cancelled", 1)
        name = done(responses.create_conversation(connection, "me", "", 1, FAR, "{}", [item(0), item(1)])).name
        done(responses.extend(connection, name, "me", [item(2)], FAR)), responses.set_metadata(connection, name, "me", "{}")
        done(responses.keep(connection, NewResponse("resp_0", "me", 1, FAR, None, None, [item(3)], [item(4)], b'{"a": 1}')))
        done(responses.keep(connection, NewResponse("resp_1", "me", 1, FAR, "resp_0", name, [item(3)], [item(5)], b'{"a": 1}')))
        for ascending in (True, False):
            for after in ("", "msg_1"):
                done(texts(connection, responses.items(connection, name, "me", after, ascending, 5).rows))
            for after in ("", "msg_4"):
                done(texts(connection, responses.inputs(connection, "resp_1", "me", after, ascending, 5).rows))
        done(responses.before(connection, "resp_1", "", "me")), done(responses.before(connection, "", name, "me")), responses.whole_of(connection, "resp_1", "me")
        responses.drop_item(connection, name, "msg_1", "me"), responses.delete(connection, "resp_1", "me"), responses.delete_conversation(connection, name, "me")
        file_rows.delete(connection, file), quota.check(connection, "me", 1)
        responses.forget(connection, FAR + 1), batches.forget(connection, FAR, 5, [7])
        while file_rows.purge(connection) or responses.purge(connection):
            pass
        connection.set_trace_callback(None)
        found = {}
        for statement in said:
            if re.match("SELECT|UPDATE|DELETE|WITH|INSERT", statement):
                plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
                found[statement] = [step for step in plan if re.match("SCAN (?!chain|CONSTANT)", step)]
        assert len(found) > 60 and {statement: steps for statement, steps in found.items() if steps} == {}
    await store.run(work)
    await store.close()


async def test_a_deletion_is_purged_in_small_pieces(tmp_path):
    """It reads nothing."""
    store, pieces = opened(tmp_path / "a.db"), []
    new = [item(number, 100_000) for number in range(200)]
    name = (await store.run(lambda connection: responses.create_conversation(connection, "me", "", 1, FAR, "{}", new))).name
    for number in range(300):
        await store.run(partial(responses.keep, new=NewResponse(f"resp_{number}", "me", 1, 5, None, None, [item(number, 30_000)], [], b'{"a": 1}')))
    changed = await store.run(lambda connection: connection.total_changes)
    await store.run(partial(responses.delete_conversation, name=name, owner="me"))
    assert await store.run(lambda connection: connection.total_changes) == changed + 2      # its row and its owner's
    with pytest.raises(RequestError, match="no conversation"):
        await store.run(partial(responses.items, name=name, owner="me", after="", ascending=True, limit=1))
    while await store.run(partial(responses.forget, now=10)):
        pass

    def left(connection):
        return connection.execute("SELECT (SELECT IFNULL(SUM(LENGTH(body)), 0) FROM items) + (SELECT IFNULL(SUM(LENGTH(body)), 0) FROM parts)").fetchone()[0]
    before = await store.run(left)
    assert before > 25_000_000
    while await store.run(responses.purge):
        pieces.append(await store.run(left))
    assert max(earlier - later for earlier, later in zip([before, *pieces], pieces)) <= 1_300_000
    free = await store.run(lambda connection: connection.execute("PRAGMA freelist_count").fetchone()[0])
    calls = 1
    while await store.run(vacuum):
        calls += 1
    assert free > 6000 and calls <= free / 1000 + 1
    assert await store.run(lambda connection: connection.execute("PRAGMA freelist_count").fetchone()[0]) <= 1000
    assert await store.run(left) == 0 and await store.run(lambda connection: connection.execute("SELECT COUNT(*) FROM responses").fetchone()) == (0,)
    await store.close()


async def test_an_owner_with_enough_is_refused(tmp_path, monkeypatch):
    """Who has kept enough is refused, and others are not."""
    monkeypatch.setattr(quota, "LIMITS", type("Small", (), {"kept_bytes": 20_000}))
    store = opened(tmp_path / "a.db")
    create = partial(responses.create_conversation, client="", now=1, expires=FAR, metadata="{}")
    first = await store.run(partial(create, owner="me", items=[item(0, 9000)]))
    for refused in (partial(create, owner="me", items=[item(0, 20_000)]), partial(responses.extend, name=first.name, owner="me", items=[item(1, 15_000)], expires=FAR),
                    partial(responses.set_metadata, name=first.name, owner="me", metadata="m" * 15_000), partial(quota.check, owner="me", adds_bytes=15_000)):
        with pytest.raises(RequestError, match="more than 20,000 bytes together: delete some") as found:
            await store.run(refused)
        assert (found.value.status, found.value.code) == (403, "storage_full")
    await store.run(partial(create, owner="another", items=[item(0, 15_000)]))
    await store.run(partial(responses.delete_conversation, name=first.name, owner="me"))
    await store.run(partial(create, owner="me", items=[item(0, 15_000)]))
    await store.close()


# databases of earlier versions

def kept_of(connection):
    """All of it, without the ids that the new version chooses."""
    items = [(conversation, name, json.loads(body)) for conversation, name, body in connection.execute("SELECT conversation, name, body FROM items ORDER BY id")]
    parts = [(response, kind, json.loads(body)) for response, kind, body in connection.execute(
        "SELECT responses.name, kind, body FROM parts JOIN responses ON responses.id = parts.response ORDER BY parts.id")]
    return items, parts, connection.execute("SELECT name, owner, created, expires, previous, conversation FROM responses ORDER BY id").fetchall()


async def test_an_older_database_keeps_its_contents(tmp_path):
    old_database(tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as reader:
        was = [json.loads(body) for (body,) in reader.execute("SELECT body FROM items ORDER BY id")]
        old = reader.execute("SELECT name, owner, created, expires, previous, conversation, input, output, body FROM responses ORDER BY rowid").fetchall()
    store = opened(tmp_path / "a.db")
    items, parts, rows = await store.run(kept_of)
    assert [{"id": each["id"]} | body for each, (_, _, body) in zip(was, items)] == was and len(items) == len(was) == 6
    names = [name for _, name, _ in items]
    assert len(set(names)) == 6 and [name for name, each in zip(names, was) if name == each["id"]] == ["twice", "msg_equal", *names[4:]]
    assert rows == [row[:6] for row in old] and len(rows) == 4
    for name, *_, asked, answered, body in old:
        of = [(kind, each) for response, kind, each in parts if response == name]
        assert [each["content"][0]["text"] for kind, each in of if kind == responses.INPUT] == [
            each["content"] if isinstance(each["content"], str) else each["content"][0]["text"] for each in json.loads(asked)]
        assert [each for kind, each in of if kind == responses.OUTPUT] == [{key: value for key, value in each.items() if key != "id"} for each in json.loads(answered)]
        assert [each for kind, each in of if kind == responses.WHOLE] == [json.loads(body)]
    assert len(await store.run(check_holdings)) == 2
    assert await store.run(lambda connection: connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'old%'").fetchall()) == []
    await store.close()
    store = opened(tmp_path / "a.db")       # and once more
    assert await store.run(kept_of) == (items, parts, rows)
    await store.close()


@pytest.mark.parametrize("pieces", range(12))
def test_a_killed_upgrade_goes_on_at_the_next_start(tmp_path, monkeypatch, pieces):
    """It was killed while it brought a database up to date."""
    old_database(tmp_path / "a.db")
    monkeypatch.setattr(migrate, "MOVED_ROWS", 1)
    left = iter(range(pieces))
    move_kept = migrate.move_kept

    def killed(connection):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return move_kept(connection)
    monkeypatch.setattr("chatlm.front.store.store.STEPS", tuple(killed if step is move_kept else step for step in STEPS))
    store = Store(tmp_path / "a.db")
    try:
        store.open()
    except KeyboardInterrupt:
        store._close()
    else:
        asyncio.run(store.close())      # there are 11 pieces
    monkeypatch.setattr("chatlm.front.store.store.STEPS", STEPS)

    async def found():
        store = opened(tmp_path / "a.db")
        kept = await store.run(kept_of)
        await store.run(check_holdings)
        await store.close()
        return kept
    items, parts, rows = asyncio.run(found())
    assert (len(items), len(parts), len(rows)) == (6, 12, 4)


def test_a_real_server_reads_an_older_database(nanochat_fixtures, tmp_path):
    """It goes on with what an earlier version has kept."""
    old_database(tmp_path / "a.db")
    with server(nanochat_fixtures / "gen5", f"--database={tmp_path / 'a.db'}", "--api-key", "first-key", "--api-key", "second-key") as (_, url):
        client = openai.OpenAI(base_url=url + "/v1", api_key="first-key", max_retries=0)
        with closing(sqlite3.connect(tmp_path / "a.db")) as reader:
            [(conversation,)] = reader.execute("SELECT name FROM conversations").fetchall()
            [(second, first)] = reader.execute("SELECT name, previous FROM responses WHERE previous IS NOT NULL").fetchall()
        items = client.conversations.items.list(conversation, order="asc").data
        assert [each.content[0].text for each in items[:5]] == ["One", "Equal", "Equal", "Equal", "Three"]
        client.conversations.items.delete(items[2].id, conversation_id=conversation)
        assert [each.id for each in client.conversations.items.list(conversation, order="asc").data] == [each.id for each in items if each != items[2]]
        inputs = client.responses.input_items.list(second, order="asc").data
        assert [inputs[0].content[0].text, inputs[2].content[0].text] == ["One", "Two"]
        assert client.responses.retrieve(second).previous_response_id == first
        more = client.responses.create(model="default", input="And?", previous_response_id=second, max_output_tokens=16)
        assert len(client.responses.input_items.list(more.id).data) == 5
        client.responses.create(model="default", input="And?", conversation=conversation, max_output_tokens=16)
        [batch] = client.batches.list().data
        assert batch.metadata == {"night": "1"} and json.loads(client.files.content(batch.output_file_id).text)["custom_id"] == "a"
        other = client.with_options(api_key="second-key")
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(second)


BUSY = """
import asyncio, random, sys
from functools import partial
from pathlib import Path
from chatlm.common.messages.protocol import KeptItem
from chatlm.front.server.sweeper import vacuum
from chatlm.front.store import file_rows, responses
from chatlm.front.store.responses import NewResponse
from chatlm.front.store.store import Store

async def client(store, chance, number):
    mine = []
    while True:
        new = [KeptItem(f"msg_{chance.getrandbits(60)}", b'{"a": "' + b"x" * chance.randrange(60_000) + b'"}') for _ in range(chance.randrange(5))]
        act = chance.randrange(8)
        if act < 2 or not mine:
            row = await store.run(lambda db: responses.create_conversation(db, f"key {number}", "", 1, 4_000_000_000, "{}", new))
            mine.append(row.name)
            print("made", row.name, len(new), flush=True)
        elif act < 5:
            await store.run(partial(responses.extend, name=mine[-1], owner=f"key {number}", items=new, expires=4_000_000_000))
            print("more", mine[-1], len(new), flush=True)
        elif act < 7:
            name = f"resp_{chance.getrandbits(60)}"
            await store.run(partial(responses.keep, new=NewResponse(name, f"key {number}", 1, 4_000_000_000, None, None, new, new[:1], b'{"a": 1}')))
            print("kept", name, 0, flush=True)
        else:
            name = mine.pop(chance.randrange(len(mine)))
            print("going", name, 0, flush=True)
            await store.run(partial(responses.delete_conversation, name=name, owner=f"key {number}"))
            print("gone", name, 0, flush=True)

async def sweep(store):
    while True:
        for piece in (responses.purge, vacuum, file_rows.purge):
            while await store.run(piece):
                pass
        await asyncio.sleep(0.01)

async def main():
    store, chance = Store(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
    store.open()
    await asyncio.gather(sweep(store), *(client(store, chance, number) for number in range(4)))
asyncio.run(main())
"""


@pytest.mark.slow
def test_kept_rows_survive_kills_at_any_moment(tmp_path):
    """Deletions survive too."""
    chance, items, kept, gone, unsure = random.Random(1), {}, set(), set(), set()
    for seed in range(20):
        process = subprocess.Popen([sys.executable, "-c", BUSY, str(tmp_path / "a.db"), str(seed)], cwd=OLD.parents[2], stdout=subprocess.PIPE, text=True)
        said = [process.stdout.readline() for _ in range(chance.randrange(1, 400))]
        process.kill()
        said += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        for line in said:
            if not line.endswith("\n"):
                continue
            what, name, count = line.split()
            if what in ("made", "more"):
                items[name] = items.get(name, 0) + int(count)
            {"kept": kept, "gone": gone, "going": unsure}.get(what, set()).add(name)

        async def check():
            store = opened(tmp_path / "a.db")
            await store.run(check_holdings)

            def there(connection):
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                counts = dict(connection.execute("SELECT conversations.name, COUNT(items.id) FROM conversations LEFT JOIN items ON items.conversation = conversations.id "
                                                 "WHERE NOT deleted GROUP BY conversations.id"))
                assert not gone & counts.keys() and all(counts[name] >= items[name] for name in items.keys() - gone - unsure)
                assert kept <= {name for (name,) in connection.execute("SELECT name FROM responses")}
            await store.run(there)
            await store.close()
        asyncio.run(check())
    assert len(kept) > 50 and len(items) > 50 and gone
