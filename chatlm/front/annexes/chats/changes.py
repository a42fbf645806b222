"""Chats in the store: what changes make of them, and what has changed since a revision.

Each change gets its owner's next revision, so that a device only has to know the last one that it has
seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.front.annexes.chats import pictures
from chatlm.front.annexes.chats.reading import ReadChange
from chatlm.front.annexes.chats.record_fields import (
    FIELD_BYTES, NULL, Fields, StoredTexts, bytes_of, text_of, write_fields, write_words)
from chatlm.front.annexes.chats.records import (
    ANSWER_TEXTS, CHAT, NEEDED, NODE, PROJECT, PROMPT, RECORD_BYTES, Change, goes_as_far, is_late,
    is_same_end, joined_end, missing_in, moved_in, sibling_of)
from chatlm.front.store import quota
from chatlm.front.store.pages import PAGE_BYTES

if TYPE_CHECKING:
    import sqlite3
    from chatlm.front.store.store import Parts


MOST_CHATS = 10_000  # of an owner
MOST_NODES = 10_000  # of a chat
MOST_OTHERS = 1_000  # of an owner
MOST = {CHAT: MOST_CHATS, NODE: MOST_NODES, PROJECT: MOST_OTHERS, PROMPT: MOST_OTHERS}
TOLD_S = 180 * 86_400  # for how long a deletion is told of
MOST_TOLD = 100_000    # deletions of an owner that are told of; the last ones
UNKNOWN_S = 86_400     # for how long what was never here stays deleted
MOST_UNKNOWN = 1_000   # of an owner
MOST_COPIED = 16 << 20  # bytes of messages of which a body's edits make siblings
ROW_BYTES = 256        # that a record takes besides its fields
PAGE_ROWS = 500        # of changes
PURGED_ROWS = 100
GONE, UNKNOWN = 1, 2   # values of `deleted`
# What is there of a chat that is deleted still has to go; nobody sees it
OF_DELETED = ("EXISTS (SELECT 1 FROM chat_records AS chats WHERE chats.owner = found.owner "
              "AND chats.kind = 'chat' AND chats.name = found.chat AND chats.deleted > 0)")


class Record(NamedTuple):
    """A row of `chat_records`."""

    number: int
    chat: str
    rev: int
    said: int
    deleted: int
    bytes: int
    texts: StoredTexts

    @property
    def fields(self) -> Fields:
        return Fields(self.texts)


class Outcome(NamedTuple):
    """What became of a change."""

    id: str
    state: str         # stored, sibling, deleted or refused
    rev: int = 0
    told: int = 0      # the number of the record, if it is not what the device has now
    error: str = ""
    param: str = ""
    sibling: str = ""  # the id of the node that keeps an edit


def revisions(connection: sqlite3.Connection, owner: str) -> tuple[int, int]:
    """(an owner's last revision, that of the last deletion which nobody is told of any more)."""
    row = connection.execute("SELECT rev, forgotten FROM chat_revisions WHERE owner = ?", (owner,)).fetchone()
    return row or (0, 0)


class Changing:
    """Changes of one owner, in a transaction. client: who asks for them; None: the server itself, which is
    not refused for want of room."""

    def __init__(self, connection: sqlite3.Connection, owner: str, now_s: int, client: str | None = None):
        self.connection = connection
        self.owner = owner
        self.now_s = now_s
        self.client = client
        self.counts: dict[tuple[str, str], int] = {}  # of records, by their kind and chat
        self.copied_bytes = 0

    def found(self, kind: str, name: str) -> Record | None:
        row = self.connection.execute(
            "SELECT number, chat, rev, said, deleted, bytes FROM chat_records WHERE owner = ? AND kind = ? "
            "AND name = ?", (self.owner, kind, name)).fetchone()
        if row is None:
            return None
        number, chat, rev, said, deleted, size = row
        return Record(number, chat, rev, said, deleted, size, StoredTexts(self.connection, number))

    def next_revision(self) -> int:
        self.connection.execute("INSERT INTO chat_revisions (owner, rev) VALUES (?, 1) "
                                "ON CONFLICT (owner) DO UPDATE SET rev = rev + 1", (self.owner,))
        return revisions(self.connection, self.owner)[0]

    def check_room(self, added_bytes: int):
        """Raises RequestError if the owner may not keep so many more bytes."""
        if self.client is not None and added_bytes > 0:
            quota.check(self.connection, self.owner, added_bytes, client=self.client)

    def make(self, read: ReadChange) -> Parts[Outcome]:
        """Do a change that was read. Asked again, it does nothing more."""
        if read.problem:
            return Outcome(read.change.id, "refused", error=read.problem, param=read.param)
        change = read.change
        record = self.found(change.kind, change.id)
        try:
            if record and record.deleted:
                return Outcome(change.id, "deleted", record.rev)
            if change.patch is None:
                return (yield from self.delete(change, record))
            return self.update(change, record) if record else self.create(change)
        except RequestError as error:
            outcome = Outcome(change.id, "refused", error=str(error), param=error.param or "")
            return outcome._replace(rev=record.rev, told=record.number) if record else outcome

    # new records

    def create(self, change: Change) -> Outcome:
        patch = change.patch
        assert patch is not None
        texts = {name: text for name, text in patch.texts.items() if text != NULL}
        if missing := missing_in(change.kind, texts):
            raise RequestError(f"there is no {change.kind} {shown(change.id)}, and a new one needs {missing}",
                               code="missing_required_parameter", param=missing)
        chat = self.chat_of(patch) if change.kind == NODE else ""
        if chat is None:
            return Outcome(change.id, "deleted")
        self.check_count(change.kind, chat)
        size = checked_size(bytes_of(texts))
        self.check_room(ROW_BYTES + size + sum(map(len, change.words)))
        if "pictures" in texts:
            pictures.check_shown(self.connection, self.owner, patch["pictures"])
        rev = self.next_revision()
        number = self.connection.execute(
            "INSERT INTO chat_records (owner, kind, name, chat, parent, rev, said, updated, changed) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.owner, change.kind, change.id, chat, patch.get("parent") or "", rev, rev,
             updated_ms(patch), self.now_s)).lastrowid or 0
        self.counts[change.kind, chat] += 1
        self.write(change, number, chat, texts, size)
        return Outcome(change.id, "stored", rev)

    def chat_of(self, patch: Mapping) -> str | None:
        """The chat of a new node; None if that is deleted, or what the node follows. Raises RequestError if
        there is no such chat, or nothing that it follows."""
        name = patch["conversation"]
        chat = self.found(CHAT, name)
        if chat is None:
            raise RequestError(f"there is no chat {shown(name)}", code="not_found", param="conversation")
        if chat.deleted:
            return None
        above = patch.get("parent")
        if above is None:
            return name
        parent = self.found(NODE, above)
        if parent and parent.deleted:
            return None
        if parent is None or parent.chat != name:
            raise RequestError(f"there is no node {shown(above)} in this chat", code="not_found",
                               param="parent")
        return name

    def check_count(self, kind: str, chat: str):
        """Raises RequestError if there are as many as there may be."""
        if (kind, chat) not in self.counts:
            (self.counts[kind, chat],) = self.connection.execute(
                "SELECT COUNT(*) FROM chat_records WHERE owner = ? AND kind = ? AND chat = ? AND deleted = 0",
                (self.owner, kind, chat)).fetchone()
        if self.counts[kind, chat] >= MOST[kind]:
            where = "a chat" if kind == NODE else "an owner"
            raise RequestError(f"{where} may have {MOST[kind]:,} {kind}s", code="too_many")

    # records that are there

    def update(self, change: Change, record: Record) -> Outcome:
        body = record.fields
        patch = change.patch
        assert patch is not None
        texts = patch.texts
        if change.kind == NODE:
            if moved := moved_in(body, patch):
                raise RequestError(f"a node keeps its {moved}", param=moved)
            if is_late(body, patch):
                return Outcome(change.id, "stored", record.rev, record.number)
            growing = "stream" in body
            if is_same_end(body, patch):
                if goes_as_far(body, patch):
                    texts = joined_end(body, patch)
                there = {name: record.texts[name] for name in ANSWER_TEXTS if name in record.texts}
                growing = goes_as_far(Fields({**there, **texts}), body)
            edited = "content" in texts and texts["content"] != body.texts["content"]
            if edited and change.base < record.said and not growing:
                return self.keep_beside(change, record)
        written = {name: text for name, text in texts.items() if text != body.texts.get(name, NULL)}
        if missing := next((name for name in NEEDED[change.kind] if written.get(name) == NULL), ""):
            raise RequestError(f"a {change.kind} keeps its {missing}", param=missing)
        told = 0 if change.base >= record.rev else record.number
        if not written:
            return Outcome(change.id, "stored", record.rev, told)
        rev = self.rewrite(change, record, written)
        return Outcome(change.id, "stored", rev, told)

    def rewrite(self, change: Change, record: Record, written: Mapping[str, str]) -> int:
        """Give a record these fields; its revision then."""
        gone = sum(record.texts.sizes[name] + FIELD_BYTES for name in written if name in record.texts)
        there = {name: text for name, text in written.items() if text != NULL}
        size = checked_size(record.bytes - gone + bytes_of(there))
        self.check_room(size - record.bytes)
        if "pictures" in there:
            pictures.check_shown(self.connection, self.owner, Fields(there)["pictures"])
        rev = self.next_revision()
        self.connection.execute("UPDATE chat_records SET rev = ?, changed = ? WHERE number = ?",
                                (rev, self.now_s, record.number))
        if "content" in written:
            self.connection.execute("UPDATE chat_records SET said = ? WHERE number = ?", (rev, record.number))
        if "updated" in there:
            self.connection.execute("UPDATE chat_records SET updated = ? WHERE number = ?",
                                    (Fields(there)["updated"], record.number))
        self.write(change, record.number, record.chat, written, size)
        return rev

    def write(self, change: Change, number: int, chat: str, texts: Mapping[str, str], size: int):
        """Write fields of a record, which has so many bytes then, and what is found by them."""
        write_fields(self.connection, number, texts)
        self.connection.execute("UPDATE chat_records SET bytes = ? WHERE number = ?", (size, number))
        if "title" in texts or "content" in texts:
            words = write_words(self.connection, number, self.owner,
                                change.id if change.kind == CHAT else chat, change.words)
            self.connection.execute("UPDATE chat_records SET words = ? WHERE number = ?", (words, number))
        if "pictures" in texts:
            pictures.note_shown(self.connection, self.owner, number, Fields(texts)["pictures"] or ())

    def keep_beside(self, change: Change, record: Record) -> Outcome:
        """Two devices have edited a node, and neither knew of the other: keep the later edit as its
        sibling. Raises RequestError if a body makes too many large ones."""
        patch = change.patch
        assert patch is not None
        name = sibling_of(change, patch["content"])
        if self.found(NODE, name) is None:
            self.copied_bytes += record.bytes
            if self.copied_bytes > MOST_COPIED:
                raise RequestError(f"edits of one body may copy {MOST_COPIED:,} bytes of messages that other "
                                   "devices have edited too: send the rest again", code="too_large")
            texts = {**record.texts, **patch.texts, "stream": NULL, "ended": NULL, "response": NULL}
            outcome = self.create(Change(NODE, name, 0, Fields(texts), change.words))
            if outcome.state != "stored":
                return outcome
        return Outcome(change.id, "sibling", record.rev, record.number, sibling=name)

    # deletions

    def delete(self, change: Change, record: Record | None) -> Parts[Outcome]:
        """Of a chat all nodes go, of a node all that follow it."""
        if record is None:
            return self.note_unknown(change)
        if change.kind == CHAT:
            self.connection.execute("UPDATE chat_records SET nodes_left = 1 WHERE number = ?",
                                    (record.number,))
        if change.kind == NODE:  # the last ones first: what is there of a chat is always a tree
            while below := (yield from self.numbers_below(record.chat, change.id)):
                for number in reversed(below):
                    self.bury(number)
                    yield
        return Outcome(change.id, "deleted", self.bury(record.number))

    def note_unknown(self, change: Change) -> Outcome:
        """Delete what never was here: a device that made it may still send it. That of a node is not noted:
        its chat is gone, or what it follows."""
        self.connection.execute(
            f"DELETE FROM chat_records WHERE owner = ? AND deleted = {UNKNOWN} AND changed < ?",
            (self.owner, self.now_s - UNKNOWN_S))
        (count,) = self.connection.execute(
            f"SELECT COUNT(*) FROM chat_records WHERE owner = ? AND deleted = {UNKNOWN}",
            (self.owner,)).fetchone()
        if change.kind == NODE or count >= MOST_UNKNOWN:
            return Outcome(change.id, "deleted")
        self.check_room(ROW_BYTES)
        rev = self.next_revision()
        self.connection.execute(
            "INSERT INTO chat_records (owner, kind, name, rev, said, changed, deleted) VALUES "
            "(?, ?, ?, ?, ?, ?, ?)", (self.owner, change.kind, change.id, rev, rev, self.now_s, UNKNOWN))
        return Outcome(change.id, "deleted", rev)

    def bury(self, number: int) -> int:
        """Leave nothing of a record but that it is deleted; its revision then."""
        rev = self.next_revision()
        for table in "chat_fields", "chat_words", "chat_shown":
            self.connection.execute(f"DELETE FROM {table} WHERE record = ?", (number,))
        self.connection.execute(
            "UPDATE chat_records SET rev = ?, deleted = ?, bytes = 0, words = 0, changed = ? "
            "WHERE number = ?", (rev, GONE, self.now_s, number))
        return rev

    def numbers_below(self, chat: str, name: str) -> Parts[list[int]]:
        """The nodes that follow one, those nearest to it first."""
        found = list[int]()
        names = [name]
        for above in names:
            for number, below in self.connection.execute(
                    "SELECT number, name FROM chat_records WHERE owner = ? AND chat = ? AND parent = ? "
                    "AND deleted = 0", (self.owner, chat, above)).fetchall():
                found.append(number)
                names.append(below)
            yield
        return found


