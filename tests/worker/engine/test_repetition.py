"""Answers that go round in circles are noticed; what only looks alike is not."""

import json
import random
from pathlib import Path

import pytest

from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.grammar import json_grammar
from chatlm.worker.engine.repetition import LEAST, LONGEST_RUN, ROUNDS, SEEN, SHORT_RUN, RepetitionFinder
from engines import make_engine, pieces
from nightly import by_day
from works import assignment, changed

@pytest.fixture(scope="module")
def gguf_engine(default_model_path):
    return make_engine(default_model_path, num_pages=200, max_batch=8, as_stored=True)


ROOT = Path(__file__).resolve().parents[3]


def noticed_at(tokens):
    """The number of tokens after which a finder notices a repetition; None if it does not."""
    finder = RepetitionFinder()
    return next((count for count, token in enumerate(tokens, 1) if finder.push(token)), None)


def plainly_noticed_at(tokens):
    """The same by the definition: the run is the shortest one that the last tokens have."""
    for count in range(SEEN, len(tokens) + 1):
        length = next((length for length in range(1, min(LONGEST_RUN, count - SEEN) + 1) if tokens[count - SEEN - length:count - length] == tokens[count - SEEN:count]), None)
        repeated = length and max(length * ROUNDS, LEAST if length >= SHORT_RUN else 2 * LEAST)
        if repeated and repeated <= count and tokens[count - repeated:count - length] == tokens[count - repeated + length:count]:
            return count
    return None


@pytest.mark.parametrize("length, count", [(1, 384), (2, 384), (7, 384), (8, 192), (24, 192), (47, 192), (49, 196), (100, 400), (512, 2048), (513, None)])
def test_a_run_is_noticed_after_so_many_tokens(length, count):
    chance = random.Random(length)
    one = [chance.randrange(50_000) for _ in range(length)]
    assert noticed_at([60_000] * 3 + one * 400) == (count and count + 3)


def test_random_runs_are_noticed_by_the_definition():
    """Random runs are noticed where the definition says."""
    chance = random.Random(3)
    for _ in range(60):
        tokens = []
        while len(tokens) < 1000:
            few = chance.choice([2, 300, 70_000])  # ids whose bytes look alike, too
            one = [chance.randrange(few) * chance.choice([1, 256]) for _ in range(chance.choice([1, 2, 3, 7, 24, 30, 60]))]
            tokens += one * chance.choice([1, 2, 3, 4, 20, 60, 400])
        assert noticed_at(tokens) == plainly_noticed_at(tokens)


ROW = "| 0 | 0.0 | - |\n"
REFRAIN = "Fa la la la la, la la la la!\n'Tis the season to be jolly, fa la la la la, la la la la!\n"


@pytest.mark.parametrize("text", [
    *(pytest.param(path.read_text(), id=path.name) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "chatlm/common/config.py",
 ROOT / "static/turns.js", ROOT / "bench/RESULTS.md") if path.exists()),
    "| a | b | c |\n|---|---|---|\n" + ROW * 15, "zeros = [" + "0, " * 100 + "0]", "\n".join(f"{number}. Buy milk and eggs at the shop on the corner" for number in range(1, 100)),
    "".join(f"Verse {number}: deck the halls with {word}.\n{REFRAIN}{REFRAIN}" for number, word in enumerate("holly ivy berries candles ribbons paper".split())),
    "=" * 80 + "\nTitle\n" + "=" * 80 + "\n", "    if (a) {\n" + "    }\n" * 12, "ha " * 100, "Row, row, row your boat, gently down the stream. " * 3])
def test_lists_and_refrains_are_no_repetitions(gguf_engine, text):
    """Code, tables, lists and refrains are no repetitions."""
    assert noticed_at(gguf_engine.tokenizer.encode(text)) is None


@pytest.mark.parametrize("ahead", by_day([False, True], True))        # as a server does
def test_a_repeating_answer_ends_only_if_asked_to(gguf_engine, ahead):
    """The default model, greedy, goes on with a line that it has read twelve times."""
    prompt = tuple(gguf_engine.tokenizer.encode("The cat sat on the mat and looked at the dog.\n" * 12))
    sampling = SamplingParams(temperature=0.0)
    works = [assignment("goes on", prompt, sampling, 250, ignore_eos=True),
             *(assignment(name, prompt, sampling, 250, ignore_eos=True, stop_on_repetition=True, **more)
               for name, more in (("ends", {}), ("later", {"min_tokens": 230})))]
    found = pieces(gguf_engine, works, ahead)
    ids = {name: [token for piece in some for token in piece.tokens] for name, some in found.items()}
    ends = {name: (some.end.reason, some.end.stop_reason) for name, some in found.items()}
    assert ids["ends"] == ids["goes on"][:noticed_at(ids["goes on"])] and ends["ends"] == ("stop", "repetition")
    assert ends["goes on"] == ("length", "max_tokens") and len(ids["later"]) == 230 and ends["later"] == ("stop", "repetition")


def test_a_resumed_repetition_ends_at_the_same_token(gguf_engine):
    """An answer that another worker goes on with ends at the same token."""
    prompt = tuple(gguf_engine.tokenizer.encode("The cat sat on the mat and looked at the dog.\n" * 12))
    whole = assignment("whole", prompt, SamplingParams(temperature=0.0), 400, ignore_eos=True, stop_on_repetition=True)
    ids = [token for piece in pieces(gguf_engine, [whole])["whole"] for token in piece.tokens]
    resumed = changed(whole, id="resumed", resumed_ids=tuple(ids[:70]))
    some = pieces(gguf_engine, [resumed])["resumed"]
    assert [*ids[:70], *(token for piece in some for token in piece.tokens)][-len(ids):] == ids and some.end.stop_reason == "repetition"


@pytest.mark.parametrize("model, count", by_day([("tiny", 150), ("default", 300)], ("tiny", 150)))
def test_a_format_is_not_cut_by_a_repetition(model, count, nanochat_fixtures, request):
    """A list of zeros is what the schema wants."""
    engine = request.getfixturevalue("gguf_engine") if model == "default" else make_engine(nanochat_fixtures / "gen5", num_pages=40)
    schema = {"type": "array", "items": {"const": 0}, "minItems": count, "maxItems": count}
    prompt = tuple(engine.tokenizer.encode("Zeros:"))
    work = assignment("zeros", prompt, SamplingParams(temperature=0.0), 1000, stop_on_repetition=True, grammar=json_grammar(schema, "x"))
    some = pieces(engine, [work])["zeros"]
    assert json.loads("".join(piece.text for piece in some)) == [0] * count and some.end.stop_reason == "grammar"
    assert noticed_at([token for piece in some for token in piece.tokens])
