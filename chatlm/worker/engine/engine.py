"""The engine of a replica: schedule, run, postprocess; also drafts, prompt scores and embeddings."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.log import log
from chatlm.common.memory import empty_pages
from chatlm.common.messages.requests import (
    AnswerParams, Ended, Failed, Piece, PromptProgress, ThinkingEnds)
from chatlm.worker.arrays.kinds import address_of
from chatlm.worker.engine.adapter_slots import AdapterSlots
from chatlm.worker.engine.answer_maker import AnswerMaker
from chatlm.worker.engine.batch import make_batch, sample_rows, shown_rows
from chatlm.worker.engine.drafts import NO_DRAFT, Drafting, Forced
from chatlm.worker.engine.host import HostSteps, embedding_events
from chatlm.worker.engine.kvcache import PagePool, longest_context
from chatlm.worker.engine.model_drafts import mark_shown, show, shown_by
from chatlm.worker.engine.lookup import Lookup
from chatlm.worker.engine.scheduler import FREE_ROWS, Scheduler
from chatlm.worker.engine.sequence import Assignment, Chunk, Output, Sequence, without_tokens
from chatlm.worker.engine.sight import Pictures, sight_of
from chatlm.worker.engine.states import StatePool
from chatlm.worker.model.head import Head
from chatlm.worker.model.transformer import first_turn, show_pictures

if TYPE_CHECKING:
    from chatlm.common.answering import Word
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.answer import Answer
    from chatlm.worker.engine.model_drafts import ModelDrafts, ShownRows
    from chatlm.worker.engine.keeper import Keeper
    from chatlm.worker.model.kernels import Kernels
    from chatlm.worker.model.tower import Tower
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.ranks import RankZero


ADAPTER_GONE = "the adapter's files have changed or been removed during this answer: send the request again"


class StepUnderWay(NamedTuple):
    """A started step and what it draws, in row order."""

    plan: Seq[Chunk]
    finish: Callable[[], list[int]]  # waits for its tokens
    drawing: list[tuple[Sequence | None, tuple[int, ...]]]  # (None if ended or given forced tokens, draft)
    tokens: int     # how many it computes, without drafts
    began_s: float
    rows: int       # of answers and drafts, 0 if it also computes prompts
    on_host: bool   # does the host need its logits?


class Engine:
    """One model replica: sequences in, events out, one `step` at a time.

    If the device works in parallel with Python (`steps.ahead`), the next step starts before the tokens
    of the previous one become text; it reads them where they were drawn. A sequence that has ended wastes one
    row. Exception: a step that draws for a sequence whose tokens must be known first is finished at once."""

    TIMED_TOKENS = 64  # a smaller step says little about the speed of prefill

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, kernels: Kernels, *, num_pages: int,
                 context_length: int, max_batch: int, prefill_chunk: int, drafts: str = "auto",
                 ranks: RankZero | None = None, state_bytes: int | None = None,
                 ranking: numpy.ndarray | None = None, head: Head = Head(), lookup: Lookup | None = None,
                 draft_models: Seq[ModelDrafts] = (), tower: Tower | None = None):
        self.transformer, self.tokenizer, self.kernels = transformer, tokenizer, kernels
        slots, states = transformer.num_slots, None
        own_bytes = transformer.spec.state_bytes
        self.state_bytes = own_bytes if state_bytes is None else state_bytes  # per sequence, in all ranks
        if transformer.spec.mixers:
            states = StatePool(slots, max(slots - max_batch - FREE_ROWS, 0))
        self.pool = PagePool(num_pages, transformer.groups.windows, states)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, prefill_chunk=prefill_chunk,
                                   max_rows=len(transformer.buffers["logits"]),
                                   stages=ranks.stages if ranks else 1, exact_rows=kernels.row_invariant,
                                   of_texts=transformer.spec.of_texts)
        self.drafting = self.scheduler.drafting = Drafting([Forced(), lookup or Lookup(), *draft_models])
        self.draft_models = draft_models
        self.shown: list[ShownRows] = []  # by the step that is finished next: such steps never begin ahead
        for model in draft_models:
            model.times, model.draft_rows = self.drafting.times, self.scheduler.draft_rows
        self.scored_length = longest_context(self.pool, context_length, prefill_chunk)
        self.context_length = min(transformer.spec.context_length, self.scored_length)
        self.steps = kernels.backend.make_steps(transformer, max_batch, self.scored_length)
        self.scheduler.lane.ahead = self.steps.ahead
        self.scheduler.lane.recorded = transformer.device.type == "cuda"
        self.ranks = ranks
        if ranks:
            self.steps = ranks.steps(self.steps, transformer)
        self.answers, self.ranking = AnswerMaker(tokenizer), ranking  # see LoadedModel
        self.host = HostSteps(transformer, self.steps, self.answers, self._emit, head)
        self.adapters = AdapterSlots(transformer, ranks)
        self.pictures = Pictures(tower, first_turn(transformer.spec))
        if tower:
            self.drafting.first_id = tower.eyes.vision.first_id
        self.under_way: deque[StepUnderWay] = deque()  # at most one, or one for each other stage
        # `step` returns these, each with its answer's id, even if the step that produced them failed
        self.events: list[tuple[str, WorkerEvent]] = []
        exact = kernels.row_invariant or kernels.backend.few_rows_invariant and not ranks
        # else a drafted row could differ from the same row computed alone
        self.drafts = drafts != "none" and exact
        self.keeper: Keeper | None = None  # set if pages outlive the process
        self.token_s = self.finished_s = 0.0  # measured seconds per prompt token; when the last step ended
        self.first_chunk = min(prefill_chunk, self.context_length // 2)  # length of the prompt in warm_up
        self.timed_tokens = min(self.TIMED_TOKENS, self.first_chunk)  # so that warm_up yields a time
        self.word: Word | None = None  # tells the server's embedders when answers are written
        self.step_s = 0.0  # how long the last step took
        self.cold: list[tuple[int, int]] = []  # (rows, tokens) of steps to run while nobody asks

    @property
    def busy(self) -> bool:
        return bool(self.under_way or self.scheduler.running or self.scheduler.waiting)

    def add(self, work: Assignment):
        """Queue an answer; its prompt must fit the context (the front has checked this)."""
        slot = self.adapters.slots.get(work.params.adapter, 0)
        if work.params.adapter and not slot:
            self.events.append((work.id, Failed(ADAPTER_GONE)))
            return
        if self.tokenizer.spec.suppressed:
            work = without_tokens(work, self.tokenizer.spec.suppressed)
        sight, fault = sight_of(self.pictures, work)
        if fault := fault or (unfit(work, self.context_length) if self.scheduler.of_texts else ""):
            self.events.append((work.id, Failed(fault)))
            return
        # a prompt that is only scored may fill the context, yet a token is drawn for it too
        most = max(self.context_length, len(work.prompt_ids) + min(work.max_tokens, 1))
        limit = min(len(work.prompt_ids) + work.max_tokens, most)
        sequence = Sequence(work, [*work.prompt_ids, *work.resumed_ids], limit, adapter=slot,
                            adapter_digest=self.adapters.digests.get(slot, ""),
                            sight=sight, output=Output(scored=work.scored))
        self.answers.make(sequence)
        if self.drafts and work.may_draft and not work.params.pooling:
            self.drafting.begin(sequence)
        self.scheduler.add(sequence)
        if self.transformer.layer_embed:
            self.transformer.layer_embed.will_need(sequence.tokens)

    def cancel(self, answer_id: str) -> bool:
        gone = self.scheduler.cancel(answer_id)
        for sequence in gone:
            if sequence.output.preparing:
                sequence.output.preparing.cancel()
        return bool(gone)

    def end_thinking(self, answer_id: str):
        """End the reasoning of an answer with its next token, and emit the position of that token."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.work.id == answer_id:
                answer = sequence.output.answer
                self._emit(sequence, ThinkingEnds(answer.end_thinking() if answer else None))

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[tuple[str, WorkerEvent]]:
        """Start the next step, call `meanwhile`, finish older ones; returns new events with answers' ids."""
        if self.keeper and self.keeper.reader.arrived:
            self._finish_until(0)
            self.keeper.adopt()
        self.pictures.advance(self.scheduler.running)
        began_s, plan = time.monotonic(), self.scheduler.schedule()
        mark_shown(plan, self.draft_models)
        on_host = any(chunk.on_host for chunk in plan)
        if self.word and not all(chunk.sequence.pooling or chunk.sequence.work.background for chunk in plan):
            self.word.note(self.step_s)
        alone = on_host or shows(self.transformer, plan)  # it starts when no other is under way
        finish = self._start(plan) if plan and not alone else None
        meanwhile()
        if not plan and not self.under_way:
            self._wait()
        self._finish_until(self._most_under_way(plan, alone) - 1)
        self.shown = shown_by(plan, on_host)
        if alone:
            plan, finish = run_alone(self, [c for c in plan if not c.sequence.finished], on_host)
        if self.keeper and not self.under_way:
            self.keeper.settle()
        if plan and finish:
            self._advance(plan, finish, began_s)
        self._finish_until(self._most_under_way(plan, alone))
        if self.keeper and not self.busy:  # before the last answer's end is reported
            self.keeper.settle()
            if self.keeper.copier.waits and not self.events:
                self.keeper.reader.wait(0.02)
        events, self.events = self.events, []
        return events

    def _most_under_way(self, plan: Seq[Chunk], on_host: bool) -> int:
        """How many steps may be under way once this one has started: one or, with several stages, one for
        each other stage; none if its tokens must be known first, or if nobody waits for them: a request that
        comes now would wait for the one ahead too. Without a plan, the oldest is finished."""
        if not plan:
            return len(self.under_way)
        stages = self.scheduler.stages
        awaited = on_host or not self.steps.ahead or stages == 1 and (
            any(map(self._awaits, plan)) or all(chunk.sequence.work.background for chunk in plan))
        return 0 if awaited else max(1, stages - 1)

    def _awaits(self, chunk: Chunk) -> bool:
        """Must the step with this chunk be finished before the next one starts: for its tokens, or because
        its hidden states will be read?"""
        sequence = chunk.sequence
        return sequence.shown or bool(chunk.draws) and (
            bool(sequence.draft.tokens) or sequence.work.needs_tokens
            or sequence.drafts and any(model.awaits(sequence) for model in self.draft_models))

    def _finish_until(self, most: int):
        """Finish the oldest steps, until at most this many are under way."""
        while self.under_way and len(self.under_way) > most:
            self._finish()

    def _wait(self):
        """Every sequence here is still being prepared, awaits kept pages, or other workers' answers: wait a
        little."""
        if self.scheduler.lane.must_wait():
            return time.sleep(self.scheduler.lane.PAUSE_S)
        preparing = [s.output.preparing for s in self.scheduler.unready if s.output.preparing]
        preparing += self.pictures.preparing
        if preparing or not self.keeper:
            wait(preparing, 0.02, FIRST_COMPLETED)
        elif self.scheduler.waiting:
            self.keeper.reader.wait(0.02)

    def _emit(self, sequence: Sequence, *events: WorkerEvent):
        self.events += [(sequence.work.id, event) for event in events]

    def _start(self, plan: Seq[Chunk]) -> Callable[[], list[int]]:
        """Start a step; returns a function that waits for its tokens."""
        rows = sample_rows(plan, self.tokenizer.stop_tokens)
        return partial(self.steps.finish, self.steps.start(make_batch(plan, self.transformer.spec), rows))

    def keep(self, keeper: Keeper):
        """Keep pages beyond the life of this process from now on."""
        self.keeper = self.scheduler.keeper = keeper
        keeper.pace.token_s = self.token_s

    def _advance(self, plan: Seq[Chunk], finish: Callable[[], list[int]], began_s: float):
        """Update the sequences of a started step: slots count as computed, last tokens as being drawn."""
        drawing, row = [], 0
        for chunk in plan:
            sequence = chunk.sequence
            if not sequence.finished:
                self.scheduler.advance(chunk)
            if chunk.draws:
                valid = not sequence.finished and sequence.pending == 0  # no tokens were forced meanwhile
                drawing.append((sequence if valid else None, chunk.draft))
                if valid:
                    sequence.tokens.append(~row)
                row += chunk.draws
            elif sequence.pooling and not sequence.pending:
                self.scheduler.remove(sequence)
                share_time(plan, time.monotonic() - began_s, only=sequence)
                self._emit(sequence, *embedded(sequence, self.host.head, self.ranking))
            elif sequence.work.params.progress and not sequence.generated and not sequence.finished:
                length = len(sequence.work.prompt_ids)
                self._emit(sequence, PromptProgress(0, length, min(sequence.computed, length)))
        decodes = all(chunk.draws and chunk.count == 1 for chunk in plan)
        self.under_way.append(StepUnderWay(plan, finish, drawing, sum(chunk.count for chunk in plan), began_s,
                                           row if decodes else 0, any(chunk.on_host for chunk in plan)))

    def _finish(self):
        """Wait for the oldest step under way, replace its marks with tokens, and turn them into text."""
        step = self.under_way.popleft()
        tokens = iter(step.finish())
        before_s, self.finished_s = self.finished_s, time.monotonic()
        began_s = max(step.began_s, before_s)
        self.step_s = self.finished_s - began_s
        share_time(step.plan, self.step_s)
        if step.rows:
            self.drafting.note_step(step.rows, self.step_s, began_s - before_s, step.on_host)
        if step.tokens >= self.timed_tokens:
            note_prompt_speed(self, self.step_s / step.tokens)
        going_on = []
        for sequence, draft in step.drawing:
            drawn = list(itertools.islice(tokens, 1 + len(draft)))
            if sequence and not sequence.finished:
                try:
                    self._emit(sequence, *self._accept(sequence, draft, drawn))
                except Exception as error:  # in its text, tool or grammar: only this answer fails
                    log.exception("failed to continue an answer")
                    self._emit(sequence, Failed(failure_text(error)))
                    self.scheduler.remove(sequence)
                going_on.append(sequence)
        self._draft(going_on)
        self.answers.start_masks(going_on)

    def _draft(self, sequences: Seq[Sequence]):
        """Set the drafts of these sequences, which a step has given tokens."""
        show(self.shown, self.draft_models, self.transformer)
        self.drafting.draft(sequences, self.scheduler, self.token_s)
        if self.draft_models:
            self.finished_s = time.monotonic()  # their time is no part of the next step's

    def _accept(self, sequence: Sequence, draft: tuple[int, ...], drawn: Seq[int]) -> list[WorkerEvent]:
        """Add the drawn tokens and their text until one ends the answer, forces others or differs from the
        draft, which makes the rest void."""
        answer, tokens, right = sequence.output.answer, sequence.tokens, 0
        if not answer:
            raise RuntimeError("the text of this answer could not be prepared")
        tokens.pop()  # the mark of the token being drawn
        known, sequence.suspect = len(tokens), False
        for token, guess in zip(drawn, (*draft, None)):
            added = answer.push(token, sequence.generated + 1, sequence.limit - len(tokens) - 1)
            tokens += added
            if added != [guess] or answer.reason is not None or answer.awaits_grammar:
                break
            right += 1
            self.scheduler.advance(Chunk(sequence, 1))  # the step has computed this token too
        if sequence.drafts:
            self.drafting.judge(sequence, len(draft), right, tokens[known:])
        self._go_on(sequence, answer)
        return events_of(sequence, answer, tokens[known:], token if token in added else None, right)

    def _go_on(self, sequence: Sequence, answer: Answer):
        """End the sequence if its answer has ended; else begin to make the grammar of its next token, if it
        needs a new one."""
        sequence.draft = NO_DRAFT
        if answer.reason is not None:
            self.scheduler.remove(sequence)
        elif answer.awaits_grammar:
            self.answers.remake(sequence)

    def give_up(self) -> list[str]:
        """After a failed step: forget what it may have written; returns the ids of the dropped answers."""
        if self.under_way:
            with suppress(Exception):  # the step before the failed one will be repeated too
                self.under_way[0].finish()
        self.under_way.clear()
        blamed = self.scheduler.isolate()
        self.pool.fresh.clear()
        self.pool.forget_cached()
        for model in self.draft_models:
            model.forget()
        return [sequence.work.id for sequence in blamed]

    def empty_cache(self) -> bool:
        """While nothing is computed: forget all cached prefixes and return the memory of KV pages and states
        to the system, which provides it again as they are written; their addresses stay. False if impossible:
        on a GPU, and with several ranks."""
        if self.keeper:
            self.keeper.empty()
        self.pool.forget_cached()
        self.drafting.forget()
        tensors = [self.transformer.cache, *itertools.chain.from_iterable(self.transformer.states)]
        tensors += [model.drafter.transformer.cache for model in self.draft_models]
        return not self.ranks and self.transformer.device.type == "cpu" and all(
            [empty_pages(address_of(tensor), tensor.nbytes) for tensor in tensors])