def updated_ms(fields: Mapping) -> float:
    return fields.get("updated") or fields["created"]


def checked_size(size: int) -> int:
    """The bytes of a record. Raises RequestError if there are too many."""
    if size > RECORD_BYTES:
        raise RequestError(f"a record may have {RECORD_BYTES:,} bytes", code="too_large", param="patch")
    return size


# what is told of

class Told(NamedTuple):
    """A record that a device is told of."""

    kind: str
    id: str
    rev: int
    number: int
    bytes: int  # 0: it is deleted


class ToldPage(NamedTuple):
    """What has changed after a revision; rev: up to which this page goes."""

    rev: int
    rows: Seq[Told]
    more: bool

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)


TOLD = "SELECT kind, name, rev, number, bytes FROM chat_records"


def changed_after(connection: sqlite3.Connection, owner: str, after: int) -> ToldPage:
    """The next changes of an owner. Raises RequestError 410 if deletions since are not known any more."""
    last, forgotten = revisions(connection, owner)
    if after > last or 0 < after < forgotten:
        raise RequestError("what has changed since this revision is not known any more: list all chats anew "
                           "(after=0), and drop those that were synchronized and are not listed",
                           status=410, code="revision_gone", param="after")
    hidden = "" if after else " AND deleted = 0"  # a new device need not know what was deleted
    rows = connection.execute(f"{TOLD} AS found WHERE owner = ? AND rev > ? AND NOT {OF_DELETED}{hidden} "
                              "ORDER BY rev LIMIT ?", (owner, after, PAGE_ROWS + 1)).fetchall()
    page = some_of(map(Told._make, rows[:PAGE_ROWS]))
    return ToldPage(page[-1].rev if page else after, page, len(page) < len(rows))


