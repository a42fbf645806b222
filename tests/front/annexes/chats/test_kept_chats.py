"""Chats on the server: what changes make of them, who sees them, what is told, found, exported and deleted."""

import asyncio
import random

import pytest

from chat_devices import OTHER, PROJECT, SPACE, Device, an_id, chat, devices, node, started
from chatlm.common.config import ApiKey, LIMITS
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.chats import changes, records


async def test_a_chat_is_on_every_device(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        made = await phone.send(chat(1, "Fish"), node(2, 1, "Can fish hear?"), node(3, 1, "Yes.", 2, "assistant"))
        assert [row["state"] for row in made] == ["stored"] * 3
        await laptop.news()
        assert [record.get("content", record.get("title")) for record in laptop.seen.values()] == [
            "Fish", "Can fish hear?", "Yes."]
        await laptop.send({"kind": "chat", "id": an_id(1), "base": laptop.rev, "patch": {"title": "Ears", "system": "Be brief"}})
        await phone.news()
        assert phone.seen["chat", an_id(1)]["title"] == "Ears"
        assert (await laptop.ask(SPACE, f"/v1/chats/{an_id(1)}"))[1]["nodes"][1]["content"] == "Yes."


async def test_asked_again_a_change_does_nothing_more(tmp_path):
    """The answer to a change may be lost, and then a device sends it again."""
    async with devices(tmp_path) as [phone, laptop]:
        for _ in range(2):
            await phone.send(chat(1), node(2, 1, "One"))
        await laptop.news()
        edit = {"kind": "node", "id": an_id(2), "base": laptop.rev, "patch": {"content": "Two", "edited": True}}
        first, again = (await laptop.send(edit))[0], (await laptop.send(edit))[0]
        assert first["rev"] == again["rev"] and again["state"] == "stored"
        late = {"kind": "node", "id": an_id(2), "base": 1, "patch": {"content": "Three"}}
        siblings = {(await phone.send(late))[0]["sibling"] for _ in range(2)}
        assert len(siblings) == 1
        await phone.news()
        assert sorted(record["content"] for (kind, _), record in phone.seen.items() if kind == "node") == ["Three", "Two"]


async def test_two_edits_that_knew_nothing_of_each_other_are_both_kept(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "What is blue?"), node(3, 1, "The sea", 2, "assistant"))
        for device in (phone, laptop):
            await device.news()
        base = phone.rev
        [one] = await phone.send({"kind": "node", "id": an_id(3), "base": base, "patch": {"content": "The sky"}})
        [two] = await laptop.send({"kind": "node", "id": an_id(3), "base": base, "patch": {"content": "A whale"}})
        assert (one["state"], two["state"]) == ("stored", "sibling")
        assert two["record"]["content"] == "The sky"
        for device in (phone, laptop):
            await device.news()
        assert phone.seen == laptop.seen
        kept = phone.seen["node", two["sibling"]]
        assert (kept["content"], kept["parent"], kept["role"]) == ("A whale", an_id(2), "assistant")


async def test_what_is_deleted_never_returns(tmp_path):
    """A device that was offline sends changes of chats and nodes that another one has deleted."""
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "One"), node(3, 1, "Two", 2), chat(4), node(5, 4, "Five"))
        await laptop.news()
        await phone.send({"kind": "chat", "id": an_id(1), "patch": None},
                         {"kind": "node", "id": an_id(5), "patch": None})
        answers = await laptop.send(
            chat(1, "Back"), node(2, 1, "Back"), node(6, 1, "New", 3), node(7, 4, "Below", 5),
            {"kind": "node", "id": an_id(5), "base": laptop.rev, "patch": {"content": "Back"}})
        assert {row["state"] for row in answers} == {"deleted"}
        for device in (phone, laptop):
            await device.news()
        assert set(laptop.seen) == {("chat", an_id(4))} == set(phone.seen)


async def test_a_deleted_node_takes_along_what_follows_it(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "a"), node(3, 1, "b", 2), node(4, 1, "c", 3), node(5, 1, "d", 2))
        await laptop.news()
        await phone.send({"kind": "node", "id": an_id(3), "patch": None})
        await laptop.news()
        assert {name for kind, name in laptop.seen if kind == "node"} == {an_id(2), an_id(5)}


