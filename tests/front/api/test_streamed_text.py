"""Most pieces of a stream are text alone: their frames are made of parts that are encoded once, and have the
same bytes."""

import json
import random
from dataclasses import replace

import pytest

from answers import encoded
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import (
    Accepted, AnswerParams, Delta, Finished, Piece, Request, TextSpec, TokenLogprob, Usage)
from chatlm.common.text.load import CharacterTokenizer
from chatlm.front.api.answer_state import AnswerState
from chatlm.front.pool.worker import Job
from spoken_paths import ENCODERS

TEXTS = ["", " word", "\n", '"', "\\", "a\u2028b\x85", "漢字", "\ud800", "😀", "\x00", "</script>", "{}",
         "data: [DONE]\n\n", "n" * 5000]
APIS = "native", "chat", "functions", "completion"
MODELS = "model", 'a "model": "\u2028" \\', "モデル"


LETTERS = CharacterTokenizer(TextSpec("characters", json.dumps([*map(chr, range(256))]).encode()))


def pieces_of(dice):
    """An answer's pieces: mostly text, and between them all that is no text alone."""
    for _ in range(dice.randrange(1, 20)):
        deltas = [Delta("text", dice.choice(TEXTS))]
        kind = dice.choice(["text"] * 6 + ["reasoning", "call", "calculator", "held", "two", "ids"])
        tokens = tuple(dice.randrange(256) for _ in range(dice.randrange(1, 4)))
        if kind == "reasoning":
            deltas = [Delta("reasoning", dice.choice(TEXTS))]
        elif kind == "call":
            deltas = [Delta("call", '{"a": 1}', "look_up")]
        elif kind == "calculator":
            deltas = [Delta("calculator", json.dumps({"expression": "1+1", "result": "2"}))]
        elif kind == "held":
            deltas = []
        elif kind == "two":
            deltas += [Delta("reasoning", "why"), Delta("text", "so")]
        yield Piece(tokens, tuple(deltas), gpu=dice.randrange(3))


def streamed(api, model, options, dice):
    parsed = ParsedBody(Request("x", messages=(), prompts=("Once",) if api == "completion" else ()), kind=api,
                        **options)
    encoder = ENCODERS[api](parsed, model, LETTERS)
    encoder.head = {**getattr(encoder, "head", {}), "created": 0}
    end = Finished("stop", "eos", Usage(7, 9, 3), 0.25, 8.125, 212.34, 0)
    return [encoder.start(Accepted(7)), *[encoded(encoder, event) for event in (*pieces_of(dice), end)]]


def folded_slowly(state, event, fold=AnswerState.fold):
    """Fold an event, and do not say that all it did was to let a part grow."""
    fold(state, event)
    state._touched_parts, state.grown_part = state.touched_parts, None


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"token_ids": True}, {"echo": True}],
                         ids=str)
def test_frames_have_the_bytes_of_those_that_are_encoded_whole(api, options, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    monkeypatch.setattr("secrets.token_hex", lambda size=32: "c5" * size)
    for seed in range(60):
        model = MODELS[seed % len(MODELS)]
        quick = streamed(api, model, options, random.Random(seed))
        with monkeypatch.context() as slow:
            slow.setattr(AnswerState, "fold", folded_slowly)
            assert quick == streamed(api, model, options, random.Random(seed))


def test_log_probabilities_of_tokens_without_text_are_not_lost():
    """A piece of text after tokens whose text was held back is not text alone: it has their entries."""
    params = AnswerParams(logprobs=0)
    encoder = ENCODERS["chat"](ParsedBody(Request("x", messages=(), params=params), kind="chat"), "model",
                               LETTERS)
    held = Piece((65,), (), (TokenLogprob(65, -0.5),))
    assert encoded(encoder, held) == b""
    frame = json.loads(encoded(encoder, Piece((66,), (Delta("text", "AB"),), (TokenLogprob(66, -0.25),)))[6:])
    assert [entry["logprob"] for entry in frame["choices"][0]["logprobs"]["content"]] == [-0.5, -0.25]


def test_a_job_passes_pieces_on_with_what_the_front_knows():
    job = Job(replace(Request("r"), max_tokens=9), (1, 2), 9, None, 0.0, choice=3, left_s=0.5)
    piece = job._news(Piece((5, 6), (Delta("reasoning", "hm"),), (), spent_s=0.25), 2)
    assert (piece == Piece((5, 6), (Delta("reasoning", "hm"),), (), 3, 2, 0.75) and job.thinking
            and job.output_ids == [5, 6])
    assert (job._news(Piece((7,)), 2) == Piece((7,), (), (), 3, 2, 0.5)
            and job.thinking), "a token without text ends no reasoning"
