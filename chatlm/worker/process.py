"""The life of a worker, and of a rank: load, report, compute step after step."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.answering import longest_pause_s, Word
from chatlm.common.config import PAGE_SIZE, ranks_per_replica, store_place
from chatlm.common.core import as_expected, decode_core, kernels_line
from chatlm.common.errors import ConfigError, RanksFailed, named, require_library
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.stamps import refuse_changed
from chatlm.common.log import CalmLog, log
from chatlm.common.memory import give_memory_back
from chatlm.common.messages.protocol import (
    AdapterLoaded, CacheEmptied, Cancel, DropAdapter, EmptyCache, EndOfRequest, EndThinking, LoadAdapter,
    Loading, ModelCard, ModelText, NewAnswer, NewPicture, NewPrompt, NewRequest, Ping, Ready)
from chatlm.common.messages.requests import Failed, ModelFacts, ThinkingEnds
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.nodes import advice
from chatlm.common.processes.start import threads_per_worker
from chatlm.common.processes.torchrun import ranks_here
from chatlm.common.segments import MOST_GROUPS
from chatlm.common.vision.pictures import picture_of
from chatlm.worker.build import build_engine, build_transformer
from chatlm.worker.device import bind_to_node, lack_of_gpu_memory, prepare_device
from chatlm.worker.drafting import DraftHelp
from chatlm.worker.engine.engine import failure_text
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.keeper import Keeper
from chatlm.worker.engine.kept import KeptPages
from chatlm.worker.engine.reports import Reports
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.engine.warm_up import warm_up, warm_up_more, warm_up_soon
from chatlm.worker.gauges import Gauges
from chatlm.worker.ranks.messages import RankDrew
from chatlm.worker.ranks.ranks import OtherRank, gather_ranks
from chatlm.worker.ranks.steps import DrawnTokens, RankSteps, Stage, follow, follow_stage
from chatlm.worker.weights.digest import (arithmetic_of, files_of, fingerprint_of, profile_of, sampled_digest,
                                          whole_digest)
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import SurveyConfig, WorkerConfig
    from chatlm.common.messages.requests import AnswerParams, Picture
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.messages import RankConfig
    from chatlm.worker.weights.rules import LoadedModel


def run_rank(channel: Channel, config: RankConfig):
    """A rank's life: load the shard, then compute the steps that rank 0 sends, until it hangs up."""
    log.setLevel(logging.ERROR)  # rank 0 logs the rest
    os.environ.update({name: value for name, value in config.environment.items() if value})
    if (isa := os.environ.get("DECODE_CORE_ISA")) and decode_core() is None:
        raise ConfigError(f"rank 0 uses decode_core with {isa} instructions, but this machine cannot: "
                          "install it here, or set DECODE_CORE_ISA or CHAT_SERVER_KERNELS for rank 0")
    device = prepare_device(config)
    ranks = OtherRank(channel, config)
    bind_to_node(config, config.rank)

    def progress(activity: str, fraction: float):
        channel.send(Loading(activity, fraction))

    settings = config.settings
    source = config.source or resolve_model(settings, progress)
    model = open_model(source, settings, device)
    if not config.source:
        channel.send(Ready({}))
        channel.receive(wait=True, most=1)  # all others have loaded theirs
    _, transformer, _, context, _ = build_transformer(model, source, settings, device, progress, ranks)
    refuse_changed(source, settings)
    steps = transformer.kernels.backend.make_steps(transformer, settings.max_batch, context)
    give_memory_back()
    channel.send(Ready({}))

    def note(checksum: int):
        channel.send(RankDrew(checksum))

    try:
        with transformer.arrays.computing():
            steps.prepare(lambda fraction: None)
            if ranks.stages > 1:
                follow_stage(channel, Stage(steps, transformer, ranks), DrawnTokens(note))
            else:
                follow(channel, RankSteps(steps, transformer, lambda step: None, note))
    except (RuntimeError, EOFError) as error:
        raise RanksFailed(f"rank {ranks.rank}: {error or 'another rank has ended'}") from error


def run_worker(channel: Channel, config: WorkerConfig):
    source = config.source or resolve_model(config.settings, lambda *at: channel.send(Loading(*at)))
    refuse_changed(source, config.settings)
    threads = min(config.threads, threads_per_worker(ranks_here(config.settings)))
    config = replace(config, source=source, threads=threads)
    engine = start_engine(channel, config)
    with engine.transformer.arrays.computing():
        run_engine(channel, engine, config)


