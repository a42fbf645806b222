"""Prompts that fit: rendered, tokenized, cut."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING, TypeVar

from chatlm.common.client_words import TOO_LONG, too_long
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, invalid
from chatlm.common.memory import trim_heap
from chatlm.common.messages.requests import NEW_DOCUMENT
from chatlm.common.text.calculations import calculations_of, text_in
from chatlm.common.text.pictures import pictures_of
from chatlm.common.text.reader import answer_reader
from chatlm.common.text.tokenizer import NO_OPTIONS, fill_template
from chatlm.front.admission.infill import InfillMaker, infill_size
from chatlm.front.admission.retrieval import RetrievalMaker, check_count, check_task, task_of

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Message, Picture, Request, Vision
    from chatlm.common.text.history_forms import Filling
    from chatlm.common.text.tokenizer import Tokenizer


T = TypeVar("T")


async def run_here(work: Callable[[], Any], size: float):
    return work()


class PromptMaker:
    """Turns a request's prompts into token ids that fit the context, or refuses it with a reason.

    `fill` fills in the model's chat template; `run` does work that grows with the text, maybe in a thread."""

    SLICE_CHARACTERS = 1 << 16  # longer texts have their tokens counted, slice by slice, before encoding

    def __init__(self, tokenizer: Tokenizer, context_length: int, *, scored_length: int = 0,
                 fill: Callable[[dict, str], Any] | None = None, run: Callable[..., Any] = run_here):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.run = run
        self.scored_length = scored_length or context_length  # of a prompt that is only scored
        self.fill = fill or self._fill_here
        self.infills = InfillMaker(tokenizer, context_length)
        embedder = tokenizer.spec.embedder
        self.retrievals = embedder and RetrievalMaker(tokenizer, embedder, context_length, self._text_of)

    async def _fill_here(self, arguments: dict, client: str) -> str:
        return fill_template(self.tokenizer.template, arguments)

    async def filled(self, filling: Filling[T], client: str) -> T:
        """What `filling` returns, with the template filled in as this maker does it."""
        arguments = next(filling)
        while True:
            try:
                try:
                    text = await self.fill(arguments, client)
                except RequestError as error:
                    arguments = filling.throw(error)
                else:
                    arguments = filling.send(text)
            except StopIteration as ended:
                return ended.value

    async def admit(self, request: Request, rendered: dict | None = None) -> Request:
        """rendered: shared by requests of the same conversation, what was already rendered of it."""
        check_task(self.tokenizer.spec.embedder, task_of(request.params.pooling))
        pictures: tuple[Picture, ...] = ()
        if request.infill:
            fill = partial(self.infills.prompts, request, request.infill)
            prompts, dropped = await self.run(fill, infill_size(request.prompts, request.infill))
        elif request.messages is None:
            encode = partial(self._encode_prompts, request)
            prompts = await self.run(encode, sum(map(len, request.prompts)))
            dropped = 0
        else:
            prompts, dropped, pictures = await self._cut_to_fit(
                request, request.messages, {} if rendered is None else rendered)
        if pictures and request.params.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "prompt_logprobs: rows of images have none")
        if request.params.thinking_budget == 0:
            prompts = tuple(self._without_thinking(ids, request) for ids in prompts)
        if request.params.pooling not in ("", "rank"):
            check_count(sum(map(len, prompts)), request.source)
        for ids in prompts:
            if not pictures:  # rows of these have ids in no vocabulary
                checked_ids(ids, self.tokenizer, request.source)
            self.answer_length(request, ids)
        checked_ids(request.params.stop_token_ids, self.tokenizer, "stop_token_ids")
        checked_ids(request.params.logprob_ids, self.tokenizer, "logprob_token_ids")
        for first, ids in zip(request.score_from, prompts):
            if first >= len(ids):
                name = "prompt_logprobs_start"
                raise invalid(name, f"{name} is {first:,}, but the prompt has {len(ids):,} tokens")
        checked_ids([token for token, _ in request.params.sampling.logit_bias], self.tokenizer, "logit_bias")
        self._check_prefix(request)
        params = request.params
        if self.retrievals and request.retrieval:
            params = replace(params, unpooled=self.retrievals.unpooled(request.prompts, request.retrieval))
        return replace(request.lasting(), params=params, prompt_ids=prompts, pictures=pictures,
                       dropped_messages=request.dropped_messages + dropped)

    def _check_prefix(self, request: Request):
        name = "prefix_token_ids"
        params = request.params
        prefix = checked_ids(request.prefix_token_ids, self.tokenizer, name)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.tokenizer.stop_tokens)}
        if ending := [token for token in prefix if token in ends]:
            raise invalid(name, f"{name} has the token id {ending[0]}, which ends the answer")

    def _without_thinking(self, ids: tuple[int, ...], request: Request) -> tuple[int, ...]:
        """The prompt, changed so that the answer does not begin in reasoning whatever the template wrote."""
        reader = answer_reader(self.tokenizer, request.params, ids)
        return (*ids, *reader.end_of_thinking()) if reader and reader.thinking else ids

    def _encode_prompts(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """With `truncate`, which only embeddings use here, a prompt is cut at the end of the context."""
        if self.retrievals and request.retrieval:
            return self.retrievals.prompts(request, request.retrieval)
        most = self.context_length if request.truncate else None
        longest = self._longest(request)
        prompts = [self.tokenizer.document_start if prompt == NEW_DOCUMENT else prompt
                   for prompt in request.prompts]
        starts = [self._start_of(prompt, request.source, request.truncate, longest) for prompt in prompts]
        return tuple(tuple(self.tokenizer.encode_prompt(start) if isinstance(start, str) else start)[:most]
                     for start in starts)

    async def render(self, messages: Seq[Message], tools: Seq[dict], client: str,
                     options: Mapping = NO_OPTIONS) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        texts = [message.content + text_in(calculations_of(message)) for message in messages]
        size = sum(map(len, texts)) + 50 * len(texts)
        pictures = pictures_of(messages)
        check_pictures(tokenizer.spec.vision, len(pictures))
        await self.run(lambda: self._start_of("".join(texts), "messages"), size)
        if not tokenizer.templated:
            render = partial(tokenizer.render, messages, tools=tools, options=options)
            return tuple(await self.run(render, size))
        text = await self.filled(tokenizer.rendering(messages, tools, options), client)

        def encode() -> list[int]:
            self._start_of(text, "messages")
            return tokenizer.encode_rendered(text, options, pictures)

        return tuple(await self.run(encode, len(text)))

    async def _cut_to_fit(self, request: Request, messages: Seq[Message],
                          rendered: dict) -> tuple[tuple[tuple[int, ...]], int, tuple[Picture, ...]]:
        """The prompt of a conversation, how many messages `truncate` dropped to make it fit (as few of the
        oldest turns as possible, then of the oldest calls in the last one, never a system message or the last
        question), and the pictures of the others. rendered: the number of the cut -> the prompt after it, how
        many messages it drops, the pictures."""
        if len(messages) > self.context_length:  # refused unrendered: each is at least one token
            raise too_long(len(messages), self.context_length, "messages", "messages", "at least ")
        roles = [message.role for message in messages]
        question = last_question(roles)
        cuts = cut_points(roles)

        async def without(cut: int) -> tuple[tuple[int, ...], int, tuple[Picture, ...]]:
            if cut not in rendered:
                kept = [message for index, message in enumerate(messages)
                        if message.role == "system" or index >= cuts[cut] or index == question]
                ids = await self.render(kept, request.tools, request.client, request.template_options)
                rendered[cut] = ids, len(messages) - len(kept), pictures_of(kept)
            return rendered[cut]

        async def fits(cut: int) -> bool:  # with room for max_tokens, or for a quarter of the context
            try:
                length = len((await without(cut))[0])
            except RequestError as error:
                if error.code != TOO_LONG:
                    raise
                return False
            room = max(self.context_length // 4, len(request.prefix_token_ids) + 1)
            return length + min(request.max_tokens or math.inf, room) <= self.context_length

        low = 0
        high = 0
        if request.truncate and len(cuts) > 1 and not await fits(0):
            low = 1
            high = len(cuts) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if await fits(middle) else (middle + 1, high)
        ids, dropped, pictures = await without(low)
        return (ids,), dropped, pictures

    def _longest(self, request: Request) -> int:
        """The most tokens of a request's prompt, and of its answer if it has one."""
        scored = request.params.prompt_logprobs is not None and request.max_tokens == 0
        return self.scored_length if scored else self.context_length

    def _start_of(self, text: str | Seq[int], param: str, cut: bool = False,
                  longest: int = 0) -> str | Seq[int]:
        """The text. If it has over twice the context's tokens: its start with `cut`, else RequestError 400.
        Counts in slices: tokenizing the whole takes about 700 bytes a token, 2.5 GB for a 15 MB body."""
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

    def _text_of(self, text: str, param: str, cut: bool = False) -> str:
        return str(self._start_of(text, param, cut))

    def answer_length(self, request: Request, prompt_ids: tuple[int, ...]) -> int:
        """Most tokens the answer may have. RequestError 400 if the prompt is empty or leaves no room."""
        room = self._longest(request) - len(prompt_ids)
        pooling = bool(request.params.pooling)
        alone = pooling or request.max_tokens == 0  # it may fill the context
        if not prompt_ids:
            raise RequestError(f"the {request.source} is empty", param=request.source)
        if room < 1 - alone:
            raise too_long(len(prompt_ids), self._longest(request), request.source, request.source)
        if pooling:
            return 0
        most = room if request.max_tokens is None else max(1, min(request.max_tokens, room))
        if (given := len(request.prefix_token_ids)) >= most:
            raise invalid("prefix_token_ids", f"prefix_token_ids has {given:,} tokens, but the answer may "
                                              f"have {most:,} in all")
        return most


def check_pictures(vision: Vision | None, count: int):
    """RequestError if a conversation has more pictures than the model sees."""
    if count and vision is None:
        raise RequestError("this model cannot see images", param="messages")
    if vision and count > vision.most:
        raise RequestError(f"the conversation has {count} images; {vision.most} are the most allowed",
                           param="messages")


def turn_starts(roles: Seq[str]) -> list[int]:
    """The index where each turn begins: a turn is a user message and what follows it."""
    return [0, *[index for index, role in enumerate(roles) if role == "user"][1:]]


def last_question(roles: Seq[str]) -> int:
    """The index of the last user message; -1 if there is none."""
    return max((index for index, role in enumerate(roles) if role == "user"), default=-1)


def cut_points(roles: Seq[str]) -> list[int]:
    """The indexes where what is kept of a conversation may begin: those of turns and, in the last one, those
    of the assistant's messages, whose calls have their results after them. The last question is kept too."""
    question = last_question(roles)
    steps = [index for index, role in enumerate(roles) if role == "assistant" and index > question + 1]
    return [*turn_starts(roles), *steps]


LONG_TEXTS = ThreadPoolExecutor(1, "tokenizer")  # one at a time: each takes a lot of memory


async def run_in_thread_if_long(work: Callable[[], Any], size: float):
    """work(), in a thread when the text is long, so that other streams continue."""
    if size <= LIMITS.inline_characters:
        return work()

    def work_then_trim():
        try:
            return work()
        finally:
            trim_heap()

    return await asyncio.get_running_loop().run_in_executor(LONG_TEXTS, work_then_trim)


def checked_ids(tokens: Seq[int], tokenizer: Tokenizer, name: str) -> Seq[int]:
    """RequestError for token ids outside the vocabulary: in the engine they would fail the whole batch."""
    size = tokenizer.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        wrong = next(token for token in tokens if not 0 <= token < size)
        raise invalid(name, f"{name} has the token id {wrong}; this model's ids are 0 to {size - 1}")
    return tokens
