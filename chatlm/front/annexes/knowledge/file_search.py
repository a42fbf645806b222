"""The tool `file_search`: the model asks, stores are searched, and it reads the passages that fit.

The stores of a body are looked up before it is answered, and again for each call: one that was deleted
meanwhile is not searched. Passages are numbered over all calls of an answer, and given once. What they take
of the context is limited as in a chat (prompting.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from chatlm.common.errors import ChatServerError, RequestError
from chatlm.common.jsontext import is_text
from chatlm.front.admission.questions import QUESTION_CHARACTERS
from chatlm.front.annexes.knowledge.asking import Asker
from chatlm.front.annexes.knowledge.fields import MOST_QUERIES, QUERIES
from chatlm.front.annexes.knowledge.filters import read_filter
from chatlm.front.annexes.knowledge.prompting import (
    CITE, LEAST_TOKENS, MOST_PASSAGES, SHARE, GivenPassage, counter, each_once, fitting_parts, least_score,
    room_in, sources_of, used_stores)
from chatlm.front.annexes.knowledge.search import Terms
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.tools.results import ToolResult

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.front.annexes.knowledge.search import Hit, Search
    from chatlm.front.api.additions import ToolCall
    from chatlm.front.intake.opened_body import Caller
    from chatlm.front.store.store import Store


TYPE = "file_search"
FOUND = f"Passages of documents that were found. {CITE}"
NOTHING = "Nothing was found in the documents."
NOTHING_ELSE = "Nothing else was found. Now answer the question with the passages above."
NO_ROOM = "Passages were found, but the conversation is too long to show them."
BAD_QUERIES = "Not run: queries must be a list of texts, what to look for."


class Searched(NamedTuple):
    """What a body says of the search, checked."""

    stores: Seq[str]
    owner: str   # of the stores
    terms: Terms


class FileSearch:
    """Runs the calls of file_search."""

    def __init__(self, store: Store, search: Search, most_characters: int):
        """most_characters: of a result."""
        self.store = store
        self.search = search
        self.most_characters = most_characters

    async def checked(self, parsed: ParsedBody, caller: Caller) -> ParsedBody:
        """A body whose calls of the tool will be what its entry says. Raises RequestError 404 for a store
        that its owner has not, and 400 for filters that are none."""
        plan = parsed.plan
        options = plan and plan.options.get(TYPE)
        if not plan or not options:
            return parsed
        entry = options["entry"]
        names = options["vector_store_ids"]
        filters = options.get("filters")
        wanted = read_filter(filters, f"{entry}.filters") if filters else None
        terms = terms_of(options)._replace(filter=wanted)
        await self.store.run(partial(used_stores, wanted=names, owner=caller.texts,
                                     param=f"{entry}.vector_store_ids"), client=caller.client)
        searched = {"searched": Searched(names, caller.texts, terms)}
        return replace(parsed, plan=replace(plan, options={**plan.options, TYPE: searched}))

    async def call(self, call: ToolCall) -> ToolResult:
        """The result of a call. What goes wrong is one too."""
        queries = queries_in(call.arguments)
        if not queries:
            return ToolResult(BAD_QUERIES, is_error=True)
        try:
            hits = await self._found(call, queries)
            parts = await self._fitting(call, hits)
        except ChatServerError as error:
            return ToolResult(f"{error}.", is_error=True, shown={QUERIES: queries})
        results = [result_of(part.hit) for part in parts]
        if parts:
            text = "\n\n".join((FOUND, *(part.text for part in parts)))
        elif hits:
            text = NO_ROOM
        else:
            text = NOTHING_ELSE if call.before else NOTHING
        return ToolResult(text, shown={QUERIES: queries, "results": results}, cited=sources_of(parts))

    async def _found(self, call: ToolCall, queries: Seq[str]) -> list[Hit]:
        """The passages that fit, without those that earlier calls have found."""
        searched: Searched = call.options["searched"]
        numbers = await self.store.run(partial(left_stores, searched=searched), client=call.client)
        asker = Asker(call.client, call.owner, call.request.low_priority, call.request.params.temporary)
        found = await self.search.find(numbers, queries, asker, searched.terms)
        if found.words_only:
            REQUEST_LOG.get().headers["X-Search"] = "words"
        known = [(each["file_id"], each["start"]) for before in call.before
                 for each in before.shown.get("results", ())]
        return [hit for hit in each_once(found.hits) if (hit.file, hit.start) not in known]

    async def _fitting(self, call: ToolCall, hits: Seq[Hit]) -> list[GivenPassage]:
        """What of these the model is given."""
        prompts = call.pool.admission.prompts
        assert prompts  # it has answered already
        count = counter(prompts)
        room = await room_in(call.request, call.request.messages or (), call.client, prompts)
        given = [each.text for each in call.before]
        numbered = sum(len(each.cited) for each in call.before)

        def fit() -> list[GivenPassage]:
            left = min(room, prompts.context_length // SHARE - sum(map(count, given)))
            parts = fitting_parts(hits, left, count, numbered) if left >= LEAST_TOKENS else []
            return within_characters(parts, self.most_characters - len(FOUND))
        return await prompts.run(fit, sum(len(hit.text) for hit in hits) + sum(map(len, given)))


def terms_of(options: Mapping[str, Any]) -> Terms:
    """How an entry of `tools` wants the search to be done."""
    ranking = options.get("ranking_options", {})
    weights = ranking.get("hybrid_search") or {}
    most = options.get("max_num_results")
    return Terms(most or MOST_PASSAGES, None, least_score(most, ranking.get("score_threshold")),
                 ranking.get("ranker") != "none", weights.get("embedding_weight", 1.0),
                 weights.get("text_weight", 1.0))


def queries_in(arguments: Mapping[str, Any]) -> list[str]:
    """What a call looks for; [] if it does not say."""
    sent = arguments.get(QUERIES, arguments.get("query"))
    texts = sent if isinstance(sent, list) else [sent]
    found = [text.strip()[:2 * QUESTION_CHARACTERS] for text in texts if is_text(text)]
    return [*dict.fromkeys(filter(None, found))][:MOST_QUERIES]


def left_stores(connection, searched: Searched) -> list[int]:
    """The numbers of the stores that are still there. Raises RequestError if none is."""
    found = dict[int, str]()
    problems = list[RequestError]()
    for name in searched.stores:
        try:
            found |= used_stores(connection, [name], searched.owner, "")
        except RequestError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return sorted(found)


def result_of(hit: Hit) -> dict[str, Any]:
    """A passage as the item of a call has it."""
    return {"file_id": hit.file, "filename": hit.filename, "score": hit.score, "text": hit.text,
            "attributes": hit.attributes, "heading": hit.heading, "page": hit.page, "start": hit.start}


def within_characters(parts: Seq[GivenPassage], most: int) -> list[GivenPassage]:
    """The first parts that have at most so many characters; the first one is cut if it alone has more."""
    kept = list[GivenPassage]()
    for part in parts:
        most -= len(part.text) + 2
        if most < 0 and kept:
            break
        kept.append(part if most >= 0 else part._replace(text=part.text[:most], cut=True))
    return kept
