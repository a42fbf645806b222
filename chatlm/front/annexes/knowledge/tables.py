"""The tables of knowledge: vector stores, the files in them, and what of these is searched.

A file of a store is searched by its passages: texts of one heading, a few hundred tokens long. A passage has
one or several windows, each short enough for the embedder, with a vector. The words of a store's passages are
in an FTS5 table of that store alone, so that texts of others never change a score, and DROP deletes them all.
Where SQLite has no FTS5, no store has such a table.

What is deleted gets `deleted = 1` and is seen by nobody from then on; `purge` removes its texts in pieces.
Numbers are never used again (AUTOINCREMENT): whoever has read windows up to a number finds later ones above
it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.front.store.gone import noting
from chatlm.front.store.schema import Step, counted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence as Seq


STORES = """
CREATE TABLE knowledge_stores (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,        -- vs_...
    owner TEXT NOT NULL,            -- see Owners.of_texts
    client TEXT NOT NULL,           -- who made it: the name of a key, or an address
    name TEXT NOT NULL DEFAULT '',
    description TEXT NOT NULL DEFAULT '',
    metadata TEXT NOT NULL DEFAULT '{}',  -- JSON
    created INTEGER NOT NULL,
    last_active INTEGER NOT NULL,
    expires_days INTEGER,           -- after last_active
    expires INTEGER,                -- when that is
    expired INTEGER NOT NULL DEFAULT 0,   -- 1: it is shown, but none of its files is searched
    deleted INTEGER NOT NULL DEFAULT 0,
    model TEXT NOT NULL DEFAULT '', -- embedding_model, as its client has named it; '': the usual one
    embedder INTEGER,               -- number of the embedder whose windows are searched; NULL: words only
    chunking TEXT NOT NULL,         -- JSON: {"type": "auto"} or {"type": "static", "static": {...}}
    old_windows INTEGER NOT NULL DEFAULT 0,   -- 1: those of an earlier embedder still have to go
    has_words INTEGER NOT NULL DEFAULT 0,     -- 1: its table knowledge_words_NUMBER is there
    stale_words INTEGER NOT NULL DEFAULT 0,   -- 1: words of deleted texts are still in that, 2: they are
                                              -- being merged out of it, and no more have come
    in_progress INTEGER NOT NULL DEFAULT 0,   -- files by their status
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    windows INTEGER NOT NULL DEFAULT 0,       -- of its files
    bytes INTEGER NOT NULL DEFAULT 0,         -- their usage_bytes
    held INTEGER NOT NULL DEFAULT 0           -- bytes and 512 and what else a row of each file takes
);
CREATE INDEX knowledge_stores_of_owner ON knowledge_stores (owner, deleted, number);
CREATE INDEX knowledge_stores_by_state ON knowledge_stores (deleted, expired, expires);
CREATE INDEX knowledge_stores_waiting ON knowledge_stores (in_progress)
    WHERE in_progress > 0 AND deleted = 0 AND expired = 0;
