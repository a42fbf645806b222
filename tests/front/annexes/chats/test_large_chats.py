"""Large chats of one key cost another key nothing: work goes in parts, answers are bounded, rows count."""

import asyncio
import base64
import hashlib
from contextlib import asynccontextmanager
from functools import partial

import pytest

from chat_devices import SPACE, Device, an_id, chat, devices, node, started
from chatlm.common.config import ApiKey
from chatlm.front.annexes.chats import changes, exporting, listing, records, search
from chatlm.front.annexes.chats import routes as chat_routes
from chatlm.front.server.access import space_of
from chatlm.front.store import readers
from chatlm.front.store.store import Store
from turns_of_others import StoreParts

KEYS = [ApiKey.hashed(name * 20, name) for name in "ab"]
LARGE = "Fish hear. " * 200_000  # 2.2 MB
MOST_WAITED = 3     # parts of others: of the other key, of the server itself
OWNER = space_of(SPACE)


@asynccontextmanager
async def two_keys(path):
    """(what asks, a device of each of two keys)"""
    async with started(path / "store.db", *KEYS) as ask:
        yield ask, *(Device(ask, name * 20) for name in "ab")


@pytest.fixture
def parts(monkeypatch):
    return StoreParts(monkeypatch)


def patch_of(number, base=10**6, **fields):
    return {"kind": "node", "id": an_id(number), "base": base, "patch": fields}


async def sent_beside(parts, bob, work):
    """The result of one key's work, while another key makes small changes."""
    await bob.send(chat(1))
    numbers = iter(range(2, 10_000))
    async with parts.beside(lambda: bob.send(node(next(numbers), 1, "Hello"))):
        return await work


async def test_a_small_change_of_a_large_record_is_small(tmp_path, parts):
    """500 of them hold no other key, and read the record's text no more often than one does."""
    async with two_keys(tmp_path) as (ask, ann, bob):
        await ann.send(chat(1), node(2, 1, LARGE))
        made = await sent_beside(parts, bob, ann.send(*(patch_of(2, note=f"n{index}") for index in range(500))))
        assert {row["state"] for row in made} == {"stored"} and len({row["rev"] for row in made}) == 500
        assert len(parts.of("a")) >= 500 and parts.most_steps("a") <= 5
        assert len(parts.of("b")) > 20 and parts.most_waited("b") <= MOST_WAITED


async def test_an_answer_has_each_record_once(tmp_path):
    """Though many changes are about it, of which the device knew nothing."""
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, LARGE))
        made = await laptop.send(*(patch_of(2, base=0, note=f"n{index}") for index in range(30)))
        assert [("record" in row) for row in made] == [False] * 29 + [True]
        assert made[-1]["record"]["note"] == "n29" and made[-1]["record"]["content"] == LARGE
        assert [row["rev"] for row in made] == [*[0] * 29, made[-1]["rev"]] and made[-1]["rev"] > 2


async def test_records_that_an_answer_leaves_out_are_in_the_list_of_changes(tmp_path, monkeypatch):
    """Until it has read them, the device has what it knew."""
    monkeypatch.setattr(changes, "PAGE_BYTES", 30_000)
    async with devices(tmp_path) as [phone, laptop]:
        await laptop.send(chat(1), *(node(number, 1, str(number) * 10_000) for number in (2, 3, 4, 5)))
        await phone.news()
        first = {row["id"]: row for row in await laptop.send(*(patch_of(number, content="x" * 10_000) for number in (2, 3, 4, 5)))}
        made = await phone.send(*(patch_of(number, base=phone.records["node", an_id(number)][0], note="n") for number in (2, 3, 4, 5)))
        there = [row for row in made if "record" in row]
        left = [row for row in made if "record" not in row]
        assert len(there) == len(left) == 2 and all(row["state"] == "stored" for row in made)
        assert all(row["rev"] == phone.records["node", row["id"]][0] < first[row["id"]]["rev"] for row in left)
        news = {row["id"]: row["record"] for row in await phone.news()}
        assert all(news[row["id"]]["content"] == "x" * 10_000 and news[row["id"]]["note"] == "n" for row in left)