def shows(transformer: Transformer, plan: Seq[Chunk]) -> bool:
    """Must rows of pictures be put into the input of this step, or removed?"""
    return bool(transformer.spec.sees and plan and (transformer.shown or shown_rows(plan)))


def run_alone(engine: Engine, plan: list[Chunk],
              on_host: bool) -> tuple[list[Chunk], Callable[[], list[int]] | None]:
    """Start a step while no other is under way; the chunks that advance, and what waits for their tokens."""
    show_pictures(engine.transformer, shown_rows(plan))
    if on_host:
        return engine.host.run(plan)
    return plan, engine._start(plan) if plan else None


def embedded(sequence: Sequence, head: Head, ranking: numpy.ndarray | None) -> list[WorkerEvent]:
    """The end of a sequence that was embedded, or of a pair of texts, whose score its head gives, or the
    product of the last hidden state with `ranking`."""
    pooled = head(sequence.output.pooled)
    if sequence.pooling == "rank" and not head.layers:
        if ranking is None:
            return [Failed("this model ranks no texts")]
        pooled = numpy.array([pooled @ ranking])
    return embedding_events(pooled, sequence.work.params, sequence.output)


def unfit(work: Assignment, longest: int) -> str:
    """Why a model that embeds whole texts, of at most `longest` tokens, cannot do this; "": it can."""
    if not work.params.pooling:
        return "this model embeds texts and gives no answers"
    length = len(work.prompt_ids)
    return "" if length <= longest else (
        f"the text has {length:,} tokens; this model takes at most {longest:,}")


