"""A database with stores of passages, made row by row: vectors and texts are what a test says."""

import json
import sqlite3
from array import array
from contextlib import closing

from chatlm.front.annexes.knowledge.tables import KNOWLEDGE, make_words, words_table
from chatlm.front.store.schema import STEPS

ADD_WINDOW = ("INSERT INTO knowledge_windows (store, file, passage, embedder, vector, scale) "
              "VALUES (?, ?, ?, ?, ?, ?)")


def quantized(vector):
    """(int8 numbers, scale) of a vector, as ingestion writes them."""
    scale = max(map(abs, vector)) / 127 or 1.0
    return array("b", [round(number / scale) for number in vector]).tobytes(), scale


def make_database(path):
    """An empty database of this version, in WAL mode."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for step in (*STEPS, *KNOWLEDGE):
            if isinstance(step, str):
                connection.executescript(step)


def connect(path):
    return sqlite3.connect(path, isolation_level=None)


def add_embedder(path, digest, dimensions=4):
    with closing(connect(path)) as connection:
        return connection.execute(
            "INSERT INTO knowledge_embedders (digest, name, dimensions) VALUES (?, ?, ?)",
            (digest, digest, dimensions)).lastrowid


def add_store(path, embedder=None, owner="me", with_words=True):
    with closing(connect(path)) as connection:
        store = connection.execute(
            "INSERT INTO knowledge_stores (id, owner, client, created, last_active, chunking, embedder) "
            "VALUES ('vs_' || hex(randomblob(8)), ?, '', 0, 0, '{}', ?)", (owner, embedder)).lastrowid
        if with_words and make_words(connection, store):
            connection.execute("UPDATE knowledge_stores SET has_words = 1 WHERE number = ?", (store,))
        return store


def add_file(path, store, passages, embedder=None, attributes=None, filename="notes.txt"):
    """A completed file. passages: texts, each with the vectors of its windows: (text, [vector, ...]). Returns
    (the file's number, its passages' numbers)."""
    with closing(connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        file = connection.execute(
            "INSERT INTO knowledge_files (store, file, filename, status, attributes, chunking, created, "
            "passages, windows, tokens) VALUES (?, 'file-' || hex(randomblob(8)), ?, 'completed', ?, '{}', 0, ?, ?, ?)",
            (store, filename, json.dumps(attributes or {}), len(passages), sum(len(w) for _, w in passages),
             sum(len(text.split()) for text, _ in passages))).lastrowid
        numbers = []
        start = 0
        for place, (text, windows) in enumerate(passages):
            number = connection.execute(
                "INSERT INTO knowledge_passages (store, file, place, heading, start, tokens, text) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (store, file, place, "", start, len(text.split()), text)).lastrowid
            start += len(text) + 1
            numbers.append(number)
            for vector in windows:
                connection.execute(ADD_WINDOW, (store, file, number, embedder, *quantized(vector)))
            if connection.execute("SELECT has_words FROM knowledge_stores WHERE number = ?",
                                  (store,)).fetchone()[0]:
                connection.execute(
                    f"INSERT INTO {words_table(store)} (rowid, heading, text) VALUES (?, '', ?)",
                    (number, text))
        connection.execute("COMMIT")
        return file, numbers


def delete_file(path, file):
    with closing(connect(path)) as connection:
        connection.execute("UPDATE knowledge_files SET deleted = 1 WHERE number = ?", (file,))
