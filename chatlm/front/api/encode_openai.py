"""Encoders of OpenAI's Completions and Chat Completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.requests import Delta, Finished, Piece, PromptScores
from chatlm.common.text.answer_decoder import answer_decoder, parts_of, without_calls
from chatlm.front.api.encode import (
    SYSTEM_FINGERPRINT, Choice, Encoder, calculator_member, is_plain_text, timings_body)
from chatlm.front.api.logprobs import entries, with_requested_tops, logprob_number, token_text

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Accepted, TokenLogprob
    from chatlm.front.api.encode import AnswerBlock


NOTHING = Piece()


class OpenAIEncoder(Encoder):
    """Turns events into chunks of a stream, or into one body. The encoders of both routes share this."""

    id_prefix = ""
    chunk_object = ""
    whole_object = ""
    logprobs_beside: Mapping = {}  # fields of `logprobs` besides those of logprobs_body
    scores_above = False           # True: `prompt_logprobs` is beside the choices; False: in each choice
    logprobs_body: Callable[[Choice, Seq[TokenLogprob]], dict]

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.head = {"id": self.id_prefix + self.request.id, "object": self.chunk_object,
                     "created": int(time.time()), "model": self.model,
                     "system_fingerprint": SYSTEM_FINGERPRINT, "seed": self.request.params.sampling.seed}
        self.begin = b"data: " + dump(self.head)[:-1] + b", "  # starts every frame

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        """The fields of a choice besides index and finish_reason, for a chunk or for one whole body."""
        raise NotImplementedError

    def logprobs(self, choice: Choice, part: Piece) -> dict | None:
        if not part.logprobs:
            return None
        return {**self.logprobs_body(choice, part.logprobs), **self.logprobs_beside}

    @property
    def shows_prompt(self) -> bool:
        """Are the prompt's log-probabilities listed with those of the answer? Else they are only in
        `prompt_logprobs`."""
        return self.parsed.echo and self.request.params.logprobs is not None

    def take(self, choice: Choice, event: Piece | PromptScores | Finished) -> Piece:
        """What to send for an event, with the log-probabilities of its tokens. Those of a stop string are
        left out, unless the prompt was scored too."""
        held = choice.held
        choice.held = ()
        ids = choice.held_ids
        choice.held_ids = ()
        if isinstance(event, Finished):
            choice.done = event
            params = self.request.params
            by_text = event.stop_reason in params.stop and params.prompt_logprobs is None
            return NOTHING._replace(tokens=ids, logprobs=() if by_text else held)
        if isinstance(event, PromptScores):  # before any piece, so none are held
            return NOTHING._replace(logprobs=event.logprobs) if self.shows_prompt else NOTHING
        held += event.logprobs
        ids += event.tokens if self.parsed.token_ids else ()
        if event.deltas:
            return event._replace(tokens=ids, logprobs=held) if held or ids else event
        choice.held = held
        choice.held_ids = ids
        return NOTHING

    def entries(self, logprobs: Seq[TokenLogprob]) -> list[dict]:
        return entries(logprobs, self.request.params, self.tokenizer)

    def prompt_entries(self, logprobs: Seq[TokenLogprob], top: int) -> list[dict | None]:
        """vLLM's `prompt_logprobs`: an object for each token, in which the token and the `top` likeliest ones
        stand under their ids. None for the first token, which nothing precedes."""
        def entry(token: int, logprob: float | None, rank: int | None) -> dict:
            return {"logprob": logprob_number(logprob), "rank": rank,
                    "decoded_token": token_text(self.tokenizer, token)[0]}

        def entries_at(scored: TokenLogprob) -> dict:
            own = {str(scored.token): entry(scored.token, scored.logprob, scored.rank)}
            likeliest = enumerate(scored.top[:top], 1)
            return own | {str(token): entry(token, logprob, rank)
                          for rank, (token, logprob) in likeliest if token != scored.token}

        return [None if scored.logprob is None else entries_at(scored) for scored in logprobs]

    def first_scored(self, choice: Choice) -> int:
        """The index of the first token of the choice's prompt that is scored."""
        starts = self.request.score_from
        return starts[choice.index // self.request.n] if starts else 0

    def ids(self, tokens: Seq[int]) -> dict:
        return {"token_ids": tokens} if self.parsed.token_ids else {}

    def encode(self, event: Piece | PromptScores | Finished) -> bytes:
        choice = self.choices[event.choice]
        if type(event) is Piece and self.is_plain(choice, event):
            return self.plain_chunk(choice, event.deltas[0])
        part = self.take(choice, event)
        frames = b""
        if part != NOTHING:
            frames = self.chunk(choice, self.body(choice, part) | self.ids(part.tokens))
        if choice.done:
            frames += self.chunk(choice, self.body(choice, NOTHING), last=True) + self.end()
        return frames

    def is_plain(self, choice: Choice, piece: Piece) -> bool:
        """Is a piece's chunk like the last one but for its text?"""
        return is_plain_text(piece) and bool(piece.deltas[0].text) and not (
            choice.held or choice.held_ids or self.parsed.token_ids)

    def plain_chunk(self, choice: Choice, delta: Delta) -> bytes:
        """The chunk of a piece that `is_plain`. What is the same in all of them is made once."""
        choice.counter.place(delta)
        if not choice.around_text:
            mark = secrets.token_hex(16)
            other = Choice(choice.index, self.tokenizer)
            chunk = self.chunk(other, self.body(other, Piece(deltas=(Delta("text", mark),))))
            choice.around_text = chunk.split(dump(mark))
        return dump(delta.text).join(choice.around_text)

    def chunk(self, choice: Choice, body: dict, last: bool = False) -> bytes:
        ending = self.ending(choice) if last else {"finish_reason": None}
        chunk: dict = {"choices": [{"index": choice.index, **body, **ending}]}
        if self.parsed.include_usage:
            chunk["usage"] = None
        if last:
            chunk["timings"] = timings_body(choice.done)
        return self.framed(chunk)

    def ending(self, choice: Choice) -> dict:
        reason = "tool_calls" if choice.calls and choice.done.reason == "stop" else choice.done.reason
        return {"finish_reason": reason, "stop_reason": choice.done.stop_reason}

    def framed(self, body: dict) -> bytes:
        return self.begin + dump({"choices": []} | body)[1:] + b"\n\n"

    def end(self) -> bytes:
        """What follows the last chunk of the last choice: the usage, if asked for, and [DONE]."""
        if not all(choice.done for choice in self.choices):
            return b""
        usage = b""
        if self.parsed.include_usage:
            usage = self.framed({"choices": [], "usage": self.usage_body()})
        return usage + b"data: [DONE]\n\n"

    def usage_body(self) -> dict:
        usage = self.usage()
        return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                "completion_tokens_details": {
                    "reasoning_tokens": usage.reasoning_tokens,
                    "accepted_prediction_tokens": usage.accepted_tokens,
                    "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens}}

    def collect(self, event: Piece | PromptScores | Finished) -> int:
        """Keep an event for `completion`; returns roughly how many bytes that takes."""
        choice = self.choices[event.choice]
        part = self.take(choice, event)
        size = 100
        top = self.parsed.details.get("prompt_logprobs")
        if isinstance(event, PromptScores) and top is not None:
            unwanted = [] if choice.prompt_logprobs else [None] * self.first_scored(choice)
            encoded = dump(unwanted + self.prompt_entries(event.logprobs, top))[1:-1]
            choice.prompt_logprobs.append(encoded)
            size += len(encoded)
        choice.token_ids += part.tokens if self.parsed.token_ids else ()
        for delta in part.deltas:
            size += len(delta.text)
            call = choice.counter.place(delta)
            if call is not None:
                choice.calculator.append(call)
            else:
                choice.block(delta).texts.append(delta.text)
        if self.request.params.logprobs is not None:  # kept as JSON: 2 KB per token instead of 14
            for name, values in self.logprobs_body(choice, part.logprobs).items():
                encoded = dump(values)[1:-1]
                choice.logprobs.setdefault(name, []).append(encoded)
                size += len(encoded)
        return size

    def completion(self) -> Iterator[bytes]:
        """Yield the pieces of the whole answer as one body.

        The log-probabilities are JSON already, so they are put between the other members."""
        body = {**self.head, "object": self.whole_object, "usage": self.usage_body(),
                "timings": timings_body(self.choices[0].done)}
        separator = dump(body)[:-1] + b', "choices": ['
        for choice in self.choices:
            whole = Piece(deltas=tuple(Delta(kind, choice.text(kind)) for kind in ("reasoning", "text")))
            body = {"index": choice.index, **self.body(choice, whole, whole=True), **self.ending(choice),
                    **self.ids(choice.token_ids)}
            if choice.logprobs:
                del body["logprobs"]
            yield separator + dump(body)[:-1]
            yield from choice.encoded_logprobs(self.logprobs_beside)
            if not self.scores_above:
                yield from choice.encoded_prompt()
            separator = b"}, "
        yield b"}]"
        if self.scores_above:
            yield from self.choices[0].encoded_prompt()
        yield b"}"


class ChatEncoder(OpenAIEncoder):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    logprobs_beside = {"refusal": None}
    scores_above = True

    def start(self, accepted: Accepted) -> bytes:
        opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return b"".join(self.chunk(choice, opening) for choice in self.choices)

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        message: dict = {}
        text = part.text
        reasoning = part.joined("reasoning")
        if whole:
            calls = [self.call_body(call, call.text) for call in choice.calls]
            message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
            message |= calculator_member(choice.calculator)
        else:
            calls = self.call_deltas(choice, part)
            if text or part.logprobs and not reasoning:
                message = {"content": text}
        if reasoning:  # clients read one or the other
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if not whole:
            message |= calculator_member(choice.counter.numbered(part.deltas))
        if calls:
            message["tool_calls"] = calls
        return {"message" if whole else "delta": message, "logprobs": self.logprobs(choice, part)}

    @staticmethod
    def call_body(call: AnswerBlock, arguments: str) -> dict:
        return {"id": "call_" + call.id, "type": "function",
                "function": {"name": call.name, "arguments": arguments}}

    def call_deltas(self, choice: Choice, part: Piece) -> list[dict]:
        """The calls in a chunk: the whole call when it begins, afterwards only more arguments. Each call has
        one entry, since clients that merge chunks do not merge the entries within a chunk."""
        entries: list[dict] = []
        for delta in part.deltas:
            if delta.kind != "call":
                continue
            call = choice.block(delta)
            if entries and entries[-1]["index"] == call.index:
                entries[-1]["function"]["arguments"] += delta.text
            else:
                more = {"function": {"arguments": delta.text}}
                begun = self.call_body(call, delta.text) if delta.name else more
                entries.append({"index": call.index, **begun})
        return entries

    def logprobs_body(self, choice: Choice, logprobs: Seq[TokenLogprob]) -> dict:
        return {"content": self.entries(logprobs)}


class FunctionEncoder(ChatEncoder):
    """`/v1/chat/completions` for clients that only know `functions`: a message has at most one call."""

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        body = super().body(choice, part, whole)
        message = body["message" if whole else "delta"]
        message |= {"function_call": call["function"]
                    for call in message.pop("tool_calls", ())[:1] if not call.get("index")}
        return body

    def ending(self, choice: Choice) -> dict:
        ending = super().ending(choice)
        if ending["finish_reason"] == "tool_calls":
            ending["finish_reason"] = "function_call"
        return ending


class CompletionEncoder(OpenAIEncoder):
    """`/v1/completions`; `echo` puts the prompt before each answer."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def prompt(self, choice: Choice) -> str | tuple[int, ...]:
        return self.request.prompts[choice.index // self.request.n]

    def take(self, choice: Choice, event: Piece | PromptScores | Finished) -> Piece:
        part = super().take(choice, event)
        if not self.parsed.echo or choice.echoed:
            return part
        choice.echoed = True
        prompt = self.prompt(choice)
        echo = [Delta("text", prompt)] if is_text(prompt) else self.decoded(prompt)
        echo = [delta for delta in echo if delta.text]
        return part._replace(deltas=(*echo, *part.deltas)) if echo else part

    def is_plain(self, choice: Choice, piece: Piece) -> bool:
        echoes = self.parsed.echo and not choice.echoed
        return not echoes and super().is_plain(choice, piece)

    def decoded(self, tokens: Seq[int]) -> list[Delta]:
        """Token ids in the form in which an answer shows them."""
        if not self.request.params.skip_special_tokens:
            return [Delta("text", self.tokenizer.show(tokens))]
        if self.tokenizer.tool_tokens is None:
            return [Delta("text", self.tokenizer.decode(tokens))]
        decoder = answer_decoder(self.tokenizer)
        text = "".join(map(decoder.push, tokens)) + decoder.finish()
        return [*parts_of(decoder, text + decoder.utf8.decode(b"", True))]

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        calls = choice.calculator if whole else choice.counter.numbered(part.deltas)
        return {"text": part.text, "logprobs": self.logprobs(choice, part), **calculator_member(calls)}

    def logprobs_body(self, choice: Choice, logprobs: Seq[TokenLogprob]) -> dict:
        """Four lists. text_offset says where each token begins in the choice's text, in characters. With
        return_token_ids there is also `content`, as in chats."""
        prompt = self.prompt(choice)
        # special tokens appear as text only in an echoed prompt
        written = prompt if self.parsed.echo and isinstance(prompt, str) else ""
        texts = []
        offsets = []
        tops = []
        for token, logprob, top, *_ in with_requested_tops(logprobs, self.request.params):
            texts.append(token_text(self.tokenizer, token)[0])
            offsets.append(choice.offset)
            name = self.tokenizer.special_names.get(token)
            if name and written.startswith(name, choice.offset):
                choice.offset += len(name)
            else:
                choice.offset += len(without_calls(choice.decoder.push(token)))
            tops.append(None if logprob is None else self.by_text(token, dict((*top, (token, logprob)))))
        body = {"tokens": texts, "token_logprobs": [logprob_number(scored.logprob) for scored in logprobs],
                "top_logprobs": tops, "text_offset": offsets}
        if self.parsed.token_ids:
            body["content"] = self.entries(logprobs)
        return body

    def by_text(self, token: int, logprobs: Mapping[int, float]) -> dict[str, float | None]:
        """Log-probabilities by the texts of their tokens. If several tokens have one text, `token` keeps it,
        or else the likeliest of them. The others are named by their ids, as in vLLM."""
        owners = {token_text(self.tokenizer, token)[0]: token}
        named = {}
        for likely, logprob in logprobs.items():
            text = token_text(self.tokenizer, likely)[0]
            name = text if owners.setdefault(text, likely) == likely else f"token_id:{likely}"
            named[name] = logprob_number(logprob)
        return named
