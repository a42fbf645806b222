"""The data files of bench/figures/, which bench/keep.py writes and bench/show.py shows.

peers.json has runs beside other programs, as bench/compare.py measures them. A run has a machine, a model, the
date, the commit ("" where it was not recorded), its state ("quiet", "busy: ..."), the command, a note, and figures
by the scenarios of bench/compare.py: `ours` are the least, the median and the most, or the median alone, and
`rivals` are medians. `ratio` is there where only rounded figures are known.

Every other file has tables. A table has a name, a title, machine, date, commit, state, command and note too, then
columns and rows, whose cells are texts.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "figures"
PEERS = "peers"


# Files: one line for each figure or row, so that a change of one is seen as such

def write(path, entries, inside, texts_of):
    """inside: the member of an entry that has the figures or the rows, whose texts `texts_of` makes."""
    texts = []
    for entry in entries:
        about = json.dumps({name: value for name, value in entry.items() if name != inside}, ensure_ascii=False)
        opening, closing = "{}" if isinstance(entry[inside], dict) else "[]"
        lines = ",\n".join(f"   {text}" for text in texts_of(entry[inside]))
        texts.append(f' {about[:-1]},\n  "{inside}": {opening}\n{lines}{closing}}}')
    path.write_text("[\n" + ",\n".join(texts) + "\n]\n", encoding="utf-8")


def read_runs():
    return json.loads((FOLDER / f"{PEERS}.json").read_text(encoding="utf-8"))


def write_runs(runs):
    write(FOLDER / f"{PEERS}.json", runs, "figures",
          lambda figures: [f"{json.dumps(name)}: {json.dumps(figure)}" for name, figure in figures.items()])


def read_tables():
    """The name of each file of tables -> its tables."""
    paths = sorted(path for path in FOLDER.glob("*.json") if path.stem != PEERS)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def write_tables(name, tables):
    write(FOLDER / f"{name}.json", tables, "rows", lambda rows: [json.dumps(row, ensure_ascii=False) for row in rows])


# Figures of a run

def median(figure):
    """Of the least, the median and the most; or of the median alone."""
    return figure["ours"][len(figure["ours"]) // 2]


def more_is_better(figure):
    return figure["unit"] in ("tok/s", "%")


def best_rival(figure):
    """(name, median) of the best rival; None if there was none."""
    known = [(name, value) for name, value in figure.get("rivals", {}).items() if value]
    if not known:
        return None
    return (max if more_is_better(figure) else min)(known, key=lambda pair: pair[1])


def ratio(figure):
    """How many times better ours is than the best rival; None if nothing is known of one."""
    best = best_rival(figure)
    if best is None or "ratio" in figure:
        return figure.get("ratio")
    return median(figure) / best[1] if more_is_better(figure) else best[1] / median(figure)
