#!/usr/bin/env python3
"""Ten thousand files and a million windows in five vector stores of a real server: how fast, how large, and what is lost or left.

    python bench/knowledge_scale.py [--small] [--folder FOLDER] [--skip disk,kills,...]

A server is started with the default model, the default embedder and two keys; what is measured goes over HTTP, but where it says otherwise. Its parts, in this order:

  ingest    200 files of 100 windows each are uploaded and embedded for real, until 20,000 windows are searched. A window is a section of
            thirty words of bench/held_out/ in random order, with a heading: about 50 tokens.
  kills     during the last quarter the server is killed five times (kill -9) and started again. Nothing that it has reported as completed may be lost,
            and in the end each file has all of its parts once.
  made      rows with random vectors fill the same database up to the whole size, written by this script while no server runs. A passage has sixty such words and two windows.
  start     a restart: until /health answers, until the first search has, what then needs how much memory
  search    questions of ten words, one store after the other: alone, and beside four chats that stream from the default model without a pause;
            then in all five at once, by the server's own classes in this process and with a vector that is known, alone and beside chats
  delete    one file, which has a word of its own in each passage; then an owner with all its files and a fifth of all windows. How long until
            no byte of the database and its -wal has these words; a word of another file has to stay.
  disk      another server on a tmpfs that is filled up while files are ingested, then emptied: what clients see, and that everything is completed after that

With --small all of it takes a minute or two on quiet cores: sizes are a five-hundredth, with the same code (bench/test_bench_knowledge.py runs it). Figures are p50 / p99.
A check that fails ends the script with status 1."""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import knowledge_held_out
from chatlm.front.annexes.knowledge.asking import Asker
from chatlm.front.annexes.knowledge.scan import ROLE, VectorScanner
from chatlm.front.annexes.knowledge.search import Search
from chatlm.front.annexes.knowledge.tables import words_table
from chatlm.front.annexes.knowledge.vectors.messages import Scan
from knowledge_quality import MINILM, form
from servers import our_server

KEYS = {"ann": "a" * 40, "bob": "b" * 40}
CHATS = 4
LIMIT_S = 900.0         # of a wait for what should come
ROUNDS_S = 60.0         # of searches of a kind


class Sizes(NamedTuple):
    windows: int        # in all stores
    of_file: int
    stores: int         # the last one is bob's
    real_files: int     # ingested by the server
    kills: int
    rounds: int         # searches of each kind
    disk_mb: int


FULL = Sizes(1_000_000, 100, 5, 200, 5, 150, 256)
SMALL = Sizes(2_000, 10, 5, 20, 1, 10, 160)


def fail(why):
    sys.exit(f"FAILED: {why}")


def row(what, figure):
    print(f"| {what} | {figure} |", flush=True)


def spread(took_ms):
    took_ms = sorted(took_ms)
    return f"{took_ms[len(took_ms) // 2]:,.0f} / {took_ms[min(len(took_ms) - 1, int(len(took_ms) * 0.99))]:,.0f} ms of {len(took_ms)}"


def timed(sizes, ask):
    """What `ask(number)` took each time, in ms: so many rounds, but no more than ROUNDS_S."""
    ends_s, took_ms = time.monotonic() + ROUNDS_S, []
    while len(took_ms) < sizes.rounds and time.monotonic() < ends_s:
        took_ms.append(ask(len(took_ms)))
    return took_ms


def wait_for(what, why, limit_s=LIMIT_S, pause_s=0.1):
    ends_s = time.monotonic() + limit_s
    while not (found := what()):
        if time.monotonic() > ends_s:
            fail(f"after {limit_s:.0f} s {why}")
        time.sleep(pause_s)
    return found


class Texts:
    """Texts of real words: as frequent as in bench/held_out/, in random order."""

    def __init__(self, seed):
        self.words = numpy.array(" ".join(text for _, text in knowledge_held_out.documents()).replace("#", "").split())
        self.random = numpy.random.default_rng(seed)

    def passage(self, words):
        return " ".join(self.random.choice(self.words, words))

    def file(self, sections, secret=""):
        return "\n\n".join(f"## Section {number} {secret}\n\n{self.passage(30)} {secret}" for number in range(sections))

    def question(self):
        return self.passage(10)


