"""/v1/vector_stores: what its routes answer, to whom, and what they refuse. A played pool embeds."""

import asyncio
import json
from dataclasses import replace

import aiohttp
import pytest

from annex_place import Place
from chatlm.common.config import LIMITS, ApiKey, Settings
from embedding_pool import EmbeddingPool, knowing
from fake_pool import FakePool

ONE, OTHER = "A" * 22, "b-_9" * 16
STORES = "/v1/vector_stores"
STATIC = {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 50}}


async def test_a_store_has_what_openai_shows(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        file = await ask.file(ONE, "Cats eat fish.")
        status, made = await ask(
            ONE,
            STORES,
            {
                "name": "zoo",
                "description": "animals",
                "file_ids": [file],
                "metadata": {"a": "b"},
                "expires_after": {"anchor": "last_active_at", "days": 2},
            },
        )
        assert status == 200 and made["id"].startswith("vs_")
        assert made["status"] == "in_progress" and made["file_counts"] == {
            "in_progress": 1,
            "completed": 0,
            "failed": 0,
            "cancelled": 0,
            "total": 1,
        }
        assert made["expires_at"] == made["last_active_at"] + 2 * 86_400
        assert (made["name"], made["description"], made["metadata"]) == ("zoo", "animals", {"a": "b"})
        done = await ask.ended(ONE, f"{STORES}/{made['id']}")
        assert done["status"] == "completed" and done["file_counts"]["completed"] == 1
        assert done["usage_bytes"] == len("Cats eat fish.") + 8 + 8  # a window of 8 numbers, and its scale
        assert done["embedding_model"] == "fake-model"
        _, found = await ask(ONE, f"{STORES}/{made['id']}/files/{file}")
        assert found["status"] == "completed" and found["last_error"] is None
        assert found["chunking_strategy"] == {"type": "other"} and found["attributes"] == {}
        _, content = await ask(ONE, f"{STORES}/{made['id']}/files/{file}/content")
        place = {"start": 0, "page": None, "heading": ""}
        assert content["data"] == [{"type": "text", "text": "Cats eat fish."} | place]
        assert not content["has_more"]


async def test_who_polls_is_told_when_to_ask_again(tmp_path):
    pool = EmbeddingPool(gate=asyncio.Event())
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        file = await ask.file(ONE, "Cats eat fish.")
        _, store = await ask(ONE, STORES, {"file_ids": [file]})
        path = f"{ask.place.url}{STORES}/{store['id']}/files/{file}"
        headers = {"X-Chat-Space": ONE}
        async with ask.place.client.get(path, headers=headers) as response:
            assert response.headers["openai-poll-after-ms"].isdecimal()
        pool.gate.set()
        await ask.ended(ONE, f"{STORES}/{store['id']}")
        async with ask.place.client.get(path, headers=headers) as response:
            assert "openai-poll-after-ms" not in response.headers


async def test_a_store_is_changed(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "Cats")
        _, changed = await ask(
            ONE,
            f"{STORES}/{store}",
            {"name": "new", "metadata": {"x": "y"}, "expires_after": {"anchor": "last_active_at", "days": 1}},
        )
        assert (changed["name"], changed["metadata"], changed["expires_after"]["days"]) == (
            "new",
            {"x": "y"},
            1,
        )
        _, changed = await ask(ONE, f"{STORES}/{store}", {"name": "newer"})
        assert (changed["name"], changed["metadata"]) == ("newer", {"x": "y"})
        _, changed = await ask(
            ONE, f"{STORES}/{store}/files/{file}", {"attributes": {"year": 2026, "old": False}}
        )
        assert changed["attributes"] == {"year": 2026, "old": False}
        status, _ = await ask(ONE, f"{STORES}/{store}/files/{file}", {"attributes": {}})
        assert status == 200 and (await ask(ONE, f"{STORES}/{store}/files/{file}"))[1]["attributes"] == {}


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_lists_are_read_page_by_page_in_both_directions(tmp_path, order):
    async with knowing(tmp_path / "k.db") as ask:
        made = [(await ask(ONE, STORES, {"name": str(number)}))[1]["id"] for number in range(7)]
        files = [await ask.file(ONE, f"text {number}") for number in range(7)]
        store = made[0]
        for file in files:
            await ask(ONE, f"{STORES}/{store}/files", {"file_id": file})
        await ask.ended(ONE, f"{STORES}/{store}")
        for path, ids in ((STORES, made), (f"{STORES}/{store}/files", files)):
            whole = ids if order == "asc" else ids[::-1]
            found, after, more = [], "", True
            while more:
                _, page = await ask(ONE, f"{path}?limit=3&order={order}{f'&after={after}' if after else ''}")
                found += [row["id"] for row in page["data"]]
                after, more = page["last_id"], page["has_more"]
            assert found == whole
            _, page = await ask(ONE, f"{path}?limit=3&order={order}&before={whole[5]}")
            assert [row["id"] for row in page["data"]] == whole[2:5] and page["has_more"]
            _, page = await ask(ONE, f"{path}?order={order}&after={whole[1]}&before={whole[5]}")
            assert [row["id"] for row in page["data"]] == whole[2:5] and not page["has_more"]
            assert (await ask(ONE, f"{path}?after=nothing"))[0] == 400


async def test_lists_of_files_are_filtered_by_status(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [good] = await ask.store(ONE, "Cats")
        bad = await ask.file(ONE, b"\0\1\2", "x.bin")
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": bad})
        await ask.ended(ONE, f"{STORES}/{store}")
        for status, ids in ("completed", [good]), ("failed", [bad]), ("in_progress", []), ("cancelled", []):
            _, page = await ask(ONE, f"{STORES}/{store}/files?filter={status}")
            assert [row["id"] for row in page["data"]] == ids
        assert (await ask(ONE, f"{STORES}/{store}/files?filter=lost"))[0] == 400


async def test_what_belongs_to_others_is_not_there(tmp_path):
    """In the same words as what never was."""
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "Cats eat fish.")
        _, batch = await ask(ONE, f"{STORES}/{store}/file_batches", {"file_ids": [file]})
        await ask.ended(ONE, f"{STORES}/{store}")
        own, [mine] = await ask.store(OTHER, "Dogs")

        def everywhere(store, file, batch):
            one = f"{STORES}/{store}"
            return [
                ("GET", one, None),
                ("POST", one, {"name": "x"}),
                ("DELETE", one, None),
                ("POST", f"{one}/search", {"query": "fish"}),
                ("GET", f"{one}/files", None),
                ("POST", f"{one}/files", {"file_id": mine}),
                ("GET", f"{one}/files/{file}", None),
                ("POST", f"{one}/files/{file}", {"attributes": {}}),
                ("DELETE", f"{one}/files/{file}", None),
                ("GET", f"{one}/files/{file}/content", None),
                ("POST", f"{one}/file_batches", {"file_ids": [mine]}),
                ("GET", f"{one}/file_batches/{batch}", None),
                ("POST", f"{one}/file_batches/{batch}/cancel", {}),
                ("GET", f"{one}/file_batches/{batch}/files", None),
            ]

        nowhere = everywhere("vs_" + "0" * 32, "file-" + "0" * 24, "vsfb_" + "0" * 32)
        for client in (OTHER, ""):
            for (method, path, body), (_, unknown, _) in zip(everywhere(store, file, batch["id"]), nowhere):
                status, answer = await ask(client, path, body, method)
                assert status == 404, (method, path)
                _, same = await ask(client, unknown, body, method)
                assert answer["error"]["message"].replace(store, "X") == same["error"]["message"].replace(
                    "vs_" + "0" * 32, "X"
                )
        # in a store of its own, the files and batches of others are not there either
        for path, body in (
            (f"{STORES}/{own}/files", {"file_id": file}),
            (STORES, {"file_ids": [file]}),
            (f"{STORES}/{own}/file_batches", {"file_ids": [mine, file]}),
        ):
            status, answer = await ask(OTHER, path, body)
            assert status == 404 and answer["error"]["code"] == "not_found"
        for method, path in (
            ("GET", f"files/{file}"),
            ("DELETE", f"files/{file}"),
            ("GET", f"files/{file}/content"),
            ("GET", f"file_batches/{batch['id']}"),
            ("POST", f"file_batches/{batch['id']}/cancel"),
        ):
            assert (await ask(OTHER, f"{STORES}/{own}/{path}", None, method))[0] == 404
        assert (await ask(OTHER, STORES))[1]["data"][0]["id"] == own and len(
            (await ask(OTHER, STORES))[1]["data"]
        ) == 1
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["file_counts"]["completed"] == 1


async def test_stores_belong_to_owners_of_keys(tmp_path):
    """Two keys of one owner see the same, another key does not."""
    keys = (
        ApiKey.hashed("k1", "one")._replace(owner="us"),
        ApiKey.hashed("k2", "two")._replace(owner="us"),
        ApiKey.hashed("k3", "three"),
    )
    bearer = {"one": "k1", "two": "k2", "three": "k3"}
    async with knowing(
        tmp_path / "k.db", *keys, headers_of=lambda key: {"Authorization": f"Bearer {bearer[key]}"}
    ) as ask:
        store, [file] = await ask.store("one", "Cats")
        assert (await ask("two", f"{STORES}/{store}/files/{file}"))[0] == 200
        assert (await ask("three", f"{STORES}/{store}"))[0] == 404
        more = await ask.file("two", "Dogs")
        assert (await ask("one", f"{STORES}/{store}/files", {"file_id": more}))[0] == 200


BAD_STORES = [
    {"name": "x" * 257},
    {"name": 3},
    {"metadata": {"a": 1}},
    {"metadata": {str(n): "" for n in range(17)}},
    {"expires_after": {"anchor": "created_at", "days": 1}},
    {"expires_after": {"anchor": "last_active_at", "days": 0}},
    {"expires_after": {"days": 366}},
    {"file_ids": "file-x"},
    {"file_ids": ["file-x"] * 501},
    {"chunking_strategy": {"type": "static"}},
    {"chunking_strategy": {"type": "auto2"}},
    {"file_ids": ["a", "a"]},
    {"name": "\ud800"},
    {
        "chunking_strategy": {
            "type": "static",
            "static": {"max_chunk_size_tokens": 99, "chunk_overlap_tokens": 0},
        }
    },
    {
        "chunking_strategy": {
            "type": "static",
            "static": {"max_chunk_size_tokens": 4097, "chunk_overlap_tokens": 0},
        }
    },
    {
        "chunking_strategy": {
            "type": "static",
            "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51},
        }
    },
    {"embedding_model": 7},
]


@pytest.mark.parametrize("body", BAD_STORES, ids=lambda body: json.dumps(body)[:60])
async def test_bodies_that_mean_nothing_are_refused(tmp_path, body):
    async with knowing(tmp_path / "k.db") as ask:
        status, answer = await ask(ONE, STORES, body)
        assert status == 400 and answer["error"]["code"], answer
        assert (await ask(ONE, STORES))[1]["data"] == []


@pytest.mark.parametrize(
    "attributes",
    [
        {"a": None},
        {"a": []},
        {"a": {}},
        {"a" * 65: 1},
        {"a": "x" * 513},
        {str(n): n for n in range(17)},
        [],
        "x",
    ],
    ids=lambda attributes: json.dumps(attributes)[:30],
)
async def test_attributes_have_limits(tmp_path, attributes):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "Cats")
        for path, body in (
            (f"files/{file}", {}),
            ("files", {"file_id": file}),
            ("file_batches", {"file_ids": [file]}),
        ):
            status, answer = await ask(ONE, f"{STORES}/{store}/{path}", {**body, "attributes": attributes})
            assert status == 400, answer
        status, _ = await ask(
            ONE, f"{STORES}/{store}/file_batches", {"files": [{"file_id": file, "attributes": attributes}]}
        )
        assert status == 400


