"""The tables of the store, as steps from an empty database to the current one.

A semicolon ends a statement, so no comment has one. Times are in seconds since 1970."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chatlm.front.store.gone import GONE, noting
from chatlm.front.store.migrate import move_kept, name_kept

FILES = """
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- file-...
    owner TEXT NOT NULL,            -- see Owners.of_texts
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,          -- batch or batch_output
    bytes INTEGER NOT NULL DEFAULT 0,
    requests INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL,
    expires INTEGER,
    state INTEGER NOT NULL DEFAULT 0,  -- 0: being written, 1: there, 2: deleted, its lines still have to go
    note TEXT                       -- what is wrong with some of its lines
);
CREATE INDEX files_of_owner ON files (owner, id);
CREATE TABLE lines (                -- of a file, in order: their texts together are its content
    file INTEGER NOT NULL REFERENCES files (id),
    number INTEGER NOT NULL,        -- in the file, or of the line that an output answers
    text BLOB NOT NULL,
    custom_id TEXT,                 -- of a request
    url TEXT,
    model TEXT,
    problem TEXT,                   -- why it cannot be run
    PRIMARY KEY (file, number)
);
"""
BATCHES = """
CREATE TABLE batches (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- batch_...
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    window TEXT NOT NULL,           -- completion_window
    metadata TEXT,                  -- JSON
    input TEXT NOT NULL,            -- names of files
    output TEXT NOT NULL,
    errors TEXT NOT NULL,
    status TEXT NOT NULL,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    ended INTEGER,
    times TEXT NOT NULL DEFAULT '{}',  -- JSON: in_progress_at and so on
    problems TEXT,                  -- JSON: why it has failed
    lasts INTEGER                   -- for how long its output is kept
);
CREATE INDEX batches_of_owner ON batches (owner, id);
"""
RESPONSES = """
CREATE TABLE responses (
    name TEXT PRIMARY KEY,          -- resp_...
    owner TEXT NOT NULL,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    previous TEXT,                  -- name of the response that it continues
    conversation TEXT,              -- name of its conversation
    input BLOB NOT NULL,            -- JSON: a list of items, as is output
    output BLOB NOT NULL,
    body BLOB NOT NULL              -- JSON: all of it
);
CREATE INDEX responses_by_expiry ON responses (expires);
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- conv_...
    owner TEXT NOT NULL,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    metadata TEXT NOT NULL          -- JSON
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    body BLOB NOT NULL              -- JSON
);
CREATE INDEX items_of_conversation ON items (conversation, id);
"""
USAGE = """
CREATE TABLE usage (
    day TEXT NOT NULL,              -- of UTC: 2026-11-24
    key TEXT NOT NULL,              -- the name of an API key, empty on a server without keys
    model TEXT NOT NULL,
    background INTEGER NOT NULL,    -- 1: batches, and requests with low priority
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    compute_s REAL NOT NULL,
    PRIMARY KEY (day, key, model, background)
) WITHOUT ROWID;
"""
ITEMS = """
ALTER TABLE responses RENAME TO old_responses;
ALTER TABLE items RENAME TO old_items;
DROP INDEX responses_by_expiry;
DROP INDEX items_of_conversation;
CREATE TABLE responses (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- resp_...
    owner TEXT NOT NULL,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    previous TEXT,                  -- name of the response that it continues
    conversation TEXT,              -- name of its conversation
    bytes INTEGER NOT NULL,         -- that its parts take
    deleted INTEGER NOT NULL DEFAULT 0  -- 1: nobody sees it, its parts still have to go
);
CREATE INDEX responses_by_expiry ON responses (deleted, expires);
CREATE TABLE parts (                -- of a response, in order
    id INTEGER PRIMARY KEY,
    response INTEGER NOT NULL REFERENCES responses (id),
    kind INTEGER NOT NULL,          -- 0: an item of its input, 1: one of its output, 2: all of it
    name TEXT NOT NULL,             -- msg_..., or that of the response
    body BLOB NOT NULL              -- JSON, of an item without its id
);
CREATE INDEX parts_of_response ON parts (response);
CREATE INDEX parts_by_name ON parts (name);
CREATE TABLE items (                -- of a conversation, in order
    id INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    name TEXT NOT NULL,             -- msg_...
    body BLOB NOT NULL              -- JSON without its id
);
CREATE INDEX items_of_conversation ON items (conversation);
CREATE UNIQUE INDEX items_by_name ON items (conversation, name);
ALTER TABLE conversations ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE conversations ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0;
CREATE INDEX conversations_by_expiry ON conversations (deleted, expires);
UPDATE conversations SET bytes = LENGTH(CAST(metadata AS BLOB));
CREATE INDEX files_by_state ON files (state, expires);
CREATE INDEX batches_by_status ON batches (status, owner);
CREATE INDEX batches_by_end ON batches (ended);
CREATE INDEX batches_by_input ON batches (input);
CREATE TABLE holdings (
    owner TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL          -- that all takes which is not deleted
) WITHOUT ROWID;
"""
APPROVALS = """
CREATE TABLE approvals (            -- of calls that have begun
    owner TEXT NOT NULL,            -- see Approvals.owner_of
    name TEXT NOT NULL,             -- mcpr_...
    began INTEGER NOT NULL,
    response TEXT NOT NULL,         -- name of the response that makes the call, empty if it is not kept
    ended INTEGER,
    failed INTEGER NOT NULL DEFAULT 0,
    result TEXT NOT NULL DEFAULT '',  -- the begin of it
    expires INTEGER NOT NULL,       -- from then on the approval is refused without a row, too
    PRIMARY KEY (owner, name)
) WITHOUT ROWID;
CREATE INDEX approvals_by_expiry ON approvals (expires);
CREATE TABLE secrets (
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL
) WITHOUT ROWID;
"""
NAMES = """
CREATE TABLE part_names (           -- of the items of responses, as their owners refer to them
    part INTEGER PRIMARY KEY REFERENCES parts (id) ON DELETE CASCADE,
    owner TEXT NOT NULL,            -- of its response, or only an @ where that is an address
    name TEXT NOT NULL,
    kind INTEGER NOT NULL
);
CREATE INDEX part_names_of_owner ON part_names (owner, name, kind DESC, part);
DROP INDEX parts_by_name;
CREATE INDEX parts_of_response_by_name ON parts (response, name);
DROP INDEX files_of_owner;
CREATE INDEX files_of_owner ON files (owner, state, id);
CREATE INDEX files_by_purpose ON files (owner, state, purpose, id);
DROP INDEX batches_by_input;
CREATE INDEX batches_by_input ON batches (input, status);
"""
VERSIONS = """
CREATE TABLE versions (             -- of the tables of annexes
    annex TEXT PRIMARY KEY,         -- its name
    version INTEGER NOT NULL        -- how many of its steps were taken
) WITHOUT ROWID;
"""
MAKERS_AND_SPACES = """
ALTER TABLE batches ADD COLUMN client TEXT NOT NULL DEFAULT '';  -- who made it: the name of a key
CREATE TABLE spaces (
    owner TEXT PRIMARY KEY,         -- "space ...", see space_of
    client TEXT NOT NULL,           -- the address that wrote to it first
    noted INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX spaces_of_client ON spaces (client, owner);
"""
# A conversation that is deleted takes its items with it: nobody lists them
LISTED = "".join((
    noting("files", "UPDATE OF state ON files WHEN NEW.state = 2", "'files'", "OLD.name", "OLD.id"),
    noting("batches", "DELETE ON batches", "'batches'", "OLD.name", "OLD.id"),
    noting("items", "DELETE ON items", "'items ' || OLD.conversation", "OLD.name", "OLD.id",
           "FROM conversations WHERE id = OLD.conversation AND deleted = 0")))
# What a row counts for its owner, besides the rows that belong to it
HELD = {"files": "({row}.state < 2) * ({row}.bytes + 128 * {row}.line_count + 512)",
        "batches": "512 + LENGTH(CAST(IFNULL({row}.metadata, '') AS BLOB)) "
                   "+ LENGTH(CAST(IFNULL({row}.problems, '') AS BLOB))",
        "responses": "(1 - {row}.deleted) * ({row}.bytes + 512)",
        "conversations": "(1 - {row}.deleted) * ({row}.bytes + 512)"}


def counted(table: str, size: str) -> str:
    """Count the rows of a table for their `owner`, and what becomes of them. size: of `{row}`, in bytes."""
    there = size.format(row=table)
    return f"""
INSERT INTO holdings (owner, bytes) SELECT owner, SUM({there}) FROM {table} WHERE true GROUP BY owner
    ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes;
""" + counting(table, size)


def counting(table: str, size: str) -> str:
    """Triggers that count what becomes of the rows of a table from now on."""
    old = size.format(row="OLD")
    new = size.format(row="NEW")
    return f"""
CREATE TRIGGER {table}_added AFTER INSERT ON {table} BEGIN
    INSERT INTO holdings (owner, bytes) VALUES (NEW.owner, {new})
        ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER {table}_changed AFTER UPDATE ON {table} BEGIN
    UPDATE holdings SET bytes = bytes + ({new}) - ({old}) WHERE owner = NEW.owner;
END;
CREATE TRIGGER {table}_removed AFTER DELETE ON {table} BEGIN
    UPDATE holdings SET bytes = bytes - ({old}) WHERE owner = OLD.owner;
END;
"""


FIRST_HELD = HELD | {"files": "({row}.state < 2) * ({row}.bytes + 512)"}
HOLDINGS = "".join(counted(table, size) for table, size in FIRST_HELD.items())
# A line of two bytes takes twenty times as much, so its row counts too
ROWS_OF_LINES = "".join((
    "ALTER TABLE files ADD COLUMN line_count INTEGER NOT NULL DEFAULT 0;",
    *(f"DROP TRIGGER files_{what};" for what in ("added", "changed", "removed")),
    counting("files", HELD["files"]),
    "UPDATE files SET line_count = (SELECT COUNT(*) FROM lines WHERE file = files.id);"))
# Statements, or what does a piece of the work and returns whether there is more
Step = str | Callable[[Any], bool]
# Only the end may be changed once a release has had it. The tables of annexes have steps of their own
STEPS: tuple[Step, ...] = (
    FILES, BATCHES, RESPONSES, USAGE, ITEMS + HOLDINGS, move_kept, NAMES, name_kept, APPROVALS, VERSIONS,
    MAKERS_AND_SPACES, GONE + LISTED, ROWS_OF_LINES)
