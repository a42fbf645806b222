"""Messages between processes: plain data after a header; anything else is refused before it is read."""

import asyncio
import json
import random
import time
from pathlib import Path

import pytest

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import (RAY_PIPE, SANDBOX_PIPE, WORKER_PIPE, ActorAddress, ActorEnded, AdapterLoaded, Begun, Body, CacheEmptied, Cancel, Crashed, DraftTerms, DropAdapter, EmptyCache, EndActor, EndOfRequest, EndThinking,
                                             Known, LoadAdapter, Loading, ModelCard, ModelText, NewAnswer, NewPicture, NewPrompt, NewRequest, Node, Nodes, ParsedBody, Ping, RayConfig, Ready,
                                             Refused, SandboxResult, SandboxConfig, StartActor, Stepped, SandboxTask, Unusable, WorkerConfig)
from chatlm.common.messages.requests import (AnswerParams, Delta, DraftCounts, Embedding, Ended, Failed, Message, ModelSource, Piece, PromptProgress, PromptScores,
                                             Request, SamplingParams, TextSpec, ThinkingEnds, TokenLogprob, Usage)
from chatlm.common.messages.wire import HEADER, BadMessage, restorer, unpacked
from chatlm.common.processes.torchrun import ARRIVAL_PIPE, RankArrival
from chatlm.front.api.encode import timings_body
from chatlm.front.pool.worker import Job
from chatlm.worker.model.batch import Batch
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ranks.messages import RANK_PIPE, RankAdapter, RankConfig, RankDrew, RankLogits, RankPages, RankStep, RankTokens
from answers import asked

SCORES = (TokenLogprob(5, None), TokenLogprob(7, -1.5, ((7, -1.5), (2**31, -float("inf")))))
TEXT = TextSpec("hf", bytes(range(256)), "{{ messages }}", frozenset({2, 1, 999}), 1, None, True)
EXAMPLES = [
    WorkerConfig(Settings(model="a.gguf", served_model_name=("a", "b")), ModelSource("gguf", Path("/m/a.gguf"), "a", "GGUF"), "cpu", 2,
                 drafts=DraftTerms(False, (("/m/b.gguf", 5, 7),), "killed")),
    NewRequest("r", AnswerParams(sampling=SamplingParams(0.1, 5, seed=2**64 - 1, logit_bias=((3, -100.0), (9, 0.5))), logprobs=0,
                                 stop=("\n", "ü\u2028"), stop_token_ids=(1,), grammar="start: x", client="alice")),
    NewRequest("s", AnswerParams()), NewPrompt("r", 127, tuple(range(3000))), NewPrompt("r", 0, (), 1), NewPicture(b"\x00\xff" * 40),
    NewAnswer("r#3", "r", 0, 3, 2**40, (1, 2, 3), 5, 2), Cancel("r#3"), EndThinking("r#3"), EndOfRequest("r"), Ping(), EmptyCache(), CacheEmptied(True),
    LoadAdapter("law#1", "/adapters/law", (("/adapters/law/a", 5, 7),), "00"), DropAdapter("law#1"), AdapterLoaded("law#1", "no such file", 5, "00"), Loading("weights", 0.25),
    ModelText(TEXT), ModelCard(TEXT, "a", 4096, ("one", "two"), {"sample": "numpy"}, True), Ready({"running": 0}), Unusable("no such file"), Crashed("KeyError: 1", "Traceback ..."),
    SandboxConfig(Known(Settings(), None), TEXT, 4096, 1.5, 1 << 30), SandboxTask("fill", [{"a": [1, None]}, "x"]), Begun(),
    Body(bytes(range(256)) * 3), Body(b""), SandboxResult(None), SandboxResult([1, {"a": "\ud800"}]), Refused("no", 400, None, "tools"),
    RayConfig("auto", ""), Nodes([Node("f0", "a", 2.0, 8)]), StartActor("x", "f0", 0.5, 1), ActorAddress("x", "10.0.0.1", 4242, "00"), EndActor("x"),
    ActorEnded("x", "died"),
    Stepped([], {}), Stepped(
        [("r", Piece((1, 2), (Delta("text", "a\U0001f600\x00"), Delta("call", "{", "f")), SCORES)), ("s", PromptScores(SCORES[:1])), ("r", Piece()),
         ("t", PromptProgress(0, 7, 3)), ("u", Embedding("AACAPw==")), ("u", Ended("stop", None, Usage(cached_tokens=3), 0.5)),
         ("u", ThinkingEnds(7)), ("v", ThinkingEnds(None)),
         ("v", Failed("no room")), ("w", Failed("no answer", refused=True)), ("x", Failed("not now", unavailable=True))], {"queued": 1}),
    RankConfig(Settings(model="a.gguf"), ModelSource("gguf", Path("/m/a.gguf"), "a", "GGUF"), "cpu", 1, 3, "/proc/1/fd/7", {"A": "b"}),
    RankArrival(3, "node", 1, 2, None, 7), RankTokens([1, 2**31]), RankLogits(bytes(range(256))), RankPages(77), RankDrew(2**32 - 1), RankAdapter(3, "/adapters/law"), RankStep(Batch([~0, 5], [-1, 4], [0, 1, 2], [1, 9], [[3], [1, 2]], [0, 1]), None),
    RankStep(Batch([7], [-1], [0, 1], [1], [[]], []), [SampleRow(SamplingParams(logit_bias=((3, -float("inf")),)), 9, [4, 5], 1)])]