async def test_an_answer_of_any_size_to_a_change_arrives(tmp_path):
    """Of 64 KB and more only answers to GET did: a device that was away never synchronized."""
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "x" * 70_000), node(3, 1, "y" * 70_000))
        made = await laptop.send(patch_of(2, base=0, note="n"), patch_of(3, base=0, note="n"))
        assert [len(row["record"]["content"]) for row in made] == [70_000] * 2
        async with phone.ask.place.client.head(f"{phone.ask.place.url}/v1/chats/changes?after=0",
                                               headers={"X-Chat-Space": SPACE}) as response:
            assert response.status == 200 and int(response.headers["Content-Length"]) > 140_000 and not await response.read()


async def test_a_message_costs_the_same_in_a_large_chat(tmp_path, parts):
    async with two_keys(tmp_path) as (ask, ann, bob):
        await ann.send(chat(1), node(2, 1, "First"))
        for begin in range(1000, 4000, 500):
            await ann.send(*(node(number, 1, "Hello") for number in range(begin, begin + 500)))
        await sent_beside(parts, bob, ann.send(*(node(number, 1, "Hello") for number in range(5000, 5200))))
        assert parts.most_steps("a") <= 25      # once the messages are counted, by an index
        assert sum(part.steps for part in parts.of("a")) <= 400
        assert parts.most_waited("b") <= MOST_WAITED


async def test_what_follows_a_message_is_deleted_in_parts(tmp_path, parts):
    """Whenever the server ends meanwhile, what is left is a tree."""
    async with two_keys(tmp_path) as (ask, ann, bob):
        await ann.send(chat(1), node(2, 1, "First"))
        await ann.send(*(node(number, 1, "Hello", number - 1) for number in range(3, 400)), node(500, 1, "Beside"))
        orphans = []

        def look(connection):
            orphans.append(connection.execute(
                "SELECT COUNT(*) FROM chat_records AS a WHERE deleted = 0 AND parent <> '' AND NOT EXISTS "
                "(SELECT 1 FROM chat_records AS b WHERE b.owner = a.owner AND b.name = a.parent AND b.deleted = 0)").fetchone()[0])
        store = ask.place.front.store
        async with parts.beside(lambda: store.run(look, client="b")):
            [row] = await ann.send({"kind": "node", "id": an_id(2), "patch": None})
        assert row["state"] == "deleted" and len(orphans) > 100 and set(orphans) == {0}
        assert parts.most_waited("b") <= MOST_WAITED
        await ann.news()
        assert [key for key in ann.seen] == [("chat", an_id(1)), ("node", an_id(500))]


async def test_edits_that_others_knew_nothing_of_copy_no_more_than_a_body_may(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, LARGE))
        made = await laptop.send(*(patch_of(2, base=0, content=f"Edit {index}") for index in range(20)))
        states = [row["state"] for row in made]
        copied = changes.MOST_COPIED // len(LARGE)
        assert states == ["sibling"] * copied + ["refused"] * (20 - copied) and "send the rest again" in made[-1]["error"]["message"]
        again = await laptop.send(*(patch_of(2, base=0, content=f"Edit {index}") for index in range(copied, 20)))
        assert [row["state"] for row in again][:copied] == ["sibling"] * copied


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+M8AAAUBAQDzyGHnAAAAAElFTkSuQmCC")


async def test_an_export_reads_a_picture_at_a_time(tmp_path, monkeypatch):
    """However many messages show it."""
    picture = PNG + b"\0" * 1_000_000
    shown = {"name": "cat.png", "file": hashlib.sha256(picture).hexdigest()}
    read = []
    plain = exporting.pictures.inlined
    monkeypatch.setattr(exporting.pictures, "inlined", lambda *arguments, **named: read.append(1) or plain(*arguments, **named))
    async with devices(tmp_path) as [phone, laptop]:
        async with phone.ask.place.client.post(f"{phone.ask.place.url}/v1/chats/files", data=picture, headers={"X-Chat-Space": SPACE}) as response:
            assert response.status == 200
        await phone.send(chat(1), *(node(number, 1, "Look", pictures=[shown] * 40) for number in (2, 3)))
        export = exporting.Export(phone.ask.place.front.store, OWNER, "")
        sizes = [len(part) async for part in export.parts(0)]
        assert len(read) == 80 and max(sizes) <= chat_routes.PART_BYTES and sum(sizes) > 80 * len(picture)
        [refused] = await phone.send(node(4, 1, "Look", pictures=[shown] * (records.MOST_PICTURES + 1)))
        assert refused["state"] == "refused" and refused["error"]["param"] == "pictures"


