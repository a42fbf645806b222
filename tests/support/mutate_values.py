"""Reads models with values of other kinds in their files: `mutate_values.py FOLDER SEED COUNT`, with little
memory and time.

FOLDER has good models: folders, of which JSON files and tokenizer.model are mutated, and the files
imatrix.gguf and imatrix.dat. For each model COUNT mutations are read. Prints a JSON list of faults: a model,
the mutation, and a traceback of anything but a ConfigError."""

import json
import math
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.errors import ConfigError, lack_of_memory    # noqa: E402
from chatlm.common.hub.adapter_folders import base_of    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.hub.folder import find_models    # noqa: E402
from chatlm.common.hub.val_bpb import evaluation_of    # noqa: E402
from chatlm.common.hub.recorded_metrics import written_beside    # noqa: E402
from chatlm.common.log import log    # noqa: E402
from chatlm.common.messages.protocol import SurveyConfig    # noqa: E402
from chatlm.common.text.load import open_tokenizer    # noqa: E402
from chatlm.export.gguf.importance import read_importance, write_importance    # noqa: E402
from chatlm.worker.survey import surveyed    # noqa: E402
from tiny_gguf import gguf_bytes    # noqa: E402

MEMORY = 3 << 30
SECONDS = 60
DEEP = json.loads("[" * 500 + "]" * 500)
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, -2**63, 10**400, 0.5, -0.5, 1e-30, 1e300,
    math.inf, -math.inf, math.nan, "", "1", "a", "\ud800", "x" * 5000, [], [1], [[]], ["a"], [1e5, 1e5], [None],
    {}, {"a": 1}, {"type": "default"}, {"rope_type": "yarn"}, {"content": 3}, [{}], [{"id": "x"}], DEEP]
COUNTS = [2**63, -1, 0, "text", 1.5, math.inf, math.nan, True, [1], ["a", "b"], [1.5], 2**40]


class TooSlow(BaseException):
    """Not an Exception, which a reader may catch."""


def ring(*_):
    raise TooSlow


def places_in(value, path=()):
    """The places of all values in a JSON object."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:3])
    for key, inner in items:
        yield from places_in(inner, (*path, key))


def with_value(dice, content):
    """(what was changed, the changed object)"""
    content = json.loads(json.dumps(content))
    places = [*places_in(content)]
    by_depth = [place for place in places if len(place) <= dice.choice([1, 1, 2, 9])] or places
    if not by_depth:
        return "nothing", content
    place = dice.choice(by_depth)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    how = dice.random()
    if how < 0.1:
        del inner[place[-1]]
        return f"{place} removed", content
    value = dice.choice(VALUES)
    inner[place[-1]] = value
    return f"{place} = {str(value)[:60]}", content


def mutated_message(dice, data):
    """Some bytes of a message of protocol buffers: lengths, kinds of fields, values."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5])):
        size = len(data)
        at = dice.choice([dice.randrange(size), dice.randrange(min(200, size)),
                          size - 1 - dice.randrange(min(600, size))])
        data[at] = dice.choice([0, 1, 2, 8, 0x0A, 0x10, 0x12, 0x7F, 0x80, 0xFF, dice.randrange(256)])
    return bytes(data[:dice.randrange(len(data))] if dice.random() < 0.1 else data)


def mutate(dice, path):
    """(what was changed, the bytes of the file with the change)"""
    if path.suffix == ".json":
        what, content = with_value(dice, json.loads(path.read_bytes()))
        return what, json.dumps(content).encode()
    if path.name == "imatrix.gguf":
        metadata = {"general.type": "imatrix", "imatrix.datasets": ["a"], "imatrix.chunk_count": 3,
                    "imatrix.chunk_size": 512}
        key = dice.choice([*metadata])
        metadata[key] = dice.choice(COUNTS)
        import numpy
        tensors = {"blk.0.attn_q.weight.in_sum2": numpy.ones((1, 32), numpy.float32),
                   "blk.0.attn_q.weight.counts": numpy.ones((1, 1), numpy.float32)}
        return f"{key} = {metadata[key]}", gguf_bytes(metadata, tensors)
    return "bytes", mutated_message(dice, path.read_bytes())


def read(path, out):
    """Read a model, or a file of importance, in every way that depends on its values."""
    if path.name.startswith("imatrix"):
        write_importance(read_importance(path), out)
        return
    settings = Settings(model=str(path), kv_cache_memory=1 << 20)
    card = surveyed(SurveyConfig(settings, resolve_model(settings), "cpu", 1 << 30)).card
    json.dumps([card.context_length, card.sampling, card.facts.parameters])
    open_tokenizer(card.text)
    for adapter in path.glob("adapter"):
        base_of(adapter)
        adapted = Settings(model=str(path), lora=(str(adapter),), kv_cache_memory=1 << 20)
        surveyed(SurveyConfig(adapted, resolve_model(adapted), "cpu", 1 << 30))


def fault_of(path, out):
    signal.alarm(SECONDS)
    try:
        find_models(path.parent)
        if path.suffix == ".pt":
            written_beside(path)
            evaluation_of(path)
        read(path, out)
    except ConfigError as error:
        text = str(error)
        if len(text) > 20_000:
            return f"an error of {len(text):,} characters: {text[:300]}"
    except TooSlow:
        return f"more than {SECONDS} s"
    except BaseException as error:
        if not lack_of_memory(error):
            return traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)
    return ""


def main():
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log.setLevel("CRITICAL")
    signal.signal(signal.SIGALRM, ring)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    faults = []
    for model in sorted(folder.iterdir()):
        inside = model if model.is_dir() else folder
        files = [model] if model.is_file() else [
            path for path in sorted(inside.rglob("*"))
            if path.suffix in (".json", ".model") and path.name != "tokenizer.json"]
        checkpoint = next(iter(model.rglob("model_*.pt")), None) if model.is_dir() else None
        dice = random.Random(f"{seed} {model.name}")
        for _ in range(count):
            path = dice.choice(files)
            good = path.read_bytes()
            what, data = mutate(dice, path)
            path.write_bytes(data)
            if fault := fault_of(checkpoint or model, folder.parent / "out.gguf"):
                faults.append([model.name, path.name, what, fault])
            path.write_bytes(good)
    print(json.dumps(faults), flush=True)


if __name__ == "__main__":
    main()
