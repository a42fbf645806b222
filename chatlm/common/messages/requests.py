"""What a client asked, and the events that answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from chatlm.common.config import CHAT_TEMPERATURE, FLAGS, Settings


class Picture(NamedTuple):
    """A decoded picture: turned as its EXIF says, what is transparent on white."""

    width: int
    height: int
    pixels: bytes  # red, green, blue of each, row by row
    digest: bytes  # 16 bytes over size and pixels, see chatlm/common/vision/pictures.py: `picture`


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str  # system, user, assistant or tool (developer is mapped to system by HTTP parsing)
    content: str
    # tool_calls, tool_call_id, name, reasoning_content; OWN of common/text/calculations.py
    more: Mapping | None = None
    pictures: tuple[Picture, ...] = ()
    parts: tuple[str | int, ...] = ()  # where they stand: texts, together the content, and indexes of
                                       # pictures, each once, in order; (): there are none
    tools: tuple[dict, ...] = ()  # functions that the model learns of here; shown after the content


@dataclass(frozen=True)
class HistoryForm:
    """How earlier calls and their results are given to a chat template (see common/text/history_forms.py).

    Results are messages of role tool, members of the message with their calls, or text in messages of the
    user. Calls are members of their message, or text in it."""

    results: Literal["messages", "members", "text"] = "messages"
    calls: Literal["members", "text"] = "members"
    single: bool = False              # one call in each message, followed by its result
    arguments_as_text: bool = False   # are arguments JSON in a string?
    text_apart: bool = False          # is text before a call a message of its own?
    wraps_text: bool = False          # is what is no object given as {"arguments": text}?
    nine_character_ids: bool = False  # are ids of calls cut to nine letters and digits?
    gives_ids: bool = False           # do calls and results get ids that have none?
    moves_orphans: bool = False       # are results that follow no call of theirs text of the user?
    answers_results: bool = False     # does an empty answer precede a user's message after a result?
    moves_systems: bool = False       # are system messages after the first message text of the user?


Forms = tuple[HistoryForm, ...]  # for requests without functions, and for those with; (): not found yet


class Vision(NamedTuple):
    """How a model sees pictures: what the front must know to lay them out and to count their tokens."""

    kind: str      # of LAYOUTS in chatlm/common/vision/layout.py
    first_id: int  # of the ids that stand for rows of pictures: those from here on are in no vocabulary
    marker: str    # what the chat template writes for a picture
    tile: int      # pixels on a side of what the tower reads at once, if all are of one size
    tokens: int    # of a tile; the most, if these are of several sizes
    longest: int = 0     # a picture's longer side becomes so long before it is cut into tiles
    splits: bool = True  # is it cut into tiles?
    most: int = 16       # pictures of a prompt
    unit: int = 0        # pixels on a side of what becomes a row
    fewest: int = 0      # tokens of a picture that is not cut
    tiles: tuple[int, int] = (1, 1)  # the fewest and the most that it is cut into
    whole_from: float = 1.0          # it is cut if it has so many times the pixels of `tokens`
    shows_whole: bool = True         # is the whole one more tile after the others?
    two_sided: bool = False          # do a picture's rows see each other? They then stand together


class InfillTokens(NamedTuple):
    """The tokens with which a model fills in the middle of a text; None: it has none."""

    prefix: int | None = None      # before the text before the gap
    suffix: int | None = None      # before the text after it
    middle: int | None = None      # before the text that fills it
    pad: int | None = None
    repository: int | None = None  # before the name of a repository
    file: int | None = None        # before the name of a file
    ends: tuple[int, ...] = ()     # those after which the gap is full

    @property
    def missing(self) -> list[str]:
        return [name for name in ("prefix", "suffix", "middle") if getattr(self, name) is None]


class Embedder(NamedTuple):
    """How a model that was trained to embed texts, or to rank them, does it. Such a model gives no answer."""

    pooling: str                   # mean, cls or last; rank: it scores pairs of texts, and its vector is the
                                   # raw score
    size: int                      # numbers in a vector
    longest: int                   # tokens of a text or a pair, special ones included
    least: int = 0                 # numbers that the beginning of a vector must have to be one too
                                   # (Matryoshka); 0: it never is
    begins: tuple[int, ...] = ()   # special tokens before a text
    ends: tuple[int, ...] = ()     # and after it
    between: tuple[int, ...] = ()  # between the texts of a pair
    prompts: tuple[tuple[str, str], ...] = ()  # names, and texts that go before an input
    default_prompt: str = ""       # the name of the one that is used unless another is asked for
    similarity: str = "cosine"     # cosine, dot, euclidean or manhattan
    sigmoid: bool = True           # of scores: after a sigmoid they are probabilities
    form: str = ""                 # a pair as one text, with {instruction}, {query} and {document}
    instruction: str = ""          # the usual one
    dimensions: int = 0            # numbers of a vector unless a request asks for others; 0: all
    pools_prompt: bool = True      # are the tokens of a prompt pooled too? It is read in either case


@dataclass(frozen=True)
class TextSpec:
    """All that is needed to render and tokenize, as plain data read once from the model. `payload` is
    tokenizer.json (kind "hf"), or tiktoken's pattern, ranks (bytes as Latin-1) and specials in JSON
    ("nanochat"), or a JSON list of characters by their ids ("characters")."""

    kind: str
    payload: bytes
    chat_template: str | None = None
    stop_tokens: frozenset[int] = frozenset()  # ids that end an answer
    bos_token: int | None = None
    eos_token: int | None = None
    add_bos: bool = False                      # a raw completion prompt begins with bos
    chat_bos: bool = True                      # with add_bos, a chat too if its template writes none
    infill: InfillTokens = InfillTokens()      # what the file says of them; names say more: `infill_tokens`
    suppressed: frozenset[int] = frozenset()   # ids that are never drawn
    embedder: Embedder | None = None           # None: it gives answers
    vision: Vision | None = None               # None: it cannot see pictures
    base: bool = False                         # it has a chat format that it was not trained for
    system: str | None = None                  # of conversations that send none; None: what its template adds


OWN = {"own": True}  # marks a sampling parameter that a model's files may set


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens; a parameter has one name everywhere. Off: top_k 0, top_p 1, min_p 0. Temperature 0
    is greedy."""

    temperature: float = field(default=0.8, metadata=OWN)
    top_k: int = field(default=50, metadata=OWN)
    top_p: float = field(default=1.0, metadata=OWN)
    min_p: float = field(default=0.0, metadata=OWN)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = field(default=1.0, metadata=OWN)
    logit_bias: tuple[tuple[int, float], ...] = ()
    typical_p: float = 1.0
    top_n_sigma: float = -1.0  # off at 0 and below
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64  # -1: all tokens
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    seed: int = 0    # 64 bits
    choice: int = 0  # index among the `n` answers: each has its own noise

    @property
    def counts_tokens(self) -> bool:
        """Do the text's tokens so far change what is drawn?"""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)


