"""Shows the figures that are kept in bench/figures/, and writes the tables that documents have of them.

    python bench/show.py                     # what there is: names, titles, machines, dates
    python bench/show.py start quality       # the tables of these files, or whose names or titles have these words
    python bench/show.py peers --machine E   # what was measured beside other programs on the machine E
    python bench/show.py --write             # the tables of README.md and bench/RESULTS.md again

In README.md the best machine's run of the default model fills the table about one machine; that of all machines has
the least and the most ratio of each model. bench/RESULTS.md has a table for each machine.
"""

import argparse
import re
from pathlib import Path

from figures import PEERS, best_rival, median, ratio, read_runs, read_tables
from model_files import REAL_MODELS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "RESULTS.md"

MACHINES = {"A": "Zen 5", "B": "AVX2", "C": "Xeon", "D": "Zen 4", "E": "AMX"}
TITLES = {"default": "default model", **{name: model.title for name, model in REAL_MODELS.items()}}
SCENARIOS = {
    "single": "one client", "single with drafts": "one client, drafts on", "hog": "one client beside another program",
    "4": "4 clients", "8": "8 clients", "16": "16 clients", "32": "32 clients",
    "context-128": "one client at context 128", "context-1024": "at context 1,024", "context-4096": "at context 4,096",
    "prefill-600": "first token of 600", "prefill-4000": "first token of 4,000",
    "turn-2000": "first token of the next turn after 2,000", "turn-8000": "first token after 8,000 cached",
    "single-cpu": "CPU of one stream", "prefill-600-cpu": "CPU of a prompt of 600", "16-cpu": "CPU of 16 clients",
    "ready": "ready after the command", "memory": "memory with 4,096 tokens of KV cache",
    "kl": "mean KL to float32", "top-1": "top-1 equal to float32"}


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


def spread(figure):
    """The median, with the least and the most if they are known."""
    values = figure["ours"]
    text = number(median(figure))
    return f"{text} ({number(values[0])} to {number(values[-1])})" if len(values) > 1 else text


def times(value):
    """A ratio, in bold where ours is behind."""
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def beside(figure):
    """Ours, then the best rival with its name and how many times better ours is."""
    if figure is None:
        return ""
    best = best_rival(figure)
    if best is None:
        return spread(figure)
    return f"{spread(figure)}; {best[0].removesuffix(' -t 2')} {number(best[1])}: {times(ratio(figure))}"


# README's tables

def readme_row(label, figures, drafted=None):
    """A row of the README's first table. Several figures stand in one row with slashes. drafted: a figure of ours alone."""
    unit = figures[0]["unit"]
    rivals = [best_rival(figure)[1] for figure in figures]
    if len(figures) == 1:
        ours, theirs = amount(median(figures[0]), unit), amount(rivals[0], unit)
    else:
        ours = f"{' / '.join(number(median(figure)) for figure in figures)} {unit}"
        theirs = f"{' / '.join(map(number, rivals))} {unit}"
    better = " / ".join(f"{ratio(figure):.1f}" for figure in figures)
    if drafted:
        ours += f" (with drafts {number(median(drafted))})"
        better += f" ({median(drafted) / rivals[0]:.1f})"
    return f"| {label} | {ours} | {theirs} | {better} |"


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
    rows.append(f"| ready after the command | {start(median(ready))} | {start(best_rival(ready)[1])} | |")
    rows.append(f"| memory with 4,096 tokens of KV cache | {amount(median(memory), 'MB')} | {amount(best_rival(memory)[1], 'MB')} | |")
    kl, equal = quality["figures"]["kl"], quality["figures"]["top-1"]
    label = "mean KL to float32, top-1 equal (with `--arithmetic fine` 5e-7, 100 %)"
    rows.append(f"| {label} | {median(kl):g}, {median(equal)} % | {best_rival(kl)[1]:g}, {best_rival(equal)[1]} % | |")
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


def spread_table(runs):
    models = [("default model", [run for run in runs if run["model"] == "default"])]
    for name, model in REAL_MODELS.items():
        if measured := [run for run in runs if run["model"] == name]:
            date = max(run["date"] for run in measured)
            models.append((f"{model.title} (`{model.package.format(1)}`.., {date})", measured))
    rows = []
    for label, measured in models:
        cells = [least_to_most(measured, scenario) for scenario in ("single", "16", "prefill-600")]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return ["| | one client | 16 clients | first token of 600 |", "|---|---|---|---|", *rows]


def best_run(runs):
    """The default model's run of the machine that has the most tokens a second for 16 clients."""
    return max((run for run in runs if run["model"] == "default" and "hog" in run["figures"]), key=lambda run: median(run["figures"]["16"]))