def start_engine(channel: Channel, config: WorkerConfig) -> Engine:
    settings = config.settings
    ranks = None

    def progress(activity: str, fraction: float):
        channel.send(Loading(f"{activity} on {config.device}", fraction))

    if ranks_per_replica(settings) > 1:
        ranks = gather_ranks(config, progress)  # processes that it starts may run where this one still may
    device = prepare_device(config)
    bound = bind_to_node(config, 0)
    files, fingerprint = fingerprinted_files(config)
    draft_help = DraftHelp(config.drafts)
    model, engine = build_engine(
        config.source, settings, device, progress, ranks,  # pyright: ignore[reportArgumentType]  run_worker has found it
        opened=lambda model: channel.send(ModelText(model.text)), draft_help=draft_help)
    channel.send(replace(describe_model(model, engine, config, bound), without=tuple(draft_help.without)))
    del model
    if ranks:
        ranks.wait_ready(progress)
    if config.source:
        refuse_changed(config.source, settings)  # while they were read
    with engine.transformer.arrays.computing():
        if device.type == "cpu" and not ranks:
            warm_up_soon(engine)
        else:
            warm_up(engine, partial(progress, "warming up"))
    if fingerprint and not ranks and device.type == "cpu" and not engine.limits.of_texts:
        keep_prefixes(engine, config, files, fingerprint)
    if config.answering and device.type == "cpu":
        share_word(engine, config.answering, bool(bound))
    give_memory_back()
    CalmLog.over_bar = False
    channel.send(Ready(Gauges(engine).read(), engine.kernels.backend.faults))
    return engine


def share_word(engine: Engine, path: str, apart: bool = False):
    """Answers are told to the other workers of the server, on whose CPUs texts then wait between layers, and
    background work between steps, unless each worker has processors and memory of its own (`apart`)."""
    try:
        word = Word(path)
    except OSError as error:
        return log.warning("texts will be embedded beside answers as fast as ever: %s", error)
    if not apart:
        engine.scheduler.lane.give_way_to(word)
    model = engine.transformer.model
    if model.waits and engine.ranks:
        return  # the other ranks would take a pause for the death of this one
    if model.waits:
        engine.kernels.backend.pause_while(word, longest_pause_s(len(model.layers)))
    else:
        engine.tell(word)


def fingerprinted_files(config: WorkerConfig) -> tuple[list[Path], str]:
    """The model's files and their fingerprint before they are read; "" if no prefixes are kept."""
    if config.prefix_memory and config.source:
        with suppress(OSError, ConfigError):  # loading will report what is wrong
            files = files_of(config.source, config.settings)
            return files, fingerprint_of(files)
    return [], ""


def keep_prefixes(engine: Engine, config: WorkerConfig, files: list[Path], fingerprint: str):
    """From now on pages outlive this process, and those of earlier processes are restored."""
    settings = config.settings
    store = store_place(settings.prefix_store)[0] if settings.prefix_store else None
    if len(engine.pool.windows) > MOST_GROUPS:
        return log.warning("prefixes are not kept: the layers of this model are in %d groups, and at most "
                           "%d can be kept", len(engine.pool.windows), MOST_GROUPS)
    try:
        kept = KeptPages(config.prefix_memory, config.prefix_bytes, store,
                         config.source.name if config.source else "")
    except OSError as error:
        return log.warning("prefixes are not kept: %s", error)
    engine.keep(keeper := Keeper(engine.pool, engine.transformer, kept, engine.times))
    keeper.begin(lambda: profile_of(whole_digest(files, fingerprint, store),
                                    arithmetic_of(engine.transformer, settings)), patience_s=2.0)


