"""Makes static/parameters.js, the parameters that the page can set for a chat, from the tables of body fields.

    python docs/parameters.py
"""

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatlm.front.api.field_types import EFFORT, INTEGER, NUMBER, SEED, TOP_K      # noqa: E402
from chatlm.front.api.dialects.openai import OPENAI_FIELDS      # noqa: E402
from chatlm.front.api.tables import SAMPLED      # noqa: E402

OTHERS = ("reasoning_effort", "thinking_budget", "max_tokens", "seed")      # besides the sampling parameters that are numbers
UNFOLDED = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "seed")
SLIDERS = {     # least, most, step; other numbers have a slider if they are at most 2 apart
    "temperature": (0, 2, 0.05), "top_k": (0, 200, 1), "min_p": (0, 0.5, 0.01), "presence_penalty": (-2, 2, 0.1), "frequency_penalty": (-2, 2, 0.1),
    "repetition_penalty": (0.5, 2, 0.01), "dry_multiplier": (0, 5, 0.05), "dry_base": (1, 4, 0.05), "dry_allowed_length": (0, 20, 1),
    "dry_penalty_last_n": (-1, 4096, 1), "top_n_sigma": (0, 5, 0.1), "max_tokens": (1, 4096, 1)}
SAFE_INTEGER = 2**53 - 1        # the largest in JavaScript
HEAD = """\
// Made by `python docs/parameters.py` from chatlm/front/api/tables.py; a test compares the two.
//
// What can be set for a chat; "" or absent is the server's default. `command` is the word after a slash. `slider`: its least and most
// value and its step. `folded`: shown under "More parameters"; `apart`: not among the settings.
"use strict";

const Parameters = (() => {

const all = [
"""


def label(name: str) -> str:
    """The field's name for people: top_n_sigma is "Top-n sigma"."""
    words = re.sub(r"^(top|min|typical)_(\w)(?=_|$)", r"\1-\2", name).replace("reasoning", "thinking").replace("_", " ").capitalize()
    return re.sub(r"^(Xtc|Dry)\b", lambda word: word[0].upper(), words)


def hint(field) -> str:
    """The field's description. For a field that other clients may send in other forms, only the first part."""
    return field.doc.partition(";")[0] if field.name in OTHERS else field.doc


def row(field) -> dict:
    """What the page must know of a field."""
    low, high = (max(field.low, 0 if field is SAMPLED.get("seed") else -SAFE_INTEGER), min(field.high, SAFE_INTEGER))
    whole = field.type in (INTEGER, SEED, TOP_K) or field.name == "max_tokens"
    bounds = {"choices": ["none", "low", "medium", "high"]} if field.type is EFFORT else {
        "min": 1 if field.name == "max_tokens" else 0 if field.type is TOP_K else low, "max": high if high < math.inf else SAFE_INTEGER,
        "step": 1 if whole else "any"}
    if field.name in SLIDERS or field.type is NUMBER and bounds["max"] - bounds["min"] <= 2:
        bounds["slider"] = [*SLIDERS.get(field.name, (bounds["min"], bounds["max"], 0.01))]
    places = {"apart": True} if field.name == "thinking_budget" else {} if field.name in UNFOLDED else {"folded": True}
    return {"name": field.name, "command": re.sub("_penalty$|^reasoning_|^thinking_|_", "", field.name), **bounds, **places}


def script() -> str:
    """static/parameters.js."""
    fields = {field.name: field for field in OPENAI_FIELDS}
    names = [name for name, field in SAMPLED.items() if field.type in (NUMBER, INTEGER, TOP_K)]
    chosen = [fields[name] for name in (*names, *OTHERS)]

    def written(value) -> str:      # keys as the page's other scripts have them
        return re.sub(r'"(\w+)": ', r"\1: ", json.dumps(value))

    rows = "".join(f"  {written(row(field))},\n" for field in chosen)
    strings = {"parameters": {field.name: label(field.name) for field in chosen}, "parameterHints": {field.name: hint(field) for field in chosen}}
    texts = ",\n".join(f"    {key}: {{\n" + "".join(f"      {name}: {json.dumps(text)},\n" for name, text in each.items()) + "    }"
                       for key, each in strings.items())
    return f"{HEAD}{rows}];\n\nParts.register({{\n  strings: {{\n{texts},\n  }},\n}});\n\nreturn Object.freeze({{all}});\n}})();\n"


if __name__ == "__main__":
    (ROOT / "static/parameters.js").write_text(script(), encoding="utf-8")
