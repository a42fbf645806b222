"""Asks SQLite how it runs each statement that the program has it run in a test: none may read a whole table.

Clients fill these tables, and one thread does all work: what reads a table of theirs, or sorts all that they
chose to call alike, makes the others wait. Statements of tests may, and those that bring an old database up to
date, or give a key's texts to an owner, before the server serves."""

import re
import sqlite3
import sys
from pathlib import Path

import chatlm
from chatlm.front.store.store import Store

PROGRAM = str(Path(chatlm.__file__).parent)
EXPLAINABLE = re.compile(r"\s*(SELECT|UPDATE|DELETE|WITH|INSERT|REPLACE)\b", re.IGNORECASE)
# "chain" is what a recursive query has found so far; old_ tables are emptied in pieces
WHOLE = re.compile(r"SCAN (?!chain\b|CONSTANT ROW|old_)|AUTOMATIC .*INDEX")
SORTED = re.compile("USE TEMP B-TREE")
# What is sorted, and why that is little
FEW = {"SELECT id, owner, previous FROM chain": "at most MOST_TURNS rows",
       "FROM batches WHERE status IN (?, ?, ?) ORDER BY id": "a key has at most 100 that are not finished",
       "FROM usage WHERE day BETWEEN": "the rows of one day: keys and models are the operator's"}

BEFORE_SERVING = "_take_step", "rename_owners"  # functions

faults = []
explained = set()  # statements


def take_faults():
    found = faults[:]
    faults.clear()
    return found


class Explaining(sqlite3.Connection):
    """A connection that explains each statement of the program before its first run."""

    def execute(self, statement, values=()):
        self._explain(statement, values, sys._getframe(1))
        return super().execute(statement, values)

    def executemany(self, statement, rows):
        rows = list(rows)
        if rows:
            self._explain(statement, rows[0], sys._getframe(1))
        return super().executemany(statement, rows)

    def _explain(self, statement, values, frame):
        place = frame.f_code
        ours = place.co_filename.startswith(PROGRAM) and place.co_name not in BEFORE_SERVING
        if statement in explained or not ours or not EXPLAINABLE.match(statement):
            return
        explained.add(statement)
        for step in plan_of(super().execute, statement, values):
            is_few = any(part in statement for part in FEW)
            if WHOLE.search(step) or SORTED.search(step) and not is_few:
                faults.append(f"{step}: {' '.join(statement.split())}")


def plan_of(execute, statement, values=()):
    return [row[3] for row in execute(f"EXPLAIN QUERY PLAN {statement}", values)]


class ExplainingLibrary:
    """The module sqlite3, whose connections explain."""

    def __init__(self, library):
        self.library = library

    def __getattr__(self, name):
        return getattr(self.library, name)

    def connect(self, *places, **options):
        return self.library.connect(*places, **options, factory=Explaining)


def explain_all(monkeypatch):
    """Stores that are opened from now on explain their statements."""
    plain = Store._writer

    def writer(store):
        library = store.library
        store.library = ExplainingLibrary(library)
        try:
            return plain(store)
        finally:
            store.library = library

    monkeypatch.setattr(Store, "_writer", writer)