@pytest.mark.parametrize("change, param", [
    ({"kind": "cat", "id": an_id(1), "patch": {}}, "kind"), ({"kind": "chat", "id": "1", "patch": {}}, "id"),
    ({"kind": "chat", "id": "A" * 32, "patch": {}}, "id"), ({"kind": "chat", "id": an_id(9)}, "patch"),
    ({"kind": "chat", "id": an_id(9), "patch": [], "base": 0}, "patch"),
    ({"kind": "chat", "id": an_id(9), "patch": {}, "base": -1}, "base"),
    ({"kind": "chat", "id": an_id(9), "patch": {"title": "x"}}, "created"),
    ({"kind": "chat", "id": an_id(9), "patch": {"created": 1, "title": 5}}, "title"),
    ({"kind": "node", "id": an_id(9), "patch": {"created": 1, "role": "user", "content": "x"}}, "conversation"),
    (node(9, 8, "x"), "conversation"), (node(9, 1, "x", parent=77), "parent"), (node(9, 1, "x", role="system"), "role"),
    (node(9, 1, "x", pictures=[{"name": "a"}]), "pictures"), (node(9, 1, "x", calls=[{"id": "a"}]), "calls"),
    ({"kind": "node", "id": an_id(2), "patch": {"parent": an_id(3)}}, "parent"),
    ({"kind": "node", "id": an_id(2), "patch": {"conversation": an_id(4)}}, "conversation"),
    ({"kind": "node", "id": an_id(2), "patch": {"role": "assistant"}}, "role"),
    ({"kind": "node", "id": an_id(2), "patch": {"content": None}}, "content"), (7, "change")])
async def test_a_change_that_cannot_be_is_refused_alone(tmp_path, change, param):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "One"), node(3, 1, "Two"), chat(4))
        refused, stored = await phone.send(change, {"kind": "chat", "id": an_id(1), "base": 9, "patch": {"pinned": True}})
        assert (refused["state"], refused["error"]["param"], stored["state"]) == ("refused", param, "stored")


@pytest.mark.parametrize("body", [{}, {"changes": []}, {"changes": {}}, {"changes": [1] * 501}])
async def test_a_body_without_changes_is_refused(tmp_path, body):
    async with started(tmp_path / "store.db") as ask:
        status, answer = await ask(SPACE, "/v1/chats/changes", body)
        assert (status, answer["error"]["param"]) == (400, "changes")


async def test_an_answer_that_grows_keeps_what_is_further(tmp_path):
    """Two tabs follow one stream: the one ahead wins, and nothing changes after the end."""
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "", role="assistant", stream={"id": "s", "next": 0}))

        def grown(content, step):
            return {"kind": "node", "id": an_id(2), "patch": {"content": content, "stream": {"id": "s", "next": step}}}
        await phone.send(grown("One two", 2))
        await laptop.send(grown("One", 1))
        await laptop.news()
        assert laptop.seen["node", an_id(2)]["content"] == "One two"
        await phone.send({"kind": "node", "id": an_id(2), "patch": {"content": "One two three", "stream": None, "ended": "s"}})
        await laptop.send(grown("One two thr", 3))
        await laptop.news()
        assert laptop.seen["node", an_id(2)]["content"] == "One two three"
        assert "stream" not in laptop.seen["node", an_id(2)]


async def test_where_a_device_looks_is_its_own(tmp_path):
    """The newest branch of one device would hide that of another."""
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1, leaf=an_id(2), parameters={"seed": 1}))
        await laptop.news()
        assert laptop.seen["chat", an_id(1)] == {"created": 1.0, "updated": 1.0, "title": "", "parameters": {"seed": 1}}


async def test_who_waits_is_told_at_once(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1))
        await laptop.news()
        waiting = asyncio.ensure_future(laptop.news(wait=60))
        while not laptop.ask.place.front.room(next(each for each in ANNEXES if each.name == "chats")).waiting:
            await asyncio.sleep(0)
        await phone.send(node(2, 1, "Hello"))
        assert [row["record"]["content"] for row in await asyncio.wait_for(waiting, 30)] == ["Hello"]


