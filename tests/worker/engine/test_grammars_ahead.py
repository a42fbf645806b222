"""What the first answer in a format needs is made while nobody asks, and is as urgent as the answer."""

import os
import random
import threading

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.grammar import json_grammar
from chatlm.common.text.load import byte_of_character
from chatlm.worker.engine.answer_maker import AnswerMaker
from chatlm.worker.engine.grammar import Grammar
from chatlm.worker.engine.grammars import Grammars
from chatlm.worker.engine.part import EngineParts
from chatlm.worker.engine.pieces import open_for_answers
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.weights.load import open_model
from engines import make_engine
from works import assignment

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}
SOURCE = json_grammar(SCHEMA, "response_format")
MADE = {"bare_vocabulary", "grammar_vocabulary", "whole"}  # the last one encodes what a grammar forces


@pytest.fixture
def tokenizer(default_model_path):
    """As a worker opens it; nothing for grammars has been made."""
    settings = Settings(model=str(default_model_path))
    model = open_model(resolve_model(settings), settings)
    return open_for_answers(model.text, model.vocabulary)


def maker_of(tokenizer):
    return AnswerMaker(tokenizer, EngineParts(grammars=Grammars(tokenizer)))


def made(tokenizer):
    return MADE & vars(tokenizer).keys()


def prepared(maker, name):
    """The sequence of an answer in a format, once it may run."""
    one = Sequence(assignment(name, (5, 6), SamplingParams(), 9, grammar=SOURCE), [5, 6], 200)
    maker.make(one)
    one.output.preparing.result(60)
    assert one.output.grammar.masks.result(60)
    return one


def test_idle_work_makes_what_a_first_grammar_needs(tokenizer, monkeypatch):
    """Of a large vocabulary, an answer in a format then makes nothing more; what makes masks faster follows it."""
    monkeypatch.setattr(AnswerMaker, "LARGE_VOCABULARY", tokenizer.vocab_size)
    maker = maker_of(tokenizer)
    parts = maker.ahead()
    assert made(tokenizer) == set()
    for count, part in enumerate(parts, 1):
        part()
        assert len(made(tokenizer)) == count
    assert made(tokenizer) == {"bare_vocabulary", "whole"} and not maker.may_be_faster
    before = {name: id(vars(tokenizer)[name]) for name in made(tokenizer)}
    prepared(maker, "a")
    assert {name: id(vars(tokenizer)[name]) for name in made(tokenizer)} == before
    assert maker.may_be_faster
    maker.make_faster()
    assert made(tokenizer) == MADE and not maker.grammars.kept and not maker.may_be_faster
    prepared(maker, "b")
    assert not maker.may_be_faster


def test_a_small_vocabulary_takes_no_memory_before_somebody_asks(tokenizer, monkeypatch):
    """Nor does a large one without the library."""
    assert AnswerMaker(tokenizer).ahead() == []
    monkeypatch.setattr(AnswerMaker, "LARGE_VOCABULARY", 0)
    monkeypatch.setattr("chatlm.worker.engine.answer_maker.find_spec", lambda name: None)
    assert AnswerMaker(tokenizer).ahead() == []


def test_masks_get_faster_on_a_server_that_never_rests(tokenizer):
    """After many grammars somebody waits for it, once."""
    maker = maker_of(tokenizer)
    for number in range(Grammars.MANY - 1):
        prepared(maker, f"a{number}")
    assert maker.may_be_faster
    prepared(maker, "last")
    assert not maker.may_be_faster and "grammar_vocabulary" in vars(tokenizer)


def test_a_request_that_comes_first_waits_for_no_more_than_it_needs(tokenizer):
    """What makes masks fast is left to idle time; the masks are the same without it."""
    bare = Grammar(tokenizer, SOURCE)
    assert made(tokenizer) == {"bare_vocabulary"}
    assert tokenizer.grammar_vocabulary is tokenizer.ready_vocabulary
    fast, dice = Grammar(tokenizer, SOURCE), random.Random(3)
    for _ in range(40):
        [mask] = bare.compute_masks()
        assert [mask] == fast.compute_masks()
        allowed = [i for i in range(tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1 and i not in bare.ends]
        if not allowed:
            break
        token = dice.choice(allowed)
        assert bare.feed(token) and fast.feed(token)


def test_the_thread_is_as_urgent_as_the_answers(tokenizer):
    """Everybody waits for a thread that holds Python's lock, so none is niced."""
    maker = maker_of(tokenizer)
    prepared(maker, "a")
    for thread in (maker.compiling, maker.grammars.masking):
        nice = thread.submit("", lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(30)
        assert nice == os.getpriority(os.PRIO_PROCESS, 0)


@torch.inference_mode()
def test_a_warm_up_makes_them_after_its_steps(default_model_path, monkeypatch):
    """They stay due when a request takes the place of the steps; one that fails leaves the others out."""
    monkeypatch.setattr(AnswerMaker, "LARGE_VOCABULARY", 0)
    engine = make_engine(default_model_path, num_pages=100, max_batch=4, as_stored=True)
    warm_up = WarmUp(engine)
    warm_up.begin()
    assert len(warm_up.left) == 2 and len(warm_up.grammar_parts) == 2
    warm_up.skip()
    assert warm_up.is_due
    for left in (1, 0):
        warm_up.more()
        assert len(warm_up.grammar_parts) == left
    assert not warm_up.is_due and "bare_vocabulary" in vars(engine.tokenizer)
    prepared(engine.answers, "a")
    assert warm_up.is_due
    warm_up.more()
    assert not warm_up.is_due and "grammar_vocabulary" in vars(engine.tokenizer)
    warm_up.grammar_parts = [lambda: 1 / 0, lambda: None]
    warm_up.more()  # whoever asks for a format will be told
    assert not warm_up.is_due


def test_pieces_are_the_bytes_of_their_characters(tokenizer):
    """The fast way to the bytes of a piece gives what the alphabet says, without what is not in it."""
    table = byte_of_character()
    for token in range(tokenizer.vocab_size):
        text = tokenizer.name_of(token)
        if text not in tokenizer.specials and token not in tokenizer.added:
            assert tokenizer.piece(token) == bytes(table[character] for character in text)
    tokenizer.name_of = lambda token: "a\n\u4e2d\u0120b"
    assert tokenizer.piece(300) == b"a b"