CREATE INDEX knowledge_stores_old ON knowledge_stores (old_windows) WHERE old_windows > 0;
CREATE INDEX knowledge_stores_stale ON knowledge_stores (stale_words) WHERE stale_words > 0;
CREATE TABLE knowledge_embedders (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,    -- of its weights
    name TEXT NOT NULL,             -- its model as /v1/models called it last
    dimensions INTEGER NOT NULL
);
CREATE TABLE knowledge_files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    store INTEGER NOT NULL REFERENCES knowledge_stores (number),
    file TEXT NOT NULL,             -- file-..., see the table files
    filename TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'in_progress',  -- or completed, failed, cancelled
    error_code TEXT,                -- server_error, unsupported_file, invalid_file
    error_message TEXT,
    note TEXT,                      -- what of the document its text lacks
    attributes TEXT NOT NULL DEFAULT '{}',  -- JSON: texts, numbers, booleans
    chunking TEXT NOT NULL,         -- JSON
    created INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,  -- of reading it, during which the server has ended
    bytes INTEGER NOT NULL DEFAULT 0,  -- usage_bytes: of its texts, and of their vectors
    passages INTEGER NOT NULL DEFAULT 0,
    windows INTEGER NOT NULL DEFAULT 0,
    characters INTEGER NOT NULL DEFAULT 0,  -- of its text, from which passages were cut
    tokens INTEGER NOT NULL DEFAULT 0,      -- of its passages, as the embedder counts
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX knowledge_files_of_store ON knowledge_files (store, file) WHERE deleted = 0;
CREATE INDEX knowledge_files_in_order ON knowledge_files (store, deleted, number);
CREATE INDEX knowledge_files_by_file ON knowledge_files (file);
CREATE INDEX knowledge_files_by_status ON knowledge_files (store, status, number) WHERE deleted = 0;
CREATE INDEX knowledge_files_deleted ON knowledge_files (deleted) WHERE deleted = 1;
CREATE TABLE knowledge_batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,        -- vsfb_...
    store INTEGER NOT NULL REFERENCES knowledge_stores (number),
    created INTEGER NOT NULL,
    cancelled INTEGER NOT NULL DEFAULT 0  -- 1: its client has cancelled it
);
CREATE INDEX knowledge_batches_of_store ON knowledge_batches (store);
CREATE TABLE knowledge_batch_files (
    batch INTEGER NOT NULL REFERENCES knowledge_batches (number),
    file INTEGER NOT NULL REFERENCES knowledge_files (number),
    PRIMARY KEY (batch, file)
) WITHOUT ROWID;
CREATE INDEX knowledge_batches_of_file ON knowledge_batch_files (file);
CREATE TABLE knowledge_passages (   -- of files, in order; of deleted ones until a purge
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    store INTEGER NOT NULL,         -- that of its file
    file INTEGER NOT NULL REFERENCES knowledge_files (number),
    place INTEGER NOT NULL,         -- 0, 1, ... within its file
    heading TEXT NOT NULL,          -- those above it, joined by ' > '; '' if there are none
    start INTEGER NOT NULL,         -- its first character within the text of the file
    page INTEGER,                   -- of a PDF, from 1
    tokens INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX knowledge_passages_of_file ON knowledge_passages (file, place);
CREATE TABLE knowledge_windows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    store INTEGER NOT NULL,
    file INTEGER NOT NULL REFERENCES knowledge_files (number),
    passage INTEGER NOT NULL REFERENCES knowledge_passages (number),
    embedder INTEGER NOT NULL REFERENCES knowledge_embedders (number),
    vector BLOB NOT NULL,           -- int8: times scale, a vector of length 1
    scale REAL NOT NULL
);
CREATE INDEX knowledge_windows_of_store ON knowledge_windows (store, embedder);
CREATE INDEX knowledge_windows_of_file ON knowledge_windows (file);
CREATE INDEX knowledge_windows_of_passage ON knowledge_windows (passage);
"""
# What the files of a store are together, kept by triggers. {row}: OLD or NEW, which counts unless it is
# deleted
SUMS = {
    **{status: f"({{row}}.status = '{status}')" for status in ("in_progress", "completed", "failed",
                                                              "cancelled")},
    "windows": "{row}.windows",
    "bytes": "{row}.bytes",
    "held": "({row}.bytes + 512 + LENGTH(CAST({row}.attributes AS BLOB)) "
            "+ LENGTH(CAST({row}.filename AS BLOB)))",
}


def sums(new: str, old: str) -> str:
    """The statement that counts a change of a file for its store. new, old: its rows, '' if there is none."""
    changes = []
    for column, value in SUMS.items():
        change = column
        if new:
            change += f" + ({new}.deleted = 0) * {value.format(row=new)}"
        if old:
            change += f" - ({old}.deleted = 0) * {value.format(row=old)}"
        changes.append(f"{column} = {change}")
    return f"UPDATE knowledge_stores SET {', '.join(changes)} WHERE number = {new or old}.store;"


TRIGGERS = f"""
CREATE TRIGGER knowledge_files_added AFTER INSERT ON knowledge_files BEGIN {sums("NEW", "")} END;
CREATE TRIGGER knowledge_files_changed AFTER UPDATE ON knowledge_files BEGIN {sums("NEW", "OLD")} END;
CREATE TRIGGER knowledge_files_removed AFTER DELETE ON knowledge_files BEGIN {sums("", "OLD")} END;
CREATE TRIGGER knowledge_file_gone AFTER UPDATE OF state ON files WHEN NEW.state = 2 BEGIN
    UPDATE knowledge_files SET deleted = 1 WHERE file = NEW.name AND deleted = 0;
