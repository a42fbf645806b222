"""The command `batch`: a file of requests, each answered once, however often the command is interrupted."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, ConfigError, Overloaded, RequestError, visible
from chatlm.common.log import ProgressDisplay, tell
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import Accepted, PromptProgress
from chatlm.front.aio import end_tasks
from chatlm.front.api.batch_lines import (
    LONGEST_LINE, Line, lasting_body, read_body_of, read_line, result_of, result_of_bad_line)
from chatlm.front.api.encode import error_body
from chatlm.front.api.encoders import ENCODERS
from chatlm.front.lazy import aiohttp
from chatlm.terminal.chat import duration
from chatlm.terminal.remote import RemotePool, open_pool

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.terminal.remote import Pool


TOGETHER = 64         # lines under way: more than a worker's rows, so that none is empty
PATIENCE_S = 600      # how long a line that a server has no room for is sent again
SYNC_S = 1.0          # between moments at which what was answered survives a power cut


class Result(NamedTuple):
    """The line of the output for one of the input."""

    number: int
    text: str
    failed: bool


async def batch(settings: Settings) -> int:
    """The `batch` command. Exit status 1 if lines failed. ConfigError for files that cannot be used."""
    if settings.texts is None or settings.output is None or settings.output == "-":
        raise ConfigError("batch takes a FILE of JSON lines and -o FILE: for example "
                          "`batch MODEL requests.jsonl -o answers.jsonl`")
    began_s, progress = time.monotonic(), ProgressDisplay()
    source = Source(Path(settings.texts).expanduser())
    with Output(Path(settings.output).expanduser(), source) as output:
        if output.complete:
            tell(f"{visible(settings.output)} has the answers to all {source.count:,} lines already")
            return 0
        before = len(output.done)
        async with open_pool(settings) as pool:
            output.begin(pool.model_name)
            answer = Remote(pool).answer if isinstance(pool, RemotePool) else Local(pool, settings).answer
            try:
                async with aclosing(answered(source.lines(output.done), answer, output.created)) as results:
                    async for result in results:
                        output.write(result)
                        progress(f"answering {source.count:,} lines", len(output.done) / source.count)
            except BaseException:
                tell(f"stopped: {len(output.done):,} of {source.count:,} lines are answered; "
                     "the same command goes on")
                raise
            finally:
                progress.close()
        failed = output.finish()
    new, spent = len(output.done) - before, duration(time.monotonic() - began_s)
    errors = f", {failed:,} of all with errors" if failed else ""
    print(f"{new:,} lines in {spent}{errors}; {visible(settings.output)} has {source.count:,}",
          file=sys.stderr)
    return int(failed > 0)


class Source:
    """The input file. ConfigError if it cannot be read or has no line."""

    def __init__(self, path: Path):
        self.path, digest, self.count = path, hashlib.sha256(), 0
        for _, line in self._numbered():
            digest.update(line)
            self.count += bool(line.strip())
        if not self.count:
            raise ConfigError(f"{visible(str(path))} has no lines")
        self.digest = digest.hexdigest()

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                number = 0
                while line := file.readline(LONGEST_LINE + 1):
                    yield (number := number + 1), line
                    while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE)):
                        pass  # the rest of a line that is too long
        except OSError as error:
            raise ConfigError(f"{visible(str(self.path))}: {error.strerror}") from None

    def lines(self, done: set[int]) -> Iterator[tuple[int, bytes]]:
        """(number, text) of the lines that are not done."""
        return ((number, line.strip()) for number, line in self._numbered()
                if line.strip() and number not in done)


class Output:
    """The output file, which appears under its name once it is complete, in the order of the input. Until
    then its results are in a part file, as they come: `NUMBER RESULT`, after a line that says of what."""

    def __init__(self, path: Path, source: Source):
        self.path, self.source, self.done = path, source, set[int]()
        self.part = path.with_name(f"{path.name}.part")
        self.failed, self.synced_s, self.created = 0, 0.0, int(time.time())
        self.complete = not self.part.exists() and path.exists()

    def __enter__(self) -> Output:
        if self.complete:
            with self.path.open("rb") as file:
                if sum(1 for _ in file) == self.source.count:
                    return self
            raise ConfigError(f"-o {visible(str(self.path))} exists, and is not the output for this file")
        try:
            self.file: BinaryIO = self.part.open("a+b")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run writes {visible(str(self.part))}") from None
        except OSError as error:
            raise ConfigError(f"-o {visible(str(self.path))}: {error.strerror}") from None
        try:
            self._read()
        except Exception:
            self.file.close()
            raise
        return self

    def __exit__(self, *error):
        if not self.complete:
            if self.part.exists() and not self.file.tell():
                self.part.unlink()  # nothing was begun
            self.file.close()

    def _read(self):
        """Take up what an earlier run has left; a line that it could not finish is dropped."""
        self.file.seek(0)
        head, whole = self.file.readline(), 0
        if head.endswith(b"\n"):
            known = json.loads(head)
            if known.get("input") != self.source.digest:
                raise ConfigError(f"{visible(str(self.part))} is of another input; delete it to begin again")
            self.created, self.model, whole = known["created"], known["model"], len(head)
            for line in self.file:
                found = re.match(rb"(\d+) (.)", line)
                if not found or not line.endswith(b"\n"):
                    break
                self.done.add(int(found[1]))
                whole += len(line)
        self.file.truncate(whole)
        self.file.seek(0, os.SEEK_END)

    def begin(self, model: str):
        """Note of which model the results are, or check that it is the same. ConfigError if not."""
        if not self.file.tell():
            self._append(json.dumps({"input": self.source.digest, "model": model, "created": self.created}))
        elif self.model != model:
            raise ConfigError(f"{visible(str(self.part))} has answers of {self.model}, not of {model}; "
                              "delete it to begin again")

    def _append(self, text: str):
        self.file.write(text.encode("utf-8", "replace") + b"\n")
        self.file.flush()
        if time.monotonic() - self.synced_s > SYNC_S:
            os.fsync(self.file.fileno())
            self.synced_s = time.monotonic()

    def write(self, result: Result):
        self._append(f"{result.number} {result.text}")
        self.done.add(result.number)

    def finish(self) -> int:
        """Write the output in the order of the input; returns how many of its lines are errors."""
        places, failed = {}, 0
        self.file.seek(0)
        place = len(self.file.readline())
        for line in self.file:
            number, _, text = line.partition(b" ")
            places[int(number)] = place + len(number) + 1, len(text)
            failed += not re.search(rb'"response": ?\{"status_code": ?200\b', text)
            place += len(line)
        new = self.path.with_name(f".{self.path.name}.new")
        with new.open("wb") as output:
            for _, (begin, size) in sorted(places.items()):
                self.file.seek(begin)
                output.write(self.file.read(size))
            output.flush()
            os.fsync(output.fileno())
        new.replace(self.path)
        self.part.unlink()
        return failed


async def answered(lines: Iterator[tuple[int, bytes]], answer, created: int) -> AsyncGenerator[Result, None]:
    """The results of lines as they come, TOGETHER at a time."""
    under_way: set[asyncio.Task[Result]] = set()
    try:
        for number, text in lines:
            under_way.add(asyncio.create_task(result_for(number, text, answer, created)))
            if len(under_way) >= TOGETHER:
                ended, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    yield task.result()
        for task in asyncio.as_completed(under_way):
            yield await task
    finally:
        await end_tasks(under_way)


async def result_for(number: int, text: bytes, answer, created: int) -> Result:
    try:
        line = read_line(number, text)
    except RequestError as error:
        return Result(number, result_of_bad_line(number, error), True)
    status, body = await answer(line)
    return Result(number, result_of(line, status, lasting_body(body, created)), status != 200)


async def while_overloaded(answer, line: Line) -> tuple[int, dict]:
    """(status, body) of an answer, asked for again while there is no room for it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await answer(line)
        except Overloaded as error:
            if time.monotonic() > deadline_s:
                return error.status, error_body(error)
            await asyncio.sleep(error.retry_after_s)


