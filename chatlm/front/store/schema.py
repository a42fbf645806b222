"""The tables of the store, as steps from an empty database to the current one.

A semicolon ends a statement, so no comment has one."""

from __future__ import annotations

FILES = """
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- file-...
    owner TEXT NOT NULL,            -- of whoever made it: Owners.of_texts
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,          -- batch or batch_output
    bytes INTEGER NOT NULL DEFAULT 0,
    lines INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL,       -- s since 1970, as all times
    expires INTEGER,
    complete INTEGER NOT NULL DEFAULT 0,  -- 0: it is being written, and nobody sees it
    note TEXT                       -- what is wrong with some of its lines
);
CREATE INDEX files_of_owner ON files (owner, id);
CREATE TABLE lines (                -- of a file, in order: their texts together are its content
    file INTEGER NOT NULL REFERENCES files (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,        -- in the file, or of the line that an output answers
    text BLOB NOT NULL,
    problem TEXT,                   -- why it cannot be run
    PRIMARY KEY (file, number)
);
"""
BATCHES = """
CREATE TABLE batches (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- batch_...
    owner TEXT NOT NULL,
    client TEXT NOT NULL,           -- whose requests its lines are
    models TEXT NOT NULL,           -- JSON: those that its key may use
    endpoint TEXT NOT NULL,
    window TEXT NOT NULL,           -- completion_window
    metadata TEXT,                  -- JSON
    input INTEGER NOT NULL REFERENCES files (id),
    output INTEGER NOT NULL REFERENCES files (id),
    errors INTEGER NOT NULL REFERENCES files (id),
    status TEXT NOT NULL,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    times TEXT NOT NULL,            -- JSON: in_progress_at and so on
    output_expires_s INTEGER        -- after its end
);
CREATE INDEX batches_of_owner ON batches (owner, id);
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
STEPS: tuple[str, ...] = (FILES, BATCHES, USAGE)  # only the end may be changed once a release has had it