def some_of(rows: Iterable[Told]) -> list[Told]:
    """The first rows, until they have PAGE_BYTES."""
    found = list[Told]()
    size = 0
    for row in rows:
        if found and size + row.bytes > PAGE_BYTES:
            break
        found.append(row)
        size += row.bytes
    return found


def told_of(connection: sqlite3.Connection, outcomes: Seq[Outcome]) -> list[Told]:
    """The records that go with outcomes, each once, as far as an answer may have them."""
    numbers = {outcome.told: None for outcome in outcomes if outcome.told}
    rows = (connection.execute(f"{TOLD} WHERE number = ? AND deleted = 0", (number,)).fetchone()
            for number in numbers)
    return some_of(Told._make(row) for row in rows if row)


def texts_of(connection: sqlite3.Connection, rows: Iterable[Told]) -> Parts[list[tuple[Told, bytes]]]:
    """The rows as they are now, with their records as JSON; b"" for one that is deleted."""
    found = list[tuple[Told, bytes]]()
    for row in rows:
        now = connection.execute("SELECT rev, deleted FROM chat_records WHERE number = ?",
                                 (row.number,)).fetchone() or (row.rev, GONE)
        text = b"" if now[1] else text_of(connection, row.number).encode()
        found.append((row._replace(rev=now[0]), text))
        yield
    return found


