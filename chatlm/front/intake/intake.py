"""From the bytes of a body to what it asks of a model: open it, find the model, decode pictures, read it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import ChatServerError, Overloaded, RequestError, shown
from chatlm.front.aio import supervised
from chatlm.front.api.additions import NO_ADDITIONS, Additions
from chatlm.front.api.picture_parts import with_files, with_pixels
from chatlm.front.intake.opened_body import Caller, OpenedBody
from chatlm.front.intake.budget import Budget, Holding
from chatlm.front.intake.crossing import packed_sizes, unpacked_body
from chatlm.front.intake.envelope import open_body, unpacked_envelope
from chatlm.front.intake.tasks import TASKS, CheckedLine, NumberedLine, Reading, checked_lines

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Picture
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.admission.admission import Admission
    from chatlm.front.api.additions import Added
    from chatlm.front.intake.envelope import Envelope
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ModelOrAdapter, ServedModel
    from chatlm.front.pool.pool import WorkerPool


class KeptBefore(NamedTuple):
    """Kept items that a body needs, as JSON; null: it needs none."""

    earlier: bytes = b"null"     # a list: those that it continues
    referenced: bytes = b"null"  # an object: those that its input refers to, by their ids


# (a body that continues something, what holds its bytes) -> the items that it needs
EarlierItems = Callable[[OpenedBody, Holding], Awaitable[KeptBefore]]


def loaded_tokenizer(pool: WorkerPool) -> Tokenizer:
    if pool.tokenizer is None:
        raise Overloaded("the model is still loading", retry_after_s=2)
    return pool.tokenizer


class Intake:
    """Reads bodies for routes, comparisons, uploads, batches and the terminal. A body is read the same way
    wherever it comes from.

    A body goes through four steps. `open` parses it, here if it is small, in a sandbox if it is large.
    `resolve` finds the model that it names. `decode_pictures` decodes its pictures, if that model can see.
    Then one of TASKS reads it, where it was opened. So a small body never goes to a sandbox. A large one is
    sent to a sandbox once, and a second time only if the sandbox had another task in between."""

    def __init__(self, catalogue: Catalogue, earlier_items: EarlierItems | None = None,
                 additions: Additions = NO_ADDITIONS):
        """earlier_items: of a server that keeps answers. additions: what annexes add to bodies."""
        self.catalogue = catalogue
        self.additions = additions
        self.budget = Budget(LIMITS.held_bytes)
        self.pixels = Budget(LIMITS.held_pixel_bytes, share=2)
        self.earlier_items = earlier_items
        self.tickets = itertools.count(1)           # for bodies that a sandbox keeps open
        self.forgetting: set[asyncio.Task] = set()  # these tell sandboxes to drop a body

    # what a caller wants of a body

    async def answer(self, opened_body: OpenedBody, reading: Holding, holding: Holding,
                     offered: bytes = b"null") -> tuple[ModelOrAdapter, ParsedBody]:
        """Read the body of a route that answers. `reading` holds its bytes, and gives them back once it is
        read. `holding` then accounts for what is kept of a large body.

        offered: the tools that the server may run for it, as JSON; null: it runs none."""
        before = await self._before(opened_body, reading)
        if (*before, offered) == (b"null", b"null", b"null"):
            return await self._answer(opened_body, reading, holding)
        async with self.opened(
                opened_body.caller, *opened_body.parts, before.earlier, offered, before.referenced) as whole:
            return await self._answer(whole, reading, holding)

    async def _before(self, opened_body: OpenedBody, reading: Holding) -> KeptBefore:
        """The kept items that a body needs. `reading` holds its bytes."""
        if self.earlier_items and any(opened_body.envelope.chained):
            return await self.earlier_items(opened_body, reading)
        return KeptBefore()

    async def _answer(self, opened_body: OpenedBody, reading: Holding,
                      holding: Holding) -> tuple[ModelOrAdapter, ParsedBody]:
        served = await self.resolve(opened_body.envelope.model, opened_body.caller.bound, holding)
        await self.decode_pictures(opened_body, served, holding)
        added = opened_body.added
        [parsed] = await self._read(opened_body, served, "answer", opened_body.caller.route, added.changed_by)
        reading.give_back_beyond(0)  # first, or a large body would be refused for its own size
        request = with_pixels(served.with_revisions(parsed.request), opened_body.pictures)
        parsed = replace(parsed, request=request,
                         added=added.fields,
                         plan=parsed.plan and replace(parsed.plan, options=added.tools))
        if parsed.kept and opened_body.files:
            parsed = replace(parsed, kept=await asyncio.to_thread(with_files, parsed.kept, opened_body.files))
            holding.keep(sum(len(item.body) for item in parsed.kept))
        if not opened_body.is_here:
            holding.keep(parsed.size)
        return served, parsed

    async def text(self, opened_body: OpenedBody, holding: Holding, sees: bool = True,
                   offered: bytes = b"null") -> tuple[ModelOrAdapter, str, bytes]:
        """Read the body of any other route. Returns the model, the fields without effect, and the text to
        answer with. sees: must the model see its pictures? offered: as for `answer`."""
        before = await self._before(opened_body, holding)
        if (*before, offered) != (b"null", b"null", b"null"):
            async with self.opened(opened_body.caller, *opened_body.parts, before.earlier, offered,
                                   before.referenced) as whole:
                return await self._text(whole, holding, sees)
        return await self._text(opened_body, holding, sees)

    async def _text(self, opened_body: OpenedBody, holding: Holding,
                    sees: bool) -> tuple[ModelOrAdapter, str, bytes]:
        served = await self.resolve(opened_body.envelope.model, opened_body.caller.bound, holding)
        if sees:
            await self.decode_pictures(opened_body, served, holding)
        text = await self._read(opened_body, served, "text", opened_body.caller.route)
        ignored, _, text = text.partition(b"\n")
        return served, ignored.decode(), text

    async def variants(self, opened_body: OpenedBody, holding: Holding, served: ModelOrAdapter,
                       indices: Seq[int], seed: int) -> list[ParsedBody]:
        """Read what a body of /v1/compare asks of one model, with or without adapters. indices: the numbers
        of its answers. `holding` then accounts for what is kept of a large body."""
        await self.decode_pictures(opened_body, served, holding)
        read = await self._read(opened_body, served, "variants", list(indices), seed)
        if not opened_body.is_here:
            holding.keep(sum(parsed.size for parsed in read))
        return [replace(parsed, request=with_pixels(parsed.request, opened_body.pictures)) for parsed in read]

    async def line(self, opened_body: OpenedBody, served: ModelOrAdapter, holding: Holding) -> ParsedBody:
        """Read a line of a batch. Raises RequestError as its route would."""
        await self.decode_pictures(opened_body, served, holding)
        [parsed] = await self._read(opened_body, served, "line")
        if not opened_body.is_here:
            holding.keep(parsed.size)
        request = with_pixels(served.with_revisions(parsed.request), opened_body.pictures)
        return replace(parsed, request=request)

    async def check_lines(self, caller: Caller, lines: Seq[NumberedLine]) -> list[CheckedLine]:
        """Check each line of a batch for the model that it names. Lines have no line break."""
        usual = self.catalogue.find("", caller.bound)
        checked = await self._check(caller, usual, lines)
        by_model: dict[str, list[int]] = {}
        for index, line in enumerate(checked):
            if line.model:
                by_model.setdefault(line.model, []).append(index)
        for name, indices in by_model.items():
            again = await self._check_again(
                caller, name, usual, [lines[index] for index in indices],
                [checked[index] for index in indices])
            for index, line in zip(indices, again):
                checked[index] = line
        return checked

    async def _check_again(self, caller: Caller, name: str, usual: ModelOrAdapter, lines: Seq[NumberedLine],
                           checked: Seq[CheckedLine]) -> Seq[CheckedLine]:
        """Check lines for the model that they name. checked: what the usual model says about them."""
        try:
            served = self.catalogue.find(name, caller.bound)
            if served.pool is usual.pool:
                return checked
        except ChatServerError as error:
            return [line._replace(problem=str(error)) for line in checked]
        try:
            return await self._check(caller, served, lines)
        except ChatServerError:  # such as while the model loads: what is wrong shows when a line is run
            return [line._replace(problem="") for line in checked]

    async def _check(self, caller: Caller, served: ModelOrAdapter,
                     lines: Seq[NumberedLine]) -> list[CheckedLine]:
        """Check lines for one model. Many lines are read in a sandbox: 200 MB take many seconds. While the
        model loads, only their form is checked: what is wrong with a body shows when its line is run."""
        refusal = self.why_blind(served.pool)
        is_large = any(len(line.text) > LIMITS.inline_bytes for line in lines)
        is_known = served.pool.tokenizer is not None
        if is_large or is_known and len(lines) > 1:
            try:
                return await self._check_in_sandbox(caller, served, lines, refusal)
            except RequestError as error:  # they are too complex, at least together
                if len(lines) == 1:
                    return [CheckedLine(str(error))]
            except ChatServerError:        # such as Overloaded, while the model loads
                if is_large:
                    raise
        checked: list[CheckedLine] = []
        for line in lines:
            if len(line.text) > LIMITS.inline_bytes:
                checked += await self._check(caller, served, [line])
            else:
                checked += checked_lines([line], served.known if is_known else None, refusal)
                await asyncio.sleep(0)  # let other tasks run
        return checked

    async def _check_in_sandbox(self, caller: Caller, served: ModelOrAdapter, lines: Seq[NumberedLine],
                                refusal: str) -> list[CheckedLine]:
        admission = served.pool.admission
        with admission.prepare(caller.client):
            checked: Any = await admission.perform(
                "bodies", caller.client, "check_lines", [line.number for line in lines], refusal,
                bodies=[b"\n".join(line.text for line in lines)])
            return [CheckedLine(*values) for values in checked]

    async def extract(self, caller: Caller, name: str, boundary: str, body: bytes | bytearray) -> Seq:
        """(text, pages, cut) of a document, as in `chatlm.front.documents.extract.Extracted`. boundary: the
        boundary of the form that the body is; "": the body is the file itself."""
        admission = self.catalogue.find("", caller.bound).pool.admission
        return await admission.extract(caller.client, name, boundary, body)

    async def in_sandbox(self, caller: Caller, task: str, *bodies: bytes | bytearray) -> Any:
        """What a task of an annex makes of bodies, in the sandbox that reads bodies. task: as in
        `chatlm.front.intake.sandboxed.Tasks.task`."""
        admission = self.catalogue.find("", caller.bound).pool.admission
        with admission.prepare(caller.client):
            return await admission.perform("bodies", caller.client, task, bodies=[*bodies])

    # the steps

    @asynccontextmanager
    async def opened(self, caller: Caller, *parts: bytes | bytearray, number: int | None = None,
                     opener: Admission | None = None, times: int = 1) -> AsyncIterator[OpenedBody]:
        """Open a body (see `open`) for a `with` block. Afterwards no sandbox keeps it."""
        opened_body = await self.open(caller, *parts, number=number, opener=opener, times=times)
        try:
            yield opened_body
        finally:
            self._forget(opened_body)

    async def open(self, caller: Caller, *parts: bytes | bytearray, number: int | None = None,
                   opener: Admission | None = None, times: int = 1) -> OpenedBody:
        """Parse a body. The other parts: as in open_body. number: the body is this line of
        a batch. times: how often it may be read. opener: has the sandbox that opens a large body; by default
        that is the usual model's."""
        most = LIMITS.inline_bytes // times
        names = self.additions.names(caller.route)
        if sum(map(len, parts)) <= most:
            envelope = open_body(caller.route, number, *parts, names=names)
            return OpenedBody(caller, parts, envelope, self._added(caller, envelope, number), number)
        admission = opener or self.catalogue.find("", caller.bound).pool.admission
        ticket = next(self.tickets)
        with admission.prepare(caller.client):
            data: Any = await admission.perform(
                "bodies", caller.client, "open", caller.route, number, most, names, bodies=parts,
                ticket=ticket)
        envelope = unpacked_envelope(data)
        opened_body = OpenedBody(caller, parts, envelope, number=number)
        if envelope.fields is None:  # not small, even without its pictures
            opened_body.ticket = ticket
            opened_body.sandbox = admission.sandboxes["bodies"]
        try:
            opened_body.added = self._added(caller, envelope, number)
        except RequestError:
            self._forget(opened_body)
            raise
        return opened_body

    def _added(self, caller: Caller, envelope: Envelope, number: int | None) -> Added:
        """What a body asks of annexes, checked."""
        return self.additions.read(caller.route, envelope.asked, envelope.names_model, number is not None)

    def _forget(self, opened_body: OpenedBody):
        """Let no sandbox keep a body any more."""
        if opened_body.sandbox:
            forgetting = asyncio.create_task(supervised(
                "forgetting a body", partial(opened_body.sandbox.forget, opened_body.ticket)))
            self.forgetting.add(forgetting)
            forgetting.add_done_callback(self.forgetting.discard)

    async def resolve(self, name: str, bound: Seq[str], holding: Holding) -> ModelOrAdapter:
        """The model or adapter that a request asks for, with the version of its files. `holding` keeps the
        version of the adapter. Raises RequestError if there is none, or if it has failed."""
        served = self.catalogue.find(name, bound)
        pool = served.pool
        if served.adapter:
            holding.resources.enter_context(pool.adapters.holding(served.adapter.id))
        await pool.revision.current()
        return served._replace(revision=pool.revision.number)

    def _models_that_see(self) -> list[ServedModel]:
        return [model for model in self.catalogue.registry.models
                if model.pool and model.pool.tokenizer and model.pool.tokenizer.spec.vision]

    @property
    def may_see(self) -> bool:
        """Can a model here see pictures? While one loads, it may."""
        pools = self.catalogue.pools
        return self.pool_that_sees() is not None or any(pool.tokenizer is None for pool in pools)

    def pool_that_sees(self) -> WorkerPool | None:
        """The workers of the first model that can see pictures; None if none can."""
        return next((model.pool for model in self._models_that_see()), None)

    def why_blind(self, pool: WorkerPool) -> str:
        """Why a model cannot see pictures; "" if it can, or is still loading."""
        if pool.tokenizer is None or pool.tokenizer.spec.vision:
            return ""
        others = ", ".join(shown(model.name) for model in self._models_that_see()[:10])
        return "this model cannot see images" + (
            f"; of the models here, these can: {others}" if others else "")

    async def decode_pictures(self, opened_body: OpenedBody, served: ModelOrAdapter, holding: Holding):
        """Decode a body's pictures, once, however many models see them. Their pixels are held as long as
        `holding`. Raises RequestError if the model cannot see, or if a picture cannot be read."""
        envelope = opened_body.envelope
        if envelope.lift.is_empty:
            return
        client = opened_body.caller.client
        envelope.lift.check(self.why_blind(served.pool))
        if not envelope.lift.files or opened_body.pictures:
            return
        loaded_tokenizer(served.pool)  # while it loads, nobody knows whether it sees
        pixels = holding.resources.enter_context(Holding(self.pixels, client))
        pictures: list[Picture] = []
        for name, data in envelope.lift.files:
            try:
                pictures.append(await served.pool.admission.decode_picture(data, client))
            except RequestError as error:
                raise RequestError(f"{name}: {error}", status=error.status, code=error.code,
                                   param=name) from None
            pixels.keep(len(pictures[-1].pixels), "requests with images")
        opened_body.pictures = tuple(pictures)
        files = zip(pictures, envelope.lift.files)
        opened_body.files = {picture.digest: data for picture, (_, data) in files}
        envelope.show(pictures)

    async def _read(self, opened_body: OpenedBody, served: ModelOrAdapter, task: str, *arguments) -> Any:
        """Run one of TASKS on a body, here or in a sandbox. Only this method chooses where. Raises Overloaded
        while the model loads: what it can do is not known yet, so nothing that a body asks of it can be
        refused."""
        loaded_tokenizer(served.pool)
        admission = served.pool.admission
        caller = opened_body.caller
        if opened_body.is_here:
            reading = Reading(opened_body.envelope, served.known, admission.prompts, caller.client)
            return await TASKS[task](reading, *arguments)
        with admission.prepare(caller.client):
            result: Any = await admission.perform(
                "bodies", caller.client, "read", caller.route, opened_body.number,
                self.additions.names(caller.route), packed_sizes(opened_body.pictures), caller.client, task,
                arguments, bodies=opened_body.parts, ticket=opened_body.ticket)
            if isinstance(result, (bytes, bytearray)):
                return result
            vocab_size = loaded_tokenizer(served.pool).vocab_size
            read = [await asyncio.to_thread(unpacked_body, values, vocab_size) for values in result]
            del result
            for parsed in read:
                await admission.check_grammar(parsed.request.params, caller.client, caller.owner)
            return read
