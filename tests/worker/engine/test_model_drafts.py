"""What a model that drafts costs and brings, on a played clock: it decides by the times of both models'
steps, by what computing a prompt takes, and by how often it was right."""

import random
from types import SimpleNamespace

import pytest

from chatlm.common.messages.requests import Usage
from chatlm.worker.engine import model_drafts
from chatlm.worker.engine.drafts import NO_DRAFT, Draft, Drafting
from chatlm.worker.engine.model_drafts import ModelDrafts, Savings, best_cut, chances_of, with_drafting
from chatlm.worker.engine.times import Times

STEP_S = 0.05       # of the model, one row


class Machine:
    """A clock, and a model and its drafter on it. A row more in a step takes `slope` of a step; a step of the
    drafter `draft`, and a token of a prompt there `token`, also in steps."""

    def __init__(self, monkeypatch, right, slope=0.1, draft=0.3, token=0.02, sources=()):
        self.now_s = 0.0
        self.right, self.slope, self.draft_s, self.token_s = right, slope, draft * STEP_S, token * STEP_S
        self.random = random.Random(1)
        self.computed = 0
        self.known = {}         # sequence -> tokens that the drafter has computed
        monkeypatch.setattr(model_drafts, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.source = ModelDrafts(self)
        self.drafting = Drafting([*sources, self.source], times := Times())
        self.transformer = SimpleNamespace(weights_bytes=draft * 1e9)
        self.source.plan_by(times, 64, 1e9)
        times.token_s = token * STEP_S / draft
        for rows in (1, 2, 4, 8, 64):
            times.rows.note(rows, self.step_s(rows))

    name, title, reads_hidden, longest = "model", "the draft model small", False, 1 << 20

    def step_s(self, rows):
        return STEP_S * (1 + self.slope * (rows - 1))

    # as a drafter

    def behind(self, sequence):
        return len(sequence.tokens) - self.known.get(sequence, 0)

    def draft(self, wanted):
        drafts = {}
        self.computed = 0
        for sequence, length in wanted.items():
            fresh = self.behind(sequence)
            self.known[sequence] = len(sequence.tokens)
            self.computed += fresh
            self.now_s += (fresh if fresh > 8 else 0) * self.token_s + length * self.draft_s
            drafts[sequence] = [1] * length
        return drafts

    def end(self, sequence):
        self.known.pop(sequence, None)

    # as an engine

    def answer(self, prompt, tokens, right=None):
        """How long an answer takes after its first token, to what it takes without drafts."""
        right = self.right if right is None else right
        work = SimpleNamespace(prompt_ids=range(prompt), background=False)
        output = SimpleNamespace(usage=Usage(), grammar=None, ready=True)
        sequence = Sequence(work, output, [0] * (prompt + 1))
        self.drafting.begin(sequence)
        began_s = self.now_s
        while len(sequence.tokens) < prompt + tokens:
            self.drafting.propose([sequence], 1, 64)
            drafted = len(sequence.draft.tokens)
            came = [1 if self.random.random() < right else 2 for _ in range(drafted + 1)]
            accepted = next((i for i, token in enumerate(came[:drafted]) if token != 1), drafted)
            came = came[:accepted + 1]
            self.now_s += self.step_s(1 + drafted)
            sequence.tokens += came
            self.drafting.judge(sequence, drafted, accepted, came)
        self.drafting.end(sequence)
        return (self.now_s - began_s) / ((tokens - 1) * STEP_S)


class Sequence:
    """Enough of one for a source."""

    drafts, finished, pending, placeholders = True, False, 1, None

    def __init__(self, work, output, tokens):
        self.work, self.output, self.tokens, self.draft = work, output, tokens, NO_DRAFT


def mean(values):
    values = [*values]
    return sum(values) / len(values)


@pytest.mark.parametrize("prompt, tokens", [(50, 200), (1000, 300), (4000, 40)])
@pytest.mark.parametrize("right, slope, draft", [(0.5, 0.1, 0.4), (0.9, 0.45, 0.6), (0.05, 0.02, 0.2)],
                         ids=["seldom right", "dear rows", "never right"])
def test_drafts_that_do_not_pay_cost_little(prompt, tokens, right, slope, draft, monkeypatch):
    machine = Machine(monkeypatch, right, slope, draft)
    first = machine.answer(prompt, tokens)
    assert first < 1.1 + prompt * machine.token_s / (tokens * STEP_S)       # one try, to know what it costs
    assert mean(machine.answer(prompt, tokens) for _ in range(40)) < 1.03


def test_drafts_that_pay_are_used_at_once(monkeypatch):
    machine = Machine(monkeypatch, 0.93, 0.1, 0.3)
    machine.answer(50, 100)
    assert mean(machine.answer(50, 200) for _ in range(20)) < 1 / 1.3


def test_a_try_that_is_right_is_followed_by_drafts(monkeypatch):
    """Where drafts pay from 75 % on, the first answer does not rest after its first try."""
    machine = Machine(monkeypatch, 0.95, 0.2, 0.55)
    assert machine.answer(50, 400) < 0.95


def test_a_prompt_is_computed_only_if_that_is_paid_back(monkeypatch):
    """It takes as long as 80 steps: an answer of 30 tokens saves ten, one of 1,000 three hundred."""
    machine = Machine(monkeypatch, 0.93, 0.1, 0.3)
    machine.answer(50, 20)
    machine.source.savings.balance_s = 0.0
    assert mean(machine.answer(4000, 30) for _ in range(20)) < 1.04
    assert mean(machine.answer(4000, 1000) for _ in range(5)) < 0.9


class Copies:
    """A source like lookup: of ten tokens it drafts eight, which are right."""

    name, rests = "lookup", False

    def begin(self, sequence): ...
    def judge(self, sequence, draft, verified, accepted): ...
    def end(self, sequence): ...

    def propose(self, sequences):
        return [Draft("lookup", (1,) * 8, tuple(0.99 ** (i + 1) for i in range(8)), len(sequence.tokens))
                if len(sequence.tokens) % 10 < 2 else NO_DRAFT for sequence in sequences]


@pytest.mark.parametrize("prompt", [50, 2000])
def test_beside_lookup_that_knows_nearly_all_little_is_lost(prompt, monkeypatch):
    """However much was saved in other answers before."""
    alone = Machine(monkeypatch, 1.0, sources=[Copies()])
    both = Machine(monkeypatch, 1.0, sources=[Copies()])
    monkeypatch.setattr(alone.source, "propose", lambda sequences: [NO_DRAFT] * len(sequences))
    known = mean(alone.answer(prompt, 200) for _ in range(20))
    both.drafting.sources.pop("lookup")
    both.answer(50, 400, right=0.95)
    both.drafting.sources = {"lookup": Copies(), "model": both.source}
    monkeypatch.setattr(model_drafts, "time", SimpleNamespace(monotonic=lambda: both.now_s))
    assert mean(both.answer(prompt, 200) for _ in range(20)) < 1.04 * known


def test_drafts_begin_to_pay_again(monkeypatch):
    machine = Machine(monkeypatch, 0.3)
    for _ in range(40):
        machine.answer(50, 200)
    assert mean(machine.answer(50, 200, right=0.95) for _ in range(60)) < 0.85


def test_what_is_there_already_is_taken_if_it_gives_more():
    step_s = [STEP_S * (1 + 0.1 * rows) for rows in range(9)]
    there = best_cut([0.99, 0.98, 0.97, 0.96], step_s).gain
    assert there == pytest.approx(0.99 + 0.98 + 0.97 + 0.96 - 0.4)
    assert 0 < best_cut(chances_of(0.9, 7), with_drafting(step_s, 0.3 * STEP_S)).gain < there
    assert best_cut([0.05], step_s).gain == best_cut([], step_s).gain == 0


def test_time_is_worth_what_the_answer_has_in_it():
    """An answer that gets five tokens a step from lookup loses by waiting for a draft of three."""
    step_s = [STEP_S * (1 + 0.1 * rows) for rows in range(9)]
    chances, seconds = chances_of(0.9, 7), with_drafting(step_s, 0.3 * STEP_S)
    assert best_cut(chances, seconds).tokens
    assert not best_cut(chances, seconds, speed=5 / STEP_S).tokens


def test_the_log_says_whether_drafts_pay(monkeypatch, caplog):
    caplog.set_level("INFO")
    machine = Machine(monkeypatch, 0.93, 0.1, 0.3)
    for _ in range(4):
        machine.answer(50, 200)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("the draft model small is right about 9")
    assert "0.30 of the model's time: one answer " in line
    assert mean(machine.answer(50, 200, right=0.1) for _ in range(60)) < 1.05
    [_, line] = [record.getMessage() for record in caplog.records]
    assert line.endswith("too seldom for what it costs, so it is only tried now and then")


def test_savings_are_bounded():
    savings = Savings()
    savings.add(1e9)
    assert savings.balance_s == Savings.MOST_S
    savings.add(-1e9)
    assert savings.balance_s == -Savings.MOST_S
