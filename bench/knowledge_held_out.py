"""The documents and questions of bench/held_out/, whose README.md says what they are."""

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "held_out"
OF_MODELS = 20          # documents that a model is asked about
OF_EACH = 2             # questions about each


class Question(NamedTuple):
    text: str
    file: str
    answer: str         # a part of the document that has the answer
    says: tuple         # a right answer has one of these words or numbers

    def is_said_in(self, text):
        return any(re.search(rf"(?<![\w.,]){re.escape(word)}(?!\w)" if word[0].isdigit() else rf"\b{re.escape(word)}", text, re.IGNORECASE)
                   for word in self.says)


def documents():
    """(file name, text) of each document."""
    return [(path.name, path.read_text()) for path in sorted(FOLDER.iterdir()) if path.name not in ("README.md", "questions.txt")]


def questions():
    found = []
    for line in (FOLDER / "questions.txt").read_text().splitlines():
        file, text, answer, says = line.split(" | ")
        found.append(Question(text, file, answer, tuple(says.split("/"))))
    return found


def asked_of_models():
    """(documents, questions) for a model: two questions about each document, whose answers have a word or number that stands in no other."""
    texts = dict(documents())
    by_file = {}
    for question in questions():
        if sum(map(question.is_said_in, texts.values())) == 1:
            by_file.setdefault(question.file, []).append(question)
    files = [file for file, found in sorted(by_file.items()) if len(found) >= OF_EACH][:OF_MODELS]
    return [(file, texts[file]) for file in files], [question for file in files for question in by_file[file][:OF_EACH]]