async def test_words_of_any_length_are_searched_for_in_bounded_time(tmp_path):
    """A text is searched in pieces; a word is found wherever one of these begins."""
    async with devices(tmp_path) as [phone, laptop]:
        long = "q" * 5000
        text = "a" * (records.PIECE - 3) + " wombat " + "b" * records.PIECE + " Straße İstanbul ΟΔΥΣΣΕΥΣ 한국어 café " + long
        await phone.send(chat(1, "Long"), node(2, 1, text))
        rows = await phone.ask.place.front.store.run(lambda connection: connection.execute("SELECT folded FROM chat_words").fetchall())
        assert max(len(folded) for folded, in rows) <= records.PIECE + records.LONGEST_WORD
        for words in ("wombat", "WOMBAT b", "istanbul", "οδυσσευς", "ΟΔΥΣΣΕΥΣ", "한국어", "한국", "cafe\u0301", long, "q" * 99, "long wombat"):
            _, page = await phone.ask(SPACE, f"/v1/chats/search?q={words}")
            assert [row["node"] for row in page["data"]] == [an_id(2)], words
        _, page = await phone.ask(SPACE, "/v1/chats/search?q=wombat+nowhere")
        assert page["data"] == [] and not page["has_more"]


async def test_a_search_ends_its_page_when_its_time_is_over(tmp_path, monkeypatch):
    """The next one goes on. A chat that alone takes longer is an error, and the thread is free afterwards."""
    async with devices(tmp_path) as [phone, laptop]:
        for number in range(4):
            await phone.send(chat(number, f"Wombat {number}", updated=number + 1), node(10 + number, number, "word " * 20_000))
        monkeypatch.setattr(search, "LOOKED_S", 0.0)
        titles, after = [], ""
        while after is not None:
            _, page = await phone.ask(SPACE, f"/v1/chats/search?q=wombat&after={after}")
            assert len(page["data"]) <= 1
            titles += [row["title"] for row in page["data"]]
            after = page["after"]
        assert titles == [f"Wombat {number}" for number in (3, 2, 1, 0)]
        monkeypatch.setattr(search, "CHAT_SEARCH_S", -1.0)
        monkeypatch.setattr(readers, "STEPS", 1)
        status, error = await phone.ask(SPACE, "/v1/chats/search?q=nowhere")
        assert status == 503 and "too long" in error["error"]["message"]
        monkeypatch.undo()
        threads = phone.ask.place.front.rooms["chats"].readers
        while threads.running:
            await asyncio.sleep(0.01)  # until the thread has ended
        assert threads.turns.free == 2
        assert (await phone.ask(SPACE, "/v1/chats/search?q=wombat"))[0] == 200


async def test_a_search_that_nobody_waits_for_gives_its_thread_back(tmp_path, monkeypatch):
    """And until then another key has one."""
    async with two_keys(tmp_path) as (ask, ann, bob):
        await ann.send(chat(1, "Wombat"))
        await bob.send(chat(2, "Quokka"))
        threads = ask.place.front.rooms["chats"].readers

        def endless(reading):
            while not reading.is_over():
                reading.connection.execute("SELECT 1").fetchone()
            reading.check()
        dear = [asyncio.ensure_future(threads.run(endless, "a", 60.0)) for _ in range(3)]
        await asyncio.sleep(0)
        _, page = await ask("b" * 20, "/v1/chats/search?q=quokka")
        assert [row["title"] for row in page["data"]] == ["Quokka"] and not any(task.done() for task in dear)
        for task in dear:
            task.cancel()
        await asyncio.gather(*dear, return_exceptions=True)
        _, page = await ask("a" * 20, "/v1/chats/search?q=wombat")
        assert [row["title"] for row in page["data"]] == ["Wombat"]
        while threads.running:
            await asyncio.sleep(0.01)  # until the threads have ended
        assert threads.turns.free == 2