PIPES = WORKER_PIPE, SANDBOX_PIPE, RAY_PIPE, ARRIVAL_PIPE, RANK_PIPE


def pipe_of(kind):
    return next(pipe for pipe in PIPES if kind in pipe.kinds)


def through_the_pipe(message):
    pipe = pipe_of(type(message))
    frame = pipe.packed(message)
    kind, size = pipe.kind_and_size(frame[:HEADER.size])
    assert size == len(frame) - HEADER.size
    return unpacked(kind, frame[HEADER.size:])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_out_as_it_went_in(message):
    found = through_the_pipe(message)
    assert found == message and repr(found) == repr(message)


def test_a_request_leaves_a_sandbox_as_it_entered():
    request = asked("r", (Message("user", "hi", {"tool_calls": [{"a": 1}]}), Message("assistant", "")), ("text", (1, 2, 3)), ((4, 5), ()),
                      tools=({"function": {"name": "f"}},), stop=("x",), grammar="g")
    for parsed in (ParsedBody(request, False, True, True), ParsedBody(asked("s", prompts=("a", "b")))):
        assert restorer(ParsedBody)(through_the_pipe(SandboxResult(parsed)).value) == parsed


def test_every_message_has_an_example_and_a_limit():
    kinds = {kind for pipe in PIPES for kind in pipe.kinds}
    assert {type(message) for message in EXAMPLES} == kinds and len(kinds) > 25
    assert all(0 < kind.MAX_BYTES <= 256 << 20 for kind in kinds)


@pytest.mark.parametrize("header", [HEADER.pack(len(WORKER_PIPE.kinds), 0), HEADER.pack(255, 5), b"\x80\x04\x95\x10\x00",
                                    HEADER.pack(WORKER_PIPE.numbers[Cancel], Cancel.MAX_BYTES + 1), HEADER.pack(0, 2**32 - 1)])
def test_a_bad_header_is_refused_before_its_body(header):
    """A header of an unknown kind or size is refused before its body is read."""
    with pytest.raises(BadMessage):
        WORKER_PIPE.kind_and_size(header)


@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: pipe.kinds[0].__name__)
def test_a_pipe_carries_its_own_messages_alone(pipe):
    """A worker can send nothing that a sandbox or a rank could, whatever the numbers in its frames."""
    for message in EXAMPLES:
        if type(message) not in pipe.kinds:
            with pytest.raises(KeyError):
                pipe.packed(message)
    assert {pipe.kind_and_size(HEADER.pack(number, 0))[0] for number in range(len(pipe.kinds))} == set(pipe.kinds)


@pytest.mark.parametrize("kind, body", [
    (Cancel, b""), (Cancel, b"{}"), (Cancel, b"[]"), (Cancel, b'["a", "b"]'), (Cancel, b"null"), (Cancel, b"[" * 100_000),
    (Stepped, b'[[["r"]], {}]'), (Stepped, b'[[5], {}]'), (Stepped, b'[[["r", 5]], {}]'), (Stepped, b'[[["r", []]], {}]'),
    (Stepped, b'[[["r", ["AA==", 0, "vector"]]], {}]'), (Stepped, b'[[["r", ["piece"]]], {}]'), (Stepped, b'[[["r", "piece"]], {}]'),
    (Stepped, b"[[], {}, 1]"), (NewPrompt, b'["r", 0, 5]'),
    (ModelCard, b'[["hf", "%%%", null, [], 1, 2, true], "a", 1, [], {}, true]'), (NewRequest, b'["r", null]')])
def test_a_body_that_is_not_of_its_kind_is_refused(kind, body):
    with pytest.raises(BadMessage):
        unpacked(kind, body)


def test_any_bytes_give_a_message_or_a_refusal():
    generator = random.Random(5)
    for message in EXAMPLES * 40:
        body = bytearray(pipe_of(type(message)).packed(message)[HEADER.size:])
        for _ in range(generator.randint(1, 4)):
            if body:
                body[generator.randrange(len(body))] = generator.choice(b'[]{}",:0-9eEntf\\\xff')
        try:
            found = unpacked(type(message), bytes(body))
        except BadMessage:
            continue
        assert type(found) is type(message)
    assert json.loads(WORKER_PIPE.packed(Ping())[HEADER.size:]) == []


def test_usages_add_up():
    total = sum([Usage(1, 2, 3, 4, DraftCounts(5, 1), DraftCounts(3)), Usage(cached_tokens=10), Usage(6, 5, 4, 3, DraftCounts(2, 0, 4))], Usage())
    assert total == Usage(7, 7, 17, 7, DraftCounts(7, 1, 4), DraftCounts(3)) and (total.drafted_tokens, total.accepted_tokens) == (12, 3)


def test_an_answer_that_came_at_once_has_no_speed(monkeypatch):
    for seconds, speed in ((0.0, None), (0.00004, None), (0.5, 6.0)):
        job = Job(asked(id="r"), (1, 2), 9, asyncio.Queue(), 100.0, dispatched_s=100.0)
        for at, event in ((101.0, Piece((5,))), (101.0 + seconds, Piece((6, 7, 8))), (200.0, Ended("stop", "eos", Usage(), 0.0))):
            monkeypatch.setattr(time, "monotonic", lambda: at)
            job.take(event, 0)
        done = [job.events.get_nowait() for _ in range(3)][-1]
        assert done.tokens_per_second == speed and timings_body(done)["tokens_per_second"] == speed
