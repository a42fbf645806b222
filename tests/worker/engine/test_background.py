"""Work in the background: it takes only what interactive answers leave, and its text stays the same."""

import random
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chatlm.common import answering
from chatlm.common.messages.requests import Piece, SamplingParams
from chatlm.worker.engine.background import BackgroundLane
from chatlm.worker.engine.drafts import Drafting
from chatlm.worker.engine.integrity import check_integrity, queue_faults
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.engine.states import StatePool
from chatlm.worker.engine.times import StepTimes, Times
from chatlm.worker.process import share_lease
from engines import make_engine
from families import make_model, save
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")


def times_of(*seconds):
    """Times of steps as if measured: of 1, 2, .. rows."""
    times = StepTimes()
    for rows, each in enumerate(seconds, 1):
        times.note(rows, each)
    return times


def scheduler(*seconds, num_pages=64, max_batch=4, prefill_chunk=64):
    made = Scheduler(PagePool(num_pages), StepLimits(max_batch, prefill_chunk, max_rows=max_batch))
    made.times.rows = times_of(*seconds)
    return made


def sequence(name, tokens, client=""):
    tokens = [ord(name[0])] * tokens
    work = assignment(name, tuple(tokens), SamplingParams(), 1000, client=client, background=name.islower())
    return Sequence(work, list(tokens), 2000)


def step(s):
    """A step of the scheduler, as if computed: {name: tokens}. Upper case is interactive."""
    plan = s.schedule()
    for chunk in plan:
        s.queue.advance(chunk)
        if chunk.draws:
            chunk.sequence.tokens.append(1)
    assert queue_faults(s.queue) == []
    return {chunk.sequence.work.id: chunk.count for chunk in plan}


def test_tokens_lengthen_a_step_by_a_twentieth_at_most():
    """As many tokens join a step as lengthen it by a twentieth."""
    lane = BackgroundLane()
    assert lane.room_beside(times_of(1.0, 1.02, 1.04, 1.06, 1.2), 1, 4) == 2
    assert lane.room_beside(times_of(1.0, 1.02, 1.04, 1.06, 1.2), 2, 3) == 2        # 1.04 and 1.06, of 1.02
    assert lane.room_beside(times_of(1.0, 1.2), 1, 4) == 0 == lane.room
    assert lane.room_beside(times_of(1.0, 1.0, 1.0), 1, 1) == 1
    assert lane.room_beside(StepTimes(), 1, 0) == 0


def test_a_slow_number_of_rows_is_seldom_tried():
    """A number of rows that once was slow is tried again seldom."""
    lane, slow = BackgroundLane(), times_of(1.0, 3.0)
    rooms = Counter(lane.room_beside(slow, 1, 4) for _ in range(10 * lane.TRIAL))
    assert rooms == {0: 10 * (lane.TRIAL - 1), 1: 10}


def test_background_prompts_have_short_steps():
    """Background prompts have short steps, and none beside what would be longer."""
    lane = BackgroundLane()
    times = Times()
    times.rows = times_of(0.02, 0.025)
    for token_s, most in ((0.0, 512), (0.0001, 512), (0.001, 150), (0.1, 64)):
        times.token_s = token_s
        assert lane.prompt_tokens(times, 0, 512) == most
        assert lane.prompt_tokens(times, 2, 512) == (125 if most == 150 else most)
    s = scheduler(1.0, 1.2)
    s.times.token_s = 0.005
    s.queue.add(sequence("a", 200))
    assert step(s) == {"a": 64} and step(s) == {"a": 64}
    s.queue.add(sequence("B", 100))
    assert step(s) == {"B": 64, "a": 3} and step(s) == {"B": 36, "a": 2} and step(s) == {"B": 1}    # a twentieth of the prompt
    s.queue.cancel("B")
    assert step(s) == {"a": 64} and step(s) == {"a": 3} and step(s) == {"a": 1}


def test_a_line_set_aside_goes_on_where_it_was():
    """A running line is set aside with its pages, and goes on where it was."""
    s = scheduler(1.0, 1.2)
    for name in ("a", "b", "c", "d", "e"):
        s.queue.add(sequence(name, 20))
    step(s), step(s)
    line = s.queue.running[0]
    pages, computed = list(line.pages), line.computed + 1
    assert len(s.queue.running) == 4
    s.queue.add(sequence("A", 20))
    assert step(s) == {"A": 20, "a": 1} and step(s) == {"A": 1}      # one is a twentieth of 20
    assert line.pages == pages and line.computed == computed and s.queue.preemptions == 0 and len(s.queue.running) == 5
    s.queue.cancel("A")
    assert step(s) == dict.fromkeys("abcd", 1)


