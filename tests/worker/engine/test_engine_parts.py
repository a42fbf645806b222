"""The parts of an engine: made when a flag, a model or a request asks, and what their hooks see."""

import base64
import threading

import numpy
import pytest
import torch

from chatlm.common import program
from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Stepped, WORKER_PIPE
from chatlm.common.messages.requests import Failed, PartSays, Piece, SamplingParams
from chatlm.common.messages.wire import HEADER, unpacked
from chatlm.worker import parts
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.parts import PARTS, PartRow
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
    [late] = engine.given.others
    return late.loaded


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


def test_only_the_first_answer_that_asks_has_it_made_in_a_thread(path):
    """Plain answers do not wait for it."""
    loads, may_load = [], threading.Event()

    def load():
        assert may_load.wait(60)
        loads.append(threading.current_thread())
        return LENS.load()

    engine = engine_with(path, PartRow("lens", load, asked=LENS.asked))
    assert tokens_of(engine, [work("before")]) and not loads
    engine.add(work("waits", logprob_ids=(7,)))
    with torch.inference_mode():
        engine.step()
        beside = pieces_until(engine, work("beside"), "beside")
        assert count(beside) == 12 and not loads
        may_load.set()
        found = pieces_until(engine, work("again", logprob_ids=(8,)), "waits")
    assert count(found) == 12 and loads != [threading.main_thread()] and len(loads) == 1
    assert lens_of(engine).made_in is loads[0]


def pieces_until(engine, one, name):
    """Add an answer, step until the one of this name has ended -> its pieces."""
    engine.add(one)
    found = []
    while any(each.work.id == name for each in (*engine.queue.running, *engine.queue.waiting)):
        found += [event for id, event in engine.step() if id == name and isinstance(event, Piece)]
        check_integrity(engine)
    return found + [event for id, event in engine.step() if id == name and isinstance(event, Piece)]


def count(found):
    return sum(len(piece.tokens) for piece in found)


def failure(engine, one):
    return pieces(engine, [one, work("beside")])[one.id].end


def test_what_a_part_refuses_fails_one_answer(path):
    """Whether or not the answer is the first to need it."""
    engine = engine_with(path, LENS)
    words = "the lens looks at 1 token, not 2"
    for _ in range(2):
        assert failure(engine, work("lens", logprob_ids=(7, 8))) == Failed(words)
        assert not lens_of(engine).sizes


def test_a_part_of_another_version_is_not_used(path, monkeypatch):
    """The files have changed since the worker started: only answers that need what is not here fail."""
    engine = engine_with(path, LENS)
    program.stamp_at_start()
    with monkeypatch.context() as patched:
        patched.setattr(program, "program_stamp", lambda: ("other files",))
        for asked in ({"logprob_ids": (7,)}, {"pooling": "mean"}, {"grammar": "start: /a+/"}):
            end = failure(engine, work("late", **asked))
            assert "the program has changed since this server started: restart" in end.message
    assert said(pieces(engine, [work("late", logprob_ids=(7,))])["late"])


@pytest.mark.parametrize("error", [ImportError("half a file"), SystemExit(1), KeyboardInterrupt()])
def test_a_part_that_cannot_be_made_fails_one_answer(path, error):
    def load():
        raise error

    engine = engine_with(path, PartRow("lens", load, asked=LENS.asked))
    for _ in range(2):
        assert isinstance(failure(engine, work("lens", logprob_ids=(7,))), Failed)


def test_answers_that_wait_for_one_part_share_what_comes_of_it(path, monkeypatch):
    """If it takes long to fail, it does not fail once for each of them, one after the other."""
    loads, may_load = [], threading.Event()

    def load():
        loads.append(1)
        assert may_load.wait(60)
        raise ImportError("half a file")

    engine = engine_with(path, PartRow("lens", load, asked=LENS.asked))
    monkeypatch.setattr(engine, "_before_step", lambda step=engine._before_step: may_load.set() or step())
    asking = [work(f"lens {number}", logprob_ids=(7,)) for number in range(50)]
    found = pieces(engine, [*asking, work("beside")])
    assert all(isinstance(found[one.id].end, Failed) for one in asking) and len(loads) == 1
    assert found["beside"].end.reason == "length"
    assert isinstance(failure(engine, work("lens", logprob_ids=(7,))), Failed) and len(loads) == 2


def test_a_part_that_is_made_just_now_sees_an_answer_once(path, monkeypatch):
    engine = engine_with(path, LENS)
    [late] = engine.given.others
    seen = []

    def missing(work):
        found = [late] if work.params.logprob_ids else []
        monkeypatch.undo()
        comes = late.get().comes

        def noted(sequence):
            seen.append(sequence.work.id)
            return comes(sequence)

        monkeypatch.setattr(late.loaded, "comes", noted)
        return found

    monkeypatch.setattr(type(engine.given), "missing", lambda parts, work: missing(work))
    assert said(pieces(engine, [work("lens", logprob_ids=(7,))])["lens"]) and seen == ["lens"]


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
    late, steering = engine.given.others
    assert late.loaded is None
    lens = late.get()           # now: "other" might end before "short" has it loaded, and the lens would not hear of that
    told = []
    monkeypatch.setattr(steering.loaded, "ends", lambda sequence: told.append(sequence.work.id) or 1 / 0)
    found = pieces(engine, [work("short", 2, logprob_ids=(7,)), work("other")])
    assert [found[name].end.reason for name in ("short", "other")] == ["length", "length"]
    assert sorted(told) == sorted(lens.ended) == ["other", "short"]


def test_parts_hear_of_the_end_of_an_answer_that_another_part_refuses(path, monkeypatch):
    engine = engine_with(path, STEERING, LENS)
    pieces(engine, [work("lens", logprob_ids=(7,))])
    steering = engine.given.others[0].loaded
    seen = []
    monkeypatch.setattr(steering, "comes", lambda sequence: seen.append(sequence) or "")
    monkeypatch.setattr(steering, "ends", seen.remove)
    assert isinstance(failure(engine, work("lens", logprob_ids=(7, 8))), Failed)
    assert seen == []


def test_an_answer_that_is_cancelled_while_its_part_is_made_leaves_nothing(path):
    may_load = threading.Event()

    def load():
        assert may_load.wait(60)
        return LENS.load()

    engine = engine_with(path, PartRow("lens", load, asked=LENS.asked))
    engine.add(work("lens", logprob_ids=(7,)))
    assert engine.cancel("lens") and not engine.busy
    may_load.set()
    engine.answers.compiling.thread.submit(int).result(60)
    found = pieces(engine, [work("next", logprob_ids=(7,))])
    assert said(found["next"])
    assert not lens_of(engine).sizes and not engine.arrivals.waiting


def test_a_step_whose_input_a_part_changes_is_alone(path):
    engine = engine_with(path, STEERING)
    engine.runner = TracedRunner(engine.transformer, ahead=True)
    steering = lens_of(engine)
    steering.engine = engine
    pieces(engine, [work("plain"), work("steered", stop_token_ids=(300,))], ahead=True)
    assert len(steering.noted) > 12 and {under_way for under_way, _ in steering.noted} == {0}


def test_a_part_hears_of_a_failed_step(path, monkeypatch):
    engine = engine_with(path, LENS)
    engine.add(work("lens", logprob_ids=(7,)))
    with torch.inference_mode():
        while not lens_of(engine) or not lens_of(engine).sizes:
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