class Changed(NamedTuple):
    """What became of the changes of a body. rev: the owner's last revision then."""

    rev: int
    outcomes: Seq[Outcome]
    told: Seq[Told]


def change_all(connection: sqlite3.Connection, owner: str, client: str, read: Seq[ReadChange],
               now_s: int) -> Parts[Changed]:
    """Do all changes of a body."""
    changing = Changing(connection, owner, now_s, client)
    outcomes = list[Outcome]()
    for change in read:
        outcomes.append((yield from changing.make(change)))
        yield
    rev, _ = revisions(connection, owner)
    return Changed(rev, outcomes, told_of(connection, outcomes))


# what has gone

def expire(connection: sqlite3.Connection, before_s: int, now_s: int) -> Parts[set[str]]:
    """Delete the chats in which nothing has changed since then; those with newer messages are dated anew.
    The owners of deleted chats."""
    owners = set[str]()
    while row := connection.execute(
            "SELECT number, owner, name FROM chat_records WHERE kind = 'chat' AND deleted = 0 "
            "AND changed < ? LIMIT 1", (before_s,)).fetchone():
        number, owner, name = row
        [last] = connection.execute("SELECT MAX(changed) FROM chat_records WHERE owner = ? AND chat = ?",
                                    (owner, name)).fetchone()
        if last is not None and last >= before_s:
            connection.execute("UPDATE chat_records SET changed = ? WHERE number = ?", (last, number))
        else:
            changing = Changing(connection, owner, now_s)
            yield from changing.delete(Change(CHAT, name, 0, None), changing.found(CHAT, name))
            owners.add(owner)
        yield
    return owners


