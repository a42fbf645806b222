"""The tables of chats that are kept on the server, as steps (see chatlm/front/store/schema.py)."""

from __future__ import annotations

from chatlm.front.annexes.chats.migrate import move_records
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
# Each field of a record is a row, so that a small change of a large record is a small write; each owner has
# revisions of his own. What was there before is moved by `move_records`
FIELDS = """
DROP TRIGGER chat_records_added;
DROP TRIGGER chat_records_changed;
DROP TRIGGER chat_records_removed;
DROP TRIGGER chat_records_moved;
DROP TRIGGER chat_shown_ended;
DROP INDEX chat_records_by_name;
DROP INDEX chat_records_by_rev;
DROP INDEX chat_records_newest;
DROP INDEX chat_records_of_chat;
DROP INDEX chat_records_gone;
DROP INDEX chat_records_left;
DROP INDEX chat_records_idle;
DROP INDEX chat_shown_of_picture;
DROP INDEX chat_pictures_made;
DROP TABLE chat_words;
ALTER TABLE chat_records RENAME TO old_chat_records;
ALTER TABLE chat_answers RENAME TO old_chat_answers;
ALTER TABLE chat_shown RENAME TO old_chat_shown;
ALTER TABLE chat_revisions RENAME TO old_chat_revisions;
CREATE TRIGGER old_chat_records_removed AFTER DELETE ON old_chat_records BEGIN
    UPDATE holdings SET bytes = bytes - (256 + LENGTH(CAST(OLD.body AS BLOB)) + OLD.words)
        WHERE owner = OLD.owner;
END;
CREATE TABLE chat_records (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,            -- see Owners.of_texts
    kind TEXT NOT NULL,             -- chat, node, project or prompt
    name TEXT NOT NULL,             -- its id: 32 hexadecimal digits, which a page has made up
    chat TEXT NOT NULL DEFAULT '',  -- of a node
    parent TEXT NOT NULL DEFAULT '',  -- of a node: the node before it, empty for a first message
    rev INTEGER NOT NULL,           -- when it last changed
    said INTEGER NOT NULL,          -- when its content last changed
    bytes INTEGER NOT NULL DEFAULT 0,  -- of its fields
    words INTEGER NOT NULL DEFAULT 0,  -- bytes of its text in chat_words
    updated REAL NOT NULL DEFAULT 0,  -- of a chat, as its device says
    changed INTEGER NOT NULL,       -- in seconds
    deleted INTEGER NOT NULL DEFAULT 0,  -- 1: it is, and has no fields; 2: as 1, and it never was here
    nodes_left INTEGER NOT NULL DEFAULT 0  -- 1: a deleted chat whose nodes still have to go
);
CREATE UNIQUE INDEX chat_records_by_name ON chat_records (owner, kind, name);
CREATE INDEX chat_records_by_rev ON chat_records (owner, rev);
CREATE INDEX chat_records_there ON chat_records (owner, rev) WHERE deleted = 0;
CREATE INDEX chat_records_gone ON chat_records (owner, rev) WHERE deleted = 1;
CREATE INDEX chat_records_old ON chat_records (changed) WHERE deleted = 1;
CREATE INDEX chat_records_unknown ON chat_records (owner, changed) WHERE deleted = 2;
CREATE INDEX chat_records_newest ON chat_records (owner, updated DESC, name)
    WHERE kind = 'chat' AND deleted = 0;
CREATE INDEX chat_records_idle ON chat_records (changed) WHERE kind = 'chat' AND deleted = 0;
CREATE INDEX chat_records_of_chat ON chat_records (owner, kind, chat) WHERE deleted = 0;
CREATE INDEX chat_records_below ON chat_records (owner, chat, parent) WHERE deleted = 0;
CREATE INDEX chat_records_latest ON chat_records (owner, chat, rev);
CREATE INDEX chat_records_left ON chat_records (nodes_left) WHERE nodes_left = 1;
CREATE TABLE chat_fields (
    record INTEGER NOT NULL REFERENCES chat_records (number) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,            -- JSON
    PRIMARY KEY (record, name)
);
CREATE TABLE chat_words (           -- what a search looks through: a text may have several pieces
    number INTEGER PRIMARY KEY,
    record INTEGER NOT NULL REFERENCES chat_records (number) ON DELETE CASCADE,
    owner TEXT NOT NULL,
    chat TEXT NOT NULL,
    folded TEXT NOT NULL            -- of a chat's title or a node's content, see records.folded
);
CREATE INDEX chat_words_of_chat ON chat_words (owner, chat, record);
CREATE INDEX chat_words_of_record ON chat_words (record);
CREATE TABLE chat_revisions (
    owner TEXT PRIMARY KEY,
    rev INTEGER NOT NULL,           -- of his last change
    forgotten INTEGER NOT NULL DEFAULT 0  -- of the last deletion that nobody is told of any more
) WITHOUT ROWID;
CREATE TRIGGER chat_records_moved AFTER UPDATE OF owner ON chat_records BEGIN  -- other devices must see them
    INSERT INTO chat_revisions (owner, rev)
        SELECT NEW.owner, IFNULL(MAX(rev), 0) FROM chat_revisions WHERE owner = OLD.owner
        ON CONFLICT (owner) DO UPDATE SET rev = MAX(rev, excluded.rev);
    UPDATE chat_revisions SET rev = rev + 1 WHERE owner = NEW.owner;
    UPDATE chat_records SET rev = (SELECT rev FROM chat_revisions WHERE owner = NEW.owner)
        WHERE number = NEW.number;
END;
CREATE TABLE chat_answers (         -- answers that this server is writing
    record INTEGER PRIMARY KEY REFERENCES chat_records (number) ON DELETE CASCADE,
    stream TEXT NOT NULL            -- the id of the request
);
CREATE TABLE chat_shown (           -- which nodes show a picture
    record INTEGER NOT NULL REFERENCES chat_records (number) ON DELETE CASCADE,
    picture INTEGER NOT NULL REFERENCES chat_pictures (number) ON DELETE CASCADE,
    PRIMARY KEY (record, picture)
) WITHOUT ROWID;
CREATE INDEX chat_shown_of_picture ON chat_shown (picture);
CREATE TABLE chat_unshown (         -- pictures that no node has shown yet
    picture INTEGER PRIMARY KEY REFERENCES chat_pictures (number) ON DELETE CASCADE,
    made INTEGER NOT NULL           -- in seconds: when a device last sent it
);
CREATE INDEX chat_unshown_made ON chat_unshown (made);
INSERT INTO chat_unshown SELECT number, made FROM chat_pictures
    WHERE NOT EXISTS (SELECT 1 FROM old_chat_shown WHERE picture = number);
CREATE TRIGGER chat_shown_begun AFTER INSERT ON chat_shown BEGIN
    DELETE FROM chat_unshown WHERE picture = NEW.picture;
END;
CREATE TRIGGER chat_shown_ended AFTER DELETE ON chat_shown
WHEN NOT EXISTS (SELECT 1 FROM chat_shown WHERE picture = OLD.picture) BEGIN
    DELETE FROM chat_pictures WHERE number = OLD.picture;
END;
"""
MOVED = """
INSERT INTO chat_revisions (owner, rev, forgotten)
    SELECT DISTINCT owner, last.rev, last.forgotten FROM chat_records CROSS JOIN old_chat_revisions AS last;
DROP TABLE old_chat_answers;
DROP TABLE old_chat_shown;
DROP TABLE old_chat_revisions;
DROP TABLE old_chat_records;
"""
STEPS: tuple[Step, ...] = (
    RECORDS + counted("chat_records", "256 + LENGTH(CAST({row}.body AS BLOB)) + {row}.words"),
    ANSWERS,
    IDLE,
    PICTURES + counted("chat_pictures", "256 + LENGTH({row}.data)"),
    FIELDS + counted("chat_records", "256 + {row}.bytes + {row}.words"),
    move_records,
    MOVED,
)
