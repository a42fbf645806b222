"""The messages between the front and its workers, sandboxes and Ray process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from chatlm.common.config import Settings
from chatlm.common.messages.requests import (
    DRAFT_SOURCES, AnswerParams, Embedder, Forms, InfillTokens, ModelFacts, ModelSource, Request,
    TextSpec, WorkerEvent)
from chatlm.common.messages.tool_rounds import ToolPlan
from chatlm.common.messages.wire import Pipe, wire_message


class DraftTerms(NamedTuple):
    """What a worker does if it cannot have what drafts for its model."""

    needed: bool = True  # its start fails then; else it goes without, because answers stay the same
    stamp: tuple[tuple[str, int, int], ...] | None = None  # of the only revision of --draft-model that has
                         # room; (): none has, None: any may have
    failed: str = ""     # why it goes without from the start: with them its last process could not begin


@wire_message(1 << 20)
class WorkerConfig:
    """Front to worker, first: load this model."""

    settings: Settings  # without API keys
    source: ModelSource | None  # None: find it on this machine
    device: str         # for torch
    threads: int        # at most
    prefix_memory: tuple[str, ...] = ()  # paths of segments that it shares with others
    prefix_bytes: int = 0  # that these may take
    place: tuple[int, int] = (0, 1)  # which of how many workers on this machine
    answering: str = ""  # path of the server's word, see chatlm/common/answering.py; "": it has none
    drafts: DraftTerms = DraftTerms()


@wire_message(8 << 20)
class NewRequest:
    """Front to worker: what all answers of a request share; sent once, before the first of them."""

    id: str
    params: AnswerParams


@wire_message(16 << 20)
class NewPicture:
    """Front to worker: a picture of the next NewPrompt; the first one comes first. `of_picture` makes one."""

    RAW = True
    data: bytes


@wire_message(64 << 20)
class NewPrompt:
    """Front to worker: one of a request's prompts; sent once, before the first answer to it."""

    id: str  # of the request
    index: int
    ids: tuple[int, ...]
    pictures: int = 0  # how many it has: they were sent just before


@wire_message(64 << 20)
class NewAnswer:
    """Front to worker: compute this answer of a request, continuing from the tokens it already has."""

    id: str          # of the answer
    request_id: str
    prompt: int
    choice: int      # index among the answers to its prompt; the noise depends on it
    max_tokens: int
    resumed_ids: tuple[int, ...] = ()
    scored: int = 0  # prompt tokens whose log-probabilities were already sent
    thinking_ends: int | None = None  # its reasoning ends after this many tokens, see ThinkingEnds
    resumed_sent: bool = True  # was the text of `resumed_ids` sent? Not if its client chose them
    background: bool = False   # does it take only what interactive answers leave?


@wire_message(1 << 20)
class SurveyConfig:
    """Front to survey: describe this model and its needs from the headers of its files."""

    settings: Settings  # of the model, without API keys
    source: ModelSource
    device: str
    budget: int | None  # bytes for all models; None: what the device has free
    replicas: int = 1       # that share the device's memory
    process_bytes: int = 0  # what the processes of a replica take there beside the model
    drafts: DraftTerms = DraftTerms()


@wire_message(256 << 20)
class Surveyed:
    """Survey to front: the model as its files describe it, and the bytes of a replica: on a GPU those of one
    rank, in a machine's memory those of all its ranks."""

    card: ModelCard
    weights: int
    activations: int
    cache: int            # KV pages, and what else sequences keep
    kv_cache_memory: int  # what each worker will allocate
    budget: int  # bytes for all models


@wire_message(1 << 10)
class Cancel:
    """Front to worker: stop computing this answer."""

    id: str


@wire_message(1 << 10)
class EndThinking:
    """Front to worker: end the reasoning of this answer now. `ThinkingEnds` comes back."""

    id: str


@wire_message(1 << 10)
class EndOfRequest:
    """Front to worker: no more answers of this request will follow."""

    id: str


@wire_message(16)
class Ping:
    """Front to worker: run a step, even an empty one, and report it."""


@wire_message(16)
class EmptyCache:
    """Front to worker: other models need the memory of the KV pages. `CacheEmptied` comes back."""


