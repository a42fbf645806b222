#!/usr/bin/env python3
"""How often a search finds the passage with the answer: chat_server's, its halves alone, and open-webui's defaults.

    python bench/knowledge_quality.py [--held-out] [--embedder FOLDER] [--misses]

The forty documents of bench/knowledge_set.py go into a vector store of a real server, over HTTP. It is asked three hundred questions in other
words than those of the documents, and forty that name the fact itself. With --held-out it is the 26 documents and 130 questions of bench/held_out/, with
which nothing was chosen. A question counts as answered at k if one of the first k passages is of the right document and has the whole sentence that answers it. Rows:

  ours                  POST /v1/vector_stores/{id}/search
  vectors alone         the scan of the same windows
  words, a quarter      BM25 over the question's words that at most a quarter of the passages have
  words, all            BM25 over all of its words
  RRF, a quarter        vectors joined with BM25's order of the words that a quarter has: ours orders those with the same words by vectors
  RRF, all words        vectors joined with BM25 over all words: what plain hybrid search does
  ours, vectors 3 : 1   ours, with three times the weight for vectors when lists are joined; so 2 : 1, and 1 : 3 for words
  worth reading         what a chat is given to read: of the first 8 of ours those that are not far below the best
  open-webui            its defaults made again here: Markdown is split at headings, then into 1,000 characters with an overlap of 100
                        (langchain's recursive splitter), each part embedded whole by the same model, cosines, top 3

`characters` is what the first k passages hold together, on average: what an answer's prompt would pay.
"""

import argparse
import asyncio
import json
import re
import sqlite3
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import knowledge_held_out
import knowledge_set
from chatlm.front.annexes.knowledge import words
from chatlm.front.annexes.knowledge.asking import Asker
from chatlm.front.annexes.knowledge.scan import VectorScanner
from chatlm.front.annexes.knowledge.search import Search, Terms, join
from chatlm.front.annexes.knowledge.vectors.messages import Scan
from chatlm.front.annexes.knowledge.vectors.process import scanned
from chatlm.front.annexes.knowledge.vectors.windows import Windows
from servers import our_server

AT = 1, 3, 10
MINILM = Path.home() / ".cache/chat_server/all-MiniLM-L6-v2"


def form(fields, name, data):
    """A form with one file, and its type."""
    mark = uuid.uuid4().hex
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()]
    parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n')
    return "".join(parts).encode() + data + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def upload(url, name, text):
    body, kind = form({"purpose": "assistants"}, name, text.encode())
    request = urllib.request.Request(url + "/v1/files", body, {"Content-Type": kind})
    return json.load(urllib.request.urlopen(request))["id"]


def store_of(server, documents):
    """The id of a vector store with these documents, once all are in it; and the seconds that took."""
    files = [upload(server.url, *document) for document in documents]
    began = time.monotonic()
    store = server.post("/v1/vector_stores", {"name": "quality", "file_ids": files})["id"]
    while (body := json.load(urllib.request.urlopen(f"{server.url}/v1/vector_stores/{store}")))["file_counts"]["in_progress"]:
        time.sleep(0.05)
    if body["file_counts"]["completed"] != len(files):
        sys.exit(f"not all files were ingested: {body['file_counts']}")
    return store, time.monotonic() - began


def vectors_of(server, texts, kind):
    found = []
    for begin in range(0, len(texts), 64):
        body = server.post("/v1/embeddings", {"input": texts[begin:begin + 64], "input_type": kind, "truncate_prompt_tokens": -1})
        found += [each["embedding"] for each in body["data"]]
    return numpy.array(found, numpy.float32)


def headed_parts(text):
    """Markdown at its headings, each part with its own. A heading without a text goes with the next, as in langchain's splitter."""
    parts = []
    for part in re.split(r"(?m)^(?=#{1,6} )", text):
        if parts and re.fullmatch(r"(#{1,6} .*\s*)+", parts[-1]):
            parts[-1] += part
        elif part.strip():
            parts.append(part)
    return [part.strip() for part in parts]


def recursive_parts(text, size=1000, overlap=100, separators=("\n\n", "\n", " ", "")):
    """What langchain's RecursiveCharacterTextSplitter makes of a text."""
    separator = next(each for each in separators if each == "" or each in text)
    rest = separators[separators.index(separator) + 1:]
    pieces = [*text] if separator == "" else [each for each in re.split(f"(?={re.escape(separator)})", text) if each]
    parts, run = [], []
    for piece in pieces:
        if len(piece) > size and rest:
            parts += ["".join(run)] if run else []
            run = []
            parts += recursive_parts(piece, size, overlap, rest)
            continue
        if run and sum(map(len, run)) + len(piece) > size:
            parts.append("".join(run))
            while run and (sum(map(len, run)) > overlap or sum(map(len, run)) + len(piece) > size):
                run.pop(0)
        run.append(piece)
    return [each.strip() for each in [*parts, "".join(run)] if each.strip()]


class Row:
    """The figures of one way to search."""

    def __init__(self, name):
        self.name, self.found, self.characters, self.missed = name, dict.fromkeys(AT, 0), dict.fromkeys(AT, 0), []

    def count(self, question, hits):
        """hits: (file name, text), the best first."""
        for most in AT:
            answered = any(file == question.file and question.answer in text for file, text in hits[:most])
            self.found[most] += answered
            self.characters[most] += sum(len(text) for _, text in hits[:most])
        if not answered:
            self.missed.append(question.text)

    def line(self, count):
        shares = " | ".join(f"{self.found[most] / count:.3f}" for most in AT)
        return f"| {self.name} | {shares} | {self.characters[3] / count:,.0f} | {self.characters[10] / count:,.0f} |"


