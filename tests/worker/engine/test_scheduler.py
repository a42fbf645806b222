"""Who runs next. Plain lists stand in for the model; there is no tensor here."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chat_server
from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine import planners
from chatlm.worker.engine.drafts import Draft
from chatlm.worker.engine.integrity import queue_faults
from chatlm.worker.engine.kvcache import PagePool, PageTables
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from works import assignment


def scheduler(num_pages=64, max_batch=8, prefill_chunk=64):
    return Scheduler(PagePool(num_pages), StepLimits(max_batch, prefill_chunk, max_rows=max_batch))


def sequence(name, tokens, client="", **params):
    tokens = list(range(tokens)) if isinstance(tokens, int) else list(tokens)
    return Sequence(assignment(name, tuple(tokens), SamplingParams(), 1000, client=client, **params), list(tokens), 2000)


def step(s, next_token=1):
    """Schedule a step, pretend to compute it, and append a token to each sequence that sampled; {name: tokens
    computed}."""
    plan = s.schedule()
    assert len({id(chunk.sequence) for chunk in plan}) == len(plan)
    for chunk in plan:
        samples = chunk.draws
        assert chunk.sequence.computed + chunk.count <= len(chunk.sequence.pages) * PAGE_SIZE
        s.queue.advance(chunk)
        if samples:
            chunk.sequence.tokens.append(next_token)
    assert queue_faults(s.queue) == []
    return {chunk.sequence.work.id: chunk.count for chunk in plan}


def test_a_table_has_the_pages_that_its_groups_need():
    """A table gets pages as far as its groups need them, and gives back those that a window has passed."""
    pool, one = PagePool(20, (0, 16)), sequence("a", 64)
    tables, hole = PageTables(pool), 20
    entries = tables.missing(one, 4, 2)
    assert entries == [0, 2, 4, 6, 1, 3]
    tables.fill(one, entries, pool.allocate(6), 2)
    assert tables.held_pages(one) == 6 and one.pages[5] == one.pages[7] == hole and tables.missing(one, 4, 3) == [5]
    tables.advance(one, 48)
    assert one.computed == 48 and tables.held_pages(one) == 4 and one.pages[1] == one.pages[3] == hole
    tables.release(one)
    assert one.pages == [] and one.computed == 0 and pool.available == 20


def test_a_prompt_comes_in_chunks_and_then_decodes():
    """A prompt is computed in chunks, and then decodes one token a step."""
    s = scheduler()
    s.queue.add(sequence("a", 150))
    assert [step(s) for _ in range(5)] == [{"a": 64}, {"a": 64}, {"a": 22}, {"a": 1}, {"a": 1}]


def test_decoding_runs_beside_a_long_prompt():
    """Decoding sequences run in every step beside a long prompt."""
    s = scheduler(num_pages=600)
    for name in "abc":
        s.queue.add(sequence(name, [ord(name)] * 5))
    step(s)
    s.queue.add(sequence("long", 7000))
    for _ in range(100):
        counts = step(s)
        assert all(counts[name] == 1 for name in "abc")
        assert counts["long"] == 64


def test_a_slow_model_embeds_little_beside_answers(monkeypatch):
    """A slow model embeds few tokens in a step beside answers, and then answers for long."""
    s, now = scheduler(), 1000.0
    monkeypatch.setattr(planners.time, "monotonic", lambda: now)
    s.times.token_s = 0.05                # 64 tokens would stop the answer for 3 s
    s.queue.add(sequence("answer", 5))
    s.queue.add(sequence("text", [7] * 70, pooling="mean"))
    assert [step(s) for _ in range(2)] == [{"text": 16}, {"answer": 5}]
    now += 15.0                     # 20 times as long as the 16 tokens took have not passed
    assert step(s) == {"answer": 1}
    now += 2.0
    assert step(s) == {"text": 16}


@pytest.mark.parametrize("seconds, steps", [(1e9, [{"answer": 5}, {"answer": 1}, {"answer": 1}]), (0.0, [{"text": 64}, {"text": 6}, {"answer": 5}])])
def test_texts_to_embed_have_their_own_steps(monkeypatch, seconds, steps):
    """Texts to embed have steps of their own, and beside answers seldom one."""
    monkeypatch.setattr(planners.TextPlanner, "EVERY_S", seconds)
    s = scheduler()
    s.texts.last_s, s.times.token_s = time.monotonic(), 0.001
    s.queue.add(sequence("answer", 5))
    s.queue.add(sequence("text", [7] * 70, pooling="mean"))
    assert [step(s) for _ in range(3)] == steps
    [answer] = [one for one in s.queue.running if one.work.id == "answer"]
    s.queue.remove(answer)
    assert step(s) == ({} if seconds == 0 else {"text": 64})        # nobody writes any more


def test_a_short_prompt_overtakes_a_long_one():
    """A short prompt overtakes a long one, and the long one keeps half the budget."""
    s = scheduler(num_pages=600)
    s.queue.add(sequence("long", 7000))
    step(s)
    s.queue.add(sequence("short", [9] * 20))
    assert step(s) == {"long": 44, "short": 20}
    for i in range(6):
        s.queue.add(sequence(f"more {i}", [10 + i] * 60))
    for _ in range(12):
        assert step(s)["long"] >= 32


def test_waiting_sequences_are_admitted_in_order():
    """Waiting sequences are admitted in order when a row is free."""
    s = scheduler(max_batch=2)
    a, b, c = (sequence(name, [ord(name)] * 3) for name in "abc")
    for each in (a, b, c):
        s.queue.add(each)
    assert step(s) == {"a": 3, "b": 3}
    s.queue.remove(a)
    assert step(s) == {"b": 1, "c": 3}


def test_a_cached_prefix_is_not_computed_again():
    s = scheduler()
    a = sequence("a", 100)
    s.queue.add(a)
    step(s), step(s)
    s.queue.remove(a)
    b = sequence("b", [*range(100), 7, 7])
    s.queue.add(b)
    assert step(s) == {"b": 102 - 96}
    assert b.output.usage.cached_tokens == 96


def test_out_of_pages_the_youngest_is_recomputed():
    """Out of pages, the youngest gives way, and is recomputed with nothing lost."""
    s = scheduler(num_pages=6, max_batch=4)
    old, young = sequence("old", [1] * 30), sequence("young", [2] * 30)
    s.queue.add(old), s.queue.add(young)
    for _ in range(40):
        step(s)
    assert s.queue.preemptions > 0
    assert old in s.queue.running
    tokens = list(young.tokens)
    s.queue.remove(old)
    for _ in range(5):
        step(s)
    assert young.tokens[:len(tokens)] == tokens and len(young.tokens) > len(tokens)


def test_forced_tokens_may_preempt_a_prompt_at_once():
    """Forced tokens that need pages may preempt a prompt in the same step."""
    s = scheduler(num_pages=5, prefill_chunk=16)
    calling, prompt = sequence("calling", [1] * 12), sequence("prompt", [2] * 40)
    s.queue.add(calling)
    step(s)
    s.queue.add(prompt)
    step(s)
    assert len(prompt.pages) == 3 and s.pool.available == 1
    calling.tokens += [7] * 20          # the tokens that a tool's result forces
    assert "prompt" not in step(s)
    assert prompt in s.queue.waiting and not prompt.pages


def test_cancel_frees_pages_wherever_the_request_is():
    s = scheduler(max_batch=2)
    for name in ("decoding", "prefilling", "queued"):
        s.queue.add(sequence(name, [ord(name[0])] * (5 if name == "decoding" else 200)))
    step(s)
    for name in ("decoding", "prefilling", "queued"):
        assert len(s.queue.cancel(name)) == 1
        assert queue_faults(s.queue) == []
    assert s.queue.cancel("queued") == []
    assert s.pool.available == s.pool.num_pages


def names(sequences):
    return [each.work.id for each in sequences]


def test_the_largest_client_gives_up_its_youngest():
    """A client that holds most pages gives up its youngest for another."""
    s = scheduler(num_pages=14)
    for name in "abc":
        s.queue.add(sequence(name, [ord(name)] * 60, "rich"))
    step(s)
    s.queue.add(sequence("d", [1] * 60, "poor"))
    s.queue.add(sequence("e", [2] * 60, "poor"))
    step(s)
    assert names(s.queue.running) == ["a", "b", "d"] and names(s.queue.waiting) == ["c", "e"]     # e would make the rich one the poor one
    for _ in range(20):
        step(s)
    assert names(s.queue.running) == ["a", "d"] and s.queue.preemptions < 5


def test_the_client_with_fewest_pages_goes_first():
    """Who holds fewest pages is admitted first, and a large prompt of another waits alone."""
    s = scheduler(num_pages=12)
    s.queue.add(sequence("a", [1] * 100, "rich"))
    step(s)
    s.queue.add(sequence("large", [2] * 150, "rich"))
    s.queue.add(sequence("small", [3] * 20, "poor"))
    step(s)
    assert names(s.queue.running) == ["a", "small"] and names(s.queue.waiting) == ["large"]


def test_a_page_is_taken_from_the_client_with_most():
    """Who needs a page takes it from the client with most."""
    s = scheduler(num_pages=9)
    s.queue.add(sequence("poor", [1] * 30, "p"))
    step(s)
    s.queue.add(sequence("rich", [2] * 94, "r"))
    while len(s.queue.running) == 1:
        step(s)
    while not s.queue.preemptions:
        step(s)
    assert names(s.queue.running) == ["poor"]


def test_a_preempted_sequence_gets_no_draft_pages():
    """It would be computed from pages without meaning, and nobody would give them back."""
    s = scheduler(num_pages=9)
    s.queue.add(rich := sequence("rich", [1] * 78, "r"))
    step(s), step(s)
    s.queue.add(sequence("poor", [2] * 42, "p"))
    while not s.queue.preemptions:
        rich.draft = Draft("lookup", (1, 1))
        ran = step(s)
    assert ran == {"poor": 1} and names(s.queue.waiting) == ["rich"] and not rich.pages


def test_the_oldest_prompt_keeps_its_half_of_a_step():
    """The answer is older, and has to be computed again; but not in this step, in which it has no pages and no row."""
    s = scheduler(prefill_chunk=32)
    s.queue.add(answer := sequence("answer", [1] * 300, "rich"))
    while answer.pending != 1:
        step(s)
    s.queue.add(sequence("decodes", [2] * 15, "poor"))
    step(s)
    for name, length in (("oldest", 100), ("short", 40), ("other", 40)):
        s.queue.add(sequence(name, [ord(name[0])] * length, "poor"))
    assert step(s) == {"answer": 1, "decodes": 1, "oldest": 16, "short": 16}
    s.pool.allocate(s.pool.available)       # another takes the last pages
    plan = {chunk.sequence.work.id: chunk.count for chunk in s.schedule()}
    assert s.queue.preemptions == 1 and not answer.pages
    assert plan == {"decodes": 1, "oldest": 16, "short": 16}


@pytest.mark.parametrize("free, fitting", [(0, 3), (1, 3), (2, 3), (3, 19), (4, 35), (5, 40)])
def test_a_draft_leaves_each_running_sequence_a_page(free, fitting):
    """A draft of 40 tokens gets what its sequence's last page has left, and the free pages but two, which the
    two that run may need."""
    s = scheduler(num_pages=16)
    one, other = sequence("a", 13), sequence("b", 5)
    s.queue.add(one)
    s.queue.add(other)
    s.schedule()
    s.queue.pool.take(s.queue.pool.available - free)
    assert s.queue.grow_spare(one, 40) == fitting
    assert s.queue.pool.available == min(free, 2)
    assert s.queue.grow_spare(one, 2) == 2


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("clients", [1, 3])
def test_random_traffic_starves_nobody(clients, drafts):
    """Random traffic loses no page and starves nobody."""
    generator = random.Random(3)
    s = scheduler(num_pages=40, max_batch=6, prefill_chunk=32)
    alive, finished = [], 0
    for number in range(600):
        if generator.random() < 0.3 and len(alive) < 12:
            shared = [generator.randrange(2)] * generator.randrange(1, 80)
            tokens = shared + [number] * generator.randrange(1, 100)
            alive.append(sequence(f"r{number}", tokens, str(generator.randrange(clients))))
            s.queue.add(alive[-1])
        if alive and generator.random() < 0.05:
            gone = alive.pop(generator.randrange(len(alive)))
            s.queue.cancel(gone.work.id)
        step(s, next_token=number)
        for each in alive if drafts else ():
            each.draft = Draft("lookup", (number,) * generator.randrange(4))
        for each in [e for e in alive if e.generated >= 8]:
            s.queue.remove(each)
            alive.remove(each)
            finished += 1
    for _ in range(400):
        step(s)
        for each in [e for e in alive if e.generated >= 8]:
            s.queue.remove(each)
            alive.remove(each)
            finished += 1
    assert not alive and finished > 50
    assert s.pool.available == s.pool.num_pages


def test_scheduling_needs_no_torch():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from chatlm.common.messages.requests import AnswerParams; "
            "from chatlm.worker.engine.kvcache import PagePool; from chatlm.worker.engine.limits import StepLimits; "
            "from chatlm.worker.engine.scheduler import Scheduler; from chatlm.worker.engine.sequence import Assignment, Sequence; "
            "s = Scheduler(PagePool(9), StepLimits(2, 8, max_rows=2)); "
            "s.queue.add(Sequence(Assignment('a', (1, 2), AnswerParams(), 5), [1, 2], 7)); assert len(s.schedule()) == 1; "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(Path(chat_server.__file__).parent)], check=True, timeout=60)