SAMPLING_NAMES = tuple(row.name for row in fields(SamplingParams) if row.name != "choice")
SAMPLING_FLAGS = tuple(flag.field for flag in FLAGS if flag.field in SAMPLING_NAMES)
# Used where neither the request, a flag nor the model sets a value
SAMPLING_DEFAULTS: dict[str, Any] = {
    row.name: row.default for row in fields(SamplingParams) if row.metadata}


def sampling_defaults(settings: Settings) -> dict[str, tuple[float, str]]:
    """The default of each parameter that a model or a flag may set, and where it comes from."""
    usual = dict(SAMPLING_DEFAULTS)
    if settings.command == "chat":
        usual["temperature"] = CHAT_TEMPERATURE
    values = {name: (value, "usual") for name, value in usual.items()}
    values |= {name: (value, settings.own_origin) for name, value in settings.own_sampling.items()}
    for name in usual:
        flag_value = getattr(settings, name, None)
        if flag_value is not None:
            values[name] = flag_value, f"--{name.replace('_', '-')}"
    return values


@dataclass(frozen=True)
class ModelSource:
    """The files of a model, and a description of what was chosen and what else was available."""

    kind: str               # "nanochat" | "nanogpt" | "gguf" | "hf" | "litgpt"
    path: Path              # model_<step>.pt, .gguf, or a Hugging Face folder
    name: str
    chosen: str             # one line for the start-up log
    alternatives: str = ""  # one line, "" when there were none
    stamp: tuple[tuple[str, int, int], ...] = ()  # of its files, which must not change: see model_stamp


