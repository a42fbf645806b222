"""What a worker tells the front of its steps: at once, or that of several steps in one message."""

import random
from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import NewAnswer, NewPrompt, NewRequest, Stepped
from chatlm.common.messages.requests import AnswerParams, Delta, Ended, Failed, Piece, SamplingParams, TokenLogprob
from chatlm.worker.loop import WorkerLoop
from chatlm.worker.engine.reports import together
from engines import make_engine
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")


class Front:
    """The other end of a worker's pipe: it asks, some of it after the first event, and hangs up once all is answered."""

    def __init__(self, *messages, later=()):
        self.messages, self.later, self.sent = messages, later, []

    def send(self, message):
        self.sent.append(message)

    def receive(self, wait, patience_s=None):
        if not self.messages and wait:
            raise EOFError
        messages, self.messages = self.messages, ()
        if self.later and any(isinstance(message, Stepped) and message.events for message in self.sent):
            messages, self.later = self.later, ()
        return messages


@torch.inference_mode()
def told(engine, interval_ms, works, later=()):
    """The messages of a worker that computes these works with this --stream-interval."""
    first, second = ([message for work in some for message in (
        NewRequest(work.id, work.params), NewPrompt(work.id, 0, work.prompt_ids), NewAnswer(work.id, work.id, 0, 0, work.max_tokens, background=work.background))]
        for some in (works, later))
    front = Front(*first, later=second)
    with pytest.raises(EOFError):
        WorkerLoop(front, engine, SimpleNamespace(settings=Settings(stream_interval=interval_ms))).run()
    return [message for message in front.sent if isinstance(message, Stepped)]


def read(messages):
    """What the front learns of each answer, however it was divided: (tokens, text, log-probabilities, end)."""
    answers = {}
    for message in messages:
        for id, event in message.events:
            tokens, texts, logprobs, ends = answers.setdefault(id, ([], [], [], []))
            if isinstance(event, Piece):
                assert not ends
                tokens += event.tokens
                texts += [(delta.kind, delta.text) for delta in event.deltas]
                logprobs += [one.token for one in event.logprobs]
            else:
                ends.append(event.reason if isinstance(event, Ended) else event)
    return {id: (tokens, "".join(text for _, text in texts), logprobs, ends) for id, (tokens, texts, logprobs, ends) in answers.items()}


def test_short_steps_share_a_message(nanochat_fixtures):
    """Short steps share a message, and the first piece and the end do not wait."""
    engine = make_engine(nanochat_fixtures / "gen5", max_batch=4)
    works = [assignment("a", tuple(range(3, 40)), SamplingParams(temperature=0.7, seed=3), 60, logprobs=2, ignore_eos=True),
             assignment("b", (1, 2, 3), SamplingParams(temperature=0.0), 25, ignore_eos=True)]
    each, shared = told(engine, 0.0, works), told(engine, 1e6, works)
    assert read(each) == read(shared) and read(each)["b"][3] == ["length"]
    with_events = [message.events for message in shared if message.events]
    assert len(with_events) <= 5 and sum(bool(message.events) for message in each) >= 60
    firsts = {}
    for id, event in sum(with_events, []):
        if isinstance(event, Piece):
            firsts.setdefault(id, len(event.tokens))
    assert firsts == {"a": 1, "b": 1}       # alone, though others wait for a million ms


@pytest.mark.parametrize("share", [-1.0, 1000.0])       # nothing of the background beside answers, all of it
def test_the_background_adds_no_message(nanochat_fixtures, share):
    """Beside an answer the background makes no message, and loses nothing."""
    answer = assignment("a", (1, 2, 3), SamplingParams(seed=7), 150, ignore_eos=True)
    low = [assignment(f"low {index}", tuple(range(3, 40)), SamplingParams(seed=index), 20, ignore_eos=True, background=True) for index in range(6)]
    found = []
    for interval_ms in (0.0, 1e6):
        engine = make_engine(nanochat_fixtures / "gen5", max_batch=4)
        engine.scheduler.lane.SHARE = share
        found.append(told(engine, interval_ms, [answer], low))
    assert read(found[0]) == read(found[1]) and len(read(found[0])) == 7
    before = [next(i for i, message in enumerate(messages) if any(id == "a" and isinstance(event, Ended) for id, event in message.events))
              for messages in found]
    assert before[1] < 40 < 80 < before[0], before       # each of the others has a first piece and an end


def test_gauges_are_sent_when_idle_and_now_and_then(nanochat_fixtures):
    """Gauges are sent when nothing is left to do, and now and then."""
    engine = make_engine(nanochat_fixtures / "gen5", max_batch=4)
    messages = told(engine, 0.0, [assignment("a", (1, 2, 3), SamplingParams(temperature=0.0), 60, ignore_eos=True)])
    assert messages[-1].gauges["running"] == 0 and messages[-1].gauges["kv_pages_total"] == engine.pool.num_pages
    assert any(not message.gauges for message in messages)


def test_merged_pieces_say_the_same():
    dice, kinds = random.Random(5), ("text", "reasoning", "call")
    for _ in range(300):
        events = []
        for number in range(dice.randrange(12)):
            deltas = tuple(Delta(kind := dice.choice(kinds), f"{number}.{i} ", "f" if kind == "call" and dice.random() < 0.3 else "")
                           for i in range(dice.randrange(4)))
            logprobs = (TokenLogprob(number, -1.0, ()),) if dice.random() < 0.5 else ()
            events.append((dice.choice("abc"), Failed("x") if dice.random() < 0.1 else Piece((number,), deltas, logprobs)))
        joined = together(list(events))
        for id in "abc":
            before, after = ([event for name, event in those if name == id] for those in (events, joined))
            bare = {event.tokens[0] for event in before if isinstance(event, Piece) and not event.deltas}
            assert not any(event.deltas and event.tokens[-1] in bare for event in after if isinstance(event, Piece))
            shown = [[token for event in those if isinstance(event, Piece) and event.deltas for token in event.tokens] for those in (before, after)]
            assert set(shown[0]) <= set(shown[1])
            assert [token for event in before if isinstance(event, Piece) for token in event.tokens] == [
                token for event in after if isinstance(event, Piece) for token in event.tokens]
            assert [one for event in before if isinstance(event, Piece) for one in event.logprobs] == [
                one for event in after if isinstance(event, Piece) for one in event.logprobs]
            for kind in kinds:
                assert "".join(event.joined(kind) for event in before if isinstance(event, Piece)) == "".join(
                    event.joined(kind) for event in after if isinstance(event, Piece))
            calls = [[delta for event in those if isinstance(event, Piece) for delta in event.deltas if delta.kind == "call"]
                     for those in (before, after)]
            assert calls[0] == calls[1]
