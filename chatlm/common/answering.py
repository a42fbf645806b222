"""Whether an answer is being written now, as all processes of a server see it: one number in shared memory.

A worker that writes answers moves it on before each of its steps; a worker that embeds texts waits between
its layers while it lies in the future. Nothing is left behind by a writer that dies."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from functools import cache
from io import FileIO

LEAST_S = 0.1   # how long an answer counts as being written after a step has begun
STEPS = 3       # or so many times as long as the last step: a slow model's next token is still to come
PAUSE_S = 2.0   # that a layer waits at most; then texts go on a little, even beside endless answers
STEP_S = 12.0   # that all layers of a step wait at most, since a step without an end looks like a hang


@cache
def path_of_lease() -> str:
    """The path of this process's lease, for processes that it starts; "" where there is none (not Linux)."""
    if not hasattr(os, "memfd_create"):
        return ""
    file = FileIO(os.memfd_create("answering"), "r+")
    file.truncate(mmap.PAGESIZE)
    kept.append(file)
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


kept: list[FileIO] = []  # open as long as this process lives


class AnswerLease:
    """The number: until when answers are written, in nanoseconds of the monotonic clock."""

    SLICE_NS = 6_000_000  # that texts go on after the longest pause, and to a layer's end

    def __init__(self, path: str):
        """OSError if it cannot be mapped."""
        with open(path, "r+b", buffering=0) as file:
            self.memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.until = ctypes.c_int64.from_buffer(self.memory)
        self.sliced = 0
        self.noted = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self.until)

    def note(self, step_s: float):
        """A step of an answer begins; the step before took so long."""
        self.noted = self.until.value = time.monotonic_ns() + int(1e9 * max(LEAST_S, STEPS * step_s))

    @property
    def others_write(self) -> bool:
        """Does another process write an answer, as far as its last note says?"""
        return time.monotonic_ns() < self.until.value != self.noted

    def wait(self, most_s: float):
        """Wait while an answer is written, at most so long."""
        now = time.monotonic_ns()
        end = now + int(1e9 * most_s)
        if now < self.sliced:
            return
        while now < min(end, self.until.value):
            time.sleep(0.002)
            now = time.monotonic_ns()
        if now >= end:
            self.sliced = now + self.SLICE_NS


def longest_pause_s(layers: int) -> float:
    """How long each layer of a model that embeds texts waits at most."""
    return min(PAUSE_S, STEP_S / layers)