class ModelFacts(NamedTuple):
    """Facts about a loaded model."""

    family: str = ""       # as its files call it
    format: str = ""       # gguf, safetensors or nanochat
    parameters: int = 0
    weights: str = ""      # the commonest type of its matrices in memory
    weights_bytes: int = 0
    width: int = 0
    layers: int = 0
    digest: str = ""       # of its weights
    arithmetic: str = ""   # of --arithmetic
    quantization: str = ""  # what its file calls its types, if these are the ones in memory

    @property
    def level(self) -> str:
        """What Ollama's and LM Studio's clients show of its types."""
        return self.quantization or self.weights.upper()


@dataclass(frozen=True, kw_only=True)
class AnswerParams:
    """The parameters of each answer to a request. In a worker the answers share one of these."""

    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop_on_repetition: bool = False    # end it where it only repeats itself
    min_tokens: int = 0
    line_indent: int = 0                # its lines but the first have so many spaces or tabs; it ends before
                                        # one that has fewer
    line_limit_ms: int = 0              # it ends at the first new line after this time; 0: no limit
    logprobs: int | None = None         # likeliest tokens to list beside each; None: no logprobs
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; then a token that ends the answer
                                        # has its own too, since evaluations drop the last one
    logprob_ids: tuple[int, ...] = ()   # tokens to list beside each too, likely or not
    grammar: str = ""                   # the answer, after its reasoning, must match it
    grammar_param: str = ""             # the field that the grammar comes from
    tool_names: tuple[str, ...] = ()    # functions whose calls are read from it
    tool_types: tuple[dict, ...] = ()   # of each: parameter -> JSON types, if its format leaves them out;
                                        # any type where it is "" or the parameter is not in it
    tool_schemas: tuple[str, ...] = ()  # of each: its parameters' JSON schema, if a call may be plain JSON;
                                        # any object fits ""
    call_grammars: tuple[str, ...] = ()  # of each: what its arguments must match; "" if it is not strict
    parallel_calls: bool = True         # False: the answer ends where a second call would begin
    chat: bool = False                  # reasoning and calls are separate from its content
    skip_special_tokens: bool = True    # False: its text has the names of special tokens
    thinking_budget: int | None = None  # tokens of reasoning after which it is ended; None: no limit
    last_thought: str = ""              # what is then written before the mark that ends it
    progress: bool = False              # send progress events until the first token
    pooling: str = ""                   # mean, cls, last or rank: no answer, but an embedding of the prompt
    dimensions: int = 0                 # numbers of it to keep; 0: all
    normalized: bool = True             # scale it to length 1; a score is never scaled
    unpooled: int = 0                   # tokens at its beginning that are read, but not pooled
    urgent: bool = False                # somebody waits for the embedding as for an answer: it never pauses
    client: str = ""                    # who takes turns: a key's name or an address
    owner: str = ""                     # who shares KV pages
    temporary: bool = False             # nothing of it stays here: no KV pages, no drafts, no log
    adapter: str = ""                   # the id of the adapter that computes it; "": the model alone
    parts: Mapping[str, Any] = field(default_factory=dict)  # what parts of the worker's engine are asked, by
                                        # their names: of JSON


@dataclass(frozen=True)
class Infill:
    """What surrounds a gap that the answer fills in, as texts and token ids. A prompt of the request is what
    comes last before it."""

    suffix: tuple[str | int, ...]       # what comes after it
    prefix: tuple[str | int, ...] = ()  # what comes before the prompt
    files: tuple[tuple[str, str], ...] | None = None  # names and texts of other files, the most important
                                                      # last; None: without a repository around it
    cut: bool = False              # shorten what does not fit, instead of refusing it


@dataclass(frozen=True)
class Retrieval:
    """How a request puts its prompts, which are texts, to a model that embeds or ranks them."""

    prompt: str = ""               # goes before each text
    queries: tuple[str, ...] = ()  # if set, the prompts are documents: one query for all, or one for each
    instruction: str | None = None  # what makes a document right for its query; None: the model's usual one
    most: int | None = None        # tokens of a text or document that are read; None: as many as fit
    cut: bool = False              # shorten what does not fit, instead of refusing it


NEW_DOCUMENT: tuple[int, ...] = ()  # a prompt of which nothing is given: see Tokenizer.document_start


