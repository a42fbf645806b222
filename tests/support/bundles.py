"""Small bundles of tasks in the layout of nanochat's, made of words: each kind of row, with its odd cases."""

import json
import os

import yaml

from forked import run_command
from real_server import SCRIPT

WORDS = "the cat sat on a mat and the dog ran to it while rain fell over all of the old town by the sea".split()
TASKS = (("choose", "multiple_choice", 2, {}, 25.0), ("answer", "multiple_choice", 0, {"continuation_delimiter": "\nAnswer: "}, 50.0),
         ("who", "schema", 1, {}, 50.0), ("go on", "language_modeling", 3, {}, 0.0), ("odd", "multiple_choice", 0, {}, 62.0))


def words(start, count, stride=1):
    return " ".join(WORDS[(start + stride * place) % len(WORDS)] for place in range(count))


def rows_of(label, kind):
    if label == "odd":          # option 0 is a prefix of the others, another one is, all are equal, one alone, a number
        return [{"query": "the cat", "choices": ["sat", "sat on", "sat by"], "gold": 0}, {"query": "the cat", "choices": ["sat on", "sat", "sat by"], "gold": 1},
                {"query": "the dog", "choices": ["ran", "ran"], "gold": 1}, {"query": "the dog", "choices": ["ran"], "gold": 0},
                {"query": "the <|bos|> {{ sea }} & town", "choices": [7, 2.5, "a\n"], "gold": 2}]
    if kind == "multiple_choice":
        return [{"query": words(i, 4 + i % 5, 1 + i % 3), "choices": [words(i + 3 * option, 1 + (i + option) % 3) for option in range(2 + i % 3)],
                 "gold": i % 2} for i in range(16)]
    if kind == "schema":
        return [{"context_options": [words(i, 3 + i % 4), words(i + 5, 2 + i % 3, 2)], "continuation": words(i + 9, 2 + i % 3), "gold": i % 2}
                for i in range(10)]
    return [{"context": f"  {words(i, 6 + i % 4)} ", "continuation": words(i + 6 + i % 4, 1 + i % 2) if i % 3 else "e"} for i in range(12)]


def write_bundle(folder, tasks=TASKS, rows=rows_of):
    (folder / "eval_data/part").mkdir(parents=True)
    entries = []
    for label, kind, shots, more, _ in tasks:
        (folder / f"eval_data/part/{label}.jsonl").write_text("\n".join(map(json.dumps, rows(label, kind))) + "\n")
        entries.append({"label": label, "dataset_uri": f"part/{label}.jsonl", "num_fewshot": [shots, 10], "icl_task_type": kind, **more})
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    lines = [f"{label},x,{baseline}" for label, *_, baseline in tasks]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Task Category,Random baseline", *lines]) + "\n")
    return folder


def silent(stage, fraction):
    pass


def run_eval(*words, home):
    done = run_command(SCRIPT, ["eval", *map(str, words)], os.environ | {"XDG_STATE_HOME": str(home)})
    return done.returncode, done.stdout, done.stderr