def note_prompt_speed(engine: Engine, token_s: float):
    """A step of a prompt has taken so many seconds a token."""
    engine.token_s += (token_s - engine.token_s) * (0.2 if engine.token_s else 1.0)
    engine.scheduler.token_s = engine.token_s
    if engine.keeper:
        engine.keeper.pace.token_s = engine.token_s


def share_time(plan: Seq[Chunk], seconds: float, only: Sequence | None = None):
    """Divide the time of a step among the sequences in it, by their tokens, drafts included."""
    tokens = sum(chunk.count + len(chunk.draft) for chunk in plan)
    for chunk in plan:
        if only in (None, chunk.sequence):
            chunk.sequence.output.compute_s += seconds * (chunk.count + len(chunk.draft)) / tokens


def drop_adapter(engine: Engine, adapter_id: str):
    """Forget an adapter, and fail the answers that still use it."""
    slot = engine.adapters.drop(adapter_id)
    for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
        if slot and sequence.adapter == slot:
            engine.cancel(sequence.work.id)
            engine.events.append((sequence.work.id, Failed(ADAPTER_GONE)))


def events_of(sequence: Sequence, answer: Answer, tokens: Seq[int], drawn: int | None,
              right: int) -> list[WorkerEvent]:
    """What is sent of new tokens: `right` tokens of a draft and `drawn`, the last one, unless others were
    forced in its place."""
    output, logprobs = sequence.output, ()
    if answer.reason == "refused":
        return [Failed(answer.stop_reason or "", refused=True)]
    if output.logprobs:
        # A client that also has its prompt scored expects an entry for every drawn token (see AnswerParams).
        unshown = (sequence.work.params.prompt_logprobs is None and answer.reason == "stop"
                   and drawn in answer.stop_tokens)
        shown = output.logprobs[:right + (drawn is not None and not unshown)]
        logprobs = tuple(one._replace(drafted=i < right) for i, one in enumerate(shown))
    piece = Piece(tuple(tokens), answer.take(), logprobs)
    if answer.reason is None:
        return [piece]
    usage = replace(output.usage, reasoning_tokens=answer.reasoning_tokens, compute_s=output.compute_s)
    return [piece, Ended(answer.reason, answer.stop_reason, usage, output.queued_s or 0.0)]


def failure_text(error: Exception) -> str:
    return f"the model failed while computing this answer ({type(error).__name__})"
