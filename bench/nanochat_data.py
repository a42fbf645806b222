"""Small data in the places where nanochat keeps what it downloads, so that its scripts run without a network.

| what | where in the base folder | of |
|---|---|---|
| shards of texts, the last for validation | `base_data_climbmix`, since July 2026 `datasets/climbmix` | the texts that are given |
| SmolTalk, MMLU, GSM8K, ARC | `task_data/OWNER--NAME/SUBSET/SPLIT`, with the manifest that says the download is whole | sums, and words of tests/support |
| CORE | `eval_bundle` | how the validation texts go on |
"""

import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet

import bundles
import chat_tasks

LONGEST, SHORTEST = 2000, 200       # characters of a text
SUFFIXES = ".md", ".rst", ".txt", ".py"
FEWEST = 200                        # texts
TASKS = (("go on", "multiple_choice", 2, {}, 25.0), ("which", "multiple_choice", 0, {"continuation_delimiter": "\nAnswer: "}, 25.0),
         ("before", "schema", 1, {}, 50.0), ("next word", "language_modeling", 3, {}, 0.0))
ITEMS = 40                          # of each of these tasks


def documents_of(paths):
    """The texts of files, cut at blank lines; each once, in an order that looks random."""
    found = {}
    for path in paths:
        document = ""
        for part in re.split(r"\n\n+", path.read_text(errors="replace")):
            if len(document) + len(part) > LONGEST:
                found[document] = None
                document = ""
            document += part[:LONGEST] + "\n\n"
        found[document] = None
    texts = [text for text in found if len(text) >= SHORTEST]
    random.Random(1).shuffle(texts)
    return texts


def texts_below(folders):
    paths = {path for folder in map(Path, folders) for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    return documents_of(sorted(paths))


# sums and talk

def sum_row(dice):
    """A row as GSM8K has them: the calculator's calls between << and >>."""
    a, b, sign = dice.randrange(2, 60), dice.randrange(2, 60), dice.choice("+-*")
    if dice.random() < 0.15:
        word, letter = dice.choice(("strawberry", "banana", "letter", "window")), dice.choice("abrnetw")
        call, result = f"'{word}'.count('{letter}')", word.count(letter)
        return {"question": f"How many {letter} are in {word}?", "answer": f"<<{call}={result}>>{result}\n#### {result}"}
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return {"question": f"What is {a}{sign}{b}?", "answer": f"<<{a}{sign}{b}={result}>>{result}\n#### {result}"}


def sum_rows(count, seed):
    dice = random.Random(seed)
    return [sum_row(dice) for _ in range(count)]


def talk_rows(texts):
    """A row as SmolTalk has them, of each text: its first words, and how it goes on."""
    rows = []
    for text in texts:
        words = text.split()
        rows.append({"messages": [{"role": "user", "content": " ".join(words[:8])}, {"role": "assistant", "content": " ".join(words[8:30])}]})
    return rows


def task_data(base, place, rows):
    folder = base / "task_data" / place
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "manifest.json").write_text(json.dumps(["00000.parquet"]))


# CORE

def core_rows(texts):
    """The function that makes the rows of a task: of how these texts go on."""
    words = [text.split() for text in texts]
    words = [one for one in words if len(one) >= 30]

    def rows_of(label, kind):
        dice = random.Random(label)
        rows = []
        for _ in range(ITEMS):
            right, *others = dice.sample(words, 4)
            if kind == "language_modeling":
                rows.append({"context": " ".join(right[:12]) + " ", "continuation": right[12]})
            elif kind == "schema":
                rows.append({"context_options": [" ".join(right[:10]), " ".join(others[0][:10])], "continuation": " ".join(right[10:14]), "gold": 0})
            else:
                rows.append({"query": " ".join(right[:15]), "choices": [" ".join(one[15:18]) for one in (right, *others)], "gold": 0})
        for row in rows[1::2]:
            if options := row.get("choices") or row.get("context_options"):     # not always the first
                options.reverse()
                row["gold"] = len(options) - 1
        return rows
    return rows_of


# all of it

def write_data(base, texts, layout):
    """Data for all of nanochat's scripts, in a new base folder. ValueError if there are too few texts."""
    if len(texts) < FEWEST:
        raise ValueError(f"only {len(texts)} texts of {SHORTEST} characters or more; there must be {FEWEST}")
    held_out = texts[:max(len(texts) // 40, 40)]
    shards = base / ("datasets/climbmix" if layout == "experiments" else "base_data_climbmix")
    shards.mkdir(parents=True)
    for number, part in ((0, texts[len(held_out):]), (6542, held_out)):
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), shards / f"shard_{number:05}.parquet", row_group_size=500)
    talk = talk_rows(texts)
    for split, rows in (("train", talk[40:340]), ("test", talk[:40])):
        task_data(base, f"HuggingFaceTB--smol-smoltalk/default/{split}", rows)
    for split, count, seed in (("train", 240, 2), ("test", 420, 3)):
        task_data(base, f"openai--gsm8k/main/{split}", sum_rows(count, seed))
    for split, count in (("auxiliary_train", 40), ("test", 5200)):      # chat_sft takes so many of a test split, and does not look if they are there
        task_data(base, f"cais--mmlu/all/{split}", chat_tasks.mmlu_rows(count))
    chat_tasks.write_chat_data(base, parquet=True, labels=("ARC-Easy", "ARC-Challenge"))
    bundles.write_bundle(base / "eval_bundle", TASKS, core_rows(held_out))
