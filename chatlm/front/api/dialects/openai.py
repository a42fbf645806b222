"""OpenAI's Chat Completions and Completions, and llama-server's /infill, whose answers are written alike."""

from __future__ import annotations

import itertools
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import asdict, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, invalid
from chatlm.common.jsontext import dump, is_text, whole_unicode
from chatlm.common.messages.requests import (
    NEW_DOCUMENT, AnswerParams, Delta, Finished, Infill, Piece, PromptScores)
from chatlm.common.text.answer_decoder import answer_decoder, parts_of, without_calls
from chatlm.front.api import idle
from chatlm.front.api.answer_state import ChoiceState
from chatlm.front.api.citations import citations_in
from chatlm.front.api.dialect import Dialect, Form
from chatlm.front.api.encode import (
    SYSTEM_FINGERPRINT, Encoder, calculator_member, frame, timings_body)
from chatlm.front.api.field_types import (
    CONSTRAINT_FIELDS, FUNCTIONS, FUNCTION_CALL, INTEGER, LLAMA_SERVERS, MIXED, PROMPTS, SWITCH, TEXT, TOOLS,
    TOOL_CHOICE, object_of, one_constraint, response_grammar)
from chatlm.front.api.fields import (
    A_TEXT, A_TOKEN, TEXT_OR_NULL, Field, FieldType, as_count, functions_among, list_schema, no_tools,
    object_schema, parse_fields, within_limit, without)
from chatlm.front.api.ignored import idle_variables
from chatlm.front.api.logprobs import entries, logprob_number, token_text, with_requested_tops
from chatlm.front.api.message_readers import custom_calls
from chatlm.front.api.readers import (
    openai_request, parse_answer, parse_openai_request, parsed_body, with_infill_ends)
from chatlm.front.api.tables import (
    CHOICES, CONVERSATION, OPENAI_SAMPLING_FIELDS, PARALLEL, PREFIX, SAMPLED, SAMPLING_FIELDS,
    TEMPLATE_OPTIONS, TOKEN_CAPS, TRUNCATE)

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.common.messages.requests import Accepted, Request, TokenLogprob
    from chatlm.common.text.reader import StreamDecoder
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.answer_state import Part
    from chatlm.front.api.dialect import Terms


# fields

RESPONSE_FORMAT = Field(
    "response_format", object_of("type", "json_schema", "schema", "value")._replace(
        convert=response_grammar),
    "format of the answer, in which it ends within max_tokens: text, json_object, json_schema or regex")
PROMPT_LOGPROBS = Field(
    "prompt_logprobs", INTEGER, "log-probabilities of the prompt's tokens, each with its rank and this many "
                                "alternatives, by token id as in vLLM; not in a stream", 0, 20)
LOGPROB_IDS = Field(
    "logprob_token_ids", FieldType(f"a list of at most {LIMITS.logprob_ids} token ids",
                                   list_schema(A_TOKEN, maxItems=LIMITS.logprob_ids), tuple),
    "with `logprobs`: token ids to list beside each token too, however unlikely")
STARTS = FieldType(
    "a number from 0, or a list of these with one for each prompt",
    {"anyOf": [A_TOKEN, list_schema(A_TOKEN, minItems=1, maxItems=LIMITS.choices)]},
    lambda value: tuple(value) if isinstance(value, list) else (value,))
TOKEN_IDS = Field("return_token_ids", SWITCH, "`token_ids` beside each choice: those behind its text")
SHARED_FIELDS = (  # for Completions and Chat Completions
    *OPENAI_SAMPLING_FIELDS,
    Field("stream_options", object_of("include_usage"), "include_usage: end with a chunk that has the usage",
          idle={"": idle.without_stream}),
    CHOICES,
    PREFIX, TOKEN_IDS,
)

