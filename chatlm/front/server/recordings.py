"""Resumable answers: recorded, so that a reader may disconnect and return."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.request_ids import duplicate_id
from chatlm.front.aio import end_tasks, supervised

if TYPE_CHECKING:
    from chatlm.front.api.encode import Encoder

GRACE_S = 30.0  # seconds a resumable answer continues without a reader
KEPT_S = 600.0  # seconds a finished resumable answer can still be read


class Recording:
    """A resumable answer: its events as frames numbered from 0, for any number of followers.

    All but the newest frames are compressed."""

    PART = 32                          # frames compressed together
    # Python's overhead per recording and per frame, in bytes
    OWN_BYTES = 1000
    FRAME_BYTES = 50

    def __init__(self, request_id: str, owner: str, client: str, form: type[Encoder],
                 needs_reader: bool = True):
        """form: of the answer's encoder, which a recording outlives. needs_reader: is the answer cancelled
        once nobody has read it for GRACE_S?"""
        self.id = request_id
        self.owner = owner
        self.client = client
        self.form = form
        self.needs_reader = needs_reader
        self.size = self.OWN_BYTES
        self.length = 0
        self.task: asyncio.Task | None = None
        # parts forgotten, parts kept, newest frames
        self.dropped = 0
        self.parts = []
        self.tail = []
        self.followers = 0
        self.ended = False
        self.news: asyncio.Event = asyncio.Event()
        self.timer: asyncio.TimerHandle  # forgets it KEPT_S after its end

    def append(self, frames: bytes):
        for frame in self._split(frames):
            self.tail.append(self.form.numbered(self.length, frame))
            self.length += 1
            self.size += len(self.tail[-1]) + self.FRAME_BYTES
        while len(self.tail) >= 2 * self.PART:  # readers who keep up never decompress
            self._pack()
        self.news.set()
        self.news = asyncio.Event()

    def end(self):
        self.ended = True
        while self.tail:
            self._pack()
        self.news.set()
        # thousands may be kept, so free what is no longer needed
        self.news = None  # pyright: ignore[reportAttributeAccessIssue]  nobody waits for news now
        self.task = None

    def _split(self, frames: bytes) -> list[bytes]:
        end = self.form.frame_end
        return [frame + end for frame in frames.split(end)[:-1]]

    def _pack(self):
        frames = self.tail[:self.PART]
        self.tail = self.tail[self.PART:]
        text = b"".join(frames)
        self.parts.append(zlib.compress(text, 1))
        self.size += len(self.parts[-1]) - len(text) - len(frames) * self.FRAME_BYTES

    def forget_oldest(self):
        """Drop the oldest part that is still kept."""
        if not self.parts:
            self._pack()
        self.size -= len(self.parts.pop(0))
        self.dropped += 1

    def check_kept(self, position: int):
        if position < (first := self.dropped * self.PART):
            raise RequestError(f"the events before {first} are no longer kept",
                               status=410, code="gone", param="from")

    def frames_from(self, position: int) -> list[bytes]:
        """Some of the frames from a position on; [] if there are none yet."""
        part, first = divmod(position, self.PART)
        if part - self.dropped < len(self.parts):
            return self._split(zlib.decompress(self.parts[part - self.dropped]))[first:]
        return self.tail[position - (self.dropped + len(self.parts)) * self.PART:]

    async def follow(self, position: int) -> AsyncGenerator[bytes, None]:
        """The frames from a position on; an error frame if the reader is so slow that they are gone."""
        try:
            while not self.ended or position < self.length:
                self.check_kept(position)
                if frames := self.frames_from(position):
                    position += len(frames)
                    yield b"".join(frames)
                else:
                    await self.news.wait()
        except RequestError as error:
            yield self.form.lone_failure(error)


class Recordings:
    """The resumable answers by id, at most LIMITS.recorded_bytes in all.

    When full, the client with the most bytes loses its oldest ended answer, else the oldest part of its
    largest running one."""

    def __init__(self):
        self.all: dict[str, Recording] = {}  # one that ends moves behind all others
        self.size = 0                        # in bytes, of all and
        self.sizes: Counter[str] = Counter()  # of each client's

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.all

    def find(self, request_id: str, owner: str) -> Recording:
        recording = self.all.get(request_id)
        if recording is None or recording.owner != owner:
            raise RequestError("there is no resumable stream with this id",
                               status=404, code="not_found", param="id")
        return recording

    def start(self, recording: Recording, frames: AsyncIterator[bytes],
              work: contextlib.AsyncExitStack) -> Recording:
        """Record an answer in its own task, which closes `work` when it ends. Raises RequestError 409 if
        there is a recording with its id."""
        request_id = recording.id
        if request_id in self.all:
            raise duplicate_id(request_id)
        client = recording.client
        self.all[request_id] = recording
        self._resize(client, recording.size)
        record = partial(self._record, recording, frames, work)
        recording.task = asyncio.create_task(supervised(f"recording {request_id}", record))
        return recording

    async def _record(self, recording: Recording, frames: AsyncIterator[bytes],
                      work: contextlib.AsyncExitStack):
        try:
            async with work:
                async for part in frames:
                    self._change(recording, recording.append, part)
        except Exception:  # errors of the answer itself are already frames
            failure = recording.form.lone_failure(EngineFailure("the recording failed"))
            self._change(recording, recording.append, failure)
            raise
        finally:
            self.all[recording.id] = self.all.pop(recording.id)
            recording.timer = asyncio.get_running_loop().call_later(KEPT_S, self._forget, recording.id)
            self._change(recording, recording.end)

    def _resize(self, client: str, more: int):
        self.size += more
        self.sizes[client] += more
        if not self.sizes[client]:
            del self.sizes[client]

    def _change(self, recording: Recording, change: Callable[..., None], *arguments):
        """Apply `change` to a recording, then make room until the limit holds."""
        before = recording.size
        change(*arguments)
        self._resize(recording.client, recording.size - before)
        while self.size > LIMITS.recorded_bytes and self._make_room():
            pass

    def _make_room(self) -> bool:
        able = [recording for recording in self.all.values()
                if recording.ended or recording.parts or len(recording.tail) >= recording.PART]
        if not able:
            return False
        client = max(able, key=lambda recording: self.sizes[recording.client]).client
        mine = [recording for recording in able if recording.client == client]
        if ended := next((recording for recording in mine if recording.ended), None):
            self._forget(ended.id)
        else:
            largest = max(mine, key=lambda recording: recording.size)
            before = largest.size
            largest.forget_oldest()
            self._resize(client, largest.size - before)
        return True

    def _forget(self, request_id: str):
        """Remove a recording: current readers keep it, new ones no longer find it."""
        recording = self.all.pop(request_id)
        recording.timer.cancel()
        self._resize(recording.client, -recording.size)

    async def close(self):
        await end_tasks(recording.task for recording in self.all.values()
                        if recording.task and not recording.ended)