@wire_message(1 << 10)
class CacheEmptied:
    """Worker to front: whether it released the memory of its KV pages. It uses memory again as it serves."""

    able: bool


@wire_message(1 << 16)
class LoadAdapter:
    """Front to worker: serve an adapter along with the model. `AdapterLoaded` comes back."""

    id: str      # new for each revision of its files
    folder: str  # peft's
    stamp: tuple[tuple[str, int, int], ...] = ()  # of these files; () where the front does not see them
    digest: str = ""  # as reported by another worker


@wire_message(1 << 10)
class DropAdapter:
    """Front to worker: no answer needs this adapter any more."""

    id: str


@wire_message(1 << 16)
class AdapterLoaded:
    """Worker to front: an adapter is loaded, or why not."""

    id: str
    problem: str = ""
    nbytes: int = 0
    digest: str = ""  # of its files


@wire_message(1 << 16)
class Loading:
    """Worker to front: loading progress."""

    stage: str
    fraction: float


@wire_message(256 << 20)
class ModelText:
    """Worker to front, before it reads the weights: what turns this model's texts into tokens and back. The
    front opens its tokenizer meanwhile."""

    text: TextSpec


@wire_message(256 << 20)
class ModelCard:
    """Worker to front: the description of a loaded model."""

    text: TextSpec             # of a worker: without the payload, which ModelText had
    name: str
    context_length: int
    lines: tuple[str, ...]     # for the start-up log
    kernels: dict[str, str]    # which implementation computes each op
    row_invariant: bool
    core: str = ""             # which decode_core runs, or why none does
    sampling: dict = field(default_factory=dict)  # the model's own defaults
    sampling_origin: str = ""  # where they come from
    place: str = ""            # this worker's device, and what it holds there
    source: ModelSource | None = None
    facts: ModelFacts = ModelFacts()
    scored_length: int = 0     # most tokens of a prompt that is only scored; 0: context_length
    without: tuple[str, ...] = ()  # flags of what it drafts without, each with the reason

    @property
    def longest(self) -> int:
        """Most tokens of any prompt: nanochat's models score ten contexts."""
        return self.scored_length or self.context_length


@wire_message(1 << 16)
class Ready:
    """Worker to front: steps can begin."""

    gauges: dict[str, float | None]
    faults: dict[str, str] = field(default_factory=dict)  # compiled ops that do not run here -> why


@wire_message(256 << 20)
class Stepped:
    """Worker to front: what a step added to each answer."""

    events: list[tuple[str, WorkerEvent]]  # with the id of each one's answer
    gauges: dict[str, float | None]  # empty if they were sent a moment ago


@wire_message(1 << 20)
class Unusable:
    """Worker to front: the model or the flags are wrong; the operator must act."""

    message: str


@wire_message(1 << 20)
class Crashed:
    """Worker to front: it ends with an unexpected exception."""

    error: str
    traceback: str


class Offer(NamedTuple):
    """A model of the Hugging Face hub, or in its cache."""

    name: str            # a MODEL
    bytes: int = 0       # of its files; 0: not known yet
    here: int = 0        # of these, in the cache
    complete: bool = False  # is all of it here?
    problem: str = ""    # why this program cannot run it
    gated: bool = False  # its makers ask for an agreement
    downloads: int = 0   # in the last month
    kind: str = ""       # "gguf", "safetensors" or "": neither


@wire_message(1 << 16)
class HubQuestion:
    """Front to its process for the hub: one of chatlm/common/hub/offers.py: QUESTIONS."""

    kind: str
    text: str


@wire_message(1 << 20)
class HubOffers:
    """To the front: the answer to a question."""

    offers: tuple[Offer, ...]


@wire_message(1 << 16)
class HubFetch:
    """Front to its process for the hub: download this model."""

    name: str
    disk: int | None  # --models-disk
    reserved: int     # bytes that other downloads still need


@wire_message(1 << 14)
class HubProgress:
    """To the front: a download's progress, in bytes. The first with a `whole` comes once there is room."""

    stage: str
    done: int
    whole: int


@wire_message(1 << 14)
class HubFetched:
    """To the front: the model is in the cache."""

    path: Path


@wire_message(1 << 12)
class RayConfig:
    """Front to its Ray process, first: which cluster."""

    address: str
    tls: str


