"""Answers that the server itself writes into a chat, for requests with `chat`. They go on when every page has
gone, and all devices of their owner see them grow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.errors import ChatServerError
from chatlm.common.log import log
from chatlm.common.messages.requests import Finished
from chatlm.common.text.calculations import shift_calls
from chatlm.front.aio import supervised
from chatlm.front.annexes.chats import growing
from chatlm.front.api.encode import timings_body, usage_body
from chatlm.front.api.errors import public_error
from chatlm.front.server.stored_lists import now_s

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Event
    from chatlm.front.annexes.chats.growing import WrittenPlace
    from chatlm.front.server.answering import Ask
    from chatlm.front.server.recordings import Recording, Recordings
    from chatlm.front.store.store import Store


T = TypeVar("T")
GROWN_S = 3.0  # between two times that a growing answer is written: what a killed server loses
NO_MISHAP = {"note": None, "error": None, "remedy": None}  # whatever a device has said
NO_ROOM = "the server could not keep the rest of this answer: "


class Running(NamedTuple):
    """What the core knows of answers that run."""

    recordings: Recordings
    cancel: Callable[[str], bool]
    cancel_unread: Callable[[Recording], None]


class WrittenAnswer:
    """An answer that is written into the store while it is sent.

    What is stored of a growing answer has its first `next` events, so another device reads the others from
    its recording. It has ended in the store before its client sees its end."""

    def __init__(self, store: Store, place: WrittenPlace, ask: Ask, running: Running,
                 tell: Callable[[str], None]):
        """tell: called with the owner when something is written."""
        self.store = store
        self.place = place
        self.running = running
        self.tell = tell
        self.state = ask.state
        self.model = ask.model
        self.seed = ask.parsed.request.params.sampling.seed
        self.response = ask.parsed.response_id
        self.beside = ask.parsed.beside  # such as the passages that it was given to read
        self.due_s = 0.0  # when it may be written next
        self.grown = False    # has something come that is not written?
        self.settled = False  # are all events that have come in the recording too?
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None  # which writes
        self.problem = ""  # why no more of it can be kept
        self.ends: dict[int, dict] = {}  # what is said of the answers that have ended, by their numbers
        self.before: dict = {}  # the node as it was: an answer that goes on has text there

    async def begin(self):
        """Raises RequestError if it cannot be written there."""
        made = {"created": time.time() * 1000 // 1, "model": self.model, "seed": self.seed}
        self.before = await self._run(growing.begin, adds_bytes=1, made=made)
        self.tell(self.place.owner)
        self.due_s = time.monotonic() + GROWN_S

    async def _run(self, work: Callable[..., T], adds_bytes: int, **arguments) -> T:
        """Do work at this answer's place in the store."""
        return await self.store.run(partial(work, place=self.place, now_s=now_s(), **arguments), adds_bytes,
                                    self.place.client)

    async def watched(self, events: AsyncGenerator[Event, None],
                      later: Callable[[Callable[[], Awaitable[None]]], None]) -> AsyncGenerator[Event, None]:
        """Pass the events on, and write what they say. later: runs what writes an answer's end when its task
        has been cancelled."""
        ended = False
        try:
            async for event in events:
                self.settled = False
                if isinstance(event, Finished):
                    self.ends[event.choice] = self.facts(event)
                    ended = self.state.has_ended
                    if ended:
                        await self.end(self.ends[0])
                yield event
                self.settled = self.grown = not ended
                self.look()
        except Exception as error:
            if not ended:
                later(partial(self.end, failure_facts(error)))
            raise
        except (GeneratorExit, asyncio.CancelledError):  # the server ends
            if not ended:
                later(partial(self.end, dict(growing.CUT)))
            raise

    # what is written

    def fields_so_far(self, index: int = 0) -> dict:
        """An answer so far, as the page keeps it (static/tree.js)."""
        choice = self.state.choices[index]
        calls = [{"id": f"call_{call.id}", "name": call.name, "arguments": call.text,
                  **({"result": call.result.text} if call.result else {})} for call in choice.calls]
        before = self.before
        content = before.get("content", "")
        placed = [*before.get("calculator", ()), *shift_calls(
            [{"expression": None, "result": None, **call} for call in choice.calculations], len(content))]
        return {"content": content + choice.text("text"),
                "reasoning": before.get("reasoning", "") + choice.text("reasoning") or None,
                "ids": [*before.get("ids", ()), *choice.token_ids] or None, "calls": calls or None,
                "calculator": placed or None}

    def facts(self, done: Finished) -> dict:
        usage = usage_body(done.usage)
        more = dict(self.beside)
        timings = {**timings_body(done), **usage, "gpu": done.gpu, "finish_reason": done.reason,
                   "stop_reason": done.stop_reason if done.stop_reason == "repetition" else ""}
        if "earlier" in self.before:
            timings = growing.whole_of(self.before["earlier"], timings)
            more["earlier"] = None
        return {**more, "timings": timings}

    def others(self, facts: dict) -> dict[int, dict]:
        """The further answers of its request at its end. facts: of those that have not ended."""
        return {index: {**self.fields_so_far(index), **(self.ends.get(index) or facts)}
                for index in range(1, len(self.state.choices))}

    def look(self):
        """Write what has come, in a task, once that is due."""
        if self.task or not (self.grown and self.settled):
            return
        left_s = self.due_s - time.monotonic()
        if left_s > 0:
            if self.timer is None:
                self.timer = asyncio.get_running_loop().call_later(left_s, self.wake)
            return
        self.grown = False
        recording = self.running.recordings.all.get(self.place.stream)
        stream = {"id": self.place.stream, "next": recording.length if recording else 0}
        patch = {**self.fields_so_far(), "stream": stream}
        self.task = asyncio.create_task(supervised(
            f"writing {self.place.node}", partial(self.write, patch), failed=self.fails))

    def look_again(self):
        """Its chat may be deleted: then it ends."""
        self.due_s = 0.0
        self.grown = True
        self.look()

    def wake(self):
        self.timer = None
        self.look()

    async def write(self, patch: dict):
        try:
            if self.problem:
                return
            kept = await self._run(growing.write, adds_bytes=len(patch["content"]), patch=patch)
            if kept:
                self.tell(self.place.owner)
            else:  # its chat is deleted
                self.running.cancel(self.place.stream)
        finally:
            self.due_s = time.monotonic() + GROWN_S
            self.task = None
            self.look()

    def fails(self, error: Exception) -> bool:
        """It cannot be kept any more. Now it needs a reader, like all other answers."""
        self.problem = str(error)
        log.warning("an answer is not kept any more: %s", error)
        recording = self.running.recordings.all.get(self.place.stream)
        if recording and not recording.ended:
            recording.needs_reader = True
            self.running.cancel_unread(recording)
        return False

    async def end(self, facts: dict):
        """Write its end. If there is no room for the text, what is there of it stays, with a note."""
        self.settled = False
        if self.timer:
            self.timer.cancel()
        if self.task:
            await asyncio.wait([self.task])
        end = {"stream": None, "ended": self.place.stream, "response": self.response or None}
        patches: list[dict] = [{**end, "error": f"{NO_ROOM}{self.problem}", "remedy": "again"}]
        if not self.problem:
            patches.insert(0, {**NO_MISHAP, **self.fields_so_far(), **facts, **end})
        for patch in patches:
            try:
                size = len(patch.get("content", ""))
                others = {} if self.problem else self.others(facts)
                await self._run(growing.write, adds_bytes=size, patch=patch, others=others)
                return self.tell(self.place.owner)
            except ChatServerError as error:
                self.problem = self.problem or str(error)
                patches[-1]["error"] = f"{NO_ROOM}{self.problem}"
                log.warning("the end of an answer is not kept: %s", error)


def failure_facts(error: Exception) -> dict:
    if getattr(error, "code", None) == "cancelled":
        return {"note": "stopped"}
    return {"error": str(public_error(error)), "remedy": "again"}
