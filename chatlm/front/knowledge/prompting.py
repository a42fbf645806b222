"""What vector stores know becomes a part of a conversation: whole documents at its beginning, where they fit,
else the passages that fit the question, in the last turn of the user.

Documents stand at the beginning in the order of their stores and files, so the prefix cache keeps them. The
parts of both are numbered from 1; the answer says which they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from chatlm.common.client_words import TOO_LONG
from chatlm.common.errors import RequestError, invalid
from chatlm.common.messages.requests import Message
from chatlm.front.admission.questions import before_question, questions_in
from chatlm.front.knowledge import stores
from chatlm.front.knowledge.asking import Asker
from chatlm.front.knowledge.passages import counting
from chatlm.front.knowledge.search import Terms
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.stored_lists import now_s
from chatlm.front.tools.rules import QUESTION

if TYPE_CHECKING:
    import sqlite3
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import Request
    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.intake.opened_body import Caller
    from chatlm.front.knowledge.search import Hit, Search
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.store.store import Store


Count = Callable[[str], int]  # the tokens of a text

SHARE = 4                  # at most this part of the context, 1/4, is given to read
ANSWER_SHARE = 8           # and this part stays free for the answer, unless max_tokens is less
WHOLE_TOKENS = 8_000       # of whole documents, at most
PASSAGES_S = 8.0           # and so many as are read within about this time, unless a number is asked for
FAST_TOKENS = 256          # always
USUAL_TOKENS = 1_024       # while it is not known how fast the model reads
SEVERAL = 4                # an embedder may count so many times the tokens that a model does
MOST_PASSAGES = 8
LEAST_TOKENS = 32          # of a passage that is cut to fit
FRAME_TOKENS = 48          # that a chat template may write around a text
NAME_CHARACTERS = 200
MEMBERS = "stores", "mode", "max_num_results", "score_threshold", "return_text"
# Asked for citations alone, a model of 0.5B answers with numbers alone (bench/figures/knowledge.json)
CITE = ("Answer the question truthfully and completely. After each statement cite its passage by its number, "
        "like [1].")
PASSAGES = f"Passages of documents, which may help to answer the question below. {CITE}"
DOCUMENTS = f"Documents, which may help to answer questions. Their passages are numbered. {CITE}"


class GivenPassage(NamedTuple):
    """A passage that is given to read."""

    hit: Hit
    text: str        # with its number
    cut: bool = False


class Given(NamedTuple):
    """What a model is given to read."""

    mode: str        # whole or search
    parts: Seq[GivenPassage]
    of: int          # passages of the files that were looked at
    words_only: bool = False

    def body(self, names: Mapping[int, str]) -> dict:
        """As answers show it. names: the ids of stores, by their numbers."""
        passages = [
            {"index": index, "vector_store_id": names[hit.store], "file_id": hit.file,
             "filename": hit.filename, "page": hit.page, "heading": hit.heading, "start": hit.start,
             "cut": cut, "score": None if self.mode == "whole" else hit.score}
            for index, (hit, _, cut) in enumerate(self.parts, 1)]
        return {"mode": self.mode, "passages": passages, "read": len(self.parts), "of": self.of,
                "words_only": self.words_only}

    def sources(self) -> tuple[dict, ...]:
        """What the numbers in an answer cite."""
        return sources_of(self.parts)

    @property
    def text(self) -> str:
        """What is put into the conversation; "" for nothing. The page puts the same one there when it asks
        again (static/knowledge.js, `given`)."""
        texts = [part.text for part in self.parts]
        if not texts:
            return ""
        return "\n\n".join((DOCUMENTS, *texts) if self.mode == "whole" else (PASSAGES, *texts, QUESTION))


def sources_of(parts: Seq[GivenPassage]) -> tuple[dict, ...]:
    """What the numbers of parts cite, as members of an annotation."""
    return tuple({"type": "file_citation", "file_id": part.hit.file, "filename": part.hit.filename}
                 for part in parts)


class Prompting:
    """Puts passages into conversations."""

    def __init__(self, store: Store, search: Search):
        self.store = store
        self.search = search

    async def prompted(self, parsed: ParsedBody, caller: Caller, pool: WorkerPool) -> ParsedBody:
        """A body with what it asks to be read. Raises RequestError 404 for a store that its owner has not,
        and 400 if nothing of it fits into the context."""
        asked = parsed.added.get("knowledge")
        if asked is None:
            return parsed
        if others := [*asked.keys() - {*MEMBERS}]:
            raise invalid("knowledge", f"knowledge has no member {min(others)[:NAME_CHARACTERS]}, only "
                                       f"{', '.join(MEMBERS)}")
        names = await self._stores(asked["stores"], caller)
        prompts = pool.admission.prompts
        request = parsed.request
        messages = request.messages or ()
        assert prompts  # the body was read for a model that is known
        room = await room_in(request, messages, caller.client, prompts)
        mode = asked.get("mode") or "auto"
        fast = min(room, read_in_time(pool.prompt_token_s))
        most = min(WHOLE_TOKENS, room if mode == "whole" else fast)
        given = None if mode == "search" else await self._whole([*names], most, prompts, caller.client)
        if mode == "whole" and given is None:
            raise no_room("their whole documents have more", most)
        if given is None:
            asker = Asker(caller.client, caller.owner, request.low_priority, request.params.temporary)
            number = asked.get("max_num_results")
            least = least_score(number, asked.get("score_threshold"))
            terms = Terms(number or MOST_PASSAGES, threshold=least)
            given = await self._found([*names], messages, room if number else fast, prompts, asker, terms)
        if not given.parts:
            await self._stores(asked["stores"], caller)  # perhaps one was deleted meanwhile
        if given.words_only:
            REQUEST_LOG.get().headers["X-Search"] = "words"
        text = given.text
        if text:
            put = with_documents if given.mode == "whole" else before_question
            messages = put(messages, text)
        shown = given.body(names) | ({"text": text} if asked.get("return_text") else {})
        return replace(parsed, request=replace(request, messages=messages),
                       beside={**parsed.beside, "knowledge": shown}, citable=given.sources())

    async def _stores(self, wanted: Seq[str], caller: Caller) -> dict[int, str]:
        return await self.store.run(partial(used_stores, wanted=wanted, owner=caller.texts,
                                            param="knowledge.stores"), client=caller.client)

    async def _whole(self, numbers: Seq[int], most: int, prompts: PromptMaker, client: str) -> Given | None:
        """All that stores have; None if these are more than so many tokens."""
        hits = await self.search.whole(numbers, SEVERAL * WHOLE_TOKENS, client)
        if hits is None:
            return None
        parts = whole_parts(hits)
        count = counter(prompts)

        def fits() -> bool:
            return sum(map(count, (DOCUMENTS, *(part.text for part in parts)))) <= most
        is_whole = not parts or await prompts.run(fits, sum(len(part.text) for part in parts))
        return Given("whole", parts, len(parts)) if is_whole else None

    async def _found(self, numbers: Seq[int], messages: Seq[Message], room: int, prompts: PromptMaker,
                     asker: Asker, terms: Terms) -> Given:
        """The passages that fit the last question, or this after the one before it."""
        questions = questions_in(messages)
        if not questions:
            raise invalid("messages", "knowledge is searched for the last question, but no message of the "
                                      "user has a text")
        found = await self.search.find(numbers, questions, asker, terms)
        hits = each_once(found.hits)
        parts = await prompts.run(lambda: fitting_parts(hits, room, counter(prompts)),
                                  sum(len(hit.text) for hit in hits))
        if hits and not parts:
            raise no_room("no passage fits", room)
        return Given("search", parts, found.passages, found.words_only)


def used_stores(connection: sqlite3.Connection, wanted: Seq[str], owner: str, param: str) -> dict[int, str]:
    """The ids of stores by their numbers, in the order of these. Notes that they are used. Raises
    RequestError for one that its owner cannot search. param: the list that has them in the body."""
    now = now_s()
    found = {}
    for index, name in enumerate(wanted):
        try:
            store = stores.usable_store(connection, name, owner, now)
        except RequestError as error:
            raise RequestError(str(error), status=error.status, code=error.code,
                               param=f"{param}[{index}]") from None
        stores.note_use(connection, store, now)
        found[store.number] = store.id
    return dict(sorted(found.items()))


def read_in_time(token_s: float) -> int:
    """How many tokens a model reads in about PASSAGES_S. token_s: how long it takes for one; 0.0: not known.
    It is a power of two, so that the same question gets the same passages although measured times differ."""
    if not token_s:
        return USUAL_TOKENS
    return max(FAST_TOKENS, 2 ** round(math.log2(PASSAGES_S / token_s)))


def least_score(most: int | None, threshold: float | None) -> float | None:
    """`Terms.threshold` for a client that has asked for so many passages and a threshold, or for neither
    (None): then it is given those that are worth reading."""
    return threshold if threshold is not None or not most else 0.0


def counter(prompts: PromptMaker) -> Count:
    return counting(lambda text: len(prompts.tokenizer.encode(text)))


def no_room(why: str, room: int) -> RequestError:
    return RequestError(
        f"the context has room for {max(room, 0):,} tokens of knowledge, but {why}. Please reduce the length "
        "of the messages, or ask fewer or smaller stores", code=TOO_LONG, param="knowledge")


async def room_in(request: Request, messages: Seq[Message], client: str, prompts: PromptMaker) -> int:
    """The tokens that may be given to read in a conversation."""
    longest = prompts.context_length
    share = longest // SHARE
    if request.truncate:  # its oldest turns make room
        return share
    ids = await prompts.render(messages, request.tools, client, request.template_options)
    answer = min(request.max_tokens or math.inf, longest // ANSWER_SHARE)
    return min(share, longest - len(ids) - int(answer) - FRAME_TOKENS)


def one_line(text: str) -> str:
    return " ".join(text.split())[:NAME_CHARACTERS]


def place_of(hit: Hit, with_heading: bool) -> str:
    """Where a passage stands, in words."""
    page = "" if hit.page is None else f", page {hit.page}"
    heading = f": {one_line(hit.heading)}" if hit.heading and with_heading else ""
    return f"{one_line(hit.filename)}{page}{heading}"


def whole_parts(hits: Seq[Hit]) -> list[GivenPassage]:
    """The passages of whole documents. What two of them have in common stands there once."""
    parts = list[GivenPassage]()
    ends: dict[tuple[int, str], int] = {}  # of each file, up to which character it has come
    stores_of: dict[str, int] = {}         # a file of two stores is given once
    for hit in hits:
        if stores_of.setdefault(hit.file, hit.store) != hit.store:
            continue
        end = ends.get((hit.store, hit.file), 0)
        text = hit.text[max(end - hit.start, 0):]
        ends[hit.store, hit.file] = max(end, hit.start + len(hit.text))
        if text.strip():
            parts.append(GivenPassage(hit, f"[{len(parts) + 1}] {place_of(hit, False)}\n{text}"))
    return parts


def each_once(hits: Seq[Hit]) -> list[Hit]:
    """Each passage once, although files of several stores have it."""
    return [*{(hit.file, hit.start): hit for hit in reversed(hits)}.values()][::-1]


def fitting_parts(hits: Seq[Hit], room: int, count: Count, before: int = 0) -> list[GivenPassage]:
    """The first passages that fit. If none does, the first is cut. before: how many were given before."""
    parts = list[GivenPassage]()
    left = room - count(PASSAGES + QUESTION)
    for hit in hits:
        text = f"[{before + len(parts) + 1}] {place_of(hit, True)}\n{hit.text}"
        tokens = count(text) + 2  # the blank line
        if tokens <= left:
            parts.append(GivenPassage(hit, text))
            left -= tokens
    if hits and not parts and left >= LEAST_TOKENS:
        text = f"[{before + 1}] {place_of(hits[0], True)}\n{hits[0].text}"
        while (tokens := count(text) + 2) > left:
            text = text[:min(len(text) * left // tokens, len(text) - 1)]
        parts.append(GivenPassage(hits[0], text, cut=True))
    return parts


def with_documents(messages: Seq[Message], documents: str) -> tuple[Message, ...]:
    """A conversation that begins with documents, after what the system says."""
    if messages and messages[0].role == "system":
        first, *others = messages
        text = f"\n\n{documents}"
        parts = (*first.parts, text) if first.parts else ()
        return (replace(first, content=first.content + text, parts=parts), *others)
    return (Message("system", documents), *messages)