class Node(NamedTuple):
    """A machine of a Ray cluster that is alive."""

    id: str
    name: str
    cpus: float
    gpus: int


@wire_message(16 << 20)
class Nodes:
    """Ray process to front, every second: the cluster's nodes."""

    nodes: list[Node]


@wire_message(1 << 12)
class StartActor:
    """Front to Ray process: start a worker on this node, with these resources."""

    actor: str  # its name, new for each process of a worker
    node: str
    cpus: float
    gpus: int


@wire_message(1 << 12)
class ActorAddress:
    """Ray process to front: where the worker waits for the front, and the secret that both prove to know."""

    actor: str
    host: str
    port: int
    secret: str


@wire_message(1 << 10)
class EndActor:
    """Front to Ray process: end this worker, wherever it is."""

    actor: str


@wire_message(1 << 20)
class ActorEnded:
    """Ray process to front: this worker has ended, or could not be started."""

    actor: str
    reason: str


@wire_message(256 << 20)
class SandboxConfig:
    """Front to sandbox, first, and again before the first task for another model: the settings of its tasks.
    It keeps the last SANDBOX_MODELS of these."""

    server: Known
    text: TextSpec
    context_length: int
    cpu_s: float   # limit per task
    memory: int    # bytes the process may take beyond what it starts with
    nice: int = 0  # its niceness: how far it yields when the processors are busy
    number: int = 0  # of the model
    scored_length: int = 0  # as in ModelCard
    forms: Forms = ()       # how the chat template shows earlier calls, for what reads bodies


@wire_message(64 << 20)
class SandboxTask:
    """Front to sandbox: call the method `name` of Tasks."""

    name: str
    arguments: list
    model: int = 0   # the number of its SandboxConfig
    bodies: int = 0  # how many `Body` follow; they are its last arguments
    ticket: int = 0  # of a body that several tasks are about: it is kept open for them; 0: it is not kept


@wire_message(16)
class Begun:
    """Sandbox to front: it has read the task. If it ends from now on, the task is the cause."""


@wire_message(65 << 20)
class Body:
    """A raw HTTP body. Front to sandbox: the client's, after the task that reads it; back: the reply."""

    RAW = True
    data: bytes | bytearray


@wire_message(64 << 20)
class SandboxResult:
    """Sandbox to front: what a task returned."""

    value: Any


@wire_message(1 << 20)
class Refused:
    """Sandbox to front: a RequestError, or a ConfigError if `code` is that error's type."""

    message: str
    status: int
    code: str | None
    param: str | None
    words: dict[str, str] = field(default_factory=dict)  # see ChatServerError


SANDBOX_MODELS = 4
SANDBOX_OUT_OF_MEMORY = 77  # its exit status
SANDBOX_OUTDATED = 78       # the same, after the program's files have changed
WORKER_PIPE = Pipe(WorkerConfig, NewRequest, NewPicture, NewPrompt, NewAnswer, Cancel, EndThinking,
                   EndOfRequest, Ping, EmptyCache, CacheEmptied, LoadAdapter, DropAdapter, AdapterLoaded,
                   Loading, ModelText, ModelCard, Ready, Stepped, Unusable, Crashed)
SURVEY_PIPE = Pipe(SurveyConfig, Surveyed, Loading, Unusable, Crashed)
HUB_PIPE = Pipe(HubQuestion, HubOffers, HubFetch, HubProgress, HubFetched, Unusable, Crashed)
SANDBOX_PIPE = Pipe(SandboxConfig, SandboxTask, Body, Begun, SandboxResult, Refused)
RAY_PIPE = Pipe(RayConfig, StartActor, EndActor, Nodes, ActorAddress, ActorEnded, Unusable)


# What a worker checks while it is idle, and the gauge of how much of it was wrong
BROKEN_INVARIANTS = {name: f"broken_{name}" for name in (
    "answers", "pages", "prefixes", "states", "adapters", "drafts", "pictures")}
OF_ALL_PROCESSES = "integrity_checks", *BROKEN_INVARIANTS.values()  # gauges that outlast a worker's process

