"""Small data of nanochat's chat tasks, made of words, in the places where nanochat keeps them."""

import json

from bundles import words

DIGITS = ["1", "2", "3", "4", "5"]


def arc_rows(count, stride):
    rows = []
    for i in range(count):
        labels = DIGITS[:3 + i % 3] if i % 4 == 3 else list("ABCDE")[:3 + i % 3]
        rows.append({"id": f"q{i}", "question": words(i, 5 + i % 4, stride), "answerKey": labels[i % len(labels)],
                     "choices": {"text": [words(i + 3 * place, 1 + (i + place) % 3) for place in range(len(labels))], "label": labels}})
    return rows


def mmlu_rows(count=14):
    return [{"question": words(i, 6 + i % 3, 2), "subject": "sea", "answer": i % 4, "choices": [words(i + 5 * place, 1 + i % 2) for place in range(4)]} for i in range(count)]


def gsm8k_rows(count=5):
    return [{"question": words(i, 7, 3), "answer": f"It is {i}+1 = <<{i}+1={i + 1}>>{i + 1} of them.\n#### {1000 * i + 1:,}"} for i in range(count)]


def humaneval_rows():
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    return [{"task_id": f"t{i}", "prompt": f"import math\nfrom os import path\n\ndef twice(x):\n    # {words(i, 4)}\n", "canonical_solution": "    return 2 * x\n",
             "test": tests, "entry_point": "twice"} for i in range(3)]


PLACES = {"ARC-Easy": ("allenai--ai2_arc/ARC-Easy", lambda: arc_rows(12, 1)), "ARC-Challenge": ("allenai--ai2_arc/ARC-Challenge", lambda: arc_rows(9, 2)),
          "MMLU": ("cais--mmlu/all", mmlu_rows), "GSM8K": ("openai--gsm8k/main", gsm8k_rows),
          "HumanEval": ("openai--openai_humaneval/openai_humaneval", humaneval_rows)}


def write_chat_data(base, parquet=False, labels=tuple(PLACES)):
    """The base folder with the rows of these tasks: as nanochat writes them, which needs pyarrow, or as lines of JSON."""
    for label in labels:
        place, rows = PLACES[label]
        folder = base / "task_data" / place / "test"
        folder.mkdir(parents=True)
        if not parquet:
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
            continue
        import pyarrow
        import pyarrow.parquet
        made, names = rows(), ["00000.parquet", "00001.parquet"]
        for name, part in zip(names, (made[:2], made[2:])):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / name)
        (folder / "manifest.json").write_text(json.dumps(names))
    return base


def documents(count=60):
    return [words(i, 3 + 17 * i % 120, 1 + i % 5) + (" \u2028é" if i % 7 == 0 else "") for i in range(count)]


def write_shard(folder):
    """Two shards, the latter for validation, in small row groups."""
    import pyarrow
    import pyarrow.parquet
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a training text"]}), folder / "shard_00000.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents()}), folder / "shard_06542.parquet", row_group_size=25)


LONG_TEXT = "".join(f"{words(i, 9, 1 + i % 4)} {i}. " for i in range(60))
