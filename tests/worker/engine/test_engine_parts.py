"""The parts of an engine: made because of a flag or a model, or for requests, and what their hooks see."""

import base64

import numpy
import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Stepped, WORKER_PIPE
from chatlm.common.messages.requests import Failed, PartSays, Piece, SamplingParams
from chatlm.common.messages.wire import HEADER, unpacked
from chatlm.worker import parts
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.parts import PARTS
from engine_parts import SERVING
from engines import TracedRunner, make_engine, pieces, tokens_of
from toy_part import LENS, STEERING
from works import assignment

PROMPT = tuple(range(5, 20))        # less than a page, which answers could share
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def path(nanochat_fixtures):
    return nanochat_fixtures / "gen5"


def work(name, tokens=12, **more):
    return assignment(name, PROMPT, GREEDY, tokens, ignore_eos=True, **more)


def engine_with(path, *rows, settings=SERVING):
    return make_engine(path, num_pages=100, max_batch=8, prefill_chunk=10, rows=(*PARTS, *rows),
                       settings=settings)


def lens_of(engine):
    return engine.given.others["lens"]


def said(found):
    return dict(pair for event in found.others for pair in event.value)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_part_sees_the_rows_of_the_answers_that_ask_for_it(path, ahead):
    """Of each token that was read. Their tokens, and those of others, are the same without it."""
    plain = engine_with(path)
    expected = tokens_of(plain, [work("lens"), work("other", 20)])
    engine = engine_with(path, LENS)
    found = pieces(engine, [work("lens", logprob_ids=(7,)), work("other", 20)], ahead=ahead)
    assert {name: each.tokens for name, each in found.items()} == expected
    assert not found["other"].others and found["lens"].end.reason == "length"
    sizes = said(found["lens"])
    assert [*sizes] == [*range(len(PROMPT) + 11)]
    assert "lens" in lens_of(engine).ended and not lens_of(engine).sizes


def test_what_it_sees_are_the_hidden_states(path):
    engine = engine_with(path, LENS)
    sizes = said(pieces(engine, [work("lens", 1, logprob_ids=(7,))])["lens"])
    pooled = assignment("text", PROMPT, GREEDY, 0, pooling="last", normalized=False)
    [embedding] = pieces(engine, [pooled])["text"].others
    values = numpy.frombuffer(base64.b64decode(embedding.vector), "<f4")
    assert sizes[len(PROMPT) - 1] == pytest.approx(float(abs(values).sum()), rel=1e-6)


def test_what_it_says_comes_before_the_tokens_and_crosses_the_pipe(path):
    engine = engine_with(path, LENS)
    engine.add(work("lens", 3, logprob_ids=(7,)))
    events = []
    with torch.inference_mode():
        while engine.busy:
            events += engine.step()
    kinds = [type(event).__name__ for _, event in events]
    assert kinds == ["PartSays", "Piece"] * 3 + ["Ended"]
    packed = WORKER_PIPE.packed(Stepped(events, {}))
    kinds = [type(event) for _, event in unpacked(Stepped, packed[HEADER.size:]).events]
    assert kinds == [type(event) for _, event in events]


def failure(engine, one):
    return pieces(engine, [one, work("beside")])[one.id].end


def test_what_a_part_refuses_fails_one_answer(path):
    engine = engine_with(path, LENS)
    words = "the lens looks at 1 token, not 2"
    for _ in range(2):
        assert failure(engine, work("lens", logprob_ids=(7, 8))) == Failed(words)
        assert not lens_of(engine).sizes


@pytest.mark.parametrize("hook", ["comes", "adds", "read_hidden"])
def test_what_a_part_raises_fails_one_answer(path, hook, monkeypatch):
    engine = engine_with(path, LENS)
    expected = pieces(engine, [work("lens", logprob_ids=(7,))])["lens"].tokens
    monkeypatch.setattr(lens_of(engine), hook, lambda sequence, *_: 1 / (sequence.work.id != "lens") and ())
    found = pieces(engine, [work("lens", logprob_ids=(7,)), work("beside")])
    assert found["lens"].end.message.endswith("(ZeroDivisionError)")
    assert found["beside"].tokens == expected
    assert pieces(engine, [work("plain")])["plain"].tokens == expected


def test_what_a_part_raises_at_an_end_fails_no_answer(path, monkeypatch):
    engine = engine_with(path, LENS, STEERING)
    lens = lens_of(engine)
    told = []
    monkeypatch.setattr(engine.given.others["steering"], "ends", lambda sequence: told.append(sequence.work.id) or 1 / 0)
    found = pieces(engine, [work("short", 2, logprob_ids=(7,)), work("other")])
    assert [found[name].end.reason for name in ("short", "other")] == ["length", "length"]
    assert sorted(told) == sorted(lens.ended) == ["other", "short"]


def test_parts_hear_of_the_end_of_an_answer_that_another_part_refuses(path, monkeypatch):
    engine = engine_with(path, STEERING, LENS)
    pieces(engine, [work("lens", logprob_ids=(7,))])
    steering = engine.given.others["steering"]
    seen = []
    monkeypatch.setattr(steering, "comes", lambda sequence: seen.append(sequence) or "")
    monkeypatch.setattr(steering, "ends", seen.remove)
    assert isinstance(failure(engine, work("lens", logprob_ids=(7, 8))), Failed)
    assert seen == []


def test_a_step_whose_input_a_part_changes_is_alone(path):
    engine = engine_with(path, STEERING)
    engine.runner = TracedRunner(engine.transformer, ahead=True)
    steering = engine.given.others["steering"]
    steering.engine = engine
    pieces(engine, [work("plain"), work("steered", stop_token_ids=(300,))], ahead=True)
    assert len(steering.noted) > 12 and {under_way for under_way, _ in steering.noted} == {0}


def test_a_part_hears_of_a_failed_step(path, monkeypatch):
    engine = engine_with(path, LENS)
    engine.add(work("lens", logprob_ids=(7,)))
    with torch.inference_mode():
        while not lens_of(engine).sizes:
            engine.step()
        monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        monkeypatch.undo()
        engine.give_up()
        while engine.busy:
            engine.step()
        engine.step()
    assert lens_of(engine).ended == ["lens"] and not lens_of(engine).sizes


# the rows of a worker

def test_an_answer_that_needs_an_unwanted_part_is_told_the_flag(path):
    engine = engine_with(path, settings=Settings())
    assert engine.adapters is None and engine.pictures is None
    words = "this worker serves no adapters: start the server with --adapter NAME=FOLDER"
    assert failure(engine, work("adapted", adapter="one#1")) == Failed(words)
    bare = make_engine(path, num_pages=100, max_batch=8, rows=())
    for asked in ({"adapter": "one#1"}, {"pooling": "mean"}):
        words = "this engine has no part for what the answer needs"
        assert failure(bare, work("more", **asked)) == Failed(words)
    assert failure(bare, work("form", grammar="start: /a+/")) == Failed("this engine makes no grammars")


def test_names_of_rows_are_unique():
    assert len({row.name for row in PARTS}) == len(PARTS)
    assert {row.name for row in PARTS} | {"others", "refusals"} == parts.FIELDS