@dataclass(frozen=True)
class Request:
    """A client's request, parsed and checked: either `messages` or `prompts` is set."""

    id: str = ""
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()  # raw completions: text, token ids or NEW_DOCUMENT
    prompt_ids: tuple[tuple[int, ...], ...] | None = None  # of each prompt; set at admission
    params: AnswerParams = AnswerParams()
    max_tokens: int | None = None  # None: up to the context
    n: int = 1                     # answers to each prompt
    score_from: tuple[int, ...] = ()  # of each prompt that is scored, the first token whose
                                      # log-probability is wanted; (): all are
    prefix_token_ids: tuple[int, ...] = ()  # with which each answer begins
    tools: tuple[dict, ...] = ()   # functions in the head of the prompt. Those that may be called are
                                   # `params.tool_names`: messages may have more, or take some away
    template_options: Mapping = field(default_factory=dict)  # the TEMPLATE_OPTIONS that are set
    low_priority: bool = False     # waits until nothing else does
    truncate: bool = False         # drop the oldest turns if it does not fit
    dropped_messages: int = 0      # how many were dropped so far; of an infill: 1 if it was cut
    resumable: bool = False        # a reader may leave its stream and come back
    round: int = 0                 # of an answer in rounds, from 1. That holds a place, so neither a full
                                   # queue nor a drain refuses its rounds. 0: it is not in rounds
    unset: tuple[str, ...] = ()    # of the sampling, what a server at --url decides
    revision: int | None = None     # of the model's files, for which it was read
    infill: Infill | None = None   # of raw completions that fill a gap
    retrieval: Retrieval | None = None  # of texts that are embedded or ranked
    pictures: tuple[Picture, ...] = ()  # of its messages, as far as the prompt has them; set at admission

    def lasting(self) -> Request:
        """Without what is not needed once the prompts are token ids: tools may take 25 times their JSON."""
        return replace(self, messages=self.messages and (), prompts=("",) * len(self.prompts), tools=(),
                       template_options={}, infill=None, retrieval=None)

    @property
    def client(self) -> str:
        return self.params.client

    @property
    def source(self) -> str:
        """The field of the body that its prompts come from."""
        what = {"": "prompt", "rank": "documents"}.get(self.params.pooling, "input")
        return what if self.messages is None else "messages"


@dataclass(frozen=True)
class DraftCounts:
    """Numbers of tokens, by the source of the drafts that they were in."""

    lookup: int = 0  # text that was seen before
    forced: int = 0  # what a grammar leaves no choice about
    mtp: int = 0     # the model's own draft head
    model: int = 0   # a second model

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(self.lookup + other.lookup, self.forced + other.forced, self.mtp + other.mtp,
                           self.model + other.model)

    @property
    def total(self) -> int:
        return self.lookup + self.forced + self.mtp + self.model


DRAFT_SOURCES = tuple(field.name for field in fields(DraftCounts))


@dataclass(frozen=True)
class Usage:
    """How many tokens an answer took. A worker counts the tokens of its own work; the front counts prompt and
    answer, which it knows as a whole."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0     # of the prompt: found in the prefix cache
    reasoning_tokens: int = 0  # of the completion
    drafted: DraftCounts = DraftCounts()
    accepted: DraftCounts = DraftCounts()  # drafted tokens that were right: steps saved
    # of the steps of its workers, as far as they said: of each its share of the tokens; never the same twice
    compute_s: float = field(default=0.0, compare=False)

    def __add__(self, other: Usage) -> Usage:
        return Usage(*[getattr(self, each.name) + getattr(other, each.name) for each in fields(self)])

    @property
    def drafted_tokens(self) -> int:
        return self.drafted.total

    @property
    def accepted_tokens(self) -> int:
        return self.accepted.total


@dataclass(frozen=True)
class Accepted:
    """The first event: rendered, tokenized, fits, queued. The HTTP headers can go out."""

    prompt_tokens: int
    each: tuple[int, ...] = ()  # of each prompt, if there are several


class TokenLogprob(NamedTuple):
    """A token's log-probability, after bias and penalties, before temperature, and the likeliest tokens."""

    token: int
    logprob: float | None  # None: the first token, which nothing precedes
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # of a prompt's token: 1 + how many are likelier
    drafted: bool = False    # was it guessed before it was drawn? It took no step of its own


class Delta(NamedTuple):
    """New text of an answer. A call begins with a delta that names its function; its arguments follow as JSON
    text. A call of a calculator comes whole, as JSON text (see common/text/calculations.py)."""

    kind: str  # reasoning, text, call or calculator
    text: str
    name: str = ""