def describe_model(model: LoadedModel, engine: Engine, config: WorkerConfig, bound: str) -> ModelCard:
    """bound: what `bind_to_node` said."""
    pages = engine.pool.num_pages
    device = engine.transformer.device
    layout = engine.transformer.layout
    groups = engine.transformer.groups
    context = engine.context_length
    page_bytes = layout.page_bytes
    hardware = f"{device} with {config.threads} thread(s)" if device.type == "cpu" else str(device)
    if engine.ranks:
        stages = engine.ranks.stages
        tp = engine.ranks.tp
        hardware = f"{stages * tp} ranks (--pp {stages} --tp {tp}), each on {hardware}"
    if device.type == "cuda":
        torch = require_library("torch", "--device-type cuda")
        total = torch.cuda.mem_get_info(device)[1]
        ours = torch.cuda.memory_allocated(device)
        hardware += (f" ({torch.cuda.get_device_name(device)}, {total / 1e9:,.1f} GB; "
                     f"weights and buffers {(ours - pages * page_bytes) / 1e9:,.2f} GB)")
    kernels = dict(engine.kernels.names)
    longest = engine.pool.pages_for(context, engine.limits.prefill_chunk)
    holds = (f"of {PAGE_SIZE} tokens = {pages * PAGE_SIZE:,} tokens" if not groups.holes else
             f"of {PAGE_SIZE} tokens in {groups.depth} layers, of which a sequence holds at most {longest:,}")
    cache = (f"KV cache: {pages:,} pages {holds} ({pages * page_bytes / 2**20:,.0f} MiB); "
             f"{token_bytes(engine.transformer)}; context {context:,} tokens")
    if engine.limits.of_texts:
        cache = (f"texts of at most {context:,} tokens, of which a step takes about "
                 f"{engine.limits.prefill_chunk:,} together; their keys and values take up to "
                 f"{pages * page_bytes / 2**20:,.0f} MiB")
    if states := engine.pool.states:
        cache += (f"; {states.num_slots:,} states of {engine.state_bytes / 1024:,.0f} KiB, of which "
                  f"{states.most_snapshots:,} are for snapshots; at most {engine.limits.max_batch} "
                  "sequences run at once")
    core = kernels_line()
    if not bound and device.type == "cpu" and not engine.limits.of_texts:
        bound = advice(ranks_here(config.settings) * config.place[1])
    lines = (f"Model {model.name}: {model.description}",
             *[core] * (config.settings.verbose or not as_expected(core)),
             f"Running on {hardware}, weights in {engine.transformer.weight_types}"
             f"{' in rank 0' if engine.ranks else ''}; kernels: {', '.join(sorted(set(kernels.values())))}"
             f"{', fine arithmetic' if config.settings.arithmetic == 'fine' else ''}",
             cache, *[bound] * bool(bound), *model.notes)
    text = replace(model.text, payload=b"")  # the front has it
    return ModelCard(text, model.name, engine.context_length, lines, kernels,
                     engine.kernels.row_invariant, core, dict(model.sampling),
                     model.sampling_origin, f"{hardware}; {cache}", config.source,
                     model_facts(model, config, engine.transformer.matrix_types[0],
                                 engine.transformer.weights_bytes), engine.scored_length)


def token_bytes(transformer: Transformer) -> str:
    """The bytes that this rank's layers cache per token, and how many outlast the windows, in words."""
    kept = transformer.token_bytes()
    lasting = transformer.token_bytes(lasting=True)
    types = " and ".join(dict.fromkeys(filter(None, transformer.layout.types)))
    once = f", {lasting:,} once out of all windows" if lasting < kept else ""
    return f"{types}, {kept:,} bytes a token{once}"


def model_facts(model: LoadedModel, config: WorkerConfig | SurveyConfig, weights: str,
                weights_bytes: int) -> ModelFacts:
    """weights: the commonest type of its matrices in memory."""
    made = model.architecture
    files = {"hf": "safetensors"}
    source = config.source
    shapes = made.shapes()
    if made.tied:  # the head is the embedding
        shapes.pop("head", None)
    return ModelFacts(model.family, files.get(source.kind, source.kind) if source else "",
                      sum(map(math.prod, shapes.values())), weights, weights_bytes, made.width,
                      len(made.layers),
                      sampled_digest(source.path, config.settings.lora) if source else "",
                      config.settings.arithmetic)


LOADING_S = 0.05  # between checks of adapters that are being read, while nothing is computed
MAX_FAILURES = 3  # failed steps in a row that a worker survives; after one more it is replaced