# The tables of bench/RESULTS.md

def machine_table(runs, machine):
    """What was measured on a machine: each cell has ours, the best rival's and the ratio."""
    rows = []
    for run in (run for run in runs if run["machine"] == machine and run["model"] != "quality"):
        figures = run["figures"]
        many = beside(figures.get("16"))
        if not many and "8" in figures:
            many = f"{beside(figures['8'])} (8 clients)"
        label = TITLES.get(run["model"], run["model"]) + (", busy" if run["state"].startswith("busy") else "")
        rows.append(f"| {label} | {beside(figures.get('single'))} | {many} | {beside(figures.get('prefill-600'))} "
                    f"| {', '.join(filter(None, (run['date'], run['commit'])))} |")
    return [f"| on {machine} | one client, tok/s | 16 clients, tok/s | first token of 600, ms | measured |", "|---|---|---|---|---|", *rows]


def with_table(text, lines, header):
    """The text with `lines` in place of the table whose first line matches `header`. Raises SystemExit if there is none."""
    found = re.search(rf"(?m)^{header}\n(?:\|.*\n)+", text)
    if found is None:
        raise SystemExit(f"no table begins with {header}")
    return text[:found.start()] + "\n".join(lines) + "\n" + text[found.end():]


README_HEADER = r"\|[^|\n]*\| chat_server \| llama-server \| ratio \|"
SPREAD_HEADER = r"\| \| one client \| 16 clients \| first token of 600 \|"


def documents(runs):
    """Path -> text with the tables that the runs give."""
    quality = next(run for run in runs if "kl" in run["figures"])
    readme = with_table(README.read_text(), readme_table(best_run(runs), quality), README_HEADER)
    results = RESULTS.read_text()
    for machine in sorted({run["machine"] for run in runs}):
        results = with_table(results, machine_table(runs, machine), rf"\| on {machine} \|[^\n]*")
    return {README: with_table(readme, spread_table(runs), SPREAD_HEADER), RESULTS: results}


# On the terminal

def conditions(entry):
    """Where, when and how an entry was measured, a line each."""
    where = ", ".join(entry[name] for name in ("machine", "date", "commit", "state") if entry[name])
    return [where, *(f"{name}: {entry[name]}" for name in ("command", "note") if entry[name])]


def lines_of_table(table):
    """A table as columns of equal width."""
    rows = [table["columns"], *table["rows"]]
    wide = max(map(len, rows))
    rows = [[*row, *[""] * (wide - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(wide)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def table_of_run(run):
    """All figures of a run."""
    rivals = list(dict.fromkeys(rival for figure in run["figures"].values() for rival in figure.get("rivals", {})))
    rows = []
    for name, figure in run["figures"].items():
        theirs = [number(figure["rivals"][rival]) if figure.get("rivals", {}).get(rival) else "" for rival in rivals]
        better = ratio(figure)
        rows.append([f"{SCENARIOS.get(name, name)}, {figure['unit']}", spread(figure), *theirs, times(better) if better else ""])
    return {"columns": ["", "ours", *rivals, "ours to the best"], "rows": rows}


def title_of_run(run):
    return f"{TITLES.get(run['model'], run['model'])} beside {', '.join(dict.fromkeys(name for figure in run['figures'].values() for name in figure.get('rivals', {}))) or 'nobody'}"


def entries():
    """(file, name, title, entry, table) of everything that is kept."""
    for run in read_runs():
        yield PEERS, run["model"], title_of_run(run), run, table_of_run(run)
    for file, tables in read_tables().items():
        for table in tables:
            yield file, table["name"], table["title"], table, table


def chosen(words, machine):
    for file, name, title, entry, table in entries():
        text = f"{name} {title}".lower()
        if (not words or any(word in (file, name) or word.lower() in text for word in words)) \
                and (not machine or machine in entry["machine"]):
            yield file, name, title, entry, table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="names of files or tables, or words of titles")
    parser.add_argument("--machine", help="only what was measured on this machine, by its letter in bench/RESULTS.md")
    parser.add_argument("--write", action="store_true", help="write the tables of README.md and bench/RESULTS.md again")
    arguments = parser.parse_args()
    if arguments.write:
        for path, text in documents(read_runs()).items():
            path.write_text(text)
        return
    found = list(chosen(arguments.words, arguments.machine))
    if not found:
        raise SystemExit("no table has these words; without any all names are shown")
    for file, name, title, entry, table in found:
        if not arguments.words:
            print(f"{file:10} {name:32} {entry['machine']:6} {entry['date']:10} {title}")
            continue
        print("\n".join([f"{file}: {title}", *conditions(entry), "", *lines_of_table(table), "", ""]))


if __name__ == "__main__":
    main()