NO_GAUGES = dict.fromkeys((  # the gauges of a worker that is not running
    "running", "queued", "max_batch", "kv_pages_used", "kv_pages_total", "kv_token_bytes", "states_used",
    "states_total", "state_snapshots", "state_bytes", "mapped_bytes", "adapter_bytes", "preemptions",
    "drafted_tokens", "accepted_tokens", *(f"{name}_{source}" for source in DRAFT_SOURCES
                                           for name in ("drafted", "accepted")),
    "memory_used", "memory_total", "prompt_token_s", "restored_tokens", "restored_bytes",
    "kept_pages", "kept_bytes", "missed_pages", "prefill_saved_s", "keeping_s",
    *OF_ALL_PROCESSES), 0) | {"utilization": None}


@dataclass(frozen=True)
class Known:
    """All that is needed of the server to read a request body."""

    settings: Settings
    tool_format: str | None  # see tool_format_of
    template: str = ""       # its chat template
    chats: bool = True       # False: it continues texts, unless a route is for conversations
    never_written: frozenset[int] = frozenset()  # tokens that no grammar allows
    infill: InfillTokens | None = None           # None: not known yet
    embedder: Embedder | None = None             # None: it gives answers, or is not known yet
    width: int = 0           # numbers in one of its hidden states; 0: not known yet
    native_tools: bool = True  # does its template tell it of functions? else a system prompt does


class KeptItem(NamedTuple):
    """An item of a response or of a conversation, as it is kept."""

    name: str    # its id
    body: bytes  # JSON, without its id


@dataclass(frozen=True)
class ParsedBody:
    """The parsed body of a route that answers: the request, and how to write the answer."""

    request: Request
    stream: bool = True
    include_usage: bool = False
    echo: bool = False
    token_ids: bool = False              # tell the ids of its tokens
    form: str = ""                       # the path of its form, see chatlm/front/api/spoken.py
    kind: str = ""                       # of its answer, in words of its dialect
    details: Mapping = field(default_factory=dict)  # what else its encoder must know
    ignored_tools: tuple[str, ...] = ()  # types of tools that no model here can have
    ignored_fields: tuple[str, ...] = ()  # names of fields that have no effect on this answer
    kept: tuple[KeptItem, ...] = ()      # of an answer that is kept: the items of its input
    repeated: bytes = b""                # what the answer repeats of the body: members of a JSON object
    plan: ToolPlan | None = None         # the tools that the server calls for it; None: none
    added: Mapping = field(default_factory=dict)  # values of the fields that annexes add, checked
    changed_by: tuple[str, ...] = ()     # annexes that may change its prompt, so a sandbox has made none
    goes_on: bool = False                # its answer does when nobody reads it
    beside: Mapping = field(default_factory=dict)  # what annexes add to the answer's body, as its members
    citable: tuple[Mapping, ...] = ()    # what [1], [2], ... in the answer cite, as members of an annotation

    @property
    def is_kept(self) -> bool:
        """Whether its answer is kept, as responses are."""
        return bool(self.details.get("store"))

    @property
    def response_id(self) -> str:
        """The id of the response that it is kept as; "" if it is not kept."""
        return f"resp_{self.request.id}" if self.is_kept else ""

    @property
    def in_background(self) -> bool:
        """Whether its client does not wait for its answer."""
        return bool(self.details.get("background"))

    @property
    def needs_reader(self) -> bool:
        """Whether its answer ends when nobody reads it any more."""
        return not (self.goes_on or self.in_background)

    def lasting(self) -> ParsedBody:
        """What the encoder of the answer needs; only an echo repeats prompts."""
        request = self.request.lasting()
        return replace(self, request=replace(request, prompts=self.request.prompts) if self.echo else request)

    @property
    def size(self) -> int:
        """Roughly how many bytes it holds here until its answer ends, if it was read in a sandbox."""
        request = self.request
        params = self.request.params
        texts = [*[prompt for prompt in request.prompts if isinstance(prompt, str)], params.grammar,
                 *[message.content for message in request.messages or ()], *params.call_grammars,
                 *params.tool_schemas]
        texts += self.details.get("documents") or ()
        names = sum(map(len, params.tool_types)) + len(params.tool_names) + len(params.tool_types)
        return (sum(map(len, texts)) + 8 * sum(map(len, request.prompt_ids or ())) + 150 * names
                + sum(len(item.body) for item in self.kept)
                + 4 * len(self.repeated))  # itself, and three events that the client has not read
