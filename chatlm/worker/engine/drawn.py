"""What becomes of the tokens that a step has drawn: an answer's text, its end, the events for its client."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ChatServerError, Overloaded
from chatlm.common.log import log
from chatlm.common.messages.requests import Ended, Failed, Piece
from chatlm.worker.engine.drafts import NO_DRAFT
from chatlm.worker.engine.sequence import Chunk

if TYPE_CHECKING:
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.worker.engine.answer import Answer
    from chatlm.worker.engine.answer_maker import AnswerMaker
    from chatlm.worker.engine.drafts import Drafting
    from chatlm.worker.engine.run_queue import RunQueue
    from chatlm.worker.engine.sequence import Sequence


class DrawnTokens:
    """Adds what steps draw to sequences, and says what their clients get."""

    def __init__(self, queue: RunQueue, answers: AnswerMaker, drafting: Drafting):
        self.queue = queue
        self.answers = answers
        self.drafting = drafting

    def events(self, sequence: Sequence, draft: tuple[int, ...], drawn: Seq[int]) -> list[WorkerEvent]:
        """Add what a step drew for a sequence. If its text, tool or grammar fails, only this answer does."""
        try:
            return self._accept(sequence, draft, drawn)
        except Exception as error:
            log.exception("failed to continue an answer")
            self.queue.remove(sequence)
            return [Failed(failure_text(error))]

    def _accept(self, sequence: Sequence, draft: tuple[int, ...], drawn: Seq[int]) -> list[WorkerEvent]:
        """Add the drawn tokens and their text, up to the first token that ends the answer, forces others or
        differs from the draft: what was drawn after it is void."""
        answer = sequence.output.answer
        if not answer:
            raise RuntimeError("the text of this answer could not be prepared")
        tokens = sequence.tokens
        tokens.pop()  # the mark of the token being drawn
        known = len(tokens)
        right = 0  # tokens of the draft
        sequence.suspect = False
        for token, guess in zip(drawn, (*draft, None)):
            added = answer.push(token, sequence.generated + 1, sequence.limit - len(tokens) - 1)
            tokens += added
            if added != [guess] or answer.reason is not None or answer.awaits_grammar:
                break
            right += 1
            self.queue.advance(Chunk(sequence, 1))  # the step has computed this token too
        if sequence.drafts:
            self.drafting.judge(sequence, len(draft), right, tokens[known:])
        self._go_on(sequence, answer)
        return answer_events(sequence, answer, tokens[known:], token if token in added else None, right)

    def _go_on(self, sequence: Sequence, answer: Answer):
        """End the sequence if its answer has ended. Else begin to make the grammar of its next token, if it
        needs a new one."""
        sequence.draft = NO_DRAFT
        if answer.reason is not None:
            self.queue.remove(sequence)
        elif answer.awaits_grammar:
            self.answers.remake(sequence)


def answer_events(sequence: Sequence, answer: Answer, tokens: Seq[int], drawn: int | None,
                  right: int) -> list[WorkerEvent]:
    """What is sent of new tokens: of `right` tokens of a draft and of `drawn`, the last one, unless others
    were forced in its place (None)."""
    if answer.reason == "refused":
        return [Failed(answer.stop_reason or "", refused=True)]
    output = sequence.output
    logprobs = ()
    if output.logprobs:
        # A client that also has its prompt scored expects an entry for every drawn token (see AnswerParams).
        unshown = (sequence.work.params.prompt_logprobs is None and answer.reason == "stop"
                   and drawn in answer.stop_tokens)
        shown = output.logprobs[:right + (drawn is not None and not unshown)]
        logprobs = tuple(one._replace(drafted=i < right) for i, one in enumerate(shown))
    piece = Piece(tuple(tokens), answer.take(), logprobs, spent_s=output.compute_s)
    if answer.reason is None:
        return [piece]
    usage = replace(output.usage, reasoning_tokens=answer.reasoning_tokens, compute_s=output.compute_s)
    return [piece, Ended(answer.reason, answer.stop_reason, usage, output.queued_s or 0.0)]


def failure_of(error: BaseException) -> Failed:
    """What ends an answer that cannot be computed because of this."""
    if isinstance(error, ChatServerError):
        return Failed(str(error), unavailable=isinstance(error, Overloaded))
    return Failed(failure_text(error))


def failure_text(error: BaseException) -> str:
    """What the client of an answer is told if computing it has failed."""
    return f"the model failed while computing this answer ({type(error).__name__})"