# Events of one answer, as its worker sends them and, with `choice` set by the front, as its reader gets
# them. The choice is the answer's number in its request: prompt * n + index. `type` tells them apart.


class PromptProgress(NamedTuple):
    """Progress before the first token: place in the queue (0: on a worker), prompt tokens computed, how far
    the model is loaded (None: it is)."""

    queue_position: int
    prompt_tokens: int
    prompt_tokens_done: int = 0
    choice: int = 0
    loading: float | None = None
    type: str = "progress"


class PromptScores(NamedTuple):
    """Log-probabilities of the prompt's next tokens."""

    logprobs: tuple[TokenLogprob, ...]
    choice: int = 0
    type: str = "scores"


class Piece(NamedTuple):
    """The part of an answer that one step added: whole characters in order, and the token ids behind them."""

    tokens: tuple[int, ...] = ()
    deltas: tuple[Delta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of the drawn tokens; of one that ended it see prompt_logprobs
    choice: int = 0
    gpu: int = 0                             # the worker that made it; set by the front
    spent_s: float = 0.0                     # as Usage.compute_s, of its answer so far
    type: str = "piece"

    def joined(self, kind: str) -> str:
        return "".join([delta.text for delta in self.deltas if delta.kind == kind])

    @property
    def text(self) -> str:
        return self.joined("text")


class Embedding(NamedTuple):
    """The embedding of a prompt."""

    vector: str  # float32, little-endian, in base64
    choice: int = 0
    type: str = "embedding"


class PartSays(NamedTuple):
    """What a part of the worker's engine adds to an answer. Only what watches the answer gets it."""

    part: str   # its name, see chatlm/worker/parts.py
    value: Any  # of JSON
    choice: int = 0
    type: str = "part"


class ThinkingEnds(NamedTuple):
    """Worker to front: the reasoning was asked to end, and does so after the answer's `position`-th token;
    None: it is not thinking now."""

    position: int | None
    type: str = "thinking_ends"


class Ended(NamedTuple):
    """Worker to front: the answer is complete."""

    reason: str              # OpenAI's finish_reason
    stop_reason: str | None  # its cause
    usage: Usage
    queued_s: float          # seconds it waited in the worker
    type: str = "ended"


class Failed(NamedTuple):
    """Worker to front: there is no answer, or no more of it."""

    message: str
    refused: bool = False  # nothing can match the client's grammar
    unavailable: bool = False  # nothing is wrong with the request: this worker cannot do it as it is now
    type: str = "failed"


WorkerEvent = PromptProgress | PromptScores | Piece | Embedding | PartSays | ThinkingEnds | Ended | Failed


@dataclass(frozen=True)
class Finished:
    """The last event. `reason` is OpenAI's finish_reason; `stop_reason` names the cause."""

    reason: str
    stop_reason: str | None
    usage: Usage
    queue_ms: float
    ttft_ms: float
    tokens_per_second: float | None  # None: too short to measure
    gpu: int
    choice: int = 0
    dropped_messages: int = 0        # by `truncate`


AnswerEvent = PromptProgress | PromptScores | Piece | Embedding | PartSays | Finished  # has a `choice`


# Events of an answer whose tools the server calls itself, in rounds. Each round has pieces, then these.
# Calls of such tools are numbered from 0 as they begin, over all rounds.


class ToolsListed(NamedTuple):
    """The tools of a server that the model may call, as the server describes them."""

    label: str
    tools: tuple[dict, ...]  # name, description, input_schema and annotations of each
    error: str = ""          # why there are none


class CallApproved(NamedTuple):
    """A call begins that the model has not made in this answer: one of an earlier answer, because the client
    has approved of it, or one that the server makes."""

    name: str
    arguments: str
    approval_id: str  # "": the server makes it


class RoundEnded(NamedTuple):
    """The model has ended a round of the answer. Its calls run now."""


NOTHING_SHOWN: Mapping[str, Any] = MappingProxyType({})


class CallEnded(NamedTuple):
    """A call has its result, which the model is told."""

    number: int
    text: str
    is_error: bool = False
    shown: Mapping[str, Any] = NOTHING_SHOWN  # members of its item, see CallItem
    cited: tuple[Mapping, ...] = ()           # what the next numbers in the answer cite, as of `citable`


ToolEvent = ToolsListed | CallApproved | RoundEnded | CallEnded
Event = Accepted | AnswerEvent | ToolEvent
