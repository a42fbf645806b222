"""Devices of an owner whose chats a server keeps, and the records that they send."""

from contextlib import asynccontextmanager

from chatlm.front.annexes import ANNEXES
from left_texts import asked_over

SPACE, OTHER = "A" * 22, "B" * 22


def started(path, *keys):
    headers = (lambda key: {"Authorization": f"Bearer {key}"}) if keys else (
        lambda space: {"X-Chat-Space": space} if space else {})
    return asked_over(path, headers, *keys, annexes=ANNEXES)


def an_id(number):
    return f"{number:032x}"


def chat(number, title="", **more):
    return {"kind": "chat", "id": an_id(number), "patch": {"created": 1.0, "updated": 1.0, "title": title, **more}}


def node(number, chat, content, parent=None, role="user", **more):
    place = {"parent": an_id(parent)} if parent is not None else {}
    return {"kind": "node", "id": an_id(number), "patch": {
        "created": 2.0, "conversation": an_id(chat), "role": role, "content": content, **place, **more}}


PROJECT = {"created": 1, "name": "Boats", "prompt": "Be brief.", "files": [{"name": "a.txt", "text": "Water"}],
           "stores": [{"id": "vs_1", "name": "Ships"}]}


class Device:
    """A device of an owner, as a page is one: it has records, and changes that it has not sent yet."""

    def __init__(self, ask, who):
        self.ask, self.who = ask, who
        self.rev = 0
        self.records = {}

    async def send(self, *made, status=200):
        found, answer = await self.ask(self.who, "/v1/chats/changes", {"changes": list(made)})
        assert found == status, answer
        return answer["data"] if status == 200 else answer["error"]

    async def news(self, wait=0):
        """Read what has changed; returns its rows."""
        rows = []
        more = True
        while more:
            status, page = await self.ask(self.who, f"/v1/chats/changes?after={self.rev}&wait={wait}")
            assert status == 200, page
            rows += page["data"]
            self.rev, more = page["rev"], page["has_more"]
        for row in rows:
            self.records[row["kind"], row["id"]] = row["record"] and (row["rev"], row["record"])
        return rows

    @property
    def seen(self):
        """What a reader sees: without what is deleted, and without nodes of chats that are."""
        there = {key: found[1] for key, found in self.records.items() if found}
        return {key: record for key, record in there.items()
                if key[0] != "node" or ("chat", record["conversation"]) in there}


@asynccontextmanager
async def devices(path, count=2):
    async with started(path / "store.db") as ask:
        yield [Device(ask, SPACE) for _ in range(count)]
