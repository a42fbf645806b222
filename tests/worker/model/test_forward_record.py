"""The forward of every family and shape calls the ops that it called, with the same arguments, and decode_core finds the same bits.

forward_record.json is the record: of each case two letters for each op (of `called_ops`), for a few cases the lines themselves, and of
decode_core digests of its program and of the bits that it leaves, which do not depend on the machine. It was written by the forward
of 2e9d6a82, before models were lists of blocks; since then only Gemma 4's double layers at odd widths or on four ranks were written
anew, dense parts narrower than the number of ranks, which are refused, and models with a correction bias when that got its name (the
values of a tensor follow from its name; with the old one all cases were equal). A change that is meant to call other ops writes it anew:
RECORD_FORWARD=1 pytest -m '' tests/worker/model/test_forward_record.py
"""

import base64
import difflib
import functools
import hashlib
import json
import os
from pathlib import Path

import pytest

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.limits import not_compiled
from called_ops import called_ops, decode_core_computes
from families import MODELS
from nightly import WHOLE, by_day
from tiny_specs import SHAPES, is_divided, odd_specs, rank_model, stage_of, tiny_model

RECORD = Path(__file__).parents[1] / "forward_record.json"
READABLE = "gemma4", "gen5", "nemotron3-latent", "qwen3.5moe", "encoder nomic-moe", "tower gemma4 clamped", "granite4h, rank 2 of 4", "gpt-oss, adapted"
KINDS = "llama3.1", "gemma4", "gen5", "nemotron3-latent", "qwen3.5moe", "granite4h", "gpt-oss", "lfm2", "deepseek3"
pytestmark = pytest.mark.usefixtures("one_thread")
LETTERS = 2         # of each op


@functools.cache
def record():
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"ops": {}, "decode_core": {}, "odd sizes": {}, "lines": {}}


# Adapters, ranks and stages of some shapes by day, which have blocks of all kinds; each shape is recorded as a whole
SOME = SHAPES if WHOLE or os.environ.get("RECORD_FORWARD") == "1" else [name for number, name in enumerate(SHAPES) if number % 8 == 0 or name in KINDS]


def letters(line):
    return base64.urlsafe_b64encode(hashlib.sha256(line.encode()).digest())[:LETTERS].decode()


def cut(text):
    return [text[first:first + LETTERS] for first in range(0, len(text), LETTERS)]


def agree(kind, found, lines={}):
    """Are these cases as in the record? {case: a text}; lines: of some cases what the texts are made of."""
    if os.environ.get("RECORD_FORWARD") == "1":
        record()[kind] |= found
        record()["lines"] |= {case: lines[case] for case in READABLE if case in lines}
        write(record())
    known = record()[kind]
    wrong = [case for case in found if known.get(case) != found[case]]
    readable = [case for case in wrong if case in record()["lines"]]
    assert not wrong, "\n".join([f"{len(wrong)} cases are not as in the record: {', '.join(wrong)}",
                                 *differing(known, (readable or wrong)[0], found, lines)])


def write(whole):
    parts = []
    for kind, cases in whole.items():
        rows = [f"{json.dumps(case)}: {json.dumps(value, indent=1 if isinstance(value, list) else None)}" for case, value in sorted(cases.items())]
        parts.append(f"{json.dumps(kind)}: {{\n%s}}" % ",\n".join(rows))
    RECORD.write_text("{%s}\n" % ",\n".join(parts))


def differing(known, case, found, lines):
    """Where the first case that differs does: its lines that are new, and if the record has its lines, those that are gone."""
    if case not in known or case not in lines:
        return [f"{case}: {known.get(case, 'not recorded')} was recorded, now it is {found[case]}"]
    if case in record()["lines"]:
        return list(difflib.unified_diff(record()["lines"][case], lines[case], "recorded", "now", n=1, lineterm=""))
    before, after = cut(known[case]), cut(found[case])
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    shown = [f"{case}, which has {len(after)} ops and had {len(before)}:"]
    for change, first, end, new_first, new_end in matcher.get_opcodes():
        if change != "equal":
            shown.append(f"op {first}: {end - first} were recorded, instead of which there are now")
            shown += [f"  {line}" for line in lines[case][new_first:new_end]]
    return shown[:60]