async def test_deletions_of_what_never_was_count_and_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "MOST_UNKNOWN", 50)
    async with two_keys(tmp_path) as (ask, ann, bob):
        made = await ann.send(*({"kind": "chat", "id": an_id(number), "patch": None} for number in range(200)))
        assert {row["state"] for row in made} == {"deleted"}
        store = ask.place.front.store
        [(rows, held)] = await store.run(lambda connection: connection.execute(
            "SELECT (SELECT COUNT(*) FROM chat_records), (SELECT SUM(bytes) FROM holdings)").fetchall())
        assert (rows, held) == (50, 50 * changes.ROW_BYTES)
        [late, other] = await ann.send(chat(3), chat(300))
        assert (late["state"], other["state"]) == ("deleted", "stored")
        later = partial(changes.change_all, owner=await owner_of(store), client="a", read=chat_routes.read_changes(
            b'{"changes": [{"kind": "chat", "id": "%s", "patch": null}]}' % an_id(999).encode()), now_s=2**40)
        await store.run(later)
        assert await store.run(lambda connection: connection.execute(
            f"SELECT COUNT(*) FROM chat_records WHERE deleted = {changes.UNKNOWN}").fetchone()[0]) == 1


async def owner_of(store):
    return await store.run(lambda connection: connection.execute("SELECT owner FROM chat_records LIMIT 1").fetchone()[0])


async def test_of_very_many_deletions_the_last_are_told(tmp_path, monkeypatch):
    """A device that has missed more lists all anew."""
    monkeypatch.setattr(changes, "MOST_TOLD", 10)
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(*(chat(number) for number in range(30)))
        await phone.news()
        await laptop.news()
        await phone.send(*({"kind": "chat", "id": an_id(number), "patch": None} for number in range(25)))
        store = phone.ask.place.front.store

        def told(connection):
            return connection.execute(f"SELECT COUNT(*) FROM chat_records WHERE deleted = {changes.GONE}").fetchone()[0]
        while await store.run(told) > 10:
            await asyncio.sleep(0.01)  # the server forgets them in parts
        assert (await phone.ask(SPACE, f"/v1/chats/changes?after={laptop.rev}"))[0] == 410
        laptop.rev = 0
        assert len(await laptop.news()) == 5


async def test_revisions_say_nothing_of_others(tmp_path):
    async with two_keys(tmp_path) as (ask, ann, bob):
        await ann.send(chat(1))
        for number in range(5):
            await bob.send(chat(number))
        [row] = await ann.send(chat(2))
        assert row["rev"] == 2
        await ann.news()
        assert ann.rev == 2


