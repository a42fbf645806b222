#!/usr/bin/env python3
"""How often an embedder finds the passage that answers a question in one of ten languages.

    python bench/ten_languages.py --embedder MODEL [MODEL ...]

bench/ten_languages.json has ten passages in each language, and a question about each in other words. A question counts at k if its passage is among the
k nearest of all hundred, by cosines alone: words in common, which searches use besides, would hide what an embedder does not read. It is asked through
/v1/embeddings of a real server, with the prompts that the model has for questions and passages.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import our_server

SET = Path(__file__).resolve().with_suffix(".json")
AT = 1, 3


def vectors(url, texts, kind):
    """The vectors of texts, a row each."""
    request = urllib.request.Request(url + "/v1/embeddings", json.dumps({"input": texts, "input_type": kind}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return numpy.array([row["embedding"] for row in json.load(response)["data"]])


def recalls(url, languages):
    """language -> the share of its questions that are answered at each of AT."""
    pairs = [pair for rows in languages.values() for pair in rows]
    passages, questions = (vectors(url, [pair[side] for pair in pairs], kind) for side, kind in ((0, "document"), (1, "query")))
    order = numpy.argsort(-(questions @ passages.T), axis=1)
    places = iter((order == numpy.arange(len(pairs))[:, None]).argmax(axis=1))
    found = {}
    for language, rows in languages.items():
        own = [next(places) for _ in rows]
        found[language] = [sum(place < at for place in own) / len(own) for at in AT]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", nargs="+", required=True)
    languages = json.loads(SET.read_text(encoding="utf-8"))
    for model in parser.parse_args().embedder:
        with our_server(str(model)) as server:
            found = recalls(server.url, languages)
        print(f"\n{model}\n| language | " + " | ".join(f"recall@{at}" for at in AT) + " |\n|---|" + "---|" * len(AT))
        for language, shares in [*found.items(), ("all", [float(numpy.mean(column)) for column in zip(*found.values())])]:
            print(f"| {language} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