class Inbox:
    """What the answers of each request share, kept until the front announces that it has no more of them."""

    def __init__(self, engine: Engine, tell: Callable[[AdapterLoaded], None] = lambda message: None):
        self.engine = engine
        self.tell = tell
        self.params: dict[str, AnswerParams] = {}                 # by request
        # by request, then by index: its ids, and what it shows
        self.prompts: dict[str, dict[int, tuple[tuple[int, ...], tuple[Picture, ...]]]] = {}
        self.pictures: list[Picture] = []  # of the next prompt
        self.empties_cache = False  # as soon as nothing is computed
        self.dropped: set[str] = set()  # adapters to drop once they are read
        self.loading: dict[str, str] = {}  # adapters that are being read: id -> folder
        self.waiting: dict[str, list[Assignment]] = {}  # answers that need them, by adapter

    def obey(self, message):
        match message:
            case NewRequest(id, params):
                self.params[id] = params
                self.prompts[id] = {}
            case NewPicture() | NewPrompt():
                self.note_prompt(message)
            case NewAnswer(id, request, prompt, choice, most, resumed, scored, ends, sent, low):
                (ids, shown), params = self.prompts[request][prompt], self.params[request]
                work = Assignment(id, ids, params, most, choice, resumed, scored, ends, sent, low, shown)
                if params.adapter in self.loading:
                    self.waiting.setdefault(params.adapter, []).append(work)
                else:
                    self.engine.add(work)
            case EndThinking(id) if self.waits(id):
                self.engine.events.append((id, ThinkingEnds(None)))
            case EndThinking(id):
                self.engine.end_thinking(id)
            case Cancel(id) if self.waits(id):
                self.waiting = {adapter: [work for work in works if work.id != id]
                                for adapter, works in self.waiting.items()}
            case Cancel(id):
                self.engine.cancel(id)
            case EndOfRequest(id):
                del self.params[id], self.prompts[id]
            case LoadAdapter(id, folder, stamp, digest):
                self.loading[id] = folder
                self.engine.adapters.begin(id, Path(folder), stamp, digest)
            case DropAdapter(id) if id in self.loading:
                self.dropped.add(id)
            case DropAdapter(id):
                self.engine.drop_adapter(id)
            case EmptyCache():
                self.empties_cache = True
            case Ping():
                pass  # any message makes the loop step and report
            case _:
                raise BadMessage(f"unexpected message from the front: {type(message).__name__}")

    def note_prompt(self, message: NewPicture | NewPrompt):
        if isinstance(message, NewPicture):
            return self.pictures.append(picture_of(message))
        if message.pictures != len(self.pictures):
            raise BadMessage(f"a prompt with {message.pictures} pictures after {len(self.pictures)}")
        self.prompts[message.id][message.index] = message.ids, tuple(self.pictures)
        self.pictures = []

    def waits(self, answer_id: str) -> bool:
        """Does this answer wait for its adapter to be read?"""
        return any(work.id == answer_id for works in self.waiting.values() for work in works)

    def end_loading(self):
        """Report to the front which adapters have been read, and start the answers that waited for them."""
        for adapter_id in [*self.loading]:
            if not self.engine.adapters.has_ended(adapter_id):
                break  # they are read one at a time
            self.tell(self.loaded(adapter_id, self.loading.pop(adapter_id)))
            if adapter_id in self.dropped:
                self.dropped.remove(adapter_id)
                self.engine.drop_adapter(adapter_id)
            for work in self.waiting.pop(adapter_id, ()):
                self.engine.add(work)

    def loaded(self, adapter_id: str, folder: str) -> AdapterLoaded:
        try:
            return AdapterLoaded(adapter_id, "", *self.engine.adapters.end(adapter_id))
        except ConfigError as error:
            return AdapterLoaded(adapter_id, str(error))
        except Exception as error:  # a file broken in an unexpected way affects no other answer
            log.exception("an adapter could not be loaded")
            return AdapterLoaded(adapter_id, f"{folder}: {named(error)}")


def run_engine(channel: Channel, engine: Engine, config: WorkerConfig):
    """The worker's loop: handle messages, step, report, sleep when idle. EOFError when the front is gone."""
    failures = 0  # failed steps in a row
    inbox = Inbox(engine, channel.send)
    checks_integrity = os.environ.get("CHAT_SERVER_CHECK_INTEGRITY") == "1"  # slow: for soaks

    reports = Reports(channel, engine, Gauges(engine).read, config.settings.stream_interval / 1000)

    while True:
        inbox.end_loading()
        idle = not (engine.busy or engine.events or engine.keeper and engine.keeper.copier.behind)
        warms_up = idle and bool(engine.cold)
        messages = channel.receive(wait=idle and not warms_up,
                                   patience_s=LOADING_S if inbox.loading else None)
        for message in messages:
            inbox.obey(message)
        if engine.busy:
            engine.cold.clear()  # what was asked warms up as well
        elif warms_up and not messages:
            warm_up_more(engine)
            if not engine.cold:
                give_memory_back()
            continue
        try:
            if engine.ranks:
                engine.ranks.check()
            reports.add(engine.step(reports.send))
            failures = 0
        except Exception as error:  # one bad step fails one request, not the server
            if engine.ranks:
                raise RanksFailed(str(error)) from error
            failures += 1
            if failures > MAX_FAILURES or "CUDA error" in str(error):  # only a fresh process can help
                raise
            if advice := lack_of_gpu_memory(error, config):
                log.error("a step failed: %s", advice)
                importlib.import_module("torch").cuda.empty_cache()
            else:
                log.error("a step failed", exc_info=error)
            reports.add((answer_id, Failed(failure_text(error))) for answer_id in engine.give_up())
        if not engine.busy:
            if inbox.empties_cache:
                inbox.empties_cache = False
                channel.send(CacheEmptied(engine.empty_cache()))
            reports.send()
            if checks_integrity:
                check_integrity(engine)
                log.info("integrity check: no faults")
