"""The command `batch`: a file of requests, each answered once, however often the command is interrupted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import aiohttp

from chatlm.common.config import LIMITS
from chatlm.common.errors import (
    ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError, visible)
from chatlm.common.invocation import program_command
from chatlm.common.log import ProgressDisplay, tell
from chatlm.front.aio import end_tasks
from chatlm.front.api.batch_lines import BatchLine, bad_line_result, lasting_body, read_line
from chatlm.front.api.errors import failed_answer, openai_error
from chatlm.front.api.spoken import answer_encoder, place_of
from chatlm.front.intake.opened_body import Caller
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.intake import Intake, loaded_tokenizer
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.pool import default_sampling
from chatlm.front.server.watching import watched
from chatlm.terminal.batch_files import BatchResult, InputFile, OutputFile
from chatlm.terminal.chat import duration
from chatlm.terminal.remote import RemotePool, open_pool
from chatlm.terminal.remote_streams import strict_object, whole_body

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.intake.opened_body import OpenedBody
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.terminal.remote import Pool

T = TypeVar("T")
Answered = tuple[BatchLine, int, dict]  # with the status and the body of its answer
Answer = Callable[[int, bytes], Awaitable[Answered]]  # (number, text) of a line
TOGETHER = 64         # lines under way: more than a worker's rows, so that none is empty
PATIENCE_S = 600      # how long a line that there is no room for is sent again
MOST_MODELS = 100     # named by lines, whose weights are noted
BAD_ANSWER = 502      # the status of a line whose server answered nothing that is an answer


async def batch(settings: Settings) -> int:
    """The `batch` command. Exit status 1 if lines failed. ConfigError for files that cannot be used."""
    if settings.texts is None or settings.output is None or settings.output == "-":
        raise ConfigError("batch takes a FILE of JSON lines and -o FILE: for example "
                          f"`{program_command()} batch MODEL requests.jsonl -o answers.jsonl`")
    began_s = time.monotonic()
    progress = ProgressDisplay()
    source = InputFile(Path(settings.texts).expanduser())
    with OutputFile(settings.output, source) as output:
        before = len(output.done)
        async with open_pool(settings) as pool:
            output.begin(await made_by(pool, settings, source))
            if output.complete:
                tell(f"{visible(settings.output)} has the answers to all {source.count:,} lines already")
                return 0
            answer = Remote(pool).answer if isinstance(pool, RemotePool) else Local(pool, settings).answer
            try:
                left = source.lines(output.done)
                async with aclosing(answer_lines(left, answer, output.created)) as results:
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
    new = len(output.done) - before
    spent = duration(time.monotonic() - began_s)
    errors = f", {failed:,} of all with errors" if failed else ""
    print(f"{new:,} lines in {spent}{errors}; {visible(settings.output)} has {source.count:,}",
          file=sys.stderr)
    return int(failed > 0)


# What answers depend on beside the lines and the weights, of the flags that this command has
FLAGS_OF_ANSWERS = ("dtype", "quantize", "arithmetic", "kv_cache_dtype", "softcap", "context_length", "lora",
                    "mmproj")


async def made_by(pool: Pool, settings: Settings, source: InputFile) -> dict[str, Any]:
    """What answers are of: the model and what else they depend on, as JSON has it."""
    found: dict[str, Any] = {"model": pool.model_name}
    if isinstance(pool, RemotePool):
        found["weights"] = weights_of(pool.model) or pool.url  # which is all that is known of other servers
        for name in ("arithmetic", "context_length", "defaults"):
            found[name] = pool.model.get(name)
        if not pool.wanted:
            for name in sorted(source.models - {pool.model_name})[:MOST_MODELS]:
                found[f"weights of {name}"] = weights_of(await pool.get(f"v1/models/{quote(name, safe='')}"))
    else:
        found["weights"] = pool.supervisor.card.facts.digest
        template = pool.tokenizer and pool.tokenizer.spec.chat_template or ""
        found["template"] = hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()
        for name, (value, _) in default_sampling(pool, settings).items():
            found[f"default {name}"] = value
        for name in FLAGS_OF_ANSWERS:
            found[name] = getattr(settings, name)
    return json.loads(json.dumps(found))


def weights_of(model: dict) -> str:
    return str(model.get("weights_digest") or "")


async def answer_lines(lines: Iterator[tuple[int, bytes]], answer: Answer,
                   created: int) -> AsyncGenerator[BatchResult, None]:
    """The results of lines as they come, TOGETHER at a time."""
    under_way: set[asyncio.Task[BatchResult]] = set()
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


async def result_for(number: int, text: bytes, answer: Answer, created: int) -> BatchResult:
    try:
        line, status, body = await answer(number, text)
    except RequestError as error:  # it is no line of a batch
        return BatchResult(number, bad_line_result(number, error), True)
    return BatchResult(number, line.result(status, lasting_body(body, created)), status != 200)


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, which is done again while there is no room for it; Overloaded if there never
    is."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await work()
        except Overloaded as error:
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(error.retry_after_s)


class ByteBudget:
    """A number of bytes that those who need some take in turn."""

    def __init__(self, size: int):
        self.left = size
        self.changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        async with self.changed:
            await self.changed.wait_for(lambda: self.left >= size)
            self.left -= size
        try:
            yield
        finally:
            async with self.changed:
                self.left += size
                self.changed.notify_all()


class Local:
    """Answers lines with the model that this command has loaded, whatever model they name."""

    def __init__(self, pool: WorkerPool, settings: Settings):
        self.pool = pool
        self.intake = Intake(Catalogue(settings, pool))
        self.pixels = ByteBudget(LIMITS.held_pixel_bytes)

    async def answer(self, number: int, text: bytes) -> Answered:
        caller = Caller(route="", client=f"line {number}", owner="")
        try:
            opened_body = await patiently(lambda: self.intake.open(caller, text, number=number))
        except EngineFailure as error:  # a line that ends sandboxes must not stop the others
            raise RequestError(str(error), status=error.status, code=error.code) from None
        line = opened_body.envelope.line
        assert line
        try:
            async with self.pixels.taken(len(opened_body.envelope.lift.files) * 3 * LIMITS.kept_pixels):
                return line, 200, await patiently(lambda: self._answer(opened_body))
        except ChatServerError as error:
            return line, *failed_answer(error)

    async def _answer(self, opened_body: OpenedBody) -> dict:
        with Holding(self.intake.budget, opened_body.caller.client) as holding:
            served = await self.intake.resolve("", (), holding)
            parsed = await self.intake.line(opened_body, served, holding)
            encoder = answer_encoder(parsed, self.pool.model_name, loaded_tokenizer(self.pool))
            async with aclosing(watched(self.pool.answer(parsed.request), encoder.state)) as events:
                return json.loads(await encoder.collect_all(events, lambda size: None))


class Remote:
    """Answers lines with the server at --url; a chat_server puts them behind what people ask."""

    def __init__(self, pool: RemotePool):
        self.pool = pool
        ours = pool.model.get("owned_by") == "chat_server"
        self.is_ours = ours
        self.more = {"priority": "low"} if ours else {}
        self.more |= {"model": pool.model_name} if pool.wanted or not ours else {}
        self.patient = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=3600)

    async def answer(self, number: int, text: bytes) -> Answered:
        line = read_line(number, text)
        try:
            return line, *await patiently(lambda: self._answer(line))
        except (Overloaded, RequestError) as error:
            return line, *failed_answer(error)

    def takes_seed(self, path: str) -> bool:
        lines = place_of(path).in_batches
        return lines is not None and lines.has_seed and (self.is_ours or not lines.seed_is_ours)

    async def _answer(self, line: BatchLine) -> tuple[int, dict]:
        seeds = {"seed": line.seed} if self.takes_seed(line.url) else {}
        body = seeds | line.body_alone() | self.more
        async with await self.pool.ask("POST", line.url[1:], json=body, timeout=self.patient,
                                       headers={"X-Request-Id": line.id}) as response:
            text = await whole_body(self.pool.url, response)
        if response.status in (429, 503):
            after = response.headers.get("Retry-After", "1")
            raise Overloaded(text.decode("utf-8", "replace")[:500], status=response.status,
                             retry_after_s=min(int(after), 60) if after.isdecimal() else 1)
        found = strict_object(text)
        if found is not None:
            return response.status, found
        said = text.decode("utf-8", "replace")[:500]
        if response.status >= 400:
            return response.status, {"error": {"message": said}}
        return BAD_ANSWER, openai_error(ChatServerError(
            f"the server at {self.pool.url} answered with status {response.status}, but not with a JSON "
            f"object: {said}"))
