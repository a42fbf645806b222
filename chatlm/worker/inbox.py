"""What the front's messages have the engine do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.messages.protocol import (
    CacheEmptied, Cancel, DropAdapter, EmptyCache, EndOfRequest, EndThinking, LoadAdapter, NewAnswer,
    NewPicture, NewPrompt, NewRequest, Ping)
from chatlm.common.messages.requests import ThinkingEnds
from chatlm.common.messages.wire import BadMessage
from chatlm.common.vision.pictures import picture_of
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.loading_adapters import LoadingAdapters

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams, Picture
    from chatlm.worker.engine.engine import Engine


class ShownPrompt(NamedTuple):
    """The tokens of a prompt, and the pictures that it shows, in order."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]


@dataclass
class SharedParts:
    """What the answers of a request have in common. The front sends it once, before the answers."""

    params: AnswerParams
    prompts: dict[int, ShownPrompt] = field(default_factory=dict)  # by index


class Inbox:
    """Obeys the front's messages, in the order in which they come.

    What the answers of a request share stays here until the front announces that no more of them come. An
    answer whose adapter is still being read waits in `adapters`; all others go to the engine at once."""

    def __init__(self, engine: Engine, tell: Callable[[object], None] = lambda message: None):
        """tell: sends the front a message."""
        self.engine = engine
        self.tell = tell
        self.adapters = LoadingAdapters(engine, tell)
        self.requests: dict[str, SharedParts] = {}
        self.pictures: list[Picture] = []  # of the next prompt
        self.empties_cache = False  # as soon as nothing is computed

    def obey(self, message):
        """Do what one message asks. BadMessage if a front would not send it."""
        match message:
            case NewRequest(id, params):
                self.requests[id] = SharedParts(params)
            case NewPicture():
                self.pictures.append(picture_of(message))
            case NewPrompt():
                self._note_prompt(message)
            case NewAnswer():
                self._start_answer(message)
            case EndOfRequest(id):
                del self.requests[id]
            case EndThinking(id):
                self._end_thinking(id)
            case Cancel(id):
                self._cancel(id)
            case LoadAdapter(id, folder, stamp, digest):
                self.adapters.load(id, folder, stamp, digest)
            case DropAdapter(id):
                self.adapters.drop(id)
            case EmptyCache():
                self.empties_cache = True
            case Ping():
                pass  # any message makes the loop step and report
            case _:
                raise BadMessage(f"unexpected message from the front: {type(message).__name__}")

    def empty_cache_if_asked(self):
        """Empty the engine's cache and tell the front, if it has asked. Call it while nothing is computed."""
        if self.empties_cache:
            self.empties_cache = False
            self.tell(CacheEmptied(self.engine.empty_cache()))

    def _note_prompt(self, prompt: NewPrompt):
        """The pictures that a prompt shows have come before it."""
        if prompt.pictures != len(self.pictures):
            raise BadMessage(f"a prompt with {prompt.pictures} pictures after {len(self.pictures)}")
        self.requests[prompt.id].prompts[prompt.index] = ShownPrompt(prompt.ids, tuple(self.pictures))
        self.pictures = []

    def _start_answer(self, answer: NewAnswer):
        request = self.requests[answer.request_id]
        prompt = request.prompts[answer.prompt]
        work = Assignment(
            answer.id, prompt.ids, request.params, answer.max_tokens, answer.choice, answer.resumed_ids,
            answer.scored, answer.thinking_ends, answer.resumed_sent, answer.background, prompt.pictures)
        if not self.adapters.hold(work):
            self.engine.add(work)

    def _end_thinking(self, answer_id: str):
        if self.adapters.holds(answer_id):
            self.engine.report(answer_id, ThinkingEnds(None))  # it has not begun to think
        else:
            self.engine.end_thinking(answer_id)

    def _cancel(self, answer_id: str):
        if not self.adapters.cancel(answer_id):
            self.engine.cancel(answer_id)