async def test_an_owner_has_four_waits_and_others_theirs(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        path = "/v1/chats/changes?after=0&wait=60"
        waits = [asyncio.ensure_future(ask(SPACE, path)) for _ in range(4)]
        room = ask.place.front.room(next(each for each in ANNEXES if each.name == "chats"))
        while sum(map(len, room.waiting.values())) < 4:
            await asyncio.sleep(0.01)      # each asks the store's thread first
        status, answer = await ask(SPACE, path)
        assert (status, answer["error"]["code"]) == (503, "overloaded") or status == 429, answer
        assert (await ask(OTHER, "/v1/chats/changes?after=0&wait=0"))[0] == 200
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        while room.waiting:                # the server notices that the clients have left
            await asyncio.sleep(0.01)


async def test_only_its_owner_sees_a_chat(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        await Device(ask, SPACE).send(chat(1, "Secret"), node(2, 1, "The words of one"))
        other = Device(ask, OTHER)
        assert await other.news() == []
        assert (await ask(OTHER, f"/v1/chats/{an_id(1)}"))[0] == 404
        assert (await ask(OTHER, f"/v1/chats/{an_id(1)}", method="DELETE"))[0] == 404
        assert (await ask(OTHER, "/v1/chats"))[1]["data"] == []
        assert (await ask(OTHER, "/v1/chats/search?q=secret"))[1]["data"] == []
        assert (await ask(OTHER, "/v1/chats/export"))[1]["conversations"] == []
        [refused, own] = await other.send(node(3, 1, "I am in your chat"), chat(1, "The same id, another chat"))
        assert (refused["state"], own["state"]) == ("refused", "stored")
        assert (await ask(SPACE, f"/v1/chats/{an_id(1)}"))[1]["title"] == "Secret"
        status, answer = await ask("", "/v1/chats/changes")
        assert (status, answer["error"]["code"]) == (400, "missing_space")


async def test_a_key_needs_no_space_and_a_named_owner_keeps_chats(tmp_path):
    keys = ApiKey.hashed("a", "a"), ApiKey.hashed("b", "b")
    async with started(tmp_path / "store.db", *keys) as ask:
        await Device(ask, "a").send(chat(1, "Mine"))
        assert await Device(ask, "b").news() == []
    named = [ApiKey.hashed(name, name)._replace(owner="me") for name in "ab"]
    async with started(tmp_path / "store.db", *named) as ask:
        old = Device(ask, "b")
        old.rev = 1            # it has seen a revision of what it had before
        assert [row["record"]["title"] for row in await old.news()] == ["Mine"]


async def test_a_revision_whose_deletions_are_forgotten_is_gone(tmp_path, monkeypatch):
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), chat(2))
        await laptop.news()
        await phone.send({"kind": "chat", "id": an_id(1), "patch": None}, chat(3))
        store = phone.ask.place.front.store
        await store.run(lambda connection: changes.purge(connection, 2**33))
        status, answer = await laptop.ask(SPACE, f"/v1/chats/changes?after={laptop.rev}")
        assert (status, answer["error"]["code"]) == (410, "revision_gone")
        assert (await laptop.ask(SPACE, "/v1/chats/changes?after=999"))[0] == 410
        laptop.rev = 0
        assert {row["id"] for row in await laptop.news()} == {an_id(2), an_id(3)}