async def test_large_bodies_are_refused(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "Cats")
        large = b'{"name": "' + b"x" * (16 << 20) + b'"}'
        for path in (
            "",
            f"/{store}",
            f"/{store}/files",
            f"/{store}/file_batches",
            f"/{store}/search",
            f"/{store}/files/{file}",
        ):
            async with ask.place.client.post(
                f"{ask.place.url}{STORES}{path}", data=large, headers={"X-Chat-Space": ONE}
            ) as response:
                assert response.status == 413


async def test_a_batch_has_many_files_with_their_own_attributes(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        files = [await ask.file(ONE, f"text {number}") for number in range(4)]
        bad = await ask.file(ONE, b"\0", "x.bin")
        status, batch = await ask(
            ONE,
            f"{STORES}/{store}/file_batches",
            {
                "files": [
                    *({"file_id": file, "attributes": {"n": number}} for number, file in enumerate(files)),
                    {"file_id": bad, "chunking_strategy": STATIC},
                ]
            },
        )
        assert (
            status == 200
            and batch["object"] == "vector_store.files_batch"
            and batch["id"].startswith("vsfb_")
        )
        done = await ask.ended(ONE, f"{STORES}/{store}/file_batches/{batch['id']}")
        assert done["status"] == "completed"
        assert done["file_counts"] == {
            "in_progress": 0,
            "completed": 4,
            "failed": 1,
            "cancelled": 0,
            "total": 5,
        }
        _, page = await ask(ONE, f"{STORES}/{store}/file_batches/{batch['id']}/files?order=asc")
        assert [row["id"] for row in page["data"]] == [*files, bad]
        assert [row["attributes"] for row in page["data"]] == [*({"n": number} for number in range(4)), {}]
        assert page["data"][-1]["chunking_strategy"] == STATIC
        _, page = await ask(ONE, f"{STORES}/{store}/file_batches/{batch['id']}/files?filter=failed")
        assert [row["id"] for row in page["data"]] == [bad]


async def test_a_batch_of_bad_files_alone_has_failed(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        bad = await ask.file(ONE, b"\0", "x.bin")
        _, batch = await ask(ONE, f"{STORES}/{store}/file_batches", {"file_ids": [bad]})
        assert (await ask.ended(ONE, f"{STORES}/{store}/file_batches/{batch['id']}"))["status"] == "failed"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"file_ids": ["a"], "files": [{"file_id": "a"}]},
        {"file_ids": []},
        {"files": []},
        {"file_ids": ["a", "a"]},
        {"files": [{}]},
        {"files": [{"file_id": "a"}] * 2},
        {"file_ids": [str(n) for n in range(2001)]},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
async def test_a_batch_has_either_ids_or_files(tmp_path, body):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        status, answer = await ask(ONE, f"{STORES}/{store}/file_batches", body)
        assert status == 400, answer


async def test_a_batch_that_fails_adds_none_of_its_files(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        file = await ask.file(ONE, "text")
        status, _ = await ask(ONE, f"{STORES}/{store}/file_batches", {"file_ids": [file, "file-unknown"]})
        assert status == 404
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["file_counts"]["total"] == 0


async def test_a_cancelled_batch_leaves_out_what_waits(tmp_path):
    """What was completed stays."""
    pool = EmbeddingPool()
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        store, _ = await ask.store(ONE)
        first = await ask.file(ONE, "first")
        await ask(ONE, f"{STORES}/{store}/files", {"file_id": first})
        await ask.ended(ONE, f"{STORES}/{store}")
        pool.gate = asyncio.Event()
        files = [await ask.file(ONE, f"text {number}") for number in range(5)]
        _, batch = await ask(ONE, f"{STORES}/{store}/file_batches", {"file_ids": files})
        await pool.until_open(2)
        status, cancelled = await ask(ONE, f"{STORES}/{store}/file_batches/{batch['id']}/cancel", {})
        assert (
            status == 200
            and cancelled["status"] == "cancelled"
            and cancelled["file_counts"]["cancelled"] == 5
        )
        pool.gate.set()
        await pool.until_open(0)
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["file_counts"] == {
            "in_progress": 0,
            "completed": 1,
            "failed": 0,
            "cancelled": 5,
            "total": 6,
        }
        _, again = await ask(ONE, f"{STORES}/{store}/file_batches/{batch['id']}/cancel", {})
        assert again["status"] == "cancelled"


async def test_cancelling_a_batch_that_is_over_changes_nothing(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        file = await ask.file(ONE, "text")
        _, batch = await ask(ONE, f"{STORES}/{store}/file_batches", {"file_ids": [file]})
        await ask.ended(ONE, f"{STORES}/{store}/file_batches/{batch['id']}")
        _, cancelled = await ask(ONE, f"{STORES}/{store}/file_batches/{batch['id']}/cancel", {})
        assert cancelled["status"] == "completed" and cancelled["file_counts"]["completed"] == 1


async def test_an_owner_has_so_many_stores_and_a_store_so_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.front.annexes.knowledge.stores.STORES_OF_OWNER", 2)
    monkeypatch.setattr("chatlm.front.annexes.knowledge.stores.LIMITS", replace(LIMITS, store_files=2))
    async with knowing(tmp_path / "k.db") as ask:
        store, files = await ask.store(ONE, "a", "b")
        assert (await ask(ONE, STORES, {}))[0] == 200
        status, answer = await ask(ONE, STORES, {})
        assert (status, answer["error"]["code"]) == (403, "too_many_vector_stores")
        assert (await ask(OTHER, STORES, {}))[0] == 200
        third = await ask.file(ONE, "c")
        status, answer = await ask(ONE, f"{STORES}/{store}/files", {"file_id": third})
        assert (status, answer["error"]["code"]) == (403, "too_many_files")
        assert (await ask(ONE, f"{STORES}/{store}/files", {"file_id": files[0]}))[0] == 200  # again
        await ask(ONE, f"{STORES}/{store}/files/{files[1]}", method="DELETE")
        assert (await ask(ONE, f"{STORES}/{store}/files", {"file_id": third}))[0] == 200


async def test_stores_count_for_what_an_owner_may_keep(tmp_path, monkeypatch):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(ONE, "word " * 2000)
        [(held,)] = await ask.rows("SELECT SUM(bytes) FROM holdings")
        [(bytes_,)] = await ask.rows("SELECT bytes FROM knowledge_stores")
        assert held > bytes_ + 10_000  # its upload too
        monkeypatch.setattr("chatlm.front.store.quota.LIMITS", replace(LIMITS, kept_bytes=held))
        status, answer = await ask(ONE, STORES, {})
        assert (status, answer["error"]["code"]) == (403, "storage_full")
        await ask(ONE, f"{STORES}/{store}", method="DELETE")
        assert (await ask(ONE, STORES, {}))[0] == 200


async def test_a_file_for_batches_is_no_document(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE)
        lines = await ask.file(ONE, '{"custom_id": "1"}\n', purpose="batch")
        status, answer = await ask(ONE, f"{STORES}/{store}/files", {"file_id": lines})
        assert status == 400 and "purpose" in answer["error"]["message"]
        document = await ask.file(ONE, "text", purpose="user_data")
        assert (await ask(ONE, f"{STORES}/{store}/files", {"file_id": document}))[0] == 200
        status, _ = await ask(
            ONE,
            "/v1/batches",
            {"input_file_id": document, "endpoint": "/v1/embeddings", "completion_window": "24h"},
        )
        assert status == 400


async def test_an_expired_store_is_shown_and_has_nothing(tmp_path, monkeypatch):
    async with knowing(tmp_path / "k.db") as ask:
        store, [file] = await ask.store(
            ONE, "Cats eat fish.", expires_after={"anchor": "last_active_at", "days": 1}
        )
        now = (await ask(ONE, f"{STORES}/{store}"))[1]["expires_at"]
        for module in "routes", "ingest":
            monkeypatch.setattr(f"chatlm.front.annexes.knowledge.{module}.now_s", lambda: now)
        _, found = await ask(ONE, f"{STORES}/{store}")
        assert found["status"] == "expired"
        for path, body in (
            ("files", {"file_id": file}),
            ("file_batches", {"file_ids": [file]}),
            ("search", {"query": "cats"}),
        ):
            status, answer = await ask(ONE, f"{STORES}/{store}/{path}", body)
            assert (status, answer["error"]["code"]) == (400, "expired")
        ask.ingest.wake.set()
        while (await ask.rows("SELECT COUNT(*) FROM knowledge_passages")) != [(0,)]:
            await asyncio.sleep(0.01)
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["file_counts"]["total"] == 0
        assert (await ask(ONE, f"/v1/files/{file}"))[0] == 200  # the upload stays
        assert (await ask(ONE, f"{STORES}/{store}", method="DELETE"))[0] == 200


async def test_a_search_keeps_a_store_alive(tmp_path, monkeypatch):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE, "Cats eat fish.", expires_after={"days": 1})
        made = (await ask(ONE, f"{STORES}/{store}"))[1]
        monkeypatch.setattr("chatlm.front.annexes.knowledge.routes.now_s", lambda: made["created_at"] + 3600)
        status, found = await ask(ONE, f"{STORES}/{store}/search", {"query": "cats"})
        assert status == 200, found
        after = (await ask(ONE, f"{STORES}/{store}"))[1]
        assert after["expires_at"] == made["expires_at"] + 3600


async def test_a_query_is_not_rewritten_and_says_so(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        store, _ = await ask.store(ONE, "Cats eat fish.")
        path = f"{ask.place.url}{STORES}/{store}/search"
        body = {"query": "cats", "rewrite_query": True, "odd": 1}
        async with ask.place.client.post(path, json=body, headers={"X-Chat-Space": ONE}) as response:
            assert response.headers["X-Ignored-Fields"] == "odd, rewrite_query"
            assert (await response.json())["search_query"] == ["cats"]


async def test_without_a_database_there_are_no_stores():
    async with Place(pool=EmbeddingPool()) as place:
        for method, path, body in (
            ("get", STORES, None),
            ("post", STORES, {}),
            ("get", f"{STORES}/vs_1", None),
            ("post", f"{STORES}/vs_1/search", {"query": "x"}),
            ("delete", f"{STORES}/vs_1", None),
        ):
            async with place.client.request(method, place.url + path, json=body) as response:
                assert response.status == 404 and (await response.json())["error"]["code"] == "no_database"


async def test_without_an_embedder_none_is_made(tmp_path):
    async with knowing(tmp_path / "k.db", pool=FakePool()) as ask:
        status, answer = await ask(ONE, STORES, {"name": "zoo"})
        assert (status, answer["error"]["code"]) == (409, "no_embedder") and "--embedder" in answer["error"][
            "message"
        ]
        status, answer = await ask(ONE, STORES, {"embedding_model": "fake-model"})
        assert (status, answer["error"]["code"]) == (409, "no_embedder")


async def test_a_store_names_its_embedder(tmp_path):
    async with knowing(tmp_path / "k.db") as ask:
        status, answer = await ask(ONE, STORES, {"embedding_model": "text-embedding-nobody"})
        assert status == 404, answer
        store, _ = await ask.store(ONE, "Cats", embedding_model="fake-model")
        assert (await ask(ONE, f"{STORES}/{store}"))[1]["embedding_model"] == "fake-model"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("purpose", ["assistants", "user_data", "batch"])
async def test_a_form_may_name_its_purpose_behind_its_file(tmp_path, purpose, is_first):
    content = b'{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}\n' * 1
    async with knowing(tmp_path / "k.db") as ask:
        form = aiohttp.FormData()
        if is_first:
            form.add_field("purpose", purpose)
        form.add_field("file", content, filename="a.jsonl")
        if not is_first:
            form.add_field("purpose", purpose)
        async with ask.place.client.post(f"{ask.place.url}/v1/files", data=form) as response:
            file = await response.json()
            assert response.status == 200, file
        assert (file["purpose"], file["bytes"]) == (purpose, len(content))
        assert (file["expires_at"] is None) == (purpose != "batch")
        async with ask.place.client.get(f"{ask.place.url}/v1/files/{file['id']}/content") as response:
            assert await response.read() == content
        _, listed = await ask("", f"/v1/files?purpose={purpose}")
        assert [one["id"] for one in listed["data"]] == [file["id"]]
        [(there,)] = await ask.rows("SELECT COUNT(*) FROM files WHERE state = 1")
        assert there == 1


async def test_a_document_is_kept_byte_for_byte(tmp_path):
    content = bytes(range(256)) * 12_000 + b"\n\n\n"
    async with knowing(tmp_path / "k.db") as ask:
        file = await ask.file(ONE, content, "x.bin")
        async with ask.place.client.get(
            f"{ask.place.url}/v1/files/{file}/content", headers={"X-Chat-Space": ONE}
        ) as response:
            assert await response.read() == content


@pytest.mark.parametrize("purpose", ["", "fine-tune", None])
async def test_other_purposes_are_refused(tmp_path, purpose):
    async with knowing(tmp_path / "k.db") as ask:
        form = aiohttp.FormData({} if purpose is None else {"purpose": purpose})
        form.add_field("file", b"text", filename="a.txt")
        async with ask.place.client.post(f"{ask.place.url}/v1/files", data=form) as response:
            answer = await response.json()
            assert response.status == 400 and "assistants" in answer["error"]["message"]


async def test_documents_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.front.annexes.batches.file_routes.LIMITS", replace(LIMITS, document_bytes=1000))
    async with knowing(tmp_path / "k.db") as ask:
        for fields in ({"purpose": "assistants"}, {}):
            form = aiohttp.FormData(fields)
            form.add_field("file", b"x" * 1001, filename="a.txt")
            form.add_field("purpose" if not fields else "other", "assistants")
            async with ask.place.client.post(f"{ask.place.url}/v1/files", data=form) as response:
                assert response.status == 413


async def test_a_question_is_urgent_and_a_document_is_not(tmp_path):
    """Its vector is computed beside answers, as if it were one; ingestion waits for all else."""
    pool = EmbeddingPool()
    async with knowing(tmp_path / "k.db", pool=pool) as ask:
        store, _ = await ask.store(ONE, "The cat sleeps.")
        await ask(ONE, f"{STORES}/{store}/search", {"query": "cat"})
        asked = [(request.prompts, request.params.urgent, request.low_priority) for request in pool.requests]
        assert asked == [(("The cat sleeps.",), False, True), (("cat",), True, False)]