def all_words(connection, store, question):
    every = [words.QuestionWord(each, 1.0) for each in words.words_of(question)]
    return [each.passage for each in words.ranked(connection, store, every, 50, False)]


def telling(connection, store, passages, question):
    found = words.telling_words(connection, store, passages, words.words_of(question))
    return [each.passage for each in words.ranked(connection, store, found, 50, False)]


class Known:
    """Stands in for the served models: the question's vector is known."""

    vector_of_question = b""

    def embedder(self, digest):
        self.digest = digest
        return self

    def reranker(self):
        return None

    async def vector(self, chosen, question, asker):
        return self.vector_of_question


class Place:
    """A store of the server, as its parts see it."""

    def __init__(self, server, folder, documents):
        self.server = server
        self.store, self.ingest_s = store_of(server, documents)
        self.connection = sqlite3.connect(f"file:{folder}/kept.db?mode=ro", uri=True)
        self.number, self.embedder = self.connection.execute("SELECT number, embedder FROM knowledge_stores").fetchone()
        self.passages = {number: (file, text) for number, file, text in self.connection.execute(
            "SELECT p.number, f.filename, p.text FROM knowledge_passages AS p JOIN knowledge_files AS f ON f.number = p.file")}
        self.windows = Windows(Path(folder) / "kept.db", 1 << 30)
        self.loop, self.known = asyncio.new_event_loop(), Known()
        self.search = Search(Path(folder) / "kept.db", self.known, VectorScanner(Path(folder) / "kept.db"))
        self.parts = [(file, part) for file, text in documents for headed in headed_parts(text) for part in recursive_parts(headed)]
        self.theirs = vectors_of(server, [part for _, part in self.parts], "document")
        self.took_ms = []

    def rows(self, questions):
        rows = {}
        vectors = vectors_of(self.server, [question.text for question in questions], "query")
        for question, vector in zip(questions, vectors):
            for name, hits in self.hits(question.text, vector):
                rows.setdefault(name, Row(name)).count(question, hits)
        return list(rows.values())

    def close(self):
        self.loop.run_until_complete(self.search.close())
        self.loop.close()

    def hits(self, question, vector):
        began = time.monotonic()
        found = self.server.post(f"/v1/vector_stores/{self.store}/search", {"query": question, "max_num_results": 10})
        self.took_ms.append(1e3 * (time.monotonic() - began))
        nearest = [near.passage for near in scanned(self.windows, Scan((self.number,), self.embedder, vector.tobytes(), 50)).nearest]
        some, every = telling(self.connection, self.number, len(self.passages), question), all_words(self.connection, self.number, question)
        yield "ours", [(hit["filename"], hit["content"][0]["text"]) for hit in found["data"]]
        self.known.vector_of_question = vector.tobytes()
        for name, terms in (("ours, vectors 3 : 1", Terms(vector_weight=3.0)), ("ours, vectors 2 : 1", Terms(vector_weight=2.0)),
                            ("ours, vectors 1 : 3", Terms(words_weight=3.0)), ("worth reading", Terms(8, threshold=None))):
            searched = self.loop.run_until_complete(self.search.find([self.number], [question], Asker("", ""), terms))
            yield name, [(hit.filename, hit.text) for hit in searched.hits]
        for name, ranks in ("vectors alone", nearest), ("words, a quarter", some), ("words, all", every):
            yield name, [self.passages[each] for each in ranks]
        for name, ranks in ("RRF, a quarter", some), ("RRF, all words", every):
            joined, _ = join([(1.0, ranks), (1.0, nearest)], [])
            yield name, [self.passages[each] for each in sorted(joined, key=lambda each: (-joined[each], each))]
        order = numpy.argsort(-(self.theirs @ vector), kind="stable")
        yield "open-webui", [self.parts[index] for index in order[:10]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default=MINILM, help="a model that embeds texts (default: the default embedder)")
    parser.add_argument("--held-out", action="store_true", help="ask the second set, with which nothing was chosen")
    parser.add_argument("--misses", action="store_true", help="also show which questions are not answered at 10")
    options = parser.parse_args()
    documents = (knowledge_held_out if options.held_out else knowledge_set).documents()
    sets = {"questions": knowledge_held_out.questions()} if options.held_out else {
        "questions": knowledge_set.questions(), "lookups": knowledge_set.lookups()}
    with tempfile.TemporaryDirectory() as folder, our_server(options.embedder, "--database", f"{folder}/kept.db") as server:
        place = Place(server, folder, documents)
        print(f"{len(documents)} documents, {sum(len(text) for _, text in documents):,} characters, {len(place.passages)} passages in "
              f"{place.ingest_s:.1f} s, {len(place.parts)} parts of open-webui")
        for name, questions in sets.items():
            print(f"\n| {len(questions)} {name} | recall@1 | recall@3 | recall@10 | characters at 3 | at 10 |\n|---|---|---|---|---|---|")
            for row in place.rows(questions):
                print(row.line(len(questions)))
                if options.misses:
                    print(*(f"    {each}" for each in row.missed), sep="\n")
        place.close()
        took = sorted(place.took_ms)
        print(f"\na search over HTTP: median {statistics.median(took):.1f} ms, p99 {took[int(len(took) * 0.99)]:.1f} ms")


if __name__ == "__main__":
    main()