async def test_chats_are_found_by_all_their_words(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        await Device(ask, SPACE).send(
            chat(1, "Fish", updated=5), node(2, 1, "Können Wale SINGEN?"), node(3, 1, "Ja: " + "o " * 200 + "Lieder", 2),
            chat(4, "Birds that sing", updated=9), node(5, 4, "Larks"), chat(6, "Empty"))

        async def found(words):
            status, page = await ask(SPACE, f"/v1/chats/search?q={words}")
            assert status == 200, page
            return [(row["title"], row["node"], row["snippet"]) for row in page["data"]]
        assert await found("singen%20fish") == [("Fish", an_id(2), "Können Wale SINGEN?")]
        assert [row[0] for row in await found("sing")] == ["Birds that sing", "Fish"]
        [(_, where, snippet)] = await found("lieder")
        assert where == an_id(3) and snippet.startswith("…") and snippet.endswith("Lieder")
        assert await found("birds") == [("Birds that sing", None, "")]
        assert await found("lark%20whale") == []
        assert await found("singen%3F") and not await found("s*n") and not await found("[s]ing")
        assert (await ask(SPACE, "/v1/chats/search?q=%20"))[0] == 400


async def test_a_search_goes_on_after_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.front.annexes.chats.search.MOST_FOUND", 2)
    async with started(tmp_path / "store.db") as ask:
        await Device(ask, SPACE).send(*(chat(number, f"Word {number}", updated=number + 1) for number in range(5)))
        titles, after = [], ""
        while after is not None:
            _, page = await ask(SPACE, f"/v1/chats/search?q=word&after={after}")
            titles += [row["title"] for row in page["data"]]
            after = page["after"]
        assert titles == [f"Word {number}" for number in (4, 3, 2, 1, 0)]


async def test_lists_tags_and_files(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        device = Device(ask, SPACE)
        await device.send(*(chat(number, f"Chat {number}", updated=number + 1) for number in range(3)),
                          node(7, 1, "Hello"), node(8, 1, "x" * 3_000_000, 7),
                          {"kind": "prompt", "id": an_id(9), "patch": {"created": 1, "name": "Poem", "text": "Write"}},
                          {"kind": "project", "id": an_id(10), "patch": PROJECT},
                          {"kind": "chat", "id": an_id(2), "patch": {"project": an_id(10), "stores": PROJECT["stores"]}})
        _, page = await ask(SPACE, "/v1/chats?limit=2")
        assert [row["title"] for row in page["data"]] == ["Chat 2", "Chat 1"] and page["has_more"]
        assert page["data"][1]["nodes"] == 2
        _, rest = await ask(SPACE, f"/v1/chats?limit=2&after={page['data'][-1]['id']}")
        assert [row["title"] for row in rest["data"]] == ["Chat 0"] and not rest["has_more"]
        url = f"{ask.place.url}/v1/chats/{an_id(1)}"
        async with ask.place.client.get(url, headers={"X-Chat-Space": SPACE}) as response:
            tag, whole = response.headers["ETag"], await response.json()
        assert len(whole["nodes"][1]["content"]) == 3_000_000
        again = {"X-Chat-Space": SPACE, "If-None-Match": tag}
        async with ask.place.client.get(url, headers=again) as response:
            assert response.status == 304
        await device.send({"kind": "node", "id": an_id(7), "base": 99, "patch": {"content": "Hi"}})
        async with ask.place.client.get(url, headers=again) as response:
            assert response.status == 200
        _, file = await ask(SPACE, "/v1/chats/export")
        assert (file["format"], file["version"], file["prompts"]) == (
            "chat_server chats", 2, [{"name": "Poem", "text": "Write"}])
        assert [len(each["nodes"]) for each in file["conversations"]] == [0, 2, 0]
        assert file["projects"] == [{"id": an_id(10), **PROJECT}]
        assert [each.get("project") for each in file["conversations"]] == [an_id(10), None, None]


async def test_a_project_is_checked_and_its_chats_outlive_it(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        for wrong in ({"files": [{"name": "a"}]}, {"files": "a"}, {"stores": ["vs_1"]}, {"stores": [{"id": 1, "name": ""}]},
                      {"name": 1}, {"prompt": []}):
            [row] = await phone.send({"kind": "project", "id": an_id(1), "patch": PROJECT | wrong})
            assert (row["state"], row["error"]["param"]) == ("refused", *wrong)
        [row] = await phone.send({"kind": "project", "id": an_id(1), "patch": {"created": 1}})
        assert row["error"]["param"] == "name"
        [row] = await phone.send({"kind": "project", "id": an_id(1), "patch": PROJECT | {"files": [
            {"name": "large.txt", "text": "x" * 3_000_000}]}})
        assert row["state"] == "stored"
        await phone.send(chat(2, "Inside", project=an_id(1)), node(3, 2, "Words"))
        await laptop.news()
        assert laptop.seen["project", an_id(1)]["files"][0]["name"] == "large.txt"
        await laptop.send({"kind": "project", "id": an_id(1), "patch": None})
        await phone.news()
        assert ("project", an_id(1)) not in phone.seen and phone.seen["node", an_id(3)]["content"] == "Words"
        [late] = await phone.send({"kind": "project", "id": an_id(1), "base": phone.rev, "patch": {"name": "Back"}})
        assert late["state"] == "deleted"


async def test_two_keys_may_use_one_id_and_never_see_the_other_s_project(tmp_path):
    """Neither by its id, nor by putting a chat into it, nor by deleting it."""
    keys = [ApiKey.hashed(name * 20, name) for name in "ab"]
    async with started(tmp_path / "store.db", *keys) as ask:
        ann, bob = (Device(ask, name * 20) for name in "ab")
        await ann.send({"kind": "project", "id": an_id(1), "patch": PROJECT})
        [taken] = await bob.send({"kind": "project", "id": an_id(1), "base": 1, "patch": {"prompt": "Mine"}})
        assert taken["state"] == "refused" and "record" not in taken       # he has none of this id
        [own] = await bob.send({"kind": "project", "id": an_id(1), "patch": PROJECT | {"prompt": "Bob's"}})
        await bob.send(chat(2, project=an_id(1)), {"kind": "project", "id": an_id(1), "patch": None})
        assert own["state"] == "stored"
        await ann.news()
        await bob.news()
        assert ann.seen == {("project", an_id(1)): PROJECT} and [kind for kind, _ in bob.seen] == ["chat"]
        assert "projects" not in (await ask("b" * 20, "/v1/chats/export"))[1]
        status, error = await ask("b" * 20, "/v1/chats/changes", {"changes": [
            {"kind": "project", "id": an_id(3), "patch": PROJECT | {"prompt": "x" * 16_000_000}}]})
        assert (status, error["data"][0]["state"], error["data"][0]["error"]["param"]) == (200, "refused", "prompt")


async def test_what_an_answer_was_given_to_read_stays_with_it(tmp_path):
    """The passages below an answer, and the collections that a chat asks."""
    async with devices(tmp_path) as [phone, laptop]:
        given = {"read": 1, "of": 4, "passages": [{"index": 1, "vector_store_id": "vs", "file_id": "file", "filename": "a.pdf", "page": None, "start": 0}]}
        await phone.send(chat(1, stores=PROJECT["stores"]), node(2, 1, "One"), node(3, 1, "Two", 2, "assistant", knowledge=given))
        await laptop.news()
        assert laptop.seen["node", an_id(3)]["knowledge"] == given
        assert laptop.seen["chat", an_id(1)]["stores"] == PROJECT["stores"]


async def test_all_chats_are_deleted_only_by_their_number(tmp_path):
    async with started(tmp_path / "store.db") as ask:
        await Device(ask, SPACE).send(chat(1), chat(2), node(3, 2, "x"))
        await Device(ask, OTHER).send(chat(4))
        for query, status in (("", 400), ("?count=3", 409), ("?count=2", 200)):
            assert (await ask(SPACE, f"/v1/chats{query}", method="DELETE"))[0] == status
        assert (await ask(SPACE, "/v1/chats"))[1]["data"] == []
        assert len((await ask(OTHER, "/v1/chats"))[1]["data"]) == 1


async def test_words_of_deleted_chats_are_nowhere(tmp_path):
    """Neither in the file nor in its -wal, whatever was deleted how."""
    async with started(tmp_path / "store.db") as ask:
        device = Device(ask, SPACE)
        await device.send(
            chat(1, "Quokka"), node(2, 1, "Wombat " * 3000), node(3, 1, "Numbat", 2), chat(4, "Bilby"),
            node(5, 4, "Potoroo"), node(6, 4, "Dunnart"), node(7, 4, "Edited away: Kowari"))
        await device.send({"kind": "node", "id": an_id(7), "base": 99, "patch": {"content": "Edited"}})
        await device.send({"kind": "chat", "id": an_id(1), "patch": None},
                          {"kind": "node", "id": an_id(5), "patch": None})

        def left():
            files = [path.read_bytes().lower() for path in tmp_path.iterdir() if path.name != "store.db-shm"]
            return {word for word in (b"quokka", b"wombat", b"numbat", b"potoroo", b"kowari")
                    if any(word in file for file in files)}
        async with asyncio.timeout(30):
            while left():
                await asyncio.sleep(0.05)  # the server removes them in pieces
        assert any(b"dunnart" in path.read_bytes().lower() for path in tmp_path.iterdir())


async def test_a_full_owner_may_still_delete(tmp_path, monkeypatch):
    from dataclasses import replace
    async with devices(tmp_path) as [phone, laptop]:
        await phone.send(chat(1), node(2, 1, "x" * 5000))
        monkeypatch.setattr("chatlm.front.store.quota.LIMITS", replace(LIMITS, kept_bytes=6000))
        [refused] = await phone.send(node(3, 1, "y" * 5000))
        assert refused["state"] == "refused" and "6,000 bytes" in refused["error"]["message"]
        assert (await phone.send({"kind": "chat", "id": an_id(1), "patch": None}))[0]["state"] == "deleted"


async def test_large_bodies_are_read_in_a_sandbox(tmp_path):
    async with devices(tmp_path) as [phone, laptop]:
        made = await phone.send(chat(1), *(node(number, 1, "x" * 2000, 2 if number > 2 else None)
                                           for number in range(2, 101)), node(200, 1, "z", ids=[-1]))
        assert [row["state"] for row in made] == ["stored"] * 100 + ["refused"]
        too_large = await phone.send(node(300, 1, "x" * (records.TEXT_BYTES + 1)), chat(5),
                                     node(301, 1, "x", ids=[1] * records.DETAILS_BYTES))
        assert [row.get("error", {}).get("param") for row in too_large] == ["content", None, "ids"]
        await laptop.news()
        assert len(laptop.seen) == 101


async def test_limits_on_chats_and_nodes(tmp_path, monkeypatch):
    monkeypatch.setitem(changes.MOST, "chat", 2)
    monkeypatch.setitem(changes.MOST, "node", 1)
    async with devices(tmp_path) as [phone, laptop]:
        made = await phone.send(chat(1), chat(2), chat(3), node(4, 1, "x"), node(5, 1, "y"), node(6, 2, "z"))
        assert [row["state"] for row in made] == ["stored", "stored", "refused", "stored", "refused", "stored"]


def of_others(random_numbers, device, number, chats, others):
    """A change of a project or a prompt, or of the project that a chat is in."""
    roll = random_numbers.random()
    projects = [name for kind, name in others if kind == "project"]
    if roll < 0.3 or not others:
        kind = random_numbers.choice(["project", "prompt"])
        more = {"prompt": "Be brief", "files": [{"name": "a.txt", "text": "x"}]} if kind == "project" else {"text": "Hi"}
        return {"kind": kind, "id": an_id(number), "base": 0, "patch": {"created": 1, "name": f"N{number}", **more}}
    if roll < 0.6 and chats and projects:
        project = random_numbers.choice([*projects, None])
        return {"kind": "chat", "id": random_numbers.choice(chats), "base": device.rev, "patch": {"project": project}}
    kind, name = random_numbers.choice(others)
    if roll < 0.8:
        return {"kind": kind, "id": name, "base": device.rev, "patch": {"name": f"N{random_numbers.random()}"}}
    return {"kind": kind, "id": name, "patch": None}


@pytest.mark.parametrize("seed", range(12))
async def test_three_devices_end_equal_whatever_they_do(tmp_path, seed):
    """Random chats, messages, projects, prompts, edits and deletions, sent late and in any order; some answers are
    lost. Chats are moved from project to project, and outlive them."""
    random_numbers = random.Random(seed)
    async with devices(tmp_path, 3) as all_devices:
        unsent = {device: [] for device in all_devices}
        ids = iter(range(1, 10_000))
        for _ in range(60):
            device = random_numbers.choice(all_devices)
            chats = [name for kind, name in device.seen if kind == "chat"]
            nodes = [name for kind, name in device.seen if kind == "node"]
            roll = random_numbers.random()
            others = [key for key in device.seen if key[0] in ("project", "prompt")]
            if random_numbers.random() < 0.25:
                change = of_others(random_numbers, device, next(ids), chats, others)
            elif roll < 0.2 or not chats:
                change = chat(next(ids), f"Chat of {seed}")
            elif roll < 0.5:
                place = random_numbers.choice(chats)
                inside = [name for name in nodes if device.seen["node", name]["conversation"] == place]
                change = node(next(ids), 0, f"Text {random_numbers.random()}")
                change["patch"]["conversation"] = place
                if inside:
                    change["patch"]["parent"] = random_numbers.choice(inside)
            elif roll < 0.7 and nodes:
                name = random_numbers.choice(nodes)
                change = {"kind": "node", "id": name, "base": device.records["node", name][0],
                          "patch": {"content": f"Edit {random_numbers.random()}"}}
            elif roll < 0.8:
                name = random_numbers.choice(chats)
                change = {"kind": "chat", "id": name, "base": device.rev, "patch": {"title": f"T{random_numbers.random()}"}}
            else:
                kind, name = random_numbers.choice([*device.seen])
                change = {"kind": kind, "id": name, "patch": None}
            unsent[device].append(change)
            if random_numbers.random() < 0.4:
                sent = unsent[device]
                await device.send(*sent)
                if random_numbers.random() < 0.7:   # else the answer was lost, and it sends all again later
                    unsent[device] = []
                await device.news()
        for device in all_devices:
            if unsent[device]:
                await device.send(*unsent[device])
        for device in all_devices:
            await device.news()
        one, two, three = (device.seen for device in all_devices)
        assert one == two == three
        fresh = Device(all_devices[0].ask, SPACE)
        await fresh.news()
        assert fresh.seen == one
