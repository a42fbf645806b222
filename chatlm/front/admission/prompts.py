"""Makes prompts that fit: renders, tokenizes and cuts them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.client_words import TOO_LONG, too_long
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, invalid
from chatlm.common.memory import trim_heap
from chatlm.common.messages.requests import NEW_DOCUMENT
from chatlm.common.text.calculations import calculations_of, text_in
from chatlm.common.text.pictures import pictures_of
from chatlm.common.text.reader import answer_reader
from chatlm.common.text.tokenizer import NO_OPTIONS, fill_template
from chatlm.front.admission.infill_prompts import InfillMaker, infill_size
from chatlm.front.admission.retrieval_prompts import RetrievalMaker, check_count, check_task, task_for
from chatlm.front.held import MeasuredThreads

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message, Picture, Request, Vision
    from chatlm.common.text.history_forms import Filling
    from chatlm.common.text.tokenizer import Tokenizer


T = TypeVar("T")


class Prompts(NamedTuple):
    """The prompts of a request."""

    ids: tuple[tuple[int, ...], ...]    # the token ids of each
    dropped: int = 0                    # messages that `truncate` dropped, or gaps whose text was cut
    pictures: tuple[Picture, ...] = ()  # those in the messages that are left


async def run_here(work: Callable[[], Any], size: float):
    return work()


class PromptMaker:
    """Turns a request's prompts into token ids that fit the context, or refuses it and says why.

    `fill` fills in the model's chat template; `run` does work that grows with the text, maybe in a thread."""

    SLICE_CHARACTERS = 1 << 16  # the tokens of a longer text are counted by slices before it is encoded

    def __init__(self, tokenizer: Tokenizer, context_length: int, *, scored_length: int = 0,
                 fill: Callable[[dict, str], Any] | None = None, run: Callable[..., Any] = run_here):
        """scored_length: the context of a prompt that is only scored; 0: the same."""
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.scored_length = scored_length or context_length
        self.run = run
        self.fill = fill or self._fill_here
        self.infills = InfillMaker(tokenizer, context_length)
        embedder = tokenizer.spec.embedder
        self.retrievals = embedder and RetrievalMaker(
            tokenizer, embedder, context_length, self._start_of_text)

    async def _fill_here(self, arguments: dict, client: str) -> str:
        return fill_template(self.tokenizer.template, arguments)

    async def run_filling(self, filling: Filling[T], client: str) -> T:
        """Run a `Filling`, which asks for filled-in templates, to its end. Returns what it returns."""
        try:
            arguments = next(filling)
            while True:
                try:
                    text = await self.fill(arguments, client)
                except RequestError as error:
                    arguments = filling.throw(error)
                else:
                    arguments = filling.send(text)
        except StopIteration as ended:
            return ended.value

    async def admit(self, request: Request, rendered: dict | None = None) -> Request:
        """The request with its prompts as token ids. Raises RequestError if it cannot be served.

        rendered: what was already rendered of this conversation, for other requests about it too."""
        check_task(self.tokenizer.spec.embedder, task_for(request.params.pooling))
        prompts = await self._prompts(request, rendered)
        self._check(request, prompts)
        params = request.params
        if self.retrievals and request.retrieval:
            params = replace(params, unpooled=self.retrievals.unpooled(request.prompts, request.retrieval))
        return replace(request.lasting(), params=params, prompt_ids=prompts.ids, pictures=prompts.pictures,
                       dropped_messages=request.dropped_messages + prompts.dropped)

    async def _prompts(self, request: Request, rendered: dict | None) -> Prompts:
        if request.infill:
            fill = partial(self.infills.prompts, request, request.infill)
            prompts = Prompts(*await self.run(fill, infill_size(request.prompts, request.infill)))
        elif request.messages is None:
            encode = partial(self._encode_prompts, request)
            prompts = Prompts(await self.run(encode, sum(map(len, request.prompts))))
        else:
            prompts = await self._cut_to_fit(request, request.messages, {} if rendered is None else rendered)
        if request.params.thinking_budget == 0:
            prompts = prompts._replace(ids=tuple(self._without_thinking(ids, request) for ids in prompts.ids))
        return prompts

    def _check(self, request: Request, prompts: Prompts):
        """Raise RequestError for a prompt that does not fit, or for token ids that the model lacks."""
        params = request.params
        if prompts.pictures and params.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "prompt_logprobs: rows of images have none")
        if params.pooling not in ("", "rank"):
            check_count(sum(map(len, prompts.ids)), request.source)
        for ids in prompts.ids:
            if not prompts.pictures:  # the ids of their rows are outside the vocabulary
                checked_ids(ids, self.tokenizer, request.source)
            self.answer_length(request, ids)
        checked_ids(params.stop_token_ids, self.tokenizer, "stop_token_ids")
        checked_ids(params.logprob_ids, self.tokenizer, "logprob_token_ids")
        for first, ids in zip(request.score_from, prompts.ids):
            if first >= len(ids):
                name = "prompt_logprobs_start"
                raise invalid(name, f"{name} is {first:,}, but the prompt has {len(ids):,} tokens")
        checked_ids([token for token, _ in params.sampling.logit_bias], self.tokenizer, "logit_bias")
        self._check_prefix(request)

    def _check_prefix(self, request: Request):
        """Raise RequestError if the start of the answer would end it."""
        name = "prefix_token_ids"
        params = request.params
        prefix = checked_ids(request.prefix_token_ids, self.tokenizer, name)
        ends = {*params.stop_token_ids}
        if not params.ignore_eos:
            ends |= {*self.tokenizer.stop_tokens}
        if ending := [token for token in prefix if token in ends]:
            raise invalid(name, f"{name} has the token id {ending[0]}, which ends the answer")

    def _without_thinking(self, ids: tuple[int, ...], request: Request) -> tuple[int, ...]:
        """The prompt with its reasoning ended, if the template began one. So the answer never begins in
        reasoning."""
        reader = answer_reader(self.tokenizer, request.params, ids)
        return (*ids, *reader.end_of_thinking()) if reader and reader.thinking else ids

    def _encode_prompts(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """Encode texts. With `truncate`, which only embeddings use here, the end of the context cuts them."""
        if self.retrievals and request.retrieval:
            return self.retrievals.prompts(request, request.retrieval)
        most = self.context_length if request.truncate else None
        if most and request.retrieval and request.retrieval.most:
            most = min(most, request.retrieval.most)
        longest = self._longest(request)
        prompts = [self.tokenizer.document_start if prompt == NEW_DOCUMENT else prompt
                   for prompt in request.prompts]
        starts = [self._start_of(prompt, request.source, request.truncate, longest) for prompt in prompts]
        return tuple(tuple(self.tokenizer.encode_prompt(start) if isinstance(start, str) else start)[:most]
                     for start in starts)

    async def render(self, messages: Seq[Message], tools: Seq[dict], client: str,
                     options: Mapping = NO_OPTIONS,
                     pictures: Seq[Picture] | None = None) -> tuple[int, ...]:
        """The token ids of a conversation. Raises RequestError if it is far too long. pictures: its pictures;
        None: not looked for yet."""
        tokenizer = self.tokenizer
        texts = [message.content + text_in(calculations_of(message)) for message in messages]
        size = sum(map(len, texts)) + 50 * len(texts)
        if pictures is None:
            pictures = pictures_of(messages)
        check_pictures(tokenizer.spec.vision, len(pictures))
        await self.run(lambda: self._start_of("".join(texts), "messages"), size)
        if not tokenizer.templated:
            render = partial(tokenizer.render, messages, tools=tools, options=options)
            return tuple(await self.run(render, size))
        rendered = await self.run_filling(tokenizer.rendering(messages, tools, options), client)

        def encode() -> list[int]:
            text = tokenizer.finished(rendered)
            self._start_of(text, "messages")
            return tokenizer.encode_rendered(text, options, pictures)

        return tuple(await self.run(encode, len(rendered.text) + sum(map(len, rendered.definitions))))

    async def _cut_to_fit(self, request: Request, messages: Seq[Message],
                          rendered: dict[int, Prompts]) -> Prompts:
        """The prompt of a conversation. If it does not fit, `truncate` drops as few messages as possible: the
        oldest turns first, then the oldest calls of the last turn. It never drops a system message or the
        last question.

        rendered: number of a cut (see `cut_points`) -> the prompt after it. This is filled in here."""
        if len(messages) > self.context_length:  # refused unrendered: each is at least one token
            raise too_long(len(messages), self.context_length, "messages", "messages", "at least ")
        roles = [message.role for message in messages]
        question = last_question(roles)
        cuts = cut_points(roles)

        async def after(cut: int) -> Prompts:
            if cut not in rendered:
                left, dropped = parted(messages, lambda index: (
                    messages[index].role == "system" or index >= cuts[cut] or index == question))
                found = [tool for message in dropped for tool in message.tools]
                pictures = pictures_of(left)
                ids = await self.render(left, (*request.tools, *found), request.client,
                                        request.template_options, pictures)
                rendered[cut] = Prompts((ids,), len(messages) - len(left), pictures)
            return rendered[cut]

        async def fits(cut: int) -> bool:
            """Does the prompt leave room for max_tokens, or for a quarter of the context?"""
            try:
                [ids] = (await after(cut)).ids
            except RequestError as error:
                if error.code != TOO_LONG:
                    raise
                return False
            room = max(self.context_length // 4, len(request.prefix_token_ids) + 1)
            return len(ids) + min(request.max_tokens or math.inf, room) <= self.context_length

        if not request.truncate or len(cuts) == 1 or await fits(0):
            return await after(0)
        low = 1
        high = len(cuts) - 1
        while low < high:
            middle = (low + high) // 2
            if await fits(middle):
                high = middle
            else:
                low = middle + 1
        return await after(low)

    def _longest(self, request: Request) -> int:
        """The most tokens that a prompt of this request and its answer may have together."""
        only_scored = request.params.prompt_logprobs is not None and request.max_tokens == 0
        return self.scored_length if only_scored else self.context_length

    def _start_of(self, text: str | Seq[int], param: str, cut: bool = False,
                  longest: int = 0) -> str | Seq[int]:
        """The text. If it has more than twice the context's tokens: its start with `cut`, else RequestError.

        This counts in slices. To tokenize the whole text takes about 700 bytes a token, which is 2.5 GB for a
        body of 15 MB."""
        if not isinstance(text, str) or len(text) <= self.SLICE_CHARACTERS:
            return text
        count = 0
        for start in range(0, len(text), self.SLICE_CHARACTERS):
            count += len(self.tokenizer.encode(text[start:start + self.SLICE_CHARACTERS]))
            if count > 2 * (longest or self.context_length):
                if cut:
                    return text[:start + self.SLICE_CHARACTERS]
                raise too_long(count - count % 1000, longest or self.context_length, param, param,
                               "more than ")
        return text

    def _start_of_text(self, text: str, param: str, cut: bool = False) -> str:
        return str(self._start_of(text, param, cut))

    def answer_length(self, request: Request, prompt_ids: tuple[int, ...]) -> int:
        """The most tokens that the answer may have. Raises RequestError if the prompt is empty or leaves no
        room."""
        longest = self._longest(request)
        room = longest - len(prompt_ids)
        pooling = bool(request.params.pooling)
        if not prompt_ids:
            raise RequestError(f"the {request.source} is empty", param=request.source)
        least = 0 if pooling or request.max_tokens == 0 else 1  # 0: the prompt may fill the context
        if room < least:
            raise too_long(len(prompt_ids), longest, request.source, request.source)
        if pooling:
            return 0
        most = room if request.max_tokens is None else max(1, min(request.max_tokens, room))
        given = len(request.prefix_token_ids)
        if given >= most:
            raise invalid("prefix_token_ids", f"prefix_token_ids has {given:,} tokens, but the answer may "
                                              f"have {most:,} in all")
        return most


def parted(messages: Seq[Message], stays: Callable[[int], bool]) -> tuple[list[Message], list[Message]]:
    """The messages that stay, by their indexes, and the others."""
    parts = [], []
    for index, message in enumerate(messages):
        parts[0 if stays(index) else 1].append(message)
    return parts


def check_pictures(vision: Vision | None, count: int):
    """Raise RequestError if a conversation has more pictures than the model sees."""
    if count and vision is None:
        raise RequestError("this model cannot see images", param="messages")
    if vision and count > vision.most:
        raise RequestError(f"the conversation has {count} images; {vision.most} are the most allowed",
                           param="messages")


def turn_starts(roles: Seq[str]) -> list[int]:
    """The index where each turn begins. A turn is a user message and what follows it."""
    return [0, *[index for index, role in enumerate(roles) if role == "user"][1:]]


def last_question(roles: Seq[str]) -> int:
    """The index of the last user message; -1 if there is none."""
    return max((index for index, role in enumerate(roles) if role == "user"), default=-1)


def cut_points(roles: Seq[str]) -> list[int]:
    """The indexes where the rest of a cut conversation may begin: at each turn and, in the last turn, at each
    message of the assistant, so that its calls keep their results. The last question stays in any case."""
    question = last_question(roles)
    steps = [index for index, role in enumerate(roles) if role == "assistant" and index > question + 1]
    return [*turn_starts(roles), *steps]


LONG_TEXTS = MeasuredThreads(1, "tokenizer")  # one at a time: each takes a lot of memory


async def run_in_thread_if_long(work: Callable[[], Any], size: float):
    """Return work(). A long text runs in a thread, so that other streams continue."""
    if size <= LIMITS.inline_characters:
        return work()

    def work_then_trim():
        try:
            return work()
        finally:
            trim_heap()

    return await asyncio.get_running_loop().run_in_executor(LONG_TEXTS, work_then_trim)


def checked_ids(tokens: Seq[int], tokenizer: Tokenizer, name: str) -> Seq[int]:
    """The token ids. Raises RequestError for ids outside the vocabulary, which would fail the whole batch in
    the engine. name: the field that has them."""
    size = tokenizer.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        wrong = next(token for token in tokens if not 0 <= token < size)
        raise invalid(name, f"{name} has the token id {wrong}; this model's ids are 0 to {size - 1}")
    return tokens
