"""The model card: README.md, with the front matter that the hub reads. It says only what the source says."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlm import __version__
from chatlm.common.errors import ConfigError
from chatlm.common.files import read_small
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at, part_of, read_meta
from chatlm.common.hub.recorded_metrics import written_beside

METRICS = {  # what nanochat has written -> its row in the card
    "tokens": "tokens of training", "train_loss": "loss of training", "reward": "reward",
    "total_training_time": "seconds of training"}
USED_CODE = """\
Its architecture is not one of transformers' own, so the repository has the code for it, and transformers asks
for `trust_remote_code=True`. Read `modeling_nanochat_generations.py` first; it is short.
"""
EXAMPLE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name{more})
"""
CHAT_EXAMPLE = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                       return_dict=True)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
TEXT_EXAMPLE = """\
prompt = tokenizer("The sky is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""


@dataclass(frozen=True)
class Card:
    """What a card says."""

    name: str
    description: str               # of the source, in one line
    license: str | None
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    has_code: bool = False
    chats: bool = False

    def text(self) -> str:
        return "\n".join((*self.front_matter(), "", f"# {self.name}", "", self.description, *self.body()))

    def front_matter(self) -> Iterator[str]:
        yield "---"
        if self.license:
            yield f"license: {self.license}"
        yield "library_name: transformers"
        yield "pipeline_tag: text-generation"
        if self.tags:
            yield "tags:"
            yield from (f"- {tag}" for tag in self.tags)
        yield "---"

    def body(self) -> Iterator[str]:
        if self.notes:
            yield ""
            yield " ".join(self.notes)
        if self.facts:
            yield from ("", "## Training", "", "| | |", "|-|-|")
            yield from (f"| {what} | {value} |" for what, value in self.facts)
        yield from ("", "## Use", "")
        if self.has_code:
            yield USED_CODE
        more = ", trust_remote_code=True" if self.has_code else ""
        yield EXAMPLE.format(name=self.name, more=more) + (CHAT_EXAMPLE if self.chats else TEXT_EXAMPLE)
        yield f"Exported by chat_server {__version__}.\n"


def training_facts(model: Path) -> tuple[tuple[str, str], ...]:
    """What nanochat's training has written about a checkpoint: its meta file, and the CORE metric in its
    report beside the checkpoints, if it is of this step."""
    checkpoint = checkpoint_at(model)
    if checkpoint is None:
        return ()
    facts = [("step", f"{checkpoint.step:,}"), ("stage", checkpoint.place.stage)]
    written = written_beside(model)
    for name, title in (("val_bpb", "bits per byte of validation data"), *METRICS.items()):
        if name in written.metrics and name not in written.stale:
            facts.append((title, number(written.metrics[name])))
    if core := core_metric(model):
        facts.append(("CORE", core))
    settings = part_of(read_meta(model), "user_config")
    facts += [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in sorted(settings.items())
              if is_plain(key, value)]
    return tuple(facts)


MOST_TEXT = 100  # characters of a setting that a card shows


def is_plain(key: str, value: Any) -> bool:
    """Can a table of Markdown show it, and does it say nothing of the machine that trained?"""
    text = json.dumps(value)
    if isinstance(value, (dict, list)) or len(text) > MOST_TEXT or not re.fullmatch(r"\w{1,60}", key):
        return False
    return not re.search(r"[|`\n/\\]", text)


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or value == int(value) else f"{value:.6g}"


def core_metric(model: Path) -> str:
    """CORE of a base checkpoint, as nanochat's base_eval.py writes it to base_eval/base_model_<step>.csv of
    its base folder; "" if it is not there."""
    checkpoint = checkpoint_at(model)
    if checkpoint is None or checkpoint.place.stage != "base":
        return ""
    path = checkpoint.tag_folder.parent.parent / "base_eval" / f"base_model_{checkpoint.step:06}.csv"
    with suppress(OSError, ValueError, ConfigError, csv.Error):
        for row in csv.reader(read_small(path).decode().splitlines()):
            if row and row[0].strip() == "CORE":
                return number(float(row[-1]))
    return ""


LICENSE = r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}"  # the hub's ids: mit, apache-2.0


def license_of(folder: Path) -> str | None:
    """The license that a folder's own card states."""
    with suppress(OSError, ValueError, ConfigError):
        lines = read_small(folder / "README.md").decode().splitlines()
        if lines[:1] == ["---"]:
            for line in lines[1:lines.index("---", 1)]:
                if found := re.fullmatch(rf"license:\s*[\"']?({LICENSE})[\"']?\s*", line):
                    return found[1]
    return None


def tags_of(family: str) -> Seq[str]:
    return ("nanochat",) if family.startswith("nanochat") else ()
