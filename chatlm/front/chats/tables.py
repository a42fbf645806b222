"""The tables of chats that are kept on the server, as steps (see chatlm/front/store/schema.py)."""

from __future__ import annotations

from chatlm.front.store.schema import Step, counted

RECORDS = """
CREATE TABLE chat_records (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,            -- see Owners.of_texts
    kind TEXT NOT NULL,             -- chat, node, project or prompt
    name TEXT NOT NULL,             -- its id: 32 hexadecimal digits, which a page has made up
    chat TEXT NOT NULL DEFAULT '',  -- of a node
    parent TEXT NOT NULL DEFAULT '',  -- of a node: the node before it, empty for a first message
    rev INTEGER NOT NULL,           -- when it last changed
    said INTEGER NOT NULL,          -- when its content last changed
    body TEXT NOT NULL,             -- JSON without the id. Empty: it is deleted
    words INTEGER NOT NULL,         -- bytes of its text in chat_words
    updated REAL NOT NULL DEFAULT 0,  -- of a chat, as its device says
    changed INTEGER NOT NULL,       -- in seconds
    nodes_left INTEGER NOT NULL DEFAULT 0  -- 1: a deleted chat whose nodes still have to go
);
CREATE UNIQUE INDEX chat_records_by_name ON chat_records (owner, kind, name);
CREATE INDEX chat_records_by_rev ON chat_records (owner, rev);
CREATE INDEX chat_records_newest ON chat_records (owner, updated DESC, name)
    WHERE kind = 'chat' AND body <> '';
CREATE INDEX chat_records_of_chat ON chat_records (owner, chat);
CREATE INDEX chat_records_gone ON chat_records (changed) WHERE body = '';
CREATE INDEX chat_records_left ON chat_records (nodes_left) WHERE nodes_left = 1;
CREATE TABLE chat_words (           -- what a search looks through
    record INTEGER PRIMARY KEY REFERENCES chat_records (number) ON DELETE CASCADE,
    owner TEXT NOT NULL,
    chat TEXT NOT NULL,
    folded TEXT NOT NULL            -- a chat's title or a node's content, in lower case
);
CREATE INDEX chat_words_of_chat ON chat_words (owner, chat);
CREATE TABLE chat_revisions (
    id INTEGER PRIMARY KEY,         -- 1: there is one row
    rev INTEGER NOT NULL,           -- of the last change, whoever made it
    forgotten INTEGER NOT NULL      -- of the last deletion that nobody is told of any more
);
INSERT INTO chat_revisions (id, rev, forgotten) VALUES (1, 0, 0);
CREATE TRIGGER chat_records_moved AFTER UPDATE OF owner ON chat_records BEGIN  -- other devices must see them
    UPDATE chat_revisions SET rev = rev + 1 WHERE id = 1;
    UPDATE chat_records SET rev = (SELECT rev FROM chat_revisions WHERE id = 1) WHERE number = NEW.number;
END;
"""
ANSWERS = """
CREATE TABLE chat_answers (         -- answers that this server is writing
    record INTEGER PRIMARY KEY REFERENCES chat_records (number) ON DELETE CASCADE,
    stream TEXT NOT NULL            -- the id of the request
);
"""
IDLE = "CREATE INDEX chat_records_idle ON chat_records (changed) WHERE kind = 'chat' AND body <> '';"
PICTURES = """
CREATE TABLE chat_pictures (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,             -- the SHA-256 of its data
    made INTEGER NOT NULL,          -- in seconds: when a device last sent it
    data BLOB NOT NULL
);
CREATE INDEX chat_pictures_by_name ON chat_pictures (owner, name);
CREATE INDEX chat_pictures_made ON chat_pictures (made);
CREATE TABLE chat_shown (           -- which nodes show a picture
    record INTEGER NOT NULL REFERENCES chat_records (number) ON DELETE CASCADE,
    picture INTEGER NOT NULL REFERENCES chat_pictures (number) ON DELETE CASCADE,
    PRIMARY KEY (record, picture)
) WITHOUT ROWID;
CREATE INDEX chat_shown_of_picture ON chat_shown (picture);
CREATE TRIGGER chat_shown_ended AFTER DELETE ON chat_shown
WHEN NOT EXISTS (SELECT 1 FROM chat_shown WHERE picture = OLD.picture) BEGIN
    DELETE FROM chat_pictures WHERE number = OLD.picture;
END;
"""
STEPS: tuple[Step, ...] = (
    RECORDS + counted("chat_records", "256 + LENGTH(CAST({row}.body AS BLOB)) + {row}.words"),
    ANSWERS,
    IDLE,
    PICTURES + counted("chat_pictures", "256 + LENGTH({row}.data)"),
)