def ops_of(cases):
    """{case: a function that gives its model, whether it has an adapter, whether it is a rank} -> the lines of each."""
    lines = {}
    for case, (make, adapted, joined) in cases.items():
        try:
            lines[case] = called_ops(make(), adapted, joined)
        except ConfigError as error:
            lines[case] = [f"refused: {error}"]
    return lines


def agree_on_ops(cases):
    lines = ops_of(cases)
    agree("ops", {case: "".join(map(letters, listed)) for case, listed in lines.items()}, lines)


def test_every_family_calls_the_recorded_ops():
    """Every family and shape calls the recorded ops."""
    agree_on_ops({name: (functools.partial(tiny_model, name), False, False) for name in SHAPES})


def test_adapters_call_the_recorded_ops():
    agree_on_ops({f"{name}, adapted": (functools.partial(tiny_model, name), True, False) for name in SOME if tiny_model(name).vocab_size})


def test_ranks_call_the_recorded_ops():
    agree_on_ops({f"{name}, rank {rank} of {tp}": (functools.partial(rank_model, tiny_model(name), rank, tp), False, True)
                  for name in SOME if is_divided(tiny_model(name)) for rank, tp in ((1, 2), (2, 4))})


def test_stages_call_the_recorded_ops():
    agree_on_ops({f"{name}, stage {stage} of {stages}": (functools.partial(stage_of, tiny_model(name), stage, stages), False, False)
                  for name in SOME if is_divided(tiny_model(name)) for stages in (2, 3) if stages <= len(tiny_model(name).layers) for stage in range(stages)})


def bits_of(model, adapted=False):
    program, bits = decode_core_computes(model, adapted)
    return f"{len(program)} ops {hashlib.sha256(chr(10).join(program).encode()).hexdigest()[:8]} bits {bits}", program


def agree_on_bits(cases):
    """{case: (the model, whether it has an adapter)}: those that decode_core computes."""
    found = {case: bits_of(model, adapted) for case, (model, adapted) in cases.items() if not not_compiled(model)}
    agree("decode_core", {case: text for case, (text, _) in found.items()})


@pytest.mark.skipif(decode_core() is None, reason="not built")
class TestDecodeCore:
    def test_every_family_has_the_recorded_bits(self):
        """The record has the bits of every family and shape."""
        agree_on_bits({name: (tiny_model(name), False) for name in SHAPES})

    def test_adapters_have_the_recorded_bits(self):
        agree_on_bits({f"{name}, adapted": (tiny_model(name), True) for name in SOME if tiny_model(name).vocab_size})

    def test_stages_have_the_recorded_bits(self):
        cases = {}
        for name in SOME:
            for stage in range(2):
                if is_divided(tiny_model(name)):
                    cases[f"{name}, stage {stage} of 2"] = stage_of(tiny_model(name), stage, 2), False
        agree_on_bits(cases)


def facts(model):
    """What follows from a model's blocks: its tensors, padded ones and a rank's, the ops of a step, and what decode_core lacks."""
    yield model.shapes()
    yield model.padded().shapes()
    yield not_compiled(model)
    yield called_ops(model)
    try:
        yield rank_model(model, 1, 2).shapes()
    except ConfigError as error:
        yield str(error)


@pytest.mark.parametrize("name", by_day(MODELS, "llama3.1"))
def test_odd_sizes_are_computed_as_recorded(name):
    found = {}
    for what, spec in odd_specs(name):
        found[what] = "-" * LETTERS if spec is None else letters(repr([sorted(fact.items()) if isinstance(fact, dict) else fact for fact in facts(spec)]))
    known = record()["odd sizes"].get(name, "")
    wrong = [what for what, old, new in zip(found, cut(known), found.values()) if old != new]
    assert not wrong or os.environ.get("RECORD_FORWARD") == "1", f"these sizes are not computed as recorded: {', '.join(wrong)}"
    agree("odd sizes", {name: "".join(found.values())})
