#!/usr/bin/env python3
"""How long a search takes over many windows: the process of vectors alone, and a whole search with words.

    python bench/knowledge_scale.py [--windows 10000,100000,1000000] [--rounds 100]

Vectors of 384 numbers are random with a seed, 100 windows a file and two a passage; a passage has 60 words of 30,000 whose frequencies fall
as in texts. Stores have at most 200,000 windows, so a million are in five, which one scan compares. The question's vector is random too:
an embedder's time is not in these figures. Processor time is that of the process of vectors for a scan, and that of all else (words, joining,
reading the passages) for a search; on a busy machine only it means anything. `first` is the first scan, which starts the process and reads the windows from the disk.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests/support")]

import knowledge_rows
from chatlm.common.messages.vectors import Scan
from chatlm.front.knowledge.asking import Asker
from chatlm.front.knowledge.scan import VectorScanner
from chatlm.front.knowledge.search import Search
from chatlm.front.knowledge.tables import words_table

SIZE, OF_STORE, OF_FILE = 384, 200_000, 100


def unit(source, count):
    vectors = source.standard_normal((count, SIZE), dtype=numpy.float32)
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def fill(path, windows):
    """Stores with so many windows; their numbers."""
    knowledge_rows.make_database(path)
    embedder = knowledge_rows.add_embedder(path, "random", SIZE)
    stores = [knowledge_rows.add_store(path, embedder) for _ in range(-(-windows // OF_STORE))]
    source, words = numpy.random.default_rng(1), random.Random(1)
    vocabulary = [f"w{number}" for number in range(30_000)]
    weights = list(numpy.cumsum([1 / (number + 3) for number in range(30_000)]))
    connection = knowledge_rows.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    passage = 0
    for file in range(windows // OF_FILE):
        store = stores[file * OF_FILE // OF_STORE]
        vectors = unit(source, OF_FILE)
        scales = numpy.abs(vectors).max(1) / 127
        numbers = numpy.rint(vectors / scales[:, None]).astype(numpy.int8)
        connection.execute("BEGIN")
        connection.execute("INSERT INTO knowledge_files (store, file, filename, status, chunking, created, passages, windows) "
                           "VALUES (?, ?, 'x', 'completed', '{}', 0, ?, ?)", (store, f"file-{file}", OF_FILE // 2, OF_FILE))
        texts = [" ".join(words.choices(vocabulary, cum_weights=weights, k=60)) for _ in range(OF_FILE // 2)]
        first, passage = passage + 1, passage + len(texts)
        connection.executemany("INSERT INTO knowledge_passages (number, store, file, place, heading, start, tokens, text) "
                               "VALUES (?, ?, ?, ?, '', 0, 60, ?)",
                               [(first + place, store, file + 1, place, text) for place, text in enumerate(texts)])
        connection.executemany(f"INSERT INTO {words_table(store)} (rowid, heading, text) VALUES (?, '', ?)", [*enumerate(texts, first)])
        connection.executemany("INSERT INTO knowledge_windows (store, file, passage, embedder, vector, scale) VALUES (?, ?, ?, ?, ?, ?)",
                               [(store, file + 1, first + index // 2, embedder, numbers[index].tobytes(), float(scales[index]))
                                for index in range(OF_FILE)])
        connection.execute("COMMIT")
    connection.close()
    return stores


class Embedder:
    """Stands in for the served models."""

    digest = "random"

    def __init__(self):
        self.source = numpy.random.default_rng(2)

    def embedder(self, digest):
        return self

    def reranker(self):
        return None

    async def vector(self, chosen, question, asker):
        return unit(self.source, 1)[0].tobytes()


def line(name, took_ms):
    took_ms = sorted(took_ms)
    return f"{name} {took_ms[len(took_ms) // 2]:.1f} / {took_ms[int(len(took_ms) * 0.99)]:.1f} ms"


async def measure(path, stores, rounds):
    models = Embedder()
    search = Search(path, models, VectorScanner(path))
    words = random.Random(3)

    async def scan():
        began = time.perf_counter()
        await search.scanner.nearest(Scan(tuple(stores), 1, await models.vector(None, "", None), 50))
        return 1e3 * (time.perf_counter() - began)

    async def find():
        question = " ".join(f"w{int(30_000 ** words.random())}" for _ in range(10))
        began = time.perf_counter()
        await search.find(stores, [question], Asker("", ""))
        return 1e3 * (time.perf_counter() - began)

    first = await scan()
    process = psutil.Process(search.scanner.process.pid)
    before = process.cpu_times()
    scans = [await scan() for _ in range(rounds)]
    after = process.cpu_times()
    scan_ms = 1e3 * (after.user + after.system - before.user - before.system) / rounds
    before_s = time.process_time()
    finds = [await find() for _ in range(rounds)]
    find_ms = 1e3 * (time.process_time() - before_s) / rounds
    memory = process.memory_info().rss >> 20
    await search.close()
    return first, scans, finds, scan_ms, find_ms, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", default="10000,100000,1000000")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    for windows in map(int, options.windows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kept.db"
            began = time.monotonic()
            stores = fill(path, windows)
            made_s = time.monotonic() - began
            first, scans, finds, scan_ms, find_ms, memory = asyncio.run(measure(path, stores, options.rounds))
            print(f"{windows:,} windows in {len(stores)} stores ({path.stat().st_size >> 20:,} MB, made in {made_s:.0f} s): first {first:.0f} ms; "
                  f"p50 / p99 of {line('the scan', scans)}, {line('a search with words', finds)}; processor ms {scan_ms:.1f} + {find_ms:.1f}; the process has {memory:,} MB", flush=True)


if __name__ == "__main__":
    main()