class Client:
    """What a key asks of a server."""

    def __init__(self, server, key):
        self.server, self.key = server, key

    def __call__(self, path, body=None, method=None, data=None, kind="application/json"):
        data = json.dumps(body).encode() if body is not None else data
        request = urllib.request.Request(self.server.url + path, data, method=method, headers={
            "Authorization": f"Bearer {KEYS[self.key]}", "Content-Type": kind})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def status(self, *words, **more):
        """(status, body or the error's message)"""
        try:
            return 200, self(*words, **more)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")

    def upload(self, name, text):
        data, kind = form({"purpose": "assistants"}, name, text.encode())
        return self("/v1/files", data=data, kind=kind)["id"]

    def counts(self, store):
        return self(f"/v1/vector_stores/{store}")["file_counts"]

    def completed(self, store):
        """The ids of all files that are."""
        found, after = set(), ""
        while True:
            page = self(f"/v1/vector_stores/{store}/files?limit=100&filter=completed{after}")
            found |= {each["id"] for each in page["data"]}
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"

    def search_ms(self, store, question):
        began = time.perf_counter()
        found = self(f"/v1/vector_stores/{store}/search", {"query": question})
        if not found["data"]:
            fail(f"a search of {store} finds nothing")
        return 1e3 * (time.perf_counter() - began)


@contextlib.contextmanager
def serving(folder, path):
    """A server with the default model, the embedder and this database."""
    keys = Path(folder) / "keys"
    keys.write_text("".join(f"{name}: {key} owner={name}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    with our_server("--embedder", MINILM, "--database", path, "--api-key-file", keys, log=Path(folder) / "server.log") as server:
        yield server


@contextlib.contextmanager
def chats(server, count=CHATS):
    """Chats that stream one after the other, meanwhile. Yields their numbers of tokens, to be read at the end."""
    over, tokens = threading.Event(), []

    def chat(number):
        client = Client(server, "ann")
        while not over.is_set():
            body = {"messages": [{"role": "user", "content": f"Tell a long story about the number {number}."}], "max_tokens": 100, "stream": True}
            request = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(body).encode(), {
                "Authorization": f"Bearer {KEYS[client.key]}", "Content-Type": "application/json"})
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=120) as response:
                for line in response:
                    if over.is_set():
                        return
                    tokens.append(line.startswith(b"data: {"))

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(tokens) > 20, "the chats have not begun", 120)
        yield tokens
    finally:
        over.set()
        for thread in threads:
            thread.join()


def memory(server):
    """{front, vectors, workers together: MB}"""
    found = {"front": 0, "vectors": 0, "workers": 0}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            kind = "front" if process.pid == server.process.pid else "vectors" if ROLE in command else "workers"
            found[kind] += process.memory_info().rss >> 20
    return found


def kill(server):
    """kill -9 of the front, and the end of its processes."""
    family = server.processes()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    _, alive = psutil.wait_procs(family, 60)
    if alive:
        fail(f"a minute after kill -9 of the server these still run: {alive}")