END;
"""
HELD = ("(1 - {row}.deleted) * ({row}.held + 512 + LENGTH(CAST({row}.metadata AS BLOB)) "
        "+ LENGTH(CAST({row}.name AS BLOB)) + LENGTH(CAST({row}.description AS BLOB)))")
# Folders that the server follows (--knowledge), and what was found in them
FOLDERS = """
CREATE TABLE knowledge_folders (
    store INTEGER PRIMARY KEY REFERENCES knowledge_stores (number),
    name TEXT NOT NULL UNIQUE,
    active INTEGER NOT NULL DEFAULT 0,   -- 1: the server that runs follows it, so all clients see the store
    problem TEXT NOT NULL DEFAULT ''     -- why it cannot be followed at the moment
);
CREATE INDEX knowledge_folders_active ON knowledge_folders (active) WHERE active = 1;
CREATE TABLE knowledge_folder_files (
    store INTEGER NOT NULL REFERENCES knowledge_folders (store),
    path TEXT NOT NULL,             -- within the folder
    stamp TEXT NOT NULL,            -- size, times, place on the disk: if these are the same, so is the file
    digest TEXT NOT NULL,           -- of its content; or why it is not read
    file TEXT NOT NULL,             -- its file-... in the store
    PRIMARY KEY (store, path)
) WITHOUT ROWID;
"""
# What all stores have together, kept by triggers, for /metrics
TOTALS = ("in_progress", "completed", "failed", "cancelled", "bytes")
ALL = f"""
CREATE TABLE knowledge_totals (number INTEGER PRIMARY KEY, {", ".join(f"{name} INTEGER" for name in TOTALS)});
INSERT INTO knowledge_totals SELECT 1, {", ".join(f"IFNULL(SUM({name}), 0)" for name in TOTALS)}
    FROM knowledge_stores WHERE deleted = 0;
CREATE TRIGGER knowledge_totals_changed AFTER UPDATE ON knowledge_stores BEGIN
    UPDATE knowledge_totals SET {", ".join(
        f"{name} = {name} + (NEW.deleted = 0) * NEW.{name} - (OLD.deleted = 0) * OLD.{name}"
        for name in TOTALS)}
    WHERE number = 1;
END;
CREATE TRIGGER knowledge_totals_removed AFTER DELETE ON knowledge_stores BEGIN
    UPDATE knowledge_totals SET {", ".join(
        f"{name} = {name} - (OLD.deleted = 0) * OLD.{name}" for name in TOTALS)} WHERE number = 1;
END;
"""
# Files that have failed for want of an embedder, and are read once it is there
HOMELESS = """
ALTER TABLE knowledge_files ADD COLUMN lacks_embedder INTEGER NOT NULL DEFAULT 0;
CREATE INDEX knowledge_files_without_embedder ON knowledge_files (lacks_embedder, store)
    WHERE lacks_embedder = 1;
"""
# What a search asks of a store without reading its files: their sums, and whether one of them has changed
COUNTED = "passages", "tokens"


def changes(new: str, old: str) -> str:
    """The statement that counts a change of a file. new, old: its rows, '' if there is none."""
    columns = ["revision = revision + 1"]
    for name in COUNTED:
        added = f" + ({new}.deleted = 0) * {new}.{name}" if new else ""
        taken = f" - ({old}.deleted = 0) * {old}.{name}" if old else ""
        columns.append(f"{name} = {name}{added}{taken}")
    return f"UPDATE knowledge_stores SET {', '.join(columns)} WHERE number = {new or old}.store;"


SEARCHED = f"""
ALTER TABLE knowledge_stores ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE knowledge_stores ADD COLUMN passages INTEGER NOT NULL DEFAULT 0;
ALTER TABLE knowledge_stores ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
UPDATE knowledge_stores SET {", ".join(
    f"{name} = (SELECT IFNULL(SUM({name}), 0) FROM knowledge_files WHERE store = knowledge_stores.number "
    "AND deleted = 0)" for name in COUNTED)};
