"""The tables of the store, as steps from an empty database to the current one.

A semicolon ends a statement, so no comment has one. Times are in seconds since 1970."""

from __future__ import annotations

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
# Only the end may be changed once a release has had it
STEPS: tuple[str, ...] = (FILES, BATCHES, RESPONSES, USAGE)
