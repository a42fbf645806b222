#!/usr/bin/env python3
"""How many questions about documents a real model answers right, and cites right.

    python bench/knowledge_answers.py --out FILE [--model NAME] [--ways search,passage,auto] [--most N]

Twenty documents of bench/held_out/ go into a vector store of a real server, which serves a real model (tests/support/real_models.py: qwen-1.5b,
qwen-0.5b) and the default embedder. The model is asked forty questions, each in a conversation of its own, with temperature 0 and at most 60 tokens:

  search     POST /v1/chat/completions with `knowledge`, mode search: passages that the server finds
  passage    the same words, but only with the passage that has the answer: what the model can do if the search is perfect
  auto       with `knowledge`, mode auto: all twenty documents, if they fit into the prompt

An answer is right if it says the word or number that stands in one of the documents only. It is cited right if one of its [n] is a passage of the right
document, and the passage itself if that has the sentence with the answer. Each verdict is a line of FILE, which is appended to: what is there is not
asked again. So it goes on after a break. Without questions that are left it only shows the table."""

import argparse
import json
import re
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests/support")]

import knowledge_held_out
from chatlm.front.annexes.knowledge.prompting import PASSAGES, QUESTION
from knowledge_quality import MINILM, store_of
from real_models import REAL_MODELS, real_model
from servers import our_server

WAYS = "search", "passage", "auto"
MARK = re.compile(r"\[(\d+)\]")


def passages_of(folder):
    """(file name, heading, text) of each passage of the server's database."""
    connection = sqlite3.connect(f"file:{folder}/kept.db?mode=ro", uri=True)
    return connection.execute("SELECT f.filename, p.heading, p.text FROM knowledge_passages AS p JOIN knowledge_files AS f "
                              "ON f.number = p.file ORDER BY p.number").fetchall()


def asked(server, model, store, passages, question, way):
    """The verdict on an answer."""
    body = {"model": model, "messages": [{"role": "user", "content": question.text}], "max_tokens": 60, "temperature": 0}
    if way == "passage":
        file, heading, text = next(each for each in passages if each[0] == question.file and question.answer in each[2])
        named = f"{file}: {heading}" if heading else file
        body["messages"][0]["content"] = f"{PASSAGES}\n\n[1] {named}\n{text}\n\n{QUESTION}{question.text}"
    else:
        body["knowledge"] = {"stores": [store], "mode": way}
    began = time.monotonic()
    answer = server.post("/v1/chat/completions", body)
    text = answer["choices"][0]["message"]["content"]
    shown = {int(number) for number in MARK.findall(text)}
    if way == "passage":
        given = [question.file]
        has = [True]
        mode = "passage"
    else:
        given = [each["filename"] for each in answer["knowledge"]["passages"]]
        starts = [each["start"] for each in answer["knowledge"]["passages"]]
        place = dict(knowledge_held_out.documents())[question.file].index(question.answer)
        # the passage that has it begins before it, and no later one of its file does
        before = [start for file, start in zip(given, starts) if file == question.file and start <= place]
        texts = {(file, text) for file, _, text in passages if file == question.file and question.answer in text}
        has = [file == question.file and bool(before) and start == max(before) and bool(texts) for file, start in zip(given, starts)]
        mode = answer["knowledge"]["mode"]
    cited = [number for number in shown if 1 <= number <= len(given)]
    return {"model": model, "way": way, "question": question.text, "answer": text, "mode": mode, "given": len(given),
            "found": any(has), "right": question.is_said_in(MARK.sub(" ", text)), "cites": bool(cited),
            "unknown": len(shown) - len(cited), "file": any(given[number - 1] == question.file for number in cited),
            "passage": any(has[number - 1] for number in cited), "wrong_too": any(given[number - 1] != question.file for number in cited),
            "prompt_tokens": answer["usage"]["prompt_tokens"], "took_s": round(time.monotonic() - began, 2)}


def table(verdicts):
    print("| model, way | questions | passage given | right | right and cites the document | and the passage itself | no number | cites another document too | prompt tokens | s an answer |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model, way in sorted({(each["model"], each["way"]) for each in verdicts}, key=lambda key: (key[0], WAYS.index(key[1]))):
        rows = [each for each in verdicts if (each["model"], each["way"]) == (model, way)]

        def count(*keys):
            return sum(all(row[key] for key in keys) for row in rows)

        print(f"| {model}, {way} | {len(rows)} | {count('found')} | {count('right')} | {count('right', 'file')} | {count('right', 'passage')} | "
              f"{len(rows) - count('cites')} | {count('wrong_too')} | {sum(row['prompt_tokens'] for row in rows) / len(rows):,.0f} | "
              f"{sum(row['took_s'] for row in rows) / len(rows):.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a file of verdicts, which is appended to")
    parser.add_argument("--model", default="qwen-1.5b", help=f"one of {', '.join(REAL_MODELS)}, or a model's path")
    parser.add_argument("--ways", default="search,passage", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--most", type=int, default=1000, help="questions of each way")
    parser.add_argument("--embedder", default=MINILM)
    options = parser.parse_args()
    path = real_model(options.model) if options.model in REAL_MODELS else Path(options.model)
    documents, questions = knowledge_held_out.asked_of_models()
    options.out.touch()
    verdicts = [json.loads(line) for line in options.out.read_text().splitlines()]
    there = {(each["model"], each["way"], each["question"]) for each in verdicts}
    left = [(question, way) for question in questions[:options.most] for way in options.ways.split(",")
            if (path.stem, way, question.text) not in there]
    if left:
        with tempfile.TemporaryDirectory() as folder, \
                our_server(path, "--embedder", options.embedder, "--database", f"{folder}/kept.db", "--no-drafts") as server:
            model = server.get("/v1/models")["data"][0]["id"]
            store, took_s = store_of(server, documents)
            passages = passages_of(folder)
            print(f"{len(documents)} documents, {len(passages)} passages in {took_s:.1f} s", flush=True)
            for question, way in left:
                verdict = asked(server, model, store, passages, question, way) | {"model": path.stem}
                verdicts.append(verdict)
                with options.out.open("a") as file:
                    file.write(json.dumps(verdict, ensure_ascii=False) + "\n")
    table(verdicts)


if __name__ == "__main__":
    main()