def purge(connection: sqlite3.Connection, now_s: int) -> Parts[None]:
    """Remove the nodes of deleted chats, and deletions that nobody is told of any more."""
    while chat := connection.execute(
            "SELECT number, owner, name FROM chat_records WHERE nodes_left = 1 LIMIT 1").fetchone():
        for row in connection.execute("SELECT number FROM chat_records WHERE owner = ? AND chat = ? LIMIT ?",
                                      (*chat[1:], PURGED_ROWS)).fetchall():
            connection.execute("DELETE FROM chat_words WHERE record = ?", row)
            yield
            connection.execute("DELETE FROM chat_records WHERE number = ?", row)
            yield
        if not connection.execute("SELECT 1 FROM chat_records WHERE owner = ? AND chat = ? LIMIT 1",
                                  chat[1:]).fetchone():
            connection.execute("UPDATE chat_records SET nodes_left = 0 WHERE number = ?", chat[:1])
    while old := connection.execute(
            f"SELECT number, owner, rev FROM chat_records WHERE deleted = {GONE} AND changed < ? LIMIT ?",
            (now_s - TOLD_S, PURGED_ROWS)).fetchall():
        forget_deletions(connection, old)
        yield


def forget_deletions(connection: sqlite3.Connection, rows: Iterable[tuple[int, str, int]]):
    """Tell of these deletions no more. rows: (number, owner, revision) of each."""
    for number, owner, rev in rows:
        connection.execute("DELETE FROM chat_records WHERE number = ?", (number,))
        connection.execute("UPDATE chat_revisions SET forgotten = MAX(forgotten, ?) WHERE owner = ?",
                           (rev, owner))


def forget_most(connection: sqlite3.Connection, owner: str) -> Parts[None]:
    """Of very many deletions of an owner only the last are told of."""
    while row := connection.execute(
            f"SELECT rev FROM chat_records WHERE owner = ? AND deleted = {GONE} ORDER BY rev DESC "
            "LIMIT 1 OFFSET ?", (owner, MOST_TOLD)).fetchone():
        forget_deletions(connection, connection.execute(
            f"SELECT number, owner, rev FROM chat_records WHERE owner = ? AND deleted = {GONE} AND rev <= ? "
            "ORDER BY rev LIMIT ?", (owner, *row, PURGED_ROWS)).fetchall())
        yield