def test_interactive_requests_are_admitted_first():
    """No line is admitted while an interactive request waits or has no room for it."""
    s = scheduler(1.0, 1.01, 1.02, 1.2)
    for name in ("a", "B", "c", "D", "e", "F", "G", "H"):
        s.queue.add(sequence(name, 4))
    step(s)
    assert [each.work.id for each in s.queue.running] == list("BDFG")       # four rows
    s.queue.cancel("B")
    step(s)
    assert [each.work.id for each in s.queue.running] == list("DFGH")
    for name in "DFG":
        s.queue.cancel(name)
    step(s), step(s)
    assert "a" in [each.work.id for each in s.queue.running] and s.lane.room == 2
    step(s), step(s)
    assert [each.work.id for each in s.queue.running] == list("Hac") and step(s) == {"H": 1, "a": 1, "c": 1}


def test_interactive_drafts_leave_lines_less_room(monkeypatch):
    """Drafts of interactive answers leave less room, and lines have none."""
    s = scheduler(1.0, 1.02, 1.2, 1.4)
    s.queue.add(sequence("A", 4)), step(s), s.queue.add(sequence("a", 4)), step(s), step(s), step(s), step(s), step(s)
    interactive, line = s.queue.running
    drafting, asked = Drafting([], s.times), []
    monkeypatch.setattr(drafting, "propose", lambda sequences, rows, *more: asked.append(([each.work.id for each in sequences], rows)))
    interactive.drafts = line.drafts = True
    drafting.draft(s.queue.running, s.queue.running, s.limits)
    s.queue.running.remove(interactive)
    drafting.draft(s.queue.running, s.queue.running, s.limits)
    assert asked == [(["A"], 1), (["a"], 1)]


def test_a_host_drawn_line_waits_for_answers():
    """A line that the host must draw waits for interactive answers."""
    s = scheduler(1.0, 1.0, 1.0, 1.0)
    s.queue.add(sequence("A", 4)), step(s)
    masked = Sequence(assignment("a", (1, 2), SamplingParams(), 50, logprobs=3, background=True), [1, 2], 60)
    s.queue.add(masked)
    assert step(s) == {"A": 1} and step(s) == {"A": 1}
    s.queue.cancel("A")
    assert step(s) == {"a": 2}


def test_interactive_requests_take_background_pages():
    """Interactive requests take the pages of the background first, and the background takes none of theirs."""
    s = scheduler(1.0, 1.2, num_pages=12)
    s.queue.add(sequence("a", 60, "x")), s.queue.add(sequence("b", 60, "y"))
    step(s), step(s), step(s)
    assert len(s.queue.running) == 2
    s.queue.add(sequence("A", 100, "x"))              # of the client whose line it is, which has most pages then
    assert step(s)["A"] == 64 and [each.work.id for each in s.queue.running] == ["a", "A"] and s.queue.preemptions == 1
    for _ in range(60):
        step(s)
    assert [each.work.id for each in s.queue.running] == ["A"] and s.queue.running[0].generated > 50 and s.queue.preemptions == 2
    s.queue.cancel("A")
    step(s)
    assert {each.work.id for each in s.queue.running} == {"a", "b"}


def test_a_prompt_too_large_costs_lines_nothing():
    """An interactive prompt that cannot fit costs the background nothing."""
    s = scheduler(1.0, 1.2, num_pages=12)
    s.queue.add(sequence("A", 80)), step(s), step(s)
    s.queue.add(sequence("a", 30)), step(s)
    s.queue.cancel("A"), step(s), s.queue.add(sequence("B", 80)), step(s), s.queue.add(sequence("C", 150)), step(s)
    assert [each.work.id for each in s.queue.running] == ["a", "B"] and s.queue.preemptions == 0


def test_background_texts_and_answers_wait_in_turn():
    """Texts in the background wait for interactive answers, and answers in it for texts."""
    s = scheduler(1.0, 1.0)
    text = lambda name, low: Sequence(assignment(name, (7,) * 20, SamplingParams(), 0, pooling="mean", background=low), [7] * 20, 20)    # noqa: E731
    s.queue.add(sequence("A", 4)), step(s)
    s.queue.add(low := text("t", True))
    assert step(s) == {"A": 1} and step(s) == {"A": 1}
    s.queue.cancel("A")
    assert step(s) == {"t": 20}
    s.queue.remove(low)
    s.queue.add(sequence("a", 4)), step(s)
    s.queue.add(text("T", False))
    assert step(s) == {"T": 20}


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_of_both_lanes_loses_no_page(seed):
    """Random traffic of both lanes ends and loses no page."""
    generator = random.Random(seed)
    s = scheduler(1.0, 1.02, 1.04, 1.2, num_pages=40, max_batch=6, prefill_chunk=32)
    alive, ended = [], Counter()
    for number in range(900):
        if number < 500 and generator.random() < 0.3 and len(alive) < 14:
            name = generator.choice(("L", "l", "l")) + str(number)
            alive.append(sequence(name, generator.randrange(1, 150), generator.choice("xyz")))
            s.queue.add(alive[-1])
        if alive and generator.random() < 0.03:
            s.queue.cancel(alive.pop(generator.randrange(len(alive))).work.id)
        interactive = [each for each in s.queue.running if not each.work.background]
        did = step(s)
        assert len(interactive) <= 6 and sum(1 for count in did.values() if count == 1) <= 6
        for each in [each for each in alive if each.generated >= 8]:
            s.queue.remove(each)
            alive.remove(each)
            ended[each.work.background] += 1
    assert not alive and ended[True] > 20 and ended[False] > 10 and s.pool.available == s.pool.num_pages


