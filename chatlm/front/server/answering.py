"""Answers: each is counted and charged, and can be cancelled while it runs, whoever asks for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence as Seq
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.requests import Accepted, Finished, Piece
from chatlm.common.request_ids import MARK, duplicate_id
from chatlm.front.api.answer_state import AnswerState
from chatlm.front.server.metrics import AnswerTimes
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.watching import Watcher, watched

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Event, Request
    from chatlm.front.api.encode import Encoder
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.access import Owners
    from chatlm.front.server.budgets import Reservation
    from chatlm.front.server.ledger import Charge, Ledger
    from chatlm.front.server.metrics import Metrics


class Ask(NamedTuple):
    """An answer that is wanted. Nobody keeps it: it holds all messages and tools of its request."""

    pool: WorkerPool
    parsed: ParsedBody
    model: str
    encoder: Encoder
    made_by: Callable[[Ask], Answering] | None = None  # None: it is one answer of the pool

    @property
    def state(self) -> AnswerState:
        """What there is of the answer, once it has begun."""
        return self.encoder.state


# An answer that begins when this is entered: its first event, and the others
Answering = AbstractAsyncContextManager["tuple[Accepted, AsyncGenerator[Event, None]]"]
Begin = Callable[[Ask], Answering]


class Running(NamedTuple):
    """An answer that runs."""

    owner: str
    pool_id: Callable[[], str]  # under which id the pool knows it now: that of its round, if it has several
    stop: Callable[[], bool]    # stops what of it runs outside of the pool; False: nothing does


class CutNote(Watcher):
    """Notes for the access log how many tokens an answer had whose reader left before its end."""

    def __init__(self, request: Request):
        self.record = REQUEST_LOG.get(None)
        self.left = request.n * max(len(request.prompts), 1)  # answers that have not been read to their ends
        self.prompt_tokens: int | None = None                 # None: the prompt was not counted
        self.tokens = 0

    def comes(self, event: Event):
        if isinstance(event, Accepted):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Piece):
            self.tokens += len(event.tokens)

    def was_read(self, event: Event):
        self.left -= isinstance(event, Finished)

    def fails(self, error: Exception):
        if not (isinstance(error, RequestError) and error.status == 499):  # else somebody cancelled it
            self.left = 0

    def ends(self):
        if self.record is None or self.prompt_tokens is None or self.left <= 0:
            return
        counts = self.record.counts
        prompt_tokens = counts.get("prompt_tokens", 0) + self.prompt_tokens  # of a comparison's other answers
        tokens = counts.get("completion_tokens", 0) + self.tokens
        self.record.note = f"{prompt_tokens}+{tokens} tokens cut"
        self.record.counts = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "reason": "cut"}


class Answers:
    """The answers that run, those of routes, of comparisons and of batches."""

    def __init__(self, owners: Owners, ledger: Ledger, metrics: Metrics,
                 watch: Seq[Callable[[Request, AnswerState], Watcher]] = ()):
        """watch: what else watches each answer."""
        self.watch = watch
        self.owners = owners
        self.ledger = ledger
        self.metrics = metrics
        self.running: dict[str, Running] = {}    # by their ids
        self.groups: dict[str, list[str]] = {}   # id of a request with several answers -> their ids

    @contextmanager
    def entered(self, request_id: str, client: str, pool_id: Callable[[], str] | None = None,
                stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Enter an answer among those that run, and remove it at the end of the block. Raises RequestError
        409 if its id is in use."""
        if request_id in self.running:
            raise duplicate_id(request_id)
        owner = self.owners.of_answer(request_id, client)
        self.running[request_id] = Running(owner, pool_id or (lambda: request_id), stop)
        try:
            yield
        finally:
            del self.running[request_id]

    @contextmanager
    def grouped(self, request_id: str, ids: list[str]) -> Iterator[None]:
        """Have answers belong to one request, in the block."""
        self.groups[request_id] = ids
        try:
            yield
        finally:
            del self.groups[request_id]

    def meant_by(self, request_id: str) -> Seq[str]:
        """The ids of the answers that a client means by an id: a request's, or NAME-1 for its first answer of
        several."""
        if request_id in self.groups:
            return self.groups[request_id]
        parts = self.groups.get(request_id.rpartition("-")[0], ())
        named = [one for one in parts if one.replace(MARK, "-") == request_id]
        return [request_id] if request_id in self.running else named or [request_id]

    def begin_asked(self, ask: Ask) -> Answering:
        if ask.made_by:
            return ask.made_by(ask)
        return self.begin(ask.pool, ask.parsed.request, ask.model, not ask.parsed.stream, state=ask.state)

    @asynccontextmanager
    async def begin(
            self, pool: WorkerPool, request: Request, model: str, whole: bool = False,
            later: list[Charge] | None = None, state: AnswerState | None = None) -> AsyncIterator[
                tuple[Accepted, AsyncGenerator[Event, None]]]:
        """Yield the answer's first event and the others once it is accepted, each after it was folded into
        the state. Leaving the block in any way ends its work, and enters it in the ledger (sent whole: unless
        that failed) or in `later`.

        Raises RequestError 409 if an answer with its id runs."""
        request_id = request.id
        with self.entered(request_id, request.client):
            state = state or AnswerState(request)
            others = [make(request, state) for make in self.watch]
            charge = self.ledger.charge(request, model, pool.context_length)
            reservation = charge.reservation
            if reservation:
                reservation.more = partial(give_more, pool, request_id, reservation, later is not None)
            watchers = [AnswerTimes(self.metrics, request.n), charge, CutNote(request), *others]
            events = watched(pool.answer(request), state, watchers)
            del request  # the pool drops most of it when it is admitted
            try:
                # a refusal raises here: an ordinary error response
                accepted: Any = await anext(events)
                if reservation:
                    reservation.check_prompt()
                charge.void = whole  # until it was sent
                yield accepted, events
                charge.void = False
            finally:
                await events.aclose()
                self.ledger.settle(charge) if later is None else later.append(charge)


def give_more(pool: WorkerPool, request_id: str, reservation: Reservation, batched: bool, choice: int):
    """An answer without max_tokens has had the tokens that its key's budget gave it. It gets more, or ends; a
    line of a batch, whose answer must not depend on the moment, waits for another try."""
    if reservation.grow(choice, alone=batched):
        return
    if batched:
        raise Overloaded("other requests use the tokens that this key has left today", retry_after_s=5)
    pool.cut(request_id, choice, "tokens_per_day")