class Local:
    """Answers lines with the model that this command has loaded."""

    def __init__(self, pool: WorkerPool, settings: Settings):
        self.pool, tokenizer = pool, pool.tokenizer
        assert tokenizer
        self.tokenizer = tokenizer
        self.known = Known(settings, tokenizer.tool_format, tokenizer.spec.chat_template or "",
                           tokenizer.has_chat_template, tokenizer.never_written, tokenizer.infill_tokens,
                           tokenizer.spec.embedder)

    async def answer(self, line: Line) -> tuple[int, dict]:
        return await while_overloaded(self._answer, line)

    async def _answer(self, line: Line) -> tuple[int, dict]:
        try:
            parsed = read_body_of(line, self.known)
            encoder = ENCODERS[parsed.api](parsed.lasting(), self.pool.model_name, self.tokenizer)
            async with aclosing(self.pool.answer(parsed.request)) as events:
                async for event in events:
                    if not isinstance(event, Accepted | PromptProgress):
                        encoder.collect(event)
            return 200, json.loads(b"".join(encoder.completion()))
        except Overloaded:
            raise
        except ChatServerError as error:
            return error.status, error_body(error)


class Remote:
    """Answers lines with the server at --url; a chat_server puts them behind what people ask."""

    def __init__(self, pool: RemotePool):
        self.pool = pool
        ours = pool.model.get("owned_by") == "chat_server"
        self.seeded = ("/v1/chat/completions", "/v1/completions", *["/v1/responses"] * ours)
        self.more = {"priority": "low"} if ours else {}
        self.more |= {"model": pool.model_name} if pool.wanted or not ours else {}
        self.patient = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=3600)

    async def answer(self, line: Line) -> tuple[int, dict]:
        return await while_overloaded(self._answer, line)

    async def _answer(self, line: Line) -> tuple[int, dict]:
        seeds = {"seed": line.seed} if line.url in self.seeded else {}
        body = seeds | line.body | {"stream": False} | self.more
        async with await self.pool.ask("POST", line.url[1:], json=body, timeout=self.patient,
                                       headers={"X-Request-Id": line.id}) as response:
            text = await response.read()
            if response.status in (429, 503):
                after = response.headers.get("Retry-After", "1")
                raise Overloaded(text.decode("utf-8", "replace")[:500], status=response.status,
                                 retry_after_s=min(int(after), 60) if after.isdigit() else 1)
            with suppress(ValueError):
                if isinstance(found := json.loads(text), dict):
                    return response.status, found
            return response.status, {"error": {"message": text.decode("utf-8", "replace")[:500]}}
