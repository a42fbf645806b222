"""How many tokens of prompts a step has beside answers. A machine of made-up speed stands in for the model."""

import random

import pytest

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.pace import PromptPace
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.engine.times import PromptTimes
from works import assignment

WHOLE = 256


def sequence(name, tokens):
    tokens = list(tokens)
    return Sequence(assignment(name, tuple(tokens), SamplingParams(), 1000), tokens, 9000)


def step(s):
    """Schedule a step, and pretend to compute it; {name: tokens computed}."""
    plan = s.schedule()
    for chunk in plan:
        s.queue.advance(chunk)
        if chunk.draws:
            chunk.sequence.tokens.append(1)
    return {chunk.sequence.work.id: chunk.count for chunk in plan}


def machine(token_s, rows_s):
    """A scheduler whose machine has been measured: a step without prompts takes rows_s."""
    s = Scheduler(PagePool(2000), StepLimits(8, WHOLE, max_rows=64))
    s.times.alone.extend([rows_s] * 5)
    for _ in range(PromptTimes.RECENT):
        s.times.prompts.note(WHOLE, rows_s + WHOLE * token_s, rows_s)
    return s


def lateness(tokens, token_s, rows_s):
    return (rows_s / tokens + token_s) / (rows_s / WHOLE + token_s) - 1


# a token of a prompt, and a step of answers: about the 0.5B at its prompt's begin and end, the 1.5B, a phone, a GPU
@pytest.mark.parametrize("token_s, rows_s", [
    (0.0016, 0.014), (0.005, 0.016), (0.01, 0.04), (0.1, 0.4), (0.00002, 0.005), (0.0005, 0.3), (0.02, 0.1)])
@pytest.mark.parametrize("beside", [1, 4, 31, 33, 200])
def test_the_answers_go_on_unless_the_prompt_would_be_late(token_s, rows_s, beside):
    """A step takes about STEP_S, or as long as it must for its prompt to be no later than LATENESS. Its rows
    fill what kernels compute together."""
    pace = PromptPace()
    tokens = pace.tokens(machine(token_s, rows_s).times, WHOLE, beside)
    assert PAGE_SIZE <= tokens <= WHOLE
    assert tokens == WHOLE or (tokens + beside) % pace.ROWS == 0
    assert lateness(tokens, token_s, rows_s) <= pace.LATENESS
    more, fewer = tokens + pace.ROWS, tokens - pace.ROWS
    assert more > WHOLE or rows_s + more * token_s > pace.STEP_S
    soon = rows_s + (tokens - pace.ROWS / 2) * token_s <= pace.STEP_S
    assert soon or fewer < PAGE_SIZE or lateness(fewer, token_s, rows_s) > pace.LATENESS


def test_prompts_are_whole_while_nobody_writes():
    """The chunk is small beside an answer, whole before it and after it."""
    s = machine(0.003, 0.015)
    s.queue.add(sequence("long", range(4000)))
    assert step(s) == {"long": WHOLE}
    s.queue.add(sequence("short", [7] * 8))
    counts = [step(s) for _ in range(6)]
    assert counts[0] == {"long": 56, "short": 8}  # in a short step, so that its first token comes soon
    assert counts[1:] == [{"long": 63, "short": 1}] * 5
    s.queue.cancel("short")
    assert step(s) == {"long": WHOLE}


def test_four_answers_are_no_slower_than_one():
    """The step beside four answers is as long as that beside one."""
    s = machine(0.003, 0.015)
    s.queue.add(sequence("long", range(4000)))
    for name in "abcd":
        s.queue.add(sequence(name, [ord(name)] * 4))
    step(s)
    assert step(s) == {"long": 60, "a": 1, "b": 1, "c": 1, "d": 1}


def test_a_disturbed_step_of_many_rows_says_nothing():
    """A warm-up's step of eight rows that took seconds makes no chunk larger beside four answers."""
    s = machine(0.003, 0.015)
    s.times.alone.extend([5.0, 0.015])
    s.times.rows.note(8, 5.0)
    s.queue.add(sequence("long", range(4000)))
    for name in "abcd":
        s.queue.add(sequence(name, [ord(name)] * 4))
    step(s)
    assert step(s)["long"] == 60


def test_several_prompts_share_a_small_chunk():
    """Half of it goes to the oldest prompt, the rest to the shortest."""
    s = machine(0.003, 0.015)
    for name, length in (("answer", [1] * 4), ("long", [2] * 2000), ("other", [3] * 900), ("short", [4] * 500)):
        s.queue.add(sequence(name, length))
    step(s)
    assert step(s) == {"answer": 1, "long": 31, "short": 32}


def test_prompts_alone_are_not_slowed_by_each_other():
    """Long prompts of which none ends soon are computed in whole chunks."""
    s = machine(0.003, 0.015)
    s.queue.add(sequence("long", [2] * 2000))
    s.queue.add(sequence("other", [3] * 900))
    assert step(s) == {"long": 128, "other": 128}


def test_the_first_chunk_is_whole_until_a_prompt_is_measured():
    """Nothing is known of a machine whose prompts were not measured."""
    s = Scheduler(PagePool(600), StepLimits(8, WHOLE, max_rows=8))
    s.queue.add(sequence("short", [7] * 8))
    step(s)
    s.queue.add(sequence("long", range(4000)))
    assert step(s) == {"short": 1, "long": WHOLE}
    s.times.prompts.note(WHOLE, 10.0, 0.0)
    assert step(s) == {"short": 1, "long": PromptPace.ROWS - 1}


def test_the_limit_stays_the_limit():
    """--prefill-chunk is never exceeded, even where it is no number of whole pages."""
    times = machine(0.0001, 0.3).times
    assert [PromptPace().tokens(times, most, beside=1) for most in (16, 20, 60)] == [16, 20, 60]


def test_chunks_follow_a_machine_that_gets_slower():
    """Played on a clock: a prompt's tokens take the longer, the more of them there are, and one step in ten
    is disturbed for a second. Steps stay short all the same."""
    s, dice, pace = machine(0.0016, 0.014), random.Random(7), PromptPace()
    done = clock_s = whole_s = 0.0
    steps = []
    while done < 9700:
        token_s = 0.0016 * (1 + 2.5 * done / 9700)
        tokens = pace.tokens(s.times, WHOLE, beside=1)
        seconds = 0.014 + tokens * token_s
        steps.append(seconds)
        disturbed_s = 1.0 if dice.random() < 0.1 else 0.0
        s.times.prompts.note(tokens, seconds + disturbed_s, 0.014)
        done += tokens
        clock_s += seconds
        whole_s += tokens * (0.014 / WHOLE + token_s)
    assert sorted(steps)[len(steps) * 9 // 10] < 0.25
    assert clock_s < 1.15 * whole_s
    assert len(steps) / clock_s > 4


def test_one_disturbed_step_changes_nothing():
    """The measured time is a median, and steps with hardly any prompt do not count."""
    times = machine(0.003, 0.015).times
    times.prompts.note(64, 30.0, 0.015)
    times.prompts.note(3, 1.0, 0.015)
    assert times.prompts.token_s == pytest.approx(0.003)
    times.prompts.note(64, 0.001, 5.0)  # its rows were expected to take longer than all of it
    assert min(times.prompts.recent) > 0
