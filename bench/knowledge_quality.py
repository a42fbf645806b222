#!/usr/bin/env python3
"""How often a search finds the passage with the answer: chat_server's, its halves alone, and open-webui's defaults.

    python bench/knowledge_quality.py [--embedder FOLDER] [--misses]

The forty documents and three hundred questions of bench/knowledge_set.py go into a vector store of a real server, over HTTP. A question
counts as answered at k if one of the first k passages is of the right document and has the whole sentence that answers it. Rows:

  ours                  POST /v1/vector_stores/{id}/search
  vectors alone         the scan of the same windows
  words, a quarter      BM25 over the question's words that at most a quarter of the passages have
  words, all            BM25 over all of its words
  RRF with all words    vectors joined with the row before: what plain hybrid search does
  open-webui            its defaults made again here: Markdown is split at headings, then into 1,000 characters with an overlap of 100
                        (langchain's recursive splitter), each part embedded whole by the same model, cosines, top 3

`characters` is what the first k passages hold together, on average: what an answer's prompt would pay.
"""

import argparse
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

import knowledge_set
from chatlm.common.messages.vectors import Scan
from chatlm.front.knowledge import words
from chatlm.front.knowledge.search import join
from chatlm.worker.vectors.process import scanned
from chatlm.worker.vectors.windows import Windows
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
    """Markdown at its headings, each part with its own."""
    return [part.strip() for part in re.split(r"(?m)^(?=#{1,6} )", text) if part.strip()]


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
    return [each.passage for each in words.ranked(connection, store, words.words_of(question), 50, False)]


def telling(connection, store, question):
    found = words.telling_words(connection, store, words.words_of(question))
    return [each.passage for each in words.ranked(connection, store, found, 50, False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default=MINILM, help="a model that embeds texts (default: the default embedder)")
    parser.add_argument("--misses", action="store_true", help="also show which questions are not answered at 10")
    options = parser.parse_args()
    documents, questions = knowledge_set.documents(), knowledge_set.questions()
    with tempfile.TemporaryDirectory() as folder, our_server(options.embedder, "--database", f"{folder}/kept.db") as server:
        store, ingest_s = store_of(server, documents)
        rows = {name: Row(name) for name in ("ours", "vectors alone", "words, a quarter", "words, all", "RRF with all words", "open-webui")}
        asked = vectors_of(server, [question.text for question in questions], "query")
        with sqlite3.connect(f"file:{folder}/kept.db?mode=ro", uri=True) as connection:
            number, embedder = connection.execute("SELECT number, embedder FROM knowledge_stores").fetchone()
            passages = dict(connection.execute(
                "SELECT p.number, f.filename || char(0) || p.text FROM knowledge_passages AS p JOIN knowledge_files AS f ON f.number = p.file"))
            windows = Windows(Path(folder) / "kept.db", 1 << 30)

            def shown(ranks):
                return [tuple(passages[each].split("\0", 1)) for each in ranks]

            took = []
            for question, vector in zip(questions, asked):
                began = time.monotonic()
                found = server.post(f"/v1/vector_stores/{store}/search", {"query": question.text, "max_num_results": 10})
                took.append(1e3 * (time.monotonic() - began))
                rows["ours"].count(question, [(hit["filename"], hit["content"][0]["text"]) for hit in found["data"]])
                nearest = [near.passage for near in scanned(windows, Scan((number,), embedder, vector.tobytes(), 50)).nearest]
                everything = all_words(connection, number, question.text)
                joined, _ = join([(1.0, everything), (1.0, nearest)], [])
                rows["vectors alone"].count(question, shown(nearest))
                rows["words, a quarter"].count(question, shown(telling(connection, number, question.text)))
                rows["words, all"].count(question, shown(everything))
                rows["RRF with all words"].count(question, shown(sorted(joined, key=lambda each: (-joined[each], each))))
            count = len(passages)
        parts = [(file, part) for file, text in documents for headed in headed_parts(text) for part in recursive_parts(headed)]
        theirs = vectors_of(server, [part for _, part in parts], "document")
        for question, vector in zip(questions, asked):
            order = numpy.argsort(-(theirs @ vector), kind="stable")
            rows["open-webui"].count(question, [parts[index] for index in order[:10]])
    print(f"{len(documents)} documents, {sum(len(text) for _, text in documents):,} characters, {count} passages in {ingest_s:.1f} s, "
          f"{len(parts)} parts of open-webui; {len(questions)} questions")
    print(f"a search over HTTP: median {statistics.median(took):.1f} ms, p99 {sorted(took)[int(len(took) * 0.99)]:.1f} ms\n")
    print("| | recall@1 | recall@3 | recall@10 | characters at 3 | at 10 |\n|---|---|---|---|---|---|")
    for row in rows.values():
        print(row.line(len(questions)))
        if options.misses:
            print(*(f"    {each}" for each in row.missed), sep="\n")


if __name__ == "__main__":
    main()