async def test_edited_words_leave_the_log(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        device = Device(ask, SPACE)
        await device.send(chat(1), node(2, 1, "Kowari " * 300))
        await device.send(patch_of(2, content="Edited"))

        def left():
            return any(b"kowari" in path.read_bytes().lower() for path in tmp_path.iterdir() if path.name != "store.db-shm")
        async with asyncio.timeout(30):
            while left():
                await asyncio.sleep(0.05)  # the server removes them in parts


async def test_a_list_has_no_more_than_a_page_may(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "PAGE_BYTES", 50_000)
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(*(chat(number, f"Chat {number}", updated=number + 1, system="x" * 20_000) for number in range(5)))
        titles, after = [], ""
        more = True
        while more:
            _, page = await phone.ask(SPACE, f"/v1/chats?limit=100&after={after}")
            assert len(page["data"]) <= 2
            titles += [row["title"] for row in page["data"]]
            more, after = page["has_more"], page["data"][-1]["id"]
        assert titles == [f"Chat {number}" for number in (4, 3, 2, 1, 0)]


async def test_a_list_goes_on_behind_a_chat_that_was_deleted(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(*(chat(number, f"Chat {number}", updated=number + 1) for number in range(5)))
        seen, after = [], ""
        more = True
        while more:
            _, page = await phone.ask(SPACE, f"/v1/chats?limit=2&after={after}")
            more = page["has_more"]
            for row in page["data"]:
                seen.append(row["title"])
                after = row["id"]
                await phone.send({"kind": "chat", "id": row["id"], "patch": None})
        assert seen == [f"Chat {number}" for number in (4, 3, 2, 1, 0)]
        assert (await phone.ask(SPACE, "/v1/chats"))[1]["data"] == []
        assert (await phone.ask(SPACE, f"/v1/chats?after={an_id(77)}"))[0] == 400


async def test_chats_of_earlier_versions_are_taken_over(tmp_path):
    """What an owner sees, what is found, shown and counted is as before, and devices need not begin anew."""
    from chatlm.common.jsontext import as_json
    from chatlm.front.annexes import ANNEXES
    from chatlm.front.annexes.chats.tables import STEPS
    tables = {annex.name: annex.tables() for annex in ANNEXES if annex.tables}
    old = Store(tmp_path / "store.db", {**tables, "chats": STEPS[:4]})
    old.open()
    bodies = [("chat", 1, "", {"created": 1, "title": "Fish", "updated": 5}), ("node", 2, an_id(1), {"created": 2, "conversation": an_id(1), "role": "user",
              "content": "Can fish hear? " * 5000}), ("node", 3, an_id(1), {"created": 3, "conversation": an_id(1), "role": "assistant", "parent": an_id(2),
              "content": "Yes", "stream": {"id": "s", "next": 3}}), ("project", 4, "", {"created": 1, "name": "Boats"}), ("chat", 5, "", None)]

    def fill(connection):
        for rev, (kind, number, of, body) in enumerate(bodies, 1):
            text = as_json(body) if body else ""
            connection.execute("INSERT INTO chat_records (owner, kind, name, chat, parent, rev, said, body, words, updated, changed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, "
                               "?, ?, 4000000000)", (OWNER, kind, an_id(number), of, (body or {}).get("parent", ""), rev, rev, text, 0, (body or {}).get("updated", 0)))
        connection.execute("UPDATE chat_revisions SET rev = 5")
        connection.execute("INSERT INTO chat_pictures (number, owner, name, made, data) VALUES (1, ?, ?, 7, ?), (2, ?, 'x', 7, x'00')",
                           (OWNER, hashlib.sha256(PNG).hexdigest(), PNG, OWNER))
        connection.execute("INSERT INTO chat_shown SELECT number, 1 FROM chat_records WHERE name = ?", (an_id(2),))
        connection.execute("INSERT INTO chat_answers SELECT number, 's' FROM chat_records WHERE name = ?", (an_id(3),))
    await old.run(fill)
    await old.close()
    async with started(tmp_path / "store.db") as ask:
        device = Device(ask, SPACE)
        device.rev = 3
        assert {row["id"] for row in await device.news()} == {an_id(3), an_id(4), an_id(5)}     # the answer was cut as the server ended
        device.rev = 0
        await device.news()
        assert {(kind, name): record for (kind, name), record in device.seen.items()} == {
            (kind, an_id(number)): body if number != 3 else {**{name: value for name, value in body.items() if name != "stream"}, "note": "interrupted", "ended": "s"}
            for kind, number, _, body in bodies if body}
        _, page = await ask(SPACE, "/v1/chats/search?q=fish+hear")
        assert [row["node"] for row in page["data"]] == [an_id(2)]
        rows = await ask.place.front.store.run(lambda connection: (
            connection.execute("SELECT SUM(256 + bytes + words) FROM chat_records").fetchone()[0]
            + connection.execute("SELECT SUM(256 + LENGTH(data)) FROM chat_pictures").fetchone()[0],
            connection.execute("SELECT bytes FROM holdings WHERE owner = ?", (OWNER,)).fetchone()[0],
            connection.execute("SELECT picture FROM chat_unshown").fetchall(), connection.execute("SELECT picture FROM chat_shown").fetchall(),
            connection.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'old_%'").fetchall()))
        assert rows[0] == rows[1] and rows[2] == [] and rows[3] == [(1,)] and rows[4] == []     # the picture that nobody showed is older than a day
        [row] = await device.send({"kind": "chat", "id": an_id(1), "base": device.rev, "patch": {"title": "Ears"}})
        assert row["state"] == "stored" and row["rev"] == device.rev + 1