CREATE TRIGGER knowledge_searched_added AFTER INSERT ON knowledge_files BEGIN {changes("NEW", "")} END;
CREATE TRIGGER knowledge_searched_changed AFTER UPDATE ON knowledge_files BEGIN {changes("NEW", "OLD")} END;
CREATE TRIGGER knowledge_searched_removed AFTER DELETE ON knowledge_files BEGIN {changes("", "OLD")} END;
"""
# A file's parts are written while it is embedded; `revision` changes with what a search sees. Who adds a file
# to a store pays for it, and not who made the store. A batch goes with the last of its files. A passage has a
# token for every 16 characters (passages.TOKEN_CHARACTERS)
WRITTEN = f"""
ALTER TABLE knowledge_files ADD COLUMN written INTEGER NOT NULL DEFAULT 0;  -- passages, while not completed
CREATE INDEX knowledge_files_written ON knowledge_files (store) WHERE written > 0;
CREATE INDEX knowledge_files_left ON knowledge_files (status) WHERE written > 0;
DROP INDEX knowledge_stores_waiting;
ALTER TABLE knowledge_files ADD COLUMN client TEXT NOT NULL DEFAULT '';     -- who has added it
UPDATE knowledge_files SET client = (SELECT client FROM knowledge_stores WHERE number = store);
CREATE INDEX knowledge_files_waiting ON knowledge_files (client, store, number)
    WHERE status = 'in_progress' AND deleted = 0;
DROP INDEX knowledge_files_without_embedder;
CREATE INDEX knowledge_files_without_embedder ON knowledge_files (store, client) WHERE lacks_embedder = 1;
DROP TRIGGER knowledge_searched_changed;
CREATE TRIGGER knowledge_searched_changed
    AFTER UPDATE OF status, attributes, filename, deleted, {", ".join(COUNTED)} ON knowledge_files
BEGIN {changes("NEW", "OLD")} END;
DELETE FROM knowledge_batches
    WHERE NOT EXISTS (SELECT 1 FROM knowledge_batch_files WHERE batch = knowledge_batches.number);
UPDATE knowledge_files SET tokens = characters / 16 WHERE deleted = 0 AND tokens < characters / 16;
{noting("knowledge_stores", "UPDATE OF deleted ON knowledge_stores WHEN NEW.deleted > OLD.deleted",
        "'stores'", "OLD.id", "OLD.number")}
{noting("knowledge_files", "UPDATE OF deleted ON knowledge_files WHEN NEW.deleted > OLD.deleted",
        "'store ' || OLD.store", "OLD.file", "OLD.number",
        "FROM knowledge_stores WHERE number = OLD.store AND deleted = 0")}
"""
# Only the end may be changed once a release has had it
KNOWLEDGE: Seq[Step] = (STORES, TRIGGERS, counted("knowledge_stores", HELD), FOLDERS, ALL, HOMELESS, SEARCHED,
                        WRITTEN)


def words_table(store: int) -> str:
    """The name of a store's table of words: FTS5 without content, of the columns heading and text, whose
    rowid is the number of the passage."""
    return f"knowledge_words_{store:d}"


def make_words(connection: sqlite3.Connection, store: int) -> bool:
    """Make a store's table of words; False where SQLite has no FTS5."""
    if connection.execute("SELECT sqlite_compileoption_used('ENABLE_FTS5')").fetchone() != (1,):
        return False
    connection.execute(f"CREATE VIRTUAL TABLE {words_table(store)} USING fts5(heading, text, content='', "
                       "tokenize='unicode61 remove_diacritics 2')")
    return True