class Load:
    def __init__(self, sizes, folder):
        self.sizes, self.folder, self.path = sizes, Path(folder), Path(folder) / "kept.db"
        self.texts = Texts(1)
        self.uploaded = {}      # store: ids of files
        self.secret_file = ""

    def owner(self, place):
        return "bob" if place == self.sizes.stores - 1 else "ann"

    def ingest(self, kills):
        sizes = self.sizes
        with serving(self.folder, self.path) as server:
            self.stores = [Client(server, self.owner(place))("/v1/vector_stores", {"name": f"store {place}"})["id"] for place in range(sizes.stores)]
            files = []
            began = time.monotonic()
            for number in range(sizes.real_files):
                place = number % sizes.stores
                secret = {0: "zyxophon", 1: "quaverly"}.get(number, "wobblefrost" if place == sizes.stores - 1 else "")
                file = Client(server, self.owner(place)).upload(f"real-{number}.md", self.texts.file(sizes.of_file, secret))
                files.append((place, file))
                self.uploaded.setdefault(place, []).append(file)
            self.secret_file = files[0][1]
            row(f"upload of {len(files)} files", f"{time.monotonic() - began:.1f} s")
            quiet = files[:len(files) * 3 // 4] if kills else files
            began, used_s, front_s = time.monotonic(), server.processor_s(), sum(server.front.cpu_times()[:2])
            self.add(server, quiet)
            self.wait_completed(server)
            took_s = time.monotonic() - began
            windows = len(quiet) * sizes.of_file
            row(f"ingest of {windows:,} windows, embedded for real", f"{windows / took_s:.0f} windows/s ({took_s:.0f} s); "
                f"{1e3 * (server.processor_s() - used_s) / windows:.1f} ms of processors a window, {1e3 * (sum(server.front.cpu_times()[:2]) - front_s) / windows:.1f} of the front")
            row("database after that", f"{self.path.stat().st_size >> 20} MB, -wal {self.wal() >> 20} MB")
            if not kills:
                return
            self.add(server, files[len(quiet):])
            self.seen = self.all_completed(server)
            before = time.monotonic()
            self.kill_at(server, 0)
        for count in range(1, kills + 1):
            with serving(self.folder, self.path) as server:
                if lost := self.seen - self.all_completed(server):
                    fail(f"kill {count} has lost {len(lost)} completed files")
                if count < kills:
                    self.kill_at(server, count)
                else:
                    self.wait_completed(server)
        row(f"{kills} times kill -9 in mid-ingest", f"all {len(files)} files completed in the end, none that was reported lost; {time.monotonic() - before:.0f} s")

    def kill_at(self, server, count):
        """Kill the server at a random moment after the next file. A file during which it was killed five times is given up."""
        wait_for(lambda: len(self.all_completed(server)) > len(self.seen), "no file was ingested", pause_s=0.5)
        time.sleep(random.Random(count).random() * 2)
        self.seen = self.all_completed(server)
        kill(server)

    def add(self, server, files):
        for place in range(self.sizes.stores):
            ids = [file for at, file in files if at == place]
            if ids:
                Client(server, self.owner(place))(f"/v1/vector_stores/{self.stores[place]}/file_batches", {"file_ids": ids})

    def all_completed(self, server):
        return {file for place, store in enumerate(self.stores) for file in Client(server, self.owner(place)).completed(store)}

    def wait_completed(self, server):
        def over():
            found = [Client(server, self.owner(place)).counts(store) for place, store in enumerate(self.stores)]
            if any(each["failed"] for each in found):
                fail(f"files have failed: {found}")
            return not any(each["in_progress"] for each in found)
        wait_for(over, "files are still in progress", pause_s=1)

    def wal(self):
        beside = self.path.with_name(self.path.name + "-wal")
        return beside.stat().st_size if beside.exists() else 0

    def check_whole(self):
        """Each file has all of its parts once."""
        connection = sqlite3.connect(self.path)
        wrong = connection.execute(
            "SELECT COUNT(*) FROM knowledge_files AS f WHERE status = 'completed' AND deleted = 0 AND (passages != (SELECT COUNT(*) FROM knowledge_passages "
            "AS p WHERE p.file = f.number) OR windows != (SELECT COUNT(*) FROM knowledge_windows AS w WHERE w.file = f.number))").fetchone()[0]
        counted = {status: count for status, count in connection.execute("SELECT status, COUNT(*) FROM knowledge_files WHERE deleted = 0 GROUP BY status")}
        for number, passages in connection.execute("SELECT store, COUNT(*) FROM knowledge_passages GROUP BY store").fetchall():
            words = connection.execute(f"SELECT COUNT(*) FROM {words_table(number)}_docsize").fetchone()[0]
            wrong += words != passages
            connection.execute(f"INSERT INTO {words_table(number)} ({words_table(number)}, rank) VALUES ('integrity-check', 0)")
        broken = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        connection.close()
        if wrong or broken != "ok" or set(counted) != {"completed"}:
            fail(f"{wrong} files or stores are not whole; {counted}; {broken}")
        return counted["completed"]

    def made(self):
        """Fill the database up to its size."""
        sizes, began = self.sizes, time.monotonic()
        connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute("PRAGMA synchronous = OFF")
        rows = connection.execute("SELECT number, id, owner, embedder FROM knowledge_stores ORDER BY number").fetchall()
        texts, source = Texts(2), numpy.random.default_rng(3)
        of_store = sizes.windows // sizes.stores
        passage = connection.execute("SELECT MAX(number) FROM knowledge_passages").fetchone()[0]
        for number, name, owner, embedder in rows:
            count = (of_store - connection.execute("SELECT windows FROM knowledge_stores WHERE number = ?", (number,)).fetchone()[0]) // sizes.of_file
            secret = " wobblefrost" if owner == rows[-1][2] else ""
            for first in range(0, count, 20):
                connection.execute("BEGIN")
                for file in range(first, min(first + 20, count)):
                    passage = self.make_file(connection, number, owner, embedder, f"{name}-{file}", passage, texts, source, secret)
                connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        files = self.check_whole()
        row(f"made: {sizes.windows:,} windows of {files:,} files in {sizes.stores} stores", f"{self.path.stat().st_size >> 20:,} MB, {time.monotonic() - began:.0f} s")

    def make_file(self, connection, store, owner, embedder, name, passage, texts, source, secret):
        sizes = self.sizes
        vectors = source.standard_normal((sizes.of_file, 384), dtype=numpy.float32)
        vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
        scales = numpy.abs(vectors).max(1) / 127
        numbers = numpy.rint(vectors / scales[:, None]).astype(numpy.int8)
        parts = [texts.passage(60) + secret for _ in range(sizes.of_file // 2)]
        content = "\n\n".join(parts).encode()
        size = sum(map(len, parts)) + sizes.of_file * 392
        kept = connection.execute("INSERT INTO files (name, owner, filename, purpose, created, state, bytes) VALUES (?, ?, ?, 'assistants', 1, 1, ?)",
                                  (f"file-{name}", owner, f"{name}.txt", len(content))).lastrowid
        connection.execute("INSERT INTO lines (file, number, text) VALUES (?, 1, ?)", (kept, content))
        file = connection.execute("INSERT INTO knowledge_files (store, file, filename, status, chunking, created, passages, windows, bytes, tokens) "
                                  "VALUES (?, ?, ?, 'completed', '{\"type\": \"auto\"}', 1, ?, ?, ?, ?)",
                                  (store, f"file-{name}", f"{name}.txt", len(parts), sizes.of_file, size, 90 * len(parts))).lastrowid
        first = passage + 1
        connection.executemany("INSERT INTO knowledge_passages (number, store, file, place, heading, start, tokens, text) VALUES (?, ?, ?, ?, '', 0, 90, ?)",
                               [(first + place, store, file, place, text) for place, text in enumerate(parts)])
        connection.executemany(f"INSERT INTO {words_table(store)} (rowid, heading, text) VALUES (?, '', ?)", [*enumerate(parts, first)])
        connection.executemany("INSERT INTO knowledge_windows (store, file, passage, embedder, vector, scale) VALUES (?, ?, ?, ?, ?, ?)",
                               [(store, file, first + index // 2, embedder, numbers[index].tobytes(), float(scales[index])) for index in range(sizes.of_file)])
        return passage + len(parts)

    def start(self, server):
        row("start: until /health answers", f"{server.ready_s:.1f} s")
        row("memory after the start (front, vectors, workers)", "{front}, {vectors}, {workers} MB".format(**memory(server)))
        for place, store in enumerate(self.stores):
            took_ms = Client(server, self.owner(place)).search_ms(store, self.texts.question())
            row(f"first search of store {place + 1}", f"{took_ms:,.0f} ms")
        row("memory after a search of each store", "{front}, {vectors}, {workers} MB".format(**memory(server)))

    def search(self, server):
        def search(number):
            place = number % len(self.stores)
            return Client(server, self.owner(place)).search_ms(self.stores[place], self.texts.question())

        def searches():
            return timed(self.sizes, search)

        row("search of one store, alone", spread(searches()))
        row("search of all five, alone", asyncio.run(self.all_at_once()))
        with chats(server, 1) as tokens:
            before, began = len(tokens), time.monotonic()
            time.sleep(5)
            single = (len(tokens) - before) / (time.monotonic() - began)
        with chats(server) as tokens:
            before, began = len(tokens), time.monotonic()
            time.sleep(5)
            quiet = (len(tokens) - before) / (time.monotonic() - began)
            before, began = len(tokens), time.monotonic()
            found = spread(searches())
            beside = (len(tokens) - before) / (time.monotonic() - began)
            row(f"search of one store, beside {CHATS} chats", found)
            row(f"tokens/s of a chat; of the {CHATS} chats together; of these beside the searches", f"{single:.0f}; {quiet:.0f}; {beside:.0f}")
            row(f"search of all five, beside {CHATS} chats", asyncio.run(self.all_at_once()))
        row("memory after all searches", "{front}, {vectors}, {workers} MB".format(**memory(server)))

    async def all_at_once(self):
        connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        numbers, embedder = zip(*connection.execute("SELECT number, embedder FROM knowledge_stores ORDER BY number"))
        connection.close()
        known = Known()
        search = Search(self.path, known, VectorScanner(self.path))
        try:
            await search.scanner.nearest(Scan(numbers, embedder[0], await known.vector(), 50))     # reads all windows
            scans_ms, finds_ms, used_s = [], [], []
            ends_s = time.monotonic() + ROUNDS_S
            while len(finds_ms) < self.sizes.rounds and time.monotonic() < ends_s:
                began = time.perf_counter()
                await search.scanner.nearest(Scan(numbers, embedder[0], await known.vector(), 50))
                scans_ms.append(1e3 * (time.perf_counter() - began))
                began, used = time.perf_counter(), time.process_time()
                await search.find(numbers, [self.texts.question()], Asker("", ""))
                finds_ms.append(1e3 * (time.perf_counter() - began))
                used_s.append(1e3 * (time.process_time() - used))
            return f"{spread(finds_ms)}, of it vectors {spread(scans_ms)}; processor without vectors {spread(used_s)}"
        finally:
            await search.close()

    def has(self, word):
        """Do the database or the -wal have a word? Read, not mapped: the server makes them shorter meanwhile.

        An index of words leaves out what a word has in common with the one before it: the end is looked for."""
        word = word[2:]
        for path in self.path, self.path.with_name(self.path.name + "-wal"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                end = b""
                while block := file.read(1 << 24):
                    if word in end + block:
                        return True
                    end = block[-len(word):]
        return False

    def delete(self, server):
        if not all(map(self.has, (b"zyxophon", b"quaverly", b"wobblefrost"))):
            fail("a secret word is not in the database before it is deleted")
        ann, bob = Client(server, "ann"), Client(server, "bob")
        began = time.monotonic()
        ann(f"/v1/files/{self.secret_file}", method="DELETE")
        row("DELETE of one file answers", f"{1e3 * (time.monotonic() - began):.0f} ms")
        wait_for(lambda: not self.has(b"zyxophon"), "words of a deleted file are still there", pause_s=0.5)
        row("until no word of it is in the database and its -wal", f"{time.monotonic() - began:.1f} s")
        began = time.monotonic()
        bob(f"/v1/vector_stores/{self.stores[-1]}", method="DELETE")
        row("DELETE of an owner's store answers", f"{1e3 * (time.monotonic() - began):.0f} ms")
        took_ms = []
        while files := bob("/v1/files?limit=1000")["data"]:
            for file in files:
                before = time.perf_counter()
                bob(f"/v1/files/{file['id']}", method="DELETE")
                took_ms.append(1e3 * (time.perf_counter() - before))
        row(f"DELETE of each of its {len(took_ms):,} files", spread(took_ms))
        took_ms = []
        over = threading.Event()

        def search_on():
            while not over.is_set():
                took_ms.append(ann.search_ms(self.stores[0], self.texts.question()))

        searcher = threading.Thread(target=search_on)
        searcher.start()
        try:
            wait_for(lambda: not self.has(b"wobblefrost"), "words of a deleted owner are still there", pause_s=2)
        finally:
            over.set()
            searcher.join()
        row("until no word of that owner is in the database and its -wal, from the first DELETE on", f"{time.monotonic() - began:.1f} s")
        row("searches of another store meanwhile", spread(took_ms))
        if not self.has(b"quaverly"):
            fail("a word of another file is gone")


class Known:
    """Stands in for the served models: vectors are random."""

    def __init__(self):
        self.random = numpy.random.default_rng(4)

    def embedder(self, digest):
        self.digest = digest
        return self

    def reranker(self):
        return None

    async def vector(self, *asked):
        vector = self.random.standard_normal(384).astype(numpy.float32)
        return (vector / numpy.linalg.norm(vector)).tobytes()


def disk(sizes):
    """A disk that is filled up while files are ingested."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as outside:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sizes.disk_mb}m", "none", folder], capture_output=True).returncode:
            row("full disk", "not measured: this user cannot mount a tmpfs")
            return
        ballast, texts = Path(folder) / "ballast", Texts(5)
        try:
            with serving(outside, Path(folder) / "kept.db") as server:
                ann = Client(server, "ann")
                files = [ann.upload(f"{number}.md", texts.file(40)) for number in range(12)]
                store = ann("/v1/vector_stores", {"file_ids": files})["id"]
                wait_for(lambda: ann.counts(store)["completed"], "no file was ingested")
                with contextlib.suppress(OSError), ballast.open("wb", 0) as file:
                    while True:
                        file.write(bytes(1 << 20))
                refused = wait_for(lambda: (found := ann.status(f"/v1/vector_stores/{store}/files", {"file_id": files[0]}))[0] != 200 and found, "nothing was refused")
                completed = ann.completed(store)
                searched = ann.status(f"/v1/vector_stores/{store}/search", {"query": "water"})[0]
                answered = ann.status("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})[0]
                row("on a full disk: adding a file; a search; a chat", f"{refused[0]} {refused[1][:160]!r}; {searched}; {answered}")
                time.sleep(8)
                if lost := completed - ann.completed(store):
                    fail(f"{len(lost)} completed files are gone on a full disk")
                kill(server)
            with contextlib.ExitStack() as stack:
                try:
                    server = stack.enter_context(serving(outside, Path(folder) / "kept.db"))
                    row("a start on the full disk, after kill -9", "works")
                except Exception as error:
                    row("a start on the full disk, after kill -9", f"refused: {str(error).strip().splitlines()[-1][:160]}")
                    ballast.unlink()
                    server = stack.enter_context(serving(outside, Path(folder) / "kept.db"))
                ballast.unlink(missing_ok=True)
                ann = Client(server, "ann")
                if lost := completed - ann.completed(store):
                    fail(f"{len(lost)} completed files were lost on a full disk")
                began = time.monotonic()
                wait_for(lambda: not (found := ann.counts(store))["in_progress"] and found, "files are still in progress", 300)
                counts = ann.counts(store)
                if counts["completed"] != len(files):
                    fail(f"not all files were completed after the disk was emptied: {counts}")
                row("after it was emptied", f"all {len(files)} files are completed within {time.monotonic() - began:.0f} s")
        finally:
            subprocess.run(["umount", folder], check=True)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", help="keep the database here; one that is there is measured without ingest, kills and made")
    parser.add_argument("--real-files", type=int, help="files that are embedded for real (default: 200, with --small 20)")
    parser.add_argument("--of-file", type=int, help="windows of a file (default: 100, with --small 10)")
    parser.add_argument("--kills", type=int, help="default: 5, with --small 1")
    parser.add_argument("--skip", default="", help="of kills, search, delete, disk")
    options = parser.parse_args(words)
    sizes = SMALL if options.small else FULL
    sizes = sizes._replace(real_files=options.real_files or sizes.real_files, of_file=options.of_file or sizes.of_file, kills=options.kills or sizes.kills)
    skipped = options.skip.split(",")
    began = time.monotonic()
    print("| what | figure |\n|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        load = Load(sizes, options.folder or temporary)
        if load.path.exists():
            connection = sqlite3.connect(load.path)
            load.stores = [name for (name,) in connection.execute("SELECT id FROM knowledge_stores ORDER BY number")]
            load.secret_file = connection.execute("SELECT file FROM knowledge_files WHERE filename = 'real-0.md'").fetchone()[0]
            connection.close()
        else:
            load.ingest(0 if "kills" in skipped else sizes.kills)
            load.check_whole()
            load.made()
        with serving(load.folder, load.path) as server:
            load.start(server)
            if "search" not in skipped:
                load.search(server)
            if "delete" not in skipped:
                load.delete(server)
    if "disk" not in skipped:
        disk(sizes)
    row("all of it", f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