OPENAI_FIELDS = (
    CONVERSATION,
    *SHARED_FIELDS,
    *TOKEN_CAPS,
    Field("modalities", FieldType('["text"], the only modality of this server',
                                  list_schema({"enum": ["text"]})), "the kinds of output"),
    Field("logprobs", SWITCH, "log-probabilities of the answer"),
    Field("top_logprobs", INTEGER, "alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    PROMPT_LOGPROBS, LOGPROB_IDS,
    Field("tools", TOOLS, "functions the model may call"),
    Field("tool_choice", TOOL_CHOICE, "auto, none, required, or one of the tools"),
    PARALLEL,
    Field("functions", FUNCTIONS, "like `tools`, for older clients; a call comes as `function_call`",
          means="tools"),
    Field("function_call", FUNCTION_CALL, "like `tool_choice`, for older clients", means="tool_choice"),
    RESPONSE_FORMAT, *TEMPLATE_OPTIONS, *CONSTRAINT_FIELDS,
)

COMPLETION_FIELDS = (
    Field("prompt", PROMPTS, "text, token ids, or a list of these; absent: a new document"),
    *without(SHARED_FIELDS, TRUNCATE),  # a text has no turns
    Field("max_tokens", INTEGER, "most tokens of the answer; -1 = up to the context, 0 = echo only",
          -1, math.inf),
    Field("logprobs", INTEGER, "log-probabilities, with this many alternatives", 0, 20),
    PROMPT_LOGPROBS,
    Field("prompt_logprobs_start", STARTS, "the first token that prompt_logprobs is computed for; tokens "
          "before it may come from the prefix cache, and have null"),
    LOGPROB_IDS,
    Field("echo", SWITCH, "put the prompt before the answer, in the log-probabilities too"),
    Field("best_of", INTEGER, "must equal n", 1, LIMITS.choices),
    Field("suffix", TEXT, "the text after the answer, which then fills the gap between prompt and suffix"),
    RESPONSE_FORMAT, *CONSTRAINT_FIELDS,
)

OTHER_FILES = FieldType(
    'a list of objects, each with a string "text" and maybe a string "filename"',
    list_schema(object_schema(["text"], text=A_TEXT, filename=TEXT_OR_NULL)),
    lambda value: tuple((whole_unicode(chunk.get("filename") or "tmp"), whole_unicode(chunk["text"]))
                        for chunk in value))
RESPONSE_FIELDS = FieldType("a list of at most 100 strings", list_schema(A_TEXT, maxItems=100), tuple)
INFILL_FIELDS = (  # as llama-server has them
    Field("input_prefix", MIXED, "what is before the gap: text, or a list of texts and token ids",
          required=True),
    Field("input_suffix", MIXED, "what is after it", required=True),
    Field("input_extra", OTHER_FILES, "other files, the most important last"),
    Field("prompt", TEXT, "more text before the gap"),
    *without(SAMPLING_FIELDS, TRUNCATE),
    SAMPLED["repetition_penalty"]._replace(name="repeat_penalty", means="repetition_penalty"),
    Field("n_predict", INTEGER._replace(convert=lambda value: max(-1, as_count(value))),
          "most tokens of the answer; -1 and -2 = up to the context, 0 = none: only compute the prompt",
          -2, math.inf, means="max_tokens"),
    Field("n_probs", INTEGER, "log-probabilities, with this many alternatives; 0 = none", 0, 20,
          means="logprobs"),
    Field("n_indent", INTEGER, "the answer ends before a line, other than its first, that is indented by "
                               "fewer spaces and tabs; 0 = never", 0, math.inf),
    Field("t_max_predict_ms", INTEGER._replace(convert=lambda value: max(0, as_count(value))),
          "the answer ends with the first new line that comes so many milliseconds after its first token; "
          "0 and -1 = never", -1, math.inf),
    Field("return_tokens", SWITCH, "`tokens`: the ids behind the text", means="return_token_ids"),
    Field("response_fields", RESPONSE_FIELDS, "what the answer has, such as `content` or `timings/prompt_n`"),
    *(field for field in CONSTRAINT_FIELDS if field.group == LLAMA_SERVERS),
)


# readers

def read_chat(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    values = parse_answer(body, OPENAI_FIELDS, known)
    if body.get("functions") and known.tool_format is None:
        raise no_tools("functions")
    values["tools"], ignored = functions_among(values.get("tools", ()))
    request = parse_openai_request(values, known.settings, known.tool_format)
    if any(map(custom_calls, values["messages"])):
        ignored = tuple(dict.fromkeys((*ignored, "custom")))
    parsed = scored_body("functions" if body.get("functions") else "chat", values, known, request)
    return replace(parsed, ignored_tools=ignored)


def read_completion(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    values = parse_fields(body, COMPLETION_FIELDS)
    n = values.get("n", 1)
    logprobs = values.get("logprobs")
    suffix = values.get("suffix")
    prompts = values.get("prompt", ("",) if suffix else (NEW_DOCUMENT,))
    if values.get("best_of", n) != n:
        raise RequestError("best_of must equal n", code="unsupported_best_of", param="best_of")
    within_limit("answers (prompts times n)", len(prompts) * n, LIMITS.choices, "prompt")
    grammar, param = one_constraint(values)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=logprobs,
                          prompt_logprobs=logprobs if values.get("echo") else None)
    infill = None
    if suffix:
        if params.prompt_logprobs is not None:
            raise invalid("echo", "echo and logprobs exclude each other where there is a suffix, since the "
                                  "model reads the suffix before the answer")
        values = with_infill_ends(values, known, "suffix")
        infill = Infill((suffix,))
    request = openai_request(values, known.settings, params, prompts=prompts, infill=infill)
    return scored_body("completion", values, known, request)


def scored_body(kind: str, values: Mapping, known: Known, request: Request) -> ParsedBody:
    """A body of OpenAI's with vLLM's `logprob_token_ids` and `prompt_logprobs`, if it has them."""
    params = request.params
    token_ids = values.get("logprob_token_ids", ())
    if token_ids:
        if params.logprobs is None:
            raise invalid("logprob_token_ids", "logprob_token_ids needs logprobs")
        params = replace(params, logprob_ids=token_ids)
    top = values.get("prompt_logprobs")
    starts = values.get("prompt_logprobs_start", ())
    if starts:
        name = "prompt_logprobs_start"
        count = len(request.prompts)
        if top is None or params.prompt_logprobs is not None:
            raise invalid(name, f"{name} needs prompt_logprobs, and excludes logprobs of an echo")
        if len(starts) == 1:
            starts *= count
        if len(starts) != count:
            raise invalid(name, f"{name} has {len(starts)} numbers, but there are {count} prompts")
    details = {}
    if top is not None:
        for name in ("stream", "suffix"):
            if values.get(name):
                raise invalid("prompt_logprobs", f"prompt_logprobs and {name} exclude each other")
        params = replace(params, prompt_logprobs=max(top, params.prompt_logprobs or 0))
        details = {"prompt_logprobs": top}
    return parsed_body(kind, values, known, replace(request, params=params, score_from=starts), details)


def read_infill(body: dict, terms: Terms) -> ParsedBody:
    """llama-server's body. Its `prompt` continues the text before the gap."""
    known = terms.known
    values = with_infill_ends(parse_fields(body, INFILL_FIELDS), known)
    grammar, param = one_constraint(values)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=values.get("logprobs") or None,
                          line_indent=values.get("n_indent", 0),
                          line_limit_ms=values.get("t_max_predict_ms", 0))
    infill = Infill(tuple(values["input_suffix"]), tuple(values["input_prefix"]),
                    values.get("input_extra", ()), cut=True)
    prompts = (values.get("prompt", ""),)
    request = openai_request(values, known.settings, params, prompts=prompts, infill=infill)
    return parsed_body("infill", values, known, request,
                       {"response_fields": values.get("response_fields", ())})


# the encoders of chats and of texts

NOTHING = Piece()
NO_MEMBERS: Mapping = MappingProxyType({})


class SentChoice:
    """What was sent of a choice, and what waits for its next chunk or its whole body."""

    def __init__(self, state: ChoiceState, tokenizer: Tokenizer, skips_specials: bool = True):
        self.state = state
        self.index = state.index
        self.tokenizer = tokenizer
        self.skips_specials = skips_specials
        self.held: tuple[TokenLogprob, ...] = ()  # log-probabilities of tokens that have no text yet
        self.held_ids: tuple[int, ...] = ()       # ids of such tokens
        self.echo: list[Delta] | None = None      # the prompt before its text; None: not yet
        self.offset = 0                           # characters of its text so far, for text_offset
        self.calls: Iterator[dict] = iter(state.calculations)  # of the calculator; it grows
        self.numbers = itertools.count()          # of these calls
        self.around_text: list[bytes] = []        # a chunk with text alone, before and after that text
        # of an answer that is sent whole, in JSON
        self.logprobs: dict[str, list[bytes]] = {}
        self.prompt_logprobs: list[bytes] = []

    @property
    def done(self) -> Finished:
        return self.state.done

    @cached_property
    def decoder(self) -> StreamDecoder:
        """Decodes tokens for text_offset and for an echoed prompt. Only made if one of these is needed."""
        return answer_decoder(self.tokenizer, None, self.skips_specials)

    def begin_with(self, echo: list[Delta]):
        """Put a prompt before its text, and the calls of the calculator in that before those of the text."""
        self.echo = echo
        calls = list[dict]()
        characters = 0
        for delta in echo:
            if delta.kind == "calculator":
                calls.append({"start": characters, **json.loads(delta.text)})
            else:
                characters += len(delta.text)
        self.calls = itertools.chain(calls, (
            {**call, "start": call["start"] + characters} for call in self.state.calculations))

    def calculations(self, part: Piece, whole: bool) -> list[dict]:
        """The calls of the calculator in the whole text or in a part of it, where each has a number, since
        clients that merge the events of a stream want one."""
        if whole:
            return [*self.calls]
        return [{"index": next(self.numbers), **next(self.calls)} for delta in part.deltas
                if delta.kind == "calculator"]

    def encoded_logprobs(self, beside: Mapping) -> Iterator[bytes]:
        """The `logprobs` member of an object, with the fields of `beside`; nothing if there are none."""
        separator = b', "logprobs": ' + dump(beside)[:-1] + b", " * bool(beside)
        for name, parts in self.logprobs.items():
            yield separator + dump(name) + b": [" + b", ".join(filter(None, parts))
            separator = b"], "
        if self.logprobs:
            yield b"]}"

    def encoded_prompt(self) -> Iterator[bytes]:
        """The `prompt_logprobs` member of an object, if there are any."""
        if self.prompt_logprobs:
            yield b', "prompt_logprobs": [' + b", ".join(filter(None, self.prompt_logprobs)) + b"]"


class OpenAIEncoder(Encoder):
    """Turns events into chunks of a stream, or into one body. The encoders of both routes share this."""

    id_prefix = ""
    chunk_object = ""
    whole_object = ""
    logprobs_beside: Mapping = {}  # fields of `logprobs` besides those of logprobs_body
    scores_above = False           # True: `prompt_logprobs` is beside the choices; False: in each choice
    logprobs_body: Callable[[SentChoice, Seq[TokenLogprob]], dict]

    def __init__(self, *arguments):
        super().__init__(*arguments)
        skips = self.request.params.skip_special_tokens
        self.choices = [SentChoice(choice, self.tokenizer, skips) for choice in self.state.choices]
        self.head = {"id": self.id_prefix + self.request.id, "object": self.chunk_object,
                     "created": int(time.time()), "model": self.model,
                     "system_fingerprint": SYSTEM_FINGERPRINT, "seed": self.request.params.sampling.seed}
        self.begin = b"data: " + dump(self.head)[:-1] + b", "  # starts every frame
        # are chunks of text alike but for the text?
        self.repeats_chunks = not (self.parsed.token_ids or self.parsed.echo or (
            self.request.params.logprobs is not None))

    def body(self, choice: SentChoice, part: Piece, whole: bool = False) -> dict:
        """The fields of a choice besides index and finish_reason, for a chunk or for one whole body."""
        raise NotImplementedError

    def logprobs(self, choice: SentChoice, part: Piece) -> dict | None:
        if not part.logprobs:
            return None
        return {**self.logprobs_body(choice, part.logprobs), **self.logprobs_beside}

    @property
    def shows_prompt(self) -> bool:
        """Are the prompt's log-probabilities listed with those of the answer? Else they are only in
        `prompt_logprobs`."""
        return self.parsed.echo and self.request.params.logprobs is not None

    def take(self, choice: SentChoice, event: Piece | PromptScores | Finished) -> Piece:
        """What to send for an event, with the log-probabilities of its tokens. Those of a stop string are
        left out, unless the prompt was scored too."""
        held = choice.held
        choice.held = ()
        ids = choice.held_ids
        choice.held_ids = ()
        if isinstance(event, Finished):
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

    def first_scored(self, choice: SentChoice) -> int:
        """The index of the first token of the choice's prompt that is scored."""
        starts = self.request.score_from
        return starts[choice.index // self.request.n] if starts else 0

    def ids(self, tokens: Seq[int]) -> dict:
        return {"token_ids": tokens} if self.parsed.token_ids else {}

    def encode(self, event: Any) -> bytes:
        choice = self.choices[event.choice]
        grown = self.state.grown_part
        if grown and grown.kind == "text" and self.repeats_chunks:
            return self.plain_chunk(choice, event.deltas[0])
        part = self.take(choice, event)
        frames = b""
        if part != NOTHING:
            frames = self.chunk(choice, self.body(choice, part) | self.ids(part.tokens))
        if choice.done:
            frames += self.chunk(choice, self.body(choice, NOTHING), last=True) + self.end()
        return frames

    def plain_chunk(self, choice: SentChoice, delta: Delta) -> bytes:
        """The chunk of a piece of text alone. What is the same in all of them is made once."""
        if not choice.around_text:
            mark = secrets.token_hex(16)
            other = SentChoice(ChoiceState(choice.index), self.tokenizer)
            chunk = self.chunk(other, self.body(other, Piece(deltas=(Delta("text", mark),))))
            choice.around_text = chunk.split(dump(mark))
        return dump(delta.text).join(choice.around_text)

    def chunk(self, choice: SentChoice, body: dict, last: bool = False,
              beside: Mapping = NO_MEMBERS) -> bytes:
        ending = self.ending(choice) if last else {"finish_reason": None}
        chunk: dict = {"choices": [{"index": choice.index, **body, **ending}], **beside}
        if self.parsed.include_usage:
            chunk["usage"] = None
        if last:
            chunk["timings"] = timings_body(choice.done)
        return self.framed(chunk)

    def ending(self, choice: SentChoice) -> dict:
        reason = "tool_calls" if choice.state.calls and choice.done.reason == "stop" else choice.done.reason
        return {"finish_reason": reason, "stop_reason": choice.done.stop_reason}

    def framed(self, body: dict) -> bytes:
        return self.begin + dump({"choices": []} | body)[1:] + b"\n\n"

    def end(self) -> bytes:
        """What follows the last chunk of the last choice: the usage, if asked for, and [DONE]."""
        if not self.state.has_ended:
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
        """Keep an event's log-probabilities for `completion`."""
        choice = self.choices[event.choice]
        part = self.take(choice, event)
        size = 100
        for delta in part.deltas:
            size += len(delta.text)
        top = self.parsed.details.get("prompt_logprobs")
        if isinstance(event, PromptScores) and top is not None:
            unwanted = [] if choice.prompt_logprobs else [None] * self.first_scored(choice)
            encoded = dump(unwanted + self.prompt_entries(event.logprobs, top))[1:-1]
            choice.prompt_logprobs.append(encoded)
            size += len(encoded)
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
                "timings": timings_body(self.choices[0].done), **self.parsed.beside}
        separator = dump(body)[:-1] + b', "choices": ['
        for choice in self.choices:
            texts = [Delta(kind, choice.state.text(kind)) for kind in ("reasoning", "text")]
            whole = Piece(deltas=(*(choice.echo or ()), *texts))
            body = {"index": choice.index, **self.body(choice, whole, whole=True), **self.ending(choice),
                    **self.ids(choice.state.token_ids.tolist() if self.parsed.token_ids else ())}
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
        first, *others = self.choices
        return self.chunk(first, opening, beside=self.parsed.beside) + b"".join(
            self.chunk(choice, opening) for choice in others)

    def body(self, choice: SentChoice, part: Piece, whole: bool = False) -> dict:
        message: dict = {}
        text = part.text
        reasoning = part.joined("reasoning")
        if whole:
            calls = [self.call_body(call, call.text) for call in choice.state.calls]
            message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
            message |= calculator_member(choice.calculations(part, whole))
            message |= citations_in(text, self.parsed.citable)
        else:
            calls = self.call_deltas(choice, part)
            if text or part.logprobs and not reasoning:
                message = {"content": text}
        if reasoning:  # clients read one or the other
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if not whole:
            message |= calculator_member(choice.calculations(part, whole))
            if part is NOTHING and choice.done and self.parsed.citable:
                message |= citations_in(choice.state.text(), self.parsed.citable)
        if calls:
            message["tool_calls"] = calls
        return {"message" if whole else "delta": message, "logprobs": self.logprobs(choice, part)}

    @staticmethod
    def call_body(call: Part, arguments: str) -> dict:
        return {"id": "call_" + call.id, "type": "function",
                "function": {"name": call.name, "arguments": arguments}}

    def call_deltas(self, choice: SentChoice, part: Piece) -> list[dict]:
        """The calls in a chunk: the whole call when it begins, afterwards only more arguments. Each call has
        one entry, since clients that merge chunks do not merge the entries within a chunk."""
        entries: list[dict] = []
        if all(delta.kind != "call" for delta in part.deltas):
            return entries
        for delta, call in zip(part.deltas, self.state.touched_parts):
            if delta.kind != "call":
                continue
            if entries and entries[-1]["index"] == call.place:
                entries[-1]["function"]["arguments"] += delta.text
            else:
                more = {"function": {"arguments": delta.text}}
                begun = self.call_body(call, delta.text) if delta.name else more
                entries.append({"index": call.place, **begun})
        return entries

    def logprobs_body(self, choice: SentChoice, logprobs: Seq[TokenLogprob]) -> dict:
        return {"content": self.entries(logprobs)}


class FunctionEncoder(ChatEncoder):
    """`/v1/chat/completions` for clients that only know `functions`: a message has at most one call."""

    def body(self, choice: SentChoice, part: Piece, whole: bool = False) -> dict:
        body = super().body(choice, part, whole)
        message = body["message" if whole else "delta"]
        message |= {"function_call": call["function"]
                    for call in message.pop("tool_calls", ())[:1] if not call.get("index")}
        return body

    def ending(self, choice: SentChoice) -> dict:
        ending = super().ending(choice)
        if ending["finish_reason"] == "tool_calls":
            ending["finish_reason"] = "function_call"
        return ending


class CompletionEncoder(OpenAIEncoder):
    """`/v1/completions`; `echo` puts the prompt before each answer."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def prompt(self, choice: SentChoice) -> str | tuple[int, ...]:
        return self.request.prompts[choice.index // self.request.n]

    def take(self, choice: SentChoice, event: Piece | PromptScores | Finished) -> Piece:
        part = super().take(choice, event)
        if not self.parsed.echo or choice.echo is not None:
            return part
        prompt = self.prompt(choice)
        echo = [Delta("text", prompt)] if is_text(prompt) else self.decoded(prompt)
        echo = [delta for delta in echo if delta.text]
        choice.begin_with(echo)
        return part._replace(deltas=(*echo, *part.deltas)) if echo else part

    def decoded(self, tokens: Seq[int]) -> list[Delta]:
        """Token ids in the form in which an answer shows them."""
        if not self.request.params.skip_special_tokens:
            return [Delta("text", self.tokenizer.show(tokens))]
        if self.tokenizer.tool_tokens is None:
            return [Delta("text", self.tokenizer.decode(tokens))]
        decoder = answer_decoder(self.tokenizer)
        text = "".join(map(decoder.push, tokens)) + decoder.finish()
        return [*parts_of(decoder, text + decoder.utf8.decode(b"", True))]

    def body(self, choice: SentChoice, part: Piece, whole: bool = False) -> dict:
        return {"text": part.text, "logprobs": self.logprobs(choice, part),
                **calculator_member(choice.calculations(part, whole))}

    def logprobs_body(self, choice: SentChoice, logprobs: Seq[TokenLogprob]) -> dict:
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


def chat_encoder(parsed: ParsedBody, model: str, tokenizer: Tokenizer | None) -> Encoder:
    made = FunctionEncoder if parsed.kind == "functions" else ChatEncoder
    return made(parsed, model, tokenizer)


# the encoder of /infill

def chosen_fields(body: Mapping, paths: Seq[str]) -> dict[str, Any]:
    """The values at paths like `timings/prompt_n`, by path; without paths that lead nowhere."""
    chosen = {}
    for path in paths:
        value: Any = body
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            chosen[path] = value
    return chosen


class InfillEncoder(OpenAIEncoder):
    """`/infill`: objects with more of the text, then one with `"stop": true`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.probabilities: list[dict] = []  # of an answer that is sent whole

    def framed(self, body: dict) -> bytes:
        return frame(body)

    def part(self, part: Piece) -> dict:
        probabilities = {"completion_probabilities": self.entries(part.logprobs)} if part.logprobs else {}
        return {"index": 0, "content": part.text, "tokens": part.tokens if self.parsed.token_ids else [],
                "stop": False, "id_slot": -1, "tokens_predicted": len(self.state.choices[0].token_ids),
                "tokens_evaluated": self.state.prompt_tokens, **probabilities}

    def encode(self, event: Piece | Finished) -> bytes:
        choice = self.choices[0]
        part = self.take(choice, event)
        frames = frame(self.part(part)) if part.deltas or part.tokens or part.logprobs else b""
        if choice.done:
            frames += frame(self.final(choice))
        return frames

    def collect(self, event: Piece | Finished) -> int:
        part = self.take(self.choices[0], event)
        self.probabilities += self.entries(part.logprobs)
        return 100 + len(part.text) + 400 * len(part.logprobs)

    def completion(self) -> Iterator[bytes]:
        text = self.state.choices[0].text()
        yield dump(self.final(self.choices[0], text, self.parsed.token_ids))

    def final(self, choice: SentChoice, content: str = "", with_tokens: bool = False) -> dict:
        done = choice.done
        usage = self.usage()
        request = self.request
        by_text = done.reason != "length" and done.stop_reason in request.params.stop
        stop_type = "word" if by_text else "eos"
        if done.reason == "length":
            stop_type = "limit"
        sampling = asdict(request.params.sampling)
        sampling["repeat_penalty"] = sampling.pop("repetition_penalty")
        del sampling["choice"]
        tokens = choice.state.token_ids.tolist() if with_tokens else []
        body = {"index": 0, "content": content, "tokens": tokens, "id_slot": -1, "stop": True,
                "model": self.model, "tokens_predicted": usage.completion_tokens,
                "tokens_evaluated": usage.prompt_tokens,
                "generation_settings": sampling | {
                    "n_predict": -1 if request.max_tokens is None else request.max_tokens,
                    "stop": request.params.stop, "ignore_eos": request.params.ignore_eos},
                "has_new_line": "\n" in choice.state.text(), "truncated": bool(done.dropped_messages),
                "stop_type": stop_type,
                "stopping_word": done.stop_reason if by_text else "",
                # the tokens whose keys and values are there now: all but the last one
                "tokens_cached": usage.prompt_tokens + max(usage.completion_tokens - 1, 0),
                "timings": self.timings(done)}
        if self.probabilities:
            body["completion_probabilities"] = self.probabilities
        paths = self.parsed.details["response_fields"]
        return chosen_fields(body, paths) if paths else body

    def timings(self, done: Finished) -> dict:
        """llama-server's names for how long the prompt and the answer took."""
        usage = self.usage()
        computed = usage.prompt_tokens - usage.cached_tokens
        predicted = usage.completion_tokens
        prompt_ms = done.ttft_ms - done.queue_ms
        speed = done.tokens_per_second
        predicted_ms = (predicted - 1) / speed * 1e3 if speed else 0.0
        return {"cache_n": usage.cached_tokens, "prompt_n": computed, "prompt_ms": round(prompt_ms, 3),
                "prompt_per_token_ms": round(prompt_ms / max(computed, 1), 3),
                "prompt_per_second": round(computed / prompt_ms * 1e3, 3) if prompt_ms else 0.0,
                "predicted_n": predicted, "predicted_ms": round(predicted_ms, 3),
                "predicted_per_token_ms": round(predicted_ms / max(predicted, 1), 3),
                "predicted_per_second": round(speed or 0.0, 3),
                "draft_n": usage.drafted_tokens, "draft_n_accepted": usage.accepted_tokens}


CHAT = Form(OPENAI_FIELDS, read_chat, chat_encoder, idle=idle_variables)
COMPLETION = Form(COMPLETION_FIELDS, read_completion, CompletionEncoder)
DIALECT = Dialect({
    "/v1/chat/completions": CHAT, "/v1/completions": COMPLETION,
    # whoever finds LM Studio's list of models asks where LM Studio answers
    "/api/v0/chat/completions": CHAT, "/api/v0/completions": COMPLETION,
    "/infill": Form(INFILL_FIELDS, read_infill, InfillEncoder)})
