"""Random traffic through a Scheduler, and a digest of all that it decides: the same seed always gives the same traffic, as long as the
decisions are the same. Plain lists stand in for the model."""

import hashlib
import random
from concurrent.futures import Future
from types import SimpleNamespace

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.integrity import queue_faults
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Chunk, SequenceOutput, Sequence
from chatlm.worker.engine.encoded_pictures import Placeholders
from chatlm.worker.engine.states import StatePool
from works import assignment

STEPS = 220  # of one traffic
PAGE = 16    # tokens


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Traffic:
    """Answers, prompts that are scored, texts, background work and pictures, of three clients, in one Scheduler whose shape the seed
    decides: pages, windows, states, stages, rows. Sequences come, are cancelled, fail and are preempted at random.

    In four of ten traffics prompts are short, answers long and pages few: only then do answers take pages from each other."""

    def __init__(self, seed, clock):
        self.dice, self.clock = random.Random(seed), clock
        dice = self.dice
        self.of_texts = dice.random() < 0.12
        windows = dice.choice([(0,), (0,), (0,), (0, 32), (48, 0)])
        self.stages = dice.choice([1, 1, 1, 1, 2, 3])
        exact = dice.random() < 0.7
        self.batch = dice.choice([1, 2, 3, 6, 12])
        chunk = dice.choice([16, 20, 32, 64])
        pages = dice.choice([24, 40, 60, 200]) * len(windows)
        self.pressed = dice.random() < 0.4
        if self.pressed:
            pages = dice.choice([10, 14, 20]) * len(windows)
            self.batch = dice.choice([3, 6, 12])
        self.states = self.some_states() if dice.random() < 0.25 and not self.of_texts else None
        self.gated = set()  # ids of answers that await kept pages
        awaits = (lambda sequence: sequence.work.id in self.gated) if dice.random() < 0.4 else None
        self.pool = PagePool(pages, windows, self.states)
        self.background_share = dice.choice([0.0, 0.0, 0.3, 1.0] if self.pressed else [0.0, 0.3, 0.7, 1.0])
        self.texts_share = dice.choice([0.0, 0.0, 0.3])
        self.lengths = (30, 140) if self.pressed else (1, 40)  # of answers
        self.drafts = self.background_share > 0 or dice.random() < 0.7  # without, nothing is computed beside answers
        self.scheduler = Scheduler(self.pool, StepLimits(self.batch, chunk, dice.choice([self.batch, self.batch + 4, 64]), self.stages, exact, self.of_texts))
        self.set_up(awaits)
        self.longest = min(pages // len(windows), 20) * PAGE - 2
        self.alive = []  # sequences that have not ended
        self.marks = []  # (step, sequence): when the token being drawn will be known, with several stages
        self.stems = [[dice.randrange(50) for _ in range(200)] for _ in range(3)]
        self.preempted_answers = 0  # which lost their pages to other sequences

    def some_states(self):
        slots = self.batch + 8 + self.dice.choice([0, 2, 20])
        states = StatePool(slots, max(slots - self.batch - 8, 0))
        states.INTERVAL = self.dice.choice([32, 1024])
        return states

    def set_up(self, awaits):
        """What the engine gives its scheduler."""
        scheduler, dice = self.scheduler, self.dice
        if self.drafts:
            for rows in range(1, dice.randrange(2, 40)):
                scheduler.times.rows.note(rows, 1 + dice.choice([0.0, 0.004, 0.03, 0.2]) * rows)
                scheduler.times.host_rows.note(rows, 1.5 + 0.01 * rows)
        if awaits:
            scheduler.queue.add_gate(lambda sequence: not sequence.uncached and awaits(sequence))
        scheduler.times.token_s = dice.choice([0.0, 0.0001, 0.002, 0.05])
        scheduler.lane.ahead, scheduler.lane.recorded = dice.random() < 0.5, dice.random() < 0.3
        scheduler.lane.TRIAL = 7
        self.word = SimpleNamespace(others_write=False)
        if dice.random() < 0.3:
            scheduler.lane.give_way_to(self.word)

    def run(self):
        """Play all steps -> a digest of each, which covers those before it."""
        digest, found = hashlib.sha256(), []
        for number in range(STEPS):
            self.clock.now_s += self.dice.choice([0.001, 0.02, 0.3, 1.0])
            self.word.others_write = self.dice.random() < 0.3
            if self.dice.random() < 0.35 and len(self.alive) < 2 * self.batch + 6:
                self.arrive(number)
            self.make_ready()
            digest.update(repr(self.disturb()).encode())
            self.draft()
            answers = [sequence for sequence in self.scheduler.queue.running if sequence.decodes and not sequence.work.background]
            plan = self.scheduler.schedule()
            self.preempted_answers += sum(not sequence.pages for sequence in answers)
            lines = [(chunk.sequence.work.id, chunk.count, chunk.draws, chunk.draft, chunk.reads, chunk.writes, chunk.on_host, chunk.rows)
                     for chunk in plan]
            for chunk in plan:
                self.compute(chunk, number)
            self.know_marks(number)
            self.end_answers()
            faults = queue_faults(self.scheduler.queue)
            assert not faults, (number, faults)
            digest.update(repr((lines, self.state())).encode())
            found.append(digest.hexdigest()[:12])
        return found

    # before a step

    def arrive(self, number):
        dice = self.dice
        length = dice.randrange(1, max(2, min(self.longest - 20, 40 if self.pressed else 180)))
        shared = dice.randrange(0, length + 1)
        tokens = dice.choice(self.stems)[:shared] + [dice.randrange(50) for _ in range(length - shared)]
        params = self.some_params()
        pooled = "pooling" in params
        most = 0 if pooled else dice.randrange(*self.lengths)
        work = assignment(f"r{number}", tuple(tokens), SamplingParams(), most, client=dice.choice("xyz"), owner=dice.choice(["", "", "o"]),
                          background=dice.random() < self.background_share, **params)
        scored = dice.choice([0, 0, dice.randrange(length + 1)]) if "prompt_logprobs" in params else 0
        limit = length if pooled else min(length + most, self.longest)
        sequence = Sequence(work, tokens, limit, output=SequenceOutput(scored=scored))
        if not pooled and not self.states and dice.random() < 0.12:
            sequence.placeholders = self.some_placeholders(length)
        if dice.random() < 0.1:
            sequence.output.preparing = Future()
        if dice.random() < 0.2:
            self.gated.add(work.id)
        if dice.random() < 0.2:
            sequence.restoration = SimpleNamespace(over=False)
        self.add(sequence)
        if not params and not sequence.placeholders and dice.random() < 0.3:
            self.add_twin(sequence, f"t{number}")

    def add_twin(self, sequence, name):
        """Another answer to the same prompt, which catches up with the first."""
        work = sequence.work
        twin = assignment(name, work.prompt_ids, SamplingParams(), work.max_tokens, client=work.params.client, owner=work.params.owner,
                          background=work.background)
        self.add(Sequence(twin, [*sequence.tokens], sequence.limit, restoration=SimpleNamespace(over=False)))

    def add(self, sequence):
        self.scheduler.queue.add(sequence)
        self.alive.append(sequence)

    def some_params(self):
        dice, params = self.dice, {}
        if self.of_texts or dice.random() < self.texts_share:
            params["pooling"] = dice.choice(["mean", "last"])
        elif dice.random() < 0.15:
            params["prompt_logprobs"] = 0
        elif dice.random() < 0.15:
            params["logprobs"] = 2
        if dice.random() < 0.1:
            params["progress"] = True
        return params

    def some_placeholders(self, length):
        """Up to three pictures in a prompt, of which some are encoded later."""
        dice, places, owners, seen = self.dice, [], [], []
        at = dice.randrange(0, 30)
        while at < length - 8 and len(seen) < 3:
            count = dice.randrange(3, min(24, length - at))
            places += range(at, at + count)
            owners += [(len(seen), row) for row in range(count)]
            rows = object() if dice.random() < 0.5 else None
            seen.append(SimpleNamespace(layout=SimpleNamespace(tokens=count, grid=None), turns=0, rows=rows))
            at += count + dice.randrange(2, 40)
        return Placeholders(10**6, places, owners, seen, two_sided=dice.random() < 0.6) if seen else None

    def make_ready(self):
        """Some of what sequences wait for comes: their preparation, pictures, kept pages."""
        for sequence in self.alive:
            preparing = sequence.output.preparing
            if preparing and not preparing.done() and self.dice.random() < 0.3:
                preparing.set_result(None)
            if sequence.placeholders and self.dice.random() < 0.3:
                missing = [seen for seen in sequence.placeholders.pictures if seen.rows is None]
                for seen in missing[:1]:
                    seen.rows = object()
        for name in sorted(self.gated):
            if self.dice.random() < 0.2:
                self.gated.discard(name)

    def disturb(self):
        """Cancel a sequence, let a step fail, or take the pages of one; the ids of those that a failed step dropped."""
        dice, scheduler, blamed = self.dice, self.scheduler, []
        if self.alive and dice.random() < 0.04:
            gone = self.alive.pop(dice.randrange(len(self.alive)))
            scheduler.queue.cancel(gone.work.id)
            self.marks = [(when, marked) for when, marked in self.marks if marked is not gone]
        if dice.random() < 0.01 and scheduler.queue.running:
            blamed = scheduler.queue.isolate()
            self.marks = []
            self.alive = [sequence for sequence in self.alive if sequence not in blamed]
        if dice.random() < 0.02 and scheduler.queue.running:
            victim = dice.choice(scheduler.queue.running)
            if victim.tokens[-1] >= 0:
                scheduler.queue.preempt(victim)
        return [sequence.work.id for sequence in blamed]

    def draft(self):
        for sequence in self.scheduler.queue.running:
            able = self.drafts and self.stages == 1 and not sequence.pooling and sequence.tokens[-1] >= 0
            if able and self.dice.random() < 0.4:
                sequence.draft = Draft("lookup", tuple(self.dice.randrange(3) for _ in range(self.dice.randrange(5))))

    # a step

    def compute(self, chunk, number):
        """Pretend to compute a chunk, and draw."""
        sequence, dice = chunk.sequence, self.dice
        self.scheduler.queue.advance(chunk)
        if chunk.draws:
            sequence.suspect = False
            if self.stages > 1:
                sequence.tokens.append(~len(self.marks))
                self.marks.append((number + dice.randrange(1, self.stages + 1), sequence))
            else:
                sequence.tokens.append(dice.randrange(3))
                self.accept(sequence, chunk.draft)
                if dice.random() < 0.03 and len(sequence.tokens) + 20 < min(sequence.limit, self.longest):
                    sequence.tokens += [9] * dice.randrange(1, 20)  # forced
            sequence.draft = NO_DRAFT
        elif sequence.pooling and not sequence.pending:
            self.end(sequence)

    def accept(self, sequence, draft):
        for guess in draft:
            if sequence.tokens[-1] != guess or len(sequence.tokens) >= sequence.limit:
                break
            self.scheduler.queue.advance(Chunk(sequence, 1))
            sequence.tokens.append(self.dice.randrange(3))

    def know_marks(self, number):
        """With several stages, a step's tokens are known some steps later."""
        later = []
        for when, sequence in self.marks:
            if when > number:
                later.append((when, sequence))
            elif sequence.tokens[-1] < 0:
                sequence.tokens[-1] = self.dice.randrange(3)
        self.marks = later

    def end_answers(self):
        for sequence in [*self.alive]:
            is_long = len(sequence.tokens) >= sequence.limit and sequence.computed >= len(sequence.tokens) - 1
            if is_long and sequence.tokens[-1] >= 0 and not sequence.pooling and sequence.pages:
                self.end(sequence)

    def end(self, sequence):
        self.scheduler.queue.remove(sequence)
        self.alive.remove(sequence)

    def state(self):
        """All that decides what comes next."""
        scheduler, pool, states = self.scheduler, self.pool, self.states
        running = [(sequence.work.id, sequence.computed, sequence.pages, sequence.filled, sequence.serial, sorted(sequence.states.slots.items()),
                    sequence.output.queued_s, sequence.output.usage.cached_tokens) for sequence in scheduler.queue.running]
        of_states = (states.free, states.refs, [*states.passed.items()], [*states.ends.items()]) if states else None
        return (running, [sequence.work.id for sequence in scheduler.queue.waiting], [sequence.work.id for sequence in scheduler.queue.unready],
                scheduler.queue.preemptions, scheduler.lane.room, scheduler.lane.steps, pool.free, [*pool.evictable], pool.refs,
                sorted(map(repr, pool.index)), of_states)