# the real engine


def works_of(engine):
    lines = [assignment(f"line {n}", tuple((31 * i * i + 7 * i + 5 * n) % 250 for i in range(90 - 20 * n)), SamplingParams(temperature=1.0, seed=n),
                        60, ignore_eos=True, background=True) for n in range(3)]
    chats = [assignment(f"chat {n}", tuple((3 * i + n) % 250 for i in range(40)), SamplingParams(temperature=0.7, seed=n), 20, ignore_eos=True)
             for n in range(3)]
    return lines, chats


@torch.inference_mode()
def written(engine, works, arriving=(), every=12):
    """The tokens of works, beside which others arrive while they run."""
    tokens, arriving, count = Counter(), list(arriving), 0
    tokens = {work.id: [] for work in (*works, *arriving)}
    for work in works:
        engine.add(work)
    while engine.busy or arriving:
        count += 1
        if arriving and count % every == 0:
            engine.add(arriving.pop(0))
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens[name] += event.tokens
        check_integrity(engine)
    return tokens


@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("model", ["gen5", "qwen3.5"])      # only attention; layers with states, of which there are as many as rows
def test_lines_set_aside_often_have_the_same_tokens(model, room, nanochat_fixtures, tmp_path, monkeypatch):
    """Lines that are set aside again and again have the same tokens."""
    monkeypatch.setattr(StatePool, "INTERVAL", 32)
    path = nanochat_fixtures / model if model == "gen5" else save(make_model(model), tmp_path)
    engine = make_engine(path, num_pages=200, max_batch=3, num_snapshots=2)
    lines, chats = works_of(engine)
    alone = {}
    for work in (*lines, *chats):
        engine.pool.forget_cached()
        alone |= written(engine, [replace(work, background=False)])
    engine.pool.forget_cached()
    monkeypatch.setattr(engine.scheduler.lane, "room_beside", lambda times, tokens, most: min(room, most))
    before = engine.queue.preemptions
    plans, schedule = [], engine.scheduler.schedule
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: plans.append(schedule()) or plans[-1])
    assert written(engine, lines, chats) == alone
    assert model != "gen5" or engine.queue.preemptions == before
    mixed = [Counter(chunk.sequence.work.background for chunk in plan) for plan in plans]
    beside = [each[True] for each in mixed if each[False]]
    assert len(beside) >= 10 and max(beside) == room


def test_a_chat_s_first_token_comes_at_the_next_step(nanochat_fixtures):
    """The first token of a chat comes with the step after its arrival."""
    engine = make_engine(nanochat_fixtures / "gen5", max_batch=4)
    lines, chats = works_of(engine)
    with torch.inference_mode():
        for line in lines:
            engine.add(line)
        for _ in range(5):
            engine.step()
        for chat in chats:
            assert not engine.under_way         # else it would wait for the step that was begun ahead too
            engine.add(chat)
            events = engine.step() + engine.step()      # now one is begun ahead
            assert chat.id in [name for name, event in events if isinstance(event, Piece)]
            while chat.id in [each.work.id for each in engine.queue.running] or engine.under_way:
                engine.step()
        while engine.busy:
            engine.step()


def test_lines_wait_while_another_worker_writes(nanochat_fixtures):
    """The background waits while another worker on the same processors writes."""
    if not (path := answering.path_of_lease()):
        pytest.skip("no memory file here")
    other = answering.AnswerLease(path)
    engine, apart = (make_engine(nanochat_fixtures / "gen5", max_batch=4) for _ in range(2))
    share_lease(engine, path), share_lease(apart, path, apart=True)
    [line, *_], [chat, *_] = works_of(engine)
    try:
        other.until.value = time.monotonic_ns() + 10**12
        for each in (engine, apart):
            each.add(line)
        with torch.inference_mode():
            assert not any(engine.step() for _ in range(3)) and apart.step() + apart.step()
            engine.add(chat)
            assert {name for name, event in engine.step() + engine.step()} == {chat.id}     # which has moved the lease on
            for each in (engine, apart):
                while each.busy:
                    each.step()
            other.until.value = time.monotonic_ns() + 10**12
            engine.add(replace(line, id="again"))
            assert not any(engine.step() for _ in range(3))
            other.until.value = 0
            while engine.busy:
                engine.step()
            until = other.until.value
            engine.lease.note(0.0)
            assert other.until.value != until and not engine.scheduler.lane.must_wait()     # its own
    finally:
        other.until.value = 0
